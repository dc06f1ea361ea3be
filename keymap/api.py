"""The public functions: one way through, read → unwrap → detect → plan → verify → load → report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keymap.carry import materialise
from keymap.detect import Detection, detect, spelling
from keymap.errors import KeymapError, MappingError, PlanError, VerifyError
from keymap.load import assign_plan, load_plan, refuse_meta, verify_plan
from keymap.mapping import Mapping as Format
from keymap.model import ModelView, view_model
from keymap.pieces import Layout, whole
from keymap.plan import Plan, Request, make_plan
from keymap.read import LazyTensor, open_checkpoint
from keymap.registry import Registry, registry
from keymap.translate import Translated, from_hub, incomplete, respell, to_hub
from keymap.unwrap import Unwrapped, unwrap
from keymap.verify import failed

__all__ = [
    "Inspection",
    "LoadResult",
    "Report",
    "convert_state_dict",
    "inspect_checkpoint",
    "load_checkpoint",
    "plan_load",
]

PathLike = str | os.PathLike[str]


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
        spellings: how each tower is spelled in the hub's terms.
        tensors: shape and dtype of every tensor, by the key in the file.
        dtypes: how many tensors there are of each dtype.
        config_hints: what the format's configuration file beside the checkpoint tells.
    """

    path: str
    container: str
    format: str | None
    evidence: tuple[str, ...]
    wrapper: str
    other_wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    spellings: Mapping[str, str]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    dtypes: Mapping[str, int]
    config_hints: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; tensors as ``{key: {"shape": [...], "dtype": "float32"}}``."""
        plain = {name: getattr(self, name) for name in ("path", "container", "format", "wrapper")}
        for name in ("evidence", "other_wrappers", "prefixes"):
            plain[name] = list(getattr(self, name))
        for name in ("spellings", "dtypes", "config_hints"):
            plain[name] = dict(getattr(self, name))
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
            lines.append(f"  also in the file: {', '.join(self.other_wrappers)}")
        for tower, name in self.spellings.items():
            lines.append(f"  {tower} tower: {name}")
        dtypes = ", ".join(f"{n} {name}" for name, n in self.dtypes.items())
        lines.append(f"  {len(self.tensors)} tensors ({dtypes}), {count:,} elements")
        lines += [f"  {name}: {value}" for name, value in self.config_hints.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint on its way to a plan."""

    known: Registry
    file: str
    container: str
    unwrapped: Unwrapped
    found: Detection


def _known_with(mapping: PathLike | None) -> tuple[Registry, str | None]:
    """The registry, with a mapping file of the caller's if one is named, and the name to look for."""
    known = registry()
    if mapping is None:
        return known, None
    name = os.fspath(mapping)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        if known.get(name).kind not in ("format", "hub"):
            formats = ", ".join(sorted(m.name for m in known.formats))
            raise MappingError(f"{name} is a {known.get(name).kind}, no format of a file; formats: {formats}")
        return known, name
    file = Path(name)
    own = next((m for m in known.mappings.values() if Path(m.file).resolve() == file.resolve()), None)
    if own is not None:
        return known, own.name
    if not file.is_file():
        raise MappingError(f"{name}: there is no such mapping file")
    extended = Registry(dict(known.mappings), dict(known.files))
    return extended, extended.add([file])[0].name


def _layouts(tensors: Mapping[str, LazyTensor]) -> dict[str, Layout]:
    return {key: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}


def _open(path: PathLike, weights_only: bool, mapping: PathLike | None, wrapper: str | None) -> _Opened:
    known, wanted = _known_with(mapping)
    checkpoint = open_checkpoint(path, weights_only)
    file = str(checkpoint.path)
    unwrapped = unwrap(checkpoint.tree, known.containers, file, wrapper)
    found = detect(known, _layouts(unwrapped.tensors), wanted, file=file)
    return _Opened(known, file, checkpoint.container, unwrapped, found)


def _config(file: str, found: Detection) -> dict[str, Any]:
    """What the format's configuration file beside a checkpoint tells of the image grid."""
    named = found.mapping.config
    path = Path(file).parent / named["file"] if named else None
    if path is None or not path.is_file() or path.stat().st_size > 1 << 20:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"config": f"{path.name} could not be read"}
    told: dict[str, Any] = {}
    for name in ("image_size", "patch_size"):
        value: Any = data
        for part in named[name].split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int) and value > 0:
            told[name] = (value, value)
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value):
            told[name] = (value[0], value[1])
    return told


def _grid(told: Mapping[str, Any]) -> tuple[int, int] | None:
    if "image_size" not in told or "patch_size" not in told:
        return None
    return told["image_size"][0] // told["patch_size"][0], told["image_size"][1] // told["patch_size"][1]


