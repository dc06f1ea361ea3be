"""What the public functions return: the report of a load, and the description of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keymap.errors import printable, some
from keymap.plan.describe import Described, FoundTower
from keymap.plan.plan import Plan, dtype_name

__all__ = ["Inspection", "LoadResult", "Report"]


@dataclass(frozen=True, repr=False)
class Report:
    """What a load did.

    Attributes:
        plan: the plan that was executed: every key, with its pieces.
        seconds: from opening the file to the last copy.
        materialised: with ``assign=True`` the keys whose tensors were allocated; the others are the file's own memory.
    """

    plan: Plan
    seconds: float
    materialised: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Report of {self.plan!r}>"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, with ``seconds`` and ``materialised``."""
        return {**self.plan.to_dict(), "seconds": self.seconds, "materialised": list(self.materialised)}

    def __str__(self) -> str:
        return f"{self.plan}\n  time: {self.seconds:.2f} s"


class LoadResult(dict[str, list[str]]):
    """The missing and unexpected keys of a load, and its report.

    A dict with ``missing_keys`` and ``unexpected_keys``, the names of ``torch.nn.Module.load_state_dict``; both are
    attributes, too. It unpacks as torch's result does: ``missing, unexpected = load_checkpoint(...)``. For ``.npz``
    and ``.npy`` the dict is empty, as OpenCLIP's own loader returns it; the attributes still hold the keys.

    Attributes:
        report: what was loaded, resized, filled, cast and ignored.
    """

    def __init__(self, report: Report) -> None:
        keys = {"missing_keys": list(report.plan.missing_keys), "unexpected_keys": list(report.plan.unexpected_keys)}
        super().__init__({} if report.plan.container in ("npz", "npy") else keys)
        self._keys = keys
        self.report = report

    def __iter__(self) -> Iterator[Any]:
        """The two lists, as the result of ``load_state_dict`` gives them; `keys` gives the names."""
        return iter((self.missing_keys, self.unexpected_keys))

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


@dataclass(frozen=True, repr=False)
class Inspection:
    """What a file is, without a model.

    Attributes:
        path, container: the file, and its container, for example ``safetensors``.
        format, hub: its format, and the hub that the format belongs to; None where no format claims it.
        evidence: the keys by which the format was detected; the reasons where no format claims the file.
        wrapper, prefixes: the dict that was unwrapped, and the key prefixes that were stripped.
        other_wrappers: further state dicts in the file.
        towers: each tower's layout and sizes.
        configurations: names of model configurations whose shapes the file fits, apart from the number of positions.
        tensors: shape and dtype of every tensor, by the key in the file.
        dtypes: the number of tensors of each dtype.
        config_hints: settings from the format and from a configuration file, in the checkpoint or beside it.
        notes: which file of a folder this is, and what else the file holds.
        parts: every tower in the file, also those within a larger state dict; `FoundTower` has ``prefix``, ``format``,
            ``tower``, ``layout``, ``sizes``, ``configurations`` and ``hub``.
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
    parts: tuple[FoundTower, ...] = ()
    hub: str | None = None

    def __repr__(self) -> str:
        form = f"format {self.format}" if self.format else "unknown format"
        return f"<Inspection of {printable(self.path)}: {form}, {len(self.tensors)} tensors; print() shows it>"

    @property
    def layouts(self) -> dict[str, str]:
        """The layout of each tower."""
        return {name: tower.layout for name, tower in self.towers.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data; tensors as ``{key: {"shape": [...], "dtype": "float32"}}``."""
        plain = {name: getattr(self, name) for name in ("path", "container", "format", "hub", "wrapper")}
        for name in ("evidence", "other_wrappers", "prefixes", "notes", "configurations"):
            plain[name] = list(getattr(self, name))
        for name in ("layouts", "dtypes", "config_hints"):
            plain[name] = dict(getattr(self, name))
        plain["parts"] = [
            {**part._asdict(), "sizes": dict(part.sizes), "configurations": list(part.configurations)}
            for part in self.parts
        ]
        plain["sizes"] = {name: dict(tower.sizes) for name, tower in self.towers.items()}
        plain["tensors"] = {
            key: {"shape": list(shape), "dtype": dtype_name(dtype)} for key, (shape, dtype) in self.tensors.items()
        }
        return plain

    def __str__(self) -> str:
        count = sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())
        if self.format:
            lines = [f"{self.path}: format {self.format} ({self.container})"]
            lines.append(f"  detected by: {', '.join(self.evidence[:4])}")
        else:
            lines = [f"{self.path}: unknown format ({self.container})"]
            lines += [f"  reason: {reason.removeprefix(f'{self.path}: ')}" for reason in self.evidence[:4]]
        if self.wrapper:
            lines.append(f"  wrapper: {self.wrapper}")
        if self.prefixes:
            lines.append(f"  stripped prefixes: {' '.join(self.prefixes)}")
        if self.other_wrappers:
            lines.append(f"  also in the file: {', '.join(map(repr, self.other_wrappers))} (choose with wrapper=)")
        lines += [f"  {name} tower: {tower}" for name, tower in self.towers.items()]
        if self.towers:
            lines.append(f"  fits model configurations: {some(self.configurations, 6) or 'none of the known ones'}")
        own = {self.wrapper}
        lines += [
            f"  also in the file: {part.tower} tower ({part.format}) under {part.prefix!r}"
            for part in self.parts
            if part.prefix not in own
        ]
        dtypes = ", ".join(f"{n} {name}" for name, n in self.dtypes.items())
        lines.append(f"  tensors: {len(self.tensors)} ({dtypes}), {count:,} elements")
        lines += [f"  setting: {name} = {value}" for name, value in self.config_hints.items() if value != ""]
        lines += [f"  note: {name}" for name, value in self.config_hints.items() if value == ""]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(printable, lines))
