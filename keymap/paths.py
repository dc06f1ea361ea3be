"""Paths of the mapping files and the schema: inside the installed package, or next to it in a checkout."""

from __future__ import annotations

import os
from pathlib import Path

from keymap.errors import KeymapError

__all__ = ["data_folder", "path_text", "schema_path"]


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
    if not text:
        raise error(f"{path!r} is not a path: {advice}")
    return os.path.expanduser(text)


def data_folder(name: str) -> Path:
    """The path of the folder ``mappings`` or ``schemas``."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name


def schema_path() -> Path:
    """The path of the JSON schema of mapping files, for editors.

    >>> import keymap
    >>> keymap.schema_path().name
    'mapping.schema.json'
    """
    return data_folder("schemas") / "mapping.schema.json"
