"""The data of the page says what the plan does: each key once, the kinds of operation, the rules, the lists."""

from __future__ import annotations

import json

import pytest
import torch
from peers import hf, openclip
from plans import clip_plan, hostile_plan
from safetensors.torch import save_file

import keymap
from keymap.picture.data import KINDS, picture_of, plain
from keymap.picture.fold import Layers
from keymap.picture.sample import picture_of_format
from keymap.source.registry import hubs, registry


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return clip_plan(tmp_path_factory.mktemp("clip"), stray=torch.zeros(3))


@pytest.fixture(scope="module")
def picture(plan):
    return picture_of(plan)


def links_to(picture, key):
    """The links to a key of the model: source key, kinds, link."""
    return [
        (section.sources[link.source].key if link.source >= 0 else None, link.kinds, link)
        for section in picture.sections
        for link in section.links
        if link.target >= 0 and section.targets[link.target].key == key
    ]


def links_from(picture, key):
    return [
        link
        for section in picture.sections
        for link in section.links
        if link.source >= 0 and section.sources[link.source].key == key
    ]


def test_every_key_of_the_file_and_of_the_plan_is_drawn_once(plan, picture):
    sources = [leaf.key for section in picture.sections for leaf in section.sources]
    targets = [leaf.key for section in picture.sections for leaf in section.targets]
    assert sorted(sources) == sorted(plan.sources)
    assert sorted(targets) == sorted([*(entry.key for entry in plan.entries), *plan.missing_keys])


def test_every_key_is_in_one_node_of_its_side(picture):
    for section in picture.sections:
        for nodes, leaves in ((section.left, section.sources), (section.right, section.targets)):
            found = [leaf for node in nodes if isinstance(node, Layers) for row in node.rows for leaf in row.leaves]
            found += [node for node in nodes if not isinstance(node, Layers)]
            assert sorted(found) == list(range(len(leaves)))


def test_towers_are_sections(picture):
    assert [section.title for section in picture.sections] == ["scale", "image", "text", "not loaded"]


def test_sources_have_the_shapes_of_the_file(plan, picture):
    (_, _, link) = links_to(picture, "text.text_projection")[0]
    text = next(section for section in picture.sections if section.title == "text")
    assert text.sources[link.source] == ("text_projection.weight", (24, 32), "float32")
    assert text.targets[link.target] == ("text.text_projection", (32, 24), "float32")


