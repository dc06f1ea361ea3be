"""Keys that no rule owns and that the model has under the same name: heads that a user added, towers that are new."""

from __future__ import annotations

from keymap.errors import some
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.plan.model import ModelView
from keymap.plan.request import Request
from keymap.plan.to_hub import Translated, tower_of
from keymap.source.detect import Detection
from keymap.source.open import Source, layouts_of

__all__ = ["OWN", "own_reading", "take_own_names"]

OWN = Format("own", "format", "the model's own keys", "")


def own_reading(source: Source, model: ModelView, foreign: bool) -> Source | None:
    """A state dict that has every key of the model in the model's shape, read as the model's own; None for another.

    Args:
        source: any reading of the state dict, or one without a format.
        model: the model; it may be any module.
        foreign: the model has no tower that the hub knows; then half of its keys are enough.
    """
    unwrapped = source.unwrapped
    if unwrapped.stored is not None:
        unwrapped = unwrapped._replace(tensors=unwrapped.stored)
    layouts = layouts_of(unwrapped.tensors, unwrapped.start)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.tensors.items()}
    equal = sum(key in layouts and layouts[key].shape == wanted[key] for key in wanted)
    if not equal or 2 * equal < len(wanted) or (not foreign and (equal < len(wanted) or model.lazy)):
        return None
    return source._replace(
        unwrapped=unwrapped, found=Detection(OWN, layouts, ("every key of the model",), (), ()), refused=False
    )


def take_own_names(translated: Translated, model: ModelView, request: Request, hub: Format) -> tuple[str, ...]:
    """Give keys without a rule to the model's keys of the same name and shape; returns a note on them for the report.

    Args:
        translated: changed in place.
        model: the model.
        request: a tower that is not asked for gets nothing.
        hub: the hub, which knows the towers.
    """
    taken: dict[str, Layout] = {}
    left: list[str] = []
    for source in translated.unowned:
        key = translated.renamed.get(source, source)
        layout, target = translated.source_keys.get(key), model.tensors.get(key)
        without_rule = source in translated.renamed  # others had a rule, and no place
        fits = target is not None and layout is not None and layout.shape == tuple(target.shape)
        if (
            layout is not None
            and without_rule
            and fits
            and key not in translated.tensors
            and request.includes(tower_of(hub, key))
        ):
            taken[key] = layout
        else:
            left.append(source)
    if not taken:
        return ()
    translated.unowned = left
    translated.tensors = {**translated.tensors, **taken}
    return (f"loaded under the model's own names: {some(taken)}",)
