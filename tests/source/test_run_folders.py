"""Folders and files as training runs and downloads leave them: what is loaded is reported, what cannot be is named."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap


def state(seed=1):
    return {key: value.detach().contiguous().clone() for key, value in openclip.clip(seed=seed).state_dict().items()}


def holds(model, wanted):
    return all(same_bits(value, wanted[key]) for key, value in model.state_dict().items())


def refused(path, *words, **options):
    model = openclip.clip(seed=5)
    before = bits(model)
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert [word for word in words if word not in message] == [], message
    return message


RUNS = {  # the folder of each step, and the file in it
    "Trainer": ("checkpoint-{}", "model.safetensors"),
    "an older Trainer": ("checkpoint-{}", "pytorch_model.bin"),
    "accelerate": ("checkpoint_{}", "model.safetensors"),
    "steps": ("step_{}", "pytorch_model.bin"),
    "epochs": ("epoch-{}", "open_clip_model.safetensors"),
}


@pytest.mark.parametrize("name", RUNS)
def test_of_the_steps_of_a_run_the_last_is_loaded(name, tmp_path):
    """By number, and not by name: 9, 20, 100."""
    folder, file = RUNS[name]
    for step in (9, 100, 20):
        place = tmp_path / folder.format(step)
        place.mkdir()
        (save_file if file.endswith(".safetensors") else torch.save)(state(step), place / file)
        for other in ("optimizer.bin", "scheduler.pt", "random_states_0.pkl", "rng_state_0.pth", "training_args.bin"):
            torch.save({"state": {}, "x": torch.ones(2)}, place / other)
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, tmp_path)
    assert holds(model, state(100))
    assert folder.format(100) in str(result)


def test_what_holds_no_weights_is_not_a_weight_file(tmp_path):
    save_file(state(), tmp_path / "mine.safetensors")
    for other in (
        "optimizer.pt",
        "scheduler.bin",
        "rng_state.pth",
        "scaler.pt",
        "training_args.bin",
        "optimizer_1.bin",
    ):
        torch.save({"x": torch.ones(2)}, tmp_path / other)
    model = openclip.clip(seed=2)
    assert "the only weight file" in str(keymap.load_checkpoint(model, tmp_path))
    assert holds(model, state())


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0/"])
def test_a_distributed_checkpoint_is_named_with_its_folder(inner, tmp_path):
    for place in (inner, "optimizer_0/"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "__0_0.distcp").write_bytes(b"x")
    torch.save({}, tmp_path / "scheduler.bin")
    refused(tmp_path, str(tmp_path / inner.strip("/")), "accelerate merge-weights", "dcp_to_torch_save")


def cache(tmp_path, revisions, main):
    folder = tmp_path / "models--a--b"
    (folder / "blobs").mkdir(parents=True)
    for number, revision in enumerate(revisions, 1):
        place = folder / "snapshots" / revision
        place.mkdir(parents=True)
        save_file(state(number), folder / "blobs" / f"{number:064x}")
        (place / "open_clip_model.safetensors").symlink_to(f"../../blobs/{number:064x}")
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize(
    ("revisions", "main", "seed"), [(["a1"], "", 1), (["a1", "b2"], "b2", 2), (["a1", "b2"], "a1", 1)]
)
def test_the_folder_of_the_hubs_cache_leads_to_its_snapshot(revisions, main, seed, tmp_path):
    model = openclip.clip(seed=9)
    result = keymap.load_checkpoint(model, cache(tmp_path, revisions, main))
    assert holds(model, state(seed))
    assert "chose snapshot" in str(result)


def test_of_several_snapshots_without_a_reference_none_is_guessed(tmp_path):
    refused(cache(tmp_path, ["a1", "b2"], ""), "several snapshots", "a1, b2")


SHARDS = {
    "safetensors": ("model-{:05}-of-{:05}.safetensors", save_file),
    "bin": ("pytorch_model-{:05}-of-{:05}.bin", torch.save),
    "few digits": ("consolidated_{}-of-{}.pt", torch.save),
}


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("count", [2, 5])
def test_shards_without_an_index_are_one_checkpoint(kind, count, tmp_path):
    name, save = SHARDS[kind]
    keys = list(state())
    for number in range(count):
        save({key: state()[key] for key in keys[number::count]}, tmp_path / name.format(number + 1, count))
    torch.save({}, tmp_path / "optimizer.pt")
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, tmp_path)
    assert holds(model, state())
    assert f"joined {count} shards" in str(result)
    again = openclip.clip(seed=3)
    keymap.load_checkpoint(again, tmp_path, assign=True)
    assert holds(again, state())


def test_a_missing_shard_is_named(tmp_path):
    keys = list(state())
    for number in (1, 4):
        save_file({key: state()[key] for key in keys[number::4]}, tmp_path / f"model-{number:05}-of-00004.safetensors")
    refused(tmp_path, "2 of 4 shards are missing", "model-00002-of-00004.safetensors, model-00003-of-00004.safetensors")


def test_a_key_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        save_file(state(number), tmp_path / f"model-0000{number}-of-00002.safetensors")
    refused(tmp_path, "is in 'model-00001-of-00002.safetensors' and in 'model-00002-of-00002.safetensors'")


def test_shards_of_two_models_are_not_joined(tmp_path):
    for start in ("a", "b"):
        save_file(state(), tmp_path / f"{start}-00001-of-00001.safetensors")
    refused(tmp_path, "several weight files")


def test_zero_3_is_named_with_its_script(tmp_path):
    empty = {key: torch.empty(0) for key in state()}
    place = tmp_path / "global_step7"
    place.mkdir()
    torch.save(
        {"module": empty, "param_shapes": [{}], "ds_version": "1"}, place / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )
    torch.save({"optimizer_state_dict": {}}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for path in (tmp_path, place, place / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert "strict=False" not in refused(path, "zero_to_fp32.py")


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "hf-hub:laion/CLIP-ViT-B-32", "google/siglip-base"])
def test_a_hub_id_is_named(name):
    refused(name, "snapshot_download", name.removeprefix("hf-hub:"))


def test_the_name_of_a_configuration_is_named():
    refused("ViT-B-32", "is the name of a model configuration")


OTHER_FILES = {
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "model.gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "model.parquet": (b"PAR1\x15\0", "parquet"),
    "model.tflite": (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
    "saved_model.pb": (b"\x08\x01\x12\x04", "TensorFlow"),
    "model.tar": (b"model.pt" + bytes(249) + b"ustar\0" + bytes(300), "tar archive"),
    "model.msgpack": (b"\xc1\xc1", "msgpack"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    content, word = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, word)


class Named:
    """A class that a file may name; to read the file must not import it."""


def test_what_is_only_named_beside_the_weights_is_skipped_and_reported(tmp_path):
    tree = {
        "state_dict": state(),
        "labels": np.array(["cat", None, ("a", 1)], dtype=object),
        "best": np.str_("epoch 3"),
        "when": np.datetime64("2024-05-06"),
        "days": np.array(["2024-05-06"], dtype="datetime64[D]"),
        "path": pathlib.Path("runs/1"),
        "model_class": Named,
        "loss": torch.nn.functional.cross_entropy,
    }
    torch.save(tree, tmp_path / "x.pt")
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, tmp_path / "x.pt", weights_only=True)
    assert holds(model, state())
    assert "names that keymap did not import" in str(result) and "Named" in str(result)
    assert "skipped a numpy array of Python objects" in str(result)
    torch.save({"state_dict": state(), "x": Named()}, tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "Named")


# --- weights as length and direction, scaled float8 ---


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_normalisation_of_torch_in_both_forms(axis, tmp_path):
    """The reference is torch's own: the weight that the module computes."""
    donor = openclip.clip(seed=1)
    for module in [m for m in donor.modules() if isinstance(m, torch.nn.Linear)][:3]:
        torch.nn.utils.parametrizations.weight_norm(module, dim=axis)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(1.5)
    tensors = {key: value.detach().clone() for key, value in donor.state_dict().items()}
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {next((k.replace(a, b) for a, b in names.items() if a in k), k): v for k, v in tensors.items()}
    for number, form in enumerate((tensors, old)):
        save_file({key: value.contiguous() for key, value in form.items()}, tmp_path / f"{number}.safetensors")
        model = openclip.clip(seed=2)
        result = keymap.load_checkpoint(model, tmp_path / f"{number}.safetensors")
        assert "computed 3 weights from length and direction" in str(result)
        assert "computed 3 weights from length and direction" in str(keymap.inspect_checkpoint(result.report.plan.file))
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert torch.allclose(module.weight, donor.get_submodule(key).weight, atol=1e-6), key


