"""The last checks before a load: what it would write to, and the few values that a plan lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from keymap.errors import PlanError, VerifyError, some
from keymap.language.layout import Layout
from keymap.language.rules import Check
from keymap.load.casts import narrows, too_large
from keymap.load.copying import Read, Tensors, materialise
from keymap.load.shared import Region, lie_apart, overlapping, refuse_distributed, refuse_subclasses, refuse_uncopyable
from keymap.load.threads import Tasks, on_threads
from keymap.plan.model import ModelView, has_memory
from keymap.plan.plan import Plan

_MAX_MEASURED = 1 << 20  # elements of a tensor whose difference is measured

__all__ = ["checked_device", "failed_checks", "refuse_unassignable", "refuse_unwritable", "verify_plan"]


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        PlanError: torch cannot allocate on it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # for example ModuleNotFoundError for a device whose backend is not installed
        raise PlanError(f"device={device!r}: torch cannot use this device: {error}") from None
    return found


# --- values ---


def failed_checks(checks: Iterable[Check], read: Read) -> list[tuple[Check, str]]:
    """The checks that fail, each with a sentence for the error. Only their tensors are read."""
    failed = []
    for check in checks:
        tensor = materialise(check.layout, read)
        expected, name = _expected(check, tensor, read)
        if tensor.shape == expected.shape and bool((tensor == expected).all()):
            continue
        found = _difference(tensor, expected)
        failed.append((check, f"{check.key} must hold {name}, because {check.why}; {found}"))
    return failed


def _expected(check: Check, tensor: torch.Tensor, read: Read) -> tuple[torch.Tensor, str]:
    """The value that a check requires, and its name."""
    if isinstance(check.value, Layout):
        return materialise(check.value, read), "the same values as the tensor it repeats"
    if check.value == "eye":
        square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
        identity = torch.eye(*tensor.shape, dtype=tensor.dtype, device=tensor.device) if square else tensor.new_empty(0)
        return identity, "the identity matrix"
    value = torch.tensor(float(check.value), device=tensor.device).to(tensor.dtype)
    everywhere = torch.broadcast_to(value, tensor.shape)  # takes the memory of one element
    return everywhere, f"{check.value:g} everywhere"


def _difference(tensor: torch.Tensor, expected: torch.Tensor) -> str:
    if tensor.shape != expected.shape:
        return f"its shape is {list(tensor.shape)}"
    if tensor.numel() > _MAX_MEASURED:
        return "its values differ"
    return f"its values differ by up to {float((tensor.double() - expected.double()).abs().max()):.3g}"


def verify_plan(plan: Plan, tensors: Tensors, strict: bool) -> list[Check]:
    """Read what must be verified before anything is written: the plan's checks, and members that have a checksum.

    Returns:
        The checks that fail, for a load that is not strict; their keys are then unexpected.

    Raises:
        VerifyError: a check fails, under strict; or a value does not fit the dtype of the model's tensor.
        CheckpointError: a member is corrupt.
    """
    failed = failed_checks(plan.checks, lambda key: tensors[key].read())
    if failed and strict:
        raise VerifyError(
            f"{plan.file} (format {plan.format}) does not fit the model; nothing was changed",
            [*(text for _, text in failed), "to load the rest and report these keys, pass strict=False"],
        )
    _refuse_too_large(plan, tensors)
    used = {piece.source for entry in plan.entries for piece in entry.layout.pieces}
    lazy = sorted((tensors[source] for source in used if source is not None), key=lambda one: one.position)
    checksums = {id(one.values): check for one in lazy if (check := one.check) is not None}  # several share a member
    if checksums:

        def verify(pool: Tasks) -> None:  # zlib releases the interpreter's lock
            for task in [pool.submit(check) for check in checksums.values()]:
                task.result()

        on_threads(verify)
    return [check for check, _ in failed]


def _refuse_too_large(plan: Plan, tensors: Tensors) -> None:
    """Read what is cast to a narrower dtype, and refuse values that would become infinite."""
    faults = []
    for entry in (entry for entry in plan.entries if entry.casts):
        for source in entry.layout.sources:
            lazy = tensors[source]
            fault = too_large(lazy.read(), entry.dtype) if narrows(lazy.dtype, entry.dtype) else ""
            if fault:
                faults.append(f"{source}: {fault} of the model's {entry.key}")
    if faults:
        raise VerifyError(
            f"{plan.file} (format {plan.format}) does not fit the model; nothing was changed",
            [*faults, "load into a model of a wider dtype, for example model.float()"],
        )


# --- the model's memory ---


def refuse_unwritable(view: ModelView, plan: Plan) -> None:
    """Refuse a model that a copying load cannot write to.

    Raises:
        PlanError: a tensor of the plan is distributed, on the meta device, expanded, made in inference mode, a copy
            that a hook returns, of a class that takes no copy, or overlaps another one in part.
    """
    refuse_distributed(view, plan)
    _refuse_copies(view, plan)
    refuse_uncopyable(view, plan)
    on_meta, expanded, frozen = list[str](), list[str](), list[str]()
    spans: list[tuple[int, int, str]] = []
    inference = torch.is_inference_mode_enabled()
    for entry in plan.entries:
        key, target = entry.key, view.tensors[entry.key]
        if target.is_meta:
            on_meta.append(key)
            continue
        if not inference and target.is_inference():
            frozen.append(key)
        if not target.is_contiguous():
            expanded += [key] * _overlaps_itself(target)
        elif target.numel() and has_memory(target):
            spans.append((target.data_ptr(), target.nbytes, key))
    if on_meta:
        raise PlanError(
            f"{plan.file}: {len(on_meta)} of the model's tensors are on the meta device and have no memory "
            f"({some(on_meta)}); pass assign=True, or call model.to_empty(device='cpu') first"
        )
    pairs: list[str] = []
    if not lie_apart(spans):
        regions = (Region(0, start, start + size, key) for start, size, key in spans)
        pairs = [f"{one.key} and {other.key}" for one, other in overlapping(regions)]
    if pairs:
        raise PlanError(
            f"{plan.file}: tensors of the model share a part of their memory: {some(pairs)}; clone them first"
        )
    if expanded or frozen:
        what = "are expanded or overlapping views" if expanded else "were made under torch.inference_mode"
        raise PlanError(
            f"{plan.file}: tensors of the model {what} and cannot be written to: {some(expanded or frozen)}; "
            f"pass assign=True, or clone them first"
        )


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """True where two elements may share one address."""
    reach = 0
    for step, length in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (length - 1)
    return False


def refuse_unassignable(
    view: ModelView, plan: Plan, masks: Collection[str], device: torch.device, shared: Collection[int] = ()
) -> None:
    """Refuse a model that would keep tensors without values after ``assign=True``.

    Args:
        view: the model.
        plan: what will be assigned.
        masks: names of buffers that are causal masks, which can be made anew.
        device: where the tensors go.
        shared: ids of tensors that get the memory of another one.

    Raises:
        PlanError: the device is meta, tensors of the model on the meta device would get no values, a hook returns
            copies of the model's tensors, or tensors are of a subclass.
    """
    refuse_distributed(view, plan)
    _refuse_copies(view, plan)
    refuse_subclasses(view, plan)
    if device.type == "meta":
        raise PlanError(f"{plan.file}: device='meta' cannot hold values; pass the device that the model will use")
    empty = [path for path in view.unsaved_meta_buffers if path not in masks]
    filled = {*(id(view.tensors[entry.key]) for entry in plan.entries), *shared}  # one tensor may have several keys
    empty += [key for key, target in view.tensors.items() if target.is_meta and id(target) not in filled]
    if empty:
        raise PlanError(
            f"{plan.file}: tensors of the model are on the meta device, and the checkpoint has no values for them: "
            f"{some(empty)}; build the model on a real device"
        )


def _refuse_copies(view: ModelView, plan: Plan) -> None:
    """Refuse a model whose state dict holds copies, to which a load would have no effect.

    Raises:
        PlanError: a tensor of the plan belongs to no module.
    """
    copies = [entry.key for entry in plan.entries if id(view.tensors[entry.key]) not in view.own]
    if copies:
        raise PlanError(
            f"{plan.file}: model.state_dict() returns copies instead of the model's own tensors (a hook?), so the "
            f"load would have no effect: {some(copies)}; load into the model without the hook"
        )
