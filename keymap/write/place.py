"""Put files in place only when they are whole: written beside, then renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from keymap.errors import WriteError

__all__ = ["check_folder", "check_place", "remove_others", "whole_files", "whole_folder"]


def check_place(destination: Path, sources: Sequence[Path]) -> None:
    """Check that a file can be written there.

    Raises:
        WriteError: the folder does not exist, the destination is a folder, or it is a file that is read.
    """
    _check_parent(destination)
    if destination.is_dir():
        raise WriteError(f"{destination}: is a folder; pass the name of a file in it, for example model.safetensors")
    for source in sources:
        if destination.exists() and source.exists() and os.path.samefile(destination, source):
            raise WriteError(f"{destination}: is the file that is read; choose another destination")


def _check_parent(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise WriteError(f"{path}: {path.parent} is a file, not a folder; choose another destination")
    if not path.parent.is_dir():
        raise WriteError(f"{path}: the folder {path.parent} does not exist; create it first")


def check_folder(folder: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Check that a folder can be written.

    Raises:
        WriteError: the folder above it does not exist, it is a file, it holds a file that is read, or it is not empty
            and ``overwrite`` is false.
    """
    _check_parent(folder)
    if folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder}: is a file; pass the name of a folder, or of a file that ends with .safetensors")
    if not folder.is_dir():
        return
    for source in sources:
        if source.exists() and os.path.samefile(source.parent, folder):
            raise WriteError(f"{folder}: holds the file that is read; choose another folder")
    if not overwrite and any(folder.iterdir()):
        raise WriteError(f"{folder}: is not empty; choose another folder, or pass overwrite=True to write into it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside the wanted one, which must be absent or empty; on success it is renamed.

    On an error, and on an interrupt, it is removed. If the process is killed, it may remain: its name begins with a dot
    and ends with ``.part``.

    Raises:
        WriteError: the system cannot write it, for example because the disk is full.
    """
    part = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    try:
        part.mkdir()
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_others(folder: Path, weights: str, written: Collection[str]) -> None:
    """Remove earlier weights of the same name from a folder: a loader may take them before the new ones.

    Args:
        folder: that was written to.
        weights: the name of the weights' file, for example ``model.safetensors``; shards and their index go with it.
        written: names of the files to keep.
    """
    stem, suffix = os.path.splitext(weights)
    shard = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
    for file in folder.iterdir():
        if shard.fullmatch(file.name) and file.name not in written:
            file.unlink()


def _unwritable(path: Path, error: OSError) -> WriteError:
    reason = error.strerror or type(error).__name__
    return WriteError(f"{path}: cannot be written: {reason}; nothing was changed")


@contextmanager
def whole_files(destinations: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write to, beside the destinations; on success they are renamed to them, in order.

    On an error, and on an interrupt, they are removed, and the destinations are what they were. If the process is
    killed, a file whose name begins with a dot and ends with ``.part`` may remain.

    Raises:
        WriteError: the system cannot write them, for example because the disk is full.
    """
    mark = secrets.token_hex(4)
    parts = [path.parent / f".{path.name}.{mark}.part" for path in destinations]
    try:
        yield parts
        for part, path in zip(parts, destinations, strict=True):
            os.replace(part, path)
    except OSError as error:
        raise _unwritable(destinations[0], error) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()
