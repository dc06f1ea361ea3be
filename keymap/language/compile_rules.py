"""Rules, evidence and single patterns of a mapping file, compiled; every fault is collected with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from keymap.errors import MappingError, some
from keymap.language.format import (
    Clue,
    Evidence,
    Ignored,
)
from keymap.language.pattern import Effort, PatternError, Side
from keymap.language.pattern_syntax import parse_source, parse_target
from keymap.language.rules import Join, Rule
from keymap.language.schema import schema_faults
from keymap.language.view import View, ViewError, parse_view
from keymap.language.yaml_marks import Marked
from keymap.language.yaml_marks import Path as Where

__all__ = ["Compiler"]

_MAX_RULES = 1000  # rules of a file, with those of its tables as often as they are used, and other patterns
_MOST_NESTED = 8  # tables within tables


class Compiler:
    """Compiles one file; collects every fault on the way."""

    def __init__(self, marked: Marked, library: Callable[[str], Marked | None]) -> None:
        self.marked = marked
        self.faults: list[str] = []
        self.effort, self.entries = Effort(), 0
        self.lookups: dict[str, dict[str, str]] = {}
        self.tables: dict[str, tuple[Marked, Where]] = {}
        self.sizes: dict[str, int | str] = dict(marked.data.get("sizes", {}))
        shared = [(("uses", i), name) for i, name in enumerate(marked.data.get("uses", []))]
        self.facts: dict[str, Any] = {}
        self.measures: dict[str, Any] = {}
        self.configs: dict[str, Any] = {}
        for where, name in shared:
            other = library(name)
            if other is None:
                self.fault(marked, where, f"there is no mapping {name!r} to use tables of")
                continue
            if schema_faults(other):
                raise MappingError(f"{other.file} does not follow schemas/mapping.schema.json", schema_faults(other))
            self._collect(other)
        self._collect(marked)

    def _collect(self, marked: Marked) -> None:
        for name in marked.data.get("tables", {}):
            self.tables[name] = (marked, ("tables", name))
        for name, table in marked.data.get("lookups", {}).items():
            self.lookups[name] = {key: str(value) for key, value in table.items()}
        self.facts |= marked.data.get("facts", {})
        self.measures |= marked.data.get("measures", {})
        self.configs |= marked.data.get("configs", {})

    def fault(self, marked: Marked, where: Where, what: str) -> None:
        self.faults.append(f"{marked.at(where)}: {what}")

    def unknown(self, marked: Marked, where: Where, what: str, name: str, known: Iterable[str]) -> None:
        """A name that no table of the file, or of those that it uses, declares."""
        self.fault(
            marked, where, f"there is no {what} {name!r}; known: {some(sorted(known), 20) or 'none is declared'}"
        )

    def count(self, marked: Marked, where: Where) -> None:
        """One more rule or pattern. Raises MappingError where there are too many."""
        self.entries += 1
        if self.entries > _MAX_RULES:
            what = f"{marked.at(where)}: the file has more than {_MAX_RULES} rules and patterns; use alternatives"
            raise MappingError(f"{self.marked.file}: the mapping is too large", [*self.faults, what])

    def side(self, text: str, where: Where) -> Side | None:
        self.count(self.marked, where)
        try:
            return parse_source(text, effort=self.effort)
        except PatternError as error:
            self.fault(self.marked, where, str(error))
            return None

    def evidence(self, data: Mapping[str, Any], where: Where) -> Evidence:
        def clues(name: str) -> tuple[Clue, ...]:
            found = []
            for number, item in enumerate(data.get(name, [])):
                text, ndim = (item, None) if isinstance(item, str) else (item["key"], item.get("ndim"))
                side = self.side(text, (*where, name, number))
                if text == "(.+)":
                    self.fault(self.marked, (*where, name, number), "(.+) matches every file: it is no evidence")
                elif side is not None:
                    found.append(Clue(side, ndim))
            return tuple(found)

        return Evidence(clues("all"), clues("any"), clues("none"))

    def words(self, data: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
        """The words of a fact or a place: as given, or those of a lookup."""
        words: Any = data.get("words", {})
        if not isinstance(words, str):
            return dict(words)
        if words not in self.lookups:
            self.unknown(self.marked, where, "lookup", words, self.lookups)
        return self.lookups.get(words, {})

    def ignored(self, key: str, value: str | Mapping[str, str]) -> Ignored | None:
        side = self.side(key, ("ignore", key))
        if side is None or isinstance(value, str):
            return Ignored(side, str(value)) if side is not None else None
        twin = None
        if "same_as" in value:
            try:
                twin = parse_target([(value["same_as"], 0)], side, self.lookups, effort=self.effort)
            except PatternError as error:
                self.fault(self.marked, ("ignore", key), f"same_as: {error}")
        return Ignored(side, value["why"], twin)

    def by_pattern(self, field: str) -> Iterator[tuple[Side, Any]]:
        """The entries of a field whose keys are patterns."""
        for key, value in self.marked.data.get(field, {}).items():
            side = self.side(key, (field, key))
            if side is not None:
                yield side, value

    # --- rules ---

    def rules(self, data: Mapping[str, Any], marked: Marked, where: Where, tower: str) -> Iterable[Rule]:
        for key, value in data.items():
            if key != "when" or isinstance(value, str):
                yield from self.rule(key, value, marked, (*where, key), tower, "", (), {}, ())

    def rule(
        self,
        key: str,
        value: Any,
        marked: Marked,
        where: Where,
        tower: str,
        source_prefix: str,
        target_prefix: tuple[tuple[str, int], ...],
        sizes: Mapping[str, int | str],
        within: tuple[str, ...],
    ) -> Iterable[Rule]:
        self.count(marked, where)
        options: dict[str, Any] = {"to": value} if isinstance(value, str) else dict(value)
        targets = options["to"] if isinstance(options["to"], list) else [options["to"]]
        sizes = {**sizes, **dict(options.get("sizes", {}))}
        groups_before = source_prefix.count("(")
        if "table" in options:
            name = options["table"]
            wrong = name not in self.tables or name in within or len(within) >= _MOST_NESTED
            if wrong or len(targets) > 1 or set(options) - {"to", "table", "sizes"}:
                known = some(sorted(self.tables), 20) or "none is declared"
                self.fault(
                    marked,
                    where,
                    f"table {name!r}: it must exist (known: {known}), not contain itself, lie in at most "
                    f"{_MOST_NESTED} others, and a rule with a table has one target and no operation besides sizes",
                )
                return
            home, path = self.tables[name]
            prefix = (*target_prefix, (targets[0], groups_before))
            for inner, inner_value in home.data["tables"][name].items():
                yield from self.rule(
                    inner, inner_value, home, (*path, inner), tower, source_prefix + key, prefix, sizes,
                    (*within, name),
                )  # fmt: skip
            return
        try:
            source = parse_source(source_prefix + key, effort=self.effort)
            sides = tuple(
                parse_target(
                    (*target_prefix, (t, groups_before)), source, self.lookups, options.get("unstack"), self.effort
                )
                for t in targets
            )
            text = _text(key, value)
            yield self._operations(options, source, sides, marked.at(where), text, tower, sizes, groups_before)
        except (PatternError, ViewError) as error:
            self.fault(marked, where, str(error))

    def _operations(
        self,
        options: dict[str, Any],
        source: Side,
        targets: tuple[Side, ...],
        place: str,
        text: str,
        tower: str,
        sizes: Mapping[str, int | str],
        groups_before: int,
    ) -> Rule:
        before = parse_view(options["view"]) if "view" in options else None
        then = parse_view(options["then"]) if "then" in options else None
        joins = [name for name in ("concat", "stack", "rows") if name in options]
        cuts = [name for name in ("split", "unstack") if name in options]
        if len(joins) > 1 or len(cuts) > 1:
            raise PatternError(f"{' and '.join(joins if len(joins) > 1 else cuts)}: a rule has one of them")
        held = set(targets[0].variables)
        if any(set(side.variables) != held for side in targets):
            raise PatternError("tied targets must use the same groups")
        lost = tuple(name for name in source.variables if name not in held)
        gained = tuple(name for name in targets[0].variables if name not in source.variables)
        if lost and not joins:
            number = int(lost[0]) - groups_before
            shown = f"group {number}" if number > 0 else f"group {lost[0]} of the prefix"
            raise PatternError(
                f"{shown} is captured and not used by the target: several keys would become one. "
                f"Use it as \\{number if number > 0 else lost[0]}, or say how they join: concat, stack or rows"
            )
        if gained and not cuts:
            raise PatternError("the target has a group of its own: say how the tensor is cut, with split or unstack")
        if joins and not lost:
            raise PatternError(f"{joins[0]} needs a group (a|b) that the target lacks")
        if cuts and not gained:
            wanted = "<name> for unstack" if cuts[0] == "unstack" else "(a|b) for split"
            raise PatternError(f"{cuts[0]} needs a group of the target's own: {wanted}")
        join = self._join(joins[0], options, source, lost, before) if joins else None
        part = self._cut(cuts[0], options, targets[0], gained) if cuts else None
        for name, needs in (("parts", "concat"), ("order", "concat"), ("axis", "split")):
            if name in options and needs not in options and not (name == "axis" and "unstack" in options):
                raise PatternError(f"{name} goes with {needs}")
        one_way = {"take", "rows", "add", "times", "plus"} & set(options)
        if one_way and not options.get("oneway"):
            raise PatternError(f"{', '.join(sorted(one_way))} cannot be undone: say oneway: true")
        if "take" in options and options["take"][1] is not None and options["take"][0] >= options["take"][1]:
            raise PatternError(f"take: {options['take']} takes no row: give the first row, and the one after the last")
        if options.get("rest") and not any(slot.kind == "rest" for slot in source.slots):
            raise PatternError("rest: true needs a pattern with (.+)")
        add = None
        if "add" in options:
            key, bracket, row = options["add"].partition("[")
            if bracket and re.fullmatch("[0-9]{1,9}]", row) is None:
                raise PatternError(f"add: {options['add']!r}: write a key, or key[0] for one row of it")
            add = (key, int(row[:-1]) if bracket else None)
        times = options.get("times", 1.0)
        return Rule(
            place,
            text,
            tower,
            source,
            targets,
            take=tuple(options["take"]) if "take" in options else None,
            before=before,
            join=join,
            then=then,
            cut=part,
            optional=bool(options.get("optional")),
            oneway=bool(options.get("oneway")),
            rest=bool(options.get("rest")),
            sizes={**self.sizes, **sizes},
            add=add,
            factor=1.0 if isinstance(times, str) else float(times),
            root=int(times.split()[1]) if isinstance(times, str) else None,
            term=float(options.get("plus", 0.0)),
        )

    def _join(
        self, kind: str, options: dict[str, Any], source: Side, lost: tuple[str, ...], before: View | None
    ) -> Join:
        slots = {name: slot for slot in source.slots for name in slot.names}
        if any(slots[name].kind not in ("int", "alts") or slots[name].base for name in lost):
            raise PatternError(f"{kind} counts its members by (\\d+) or (a|b) groups only")
        # The alternatives come last: they are joined first, then the indices from the last to the first.
        ordered = sorted(lost, key=lambda name: slots[name].kind == "alts")
        if sum(slots[name].kind == "alts" for name in lost) > 1:
            raise PatternError(f"{kind} joins one group of alternatives; the target lacks {len(lost)}")
        members: tuple[str | None, ...] = tuple(value for value, _ in slots[ordered[-1]].options)
        if "order" in options:
            if sorted(str(m) for m in options["order"] if m != 0) != sorted(str(m) for m in members):
                raise PatternError(f"order lists {options['order']}; it must name each of {list(members)} once")
            members = tuple(None if m == 0 else str(m) for m in options["order"])
        if kind in ("concat", "rows") and not members:
            raise PatternError(f"{kind} needs a group of alternatives (a|b); for an index (\\d+) use stack")
        lengths = tuple(None if n == "*" else int(n) for n in options.get("parts", ()))
        if lengths and (len(lengths) != len(members) or lengths.count(None) > 1):
            raise PatternError(
                f"parts {options['parts']}: one length for each of {len(members)} members, at most one '*'"
            )
        ranges = tuple((int(a), None if b is None else int(b)) for a, b in options.get("rows", ()))
        if ranges and len(ranges) != len(members):
            raise PatternError(f"rows: one range for each of {len(members)} members")
        axis = 0 if kind == "rows" else _axis(options[kind], before)
        return Join(kind, axis, tuple(ordered), members, lengths, ranges)

    def _cut(self, kind: str, options: dict[str, Any], target: Side, gained: tuple[str, ...]) -> Join:
        if len(gained) > 1:
            raise PatternError(f"{kind} writes one group of the target's own, here are {len(gained)}")
        axis = int(options.get("axis", 0))
        if kind == "unstack":
            name = options["unstack"]
            if gained != (name,):
                raise PatternError(f"unstack: {name} counts an index: the target needs <{name}>")
            return Join("stack", axis, gained)
        options_of = next(slot for slot in target.slots if slot.names == gained).options
        lengths = tuple(int(n) for n in options["split"])
        if len(lengths) != len(options_of):
            raise PatternError(f"split {list(lengths)}: one number for each of {len(options_of)} alternatives")
        return Join("concat", axis, gained, tuple(value for value, _ in options_of), lengths)


def _axis(axis: int | str, before: View | None) -> int:
    if isinstance(axis, int):
        return axis
    if before is None or (axis,) not in before.right:
        raise PatternError(f"axis {axis!r} is not an axis of its own on the right side of `view`")
    return before.right.index((axis,))


def _text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return f"'{key}: {value}'"
    shown = ", ".join(f"{name}: {option}" for name, option in value.items())
    return f"'{key}: {{{shown if len(shown) < 400 else shown[:400] + ' ...'}}}'"
