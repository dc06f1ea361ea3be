"""The arithmetic of a rule: times a number or a root, or divided by a root, plus a number; and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from keymap.language.amounts import ByFact, amount_in, parse_amount
from keymap.language.layout import Layout

__all__ = ["Scale"]


class Scale(NamedTuple):
    """``x * factor + term``; or, with ``undo``, ``(x - term) / factor``.

    Attributes:
        factor, term: numbers.
        root: the axis whose length's square root the factor is multiplied by, of the tensor after a join; or a fact,
            whose square root it is multiplied by.
        divides: the factor is divided by the root.
        undo: the inverse.
    """

    factor: float = 1.0
    term: float = 0.0
    root: int | ByFact | None = None
    divides: bool = False
    undo: bool = False

    @staticmethod
    def of_root(written: str, term: float) -> Scale:
        """The arithmetic of ``sqrt 1``, ``1/sqrt 1``, ``sqrt text.width`` or ``1/sqrt text.width``, and of ``plus``."""
        name, _, of = written.partition(" ")
        root = int(of) if of.isdigit() else parse_amount(of)
        return Scale(term=term, root=root, divides=name.startswith("1/"))

    @property
    def fact(self) -> str:
        """The fact that the arithmetic needs, if it needs one."""
        return self.root.fact if isinstance(self.root, ByFact) else ""

    def inverse(self) -> Scale:
        return self._replace(undo=not self.undo)

    def _numbers(self, shape: Sequence[int], facts: Mapping[str, int]) -> tuple[float, float]:
        factor = self.factor
        if self.root is not None:
            if isinstance(self.root, ByFact):
                length = amount_in(self.root, facts)
            elif self.root >= len(shape) or not shape[self.root]:
                raise ValueError(f"axis {self.root} of {list(shape)} does not exist or is empty")
            else:
                length = shape[self.root]
            factor *= length ** (-0.5 if self.divides else 0.5)
        return (1 / factor, -self.term / factor) if self.undo else (factor, self.term)

    def apply(self, layout: Layout, facts: Mapping[str, int]) -> Layout:
        """A tensor of the computed values.

        Raises:
            ValueError: there is no axis ``root``, or the fact is not known, or not positive.
        """
        factor, term = self._numbers(layout.shape, facts)
        pieces = tuple(
            p._replace(factor=p.factor * factor, term=p.term * factor + (0.0 if p.add else term)) for p in layout.pieces
        )
        return layout._replace(pieces=pieces)
