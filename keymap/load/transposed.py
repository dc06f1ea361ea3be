"""Large pieces whose elements change their order on the way: some rows of the file at a time.

The system reads the rows into memory of the thread's own, which stays in the processor's cache, and from there they
are written. Rows lie a little apart in it: at distances of whole pages, as those of a kernel are, they would push each
other out of the cache. As in `straight.py` nothing is mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy
import torch

from keymap.language.layout import Piece
from keymap.load.copying import strided
from keymap.load.direct import fillable
from keymap.read import LazyTensor, SourceFile

__all__ = ["Scratch", "Strip", "carry", "parts", "strips_of"]

_MAX_STRIP = 1 << 24  # bytes of a strip
_ROOM = 3 << 20  # bytes of a thread's own memory, and of all threads' together eight times as many
_ROWS = 256  # at a time: of each a line of the cache is held while a column is written
_WIDE = 1 << 10  # bytes of a row that is read to a place of its own
_APART = 64  # bytes between rows
_SMALL = 1 << 14  # elements of a piece that are not worth a thread
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Strip(NamedTuple):
    """Rows of a piece, which follow each other in the file.

    Attributes:
        file: where they lie.
        start: the byte where row 0 of the piece begins.
        dtype: of the file's elements.
        piece: of one source, not computed.
        target: the tensor that it goes to, contiguous.
        axis: of the piece, whose steps are the rows.
        span: elements of the file from a row's first to its last, both counted.
        first, last: which rows, the last not among them.
    """

    file: SourceFile
    start: int
    dtype: torch.dtype
    piece: Piece
    target: torch.Tensor
    axis: int
    span: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return (self.last - self.first) * self.piece.source_strides[self.axis] * self.dtype.itemsize


class Scratch(threading.local):
    """Memory of each thread's own, kept from strip to strip: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self.memory = numpy.empty(0, numpy.uint8)

    def take(self, nbytes: int) -> numpy.ndarray:
        if len(self.memory) < nbytes:
            self.memory = numpy.empty(nbytes, numpy.uint8)
        return self.memory[:nbytes]


def _room() -> int:
    """Bytes that each thread may take."""
    return min(_ROOM, 8 * _ROOM // torch.get_num_threads())


def strips_of(piece: Piece, lazy: LazyTensor, target: torch.Tensor) -> list[Strip]:
    """The piece in strips of some megabytes; none where it is small or keeps its order, or cannot be read so.

    Args:
        piece: of one source, not computed.
        lazy: its source.
        target: contiguous.
    """
    block, strides = lazy.contiguous_block, piece.source_strides
    if block is None or strides[-1] == 1 or piece.numel <= _SMALL or not fillable(target):
        return []
    axis = max(range(len(strides)), key=lambda d: strides[d] if piece.shape[d] > 1 else 0)
    span = 1 + sum((n - 1) * s for d, (n, s) in enumerate(zip(piece.shape, strides, strict=True)) if d != axis)
    if strides[axis] < span or strides[axis] * lazy.dtype.itemsize > _room():  # rows lie within each other, or are huge
        return []
    size, length = lazy.dtype.itemsize, piece.shape[axis]
    start = block.start + piece.source_offset * size
    rows = max(1, _MAX_STRIP // (strides[axis] * size))
    return [
        Strip(block.file, start, lazy.dtype, piece, target, axis, span, first, min(first + rows, length))
        for first in range(0, length, rows)
    ]


def parts(strips: Iterable[Strip]) -> Iterator[list[Strip]]:
    """Strips in the order of their files, as many at a time as have some megabytes together."""
    part: list[Strip] = []
    size = 0
    for strip in sorted(strips, key=lambda s: (id(s.file), s.start, s.first)):
        part.append(strip)
        size += strip.nbytes
        if size >= _MAX_STRIP // 2:
            yield part
            part, size = [], 0
    if part:
        yield part


def carry(strip: Strip, scratch: Scratch) -> None:
    """Read a strip, and write it to its target; raises CheckpointError where the file ends before."""
    piece, axis, size = strip.piece, strip.axis, strip.dtype.itemsize
    step, length = piece.source_strides[axis], strip.last - strip.first
    apart = _APART // size if step * size >= _WIDE else 0
    pitch, row = step + apart, step * size
    most = max(1, min(_room() // (pitch * size), _ROWS))
    rows = -(-length // -(-length // most))  # evenly: a few rows at the end would take as long as many
    memory = scratch.take(rows * pitch * size)
    shape, strides = list(piece.shape), list(piece.source_strides)
    shape[axis], strides[axis] = rows, pitch
    source = torch.from_numpy(memory).view(strip.dtype).as_strided(shape, strides)
    target = strided(strip.target.detach(), piece.shape, piece.target_strides, piece.target_offset)
    # numpy writes rows as columns twice as fast as torch, but it converts fewer dtypes
    alike = strip.dtype == strip.target.dtype and strip.dtype != torch.bool
    bits = _INTEGERS.get(size) if alike else None
    given, filled = (t.view(bits).numpy() for t in (source, target)) if bits is not None else (None, None)
    view = memory.data
    places = [view[n * pitch * size : n * pitch * size + row] for n in range(rows)] if apart else []
    strip.file.values_read = True
    for at in range(strip.first, strip.last, rows):
        count = min(rows, strip.last - at)
        if apart:  # beyond the last row's last element the file may end
            into = [*places[: count - 1], places[count - 1][: strip.span * size]]
        else:
            into = [view[: (count - 1) * row + strip.span * size]]
        strip.file.read_into(into, strip.start + at * row)
        if given is not None and filled is not None:
            before = (slice(None),) * axis
            numpy.copyto(filled[(*before, slice(at, at + count))], given[(*before, slice(count))])
        else:
            target.narrow(axis, at, count).copy_(source.narrow(axis, 0, count))
