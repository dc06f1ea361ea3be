"""Small files, good and bad, built byte by byte: each function gives bytes or writes one file."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def safetensors_bytes(header: Mapping[str, Any] | str, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header text and any claimed header length."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def npy_bytes(descr: str, shape: str, data: bytes, order: str = "False", version: int = 1) -> bytes:
    """An .npy file with any header values, given as Python text."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def write_zip(path: Path, members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """An archive; a name may be there twice."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    return path


def write_torch(path: Path, pickle: bytes, storages: Mapping[str, bytes], method: int = 0) -> Path:
    """A torch.save archive around any pickle."""
    members = [("a/data.pkl", pickle), ("a/version", b"3\n"), ("a/byteorder", b"little")]
    return write_zip(path, members + [(f"a/data/{key}", raw) for key, raw in storages.items()], method)


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """The opcode that pushes an integer."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def named(module: str, name: str) -> bytes:
    """The opcode that names a global."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def numbers(values: Sequence[int]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor_pickle(
    shape: Sequence[int],
    strides: Sequence[int],
    offset: int = 0,
    numel: int = 6,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """A pickle of {"w": tensor} with any view of any storage."""
    storage = b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(numel) + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"t"
    return b"\x80\x02}" + text("w") + named("torch._utils", "_rebuild_tensor_v2") + arguments + b"Rs."


def call_pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle of {"w": module.name(argument)}."""
    return b"\x80\x02}" + text("w") + named(module, name) + text(argument) + b"\x85Rs."
