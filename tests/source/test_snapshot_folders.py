"""Snapshot folders of a download cache: their links lead to blobs, wherever the store of the blobs lies."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
from peers import hf, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap

REVISION, WEIGHTS, CONFIG = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", "9e" * 32, "0c" * 20
STORES = {
    "blobs beside the snapshots": "hub/models--a--b/blobs",
    "blobs of the hub": "hub/blobs",
    "another disk": "disk/store",
}


def snapshot(root: Path, store: Path, sub: str = "", weights: str = WEIGHTS, config: str = CONFIG) -> Path:
    """A snapshot of a CLIP model whose configuration has another activation than the model."""
    source = hf.clip(seed=1)
    store.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in hf.disk_keys(source).items()}, store / weights)
    settings = source.config.to_dict()
    settings["vision_config"]["hidden_act"] = settings["text_config"]["hidden_act"] = "quick_gelu"
    (store / config).write_text(json.dumps(settings, default=str))
    folder = root / "hub" / "models--a--b" / "snapshots" / REVISION / sub
    folder.mkdir(parents=True)
    for name, blob in (("model.safetensors", weights), ("config.json", config)):
        (folder / name).symlink_to(os.path.relpath(store / blob, folder))
    return folder


@pytest.mark.parametrize("of", ["the folder", "the file"])
@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("sub", ["", "clip"])
def test_a_snapshot_loads_and_its_configuration_is_read(name, of, sub, tmp_path):
    folder = snapshot(tmp_path, tmp_path / STORES[name], sub)
    model = openclip.clip(seed=2)
    with pytest.warns(keymap.ConfigurationWarning, match=r"config\.json"):
        keymap.load_checkpoint(model, folder if of == "the folder" else folder / "model.safetensors")
    assert_unchanged(model, bits(openclip_of_hf()))


def openclip_of_hf():
    model = openclip.clip(seed=3)
    state = keymap.convert_state_dict(hf.disk_keys(hf.clip(seed=1)), "open_clip_flat")
    model.load_state_dict(state)
    return model


def test_blobs_that_are_a_link_to_another_disk_load(tmp_path):
    folder = snapshot(tmp_path, tmp_path / "disk")
    (tmp_path / "hub" / "models--a--b" / "blobs").symlink_to(tmp_path / "disk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keymap.load_checkpoint(openclip.clip(seed=2), folder)


@pytest.mark.parametrize("weights", ["weights.safetensors", "9e" * 31, "9E" * 32, "passwd"])
def test_a_link_to_a_file_that_is_no_blob_is_refused(weights, tmp_path):
    folder = snapshot(tmp_path, tmp_path / "disk", weights=weights)
    with pytest.raises(keymap.CheckpointError, match="link that leaves the folder"):
        keymap.load_checkpoint(openclip.clip(seed=2), folder)


def test_a_configuration_that_is_no_blob_is_not_read(tmp_path):
    folder = snapshot(tmp_path, tmp_path / "disk")
    (tmp_path / "secret.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    result = keymap.load_checkpoint(openclip.clip(seed=2), folder)
    assert any("link that leaves the folder" in note for note in result.report.plan.notes)


def test_a_folder_that_is_no_snapshot_follows_no_link_to_a_blob(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.safetensors").symlink_to(snapshot(tmp_path, tmp_path / "disk") / "model.safetensors")
    with pytest.raises(keymap.CheckpointError, match="link that leaves the folder"):
        keymap.load_checkpoint(openclip.clip(seed=2), tmp_path / "plain")
