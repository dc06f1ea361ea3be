"""``assign=True``: the model takes the file's tensors over, and only those that need converting are allocated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from keymap.errors import LoadError
from keymap.load.copying import Tensors, files_of, value_of
from keymap.load.progress import Counter, Progress, ProgressError
from keymap.plan.model import ModelView
from keymap.plan.plan import Entry, Plan
from keymap.read import LazyTensor

__all__ = ["assign_plan"]


class _Change(NamedTuple):
    """A parameter or buffer of a module, and the tensor that replaces it."""

    module: nn.Module
    name: str
    old: torch.Tensor
    new: torch.Tensor

    def put(self, value: torch.Tensor) -> None:
        """Set it as ``module.name = value`` does, which some modules override."""
        if type(self.module).__setattr__ is nn.Module.__setattr__:
            self.put_only(value)
        else:
            setattr(self.module, self.name, value)

    def put_only(self, value: torch.Tensor) -> None:
        held: dict[str, Any] = self.module._parameters
        if self.name not in held:
            held = self.module._buffers
        held[self.name] = value


def _to_device(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """One tensor on a device. Staging in pinned memory would go here."""
    return value.to(device)


@torch.no_grad()
def assign_plan(
    plan: Plan,
    tensors: Tensors,
    view: ModelView,
    device: torch.device,
    shared: Mapping[int, str],
    progress: Progress | None = None,
) -> list[str]:
    """Put the file's tensors into the model instead of copying into its memory.

    A tensor that needs no operation is the file's own, mapped privately: training writes to a copy of its page,
    never to the file. The others are made one after the other: several threads do not get new memory faster.

    Args:
        plan, tensors: what to load.
        view: the model.
        device: where the tensors go.
        shared: tensors that get the memory of another one, see `sharing`.
        progress: see `Counter`; the bytes are those of the model's tensors, without those of ``shared``.

    Returns:
        The keys of the tensors that were allocated.

    Raises:
        LoadError: there is not enough memory on the host or on the device; nothing was changed.
    """
    entries = [entry for entry in plan.entries if id(view.tensors[entry.key]) not in shared]
    values = _unconverted(entries, tensors)
    others = sorted((e for e in entries if e.key not in values), key=lambda entry: _position(entry, tensors))
    try:
        counter = Counter(progress, sum(entry.nbytes for entry in entries))
        new: dict[int, torch.Tensor] = {}
        for key, value in _each_value(values, others, tensors):
            new[id(view.tensors[key])] = _to_device(device, value)
            counter.add(value.nbytes)
    except ProgressError as error:
        raise LoadError(f"{plan.file}: {error}; nothing was changed") from error.__cause__
    except (RuntimeError, MemoryError) as error:
        raise LoadError(
            f"{plan.file}: the load failed with {type(error).__name__} ({error}); nothing was changed"
        ) from error
    for file in files_of(tensors):
        file.check_unchanged()
    try:
        _swap(_swaps(view, new, shared, device))
    except Exception as error:  # of a module's own __setattr__
        raise LoadError(
            f"{plan.file}: a module of the model refuses a new tensor with {type(error).__name__} ({error}); nothing "
            f"was changed"
        ) from error
    return [entry.key for entry in others]


def _each_value(
    values: Mapping[str, torch.Tensor], others: Iterable[Entry], tensors: Tensors
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that need no operation, then the others; each of these is made when it is asked for."""
    yield from values.items()
    for entry in others:
        yield entry.key, value_of(entry, tensors)


def _swaps(
    view: ModelView, new: dict[int, torch.Tensor], shared: Mapping[int, str], device: torch.device
) -> list[_Change]:
    """What to put where.

    Args:
        view: the model.
        new: by the id of the tensor that is replaced.
        shared: see `assign_plan`.
        device: where new causal masks go.
    """
    swaps: list[_Change] = []
    for module in view.modules.values():
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            if old is not None and id(old) in shared and id(old) not in new:
                leader = new[id(view.tensors[shared[id(old)]])]
                new[id(old)] = leader.detach().view(old.shape)
            if old is None or id(old) not in new:
                continue
            value = new[id(old)]
            if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):  # once for tied parameters
                value = new[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
            swaps.append(_Change(module, name, old, value))
    for path, buffer in view.unsaved_meta_buffers.items():
        owner, _, name = path.rpartition(".")
        swaps.append(_Change(view.modules[owner], name, buffer, causal_mask(buffer, device)))
    return swaps


def _swap(swaps: Sequence[_Change]) -> None:
    """Put new tensors into modules: all of them, or none after an interrupt."""
    try:
        for change in swaps:
            change.put(change.new)
    except BaseException:
        for change in swaps:
            with suppress(Exception):
                change.put(change.old)
            change.put_only(change.old)
        raise


def _position(entry: Entry, tensors: Tensors) -> int:
    """Where the file has an entry's first source; in this order a deflated member is read once."""
    source = entry.layout.pieces[0].source if entry.layout.pieces else None
    return tensors[source].position if source is not None else -1


def _unconverted(entries: Iterable[Entry], tensors: Tensors) -> dict[str, torch.Tensor]:
    """The file's own tensors, by the model's keys that need them element by element and in order.

    No two tensors of the model may share memory, so of those that overlap only the first is used.
    """
    fitting: list[tuple[int, int, Entry, LazyTensor]] = []
    for number, entry in enumerate(entries):
        lazy = _same_tensor(entry, tensors)
        if lazy is not None:
            fitting.append((lazy.position, number, entry, lazy))
    mapped: list[tuple[int, int, Entry, torch.Tensor]] = []
    for _, number, entry, lazy in sorted(fitting):  # in the file's order, so that each member is inflated once
        block = lazy.contiguous_block
        value = lazy.read() if block is None else block.mapped(lazy.dtype, prod(lazy.shape))
        if value.is_contiguous():
            mapped.append((value.data_ptr(), number, entry, value))
    values: dict[str, torch.Tensor] = {}
    end = 0
    for first, _, entry, value in sorted(mapped):
        if first >= end:
            values[entry.key] = value.view(entry.shape)
            end = first + value.nbytes
    return values


def _same_tensor(entry: Entry, tensors: Tensors) -> LazyTensor | None:
    """The file's tensor where it is what the model needs; else None."""
    layout = entry.layout
    source = layout.pieces[0].source if layout.copied_whole and entry.resize is None else None
    lazy = tensors[source] if source is not None else None
    if lazy is None or lazy.dtype != entry.dtype or prod(lazy.shape) != layout.pieces[0].numel:
        return None
    return lazy


def causal_mask(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An additive causal mask, (length, length): 0 on and below the diagonal, -inf above."""
    return torch.full(like.shape, float("-inf"), dtype=like.dtype, device=device).triu_(1)
