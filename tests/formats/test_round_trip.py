"""Every mapping there and back, bit for bit: on keys made from the YAML alone, then on real models.

A new file in mappings/ needs no row for the first half.
"""

from __future__ import annotations

import pytest
import torch
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import SQUARE, same_bits

import keymap
from keymap.language.apply import apply_rules
from keymap.language.layout import Layout, whole
from keymap.language.rules import Check, RuleTable
from keymap.load.copying import materialise
from keymap.source.detect import apply_aliases, file_rules, matching_keys
from keymap.source.registry import registry
from keymap.source.samples import samples

KNOWN = registry()
SAMPLES = {s.name: (m, s) for m in KNOWN.mappings.values() if m.rules for s in samples(m, KNOWN)}


def of_formats(forms):
    """The names of a table as parameters, each marked with its format."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.formats(form)) for name, form in forms.items()]
    )


EACH_SAMPLE = of_formats({name: mapping.name for name, (mapping, _) in SAMPLES.items()})


def randoms(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def layouts(tensors):
    return {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}


def values(found, tensors):
    return {key: materialise(layout, tensors.__getitem__) for key, layout in found.items()}


def assert_filled_once(found: dict[str, Layout]):
    for key, layout in found.items():
        hits = torch.zeros(layout.shape, dtype=torch.int64).flatten()
        for piece in layout.pieces:
            hits.as_strided(piece.shape, piece.target_strides, piece.target_offset).add_(not piece.add)
        assert bool((hits == 1).all()), f"{key}: an element is written {hits.unique().tolist()} times"


def assert_checks_hold(checks: list[Check], tensors):
    for check in checks:
        got = materialise(check.layout, tensors.__getitem__)
        if isinstance(check.value, Layout):
            assert torch.equal(got, materialise(check.value, tensors.__getitem__))
        else:
            assert torch.equal(
                got, torch.eye(*got.shape) if check.value == "eye" else torch.full_like(got, check.value)
            )


@EACH_SAMPLE
def test_a_sample_goes_there_and_back_bit_for_bit(name):
    mapping, sample = SAMPLES[name]
    tensors = randoms(sample.shapes)
    dropped = {k for k in tensors if mapping.ignored(k) is not None}
    dropped |= {k for k in tensors if any(entry.side.match(k) is not None for entry in mapping.unsupported)}
    tensors = {k: v for k, v in tensors.items() if k not in dropped or mapping.kind == "hub"}
    table = file_rules(mapping, layouts(sample_tensors := randoms(sample.shapes)))
    result = apply_rules(table, layouts(tensors), sample.facts)
    assert not result.faults and not result.left, ([f.text for f in result.faults], list(result.left))
    used = {source for layout in result.out.values() for source in layout.sources}
    assert used == set(tensors), "no rule reads this key"
    assert_filled_once(result.out)
    there_values = values(result.out, tensors)

    held = [v for v in mapping.variants if matching_keys(v.when, layouts(sample_tensors)) is not None]
    held_back = [v for v in mapping.variants if matching_keys(v.when_hub, layouts(there_values)) is not None]
    assert held == held_back, "the variant is not found on the way back"
    one_way = {k for k in tensors if table.find(k)[0].oneway}
    reached = {k: v for k, v in there_values.items() if not set(result.out[k].sources) & one_way}
    back = apply_rules(table.inverse(), layouts(reached), sample.facts)
    assert not back.faults and not back.left, ([f.text for f in back.faults], list(back.left))
    assert_filled_once(back.out)
    assert_checks_hold(back.checks, reached)
    result = values(back.out, reached)
    assert set(result) == set(tensors) - one_way
    assert [k for k in result if not same_bits(result[k], tensors[k])] == []


@EACH_SAMPLE
def test_a_sample_shows_every_rule(name):
    mapping, sample = SAMPLES[name]
    table = file_rules(mapping, layouts(randoms(sample.shapes)))
    owners = {id(found[0]) for key in sample.shapes if (found := table.find(key)) is not None}
    assert owners == {id(rule) for rule in table.rules}


@EACH_SAMPLE
def test_aliases_leave_the_written_keys_unchanged(name):
    mapping, sample = SAMPLES[name]
    before = layouts(randoms(sample.shapes))
    after, faults, _ = apply_aliases(mapping, before, sample.facts)
    assert not faults
    assert list(after) == list(before)


BOTH_WAYS = [n for n, (m, _) in SAMPLES.items() if m.kind == "bridge" and not any(r.oneway for r in m.rules)]


@of_formats({name: SAMPLES[name][0].name for name in BOTH_WAYS})
def test_a_bridge_round_trip_from_its_second_layout_is_bit_for_bit(name):
    """As the first test of this file, from the second layout."""
    mapping, sample = SAMPLES[name]
    table = RuleTable(mapping.rules)
    result = apply_rules(table, layouts(randoms(sample.shapes)), sample.facts)
    tensors = randoms({key: layout.shape for key, layout in result.out.items()}, seed=1)
    back = apply_rules(table.inverse(), layouts(tensors), sample.facts)
    middle = values(back.out, tensors)
    again = apply_rules(table, layouts(middle), sample.facts)
    assert not back.faults and not again.faults and not back.left and not again.left
    result = values(again.out, middle)
    assert set(result) == set(tensors)
    assert all(same_bits(result[key], tensors[key]) for key in tensors)


def test_keys_that_a_bridge_does_not_know_pass_unchanged():
    for mapping in KNOWN.mappings.values():
        if mapping.kind == "bridge":
            done = apply_rules(RuleTable(mapping.rules), layouts({"x.y": torch.ones(2)}), {}, pass_others=True)
            assert list(done.out) == ["x.y"]


# --- real models ---

HEADS = {"image.heads": 3, "text.heads": 4}


def big_vision_keys(**arguments):
    return {key: torch.from_numpy(value) for key, value in big_vision.init(**arguments).items()}


def without(state, *names):
    return {key: value for key, value in state.items() if not key.endswith(names)}


PEERS = {  # name: (format, state dict)
    "hf_clip": ("hf_clip", lambda **s: hf.disk_keys(hf.clip(**s))),
    "hf_clip with position_ids": ("hf_clip", lambda **s: hf.disk_keys(hf.clip(**s), 4, position_ids=True)),
    "metaclip2": ("hf_clip", lambda **s: hf.disk_keys(hf.metaclip2(**s))),
    "hf_clip image, written by 4": ("hf_clip", lambda **s: hf.disk_keys(hf.clip(tower="image", **s), 4)),
    "hf_clip image with projection": ("hf_clip", lambda **s: hf.disk_keys(hf.clip(tower="image_proj", **s))),
    "hf_clip text with projection": ("hf_clip", lambda **s: hf.disk_keys(hf.clip(tower="text_proj", **s))),
    "hf_siglip": ("hf_siglip", lambda **s: hf.disk_keys(hf.siglip(**s))),
    "hf_siglip image, written by 4": ("hf_siglip", lambda **s: hf.disk_keys(hf.siglip(tower="image", **s), 4)),
    "hf_siglip text, written by 4": ("hf_siglip", lambda **s: hf.disk_keys(hf.siglip(tower="text", **s), 4)),
    "timm clip vit": ("timm", lambda **s: timm_towers.clip_vit(head_bias=True, **s).state_dict()),
    "timm siglip vit": ("timm", lambda **s: timm_towers.siglip_vit(**s).state_dict()),
    "big_vision": ("big_vision_siglip", big_vision_keys),
    "big_vision without head": ("big_vision_siglip", lambda **s: big_vision_keys(head=False, **s)),
    "openai vit": ("openai", lambda **s: openai.state_dict(openai.vit())),
    "openai resnet": ("openai", lambda **s: openai.state_dict(openai.resnet())),
    "timm convnext": ("timm", lambda **s: timm_towers.convnext(head_bias=True).state_dict()),
    "timm convnext, mlp head": ("timm", lambda **s: timm_towers.convnext(mlp_head=True, head_bias=True).state_dict()),
    "timm resnet": ("timm_resnet", lambda **s: timm_towers.resnet_clip().state_dict()),
}
CONSTANT = ("position_ids", *openai.EXTRAS)  # what is dropped on the way


def assert_same(got, want):
    assert set(got) == set(want)
    assert [key for key in want if not same_bits(got[key], want[key])] == []


def there_and_back(state, form, over="open_clip", facts=None, via=None):
    result = keymap.convert_state_dict(state, to=over, mapping=form, facts=facts)
    return keymap.convert_state_dict(result, to=via or form, mapping="open_clip", facts=facts)


@pytest.mark.parametrize("square", [False, True], ids=["distinct", "square"])
@pytest.mark.parametrize("over", ["open_clip", "open_clip_flat"])
@of_formats({name: form for name, (form, _) in PEERS.items()})
def test_a_real_state_dict_goes_to_the_hub_and_back(name, over, square):
    form, make = PEERS[name]
    state = make(**(SQUARE if square else {}))
    before = {key: value.clone() for key, value in state.items()}
    assert_same(there_and_back(state, form, over, HEADS), without(state, *CONSTANT))
    assert_same(state, before)  # the caller's tensors are left alone


def test_big_vision_needs_the_head_counts_on_the_way_back_only():
    hub = keymap.convert_state_dict(big_vision_keys(), to="open_clip")
    with pytest.raises(keymap.PlanError, match=r"pass facts=.*image.heads"):
        keymap.convert_state_dict(hub, to="big_vision_siglip")
    with pytest.raises(keymap.PlanError, match=r"pass facts={'text.heads': ...}"):
        keymap.convert_state_dict(hub, to="big_vision_siglip", facts={"image.heads": 3})


def test_openai_gets_its_float16_back_from_a_float32_model():
    """What a model in float32 holds after a load of OpenAI's file, written as OpenAI wrote it."""
    state = openai.state_dict(openai.vit())
    hub = keymap.convert_state_dict(state, to="open_clip")
    wide = {key: value.float() for key, value in hub.items()}
    back = keymap.convert_state_dict(wide, to="openai", mapping="open_clip")
    assert_same(back, without(state, *CONSTANT))
    assert {value.dtype for value in back.values()} == {torch.float16, torch.float32}


