"""Between a format's names and the hub's, and between the hub's layouts of a tower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.language.rules import Check, Fault, Rule, RuleTable, Step
from keymap.source.detect import Detection, matching_keys, tower_layout

_MAX_INDICES = (
    1000  # indices that a tower is asked to be complete for, and keys of it that may lack before no more are looked for
)
_TOLD = 6

__all__ = ["Translated", "bring_to_layouts", "from_hub", "incomplete", "to_hub", "tower_of"]


@dataclass
class Translated:
    """Tensors under other names, and all that was learnt on the way.

    Attributes:
        tensors: layouts by their new key.
        unowned: source keys that no rule owns.
        dropped: source keys that carry no weights, with the reason.
        layouts: for each tower the chain of layouts that it went through.
        rules: those of the source's format that held; ``source_keys`` what they were applied to.
        source_hub: the tensors before any bridge.
    """

    tensors: Mapping[str, Layout]
    unowned: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, list[str]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    source_hub: Mapping[str, Layout] = field(default_factory=dict)
    source_keys: Mapping[str, Layout] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def file_rules(mapping: Format, tensors: Mapping[str, Layout]) -> RuleTable:
    """The rules that hold for these source keys: the mapping's own, and those of the variants that fit."""
    extra = [v.rules for v in mapping.variants if matching_keys(v.when, tensors) is not None]
    return RuleTable((*mapping.rules, *(rule for rules in extra for rule in rules))) if extra else mapping.table


def to_hub(found: Detection, facts: Mapping[str, int]) -> Translated:
    """A detected file under the hub's names, in the layouts of its format."""
    mapping = found.mapping
    table = file_rules(mapping, found.tensors)
    dropped: dict[str, str] = {}
    kept: dict[str, Layout] = {}
    checks: list[Check] = []
    placeless: dict[tuple[str, str], list[str]] = {}
    for key, layout in found.tensors.items():
        if not key.endswith(mapping.ends_left_out):
            kept[key] = layout
            continue
        derived = mapping.ignored(key) if mapping.kind != "hub" else None
        if derived is not None:
            why, twin = derived
            dropped.update(dict.fromkeys(layout.named(key), why))
            if twin in found.tensors:
                checks.append(Check(key, layout, found.tensors[twin], f"it is left out as a copy of {twin}"))
            continue
        lost = next((entry for entry in mapping.unsupported if entry.side.match(key) is not None), None)
        if lost is not None:
            placeless.setdefault((lost.tower, lost.why), []).extend(layout.named(key))
        else:
            kept[key] = layout
    applied = apply_rules(table, kept, facts)
    result = Translated(applied.out, [k for key, lay in applied.left.items() for k in lay.named(key)], dropped)
    result.faults = [*found.faults, *applied.faults]
    for (tower, why), keys in placeless.items():
        text = f"{len(keys)} keys, {', '.join(keys[:2])} ...: {why}"
        result.faults.append(Fault(text, tuple(keys), tower, foreign=True))
    result.checks = [*checks, *applied.checks]
    result.steps = [*found.steps, *applied.steps]
    result.rules, result.source_keys = table.rules, found.tensors
    return result


def bring_to_layouts(known: Catalogue, now: Translated, wanted: Mapping[str, Iterable[str]]) -> None:
    """Bring each tower of ``now`` to one of the wanted layouts, where a path of bridges leads there.

    Args:
        wanted: for a tower the layouts that the target has or reads; a tower that is not listed stays as it is.
    """
    for tower in known.hub.layouts:
        here = tower_layout(known.hub, tower, now.tensors)
        if here is None:
            continue
        now.layouts[tower] = [here]
        targets = list(wanted.get(tower, ()))
        if not targets or here in targets:
            continue
        paths = [path for there in targets if (path := known.path(tower, here, there)) is not None]
        if not paths:
            text = (
                f"the file's {tower} tower has layout {here}, the target's has {' or '.join(targets)}, and no "
                f"bridge leads from one to the other: these are different architectures"
            )
            now.faults.append(Fault(text, foreign=True))
            foreign = {key for key in now.tensors if tower_of(known.hub, key) == tower}
            now.unowned += [s for key, layout in now.tensors.items() if key in foreign for s in layout.named(key)]
            now.tensors = {key: layout for key, layout in now.tensors.items() if key not in foreign}
            continue
        for step in min(paths, key=len):
            applied = apply_rules(step.table, now.tensors, {}, pass_others=True)
            now.tensors = applied.out
            now.faults += applied.faults
            now.checks += applied.checks
            now.steps += applied.steps
            now.layouts[tower].append(step.target)


