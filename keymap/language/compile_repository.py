"""Compiles a format's ``repository``: the files of a folder in its layout, and where their values come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from keymap.language.compile_rules import Compiler
from keymap.language.format import Computed, Length, Repository, Template, config_text
from keymap.language.yaml_marks import Path as Where

__all__ = ["compile_repository"]


def compile_repository(compiler: Compiler) -> Repository | None:
    """The ``repository`` of a mapping file; None if it and the files that it uses have none."""
    data: Mapping[str, Any] | None = compiler.repository
    if data is None:
        return None
    files = {name: _template(compiler, value, ("repository", "files", name)) for name, value in data["files"].items()}
    requires = {name: tuple(v) if isinstance(v, list) else (v,) for name, v in data.get("requires", {}).items()}
    when = compiler.evidence(data.get("when", {}), ("repository", "when"))
    return Repository(data["weights"], files, requires, when, tuple(data.get("alike", ())))


def _template(compiler: Compiler, value: Any, where: Where) -> Template:
    """A section, a computed value, or a value that is written as it is."""
    if not isinstance(value, dict):
        return value
    if "from" in value or "fact" in value:
        return _computed(compiler, value, where)
    return {name: _template(compiler, inner, (*where, name)) for name, inner in value.items()}


def _computed(compiler: Compiler, data: Mapping[str, Any], where: Where) -> Computed:
    words = compiler.words(data, where)
    inverse: dict[str, Any] = {}
    for theirs, ours in words.items():
        inverse.setdefault(config_text(ours), _typed(theirs))
    others = data.get("others")
    return Computed(
        data.get("fact", ""),
        _length(compiler, data["from"], where) if "from" in data else None,
        inverse,
        _computed(compiler, others, (*where, "others")) if others is not None else None,
        data.get("minus", 0),
        bool(data.get("square")),
        _length(compiler, data["times"], where) if "times" in data else None,
        data.get("divide", ""),
        _length(compiler, data["over"], where) if "over" in data else None,
        data.get("absent"),
        bool(data.get("optional")),
    )


def _typed(text: str) -> Any:
    """A key of a table of words as a value: true, null and numbers are keys as texts."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _length(compiler: Compiler, text: str, where: Where) -> Length:
    """``key[0]``, the length of an axis; ``has key``; or a pattern whose keys count."""
    key, bracket, axis = text.partition("[")
    exists = key.startswith("has ")
    side = compiler.side(key.removeprefix("has "), where)
    return Length(side, int(axis[:-1]) if bracket else None, exists)
