"""Files that open_clip's own loader loads, loads in part or rejects: keymap loads them right, or refuses them.

A load is compared bit for bit, or by outputs; a refusal has its message, and leaves the model unchanged. No load is
partial without a report. QuickGELU, head counts and pretrained tags, which weights do not show, are in `test_config`.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from peers import big_vision, by_hand, eva_clip, hf, lit, mobileclip, openai, openclip, perception, timm_towers
from peers.common import (
    SQUARE,
    Size,
    assert_unchanged,
    bits,
    images,
    max_diff,
    randomise,
    same_bits,
    tensors,
    tokens,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap

State = dict[str, Tensor]
LIMIT = 2e-5


# --- helpers ---


def state_of(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.fixture
def pt(tmp_path) -> Callable[..., Path]:
    """Save anything with torch.save; gives the path."""

    def save(content: object, name: str = "model.pt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def st(tmp_path) -> Callable[..., Path]:
    """Save tensors as safetensors; gives the path."""

    def save(state: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def npz(tmp_path) -> Callable[..., Path]:
    """Save arrays as npz; gives the path."""

    def save(flat: Mapping[str, Any], name: str = "siglip.npz", compressed: bool = False) -> Path:
        big_vision.save(flat, tmp_path / name, compressed)
        return tmp_path / name

    return save


def differing(model: nn.Module, expected: Mapping[str, Tensor]) -> list[str]:
    """The keys among `expected` whose tensor in the model has other bits."""
    state = model.state_dict()
    return [k for k, v in expected.items() if not same_bits(state[k], v.to(state[k].dtype).contiguous())]


def assert_holds(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Fail unless the model holds these values, bit for bit, and nothing else."""
    assert set(model.state_dict()) == set(expected)
    assert differing(model, expected) == []


def complete(result: keymap.LoadResult) -> None:
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def refuses(model: nn.Module, path: object, *words: str, error: type = keymap.KeymapError, **options: Any) -> str:
    """The refusal's message, after every word was found in it and the model was seen to be unchanged."""
    before = bits(model)
    with pytest.raises(error) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    return message


def visual(state: Mapping[str, Tensor], there: bool = True) -> State:
    return {k: v for k, v in state.items() if k.startswith("visual.") == there}


def without(state: Mapping[str, Tensor], *keys: str) -> State:
    assert set(keys) <= set(state)
    return {k: v for k, v in state.items() if k not in keys}


def text_prefixed(state: Mapping[str, Tensor]) -> State:
    """The flat keys of a text tower under the names of CustomTextCLIP."""
    return {k if k.startswith(("visual.", "logit_")) else f"text.{k}": v for k, v in state.items()}


@torch.no_grad()
def outputs(model: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return model.encode_image(image), model.encode_text(text)


LAYOUTS = {"CLIP": openclip.clip, "CustomTextCLIP": openclip.custom}
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])


# --- loading in general: transformers' files ---


@STRICT
@pytest.mark.parametrize("target", LAYOUTS)
def test_hf_clip_model_safetensors_into_native_vit(target, strict, st):
    peer = hf.clip()
    model = LAYOUTS[target](seed=5)
    complete(keymap.load_checkpoint(model, st(hf.disk_keys(peer)), strict))
    image, text = images(), tokens()
    got = outputs(model, image, text)
    assert max_diff(got[0], hf.image_features(peer, image)) <= LIMIT
    assert max_diff(got[1], hf.text_features(peer, text)) <= LIMIT
    assert_holds(model, by_hand.hf_clip(hf.disk_keys(peer), "" if target == "CLIP" else "text."))


@STRICT
def test_hf_siglip_model_into_siglip_with_timm_tower(strict, st):
    peer = hf.siglip()
    model = openclip.siglip(seed=5)
    complete(keymap.load_checkpoint(model, st(hf.disk_keys(peer)), strict))
    assert_holds(model, by_hand.hf_siglip(hf.disk_keys(peer)))


@STRICT
@pytest.mark.parametrize("towers", [None, ("image",)], ids=["whole", "image tower"])
def test_hf_clip_vision_model_into_siglip_model_is_refused(towers, strict, st):
    path = st(hf.disk_keys(hf.clip(tower="image")))
    message = refuses(openclip.siglip(), path, "native_vit", "map_trunk", strict=strict, towers=towers)
    assert "different architectures" in message and "hf_clip" in message


@pytest.mark.parametrize("config", ["open_clip_config.json", "config.json"])
def test_a_folder_with_a_configuration_and_hf_model_safetensors(config, st, tmp_path):
    peer = hf.clip()
    path = st(hf.disk_keys(peer))
    text = '{"model_cfg": {}}' if config.startswith("open") else peer.config.to_json_string()
    (tmp_path / config).write_text(text)
    model = openclip.clip(seed=5)
    complete(keymap.load_checkpoint(model, path))
    assert_holds(model, by_hand.hf_clip(hf.disk_keys(peer)))


@STRICT
def test_a_folder_with_only_epoch_32_pt_is_loaded_and_reported(strict, pt, tmp_path):
    source, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    pt({"state_dict": source}, "epoch_32.pt")
    result = keymap.load_checkpoint(model, tmp_path, strict)
    complete(result)
    assert_holds(model, source)
    assert "chose epoch_32.pt from the folder: the last epoch of a training run" in result.report.plan.notes


# --- loading in general: logit_scale and logit_bias ---


@STRICT
def test_safetensors_without_logit_bias_into_siglip_is_filled_with_zero_and_reported(strict, st):
    source, model = state_of(openclip.siglip(seed=1)), openclip.siglip(seed=2)
    assert model.logit_bias.detach() != 0
    result = keymap.load_checkpoint(model, st(without(source, "logit_bias")), strict)
    complete(result)
    assert_holds(model, {**source, "logit_bias": torch.zeros(())})
    assert "logit_bias" in result.report.plan.filled and "filled: logit_bias" in str(result)


LOGIT_BIAS = {
    "siglip built without logit_bias": lambda **k: (openclip.siglip, {"logit_bias": False, **k}),
    "plain CLIP": lambda **k: (openclip.clip, k),
    "plain CustomTextCLIP": lambda **k: (openclip.custom, k),
}


