"""Carrying a plan out into a model's own memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.autograd.graph import increment_version

from keymap.carry import copy_pieces, materialise
from keymap.errors import PlanError, VerifyError, some
from keymap.model import modules_of
from keymap.pieces import Piece
from keymap.plan import Entry, Plan
from keymap.read import LazyTensor, SourceFile
from keymap.resize import resample
from keymap.rules import Check
from keymap.straight import Run, batches, opened, read, run_of
from keymap.verify import failed

__all__ = ["assign_plan", "load_plan", "refuse_unassignable", "refuse_unwritable", "verify_plan"]

Tensors = Mapping[str, LazyTensor]
_SMALL = 1 << 14  # elements of a piece that are not worth a thread
_RUN = 1 << 24  # bytes of the file that are copied before their pages are given back


def verify_plan(plan: Plan, tensors: Tensors, strict: bool) -> list[Check]:
    """Read what must be seen before anything is written: the plan's checks, and members that have a checksum.

    Returns:
        Checks that do not hold, for a load that is not strict; their sources are unexpected then.

    Raises:
        VerifyError: a check does not hold, under strict.
        CheckpointError: a member is corrupt.
    """
    bad = failed(plan.checks, lambda key: tensors[key].read())
    if bad and strict:
        raise VerifyError(
            f"{plan.file} (format {plan.format}) does not fit the model; nothing was changed",
            [*(text for _, text in bad), "strict=False loads the rest and reports these keys"],
        )
    used = {p.source for entry in plan.entries for p in entry.layout.pieces} - {None}
    checks = [check for source in used if source is not None and (check := tensors[source].check) is not None]
    if checks:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib releases the interpreter's lock
            list(pool.map(lambda check: check(), checks))
    return [check for check, _ in bad]


def _simple(entry: Entry, target: torch.Tensor) -> bool:
    """True where pieces can be copied straight into the target's memory."""
    plain = all(not p.computed or (p.source is None and not p.add) for p in entry.layout.pieces)
    return plain and entry.resize is None and target.is_contiguous()


def _value(entry: Entry, tensors: Tensors) -> torch.Tensor:
    """One tensor of the model, made in memory of its own, shape and dtype as the model's."""
    wanted = None if entry.resize is not None else entry.dtype
    value = materialise(entry.layout, lambda key: tensors[key].read(), wanted)
    if entry.resize is not None:
        value = resample(value, entry.resize)
    return value.reshape(entry.shape).to(entry.dtype)


