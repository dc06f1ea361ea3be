"""Write checkpoints: a file or a model, in any format that can be written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from keymap.errors import PlanError, VerifyError, WriteError, by_reason, printable, some
from keymap.language.format import Scalar
from keymap.load.preflight import failed_checks
from keymap.load.progress import Counter, Progress
from keymap.plan.export import Export, export, only_reading, target_format
from keymap.plan.live import open_model
from keymap.plan.plan import dtype_name
from keymap.plan.repository import repository_files
from keymap.plan.request import (
    check_model,
    checked_flag,
    checked_settings,
    checked_wrapper,
    request_for_towers,
    sizes_of,
)
from keymap.source.open import PathLike, catalogue_with, open_source
from keymap.source.registry import path_text
from keymap.write.containers import SUFFIXES, write_container
from keymap.write.place import check_folder, check_place, remove_others, whole_files, whole_folder
from keymap.write.shards import index_text, shards_of
from keymap.write.tensors import Item, items_of, parse_dtype, value_of_item

__all__ = ["WriteResult", "convert_checkpoint", "save_checkpoint"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)


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
        notes: other remarks, for example rows of zeros that the format has at the end of a vocabulary.
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
        return {
            **plain,
            "files": list(self.files),
            "casts": dict(self.casts),
            "dropped": dict(self.dropped),
            "notes": list(self.notes),
        }

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
    to: str,
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
) -> WriteResult:
    """Convert a checkpoint on disk to another format, one tensor after the other.

    Args:
        source: as ``checkpoint_path`` of `load_checkpoint`.
        destination: the file to write; its suffix gives the container: .safetensors, .pt (.pth, .bin) or .npz. A file
            that is there is replaced when the new one is whole. A name without a suffix is a folder: it gets the
            format's own layout, with its configuration made from shapes, facts and the source's configuration.
        to: the format to write, as in `convert_state_dict`.
        mapping, wrapper, towers: as in `convert_state_dict`.
        facts: as in `convert_state_dict`; for a folder also settings that are words or fractions, for example
            ``{"image.activation": "quick_gelu", "image.eps": 1e-5}``.
        dtype: the dtype of floating tensors, for example ``"float16"``; None keeps that of the source. A value that
            would become infinite is refused.
        max_shard_size: bytes, or a text such as ``"5GB"``: cut .safetensors into shards with an index, named as
            transformers names them. None writes one file.
        overwrite: write into a folder that is not empty, and replace the files of an earlier set of shards.
        weights_only: as in `load_checkpoint`.
        progress: called in this thread with the bytes that are written and the bytes in all: first ``(0, total)``,
            last ``(total, total)``, never with fewer bytes than before. An exception that it raises ends the
            conversion, and nothing is written.

    Returns:
        The files and what they hold.

    Raises:
        KeymapError: the source or the target is refused (see `convert_state_dict`), or the file cannot be written.
            Then the destination is what it was.
    """
    known, _ = catalogue_with(mapping)
    target, place = target_format(known, _text(to)), _destination(destination)
    opened = open_source(source, checked_flag("weights_only", weights_only), mapping, checked_wrapper(wrapper))
    given = checked_settings(facts, opened.known)
    reading = only_reading(opened)
    planned = export(reading, target, request_for_towers(towers, opened.known.hub), sizes_of(given))
    return _written(planned, place, given, [Path(opened.file)], _Options(dtype, max_shard_size, overwrite, progress))


def save_checkpoint(
    model: nn.Module,
    destination: PathLike,
    to: str,
    *,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, Scalar] | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> WriteResult:
    """Write a model's weights in a format, from any device, one tensor after the other.

    The arguments are those of `convert_checkpoint`; facts such as head counts are read from the model.

    Raises:
        KeymapError: as `convert_checkpoint`.
    """
    check_model(model)
    known, _ = catalogue_with(None)
    target, place = target_format(known, _text(to)), _destination(destination)
    opened, own = open_model(model, known)
    given = {**own, **checked_settings(facts, known)}
    planned = export(only_reading(opened), target, request_for_towers(towers, known.hub), sizes_of(given))
    return _written(planned, place, given, [], _Options(dtype, max_shard_size, overwrite, progress))


def _text(to: object) -> str:
    if not isinstance(to, str):
        raise PlanError(f"to={to!r}: pass the name of a format")
    return to


class _Options(NamedTuple):
    """How to write; see `convert_checkpoint`."""

    dtype: str | torch.dtype | None
    max_shard_size: int | str | None
    overwrite: bool
    progress: Progress | None


class _Place(NamedTuple):
    """Where to write: a file, or a folder in the format's layout."""

    path: Path
    is_folder: bool


