"""What a command answers, and the one JSON document of it. `schemas/command.schema.json` describes the document."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import click

import keymap
from keymap.cli.screen import Screen

__all__ = ["REFUSED", "USAGE", "Answer", "answers", "document", "error_document"]

REFUSED, USAGE = 1, 2


class Answer(NamedTuple):
    """What a command found.

    Attributes:
        result: plain data, for ``--json``.
        show: prints it for people.
        code: the exit code.
    """

    result: Mapping[str, Any]
    show: Callable[[Screen], None]
    code: int = 0


def answers(function: Callable[..., Answer]) -> Callable[..., int]:
    """Make a command of a function that returns an `Answer`: add ``--json``, print, and return the exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document, also for a refusal.")
    @functools.wraps(function)
    def command(*, as_json: bool, **arguments: Any) -> int:
        answer = function(**arguments)
        if as_json:
            click.echo(document(str(click.get_current_context().info_name), answer.result))
        else:
            answer.show(Screen())
        return answer.code

    return command


def document(command: str, result: Mapping[str, Any]) -> str:
    """The document of a command that was carried out."""
    return _text({"command": command, "version": keymap.__version__, "result": result})


def error_document(command: str, kind: str, message: str, faults: Iterable[str]) -> str:
    """The document of a command that was not.

    Args:
        command: empty if there is no such command.
        kind: the name of the error's class, ``UsageError`` or ``Interrupted``.
        message: one line.
        faults: all faults.
    """
    error = {"type": kind, "message": message, "faults": list(faults)}
    return _text({"command": command, "version": keymap.__version__, "error": error})


def _text(data: Mapping[str, Any]) -> str:
    """One line of ASCII, which no terminal takes for a command."""
    return json.dumps(_plain(data), allow_nan=False).replace("\x7f", "\\u007f")


def _plain(value: Any) -> Any:
    """A value that JSON has: infinite numbers and halves of characters as text."""
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
