"""Mappings together: by name, and bridges joined into paths.

For each tower bridges form a forest, so a path between two layouts is unique or absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from keymap.errors import MappingError
from keymap.language.compile import compile_marked
from keymap.language.format import Configuration, Containers, Format
from keymap.language.overlap import overlap
from keymap.language.rules import RuleTable
from keymap.language.schema import known_right
from keymap.language.schema_words import did_you_mean
from keymap.language.yaml_marks import Marked, read_yaml

__all__ = ["Bridge", "Catalogue", "shown_path"]


class Bridge(NamedTuple):
    """One step between two layouts of a tower, in one direction."""

    mapping: Format
    table: RuleTable
    source: str
    target: str


def _no_tables(_name: str) -> Marked | None:
    return None


@dataclass(eq=False, repr=False)
class Catalogue:
    """The mappings of one hub, by name.

    Attributes:
        mappings: compiled.
        files: parsed, for the tables that other files use.
        places: the paths of the files; a file that is added again replaces its earlier content.
        shared: gives a file of tables that several hubs use, by its name.
    """

    mappings: dict[str, Format] = field(default_factory=dict)
    files: dict[str, Marked] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)
    shared: Callable[[str], Marked | None] = field(default=_no_tables, repr=False)
    _paths: dict[tuple[str, str], dict[str, list[Bridge]]] = field(default_factory=dict, repr=False)

    @cached_property
    def hub(self) -> Format:
        return next(m for m in self.mappings.values() if m.kind == "hub")

    @property
    def formats(self) -> list[Format]:
        """The formats that a file can have: all formats, and the hub."""
        return [m for m in self.mappings.values() if m.kind in ("format", "hub")]

    @property
    def detectable(self) -> list[Format]:
        """The formats that are looked for in a file; others only a caller can name."""
        return [m for m in self.formats if m.kind == "hub" or not m.by_name]

    @cached_property
    def containers(self) -> Containers:
        """The tables of all files that have one, in the order of their registration."""
        every = [mapping.containers for mapping in self.mappings.values()]
        joined = {f.name: dict.fromkeys(e for one in every for e in getattr(one, f.name)) for f in fields(Containers)}
        return Containers(**{name: tuple(entries) for name, entries in joined.items()})

    @property
    def configurations(self) -> list[Configuration]:
        """The configurations of the hub's models that are recorded."""
        return [entry for mapping in self.mappings.values() for entry in mapping.configurations]

    def get(self, name: str) -> Format:
        """The mapping of that name.

        Raises:
            MappingError: no mapping has it; the message lists near names.
        """
        if name in self.mappings:
            return self.mappings[name]
        near = get_close_matches(name, self.mappings, 3, 0.7)
        known = ", ".join(sorted(m.name for m in self.formats))
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise MappingError(f"there is no format {name!r}; {hint}known: {known}")

    def add(
        self,
        files: Iterable[Path],
        check: Callable[[Catalogue, Iterable[str]], None] | None = None,
        released: Collection[Path] = (),
    ) -> list[Format]:
        """Compile files and add them, all or none.

        Args:
            files: YAML files.
            check: given all mappings and the names of the new ones, raises MappingError where they may not be added.
            released: those that were checked before a release, and are not checked again.

        Raises:
            MappingError: a file is wrong, a name is taken, bridges would form a cycle, or ``check`` refuses.
        """
        parsed = dict(self.files)
        texts: list[tuple[Path, Marked]] = []
        for file in files:
            marked = read_yaml(file, shown_path(file))
            name = marked.data.get("format") if isinstance(marked.data, dict) else None
            if isinstance(name, str):
                parsed[name] = marked
            if file in released:
                known_right(marked)
            texts.append((file, marked))
        added: dict[str, Format] = {}
        places, new = dict(self.places), list[str]()
        hub = next((one for one in parsed.values() if one.data.get("kind") == "hub"), None)
        for file, marked in texts:
            mapping = compile_marked(
                marked, lambda name: parsed.get(name) or self.shared(name), file in released, parsed, hub
            )
            name, place = mapping.name, parsed[mapping.name].at(("format",))
            resolved = file.resolve()
            taken = added.get(name) or (self.mappings.get(name) if places.get(name) != resolved else None)
            if taken is not None:
                raise MappingError(f"{place}: the name {name!r} is taken by {taken.file}; choose another name")
            if file.stem != name:
                raise MappingError(f"{place}: format {name!r} belongs in {name}.yaml; rename one of them")
            added[name], places[name] = mapping, resolved
            new += [name] * (file not in released)
        together = Catalogue({**self.mappings, **added}, parsed, places, self.shared)
        if new:
            together._check(new)
        if check is not None:
            check(together, tuple(added))
        self._paths.clear()
        for name in ("hub", "containers"):
            self.__dict__.pop(name, None)
        self.mappings, self.files, self.places = together.mappings, together.files, together.places
        return list(added.values())

    def _check(self, new: Collection[str]) -> None:
        """Check what only all files together show: one hub, known towers and layouts, bridges without a circle.

        Args:
            new: the names of the files that were not checked before.

        Raises:
            MappingError: with the first kind of fault found.
        """
        hubs = [m for m in self.mappings.values() if m.kind == "hub"]
        if len(hubs) != 1:
            raise MappingError(f"there must be one hub, these files are hubs: {[m.file for m in hubs]}")
        (hub,) = hubs
        checked = [self.mappings[name] for name in (self.mappings if hub.name in new else new)]
        for mapping in checked:
            if mapping.kind == "format" and mapping.by_name and not hub.by_name:
                at = self.files[mapping.name].at(())
                raise MappingError(
                    f"{at}: detect is missing: add keys that only files of this format have: `detect: {{all: [key]}}`"
                )
            for tower in mapping.layouts:
                if tower not in hub.layouts:
                    at = self.files[mapping.name].at(("layouts", tower))
                    raise MappingError(f"{at}: the hub has no tower {tower!r}; known: {', '.join(hub.layouts)}")
        for tower, layouts in hub.layouts.items():
            self._check_layouts(checked, tower, layouts)
            self._check_bridges(tower, layouts)
        lost = [fault for mapping in checked for fault in _strays(hub, mapping)]
        if lost:
            raise MappingError("rules write keys that the hub does not have", lost)

    def _check_layouts(self, checked: Iterable[Format], tower: str, layouts: Iterable[str]) -> None:
        """Refuse a layout of the tower that the hub does not have."""
        for mapping in checked:
            field = "between" if mapping.tower == tower else "layouts"
            named = mapping.between if mapping.tower == tower else mapping.layouts.get(tower, ())
            unknown = [name for name in named if name not in layouts]
            if unknown:
                at = self.files[mapping.name].at((field, tower))
                hint = did_you_mean(unknown[0], layouts)
                raise MappingError(f"{at}: the hub has no {tower} layout {unknown[0]!r}{hint}")

    def _check_bridges(self, tower: str, layouts: Iterable[str]) -> None:
        """Refuse a second path between two layouts of the tower."""
        parent = {name: name for name in layouts}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for mapping in self.mappings.values():
            if mapping.tower != tower:
                continue
            one, two = (root(name) for name in mapping.between)
            if one == two:
                at, both = self.files[mapping.name].at(("between", tower)), " and ".join(mapping.between)
                raise MappingError(
                    f"{at}: a second path between {tower} layouts {both}; bridges of a tower form a forest"
                )
            parent[one] = two

    def path(self, tower: str, source: str, target: str) -> list[Bridge] | None:
        """The bridges that lead from one layout to another; None if no path exists."""
        if (tower, source) not in self._paths:
            self._paths[tower, source] = self._paths_from(tower, source)
        return self._paths[tower, source].get(target)

    def _paths_from(self, tower: str, source: str) -> dict[str, list[Bridge]]:
        steps = []
        for mapping in self.mappings.values():
            if mapping.kind == "bridge" and mapping.tower == tower:
                steps.append(Bridge(mapping, mapping.table, *mapping.between))
                if not any(rule.oneway for rule in mapping.rules):
                    steps.append(Bridge(mapping, mapping.back, *reversed(mapping.between)))
        paths: dict[str, list[Bridge]] = {source: []}
        queue = [source]
        while queue:
            layout = queue.pop()
            for step in steps:
                if step.source == layout and step.target not in paths:
                    paths[step.target] = [*paths[layout], step]
                    queue.append(step.target)
        return paths


def _strays(hub: Format, mapping: Format) -> Iterable[str]:
    """Rules whose target is not a name of the hub in the rule's tower; one fault for the rules of a table."""
    found: dict[str, list[str]] = {}
    for rule in (*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)):
        own = [other.source for other in hub.rules if other.tower == rule.tower]
        for side in rule.targets:
            sample = side.sample
            if not any(other.match(sample) is not None for other in own) and not any(overlap(side, o) for o in own):
                towers = {other.tower for other in hub.rules if overlap(side, other.source)}
                starts = ", ".join(dict.fromkeys(start for other in own for start in other.starts))
                why = f"it belongs to {', '.join(sorted(towers))}" if towers else "the hub has no such name"
                text = f"{str(side)!r} is in tower {rule.tower!r}, but {why}; keys of this tower begin with {starts}"
                found.setdefault(rule.reported_at, []).append(text)
    for place, texts in found.items():
        yield f"{place}: {texts[0]}" + (f" (and {len(texts) - 1} more keys)" if len(texts) > 1 else "")


def shown_path(file: Path) -> str:
    """A path as messages show it: relative to the working folder where it lies in it."""
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)
