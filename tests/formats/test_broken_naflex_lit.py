"""Rules of NaFlex and LiT, and of the respellings to NaFlexVit, broken one at a time: refused, or the outputs differ.

As test_broken_rules.py; here a patch has as many values as the tower is wide, so that the kernel is square, too.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from broken import LIMIT, assert_seen, edited, names, parsed, text_of, use
from peers import hf, lit, naflex, openclip
from peers.common import SQUARE, images, max_diff, tokens
from safetensors.torch import save_file

import keymap

EQUAL = {**SQUARE, "patch": 4, "image_size": 16}


@cache
def setting(name):
    """The peer's state dict, the model to load, and the peer's outputs for these inputs."""
    image, text = images(16), tokens(eos=None)
    if name == "big_vision_naflex":
        flat = naflex.init(**EQUAL)
        out = [*naflex.forward(flat, image, text), torch.from_numpy(flat["t"]), torch.from_numpy(flat["b"])]
        return {k: torch.from_numpy(v) for k, v in flat.items()}, naflex.model(seed=5, **EQUAL), out, image, text
    if name in ("big_vision_lit", "LiT of the older code"):
        flat = lit.init(old=name != "big_vision_lit", **EQUAL)
        out = [*lit.forward(flat, image, text), torch.from_numpy(flat["t"])]
        return {k: torch.from_numpy(v) for k, v in flat.items()}, lit.model(seed=5, **EQUAL), out, image, text
    if name == "native_vit_naflex_token":
        peer, text = hf.clip(**EQUAL), tokens()
        out = [hf.image_features(peer, image), hf.text_features(peer, text), peer.logit_scale.detach()]
        return hf.disk_keys(peer), naflex.token_model(seed=5, **EQUAL), out, image, text
    if name == "map_trunk_naflex":
        peer = hf.siglip(**EQUAL)
        state, pictures = hf.disk_keys(peer), hf.image_features(peer, image)
    else:
        peer = naflex.siglip2(**EQUAL)
        state, pictures = naflex.siglip2_keys(peer), naflex.image_features(peer, naflex.naflex_batch(list(image), 4))
    target = openclip.siglip if name == "map_trunk_naflex, the other way" else naflex.model
    out = [pictures, hf.text_features(peer, text), peer.logit_scale.detach(), peer.logit_bias.detach()]
    return state, target(seed=5, **EQUAL), out, image, text


@torch.no_grad()
def distance(name, folder, mapping):
    """Load the peer's file and compare; the largest difference of any output."""
    state, model, out, image, text = setting(name)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "peer.safetensors")
    keymap.load_checkpoint(model, folder / "peer.safetensors", mapping=mapping)
    got = [model.encode_image(image), model.encode_text(text), model.logit_scale, getattr(model, "logit_bias", None)]
    return max(max_diff(a.reshape(b.shape), b) for a, b in zip(got, out, strict=False))


