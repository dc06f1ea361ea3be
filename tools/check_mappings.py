"""Check mapping files.

    python tools/check_mappings.py                     all files of mappings/
    python tools/check_mappings.py my_format.yaml ...  these files, together with the shipped ones

Prints one line for each file, and every fault as file:line:column. The exit status is 1 if there are faults.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue
from keymap.language.compile import compile_marked
from keymap.language.format import Format
from keymap.language.review import review
from keymap.language.yaml_marks import Marked, read_yaml
from keymap.paths import data_folder
from keymap.source.samples import evidence_faults


def shown(file: Path) -> str:
    """A path as messages show it."""
    folder = Path.cwd()
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def count(mapping: Format) -> int:
    """The rules of a file, tables written out."""
    aliases = sum(len(block.table.rules) for block in mapping.aliases)
    return len(mapping.rules) + aliases + sum(len(variant.rules) for variant in mapping.variants)


def faults_of(error: MappingError) -> list[str]:
    return list(error.faults or (error.summary,))


def parsed(files: Iterable[Path]) -> tuple[dict[Path, Marked], list[str]]:
    """The files that are YAML, by path, and the faults of the others."""
    marked: dict[Path, Marked] = {}
    faults: list[str] = []
    for file in files:
        try:
            marked[file] = read_yaml(file, shown(file))
        except MappingError as error:
            faults += faults_of(error)
    return marked, faults


def check(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Lines about the files that are right, and all faults of the others."""
    named = list(dict.fromkeys(file.resolve() for file in files))
    shipped = [file.resolve() for file in sorted(data_folder("mappings").glob("*.yaml"))]
    marked, faults = parsed(dict.fromkeys([*shipped, *named]))
    by_name = {str(one.data.get("format")): one for one in marked.values() if isinstance(one.data, dict)}
    lines: dict[str, str] = {}  # by file
    compiled: dict[str, Format] = {}
    for file in list(marked):
        start = time.perf_counter()
        try:
            mapping = compile_marked(marked[file], by_name.get, neighbours=by_name)
        except MappingError as error:
            faults += faults_of(error)
            del marked[file]
            continue
        spent = (time.perf_counter() - start) * 1000
        compiled[mapping.name] = mapping
        if file in named:
            lines[marked[file].file] = f"{mapping.name:24} {mapping.kind:11} {count(mapping):4} rules {spent:8.1f} ms"
    try:
        Catalogue().add(marked)
    except MappingError as error:  # what only all files together show: names, layouts, paths of bridges
        faults += faults_of(error)
    known = Catalogue(compiled, by_name)
    right = [str(marked[file].data["format"]) for file in named if file in marked]
    places = {place_of(fault) for fault in faults}
    for fault in (fault for name in right for fault in review(known, name)):
        faults += [fault] if place_of(fault) not in places else []
    faults = sorted(faults, key=order_of) or list(evidence_faults(known, right))
    wrong = {place_of(fault).split(":")[0] for fault in faults}
    return [line for file, line in lines.items() if file not in wrong], faults


def order_of(fault: str) -> tuple[str, list[int]]:
    """The file, line and column of a fault."""
    file, *numbers = place_of(fault).split(":")
    return file, [int(number) for number in numbers if number.isdigit()]


def place_of(fault: str) -> str:
    """The ``file:line:column`` of a fault."""
    return fault.partition(": ")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check mapping files; exit status 1 if one is wrong.")
    parser.add_argument("files", nargs="*", type=Path, help="mapping files; default: all shipped files")
    files = parser.parse_args(arguments).files or sorted(data_folder("mappings").glob("*.yaml"))
    lines, faults = check(files)
    for text in [*lines, *faults]:
        print(text)
    right = (
        len(lines) if not faults else sum(not any(shown(file.resolve()) in text for text in faults) for file in files)
    )
    print(f"{right} of {len(files)} files are right, {len(faults)} fault{'' if len(faults) == 1 else 's'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
