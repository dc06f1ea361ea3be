"""All mappings that are known to this process: the shipped ones, those of installed packages, those registered."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import distribution, entry_points
from pathlib import Path

from keymap.errors import MappingError
from keymap.language.catalogue import Catalogue
from keymap.paths import data_folder

__all__ = ["Catalogue", "list_formats", "register_mappings", "registry"]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.yaml"))
        if not found:
            raise MappingError(f"{path} holds no .yaml file")
        return found
    if not path.is_file():
        raise MappingError(f"{path}: there is no such file")
    return [path]


_known: list[Catalogue] = []


def _released(folder: Path) -> bool:
    """True where a folder's mappings are byte for byte those of an installed release, whose tests found them right.

    An installation records what each of its files hashes to (PyPA's specification of ``RECORD``). A checkout has no
    such record, so there mappings are checked in every process, as those of other packages are.
    """

    def hashed(file: Path) -> str:
        digest = urlsafe_b64encode(sha256(file.read_bytes()).digest()) if file.is_file() else b""
        return digest.rstrip(b"=").decode()

    place = Path(os.path.abspath(folder))
    try:
        installed = {Path(os.path.abspath(file.locate())): file.hash for file in distribution("keymap").files or ()}
        recorded = {path: told for path, told in installed.items() if path.parent == place and path.suffix == ".yaml"}
        return set(place.glob("*.yaml")) == set(recorded) and all(
            told is not None and told.mode == "sha256" and told.value == hashed(path) for path, told in recorded.items()
        )
    except Exception:  # no record, one that is damaged in any way, files that cannot be read: the checks will tell
        return False


def _refuse_claims(known: Catalogue, names: Iterable[str]) -> None:
    """As `refuse_claims`, of a module that most processes never need."""
    from keymap.source.samples import refuse_claims

    refuse_claims(known, names)


def registry() -> Catalogue:
    """The mappings known to this process; read at first use."""
    if not _known:
        new = Catalogue()
        own = data_folder("mappings")
        new.add(_files(own), released=_released(own))
        for point in sorted(entry_points(group="keymap.mappings"), key=lambda p: p.name):
            place = point.load()
            new.add(_files(Path(place() if callable(place) else place)), check=_refuse_claims)
        _known.append(new)
    return _known[0]


def register_mappings(path: str | os.PathLike[str]) -> list[str]:
    """Add the mapping file, or all ``*.yaml`` files of a folder, to those that are known.

    An installed package does the same with an entry point in the group ``keymap.mappings`` that names a path,
    or a function that returns one.

    A file that is registered again is read anew.

    Returns:
        The names of the mappings added.

    Raises:
        MappingError: a file is wrong (all faults with ``file:line:column``), a name is taken, a bridge would
            give two paths between layouts, or the evidence claims what another format's rules own, or the
            other way round. Nothing is added then.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise MappingError(f"register_mappings({path!r}): give the path of a YAML file, or of a folder of them")
    return [mapping.name for mapping in registry().add(_files(Path(path)), check=_refuse_claims)]


def list_formats() -> dict[str, str]:
    """The formats that a file may have and that `convert_state_dict` writes: name to title."""
    return {m.name: m.title for m in sorted(registry().mappings.values(), key=lambda m: m.name) if m.rules}
