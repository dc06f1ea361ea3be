"""The sentence for a file of another architecture: what the file is, what the model is, which configurations fit."""

from __future__ import annotations

import pytest
import torch
from peers import full_size, hf, openclip, timm_towers
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap
from keymap.plan.describe import configurations_for, describe
from keymap.plan.model import view_model
from keymap.source.registry import registry

KNOWN = registry()


def first_fault(error) -> str:
    return error.value.faults[0]


# --- inspect ---

CONFIGURATIONS = ["ViT-B-32", "RN50x4", "ViT-H-14-CLIPA", "convnext_large_d", "ViT-B-16-SigLIP2-512", "EVA02-L-14-336"]


@pytest.mark.parametrize("name", [*CONFIGURATIONS, "coca_ViT-L-14", "nllb-clip-base-siglip", "PE-Core-B-16"])
def test_inspect_names_the_configurations_that_fit_a_file(name, tmp_path):
    path = full_size.sparse_file(tmp_path / "model.safetensors", full_size.model(name).state_dict())
    found = keymap.inspect_checkpoint(path)
    assert name in found.configurations
    assert f"fits model configurations: {found.configurations[0]}" in str(found)
    for other in found.configurations:
        fits = other.removesuffix(" (positions resized)")
        plan = keymap.plan_load(full_size.model(fits), path)  # what is said to fit does
        assert plan.missing_keys == plan.unexpected_keys == ()
        assert bool(plan.resized) == (other != fits)


def test_configurations_with_other_positions_come_last_with_a_remark(tmp_path):
    path = full_size.sparse_file(tmp_path / "model.safetensors", full_size.model("ViT-L-14-336").state_dict())
    found = keymap.inspect_checkpoint(path).configurations
    exact = [name for name in found if "resized" not in name]
    assert exact == ["ViT-L-14-336", "ViT-L-14-336-quickgelu"]
    assert found[: len(exact)] == exact
    assert "ViT-L-14 (positions resized)" in found


def test_sizes_are_reported_in_words_and_as_data(tmp_path):
    save_file(hf.disk_keys(hf.clip()), tmp_path / "model.safetensors")
    found = keymap.inspect_checkpoint(tmp_path / "model.safetensors")
    image = {"width": 48, "layers": 2, "patch": 14, "positions": 5, "embedding": 24}
    assert found.to_dict()["sizes"] == {
        "image": image,
        "text": {"width": 32, "layers": 3, "positions": 16, "tokens": 99},
    }
    assert "image tower: native_vit (width 48, layers 2, patch 14, positions 5, embedding 24)" in str(found)
    assert found.to_dict()["configurations"] == []


def test_a_transformers_file_fits_the_same_configurations_as_open_clip_s_own(tmp_path):
    peer = full_size.transformers.CLIPModel
    with torch.device("meta"):
        keys = peer(full_size.transformers.CLIPConfig()).state_dict()  # transformers' default is OpenAI's ViT-B/32
    found = keymap.inspect_checkpoint(full_size.sparse_file(tmp_path / "model.safetensors", keys))
    assert found.configurations[:2] == ["ViT-B-32", "ViT-B-32-quickgelu"]


def test_the_record_of_configurations_distinguishes_them():
    """Names under one entry share every shape but positions; of two entries no model fits the other."""
    prints = [tuple(entry.fingerprints.items()) for entry in KNOWN.configurations]
    assert len(set(prints)) == len(prints)
    assert sum(len(entry.names) for entry in KNOWN.configurations) == 144


# --- refusals ---


def test_another_architecture(tmp_path):
    save_file(hf.disk_keys(hf.siglip()), tmp_path / "siglip.safetensors")
    model = openclip.clip()
    before = bits(model)
    for strict in (True, False):
        with pytest.raises(keymap.PlanError) as error:
            keymap.load_checkpoint(model, tmp_path / "siglip.safetensors", strict, towers=("image",))
    with pytest.raises(keymap.PlanError) as error:
        keymap.load_checkpoint(model, tmp_path / "siglip.safetensors")
    assert first_fault(error).startswith(
        "the file holds transformers SiglipModel (SigLIP, SigLIP 2 of fixed resolution)"
    )
    assert "image tower map_trunk (width 48, layers 2, patch 14, positions 4)" in first_fault(error)
    assert (
        "the model has image tower native_vit (width 48, layers 2, patch 14, positions 5, embedding 24)"
        in first_fault(error)
    )
    assert first_fault(error).endswith("model configurations that fit the file: none of the known ones")
    assert len(error.value.faults) < 12
    assert_unchanged(model, before)


