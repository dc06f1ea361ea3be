"""Files that change, shrink or vanish during a load; a full disk, missing permission, an interrupt."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.seeds import TINY
from peers import openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap
import keymap.api
import keymap.load.direct
import keymap.load.execute
import keymap.load.transposed
from keymap.read import open_checkpoint

State = dict[str, Tensor]


def state(seed: int = 1) -> State:
    return {key: value.detach().clone() for key, value in openclip.clip(seed=seed, **TINY).state_dict().items()}


def _safetensors(folder: Path) -> Path:
    save_file(state(), folder / "a.safetensors")
    return folder / "a.safetensors"


def _torch(folder: Path, new: bool) -> Path:
    torch.save(state(), folder / "a.pt", _use_new_zipfile_serialization=new)
    return folder / "a.pt"


def _npz(folder: Path, save: Callable[..., None]) -> Path:
    facts = {"image.heads": 2, "text.heads": 2}
    flat = keymap.convert_state_dict(openclip.siglip(seed=1, **TINY).state_dict(), "big_vision_siglip", facts=facts)
    save(folder / "a.npz", **{key: value.numpy() for key, value in flat.items()})
    return folder / "a.npz"


def _shards(folder: Path) -> Path:
    whole = state()
    places = {key: f"{number % 2}.safetensors" for number, key in enumerate(whole)}
    for name in set(places.values()):
        save_file({key: value for key, value in whole.items() if places[key] == name}, folder / name)
    (folder / "a.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "a.index.json"


KINDS: dict[str, Callable[[Path], Path]] = {
    "safetensors": _safetensors,
    "zip pt": lambda folder: _torch(folder, True),
    "legacy pt": lambda folder: _torch(folder, False),
    "npz": lambda folder: _npz(folder, np.savez),
    "npz deflated": lambda folder: _npz(folder, np.savez_compressed),
    "shards": _shards,
}


def model_for(kind: str) -> nn.Module:
    return openclip.siglip(seed=5, **TINY) if "npz" in kind else openclip.clip(seed=5, **TINY)


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"changed")
    os.utime(path, ns=(1, 1))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(99))
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"something else")
    os.replace(other, path)


CHANGES = {"shrinks": _shrink, "is overwritten": _overwrite, "grows": _append}


@contextmanager
def after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int, act: Callable[[], None]) -> Iterator[None]:
    """Act once, when a function of keymap.load.execute or keymap.api has been called so many times."""
    module = keymap.load.execute if hasattr(keymap.load.execute, name) and name != "verify_plan" else keymap.api
    real = getattr(module, name)
    count = itertools.count(1)

    def called(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if next(count) == calls:
            act()
        return result

    with monkeypatch.context() as patched:
        patched.setattr(module, name, called)
        patched.setattr(keymap.load.direct, "_MAX_BUFFERS", 1)  # so that a small file, too, takes many calls
        patched.setattr(keymap.load.transposed, "_MIN_ELEMENTS", 0)
        yield
    assert next(count) > calls, "the load never came so far"


def moves(kind: str) -> str:
    """The function that moves a part of such a file into the model."""
    return "copy_pieces" if "deflated" in kind else "copy_strip" if "npz" in kind else "read_batch"


def _victim(path: Path) -> Path:
    return path.parent / "0.safetensors" if path.suffix == ".json" else path


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_before_anything_is_copied(kind, change, monkeypatch, tmp_path):
    path, model = KINDS[kind](tmp_path), model_for(kind)
    before = bits(model)
    with (
        after(monkeypatch, "verify_plan", 1, lambda: CHANGES[change](_victim(path))),
        pytest.raises(keymap.CheckpointError, match="was written to while it was read"),
    ):
        keymap.load_checkpoint(model, path)
    if kind != "shards":  # the tensors of other shards may come first
        assert_unchanged(model, before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_converted_is_an_error_that_names_no_model(change, tmp_path):
    path, target = KINDS["safetensors"](tmp_path), tmp_path / "out.safetensors"

    def change_it(done, total):
        if done and path in waiting:
            waiting.remove(path)
            CHANGES[change](path)

    waiting = [path]
    with pytest.raises(keymap.CheckpointError, match=r"while it (was|is) read") as caught:
        keymap.convert_checkpoint(path, target, "hf_clip", progress=change_it)
    assert "model" not in str(caught.value).replace(str(tmp_path), "")
    assert not target.exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["safetensors", "zip pt", "legacy pt", "npz"])
def test_a_file_that_changes_while_it_is_copied(kind, change, monkeypatch, tmp_path):
    """The model is half loaded then, and the error says so."""
    path, model = KINDS[kind](tmp_path), model_for(kind)
    with (
        after(monkeypatch, moves(kind), 7, lambda: CHANGES[change](path)),
        pytest.raises(keymap.CheckpointError, match="half loaded"),
    ):
        keymap.load_checkpoint(model, path)


@pytest.mark.parametrize("act", [_replace, Path.unlink], ids=["replaced", "removed"])
@pytest.mark.parametrize("kind", ["safetensors", "zip pt", "npz deflated"])
def test_a_file_that_is_replaced_or_removed_is_read_to_its_end(kind, act, monkeypatch, tmp_path):
    """What was opened is kept: a download that renames its file into place harms nobody."""
    (tmp_path / "one").mkdir()
    path, model, wanted = KINDS[kind](tmp_path), model_for(kind), model_for(kind)
    keymap.load_checkpoint(wanted, KINDS[kind](tmp_path / "one"))
    with after(monkeypatch, moves(kind), 3, lambda: act(path)):
        keymap.load_checkpoint(model, path)
    assert all(same_bits(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_tensor_of_a_file_that_shrank_is_refused_and_ends_no_process(tmp_path):
    path = _safetensors(tmp_path)
    tree = open_checkpoint(path).tree
    _shrink(path)
    for tensor in tree.values():
        with pytest.raises(keymap.CheckpointError, match="was written to"):
            tensor.read()


# --- an interrupt ---


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's jobs in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("calls", [1, 5, 20])
@pytest.mark.parametrize("kind", ["safetensors", "zip pt", "npz deflated"])
def test_an_interrupt_while_tensors_are_copied_says_that_the_model_is_half_loaded(kind, calls, monkeypatch, tmp_path):
    path, model = KINDS[kind](tmp_path), model_for(kind)
    with (
        after(monkeypatch, moves(kind), calls, _interrupt),
        pytest.raises(KeyboardInterrupt, match="the model is half loaded"),
    ):
        keymap.load_checkpoint(model, path)
    assert keymap.load_checkpoint(model, path).missing_keys == []  # and loading again mends it


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["verify_plan", "view_model", "open_source"])
def test_an_interrupt_before_that_leaves_the_model_alone(step, monkeypatch, tmp_path):
    path, model = _safetensors(tmp_path), model_for("safetensors")
    before = bits(model)
    with after(monkeypatch, step, 1, _interrupt), pytest.raises(KeyboardInterrupt):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)


# --- a full disk, no permission ---


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_load_writes_no_file_so_a_full_disk_does_no_harm(kind, assign, tmp_path):
    path, model = KINDS[kind](tmp_path), model_for(kind)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write to a file fails
    try:
        result = keymap.load_checkpoint(model, path, assign=assign)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.missing_keys == []
    assert "a.new" not in os.listdir(tmp_path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, which may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that others may look into, and those above it."""
    folder, modes = tmp_path, {}
    while folder != Path(tempfile.gettempdir()) and folder != folder.parent:
        modes[folder] = folder.stat().st_mode
        folder.chmod(0o755)
        folder = folder.parent
    yield tmp_path
    for place, mode in modes.items():
        place.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_files_and_folders_without_permission(open_folder):
    path, model = _safetensors(open_folder), model_for("safetensors")
    before = bits(model)
    path.chmod(0)
    with as_nobody(), pytest.raises(keymap.CheckpointError, match="permission denied"):
        keymap.load_checkpoint(model, path)
    locked = open_folder / "locked"
    locked.mkdir(mode=0o700)
    locked.chmod(0)
    with as_nobody(), pytest.raises(keymap.CheckpointError, match="cannot be listed"):
        keymap.load_checkpoint(model, locked)
    assert_unchanged(model, before)
    path.chmod(0o644)
    with as_nobody():  # a subfolder without permission is not the file to load
        assert keymap.load_checkpoint(model, open_folder).missing_keys == []
    locked.chmod(0o700)
