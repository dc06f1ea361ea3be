"""What the caller asks for: arguments that are checked before a plan is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from keymap.errors import PlanError
from keymap.language.format import Format

__all__ = ["Request", "check_model", "checked_facts", "example_towers", "hub_towers", "make_request"]


class Request(NamedTuple):
    """What the caller asked for.

    Attributes:
        file: the checkpoint, for messages.
        strict: refuse missing and unexpected keys.
        towers: the towers to load; None for all of them.
        source_grid: (h, w) of the file's position embedding, in patches.
        facts: settings that the shapes do not show, by the hub's names.
    """

    file: str
    strict: bool = True
    towers: tuple[str, ...] | None = None
    source_grid: tuple[int, int] | None = None
    facts: Mapping[str, int] = {}

    def includes(self, tower: str) -> bool:
        """True for a tower to load; "" means the keys that the hub does not know."""
        return self.towers is None or tower in self.towers


def make_request(
    hub: Format,
    file: str,
    strict: bool,
    towers: Sequence[str] | str | None,
    source_grid: Sequence[int] | None,
    facts: Mapping[str, int] | None,
) -> Request:
    """Check the arguments of a load.

    Raises:
        PlanError: an argument has a wrong type or value, or names an unknown tower.
    """
    return Request(file, strict, _checked_towers(towers, hub), _checked_grid(source_grid), checked_facts(facts, hub))


def _checked_grid(source_grid: object) -> tuple[int, int] | None:
    if source_grid is None:
        return None
    sizes = list(source_grid) if isinstance(source_grid, (tuple, list)) else []
    if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
        raise PlanError(f"source_grid={source_grid!r}: expected (h, w), the rows and columns of patches")
    return sizes[0], sizes[1]


def _checked_towers(towers: object, hub: Format) -> tuple[str, ...] | None:
    if towers is None:
        return None
    known = hub_towers(hub)
    if not isinstance(towers, (str, tuple, list, set)):
        raise PlanError(f"towers={towers!r}: expected a name or a tuple of names, for example {example_towers(hub)[0]}")
    chosen = (towers,) if isinstance(towers, str) else tuple(towers)
    unknown = [tower for tower in chosen if tower not in known]
    if unknown or not chosen:
        what = f"unknown: {', '.join(map(repr, unknown))}" if unknown else "name at least one tower"
        raise PlanError(f"towers={chosen!r}: {what}; the towers are {', '.join(known)}")
    return chosen


def checked_facts(facts: object, hub: Format) -> Mapping[str, int]:
    """The caller's facts about a source or a target; empty for None.

    Raises:
        PlanError: they are not a dict of names and positive integers.
    """
    if facts is None:
        return {}
    if isinstance(facts, Mapping) and all(
        isinstance(name, str) and type(value) is int and value > 0 for name, value in facts.items()
    ):
        return facts
    grids = {position.grid_fact for position in hub.positions.values()}
    example = next((f", for example {{{name!r}: 12}}" for name in hub.facts if name not in grids), "")
    raise PlanError(f"facts={facts!r}: expected a dict of names and positive integers{example}")


def check_model(model: object) -> None:
    """Refuse anything but a module.

    Raises:
        PlanError: with a hint where a state dict was passed.
    """
    if not isinstance(model, nn.Module):
        hint = ": pass the model itself, not its state dict" if isinstance(model, Mapping) else ""
        raise PlanError(f"expected a torch.nn.Module as the model, not {type(model).__name__}{hint}")


def hub_towers(hub: Format) -> tuple[str, ...]:
    """The names of all towers, in the hub's order."""
    return tuple(dict.fromkeys(rule.tower for rule in hub.rules))


def example_towers(hub: Format) -> list[str]:
    """The argument that loads one tower alone, for each tower that has layouts."""
    return [f"towers=({tower!r},)" for tower in hub.layouts]
