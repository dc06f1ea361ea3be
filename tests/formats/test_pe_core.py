"""Perception Encoder's own files load into OpenCLIP's models, and compute the same.

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
from peers import mobileclip, openclip, perception
from peers.common import SQUARE, Size, images, max_diff, same_bits, tokens
from timm.models.eva import checkpoint_filter_fn

import keymap

pytestmark = pytest.mark.formats("pe_core")

sizes = sizes_of({**SIZES, "not a square image": {"image_size": (28, 42)}})


def perception_by_hand(source: State) -> State:
    """PE-Core's names -> open_clip's, key by key."""
    trunk, words = "visual.trunk.", {"c_fc": "fc1", "c_proj": "fc2", "in_proj_": "qkv.", "out_proj": "proj"}
    found = {}
    for key, value in source.items():
        if not key.startswith("visual."):
            found[key if key == "logit_scale" else f"text.{key}"] = value
            continue
        name = key.removeprefix("visual.")
        if name == "class_embedding":
            found[f"{trunk}cls_token"] = value.reshape(1, 1, -1)
        elif name == "positional_embedding":
            found[f"{trunk}pos_embed"] = value[None]
        elif name == "proj":
            found[f"{trunk}head.weight"], found[f"{trunk}head.bias"] = value.T, torch.zeros(value.shape[1])
        elif name.startswith("attn_pool.attn.in_proj_"):
            part, width = name.rpartition("_")[2], value.shape[0] // 3
            found[f"{trunk}attn_pool.q.{part}"], found[f"{trunk}attn_pool.kv.{part}"] = value[:width], value[width:]
        else:
            name = name.replace("attn_pool.attn.", "attn_pool.").replace("attn_pool.layernorm", "attn_pool.norm")
            name = name.replace("probe", "latent").replace("conv1", "patch_embed.proj").replace("ln_pre", "norm_pre")
            name = name.replace("transformer.resblocks", "blocks").replace("ln_post", "norm").replace("ln_", "norm")
            for theirs, ours in words.items():
                name = name.replace(theirs, ours)
            found[trunk + name] = value
    return found


CLASS = pytest.mark.parametrize("class_token", [True, False], ids=["class token", "none, as G"])


@CLASS
def test_a_pe_core_file_computes_what_perception_models_computes(class_token, sizes, pt, proves):
    texts = openclip.clip(seed=3, **sizes)
    source = perception.state_dict(class_token=class_token, text_of=texts, **sizes)
    model = perception.model(class_token=class_token, seed=5, **sizes)
    with torch.no_grad():
        model.visual.trunk.head.bias.fill_(7)
    result = keymap.load_checkpoint(model, pt(source), source_grid=grid_of(sizes))
    complete(result, "pe_core")
    assert list(result.report.plan.filled) == ["visual.trunk.head.bias"]
    side, ids = Size(**sizes).image_hw, tokens()
    expected = perception.image_features(source, images(side), **sizes)
    with torch.no_grad():
        assert max_diff(model.encode_image(images(side)), expected) <= LIMIT
        assert max_diff(model.encode_text(ids), texts.encode_text(ids)) <= LIMIT
    assert float(expected.abs().max()) > 0.1
    assert_bits(model, perception_by_hand(source))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@CLASS
def test_a_pe_core_file_equals_timms_own_conversion(class_token, sizes, pt):
    source = perception.state_dict(class_token=class_token, **sizes)
    model = perception.model(class_token=class_token, seed=5, **sizes)
    keymap.load_checkpoint(model, pt(source), source_grid=grid_of(sizes))
    assert_bits(model.visual.trunk, checkpoint_filter_fn(dict(source), model.visual.trunk))


@pytest.mark.parametrize("around", AROUND)
def test_a_pe_core_file_in_wrappers_loads(around, pt):
    source = perception.state_dict()
    model = perception.model(seed=5)
    complete(keymap.load_checkpoint(model, pt(AROUND[around](source))), "pe_core")
    assert_bits(model, perception_by_hand(source))


def test_layer_scales_of_a_pe_core_file_convert_and_are_refused_where_the_model_has_none(pt):
    source = perception.state_dict()
    scales = {f"visual.transformer.resblocks.{i}.ls_{n}.gamma": torch.randn(48) for i in (0, 1) for n in (1, 2)}
    held = keymap.convert_state_dict({**source, **scales}, to="open_clip")
    assert torch.equal(held["visual.trunk.blocks.1.gamma_2"], scales["visual.transformer.resblocks.1.ls_2.gamma"])
    refused(perception.model(seed=5), pt({**source, **scales}), "ls_1.gamma", "no place")


@CLASS
def test_a_pe_core_file_goes_there_and_back(class_token):
    source = perception.state_dict(class_token=class_token)
    model = perception.model(class_token=class_token, seed=5)
    held = keymap.convert_state_dict(source, to="open_clip")
    assert set(held) == set(model.state_dict()) - {"visual.trunk.head.bias"}
    again = keymap.convert_state_dict({**held, "visual.trunk.head.bias": torch.zeros(24)}, to="pe_core")
    assert set(again) == set(source) and all(same_bits(again[key], source[key]) for key in source)
    with pytest.raises(keymap.VerifyError, match=r"visual.trunk.head.bias must hold 0"):
        keymap.convert_state_dict({**held, "visual.trunk.head.bias": torch.ones(24)}, to="pe_core")


@pytest.mark.parametrize("strict", [True, False])
def test_a_pe_core_file_is_refused_by_a_native_clip(strict, pt):
    """Its image tower has the names of OpenCLIP's own ViT, and rotary positions beside them."""
    path = pt(perception.state_dict())
    refused(openclip.clip(seed=5), path, "trunk", "native_vit", strict=strict, towers=("image",))


