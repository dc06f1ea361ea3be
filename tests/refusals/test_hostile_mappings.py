"""An untrusted mapping is data: reading and using it takes few steps and little memory, whatever it contains.

Each is refused with its place in the file, or works like any other mapping.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from bounds import bounded, ends
from fuzz.seeds import TINY
from hostile_files import entry, safetensors_bytes
from peers import openclip
from peers.common import assert_unchanged, bits
from test_mapping_errors import GOOD, HEAD, rules

import keymap
from keymap.errors import MappingError
from keymap.language.compile import compile_mapping
from keymap.language.pattern import PatternError, Side
from keymap.language.pattern_syntax import parse_source
from keymap.source.registry import registry
from keymap.source.samples import samples

OWN = HEAD.replace("[x]", "[w]")


def own(*lines: str, more: str = "") -> str:
    return rules(*lines, more=more).replace("[x]", "[w]")


def tables(count: int, width: int, last: str = "    a{j}: b{j}\n") -> str:
    """Tables that continue with the next one, ``width`` times each."""
    text = "tables:\n"
    for i in range(count):
        row = f"    a{{j}}.: {{{{to: b{{j}}., table: t{i + 1}}}}}\n" if i < count - 1 else last
        text += f"  t{i}:\n" + "".join(row.format(j=j) for j in range(width))
    return text


def lines(form: str, count: int) -> list[str]:
    return [form.replace("#", str(i)) for i in range(count)]


FIRST = "a.: {to: b., table: t0}"
NINE = r"(\w+)." * 9
REFUSED: dict[str, tuple[str, str]] = {
    "tables that multiply": (rules(FIRST, more=tables(7, 10)), "more than 1000 rules and patterns"),
    "tables that multiply to nothing": (rules(FIRST, more=tables(7, 10, "") + "    {}\n"), ""),
    "a chain of tables": (rules(FIRST, more=tables(1500, 1)), "lie in at most 8 others"),
    "alternatives that multiply": (rules("'" + "(a|b)" * 60 + "': x"), "kinds of keys: the limit is 1000"),
    "indices that multiply": (rules("'" + r"(\d+)." * 9 + "': x"), "kinds of keys: the limit is 1000"),
    "alternatives in the target": (rules("a: {to: '" + "(a|b)" * 60 + "', split: [1, 1]}"), "the limit is 1000"),
    "many alternatives, many times": (
        rules(*[f"'k{i}.({'|'.join(f'a{j}' for j in range(40))})': 'v{i}.\\1'" for i in range(200)]),
        "too many, or too much alike",
    ),
    "patterns that are much alike": (
        rules(*[f"'{NINE[: 6 * (1 + i % 8)]}" + r"(\w+)" + f"{'x' * 9}{i}': b{i}" for i in range(300)]),
        "",
    ),
    "a long pattern": (rules("a" * 513 + ": b"), "f.yaml:8:5"),
    "a long pattern by tables": (
        rules(f"{'a' * 300}.: {{to: b., table: t0}}", more=f"tables:\n  t0:\n    {'c' * 300}: d\n"),
        "a pattern of 601 characters",
    ),
    "a long target": (rules("a: " + "b" * 3000), "a pattern of 3000 characters"),
    "targets without end": (rules("a: {to: [" + ", ".join(lines("b#", 5000)) + "]}"), "f.yaml:8:9"),
    "arithmetic with a number without end": (rules(r"'a(\d+).(0|1)': 'b<1*999999999+2>'"), "must list 0 to 999999998"),
    "arithmetic with many digits": (rules(rf"'a(\d+)': 'b<1+{'9' * 400}>'"), "write <1+1>"),
    "a superscript digit for a group": (rules(r"'a(b|c)': 'd\²'"), "the number of a group"),
    "a superscript digit in a lookup": (rules("'a(b|c)': 'd<²:x>'"), "write <1+1>"),
    "a superscript digit for a row": (rules("a: {to: b, add: 'c[²]', oneway: true}"), "write a key, or key[0]"),
    "evidence without end": (HEAD.replace("[x]", f"[{', '.join(lines('x#', 9000))}]") + GOOD, "more than 1000 rules"),
    "ignored keys without end": (
        rules("a: b", more="ignore:\n" + "\n".join(lines("  d#: why", 5000)) + "\n"),
        "more than 1000",
    ),
    "variants without end": (
        rules("a: b", more="variants:\n" + "\n".join(lines(
            "  - {when: {all: [x]}, when_hub: {all: [y]}, towers: {image: {c#: d}}}", 900))),
        "more than 1000",
    ),
    "variants, and rules that begin alike": (
        rules(*lines(r"'(\d+).x#': '\1.y#'", 300), more="variants:\n" + "\n".join(lines(
            "  - {when: {all: [q#]}, when_hub: {all: [q#]}, towers: {image: {q#: r#}}}", 80)) + "\n"),
        "",
    ),
    "fields that are unknown": (HEAD + "\n".join(lines("z#: 1", 9000)) + "\n" + GOOD, "there is no field 'z0' here"),
    "options that are unknown": (rules(*lines("a#: {to: b#, x: 1}", 3000)), "there is no field 'x' here"),
    "sizes without end": (rules("a: b", more=f"sizes: {{{', '.join(lines('k#: 2', 5000))}}}\n"), "f.yaml:9:1"),
    "zeros without end": (rules(f"(a|b): {{to: c, concat: 0, order: [a, b{', 0' * 20_000}]}}"), "f.yaml:8:31"),
    "parts without end": (rules(f"(a|b): {{to: c, concat: 0, parts: [1{', 1' * 20_000}]}}"), "f.yaml:8:31"),
    "axes without end": (rules(f"a: {{to: b, view: {'1 ' * 900}-> a}}"), "more than 16 axes"),
    "many axes": (rules(f"a: {{to: b, view: ({' '.join(lines('a#', 17))}) -> {' '.join(lines('a#', 17))}}}"),
        "more than 16 axes"),
    "a number of base 60": (HEAD + f"notes: [{'1:' * 1000}1]\n" + GOOD, "a number of 2001 characters"),
    "a text of eighty thousand": (HEAD + f"notes: [{'x' * 80_000}]\n" + GOOD, "a text of 80000 characters"),
    "a key of eighty thousand": (HEAD + f"? {'x' * 80_000}\n: 1\n" + GOOD, "a text of 80000 characters"),
    "a number in hexadecimal": (rules(f"(a|b): {{to: c, concat: 0, parts: [0x{'f' * 4000}, 1]}}"), "a number of 4002"),
    "infinity": (rules("a: {to: b, times: .inf, oneway: true}"), ".inf is too large, or not a number"),
    "no number": (rules("a: {to: b, plus: .nan, oneway: true}"), ".nan is too large, or not a number"),
    "a number beyond all files": (rules("(a|b): {to: c, concat: 0, parts: [9007199254740993, 1]}"), "too large"),
    "nested without end": ("a: " + "[" * 60_000, "nested deeper than 12 levels"),
    "documents without end": ("--- a\n" * 20_000, "a second document"),
    "comments alone": ("#\n" * 60_000, "the file is empty"),
    "depths without end": (rules(*lines(r"'(**.)a#': '\1b#'", 200)), "too many patterns with"),
    "tied keys without end": (
        rules(*[f"a{i}: {{to: b{i}, tied: [{', '.join(f'c{i}.{j}' for j in range(16))}]}}" for i in range(400)]),
        "more than 1000 rules",
    ),
    "ranges that are much alike": (rules(*lines(r"'(\d+>=#<999999999).(\w+)': 'b#.\1.\2'", 300)), ""),
    "a fact with many digits": (rules(f"a: {{to: (b|c), split: ['text.heads * {'9' * 400}', 1]}}"), "f.yaml:8:28"),
    "files to use without end": (rules("a: b", more=f"uses: [{', '.join(lines('n#', 9000))}]\n"), "no mapping 'n0'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_mapping_that_would_take_very_long_is_refused_with_its_place(name: str) -> None:
    text, words = REFUSED[name]
    with bounded(len(text)):
        try:
            compile_mapping(text, "f.yaml", registry().files.get)
            message, faults = "", []
        except MappingError as error:
            message, faults = str(error), error.faults
    assert all(fault.startswith("f.yaml:") for fault in faults)
    assert (words in message) if words else True, message[:1000]
    assert len(message) < 60_000


PATHS = ["../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "a\\\\b", "~root", "c:x", "", "\\0", ".hidden"]


@pytest.mark.parametrize("path", PATHS)
def test_a_mapping_names_no_file_elsewhere(path: str) -> None:
    with pytest.raises(MappingError, match=r"f\.yaml:9:10"):
        compile_mapping(rules("a: b", more=f'config: {{file: "{path}"}}\n'), "f.yaml")


def test_a_lookup_that_many_use_is_held_once() -> None:
    places = "".join(lines("    f#: [{path: a, words: big}]\n", 1500))
    big = ", ".join(lines("k#: #", 3000))
    text = rules("a: b", more=f"config:\n  file: c.json\n  facts:\n{places}lookups:\n  big: {{{big}}}\n")
    with bounded(len(text)):
        compile_mapping(text, "f.yaml")


def test_a_file_that_another_uses_is_held_to_the_schema_too(tmp_path: Path) -> None:
    (tmp_path / "aaa.yaml").write_text(rules("a: b", more="uses: [zzz]\n").replace("example", "aaa", 1))
    for odd in ("tables: 7\n", "tables: {t: 7}\n", "lookups: [a]\n", "facts: {a: {}}\n"):
        (tmp_path / "zzz.yaml").write_text(f"format: zzz\nkind: tables\ntitle: t\n{odd}")
        with pytest.raises(MappingError, match=r"zzz.yaml does not follow"):
            keymap.register_mappings(tmp_path)


# --- patterns at work ---

HARD = [
    r"(\w+).(\w+).(\w+).(\w+).(\w+).(\w+).y",
    r"(\d+).(\d+).(\d+).(\d+).(\d+)",
    r"([^.]+).([^.]+).([^.]+).([^.]+).z",
    r"a(|a_|a_a_|a_a_a_)b(\w+).c",
    r"(|x)(|y)(|z)(|w)(|v)(|u)(|t)(|s)!".replace("!", "#"),
    r"(\w+).(a|b|c|ab|abc).(\w+).(.+)",
    r"(a|aa.a|aa.aa)(|.b)(|.c)(|.d)-(.+)",
    r"x.(\w+)/(\w+):(\w+)#(\w+)@(\w+)~(\w+)-(.+)",
]
KEYS = ["a" * 1_000_000, "a." * 500_000, "1." * 500_000, "a_" * 500_000 + "b.c", "xyzwvuts" * 125_000, "." * 1_000_000,
        "aa.a" * 250_000, "x." + "a/b:c#d@e~f-" * 80_000, "ab" + "c" * 999_998, "\u00e9" * 1_000_000,
        "a\n" * 500_000]  # fmt: skip


@pytest.mark.parametrize("pattern", HARD)
def test_a_key_of_a_megabyte_is_matched_in_linear_time(pattern: str) -> None:
    """What goes back over a megabyte again and again takes hours."""
    side = parse_source(pattern)
    with ends():
        for key in KEYS:
            side.match(key)


def _some_pattern(rng: random.Random) -> str:
    parts = [
        r"(\d+)",
        r"(\w+)",
        "([^.]+)",
        "(**.)",
        "(\\d+>=2<12)",
        "(a|b)",
        "(|a)",
        "(|a.)",
        "(a|aa)",
        "(|a_)",
        "(a.a|a)",
        "a",
        "a.",
        ".",
        "_",
        "1",
        "b/",
    ]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(2, 30))) + rng.choice(["", "(.+)", "z", ".z"])


def test_random_patterns_match_long_keys_in_linear_time() -> None:
    """No pattern of the subset goes back over a key again and again: with half a megabyte that takes many minutes."""
    rng, tried = random.Random("keymap patterns"), 0
    while tried < 250:
        try:
            side = parse_source(_some_pattern(rng))
        except PatternError:
            continue
        tried += 1
        for _ in range(4):
            key = "".join(rng.choices(["a", "a.", "a_", "1", "b", "."], k=3)) * 100_000
            with ends():
                side.match(key)


def test_the_shipped_mappings_are_far_from_the_limits() -> None:
    for mapping in registry().mappings.values():
        every = [
            *mapping.rules,
            *(r for v in mapping.variants for r in v.rules),
            *(r for a in mapping.aliases for r in a.table.rules),
        ]
        assert len(every) < 300
        assert sum(rule.source.readings for rule in every) < 1000
        assert max((len(str(side)) for rule in every for side in (rule.source, *rule.targets)), default=0) < 200


# --- rules at work ---


def checkpoint(folder: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 4 * prod(shape)
        header[key] = entry("F32", shape, at, at + size)
        at += size
    (folder / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(at)))
    return folder / "a.safetensors"


def many(form: str, count: int, shape: Sequence[int] = (1,)) -> dict[str, Sequence[int]]:
    return {form.replace("#", str(i)): shape for i in range(count)}


LOADS: dict[str, tuple[str, dict[str, Sequence[int]], str]] = {
    "slices of an axis without end": (own("w: {to: 'visual.<l>', unstack: l}"), {"w": (2**40, 0)},
        "too much to cut apart"),
    "a million slices": (own("w: {to: 'visual.<l>', unstack: l}"), {"w": (10**6,)}, "too much to cut apart"),
    "a join of two indices": (
        own(r"w.(\d+).(\d+): {to: visual.x, stack: 0}"),
        {**many("w.#.0", 5000), **many("w.0.#", 5000), "w": (1,)},
        "the join lacks",
    ),
    "an index far out": (own(r"w.(\d+).(a|b|c|d): visual.\1.\2"), {"w.999999999.a": (1,), "w": (1,)}, ""),
    "parts beyond the axis": (own("w(|x): {to: visual.y, concat: 0, parts: [9007199254740991, 1]}"), {"w": (3,),
    "wx": (3,)}, "parts"),
    "rows beyond all": (own("w: {to: visual.y, take: [9007199254740990, null], oneway: true}"), {"w": (3,)},
        "do not exist"),
    "an axis beyond all": (own("w(|x): {to: visual.y, concat: 9007199254740991}"), {"w": (3,), "wx": (3,)},
        "does not exist"),
    "a size that is huge": (own("w: {to: visual.y, view: '(a b) -> a b', sizes: {a: 9007199254740991}}"), {"w": (6,)},
        "cannot be"),
    "sizes in a ring": (own("w: {to: visual.y, view: '(a b c) -> a b c', sizes: {a: b, b: c, c: a}}"), {"w": (6,)},
        "cannot infer"),
    "padding without end": (own("w: {to: visual.y, pad: {multiple: 1000000, keep: 3}}"), {"w": (3, 2)},
        "3 rows would get 999997 rows of zeros"),
    "itself added": (own("w: {to: visual.y, add: w, oneway: true}"), {"w": (3,)}, ""),
    "thousands of keys, hundreds of rules": (
        own("w: visual.w", *lines(r"k#.(\w+): visual.k#.\1", 300)),
        {"w": (1,), **{f"k299.{'y' * (i % 50)}{i}": (1,) for i in range(4000)}},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_a_load_by_a_mapping_that_asks_too_much(name: str, tmp_path: Path) -> None:
    text, shapes, words = LOADS[name]
    (tmp_path / "example.yaml").write_text(text, encoding="utf-8")
    path, model = checkpoint(tmp_path, shapes), openclip.clip(seed=5, **TINY)
    before = bits(model)
    with bounded(path.stat().st_size), pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, path, mapping=tmp_path / "example.yaml")
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert words in message, message[:2000]
    if words:
        assert "example.yaml:8:5" in message
    assert_unchanged(model, before)


def test_members_without_a_common_dtype_are_a_fault_of_the_rule(tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(own("w(|x): {to: visual.y, concat: 0}"), encoding="utf-8")
    torch.save({"w": torch.ones(3).to(torch.uint16), "wx": torch.ones(3, dtype=torch.int32)}, tmp_path / "a.pt")
    with pytest.raises(keymap.KeymapError, match=r"example.yaml:8:5.*unlike dtypes"):
        keymap.load_checkpoint(openclip.clip(**TINY), tmp_path / "a.pt", mapping=tmp_path / "example.yaml")


def test_a_mapping_with_as_many_rules_as_may_be_is_registered_in_little_time(tmp_path: Path) -> None:
    """Its samples are made, and held against the evidence of every other format."""
    text = own("w: visual.w", *lines(r"k#.(\d+).(a|b): visual.k#.\1.\2", 330)).replace("example", "crowded", 1)
    (tmp_path / "crowded.yaml").write_text(text, encoding="utf-8")
    with bounded(len(text)):
        mapping = compile_mapping(text, "crowded.yaml")
        assert sum(len(sample.shapes) for sample in samples(mapping, registry())) < 4000


def test_a_mapping_of_json_is_a_mapping_like_any_other() -> None:
    """JSON is YAML: the same limits hold."""
    assert (
        compile_mapping(
            json.dumps({"format": "a", "kind": "tables", "title": "t", "tables": {"t": {"a": "b"}}}), "a"
        ).name
        == "a"
    )
    with pytest.raises(MappingError):
        compile_mapping("[" * 50_000, "a")


def test_a_pattern_that_matches_everything_matches_a_long_key() -> None:
    assert Side(parse_source("(.+)").tokens).match("x" * 1_000_000) is not None


def test_padding_is_bounded_over_all_steps(tmp_path: Path) -> None:
    steps = "".join(
        f"  - w{i}: {{to: w{i + 1}, pad: {{multiple: {9**i}, keep: {9 ** max(i - 1, 0)}}}}}\n" for i in range(7)
    )
    (tmp_path / "example.yaml").write_text(
        own("w: visual.w", "w7: visual.x", more=f"steps:\n{steps}"), encoding="utf-8"
    )
    path = checkpoint(tmp_path, {"w": (1,), "w0": (1,)})
    with bounded(path.stat().st_size), pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(openclip.clip(**TINY), path, mapping=tmp_path / "example.yaml")
    assert "rows of zeros" in str(caught.value)
