"""Every construct of the rule language, against plain torch: forward, and backward where it has a way back.

A row is a few rules, the tensors that go in, and what plain torch makes of them. `check` runs the rules forward,
compares, runs the derived inverse and compares again. Sizes differ, and each row runs a second time with all
sizes equal, where no shape can show a mistake. The samples that keymap makes of the rules alone must run too.
"""

from __future__ import annotations

import random
import re
import textwrap

import pytest
import torch

import keymap
from keymap.language.apply import apply_rules
from keymap.language.compile import compile_mapping
from keymap.language.layout import Layout, whole
from keymap.language.rules import Rule, RuleTable
from keymap.language.yaml_marks import parse_yaml
from keymap.load.copying import materialise
from keymap.source.detect import apply_aliases, file_rules
from keymap.source.registry import registry
from keymap.source.samples import samples

HEAD = (
    "format: example\ntitle: an example\nreference: example 1.0\n"
    "layouts: {image: native_vit}\ndetect: {any: [evidence]}\n"
)


def compiled(rules, more="", library=lambda name: None):
    body = textwrap.indent(textwrap.dedent(rules).strip(), "    ")
    return compile_mapping(f"{HEAD}{textwrap.dedent(more)}towers:\n  image:\n{body}\n", "example.yaml", library)


def run(table, tensors, facts=None, checks=True):
    """Apply a table to real tensors; no fault, nothing left."""
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    done = apply_rules(table, layouts, facts or {})
    assert not done.faults, [fault.text for fault in done.faults]
    assert not done.left, f"no rule owns {list(done.left)}"
    found = {key: materialise(layout, tensors.__getitem__) for key, layout in done.out.items()}
    return (found, done.checks) if checks else found


def faults(table, tensors, facts=None):
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return [fault.text for fault in apply_rules(table, layouts, facts or {}).faults]


def same(got, want):
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        assert got[key].shape == value.shape, f"{key}: {list(got[key].shape)} for {list(value.shape)}"
        assert torch.equal(got[key], value), key


def check(rules, tensors, want, more="", facts=None, back=True):
    """Forward as plain torch does it, backward to the start; file order must not matter."""
    mapping = compiled(rules, more)
    table = RuleTable(mapping.rules)
    got, seen = run(table, tensors, facts)
    assert not seen
    same(got, want)
    same(run(table, dict(reversed(tensors.items())), facts)[0], want)
    if back:
        returned, seen = run(table.inverse(), want, facts)
        assert not seen
        same(returned, tensors)
    for sample in samples(mapping, registry()):
        made = {key: torch.randn(shape) for key, shape in sample.shapes.items() if key != "evidence"}
        there, _ = run(file_rules(mapping, {}), made, sample.facts)
        if back:
            same(run(table.inverse(), there, sample.facts)[0], made)
    return table


def t(*shape):
    return torch.randn(shape)


@pytest.fixture(params=[(2, 3, 5, 7), (3, 3, 3, 3)], ids=["distinct", "square"])
def sizes(request):
    return request.param


# --- names ---


def test_rename():
    x = t(2, 3)
    check("a.weight: b/weight", {"a.weight": x}, {"b/weight": x})


def test_alternatives_words_parts_and_rest():
    x = [t(2) for _ in range(7)]
    rules = r"""
    ln(1|2|_pre).(weight|bias): norm\1.\2
    w.(\w+).end: words.\1
    p.([^.]+).end: parts/\1
    rest/(.+): kept.\1
    """
    names = {
        "ln1.weight": "norm1.weight",
        "ln_pre.bias": "norm_pre.bias",
        "w.under_score9.end": "words.under_score9",
        "p.a/b-c.end": "parts/a/b-c",
        "rest/x.y/z.0": "kept.x.y/z.0",
    }
    tensors = dict(zip(names, x, strict=False))
    check(rules, tensors, {new: tensors[old] for old, new in names.items()})


def test_an_alternative_may_be_empty():
    x, y = t(2), t(3)
    check(r"a(|_ema).w: b\1.w", {"a.w": x, "a_ema.w": y}, {"b.w": x, "b_ema.w": y})


def test_groups_may_change_places():
    x = t(2)
    check(r"(a|b).(\d+).(w|v): \3.\1/\2", {"a.12.v": x}, {"v.a/12": x})


def test_index_arithmetic_adds():
    x, y = t(2), t(2)
    check(r"stages.(\d+).w: layer<1+1>.w", {"stages.0.w": x, "stages.9.w": y}, {"layer1.w": x, "layer10.w": y})


def test_a_rule_does_not_own_a_key_whose_index_would_fall_below_zero():
    x = t(2)
    check(r"layer(\d+).w: stages.<1-1>.w", {"layer1.w": x, "layer12.w": x}, {"stages.0.w": x, "stages.11.w": x})
    table = RuleTable(compiled(r"layer(\d+).w: stages.<1-1>.w").rules)
    assert table.find("layer0.w") is None
    assert table.inverse().find("stages.0.w") is not None
    assert RuleTable(compiled(r"n.(\d+).w: m.<1+2>.w").rules).inverse().find("m.1.w") is None