# One row: the file, what is wrong, what follows; then what is taken out (-) and what is put there instead (+).
ROWS = r"""
hf_siglip2_naflex: the kernel transposed: differs
- vision_model.embeddings.patch_embedding.(weight|bias): visual.trunk.embeds.proj.\1
+ vision_model.embeddings.patch_embedding.weight: {to: visual.trunk.embeds.proj.weight, view: a b -> b a}
+ vision_model.embeddings.patch_embedding.bias: visual.trunk.embeds.proj.bias
hf_siglip2_naflex: the kernel read channels first: differs
- vision_model.embeddings.patch_embedding.(weight|bias): visual.trunk.embeds.proj.\1
+ vision_model.embeddings.patch_embedding.weight:
+   {to: visual.trunk.embeds.proj.weight, view: o (c p) -> o (p c), sizes: {c: 3}}
+ vision_model.embeddings.patch_embedding.bias: visual.trunk.embeds.proj.bias
hf_siglip2_naflex: rows and columns of the table exchanged: differs
- view: (h w) d -> 1 h w d
+ view: (h w) d -> 1 w h d
hf_siglip2_naflex: the table left flat: refused
- {to: visual.trunk.embeds.pos_embed, view: (h w) d -> 1 h w d, sizes: {h: w}}
+ visual.trunk.embeds.pos_embed
hf_siglip2_naflex: q taken from the end of the pool's projection: differs
- (q|kv).\1', split: [1, 2]}
+ (kv|q).\1', split: [2, 1]}
hf_siglip2_naflex: the layers of the pool's MLP swapped: differs
- visual.trunk.attn_pool.mlp.fc\1.\2
+ visual.trunk.attn_pool.mlp.fc<1:other>.\2
hf_siglip2_naflex: the norms of the tower and of its pool exchanged: differs
- vision_model.post_layernorm.(weight|bias): visual.trunk.norm.\1
+ vision_model.head.layernorm.(weight|bias): visual.trunk.norm.\1
- vision_model.head.layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
+ vision_model.post_layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
hf_siglip2_naflex: the output of the pool transposed: differs
- vision_model.head.attention.out_proj.(weight|bias): visual.trunk.attn_pool.proj.\1
+ vision_model.head.attention.out_proj.weight: {to: visual.trunk.attn_pool.proj.weight, view: a b -> b a}
+ vision_model.head.attention.out_proj.bias: visual.trunk.attn_pool.proj.bias
hf_siglip2_naflex: q and k swapped: differs
- self_attn.(q|k|v)_proj.(weight|bias): {to: attn.qkv.\2
+ self_attn.(k|q|v)_proj.(weight|bias): {to: attn.qkv.\2
hf_siglip2_naflex: the text head transposed: differs
- text_model.head.(weight|bias): text.text_projection.\1
+ text_model.head.weight: {to: text.text_projection.weight, view: a b -> b a}
+ text_model.head.bias: text.text_projection.bias
hf_siglip2_naflex: scale and bias exchanged: differs
- logit_(scale|bias): logit_\1
+ logit_(scale|bias): logit_<1:turned>
big_vision_naflex: the kernel not transposed: differs
- {to: visual.trunk.embeds.proj.weight, view: i o -> o i}
+ visual.trunk.embeds.proj.weight
big_vision_naflex: rows and columns of the table exchanged: differs
- view: h w d -> 1 h w d
+ view: h w d -> 1 w h d
big_vision_naflex: the table without its leading axis: refused
- {to: visual.trunk.embeds.pos_embed, view: h w d -> 1 h w d}
+ visual.trunk.embeds.pos_embed
big_vision_naflex: k and v of the MAP head swapped: differs
- (key|value)/kernel: {to: kv.weight
+ (value|key)/kernel: {to: kv.weight
big_vision_naflex: heads inside out: differs
- attn.qkv.weight, view: d h k -> (h k) d
+ attn.qkv.weight, view: d h k -> (k h) d
big_vision_naflex: t and b exchanged: differs
- t: logit_scale
- b: logit_bias
+ t: logit_bias
+ b: logit_scale
big_vision_lit: HWIO misread: differs
- h w i o -> o i h w
+ h w i o -> o i w h
big_vision_lit: the image head not transposed: differs
- visual.trunk.head.weight, view: i o -> o i,
+ visual.trunk.head.weight,
big_vision_lit: the class token forgotten: refused
- img/cls: visual.trunk.cls_token
+ img/nothing: visual.trunk.cls_token
big_vision_lit: the image head forgotten: refused
- img/head/bias: {to: visual.trunk.head.bias, optional: true}
+ img/nothing: {to: visual.trunk.head.bias, optional: true}
big_vision_lit: scale and bias of the norms swapped: differs
- norm: {scale: weight, bias: bias}
+ norm: {scale: bias, bias: weight}
big_vision_lit: the text tower's first norm and second swapped: differs
- LayerNorm_(0|1)/(scale|bias): ln_<1:one>.<2:norm>
+ LayerNorm_(0|1)/(scale|bias): ln_<1:swapped>.<2:norm>
LiT of the older code: the old place of positions forgotten: refused
- img/Transformer/posembed_input/pos_embedding: img/pos_embedding
+ img/Transformer/nothing/pos_embedding: img/pos_embedding
map_trunk_naflex: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
map_trunk_naflex: the kernel read as width, height: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (pw ph c)
map_trunk_naflex: rows and columns of the table exchanged: differs
- view: 1 (h w) d -> 1 h w d
+ view: 1 (w h) d -> 1 h w d
map_trunk_naflex: the kernel's channels told wrongly: refused
- sizes: {c: 3, ph: pw}
+ sizes: {c: 4, ph: pw}
map_trunk_naflex, the other way: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
map_trunk_naflex, the other way: rows and columns of the table exchanged: differs
- view: 1 (h w) d -> 1 h w d
+ view: 1 (w h) d -> 1 h w d
map_trunk_naflex, the other way: the patch not told to be square: refused
- sizes: {c: 3, ph: pw}
+ sizes: {c: 3}
native_vit_naflex_token: the position of the class token forgotten: differs
- {to: visual.trunk.embeds.cls_token, view: d -> 1 1 d, add: 'visual.positional_embedding[0]', oneway: true}
+ {to: visual.trunk.embeds.cls_token, view: d -> 1 1 d}
native_vit_naflex_token: the position of the first patch added: differs
- add: 'visual.positional_embedding[0]'
+ add: 'visual.positional_embedding[1]'
native_vit_naflex_token: the last position left out instead of the first: differs
- take: [1, null]
+ take: [0, 16]
native_vit_naflex_token: all positions taken: refused
- take: [1, null]
+ take: [0, null]
native_vit_naflex_token: rows and columns of the table exchanged: differs
- view: (h w) d -> 1 h w d
+ view: (w h) d -> 1 h w d
native_vit_naflex_token: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
native_vit_naflex_token: the projection not transposed: differs
- visual.head.proj.weight, view: in out -> out in,
+ visual.head.proj.weight,
native_vit_naflex_token: the norms before and after exchanged: differs
- visual.ln_pre.(weight|bias): {to: visual.trunk.norm_pre.\1, optional: true}
+ visual.ln_pre.(weight|bias): {to: visual.trunk.norm.\1, optional: true}
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.norm_pre.\1
native_vit_naflex_token: fc1 and fc2 swapped: differs
- mlp.c_fc.(weight|bias): mlp.fc1.\1
- mlp.c_proj.(weight|bias): mlp.fc2.\1
+ mlp.c_fc.(weight|bias): mlp.fc2.\1
+ mlp.c_proj.(weight|bias): mlp.fc1.\1
"""
LOOKUPS = "  other: {1: 2, 2: 1}\n  swapped: {0: 2, 1: 1}\n  turned: {scale: bias, bias: scale}\n"
FILES = {  # by the name of a row, where it is not the file's own
    "LiT of the older code": "big_vision_lit",
    "map_trunk_naflex, the other way": "map_trunk_naflex",
}


def loaded(name, edits, folder, monkeypatch):
    form = FILES.get(name, name)
    text = edited(form, text_of(form, LOOKUPS), edits)
    return distance(name, folder, use(form, text, folder, monkeypatch))


@pytest.mark.parametrize("name", names(ROWS))
def test_the_intact_copy_passes(name, tmp_path, monkeypatch):
    assert loaded(name, [], tmp_path, monkeypatch) <= LIMIT


@pytest.mark.parametrize(("name", "follows", "edits"), parsed(ROWS))
def test_a_broken_rule_is_seen(name, follows, edits, tmp_path, monkeypatch):
    assert_seen(follows, lambda: loaded(name, edits, tmp_path, monkeypatch))
