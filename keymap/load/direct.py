"""Bytes that are the same in the file and in the model: the system reads them directly into the model's memory.

One call fills many small tensors; large ones are shared out over threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import c_char
from typing import NamedTuple

import torch

from keymap.language.layout import Piece
from keymap.read import LazyTensor, SourceFile

__all__ = ["Batch", "ByteRange", "batches", "byte_range", "can_read_into", "read_batch", "stored_at"]

_MAX_BATCH = 1 << 24  # bytes that one call reads
_MAX_BUFFERS = 256  # buffers that one call fills; systems allow at least 1024 on Linux
_MAX_GAP = 1 << 12  # bytes between two tensors that are read and thrown away
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)  # a subclass may hold its elements elsewhere
_thrown_away = memoryview(bytearray(_MAX_GAP))


class ByteRange(NamedTuple):
    """Contiguous bytes of a file that are contiguous in a tensor of the model, too.

    Attributes:
        file: the file.
        start: its first byte.
        size: how many bytes.
        target: a tensor of the model, contiguous.
        target_start: the first byte in the target.
    """

    file: SourceFile
    start: int
    size: int
    target: torch.Tensor
    target_start: int

    @property
    def memory(self) -> memoryview:
        """The target's memory for these bytes; it does not keep the target alive."""
        return memoryview((c_char * self.size).from_address(self.target.data_ptr() + self.target_start)).cast("B")


class Batch(NamedTuple):
    """Byte ranges that one call reads: from ``start`` on, into one buffer after the other.

    Attributes:
        file, start: the bytes of the file.
        buffers: the targets' memory.
        targets: kept alive until the batch is read.
        size: bytes of the file that are read.
        nbytes: those of them that are kept.
    """

    file: SourceFile
    start: int
    buffers: list[memoryview]
    targets: list[torch.Tensor]
    size: int
    nbytes: int


def can_read_into(target: torch.Tensor) -> bool:
    """True where the system can read into a tensor's memory."""
    return target.is_cpu and type(target) in _PLAIN_TYPES


def stored_at(piece: Piece, lazy: LazyTensor, dtype: torch.dtype) -> tuple[SourceFile, int, int] | None:
    """The file, the first byte and the number of bytes of a piece that is used as it is stored; None for others.

    Args:
        piece: of one source, not computed.
        lazy: its source.
        dtype: of the target, in which the piece is contiguous, too.
    """
    block, size = lazy.contiguous_block, dtype.itemsize
    contiguous = piece.source_strides == piece.target_strides == (1,)
    same = lazy.dtype == dtype and dtype != torch.bool
    if block is None or not (contiguous and same):
        return None
    return block.file, block.start + piece.source_offset * size, piece.shape[0] * size


def byte_range(piece: Piece, lazy: LazyTensor, target: torch.Tensor) -> ByteRange | None:
    """The piece as a byte range; None where it needs another dtype, another order or another device.

    Args:
        piece: of one source, not computed.
        lazy: its source.
        target: contiguous.
    """
    stored = stored_at(piece, lazy, target.dtype)
    if stored is None or not can_read_into(target):
        return None
    return ByteRange(*stored, target, piece.target_offset * target.dtype.itemsize)


def batches(ranges: Iterable[ByteRange]) -> Iterator[Batch]:
    """All byte ranges in the order of their files; neighbours share a batch, large ones take several.

    Each batch is made when it is asked for, while those before it are being read.
    """
    file: SourceFile | None = None
    start, end, thrown_away = 0, 0, 0
    buffers, targets = list[memoryview](), list[torch.Tensor]()
    for one in sorted(ranges, key=lambda one: (id(one.file), one.start)):
        gap, at = one.start - end, 0
        if file is not None and (one.file is not file or not 0 <= gap <= _MAX_GAP or len(buffers) >= _MAX_BUFFERS):
            yield Batch(file, start, buffers, targets, end - start, end - start - thrown_away)
            file = None
        if file is None:
            file, start, end, buffers, targets, thrown_away = one.file, one.start, one.start, [], [], 0
        elif gap:
            buffers.append(_thrown_away[:gap])
            end += gap
            thrown_away += gap
        memory = one.memory
        targets.append(one.target)
        while at < one.size:
            part = memory[at : at + max(_MAX_BATCH - (end - start), 1)]
            buffers.append(part)
            at, end = at + len(part), end + len(part)
            if end - start >= _MAX_BATCH:
                yield Batch(file, start, buffers, targets, end - start, end - start - thrown_away)
                start, buffers, targets, thrown_away = end, [], [one.target], 0
    if file is not None and buffers:
        yield Batch(file, start, buffers, targets, end - start, end - start - thrown_away)


def read_batch(batch: Batch) -> None:
    """Fill the buffers; raises CheckpointError where the file ends too early."""
    batch.file.read_into(batch.buffers, batch.start)
