"""Targets of rules that are not keys of the hub's models: misspelt, or keys of another layout of the tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.pattern import Side
from keymap.language.recorded_keys import RecordedKeys, UnknownKey, keys_of, read_recorded_keys
from keymap.language.rules import Rule
from keymap.language.yaml_marks import Marked
from keymap.paths import data_folder

__all__ = ["wrong_targets"]

_Layouts = tuple[str, ...]


class _Checked(NamedTuple):
    """A rule, and the keys of its targets (of a bridge also of its source) that its layouts do not have."""

    rule: Rule
    unknown: list[UnknownKey]


def wrong_targets(marked: Marked, mapping: Format, known: Catalogue) -> Iterator[tuple[str, str]]:
    """Place and text of every fault of a target; one for each rule, and one for a tower whose layout is wrong."""
    for key in mapping.fills:
        meaning = known.hub.absent_means.get(key)
        if meaning is None or not isinstance(meaning.value, (int, float)):
            yield marked.at(("fills", key)), f"{key}: absent_means of hub {known.hub.name} has no number for it"
    place, name = known.places.get(known.hub.name), f"{known.hub.name}_keys.json"
    beside = [place.with_name(name)] if place is not None else [*data_folder("mappings").rglob(name)]
    recorded = read_recorded_keys(beside[0]) if beside else None
    if recorded is None:
        return
    closed = [rule.source for rule in known.hub.rules if all(slot.kind == "alts" for slot in rule.source.slots)]
    further = [
        *known.hub.absent_means.keys,
        *known.hub.file_only,
        *(key for side in closed for key, _ in keys_of(side)),
    ]
    rules = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
    every: list[_Checked] = []
    for tower in dict.fromkeys(rule.tower for rule in rules):
        own, layouts = [rule for rule in rules if rule.tower == tower], mapping.layouts.get(tower, ())
        checked = [_check(rule, mapping, layouts, recorded, further) for rule in own]
        better = _better_layout(checked, layouts)
        if better:
            example = next(key.key for entry in checked for key in entry.unknown)
            text = f"the rules write keys of layout {better}, for example '{example}': write `{tower}: {better}`"
            yield marked.at(("layouts", tower)), text
            checked = [_check(rule, mapping, (better,), recorded, further) for rule in own]
        every += checked
    yield from _by_rule(every)


def _check(rule: Rule, mapping: Format, layouts: _Layouts, recorded: RecordedKeys, further: Iterable[str]) -> _Checked:
    sides: list[tuple[Side, _Layouts]] = [(side, layouts) for side in rule.targets]
    if mapping.kind == "bridge":
        source, target = mapping.between
        sides = [(rule.source, (source,)), *((side, (target,)) for side in rule.targets)]
    found = (key for side, names in sides for key in recorded.unknown(side, rule.tower, names, further))
    return _Checked(rule, list(dict.fromkeys(found)))


def _better_layout(checked: list[_Checked], layouts: _Layouts) -> str:
    """The layout that most rules of a tower write instead of the named ones; empty if there is none."""
    votes: dict[str, int] = {}
    for entry in checked:
        shared = set.intersection(*(set(key.layouts) for key in entry.unknown)) if entry.unknown else set()
        for name in sorted(shared):
            votes[name] = votes.get(name, 0) + 1
    best = max(votes, key=lambda name: votes[name], default="")
    return best if layouts and best and votes[best] > 1 and 2 * votes[best] >= len(checked) else ""


def _by_rule(checked: Iterable[_Checked]) -> Iterator[tuple[str, str]]:
    """Group the faults by the rule to mend: that of a table, or the one that continues with the table."""
    uses: dict[str, list[_Checked]] = {}
    for entry in checked:
        uses.setdefault(entry.rule.reported_at, []).append(entry)
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for used_at, entries in uses.items():
        whole = len(entries) == 1 or all(entry.unknown for entry in entries)  # then the prefix is wrong
        for entry in entries:
            own_table = entry.rule.place.rsplit(":", 2)[0] == used_at.rsplit(":", 2)[0]
            in_table = own_table and not whole
            texts, places = found.setdefault(entry.rule.place if in_table else used_at, ({}, {}))
            texts.update(dict.fromkeys(key.text for key in entry.unknown if key.certain))
            places.update({used_at: None} if in_table and entry.unknown else {})
    for at, (texts, places) in found.items():
        if texts:
            yield at, next(iter(texts)) + _more(len(texts) - 1, at, places)


def _more(more: int, at: str, used_at: Iterable[str]) -> str:
    """`` (and 3 more keys of this rule, used at 23:5)``."""
    parts = [f"and {more} more key{'s' if more > 1 else ''} of this rule"] if more else []
    lines = [place.removeprefix(at.rsplit(":", 2)[0] + ":") for place in used_at if place != at]
    parts += [f"used at {', '.join(lines)}"] if lines else []
    return f" ({', '.join(parts)})" if parts else ""
