"""The arithmetic of a rule: times a number or the root of a length, plus a number; and its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from keymap.language.layout import Layout

__all__ = ["Scale"]


class Scale(NamedTuple):
    """``x * factor + term``; or, with ``undo``, ``(x - term) / factor``.

    Attributes:
        factor, term: numbers.
        root: the axis whose length's square root the factor is multiplied by, of the tensor after a join.
        undo: the inverse.
    """

    factor: float = 1.0
    term: float = 0.0
    root: int | None = None
    undo: bool = False

    def inverse(self) -> Scale:
        return self._replace(undo=not self.undo)

    def _numbers(self, shape: Sequence[int]) -> tuple[float, float]:
        factor = self.factor
        if self.root is not None:
            if self.root >= len(shape) or not shape[self.root]:
                raise ValueError(f"axis {self.root} of {list(shape)} does not exist or is empty")
            factor *= shape[self.root] ** 0.5
        return (1 / factor, -self.term / factor) if self.undo else (factor, self.term)

    def apply(self, layout: Layout) -> Layout:
        """A tensor of the computed values.

        Raises:
            ValueError: there is no axis ``root``.
        """
        factor, term = self._numbers(layout.shape)
        pieces = tuple(
            p._replace(factor=p.factor * factor, term=p.term * factor + (0.0 if p.add else term)) for p in layout.pieces
        )
        return layout._replace(pieces=pieces)
