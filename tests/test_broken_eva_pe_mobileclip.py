"""Rules of EVA-CLIP, PE-Core and MobileCLIP broken one at a time: the load is refused, or the outputs differ.

As test_broken_rules.py, on square towers wherever the architecture allows it, so that shapes tell nothing.
"""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from broken import LIMIT, assert_seen, edited, parsed, text_of, use
from peers import eva_clip, mobileclip, openclip, perception
from peers.common import SQUARE, images, max_diff, tokens

import keymap


@cache
def setting(name):
    """The peer's state dict, the model to load, and the peer's outputs for these inputs."""
    image, text = images(), tokens()
    if name.startswith("EVA"):
        texts = openclip.custom(seed=3, **SQUARE)
        state = eva_clip.state_dict(name, text_of=texts, **SQUARE)
        out = [eva_clip.image_features(state, name, image, **SQUARE)]
        return state, eva_clip.model(name, seed=5, **SQUARE), [*out, *text_outputs(texts, text)], image, text
    if name == "pe_core":
        texts = openclip.clip(seed=3, **SQUARE)
        state = perception.state_dict(text_of=texts, **SQUARE)
        out = [perception.image_features(state, image, **SQUARE)]
        return state, perception.model(seed=5, **SQUARE), [*out, *text_outputs(texts, text)], image, text
    state, peer = mobileclip.small(name, **SQUARE)
    image = images(32 if name == "mobileclip_b" else mobileclip.IMAGE)
    with torch.no_grad():
        out = [peer.encode_image(image), *text_outputs(peer, text)]
    return state, mobileclip.model(name, seed=5, **SQUARE), out, image, text


@torch.no_grad()
def text_outputs(model, text):
    return [model.encode_text(text), model.logit_scale.detach().clone()]


