"""transformers' CLIPModel and its relatives of the same keys (MetaClip 2) load and compute the same."""

from __future__ import annotations

import pytest
from broken import Case, rule_tests
from checks import SIZES, assert_equals_a_conversion_by_hand, assert_parity, sizes_of
from peers import by_hand, hf, openclip
from peers.common import SQUARE, images, same_bits, tokens

import keymap

pytestmark = pytest.mark.formats("hf_clip")

sizes = sizes_of(SIZES)

TARGETS = {"flat": openclip.clip, "custom": openclip.custom, "timm trunk": openclip.clip_trunk}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("kind", ["clip", "clip written by 4 with position_ids", "metaclip2"])
def test_hf_clip_loads_into_every_layout(target, quick_gelu, kind, sizes, file, proves):
    peer = (hf.metaclip2 if kind == "metaclip2" else hf.clip)(quick_gelu=quick_gelu, **sizes)
    keys = hf.disk_keys(peer, 4, position_ids=True) if "position_ids" in kind else hf.disk_keys(peer)
    text_cfg = {"pool_type": "eos", "eos_id": 2} if kind == "metaclip2" else {}
    model = TARGETS[target](quick_gelu=quick_gelu, seed=5, text=text_cfg, **sizes)
    result = keymap.load_checkpoint(model, file(keys))
    assert result.report.plan.format == "hf_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image = images()
    text = tokens(eos=2) if kind == "metaclip2" else tokens()
    assert_parity(model, image, hf.image_features(peer, image), text, hf.text_features(peer, text))
    assert ("visual.trunk.head.bias" in result.report.plan.filled) == (target == "timm trunk")
    proves("parity", result.report.plan)


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("tower", ["image", "image_proj", "text", "text_proj"])
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_hf_clip_single_towers_load_into_their_tower_only(tower, written_by, target, sizes, file, proves):
    peer = hf.clip(tower=tower, **sizes)
    model = TARGETS[target](seed=5, **sizes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = file(hf.disk_keys(peer, written_by))
    name = tower.removesuffix("_proj")
    if tower.endswith("_proj"):
        result = keymap.load_checkpoint(model, path, towers=(name,))
    else:  # the file has no projection: strict refuses, and says so
        with pytest.raises(keymap.PlanError, match="proj"):
            keymap.load_checkpoint(model, path, towers=(name,))
        result = keymap.load_checkpoint(model, path, strict=False)
        assert any("proj" in key for key in result.missing_keys)
    image, text = images(), tokens()
    if name == "image":
        projection = None if tower.endswith("_proj") else model.visual.proj
        assert_parity(model, image, hf.image_features(peer, image, projection))
    else:
        own = model.text_projection if target == "flat" else model.text.text_projection
        projection = None if tower.endswith("_proj") else own
        assert_parity(model, ids=text, peer_text=hf.text_features(peer, text, projection))
    visual = [k for k in before if k.startswith("visual.")]
    others = [k for k in before if (k in visual) != (name == "image")]
    assert all(same_bits(before[k], model.state_dict()[k]) for k in others)
    proves("parity", result.report.plan)


PAIRS = {"flat": (openclip.clip, ""), "custom": (openclip.custom, "text.")}


@pytest.mark.parametrize("target", PAIRS)
def test_every_tensor_equals_a_conversion_written_by_hand(target, file, proves):
    make, prefix = PAIRS[target]
    keys = hf.disk_keys(hf.clip())

    def convert(state):
        return by_hand.hf_clip(state, prefix)

    plan = assert_equals_a_conversion_by_hand(make(seed=5), file(keys), keys, convert)
    proves("bit-equal", plan)


# --- broken rules ---


def clip() -> Case:
    peer, image, ids = hf.clip(**SQUARE), images(), tokens()
    outputs = [hf.image_features(peer, image), hf.text_features(peer, ids), peer.logit_scale]
    return Case("hf_clip", hf.disk_keys(peer), openclip.clip(seed=5, **SQUARE), outputs, image, ids)


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
- pre_layrnorm.(weight|bias): ln_pre.\1
+ pre_layrnorm.(weight|bias): ln_post.\1
- post_layernorm.(weight|bias): ln_post.\1
+ post_layernorm.(weight|bias): ln_pre.\1
hf_clip: the convolution read as width, height: differs
- patch_embedding.weight: conv1.weight
+ patch_embedding.weight: {to: conv1.weight, view: o i h w -> o i w h}
hf_clip: a norm forgotten: refused
- post_layernorm.(weight|bias): ln_post.\1
+ nothing.(weight|bias): ln_post.\1
"""

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"hf_clip": clip})
