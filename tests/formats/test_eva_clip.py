"""EVA-CLIP's own files load into OpenCLIP's models, and compute the same.

They are compared with a forward pass written in plain torch from their own names, and bit for bit with timm's converter
and with a conversion written by hand.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from broken import Case, rule_tests
from checks import (
    AROUND,
    LIMIT,
    SIZES,
    State,
    assert_bits,
    assert_every_key_has_its_place,
    assert_open_clips_and_timms_files_keep_their_formats,
    complete,
    grid_of,
    refused,
    sizes_of,
)
from peers import eva_clip, mobileclip, openclip, perception
from peers.common import SQUARE, Size, images, max_diff, same_bits, tokens
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import checkpoint_filter_fn

import keymap

pytestmark = pytest.mark.formats("eva_clip")

sizes = sizes_of({**SIZES, "not a square image": {"image_size": (28, 42)}})


def eva_by_hand(source: State, kind: str) -> State:
    """EVA-CLIP's names -> open_clip's, key by key."""
    words = {"inner_attn_ln": "norm", "ffn_ln": "norm", "w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
    found = {}
    for key, value in source.items():
        if ".rope." in key:
            continue
        parts = key.split(".")
        if parts[0] == "visual":
            parts = ["visual", "trunk", *(words.get(part, part) for part in parts[1:])]
            if kind == "EVA02" and parts[-1] in ("q_bias", "v_bias"):
                parts[-1:] = [f"{parts[-1][0]}_proj", "bias"]
        found[".".join(parts)] = value
    return found


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_computes_what_eva_clip_computes(kind, sizes, pt, proves):
    texts = openclip.custom(seed=3, **sizes)
    source = eva_clip.state_dict(kind, text_of=texts, **sizes)
    model = eva_clip.model(kind, seed=5, **sizes)
    result = keymap.load_checkpoint(model, pt(source), source_grid=grid_of(sizes))
    complete(result, "eva_clip")
    dropped = {key for key in source if ".rope." in key}
    assert set(result.report.plan.dropped) == dropped
    assert len(dropped) == (2 + 2 * Size(**sizes).image_depth if kind == "EVA02" else 0)
    side, ids = Size(**sizes).image_hw, tokens()
    expected = eva_clip.image_features(source, kind, images(side), **sizes)
    with torch.no_grad():
        assert max_diff(model.encode_image(images(side)), expected) <= LIMIT
        assert max_diff(model.encode_text(ids), texts.encode_text(ids)) <= LIMIT
    assert float(expected.abs().max()) > 0.1
    assert_bits(model, eva_by_hand(source, kind))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_equals_timms_own_conversion(kind, sizes, pt):
    source = eva_clip.state_dict(kind, **sizes)
    model = eva_clip.model(kind, seed=5, **sizes)
    keymap.load_checkpoint(model, pt(source), source_grid=grid_of(sizes))
    expected = checkpoint_filter_fn(dict(source), eva_clip.model(kind, seed=6, **sizes).visual.trunk)
    assert_bits(model.visual.trunk, expected)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_in_half_precision_and_in_wrappers_loads(kind, around, pt):
    source = {key: value.half() for key, value in eva_clip.state_dict(kind).items()}
    model = eva_clip.model(kind, seed=5)
    complete(keymap.load_checkpoint(model, pt(AROUND[around](source))), "eva_clip")
    assert_bits(model, {key: value.float() for key, value in eva_by_hand(source, kind).items()})


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_goes_there_and_back(kind):
    source = eva_clip.state_dict(kind)
    held = keymap.convert_state_dict(source, to="open_clip")
    again = keymap.convert_state_dict(held, to="eva_clip")
    kept = {key: value for key, value in source.items() if ".rope." not in key}
    assert set(held) == set(eva_clip.model(kind).state_dict())
    assert set(again) == set(kept) and all(same_bits(again[key], kept[key]) for key in kept)


def test_a_logit_scale_of_the_text_tower_moves_and_a_second_one_must_be_equal(pt):
    source = eva_clip.state_dict("EVA02")
    moved = {"text.logit_scale" if key == "logit_scale" else key: value for key, value in source.items()}
    model = eva_clip.model("EVA02", seed=5)
    complete(keymap.load_checkpoint(model, pt(moved)), "eva_clip")
    assert_bits(model, eva_by_hand(source, "EVA02"))
    model = eva_clip.model("EVA02", seed=5)
    result = keymap.load_checkpoint(model, pt({**source, "text.logit_scale": source["logit_scale"].clone()}))
    assert "text.logit_scale" in result.report.plan.dropped
    assert_bits(model, eva_by_hand(source, "EVA02"))
    other = {**source, "text.logit_scale": source["logit_scale"] + 1}
    refused(eva_clip.model("EVA02", seed=5), pt(other), "text.logit_scale", error=keymap.VerifyError)


def test_an_eva_clip_file_with_a_flat_text_tower_loads(pt):
    """As its files were before CustomCLIP; eva_clip's own loader moves these keys too."""
    source = eva_clip.state_dict("EVA01")
    old = {key.removeprefix("text."): value for key, value in source.items()}
    model = eva_clip.model("EVA01", seed=5)
    complete(keymap.load_checkpoint(model, pt(old)), "eva_clip")
    assert_bits(model, eva_by_hand(source, "EVA01"))


