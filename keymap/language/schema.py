"""Checks a mapping file against the schema, and leaves out what is wrong so that the rest can be compiled."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from keymap.language.schema_words import OLD_KINDS, SchemaFault, in_words
from keymap.language.yaml_marks import Marked, Path
from keymap.paths import schema_path

__all__ = ["ANY_NAME", "HubNames", "SchemaFault", "known_right", "names_of_hub", "schema_faults", "without_faults"]

_MAX_FAULTS = 100  # that are looked for
_MAX_ROUNDS = 8  # in which faulty fields are left out
_right: WeakValueDictionary[int, Marked] = WeakValueDictionary()


class HubNames(NamedTuple):
    """The towers of a hub, and the layouts of each, which the files of the hub may name; empty if any name may be."""

    towers: tuple[str, ...] = ()
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = ()


ANY_NAME = HubNames()


def names_of_hub(hub: Marked | None) -> HubNames:
    """What a hub's file names; of a file that is wrong, what can be read."""
    data = hub.data if hub is not None and isinstance(hub.data, dict) else {}
    towers, layouts = (data.get(field) for field in ("towers", "layouts"))
    if not isinstance(towers, dict):
        return ANY_NAME
    named = layouts.items() if isinstance(layouts, dict) else ()
    return HubNames(tuple(towers), tuple((tower, tuple(one)) for tower, one in named if isinstance(one, dict)))


@lru_cache(maxsize=8)
def _schema(names: HubNames = ANY_NAME) -> dict[str, Any]:
    """The schema; with the names of a hub one that allows no other towers and layouts."""
    schema: dict[str, Any] = json.loads(schema_path().read_text(encoding="utf-8"))
    if not names.towers:
        return schema
    definitions = schema["$defs"]
    definitions["tower"] = {"enum": list(names.towers), "examples": [names.towers[0]]}
    for name in ("layouts", "between") if names.layouts else ():
        field = definitions["fields"]["$defs"][name]
        of_tower = field["additionalProperties"]
        del field["propertyNames"]
        field["additionalProperties"] = False
        field["properties"] = {}
        for tower, layouts in names.layouts:
            one = field["properties"][tower] = deepcopy(of_tower)
            for place in (one, *one.get("anyOf", ())):
                if "items" in place:
                    place["items"] = {"enum": list(layouts)}
            if "anyOf" in one:
                one["anyOf"][0] = {"enum": list(layouts)}
    return schema


@lru_cache(maxsize=32)
def _validator(kind: str, names: HubNames) -> Any:
    """The validator of one kind of mapping; of the whole schema for an unknown kind."""
    from jsonschema import Draft202012Validator

    schema = _schema(names)
    if kind in schema["$defs"]["kinds"]["$defs"]:
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/kinds/$defs/{kind}", "$defs": schema["$defs"]}
    return Draft202012Validator(schema)


def known_right(marked: Marked) -> None:
    """Record that a file follows the schema, so that it is not checked."""
    _right[id(marked)] = marked


def schema_faults(marked: Marked, names: HubNames = ANY_NAME) -> list[SchemaFault]:
    """Every fault against the schema, in the order of the lines; a file without faults is not checked again.

    Args:
        marked: the file.
        names: of the hub that it belongs to.
    """
    if _right.get(id(marked)) is marked:
        return []
    faults = _faults(marked, names)
    if not faults:
        known_right(marked)
    return faults


def _faults(marked: Marked, names: HubNames) -> list[SchemaFault]:
    if not isinstance(marked.data, dict):
        text = "it holds no fields: begin with `format: name`, the name of the file without .yaml"
        return [SchemaFault((), f"{marked.file}:1:1: {text}")]
    kind = marked.data.get("kind", "format")
    faults = []
    if isinstance(kind, str) and kind in OLD_KINDS:
        faults.append(
            SchemaFault(("kind",), f"{marked.at(('kind',))}: kind {kind!r} is now called {OLD_KINDS[kind]!r}")
        )
        kind = OLD_KINDS[kind]
    other = _other_kind(marked.data, kind)
    if other and not faults:
        return [SchemaFault(("kind",), f"{marked.at(('kind',))}: {other}")]
    if kind == "hub":
        names = ANY_NAME  # its own are what it says
    errors = list(
        islice(_validator(kind if isinstance(kind, str) else "", names).iter_errors(marked.data), _MAX_FAULTS)
    )
    errors.sort(key=lambda error: list(map(str, error.absolute_path)))
    found = [fault for error in errors for fault in in_words(marked, error, _schema(names))]
    if faults:  # under an old kind the other fields may be those of another kind: report what has a new name
        found = [fault for fault in found if "is now called" in fault.text and fault.path != ("kind",)]
    return [*faults, *_causes(found)]


def _other_kind(data: dict[str, Any], kind: Any) -> str:
    """What is wrong with the kind, where several fields belong to one other kind; empty otherwise."""
    kinds = {name: one["properties"] for name, one in _schema()["$defs"]["kinds"]["$defs"].items()}
    if not isinstance(kind, str) or kind not in kinds or "kind" not in data:
        return ""
    every = [field for field in data if any(field in fields for fields in kinds.values())]
    strange = [field for field in every if field not in kinds[kind]]
    fitting = [name for name, fields in kinds.items() if all(field in fields for field in every)]
    if len(strange) < 2 or not fitting:
        return ""
    best = "format" if "format" in fitting else fitting[0]
    hint = ", or leave kind out" if best == "format" else ""
    return f"kind: {kind} has no fields {', '.join(strange)}: write `kind: {best}`{hint}"


def _causes(faults: list[SchemaFault]) -> list[SchemaFault]:
    """The faults without those that follow from another one: of a wrong name's value, of a list's further items."""
    names = {fault.path for fault in faults if fault.of_name}
    kept: list[SchemaFault] = []
    seen: set[tuple[Path, str]] = set()
    for fault in faults:
        if not fault.of_name and any(fault.path[:n] in names for n in range(len(fault.path) + 1)):
            continue
        if any(fault.path[:-1] == name[:-1] and "->" in str(name[-1]) for name in names if name) and not fault.of_name:
            continue
        if fault.path and isinstance(fault.path[-1], int):  # items of one list with one mistake
            same = (fault.path[:-1], fault.text.partition("; write ")[2])
            if same[1] and same in seen:
                continue
            seen.add(same)
        kept.append(fault)
    return kept


def _unit(path: Path) -> Path:
    """What to leave out for a fault at a path: the whole rule, for a fault within a rule."""
    for start, length in ((("towers",), 3), (("tables",), 3), (("aliases",), 3), (("steps",), 3), (("variants",), 5)):
        if path[:1] == start and len(path) > length:
            return path[:length]
    return path


def without_faults(marked: Marked, faults: list[SchemaFault], names: HubNames = ANY_NAME) -> Marked | None:
    """The file without the fields that break the schema, so that the others can be checked further.

    Fields that are missing at the top level stay missing. None where too much is wrong to go on.
    """
    for _ in range(_MAX_ROUNDS):
        paths = {_unit(fault.path) for fault in faults}
        if len(faults) >= _MAX_FAULTS or ("kind",) in paths or not isinstance(marked.data, dict):
            return None
        if not paths - {()}:
            return marked
        marked = marked.without(paths)
        faults = _faults(marked, names)
    return None
