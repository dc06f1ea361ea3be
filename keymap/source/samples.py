"""Generate sample state dicts of a format from its mapping, to check that its rules run and its evidence is right.

A sample has every key that the rules can match, with indices 0 to 2 and one word for each open-ended group. Its shapes
are as small as the views, joins and splits allow; the axes of a view differ in length.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import MappingError
from keymap.language.amounts import amount_in, facts_of
from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Clue, Evidence, Format
from keymap.language.layout import Layout, whole
from keymap.language.pattern import Side, Slot
from keymap.language.rows import Rows
from keymap.language.rules import Join, Rule
from keymap.language.view import Group
from keymap.source.detect import apply_aliases, matching_keys

__all__ = ["Sample", "check_evidence", "evidence_faults", "samples"]

Shape = tuple[int, ...]

_COUNT = 3  # blocks, layers, experts
_WORDS = {
    "path": ("deep.",),
    "word": ("word",),
    "segment": ("segment",),
    "rest": ("weight",),
    "int": tuple(str(n) for n in range(_COUNT)),
}
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_DIVISIBLE = 24  # every length that a form names is a multiple of it
_FACTS = (4, 6, 8, 9, 10, 12, 14, 15)  # not prime, so that a fact never has the length of another axis


class Sample(NamedTuple):
    """The shapes of a state dict, made up from a mapping.

    Attributes:
        name: of the mapping, with the variant or the evidence of this sample.
        shapes: by key.
        facts: the lengths that the rules need, by the name of the fact.
    """

    name: str
    shapes: Mapping[str, Shape]
    facts: Mapping[str, int]


def _words(slot: Slot) -> Iterable[str]:
    """The values of a slot that has no list of them: one word, or the first indices of its range."""
    if slot.kind != "int" or not slot.bounded:
        return _WORDS[slot.kind]
    first = slot.low if isinstance(slot.low, int) else 0
    return [
        str(n) for n in range(first, min(first + _COUNT, slot.high if isinstance(slot.high, int) else first + _COUNT))
    ]


def _values(side: Side) -> Iterator[dict[str, str]]:
    """All values for the variables of a side: every alternative and every index."""
    choices = [[v for v, _ in slot.options] if slot.kind == "alts" else _words(slot) for slot in side.slots]
    for chosen in product(*choices):
        yield dict(zip((slot.names[0] for slot in side.slots), chosen, strict=True))


class _ShapeMaker:
    """Shapes for the source keys of one rule.

    Attributes:
        added_axes: number of axes that the rule's join adds.
    """

    def __init__(self, rule: Rule, facts: dict[str, int]) -> None:
        self.rule, self.facts = rule, facts
        self.lengths: dict[str, int] = {}
        join = rule.join
        self.added_axes = len(join.variables) - (join.kind != "stack") if join is not None else 0

    def shape(self, values: Mapping[str, str], rank: int) -> Shape:
        """The shape of one key: its axes, long enough for the views, joins and splits of the rule."""
        left, right = self._groups(rank)
        lengths = {name: self._length(name) for group in left for name in group}
        joined = self._joined_groups(right)
        for group, factor in zip(joined, self._factors(joined), strict=True):
            name = self._free_axis(group)
            if name is not None:
                lengths[name] *= factor
        self._fit_join(lengths, right, values)
        shape = tuple(prod(lengths[name] for name in group) for group in left)
        if self.rule.arithmetic is not None and self.rule.arithmetic.fact:
            self._fact(self.rule.arithmetic.fact)
        take, pad = self.rule.take, self.rule.pad
        if take is not None:
            end = self._rows(take)
            return (shape[0] + take.start if end is None else take.padded(end), *shape[1:])
        return (self._rows(pad) or 1, *shape[1:]) if pad is not None else shape

    def _rows(self, rows: Rows) -> int | None:
        """Where rows end; a fact is a multiple of what they are padded to, so that there is no padding to lose."""
        for name in facts_of([rows.stop]):
            self.facts.setdefault(name, _COUNT * rows.multiple or self._fact(name))
        return rows.end(self.facts)

    def _length(self, name: str) -> int:
        size = self.rule.sizes.get(name)
        if isinstance(size, int):
            return size
        if isinstance(size, str) and "." in size:
            return self._fact(size)
        name = size if isinstance(size, str) else name  # an axis of equal length
        return self.lengths.setdefault(name, _PRIMES[len(self.lengths) % len(_PRIMES)])

    def _fact(self, name: str) -> int:
        return self.facts.setdefault(name, _FACTS[len(self.facts) % len(_FACTS)])

    def _part_lengths(self, join: Join) -> list[int | None]:
        """The lengths of parts, with a number for each fact."""
        for name in facts_of(join.lengths):
            self._fact(name)
        return [None if n is None else amount_in(n, self.facts) for n in join.lengths]

    def _free_axis(self, group: Group) -> str | None:
        """The axis of a group whose length the rule does not fix; one that a fact fixes where there is no other."""
        free = [name for name in group if not isinstance(self.rule.sizes.get(name), int)]
        return next((name for name in free if name not in self.rule.sizes), free[0] if free else None)

    def _declared(self, group: Group) -> int:
        """The product of the lengths in a group that the rule fixes; 1 for an axis that stands alone."""
        sizes = self.rule.sizes
        fixed = (n for n in group if isinstance(sizes.get(n), int) or "." in str(sizes.get(n, "")))
        return prod(self._length(name) for name in fixed) if len(group) > 1 else 1

    def _groups(self, rank: int) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        """The groups of axes of a source key, and of what the join gets."""
        rule, then = self.rule, self.rule.then
        if rule.before is not None:
            return rule.before.left, rule.before.right
        if then is not None and not self.added_axes:
            return then.left, then.left
        if then is not None:
            rank = len(then.left) - self.added_axes
        elif rule.after is not None and rule.cut is not None:
            rank = len(rule.after.left) + (rule.cut.kind == "stack") - self.added_axes
        named = [step.axis for step in (rule.join, rule.cut) if step is not None] + [
            root if rule.arithmetic is not None and isinstance(root := rule.arithmetic.root, int) else 0
        ]
        groups = tuple((f"{axis}",) for axis in range(max(rank, max(named) + 1)))
        return groups, groups

    def _joined_groups(self, right: Iterable[Group]) -> list[Group]:
        """The groups after the join, with an empty one for each added axis."""
        join, joined = self.rule.join, list(right)
        for depth in range(self.added_axes):
            stacked = join is not None and join.kind == "stack" and depth == 0
            joined.insert(join.axis if stacked and join is not None else 0, ())
        return joined

    def _factors(self, joined: list[Group]) -> list[int]:
        """By how much each joined group must be longer, so that `then` and the split divide it."""
        rule, cut, then = self.rule, self.rule.cut, self.rule.then
        factors = [1] * len(joined)
        if then is not None:
            factors = [prod(n for a in g if isinstance(n := rule.sizes.get(a), int)) for g in then.left]
        if cut is not None:
            whole = then.right if then is not None else joined
            longer: dict[int, int] = {}  # by axis of what is cut
            if cut.lengths:
                longer[cut.axis] = sum(n or 1 for n in self._part_lengths(cut))
            for number, group in enumerate(rule.after.left if rule.after is not None else ()):
                axis = number + (cut.kind == "stack" and number >= cut.axis)
                longer[axis] = longer.get(axis, 1) * self._declared(group)
            for axis, factor in longer.items():
                name = self._free_axis(whole[axis])
                before_then = then.left if then is not None else joined
                position = next((i for i, group in enumerate(before_then) if name in group), 0)
                factors[position] *= factor
        return factors

    def _fit_join(self, lengths: dict[str, int], right: tuple[Group, ...], values: Mapping[str, str]) -> None:
        """Set the length of the joined axis, if the members of the join have lengths or ranges of rows."""
        join = self.rule.join
        if join is None:
            return
        if join.kind == "rows":
            lengths[right[0][0]] = max(stop if stop is not None else start + 2 for start, stop in join.ranges)
        elif join.lengths:
            lengths_of_parts = self._part_lengths(join)
            length = lengths_of_parts[join.members.index(values[join.variables[-1]])]
            name = self._free_axis(right[join.axis]) or right[join.axis][0]
            if None not in lengths_of_parts:
                lengths[name] *= length or 1
            elif length is not None:
                lengths[name] = length


def _rank(key: str, evidence: Evidence) -> int:
    """The number of axes of a key without a view: as the evidence says, otherwise two."""
    required = [clue.ndim for clue in (*evidence.all, *evidence.any) if clue.side.match(key) is not None]
    excluded = [clue.ndim for clue in evidence.none if clue.side.match(key) is not None]
    return next((n for n in (*required, 2, 1, 3) if n is not None and n not in excluded), 2)


def _rule_keys(
    mapping: Format, known: Catalogue, rules: Iterable[Rule], evidence: Evidence, facts: dict[str, int]
) -> dict[str, Shape]:
    """Every key that the rules match, with its shape; adds the lengths of facts to ``facts``."""
    shapes: dict[str, Shape] = {}
    additions: list[tuple[str, Rule]] = []
    for name in dict.fromkeys(fact for rule in rules for fact in rule.facts_of_names):
        facts.setdefault(name, _COUNT)  # of layers
    for rule in (rule.within(facts) for rule in rules):
        maker = _ShapeMaker(rule, facts)
        for values in _values(rule.source):
            key = rule.source.write(values)
            if rule.match(key) is None:  # an index below the rule's first, for example 0 if names begin with 1
                continue
            fixed = _fixed_shape(mapping, known, rule, key, values)
            shapes[key] = fixed if fixed is not None else maker.shape(values, _rank(key, evidence))
            if rule.add is not None:
                additions.append((key, rule))
    for key, rule in additions:  # both tensors of an addition need one shape; change the one without a view
        other, row = rule.add or ("", None)
        if other in shapes and rule.before is None:
            shapes[key] = shapes[other] if row is None else shapes[other][1:]
        elif other in shapes:
            rows = max((_COUNT, *shapes[other][:1]))  # enough for a `take` of the other
            shapes[other] = shapes[key] if row is None else (rows, prod(shapes[key]))
    return shapes


def _fixed_shape(mapping: Format, known: Catalogue, rule: Rule, key: str, values: Mapping[str, str]) -> Shape | None:
    """The shape that the mapping or the hub states for a key; None if neither does."""
    stated = next((shape for side, shape in mapping.shapes if side.match(key) is not None), None)
    if stated is None and rule.renames and rule.targets[0].write(values) in known.hub.scalars:
        return ()
    return stated


def _form_shapes(evidence: Evidence, shapes: dict[str, Shape]) -> None:
    """Give the keys that clues name with a form a shape of that form; a name has one length in all of them."""
    lengths: dict[str, int] = {}
    for clue in (*evidence.all, *evidence.any):
        for key in shapes if clue.form is not None else ():
            if clue.side.match(key) is not None:
                for axis in clue.form or ():
                    lengths.setdefault(axis.name, _DIVISIBLE * _PRIMES[len(lengths) % len(_PRIMES)])
                shapes[key] = tuple(axis.times * (lengths[axis.name] if axis.name else 1) for axis in clue.form or ())


def _matches(clue: Clue, shapes: Mapping[str, Shape]) -> bool:
    """Whether any key matches a clue."""
    return any(clue.side.match(key) is not None and clue.ndim in (None, len(s)) for key, s in shapes.items())


def _clue_keys(clue: Clue) -> dict[str, Shape]:
    """Keys that match a clue, with shapes."""
    rank = 2 if clue.ndim is None else clue.ndim
    return {clue.side.write(values): _PRIMES[:rank] for values in _values(clue.side)}


def _before_steps(mapping: Format, shapes: dict[str, Shape], facts: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes of the keys that a file has, which the format's steps make into those of its rules."""
    layouts = {key: whole(key, shape, torch.float32) for key, shape in shapes.items()}
    for step in reversed(mapping.steps):
        layouts = apply_rules(step.within(facts).inverse(), layouts, facts, pass_others=True).out
    return {key: layout.shape for key, layout in layouts.items()} if mapping.steps else shapes


