"""Which file of a folder is loaded, which state dict of a file, and which containers are refused; all is reported."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap


def state(seed=1):
    return {key: value.contiguous() for key, value in openclip.clip(seed=seed).state_dict().items()}


def holds(model, wanted):
    return all(same_bits(value, wanted[key]) for key, value in model.state_dict().items())


# --- folders ---

# what lies in the folder, in no order: (name, seed of its weights); the one that is loaded; the word of the reason
FOLDERS = {
    "hub repository": (
        "model.safetensors:hf open_clip_model.safetensors pytorch_model.bin:hf",
        "open_clip_model.safetensors",
        "Hub repository",
    ),
    "transformers": ("model.safetensors:hf pytorch_model.bin:hf", "model.safetensors", "save_pretrained"),
    "old transformers": ("pytorch_model.bin:hf", "pytorch_model.bin", "older save_pretrained"),
    "training run": (
        "checkpoints/epoch_9.pt checkpoints/epoch_32.pt checkpoints/epoch_2.pt",
        "checkpoints/epoch_32.pt",
        "last epoch",
    ),
    "its inner folder": ("epoch_9.pt epoch_10.pt", "epoch_10.pt", "last epoch"),
    "training run with its latest": (
        "checkpoints/epoch_9.pt checkpoints/epoch_latest.pt",
        "checkpoints/epoch_latest.pt",
        "most recent",
    ),
    "one file": ("my_finetune.pt", "my_finetune.pt", "only weight file"),
    "one file, one level down": ("0_CLIPModel/model.pt", "0_CLIPModel/model.pt", "only weight file"),
    "one file beside others": ("mine.safetensors sub/other.safetensors", "mine.safetensors", "only weight file"),
}


@pytest.mark.parametrize("wrapper", [None, "model_ema"])
def test_the_average_that_torch_keeps_is_a_model_and_a_count(wrapper, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(openclip.clip(seed=1))
    content = average.state_dict() if wrapper is None else {"model": state(2), "model_ema": average.state_dict()}
    torch.save(content, tmp_path / "x.pt")
    model = openclip.clip(seed=3)
    result = keymap.load_checkpoint(model, tmp_path / "x.pt", wrapper=wrapper)
    assert "skipped 'n_averaged': it is a counter" in str(result)
    wanted = openclip.clip(seed=1).state_dict()
    assert all(same_bits(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_of_a_folder_is_chosen_by_name_and_reported(name, tmp_path):
    files, meant, why = FOLDERS[name]
    wanted = {}
    for seed, entry in enumerate(files.split(), 1):
        file, _, kind = entry.partition(":")
        keys = hf.disk_keys(hf.clip(seed=seed)) if kind == "hf" else state(seed)
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        (save_file if file.endswith(".safetensors") else torch.save)(keys, path)
        if file == meant:
            wanted = keys if not kind else None
    (tmp_path / "README.md").write_text("# weights")
    (tmp_path / "optimizer.bin.txt").write_text("no weights")
    model = openclip.clip(seed=99)
    result = keymap.load_checkpoint(model, tmp_path)
    assert result.report.plan.file == str(tmp_path / meant)
    note = next(note for note in result.report.plan.notes if "from the folder: " in note)
    assert meant in note and why in note
    others = [entry.partition(":")[0] for entry in files.split() if entry.partition(":")[0] != meant]
    if "only" not in why:
        assert all(other in note for other in others)
    if wanted is not None:
        assert holds(model, wanted)
    found = keymap.inspect_checkpoint(tmp_path)
    assert found.path == str(tmp_path / meant)
    assert note in found.notes


def test_the_index_of_shards_is_taken_from_a_folder(tmp_path):
    hf.clip(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, other = openclip.clip(seed=5), openclip.clip(seed=6)
    result = keymap.load_checkpoint(model, tmp_path)
    assert result.report.plan.file.endswith("model.safetensors.index.json")
    save_file(hf.disk_keys(hf.clip(seed=1)), tmp_path / "whole.safetensors")
    keymap.load_checkpoint(other, tmp_path / "whole.safetensors")
    assert holds(model, other.state_dict())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "without a weight file"),
        (["config.json", "README.md"], "README.md, config.json"),
        (["a.pt", "b.pt"], "several weight files; pass the one to load: a.pt, b.pt"),
        (["sub/a.pt", "sub/b.pt"], "sub/a.pt, sub/b.pt"),
        (["__0_0.distcp", "__1_0.distcp", ".metadata"], "dcp_to_torch"),
        (["consolidated.00.pth", "consolidated.01.pth", "params.json"], "in tensor-parallel parts; join the parts"),
        (["model0-mp2.safetensors", "model1-mp2.safetensors"], "in tensor-parallel parts; load the checkpoint"),
    ],
)
def test_an_ambiguous_folder_is_refused(files, words, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    model = openclip.clip()
    before = bits(model)
    for strict in (True, False):
        with pytest.raises(keymap.CheckpointError, match=words):
            keymap.load_checkpoint(model, tmp_path, strict)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["consolidated.00.pth", "consolidated.01.pth"], "in tensor-parallel parts; join the parts"),
        (["model0-mp2.safetensors", "model1-mp2.safetensors"], "in tensor-parallel parts"),
        (["rank0.safetensors", "rank1.safetensors"], "in the parts of several devices"),
    ],
)
def test_one_part_of_such_a_folder_is_refused_by_its_path(files, words, tmp_path):
    for name in files:
        (save_file if name.endswith("safetensors") else torch.save)(state(), tmp_path / name)
    model = openclip.clip(seed=9)
    before = bits(model)
    for name in files:
        for strict in (True, False):
            with pytest.raises(keymap.CheckpointError, match=f"{name}: .* beside it, so it .*{words}"):
                keymap.load_checkpoint(model, tmp_path / name, strict)
        with pytest.raises(keymap.CheckpointError, match=words):
            keymap.convert_checkpoint(tmp_path / name, tmp_path / "out.safetensors", "open_clip")
    assert_unchanged(model, before)


def test_a_file_beside_parts_of_another_name_is_no_part(tmp_path):
    save_file(state(), tmp_path / "model0.safetensors")
    (tmp_path / "consolidated.01.pth").write_bytes(b"x")
    (tmp_path / "model1-mp2.safetensors").write_bytes(b"x")
    model = openclip.clip(seed=9)
    keymap.load_checkpoint(model, tmp_path / "model0.safetensors")
    assert holds(model, state())


def test_links_of_a_download_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(state(), blobs / "0123")
    (snapshot / "open_clip_model.safetensors").symlink_to(blobs / "0123")
    model = openclip.clip(seed=9)
    keymap.load_checkpoint(model, snapshot)
    assert holds(model, state())


# --- a state dict among other things ---


def prefixed(prefix, seed=1):
    return {prefix + key: value for key, value in state(seed).items()}


@pytest.mark.parametrize("prefix", ["model.", "clip_model.", "student.", "model.clip."])
def test_a_model_beside_a_loss_is_taken_and_the_rest_is_reported(prefix, tmp_path):
    torch.save({"state_dict": {**prefixed(prefix), "criterion.weight": torch.ones(3)}}, tmp_path / "last.ckpt")
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "last.ckpt")
    assert holds(model, state())
    assert result.report.plan.wrapper.startswith("state_dict.")
    assert any("criterion.weight" in note for note in result.report.plan.notes)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def two(tmp_path, teacher):
    keys = {**prefixed("student."), **{f"teacher.{key}": value for key, value in teacher.items()}}
    torch.save({"state_dict": keys, "epoch": 3}, tmp_path / "distil.ckpt")
    return tmp_path / "distil.ckpt"


def test_of_two_models_the_one_that_fits_is_taken(tmp_path):
    big = openclip.clip(seed=3, image_width=96, image_heads=6, text_width=64).state_dict()
    path = two(tmp_path, big)
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, path)
    assert holds(model, state())
    assert result.report.plan.wrapper == "state_dict.student"
    assert "state_dict.teacher" in result.report.plan.other_wrappers
    teacher = openclip.clip(seed=5, image_width=96, image_heads=6, text_width=64)
    keymap.load_checkpoint(teacher, path)
    assert holds(teacher, big)


@pytest.mark.parametrize("strict", [True, False])
def test_of_two_models_that_both_fit_none_is_guessed(strict, tmp_path):
    path = two(tmp_path, state(seed=2))
    model = openclip.clip(seed=5)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"with wrapper='state_dict.student' or wrapper='state_dict.teacher'"):
        keymap.load_checkpoint(model, path, strict)
    assert_unchanged(model, before)
    for wrapper, seed in {"teacher": 2, "state_dict.teacher": 2, "student": 1}.items():
        keymap.load_checkpoint(model, path, strict, wrapper=wrapper)
        assert holds(model, state(seed))


def test_of_two_models_of_which_none_fits_both_are_reported(tmp_path):
    path = two(tmp_path, openclip.clip(seed=2).state_dict())
    model = openclip.siglip()
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="none of the 2 state dicts in the file fits") as caught:
        keymap.load_checkpoint(model, path)
    faults = " ".join(caught.value.faults)
    assert "'state_dict.student'" in faults and "'state_dict.teacher'" in faults
    assert_unchanged(model, before)


def test_tensors_under_numbers_are_no_state_dict(tmp_path):
    """As an optimizer keeps them: a wrapper's name over them hides no model beside them, and is none by itself."""
    numbered, wanted, model = {0: torch.ones(3)}, state(), openclip.clip(seed=2)
    torch.save({"state_dict": numbered, "model": wanted}, tmp_path / "a.pt")
    assert keymap.load_checkpoint(model, tmp_path / "a.pt").report.plan.wrapper == "model"
    assert holds(model, wanted)
    torch.save({"state_dict": numbered}, tmp_path / "b.pt")
    with pytest.raises(keymap.CheckpointError, match="has no state dict"):
        keymap.load_checkpoint(model, tmp_path / "b.pt")
    assert holds(model, wanted)


