"""Where each element of a tensor comes from: strided pieces, and the operations that keep them strided.

A `Layout` describes a tensor that does not exist yet: a shape, a dtype and the pieces that fill it. Renaming,
permuting, regrouping, joining and cutting only rearrange pieces; no element is touched, so a plan made of them
needs no temporary tensor. Offsets and strides count elements, in the row-major order of the logical
tensor on either side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from typing import NamedTuple, Protocol

import torch

__all__ = ["Layout", "Piece", "Shaped", "cut", "join_runs", "permute", "place", "renamed", "row_major", "whole"]

_MAX_PIECES = 20_000  # of one tensor; where axes do not follow each other, it splits into its elements

_ONE = (1,)
_COPIED = (0, _ONE, 0, _ONE, "", 1.0, 0.0, False)  # of a piece that is one whole source, from its third field on
_tuple = tuple.__new__
Axis = tuple[int, int, int]  # length, stride in the source, stride in the target


class Shaped(Protocol):
    """Shape and dtype of a tensor whose values are not read: a layout, a tensor of a file, a tensor of a model."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Piece(NamedTuple):
    """These elements of one source tensor go to those of one target tensor.

    Attributes:
        source: key in the checkpoint; None for a constant.
        target: key in the destination; empty while the plan is being made.
        shape: lengths of the piece's axes, the same on both sides.
        source_offset, source_strides: in elements of the source, read in row-major order.
        target_offset, target_strides: in elements of the target, read in row-major order.
        factor, term: what is written is ``x * factor + term``; for a constant just ``term``.
        add: the elements are added to those of earlier pieces.
    """

    source: str | None
    shape: tuple[int, ...]
    source_offset: int
    source_strides: tuple[int, ...]
    target_offset: int
    target_strides: tuple[int, ...]
    target: str = ""
    factor: float = 1.0
    term: float = 0.0
    add: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def computed(self) -> bool:
        """True for anything but a plain copy of source elements."""
        return self.source is None or self.add or self.factor != 1.0 or self.term != 0.0

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(zip(self.shape, self.source_strides, self.target_strides, strict=True))


class Layout(NamedTuple):
    """A tensor as the pieces that will fill it.

    Attributes:
        shape, dtype: of the tensor at this point of the plan.
        pieces: they cover every element once, apart from those with ``add``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The checkpoint's keys that this tensor is made of, each once, in order."""
        return tuple(dict.fromkeys(p.source for p in self.pieces if p.source is not None))

    def named(self, key: str) -> tuple[str, ...]:
        """The sources; for a tensor without elements, which has no sources, the given key."""
        return self.sources or (key,)

    @property
    def copied_whole(self) -> bool:
        """True when the tensor is one source tensor, element by element, in order."""
        pieces = self.pieces
        return len(pieces) == 1 and pieces[0][2:] == _COPIED and pieces[0].source is not None


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of that shape."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _piece(like: Piece, axes: Iterable[Axis], source_offset: int, target_offset: int) -> Piece:
    """``like`` with other axes: outermost target stride first, contiguous neighbours joined into one."""
    ordered = sorted((a for a in axes if a[0] != 1), key=lambda a: -a[2])
    merged: list[Axis] = []
    for n, s, t in ordered:
        if merged and merged[-1][1] == n * s and merged[-1][2] == n * t:
            merged[-1] = (merged[-1][0] * n, s, t)
        else:
            merged.append((n, s, t))
    lengths, sources, targets = zip(*merged, strict=True) if merged else ((1,), (1,), (1,))
    return like._replace(
        shape=lengths,
        source_offset=source_offset,
        source_strides=sources,
        target_offset=target_offset,
        target_strides=targets,
    )


def whole(source: str | None, shape: Sequence[int], dtype: torch.dtype, constant: float = 0.0) -> Layout:
    """All of one source tensor, in order; with ``source=None`` a constant."""
    count = prod(shape)
    # Built with tuple.__new__, which takes half the time: every tensor of a file needs one.
    piece = _tuple(Piece, (source, (count,), 0, _ONE, 0, _ONE, "", 1.0, constant, False))
    return _tuple(Layout, (tuple(shape), dtype, (piece,) if count else ()))


def renamed(layout: Layout, names: Mapping[str, str | None]) -> Layout:
    """The same elements of other sources, by the names of those of ``layout``."""
    pieces = tuple([_tuple(Piece, (names[p[0]], *p[1:])) if p[0] is not None else p for p in layout.pieces])
    return Layout(layout.shape, layout.dtype, pieces)


class _Spread(NamedTuple):
    """A piece seen in the axes of its tensor: where it starts on each, and steps (length, source, axis, by)."""

    piece: Piece
    start: tuple[int, ...]
    steps: tuple[tuple[int, int, int, int], ...]


