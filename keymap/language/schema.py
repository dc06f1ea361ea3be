"""Checks a mapping file against the schema, and leaves out what is wrong so that the rest can be compiled."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

from keymap.language.schema_words import OLD_KINDS, SchemaFault, in_words
from keymap.language.yaml_marks import Marked, Path
from keymap.paths import schema_path

__all__ = ["SchemaFault", "known_right", "schema_faults", "without_faults"]

_MAX_FAULTS = 100  # that are looked for
_MAX_ROUNDS = 8  # in which faulty fields are left out
_right: WeakValueDictionary[int, Marked] = WeakValueDictionary()


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(schema_path().read_text(encoding="utf-8"))
    return schema


@lru_cache(maxsize=8)
def _validator(kind: str) -> Any:
    """The validator of one kind of mapping; of the whole schema for an unknown kind."""
    from jsonschema import Draft202012Validator

    schema = _schema()
    if kind in schema["$defs"]["kinds"]["$defs"]:
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/kinds/$defs/{kind}", "$defs": schema["$defs"]}
    return Draft202012Validator(schema)


def known_right(marked: Marked) -> None:
    """Record that a file follows the schema, so that it is not checked."""
    _right[id(marked)] = marked


def schema_faults(marked: Marked) -> list[SchemaFault]:
    """Every fault against the schema, in the order of the lines; a file without faults is not checked again."""
    if _right.get(id(marked)) is marked:
        return []
    faults = _faults(marked)
    if not faults:
        known_right(marked)
    return faults


def _faults(marked: Marked) -> list[SchemaFault]:
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
    errors = list(islice(_validator(kind if isinstance(kind, str) else "").iter_errors(marked.data), _MAX_FAULTS))
    errors.sort(key=lambda error: list(map(str, error.absolute_path)))
    found = [fault for error in errors for fault in in_words(marked, error, _schema())]
    if faults:  # under an old kind the other fields may be those of another kind: report what has a new name
        found = [fault for fault in found if "is now called" in fault.text and fault.path != ("kind",)]
    return [*faults, *found]


def _unit(path: Path) -> Path:
    """What to leave out for a fault at a path: the whole rule, for a fault within a rule."""
    for start, length in ((("towers",), 3), (("tables",), 3), (("aliases",), 3), (("variants",), 5)):
        if path[:1] == start and len(path) > length:
            return path[:length]
    return path


def without_faults(marked: Marked, faults: list[SchemaFault]) -> Marked | None:
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
        faults = _faults(marked)
    return None
