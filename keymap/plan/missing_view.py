"""Tensors whose shape is not the model's: one fault for each rule, with the ``view`` to add, to write or to remove."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from string import ascii_lowercase
from typing import NamedTuple

from keymap.language.rules import Rule

__all__ = ["Mismatch", "MismatchGroup", "grouped", "missing_view"]

Shape = tuple[int, ...]

_DIGITS = re.compile(r"[0-9]+")


class Mismatch(NamedTuple):
    """A key of the model whose tensor in the file does not fit.

    Attributes:
        key: of the model.
        why: the shapes or dtypes of both sides.
        rule: the format's rule that makes the tensor; None if it is not known.
        source: the shape in the file, where the rule reads one key; else None.
        made: the shape that the rule makes; None where a bridge changes it.
        wanted: the shape of the model.
    """

    key: str
    why: str
    rule: Rule | None
    source: Shape | None
    made: Shape | None
    wanted: Shape


class MismatchGroup(NamedTuple):
    """The mismatches of one rule that have one reason.

    Attributes:
        place: of the rule, empty for a rule that is not to blame.
        text: the first key and what to do, without the place.
        view: True where another view, or none, makes the keys fit.
        keys: of the model.
    """

    place: str
    text: str
    view: bool
    keys: tuple[str, ...]

    @property
    def fault(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


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


# long: 16 branches, most of them choices of a word
def grouped(mismatches: Iterable[Mismatch], fitting: Collection[str], other_model: bool) -> Iterator[MismatchGroup]:
    """One group for each rule and change of its view; keys of repeated layers are one group.

    Args:
        mismatches: in the model's order.
        fitting: places of rules that make tensors that fit.
        other_model: the file is of another architecture or size, so a rule that only renames is not to blame.
    """
    found: dict[tuple[str, str, str], list[Mismatch]] = {}
    for one in mismatches:
        rule, change = one.rule, _change(one)
        place = rule.place if rule is not None and (change or _to_blame(rule, other_model)) else ""
        closed = rule is not None and place and (change or _is_closed(rule))
        alike = "" if closed else _DIGITS.sub("#", one.key)
        found.setdefault((place, change, alike), []).append(one)
    for (place, change, _), members in found.items():
        keys = tuple(one.key for one in members)
        rule = members[0].rule
        if change and rule is not None:
            yield MismatchGroup(place, _change_in_words(rule, members, change, place in fitting), True, keys)
        else:
            more = _more(members, "of this rule" if place else "like it")
            yield MismatchGroup(place, f"{keys[0]}: {members[0].why}{more}", False, keys)


def _to_blame(rule: Rule, other_model: bool) -> bool:
    """True for a rule that may be wrong where a tensor has another shape; one that keeps a key is right."""
    return not rule.keeps and not (other_model and rule.renames)


def _change_in_words(rule: Rule, members: Sequence[Mismatch], change: str, others_fit: bool) -> str:
    """The first key, and the change of the rule that makes all of them fit."""
    used = f" (used at {rule.used_at})" if rule.used_at else ""
    alone = ", in a rule for these keys alone" if others_fit and change.startswith("add") else ""
    return f"{_shapes(members[0])}: {change} rule {rule.text}{used}{alone}{_more(members, 'of this rule')}"


def _is_closed(rule: Rule) -> bool:
    """True for a rule whose keys differ in indices and alternatives only, as those of one tensor of each layer do."""
    return all(slot.kind in ("int", "alts") for slot in rule.source.slots)


def _change(one: Mismatch) -> str:
    """What to change in the view of the rule, up to the word "rule"; empty if that does not help."""
    rule = one.rule
    if rule is None or one.source is None or one.made is None or one.made == one.wanted:
        return ""
    if rule.renames:
        view = missing_view(one.made, one.wanted)
        return f"add view: {view} to" if view else ""
    only_views = rule.join is None and rule.cut is None and rule.take is None and rule.add is None
    if not only_views or not (rule.before or rule.then or rule.after):
        return ""
    if one.source == one.wanted:
        return "remove the view from"
    view = missing_view(one.source, one.wanted)
    return f"write view: {view} in" if view else ""


def _shapes(one: Mismatch) -> str:
    """The shapes, in the words of the change."""
    if one.rule is not None and one.rule.renames:
        return f"{one.key} has shape {list(one.made or ())} in the file and {list(one.wanted)} in the model"
    return (
        f"{one.key} has shape {list(one.source or ())} in the file, {list(one.made or ())} after the view and "
        f"{list(one.wanted)} in the model"
    )


def _more(members: Sequence[Mismatch], which: str) -> str:
    count = len(members) - 1
    return f" (and {count} more key{'' if count == 1 else 's'} {which})" if count else ""