def samples(mapping: Format, known: Catalogue) -> Iterator[Sample]:
    """Samples of a mapping: one of its own rules, and one of each variant.

    If no key of the rules matches a clue of the evidence (because rules have ``(.+)``), the sample gets a key that
    matches it. Each such clue of `any` has its own sample.
    """
    cases: list[tuple[str, tuple[Rule, ...], Evidence]] = [(mapping.name, mapping.rules, Evidence())]
    for number, variant in enumerate(mapping.variants, 1):
        cases.append((f"{mapping.name}, variant {number}", (*mapping.rules, *variant.rules), variant.when))
    for name, rules, when in cases:
        own = mapping.detect
        evidence = Evidence((*own.all, *when.all), (*own.any, *when.any), (*own.none, *when.none))
        facts: dict[str, int] = {}
        shapes = _rule_keys(mapping, known, rules, evidence, facts)
        shapes = _before_steps(mapping, shapes, facts)
        for clue in evidence.all:
            if not _matches(clue, shapes):
                shapes |= _clue_keys(clue)
        _form_shapes(evidence, shapes)
        if when.any and not any(_matches(clue, shapes) for clue in when.any):
            shapes |= _clue_keys(when.any[0])
        without_key = [clue for clue in own.any if not _matches(clue, shapes)]
        if not own.any or len(without_key) < len(own.any):
            yield Sample(name, shapes, facts)
        for clue in without_key:
            yield Sample(f"{name}, by {clue}", {**shapes, **_clue_keys(clue)}, facts)


