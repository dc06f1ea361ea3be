"""Write checkpoints: a file or a model, in any format that can be written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from keymap.errors import PlanError, VerifyError, WriteError, by_reason, printable, some
from keymap.language.format import Scalar
from keymap.load.copying import files_of
from keymap.load.preflight import failed_checks
from keymap.load.progress import Counter, Progress, ProgressError
from keymap.plan.export import Export, export, not_read, only_reading, target_format
from keymap.plan.live import open_model
from keymap.plan.model import state_of
from keymap.plan.plan import dtype_name
from keymap.plan.repository import repository_files, repository_of
from keymap.plan.request import (
    check_model,
    checked_flag,
    checked_settings,
    checked_wrapper,
    request_for_towers,
    sizes_of,
    with_own,
)
from keymap.source.hubs import PathLike, ask
from keymap.source.open import open_source
from keymap.source.registry import path_text
from keymap.source.settings import unlike_target
from keymap.write.containers import SUFFIXES, write_container
from keymap.write.place import check_folder, check_place, check_set, in_words, whole_files, whole_folder
from keymap.write.shards import index_text, shards_of
from keymap.write.tensors import Item, bytes_of_item, items_of, parse_dtype

__all__ = ["WriteResult", "convert_checkpoint", "save_checkpoint"]

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)


class WriteResult(NamedTuple):
    """What was written.

    Attributes:
        files: the files, an index last.
        format: of the files.
        source, source_format: what was converted.
        tensors: how many.
        nbytes: their size.
        casts: dtype conversions, and the number of tensors for each.
        dropped: keys of the source that hold no weights, and why.
        notes: which file of a folder was read, what was taken from within it, what else the file holds; names that a
            folder's configuration has from a recorded one of the same sizes; rows that pad a vocabulary; settings of
            the source that the format's code fixes otherwise.
    """

    files: tuple[str, ...]
    format: str
    source: str
    source_format: str
    tensors: int
    nbytes: int
    casts: Mapping[str, int]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        plain = self._asdict()
        lists = {"files": list(self.files), "notes": list(self.notes)}
        return {**plain, **lists, "casts": dict(self.casts), "dropped": dict(self.dropped)}

    def __str__(self) -> str:
        lines = [f"{self.source} (format {self.source_format}) -> {', '.join(self.files)} (format {self.format})"]
        lines.append(f"  {self.tensors} tensors, {self.nbytes:,} bytes")
        lines += [f"  cast: {count} tensors from {pair}" for pair, count in self.casts.items()]
        lines += [f"  ignored: {some(keys)}: {why}" for why, keys in by_reason(self.dropped).items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(printable, lines))


# long: signature and docstring; the body is the steps in order
def convert_checkpoint(
    source: PathLike,
    destination: PathLike,
    to: PathLike,
    *,
    mapping: PathLike | None = None,
    wrapper: str | None = None,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, Scalar] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    weights_only: bool = True,
    progress: Progress | None = None,
    hub: str | None = None,
) -> WriteResult:
    """Convert a checkpoint on disk to another format, one tensor after the other.

    Args:
        source: as ``checkpoint_path`` of `load_checkpoint`.
        destination: the file to write; its suffix gives the container: .safetensors, .pt (.pth, .bin) or .npz. A file
            that is there is replaced when the new one is whole. A name without a suffix is a folder: it gets the
            format's own layout, with its configuration made from shapes, facts and the source's configuration.
        to: the format to write, as in `convert_state_dict`.
        mapping, wrapper, towers: as in `convert_state_dict`.
        facts: as in `convert_state_dict`; for a folder also settings that are words, fractions or (h, w), for example
            ``{"image.activation": "quick_gelu", "image.eps": 1e-5, "image.size": (224, 448)}``.
        dtype: the dtype of floating tensors, for example ``"float16"``; None keeps that of the source. A value that
            would become infinite is refused.
        max_shard_size: bytes, or a text such as ``"5GB"``: cut .safetensors into shards with an index, named as
            transformers names them. None writes one file.
        overwrite: write into a folder that is not empty, and replace the files of an earlier set of shards.
        weights_only: as in `load_checkpoint`.
        progress: called in this thread with the bytes that are written and the bytes in all: first ``(0, total)``,
            last ``(total, total)``, never with fewer bytes than before. An exception that it raises ends the
            conversion with a WriteError, whose cause it is, and nothing is written.
        hub: as in `convert_state_dict`.

    Returns:
        The files and what they hold.

    Raises:
        KeymapError: the source or the target is refused (see `convert_state_dict`), or the file cannot be written.
            Then the destination is what it was.
    """
    asked = ask(hub, mapping, _name(to))
    target, place = target_format(asked.known, asked.to), _destination(destination)
    opened = open_source(source, checked_flag("weights_only", weights_only), asked, checked_wrapper(wrapper))
    known, reading = opened.known, only_reading(opened)
    given = with_own(checked_settings(facts, known), reading.settings.facts, known.hub, opened.file)
    planned = export(reading, target, request_for_towers(towers, known.hub), sizes_of(given))
    sources = [Path(opened.file), *(file.path for file in files_of(reading.unwrapped.tensors))]
    result = _written(planned, place, given, sources, _Options(dtype, max_shard_size, overwrite, progress))
    unlike = unlike_target(known.hub, target, reading.settings.facts, planned.hub)
    notes = (*result.notes, *unlike, *reading.notes, *reading.unwrapped.remarks, *not_read(opened, "converted"))
    return result._replace(notes=notes)


def save_checkpoint(
    model: nn.Module,
    destination: PathLike,
    to: PathLike,
    *,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, Scalar] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    hub: str | None = None,
) -> WriteResult:
    """Write a model's weights in a format, from any device, one tensor after the other.

    The arguments are those of `convert_checkpoint`; facts such as head counts are read from the model.

    Raises:
        KeymapError: as `convert_checkpoint`.
    """
    check_model(model)
    state = state_of(model)
    asked = ask(hub, None, _name(to), state.tensors)
    known = asked.known
    target, place = target_format(known, asked.to), _destination(destination)
    opened, own = open_model(model, known, state)
    reading = only_reading(opened)
    stated = {**reading.settings.facts, **{name: (value, "the model") for name, value in own.items()}}
    given = with_own(checked_settings(facts, known), stated, known.hub, opened.file)
    planned = export(reading, target, request_for_towers(towers, known.hub), sizes_of(given))
    result = _written(planned, place, given, [], _Options(dtype, max_shard_size, overwrite, progress), model)
    return result._replace(notes=(*result.notes, *unlike_target(known.hub, target, stated, planned.hub)))


def _name(to: PathLike) -> PathLike:
    if not isinstance(to, (str, os.PathLike)):
        raise PlanError(f"to={to!r}: pass the name of a format")
    return to


class _Options(NamedTuple):
    """How to write; see `convert_checkpoint`. With ``one_file`` what reads the weights knows no shards."""

    dtype: str | torch.dtype | None
    max_shard_size: int | str | None
    overwrite: bool
    progress: Progress | None
    one_file: bool = False


class _Place(NamedTuple):
    """Where to write: a file, or a folder in the format's layout."""

    path: Path
    is_folder: bool


