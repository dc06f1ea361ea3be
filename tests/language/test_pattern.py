"""Key patterns: what they match, writing as the inverse of matching, overlaps, and time linear in the key's length."""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import pytest
from bounds import ends

from keymap.language.overlap import overlap
from keymap.language.pattern import PatternError, Side
from keymap.language.pattern_syntax import parse_source, parse_target

ALPHABET = "a1_.0"


@cache
def strings(longest=5, alphabet=ALPHABET):
    return ["".join(chars) for n in range(1, longest + 1) for chars in product(alphabet, repeat=n)]


def target(text, source, lookups=None, index=None):
    return parse_target([(text, 0)], source, lookups, index)


# --- rows ---

MATCHES = {  # pattern: (what it matches, with the captures; what it does not)
    "a.b": ({"a.b": ()}, ["axb", "a.b.", "xa.b", "a.b\n", ""]),
    r"l.(\d+).w": ({"l.0.w": ("0",), "l.120.w": ("120",)}, ["l..w", "l.01.w", "l.-1.w", "l.1x.w", "l.1.w.x", "l.٣.w"]),
    r"(\w+).w": ({"a_9.w": ("a_9",), "0.w": ("0",)}, [".w", "a-b.w", "a.b.w", "é.w"]),
    "([^.]+).w": ({"a/b-c é.w": ("a/b-c é",)}, ["a.b.w", ".w"]),
    "(q|k|).w": ({"q.w": ("q",), ".w": ("",)}, ["v.w", "qk.w", "w"]),
    "a.(.+)": ({"a.b": ("b",), "a.b.c/d\n": ("b.c/d\n",)}, ["a.", "b.c"]),
    r"(a|b)(\d+)(x|y)": ({"a10x": ("a", "10", "x")}, ["a10", "c1x", "a1 x"]),
    "a/b:0@c#d~ e-f": ({"a/b:0@c#d~ e-f": ()}, []),
    "a+b(c)".replace("+", "-"): ({"a-bc": ("c",)}, ["a-b", "abc"]),
}


@pytest.mark.parametrize("pattern", MATCHES)
def test_a_pattern_matches_these_keys(pattern):
    side = parse_source(pattern)
    right, wrong = MATCHES[pattern]
    for key, captures in right.items():
        values = side.match(key)
        assert values == {str(i): value for i, value in enumerate(captures, 1)}
        assert side.write(values) == key
    assert [key for key in wrong if side.match(key) is not None] == []
    assert str(side) == pattern
    assert side.literal == ("(" not in pattern)
    assert pattern.startswith(side.prefix)


TARGETS = {  # (source, target): {source key: target key}; what the target side does not match
    (r"s.(\d+)", "l<1+1>"): ({"s.0": "l1", "s.9": "l10"}, ["l0", "l01", "l"]),
    (r"l(\d+)", "s.<1-1>"): ({"l1": "s.0", "l10": "s.9"}, ["s.01"]),
    (r"b.(\d+).(0|1|2)", "c<1*3+2>"): ({"b.0.0": "c0", "b.2.1": "c7", "b.10.2": "c32"}, ["c07"]),
    (r"b.(\d+).(0|1|2)", "c<1*3+2+4>"): ({"b.0.0": "c4", "b.2.1": "c11"}, ["c3", "c0"]),
    (r"(x|y).(\d+)", r"\2/\1"): ({"x.7": "7/x"}, ["7/z", "x/7"]),
    ("(fc1|fc2).w", "<1:mlp>.w"): ({"fc1.w": "up.w", "fc2.w": "down.w"}, ["fc1.w"]),
}


@pytest.mark.parametrize("pair", TARGETS, ids=str)
def test_a_target_writes_and_reads_these_keys(pair):
    source = parse_source(pair[0])
    there = target(pair[1], source, {"mlp": {"fc1": "up", "fc2": "down", "fc3": "unused"}})
    right, wrong = TARGETS[pair]
    for key, written in right.items():
        values = source.match(key)
        assert there.write(values) == written
        assert there.match(written) == values
    assert [key for key in wrong if there.match(key) is not None] == []