def _with_logit_bias(name: str, value: float | None) -> tuple[State, nn.Module]:
    build, options = LOGIT_BIAS[name](seed=1)
    state = state_of(build(**options))
    state["logit_bias"] = torch.tensor(-9.5 if value is None else value)
    return state, build(**{**options, "seed": 2})


@pytest.mark.parametrize("name", LOGIT_BIAS)
def test_a_checkpoint_with_logit_bias_into(name, st):
    state, model = _with_logit_bias(name, None)
    path = st(state)
    refuses(model, path, "logit_bias", "must hold 0", "9.5", error=keymap.VerifyError)
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result.unexpected_keys == ["logit_bias"] and result.missing_keys == []
    assert "logit_bias" in str(result)
    assert_holds(model, without(state, "logit_bias"))


@STRICT
@pytest.mark.parametrize("name", LOGIT_BIAS)
def test_a_logit_bias_of_zero_equals_no_logit_bias_in(name, strict, st):
    state, model = _with_logit_bias(name, 0.0)
    result = keymap.load_checkpoint(model, st(state), strict)
    complete(result)
    assert "logit_bias" in result.report.plan.dropped
    assert_holds(model, without(state, "logit_bias"))


def test_a_checkpoint_without_logit_scale_and_logit_bias_into_siglip(st):
    state, model = state_of(openclip.siglip(seed=1)), openclip.siglip(seed=2)
    before = bits(model)
    path = st(without(state, "logit_scale", "logit_bias"))
    refuses(model, path, "logit_scale", "allow_missing=", error=keymap.PlanError)
    result = keymap.load_checkpoint(model, path, strict=False)
    assert "logit_scale" in result.missing_keys and result.unexpected_keys == []
    assert differing(model, without(state, "logit_scale", "logit_bias")) == []
    assert same_bits(model.logit_scale, before["logit_scale"])


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_only_file_into_siglip(tower, st):
    state, model = state_of(openclip.siglip(seed=1)), openclip.siglip(seed=2)
    before = bits(model)
    part = {k: v for k, v in state.items() if k.startswith("visual." if tower == "image" else "text.")}
    path = st(part)
    refuses(model, path, "towers=", tower, "logit_scale", error=keymap.PlanError)
    complete(keymap.load_checkpoint(model, path, towers=(tower,)))
    assert_holds(model, {**without(before, *part), **part})


@STRICT
@pytest.mark.parametrize("shape", [(1,), (), (1, 1)], ids=str)
def test_logit_scale_of_shape_into_scalar_model_and_back(shape, strict, pt):
    state, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    path = pt({**state, "logit_scale": state["logit_scale"].reshape(shape)})
    complete(keymap.load_checkpoint(model, path, strict))
    assert_holds(model, state)
    vector = openclip.clip(seed=2, nonscalar_logit_scale=True)
    complete(keymap.load_checkpoint(vector, path, strict))
    assert_holds(vector, {**state, "logit_scale": state["logit_scale"].reshape(1)})


# --- loading in general: prefixes and wrappers ---


@STRICT
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module.model."])
def test_prefix_on_every_key(prefix, target, strict, pt):
    source, model = state_of(LAYOUTS[target](seed=1)), LAYOUTS[target](seed=2)
    result = keymap.load_checkpoint(model, pt({prefix + k: v for k, v in source.items()}), strict)
    complete(result)
    assert "".join(result.report.plan.prefixes) == prefix
    assert_holds(model, source)


EQUAL = {"widths differ": {}, "vision width equals text width": SQUARE}


@pytest.mark.parametrize("sizes", EQUAL)
@pytest.mark.parametrize("target", LAYOUTS)
def test_module_prefix_only_on_the_first_key(target, sizes, pt):
    source = state_of(LAYOUTS[target](seed=1, **EQUAL[sizes]))
    model = LAYOUTS[target](seed=2, **EQUAL[sizes])
    first = next(iter(source))
    path = pt({f"module.{k}" if k == first else k: v for k, v in source.items()})
    before = bits(model)
    refuses(model, path, f"module.{first}", first, "rename it", error=keymap.PlanError)
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result.missing_keys == [first] and result.unexpected_keys == [f"module.{first}"]
    assert f"module.{first}" in str(result)
    assert_holds(model, {**source, first: before[first]})  # so no image weight went to the text tower


@pytest.mark.parametrize("sizes", EQUAL)
@pytest.mark.parametrize("target", LAYOUTS)
def test_module_prefix_on_every_key_but_the_first_is_refused(target, sizes, pt):
    source = state_of(LAYOUTS[target](seed=1, **EQUAL[sizes]))
    first = next(iter(source))
    path = pt({k if k == first else f"module.{k}": v for k, v in source.items()})
    refuses(LAYOUTS[target](seed=2, **EQUAL[sizes]), path, first, "'module")


@pytest.mark.parametrize("sizes", EQUAL)
def test_module_prefix_on_every_key_but_the_first_not_strict_is_refused_with_the_odd_key(sizes, pt):
    """The key that has no prefix is not left out silently; the message names it."""
    source = state_of(openclip.clip(seed=1, **EQUAL[sizes]))
    first = next(iter(source))
    path = pt({k if k == first else f"module.{k}": v for k, v in source.items()})
    words = ["outside 'module", first]
    refuses(openclip.clip(seed=2, **EQUAL[sizes]), path, *words, strict=False)


WRAPPERS = ["state_dict", "model", "model_state_dict", "module", "ema", "model_ema", "weights"]


