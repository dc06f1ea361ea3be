"""Handing a file's tensors over to a model, where they need no memory of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from keymap.errors import LoadError, PlanError, some
from keymap.load.copying import Tensors, value_of
from keymap.load.execute import files_of, refuse_copies
from keymap.plan.model import ModelView
from keymap.plan.plan import Entry, Plan
from keymap.read import LazyTensor

__all__ = ["assign_plan", "refuse_unassignable"]


def _onto(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """One tensor on a device, straight from where it lies: the place for staging in pinned memory."""
    return value.to(device)


@torch.no_grad()
def assign_plan(plan: Plan, tensors: Tensors, view: ModelView, device: torch.device) -> list[str]:
    """Hand tensors over to the model instead of copying into its memory.

    A tensor that needs no operation is the file's own, mapped privately: training writes to a copy of its page,
    never to the file. The others are made one after the other: new memory comes no faster to several threads.

    Returns:
        The keys of the tensors that had to be made in memory of their own.

    Raises:
        LoadError: there is no memory for them, here or on the device; nothing was changed.
    """
    given = _as_they_are(plan, tensors)
    others = sorted((e for e in plan.entries if e.key not in given), key=lambda entry: _position(entry, tensors))
    try:
        given |= {entry.key: value_of(entry, tensors) for entry in others}
        new: dict[int, torch.Tensor] = {id(view.tensors[key]): _onto(device, value) for key, value in given.items()}
    except (RuntimeError, MemoryError) as error:
        raise LoadError(f"{plan.file}: {type(error).__name__} ({error}); nothing was changed") from error
    for file in files_of(tensors):
        file.check_unchanged()
    swaps: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
    for holder in (held for module in view.modules.values() for held in (module._parameters, module._buffers)):
        for name, old in holder.items():
            if old is None or id(old) not in new:
                continue
            value = new[id(old)]
            if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):  # once for tied parameters
                value = new[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            swaps.append((holder, name, old, value))
    for path, buffer in _absent_buffers(view):
        owner, _, name = path.rpartition(".")
        swaps.append((view.modules[owner]._buffers, name, buffer, causal_mask(buffer, device)))
    _swap(swaps)
    return [entry.key for entry in others]


def _swap(swaps: Sequence[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]) -> None:
    """Put new tensors (holder, name, old, new) into modules: all, or none where an interrupt comes between."""
    try:
        for holder, name, _, new in swaps:
            holder[name] = new
    except BaseException:
        for holder, name, old, _ in swaps:
            holder[name] = old
        raise


def _position(entry: Entry, tensors: Tensors) -> int:
    """Where the file has the first of what an entry is made of; a deflated member is read once when all is in order."""
    source = entry.layout.pieces[0].source if entry.layout.pieces else None
    return tensors[source].position if source is not None else -1


def _as_they_are(plan: Plan, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The file's own tensors, by the model's keys that need them element by element and in order.

    No two tensors of the model may come to share any memory, so of those that overlap the first is handed over.
    """
    fitting: list[tuple[int, int, Entry, LazyTensor]] = []
    for number, entry in enumerate(plan.entries):
        lazy = _as_it_is(entry, tensors)
        if lazy is not None:
            fitting.append((lazy.position, number, entry, lazy))
    mapped: list[tuple[int, int, Entry, torch.Tensor]] = []
    for _, number, entry, lazy in sorted(fitting):  # so that what must be inflated is inflated once
        block = lazy.contiguous_block
        value = lazy.read() if block is None else block.mapped(lazy.dtype, prod(lazy.shape))
        if value.is_contiguous():
            mapped.append((value.data_ptr(), number, entry, value))
    given: dict[str, torch.Tensor] = {}
    end = 0
    for first, _, entry, value in sorted(mapped):
        if first >= end:
            given[entry.key] = value.view(entry.shape)
            end = first + value.nbytes
    return given


def _as_it_is(entry: Entry, tensors: Tensors) -> LazyTensor | None:
    """The file's tensor where it is what the model needs; else None."""
    layout = entry.layout
    source = layout.pieces[0].source if layout.copied_whole and entry.resize is None else None
    lazy = tensors[source] if source is not None else None
    if lazy is None or lazy.dtype != entry.dtype or prod(lazy.shape) != layout.pieces[0].numel:
        return None
    return lazy


def _absent_buffers(view: ModelView) -> list[tuple[str, torch.Tensor]]:
    """Buffers on the meta device that no state dict holds, by dotted path."""
    known = set(map(id, view.tensors.values()))
    return [
        (f"{path}.{name}".removeprefix("."), buffer)
        for path, module in view.modules.items()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and id(buffer) not in known
    ]


def causal_mask(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An additive causal mask, (length, length): 0 on and below the diagonal, -inf above."""
    return torch.full(like.shape, float("-inf"), dtype=like.dtype, device=device).triu_(1)


def refuse_unassignable(view: ModelView, plan: Plan, masks: Collection[str], device: torch.device) -> None:
    """What handing tensors over would leave without values.

    Args:
        masks: names of buffers that are causal masks, which can be made anew.

    Raises:
        PlanError: the device is meta, tensors of the model on the meta device would get no values, or a hook gives
            copies of the model's tensors.
    """
    refuse_copies(view, plan)
    if device.type == "meta":
        raise PlanError(f"{plan.file}: device='meta' holds no values; name the device that the model is to use")
    lost = [path for path, _ in _absent_buffers(view) if path not in masks]
    written = {entry.key for entry in plan.entries}
    lost += [key for key, target in view.tensors.items() if target.is_meta and key not in written]
    if lost:
        raise PlanError(
            f"{plan.file}: tensors of the model are on the meta device, and the load gives them no values: "
            f"{some(lost)}; build the model on a real device"
        )
