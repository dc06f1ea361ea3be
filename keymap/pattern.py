r"""Key patterns: a reversible subset of regular expressions, matched against the whole key.

A *side* of a rule is a sequence of tokens: literal text, and slots that hold the value of a captured
variable. Both sides of a rule are made of the same tokens over the same variables, so either side can be
matched and either can be written: the inverse of a rule is the rule with its sides exchanged.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import prod

__all__ = ["MAX_DIGITS", "Effort", "PatternError", "Side", "Slot", "overlap", "parse_source", "parse_target"]


class PatternError(ValueError):
    """A pattern outside the subset; the message says what to write instead."""


MAX_DIGITS = 9  # of an index
_MOST_TEXT = 512  # characters of one side of a rule, with the prefixes of its tables
_MOST_READINGS = 1000  # combinations of alternatives and of a few indices that a pattern stands for


class Effort:
    """How much work the patterns of one file may make.

    Attributes:
        steps: of a microsecond or so, to tell the patterns apart.
        keys: that the source patterns stand for, in samples and where blocks are asked to be whole.
        opened: source patterns with an open-ended group, each of which goes through all of a key that begins alike.
    """

    def __init__(self, steps: int = 500_000, keys: int = 3000, opened: int = 40) -> None:
        self.steps, self.keys, self.opened = steps, keys, opened

    def spend(self, steps: int, keys: int = 0, opened: int = 0) -> None:
        """Raises PatternError where nothing is left."""
        self.steps, self.keys, self.opened = self.steps - steps, self.keys - keys, self.opened - opened
        if self.opened < 0:
            raise PatternError("the file has too many patterns with (\\w+), ([^.]+) or (.+): list what they stand for")
        if self.steps < 0 or self.keys < 0:
            raise PatternError("the patterns of this file are too many, or too much alike, to be told apart")


_OPEN: dict[
    str, tuple[str, Callable[[str], bool]]
] = {  # kind -> (regular expression, "can this character occur in it?")
    "int": (rf"(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})", lambda c: c in "0123456789"),
    "word": (r"[A-Za-z0-9_]+", lambda c: c.isascii() and (c.isalnum() or c == "_")),
    "part": (r"[^.]+", lambda c: c != "."),
    "rest": (r".+", lambda c: True),
}
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


@dataclass(frozen=True)
class Slot:
    """A place in a key that holds one variable, or two: ``number = high * base + low + shift``.

    Attributes:
        names: the variable, or (high, low).
        kind: ``int``, ``word``, ``part``, ``rest`` or ``alts``.
        options: for ``alts``, pairs of (value of the variable, how this side spells it).
        shift, base: index arithmetic, for ``int``.
        limit: for two variables, how many values the low one has.
    """

    names: tuple[str, ...]
    kind: str
    options: tuple[tuple[str, str], ...] = ()
    shift: int = 0
    base: int = 0

    @cached_property
    def plain(self) -> bool:
        """True when this side spells the variable as it is."""
        if self.kind == "alts":
            return all(value == spelled for value, spelled in self.options)
        return not self.base and not self.shift

    def regex(self) -> str:
        if self.kind == "alts":
            return "(" + "|".join(re.escape(spelled) for _, spelled in self.options) + ")"
        return "(" + _OPEN[self.kind][0] + ")"

    def read(self, text: str) -> dict[str, str] | None:
        """The variables' values from this side's text; None where the text is out of their range."""
        if self.kind == "alts":
            return {self.names[0]: next(value for value, spelled in self.options if spelled == text)}
        if self.kind != "int" or (not self.base and not self.shift):
            return {self.names[0]: text}
        number = int(text) - self.shift
        if number < 0:
            return None
        if not self.base:
            return {self.names[0]: str(number)}
        high, low = divmod(number, self.base)
        return {self.names[0]: str(high), self.names[1]: str(low)}

    def write(self, values: Mapping[str, str]) -> str:
        value = values[self.names[0]]
        if self.kind == "alts":
            return next(spelled for known, spelled in self.options if known == value)
        if self.base:
            low = int(values[self.names[1]])
            return str(int(value) * self.base + low + self.shift)
        return str(int(value) + self.shift) if self.shift else value


Token = str | Slot


@dataclass(frozen=True)
class Side:
    """One side of a rule: literal text and slots, in order."""

    tokens: tuple[Token, ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(t for t in self.tokens if isinstance(t, Slot))

    @cached_property
    def regex(self) -> str:
        return "".join(re.escape(t) if isinstance(t, str) else t.regex() for t in self.tokens)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """Compiled when first asked for: of most formats no key is ever seen."""
        return re.compile(self.regex, re.DOTALL)

    @cached_property
    def variables(self) -> tuple[str, ...]:
        return tuple(name for slot in self.slots for name in slot.names)

    @cached_property
    def literal(self) -> bool:
        """True when the side is one fixed key."""
        return all(isinstance(t, str) for t in self.tokens)

    @cached_property
    def prefix(self) -> str:
        """The literal text in front of the first slot."""
        return self.tokens[0] if self.tokens and isinstance(self.tokens[0], str) else ""

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """Literal texts of which one begins every key that the side matches."""
        first, after = self.tokens[0] if self.tokens else "", self.tokens[1:2]
        if isinstance(first, str):
            return (first,)
        follows = after[0] if after and isinstance(after[0], str) else ""
        return tuple(spelled + follows for _, spelled in first.options) if first.kind == "alts" else ("",)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Literal texts of which one ends every key that the side matches."""
        last, before = self.tokens[-1] if self.tokens else "", self.tokens[-2:-1]
        if isinstance(last, str):
            return (last,)
        leads = before[0] if before and isinstance(before[0], str) else ""
        return tuple(leads + spelled for _, spelled in last.options) if last.kind == "alts" else ("",)

    def match(self, key: str) -> dict[str, str] | None:
        """The variables' values, or None. Linear in the length of the key."""
        if self._open is not None:
            rest = key.removeprefix(self.prefix)
            return {self._open: rest} if rest and len(rest) + len(self.prefix) == len(key) else None
        found = self._regex.fullmatch(key) if key.startswith(self.starts) else None
        if found is None:
            return None
        if self._plain is not None:
            return dict(zip(self._plain, found.groups(), strict=True))
        values: dict[str, str] = {}
        for slot, text in zip(self.slots, found.groups(), strict=True):
            if slot.plain:
                values[slot.names[0]] = text
                continue
            read = slot.read(text)
            if read is None:
                return None
            values.update(read)
        return values

    @cached_property
    def _open(self) -> str | None:
        """The variable of a side that is a text and any rest."""
        slots = self.slots
        return slots[0].names[0] if len(slots) == 1 and slots[0].kind == "rest" and len(self.tokens) == 2 else None

    @cached_property
    def _plain(self) -> tuple[str, ...] | None:
        """The variables, where the side spells all of them as they are."""
        return tuple(slot.names[0] for slot in self.slots) if all(slot.plain for slot in self.slots) else None

    @cached_property
    def _form(self) -> str:
        """The side with ``%s`` in the place of each slot."""
        return "".join(t.replace("%", "%%") if isinstance(t, str) else "%s" for t in self.tokens)

    def write(self, values: Mapping[str, str]) -> str:
        if self._plain is not None:
            return self._form % tuple([values[name] for name in self._plain])
        return self._form % tuple([slot.write(values) for slot in self.slots])

    @property
    def sample(self) -> str:
        """One of the keys that the side matches."""
        values: dict[str, str] = {}
        for slot in self.slots:
            value = str(max(1, -slot.shift)) if slot.kind == "int" else slot.options[0][0] if slot.options else "a"
            values.update(dict.fromkeys(slot.names, value))
        return self.write(values)

    @cached_property
    def readings(self) -> int:
        """How many keys a sample of it has: every alternative, three of each index, one word."""
        return prod(len(slot.options) or (3 if slot.kind == "int" else 1) for slot in self.slots)

    @cached_property
    def automaton(self) -> _Automaton:
        return _automaton(self)

    def __str__(self) -> str:
        names = {"int": r"(\d+)", "word": r"(\w+)", "part": "([^.]+)", "rest": "(.+)"}
        return "".join(
            t if isinstance(t, str) else names.get(t.kind) or "(" + "|".join(s for _, s in t.options) + ")"
            for t in self.tokens
        )


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
        inside = _OPEN[token.kind][1]
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


