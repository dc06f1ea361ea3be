"""safetensors: eight bytes of length, a JSON header, then the values of all tensors without a gap."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from keymap.errors import CheckpointError
from keymap.read.lazy import Block, Checkpoint, LazyTensor, SourceFile, brief, element_count

MAX_HEADER = 100_000_000  # bytes
PARSED = 1 << 26  # bytes that what is parsed of a header may take, beside four times the file
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class DuplicateKeyError(ValueError):
    """A JSON object that gives one key twice."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object; raises DuplicateKeyError, which Python's own reader would not."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return result


def parse_json(file: SourceFile, raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``raw``; raises CheckpointError for anything else, named ``what``."""
    return _parsed(file, raw, what, without_duplicates)


def _parse_header(file: SourceFile, raw: bytes) -> dict[str, Any]:
    """As `parse_json`, in half the time and memory: the texts of a plain header can be counted.

    Python's own dicts keep the last of equal keys. A text takes two quotation marks, and an entry has five texts: its
    key, its fields and its dtype. Where there are more, a key is there twice, or the header has more than it needs.
    """
    header = _parsed(file, raw, "its header", None)
    metadata = header.get("__metadata__")
    texts = 5 * len(header)
    if "__metadata__" in header:
        texts += 2 * (len(metadata) if isinstance(metadata, dict) else 0) - 4
    if raw.count(b'"') == 2 * texts and b"\\" not in raw:
        return header
    del header
    return parse_json(file, raw, "its header")


def _parsed(
    file: SourceFile, raw: bytes, what: str, hook: Callable[[list[tuple[str, Any]]], Any] | None
) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except DuplicateKeyError as error:
        raise file.bad(f"{what} gives the key {brief(error.args[0])} twice", AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise file.bad(f"{what} is not valid JSON ({error})", AGAIN) from None
    if not isinstance(value, dict):
        raise file.bad(f"{what} is not a JSON object", AGAIN)
    return value


def looks_like_safetensors(file: SourceFile) -> bool:
    """Whether the file begins with a length and an opening brace; truncated files count, text does not."""
    length = int.from_bytes(file.data[:8], "little")
    fits = 2 <= length <= file.size - 8
    return file.data[8:9] == b"{" and (fits or b"\0" in file.data[:8] or file.path.suffix == ".safetensors")


def read_safetensors(file: SourceFile) -> Checkpoint:
    """All tensors from the header alone; raises CheckpointError, with every fault, before one is made."""
    if file.size < 8:
        raise file.bad(f"is truncated: {file.size} bytes, no room for a header length", AGAIN)
    length = int.from_bytes(file.data[:8], "little")
    if length > MAX_HEADER:
        raise file.bad(f"its header claims {length} bytes, more than the limit of {MAX_HEADER}", AGAIN)
    if length > file.size - 8:
        fact = f"is truncated: its header claims {length} bytes, the file has {file.size - 8} after the length"
        raise file.bad(fact, AGAIN)
    raw = file.data[8 : 8 + length]
    file.refuse_many(raw.count(b'"dtype"'))
    texts = length if raw.isascii() else 8 * length  # one wide character makes every other one of a text as wide
    parsed = texts + 64 * (raw.count(b",") + raw.count(b"[") + raw.count(b"{")) + 32 * raw.count(b'"')
    if parsed > 4 * file.size + PARSED:
        raise file.bad(f"its header of {length} bytes would take {parsed} bytes of memory", AGAIN)
    header = _parse_header(file, raw)
    del raw
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise file.bad("its __metadata__ is not an object of texts", AGAIN)
    file.refuse_many(len(header))

    faults: list[str] = []
    found: list[tuple[int, int, str, LazyTensor]] = []
    base = 8 + length
    room = file.size - base
    for key in list(header):  # what was read of it is given up at once: of tiny tensors it is the largest part
        try:
            found.append(_entry(file, base, room, key, header.pop(key)))
        except ValueError as error:
            faults.append(f"{brief(key)}: {error}")
    found.sort(key=lambda item: item[:2])
    if not faults:
        faults = _layout_faults(found, room)
    if faults:
        raise CheckpointError(f"{file.path}: its header does not describe its tensors; {AGAIN}", faults)
    return Checkpoint(file.path, "safetensors", {item[2]: item[3] for item in found}, metadata)


def _entry(file: SourceFile, base: int, room: int, key: str, entry: Any) -> tuple[int, int, str, LazyTensor]:
    """One line of the header, as (begin, end, key, tensor); raises ValueError, in words, where it is no good."""
    try:
        name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        raise ValueError("needs dtype, shape and data_offsets") from None
    dtype = DTYPES.get(name) if type(name) is str else None
    if dtype is None:
        raise ValueError(f"unknown dtype {brief(name)}")
    count = element_count(shape) if type(shape) is list else None
    if count is None:
        raise ValueError(f"impossible shape {brief(shape)}")
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"data_offsets {brief(offsets)} are not two integers")
    size = end - begin
    if begin < 0 or size < 0:
        raise ValueError(f"data_offsets {offsets} run backwards")
    if end > room:
        raise ValueError(f"truncated: ends at {end}, the file has {room} bytes of values")
    if size != count * dtype.itemsize:
        needs = count * dtype.itemsize
        raise ValueError(f"shape {shape} of {name} needs {needs} bytes, data_offsets give {size}")
    return begin, end, key, LazyTensor(tuple(shape), dtype, Block(file, key, base + begin, size, size))


def _layout_faults(found: list[tuple[int, int, str, LazyTensor]], size: int) -> list[str]:
    """Holes, overlaps and left-over bytes, of entries sorted by offset."""
    faults: list[str] = []
    at, before = 0, None
    for begin, end, key, _ in found:
        if begin != at:
            kind = "overlap of" if begin < at else "hole of"
            last = "the header" if before is None else brief(before)
            faults.append(f"{brief(key)}: {kind} {abs(begin - at)} bytes with {last}, which ends at {at}")
        at, before = max(at, end), key
    if at != size:
        faults.append(f"{size - at} bytes after the last tensor belong to none")
    return faults