def _destination(destination: object) -> _Place:
    text = path_text(destination, WriteError, "pass the path of the file or of the folder to write")
    path = Path(text)
    with in_words(path):
        return _place(path, text)


def _place(path: Path, text: str) -> _Place:
    if path.name in SUFFIXES:
        raise WriteError(f"{path}: has no name before its suffix; pass for example model{path.name}")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise WriteError(f"{path}: is a device, a pipe or a socket; pass the name of a file or of a folder")
    is_folder = text.endswith(("/", os.sep)) or (
        path.suffix not in SUFFIXES and (path.is_dir() or not (path.suffix or path.is_file()))
    )
    if not is_folder and path.suffix not in SUFFIXES:
        raise WriteError(
            f"{path}: its suffix shows no container that keymap writes; use one of {', '.join(SUFFIXES)}, or a name "
            f"without a suffix for a folder"
        )
    return _Place(path, is_folder)


def _written(
    planned: Export,
    place: _Place,
    given: Mapping[str, Scalar],
    sources: Sequence[Path],
    options: _Options,
    model: nn.Module | None = None,
) -> WriteResult:
    """Write a file or a folder."""
    path, options = place.path, options._replace(overwrite=checked_flag("overwrite", options.overwrite))
    if not place.is_folder:
        return _write(planned, path, {}, sources, options)
    repository = repository_of(planned)
    with in_words(path):
        check_folder(path, sources, options.overwrite)
    texts, notes = repository_files(planned, given, model)
    options = options._replace(one_file=repository.one_file)
    if path.is_dir():  # it stays: it may be the working folder of a process, or a file system may be mounted there
        result = _write(planned, path / repository.weights, texts, sources, options)
        return result._replace(notes=(*result.notes, *notes, *_left_there(path, result.files)))
    with whole_folder(path) as inner:
        result = _write(planned, inner / repository.weights, texts, sources, options)
    files = tuple(str(path / Path(file).name) for file in result.files)
    return result._replace(files=files, notes=(*result.notes, *notes))


