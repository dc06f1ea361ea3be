"""Lengths of parts that a fact decides, and a view of each part: grouped queries of any ratio, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import check, compiled, faults, run, same, t

import keymap
from keymap.language.rules import RuleTable

HEADS = {"text.heads": 6, "text.kv_heads": 2}


def test_a_split_by_facts_is_in_their_proportion():
    """Phi-3: six query heads, two of keys and two of values, each of five rows."""
    q, k, v = t(6 * 5, 3), t(2 * 5, 3), t(2 * 5, 3)
    rules = r"l.(\d+).qkv: {to: l.\1.(q|k|v), split: [text.heads, text.kv_heads, text.kv_heads]}"
    want = {"l.4.q": q, "l.4.k": k, "l.4.v": v}
    check(rules, {"l.4.qkv": torch.cat([q, k, v])}, want, facts=HEADS)


def test_parts_by_facts_are_the_inverse():
    q, k, v = t(7, 6 * 5), t(7, 2 * 5), t(7, 2 * 5)
    rules = "a.(q|k|v): {to: a.qkv, concat: 1, parts: [text.heads, text.kv_heads, text.kv_heads]}"
    check(rules, {"a.q": q, "a.k": k, "a.v": v}, {"a.qkv": torch.cat([q, k, v], 1)}, facts=HEADS)


def test_a_fact_times_a_number_and_a_rest_of_exact_lengths():
    x = t(17, 2)
    rules = "w: {to: (a|b|c), split: [text.kv_heads * 3, '*', 4]}"
    check(rules, {"w": x}, {"a": x[:6], "b": x[6:13], "c": x[13:]}, facts=HEADS)


def test_a_view_of_each_part_after_the_cut():
    """InternLM2: for each of two groups three query heads, one key and one value head, of five rows."""
    groups, queries, width, d = 2, 3, 5, 7
    x = t(groups * (queries + 2) * width, d)
    rules = """
    w: {to: (q|k|v), view: (n p k) d -> n p k d, split: ['*', 1, 1], axis: p, each: n g k d -> (n g k) d}
    """
    more = "sizes: {n: text.kv_heads, k: text.head_dim}\n"
    apart = x.reshape(groups, queries + 2, width, d)
    want = {"q": apart[:, :queries].reshape(-1, d), "k": apart[:, queries].reshape(-1, d)}
    want["v"] = apart[:, queries + 1].reshape(-1, d)
    check(rules, {"w": x}, want, more, {"text.kv_heads": groups, "text.head_dim": width})


def test_a_view_of_each_slice_of_an_unstack():
    n, h, k = 2, 3, 5
    x = t(n, h * k, 7)
    rules = "scan: {to: l.<layer>, unstack: layer, each: (h k) d -> d h k, sizes: {h: 3}}"
    want = {f"l.{i}": x[i].reshape(h, k, 7).permute(2, 0, 1) for i in range(n)}
    check(rules, {"scan": x}, want)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(groups=st.integers(1, 4), queries=st.integers(1, 4), width=st.integers(1, 4), d=st.integers(1, 3))
def test_any_ratio_of_heads_comes_back(groups, queries, width, d):
    x = torch.arange(groups * (queries + 2) * width * d).reshape(-1, d)
    facts = {"text.heads": groups * queries, "text.kv_heads": groups, "text.head_dim": width}
    together = "w: {to: (q|k|v), split: [text.heads, text.kv_heads, text.kv_heads]}"
    by_group = (
        "w: {to: (q|k|v), view: (n p k) d -> n p k d, split: ['*', 1, 1], axis: p, each: n g k d -> (n g k) d,"
        " sizes: {n: text.kv_heads, k: text.head_dim}}"
    )
    for rules in (together, by_group):
        table = RuleTable(compiled(rules).rules)
        there, _ = run(table, {"w": x}, facts)
        assert there["q"].shape == (groups * queries * width, d)
        same(run(table.inverse(), there, facts)[0], {"w": x})


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (
            {},
            "the lengths text.heads and text.kv_heads are not known: "
            "pass facts={'text.heads': ..., 'text.kv_heads': ...}",
        ),
        ({"text.heads": 3}, "the length text.kv_heads is not known: pass facts={'text.kv_heads': ...}"),
        ({"text.heads": 0, "text.kv_heads": 1}, "the length text.heads is not positive: text.heads is 0"),
        ({"text.heads": 4, "text.kv_heads": 3}, "an axis of length 12 cannot be cut in proportions [4, 3]"),
    ],
)
def test_a_fact_that_is_not_known_or_does_not_fit_is_asked_for_by_name(facts, text):
    rules = "w: {to: (a|b), split: [text.heads, text.kv_heads]}"
    (found,) = faults(RuleTable(compiled(rules).rules), {"w": t(12)}, facts)
    assert found.startswith("example.yaml:8:5: rule 'w: ") and text in found


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            "w: {to: (a|b), split: [text.heads, 1, 1]}",
            "split [text.heads, 1, 1]: one length for each of 2 alternatives",
        ),
        ("w: {to: (a|b), split: ['*', '*']}", "split [*, *]: one length for each of 2 alternatives, at most one '*'"),
        ("w: {to: v, each: a b -> b a}", "each goes with split or unstack: add split, or remove each"),
        ("w: {to: (a|b), view: x y -> y x, split: [1, 1], axis: z}", "axis 'z' is not a single axis on the right side"),
        ("w: {to: (a|b), split: [heads, 1]}", "split"),
    ],
)
def test_a_wrong_split_is_an_error_with_its_place(rule, text):
    with pytest.raises(keymap.MappingError) as caught:
        compiled(rule)
    assert caught.value.faults[0].startswith("example.yaml:8:") and text in caught.value.faults[0]
