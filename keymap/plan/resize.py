"""Position embeddings of another size: which rows are prefix and which are grid, on either side.

The hub says how an embedding is resampled: a grid over (h, w), a line over its positions. `load.resample` computes it;
here only sizes are decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import NamedTuple

from keymap.language.format import Position
from keymap.language.layout import Shaped

__all__ = ["MismatchError", "Resize", "Rows", "assumed_grid", "patch_of", "plan_resize", "prefixes_of"]

_LISTED_GRIDS = 16  # grids that a message offers

Grid = tuple[int, int]


class MismatchError(ValueError):
    """A tensor of the file does not fit the model's tensor; the message says why and what to pass."""


class Resize(NamedTuple):
    """How one position embedding is resampled.

    Attributes:
        lead: leading axes of length one.
        source_prefix, target_prefix: rows in front of the grid, on either side.
        source_size, target_size: (h, w) for a grid, (n,) for a line of text positions.
        assumed: True where the source's grid was not given and was assumed to be square.
        apart: the grid keeps its two axes.
        method: how, by torch's name.
    """

    lead: int
    source_prefix: int
    target_prefix: int
    source_size: tuple[int, ...]
    target_size: tuple[int, ...]
    assumed: bool = False
    apart: bool = False
    method: str = "linear"

    @property
    def identity(self) -> bool:
        return (self.source_prefix, self.source_size) == (self.target_prefix, self.target_size)

    def __str__(self) -> str:
        source, target = ("x".join(map(str, size)) for size in (self.source_size, self.target_size))
        assumed = " (assumed to be square)" if self.assumed and not self.identity else ""
        zeros = ""
        if self.source_prefix != self.target_prefix:
            zeros = f", {self.target_prefix} rows before the grid filled with zeros"
        return f"{source}{assumed} to {target}, {self.method}{zeros}"


class Rows(NamedTuple):
    """One side of a position embedding.

    Attributes:
        shape: of the tensor.
        prefixes: how many rows may come before the grid.
        grid: (h, w) in patches, where the caller, a configuration or the model gives it.
    """

    shape: tuple[int, ...]
    prefixes: Sequence[int]
    grid: Grid | None = None


def prefixes_of(position: Position, *tensors: Mapping[str, Shaped]) -> list[int]:
    """How many rows may come before the grid; prefix tokens may have rows of their own, or none.

    Args:
        position: says which tensors bring them.
        tensors: by the hub's keys; the first that has a key counts.
    """
    if isinstance(position.prefix, int):
        return [position.prefix]
    total = 0
    for name in position.prefix:
        token = next((held[name] for held in tensors if name in held), None)
        if token is not None:
            total += token.shape[1] if len(token.shape) == 3 else 1
    return [0, total] if total else [0]


def patch_of(position: Position, tensors: Mapping[str, Shaped]) -> Grid | None:
    """(h, w) of a patch in pixels, where the weights show it."""
    weight = tensors.get(position.patch)
    return (weight.shape[-2], weight.shape[-1]) if weight is not None and len(weight.shape) == 4 else None


def plan_resize(position: Position, source: Rows, target: Rows) -> Resize | None:
    """How to fit a position embedding; None where it is copied unchanged.

    Raises:
        MismatchError: the widths differ, a grid cannot be inferred, or the rows before the grid differ.
    """
    found = _planned(position, source, target)
    return found._replace(method=position.method) if found is not None else None


def _planned(position: Position, source: Rows, target: Rows) -> Resize | None:
    """See `plan_resize`; without the method."""
    lead, same = position.lead, source.shape == target.shape
    if not _resizable(position, source.shape, target.shape):
        return None
    if position.apart:
        return _resize_apart(lead, source, target)
    rows, wanted = source.shape[lead], target.shape[lead]
    if not position.grid:
        return None if rows == wanted else Resize(lead, 0, 0, (rows,), (wanted,))
    if same and source.grid is None and not set(source.prefixes).isdisjoint(target.prefixes):
        return None  # see assumed_grid
    target_prefix, target_grid = _target_grid(wanted, target)
    source_prefix, source_grid = _source_grid(rows, source, target_prefix, target_grid)
    if source_prefix not in (0, target_prefix):
        raise MismatchError(f"the file has {source_prefix} rows before its grid, the model has {target_prefix}")
    resize = Resize(lead, source_prefix, target_prefix, source_grid, target_grid, assumed=source.grid is None)
    return None if resize.identity else resize


