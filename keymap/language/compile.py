"""From the text of one mapping file to a frozen mapping: parse, validate against the schema, compile, check.

The schema says which fields there are; this module says what a schema cannot: that patterns lie inside the
reversible subset, that every capture is accounted for on both sides, that views balance, that no two rules of
a file can match one key. All faults of a file are collected, each with ``file:line:column``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Mapping as MappingType
from itertools import islice
from typing import Any

from keymap.errors import MappingError
from keymap.language.compile_rules import Compiler
from keymap.language.format import (
    Accept,
    Config,
    Configuration,
    Containers,
    Fact,
    Mapping,
    Nowhere,
    Place,
    Position,
    Refusal,
    Variant,
)
from keymap.language.overlap import alike, overlap
from keymap.language.pattern import Effort, PatternError, Side
from keymap.language.rules import Rule, RuleTable
from keymap.language.schema import schema_faults
from keymap.language.yaml_marks import Marked, parse_yaml
from keymap.language.yaml_marks import Path as Where

__all__ = ["compile_mapping", "compile_marked"]


_TOLD = 50  # faults of one sort


def _clashes(rules: tuple[Rule, ...], which: str, effort: Effort, seen: int = 0) -> Iterable[str]:
    """Pairs of rules that can match one key; the first ``seen`` rules have been compared with each other."""
    told: set[tuple[int, int]] = set()
    for first, second in alike([rule.source for rule in rules], seen):
        one, other = rules[first], rules[second]
        if one.rest or other.rest or (first, second) in told:
            continue
        try:
            witness = overlap(one.source, other.source, effort)
        except PatternError as error:
            yield f"{other.place}: {error}"
            return
        if witness is not None:
            told.add((first, second))
            yield (
                f"{other.place}: {which} {witness!r} is claimed by two rules, {one.text} "
                f"({one.place}) and {other.text}: make one of them narrower"
            )
    if sum(rule.rest for rule in rules) > 1:
        yield f"{rules[0].place}: more than one rule says rest: true"


def _taken(rules: Iterable[Rule], named: Iterable[tuple[Side, str]], effort: Effort) -> Iterable[str]:
    """Rules that own a key which another part of the file leaves out."""
    for side, where in named:
        for rule in rules:
            try:
                witness = overlap(rule.source, side, effort) if not rule.rest else None
            except PatternError as error:
                yield f"{rule.place}: {error}"
                return
            if witness is not None:
                yield f"{rule.place}: key {witness!r} is claimed by rule {rule.text} and left out by '{where}: {side}'"


def _position(key: str, data: MappingType[str, Any]) -> Position:
    prefix = data.get("prefix", 0)
    grid = "h w" in data["axes"]
    lead = 1 if data["axes"].startswith("1 ") else 0
    apart = grid and "(" not in data["axes"]
    return Position(key, lead, grid, tuple(prefix) if isinstance(prefix, list) else prefix, apart)


def _places(value: Any, compiler: Compiler, where: Where) -> tuple[Place, ...]:
    entries: list[Any] = value if isinstance(value, list) else [value]
    dicts = [{"path": e} if isinstance(e, str) else e for e in entries]
    return tuple(Place(e["path"], compiler.words(e, where), e.get("unless", "")) for e in dicts)


def _config(data: MappingType[str, Any], compiler: Compiler) -> Config:
    facts = {name: _places(v, compiler, ("config", "facts", name)) for name, v in data.get("facts", {}).items()}
    image_size, patch_size = (_places(data.get(n, []), compiler, ("config", n)) for n in ("image_size", "patch_size"))
    return Config(data["file"], image_size, patch_size, facts, data.get("defaults", {}))


def _fact(name: str, data: Any, compiler: Compiler) -> Fact:
    told: MappingType[str, Any] = {"model": data} if isinstance(data, list) else data
    return Fact(
        tuple((p, 1) if isinstance(p, str) else (p["path"], p["divide"]) for p in told["model"]),
        told.get("label", ""),
        told.get("change", ""),
        compiler.words(told, ("facts", name)),
        told.get("present", False),
        told.get("only", {}),
    )


def _measures(data: MappingType[str, Any], compiler: Compiler) -> Any:
    def way(text: str, where: Where) -> tuple[Side, int | None] | None:
        key, bracket, axis = text.partition("[")
        side = compiler.side(key, where)
        return (side, int(axis[:-1]) if bracket else None) if side is not None else None

    return {
        tower: {
            size: tuple(found for text in texts if (found := way(text, ("measures", tower, size))) is not None)
            for size, texts in sizes.items()
        }
        for tower, sizes in data.items()
    }


def _containers(data: MappingType[str, Any], compiler: Compiler) -> Containers:
    def texts(name: str) -> tuple[str, ...]:
        return tuple(data.get(name, ()))

    def named(name: str) -> tuple[tuple[Side, str], ...]:
        sides = [(compiler.side(key, (name, key)), why) for key, why in data.get(name, {}).items()]
        return tuple((side, why) for side, why in sides if side is not None)

    return Containers(
        texts("wrappers"),
        texts("prefixes"),
        texts("segments"),
        texts("counters"),
        texts("parts"),
        texts("training_state"),
        named("files"),
        named("folders"),
    )


def compile_mapping(text: str, file: str, library: Callable[[str], Marked | None] = lambda name: None) -> Mapping:
    """Compile the text of one mapping file.

    Args:
        text: the YAML.
        file: its name, for errors.
        library: gives the files whose tables this one may use.

    Raises:
        MappingError: with every fault found, each with its place.
    """
    return compile_marked(parse_yaml(text, file), library)


def compile_marked(
    marked: Marked, library: Callable[[str], Marked | None] = lambda name: None, released: bool = False
) -> Mapping:
    """Compile a parsed mapping file; see `compile_mapping`. Rules of a release are not compared with each other."""
    file = marked.file
    faults = schema_faults(marked)
    if faults and not isinstance(marked.data, dict):
        raise MappingError(f"{file} is not a mapping", faults)
    if faults:
        raise MappingError(f"{file} does not follow schemas/mapping.schema.json", faults)
    data = marked.data
    name, kind = data["format"], data.get("kind", "format")
    compiler = Compiler(marked, library)
    rules: list[Rule] = []
    for group, entries in data.get("groups", {}).items():
        rules += compiler.rules(entries, marked, ("groups", group), group)
    accepts = []
    for i, block in enumerate(data.get("accepts", [])):
        when = compiler.evidence(block["when"], ("accepts", i, "when")) if "when" in block else None
        accepts.append(Accept(when, RuleTable(tuple(compiler.rules(block, marked, ("accepts", i), "")))))
    variants = []
    for i, block in enumerate(data.get("variants", [])):
        found: list[Rule] = []
        for group, entries in block["groups"].items():
            found += compiler.rules(entries, marked, ("variants", i, "groups", group), group)
        when = compiler.evidence(block["when"], ("variants", i, "when"))
        variants.append(Variant(when, compiler.evidence(block["when_hub"], ("variants", i, "when_hub")), tuple(found)))
    detect = compiler.evidence(data.get("detect", {}), ("detect",))
    spellings = {
        tower: {s: compiler.evidence(e, ("spellings", tower, s)) for s, e in entries.items()}
        for tower, entries in data.get("spellings", {}).items()
    }
    drop = [compiler.drop(key, value) for key, value in data.get("drop", {}).items()]
    nowhere = [
        (compiler.side(key, ("nowhere", tower, key)), tower, why)
        for tower, entries in data.get("nowhere", {}).items()
        for key, why in entries.items()
    ]
    refuse = [
        Refusal(
            item["why"], compiler.evidence(item.get("when", {}), ("refuse", i, "when")), tuple(item.get("contains", ()))
        )
        for i, item in enumerate(data.get("refuse", []))
    ]
    dtypes = [(compiler.side(key, ("dtypes", key)), name) for key, name in data.get("dtypes", {}).items()]
    shapes = [(compiler.side(key, ("shapes", key)), tuple(shape)) for key, shape in data.get("shapes", {}).items()]
    containers = _containers(data, compiler)
    measures = _measures(compiler.measures, compiler)
    config = _config(data["config"], compiler) if "config" in data else None
    facts = {name: _fact(name, value, compiler) for name, value in compiler.facts.items()}
    if not (compiler.faults or released):
        effort = compiler.effort
        back = RuleTable(tuple(rules)).inverse().rules
        for extra in [(), *(variant.rules for variant in variants)]:
            seen, seen_back = (len(rules), len(back)) if extra else (0, 0)
            compiler.faults += islice(_clashes((*rules, *extra), "key", effort, seen), _TOLD)
            both = (*back, *RuleTable(extra).inverse().rules)
            compiler.faults += islice(_clashes(both, "on the way back, key", effort, seen_back), _TOLD)
        for accept in accepts:
            compiler.faults += islice(_clashes(accept.table.rules, "key", effort), _TOLD)
        if kind != "hub":  # the hub's own rules are prefixes; what it drops is told apart by what the model has
            named = [*((entry.side, "drop") for entry in drop if entry), *((s, "nowhere") for s, _, _ in nowhere if s)]
            compiler.faults += islice(_taken(rules, named, effort), _TOLD)
    absent = {
        key: (value["value"], bool(value.get("always"))) if isinstance(value, dict) else (value, False)
        for key, value in data.get("absent_means", {}).items()
    }
    for key in data.get("file_only", []):
        if key not in absent:
            compiler.fault(marked, ("file_only",), f"{key} needs an entry in absent_means: no model can take it")
    tower = next((t for t in ("image", "text") if t in data), "")
    if compiler.faults:
        raise MappingError(f"{file}: the mapping is wrong", dict.fromkeys(compiler.faults))
    return Mapping(
        name=name,
        kind=kind,
        title=data["title"],
        file=file,
        reference=data.get("reference", ""),
        notes=tuple(data.get("notes", ())),
        speaks={t: (s,) if isinstance(s, str) else tuple(s) for t, s in data.get("speaks", {}).items()},
        detect=detect,
        drop=tuple(entry for entry in drop if entry is not None),
        nowhere=tuple(Nowhere(side, tower, why) for side, tower, why in nowhere if side is not None),
        refuse=tuple(refuse),
        accepts=tuple(accepts),
        rules=tuple(rules),
        variants=tuple(variants),
        dtypes=tuple((side, dtype) for side, dtype in dtypes if side is not None),
        shapes=tuple((side, shape) for side, shape in shapes if side is not None),
        config=config,
        states=data.get("states", {}),
        tower=tower,
        between=tuple(data.get(tower, ())),
        spellings=spellings,
        scalars=frozenset(data.get("scalars", ())),
        absent_means=absent,
        file_only=frozenset(data.get("file_only", ())),
        positions={key: _position(key, value) for key, value in data.get("positions", {}).items()},
        facts=facts,
        causal_masks=frozenset(data.get("causal_masks", ())),
        measures=measures,
        configurations=tuple(
            Configuration(
                {tower: value for tower, value in entry.items() if tower != "names"},
                {name: tuple(rows) for name, rows in entry["names"].items()},
            )
            for entry in data.get("configurations", ())
        ),
        containers=containers,
    )
