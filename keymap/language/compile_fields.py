"""Compiles the fields of a mapping file other than rules: configuration settings, fields of the hub and containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from keymap.language.compile_rules import Compiler
from keymap.language.format import (
    Absence,
    Absences,
    Attribute,
    Config,
    Configuration,
    Containers,
    Fact,
    Place,
    Position,
)
from keymap.language.pattern import Side
from keymap.language.yaml_marks import Path as Where

__all__ = [
    "compile_absences",
    "compile_config",
    "compile_configurations",
    "compile_containers",
    "compile_facts",
    "compile_measures",
    "compile_positions",
]

Measures = Mapping[str, Mapping[str, tuple[tuple[Side, int | None], ...]]]


_OF_GRIDS, _OF_LINES = ("bicubic", "bilinear", "nearest"), ("linear", "nearest")  # the first is the default


def compile_positions(compiler: Compiler) -> dict[str, Position]:
    """The hub's ``positions``, by key."""
    data = compiler.marked.data

    def position(key: str, entry: Mapping[str, Any]) -> Position:
        prefix = entry.get("prefix", 0)
        grid = "h w" in entry["axes"]
        lead = 1 if entry["axes"].startswith("1 ") else 0
        apart = grid and "(" not in entry["axes"]
        rows = tuple(prefix) if isinstance(prefix, list) else prefix
        methods = _OF_GRIDS if grid else _OF_LINES
        method = entry.get("method", methods[0])
        if method not in methods:
            what = (
                f"a grid is resized by {', '.join(methods)}" if grid else f"a line is resized by {' or '.join(methods)}"
            )
            compiler.fault(compiler.marked, ("positions", key, "method"), what)
        return Position(key, lead, grid, rows, apart, entry.get("grid", ""), entry.get("patch", ""), method)

    return {key: position(key, entry) for key, entry in data.get("positions", {}).items()}


def compile_absences(compiler: Compiler) -> Absences:
    """The hub's ``absent_means``."""
    data = compiler.marked.data
    keys: dict[str, Absence] = {}
    patterns: list[tuple[Side, Absence]] = []
    for key, value in data.get("absent_means", {}).items():
        meaning = Absence(value["value"], bool(value.get("always"))) if isinstance(value, dict) else Absence(value)
        side = compiler.side(key, ("absent_means", key)) if "(" in key else None
        if side is not None:
            together = isinstance(value, dict) and value.get("together")
            patterns.append((side, meaning._replace(together=side) if together else meaning))
        else:
            keys[key] = meaning
    for key in data.get("file_only", []):
        if key not in keys:
            compiler.fault(
                compiler.marked, ("file_only",), f"{key} needs an entry in absent_means, because no model has it"
            )
    return Absences(keys, tuple(patterns))


def compile_facts(compiler: Compiler) -> dict[str, Fact]:
    """The hub's ``facts``, those of the tables that it uses among them."""

    def fact(name: str, data: Any) -> Fact:
        entry: Mapping[str, Any] = {"model": data} if isinstance(data, list) else data
        return Fact(
            tuple(Attribute(p) if isinstance(p, str) else Attribute(**p) for p in entry.get("model", ())),
            entry.get("label", ""),
            entry.get("change", ""),
            compiler.words(entry, ("facts", name)),
            entry.get("present", False),
            entry.get("only", {}),
            entry.get("formerly", ""),
            entry.get("kind", ""),
            entry.get("width_per", ""),
        )

    return {name: fact(name, value) for name, value in compiler.facts.items()}


def compile_measures(compiler: Compiler) -> Measures:
    """The hub's ``measures``: by tower and size the ways to measure it, ``key[0]`` or a pattern whose keys count."""

    def ways(texts: list[str], where: Where) -> Iterator[tuple[Side, int | None]]:
        for text in texts:
            key, bracket, axis = text.partition("[")
            side = compiler.side(key, where)
            if side is not None:
                yield side, int(axis[:-1]) if bracket else None

    return {
        tower: {size: tuple(ways(texts, ("measures", tower, size))) for size, texts in sizes.items()}
        for tower, sizes in compiler.measures.items()
    }


def compile_containers(data: Mapping[str, Any], compiler: Compiler) -> Containers:
    """What training code puts around a state dict: the fields of a ``kind: containers`` file."""

    def texts(name: str) -> tuple[str, ...]:
        return tuple(data.get(name, ()))

    def named(name: str) -> tuple[tuple[Side, str], ...]:
        sides = [(compiler.side(key, (name, key)), why) for key, why in data.get(name, {}).items()]
        return tuple((side, why) for side, why in sides if side is not None)

    compiled = [compiler.side(key, ("training_files",)) for key in data.get("training_files", ())]
    return Containers(
        texts("wrappers"),
        texts("prefixes"),
        texts("segments"),
        texts("counters"),
        texts("training_state"),
        named("files"),
        named("folders"),
        tuple((one["length"], one["direction"], one["weight"]) for one in data.get("weight_norms", ())),
        tuple(side for side in compiled if side is not None),
        tuple(data.get("empty_beside", {}).items()),
        texts("float8_beside"),
        texts("float8_marks"),
        texts("float8_words"),
    )


