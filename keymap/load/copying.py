"""Copy pieces: strided copies from a source tensor to a destination tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch

from keymap.language.layout import Layout, Piece
from keymap.load.resample import resample
from keymap.plan.plan import Entry
from keymap.read import LazyTensor, SourceFile

__all__ = ["Read", "Tensors", "copy_pieces", "files_of", "materialise", "strided", "value_of"]

_BLOCK = 3 << 15  # elements that stay in a core's cache
Read = Callable[[str], torch.Tensor]
Tensors = Mapping[str, LazyTensor]


def files_of(tensors: Tensors) -> list[SourceFile]:
    """The files that tensors are mapped from, each once."""
    return list({id(region[0]): region[0] for lazy in tensors.values() if (region := lazy.region) is not None}.values())


def strided(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    """A view of a contiguous tensor by element offset and strides."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between views of one shape, dtype conversion included.

    Where the last axis is not the source's innermost, torch goes through all of the source for each row of the
    target. So it gets a few whole rows of the source at a time, as many as stay in a core's cache.
    """
    if source.numel() <= 2 * _BLOCK or source.stride(-1) == 1:
        target.copy_(source)
        return
    axis = max(range(source.ndim), key=lambda d: source.stride(d) if source.shape[d] > 1 else -1)
    length = source.shape[axis]
    step = max(1, _BLOCK * length // source.numel())
    for start in range(0, length, step):
        rows = axis, start, min(step, length - start)
        _copy(target.narrow(*rows), source.narrow(*rows))


def copy_pieces(pieces: Iterable[Piece], source: torch.Tensor | None, destination: torch.Tensor) -> None:
    """Copy plain and constant pieces into a contiguous destination; other pieces need `materialise`.

    Args:
        pieces: all from one source tensor, or constants.
        source: any strides; None for constants.
        destination: contiguous; a dtype conversion happens in the same pass.
    """
    for piece in pieces:
        target = strided(destination, piece.shape, piece.target_strides, piece.target_offset)
        if piece.source is None:
            target.fill_(piece.term)
            continue
        assert source is not None
        if not source.is_contiguous():
            source = source.contiguous()
        _copy(target, strided(source, piece.shape, piece.source_strides, piece.source_offset))


def _device(layout: Layout, read: Read) -> torch.device:
    """The device of a layout's first source, else the CPU; never torch's default device."""
    first = next((piece.source for piece in layout.pieces if piece.source is not None), None)
    return torch.device("cpu") if first is None else read(first).device


def materialise(layout: Layout, read: Read, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor that a layout describes, in new memory on the device of its first source.

    Args:
        layout: its pieces may compute (sums, factors).
        read: returns a source tensor by key.
        dtype: of the result; None keeps the layout's. Sums and factors are computed in float32 or better.
    """
    computes = any(p.add or p.factor != 1.0 or (p.term != 0.0 and p.source is not None) for p in layout.pieces)
    wide = dtype or layout.dtype
    if computes and wide.is_floating_point and wide != torch.float64:
        wide = torch.float32
    result = torch.empty(prod(layout.shape), dtype=wide, device=_device(layout, read))
    for piece in layout.pieces:
        target = strided(result, piece.shape, piece.target_strides, piece.target_offset)
        if piece.source is None:
            if piece.add:
                target.add_(piece.term)
            else:
                target.fill_(piece.term)
            continue
        source = read(piece.source)
        if not source.is_contiguous():
            source = source.contiguous()
        value = strided(source, piece.shape, piece.source_strides, piece.source_offset)
        if piece.factor != 1.0 or piece.term != 0.0:
            value = value.to(wide) * piece.factor + piece.term
        if piece.add:
            target.add_(value)
        else:
            _copy(target, value)
    return result.reshape(layout.shape).to(dtype or layout.dtype)


def value_of(entry: Entry, tensors: Tensors) -> torch.Tensor:
    """One tensor of the model in new memory, contiguous, with the model's shape and dtype."""
    dtype = None if entry.resize is not None else entry.dtype
    value = materialise(entry.layout, lambda key: tensors[key].read(), dtype)
    if entry.resize is not None:
        value = resample(value, entry.resize)
    return value.reshape(entry.shape).to(entry.dtype).contiguous()
