"""Write docs/formats/: one page for each mapping, made from its YAML file, and an index.

    python tools/make_docs.py           write the pages
    python tools/make_docs.py --check   write nothing; exit status 1 if a page is stale

The pages are part of the repository, so that a review of a mapping shows its effect on them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keymap.language.format import Format
from keymap.language.rules import Rule
from keymap.language.shape_form import parse_form, written_form
from keymap.source.registry import hubs, list_formats

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = ROOT / "docs" / "formats"
KINDS = {
    "format": "Formats",
    "hub": "The hub",
    "bridge": "Bridges",
    "tables": "Shared tables",
    "containers": "Wrappers and prefixes",
    "configurations": "Known models",
}
LISTS = {  # fields that are lists of names, with what keymap does with them
    "causal_masks": "No checkpoint holds these buffers. A model on the meta device gets new ones.",
    "wrappers": "A dict under one of these names is the state dict. keymap takes the first and lists the others.",
    "prefixes": "keymap strips a prefix that every key has.",
    "segments": "keymap strips these names anywhere in a key.",
    "counters": "keymap ignores these numbers beside a model.",
    "parts": "A state dict may hold several models under these names. keymap takes the one that fits.",
    "training_state": "A file with these and without weights is refused as training state.",
}
Data = dict[str, Any]


# --- words ---------------------------------------------------------------------------------------------------


def code(text: object) -> str:
    return f"`{text}`"


def scalar(value: object) -> str:
    """A value as YAML writes it."""
    return code(str(value).lower() if isinstance(value, bool) else value)


def cell(text: str) -> str:
    """A cell of a table, with its bars escaped."""
    return text.replace("|", "\\|")


def listed(items: Iterable[object], last: str = "and") -> str:
    """``a``, ``b`` and ``c``."""
    words = [code(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def clue(item: str | Data) -> str:
    if isinstance(item, str):
        return code(item)
    how = f"with {item['ndim']} axes" if "ndim" in item else f"of shape {code(written_form(parse_form(item['shape'])))}"
    return f"{code(item['key'])} {how}"


def clues(items: Sequence[str | Data], last: str) -> str:
    words = [clue(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def evidence(data: Data) -> str:
    """Evidence as a clause."""
    parts = []
    if "all" in data:
        parts.append(f"include {clues(data['all'], 'and')}")
    if "any" in data:
        parts.append(f"include {clues(data['any'], 'or')}")
    if "none" in data:
        parts.append(f"do not include {clues(data['none'], 'or')}")
    return f"the keys {', and '.join(parts)}"


def operation(value: str | Data) -> str:
    """What a rule does to the tensor; empty for a plain renaming."""
    if isinstance(value, str):
        return ""
    does: list[str] = []
    if "table" in value:
        does.append(f"continues with table {code(value['table'])}")
    if "take" in value:
        first, last = value["take"]
        end = "the end" if last is None else last - 1 if isinstance(last, int) else f"{code(last)} - 1"
        does.append(f"take rows {first} to {end}")
    if "view" in value:
        does.append(f"view {code(value['view'])}")
    if "concat" in value:
        parts = f" in parts {value['parts']}" if "parts" in value else ""
        does.append(f"concatenate on axis {code(value['concat'])}{parts}")
    if "order" in value:
        does.append(f"in the order {value['order']}; 0 is a block of zeros")
    if "stack" in value:
        does.append(f"stack on a new axis {value['stack']}")
    if "rows" in value:
        does.append(f"take rows {value['rows']} of the members, in turn")
    if "add" in value:
        does.append(f"add {code(value['add'])}")
    if "times" in value:
        does.append(multiplied(value["times"]))
    if "plus" in value:
        does.append(f"add {value['plus']}")
    if "then" in value:
        does.append(f"then view {code(value['then'])}")
    if "split" in value:
        shares = " : ".join(map(str, value["split"]))
        does.append(f"split {shares} on axis {value.get('axis', 0)}")
    if "unstack" in value:
        does.append(f"one key for each slice of axis {value.get('axis', 0)}")
    if "each" in value:
        does.append(f"view {code(value['each'])} of each")
    if isinstance(value.get("pad"), int):
        does.append(f"rows of zeros up to a multiple of {value['pad']} when it is written")
    elif "pad" in value:
        does.append(f"rows of zeros up to a multiple of {value['pad']['multiple']}")
    if "tied" in value:
        tied = value["tied"]
        does.append(f"the file can hold the same values as {listed(tied if isinstance(tied, list) else [tied])}")
    if "sizes" in value:
        does.append("where " + ", ".join(f"{code(name)} is {code(size)}" for name, size in value["sizes"].items()))
    if value.get("optional"):
        does.append("optional")
    if value.get("oneway"):
        does.append("one-way")
    if value.get("rest"):
        does.append("every key that no other rule matches")
    return "; ".join(does)


def multiplied(times: float | str) -> str:
    """``times`` in words."""
    if not isinstance(times, str):
        return f"multiply by {times}"
    name, _, of = times.partition(" ")
    root = f"the root of {f'the length of axis {of}' if of.isdigit() else code(of)}"
    return f"{'divide' if name.startswith('1/') else 'multiply'} by {root}"


def target(value: str | Data) -> str:
    to = value if isinstance(value, str) else value["to"]
    return listed(to) if isinstance(to, list) else code(to)


def rules(entries: Data, there: str) -> Iterator[str]:
    """A table of rules, in the order of the file."""
    yield f"| key | {there} | operation |"
    yield "|---|---|---|"
    for key, value in entries.items():
        yield f"| {cell(code(key))} | {cell(target(value))} | {cell(operation(value))} |"


# --- what writing needs --------------------------------------------------------------------------------------


def facts(some: Iterable[Rule]) -> list[str]:
    """Facts that these rules need: lengths of axes that share a dimension in a view, and lengths of parts."""
    found: dict[str, None] = {}
    for rule in some:
        for view in (rule.before, rule.then, rule.after):
            for group in view.left if view is not None else ():
                for name in group if len(group) > 1 else ():
                    size = rule.sizes.get(name)
                    if isinstance(size, str) and "." in size:
                        found[size] = None
        found.update(dict.fromkeys(rule.facts_of_parts))
    return list(found)


def writing(mapping: Format) -> Iterator[str]:
    """Whether keymap can write the format, and what it needs for that."""
    every = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
    every += [rule for table in mapping.steps for rule in table.rules]
    if not every:
        yield "This file supports other mappings. It is not a checkpoint format."
        return
    backward = [back for rule in every for back in rule.inverse()]
    reading, back = facts(every), facts(backward)
    if mapping.kind == "bridge":
        yield f"The bridge converts in both directions between {listed(mapping.between)}."
    elif backward:
        yield f'keymap can write this format: `keymap.convert_state_dict(state_dict, to="{mapping.name}")`.'
    if reading:
        yield f"To read it, keymap needs {listed(reading)}. It takes them from the model."
    if back:
        given = ", ".join(f'"{fact}": ...' for fact in back)
        yield f"To write it, pass `facts={{{given}}}`: the weights do not show these."
    lost = [rule for rule in every if not rule.inverse()]
    if lost:
        yield f"These rules are one-way and used only to read: {listed(rule.source for rule in lost)}."


# --- pages ---------------------------------------------------------------------------------------------------


def page(data: Data, mapping: Format, shared: dict[str, Data], place: str, hub: str) -> str:
    """The page of one mapping.

    Args:
        data: of the file.
        mapping: compiled.
        shared: the data of the files whose tables it may use, by name.
        place: the path of the file in the repository.
        hub: the name of its hub.
    """
    up = "../" if page_folder(hub) else ""
    lines = [
        f"<!-- Written by tools/make_docs.py from {place}: edit that file. -->",
        f"# {mapping.name}",
        "",
        f"{mapping.title}.",
        "",
    ]

    def section(title: str, body: Iterable[str]) -> None:
        found = list(body)
        if found:
            lines.extend([f"## {title}", "", *found, ""])

    about = [f"- kind: {mapping.kind}"]
    if mapping.kind in ("format", "bridge"):
        about.append(f"- hub: [{hub}]({hub}.md)")
    if mapping.reference:
        about.append(f"- source of the names: {mapping.reference}")
    if mapping.kind != "hub":
        about += [f"- {tower} tower: layout {listed(names, 'or')}" for tower, names in mapping.layouts.items()]
    if mapping.kind == "bridge":
        about.append(f"- {mapping.tower} tower: from layout {code(mapping.between[0])} to {code(mapping.between[1])}")
    if "uses" in data:
        about.append(f"- uses tables of: {', '.join(f'[{name}]({up}{name}.md)' for name in data['uses'])}")
    if mapping.config is not None:
        about.append(f"- configuration: {code(mapping.config.file)} beside the checkpoint, if it exists")
    if mapping.rules:  # a command, not the pictures: 32 files, 1.6 MB, and all with the same template
        command = f"keymap explain {mapping.name} --html {mapping.name}.html"
        about.append(f"- picture: {code(command)} draws these rules as a page, from key to key")
    lines.extend([*about, ""])
    section("Notes", (f"- {note}" for note in data.get("notes", ())))
    if isinstance(data.get("detect"), dict):
        section("Detection", [f"keymap detects this format if {evidence(data['detect'])}."])
    elif mapping.rules and mapping.kind != "bridge":
        section("Detection", ["Only the name leads to it."])
    section("Layouts", _layouts(data))
    section("Aliases", _aliases(data))
    section("Steps", _steps(data))
    section("Ignored keys", _ignored(data))
    for tower, entries in data.get("unsupported", {}).items():
        section(f"Unsupported keys: {tower}", (f"- {code(key)}: {why}" for key, why in entries.items()))
    section("Refused files", _refused(data))
    there = f"{mapping.between[1]} key" if mapping.kind == "bridge" else f"{hub} key"
    for tower, entries in data.get("towers", {}).items():
        section(f"Rules: {tower}", rules(entries, there))
    for number, variant in enumerate(data.get("variants", ()), 1):
        body = [f"These rules apply to a file if {evidence(variant['when'])}."]
        body += [f"They apply to a model of the hub that is written if {evidence(variant['when_hub'])}.", ""]
        for tower, entries in variant["towers"].items():
            body += [f"{tower}:", "", *rules(entries, there), ""]
        fixed = variant.get("fixed", {}).items()
        body += [*(f"- {code(name)}: always {scalar(value)}" for name, value in fixed), ""] if fixed else []
        section(f"Variant {number}", body[:-1])
    tables = _reached("tables", data, shared)
    for name, entries in tables.items():
        section(f"Table {name}", rules(entries, there))
    section("Lookups", _lookups(_reached("lookups", data, shared, tables)))
    section("Keys whose absence has a meaning", _absence(data))
    section("Position embeddings", _positions(data))
    section("Settings that keymap reads from a model", _facts(data))
    section("Sizes in reports", _measures(data))
    section("Settings that keymap reads from the source", _settings(mapping))
    section("Shared config blocks", _configs(data))
    section("Configurations", _configurations(data))
    for name, about_it in LISTS.items():
        if name in data:
            section(name.replace("_", " ").capitalize(), [about_it, "", ", ".join(map(code, data[name]))])
    for name, title in (("files", "Which file of a folder is loaded"), ("folders", "Folders that are refused")):
        first = ["The first of these that exists; of numbered files the last.", ""] if name == "files" else []
        row = "- {}: {}" if name == "files" else "- A folder with {} {}."
        listing = [row.format(code(key), what) for key, what in data.get(name, {}).items()]
        section(title, [*first, *listing] if listing else ())
    section("Writing", [*writing(mapping), *_fixed(data)])
    return "\n".join(lines).rstrip() + "\n"


def _reached(field: str, data: Data, shared: dict[str, Data], tables: Data | None = None) -> Data:
    """The tables (or lookups) of a file and of those that it uses, as far as its rules need them.

    Args:
        tables: the tables that are reached, in which lookups are searched.
    """
    every: Data = {}
    for other in (*data.get("uses", ()), data["format"]):
        every |= shared[other].get(field, {})
    if not any(name in data for name in ("towers", "variants")):
        return every
    name_of = re.compile(r"<\d+:(\w+)>" if field == "lookups" else r"'table': '(\w+)'")
    start = repr([*(data.get(field) for field in ("towers", "variants", "aliases", "steps")), tables])
    reached, new = set(data.get(field, ())), name_of.findall(start)
    while new:
        reached.update(new)
        new = [name for found in new for name in name_of.findall(repr(every[found])) if name not in reached]
    return {name: value for name, value in every.items() if name in reached}


def _layouts(data: Data) -> Iterator[str]:
    """The hub's layouts, with what shows each."""
    if data.get("kind") != "hub" or "layouts" not in data:
        return
    yield "The first layout that fits is used."
    yield ""
    for tower, layouts in data["layouts"].items():
        for name, shown in layouts.items():
            yield f"- {tower} {code(name)}: {evidence(shown)}"
    for tower, name in data.get("written_as", {}).items():
        yield f"- A conversion to this format writes the {tower} tower in layout {code(name)}."