@STRICT
@pytest.mark.parametrize("target", [*LAYOUTS, "SigLIP"])
@pytest.mark.parametrize("others", ["alone", "epoch first", "epoch last"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper(name, others, target, strict, pt):
    build = {**LAYOUTS, "SigLIP": openclip.siglip}[target]
    source, model = state_of(build(seed=1)), build(seed=2)
    content: dict[str, Any] = {name: source}
    if others == "epoch first":
        content = {"epoch": 3, **content}
    elif others == "epoch last":
        content["epoch"] = 3
    result = keymap.load_checkpoint(model, pt(content), strict)
    complete(result)
    assert result.report.plan.wrapper == name
    assert_holds(model, source)


def test_raw_weights_and_ema_in_one_file_are_reported_and_can_be_chosen(pt):
    raw, averaged = state_of(openclip.clip(seed=1)), state_of(openclip.clip(seed=3))
    path = pt({"epoch": 1, "model_ema": averaged, "state_dict": raw})
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, path)
    assert_holds(model, raw)
    assert "model_ema" in str(result) and "wrapper=" in str(result)
    complete(keymap.load_checkpoint(model, path, wrapper="model_ema"))
    assert_holds(model, averaged)


# --- loading in general: containers ---


@STRICT
@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3, "model": {}}], ids=str)
def test_empty_state_dict(content, strict, pt):
    path = pt(content)
    refuses(openclip.clip(), path, path.name, error=keymap.CheckpointError, strict=strict)


@STRICT
def test_whole_pickled_module(strict, pt):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    path = pt(source)
    refuses(model, path, path.name, "weights_only=False", error=keymap.UnsafeCheckpointError, strict=strict)
    complete(keymap.load_checkpoint(model, path, strict, weights_only=False))
    assert_holds(model, state_of(source))


@pytest.mark.parametrize("name", ["weights", "weights.pt", "weights.bin"])
def test_safetensors_content_without_safetensors_extension(name, st):
    source, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    complete(keymap.load_checkpoint(model, st(source, name)))
    assert_holds(model, source)


def _shards(folder: Path, state: State, save: Callable[..., object], suffix: str) -> Path:
    places = {}
    for number in range(3):
        part = {k: state[k].contiguous() for k in list(state)[number::3]}
        save(part, folder / f"model-0000{number + 1}-of-00003{suffix}")
        places |= dict.fromkeys(part, f"model-0000{number + 1}-of-00003{suffix}")
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["open_clip", "hf_clip"])
def test_sharded_index_json(layout, suffix, tmp_path):
    source = state_of(openclip.clip(seed=1)) if layout == "open_clip" else hf.disk_keys(hf.clip())
    path = _shards(tmp_path, source, save_file if suffix == ".safetensors" else torch.save, suffix)
    model = openclip.clip(seed=2)
    complete(keymap.load_checkpoint(model, path))
    assert_holds(model, source if layout == "open_clip" else by_hand.hf_clip(source))


@STRICT
def test_training_checkpoint_holding_argparse_namespace_and_optimizer(strict, pt):
    trained, model = openclip.clip(seed=1), openclip.clip(seed=2)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained.encode_image(images()).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, name="run"),
        "best": np.float64(0.25),
        "optimizer": optimizer.state_dict(),
        "state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()},
    }
    complete(keymap.load_checkpoint(model, pt(content), strict))
    assert_holds(model, state_of(trained))


# --- loading in general: keys and shapes ---


def test_one_wrong_shaped_tensor_strict(pt):
    state = state_of(openclip.clip(seed=1))
    path = pt({**state, "visual.proj": torch.randn(48, 25)})
    refuses(openclip.clip(seed=2), path, "visual.proj", "[48, 25]", "[48, 24]", "nothing was changed", path.name)


def test_one_wrong_shaped_tensor_not_strict(pt):
    state, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    before = bits(model)
    result = keymap.load_checkpoint(model, pt({**state, "visual.proj": torch.randn(48, 25)}), strict=False)
    assert result.missing_keys == ["visual.proj"] and result.unexpected_keys == ["visual.proj"]
    assert "visual.proj: shape [48, 25] in the file, [48, 24] in the model" in str(result)
    assert_holds(model, {**state, "visual.proj": before["visual.proj"]})


def test_one_unexpected_key(pt):
    state, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    path = pt({**state, "extra": torch.randn(3)})
    refuses(model, path, "1 of the file's keys", "extra", "allow_unexpected=('extra',)", error=keymap.PlanError)
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result == {"missing_keys": [], "unexpected_keys": ["extra"]}
    assert_holds(model, state)


def test_one_missing_key(pt):
    state, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=2)
    before = bits(model)
    path = pt(without(state, "visual.proj"))
    refuses(
        model, path, "1 of the model's keys", "visual.proj", "allow_missing=('visual.proj',)", error=keymap.PlanError
    )
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result == {"missing_keys": ["visual.proj"], "unexpected_keys": []}
    assert_holds(model, {**state, "visual.proj": before["visual.proj"]})


@STRICT
@pytest.mark.parametrize("sizes", EQUAL)
def test_custom_text_checkpoint_into_flat_clip_and_back(sizes, strict, pt):
    flat = state_of(openclip.clip(seed=1, **EQUAL[sizes]))
    one, two = openclip.clip(seed=2, **EQUAL[sizes]), openclip.custom(seed=2, **EQUAL[sizes])
    complete(keymap.load_checkpoint(one, pt(text_prefixed(flat)), strict))
    assert_holds(one, flat)
    complete(keymap.load_checkpoint(two, pt(flat), strict))
    assert_holds(two, text_prefixed(flat))


FLAT_TEXT = {
    "Linear text_projection.{weight,bias}": {"proj_bias": True},
    "no text_projection (proj_type none)": {"proj_type": "none", "width": 24},
}


@STRICT
@pytest.mark.parametrize("name", FLAT_TEXT)
def test_flat_checkpoint_into_custom_text_clip_with(name, strict, pt):
    custom = state_of(openclip.custom(seed=1, text=FLAT_TEXT[name]))
    flat = {k.removeprefix("text."): v for k, v in custom.items()}
    assert ("text_projection.bias" in flat) == ("Linear" in name) and "text_projection" not in flat
    model = openclip.custom(seed=2, text=FLAT_TEXT[name])
    complete(keymap.load_checkpoint(model, pt(flat), strict))
    assert_holds(model, custom)


def test_flat_clip_checkpoint_into_custom_text_clip_with_hf_text_tower(pt):
    state, model = state_of(openclip.clip(seed=1)), openclip.hf_text(seed=2)
    path = pt(state)
    for strict in (True, False):
        refuses(model, path, "text tower", "flat", "hf", "different architectures", strict=strict)
    before = state_of(model)
    complete(keymap.load_checkpoint(model, path, towers=("image",)))
    assert differing(model, visual(state)) == []
    assert differing(model, visual(before, False)) == []


