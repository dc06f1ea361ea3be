"""All mappings that this process knows: keymap's own, those of installed packages, and registered ones.

Of each file the head is read; the files of a hub are compiled when that hub is first used.
"""

from __future__ import annotations

import csv
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import EntryPoint, distribution, entry_points
from pathlib import Path

from keymap.errors import KeymapError, MappingError
from keymap.language.catalogue import Catalogue, shown_path
from keymap.language.compile import evidence_in
from keymap.language.format import Evidence
from keymap.language.header import Header, read_header
from keymap.language.layout import Shaped
from keymap.language.schema import known_right
from keymap.language.schema_words import did_you_mean
from keymap.language.yaml_marks import Marked, read_yaml
from keymap.paths import data_folder
from keymap.read.lazy import brief
from keymap.source.detect import matching_keys

__all__ = [
    "Catalogue",
    "Registry",
    "hubs",
    "installed_files",
    "list_formats",
    "path_text",
    "register_mappings",
    "registry",
    "yaml_files",
]


_GROUP = "keymap.mappings"  # of the entry points of other packages


def path_text(path: object, error: type[KeymapError], advice: str) -> str:
    """A path of the caller as text, with ``~`` replaced by the home folder.

    Args:
        path: a string, or an object with ``__fspath__``, which may return bytes.
        error: what to raise.
        advice: the end of its message: what to pass instead.

    Raises:
        KeymapError: it is not a path, or empty.
    """
    try:
        text = os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else ""
    except Exception:  # of an __fspath__ that keymap does not know
        text = ""
    if not text or "\0" in text:
        what = f"a dict of {len(path)} entries" if isinstance(path, Mapping) else brief(path)
        raise error(f"{what} is not a path: {advice}")
    return os.path.expanduser(text)


def yaml_files(path: Path) -> list[Path]:
    """The file itself, or all ``*.yaml`` files of a folder; raises MappingError if there is none."""
    if os.path.isdir(path):  # for a name that is too long this is False, not an error
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise MappingError(f"{path}: the folder has no .yaml file; pass a mapping file, or a folder of them")
        return files
    if not os.path.isfile(path):
        raise MappingError(f"{path}: the file does not exist; check the path")
    return [path]


def _release(folder: Path) -> dict[Path, str]:
    """The mappings of a folder with their hashes, if an installation recorded them; else an empty dict.

    An installation records the hash of each file (PyPA's specification of ``RECORD``). A checkout has no such record;
    then every process checks the mappings, as it checks those of other packages.
    """
    inside = os.path.abspath(folder) + os.sep
    try:
        installed = distribution("keymap")
        rows = csv.reader((installed.read_text("RECORD") or "").splitlines())
        listed = {os.path.abspath(str(installed.locate_file(row[0]))): row[1] for row in rows}
        recorded = {Path(path): digest for path, digest in listed.items() if path.startswith(inside)}
        recorded = {path: digest for path, digest in recorded.items() if path.suffix == ".yaml"}
        same = set(folder.absolute().rglob("*.yaml")) == set(recorded)
        hashed = all(digest.startswith("sha256=") for digest in recorded.values())
        return {path: digest[7:] for path, digest in recorded.items()} if same and hashed else {}
    except Exception:  # no record, or a damaged one: then the mappings are checked
        return {}


