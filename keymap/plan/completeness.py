"""Towers of a format of which only some keys are present, and the keys that are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice, product
from typing import NamedTuple

from keymap.errors import some
from keymap.language.format import Format
from keymap.language.rules import Fault, Rule, RuleTable

__all__ = ["incomplete"]

_MAX_INDICES = 1000  # blocks of a tower that are checked, and missing keys of it that are looked for
_LISTED = 6  # missing keys that a message lists

Values = tuple[str, ...]


class _Present(NamedTuple):
    """The keys that are present.

    Attributes:
        captures: of each rule by its id, in the order of the rule's variables.
        indices: the block numbers under each counted prefix.
    """

    captures: dict[int, set[Values]]
    indices: dict[str, set[Values]]


def incomplete(
    mapping: Format, rules: Iterable[Rule], keys: Iterable[str], optional: Collection[str] = ()
) -> list[Fault]:
    """Towers of a format that are present only in part, one fault each, with the missing keys.

    A tower is complete for every index that any of its rules counts, or absent. Optional rules, `rest` rules and
    rules with open-ended words require nothing; neither does the hub. Keys whose last word is in ``optional`` are
    not required either.
    """
    if mapping.kind == "hub":
        return []
    exact = [r for r in rules if not r.rest and all(slot.kind in ("int", "alts") for slot in r.source.slots)]
    present = _find(exact, keys)
    faults: list[Fault] = []
    for tower in dict.fromkeys(rule.tower for rule in exact):
        required = [rule for rule in exact if rule.tower == tower and not rule.optional]
        if not any(present.captures[id(rule)] for rule in required):
            continue
        found: Iterator[str] = chain.from_iterable(_missing(rule, present) for rule in required)
        found = (key for key in found if key.rpartition(".")[2] not in optional)
        missing = list(islice(found, _MAX_INDICES + 1))
        if missing:
            text = f"{mapping.name}: the {tower} tower is incomplete; missing keys: {some(missing, _LISTED)}"
            faults.append(Fault(text, tower=tower))
    return faults


def _find(rules: Sequence[Rule], keys: Iterable[str]) -> _Present:
    """Which keys each rule owns."""
    table = RuleTable(tuple(rules))
    present = _Present({id(rule): set() for rule in rules}, {})
    by_source = {id(rule.source): rule for rule in rules}
    for key in keys:
        found = table.find(key)
        if found is None:
            continue
        rule, values = found
        main = by_source.get(id(rule.tied))
        if main is not None:  # the other key holds the same values
            present.captures[id(main)].add(tuple(values[name] for name in main.source.variables))
        present.captures[id(rule)].add(tuple(values[name] for name in rule.source.variables))
        index = tuple(values[name] for name in _index_names(rule))
        if index:
            present.indices.setdefault(_counted_prefix(rule), set()).add(index)
    return present


def _missing(rule: Rule, present: _Present) -> Iterator[str]:
    """The keys that a rule requires and that are not present."""
    names, prefix = _index_names(rule), _counted_prefix(rule)
    indices: list[Values] = sorted(present.indices.get(prefix, ())) if prefix else [()]
    if not indices:
        yield str(rule.source)
    if len(names) == 1:
        last = min(max((int(index[0]) for index in indices), default=-1), _MAX_INDICES)
        indices = [(str(n),) for n in range(_first_index(rule, names[0]), last + 1)]
    alternatives = [slot for slot in rule.source.slots if slot.kind == "alts"]
    choices = product(*([value for value, _ in slot.options] for slot in alternatives))
    names += [slot.names[0] for slot in alternatives]
    for index, chosen in product(indices, choices):
        values = dict(zip(names, (*index, *chosen), strict=True))
        if tuple(values[name] for name in rule.source.variables) not in present.captures[id(rule)]:
            yield rule.source.write(values)


def _index_names(rule: Rule) -> list[str]:
    return [name for slot in rule.source.slots if slot.kind == "int" for name in slot.names]


def _counted_prefix(rule: Rule) -> str:
    """The rule's pattern up to its last index, empty without one: rules with the same prefix count the same blocks."""
    tokens = rule.source.tokens
    last = max((i for i, t in enumerate(tokens) if not isinstance(t, str) and t.kind == "int"), default=-1)
    return "".join(t if isinstance(t, str) else f"{t.regex()}{t.low}{t.high}" for t in tokens[: last + 1])


def _first_index(rule: Rule, name: str) -> int:
    """The first index that a rule counts: 0, its range's first, or what its arithmetic needs (``<1-1>``: 1)."""
    slots = [slot for side in (rule.source, *rule.targets) for slot in side.slots if slot.names == (name,)]
    lows = (slot.low for slot in slots if isinstance(slot.low, int))
    return max([0, *lows, *(-slot.shift for side in rule.targets for slot in side.slots if slot.names == (name,))])
