"""Compiles the text of one mapping file to a frozen `Format`: parse, validate against the schema, compile, check.

The schema checks fields and types. Compilation checks what a schema cannot: that patterns are in the reversible subset,
that both sides use every capture, that views balance. A file with faults in some fields is compiled without these
fields, so that one list has all its faults, each with ``file:line:column``. The checks across rules come last, for a
file without faults: no two rules may match one key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from keymap.errors import MappingError
from keymap.language.compile_fields import (
    compile_absences,
    compile_config,
    compile_configurations,
    compile_containers,
    compile_facts,
    compile_measures,
    compile_positions,
)
from keymap.language.compile_repository import compile_repository
from keymap.language.compile_rules import Compiler, Library
from keymap.language.cross_checks import cross_faults
from keymap.language.format import Alias, Clue, Evidence, Format, Ignored, Refusal, Unsupported, Variant
from keymap.language.pattern import Side
from keymap.language.rules import Rule, RuleTable
from keymap.language.schema import names_of_hub, schema_faults, without_faults
from keymap.language.yaml_marks import Marked, parse_yaml

__all__ = ["compile_mapping", "compile_marked", "evidence_in"]

NEVER = "never"  # the `detect` of a hub whose models are found by its name alone


def compile_mapping(text: str, file: str, library: Library = lambda name: None) -> Format:
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
    marked: Marked,
    library: Library = lambda name: None,
    released: bool = False,
    neighbours: Mapping[str, Marked] | None = None,
    hub: Marked | None = None,
) -> Format:
    """Compile a parsed mapping file; see `compile_mapping`.

    Args:
        marked: the file.
        library: as for `compile_mapping`.
        released: the rules have been compared with each other before, and are not compared again.
        neighbours: all known files by name, for messages that say which of them has a missing table.
        hub: the file of the hub, which has the names of towers and layouts; without it that of the neighbours.

    Raises:
        MappingError: as `compile_mapping`.
    """
    names = names_of_hub(hub or _hub_of(neighbours or {}))
    broken = schema_faults(marked, names)
    sound = without_faults(marked, broken, names) if broken else marked
    faults = [fault.text for fault in broken]
    mapping = None
    if sound is not None:
        compiler = Compiler(sound, library, marked, neighbours)
        mapping = _compiled(compiler, released)
        if not released:
            compiler.check_unused_tables()
        compiler.faults += compiler.lookup_faults()
        if not (compiler.faults or broken or released):
            compiler.faults += cross_faults(mapping, compiler.effort)
        faults += compiler.faults
    if faults or mapping is None:
        summary = "does not follow schemas/mapping.schema.json" if broken else "has faults"
        summary = summary if isinstance(marked.data, dict) else "is not a mapping"
        raise MappingError(f"{marked.file} {summary}", sorted(dict.fromkeys(faults), key=_place))
    return mapping


def _hub_of(files: Mapping[str, Marked]) -> Marked | None:
    return next((one for one in files.values() if isinstance(one.data, dict) and one.data.get("kind") == "hub"), None)


def _place(fault: str) -> tuple[str, int, int]:
    """File, line and column of a fault, to sort by."""
    file, _, rest = fault.partition(".yaml:")
    line, column = (int(number) if number.isdigit() else 0 for number in (rest + "::").split(":")[:2])
    return file, line, column


def _compiled(compiler: Compiler, released: bool) -> Format:
    """Every field compiled; what is wrong is left out, and reported in the compiler's faults."""
    marked = compiler.marked
    data = marked.data
    towers, bridged = data.get("layouts", {}), data.get("between", {})
    is_hub = data.get("kind") == "hub"
    evidence = {
        tower: {name: compiler.evidence(one, ("layouts", tower, name)) for name, one in entries.items()}
        for tower, entries in (towers.items() if is_hub else ())
    }
    detect = data.get("detect", NEVER)
    made = None if released else compile_repository(compiler)  # now, for its faults
    repository = partial(compile_repository, compiler) if released else lambda: made
    mapping = Format(
        name=data.get("format", ""),
        kind=data.get("kind", "format"),
        title=data.get("title", ""),
        file=marked.file,
        reference=data.get("reference", ""),
        notes=tuple(data.get("notes", ())),
        layouts={tower: (one,) if isinstance(one, str) else tuple(one) for tower, one in towers.items()},
        hub=data.get("hub", ""),
        detect=compiler.evidence(detect if detect != NEVER else {}, ("detect",)),
        by_name=detect == NEVER,
        ignore=tuple(_ignored(compiler)),
        unsupported=tuple(_unsupported(compiler)),
        refuse=tuple(_refusals(compiler)),
        aliases=tuple(_aliases(compiler)),
        steps=tuple(_steps(compiler)),
        rules=tuple(
            rule
            for tower, entries in data.get("towers", {}).items()
            for rule in compiler.rules(entries, ("towers", tower), tower)
        ),
        variants=tuple(_variants(compiler)),
        dtypes=tuple(compiler.by_pattern("dtypes")),
        shapes=tuple((side, tuple(shape)) for side, shape in compiler.by_pattern("shapes")),
        config=compile_config(compiler),
        fixed=data.get("fixed", {}),
        fills={key: _length(text) for key, text in data.get("fills", {}).items()},
        make_repository=repository,
        tower=next(iter(bridged), ""),
        between=tuple(next(iter(bridged.values()), ())),
        layout_evidence=evidence,
        written_as=data.get("written_as", {}),
        scalars=frozenset(data.get("scalars", ())),
        heads=_sides(compiler, "heads"),
        classifiers=_sides(compiler, "classifiers"),
        optional_buffers=frozenset(data.get("optional_buffers", ())),
        absent_means=compile_absences(compiler),
        file_only=frozenset(data.get("file_only", ())),
        positions=compile_positions(compiler),
        facts=compile_facts(compiler),
        causal_masks=frozenset(data.get("causal_masks", ())),
        measures=compile_measures(compiler),
        configurations=compile_configurations(data),
        containers=compile_containers(data, compiler),
    )
    return _with_own_layouts(mapping) if is_hub and not evidence else mapping


