"""Casts between floating dtypes, without a value that becomes infinite."""

from __future__ import annotations

import torch

from keymap.errors import VerifyError
from keymap.plan.plan import dtype_name

__all__ = ["cast", "check_cast", "narrows", "too_large"]

_BLOCK = 1 << 20  # elements that are looked at together


def cast(key: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in another dtype.

    Args:
        key: of the tensor, for the message.
        value: on the CPU.
        dtype: its new dtype.

    Raises:
        VerifyError: as `check_cast`.
    """
    check_cast(key, value, dtype)
    return value.to(dtype)


def check_cast(key: str, value: torch.Tensor, dtype: torch.dtype, advice: str = "") -> None:
    """Check that values fit a dtype.

    Args:
        key, value, dtype: as in `cast`.
        advice: what to do if a value does not fit.

    Raises:
        VerifyError: a value does not fit the dtype: a finite one would be infinite, or cut to the largest one.
    """
    fault = too_large(value, dtype) if narrows(value.dtype, dtype) else ""
    if fault:
        raise VerifyError(f"{key}: {fault}{f'; {advice}' if advice else ', which the format has for it'}")


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether finite values of a floating dtype may not fit another one."""
    if not (source.is_floating_point and target.is_floating_point) or source == target:
        return False
    return target.itemsize == 1 or torch.finfo(target).max < torch.finfo(source).max


def too_large(value: torch.Tensor, dtype: torch.dtype) -> str:
    """Why values do not fit a dtype; empty where they do. Some MB are cast at a time."""
    limit, largest, fits = torch.finfo(dtype).max, 0.0, True
    for block in torch.split(value.reshape(-1), _BLOCK):
        if dtype.itemsize == 1:  # torch cuts to the largest value, and not all of these have an infinity
            outside = block.to(torch.float32).abs() > limit
        else:
            outside = torch.isinf(block.to(dtype)) & ~torch.isinf(block)
        if bool(outside.any()):
            fits, largest = False, max(largest, float(block[outside].double().abs().max()))
    return "" if fits else f"its largest value {largest:g} does not fit {dtype_name(dtype)}"
