"""The operations of one rule: which groups they join or cut, and whether they fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from keymap.language.amounts import Amount, parse_amount
from keymap.language.pattern import PatternError, Side
from keymap.language.rows import Rows
from keymap.language.rules import Join
from keymap.language.scale import Scale
from keymap.language.view import View, parse_view

__all__ = ["LostGroupError", "compile_operations"]

_ONE_WAY = {"rows": "", "add": "", "take": ", or pad for a table whose last rows are padding"}  # what else to do
_NEEDS = {  # an option -> the operations that it goes with
    "parts": ("concat",),
    "order": ("concat",),
    "axis": ("split", "unstack"),
    "each": ("split", "unstack"),
}


class LostGroupError(PatternError):
    """A group of the source that the target does not use; ``number`` counts from the first prefix."""

    def __init__(self, number: int, shown: int) -> None:
        self.number = number
        super().__init__(
            f"group {shown} is captured and not used by the target: several keys would become one. "
            f"Use it as \\{shown}, or say how they join: concat, stack or rows"
        )


class _Groups(NamedTuple):
    """The groups that a rule joins and cuts, and the operations that do it."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    join: str | None
    cut: str | None


def compile_operations(
    options: Mapping[str, Any], source: Side, targets: tuple[Side, ...], groups_before: int
) -> dict[str, Any]:
    """The fields of a `Rule` that its operations give.

    Args:
        options: the rule as written, with ``to``.
        source, targets: its sides.
        groups_before: how many groups the prefixes of its table have.

    Raises:
        PatternError: operations that do not fit together, or do not fit the groups.
        ViewError: a view that is written wrong.
    """
    before = parse_view(options["view"]) if "view" in options else None
    then = parse_view(options["then"]) if "then" in options else None
    after = parse_view(options["each"]) if "each" in options else None
    groups = _groups(options, source, targets, groups_before)
    join = _join(groups.join, options, source, groups.lost, before) if groups.join else None
    cut = _cut(groups.cut, options, targets[0], groups.gained, then or before) if groups.cut else None
    _check_options(options, source)
    take, pad = _rows(options)
    return {
        "take": take,
        "before": before,
        "join": join,
        "then": then,
        "cut": cut,
        "after": after,
        "optional": bool(options.get("optional")),
        "oneway": bool(options.get("oneway")),
        "rest": bool(options.get("rest")),
        "add": _added(options["add"]) if "add" in options else None,
        "arithmetic": _scale(options),
        "pad": pad,
    }


def _rows(options: Mapping[str, Any]) -> tuple[Rows | None, Rows | None]:
    """The rows that a rule takes, and those that it pads to."""
    pad = options.get("pad", 0)
    if "take" not in options:
        if not isinstance(pad, dict):
            if pad:
                raise PatternError(f"pad: {pad} is the inverse of take: [0, text.vocab]: add take; or write pad: "
                                   f"{{multiple: {pad}, keep: text.vocab}} to add the rows on the way in")  # fmt: skip
            return None, None
        return None, Rows(0, parse_amount(pad["keep"]), pad["multiple"])
    if isinstance(pad, dict):
        raise PatternError("take and pad: {multiple, keep} are inverses of each other: remove one")
    start, stop = options["take"][0], None if options["take"][1] is None else parse_amount(options["take"][1])
    if isinstance(stop, int) and start >= stop:
        raise PatternError(f"take: {options['take']} takes no row: give the first row, and the one after the last")
    if pad and (start or stop is None):
        raise PatternError("pad: rows of zeros lie at the end: write take: [0, text.vocab], or a number for the fact")
    return Rows(start, stop, pad), None


def _scale(options: Mapping[str, Any]) -> Scale | None:
    """The arithmetic of a rule."""
    if "times" not in options and "plus" not in options:
        return None
    times, term = options.get("times", 1.0), float(options.get("plus", 0.0))
    if isinstance(times, str):
        return Scale.of_root(times, term)
    factor = float(times)
    if not options.get("oneway") and (not factor or not isfinite(1 / factor) or not isfinite(term)):
        raise PatternError(f"times: {times} cannot be undone: add oneway: true")
    return Scale(factor, term)


def _groups(options: Mapping[str, Any], source: Side, targets: tuple[Side, ...], groups_before: int) -> _Groups:
    join, cut = _one_of(options, "concat", "stack", "rows"), _one_of(options, "split", "unstack")
    used = set(targets[0].variables)
    if any(set(side.variables) != used for side in targets):
        raise PatternError("tied targets must use the same groups")
    lost = tuple(name for name in source.variables if name not in used)
    gained = tuple(name for name in targets[0].variables if name not in source.variables)
    if lost and not join:
        number = int(lost[0])
        raise LostGroupError(number, number - groups_before if number > groups_before else number)
    if gained and not cut:
        raise PatternError("the target has a group of its own: say how the tensor is cut, with split or unstack")
    if join and not lost:
        raise PatternError(f"{join} needs a group (a|b) that the target lacks")
    if cut and not gained:
        wanted = "<name> for unstack" if cut == "unstack" else "(a|b) for split"
        raise PatternError(f"{cut} needs a group of the target's own: {wanted}")
    return _Groups(lost, gained, join, cut)


