r"""Key patterns as a mapping spells them: a reversible subset of regular expressions.

==================  ============================================================================
``(\d+)``           an index: 0, 1, 2, ... without leading zeros, at most nine digits
``(\w+)``           letters, digits, underscores
``([^.]+)``         anything up to a dot
``(a|b|c)``         one of the alternatives
``(.+)``            the rest of the key; only at the end
``\1``              (target) the value of the first group
``<1+1>``           (target) index arithmetic; ``<1*6+2>`` is 6 times the first plus the second
``<1:name>``        (target) the first group through the one-to-one lookup ``name``
``<layer>``         (target) the index that ``unstack: layer`` counts
``(q|kv)``          (target) a group of its own: the parts that a ``split`` writes
==================  ============================================================================

Everything else is literal; a dot is a dot. An open-ended group must be followed by something that it cannot
match itself, and alternatives must be told apart by what follows them, so a key has one reading and matching
takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

from keymap.language.overlap import overlap
from keymap.language.pattern import OPEN, Effort, PatternError, Side, Slot, Token

__all__ = ["parse_source", "parse_target"]

_MOST_TEXT = 512  # characters of one side of a rule, with the prefixes of its tables
_MOST_READINGS = 1000  # combinations of alternatives and of a few indices that a pattern stands for
_GROUPS = {r"\d+": "int", r"\w+": "word", r"[^.]+": "part", ".+": "rest"}
_LITERAL = re.compile(r"[A-Za-z0-9_./:#@~ -]+")
_ADVICE = {
    "\\": "a dot outside a group is already a dot, and only \\d and \\w exist, inside a group",
    "^": "a pattern always matches the whole key: leave ^ out",
    "$": "a pattern always matches the whole key: leave $ out",
    "*": "write (\\d+), (\\w+), ([^.]+), (a|b) or, at the end, (.+)",
    "+": "write (\\d+), (\\w+), ([^.]+) or, at the end, (.+)",
    "?": "list the alternatives instead: (|x), or mark the rule optional",
    "[": "only the group ([^.]+) exists",
    "{": "only the groups (\\d+), (\\w+), ([^.]+), (a|b) and (.+) exist",
}


def _literal(text: str, at: int, whole: str) -> str:
    found = _LITERAL.match(text, at)
    if found is None:
        advice = _ADVICE.get(text[at], "keys hold letters, digits and _ . / : # @ ~ -")
        raise PatternError(f"'{text[at]}' at character {at + 1} of '{whole}': {advice}")
    return found.group()


def _group_end(text: str, at: int) -> int:
    end = text.find(")", at)
    if end < 0:
        raise PatternError(f"the group that opens at character {at + 1} of '{text}' is not closed")
    return end


def _alternatives(body: str, text: str) -> tuple[tuple[str, str], ...]:
    options = body.split("|")
    for option in options:
        if option and not _LITERAL.fullmatch(option):
            kinds = ", ".join(f"({g})" for g in _GROUPS)
            raise PatternError(f"({body}) in '{text}' is neither one of {kinds} nor a list of plain alternatives (a|b)")
    if len(set(options)) != len(options):
        raise PatternError(f"({body}) in '{text}' lists an alternative twice")
    return tuple((option, option) for option in options)


def parse_source(text: str, first: int = 1, effort: Effort | None = None) -> Side:
    """A source pattern; its groups are the variables ``first``, ``first + 1``, ..."""
    tokens: list[Token] = []
    _check_length(text)
    at = 0
    while at < len(text):
        if text[at] == "(":
            end = _group_end(text, at)
            body = text[at + 1 : end]
            name = str(first)
            first += 1
            if body in _GROUPS:
                tokens.append(Slot((name,), _GROUPS[body]))
            else:
                tokens.append(Slot((name,), "alts", _alternatives(body, text)))
            at = end + 1
        else:
            literal = _literal(text, at, text)
            tokens.append(literal)
            at += len(literal)
    if not tokens:
        raise PatternError("an empty pattern matches no key")
    return _checked(tokens, text, effort)


def _check_length(text: str) -> None:
    if len(text) > _MOST_TEXT:
        raise PatternError(f"a pattern of {len(text)} characters, {text[:40]!r} ...: the limit is {_MOST_TEXT}")


_ARITHMETIC = re.compile(r"(\d{1,9})(?:\*(\d{1,9})\+(\d{1,9}))?(?:([+-]\d{1,9}))?", re.ASCII)


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
        raise PatternError(f"'{text}' uses a group twice: the way back could not tell which one to believe")
    if not tokens:
        raise PatternError("an empty target")
    return _checked(tokens, text, effort, target=True)


def _checked(tokens: Sequence[Token], text: str, effort: Effort | None, target: bool = False) -> Side:
    side, effort = Side(tuple(tokens)), effort or Effort()
    if side.readings > _MOST_READINGS:
        raise PatternError(f"'{text}' stands for {side.readings} kinds of keys: the limit is {_MOST_READINGS}")
    opened = any(slot.kind in ("word", "part", "rest") for slot in side.slots)
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
                raise PatternError(f"'{text}': after a backslash stands the number of a group, as in \\1")
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
            yield Slot((f"part{own}",), "alts", _alternatives(text[at + 1 : end], text))
            at = end + 1
        else:
            literal = _literal(text, at, text)
            yield literal
            at += len(literal)


def _same(known: Mapping[str, Slot], name: str, text: str, offset: int) -> Slot:
    if name not in known:
        shown = str(int(name) - offset) if name.isdigit() else name
        raise PatternError(f"'{text}' uses group {shown}, which the source pattern does not have")
    slot = known[name]
    return Slot((name,), slot.kind, tuple((value, value) for value, _ in slot.options))


def _computed(
    body: str,
    known: Mapping[str, Slot],
    lookups: Mapping[str, Mapping[str, str]],
    text: str,
    offset: int,
    index: str | None,
) -> Slot:
    if body == index:
        return Slot((body,), "int")
    number, colon, table = body.partition(":")
    if colon and number.isascii() and number.isdigit():
        slot = _same(known, str(int(number) + offset), text, offset)
        if table not in lookups:
            near = ", ".join(sorted(lookups)) or "none is declared"
            raise PatternError(f"<{body}>: there is no lookup {table!r}; known: {near}")
        if slot.kind != "alts":
            raise PatternError(f"<{body}>: a lookup needs a group of alternatives (a|b), to be reversible")
        lacking = [value for value, _ in slot.options if value not in lookups[table]]
        if lacking:
            raise PatternError(f"<{body}>: lookup {table!r} has no entry for {', '.join(lacking)}")
        options = tuple((value, lookups[table][value]) for value, _ in slot.options)
        if len({spelled for _, spelled in options}) != len(options):
            raise PatternError(f"<{body}>: lookup {table!r} gives two alternatives one name: no way back")
        return Slot(slot.names, "alts", options)
    found = _ARITHMETIC.fullmatch(body)
    if found is None:
        raise PatternError(f"<{body}> in '{text}': write <1+1>, <1*6+2>, <1:lookup> or <name> with unstack")
    high, base, low, shift = found.groups()
    first = _same(known, str(int(high) + offset), text, offset)
    if not base:
        if first.kind != "int":
            raise PatternError(f"<{body}> in '{text}': arithmetic needs a (\\d+) group")
        return Slot(first.names, "int", shift=int(shift or 0))
    second = _same(known, str(int(low) + offset), text, offset)
    values = [value for value, _ in second.options]
    if first.kind != "int" or len(values) != int(base) or values != [str(i) for i in range(int(base))]:
        raise PatternError(
            f"<{body}> in '{text}': group {high} must be (\\d+) and group {low} must list "
            f"0 to {int(base) - 1}, as (0|1|...)"
        )
    return Slot((*first.names, *second.names), "int", shift=int(shift or 0), base=int(base))


def _check_readings(tokens: Sequence[Token], text: str, effort: Effort) -> None:
    """Refuse an open-ended group that is followed by something it could match itself, and such alternatives."""
    for i, token in enumerate(tokens):
        if isinstance(token, str):
            continue
        if token.kind == "alts":
            after = tuple(tokens[i + 1 :])
            effort.spend(len(token.options) ** 2 // 16)
            for short, long in permutations([spelled for _, spelled in token.options], 2):
                if long.startswith(short) and long != short:
                    key = overlap(Side(after), Side((long[len(short) :], *after)), effort)
                    if key is not None:
                        raise PatternError(f"'{text}': '{short + key}' has two readings, with {short!r} and {long!r}")
            continue
        if token.kind == "rest":
            if i + 1 < len(tokens):
                raise PatternError(f"'{text}': (.+) stands only at the end; use ([^.]+) or (\\w+) before")
            continue
        inside = OPEN[token.kind][1]
        for follow in tokens[i + 1 :]:
            if isinstance(follow, str):
                first, may_be_empty = [follow[0]], False
            elif follow.kind == "alts":
                first = [s[0] for _, s in follow.options if s]
                may_be_empty = any(not s for _, s in follow.options)
            else:
                raise PatternError(f"'{text}': two open-ended groups need literal text between them")
            if any(inside(c) for c in first):
                raise PatternError(
                    f"'{text}': '{follow if isinstance(follow, str) else follow.regex()}' follows an "
                    f"open-ended group that can match it too; no unique reading"
                )
            if not may_be_empty:
                break
