"""Choose the checkpoint in a folder: the first match of the declared table, or the only weight file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from keymap.errors import CheckpointError, some
from keymap.language.format import Containers
from keymap.read import WEIGHTS
from keymap.read.shards import leads_out, shards_of

__all__ = ["Choice", "choose_file", "refuse_hub_id", "refuse_part"]

_DIGITS = re.compile("[0-9]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_HASH = 200  # bytes of a reference in the hub's cache
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


class Choice(NamedTuple):
    """What is loaded from a folder.

    Attributes:
        files: the checkpoint; several if it is a set of shards without an index.
        notes: which file was chosen, and why.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def choose_file(folder: Path, containers: Containers) -> Choice:
    """The checkpoint of a folder, and notes that say why it was chosen.

    Args:
        folder: a hub repository or its cache, a folder of ``save_pretrained``, a training run.
        containers: the declared table: ``files`` in order of preference, ``folders`` that keymap does not read, and
            ``training_files``, which hold no weights.

    Raises:
        CheckpointError: the folder has no weight file, several without an order of preference, or a kind that keymap
            does not read; shards are missing; or the chosen file is a link that leaves the folder.
    """
    snapshot = _snapshot(folder)
    if snapshot is not None:
        choice = choose_file(snapshot, containers)
        return choice._replace(notes=(f"chose snapshot {snapshot.name} of the cache", *choice.notes))
    try:
        names = list(_entries(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error}; change its permissions") from None
    weights = [name for name in names if name.endswith(WEIGHTS) and not _is_training_file(name, containers)]
    preferred = _preferred(names, containers)
    if preferred is not None:
        name, reason = preferred
        others = [other for other in weights if other != name]
        return Choice((_inside(folder, name),), (f"chose {name} from the folder: {reason}{_listed(others)}",))
    for side, reason in containers.folders:
        matching = [name for name in names if side.match(name.rpartition("/")[2]) is not None]
        found = next((name for name in matching if "optim" not in name), matching[0] if matching else None)
        if found is not None:
            raise CheckpointError(f"{folder / found.rpartition('/')[0]}: {reason}")
    candidates = [name for name in weights if "/" not in name] or weights
    return _only(folder, candidates, names)


def refuse_part(file: Path, containers: Containers) -> None:
    """Refuse one part of a checkpoint whose folder keymap does not read, for example of one in tensor-parallel parts.

    Args:
        file: what the caller passed.
        containers: ``folders``: it or a file beside it matches a pattern, and their names differ in digits alone.

    Raises:
        CheckpointError: it is such a part.
    """
    if _DIGITS.search(file.name) is None:
        return
    alike = _DIGITS.sub("0", file.name)
    try:
        with os.scandir(file.parent) as entries:
            beside = sorted(
                entry.name
                for entry in islice(entries, _MAX_ENTRIES)
                if entry.name != file.name and _DIGITS.sub("0", entry.name) == alike and entry.is_file()
            )
    except OSError:  # a folder that cannot be listed
        return
    for side, reason in containers.folders if beside else ():
        if any(side.match(name) is not None for name in (file.name, *beside)):
            raise CheckpointError(f"{file}: {beside[0]} lies beside it, so it {reason}")


def _only(folder: Path, candidates: list[str], names: list[str]) -> Choice:
    """The only weight file of a folder, or the shards that make one.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    shards = shards_of(candidates, str(folder))
    if shards:
        files = tuple(_inside(folder, name) for name in shards)
        return Choice(files, (f"joined {len(shards)} shards without an index: {some(shards, 3)}",))
    if len(candidates) == 1:
        note = f"chose {candidates[0]} from the folder: the only weight file"
        return Choice((_inside(folder, candidates[0]),), (note,))
    if not candidates:
        listed = f", only {', '.join(names[:8])}" if names else ""
        raise CheckpointError(f"{folder}: is a folder without a weight file{listed}; pass a checkpoint")
    listed = ", ".join(candidates[:10])
    raise CheckpointError(f"{folder}: is a folder with several weight files; pass the one to load: {listed}")


def refuse_hub_id(path: Path, text: str, configurations: Collection[str]) -> None:
    """Refuse a name that is not a path: of a hub repository or of a model configuration.

    Args:
        path: what the caller passed.
        text: the same as text.
        configurations: names of model configurations.

    Raises:
        CheckpointError: there is no such file, and the text looks like such a name.
    """
    if os.path.lexists(path):
        return
    repository = text.removeprefix("hf-hub:").removeprefix("https://huggingface.co/").strip("/")
    if _HUB_ID.fullmatch(repository) and not repository.endswith(WEIGHTS) and not os.path.isdir(path.parent):
        raise CheckpointError(
            f"{text}: there is no such file; if it is a repository of the Hugging Face hub, download it first with "
            f"`hf download {repository}`, in Python huggingface_hub.snapshot_download({repository!r}), and "
            f"pass the folder"
        )
    if text in configurations:
        raise CheckpointError(
            f"{text}: is the name of a model configuration, not a file; create the model with it, and pass the path of "
            f"a checkpoint"
        )


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that a cache folder of the hub (``models--owner--name``) means; None for another folder.

    Raises:
        CheckpointError: it has several, and no reference says which is the current one.
    """
    snapshots = folder / "snapshots"
    try:
        found = sorted(entry.name for entry in os.scandir(snapshots) if entry.is_dir()) if snapshots.is_dir() else []
        main = folder / "refs" / "main"
        current = (
            main.read_text("utf-8")[:_MAX_HASH].strip() if main.is_file() and main.stat().st_size < _MAX_HASH else ""
        )
    except (OSError, ValueError):
        return None
    if current in found:
        return snapshots / current
    if len(found) > 1:
        raise CheckpointError(f"{folder}: has several snapshots; pass one of them: {some(found)}")
    return snapshots / found[0] if found else None


def _is_training_file(name: str, containers: Containers) -> bool:
    """Whether a file holds the state of an optimizer, a scheduler or the like."""
    return any(side.match(name.rpartition("/")[2]) is not None for side in containers.training_files)


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