def test_inspect_lists_all_models_in_a_state_dict(tmp_path):
    found = keymap.inspect_checkpoint(two(tmp_path, state(seed=2)))
    assert found.format == "open_clip"
    assert (found.wrapper, found.other_wrappers) == ("state_dict.student", ("state_dict.teacher",))
    assert keymap.inspect_checkpoint(tmp_path / "distil.ckpt", wrapper="teacher").wrapper == "state_dict.teacher"


def test_a_part_that_is_not_there_is_refused(tmp_path):
    path = two(tmp_path, state(seed=2))
    with pytest.raises(keymap.CheckpointError, match=r"no tensors under wrapper='professor'; .* are: 'state_dict'"):
        keymap.load_checkpoint(openclip.clip(), path, wrapper="professor")


# --- names of wrapper classes within keys ---


@pytest.mark.parametrize("segment", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrapper_classes_are_cut_out_of_keys_at_every_level(segment, tmp_path):
    """Blocks compiled or wrapped one by one, the rest not."""
    wrapped = {key.replace("resblocks.1.", f"resblocks.1.{segment}"): value for key, value in state().items()}
    wrapped = {key.replace("conv1.", f"{segment}{segment}conv1."): value for key, value in wrapped.items()}
    assert sum(segment in key for key in wrapped) == 2 * 12 + 1
    save_file(wrapped, tmp_path / "run.safetensors")
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "run.safetensors")
    assert holds(model, state())
    assert f"stripped '{segment}' from 25 keys" in result.report.plan.notes