def _request(
    file: str,
    strict: bool,
    towers: Sequence[str] | str | None,
    source_grid: Sequence[int] | None,
    facts: Mapping[str, int] | None,
) -> Request:
    if source_grid is not None and (len(source_grid) != 2 or any(not isinstance(n, int) or n < 1 for n in source_grid)):
        raise PlanError(f"source_grid={source_grid!r}: give (h, w), the rows and columns of patches")
    chosen = (towers,) if isinstance(towers, str) else tuple(towers) if towers is not None else None
    grid = (source_grid[0], source_grid[1]) if source_grid is not None else None
    return Request(file, strict, chosen, grid, facts or {})


def _plan(opened: _Opened, model: ModelView, request: Request) -> Plan:
    grid = _grid(_config(opened.file, opened.found))
    return make_plan(opened.known, opened.found, opened.unwrapped, opened.container, model, request, grid)


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | None = None,
    source_grid: tuple[int, int] | None = None,
    assign: bool = False,
    facts: Mapping[str, int] | None = None,
) -> LoadResult:
    """Load a checkpoint of any known format into an OpenCLIP model.

    Args:
        model: a CLIP, CustomTextCLIP or CoCa model, or any module with their keys.
        checkpoint_path: a .pt, .pth, .bin, .safetensors, .npz file; what it is, its content tells.
        strict: every key of the model must be filled, and every key of the file used or known to carry no
            weights. ``False`` loads what fits and reports the rest; it still refuses when almost nothing
            (less than a tenth) of a tower in the file would load.
        weights_only: refuse a pickle that asks for anything but tensors and plain data.
        device: where tensors go with ``assign=True``; a copying load writes where the model's tensors are.
        mapping: name of the source format, or path of a YAML file; None detects it.
        towers: load only these: ``("image",)``, ``("text",)``; ``strict`` holds within them.
        wrapper: which state dict of the file to take, as ``"state_dict_ema"``.
        source_grid: (h, w) of the file's position embedding, in patches, where nothing tells it.
        assign: hand the file's tensors over instead of copying; makes a model on the meta device usable.
        facts: what no weight tells, as ``{"image.heads": 12}``.

    Returns:
        The keys left over, and ``.report``.

    Raises:
        KeymapError: the load is refused (see its subclasses). The model is then bit for bit what it was.
    """
    start = time.perf_counter()
    try:
        target_device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"device={device!r} is no device of torch: {error}") from None
    opened = _open(checkpoint_path, weights_only, mapping, wrapper)
    view = view_model(model, opened.known.hub)
    plan = _plan(opened, view, _request(opened.file, strict, towers, source_grid, facts))
    tensors = opened.unwrapped.tensors
    if not assign:
        refuse_meta(view.tensors, plan)
    bad = verify_plan(plan, tensors, strict)
    if bad:
        plan = replace(
            plan,
            unexpected_keys=(*plan.unexpected_keys, *bad),
            dropped={key: why for key, why in plan.dropped.items() if key not in bad},
        )
    made: list[str] = []
    if assign:
        made = assign_plan(plan, tensors, model, target_device)
    else:
        load_plan(plan, tensors, view.tensors)
    return LoadResult(Report(plan, time.perf_counter() - start, tuple(made)))


def plan_load(
    model: nn.Module,
    checkpoint_path: PathLike,
    strict: bool = True,
    *,
    mapping: PathLike | None = None,
    towers: Sequence[str] | str | None = None,
    wrapper: str | None = None,
    source_grid: tuple[int, int] | None = None,
    facts: Mapping[str, int] | None = None,
) -> Plan:
    """A dry run of `load_checkpoint`: the plan, made from names, shapes and dtypes alone.

    Returns:
        The plan, with ``.pieces``, ``.missing_keys``, ``.unexpected_keys`` and ``.explain(key=None)``.

    Raises:
        KeymapError: as the load would, apart from values that only the load reads.
    """
    opened = _open(checkpoint_path, True, mapping, wrapper)
    view = view_model(model, opened.known.hub)
    return _plan(opened, view, _request(opened.file, strict, towers, source_grid, facts))


