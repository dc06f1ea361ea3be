"""Checks across the rules of one compiled mapping: no two of them may match one key, on the way there or back."""

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

    Args:
        mapping: compiled.
        effort: what the comparison of the file's patterns may still cost.
    """
    rules = mapping.rules
    back = mapping.back.rules
    for extra in [(), *(variant.rules for variant in mapping.variants)]:
        seen, seen_back = (len(rules), len(back)) if extra else (0, 0)
        yield from islice(_clashes((*rules, *extra), "key", effort, seen), _MAX_FAULTS)
        both = (*back, *RuleTable(extra).inverse().rules)
        yield from islice(_clashes(both, "on the way back, key", effort, seen_back), _MAX_FAULTS)
    for alias in mapping.aliases:
        yield from islice(_clashes(alias.table.rules, "key", effort), _MAX_FAULTS)
    if mapping.kind != "hub":  # the hub's rules are whole prefixes, within which it ignores some keys
        ignored = [(entry.side, "ignore") for entry in mapping.ignore]
        unsupported = [(entry.side, "unsupported") for entry in mapping.unsupported]
        yield from islice(_owned_twice(rules, [*ignored, *unsupported], effort), _MAX_FAULTS)


def _clashes(rules: tuple[Rule, ...], which: str, effort: Effort, seen: int = 0) -> Iterator[str]:
    """Pairs of rules that can match one key; the first ``seen`` rules have been compared with each other."""
    named: set[tuple[int, int]] = set()
    for first, second in alike([rule.source for rule in rules], seen):
        one, other = rules[first], rules[second]
        if one.rest or other.rest or (first, second) in named:
            continue
        try:
            witness = overlap(one.source, other.source, effort)
        except PatternError as error:
            yield f"{other.place}: {error}"
            return
        if witness is not None:
            named.add((first, second))
            yield (
                f"{other.place}: {which} {witness!r} is claimed by two rules, {one.text} "
                f"({one.place}) and {other.text}: make one of them narrower"
            )
    if sum(rule.rest for rule in rules) > 1:
        yield f"{rules[0].place}: more than one rule says rest: true"


def _owned_twice(rules: Iterable[Rule], left_out: Iterable[tuple[Side, str]], effort: Effort) -> Iterator[str]:
    """Rules that own a key which another part of the file leaves out."""
    for side, where in left_out:
        for rule in rules:
            try:
                witness = overlap(rule.source, side, effort) if not rule.rest else None
            except PatternError as error:
                yield f"{rule.place}: {error}"
                return
            if witness is not None:
                yield f"{rule.place}: key {witness!r} is claimed by rule {rule.text} and left out by '{where}: {side}'"
