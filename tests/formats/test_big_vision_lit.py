"""big_vision's LiT loads in every form that its files have, and computes the same; CLIPPO is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from broken import Case, rule_tests
from checks import (
    EQUAL,
    State,
    assert_bits,
    assert_goes_to_the_hub_and_back,
    assert_parity,
    assert_resized,
    pictures,
    refused,
    resized,
    sizes_of,
)
from peers import big_vision, by_hand, lit, openclip
from peers.common import images, same_bits, tokens

import keymap

pytestmark = pytest.mark.formats("big_vision_lit")

sizes = sizes_of({"distinct": {}, "square": EQUAL, "a table of 4x4": {"image_size": 56}})

FORMS = {
    "plain": lambda flat: flat,
    "params/": big_vision.with_prefix,
    "scanned": big_vision.scan,
    "scanned image tower, params/": lambda flat: big_vision.with_prefix(big_vision.scan(flat, ("img",))),
    "bfloat16 as void": big_vision.to_bfloat16_void,
    "scanned, params/, bfloat16": lambda f: big_vision.to_bfloat16_void(big_vision.with_prefix(big_vision.scan(f))),
}


def lit_by_hand(flat: big_vision.Flat, zero_row: bool) -> State:
    """LiT -> timm's ViT with class token; zero_row: the model's positions have a row for the class token."""
    table = torch.from_numpy(flat["img/pos_embedding"])
    pool = big_vision.init()  # big_vision's own conversion wants a MAP head, a text head and a bias, whatever they hold
    rest = {k: v for k, v in pool.items() if k.startswith(("img/MAPHead_0/", "txt/head/")) or k == "b"}
    found = by_hand.big_vision(rest | flat)
    found = {k: v for k, v in found.items() if ".attn_pool." not in k and k != "logit_bias"}
    if "img/head/kernel" in flat:
        found["visual.trunk.head.weight"] = torch.from_numpy(flat["img/head/kernel"]).T
        found["visual.trunk.head.bias"] = torch.from_numpy(flat["img/head/bias"])
    rows = [torch.zeros_like(table[:, :1]), table] if zero_row else [table]
    return found | {
        "visual.trunk.cls_token": torch.from_numpy(flat["img/cls"]),
        "visual.trunk.pos_embed": torch.cat(rows, 1),
    }


@pytest.mark.parametrize("no_embed_class", [False, True], ids=["a row for the class", "none"])
@pytest.mark.parametrize("head", [True, False], ids=["img/head", "no head"])
@pytest.mark.parametrize("form", FORMS)
def test_lit_loads_with_big_visions_own_text_tower(form, head, no_embed_class, sizes, npz, proves):
    flat = FORMS[form](lit.init(head=head, **sizes))
    model = lit.model(head=head, no_embed_class=no_embed_class, seed=5, **sizes)
    result = keymap.load_checkpoint(model, npz(flat, compressed=head))
    assert result == {} and result.missing_keys == []
    assert result.report.plan.format == "big_vision_lit"
    image, ids = pictures(sizes), tokens(eos=None)
    want = lit.forward(flat, image, ids)
    assert_parity(model, image, want[0], ids, want[1])
    assert_bits(model, lit_by_hand(big_vision.plain(flat), zero_row=not no_embed_class))
    if not no_embed_class:
        assert not model.visual.trunk.pos_embed[0, 0].any()
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("form", ["plain", "params/", "scanned"])
@pytest.mark.parametrize("head", [True, False])
def test_lit_of_the_older_code_has_a_position_for_its_class_token(head, form, sizes, npz):
    flat = FORMS[form](lit.init(head=head, old=True, **sizes))
    model = lit.model(head=head, seed=5, **sizes)
    keymap.load_checkpoint(model, npz(flat))
    image, ids = pictures(sizes), tokens(eos=None)
    want = lit.forward(flat, image, ids)
    assert_parity(model, image, want[0], ids, want[1])
    assert model.visual.trunk.pos_embed[0, 0].any()
    refused(lit.model(head=head, no_embed_class=True, **sizes), npz(flat), "1 rows before its grid", "the model has 0")


def test_lit_of_the_code_between_keeps_positions_in_the_encoder(npz):
    flat = lit.init()
    flat["img/Transformer/pos_embedding"] = flat.pop("img/pos_embedding")
    model = lit.model(seed=5)
    keymap.load_checkpoint(model, npz(flat))
    flat["img/pos_embedding"] = flat.pop("img/Transformer/pos_embedding")
    assert_bits(model, lit_by_hand(flat, zero_row=True))


def test_lit_may_have_a_bias_and_a_model_that_has_one_gets_zero_where_the_file_has_none(npz):
    model = lit.model(seed=5, logit_bias=True)
    result = keymap.load_checkpoint(model, npz(lit.init()))
    assert "logit_bias" in result.report.plan.filled and model.logit_bias.item() == 0
    keymap.load_checkpoint(model, npz(lit.init() | {"b": np.array([-7.5], np.float32)}))
    assert model.logit_bias.item() == -7.5


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_lit_with_bert_is_refused_by_name_and_its_image_tower_loads(prefix, npz):
    flat = lit.init(text="bert")
    path = npz(big_vision.with_prefix(flat, prefix))
    model = lit.model(seed=5)
    refused(model, path, "txt/BertEncoder_0/", "BERT", "load with towers=('image',)")
    refused(model, path, "BERT", towers=("text",))
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("visual.")}
    result = keymap.load_checkpoint(model, path, towers=("image",))
    assert set(result.report.plan.loaded) == {"image"}
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])
    assert all(same_bits(v, model.state_dict()[k]) for k, v in before.items())


def test_lit_with_a_text_tower_of_unknown_names_is_refused_with_these_names_and_its_image_tower_loads(npz):
    flat = lit.init(text="none") | {"txt/Stranger_0/kernel": np.ones((3, 5), np.float32)}
    model = lit.model(seed=5)
    refused(model, npz(flat), "txt/Stranger_0/kernel")
    keymap.load_checkpoint(model, npz(flat), towers=("image",))
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])


def test_the_image_half_of_lit_alone_loads(npz):
    flat = lit.init(text="none")
    model = lit.model(seed=5)
    keymap.load_checkpoint(model, npz(flat), towers=("image",))
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])
    refused(model, npz(flat), "the file has no text tower: load with towers=('image',)")


def test_lit_is_refused_where_head_or_architecture_differ(npz):
    refused(lit.model(head=True, image_width=48, embed_dim=48), npz(lit.init(head=False)), "visual.trunk.head.weight")
    refused(lit.model(head=False), npz(lit.init(head=True, embed_dim=48)), "img/head/kernel")
    for target in (openclip.clip, openclip.clip_trunk):
        refused(target(seed=5), npz(lit.init()), "img/embedding/bias", towers=("image",))
    refused(openclip.siglip(seed=5), npz(lit.init()), "clip_trunk", towers=("image",))


def test_lit_positions_are_resized_and_the_row_for_the_class_token_stays(npz):
    for old in (False, True):
        flat = lit.init(image_size=56, old=old)
        model = lit.model(seed=5, image_size=42)
        result = keymap.load_checkpoint(model, npz(flat))
        table = torch.from_numpy(flat["img/Transformer/posembed_input/pos_embedding" if old else "img/pos_embedding"])
        first = table[:, :1] if old else torch.zeros(1, 1, table.shape[2])
        grid = resized(table[:, -16:].reshape(1, 4, 4, -1), (3, 3)).flatten(1, 2)
        assert_resized(result, model, "visual.trunk.pos_embed", torch.cat([first, grid], 1))


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_state_dict_goes_to_the_hub_and_back(head, sizes):
    state = {key: torch.from_numpy(value) for key, value in lit.init(head=head, **sizes).items()}
    assert_goes_to_the_hub_and_back("big_vision_lit", state)


# --- CLIPPO ---


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_clippo_is_refused_in_words(prefix, strict, npz):
    """One ViT with MAP pool and head for images and for text that is drawn as an image; no txt/ at all."""
    tower = {k: v for k, v in big_vision.init().items() if k.startswith("img/") or k == "t"}
    head = {"img/head/kernel": np.ones((48, 24), np.float32), "img/head/bias": np.ones(24, np.float32)}
    path = npz(big_vision.with_prefix({**tower, **head}, prefix))
    refused(openclip.siglip(seed=5), path, "CLIPPO", "one tower", error=keymap.DetectionError, strict=strict)
    refused(openclip.siglip(seed=5), path, "CLIPPO", error=keymap.DetectionError, towers=("image",))
    keymap.load_checkpoint(openclip.siglip(seed=5), npz(tower), towers=("image",))  # the image half of SigLIP is none


# --- broken rules ---


def square(old: bool) -> Case:
    image, ids = images(16), tokens(eos=None)
    flat = lit.init(old=old, **EQUAL)
    state = {key: torch.from_numpy(value) for key, value in flat.items()}
    outputs = [*lit.forward(flat, image, ids), state["t"]]
    return Case("big_vision_lit", state, lit.model(seed=5, **EQUAL), outputs, image, ids)


CASES = {"big_vision_lit": lambda: square(old=False), "LiT of the older code": lambda: square(old=True)}

ROWS = r"""
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
"""

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, "  swapped: {0: 2, 1: 1}\n")