def _hash_of(file: Path) -> str:
    """As ``RECORD`` has it; "" for a file that cannot be read."""
    try:
        return urlsafe_b64encode(sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    except OSError:
        return ""


def _check_evidence(known: Catalogue, names: Iterable[str]) -> None:
    """Call `check_evidence`; import its module only now, because most processes never need it."""
    from keymap.source.samples import check_evidence

    check_evidence(known, names)


def _check_fully(known: Catalogue, names: Iterable[str]) -> None:
    """Check new files as tools/check_mappings.py does: what `review` finds, then the evidence.

    Raises:
        MappingError: with every fault that `review` finds in the files, or with those of the evidence.
    """
    from keymap.language.review import review, vocabulary_of

    vocabulary = vocabulary_of(known)
    faults = [fault for name in names for fault in review(known, name, vocabulary)]
    if faults:
        raise MappingError("the mapping has faults that a load would meet later", faults)
    _check_evidence(known, names)


_Check = Callable[[Catalogue, Iterable[str]], None]


@dataclass(frozen=True, eq=False, repr=False)
class Registry:
    """All known mapping files, by hub.

    Attributes:
        files: the head of each file.
        release: the hashes of those that were checked at the release.
        foreign: those of other packages, whose evidence is compared with that of the others.
    """

    files: Mapping[Path, Header]
    release: Mapping[Path, str] = field(default_factory=dict)
    foreign: frozenset[Path] = frozenset()
    _compiled: dict[str, Catalogue] = field(default_factory=dict, repr=False)
    _evidence: dict[str, Evidence | None] = field(default_factory=dict, repr=False)
    _tables: dict[Path, Marked] = field(default_factory=dict, repr=False)

    @cached_property
    def default(self) -> str:
        """The hub of files that name none."""
        found = [header for header in self.files.values() if header.kind == "hub" and header.default]
        if len(found) != 1:
            names = ", ".join(str(header.path) for header in found) or "none"
            raise MappingError(
                f"there must be one hub for files that do not say `hub:`; these say `default: true`: {names}"
            )
        return found[0].name

    @cached_property
    def hubs(self) -> tuple[str, ...]:
        """The names of all hubs, that of files without ``hub:`` first."""
        first = self.default
        names = sorted(header.name for header in self.files.values() if header.kind == "hub")
        return (first, *(name for name in names if name != first))

    @cached_property
    def _heads(self) -> dict[str, Header]:
        """The head of each hub."""
        return {header.name: header for header in self.files.values() if header.kind == "hub"}

    def hub_of(self, header: Header) -> str:
        """The hub that a file belongs to; a file of tables or of containers that names none is also for the others."""
        return header.name if header.kind == "hub" else header.hub or self.default

    def having(self, name: str) -> tuple[str, ...]:
        """The hubs that have a mapping of this name; those where it has rules, if there are any."""
        found = [header for header in self.files.values() if header.name == name]
        with_rules = [header for header in found if header.kind in ("format", "bridge", "hub")]
        return tuple(dict.fromkeys(map(self.hub_of, with_rules or found)))

    def checked(self, hub: object) -> str:
        """The name of a hub, for the argument ``hub`` of the public functions.

        Raises:
            MappingError: there is no such hub.
        """
        if isinstance(hub, str) and hub in self.hubs:
            return hub
        if not isinstance(hub, str):
            raise MappingError(f"hub={brief(hub)}: pass the name of a hub: {', '.join(self.hubs)}")
        raise MappingError(f"hub={brief(hub)}: there is no such hub{did_you_mean(hub, self.hubs)}")

    def catalogue(self, hub: str) -> Catalogue:
        """The mappings of a hub, compiled on first use."""
        if hub not in self._compiled:
            paths, new = self.paths_of(hub), Catalogue(shared=self.shared)
            new.add(paths, self._check_of(paths), self._as_released(paths))
            self._compiled[hub] = new
        return self._compiled[hub]

    def _as_released(self, paths: Iterable[Path]) -> frozenset[Path]:
        """Those of a hub's files that were checked at the release; none, if one of these is another now."""
        released = [path for path in paths if path in self.release]
        same = all(_hash_of(path) == self.release[path] for path in released)
        return frozenset(released if same else ())

    def paths_of(self, hub: str) -> list[Path]:
        """The files of a hub, and the containers of all hubs."""
        shared = (path for path, one in self.files.items() if one.kind == "containers" and not one.hub)
        own = (path for path, one in self.files.items() if self.hub_of(one) == hub)
        found = {*own, *shared}
        return [path for path in self.files if path in found]

    def _check_of(self, paths: Iterable[Path]) -> _Check | None:
        """The check of the evidence of other packages' files; None where none of these are."""
        names = [self.files[path].name for path in paths if path in self.foreign]
        return (lambda known, _: _check_evidence(known, names)) if names else None

    def shared(self, name: str) -> Marked | None:
        """A file of tables that names no hub."""
        for header in self.files.values():
            if header.name == name and header.kind == "tables" and not header.hub:
                if header.path not in self._tables:
                    self._tables[header.path] = read_yaml(header.path, shown_path(header.path))
                    if self._as_released([header.path]):
                        known_right(self._tables[header.path])
                return self._tables[header.path]
        return None

    def claiming(self, tensors: Mapping[str, Shaped]) -> tuple[str, ...]:
        """The hubs whose evidence these keys match."""
        names = sorted(tensors)
        found = []
        for hub in self.hubs:
            may = all(any(key in tensors for key in keys) for keys in self._heads[hub].needs)
            evidence = self._evidence_of(hub) if may else None
            if evidence is not None and matching_keys(evidence, tensors, names) is not None:
                found.append(hub)
        return tuple(found)

    def _evidence_of(self, hub: str) -> Evidence | None:
        """What shows that keys are a hub's; None for one that only its name leads to."""
        if hub not in self._evidence:
            found = evidence_in(self._heads[hub].detect) if hub not in self._compiled else None
            if found is None:
                compiled = self.catalogue(hub).hub
                found = (compiled.detect, compiled.by_name)
            self._evidence[hub] = None if found[1] else found[0]
        return self._evidence[hub]

    def extended(self, paths: Iterable[Path], check: _Check | None = None) -> tuple[Registry, list[str]]:
        """This registry with further files, and the names of their mappings; a known file is read again.

        Raises:
            MappingError: a file is wrong, or names an unknown hub.
        """
        new = {path.resolve(): read_header(path, shown_path(path)) for path in paths}
        known = {path: header for path, header in self.files.items() if path.resolve() not in new}
        files = {**known, **{header.path: header for header in new.values()}}
        release = {path: value for path, value in self.release.items() if path in known}
        result = Registry(files, release, self.foreign.intersection(known))
        result._evidence.update(self._evidence)
        result._tables.update({path: marked for path, marked in self._tables.items() if path in known})
        by_hub: dict[str, list[Path]] = {}
        for header in new.values():
            hub = result.hub_of(header)
            if hub not in result.hubs:
                place = f"{shown_path(header.path)}:{header.line}:1"
                raise MappingError(f"{place}: there is no hub {hub!r}{did_you_mean(hub, result.hubs)}")
            by_hub.setdefault(hub, []).append(header.path)
        names: dict[Path, str] = {}
        left = {self.hub_of(header) for path, header in self.files.items() if path not in known} - by_hub.keys()
        for hub in self._compiled.keys() - left:
            result._compiled[hub] = replace(self._compiled[hub], shared=result.shared, _paths={})
        for hub, paths in by_hub.items():
            result._evidence.pop(hub, None)
            names |= result._add(hub, paths, self, check)
        return result, [names[header.path] for header in new.values()]

    def _add(self, hub: str, new: list[Path], before: Registry, check: _Check | None) -> dict[Path, str]:
        """Compile new files of a hub, with its other files; the names of their mappings."""
        files = new
        old = before.catalogue(hub) if hub in before.hubs else None
        catalogue = Catalogue(shared=self.shared)
        if old is not None:
            catalogue = Catalogue(dict(old.mappings), dict(old.files), dict(old.places), self.shared)
        else:  # the hub itself is new
            files = [*(path for path in self.paths_of(hub) if path not in new), *new]
        names = [self.files[path].name for path in files[-len(new) :]]
        added = catalogue.add(files, (lambda known, _: check(known, names)) if check is not None else None)
        self._compiled[hub] = catalogue
        return dict(zip(files, (mapping.name for mapping in added), strict=True))


def installed_files() -> list[Path]:
    """The mapping files of all other packages that are installed.

    Raises:
        MappingError: an entry point is broken.
    """
    points = sorted(entry_points(group=_GROUP), key=lambda point: point.name)
    return [file for point in points for file in _files_of(point)]


def _files_of(point: EntryPoint) -> list[Path]:
    """The mapping files of an installed package.

    Raises:
        MappingError: its entry point cannot be loaded, or gives no path of mappings; the message names both.
    """
    package = point.dist.name if point.dist is not None else "an unknown package"
    where = f"the entry point {point.name} = {point.value} of {package} (group {_GROUP})"
    advice = "correct it, or uninstall the package"
    try:
        location = point.load()
        location = location() if callable(location) else location
    except Exception as error:  # of code that keymap does not know
        raise MappingError(f"{where} fails with {type(error).__name__}: {brief(str(error))}; {advice}") from error
    try:
        return yaml_files(Path(path_text(location, MappingError, "the entry point must be a path, or return one")))
    except MappingError as error:
        raise MappingError(f"{where}: {error}; {advice}") from error


_registry: list[Registry] = []


def hubs() -> Registry:
    """All known mapping files, by hub; looks for them on first use."""
    if not _registry:
        own = data_folder("mappings")
        shipped = sorted(own.rglob("*.yaml"))
        others = installed_files()
        files = {path: read_header(path, str(path)) for path in shipped}
        files |= {path: read_header(path, shown_path(path)) for path in others}
        _registry.append(Registry(files, _release(own), frozenset(others)))
    return _registry[0]


def registry(hub: str | None = None) -> Catalogue:
    """All mappings of a hub; without a name of the one whose files name none."""
    known = hubs()
    return known.catalogue(known.default if hub is None else hub)


def register_mappings(path: str | os.PathLike[str]) -> list[str]:
    """Add a mapping file, or all ``*.yaml`` files of a folder, to the known mappings.

    An installed package can do the same with an entry point in the group ``keymap.mappings``: a path, or a function
    that returns one. Registering a file again reads it again.

    Returns:
        The names of the added mappings.

    Raises:
        MappingError: a file is wrong (all faults with ``file:line:column``), among them targets that the models
            do not have, unknown facts, and tables that nothing uses; or a name is taken, a bridge would
            make a second path between two layouts, or the evidence of two formats matches the same keys.
            Then no mapping is added.
    """
    text = path_text(path, MappingError, "pass the path of a YAML file, or of a folder of YAML files")
    extended, names = hubs().extended(yaml_files(Path(text)), _check_fully)
    _registry[:] = [extended]
    return names


def list_formats(hub: str | None = None) -> dict[str, str]:
    """Name and title of each format that keymap detects and that `convert_state_dict` writes.

    Args:
        hub: the name of a hub; None for the formats of all hubs. A name that several hubs have is listed once, with
            all its titles.

    Raises:
        MappingError: there is no such hub.
    """
    known = hubs()
    found: dict[str, list[str]] = {}
    for name in known.hubs if hub is None else (known.checked(hub),):
        for mapping in known.catalogue(name).mappings.values():
            if mapping.rules:
                found.setdefault(mapping.name, []).append(mapping.title)
    return {name: "; ".join(titles) for name, titles in sorted(found.items())}
