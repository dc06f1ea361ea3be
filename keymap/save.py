"""Write checkpoints: a file or a model, in any format that can be written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from keymap.errors import PlanError, VerifyError, WriteError, printable, some
from keymap.load.preflight import failed_checks
from keymap.load.progress import Counter, Progress
from keymap.plan.export import Export, export, only_reading, target_format
from keymap.plan.live import open_model
from keymap.plan.request import check_model, checked_facts, checked_flag, checked_wrapper, request_for_towers
from keymap.source.open import PathLike, catalogue_with, open_source
from keymap.source.registry import path_text
from keymap.write.containers import SUFFIXES, write_container
from keymap.write.place import check_place, whole_files
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
    """

    files: tuple[str, ...]
    format: str
    source: str
    source_format: str
    tensors: int
    nbytes: int
    casts: Mapping[str, int]
    dropped: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        plain = self._asdict()
        return {**plain, "files": list(self.files), "casts": dict(self.casts), "dropped": dict(self.dropped)}

    def __str__(self) -> str:
        lines = [f"{self.source} (format {self.source_format}) -> {', '.join(self.files)} (format {self.format})"]
        lines.append(f"  {self.tensors} tensors, {self.nbytes:,} bytes")
        lines += [f"  cast: {count} tensors from {pair}" for pair, count in self.casts.items()]
        by_reason: dict[str, list[str]] = {}
        for key, why in self.dropped.items():
            by_reason.setdefault(why, []).append(key)
        lines += [f"  ignored: {some(keys)}: {why}" for why, keys in by_reason.items()]
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
    facts: Mapping[str, int] | None = None,
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
            that is there is replaced when the new one is whole.
        to: the format to write, as in `convert_state_dict`.
        mapping, wrapper, towers, facts: as in `convert_state_dict`.
        dtype: the dtype of floating tensors, for example ``"float16"``; None keeps that of the source. A value that
            would become infinite is refused.
        max_shard_size: bytes, or a text such as ``"5GB"``: cut .safetensors into shards with an index, named as
            transformers names them. None writes one file.
        overwrite: replace the files of an earlier set of shards.
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
    target, path = target_format(known, _text(to)), _destination(destination)
    opened = open_source(source, checked_flag("weights_only", weights_only), mapping, checked_wrapper(wrapper))
    checked = checked_facts(facts, opened.known)
    reading = only_reading(opened)
    planned = export(reading, target, request_for_towers(towers, opened.known.hub), checked)
    check_place(path, [Path(opened.file)])
    return _write(planned, path, dtype, max_shard_size, checked_flag("overwrite", overwrite), progress)


def save_checkpoint(
    model: nn.Module,
    destination: PathLike,
    to: str,
    *,
    towers: Sequence[str] | str | None = None,
    facts: Mapping[str, int] | None = None,
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
    target, path = target_format(known, _text(to)), _destination(destination)
    opened, own = open_model(model, known)
    reading = only_reading(opened)
    planned = export(reading, target, request_for_towers(towers, known.hub), own | dict(checked_facts(facts, known)))
    check_place(path, [])
    return _write(planned, path, dtype, max_shard_size, checked_flag("overwrite", overwrite), progress)


def _text(to: object) -> str:
    if not isinstance(to, str):
        raise PlanError(f"to={to!r}: pass the name of a format")
    return to


def _destination(destination: object) -> Path:
    path = Path(path_text(destination, WriteError, "pass the path of the file to write"))
    if path.suffix not in SUFFIXES:
        raise WriteError(f"{path}: its suffix shows no container that keymap writes; use one of {', '.join(SUFFIXES)}")
    return path


def _bytes(size: int | str | None) -> int | None:
    """A size in bytes; "5GB" counts in powers of 1000, as transformers does."""
    if size is None or (type(size) is int and size > 0):
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    number = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if number < 1:
        raise PlanError(f"max_shard_size={size!r}: expected a number of bytes, or a text such as '5GB'")
    return number


def _write(
    planned: Export,
    path: Path,
    dtype: str | torch.dtype | None,
    max_shard_size: int | str | None,
    overwrite: bool,
    progress: Progress | None,
) -> WriteResult:
    tensors = planned.source.unwrapped.tensors
    failed = failed_checks(planned.checks, lambda key: tensors[key].read())
    if failed:
        name = planned.target.name
        raise VerifyError(f"{planned.source.file} cannot be written as {name}", [text for _, text in failed])
    items = items_of(planned, parse_dtype(dtype))
    parts = shards_of(path, items, _bytes(max_shard_size))
    index = path.with_name(f"{path.name}.index.json") if len(parts) > 1 else None
    files = [*parts, *([index] if index is not None else [])]
    if index is not None and not overwrite and any(file.exists() for file in files):
        raise WriteError(f"{path.parent}: has shards of this name already; pass overwrite=True to replace them")
    counter = Counter(progress, sum(item.nbytes for item in items.values()))
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
        if index is not None:
            written[-1].write_text(index_text(parts, items), encoding="utf-8")
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
    )


def _casts(items: Mapping[str, Item]) -> dict[str, int]:
    casts: dict[str, int] = {}
    for item in items.values():
        if item.dtype != item.target.layout.dtype:
            old, new = (str(one).removeprefix("torch.") for one in (item.target.layout.dtype, item.dtype))
            casts[f"{old} to {new}"] = casts.get(f"{old} to {new}", 0) + 1
    return casts
