"""Whatever is passed to a public function, the outcome is a KeymapError or right."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file
from torch import nn

import keymap


@pytest.fixture(autouse=True)
def _nothing_at_home_and_here(tmp_path_factory, monkeypatch):
    """Odd paths name the working folder and the home folder: neither may hold a file of somebody else."""
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("HOME", str(empty))
    monkeypatch.chdir(empty)


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "a.safetensors", openclip.clip(seed=1).state_dict())


def saved(path, state):
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, path)
    return path


class BytesPath:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fsencode(self.path)


class BadPath:
    def __fspath__(self):
        raise ZeroDivisionError


class NumberPath:
    def __fspath__(self):
        return 5


class Odd:
    def __eq__(self, other):
        raise ZeroDivisionError

    __hash__ = object.__hash__


ODD = [
    None,
    True,
    0,
    -1,
    3,
    2.5,
    float("nan"),
    "",
    "\0",
    "~",
    "/dev/null",
    "x" * 5000,
    "\udcff",
    b"",
    b"x",
    (),
    [],
    {},
    set(),
]
ODD += [(1,), (0, 0), ("a", 1), [None], {1: 2}, {"a": "b"}, {"image.heads": -1}, object(), int, BadPath(), NumberPath()]
ODD += [torch.ones(2), torch.float32, Path(), Odd(), range(3), slice(1), lambda: 1, nn.Linear(1, 1)]
ARGUMENTS = ["model", "checkpoint_path", "device", "mapping", "towers", "wrapper", "source_grid", "facts"]
ARGUMENTS += ["strict", "weights_only", "assign"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_load_raises_a_keymap_error_or_is_right(name, file):
    model, source = openclip.clip(seed=2), bits(openclip.clip(seed=1))
    before = bits(model)
    for function in (keymap.load_checkpoint, keymap.plan_load):
        if function is keymap.plan_load and name in ("device", "assign"):
            continue
        for value in ODD:
            arguments = {"model": model, "checkpoint_path": file} | {name: value}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**arguments)
            except keymap.KeymapError:
                assert_unchanged(model, before)
            else:
                assert_unchanged(model, source if function is keymap.load_checkpoint else before)
                model = openclip.clip(seed=2)


@pytest.mark.parametrize("name", ["path", "weights_only", "wrapper"])
def test_an_inspection_raises_a_keymap_error_or_is_right(name, file):
    for value in ODD:
        try:
            found = keymap.inspect_checkpoint(**{"path": file} | {name: value})
        except keymap.KeymapError:
            continue
        assert found.format == "open_clip"


@pytest.mark.parametrize("name", ["state_dict", "to", "mapping", "facts", "key", "value"])
def test_a_conversion_raises_a_keymap_error_or_is_right(name):
    state = hf.disk_keys(hf.clip(seed=1))
    expected = keymap.convert_state_dict(state, "open_clip")
    for value in ODD:
        arguments = {"state_dict": state, "to": "open_clip"} | {name: value}
        if name == "key":
            if isinstance(value, (list, dict, set, slice)):
                continue  # no key of a dict
            arguments = {"state_dict": {**state, value: torch.ones(2)}, "to": "open_clip"}
        elif name == "value":
            arguments = {"state_dict": {**state, "logit_scale": value}, "to": "open_clip"}
        try:
            found = keymap.convert_state_dict(**arguments)
        except keymap.KeymapError:
            continue
        assert found.keys() == expected.keys()


def test_register_mappings_raises_a_keymap_error():
    for value in ODD:
        with pytest.raises(keymap.KeymapError):
            keymap.register_mappings(value)


# --- models ---


def test_a_scripted_model_is_refused(file):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Linear(2, 2)

        def forward(self, x):
            return self.visual(x)

    for model in (torch.jit.script(Small()), torch.jit.trace(Small(), torch.ones(1, 2))):
        for function in (keymap.load_checkpoint, keymap.plan_load):
            with pytest.raises(keymap.PlanError, match="load into the model before"):
                function(model, file)
    model = openclip.clip(seed=2)
    model.visual.ln_post = torch.jit.script(model.visual.ln_post)
    with pytest.raises(keymap.PlanError, match=r"TorchScript \(visual\.ln_post\)"):
        keymap.load_checkpoint(model, file)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_without_keep_vars_loads(assign, file):
    class Mine(type(openclip.clip())):
        def state_dict(self):
            return nn.Module.state_dict(self)

    model = openclip.clip(seed=2)
    model.__class__ = Mine
    keymap.load_checkpoint(model, file, assign=assign)
    assert_unchanged(model, bits(openclip.clip(seed=1)))


@pytest.mark.parametrize("answer", [RuntimeError("gathering failed"), [], 3])
def test_a_state_dict_that_fails_is_refused(answer, file):
    class Mine(type(openclip.clip())):
        def state_dict(self, *arguments, **options):
            if isinstance(answer, Exception):
                raise answer
            return answer

    model = openclip.clip(seed=2)
    model.__class__ = Mine
    with pytest.raises(keymap.PlanError, match=r"model\.state_dict\(\) (failed with RuntimeError|returned a)"):
        keymap.load_checkpoint(model, file)


@pytest.mark.parametrize("value", ["2x2", "", 2.0, True, (1, 2, 3), ("a", "b"), (0, 0), (-1, 4), {}, None, object()])
@pytest.mark.parametrize("name", ["grid_size", "patch_size", "image_size"])
def test_a_grid_that_is_none_is_unknown(name, value, file):
    model = openclip.clip(seed=2)
    setattr(model.visual, name, value)
    keymap.load_checkpoint(model, file)
    assert_unchanged(model, bits(openclip.clip(seed=1)))


@pytest.mark.parametrize("device", ["hpu", "xla", "privateuseone", "mtia", "ipu", "no", 3.5, "cpu:x"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_device_without_its_backend_is_refused(device, assign, file):
    with pytest.raises(keymap.PlanError, match="torch cannot use this device"):
        keymap.load_checkpoint(openclip.clip(seed=2), file, device=device, assign=assign)


# --- tensors of a conversion ---


class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


BAD = {
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "sparse": lambda value: value.to_sparse(),
    "on the meta device": lambda value: value.to("meta"),
    "a Wrapped": lambda value: Wrapped(value),
    "nested": lambda value: torch.nested.nested_tensor([value, value[1:]]),
    "no shape yet": lambda value: nn.parameter.UninitializedParameter(),
}


@pytest.mark.parametrize("what", BAD)
def test_tensors_without_plain_values_are_refused_by_name(what):
    state = dict(hf.disk_keys(hf.clip(seed=1)))
    key = "text_model.final_layer_norm.weight"
    state[key] = BAD[what](state[key])
    with pytest.raises(keymap.PlanError, match=f"{key} .*{what}") as caught:
        keymap.convert_state_dict(state, "open_clip")
    assert caught.value.summary == "1 tensor of the state dict cannot be converted"


def test_distributed_tensors_are_refused_by_name():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        state = dict(hf.disk_keys(hf.clip(seed=1)))
        key = "visual_projection.weight"
        state[key] = distribute_tensor(state[key], init_device_mesh("cpu", (1,)))
        with pytest.raises(keymap.PlanError, match=rf"{key} is a DTensor.*full_tensor"):
            keymap.convert_state_dict(state, "open_clip")
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("key", [5, b"x", None, ("a", 1)])
def test_a_key_that_is_no_string_is_refused(key):
    state = {**hf.disk_keys(hf.clip(seed=1)), key: torch.ones(1)}
    with pytest.raises(keymap.PlanError, match="keys that are not strings"):
        keymap.convert_state_dict(state, "open_clip")


def test_conjugated_and_negated_views_convert_to_their_values():
    state = dict(hf.disk_keys(hf.clip(seed=1)))
    key = "visual_projection.weight"
    expected = keymap.convert_state_dict(state, "open_clip")
    state[key] = torch._neg_view(-state[key])
    found = keymap.convert_state_dict(state, "open_clip")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- paths ---


def test_a_path_of_bytes_loads(file):
    keymap.load_checkpoint(openclip.clip(seed=2), BytesPath(file))
    assert keymap.inspect_checkpoint(BytesPath(file)).format == "open_clip"


@pytest.mark.parametrize("bad", [BadPath(), NumberPath(), "", None, 3])
def test_what_is_no_path_is_refused(bad):
    with pytest.raises(keymap.CheckpointError, match="is not a path"):
        keymap.load_checkpoint(openclip.clip(seed=2), bad)


def test_the_home_folder_is_found(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("USERPROFILE", str(file.parent))
    text = "format: my_own\ntitle: a test\nreference: none\ndetect: {any: [mine.weight]}\n"
    text += "layouts: {text: flat}\ntowers:\n  text:\n    mine.weight: ln_final.weight\n"
    (file.parent / "mine.yaml").write_text(text)
    assert keymap.inspect_checkpoint("~/a.safetensors").format == "open_clip"
    assert keymap.inspect_checkpoint(Path("~")).format == "open_clip"
    result = keymap.load_checkpoint(openclip.clip(seed=2), "~/a.safetensors")
    assert result.report.plan.file == str(file)
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.plan_load(openclip.clip(seed=2), file, mapping="~/mine.yaml")
    assert "does not exist" not in str(caught.value)


def test_file_names_that_are_not_utf8_print(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    path = saved(folder / "a.safetensors", openclip.clip(seed=1).state_dict())
    results = [
        keymap.load_checkpoint(openclip.clip(seed=2), path),
        keymap.plan_load(openclip.clip(seed=2), folder),
        keymap.inspect_checkpoint(path),
    ]
    results.append(results[0].report)
    for wrong in (folder / "b.safetensors", folder / "missing"):
        (folder / "b.safetensors").write_bytes(b"text")
        with pytest.raises(keymap.CheckpointError) as caught:
            keymap.load_checkpoint(openclip.clip(seed=2), wrong)
        results.append(caught.value)
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(openclip.siglip(seed=2), path)
    for result in (*results, caught.value):
        assert r"caf\udce9" in str(result).encode("utf-8").decode()
    assert os.fsencode(results[1].file).startswith(os.fsencode(folder))  # data keeps the name itself


def test_a_property_that_fails_gives_no_setting(file):
    model = openclip.clip(seed=2)
    kind = type(model.visual)
    broken = property(lambda self: [][0])
    model.visual.__class__ = type("Visual", (kind,), {"pool_type": broken, "final_ln_after_pool": broken})
    del model.visual.__dict__["pool_type"]
    keymap.load_checkpoint(model, file)
    assert_unchanged(model, bits(openclip.clip(seed=1)))