def inspect_checkpoint(path: PathLike, *, weights_only: bool = True, wrapper: str | None = None) -> Inspection:
    """What a checkpoint is: container, format, wrappers, keys. No weights are read.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    known = registry()
    checkpoint = open_checkpoint(path, weights_only)
    file = str(checkpoint.path)
    unwrapped = unwrap(checkpoint.tree, known.containers, file, wrapper)
    tensors = {key: (lazy.shape, lazy.dtype) for key, lazy in unwrapped.tensors.items()}
    name: str | None = None
    hints: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    try:
        found = detect(known, _layouts(unwrapped.tensors), file=file)
    except KeymapError as error:
        evidence: tuple[str, ...] = error.faults
    else:
        name, evidence, hints = found.mapping.name, found.evidence, _config(file, found)
        hub = to_hub(found, {}).tensors
        spellings = {tower: s for tower in known.hub.spellings if (s := spelling(known.hub, tower, hub)) is not None}
    return Inspection(
        file,
        checkpoint.container,
        name,
        evidence,
        unwrapped.wrapper,
        unwrapped.others,
        unwrapped.prefixes,
        spellings,
        tensors,
        dict(Counter(str(dtype).removeprefix("torch.") for _, dtype in tensors.values())),
        hints,
    )


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    to: str,
    *,
    mapping: PathLike | None = None,
    facts: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Rewrite a state dict in memory, from any known format to another.

    Args:
        state_dict: tensors by key; it is not changed.
        to: the name of a format; or of a respelling, which gives the hub's keys with that tower in the second
            spelling (``open_clip`` writes ``text.*`` as CustomTextCLIP has it, ``open_clip_flat`` as CLIP has it).
        mapping: name of the source format, or path of a YAML file; None detects it.
        facts: what no weight tells and the target's shapes need, as ``{"image.heads": 12, "text.heads": 8}``.

    Returns:
        New dict. Tensors that are only renamed are the caller's own; the others are new, contiguous.

    Raises:
        KeymapError: the source is not whole, a key has no place in the target, or a fact is lacking.
    """
    known, wanted = _known_with(mapping)
    target = known.get(to)
    if not target.rules:
        raise MappingError(f"{to} is no format that can be written (it is {target.kind})")
    bad = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if bad:
        raise PlanError(f"the state dict holds values that are no tensors: {', '.join(map(str, bad[:8]))}")
    lazy = {
        key: LazyTensor(tuple(value.shape), value.dtype, lambda value=value: value.detach())  # type: ignore[misc]
        for key, value in state_dict.items()
    }
    unwrapped = unwrap(lazy, known.containers, "the state dict")
    found = detect(known, _layouts(unwrapped.tensors), wanted, facts)
    now = to_hub(found, facts or {})
    now.faults += incomplete(found.mapping, now.rules, now.source_keys)
    _bring(known, now, target)
    if target.kind == "format":
        from_hub(known.hub, target, now, facts or {})
    faults = [fault.text for fault in now.faults]
    if now.unowned:
        faults.append(f"{len(now.unowned)} keys have no place in {to}: {', '.join(now.unowned[:8])}")
    if faults:
        raise PlanError(f"the state dict (format {found.mapping.name}) cannot be written as {to}", faults)

    def read(key: str) -> torch.Tensor:
        return unwrapped.tensors[key].read()

    wrong = failed(now.checks, read)
    if wrong:
        raise VerifyError(f"the state dict cannot be written as {to}", [text for _, text in wrong])
    return {key: _converted(target.dtypes, target.shapes, key, layout, read) for key, layout in now.tensors.items()}


def _bring(known: Registry, now: Translated, target: Format) -> None:
    """Each tower to a spelling that the target speaks; to the hub, towers go as respellings start."""
    for tower in known.hub.spellings:
        if target.kind == "respelling":
            wanted: tuple[str, ...] = (target.between[1],) if tower == target.tower else ()
        elif target.kind == "hub":
            here = spelling(known.hub, tower, now.tensors)
            first = {m.between[0] for m in known.mappings.values() if m.kind == "respelling" and m.tower == tower}
            wanted = tuple(s for s in first if tower == "text" and here and known.path(tower, here, s))
        else:
            wanted = target.speaks.get(tower, ())
        respell(known, now, {tower: wanted})


def _converted(
    dtypes: Iterable[tuple[Any, str]],
    shapes: Iterable[tuple[Any, tuple[int, ...]]],
    key: str,
    layout: Layout,
    read: Any,
) -> torch.Tensor:
    """One tensor of the result, in the dtype and shape that the format fixes for it."""
    source = layout.sources[0] if layout.copied_whole else None
    value: torch.Tensor | None = None
    if source is not None:
        original: torch.Tensor = read(source)
        if original.numel() == layout.pieces[0].numel:
            value = original.reshape(layout.shape)
    if value is None:
        value = materialise(layout, read)
    fixed = next((name for side, name in dtypes if side.match(key) is not None), None)
    shape = next((s for side, s in shapes if side.match(key) is not None), None)
    if fixed is not None:
        value = value.to(getattr(torch, fixed))
    return value.reshape(shape) if shape is not None and value.numel() == 1 else value
