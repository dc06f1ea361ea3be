"""Compiles a format's ``repository``: the files of a folder in its layout, and where their values come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from keymap.language.compile_rules import Compiler
from keymap.language.format import Alike, Cases, Computed, Kept, Length, Refusal, Repository, Template, config_text
from keymap.language.yaml_marks import Path as Where

__all__ = ["compile_repository"]


def compile_repository(compiler: Compiler) -> Repository | None:
    """The ``repository`` of a mapping file; None if it and the files that it uses have none."""
    data: Mapping[str, Any] | None = compiler.repository
    if data is None:
        return None
    if "none" in data:
        return Repository("", {}, none=data["none"])
    files = {name: _template(compiler, value, ("repository", "files", name)) for name, value in data["files"].items()}
    requires = {name: tuple(v) if isinstance(v, list) else (v,) for name, v in data.get("requires", {}).items()}
    when = compiler.evidence(data.get("when", {}), ("repository", "when"))
    alike = [
        Alike(tuple(group["facts"]), compiler.evidence(group.get("when", {}), ("repository", "alike", number)))
        for number, group in enumerate(data.get("alike", ()))
    ]
    refuse = [
        Refusal(item["why"], compiler.evidence(item["when"], ("repository", "refuse", number, "when")))
        for number, item in enumerate(data.get("refuse", ()))
    ]
    one_file = bool(data.get("one_file"))
    instead, alone = data.get("instead", {}), tuple(data.get("alone", ()))
    return Repository(data["weights"], files, requires, when, tuple(alike), tuple(refuse), one_file, instead, alone)


def _template(compiler: Compiler, value: Any, where: Where) -> Template:
    """A section, a list, cases, a computed or a kept value, or a value that is written as it is."""
    if isinstance(value, list):
        return [_template(compiler, inner, (*where, number)) for number, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "cases" in value and value.keys() <= {"cases", "fact"}:
        cases = value["cases"].items()
        found = tuple((compiler.side(k, where), _template(compiler, v, (*where, "cases", k))) for k, v in cases)
        return Cases(found, value.get("fact", ""))
    if value.keys() & {"from", "fact", "value"}:
        return _computed(compiler, value, where)
    if "kept" in value:
        paths = value["kept"]
        listed = (paths,) if isinstance(paths, str) else tuple(paths)
        label, only, null = value.get("label", ""), value.get("only", ""), value.get("none_is_null", False)
        others = _inner(compiler, value, "others", where)
        return Kept(listed, tuple(value.get("model", ())), label, only, null, "shared" in value, others)
    return {name: _template(compiler, inner, (*where, name)) for name, inner in value.items()}


def _computed(compiler: Compiler, data: Mapping[str, Any], where: Where) -> Computed:
    words = compiler.words(data, where)
    inverse: dict[str, Any] = dict(data.get("write", {}))
    for theirs, ours in words.items():
        inverse.setdefault(config_text(ours), _typed(theirs))
    divide, times = data.get("divide", ""), data.get("times", 1)
    return Computed(
        data.get("fact", ""),
        _length(compiler, data["from"], where) if "from" in data else None,
        data.get("value"),
        inverse,
        _inner(compiler, data, "others", where),
        data.get("minus", 0),
        data.get("per", 1),
        bool(data.get("square")),
        data.get("grid", ""),
        times if isinstance(times, int) else _length(compiler, times, where),
        _length(compiler, divide, where) if "[" in divide else divide,
        _length(compiler, data["over"], where) if "over" in data else None,
        data.get("absent"),
        bool(data.get("optional")),
        _length(compiler, data["divides"], where) if "divides" in data else None,
        _inner(compiler, data, "agrees", where),
        data.get("side", ""),
    )


def _inner(compiler: Compiler, data: Mapping[str, Any], name: str, where: Where) -> Computed | None:
    """A computed value within another."""
    return _computed(compiler, data[name], (*where, name)) if name in data else None


def _typed(text: str) -> Any:
    """A key of a table of words as a value: true, null and numbers are keys as texts."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _length(compiler: Compiler, text: str, where: Where) -> Length:
    """``key[0]``, the length of an axis, or of several, with a word; ``has key``; or a pattern whose keys count."""
    key, bracket, axis = text.partition("[")
    word, _, rest = key.partition(" ")
    word, key = (word, rest) if word in ("has", "shortest", "longest") else ("", key)
    pick = word if bracket and word != "has" else ""
    return Length(compiler.side(key, where), int(axis[:-1]) if bracket else None, word == "has", pick)