CASES = {
    "rename": ("visual.trunk.norm.bias", ["vision_model.post_layernorm.bias"], ("rename",)),
    "copy": ("logit_scale", ["logit_scale"], ("copy",)),
    "transpose": ("text.text_projection", ["text_projection.weight"], ("transpose", "rename")),
    "concat": (
        "visual.trunk.blocks.0.attn.qkv.bias",
        [f"vision_model.encoder.layers.0.self_attn.{x}_proj.bias" for x in "qkv"],
        ("concat", "rename"),
    ),
    "resize": (
        "visual.trunk.pos_embed",
        ["vision_model.embeddings.position_embedding.weight"],
        ("resize", "reshape", "rename"),
    ),
    "fill": ("visual.trunk.head.bias", [None], ("fill",)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_operation_has_its_kind(case, picture):
    key, sources, kinds = CASES[case]
    found = links_to(picture, key)
    assert [(source, kind) for source, kind, _ in found] == [(source, kinds) for source in sources]


def test_splits_have_their_kind_and_the_number_of_their_elements(tmp_path):
    save_file(hf.disk_keys(hf.siglip()), tmp_path / "model.safetensors")
    picture = picture_of(keymap.plan_load(openclip.siglip(), tmp_path / "model.safetensors"))
    ((source, kinds, q),) = links_to(picture, "visual.trunk.attn_pool.q.weight")
    assert source == "vision_model.head.attention.in_proj_weight" and kinds == ("split", "rename")
    ((_, _, kv),) = links_to(picture, "visual.trunk.attn_pool.kv.weight")
    assert kv.elements == 2 * q.elements == 2 * 48 * 48


def test_transposed_parts_of_a_stack_have_both_kinds():
    known = registry()
    picture = picture_of_format(known.get("big_vision_siglip"), known)
    assert links_to(picture, "visual.trunk.attn_pool.kv.weight")[0][1] == ("concat", "transpose", "rename")


def test_dropped_unexpected_and_missing_keys_have_their_kinds_and_reasons(plan, picture):
    (dropped,) = links_from(picture, "vision_model.embeddings.position_ids")
    assert dropped.kinds == ("drop",) and dropped.note == plan.dropped["vision_model.embeddings.position_ids"]
    assert [link.kinds for link in links_from(picture, "stray")] == [("unexpected",)]


def test_sources_of_two_state_dicts_have_their_shapes(tmp_path):
    keys = hf.disk_keys(hf.clip())
    tower = {name: {k: v for k, v in keys.items() if k.startswith(start)} for name, start in (("a", "v"), ("b", "t"))}
    torch.save(tower, tmp_path / "model.pt")
    wrapper = {"image": "a", "text": "b"}
    plan = keymap.plan_load(openclip.custom(), tmp_path / "model.pt", wrapper=wrapper, allow_missing="logit_scale")
    assert len(plan.parts) > 1 and {piece.source for piece in plan.pieces if piece.source} <= set(plan.sources)
    assert all(leaf.shape is not None for section in picture_of(plan).sections for leaf in section.sources)


def test_missing_and_mismatched_keys_are_drawn_in_their_tower(tmp_path):
    keys = hf.disk_keys(hf.clip())
    del keys["vision_model.post_layernorm.bias"]
    keys["text_projection.weight"] = torch.zeros(5, 32)
    save_file(keys, tmp_path / "model.safetensors")
    plan = keymap.plan_load(openclip.custom(), tmp_path / "model.safetensors", strict=False)
    picture = picture_of(plan)
    assert [(s, k) for s, k, _ in links_to(picture, "visual.ln_post.bias")] == [(None, ("missing",))]
    ((_, kinds, link),) = links_to(picture, "text.text_projection")
    assert kinds == ("mismatch",) and link.note == plan.mismatched["text.text_projection"]
    assert {"missing", "mismatched"} <= {listing.name for listing in picture.lists}


def test_keys_outside_the_load_are_drawn_as_unused(tmp_path):
    save_file(hf.disk_keys(hf.clip()), tmp_path / "model.safetensors")
    plan = keymap.plan_load(openclip.custom(), tmp_path / "model.safetensors", towers="image")
    assert [link.kinds for link in links_from(picture_of(plan), "text_projection.weight")] == [("unused",)]


def test_links_have_the_rules_with_file_and_line(picture):
    (_, _, link) = links_to(picture, "visual.trunk.blocks.0.attn.qkv.bias")[0]
    assert [text for text, _ in link.rules] and all(":" in place and ".yaml:" in place for _, place in link.rules)
    assert any("self_attn.(q|k|v)_proj" in text for text, _ in link.rules)


def test_casts_and_resizes_are_told_with_the_link(plan, picture):
    (_, _, cast) = links_to(picture, "visual.trunk.blocks.3.norm1.bias")[0]
    assert cast.note == "cast from float16 to float32"
    (_, _, resized) = links_to(picture, "visual.trunk.pos_embed")[0]
    assert resized.note == f"resized from {plan.resized['visual.trunk.pos_embed']}"


def test_layers_that_differ_in_dtype_are_not_folded_with_the_others(picture):
    image, text = (next(s for s in picture.sections if s.title == title) for title in ("image", "text"))
    assert [node.indices for node in image.right if isinstance(node, Layers)] == [(0, 1, 2)]
    assert [node.indices for node in text.left if isinstance(node, Layers)] == [(0, 1, 2, 3)]


def test_the_lists_are_those_of_the_plan(plan, picture):
    lists = {listing.name: listing.entries for listing in picture.lists}
    assert dict(lists["resized"]) == plan.resized and dict(lists["filled"]) == plan.filled
    assert dict(lists["dropped"]) == dict(plan.dropped) and [key for key, _ in lists["unexpected"]] == ["stray"]
    assert len(lists["cast"]) == len(plan.cast)
    assert [text for _, text in lists.get("notes", ())] == list(plan.notes)


def test_the_plain_data_is_json_and_shows_every_character_of_hostile_names(tmp_path):
    data = plain(picture_of(hostile_plan(tmp_path)))
    text = json.dumps(data, ensure_ascii=False)
    assert json.loads(text)["sections"] and text.isprintable()
    assert data["about"].startswith(r"right\u202eleft\nline\u2028end\udcff</script>")


@pytest.mark.parametrize(("hub", "name"), [(hub, name) for hub in hubs().hubs for name in keymap.list_formats(hub)])
def test_every_format_is_drawn_with_each_of_its_rules(hub, name):
    known = registry(hub)
    mapping = known.get(name)
    picture = picture_of_format(mapping, known)
    drawn = {rule for section in picture.sections for link in section.links for rule in link.rules}
    every = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
    assert {rule.place for rule in every} - {place for _, place in drawn} == set()
    assert {kind for section in picture.sections for link in section.links for kind in link.kinds} <= set(KINDS)


def test_a_mapping_without_rules_is_refused():
    with pytest.raises(keymap.MappingError, match=r"containers \(kind containers\) has no rules to draw"):
        picture_of_format(registry().get("containers"), registry())
