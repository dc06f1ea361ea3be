r"""Indices in a range, offsets by a fact, and names at any depth: ``(\d+<61)``, ``<1-text.layers>``, ``(**.)gamma``."""

from __future__ import annotations

import random

import pytest
import torch
from bounds import ends
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import check, compiled, faults, run, same, t

import keymap
from keymap.language.apply import apply_rules
from keymap.language.layout import whole
from keymap.language.overlap import overlap
from keymap.language.pattern_syntax import parse_source
from keymap.language.rules import RuleTable
from keymap.plan.completeness import incomplete

DEEPSEEK = r"""
model.layers.(\d+<text.layers).w: decoder.\1.w
model.layers.(\d+>=text.layers).(w|norm): mtp.<1-text.layers>.\2
"""


def test_the_layers_after_the_last_one_are_counted_from_zero():
    """DeepSeek-V3: with 3 layers the layer 3 is the first of those that predict further tokens."""
    tensors = {f"model.layers.{n}.w": t(2, n + 3) for n in range(5)} | {"model.layers.3.norm": t(2)}
    want = {f"decoder.{n}.w": tensors[f"model.layers.{n}.w"] for n in range(3)}
    want |= {f"mtp.{n - 3}.w": tensors[f"model.layers.{n}.w"] for n in (3, 4)}
    want |= {"mtp.0.norm": tensors["model.layers.3.norm"]}
    check(DEEPSEEK, tensors, want, facts={"text.layers": 3})


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(layers=st.integers(1, 30), more=st.integers(0, 12))
def test_any_number_of_layers_comes_back(layers, more):
    tensors = {f"model.layers.{n}.w": torch.full((2,), n) for n in range(layers + more)}
    table = RuleTable(compiled(DEEPSEEK).rules).within({"text.layers": layers})
    there, _ = run(table, tensors)
    assert sum(key.startswith("mtp.") for key in there) == more
    same(run(table.inverse(), there)[0], tensors)
    assert sorted(run(RuleTable(compiled(DEEPSEEK).rules).inverse(), there, {"text.layers": layers})[0]) == sorted(
        tensors
    )


def test_ranges_by_numbers_and_an_offset_that_is_added():
    tensors = {f"l.{n}": t(n + 1) for n in range(14)}
    rules = r"""
    l.(\d+<2): a.<1+text.first>
    l.(\d+>=2<12): b.<1-2>
    l.(\d+>=12): c.\1
    """
    want = {f"a.{n + 5}": tensors[f"l.{n}"] for n in range(2)} | {f"b.{n - 2}": tensors[f"l.{n}"] for n in range(2, 12)}
    check(rules, tensors, want | {f"c.{n}": tensors[f"l.{n}"] for n in (12, 13)}, facts={"text.first": 5})
    table = RuleTable(compiled(rules).rules).inverse().within({"text.first": 5})
    assert table.find("b.10") is None and table.find("a.4") is None and table.find("c.11") is None


def test_a_key_whose_range_needs_a_fact_asks_for_it_once():
    found = faults(RuleTable(compiled(DEEPSEEK).rules), {f"model.layers.{n}.w": t(2) for n in range(4)})
    assert len(found) == 1 and "which keys it owns is not known: pass facts={'text.layers': ...}" in found[0]
    assert found[0].startswith("example.yaml:8:5: rule ") and "(and 3 more of this rule)" in found[0]
    back = faults(RuleTable(compiled(DEEPSEEK).rules).inverse(), {"mtp.0.w": t(2)})
    assert "pass facts={'text.layers': ...}" in back[0] and back[0].startswith("example.yaml:9:5: ")
    assert not faults(RuleTable(compiled(DEEPSEEK).rules), {"other": t(2)})


def test_a_key_whose_alias_needs_a_fact_keeps_its_name_so_that_the_evidence_finds_it():
    table = RuleTable(compiled(r"l.(\d+>=text.layers).w: more.<1-text.layers>.w").rules)
    tensors = {f"l.{n}.w": whole(f"l.{n}.w", (2,), torch.float32) for n in range(3)}
    applied = apply_rules(table, tensors, {}, pass_others=True)
    assert list(applied.out) == list(tensors) and len(applied.faults) == 1
    assert list(apply_rules(table, tensors, {"text.layers": 2}, pass_others=True).out) == ["l.0.w", "l.1.w", "more.0.w"]


def test_each_range_is_complete_by_itself():
    mapping = compiled(DEEPSEEK.replace("(w|norm)", "w").replace("\\2", "w"))
    rules = RuleTable(mapping.rules).within({"text.layers": 3}).rules
    keys = [f"model.layers.{n}.w" for n in range(5)]
    assert not incomplete(mapping, rules, keys)
    (fault,) = incomplete(mapping, rules, [key for key in keys if "1" not in key and "3" not in key])
    assert "model.layers.1.w, model.layers.3.w" in fault.text


