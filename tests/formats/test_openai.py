"""OpenAI's CLIP loads from its archives and its state dicts, and computes the same."""

from __future__ import annotations

import pytest
from broken import Case, rule_tests
from checks import assert_parity
from peers import openai, openclip
from peers.common import Size, images, tokens

import keymap

pytestmark = pytest.mark.formats("openai")


@pytest.mark.parametrize("save", ["archive", "state dict", "state dict without the constants"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("text", ["flat", "custom"])
def test_openai_loads(tower, save, text, tmp_path, proves):
    peer = openai.vit() if tower == "vit" else openai.resnet()
    path = tmp_path / "ViT.pt"
    if save == "archive":
        openai.save_archive(peer, path)
    else:
        openai.save_state_dict(peer, path, extras="without" not in save)
    size = {**(openai.VIT if tower == "vit" else openai.RESNET)}
    kind = {} if text == "flat" else {"kind": openclip.CustomTextCLIP}
    if tower == "vit":
        model = (openclip.clip if text == "flat" else openclip.custom)(quick_gelu=True, seed=5, **size)
    else:
        model = openclip.resnet(quick_gelu=True, seed=5, layers=openai.RESNET_LAYERS, **kind, **size)
    result = keymap.load_checkpoint(model, path)
    plan = result.report.plan
    assert plan.format == ("open_clip" if "without" in save else "openai")
    assert plan.container == ("torchscript" if save == "archive" else "torch")
    assert plan.cast["float16 to float32"] > 10
    if "without" not in save:
        assert set(plan.dropped) == set(openai.EXTRAS)
    side = Size(**size).image_size
    image, ids = images(side), tokens(Size(**size).context_length, Size(**size).vocab)
    assert_parity(model, image, openai.image_features(peer, image), ids, openai.text_features(peer, ids))
    if plan.format == "openai":
        proves("parity", plan)


# --- broken rules ---


def vit() -> Case:
    size = {**openai.VIT, "embed_dim": 48, "text_width": 48}
    peer, image, ids = openai.vit(**size), images(), tokens()
    outputs = [openai.image_features(peer, image), openai.text_features(peer, ids), peer.logit_scale]
    model = openclip.clip(quick_gelu=True, seed=5, **size)
    return Case("openai", openai.state_dict(peer), model, outputs, image, ids)


ROWS = r"""
openai: the text projection transposed: differs
- (positional_embedding|text_projection): \1
+ positional_embedding: positional_embedding
+ text_projection: {to: text_projection, view: a b -> b a}
"""

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, {"openai": vit})
