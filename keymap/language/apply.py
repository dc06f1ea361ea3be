"""Applies rules: from one set of keys to another, moving layouts and touching no element."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import count_of
from keymap.language.layout import Layout, Piece, cut, place, renamed, whole
from keymap.language.pattern import Side
from keymap.language.rows import padded, taken
from keymap.language.rules import Check, Fault, Join, Rule, RuleError, RuleTable, Sizes, Step

__all__ = ["Applied", "apply_rules"]

_MAX_LACKING = 10_000  # members of a join that the file lacks
_MAX_SLICES = 10_000  # additional keys that tensors are cut into ...
_MAX_SLICES_OF_EACH = 100  # ... so many more for each key of the file ...
_ELEMENTS_OF_SLICE = 1000  # ... and one more for so many elements
_MAX_MADE_UP = 8  # zeros that members without a key may add, for each element of the others


@dataclass(slots=True, eq=False, repr=False)
class Applied:
    """The outcome of one set of rules for one set of keys."""

    out: dict[str, Layout] = field(default_factory=dict)
    left: dict[str, Layout] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _sizes(rule: Rule, facts: Mapping[str, int]) -> Sizes:
    return {name: facts.get(size, size) if isinstance(size, str) else size for name, size in rule.sizes.items()}


def _in_order(join: Join, found: Iterable[tuple[str, ...]]) -> list[tuple[str | None, ...]]:
    """Every member that a join needs, in order: the indices' product with the alternatives."""
    keys = list(found)
    product: list[tuple[str | None, ...]] = [()]
    for i in range(len(join.variables)):
        column: list[str | None]
        if i == len(join.variables) - 1 and join.members:
            column = list(join.members)
        else:
            indices = sorted({int(key[i]) for key in keys})
            gap = next((n for n, index in enumerate(indices, join.span(i)[0]) if n != index), None)
            if gap is not None:
                raise RuleError(f"the index has a gap: {indices[-1]} exists, {gap} does not")
            column = [str(n) for n in indices]
        if len(product) * len(column) > len(keys) + _MAX_LACKING:
            raise RuleError(f"the join lacks {len(product) * len(column) - len(keys)} members or more")
        product = [(*row, cell) for row in product for cell in column]
    return product


def _common_dtype(members: list[Layout]) -> torch.dtype:
    """The dtype that holds the values of all members."""
    kinds = {(m.dtype.is_floating_point, m.dtype.is_complex, m.dtype == torch.bool) for m in members}
    if len(kinds) > 1:
        raise RuleError(f"members have unlike dtypes: {', '.join(str(m.dtype) for m in members)}")
    common = members[0].dtype
    for member in members[1:]:
        if member.dtype != common:
            narrow = 1 in (common.itemsize, member.dtype.itemsize) and common.is_floating_point
            try:
                common = torch.float32 if narrow else torch.promote_types(common, member.dtype)
            except RuntimeError:  # torch has no common dtype for all unsigned integers
                raise RuleError(f"members have unlike dtypes: {common}, {member.dtype}") from None
    return common


def _joined(join: Join, members: list[Layout]) -> Layout:
    """The members of a join, in order, as one tensor."""
    shapes = {m.shape for m in members}
    first = members[0]
    dtype = _common_dtype(members)
    if join.kind == "rows":
        return _joined_rows(join, members, dtype)
    if join.kind == "stack":
        if len(shapes) > 1:
            raise RuleError(f"a stack needs equal shapes, got {_list(m.shape for m in members)}")
        members = [m._replace(shape=(*m.shape[: join.axis], 1, *m.shape[join.axis :])) for m in members]
    axis = join.axis
    if axis >= len(members[0].shape):
        raise RuleError(f"axis {axis} does not exist in {list(first.shape)}")
    others = {(*m.shape[:axis], *m.shape[axis + 1 :]) for m in members}
    if len(others) > 1 or len({len(m.shape) for m in members}) > 1:
        raise RuleError(f"members differ in more than axis {axis}: {_list(m.shape for m in members)}")
    total = sum(m.shape[axis] for m in members)
    if join.kind == "concat":
        want = [b - a for a, b in join.bounds(total)]
        got = [m.shape[axis] for m in members]
        if want != got:
            declared = "equal parts" if not join.lengths else f"parts {join.written_lengths}"
            raise RuleError(f"{declared} are declared on axis {axis}, the members are {got} long")
    shape = tuple(total if d == axis else n for d, n in enumerate(members[0].shape))
    joined: list[Piece] = []
    start = 0
    for member in members:
        joined += place(member, shape, axis, start)
        start += member.shape[axis]
    return Layout(shape, dtype, tuple(joined))