def load_plan(plan: Plan, tensors: Tensors, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy every piece into the model's memory, source by source in the order of the file.

    Bytes that file and model have in common are read straight into the model, on all threads. Pieces whose axes
    change their order are shared out over threads too, because torch copies such on one; pages of the file that were
    copied are given back on the way. Only resized and computed tensors, and targets that are not contiguous, take a
    temporary, one at a time.

    Raises:
        CheckpointError: the file was written to meanwhile; the model is half loaded then, and the error says so.
        KeyboardInterrupt: the load was interrupted; the model is half loaded then, and the error says so.
    """
    files = _files(tensors)
    for file in files:
        file.unchanged()
    runs: list[Run] = []
    straight: list[torch.Tensor] = []
    by_source: dict[str | None, list[tuple[str, Piece]]] = {}
    others = []
    inference = torch.is_inference_mode_enabled()

    def copy(source: str | None) -> None:
        with torch.inference_mode() if inference else torch.no_grad():  # which hold for one thread
            tensor = None if source is None else tensors[source].read()
            for key, piece in by_source[source]:
                copy_pieces([piece], tensor, targets[key].detach())

    try:
        with opened(files) as handles, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for entry in plan.entries:
                target = targets[entry.key]
                if not _simple(entry, target):
                    others.append(entry)
                    continue
                for piece in entry.layout.pieces:
                    run = run_of(piece, tensors[piece.source], target) if piece.source is not None else None
                    if run is None or id(run.file) not in handles:
                        by_source.setdefault(piece.source, []).append((entry.key, piece))
                    else:
                        runs.append(run)
                        straight.append(target)
            order = sorted(by_source, key=lambda key: -1 if key is None else tensors[key].position)
            crossing = [s for s in order if s is not None and not tensors[s].streamed and _crosses(by_source[s])]
            shared = set(crossing) if torch.get_num_threads() > 1 else set()
            increment_version(straight)  # autograd does not see that they are written to
            under_way = [pool.submit(copy, source) for source in crossing if source in shared]
            under_way += [pool.submit(read, batch, handles[id(batch.file)]) for batch in batches(runs)]
            try:
                for sources in _neighbours([source for source in order if source not in shared], tensors):
                    for source in sources:
                        copy(source)
                    _give_back(sources, tensors)
                for done in under_way:
                    done.result()
            finally:
                for waiting in under_way:
                    waiting.cancel()
        for entry in others:
            with torch.no_grad():
                targets[entry.key].copy_(_value(entry, tensors))
        for file in files:
            file.unchanged()
        _give_back(order, tensors)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{plan.file}: the load was interrupted, and the model is half loaded") from None


def _files(tensors: Tensors) -> list[SourceFile]:
    """The files that tensors are mapped from, each once."""
    return list({id(region[0]): region[0] for lazy in tensors.values() if (region := lazy.region) is not None}.values())


def _crosses(pieces: Iterable[tuple[str, Piece]]) -> bool:
    """True where a source is large, and pieces of it are no runs of neighbouring elements."""
    return any(piece.source_strides[-1] != 1 and piece.numel > _SMALL for _, piece in pieces)


def _neighbours(sources: Iterable[str | None], tensors: Tensors) -> Iterator[list[str | None]]:
    """Sources in order, as many at a time as take some megabytes of the file."""
    run: list[str | None] = []
    size = 0
    for source in sources:
        run.append(source)
        region = tensors[source].region if source is not None else None
        size += region[2] - region[1] if region is not None else 0
        if size >= _RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


def _give_back(sources: Iterable[str | None], tensors: Tensors) -> None:
    """Give the pages of the file back that these sources were read from."""
    spans: dict[int, tuple[SourceFile, int, int]] = {}
    for source in sources:
        region = tensors[source].region if source is not None else None
        if region is not None:
            file, start, stop = region
            _, first, last = spans.get(id(file), region)
            spans[id(file)] = (file, min(first, start), max(last, stop))
    for file, first, last in spans.values():
        file.give_back(first, last)


class _Regions:
    """Memory that was handed over; no two tensors of the model may come to share any of it."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, int]] = []  # (first byte, byte after the last), in order, apart from each other

    def add(self, tensor: torch.Tensor) -> bool:
        """Take the memory of a contiguous tensor; False where some of it was taken before."""
        first = tensor.data_ptr()
        last = first + tensor.nbytes
        at = bisect_left(self.ends, (first, last))
        before = at > 0 and self.ends[at - 1][1] > first
        if before or (at < len(self.ends) and self.ends[at][0] < last):
            return False
        self.ends.insert(at, (first, last))
        return True


def _onto(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """One tensor on a device, straight from where it lies: the place for staging in pinned memory."""
    return value.to(device)


@torch.no_grad()
def assign_plan(
    plan: Plan, tensors: Tensors, model: nn.Module, targets: Mapping[str, torch.Tensor], device: torch.device
) -> list[str]:
    """Hand tensors over to the model instead of copying into its memory.

    A tensor that needs no operation is the file's own, mapped privately: training writes to a copy of its page,
    never to the file. The others are made one after the other: new memory comes no faster to several threads.

    Returns:
        The keys of the tensors that had to be made in memory of their own.
    """
    handed = _Regions()
    given: dict[str, torch.Tensor] = {}
    for entry in plan.entries:
        value = _as_it_is(entry, tensors)
        if value is not None and handed.add(value):
            given[entry.key] = value.view(entry.shape)
    others = [entry for entry in plan.entries if entry.key not in given]
    given |= {entry.key: _value(entry, tensors) for entry in others}
    new: dict[int, torch.Tensor] = {id(targets[key]): _onto(device, value) for key, value in given.items()}
    for file in _files(tensors):
        file.unchanged()
    modules = modules_of(model)
    for module in modules.values():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                value = new[id(parameter)]
                if not isinstance(value, nn.Parameter):  # once for tied parameters
                    value = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    new[id(parameter)] = value
                module._parameters[name] = value
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) in new:
                module._buffers[name] = new[id(buffer)]
    for path, buffer in _absent_buffers(modules, targets):
        owner, _, name = path.rpartition(".")
        modules[owner]._buffers[name] = causal_mask(buffer, device)
    return [entry.key for entry in others]


def _as_it_is(entry: Entry, tensors: Tensors) -> torch.Tensor | None:
    """The file's own tensor where it is what the model needs, element by element and in order; else None."""
    layout = entry.layout
    if not layout.copied_whole or entry.resize is not None or layout.pieces[0].source is None:
        return None
    lazy = tensors[layout.pieces[0].source]
    count = prod(lazy.shape)
    if lazy.dtype != entry.dtype or count != layout.pieces[0].numel:
        return None
    block = lazy.values_alone
    value = lazy.read() if block is None else block.mapped(lazy.dtype, count)
    return value if value.is_contiguous() else None


def _absent_buffers(
    modules: Mapping[str, nn.Module], stored: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """Buffers on the meta device that no state dict holds, by dotted path."""
    known = {id(value) for value in stored.values()}
    return [
        (f"{path}.{name}".removeprefix("."), buffer)
        for path, module in modules.items()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and id(buffer) not in known
    ]


def causal_mask(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An additive causal mask, (length, length): 0 on and below the diagonal, -inf above."""
    return torch.full(like.shape, float("-inf"), dtype=like.dtype, device=device).triu_(1)


def _own(model: nn.Module) -> set[int]:
    """The tensors that the model's modules hold, by id."""
    modules = modules_of(model).values()
    return {id(t) for module in modules for t in (*module._parameters.values(), *module._buffers.values())}


def refuse_unwritable(model: nn.Module, targets: Mapping[str, torch.Tensor], plan: Plan) -> None:
    """What a copying load cannot write to.

    Raises:
        PlanError: a tensor of the plan has no memory of its own: it is on the meta device, expanded, a copy that a
            hook gives, or was made in inference mode.
    """
    own = _own(model)
    copies, empty, overlapping, frozen = list[str](), list[str](), list[str](), list[str]()
    regions: list[tuple[int, int, str]] = []
    inference = torch.is_inference_mode_enabled()
    for entry in plan.entries:
        key, target = entry.key, targets[entry.key]
        if id(target) not in own:
            copies.append(key)
        if target.is_meta:
            empty.append(key)
            continue
        strides = target.stride()
        if 0 in strides and any(n > 1 and s == 0 for n, s in zip(target.shape, strides, strict=True)):
            overlapping.append(key)
        if not inference and target.is_inference():
            frozen.append(key)
        if target.is_contiguous() and target.numel():
            start = target.data_ptr()
            regions.append((start, start + target.nbytes, key))
    if copies:
        raise PlanError(
            f"{plan.file}: state_dict() of the model does not give the model's own tensors (a hook?), so nothing "
            f"would be loaded: {some(copies)}; load into the model without the hook"
        )
    if empty:
        raise PlanError(
            f"{plan.file}: {len(empty)} of the model's tensors are on the meta device and have no memory "
            f"({some(empty)}); pass assign=True, or model.to_empty(device='cpu') first"
        )
    regions.sort()
    partly = [
        f"{one} and {other}"
        for (first, last, one), (start, stop, other) in pairwise(regions)
        if start < last and (first, last) != (start, stop)
    ]
    if partly:
        raise PlanError(f"{plan.file}: tensors of the model share a part of their memory: {some(partly)}; clone them")
    if overlapping or frozen:
        what = "are expanded views" if overlapping else "were made under torch.inference_mode"
        raise PlanError(
            f"{plan.file}: tensors of the model {what} and cannot be written to: {some(overlapping or frozen)}; "
            f"pass assign=True, or clone them first"
        )


def refuse_unassignable(
    model: nn.Module, targets: Mapping[str, torch.Tensor], plan: Plan, masks: Collection[str], device: torch.device
) -> None:
    """What handing tensors over would leave without values.

    Args:
        targets: the model's tensors by key.
        masks: names of buffers that are causal masks, which can be made anew.

    Raises:
        PlanError: the device is meta, or tensors of the model on the meta device would get no values.
    """
    if device.type == "meta":
        raise PlanError(f"{plan.file}: device='meta' holds no values; name the device that the model is to use")
    lost = [path for path, _ in _absent_buffers(modules_of(model), targets) if path not in masks]
    written = {entry.key for entry in plan.entries}
    lost += [key for key, target in targets.items() if target.is_meta and key not in written]
    if lost:
        raise PlanError(
            f"{plan.file}: tensors of the model are on the meta device, and the load gives them no values: "
            f"{some(lost)}; build the model on a real device"
        )
