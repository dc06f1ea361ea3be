"""Weights that a file stores as the length and the direction of each row (weight normalisation).

``weight = length * direction / |direction|``, as in Salimans and Kingma, Weight Normalization (2016), and in
`torch.nn.utils.parametrizations.weight_norm`. The norm is taken over the axes along which the length has one element.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import torch

from keymap.errors import some
from keymap.language.format import Containers
from keymap.read import LazyTensor

__all__ = ["normalised"]

_SMALLEST = 1e-12  # norm that is divided by, as in torch.nn.functional.normalize


def normalised(
    tensors: Mapping[str, LazyTensor], containers: Containers
) -> tuple[Mapping[str, LazyTensor], tuple[str, ...]]:
    """The tensors with each pair of length and direction replaced by the weight, and a note on them for the report.

    Args:
        tensors: by key.
        containers: the declared table with the ends of the keys.
    """
    directions = tuple(direction_end for _, direction_end, _ in containers.weight_norms)
    candidates = [key for key in tensors if key.endswith(directions)]
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for length_end, direction_end, weight_end in containers.weight_norms:
        for key in candidates:
            start = key.removesuffix(direction_end)
            length = tensors.get(start + length_end)
            if start == key or length is None or start + weight_end in tensors:
                continue
            axes = _axes(length.shape, tensors[key].shape)
            if axes is not None and length.dtype.is_floating_point and tensors[key].dtype.is_floating_point:
                read = partial(_weight, length, tensors[key], axes)
                found[start + weight_end] = LazyTensor(tensors[key].shape, tensors[key].dtype, read)
                used.update((key, start + length_end))
    if not found:
        return tensors, ()
    note = f"computed {len(found)} weight{'' if len(found) == 1 else 's'} from length and direction: {some(found, 3)}"
    return {**{key: tensor for key, tensor in tensors.items() if key not in used}, **found}, (note,)


def _axes(length: tuple[int, ...], direction: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes that the norm is taken over; None if the shapes are not those of a length and its direction."""
    if len(direction) < 2 or not prod(direction):
        return None
    if len(length) == 1 and length[0] == direction[0]:
        return tuple(range(1, len(direction)))
    if prod(length) == 1:
        return tuple(range(len(direction)))
    if len(length) != len(direction) or any(a not in (1, b) for a, b in zip(length, direction, strict=True)):
        return None
    return tuple(axis for axis, size in enumerate(length) if size == 1)


def _weight(length: LazyTensor, direction: LazyTensor, axes: tuple[int, ...]) -> torch.Tensor:
    """The weight in the direction's dtype, computed in float32 or wider."""
    values = direction.read()
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    lengths = length.read().to(wide.dtype)
    if lengths.numel() == 1:
        lengths = lengths.reshape((1,) * wide.dim())
    elif lengths.dim() == 1:
        lengths = lengths.reshape(-1, *(1,) * (wide.dim() - 1))
    norms = torch.linalg.vector_norm(wide, dim=axes, keepdim=True).clamp_min(_SMALLEST)  # a row of zeros stays zero
    weight: torch.Tensor = wide * (lengths / norms)
    return weight.to(values.dtype)
