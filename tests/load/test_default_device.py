"""Under a default device of the caller, every load and conversion gives the file's values, where they belong."""

from __future__ import annotations

import contextlib
import zipfile

import pytest
import torch
from peers import big_vision, hf, openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap


@contextlib.contextmanager
def default_device(name):
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


AMBIENT = {"a context": lambda: torch.device("meta"), "a setting": lambda: default_device("meta")}


def plain(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def safetensors(state):
    def write(path):
        save_file({key: value.contiguous() for key, value in state().items()}, path)

    return write


def torch_file(state, deflated=False):
    def write(path):
        torch.save(state(), path)
        if deflated:
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in members.items():
                    archive.writestr(name, content)

    return write


def npz(compressed):
    return lambda path: big_vision.save(big_vision.init(seed=1), path.with_suffix(".npz"), compressed=compressed)


def strided():
    state = plain(openclip.clip(seed=1))
    return {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in state.items()}


def biased(**arguments):
    return openclip.clip(init_logit_bias=-9.0, **arguments)


def larger(**arguments):
    return openclip.clip(image_size=56, context_length=20, **arguments)


LOADS = {  # the file, and the model that it goes into
    "same layout": (safetensors(lambda: plain(openclip.clip(seed=1))), openclip.clip),
    "joined": (safetensors(lambda: hf.disk_keys(hf.clip(seed=1))), openclip.clip),
    "cast": (safetensors(lambda: plain(openclip.clip(seed=1))), lambda **a: openclip.clip(precision="bf16", **a)),
    "transposed": (npz(compressed=False), openclip.siglip),
    "transposed and compressed": (npz(compressed=True), openclip.siglip),
    "resized": (safetensors(lambda: hf.disk_keys(hf.clip(seed=1))), larger),
    "filled": (
        safetensors(lambda: hf.disk_keys(hf.clip(seed=1))),
        biased,
    ),
    "torch": (torch_file(lambda: plain(openclip.clip(seed=1))), openclip.clip),
    "deflated": (torch_file(lambda: plain(openclip.clip(seed=1)), deflated=True), openclip.clip),
    "strided": (torch_file(strided), openclip.clip),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("name", LOADS)
def test_a_default_device_changes_no_load(name, ambient, assign, tmp_path):
    write, make = LOADS[name]
    path = tmp_path / "file.pt"
    write(path)
    (path,) = tmp_path.iterdir()
    expected, model = make(seed=2), make(seed=3)
    before = {key: value.device for key, value in model.state_dict().items()}
    keymap.load_checkpoint(expected, path, assign=assign)
    with AMBIENT[ambient]():
        keymap.load_checkpoint(model, path, assign=assign)
    assert {key: value.device for key, value in model.state_dict().items()} == before
    assert_unchanged(model, bits(expected))


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("zero", [True, False])
def test_a_default_device_changes_no_check(zero, ambient, tmp_path):
    """A key that the model lacks must hold the value that its absence means."""
    state = plain(openclip.clip(seed=1)) | {"logit_bias": torch.tensor(0.0 if zero else 0.5)}
    save_file(state, tmp_path / "a.safetensors")
    model = openclip.clip(seed=2)
    before = bits(model)
    with AMBIENT[ambient]():
        if zero:
            keymap.load_checkpoint(model, tmp_path / "a.safetensors")
        else:
            with pytest.raises(keymap.VerifyError, match="logit_bias"):
                keymap.load_checkpoint(model, tmp_path / "a.safetensors")
    assert_unchanged(model, bits(openclip.clip(seed=1)) if zero else before)


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("right", [True, False])
def test_a_default_device_changes_no_check_of_an_identity(right, ambient, tmp_path):
    source, model = openclip.siglip(seed=1, projection=False), openclip.siglip(seed=2, projection=False)
    eye = torch.eye(48) if right else torch.eye(48).flip(0)
    save_file(plain(source) | {"text.text_projection.weight": eye}, tmp_path / "a.safetensors")
    before = bits(model)
    with AMBIENT[ambient]():
        if right:
            keymap.load_checkpoint(model, tmp_path / "a.safetensors")
        else:
            with pytest.raises(keymap.VerifyError, match="the identity matrix"):
                keymap.load_checkpoint(model, tmp_path / "a.safetensors")
    assert_unchanged(model, bits(source) if right else before)


CONVERSIONS = {
    "hf_clip": (lambda: plain(openclip.clip(seed=1)), {}),
    "open_clip": (lambda: hf.disk_keys(hf.clip(seed=1)), {}),
    "hf_siglip": (lambda: plain(openclip.siglip(seed=1)), {}),
    "big_vision_siglip": (lambda: plain(openclip.siglip(seed=1)), {"image.heads": 3, "text.heads": 4}),
    "openai": (lambda: plain(openclip.clip_trunk(seed=1)), {}),
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("to", CONVERSIONS)
def test_a_default_device_changes_no_conversion(to, ambient):
    make, facts = CONVERSIONS[to]
    state = make()
    expected = keymap.convert_state_dict(state, to, facts=facts or None)
    with AMBIENT[ambient]():
        found = keymap.convert_state_dict(state, to, facts=facts or None)
    assert found.keys() == expected.keys()
    assert all(found[key].device.type == "cpu" and same_bits(found[key], expected[key]) for key in expected)