def test_a_rule_that_owns_a_key_of_a_block_is_not_searched_for_the_same_key_of_other_blocks(monkeypatch):
    """Also where keys of one rule, or of several, differ in a digit that is no index."""
    table = RuleTable(
        compiled("b.(\\d+).norm(1|2).w: b.\\1.n\\2.w\nb.(\\d+).fc1.w: b.\\1.up\nb.(\\d+).fc2.w: b.\\1.down").rules
    )
    searched, match = [], Rule.match
    monkeypatch.setattr(Rule, "match", lambda rule, key: searched.append(key) or match(rule, key))
    names = {"norm1.w": "n1.w", "norm2.w": "n2.w", "fc1.w": "up", "fc2.w": "down"}
    for layer in range(10):
        for name, target in names.items():
            rule, values = table.find(f"b.{layer}.{name}")
            assert rule.targets[0].write(values) == f"b.{layer}.{target}"
    assert {key.split(".")[1] for key in searched} == {"0"}
    assert table.find("b.3.norm3.w") is None and table.find("b.03.norm1.w") is None


def test_index_arithmetic_folds_two_indices_into_one():
    tensors = {f"b.{high}.{low}.w": t(2) for high in range(3) for low in range(6)}
    want = {f"c.{int(k.split('.')[1]) * 6 + int(k.split('.')[2])}.w": v for k, v in tensors.items()}
    check(r"b.(\d+).(0|1|2|3|4|5).w: c.<1*6+2>.w", tensors, want)
    shifted = {f"c.{int(k.split('.')[1]) + 4}.w": v for k, v in want.items()}
    check(r"b.(\d+).(0|1|2|3|4|5).w: c.<1*6+2+4>.w", tensors, shifted)


def test_lookup():
    x, y = t(2), t(3)
    more = "lookups:\n  stage: {fc1: up, fc2: down}\n"
    check(r"mlp.(fc1|fc2).w: m.<1:stage>", {"mlp.fc1.w": x, "mlp.fc2.w": y}, {"m.up": x, "m.down": y}, more)


def test_a_cycle_of_names_is_safe():
    x, y, z = t(2), t(2), t(2)
    rules = """
    norm0: norm1
    norm1: norm2
    norm2: norm0
    """
    check(rules, {"norm0": x, "norm1": y, "norm2": z}, {"norm1": x, "norm2": y, "norm0": z})


def test_tables_nest_and_sizes_reach_them(sizes):
    d, h, k, _ = sizes
    x, b = t(d, h, k), t(2)
    rules = r"tower.(\d+).: {to: out.\1., table: block, sizes: {h: image.heads}}"
    more = r"""
    tables:
      block:
        attn.(q|k): {to: a.\1., table: linear}
        norm.bias: n.b
      linear:
        .kernel: {to: w, view: d h k -> (h k) d}
    """
    tensors = {"tower.4.attn.q.kernel": x, "tower.4.norm.bias": b}
    want = {"out.4.a.q.w": x.permute(1, 2, 0).reshape(h * k, d), "out.4.n.b": b}
    check(rules, tensors, want, more, {"image.heads": h})


def test_a_table_of_another_file_and_its_lookups():
    text = "format: shared\nkind: tables\ntitle: shared\ntables:\n  block:\n    (a|b): n.<1:one>\n"
    text += "lookups:\n  one: {a: 1, b: 2}\n"
    library = {"shared": parse_yaml(text, "shared.yaml")}
    mapping = compiled(r"x.(\d+).: {to: y.\1., table: block}", "uses: [shared]\n", library.get)
    x = t(2)
    same(run(RuleTable(mapping.rules), {"x.0.b": x})[0], {"y.0.n.2": x})
    same(run(RuleTable(mapping.rules).inverse(), {"y.0.n.2": x})[0], {"x.0.b": x})


# --- views ---


def test_view_permutes_groups_and_adds_axes(sizes):
    a, b, c, d = sizes
    x, y, z = t(a, b, c, d), t(a, b), t(1, a, 1, b)
    rules = """
    x: {to: x2, view: h w i o -> o i h w}
    y: {to: y2, view: n d -> 1 n 1 d}
    z: {to: z2, view: 1 n 1 d -> (d n)}
    """
    want = {"x2": x.permute(3, 2, 0, 1), "y2": y[None, :, None], "z2": z[0, :, 0].t().reshape(-1)}
    check(rules, {"x": x, "y": y, "z": z}, want, "sizes: {n: image.n}\n", {"image.n": a})


def test_sizes_number_equality_and_fact(sizes):
    c, p, q, d = sizes
    x, y, z = t(d, c * 5 * 5), t(d, c * p), t(p, q * q * 3)
    rules = """
    x: {to: x2, view: o (c p q) -> o c p q, sizes: {c: C, p: q}}
    y: {to: y2, view: o (c p) -> c o p, sizes: {c: image.channels}}
    z: {to: z2, view: d (a b e) -> (d a) b e, sizes: {a: b, e: 3}}
    """.replace("C,", f"{c},")
    want = {
        "x2": x.reshape(d, c, 5, 5),
        "y2": y.reshape(d, c, p).permute(1, 0, 2),
        "z2": z.reshape(p * q, q, 3),
    }
    check(rules, {"x": x, "y": y, "z": z}, want, facts={"image.channels": c})


def test_a_fact_that_is_not_known_is_an_error_and_never_one():
    table = RuleTable(compiled("y: {to: y2, view: (h k) -> h k, sizes: {h: image.heads}}").rules)
    (text,) = faults(table, {"y": t(6)})
    assert "cannot infer axes h and k: pass facts={'image.heads': ...}" in text
    assert text.startswith("example.yaml:8:5: rule 'y: ")


