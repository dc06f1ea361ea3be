"""What the caller asks for: arguments that are checked before a plan is made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np
from torch import nn

from keymap.errors import CheckpointError, PlanError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Fact, Format, Scalar, as_size
from keymap.language.rules import Rule
from keymap.plan.allowed import checked_patterns
from keymap.plan.model import ModelView
from keymap.source.settings import Settings, Unknown, config_text, in_hub_words

__all__ = [
    "Request",
    "check_model",
    "checked_facts",
    "checked_flag",
    "checked_settings",
    "checked_wrapper",
    "checked_wrappers",
    "example_towers",
    "hub_towers",
    "make_request",
    "other_lengths",
    "refuse_contradictions",
    "request_for_towers",
    "sizes_of",
    "with_own",
]

_EXAMPLES: Mapping[str, object] = {"size": (224, 448), "index": 0, "positive": 0.5}
_MAX_NAME = 100  # characters of a name that are compared with the known names


class Request(NamedTuple):
    """What the caller asked for.

    Attributes:
        file: the checkpoint, for messages.
        strict: refuse missing and unexpected keys.
        towers: the towers to load; None for all of them.
        source_grid: (h, w) of the file's position embedding, in patches.
        facts: settings that the shapes do not show, by the hub's names.
        allow_missing, allow_unexpected: patterns of the keys that may be missing or unexpected under strict.
        stripped: the prefixes that were stripped from every key of the file.
        elsewhere: prefixes of keys that belong to other state dicts of the file; these keys are not unexpected.
        within_towers: the caller chose the towers; keys that belong to no tower are not unexpected.
    """

    file: str
    strict: bool = True
    towers: tuple[str, ...] | None = None
    source_grid: tuple[int, int] | None = None
    facts: Mapping[str, int] = {}
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    stripped: str = ""
    elsewhere: tuple[str, ...] = ()
    within_towers: bool = False

    def includes(self, tower: str) -> bool:
        """True for a tower to load; "" means the keys that the hub does not know."""
        return self.towers is None or tower in self.towers


def make_request(
    known: Catalogue,
    file: str,
    strict: bool,
    towers: Sequence[str] | str | None,
    source_grid: Sequence[int] | None,
    facts: Mapping[str, int] | None,
    allow_missing: Sequence[str] | str = (),
    allow_unexpected: Sequence[str] | str = (),
) -> Request:
    """Check the arguments of a load.

    Raises:
        PlanError: an argument has a wrong type or value, or names an unknown tower or an unknown fact.
    """
    chosen = _checked_towers(towers, known.hub)
    grid = _checked_grid(source_grid)
    return Request(
        file,
        strict,
        chosen,
        grid,
        checked_facts(facts, known),
        checked_patterns("allow_missing", allow_missing),
        checked_patterns("allow_unexpected", allow_unexpected),
        within_towers=chosen is not None,
    )


def request_for_towers(towers: Sequence[str] | str | None, hub: Format) -> Request:
    """The request for some towers of a conversion.

    Raises:
        PlanError: a tower is unknown.
    """
    chosen = _checked_towers(towers, hub)
    return Request("the state dict", towers=chosen, within_towers=chosen is not None)


def checked_wrapper(wrapper: object) -> str | None:
    """The path of a state dict.

    Raises:
        CheckpointError: it is not a string.
    """
    if not isinstance(wrapper, (str, type(None))):
        raise CheckpointError(f"wrapper={wrapper!r}: pass the dotted path of a state dict in the file")
    return wrapper


def checked_wrappers(wrapper: object, hub: Format) -> str | dict[str, str] | None:
    """The path of a state dict, or one for each of some towers.

    Raises:
        CheckpointError: it is neither, or names an unknown tower.
    """
    if not isinstance(wrapper, Mapping):
        return checked_wrapper(wrapper)
    known = hub_towers(hub)
    wrong = [name for name, path in wrapper.items() if name not in known or not isinstance(path, str)]
    if wrong or not wrapper:
        raise CheckpointError(
            f"wrapper={wrapper!r}: expected a path in the file, or one for each tower; the towers are "
            f"{', '.join(known)}"
        )
    return dict(wrapper)


def _checked_grid(source_grid: object) -> tuple[int, int] | None:
    if source_grid is None:
        return None
    sizes = list(source_grid) if isinstance(source_grid, (tuple, list)) else []
    if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
        raise PlanError(
            f"source_grid={source_grid!r}: expected the rows and columns of patches, for example source_grid=(14, 14)"
        )
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


def sizes_of(facts: Mapping[str, Scalar]) -> dict[str, int]:
    """The facts that are numbers: rules cut and join tensors by them."""
    return {name: value for name, value in facts.items() if type(value) is int}


def checked_settings(facts: object, known: Catalogue) -> Mapping[str, Scalar]:
    """The caller's facts for a folder with a configuration: numbers, (h, w), and words such as that of an activation.

    Raises:
        PlanError: as `checked_facts`.
    """
    others = {}
    if isinstance(facts, Mapping):
        words = known.hub.facts.keys() - _sizes_of_rules(known)
        named = {name: fact for name, fact in known.hub.facts.items() if name in words and name in facts}
        pairs = {name: as_size(facts[name]) for name, fact in named.items() if fact.kind == "size"}
        facts = {**facts, **pairs}
        others = {name: facts[name] for name, fact in named.items() if _is_setting(fact, facts[name])}
        facts = {name: value for name, value in facts.items() if name not in others}
    return {**checked_facts(facts or None, known), **others}


def _is_setting(fact: Fact, value: object) -> bool:
    """Whether a value is one that a setting may have and that no rule counts by."""
    if fact.kind == "size":
        return type(value) is tuple and len(value) == 2
    if type(value) is int:
        return fact.kind == "index" and value >= 0
    return type(value) in (str, float, bool)


def checked_facts(facts: object, known: Catalogue) -> Mapping[str, int]:
    """The caller's facts about a source or a target; empty for None.

    Raises:
        PlanError: they are not a dict of names and positive integers, or there is no such fact.
    """
    if facts is None:
        return {}
    _refuse_none(facts)
    hub = known.hub
    grids = {position.grid_fact for position in hub.positions.values()}
    wrong = facts
    if isinstance(facts, Mapping):
        wrong = {n: v for n, v in facts.items() if not (isinstance(n, str) and type(v) is int and v > 0)}
    if not isinstance(facts, Mapping) or wrong:
        named = [name for name in hub.facts if isinstance(wrong, Mapping) and name in wrong]
        counts = [name for name in hub.facts if name not in grids and name in _sizes_of_rules(known)]
        examples = {name: _EXAMPLES.get(hub.facts[name].kind, 12) for name in (*named, *counts)}
        example = next((f", for example facts={{{name!r}: {value}}}" for name, value in examples.items()), "")
        raise PlanError(f"facts={wrong!r}: expected names and positive integers{example}")
    names = hub.facts.keys() - grids
    unknown = [name for name in facts if name not in names]
    if unknown:
        names |= _sizes_of_rules(known) - grids
        faults = [_unknown_fact(name, facts[name], names, grids) for name in unknown if name not in names]
        if faults:
            raise PlanError("facts=: a name is wrong", faults)
    return facts


def _refuse_none(facts: object) -> None:
    """Refuse facts without a value."""
    none = [name for name, value in facts.items() if value is None] if isinstance(facts, Mapping) else []
    if none:
        raise PlanError(f"facts={facts!r}: {some(map(repr, none))} is None; leave out what is not known")


def checked_flag(name: str, value: object) -> bool:
    """An argument that is True or False.

    Raises:
        PlanError: it is neither; a text such as "no" would count as true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise PlanError(f"{name}={value!r}: pass True or False")
    return bool(value)