# OpenCLIP's own models, out to a format and home: (model, format, what comes home)
OWN = {
    "flat to hf_clip": (openclip.clip, "hf_clip", "open_clip_flat"),
    "custom to hf_clip": (openclip.custom, "hf_clip", "open_clip"),
    "siglip to hf_siglip": (openclip.siglip, "hf_siglip", "open_clip"),
    "siglip to big_vision": (openclip.siglip, "big_vision_siglip", "open_clip"),
    "timm trunk to hf_clip": (openclip.clip_trunk, "hf_clip", "native_vit_clip_trunk"),
    "flat to openai": (openclip.clip, "openai", "open_clip_flat"),
    "resnet to openai": (openclip.resnet, "openai", "open_clip_flat"),
    "custom to flat": (openclip.custom, "open_clip_flat", "open_clip"),
}


@pytest.mark.parametrize("square", [False, True], ids=["distinct", "square"])
@of_formats({name: form for name, (_, form, _) in OWN.items()})
def test_a_model_of_open_clip_goes_to_a_format_and_back(name, square):
    make, form, home = OWN[name]
    state = make(**(SQUARE if square and make is not openclip.resnet else {})).state_dict()
    if form == "openai":  # its float16 holds no more than float16
        state = {key: value.half().float() if value.is_floating_point() else value for key, value in state.items()}
    result = keymap.convert_state_dict(state, to=form, facts=HEADS)
    back = keymap.convert_state_dict(result, to=home, facts=HEADS)
    if name == "timm trunk to hf_clip":  # the text tower comes home as `text.*`; head.bias has no place in between
        back = {key: value for key, value in back.items() if key.startswith("visual.")}
        state = {k: v for k, v in state.items() if k.startswith("visual.") and k != "visual.trunk.head.bias"}
    for key in KNOWN.hub.scalars & set(back):  # the hub takes both () and (1,), which is what some formats write
        back[key] = back[key].reshape(state[key].shape)
    if form == "openai":
        back = {key: value.float() if value.is_floating_point() else value for key, value in back.items()}
    assert_same(back, state)