# --- do two sides share a key? ---------------------------------------------------------------------

_digit = _OPEN["int"][1]
_Class = str | Callable[[str], bool]  # one character, or a predicate
_Automaton = tuple[list[list[tuple[_Class, int]]], list[list[int]], int]
_SAMPLES = "1a_-/.:#"


def _automaton(side: Side) -> _Automaton:
    """States with character edges and empty edges; the last number is the accepting state."""
    edges: list[list[tuple[_Class, int]]] = [[]]
    empty: list[list[int]] = [[]]

    def state() -> int:
        edges.append([])
        empty.append([])
        return len(edges) - 1

    def chain(at: int, text: str) -> int:
        for char in text:
            after = state()
            edges[at].append((char, after))
            at = after
        return at

    def number(at: int, least: int) -> int:
        """The numbers from ``least`` on, without leading zeros."""
        done, longer = state(), state()
        empty[longer].append(done)
        edges[longer].append((_digit, longer))
        to_come = [longer]  # by how many digits are still to come, at least
        for _ in str(least):
            edges[state()].append((_digit, to_come[-1]))
            to_come.append(len(edges) - 1)
        for left, digit in zip(range(len(str(least)) - 1, -1, -1), str(least), strict=True):
            for other in "0123456789":
                if other != digit and (other != "0" or left < len(str(least)) - 1):
                    edges[at].append((other, to_come[left + (other < digit)]))
            at = chain(at, digit)
        empty[at].append(longer if least else done)
        return done

    at = 0
    for token in side.tokens:
        if isinstance(token, str):
            at = chain(at, token)
        elif token.kind == "alts":
            ends = [chain(at, spelled) for _, spelled in token.options]
            join = state()
            for end in ends:
                empty[end].append(join)
            at = join
        elif token.kind == "int":
            at = number(at, max(0, token.shift))
        else:
            after = state()
            inside = _OPEN[token.kind][1]
            edges[at].append((inside, after))
            edges[after].append((inside, after))
            at = after
    return edges, empty, at