def _joined_rows(join: Join, members: list[Layout], dtype: torch.dtype) -> Layout:
    """Members of one shape, merged by ranges of rows."""
    shape = members[0].shape
    if any(member.shape != shape for member in members):
        raise RuleError(f"rows need equal shapes, got {_list(m.shape for m in members)}")
    total = shape[0] if shape else 0
    covered = [(start, total if stop is None else stop) for start, stop in join.ranges]
    ends = [0, *(stop for _, stop in covered)]
    if ends[-1] != total or any(a != b or a >= c for (a, c), b in zip(covered, ends, strict=False)):
        raise RuleError(f"rows {[list(c) for c in covered]} do not fill {total} rows, each once")
    pieces: list[Piece] = []
    for member, (start, stop) in zip(members, covered, strict=True):
        pieces += place(cut(member, 0, start, stop), shape, 0, start)
    return Layout(shape, dtype, tuple(pieces))


def _list(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _join_all(rule: Rule, join: Join, members: Mapping[tuple[str, ...], Layout]) -> Layout:
    """Join over the alternatives first, then over each index, the last one first."""
    rows = _in_order(join, members)
    absent = [row for row in rows if None not in row and row not in members]
    if absent:
        raise RuleError(f"the join lacks {len(absent)} of {len(rows)} members")
    model = next(iter(members.values()))
    made_up = whole(None, model.shape, model.dtype)
    level = [(row, made_up if None in row else members[tuple(cell or "" for cell in row)]) for row in rows]
    for depth in range(len(join.variables), 0, -1):
        now = join if depth == len(join.variables) else Join("stack", 0, join.variables)
        merged: dict[tuple[str | None, ...], list[Layout]] = {}
        for row, layout in level:
            merged.setdefault(row[:-1], []).append(layout)
        level = [(row, _joined(now, group)) for row, group in merged.items()]
    return level[0][1]


def _cut_all(join: Join, layout: Layout) -> Iterator[tuple[dict[str, str], Layout, bool]]:
    """The parts of a whole: (captures, layout, is it a member of zeros, which the file lacks?)."""
    yield from _slices(join, 0, 0 if len(join.variables) > 1 else join.axis, layout, {})


def _slices(
    join: Join, at: int, axis: int, now: Layout, values: dict[str, str]
) -> Iterator[tuple[dict[str, str], Layout, bool]]:
    """The parts along the variable number ``at``, and along those after it."""
    last = at == len(join.variables) - 1
    _check_cut(join, axis, now)
    members = join.members if last else ()
    if members and join.kind == "concat":
        for member, (start, stop) in zip(members, join.bounds(now.shape[axis]), strict=True):
            yield {**values, join.variables[at]: member or ""}, cut(now, axis, start, stop), member is None
        return
    first, end = join.span(at)
    if end is not None and first + now.shape[axis] > end:
        raise RuleError(f"axis {axis} of {list(now.shape)} is too long for the indices {first} to {end - 1}")
    names = members or tuple(str(n + first) for n in range(now.shape[axis]))
    if len(names) != now.shape[axis]:
        raise RuleError(f"axis {axis} of {list(now.shape)} is not {len(names)} long")
    for number, name in enumerate(names):
        taken = cut(now, axis, number, number + 1)
        taken = taken._replace(shape=(*taken.shape[:axis], *taken.shape[axis + 1 :]))
        step = {**values, join.variables[at]: name or ""}
        if last:
            yield step, taken, name is None
        else:
            yield from _slices(join, at + 1, 0 if at + 2 < len(join.variables) else join.axis, taken, step)


def _check_cut(join: Join, axis: int, layout: Layout) -> None:
    if axis >= len(layout.shape) or not layout.shape[axis]:
        raise RuleError(f"axis {axis} of {list(layout.shape)} does not exist or is empty: nothing to cut")
    most = _MAX_SLICES + prod(layout.shape) // _ELEMENTS_OF_SLICE
    if join.kind == "stack" and layout.shape[axis] > most:
        raise RuleError(f"axis {axis} of {list(layout.shape)} is more than {most} long, too much to cut apart")


class _Made(NamedTuple):
    """A tensor that a rule makes: the captures that its key has besides, and whether it must hold zeros."""

    values: Mapping[str, str]
    layout: Layout
    zeros: bool


def _make(rule: Rule, members: Mapping[tuple[str, ...], Layout], facts: Mapping[str, int]) -> Iterator[_Made]:
    """The operations of a rule, in their order."""
    sizes = _sizes(rule, facts)
    if rule.take is not None:
        members = {key: taken(layout, rule.take, facts) for key, layout in members.items()}
    if rule.before is not None:
        members = {key: rule.before.apply(layout, sizes) for key, layout in members.items()}
    now = next(iter(members.values()))
    if rule.join is not None:
        now = _join_all(rule, rule.join.within(facts), members)
    zeros = sum(piece.numel for piece in now.pieces if piece.source is None) if rule.join is not None else 0
    if zeros > _MAX_MADE_UP * (prod(now.shape) - zeros):
        raise RuleError(f"{zeros} of {prod(now.shape)} elements would be zeros that no key holds")
    if rule.arithmetic is not None and not rule.arithmetic.undo:
        now = rule.arithmetic.apply(now, facts)
    if rule.then is not None:
        now = rule.then.apply(now, sizes)
    if rule.arithmetic is not None and rule.arithmetic.undo:
        now = rule.arithmetic.apply(now, facts)
    parts = _cut_all(rule.cut.within(facts), now) if rule.cut is not None else iter([({}, now, False)])
    for values, layout, zeros in parts:
        made = layout if rule.after is None else rule.after.apply(layout, sizes)
        yield _Made(values, made if rule.pad is None else padded(made, rule.pad, facts), zeros)


class _Blocks:
    """Reuses what a rule made before: repeated blocks differ only in the names of their sources."""

    def __init__(self, facts: Mapping[str, int]) -> None:
        self.facts = facts
        self.made: dict[object, list[_Made]] = {}

    def make(self, rule: Rule, members: Mapping[tuple[str, ...], Layout]) -> Iterable[_Made]:
        """As `_make`."""
        like: list[object] = [id(rule)]
        names: dict[str, str | None] = {}
        for row, layout in members.items():
            if not layout.copied_whole:
                return _make(rule, members, self.facts)
            like += (row, layout.shape, layout.dtype)
            names[str(len(names))] = layout.pieces[0].source
        key = tuple(like)
        if key not in self.made:
            nameless = {row: whole(n, m.shape, m.dtype) for n, (row, m) in zip(names, members.items(), strict=True)}
            self.made[key] = list(_make(rule, nameless, self.facts))
        return [_Made(made.values, renamed(made.layout, names), made.zeros) for made in self.made[key]]


def _with_sum(add: tuple[str, int | None], layout: Layout, tensors: Mapping[str, Layout]) -> Layout:
    """A layout, and a tensor of the file (a row of it) added to it."""
    key, row = add
    if key not in tensors:
        raise RuleError(f"it adds {key!r}, which is not in the file")
    other = tensors[key]
    if row is not None:
        if not other.shape or row >= other.shape[0]:
            raise RuleError(f"it adds row {row} of {key!r}, whose shape is {list(other.shape)}")
        other = cut(other, 0, row, row + 1)
    if [n for n in other.shape if n != 1] != [n for n in layout.shape if n != 1]:
        raise RuleError(f"it adds {key!r} of shape {list(other.shape)} to {list(layout.shape)}")
    return layout._replace(pieces=layout.pieces + tuple(p._replace(add=True) for p in other.pieces))


def apply_rules(
    table: RuleTable, tensors: Mapping[str, Layout], facts: Mapping[str, int], pass_others: bool = False
) -> Applied:
    """Apply rules to all keys at once, so that cycles of names are safe.

    Args:
        table: the rules, in the direction wanted.
        tensors: layouts by key; not changed.
        facts: lengths that views may ask for.
        pass_others: keys that no rule owns keep their name; else they are returned as ``left``.
    """
    result = Applied()
    table = table.within(facts)
    asks, find = table.facts_of_names, table.find
    lacking: dict[int, list[Fault]] = {}
    jobs: dict[tuple[Rule, tuple[str, ...]], _Job] = {}
    for key, layout in tensors.items():
        found = find(key)
        if found is None:
            if pass_others:
                _put(result, key, layout, None, (key,))
            else:
                result.left[key] = layout
            continue
        rule, values = found
        if asks and rule.facts_of_names:
            names = ", ".join(f"{name!r}: ..." for name in rule.facts_of_names)
            fault = _fault(
                rule, values, {(): key}, {(): layout}, f"which keys it owns is not known: pass facts={{{names}}}"
            )
            lacking.setdefault(id(rule), []).append(fault)
            if pass_others:  # so that the evidence of a format can find it
                _put(result, key, layout, None, (key,))
            continue
        if rule.renames:
            _put(result, key if rule.keeps else rule.targets[0].write(values), layout, rule, (key,))
            continue
        row = tuple([values.pop(name) for name in rule.join.variables]) if rule.join is not None else ()
        number = (rule, tuple(values.values()))
        job = jobs.get(number)
        if job is None:
            jobs[number] = job = _Job(rule, values, {})
        job.keys[row] = key
    result.faults += [_one_fault(faults) for faults in lacking.values()]
    _run_jobs(jobs.values(), tensors, _Blocks(facts), result)
    return result


class _Job(NamedTuple):
    """One application of a rule: its captures, and the keys by the values that number the members of its join."""

    rule: Rule
    values: dict[str, str]
    keys: dict[tuple[str, ...], str]


def _run_jobs(jobs: Iterable[_Job], tensors: Mapping[str, Layout], blocks: _Blocks, result: Applied) -> None:
    """Apply the operations of every job; the errors of one rule become one fault."""
    elements = sum(prod(layout.shape) for layout in tensors.values())
    made, most = 0, _MAX_SLICES + _MAX_SLICES_OF_EACH * len(tensors) + elements // _ELEMENTS_OF_SLICE  # additional keys
    wrong: dict[int, list[Fault]] = {}
    notes: dict[int, list[str]] = {}
    for job in jobs:
        rule, keys = job.rule, job.keys
        members = {row: tensors[key] for row, key in keys.items()}
        twins = list(_tie_checks(job, rule.tied, tensors)) if rule.tied is not None else []
        if twins:  # the other key's values are written; these must be the same
            result.checks += twins
            continue
        try:
            outputs = [
                (
                    None if one.zeros else side.write({**job.values, **one.values}),
                    one.layout if rule.add is None else _with_sum(rule.add, one.layout, tensors),
                )
                for one in blocks.make(rule, members)
                for side in rule.targets
            ]
            made += max(len(outputs) - len(keys), 0)
            if made > most:
                raise RuleError(f"with it, tensors are cut into more than {most} keys")
        except ValueError as error:  # of a rule, a view or a piece
            fault = _fault(rule, job.values, keys, members, str(error))
            wrong.setdefault(id(rule), []).append(fault._replace(fatal=made > most))
            if made > most:
                break
            continue
        if rule.take is not None or rule.pad is not None:
            notes.setdefault(id(rule), []).extend(_row_notes(job, tensors, outputs, blocks.facts))
        for target, layout in outputs:
            if target is None:
                name = f"the slice of {', '.join(keys.values())} that the format has no key for"
                result.checks.append(Check(name, layout, 0, "it is left out"))
            else:
                _put(result, target, layout, rule, tuple(keys.values()))
    result.faults += [_one_fault(faults) for faults in wrong.values()]
    for texts in (texts for texts in notes.values() if texts):
        result.notes.append(texts[0] + (f" (and {len(texts) - 1} more tensors of this rule)" if texts[1:] else ""))


def _row_notes(
    job: _Job, tensors: Mapping[str, Layout], outputs: Iterable[tuple[str | None, Layout]], facts: Mapping[str, int]
) -> Iterator[str]:
    """What a rule does to padding: rows that it leaves out, and rows of zeros that it adds."""
    take, pad = job.rule.take, job.rule.pad
    for key in job.keys.values() if take is not None and take.multiple else ():
        total, kept = tensors[key].shape[0], take.end(facts) if take is not None else None
        if kept is not None and kept < total:
            yield f"{key}: rows {kept} to {total - 1} are padding and left out (pad: {take and take.multiple})"
    for target, layout in outputs if pad is not None else ():
        row = prod(layout.shape[1:])
        added = sum(p.numel for p in layout.pieces if p.source is None and not p.add) // row if row else 0
        if added and target is not None:
            yield f"{target}: {count_of(added, 'row')} of zeros added at the end (pad: {pad and pad.multiple})"


def _tie_checks(job: _Job, tied: Side, tensors: Mapping[str, Layout]) -> Iterator[Check]:
    """That the keys of a job hold what the tensors do to which they are tied."""
    lost = job.rule.join.variables if job.rule.join is not None else ()
    for row, key in job.keys.items():
        twin = tied.write({**job.values, **dict(zip(lost, row, strict=True))})
        if twin in tensors:
            yield Check(key, tensors[key], tensors[twin], f"it is tied to {twin}")


def _one_fault(faults: list[Fault]) -> Fault:
    """The faults of one rule, which has one for each layer, as one: the first, and how many more."""
    first, more = faults[0], len(faults) - 1
    if not more:
        return first
    sources = tuple(source for fault in faults for source in fault.sources)
    text = f"{first.text} (and {more} more of this rule)"
    return first._replace(text=text, sources=sources, fatal=any(fault.fatal for fault in faults))


def _put(result: Applied, target: str, layout: Layout, rule: Rule | None, sources: tuple[str, ...]) -> None:
    """Enter a target; ``rule`` is None for a key that keeps its name."""
    if target in result.out:
        first, second = result.out[target].sources, layout.sources
        why = f"{rule.place}: rule {rule.text}: " if rule is not None else ""
        text = f"{why}both {', '.join(first)} and {', '.join(second)} become {target!r}; keep one of them in the file"
        result.faults.append(Fault(text, (*first, *second), fatal=True))
        return
    result.out[target] = layout
    if rule is not None:
        result.steps.append((rule, sources, target))


def _fault(
    rule: Rule,
    values: Mapping[str, str],
    keys: Mapping[tuple[str, ...], str],
    members: Mapping[tuple[str, ...], Layout],
    what: str,
) -> Fault:
    shapes = ", ".join(f"{key} {list(members[row].shape)}" for row, key in list(keys.items())[:6])
    missing: list[str] = []
    if rule.join is not None:
        try:
            rows = [row for row in _in_order(rule.join, keys) if None not in row and row not in keys]
        except RuleError:  # a gap in an index, which `what` names
            rows = []
        for row in rows[:6]:
            named = {n: v for n, v in zip(rule.join.variables, row, strict=True) if v is not None}
            missing.append(rule.source.write({**values, **named}))
    lacks = f"; missing: {', '.join(missing)}" if missing else ""
    text = f"{rule.place}: rule {rule.text}: {what} (from {shapes}{lacks})"
    return Fault(
        text, tuple(source for row, layout in members.items() for source in layout.named(keys[row])), rule.tower
    )
