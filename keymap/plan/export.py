"""Plan a conversion: which format is read, which is written, and the layout of each tensor that is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch

from keymap.advice import choices, lacked_by_files
from keymap.errors import SHOWN, DetectionError, MappingError, PlanError, count_of, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.language.rules import Check, Fault, RuleTable
from keymap.plan.completeness import incomplete
from keymap.plan.from_hub import from_hub
from keymap.plan.planner import keep_towers
from keymap.plan.request import Request
from keymap.plan.rule_faults import with_lacking_facts_once
from keymap.plan.to_hub import Translated, bring_to_layouts, to_hub, tower_of
from keymap.plan.twins import same_elements
from keymap.plan.uneven import other_counts, uneven
from keymap.source.detect import Detection, ambiguous, tower_layout
from keymap.source.opened import Opened, Source
from keymap.source.other_hubs import naming_other_hubs
from keymap.source.registry import hubs

__all__ = ["Export", "Target", "export", "not_read", "only_reading", "target_format"]


class Target(NamedTuple):
    """One tensor that is written.

    Attributes:
        layout: where its elements come from.
        shape, dtype: as the format writes it.
    """

    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype


class Export(NamedTuple):
    """A planned conversion.

    Attributes:
        source: the reading that is converted.
        target: the format that is written.
        tensors: by the target's keys.
        checks: values to verify before anything is written.
        dropped: keys of the source that hold no weights, and why.
        hub: what is written, by the hub's keys.
        notes: for the report.
    """

    source: Source
    target: Format
    tensors: Mapping[str, Target]
    checks: tuple[Check, ...]
    dropped: Mapping[str, str]
    hub: Mapping[str, Layout]
    notes: tuple[str, ...] = ()


def target_format(known: Catalogue, to: str) -> Format:
    """The format of that name.

    Raises:
        MappingError: there is none, or it cannot be written.
    """
    targets = sorted(name for name, mapping in known.mappings.items() if mapping.rules)
    if to not in known.mappings:
        others = [one.name for one in hubs().files.values() if one.kind in ("format", "bridge", "hub")]
        near = get_close_matches(to[:80], sorted({*targets, *others}), 1, 0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(targets)}"
        raise MappingError(f"there is no format {to!r} to convert to; {hint}")
    target = known.get(to)
    if not target.rules:
        raise MappingError(f"{to} (kind {target.kind}) has no rules and cannot be written; pass the name of a format")
    return target


def only_reading(opened: Opened, heads: bool = True) -> Source:
    """The one reading of a state dict.

    Args:
        opened: the file.
        heads: take heads from above a part that the caller chose.

    Raises:
        DetectionError: no format matches it, or several do; the message names the state dicts within it.
    """
    if len(opened.top) > 1:
        raise ambiguous([source.found for source in opened.top if source.found is not None], opened.file)
    if opened.top[0].found is not None:
        return opened.with_heads(opened.top[0]) if heads else opened.top[0]
    alone = [group[0] for group in opened.inner if not group[0].unwrapped.outside]
    if len(alone) == 1 and not opened.top[0].refused:
        return alone[0]
    error = opened.top[0].refusal
    assert error is not None, "a source without a format has a reason"
    names = choices("wrapper", [group[0].unwrapped.wrapper for group in opened.inner])
    advice = [f"a part of it has a known format: pass {names}"] if names else []
    raise naming_other_hubs(DetectionError(error.summary, [*error.faults, *advice]), opened)


def not_read(opened: Opened, done: str) -> list[str]:
    """A note on the tensors of the file that are not in its state dict; empty where there are none.

    Args:
        opened: the file.
        done: what was done with the state dict, for example "converted".
    """
    unwrapped = opened.top[0].unwrapped
    names = () if unwrapped.outside else opened.elsewhere  # of a part of a state dict there is a note already
    if not names:
        return []
    hint = f"; {choices('wrapper', unwrapped.others)} takes another state dict" if unwrapped.others else ""
    return [f"not {done}: {count_of(len(names), 'tensor')} elsewhere in the file: {some(names, 3)}{hint}"]


def export(source: Source, target: Format, request: Request, facts: Mapping[str, int]) -> Export:
    """Plan the conversion of a state dict to a format.

    Args:
        source: with a format.
        target: a format, the hub, or a bridge, which gives the hub's keys in its second layout.
        request: the towers that are asked for.
        facts: settings that shapes do not show; the rest is taken from the source's configuration.

    Raises:
        PlanError: the source is incomplete, a key has no place in the target, or a fact is missing.
    """
    known, found = source.known, source.found
    assert found is not None, "a source without a format is refused before"
    facts = source.settings.numbers | dict(facts)
    translated = to_hub(found, facts)
    present = {tower_of(known.hub, key): None for key in translated.tensors}
    keep_towers(translated, request, known.hub)
    translated.faults += incomplete(found.mapping, translated.rules, translated.source_keys, known.hub.optional_buffers)
    before = len(translated.unowned)
    for tower in known.hub.layouts:
        bring_to_layouts(known, translated, {tower: _target_layouts(known, translated, target, tower)}, facts)
    foreign = set(translated.unowned[before:])  # of towers that are faults already
    in_hub = dict(translated.tensors)
    if target.kind == "format":
        from_hub(known.hub, target, translated, facts, same_elements(source.unwrapped.tensors))
    if request.towers is not None and not translated.tensors and not translated.unowned:
        has = ", ".join(repr(tower) for tower in present if tower)
        raise PlanError(f"{source.file} has no tensors of towers={request.towers!r}; it has {has or 'none'}")
    _check_blocks(source, found, translated, in_hub)
    faults = [fault.text for fault in with_lacking_facts_once(translated.faults)]
    unowned = [key for key in translated.unowned if key not in foreign]
    if unowned:
        rest = () if faults or request.towers is not None else tuple(present)
        faults.append(_no_place(source, target, translated, unowned, rest))
    if faults:
        name = f"{source.file} (format {found.mapping.name})"
        raise PlanError(f"{name} cannot be written as {target.name}", faults)
    tensors = {key: _target(target, key, layout) for key, layout in translated.tensors.items()}
    notes = tuple(translated.notes)
    return Export(source, target, tensors, tuple(translated.checks), translated.dropped, in_hub, notes)


def _copies(source: Source, keys: Sequence[str]) -> list[str]:
    """Advice on keys without a place that hold the values of another key, as tied weights in a file do."""
    tensors, advice = source.unwrapped.tensors, []
    for key in keys:
        one = tensors.get(key)
        if one is None or len(one.shape) < 2:
            continue
        values, form = one.read(), (one.shape, one.dtype)
        alike = (name for name, other in tensors.items() if name not in keys and (other.shape, other.dtype) == form)
        twin = next((name for name in alike if torch.equal(tensors[name].read(), values)), None)
        if twin is not None:
            advice.append(f"; {key} has the values of {twin}: if they are one weight, name it with `same_as: {twin}`")
    return advice


def _no_place(
    source: Source, target: Format, translated: Translated, keys: Sequence[str], present: Sequence[str]
) -> str:
    """A fault for keys without a place in the target, and what to do.

    Args:
        source, target: what is converted, and to what.
        translated: its tensors.
        keys: that have no place.
        present: other towers may be among these; empty where leaving towers out does not help.
    """
    hub = source.known.hub
    towers = {tower_of(hub, translated.renamed.get(key, key)) for key in keys}
    others = tuple(tower for tower in present if tower and tower not in towers and "" not in towers)
    have = "key has" if len(keys) == 1 else "keys have"
    return f"{len(keys)} {have} no place in {target.name}: {some(keys)}{_what_to_do(source, target, keys, others)}"


def _what_to_do(source: Source, target: Format, keys: Sequence[str], others: tuple[str, ...]) -> str:
    """Advice on keys without a place in a format, where the towers ``others`` have none of them; empty for none."""
    hub = source.known.hub
    if hub.by_name:
        found = [target.table.find(key) for key in keys]
        if all(rule is not None and not rule[0].rest for rule in found):
            return (
                f"; these are names of {target.name}, so the file has this format already: pass the mapping as "
                f"mapping= to load_checkpoint"
            )
        return "".join([lacked_by_files(True), *_copies(source, keys[:SHOWN])])
    tensors = source.unwrapped.tensors
    if all(key in tensors and tensors[key].shape == () and not tensors[key].dtype.is_floating_point for key in keys):
        return "; counters hold no weights: name them under `ignore` of the hub"
    return f"; {choices('towers', [others])} leaves them out" if others else ""


def _check_blocks(source: Source, found: Detection, translated: Translated, in_hub: Mapping[str, Layout]) -> None:
    """Look for blocks of the source that lack what others have, and for numbers that its configuration contradicts.

    A tower with other faults is left out: its keys are missing for a reason that is listed already.
    """
    hub = source.known.hub
    faulty = {fault.tower for fault in translated.faults}
    towers = {tower_of(hub, key) for key in in_hub} - faulty
    shapes = {key: layout.shape for key, layout in translated.source_keys.items()}
    table = RuleTable(translated.rules)
    if not hub.by_name:  # of a model that no hub knows, blocks may differ for a reason
        translated.faults += uneven(found.mapping.name, table, shapes, towers, hub.optional_buffers)
    owned = [key for key in shapes if (rule := table.find(key)) is not None and rule[0].tower in towers]
    for fewer, text in other_counts(owned, source.settings.counts):
        if fewer:
            translated.faults.append(Fault(f"{found.mapping.name}: the file is incomplete: {text}"))
        else:
            translated.notes.append(f"the file has more than its configuration states: {text}")


def _target_layouts(known: Catalogue, translated: Translated, target: Format, tower: str) -> Iterable[str]:
    """The layouts of a tower that the target has; of the hub, the one that it is written in."""
    if target.kind == "bridge":
        return (target.between[1],) if tower == target.tower else ()
    if target.kind != "hub":
        return target.layouts.get(tower, ())
    layout, written = tower_layout(known.hub, tower, translated.tensors), known.hub.written_as.get(tower)
    return (written,) if layout and written and known.path(tower, layout, written) else ()


def _target(target: Format, key: str, layout: Layout) -> Target:
    """A tensor in the dtype and shape that the format fixes for it."""
    name = next((name for side, name in target.dtypes if side.match(key) is not None), None)
    shape = next((shape for side, shape in target.shapes if side.match(key) is not None), None)
    dtype: torch.dtype = getattr(torch, name) if name is not None else layout.dtype
    count = 1
    for length in layout.shape:
        count *= length
    return Target(layout, shape if shape is not None and count == 1 else layout.shape, dtype)