def with_one_float8_weight() -> tuple[str, dict[str, torch.Tensor]]:
    """The key of the weight, and a text tower of which it is one."""
    tensors = {key: value.contiguous() for key, value in hf.disk_keys(hf.clip(seed=1, tower="text_proj")).items()}
    key = next(key for key in tensors if key.endswith("fc1.weight"))
    return key, {**tensors, key: tensors[key].to(torch.float8_e4m3fn)}


NAMES_OF_SCALES = (
    "{module}.scale_weight",
    "{module}.weight_scale",
    "{module}.weight_scale_inv",
    "{module}.w_scale",
    "{module}.scales",
    "{module}.ScaleWeight",
    "{module}.weight_amax",
    "{module}.weight_quantizer._scale",
    "{key}.scale",
    "{key}_scale_2",
    "scales.{key}",
    "scales.te.model.{module}",
    "quantization/{module}/amax",
    "SCALES.TE_{key}",
)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "te."])
@pytest.mark.parametrize("name", NAMES_OF_SCALES)
def test_scaled_float8_is_refused_under_any_name(name, prefix, strict, tmp_path):
    key, tensors = with_one_float8_weight()
    file = {prefix + other: value for other, value in tensors.items()}
    file[name.format(key=key, module=key.removesuffix(".weight"))] = torch.full((1,), 0.1)
    save_file(file, tmp_path / "x.safetensors")
    assert "quantized" in refused(tmp_path / "x.safetensors", strict=strict, towers=("text",))