def _ignored(data: Data) -> Iterator[str]:
    for key, value in data.get("ignore", {}).items():
        entry = {"why": value} if isinstance(value, str) else value
        twin = f"; must equal {code(entry['same_as'])}" if "same_as" in entry else ""
        yield f"- {code(key)}: {entry['why']}{twin}"


def _refused(data: Data) -> Iterator[str]:
    for item in data.get("refuse", ()):
        shown = [evidence(item["when"])] if "when" in item else []
        if "contains" in item:
            shown.append(f"a key contains {listed(item['contains'], 'or')}")
        yield f"- If {' and '.join(shown)}: {item['why']}."


def _aliases(data: Data) -> Iterator[str]:
    if "aliases" in data:
        yield "keymap reads these other key names too. It never writes them."
        yield ""
    for block in data.get("aliases", ()):
        when = f"If {evidence(block['when'])}: " if "when" in block else ""
        for key, value in block.items():
            if key != "when":
                does = f" ({operation(value)})" if operation(value) else ""
                yield f"- {when}{code(key)} is read as {target(value)}{does}."


def _steps(data: Data) -> Iterator[str]:
    for number, block in enumerate(data.get("steps", ()), 1):
        yield f"Step {number}, before the rules:"
        yield ""
        yield from rules(block, "becomes")
        yield ""


