"""Padded vocabularies, arithmetic with an inverse, and keys of a file that hold the same values, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import check, compiled, faults, run, same, t

from keymap.language.apply import apply_rules
from keymap.language.layout import Layout, whole
from keymap.language.rules import RuleTable
from keymap.load.copying import materialise
from keymap.plan.completeness import incomplete

PADDED = "wte.weight: {to: embed.weight, take: [0, text.vocab], pad: 8}"


def applied(table, tensors, facts):
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return apply_rules(table, layouts, facts)


def test_padding_is_cut_on_the_way_in_and_zero_on_the_way_out_and_both_are_noted():
    x = torch.cat([t(13, 3), torch.zeros(3, 3)])
    table = check(PADDED, {"wte.weight": x}, {"embed.weight": x[:13]}, facts={"text.vocab": 13})
    there = applied(table, {"wte.weight": x}, {"text.vocab": 13})
    assert there.notes == ["wte.weight: rows 13 to 15 are padding and left out (pad: 8)"]
    back = applied(table.inverse(), {"embed.weight": x[:13]}, {})  # the shape shows the fact
    assert back.notes == ["wte.weight: 3 rows of zeros added at the end (pad: 8)"]
    assert materialise(back.out["wte.weight"], {"embed.weight": x[:13]}.__getitem__)[13:].count_nonzero() == 0


def test_a_table_that_needs_no_padding_gets_none_and_no_note():
    x = t(16, 3)
    table = check(PADDED, {"wte.weight": x}, {"embed.weight": x}, facts={"text.vocab": 16})
    assert applied(table, {"wte.weight": x}, {"text.vocab": 16}).notes == []
    assert applied(table.inverse(), {"embed.weight": x}, {}).notes == []


def test_a_model_can_be_the_padded_side():
    """GPT-2 in nanoGPT: the file has 13 rows, the model 16."""
    x = t(13, 3)
    want = {"embed": torch.cat([x, torch.zeros(3, 3)])}
    check("wte: {to: embed, pad: {multiple: 8, keep: text.vocab}}", {"wte": x}, want, facts={"text.vocab": 13})


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(vocab=st.integers(1, 40), multiple=st.integers(1, 9), width=st.integers(1, 3), transposed=st.booleans())
def test_any_vocabulary_comes_back(vocab, multiple, width, transposed):
    x = torch.arange(1, vocab * width + 1).reshape(vocab, width)
    view = ", view: v d -> d v" if transposed else ""
    table = RuleTable(compiled(f"w: {{to: e, take: [0, text.vocab], pad: {multiple}{view}}}").rules)
    total = -(-vocab // multiple) * multiple
    if total > 9 * vocab:
        return
    padded = torch.cat([x, x.new_zeros(total - vocab, width)])
    there, _ = run(table, {"w": padded}, {"text.vocab": vocab})
    same(there, {"e": x.t() if transposed else x})
    same(run(table.inverse(), there)[0], {"w": padded})


@pytest.mark.parametrize(
    ("back", "shape", "facts", "text"),
    [
        (False, (16, 3), {}, "the length text.vocab is not known: pass facts={'text.vocab': ...}"),
        (False, (12, 3), {"text.vocab": 13}, "rows [0, 13) do not exist in [12, 3]"),
        (True, (12, 3), {"text.vocab": 13}, "pad: there are 12 rows, and text.vocab is 13"),
        (True, (), {}, "pad: [] has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_faults(back, shape, facts, text):
    table = RuleTable(compiled(PADDED).rules)
    key = "embed.weight" if back else "wte.weight"
    (found,) = faults(table.inverse() if back else table, {key: t(*shape)}, facts)
    assert text in found and found.startswith("example.yaml:8:5")


def test_padding_is_bounded():
    table = RuleTable(compiled("w: {to: e, take: [0, text.vocab], pad: 1000000}").rules)
    (text,) = faults(table.inverse(), {"e": t(2, 3)})
    assert "2 rows would get 999998 rows of zeros" in text


# --- arithmetic ---


def test_arithmetic_is_undone_after_the_view_and_before_the_cut():
    x, y = t(2, 3), t(2, 3)
    rules = "(x|y): {to: both, concat: 0, times: sqrt 1, plus: 2, then: (n r) d -> d n r, sizes: {n: 2}}"
    table = RuleTable(compiled(rules).rules)
    there, _ = run(table, {"x": x, "y": y})
    want = (torch.cat([x, y]) * 3**0.5 + 2).reshape(2, 2, 3).permute(2, 0, 1)
    torch.testing.assert_close(there["both"], want)
    back, _ = run(table.inverse(), there)
    torch.testing.assert_close(back["x"], x)
    torch.testing.assert_close(back["y"], y)


def test_powers_of_two_come_back_bit_for_bit():
    x = t(5, 3)
    check("x: {to: y, times: 0.25}", {"x": x}, {"y": x * 0.25})


def test_gemma_s_norm_is_one_more_in_the_model():
    x = torch.tensor([0.5, -0.25, 2.0])
    check("n: {to: m, plus: 1}", {"n": x}, {"m": x + 1})


def test_the_root_of_an_empty_axis_is_a_fault():
    table = RuleTable(compiled("x: {to: y, times: sqrt 1}").rules)
    for shape in ((2,), (2, 0)):
        assert "does not exist or is empty" in faults(table.inverse(), {"y": t(*shape)})[0]


@pytest.mark.parametrize(
    ("times", "factor"),
    [("sqrt 1", 2.0), ("1/sqrt 1", 0.5), ("sqrt text.width", 3.0), ("1/sqrt text.width", 1 / 3)],
)
def test_roots_of_an_axis_and_of_a_fact_and_one_over_them(times, factor):
    x, facts = t(5, 4), {"text.width": 9}
    rule = f"x: {{to: y, view: a b -> a b, times: {times}, plus: 1}}"
    table = RuleTable(compiled(rule).rules)
    there, _ = run(table, {"x": x}, facts)
    torch.testing.assert_close(there["y"], x * factor + 1)
    torch.testing.assert_close(run(table.inverse(), there, facts)[0]["x"], x)


def test_the_root_of_a_fact_needs_the_fact():
    table = RuleTable(compiled("x: {to: y, times: sqrt text.width}").rules)
    assert table.rules[0].facts == ("text.width",)
    assert "text.width is not known: pass facts={'text.width': ...}" in faults(table, {"x": t(2)})[0]
    assert "text.width is -3" in faults(table, {"x": t(2)}, {"text.width": -3})[0]


# --- ties ---

TIED = "wte.weight: {to: embed.weight, tied: lm_head.weight}"


def test_tied_keys_of_a_file_are_compared_on_the_way_in_and_both_written_on_the_way_out():
    x = t(5, 3)
    table = RuleTable(compiled(TIED).rules)
    there, (tie,) = run(table, {"lm_head.weight": x, "wte.weight": x})
    same(there, {"embed.weight": x})
    assert tie.key == "lm_head.weight" and isinstance(tie.value, Layout) and tie.value.sources == ("wte.weight",)
    same(run(table.inverse(), there)[0], {"wte.weight": x, "lm_head.weight": x})


@pytest.mark.parametrize("key", ["wte.weight", "lm_head.weight"])
def test_one_of_the_tied_keys_is_enough(key):
    x, mapping = t(5, 3), compiled(TIED)
    there, seen = run(RuleTable(mapping.rules), {key: x})
    assert not seen and not incomplete(mapping, mapping.rules, [key])
    same(there, {"embed.weight": x})
    assert incomplete(compiled(TIED + "\nb: c"), compiled(TIED + "\nb: c").rules, ["b"])


def test_ties_on_both_sides_with_a_view_and_an_index():
    x = t(5, 3)
    rules = r"l.(\d+).: {to: m.\1., table: t}"
    more = "tables:\n  t:\n    a: {to: [p, q], tied: [b.x, c], view: i o -> o i}\n"
    table = RuleTable(compiled(rules, more).rules)
    tensors = {"l.3.a": x, "l.3.b.x": x, "l.3.c": x}
    there, seen = run(table, tensors)
    same(there, {"m.3.p": x.t(), "m.3.q": x.t()})
    assert [one.key for one in seen] == ["l.3.b.x", "l.3.c"]
    back, seen = run(table.inverse(), there)
    same(back, tensors)
    assert [one.key for one in seen] == ["m.3.q"]
