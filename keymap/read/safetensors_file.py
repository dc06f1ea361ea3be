"""Read safetensors: the length of a JSON header in eight bytes, the header, the values of all tensors without gaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch

from keymap.errors import CheckpointError
from keymap.read.lazy import Block, Checkpoint, LazyTensor, SourceFile, brief, element_count

_tuple = tuple.__new__
MAX_HEADER = 100_000_000  # bytes
PARSED = 1 << 26  # a parsed header may take this many bytes of memory, and four times the size of the file
AGAIN = "download or save the file again"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_WIDTHS = {name: (dtype, dtype.itemsize) for name, dtype in DTYPES.items()}


class DuplicateKeyError(ValueError):
    """A JSON object has one key twice."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object; raises DuplicateKeyError if a key occurs twice, which Python's json accepts."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return result


def parse_json(file: SourceFile, raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``raw``; raises CheckpointError, with ``name``, for anything else and for duplicate keys."""
    return _load_json(file, raw, name, without_duplicates)


def _parse_header(file: SourceFile, raw: bytes) -> dict[str, Any]:
    """The same as `parse_json` in half the time and memory, because a plain header has a known number of strings.

    Without a hook, Python's json keeps the last of equal keys. An entry has five strings: its key, three field names
    and its dtype; each takes two quotation marks. If there are more, a key may occur twice: parse the header again.
    """
    header = _load_json(file, raw, "its header", None)
    metadata = header.get("__metadata__")
    strings = 5 * len(header)
    if "__metadata__" in header:
        strings += 2 * (len(metadata) if isinstance(metadata, dict) else 0) - 4
    if raw.count(b'"') == 2 * strings and b"\\" not in raw:
        return header
    del header
    return parse_json(file, raw, "its header")


def _load_json(
    file: SourceFile, raw: bytes, name: str, hook: Callable[[list[tuple[str, Any]]], Any] | None
) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except DuplicateKeyError as error:
        raise file.error(f"{name} has the key {brief(error.args[0])} twice", AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise file.error(f"{name} is not valid JSON ({error})", AGAIN) from None
    if not isinstance(value, dict):
        raise file.error(f"{name} is not a JSON object", AGAIN)
    return value


def looks_like_safetensors(file: SourceFile) -> bool:
    """Whether the file begins with a length and an opening brace. True for truncated files, False for text."""
    length = int.from_bytes(file.data[:8], "little")
    fits = 2 <= length <= file.size - 8
    return file.data[8:9] == b"{" and (fits or b"\0" in file.data[:8] or file.path.suffix == ".safetensors")


def read_safetensors(file: SourceFile) -> Checkpoint:
    """All tensors, from the header alone.

    Raises:
        CheckpointError: the header is wrong; all faults of its entries are in one error.
    """
    if file.size < 8:
        raise file.error(f"is truncated: it has {file.size} bytes, fewer than a header length", AGAIN)
    length = int.from_bytes(file.data[:8], "little")
    if length > MAX_HEADER:
        raise file.error(f"its header claims {length} bytes; the limit is {MAX_HEADER}", AGAIN)
    if length > file.size - 8:
        fact = f"is truncated: its header claims {length} bytes, but {file.size - 8} bytes follow"
        raise file.error(fact, AGAIN)
    raw = file.data[8 : 8 + length]
    file.limit_tensors(raw.count(b'"dtype"'))
    text_bytes = length if raw.isascii() else 8 * length  # one wide character widens all others of its string
    parsed = text_bytes + 64 * (raw.count(b",") + raw.count(b"[") + raw.count(b"{")) + 32 * raw.count(b'"')
    if parsed > 4 * file.size + PARSED:
        raise file.error(f"its header of {length} bytes needs {parsed} bytes of memory, too many for the file", AGAIN)
    header = _parse_header(file, raw)
    del raw
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise file.error("its __metadata__ is not an object of strings", AGAIN)
    file.limit_tensors(len(header))

    faults: list[str] = []
    entries: list[tuple[int, int, str, LazyTensor]] = []
    base = 8 + length
    available = file.size - base
    for key in list(header):  # pop each entry: for many tiny tensors the parsed header takes the most memory
        try:
            entries.append(_entry(file, base, available, key, header.pop(key)))
        except ValueError as error:
            faults.append(f"{brief(key)}: {error}")
    entries.sort(key=itemgetter(0, 1))
    if not faults:
        faults = _layout_faults(entries, available)
    if faults:
        raise CheckpointError(f"{file.path}: its header does not describe its tensors; {AGAIN}", faults)
    return Checkpoint(file.path, "safetensors", {item[2]: item[3] for item in entries}, metadata)


def _entry(file: SourceFile, base: int, available: int, key: str, entry: Any) -> tuple[int, int, str, LazyTensor]:
    """One entry of the header as (begin, end, key, tensor); raises ValueError with the fault if it is wrong."""
    try:
        name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype, width = _WIDTHS[name]
        begin, end = offsets
    except (TypeError, KeyError, ValueError):
        raise ValueError(_fault(entry, available)) from None
    count = element_count(shape) if type(shape) is list else None
    right = type(begin) is type(end) is int and type(offsets) is list
    if count is None or not right or not 0 <= begin <= end <= available or end - begin != count * width:
        raise ValueError(_fault(entry, available))
    # Built with tuple.__new__, which takes half the time: every tensor of a file needs both.
    block = _tuple(Block, (file, key, base + begin, end - begin, end - begin, 0, None, None))
    return begin, end, key, _tuple(LazyTensor, (tuple(shape), dtype, block, None, 0, 0))


def _fault(entry: Any, available: int) -> str:
    """What is wrong with an entry."""
    try:
        name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        return "needs dtype, shape and data_offsets"
    dtype = DTYPES.get(name) if type(name) is str else None
    if dtype is None:
        return f"unknown dtype {brief(name)}"
    count = element_count(shape) if type(shape) is list else None
    if count is None:
        return f"impossible shape {brief(shape)}"
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int:
        return f"data_offsets {brief(offsets)} are not two integers"
    if begin < 0 or end < begin:
        return f"data_offsets {offsets} run backwards"
    if end > available:
        return f"truncated: its values end at byte {end}, but the file has {available} bytes of values"
    return f"shape {shape} of {name} needs {count * dtype.itemsize} bytes, but data_offsets give {end - begin}"


def _layout_faults(entries: list[tuple[int, int, str, LazyTensor]], size: int) -> list[str]:
    """Gaps, overlaps and bytes without a tensor; the entries are sorted by offset."""
    faults: list[str] = []
    at, previous = 0, None
    for begin, end, key, _ in entries:
        if begin != at:
            neighbour = "the header" if previous is None else brief(previous)
            fault = f"overlap of {at - begin} bytes with" if begin < at else f"gap of {begin - at} bytes after"
            faults.append(f"{brief(key)}: {fault} {neighbour}, which ends at byte {at}")
        at, previous = max(at, end), key
    if at != size:
        faults.append(f"{size - at} bytes after the last tensor belong to no tensor")
    return faults
