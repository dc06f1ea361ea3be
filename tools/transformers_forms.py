"""Rules for all layers from the names of single layers: numbers become groups, and rules that say the same become one.

A `Form` is a rule whose sides are lists of segments, the parts of a name between dots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

from transformers_names import MEMBER
from transformers_operations import Line

__all__ = ["Choice", "Form", "Index", "Rest", "forms", "joined"]

PART = "\x01"  # stands for the parts that a rule joins or cuts, in a segment
_MOST_WORDS = 16  # of a choice
_MOST_GROUPS = 9  # a target names a group by one digit


@dataclass(frozen=True)
class Index:
    """The number of a layer: the group ``number`` of the file's side, plus ``shift`` in the model."""

    number: int
    shift: int = 0


@dataclass(frozen=True)
class Choice:
    """One of some words, the same on both sides."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Rest:
    """The rest of a name, the same on both sides."""


Segment = str | Index | Choice | Rest
Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Form:
    """A rule for all layers.

    Attributes:
        file, model: its sides.
        parts: the words that `PART` stands for, of the file and of the model; empty without it.
        options, step, members: as of a `Line`.
        also: other names of the model that hold the same values.
        limits: the numbers that an index may be, where another rule has the others.
        optional: some layers lack its names.
        counts: how many members it joins.
        rows: the numbers that its indices are in this model, in the order of the indices.
        place: of the first of its names in the model.
        converters: those that it says.
    """

    file: Segments
    model: Segments
    parts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    options: tuple[tuple[str, Any], ...] = ()
    step: bool = False
    members: tuple[int, int | None] | None = None
    also: tuple[str, ...] = ()
    limits: tuple[tuple[int, tuple[int, ...]], ...] = ()
    optional: bool = False
    counts: frozenset[int] = field(default=frozenset(), hash=False, compare=False)
    rows: frozenset[tuple[int, ...]] = field(default=frozenset(), hash=False, compare=False)
    place: int = field(default=0, hash=False, compare=False)
    converters: tuple[Any, ...] = field(default=(), hash=False, compare=False)

    @property
    def renames(self) -> bool:
        return not (self.options or self.step or self.also or self.parts[0] or self.parts[1])

    @property
    def keeps(self) -> bool:
        """Nothing changes."""
        return self.renames and self.file == self.model

    def values(self, number: int) -> frozenset[int]:
        """The numbers that an index is."""
        return frozenset(row[number - 1] for row in self.rows)

    @property
    def groups(self) -> int:
        return sum(1 for one in self.file for _ in groups_of(one))


def groups_of(segment: Segment) -> Iterator[str]:
    """The groups of a segment of the file's side, in their order."""
    if not isinstance(segment, str):
        yield "group"
    else:
        yield from (char for char in segment if char in (PART, MEMBER))


