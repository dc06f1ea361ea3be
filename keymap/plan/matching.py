"""The file's tensors, under the model's names, matched with the model's own.

Each function looks at names, shapes and dtypes and changes nothing; what does not fit is collected, not refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Absence, Format, Position, ignored_in_model
from keymap.language.layout import Layout, Piece, Shaped, join_runs, whole
from keymap.language.rules import Check, RuleTable
from keymap.plan.model import ModelView, has_memory
from keymap.plan.plan import Entry, dtype_name
from keymap.plan.request import Request
from keymap.plan.resize import MismatchError, Resize, Rows, assumed_grid, patch_of, plan_resize, prefixes_of
from keymap.plan.to_hub import Translated, tower_of
from keymap.source.settings import Settings

__all__ = ["Matches", "Sides", "key_before_bridges", "match"]

_tuple = tuple.__new__  # takes half the time
Address = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Sides:
    """The two sides of a match.

    Attributes:
        known: the mappings.
        format: the file's.
        translated: the file's tensors under the hub's names, in the model's layouts.
        file_tensors: the file's tensors by its own keys.
        settings: that the source states.
        model: its tensors and facts.
        request: what the caller asked for.
        hub_applies: what the hub says of keys holds for the model; it does not for a model of another kind.
    """

    known: Catalogue
    format: Format
    translated: Translated
    file_tensors: Mapping[str, Shaped]
    settings: Settings
    model: ModelView
    request: Request
    hub_applies: bool = True

    def ignored(self, key: str) -> tuple[str, str] | None:
        """Why a key of the hub holds no weights; None if it does."""
        return ignored_in_model(self.hub, self.format, key) if self.hub_applies else None

    def absent_means(self, key: str) -> Absence | None:
        """What the absence of a key of the hub means, and whether in every format."""
        return self.hub.absent_means.get(key) if self.hub_applies else None

    @cached_property
    def hub(self) -> Format:
        """Looked up once, for it is needed for every key."""
        return self.known.hub

    @cached_property
    def back(self) -> RuleTable:
        """The way back of the rules that applied to the file."""
        return RuleTable(self.translated.rules).inverse() if self.format.variants else self.format.back

    @cached_property
    def towers(self) -> dict[str, str]:
        """The tower of each of the model's keys."""
        hub = self.hub
        return {key: tower_of(hub, key) for key in self.model.tensors}

    @cached_property
    def targets(self) -> dict[str, torch.Tensor]:
        """The model's tensors in the requested towers."""
        towers, includes = self.towers, self.request.includes
        return {key: tensor for key, tensor in self.model.tensors.items() if includes(towers[key])}

    @cached_property
    def addresses(self) -> dict[str, Address | None]:
        """Where each of the targets lies in memory; equal for tied tensors, None for tensors without elements."""
        return {key: _address(target) for key, target in self.targets.items()}


