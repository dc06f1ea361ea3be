"""Compare the values of two tensors of files, a block of elements after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, prod
from typing import NamedTuple

import torch

from keymap.language.layout import Layout, cut
from keymap.load.copying import materialise
from keymap.read import LazyTensor

__all__ = ["Gap", "Values", "compare_values"]

_BLOCK = 1 << 18  # elements that are read at a time
_PART = 1 << 15  # elements that are compared at a time: torch does so few on one thread, and they stay in the cache


class Gap(NamedTuple):
    """How far two tensors are apart.

    Attributes:
        differing: how many elements differ by more than the tolerance.
        largest: the largest |a - b|; infinite where one of the two is NaN, or one is infinite.
        at: the position of that element in the flat tensor.
        a, b: the two values there.
    """

    differing: int = 0
    largest: float = 0.0
    at: int = 0
    a: float | complex = 0.0
    b: float | complex = 0.0


@dataclass
class Values:
    """Reads the tensors of a file for one comparison after the other.

    Attributes:
        tensors: of the file.
    """

    tensors: Mapping[str, LazyTensor]
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _checked: set[int] = field(default_factory=set)

    def read(self, key: str) -> torch.Tensor:
        """A tensor, contiguous on the CPU; it is kept until `release`.

        Raises:
            CheckpointError: it is corrupt.
        """
        if key not in self._held:
            lazy = self.tensors[key]
            if lazy.region is not None and lazy.check is not None and id(lazy.values) not in self._checked:
                lazy.check()
                self._checked.add(id(lazy.values))
            self._held[key] = lazy.read().detach().to("cpu").contiguous()
        return self._held[key]

    def release(self) -> None:
        """Free the memory of what was read."""
        for key in self._held:
            region = self.tensors[key].region
            if region is not None:
                file, start, stop = region
                file.release_pages(start, stop)
        self._held.clear()

    def block(self, layout: Layout, start: int, stop: int) -> torch.Tensor:
        """The elements from ``start`` to ``stop`` of the flat tensor, contiguous.

        They are whole rows, unless the tensor is one of the file, element by element.
        """
        if layout.copied_whole and layout.dtype == self.tensors[layout.sources[0]].dtype:
            return self.read(layout.sources[0]).reshape(-1)[start:stop]
        if layout.shape and prod(layout.shape) != stop - start:
            row = prod(layout.shape[1:])
            layout = cut(layout, 0, start // row, stop // row)
        return materialise(layout, self.read).reshape(-1)


def compare_values(a: tuple[Values, Layout], b: tuple[Values, Layout], tolerance: float) -> Gap:
    """Compare two tensors of as many elements.

    Args:
        a, b: where to read, and what.
        tolerance: elements that are apart by no more than this are equal; integers must be the same.
    """
    gap = Gap()
    for start, stop in _blocks(a[1], b[1]):
        one, other = (values.block(layout, start, stop) for values, layout in (a, b))
        for at in range(0, stop - start, _PART):
            found = _compare(one[at : at + _PART], other[at : at + _PART], tolerance)
            differing = gap.differing + found.differing
            if found.largest > gap.largest:
                gap = found._replace(at=found.at + at + start)
            gap = gap._replace(differing=differing)
    for values, _ in (a, b):
        values.release()
    return gap


def _blocks(a: Layout, b: Layout) -> Iterator[tuple[int, int]]:
    """Ranges of elements: of any length where both tensors lie in their files as they are, else of whole rows."""
    count = prod(a.shape)
    row = 1
    if not (a.copied_whole and b.copied_whole):
        row = prod(a.shape[1:]) if a.shape == b.shape and a.shape else count
    step = max(_BLOCK // row, 1) * row if row else 1
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _alike(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which elements are equal; NaN equals NaN, in the real and in the imaginary part by itself."""
    if x.is_complex():
        return _alike(torch.view_as_real(x), torch.view_as_real(y)).all(-1)
    return (x == y) | ((x != x) & (y != y))


def _compare(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> Gap:
    if _same_bits(a, b):
        return Gap()
    both_exact = not any(x.is_floating_point() or x.is_complex() for x in (a, b))
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    same = _alike(x, y)
    if both_exact:
        same &= a.to(torch.int64) == b.to(torch.int64)  # float64 does not hold every integer
    elif not (a.is_floating_point() or a.is_complex()):
        same &= a.to(torch.int64) == y.real.to(torch.int64)
    elif not (b.is_floating_point() or b.is_complex()):
        same &= b.to(torch.int64) == x.real.to(torch.int64)
    gaps = (x - y).abs().masked_fill_(same, 0.0)
    gaps.nan_to_num_(inf, inf)
    if both_exact or not (a.is_floating_point() and b.is_floating_point()):
        gaps.masked_fill_(~same & (gaps == 0.0), 1.0)  # integers that float64 does not hold
    differing = int((~same if both_exact else gaps > tolerance).count_nonzero())
    largest, at = (value.item() for value in gaps.max(0))
    return Gap(differing, float(largest), int(at), x[int(at)].item(), y[int(at)].item())
