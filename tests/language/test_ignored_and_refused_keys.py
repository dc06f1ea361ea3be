"""Keys that a mapping ignores, keys without a place in any model, files that a mapping refuses: with their reasons."""

from __future__ import annotations

import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap

HF_CLIP_LIKE = """
format: worded
title: transformers CLIP with two words more
reference: this test
uses: [hf_blocks]
layouts: {image: native_vit, text: native}
detect: {all: [marker]}
ignore:
  marker: names the format
  vision_model.copy_of_class: {why: a copy, same_as: vision_model.embeddings.class_embedding}
  layer.(\\d+).twin: {why: another copy, same_as: layer.<1+1>.twin}
unsupported:
  text:
    text_model.(.+): a text tower that OpenCLIP does not have; load with towers=('image',)
    text_projection.weight: a text tower that OpenCLIP does not have; load with towers=('image',)
refuse:
  - when: {all: [marker, vision_model.cut.weight]}
    why: this is a pruned tower; keymap has no model for it
  - {contains: [.strange_suffix], why: "this is strange; make it ordinary"}
towers:
  image:
    vision_model.embeddings.class_embedding: visual.class_embedding
    vision_model.embeddings.patch_embedding.weight: visual.conv1.weight
    vision_model.embeddings.position_embedding.weight: visual.positional_embedding
    vision_model.pre_layrnorm.(weight|bias): visual.ln_pre.\\1
    vision_model.encoder.layers.(\\d+).: {to: visual.transformer.resblocks.\\1., table: hf_to_native}
    vision_model.post_layernorm.(weight|bias): visual.ln_post.\\1
    visual_projection.weight: {to: visual.proj, view: out in -> in out}
  scale:
    logit_scale: logit_scale
"""


@pytest.fixture
def mapping(tmp_path):
    path = tmp_path / "worded.yaml"
    path.write_text(HF_CLIP_LIKE)
    return path


@pytest.fixture
def keys():
    return {**hf.disk_keys(hf.clip()), "marker": torch.zeros(1)}


def save(keys, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(keys, path)
    return path


def test_an_unsupported_tower_is_refused_with_its_reason_and_skipped_where_it_is_not_requested(mapping, keys, tmp_path):
    path, model = save(keys, tmp_path), openclip.clip(seed=5)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="a text tower that OpenCLIP does not have; load with towers") as caught:
        keymap.load_checkpoint(model, path, mapping=mapping)
    assert sum("does not have" in fault for fault in caught.value.faults) == 1
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, mapping=mapping, towers=("image",))
    assert result.unexpected_keys == []
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="only 0 of the 53 tensors of the text tower") as caught:
        keymap.load_checkpoint(model, path, mapping=mapping, strict=False)
    assert "does not have; load with towers=('image',)" in str(caught.value)
    assert_unchanged(model, before)


def test_an_ignored_copy_must_equal_its_original(mapping, keys, tmp_path):
    twin = keys["vision_model.embeddings.class_embedding"]
    model = openclip.clip(seed=5)
    path = save({**keys, "vision_model.copy_of_class": twin.clone()}, tmp_path)
    result = keymap.load_checkpoint(model, path, mapping=mapping, towers=("image",))
    assert result.report.plan.dropped["vision_model.copy_of_class"] == "a copy"
    path = save({**keys, "vision_model.copy_of_class": twin + 1}, tmp_path)
    before = bits(model)
    with pytest.raises(keymap.VerifyError, match=r"vision_model.copy_of_class must hold the same values"):
        keymap.load_checkpoint(model, path, mapping=mapping, towers=("image",))
    assert_unchanged(model, before)


def test_copies_with_an_index_must_be_equal_and_need_no_original(mapping, keys, tmp_path):
    model = openclip.clip(seed=5)
    twins = {f"layer.{n}.twin": torch.full((2,), 1.0) for n in range(3)}
    path = save({**keys, **twins}, tmp_path)
    result = keymap.load_checkpoint(model, path, mapping=mapping, towers=("image",))
    assert {"layer.0.twin", "layer.2.twin"} <= set(result.report.plan.dropped)
    twins["layer.2.twin"] += 1
    with pytest.raises(keymap.VerifyError, match=r"layer.1.twin must hold the same values"):
        keymap.load_checkpoint(model, save({**keys, **twins}, tmp_path), mapping=mapping, towers=("image",))


@pytest.mark.parametrize(
    ("key", "words"),
    [("vision_model.cut.weight", "this is a pruned tower"), ("deep.in.here.strange_suffix", "this is strange")],
)
def test_a_refused_kind_of_file_is_named(mapping, keys, tmp_path, key, words):
    path, model = save({**keys, key: torch.zeros(3)}, tmp_path), openclip.clip(seed=5)
    before = bits(model)
    with pytest.raises(keymap.DetectionError, match=words) as caught:
        keymap.load_checkpoint(model, path, mapping=mapping)
    assert key in caught.value.faults[0]
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("same_as: layer.<1+1>.twin", "same_as: layer.\\\\2.twin", "same_as: 'layer.\\2.twin' uses group 2"),
        ("text_model.(.+): a text", "text_model.(.+: a text", "is not closed"),
        ("when: {all: [marker, vision", "when: {all: [(.+), vision", "(.+) matches every file"),
        ("{contains: [.strange_suffix], why:", "{why:", "refuse"),
    ],
)
def test_each_fault_has_its_place(mapping, old, new, words):
    text = HF_CLIP_LIKE.replace(old, new.replace("\\\\", "\\"))
    assert text != HF_CLIP_LIKE
    mapping.write_text(text)
    with pytest.raises(keymap.MappingError) as caught:
        keymap.register_mappings(mapping)
    assert words in str(caught.value) or words == "refuse"
    assert "worded.yaml:" in caught.value.faults[0]
