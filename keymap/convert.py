"""A state dict in memory, from one format to another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.nn.parameter import is_lazy

from keymap.errors import PlanError, VerifyError, some
from keymap.language.format import Format
from keymap.load.casts import cast
from keymap.load.copying import Read, materialise
from keymap.load.preflight import failed_checks
from keymap.plan.export import Target, export, only_reading, target_format
from keymap.plan.live import plain_values
from keymap.plan.model import has_memory
from keymap.plan.request import checked_facts, checked_wrapper, request_for_towers
from keymap.plan.twins import lazy_state
from keymap.read.lazy import brief
from keymap.source.hubs import Asked, PathLike, ask
from keymap.source.open import open_tree

__all__ = ["convert_state_dict"]


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    to: PathLike,
    *,
    mapping: PathLike | None = None,
    wrapper: str | None = None,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, int] | None = None,
    hub: str | None = None,
) -> dict[str, torch.Tensor]:
    """Rewrite a state dict in memory, from any known format to another.

    Args:
        state_dict: tensors by key; it is not changed.
        to: the name of a format, or the path of a mapping file; or the name of a bridge, which gives the hub's keys
            with that tower in the second layout. For example, ``open_clip`` writes ``text.*`` as CustomTextCLIP has
            it, ``open_clip_flat`` writes the text tower without ``text.``, as CLIP has it.
        mapping: the name of the source format, or the path of a YAML file; None detects the format.
        wrapper: which state dict within it to convert, for example ``"model.vision_tower"``.
        towers: convert only these towers, for example ``("image",)``.
        facts: settings that shapes cannot show and the target's shapes need, for example
            ``{"image.heads": 12, "text.heads": 8}``. One that contradicts the shapes is refused.
        hub: the name of the hub, where several have a format with the name ``to``.

    Returns:
        A new dict. Tensors that are only renamed are the caller's own; the others are new and contiguous.

    Raises:
        KeymapError: the source is incomplete, a key has no place in the target, or a fact is missing.
    """
    asked, target = _checked(state_dict, to, mapping, hub)
    facts = checked_facts(facts, asked.known)
    lazy = lazy_state(state_dict, lambda key, value: partial(plain_values, value))
    source = only_reading(open_tree(asked, lazy, checked_wrapper(wrapper), facts))
    planned = export(source, target, request_for_towers(towers, asked.known.hub), facts)

    def read(key: str) -> torch.Tensor:
        return source.unwrapped.tensors[key].read()

    failed = failed_checks(planned.checks, read)
    if failed:
        raise VerifyError(f"the state dict cannot be written as {target.name}", [text for _, text in failed])
    return {key: _written(key, one, read) for key, one in planned.tensors.items()}


def _checked(
    state_dict: Mapping[str, torch.Tensor], to: PathLike, mapping: PathLike | None, hub: str | None
) -> tuple[Asked, Format]:
    """The mappings with the name of the source's format if the caller gives one, and the target."""
    if not isinstance(state_dict, Mapping) or not isinstance(to, (str, os.PathLike)):
        raise PlanError(
            f"expected a dict of tensors and the name of a format, not {type(state_dict).__name__} and {to!r}"
        )
    asked = ask(hub, mapping, to)
    target = target_format(asked.known, asked.to)
    wrong = [brief(key) for key in state_dict if not isinstance(key, str)]
    if wrong:
        raise PlanError(f"the state dict has keys that are not strings: {some(wrong)}; rename or remove them")
    others = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise PlanError(f"the state dict holds values that are not tensors: {some(map(str, others))}; remove them")
    faults = [f"{key} {why}" for key, value in state_dict.items() if (why := _why_unreadable(value))]
    if faults:
        count = "1 tensor" if len(faults) == 1 else f"{len(faults)} tensors"
        raise PlanError(f"{count} of the state dict cannot be converted", faults)
    return asked, target


def _why_unreadable(value: torch.Tensor) -> str:
    """Why a tensor cannot be converted; empty where it can."""
    if is_lazy(value):
        return "has no shape yet: run the model once, or remove it"
    if value.is_nested:
        return "is nested: pass its parts as separate tensors"
    if value.is_quantized:
        return "is quantized: pass the state dict of the model before it was quantized, or dequantize() it"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}): pass it dense, for example with to_dense()"
    if value.is_meta:
        return "is on the meta device and has no values: load the model first"
    if not has_memory(value):
        return f"is a {type(value).__name__}: pass a plain tensor, for example with full_tensor() of a DTensor"
    return ""


def _written(key: str, target: Target, read: Read) -> torch.Tensor:
    """One tensor of the result: the caller's own where it is only renamed, else new and contiguous."""
    layout = target.layout
    value: torch.Tensor | None = None
    if layout.copied_whole:
        original = read(layout.sources[0])
        if original.numel() == layout.pieces[0].numel:
            value = original.reshape(layout.shape)
    if value is None:
        value = materialise(layout, read)
    return cast(key, value, target.dtype).reshape(target.shape)
