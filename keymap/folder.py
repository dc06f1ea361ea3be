"""Which file of a folder is meant: the first that the declared table names, or the only one that holds weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keymap.errors import CheckpointError
from keymap.mapping import Containers
from keymap.read import WEIGHTS

__all__ = ["choose_file"]

_MOST = 10_000  # entries of a folder that are looked at


def _entries(folder: Path) -> Iterator[str]:
    """Names of files in a folder and in its subfolders, one level down, with / between."""
    seen = 0
    for item in sorted(folder.iterdir()):
        inner = sorted(item.iterdir()) if item.is_dir() else [item]
        for file in inner:
            seen += 1
            if seen > _MOST:
                raise CheckpointError(f"{folder}: holds more than {_MOST} entries; name the checkpoint file itself")
            if file.is_file():
                yield file.relative_to(folder).as_posix()


def choose_file(folder: Path, containers: Containers) -> tuple[Path, str]:
    """The checkpoint of a folder, and in words why it is that one.

    Args:
        folder: a hub repository, a folder of ``save_pretrained``, a training run.
        containers: the table: ``files``, the preferred first, and ``folders``, what cannot be read.

    Raises:
        CheckpointError: the folder holds no weights, several files that nothing ranks, or a kind that is refused.
    """
    try:
        names = list(_entries(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error}; change its permissions") from None
    weights = [name for name in names if name.endswith(WEIGHTS)]
    for side, why in containers.files:
        found = [(values, name) for name in names if (values := side.match(name)) is not None]
        if not found:
            continue
        numbers = [slot.names[0] for slot in side.slots if slot.kind == "int"]
        _, name = max(found, key=lambda item: tuple(int(item[0][n]) for n in numbers))
        others = [other for other in weights if other != name]
        beside = f"; also there: {', '.join(others[:6])}{' ...' if len(others) > 6 else ''}" if others else ""
        return folder / name, f"{name} was taken from the folder: {why}{beside}"
    for side, why in containers.folders:
        if any(side.match(name) is not None for name in names):
            raise CheckpointError(f"{folder}: {why}")
    own = [name for name in weights if "/" not in name]
    if len(own) == 1:
        return folder / own[0], f"{own[0]} was taken from the folder: the only weight file in it"
    if not weights:
        shown = f": {', '.join(names[:8])}" if names else ""
        raise CheckpointError(f"{folder}: is a folder without a weight file{shown}; name a checkpoint")
    listed = ", ".join((own or weights)[:10])
    raise CheckpointError(f"{folder}: is a folder with several weight files; name the one to load: {listed}")
