"""Write a state dict as .safetensors, .pt or .npz, one tensor after the other.

The memory that is needed beside the source is that of one tensor. Layouts: safetensors, "Format" in its README; torch,
``torch/serialization.py`` (a zip archive with a pickle and a member for each storage); numpy, NEP 1 (.npy in a zip).
"""

from __future__ import annotations

import ctypes
import errno
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from keymap.errors import WriteError
from keymap.read import open_checkpoint
from keymap.read.lazy import Block
from keymap.write.tensors import Item

__all__ = ["SUFFIXES", "write_container"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_skip_data = getattr(torch.serialization, "skip_data", nullcontext)  # torch 2.4 has none, and writes the room itself
_CRC_BLOCK = 1 << 24
_SHOWN = 120  # characters of an error of torch
Parts = Callable[[str], Iterator[memoryview]]


def write_container(
    path: Path,
    kind: str,
    items: Mapping[str, Item],
    parts: Parts,
    metadata: Mapping[str, str],
    done: Callable[[int], None],
) -> None:
    """Write one file.

    Args:
        path: where to.
        kind: the suffix of the destination, one of `SUFFIXES`.
        items: what to write, by key.
        parts: the bytes of a tensor in row-major order, in parts.
        metadata: strings beside the tensors; only safetensors keeps them.
        done: called with the bytes of each tensor that is written.

    Raises:
        WriteError: the container has no such dtype.
    """
    if kind == ".safetensors":
        _write_safetensors(path, items, parts, metadata, done)
    elif kind == ".npz":
        _write_npz(path, items, parts, done)
    else:
        _write_torch(path, items, parts, done)


def _write_safetensors(
    path: Path, items: Mapping[str, Item], parts: Parts, metadata: Mapping[str, str], done: Callable[[int], None]
) -> None:
    ordered = sorted(items, key=lambda key: (-items[key].dtype.itemsize, key))  # so every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    at = 0
    for key in ordered:
        item = items[key]
        if item.dtype not in _NAMES:
            raise WriteError(f"{key}: safetensors has no {item.dtype}; write .pt")
        end = at + item.nbytes
        header[key] = {"dtype": _NAMES[item.dtype], "shape": list(item.target.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        _reserve(file.fileno(), 8 + len(text) + at)
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            _write_parts(file, parts(key))
            done(items[key].nbytes)


def _reserve(handle: int, size: int) -> None:
    """Ask the system for the space of a file at once: writing it then takes a fifth less time.

    Where that is not possible nothing happens. ``os.posix_fallocate`` would write into every block of a file system
    that cannot do it.
    """
    try:
        reserve = ctypes.CDLL(None).fallocate64
        reserve.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    except (OSError, AttributeError, TypeError):  # another system than Linux with glibc
        return
    reserve(handle, 0, 0, size)  # an error, such as a full disk, comes again with the first write


def _write_npz(path: Path, items: Mapping[str, Item], parts: Parts, done: Callable[[int], None]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, item in items.items():
            if item.dtype is torch.bfloat16 or (item.dtype.itemsize == 1 and item.dtype.is_floating_point):
                raise WriteError(f"{key}: numpy has no {item.dtype}; pass dtype='float32'")
            kind = np.lib.format.dtype_to_descr(torch.empty(0, dtype=item.dtype).numpy().dtype)
            header = {"descr": kind, "fortran_order": False, "shape": tuple(item.target.shape)}
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                _write_parts(member, parts(key))
            done(item.nbytes)


def _write_torch(path: Path, items: Mapping[str, Item], parts: Parts, done: Callable[[int], None]) -> None:
    """torch writes the pickle and leaves room for the values; then the values are written into it.

    Tensors that are made of the same elements in the same way share their storage, as in a model with tied tensors.
    """
    made: dict[object, torch.Tensor] = {}
    empty = {
        key: made.setdefault(
            item.elements,
            torch.empty(item.target.shape, dtype=item.dtype, device="cpu"),
        )
        for key, item in items.items()
    }
    path.touch()  # torch's own writer does not say why it cannot open a file
    try:
        with _skip_data():
            torch.save(empty, path)
    except RuntimeError as error:  # of torch's writer, where the system refuses to write
        first = str(error).splitlines()[0][:_SHOWN]
        raise OSError(errno.EIO, f"torch.save failed, perhaps because the disk is full: {first}") from None
    tree = open_checkpoint(path).tree
    sums: dict[int, int] = {}
    with path.open("r+b") as file:
        for key, item in items.items():
            block = tree[key].values
            if not isinstance(block, Block) or block.start in sums:
                done(item.nbytes)  # they are those of another tensor
                continue
            file.seek(block.start)
            sums[block.start] = _write_parts(file, parts(key), summed=True)
            done(item.nbytes)
    _write_sums(path, sums)


def _write_parts(file: IO[bytes], parts: Iterator[memoryview], summed: bool = False) -> int:
    """Write a tensor; when this returns, nothing holds it any more. Returns the checksum of its bytes, if asked for."""
    total = 0
    for part in parts:
        file.write(part)
        total = _crc(part, total) if summed else 0
    return total


def _crc(raw: memoryview, total: int) -> int:
    for start in range(0, len(raw), _CRC_BLOCK):
        total = zlib.crc32(raw[start : start + _CRC_BLOCK], total)
    return total


def _write_sums(path: Path, sums: Mapping[int, int]) -> None:
    """Write the checksums of members into a zip archive, by where their values start."""
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        entry = archive.start_dir
        for info in archive.infolist():
            file.seek(info.header_offset)
            local = file.read(30)
            start = (
                info.header_offset
                + 30
                + int.from_bytes(local[26:28], "little")
                + int.from_bytes(local[28:30], "little")
            )
            file.seek(entry)
            central = file.read(46)
            if start in sums:
                checksum = sums[start].to_bytes(4, "little")
                if not int.from_bytes(local[6:8], "little") & 8:
                    file.seek(info.header_offset + 14)
                    file.write(checksum)
                else:  # the checksum follows the values
                    file.seek(start + info.compress_size + 4)
                    file.write(checksum)
                file.seek(entry + 16)
                file.write(checksum)
            entry += 46 + sum(int.from_bytes(central[at : at + 2], "little") for at in (28, 30, 32))