@pytest.mark.parametrize("allowed", [(), ("*",)])
@pytest.mark.parametrize("entry", ["scaled_fp8", "model.diffusion_model.scaled_fp8"])
def test_a_mark_of_scaled_float8_counts_wherever_it_stands(entry, allowed, tmp_path):
    _, tensors = with_one_float8_weight()
    save_file({**{f"te.{k}": v for k, v in tensors.items()}, entry: torch.zeros(0)}, tmp_path / "x.safetensors")
    assert "quantized" in refused(tmp_path / "x.safetensors", towers=("text",), allow_unexpected=allowed)


def test_scales_in_another_dict_of_a_pickle_are_seen(tmp_path):
    key, tensors = with_one_float8_weight()
    torch.save({"state_dict": tensors, "scales": {key: 0.1}}, tmp_path / "x.pt")
    assert "quantized" in refused(tmp_path / "x.pt", towers=("text",))


def test_the_same_weights_in_another_dtype_are_no_scales(tmp_path):
    _, tensors = with_one_float8_weight()
    teacher = {f"teacher.{key}": value.to(torch.float16) for key, value in tensors.items()}
    student = {f"student.{key}": value for key, value in tensors.items()}
    heads = {
        "classifier.weight": torch.ones(2, 2),
        "student.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    torch.save({**teacher, **student, **heads}, tmp_path / "x.pt")
    model = openclip.clip(seed=2)
    assert keymap.load_checkpoint(model, tmp_path / "x.pt", towers=("text",), wrapper="student").missing_keys == []


def test_plain_float8_is_cast_and_reported(tmp_path):
    tensors = {k: v.to(torch.float8_e5m2) if v.ndim == 2 else v for k, v in state().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    result = keymap.load_checkpoint(openclip.clip(seed=2), tmp_path / "x.safetensors")
    assert "float8_e5m2 to float32" in str(result)


OWN_NAMES = {  # scales of float8 weights in files with the model's own names
    "in another dict": lambda key, w: {"state_dict": w, "scales": {key: torch.tensor(0.1)}},
    "a mark in another place": lambda key, w: {"state_dict": w, "scaled_fp8": torch.zeros(0)},
    "beside": lambda key, w: {**w, f"{key.removesuffix('weight')}_scale": torch.tensor(0.1)},
    "after the key": lambda key, w: {"model": w, "extra": {f"{key}_scale": torch.tensor(0.1)}},
    "a list": lambda key, w: {"state_dict": w, "fp8_scales": [torch.tensor(0.1)]},
    "a number": lambda key, w: {"state_dict": w, "weight_scale": 0.1},
}
FLOAT8_KEYS = (
    "transformer.resblocks.0.mlp.c_fc.weight",
    "text_projection",
    "transformer.resblocks.0.attn.in_proj_weight",
)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"allow_unexpected": ("*",)}, {"towers": ("text",)}])
@pytest.mark.parametrize("key", FLOAT8_KEYS)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_scaled_float8_under_the_models_own_names_is_refused(name, key, options, tmp_path):
    tensors = {k: v.detach().clone() for k, v in openclip.clip(seed=1).state_dict().items()}
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    torch.save(OWN_NAMES[name](key, tensors), tmp_path / "x.pt")
    assert "quantized" in refused(tmp_path / "x.pt", **options)


