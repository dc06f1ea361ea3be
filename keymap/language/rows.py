"""Rows of axis 0 that a rule cuts off or adds: ``take: [0, text.vocab]``, and its inverse, ``pad: 64``."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from keymap.language.amounts import Amount, amount_in
from keymap.language.layout import Layout, cut, place, whole

__all__ = ["Rows", "padded", "taken"]

_MAX_MULTIPLES = 64  # of the padding that a file may have: Megatron pads to 128 rows for each of its devices
_MAX_PADDING = 8  # zeros, for each element that is there


class Rows(NamedTuple):
    """The rows that one side of a rule has, of those on the other side.

    Attributes:
        start, stop: the rows [start, stop); None for the end.
        multiple: the other side has rows of zeros after them, up to a multiple of this; 0 if there is no way back.
    """

    start: int
    stop: Amount | None
    multiple: int = 0

    def end(self, facts: Mapping[str, int]) -> int | None:
        """Where the rows end; None for the end of the tensor.

        Raises:
            ValueError: a fact is not known, or not positive.
        """
        return None if self.stop is None else amount_in(self.stop, facts)

    def padded(self, rows: int) -> int:
        """How many rows the other side has."""
        return -(-rows // self.multiple) * self.multiple if self.multiple else rows


def taken(layout: Layout, rows: Rows, facts: Mapping[str, int]) -> Layout:
    """These rows of a tensor.

    Raises:
        ValueError: they are not there, or a fact is not known; or the rows after them are more than padding can be.
    """
    start, stop = rows.start, rows.end(facts)
    total = layout.shape[0] if layout.shape else 0
    if start >= (total if stop is None else min(stop, total)) or (stop or 0) > total:
        raise ValueError(f"rows [{start}, {'end' if stop is None else stop}) do not exist in {list(layout.shape)}")
    left_out = total - (total if stop is None else stop)
    if rows.multiple and left_out and (total % rows.multiple or left_out >= _MAX_MULTIPLES * rows.multiple):
        raise ValueError(
            f"rows {stop} to {total - 1} of {list(layout.shape)} are no padding: with pad: {rows.multiple} there is "
            f"a multiple of {rows.multiple} rows, and fewer than {_MAX_MULTIPLES * rows.multiple} are padding; correct "
            f"{rows.stop}, or take another file"
        )
    return cut(layout, 0, start, total if stop is None else stop)


def padded(layout: Layout, rows: Rows, facts: Mapping[str, int]) -> Layout:
    """A tensor with rows of zeros at its end, up to the next multiple.

    Raises:
        ValueError: the tensor has no rows, or it has another number of them than a known fact says.
    """
    if not layout.shape or not layout.shape[0]:
        raise ValueError(f"pad: {list(layout.shape)} has no rows")
    have = layout.shape[0]
    known = isinstance(rows.stop, int) or (rows.stop is not None and rows.stop.fact in facts)
    if known and rows.end(facts) != have:
        raise ValueError(f"pad: there are {have} rows, and {rows.stop} is {rows.end(facts)}")
    total = rows.padded(have)
    row = prod(layout.shape[1:])
    zeros_before = sum(piece.numel for piece in layout.pieces if piece.source is None)  # of earlier rules
    if (total - have) * row + zeros_before > _MAX_PADDING * (have * row - zeros_before):
        raise ValueError(f"pad: {have} rows would get {total - have} rows of zeros")
    if total == have:
        return layout
    shape = (total, *layout.shape[1:])
    zeros = whole(None, (total - have, *layout.shape[1:]), layout.dtype)
    pieces = (*place(layout, shape, 0, 0), *(place(zeros, shape, 0, have) if prod(zeros.shape) else ()))
    return Layout(shape, layout.dtype, pieces)
