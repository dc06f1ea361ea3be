"""A file with the model's own names and shapes loads; counters of batch norms and lazy layers stop no load."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP
from open_clip.utils import freeze_batch_norm_2d as open_clip_freeze
from peers import openclip, timm_towers
from peers.common import Size, assert_unchanged, bits, randomise
from safetensors.torch import save_file
from timm.utils.model import freeze_batch_norm_2d as timm_freeze
from torch import nn

import keymap


def saved(folder, state):
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def state_of(model, without=()):
    return {key: value for key, value in model.state_dict().items() if not key.endswith(tuple(without) or ("\n",))}


def timm_model(base, size, pool="", **options):
    def build(seed):
        vision = {
            "timm_model_name": timm_towers.register(base, **options),
            "timm_pool": pool,
            "timm_proj": "linear",
            "image_size": size,
        }
        return openclip._model(CLIP, vision, openclip.native_text(Size()), {"seed": seed})

    return build


_VIT = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3}
_HIERA = {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}


def without_grid_size(seed):
    model = timm_model("vit_base_patch16_224", 56, "token", **_VIT)(seed)
    model.visual.trunk.patch_embed.grid_size = (0, 0)
    return model


def with_a_word_for_a_grid(seed):
    model = openclip.clip(seed=seed)
    model.visual.grid_size = "2x2"
    return model


TOWERS = {
    "distilled DeiT": timm_model("deit_base_distilled_patch16_224", 56, "token", **_VIT),
    "distilled DeiT, not square": timm_model(
        "deit_base_distilled_patch16_224", (28, 56), "token", **{**_VIT, "img_size": (28, 56)}
    ),
    "Hiera": timm_model("hiera_tiny_224", 64, "avg", **_HIERA),
    "Hiera with absolute windows": timm_model("hiera_small_abswin_256", 64, "avg", **_HIERA),
    "a ViT without a grid": without_grid_size,
    "a ViT whose grid is a text": with_a_word_for_a_grid,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_a_file_with_the_models_own_names_and_shapes_loads(name, assign, tmp_path):
    source, model = TOWERS[name](1), TOWERS[name](2)
    keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()), assign=assign)
    assert_unchanged(model, bits(source))


def test_a_distilled_deit_is_resized_behind_its_two_tokens(tmp_path):
    source = TOWERS["distilled DeiT"](1)
    model = timm_model("deit_base_distilled_patch16_224", 84, "token", **{**_VIT, "img_size": 84})(2)
    result = keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()))
    key = "visual.trunk.pos_embed"
    assert result.report.plan.resized[key].startswith("4x4 (assumed to be square) to 6x6")
    assert torch.equal(model.state_dict()[key][:, :2], source.state_dict()[key][:, :2])


# --- counters of batch norms ---


COUNTED = {
    "ModifiedResNet": lambda seed: openclip.resnet(seed=seed),
    "ResNet of timm": timm_model("resnet10t", 64, "avg"),
}
COUNTER = ("num_batches_tracked",)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_file_may_lack_the_counters_of_batch_norms(name, device, assign, tmp_path):
    if device == "meta" and not assign:
        pytest.skip("has no memory to copy to")
    source, model = COUNTED[name](1), COUNTED[name](2)
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(COUNTER)}
    model = model.to(device)
    result = keymap.load_checkpoint(model, saved(tmp_path, state_of(source, COUNTER)), assign=assign)
    expected = state_of(source, COUNTER)
    expected |= {key: value if device == "cpu" else torch.zeros_like(value) for key, value in before.items()}
    assert before and result.missing_keys == []
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert "num_batches_tracked" in str(result)


@pytest.mark.parametrize("freeze", [timm_freeze, open_clip_freeze])
@pytest.mark.parametrize("assign", [False, True])
def test_a_frozen_model_takes_a_file_with_counters(freeze, assign, tmp_path):
    source, model = openclip.resnet(seed=1), openclip.resnet(seed=2)
    freeze(model.visual)
    result = keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()), assign=assign)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert any(key.endswith(COUNTER) for key in result.report.plan.dropped) and "does not keep it" in str(result)


@pytest.mark.parametrize("freeze", [timm_freeze, open_clip_freeze])
def test_a_model_takes_the_file_of_a_frozen_one(freeze, tmp_path):
    source, model = openclip.resnet(seed=1), openclip.resnet(seed=2)
    freeze(source.visual)
    keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_counters_load_where_both_sides_have_them(tmp_path):
    source, model = openclip.resnet(seed=1), openclip.resnet(seed=2)
    keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()))
    assert_unchanged(model, bits(source))


def test_a_missing_running_mean_is_still_missing(tmp_path):
    with pytest.raises(keymap.PlanError, match="running_mean"):
        keymap.load_checkpoint(
            openclip.resnet(seed=2), saved(tmp_path, state_of(openclip.resnet(seed=1), ("bn1.running_mean",)))
        )


def test_a_state_dict_without_counters_converts():
    state = state_of(openclip.resnet(seed=1), COUNTER)
    assert keymap.convert_state_dict(state, "openai").keys() == state.keys()


# --- lazy layers ---


@pytest.mark.parametrize("layer", [nn.LazyLinear, nn.LazyBatchNorm1d])
@pytest.mark.parametrize("assign", [False, True])
def test_a_lazy_layer_in_a_head_stops_no_load(layer, assign, tmp_path):
    path = saved(tmp_path, openclip.clip(seed=1).state_dict())
    model = openclip.clip(seed=2)
    model.head = layer(3) if layer is nn.LazyLinear else layer()
    with pytest.raises(keymap.PlanError, match=r"missing from the file: .*head\.weight"):
        keymap.load_checkpoint(model, path, assign=assign)
    result = keymap.load_checkpoint(model, path, strict=False, assign=assign)
    assert {"head.weight", "head.bias"} <= set(result.missing_keys)
    keymap.load_checkpoint(model, path, towers=("image", "text", "scale"), assign=assign)
    assert torch.equal(model.visual.proj, openclip.clip(seed=1).visual.proj)


# --- models that have the names by which files are refused ---


def with_adapters(seed):
    model = openclip.clip(seed=seed)
    for block in model.transformer.resblocks:
        block.attn.lora_A = nn.Parameter(torch.full((2, 32), float(seed)))
        block.attn.lora_B = nn.Parameter(torch.full((32, 2), float(-seed)))
    return model


def with_scales(seed):
    model = openclip.siglip(seed=seed)
    for block in model.visual.trunk.blocks:
        block.attn.qkv.register_buffer("weight_scale", torch.full((1,), float(seed)))
    return model


def with_an_adapter_of_peft(seed):
    model = openclip.clip(seed=seed)
    model.visual.lora_down = nn.ModuleDict({"default": randomise(nn.Linear(48, 2), seed)})
    model.visual.lora_up = nn.ModuleDict({"default": randomise(nn.Linear(2, 48), seed)})
    return model


REFUSED = {"adapters": with_adapters, "scales": with_scales, "peft": with_an_adapter_of_peft}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_the_own_file_of_a_model_with_adapters_or_scales_loads(name, assign, tmp_path):
    source, model = REFUSED[name](1), REFUSED[name](2)
    keymap.load_checkpoint(model, saved(tmp_path, source.state_dict()), assign=assign)
    assert_unchanged(model, bits(source))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strict", [True, False])
def test_a_file_with_adapters_is_refused_by_a_model_without(name, strict, tmp_path):
    model = openclip.siglip(seed=2) if name == "scales" else openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.DetectionError, match=r"LoRA adapter|are quantized"):
        keymap.load_checkpoint(model, saved(tmp_path, REFUSED[name](1).state_dict()), strict=strict)
    assert_unchanged(model, before)


# --- rows that may be a square, or tokens and the model's grid ---


@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (3, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("base", ["vit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_square_that_may_be_a_token_and_the_models_grid_needs_source_grid(base, grid, tmp_path):
    height, width = 14 * grid[0], 14 * grid[1]
    sizes = {**_VIT, "img_size": (height, width)}
    source = timm_model(base, (height, width), "token", **sizes)(1)
    model = timm_model(base, (height, width), "token", **sizes)(2)
    key = "visual.trunk.pos_embed"
    model.visual.trunk.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], 48))  # no row for the token
    before = bits(model)
    file = saved(tmp_path, source.state_dict())
    with pytest.raises(keymap.PlanError, match=rf"{key}: cannot infer the grid .*source_grid"):
        keymap.load_checkpoint(model, file)
    assert_unchanged(model, before)
    side = int((grid[0] * grid[1] + 1) ** 0.5)
    result = keymap.load_checkpoint(model, file, source_grid=(side, side))
    assert result.report.plan.resized[key].startswith(f"{side}x{side} to {grid[0]}x{grid[1]}")