@pytest.mark.parametrize("part", ["freqs_cos", "freqs_sin"])
def test_a_rotary_table_that_differs_from_its_copies_is_refused(part, pt):
    source = eva_clip.state_dict("EVA02")
    source[f"visual.blocks.1.attn.rope.{part}"][3, 2] += 1e-3
    key = f"visual.blocks.1.attn.rope.{part}"
    refused(eva_clip.model("EVA02", seed=5), pt(source), key, f"a copy of visual.rope.{part}", error=keymap.VerifyError)


@pytest.mark.parametrize(("side", "trained"), [(14, 16), (16, 16), (24, 16), (2, 5)])
def test_timm_computes_the_rotary_tables_that_eva_clip_stores(side, trained, monkeypatch):
    """What is dropped is what the model has: EVA02-B-16, -L-14, -L-14-336, and the small peers of this file."""
    monkeypatch.setattr(eva_clip, "TRAINED", trained)
    tables = eva_clip.rotary(Size(image_size=14 * side, patch=14, image_width=3 * 64, image_heads=3))
    made = RotaryEmbeddingCat(64, in_pixels=False, feat_shape=(side, side), ref_feat_shape=(trained, trained))
    sin, cos = made.get_embed().chunk(2, -1)
    assert max_diff(sin, tables["freqs_sin"]) <= 1e-5
    assert max_diff(cos, tables["freqs_cos"]) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_is_refused_by_a_model_of_another_architecture(kind, strict, pt):
    source = eva_clip.state_dict(kind)
    path = pt(source)
    refused(openclip.clip(seed=5), path, "trunk", "native_vit", strict=strict, towers=("image",))
    if strict:  # a block of another build has other keys
        other = "EVA01" if kind == "EVA02" else "EVA02"
        refused(eva_clip.model(other, seed=5), path, "visual.trunk.blocks.0.attn", strict=strict)
        refused(perception.model(seed=5), path, "visual.trunk.norm_pre.weight", strict=strict)


# --- the published sizes ---


PUBLISHED = [
    *("EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336"),
    *("EVA01-g-14", "EVA01-g-14-plus", "EVA02-E-14", "EVA02-E-14-plus"),
]


def eva_names(held: State) -> State:
    """The state dict of EVA-CLIP that becomes this one of open_clip."""
    words = {"fc1_g": "w1", "fc1_x": "w2"}
    split, found = "visual.trunk.blocks.0.attn.q_proj.weight" in held, {}
    for key, value in held.items():
        name = key.replace("visual.trunk.", "visual.")
        if split and key.startswith("visual."):
            name = name.replace("attn.norm.", "attn.inner_attn_ln.").replace("mlp.norm.", "mlp.ffn_ln.")
            name = name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias").replace("mlp.fc2.", "mlp.w3.")
        for ours, theirs in words.items():
            name = name.replace(f"mlp.{ours}.", f"mlp.{theirs}.")
        found[name] = value
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_size_has_its_place_and_shape(name):
    held = dict(mobileclip.on_meta(name).state_dict())
    assert_every_key_has_its_place(held, eva_names(held), filled=set())


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_open_clips_and_timms_own_files_of_these_models_keep_their_formats(kind, file):
    assert_open_clips_and_timms_files_keep_their_formats(partial(eva_clip.model, kind), file)


# --- broken rules ---


def square(kind: str) -> Case:
    image, ids = images(), tokens()
    texts = openclip.custom(seed=3, **SQUARE)
    state = eva_clip.state_dict(kind, text_of=texts, **SQUARE)
    with torch.no_grad():
        outputs = [eva_clip.image_features(state, kind, image, **SQUARE), texts.encode_text(ids), texts.logit_scale]
    return Case("eva_clip", state, eva_clip.model(kind, seed=5, **SQUARE), outputs, image, ids)


