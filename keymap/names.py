"""`map_key`: one name of a format in another format, by the rules alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import product
from typing import NamedTuple

from keymap.errors import PlanError
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.pattern import Side
from keymap.language.rules import Rule, RuleTable
from keymap.plan.export import target_format
from keymap.plan.to_hub import tower_of
from keymap.read.lazy import MAX_KEY, brief
from keymap.source.hubs import PathLike, ask

__all__ = ["map_key"]

_SEPARATOR = re.compile(r"[./]")
_SEGMENT = re.compile(r"[^./]+[./]?")
_INDICES = ("1", "2")  # used in place of every index below a module
_MAX_COMPARED = 200  # characters of a wrong name
_MAX_TEXTS = 64  # alternatives of one rule
_MAX_NAMES = 1000  # that one name may become
Names = tuple[str, ...]


def map_key(name: str, source: PathLike, to: PathLike, *, hub: str | None = None) -> str | tuple[str, ...]:
    """What a name of one format is called in another, for names that are not in a file: of parameters in an optimizer's
    groups, of modules that adapters are put on.

    Args:
        name: a key of the source format, also in a spelling of its ``aliases``; or the name of a module, which is what
            keys have before ``.weight``.
        source: the name of the source's format, or the path of a YAML file.
        to, hub: as in `convert_state_dict`.

    Returns:
        The name. A tuple of names, in the order of their parts, where the target cuts the tensor into several; an
        empty tuple where it has no place for it. A name that becomes only a part of a larger tensor gives the name of
        that tensor: then `map_key` gives a tuple for the way back. A module that is no module of its own in the target
        gives the names of its parameters there.

    Raises:
        MappingError: there is no such format.
        PlanError: the source format has no such name; the message lists near ones. Or the module is not one module in
            the target, and its layers cannot be counted.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_KEY:
        raise PlanError(f"name={brief(name)}: expected the name of a tensor or of a module")
    if not isinstance(to, (str, os.PathLike)):
        raise PlanError(f"to={brief(to)}: pass the name of a format")
    if source is None:
        raise PlanError("source=None: pass the name of a format")
    known, wanted, target, _ = ask(hub, source, to, as_mapping="source")
    assert wanted is not None, "the source is named"
    way = _Way(known, known.get(wanted), target_format(known, target))
    names = _key_or_module(name, way)
    names = _by_aliases(name, way) if names is None else names
    if names is None or (not names and way.open(name)):
        near = get_close_matches(name[:_MAX_COMPARED], way.samples(), 3, 0.7)
        hint = f"; did you mean one like {', '.join(near)}?" if near else ""
        what = f"{wanted} has no key and no module" if names is None else f"{target} has no place for the key or module"
        raise PlanError(f"{what} {name!r}{hint}")
    return names[0] if len(names) == 1 else names


def _key_or_module(name: str, way: _Way) -> Names | None:
    """The names that a key becomes, or a module; None if the source format has neither."""
    names = way.key(name)
    if not names:
        below = _module(name, way)
        names = below if below or names is None else names
    return names


def _by_aliases(name: str, way: _Way) -> Names | None:
    """As `_key_or_module`, of a spelling that the aliases of the source format read: those of all files, or of some."""
    blocks = way.source.aliases
    chosen = [[block for block in blocks if block.when is None]]
    chosen += [
        [one for one in blocks if one.when is None or one is block] for block in blocks if block.when is not None
    ]
    meanings: dict[Names, None] = {}
    for number, several in enumerate(chosen):
        found = (_key_or_module(other, way) for other in _respelled([block.table for block in several], name))
        names = next((each for each in found if each is not None), None)
        if names is not None and number == 0:
            return names
        meanings |= {names: None} if names is not None else {}
    if len(meanings) > 1:
        options = " or ".join(", ".join(names) or "nothing" for names in meanings)
        raise PlanError(f"only a file shows what {name!r} of {way.source.name} is: {options}")
    return next(iter(meanings), None)