def image_tower(model):
    return {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}


def test_a_resnet_goes_to_timm_and_back():
    state = image_tower(openclip.resnet())
    timm = keymap.convert_state_dict(state, to="timm_resnet")
    assert set(timm) == set(timm_towers.resnet_clip().state_dict())
    assert_same(keymap.convert_state_dict(timm, to="open_clip"), state)


@pytest.mark.parametrize("square", [False, True], ids=["distinct", "square"])
def test_a_native_tower_becomes_a_timm_tower_and_a_timm_tower_a_native_one(square):
    sizes = SQUARE if square else {}
    native, trunk = image_tower(openclip.clip(**sizes)), image_tower(openclip.clip_trunk(**sizes))
    assert not trunk.pop("visual.trunk.head.bias").any()  # the native tower has no place for it

    def to_trunk(state):
        return keymap.convert_state_dict(state, to="native_vit_clip_trunk")

    def to_native(state):  # a format of the native layout converts to it only
        return keymap.convert_state_dict(keymap.convert_state_dict(state, to="hf_clip"), to="open_clip")

    assert set(to_trunk(native)) == set(trunk)
    assert set(to_native(trunk)) == set(native)
    assert_same(to_native(to_trunk(native)), native)
    assert_same(to_trunk(to_native(trunk)), trunk)
