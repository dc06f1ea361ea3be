"""The public functions: one way through, read → unwrap → detect → plan → verify → load → report."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from keymap.errors import ConfigurationWarning, KeymapError, PlanError
from keymap.load.assign import assign_plan, refuse_unassignable
from keymap.load.execute import load_plan, refuse_unwritable, verify_plan
from keymap.plan.describe import Described, configurations_for, describe
from keymap.plan.model import ModelView, view_model
from keymap.plan.plan import Plan, Request, checked_facts
from keymap.plan.planner import make_plan
from keymap.plan.to_hub import to_hub
from keymap.results import Inspection, LoadResult, Report
from keymap.source.open import PathLike, Source, open_sources

__all__ = ["inspect_checkpoint", "load_checkpoint", "plan_load"]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's cyclic collector waits meanwhile.

    A plan is thousands of small objects, and none of them is garbage; to look at every object of a process that has
    imported torch and its relatives takes longer than the load of a model.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _request(
    file: str,
    strict: bool,
    towers: Sequence[str] | str | None,
    source_grid: Sequence[int] | None,
    facts: Mapping[str, int] | None,
) -> Request:
    grid = None
    if source_grid is not None:
        sizes = list(source_grid) if isinstance(source_grid, (tuple, list)) else []
        if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
            raise PlanError(f"source_grid={source_grid!r}: give (h, w), the rows and columns of patches")
        grid = (sizes[0], sizes[1])
    if not isinstance(towers, (str, tuple, list, set, type(None))):
        raise PlanError(f"towers={towers!r}: give a name or a tuple of names, as ('image',)")
    chosen = (towers,) if isinstance(towers, str) else tuple(towers) if towers is not None else None
    return Request(file, strict, chosen, grid, checked_facts(facts))


def _refuse_other(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = "; load into the model, not into its state dict" if isinstance(model, Mapping) else ""
        raise PlanError(f"the model is a {type(model).__name__}, no torch.nn.Module{hint}")


def _plan(sources: Sequence[Source], model: ModelView, request: Request) -> tuple[Plan, Source]:
    """The plan of the one state dict that fits the model.

    Raises:
        PlanError: none fits, or several do.
    """
    plans: list[tuple[Plan, Source]] = []
    errors: list[tuple[str, KeymapError]] = []
    for one in sources:
        try:
            plans.append((make_plan(one, model, request), one))
        except KeymapError as error:
            if len(sources) == 1:
                raise
            errors.append((one.unwrapped.wrapper, error))
    if len(plans) == 1:
        return plans[0]
    if plans:
        names = ", ".join(repr(one.unwrapped.wrapper) for _, one in plans)
        raise PlanError(f"{request.file}: {len(plans)} state dicts in it fit the model; pass wrapper=, one of {names}")
    faults = [
        f"wrapper={name!r}: {fault}" for name, error in errors for fault in (error.faults or (error.summary,))[:3]
    ]
    raise PlanError(f"{request.file}: none of the {len(sources)} state dicts in it fits the model", faults)


@_uncollected()
def load_checkpoint(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | None = None,
    source_grid: tuple[int, int] | None = None,
    assign: bool = False,
    facts: Mapping[str, int] | None = None,
) -> LoadResult:
    """Load a checkpoint of any known format into an OpenCLIP model.

    Args:
        model: a CLIP, CustomTextCLIP or CoCa model, or any module with their keys.
        checkpoint_path: a .pt, .pth, .bin, .safetensors, .npz file; what it is, its content tells.
        strict: every key of the model must be filled, and every key of the file used or known to carry no
            weights. ``False`` loads what fits and reports the rest; it still refuses when almost nothing
            (less than a tenth) of a tower in the file would load.
        weights_only: refuse a pickle that asks for anything but tensors and plain data.
        device: where tensors go with ``assign=True``; a copying load writes where the model's tensors are.
        mapping: name of the source format, or path of a YAML file; None detects it.
        towers: load only these: ``("image",)``, ``("text",)``; ``strict`` holds within them.
        wrapper: which state dict of the file to take, as ``"state_dict_ema"``.
        source_grid: (h, w) of the file's position embedding, in patches, where nothing tells it.
        assign: hand the file's tensors over instead of copying; makes a model on the meta device usable. The
            model then reads from the file for as long as it lives: do not overwrite the file in place (save to
            another name, then rename), or the process may be killed.
        facts: what no weight tells, as ``{"image.heads": 12}``.

    Returns:
        The keys left over, and ``.report``.

    Raises:
        KeymapError: the load is refused (see its subclasses). The model is then bit for bit what it was.
    """
    start = time.perf_counter()
    _refuse_other(model)
    try:
        target_device = torch.device(device)
        torch.empty(0, device=target_device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise PlanError(f"device={device!r} is no device that torch has here: {error}") from None
    found = open_sources(checkpoint_path, weights_only, mapping, wrapper)
    hub = found[0].known.hub
    view = view_model(model, hub)
    plan, source = _plan(found, view, _request(found[0].file, strict, towers, source_grid, facts))
    tensors = source.unwrapped.tensors
    if assign:
        refuse_unassignable(view, plan, hub.causal_masks, target_device)
    else:
        refuse_unwritable(view, plan)
    bad = verify_plan(plan, tensors, strict)
    if bad:
        lost = [source for check in bad for source in check.layout.sources]
        layouts = {id(check.layout) for check in bad}
        plan = replace(
            plan,
            entries=tuple(entry for entry in plan.entries if id(entry.layout) not in layouts),
            unexpected_keys=(*plan.unexpected_keys, *lost),
            dropped={key: why for key, why in plan.dropped.items() if key not in lost},
        )
    for difference in plan.warnings:  # before anything is written: a filter may make errors of them
        warnings.warn(f"{plan.file}: {difference}", ConfigurationWarning, stacklevel=3)  # past the decorator
    made: list[str] = []
    if assign:
        made = assign_plan(plan, tensors, view, target_device)
    else:
        load_plan(plan, tensors, view.tensors)
    return LoadResult(Report(plan, time.perf_counter() - start, tuple(made)))


@_uncollected()
def plan_load(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | None = None,
    source_grid: tuple[int, int] | None = None,
    facts: Mapping[str, int] | None = None,
    weights_only: bool = True,
) -> Plan:
    """A dry run of `load_checkpoint`: the plan, made from names, shapes and dtypes alone.

    The model may be on the meta device, as for a load with ``assign=True``.

    Returns:
        The plan, with ``.pieces``, ``.missing_keys``, ``.unexpected_keys`` and ``.explain(key=None)``.

    Raises:
        KeymapError: as the load would, apart from values that only the load reads and memory that only it writes.
    """
    _refuse_other(model)
    found = open_sources(checkpoint_path, weights_only, mapping, wrapper)
    view = view_model(model, found[0].known.hub)
    return _plan(found, view, _request(found[0].file, strict, towers, source_grid, facts))[0]


@_uncollected()
def inspect_checkpoint(path: PathLike, *, weights_only: bool = True, wrapper: str | None = None) -> Inspection:
    """What a checkpoint is: container, format, wrappers, keys. No weights are read.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    source, *others = open_sources(path, weights_only, None, wrapper)
    unwrapped, found = source.unwrapped, source.found
    tensors = {key: (lazy.shape, lazy.dtype) for key, lazy in unwrapped.tensors.items()}
    evidence: tuple[str, ...] = ()
    if source.refusal is not None:
        evidence = (source.refusal.summary, *source.refusal.faults)
    towers: Described = {}
    if found is not None:
        evidence, towers = found.evidence, describe(source.known, to_hub(found, {}).tensors)
    return Inspection(
        source.file,
        source.container,
        found.mapping.name if found is not None else None,
        evidence,
        unwrapped.wrapper,
        tuple(dict.fromkeys((*unwrapped.others, *(other.unwrapped.wrapper for other in others)))),
        unwrapped.prefixes,
        towers,
        configurations_for(source.known, towers),
        tensors,
        dict(Counter(str(dtype).removeprefix("torch.") for _, dtype in tensors.values())),
        {**source.settings.to_dict(), **dict.fromkeys(source.settings.notes, "")},
        (*source.notes, *unwrapped.notes),
    )