def _towers(mapping: Format, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, dict[str, Layout]]]:
    """A label and the keys: first of all towers, then of each tower, because a file may have one tower only."""
    yield "", dict(layouts)
    owner = {key: found[0].tower for key in layouts if (found := mapping.table.find(key)) is not None}
    towers = dict.fromkeys(owner.values())
    for tower in towers if len(towers) > 1 else ():
        yield f" ({tower} alone)", {key: layout for key, layout in layouts.items() if owner.get(key) == tower}


def evidence_faults(known: Catalogue, new: Iterable[str] | None = None) -> Iterator[str]:
    """Faults of evidence: it does not match the format's own samples, or it matches samples of another format.

    Args:
        known: all formats.
        new: check only pairs with one of these formats; None checks all pairs.
    """
    chosen = set(new) if new is not None else set(known.mappings)
    formats = [mapping for mapping in known.formats if not mapping.by_name]
    for mapping in formats:
        others = [
            m
            for m in formats
            if m is not mapping and (mapping.name in chosen or m.name in chosen) and not _told_apart(m, mapping)
        ]
        if others or mapping.name in chosen:
            matched: set[str] = set()
            for sample in samples(mapping, known):
                yield from _sample_faults(known, mapping, others, sample, matched, chosen)


def _told_apart(one: Format, other: Format) -> bool:
    """Whether the configuration file of one of two formats shows that a file is not the other's."""
    pairs = ((one, other), (other, one))
    return any(a.config is not None and b.name in a.config.distinguishes for a, b in pairs)


