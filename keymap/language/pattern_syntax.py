r"""The syntax of key patterns in a mapping file: a reversible subset of regular expressions.

==================  ============================================================================
``(\d+)``           an index: 0, 1, 2, ... without leading zeros, at most nine digits
``(\w+)``           letters, digits, underscores
``([^.]+)``         anything up to a dot
``(\d+<12)``        an index below 12; ``(\d+>=12)`` from 12 on; ``(\d+>=2<12)`` both; or a fact for a number
``(a|b|c)``         one of the alternatives
``(**.)``           any number of segments, each with its dot, also none; once, at the start or after a dot
``(.+)``            the rest of the key; only at the end
``\1``              (target) the value of the first group
``<1+1>``           (target) index arithmetic; ``<1*6+2>`` is 6 times the first plus the second; ``<1-text.depth>``
                    subtracts a fact
``<1:name>``        (target) the first group through the one-to-one lookup ``name``
``<layer>``         (target) the index that ``unstack: layer`` counts
``(q|kv)``          (target) a group of its own: the parts that a ``split`` writes
==================  ============================================================================

Everything else is literal; a dot is a dot. What follows an open-ended group must be something that the group cannot
match, and what follows alternatives must show which of them it was. So a key has one reading, and matching takes
linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations

from keymap.language.amounts import ByFact
from keymap.language.overlap import overlap
from keymap.language.pattern import OPEN, Effort, PatternError, Side, Slot, Token

__all__ = ["UnknownLookupError", "WrongLookupError", "check_fragment", "parse_source", "parse_target"]

_MAX_TEXT = 512  # characters of one side of a rule, with the prefixes of its tables
_MAX_READINGS = 1000  # combinations of alternatives and of a few indices that a pattern matches
_GROUPS = {r"\d+": "int", r"\w+": "word", r"[^.]+": "segment", ".+": "rest", "**.": "path"}
_FACT = r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+"
_RANGE = re.compile(rf"\\d\+(?:>=(\d{{1,9}}|{_FACT}))?(?:<(\d{{1,9}}|{_FACT}))?", re.ASCII)
_LITERAL = re.compile(r"[A-Za-z0-9_./:#@~ -]+")
_CHARACTERS = "keys hold letters, digits and _ . / : # @ ~ -"
_INDEX, _NAME, _REST = "(\\d+) for an index", "(\\w+) or ([^.]+) for a name", "(.+) for the rest of the key, at its end"
_ADVICE = [  # a regular expression of what is written; what to write in a source, and in a target
    (r"\\\\[dw1-9]", "write one backslash", "write one backslash: GROUP"),
    (r"\\\.", "a dot is already a dot: write . without a backslash", "a dot is already a dot: write ."),
    (r"\\d[+*]?", "write (\\d+) for an index, in brackets", "write \\1 for the first group of the source"),
    (r"\\w[+*]?", "write (\\w+) for a name, in brackets", "write \\1 for the first group of the source"),
    (r"\\[0-9]", "\\1 belongs to a target; in a source write (\\d+), (\\w+) or (a|b)", ""),
    (r"\.\*", f"keep the dot, and write {_INDEX}, {_NAME}; or {_REST}", "write \\1 for the first group of the source"),
    (r"\.\+", f"write {_NAME}; or {_REST}", "write \\1 for the first group of the source"),
    (r"\[0-9\][+*]?", "write (\\d+) for an index", "write \\1 for the first group of the source"),
    (r"\[\^\\?\.\][+*]?", "write ([^.]+), in brackets", "write \\1 for the first group of the source"),
    (r"\[[a-zA-Z0-9_-]+\][+*]?", "write (\\w+) for a name, or list the alternatives: (a|b)", "write \\1"),
    (r"\{\w*\}", f"write {_INDEX}", "write \\1 for the first group of the source"),
    (r"\$[0-9]", "write (\\d+) for an index", "write \\1, with a backslash"),
    (r"\$\{\w+\}", f"write {_INDEX}", "write \\1"),
    (r"%[ds]", "write (\\d+) for an index", "write \\1 for the first group of the source"),
    (r"\^", "a pattern always matches the whole key: leave ^ out", "a target is a plain key: leave ^ out"),
    (r"\$", "a pattern always matches the whole key: leave $ out", "a target is a plain key: leave $ out"),
    (r"\*\*", "write (**.) for segments at any depth, in brackets", "write \\1 for the first group of the source"),
    (r"\*\*?", f"write {_INDEX}, {_NAME}, (a|b), or {_REST}", "write \\1 for the first group of the source"),
    (r"\+", f"write {_INDEX}, {_NAME}, or {_REST}", "write <1+1> for the index after the first group"),
    (r"\?", "list the alternatives instead: (|x), or mark the rule optional", ""),
    (r"\[", "the only group with [ is ([^.]+)", ""),
    (r"\{", "the groups are (\\d+), (\\w+), ([^.]+), (a|b) and (.+)", "write \\1 for a group"),
    (r"\|", "alternatives need brackets: (a|b)", "alternatives need brackets: (a|b)"),
    (r"\)", "this ) closes nothing: add the ( or remove it", "this ) closes nothing: add the ( or remove it"),
    (r"\\", "a backslash is allowed only in (\\d+) and (\\w+)", "a backslash needs the number of a group: write \\1"),
    (r"<[^>]*>?", f"<...> belongs to a target: write {_INDEX}, {_NAME}, or (a|b)", ""),
]
_GROUP_ADVICE = [  # the body of a group, and what to write instead
    (r"\\d\*?|\[0-9\][+*]?|\\\\d\+|\\d\{.*\}|[0-9]\+", "(\\d+)"),
    (r"\\w\*?|\\S\+|\[[a-zA-Z0-9_-]+\][+*]?|\\\\w\+", "(\\w+)"),
    (r"\[\^\\?\.\]\*?|\[\^\\\.\]\+|[^.]+\?", "([^.]+)"),
    (r"\.\*\??|\.\+\?|\*", "(.+) at the end of the key, or ([^.]+) for a name between dots"),
]


class UnknownLookupError(PatternError):
    """A target names a lookup that does not exist."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        super().__init__(text)


