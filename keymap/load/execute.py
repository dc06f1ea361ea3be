"""Carrying a plan out into a model's own memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import torch
from torch.autograd.graph import increment_version

from keymap.errors import KeymapError, LoadError, PlanError, VerifyError, some
from keymap.language.layout import Piece
from keymap.language.rules import Check
from keymap.load.copying import Tensors, copy_pieces, value_of
from keymap.load.direct import Run, batches, read, run_of
from keymap.load.preflight import failed
from keymap.load.transposed import Scratch, Strip, carry, parts, strips_of
from keymap.plan.model import ModelView, has_memory
from keymap.plan.plan import Entry, Plan
from keymap.read import SourceFile

__all__ = ["files_of", "load_plan", "refuse_copies", "refuse_unwritable", "verify_plan"]

_MADE_FIRST = 1 << 25  # bytes of temporaries that are made before anything is written
_AHEAD = 64  # batches that wait to be read
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
    used = {p.source for entry in plan.entries for p in entry.layout.pieces}
    lazy = sorted((tensors[source] for source in used if source is not None), key=lambda one: one.position)
    checks = {id(one.values): check for one in lazy if (check := one.check) is not None}  # several may share a member
    if checks:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib releases the interpreter's lock
            list(pool.map(lambda check: check(), checks.values()))
    return [check for check, _ in bad]


def _simple(entry: Entry, target: torch.Tensor) -> bool:
    """True where pieces can be copied straight into the target's memory, which a class of tensors may lack."""
    for piece in entry.layout.pieces:
        if piece.computed and (piece.source is not None or piece.add):
            return False
    return entry.resize is None and has_memory(target) and target.is_contiguous()


