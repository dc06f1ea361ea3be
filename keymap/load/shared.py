"""Tensors of a model that are more than memory of their own: subclasses of torch.Tensor, and shared memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from keymap.errors import PlanError, some
from keymap.plan.model import ModelView, has_memory
from keymap.plan.plan import Plan

__all__ = [
    "Region",
    "lie_apart",
    "overlapping",
    "refuse_distributed",
    "refuse_subclasses",
    "refuse_uncopyable",
    "sharing",
]

_PLAIN_TYPES = (torch.Tensor, nn.Parameter)
_BEFORE = "load before fully_shard or distribute_module"
_RANK_0 = (
    "load on rank 0 into a model without them, and distribute it with "
    "torch.distributed.checkpoint.state_dict.set_model_state_dict"
)


# --- subclasses ---


def refuse_distributed(view: ModelView, plan: Plan) -> None:
    """Refuse a model whose tensors are distributed.

    Raises:
        PlanError: tensors of the plan are DTensors.
    """
    module = sys.modules.get("torch.distributed.tensor")  # a model with DTensors has imported it
    kind = getattr(module, "DTensor", None)
    if kind is None:
        return
    keys = [entry.key for entry in plan.entries if isinstance(view.tensors[entry.key], kind)]
    if keys:
        raise PlanError(
            f"{plan.file}: {len(keys)} of the model's tensors are DTensors ({some(keys)}), which keymap does not load "
            f"into; {_BEFORE}, or {_RANK_0}"
        )


def refuse_subclasses(view: ModelView, plan: Plan) -> None:
    """Refuse a model in which `assign=True` would replace a subclass by a plain tensor.

    Raises:
        PlanError: tensors of the plan are of another class than torch.Tensor and nn.Parameter.
    """
    kinds = {entry.key: type(view.tensors[entry.key]) for entry in plan.entries}
    keys = [f"{key} ({kind.__name__})" for key, kind in kinds.items() if kind not in _PLAIN_TYPES]
    if keys:
        raise PlanError(
            f"{plan.file}: {len(keys)} of the model's tensors are of a class that assign=True would replace by plain "
            f"tensors: {some(keys)}; pass assign=False, or load before they are converted"
        )


def refuse_uncopyable(view: ModelView, plan: Plan) -> None:
    """Refuse subclasses of tensors that take no copy of a plain tensor; tried on a new tensor of the same class.

    Raises:
        PlanError: the copy fails.
    """
    faults: list[str] = []
    for entry in plan.entries:
        target = view.tensors[entry.key]
        if type(target) in _PLAIN_TYPES or has_memory(target) or target.is_meta:
            continue
        try:
            with torch.no_grad():
                torch.empty_like(target).copy_(torch.zeros(entry.shape, dtype=entry.dtype, device="cpu"))
        except Exception as error:  # of code that keymap does not know
            faults.append(f"{entry.key} ({type(target).__name__}): {type(error).__name__}: {error}")
    if faults:
        raise PlanError(
            f"{plan.file}: tensors of the model take no copy of a plain tensor; load before they are converted", faults
        )


# --- shared memory ---


class Region(NamedTuple):
    """Memory of a tensor: its storage (0 for memory with an address), first and last byte, the key or path."""

    storage: int
    start: int
    stop: int
    key: str


class Held(NamedTuple):
    """A parameter or buffer of a model, its dotted path and its region."""

    tensor: torch.Tensor
    region: Region


def overlapping(regions: Iterable[Region]) -> Iterator[tuple[Region, Region]]:
    """Pairs that overlap, but are not the same; every region that overlaps another one is in some pair."""
    last: Region | None = None  # of those before, the one that ends last
    for region in sorted(regions):
        if last is not None and last.storage == region.storage:
            if region.start < last.stop and region[:3] != last[:3]:
                yield last, region
            if region.stop <= last.stop:
                continue
        last = region


def sharing(view: ModelView, plan: Plan) -> dict[int, str]:
    """The tensors over the memory of another one: by their id the key of the plan whose new tensor they share.

    Raises:
        PlanError: tensors share memory in part, or in another order of elements, so that new tensors cannot.
    """
    if _lie_apart(view):
        return {}
    written = {id(view.tensors[entry.key]): entry.key for entry in plan.entries}
    groups: dict[tuple[int, int, int], list[Held]] = {}
    for held in _held(view):
        groups.setdefault(held.region[:3], []).append(held)
    followers: dict[int, str] = {}
    places = {region for region, group in groups.items() if any(id(held.tensor) in written for held in group)}
    faults = [
        f"{one.key} and {other.key}"
        for one, other in overlapping(group[0].region for group in groups.values())
        if one[:3] in places or other[:3] in places
    ]
    for group in groups.values():
        leader = next((held for held in group if id(held.tensor) in written), None)
        if leader is None or len(group) == 1:
            continue
        for held in group:
            if held is leader:
                continue
            same = held.tensor.dtype == leader.tensor.dtype
            if same and held.tensor.is_contiguous() and leader.tensor.is_contiguous():
                followers[id(held.tensor)] = written[id(leader.tensor)]
            else:
                faults.append(f"{leader.region.key} and {held.region.key}")
    if faults:
        raise PlanError(
            f"{plan.file}: tensors of the model share memory in part or in another order, which assign=True cannot "
            f"keep: {some(faults)}; pass assign=False, or clone them first"
        )
    return followers


def _lie_apart(view: ModelView) -> bool:
    """True where a glance shows that no tensors share memory, as in nearly every model."""
    spans: list[tuple[int, int]] = []
    storages: list[int] = []
    for tensor in view.own.values():
        if type(tensor) not in _PLAIN_TYPES or not tensor.is_contiguous():
            return False
        if tensor.is_meta:
            storages.append(tensor.untyped_storage()._cdata)
        else:
            spans.append((tensor.data_ptr(), tensor.nbytes))
    return lie_apart([span for span in spans if span[1]]) and len(set(storages)) == len(storages)


def lie_apart(spans: Sequence[tuple[int, int] | tuple[int, int, str]]) -> bool:
    """True where memory, given by its first byte and its size, is in one of them only."""
    return all(one[0] + one[1] <= other[0] for one, other in pairwise(sorted(spans)))


def _held(view: ModelView) -> Iterator[Held]:
    """The plain tensors of a model that have elements, each once."""
    keys = {id(tensor): key for key, tensor in view.tensors.items()}
    seen: set[int] = set()
    for path, module in view.modules.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or type(tensor) not in _PLAIN_TYPES or not tensor.numel():
                continue
            seen.add(id(tensor))
            key = keys.get(id(tensor), f"{path}.{name}".removeprefix("."))
            yield Held(tensor, _region(tensor, key))


def _region(tensor: torch.Tensor, key: str) -> Region:
    size = tensor.dtype.itemsize
    span = (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * size
    if tensor.is_meta:  # its storage has no address
        start, storage = int(tensor.storage_offset()) * size, tensor.untyped_storage()._cdata
    else:
        start, storage = tensor.data_ptr(), 0
    return Region(storage, start, start + span, key)