class _Way(NamedTuple):
    """From one format to another.

    Attributes:
        known: all mappings.
        source, target: the formats; a bridge has the hub's names.
    """

    known: Catalogue
    source: Format
    target: Format

    def key(self, name: str) -> Names | None:
        """The names that a key becomes; None if the source format does not have it."""
        owned = False
        starts = _through(self.source.steps, (name,))
        for found in (found for start in starts for found in self._hub_names(start)):
            owned = True
            back = [step.inverse() for step in reversed(self.target.steps)]
            names = [_through(back, self._from_hub(each)) for each in found]
            if any(names):
                return tuple(dict.fromkeys(one for several in names for one in several))
        ignored = self.source.ignored(name) is not None
        return () if owned or ignored else None

    def open(self, name: str) -> bool:
        """Whether a name is one of the source format only by a rule for any name."""
        tables = [self.known.hub.table if table is None else table for table in _tables(self.source)]
        rules = [found[0] for table in tables if (found := table.find(name)) is not None]
        ignored = self.source.ignored(name) is not None
        return not ignored and all(any(slot.kind in ("rest", "word") for slot in r.source.slots) for r in rules)

    def rules(self) -> Iterator[Rule]:
        """Rules whose source sides are names of the source format; of the hub, those that its formats write."""
        if self.source.kind == "format":
            yield from self.source.rules
            for variant in self.source.variants:
                yield from variant.rules
            return
        mappings = self.known.mappings.values()
        formats = [self.target] if self.target.kind == "format" else [m for m in mappings if m.kind == "format"]
        for mapping in formats:
            for table in _tables(mapping):
                yield from table.inverse().rules if table is not None else ()
        for bridge in (mapping for mapping in mappings if mapping.kind == "bridge"):
            yield from (*bridge.table.rules, *bridge.back.rules)

    def samples(self) -> list[str]:
        """Keys of the source format, with 0 for each index."""
        return list(dict.fromkeys(text.replace("\0", "0") for rule in self.rules() for text in _texts(rule.source)))

    def back(self) -> _Way:
        return _Way(self.known, self.target, self.source)

    def through_hub(self, name: str) -> tuple[str, _Way] | None:
        """Another name of the hub for a module that a rule for any name owns, and the way from there."""
        if self.source.kind == "format":
            names = next(self._hub_names(name), ())
            return (names[0], _Way(self.known, self.known.hub, self.target)) if len(names) == 1 else None
        for path in self._paths(tower_of(self.known.hub, name)):
            names = _bridged(path, name)
            if len(names) == 1 and names[0] != name:
                return names[0], self
        return None

    def _hub_names(self, name: str) -> Iterator[Names]:
        """The hub's names of a key, for each table of the source format that owns it."""
        for table in _tables(self.source):
            if table is None:
                yield from [(name,)] * bool(tower_of(self.known.hub, name))
            elif (found := _applied(table, name)) is not None:
                yield found

    def _from_hub(self, name: str) -> Names:
        """The target's names of a key of the hub; empty where it has no place for it."""
        if self.known.hub.ignored(name) is not None:
            return ()
        out = [table if table is None else table.inverse() for table in _tables(self.target)]
        for path in self._paths(tower_of(self.known.hub, name)):
            bridged = _bridged(path, name)
            for table in out:
                found = [(each,) if table is None else _applied(table, each) or () for each in bridged]
                if any(found):
                    return tuple(one for several in found for one in several)
        return ()

    def _paths(self, tower: str) -> list[list[RuleTable]]:
        """Bridges from the source's layouts of a tower to the target's, those that change names first."""
        hub = self.known.hub
        starts = (self.source if self.source.kind == "format" else hub).layouts.get(tower, ())
        ends = self.target.layouts.get(tower, ()) if self.target.kind == "format" else ()
        if self.target.kind == "bridge" and self.target.tower == tower:
            ends = (self.target.between[1],)
        elif self.target.kind == "hub" and tower in hub.written_as:
            ends = (hub.written_as[tower],)
        paths = [
            [step.table for step in path]
            for start, end in product(starts, ends)
            if (path := self.known.path(tower, start, end)) is not None
        ]
        return sorted((path for path in paths if path), key=len) + [[]] * ([] in paths or not paths)


def _respelled(tables: Sequence[RuleTable], name: str) -> Names:
    """The names that tables make of a key or a module; none if they leave it as it is."""
    names = _through(tables, (name,))
    found = dict.fromkeys(names if names != (name,) else ())
    sides = [rule.source for table in tables for rule in table.rules]
    for end in dict.fromkeys(end for side in sides for end in _ends(side)):  # of the keys in a module
        there = _through(tables, (name + end,))
        if there != (name + end,):
            found |= {each.removesuffix(end): None for each in there if each.endswith(end)}
    return tuple(found)


def _through(tables: Sequence[RuleTable], names: Names) -> Names:
    """The names after each of some tables, which leave names that they do not know as they are."""
    for table in tables:
        names = tuple(one for each in names for one in _applied(table, each) or (each,))
    return names


def _bridged(path: Sequence[RuleTable], name: str) -> Names:
    """The names after each bridge of a path; empty if the first one does not know the name."""
    names: Names = (name,)
    for number, table in enumerate(path):
        found = [_applied(table, each) for each in names]
        if number == 0 and None in found:
            return ()
        names = tuple(one for each, several in zip(names, found, strict=True) for one in several or (each,))
    return names


