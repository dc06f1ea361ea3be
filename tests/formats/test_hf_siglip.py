"""transformers' SiglipModel loads and computes the same: both towers, each alone, and SigLIP for many languages."""

from __future__ import annotations

import pytest
from broken import Case, rule_tests
from checks import SIZES, assert_equals_a_conversion_by_hand, assert_parity, sizes_of
from peers import by_hand, hf, openclip
from peers.common import SQUARE, images, same_bits, tokens

import keymap

pytestmark = pytest.mark.formats("hf_siglip")

sizes = sizes_of(SIZES)


@pytest.mark.parametrize("written_by", [4, 5])
def test_hf_siglip_loads(written_by, sizes, file, proves):
    peer = hf.siglip(**sizes)
    model = openclip.siglip(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer, written_by)))
    assert result.report.plan.format == "hf_siglip"
    image, text = images(), tokens(eos=None)
    assert_parity(model, image, hf.image_features(peer, image), text, hf.text_features(peer, text))
    assert model.logit_scale.shape == () == model.logit_bias.shape
    assert float(model.logit_bias) == float(peer.logit_bias)
    proves("parity", result.report.plan)


def test_hf_siglip_i18n_loads_into_a_model_without_text_projection(sizes, file, proves):
    peer = hf.siglip(eye_head=True, **sizes)
    model = openclip.siglip(projection=False, seed=5, **sizes)
    keys = hf.disk_keys(peer)
    result = keymap.load_checkpoint(model, file(keys))
    assert {"text_model.head.weight", "text_model.head.bias"} <= set(result.report.plan.dropped)
    image, text = images(), tokens(eos=None)
    assert_parity(model, image, hf.image_features(peer, image), text, hf.text_features(peer, text))
    proves("parity", result.report.plan)
    expected, state = by_hand.hf_siglip(keys, head=False), model.state_dict()
    assert set(expected) == set(state) and all(same_bits(v.contiguous(), state[k]) for k, v in expected.items())
    proves("bit-equal", result.report.plan)


def test_a_text_head_that_differs_from_the_identity_is_refused_by_a_model_without_one(file):
    keys = hf.disk_keys(hf.siglip(eye_head=True))
    keys["text_model.head.weight"][1, 0] = 1e-3
    model = openclip.siglip(projection=False, seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(keymap.VerifyError, match=r"text_model.head.weight must hold the identity"):
        keymap.load_checkpoint(model, file(keys))
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_hf_siglip_single_towers_load(tower, written_by, file, proves):
    peer = hf.siglip(tower=tower)
    model = openclip.siglip(seed=5)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer, written_by)), towers=(tower,))
    assert set(result.report.plan.loaded) == {tower}
    image, text = images(), tokens(eos=None)
    if tower == "image":
        assert_parity(model, image, hf.image_features(peer, image))
    else:
        assert_parity(model, ids=text, peer_text=hf.text_features(peer, text))
    proves("parity", result.report.plan)


def test_every_tensor_equals_a_conversion_written_by_hand(file, proves):
    keys = hf.disk_keys(hf.siglip())
    plan = assert_equals_a_conversion_by_hand(openclip.siglip(seed=5), file(keys), keys, by_hand.hf_siglip)
    proves("bit-equal", plan)


# --- broken rules ---


def siglip() -> Case:
    peer, image, ids = hf.siglip(**SQUARE), images(), tokens(eos=None)
    outputs = [hf.image_features(peer, image), hf.text_features(peer, ids), peer.logit_scale, peer.logit_bias]
    return Case("hf_siglip", hf.disk_keys(peer), openclip.siglip(seed=5, **SQUARE), outputs, image, ids)


ROWS = r"""
hf_siglip: the split halves exchanged: differs
- (q|kv).\1, split: [1, 2]
+ (kv|q).\1, split: [2, 1]
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
- layernorm.(weight|bias): norm.\1
- mlp.fc(1|2).(weight|bias): mlp.fc\1.\2
+ layernorm.(weight|bias): norm.\1
+ mlp.fc(1|2).(weight|bias): mlp.fc<1:turned>.\2
hf_siglip: the text head transposed: differs
- text_model.head.(weight|bias): text.text_projection.\1
+ text_model.head.weight: {to: text.text_projection.weight, view: a b -> b a}
+ text_model.head.bias: text.text_projection.bias
hf_siglip: the position embedding without its leading axis: refused
- , view: n d -> 1 n d
+
hf_siglip: the norm of the tower and that of its head exchanged: differs
- vision_model.post_layernorm.(weight|bias): visual.trunk.norm.\1
+ vision_model.head.layernorm.(weight|bias): visual.trunk.norm.\1
+ vision_model.post_layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
- attention.out_proj.(weight|bias): proj.\1
- layernorm.(weight|bias): norm.\1
+ attention.out_proj.(weight|bias): proj.\1
hf_siglip: scale and bias exchanged: differs
- logit_(scale|bias): logit_\1
+ logit_(scale|bias): logit_<1:other>
"""

LOOKUPS = "  turned: {1: 2, 2: 1}\n  other: {scale: bias, bias: scale}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"hf_siglip": siglip}, LOOKUPS)
