"""Check mapping files: everything that keymap finds wrong with them, without registering them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue, shown_path
from keymap.language.compile import compile_marked
from keymap.language.format import Format
from keymap.language.header import Header, read_header
from keymap.language.review import review, vocabulary_of
from keymap.language.schema_words import did_you_mean
from keymap.language.yaml_marks import Marked, read_yaml
from keymap.paths import data_folder
from keymap.source.registry import Registry, installed_files, yaml_files
from keymap.source.samples import evidence_faults

__all__ = ["Checked", "FileCheck", "check_files", "shipped_files"]


class FileCheck(NamedTuple):
    """A mapping file that is right.

    Attributes:
        file: as messages show it.
        name, kind: of the mapping.
        rules: how many rules it has, tables written out.
        milliseconds: the time that it took to compile.
    """

    file: str
    name: str
    kind: str
    rules: int
    milliseconds: float


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        right: the files without a fault.
        faults: ``file:line:column: what is wrong``, in the order of files and lines; the faults of files that the
            checked ones use are among them.
        files: the number of files that were checked.
        untouched: the number of files that no fault names.
    """

    right: tuple[FileCheck, ...]
    faults: tuple[str, ...]
    files: int
    untouched: int


def shipped_files() -> list[Path]:
    """The mapping files that keymap ships."""
    return sorted(data_folder("mappings").rglob("*.yaml"))


def check_files(paths: Sequence[Path]) -> Checked:
    """Check mapping files, together with those of their hubs that keymap ships.

    Args:
        paths: files, or folders with ``*.yaml`` files.

    Raises:
        MappingError: a path does not exist, or a folder has no ``.yaml`` file; or an installed package is broken.
    """
    named = list(dict.fromkeys(file.resolve() for path in paths for file in yaml_files(path)))
    headers: dict[Path, Header] = {}
    faults: list[str] = []
    for file in dict.fromkeys([*(file.resolve() for file in shipped_files()), *named]):
        try:
            headers[file] = read_header(file, shown_path(file))
        except MappingError as error:
            faults += _faults_of(error)
    registry = _with_installed(Registry(headers), [headers[file] for file in named if file in headers])
    by_hub: dict[str, list[Path]] = {}
    for file in (file for file in named if file in headers):
        by_hub.setdefault(registry.hub_of(headers[file]), []).append(file)
    checks: dict[Path, FileCheck] = {}
    for hub, files in by_hub.items():
        if hub not in registry.hubs:
            unknown = f"there is no hub {hub!r}{did_you_mean(hub, registry.hubs)}"
            faults += [f"{shown_path(file)}:{headers[file].line}:1: {unknown}" for file in files]
            continue
        right, wrong = _check_hub(registry, hub, files)
        checks |= right
        faults += wrong
    faults = sorted(faults, key=_order_of)
    places = {_place_of(fault).split(":")[0] for fault in faults}
    found = tuple(checks[file] for file in named if file in checks and checks[file].file not in places)
    untouched = sum(not any(shown_path(file) in fault for fault in faults) for file in named)
    return Checked(found, tuple(faults), len(named), len(found) if not faults else untouched)


def _with_installed(registry: Registry, checked: Sequence[Header]) -> Registry:
    """With the files of other packages, if files that are checked belong to hubs that keymap does not ship.

    Raises:
        MappingError: a package is broken.
    """
    wanted = {registry.hub_of(header) for header in checked} - set(registry.hubs)
    if not wanted:
        return registry
    names = {header.name for header in checked}
    found = (read_header(file.resolve(), shown_path(file)) for file in installed_files())
    more = {one.path: one for one in found if registry.hub_of(one) in wanted and one.name not in names}
    return Registry({**more, **registry.files})


def _check_hub(registry: Registry, hub: str, named: Sequence[Path]) -> tuple[dict[Path, FileCheck], list[str]]:
    """Check files of one hub, together with its other files; what is right by path, and the faults."""
    marked, faults = _parsed(registry.paths_of(hub))
    by_name = {str(one.data.get("format")): one for one in marked.values() if isinstance(one.data, dict)}
    checks: dict[Path, FileCheck] = {}
    compiled: dict[str, Format] = {}
    for file in list(marked):
        start = time.perf_counter()
        try:
            mapping = compile_marked(
                marked[file], lambda name: by_name.get(name) or registry.shared(name), neighbours=by_name
            )
        except MappingError as error:
            faults += _faults_of(error)
            del marked[file]
            continue
        spent = (time.perf_counter() - start) * 1000
        compiled[mapping.name] = mapping
        if file in named:
            checks[file] = FileCheck(marked[file].file, mapping.name, mapping.kind, _count(mapping), spent)
    try:
        Catalogue(shared=registry.shared).add(marked)
    except MappingError as error:  # what only all files together show: names, layouts, paths of bridges
        faults += _faults_of(error)
    known = Catalogue(compiled, by_name, shared=registry.shared)
    names = [str(marked[file].data["format"]) for file in named if file in marked]
    places = {_place_of(fault) for fault in faults}
    if any(mapping.kind == "hub" for mapping in compiled.values()):
        vocabulary = vocabulary_of(known)
        for fault in (fault for name in names for fault in review(known, name, vocabulary)):
            faults += [fault] if _place_of(fault) not in places else []
        faults = faults or list(evidence_faults(known, names))
    return checks, faults


def _count(mapping: Format) -> int:
    """The rules of a file, tables written out."""
    aliases = sum(len(block.table.rules) for block in mapping.aliases)
    return len(mapping.rules) + aliases + sum(len(variant.rules) for variant in mapping.variants)


def _faults_of(error: MappingError) -> list[str]:
    return list(error.faults or (error.summary,))


def _parsed(files: Iterable[Path]) -> tuple[dict[Path, Marked], list[str]]:
    """The files that are YAML, by path, and the faults of the others."""
    marked: dict[Path, Marked] = {}
    faults: list[str] = []
    for file in files:
        try:
            marked[file] = read_yaml(file, shown_path(file))
        except MappingError as error:
            faults += _faults_of(error)
    return marked, faults


def _order_of(fault: str) -> tuple[str, list[int]]:
    """The file, line and column of a fault."""
    file, *numbers = _place_of(fault).split(":")
    return file, [int(number) for number in numbers if number.isdigit()]


def _place_of(fault: str) -> str:
    """The ``file:line:column`` of a fault."""
    return fault.partition(": ")[0]
