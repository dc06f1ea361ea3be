"""Views: one einops-like pattern that regroups and permutes axes, ``d h k -> (h k) d``.

Every axis has a name; ``1`` is an axis of length one. An axis whose length cannot be inferred from the shape and the
declared sizes is an error; it never defaults to 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from keymap.language.layout import Layout, permute

__all__ = ["View", "ViewError", "parse_view"]

Group = tuple[str, ...]
_MAX_AXES = 16


class ViewError(ValueError):
    """A view that is written wrong, or that does not fit a shape; the message says what to write."""


class View(NamedTuple):
    """Left and right side as groups of axis names; a group is one dimension of the tensor."""

    left: tuple[Group, ...]
    right: tuple[Group, ...]

    def inverse(self) -> View:
        return View(self.right, self.left)

    def __str__(self) -> str:
        def side(groups: Sequence[Group]) -> str:
            return " ".join(g[0] if len(g) == 1 else "(" + " ".join(g) + ")" if g else "1" for g in groups)

        return f"{side(self.left)} -> {side(self.right)}"

    def bind(self, shape: Sequence[int], sizes: Mapping[str, int | str | None]) -> dict[str, int]:
        """The length of every axis, from the shape and the declared sizes.

        Args:
            shape: of the tensor, before the view.
            sizes: for an axis a number, another axis of equal length, or a fact whose value is not known.

        Raises:
            ViewError: a length cannot be inferred, two lengths contradict each other, or one does not divide.
        """
        if len(shape) != len(self.left):
            raise ViewError(f"view '{self}' needs {len(self.left)} axes, the tensor is {list(shape)}")
        bound: dict[str, int] = {}
        todo = list(zip(self.left, shape, strict=True))
        while todo:
            rest = [pair for pair in todo if not self._bind_group(*pair, sizes, bound)]
            changed = len(rest) < len(todo)
            changed = self._bind_equals(sizes, bound) or changed
            if not changed:
                square = _square(rest, sizes, bound)
                if square is None:
                    raise ViewError(self._unbound(shape, rest, sizes, bound))
                bound.update(square)
            todo = rest
        for name, size in sizes.items():
            declared = bound.get(size) if isinstance(size, str) else size
            if name in bound and declared is not None and bound[name] != declared:
                raise ViewError(f"view '{self}' on {list(shape)}: {name} is {bound[name]}, declared {declared}")
        return bound

    def _bind_group(
        self, group: Group, length: int, sizes: Mapping[str, int | str | None], bound: dict[str, int]
    ) -> bool:
        """Bind the axes of a group of this length; False where two or more of them are still free."""
        free = []
        for name in group:
            size = sizes.get(name)
            if name in bound:
                continue
            if len(group) > 1 and isinstance(size, int):
                bound[name] = size
            else:
                free.append(name)
        if len(free) > 1:
            return False
        taken = prod(bound[name] for name in group if name not in free)
        if free and taken and length % taken == 0:
            bound[free[0]] = length // taken
        elif free or taken != length:
            parts = ", ".join(f"{n}={bound[n]}" for n in group if n in bound) or "1"
            raise ViewError(f"view '{self}': an axis of length {length} cannot be ({' '.join(group)}) with {parts}")
        return True

    def _bind_equals(self, sizes: Mapping[str, int | str | None], bound: dict[str, int]) -> bool:
        """Bind axes that are declared as long as one whose length is known; True where there was one."""
        names = {name for group in self.left for name in group}
        pairs = [(one, two) for one, two in sizes.items() if isinstance(two, str) and one in names and two in names]
        before = len(bound)
        for one, two in (*pairs, *((two, one) for one, two in pairs)):
            if one in bound:
                bound.setdefault(two, bound[one])
        return len(bound) > before

    def _unbound(
        self,
        shape: Sequence[int],
        rest: Sequence[tuple[Group, int]],
        sizes: Mapping[str, int | str | None],
        bound: Mapping[str, int],
    ) -> str:
        """Which axes have no length, and the facts that would give it."""
        free = sorted({name for group, _ in rest for name in group if name not in bound})
        facts = dict.fromkeys(size for name in free if isinstance(size := sizes.get(name), str) and "." in size)
        given = ", ".join(f"{fact!r}: ..." for fact in facts)
        hint = f": pass facts={{{given}}}" if facts else "; give one of them under `sizes`"
        return f"view '{self}' on {list(shape)}: cannot infer axes {' and '.join(free)}{hint}"

    def apply(self, layout: Layout, sizes: Mapping[str, int | str | None]) -> Layout:
        """The layout with its axes regrouped and permuted; no element moves.

        Raises:
            ViewError: as `bind`.
        """
        bound = self.bind(layout.shape, sizes)
        before = [name for group in self.left for name in group]
        after = [name for group in self.right for name in group]
        order = [before.index(name) for name in after]
        result = [prod(bound[name] for name in group) for group in self.right]
        return permute(layout, [bound[name] for name in before], order, result)


def _square(
    todo: Sequence[tuple[Group, int]], sizes: Mapping[str, int | str | None], bound: Mapping[str, int]
) -> dict[str, int] | None:
    """Two equal unknown axes in one group: their common length is a root."""
    for group, length in todo:
        free = [n for n in group if n not in bound]
        if len(free) == 2 and (sizes.get(free[0]) == free[1] or sizes.get(free[1]) == free[0]):
            taken = prod(bound[n] for n in group if n in bound)
            side = round((length / taken) ** 0.5) if taken else 0
            if side * side * taken == length:
                return {free[0]: side, free[1]: side}
    return None


_TOKEN = re.compile(r"\s*([()]|[A-Za-z_][A-Za-z0-9_]*|1)")


def _side(text: str) -> tuple[Group, ...]:
    groups: list[Group] = []
    inside: list[str] | None = None
    at = 0
    text = text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ViewError(
                f"{text[at:]!r} in a view: write axis names, 1 and ( ) groups, for example 'd h k -> (h k) d'"
            )
        token, at = found.group(1), found.end()
        if token == "(":
            if inside is not None:
                raise ViewError(f"a group within a group in view {text!r}: remove the inner ( )")
            inside = []
        elif token == ")":
            if inside is None:
                raise ViewError(f"view {text!r} closes a group that it never opened: add the ( or remove the )")
            groups.append(tuple(inside))
            inside = None
        elif inside is not None:
            inside += [] if token == "1" else [token]
        else:
            groups.append(() if token == "1" else (token,))
    if inside is not None:
        raise ViewError(f"view {text!r} leaves a group open: add the )")
    return tuple(groups)


def parse_view(text: str) -> View:
    """``left -> right``, with the same axes on both sides.

    Raises:
        ViewError: a side is malformed, an axis is named twice, or the sides do not balance.
    """
    if text.count("->") != 1:
        raise ViewError(f"a view is 'left -> right', got {text!r}")
    left, right = (_side(side) for side in text.split("->"))
    for side in (left, right):
        names = [name for group in side for name in group]
        if len(set(names)) != len(names):
            raise ViewError(f"view {text!r} names an axis twice on one side: give each axis a name of its own")
        if len(names) > _MAX_AXES or len(side) > _MAX_AXES:
            raise ViewError(f"view {text[:40]!r} ... has more than {_MAX_AXES} axes")
    lost = {n for g in left for n in g} ^ {n for g in right for n in g}
    if lost:
        raise ViewError(f"the sides of view {text!r} do not balance: {', '.join(sorted(lost))} must be on both sides")
    return View(left, right)
