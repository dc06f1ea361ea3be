"""Arguments that messages name, in one spelling: ``name=value`` as Python has it, or ``name=`` without a value.

So a message can be read again: a comparison says which side an argument belongs to, and the command says its options.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from keymap.errors import KeymapError

__all__ = [
    "Argument",
    "Other",
    "advised",
    "choices",
    "conversion",
    "converted",
    "lacked_by_files",
    "renaming",
    "replaced",
]

_NAME = re.compile(r"(?<![\w.'\"-])([a-z][a-z_]*)=(?!=)")
_TOKEN = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[(\[{]|[)\]}]|[^'\"()\[\]{}]+", re.DOTALL)
_WORD = re.compile(r"[\w+-]+(?:\.[\w+-]+)*")
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


class Other(NamedTuple):
    """A value that is no literal of Python, for example ``(h, w)``."""

    text: str


class Argument(NamedTuple):
    """An argument that a message names.

    Attributes:
        name: of the argument.
        values: its value, as one element; empty for ``name=`` alone.
    """

    name: str
    values: tuple[Any, ...]


def advised(text: str) -> list[Argument]:
    """The arguments that a message names, in its order."""
    return [argument for _, _, argument in _found(text)]


def replaced(text: str, write: Callable[[Argument, str], str | None]) -> str:
    """A message with its arguments written in another way.

    Args:
        text: the message.
        write: takes an argument and how it is written now, and returns how it is written, or None for no change.
    """
    parts, end = [], 0
    for start, stop, argument in _found(text):
        new = write(argument, text[start:stop])
        if new is not None:
            parts += [text[end:start], new]
            end = stop
    return "".join([*parts, text[end:]])


def choices(name: str, values: Iterable[object]) -> str:
    """The values that an argument can have, each ready to be passed: ``wrapper='a' or wrapper='b'``."""
    return " or ".join(f"{name}={value!r}" for value in values)


def conversion(to: str) -> str:
    """What to do with a file for a model whose names are those of a format."""
    return (
        f"convert the weights with convert_state_dict(state_dict, to={to!r}), then call the model's own load_state_dict"
    )


def converted(to: str) -> str:
    """What to do with a file for a model whose names are those of a format, where both are of one hub."""
    return f"convert the file first (convert_checkpoint, or keymap convert) with to={to!r}, then load the new file"


def lacked_by_files(any_model: bool) -> str:
    """What to add to a message about keys of a model without a place in a file; empty where a hub knows the model."""
    return "; keys that files lack belong under `ignore` of the mapping" if any_model else ""


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors within name arguments by the names that the caller knows, for example ``wrapper=`` as ``wrapper_a=``."""

    def write(argument: Argument, written: str) -> str | None:
        new = names.get(argument.name)
        return new + written[len(argument.name) :] if new is not None else None

    try:
        yield
    except KeymapError as error:
        faults = [replaced(fault, write) for fault in error.faults]
        raise type(error)(replaced(error.summary, write), faults) from error.__cause__


def _found(text: str) -> Iterator[tuple[int, int, Argument]]:
    """The arguments with their start and end; values are not searched."""
    found = _NAME.search(text)
    while found is not None:
        end = _end_of_value(text, found.end())
        yield found.start(), end, Argument(found[1], _values(text[found.end() : end]))
        found = _NAME.search(text, max(end, found.end()))


def _end_of_value(text: str, start: int) -> int:
    """Where a value ends: a string, a bracket and what it holds, or a word; ``start`` for none."""
    if text[start : start + 1] not in {*_OPEN, "'", '"'}:
        word = _WORD.match(text, start)
        return word.end() if word is not None else start
    depth, at = 0, start
    while (token := _TOKEN.match(text, at)) is not None:
        at = token.end()
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth == 0:
            return at
    return start


def _values(text: str) -> tuple[Any, ...]:
    if not text:
        return ()
    try:
        return (ast.literal_eval(text),)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return (Other(text),)