def test_a_size_that_does_not_fit_is_an_error():
    table = RuleTable(compiled("y: {to: y2, view: (h k) d -> h k d, sizes: {h: 4, d: 3}}").rules)
    assert "an axis of length 6 cannot be (h k) with h=4" in faults(table, {"y": t(6, 3)})[0]
    assert "declared 3" in faults(table, {"y": t(8, 2)})[0]
    assert "needs 2 axes, the tensor is [6]" in faults(table, {"y": t(6)})[0]


# --- joins ---


def test_concat_in_the_listed_order(sizes):
    n, d, _, _ = sizes
    q, k, v = t(n, d), t(n, d), t(n, d)
    rules = r"attn.(q|k|v).weight: {to: attn.qkv.weight, concat: 0}"
    tensors = {"attn.k.weight": k, "attn.v.weight": v, "attn.q.weight": q}
    check(rules, tensors, {"attn.qkv.weight": torch.cat([q, k, v])})
    rules = rules.replace("concat: 0", "concat: 1").replace("(q|k|v)", "(v|k|q)")
    check(rules, tensors, {"attn.qkv.weight": torch.cat([v, k, q], 1)})


def test_concat_by_order_option():
    q, k, v = t(2, 3), t(2, 3), t(2, 3)
    rules = "(q|k|v): {to: w, concat: 0, order: [v, q, k]}"
    check(rules, {"q": q, "k": k, "v": v}, {"w": torch.cat([v, q, k])})


def test_concat_of_unequal_parts_needs_parts():
    tensors = {"q": t(4, 3), "k": t(2, 3), "v": t(2, 3)}
    whole_ = torch.cat([tensors["q"], tensors["k"], tensors["v"]])
    table = RuleTable(compiled("(q|k|v): {to: w, concat: 0}").rules)
    assert "cannot be cut in proportions" in faults(table, tensors)[0]
    table = RuleTable(compiled("(q|k|v): {to: w, concat: 0, parts: [1, 1, 2]}").rules)
    assert "parts [1, 1, 2] are declared on axis 0, the members are [4, 2, 2] long" in faults(table, tensors)[0]
    check("(q|k|v): {to: w, concat: 0, parts: [2, 1, 1]}", tensors, {"w": whole_})
    check("(q|k|v): {to: w, concat: 0, parts: ['*', 2, 2]}", tensors, {"w": whole_})


def test_equal_parts_are_checked_where_their_sum_would_divide():
    table = RuleTable(compiled("(q|k): {to: w, concat: 0}").rules)
    assert "equal parts are declared on axis 0, the members are [4, 2] long" in faults(table, {"q": t(4), "k": t(2)})[0]


def test_concat_on_a_named_axis_of_grouped_queries(sizes):
    """Falcon, InternLM: for each group r query heads, then one key and one value head."""
    groups, queries, width, d = sizes
    q, k, v = t(groups * queries * width, d), t(groups * width, d), t(groups * width, d)
    rules = (
        "a.(q|k|v): {to: qkv, view: (g r h) d -> g r h d, concat: r, parts: ['*', 1, 1], then: g r h d -> (g r h) d}"
    )
    parts = [q.reshape(groups, queries, width, d), k.reshape(groups, 1, width, d), v.reshape(groups, 1, width, d)]
    want = {"qkv": torch.cat(parts, 1).reshape(-1, d)}
    more = "sizes: {g: text.groups, h: text.head_width}\n"
    facts = {"text.groups": groups, "text.head_width": width}
    check(rules, {"a.q": q, "a.k": k, "a.v": v}, want, more, facts)


def test_gate_and_up_in_alternate_rows(sizes):
    n, d, _, _ = sizes
    gate, up = t(n, d), t(n, d)
    rules = "(gate|up): {to: both, view: n d -> n 1 d, concat: 1, then: n two d -> (n two) d, sizes: {two: 2}}"
    check(rules, {"gate": gate, "up": up}, {"both": torch.stack([gate, up], 1).reshape(2 * n, d)})
    rules = "(gate|up): {to: both, stack: 1, then: n two d -> (n two) d, sizes: {two: 2}}"
    check(rules, {"gate": gate, "up": up}, {"both": torch.stack([gate, up], 1).reshape(2 * n, d)})


def test_rotary_halves(sizes):
    """Pairs side by side become halves apart: (2i, 2i+1) to (i, i + w/2)."""
    heads, half, d, _ = sizes
    x = t(heads * half * 2, d)
    rules = "w: {to: v, view: (h k two) d -> (h two k) d, sizes: {h: text.heads, two: 2}}"
    want = x.reshape(heads, half, 2, d).transpose(1, 2).reshape(-1, d)
    check(rules, {"w": x}, {"v": want}, facts={"text.heads": heads})


def test_stack_by_index_and_by_alternatives(sizes):
    a, b, _, _ = sizes
    layers = [t(a, b) for _ in range(11)]  # 10 comes after 9, not after 1
    check(
        r"l.(\d+).w: {to: all, stack: 0}", {f"l.{i}.w": v for i, v in enumerate(layers)}, {"all": torch.stack(layers)}
    )
    x, y = t(a, b), t(a, b)
    check("(x|y): {to: both, stack: 2}", {"x": x, "y": y}, {"both": torch.stack([x, y], 2)})


