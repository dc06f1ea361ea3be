"""Key patterns, parsed: matched against a whole key, and written from captured values.

A *side* of a rule is a sequence of tokens: literal text, and slots that hold the value of a captured
variable. Both sides of a rule are made of the same tokens over the same variables, so either side can be
matched and either can be written: the inverse of a rule is the rule with its sides exchanged. `pattern_syntax`
describes and parses their syntax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from keymap.language.amounts import Amount, ByFact, facts_of

__all__ = ["MAX_DIGITS", "OPEN", "Effort", "PatternError", "Side", "Slot", "Token"]


class PatternError(ValueError):
    """A pattern outside the subset; the message says what to write instead."""


MAX_DIGITS = 9  # of an index


class Effort:
    """How much work the patterns of one file may take.

    Attributes:
        steps: of about a microsecond, to compare the patterns with each other.
        keys: that the source patterns match, in samples and where blocks are checked to be complete.
        opened: source patterns with an open-ended group, each of which reads a whole key that begins alike.
    """

    def __init__(self, steps: int = 500_000, keys: int = 3000, opened: int = 40) -> None:
        self.steps, self.keys, self.opened = steps, keys, opened

    def spend(self, steps: int, keys: int = 0, opened: int = 0) -> None:
        """Raises PatternError where nothing is left."""
        self.steps, self.keys, self.opened = self.steps - steps, self.keys - keys, self.opened - opened
        if self.opened < 0:
            raise PatternError(
                "the file has too many patterns with (\\w+), ([^.]+) or (.+): list the alternatives instead"
            )
        if self.steps < 0 or self.keys < 0:
            raise PatternError(
                "the patterns of this file are too many, or too much alike, to compare: write fewer or shorter ones"
            )


OPEN: dict[
    str, tuple[str, Callable[[str], bool]]
] = {  # kind -> (regular expression, "can this character occur in it?")
    "int": (rf"(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})", lambda c: c in "0123456789"),
    "word": (r"[A-Za-z0-9_]+", lambda c: c.isascii() and (c.isalnum() or c == "_")),
    "segment": (r"[^.]+", lambda c: c != "."),
    "rest": (r".+", lambda c: True),
    "path": (r"(?:.*\.)?", lambda c: True),
}
_SAMPLES = {"int": "1", "word": "a", "segment": "a", "rest": "a", "path": "a."}
_WRITTEN = {"int": r"(\d+)", "word": r"(\w+)", "segment": "([^.]+)", "rest": "(.+)", "path": "(**.)"}


@dataclass(frozen=True)
class Slot:
    """A place in a key that holds one variable, or two: ``number = high * base + low + shift``.

    Attributes:
        names: the variable, or (high, low).
        kind: ``int``, ``word``, ``segment`` (up to a dot), ``rest``, ``alts``, or ``path``: any number of segments,
            each with its dot.
        options: for ``alts``, pairs of (value of the variable, its text on this side).
        shift, base: index arithmetic, for ``int``.
        low, high: the variable, or the high one, is an index in [low, high); None for no end.
        by_fact: a fact that is added to the index or subtracted from it, with its sign; `within` makes it a ``shift``.
    """

    names: tuple[str, ...]
    kind: str
    options: tuple[tuple[str, str], ...] = ()
    shift: int = 0
    base: int = 0
    low: Amount = 0
    high: Amount | None = None
    by_fact: str = ""

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """The facts whose values the slot needs."""
        return tuple(dict.fromkeys((*facts_of([self.low, self.high]), *([self.by_fact[1:]] if self.by_fact else ()))))

    def within(self, facts: Mapping[str, int]) -> Slot:
        """The slot with the numbers of those of its facts that are known."""
        low, high = (
            facts[one.fact] * one.times if isinstance(one, ByFact) and one.fact in facts else one
            for one in (self.low, self.high)
        )
        slot = replace(self, low=low or 0, high=high)
        if self.by_fact[1:] in facts:
            number = facts[self.by_fact[1:]]
            slot = replace(slot, shift=self.shift + (number if self.by_fact[0] == "+" else -number), by_fact="")
        return slot

    @cached_property
    def bounded(self) -> bool:
        return bool(self.low) or self.high is not None

    def holds(self, number: int) -> bool:
        """Whether an index is in the range, as far as it is known."""
        above = not isinstance(self.low, int) or number >= self.low
        return above and (not isinstance(self.high, int) or number < self.high)

    @cached_property
    def plain(self) -> bool:
        """True when the text on this side is the variable's value."""
        if self.kind == "alts":
            return all(value == text for value, text in self.options)
        return not (self.base or self.shift or self.bounded or self.by_fact)

    def regex(self) -> str:
        if self.kind == "alts":
            return "(" + "|".join(re.escape(text) for _, text in self.options) + ")"
        return "(" + OPEN[self.kind][0] + ")"

    def read(self, text: str) -> dict[str, str] | None:
        """The variables' values from this side's text; None where the text is out of their range."""
        if self.kind == "alts":
            return {self.names[0]: next(value for value, written in self.options if written == text)}
        if self.kind != "int" or self.plain:
            return {self.names[0]: text}
        number = int(text) - self.shift
        if number < 0:
            return None
        high, low = divmod(number, self.base or 1)
        if not self.holds(high):
            return None
        if not self.base:
            return {self.names[0]: str(number)}
        return {self.names[0]: str(high), self.names[1]: str(low)}

    def write(self, values: Mapping[str, str]) -> str:
        value = values[self.names[0]]
        if self.kind == "alts":
            return next(text for known, text in self.options if known == value)
        if self.base:
            low = int(values[self.names[1]])
            return str(int(value) * self.base + low + self.shift)
        return str(int(value) + self.shift) if self.shift else value

    def __str__(self) -> str:
        if self.kind == "alts":
            return "(" + "|".join(text for _, text in self.options) + ")"
        start = f">={self.low}" if self.low else ""
        stop = f"<{self.high}" if self.high is not None else ""
        return _WRITTEN[self.kind][:-1] + start + stop + ")"


