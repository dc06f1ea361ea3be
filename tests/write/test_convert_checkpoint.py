"""What is written: owners' own code loads it, it comes back bit for bit, and it is whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from open_clip.model import build_model_from_openai_state_dict
from peers import hf, naflex, openai, openclip
from peers.common import images, max_diff, same_bits, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import keymap

ROOT = Path(__file__).parents[2]


def state(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path) as held:
            return {key: torch.from_numpy(np.array(held[key])) for key in held.files}
    return torch.load(path, weights_only=True)


MODELS = {  # formats that a model goes to and comes back from, bit for bit
    "hf_clip": (openclip.clip, {}),
    "hf_siglip": (openclip.siglip, {}),
    "big_vision_siglip": (openclip.siglip, {}),
    "open_clip": (openclip.custom, {}),
    "open_clip_flat": (openclip.clip, {}),
    "hf_flax_clip": (openclip.clip, {}),
    "hf_siglip2_naflex": (naflex.model, {}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ".bin"])
@pytest.mark.parametrize("form", MODELS)
def test_a_model_is_saved_and_loads_again_bit_for_bit(form, suffix, tmp_path):
    build, _ = MODELS[form]
    source, model = build(seed=1), build(seed=2)
    result = keymap.save_checkpoint(source, tmp_path / f"x{suffix}", form)
    assert (result.format, result.files) == (form, (str(tmp_path / f"x{suffix}"),))
    keymap.load_checkpoint(model, tmp_path / f"x{suffix}")
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == [f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("form", MODELS)
def test_a_file_is_converted_as_its_state_dict_is(form, suffix, tmp_path):
    build, _ = MODELS[form]
    source = state(build(seed=1))
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}, "epoch": 3}, tmp_path / "run.pt")
    facts = {"image.heads": 3, "text.heads": 2} if form == "big_vision_siglip" else {}
    if form == "big_vision_siglip":
        model = build(seed=1)
        heads = {"image.heads": model.visual.trunk.blocks[0].attn.num_heads}
        facts = heads | {"text.heads": model.text.transformer.resblocks[0].attn.num_heads}
    keymap.convert_checkpoint(tmp_path / "run.pt", tmp_path / f"x{suffix}", form, facts=facts)
    wanted = keymap.convert_state_dict(source, form, facts=facts)
    held = read(tmp_path / f"x{suffix}")
    assert held.keys() == wanted.keys()
    assert [key for key in wanted if not same_bits(held[key], wanted[key].contiguous())] == []


# --- what the owners' own code reads ---


def test_transformers_loads_what_is_written(tmp_path):
    model = openclip.clip(seed=1, quick_gelu=True)
    peer = hf.clip(seed=2, quick_gelu=True)
    keymap.save_checkpoint(model, tmp_path / "model.safetensors", "hf_clip")
    (tmp_path / "config.json").write_text(json.dumps(peer.config.to_dict()))
    loaded = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    image, ids = images(), tokens()
    with torch.no_grad():
        assert max_diff(hf.image_features(loaded, image), model.encode_image(image)) < 1e-5
        assert max_diff(hf.text_features(loaded, ids), model.encode_text(ids)) < 1e-5


def test_openais_own_builder_loads_what_is_written(tmp_path):
    model = openclip.clip(seed=1, quick_gelu=True, text_width=64, text_heads=1, **openai.VIT)
    keymap.save_checkpoint(model, tmp_path / "x.pt", "openai", dtype="float32")
    # the builder rounds to float16, as OpenAI's weights are
    built = build_model_from_openai_state_dict(torch.load(tmp_path / "x.pt"), cast_dtype=torch.float32).float().eval()
    image, ids = images(), tokens()
    with torch.no_grad():
        assert max_diff(built.encode_image(image), model.encode_image(image)) < 0.02
        assert max_diff(built.encode_text(ids), model.encode_text(ids)) < 0.02


def test_openclips_own_npz_loader_loads_what_is_written(tmp_path):
    from open_clip.convert import load_big_vision_weights

    source, model = openclip.siglip(seed=1), openclip.siglip(seed=2)
    keymap.save_checkpoint(source, tmp_path / "x.npz", "big_vision_siglip")
    load_big_vision_weights(model, str(tmp_path / "x.npz"))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_tower_alone_is_written(tmp_path):
    model = openclip.clip(seed=1)
    result = keymap.save_checkpoint(model, tmp_path / "x.safetensors", "hf_clip", towers=("image",))
    assert {key.partition(".")[0] for key in load_file(tmp_path / "x.safetensors")} == {
        "vision_model",
        "visual_projection",
    }
    assert result.tensors == len(load_file(tmp_path / "x.safetensors"))


# --- shards, dtypes, metadata, tied tensors ---


def test_shards_have_an_index_that_both_transformers_and_keymap_read(tmp_path):
    model, again = openclip.clip(seed=1), openclip.clip(seed=2)
    result = keymap.save_checkpoint(model, tmp_path / "model.safetensors", "hf_clip", max_shard_size="120KB")
    assert len(result.files) > 3 and result.files[-1].endswith("model.safetensors.index.json")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.nbytes
    keymap.load_checkpoint(again, tmp_path)
    assert all(same_bits(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(hf.clip().config.to_dict()))
    loaded = transformers.CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.visual_projection.weight, model.visual.proj.T)
    with pytest.raises(keymap.WriteError, match="overwrite=True"):
        keymap.save_checkpoint(again, tmp_path / "model.safetensors", "hf_clip", max_shard_size="120KB")
    keymap.save_checkpoint(again, tmp_path / "model.safetensors", "hf_clip", max_shard_size=120_000, overwrite=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float64])
def test_a_dtype_is_cast_and_reported(dtype, tmp_path):
    model = openclip.clip(seed=1)
    result = keymap.save_checkpoint(model, tmp_path / "x.safetensors", "open_clip", dtype=dtype)
    held = load_file(tmp_path / "x.safetensors")
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {value.dtype for value in held.values()} == {wanted}
    assert torch.equal(held["visual.proj"], model.visual.proj.detach().to(wanted))
    assert sum(result.casts.values()) == len(held)


def test_a_value_that_a_dtype_cannot_hold_is_refused(tmp_path):
    model = openclip.clip(seed=1)
    with torch.no_grad():
        model.visual.proj[3, 3] = 1e6
    with pytest.raises(keymap.VerifyError, match=r"visual\.proj: its largest value 1e\+06 does not fit float16"):
        keymap.save_checkpoint(model, tmp_path / "x.safetensors", "open_clip", dtype="float16")
    assert os.listdir(tmp_path) == []


def test_the_metadata_of_safetensors_is_kept(tmp_path):
    save_file(state(openclip.clip(seed=1)), tmp_path / "a.safetensors", {"trained_on": "a"})
    keymap.convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "hf_clip")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "trained_on": "a"}


def test_a_torch_file_is_a_sound_archive(tmp_path):
    """Its checksums are those of the values."""
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "x.pt", "hf_clip")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None


def test_progress_ends_with_all_bytes(tmp_path):
    seen = []
    result = keymap.save_checkpoint(
        openclip.clip(seed=1), tmp_path / "x.pt", "hf_clip", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (result.nbytes, result.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- refused, and nothing is left half ---


def refused(tmp_path, error, match, destination="x.safetensors", to="hf_clip", source=None, **options):
    if source is None:
        source = tmp_path / "of the test" / "source.safetensors"
        source.parent.mkdir(exist_ok=True)
        save_file(state(openclip.clip(seed=1)), source)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=match):
        keymap.convert_checkpoint(source, tmp_path / destination, to, **options)
    assert sorted(os.listdir(tmp_path)) == before


def test_what_cannot_be_written_is_refused_in_words(tmp_path):
    refused(tmp_path, keymap.MappingError, "did you mean 'hf_clip'", to="hf_clp")
    refused(tmp_path, keymap.WriteError, "does not exist", destination="no/x.safetensors")
    refused(tmp_path, keymap.WriteError, "suffix", destination="x.onnx")
    refused(tmp_path, keymap.PlanError, "longclip", to="longclip")
    refused(tmp_path, keymap.PlanError, "dtype", dtype="int8")
    refused(tmp_path, keymap.PlanError, "max_shard_size", max_shard_size="many")
    refused(tmp_path, keymap.WriteError, "max_shard_size=10: .* or more", max_shard_size=10)
    refused(tmp_path, keymap.WriteError, "numpy has no", destination="x.npz", dtype="bfloat16")
    refused(tmp_path, keymap.CheckpointError, "does not exist", source=tmp_path / "none.pt")
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path, keymap.WriteError, "is a folder", destination="folder.pt")


def test_the_file_that_is_read_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(state(openclip.clip(seed=1)), path)
    before = path.read_bytes()
    with pytest.raises(keymap.WriteError, match="is a file that is read"):
        keymap.convert_checkpoint(path, path, "hf_clip")
    assert path.read_bytes() == before


SAVES = """
import resource, signal, sys
sys.path[:0] = sys.argv[1].split(":")
from peers import openclip
import keymap
old, new = openclip.clip(seed=1), openclip.clip(seed=2)
path = sys.argv[2]
print("ready", flush=True)
"""
FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    keymap.save_checkpoint(old, path, "hf_clip")
except keymap.WriteError as error:
    print(error)
"""
KILLED = """
import os, time
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # this process has no thread when it forks


def read():
    if path.endswith(".safetensors"):
        return load_file(path)
    if path.endswith(".pt"):
        return torch.load(path, weights_only=True)
    import numpy as np
    with np.load(path) as held:
        return {key: torch.from_numpy(np.array(held[key])) for key in held.files}


whole = []
for model in (old, new):
    keymap.save_checkpoint(model, path, "hf_clip")
    whole.append(read())
for moment in range(17):
    child = os.fork()
    if not child:
        while True:
            for model in (new, old):
                keymap.save_checkpoint(model, path, "hf_clip")
    time.sleep(0.01 + 0.0073 * moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    held = read()
    same = [all(torch.equal(held[key], value) for key, value in one.items()) for one in whole]
    print("whole" if any(same) else "half", flush=True)
"""


def started(code, path):
    folders = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(
        [sys.executable, "-c", SAVES + code, folders, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_a_full_disk_leaves_what_was_there(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    printed, _ = started(FULL, path).communicate(timeout=120)
    assert "cannot be written" in printed and "nothing was changed" in printed
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", [path.name])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(suffix, tmp_path):
    """Killed at 17 moments of as many processes; each time the file is whole."""
    path = tmp_path / f"x{suffix}"
    printed, _ = started(KILLED, path).communicate(timeout=300)
    assert printed.split() == ["ready", *["whole"] * 17]
