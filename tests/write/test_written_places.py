"""Where files are written: nothing that is read is lost, and no set of files is left half new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peers import openclip
from safetensors import safe_open

import keymap

SHARDS = {"max_shard_size": "120KB"}


@pytest.fixture(scope="module")
def model():
    return openclip.clip(seed=1)


def loads_as(path: Path, model: torch.nn.Module) -> bool:
    return keymap.compare_checkpoints(path, model).equal


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


@pytest.fixture
def sharded(model, tmp_path):
    (tmp_path / "set").mkdir()
    keymap.save_checkpoint(model, tmp_path / "set/model.safetensors", "hf_clip", **SHARDS)
    assert len(shards_in(tmp_path / "set")) > 2
    return tmp_path / "set"


def test_no_shard_that_is_read_is_a_destination(sharded, model):
    before = contents(sharded)
    for source in (sharded, sharded / "model.safetensors.index.json"):
        for shard in shards_in(sharded):
            with pytest.raises(keymap.WriteError, match="is a file that is read"):
                keymap.convert_checkpoint(source, shard, "open_clip", overwrite=True)
    assert contents(sharded) == before


def test_a_source_that_is_named_as_a_shard_of_the_destination_is_kept(model, tmp_path):
    keymap.save_checkpoint(model, tmp_path / "plain.safetensors", "hf_clip")
    count = len(keymap.save_checkpoint(model, tmp_path / "try.safetensors", "hf_clip", **SHARDS).files) - 1
    for file in tmp_path.glob("try*"):
        file.unlink()
    source = tmp_path / f"x-00001-of-{count:05}.safetensors"
    (tmp_path / "plain.safetensors").rename(source)
    before = contents(tmp_path)
    for options in (SHARDS, {"max_shard_size": "200KB"}):
        with pytest.raises(keymap.WriteError, match="is a file that is read"):
            keymap.convert_checkpoint(source, tmp_path / "x.safetensors", "hf_clip", overwrite=True, **options)
    assert contents(tmp_path) == before


def test_the_shards_that_are_read_are_not_removed_by_one_file_of_their_name(sharded):
    before = contents(sharded)
    with pytest.raises(keymap.WriteError, match="is a file that is read"):
        keymap.convert_checkpoint(sharded, sharded / "model.safetensors", "open_clip", overwrite=True)
    assert contents(sharded) == before


def test_shards_beside_one_file_of_the_name_replace_it_only_if_asked(model, tmp_path):
    other = openclip.clip(seed=5)
    keymap.save_checkpoint(other, tmp_path / "model.safetensors", "hf_clip")
    with pytest.raises(
        keymap.WriteError, match=r"has weights of this name already: model\.safetensors.*overwrite=True"
    ):
        keymap.save_checkpoint(model, tmp_path / "model.safetensors", "hf_clip", **SHARDS)
    assert loads_as(tmp_path, other)
    keymap.save_checkpoint(model, tmp_path / "model.safetensors", "hf_clip", overwrite=True, **SHARDS)
    assert loads_as(tmp_path, model)
    assert not (tmp_path / "model.safetensors").exists()


def test_one_file_beside_shards_of_its_name_replaces_them_only_if_asked(sharded):
    other = openclip.clip(seed=5)
    with pytest.raises(keymap.WriteError, match="has weights of this name already"):
        keymap.save_checkpoint(other, sharded / "model.safetensors", "hf_clip")
    keymap.save_checkpoint(other, sharded / "model.safetensors", "hf_clip", overwrite=True)
    assert [file.name for file in sharded.iterdir()] == ["model.safetensors"]
    assert loads_as(sharded, other)


def test_a_set_of_another_size_leaves_no_shard_of_the_earlier_one(sharded, model):
    result = keymap.save_checkpoint(
        model, sharded / "model.safetensors", "hf_clip", max_shard_size="300KB", overwrite=True
    )
    assert sorted(map(str, sharded.iterdir())) == sorted(result.files)
    assert loads_as(sharded, model)


@pytest.mark.parametrize("blocked", ["shard", "index"])
def test_a_folder_in_the_place_of_one_file_of_a_set_changes_nothing(blocked, sharded):
    file = shards_in(sharded)[2] if blocked == "shard" else sharded / "model.safetensors.index.json"
    file.unlink()
    file.mkdir()
    before = contents(sharded)
    with pytest.raises(keymap.WriteError, match=rf"{file.name}: is a folder"):
        keymap.save_checkpoint(
            openclip.clip(seed=5), sharded / "model.safetensors", "hf_clip", overwrite=True, **SHARDS
        )
    assert contents(sharded) == before


def test_a_rename_that_fails_within_a_set_changes_nothing(sharded, monkeypatch):
    before = contents(sharded)
    replace, calls = os.replace, []

    def failing(source, destination):
        calls.append(destination)
        if len(calls) == 6:
            raise OSError(5, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(keymap.WriteError, match=r"cannot be written: Input/output error; nothing was changed"):
        keymap.save_checkpoint(
            openclip.clip(seed=5), sharded / "model.safetensors", "hf_clip", overwrite=True, **SHARDS
        )
    assert contents(sharded) == before
    assert not list(sharded.glob(".*.part"))


def test_a_link_stays_a_link_and_the_file_that_it_names_is_replaced(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / "x.safetensors")
    for seed in (5, 1):  # the link dangles first
        written = openclip.clip(seed=seed)
        keymap.save_checkpoint(written, tmp_path / "link.safetensors", "hf_clip")
        assert (tmp_path / "link.safetensors").is_symlink()
        assert loads_as(tmp_path / "real" / "x.safetensors", written)
    assert [file.name for file in tmp_path.rglob("*.part")] == []


def test_a_pipe_and_a_link_to_a_device_are_refused(model, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    for name in ("pipe.safetensors", "null.safetensors"):
        with pytest.raises(keymap.WriteError, match="is a device, a pipe or a socket"):
            keymap.save_checkpoint(model, tmp_path / name, "hf_clip")
    with pytest.raises(keymap.WriteError, match="is a device, a pipe or a socket"):
        keymap.save_checkpoint(model, "/dev/null", "hf_clip")
    assert (tmp_path / "pipe.safetensors").is_fifo()


@pytest.mark.parametrize("name", ["m" * 243 + ".safetensors", "é" * 121 + ".safetensors"])
def test_a_name_of_the_length_that_the_system_allows_is_written(name, model, tmp_path):
    keymap.save_checkpoint(model, tmp_path / name, "hf_clip")
    assert loads_as(tmp_path / name, model)


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("x\0.pt", "is not a path"),
        (".pt", "has no name before its suffix; pass for example model.pt"),
        (".", "is not empty"),
    ],
)
def test_a_place_that_is_none_is_refused_in_words(destination, words, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(keymap.WriteError, match=words):
        keymap.save_checkpoint(model, destination, "hf_clip")


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "٢٠٠KB", "5 XB", "0", "", "-1", True, 0, 1.5])
def test_a_size_that_is_none_is_refused(size, model, tmp_path):
    with pytest.raises(keymap.PlanError, match="max_shard_size="):
        keymap.save_checkpoint(model, tmp_path / "x.safetensors", "hf_clip", max_shard_size=size)


def test_a_size_counts_in_powers_of_1000_or_with_an_i_of_1024(model, tmp_path):
    for size, limit in (("120KB", 120_000), ("120KiB", 122_880), ("120 kb", 120_000), (122_880, 122_880)):
        folder = tmp_path / str(size)
        folder.mkdir()
        keymap.save_checkpoint(model, folder / "x.safetensors", "hf_clip", max_shard_size=size)
        keymap.save_checkpoint(model, folder / "y.safetensors", "hf_clip", max_shard_size=limit)
        assert len(list(folder.glob("x-*"))) == len(list(folder.glob("y-*"))) > 1


def test_metadata_is_kept_but_for_the_framework(model, tmp_path):
    from safetensors.torch import save_file

    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", {"format": "flax", "license": "mit"})
    keymap.convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "hf_clip")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "license": "mit"}


def test_a_replaced_file_keeps_its_permissions(model, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o640)
    keymap.save_checkpoint(model, path, "hf_clip")
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_empty_folder_stays_and_is_filled(model, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir(0o700)
    before = folder.stat()
    keymap.save_checkpoint(model, folder, "open_clip")
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.safetensors"])
def test_a_name_that_is_too_long_is_refused_in_words(name, model, tmp_path):
    with pytest.raises(keymap.WriteError, match="File name too long"):
        keymap.save_checkpoint(model, tmp_path / name, "open_clip")


def test_a_flag_that_is_no_bool_is_refused(model, tmp_path):
    with pytest.raises(keymap.PlanError, match="overwrite='no': pass True or False"):
        keymap.save_checkpoint(model, tmp_path / "a.safetensors", "open_clip", overwrite="no")


def test_a_set_that_is_replaced_has_no_index_while_files_are_renamed(sharded, monkeypatch):
    replace, seen = os.replace, []

    def watching(source, destination):
        replace(source, destination)
        seen.append({file.name for file in sharded.iterdir() if not file.name.startswith(".")})

    monkeypatch.setattr(os, "replace", watching)
    keymap.save_checkpoint(openclip.clip(seed=5), sharded / "model.safetensors", "hf_clip", overwrite=True, **SHARDS)
    assert not any("model.safetensors.index.json" in names for names in seen[:-1])
    assert set() in seen  # old files are gone before a new one comes
