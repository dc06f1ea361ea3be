"""Rules as data: which keys they own, what they do and in which order, and their inverses.

The operations of a rule have one fixed order: view each member, join them, view the whole, cut it, view each
part. The reversed order has the same form, so the inverse of a rule is the rule with its sides exchanged and its
operations reversed, each replaced by its own inverse. `apply.py` applies rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from keymap.language.amounts import Amount, amount_in, check_known, facts_of
from keymap.language.layout import Layout
from keymap.language.pattern import Side, Slot
from keymap.language.rows import Rows
from keymap.language.scale import Scale
from keymap.language.view import View

__all__ = ["Check", "Fault", "Join", "Rule", "RuleError", "RuleTable", "Sizes", "Step"]

Sizes = Mapping[str, int | str]


class RuleError(ValueError):
    """A rule does not fit the tensors that it was given."""


class Join(NamedTuple):
    """How several tensors make one, and the other way round.

    Attributes:
        kind: ``concat`` along an axis, ``stack`` on a new axis, or ``rows`` merged by ranges of axis 0.
        axis: its number in the tensor that is joined (after ``view``).
        variables: the captures that number the members.
        members: the values of the last variable, in order; None is a member of zeros. Empty for an open index,
            whose members are 0, 1, 2, ...
        lengths: proportions of the parts; with a None (what is left) exact lengths. Empty: equal parts. `within`
            puts numbers in the place of facts.
        ranges: for ``rows``.
        spans: of each variable the first index, and the one after the last, if there is one. Empty: from 0 on.
    """

    kind: str
    axis: int
    variables: tuple[str, ...]
    members: tuple[str | None, ...] = ()
    lengths: tuple[Amount | None, ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    spans: tuple[tuple[Amount, Amount | None], ...] = ()

    @property
    def written_lengths(self) -> list[int | str]:
        """The lengths as in the mapping file."""
        return ["*" if n is None else n if isinstance(n, int) else str(n) for n in self.lengths]

    def within(self, facts: Mapping[str, int]) -> Join:
        """The join with a number for each length and each span.

        Raises:
            ValueError: a fact is not known, or not positive.
        """
        amounts = (*self.lengths, *(end for span in self.spans for end in span))
        if not facts_of(amounts):
            return self
        check_known(amounts, facts)
        lengths = tuple(None if n is None else amount_in(n, facts) for n in self.lengths)
        spans = tuple((amount_in(a, facts), None if b is None else amount_in(b, facts)) for a, b in self.spans)
        return self._replace(lengths=lengths, spans=spans)

    def span(self, number: int) -> tuple[int, int | None]:
        """The first index of a variable, and the one after the last, if there is one; after `within`."""
        low, high = self.spans[number] if self.spans else (0, None)
        return low if isinstance(low, int) else 0, high if isinstance(high, int) else None

    def bounds(self, total: int) -> list[tuple[int, int]]:
        """Where each member lies on the axis of a whole that is ``total`` long."""
        lengths = [n if isinstance(n, int) else None for n in self.lengths] or [1] * len(self.members)
        known = sum(n for n in lengths if n is not None)
        if None in lengths:
            exact = [total - known if n is None else n for n in lengths]
        else:
            if total % known:
                raise RuleError(f"an axis of length {total} cannot be cut in proportions {list(lengths)}")
            exact = [n * (total // known) for n in lengths if n is not None]
        if min(exact) < 1:
            raise RuleError(f"an axis of length {total} is too short for parts {self.written_lengths}")
        ends = [sum(exact[: i + 1]) for i in range(len(exact))]
        return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class Rule:
    """One rule in one direction.

    Attributes:
        place: ``file:line:column`` of the rule as written; ``text`` is the rule as written.
        tower: the tower it belongs to, empty for `aliases`.
        source, targets: the sides; more than one target for tied weights.
        take: the rows of axis 0 that are used at all.
        before, join, then, cut, after: the further operations, in this order.
        optional, oneway, rest: as in the mapping.
        sizes: axis lengths that shapes do not show.
        add: a key (and row) to add.
        arithmetic: elementwise arithmetic.
        pad: rows of zeros that each part gets at its end.
        twins: other source keys that hold the same values.
        tied: the key whose values this one must repeat: of a twin, or on the way back of a rule with several targets.
        used_at: for a rule of a table, the place of the outermost rule with ``table:`` that leads to it.
    """

    place: str
    text: str
    tower: str
    source: Side
    targets: tuple[Side, ...]
    take: Rows | None = None
    before: View | None = None
    join: Join | None = None
    then: View | None = None
    cut: Join | None = None
    after: View | None = None
    optional: bool = False
    oneway: bool = False
    rest: bool = False
    sizes: Sizes = field(default_factory=dict)
    add: tuple[str, int | None] | None = None
    arithmetic: Scale | None = None
    pad: Rows | None = None
    twins: tuple[Side, ...] = ()
    tied: Side | None = None
    used_at: str = ""

    @property
    def reported_at(self) -> str:
        """The place to report a fault of the rule at, where the table that holds it may be used for other keys."""
        return self.used_at or self.place

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """The facts that may be needed to apply the rule."""
        sizes = (size for size in self.sizes.values() if isinstance(size, str) and "." in size)
        padding = facts_of([self.pad.stop if self.pad is not None else None])
        return tuple(dict.fromkeys((*sizes, *self.facts_of_parts, *padding)))

    @cached_property
    def facts_of_parts(self) -> tuple[str, ...]:
        """The facts that lengths of parts, numbers of rows, arithmetic and indices need."""
        lengths = (length for step in (self.join, self.cut) if step is not None for length in step.lengths)
        rows = self.take.stop if self.take is not None else None
        root = self.arithmetic.root if self.arithmetic is not None else None
        return tuple(dict.fromkeys((*facts_of((*lengths, rows, root)), *self.facts_of_names)))

    @cached_property
    def facts_of_names(self) -> tuple[str, ...]:
        """The facts that the patterns of the sides need."""
        sides = (self.source, *self.targets, *self.twins)
        return tuple(dict.fromkeys(fact for side in sides for fact in side.facts))

    def within(self, facts: Mapping[str, int]) -> Rule:
        """The rule with the numbers of those facts in its patterns that are known."""
        if not self.facts_of_names:
            return self
        targets, twins = (tuple(side.within(facts) for side in sides) for sides in (self.targets, self.twins))
        return replace(self, source=self.source.within(facts), targets=targets, twins=twins)

    @cached_property
    def renames(self) -> bool:
        """True when the rule only renames one key."""
        does = (self.take, self.before, self.join, self.arithmetic, self.then, self.cut, self.after, self.add, self.pad)
        return len(self.targets) == 1 and self.tied is None and all(thing is None for thing in does)

    @cached_property
    def keeps(self) -> bool:
        """True when the rule leaves a key as it is."""
        return self.renames and self.source.tokens == self.targets[0].tokens

    @cached_property
    def counts(self) -> bool:
        """True when the captures are indices and alternatives, written unchanged."""
        plain = all(slot.plain and slot.kind in ("int", "alts") for slot in self.source.slots)
        return plain and not self._falling

    @cached_property
    def _falling(self) -> tuple[Slot, ...]:
        return tuple(slot for side in self.targets for slot in side.slots if slot.shift < 0)

    def match(self, key: str) -> dict[str, str] | None:
        """The captures, or None: also where ``<1-1>`` would write an index below zero."""
        values = self.source.match(key)
        if values is not None and self._falling and any(s.write(values).startswith("-") for s in self._falling):
            return None
        return values

    def inverse(self) -> tuple[Rule, ...]:
        """The inverse: one rule for each of several tied targets; none for a one-way rule, and none for a twin."""
        if self.oneway or self.tied is not None:
            return ()
        main = replace(
            self,
            source=self.targets[0],
            targets=(self.source, *self.twins),
            twins=self.targets[1:],
            take=self.pad,
            before=self.after.inverse() if self.after else None,
            join=self.cut,
            then=self.then.inverse() if self.then else None,
            cut=self.join,
            after=self.before.inverse() if self.before else None,
            arithmetic=self.arithmetic.inverse() if self.arithmetic else None,
            pad=self.take,
        )
        return main.with_twins()

    def with_twins(self) -> tuple[Rule, ...]:
        """The rule, and one for each key that holds the same values."""
        return (self, *(replace(self, source=side, twins=(), tied=self.source, optional=True) for side in self.twins))


class Check(NamedTuple):
    """A value to check before anything is written.

    Attributes:
        key: what is checked, as the report names it.
        layout: the elements to read.
        value: 0, 1 or ``eye``; or the layout that must be equal.
        why: what follows from it.
    """

    key: str
    layout: Layout
    value: float | str | Layout
    why: str


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
        text: what, in a sentence.
        sources: the source keys that it concerns.
        tower: the tower of the rule, empty for a fault of no tower.
        fatal: True where not even a partial load is safe: two keys that become one.
        foreign: True where a whole tower is of another architecture.
    """

    text: str
    sources: tuple[str, ...] = ()
    tower: str = ""
    fatal: bool = False
    foreign: bool = False