def test_a_gap_in_an_index_is_an_error():
    table = RuleTable(compiled(r"l.(\d+).w: {to: all, stack: 0}").rules)
    assert "the index has a gap: 3 exists, 2 does not" in faults(table, {f"l.{i}.w": t(2) for i in (0, 1, 3)})[0]


def test_a_missing_member_is_named():
    table = RuleTable(compiled(r"l.(\d+).(q|k|v): {to: l.\1.qkv, concat: 0}").rules)
    tensors = {"l.0.q": t(2), "l.0.v": t(2), "l.1.q": t(2), "l.1.k": t(2), "l.1.v": t(2)}
    (text,) = faults(table, tensors)
    assert "the join lacks 1 of 3 members" in text and "missing: l.0.k" in text


def test_stacks_of_stacks_then_concat(sizes):
    """Layers times experts, and in each gate before up."""
    n, d, _, _ = sizes
    tensors = {f"l.{i}.e.{j}.{p}": t(n, d) for i in range(2) for j in range(3) for p in ("gate", "up")}

    def expert(i, j):
        return torch.cat([tensors[f"l.{i}.e.{j}.gate"], tensors[f"l.{i}.e.{j}.up"]], 0)

    want = {"w": torch.stack([torch.stack([expert(i, j) for j in range(3)]) for i in range(2)])}
    check(r"l.(\d+).e.(\d+).(gate|up): {to: w, concat: 0}", tensors, want)
    single = {key: value for key, value in tensors.items() if key.endswith("up")}
    want = {"w": torch.stack([torch.stack([single[f"l.{i}.e.{j}.up"] for j in range(3)]) for i in range(2)])}
    check(r"l.(\d+).e.(\d+).up: {to: w, stack: 0}", single, want)
    want = {"w": torch.stack([torch.stack([single[f"l.{i}.e.{j}.up"] for j in range(3)], 1) for i in range(2)])}
    check(r"l.(\d+).e.(\d+).up: {to: w, stack: 1}", single, want)
    kept = {f"w.{i}": torch.stack([expert(i, j) for j in range(3)]) for i in range(2)}
    check(r"l.(\d+).e.(\d+).(gate|up): {to: w.\1, concat: 0}", tensors, kept)


def test_two_stacks_share_the_members(sizes):
    """The first members make one tensor, the others another one, which is counted from 0."""
    n, d, _, _ = sizes
    tensors = {f"e.{i}.{p}": t(n, d) for i in range(5) for p in ("gate", "up")}

    def experts(numbers):
        return torch.stack([torch.cat([tensors[f"e.{i}.gate"], tensors[f"e.{i}.up"]], 0) for i in numbers])

    want = {"text": experts(range(2)), "image": experts(range(2, 5))}
    numbers = r"""
        e.(\d+<2).(gate|up): {to: text, concat: 0}
        e.(\d+>=2).(gate|up): {to: image, concat: 0}
    """
    check(numbers, tensors, want)
    by_fact = numbers.replace("<2", "<text.experts").replace(">=2", ">=text.experts")
    check(by_fact, tensors, want, facts={"text.experts": 2})
    single = {key: value for key, value in tensors.items() if key.endswith("up")}
    want = {"image": torch.stack([single[f"e.{i}.up"] for i in range(2, 5)], 1)}
    check(r"e.(\d+>=2<5).up: {to: image, stack: 1}", {f"e.{i}.up": single[f"e.{i}.up"] for i in range(2, 5)}, want)


def test_a_stack_of_a_range_has_no_gap_at_its_start():
    table = RuleTable(compiled(r"e.(\d+>=2).w: {to: all, stack: 0}").rules)
    assert "the index has a gap: 4 exists, 2 does not" in faults(table, {f"e.{i}.w": t(2) for i in (3, 4)})[0]


def test_a_stack_that_is_longer_than_its_range_is_not_cut():
    back = RuleTable(compiled(r"e.(\d+<3).w: {to: all, stack: 0}").rules).inverse()
    (text,) = faults(back, {"all": t(4, 2)})
    assert "axis 0 of [4, 2] is too long for the indices 0 to 2" in text


def test_rows_by_ranges(sizes):
    """Long-CLIP: the first rows of one table, the others of another."""
    n, d, _, _ = sizes
    old, new = t(n + 1, d), t(n + 1, d)
    rules = "(old|new): {to: w, rows: [[0, 2], [2, null]], oneway: true}"
    check(rules, {"old": old, "new": new}, {"w": torch.cat([old[:2], new[2:]])}, back=False)


def test_take_leaves_rows_out_before_the_view(sizes):
    """A position table's grid without its class row."""
    n, d, _, _ = sizes
    x = t(n * n + 1, d)
    mapping = compiled("pos: {to: grid, take: [1, null], view: (h w) d -> 1 h w d, sizes: {h: w}, oneway: true}")
    same(run(RuleTable(mapping.rules), {"pos": x})[0], {"grid": x[1:].reshape(1, n, n, d)})
    x = t(7, d)
    check("pos: {to: tail, take: [1, null], oneway: true}", {"pos": x}, {"tail": x[1:]}, back=False)
    check("pos: {to: part, take: [1, 3], view: n d -> d n, oneway: true}", {"pos": x}, {"part": x[1:3].T}, back=False)


