"""AltCLIP's image tower and scale load; its text tower, which no OpenCLIP model has, is refused."""

from __future__ import annotations

import pytest
import torch
from broken import Case, rule_tests
from checks import LIMIT, SIZES, assert_goes_to_the_hub_and_back, image_tower_in_timms_vit, sizes_of
from peers import by_hand, hf, openclip, relatives
from peers.common import SQUARE, assert_unchanged, bits, images, max_diff, same_bits

import keymap

pytestmark = pytest.mark.formats("hf_altclip")

sizes = sizes_of(SIZES)


@pytest.mark.parametrize("form", relatives.ALTCLIP_FORMS)
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_the_image_half_of_altclip_loads_and_its_text_half_is_refused_in_words(target, form, sizes, file, proves):
    peer = relatives.hf_altclip(**sizes)
    keys = relatives.altclip_keys(peer, form)
    path = file(keys)
    model = {"flat": openclip.clip, "custom": openclip.custom}[target](quick_gelu=True, seed=5, **sizes)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"format hf_altclip(.|\n)*no OpenCLIP model has AltCLIP's text tower"):
        keymap.load_checkpoint(model, path)
    for request in ({"towers": ("text",)}, {"strict": False}):
        with pytest.raises(keymap.PlanError, match="AltCLIP's text tower"):
            keymap.load_checkpoint(model, path, **request)
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, towers=("image", "scale"))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), hf.image_features(peer, images())) <= LIMIT
    expected = by_hand.hf_altclip(keys)
    state = model.state_dict()
    assert [k for k, v in expected.items() if not same_bits(v.contiguous(), state[k])] == []
    assert [k for k in state if k not in expected and not same_bits(before[k], state[k])] == []
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_lone_towers_of_altclip(file):
    peer = relatives.hf_altclip(tower="image")
    model = openclip.clip(quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)), towers=("image",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_clip", ["visual.proj"])
    before = bits(model)
    path = file(hf.disk_keys(relatives.hf_altclip(tower="text")), "text.safetensors")
    for strict in (True, False):
        with pytest.raises(keymap.PlanError, match="AltCLIP's text tower"):
            keymap.load_checkpoint(model, path, strict=strict)
    assert_unchanged(model, before)


def test_the_image_tower_computes_the_same_in_timms_vit(sizes, file, proves):
    peer = relatives.hf_altclip(**sizes)
    plan = image_tower_in_timms_vit(peer, "hf_altclip", sizes, file)
    proves("parity", plan)
    proves("bit-equal", plan, ("scale",))


def test_the_image_tower_goes_to_the_hub_and_back():
    state = relatives.hf_altclip().state_dict()
    assert_goes_to_the_hub_and_back("hf_altclip", {k: v for k, v in state.items() if not k.startswith("text_")})


# --- broken rules ---


def altclip() -> Case:
    peer, image = relatives.hf_altclip(**SQUARE), images()
    outputs = [hf.image_features(peer, image), None, peer.logit_scale]
    model = openclip.clip(quick_gelu=True, seed=5, **SQUARE)
    return Case("hf_altclip", hf.disk_keys(peer), model, outputs, image, towers=("image", "scale"))


ROWS = r"""
hf_altclip: the image projection not transposed: differs
- visual.proj, view: out in -> in out
+ visual.proj
hf_altclip: the norms before and after exchanged: differs
- pre_layrnorm.(weight|bias): ln_pre.\1
+ post_layernorm.(weight|bias): ln_pre.\1
- post_layernorm.(weight|bias): ln_post.\1
+ pre_layrnorm.(weight|bias): ln_post.\1
hf_altclip: what transformers 5 calls a layer forgotten: refused
- vision_model.encoder.layer.(\d+).(.+): vision_model.encoder.layers.\1.\2
+ vision_model.encoder.leyer.(\d+).(.+): vision_model.encoder.layers.\1.\2
"""

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"hf_altclip": altclip})
