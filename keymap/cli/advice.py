"""What a message advises, in the options of the command: ``towers=('image',)`` is ``--tower image`` there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from keymap.advice import Argument, Other, replaced

__all__ = ["OPTIONS", "in_options"]

Words = Callable[[Any], list[str]]  # what follows the option, once for each time that it is written


def _one(value: Any) -> list[str]:
    """A text; or for each tower one."""
    return _pairs(value) if isinstance(value, Mapping) else [str(value)]


def _each(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, (tuple, list, set)) else [str(value)]


def _pairs(value: Any) -> list[str]:
    """``NAME=VALUE``; a value that the message leaves open is VALUE."""
    if not isinstance(value, Mapping):
        return [str(value)]
    return [f"{name}={'VALUE' if inner is ... else _sides(inner)}" for name, inner in value.items()]


def _grid(value: Any) -> list[str]:
    return [_sides(value)]


def _sides(value: Any) -> str:
    """``HxW`` for two sides; any other value as it is."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _switch(_value: Any) -> list[str]:
    return []


# For each argument of the library its option, and what follows it.
OPTIONS: Mapping[str, tuple[str, Words]] = {
    "allow_missing": ("--allow-missing", _each),
    "allow_unexpected": ("--allow-unexpected", _each),
    "check_dtype": ("--check-dtype", _switch),
    "dtype": ("--dtype", _one),
    "facts": ("--fact", _pairs),
    "hub": ("--hub", _one),
    "like_mapping": ("--like-mapping", _one),
    "like_wrapper": ("--like-wrapper", _one),
    "mapping": ("--mapping", _one),
    "mapping_a": ("--mapping-a", _one),
    "mapping_b": ("--mapping-b", _one),
    "max_shard_size": ("--max-shard-size", _one),
    "overwrite": ("--overwrite", _switch),
    "source_grid": ("--source-grid", _grid),
    "strict": ("--no-strict", _switch),
    "to": ("--to", _one),
    "tolerance": ("--tolerance", _one),
    "towers": ("--tower", _each),
    "weights_only": ("--unsafe-pickle", _switch),
    "wrapper": ("--wrapper", _one),
    "wrapper_a": ("--wrapper-a", _one),
    "wrapper_b": ("--wrapper-b", _one),
}


def in_options(text: str) -> str:
    """A message of the library with the options of the command in place of the arguments of Python.

    The words of an option are quoted for a shell, so that they can be pasted, whatever a file's keys are.
    """
    return replaced(text, _written)


def _written(argument: Argument, written: str) -> str | None:
    if argument.name not in OPTIONS:
        return None
    option, words = OPTIONS[argument.name]
    if not argument.values:
        return option
    value = argument.values[0]
    if isinstance(value, Other):
        return f"{option} HxW" if words is _grid else f"{option} {shlex.quote(value.text)}"
    if words is _switch:
        return option
    return " ".join(f"{option} {shlex.quote(word)}" for word in words(value)) or option
