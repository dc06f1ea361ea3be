"""Read weights that Flax serialized with msgpack (``flax_model.msgpack``).

The layout is that of ``flax/serialization.py`` (flax 0.12): nested maps; an array is extension type 1, a packed
``(shape, dtype name, bytes)``; a large array is a map of chunks. Extension types 2 and 3 are a complex number and a
numpy scalar, packed like an array.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch

from keymap.errors import CheckpointError
from keymap.read.lazy import Checkpoint, LazyTensor, SourceFile, brief, element_count

__all__ = ["looks_like_msgpack", "read_msgpack"]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # extension types
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}


def looks_like_msgpack(file: SourceFile) -> bool:
    """Whether the file is called .msgpack, or begins like a msgpack map whose first key is a string."""
    first, second = (*file.data[:2], 0, 0)[:2]
    is_map = 0x81 <= first <= 0x8F and (0xA1 <= second <= 0xBF or second == 0xD9)
    return file.path.name.endswith(".msgpack") or is_map


def read_msgpack(file: SourceFile) -> Checkpoint:
    """All arrays of the file, in the nested maps that hold them.

    Raises:
        CheckpointError: the package msgpack is not installed, or the file is damaged.
    """
    try:
        import msgpack
    except ImportError:
        raise file.error("is a msgpack file of Flax", "install the package that reads it: keymap[flax]") from None
    hook = partial(_extension, file, msgpack)
    try:
        tree = msgpack.unpackb(memoryview(file.data), ext_hook=hook, raw=False, strict_map_key=False)
    except CheckpointError:
        raise
    except Exception as error:  # msgpack raises errors of several kinds for damaged files
        raise file.error(f"is not a msgpack file, or is damaged: {brief(str(error))}", "download it again") from None
    if not isinstance(tree, dict):
        raise file.error(f"holds one value of type {type(tree).__name__} instead of a map", "save a dict of arrays")
    return Checkpoint(file.path, "msgpack", _joined(file, tree))


def _extension(file: SourceFile, msgpack: Any, code: int, data: bytes) -> Any:
    """An array; other extensions are not weights, and become None."""
    if code not in (_ARRAY, _SCALAR):
        return None
    unpacked = msgpack.unpackb(data, raw=False)
    if not isinstance(unpacked, list) or len(unpacked) != 3:
        raise file.error("has an array without shape, dtype and values", "save it again with flax")
    shape, name, raw = unpacked
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    count = element_count(shape) if isinstance(shape, list) else None
    if dtype is None or count is None or not isinstance(raw, bytes) or len(raw) != count * dtype.itemsize:
        fact = f"has an array of shape {brief(shape)} and dtype {brief(name)} with other values than these need"
        raise file.error(fact, "download it again")
    return LazyTensor(tuple(shape), dtype, partial(_values, raw, tuple(shape), dtype))


def _values(raw: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def _joined(file: SourceFile, tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tree with each array that was cut into chunks as one."""
    found: dict[Any, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found[key] = _array_of_chunks(file, value) if value.get(_CHUNKED) else _joined(file, value)
        else:
            found[key] = value
    return found


def _array_of_chunks(file: SourceFile, value: Mapping[str, Any]) -> LazyTensor:
    """The array whose chunks, in order, are its elements in row-major order."""
    shape, chunks = (_listed(value.get(name)) for name in ("shape", "chunks"))
    count = element_count(shape) if shape is not None else None
    if not chunks or count is None or not all(isinstance(chunk, LazyTensor) for chunk in chunks):
        raise file.error("has an array in chunks without its shape or its chunks", "save it again with flax")
    assert shape is not None, "it has a count of elements"
    if len({chunk.dtype for chunk in chunks}) > 1 or sum(prod(chunk.shape) for chunk in chunks) != count:
        raise file.error(f"has an array of shape {brief(shape)} whose chunks do not fit", "download it again")

    def read() -> torch.Tensor:
        return torch.cat([chunk.read().flatten() for chunk in chunks]).view(tuple(shape))

    return LazyTensor(tuple(shape), chunks[0].dtype, read)


def _listed(value: Any) -> list[Any] | None:
    """A list that Flax writes as a map from its indices; None for anything else."""
    if isinstance(value, dict) and list(value) == [str(number) for number in range(len(value))]:
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else None