def _length(text: str) -> tuple[str, int]:
    """``key[0]`` as the key and the axis."""
    key, _, axis = text.partition("[")
    return key, int(axis[:-1])


def _with_own_layouts(hub: Format) -> Format:
    """A hub that lists no layouts: each tower has one, with the hub's name, which any key of the tower shows."""
    evidence: dict[str, dict[str, Evidence]] = {}
    for rule in hub.rules:
        shown = evidence.setdefault(rule.tower, {hub.name: Evidence()})
        shown[hub.name] = Evidence(any=(*shown[hub.name].any, Clue(rule.source)))
    return replace(hub, layouts=dict.fromkeys(evidence, (hub.name,)), layout_evidence=evidence)


def evidence_in(text: str) -> tuple[Evidence, bool] | None:
    """The `detect` of a hub, from the text of this field alone; None where it cannot be read so.

    Returns:
        The evidence, and whether it says that only the hub's name leads to it.
    """
    try:
        marked = parse_yaml(text, "")
    except MappingError:
        return None
    detect = marked.data.get("detect") if isinstance(marked.data, dict) else None
    if detect == NEVER:
        return Evidence(), True
    if not isinstance(detect, dict) or not all(isinstance(clues, list) for clues in detect.values()):
        return None
    compiler = Compiler(marked)
    try:
        found = compiler.evidence(detect, ("detect",))
    except (KeyError, TypeError):  # it does not follow the schema
        return None
    return (found, False) if found != Evidence() and not compiler.faults else None


def _sides(compiler: Compiler, field: str) -> tuple[Side, ...]:
    """The patterns of a field."""
    sides = (compiler.side(key, (field,)) for key in compiler.marked.data.get(field, ()))
    return tuple(side for side in sides if side is not None)


def _ignored(compiler: Compiler) -> Iterator[Ignored]:
    for key, value in compiler.marked.data.get("ignore", {}).items():
        entry = compiler.ignored(key, value)
        if entry is not None:
            yield entry


def _aliases(compiler: Compiler) -> Iterator[Alias]:
    for i, block in enumerate(compiler.marked.data.get("aliases", [])):
        when = compiler.evidence(block["when"], ("aliases", i, "when")) if "when" in block else None
        rules = tuple(compiler.rules(block, ("aliases", i), ""))
        tied = next((rule for rule in rules if rule.tied is not None), None)
        if tied is not None:
            compiler.faults.append(f"{tied.place}: tied: aliases only rename; write it under `towers:` or `steps:`")
        yield Alias(when, RuleTable(rules))


def _steps(compiler: Compiler) -> Iterator[RuleTable]:
    for i, block in enumerate(compiler.marked.data.get("steps", [])):
        rules = tuple(compiler.rules(block, ("steps", i), ""))
        for rule in rules:
            if rule.oneway or rule.rest:
                what = "oneway: steps have inverses; write the rule under `aliases:`" if rule.oneway else (
                    "rest: a step leaves the keys that it does not match as they are; remove it")  # fmt: skip
                compiler.faults.append(f"{rule.place}: {what}")
        yield RuleTable(rules)


def _variants(compiler: Compiler) -> Iterator[Variant]:
    for i, block in enumerate(compiler.marked.data.get("variants", [])):
        rules: list[Rule] = []
        for tower, entries in block["towers"].items():
            rules += compiler.rules(entries, ("variants", i, "towers", tower), tower)
        when, when_hub = (compiler.evidence(block[name], ("variants", i, name)) for name in ("when", "when_hub"))
        yield Variant(when, when_hub, tuple(rules), block.get("fixed", {}))


def _refusals(compiler: Compiler) -> Iterator[Refusal]:
    for i, item in enumerate(compiler.marked.data.get("refuse", [])):
        when: Evidence = compiler.evidence(item.get("when", {}), ("refuse", i, "when"))
        yield Refusal(item["why"], when, tuple(item.get("contains", ())), item.get("elsewhere", False))


def _unsupported(compiler: Compiler) -> Iterator[Unsupported]:
    for tower, entries in compiler.marked.data.get("unsupported", {}).items():
        for key, why in entries.items():
            side = compiler.side(key, ("unsupported", tower, key))
            if side is not None:
                yield Unsupported(side, tower, why)
