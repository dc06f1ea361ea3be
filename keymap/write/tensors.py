"""The tensors of a conversion, one at a time, as they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import PlanError
from keymap.load.casts import check_cast
from keymap.load.copying import materialise
from keymap.load.direct import stored_at
from keymap.plan.export import Export, Target
from keymap.plan.plan import dtype_name
from keymap.plan.twins import same_elements
from keymap.read import LazyTensor, SourceFile

__all__ = ["Item", "bytes_of_item", "items_of", "parse_dtype"]

_FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

_BUFFER = 1 << 19  # bytes that are read and written at a time
_BLOCK = 1 << 20  # elements that are cast and written at a time


class Item(NamedTuple):
    """A tensor to write.

    Attributes:
        target: what it is made of.
        dtype: as it is written.
        elements: equal for tensors that are made of the same memory in the same way, as tied weights are.
    """

    target: Target
    dtype: torch.dtype
    elements: object

    @property
    def nbytes(self) -> int:
        return prod(self.target.shape) * self.dtype.itemsize


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from its name, for example ``float16``.

    Raises:
        PlanError: it is not one of those that checkpoints have.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in _FLOATS:
        names = ", ".join(map(dtype_name, _FLOATS))
        raise PlanError(f"dtype={dtype!r}: expected the name of a floating dtype, one of {names}")
    return found


def items_of(export: Export, dtype: torch.dtype | None) -> dict[str, Item]:
    """What is written, by key; ``dtype`` replaces that of floating tensors."""
    names = same_elements(export.source.unwrapped.tensors)
    items = {}
    for key, target in export.tensors.items():
        chosen = dtype if dtype is not None and target.dtype.is_floating_point else target.dtype
        pieces = tuple(
            piece._replace(source=names[piece.source]) if piece.source is not None else piece
            for piece in target.layout.pieces
        )
        items[key] = Item(target, chosen, (pieces, target.shape, chosen) if prod(target.shape) else key)
    return items


def _value_of(item: Item, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    """The values of a tensor in a row on the CPU, before its dtype is cast."""
    layout = item.target.layout

    def read(name: str) -> torch.Tensor:
        return tensors[name].read().to("cpu")

    whole = read(layout.sources[0]) if layout.copied_whole else None
    if whole is not None and whole.numel() == layout.pieces[0].numel:
        return whole.reshape(-1)
    return materialise(layout, read).reshape(-1)


def bytes_of_item(key: str, item: Item, tensors: Mapping[str, LazyTensor]) -> Iterator[memoryview]:
    """The bytes of a tensor, in parts that are valid until the next one is asked for.

    Bytes that are written as they lie in the file are read into one small buffer, again and again: it stays in the
    processor's cache, and no page of a mapping is touched.

    Raises:
        VerifyError: a value does not fit the dtype that is written.
        CheckpointError: the file was written to after it was opened.
    """
    spans = _spans_of(item, tensors)
    if not spans:
        value = _value_of(item, tensors)
        advice = f"pass dtype={dtype_name(value.dtype)!r}" if item.dtype != item.target.dtype else ""
        check_cast(key, value, item.dtype, advice)
        for block in torch.split(value, _BLOCK):  # in another dtype it is never whole
            yield raw_bytes(block.to(item.dtype).contiguous())
        return
    buffer = memoryview(bytearray(min(_BUFFER, max(size for _, _, size in spans))))
    for file, start, size in spans:
        file.check_unchanged()
        for at in range(0, size, _BUFFER):
            part = buffer[: min(_BUFFER, size - at)]
            file.read_into([part], start + at)
            yield part


def _spans_of(item: Item, tensors: Mapping[str, LazyTensor]) -> list[tuple[SourceFile, int, int]]:
    """Where the bytes of a tensor lie in files, if all of them are written as they lie there; else an empty list.

    Each is a file, the first byte and the number of bytes; in the order of the tensor, as of joined tensors.
    """
    spans, end = list[tuple[SourceFile, int, int]](), 0
    for piece in sorted(item.target.layout.pieces, key=lambda piece: piece.target_offset):
        if piece.source is None or piece.computed or piece.target_offset * item.dtype.itemsize != end:
            return []
        stored = stored_at(piece, tensors[piece.source], item.dtype)
        if stored is None:
            return []
        spans.append(stored)
        end += stored[2]
    return spans if end == item.nbytes else []


def raw_bytes(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = value.view(torch.uint8).numpy().data
    return view