def test_take_of_rows_that_are_not_there_is_a_fault():
    for rows in ("[5, null]", "[1, 7]"):
        table = RuleTable(compiled(f"a: {{to: b, take: {rows}, oneway: true}}").rules)
        assert "do not exist in" in faults(table, {"a": t(5, 2)})[0]
        assert "do not exist in" in faults(table, {"a": t()})[0]


def test_rows_must_fill_the_table_once():
    for rows in ("[[0, 2], [3, null]]", "[[0, 2], [1, null]]", "[[0, 2], [2, 4]]"):
        table = RuleTable(compiled(f"(a|b): {{to: w, rows: {rows}, oneway: true}}").rules)
        assert "do not fill 5 rows, each once" in faults(table, {"a": t(5), "b": t(5)})[0]


def test_a_member_of_zeros_is_added_and_is_checked_on_the_way_back(sizes):
    """EVA: there is no bias of k."""
    n = sizes[1]
    q, v = t(n), t(n)
    table = RuleTable(compiled("attn.(q|v)_bias: {to: qkv.bias, concat: 0, order: [q, 0, v]}").rules)
    got, seen = run(table, {"attn.v_bias": v, "attn.q_bias": q})
    assert not seen
    same(got, {"qkv.bias": torch.cat([q, torch.zeros(n), v])})
    back, (zeros,) = run(table.inverse(), got)
    same(back, {"attn.q_bias": q, "attn.v_bias": v})
    assert zeros.value == 0 and zeros.layout.shape == (n,)
    assert not materialise(zeros.layout, got.__getitem__).any()
    got["qkv.bias"][n] = 1.0  # not zero: the check reads exactly this part
    assert float(materialise(zeros.layout, got.__getitem__).sum()) == 1.0


# --- values ---


def test_add_a_key_and_a_row_of_a_key(sizes):
    n, d, _, _ = sizes
    cls, pos, x, y = t(d), t(n, d), t(n, d), t(n, d)
    rules = """
    cls: {to: token, view: d -> 1 1 d, add: 'pos[0]', oneway: true}
    pos: positions
    x: {to: sum, add: y, oneway: true}
    y: y2
    """
    want = {"token": (cls + pos[0])[None, None], "positions": pos, "sum": x + y, "y2": y}
    table = check(rules, {"cls": cls, "pos": pos, "x": x, "y": y}, want, back=False)
    back = apply_rules(table.inverse(), {k: whole(k, tuple(v.shape), v.dtype) for k, v in want.items()}, {})
    assert list(back.left) == ["token", "sum"]  # no way back for these two


def test_add_of_a_key_that_is_missing_is_an_error():
    table = RuleTable(compiled("x: {to: sum, add: y, oneway: true}").rules)
    assert "it adds 'y', which is not in the file" in faults(table, {"x": t(2)})[0]


def test_times_plus_and_root(sizes):
    n, d, _, _ = sizes
    x, y, z = t(n, d), t(n), t(n)
    rules = """
    x: {to: a, times: sqrt 1}
    y: {to: b, times: 0.5, plus: 1}
    z: {to: c, plus: -1.5}
    """
    got = run(RuleTable(compiled(rules).rules), {"x": x, "y": y, "z": z}, checks=False)
    for key, want in (("a", x * d**0.5), ("b", y * 0.5 + 1), ("c", z - 1.5)):
        torch.testing.assert_close(got[key], want)
    back, _ = run(RuleTable(compiled(rules).rules).inverse(), got)
    for key, want in (("x", x), ("y", y), ("z", z)):
        torch.testing.assert_close(back[key], want)
    assert not RuleTable(compiled("x: {to: a, times: 0, oneway: true}").rules).inverse().rules


# --- cuts ---


def test_split_in_proportions(sizes):
    n, d, _, _ = sizes
    x = t(3 * n, d)
    check(r"in_proj: {to: 'p.(q|kv).w', split: [1, 2]}", {"in_proj": x}, {"p.q.w": x[:n], "p.kv.w": x[n:]})
    x = t(n, d * 4)
    rules = r"l.(\d+).in: {to: '(a|b|c).\1', split: [1, 1, 2], axis: 1}"
    check(rules, {"l.7.in": x}, {"a.7": x[:, :d], "b.7": x[:, d : 2 * d], "c.7": x[:, 2 * d :]})


def test_split_that_does_not_divide_is_an_error():
    table = RuleTable(compiled("a: {to: '(p|q)', split: [1, 2]}").rules)
    assert "an axis of length 4 cannot be cut in proportions [1, 2]" in faults(table, {"a": t(4)})[0]


def test_unstack(sizes):
    n, d, _, _ = sizes
    x, y = t(n, d), t(d, n, 2)
    want = {f"block.{i}.w": x[i] for i in range(n)} | {f"other.{i}": y[:, i] for i in range(n)}
    rules = """
    scanned.w: {to: block.<layer>.w, unstack: layer}
    tall: {to: other.<k>, unstack: k, axis: 1}
    """
    check(rules, {"scanned.w": x, "tall": y}, want)