@torch.no_grad()
def distance(name, folder, mapping):
    """Load the peer's file and compare; the largest difference of any output."""
    state, model, out, image, text = setting(name)
    torch.save(state, folder / "peer.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)
        keymap.load_checkpoint(model, folder / "peer.pt", mapping=mapping)
    got = [model.encode_image(image), *text_outputs(model, text)]
    return max(max_diff(a, b) for a, b in zip(got, out, strict=True))


# One row: the file, what is wrong, what follows; then what is taken out (-) and what is put there instead (+).
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
eva_clip: the scale forgotten: refused
- scale:
- logit_scale: logit_scale
+ scale:
+ nothing: logit_scale
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
mobileclip_b: the projection not transposed: differs
- visual.trunk.head.weight, view: in out -> out in}
+ visual.trunk.head.weight}
mobileclip_b: the norms of the stem exchanged: differs
- patch_emb.(0|1).block.norm.: {to: visual.trunk.patch_embed.backbone.\1.bn.,
+ patch_emb.(0|1).block.norm.: {to: visual.trunk.patch_embed.backbone.<1:stem>.bn.,
mobileclip_b: the two norms of a block exchanged: differs
- pre_norm_mha.0.(weight|bias): norm1.\1
+ pre_norm_mha.0.(weight|bias): norm2.\1
- pre_norm_ffn.0.(weight|bias): norm2.\1
+ pre_norm_ffn.0.(weight|bias): norm1.\1
mobileclip_b: the output of attention transposed: differs
- pre_norm_mha.1.out_proj.(weight|bias): attn.proj.\1
+ pre_norm_mha.1.out_proj.weight: {to: attn.proj.weight, view: a b -> b a}
+ pre_norm_mha.1.out_proj.bias: attn.proj.bias
mobileclip_b: the two norms of a text block exchanged: differs
- pre_norm_mha.0.(weight|bias): ln_1.\1
+ pre_norm_mha.0.(weight|bias): ln_2.\1
- pre_norm_ffn.0.(weight|bias): ln_2.\1
+ pre_norm_ffn.0.(weight|bias): ln_1.\1
mobileclip_b: the layers of the text MLP swapped: differs
- pre_norm_ffn.1.(weight|bias): mlp.c_fc.\1
+ pre_norm_ffn.4.(weight|bias): mlp.c_fc.\1
- pre_norm_ffn.4.(weight|bias): mlp.c_proj.\1
+ pre_norm_ffn.1.(weight|bias): mlp.c_proj.\1
mobileclip_b: the text projection transposed: differs
- projection_layer: text_projection
+ projection_layer: {to: text_projection, view: a b -> b a}
mobileclip_b: the third layer of the text MLP taken for the second: refused
- pre_norm_ffn.4.(weight|bias): mlp.c_proj.\1
+ pre_norm_ffn.3.(weight|bias): mlp.c_proj.\1
mobileclip_b: positions with the axis that Apple's have: refused
- {to: visual.trunk.pos_embed, view: 1 1 n d -> 1 n d}
+ visual.trunk.pos_embed
mobileclip_s1: a stage and the next exchanged: refused
- network.2.(\d+).: {to: stages.1.
+ network.2.(\d+).: {to: stages.2.
- network.4.(\d+).: {to: stages.2.
+ network.4.(\d+).: {to: stages.1.
mobileclip_s1: what makes the map smaller after the stage, not before: refused
- network.1.: {to: stages.1.downsample.,
+ network.1.: {to: stages.0.downsample.,
mobileclip_s1: the scales of an attention block exchanged: differs
- layer_scale_(1|2): layer_scale_\1.gamma
+ layer_scale_(1|2): layer_scale_<1:other>.gamma
mobileclip_s1: the scales of a block and of its mixer exchanged: differs
- (|token_mixer.)layer_scale: \1layer_scale.gamma
+ layer_scale: token_mixer.layer_scale.gamma
+ token_mixer.layer_scale: layer_scale.gamma
mobileclip_s1: mean and variance swapped: differs
- (weight|bias|running_mean|running_var|num_batches_tracked): \1
+ (weight|bias|running_mean|running_var|num_batches_tracked): <1:stats>
mobileclip_s1: the large convolution taken for the small: refused
- proj.0.lkb_origin.: {to: proj.0.large_conv.,
+ proj.0.lkb_origin.: {to: proj.0.small_conv.,
- proj.0.small_conv.: {to: proj.0.small_conv.,
+ proj.0.small_conv.: {to: proj.0.large_conv.,
mobileclip_s1: the side branches forgotten: refused
- rbr_skip.: {to: identity.,
+ nothing.: {to: identity.,
mobileclip_s1: the output of attention transposed: differs
- token_mixer.proj.(weight|bias): token_mixer.proj.\1
+ token_mixer.proj.weight: {to: token_mixer.proj.weight, view: a b -> b a}
+ token_mixer.proj.bias: token_mixer.proj.bias
mobileclip_s1: squeeze and expand exchanged: refused
- conv_exp.se.reduce.(weight|bias): final_conv.se.fc1.\1
- conv_exp.se.expand.(weight|bias): final_conv.se.fc2.\1
+ conv_exp.se.reduce.(weight|bias): final_conv.se.fc2.\1
+ conv_exp.se.expand.(weight|bias): final_conv.se.fc1.\1
"""
LOOKUPS = (
    "  turned: {q: v, k: k, v: q}\n  ends: {q: v, v: q}\n  other: {1: 2, 2: 1}\n  stem: {0: 1, 1: 0}\n"
    "  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean, "
    "num_batches_tracked: num_batches_tracked}\n"
)
FILES = {
    "eva_clip": ("eva_clip", "EVA02"),
    "EVA01": ("eva_clip", "EVA01"),
    "EVA02-E": ("eva_clip", "EVA02-E"),
    "pe_core": ("pe_core", "pe_core"),
    "mobileclip_b": ("mobileclip_b", "mobileclip_b"),
    "mobileclip_s1": ("mobileclip_s", "mobileclip_s1"),
}


def loaded(name, edits, folder, monkeypatch):
    form, peer = FILES[name]
    text = edited(form, text_of(form, LOOKUPS), edits)
    return distance(peer, folder, use(form, text, folder, monkeypatch))


@pytest.mark.parametrize("name", FILES)
def test_the_intact_copy_passes(name, tmp_path, monkeypatch):
    assert loaded(name, [], tmp_path, monkeypatch) <= LIMIT


@pytest.mark.parametrize(("name", "follows", "edits"), parsed(ROWS))
def test_a_broken_rule_is_seen(name, follows, edits, tmp_path, monkeypatch):
    assert_seen(follows, lambda: loaded(name, edits, tmp_path, monkeypatch))
