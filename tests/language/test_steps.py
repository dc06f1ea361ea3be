"""Steps: rules before the rules of the towers, inverted after them; facts in steps, aliases and bridges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import openclip
from test_language import compiled, same, t

import keymap
from keymap.language.layout import whole
from keymap.load.copying import materialise
from keymap.plan.from_hub import from_hub
from keymap.plan.to_hub import to_hub
from keymap.source.detect import claim
from keymap.source.registry import registry
from keymap.source.samples import samples

STEPS = r"""
steps:
  - (**.)LayerNorm.(gamma|beta): \1LayerNorm.<2:wb>
  - scan.(w|LayerNorm.weight): {to: 'l.<layer>.\1', unstack: layer}
lookups:
  wb: {gamma: weight, beta: bias}
"""
RULES = r"""
evidence: e
l.(\d+).: {to: b.\1., table: t}
end.LayerNorm.(weight|bias): n.\1
"""
TABLES = r"""
tables:
  t:
    w: {to: v, view: i o -> o i}
    LayerNorm.weight: ln
"""


def layouts(tensors):
    return {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}


def values(translated, tensors):
    return {key: materialise(layout, tensors.__getitem__) for key, layout in translated.tensors.items()}


def through_hub(mapping, tensors, facts=None):
    """The names of the hub, and the tensors that come back."""
    found = claim(mapping, layouts(tensors), {})
    now = to_hub(found, facts or {})
    assert not now.faults and not now.unowned, now.faults
    there = values(now, tensors)
    from_hub(registry().hub, mapping, now, facts or {})
    assert not now.faults and not now.unowned, now.faults
    return there, values(now, tensors)


def test_steps_come_before_the_rules_and_are_inverted_after_them():
    n, i, o = 2, 3, 5
    tensors = {"evidence": t(1), "scan.w": t(n, i, o), "scan.LayerNorm.gamma": t(n, 7)}
    tensors |= {"end.LayerNorm.gamma": t(4), "end.LayerNorm.beta": t(6)}
    there, back = through_hub(compiled(RULES, STEPS + TABLES), tensors)
    want = {
        "e": tensors["evidence"],
        "n.weight": tensors["end.LayerNorm.gamma"],
        "n.bias": tensors["end.LayerNorm.beta"],
    }
    want |= {f"b.{k}.v": tensors["scan.w"][k].t() for k in range(n)}
    want |= {f"b.{k}.ln": tensors["scan.LayerNorm.gamma"][k] for k in range(n)}
    same(there, want)
    same(back, tensors)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 11), i=st.integers(1, 4), o=st.integers(1, 4))
def test_any_number_of_scanned_layers_comes_back(n, i, o):
    tensors = {"evidence": t(1), "scan.w": t(n, i, o), "scan.LayerNorm.gamma": t(n, i)}
    tensors |= {"end.LayerNorm.gamma": t(o), "end.LayerNorm.beta": t(o)}
    same(through_hub(compiled(RULES, STEPS + TABLES), tensors)[1], tensors)


def test_a_step_gets_facts_that_are_not_known_when_the_file_is_opened():
    more = "steps:\n  - qkv: {to: (q|k), split: [text.heads, text.kv_heads]}\n"
    mapping = compiled("evidence: e\n(q|k): w.\\1", more)
    tensors = {"evidence": t(1), "qkv": t(8, 3)}
    facts = {"text.heads": 3, "text.kv_heads": 1}
    there, back = through_hub(mapping, tensors, facts)
    same(there, {"e": tensors["evidence"], "w.q": tensors["qkv"][:6], "w.k": tensors["qkv"][6:]})
    same(back, tensors)
    (fault,) = to_hub(claim(mapping, layouts(tensors), {}), {}).faults
    assert "pass facts={'text.heads': ..., 'text.kv_heads': ...}" in fault.text


def test_an_alias_gets_the_facts_too():
    more = "aliases:\n  - old: {to: w, view: (h k) -> h k, sizes: {h: text.heads}}\n"
    mapping = compiled("evidence: e\nw: v", more)
    tensors = {"evidence": t(1), "old": t(6)}
    now = to_hub(claim(mapping, layouts(tensors), {}), {"text.heads": 2})
    assert not now.faults and now.tensors["v"].shape == (2, 3)


def test_a_value_that_a_step_must_find_equal_is_checked():
    mapping = compiled("evidence: e\na: x", "steps:\n  - old: {to: a, tied: copy}\n")
    tensors = {"evidence": t(1), "old": t(2), "copy": t(2)}
    now = to_hub(claim(mapping, layouts(tensors), {}), {})
    assert [check.key for check in now.checks] == ["copy"]


def test_padding_that_a_step_cuts_off_is_noted():
    mapping = compiled("evidence: e\na: x", "steps:\n  - old: {to: a, take: [0, 3], pad: 4}\n")
    assert to_hub(claim(mapping, layouts({"evidence": t(1), "old": t(4)}), {}), {}).notes


def test_a_key_that_a_step_would_read_as_another_one_is_not_written():
    mapping = compiled("evidence: e\na: x\nb: y", "steps:\n  - a: b\n")
    now = to_hub(claim(mapping, layouts({"evidence": t(1)}), {}), {})
    now.tensors = {**now.tensors, **layouts({"x": t(2)})}
    from_hub(registry().hub, mapping, now, {})
    assert any("a cannot be written: rule 'a: b' would read it as another key" in fault.text for fault in now.faults)


def test_samples_are_of_the_names_that_a_file_has():
    keys = next(samples(compiled(RULES, STEPS + TABLES), registry())).shapes
    assert {"scan.w", "scan.LayerNorm.gamma", "end.LayerNorm.beta"} <= keys.keys()
    assert not any(key.startswith("l.") for key in keys)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            "steps:\n  - a: {to: b, take: [0, 2], oneway: true}\n",
            "steps have inverses; write the rule under `aliases:`",
        ),
        ("steps:\n  - (.+): {to: 'b.\\1', rest: true}\n", "a step leaves the keys that it does not match as they are"),
        ("steps:\n  - a.(x|y): b.\\1\n    a.x: c\n", "is claimed by two rules"),
        ("steps:\n  - a: {to: b, spilt: [1, 1]}\n", "there is no field 'spilt' here; did you mean 'split'?"),
        ("aliases:\n  - a: {to: b, tied: c}\n", "tied: aliases only rename"),
    ],
)
def test_a_wrong_step_is_an_error_with_its_place(more, text):
    with pytest.raises(keymap.MappingError) as caught:
        compiled("x: y", more)
    assert len(caught.value.faults) == 1 and text in caught.value.faults[0]
    assert caught.value.faults[0].startswith("example.yaml:")


FORMAT = r"""
format: stepped
title: OpenCLIP's scale under another name
reference: example 1.0
layouts: {image: native_vit}
detect: {all: [Old.scale]}
steps:
  - (**.)scale: \1logit_scale
towers:
  scale:
    Old.logit_scale: logit_scale
"""


def test_map_key_goes_through_the_steps(tmp_path):
    file = tmp_path / "stepped.yaml"
    file.write_text(FORMAT, encoding="utf-8")
    assert keymap.map_key("Old.scale", str(file), "open_clip") == "logit_scale"
    state = keymap.convert_state_dict({"Old.scale": torch.tensor(2.0)}, to="open_clip", mapping=file)
    assert state["logit_scale"].item() == 2.0


def test_a_conversion_takes_facts_of_rules_from_the_configuration_beside_the_source(tmp_path):
    model = openclip.siglip()
    keymap.save_checkpoint(model, tmp_path / "theirs", "hf_siglip")
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "x.npz", "big_vision_siglip")  # it needs the head counts
    keymap.save_checkpoint(model, tmp_path / "y.npz", "big_vision_siglip")
    assert keymap.compare_checkpoints(tmp_path / "x.npz", tmp_path / "y.npz").equal
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(keymap.PlanError, match="pass facts="):
        keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "z.npz", "big_vision_siglip")