def test_scanned_layers_are_joined_and_unstacked_in_one_rule(sizes):
    layers, n, d, _ = sizes
    q, k = t(layers, n, d), t(layers, n, d)
    want = {f"l.{i}.qk": torch.cat([q[i], k[i]]) for i in range(layers)}
    check("scan.(q|k): {to: l.<layer>.qk, concat: 1, unstack: layer}", {"scan.k": k, "scan.q": q}, want)


def test_view_join_then_cut_in_one_rule(sizes):
    """All four, in their fixed order, whatever the order in the file."""
    a, b, c, _ = sizes
    x, y = t(a, b, c), t(a, b, c)
    rules = r"(x|y): {split: [1, 1], then: s c (b a) -> (s b) a c, stack: 0, view: a b c -> c (b a), to: '(p|q).w'}"
    joined = torch.stack([v.permute(2, 1, 0).reshape(c, b * a) for v in (x, y)])
    whole_ = joined.reshape(2, c, b, a).permute(0, 2, 3, 1).reshape(2 * b, a, c)
    want = {"p.w": whole_[:b], "q.w": whole_[b:]}
    check(rules, {"x": x, "y": y}, want, "sizes: {a: image.a, s: 2}\n", {"image.a": a})


# --- ties ---


def test_tied_targets_and_their_check_on_the_way_back():
    x = t(2, 3)
    table = RuleTable(compiled("table: {to: [embedding.weight, decoder.weight], view: a b -> b a}").rules)
    got, _ = run(table, {"table": x})
    same(got, {"embedding.weight": x.t(), "decoder.weight": x.t()})
    back, (tie,) = run(table.inverse(), got)
    same(back, {"table": x})
    assert isinstance(tie.value, Layout) and tie.key == "decoder.weight"

    def equal(tensors):
        read = tensors.__getitem__
        one, two = tie.layout, tie.value
        return torch.equal(materialise(one, read), materialise(two, read).reshape(one.shape))

    assert equal({"embedding.weight": x.t().contiguous(), "decoder.weight": x.t().contiguous()})
    assert not equal({"embedding.weight": x.t().contiguous(), "decoder.weight": -x.t().contiguous()})
    back, seen = run(table.inverse(), {"embedding.weight": x.t()})  # one of the two is enough
    assert not seen
    same(back, {"table": x})


def test_tied_targets_that_are_cut():
    x = t(6)
    table = RuleTable(compiled("w: {to: ['a.(q|kv)', 'b.(q|kv)'], split: [1, 2]}").rules)
    got, _ = run(table, {"w": x})
    same(got, {"a.q": x[:2], "a.kv": x[2:], "b.q": x[:2], "b.kv": x[2:]})
    back, seen = run(table.inverse(), got)
    same(back, {"w": x})
    assert [c.key for c in seen] == ["b.q", "b.kv"]
    assert [c.value.sources for c in seen] == [("a.q",), ("a.kv",)]


# --- ownership ---


def test_rest_owns_what_no_other_rule_owns_both_ways():
    tensors = {"head.fc.weight": t(2), "stem.w": t(3), "head.bias": t(1)}
    rules = r"""
    (.+): {to: trunk.\1, rest: true}
    head.fc.weight: head.weight
    """
    want = {
        "head.weight": tensors["head.fc.weight"],
        "trunk.stem.w": tensors["stem.w"],
        "trunk.head.bias": tensors["head.bias"],
    }
    check(rules, tensors, want)


def test_rest_on_the_way_back_leaves_literal_keys_alone():
    rules = r"""
    (.+): {to: 'trunk.\1', rest: true}
    pos: trunk.pos_embed
    """
    table = RuleTable(compiled(rules).rules)
    x, y = t(2), t(3)
    same(run(table.inverse(), {"trunk.pos_embed": x, "trunk.w": y})[0], {"pos": x, "w": y})


def test_optional_keys_may_be_absent_and_others_may_not():
    from keymap.plan.completeness import incomplete

    mapping = compiled(r"""
    l.(\d+).(w|b): m.\1.\2
    l.(\d+).scale: {to: m.\1.gamma, optional: true}
    """)
    keys = ["l.0.w", "l.0.b", "l.1.w", "l.1.b", "l.1.scale"]
    assert incomplete(mapping, mapping.rules, keys) == []
    (fault,) = incomplete(mapping, mapping.rules, keys[:3])
    assert "the image tower is incomplete; missing keys: l.1.b" in fault.text
    (fault,) = incomplete(mapping, mapping.rules, [*keys[:2], *(k.replace(".1.", ".2.") for k in keys[2:])])
    assert "l.1.w, l.1.b" in fault.text  # the gap
    assert incomplete(mapping, mapping.rules, ["other"]) == []


def test_two_keys_that_become_one_are_fatal():
    table = RuleTable(compiled("a: b").rules)
    layouts = {key: whole(key, (2,), torch.float32) for key in ("a", "b")}
    (fault,) = apply_rules(table, layouts, {}, pass_others=True).faults
    assert fault.fatal and "a" in fault.sources and "b" in fault.sources


# --- conditions ---

VARIANTS = r"""
variants:
  - when: {all: [head.fc.weight], none: [head.mlp.weight]}
    when_hub: {all: [out.proj]}
    towers:
      image:
        head.fc.weight: {to: out.proj, view: a b -> b a}
  - when: {all: [head.mlp.weight]}
    when_hub: {all: [out.mlp]}
    towers:
      image:
        head.mlp.weight: out.mlp
        head.fc.weight: out.fc
"""


