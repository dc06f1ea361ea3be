"""From the hub's names to a format's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keymap.errors import some
from keymap.language.apply import apply_rules
from keymap.language.format import Format, ignored_in_model
from keymap.language.layout import Layout, whole
from keymap.language.rules import Check, Fault, Rule, RuleTable
from keymap.plan.completeness import incomplete
from keymap.plan.to_hub import Translated
from keymap.source.detect import matching_keys

__all__ = ["from_hub"]


def from_hub(
    hub: Format,
    mapping: Format,
    translated: Translated,
    facts: Mapping[str, int],
    same: Mapping[str, str] | None = None,
) -> None:
    """Translate in place from the hub's names (in the layouts of the format) to the format's own.

    Args:
        hub, mapping: of the names before and after.
        translated: the tensors.
        facts: that rules may need.
        same: for each source key the first one that is the same memory; None if no two are.
    """
    if mapping.kind == "hub":
        return
    _fill(hub, mapping, translated)
    extra = [
        variant.rules for variant in mapping.variants if matching_keys(variant.when_hub, translated.tensors) is not None
    ]
    rules = (*mapping.rules, *(rule for variant in extra for rule in variant))
    table = (RuleTable(rules) if extra else mapping.table).within(facts)
    back = mapping.back if table is mapping.table else table.inverse()
    ready = {key: layout for key, layout in translated.tensors.items() if not _only_in_files(hub, back, key)}
    applied = apply_rules(back, ready, facts)
    left = {**applied.left, **{key: layout for key, layout in translated.tensors.items() if key not in ready}}
    _leave_out(hub, mapping, translated, left, same or {})
    one_way = _one_way_faults(mapping.name, rules, translated)
    translated.tensors = applied.out
    failed = {
        fault.tower for fault in (*applied.faults, *one_way)
    }  # their keys are missing for a reason that is listed already
    partly = [
        fault
        for fault in incomplete(mapping, table.rules, applied.out, hub.optional_buffers)
        if fault.tower not in failed
    ]
    translated.faults += [*one_way, *applied.faults, *partly]
    translated.checks += applied.checks
    translated.steps += applied.steps
    translated.notes += applied.notes
    for step in reversed(mapping.steps):
        _undo(step, translated, facts)


def _fill(hub: Format, mapping: Format, translated: Translated) -> None:
    """Add the keys that the loader of a format needs and the tensors lack, with what their absence means."""
    for key, (other, axis) in mapping.fills.items():
        like, meaning = translated.tensors.get(other), hub.absent_means.get(key)
        if key in translated.tensors or like is None or meaning is None or not isinstance(meaning.value, (int, float)):
            continue
        translated.tensors = {
            **translated.tensors,
            key: whole(None, (like.shape[axis],), like.dtype, float(meaning.value)),
        }
        text = f"{key}: filled with {meaning.value}, which its absence means: the loader of {mapping.name} needs it"
        translated.notes.append(text)


def _leave_out(
    hub: Format, mapping: Format, translated: Translated, left: Mapping[str, Layout], same: Mapping[str, str]
) -> None:
    """Sort the keys that no rule of a format owns: left out for a reason, left out if they hold a value, or unowned."""
    out = ((key, layout) for key, layout in translated.tensors.items() if key not in left and layout.copied_whole)
    written = {same.get(layout.sources[0], layout.sources[0]): key for key, layout in out}
    for key, layout in left.items():
        ignored, meaning = ignored_in_model(hub, mapping, key), hub.absent_means.get(key)
        tied = written.get(same.get(layout.sources[0], "")) if layout.copied_whole else None
        if ignored is not None and (not ignored[1] or ignored[1] in translated.tensors):
            translated.dropped[key] = ignored[0]
            if ignored[1]:
                twin = translated.tensors[ignored[1]]
                translated.checks.append(Check(key, layout, twin, f"it is left out as a copy of {ignored[1]}"))
        elif meaning is not None:
            why = f"format {mapping.name} has no place for {key}"
            translated.checks.append(Check(", ".join(layout.named(key)), layout, meaning.value, why))
        elif tied is not None:
            translated.dropped[key] = f"one tensor with {tied}"
        elif key.rpartition(".")[2] in hub.optional_buffers:
            translated.dropped[key] = f"format {mapping.name} has no place for it, and a model may lack it"
        else:
            translated.unowned.append(key)


def _undo(step: RuleTable, translated: Translated, facts: Mapping[str, int]) -> None:
    """Apply the inverse of a step; a key that the step would read as another one is a fault."""
    step = step.within(facts)
    undone = apply_rules(step.inverse(), translated.tensors, facts, pass_others=True)
    made = {target for _, _, target in undone.steps}
    for key, layout in undone.out.items():
        found = step.find(key) if key not in made else None
        if found is not None:
            text = f"{found[0].place}: {key} cannot be written: rule {found[0].text} would read it as another key"
            translated.faults.append(Fault(text, layout.named(key)))
    translated.take(undone)


def _one_way_faults(name: str, rules: Sequence[Rule], translated: Translated) -> list[Fault]:
    """A fault for each one-way rule that makes keys of the hub; these are then no longer without an owner."""
    faults = []
    for rule in (rule for rule in rules if rule.oneway):
        keys = [key for key in translated.unowned if any(side.match(key) is not None for side in rule.targets)]
        if keys:
            text = (
                f"{name} is read and not written: its rule for {some(keys)} works one way: {rule.text} ({rule.place})"
            )
            faults.append(Fault(text, tower=rule.tower))
            translated.unowned = [key for key in translated.unowned if key not in keys]
    return faults


def _only_in_files(hub: Format, back: RuleTable, key: str) -> bool:
    """True for a key that the hub declares `file_only` and that the format's rules do not name."""
    if key not in hub.file_only:
        return False
    found = back.find(key)
    return found is None or any(slot.kind == "rest" for slot in found[0].source.slots)