def load_plan(plan: Plan, tensors: Tensors, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy every piece into the model's memory, on all threads.

    Bytes that file and model have in common are read straight into the model; rows whose elements change their order
    are read a few at a time. What is left, as conversions of dtype, deflated members and models on other devices, torch
    copies source by source in the order of the file; pages that were copied are given back on the way. Only resized and
    computed tensors, and targets that are not contiguous, take a temporary: some megabytes of them before anything is
    written, the others one at a time.

    Raises:
        LoadError: something went wrong meanwhile, as memory that was not to be had; it says whether the model is half
            loaded.
        CheckpointError: the file was written to meanwhile; the model is half loaded then, and the error says so.
        KeyboardInterrupt: the load was interrupted; the model is half loaded then, and the error says so.
    """
    files = files_of(tensors)
    half = False
    try:
        for file in files:
            file.check_unchanged()
        ways = _sort(plan, tensors, targets)
        made, room = dict[str, torch.Tensor](), _MADE_FIRST
        for entry in ways.others:
            room -= prod(entry.shape) * entry.dtype.itemsize
            if room >= 0:
                made[entry.key] = value_of(entry, tensors)
        half = True
        _write(tensors, targets, ways)
        for entry in ways.others:
            value = made.pop(entry.key) if entry.key in made else value_of(entry, tensors)
            with torch.no_grad():
                targets[entry.key].copy_(value)
        for file in files:
            file.check_unchanged()
    except KeyboardInterrupt:
        if not half:
            raise
        raise KeyboardInterrupt(f"{plan.file}: the load was interrupted, and the model is half loaded") from None
    except KeymapError:
        raise
    except Exception as error:
        state = "the model is half loaded: load again" if half else "nothing was changed"
        raise LoadError(f"{plan.file}: {type(error).__name__} while it was loaded ({error}); {state}") from error


@dataclass
class _Ways:
    """A plan by the ways in which it is carried out.

    Attributes:
        runs: bytes that are read straight into tensors.
        strips: rows that are read, and written in another order.
        by_source: pieces that are copied from each source, in the order of the file; None for constants.
        others: what takes a temporary.
    """

    runs: list[Run] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    by_source: dict[str | None, list[tuple[str, Piece]]] = field(default_factory=dict)
    others: list[Entry] = field(default_factory=list)


def _sort(plan: Plan, tensors: Tensors, targets: Mapping[str, torch.Tensor]) -> _Ways:
    """Which way each piece of a plan takes."""
    ways = _Ways()
    pieces: dict[str | None, list[tuple[str, Piece]]] = {}
    for entry in plan.entries:
        target = targets[entry.key]
        if not _simple(entry, target):
            ways.others.append(entry)
            continue
        for piece in entry.layout.pieces:
            run = run_of(piece, tensors[piece.source], target) if piece.source is not None else None
            if run is not None:
                ways.runs.append(run)
                continue
            strips = strips_of(piece, tensors[piece.source], target) if piece.source is not None else []
            ways.strips += strips
            if not strips:
                pieces.setdefault(piece.source, []).append((entry.key, piece))
    for source in sorted(pieces, key=lambda key: -1 if key is None else tensors[key].position):
        ways.by_source[source] = pieces[source]
    return ways


def _write(tensors: Tensors, targets: Mapping[str, torch.Tensor], ways: _Ways) -> None:
    """Carry out all that takes no temporary; at the end, however it comes, no thread writes any more."""
    inference = torch.is_inference_mode_enabled()
    scratch = Scratch()

    def carried(part: Sequence[Strip]) -> None:
        with torch.inference_mode() if inference else torch.no_grad():  # which hold for one thread
            for strip in part:
                carry(strip, scratch)

    written = [run.target for run in ways.runs] + [strip.target for strip in ways.strips if not strip.first]
    increment_version(written)  # autograd does not see that they are written to
    pool = ThreadPoolExecutor(torch.get_num_threads())
    under_way: list[Future[None]] = []
    try:
        under_way += [pool.submit(carried, part) for part in parts(ways.strips)]
        for batch in batches(ways.runs):
            if len(under_way) >= _AHEAD:  # of many tiny tensors the places take more memory than themselves
                under_way[-_AHEAD].result()
            under_way.append(pool.submit(read, batch))
        for sources in _neighbours(ways.by_source, tensors):
            for source in sources:
                tensor = None if source is None else tensors[source].read()
                with torch.no_grad():
                    for key, piece in ways.by_source[source]:
                        copy_pieces([piece], tensor, targets[key].detach())
            _give_back(sources, tensors)
        for done in under_way:
            done.result()
    finally:
        _finish(under_way)
        pool.shutdown(wait=False)


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
        file.release_pages(first, last)


def _finish(under_way: Sequence[Future[None]]) -> None:
    """Wait until no thread writes any more, however often the user interrupts; what has not begun is left out."""
    while True:
        try:
            for waiting in under_way:
                waiting.cancel()
            wait(under_way)
            return
        except KeyboardInterrupt:  # the first one is on its way to the caller
            continue


def files_of(tensors: Tensors) -> list[SourceFile]:
    """The files that tensors are mapped from, each once."""
    return list({id(region[0]): region[0] for lazy in tensors.values() if (region := lazy.region) is not None}.values())


def refuse_unwritable(view: ModelView, plan: Plan) -> None:
    """What a copying load cannot write to.

    Raises:
        PlanError: a tensor of the plan has no memory of its own: it is on the meta device, expanded, a copy that a
            hook gives, or was made in inference mode.
    """
    refuse_copies(view, plan)
    empty, overlapping, frozen = list[str](), list[str](), list[str]()
    regions: list[tuple[int, int, str]] = []
    inference = torch.is_inference_mode_enabled()
    for entry in plan.entries:
        key, target = entry.key, view.tensors[entry.key]
        if target.is_meta:
            empty.append(key)
            continue
        if not inference and target.is_inference():
            frozen.append(key)
        if not target.is_contiguous():
            overlapping += [key] * _overlaps(target)
        elif target.numel() and has_memory(target):
            start = target.data_ptr()
            regions.append((start, start + target.nbytes, key))
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
        what = "are expanded or overlapping views" if overlapping else "were made under torch.inference_mode"
        raise PlanError(
            f"{plan.file}: tensors of the model {what} and cannot be written to: {some(overlapping or frozen)}; "
            f"pass assign=True, or clone them first"
        )


def _overlaps(tensor: torch.Tensor) -> bool:
    """True where two elements may lie in one place."""
    reach = 0
    for step, length in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (length - 1)
    return False


def refuse_copies(view: ModelView, plan: Plan) -> None:
    """What a load would give to nobody.

    Raises:
        PlanError: a tensor of the plan is none that a module holds, but a copy that a hook gives.
    """
    own: set[int] = set()
    for module in view.modules.values():
        own.update(map(id, module._parameters.values()))
        own.update(map(id, module._buffers.values()))
    copies = [entry.key for entry in plan.entries if id(view.tensors[entry.key]) not in own]
    if copies:
        raise PlanError(
            f"{plan.file}: state_dict() of the model does not give the model's own tensors (a hook?), so nothing "
            f"would be loaded: {some(copies)}; load into the model without the hook"
        )