@pytest.mark.parametrize("both", [False, True])
def test_variants_both_ways(both):
    known = registry()
    mapping = compiled("x: y\nstem.(w|b): s.\\1", VARIANTS)
    tensors = {"x": t(1), "stem.w": t(2), "stem.b": t(2), "head.fc.weight": t(2, 3)}
    want = {"y": tensors["x"], "s.w": tensors["stem.w"], "s.b": tensors["stem.b"]}
    if both:
        tensors["head.mlp.weight"] = t(4)
        want |= {"out.mlp": tensors["head.mlp.weight"], "out.fc": tensors["head.fc.weight"]}
    else:
        want |= {"out.proj": tensors["head.fc.weight"].t()}
    from keymap.plan.from_hub import from_hub
    from keymap.plan.to_hub import to_hub
    from keymap.source.detect import Detection

    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    now = to_hub(Detection(mapping, layouts, (), (), ()), {})
    assert not now.faults and not now.unowned
    there = {key: materialise(layout, tensors.__getitem__) for key, layout in now.tensors.items()}
    same(there, want)
    from_hub(known.hub, mapping, now, {})
    assert not now.faults and not now.unowned
    same({key: materialise(layout, tensors.__getitem__) for key, layout in now.tensors.items()}, tensors)
    assert len(list(samples(mapping, known))) == 3


ALIASES = r"""
aliases:
  - params/(.+): \1
  - when: {all: [old.w], none: [new.w]}
    old.(w|b): new.\1
  - when: {any: ['scan/(.+)']}
    scan/(.+): {to: 'l_<layer>/\1', unstack: layer}
  - new.(.+): newest.\1
"""


def after_aliases(keys):
    mapping = compiled(r"newest.(w|b): n.\1", ALIASES)
    found, faults, _ = apply_aliases(
        mapping, {key: whole(key, shape, torch.float32) for key, shape in keys.items()}, {}
    )
    return {key: layout.shape for key, layout in found.items()}, [fault.text for fault in faults]


def test_aliases_run_in_order_each_under_its_condition():
    assert after_aliases({"params/old.w": (2,), "params/old.b": (3,)}) == ({"newest.w": (2,), "newest.b": (3,)}, [])
    assert after_aliases({"old.w": (2,), "new.w": (3,)}) == ({"old.w": (2,), "newest.w": (3,)}, [])
    assert after_aliases({"old.b": (2,)}) == ({"old.b": (2,)}, [])
    assert after_aliases({"params/scan/k": (2, 5)}) == ({"l_0/k": (5,), "l_1/k": (5,)}, [])
    assert after_aliases({"newest.w": (2,)}) == ({"newest.w": (2,)}, [])


def test_aliases_that_rename_two_keys_to_one_are_refused():
    _, faults = after_aliases({"params/newest.w": (2,), "newest.w": (2,)})
    assert "newest.w" in faults[0]


# --- what a format fixes ---


def test_scalars_and_dtypes_are_written_as_the_format_has_them(tmp_path):
    text = HEAD.replace("any: [x]", "any: [mine.scale]").replace("image: native_vit", "text: flat")
    text += "shapes:\n  mine.scale: [1]\ndtypes:\n  mine.w: float16\ntowers:\n"
    text += "  scale:\n    mine.scale: logit_scale\n  text:\n    mine.w: ln_final.weight\n    mine.b: ln_final.bias\n"
    (tmp_path / "example.yaml").write_text(text, encoding="utf-8")
    state = {"mine.scale": t(1), "mine.w": t(3).half(), "mine.b": t(3)}
    hub = keymap.convert_state_dict(state, to="open_clip_flat", mapping=tmp_path / "example.yaml")
    same(
        hub, {"logit_scale": state["mine.scale"], "ln_final.weight": state["mine.w"], "ln_final.bias": state["mine.b"]}
    )
    mapping = compile_mapping(text, "example.yaml")
    assert [(str(side), shape) for side, shape in mapping.shapes] == [("mine.scale", (1,))]
    assert [(str(side), name) for side, name in mapping.dtypes] == [("mine.w", "float16")]


# --- what does not fit is a fault with its place, never a crash ---

