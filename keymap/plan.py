"""The plan of a load: made from names, shapes and dtypes alone, before a byte of weights is read.

Every key, shape and dtype is settled here. What a plan does not refuse cannot fail later for a reason that
could have been seen before, apart from the few values that `verify` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as MappingType
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from keymap.detect import Detection, spelling
from keymap.errors import PlanError
from keymap.mapping import Mapping, Position
from keymap.model import ModelView
from keymap.pieces import Layout, Piece, join_runs, whole
from keymap.registry import Registry
from keymap.resize import Resize, ResizeError, plan_resize
from keymap.rules import Check, RuleTable, Step
from keymap.translate import Translated, incomplete, respell, to_hub, tower_of
from keymap.unwrap import Unwrapped

__all__ = ["Entry", "Plan", "Request", "make_plan"]

FLOOR = 0.1  # strict=False refuses when less than this share of a tower's tensors in the file would load
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model: what fills it.

    Attributes:
        key, tower: in the model.
        layout: the pieces, at the source's size.
        shape, dtype: of the model's tensor.
        resize: how the position embedding is resampled, or None.
        filled: True where the source's format has no place for the key and a constant stands in.
    """

    key: str
    tower: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype
    resize: Resize | None = None
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked for."""

    file: str
    strict: bool = True
    towers: tuple[str, ...] | None = None
    source_grid: tuple[int, int] | None = None
    facts: MappingType[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a load will do.

    Attributes:
        file, container: the checkpoint.
        format, evidence: its format, and the keys that told it.
        wrapper, prefixes: what was taken off; ``other_wrappers`` were in the file too and not taken.
        spellings: for each tower of the file the spellings that it went through.
        entries: one for each tensor of the model that will be written.
        checks: values to be seen before anything is written.
        dropped: source keys without weights, and why.
        missing_keys: the model's keys that nothing fills; empty under strict.
        unexpected_keys: the file's keys that nothing uses; empty under strict.
        mismatched: model keys whose tensor in the file does not fit, and why; empty under strict.
        notes: what else a reader should know.
        steps: every application of a rule, for `explain`.
    """

    file: str
    container: str
    format: str
    title: str
    evidence: tuple[str, ...]
    wrapper: str
    other_wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    spellings: MappingType[str, tuple[str, ...]]
    entries: tuple[Entry, ...]
    checks: tuple[Check, ...]
    dropped: MappingType[str, str]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched: MappingType[str, str]
    notes: tuple[str, ...]
    steps: tuple[Step, ...] = field(repr=False, default=())

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The plan's pieces; those of a resized tensor are at the source's size."""
        return tuple(replace(p, target=entry.key) for entry in self.entries for p in entry.layout.pieces)

    @property
    def resized(self) -> dict[str, str]:
        return {entry.key: str(entry.resize) for entry in self.entries if entry.resize is not None}

    @property
    def filled(self) -> dict[str, str]:
        return {e.key: "the format has no place for it" for e in self.entries if e.filled}

    @property
    def cast(self) -> dict[str, int]:
        """Conversions of dtype, and how many tensors each concerns."""
        pairs = ((e.layout.dtype, e.dtype) for e in self.entries if not e.filled and e.layout.dtype != e.dtype)
        return dict(Counter(f"{_name(a)} to {_name(b)}" for a, b in pairs))

    @property
    def loaded(self) -> dict[str, int]:
        """How many tensors each tower gets from the file."""
        return dict(Counter(entry.tower for entry in self.entries if not entry.filled))

    def explain(self, key: str | None = None) -> str:
        """How one tensor of the model is filled, or the whole plan: pieces, and the rules that made them.

        Raises:
            KeyError: the plan does not fill that key.
        """
        chosen = [entry for entry in self.entries if key is None or entry.key == key]
        if not chosen:
            raise KeyError(f"the plan fills no {key!r}; it leaves {', '.join(self.missing_keys[:_SHOWN]) or 'none'}")
        makers: dict[str, list[Step]] = {}
        for step in self.steps:
            for target in step.targets:
                makers.setdefault(target, []).append(step)
        lines = []
        for entry in chosen:
            lines.append(f"{entry.key} {list(entry.shape)} {_name(entry.dtype)}")
            for piece in entry.layout.pieces:
                what = f"constant {piece.term:g}" if piece.source is None else piece.source
                verb = "+=" if piece.add else "<-"
                lines.append(
                    f"  {list(piece.shape)} at {piece.target_offset} by {list(piece.target_strides)} {verb} {what} "
                    f"at {piece.source_offset} by {list(piece.source_strides)}"
                )
            if entry.resize is not None:
                lines.append(f"  resized {entry.resize}")
            wanted, seen = [entry.key], set()
            while wanted:
                for step in makers.get(wanted.pop(), []):
                    if step not in seen:
                        seen.add(step)
                        lines.append(f"  by {step.text} ({step.place})")
                        wanted += step.sources
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan's account as plain data; the names are those of the attributes."""
        return {
            "file": self.file,
            "container": self.container,
            "format": self.format,
            "evidence": list(self.evidence),
            "wrapper": self.wrapper,
            "other_wrappers": list(self.other_wrappers),
            "prefixes": list(self.prefixes),
            "spellings": {tower: list(chain) for tower, chain in self.spellings.items()},
            "loaded": self.loaded,
            "resized": self.resized,
            "filled": self.filled,
            "cast": self.cast,
            "dropped": dict(self.dropped),
            "missing_keys": list(self.missing_keys),
            "unexpected_keys": list(self.unexpected_keys),
            "mismatched": dict(self.mismatched),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.format} ({self.container}), {self.title}"]
        if self.wrapper:
            lines.append(f"  wrapper: {self.wrapper}")
        if self.other_wrappers:
            lines.append(f"  also in the file, not taken: {', '.join(self.other_wrappers)} (choose with wrapper=)")
        if self.prefixes:
            lines.append(f"  prefixes cut: {' '.join(self.prefixes)}")
        for tower, chain in self.spellings.items():
            if len(chain) > 1:
                lines.append(f"  {tower} tower respelled: {' -> '.join(chain)}")
        counts = ", ".join(f"{tower} {n}" for tower, n in self.loaded.items())
        lines.append(f"  loaded: {sum(self.loaded.values())} tensors ({counts})")
        lines += [f"  resized {key}: {how}" for key, how in self.resized.items()]
        lines += [f"  filled {key}: {why}" for key, why in self.filled.items()]
        lines += [f"  cast {count} tensors {pair}" for pair, count in self.cast.items()]
        by_reason: dict[str, list[str]] = {}
        for key, why in self.dropped.items():
            by_reason.setdefault(why, []).append(key)
        lines += [f"  dropped {_some(keys)}: {why}" for why, keys in by_reason.items()]
        if self.missing_keys:
            lines.append(f"  missing, left as they were: {_some(self.missing_keys)}")
        if self.unexpected_keys:
            lines.append(f"  unexpected, not used: {_some(self.unexpected_keys)}")
        lines += [f"  does not fit: {key}: {why}" for key, why in self.mismatched.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(keys: Iterable[str]) -> str:
    """Some of the keys, in words."""
    listed = list(keys)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def make_plan(
    known: Registry,
    found: Detection,
    unwrapped: Unwrapped,
    container: str,
    model: ModelView,
    request: Request,
    config_grid: tuple[int, int] | None = None,
) -> Plan:
    """Plan the load of a detected checkpoint into a model.

    Raises:
        PlanError: with every fault of the load: keys, shapes, dtypes, a tower that would stay empty.
    """
    hub = known.hub
    facts = {**model.facts, **request.facts}
    now = to_hub(found, facts)
    asked = _asked(request, hub)
    other = {key for key in now.tensors if tower_of(hub, key) not in asked}
    notes = []
    if other and request.towers is not None:
        notes.append(f"{len(other)} tensors of other towers were not asked for")
    now.tensors = {key: layout for key, layout in now.tensors.items() if key not in other}
    if not now.tensors:
        raise PlanError(
            f"{request.file}: format {found.mapping.name} holds nothing of the towers asked for",
            [f"asked for {', '.join(asked)}; towers are {', '.join(_towers(hub))}", *(f.text for f in now.faults)],
        )
    in_file = Counter(tower_of(hub, key) for key in now.tensors)
    wanted = {tower: [here] for tower in hub.spellings if (here := spelling(hub, tower, model.layouts)) is not None}
    respell(known, now, wanted)
    work = _Work(known, found.mapping, now, model, request, asked)
    work.config_grid = config_grid
    work.match()
    work.ties()
    work.absent()
    work.judge(in_file, unwrapped)
    if unwrapped.skipped:
        notes.append(f"entries that are no tensors were skipped: {_some(unwrapped.skipped)}")
    return Plan(
        file=request.file,
        container=container,
        format=found.mapping.name,
        title=found.mapping.title,
        evidence=found.evidence,
        wrapper=unwrapped.wrapper,
        other_wrappers=unwrapped.others,
        prefixes=unwrapped.prefixes,
        spellings={tower: tuple(chain) for tower, chain in now.spellings.items()},
        entries=tuple(work.entries),
        checks=(*now.checks, *work.checks),
        dropped=now.dropped,
        missing_keys=tuple(work.missing),
        unexpected_keys=tuple(work.unexpected),
        mismatched=work.mismatched,
        notes=(*notes, *work.notes),
        steps=tuple(now.steps),
    )


def _towers(hub: Mapping) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.group for rule in hub.rules))


