"""The few checks on values that a plan lists: zeros, an identity, equality. Only those tensors are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from keymap.language.layout import Layout
from keymap.language.rules import Check
from keymap.load.copying import Read, materialise

_TOLD = 1 << 20  # elements of a tensor whose difference is measured

__all__ = ["failed"]


def failed(checks: Iterable[Check], read: Read) -> list[tuple[Check, str]]:
    """The checks that do not hold, each with what was found instead."""
    out = []
    for check in checks:
        tensor = materialise(check.layout, read)
        if isinstance(check.value, Layout):
            wanted, name = materialise(check.value, read), "the same values as the tensor it is tied to"
        elif check.value == "eye":
            square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
            wanted = torch.eye(*tensor.shape, dtype=tensor.dtype) if square else torch.empty(0)
            name = "the identity matrix"
        else:
            value = torch.tensor(float(check.value)).to(tensor.dtype)
            wanted, name = (
                torch.broadcast_to(value, tensor.shape),
                f"{check.value:g} everywhere",
            )  # of one element's memory
        if tensor.shape == wanted.shape and bool((tensor == wanted).all()):
            continue
        found = f"shape {list(tensor.shape)}"
        if tensor.shape == wanted.shape and tensor.numel() > _TOLD:
            found = "other values"
        elif tensor.numel() and tensor.shape == wanted.shape:
            found = f"values up to {float((tensor.double() - wanted.double()).abs().max()):.3g} away"
        out.append((check, f"{check.key} must hold {name}, because {check.why}; it has {found}"))
    return out