def compile_configurations(data: Mapping[str, Any]) -> tuple[Configuration, ...]:
    """The recorded models of a ``kind: configurations`` file."""
    return tuple(
        Configuration(
            {tower: value for tower, value in entry.items() if tower not in ("names", "facts")},
            {name: tuple(rows) for name, rows in entry["names"].items()},
            entry.get("facts", {}),
        )
        for entry in data.get("configurations", ())
    )


def compile_config(compiler: Compiler) -> Config | None:
    """The ``config`` of a format, its own fields after those of the shared blocks that it uses."""
    marked = compiler.marked
    own: Mapping[str, Any] | None = marked.data.get("config")
    if own is None:
        return None
    used = own.get("use", [])
    used = [used] if isinstance(used, str) else used
    blocks: list[tuple[Where, Mapping[str, Any]]] = []
    for name in used:
        if name in compiler.configs:
            blocks.append((("config", "use"), compiler.configs[name]))
        else:
            compiler.unknown(marked, ("config", "use"), "config block", name, compiler.configs)
    blocks.append((("config",), own))
    joined: dict[str, Any] = {}
    facts: dict[str, tuple[Place, ...]] = {}
    defaults: dict[str, Any] = {}
    for _, block in blocks:
        joined |= block
        defaults |= block.get("defaults", {})
    sections: Mapping[str, list[str]] = joined.get("sections", {})
    named = tuple(dict.fromkeys(path for paths in sections.values() for path in paths if path))
    for where, block in blocks:
        for fact, value in block.get("facts", {}).items():
            at = (*where, "facts", fact) if where == ("config",) else where
            starts = sections.get(fact.partition(".")[0], [""])
            facts[fact] = tuple(_places(value, compiler, at, starts, named))
    named_file = "file" in joined or "inside" in joined
    if not named_file and len(blocks) <= len(used):
        return None  # a config block is unknown, which is reported
    if not named_file and {"file", "inside"} & dict(compiler.written.data.get("config", {})).keys():
        return None  # it is there and wrong, which is reported
    if not named_file:
        compiler.fault(
            marked,
            ("config",),
            "file is missing: add it, for example `file: config.json`, or `use` a config block that has it; for a dict "
            "in the checkpoint write `inside: NAME`",
        )
        return None
    image, patch = (
        tuple(_places(joined.get(name, []), compiler, ("config", name), [""], ()))
        for name in ("image_size", "patch_size")
    )
    types = tuple(name for _, block in blocks for name in block.get("model_types", ()))
    different = tuple(own.get("distinguishes", ()))
    file, inside = joined.get("file", ""), joined.get("inside", "")
    return Config(file, image, patch, facts, defaults, types, different, inside, joined.get("model", ""))


def _places(value: Any, compiler: Compiler, where: Where, starts: list[str], named: tuple[str, ...]) -> Iterator[Place]:
    """Where a configuration holds a value: each path in each of the sections in turn, ``/path`` from the top level.

    Args:
        value: a path, a place with words, or a list of them.
        starts: sections of the fact's tower, "" for the top level. The first that a file has is the only one that
            counts.
        named: all named sections; a file that has one of them says nothing of a tower at its top level.
    """
    for entry in value if isinstance(value, list) else [value]:
        data: Mapping[str, Any] = {"path": entry} if isinstance(entry, str) else entry
        others, minus = data.get("others", "unknown"), data.get("minus", {"path": "", "default": 0})
        place = Place(
            data["path"],
            compiler.words(data, where),
            data.get("unless", ""),
            others=others if isinstance(others, str) else "",
            other_word=None if isinstance(others, str) else others["word"],
            minus=(minus["path"], minus["default"]),
            only_if=data.get("only_if", ""),
        )
        if place.path.startswith("/"):
            yield place._replace(path=place.path[1:])
            continue
        for number, start in enumerate(starts):
            outside = tuple(starts[:number]) if start else named
            yield place._replace(
                path=_inside(start, place.path), outside=outside, minus=(_inside(start, place.minus[0]), place.minus[1])
            )


def _inside(section: str, path: str) -> str:
    return f"{section}.{path}" if section and path else path
