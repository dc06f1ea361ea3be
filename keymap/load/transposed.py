"""Large pieces whose elements change their order: a few rows of the file at a time.

The system reads the rows into a buffer of the thread, which stays in the processor's cache, and from there they are
written to the target. In the buffer the rows are a little apart: at distances of whole pages they would evict each
other from the cache. As in `direct.py` the file is not mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy
import torch

from keymap.language.layout import Piece
from keymap.load.copying import strided
from keymap.load.direct import can_read_into
from keymap.read import LazyTensor, SourceFile

__all__ = ["Scratch", "Strip", "copy_strip", "strip_batches", "strips_of"]

_MAX_STRIP = 1 << 24  # bytes of a strip
_MAX_BUFFER = 3 << 20  # bytes of a thread's buffer; those of all threads together have at most eight times as many
_MAX_ROWS = 256  # rows at a time: of each, a cache line is in use while a column is written
_WIDE_ROW = 1 << 10  # bytes from which on a row is read to a place apart from the others
_ROW_GAP = 64  # bytes between such rows
_MIN_ELEMENTS = 1 << 14  # of a piece that is worth a thread
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Strip(NamedTuple):
    """Rows of a piece that follow each other in the file.

    Attributes:
        file: the file.
        start: the byte where row 0 of the piece begins.
        dtype: of the file's elements.
        piece: of one source, not computed.
        target: the tensor that is written, contiguous.
        axis: the axis of the piece whose steps are the rows.
        span: elements of the file from a row's first to its last, both counted.
        first, last: the rows of this strip, ``last`` excluded.
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
    def written(self) -> int:
        """Bytes of the target that are written."""
        rows = self.last - self.first
        return self.piece.numel // self.piece.shape[self.axis] * rows * self.target.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return (self.last - self.first) * self.piece.source_strides[self.axis] * self.dtype.itemsize


class Scratch(threading.local):
    """A buffer for each thread, kept from strip to strip: to allocate memory takes longer than to fill it."""

    def __init__(self) -> None:
        self.memory = numpy.empty(0, numpy.uint8)

    def buffer(self, nbytes: int) -> numpy.ndarray:
        """That many bytes; the values are arbitrary."""
        if len(self.memory) < nbytes:
            self.memory = numpy.empty(nbytes, numpy.uint8)
        return self.memory[:nbytes]


def _buffer_size() -> int:
    """Bytes that the buffer of each thread may have."""
    return min(_MAX_BUFFER, 8 * _MAX_BUFFER // torch.get_num_threads())


def strips_of(piece: Piece, lazy: LazyTensor, target: torch.Tensor) -> list[Strip]:
    """The piece in strips of some megabytes; empty where it is small, keeps its order, or cannot be read by rows.

    Args:
        piece: of one source, not computed.
        lazy: its source.
        target: contiguous.
    """
    block, strides = lazy.contiguous_block, piece.source_strides
    if block is None or strides[-1] == 1 or piece.numel <= _MIN_ELEMENTS or not can_read_into(target):
        return []
    axis = max(range(len(strides)), key=lambda d: strides[d] if piece.shape[d] > 1 else 0)
    span = 1 + sum((n - 1) * s for d, (n, s) in enumerate(zip(piece.shape, strides, strict=True)) if d != axis)
    interleaved, huge = strides[axis] < span, strides[axis] * lazy.dtype.itemsize > _buffer_size()
    if interleaved or huge:
        return []
    size, length = lazy.dtype.itemsize, piece.shape[axis]
    start = block.start + piece.source_offset * size
    rows = max(1, _MAX_STRIP // (strides[axis] * size))
    return [
        Strip(block.file, start, lazy.dtype, piece, target, axis, span, first, min(first + rows, length))
        for first in range(0, length, rows)
    ]


def strip_batches(strips: Iterable[Strip]) -> Iterator[list[Strip]]:
    """Strips in the order of their files, in batches of some megabytes."""
    batch: list[Strip] = []
    size = 0
    for strip in sorted(strips, key=lambda s: (id(s.file), s.start, s.first)):
        batch.append(strip)
        size += strip.nbytes
        if size >= _MAX_STRIP // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def copy_strip(strip: Strip, scratch: Scratch) -> None:
    """Read a strip and write it to its target; raises CheckpointError where the file ends too early."""
    piece, axis, size = strip.piece, strip.axis, strip.dtype.itemsize
    step, length = piece.source_strides[axis], strip.last - strip.first
    gap = _ROW_GAP // size if step * size >= _WIDE_ROW else 0
    pitch, row = step + gap, step * size
    most = max(1, min(_buffer_size() // (pitch * size), _MAX_ROWS))
    rows = -(-length // -(-length // most))  # equal shares: a few rows at the end would take as long as many
    memory = scratch.buffer(rows * pitch * size)
    shape, strides = list(piece.shape), list(piece.source_strides)
    shape[axis], strides[axis] = rows, pitch
    source = torch.from_numpy(memory).view(strip.dtype).as_strided(shape, strides)
    target = strided(strip.target.detach(), piece.shape, piece.target_strides, piece.target_offset)
    # numpy writes rows as columns twice as fast as torch, but it converts fewer dtypes
    same_dtype = strip.dtype == strip.target.dtype and strip.dtype != torch.bool
    bits = _INTEGERS.get(size) if same_dtype else None
    source_bits, target_bits = (t.view(bits).numpy() for t in (source, target)) if bits is not None else (None, None)
    view = memory.data
    places = [view[n * pitch * size : n * pitch * size + row] for n in range(rows)] if gap else []
    for at in range(strip.first, strip.last, rows):
        count = min(rows, strip.last - at)
        if gap:  # the file may end after the last row's last element
            buffers = [*places[: count - 1], places[count - 1][: strip.span * size]]
        else:
            buffers = [view[: (count - 1) * row + strip.span * size]]
        strip.file.read_into(buffers, strip.start + at * row)
        if source_bits is not None and target_bits is not None:
            before = (slice(None),) * axis
            numpy.copyto(target_bits[(*before, slice(at, at + count))], source_bits[(*before, slice(count))])
        else:
            target.narrow(axis, at, count).copy_(source.narrow(axis, 0, count))
