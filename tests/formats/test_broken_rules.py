"""The checks can fail: break one rule of a shipped mapping, and parity with the peer is lost, or the load refused.

All sizes are square where the peer allows it, so that most of these mistakes fit every shape: only the values, and
so only a comparison with the peer, can tell them. Each row says which of the two it is. A row whose edit is no
longer in the file fails too.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from broken import LIMIT, assert_seen, edited, names, parsed, text_of, use
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import SQUARE, images, max_diff, tokens
from safetensors.torch import save_file

import keymap

OPENAI = {**openai.VIT, "embed_dim": 48, "text_width": 48}


@cache
def setting(name):
    """The peer's state dict, the model to load, the peer's outputs, the inputs, the towers. Built once."""
    text = tokens(eos=None) if name in ("hf_siglip", "big_vision_siglip") else tokens()
    image = images(64) if name in ("timm_resnet", "timm convnext") else images()
    towers = None
    if name == "hf_clip":
        peer, model = hf.clip(**SQUARE), openclip.clip(seed=5, **SQUARE)
        state = hf.disk_keys(peer)
        out = [hf.image_features(peer, image), hf.text_features(peer, text), peer.logit_scale]
    elif name == "hf_siglip":
        peer, model = hf.siglip(**SQUARE), openclip.siglip(seed=5, **SQUARE)
        state = hf.disk_keys(peer)
        out = [hf.image_features(peer, image), hf.text_features(peer, text), peer.logit_scale, peer.logit_bias]
    elif name == "big_vision_siglip":
        flat, model = big_vision.init(**SQUARE), openclip.siglip(seed=5, **SQUARE)
        state = {key: torch.from_numpy(value) for key, value in flat.items()}
        out = [*big_vision.forward(flat, image, text), state["t"], state["b"]]
    elif name == "openai":
        peer, model = openai.vit(**OPENAI), openclip.clip(quick_gelu=True, seed=5, **OPENAI)
        state = openai.state_dict(peer)
        out = [openai.image_features(peer, image), openai.text_features(peer, text), peer.logit_scale]
    else:
        make, target, sizes = {
            "timm clip vit": (timm_towers.clip_vit, openclip.clip, SQUARE),
            "timm convnext": (timm_towers.convnext, openclip.convnext, {}),
            "timm_resnet": (timm_towers.resnet_clip, openclip.resnet, {}),
        }[name]
        peer, model, towers = make(**sizes), target(seed=5, **sizes), ("image",)
        state, out = peer.state_dict(), [peer(image).detach()]
    return state, model, out, (image, text), towers


@torch.no_grad()
def distance(name, folder, mapping=None):
    """Load the peer's file and compare; the largest difference of any output."""
    state, model, out, (image, text), towers = setting(name)
    path = folder / "peer.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    keymap.load_checkpoint(model, path, mapping=mapping, towers=towers)
    got = [model.encode_image(image)]
    if towers is None:
        got += [model.encode_text(text), model.logit_scale, getattr(model, "logit_bias", None)]
    return max(max_diff(a.reshape(b.shape), b) for a, b in zip(got, out, strict=False))