def _spread(piece: Piece, shape: Sequence[int]) -> Iterator[_Spread]:
    """Read a piece's target side in the axes of ``shape``; where it does not follow them, it is sliced."""
    strides = row_major(shape)
    start = []
    left = piece.target_offset
    for stride in strides:
        position, left = divmod(left, stride)
        start.append(position)
    steps: list[tuple[int, int, int, int]] = []
    reach = list(start)  # the highest position on each axis
    for n, s, t in piece.axes:
        while n > 1:
            axis = next(d for d, stride in enumerate(strides) if stride <= t and shape[d] > 1)
            by, uneven = divmod(t, strides[axis])
            room = -(-(shape[axis] - start[axis]) // by)
            if uneven or (n > room and (start[axis] >= by or shape[axis] % by or n % room)):
                yield from _slices(piece, shape)
                return
            step = min(n, room)
            steps.append((step, s, axis, by))
            reach[axis] += (step - 1) * by
            n, s, t = n // step, s * step, t * step
    if any(position >= length for position, length in zip(reach, shape, strict=True)):
        yield from _slices(piece, shape)
    else:
        yield _Spread(piece, tuple(start), tuple(steps))


def _slices(piece: Piece, shape: Sequence[int]) -> Iterator[_Spread]:
    """The piece as slices along its shortest axis."""
    number = min((k for k, n in enumerate(piece.shape) if n > 1), key=lambda k: piece.shape[k])
    others = [axis for k, axis in enumerate(piece.axes) if k != number]
    length, source_step, target_step = piece.axes[number]
    for i in range(length):
        source_offset = piece.source_offset + i * source_step
        yield from _spread(_piece(piece, others, source_offset, piece.target_offset + i * target_step), shape)


def _flatten(spread: _Spread, strides: Sequence[int], shift: int = 0) -> Piece:
    offset = shift + sum(p * s for p, s in zip(spread.start, strides, strict=True))
    axes = [(n, s, by * strides[axis]) for n, s, axis, by in spread.steps]
    return _piece(spread.piece, axes, spread.piece.source_offset, offset)


def _few(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """All pieces; raises ValueError where there are too many."""
    found = tuple(islice(pieces, _MAX_PIECES + 1))
    if len(found) > _MAX_PIECES:
        raise ValueError(f"the tensor splits into more than {_MAX_PIECES} pieces: its axes are not in order")
    return found


def permute(layout: Layout, shape: Sequence[int], order: Sequence[int], result: Sequence[int]) -> Layout:
    """Read the tensor as ``shape``, put its axes into ``order``, return it in the shape ``result``."""
    if list(order) == list(range(len(shape))):
        return layout._replace(shape=tuple(result))
    ordered = row_major([shape[d] for d in order])
    strides = [0] * len(shape)
    for stride, axis in zip(ordered, order, strict=True):
        strides[axis] = stride
    pieces = _few(_flatten(s, strides) for p in layout.pieces for s in _spread(p, shape))
    return layout._replace(shape=tuple(result), pieces=pieces)


def place(layout: Layout, shape: Sequence[int], axis: int, start: int) -> tuple[Piece, ...]:
    """The pieces of a tensor that becomes the slice from ``start`` on ``axis`` of a larger ``shape``."""
    strides = row_major(shape)
    shift = start * strides[axis]
    if all(n == 1 for n in layout.shape[:axis]):
        return tuple(p._replace(target_offset=p.target_offset + shift) for p in layout.pieces)
    return _few(_flatten(s, strides, shift) for p in layout.pieces for s in _spread(p, layout.shape))


def _clip(spread: _Spread, axis: int, start: int, stop: int) -> Iterator[_Spread]:
    """The elements of a piece whose position on ``axis`` lies in [start, stop)."""
    inner = [step for step in spread.steps if step[2] == axis]
    low = spread.start[axis]
    high = low + sum((n - 1) * by for n, _, _, by in inner)
    if low >= start and high < stop:
        yield spread
        return
    if low >= stop or high < start:
        return
    biggest = max(inner, key=lambda step: step[3])
    n, s, _, by = biggest
    others = tuple(step for step in spread.steps if step is not biggest)
    single = len(inner) == 1
    if single:  # one run along the axis: shorten it
        first = max(0, -(-(start - low) // by))
        last = min(n - 1, (stop - 1 - low) // by)
        if first > last:
            return
        moved = spread.piece._replace(source_offset=spread.piece.source_offset + first * s)
        at = tuple(p + first * by if d == axis else p for d, p in enumerate(spread.start))
        yield _Spread(moved, at, (*others, (last - first + 1, s, axis, by)))
        return
    for i in range(n):  # several steps share the axis: take the coarsest one apart
        moved = spread.piece._replace(source_offset=spread.piece.source_offset + i * s)
        at = tuple(p + i * by if d == axis else p for d, p in enumerate(spread.start))
        yield from _clip(_Spread(moved, at, others), axis, start, stop)


def cut(layout: Layout, axis: int, start: int, stop: int) -> Layout:
    """The slice from ``start`` to ``stop`` on ``axis``."""
    shape = tuple(stop - start if d == axis else n for d, n in enumerate(layout.shape))
    strides = row_major(shape)
    shift = -start * strides[axis]
    pieces = _few(
        _flatten(clipped, strides, shift)
        for p in layout.pieces
        for spread in _spread(p, layout.shape)
        for clipped in _clip(spread, axis, start, stop)
    )
    return layout._replace(shape=shape, pieces=pieces)


def join_runs(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Join neighbouring pieces that are contiguous in source and target; the order is the target's."""
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.add, p.target_offset)):
        last = done[-1] if done else None
        if last is not None and (last.source, last.factor, last.term, last.add) == (
            piece.source,
            piece.factor,
            piece.term,
            piece.add,
        ):
            gap = piece.target_offset - last.target_offset
            outer = last.target_strides[0] * last.shape[0]
            if (
                gap == outer
                and last.shape[1:] == piece.shape[1:]
                and last.source_strides == piece.source_strides
                and last.target_strides == piece.target_strides
                and piece.source_offset - last.source_offset == last.source_strides[0] * last.shape[0]
            ):
                lengths = (last.shape[0] + piece.shape[0], *last.shape[1:])
                done[-1] = last._replace(shape=lengths)
                continue
        done.append(piece)
    return tuple(done)
