"""Every fault of a mapping file is reported with ``file:line:column`` and a message that helps; all of them at once."""

from __future__ import annotations

import pytest

import keymap
from keymap.errors import MappingError
from keymap.language.compile import compile_mapping
from keymap.language.yaml_marks import parse_yaml
from keymap.source.registry import Catalogue, registry

HEAD = """format: example
title: an example
reference: example 1.0
layouts: {image: native_vit}
detect: {any: [x]}
"""  # five lines: what follows begins in line 6
GOOD = "towers: {image: {a: b}}\n"


def rules(*lines, more=""):
    """The rules are in line 8 and after, at column 5; ``more`` after them."""
    return HEAD + "towers:\n  image:\n" + "".join(f"    {line}\n" for line in lines) + more


def faults_of(text, library=lambda name: None):
    with pytest.raises(MappingError) as caught:
        compile_mapping(text, "f.yaml", library)
    assert all(fault.startswith("f.yaml:") for fault in caught.value.faults)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def check(text, place, words):
    faults = faults_of(text)
    assert len(faults) == 1, faults
    assert faults[0].startswith(f"f.yaml:{place}: "), faults[0]
    assert words in faults[0]


# --- the file as YAML ---

YAML = {
    "an open bracket": ("format: [a\ntitle: b", "1:9", "the [ is not closed: add ]"),
    "a tab": ("format: a\n\ttitle: b", "2:1", "a tab cannot indent: use two spaces for each level"),
    "two documents": (
        "a: b\n---\nc: d\n",
        "2:1",
        "a second document begins here: a file holds one mapping, remove the ---",
    ),
    "nothing": ("", "1:1", "the file is empty"),
    "a list": ("- a\n- b\n", "1:1", "it holds no fields"),
    "a word": ("abc\n", "1:1", "it holds no fields"),
    "a key twice": (HEAD + "title: again\n", "6:1", "key 'title' is given twice (first in line 2)"),
    "a rule twice": (rules("a: b", "c: d", "a: e"), "10:5", "key 'a' is given twice (first in line 8)"),
    "an anchor": (
        HEAD + "notes: [&a x]\n",
        "6:9",
        "anchors and aliases (& and *) are not used: quote the text, or share rules with `tables`",
    ),
    "an alias": (HEAD + "notes: [*a]\n", "6:9", "anchors and aliases"),
    "a merge key": (HEAD + "towers: {image: {<<: {a: b}}}\n", "6:18", "merge keys (<<) are not used"),
    "a tag": (
        HEAD + "notes: [!!python/object:os.system x]\n",
        "6:9",
        "tag 'tag:yaml.org,2002:python/object:os.system' is not used in a mapping: leave it out, or quote the text",
    ),
    "a binary": (HEAD + "notes: [!!binary aGk=]\n", "6:9", "tag 'tag:yaml.org,2002:binary' is not used"),
    "a tag that says what is so": (HEAD + "notes: [!!str a]\n", "6:9", "leave it out"),
    "a tag that lies": (HEAD + "notes: [!!bool x]\n", "6:9", "leave it out"),
    "a tag of a number that is none": (HEAD + "notes: [!!int '']\n", "6:9", "leave it out"),
    "a tag of a list": (HEAD + "notes: !!set {a}\n", "6:8", "leave it out"),
    "a tag of a key": (HEAD + "!!merge notes: [a]\n", "6:1", "leave it out"),
    "a tag without a name": (HEAD + "kind: ! format\n", "6:7", "leave it out"),
    "a date": (HEAD + "notes: [2024-01-01]\n", "6:9", "quote the text"),
    "a key that is no text": (HEAD + "? [a]\n: b\n", "6:3", "a key must be plain text"),
    "too deep": ("a: " + "[" * 14 + "]" * 14, "1:15", "nested deeper than 12 levels"),
    "too long": ("# " + "x" * (1 << 20), "1:1", "the file has 1048578 characters or more; the limit is 131072"),
    "a control character": ("a: \x00b\n", "1:4", "not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_malformed_yaml_is_refused(name):
    check(*YAML[name])


def test_yaml_aliases_that_grow_exponentially_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(MappingError, match=r"f.yaml:1:5: anchors and aliases"):
        parse_yaml("\n".join(lines), "f.yaml")


# --- fields ---

FIELDS = {
    "an unknown field": (HEAD + "ignored: {a: b}\n" + GOOD, "6:1", "no field 'ignored' here; did you mean 'ignore'?"),
    "a field without a near name": (
        HEAD + "zzz: 1\n" + GOOD,
        "6:1",
        "there is no field 'zzz' here; known: format, kind, hub, title",
    ),
    "an unknown operation": (rules("a: {to: b, veiw: a -> a}"), "8:16", "no field 'veiw' here; did you mean 'view'?"),
    "an unknown evidence": (HEAD + "aliases: [{when: {al: [x]}, a: b}]\n" + GOOD, "6:19", "did you mean 'all'?"),
    "a text for a list": (
        HEAD + "notes: text\n" + GOOD,
        "6:1",
        "notes: 'text' is a string; write [text] (what a user of the format should know; printed on its page)",
    ),
    "a number for a target": (
        rules("a: 7"),
        "8:5",
        "a: 7 is a number; write for example visual.ln_post.\\1 or {to: visual.proj, view: out in -> in out}",
    ),
    "an empty target": (
        rules('a: ""'),
        "8:5",
        "a is empty; write a string, for example visual.ln_post.\\1 (the target key)",
    ),
    "an empty reason": (
        rules("a: b", more="ignore:\n  a: ''\n"),
        "10:3",
        "a is empty; write a string, for example 'index buffer",
    ),
    "an unknown kind": (HEAD + "kind: fromat\n" + GOOD, "6:1", "kind: 'fromat' is not known; did you mean 'format'?"),
    "a name in capitals": (
        HEAD.replace("example", "Example", 1) + GOOD,
        "1:1",
        "format: 'Example' has the wrong form; write small letters, digits and _",
    ),
    "an unknown dtype": (
        rules("a: b", more="dtypes:\n  a: float8\n"),
        "10:3",
        "a: 'float8' is not known; did you mean 'float64'?",
    ),
    "a shape of two": (rules("a: b", more="shapes:\n  a: [2]\n"), "10:7", "a: 2 is not allowed; write 1"),
    "a size of none": (rules("a: b", more="sizes: {c: 0}\n"), "9:9", "c: 0 is less than the least value, 1"),
    "an axis below none": (rules("(a|b): {to: c, concat: -1}"), "8:20", "concat: -1 is less than the least value, 0"),
    "half an axis": (
        rules("(a|b): {to: c, concat: 0.5}"),
        "8:20",
        "concat: 0.5 is a number; write for example 0 or d",
    ),
    "a power": (
        rules("a: {to: b, times: cube 1, oneway: true}"),
        "8:16",
        "times: 'cube 1' has the wrong form; write a number, sqrt and the number of an axis or a fact, or 1/sqrt",
    ),
    "one tied target": (rules("a: {to: [b]}"), "8:9", "to: a list of one entry; write b without [ ]"),
    "one part": (
        rules("(a|b): {to: c, concat: 0, parts: [1]}"),
        "8:31",
        "parts: 1 entry, at least 2 are needed; write a list, for example [2, 1]",
    ),
    "a part in words": (
        rules("(a|b): {to: c, concat: 0, parts: [x, 1]}"),
        "8:39",
        "parts: 'x' has the wrong form; write a number, a fact such as text.heads or text.heads * 2, or '*'",
    ),
    "nothing for a target": (
        rules("a: null"),
        "8:5",
        "a: the value is missing (null); write for example visual.ln_post.\\1",
    ),
    "a list for a rule": (
        rules("a: [b, c]"),
        "8:5",
        "a: [b, c] is a list; write {to: [b, c]} for several targets of one key",
    ),
    "a field of the hub": (
        HEAD + "scalars: [a]\n" + GOOD,
        "6:1",
        "'scalars' belongs to kind: hub; remove it, or say `kind: hub`",
    ),
    "a variant without the way back": (
        rules("a: b", more="variants:\n  - when: {all: [x]}\n    towers: {image: {c: d}}\n"),
        "10:5",
        "when_hub is missing: add it, for example `when_hub: {all: [logit_scale]}`",
    ),
    "a bridge of two towers": (
        "format: r\nkind: bridge\ntitle: t\nbetween: {image: [trunk, naflex], text: [native, flat]}\n" + GOOD,
        "4:1",
        "between: 2 entries, the limit is 1, for example {image: [native_vit, clip_trunk]}",
    ),
    "a format without evidence": (
        HEAD.replace("detect: {any: [x]}\n", "") + GOOD,
        "1:1",
        "detect is missing: add it, for example `detect: {any:",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_schema_refuses(name):
    check(*FIELDS[name])


# --- patterns ---

PATTERNS = {
    r"a\.b": "'\\.' at character 2 of 'a\\.b': a dot is already a dot: write . without a backslash",
    r"\d": "'\\d' at character 1 of '\\d': write (\\d+) for an index, in brackets",
    "^a": "a pattern always matches the whole key: leave ^ out",
    "a$": "a pattern always matches the whole key: leave $ out",
    "a*": "'*' at character 2 of 'a*': write (\\d+) for an index, (\\w+) or",
    "a.+b": "'.+' at character 2 of 'a.+b': write (\\w+) or ([^.]+) for a name; or",
    "a?": "list the alternatives instead: (|x), or mark the rule optional",
    "a[0-9]": "'[0-9]' at character 2 of 'a[0-9]': write (\\d+) for an index",
    "a{2}": "'{2}' at character 2 of 'a{2}': write (\\d+) for an index",
    "a|b": "'|' at character 2",
    "é": "'é' at character 1 of 'é': keys hold letters, digits and _",
    "((a|b)|c)": "((a|b) in '((a|b)|c)': a group is one of (\\d+), (\\w+), ([^.]+),",
    "(a|b.*)": "(a|b.*) in '(a|b.*)': a group is one of (\\d+), (\\w+), ([^.]+), (.+), (**.), or a list of",
    "(.*)": "(.*) in '(.*)': write (.+) at the end of the key, or ([^.]+) for a name between dots",
    "(?:a)": "(?:a) in '(?:a)': groups have numbers, not names or flags: write (a)",
    "(?P<n>a)": "(?P<n>a) in '(?P<n>a)': groups have numbers, not names or flags: write (a)",
    "(a": "the group that opens at character 1 of '(a' is not closed",
    "a)": "')' at character 2 of 'a)'",
    "(a|a)": "lists an alternative twice",
    r"(\d+)(\d+)": "'(\\d+)(\\d+)': two open-ended groups need text between them, for example a dot",
    r"(\w+)([^.]+)": "'(\\w+)([^.]+)': two open-ended groups need text between them, for example a dot",
    r"(\d+)(|x)(\w+)": "'(\\d+)(|x)(\\w+)': two open-ended groups need text between them, for example a dot",
    r"(\d+)1": "'(\\d+)1': '1' follows an open-ended group that can match it too, so",
    r"(\w+)_b": "'_b' follows an open-ended group that can match it too",
    r"([^.]+)/b": "'/b' follows an open-ended group that can match it too",
    r"(\d+)(a|1)": "'(a|1)' follows an open-ended group that can match it too",
    r"(\d+)(|x)1": "follows an open-ended group that can match it too",
    "(.+).b": "'(.+).b': (.+) is allowed only at the end; write ([^.]+) or (\\w+) here",
    "(.+)(a|b)": "'(.+)(a|b)': (.+) is allowed only at the end; write ([^.]+) or (\\w+) here",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_outside_the_subset_say_what_to_write(pattern):
    check(rules(f"'{pattern}': b"), "8:5", PATTERNS[pattern])


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("ignore:\n  a*: why\n", "10:3"),
        ("dtypes:\n  a*: float16\n", "10:3"),
        ("shapes:\n  a*: [1]\n", "10:3"),
        ("aliases:\n  - when: {all: [x]}\n    a*: b\n", "11:5"),
        ("aliases:\n  - when: {none: [b, 'a*']}\n    a: b\n", "10:22"),
        (
            "variants:\n  - when: {all: [x]}\n    when_hub: {any: [y]}\n    towers:\n      image:\n        a*: b\n",
            "14:9",
        ),
        ("variants:\n  - when: {all: ['a*']}\n    when_hub: {any: [y]}\n    towers: {image: {c: d}}\n", "10:18"),
    ],
)
def test_a_pattern_is_checked_in_every_field(where, place):
    check(rules("m: n", more=where), place, "'*' at character 2 of 'a*'")


LOOKUP = "lookups:\n  one: {b: 1, c: 1}\n  part: {b: 1}\n  pair: {b: 1, c: 2}\n"
TARGETS = {
    "a capture lost": (
        ("a(b|c)", "d"),
        "group 1 is captured and not used by the target: several keys would become one",
    ),
    "an index lost": ((r"a(\d+).(w|b)", r"d.\2"), "Use it as \\1, or say how they join: concat, stack or rows"),
    "a group that is not there": (("a(b|c)", r"d.\2"), "'d.\\2' uses group 2, which the source pattern does not have"),
    "a group twice": (
        ("a(b|c)", r"d.\1.\1"),
        "'d.\\1.\\1' uses a group twice: on the way back the two could differ; use it once",
    ),
    "a letter after the backslash": (
        ("a(b|c)", r"d\x"),
        "'\\' at character 2 of 'd\\x': a backslash needs the number of a group: write \\1",
    ),
    "a backslash at the end": (
        ("a(b|c)", "d\\"),
        "'\\' at character 2 of 'd\\': a backslash needs the number of a group: write \\1",
    ),
    "an unknown lookup": (("a(b|c)", "d<1:pear>"), "there is no lookup 'pear'; did you mean 'part'?"),
    "a lookup of a number": ((r"a(\d+)", "d<1:pair>"), "a lookup needs a group of alternatives (a|b)"),
    "a lookup that is not one-to-one": (
        ("a(b|c)", "d<1:one>"),
        "lookup 'one' gives b and c one name, 1, so there is no way back",
    ),
    "a lookup that does not cover": (("a(b|c)", "d<1:part>"), "lookup 'part' has no entry for c"),
    "arithmetic on a word": ((r"a(\w+)", "d<1+1>"), "arithmetic needs a (\\d+) group"),
    "arithmetic on alternatives": (("a(0|1)", "d<1+1>"), "arithmetic needs a (\\d+) group"),
    "a fold that skips": ((r"a(\d+).(0|2)", "d<1*2+2>"), "group 2 must list 0 to 1, as (0|1|...)"),
    "a fold of two open indices": ((r"a(\d+).(\d+)", "d<1*2+2>"), "group 2 must list 0 to 1"),
    "an angle that is not closed": ((r"a(\d+)", "d<1"), "the < at character 2 is not closed"),
    "an angle with something else": (
        (r"a(\d+)", "d<i>"),
        "<i> in 'd<i>': <i> goes with unstack: i; for a group write \\1",
    ),
    "groups of its own without a cut": (("a", "b(c|d)"), "say how the tensor is cut, with split or unstack"),
    "two open groups side by side": (
        (r"a(\d+).b(\d+)", r"c.\1\2"),
        "'c.\\1\\2': two open-ended groups need text between them, for example a dot",
    ),
    "a digit after an index": (
        (r"a(\d+)", r"c.\g"),
        "'\\' at character 3 of 'c.\\g': a backslash needs the number of a group: write \\1",
    ),
    "what an index could take in": ((r"a(\d+).b", r"c.<1+1>0"), "'0' follows an open-ended group"),
    "the rest in the middle": (
        (r"a.(.+)", r"b.\1.c"),
        "'b.\\1.c': (.+) is allowed only at the end; write ([^.]+) or (\\w+) here",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_have_no_way_back(name):
    (source, target), words = TARGETS[name]
    check(rules(f"'{source}': '{target}'", more=LOOKUP), "8:5", words)


# --- operations ---

OPERATIONS = {
    "two joins": ("(a|b): {to: c, concat: 0, stack: 0}", "concat and stack: a rule has one of them"),
    "two cuts": ("a: {to: '(b|c)', split: [1, 1], unstack: l}", "split and unstack: a rule has one of them"),
    "concat of one key": ("a: {to: b, concat: 0}", "concat needs a group (a|b) that the target lacks"),
    "concat of an index": (r"a(\d+): {to: b, concat: 0}", "for an index (\\d+) use stack"),
    "stack of words": (r"a(\w+): {to: b, stack: 0}", "counts its members by (\\d+) or (a|b) groups only"),
    "stack of two lists": ("a(b|c).(d|e): {to: b, stack: 0}", "joins one group of alternatives; the target lacks 2"),
    "an axis that the view lacks": (
        "(a|b): {to: c, concat: d}",
        "axis 'd' is not a single axis on the right side of `view`; write its number, for example 0",
    ),
    "an axis inside a group": (
        "(a|b): {to: c, concat: d, view: a d -> (a d)}",
        "axis 'd' is not a single axis on the right side of `view`; write its number, for example 0",
    ),
    "parts for another number": ("(a|b): {to: c, concat: 0, parts: [1, 1, 1]}", "one length for each of 2 members"),
    "two stars": ("(a|b): {to: c, concat: 0, parts: ['*', '*']}", "at most one '*'"),
    "parts of a stack": ("(a|b): {to: c, stack: 0, parts: [1, 1]}", "parts goes with concat"),
    "parts of nothing": ("a: {to: b, parts: [1, 2]}", "parts goes with concat"),
    "order with another name": ("(a|b): {to: c, concat: 0, order: [a, c]}", "must name each of ['a', 'b'] once"),
    "order with a name too few": ("(a|b): {to: c, concat: 0, order: [a, 0]}", "must name each of ['a', 'b'] once"),
    "order of nothing": ("a: {to: b, order: [a, 0]}", "order goes with concat"),
    "an axis of nothing": ("a: {to: b, axis: 1}", "axis goes with split"),
    "rows for another number": (
        "(a|b): {to: c, rows: [[0, 1], [1, 2], [2, null]], oneway: true}",
        "rows: one range for each of 2 members",
    ),
    "split in another number": ("a: {to: '(b|c)', split: [1, 1, 1]}", "one length for each of 2 alternatives"),
    "split into nothing": ("a: {to: b, split: [1, 1]}", "split needs a group of the target's own: (a|b) for split"),
    "unstack without its index": ("a: {to: b, unstack: l}", "unstack needs a group of the target's own: <name>"),
    "unstack of another index": ("a: {to: 'b.<l>', unstack: k}", "<l> in 'b.<l>': write <k>, as unstack says"),
    "unstack into alternatives": ("a: {to: '(b|c)', unstack: l}", "counts an index: the target needs <l>"),
    "unstack into both": (
        "a: {to: 'b.<l>.(c|d)', unstack: l}",
        "unstack writes one group of the target's own; this target has 2",
    ),
    "ties of different groups": ("a: {to: ['b.(x|y)', c], split: [1, 1]}", "tied targets must use the same groups"),
    "add without oneway": ("a: {to: b, add: c}", "add cannot be undone: add oneway: true"),
    "another length than all": ("(a|b): {to: c, concat: 0, parts: [text.heads, 1, 1]}", "one length for each of 2"),
    "times nothing": ("a: {to: b, times: 0}", "times: 0 cannot be undone: add oneway: true"),
    "take without pad": ("a: {to: b, take: [0, 3]}", "or pad for a table whose last rows are padding"),
    "pad without take": ("a: {to: b, pad: 8}", "pad: 8 is the inverse of take: [0, text.vocab]: add take"),
    "pad at the start": (
        "a: {to: b, take: [1, 3], pad: 8}",
        "rows of zeros lie at the end: write take: [0, text.vocab]",
    ),
    "take and pad both ways": (
        "a: {to: b, take: [0, 3], pad: {multiple: 8, keep: 3}}",
        "take and pad: {multiple, keep} are inverses of each other: remove one",
    ),
    "a tied key without the group": ("a.(x|y): {to: b.\\1, tied: c}", "tied: 'c' must use every group of the source"),
    "rows without oneway": ("(a|b): {to: c, rows: [[0, 1], [1, null]]}", "rows cannot be undone"),
    "add of something else": ("a: {to: b, add: 'c[x]', oneway: true}", "write a key, or key[0] for one row of it"),
    "rest of a fixed key": ("a: {to: b, rest: true}", "rest: true needs a pattern with (.+)"),
    "a view of one side": ("a: {to: b, view: a b -> a}", "the sides of view 'a b -> a' do not balance: b"),
    "an axis twice": ("a: {to: b, view: a a -> a}", "names an axis twice on one side"),
    "a group left open": ("a: {to: b, view: (a b -> a b}", "view '(a b' leaves a group open"),
    "a group never opened": ("a: {to: b, view: a b) -> a b}", "closes a group that it never opened"),
    "a group within a group": ("a: {to: b, view: ((a) b) -> a b}", "a group within a group"),
    "two arrows": ("a: {to: b, view: a -> a -> a}", "a view is 'left -> right'"),
    "a number for an axis": ("a: {to: b, view: a 2 -> a 2}", "write axis names, 1 and ( ) groups"),
    "a then that does not balance": ("a: {to: b, then: a -> b}", "do not balance: a, b"),
    "a table that is not there": (
        "a.: {to: b., table: t}",
        "there is no table 't'; no table is declared in the file or under uses:",
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_that_make_no_sense(name):
    line, words = OPERATIONS[name]
    check(rules(line), "8:5", words)


def test_a_view_without_an_arrow():
    check(rules("a: {to: b, view: a b}"), "8:16", "einops-like: 'd h k -> (h k) d'")


# --- tables ---


def table(*lines, name="t"):
    return f"tables:\n  {name}:\n" + "".join(f"    {line}\n" for line in lines)


TABLES = {
    "itself": (
        rules("a.: {to: b., table: t}", more=table("c.: {to: d., table: t}")),
        "11:5",
        "table 't' contains itself: t -> t",
    ),
    "itself by another": (
        rules("a.: {to: b., table: t}", more=table("c.: {to: d., table: u}") + "  u:\n    c.: {to: d., table: t}\n"),
        "13:5",
        "table 't' contains itself: t -> u -> t",
    ),
    "with a view": (rules("a.: {to: b., table: t, view: a -> a}", more=table("c: d")), "8:5", "no operation besides"),
    "with two targets": (rules("a.: {to: [b., c.], table: t}", more=table("c: d")), "8:5", "has one target"),
    "a wrong line is reported in the table": (
        rules("a.: {to: b., table: t}", more=table("c*: d")),
        "11:5",
        "'*' at character 2 of 'c*': write (\\d+) for an index, (\\w+) or",
    ),
    "a group of its own by its own number": (
        rules(r"a(\d+).: {to: b\1., table: t}", more=table("(c|d): e")),
        "11:5",
        "group 1 is captured and not used by the target",
    ),
    "the prefix's group lost": (
        rules(r"a(\d+).: {to: b., table: t}", more=table("c: d")),
        "8:5",
        "group 1 is captured and not used by the target: several keys would",
    ),
    "a group that the line lacks": (
        rules(r"a(\d+).: {to: b\1., table: t}", more=table(r"c: d\1")),
        "11:5",
        "uses group 1, which the source pattern does not have",
    ),
    "of a file that is not there": (HEAD + "uses: [nobody]\n" + GOOD, "6:8", "no mapping 'nobody' to use tables of"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    check(*TABLES[name])


def test_a_fault_in_a_table_of_another_file_names_that_file():
    shared = parse_yaml("format: s\nkind: tables\ntitle: s\ntables:\n  t:\n    c*: d\n", "shared.yaml")
    text = rules("a.: {to: b., table: t}", more="uses: [s]\n")
    with pytest.raises(MappingError) as caught:
        compile_mapping(text, "f.yaml", {"s": shared}.get)
    assert caught.value.faults[0].startswith("shared.yaml:6:5: '*' at character 2 of 'c*'")


# --- ownership, within one file ---

OWNERS = {
    "one key": (
        rules("a.(x|y): p.\\1", "a.(y|z): q.\\1"),
        "9:5",
        "key 'a.y' is claimed by two rules, 'a.(x|y): p.\\1'",
    ),
    "one key on the way back": (rules("a: p.x", "b.(x|y): p.\\1"), "9:5", "on the way back, key 'p.x' is claimed by"),
    "an open pattern and a literal": (rules(r"a.(\w+): p.\1", "a.b: q"), "9:5", "key 'a.b' is claimed by two rules"),
    "two open patterns": (rules(r"(\w+).b: p.\1", r"a.([^.]+): q.\1"), "9:5", "key 'a.b' is claimed by two rules"),
    "shifted indices": (rules(r"a(\d+): p<1+1>", r"b(\d+): p\1"), "9:5", "on the way back, key 'p1' is claimed"),
    "two rest rules": (
        rules(r"(.+): {to: 'p.\1', rest: true}", r"x.(.+): {to: 'q.\1', rest: true}"),
        "8:5",
        "more than one rule says rest: true",
    ),
    "a variant and the rules": (
        rules(
            "a: b",
            more="variants:\n  - when: {all: [x]}\n    when_hub: {all: [y]}\n    towers:\n      image:\n        a: d\n",
        ),
        "14:9",
        "key 'a' is claimed by two rules",
    ),
    "two rules of aliases": (
        rules("m: n", more="aliases:\n  - a.(.+): b.\\1\n    a.c: d\n"),
        "11:5",
        "key 'a.c' is claimed",
    ),
}


@pytest.mark.parametrize("name", OWNERS)
def test_two_rules_for_one_key(name):
    text, place, words = OWNERS[name]
    faults = faults_of(text)
    assert any(fault.startswith(f"f.yaml:{place}: ") and words in fault for fault in faults), faults


# --- evidence, and the hub's fields ---


@pytest.mark.parametrize(
    ("evidence", "column"), [("any: ['(.+)']", 16), ("all: [a, '(.+)']", 19), ("any: [a], none: ['(.+)']", 27)]
)
def test_evidence_that_matches_every_key_is_refused(evidence, column):
    text = rules("a: b").replace("any: [x]", evidence)
    check(text, f"5:{column}", "(.+) matches every file: name a key of this format")


def test_a_file_only_name_needs_its_meaning():
    text = "format: h\nkind: hub\ntitle: t\nlayouts: {}\npositions: {}\nabsent_means: {a: 0}\nfile_only: [a, b]\n"
    check(f"{text}detect: {{any: [x]}}\n{GOOD}", "7:1", "b needs an entry in absent_means, because no model has it")


def test_all_faults_of_a_file_are_reported_at_once():
    text = rules(r"a\.b: c", "d: {to: e, view: a b -> a}", "(f|g): h").replace("[x]", "['x*']")
    faults = faults_of(text)
    assert [fault.split(": ")[0] for fault in faults] == ["f.yaml:5:16", "f.yaml:8:5", "f.yaml:9:5", "f.yaml:10:5"]
    faults = faults_of(HEAD + "ignored: {}\nnotes: 7\n" + GOOD.replace("a: b", "a: {to: b, viev: a -> a}"))
    assert sorted(fault.split(": ")[0] for fault in faults) == ["f.yaml:6:1", "f.yaml:7:1", "f.yaml:8:29"]


@pytest.mark.parametrize("field", ["ignore:\n  (a|x): noise\n", "unsupported:\n  text:\n    (a|x): no place\n"])
def test_a_key_that_a_rule_owns_cannot_be_left_out_too(field):
    section = field.partition(":")[0]
    check(rules("a: b", more=field), "8:5", f"key 'a' is claimed by rule 'a: b' and left out by '{section}: (a|x)'")


# --- all files together ---


def refused(folder, name, text):
    """Add a file to the shipped ones; the text of the refusal."""
    known = Catalogue(dict(registry().mappings), dict(registry().files))
    before = dict(known.mappings)
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(MappingError) as caught:
        known.add([folder / name])
    assert known.mappings == before
    return str(caught.value)


BRIDGE = "format: other_way\nkind: bridge\ntitle: t\nbetween: {image: [native_vit, clip_trunk]}\n" + GOOD
TOGETHER = {
    "the name is taken": (
        "openai.yaml",
        rules("a: b").replace("example", "openai", 1),
        "the name 'openai' is taken by",
    ),
    "another file name": ("mine.yaml", rules("a: b"), "mine.yaml:1:1: format 'example' belongs in example.yaml"),
    "an unknown layout": (
        "example.yaml",
        rules("a: b").replace("native_vit", "nativ_vit"),
        "image: 'nativ_vit' is not known; did you mean 'native_vit'?",
    ),
    "an unknown layout of a bridge": (
        "other_way.yaml",
        BRIDGE.replace("clip_trunk", "trunc"),
        "image: 'trunc' is not known; did you mean 'trunk'?",
    ),
    "an unknown tower": (
        "example.yaml",
        rules("a: b").replace("{image: native_vit}", "{images: native_vit}"),
        "example.yaml:4:11: there is no field 'images' here; did you mean 'image'?",
    ),
    "a second path": ("other_way.yaml", BRIDGE, "bridges of a tower form a forest"),
    "a second hub": (
        "example.yaml",
        HEAD.replace("layouts: {image: native_vit}\n", "kind: hub\n")
        + "layouts: {}\npositions: {}\nabsent_means: {}\n"
        + GOOD,
        "there must be one hub",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_faults_that_only_all_files_together_show(name, tmp_path):
    file, text, words = TOGETHER[name]
    assert words in refused(tmp_path, file, text)


def test_bridges_that_form_a_cycle_are_refused(tmp_path):
    known = Catalogue(dict(registry().mappings), dict(registry().files))
    for one, two in (("clip_trunk", "naflex"), ("native_vit", "naflex")):
        text = BRIDGE.replace("native_vit, clip_trunk", f"{one}, {two}").replace("other_way", f"{one}_{two}")
        text = text.replace("a: b", "visual.a: visual.b")
        (tmp_path / f"{one}_{two}.yaml").write_text(text, encoding="utf-8")
    known.add([tmp_path / "clip_trunk_naflex.yaml"])
    assert [step.target for step in known.path("image", "native_vit", "naflex")] == ["clip_trunk", "naflex"]
    with pytest.raises(MappingError, match="a second path between image layouts native_vit and naflex"):
        known.add([tmp_path / "native_vit_naflex.yaml"])


def test_files_that_cannot_be_read(tmp_path):
    known = Catalogue(dict(registry().mappings), dict(registry().files))
    (tmp_path / "latin.yaml").write_bytes("title: é".encode("latin-1"))
    with pytest.raises(MappingError, match=r"latin.yaml cannot be read"):
        known.add([tmp_path / "latin.yaml"])
    with pytest.raises(MappingError, match=r"missing.yaml cannot be read"):
        known.add([tmp_path / "missing.yaml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MappingError, match=r"the folder has no .yaml file"):
        keymap.register_mappings(tmp_path / "empty")
    with pytest.raises(MappingError, match="the file does not exist"):
        keymap.register_mappings(tmp_path / "gone.yaml")


def test_one_bad_file_of_two_adds_none(tmp_path):
    known = Catalogue(dict(registry().mappings), dict(registry().files))
    (tmp_path / "example.yaml").write_text(rules("a: b"), encoding="utf-8")
    (tmp_path / "second.yaml").write_text(rules("a: b", "(c|d): e").replace("example", "second", 1), encoding="utf-8")
    with pytest.raises(MappingError, match=r"second.yaml:9:5"):
        known.add(sorted(tmp_path.glob("*.yaml")))
    assert "example" not in known.mappings


def test_an_unknown_format_lists_near_names():
    with pytest.raises(MappingError, match=r"there is no format 'hf_clop'; did you mean hf_clip"):
        registry().get("hf_clop")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("weight_norm: g", "list the ends of the keys under `weight_norms:` of a file of kind: containers"),
        ("dequantize: scales", "quantised weights are not computed: leave it out, and convert the original"),
        ("tensor_parallel: 8", "join the parts of a tensor-parallel checkpoint first"),
        ("exp: 1", "the only arithmetic is times, plus and add"),
    ],
)
def test_what_no_rule_does_is_refused_in_words(field, words):
    check(rules(f"a: {{to: b, {field}}}"), "8:16", words)
