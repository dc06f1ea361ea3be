"""What the public functions answer: the account of a load, and what a file is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keymap.errors import some
from keymap.plan.describe import Described
from keymap.plan.plan import Plan

__all__ = ["Inspection", "LoadResult", "Report"]


@dataclass(frozen=True)
class Report:
    """What a load did: the plan that was carried out, the seconds it took, and what was not handed over as is.

    Attributes:
        plan: every key, with its pieces.
        seconds: from opening the file to the last copy.
        materialised: for ``assign=True`` the keys whose tensors are not the file's own memory.
    """

    plan: Plan
    seconds: float
    materialised: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan's account, with ``seconds`` and ``materialised``."""
        return {**self.plan.to_dict(), "seconds": self.seconds, "materialised": list(self.materialised)}

    def __str__(self) -> str:
        return f"{self.plan}\n  time: {self.seconds:.2f} s"


class LoadResult(dict[str, list[str]]):
    """The keys that a load left over, as ``torch.nn.Module.load_state_dict`` names them, and the full report.

    A dict with ``missing_keys`` and ``unexpected_keys``, which are attributes too; for ``.npz`` and ``.npy``
    the dict is empty, as OpenCLIP's own loader returns it, and the attributes still answer.

    Attributes:
        report: what was loaded, resized, filled, cast and dropped.
    """

    def __init__(self, report: Report) -> None:
        keys = {"missing_keys": list(report.plan.missing_keys), "unexpected_keys": list(report.plan.unexpected_keys)}
        super().__init__({} if report.plan.container in ("npz", "npy") else keys)
        self._keys = keys
        self.report = report

    @property
    def missing_keys(self) -> list[str]:
        return self._keys["missing_keys"]

    @property
    def unexpected_keys(self) -> list[str]:
        return self._keys["unexpected_keys"]

    def to_dict(self) -> dict[str, Any]:
        return self.report.to_dict()

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True)
class Inspection:
    """What a file is, without a model.

    Attributes:
        path, container: the file, and the kind of file that it is.
        format, evidence: the format and the keys that told it; None and the reasons where no format claims it.
        wrapper, other_wrappers, prefixes: what stands around the state dict.
        towers: each tower's layout and sizes, in the hub's terms.
        configurations: of OpenCLIP's own, those whose shapes the file fits, apart from the number of positions.
        tensors: shape and dtype of every tensor, by the key in the file.
        dtypes: how many tensors there are of each dtype.
        config_hints: what the format's configuration, in the file or beside it, tells.
        notes: which file of a folder this is, and what else stood around the state dict.
    """

    path: str
    container: str
    format: str | None
    evidence: tuple[str, ...]
    wrapper: str
    other_wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    towers: Described
    configurations: Sequence[str]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    dtypes: Mapping[str, int]
    config_hints: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def layouts(self) -> dict[str, str]:
        """The layout of each tower."""
        return {name: tower.layout for name, tower in self.towers.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data; tensors as ``{key: {"shape": [...], "dtype": "float32"}}``."""
        plain = {name: getattr(self, name) for name in ("path", "container", "format", "wrapper")}
        for name in ("evidence", "other_wrappers", "prefixes", "notes", "configurations"):
            plain[name] = list(getattr(self, name))
        for name in ("layouts", "dtypes", "config_hints"):
            plain[name] = dict(getattr(self, name))
        plain["sizes"] = {name: dict(tower.sizes) for name, tower in self.towers.items()}
        plain["tensors"] = {
            key: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for key, (shape, dtype) in self.tensors.items()
        }
        return plain

    def __str__(self) -> str:
        count = sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())
        lines = [f"{self.path}: {self.format or 'no known format'} ({self.container})"]
        lines.append(f"  {'told by' if self.format else 'because'}: {', '.join(self.evidence[:4])}")
        if self.wrapper or self.prefixes:
            lines.append(f"  wrapper: {self.wrapper or 'none'}; prefixes: {' '.join(self.prefixes) or 'none'}")
        if self.other_wrappers:
            lines.append(f"  also in the file: {', '.join(map(repr, self.other_wrappers))}")
        lines += [f"  {name} tower: {tower}" for name, tower in self.towers.items()]
        if self.towers:
            fits = some(self.configurations, 6)
            lines.append(f"  configurations of OpenCLIP that it fits: {fits or 'none that is recorded'}")
        dtypes = ", ".join(f"{n} {name}" for name, n in self.dtypes.items())
        lines.append(f"  {len(self.tensors)} tensors ({dtypes}), {count:,} elements")
        lines += [f"  {name}: {value}" for name, value in self.config_hints.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