def test_another_size_names_the_configuration_that_fits(tmp_path):
    path = full_size.sparse_file(tmp_path / "b16.safetensors", full_size.model("ViT-B-16").state_dict())
    with pytest.raises(keymap.PlanError) as error:
        keymap.plan_load(full_size.model("ViT-L-14"), path)
    assert "width 768, layers 12, patch 16" in first_fault(error) and "width 1024, layers 24, patch 14" in first_fault(
        error
    )
    assert first_fault(error).endswith("model configurations that fit the file: ViT-B-16, ViT-B-16-quickgelu")
    assert len(error.value.faults) <= 8


OF_EQUAL_SIZES = [("ViTamin-B", "convnext_base"), ("coca_ViT-B-32", "ViT-B-32"), ("ViT-B-32", "coca_ViT-B-32")]
OF_EQUAL_SIZES += [("MobileCLIP-S1", "MobileCLIP2-S0"), ("swin_base_patch4_window7_224", "convnext_base_w")]


@pytest.mark.parametrize(("file", "model"), OF_EQUAL_SIZES)
def test_another_architecture_whose_measured_sizes_agree(file, model, tmp_path):
    path = full_size.sparse_file(tmp_path / "model.safetensors", full_size.model(file).state_dict())
    with pytest.raises(keymap.PlanError) as error:
        keymap.plan_load(full_size.model(model), path)
    assert f"model configurations that fit the file: {file}" in first_fault(error)


def test_a_lone_tower_of_another_size(tmp_path):
    save_file(timm_towers.clip_vit(image_width=96, image_heads=6).state_dict(), tmp_path / "timm.safetensors")
    with pytest.raises(keymap.PlanError) as error:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "timm.safetensors", towers=("image",))
    assert "timm image towers" in first_fault(error) and "clip_trunk (width 96" in first_fault(error)
    assert "text tower" not in first_fault(error)


def test_a_pruned_tower_is_named_as_pruned(tmp_path):
    """Blocks of different widths, as TinyCLIP's automatic pruning leaves them."""
    state = {key: value.contiguous() for key, value in openclip.clip().state_dict().items()}
    for part in ("c_fc.weight", "c_fc.bias"):
        key = f"visual.transformer.resblocks.1.mlp.{part}"
        state[key] = state[key][:70].contiguous()
    key = "visual.transformer.resblocks.1.mlp.c_proj.weight"
    state[key] = state[key][:, :70].contiguous()
    save_file(state, tmp_path / "auto.safetensors")
    with pytest.raises(keymap.PlanError) as error:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "auto.safetensors")
    assert "blocks of different sizes, as in a pruned model" in first_fault(error)


def test_a_missing_key_is_reported_as_missing_and_not_as_another_architecture(tmp_path):
    state = {key: value.contiguous() for key, value in openclip.clip().state_dict().items() if key != "visual.proj"}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(keymap.PlanError) as error:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "x.safetensors")
    assert "visual.proj" in first_fault(error) and "the file holds" not in first_fault(error)


# --- fingerprints ---


def test_all_layouts_of_one_tower_have_one_fingerprint():
    prints = [
        describe(KNOWN, view_model(model, KNOWN.hub).layouts())
        for model in (openclip.clip(), openclip.custom(), openclip.clip_trunk())
    ]
    assert len({found["image"].fingerprint for found in prints}) == 1
    assert len({found["text"].fingerprint for found in prints}) == 1
    assert {found["image"].layout for found in prints} == {"native_vit", "clip_trunk"}


@pytest.mark.parametrize("change", [{"image_depth": 3}, {"image_mlp": 2.0}, {"patch": 7}, {"embed_dim": 32}])
def test_another_size_has_another_fingerprint(change):
    one, other = (describe(KNOWN, view_model(openclip.clip(**a), KNOWN.hub).layouts())["image"] for a in ({}, change))
    assert one.fingerprint != other.fingerprint
    assert describe(KNOWN, view_model(openclip.clip(image_size=56), KNOWN.hub).layouts())["image"].fingerprint == (
        one.fingerprint  # positions are resized
    )


def test_no_configuration_fits_a_file_without_a_tower():
    assert configurations_for(KNOWN, {}) == []