def _sample_faults(
    known: Catalogue,
    mapping: Format,
    others: Iterable[Format],
    sample: Sample,
    matched: set[str],
    new: Container[str],
) -> Iterator[str]:
    """Faults of evidence that one sample shows, at the ``detect`` of a new format.

    Args:
        matched: collects the other formats that were named.
        new: names of the new formats.
    """
    all_layouts = {key: whole(key, shape, torch.float32) for key, shape in sample.shapes.items()}
    for tower, layouts in _towers(mapping, all_layouts):
        names = sorted(layouts)
        own = _claimed_by(mapping, layouts, names)
        if own is None:
            if not tower:
                yield (
                    f"{known.files[mapping.name].at(('detect',))}: detect does not match the format's own keys "
                    f"({sample.name}): name keys that the rules own"
                )
            continue
        for other in others:
            found = _claimed_by(other, layouts, names)
            if found is not None and other.name not in matched:
                matched.add(other.name)
                at = known.files[mapping.name if mapping.name in new else other.name].at(("detect",))
                yield (
                    f"{at}: {mapping.file} and {other.file} both match the keys of {sample.name}{tower}: "
                    f"{mapping.name} by {', '.join(own[:3])}; {other.name} by {', '.join(found[:3])}. "
                    f"Add keys that only one of them has to `detect: none` of the other"
                )


def _claimed_by(mapping: Format, layouts: Mapping[str, Layout], names: Sequence[str]) -> list[str] | None:
    """The keys by which a format claims these; None if it does not. ``names`` are the sorted keys."""
    renamed = apply_aliases(mapping, layouts, {}, names)[0]
    return matching_keys(mapping.detect, renamed, names if renamed is layouts else None)


def check_evidence(known: Catalogue, new: Iterable[str]) -> None:
    """Check that the evidence of each new format distinguishes it from all others.

    Raises:
        MappingError: with every pair of formats that match the same keys.
    """
    faults = tuple(evidence_faults(known, new))
    if faults:
        raise MappingError("the evidence of some formats matches the wrong keys", faults)
