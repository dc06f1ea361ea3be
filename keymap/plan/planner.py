"""Making a plan: the file's tensors, under the model's names, matched with the model's own.

Everything is decided from names, shapes and dtypes; all faults are collected before anything is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import torch

from keymap.errors import SHOWN, DetectionError, PlanError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format, Position
from keymap.language.layout import Layout, Piece, Shaped, join_runs, whole
from keymap.language.rules import Check, Rule
from keymap.plan.describe import describe, unlike
from keymap.plan.model import ModelView, has_memory
from keymap.plan.plan import Entry, Plan, Request, dtype_name
from keymap.plan.resize import Resize, ResizeError, plan_resize
from keymap.plan.to_hub import Translated, bring_to_layouts, incomplete, to_hub, tower_of
from keymap.plan.turned import missing_views
from keymap.source.config import differences, unverified
from keymap.source.detect import tower_layout, uses_aliases
from keymap.source.open import Source
from keymap.source.unwrap import Unwrapped

__all__ = ["make_plan"]

_FIRST_WORD = re.compile(r"[^./]+[./]")
FLOOR = 0.1  # strict=False refuses when less than this share of a tower's tensors in the file would load


def make_plan(source: Source, model: ModelView, request: Request) -> Plan:
    """Plan the load of a checkpoint into a model.

    Raises:
        DetectionError: no format claims the checkpoint.
        PlanError: with every fault of the load: keys, shapes, dtypes, a tower that would stay empty.
    """
    known, found, unwrapped = source.known, source.found, source.unwrapped
    if found is None:
        raise source.refusal or DetectionError(f"{request.file}: no known format has these keys")
    hub = known.hub
    towers_of_model = {key: tower_of(hub, key) for key in model.tensors}
    if not any(towers_of_model.values()):
        raise PlanError(
            f"{request.file}: the model's keys ({some(model.tensors)}) are not those of an OpenCLIP model; "
            f"pass the model inside a wrapper (model.module, model._orig_mod)"
        )
    if uses_aliases(hub, model.tensors):
        raise PlanError(
            f"{request.file}: the model is one tower alone ({some(model.tensors)}); pass the whole model, and "
            f"towers=('image',) or ('text',) where only that is meant"
        )
    facts = {name: value for name, value in model.facts.items() if type(value) is int} | dict(request.facts)
    now = to_hub(found, facts)
    asked = _asked(request, hub)
    notes = [*source.notes, *source.settings.notes]
    if request.towers is not None:
        meant = {key: layout for key, layout in now.tensors.items() if tower_of(hub, key) in asked}
        if len(meant) < len(now.tensors):
            notes.append(f"{len(now.tensors) - len(meant)} tensors of other towers were not asked for")
        now.tensors = meant
        now.faults = [fault for fault in now.faults if fault.tower in (*asked, "") or fault.fatal]
        now.unowned = [key for key in now.unowned if _tower_of_source(now.rules, key) in (*asked, "")]
    if not now.tensors:
        raise PlanError(
            f"{request.file}: format {found.mapping.name} holds nothing of the towers asked for",
            [f"asked for {', '.join(asked)}; towers are {', '.join(_towers(hub))}", *(f.text for f in now.faults)],
        )
    in_file = Counter(tower_of(hub, key) for key in now.tensors)
    in_file.update(_tower_of_source(now.rules, key) for key in now.unowned)  # a tower may be there under other names
    in_file.update(fault.tower for fault in now.faults for _ in fault.sources if fault.foreign)
    now.source_hub = now.tensors
    foreign = {tower_of(hub, key) for key in now.tensors if key not in model.tensors}
    wanted = {tower: [here] for tower in foreign if (here := tower_layout(hub, tower, model.tensors)) is not None}
    bring_to_layouts(known, now, wanted)
    matching = _Matching(known, found.mapping, now, model, request, asked, towers_of_model)
    matching.config_grid = source.settings.grid
    matching.tensors = unwrapped.tensors
    matching.match()
    matching.ties()
    matching.absent()
    matching.judge(in_file, unwrapped)
    notes += unwrapped.notes
    towers = dict.fromkeys(entry.tower for entry in matching.entries if not entry.filled)
    return Plan(
        file=request.file,
        container=source.container,
        format=found.mapping.name,
        title=found.mapping.title,
        evidence=found.evidence,
        wrapper=unwrapped.wrapper,
        other_wrappers=unwrapped.others,
        prefixes=unwrapped.prefixes,
        layouts={tower: tuple(chain) for tower, chain in now.layouts.items()},
        entries=tuple(matching.entries),
        checks=(*now.checks, *matching.checks),
        dropped=now.dropped,
        missing_keys=tuple(matching.missing),
        unexpected_keys=tuple(matching.unexpected),
        mismatched=matching.mismatched,
        notes=(*notes, *matching.notes),
        warnings=differences(hub, towers, source.settings, model.facts),
        unverified=unverified(hub, towers, source.settings, model.facts),
        steps=tuple(now.steps),
    )


def _tower_of_source(rules: Sequence[Rule], key: str) -> str:
    """The tower that a source key without a rule seems to belong to: its first word is that of one tower only."""
    first = _FIRST_WORD.match(key)
    towers = {rule.tower for rule in rules if first and rule.source.prefix.startswith(first.group())}
    return towers.pop() if len(towers) == 1 else ""


def _towers(hub: Format) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.tower for rule in hub.rules))


def _asked(request: Request, hub: Format) -> tuple[str, ...]:
    """The towers to load; no tower named means all, and keys that the hub does not know."""
    if request.towers is None:
        return (*_towers(hub), "")
    unknown = [tower for tower in request.towers if tower not in _towers(hub)]
    if unknown or not request.towers:
        raise PlanError(f"towers={request.towers!r}: known towers are {', '.join(_towers(hub))}")
    return request.towers


class _Matching:
    """The matching of translated tensors with a model's, step by step."""

    def __init__(
        self,
        known: Catalogue,
        mapping: Format,
        now: Translated,
        model: ModelView,
        request: Request,
        asked: Sequence[str],
        towers: Mapping[str, str],
    ) -> None:
        self.known, self.hub, self.mapping, self.now = known, known.hub, mapping, now
        self.model, self.request, self.asked, self.towers = model, request, asked, towers
        self.targets = {k: t for k, t in model.tensors.items() if towers[k] in asked}
        self.places = {key: _storage(target) for key, target in self.targets.items()}
        self.config_grid: tuple[int, int] | None = None
        self.tensors: Mapping[str, Shaped] = {}
        self.entries: list[Entry] = []
        self.checks: list[Check] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = list(now.unowned)
        self.mismatched: dict[str, str] = {}
        self.notes: list[str] = []

    def match(self) -> None:
        """Each of the model's tensors with the file's of the same hub key."""
        for key, target in self.targets.items():
            layout = self.now.tensors.get(key)
            if layout is None:
                continue
            try:
                self.entries.append(self._entry(key, layout, target))
            except ResizeError as error:
                self.mismatched[key] = f"{error} (from {some(layout.sources) or 'a tensor without elements'})"

    def _entry(self, key: str, layout: Layout, target: torch.Tensor) -> Entry:
        dtype, resize = target.dtype, None
        shape = tuple(target.shape)
        if layout.dtype != dtype and _kind(layout.dtype) != _kind(dtype):
            raise ResizeError(
                f"{dtype_name(layout.dtype)} in the file, {dtype_name(dtype)} in the model: not a cast keymap makes"
            )
        position = self.hub.positions.get(key)
        if position is not None:
            resize = self._resize(position, layout, shape)
        if resize is None and layout.shape != shape:
            if key in self.hub.scalars and prod(layout.shape) == prod(shape) == 1:
                self.notes.append(f"{key}: shape {list(layout.shape)} became {list(shape)}")
                layout = layout._replace(shape=shape)
            else:
                raise ResizeError(f"shape {list(layout.shape)} in the file, {list(shape)} in the model")
        if len(layout.pieces) > 1:
            layout = layout._replace(pieces=join_runs(layout.pieces))
        filled = 0
        casts: set[str] = set()
        for piece in layout.pieces:
            filled += 0 if piece.add else prod(piece.shape)
            if piece.source is not None and (given := self.tensors[piece.source].dtype) != dtype:
                casts.add(f"{dtype_name(given)} to {dtype_name(dtype)}")
        assert filled == prod(layout.shape), f"pieces of {key} fill {filled} of {prod(layout.shape)} elements"
        return Entry(key, self.towers[key], layout, shape, dtype, resize, "", tuple(sorted(casts)))

    def _resize(self, position: Position, layout: Layout, shape: tuple[int, ...]) -> Resize | None:
        target_prefixes = self._prefixes(position)
        origin = self.hub.positions.get(self._origin(position.key), position)
        source_prefixes = self._prefixes(origin)
        grid = self.request.source_grid
        if grid is None and self.config_grid is not None and len(layout.shape) > position.lead:
            fits = layout.shape[position.lead] - prod(self.config_grid) in source_prefixes
            grid = self.config_grid if fits else None
        return plan_resize(
            position,
            layout.shape,
            shape,
            source_prefixes,
            target_prefixes,
            grid,
            self.model.grids.get(position.grid_fact),
        )

    def _prefixes(self, position: Position) -> list[int]:
        """How many rows may stand before the grid; prefix tokens may bring rows, or none."""
        if isinstance(position.prefix, int):
            return [position.prefix]
        total = 0
        for name in position.prefix:
            token: Shaped | None = self.now.source_hub.get(name, self.model.tensors.get(name))
            if token is not None:
                total += token.shape[1] if len(token.shape) == 3 else 1
        return [0, total] if total else [0]

    def _origin(self, key: str) -> str:
        """The hub key in the source's own layout that becomes this key of the model."""
        chain = self.now.layouts.get(tower_of(self.hub, key), [])
        for target, source in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
            for step in self.known.path(tower_of(self.hub, key), target, source) or []:
                found = step.table.find(key)
                key = found[0].targets[0].write(found[1]) if found is not None else key
        return key

    def ties(self) -> None:
        """Tensors of the model that share their memory must get equal values."""
        shared: dict[tuple[int, int], Entry] = {}
        for entry in self.entries:
            place = self.places[entry.key]
            first = shared.setdefault(place, entry) if place is not None else entry
            if first.layout.pieces != entry.layout.pieces:
                why = f"{entry.key} and {first.key} are one tensor of the model"
                self.checks.append(Check(", ".join(entry.layout.sources), entry.layout, first.layout, why))

    def absent(self) -> None:
        """Keys that only one side has: what their absence means, derived buffers, ties, and what is left."""
        written = {entry.key for entry in self.entries}
        storages = {self.places[key] for key in written} - {None}
        towers = {entry.tower for entry in self.entries}
        for key, target in self.targets.items():
            if key in written or key in self.mismatched:
                continue
            tower = self.towers[key]
            if self.hub.ignored(key) is not None:
                self.notes.append(f"{key}: derived by the model, left as it is")
            elif self.places[key] in storages:
                self.notes.append(f"{key}: tied to a tensor that is loaded")
            elif tower in towers and self._may_fill(key):
                value, always = self.hub.absent_means[key]
                because = "the file has none" if always else "the file's format has no place for it"
                layout = _constant(value, tuple(target.shape), target.dtype)
                said = f"with {'the identity' if value == 'eye' else value}: {because}"
                self.entries.append(Entry(key, tower, layout, tuple(target.shape), target.dtype, filled=said))
            else:
                self.missing.append(key)
        unexpected = dict.fromkeys(self.unexpected)
        for key, layout in self.now.tensors.items():
            if key in self.targets:
                continue
            meaning = self.hub.absent_means.get(key)
            derived = self.hub.ignored(key)
            if derived is not None:
                self.now.dropped.update(dict.fromkeys(layout.named(key), derived[0]))
            elif meaning is not None:
                value = "the identity" if meaning[0] == "eye" else meaning[0]
                named = ", ".join(layout.named(key))
                self.checks.append(
                    Check(named, layout, meaning[0], f"the model has no {key}, which stands for {value}")
                )
                because = f"it holds {value}, as its absence from the model means"
                self.now.dropped.update(dict.fromkeys(layout.named(key), because))
            else:
                unexpected.update(dict.fromkeys(layout.named(key)))

        self.unexpected = list(unexpected)

    def _may_fill(self, key: str) -> bool:
        """True where absence has a meaning, and the source's format has no place for the key."""
        if key not in self.hub.absent_means:
            return False
        if self.hub.absent_means[key][1]:
            return True
        name = self._origin(key)
        if name in self.hub.file_only:
            return self.mapping.kind == "hub" or self.mapping.back.find(name) is None
        return self.mapping.back.find(name) is None

    def judge(self, in_file: Mapping[str, int], unwrapped: Unwrapped) -> None:
        """Refuse what must be refused.

        Raises:
            PlanError: with everything that is wrong.
        """
        strict, name = self.request.strict, self.mapping.name
        if self.missing:
            lacking = incomplete(self.mapping, self.now.rules, self.now.source_keys)
            self.now.faults += [fault for fault in lacking if fault.tower in self.asked]
        faults = [f for f in self.now.faults if strict or f.fatal]
        told = [fault.text for fault in faults]
        got = Counter(entry.tower for entry in self.entries if not entry.filled)
        held = f"{self.request.file} (format {name})"
        if strict:
            seen = self._unlike() if faults or self.missing or self.unexpected or self.mismatched else []
            shown = 3 if seen or any(fault.foreign for fault in faults) else SHOWN
            if self.missing:
                listed = some(self.missing, shown)
                told.append(f"{len(self.missing)} of the model's keys are not in the file: {listed}")
            if self.unexpected:
                listed = some(self.unexpected, shown)
                told.append(f"{len(self.unexpected)} of the file's keys have no place in the model: {listed}")
            listed_shapes = shown if seen else 4 * shown
            turned = list(missing_views(self._shapes(), self.now.steps))
            told += [rule.fault for rule in turned]
            explained = {key for rule in turned for key in rule.keys}
            others = [f"{key}: {why}" for key, why in self.mismatched.items() if key not in explained]
            told += others[:listed_shapes]
            if len(others) > listed_shapes:
                told.append(f"and {len(others) - listed_shapes} more keys of other shape")
            if told:
                told[:0] = seen
                absent = [t for t in self.hub.layouts if t not in in_file and self.request.towers is None]
                there = [t for t in self.hub.layouts if t in in_file]
                if self.missing and absent and there:
                    has = ", ".join(map(repr, there))
                    told.append(f"the file holds no {' or '.join(absent)} tower: load with towers=({has},)")
                else:
                    told.append("strict=False loads what fits and reports the rest")
                told += unwrapped.notes
                raise PlanError(f"{held} does not fit the model; nothing was changed", told)
        else:
            for tower, count in in_file.items():
                if tower in self.hub.layouts and got[tower] < FLOOR * count:
                    told.append(
                        f"only {got[tower]} of the {count} tensors of the {tower} tower in the file would load: "
                        f"{some(f'{k}: {w}' for k, w in self.mismatched.items()) or some(self.unexpected)}"
                    )
            used = {source for entry in self.entries for source in entry.layout.sources}
            held_keys = (
                used | set(self.unexpected) | {k for key, lay in self.now.tensors.items() for k in lay.named(key)}
            )
            if len(used) < FLOOR * len(held_keys) or not self.entries:
                told.append(f"only {len(used)} of the file's {len(held_keys)} tensors would load")
            if told:
                told += [*self._unlike(), *(f.text for f in self.now.faults if not f.fatal)]
                raise PlanError(f"{held} does not fit the model, not even in part; nothing was changed", told)
            self.notes += [f.text for f in self.now.faults]
            lost = {k for key in self.mismatched if (lay := self.now.tensors.get(key)) for k in lay.named(key)}
            lost |= {source for fault in self.now.faults for source in fault.sources}
            self.missing += list(self.mismatched)
            used = {k for entry in self.entries for k in entry.layout.sources}
            self.unexpected += sorted(lost - used - set(self.unexpected))

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes, as the format's rules give them and as the model has them, of keys that do not fit."""
        mismatched = [key for key in self.mismatched if self._origin(key) == key]  # no bridge changes their shape
        return {key: (self.now.tensors[key].shape, tuple(self.targets[key].shape)) for key in mismatched}

    def _unlike(self) -> list[str]:
        """What the file is and what the model is, where they are of another architecture or of other sizes."""
        file, model = (
            describe(self.known, {k: lay for k, lay in keys.items() if tower_of(self.hub, k) in self.asked})
            for keys in (self.now.source_hub, self.model.layouts())
        )
        text = unlike(self.known, self.mapping.title, file, model)
        return [text] if text else []


def _storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where a tensor lies; equal for tied tensors."""
    count = tensor.numel()
    if not count:
        return None
    return (tensor.data_ptr(), count) if has_memory(tensor) else (id(tensor), -1)


def _kind(dtype: torch.dtype) -> str:
    """Casts stay within a kind."""
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


def _constant(value: float | str, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """A layout of zeros, ones or the identity."""
    if value != "eye":
        return whole(None, shape, dtype, float(value))
    zeros = whole(None, shape, dtype)
    diagonal = Piece(None, (min(shape),), 0, (0,), 0, (shape[-1] + 1,), term=1.0, add=True)
    return zeros._replace(pieces=(*zeros.pieces, diagonal))
