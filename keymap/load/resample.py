"""Position embeddings at another size: the resampling that `plan.resize` decides on.

A grid is resampled over (h, w), with antialias where torch has it; a line over its positions, without. Computed in
float32 (float64 for float64 weights), whatever the checkpoint's dtype.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F

from keymap.plan.resize import Resize

__all__ = ["resample"]


def resample(tensor: torch.Tensor, resize: Resize) -> torch.Tensor:
    """The tensor at its new size, float32 or float64, shape ``(1,) * lead + (rows, width)`` (or ``(h, w, width)``)."""
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows = tensor.to(exact).reshape(-1, tensor.shape[-1])
    resized = _line(rows, resize) if len(resize.source_size) == 1 else _grid(rows, resize)
    shape = (*resize.target_size, resized.shape[-1]) if resize.apart else resized.shape
    return resized.reshape(*(1,) * resize.lead, *shape)


def _line(rows: torch.Tensor, resize: Resize) -> torch.Tensor:
    """Rows of positions on a line, (n, width)."""
    line = rows.permute(1, 0).unsqueeze(0)
    line = F.interpolate(line, size=resize.target_size[0], mode=resize.method, align_corners=_corners(resize))
    return line.squeeze(0).permute(1, 0)


def _corners(resize: Resize) -> bool | None:
    """Torch's ``align_corners``, which nearest neighbours do not have."""
    return None if resize.method == "nearest" else False


def _grid(rows: torch.Tensor, resize: Resize) -> torch.Tensor:
    """Prefix rows and the rows of a grid, (prefix + h * w, width)."""
    prefix, grid = rows[: resize.source_prefix], rows[resize.source_prefix :]
    if resize.source_size != resize.target_size:
        image = grid.reshape(1, *resize.source_size, -1).permute(0, 3, 1, 2)
        corners = _corners(resize)
        image = F.interpolate(
            image, size=resize.target_size, mode=resize.method, antialias=corners is not None, align_corners=corners
        )
        grid = image.permute(0, 2, 3, 1).reshape(prod(resize.target_size), -1)
    if resize.source_prefix < resize.target_prefix:
        prefix = rows.new_zeros(resize.target_prefix, rows.shape[1])
    return torch.cat([prefix, grid], dim=0)
