"""What a check of a mapping file finds beside its faults: names and fields that a load could not use.

A file with one of these compiles and may even load. They are reported when a contributor checks a file, not when it is
used: misspelt targets, unknown facts and values, unused tables and lookups, evidence that no rule owns, sizes of axes
that no view has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from keymap.language.amounts import facts_of, parse_amount
from keymap.language.catalogue import Catalogue
from keymap.language.format import Fact, Format
from keymap.language.overlap import overlap
from keymap.language.pattern import PatternError, Side
from keymap.language.review_targets import wrong_targets
from keymap.language.rules import Rule
from keymap.language.schema_words import as_yaml, did_you_mean
from keymap.language.view import ViewError, parse_view
from keymap.language.yaml_marks import Marked, Path

__all__ = ["review", "vocabulary_of"]

_NEAR = 0.7


Vocabulary = Mapping[str, Mapping[Any, set[str]]]


def vocabulary_of(known: Catalogue) -> Vocabulary:
    """The values that files name for each fact, and for each value the names of these files."""
    found: dict[str, dict[Any, set[str]]] = {}
    for name, marked in known.files.items():
        for _, fact, values in _named_facts(marked.data):
            for value in values:
                found.setdefault(fact, {}).setdefault(value, set()).add(name)
    return found


def review(known: Catalogue, name: str, vocabulary: Vocabulary | None = None) -> list[str]:
    """Everything that a check finds in a compiled file, each with ``file:line:column``, in the order of its lines.

    Args:
        known: all mappings, the hub's and this one among them.
        name: of the mapping.
        vocabulary: `vocabulary_of` all mappings, if the caller has it.
    """
    mapping, marked = known.mappings[name], known.files[name]
    faults: list[tuple[str, str]] = []
    if mapping.kind in ("format", "bridge"):
        faults += _layouts(marked, mapping, known)
        faults += wrong_targets(marked, mapping, known)
        faults += _evidence(marked, mapping)
    faults += _facts(marked, known.hub.facts, name, vocabulary_of(known) if vocabulary is None else vocabulary)
    faults += _facts_of_names(mapping, known.hub)
    faults += _unused(marked, known, name)
    faults += _sizes(marked, known)
    return [f"{place}: {text}" for place, text in sorted(dict.fromkeys(faults), key=_order)]


def _order(fault: tuple[str, str]) -> tuple[int, int]:
    line, column = fault[0].rsplit(":", 2)[1:]
    return int(line), int(column)


# --- layouts ---


def _layouts(marked: Marked, mapping: Format, known: Catalogue) -> Iterator[tuple[str, str]]:
    """Towers with rules whose layout is not named, where the hub lists layouts."""
    hub = known.hub
    listed = mapping.kind == "format" and known.files[hub.name].data.get("layouts")
    for tower in marked.data.get("towers", {}) if listed else ():
        if tower in hub.layouts and tower not in mapping.layouts:
            names = " or ".join(hub.layouts[tower])
            yield marked.at(("towers", tower)), f"layouts lacks this tower: add `{tower}: {names}` to layouts"


# --- evidence ---


def _evidence(marked: Marked, mapping: Format) -> Iterator[tuple[str, str]]:
    """Clues of ``detect``, and patterns of ``shapes`` and ``dtypes``, whose keys nothing in the file owns."""
    rules: list[Rule] = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
    of_rules = [rule.source for rule in rules]
    owned = [
        *of_rules,
        *(rule.source for alias in mapping.aliases for rule in alias.table.rules),
        *(rule.source for table in mapping.steps for rule in table.rules),
        *(entry.side for entry in mapping.ignore),
        *(entry.side for entry in mapping.unsupported),
    ]
    for name in ("all", "any"):
        for number, clue in enumerate(getattr(mapping.detect, name)):
            if not _shared(clue.side, owned):
                text = f"no rule of the file owns '{clue.side}': a file of this format does not have such a key"
                yield marked.at(("detect", name, number)), text
    for field, entries in (("shapes", mapping.shapes), ("dtypes", mapping.dtypes)):
        for pattern, (side, _) in zip(marked.data.get(field, {}), entries, strict=True):
            if not _shared(side, of_rules):
                yield marked.at((field, pattern)), f"no rule of the file has a source key '{side}'"


def _shared(side: Side, others: Iterable[Side]) -> bool:
    """True where a key of a side is also one of the others'."""
    try:
        return any(overlap(side, other) is not None for other in others)
    except PatternError:  # too costly to decide
        return True


# --- facts ---


