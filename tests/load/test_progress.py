"""`progress=` of a load: bytes of the model's tensors, in the caller's thread, from none to all."""

from __future__ import annotations

import threading

import pytest
import torch
from peers import naflex, openclip
from peers.common import same_bits

import keymap
import keymap.load.direct
import keymap.load.execute
import keymap.load.transposed
from keymap.language.layout import whole
from keymap.plan.export import Target
from keymap.write.containers import write_container
from keymap.write.tensors import Item

CASES = {  # what a load does: bytes as they are, another order, another dtype, numpy's and torch's files, a resize
    "own names": (openclip.clip, "open_clip", ".safetensors", {}),
    "transposed": (openclip.siglip, "big_vision_siglip", ".npz", {}),
    "joined": (openclip.clip, "hf_clip", ".pt", {}),
    "another dtype": (openclip.clip, "hf_clip", ".safetensors", {"dtype": "float16"}),
    "computed": (naflex.model, "hf_siglip2_naflex", ".safetensors", {}),
}


@pytest.fixture
def seen():
    """(done, total) of every call, and a check that it comes in this thread."""

    class Seen(list):
        def __call__(self, done, total):
            assert threading.current_thread() is threading.main_thread()
            self.append((done, total))

        def check(self, nbytes):
            assert self[0] == (0, nbytes) and self[-1] == (nbytes, nbytes)
            done = [number for number, _ in self]
            assert done == sorted(done) and {total for _, total in self} == {nbytes}

    return Seen()


def saved(tmp_path, name):
    build, form, suffix, options = CASES[name]
    keymap.save_checkpoint(build(seed=1), tmp_path / f"x{suffix}", form, **options)
    return build, tmp_path / f"x{suffix}"


def same(model, other):
    return all(same_bits(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def bytes_of(plan, model):
    held = model.state_dict()
    return sum(held[entry.key].nbytes for entry in plan.entries)


@pytest.mark.parametrize("cut", [False, True], ids=["as it is", "in small parts"])
@pytest.mark.parametrize("name", CASES)
def test_a_load_counts_from_none_to_all(name, cut, tmp_path, seen, monkeypatch):
    build, file = saved(tmp_path, name)
    if cut:
        monkeypatch.setattr(keymap.load.direct, "_MAX_BATCH", 1000)
        monkeypatch.setattr(keymap.load.transposed, "_MIN_ELEMENTS", 0)
        monkeypatch.setattr(keymap.load.transposed, "_MAX_STRIP", 1 << 10)
        monkeypatch.setattr(keymap.load.execute, "_MAX_MAPPED", 1000)
        monkeypatch.setattr(keymap.load.execute, "_MAX_WAITING", 2)
    model, other = build(seed=2), build(seed=2)
    report = keymap.load_checkpoint(model, file, progress=seen).report
    seen.check(bytes_of(report.plan, model))
    assert len(seen) > 2 or not cut
    keymap.load_checkpoint(other, file)
    assert same(model, other)


@pytest.mark.parametrize("name", CASES)
def test_a_load_that_assigns_counts_from_none_to_all(name, tmp_path, seen):
    build, file = saved(tmp_path, name)
    model = build(seed=2)
    report = keymap.load_checkpoint(model, file, assign=True, progress=seen).report
    seen.check(bytes_of(report.plan, model))


def test_a_resized_position_embedding_counts_with_the_bytes_of_the_model(tmp_path, seen):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "x.pt", "open_clip")
    model = openclip.clip(seed=2, image_size=56, context_length=24)
    report = keymap.load_checkpoint(model, tmp_path / "x.pt", progress=seen).report
    assert report.plan.resized
    seen.check(bytes_of(report.plan, model))


def test_one_tower_counts_its_own_bytes(tmp_path, seen):
    build, file = saved(tmp_path, "joined")
    model = build(seed=2)
    keymap.load_checkpoint(model, file, towers="image", progress=seen)
    assert seen[-1][1] == sum(value.nbytes for key, value in model.state_dict().items() if key.startswith("visual."))
    seen.check(seen[-1][1])


def test_a_refused_load_makes_no_call(tmp_path, seen):
    build, file = saved(tmp_path, "joined")
    with pytest.raises(keymap.PlanError):
        keymap.load_checkpoint(build(image_width=96), file, progress=seen)
    assert seen == []


@pytest.mark.parametrize("assign", [False, True])
def test_an_exception_of_the_first_call_leaves_the_model_unchanged(assign, tmp_path):
    build, file = saved(tmp_path, "joined")
    model, before = build(seed=2), build(seed=2)

    def stop(_done, _total):
        raise RuntimeError("stop")

    with pytest.raises(keymap.LoadError, match=r"stop.*nothing was changed"):
        keymap.load_checkpoint(model, file, assign=assign, progress=stop)
    assert same(model, before)


def test_an_exception_of_a_later_call_is_reported_as_half_loaded(tmp_path):
    build, file = saved(tmp_path, "joined")

    def stop(done, _total):
        if done:
            raise ValueError("stop")

    with pytest.raises(keymap.LoadError, match=r"stop.*half loaded"):
        keymap.load_checkpoint(build(seed=2), file, progress=stop)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_a_conversion_counts_from_none_to_all(suffix, tmp_path, seen):
    _, file = saved(tmp_path, "joined")
    result = keymap.convert_checkpoint(file, tmp_path / f"y{suffix}", "open_clip", progress=seen)
    seen.check(result.nbytes)


def test_tensors_that_share_their_storage_count_each(tmp_path):
    """A file of torch holds such tensors once; the total counts both."""
    item = Item(Target(whole("w", (2, 3), torch.float32), (2, 3), torch.float32), torch.float32, "w")
    counted = []
    write_container(
        tmp_path / "x.pt",
        ".pt",
        {"a": item, "b": item},
        lambda _: [torch.ones(2, 3).numpy().data.cast("B")],
        {},
        counted.append,
    )
    assert counted == [item.nbytes, item.nbytes]
    held = torch.load(tmp_path / "x.pt", weights_only=True)
    assert held["a"].data_ptr() == held["b"].data_ptr() and torch.equal(held["a"], torch.ones(2, 3))


def test_an_exception_during_a_conversion_leaves_no_file(tmp_path):
    _, file = saved(tmp_path, "joined")

    def stop(done, _total):
        if done:
            raise ValueError("stop")

    with pytest.raises(keymap.WriteError, match=r"progress= raised ValueError: stop; nothing was written"):
        keymap.convert_checkpoint(file, tmp_path / "y.pt", "open_clip", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
