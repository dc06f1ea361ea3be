"""Which file of a folder is meant: the first that the declared table names, or the only one that holds weights."""

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

_MAX_ENTRIES = 10_000  # entries of a folder that are looked at


def _entries(folder: Path) -> Iterator[str]:
    """Names of files in a folder and its subfolders, one level down, with / between; those that can be shown."""
    seen = 0

    def held(place: str) -> list[os.DirEntry[str]]:
        nonlocal seen
        with os.scandir(place) as entries:
            found = sorted(islice(entries, _MAX_ENTRIES + 1), key=lambda entry: entry.name)
        seen += len(found)
        if seen > _MAX_ENTRIES:
            raise CheckpointError(f"{folder}: holds more than {_MAX_ENTRIES} entries; name the checkpoint file itself")
        return [entry for entry in found if entry.name.isprintable()]

    for item in held(os.fspath(folder)):
        inner: list[os.DirEntry[str]] = []
        with suppress(OSError):  # what may not be looked into is not what is meant
            if item.is_file():
                yield item.name
            elif item.is_dir():
                inner = held(item.path)
        for file in inner:
            with suppress(OSError):
                if file.is_file():
                    yield f"{item.name}/{file.name}"


def choose_file(folder: Path, containers: Containers) -> tuple[Path, str]:
    """The checkpoint of a folder, and in words why it is that one.

    Args:
        folder: a hub repository, a folder of ``save_pretrained``, a training run.
        containers: the table: ``files``, the preferred first, and ``folders``, what cannot be read.

    Raises:
        CheckpointError: the folder holds no weights, several files that nothing ranks, or a kind that is refused;
            or the file that is meant is a link out of the folder.
    """
    try:
        names = list(_entries(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error}; change its permissions") from None

    def chosen(name: str, why: str) -> tuple[Path, str]:
        if leads_out(folder / name, folder):
            there = os.path.realpath(folder / name)
            raise CheckpointError(
                f"{folder}: {name} is a link that leaves the folder; name {there} itself if you mean it"
            )
        return folder / name, f"{name} was taken from the folder: {why}"

    weights = [name for name in names if name.endswith(WEIGHTS)]
    for side, why in containers.files:
        found = [(values, name) for name in names if (values := side.match(name)) is not None]
        if not found:
            continue
        numbers = [slot.names[0] for slot in side.slots if slot.kind == "int"]
        _, name = max(found, key=lambda item: tuple(int(item[0][n]) for n in numbers))
        others = [other for other in weights if other != name]
        beside = f"; also there: {', '.join(others[:6])}{' ...' if len(others) > 6 else ''}" if others else ""
        return chosen(name, f"{why}{beside}")
    for side, why in containers.folders:
        if any(side.match(name) is not None for name in names):
            raise CheckpointError(f"{folder}: {why}")
    own = [name for name in weights if "/" not in name] or weights
    if len(own) == 1:
        return chosen(own[0], "the only weight file in it")
    if not weights:
        shown = f": {', '.join(names[:8])}" if names else ""
        raise CheckpointError(f"{folder}: is a folder without a weight file{shown}; name a checkpoint")
    listed = ", ".join(own[:10])
    raise CheckpointError(f"{folder}: is a folder with several weight files; name the one to load: {listed}")