def _sizes_of_rules(known: Catalogue) -> set[str]:
    """The facts that the rules of any mapping may ask for."""
    mappings = known.mappings.values()
    tables = [mapping.rules for mapping in mappings]
    tables += [part.rules for mapping in mappings for part in mapping.variants]
    tables += [part.rules for mapping in mappings for part in mapping.steps]
    return {fact for rules in tables for rule in rules for fact in rule.facts}


def _unknown_fact(name: str, value: int, names: Collection[str], grids: Collection[str]) -> str:
    text = f"facts={{{name!r}: {value}}}: there is no such fact"
    if name in grids:
        return f"{text}; pass the grid as source_grid=(h, w)"
    near = get_close_matches(name[:_MAX_NAME], names, 1)
    return f"{text}; did you mean {near[0]}?" if near else f"{text}; the facts are {', '.join(sorted(names))}"


def refuse_contradictions(request: Request, model: ModelView, settings: Settings) -> None:
    """Refuse facts of the caller that differ from what the model or the file's configuration has.

    Raises:
        PlanError: with one fault for each difference, which names both values.
    """
    faults = []
    for name, value in request.facts.items():
        if model.facts.get(name, value) != value:
            faults.append(_contradiction(name, value, "model", model.facts[name], model.fact_paths[name]))
        in_file, origin = settings.facts.get(name, (value, ""))
        if in_file != value:
            faults.append(_contradiction(name, value, "file", in_file, origin))
    if faults:
        raise PlanError(f"{request.file}: facts= contradicts the model or the file", faults)


def other_lengths(rules: Iterable[Rule], request: Request, model: ModelView, settings: Settings) -> dict[str, str]:
    """The numbers of rules in which the source's configuration and the model differ, each with both values in words."""
    names = dict.fromkeys(fact for rule in rules if request.includes(rule.tower) for fact in rule.facts)
    return {
        name: f"{name}: {config_text(value)} in the source ({origin}), {config_text(model.facts[name])} in the model "
        f"({model.fact_paths[name]})"
        for name, (value, origin) in settings.facts.items()
        if name in names and name in model.facts and value != model.facts[name]
    }


def _contradiction(name: str, given: Scalar, side: str, stated: Scalar, origin: str) -> str:
    return f"facts={{{name!r}: {given!r}}}: the {side} has {config_text(stated)} ({origin})"


def with_own(
    given: Mapping[str, Scalar], own: Mapping[str, tuple[Scalar, str]], hub: Format, file: str
) -> dict[str, Scalar]:
    """The caller's settings with those that the source states itself, in the hub's words.

    Args:
        given: by the hub's names.
        own: value and origin of each setting of the source.
        hub: has the words of settings.
        file: for the message.

    Raises:
        PlanError: they contradict each other.
    """
    stated = {
        name: (in_hub_words(hub.facts[name], value), origin)
        for name, (value, origin) in own.items()
        if name in hub.facts and not isinstance(value, Unknown)
    }
    faults = [
        _contradiction(name, given[name], "source", value, origin)
        for name, (value, origin) in stated.items()
        if name in given and in_hub_words(hub.facts[name], given[name]) != value
    ]
    if faults:
        raise PlanError(f"{file}: the argument facts= contradicts the source", faults)
    return {**{name: value for name, (value, _) in stated.items()}, **given}


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