def _lookups(lookups: Data) -> Iterator[str]:
    for name, pairs in lookups.items():
        yield f"- {code(name)}: {', '.join(f'{code(key)} is {code(value)}' for key, value in pairs.items())}"


def _absence(data: Data) -> Iterator[str]:
    if "absent_means" in data:
        yield "If only the file has the key, its tensor must hold this value; keymap drops it. If only the model has"
        yield "it, and the file's format has no place for it, keymap fills it with this value."
        yield ""
    only = data.get("file_only", ())
    for key, value in data.get("absent_means", {}).items():
        plain = value["value"] if isinstance(value, dict) else value
        always = "; filled for every format" if isinstance(value, dict) and value.get("always") else ""
        files = "; no model has this key" if key in only else ""
        yield f"- {code(key)}: {'the identity matrix' if plain == 'eye' else plain}{always}{files}"


def _positions(data: Data) -> Iterator[str]:
    for key, value in data.get("positions", {}).items():
        prefix = value.get("prefix")
        rows = f", prefix rows from {listed(prefix)}" if isinstance(prefix, list) else ""
        rows = f", {prefix} prefix row" if isinstance(prefix, int) else rows
        yield f"- {code(key)}: {code(value['axes'])}{rows}"


def _use_of(place: Data) -> str:
    return f"divided by {place['divide']}" if "divide" in place else f"(if it holds anything: {place['word']})"


