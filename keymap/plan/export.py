"""Plan a conversion: which format is read, which is written, and the layout of each tensor that is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import torch

from keymap.errors import DetectionError, MappingError, PlanError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.language.rules import Check
from keymap.plan.completeness import incomplete
from keymap.plan.from_hub import from_hub
from keymap.plan.planner import keep_towers
from keymap.plan.request import Request
from keymap.plan.rule_faults import with_lacking_facts_once
from keymap.plan.to_hub import Translated, bring_to_layouts, to_hub
from keymap.source.detect import ambiguous, tower_layout
from keymap.source.open import Opened, Source

__all__ = ["Export", "Target", "export", "only_reading", "target_format"]


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
        notes: for the report.
    """

    source: Source
    target: Format
    tensors: Mapping[str, Target]
    checks: tuple[Check, ...]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()


def target_format(known: Catalogue, to: str) -> Format:
    """The format of that name.

    Raises:
        MappingError: there is none, or it cannot be written.
    """
    targets = sorted(name for name, mapping in known.mappings.items() if mapping.rules)
    if to not in known.mappings:
        near = get_close_matches(to[:80], targets, 1, 0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(targets)}"
        raise MappingError(f"there is no format {to!r} to convert to; {hint}")
    target = known.get(to)
    if not target.rules:
        raise MappingError(f"{to} (kind {target.kind}) has no rules and cannot be written; pass the name of a format")
    return target


def only_reading(opened: Opened) -> Source:
    """The one reading of a state dict.

    Raises:
        DetectionError: no format matches it, or several do; the message names the state dicts within it.
    """
    if len(opened.top) > 1:
        raise ambiguous([source.found for source in opened.top if source.found is not None], opened.file)
    if opened.top[0].found is not None:
        return opened.top[0]
    alone = [group[0] for group in opened.inner if not group[0].unwrapped.outside]
    if len(alone) == 1 and not opened.top[0].refused:
        return alone[0]
    error = opened.top[0].refusal
    assert error is not None, "a source without a format has a reason"
    names = ", ".join(repr(group[0].unwrapped.wrapper) for group in opened.inner)
    raise DetectionError(
        error.summary, [*error.faults, *([f"it holds state dicts at {names}: pass one as wrapper="] if names else [])]
    )


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
    keep_towers(translated, request, known.hub)
    translated.faults += incomplete(found.mapping, translated.rules, translated.source_keys, known.hub.optional_buffers)
    for tower in known.hub.layouts:
        bring_to_layouts(known, translated, {tower: _target_layouts(known, translated, target, tower)}, facts)
    if target.kind == "format":
        from_hub(known.hub, target, translated, facts)
    faults = [fault.text for fault in with_lacking_facts_once(translated.faults)]
    if translated.unowned:
        count = len(translated.unowned)
        have = "key has" if count == 1 else "keys have"
        faults.append(f"{count} {have} no place in {target.name}: {some(translated.unowned)}")
        one_way = [f"{rule.text} ({rule.place})" for rule in target.rules if rule.oneway]
        if one_way:
            faults.append(f"{target.name} has rules that cannot be inverted: {some(one_way, 3)}")
    if faults:
        name = f"{source.file} (format {found.mapping.name})"
        raise PlanError(f"{name} cannot be written as {target.name}", faults)
    tensors = {key: _target(target, key, layout) for key, layout in translated.tensors.items()}
    return Export(source, target, tensors, tuple(translated.checks), translated.dropped, tuple(translated.notes))


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