Step = tuple[Rule, tuple[str, ...], str]  # one application of a rule, for `Plan.explain`: to which keys, making which


_MANY = 100  # rules of a table; those of real formats have fewer
_MAX_SEEN = 1000  # forms of keys that a table remembers ...
_MAX_ALIKE = 8  # ... and owners of each
_DIGITS = re.compile(r"[0-9]+")
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


class _Like(NamedTuple):
    """Keys that differ in their digits alone, as those of repeated blocks do: one rule owns them all.

    Attributes:
        values: the rule's captures, of one of the keys.
        indices: captures that are a number in the key, with its start and its end.
        fixed: digits of the key that are the rule's own text, and where they begin.
    """

    values: dict[str, str]
    indices: tuple[tuple[str, int, int], ...]
    fixed: tuple[tuple[str, int], ...]

    def captures(self, key: str) -> dict[str, str] | None:
        """The captures of another key of the same form; None if the rule does not own it."""
        for digits, start in self.fixed:
            if not key.startswith(digits, start):
                return None
        values = self.values.copy()
        for name, start, stop in self.indices:
            if key[start] == "0" and stop - start > 1:
                return None
            values[name] = key[start:stop]
        return values


def _like(rule: Rule, values: Mapping[str, str]) -> _Like | None:
    """What a key shows of others of its form; None where captures may differ in more than an index.

    A number keeps its position, because no side has two readings: `pattern_syntax` refuses those.
    """
    if not rule.counts:
        return None
    indices: list[tuple[str, int, int]] = []
    fixed: list[tuple[str, int]] = []
    at = 0
    for token in rule.source.tokens:
        text = token if isinstance(token, str) else values[token.names[0]]
        if isinstance(token, Slot) and token.kind == "int":
            indices.append((token.names[0], at, at + len(text)))
        else:
            fixed += [(found.group(), at + found.start()) for found in _DIGITS.finditer(text)]
        at += len(text)
    return _Like(dict(values), tuple(indices), tuple(fixed))


