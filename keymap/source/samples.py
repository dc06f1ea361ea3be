"""Made-up state dicts of a format, from its mapping alone: for proofs that its rules run, and that it claims its own.

A sample holds every key that the rules can have, with indices 0 to 2 and a word for each open-ended group. Its
shapes are as small as the views, joins and cuts allow; the axes of a view differ in length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue
from keymap.language.format import Clue, Evidence, Format
from keymap.language.layout import Layout, whole
from keymap.language.pattern import Side
from keymap.language.rules import Rule
from keymap.language.view import Group
from keymap.source.detect import apply_aliases, holds

__all__ = ["Sample", "claims", "refuse_claims", "samples"]

Shape = tuple[int, ...]

_COUNT = 3  # how many blocks, layers, experts there are
_WORDS = {"word": ("word",), "segment": ("segment",), "rest": ("weight",), "int": tuple(str(n) for n in range(_COUNT))}
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_FACTS = (4, 6, 8, 9, 10, 12, 14, 15)  # no prime: a fact never has the length of another axis


class Sample(NamedTuple):
    """A state dict that does not exist.

    Attributes:
        name: of the mapping, with the variant or the evidence that this sample shows.
        shapes: by key.
        facts: the lengths that the rules ask for, by the fact's name.
    """

    name: str
    shapes: Mapping[str, Shape]
    facts: Mapping[str, int]


def _values(side: Side) -> Iterator[dict[str, str]]:
    """Values for the variables of a side: every alternative, every index."""
    choices = [[v for v, _ in slot.options] if slot.kind == "alts" else _WORDS[slot.kind] for slot in side.slots]
    for chosen in product(*choices):
        yield dict(zip((slot.names[0] for slot in side.slots), chosen, strict=True))


class _Shapes:
    """Shapes for the source keys of one rule."""

    def __init__(self, rule: Rule, facts: dict[str, int]) -> None:
        self.rule, self.facts = rule, facts
        self.lengths: dict[str, int] = {}

    def length(self, name: str) -> int:
        told = self.rule.sizes.get(name)
        if isinstance(told, int):
            return told
        if isinstance(told, str) and "." in told:
            return self.facts.setdefault(told, _FACTS[len(self.facts) % len(_FACTS)])
        name = told if isinstance(told, str) else name  # an axis of equal length
        return self.lengths.setdefault(name, _PRIMES[len(self.lengths) % len(_PRIMES)])

    def free(self, group: Group) -> str | None:
        """The axis of a group whose length may be chosen."""
        return next((name for name in group if not isinstance(self.rule.sizes.get(name), int)), None)

    def shape(self, values: Mapping[str, str], rank: int) -> Shape:
        """The shape of one key: its axes, stretched so that joins, views and cuts of the rule go through."""
        rule, join, cut, then = self.rule, self.rule.join, self.rule.cut, self.rule.then
        new = len(join.variables) - (join.kind != "stack") if join is not None else 0  # axes that the join adds
        if rule.before is not None:
            left, right = rule.before.left, rule.before.right
        elif then is not None and not new:
            left = right = then.left
        else:
            rank = len(then.left) - new if then is not None else rank
            named = [part.axis for part in (join, cut) if part is not None] + [rule.root or 0]
            rank = max(rank, max(named) + 1)
            left = right = tuple((f"{axis}",) for axis in range(rank))
        lengths = {name: self.length(name) for group in left for name in group}
        joined: list[Group] = list(right)
        for depth in range(new):
            inner = join is not None and join.kind == "stack" and depth == 0
            joined.insert(join.axis if inner and join is not None else 0, ())
        needs = [1] * len(joined)
        if then is not None:
            needs = [prod(n for a in g if isinstance(n := rule.sizes.get(a), int)) for g in then.left]
        if cut is not None and cut.lengths:
            name = self.free((then.right if then is not None else joined)[cut.axis])
            before_then = then.left if then is not None else joined
            place = next((i for i, group in enumerate(before_then) if name in group), 0)
            needs[place] *= sum(n or 1 for n in cut.lengths)
        for group, need in zip(joined, needs, strict=True):
            name = self.free(group)
            if name is not None:
                lengths[name] *= need
        if join is not None and join.kind == "rows":
            ends = [stop if stop is not None else start + 2 for start, stop in join.ranges]
            lengths[right[0][0]] = max(ends)
        elif join is not None and join.lengths:
            part = join.lengths[join.members.index(values[join.variables[-1]])]
            name = self.free(right[join.axis]) or right[join.axis][0]
            if None in join.lengths:
                lengths[name] = part if part is not None else lengths[name]
            else:
                lengths[name] *= part or 1
        shape = tuple(prod(lengths[name] for name in group) for group in left)
        if rule.take is None:
            return shape
        start, stop = rule.take
        return (shape[0] + start if stop is None else stop, *shape[1:])


def _rank(key: str, evidence: Evidence) -> int:
    """How many axes a key has that no view tells: as the evidence says, else two."""
    asked = [clue.ndim for clue in (*evidence.all, *evidence.any) if clue.side.match(key) is not None]
    never = [clue.ndim for clue in evidence.none if clue.side.match(key) is not None]
    return next((n for n in (*asked, 2, 1, 3) if n is not None and n not in never), 2)


def _rule_keys(
    mapping: Format, known: Catalogue, rules: Iterable[Rule], evidence: Evidence, facts: dict[str, int]
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    adding: list[tuple[str, Rule]] = []
    for rule in rules:
        made = _Shapes(rule, facts)
        for values in _values(rule.source):
            key = rule.source.write(values)
            if rule.match(key) is None:  # an index that the rule does not count, as 0 where names begin with 1
                continue
            fixed = next((shape for side, shape in mapping.shapes if side.match(key) is not None), None)
            if fixed is None and rule.renames and rule.targets[0].write(values) in known.hub.scalars:
                fixed = ()
            shapes[key] = fixed if fixed is not None else made.shape(values, _rank(key, evidence))
            if rule.add is not None:
                adding.append((key, rule))
    for key, rule in adding:  # the two shapes have to agree; the one that no view binds gives way
        other, row = rule.add or ("", None)
        if other in shapes and rule.before is None:
            shapes[key] = shapes[other] if row is None else shapes[other][1:]
        elif other in shapes:
            rows = max((_COUNT, *shapes[other][:1]))  # a `take` of the other needs its rows
            shapes[other] = shapes[key] if row is None else (rows, prod(shapes[key]))
    return shapes


def _borne_out(clue: Clue, shapes: Mapping[str, Shape]) -> bool:
    return any(clue.side.match(key) is not None and clue.ndim in (None, len(s)) for key, s in shapes.items())


def _clue_keys(clue: Clue) -> dict[str, Shape]:
    rank = 2 if clue.ndim is None else clue.ndim
    return {clue.side.write(values): _PRIMES[:rank] for values in _values(clue.side)}


def samples(mapping: Format, known: Catalogue) -> Iterator[Sample]:
    """Samples of a mapping: of its own rules, and of each variant.

    Where the rules tell no literal key that the evidence asks for (a prefix before ``(.+)``), the evidence's own
    keys are added, and there is one sample more for each such clue of `any`.
    """
    cases: list[tuple[str, tuple[Rule, ...], Evidence]] = [(mapping.name, mapping.rules, Evidence())]
    for number, variant in enumerate(mapping.variants, 1):
        cases.append((f"{mapping.name}, variant {number}", (*mapping.rules, *variant.rules), variant.when))
    for name, rules, when in cases:
        own = mapping.detect
        evidence = Evidence((*own.all, *when.all), (*own.any, *when.any), (*own.none, *when.none))
        facts: dict[str, int] = {}
        shapes = _rule_keys(mapping, known, rules, evidence, facts)
        for clue in evidence.all:
            if not _borne_out(clue, shapes):
                shapes |= _clue_keys(clue)
        if when.any and not any(_borne_out(clue, shapes) for clue in when.any):
            shapes |= _clue_keys(when.any[0])
        untold = [clue for clue in own.any if not _borne_out(clue, shapes)]
        if not own.any or len(untold) < len(own.any):
            yield Sample(name, shapes, facts)
        for clue in untold:
            yield Sample(f"{name}, by {clue}", {**shapes, **_clue_keys(clue)}, facts)


def _towers(mapping: Format, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, dict[str, Layout]]]:
    """All keys, and those of each tower on its own, as a file of one tower holds them."""
    yield "", dict(layouts)
    owner = {key: found[0].tower for key in layouts if (found := mapping.table.find(key)) is not None}
    groups = dict.fromkeys(owner.values())
    for group in groups if len(groups) > 1 else ():
        yield f" ({group} alone)", {key: layout for key, layout in layouts.items() if owner.get(key) == group}


def claims(known: Catalogue, new: Iterable[str] | None = None) -> Iterator[str]:
    """Faults of evidence: a format that does not claim its own sample, or that claims another format's; one for a pair.

    Args:
        known: all formats.
        new: look only at pairs in which one of these takes part; None: at all.
    """
    chosen = set(new) if new is not None else set(known.mappings)
    pairs: set[tuple[str, str]] = set()
    for mapping in known.formats:
        others = [m for m in known.formats if m is not mapping and (mapping.name in chosen or m.name in chosen)]
        if not others and mapping.name not in chosen:
            continue
        for sample in samples(mapping, known):
            layouts = {key: whole(key, shape, torch.float32) for key, shape in sample.shapes.items()}
            for tower, part in _towers(mapping, layouts):
                own = holds(mapping.detect, apply_aliases(mapping, part, {})[0])
                if own is None:
                    if not tower:
                        yield (
                            f"{known.files[mapping.name].at(('detect',))}: detect does not claim the format's own keys "
                            f"({sample.name}): name keys that the rules own"
                        )
                    continue
                for other in others:
                    found = holds(other.detect, apply_aliases(other, part, {})[0])
                    if found is not None and (mapping.name, other.name) not in pairs:
                        pairs.add((mapping.name, other.name))
                        yield (
                            f"{mapping.file} and {other.file} both claim the keys of {sample.name}{tower}: "
                            f"{mapping.name} by {', '.join(own[:3])}; {other.name} by {', '.join(found[:3])}. "
                            f"Name under `none` what only the other one has"
                        )


def refuse_claims(known: Catalogue, new: Iterable[str]) -> None:
    """Refuse formats whose evidence does not keep them apart from the others.

    Raises:
        MappingError: with every pair of formats that claim the same keys.
    """
    faults = tuple(claims(known, new))
    if faults:
        raise MappingError("the evidence of formats does not keep them apart", faults)