def _facts(
    marked: Marked, hub_facts: Mapping[str, Fact], name: str, vocabulary: Vocabulary
) -> Iterator[tuple[str, str]]:
    """Facts that neither the hub nor the file itself declares, and values that no other file uses for a fact."""
    hub_words = {word for entry in hub_facts.values() for word in entry.words.values() if isinstance(word, str)}
    own_facts = marked.data.get("facts", {}) if marked.data.get("kind") == "tables" else {}
    named = (entry for entry in _named_facts(marked.data) if entry[1] in hub_facts or entry[1] not in own_facts)
    for path, fact, values in named:  # without those that a file of tables declares for another hub
        if fact not in hub_facts:
            yield marked.at(path), _unknown(fact, hub_facts)
            continue
        entry = hub_facts[fact]
        by_others = (value for value, files in vocabulary.get(fact, {}).items() if files - {name})
        allowed: set[Any] = {*by_others, *entry.words, *entry.words.values()}
        if entry.present:
            allowed = {True, False}
        for value in values:
            text = "" if value is None or value in hub_words else _wrong_fact(fact, value, allowed, entry.present)
            if text:
                yield marked.at(path), text


def _unknown(fact: str, hub_facts: Mapping[str, Fact]) -> str:
    today = next((name for name, entry in hub_facts.items() if entry.formerly == fact), "")
    hint = f"; it is now called {today!r}" if today else did_you_mean(fact, hub_facts, "facts are")
    return f"there is no fact {fact!r}{hint}"


def _facts_of_names(mapping: Format, hub: Format) -> Iterator[tuple[str, str]]:
    """Facts in the patterns of rules that the hub does not know."""
    tables = [mapping.rules, *(variant.rules for variant in mapping.variants)]
    tables += [*(block.table.rules for block in mapping.aliases), *(table.rules for table in mapping.steps)]
    for rule in (rule for rules in tables for rule in rules):
        for fact in rule.facts_of_names:
            if fact not in hub.facts:
                yield rule.place, f"there is no fact {fact!r}{did_you_mean(fact, hub.facts, 'facts are')}"


