"""Put files in place only when they are whole: written beside, then renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from keymap.errors import WriteError, some

__all__ = ["check_folder", "check_place", "check_set", "in_words", "whole_files", "whole_folder"]

_INDEX = ".index.json"


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Errors of the system about a place, such as a name that is too long, as errors of keymap.

    Raises:
        WriteError: the system raised one.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def check_place(destination: Path, sources: Sequence[Path]) -> None:
    """Check that a file can be written there.

    Raises:
        WriteError: the folder does not exist, the destination is a folder or a device, or it is a file that is read.
    """
    _check_parent(destination)
    if destination.is_dir():
        raise WriteError(f"{destination}: is a folder; pass the name of a file in it, for example model.safetensors")
    if destination.exists() and not destination.is_file():
        raise WriteError(f"{destination}: is a device, a pipe or a socket; pass the name of a file")
    if _is_one_of(destination, sources):
        raise WriteError(f"{destination}: is a file that is read; choose another destination")


def _check_parent(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise WriteError(f"{path}: {path.parent} is a file, not a folder; choose another destination")
    if not path.parent.is_dir():
        raise WriteError(f"{path}: the folder {path.parent} does not exist; create it first")


def _is_one_of(path: Path, files: Iterable[Path]) -> bool:
    return path.exists() and any(file.exists() and os.path.samefile(path, file) for file in files)


def check_set(path: Path, files: Sequence[Path], sources: Sequence[Path], overwrite: bool) -> list[Path]:
    """Check that a file, or a set of shards with its index, can be written.

    Args:
        path: the destination that was asked for.
        files: that will be written: the destination itself, or shards and their index.
        sources: that are read.
        overwrite: earlier weights of the same name may be replaced.

    Returns:
        Earlier weights of the same name, to be removed: a loader could take them for the new ones.

    Raises:
        WriteError: as `check_place`; or there are such weights, and ``overwrite`` is false.
    """
    for file in files:
        check_place(file, sources)
    earlier = [file for file in _weights_of_the_name(path) if file not in files]
    if len(files) == 1 and not any(file.name.endswith(_INDEX) for file in earlier):
        return []  # one file in the place of one file; shards without an index are read by nobody
    read = [file for file in earlier if _is_one_of(file, sources)]
    if read:
        raise WriteError(
            f"{path}: {read[0].name} beside it is a file that is read, and a loader would take the two for one "
            f"checkpoint; choose another name"
        )
    there = earlier or ([file for file in files if file.exists()] if len(files) > 1 else [])
    if there and not overwrite:
        raise WriteError(
            f"{path.parent}: has weights of this name already: {some([file.name for file in there])}; pass "
            f"overwrite=True to replace them, or choose another name"
        )
    return earlier


def _weights_of_the_name(path: Path) -> list[Path]:
    """The files of a folder that are weights of this name: one file, or shards with their index."""
    stem, suffix = os.path.splitext(path.name)
    shard = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(suffix)}({re.escape(_INDEX)})?")
    return sorted(file for file in path.parent.iterdir() if shard.fullmatch(file.name) and not file.is_dir())


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
    """A folder to write to, beside the wanted one, which must be absent; on success it is renamed.

    On an error, and on an interrupt, it is removed. If the process is killed, it may remain: its name begins with a dot
    and ends with ``.part``.

    Raises:
        WriteError: the system cannot write it, for example because the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    part = folder.parent / f".keymap-{secrets.token_hex(4)}.part"
    try:
        part.mkdir()
        yield part
        os.replace(part, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    except WriteError as error:  # of a file in it, by the name that the folder would have
        raise WriteError(error.summary.replace(str(part), str(folder)), error.faults) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> WriteError:
    reason = error.strerror or type(error).__name__
    return WriteError(f"{path}: cannot be written: {reason}; nothing was changed")


@contextmanager
def whole_files(destinations: Sequence[Path], earlier: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Paths to write to, beside the destinations; on success they are renamed to them, in order.

    A destination that is a symbolic link stays one: what it points to is replaced, and keeps its permissions. On an
    error, and on an interrupt, the new files are removed, and the destinations are what they were. One file is replaced
    at once. Of several, all old ones are renamed first, the last of them (an index, a configuration) at the start: if
    the process is killed, no mixture of old and new files has the names of a checkpoint. Then files whose names begin
    with a dot and end with ``.part`` may remain.

    Args:
        destinations: an index or a configuration last.
        earlier: further files, which are removed.

    Raises:
        WriteError: the system cannot write them, for example because the disk is full.
    """
    mark = secrets.token_hex(4)
    reals = [Path(os.path.realpath(path)) for path in destinations]
    parts = [real.with_name(f".keymap-{mark}-{number}.part") for number, real in enumerate(reals)]
    replaced = [*reversed(reals), *earlier] if len(reals) > 1 or earlier else []
    aside = {old: old.with_name(f".keymap-{mark}-old-{number}.part") for number, old in enumerate(replaced)}
    placed: list[Path] = []
    moved: list[Path] = []
    whole = False
    try:
        yield parts
        for part, real in zip(parts, reals, strict=True):
            if real.exists():
                part.chmod(stat.S_IMODE(real.stat().st_mode))
        for old, place in aside.items():
            if os.path.lexists(old):
                os.replace(old, place)
                moved.append(old)
        for part, real in zip(parts, reals, strict=True):
            os.replace(part, real)
            placed.append(real)
        whole = True
    except OSError as error:
        raise _unwritable(destinations[len(placed)], error) from error
    finally:
        with suppress(OSError):
            if not whole:
                _restore(placed, {old: aside[old] for old in moved})
        for part in (*parts, *(aside.values() if whole else ())):
            with suppress(OSError):
                part.unlink()


def _restore(placed: Iterable[Path], moved: Mapping[Path, Path]) -> None:
    """Put old files back in the place of new ones."""
    for path in placed:
        if moved:
            path.unlink()
    for old, place in reversed(list(moved.items())):
        os.replace(place, old)
