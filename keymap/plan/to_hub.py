"""From a format's names to the hub's, and between the hub's layouts of a tower."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from keymap.errors import some
from keymap.language.apply import Applied, apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.language.rules import Check, Fault, Rule, Step
from keymap.source.detect import Detection, file_rules, tower_layout, with_facts

__all__ = ["Translated", "bring_to_layouts", "to_hub", "tower_of", "towers_of_unowned"]

_FIRST_WORD = re.compile(r"[^./]+[./]")


@dataclass(eq=False, repr=False)
class Translated:
    """Tensors under other names, and what was found on the way.

    Attributes:
        tensors: layouts by their new key.
        unowned: source keys that no rule owns.
        renamed: of those, the names that the format's aliases give them, without the prefix of a state dict.
        dropped: source keys that hold no weights, with the reason.
        layouts: for each tower the chain of layouts that it was converted through.
        rules: those of the source's format that applied; ``source_keys`` what they were applied to.
        unbridged: the tensors before any bridge.
        faults: what is wrong.
        checks: values to verify before anything is written.
        steps: every application of a rule.
        notes: for the report.
    """

    tensors: Mapping[str, Layout]
    unowned: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, list[str]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    unbridged: Mapping[str, Layout] = field(default_factory=dict)
    source_keys: Mapping[str, Layout] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, applied: Applied) -> None:
        """Go on with what rules made of the tensors."""
        self.tensors = applied.out
        self.faults += applied.faults
        self.checks += applied.checks
        self.steps += applied.steps
        self.notes += applied.notes


def to_hub(found: Detection, facts: Mapping[str, int]) -> Translated:
    """A detected file under the hub's names, in the layouts of its format."""
    found = with_facts(found, facts)
    table = file_rules(found.mapping, found.tensors).within(facts)
    result = Translated({}, rules=table.rules, source_keys=found.tensors)
    result.faults, result.steps = [*found.faults], [*found.steps]
    result.checks, result.notes = [*found.checks], [*found.notes]
    kept, unsupported = _sort_out(found, result)
    applied = apply_rules(table, kept, facts)
    result.take(applied)
    result.unbridged = result.tensors
    result.renamed = {source: key for key, layout in applied.left.items() for source in layout.named(key)}
    if found.mapping.kind == "hub":  # what it ignores without owning it
        for key, layout in applied.left.items():
            ignored = found.mapping.ignored(key)
            if ignored is not None:
                _drop(found, result, key, layout, *ignored)
    result.unowned = [source for source in result.renamed if source not in result.dropped]
    for (tower, why), keys in unsupported.items():
        text = f"{len(keys)} key{'' if len(keys) == 1 else 's'} ({some(keys, 2)}): {why}"
        result.faults.append(Fault(text, tuple(keys), tower, foreign=True))
    return result


def _sort_out(found: Detection, result: Translated) -> tuple[dict[str, Layout], dict[tuple[str, str], list[str]]]:
    """Enter the keys that hold no weights into ``result``.

    Returns:
        The keys that rules apply to; and those that no model of the hub has a place for, by tower and reason.
    """
    mapping = found.mapping
    kept = dict(found.tensors)
    unsupported: dict[tuple[str, str], list[str]] = {}
    for key in filter(mapping.may_leave_out, found.tensors):
        layout = found.tensors[key]
        ignored = mapping.ignored(key) if mapping.kind != "hub" else None
        if ignored is not None:
            del kept[key]
            _drop(found, result, key, layout, *ignored)
            continue
        entry = next((entry for entry in mapping.unsupported if entry.side.match(key) is not None), None)
        if entry is not None:
            del kept[key]
            unsupported.setdefault((entry.tower, entry.why), []).extend(layout.named(key))
    return kept, unsupported


def _drop(found: Detection, result: Translated, key: str, layout: Layout, why: str, twin: str) -> None:
    """Leave out a key without weights; one that repeats another (``twin``, empty for none) must have its values."""
    result.dropped.update(dict.fromkeys(layout.named(key), why))
    if twin in found.tensors:
        result.checks.append(Check(key, layout, found.tensors[twin], f"it is ignored as a copy of {twin}"))


def bring_to_layouts(
    known: Catalogue, translated: Translated, wanted: Mapping[str, Iterable[str]], facts: Mapping[str, int]
) -> None:
    """Bring each tower of ``translated`` to one of the wanted layouts, where a path of bridges exists.

    Args:
        known: the mappings, with the bridges.
        translated: changed in place.
        wanted: for a tower the layouts that the target has or reads; a tower that is not listed stays as it is.
        facts: that the bridges' rules may need.
    """
    for tower in known.hub.layouts:
        layout = tower_layout(known.hub, tower, translated.tensors)
        if layout is None:
            continue
        translated.layouts[tower] = [layout]
        targets = list(wanted.get(tower, ()))
        if not targets or layout in targets:
            continue
        paths = [path for target in targets if (path := known.path(tower, layout, target)) is not None]
        if not paths:
            _take_out(known.hub, translated, tower, targets)
            continue
        for step in min(paths, key=len):
            translated.take(apply_rules(step.table, translated.tensors, facts, pass_others=True))
            translated.layouts[tower].append(step.target)


def _take_out(hub: Format, translated: Translated, tower: str, targets: Iterable[str]) -> None:
    """Turn a tower that cannot be brought to the target's layout into a fault and unowned keys."""
    (layout,) = translated.layouts[tower]
    text = (
        f"the file's {tower} tower has layout {layout}, the target needs {' or '.join(targets)}; no bridge joins them: "
        f"these are different architectures"
    )
    translated.faults.append(Fault(text, foreign=True))
    kept: dict[str, Layout] = {}
    for key, tensor in translated.tensors.items():
        if tower_of(hub, key) == tower:
            translated.unowned += tensor.named(key)
        else:
            kept[key] = tensor
    translated.tensors = kept


@lru_cache(maxsize=1 << 14)
def tower_of(hub: Format, key: str) -> str:
    """The tower that a hub key belongs to; empty for a key that is not the hub's."""
    found = hub.table.find(key)
    return found[0].tower if found is not None else ""


def _towers_by_word(rules: Sequence[Rule]) -> dict[str, str]:
    """The tower whose source keys alone begin with a word; a key without a rule seems to belong to it."""
    towers: dict[str, set[str]] = {}
    for rule in rules:
        for start in rule.source.starts:
            first = _FIRST_WORD.match(start)
            if first is not None:
                towers.setdefault(first.group(), set()).add(rule.tower)
    return {word: names.pop() for word, names in towers.items() if len(names) == 1}


def towers_of_unowned(translated: Translated, hub: Format) -> dict[str, str]:
    """The tower that each source key without a rule seems to belong to, "" for none."""
    towers = _towers_by_word(translated.rules or hub.rules)
    words = {key: _FIRST_WORD.match(translated.renamed.get(key, key)) for key in translated.unowned}
    return {key: towers.get(word.group(), "") if word is not None else "" for key, word in words.items()}
