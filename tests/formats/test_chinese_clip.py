"""Chinese-CLIP loads from its owners' files and from transformers', and computes what their code computes."""

from __future__ import annotations

import warnings

import pytest
import torch
from broken import Case, rule_tests
from checks import (
    SIZES,
    assert_bits,
    assert_goes_to_the_hub_and_back,
    assert_parity,
    image_tower_in_timms_vit,
    sizes_of,
)
from peers import by_hand, hf, openclip, relatives
from peers.common import SQUARE, images, tokens

import keymap

pytestmark = pytest.mark.formats("chinese_clip", "hf_chinese_clip")

sizes = sizes_of(SIZES)

BERT = {"family": "bert", "pooler": "cls_last_hidden_state_pooler", "proj": "linear"}


def resnet_and_bert(**arguments):
    vision = {"layers": [1, 1, 2, 1], "width": 16, "patch_size": None, "image_size": 64, "head_width": 64}
    return openclip.hf_text(**BERT, vision=vision, **arguments)


def test_hf_chinese_clip_loads(sizes, file, proves):
    peer, model = relatives.hf_chinese_clip(**sizes), openclip.hf_text(**BERT, quick_gelu=True, seed=5, **sizes)
    keys = hf.disk_keys(peer)
    result = keymap.load_checkpoint(model, file(keys))
    assert result.report.plan.format == "hf_chinese_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(), tokens()
    with torch.no_grad():
        text = peer.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    assert_parity(model, image, hf.image_features(peer, image), ids, text)
    assert_bits(model, by_hand.hf_chinese_clip(keys))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_hf_chinese_clip_of_older_versions_has_buffers_and_a_pooler_that_are_left_out(file):
    keys = hf.disk_keys(relatives.hf_chinese_clip())
    more = {
        "text_model.embeddings.position_ids": torch.arange(18)[None],
        "text_model.embeddings.token_type_ids": torch.zeros(1, 18).long(),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.pooler.dense.weight": torch.ones(32, 32),
        "text_model.pooler.dense.bias": torch.ones(32),
    }
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file({**keys, **more}))
    assert set(result.report.plan.dropped) == set(more)
    assert_bits(model, by_hand.hf_chinese_clip(keys))


@pytest.mark.parametrize("written_by", [4, 5])
def test_lone_towers_of_hf_chinese_clip_have_the_keys_of_clip_and_bert(written_by, file):
    image, text = (hf.disk_keys(relatives.hf_chinese_clip(tower=tower)) for tower in ("image", "text"))
    if written_by == 4:
        image = {f"vision_model.{k}": v for k, v in image.items()}
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file(image), towers=("image",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_clip", ["visual.proj"])
    result = keymap.load_checkpoint(model, file(text, "text.safetensors"), towers=("text",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_bert", ["text.proj.weight"])
    assert set(result.unexpected_keys) == {"pooler.dense.weight", "pooler.dense.bias"}
    peer = relatives.hf_chinese_clip()
    peer.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in image.items()})
    peer.text_model.load_state_dict({k: v for k, v in text.items() if not k.startswith("pooler")})
    with torch.no_grad():
        peer.visual_projection.weight.copy_(model.visual.proj.T)
        peer.text_projection.weight.copy_(model.text.proj.weight)
        pixels, ids = images(), tokens()
        mask = (ids != 0).long()
        out = peer.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert_parity(model, pixels, hf.image_features(peer, pixels), ids, out)


def test_the_image_tower_computes_the_same_in_timms_vit(sizes, file, proves):
    peer = relatives.hf_chinese_clip(**sizes)
    plan = image_tower_in_timms_vit(peer, "hf_chinese_clip", sizes, file)
    proves("parity", plan)
    proves("bit-equal", plan, ("scale",))


@pytest.mark.parametrize("names", ["as published", "of FlashAttention", "without prefix"])
@pytest.mark.parametrize("tower", ["vit", "square vit", "resnet"])
def test_cn_clip_loads(tower, names, tmp_path, proves):
    resnet = tower == "resnet"
    size = {} if resnet else {**(SQUARE if tower == "square vit" else {}), **relatives.CN_VIT}
    peer = relatives.cn_clip(resnet=resnet, **size)
    model = resnet_and_bert(seed=5) if resnet else openclip.hf_text(**BERT, quick_gelu=True, seed=5, **size)
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    keys = relatives.cn_clip_flash(state) if "Flash" in names else state
    assert any("Wqkv" in key for key in keys) == ("Flash" in names)
    prefix = "" if names == "without prefix" else "module."
    torch.save({"epoch": 3, "state_dict": {f"{prefix}{k}": v for k, v in keys.items()}}, tmp_path / "clip_cn.pt")
    result = keymap.load_checkpoint(model, tmp_path / "clip_cn.pt")
    assert result.report.plan.format == "chinese_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(64 if resnet else 28), tokens()
    assert_parity(model, image, peer.encode_image(image), ids, peer.encode_text(ids))
    assert_bits(model, by_hand.chinese_clip(state))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_cn_clip_of_older_code_has_a_pooler_that_its_own_loader_leaves_out_too(file):
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    keys = {f"module.{k}": v for k, v in (relatives.cn_clip().state_dict() | more).items()}
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5, **relatives.CN_VIT)
    result = keymap.load_checkpoint(model, file(keys))
    assert set(result.report.plan.dropped) == set(more)


