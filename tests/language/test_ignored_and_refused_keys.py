"""Keys that a mapping ignores, keys without a place in any model, files that a mapping refuses: with their reasons."""

from __future__ import annotations

import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap
from keymap.source import registry as registry_module
from keymap.source.registry import hubs

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


# --- in a hub: keys that are one tensor ---

TIED = """format: tied
kind: hub
title: words and an output
detect: {all: [embed.weight, norm.weight]}
ignore:
  out.weight: {why: the words, same_as: embed.weight}
towers:
  net:
    (embed|norm|out).weight: \\1.weight
"""
ONCE = """format: once
hub: tied
title: the same, once
detect: {all: [words]}
towers:
  net:
    words: embed.weight
    scale: norm.weight
"""


class Tied(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.RMSNorm(3)
        self.out = torch.nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.embed.weight


@pytest.fixture
def once(tmp_path, monkeypatch):
    """A file of the format ``once``; the hub is known within the test."""
    monkeypatch.setattr(registry_module, "_registry", [hubs()])
    folder = tmp_path / "tied"
    folder.mkdir()
    for text in (TIED, ONCE):
        (folder / f"{text.split()[1]}.yaml").write_text(text)
    keymap.register_mappings(folder)
    return save({"words": torch.rand(5, 3), "scale": torch.rand(3)}, tmp_path)


@pytest.mark.parametrize(("tied", "note"), [(True, "one tensor with"), (False, "a copy of")])
def test_a_key_that_the_file_lacks_gets_the_values_of_the_other(tied, note, once):
    model = Tied(tied)
    plan = keymap.load_checkpoint(model, once).report.plan
    assert plan.missing_keys == () and any(f"out.weight: {note} embed.weight" in line for line in plan.notes)
    assert torch.equal(model.out.weight, model.embed.weight)


def test_a_copy_of_another_shape_is_missing(once):
    model = Tied(False)
    model.out = torch.nn.Linear(3, 4, bias=False)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"missing from the file: out.weight"):
        keymap.load_checkpoint(model, once)
    assert_unchanged(model, before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_format_without_a_place_for_the_copy_leaves_it_out_if_it_is_one(tied, once):
    model = Tied(tied)
    if not tied:
        with pytest.raises(keymap.VerifyError, match=r"out.weight must hold the same .* a copy of embed.weight"):
            keymap.convert_state_dict(model.state_dict(), "once")
        return
    assert set(keymap.convert_state_dict(model.state_dict(), "once")) == {"words", "scale"}


def test_a_key_that_the_hub_only_ignores_must_be_the_copy_that_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(registry_module, "_registry", [hubs()])
    folder = tmp_path / "tied"
    folder.mkdir()
    for text in (TIED.replace("(embed|norm|out)", "(embed|norm)"), ONCE):
        (folder / f"{text.split()[1]}.yaml").write_text(text)
    keymap.register_mappings(folder)
    model, source, words = Tied(True), tmp_path / "own.pt", "out.weight must hold the same values"
    same, other = dict(Tied(True).state_dict()), dict(Tied(False).state_dict())
    for to in ("once", "tied"):
        assert len(keymap.convert_state_dict(same, to)) == 2
        with pytest.raises(keymap.VerifyError, match=words):
            keymap.convert_state_dict(other, to)
    torch.save(other, source)
    before = bits(model)
    for convert in (
        lambda: keymap.convert_checkpoint(source, tmp_path / "once.pt", "once"),
        lambda: keymap.load_checkpoint(model, source),
    ):
        with pytest.raises(keymap.KeymapError, match=words):
            convert()
    assert_unchanged(model, before)
    torch.save({"model": same}, source)
    keymap.load_checkpoint(model, source)
    assert torch.equal(model.embed.weight, same["embed.weight"])


def test_a_counter_without_a_place_is_named_as_one(once):
    state = {**Tied(True).state_dict(), "norm.calls": torch.tensor(3)}
    with pytest.raises(keymap.PlanError, match=r"no place in once: norm.calls; counters hold no weights: .*`ignore`"):
        keymap.convert_state_dict(state, "once", mapping="tied")


def test_a_copy_without_what_it_repeats_is_not_left_out(once):
    state = {key: value for key, value in Tied(False).state_dict().items() if key != "embed.weight"}
    with pytest.raises(keymap.PlanError, match=r"out.weight"):
        keymap.convert_state_dict(state, "once", mapping="tied")
