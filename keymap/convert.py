"""A state dict in memory, from one format to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from keymap.errors import MappingError, PlanError, VerifyError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.load.copying import Read, materialise
from keymap.load.preflight import failed
from keymap.plan.plan import checked_facts
from keymap.plan.to_hub import Translated, bring_to_layouts, from_hub, incomplete, to_hub
from keymap.read import LazyTensor
from keymap.source.detect import detect, tower_layout
from keymap.source.open import PathLike, catalogue_with, layouts_of
from keymap.source.unwrap import unwrap

__all__ = ["convert_state_dict"]


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    to: str,
    *,
    mapping: PathLike | None = None,
    facts: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Rewrite a state dict in memory, from any known format to another.

    Args:
        state_dict: tensors by key; it is not changed.
        to: the name of a format; or of a bridge, which gives the hub's keys with that tower in the second
            layout (``open_clip`` writes ``text.*`` as CustomTextCLIP has it, ``open_clip_flat`` as CLIP has it).
        mapping: name of the source format, or path of a YAML file; None detects it.
        facts: what no weight tells and the target's shapes need, as ``{"image.heads": 12, "text.heads": 8}``.

    Returns:
        New dict. Tensors that are only renamed are the caller's own; the others are new, contiguous.

    Raises:
        KeymapError: the source is not whole, a key has no place in the target, or a fact is lacking.
    """
    if not isinstance(state_dict, Mapping) or not isinstance(to, str):
        raise PlanError(f"give a dict of tensors and a format's name, not {type(state_dict).__name__} and {to!r}")
    known, wanted = catalogue_with(mapping)
    target = known.get(to)
    if not target.rules:
        raise MappingError(f"{to} is no format that can be written (it is {target.kind})")
    bad = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if bad:
        raise PlanError(f"the state dict holds values that are no tensors: {some(map(str, bad))}")
    hollow = [key for key, value in state_dict.items() if value.layout is not torch.strided or value.is_meta]
    if hollow:
        raise PlanError(f"tensors that are sparse, or on the meta device, cannot be rewritten: {some(hollow)}")
    facts = checked_facts(facts)
    lazy = {
        key: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value.detach())  # type: ignore[misc]
        for key, value in state_dict.items()
    }
    unwrapped = unwrap(lazy, known.containers, "the state dict")
    found = detect(known, layouts_of(unwrapped.tensors), wanted, facts)
    now = to_hub(found, facts)
    now.faults += incomplete(found.mapping, now.rules, now.source_keys)
    _bring(known, now, target)
    if target.kind == "format":
        from_hub(known.hub, target, now, facts)
    faults = [fault.text for fault in now.faults]
    if now.unowned:
        faults.append(f"{len(now.unowned)} keys have no place in {to}: {some(now.unowned)}")
    if faults:
        raise PlanError(f"the state dict (format {found.mapping.name}) cannot be written as {to}", faults)

    def read(key: str) -> torch.Tensor:
        return unwrapped.tensors[key].read()

    wrong = failed(now.checks, read)
    if wrong:
        raise VerifyError(f"the state dict cannot be written as {to}", [text for _, text in wrong])
    return {key: _written(target, key, layout, read) for key, layout in now.tensors.items()}


def _bring(known: Catalogue, now: Translated, target: Format) -> None:
    """Bring each tower to a layout of the target; of the hub, to the one that it is written in."""
    for tower in known.hub.layouts:
        if target.kind == "bridge":
            wanted: tuple[str, ...] = (target.between[1],) if tower == target.tower else ()
        elif target.kind == "hub":
            here, there = tower_layout(known.hub, tower, now.tensors), known.hub.written_as.get(tower)
            wanted = (there,) if here and there and known.path(tower, here, there) else ()
        else:
            wanted = target.layouts.get(tower, ())
        bring_to_layouts(known, now, {tower: wanted})


def _written(target: Format, key: str, layout: Layout, read: Read) -> torch.Tensor:
    """One tensor of the result, in the dtype and shape that the format fixes for it."""
    value: torch.Tensor | None = None
    if layout.copied_whole:
        original = read(layout.sources[0])
        if original.numel() == layout.pieces[0].numel:
            value = original.reshape(layout.shape)
    if value is None:
        value = materialise(layout, read)
    dtype = next((name for side, name in target.dtypes if side.match(key) is not None), None)
    shape = next((shape for side, shape in target.shapes if side.match(key) is not None), None)
    if dtype is not None:
        value = value.to(getattr(torch, dtype))
    return value.reshape(shape) if shape is not None and value.numel() == 1 else value