class Matches(NamedTuple):
    """What a match finds.

    Attributes:
        entries: what fills each tensor of the model.
        checks: values to verify before anything is written.
        missing: keys of the model that are not filled.
        unexpected: keys of the file that are not used.
        mismatched: keys of the model whose tensor in the file does not fit, and why.
        dropped: keys of the file that hold no weights, and why.
        notes: remarks for the report.
    """

    entries: tuple[Entry, ...]
    checks: tuple[Check, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    dropped: Mapping[str, str]
    notes: tuple[str, ...]


def match(sides: Sides) -> Matches:
    """Match every tensor of either side."""
    notes: list[str] = []
    entries: list[Entry] = []
    mismatched: dict[str, str] = {}
    for key, target in sides.targets.items():
        layout = sides.translated.tensors.get(key)
        if layout is None:
            continue
        try:
            entries.append(_entry(sides, key, layout, target, notes))
        except MismatchError as error:
            mismatched[key] = f"{error} (from {some(layout.sources) or 'a tensor without elements'})"
    model_only = _match_model_only(sides, entries, mismatched)
    file_only = _match_file_only(sides)
    return Matches(
        entries=(*entries, *model_only.filled),
        checks=(*_tie_checks(entries, sides.addresses), *file_only.checks),
        missing=tuple(model_only.missing),
        unexpected=tuple(file_only.unexpected),
        mismatched=mismatched,
        dropped={**sides.translated.dropped, **file_only.dropped},
        notes=(*notes, *model_only.notes),
    )


# --- keys on both sides ---


def _entry(sides: Sides, key: str, layout: Layout, target: torch.Tensor, notes: list[str]) -> Entry:
    """The entry of one key; raises MismatchError where the file's tensor cannot fill the model's."""
    dtype = target.dtype
    position = sides.hub.positions.get(key)
    if position is None and layout.shape == target.shape and layout.copied_whole:  # as most are
        source = layout.pieces[0].source
        if layout.dtype == dtype and source is not None and sides.file_tensors[source].dtype == dtype:
            return _tuple(Entry, (key, sides.towers[key], layout, layout.shape, dtype, None, "", ()))
    shape = tuple(target.shape)
    if layout.dtype != dtype and _kind(layout.dtype) != _kind(dtype):
        raise MismatchError(
            f"{dtype_name(layout.dtype)} in the file, {dtype_name(dtype)} in the model: keymap does not cast between "
            f"these dtypes"
        )
    resize = _resize(sides, position, layout, shape, notes) if position is not None else None
    if resize is None and layout.shape != shape:
        if key not in sides.hub.scalars or not prod(layout.shape) == prod(shape) == 1:
            raise MismatchError(f"shape {list(layout.shape)} in the file, {list(shape)} in the model")
        notes.append(f"{key}: reshaped from {list(layout.shape)} to {list(shape)}")
        layout = layout._replace(shape=shape)
    if len(layout.pieces) > 1:
        layout = layout._replace(pieces=join_runs(layout.pieces))
    covered = sum(piece.numel for piece in layout.pieces if not piece.add)
    assert covered == prod(layout.shape), f"pieces of {key} fill {covered} of {prod(layout.shape)} elements"
    return Entry(key, sides.towers[key], layout, shape, dtype, resize, "", _casts(sides, layout, dtype))


def _casts(sides: Sides, layout: Layout, dtype: torch.dtype) -> tuple[str, ...]:
    """The dtype conversions that a layout's sources need."""
    held = sides.file_tensors
    others = {held[piece.source].dtype for piece in layout.pieces if piece.source is not None} - {dtype}
    return tuple(sorted(f"{dtype_name(other)} to {dtype_name(dtype)}" for other in others))


def _resize(
    sides: Sides, position: Position, layout: Layout, shape: tuple[int, ...], notes: list[str]
) -> Resize | None:
    origin = sides.hub.positions.get(key_before_bridges(sides, position.key), position)
    prefixes = _prefixes(sides, origin)
    grid, stated = sides.request.source_grid, sides.settings.grid(patch_of(origin, sides.translated.unbridged))
    if grid is None and stated is not None and len(layout.shape) > position.lead:
        grid = stated if layout.shape[position.lead] - prod(stated) in prefixes else None
    target = Rows(shape, _prefixes(sides, position), sides.model.grids.get(position.grid_fact))
    file_rows = Rows(layout.shape, prefixes, grid)
    guess = assumed_grid(position, file_rows, target)
    if guess is not None:
        h, w = guess
        notes.append(
            f"{position.key}: taken as the model's grid of {h}x{w}, because the file does not show its own; pass "
            f"source_grid=(h, w) if it is another"
        )
    try:
        return plan_resize(position, file_rows, target)
    except MismatchError as error:
        tokens = _other_tokens(sides, position) if origin is position else ""
        raise MismatchError(tokens or str(error)) from error


def _other_tokens(sides: Sides, position: Position) -> str:
    """Which tokens before the grid one side alone has, and what to do; empty where both have the same."""
    names = () if isinstance(position.prefix, int) else position.prefix
    file, model = ([n for n in names if n in side] for side in (sides.translated.unbridged, sides.model.tensors))
    differing = [f"the model has {name}, which the file lacks" for name in model if name not in file]
    differing += [f"the file has {name}, which the model lacks" for name in file if name not in model]
    advice = ": load into a model with the tokens of the file"
    return f"{'; '.join(differing)}{advice}" if file and differing else ""


def _prefixes(sides: Sides, position: Position) -> list[int]:
    """How many rows may come before the grid; prefix tokens may have rows of their own, or none."""
    return prefixes_of(position, sides.translated.unbridged, sides.model.tensors)


def key_before_bridges(sides: Sides, key: str) -> str:
    """The hub key in the source's own layout that becomes this key of the model."""
    tower = tower_of(sides.hub, key)
    chain = sides.translated.layouts.get(tower, [])
    for target, source in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
        for bridge in sides.known.path(tower, target, source) or []:
            found = bridge.table.find(key)
            if found is not None and found[0].cut is None:
                key = found[0].targets[0].write(found[1])
    return key


def _tie_checks(entries: Sequence[Entry], addresses: Mapping[str, Address | None]) -> list[Check]:
    """Tensors of the model that share their memory must get equal values."""
    checks: list[Check] = []
    first_at: dict[Address, Entry] = {}
    for entry in entries:
        address = addresses[entry.key]
        first = first_at.setdefault(address, entry) if address is not None else entry
        if first.layout.pieces != entry.layout.pieces:
            why = f"{entry.key} and {first.key} are one tensor of the model"
            checks.append(Check(", ".join(entry.layout.sources), entry.layout, first.layout, why))
    return checks


# --- keys on one side ---


class _ModelOnly(NamedTuple):
    filled: list[Entry]
    missing: list[str]
    notes: list[str]


def _match_model_only(sides: Sides, entries: Sequence[Entry], mismatched: Mapping[str, str]) -> _ModelOnly:
    """Keys of the model that the file lacks: computed by the model, tied, filled with a constant, or missing."""
    found = _ModelOnly([], [], [])
    loaded = {entry.key for entry in entries}
    loaded_addresses = {sides.addresses[key] for key in loaded} - {None}
    loaded_towers = {entry.tower for entry in entries}
    optional: list[str] = []
    for key, target in sides.targets.items():
        if key in loaded or key in mismatched:
            continue
        tower = sides.towers[key]
        ignored = sides.ignored(key)
        if ignored is not None and ignored[1]:
            _match_copy(sides, key, ignored[1], found)
        elif ignored is not None:
            found.notes.append(f"{key}: computed by the model, left unchanged")
        elif tower in loaded_towers and _last_word(key) in sides.hub.optional_buffers:
            if target.is_meta:
                found.filled.append(_filled(key, tower, target, 0, "the file"))
            else:
                optional.append(key)
        elif sides.addresses[key] in loaded_addresses:
            found.notes.append(f"{key}: tied to a tensor that is loaded")
        elif tower in loaded_towers and (meaning := _meaning(sides, key)) is not None:
            owner = "the file" if meaning.always else f"format {sides.format.name}"
            found.filled.append(_filled(key, tower, target, meaning.value, owner))
        else:
            found.missing.append(key)
    if optional:
        found.notes.append(f"not in the file, left unchanged: {some(optional)}")
    found.missing.extend(key for key in sides.model.lazy if sides.request.includes(tower_of(sides.hub, key)))
    return found


def _match_copy(sides: Sides, key: str, twin: str, found: _ModelOnly) -> None:
    """A key of the model that repeats another one, which the file has once."""
    held, layout = sides.model.tensors.get(twin), sides.translated.tensors.get(twin)
    if held is not None and _address(held) == sides.addresses[key]:
        found.notes.append(f"{key}: one tensor with {twin}")
    elif layout is None or layout.shape != tuple(sides.targets[key].shape):
        found.missing.append(key)
    else:
        found.filled.append(_entry(sides, key, layout, sides.targets[key], found.notes))
        found.notes.append(f"{key}: a copy of {twin}")


def _filled(key: str, tower: str, target: torch.Tensor, value: float | str, owner: str) -> Entry:
    """An entry that fills a tensor with a constant, because its owner has no such key."""
    shape = tuple(target.shape)
    how = f"with {_constant_name(value)}, because {owner} has no such key"
    return Entry(key, tower, _constant(value, shape, target.dtype), shape, target.dtype, filled=how)


def _meaning(sides: Sides, key: str) -> Absence | None:
    """What a key's absence means, where it has a meaning and the source's format has no such key."""
    meaning = sides.absent_means(key)
    if meaning is None or meaning.always:
        return meaning
    name = key_before_bridges(sides, key)
    if sides.format.kind == "hub":
        side = meaning.together
        alone = side is not None and all(side.match(other) is None for other in sides.translated.unbridged)
        if alone or name in sides.hub.file_only:
            return meaning
    return meaning if sides.back.find(name) is None else None


class _FileOnly(NamedTuple):
    unexpected: dict[str, None]
    checks: list[Check]
    dropped: dict[str, str]


def _match_file_only(sides: Sides) -> _FileOnly:
    """Keys of the file that the model lacks: without weights, of a value that absence means, or unexpected."""
    found = _FileOnly(dict.fromkeys(sides.translated.unowned), [], {})
    tensors, targets = sides.translated.tensors, sides.targets
    others = [(key, layout) for key, layout in tensors.items() if key not in targets]
    used = {layout.pieces for key, layout in tensors.items() if key in targets} if others else ()
    for key, layout in others:
        if layout.sources and layout.pieces in used:  # a second target of tied weights
            continue
        ignored, meaning = sides.ignored(key), sides.absent_means(key)
        if ignored is not None:
            found.dropped.update(dict.fromkeys(layout.named(key), ignored[0]))
        elif _last_word(key) in sides.hub.optional_buffers:
            found.dropped.update(dict.fromkeys(layout.named(key), "the model does not keep it"))
        elif meaning is not None and not _of_a_module_without_place(sides, key):
            value = _constant_name(meaning.value)
            why = f"the model has no {key}, which means {value}"
            found.checks.append(Check(", ".join(layout.named(key)), layout, meaning.value, why))
            found.dropped.update(dict.fromkeys(layout.named(key), f"it holds {value}, as a model without it assumes"))
        else:
            found.unexpected.update(dict.fromkeys(layout.named(key)))
    return found


def _of_a_module_without_place(sides: Sides, key: str) -> bool:
    """Whether the file has other tensors of a key's module, and the model has none: a head that it lacks as a whole.

    A module of which every tensor has a meaning where it is absent is judged by its values.
    """
    module = key[: key.rfind(".") + 1]
    if not module:
        return False
    beside = [other for other in sides.translated.tensors if other != key and other.startswith(module)]
    known = all(sides.absent_means(other) is not None for other in beside)
    return not known and not any(other in sides.model.tensors for other in beside)


def _last_word(key: str) -> str:
    return key.rpartition(".")[2]


def _address(tensor: torch.Tensor) -> Address | None:
    """Where a tensor lies; equal for tied tensors."""
    count = tensor.numel()
    if not count:
        return None
    if has_memory(tensor):
        return tensor.data_ptr(), count
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):  # on the meta device: its storage has no address
        return (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), count)
    return (id(tensor), -1)


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


def _constant_name(value: float | str) -> str:
    return "the identity matrix" if value == "eye" else str(value)
