"""Bytes that go from the file into the model unchanged: which they are, how they are read, how torch is notified."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peers import openclip
from peers.common import same_bits
from safetensors.torch import save_file
from torch import Tensor

import keymap
import keymap.load.direct
from keymap.language.layout import Piece
from keymap.load.direct import batches, byte_range, read_batch
from keymap.read import LazyTensor, open_checkpoint

SIZES = [3, 0, 1, 500, 7, 4096, 2, 1]


def written(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, LazyTensor]]:
    tensors = {f"t{n}": torch.randn(size).to(dtype) for n, size in enumerate(SIZES)}
    save_file(tensors, folder / "a.safetensors")
    tree = open_checkpoint(folder / "a.safetensors").tree
    return tensors, {key: tree[key] for key in tensors}


def all_of(lazy: LazyTensor) -> Piece:
    count = lazy.shape[0]
    return Piece("x", (count,), 0, (1,), 0, (1,))


@pytest.mark.parametrize("batch", [1, 5, 100, 1 << 20])
@pytest.mark.parametrize("buffers", [1, 2, 100])
@pytest.mark.parametrize("chosen", [slice(None), slice(None, None, 2), slice(2, 7, 3)])
def test_batches_fill_every_place_whatever_their_size(batch, buffers, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(keymap.load.direct, "_MAX_BATCH", batch)
    monkeypatch.setattr(keymap.load.direct, "_MAX_BUFFERS", buffers)
    tensors, lazies = written(tmp_path)
    names = [name for name in list(tensors)[chosen] if tensors[name].numel()]
    targets = {name: torch.full_like(tensors[name], float("nan")) for name in names}
    runs = [byte_range(all_of(lazies[name]), lazies[name], targets[name]) for name in reversed(names)]
    assert None not in runs
    made = list(batches(runs))
    assert all(part.size == sum(map(len, part.buffers)) for part in made)
    assert all(part.size <= batch for part in made) or batch < 4096  # beside what a gap adds
    for part in made:
        read_batch(part)
    assert all(same_bits(targets[name], tensors[name]) for name in names)


def test_tensors_that_lie_side_by_side_are_read_by_one_call(tmp_path):
    tensors, lazies = written(tmp_path)
    runs = [byte_range(all_of(lazies[n]), lazies[n], torch.empty_like(t)) for n, t in tensors.items() if t.numel()]
    (only,) = batches(runs)
    assert only.size == sum(t.nbytes for t in tensors.values())


def test_a_part_of_a_tensor_goes_to_a_part_of_another(tmp_path):
    tensors, lazies = written(tmp_path)
    target = torch.zeros(40)
    run = byte_range(Piece("x", (10,), 300, (1,), 20, (1,)), lazies["t3"], target)
    read_batch(*batches([run]))
    assert same_bits(target[20:30], tensors["t3"][300:310])
    assert not target[:20].any() and not target[30:].any()


OTHERS = {
    "another dtype": (torch.float32, lambda n: torch.empty(n, dtype=torch.float16), (1,)),
    "a device without memory": (torch.float32, lambda n: torch.empty(n, device="meta"), (1,)),
    "a stride": (torch.float32, lambda n: torch.empty(n), (2,)),
    "booleans, which any byte but 0 may store as true": (torch.bool, lambda n: torch.empty(n, dtype=torch.bool), (1,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tensors_that_are_not_plain_bytes_are_not_read_as_one_run(name, tmp_path):
    dtype, make, strides = OTHERS[name]
    _, lazies = written(tmp_path, dtype)
    piece = Piece("x", (200,), 0, strides, 0, (1,))
    assert byte_range(piece, lazies["t3"], make(500)) is None


def test_a_file_that_shrinks_raises_an_error_and_does_not_kill_the_process(tmp_path):
    _, lazies = written(tmp_path)
    run = byte_range(all_of(lazies["t5"]), lazies["t5"], torch.empty(4096))
    os.truncate(run.file.path, run.start + 99)
    (batch,) = batches([run])
    with pytest.raises(keymap.CheckpointError, match="was written to while it was read"):
        read_batch(batch)
    os.utime(run.file.path, ns=(run.file.status.st_atime_ns, run.file.status.st_mtime_ns))
    with pytest.raises(keymap.CheckpointError, match=r"was written to|ends at byte"):
        read_batch(batch)


def test_an_open_file_is_read_although_its_path_was_replaced(tmp_path):
    tensors, lazies = written(tmp_path)
    run = byte_range(all_of(lazies["t5"]), lazies["t5"], torch.zeros(4096))
    (tmp_path / "b").write_bytes(b"x" * run.file.size)
    os.replace(tmp_path / "b", run.file.path)
    read_batch(*batches([run]))
    assert same_bits(run.target, tensors["t5"])
    os.unlink(run.file.path)
    read_batch(*batches([run]))


def test_a_file_is_closed_with_its_last_tensor(tmp_path):
    _, lazies = written(tmp_path)
    handle = lazies["t3"].region[0].handle
    assert handle is not None
    assert os.fstat(handle).st_size == (tmp_path / "a.safetensors").stat().st_size
    del lazies
    with pytest.raises(OSError):
        os.fstat(handle)


def test_where_no_descriptor_is_left_the_mapping_is_read(tmp_path, monkeypatch):
    """Of many shards each needs one; the mapping has its own."""
    tensors, lazies = written(tmp_path)
    run = byte_range(all_of(lazies["t5"]), lazies["t5"], torch.zeros(4096))

    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", none_left)
    read_batch(*batches([run]))
    assert run.file.handle is None
    assert same_bits(run.target, tensors["t5"])


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    tensors, lazies = written(tmp_path)
    targets = {name: torch.empty_like(t) for name, t in tensors.items() if t.numel()}
    (batch,) = batches([byte_range(all_of(lazies[n]), lazies[n], t) for n, t in targets.items()])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, places, at: real(handle, [places[0][:1000]], at))
    read_batch(batch)
    assert all(same_bits(targets[name], tensors[name]) for name in targets)


def _state(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    state = {key: value.contiguous() for key, value in openclip.clip(seed=1).state_dict().items()}
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors", state


def test_autograd_notices_that_parameters_were_written_to(tmp_path):
    """A backward pass over values that are gone would be silently wrong."""
    path, _ = _state(tmp_path)
    model = openclip.clip(seed=2)
    loss = (model.visual.proj * model.visual.proj).sum()
    keymap.load_checkpoint(model, path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("inference", [False, True])
def test_every_number_of_threads_loads_the_same(threads, inference, tmp_path):
    path, state = _state(tmp_path)
    model = openclip.clip(seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(inference):
            keymap.load_checkpoint(model, path)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["runs", "conversions"])
def test_a_system_without_the_call_reads_from_the_mapping(dtype, tmp_path, monkeypatch):
    path, state = _state(tmp_path)
    save_file({key: value.to(dtype) for key, value in state.items()}, path)
    model = openclip.clip(seed=2)
    monkeypatch.delattr(os, "preadv")
    keymap.load_checkpoint(model, path)
    assert all(same_bits(value, state[key].to(dtype).float()) for key, value in model.state_dict().items())
