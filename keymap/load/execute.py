"""Execute a plan: copy every piece into the model's own memory, on all threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import increment_version

from keymap.errors import CheckpointError, KeymapError, LoadError
from keymap.language.layout import Piece
from keymap.load.copying import Tensors, copy_pieces, files_of, value_of
from keymap.load.direct import ByteRange, batches, byte_range, read_batch
from keymap.load.progress import Counter, Progress, ProgressError
from keymap.load.threads import Task, Tasks, on_threads
from keymap.load.transposed import Scratch, Strip, copy_strip, strip_batches, strips_of
from keymap.plan.model import has_memory
from keymap.plan.plan import Entry, Plan
from keymap.read import SourceFile

__all__ = ["load_plan"]

_MADE_FIRST = 1 << 25  # bytes of temporaries that are made before anything is written
_MAX_WAITING = 64  # batches that wait to be read
_MAX_MAPPED = 1 << 24  # bytes of the file that are copied before their pages are released


@dataclass(eq=False, repr=False)
class _Schedule:
    """A plan's pieces, by the way in which they are copied.

    Attributes:
        direct: bytes that are read directly into tensors.
        strips: rows that are read, and written in another order.
        by_source: pieces that torch copies from each source, in the order of the file; None for constants.
        temporary: entries that need a temporary tensor.
    """

    direct: list[ByteRange] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    by_source: dict[str | None, list[tuple[str, Piece]]] = field(default_factory=dict)
    temporary: list[Entry] = field(default_factory=list)


class _Running:
    """Tasks in the order in which they were submitted; the calling thread counts the bytes of those that are done."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._tasks: list[tuple[Task, int]] = []
        self._counted = 0

    def add(self, task: Task, nbytes: int) -> None:
        self._tasks.append((task, nbytes))

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many tasks are not done; raise what one of them raised."""
        while len(self._tasks) - self._counted > most:
            self._count()

    def look(self) -> None:
        """Count the tasks that are done, without waiting."""
        while self._counted < len(self._tasks) and self._tasks[self._counted][0].done:
            self._count()

    def _count(self) -> None:
        task, nbytes = self._tasks[self._counted]
        task.result()
        self._counted += 1
        self._counter.add(nbytes)


def load_plan(
    plan: Plan, tensors: Tensors, targets: Mapping[str, torch.Tensor], progress: Progress | None = None
) -> None:
    """Copy every piece into the model's memory, on all threads.

    Bytes that are the same in file and model are read directly into the model; rows whose elements change their order
    are read a few at a time. Torch copies the rest source by source in the order of the file: dtype conversions,
    deflated members, models on other devices. Only resized and computed tensors, and targets that are not contiguous,
    need a temporary: some megabytes of them before anything is written, the others one at a time.

    ``progress`` is called as `Counter` says; the bytes are those of the model's tensors.

    Raises:
        LoadError: the load failed, for example out of memory; the text says whether the model is half loaded.
        CheckpointError: the file was written to during the load; the model is half loaded, and the text says so.
        KeyboardInterrupt: the load was interrupted; the text says where the model is half loaded.
    """
    files = files_of(tensors)
    half = False
    try:
        for file in files:
            file.check_unchanged()
        schedule = _schedule(plan, tensors, targets)
        made, room = dict[str, torch.Tensor](), _MADE_FIRST
        for entry in schedule.temporary:
            room -= entry.nbytes
            if room >= 0:
                made[entry.key] = value_of(entry, tensors)
        counter = Counter(progress, sum(entry.nbytes for entry in plan.entries))
        half = True
        _copy_all(tensors, targets, schedule, counter)
        for entry in schedule.temporary:
            value = made.pop(entry.key) if entry.key in made else value_of(entry, tensors)
            with torch.no_grad():
                targets[entry.key].copy_(value)
            counter.add(entry.nbytes)
        for file in files:
            file.check_unchanged()
    except KeyboardInterrupt:
        if not half:
            raise
        raise KeyboardInterrupt(f"{plan.file}: the load was interrupted, and the model is half loaded") from None
    except CheckpointError as error:
        if not half:
            raise
        raise CheckpointError(f"{error.summary}; the model is half loaded", error.faults) from error
    except KeymapError:
        raise
    except Exception as error:
        state = "the model is half loaded: load again" if half else "nothing was changed"
        if isinstance(error, ProgressError):
            raise LoadError(f"{plan.file}: {error}; {state}") from error.__cause__
        raise LoadError(f"{plan.file}: the load failed with {type(error).__name__} ({error}); {state}") from error


def _schedule(plan: Plan, tensors: Tensors, targets: Mapping[str, torch.Tensor]) -> _Schedule:
    """Decide how each piece of a plan is copied."""
    schedule = _Schedule()
    pieces: dict[str | None, list[tuple[str, Piece]]] = {}
    for entry in plan.entries:
        target = targets[entry.key]
        if not _copies_in_place(entry, target):
            schedule.temporary.append(entry)
            continue
        for piece in entry.layout.pieces:
            same_bytes = byte_range(piece, tensors[piece.source], target) if piece.source is not None else None
            if same_bytes is not None:
                schedule.direct.append(same_bytes)
                continue
            strips = strips_of(piece, tensors[piece.source], target) if piece.source is not None else []
            schedule.strips += strips
            if not strips:
                pieces.setdefault(piece.source, []).append((entry.key, piece))
    for source in sorted(pieces, key=lambda key: -1 if key is None else tensors[key].position):
        schedule.by_source[source] = pieces[source]
    return schedule


def _copies_in_place(entry: Entry, target: torch.Tensor) -> bool:
    """True where pieces can be copied straight into the target's memory, which a subclass of tensors may lack."""
    for piece in entry.layout.pieces:
        if piece.computed and (piece.source is not None or piece.add):
            return False
    return entry.resize is None and has_memory(target) and target.is_contiguous()


