"""Put files in place only when they are whole: written beside, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from keymap.errors import WriteError

__all__ = ["check_place", "whole_files"]


def check_place(destination: Path, sources: Sequence[Path]) -> None:
    """Check that a file can be written there.

    Raises:
        WriteError: the folder does not exist, the destination is a folder, or it is a file that is read.
    """
    if not destination.parent.is_dir():
        raise WriteError(f"{destination}: the folder {destination.parent} does not exist; create it first")
    if destination.is_dir():
        raise WriteError(f"{destination}: is a folder; pass the name of a file in it, for example model.safetensors")
    for source in sources:
        if destination.exists() and source.exists() and os.path.samefile(destination, source):
            raise WriteError(f"{destination}: is the file that is read; choose another destination")


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
        reason = error.strerror or type(error).__name__
        raise WriteError(f"{destinations[0]}: cannot be written: {reason}; nothing was changed") from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()
