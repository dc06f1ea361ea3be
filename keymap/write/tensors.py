"""The tensors of a conversion, one at a time, as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from keymap.errors import PlanError, VerifyError
from keymap.load.copying import materialise
from keymap.plan.export import Export, Target
from keymap.read import LazyTensor

__all__ = ["Item", "items_of", "parse_dtype", "raw_bytes", "value_of_item"]


class Item(NamedTuple):
    """A tensor to write.

    Attributes:
        target: what it is made of.
        dtype: as it is written.
    """

    target: Target
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.target.shape) * self.dtype.itemsize


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype from its name, for example ``float16``.

    Raises:
        PlanError: it is not one.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(f"dtype={dtype!r}: expected a floating dtype, for example 'float16', 'bfloat16' or 'float32'")
    return found


def items_of(export: Export, dtype: torch.dtype | None) -> dict[str, Item]:
    """What is written, by key; ``dtype`` replaces that of floating tensors."""
    return {
        key: Item(target, dtype if dtype is not None and target.dtype.is_floating_point else target.dtype)
        for key, target in export.tensors.items()
    }


def value_of_item(key: str, item: Item, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    """The values of a tensor, contiguous on the CPU.

    Raises:
        VerifyError: a finite value is infinite in the dtype that is written.
    """
    layout = item.target.layout

    def read(name: str) -> torch.Tensor:
        return tensors[name].read().to("cpu")

    whole = read(layout.sources[0]) if layout.copied_whole else None
    if whole is not None and whole.numel() == layout.pieces[0].numel:
        value = whole
    else:
        value = materialise(layout, read)
    cast = value.to(item.dtype)
    if item.dtype.is_floating_point and item.dtype != value.dtype and value.is_floating_point():
        narrow = torch.finfo(item.dtype).max < torch.finfo(value.dtype).max
        if narrow and bool((~torch.isfinite(cast.float()) & torch.isfinite(value.float())).any()):
            largest = float(value.abs().max())
            raise VerifyError(
                f"{key}: its largest value {largest:g} does not fit {str(item.dtype).removeprefix('torch.')}; pass "
                f"another dtype, for example dtype='bfloat16'"
            )
    return cast.reshape(item.target.shape).contiguous()


def raw_bytes(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = value.reshape(-1).view(torch.uint8).numpy().data
    return view
