"""All mappings that this process knows: keymap's own, those of installed packages, and registered ones."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib.metadata import distribution, entry_points
from pathlib import Path

from keymap.errors import KeymapError, MappingError
from keymap.language.catalogue import Catalogue
from keymap.paths import data_folder
from keymap.read.lazy import brief

__all__ = ["Catalogue", "list_formats", "path_text", "register_mappings", "registry", "yaml_files"]


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


_known: list[Catalogue] = []


def _released(folder: Path) -> bool:
    """Whether a folder's mappings are byte for byte those of an installed release, which were checked at the release.

    An installation records the hash of each file (PyPA's specification of ``RECORD``). A checkout has no such record;
    then every process checks the mappings, as it checks those of other packages.
    """

    def hash_of(file: Path) -> str:
        digest = urlsafe_b64encode(sha256(file.read_bytes()).digest()) if file.is_file() else b""
        return digest.rstrip(b"=").decode()

    folder = Path(os.path.abspath(folder))
    try:
        installed = {Path(os.path.abspath(file.locate())): file.hash for file in distribution("keymap").files or ()}
        recorded = {
            path: entry for path, entry in installed.items() if path.parent == folder and path.suffix == ".yaml"
        }
        return set(folder.glob("*.yaml")) == set(recorded) and all(
            entry is not None and entry.mode == "sha256" and entry.value == hash_of(path)
            for path, entry in recorded.items()
        )
    except Exception:  # no record, a damaged record, or unreadable files: then the mappings are checked
        return False


def _check_evidence(known: Catalogue, names: Iterable[str]) -> None:
    """Call `check_evidence`; import its module only now, because most processes never need it."""
    from keymap.source.samples import check_evidence

    check_evidence(known, names)


def _check_fully(known: Catalogue, names: Iterable[str]) -> None:
    """Check new files as tools/check_mappings.py does: what `review` finds, then the evidence.

    Raises:
        MappingError: with every fault that `review` finds in the files, or with those of the evidence.
    """
    from keymap.language.review import review

    faults = [fault for name in names for fault in review(known, name)]
    if faults:
        raise MappingError("the mapping has faults that a load would meet later", faults)
    _check_evidence(known, names)


def registry() -> Catalogue:
    """All known mappings; reads them on first use."""
    if not _known:
        new = Catalogue()
        own = data_folder("mappings")
        new.add(yaml_files(own), released=_released(own))
        for point in sorted(entry_points(group="keymap.mappings"), key=lambda p: p.name):
            location = point.load()
            new.add(yaml_files(Path(location() if callable(location) else location)), check=_check_evidence)
        _known.append(new)
    return _known[0]


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
    return [mapping.name for mapping in registry().add(yaml_files(Path(text)), check=_check_fully)]


def list_formats() -> dict[str, str]:
    """Name and title of each format that keymap detects and that `convert_state_dict` writes."""
    return {m.name: m.title for m in sorted(registry().mappings.values(), key=lambda m: m.name) if m.rules}
