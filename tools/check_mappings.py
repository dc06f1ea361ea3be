"""Check mapping files.

    python tools/check_mappings.py                     all files of mappings/
    python tools/check_mappings.py my_format.yaml ...  these files, together with the shipped ones

Prints one line for each file, and every fault as file:line:column. The exit status is 1 if there are faults.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue
from keymap.language.compile import compile_mapping
from keymap.language.format import Format
from keymap.language.yaml_marks import Marked, parse_yaml
from keymap.paths import data_folder
from keymap.source.samples import check_evidence


def shown(file: Path) -> str:
    """A path as messages show it."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def count(mapping: Format) -> int:
    """The number of rules of a file, with those of its tables."""
    aliases = sum(len(block.table.rules) for block in mapping.aliases)
    return len(mapping.rules) + aliases + sum(len(variant.rules) for variant in mapping.variants)


def faults_of(error: MappingError) -> list[str]:
    return list(error.faults or (error.summary,))


def check(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """A line for each correct file, and all faults of the others."""
    lines: list[str] = []
    faults: list[str] = []
    shipped = sorted(data_folder("mappings").glob("*.yaml"))
    together = {file.resolve(): file for file in [*shipped, *files]}
    parsed: dict[str, Marked] = {}  # for tables that files share
    texts: dict[Path, str] = {}
    for place, file in together.items():
        try:
            texts[place] = file.read_text(encoding="utf-8")
            marked = parse_yaml(texts[place], shown(place))
            parsed[str(marked.data.get("format"))] = marked
        except MappingError as error:
            faults += faults_of(error)
        except (OSError, UnicodeDecodeError, AttributeError) as fault:
            faults.append(f"{shown(place)}:1:1: {fault}")
    if faults:
        return lines, faults
    for file in files:
        start = time.perf_counter()
        try:
            mapping = compile_mapping(texts[file.resolve()], shown(file.resolve()), parsed.get)
        except MappingError as error:
            faults += faults_of(error)
            continue
        spent = (time.perf_counter() - start) * 1000
        lines.append(f"{mapping.name:24} {mapping.kind:11} {count(mapping):4} rules {spent:8.1f} ms")
    if not faults:  # checks across files: names, layouts, evidence, paths of bridges
        try:
            Catalogue().add(together, check=check_evidence)
        except MappingError as error:
            faults += faults_of(error)
    return lines, faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check mapping files; exit status 1 if one is wrong.")
    parser.add_argument("files", nargs="*", type=Path, help="mapping files; default: all shipped files")
    files = parser.parse_args(arguments).files or sorted(data_folder("mappings").glob("*.yaml"))
    lines, faults = check(files)
    for text in [*lines, *faults]:
        print(text)
    print(f"{len(lines)} of {len(files)} files are right, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
