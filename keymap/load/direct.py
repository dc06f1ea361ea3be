"""Bytes that a file and a model have in common: the system reads them straight into the model's memory.

One call fills many small tensors, and large ones are shared out over threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import c_char
from typing import NamedTuple

import torch

from keymap.language.layout import Piece
from keymap.read import LazyTensor, SourceFile

__all__ = ["Batch", "Run", "batches", "fillable", "read", "run_of"]

_BATCH = 1 << 24  # bytes that one call reads
_BUFFERS = 256  # places that one call fills; systems allow at least 1024 on Linux
_GAP = 1 << 12  # bytes between two tensors that are read and thrown away
_OWN = (torch.Tensor, torch.nn.Parameter)  # what has its elements in memory of its own; a subclass need not
_scratch = memoryview(bytearray(_GAP))


class Run(NamedTuple):
    """Neighbouring bytes of a file, ``size`` of them from ``start`` on, that are neighbours in a tensor too.

    Attributes:
        target: a tensor of the model, contiguous.
        first: which of its bytes is the first of these.
    """

    file: SourceFile
    start: int
    size: int
    target: torch.Tensor
    first: int

    @property
    def memory(self) -> memoryview:
        """Where the bytes go; it does not keep the target alive."""
        return memoryview((c_char * self.size).from_address(self.target.data_ptr() + self.first)).cast("B")


class Batch(NamedTuple):
    """Runs that one call reads: from ``start`` on, into one place after the other.

    Attributes:
        places: the targets' memory.
        targets: which are kept alive.
    """

    file: SourceFile
    start: int
    places: list[memoryview]
    targets: list[torch.Tensor]
    size: int


def fillable(target: torch.Tensor) -> bool:
    """True where the system can read into a tensor's memory."""
    return target.is_cpu and type(target) in _OWN


def run_of(piece: Piece, lazy: LazyTensor, target: torch.Tensor) -> Run | None:
    """The piece as a run, or None where more than bytes must be moved: other dtypes, other orders, other devices.

    Args:
        piece: of one source, not computed.
        lazy: its source.
        target: contiguous.
    """
    block, dtype = lazy.contiguous_block, lazy.dtype
    one = piece.source_strides == piece.target_strides == (1,)
    same = dtype == target.dtype and dtype != torch.bool
    if block is None or not (one and same and fillable(target)):
        return None
    size = dtype.itemsize
    start, first = block.start + piece.source_offset * size, piece.target_offset * size
    return Run(block.file, start, piece.shape[0] * size, target, first)


def batches(runs: Iterable[Run]) -> Iterator[Batch]:
    """All runs in the order of their files, as many at a time as lie close together; large ones in several batches.

    Each batch is made when it is asked for, while those before it are being read.
    """
    file: SourceFile | None = None
    start, end = 0, 0
    places, targets = list[memoryview](), list[torch.Tensor]()
    for run in sorted(runs, key=lambda run: (id(run.file), run.start)):
        gap, at = run.start - end, 0
        if file is not None and (run.file is not file or not 0 <= gap <= _GAP or len(places) >= _BUFFERS):
            yield Batch(file, start, places, targets, end - start)
            file = None
        if file is None:
            file, start, end, places, targets = run.file, run.start, run.start, [], []
        elif gap:
            places.append(_scratch[:gap])
            end += gap
        memory = run.memory
        targets.append(run.target)
        while at < run.size:
            part = memory[at : at + max(_BATCH - (end - start), 1)]
            places.append(part)
            at, end = at + len(part), end + len(part)
            if end - start >= _BATCH:
                yield Batch(file, start, places, targets, end - start)
                start, places, targets = end, [], [run.target]
    if file is not None and places:
        yield Batch(file, start, places, targets, end - start)


def read(batch: Batch) -> None:
    """Fill the places; raises CheckpointError where the file ends before they are full."""
    batch.file.values_read = True
    batch.file.read_into(batch.places, batch.start)