def _wrong_fact(fact: str, value: Any, allowed: set[Any], decided: bool) -> str:
    """What is wrong with the value of a fact; empty if nothing is.

    Args:
        allowed: values that the hub or other formats use.
        decided: there are no others.
    """
    words = sorted({str(known) for known in allowed if isinstance(known, str)})
    if any(type(value) is type(known) and value == known for known in allowed):
        return ""
    near = get_close_matches(str(value), words, 1, _NEAR)
    if near:
        return f"{fact}: {value!r} is not known; did you mean {near[0]!r}?"
    numbers = bool(allowed) and all(type(known) in (int, float) for known in allowed)
    if numbers and not (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return f"{fact}: {as_yaml(value)} is not a number; write a number, for example {as_yaml(min(allowed))}"
    if decided:
        return f"{fact}: {as_yaml(value)} is not known; write one of {', '.join(sorted(map(as_yaml, allowed)))}"
    return ""


def _named_facts(data: Mapping[str, Any]) -> Iterator[tuple[Path, str, list[Any]]]:
    """Every fact that a file names outside of rules: where, its name, and the values given for it."""
    blocks: list[tuple[Path, Mapping[str, Any]]] = [(("configs", n), b) for n, b in data.get("configs", {}).items()]
    if "config" in data:
        blocks.append((("config",), data["config"]))
    lookups = data.get("lookups", {})
    for path, block in blocks:
        for fact, places in block.get("facts", {}).items():
            values = []
            for place in places if isinstance(places, list) else [places]:
                words = place.get("words", {}) if isinstance(place, dict) else {}
                values += list((lookups.get(words, {}) if isinstance(words, str) else words).values())
            yield (*path, "facts", fact), fact, values
        for fact, value in block.get("defaults", {}).items():
            yield (*path, "defaults", fact), fact, [value]
    for fact, value in data.get("fixed", {}).items():
        yield ("fixed", fact), fact, [value]
    for number, variant in enumerate(data.get("variants", ())):
        for fact, value in variant.get("fixed", {}).items():
            yield ("variants", number, "fixed", fact), fact, [value]
    repository = data.get("repository", {})
    for fact, value in repository.get("requires", {}).items():
        yield ("repository", "requires", fact), fact, value if isinstance(value, list) else [value]
    for number, group in enumerate(repository.get("alike", ())):
        yield from ((("repository", "alike", number, "facts"), fact, []) for fact in group["facts"])
    for name, template in repository.get("files", {}).items():
        yield from _facts_of_template(template, ("repository", "files", name), lookups)


def _facts_of_template(value: Any, where: Path, lookups: Mapping[str, Any]) -> Iterator[tuple[Path, str, list[Any]]]:
    """The facts that computed values of a file name, with the words for them."""
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _facts_of_template(inner, (*where, number), lookups)
    if not isinstance(value, dict):
        return
    if isinstance(value.get("fact"), str):
        words = value.get("words", {})
        known = list((lookups.get(words, {}) if isinstance(words, str) else words).values())
        yield where, value["fact"], [*known, *value.get("write", {})]
    if isinstance(value.get("divide"), str) and "[" not in value["divide"]:
        yield where, value["divide"], []
    for name, inner in value.items():
        if name not in ("words", "write"):
            yield from _facts_of_template(inner, (*where, name), lookups)


# --- what nothing uses ---


def _unused(marked: Marked, known: Catalogue, name: str) -> Iterator[tuple[str, str]]:
    """Tables, lookups and config blocks that nothing uses; of a file for others, where one of them is known."""
    users = [other.data for other in known.files.values() if name in other.data.get("uses", ())]
    if marked.data.get("kind") == "tables" and not users:
        return
    named: set[str] = set()
    for data in (marked.data, *users):
        named |= set(_names(data))
    for field, what in (("tables", "`table: NAME`"), ("lookups", "<1:NAME>"), ("configs", "`config: {use: NAME}`")):
        for entry in marked.data.get(field, {}):
            if f"{field}/{entry}" not in named:
                how = what.replace("NAME", entry)
                yield marked.at((field, entry)), f"{entry} is not used: use it with {how}, or remove it"


def _names(value: Any, key: str = "") -> Iterator[str]:
    """The tables, lookups and config blocks that a value names, as ``section/name``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _names(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner, key)
    elif isinstance(value, str):
        sections = {"table": "tables", "words": "lookups", "use": "configs"}
        if key in sections:
            yield f"{sections[key]}/{value}"
        yield from (f"lookups/{found}" for found in re.findall(r"<\d+:([^>]*)>", value))


# --- sizes ---


def _sizes(marked: Marked, known: Catalogue) -> Iterator[tuple[str, str]]:
    """Lengths of axes that no view has, and lengths that are neither a number, an axis nor a fact."""
    tables = {name: table for file in _used_files(marked, known) for name, table in file.get("tables", {}).items()}
    every: set[str] = set()
    for path, options in _rules(marked.data):
        axes = _axes(options, tables, ())
        every |= axes
        yield from _wrong_sizes(marked, (*path, "sizes"), options.get("sizes", {}), axes, known.hub)
        yield from _wrong_amounts(marked, path, options, known.hub)
    yield from _wrong_sizes(marked, ("sizes",), marked.data.get("sizes", {}), every, known.hub)


def _wrong_sizes(
    marked: Marked, path: Path, sizes: Mapping[str, int | str], axes: set[str], hub: Format
) -> Iterator[tuple[str, str]]:
    for axis, size in sizes.items():
        at = marked.at((*path, axis))
        if axis not in axes:
            known = did_you_mean(axis, sorted(axes), "axes are") if axes else "; the rule has no `view`"
            yield at, f"no view has the axis {axis!r}{known}"
        elif isinstance(size, str) and size not in axes and size not in hub.facts:
            near = did_you_mean(size, [*hub.facts, *sorted(axes)], "facts are")
            yield at, f"{axis}: {size!r} is neither an axis of the view nor a fact{near}"


def _wrong_amounts(marked: Marked, path: Path, options: Mapping[str, Any], hub: Format) -> Iterator[tuple[str, str]]:
    """Lengths of parts, and roots, by a fact that the hub does not know."""
    pad, times = options.get("pad"), options.get("times")
    rooted = times.split()[1] if isinstance(times, str) else "0"
    of_one = {"pad": [pad["keep"]] if isinstance(pad, dict) else [], "times": [] if rooted.isdigit() else [rooted]}
    for field in ("take", "split", "parts", "pad", "times"):
        for written in of_one[field] if field in of_one else options.get(field, ()):
            for fact in facts_of([parse_amount(written)]) if written not in ("*", None) else ():
                if fact not in hub.facts:
                    near = did_you_mean(fact, hub.facts, "facts are")
                    yield marked.at((*path, field)), f"{field}: there is no fact {fact!r}{near}"


def _used_files(marked: Marked, known: Catalogue) -> Iterator[Mapping[str, Any]]:
    for name in marked.data.get("uses", ()):
        if name in known.files:
            yield known.files[name].data
    yield marked.data


def _rules(data: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The rules of a file that are more than a target, each with its path."""
    groups: list[tuple[Path, Any]] = [(("towers", t), rules) for t, rules in data.get("towers", {}).items()]
    groups += [(("tables", t), rules) for t, rules in data.get("tables", {}).items()]
    for field in ("aliases", "steps"):
        groups += [((field, i), rules) for i, rules in enumerate(data.get(field, ()))]
    for i, variant in enumerate(data.get("variants", ())):
        groups += [(("variants", i, "towers", t), rules) for t, rules in variant["towers"].items()]
    for path, rules in groups:
        for key, rule in rules.items():
            if isinstance(rule, dict) and "to" in rule:
                yield (*path, key), rule


def _axes(options: Mapping[str, Any], tables: Mapping[str, Any], within: tuple[str, ...]) -> set[str]:
    """The axes that the views of a rule name; of a rule with a table those of the table's rules."""
    found: set[str] = set()
    for field in ("view", "then", "each"):
        try:
            view = parse_view(options[field]) if field in options else None
        except ViewError:
            continue
        found |= {axis for group in view.left for axis in group} if view is not None else set()
    table = options.get("table", "")
    if table in tables and table not in within:
        for rule in tables[table].values():
            found |= _axes(rule, tables, (*within, table)) if isinstance(rule, dict) else set()
    return found
