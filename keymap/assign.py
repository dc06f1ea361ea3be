"""Handing a file's tensors over to a model, where they need no memory of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from keymap.carry import Tensors, value_of
from keymap.errors import LoadError, PlanError, some
from keymap.load import files_of, refuse_copies
from keymap.model import modules_of
from keymap.plan import Entry, Plan

__all__ = ["assign_plan", "refuse_unassignable"]


class _Regions:
    """Memory that was handed over; no two tensors of the model may come to share any of it."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, int]] = []  # (first byte, byte after the last), in order, apart from each other

    def add(self, tensor: torch.Tensor) -> bool:
        """Take the memory of a contiguous tensor; False where some of it was taken before."""
        first = tensor.data_ptr()
        last = first + tensor.nbytes
        at = bisect_left(self.ends, (first, last))
        before = at > 0 and self.ends[at - 1][1] > first
        if before or (at < len(self.ends) and self.ends[at][0] < last):
            return False
        self.ends.insert(at, (first, last))
        return True


def _onto(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """One tensor on a device, straight from where it lies: the place for staging in pinned memory."""
    return value.to(device)


@torch.no_grad()
def assign_plan(
    plan: Plan, tensors: Tensors, model: nn.Module, targets: Mapping[str, torch.Tensor], device: torch.device
) -> list[str]:
    """Hand tensors over to the model instead of copying into its memory.

    A tensor that needs no operation is the file's own, mapped privately: training writes to a copy of its page,
    never to the file. The others are made one after the other: new memory comes no faster to several threads.

    Returns:
        The keys of the tensors that had to be made in memory of their own.

    Raises:
        LoadError: there is no memory for them, here or on the device; nothing was changed.
    """
    handed = _Regions()
    given: dict[str, torch.Tensor] = {}
    entries = sorted(plan.entries, key=lambda entry: _position(entry, tensors))
    for entry in entries:
        value = _as_it_is(entry, tensors)
        if value is not None and handed.add(value):
            given[entry.key] = value.view(entry.shape)
    others = [entry for entry in entries if entry.key not in given]
    try:
        given |= {entry.key: value_of(entry, tensors) for entry in others}
        new: dict[int, torch.Tensor] = {id(targets[key]): _onto(device, value) for key, value in given.items()}
    except (RuntimeError, MemoryError) as error:
        raise LoadError(f"{plan.file}: {type(error).__name__} ({error}); nothing was changed") from error
    for file in files_of(tensors):
        file.unchanged()
    modules = modules_of(model)
    swaps: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
    for holder in (held for module in modules.values() for held in (module._parameters, module._buffers)):
        for name, old in holder.items():
            if old is None or id(old) not in new:
                continue
            value = new[id(old)]
            if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):  # once for tied parameters
                value = new[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            swaps.append((holder, name, old, value))
    for path, buffer in _absent_buffers(modules, targets):
        owner, _, name = path.rpartition(".")
        swaps.append((modules[owner]._buffers, name, buffer, causal_mask(buffer, device)))
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


def _as_it_is(entry: Entry, tensors: Tensors) -> torch.Tensor | None:
    """The file's own tensor where it is what the model needs, element by element and in order; else None."""
    layout = entry.layout
    if not layout.copied_whole or entry.resize is not None or layout.pieces[0].source is None:
        return None
    lazy = tensors[layout.pieces[0].source]
    count = prod(lazy.shape)
    if lazy.dtype != entry.dtype or count != layout.pieces[0].numel:
        return None
    block = lazy.values_alone
    value = lazy.read() if block is None else block.mapped(lazy.dtype, count)
    return value if value.is_contiguous() else None


def _absent_buffers(
    modules: Mapping[str, nn.Module], stored: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """Buffers on the meta device that no state dict holds, by dotted path."""
    known = {id(value) for value in stored.values()}
    return [
        (f"{path}.{name}".removeprefix("."), buffer)
        for path, module in modules.items()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and id(buffer) not in known
    ]


def causal_mask(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An additive causal mask, (length, length): 0 on and below the diagonal, -inf above."""
    return torch.full(like.shape, float("-inf"), dtype=like.dtype, device=device).triu_(1)


def refuse_unassignable(
    model: nn.Module, targets: Mapping[str, torch.Tensor], plan: Plan, masks: Collection[str], device: torch.device
) -> None:
    """What handing tensors over would leave without values.

    Args:
        targets: the model's tensors by key.
        masks: names of buffers that are causal masks, which can be made anew.

    Raises:
        PlanError: the device is meta, tensors of the model on the meta device would get no values, or a hook gives
            copies of the model's tensors.
    """
    refuse_copies(model, targets, plan)
    if device.type == "meta":
        raise PlanError(f"{plan.file}: device='meta' holds no values; name the device that the model is to use")
    lost = [path for path, _ in _absent_buffers(modules_of(model), targets) if path not in masks]
    written = {entry.key for entry in plan.entries}
    lost += [key for key, target in targets.items() if target.is_meta and key not in written]
    if lost:
        raise PlanError(
            f"{plan.file}: tensors of the model are on the meta device, and the load gives them no values: "
            f"{some(lost)}; build the model on a real device"
        )