def _facts(data: Data) -> Iterator[str]:
    for name, value in data.get("facts", {}).items():
        entry = value if isinstance(value, dict) else {"model": value}
        paths = [
            code(p) if isinstance(p, str) else f"{code(p['path'])} {_use_of(p)}" for p in entry.get("model", ())
        ] or ["the same in all models of a hub"]
        label = f"{entry['label']}, set by {entry['change']}: " if "label" in entry else ""
        yield f"- {code(name)}: {label}{', '.join(paths)}"


def _measures(data: Data) -> Iterator[str]:
    for tower, sizes in data.get("measures", {}).items():
        for size, ways in sizes.items():
            yield f"- {tower} {size}: {', '.join(map(code, ways))}"


def _configurations(data: Data) -> Iterator[str]:
    for entry in data.get("configurations", ()):
        yield f"- {', '.join(entry['names'])}"


def _settings(mapping: Format) -> Iterator[str]:
    """Where the source's configuration holds a setting, its default, and what the format's code fixes."""
    config = mapping.config
    if config is not None:
        for name, places in (
            ("image_size", config.image_size),
            ("patch_size", config.patch_size),
            *config.facts.items(),
        ):
            if places:
                paths = ", ".join(dict.fromkeys(code(place.path) for place in places))
                default = f"; default {scalar(config.defaults[name])}" if name in config.defaults else ""
                yield f"- {code(name)}: {paths}{default}"
    for name, value in mapping.fixed.items():
        yield f"- {code(name)}: always {scalar(value)}"
    by_keys: dict[str, list[str]] = {}
    for variant in mapping.variants:
        for name, value in variant.fixed.items():
            by_keys.setdefault(name, []).append(scalar(value))
    for name, values in by_keys.items():
        yield f"- {code(name)}: {' or '.join(values)}, as the keys of the file show"