ROWS = r"""
eva_clip: the gate of the MLP and what it gates exchanged: differs
- mlp.w1.(weight|bias): mlp.fc1_g.\1
- mlp.w2.(weight|bias): mlp.fc1_x.\1
+ mlp.w1.(weight|bias): mlp.fc1_x.\1
+ mlp.w2.(weight|bias): mlp.fc1_g.\1
eva_clip: q and v exchanged: differs
- attn.(q|k|v)_proj.weight: attn.\1_proj.weight
+ attn.(q|k|v)_proj.weight: attn.<1:turned>_proj.weight
eva_clip: the biases of q and v exchanged: differs
- attn.(q|v)_bias: attn.\1_proj.bias
+ attn.(q|v)_bias: attn.<1:ends>_proj.bias
eva_clip: the norms inside attention and MLP exchanged: differs
- attn.inner_attn_ln.(weight|bias): attn.norm.\1
+ attn.inner_attn_ln.(weight|bias): mlp.norm.\1
- mlp.ffn_ln.(weight|bias): mlp.norm.\1
+ mlp.ffn_ln.(weight|bias): attn.norm.\1
eva_clip: the last layer of the MLP transposed: differs
- mlp.w3.(weight|bias): mlp.fc2.\1
+ mlp.w3.weight: {to: mlp.fc2.weight, view: a b -> b a}
+ mlp.w3.bias: mlp.fc2.bias
eva_clip: norm1 and norm2 swapped: differs
- norm(1|2).(weight|bias): norm\1.\2
+ norm(1|2).(weight|bias): norm<1:other>.\2
eva_clip: the output of attention transposed: differs
- attn.proj.(weight|bias): attn.proj.\1
+ attn.proj.weight: {to: attn.proj.weight, view: a b -> b a}
+ attn.proj.bias: attn.proj.bias
eva_clip: the head transposed: differs
- visual.(norm|head).(weight|bias): visual.trunk.\1.\2
+ visual.norm.(weight|bias): visual.trunk.norm.\1
+ visual.head.weight: {to: visual.trunk.head.weight, view: a b -> b a}
+ visual.head.bias: visual.trunk.head.bias
eva_clip: the convolution read as width, height: differs
- visual.patch_embed.proj.(weight|bias): visual.trunk.patch_embed.proj.\1
+ visual.patch_embed.proj.weight: {to: visual.trunk.patch_embed.proj.weight, view: o i h w -> o i w h}
+ visual.patch_embed.proj.bias: visual.trunk.patch_embed.proj.bias
eva_clip: the text projection transposed: differs
- text.(token_embedding.weight|positional_embedding|text_projection): text.\1
+ text.(token_embedding.weight|positional_embedding): text.\1
+ text.text_projection: {to: text.text_projection, view: a b -> b a}
eva_clip: the rotary tables taken for weights: refused
- visual.rope.freqs_(cos|sin): cosines and sines of rotary positions; the model computes them
+ nothing.rope.freqs_(cos|sin): cosines and sines of rotary positions; the model computes them
eva_clip: the copies of the rotary tables taken for weights: refused
- visual.blocks.(\d+).attn.rope.freqs_(cos|sin):
+ nothing.blocks.(\d+).attn.rope.freqs_(cos|sin):
EVA01: fc1 and fc2 swapped: differs
- mlp.fc(1|2).(weight|bias): mlp.fc\1.\2
+ mlp.fc(1|2).(weight|bias): mlp.fc<1:other>.\2
EVA01: q, k and v inside out: differs
- attn.qkv.weight: attn.qkv.weight
+ attn.qkv.weight: {to: attn.qkv.weight, view: (n a) b -> (a n) b, sizes: {n: 3}}
EVA01: the biases of q and v exchanged: differs
- attn.(q|v)_bias: attn.\1_bias
+ attn.(q|v)_bias: attn.<1:ends>_bias
EVA01: the names of EVA02: refused
- attn.(q|v)_bias: attn.\1_bias
+ attn.(q|v)_bias: attn.\1_proj.bias
EVA02-E: norm1 and norm2 swapped: differs
- norm(1|2).(weight|bias): norm\1.\2
+ norm(1|2).(weight|bias): norm<1:other>.\2
"""

LOOKUPS = "  turned: {q: v, k: k, v: q}\n  ends: {q: v, v: q}\n  other: {1: 2, 2: 1}\n"  # that the rows use
CASES = {"eva_clip": partial(square, "EVA02"), **{kind: partial(square, kind) for kind in ("EVA01", "EVA02-E")}}

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)
