"""TinyCLIP loads and computes what its owners' code computes; a pruned model is refused."""

from __future__ import annotations

import pytest
import torch
from broken import Case, rule_tests
from checks import assert_bits, assert_goes_to_the_hub_and_back, assert_parity
from peers import by_hand, openai, openclip, relatives
from peers.common import assert_unchanged, bits, images, tokens

import keymap

pytestmark = pytest.mark.formats("tinyclip")

OPENAI_SQUARE = {"embed_dim": 128, "text_width": 128}  # OpenAI's package fixes what else could be square

TINY_VIT, TINY_RESNET = openai.VIT, relatives.TINY_RESNET


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "each tower wrapped"])
@pytest.mark.parametrize("tower", ["vit", "square vit", "resnet"])
def test_tinyclip_loads(tower, wrapped, file, proves):
    if tower == "resnet":
        peer = relatives.tinyclip(resnet=True, wrapped=wrapped)
        model = openclip.resnet(seed=5, layers=openai.RESNET_LAYERS, **TINY_RESNET)
    else:
        size = {**TINY_VIT, **(OPENAI_SQUARE if tower == "square vit" else {})}
        peer, model = relatives.tinyclip(wrapped=wrapped, **size), openclip.clip(seed=5, **size)
    result = keymap.load_checkpoint(model, file(peer.state_dict()))
    assert result.report.plan.format == "tinyclip"
    image, ids = images(64 if tower == "resnet" else 28), tokens()
    peer_image, peer_text = relatives.tinyclip_features(peer, image, ids)
    assert_parity(model, image, peer_image, ids, peer_text)
    assert_bits(model, by_hand.tinyclip(peer.state_dict()))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_tinyclip_under_its_wrapper_and_with_the_names_of_older_code(tmp_path):
    state = relatives.tinyclip().state_dict()
    old = {
        k.replace("_image_encoder", "image_encoder_without_ddp").replace("_text_encoder", "text_encoder_without_ddp"): v
        for k, v in state.items()
    }
    for number, keys in enumerate((state, old)):
        torch.save({"epoch": 7, "state_dict": {f"module.{k}": v for k, v in keys.items()}}, tmp_path / f"{number}.pt")
        model = openclip.clip(seed=5, **TINY_VIT)
        keymap.load_checkpoint(model, tmp_path / f"{number}.pt")
        assert_bits(model, by_hand.tinyclip(state))


@pytest.mark.parametrize("channels", [128, 80])
def test_a_tinyclip_that_was_pruned_block_by_block_is_refused_with_its_shapes(channels, file):
    path = file(relatives.prune(relatives.tinyclip().state_dict(), channels))
    model = openclip.clip(seed=5, **TINY_VIT)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="format tinyclip") as caught:
        keymap.load_checkpoint(model, path)
    faults = "\n".join(caught.value.faults)
    assert "blocks of different sizes, as in a pruned model" in faults
    if channels == 128:
        assert "resblocks.0.attn.in_proj_weight: shape [192, 128] in the file, [384, 128] in the model" in faults
    else:
        assert "visual.proj: shape [80, 24] in the file, [128, 24] in the model" in faults
    assert_unchanged(model, before)
    if channels < 128:  # nothing of the tower fits, so it is refused in part, too
        with pytest.raises(keymap.PlanError, match="of the image tower in the file would load"):
            keymap.load_checkpoint(model, path, strict=False)
        assert_unchanged(model, before)


@pytest.mark.parametrize("module", ["", "module."])
def test_a_tinyclip_that_is_being_pruned_is_refused_in_words(module, file):
    state = {**relatives.tinyclip().state_dict(), f"_image_encoder.{module}l0_module.hidden_loga": torch.zeros(128)}
    model = openclip.clip(seed=5, **TINY_VIT)
    before = bits(model)
    with pytest.raises(keymap.DetectionError, match="with pruning masks"):
        keymap.load_checkpoint(model, file(state))
    assert_unchanged(model, before)


ROUND = {
    "vit": lambda: relatives.tinyclip().state_dict(),
    "square vit": lambda: relatives.tinyclip(**OPENAI_SQUARE).state_dict(),
    "resnet": lambda: relatives.tinyclip(resnet=True).state_dict(),
}


@pytest.mark.parametrize("name", ROUND)
def test_a_state_dict_goes_to_the_hub_and_back(name):
    assert_goes_to_the_hub_and_back("tinyclip", ROUND[name]())


# --- broken rules ---


@torch.no_grad()
def square(resnet: bool) -> Case:
    size = TINY_RESNET if resnet else {**TINY_VIT, **OPENAI_SQUARE}
    peer, image, ids = relatives.tinyclip(resnet=resnet, wrapped=True, **size), images(64 if resnet else 28), tokens()
    outputs = [*relatives.tinyclip_features(peer, image, ids), peer.whole.logit_scale]
    layers = {"layers": openai.RESNET_LAYERS} if resnet else {}
    model = (openclip.resnet if resnet else openclip.clip)(seed=5, **layers, **size)
    return Case("tinyclip", peer.state_dict(), model, outputs, image, ids)


ROWS = r"""
tinyclip: the norms before and after exchanged: differs
- ln_(pre|post).(weight|bias): ln_\1.\2
+ ln_(pre|post).(weight|bias): ln_<1:other>.\2
tinyclip: the image projection transposed: differs
- (class_embedding|positional_embedding|proj): \1
+ (class_embedding|positional_embedding): \1
+ proj: {to: proj, view: a b -> b a}
tinyclip: the wrappers of the towers forgotten: refused
- (_image_encoder|_text_encoder|_logit_scale).module.(.+): \1.\2
+ (_image_encoder|_text_encoder|_logit_scale).wrapped.(.+): \1.\2
tinyclip: out_proj transposed: differs
- attn.out_proj.(weight|bias): attn.out_proj.\1
+ attn.out_proj.weight: {to: attn.out_proj.weight, view: a b -> b a}
+ attn.out_proj.bias: attn.out_proj.bias
tinyclip resnet: q and k of the pool swapped: differs
- attnpool.(q|k|v|c)_proj.(weight|bias): attnpool.\1_proj.\2
+ attnpool.(q|k|v|c)_proj.(weight|bias): attnpool.<1:pool>_proj.\2
tinyclip resnet: mean and variance swapped: differs
- (weight|bias|running_mean|running_var): \1
+ (weight|bias|running_mean|running_var): <1:stats>
"""

LOOKUPS = """\
  other: {pre: post, post: pre}
  pool: {q: k, k: q, v: v, c: c}
  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean}
"""

CASES = {"tinyclip": lambda: square(resnet=False), "tinyclip resnet": lambda: square(resnet=True)}

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)