def test_two_keys_that_a_cut_makes_one_are_refused(tmp_path):
    keys = {**state(), "visual._orig_mod.proj": state()["visual.proj"]}
    save_file(keys, tmp_path / "run.safetensors")
    with pytest.raises(keymap.CheckpointError, match="gives two keys the same name") as caught:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "run.safetensors")
    assert "'visual._orig_mod.proj'" in caught.value.faults[0]


# --- training states ---


def test_a_training_checkpoint_with_optimizer_namespace_and_numpy_scalars_is_read_without_running_code(tmp_path):
    source = openclip.clip(seed=1)
    optimizer = torch.optim.AdamW(source.parameters())
    source.encode_text(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    optimizer.step()
    wanted = {key: value.clone() for key, value in source.state_dict().items()}
    tree = {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{key}": value for key, value in wanted.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": np.float64(65536.0), "growth": np.int64(3)},
        "args": argparse.Namespace(lr=1e-3, model="ViT", betas=(0.9, 0.98)),
        "best": np.float32(0.5),
    }
    torch.save(tree, tmp_path / "epoch_3.pt")
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "epoch_3.pt", weights_only=True)
    assert holds(model, wanted)
    assert result.report.plan.prefixes == ("module.",)


def test_ema_beside_raw_weights_is_reported_and_can_be_chosen(tmp_path):
    torch.save({"model": state(1), "model_ema": state(2)}, tmp_path / "run.pt")
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert holds(model, state(1))
    assert "not loaded: 'model_ema' (choose with wrapper=)" in str(result)
    keymap.load_checkpoint(model, tmp_path / "run.pt", wrapper="model_ema")
    assert holds(model, state(2))


def test_a_deepspeed_state_is_read(tmp_path):
    tree = {"module": state(), "optimizer": None, "ds_config": json.dumps({}), "global_steps": 3}
    torch.save(tree, tmp_path / "mp_rank_00_model_states.pt")
    model = openclip.clip(seed=5)
    keymap.load_checkpoint(model, tmp_path)
    assert holds(model, state())


# --- what cannot be loaded, by name ---

KINDS = {
    "LoRA adapter": {"base_model.model.visual.proj.lora_A.weight": 2, "base_model.model.visual.proj.lora_B.weight": 2},
    "LoRA beside its base": {"visual.transformer.resblocks.0.mlp.c_fc.lora_A.default.weight": 2, "visual.proj": 2},
    "GPTQ or AWQ": {"text_model.encoder.layers.0.mlp.fc1.qweight": 2, "text_model.encoder.layers.0.mlp.fc1.qzeros": 2},
    "bitsandbytes": {"text_model.encoder.layers.0.mlp.fc1.weight.absmax": 1, "vision_model.head.probe": 3},
    "quantized, with separate scales": {"text_model.encoder.layers.0.mlp.fc1.weight_scale_inv": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_quantised_files_are_refused_by_name(kind, tmp_path):
    keys = {key: torch.zeros((2,) * rank) for key, rank in KINDS[kind].items()}
    save_file(keys, tmp_path / "adapter_model.safetensors")
    model = openclip.clip()
    before = bits(model)
    for strict in (True, False):
        with pytest.raises(keymap.DetectionError, match=kind.split(" beside")[0]):
            keymap.load_checkpoint(model, tmp_path / "adapter_model.safetensors", strict)
    found = keymap.inspect_checkpoint(tmp_path / "adapter_model.safetensors")
    assert found.format is None
    assert kind.split(" beside")[0] in " ".join(found.evidence)
    assert_unchanged(model, before)
