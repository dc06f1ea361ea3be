"""Rules that lack a ``view``: their tensors have the model's shape with the axes in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import NamedTuple

from keymap.language.rules import Rule, Step

__all__ = ["Turned", "missing_view", "missing_views"]


class Turned(NamedTuple):
    """The tensors of one rule whose axes are in another order than the model's: the fault, and the model's keys."""

    fault: str
    keys: tuple[str, ...]


def missing_view(source: Sequence[int], target: Sequence[int]) -> str:
    """The view that gives a shape the order of another, ``a b -> b a``; empty if they differ in more than order.

    >>> missing_view((512, 768), (768, 512))
    'a b -> b a'
    """
    if tuple(source) == tuple(target) or sorted(source) != sorted(target) or len(source) > len(ascii_lowercase):
        return ""
    names = ascii_lowercase[: len(source)]
    left = dict(zip(names, source, strict=True))
    right = []
    for length in target:  # equal lengths keep their order
        name = next(name for name, own in left.items() if own == length)
        del left[name]
        right.append(name)
    return f"{' '.join(names)} -> {' '.join(right)}"


def missing_views(
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], steps: Iterable[Step]
) -> Iterator[Turned]:
    """One fault for each rule whose tensors would fit with a view.

    Args:
        shapes: of the model's keys that do not fit, the shape that the rule gives and the shape of the model.
        steps: the applications of the format's rules.
    """
    found: dict[str, tuple[Rule, list[str]]] = {}
    fitting: set[str] = set()
    for rule, _, key in steps:
        if key in shapes and rule.renames and missing_view(*shapes[key]):
            found.setdefault(rule.place, (rule, []))[1].append(key)
        else:
            fitting.add(rule.place)
    for place, (rule, keys) in found.items():
        given, wanted = shapes[keys[0]]
        used = f" (used at {rule.used_at})" if rule.used_at else ""
        alone = ", in a rule for these keys alone" if place in fitting else ""
        more = f" ({len(keys) - 1} more key{'' if len(keys) == 2 else 's'} of this rule)" if len(keys) > 1 else ""
        yield Turned(
            f"{place}: {keys[0]} has shape {list(given)} in the file and {list(wanted)} in the model: "
            f"add view: {missing_view(given, wanted)} to rule {rule.text}{used}{alone}{more}",
            tuple(keys),
        )
