"""The caller's facts: an unknown name, and a value that contradicts the model or the file, are refused."""

from __future__ import annotations

import json
import re

import pytest
from peers import big_vision, hf, hf_text, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap


def saved(peer, folder, **fields):
    peer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def refused(model, path, facts, **options):
    """The text of the refusal, the same from the load and its dry run; the model keeps its values."""
    before = bits(model)
    texts = []
    for call in (keymap.load_checkpoint, keymap.plan_load):
        with pytest.raises(keymap.PlanError) as caught:
            call(model, path, facts=facts, **options)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert_unchanged(model, before)
    return texts[0]


MODELS = {  # a model, a wrong fact, and what the model has
    "clip": (openclip.clip, {"image.heads": 7}, "3 (visual.transformer.resblocks.0.attn.num_heads)"),
    "text": (openclip.custom, {"text.heads": 3}, "4 (text.transformer.resblocks.0.attn.num_heads)"),
    "timm": (openclip.clip_trunk, {"image.heads": 6}, "3 (visual.trunk.blocks.0.attn.num_heads)"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fact_that_contradicts_the_model_is_refused(name, tmp_path):
    kind, facts, value = MODELS[name]
    save_file(hf.disk_keys(hf.clip()), tmp_path / "model.safetensors")
    text = refused(kind(), tmp_path, facts)
    assert f"facts={facts}: the model has {value}" in text
    keymap.load_checkpoint(kind(), tmp_path, facts={next(iter(facts)): int(value.split()[0])})


def test_a_resnets_head_width(tmp_path):
    model = openclip.resnet()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "x.safetensors")
    text = refused(model, tmp_path / "x.safetensors", {"image.head_width": 32})
    assert "the model has 64 (visual.attnpool.k_proj.in_features)" in text


def test_a_fact_that_contradicts_the_file_is_refused(tmp_path):
    saved(hf.clip(image_heads=6), tmp_path)
    text = refused(openclip.clip(), tmp_path, {"image.heads": 3})  # the model's
    assert "facts={'image.heads': 3}: the file has 6 (config.json: vision_config.num_attention_heads = 6)" in text
    text = refused(openclip.clip(), tmp_path, {"image.heads": 4})  # nobody's
    assert "the model has 3" in text and "the file has 6" in text


def test_a_fact_of_a_hf_text_tower(tmp_path):
    peer = hf_text.model("XLMRobertaModel")
    peer.save_pretrained(tmp_path)
    options = {"towers": ("text",), "strict": False}
    text = refused(openclip.hf_text(family="xlm-roberta"), tmp_path, {"text.hf_heads": 2}, **options)
    assert "the model has 4 (text.config.num_attention_heads)" in text
    assert "the file has 4 (config.json: num_attention_heads = 4)" in text


UNKNOWN = {
    "image.hedas": "there is no such fact; did you mean image.heads?",
    "heads": "there is no such fact",
    "text.head": "did you mean text.heads?",
    "image.grid": "pass the grid as source_grid=(h, w)",
    "x" * 100_000: "there is no such fact; the facts are ",
}


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:20])
def test_an_unknown_name_is_refused(name, tmp_path):
    save_file(hf.disk_keys(hf.clip()), tmp_path / "model.safetensors")
    assert UNKNOWN[name] in refused(openclip.clip(), tmp_path, {name: 12})
    with pytest.raises(keymap.PlanError, match=re.escape(UNKNOWN[name])):
        keymap.convert_state_dict(openclip.siglip().state_dict(), "big_vision_siglip", facts={name: 3, "text.heads": 4})


def test_all_unknown_names_are_listed(tmp_path):
    save_file(hf.disk_keys(hf.clip()), tmp_path / "model.safetensors")
    text = refused(openclip.clip(), tmp_path, {"image.head": 3, "text.heads": 4, "txt.heads": 4})
    assert "'image.head'" in text and "'txt.heads'" in text and "{'text.heads'" not in text


def test_a_fact_that_contradicts_the_shapes_of_a_file_is_refused(tmp_path):
    big_vision.save(big_vision.init(), tmp_path / "x.npz")
    flat = dict(
        keymap.convert_state_dict(
            openclip.siglip().state_dict(), "big_vision_siglip", facts={"image.heads": 3, "text.heads": 4}
        )
    )
    with pytest.raises(keymap.PlanError, match="h is 3, declared 4"):
        keymap.convert_state_dict(flat, "open_clip", facts={"image.heads": 4, "text.heads": 4})
    keymap.convert_state_dict(flat, "open_clip", facts={"image.heads": 3})
    refused(openclip.siglip(), tmp_path / "x.npz", {"image.heads": 4})


MAPPING = """format: mine
title: a format with a fact that only it knows
reference: none
layouts: {image: native_vit}
detect: {all: [w]}
towers: {image: {w: {to: visual.class_embedding, view: (a b) -> (b a), sizes: {a: image.channels}}}}
"""


def test_a_fact_of_a_mapping_of_the_callers_is_known(tmp_path):
    (tmp_path / "mine.yaml").write_text(MAPPING)
    value = openclip.clip().visual.class_embedding.detach()
    options = {"mapping": tmp_path / "mine.yaml"}
    made = keymap.convert_state_dict({"w": value}, "open_clip", facts={"image.channels": 4}, **options)
    assert made["visual.class_embedding"].shape == value.shape
    with pytest.raises(keymap.PlanError, match=r"did you mean image\.channels"):
        keymap.convert_state_dict({"w": value}, "open_clip", facts={"image.chanels": 4}, **options)