def _configs(data: Data) -> Iterator[str]:
    for name, block in data.get("configs", {}).items():
        yield f"- {code(name)}: {listed(block.get('facts', {}))}"


def _fixed(data: Data) -> Iterator[str]:
    if "dtypes" in data or "shapes" in data:
        yield ""
    for key, dtype in data.get("dtypes", {}).items():
        yield f"- {code(key)} is written as {dtype}"
    for key, shape in data.get("shapes", {}).items():
        yield f"- {code(key)} is written with shape {shape}"


def index(mappings: Sequence[tuple[str, Format]]) -> str:
    """The list of all pages."""
    lines = [
        "<!-- Written by tools/make_docs.py from mappings/: edit the files there. -->",
        "# Formats",
        "",
        "One page for each file of `mappings/`. [How it works](../how-it-works.md) explains the words,",
        "[The rule language](../rule-language.md) explains the rules. To see the rules of a format as a picture, run",
        "`keymap explain NAME --html NAME.html`, or write",
        "[`keymap.picture.format_page(NAME)`](../api.md#draw) to a file.",
        "",
    ]
    for kind, title in KINDS.items():
        some = [(folder, mapping) for folder, mapping in mappings if mapping.kind == kind]
        if some:
            lines += [f"## {title}", "", *(f"- [{m.name}]({at}{m.name}.md): {m.title}" for at, m in some), ""]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    registry = hubs()
    made: dict[str, str] = {}
    every: list[tuple[str, Format]] = []
    for hub in registry.hubs:
        known = registry.catalogue(hub)
        folder = page_folder(hub)
        data = {name: marked.data for name, marked in known.files.items()}
        tables = {one.name: registry.shared(one.name) for one in registry.files.values() if one.kind == "tables"}
        shared = {name: marked.data for name, marked in tables.items() if marked is not None}
        for name in sorted(known.mappings):
            if f"{name}.md" not in made:  # containers of all hubs
                every.append((folder, known.mappings[name]))
                place = known.places[name].relative_to(ROOT).as_posix()
                made[f"{folder}{name}.md"] = page(data[name], known.mappings[name], {**shared, **data}, place, hub)
    return {"README.md": index(every), **made}


def page_folder(hub: str) -> str:
    """Where the pages of a hub lie: those of files that name no hub at the top."""
    return "" if hub == hubs().default else f"{hub}/"


def stale(made: dict[str, str], folder: Path) -> list[str]:
    """How the folder differs from the pages."""
    there = {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.md")}
    lines = [f"{name} is missing" for name in made if name not in there]
    lines += [f"{name} is stale" for name in made if name in there and there[name] != made[name]]
    return lines + [f"{name} belongs to no mapping" for name in there if name not in made]


def readme(text: str) -> str:
    """The README with a new table of formats."""
    before, mark, rest = text.partition("<!-- formats:")
    comment, line, rest = rest.partition("\n")
    _, end, after = rest.partition("<!-- end of formats -->")
    rows = [
        f"| [{name}](docs/formats/{page_folder(hub)}{name}.md) | {hub} | {title} |"
        for hub in hubs().hubs
        for name, title in list_formats(hub).items()
    ]
    head = ["| format | hub | files |", "|---|---|---|"]
    return before + mark + comment + line + "\n".join([*head, *rows, ""]) + end + after


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the pages of docs/formats/ from mappings/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    parser.add_argument("--folder", type=Path, default=PAGES, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    made = pages()
    found = stale(made, asked.folder)
    front = README.read_text(encoding="utf-8")
    if asked.folder == PAGES and readme(front) != front:
        found.append("../../README.md is stale")
    if asked.check:
        for word in found:
            print(f"docs/formats/{word}: run tools/make_docs.py")
        return 1 if found else 0
    asked.folder.mkdir(parents=True, exist_ok=True)
    for file in asked.folder.rglob("*.md"):
        if str(file.relative_to(asked.folder)) not in made:
            file.unlink()
    for name, text in made.items():
        (asked.folder / name).parent.mkdir(exist_ok=True)
        (asked.folder / name).write_text(text, encoding="utf-8")
    if asked.folder == PAGES:
        README.write_text(readme(front), encoding="utf-8")
    print(f"{len(made)} pages, {len(found)} of them new or changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