def assumed_grid(position: Position, source: Rows, target: Rows) -> Grid | None:
    """The model's grid (h, w) where the file's positions are taken to be on it; None where their grid is clear.

    Equal shapes are copied unchanged. Where the model's grid is not square, the file's may be another one of as many
    positions, which only ``source_grid`` or a configuration shows.
    """
    if source.shape != target.shape or not position.grid or position.apart or source.grid or not target.grid:
        return None
    h, w = target.grid
    fits = len(target.shape) == position.lead + 2 and target.shape[position.lead] - h * w in target.prefixes
    return target.grid if h != w and fits else None


def _resizable(position: Position, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """True where the tensors have the axes that the hub declares, and one width; False where they are just equal."""
    rank = position.lead + (3 if position.apart else 2)
    if len(source) == len(target) == rank and source[-1] == target[-1]:
        if 0 in source[:-1]:
            raise MismatchError("the file's tensor has no rows")
        return True
    if source == target:
        return False
    fixed = "number of axes" if len(source) != len(target) else "width"
    raise MismatchError(
        f"shape {list(source)} in the file, {list(target)} in the model: only the number of positions can be "
        f"resized, not the {fixed}"
    )


def _resize_apart(lead: int, source: Rows, target: Rows) -> Resize | None:
    """For a grid with two axes, whose shape shows its size."""
    before, after = source.shape[lead:-1], target.shape[lead:-1]
    if source.grid not in (None, before):
        own = "x".join(map(str, before))
        raise MismatchError(f"source_grid={source.grid}: does not match the file, whose grid is {own}")
    return None if source.shape == target.shape else Resize(lead, 0, 0, before, after, apart=True)


def _square_grids(rows: int, prefixes: Sequence[int]) -> list[tuple[int, int]]:
    """The ways to read a number of rows as a prefix and a square grid: (prefix, side)."""
    return [(p, isqrt(rows - p)) for p in prefixes if rows > p and isqrt(rows - p) ** 2 == rows - p]


def _target_grid(wanted: int, target: Rows) -> tuple[int, Grid]:
    """The model's prefix and grid."""
    if target.grid is None:
        squares = _square_grids(wanted, target.prefixes)
        if len(squares) != 1:
            raise MismatchError(f"cannot infer the grid of the model's {wanted} positions: it may not be square")
        prefix, side = squares[0]
        return prefix, (side, side)
    prefix = wanted - prod(target.grid)
    if prefix not in target.prefixes:
        h, w = target.grid
        raise MismatchError(
            f"the model has {wanted} positions and a grid of {h}x{w}, which leaves {prefix} rows before the grid; "
            f"expected {' or '.join(map(str, target.prefixes))}"
        )
    return prefix, target.grid


def _source_grid(rows: int, source: Rows, target_prefix: int, target_grid: Grid) -> tuple[int, Grid]:
    """The file's prefix and grid."""
    if source.grid is not None:
        prefix = rows - prod(source.grid)
        if prefix not in source.prefixes:
            raise MismatchError(
                f"source_grid={source.grid}: does not fit {rows} positions with "
                f"{' or '.join(map(str, source.prefixes))} rows before the grid"
            )
        return prefix, source.grid
    squares = _square_grids(rows, source.prefixes)
    h, w = target_grid
    if len(squares) == 1:
        prefix, side = squares[0]
        before = rows - h * w  # on the model's grid, the file may have the rows of tokens that the square leaves out
        if h == w or before <= prefix or before not in source.prefixes:
            return prefix, (side, side)
    raise MismatchError(
        f"cannot infer the grid of the file's {rows} positions (the model's is {h}x{w}): "
        f"pass source_grid=(h, w), one of {_choices(rows, source.prefixes, target_prefix)}"
    )


def _choices(rows: int, prefixes: Sequence[int], target_prefix: int) -> str:
    """The grids that a number of rows may hold, for a message."""
    fitting = [p for p in prefixes if p in (0, target_prefix) and p < rows]
    grids = [(h, (rows - p) // h, p) for p in fitting for h in range(1, rows - p + 1) if (rows - p) % h == 0]
    several = len(fitting) > 1
    return ", ".join(f"{h}x{w}{f' after {p} rows' if several else ''}" for h, w, p in grids[:_LISTED_GRIDS])