def test_groups_of_a_prefix_and_of_a_table_are_counted_apart():
    source = parse_source(r"tower(a|b).(\d+).norm(1|2).(w|b)")
    side = parse_target([(r"\1.blocks.\2.", 0), (r"ln_\1.\2", 2)], source)
    assert side.write(source.match("towerb.3.norm2.w")) == "b.blocks.3.ln_2.w"
    assert side.match("b.blocks.3.ln_2.w") == source.match("towerb.3.norm2.w")


def test_parts_and_indices_of_the_targets_own():
    source = parse_source("in_proj")
    assert target("p.(q|kv).w", source).match("p.kv.w") == {"own1": "kv"}
    assert target("b.<layer>.w", source, index="layer").write({"layer": "3"}) == "b.3.w"
    with pytest.raises(PatternError, match="goes with unstack"):
        target("b.<layer>.w", source)


AMBIGUOUS = [
    r"(a|ab)(c|bc)",
    r"(|a)(|a).w",
    r"x(a|a_b)(\w+)",
    r"(|a)(.+)",
    r"(1|12)(\d+).w",
    r"(a|ab)(|b)",
]
CLEAR = [r"(a|ab)(c|d)", r"x(|_ema).(\w+)", r"(1|12).(\d+)", r"(a|ab)c", r"(|a)(|b).w", r"proj(|_in)(.w|.b)"]


@pytest.mark.parametrize("pattern", AMBIGUOUS)
def test_alternatives_with_two_readings_are_refused(pattern):
    with pytest.raises(PatternError, match="has two readings"):
        parse_source(pattern)


@pytest.mark.parametrize("pattern", CLEAR)
def test_alternatives_with_one_reading_are_allowed(pattern):
    parse_source(pattern)


def test_a_target_with_two_readings_is_refused():
    with pytest.raises(PatternError, match=r"'xab' has two readings|has two readings"):
        target(r"x\1\2", parse_source(r"(a|ab).(c|bc)"))


# --- properties ---

GROUPS = [r"(\d+)", r"(\w+)", "([^.]+)", "(a|1)", "(|a)", "(a|aa)", "(0|1|2)", "(a_|.)", "(1.|0)"]