HF_BUFFERS = {
    "legacy position_ids": ("roberta", "text.transformer.embeddings.position_ids", torch.arange(18)[None]),
    "token_type_ids buffer": ("roberta", "text.transformer.embeddings.token_type_ids", torch.zeros(1, 18).long()),
    "sinusoidal embed_positions.weights": ("m2m_100", "text.transformer.embed_positions.weights", torch.randn(20, 32)),
}


@STRICT
@pytest.mark.parametrize("name", HF_BUFFERS)
def test_hf_text_tower_checkpoint_with(name, strict, pt):
    family, key, value = HF_BUFFERS[name]
    state, model = state_of(openclip.hf_text(family=family, seed=1)), openclip.hf_text(family=family, seed=2)
    assert key not in state
    result = keymap.load_checkpoint(model, pt({**state, key: value}), strict)
    complete(result)
    assert key in result.report.plan.dropped
    assert_holds(model, state)


# --- loading in general: sizes ---


def resized_by_open_clip(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """What open_clip's own functions make of the position embeddings."""
    new = dict(state)
    resize_pos_embed(new, model)
    resize_text_pos_embed(new, model)
    return new


@STRICT
@pytest.mark.parametrize("target", LAYOUTS)
def test_native_vit_28px_checkpoint_into_56px_model(target, strict, pt):
    state, model = state_of(LAYOUTS[target](seed=1)), LAYOUTS[target](seed=2, image_size=56)
    result = keymap.load_checkpoint(model, pt(state), strict)
    complete(result)
    assert_holds(model, resized_by_open_clip(state, model))
    assert "resized: visual.positional_embedding from 2x2" in str(result) and "4x4" in str(result)


def _grid(rows: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Plain torch: a class row, then a grid, bicubic with antialias."""
    image = rows[1:].float().unflatten(0, source).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, target, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([rows[:1].float(), image[0].permute(1, 2, 0).flatten(0, 1)])


@pytest.mark.parametrize("grid_from", ["source_grid", "open_clip_config.json"])
@pytest.mark.parametrize("target", [(56, 56), (56, 28)], ids=["4x4 model", "4x2 model (same token count)"])
def test_native_vit_2x4_grid_checkpoint_into(target, grid_from, pt, tmp_path):
    state, model = state_of(openclip.clip(seed=1, image_size=(28, 56))), openclip.clip(seed=2, image_size=target)
    path = pt(state)
    if target == (56, 56):
        refuses(model, path, "visual.positional_embedding", "source_grid=(h, w)", "2x4", error=keymap.PlanError)
    else:  # equal shapes load, and the report says which grid was assumed
        assert "taken as the model's grid of 4x2" in str(keymap.load_checkpoint(model, path))
    options = {"source_grid": (2, 4)} if grid_from == "source_grid" else {}
    if not options:
        config = {"model_cfg": {"vision_cfg": {"image_size": [28, 56], "patch_size": 14}}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    result = keymap.load_checkpoint(model, path, **options)
    complete(result)
    key = "visual.positional_embedding"
    expected = _grid(state[key], (2, 4), (target[0] // 14, target[1] // 14))
    assert not torch.equal(expected, state[key])
    assert_holds(model, {**state, key: expected})
    assert "2x4 to 4x" in result.report.plan.resized[key]


def test_native_vit_2x4_grid_checkpoint_not_strict_leaves_only_the_positions(pt):
    state, model = state_of(openclip.clip(seed=1, image_size=(28, 56))), openclip.clip(seed=2, image_size=56)
    before, key = bits(model), "visual.positional_embedding"
    result = keymap.load_checkpoint(model, pt(state), strict=False)
    assert result.missing_keys == [key] and result.unexpected_keys == [key]
    assert "source_grid=(h, w)" in str(result)
    assert_holds(model, {**state, key: before[key]})


@STRICT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_native_vit_half_precision_checkpoint_with_resize(dtype, strict, pt):
    state = {k: v.to(dtype) for k, v in state_of(openclip.clip(seed=1)).items()}
    model = openclip.clip(seed=2, image_size=56, context_length=24)
    complete(keymap.load_checkpoint(model, pt(state), strict))
    assert_holds(model, resized_by_open_clip({k: v.float() for k, v in state.items()}, model))


@STRICT
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("context", [32, 8, 15])
def test_text_context_16_checkpoint_into_model_of(context, target, strict, pt):
    state, model = state_of(LAYOUTS[target](seed=1)), LAYOUTS[target](seed=2, context_length=context)
    result = keymap.load_checkpoint(model, pt(state), strict)
    complete(result)
    expected = resized_by_open_clip(state, model)
    assert_holds(model, expected)
    key = "positional_embedding" if target == "CLIP" else "text.positional_embedding"
    assert result.report.plan.resized[key] == f"16 to {context}, linear"
    assert not same_bits(expected[key][:8], state[key][:8])


def test_text_width_32_checkpoint_into_width_64_model(pt):
    path, model = pt(state_of(openclip.clip(seed=1))), openclip.clip(seed=2, text_width=64)
    message = refuses(model, path, "positional_embedding", "[16, 32]", "[16, 64]", "width", error=keymap.PlanError)
    assert "nothing was changed" in message
    refuses(model, path, "text tower", "not even in part", strict=False, error=keymap.PlanError)


@STRICT
def test_modified_resnet_64px_checkpoint_into_128px_model(strict, pt):
    state, model = state_of(openclip.resnet(seed=1)), openclip.resnet(seed=2, image_size=128)
    complete(keymap.load_checkpoint(model, pt(state), strict))
    key = "visual.attnpool.positional_embedding"
    assert_holds(model, {**state, key: _grid(state[key], (2, 2), (4, 4))})


def _siglip_resized(state: State) -> State:
    key = "visual.trunk.pos_embed"
    padded = torch.cat([torch.zeros(1, state[key].shape[2]), state[key][0]])
    return {**state, key: _grid(padded, (2, 2), (4, 4))[1:][None]}


@STRICT
@pytest.mark.parametrize("built", ["at 56px", "at 28px, then set to 56px"])
@pytest.mark.parametrize("file", ["28px checkpoint", "56px checkpoint"])
def test_timm_trunk_siglip_into_56px_model(file, built, strict, pt):
    source = openclip.siglip(seed=1, image_size=28 if file.startswith("28") else 56)
    if built == "at 56px":
        model = openclip.siglip(seed=2, image_size=56)
    else:
        model = openclip.siglip(seed=2)
        model.visual.set_input_size((56, 56))
    state = state_of(source)
    complete(keymap.load_checkpoint(model, pt(state), strict))
    assert_holds(model, _siglip_resized(state) if file.startswith("28") else state)


# --- loading in general: the rows of pretrained_image_path, as towers=("image",) ---


def test_timm_vit_clip_state_dict_into_clip(st):
    peer, model = timm_towers.clip_vit(), openclip.clip(seed=5)
    path, before = st(peer.state_dict()), state_of(model)
    refuses(model, path, "no text tower", "towers=('image',)", "format timm", error=keymap.PlanError)
    complete(keymap.load_checkpoint(model, path, towers=("image",)))
    assert_holds(model, {**before, **by_hand.timm_clip(peer.state_dict())})


IMAGE_PATHS: dict[str, Callable[[], tuple[State, nn.Module, State]]] = {
    "native from timm ViT CLIP file": lambda: (
        state_of(p := timm_towers.clip_vit()),
        openclip.clip(seed=5),
        by_hand.timm_clip(p.state_dict()),
    ),
    "timm SigLIP from timm trunk file": lambda: (
        state_of(p := timm_towers.siglip_vit()),
        openclip.siglip(seed=5),
        by_hand.timm_trunk(p.state_dict()),
    ),
    "native from HF CLIPVisionModelWithProjection": lambda: (
        (p := hf.disk_keys(hf.clip(tower="image_proj"))),
        openclip.clip(seed=5),
        visual(by_hand.hf_clip({**hf.disk_keys(hf.clip()), **p})),
    ),
    "native from full open_clip checkpoint": lambda: (
        (p := state_of(openclip.clip(seed=1))),
        openclip.clip(seed=5),
        visual(p),
    ),
    "native from full flat checkpoint, vision width equals text width": lambda: (
        (p := state_of(openclip.clip(seed=1, **SQUARE))),
        openclip.clip(seed=5, **SQUARE),
        visual(p),
    ),
    "CustomTextCLIP from full flat checkpoint, vision width equals text width": lambda: (
        (p := state_of(openclip.clip(seed=1, **SQUARE))),
        openclip.custom(seed=5, **SQUARE),
        visual(p),
    ),
}


@STRICT
@pytest.mark.parametrize("name", IMAGE_PATHS)
def test_pretrained_image_path(name, strict, st):
    state, model, expected = IMAGE_PATHS[name]()
    before = state_of(model)
    result = keymap.load_checkpoint(model, st(state), strict, towers=("image",))
    complete(result)
    assert set(result.report.plan.loaded) == {"image"}
    assert_holds(model, {**before, **expected})


def test_pretrained_image_path_tower_with_one_bad_shape(st):
    state, model = state_of(openclip.clip(seed=1)), openclip.clip(seed=5)
    state["visual.proj"] = torch.randn(48, 25)
    path, before = st(visual(state)), bits(model)
    refuses(model, path, "visual.proj", "[48, 25]", "[48, 24]", towers=("image",), error=keymap.PlanError)
    result = keymap.load_checkpoint(model, path, strict=False, towers=("image",))
    assert result.missing_keys == ["visual.proj"]
    assert differing(model, {**visual(state), "visual.proj": before["visual.proj"]}) == []


@STRICT
def test_pretrained_image_path_no_such_file(strict, tmp_path):
    path = tmp_path / "no" / "such" / "file"
    refuses(openclip.clip(), path, str(path), error=keymap.CheckpointError, strict=strict, towers=("image",))


# --- towers and sizes ---


@pytest.mark.parametrize("sizes", EQUAL)
@pytest.mark.parametrize("target", LAYOUTS)
def test_pretrained_text_path_full_flat_checkpoint_changes_only_the_text_tower(target, sizes, pt):
    state = state_of(openclip.clip(seed=1, **EQUAL[sizes]))
    model = LAYOUTS[target](seed=5, **EQUAL[sizes])
    before = state_of(model)
    result = keymap.load_checkpoint(model, pt(state), towers=("text",))
    complete(result)
    flat_or_custom = state if target == "CLIP" else text_prefixed(state)
    text = {k: v for k, v in flat_or_custom.items() if not k.startswith(("visual.", "logit_"))}
    assert_holds(model, {**before, **text})


def _timm_model(base: str, arguments: Mapping[str, object], pool: str, size: int) -> nn.Module:
    vision = {
        "timm_model_name": timm_towers.register(base, **arguments),
        "timm_pool": pool,
        "timm_proj": "linear",
        "image_size": size,
    }
    return openclip.custom(vision={**dict.fromkeys(["layers", "width", "head_width", "mlp_ratio"]), **vision})


SMALL_VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL_SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
FORCED = {  # base, small, pool, size, its position embedding
    "EVA02": ("eva02_base_patch16_clip_224", SMALL_VIT, "token", 28, True),
    "PE-Core": ("vit_pe_core_tiny_patch16_384", SMALL_VIT, "", 28, True),
    "vit_relpos_medium_patch16_cls_224": ("vit_relpos_medium_patch16_cls_224", SMALL_VIT, "token", 28, False),
    "vit_medium_patch16_gap_256": ("vit_medium_patch16_gap_256", SMALL_VIT, "avg", 28, True),
    "MobileCLIP2 (FastViT)": ("fastvit_mci0", {"layers": (1, 1, 1, 1)}, "", 64, False),
    "ViTamin": ("vitamin_small_224", {"depth": 1}, "", 224, True),
    "swin": ("swin_base_patch4_window7_224", SMALL_SWIN, "avg", 224, False),
}


@pytest.mark.parametrize("name", FORCED)
def test_checkpoint_saved_under_force_image_size_reloads_under_force_image_size(name, st):
    base, arguments, pool, size, positions = FORCED[name]
    model = _timm_model(base, arguments, pool, size)
    small = state_of(model)
    model.visual.set_input_size((2 * size, 2 * size))
    tuned = state_of(randomise(copy.deepcopy(model), 3))
    complete(keymap.load_checkpoint(model, st(tuned)))
    assert_holds(model, tuned)
    path = st(small)
    if name == "swin":  # a table of relative positions is no grid of positions: keymap does not resample it
        refuses(model, path, "relative_position_bias_table", "[169, 1]", "[729, 1]", error=keymap.PlanError)
        return
    result = keymap.load_checkpoint(model, path)
    complete(result)
    assert ("visual.trunk.pos_embed" in result.report.plan.resized) == positions
    assert differing(model, without(small, "visual.trunk.pos_embed") if positions else small) == []
    with torch.no_grad():
        assert torch.isfinite(model.encode_image(images(2 * size, batch=1))).all()


RELOADED = {"RN50": (openclip.resnet, 128), "ViT-B-32": (openclip.clip, 56), "ConvNeXt": (openclip.convnext, 128)}


@pytest.mark.parametrize("name", RELOADED)
def test_checkpoint_of_a_forced_size_reloads(name, st):
    build, size = RELOADED[name]
    source, model = state_of(build(seed=1, image_size=size)), build(seed=2, image_size=size)
    complete(keymap.load_checkpoint(model, st(source)))
    assert_holds(model, source)


ORIGINALS: dict[str, tuple[Callable[[], State], Callable[[], nn.Module], str]] = {
    "EVA02-CLIP original": (
        lambda: eva_clip.state_dict("EVA02"),
        lambda: eva_clip.model("EVA02", seed=5),
        "eva_clip",
    ),
    "PE-Core original": (perception.state_dict, lambda: perception.model(seed=5), "pe_core"),
    "MobileCLIP dict": (
        lambda: mobileclip.small("mobileclip_s1")[0],
        lambda: mobileclip.model("mobileclip_s1", seed=5),
        "mobileclip_s",
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_file_loads_into_its_timm_model(name, pt):
    """Their values are compared with the owners' own conversions in test_eva_pe_mobileclip.py."""
    build, target, format_ = ORIGINALS[name]
    state, model = build(), target()
    before = bits(model)
    with warnings.catch_warnings():  # the peers have fewer heads than Apple's models
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)
        result = keymap.load_checkpoint(model, pt(state))
    complete(result)
    assert result.report.plan.format == format_
    same = [key for key, value in model.state_dict().items() if same_bits(before[key], value)]
    assert set(same) <= set(result.report.plan.filled)


@STRICT
@pytest.mark.parametrize("name", ORIGINALS)
def test_original_file_into_a_native_clip_is_refused(name, strict, pt):
    build, _, format_ = ORIGINALS[name]
    path = pt(build())
    refuses(
        openclip.clip(seed=5), path, path.name, format_, "trunk", "native_vit", error=keymap.PlanError, strict=strict
    )


# --- OpenAI archives ---

ARCHIVES = {
    "vit": (openai.vit, openai.VIT, {}),
    "rn": (openai.resnet, openai.RESNET, {"layers": openai.RESNET_LAYERS}),
}


def _openai(tower: str, custom: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """OpenAI's model, and the one to load it into."""
    build, size, more = ARCHIVES[tower]
    target = openclip.clip if tower == "vit" else openclip.resnet
    kind = {"kind": openclip.CustomTextCLIP} if custom else {}
    return build(), target(quick_gelu=True, seed=5, **more, **size, **kind, **options)


@STRICT
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("target", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("save", ["TorchScript archive", "plain state dict with the constants"])
@pytest.mark.parametrize("tower", ARCHIVES)
def test_openai_values_equal(tower, save, target, weights_only, strict, tmp_path):
    peer, model = _openai(tower, target == "CustomTextCLIP")
    path = tmp_path / "clip.pt"
    (openai.save_archive if "archive" in save else openai.save_state_dict)(peer, path)
    result = keymap.load_checkpoint(model, path, strict, weights_only)
    complete(result)
    expected = by_hand.openai(openai.state_dict(peer), "" if target == "CLIP" else "text.")
    assert_holds(model, {k: v.float() if v.is_floating_point() else v for k, v in expected.items()})


@pytest.mark.parametrize("tower", ARCHIVES)
def test_openai_archive_into_a_model_of_half_precision(tower, tmp_path):
    peer, model = _openai(tower, precision="pure_fp16")
    openai.save_archive(peer, tmp_path / "clip.pt")
    complete(keymap.load_checkpoint(model, tmp_path / "clip.pt"))
    assert_holds(
        model, {k: v.half() for k, v in by_hand.openai(openai.state_dict(peer)).items() if k in tensors(model)}
    )


# --- big_vision npz ---


def _converted(flat: Mapping[str, Any], model: nn.Module) -> State:
    """The conversion written by hand, at the model's shapes."""
    state = model.state_dict()
    return {k: v.reshape(state[k].shape).float() for k, v in by_hand.big_vision(big_vision.plain(flat)).items()}


def test_npz_bf16_v2(npz):
    flat = big_vision.to_bfloat16_void(big_vision.init())
    model = openclip.siglip(seed=5)
    assert keymap.load_checkpoint(model, npz(flat)) == {}
    assert_holds(model, _converted(flat, model))


def test_npz_with_doubled_text_posemb(npz):
    flat = big_vision.init()
    extra = np.random.default_rng(0).normal(size=flat["txt/pos_embedding"].shape).astype(np.float32)
    model = openclip.siglip(seed=5)
    result = keymap.load_checkpoint(model, npz({**flat, "txt/Encoder_0/pos_embedding": extra}))
    flat["txt/pos_embedding"] = flat["txt/pos_embedding"] + extra
    assert_holds(model, _converted(flat, model))
    assert "txt/Encoder_0/pos_embedding" in str(result)


def test_npz_2x2_grid_into_4x4_grid_model(npz):
    flat, model = big_vision.init(), openclip.siglip(seed=5, image_size=56)
    result = keymap.load_checkpoint(model, npz(flat))
    expected = _siglip_resized(_converted(flat, openclip.siglip(seed=5)))
    assert_holds(model, expected)
    assert "2x2" in result.report.plan.resized["visual.trunk.pos_embed"]


NPZ_REFUSED: dict[str, tuple[Callable[[], Mapping[str, Any]], Callable[[], nn.Module], tuple[str, ...]]] = {
    "depth 2 into depth-3 model": (
        big_vision.init,
        lambda: openclip.siglip(image_depth=3),
        ("visual.trunk.blocks.2", "12 of the model's keys"),
    ),
    "depth 2 into depth-1 model": (
        big_vision.init,
        lambda: openclip.siglip(image_depth=1),
        ("img/Transformer/encoderblock_1", "16 of the file's keys"),
    ),
    "scanned npz depth 2 into depth-1 towers": (
        lambda: big_vision.scan(big_vision.init(text_depth=2)),
        lambda: openclip.siglip(image_depth=1, text_depth=1),
        ("encoderblock/",),
    ),
    "width 48 into width 96": (
        big_vision.init,
        lambda: openclip.siglip(image_width=96),
        ("visual.trunk.pos_embed", "[1, 4, 48]", "[1, 4, 96]"),
    ),
    "vocab 99 into vocab 120": (
        big_vision.init,
        lambda: openclip.siglip(vocab=120),
        ("text.token_embedding.weight", "[99, 32]", "[120, 32]"),
    ),
    "into native CLIP (ViT)": (big_vision.init, openclip.clip, ("map_trunk", "native_vit", "different architectures")),
    "into CustomTextCLIP native ViT": (
        big_vision.init,
        openclip.custom,
        ("map_trunk", "native_vit", "different architectures"),
    ),
    "into timm CLIP ViT with class token (no attn_pool)": (
        big_vision.init,
        openclip.clip_trunk,
        ("map_trunk", "clip_trunk", "different architectures"),
    ),
    "missing txt/head/bias": (
        lambda: {k: v for k, v in big_vision.init().items() if k != "txt/head/bias"},
        openclip.siglip,
        ("text.text_projection.bias",),
    ),
    "unknown extra key": (
        lambda: {**big_vision.init(), "img/extra/kernel": np.ones((2, 3), np.float32)},
        openclip.siglip,
        ("img/extra/kernel", "no place"),
    ),
    "(1,)-shaped LN scale and patch bias (wrong shape)": (
        lambda: {
            **big_vision.init(),
            "img/Transformer/encoder_norm/scale": np.ones(1, np.float32),
            "img/embedding/bias": np.ones(1, np.float32),
        },
        openclip.siglip,
        ("visual.trunk.norm.weight", "visual.trunk.patch_embed.proj.bias", "[1]", "[48]"),
    ),
    "SigLIP arch without logit_bias": (
        big_vision.init,
        lambda: openclip.siglip(logit_bias=False),
        ("b must hold 0", "logit_bias"),
    ),
}


@pytest.mark.parametrize("name", NPZ_REFUSED)
def test_npz_is_refused(name, npz):
    flat, build, words = NPZ_REFUSED[name]
    path = npz(flat())
    refuses(build(), path, path.name, "big_vision_siglip", "nothing was changed", *words)


NPZ_PARTLY = {
    "depth 2 into depth-3 model": 12,
    "depth 2 into depth-1 model": 0,
    "scanned npz depth 2 into depth-1 towers": 0,
    "vocab 99 into vocab 120": 1,
    "missing txt/head/bias": 1,
    "unknown extra key": 0,
    "(1,)-shaped LN scale and patch bias (wrong shape)": 2,
    "SigLIP arch without logit_bias": 0,
}


@pytest.mark.parametrize("name", NPZ_PARTLY)
def test_npz_not_strict_loads_the_rest_and_reports(name, npz):
    flat, build, _ = NPZ_REFUSED[name]
    source, model = flat(), build()
    before = state_of(model)
    result = keymap.load_checkpoint(model, npz(source), strict=False)
    assert result == {}
    assert len(result.missing_keys) == NPZ_PARTLY[name]
    assert result.missing_keys or result.unexpected_keys
    whole = {**big_vision.init(), **source}
    expected = {k: v for k, v in by_hand.big_vision(big_vision.plain(whole)).items() if k in before}
    for key, value in model.state_dict().items():
        wanted = before[key] if key in result.missing_keys else expected[key].reshape(value.shape).contiguous()
        assert same_bits(value, wanted), key


def test_npz_ctx_16_into_ctx_24(npz):
    flat, model = big_vision.init(), openclip.siglip(seed=5, context_length=24)
    result = keymap.load_checkpoint(model, npz(flat))
    state = _converted(flat, openclip.siglip(seed=5))
    assert_holds(model, resized_by_open_clip(state, model))
    assert result.report.plan.resized == {"text.positional_embedding": "16 to 24, linear"}


@STRICT
@pytest.mark.parametrize("no_embed_class", [False, True], ids=["tiny_vit_cls", "tiny_vit_cls_noembed"])
@pytest.mark.parametrize("head", [True, False], ids=["lit_tok", "lit_tok_nohead"])
def test_lit_npz_loads_into_a_vit_with_class_token(head, no_embed_class, strict, npz):
    flat, model = lit.init(head=head), lit.model(head=head, no_embed_class=no_embed_class, seed=5)
    complete(keymap.load_checkpoint(model, npz(flat), strict))
    rows = model.visual.trunk.pos_embed.detach()[0]
    assert bool((rows[0] == 0).all()) == (not no_embed_class)  # the file has no row for the class token
    assert same_bits(rows[-4:], torch.from_numpy(flat["img/pos_embedding"])[0])


@STRICT
@pytest.mark.parametrize("head", [True, False], ids=["lit_tok", "lit_tok_nohead"])
def test_lit_npz_is_refused_by_a_clip_vit(head, strict, npz):
    """CLIP's ViT has a norm before its blocks that LiT's has not."""
    path = npz(lit.init(head=head))
    if strict:
        refuses(openclip.clip_trunk(), path, path.name, "norm_pre", strict=strict)
        return
    model = openclip.clip_trunk(image_mlp=4.0, seed=5)
    result = keymap.load_checkpoint(model, npz(lit.init(head=head, image_mlp=4.0)), strict=False, towers=("image",))
    assert {"visual.trunk.norm_pre.weight", "visual.trunk.norm_pre.bias"} <= set(result.missing_keys)


@STRICT
def test_npy_file_is_refused_in_words(strict, tmp_path):
    path = tmp_path / "siglip.npy"
    np.save(path, np.ones((4, 3), np.float32))
    message = refuses(openclip.siglip(), path, path.name, strict=strict)
    assert "no known format" in message or "one array" in message


# --- the same layout: what open_clip gets right ---


def _same(build: Callable[..., nn.Module], **sizes: Any) -> Callable[[], tuple[Any, nn.Module]]:
    return lambda: (state_of(build(seed=1)), build(seed=2, **sizes))


SAME_LAYOUT: dict[str, Callable[[], tuple[Any, nn.Module]]] = {
    "flat": _same(openclip.clip),
    "custom": _same(openclip.custom),
    "flat into custom": lambda: (state_of(openclip.clip(seed=1)), openclip.custom(seed=2)),
    "siglip": _same(openclip.siglip),
    "siglip without logit_bias": lambda: (
        without(state_of(openclip.siglip(seed=1)), "logit_bias"),
        openclip.siglip(seed=2),
    ),
    "resnet": _same(openclip.resnet),
    "convnext": _same(openclip.convnext),
    "coca": _same(openclip.coca),
    "timm trunk": _same(openclip.clip_trunk),
    "timm trunk, no class position": _same(lambda **k: openclip.clip_trunk(no_embed_class=True, **k)),
    "hf text": _same(openclip.hf_text),
    "hf text with position_ids": lambda: (
        {**state_of(openclip.hf_text(seed=1)), "text.transformer.embeddings.position_ids": torch.arange(18)[None]},
        openclip.hf_text(seed=2),
    ),
    "fp16 file": lambda: ({k: v.half() for k, v in state_of(openclip.clip(seed=1)).items()}, openclip.clip(seed=2)),
    "bf16 file": lambda: ({k: v.bfloat16() for k, v in state_of(openclip.clip(seed=1)).items()}, openclip.clip(seed=2)),
    "float64 file": lambda: (
        {k: v.double() for k, v in state_of(openclip.clip(seed=1)).items()},
        openclip.clip(seed=2),
    ),
    "fp32 file into fp16 model": lambda: (
        state_of(openclip.clip(seed=1)),
        openclip.clip(seed=2, precision="fp16"),
    ),
    "fp32 file into bf16 model": lambda: (
        state_of(openclip.clip(seed=1)),
        openclip.clip(seed=2, precision="pure_bf16"),
    ),
    "module. on every key": lambda: (
        {f"module.{k}": v for k, v in state_of(openclip.clip(seed=1)).items()},
        openclip.clip(seed=2),
    ),
    "logit_scale of shape (1,)": lambda: (
        {**(s := state_of(openclip.clip(seed=1))), "logit_scale": s["logit_scale"][None]},
        openclip.clip(seed=2),
    ),
    "native ViT 28px into 56px": _same(openclip.clip, image_size=56),
    "native ViT 56px into 28px": lambda: (
        state_of(openclip.clip(seed=1, image_size=56)),
        openclip.clip(seed=2),
    ),
    "native ViT square into 2x4": _same(openclip.clip, image_size=(28, 56)),
    "text 16 into 32": _same(openclip.clip, context_length=32),
    "text 16 into 8": _same(openclip.custom, context_length=8),
    "everything resized, flat into custom": lambda: (
        state_of(openclip.clip(seed=1)),
        openclip.custom(seed=2, image_size=(42, 56), context_length=21),
    ),
}


def _both(model: nn.Module, path: Path, **options: Any) -> keymap.Plan:
    """Load with both libraries into two copies; every tensor must have the same bits. Gives our plan."""
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    open_clip.load_checkpoint(theirs, str(path), **options)
    result = keymap.load_checkpoint(ours, path, **options)
    complete(result)
    wrong = [k for k, v in tensors(theirs).items() if not same_bits(v, tensors(ours)[k])]
    assert wrong == []
    changed = [k for k, v in tensors(model).items() if v.is_floating_point() and not same_bits(v, tensors(ours)[k])]
    assert len(changed) > 20
    return result.report.plan


@pytest.mark.parametrize("container", ["pt", "safetensors"])
@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_same_layout_equals_open_clip_bit_for_bit(name, container, pt, st):
    content, model = SAME_LAYOUT[name]()
    _both(model, st(content) if container == "safetensors" else pt(content))


def test_training_checkpoint_equals_open_clip_bit_for_bit(pt):
    state = {f"module.{k}": v for k, v in state_of(openclip.clip(seed=1)).items()}
    _both(openclip.clip(seed=2), pt({"epoch": 1, "name": "run", "state_dict": state}))


@pytest.mark.parametrize("target", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("tower", ARCHIVES)
def test_openai_archive_equals_open_clip_bit_for_bit(tower, target, tmp_path, proves):
    peer, model = _openai(tower, target == "CustomTextCLIP")
    openai.save_archive(peer, tmp_path / "clip.pt")
    proves("bit-equal", _both(model, tmp_path / "clip.pt", weights_only=False))


@pytest.mark.parametrize("form", ["plain", "params/", "scanned"])
@pytest.mark.parametrize("head", [True, False], ids=["text head", "no text head"])
def test_big_vision_npz_equals_open_clip_bit_for_bit(form, head, npz, proves):
    change = {"plain": dict, "params/": big_vision.with_prefix, "scanned": big_vision.scan}[form]
    plan = _both(openclip.siglip(projection=head, seed=5), npz(change(big_vision.init(head=head))))
    proves("bit-equal", plan)


def test_the_sizes_of_the_tables_differ():
    """A swapped pair of tensors would show: no two sizes of the default model agree."""
    size = Size()
    widths = [size.embed_dim, size.image_width, size.text_width, size.image_hidden, size.text_hidden, size.vocab]
    assert len(set(widths)) == len(widths)
