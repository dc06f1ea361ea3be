"""Paths of the mapping files and the schema: inside the installed package, or next to it in a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["data_folder", "schema_path"]


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
