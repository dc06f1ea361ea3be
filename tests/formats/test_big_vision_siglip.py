"""big_vision's SigLIP loads from its .npz files, in every form that they have, and computes the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import Case, rule_tests
from checks import LIMIT, SIZES, assert_parity, normalised, sizes_of
from peers import big_vision, openclip
from peers.common import SQUARE, images, max_diff, tokens

import keymap

pytestmark = pytest.mark.formats("big_vision_siglip")

sizes = sizes_of(SIZES)

FORMS = {
    "plain": lambda flat: flat,
    "params/": big_vision.with_prefix,
    "scanned": big_vision.scan,
    "scanned image tower": lambda flat: big_vision.scan(flat, ("img",)),
    "scanned text tower, params/": lambda flat: big_vision.with_prefix(big_vision.scan(flat, ("txt",))),
    "bfloat16 as void": big_vision.to_bfloat16_void,
    "scanned, params/, bfloat16": lambda f: big_vision.to_bfloat16_void(big_vision.with_prefix(big_vision.scan(f))),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", [True, False])
def test_big_vision_npz_loads(form, head, compressed, sizes, tmp_path, proves):
    flat = FORMS[form](big_vision.init(head=head, **sizes))
    path = tmp_path / "siglip.npz"
    big_vision.save(flat, path, compressed)
    model = openclip.siglip(projection=head, seed=5, **sizes)
    result = keymap.load_checkpoint(model, path)
    assert result == {}
    assert result.missing_keys == []
    assert result.report.plan.format == "big_vision_siglip"
    image, text = images(), tokens(eos=None)
    peer_image, peer_text = big_vision.forward(flat, image, text)
    assert_parity(model, image, peer_image, text, peer_text)
    assert math.isclose(float(model.logit_scale), float(big_vision.plain(flat)["t"][0]), rel_tol=1e-6)
    assert math.isclose(float(model.logit_bias), float(big_vision.plain(flat)["b"][0]), rel_tol=1e-6)
    proves("parity", result.report.plan)


def test_the_file_of_the_real_big_vision_model_gives_its_recorded_outputs():
    folder = Path(__file__).parents[1] / "data" / "big_vision"
    with np.load(folder / "siglip_ref.npz") as reference:
        ref = {key: torch.from_numpy(reference[key]) for key in reference.files}
    size = {"embed_dim": 48, "image_mlp": 2.0, "text_width": 48, "text_heads": 3, "text_depth": 2, "text_mlp": 2.0}
    model = openclip.siglip(seed=5, **size)
    keymap.load_checkpoint(model, folder / "siglip.npz")
    image, text = normalised(model, ref["img"].permute(0, 3, 1, 2), ref["txt"].long())
    assert max_diff(image, ref["zimg"]) <= LIMIT
    assert max_diff(text, ref["ztxt"]) <= LIMIT


def test_a_second_text_position_embedding_is_added(tmp_path):
    """big_vision itself sums the two tables of its oldest files."""
    flat = big_vision.init()
    old = dict(flat)
    old["txt/Encoder_0/pos_embedding"] = np.full_like(flat["txt/pos_embedding"], 0.25)
    big_vision.save(old, tmp_path / "old.npz")
    flat["txt/pos_embedding"] = flat["txt/pos_embedding"] + 0.25
    model = openclip.siglip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "old.npz")
    assert "txt/Encoder_0/pos_embedding" in result.report.plan.dropped
    text = tokens(eos=None)
    assert_parity(model, ids=text, peer_text=big_vision.forward(flat, None, text)[1])


# --- broken rules ---


def siglip() -> Case:
    flat, image, ids = big_vision.init(**SQUARE), images(), tokens(eos=None)
    state = {key: torch.from_numpy(value) for key, value in flat.items()}
    outputs = [*big_vision.forward(flat, image, ids), state["t"], state["b"]]
    return Case("big_vision_siglip", state, openclip.siglip(seed=5, **SQUARE), outputs, image, ids)


ROWS = r"""
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
"""

LOOKUPS = "  turned: {0: 2, 1: 1}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"big_vision_siglip": siglip}, LOOKUPS)
