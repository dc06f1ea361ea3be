"""Options that several commands share, and the arguments of the library that they become."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from keymap.cli.names import complete_format, complete_model

__all__ = [
    "HUB",
    "PATH",
    "SOURCE",
    "TARGET_MODEL",
    "UNSAFE",
    "WRAPPER",
    "apply",
    "complete_model",
    "load_arguments",
    "pairs_of",
    "reading",
    "request",
    "sides",
]

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[Any], Any]

_GRID = re.compile(r"\[?(\d{1,9}) ?[x,] ?(\d{1,9})\]?", re.ASCII | re.IGNORECASE)

PATH = click.Path()  # without a check: the library says what is wrong with a path

SOURCE = click.argument("path", type=PATH)
UNSAFE = click.option(
    "--unsafe-pickle", is_flag=True, help="Pass a pickle that names code to torch.load, which can run the code."
)
MAPPING = click.option(
    "--mapping",
    metavar="NAME|YAML",
    shell_complete=complete_format,
    help="The format of the file, or your own mapping file.",
)
TOWER = click.option(
    "--tower", "towers", metavar="NAME", multiple=True, help="Only this tower; several times for more."
)
FACT = click.option(
    "--fact",
    "facts",
    metavar="NAME=VALUE",
    multiple=True,
    help="What shapes cannot show, such as the number of heads; HxW for the size of an image.",
)
HUB = click.option("--hub", metavar="NAME", help="The hub, where several know the keys or have such a format.")
WRAPPER = click.option("--wrapper", metavar="NAME", help="Which state dict of the file.")
WRAPPERS = click.option(
    "--wrapper",
    "wrappers",
    metavar="[TOWER=]NAME",
    multiple=True,
    help="Which state dict of the file, or which for each tower.",
)
TARGET_MODEL = click.option(
    "--model",
    "model_name",
    metavar="NAME",
    shell_complete=complete_model,
    help="A configuration of OpenCLIP, for example ViT-B-32.",
)
_STRICT = click.option("--no-strict", is_flag=True, help="Take what fits and report the rest.")
_MISSING = click.option(
    "--allow-missing", metavar="PATTERN", multiple=True, help="Keys of the model that the file may lack."
)
_UNEXPECTED = click.option(
    "--allow-unexpected", metavar="PATTERN", multiple=True, help="Keys of the file that may have no place."
)
_SOURCE_GRID = click.option(
    "--source-grid", metavar="HxW", help="The grid of the file's position embedding, in patches."
)


def apply(*options: Option) -> Callable[[F], F]:
    """Add options to a command, in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


reading = apply(MAPPING, HUB, WRAPPER, TOWER, FACT, UNSAFE)  # of a conversion
request = apply(_STRICT, MAPPING, HUB, WRAPPERS, TOWER, FACT, _SOURCE_GRID, _MISSING, _UNEXPECTED, UNSAFE)  # of a load
sides = apply(  # of a comparison
    click.option("--mapping-a", metavar="NAME|YAML", shell_complete=complete_format, help="The format of A."),
    click.option("--mapping-b", metavar="NAME|YAML", shell_complete=complete_format, help="The format of B."),
    click.option("--wrapper-a", metavar="NAME", help="Which state dict of A."),
    click.option("--wrapper-b", metavar="NAME", help="Which state dict of B."),
    HUB,
    TOWER,
    FACT,
    UNSAFE,
)


def load_arguments(
    *,
    no_strict: bool,
    mapping: str | None,
    hub: str | None,
    wrappers: Sequence[str],
    towers: Sequence[str],
    facts: Sequence[str],
    source_grid: str | None,
    allow_missing: Sequence[str],
    allow_unexpected: Sequence[str],
    unsafe_pickle: bool,
) -> dict[str, Any]:
    """The arguments that `load_checkpoint` and `plan_load` share.

    Raises:
        click.UsageError: an option does not have its form.
    """
    return {
        "strict": not no_strict,
        "mapping": mapping,
        "hub": hub,
        "wrapper": _wrapper(wrappers),
        "towers": towers or None,
        "facts": pairs_of(facts),
        "source_grid": _grid(source_grid),
        "allow_missing": allow_missing,
        "allow_unexpected": allow_unexpected,
        "weights_only": not unsafe_pickle,
    }


def settings_of(facts: Sequence[str]) -> dict[str, int | float | str | bool | tuple[int, int]] | None:
    """The values of ``NAME=VALUE``: numbers, true and false, HxW, and words; None for none."""
    found: dict[str, int | float | str | bool | tuple[int, int]] = {}
    for fact in facts:
        name, equals, value = fact.partition("=")
        if not (name and equals and value):
            raise click.UsageError(f"--fact {fact}: expected NAME=VALUE")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        sides = _GRID.fullmatch(value)
        word = value if sides is None else (int(sides[1]), int(sides[2]))
        found[name] = read if isinstance(read, (int, float, bool)) else word
    return found or None


def pairs_of(facts: Sequence[str]) -> dict[str, int] | None:
    """The numbers of ``NAME=VALUE``; None for none."""
    found = {}
    for fact in facts:
        name, equals, value = fact.partition("=")
        if not (name and equals and value.isascii() and value.isdigit() and len(value) < 10):
            raise click.UsageError(f"--fact {fact}: expected NAME=VALUE with a positive number")
        found[name] = int(value)
    return found or None


def _wrapper(wrappers: Sequence[str]) -> str | Mapping[str, str] | None:
    if not wrappers:
        return None
    if len(wrappers) == 1 and "=" not in wrappers[0]:
        return wrappers[0]
    split = [wrapper.partition("=") for wrapper in wrappers]
    if not all(tower and equals for tower, equals, _ in split):
        raise click.UsageError("--wrapper: pass one NAME, or TOWER=NAME for each tower")
    return {tower: name for tower, _, name in split}


def _grid(text: str | None) -> tuple[int, int] | None:
    found = _GRID.fullmatch(text) if text is not None else None
    if text is not None and found is None:
        raise click.UsageError(f"--source-grid {text}: expected HxW, for example 14x14")
    return (int(found[1]), int(found[2])) if found is not None else None
