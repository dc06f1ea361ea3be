"""The plan of a load: made from names, shapes and dtypes alone, before a byte of weights is read.

Every key, shape and dtype is settled here. What a plan does not refuse cannot fail later for a reason that
could have been seen before, apart from the few values that `verify` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from keymap.errors import SHOWN, PlanError, some
from keymap.language.layout import Layout, Piece
from keymap.language.rules import Check, Step
from keymap.plan.resize import Resize

__all__ = ["Entry", "Plan", "Request", "checked_facts", "dtype_name"]


class Entry(NamedTuple):
    """One tensor of the model: what fills it.

    Attributes:
        key, tower: in the model.
        layout: the pieces, at the source's size.
        shape, dtype: of the model's tensor.
        resize: how the position embedding is resampled, or None.
        casts: conversions of dtype that its sources need, as ``float16 to float32``.
        filled: where a constant stands in for a key that the file has not: with what, and why. Else empty.
    """

    key: str
    tower: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype
    resize: Resize | None = None
    filled: str = ""
    casts: tuple[str, ...] = ()


def checked_facts(facts: object) -> Mapping[str, int]:
    """What the caller tells of a source or a target; empty for None.

    Raises:
        PlanError: it is anything but names and positive numbers.
    """
    if facts is None:
        return {}
    if isinstance(facts, Mapping) and all(
        isinstance(name, str) and type(value) is int and value > 0 for name, value in facts.items()
    ):
        return facts
    raise PlanError(f"facts={facts!r}: give names and positive numbers, as {{'image.heads': 12}}")


class Request(NamedTuple):
    """What the caller asked for."""

    file: str
    strict: bool = True
    towers: tuple[str, ...] | None = None
    source_grid: tuple[int, int] | None = None
    facts: Mapping[str, int] = {}


@dataclass(frozen=True)
class Plan:
    """What a load will do.

    Attributes:
        file, container: the checkpoint.
        format, evidence: its format, and the keys that told it.
        wrapper, prefixes: what was taken off; ``other_wrappers`` were in the file too and not taken.
        layouts: for each tower of the file the layouts that it went through.
        entries: one for each tensor of the model that will be written.
        checks: values to be seen before anything is written.
        dropped: source keys without weights, and why.
        missing_keys: the model's keys that nothing fills; empty under strict.
        unexpected_keys: the file's keys that nothing uses; empty under strict.
        mismatched: model keys whose tensor in the file does not fit, and why; empty under strict.
        notes: what else a reader should know.
        warnings: where the source's configuration and the model differ in what no weight tells.
        unverified: what no weight tells, and the source does not say either.
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

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The plan's pieces; those of a resized tensor are at the source's size."""
        return tuple(p._replace(target=entry.key) for entry in self.entries for p in entry.layout.pieces)

    @property
    def resized(self) -> dict[str, str]:
        return {entry.key: str(entry.resize) for entry in self.entries if entry.resize is not None}

    @property
    def filled(self) -> dict[str, str]:
        return {entry.key: entry.filled for entry in self.entries if entry.filled}

    @property
    def cast(self) -> dict[str, int]:
        """Conversions of dtype, and how many tensors each concerns."""
        return dict(Counter(pair for entry in self.entries for pair in entry.casts))

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
            raise KeyError(f"the plan fills no {key!r}; it leaves {', '.join(self.missing_keys[:SHOWN]) or 'none'}")
        makers: dict[str, list[Step]] = {}
        for step in self.steps:
            makers.setdefault(step[2], []).append(step)
        lines = []
        for entry in chosen:
            lines.append(f"{entry.key} {list(entry.shape)} {dtype_name(entry.dtype)}")
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
                        rule, sources, _ = step
                        lines.append(f"  by {rule.text} ({rule.place})")
                        wanted += sources
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
        }

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.format} ({self.container}), {self.title}"]
        if self.wrapper:
            lines.append(f"  wrapper: {self.wrapper}")
        if self.other_wrappers:
            lines.append(
                f"  also in the file, not taken: {', '.join(map(repr, self.other_wrappers))} (choose with wrapper=)"
            )
        if self.prefixes:
            lines.append(f"  prefixes cut: {' '.join(self.prefixes)}")
        for tower, chain in self.layouts.items():
            if len(chain) > 1:
                lines.append(f"  {tower} tower bridged: {' -> '.join(chain)}")
        counts = ", ".join(f"{tower} {n}" for tower, n in self.loaded.items())
        lines.append(f"  loaded: {sum(self.loaded.values())} tensors ({counts})")
        lines += [f"  resized {key}: {how}" for key, how in self.resized.items()]
        lines += [f"  filled {key}: {why}" for key, why in self.filled.items()]
        lines += [f"  cast {count} tensors {pair}" for pair, count in self.cast.items()]
        by_reason: dict[str, list[str]] = {}
        for key, why in self.dropped.items():
            by_reason.setdefault(why, []).append(key)
        lines += [f"  dropped {some(keys)}: {why}" for why, keys in by_reason.items()]
        if self.missing_keys:
            lines.append(f"  missing, left as they were: {some(self.missing_keys)}")
        if self.unexpected_keys:
            lines.append(f"  unexpected, not used: {some(self.unexpected_keys)}")
        lines += [f"  does not fit: {key}: {why}" for key, why in self.mismatched.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        if self.unverified:
            lines.append(f"  not verifiable from this file: {'; '.join(self.unverified)}")
        return "\n".join(lines)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