def test_cn_clip_and_transformers_hold_one_model(file):
    """The authors' file, written as transformers' and loaded as such, gives the same weights."""
    state = relatives.cn_clip().state_dict()
    hub = keymap.convert_state_dict(state, to="open_clip")
    other = keymap.convert_state_dict(hub, to="hf_chinese_clip")
    assert set(other) == set(hf.disk_keys(relatives.hf_chinese_clip()))
    one, two = (openclip.hf_text(**BERT, quick_gelu=True, seed=n, **relatives.CN_VIT) for n in (5, 6))
    keymap.load_checkpoint(one, file(state))
    keymap.load_checkpoint(two, file(other, "hf.safetensors"))
    assert_bits(one, two.state_dict())


def test_the_configuration_of_a_folder_shows_an_activation_that_differs(tmp_path):
    relatives.hf_chinese_clip().save_pretrained(tmp_path)
    with pytest.warns(keymap.ConfigurationWarning, match="quick_gelu"):
        keymap.load_checkpoint(openclip.hf_text(**BERT, seed=5), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        keymap.load_checkpoint(openclip.hf_text(**BERT, quick_gelu=True, seed=5), tmp_path)


ROUND = {
    "chinese_clip": ("chinese_clip", lambda: relatives.cn_clip().state_dict()),
    "chinese_clip, square": ("chinese_clip", lambda: relatives.cn_clip(**{**SQUARE, **relatives.CN_VIT}).state_dict()),
    "chinese_clip resnet": ("chinese_clip", lambda: relatives.cn_clip(resnet=True).state_dict()),
    "hf_chinese_clip": ("hf_chinese_clip", lambda: hf.disk_keys(relatives.hf_chinese_clip())),
    "hf_chinese_clip, square": ("hf_chinese_clip", lambda: hf.disk_keys(relatives.hf_chinese_clip(**SQUARE))),
}


@pytest.mark.parametrize("name", ROUND)
def test_a_state_dict_goes_to_the_hub_and_back(name):
    form, make = ROUND[name]
    assert_goes_to_the_hub_and_back(form, make())


# --- broken rules ---


@torch.no_grad()
def chinese_clip(resnet: bool) -> Case:
    size = {} if resnet else {**SQUARE, **relatives.CN_VIT}
    peer, image, ids = relatives.cn_clip(resnet=resnet, **size), images(64 if resnet else 28), tokens()
    outputs = [peer.encode_image(image), peer.encode_text(ids), peer.logit_scale]
    state = relatives.cn_clip_flash({k: v.clone() for k, v in peer.state_dict().items()})
    model = resnet_and_bert(seed=5) if resnet else openclip.hf_text(**BERT, quick_gelu=True, seed=5, **size)
    return Case("chinese_clip", state, model, outputs, image, ids)


@torch.no_grad()
def hf_chinese_clip() -> Case:
    peer, image, ids = relatives.hf_chinese_clip(**SQUARE), images(), tokens()
    text = peer.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    outputs = [hf.image_features(peer, image), text, peer.logit_scale]
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5, **SQUARE)
    return Case("hf_chinese_clip", hf.disk_keys(peer), model, outputs, image, ids)


CASES = {
    "chinese_clip": lambda: chinese_clip(resnet=False),
    "chinese_clip resnet": lambda: chinese_clip(resnet=True),
    "hf_chinese_clip": hf_chinese_clip,
}

ROWS = r"""
chinese_clip: the text projection not transposed: differs
- text.proj.weight, view: in out -> out in
+ text.proj.weight
chinese_clip: q and k of FlashAttention swapped in the text tower: differs
- (query|key|value).\2', split
+ (key|query|value).\2', split
chinese_clip: FlashAttention forgotten in the image tower: refused
- attn.Wqkv.(weight|bias): visual
+ attn.Wkqv.(weight|bias): visual
chinese_clip: out_proj of FlashAttention taken for another layer: refused
- attention.self.out_proj.(weight|bias): bert.encoder.layer.\1.attention.output.dense.\2
+ attention.self.out_proj.(weight|bias): bert.encoder.layer.\1.output.dense.\2
chinese_clip: the norms of a text layer exchanged: differs
- attention.output.(dense|LayerNorm).(weight|bias): attention.output.\1.\2
- intermediate.dense.(weight|bias): intermediate.dense.\1
- output.(dense|LayerNorm).(weight|bias): output.\1.\2
+ attention.output.dense.(weight|bias): attention.output.dense.\1
+ attention.output.LayerNorm.(weight|bias): output.LayerNorm.\1
+ intermediate.dense.(weight|bias): intermediate.dense.\1
+ output.dense.(weight|bias): output.dense.\1
+ output.LayerNorm.(weight|bias): attention.output.LayerNorm.\1
chinese_clip resnet: the norms of the stem shifted: differs
- bn(1|2|3).: {to: bn\1.,
+ bn(1|2|3).: {to: bn<1:stem>.,
hf_chinese_clip: the text projection transposed: differs
- text_projection.weight: text.proj.weight
+ text_projection.weight: {to: text.proj.weight, view: a b -> b a}
hf_chinese_clip: the image projection not transposed: differs
- visual.proj, view: out in -> in out
+ visual.proj
hf_chinese_clip: query and key of the text tower swapped: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.(query|key|value).(weight|bias): attention.self.<1:qkv>.\2
hf_chinese_clip: q and k of the image tower swapped: differs
- self_attn.(q|k|v)_proj
+ self_attn.(k|q|v)_proj
"""

LOOKUPS = "  stem: {1: 2, 2: 1, 3: 3}\n  qkv: {query: key, key: query, value: value}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)