MISFITS = {
    "rows beyond the end": ("(a|b): {to: w, rows: [[0, 7], [7, null]], oneway: true}", {"a": (5,), "b": (5,)}),
    "rows of a scalar": ("(a|b): {to: w, rows: [[0, 7], [7, null]], oneway: true}", {"a": (), "b": ()}),
    "rows of different shapes": ("(a|b): {to: w, rows: [[0, 1], [1, null]], oneway: true}", {"a": (2,), "b": (3,)}),
    "a row that is not there": ("a: {to: w, add: 'b[5]', oneway: true}\nb: b", {"a": (3,), "b": (5, 3)}),
    "a row of a scalar": ("a: {to: w, add: 'b[0]', oneway: true}\nb: b", {"a": (), "b": ()}),
    "a sum of other shape": ("a: {to: w, add: b, oneway: true}\nb: b", {"a": (3,), "b": (4,)}),
    "the root of an axis that is not there": ("a: {to: w, times: sqrt 1, oneway: true}", {"a": (3,)}),
    "concat on an axis that is not there": ("(a|b): {to: w, concat: 1}", {"a": (3,), "b": (3,)}),
    "concat of scalars": ("(a|b): {to: w, concat: 0}", {"a": (), "b": ()}),
    "concat of other widths": ("(a|b): {to: w, concat: 0}", {"a": (3, 2), "b": (3, 4)}),
    "concat of other ranks": ("(a|b): {to: w, concat: 0}", {"a": (3, 2), "b": (3,)}),
    "a part that is empty": ("(a|b): {to: w, concat: 0, parts: ['*', 3]}", {"a": (0,), "b": (3,)}),
    "a stack on an axis that is not there": ("(a|b): {to: w, stack: 3}", {"a": (3,), "b": (3,)}),
    "a stack of other shapes": ("(a|b): {to: w, stack: 0}", {"a": (3,), "b": (4,)}),
    "a split on an axis that is not there": ("a: {to: '(p|q)', split: [1, 1], axis: 1}", {"a": (4,)}),
    "an unstack of a scalar": ("a: {to: 'p.<n>', unstack: n}", {"a": ()}),
    "a view of other rank": ("a: {to: p, view: x y -> y x}", {"a": (2, 3, 4)}),
    "then of other rank": ("(a|b): {to: p, stack: 0, then: x y -> y x}", {"a": (2, 3), "b": (2, 3)}),
    "a view that does not divide": ("a: {to: p, view: (x y) -> x y, sizes: {x: 4}}", {"a": (6,)}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_reported(name):
    rules, shapes = MISFITS[name]
    layouts = {key: whole(key, shape, torch.float32) for key, shape in shapes.items()}
    (fault,) = apply_rules(RuleTable(compiled(rules).rules), layouts, {}).faults
    assert fault.text.startswith("example.yaml:8:5: rule '")
    assert "(from a " in fault.text and not fault.fatal
    assert set(fault.sources) <= set(shapes)


def test_an_unstack_on_the_way_back_needs_every_index():
    back = RuleTable(compiled("a: {to: 'p.<n>', unstack: n}").rules).inverse()
    layouts = {key: whole(key, (2,), torch.float32) for key in ("p.0", "p.2")}
    (fault,) = apply_rules(back, layouts, {}).faults
    assert "the index has a gap: 2 exists, 1 does not" in fault.text


def _by_hand(table: RuleTable, key: str):
    """The rule that owns a key, every rule asked in turn."""
    for rule in sorted(table.rules, key=lambda rule: rule.rest):
        values = rule.match(key)
        if values is not None:
            return rule, values
    return None


@pytest.mark.parametrize("name", sorted(m.name for m in registry().mappings.values() if m.rules))
def test_keys_that_differ_only_in_numbers_are_owned_alike(name):
    mapping, rng = registry().mappings[name], random.Random(name)
    numbers = ["0", "1", "2", "7", "10", "23", "007", "00", "123456789", "1234567890"]
    for rules in (mapping.rules, RuleTable(mapping.rules).inverse().rules):
        table, owned = RuleTable(rules), 0
        sides = [rule.source for rule in rules]
        keys = [re.sub("[0-9]+", lambda _: rng.choice(numbers), side.sample) for side in sides for _ in range(6)]
        keys += [side.sample for side in sides]
        rng.shuffle(keys)
        for key in keys:
            found, expected = table.find(key), _by_hand(table, key)
            assert (found is None) == (expected is None), key
            if found is not None and expected is not None:
                assert found[0] is expected[0] and list(found[1].items()) == list(expected[1].items()), key
                owned += 1
        assert owned >= len(rules)


@pytest.mark.parametrize("order", [["x.0.w", "x.1.w", "x.5.w"], ["x.5.w", "x.0.w", "x.1.w"], ["x.07.w", "x.1.w"]])
@pytest.mark.parametrize("pattern", ["x.(0|1).w", r"x.(\d+).w"])
def test_a_rest_rule_that_saw_a_like_key_first_owns_no_more_for_it(pattern, order):
    rules = f"{pattern}: visual.\\1.first\nx.(.+): {{to: visual.\\1, rest: true}}"
    table = RuleTable(compiled(rules).rules)
    for key in order:
        found, expected = table.find(key), _by_hand(table, key)
        assert found is not None and expected is not None and found[0] is expected[0], key


def test_tensors_cut_into_too_many_keys_are_no_load_in_part_either():
    """The rules that come after are not carried out, so what they own must not be lost without a word."""
    table = RuleTable(compiled(r"k(\d+).x: {to: 'visual.k\1.<l>', unstack: l}").rules)
    few, many = ({f"k{n}.x": whole(f"k{n}.x", (4_000, 1), torch.float32) for n in range(count)} for count in (2, 4))
    assert not apply_rules(table, few, {}).faults
    (fault,) = apply_rules(table, many, {}).faults
    assert (
        fault.fatal and "more than 10416 keys" in fault.text
    )  # 10,000, 100 for each key, and 1 for each 1000 elements


def test_a_large_tensor_is_cut_into_more_slices_than_a_small_one():
    table = RuleTable(compiled("w: {to: 'visual.<l>', unstack: l}").rules)
    large, small = (whole("w", (12_000, width), torch.float32) for width in (200, 2))
    found = apply_rules(table, {"w": large}, {})
    assert not found.faults and len(found.out) == 12_000
    assert "too much to cut apart" in apply_rules(table, {"w": small}, {}).faults[0].text
