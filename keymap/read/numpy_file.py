"""Read numpy's .npy arrays and .npz archives without numpy's loader and without pickle."""

from __future__ import annotations

import ast
import functools
import re
from typing import Any

import torch

from keymap.read.lazy import Block, Checkpoint, LazyTensor, SourceFile, brief, element_count, lazy_view
from keymap.read.zip_file import AGAIN

MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096  # the header of a plain array has fewer than 200 bytes
DESCR = re.compile(r"([<>|=]?)([?a-zA-Z])(\d*)")

DTYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
    "V2": torch.bfloat16,  # numpy writes a two-byte dtype that it does not know in this way
}
NOT_NUMBERS = {"O": "Python objects", "U": "texts", "S": "byte strings", "M": "dates", "m": "time spans"}


def torch_dtype(descr: object) -> torch.dtype | str:
    """The dtype for a numpy type string such as ``<f4``, or a text that says why there is none."""
    match = DESCR.fullmatch(descr) if isinstance(descr, str) else None
    if match is None:
        structured = "structured " if isinstance(descr, list) else ""
        return f"has the {structured}dtype {brief(descr)}"
    order, kind, size = match.groups()
    if kind in NOT_NUMBERS:
        return f"holds {NOT_NUMBERS[kind]} (dtype {brief(descr)})"
    dtype = DTYPES.get(kind + size)
    if dtype is None:
        return f"has the dtype {brief(descr)}, which torch does not have"
    if order == ">" and dtype.itemsize > 1:
        return f"is big-endian (dtype {brief(descr)})"
    return dtype


def looks_like_npy(file: SourceFile) -> bool:
    """Whether the file begins like an .npy file."""
    return file.data[: len(MAGIC)] == MAGIC


def read_npy(file: SourceFile) -> Checkpoint:
    """One array, under the key ""; raises CheckpointError if it is not a plain array."""
    block = Block(file, file.path.name, 0, file.size, file.size)
    return Checkpoint(file.path, "npy", {"": array_of(block)})


def is_npz(members: dict[str, Block]) -> bool:
    """Whether an archive has .npy members."""
    return any(name.endswith(".npy") for name in members)


def read_npz(file: SourceFile, members: dict[str, Block]) -> Checkpoint:
    """Every member as an array, under its name without ``.npy``, in file order.

    Raises:
        CheckpointError: a member is not a plain array; the message names it.
    """
    others = [name for name in members if not name.endswith(".npy")]
    if others:
        raise file.error(f"is an .npz with members that are not arrays: {others[:5]}", "save only the arrays")
    ordered = sorted(members.items(), key=lambda item: item[1].start)
    return Checkpoint(file.path, "npz", {name[: -len(".npy")]: array_of(block) for name, block in ordered})


def array_of(block: Block) -> LazyTensor:
    """The array in ``block``; reads and checks the header, not the values.

    Raises:
        UnsafeCheckpointError: an array of Python objects, which is a pickle.
        CheckpointError: no header, a dtype that torch does not have, or sizes that differ from the block's;
            the message names the member.
    """
    file, name = block.file, f"array {block.name!r}"
    descr, fortran, shape, skip = _read_header(block, name)
    dtype = torch_dtype(descr)
    if isinstance(dtype, str):
        if "Python objects" in dtype:
            fact = f"{name} {dtype}: it is a pickle, and nothing of it was run"
            raise file.unsafe_error(fact, "save the arrays as numbers, with allow_pickle=False")
        raise file.error(f"{name} {dtype}", "save it as a plain little-endian array of numbers")
    count = element_count(shape) if isinstance(shape, tuple) else None
    if count is None or type(fortran) is not bool:
        raise file.error(f"{name} has an impossible shape {brief(shape)} or order {brief(fortran)}", AGAIN)
    needed = count * dtype.itemsize
    if block.nbytes - skip != needed:
        fact = f"{name}: shape {shape} of {dtype} needs {needed} bytes, but the file holds {block.nbytes - skip}"
        raise file.error(fact, AGAIN)
    if block.crc is None:
        values = Block(file, block.name, block.start + skip, needed, needed, stored_crc=block.stored_crc)
    else:
        values = Block(file, block.name, block.start, block.stored, needed, skip, block.crc)
    strides = None
    if fortran and len(shape) > 1:
        steps = [1]
        for size in shape[:-1]:
            steps.append(steps[-1] * size)
        strides = tuple(steps)
    return lazy_view(values, dtype, shape, strides)


def _read_header(block: Block, name: str) -> tuple[Any, Any, Any, int]:
    """descr, fortran_order and shape as written in the header, and the position of the values in the block.

    Raises:
        CheckpointError: the header is missing, truncated, too long or unknown.
    """
    file, raw = block.file, block.head(MAX_HEADER + 12)
    if raw[:6] != MAGIC or len(raw) < 12:
        raise file.error(f"{name} does not begin like a numpy array", AGAIN)
    if raw[6] not in (1, 2, 3):
        raise file.error(f"{name} has the unknown header version {raw[6]}.{raw[7]}", AGAIN)
    begin = 10 if raw[6] == 1 else 12
    length = int.from_bytes(raw[8:begin], "little")
    if length > MAX_HEADER:
        raise file.error(f"{name} has a header of {length} bytes; the limit is {MAX_HEADER}", AGAIN)
    if begin + length > len(raw):
        raise file.error(f"{name} is truncated inside its header", AGAIN)
    header = _parse_header(raw[begin : begin + length])
    if header is None:
        raise file.error(f"{name} has a header that is not descr, fortran_order and shape", AGAIN)
    return (*header, begin + length)


@functools.lru_cache(maxsize=1024)  # many arrays of an archive have the same header
def _parse_header(raw: bytes) -> tuple[Any, Any, Any] | None:
    """descr, fortran_order and shape as written, or None if the header is anything else."""
    try:
        header = ast.literal_eval(raw.decode("utf-8").strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        return None
    return header["descr"], header["fortran_order"], header["shape"]