def _common(a: _Class, b: _Class) -> str | None:
    if isinstance(a, str):
        return a if (a == b if isinstance(b, str) else b(a)) else None
    if isinstance(b, str):
        return b if a(b) else None
    return next((c for c in _SAMPLES if a(c) and b(c)), None)


def _part(a: Side, b: Side) -> bool:
    """True where two sides that begin alike, with the same texts and indices, go on with different texts."""
    for one, other in zip(a.tokens, b.tokens, strict=False):
        if isinstance(one, str) and isinstance(other, str):
            if one != other:
                return not (one.startswith(other) or other.startswith(one))
        elif isinstance(one, str) or isinstance(other, str) or one.kind != "int" or other.kind != "int":
            return False
    return False


def overlap(a: Side, b: Side, effort: Effort | None = None) -> str | None:
    """A key that both sides match, or None where they share none; PatternError where ``effort`` is not enough."""
    effort = effort or Effort()
    effort.spend(1 + len(a.starts) * len(b.starts) // 8 + len(a.ends) * len(b.ends) // 8)
    if not (any(x.startswith(b.starts) for x in a.starts) or any(y.startswith(a.starts) for y in b.starts)):
        return None
    if not (any(x.endswith(b.ends) for x in a.ends) or any(y.endswith(a.ends) for y in b.ends)):
        return None
    if _part(a, b):
        return None
    edges_a, empty_a, end_a = a.automaton
    edges_b, empty_b, end_b = b.automaton
    queue: list[tuple[int, int, str]] = [(0, 0, "")]
    seen = {(0, 0)}
    while queue:
        i, j, text = queue.pop()
        effort.spend(2 + len(edges_a[i]) * len(edges_b[j]) // 2)
        if i == end_a and j == end_b and a.match(text) is not None and b.match(text) is not None:
            return text
        steps = [(n, j, text) for n in empty_a[i]] + [(i, n, text) for n in empty_b[j]]
        for class_a, n in edges_a[i]:
            for class_b, m in edges_b[j]:
                char = _common(class_a, class_b)
                if char is not None:
                    steps.append((n, m, text + char))
        for step in steps:
            if step[:2] not in seen:
                seen.add(step[:2])
                queue.append(step)
    return None