@dataclass(frozen=True, eq=False, repr=False)
class RuleTable:
    """Rules that share no key, apart from `rest` rules, which own what no other rule owns."""

    rules: tuple[Rule, ...]

    @cached_property
    def _literal(self) -> dict[str, Rule]:
        return {rule.source.write({}): rule for rule in self.rules if rule.source.literal}

    @cached_property
    def _patterns(self) -> list[Rule]:
        """The other rules; `rest` rules are the last."""
        return sorted((rule for rule in self.rules if not rule.source.literal), key=lambda rule: rule.rest)

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        """Texts of which one begins every key that a pattern matches."""
        return tuple(dict.fromkeys(start for rule in self._patterns for start in rule.source.starts))

    @cached_property
    def _counts(self) -> bool:
        return any(rule.counts for rule in self._patterns)

    @cached_property
    def _any(self) -> re.Pattern[str]:
        """Matches what any pattern matches, so a key without an owner costs one match instead of one for each rule."""
        return re.compile("|".join(f"(?:{rule.source.regex})" for rule in self._patterns), re.DOTALL)

    @cached_property
    def _seen(self) -> dict[bytes, list[tuple[Rule, _Like | None]]]:
        return {}

    def find(self, key: str) -> tuple[Rule, dict[str, str]] | None:
        """The rule that owns the key, and its captures.

        Keys of a repeated block differ only in their digits, so the owner of a similar key is tried first: the time
        for a key does not grow with the number of rules.
        """
        literal = self._literal.get(key)
        if literal is not None:
            return literal, {}
        form = key.encode("utf-8", "surrogatepass").translate(_ZEROS)
        seen = self._seen.get(form, ())
        for rule, like in seen:
            values = rule.match(key) if like is None else like.captures(key)
            if values is not None:
                return rule, values
        if not key.startswith(self._starts):
            return None
        if len(self._patterns) > _MANY and self._any.fullmatch(key) is None:
            return None
        for rule in self._patterns:
            may = key.startswith(rule.source.starts) and key.endswith(rule.source.ends)
            values = rule.match(key) if may else None
            if values is not None:
                if self._counts and not rule.rest and len(self._seen) < _MAX_SEEN and len(seen) < _MAX_ALIKE:
                    self._remember(form, rule, values)
                return rule, values
        return None

    def _remember(self, form: bytes, rule: Rule, values: Mapping[str, str]) -> None:
        """The owner of a key, for others of its form; a rule with a choice of digits can own a form in several ways."""
        alike, new = self._seen.setdefault(form, []), (rule, _like(rule, values))
        if all(rule is not other or new[1] != like for other, like in alike):
            alike.append(new)

    @cached_property
    def literals(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """For each beginning of the keys that a rule owns: it, and the literal texts that are in all of them."""
        sides = [rule.source for rule in self.rules]
        texts = [tuple(token for token in side.tokens if isinstance(token, str)) for side in sides]
        return tuple((start, those) for side, those in zip(sides, texts, strict=True) for start in side.starts)

    @cached_property
    def facts_of_names(self) -> bool:
        """Whether a rule's patterns need facts."""
        return any(rule.facts_of_names for rule in self.rules)

    def within(self, facts: Mapping[str, int]) -> RuleTable:
        """The table with the numbers of those facts in its patterns that are known."""
        return RuleTable(tuple(rule.within(facts) for rule in self.rules)) if self.facts_of_names else self

    def inverse(self) -> RuleTable:
        return RuleTable(tuple(back for rule in self.rules for back in rule.inverse()))