def from_hub(hub: Format, mapping: Format, now: Translated, facts: Mapping[str, int]) -> None:
    """Hub names (in the layouts of the format) to the format's own."""
    if mapping.kind == "hub":
        return
    extra = [v.rules for v in mapping.variants if matching_keys(v.when_hub, now.tensors) is not None]
    rules = (*mapping.rules, *(rule for variant in extra for rule in variant))
    back = RuleTable(rules).inverse() if extra else mapping.back
    held = {key: layout for key, layout in now.tensors.items() if not _homeless(hub, back, key)}
    applied = apply_rules(back, held, facts)
    applied.left.update({key: layout for key, layout in now.tensors.items() if key not in held})
    now.tensors = applied.out
    for key, layout in applied.left.items():
        derived = hub.ignored(key)
        if derived is not None:
            now.dropped[key] = derived[0]
        elif key in hub.absent_means:
            because = f"{mapping.name} has no place for {key}"
            now.checks.append(Check(", ".join(layout.named(key)), layout, hub.absent_means[key][0], because))
        else:
            now.unowned.append(key)
    now.faults += applied.faults
    now.checks += applied.checks
    now.steps += applied.steps
    now.faults += incomplete(mapping, rules, now.tensors)


def _homeless(hub: Format, back: RuleTable, key: str) -> bool:
    """True for a name of the hub that no model has, where only an open-ended rule would take it along."""
    if key not in hub.file_only:
        return False
    found = back.find(key)
    return found is None or any(slot.kind == "rest" for slot in found[0].source.slots)


@lru_cache(maxsize=1 << 14)
def tower_of(hub: Format, key: str) -> str:
    """The tower that a hub key belongs to: image, text, decoder, scale; empty for a key that is none of the hub's."""
    found = hub.table.find(key)
    return found[0].tower if found is not None else ""


def _indexed(rule: Rule) -> str:
    """The rule's pattern up to its last index: rules that count the same blocks share it."""
    tokens = rule.source.tokens
    last = max((i for i, t in enumerate(tokens) if not isinstance(t, str) and t.kind == "int"), default=-1)
    return "".join(t if isinstance(t, str) else t.regex() for t in tokens[: last + 1])


def _first(rule: Rule, name: str) -> int:
    """The first index that a rule counts: 0, or what its arithmetic needs (``<1-1>`` counts from 1)."""
    slots = (slot for side in rule.targets for slot in side.slots if slot.names == (name,))
    return max([0, *(-slot.shift for slot in slots)])


def incomplete(mapping: Format, rules: Iterable[Rule], keys: Iterable[str]) -> list[Fault]:
    """Groups of a format that are there in part, and what they lack.

    A tower is there whole, for every index that any of its rules counts, or not at all. Optional rules, `rest`
    rules and rules with open-ended words demand nothing.
    """
    checked = [r for r in rules if not r.rest and all(s.kind in ("int", "alts") for s in r.source.slots)]
    table = RuleTable(tuple(checked))
    present: dict[int, set[tuple[str, ...]]] = {id(rule): set() for rule in checked}
    blocks: dict[str, set[tuple[str, ...]]] = {}
    for key in keys:
        found = table.find(key)
        if found is None:
            continue
        rule, values = found
        present[id(rule)].add(tuple(values[name] for name in rule.source.variables))
        index = tuple(values[n] for slot in rule.source.slots if slot.kind == "int" for n in slot.names)
        if index:
            blocks.setdefault(_indexed(rule), set()).add(index)
    out: list[Fault] = []
    if mapping.kind == "hub":
        return out
    for tower in dict.fromkeys(rule.tower for rule in checked):
        members = [rule for rule in checked if rule.tower == tower and not rule.optional]
        if not any(present[id(rule)] for rule in members):
            continue
        lacking: list[str] = []
        for rule in members:
            indices: list[tuple[str, ...]] = sorted(blocks.get(_indexed(rule), set())) if _indexed(rule) else [()]
            if _indexed(rule) and not indices:
                lacking.append(str(rule.source))
            names = [n for slot in rule.source.slots if slot.kind == "int" for n in slot.names]
            if len(names) == 1:
                last = min(max((int(index[0]) for index in indices), default=-1), _MAX_INDICES)
                indices = [(str(n),) for n in range(_first(rule, names[0]), last + 1)]
            choices = [[value for value, _ in slot.options] for slot in rule.source.slots if slot.kind == "alts"]
            others = [slot.names[0] for slot in rule.source.slots if slot.kind == "alts"]
            for index, chosen in product(indices, product(*choices)):
                values = dict(zip([*names, *others], [*index, *chosen], strict=True))
                if len(lacking) > _MAX_INDICES:
                    break
                if tuple(values[name] for name in rule.source.variables) not in present[id(rule)]:
                    lacking.append(rule.source.write(values))
        if lacking:
            more = f" and {len(lacking) - _TOLD} more" if len(lacking) > _TOLD else ""
            text = f"{mapping.name}: tower {tower} is there in part; it lacks {', '.join(lacking[:_TOLD])}{more}"
            out.append(Fault(text, tower=tower))
    return out