Token = str | Slot


@dataclass(frozen=True)
class Side:
    """One side of a rule: literal text and slots, in order."""

    tokens: tuple[Token, ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(t for t in self.tokens if isinstance(t, Slot))

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """The facts whose values the slots need."""
        return tuple(dict.fromkeys(fact for slot in self.slots for fact in slot.facts))

    def within(self, facts: Mapping[str, int]) -> Side:
        """The side with the numbers of those of its facts that are known."""
        if not self.facts:
            return self
        return Side(tuple(token if isinstance(token, str) else token.within(facts) for token in self.tokens))

    @cached_property
    def regex(self) -> str:
        return "".join(re.escape(t) if isinstance(t, str) else t.regex() for t in self.tokens)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """Compiled when first needed: most formats never see a key."""
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
        """Every key that the side matches begins with one of these texts."""
        first, after = self.tokens[0] if self.tokens else "", self.tokens[1:2]
        if isinstance(first, str):
            return (first,)
        follows = after[0] if after and isinstance(after[0], str) else ""
        return tuple(text + follows for _, text in first.options) if first.kind == "alts" else ("",)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Every key that the side matches ends with one of these texts."""
        last, before = self.tokens[-1] if self.tokens else "", self.tokens[-2:-1]
        if isinstance(last, str):
            return (last,)
        leads = before[0] if before and isinstance(before[0], str) else ""
        return tuple(leads + text for _, text in last.options) if last.kind == "alts" else ("",)

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
        """The variables, if the side writes all of them unchanged."""
        return tuple(slot.names[0] for slot in self.slots) if all(slot.plain for slot in self.slots) else None

    @cached_property
    def _form(self) -> str:
        """The side for Python's ``%``: each slot is ``%(name)s``, or ``%s`` if a slot changes what it writes."""
        plain = self._plain is not None
        return "".join(
            t.replace("%", "%%") if isinstance(t, str) else f"%({t.names[0]})s" if plain else "%s" for t in self.tokens
        )

    def write(self, values: Mapping[str, str]) -> str:
        if self._plain is not None:
            return self._form % values
        return self._form % tuple([slot.write(values) for slot in self.slots])

    @property
    def sample(self) -> str:
        """One of the keys that the side matches."""
        values: dict[str, str] = {}
        for slot in self.slots:
            values.update(dict.fromkeys(slot.names, slot.options[0][0] if slot.options else _SAMPLES[slot.kind]))
            if slot.kind == "int":
                least = max(1, -slot.shift, slot.low if isinstance(slot.low, int) else 0)
                values[slot.names[0]] = str(min(least, slot.high - 1) if isinstance(slot.high, int) else least)
        return self.write(values)

    @cached_property
    def readings(self) -> int:
        """How many keys a sample has: every alternative, three of each index, one word."""
        return prod(len(slot.options) or (3 if slot.kind == "int" else 1) for slot in self.slots)

    def __str__(self) -> str:
        return "".join(map(str, self.tokens))
