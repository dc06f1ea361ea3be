"""A state dict in memory, from one format to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial

import torch
from torch.nn.parameter import is_lazy

from keymap.errors import DetectionError, MappingError, PlanError, VerifyError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.load.copying import Read, materialise
from keymap.load.preflight import failed_checks
from keymap.plan.completeness import incomplete
from keymap.plan.from_hub import from_hub
from keymap.plan.model import has_memory
from keymap.plan.planner import keep_towers
from keymap.plan.request import checked_facts, checked_wrapper, request_for_towers
from keymap.plan.rule_faults import with_lacking_facts_once
from keymap.plan.to_hub import Translated, bring_to_layouts, to_hub
from keymap.read import LazyTensor
from keymap.read.lazy import brief
from keymap.source.detect import ambiguous, tower_layout
from keymap.source.open import Opened, PathLike, Source, catalogue_with, open_tree

__all__ = ["convert_state_dict"]


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    to: str,
    *,
    mapping: PathLike | None = None,
    wrapper: str | None = None,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Rewrite a state dict in memory, from any known format to another.

    Args:
        state_dict: tensors by key; it is not changed.
        to: the name of a format; or of a bridge, which gives the hub's keys with that tower in the second
            layout. For example, ``open_clip`` writes ``text.*`` as CustomTextCLIP has it, ``open_clip_flat`` writes
            the text tower without ``text.``, as CLIP has it.
        mapping: the name of the source format, or the path of a YAML file; None detects the format.
        wrapper: which state dict within it to convert, for example ``"model.vision_tower"``.
        towers: convert only these towers, for example ``("image",)``.
        facts: settings that shapes cannot show and the target's shapes need, for example
            ``{"image.heads": 12, "text.heads": 8}``. One that contradicts the shapes is refused.

    Returns:
        A new dict. Tensors that are only renamed are the caller's own; the others are new and contiguous.

    Raises:
        KeymapError: the source is incomplete, a key has no place in the target, or a fact is missing.
    """
    known, wanted, target = _checked(state_dict, to, mapping)
    facts = checked_facts(facts, known)
    lazy = {
        key: LazyTensor(tuple(value.shape), value.dtype, partial(_values, value)) for key, value in state_dict.items()
    }
    source = _source_of(open_tree(known, wanted, lazy, checked_wrapper(wrapper), facts))
    found, unwrapped = source.found, source.unwrapped
    assert found is not None, "a source without a format is refused"
    translated = to_hub(found, facts)
    keep_towers(translated, request_for_towers(towers, known.hub), known.hub)
    translated.faults += incomplete(found.mapping, translated.rules, translated.source_keys, known.hub.optional_buffers)
    for tower in known.hub.layouts:
        bring_to_layouts(known, translated, {tower: _target_layouts(known, translated, target, tower)})
    if target.kind == "format":
        from_hub(known.hub, target, translated, facts)
    faults = [fault.text for fault in with_lacking_facts_once(translated.faults)]
    if translated.unowned:
        count = len(translated.unowned)
        have = "key has" if count == 1 else "keys have"
        faults.append(f"{count} {have} no place in {to}: {some(translated.unowned)}")
    if faults:
        raise PlanError(f"the state dict (format {found.mapping.name}) cannot be written as {to}", faults)

    def read(key: str) -> torch.Tensor:
        return unwrapped.tensors[key].read()

    failed = failed_checks(translated.checks, read)
    if failed:
        raise VerifyError(f"the state dict cannot be written as {to}", [text for _, text in failed])
    return {key: _written(target, key, layout, read) for key, layout in translated.tensors.items()}


def _source_of(opened: Opened) -> Source:
    """The one reading of a state dict.

    Raises:
        DetectionError: no format matches it, or several do; the message names the state dicts within it.
    """
    if len(opened.top) > 1:
        raise ambiguous([source.found for source in opened.top if source.found is not None], opened.file)
    if opened.top[0].found is not None:
        return opened.top[0]
    alone = [group[0] for group in opened.inner if not group[0].unwrapped.outside]
    if len(alone) == 1 and not opened.top[0].refused:
        return alone[0]
    error = opened.top[0].refusal
    assert error is not None, "a source without a format has a reason"
    names = ", ".join(repr(group[0].unwrapped.wrapper) for group in opened.inner)
    raise DetectionError(
        error.summary, [*error.faults, *([f"it holds state dicts at {names}: pass one as wrapper="] if names else [])]
    )


def _checked(
    state_dict: Mapping[str, torch.Tensor], to: str, mapping: PathLike | None
) -> tuple[Catalogue, str | None, Format]:
    """The mappings, the name of the source's format if the caller gives one, and the target."""
    if not isinstance(state_dict, Mapping) or not isinstance(to, str):
        raise PlanError(
            f"expected a dict of tensors and the name of a format, not {type(state_dict).__name__} and {to!r}"
        )
    known, wanted = catalogue_with(mapping)
    targets = sorted(name for name, mapping in known.mappings.items() if mapping.rules)
    if to not in known.mappings:
        near = get_close_matches(to[:80], targets, 1, 0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(targets)}"
        raise MappingError(f"there is no format {to!r} to convert to; {hint}")
    target = known.get(to)
    if not target.rules:
        raise MappingError(f"{to} (kind {target.kind}) has no rules and cannot be written; pass the name of a format")
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
    return known, wanted, target


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


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its history, conjugated and negated where it says so."""
    return tensor.detach().resolve_conj().resolve_neg()


def _target_layouts(known: Catalogue, translated: Translated, target: Format, tower: str) -> Iterable[str]:
    """The layouts of a tower that the target has; of the hub, the one that it is written in."""
    if target.kind == "bridge":
        return (target.between[1],) if tower == target.tower else ()
    if target.kind != "hub":
        return target.layouts.get(tower, ())
    layout, written = tower_layout(known.hub, tower, translated.tensors), known.hub.written_as.get(tower)
    return (written,) if layout and written and known.path(tower, layout, written) else ()


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
