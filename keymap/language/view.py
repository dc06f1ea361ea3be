"""Views: one einops-like pattern that regroups and permutes axes, ``d h k -> (h k) d``.

Every axis has a name; ``1`` is an axis of length one. What the shape and the declared sizes do not bind is an
error, never a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from keymap.language.layout import Layout, permute

__all__ = ["View", "ViewError", "parse_view"]

Group = tuple[str, ...]
_MOST_AXES = 16


class ViewError(ValueError):
    """A view that is written wrong, or that does not fit a shape; the message says which and why."""


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

        ``sizes`` maps an axis to a number, to another axis of equal length, or to None where a fact that it
        needs is not known.

        Raises:
            ViewError: an axis stays unbound, a length is bound twice differently, or does not divide.
        """
        if len(shape) != len(self.left):
            raise ViewError(f"view '{self}' reads {len(self.left)} axes, the tensor is {list(shape)}")
        known = {name: size for name, size in sizes.items() if isinstance(size, int)}
        bound: dict[str, int] = {}
        names = {name for group in self.left for name in group}
        todo = list(zip(self.left, shape, strict=True))
        while todo:
            rest = []
            for group, length in todo:
                free = [n for n in group if n not in bound and (len(group) == 1 or n not in known)]
                for name in group:
                    if name not in free and name not in bound:
                        bound[name] = known[name]
                if len(free) > 1:
                    rest.append((group, length))
                    continue
                taken = prod(bound[n] for n in group if n not in free)
                if free and taken and length % taken == 0:
                    bound[free[0]] = length // taken
                elif free or taken != length:
                    parts = ", ".join(f"{n}={bound[n]}" for n in group if n in bound) or "1"
                    raise ViewError(
                        f"view '{self}': an axis of length {length} cannot be ({' '.join(group)}) with {parts}"
                    )
            equalled = False
            for name, other in sizes.items():
                if isinstance(other, str) and name in names:
                    for one, two in ((name, other), (other, name)):
                        if one in bound and two not in bound and two in names:
                            bound[two] = bound[one]
                            equalled = True
            if len(rest) == len(todo) and not equalled:
                square = _square(rest, sizes, bound)
                if square is None:
                    free_names = sorted({n for g, _ in rest for n in g if n not in bound})
                    facts = [f"{n} is {sizes[n]!r}, which" for n in free_names if isinstance(sizes.get(n), str)]
                    raise ViewError(
                        f"view '{self}' on {list(shape)}: nothing tells the length of axis "
                        f"{', '.join(free_names)}{' (' + '; '.join(facts) + ' is not known)' if facts else ''}"
                    )
                bound.update(square)
            todo = rest
        for name, size in sizes.items():
            told = bound.get(size) if isinstance(size, str) else size
            if name in bound and told is not None and bound[name] != told:
                raise ViewError(f"view '{self}' on {list(shape)}: {name} is {bound[name]}, declared {told}")
        return bound

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
            raise ViewError(f"{text[at:]!r} in a view: write axis names, 1 and ( ) groups, as 'd h k -> (h k) d'")
        token, at = found.group(1), found.end()
        if token == "(":
            if inside is not None:
                raise ViewError(f"a group within a group in view {text!r}")
            inside = []
        elif token == ")":
            if inside is None:
                raise ViewError(f"view {text!r} closes a group that it never opened")
            groups.append(tuple(inside))
            inside = None
        elif inside is not None:
            inside += [] if token == "1" else [token]
        else:
            groups.append(() if token == "1" else (token,))
    if inside is not None:
        raise ViewError(f"view {text!r} leaves a group open")
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
            raise ViewError(f"view {text!r} names an axis twice on one side")
        if len(names) > _MOST_AXES or len(side) > _MOST_AXES:
            raise ViewError(f"view {text[:40]!r} ... has more than {_MOST_AXES} axes")
    lost = {n for g in left for n in g} ^ {n for g in right for n in g}
    if lost:
        raise ViewError(f"the sides of view {text!r} do not balance: {', '.join(sorted(lost))}")
    return View(left, right)