class WrongLookupError(PatternError):
    """A lookup lacks entries for a group, or gives two of its alternatives one name."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.fault = name, text
        super().__init__(f"lookup {name!r} {text}")


def _literal(text: str, at: int, target: bool = False) -> str:
    """The plain text from ``at`` on; raises PatternError where there is none."""
    found = _LITERAL.match(text, at)
    if found is None:
        start = at - 1 if text[at] in "*+" and text[at - 1 : at] == "." else at
        for written, in_source, in_target in _ADVICE:
            fault = re.match(written, text[start:])
            if fault is not None:
                advice = (in_target if target else "") or in_source
                advice = advice.replace("GROUP", fault.group()[1:])
                raise PatternError(f"'{fault.group()}' at character {start + 1} of '{text}': {advice}")
        raise PatternError(f"'{text[at]}' at character {at + 1} of '{text}': {_CHARACTERS}")
    return found.group()


def _group_end(text: str, at: int) -> int:
    end = text.find(")", at)
    if end < 0:
        raise PatternError(f"the group that opens at character {at + 1} of '{text}' is not closed")
    return end


def _alternatives(body: str, text: str, target: bool = False) -> tuple[tuple[str, str], ...]:
    if target and body in _GROUPS:
        raise PatternError(f"({body}) in '{text}': a target names a group of the source by its number: write \\1")
    options = body.split("|")
    for option in options:
        if option and not _LITERAL.fullmatch(option):
            raise PatternError(f"({body}) in '{text}': {_group_advice(body)}")
    if len(set(options)) != len(options):
        raise PatternError(f"({body}) in '{text}' lists an alternative twice: remove one")
    return tuple((option, option) for option in options)


def _group_advice(body: str) -> str:
    """What to write instead of a group that keymap does not have."""
    inner = re.match(r"\?(?:P<\w+>|:)(.*)", body)
    if inner is not None:
        known = inner.group(1) in _GROUPS or all(_LITERAL.fullmatch(one) for one in inner.group(1).split("|"))
        instead = f"({inner.group(1)})" if known else "(a|b) or (\\d+)"
        return f"groups have numbers, not names or flags: write {instead}"
    if body.startswith("?"):
        return "there is no look-ahead or look-behind: list the alternatives, (a|b)"
    for written, instead in _GROUP_ADVICE:
        if re.fullmatch(written, body):
            return f"write {instead}"
    kinds = ", ".join(f"({group})" for group in _GROUPS)
    return f"a group is one of {kinds}, or a list of plain alternatives (a|b)"


def parse_source(text: str, first: int = 1, effort: Effort | None = None) -> Side:
    """A source pattern; its groups are the variables ``first``, ``first + 1``, ...

    Raises:
        PatternError: the text is not a pattern, or a key could be read in two ways.
    """
    _check_length(text)
    tokens = _source_tokens(text, first)
    if not tokens:
        raise PatternError("an empty pattern matches no key")
    return _checked(tokens, text, effort)


def _source_tokens(text: str, first: int = 1) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        if text[at] == "(":
            end = _group_end(text, at)
            body, name = text[at + 1 : end], str(first)
            first += 1
            if body in _GROUPS:
                tokens.append(Slot((name,), _GROUPS[body]))
            elif body.startswith(("\\d+<", "\\d+>")):
                tokens.append(_ranged(name, body, text))
            else:
                tokens.append(Slot((name,), "alts", _alternatives(body, text)))
            at = end + 1
        else:
            literal = _literal(text, at)
            tokens.append(literal)
            at += len(literal)
    return tokens


def _ranged(name: str, body: str, text: str) -> Slot:
    """A group of an index in a range."""
    found = _RANGE.fullmatch(body)
    if found is None:
        raise PatternError(
            f"({body}) in '{text}': write (\\d+<12), (\\d+>=12) or (\\d+>=2<12), with numbers or facts such as "
            f"text.depth"
        )
    low, high = (int(one) if one.isdigit() else ByFact(one) for one in (found[1] or "0", found[2] or "0"))
    if found[2] is None:
        return Slot((name,), "int", low=low)
    if isinstance(high, int) and high <= (low if isinstance(low, int) else 0):
        raise PatternError(f"({body}) in '{text}' matches no index: the first number must be less than the second")
    return Slot((name,), "int", low=low, high=high)


def check_fragment(
    source: str, targets: Sequence[str], lookups: Mapping[str, Mapping[str, str]], index: str | None = None
) -> None:
    """Check the patterns of a rule of a table, or of a prefix, without those that they are joined with.

    Raises:
        PatternError: a pattern is wrong by itself.
    """
    side = Side(tuple(_source_tokens(source)))
    for target in targets:
        for _ in _target_tokens(target, side, lookups, 0, index):
            pass


def _check_length(text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise PatternError(f"a pattern of {len(text)} characters, {text[:40]!r} ...: the limit is {_MAX_TEXT}")


_ARITHMETIC = re.compile(rf"(\d{{1,9}})(?:\*(\d{{1,9}})\+(\d{{1,9}}))?([+-](?:\d{{1,9}}|{_FACT}))?", re.ASCII)


def parse_target(
    segments: Sequence[tuple[str, int]],
    source: Side,
    lookups: Mapping[str, Mapping[str, str]] | None = None,
    index: str | None = None,
    effort: Effort | None = None,
) -> Side:
    """A target template over the variables of ``source``.

    Args:
        segments: the template, in the syntax of the module's docstring, as (text, number of groups before it):
            a table's ``\\1`` is the first group of the table's own pattern.
        source: the other side, which says what each variable may hold.
        lookups: the named one-to-one tables that ``<1:name>`` may use.
        index: the name that ``<name>`` may use, for a rule that unstacks.
        effort: what the file's patterns may cost.
    """
    text = "".join(segment for segment, _ in segments)
    _check_length(text)
    tokens: list[Token] = []
    for segment, offset in segments:
        for token in _target_tokens(segment, source, lookups or {}, offset, index):
            if tokens and isinstance(token, str) and isinstance(tokens[-1], str):
                tokens[-1] += token
            else:
                tokens.append(token)
    names = [name for token in tokens if isinstance(token, Slot) for name in token.names]
    if len(set(names)) != len(names):
        raise PatternError(f"'{text}' uses a group twice: on the way back the two could differ; use it once")
    if not tokens:
        raise PatternError("the target is empty: write the key of the model")
    return _checked(tokens, text, effort, target=True)


def _checked(tokens: Sequence[Token], text: str, effort: Effort | None, target: bool = False) -> Side:
    side, effort = Side(tuple(tokens)), effort or Effort()
    if side.readings > _MAX_READINGS:
        raise PatternError(f"'{text}' matches {side.readings} kinds of keys: the limit is {_MAX_READINGS}")
    opened = any(slot.kind in ("word", "segment", "rest", "path") for slot in side.slots)
    effort.spend(1, 0 if target else side.readings, 0 if target else opened)
    _check_readings(tokens, text, effort)
    return side


def _target_tokens(
    text: str, source: Side, lookups: Mapping[str, Mapping[str, str]], offset: int, index: str | None
) -> Iterator[Token]:
    known = {name: slot for slot in source.slots for name in slot.names}
    at = own = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            number = text[at + 1 : at + 2]
            if number not in set("0123456789"):
                _literal(text, at, target=True)
            if number == "0":
                raise PatternError(f"'{text}' uses group 0: groups count from 1, write \\1")
            yield _same(known, str(int(number) + offset), text, offset)
            at += 2
        elif char == "<":
            end = text.find(">", at)
            if end < 0:
                raise PatternError(f"'{text}': the < at character {at + 1} is not closed")
            yield _computed(text[at + 1 : end], known, lookups, text, offset, index)
            at = end + 1
        elif char == "(":
            end = _group_end(text, at)
            own += 1
            yield Slot((f"own{own}",), "alts", _alternatives(text[at + 1 : end], text, target=True))
            at = end + 1
        else:
            literal = _literal(text, at, target=True)
            yield literal
            at += len(literal)


def _same(known: Mapping[str, Slot], name: str, text: str, offset: int) -> Slot:
    if name not in known:
        shown = str(int(name) - offset) if name.isdigit() else name
        have = len(known) - offset
        count = f"it has {have} group{'' if have == 1 else 's'}" if have > 0 else "it has no group"
        raise PatternError(f"'{text}' uses group {shown}, which the source pattern does not have: {count}")
    slot = known[name]
    return Slot((name,), slot.kind, tuple((value, value) for value, _ in slot.options), low=slot.low, high=slot.high)


def _computed(
    body: str,
    known: Mapping[str, Slot],
    lookups: Mapping[str, Mapping[str, str]],
    text: str,
    offset: int,
    index: str | None,
) -> Slot:
    """What ``<body>`` in a target holds: an index of ``unstack``, a lookup, or arithmetic."""
    if body == index:
        return Slot((body,), "int")
    number, colon, table = body.partition(":")
    if colon and number.isascii() and number.isdigit():
        slot = _same(known, str(int(number) + offset), text, offset)
        return _looked_up(slot, table, body, lookups)
    found = _ARITHMETIC.fullmatch(body)
    if found is None or not (found.group(2) or found.group(4)):
        raise PatternError(f"<{body}> in '{text}': {_angle_advice(body, index)}")
    high, base, low, shift = found.groups()
    first = _same(known, str(int(high) + offset), text, offset)
    shift = shift or "+0"
    first = replace(first, shift=int(shift)) if shift[1:].isdigit() else replace(first, by_fact=shift)
    if not base:
        if first.kind != "int":
            raise PatternError(f"<{body}> in '{text}': arithmetic needs a (\\d+) group")
        return first
    second = _same(known, str(int(low) + offset), text, offset)
    values = [value for value, _ in second.options]
    if first.kind != "int" or len(values) != int(base) or values != [str(i) for i in range(int(base))]:
        raise PatternError(
            f"<{body}> in '{text}': group {high} must be (\\d+) and group {low} must list "
            f"0 to {int(base) - 1}, as (0|1|...)"
        )
    return replace(first, names=(*first.names, *second.names), base=int(base))


def _looked_up(slot: Slot, table: str, body: str, lookups: Mapping[str, Mapping[str, str]]) -> Slot:
    """A group through a lookup."""
    if table not in lookups:
        raise UnknownLookupError(table, f"<{body}>: there is no lookup {table!r}")
    if slot.kind != "alts":
        raise PatternError(f"<{body}>: a lookup needs a group of alternatives (a|b), to be reversible")
    lacking = [value for value, _ in slot.options if value not in lookups[table]]
    if lacking:
        raise WrongLookupError(table, f"has no entry for {', '.join(lacking)}: add it")
    options = tuple((value, lookups[table][value]) for value, _ in slot.options)
    names = [name for _, name in options]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = " and ".join(value for value, name in options if name == twice)
        raise WrongLookupError(
            table, f"gives {both} one name, {twice}, so there is no way back: give each its own name"
        )
    return Slot(slot.names, "alts", options)


def _angle_advice(body: str, index: str | None) -> str:
    if body == "0":
        return "groups count from 1, write \\1"
    if body.isascii() and body.isdigit():
        return f"write \\{body}"
    if re.fullmatch(r"[a-z]\w*", body, re.ASCII):
        return (
            f"write <{index}>, as unstack says"
            if index
            else f"<{body}> goes with unstack: {body}; for a group write \\1"
        )
    return "write <1+1>, <1*6+2>, <1:lookup> or <name> with unstack"


def _check_readings(tokens: Sequence[Token], text: str, effort: Effort) -> None:
    """Refuse a pattern that can read one key in two ways."""
    for i, token in enumerate(tokens):
        after = tokens[i + 1 :]
        if isinstance(token, str):
            continue
        if token.kind == "alts":
            _check_alternatives(token, after, text, effort)
        elif token.kind == "rest":
            if after:
                raise PatternError(f"'{text}': (.+) is allowed only at the end; write ([^.]+) or (\\w+) here")
        elif token.kind == "path":
            _check_path(tokens[:i], after, text)
        else:
            _check_open(token, after, text)


def _check_path(before: Sequence[Token], after: Sequence[Token], text: str) -> None:
    """Refuse a ``(**.)`` whose end the rest of the key does not show: the rest must have one number of dots."""
    if before and not (isinstance(before[-1], str) and before[-1].endswith(".")):
        raise PatternError(f"'{text}': (**.) stands for whole segments: write it at the start or after a dot")
    slots = [token for token in after if isinstance(token, Slot)]
    if not after or any(slot.kind in ("rest", "path") for slot in slots):
        raise PatternError(f"'{text}': after (**.) the key must end in known segments, for example (**.)weight")
    if any(len({written.count(".") for _, written in slot.options}) > 1 for slot in slots):
        raise PatternError(
            f"'{text}': alternatives after (**.) must have equally many dots, so that a key has one reading"
        )


def _check_alternatives(slot: Slot, after: Sequence[Token], text: str, effort: Effort) -> None:
    """Refuse alternatives of which one begins another, unless what follows shows which it was."""
    effort.spend(len(slot.options) ** 2 // 16)
    for short, long in permutations([written for _, written in slot.options], 2):
        if long.startswith(short) and long != short:
            key = overlap(Side(tuple(after)), Side((long[len(short) :], *after)), effort)
            if key is not None:
                raise PatternError(f"'{text}': '{short + key}' has two readings, with {short!r} and {long!r}")


def _check_open(slot: Slot, after: Sequence[Token], text: str) -> None:
    """Refuse an open-ended group that is followed by something it could match itself."""
    inside = OPEN[slot.kind][1]
    for follow in after:
        if isinstance(follow, str):
            first, may_be_empty = [follow[0]], False
        elif follow.kind == "alts":
            first = [s[0] for _, s in follow.options if s]
            may_be_empty = any(not s for _, s in follow.options)
        else:
            raise PatternError(f"'{text}': two open-ended groups need text between them, for example a dot")
        if any(inside(c) for c in first):
            shown = follow if isinstance(follow, str) else follow.regex()
            raise PatternError(
                f"'{text}': '{shown}' follows an open-ended group that can match it too, so a key has two "
                f"readings: write ([^.]+) or (\\d+), or add a dot"
            )
        if not may_be_empty:
            break
