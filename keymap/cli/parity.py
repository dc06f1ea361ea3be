"""Both sides of a load beside each other: tensors, sizes of towers, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from keymap.plan.describe import describe
from keymap.plan.model import view_model
from keymap.plan.plan import Plan, dtype_name
from keymap.results import Inspection
from keymap.source.registry import registry

__all__ = ["Row", "parity"]


class Row(NamedTuple):
    """One figure of both sides; of ``loaded``, the tensors that are filled and all tensors of the model.

    Attributes:
        group: ``tensors``, ``sizes`` or ``settings``.
        name: what it is.
        file, model: its values; None where a side does not state it.
        equal: None where one side does not state it, and for counts, which a load may change.
        origin: where the file's side states it.
    """

    group: str
    name: str
    file: Any
    model: Any
    equal: bool | None
    origin: str = ""


def parity(plan: Plan, inspection: Inspection, model: nn.Module) -> list[Row]:
    """The rows of a load.

    Args:
        plan: of the load.
        inspection: of the same file.
        model: that was loaded.
    """
    known = registry(plan.hub)
    view = view_model(model, known.hub)
    rows = [_row("tensors", "loaded", len(plan.entries), len(view.tensors))]
    rows += _tensors(inspection.tensors.values(), [(tuple(t.shape), t.dtype) for t in view.tensors.values()])
    in_model = {name: tower.sizes for name, tower in describe(known, view.layouts()).items()}
    for tower, sizes in _sizes_of_file(plan, inspection).items():
        for name in {**sizes, **in_model.get(tower, {})}:
            theirs, ours = sizes.get(name), in_model.get(tower, {}).get(name)
            rows.append(_row("sizes", f"{tower}.{name}", theirs, ours))
    rows += [Row("settings", one.name, one.source, one.model, one.equal, one.origin) for one in plan.settings]
    return rows


def _row(group: str, name: str, file: Any, model: Any) -> Row:
    return Row(group, name, file, model, None if file is None or model is None else file == model)


Shapes = Iterable[tuple[tuple[int, ...], torch.dtype]]


def _tensors(file: Shapes, model: Shapes) -> Iterator[Row]:
    theirs, ours = _counts(file), _counts(model)
    yield from (Row("tensors", name, theirs[name], ours[name], None) for name in {**theirs, **ours})


def _counts(side: Shapes) -> Counter[str]:
    """The numbers of tensors, of elements, and of tensors of each dtype."""
    counts: Counter[str] = Counter()
    for shape, dtype in side:
        counts.update({"tensors": 1, "elements": prod(shape), dtype_name(dtype): 1})
    return counts


def _sizes_of_file(plan: Plan, inspection: Inspection) -> dict[str, Mapping[str, int]]:
    """The sizes of the towers that were loaded."""
    found: dict[str, Mapping[str, int]] = {}
    for part in plan.parts:
        for tower in inspection.parts:
            if tower.tower in part.towers and (tower.prefix, tower.format) == (part.prefix, part.format):
                found[tower.tower] = tower.sizes
    towers = {tower for part in plan.parts for tower in part.towers}
    whole = {name: tower.sizes for name, tower in inspection.towers.items() if name in towers}
    return {**whole, **found}