def _tables(mapping: Format) -> Iterator[RuleTable | None]:
    """The rules between a format's names and the hub's: its own, and with those of each variant; None for the hub."""
    if mapping.kind != "format":
        yield None
        return
    yield mapping.table
    for variant in mapping.variants:
        yield RuleTable((*mapping.rules, *variant.rules))


def _applied(table: RuleTable, name: str) -> Names | None:
    """The names that a table's rule writes for a key; None if no rule owns it."""
    found = table.find(name)
    if found is None:
        return None
    rule, values = found
    if rule.cut is None:
        return tuple(side.write(values) for side in rule.targets)
    if len(rule.cut.variables) > 1 or not rule.cut.members:
        raise PlanError(f"{name!r} becomes one key for each index, and only a file shows how many (rule {rule.text})")
    (variable,) = rule.cut.variables
    members = [member for member in rule.cut.members if member is not None]
    return tuple(side.write({**values, variable: member}) for member in members for side in rule.targets)


# --- modules ---


def _module(name: str, way: _Way) -> Names | None:
    """The names of a module; None if the source format has no key below it."""
    found = _below(name, way)
    if found is None:
        return None
    names, counted = found
    module = _parent(names)
    if module and _same_module(name, module, names, way):
        return (module,)
    if names and not counted:
        raise PlanError(
            f"the module {name!r} of {way.source.name} is not one module in {way.target.name}: its keys become "
            f"{', '.join(names[:3])} and others; pass the name of a part of it"
        )
    return names


def _same_module(name: str, module: str, names: Names, way: _Way) -> bool:
    """Whether a module of the target has the keys that a module of the source becomes, and no others."""
    try:
        back = _below(module, way.back())
        there = _parent(back[0]) if back is not None else ""
        if there in ("", name):
            return there == name
        again = _below(there, way)  # the same module under the names of another layout
    except PlanError:  # a rule that only a file can apply
        return False
    return again is not None and set(again[0]) == set(names)


def _below(module: str, way: _Way) -> tuple[Names, bool] | None:
    """What the keys below a module become, and whether they are all of them; None if there is none."""
    keys: dict[str, None] = {}
    counted = True
    for rule in way.rules():
        for text in _texts(rule.source):
            rest = _rest(text, module)
            if rest is None:
                continue
            indices = _INDICES if "\0" in rest else ("",)
            counted = counted and indices == ("",)
            keys.update(dict.fromkeys(module + rest.replace("\0", index) for index in indices))
    hub = way.through_hub(module) if not keys else None
    if hub is not None:
        return _below(*hub)
    if not keys:
        keys.update(dict.fromkeys(f"{module}.{end}" for end in ("weight", "bias")))
    mapped = [names for key in keys if (names := way.key(key)) is not None]
    if not mapped:
        return None
    names = tuple(dict.fromkeys(one for several in mapped for one in several))
    if len(names) > _MAX_NAMES:
        raise PlanError(f"the module {module!r} has more than {_MAX_NAMES} keys; pass the name of a part of it")
    return names, counted


def _texts(side: Side) -> Iterator[str]:
    """The keys that a side matches, one for each choice of alternatives, with NUL for each index."""
    choices = []
    for token in side.tokens:
        if isinstance(token, str):
            choices.append([token])
        elif token.kind == "alts":
            choices.append([text for _, text in token.options])
        elif token.kind == "int":
            choices.append(["\0"])
        elif token.kind == "path":
            choices.append([""])
        else:
            choices.append(["weight", "bias"])
    for number, parts in enumerate(product(*choices)):
        if number == _MAX_TEXTS:
            return
        yield "".join(parts)


def _ends(side: Side) -> Iterator[str]:
    """What may follow the name of a module in the keys that a side matches, if it has no index."""
    for text in _texts(side):
        for found in _SEPARATOR.finditer(text):
            end = text[found.start() :]
            if "\0" not in end:
                yield end


def _rest(text: str, module: str) -> str | None:
    """What follows the module in a key with marks for its indices; None if the key is not below the module."""
    for found in _SEPARATOR.finditer(text):
        start = text[: found.start()]
        if start == module:
            return text[found.start() :]
        if "\0" in start and re.fullmatch("[0-9]+".join(map(re.escape, start.split("\0"))), module):
            return text[found.start() :]
    return None


def _parent(names: Sequence[str]) -> str:
    """The module that holds all of the names; "" for none."""
    parents = [_SEGMENT.findall(name)[:-1] for name in names]
    shared: list[str] = []
    for segments in zip(*parents, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return "".join(shared)[:-1]