def _tell_autograd(written: Sequence[torch.Tensor]) -> None:
    """Count writes that autograd does not see."""
    try:
        increment_version(written)
    except RuntimeError:  # an older torch takes one tensor, and none that was made in inference mode
        for tensor in written:
            if not tensor.is_inference():
                increment_version(tensor)


def _copy_all(tensors: Tensors, targets: Mapping[str, torch.Tensor], schedule: _Schedule, counter: Counter) -> None:
    """Copy all that needs no temporary; no thread writes any more when this returns or raises."""
    inference = torch.is_inference_mode_enabled()
    scratch = Scratch()

    def copy_strips(batch: Sequence[Strip]) -> None:
        with torch.inference_mode() if inference else torch.no_grad():  # both hold for one thread only
            for strip in batch:
                copy_strip(strip, scratch)

    written = [one.target for one in schedule.direct] + [strip.target for strip in schedule.strips if not strip.first]
    _tell_autograd(written)

    def copy(pool: Tasks) -> None:
        running = _Running(counter)
        for strips in strip_batches(schedule.strips):
            running.add(pool.submit(copy_strips, strips), sum(strip.written for strip in strips))
        for batch in batches(schedule.direct):
            running.wait(most=_MAX_WAITING - 1)  # the buffers of many tiny tensors take more memory than the tensors
            running.add(pool.submit(read_batch, batch), batch.nbytes)
            running.look()
        for sources in _source_groups(schedule.by_source, tensors):
            for source in sources:
                tensor = None if source is None else tensors[source].read()
                with torch.no_grad():
                    for key, piece in schedule.by_source[source]:
                        copy_pieces([piece], tensor, targets[key].detach())
            _release_pages(sources, tensors)
            copied = [(targets[key], piece) for source in sources for key, piece in schedule.by_source[source]]
            counter.add(sum(piece.numel * target.dtype.itemsize for target, piece in copied))
            running.look()
        running.wait()

    on_threads(copy)


def _source_groups(sources: Iterable[str | None], tensors: Tensors) -> Iterator[list[str | None]]:
    """Sources in order, in groups of some megabytes of the file."""
    group: list[str | None] = []
    size = 0
    for source in sources:
        group.append(source)
        region = tensors[source].region if source is not None else None
        size += region[2] - region[1] if region is not None else 0
        if size >= _MAX_MAPPED:
            yield group
            group, size = [], 0
    if group:
        yield group


def _release_pages(sources: Iterable[str | None], tensors: Tensors) -> None:
    """Release the pages of the file that these sources were read from."""
    spans: dict[int, tuple[SourceFile, int, int]] = {}
    for source in sources:
        region = tensors[source].region if source is not None else None
        if region is not None:
            file, start, stop = region
            _, first, last = spans.get(id(file), region)
            spans[id(file)] = (file, min(first, start), max(last, stop))
    for file, first, last in spans.values():
        file.release_pages(first, last)