def _factored(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Several names as one, with the words in which they differ."""
    if len(names) == 1:
        return names[0], ()
    start = _common(names)
    rest = [name[len(start) :] for name in names]
    end = _common([name[::-1] for name in rest])[::-1]
    return start + PART + end, tuple(name[: len(name) - len(end)] for name in rest)


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    length = next((n for n, chars in enumerate(zip(*texts, strict=False)) if len(set(chars)) > 1), None)
    return min(texts, key=len) if length is None else texts[0][:length]


def _skeleton(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A name without its numbers, and these."""
    segments = name.split(".")
    numbers = tuple(int(one) for one in segments if one.isdigit())
    return tuple("#" if one.isdigit() else one for one in segments), numbers


def forms(lines: Iterable[Line], ties: Mapping[str, tuple[str, ...]]) -> list[Form]:
    """The rules for all layers, each key with one rule in both directions.

    Args:
        lines: the rules for single layers.
        ties: by a name of the model other names that hold the same values.
    """
    alike: dict[Any, list[_Row]] = defaultdict(list)
    for place, line in enumerate(lines):
        (file, parts), (model, cuts) = _factored(line.files), _factored(line.models)
        (file_text, file_numbers), (model_text, model_numbers) = _skeleton(file), _skeleton(model)
        options = tuple((name, _frozen(value)) for name, value in line.options.items())
        also = ties.get(line.models[0], ())
        key = (file_text, model_text, parts, cuts, options, line.step, line.members, also)
        alike[key].append(_Row(file_numbers, model_numbers, line, place))
    found = [form for key, rows in alike.items() for form in _generalised(key, rows)]
    return _apart(found)


class _Row(NamedTuple):
    """The numbers of a line, and its place."""

    file: tuple[int, ...]
    model: tuple[int, ...]
    line: Line
    place: int


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _generalised(key: Any, rows: list[_Row]) -> Iterator[Form]:
    """The forms of rules that differ in their numbers alone."""
    file_text, model_text, parts, cuts, options, step, members, also = key
    matched = {} if also else _matched(rows)
    used = sorted({at for at, _ in matched.values()})
    order = {at: number for number, at in enumerate(used, 1)}
    fixed: dict[Any, list[_Row]] = defaultdict(list)
    for row in rows:
        lone = [number for at, number in enumerate(row.model) if at not in matched]
        fixed[tuple(number for at, number in enumerate(row.file) if at not in order), tuple(lone)].append(row)
    for same in fixed.values():
        first = same[0]
        file = [Index(order[at]) if at in order else str(number) for at, number in enumerate(first.file)]
        model = [
            Index(order[matched[at][0]], matched[at][1]) if at in matched else str(number)
            for at, number in enumerate(first.model)
        ]
        yield Form(
            _filled(file_text, file),
            _filled(model_text, model),
            (parts, cuts),
            options,
            step,
            members,
            also,
            counts=frozenset(row.line.count for row in same if row.line.count),
            rows=frozenset(tuple(row.file[at] for at in used) for row in same),
            place=first.place,
            converters=tuple(
                {id(row.line.converter): row.line.converter for row in same if row.line.converter}.values()
            ),
        )


def _filled(text: Sequence[str], numbers: Sequence[Segment]) -> Segments:
    left = iter(numbers)
    return tuple(next(left) if one == "#" else one for one in text)


def _matched(rows: Sequence[_Row]) -> dict[int, tuple[int, int]]:
    """Which number of the file is which number of the model, and what is added to it."""
    found: dict[int, tuple[int, int]] = {}
    for there in range(len(rows[0].model)):
        for at in range(len(rows[0].file)):
            shifts = {row.model[there] - row.file[at] for row in rows}
            moved = len({row.file[at] for row in rows}) > 1
            if at not in {one for one, _ in found.values()} and len(shifts) == 1 and (shifts == {0} or moved):
                found[there] = (at, shifts.pop())
                break
    return found


# --- one rule for each key ---


def _apart(found: list[Form]) -> list[Form]:
    """Limit the numbers of forms that could own the same key, in the file or in the model."""
    limits: dict[int, dict[int, frozenset[int]]] = defaultdict(dict)
    for side in ("file", "model"):
        shapes: dict[Any, list[int]] = defaultdict(list)
        for at, form in enumerate(found):
            for shape in _shapes(form, side):
                shapes[shape].append(at)
        for group in shapes.values():
            for one, other in combinations(dict.fromkeys(group), 2):
                _limit(found, one, other, side, limits)
    limited = [
        replace(form, limits=tuple((n, tuple(sorted(values))) for n, values in sorted(limits[at].items())))
        for at, form in enumerate(found)
    ]
    return list(_with_optional(limited))


def _with_optional(found: Sequence[Form]) -> Iterator[Form]:
    """Mark the rules whose names some layers lack."""
    counted: dict[Any, set[tuple[int, ...]]] = defaultdict(set)
    members: dict[Any, set[int]] = defaultdict(set)
    for form in found:
        counted[_counted(form)].update(form.rows)
        members[_counted(form)].update(form.counts)
    for form in found:
        rows = counted[_counted(form)]
        gap = len(next(iter(rows), ())) == 1 and len(rows) <= max(row[0] for row in rows)
        few = bool(form.counts) and len(members[_counted(form)]) > 1
        yield replace(form, optional=few or (bool(form.rows != rows or gap or form.limits) and form.rows != {()}))


def _counted(form: Form) -> Segments:
    """A name up to its last index: the layers that are counted together."""
    numbers = (at for at, one in enumerate(form.file) if isinstance(one, Index) or one == MEMBER)
    last = max(numbers, default=-1)
    return form.file[: last + 1]


def _shapes(form: Form, side: str) -> Iterator[tuple[str, ...]]:
    """The names of one side, with # for every number."""
    segments = form.file if side == "file" else form.model
    for word in form.parts[0 if side == "file" else 1] or ("",):
        text = ".".join("#" if isinstance(one, Index) or one == MEMBER else str(one) for one in segments)
        names = text.replace(PART, word).split(".")
        yield ("step" if form.step else "rule", *("#" if one.isdigit() else one for one in names))


def _limit(found: list[Form], one: int, other: int, side: str, limits: dict[int, dict[int, frozenset[int]]]) -> None:
    """Limit an index by which two forms of one shape differ."""
    forms_of = [found[one], found[other]]
    sides = [[s for s in (f.file if side == "file" else f.model) if _is_number(s)] for f in forms_of]
    if any(f.members is not None for f in forms_of):
        return
    for first, second in zip(*sides, strict=False):
        values = [_values(form, segment, side) for form, segment in zip(forms_of, (first, second), strict=True)]
        if not values[0] & values[1]:
            for at, form, segment in ((one, found[one], first), (other, found[other], second)):
                if isinstance(segment, Index):
                    limits[at][segment.number] = form.values(segment.number)
            return


def _is_number(segment: Segment) -> bool:
    return isinstance(segment, Index) or (isinstance(segment, str) and segment.isdigit())


def _values(form: Form, segment: Segment, side: str) -> frozenset[int]:
    if isinstance(segment, Index):
        return frozenset(n + segment.shift for n in form.values(segment.number))
    return frozenset([int(str(segment))])


# --- fewer rules ---


def joined(found: Sequence[Form]) -> list[Form]:
    """The same rules, fewer: a common beginning, or a choice of words; without the rules that change nothing."""
    return sorted(_chosen([form for form in _folded(found) if not form.keeps]), key=lambda form: form.place)


def _folded(found: Sequence[Form]) -> list[Form]:
    """One rule for all names that begin alike and whose beginning alone changes."""
    result: list[Form] = []
    left = list(found)
    longest = max((len(form.file) for form in found), default=0)
    for length in range(1, longest):
        begun: dict[Segments, list[Form]] = defaultdict(list)
        for form in left:
            begun[form.file[:length]].append(form)
        left = []
        for start, group in begun.items():
            whole = _beginning(start, group, found)
            if whole is None:
                left += group
            else:
                result.append(whole)
    return result + left


def _beginning(start: Segments, group: list[Form], every: Sequence[Form]) -> Form | None:
    """The one rule of a group that begins alike; None where one of them changes more."""
    ends = [form.file[len(start) :] for form in group]
    models = {form.model[: len(form.model) - len(end)] for form, end in zip(group, ends, strict=True)}
    right = all(
        end and form.renames and not form.limits and form.model[len(form.model) - len(end) :] == end
        for form, end in zip(group, ends, strict=True)
    )
    if not right or len(models) != 1 or len(group) < 2:
        return None
    (model,) = models
    numbers = {one for one in start if isinstance(one, Index)}
    if model == start or numbers != {one for one in model if isinstance(one, Index)} or not _owned(model, group, every):
        return None
    words = tuple(dict.fromkeys(str(end[0]) for end in ends))
    short = all(len(end) == 1 and isinstance(end[0], str) for end in ends) and len(words) <= _MOST_WORDS
    tail: Segment = Choice(words) if short else Rest()
    return Form((*start, tail), (*model, tail), optional=_misses(group), place=min(form.place for form in group))


def _misses(group: list[Form]) -> bool:
    return any(form.optional for form in group)


def _owned(model: Segments, group: list[Form], every: Sequence[Form]) -> bool:
    """Whether all names of the model that begin so come from this group."""
    mine = {id(form) for form in group}
    start = _shape(model)
    return all(id(form) in mine or _shape(form.model)[: len(start)] != start for form in every if not form.step)


def _shape(segments: Segments) -> tuple[str, ...]:
    return tuple("#" if _is_number(one) else str(one) for one in segments)


def _chosen(found: list[Form]) -> list[Form]:
    """One rule for names that differ in one word, which both sides have."""
    while True:
        alike: dict[Any, list[tuple[Form, int, int]]] = defaultdict(list)
        for form in found:
            for key, at, there in _open(form):
                alike[key].append((form, at, there))
        best = max(alike.values(), key=len, default=[])
        if len(best) < 2:
            return found
        best = best[:_MOST_WORDS]
        (first, at, there), gone = best[0], {id(form) for form, _, _ in best}
        choice = Choice(tuple(str(form.file[n]) for form, n, _ in best))
        converters = {id(one): one for form, _, _ in best for one in form.converters}
        new = replace(
            first,
            file=(*first.file[:at], choice, *first.file[at + 1 :]),
            model=(*first.model[:there], choice, *first.model[there + 1 :]),
            place=min(form.place for form, _, _ in best),
            converters=tuple(converters.values()),
        )
        place = found.index(first)
        found = [new if n == place else form for n, form in enumerate(found) if n == place or id(form) not in gone]


def _open(form: Form) -> Iterator[tuple[Any, int, int]]:
    """The rule without one word that both sides have, and where the word is."""
    if form.also or form.groups >= _MOST_GROUPS:
        return
    for at, word in enumerate(form.file):
        if not isinstance(word, str) or set(word) & {PART, MEMBER} or word.isdigit() or form.model.count(word) != 1:
            continue
        there = form.model.index(word)
        rest = replace(form, file=(*form.file[:at], "", *form.file[at + 1 :]), model=form.model[:there])
        yield (rest, form.model[there + 1 :]), at, there
