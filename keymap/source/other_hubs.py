"""Which other hub a state dict belongs to, for the refusal of a call that is about another one."""

from __future__ import annotations

from collections.abc import Mapping

from keymap.advice import conversion, converted
from keymap.errors import DetectionError, KeymapError, PlanError, some
from keymap.language.layout import Layout
from keymap.source.detect import claim, claims
from keymap.source.hubs import ask_each
from keymap.source.opened import Opened, layouts_of

__all__ = ["naming_models_format", "naming_other_hubs"]


def naming_models_format(error: KeymapError, opened: Opened, model: Mapping[str, Layout]) -> KeymapError:
    """The refusal of a model with the names of one format for a file of another format of the same hub.

    Args:
        error: the refusal. It comes back as it is where that is not its cause.
        opened: the file.
        model: the tensors of the model.
    """
    top, hub = opened.top[0], opened.known.hub
    if not isinstance(error, PlanError) or top.refused or hub.by_name or claim(hub, model, {}) is not None:
        return error
    layouts = layouts_of(top.unwrapped.tensors, top.unwrapped.start)
    for asked in ask_each():
        if claim(asked.known.hub, model, {}) is not None:
            return error
        formats = [one for one in asked.known.formats if claim(one, model, {}) is not None]
        try:
            found = [one.mapping for one in claims(asked.known, layouts)] if formats else []
        except DetectionError:
            continue
        if found and not any(one in formats for one in found):
            own = formats[0]
            text = f"the file has the format {found[0].name}, and the model's keys are those of format {own.name}"
            advice = f"both are of hub {asked.known.hub.name}: {converted(own.name)}"
            return PlanError(f"{opened.file}: {text} ({own.title})", [advice])
    return error


def naming_other_hubs(
    error: DetectionError, opened: Opened, model: Mapping[str, Layout] | None = None
) -> DetectionError:
    """The refusal of a state dict without a format; it also names the formats that other hubs have for its keys.

    Args:
        error: the refusal. One that says why a file cannot be loaded at all comes back as it is.
        opened: the file.
        model: the tensors of the model that it was to be loaded into, where there is one.
    """
    top, own = opened.top[0], opened.known.hub.name
    if top.found is not None or top.refused or opened.named:
        return error
    layouts = layouts_of(top.unwrapped.tensors, top.unwrapped.start)
    found, formats = list[str](), list[str]()
    for asked in ask_each():
        if asked.known.hub.name == own:
            continue
        try:
            names = [one.mapping.name for one in claims(asked.known, layouts)]
        except DetectionError:
            continue
        found.append(f"they are those of format {' or '.join(names)} of hub {asked.known.hub.name}")
        formats += [one.name for one in asked.known.formats if model and claim(one, model, {}) is not None]
    if not found:
        return error
    if formats:
        advice = f"the model's keys are those of format {' or '.join(formats)} of that hub: {conversion(formats[0])}"
        return DetectionError(error.summary, [*found, advice])
    if model and claim(opened.known.hub, model, {}) is None:
        return DetectionError(error.summary, [*found, _of_no_hub(opened, model)])
    advice = f"formats of two hubs are never converted into each other, and this call is about hub {own}"
    return DetectionError(error.summary, [*found, advice, *error.faults])


def _of_no_hub(opened: Opened, model: Mapping[str, Layout]) -> str:
    """What to do about a model that no hub knows: it may be wrapped in another one."""
    start = next((p for p in opened.known.containers.prefixes if all(key.startswith(p) for key in model)), "")
    within = {key[len(start) :]: layout for key, layout in model.items()}
    if start and any(claim(asked.known.hub, within, {}) is not None for asked in ask_each()):
        return f"the model is wrapped, and its keys begin with {start!r}: pass the inner model (model.{start[:-1]})"
    return (
        f"the model's keys ({some(model)}) are those of no hub: pass the model that the format is for, or write a "
        f"mapping with `hub: any` that leads to its names"
    )
