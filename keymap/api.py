"""The public functions: read → unwrap → detect → plan → verify → load → report."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from keymap.errors import ConfigurationWarning, printable
from keymap.load.assign import assign_plan
from keymap.load.execute import load_plan
from keymap.load.hooks import call_post_hooks, refuse_hooks
from keymap.load.preflight import checked_device, refuse_unassignable, refuse_unwritable, verify_plan
from keymap.load.progress import Progress
from keymap.load.shared import sharing
from keymap.plan.allowed import check_missing_patterns
from keymap.plan.choose import choose, choose_for_towers
from keymap.plan.collecting import without_gc
from keymap.plan.describe import Described, by_likeness, configurations_for, describe, found_towers, text_of
from keymap.plan.join import Chosen
from keymap.plan.model import ModelView, state_of, view_model
from keymap.plan.plan import Plan, dtype_name, without_failed
from keymap.plan.request import Request, check_model, checked_flag, checked_wrapper, checked_wrappers, make_request
from keymap.plan.to_hub import to_hub
from keymap.results import Inspection, LoadResult, Report
from keymap.source.detect import ambiguous
from keymap.source.hubs import Asked, PathLike, ask, ask_each
from keymap.source.open import open_in_each, open_source
from keymap.source.opened import Opened, Source

__all__ = ["inspect_checkpoint", "load_checkpoint", "plan_load"]


def _open(
    path: PathLike, weights_only: bool, asked: Asked, wrapper: str | Mapping[str, str] | None
) -> list[tuple[str, Opened]]:
    """What to load from: one state dict for all towers, whose name here is "", or one for each tower."""
    chosen = checked_wrappers(wrapper, asked.known.hub) if wrapper is not None else None
    if not isinstance(chosen, dict):
        return [("", open_source(path, weights_only, asked, chosen))]
    return [(tower, open_source(path, weights_only, asked, name)) for tower, name in chosen.items()]


def _choose(opened: Sequence[tuple[str, Opened]], model: ModelView, request: Request) -> Chosen:
    check_missing_patterns(request.allow_missing, model)
    tower, first = opened[0]
    return choose_for_towers(dict(opened), model, request) if tower else choose(first, model, request)


# long: signature and docstring; the body is the steps in order
@without_gc()
def load_checkpoint(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | Mapping[str, str] | None = None,
    source_grid: tuple[int, int] | None = None,
    assign: bool = False,
    facts: Mapping[str, int] | None = None,
    allow_missing: Sequence[str] | str = (),
    allow_unexpected: Sequence[str] | str = (),
    progress: Progress | None = None,
    hub: str | None = None,
) -> LoadResult:
    """Load a checkpoint of any known format into a model.

    Args:
        model: a model whose keys a hub knows, such as OpenCLIP's CLIP, CustomTextCLIP and CoCa; any module, if the file
            has its names, or with a mapping file that leads to them.
        checkpoint_path: a .pt, .pth, .bin, .safetensors or .npz file, an index of shards, or a folder. Files are
            recognised by their content.
        strict: every key of the model must be filled, and every key of the file must be used or known to hold no
            weights. ``False`` loads what fits and reports the rest; it still refuses when less than a tenth of a
            tower in the file would load.
        weights_only: refuse a pickle that needs anything but tensors and plain data.
        device: where tensors go with ``assign=True``. Without it the tensors stay where the model has them.
        mapping: the name of the source format, or the path of a YAML file; None detects the format.
        towers: load only these towers, for example ``("image",)`` or ``("text",)``; ``strict`` applies within them.
        wrapper: which state dict of the file to load, for example ``"state_dict_ema"`` or ``"model.vision_tower"``; or
            one for each tower: ``{"image": "image_encoder", "text": "text_encoder"}``. None finds what fits the model.
        source_grid: (h, w) of the file's position embedding, in patches. Needed where neither the file nor its
            configuration shows it.
        assign: use the file's tensors directly and allocate only those that need converting. This makes a model on
            the meta device usable. The model then reads from the file for as long as it lives: do not overwrite
            the file in place (save to another name, then rename), or the process may be killed.
        facts: settings that shapes cannot show, for example ``{"image.heads": 12}``; most are read from the model. A
            name that does not exist, and a value that contradicts the model or the file, is refused.
        allow_missing: keys of the model that may be missing under strict, or patterns of them as `fnmatch` reads them,
            for example ``("text_projection",)``. They keep their values.
        allow_unexpected: keys of the file that may be unexpected under strict, or patterns, for example
            ``("classifier.*",)``.
        progress: called in this thread with the bytes of the model's tensors that are done, and with their bytes in
            all: first ``(0, total)``, last ``(total, total)``, never with fewer bytes than before. An exception that
            it raises ends the load; after the first call the model may then be half loaded, and the error says so.
        hub: the name of the model's hub; None finds it by the model's keys.

    Returns:
        The missing and unexpected keys, and ``.report``. It unpacks to the two lists.

    Raises:
        KeymapError: the load is refused (see its subclasses). The model is then bit for bit what it was.
    """
    start = time.perf_counter()
    check_model(model)
    strict, assign = checked_flag("strict", strict), checked_flag("assign", assign)
    weights_only, target_device = checked_flag("weights_only", weights_only), checked_device(device)
    state = state_of(model)
    asked = ask(hub, mapping, model=state.tensors)
    opened = _open(checkpoint_path, weights_only, asked, wrapper)
    known, file = asked.known, opened[0][1].file
    request = make_request(known, file, strict, towers, source_grid, facts, allow_missing, allow_unexpected)
    view = view_model(model, known.hub, state)
    plan, tensors = _choose(opened, view, request)
    shared: Mapping[int, str] = {}
    if assign:
        shared = sharing(view, plan)
        refuse_unassignable(view, plan, known.hub.causal_masks, target_device, shared)
    else:
        refuse_unwritable(view, plan)
    refuse_hooks(view, plan, strict)
    failed = verify_plan(plan, tensors, strict)
    if failed:
        plan = without_failed(plan, failed)
    for difference in plan.warnings:  # before anything is written: a filter may turn them into errors
        warnings.warn(printable(f"{plan.file}: {difference}"), ConfigurationWarning, stacklevel=3)  # past the decorator
    allocated: list[str] = []
    if assign:
        allocated = assign_plan(plan, tensors, view, target_device, shared, progress)
    else:
        load_plan(plan, tensors, view.tensors, progress)
    result = LoadResult(Report(plan, time.perf_counter() - start, tuple(allocated)))
    call_post_hooks(view, result.missing_keys, result.unexpected_keys, plan.file)
    return result


@without_gc()
def plan_load(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | Mapping[str, str] | None = None,
    source_grid: tuple[int, int] | None = None,
    facts: Mapping[str, int] | None = None,
    weights_only: bool = True,
    allow_missing: Sequence[str] | str = (),
    allow_unexpected: Sequence[str] | str = (),
    hub: str | None = None,
) -> Plan:
    """A dry run of `load_checkpoint`: the plan, made from names, shapes and dtypes alone.

    The arguments are those of `load_checkpoint`. The model may be on the meta device.

    Returns:
        The plan, with ``.pieces``, ``.missing_keys``, ``.unexpected_keys`` and ``.explain(key=None)``.

    Raises:
        KeymapError: as the load would, apart from values that only the load reads and memory that only it writes.
    """
    check_model(model)
    strict, weights_only = checked_flag("strict", strict), checked_flag("weights_only", weights_only)
    state = state_of(model)
    asked = ask(hub, mapping, model=state.tensors)
    opened = _open(checkpoint_path, weights_only, asked, wrapper)
    known, file = asked.known, opened[0][1].file
    request = make_request(known, file, strict, towers, source_grid, facts, allow_missing, allow_unexpected)
    return _choose(opened, view_model(model, known.hub, state), request).plan


def _settings_of(source: Source, towers: Described) -> dict[str, Any]:
    """The settings of a source; of a part of a larger file not those of towers that it does not have."""
    others = source.known.hub.layouts.keys() - towers.keys() if source.unwrapped.outside else set[str]()
    return {name: v for name, v in source.settings.to_dict().items() if name.partition(".")[0] not in others}


@without_gc()
def inspect_checkpoint(
    path: PathLike, *, weights_only: bool = True, wrapper: str | None = None, hub: str | None = None
) -> Inspection:
    """What a checkpoint is: container, format, wrappers, keys. No weights are read.

    A file of an unknown format is not an error: ``.format`` is None, and ``.evidence`` holds the reasons.

    Args:
        path: as ``checkpoint_path`` of `load_checkpoint`.
        weights_only: as in `load_checkpoint`.
        wrapper: which state dict of the file.
        hub: the name of the hub whose formats are tried; None tries those of all hubs. If formats of several hubs match
            the file, the one that explains most of its keys is reported, and the notes name the others.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    safe, chosen = checked_flag("weights_only", weights_only), checked_wrapper(wrapper)
    opened, *further = by_likeness(open_in_each(path, safe, ask_each(hub), chosen))
    source, others = opened.top[0], opened.inner
    refusal = source.refusal
    if source.found is None and not source.refused and others:
        source, others = others[0][0], others[1:]
    unwrapped, found = source.unwrapped, source.found
    if len(opened.top) > 1:
        found, refusal = None, ambiguous([one.found for one in opened.top if one.found is not None], opened.file)
    tensors = {key: (lazy.shape, lazy.dtype) for key, lazy in unwrapped.tensors.items()}
    evidence: tuple[str, ...] = ()
    towers: Described = {}
    if found is not None:
        evidence, towers = found.evidence, describe(source.known, to_hub(found, source.settings.numbers).tensors)
    elif refusal is not None:
        evidence = (refusal.summary, *refusal.faults)
    return Inspection(
        path=source.file,
        container=source.container,
        format=found.mapping.name if found is not None else None,
        evidence=evidence,
        wrapper=unwrapped.wrapper,
        other_wrappers=tuple(
            name for name in dict.fromkeys((*unwrapped.others, *(o[0].unwrapped.wrapper for o in others))) if name
        ),
        prefixes=unwrapped.prefixes,
        towers=towers,
        configurations=configurations_for(source.known, towers),
        tensors=tensors,
        dtypes=dict(Counter(dtype_name(dtype) for _, dtype in tensors.values())),
        config_hints={**_settings_of(source, towers), **dict.fromkeys(source.settings.notes, "")},
        notes=(*source.notes, *unwrapped.remarks, *(f"also read as {text_of(other)}" for other in further)),
        parts=tuple(tower for one in (opened, *further) for tower in found_towers(one)),
        hub=source.known.hub.name if found is not None else None,
    )
