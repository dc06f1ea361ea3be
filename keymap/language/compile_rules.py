"""Rules, evidence and single patterns of a mapping file, compiled; every fault is collected with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from keymap.errors import MappingError
from keymap.language.compile_operations import LostGroupError, compile_operations
from keymap.language.format import Clue, Evidence, Ignored
from keymap.language.pattern import Effort, PatternError, Side
from keymap.language.pattern_syntax import (
    UnknownLookupError,
    WrongLookupError,
    check_fragment,
    parse_source,
    parse_target,
)
from keymap.language.rules import Rule
from keymap.language.schema import schema_faults
from keymap.language.schema_words import did_you_mean
from keymap.language.shape_form import parse_form
from keymap.language.view import ViewError
from keymap.language.yaml_marks import Marked
from keymap.language.yaml_marks import Path as Where

__all__ = ["Compiler", "Library"]

_MAX_RULES = 1000  # rules of a file, with those of its tables as often as they are used, and other patterns
_GROUP = re.compile(r"\([^)]*\)")
_MAX_NESTED = 8  # tables within tables
_SECTIONS = {"table": "tables", "lookup": "lookups", "config block": "configs"}

Library = Callable[[str], Marked | None]


class _Written(NamedTuple):
    """A rule as it is written: where, its source pattern, its targets and its other options."""

    marked: Marked
    where: Where
    source: str
    targets: list[str]
    options: Mapping[str, Any]

    @property
    def place(self) -> str:
        return self.marked.at(self.where)


@dataclass(frozen=True, eq=False, repr=False)
class _Context:
    """What the rules of a table inherit: the tower, and the rules with ``table:`` that lead to them.

    Attributes:
        tower: empty for aliases.
        source, target: the prefixes; of a target with the number of groups before each piece.
        sizes: axis lengths.
        tables: the names of the tables, to notice one that contains itself.
        prefixes: the rules with ``table:``, the outermost first.
    """

    tower: str
    source: str = ""
    target: tuple[tuple[str, int], ...] = ()
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    prefixes: tuple[_Written, ...] = ()

    @property
    def groups(self) -> int:
        """How many groups the prefix of the source has."""
        return self.source.count("(")

    def inside(self, rule: _Written, table: str) -> _Context:
        """The context of the rules of a table that ``rule`` continues with."""
        return _Context(
            self.tower,
            self.source + rule.source,
            (*self.target, (rule.targets[0], self.groups)),
            {**self.sizes, **rule.options.get("sizes", {})},
            (*self.tables, table),
            (*self.prefixes, rule),
        )


class Compiler:
    """Compiles one file; collects every fault on the way."""

    def __init__(
        self,
        marked: Marked,
        library: Library = lambda name: None,
        written: Marked | None = None,
        neighbours: Mapping[str, Marked] | None = None,
    ) -> None:
        """
        Args:
            marked: the file, without the fields that break the schema.
            library: gives the files named under ``uses``.
            written: the whole file; a table that is in it but not in ``marked`` is wrong, and not unknown.
            neighbours: all known files, to name the one that has a table which is not found.
        """
        self.marked, self.written = marked, written or marked
        self.neighbours = neighbours or {}
        self.faults: list[str] = []
        self.effort, self.entries = Effort(), 0
        self.lookups: dict[str, dict[str, str]] = {}
        self.lookup_files: dict[str, Marked] = {}
        self.wrong_lookups: dict[tuple[str, str], dict[str, None]] = {}  # by name and fault: places of the rules
        self.tables: dict[str, tuple[Marked, Where]] = {}
        self.sizes: dict[str, int | str] = dict(marked.data.get("sizes", {}))
        self.facts: dict[str, Any] = {}
        self.measures: dict[str, Any] = {}
        self.repository: dict[str, Any] | None = None
        self.configs: dict[str, Any] = {}
        self.uses_are_wrong = marked.data.get("uses", []) != self.written.data.get("uses", [])
        self.expanded: set[str] = set()  # tables whose rules are compiled
        self.suggested: set[str] = set()  # files that `uses` lacks, each reported once
        for number, name in enumerate(marked.data.get("uses", [])):
            other = library(name)
            if other is None:
                near = did_you_mean(name, self.neighbours) if self.neighbours else ""
                self.uses_are_wrong = True
                self.fault(marked, ("uses", number), f"there is no mapping {name!r} to use tables of{near}")
                continue
            faults = schema_faults(other)
            if faults:
                texts = [fault.text for fault in faults]
                raise MappingError(f"{other.file} does not follow schemas/mapping.schema.json", texts)
            self._collect(other)
        self._collect(marked)

    def _collect(self, marked: Marked) -> None:
        for name in marked.data.get("tables", {}):
            self.tables[name] = (marked, ("tables", name))
        for name, table in marked.data.get("lookups", {}).items():
            self.lookups[name] = {key: str(value) for key, value in table.items()}
            self.lookup_files[name] = marked
        self.facts |= marked.data.get("facts", {})
        self.measures |= marked.data.get("measures", {})
        self.repository = marked.data.get("repository", self.repository)
        self.configs |= marked.data.get("configs", {})

    def fault(self, marked: Marked, where: Where, what: str) -> None:
        self.faults.append(f"{marked.at(where)}: {what}")

    def unknown(self, marked: Marked, where: Where, what: str, name: str, known: Iterable[str]) -> None:
        """Report a table, lookup or config block that neither the file nor the files that it uses declare."""
        section = _SECTIONS[what]
        if self.uses_are_wrong or name in (self.written.data.get(section) or ()):
            return  # it may be in a file that is not found, or it is there and wrong: both are reported already
        owners = [
            other
            for other, file in self.neighbours.items()
            if isinstance(file.data, dict) and name in (file.data.get(section) or ()) and file is not self.written
        ]
        if self.suggested & set(owners):
            return
        if owners:
            self.suggested.add(owners[0])
            used = [*self.written.data.get("uses", ()), owners[0]]
            self.fault(marked, where, f"{what} {name!r} is in {owners[0]}: add `uses: [{', '.join(used)}]`")
            return
        near = did_you_mean(name, sorted(known)) or f"; no {what} is declared in the file or under uses:"
        self.fault(marked, where, f"there is no {what} {name!r}{near}")

    def count(self, marked: Marked, where: Where) -> None:
        """Count one more rule or pattern. Raises MappingError where there are too many."""
        self.entries += 1
        if self.entries > _MAX_RULES:
            what = f"{marked.at(where)}: the file has more than {_MAX_RULES} rules and patterns; use alternatives"
            raise MappingError(f"{self.marked.file}: the mapping is too large", [*self.faults, what])

    # --- single patterns ---

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
                options: Mapping[str, Any] = {"key": item} if isinstance(item, str) else item
                form = parse_form(options["shape"]) if "shape" in options else None
                text, ndim = options["key"], options.get("ndim") if form is None else len(form)
                if form is not None and "ndim" in options:
                    self.fault(self.marked, (*where, name, number), "shape gives the number of axes: remove ndim")
                side = self.side(text, (*where, name, number))
                if text == "(.+)":
                    self.fault(
                        self.marked, (*where, name, number), "(.+) matches every file: name a key of this format"
                    )
                elif side is not None:
                    found.append(Clue(side, ndim, form))
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

    def rules(self, data: Mapping[str, Any], where: Where, tower: str) -> Iterable[Rule]:
        """The rules of a tower, of a variant or of an alias block."""
        for key, value in data.items():
            if key != "when" or isinstance(value, str):
                yield from self._rule(_written(self.marked, (*where, key), key, value), _Context(tower))

    def _rule(self, rule: _Written, context: _Context) -> Iterator[Rule]:
        """A rule, or all rules of the table that it continues with."""
        self.count(rule.marked, rule.where)
        if "table" in rule.options:
            yield from self._table_rules(rule, context)
            return
        try:
            source = parse_source(context.source + rule.source, effort=self.effort)
            index = rule.options.get("unstack")
            targets = tuple(
                parse_target((*context.target, (text, context.groups)), source, self.lookups, index, self.effort)
                for text in rule.targets
            )
            twins = tuple(self._twin(text, source, context) for text in _listed(rule.options.get("tied", ())))
        except PatternError as error:
            self._blame(rule, context, error)
            return
        try:
            operations = compile_operations(rule.options, source, targets, context.groups)
        except LostGroupError as error:
            of_prefix = error.number <= context.groups and context.prefixes
            self.faults.append(f"{(context.prefixes[0] if of_prefix else rule).place}: {error}")
            return
        except (PatternError, ViewError) as error:
            self.faults.append(f"{rule.place}: {error}")
            return
        compiled = Rule(
            rule.place,
            _text(rule),
            context.tower,
            source,
            targets,
            sizes={**self.sizes, **context.sizes, **rule.options.get("sizes", {})},
            used_at=context.prefixes[0].place if context.prefixes else "",
            twins=twins,
            **operations,
        )
        yield from compiled.with_twins()

    def _twin(self, text: str, source: Side, context: _Context) -> Side:
        """Another source key that holds the same values, in the syntax of a target; raises PatternError."""
        self.count(self.marked, ())
        numbers = count(1)
        prefix = _GROUP.sub(lambda _: f"\\{next(numbers)}", context.source)
        side = parse_target(((prefix, 0), (text, context.groups)), source, self.lookups, effort=self.effort)
        if set(side.variables) != set(source.variables):
            raise PatternError(f"tied: '{text}' must use every group of the source")
        return side

    def _table_rules(self, rule: _Written, context: _Context) -> Iterator[Rule]:
        name = rule.options["table"]
        fault = self._wrong_table(rule, context)
        if fault is not None:
            self.faults += [f"{rule.place}: {fault}"] if fault else []
            return
        if not self._is_right_by_itself(rule):
            return
        self.expanded.add(name)
        home, path = self.tables[name]
        inside = context.inside(rule, name)
        for key, value in home.data["tables"][name].items():
            yield from self._rule(_written(home, (*path, key), key, value), inside)

    def check_unused_tables(self) -> None:
        """Compile the rules of tables that no rule of the file continues with, for their faults."""
        for name in self.marked.data.get("tables", {}):
            if name not in self.expanded:
                for key, value in self.marked.data["tables"][name].items():
                    rule = _written(self.marked, ("tables", name, key), key, value)
                    for _ in self._rule(rule, _Context("", tables=(name,))):
                        pass

    def _wrong_table(self, rule: _Written, context: _Context) -> str | None:
        """What is wrong with a rule that continues with a table; empty if it is reported, None if nothing is."""
        name = rule.options["table"]
        if name not in self.tables:
            self.unknown(rule.marked, rule.where, "table", name, self.tables)
            return ""
        if name in context.tables:
            return f"table {name!r} contains itself: {' -> '.join([*context.tables, name])}"
        if len(context.tables) >= _MAX_NESTED:
            return f"table {name!r}: tables lie in at most {_MAX_NESTED} others"
        if len(rule.targets) > 1:
            return f"a rule with a table has one target; write one rule for each of {', '.join(rule.targets)}"
        others = [option for option in rule.options if option not in ("to", "table", "sizes")]
        if others:
            return (
                f"{', '.join(others)}: a rule with a table has no operation besides sizes; "
                f"write {others[0]} in the rules of table {name!r}"
            )
        return None

    def _blame(self, rule: _Written, context: _Context, error: PatternError) -> None:
        """Report a wrong pattern at the rule, or at the rule with ``table:`` where only the two together are wrong."""
        if not self._is_right_by_itself(rule):
            return
        if not context.prefixes:
            self.faults.append(f"{rule.place}: {error}")
            return
        start = f"{context.prefixes[0].place}: with table {context.tables[0]!r}: "
        if not any(fault.startswith(start) for fault in self.faults):
            self.faults.append(f"{start}{error}")

    def _is_right_by_itself(self, rule: _Written) -> bool:
        """Check the patterns of a rule by themselves, and report what is wrong with them."""
        try:
            check_fragment(rule.source, rule.targets, self.lookups, rule.options.get("unstack"))
        except UnknownLookupError as unknown:
            self.unknown(rule.marked, rule.where, "lookup", unknown.name, self.lookups)
            return False
        except WrongLookupError as wrong:
            self.wrong_lookups.setdefault((wrong.name, wrong.fault), {})[rule.place] = None
            return False
        except PatternError as error:
            self.faults.append(f"{rule.place}: {error}")
            return False
        return True

    def lookup_faults(self) -> Iterator[str]:
        """Lookups that do not fit the rules: at the rule, or at the file's own lookup where it does not fit several."""
        for (name, fault), places in self.wrong_lookups.items():
            given, lookups = self.lookup_files[name].data["lookups"][name], self.written.data.get("lookups")
            if isinstance(lookups, dict) and lookups.get(name, given) != given:
                continue  # an entry is left out, because it is wrong
            more = len(places) - 1
            if more and self.lookup_files[name] is self.marked:
                yield f"{self.marked.at(('lookups', name))}: {name} {fault} ({more + 1} rules use it)"
            else:
                others = f" (and {more} more rule{'s' if more > 1 else ''})" if more else ""
                yield f"{next(iter(places))}: lookup {name!r} {fault}{others}"


def _written(marked: Marked, where: Where, key: str, value: Any) -> _Written:
    options: Mapping[str, Any] = {"to": value} if isinstance(value, str) else value
    return _Written(marked, where, key, _listed(options["to"]), options)


def _listed(one: str | Sequence[str]) -> list[str]:
    return [one] if isinstance(one, str) else list(one)


def _in_yaml(option: object) -> object:
    """An option as YAML writes it, where Python's text differs."""
    if isinstance(option, bool):
        return "true" if option else "false"
    if isinstance(option, list) and None in option:
        return f"[{', '.join('null' if entry is None else str(entry) for entry in option)}]"
    return option


def _text(rule: _Written) -> str:
    """The rule as written, on one line."""
    if len(rule.options) == 1 and isinstance(rule.options["to"], str):
        return f"'{rule.source}: {rule.options['to']}'"
    shown = ", ".join(f"{name}: {_in_yaml(option)}" for name, option in rule.options.items())
    return f"'{rule.source}: {{{shown if len(shown) < 400 else shown[:400] + ' ...'}}}'"