def _left_there(folder: Path, files: Sequence[str]) -> tuple[str, ...]:
    """A note on what a folder holds beside the files that were written: a loader may take it for a part of them."""
    try:
        others = sorted({file.name for file in folder.iterdir()} - {Path(file).name for file in files})
    except OSError:  # what was asked for is written
        return ()
    return (f"the folder holds what was there before, too: {some(others)}",) if others else ()


def _bytes(size: int | str | None) -> int | None:
    """A size in bytes; "5GB" counts in powers of 1000 and "5GiB" in powers of 1024, as in transformers."""
    if size is None or (type(size) is int and size > 0):
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    number = 0
    if found is not None:
        number = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    if number < 1:
        raise PlanError(f"max_shard_size={size!r}: expected a number of bytes, or a text such as '5GB'")
    return number


def _write(
    planned: Export, path: Path, texts: Mapping[str, str], sources: Sequence[Path], options: _Options
) -> WriteResult:
    """Write the weights to a file or to shards, and texts beside them; the files appear when all are whole."""
    tensors = planned.source.unwrapped.tensors
    failed = failed_checks(planned.checks, lambda key: tensors[key].read())
    if failed:
        name = planned.target.name
        raise VerifyError(f"{planned.source.file} cannot be written as {name}", [text for _, text in failed])
    items = items_of(planned, parse_dtype(options.dtype))
    limit, nbytes = _bytes(options.max_shard_size), sum(item.nbytes for item in items.values())
    if options.one_file and limit is not None and nbytes > limit:
        raise PlanError(
            f"max_shard_size={options.max_shard_size!r} would cut {nbytes:,} bytes into shards, and what reads a "
            f"folder of {planned.target.name} knows no shards; leave out max_shard_size="
        )
    parts = shards_of(path, items, limit)
    index = {f"{path.name}.index.json": index_text(parts, items)} if len(parts) > 1 else {}
    beside = {path.with_name(name): text for name, text in {**index, **texts}.items()}
    files = [*parts, *beside]
    with in_words(path):
        for name in texts:
            check_place(path.with_name(name), sources)
        earlier = check_set(path, files[: len(parts) + len(index)], sources, options.overwrite)
    metadata = planned.source.metadata if path.suffix == ".safetensors" else {}
    with _stopped_by_progress(path), whole_files(files, earlier) as written:
        counter = Counter(options.progress, nbytes)
        for place, keys in zip(written, parts.values(), strict=False):
            some_items = {key: items[key] for key in keys}
            write_container(
                place,
                path.suffix,
                some_items,
                lambda key: bytes_of_item(key, items[key], tensors),
                metadata,
                counter.add,
            )
        for place, text in zip(written[len(parts) :], beside.values(), strict=True):
            place.write_text(text, encoding="utf-8")
    found = planned.source.found
    return WriteResult(
        tuple(map(str, files)),
        planned.target.name,
        planned.source.file,
        found.mapping.name if found is not None else "",
        len(items),
        counter.total,
        _casts(items),
        planned.dropped,
        planned.notes,
    )


@contextmanager
def _stopped_by_progress(path: Path) -> Iterator[None]:
    try:
        yield
    except ProgressError as error:
        raise WriteError(f"{path}: {error}; nothing was written") from error.__cause__


def _casts(items: Mapping[str, Item]) -> dict[str, int]:
    casts: dict[str, int] = {}
    for item in items.values():
        if item.dtype != item.target.layout.dtype:
            pair = f"{dtype_name(item.target.layout.dtype)} to {dtype_name(item.dtype)}"
            casts[pair] = casts.get(pair, 0) + 1
    return casts