# --- the published sizes ---


PUBLISHED = ["PE-Core-T-16-384", "PE-Core-S-16-384", "PE-Core-B-16", "PE-Core-L-14-336", "PE-Core-bigG-14-448"]


def perception_names(held: State) -> State:
    """The state dict of PE-Core that becomes this one of open_clip."""
    words = {
        "visual.trunk.": "visual.",
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "attn_pool.norm": "attn_pool.layernorm",
        "attn_pool.latent": "attn_pool.probe",
        "attn_pool.proj.": "attn_pool.attn.out_proj.",
        "blocks": "transformer.resblocks",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "visual.norm": "visual.ln_post",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {}
    for key, value in held.items():
        name = key.removeprefix("text.")
        for ours, theirs in words.items():
            name = name.replace(ours, theirs) if key.startswith("visual.") else name
        if ".attn_pool.q." in key:
            both = held[key.replace(".q.", ".kv.")]
            found[name.replace("attn_pool.q.", "attn_pool.attn.in_proj_")] = torch.cat([value, both])
        elif key == "visual.trunk.head.weight":
            found["visual.proj"] = value.T
        elif key == "visual.trunk.cls_token":
            found["visual.class_embedding"] = value[0, 0]
        elif key == "visual.trunk.pos_embed":
            found["visual.positional_embedding"] = value[0]
        elif ".attn_pool.kv." not in key and key != "visual.trunk.head.bias":
            found[name] = value
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_size_has_its_place_and_shape(name):
    held = dict(mobileclip.on_meta(name).state_dict())
    assert_every_key_has_its_place(held, perception_names(held), filled={"visual.trunk.head.bias"})


@CLASS
def test_open_clips_and_timms_own_files_of_these_models_keep_their_formats(class_token, file):
    make = partial(perception.model, class_token=class_token)
    assert_open_clips_and_timms_files_keep_their_formats(make, file)


# --- broken rules ---


def square() -> Case:
    image, ids = images(), tokens()
    texts = openclip.clip(seed=3, **SQUARE)
    state = perception.state_dict(text_of=texts, **SQUARE)
    with torch.no_grad():
        outputs = [perception.image_features(state, image, **SQUARE), texts.encode_text(ids), texts.logit_scale]
    return Case("pe_core", state, perception.model(seed=5, **SQUARE), outputs, image, ids)


ROWS = r"""
pe_core: the projection not transposed: differs
- visual.trunk.head.weight, view: in out -> out in}
+ visual.trunk.head.weight}
pe_core: q taken from the end of the pool's projection: differs
- (q|kv).\1', split: [1, 2]}
+ (kv|q).\1', split: [2, 1]}
pe_core: the pool's projection split in the wrong proportions: refused
- (q|kv).\1', split: [1, 2]}
+ (q|kv).\1', split: [2, 1]}
pe_core: the layers of the pool's MLP swapped: differs
- visual.trunk.attn_pool.mlp.fc1.\1
+ visual.trunk.attn_pool.mlp.fc3.\1
- visual.trunk.attn_pool.mlp.fc2.\1
+ visual.trunk.attn_pool.mlp.fc1.\1
- visual.trunk.attn_pool.mlp.fc3.\1
+ visual.trunk.attn_pool.mlp.fc2.\1
pe_core: the norms before and after exchanged: differs
- visual.ln_pre.(weight|bias): visual.trunk.norm_pre.\1
+ visual.ln_pre.(weight|bias): visual.trunk.norm.\1
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.norm_pre.\1
pe_core: the norm of the pool and that of the tower exchanged: differs
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.attn_pool.norm.\1
- visual.attn_pool.layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
+ visual.attn_pool.layernorm.(weight|bias): visual.trunk.norm.\1
pe_core: the output of the pool transposed: differs
- visual.attn_pool.attn.out_proj.(weight|bias): visual.trunk.attn_pool.proj.\1
+ visual.attn_pool.attn.out_proj.weight: {to: visual.trunk.attn_pool.proj.weight, view: a b -> b a}
+ visual.attn_pool.attn.out_proj.bias: visual.trunk.attn_pool.proj.bias
pe_core: norm1 and norm2 swapped: differs
- ln_(1|2).(weight|bias): norm\1.\2
+ ln_(1|2).(weight|bias): norm<1:other>.\2
pe_core: fc1 and fc2 swapped: differs
- mlp.c_fc.(weight|bias): mlp.fc1.\1
- mlp.c_proj.(weight|bias): mlp.fc2.\1
+ mlp.c_fc.(weight|bias): mlp.fc2.\1
+ mlp.c_proj.(weight|bias): mlp.fc1.\1
pe_core: q, k and v inside out: differs
- attn.in_proj_(weight|bias): attn.qkv.\1
+ attn.in_proj_weight: {to: attn.qkv.weight, view: (n a) b -> (a n) b, sizes: {n: 3}}
+ attn.in_proj_bias: attn.qkv.bias
pe_core: the convolution read as width, height: differs
- visual.conv1.weight: visual.trunk.patch_embed.proj.weight
+ visual.conv1.weight: {to: visual.trunk.patch_embed.proj.weight, view: o i h w -> o i w h}
pe_core: the position embedding without its leading axis: refused
- visual.trunk.pos_embed, view: n d -> 1 n d}
+ visual.trunk.pos_embed}
pe_core: the class token forgotten: refused
- visual.class_embedding: {to: visual.trunk.cls_token, view: d -> 1 1 d, optional: true}
+ nothing: {to: visual.trunk.cls_token, view: d -> 1 1 d, optional: true}
pe_core: the text projection transposed: differs
- (positional_embedding|text_projection): \1
+ positional_embedding: positional_embedding
+ text_projection: {to: text_projection, view: a b -> b a}
"""

LOOKUPS = "  other: {1: 2, 2: 1}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"pe_core": square}, LOOKUPS)
