"""Tensors of a source that are the same memory: tied weights, under several names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from keymap.plan.model import has_memory
from keymap.read import LazyTensor
from keymap.read.lazy import Block

__all__ = ["lazy_state", "same_elements"]


def lazy_state(
    state: Mapping[str, torch.Tensor], reader: Callable[[str, torch.Tensor], Callable[[], torch.Tensor]]
) -> dict[str, LazyTensor]:
    """Tensors in memory as those of a checkpoint; tied ones have one function that reads them.

    Args:
        state: tensors by key.
        reader: makes the function that reads a tensor.
    """
    readers: dict[object, Callable[[], torch.Tensor]] = {}
    return {
        key: LazyTensor(tuple(value.shape), value.dtype, readers.setdefault(_memory(key, value), reader(key, value)))
        for key, value in state.items()
    }


def same_elements(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """For each tensor the first one that is the same memory."""
    first: dict[object, str] = {}
    names = {}
    for key, lazy in tensors.items():
        block = lazy.values
        place = (id(block.file), block.start) if isinstance(block, Block) else id(block)
        names[key] = first.setdefault((place, lazy.shape, lazy.dtype, lazy.strides, lazy.offset), key)
    return names


def _memory(key: str, tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements in memory; the key for those that have none."""
    if not has_memory(tensor) or tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return key
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
