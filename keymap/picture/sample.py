"""The picture of a format without a checkpoint: its rules, applied to keys that are made up from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from keymap.errors import MappingError
from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import whole
from keymap.language.rules import RuleTable
from keymap.picture.data import Listing, Picture, Section, sections_of, without_shapes
from keymap.plan.plan import Entry, Plan
from keymap.plan.to_hub import tower_of
from keymap.source.samples import Sample, samples

__all__ = ["picture_of_format"]


def picture_of_format(mapping: Format, known: Catalogue) -> Picture:
    """The picture of the rules of a format or a bridge.

    Raises:
        MappingError: the mapping has no rules.
    """
    if not mapping.rules and not mapping.variants:
        raise MappingError(
            f"{mapping.name} (kind {mapping.kind}) has no rules to draw; pass a format that `list_formats()` names"
        )
    drawn: list[Section] = []
    seen: list[Section] = []  # a variant has most towers of the other variants
    for variant, found in _by_variant(mapping, known).items():
        for section in sections_of(_plan(mapping, known, variant, found)):
            if section not in seen:
                seen.append(section)
                when = f" (variant {variant}: {_when(mapping, variant)})" if variant else ""
                drawn.append(without_shapes(replace(section, title=section.title + when)))
    about = f"{mapping.file}: {mapping.title}"
    return Picture(mapping.name, about, True, tuple(drawn), tuple(_lists(mapping)))


def _by_variant(mapping: Format, known: Catalogue) -> dict[int, list[Sample]]:
    """The samples by the number of their variant; 0 for the format's own rules."""
    found: dict[int, list[Sample]] = {}
    for sample in samples(mapping, known):
        words = sample.name.removeprefix(mapping.name).partition(", by ")[0].split()
        found.setdefault(int(words[-1]) if words else 0, []).append(sample)
    return found


def _when(mapping: Format, variant: int) -> str:
    """Which files a variant is for, in words."""
    when = mapping.variants[variant - 1].when
    parts = (("with", " and ", when.all), ("with", " or ", when.any), ("without", " and ", when.none))
    return ", ".join(f"{word} {glue.join(map(str, clues))}" for word, glue, clues in parts if clues)


def _plan(mapping: Format, known: Catalogue, variant: int, found: list[Sample]) -> Plan:
    """A plan for every key of some samples."""
    table = mapping.table
    if variant:
        table = RuleTable((*mapping.rules, *mapping.variants[variant - 1].rules))
    shapes = {key: shape for sample in reversed(found) for key, shape in sample.shapes.items()}
    facts = {name: length for sample in reversed(found) for name, length in sample.facts.items()}
    layouts = {key: whole(key, shape, torch.float32) for key, shape in shapes.items()}
    for step in mapping.steps:
        layouts = apply_rules(step, layouts, facts, pass_others=True).out
    applied = apply_rules(table, layouts, facts)
    order = {key: number for number, key in enumerate(shapes)}
    made = sorted(applied.out.items(), key=lambda one: min((order[key] for key in one[1].sources), default=0))
    makers = {target: rule.tower for rule, _, target in applied.steps}
    entries = tuple(
        Entry(key, makers.get(key) or mapping.tower or tower_of(known.hub, key), layout, layout.shape, torch.float32)
        for key, layout in made
    )
    used = {source for entry in entries for source in entry.layout.sources}
    return Plan(
        file=mapping.file,
        container="",
        format=mapping.name,
        title=mapping.title,
        evidence=(),
        wrapper="",
        other_wrappers=(),
        prefixes=(),
        layouts={},
        entries=entries,
        checks=(),
        dropped={},
        missing_keys=(),
        unexpected_keys=(),
        mismatched={},
        notes=(),
        steps=tuple(applied.steps),
        sources={key: (shape, torch.float32) for key, shape in shapes.items() if key in used},
        hub=known.hub.name,
    )


def _lists(mapping: Format) -> Iterator[Listing]:
    """What the format does with other keys."""
    dropped = tuple((str(entry.side), entry.why) for entry in mapping.ignore)
    unsupported = tuple((str(entry.side), entry.why) for entry in mapping.unsupported)
    notes = tuple(("", note) for note in mapping.notes)
    for listing in (Listing("dropped", dropped), Listing("not supported", unsupported), Listing("notes", notes)):
        if listing.entries:
            yield listing