def _one_of(options: Mapping[str, Any], *names: str) -> str | None:
    """The one of these operations that a rule has; None if it has none."""
    found = [name for name in names if name in options]
    if len(found) > 1:
        raise PatternError(f"{' and '.join(found)}: a rule has one of them; remove one")
    return found[0] if found else None


def _check_options(options: Mapping[str, Any], source: Side) -> None:
    for name, needs in _NEEDS.items():
        if name in options and not set(needs) & set(options):
            raise PatternError(f"{name} goes with {' or '.join(needs)}: add {needs[0]}, or remove {name}")
    one_way = sorted(name for name in _ONE_WAY if name in options and not (name == "take" and "pad" in options))
    if one_way and not options.get("oneway"):
        raise PatternError(f"{', '.join(one_way)} cannot be undone: add oneway: true{_ONE_WAY[one_way[-1]]}")
    if options.get("rest") and not any(slot.kind == "rest" for slot in source.slots):
        raise PatternError("rest: true needs a pattern with (.+)")


def _added(text: str) -> tuple[str, int | None]:
    """The key, and the row of it, that ``add`` names."""
    key, bracket, row = text.partition("[")
    if bracket and re.fullmatch("[0-9]{1,9}]", row) is None:
        raise PatternError(f"add: {text!r}: write a key, or key[0] for one row of it")
    return key, int(row[:-1]) if bracket else None


def _join(kind: str, options: Mapping[str, Any], source: Side, lost: tuple[str, ...], before: View | None) -> Join:
    slots = {name: slot for slot in source.slots for name in slot.names}
    if any(slots[name].kind not in ("int", "alts") or slots[name].base for name in lost):
        raise PatternError(f"{kind} counts its members by (\\d+) or (a|b) groups only")
    # The alternatives come last: they are joined first, then the indices from the last to the first.
    ordered = sorted(lost, key=lambda name: slots[name].kind == "alts")
    if sum(slots[name].kind == "alts" for name in lost) > 1:
        raise PatternError(f"{kind} joins one group of alternatives; the target lacks {len(lost)}")
    members = _members(options, tuple(value for value, _ in slots[ordered[-1]].options))
    if kind in ("concat", "rows") and not members:
        raise PatternError(f"{kind} needs a group of alternatives (a|b); for an index (\\d+) use stack")
    lengths = _lengths("parts", options.get("parts", ()), len(members), "members")
    ranges = tuple((int(a), None if b is None else int(b)) for a, b in options.get("rows", ()))
    if ranges and len(ranges) != len(members):
        raise PatternError(f"rows: one range for each of {len(members)} members")
    axis = 0 if kind == "rows" else _axis(options[kind], before, "`view`")
    spans = [(slots[name].low, slots[name].high) for name in ordered]
    bounded = tuple(spans) if any(span != (0, None) for span in spans) else ()
    return Join(kind, axis, tuple(ordered), members, lengths, ranges, bounded)


def _members(options: Mapping[str, Any], members: tuple[str, ...]) -> tuple[str | None, ...]:
    """The members of a join in order; None is a member of zeros."""
    if "order" not in options:
        return members
    if sorted(str(m) for m in options["order"] if m != 0) != sorted(members):
        raise PatternError(f"order lists {options['order']}; it must name each of {list(members)} once")
    return tuple(None if m == 0 else str(m) for m in options["order"])


def _lengths(name: str, written: Sequence[int | str], count: int, of: str) -> tuple[Amount | None, ...]:
    """The lengths of parts; empty for equal parts."""
    if written and (len(written) != count or written.count("*") > 1):
        shown = f"[{', '.join(map(str, written))}]"
        raise PatternError(f"{name} {shown}: one length for each of {count} {of}, at most one '*'")
    return tuple(None if one == "*" else parse_amount(one) for one in written)


def _cut(kind: str, options: Mapping[str, Any], target: Side, gained: tuple[str, ...], view: View | None) -> Join:
    if len(gained) > 1:
        raise PatternError(f"{kind} writes one group of the target's own; this target has {len(gained)}")
    axis = _axis(options.get("axis", 0), view, "the view before it")
    if kind == "unstack":
        name = options["unstack"]
        if gained != (name,):
            raise PatternError(f"unstack: {name} counts an index: the target needs <{name}>")
        return Join("stack", axis, gained)
    options_of = next(slot for slot in target.slots if slot.names == gained).options
    lengths = _lengths("split", options["split"], len(options_of), "alternatives")
    return Join("concat", axis, gained, tuple(value for value, _ in options_of), lengths)


def _axis(axis: int | str, before: View | None, where: str) -> int:
    """The number of an axis, from its number or from its name on the right side of a view."""
    if isinstance(axis, int):
        return axis
    if before is None or (axis,) not in before.right:
        axes = [group[0] for group in before.right if len(group) == 1] if before is not None else []
        known = f"; axes there: {', '.join(axes)}" if axes else "; write its number, for example 0"
        raise PatternError(f"axis {axis!r} is not a single axis on the right side of {where}{known}")
    return before.right.index((axis,))
