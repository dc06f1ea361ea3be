"""Choose the checkpoint in a folder: the first match of the declared table, or the only weight file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from keymap.errors import CheckpointError
from keymap.language.format import Containers
from keymap.read import WEIGHTS
from keymap.read.shards import leads_out

__all__ = ["choose_file"]

_MAX_ENTRIES = 10_000  # entries of a folder and its subfolders


def _entries(folder: Path) -> Iterator[str]:
    """Names of the files in a folder, and ``subfolder/name`` of those one level down, if the names are printable."""
    count = 0

    def scan(directory: str) -> list[os.DirEntry[str]]:
        nonlocal count
        with os.scandir(directory) as entries:
            found = sorted(islice(entries, _MAX_ENTRIES + 1), key=lambda entry: entry.name)
        count += len(found)
        if count > _MAX_ENTRIES:
            raise CheckpointError(f"{folder}: has more than {_MAX_ENTRIES} entries; pass the checkpoint file itself")
        return [entry for entry in found if entry.name.isprintable()]

    for item in scan(os.fspath(folder)):
        inner: list[os.DirEntry[str]] = []
        with suppress(OSError):  # ignore what is not readable
            if item.is_file():
                yield item.name
            elif item.is_dir():
                inner = scan(item.path)
        for file in inner:
            with suppress(OSError):
                if file.is_file():
                    yield f"{item.name}/{file.name}"


def choose_file(folder: Path, containers: Containers) -> tuple[Path, str]:
    """The checkpoint of a folder, and a note that says why it was chosen.

    Args:
        folder: a hub repository, a folder of ``save_pretrained``, a training run.
        containers: the declared table: ``files`` in order of preference, and ``folders`` that keymap does not read.

    Raises:
        CheckpointError: the folder has no weight file, several without an order of preference, or a kind that keymap
            does not read; or the chosen file is a link that leaves the folder.
    """
    try:
        names = list(_entries(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error}; change its permissions") from None
    weights = [name for name in names if name.endswith(WEIGHTS)]
    preferred = _preferred(names, containers)
    if preferred is not None:
        name, reason = preferred
        others = [other for other in weights if other != name]
        return _inside(folder, name), f"chose {name} from the folder: {reason}{_listed(others)}"
    for side, reason in containers.folders:
        if any(side.match(name) is not None for name in names):
            raise CheckpointError(f"{folder}: {reason}")
    candidates = [name for name in weights if "/" not in name] or weights
    if len(candidates) == 1:
        return _inside(folder, candidates[0]), f"chose {candidates[0]} from the folder: the only weight file"
    if not weights:
        files = f", only {', '.join(names[:8])}" if names else ""
        raise CheckpointError(f"{folder}: is a folder without a weight file{files}; pass a checkpoint")
    listed = ", ".join(candidates[:10])
    raise CheckpointError(f"{folder}: is a folder with several weight files; pass the one to load: {listed}")


def _preferred(names: list[str], containers: Containers) -> tuple[str, str] | None:
    """The first match of the table, of numbered files the highest, and the table's reason; None without a match."""
    for side, reason in containers.files:
        found = [(values, name) for name in names if (values := side.match(name)) is not None]
        if found:
            numbers = [slot.names[0] for slot in side.slots if slot.kind == "int"]
            return max(found, key=lambda item: tuple(int(item[0][n]) for n in numbers))[1], reason
    return None


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder; raises CheckpointError if it is a link that leaves the folder."""
    if leads_out(folder / name, folder):
        target = os.path.realpath(folder / name)
        raise CheckpointError(f"{folder}: {name} is a link that leaves the folder; to load its target, pass {target}")
    return folder / name


def _listed(others: list[str]) -> str:
    """The other weight files, for a note."""
    if not others:
        return ""
    return f"; other weight files: {', '.join(others[:6])}{' ...' if len(others) > 6 else ''}"