def random_pattern(rng):
    tokens = [rng.choice(GROUPS) if rng.random() < 0.5 else rng.choice(ALPHABET) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.15:
        tokens.append("(.+)")
    return "".join(tokens)


def random_sides(count, seed):
    rng = random.Random(seed)
    found: list[Side] = []
    while len(found) < count:
        try:
            found.append(parse_source(random_pattern(rng)))
        except PatternError:
            continue
    return found


def test_matching_and_writing_undo_each_other():
    rng = random.Random(1)
    words = {
        "int": ["0", "7", "10"],
        "word": ["a", "_1", "aa"],
        "segment": ["a", "1-", "_/"],
        "rest": ["a", "1.a", "."],
    }
    for side in random_sides(300, seed=0):
        for _ in range(5):
            values = {
                slot.names[0]: rng.choice([v for v, _ in slot.options] if slot.kind == "alts" else words[slot.kind])
                for slot in side.slots
            }
            key = side.write(values)
            assert side.match(key) == values, f"{side} reads {key!r}"
    for side in random_sides(60, seed=2):
        for key in strings():
            values = side.match(key)
            assert values is None or side.write(values) == key


def test_targets_read_the_keys_that_they_write():
    rng = random.Random(3)
    source = parse_source(r"(\d+).(0|1|2).(a|b).([^.]+)")
    lookups = {"t": {"a": "b", "b": "a"}}
    pieces = [["<1>", "<1+2>", "<1*3+2>", "<1*3+2+5>", r"\1"], [r"\3", "<3:t>"], [r"\4"]]
    for _ in range(200):
        parts = [rng.choice(choice) for choice in pieces]
        if "*" not in parts[0]:
            parts.append(r"\2")
        rng.shuffle(parts)
        try:
            side = target(".".join(parts).replace("<1>", r"\1"), source, lookups)
        except PatternError:
            continue
        for key in ("0.0.a.x", "7.2.b.y-z", "12.1.a.0"):
            values = source.match(key)
            assert side.match(side.write(values)) == values


def common(a, b, among):
    return next((key for key in among if a.match(key) is not None and b.match(key) is not None), None)


def test_overlap_finds_a_key_when_and_only_when_there_is_one():
    """Against trying every string of up to five characters."""
    sides = random_sides(70, seed=4)
    keys = strings()
    matched = [{key for key in keys if side.match(key) is not None} for side in sides]
    hits = 0
    for i, a in enumerate(sides):
        for j in range(i, len(sides)):
            b = sides[j]
            witness = overlap(a, b)
            if witness is not None:
                assert a.match(witness) is not None and b.match(witness) is not None
                hits += 1
            else:
                assert not matched[i] & matched[j], f"{a} and {b} share {min(matched[i] & matched[j], key=len)!r}"
    assert 200 < hits < 2300  # both answers occur


PAIRS = [  # (one, the other, do they share a key?)
    ("a.b", "a.b", True),
    ("a.b", "a.c", False),
    (r"(\d+)", "(0|1)1", True),  # 11, not 01
    (r"(\d+)", "0(0|1)", False),
    (r"a.(\w+)", r"([^.]+).b", True),
    (r"(\w+).a", r"(\w+).b", False),
    ("(.+)", "x", True),
    (r"x(\d+)", r"x(\d+)y", False),
    (r"a/(.+)", r"([^.]+).b", True),
    ("(|a)b", "ab", True),
    (r"(\d+)-(\w+)", r"(\w+)-(\d+)", True),
]


@pytest.mark.parametrize(("one", "other", "share"), PAIRS)
def test_overlap_rows(one, other, share):
    a, b = parse_source(one), parse_source(other)
    assert (overlap(a, b) is not None) == (overlap(b, a) is not None) == share


@pytest.mark.parametrize("shift", [1, 2, 7, 10, 11, 99, 100, 250])
def test_overlap_knows_where_a_shifted_index_begins(shift):
    shifted = target(f"m<1+{shift}>", parse_source(r"n(\d+)"))
    for number in {0, 1, shift // 2, shift - 1, shift, shift + 1, 10 * shift, 10 * shift - 1, 1000}:
        literal = parse_source(f"m{number}")
        assert overlap(shifted, literal) == overlap(literal, shifted) == (f"m{number}" if number >= shift else None)
    assert overlap(shifted, parse_source(r"m(\d+)")) is not None
    folded = target(f"m<1*3+2+{shift}>", parse_source(r"n(\d+).(0|1|2)"))
    assert overlap(folded, parse_source(f"m{shift - 1}")) is None
    assert overlap(folded, shifted) is not None


# --- long keys ---

HOSTILE = {
    r"(\w+).(\w+).(\w+).end": "a.",
    r"(\w+)/(\d+)/(\w+).x": "1/",
    "([^.]+).([^.]+).(a|b|)": "ab",
    r"a(|a)(\d+)-": "a1",
    r"(\w+).(.+)": "_",
    "(aaaa|aaab|aaac)(.+)": "aaa",
}


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("end", ["", "!", ".", "\n"])
def test_a_long_key_takes_linear_time(pattern, end):
    """A key of a megabyte; going back over it again and again would take hours."""
    side = parse_source(pattern)
    with ends():
        side.match(HOSTILE[pattern] * ((1 << 20) // len(HOSTILE[pattern])) + end)


def test_many_groups_do_not_multiply():
    side = parse_source(".".join([r"(\w+)"] * 40) + ".end")
    with ends():
        assert side.match(".".join(["a" * 1000] * 40) + ".enx") is None
        assert side.match("a" * 200_000) is None
