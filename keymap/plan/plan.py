"""The plan of a load: made from names, shapes and dtypes alone, before any weight is read.

Keys, shapes and dtypes are decided here. After a plan is made, a load can fail only for the values that
`load.preflight` checks, for memory and for input or output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from typing import Any, NamedTuple

import torch

from keymap.errors import SHOWN, PlanError, by_reason, count_of, printable, some
from keymap.language.layout import Layout, Piece
from keymap.language.rules import Check, Step
from keymap.plan.resize import Resize
from keymap.source.settings import Compared

__all__ = ["Entry", "Part", "Plan", "dtype_name", "makers_of", "steps_to", "without_failed"]


_MAX_NAME = 200  # characters of a key that are compared with the plan's keys


class Entry(NamedTuple):
    """One tensor of the model, and what fills it.

    Attributes:
        key, tower: in the model.
        layout: the pieces, at the source's size.
        shape, dtype: of the model's tensor.
        resize: how the position embedding is resampled, or None.
        filled: the constant that is used because the file lacks the key, and why. Empty for other entries.
        casts: dtype conversions that its sources need, for example ``float16 to float32``.
    """

    key: str
    tower: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype
    resize: Resize | None = None
    filled: str = ""
    casts: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Part(NamedTuple):
    """Where towers come from.

    Attributes:
        towers: the towers that are loaded.
        format: of their state dict.
        prefix: what their keys in the file begin with, before the names that the format has.
    """

    towers: tuple[str, ...]
    format: str
    prefix: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What a load will do.

    Attributes:
        file, container: the checkpoint.
        format, title: the format that was detected, or that the caller named.
        hub: the hub whose names the model has.
        evidence: the keys by which it was detected.
        wrapper, prefixes: the dict that was unwrapped, and the key prefixes that were stripped.
        other_wrappers: further state dicts in the file, which are not loaded.
        layouts: for each tower of the file the layouts that it was converted through.
        entries: one for each tensor of the model that will be written.
        checks: values to verify before anything is written.
        dropped: keys of the file that hold no weights, and why.
        missing_keys: the model's keys that are not filled; under strict only those of ``allow_missing``.
        unexpected_keys: the file's keys that are not used; under strict only those of ``allow_unexpected``.
        mismatched: keys of the model whose tensor in the file does not fit, and why; empty under strict.
        notes: further remarks for the reader.
        warnings: settings in which the source's configuration and the model differ.
        unverified: settings that the weights do not show, and that the source does not state either.
        steps: every application of a rule, for `explain`.
        parts: the state dicts that the towers come from; several where one file holds the towers apart.
        settings: the settings that were compared, with the values of both sides; ``warnings`` and ``unverified`` are
            made of them.
        sources: shape and dtype of every tensor of those state dicts, by the key that the pieces name.
    """

    file: str
    container: str
    format: str
    title: str
    evidence: tuple[str, ...]
    wrapper: str
    other_wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    layouts: Mapping[str, tuple[str, ...]]
    entries: tuple[Entry, ...]
    checks: tuple[Check, ...]
    dropped: Mapping[str, str]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    mismatched: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    steps: tuple[Step, ...] = field(repr=False, default=())
    parts: tuple[Part, ...] = ()
    settings: tuple[Compared, ...] = ()
    sources: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(repr=False, default_factory=dict)
    hub: str = ""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The plan's pieces; those of a resized tensor are at the source's size."""
        return tuple(p._replace(target=entry.key) for entry in self.entries for p in entry.layout.pieces)

    @property
    def resized(self) -> dict[str, str]:
        """The model's keys that are resized, and how."""
        return {entry.key: str(entry.resize) for entry in self.entries if entry.resize is not None}

    @property
    def filled(self) -> dict[str, str]:
        """The model's keys that are filled with a constant: with which one, and why."""
        return {entry.key: entry.filled for entry in self.entries if entry.filled}

    @property
    def cast(self) -> dict[str, int]:
        """Dtype conversions, and the number of tensors for each."""
        return dict(Counter(pair for entry in self.entries for pair in entry.casts))

    @property
    def loaded(self) -> dict[str, int]:
        """The number of tensors that each tower gets from the file."""
        return dict(Counter(entry.tower for entry in self.entries if not entry.filled))

    def explain(self, key: str | None = None) -> str:
        """How one tensor of the model is filled, or all of them: the pieces, and the rules that made them.

        Raises:
            PlanError: the plan does not fill that key.
        """
        chosen = [entry for entry in self.entries if key is None or entry.key == key]
        if not chosen:
            near = get_close_matches(str(key)[:_MAX_NAME], [entry.key for entry in self.entries], 3, 0.6)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            missing = f"; missing keys: {some(self.missing_keys, SHOWN)}" if self.missing_keys else ""
            raise PlanError(f"the plan does not fill {str(key)[:_MAX_NAME]!r}{hint}{missing}")
        makers = makers_of(self.steps)
        return "\n".join(line for entry in chosen for line in _explained(entry, makers))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; the names are those of the attributes."""
        return {
            "file": self.file,
            "container": self.container,
            "format": self.format,
            "hub": self.hub,
            "evidence": list(self.evidence),
            "wrapper": self.wrapper,
            "other_wrappers": list(self.other_wrappers),
            "prefixes": list(self.prefixes),
            "parts": [{**part._asdict(), "towers": list(part.towers)} for part in self.parts],
            "layouts": {tower: list(chain) for tower, chain in self.layouts.items()},
            "loaded": self.loaded,
            "resized": self.resized,
            "filled": self.filled,
            "cast": self.cast,
            "dropped": dict(self.dropped),
            "missing_keys": list(self.missing_keys),
            "unexpected_keys": list(self.unexpected_keys),
            "mismatched": dict(self.mismatched),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "unverified": list(self.unverified),
            "settings": [row._asdict() for row in self.settings],
        }

    def __repr__(self) -> str:
        missing, unexpected = len(self.missing_keys), len(self.unexpected_keys)
        return (
            f"<Plan of {printable(self.file)}: format {self.format}, {len(self.entries)} tensors, {missing} missing, "
            f"{unexpected} unexpected; print() shows it>"
        )

    def __str__(self) -> str:
        lines = [f"{self.file}: format {self.format} ({self.container}), {self.title}"]
        lines += (f"  {line}" for line in (*self._source_lines(), *self._tensor_lines(), *self._remark_lines()))
        return "\n".join(map(printable, lines))

    def _source_lines(self) -> Iterator[str]:
        """What was unwrapped, stripped and converted."""
        if self.wrapper:
            yield f"wrapper: {self.wrapper}"
        for part in self.parts if len(self.parts) > 1 else ():
            place = f"under {part.prefix!r}" if part.prefix else "at the top level"
            names = " and ".join(tower or "further modules" for tower in part.towers)
            yield f"{names}: {part.format}, {place}"
        if self.other_wrappers:
            yield f"not loaded: {', '.join(map(repr, self.other_wrappers))} (choose with wrapper=)"
        if self.prefixes:
            yield f"stripped prefixes: {' '.join(self.prefixes)}"
        for tower, chain in self.layouts.items():
            if len(chain) > 1:
                yield f"converted: {tower} tower, layout {' -> '.join(chain)}"

    def _tensor_lines(self) -> Iterator[str]:
        """The lines on tensors."""
        loaded = self.loaded
        counts = ", ".join(f"{tower or 'other'} {n}" for tower, n in loaded.items())
        yield f"loaded: {count_of(sum(loaded.values()), 'tensor')}" + (f" ({counts})" if counts else "")
        yield from (f"resized: {key} from {how}" for key, how in self.resized.items())
        yield from (f"filled: {key} {how}" for key, how in self.filled.items())
        yield from (f"cast: {count_of(count, 'tensor')} from {pair}" for pair, count in self.cast.items())
        yield from (f"ignored: {some(keys)}: {why}" for why, keys in by_reason(self.dropped).items())
        if self.missing_keys:
            yield f"missing: {count_of(len(self.missing_keys), 'key')}, left unchanged: {some(self.missing_keys)}"
        if self.unexpected_keys:
            yield f"unexpected: {count_of(len(self.unexpected_keys), 'key')}, not used: {some(self.unexpected_keys)}"
        yield from (f"mismatch: {key}: {why}" for key, why in self.mismatched.items())

    def _remark_lines(self) -> Iterator[str]:
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"warning: {warning}" for warning in self.warnings)
        if self.unverified:
            yield f"not verified (settings that the weights do not show): {'; '.join(self.unverified)}"


def without_failed(plan: Plan, failed: Iterable[Check]) -> Plan:
    """The plan without the tensors whose checks failed: their entries go, and their keys are unexpected."""
    layouts = {id(check.layout) for check in failed}
    keys = [source for check in failed for source in check.layout.sources]
    return replace(
        plan,
        entries=tuple(entry for entry in plan.entries if id(entry.layout) not in layouts),
        unexpected_keys=(*plan.unexpected_keys, *keys),
        dropped={key: why for key, why in plan.dropped.items() if key not in keys},
    )


def makers_of(steps: Iterable[Step]) -> dict[str, list[Step]]:
    """The steps by the key that they make."""
    makers: dict[str, list[Step]] = {}
    for step in steps:
        makers.setdefault(step[2], []).append(step)
    return makers


def steps_to(key: str, makers: Mapping[str, Sequence[Step]]) -> Iterator[Step]:
    """The applications of rules that lead to a key, the last one first; each once."""
    waiting, seen = [key], set()
    while waiting:
        for step in makers.get(waiting.pop(), ()):
            if step not in seen:
                seen.add(step)
                yield step
                waiting += step[1]


def _explained(entry: Entry, makers: Mapping[str, list[Step]]) -> Iterator[str]:
    """The lines of one entry; ``makers`` are the steps by the key that they make."""
    yield f"{entry.key} {list(entry.shape)} {dtype_name(entry.dtype)}"
    if entry.filled:
        yield f"  filled {entry.filled}"
    elif entry.layout.copied_whole:
        yield f"  copied from {entry.layout.pieces[0].source}"
    else:
        yield from (f"  {_piece_in_words(piece)}" for piece in entry.layout.pieces)
    if entry.resize is not None:
        yield f"  resized from {entry.resize}"
    for rule, _, _ in steps_to(entry.key, makers):
        yield f"  by rule {rule.text} ({rule.place})"


def _piece_in_words(piece: Piece) -> str:
    """Which elements go where; offsets and strides count elements."""
    contiguous = piece.source_strides == piece.target_strides == (1,)
    amount = f"{piece.numel} elements" if contiguous else f"elements {list(piece.shape)}"
    target = f"offset {piece.target_offset}" + ("" if contiguous else f" and strides {list(piece.target_strides)}")
    if piece.source is None:
        return f"{'adds' if piece.add else 'writes'} {piece.term:g} to {amount} at {target}"
    source = f"offset {piece.source_offset}" + ("" if contiguous else f" and strides {list(piece.source_strides)}")
    return f"{'adds' if piece.add else 'copies'} {amount} of {piece.source} at {source} to {target}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