# One row: the file, what is wrong, what follows; then what is taken out (-) and what is put there instead (+).
ROWS = r"""
hf_clip: q and k swapped: differs
- self_attn.(q|k|v)_proj
+ self_attn.(k|q|v)_proj
hf_clip: k and v swapped, the order of the file: differs
- self_attn.(q|k|v)_proj
+ self_attn.(k|v|q)_proj
hf_clip: concat on the other axis: refused
- attn.in_proj_\2, concat: 0
+ attn.in_proj_\2, concat: 1
hf_clip: ln_1 and ln_2 swapped: differs
- layer_norm(1|2).(weight|bias): ln_\1.\2
+ layer_norm1.(weight|bias): ln_2.\1
+ layer_norm2.(weight|bias): ln_1.\1
hf_clip: c_fc and c_proj swapped: differs
- mlp.fc1.(weight|bias): mlp.c_fc.\1
- mlp.fc2.(weight|bias): mlp.c_proj.\1
+ mlp.fc1.(weight|bias): mlp.c_proj.\1
+ mlp.fc2.(weight|bias): mlp.c_fc.\1
hf_clip: out_proj transposed: differs
- self_attn.out_proj.(weight|bias): attn.out_proj.\1
+ self_attn.out_proj.weight: {to: attn.out_proj.weight, view: a b -> b a}
+ self_attn.out_proj.bias: attn.out_proj.bias
hf_clip: the image projection not transposed: differs
- visual.proj, view: out in -> in out,
+ visual.proj,
hf_clip: the text projection not transposed: differs
- text.text_projection, view: out in -> in out,
+ text.text_projection,
hf_clip: the two projections exchanged: differs
- visual_projection.weight: {to: visual.proj,
+ text_projection.weight: {to: visual.proj,
- text_projection.weight: {to: text.text_projection,
+ visual_projection.weight: {to: text.text_projection,
hf_clip: the norms before and after exchanged: differs
- vision_model.pre_layrnorm.(weight|bias): visual.ln_pre.\1
+ vision_model.post_layernorm.(weight|bias): visual.ln_pre.\1
- vision_model.post_layernorm.(weight|bias): visual.ln_post.\1
+ vision_model.pre_layrnorm.(weight|bias): visual.ln_post.\1
hf_clip: the convolution read as width, height: differs
- patch_embedding.weight: visual.conv1.weight
+ patch_embedding.weight: {to: visual.conv1.weight, view: o i h w -> o i w h}
hf_clip: a norm forgotten: refused
- vision_model.post_layernorm.(weight|bias): visual.ln_post.\1
+ vision_model.nothing.(weight|bias): visual.ln_post.\1
hf_siglip: the split halves exchanged: differs
- (q|kv).\1', split: [1, 2]
+ (kv|q).\1', split: [2, 1]
hf_siglip: split in the wrong proportions: refused
- split: [1, 2]
+ split: [2, 1]
hf_siglip: q and k swapped in the image tower: differs
- self_attn.(q|k|v)_proj.(weight|bias): {to: attn.qkv.\2
+ self_attn.(k|q|v)_proj.(weight|bias): {to: attn.qkv.\2
hf_siglip: q and v swapped in the text tower: differs
- self_attn.(q|k|v)_proj.(weight|bias): {to: attn.in_proj_\2
+ self_attn.(v|k|q)_proj.(weight|bias): {to: attn.in_proj_\2
hf_siglip: norm1 and norm2 swapped: differs
- layer_norm(1|2).(weight|bias): norm\1.\2
+ layer_norm(1|2).(weight|bias): norm<1:turned>.\2
hf_siglip: fc1 and fc2 of the head swapped: differs
- visual.trunk.attn_pool.mlp.fc\1.\2
+ visual.trunk.attn_pool.mlp.fc<1:turned>.\2
hf_siglip: the text head transposed: differs
- text_model.head.(weight|bias): text.text_projection.\1
+ text_model.head.weight: {to: text.text_projection.weight, view: a b -> b a}
+ text_model.head.bias: text.text_projection.bias
hf_siglip: the position embedding without its leading axis: refused
- , view: n d -> 1 n d
+
hf_siglip: the norm of the tower and that of its head exchanged: differs
- post_layernorm.(weight|bias): visual.trunk.norm.\1
+ head.layernorm.(weight|bias): visual.trunk.norm.\1
- head.layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
+ post_layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
hf_siglip: scale and bias exchanged: differs
- logit_(scale|bias): logit_\1
+ logit_(scale|bias): logit_<1:other>
big_vision_siglip: HWIO misread: differs
- h w i o -> o i h w
+ h w i o -> o i w h
big_vision_siglip: HWIO taken for OIHW: refused
- , view: h w i o -> o i h w
+
big_vision_siglip: k and v of the MAP head swapped: differs
- (key|value)/kernel: {to: kv.weight
+ (value|key)/kernel: {to: kv.weight
big_vision_siglip: biases of k and v of the MAP head swapped: differs
- (key|value)/bias: {to: kv.bias
+ (value|key)/bias: {to: kv.bias
big_vision_siglip: q and k swapped in the image tower: differs
- (query|key|value)/kernel: {to: attn.qkv.weight
+ (key|query|value)/kernel: {to: attn.qkv.weight
big_vision_siglip: q and k swapped in the text tower: differs
- (query|key|value)/kernel: {to: attn.in_proj_weight
+ (key|query|value)/kernel: {to: attn.in_proj_weight
big_vision_siglip: the biases in another order: differs
- (query|key|value)/bias: {to: attn.qkv.bias
+ (value|query|key)/bias: {to: attn.qkv.bias
big_vision_siglip: heads inside out: differs
- attn.qkv.weight, view: d h k -> (h k) d
+ attn.qkv.weight, view: d h k -> (k h) d
big_vision_siglip: biases inside out: differs
- attn.in_proj_bias, view: h k -> (h k)
+ attn.in_proj_bias, view: h k -> (k h)
big_vision_siglip: q not transposed: differs
- q.weight, view: d h k -> (h k) d
+ q.weight, view: d h k -> d (h k)
big_vision_siglip: out not transposed: differs
- attn.proj.weight, view: h k d -> d (h k)
+ attn.proj.weight, view: h k d -> (h k) d
big_vision_siglip: Dense not transposed: differs
- {to: mlp.<1:dense>.weight, view: i o -> o i}
+ mlp.<1:dense>.weight
big_vision_siglip: the text head not transposed: differs
- text_projection.weight, view: i o -> o i,
+ text_projection.weight,
big_vision_siglip: LayerNorm_0 and LayerNorm_1 swapped: differs
- norm<1:one>.<2:norm>
+ norm<1:turned>.<2:norm>
big_vision_siglip: LayerNorm_0 and LayerNorm_1 of the text tower swapped: differs
- ln_<1:one>.<2:norm>
+ ln_<1:turned>.<2:norm>
big_vision_siglip: c_fc and c_proj swapped: differs
- dense: {0: c_fc, 1: c_proj}
+ dense: {0: c_proj, 1: c_fc}
big_vision_siglip: the lookup shifted: refused
- one: {0: 1, 1: 2}
+ one: {0: 0, 1: 1}
big_vision_siglip: the lookup turned: differs
- one: {0: 1, 1: 2}
+ one: {0: 2, 1: 1}
big_vision_siglip: scale and bias of the norms swapped: differs
- norm: {scale: weight, bias: bias}
+ norm: {scale: bias, bias: weight}
big_vision_siglip: t and b exchanged: differs
- t: logit_scale
- b: logit_bias
+ t: logit_bias
+ b: logit_scale
openai: the text projection transposed: differs
- (positional_embedding|text_projection): \1
+ positional_embedding: positional_embedding
+ text_projection: {to: text_projection, view: a b -> b a}
openai: the image tower forgotten: refused
- visual.: {to: visual., table: vit}
+ nothing.: {to: visual., table: vit}
timm_resnet: the norms of a block shifted: differs
- conv(1_1x1|2_kxk|3_1x1).bn.: {to: visual.layer<1+1>.\2.bn<3:conv>.,
+ conv(1_1x1|2_kxk|3_1x1).bn.: {to: visual.layer<1+1>.\2.bn<3:turned>.,
timm_resnet: the convolutions of a block shifted: refused
- \2.conv<3:conv>.weight
+ \2.conv<3:turned>.weight
timm_resnet: the stages shifted: refused
- visual.layer<1+1>.\2.conv
+ visual.layer<1+2>.\2.conv
timm_resnet: q and k swapped: differs
- visual.attnpool.\1_proj.\2
+ visual.attnpool.<1:pool>_proj.\2
timm_resnet: mean and variance swapped: differs
- (weight|bias|running_mean|running_var|num_batches_tracked): \1
+ (weight|bias|running_mean|running_var|num_batches_tracked): <1:stats>
timm_resnet: the norms of the stem shifted: differs
- {to: visual.bn\1.,
+ {to: visual.bn<1:stem>.,
timm: the head transposed: refused
- head.fc.weight: visual.head.proj.weight
+ head.fc.weight: {to: visual.head.proj.weight, view: a b -> b a}
timm: the head left in the trunk: refused
- head.fc.weight: visual.head.proj.weight
+ head.fc.weight: visual.trunk.head.fc.weight
native_vit_clip_trunk: norm1 and norm2 swapped: differs
- ln_(1|2).(weight|bias): norm\1.\2
+ ln_(1|2).(weight|bias): norm<1:turned>.\2
native_vit_clip_trunk: the projection not transposed: differs
- visual.trunk.head.weight, view: in out -> out in,
+ visual.trunk.head.weight,
native_vit_clip_trunk: the norms before and after exchanged: differs
- visual.trunk.norm_pre.\1
+ visual.trunk.norm.\1
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.norm_pre.\1
native_vit_clip_trunk: fc1 and fc2 swapped: differs
- mlp.c_fc.(weight|bias): mlp.fc1.\1
- mlp.c_proj.(weight|bias): mlp.fc2.\1
+ mlp.c_fc.(weight|bias): mlp.fc2.\1
+ mlp.c_proj.(weight|bias): mlp.fc1.\1
native_vit_clip_trunk: qkv transposed: refused
- attn.in_proj_(weight|bias): attn.qkv.\1
+ attn.in_proj_weight: {to: attn.qkv.weight, view: a b -> b a}
+ attn.in_proj_bias: attn.qkv.bias
"""
LOOKUPS = {  # that the rows above use
    "hf_siglip": "  turned: {1: 2, 2: 1}\n  other: {scale: bias, bias: scale}\n",
    "big_vision_siglip": "  turned: {0: 2, 1: 1}\n",
    "timm_resnet": (
        "  turned: {1_1x1: 2, 2_kxk: 1, 3_1x1: 3}\n  pool: {q: k, k: q, v: v}\n  stem: {1: 2, 2: 1, 3: 3}\n"
        "  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean, "
        "num_batches_tracked: num_batches_tracked}\n"
    ),
    "native_vit_clip_trunk": "  turned: {1: 2, 2: 1}\n",
}
PEERS = {"timm": "timm convnext", "native_vit_clip_trunk": "timm clip vit"}  # else the peer is called as the format


def loaded(name, edits, folder, monkeypatch):
    text = edited(name, text_of(name, LOOKUPS.get(name, "")), edits)
    return distance(PEERS.get(name, name), folder, use(name, text, folder, monkeypatch))


@pytest.mark.parametrize("name", names(ROWS))
def test_the_intact_copy_passes(name, tmp_path, monkeypatch):
    assert loaded(name, [], tmp_path, monkeypatch) <= LIMIT


@pytest.mark.parametrize(("name", "follows", "edits"), parsed(ROWS))
def test_a_broken_rule_is_seen(name, follows, edits, tmp_path, monkeypatch):
    assert_seen(follows, lambda: loaded(name, edits, tmp_path, monkeypatch))
