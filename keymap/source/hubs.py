"""Which hub a call is about: that of the model, of a mapping, of the target, or the one that the caller names."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from keymap.advice import choices
from keymap.errors import MappingError, PlanError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Shaped
from keymap.source.registry import Registry, hubs, path_text

__all__ = ["Asked", "PathLike", "ask", "ask_each", "ask_for_two", "find_mapping"]

PathLike = str | os.PathLike[str]


class Asked(NamedTuple):
    """What a caller asks for, with the hub that it is about.

    Attributes:
        known: all mappings of the hub.
        mapping: the name of the source's format; None if it is to be detected.
        to: the name of the target; "" for none.
        own: the keys of the model, where there is one.
    """

    known: Catalogue
    mapping: str | None = None
    to: str = ""
    own: Collection[str] = ()


class _Named(NamedTuple):
    """A mapping that the caller passes.

    Attributes:
        argument: of which function argument, as messages show it.
        name: of the mapping.
        hubs: that it may belong to; None if no mapping has the name.
        states: it is a file, which has one hub; with True that it says so itself.
    """

    argument: str
    name: str
    hubs: tuple[str, ...]
    is_file: bool = False
    states: bool = False


def ask(
    hub: object = None,
    mapping: PathLike | None = None,
    to: PathLike | None = None,
    model: Mapping[str, Shaped] | None = None,
    as_mapping: str = "mapping",
) -> Asked:
    """The hub that a call is about, and the mappings that the caller names.

    ``hub`` decides where it is given; else a mapping file, whose hub it says; else a name that one hub alone has; else
    the model's keys. A model that no hub knows is read with the hub of files that name none.

    Args:
        hub: its name, or None.
        mapping: name of the source's format, or the path of a mapping file; None to detect the format.
        to: name or path of the target.
        model: tensors of the model by key, where there is one.
        as_mapping: the argument that the caller calls ``mapping``, for messages.

    Raises:
        MappingError: there is no such hub, format or file, the file is wrong, or the mappings belong to two hubs.
        PlanError: the model's keys are those of several hubs.
    """
    known, names = _asked(hub, {as_mapping: mapping, "to": to}, model)
    if mapping is not None:
        _check_is_format(known, names[as_mapping], as_mapping)
    return Asked(known, names.get(as_mapping), names.get("to", ""), model.keys() if model is not None else ())


def ask_for_two(
    hub: object, mapping_a: PathLike | None, mapping_b: PathLike | None, model: Mapping[str, Shaped] | None
) -> tuple[Asked, Asked]:
    """What is asked for of two checkpoints that are compared, under one hub; see `ask`."""
    known, names = _asked(hub, {"mapping_a": mapping_a, "mapping_b": mapping_b}, model)
    for argument, name in names.items():
        _check_is_format(known, name, argument)
    return Asked(known, names.get("mapping_a")), Asked(known, names.get("mapping_b"))


def _asked(
    hub: object, given: Mapping[str, PathLike | None], model: Mapping[str, Shaped] | None
) -> tuple[Catalogue, dict[str, str]]:
    """The mappings of the hub that all arguments allow, and the names of the mappings by argument."""
    registry, named = hubs(), []
    for argument, mapping in given.items():
        if mapping is not None:
            registry, one = _named(registry, argument, mapping)
            named.append(one)
    wanted = registry.checked(hub) if hub is not None else None
    known = registry.catalogue(_chosen(registry, wanted, named, model))
    return known, {one.argument: one.name for one in named}


def ask_each(hub: object = None) -> list[Asked]:
    """Every hub that a file can show, that of files without ``hub:`` first; or the one that the caller names."""
    registry = hubs()
    if hub is not None:
        return [Asked(registry.catalogue(registry.checked(hub)))]
    every = [registry.catalogue(name) for name in registry.hubs]
    return [Asked(known) for known in every if not known.hub.by_name]


def find_mapping(mapping: PathLike, hub: object = None) -> tuple[Catalogue, Format]:
    """A mapping of any kind by its name, or by the path of its file, and all mappings of its hub.

    Raises:
        MappingError: there is none, several hubs have one, or the file is wrong.
    """
    registry, one = _named(hubs(), "mapping", mapping)
    known = registry.catalogue(_chosen(registry, registry.checked(hub) if hub is not None else None, [one], None))
    return known, known.get(one.name)


def _named(registry: Registry, argument: str, given: PathLike) -> tuple[Registry, _Named]:
    """A mapping by its name, or by its path: then with a registry that knows the file."""
    advice = f"pass the name of a format or the path of a YAML file as {argument}="
    name = path_text(given, MappingError, advice)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        return registry, _Named(argument, name, registry.having(name))
    file = Path(name)
    if not os.path.isfile(file):
        raise MappingError(f"{name}: the mapping file does not exist; check the path")
    extended, (found,) = registry.extended([file])
    header = next(one for path, one in extended.files.items() if path.resolve() == file.resolve())
    return extended, _Named(argument, found, (extended.hub_of(header),), True, bool(header.hub))


def _chosen(registry: Registry, wanted: str | None, named: list[_Named], model: Mapping[str, Shaped] | None) -> str:
    """The one hub that all arguments allow."""
    known = [one for one in named if one.hubs]
    if wanted is not None:
        other = next((one for one in known if wanted not in one.hubs), None)
        if other is not None:
            raise MappingError(f"hub={wanted!r}: {other.argument} {other.name!r} belongs to hub {_or(other.hubs)}")
        return wanted
    allowed = _shared(known)
    if len(allowed) == 1 and registry.catalogue(allowed[0]).hub.by_name:
        return allowed[0]
    claiming = list(registry.claiming(model)) if model is not None else []
    if not allowed:
        return _of_model(claiming, registry, model or {})
    fitting = [hub for hub in allowed if hub in claiming] if claiming else allowed
    if not fitting:
        raise _of_another_hub(registry, known[0], allowed, claiming, model or {})
    if len(fitting) > 1:
        raise MappingError(
            f"{known[0].argument}={known[0].name!r}: several hubs have a mapping of this name; choose one with "
            f"{choices('hub', fitting)}"
        )
    return fitting[0]


def _shared(known: list[_Named]) -> list[str]:
    """The hubs that all mappings may belong to; empty if there are no mappings."""
    allowed = list(known[0].hubs) if known else []
    for one in known[1:]:
        shared = [hub for hub in allowed if hub in one.hubs]
        if not shared:
            first = known[0]
            raise MappingError(
                f"{first.argument} {first.name!r} belongs to hub {_or(allowed)}, {one.argument} {one.name!r} to hub "
                f"{_or(one.hubs)}: a conversion stays within one hub"
            )
        allowed = shared
    return allowed


def _of_model(claiming: list[str], registry: Registry, model: Mapping[str, Shaped]) -> str:
    """The hub of a model; that of files which name none if no hub has its keys."""
    if len(claiming) > 1:
        raise PlanError(
            f"the model's keys ({some(model)}) are those of {len(claiming)} hubs; choose one with "
            f"{choices('hub', claiming)}"
        )
    return claiming[0] if claiming else registry.default


def _of_another_hub(
    registry: Registry, one: _Named, allowed: list[str], claiming: list[str], model: Mapping[str, Shaped]
) -> MappingError:
    keys = f"the model's keys ({some(model)}) are those of hub {_or(claiming)}"
    formats = sorted(mapping.name for hub in claiming for mapping in registry.catalogue(hub).formats)
    advice = f"pass {one.argument}= as one of {', '.join(formats)}"
    advice += f" ({_or(claiming)} has the model's own names)" if one.argument == "to" else ", or None to detect it"
    if one.is_file and not one.states:
        advice = f"write `hub: {claiming[0]}` into the file, or `hub: any` if its rules lead to the model's own names"
    return MappingError(f"{one.argument} {one.name!r} belongs to hub {_or(allowed)}, but {keys}; {advice}")


def _or(names: list[str] | tuple[str, ...]) -> str:
    return " or ".join(names)


def _check_is_format(known: Catalogue, name: str, argument: str) -> None:
    """Refuse a name of something that no file has as its format.

    Raises:
        MappingError: with the names of the formats.
    """
    kind = known.get(name).kind
    if kind not in ("format", "hub"):
        formats = ", ".join(sorted(m.name for m in known.formats))
        raise MappingError(
            f"{argument}={name!r}: no file has this format, because its kind is {kind}; pass one of: {formats}"
        )