def test_ranges_are_compared_for_all_keys():
    """Against a plain count of the numbers that both match."""
    generator = random.Random(5)
    for _ in range(150):
        bounds = [sorted(generator.sample(range(130), 2)) for _ in range(2)]
        texts = [
            f"a.(\\d+>={low}<{high}).b" if generator.random() < 0.8 else f"a.(\\d+<{high}).b" for low, high in bounds
        ]
        sides = [parse_source(text) for text in texts]
        both = [n for n in range(140) if all(side.match(f"a.{n}.b") is not None for side in sides)]
        witness = overlap(*sides)
        assert (witness is not None) == bool(both), texts
        if witness is not None:
            assert int(witness.split(".")[1]) in both


def test_rules_whose_ranges_share_an_index_are_an_error():
    for rules in (
        "l.(\\d+<4): a.\\1\nl.(\\d+>=3): b.\\1",
        "l.(\\d+<text.layers): a.\\1\nl.(\\d+>=text.depth): b.\\1",
        "l.(\\d+<4): a.\\1\nl.3: b",
    ):
        with pytest.raises(keymap.MappingError) as caught:
            compiled(rules)
        assert "is claimed by two rules" in caught.value.faults[0]
    compiled("l.(\\d+<4): a.\\1\nl.(\\d+>=4): b.\\1\nl.x: c")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (r"l.(\d+<0): a.\1", "matches no index"),
        (r"l.(\d+>=5<5): a.\1", "matches no index"),
        (r"l.(\d+<heads): a.\1", "with numbers or facts such as text.depth"),
        (r"l.(\d+<=5): a.\1", r"write (\d+<12), (\d+>=12) or (\d+>=2<12)"),
        (r"l.(\d+): a.<1-layers>", "write <1+1>, <1*6+2>, <1:lookup>"),
        (r"(**.)(.+): a.\1\2", "after (**.) the key must end in known segments"),
        (r"(**.): a.\1", "after (**.) the key must end in known segments"),
        (r"(**.)x.(**.)y: a.\1x.\2y", "after (**.) the key must end in known segments"),
        (r"(**.)(a|b.a): \1\2", "alternatives after (**.) must have equally many dots"),
        (r"x(**.)a: x\1b", "(**.) stands for whole segments: write it at the start or after a dot"),
        (r"(\w+)(**.)a: \1.\2b", "two open-ended groups need text between them"),
        (r"(**.)a: x\1b", "(**.) stands for whole segments"),
        (r"x/**.gamma: weight", "write (**.) for segments at any depth"),
    ],
)
def test_a_wrong_range_or_depth_is_an_error_with_its_place(rule, text):
    with pytest.raises(keymap.MappingError) as caught:
        compiled(rule)
    assert caught.value.faults[0].startswith("example.yaml:8:5") and text in caught.value.faults[0]


# --- any depth ---


def test_names_at_any_depth_both_ways():
    rules = r"(**.)LayerNorm.(gamma|beta): \1LayerNorm.<2:wb>"
    more = "lookups:\n  wb: {gamma: weight, beta: bias}\n"
    tensors = {"LayerNorm.gamma": t(2), "a.LayerNorm.beta": t(3), "a.b.0.c.LayerNorm.gamma": t(4)}
    want = {"LayerNorm.weight": tensors["LayerNorm.gamma"], "a.LayerNorm.bias": tensors["a.LayerNorm.beta"]}
    want |= {"a.b.0.c.LayerNorm.weight": tensors["a.b.0.c.LayerNorm.gamma"]}
    check(rules, tensors, want, more)
    assert RuleTable(compiled(rules, more).rules).find("aLayerNorm.gamma") is None


def test_a_depth_after_a_prefix_and_before_an_index_and_a_word():
    rules = r"text.(**.)layers.(\d+).(\w+).gamma: t.\1layers.\2.\3.weight"
    tensors = {"text.layers.0.x.gamma": t(2), "text.a.layers.layers.7.x.gamma": t(3)}
    check(rules, tensors, {key.replace("text.", "t.").replace("gamma", "weight"): x for key, x in tensors.items()})


def test_a_rule_at_any_depth_shares_keys_with_others():
    witness = overlap(parse_source("(**.)gamma"), parse_source(r"a.(\d+).gamma"))
    assert witness is not None and parse_source("(**.)gamma").match(witness) is not None
    assert overlap(parse_source("(**.)gamma"), parse_source("a.(b|c).delta")) is None
    assert overlap(parse_source("(**.)a.b"), parse_source("(**.)b")) in ("a.b", ".a.b")
    with pytest.raises(keymap.MappingError, match="is claimed by two rules"):
        compiled("(**.)gamma: \\1weight\nx.gamma: y")


@pytest.mark.parametrize("pattern", ["(**.)gamma", r"(**.)layers.(\d+).(\w+).gamma", "x.(**.)(a|b).([^.]+).c"])
def test_a_long_key_is_matched_in_linear_time(pattern):
    side = parse_source(pattern)
    with ends():
        for piece in ("layers.", "a.", "layers.1.", "1", "x.a.b.c.", ".."):
            key = piece * (1_000_000 // len(piece))
            assert side.match(key) is None
            side.match("x." + key + "gamma")


def test_a_rule_at_any_depth_names_no_tensor_twice():
    table = RuleTable(compiled(r"(**.)g: \1w").rules)
    keys = {f"{'a.' * n}g": whole(f"{'a.' * n}g", (n + 1,), torch.float32) for n in range(30)}
    assert len({table.find(key)[1]["1"] for key in keys}) == 30
