"""Evidence by shape: two models with the same names have axes of other lengths; both directions know which is which."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import compiled, same, t

import keymap
from keymap.language.layout import whole
from keymap.language.shape_form import fitted, parse_form, written_form
from keymap.load.copying import materialise
from keymap.plan.from_hub import from_hub
from keymap.plan.to_hub import to_hub
from keymap.source.detect import Detection, matching_keys
from keymap.source.registry import registry
from keymap.source.samples import samples

TWO_MLPS = r"""
variants:
  - when: {all: [mlp.w12.weight]}
    when_hub: {all: [{key: m.fc2.weight, shape: [d, h]}, {key: m.fc1.weight, shape: [h * 2, d]}]}
    towers:
      image:
        mlp.w12.weight: m.fc1.weight
        mlp.w3.weight: m.fc2.weight
  - when: {all: [mlp.fc1.weight]}
    when_hub: {all: [{key: m.fc2.weight, shape: [d, h]}, {key: m.fc1.weight, shape: [h, d]}]}
    towers:
      image:
        mlp.fc(1|2).weight: m.fc\1.weight
"""


def there_and_back(tensors):
    """The tensors through the hub's names and back."""
    mapping = compiled("norm.(w|b): n.\\1", TWO_MLPS)
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    now = to_hub(Detection(mapping, layouts, (), (), ()), {})
    there = sorted(now.tensors)
    from_hub(registry().hub, mapping, now, {})
    assert not now.faults and not now.unowned
    return there, {key: materialise(layout, tensors.__getitem__) for key, layout in now.tensors.items()}


def test_both_mlps_of_dinov2_come_back_under_their_own_names():
    norm = {"norm.w": t(3), "norm.b": t(3)}
    swiglu = {**norm, "mlp.w12.weight": t(10, 3), "mlp.w3.weight": t(3, 5)}
    plain = {**norm, "mlp.fc1.weight": t(7, 3), "mlp.fc2.weight": t(3, 7)}
    names = []
    for tensors in (swiglu, plain):
        there, back = there_and_back(tensors)
        names.append(there)
        same(back, tensors)
    assert names[0] == names[1]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(h=st.integers(1, 9), d=st.integers(1, 9), gated=st.booleans())
def test_any_sizes_come_back(h, d, gated):
    first = {"mlp.w12.weight": t(2 * h, d), "mlp.w3.weight": t(d, h)}
    tensors = first if gated else {"mlp.fc1.weight": t(h, d), "mlp.fc2.weight": t(d, h)}
    tensors |= {"norm.w": t(d), "norm.b": t(d)}
    same(there_and_back(tensors)[1], tensors)


@pytest.mark.parametrize(
    ("form", "shape", "known", "lengths"),
    [
        (["h * 2", "d"], (10, 3), {}, {"h": 5, "d": 3}),
        (["h * 2", "d"], (9, 3), {}, None),
        (["h * 2", "d"], (10, 3), {"h": 4}, None),
        (["a", "a"], (4, 5), {}, None),
        (["a", 5], (4, 5), {"b": 1}, {"b": 1, "a": 4}),
        ([5, "a"], (4, 5), {}, None),
        (["a"], (4, 5), {}, None),
        ([], (), {}, {}),
    ],
)
def test_a_form_names_lengths_or_does_not_fit(form, shape, known, lengths):
    parsed = parse_form(form)
    assert fitted(parsed, shape, known) == lengths
    assert written_form(parsed) == f"[{', '.join(map(str, form))}]"


def test_names_are_shared_by_all_clues_and_those_of_none_are_tried_with_them():
    detect = "detect:\n  all: [{key: 'b.(\\d+).out', shape: [d, h]}]\n  any: [{key: in, shape: [h, d]}, x]\n"
    detect += "  none: [{key: gate, shape: [d, 1]}]\n"
    text = f"format: e\ntitle: e\nreference: e\nlayouts: {{image: native_vit}}\n{detect}towers:\n  image:\n    x: y\n"
    from keymap.language.compile import compile_mapping

    evidence = compile_mapping(text, "e.yaml").detect
    layout = {"b.0.out": t(2, 3), "in": t(3, 2), "gate": t(3, 1)}
    assert matching_keys(evidence, layout) == ["b.0.out", "in"]
    assert matching_keys(evidence, {**layout, "gate": t(2, 1)}) is None
    assert matching_keys(evidence, {**layout, "in": t(2, 3)}) is None
    assert matching_keys(evidence, {**layout, "b.0.out": t(6)}) is None
    assert "in of shape [h, d]" in map(str, evidence.any)


def test_samples_of_a_mapping_have_the_shapes_of_its_evidence():
    mapping = compiled("a: b\nc: d", "variants:\n- when: {all: [{key: a, shape: [h * 3, 5]}]}\n"
                       "  when_hub: {all: [b]}\n  towers: {image: {e: f}}\n")  # fmt: skip
    shape = [sample.shapes["a"] for sample in samples(mapping, registry())][-1]
    assert shape[0] % 3 == 0 and shape[1] == 5


@pytest.mark.parametrize(
    ("clue", "text"),
    [
        ("{key: a, shape: [h / 2]}", "has the wrong form"),
        ("{key: a, shape: [h], ndim: 1}", "shape gives the number of axes: remove ndim"),
        ("{key: a, shape: h}", "shape: 'h' is a string"),
    ],
)
def test_a_wrong_shape_is_an_error_with_its_place(clue, text):
    more = f"variants:\n- when: {{all: [{clue}]}}\n  when_hub: {{all: [b]}}\n  towers: {{image: {{e: f}}}}\n"
    with pytest.raises(keymap.MappingError) as caught:
        compiled("a: b", more)
    assert caught.value.faults[0].startswith("example.yaml:7:") and text in caught.value.faults[0]


def test_a_file_of_many_keys_is_looked_through_once_for_each_clue():
    keys = {f"b.{n}.w": whole(f"b.{n}.w", (2, 3), torch.float32) for n in range(3000)}
    clues = [{"key": r"b.(\d+).w", "shape": ["x", "x"]}] * 40
    more = f"variants:\n- when: {{any: {json.dumps(clues)}}}\n  when_hub: {{all: [b]}}\n  towers: {{image: {{e: f}}}}\n"
    assert matching_keys(compiled("a: b", more).variants[0].when, keys) is None
