"""Checks across the rules of one compiled mapping: no two may match one key, in either direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from keymap.language.format import Format
from keymap.language.overlap import alike, overlap
from keymap.language.pattern import Effort, PatternError, Side
from keymap.language.rules import Rule, RuleTable

__all__ = ["cross_faults"]

_MAX_FAULTS = 50  # of one kind


def cross_faults(mapping: Format, effort: Effort) -> Iterator[str]:
    """Every pair of rules that competes for a key, and every rule that owns a key which the mapping leaves out.

    A pair is reported once, also where its rules continue with tables, whose rules clash one by one.

    Args:
        mapping: compiled.
        effort: what the comparison of the file's patterns may still cost.
    """
    rules = mapping.rules
    back = mapping.back.rules
    clashes = _Clashes(effort)
    for extra in [(), *(variant.rules for variant in mapping.variants)]:
        seen, seen_back = (len(rules), len(back)) if extra else (0, 0)
        clashes.compare((*rules, *extra), "key", seen)
        both = (*back, *RuleTable(extra).inverse().rules)
        clashes.compare(both, "on the way back, key", seen_back)
    for alias in mapping.aliases:
        clashes.compare(alias.table.rules, "key")
    for step in mapping.steps:
        clashes.compare(step.rules, "key")
        clashes.compare(step.inverse().rules, "on the way back, key")
    yield from islice(clashes.faults(), _MAX_FAULTS)
    if mapping.kind != "hub":  # the hub's rules are whole prefixes, within which it ignores some keys
        ignored = [(entry.side, "ignore") for entry in mapping.ignore]
        unsupported = [(entry.side, "unsupported") for entry in mapping.unsupported]
        narrow = [rule for rule in rules if rule.place not in clashes.greedy]
        yield from islice(_owned_twice(narrow, [*ignored, *unsupported], effort), _MAX_FAULTS)


class _Clashes:
    """Pairs of rules that can match one key, gathered by the two rules of the file that they are written in."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.found: dict[tuple[str, str], tuple[str, str, set[str]]] = {}  # the first fault, its way, keys of that way
        self.stopped: dict[str, None] = {}
        self.greedy: dict[str, str] = {}  # rules (.+) that match keys of other rules: text by place

    def compare(self, rules: tuple[Rule, ...], which: str, seen: int = 0) -> None:
        """Compare all rules but the first ``seen`` with each other, and these with the first."""
        named: set[tuple[int, int]] = set()
        for first, second in alike([rule.source for rule in rules], seen):
            one, other = rules[first], rules[second]
            if one.rest or other.rest or (first, second) in named:
                continue
            try:
                witness = overlap(one.source, other.source, self.effort)
            except PatternError as error:
                self.stopped[f"{other.place}: {error}"] = None
                return
            if witness is not None:
                named.add((first, second))
                self.greedy |= {rule.place: rule.text for rule in (one, other) if str(rule.source) == "(.+)"}
                self.add(one, other, which, witness)
                if len(named) > _MAX_FAULTS * _MAX_FAULTS:
                    return
        if sum(rule.rest for rule in rules) > 1:
            self.stopped[f"{rules[0].place}: more than one rule says rest: true; keep one"] = None

    def add(self, one: Rule, other: Rule, which: str, witness: str) -> None:
        if one.reported_at == other.reported_at:  # both are rules of one table
            pair, place = (one.place, other.place), other.place
        else:
            pair, place = (one.reported_at, other.reported_at), other.reported_at
        fault = (
            f"{place}: {which} {witness!r} is claimed by two rules, {one.text} ({one.place}) and {other.text}: "
            f"make one of them narrower"
        )
        _, first_way, keys = self.found.setdefault(pair, (fault, which, set()))
        if which == first_way:
            keys.add(witness)

    def faults(self) -> Iterator[str]:
        yield from self.stopped
        for place, text in self.greedy.items():
            yield f"{place}: {text} matches every key, and other rules match some of them: add rest: true"
        for pair, (fault, _, keys) in self.found.items():
            if self.greedy.keys() & set(pair):
                continue
            more = len(keys) - 1
            yield fault + (f" (and {more} more key{'s' if more > 1 else ''})" if more else "")


def _owned_twice(rules: Iterable[Rule], left_out: Iterable[tuple[Side, str]], effort: Effort) -> Iterator[str]:
    """Rules that own a key which another field of the file leaves out."""
    for side, where in left_out:
        for rule in rules:
            try:
                witness = overlap(rule.source, side, effort) if not rule.rest else None
            except PatternError as error:
                yield f"{rule.place}: {error}"
                return
            if witness is not None:
                yield (
                    f"{rule.reported_at}: key {witness!r} is claimed by rule {rule.text} and left out by "
                    f"'{where}: {side}': remove one of them"
                )