@pytest.mark.parametrize("entry", ["scales", "_quantization_metadata"])
def test_scales_in_the_metadata_are_seen(entry, tmp_path):
    _, tensors = with_one_float8_weight()
    save_file(tensors, tmp_path / "x.safetensors", metadata={entry: "{}"})
    assert "quantized" in refused(tmp_path / "x.safetensors", towers=("text",))


REFUSED_BESIDE = ("c_fc.lora_A.weight", "c_fc.weight_scale", "c_fc.qweight", "c_fc.weight_orig", "VPT", "ls_1.gamma")


@pytest.mark.parametrize("name", REFUSED_BESIDE)
def test_towers_do_not_get_around_a_refusal(name, tmp_path):
    """The file has all keys of the model, and one more that matters."""
    tensors = state() | {f"visual.transformer.resblocks.0.mlp.{name}": torch.randn(4, 48)}
    save_file(tensors, tmp_path / "x.safetensors")
    messages = [refused(tmp_path / "x.safetensors", towers=towers) for towers in (None, ("image",), ("image", "text"))]
    assert len(messages) == 3


ADAPTED = "transformer.resblocks.0.mlp.c_fc"
BESIDE = {  # where an adapter for the model's weights lies
    "another dict": lambda w: {"model": w, "lora": {f"{ADAPTED}.lora_A.weight": torch.ones(4, 32)}},
    "another prefix": lambda w: {f"clip.{k}": v for k, v in w.items()} | {f"lora.{ADAPTED}.lora_A": torch.ones(4)},
    "kohya's names": lambda w: {
        "state_dict": w,
        f"lora_te_{ADAPTED.replace('.', '_')}.lora_down.weight": torch.ones(4),
    },
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_an_adapter_elsewhere_in_the_file_is_not_left_out(name, strict, tmp_path):
    torch.save(BESIDE[name](state()), tmp_path / "x.pt")
    assert "adapter" in refused(tmp_path / "x.pt", strict=strict)


def test_an_adapter_of_another_model_in_the_file_is_no_obstacle(tmp_path):
    teacher = {f"teacher.{key}": value for key, value in state().items()}
    student = {f"student.{key}": value for key, value in state().items()}
    language = {"language_model.layers.0.q_proj.lora_A.weight": torch.ones(4, 4)}
    adapted = {f"teacher.{ADAPTED}.lora_A.weight": torch.ones(4, 32)}
    torch.save({**teacher, **student, **language, **adapted}, tmp_path / "x.pt")
    model = openclip.clip(seed=2)
    assert keymap.load_checkpoint(model, tmp_path / "x.pt", wrapper="student").missing_keys == []