def _asked(request: Request, hub: Mapping) -> tuple[str, ...]:
    """The towers to load; no tower named means all, and keys that the hub does not know."""
    if request.towers is None:
        return (*_towers(hub), "")
    unknown = [tower for tower in request.towers if tower not in _towers(hub)]
    if unknown or not request.towers:
        raise PlanError(f"towers={request.towers!r}: known towers are {', '.join(_towers(hub))}")
    return request.towers


class _Work:
    """The matching of translated tensors with a model's, step by step."""

    def __init__(
        self,
        known: Registry,
        mapping: Mapping,
        now: Translated,
        model: ModelView,
        request: Request,
        asked: Sequence[str],
    ) -> None:
        self.known, self.hub, self.mapping, self.now = known, known.hub, mapping, now
        self.model, self.request = model, request
        self.targets = {k: t for k, t in model.tensors.items() if tower_of(self.hub, k) in asked}
        self.config_grid: tuple[int, int] | None = None
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
            shape = tuple(target.shape)
            try:
                entry = self._entry(key, layout, shape, target.dtype)
            except ResizeError as error:
                self.mismatched[key] = f"{error} (from {_some(layout.sources)})"
                continue
            self.entries.append(entry)

    def _entry(self, key: str, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
        resize = None
        if layout.dtype.is_floating_point != dtype.is_floating_point or layout.dtype.is_complex != dtype.is_complex:
            raise ResizeError(
                f"{_name(layout.dtype)} in the file, {_name(dtype)} in the model: not a cast keymap makes"
            )
        position = self.hub.positions.get(key)
        if position is not None:
            resize = self._resize(position, layout, shape)
        if resize is None and layout.shape != shape:
            if key in self.hub.scalars and prod(layout.shape) == prod(shape) == 1:
                self.notes.append(f"{key}: shape {list(layout.shape)} became {list(shape)}")
                layout = replace(layout, shape=shape)
            else:
                raise ResizeError(f"shape {list(layout.shape)} in the file, {list(shape)} in the model")
        layout = replace(layout, pieces=join_runs(layout.pieces)) if len(layout.pieces) > 1 else layout
        filled = sum(piece.numel for piece in layout.pieces if not piece.add)
        assert filled == prod(layout.shape), f"pieces of {key} fill {filled} of {prod(layout.shape)} elements"
        return Entry(key, tower_of(self.hub, key), layout, shape, dtype, resize)

    def _resize(self, position: Position, layout: Layout, shape: tuple[int, ...]) -> Resize | None:
        prefixes = [position.prefix] if isinstance(position.prefix, int) else [0]
        if not isinstance(position.prefix, int):
            there = [self.model.layouts[name].shape for name in position.prefix if name in self.model.layouts]
            total = sum(s[1] if len(s) == 3 else 1 for s in there)
            prefixes += [total] if total else []
        grid = self.request.source_grid
        if grid is None and self.config_grid is not None and len(layout.shape) > position.lead:
            fits = layout.shape[position.lead] - prod(self.config_grid) in prefixes
            grid = self.config_grid if fits else None
        return plan_resize(position, layout.shape, shape, prefixes, grid, self.model.grid)

    def ties(self) -> None:
        """Tensors of the model that share their memory must get equal values."""
        shared: dict[tuple[int, int], Entry] = {}
        for entry in self.entries:
            place = self._storage(self.targets[entry.key])
            first = shared.setdefault(place, entry) if place is not None else entry
            if first.layout.pieces != entry.layout.pieces:
                why = f"{entry.key} and {first.key} are one tensor of the model"
                self.checks.append(Check(", ".join(entry.layout.sources), entry.layout, first.layout, why))

    def absent(self) -> None:
        """Keys that only one side has: what their absence means, derived buffers, ties, and what is left."""
        written = {entry.key for entry in self.entries}
        storages = {self._storage(self.targets[key]) for key in written} - {None}
        towers = {entry.tower for entry in self.entries}
        for key, target in self.targets.items():
            if key in written or key in self.mismatched:
                continue
            tower = tower_of(self.hub, key)
            if any(side.match(key) is not None for side, _ in self.hub.drop):
                self.notes.append(f"{key}: derived by the model, left as it is")
            elif self._storage(target) in storages:
                self.notes.append(f"{key}: tied to a tensor that is loaded")
            elif tower in towers and self._may_fill(key):
                value = self.hub.absent_means[key][0]
                layout = _constant(value, tuple(target.shape), target.dtype)
                self.entries.append(Entry(key, tower, layout, tuple(target.shape), target.dtype, filled=True))
                self.notes.append(f"{key}: filled with {'the identity' if value == 'eye' else value}")
            else:
                self.missing.append(key)
        for key, layout in self.now.tensors.items():
            if key in self.targets:
                continue
            meaning = self.hub.absent_means.get(key)
            why = next((why for side, why in self.hub.drop if side.match(key) is not None), None)
            if why is not None:
                self.now.dropped.update(dict.fromkeys(layout.sources, why))
            elif meaning is not None:
                value = "the identity" if meaning[0] == "eye" else meaning[0]
                named = ", ".join(layout.sources)
                self.checks.append(
                    Check(named, layout, meaning[0], f"the model has no {key}, which stands for {value}")
                )
                why = f"it holds {value}, as its absence from the model means"
                self.now.dropped.update(dict.fromkeys(layout.sources, why))
            else:
                self.unexpected += [k for k in layout.sources if k not in self.unexpected]

    @staticmethod
    def _storage(tensor: torch.Tensor) -> tuple[int, int] | None:
        """Where a tensor lies; equal for tied tensors."""
        if tensor.device.type == "meta" or not tensor.numel():
            return None
        return tensor.data_ptr(), tensor.numel()

    def _may_fill(self, key: str) -> bool:
        """True where absence has a meaning, and the source's format has no place for the key."""
        if key not in self.hub.absent_means:
            return False
        if self.hub.absent_means[key][1]:
            return True
        tower = tower_of(self.hub, key)
        chain = self.now.spellings.get(tower, [])
        name = key
        for target, source in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
            for step in self.known.path(tower, target, source) or []:
                found = step.table.find(name)
                name = found[0].targets[0].write(found[1]) if found is not None else name
        if name in self.hub.file_only:
            return self.mapping.kind == "hub" or RuleTable(self.mapping.rules).inverse().find(name) is None
        return RuleTable(self.mapping.rules).inverse().find(name) is None

    def judge(self, in_file: MappingType[str, int], unwrapped: Unwrapped) -> None:
        """Refuse what must be refused.

        Raises:
            PlanError: with everything that is wrong.
        """
        strict, name = self.request.strict, self.mapping.name
        if self.missing:
            self.now.faults += incomplete(self.mapping, self.now.rules, self.now.source_keys)
        faults = [f for f in self.now.faults if strict or f.fatal]
        told = [fault.text for fault in faults]
        got = Counter(entry.tower for entry in self.entries if not entry.filled)
        held = f"{self.request.file} (format {name})"
        if strict:
            if self.missing:
                told.append(f"{len(self.missing)} of the model's keys are not in the file: {_some(self.missing)}")
            if self.unexpected:
                told.append(
                    f"{len(self.unexpected)} of the file's keys have no place in the model: {_some(self.unexpected)}"
                )
            told += [f"{key}: {why}" for key, why in list(self.mismatched.items())[: 4 * _SHOWN]]
            if len(self.mismatched) > 4 * _SHOWN:
                told.append(f"and {len(self.mismatched) - 4 * _SHOWN} more keys of other shape")
            if told:
                lacking = [t for t in ("image", "text") if t not in in_file and self.request.towers is None]
                if self.missing and lacking:
                    has = ", ".join(repr(t) for t in ("image", "text") if t in in_file)
                    told.append(f"the file holds no {' or '.join(lacking)} tower: load with towers=({has},)")
                else:
                    told.append("strict=False loads what fits and reports the rest")
                raise PlanError(f"{held} does not fit the model; nothing was changed", told)
        else:
            for tower, count in in_file.items():
                if tower in self.hub.spellings and got[tower] < FLOOR * count:
                    told.append(
                        f"only {got[tower]} of the {count} tensors of the {tower} tower in the file would load: "
                        f"{_some(f'{k}: {w}' for k, w in self.mismatched.items()) or _some(self.unexpected)}"
                    )
            if not self.entries:
                told.append("nothing of the file would load")
            if told:
                told += [f.text for f in self.now.faults if not f.fatal]
                raise PlanError(f"{held} does not fit the model, not even in part; nothing was changed", told)
            self.notes += [f.text for f in self.now.faults]
            lost = {k for key in self.mismatched if (lay := self.now.tensors.get(key)) for k in lay.sources}
            lost |= {source for fault in self.now.faults for source in fault.sources}
            self.missing += list(self.mismatched)
            used = {k for entry in self.entries for k in entry.layout.sources}
            self.unexpected += sorted(k for k in lost if k not in self.unexpected and k not in used)


def _constant(value: float | str, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """A layout of zeros, ones or the identity."""
    if value != "eye":
        return whole(None, shape, dtype, float(value))
    zeros = whole(None, shape, dtype)
    diagonal = Piece(None, (min(shape),), 0, (0,), 0, (shape[-1] + 1,), term=1.0, add=True)
    return replace(zeros, pieces=(*zeros.pieces, diagonal))
