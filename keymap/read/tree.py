"""From what a pickle states to a tree of lazy tensors, each view checked against its storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keymap.errors import CheckpointError
from keymap.read.globals_allowed import (
    DTYPES,
    Instance,
    NumpyArray,
    NumpyType,
    Storage,
    TensorView,
    record_of,
)
from keymap.read.lazy import (
    MAX_INT64,
    Block,
    LazyTensor,
    SourceFile,
    brief,
    contiguous_strides,
    element_count,
    lazy_view,
)
from keymap.read.numpy_file import torch_dtype
from keymap.read.unpickle import Global

MAX_DEPTH = 100
SHOWN = 200  # characters of a path that a message shows, and that a name adds to it
PLAIN = (str, int, float, bool, bytes)
MAX_NODES = 2_000_000
AGAIN = "download or save the file again"
SMALLER = "save the state dict alone"


class TreeBuilder:
    """Turns a pickle's value into plain dicts, lists, tuples and leaves.

    A container that the pickle shares is converted once and stays shared; one that holds itself, or that
    would be walked for ever because it shares too much, is refused.
    """

    def __init__(self, file: SourceFile, locate: Callable[[Storage], Block]) -> None:
        """Tensors are found by ``locate``, which raises CheckpointError for a storage the file lacks."""
        self.file, self.locate = file, locate
        self.done: dict[int, tuple[Any, int]] = {}
        self.open: set[int] = set()
        self.tensors = 0

    def tree(self, value: Any) -> dict[str, Any]:
        """The tree of a whole file: a dict as it is, anything else under the key ""."""
        result = self.convert(value)
        if not isinstance(result, dict):
            return {"": result}
        for key in result:
            if type(key) is not str:
                raise self.file.bad(f"its keys are no texts ({type(key).__name__})", SMALLER)
        return result

    def convert(self, value: Any) -> Any:
        """One value, checked; raises CheckpointError, naming the key where it lies."""
        return self._convert(value, "", 0)[0]

    def _convert(self, value: Any, path: str, depth: int) -> tuple[Any, int]:
        kind = type(value)
        if kind is TensorView:
            return self.lazy(value, path), 1
        if kind not in (dict, list, tuple, Instance):
            return self._leaf(value, path), 1
        known = self.done.get(id(value))
        if known is not None:
            return known
        if id(value) in self.open:
            raise self.file.bad(f"{path!r} holds itself", SMALLER)
        if depth > MAX_DEPTH:
            raise self.file.bad(f"it nests deeper than {MAX_DEPTH} levels, at {path!r}", SMALLER)
        self.open.add(id(value))
        result, nodes = self._container(value, path, depth + 1)
        self.open.discard(id(value))
        if nodes > MAX_NODES:
            raise self.file.bad(f"{path!r} holds more than {MAX_NODES} values", SMALLER)
        self.done[id(value)] = (result, nodes)
        return result, nodes

    def _container(self, value: Any, path: str, depth: int) -> tuple[Any, int]:
        nodes = 1

        def inside(item: Any, name: object) -> Any:
            nonlocal nodes
            if item is None or type(item) in PLAIN:
                nodes += 1
                return item
            told = name if type(name) is str else brief(name)
            result, count = self._convert(item, f"{path}.{told[:SHOWN]}"[-SHOWN:] if path else told[:SHOWN], depth)
            nodes += count
            return result

        if type(value) is dict:
            return {self._leaf(key, path): inside(item, key) for key, item in value.items()}, nodes
        if type(value) is Instance:
            return record_of(value, lambda state: inside(state, value.name)), nodes
        items = [inside(item, index) for index, item in enumerate(value)]
        return (items if type(value) is list else tuple(items)), nodes

    def _leaf(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is Storage:
            return self.lazy(TensorView(value, value.dtype, 0, (value.numel,), (1,)), path)
        if kind is NumpyArray:
            return self._array(value, path)
        if kind is Global:
            return DTYPES.get(value.name, value.name)
        return value.descr if kind is NumpyType else value

    def _array(self, array: NumpyArray, path: str) -> LazyTensor | str:
        dtype = torch_dtype(array.descr)
        if isinstance(dtype, str):
            return f"a numpy array that {dtype}"
        count = element_count(array.shape)
        if count is None or len(array.raw) != count * dtype.itemsize:
            fact = f"{path!r}: a numpy array of shape {brief(array.shape)} and {dtype}"
            raise self.file.bad(f"{fact} has {len(array.raw)} bytes", AGAIN)
        shape, raw = array.shape, array.raw
        order = shape[::-1] if array.fortran else shape
        axes = tuple(reversed(range(len(shape)))) if array.fortran else tuple(range(len(shape)))

        def read() -> torch.Tensor:
            if count == 0:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(bytearray(raw), dtype=dtype).view(order).permute(axes)

        return LazyTensor(shape, dtype, read)

    def lazy(self, view: TensorView, path: str) -> LazyTensor:
        """The tensor of a view; raises CheckpointError where it reaches outside its storage."""
        self.tensors += 1
        self.file.refuse_many(self.tensors)
        storage, dtype, shape, strides = view.storage, view.dtype, view.shape, view.strides
        block = self.locate(storage)
        size = storage.numel * storage.dtype.itemsize
        if size > block.nbytes:
            fact = f"{path!r}: storage {storage.key!r} of {storage.numel} {storage.dtype} needs {size} bytes"
            raise self.file.bad(f"{fact}, the file holds {block.nbytes}", AGAIN)

        def bad(fact: str) -> CheckpointError:
            stated = f"shape {brief(shape)}, strides {brief(strides)}, offset {brief(view.offset)}"
            return self.file.bad(f"{path!r}: a view of {stated} {fact}", AGAIN)

        count = element_count(shape)
        steps_fit = len(strides) == len(shape)
        for step in strides:
            steps_fit = steps_fit and type(step) is int and 0 <= step <= MAX_INT64
        if count is None or not steps_fit or type(view.offset) is not int or view.offset < 0:
            raise bad("is impossible")
        if storage.first and dtype != storage.dtype:
            raise bad("changes the type of a part of a storage")
        first = view.offset + storage.first
        room = size // dtype.itemsize
        row_major = strides == contiguous_strides(shape)
        if row_major:
            last = first + count - 1
        else:
            self.file.refuse_large(path, count * dtype.itemsize)
            last = first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if count > 0 and last >= room:
            raise bad(f"runs past storage {storage.key!r} of {room} elements (reaches {last})")
        if count > 0 and row_major and block.crc is None:
            nbytes = count * dtype.itemsize
            part = Block(self.file, path, block.start + first * dtype.itemsize, nbytes, nbytes)
            return LazyTensor(shape, dtype, part)
        return lazy_view(block, dtype, shape, strides, first)
