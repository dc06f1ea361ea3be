"""Position embeddings of another size: read as prefix rows and a grid, resampled, put back.

Images: bicubic with antialias over (h, w), as OpenCLIP and timm do; text: linear over positions, without
antialias, as OpenCLIP does. Computed in float32 (float64 for float64 weights), whatever the checkpoint's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F

from keymap.language.format import Position

__all__ = ["Resize", "ResizeError", "plan_resize", "resample"]


class ResizeError(ValueError):
    """A position embedding cannot be fitted; the message says why and what to give."""


class Resize(NamedTuple):
    """How one position embedding is resampled.

    Attributes:
        lead: leading axes of length one.
        source_prefix, target_prefix: rows in front of the grid, on either side.
        source_size, target_size: (h, w) for a grid, (n,) for a line of text positions.
        assumed: True where the source's grid was taken to be square because nothing told it.
        apart: the grid keeps its two axes.
    """

    lead: int
    source_prefix: int
    target_prefix: int
    source_size: tuple[int, ...]
    target_size: tuple[int, ...]
    assumed: bool = False
    apart: bool = False

    @property
    def identity(self) -> bool:
        return (self.source_prefix, self.source_size) == (self.target_prefix, self.target_size)

    def __str__(self) -> str:
        def sized(size: tuple[int, ...]) -> str:
            return "x".join(map(str, size))

        told = " (taken to be square)" if self.assumed and not self.identity else ""
        kind = "bicubic" if len(self.source_size) == 2 else "linear"
        rows = ""
        if self.source_prefix != self.target_prefix:
            rows = f", {self.target_prefix} rows of zeros for the prefix"
        return f"{sized(self.source_size)}{told} to {sized(self.target_size)}, {kind}{rows}"


def _readings(rows: int, prefixes: Sequence[int]) -> list[tuple[int, int]]:
    """Square readings of a number of rows: (prefix, side)."""
    return [(p, isqrt(rows - p)) for p in prefixes if rows > p and isqrt(rows - p) ** 2 == rows - p]


def plan_resize(
    position: Position,
    source_shape: Sequence[int],
    target_shape: Sequence[int],
    source_prefixes: Sequence[int],
    target_prefixes: Sequence[int],
    source_grid: tuple[int, int] | None,
    target_grid: tuple[int, int] | None,
) -> Resize | None:
    """How to fit a position embedding; None where it is copied as it is.

    Args:
        position: what the hub says of the key.
        source_shape, target_shape: of the tensor on either side.
        source_prefixes, target_prefixes: how many rows may stand before the grid, on either side.
        source_grid: (h, w) told by the caller or the source's configuration.
        target_grid: (h, w) told by the model.

    Raises:
        ResizeError: other widths, a grid that nothing tells, two readings, or prefix rows without a place.
    """
    lead = position.lead
    same = tuple(source_shape) == tuple(target_shape)
    rank = lead + (3 if position.apart else 2)
    if len(source_shape) != rank or len(target_shape) != rank or source_shape[-1] != target_shape[-1]:
        if same:
            return None
        ranks = len(source_shape) != len(target_shape)
        raise ResizeError(
            f"shape {list(source_shape)} in the file, {list(target_shape)} in the model: only the number of "
            f"positions can be resized, not the {'number of axes' if ranks else 'width'}"
        )
    rows, wanted = source_shape[lead], target_shape[lead]
    if 0 in source_shape[:-1]:
        raise ResizeError("the file's has no rows")
    if position.apart:
        before, after = tuple(source_shape[lead:-1]), tuple(target_shape[lead:-1])
        if source_grid not in (None, before):
            told, own = ("x".join(map(str, grid)) for grid in (source_grid, before))
            raise ResizeError(f"source_grid {told} is not the grid that the file's positions have, {own}")
        return None if same else Resize(lead, 0, 0, before, after, apart=True)
    if not position.grid:
        return None if rows == wanted else Resize(lead, 0, 0, (rows,), (wanted,))
    if target_grid is not None:
        target_prefix = wanted - prod(target_grid)
        if target_prefix not in target_prefixes:
            raise ResizeError(
                f"the model has {wanted} positions and a grid of {target_grid[0]}x{target_grid[1]}, which leaves "
                f"{target_prefix} rows before the grid; expected {' or '.join(map(str, target_prefixes))}"
            )
    else:
        found = _readings(wanted, target_prefixes)
        if same and source_grid is None:
            return None
        if len(found) != 1:
            raise ResizeError(f"the model does not tell the grid of its {wanted} positions, and it is not square")
        target_prefix, side = found[0]
        target_grid = (side, side)
    assumed = source_grid is None
    if source_grid is not None:
        source_prefix = rows - prod(source_grid)
        if source_prefix not in source_prefixes:
            raise ResizeError(
                f"source_grid {source_grid[0]}x{source_grid[1]} does not fit {rows} positions with "
                f"{' or '.join(map(str, source_prefixes))} rows before the grid"
            )
    else:
        found = _readings(rows, source_prefixes)
        square = target_grid[0] == target_grid[1]
        if len(found) == 1 and (square or not same):
            source_prefix, side = found[0]
            source_grid = (side, side)
        elif len(found) > 1 and same and square:
            return None
        else:
            fitting = [p for p in source_prefixes if p in (0, target_prefix) and p < rows]
            counts = {p: rows - p for p in fitting}
            sizes = [(h, n // h, p) for p, n in counts.items() for h in range(1, n + 1) if n % h == 0]
            choices = ", ".join(f"({h}, {w}){f' after {p} rows' if len(fitting) > 1 else ''}" for h, w, p in sizes[:16])
            known = f"; the model's is {target_grid[0]}x{target_grid[1]}"
            raise ResizeError(
                f"nothing tells the grid of the file's {rows} positions{known}: pass source_grid=(h, w), "
                f"one of {choices}"
            )
    if source_prefix > target_prefix:
        raise ResizeError(
            f"the file has {source_prefix} rows before its grid and the model has place for {target_prefix}"
        )
    if source_prefix and source_prefix != target_prefix:
        raise ResizeError(f"{source_prefix} rows before the grid do not fill the model's {target_prefix}")
    resize = Resize(lead, source_prefix, target_prefix, source_grid, target_grid, assumed)
    return None if resize.identity else resize


def resample(tensor: torch.Tensor, how: Resize) -> torch.Tensor:
    """The tensor at its new size, float32 or float64, shape ``(1,) * lead + (rows, width)`` (or ``(h, w, width)``)."""
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows = tensor.to(exact).reshape(-1, tensor.shape[-1])
    if len(how.source_size) == 1:
        line = F.interpolate(
            rows.permute(1, 0).unsqueeze(0), size=how.target_size[0], mode="linear", align_corners=False
        )
        result = line.squeeze(0).permute(1, 0)
    else:
        prefix, grid = rows[: how.source_prefix], rows[how.source_prefix :]
        if how.source_size != how.target_size:
            image = grid.reshape(1, *how.source_size, -1).permute(0, 3, 1, 2)
            image = F.interpolate(image, size=how.target_size, mode="bicubic", antialias=True, align_corners=False)
            grid = image.permute(0, 2, 3, 1).reshape(prod(how.target_size), -1)
        if how.source_prefix < how.target_prefix:
            prefix = rows.new_zeros(how.target_prefix, rows.shape[1])
        result = torch.cat([prefix, grid], dim=0)
    shape = (*how.target_size, result.shape[-1]) if how.apart else result.shape
    return result.reshape(*(1,) * how.lead, *shape)