def _destination(destination: object) -> _Place:
    text = path_text(destination, WriteError, "pass the path of the file or of the folder to write")
    path = Path(text)
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
    planned: Export, place: _Place, given: Mapping[str, Scalar], sources: Sequence[Path], options: _Options
) -> WriteResult:
    """Write a file or a folder."""
    path, overwrite = place.path, checked_flag("overwrite", options.overwrite)
    if not place.is_folder:
        check_place(path, sources)
        return _write(planned, path, {}, options)
    texts = repository_files(planned, planned.source.known.hub, given)
    check_folder(path, sources, overwrite)
    repository = planned.target.repository
    assert repository is not None, "it gave the texts"
    if path.is_dir() and any(path.iterdir()):
        result = _write(planned, path / repository.weights, texts, options)
        remove_others(path, repository.weights, {Path(file).name for file in result.files})
        return result
    with whole_folder(path) as inner:
        result = _write(planned, inner / repository.weights, texts, options)
    return result._replace(files=tuple(str(path / Path(file).name) for file in result.files))


def _bytes(size: int | str | None) -> int | None:
    """A size in bytes; "5GB" counts in powers of 1000, as transformers does."""
    if size is None or (type(size) is int and size > 0):
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    number = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if number < 1:
        raise PlanError(f"max_shard_size={size!r}: expected a number of bytes, or a text such as '5GB'")
    return number


def _write(planned: Export, path: Path, texts: Mapping[str, str], options: _Options) -> WriteResult:
    """Write the weights to a file or to shards, and texts beside them; the files appear when all are whole."""
    tensors = planned.source.unwrapped.tensors
    failed = failed_checks(planned.checks, lambda key: tensors[key].read())
    if failed:
        name = planned.target.name
        raise VerifyError(f"{planned.source.file} cannot be written as {name}", [text for _, text in failed])
    items = items_of(planned, parse_dtype(options.dtype))
    parts = shards_of(path, items, _bytes(options.max_shard_size))
    index = {f"{path.name}.index.json": index_text(parts, items)} if len(parts) > 1 else {}
    beside = {path.with_name(name): text for name, text in {**index, **texts}.items()}
    files = [*parts, *beside]
    if index and not options.overwrite and any(file.exists() for file in files):
        raise WriteError(f"{path.parent}: has shards of this name already; pass overwrite=True to replace them")
    counter = Counter(options.progress, sum(item.nbytes for item in items.values()))
    metadata = planned.source.metadata if path.suffix == ".safetensors" else {}
    with whole_files(files) as written:
        for place, keys in zip(written, parts.values(), strict=False):
            some_items = {key: items[key] for key in keys}
            write_container(
                place,
                path.suffix,
                some_items,
                lambda key: value_of_item(key, items[key], tensors),
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


def _casts(items: Mapping[str, Item]) -> dict[str, int]:
    casts: dict[str, int] = {}
    for item in items.values():
        if item.dtype != item.target.layout.dtype:
            pair = f"{dtype_name(item.target.layout.dtype)} to {dtype_name(item.dtype)}"
            casts[pair] = casts.get(pair, 0) + 1
    return casts
