"""Write docs/formats/: one page for each mapping, from its YAML file alone, and an index.

    python tools/make_docs.py           write the pages
    python tools/make_docs.py --check   write nothing; exit status 1 if a page is stale

The pages are part of the repository, so that a change of a mapping shows its effect on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keymap.language.format import Format
from keymap.language.rules import Rule
from keymap.language.yaml_marks import parse_yaml
from keymap.paths import data_folder
from keymap.source.registry import Catalogue, list_formats

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = Path(__file__).resolve().parents[1] / "docs" / "formats"
KINDS = {
    "format": "Formats",
    "hub": "The hub",
    "bridge": "Respellings",
    "tables": "Shared tables",
    "containers": "Wrappers and prefixes",
    "configurations": "Known models",
}
Data = dict[str, Any]


# --- words ---------------------------------------------------------------------------------------------------


def code(text: object) -> str:
    return f"`{text}`"


def cell(text: str) -> str:
    """A cell of a table: a bar would end it."""
    return text.replace("|", "\\|")


def listed(items: Iterable[object], last: str = "and") -> str:
    """``a``, ``b`` and ``c``."""
    words = [code(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def clues(items: Sequence[str | Data], last: str) -> str:
    words = [code(i) if isinstance(i, str) else f"{code(i['key'])} with {i['ndim']} axes" for i in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def evidence(data: Data) -> str:
    """Evidence as one sentence without its end."""
    parts = []
    if "all" in data:
        parts.append(f"there {'is' if len(data['all']) == 1 else 'are'} {clues(data['all'], 'and')}")
    if "any" in data:
        parts.append(f"there is {clues(data['any'], 'or')}")
    if "none" in data:
        parts.append(f"there is no {clues(data['none'], 'or')}")
    return ", and ".join(parts)


def operation(value: str | Data) -> str:
    """What a rule does to the tensor, in words; empty for a plain renaming."""
    if isinstance(value, str):
        return ""
    does: list[str] = []
    if "table" in value:
        does.append(f"continued by table {code(value['table'])}")
    if "take" in value:
        first, last = value["take"]
        does.append(f"rows {first} to {'the end' if last is None else last - 1}")
    if "view" in value:
        does.append(code(value["view"]))
    if "concat" in value:
        parts = f" in parts {value['parts']}" if "parts" in value else ""
        does.append(f"joined on axis {code(value['concat'])}{parts}")
    if "order" in value:
        does.append(f"in the order {value['order']}, where 0 is a member of zeros")
    if "stack" in value:
        does.append(f"stacked on a new axis {value['stack']}")
    if "rows" in value:
        does.append(f"rows {value['rows']} of the members in turn")
    if "add" in value:
        does.append(f"plus {code(value['add'])}")
    if "times" in value:
        does.append(f"times {value['times']}")
    if "plus" in value:
        does.append(f"plus {value['plus']}")
    if "then" in value:
        does.append(f"then {code(value['then'])}")
    if "split" in value:
        shares = " : ".join(map(str, value["split"]))
        does.append(f"cut {shares} on axis {value.get('axis', 0)}")
    if "unstack" in value:
        does.append(f"one key for each slice of axis {value.get('axis', 0)}")
    if "sizes" in value:
        does.append("where " + ", ".join(f"{code(name)} is {code(size)}" for name, size in value["sizes"].items()))
    if value.get("optional"):
        does.append("may be absent")
    if value.get("oneway"):
        does.append("one way")
    if value.get("rest"):
        does.append("all keys that no other rule owns")
    return "; ".join(does)


def target(value: str | Data) -> str:
    to = value if isinstance(value, str) else value["to"]
    return listed(to) if isinstance(to, list) else code(to)


def rules(entries: Data, there: str) -> Iterator[str]:
    """A table of rules as they are written."""
    yield f"| key | {there} | operation |"
    yield "|---|---|---|"
    for key, value in entries.items():
        yield f"| {cell(code(key))} | {cell(target(value))} | {cell(operation(value))} |"


# --- what writing needs --------------------------------------------------------------------------------------


def facts(some: Iterable[Rule]) -> list[str]:
    """Facts that views of these rules need: axes that share a dimension and are not told by a number."""
    found: dict[str, None] = {}
    for rule in some:
        for view in (rule.before, rule.then, rule.after):
            for group in view.left if view is not None else ():
                for name in group if len(group) > 1 else ():
                    size = rule.sizes.get(name)
                    if isinstance(size, str) and "." in size:
                        found[size] = None
    return list(found)


def writing(mapping: Format) -> Iterator[str]:
    """Whether a format can be written, and what that needs."""
    every = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
    if not every:
        yield "It is no format of a file: it is neither read nor written by itself."
        return
    backward = [back for rule in every for back in rule.inverse()]
    reading, back = facts(every), facts(backward)
    if mapping.kind == "bridge":
        yield f"It goes both ways between {listed(mapping.between)}."
    elif backward:
        yield f'It can be written: `keymap.convert_state_dict(state_dict, to="{mapping.name}")`.'
    if reading:
        yield f"Reading needs the facts {listed(reading)}, which the model tells."
    if back:
        given = ", ".join(f'"{fact}": ...' for fact in back)
        yield f"Writing needs the facts {listed(back)}, which no weight tells: `facts={{{given}}}`."
    lost = [rule for rule in every if not rule.inverse()]
    if lost:
        yield f"Rules that are not written back: {listed(rule.source for rule in lost)}."


# --- pages ---------------------------------------------------------------------------------------------------


def page(data: Data, mapping: Format, shared: dict[str, Data]) -> str:
    """The page of one mapping."""
    lines = [
        f"<!-- Written by tools/make_docs.py from mappings/{mapping.name}.yaml: edit that file. -->",
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
    if mapping.reference:
        about.append(f"- names read in: {mapping.reference}")
    about += [f"- {tower} tower: {listed(spellings, 'or')}" for tower, spellings in mapping.layouts.items()]
    if "uses" in data:
        about.append(f"- tables from: {', '.join(f'[{name}]({name}.md)' for name in data['uses'])}")
    if "config" in data:
        about.append(f"- configuration: {code(data['config']['file'])} beside the file, where it is there")
    lines.extend([*about, ""])
    section("Notes", (f"- {note}" for note in data.get("notes", ())))
    if "detect" in data:
        section("Evidence", [f"A file is of this format if {evidence(data['detect'])}."])
    section("Spellings, the first that fits", _spellings(data))
    section("Other forms that are read", _accepts(data))
    section("Left out", _left_out(data))
    for tower, entries in data.get("unsupported", {}).items():
        section(f"No place in OpenCLIP: {tower}", (f"- {code(key)}: {why}" for key, why in entries.items()))
    section("Refused in words", _refused(data))
    there = "other spelling" if mapping.kind == "bridge" else "hub"
    for group, entries in data.get("towers", {}).items():
        section(f"Rules: {group}", rules(entries, there))
    for number, variant in enumerate(data.get("variants", ()), 1):
        body = [f"These rules hold for a file if {evidence(variant['when'])};"]
        body += [f"on the way back if {evidence(variant['when_hub'])}.", ""]
        for group, entries in variant["towers"].items():
            body += [f"{group}:", "", *rules(entries, there), ""]
        section(f"Variant {number}", body[:-1])
    used = {name: table for other in data.get("uses", ()) for name, table in shared[other].get("tables", {}).items()}
    for name, entries in {**used, **data.get("tables", {})}.items():
        section(f"Table {name}", rules(entries, there))
    section("Lookups", _lookups(data))
    section("Absence", _absence(data))
    section("Position embeddings", _positions(data))
    section("Facts that a model tells", _facts(data))
    section("Sizes for reports", _measures(data))
    section("What the source tells of itself", _told(data))
    section("Configurations", _configurations(data))
    for name in ("causal_masks", "wrappers", "prefixes", "segments", "counters", "parts", "training_state"):
        section(name.replace("_", " ").capitalize(), (f"- {code(item)}" for item in data.get(name, ())))
    for name, title in (("files", "The checkpoint of a folder, the first that is there"), ("folders", "Other folders")):
        section(title, (f"- {code(key)}: {what}" for key, what in data.get(name, {}).items()))
    section("Writing", [*writing(mapping), *_fixed(data)])
    return "\n".join(lines).rstrip() + "\n"


def _spellings(data: Data) -> Iterator[str]:
    for tower, spellings in data.get("layouts", {}).items():
        for name, told in spellings.items():
            yield f"- {tower} {code(name)}: {evidence(told)}"


def _left_out(data: Data) -> Iterator[str]:
    for key, value in data.get("ignore", {}).items():
        told = {"why": value} if isinstance(value, str) else value
        twin = f"; must be equal to {code(told['same_as'])}" if "same_as" in told else ""
        yield f"- {code(key)}: {told['why']}{twin}"


def _refused(data: Data) -> Iterator[str]:
    for item in data.get("refuse", ()):
        told = [evidence(item["when"])] if "when" in item else []
        if "contains" in item:
            told.append(f"a key contains {' or '.join(map(code, item['contains']))}")
        yield f"- if {' and '.join(told)}: {item['why']}"


def _accepts(data: Data) -> Iterator[str]:
    for block in data.get("aliases", ()):
        when = f"If {evidence(block['when'])}: " if "when" in block else ""
        for key, value in block.items():
            if key != "when":
                does = f" ({operation(value)})" if operation(value) else ""
                yield f"- {when}{code(key)} is read as {target(value)}{does}."


def _lookups(data: Data) -> Iterator[str]:
    for name, pairs in data.get("lookups", {}).items():
        yield f"- {code(name)}: {', '.join(f'{code(key)} is {code(value)}' for key, value in pairs.items())}"


def _absence(data: Data) -> Iterator[str]:
    if "absent_means" in data:
        yield "Extra in the file, the key must hold the value. Where the file's format has no place for it, the model's"
        yield "is filled with the value."
        yield ""
    only = data.get("file_only", ())
    for key, value in data.get("absent_means", {}).items():
        plain = value["value"] if isinstance(value, dict) else value
        always = "; filled whatever the format" if isinstance(value, dict) and value.get("always") else ""
        files = "; only files have it" if key in only else ""
        yield f"- {code(key)}: {'the identity' if plain == 'eye' else plain}{always}{files}"


def _positions(data: Data) -> Iterator[str]:
    for key, value in data.get("positions", {}).items():
        prefix = value.get("prefix")
        rows = f", prefix rows from {listed(prefix)}" if isinstance(prefix, list) else ""
        rows = f", {prefix} prefix row" if isinstance(prefix, int) else rows
        yield f"- {code(key)}: {code(value['axes'])}{rows}"


def _facts(data: Data) -> Iterator[str]:
    for name, value in data.get("facts", {}).items():
        told = value if isinstance(value, dict) else {"model": value}
        paths = [
            code(p) if isinstance(p, str) else f"{code(p['path'])} divided by {p['divide']}" for p in told["model"]
        ]
        label = f"{told['label']}, set by {told['change']}: " if "label" in told else ""
        yield f"- {code(name)}: {label}{', '.join(paths)}"


def _measures(data: Data) -> Iterator[str]:
    for tower, sizes in data.get("measures", {}).items():
        for size, ways in sizes.items():
            yield f"- {tower} {size}: {', '.join(map(code, ways))}"


def _configurations(data: Data) -> Iterator[str]:
    for entry in data.get("configurations", ()):
        yield f"- {', '.join(entry['names'])}"


def _told(data: Data) -> Iterator[str]:
    config = data.get("config", {})

    def places(value: Any) -> str:
        entries = value if isinstance(value, list) else [value]
        return ", ".join(code(e if isinstance(e, str) else e["path"]) for e in entries)

    for name in ("image_size", "patch_size"):
        if name in config:
            yield f"- {code(name)}: {places(config[name])}"
    for name, value in config.get("facts", {}).items():
        default = f"; {config['defaults'][name]} where it is left out" if name in config.get("defaults", {}) else ""
        yield f"- {code(name)}: {places(value)}{default}"
    for name, value in data.get("fixed", {}).items():
        yield f"- {code(name)}: always {code(str(value).lower() if isinstance(value, bool) else value)}"


def _fixed(data: Data) -> Iterator[str]:
    if "dtypes" in data or "shapes" in data:
        yield ""
    for key, dtype in data.get("dtypes", {}).items():
        yield f"- {code(key)} is written as {dtype}"
    for key, shape in data.get("shapes", {}).items():
        yield f"- {code(key)} is written with shape {shape}"


def index(mappings: Sequence[Format]) -> str:
    """The list of all pages."""
    lines = [
        "<!-- Written by tools/make_docs.py from mappings/: edit the files there. -->",
        "# Formats",
        "",
        "One page for each file of `mappings/`. The words are explained in [design.md](../design.md), the rules in",
        "[rule-language.md](../rule-language.md).",
        "",
    ]
    for kind, title in KINDS.items():
        some = [mapping for mapping in mappings if mapping.kind == kind]
        if some:
            lines += [f"## {title}", "", *(f"- [{m.name}]({m.name}.md): {m.title}" for m in some), ""]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    files = sorted(data_folder("mappings").glob("*.yaml"))
    known = Catalogue()
    known.add(files)
    data = {file.stem: parse_yaml(file.read_text(encoding="utf-8"), file.name).data for file in files}
    made = {f"{name}.md": page(data[name], known.mappings[name], data) for name in data}
    return {"README.md": index([known.mappings[name] for name in data]), **made}


def stale(made: dict[str, str], folder: Path) -> list[str]:
    """What differs between the pages and the folder."""
    there = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    words = [f"{name} is missing" for name in made if name not in there]
    words += [f"{name} is stale" for name in made if name in there and there[name] != made[name]]
    return words + [f"{name} belongs to no mapping" for name in there if name not in made]


def readme(text: str) -> str:
    """The README with its table of formats as they are now."""
    before, mark, rest = text.partition("<!-- formats:")
    comment, line, rest = rest.partition("\n")
    _, end, after = rest.partition("<!-- end of formats -->")
    rows = [f"| [{name}](docs/formats/{name}.md) | {title} |" for name, title in list_formats().items()]
    return before + mark + comment + line + "\n".join(["| name | what |", "|---|---|", *rows, ""]) + end + after


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
    for file in asked.folder.glob("*.md"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (asked.folder / name).write_text(text, encoding="utf-8")
    if asked.folder == PAGES:
        README.write_text(readme(front), encoding="utf-8")
    print(f"{len(made)} pages, {len(found)} of them new or changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
