"""Names that a shell completes: read from the text of the mappings, because compiling them imports torch."""

from __future__ import annotations

import re

import click
from click.shell_completion import CompletionItem

from keymap.paths import data_folder

__all__ = ["complete_format", "complete_model", "format_names", "model_names"]

_KIND = re.compile(r"^kind: *(\w+)", re.MULTILINE)
_WITH_RULES = ("format", "hub", "bridge")
_NAMES = re.compile(r"names: \{([^}]*)\}")
_NAME = re.compile(r"([^\s,:]+): \[")


def format_names() -> list[str]:
    """The names of the formats and bridges that keymap ships."""
    found = []
    for file in sorted(data_folder("mappings").rglob("*.yaml")):
        kind = _KIND.search(file.read_text(encoding="utf-8"))
        if kind is None or kind[1] in _WITH_RULES:
            found.append(file.stem)
    return found


def model_names() -> list[str]:
    """The names of the model configurations that keymap knows."""
    kind = re.compile(r"^kind: *configurations$", re.MULTILINE)
    texts = (file.read_text(encoding="utf-8") for file in data_folder("mappings").rglob("*configurations.yaml"))
    return sorted(
        name for text in texts if kind.search(text) for entry in _NAMES.findall(text) for name in _NAME.findall(entry)
    )


def complete_format(_context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Formats that begin with what was typed; a path of a mapping file is completed where nothing does."""
    found = [CompletionItem(name) for name in format_names() if name.startswith(start)]
    return found or [CompletionItem(start, type="file")]


def complete_model(_context: click.Context, _option: click.Parameter, start: str) -> list[CompletionItem]:
    """Model configurations that begin with what was typed."""
    return [CompletionItem(name) for name in model_names() if name.startswith(start)]
