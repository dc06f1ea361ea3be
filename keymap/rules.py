"""Rules as data: which keys they own, what they do in which order, and what they are backwards.

The operations of a rule have one fixed order: view each member, join them, view the whole, cut it, view each
part. Read backwards the same order holds, so the inverse of a rule is the rule with its sides exchanged and its
operations reversed, each by its own inverse. `apply.py` carries them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from keymap.pattern import Side, Slot
from keymap.pieces import Layout
from keymap.view import View

__all__ = ["Check", "Fault", "Part", "Rule", "RuleError", "RuleTable", "Sizes", "Step"]

Sizes = Mapping[str, int | str]


class RuleError(ValueError):
    """A rule does not fit the tensors that it was given."""


@dataclass(frozen=True, slots=True)
class Part:
    """How several tensors make one, and the other way round.

    Attributes:
        kind: ``concat`` along an axis, ``stack`` on a new axis, or ``rows`` merged by ranges of axis 0.
        axis: its number in the tensor that is joined (after ``view``).
        variables: the captures that number the members.
        members: what the last of the variables may be, in order; None stands for a member of zeros. Empty for
            an open index, whose members are 0, 1, 2, ...
        lengths: proportions of the parts; with a None (what is left) exact lengths. Empty: equal parts.
        ranges: for ``rows``.
    """

    kind: str
    axis: int
    variables: tuple[str, ...]
    members: tuple[str | None, ...] = ()
    lengths: tuple[int | None, ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()

    @property
    def told(self) -> list[int | str]:
        """The lengths as a mapping spells them."""
        return ["*" if n is None else n for n in self.lengths]

    def bounds(self, total: int) -> list[tuple[int, int]]:
        """Where each member lies on the axis of a whole that is ``total`` long."""
        lengths: tuple[int | None, ...] = self.lengths or (1,) * len(self.members)
        told = sum(n for n in lengths if n is not None)
        if None in lengths:
            exact = [total - told if n is None else n for n in lengths]
        else:
            if total % told:
                raise RuleError(f"an axis of length {total} cannot be cut in proportions {list(lengths)}")
            exact = [n * (total // told) for n in lengths if n is not None]
        if min(exact) < 1:
            raise RuleError(f"an axis of length {total} is too short for parts {self.told}")
        ends = [sum(exact[: i + 1]) for i in range(len(exact))]
        return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule in one direction.

    Attributes:
        place: ``file:line:column`` of the rule as written; ``text`` is the rule as written.
        group: the tower it belongs to, empty for `accepts`.
        source, targets: the sides; more than one target for tied weights.
        take: the rows [first, last) of axis 0 that are used at all, None for the end.
        before, join, then, cut, after: the further operations, in this order.
        optional, oneway, rest: as in the mapping.
        sizes: axis lengths that no shape tells.
        add: a key (and row) to add; factor, root, term: elementwise arithmetic, ``root`` the axis whose length's
            square root is the factor.
        tied: the key whose values this one must repeat (the way back of a rule with several targets).
    """

    place: str
    text: str
    group: str
    source: Side
    targets: tuple[Side, ...]
    take: tuple[int, int | None] | None = None
    before: View | None = None
    join: Part | None = None
    then: View | None = None
    cut: Part | None = None
    after: View | None = None
    optional: bool = False
    oneway: bool = False
    rest: bool = False
    sizes: Sizes = field(default_factory=dict)
    add: tuple[str, int | None] | None = None
    factor: float = 1.0
    root: int | None = None
    term: float = 0.0
    tied: Side | None = None

    @cached_property
    def renames(self) -> bool:
        """True when the rule only renames one key."""
        does = (self.take, self.before, self.join, self.then, self.cut, self.after, self.add, self.tied)
        return len(self.targets) == 1 and not self.computes and all(thing is None for thing in does)

    @cached_property
    def _falling(self) -> tuple[Slot, ...]:
        return tuple(slot for side in self.targets for slot in side.slots if slot.shift < 0)

    def match(self, key: str) -> dict[str, str] | None:
        """The captures, or None: also where ``<1-1>`` would write an index below zero."""
        values = self.source.match(key)
        if values is not None and self._falling and any(s.write(values).startswith("-") for s in self._falling):
            return None
        return values

    @cached_property
    def computes(self) -> bool:
        return self.factor != 1.0 or self.term != 0.0 or self.root is not None

    def inverse(self) -> tuple[Rule, ...]:
        """The way back; one rule a target where several are tied, and none for a one-way rule."""
        if self.oneway:
            return ()
        main = replace(
            self,
            source=self.targets[0],
            targets=(self.source,),
            before=self.after.inverse() if self.after else None,
            join=self.cut,
            then=self.then.inverse() if self.then else None,
            cut=self.join,
            after=self.before.inverse() if self.before else None,
        )
        twins = [replace(main, source=side, tied=self.targets[0]) for side in self.targets[1:]]
        return (main, *twins)


@dataclass(frozen=True, slots=True)
class Check:
    """A value that must be seen before anything is written.

    Attributes:
        key: what is checked, in the words of the report.
        layout: the elements to read.
        value: 0, 1 or ``eye``; or the layout that must be equal.
        why: what follows from it.
    """

    key: str
    layout: Layout
    value: float | str | Layout
    why: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        text: what, in a sentence.
        sources: the source keys that it concerns.
        group: the tower of the rule, empty where no rule of a tower is meant.
        fatal: True where not even a partial load is safe: two keys that become one.
        foreign: True where a whole tower is of another architecture.
    """

    text: str
    sources: tuple[str, ...] = ()
    group: str = ""
    fatal: bool = False
    foreign: bool = False


class Step(NamedTuple):
    """One application of a rule, for `Plan.explain`."""

    place: str
    text: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]


_DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class RuleTable:
    """Rules that share no key, apart from `rest` rules, which own what no other rule owns."""

    rules: tuple[Rule, ...]

    @cached_property
    def _literal(self) -> dict[str, Rule]:
        return {rule.source.write({}): rule for rule in self.rules if rule.source.literal}

    @cached_property
    def _patterns(self) -> tuple[list[Rule], list[Rule]]:
        open_rules = [rule for rule in self.rules if not rule.source.literal]
        return [r for r in open_rules if not r.rest], [r for r in open_rules if r.rest]

    @cached_property
    def _seen(self) -> dict[str, list[Rule]]:
        return {}

    def find(self, key: str) -> tuple[Rule, dict[str, str]] | None:
        """The rule that owns the key, and its captures.

        Keys of a repeated block differ in their numbers alone, so the rules that took such a key are tried
        first: the time for a key does not grow with the number of rules.
        """
        literal = self._literal.get(key)
        if literal is not None:
            return literal, {}
        plain, rest = self._patterns
        shape = _DIGITS.sub("0", key) if len(key) < 1000 else key
        seen = self._seen.get(shape, ())
        for rule in seen:
            values = rule.match(key)
            if values is not None:
                return rule, values
        for rule in plain:
            if rule in seen:
                continue
            values = rule.match(key)
            if values is not None:
                self._seen.setdefault(shape, []).append(rule)
                return rule, values
        for rule in rest:
            values = rule.match(key)
            if values is not None:
                return rule, values
        return None

    def inverse(self) -> RuleTable:
        return RuleTable(tuple(back for rule in self.rules for back in rule.inverse()))
