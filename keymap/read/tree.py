"""Turn the value of a pickle into a tree of lazy tensors; check each tensor against its storage."""

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
SHOWN = 200  # longest path that a message shows, and longest name within it
PLAIN = (str, int, float, bool, bytes)
MAX_NODES = 2_000_000
AGAIN = "download or save the file again"
STATE_DICT = "save only the state dict"


class TreeBuilder:
    """Turns the value of a pickle into plain dicts, lists, tuples and leaves.

    A container that occurs several times is converted once and stays shared. A container that contains itself, or
    that has too many values when every occurrence counts, is refused.
    """

    def __init__(self, file: SourceFile, locate: Callable[[Storage], Block]) -> None:
        """``locate`` returns the block of a storage and raises CheckpointError if the file lacks it."""
        self.file, self.locate = file, locate
        self.converted: dict[int, tuple[Any, int]] = {}
        self.open: set[int] = set()
        self.tensors = 0

    def tree(self, value: Any) -> dict[str, Any]:
        """The tree of a file: a dict as it is, any other value under the key ""."""
        result = self.convert(value)
        if not isinstance(result, dict):
            return {"": result}
        for key in result:
            if type(key) is not str:
                raise self.file.error(f"has a key that is not a string ({type(key).__name__})", STATE_DICT)
        return result

    def convert(self, value: Any) -> Any:
        """Check and convert one value; raises CheckpointError, which names the key."""
        return self._convert(value, "", 0)[0]

    def _convert(self, value: Any, path: str, depth: int) -> tuple[Any, int]:
        """The converted value, and the number of values in it."""
        kind = type(value)
        if kind is TensorView:
            return self.lazy(value, path), 1
        if kind not in (dict, list, tuple, Instance):
            return self._leaf(value, path), 1
        known = self.converted.get(id(value))
        if known is not None:
            return known
        if id(value) in self.open:
            raise self.file.error(f"{path!r} contains itself", STATE_DICT)
        if depth > MAX_DEPTH:
            raise self.file.error(f"it nests deeper than {MAX_DEPTH} levels, at {path!r}", STATE_DICT)
        self.open.add(id(value))
        result, nodes = self._container(value, path, depth + 1)
        self.open.discard(id(value))
        if nodes > MAX_NODES:
            raise self.file.error(f"{path!r} holds more than {MAX_NODES} values", STATE_DICT)
        self.converted[id(value)] = (result, nodes)
        return result, nodes

    def _container(self, value: Any, path: str, depth: int) -> tuple[Any, int]:
        nodes = 1

        def convert_item(item: Any, name: object) -> Any:
            nonlocal nodes
            if item is None or type(item) in PLAIN:
                nodes += 1
                return item
            shown = name if type(name) is str else brief(name)
            result, count = self._convert(item, f"{path}.{shown[:SHOWN]}"[-SHOWN:] if path else shown[:SHOWN], depth)
            nodes += count
            return result

        if type(value) is dict:
            return {self._leaf(key, path): convert_item(item, key) for key, item in value.items()}, nodes
        if type(value) is Instance:
            return record_of(value, lambda state: convert_item(state, value.name)), nodes
        items = [convert_item(item, index) for index, item in enumerate(value)]
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
            raise self.file.error(f"{fact} has {len(array.raw)} bytes", AGAIN)
        shape, raw = array.shape, array.raw
        order = shape[::-1] if array.fortran else shape
        axes = tuple(reversed(range(len(shape)))) if array.fortran else tuple(range(len(shape)))

        def read() -> torch.Tensor:
            if count == 0:
                return torch.empty(shape, dtype=dtype, device="cpu")
            return torch.frombuffer(bytearray(raw), dtype=dtype).view(order).permute(axes)

        return LazyTensor(shape, dtype, read)

    # long: 16 branches; each check of a hostile view has its own message, and their order matters
    def lazy(self, view: TensorView, path: str) -> LazyTensor:
        """The tensor of a view; raises CheckpointError if it reaches outside its storage."""
        self.tensors += 1
        self.file.limit_tensors(self.tensors)
        storage, dtype, shape, strides = view.storage, view.dtype, view.shape, view.strides
        block = self.locate(storage)
        size = storage.numel * storage.dtype.itemsize
        if size > block.nbytes:
            fact = f"{path!r}: storage {storage.key!r} of {storage.numel} {storage.dtype} needs {size} bytes"
            raise self.file.error(f"{fact}, but the file holds {block.nbytes}", AGAIN)

        def view_error(fact: str) -> CheckpointError:
            stated = f"shape {brief(shape)}, strides {brief(strides)}, offset {brief(view.offset)}"
            return self.file.error(f"{path!r}: a view of {stated} {fact}", AGAIN)

        count = element_count(shape)
        strides_fit = len(strides) == len(shape)
        for stride in strides:
            strides_fit = strides_fit and type(stride) is int and 0 <= stride <= MAX_INT64
        if count is None or not strides_fit or type(view.offset) is not int or view.offset < 0:
            raise view_error("is impossible")
        if storage.first and dtype != storage.dtype:
            raise view_error("changes the dtype of a view of a storage")
        first = view.offset + storage.first
        elements = size // dtype.itemsize
        row_major = strides == contiguous_strides(shape)
        if row_major:
            last = first + count - 1
        else:
            self.file.limit_memory(path, count * dtype.itemsize)
            last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if count > 0 and last >= elements:
            raise view_error(f"runs past storage {storage.key!r} of {elements} elements (reaches {last})")
        if count > 0 and row_major and block.crc is None:
            nbytes = count * dtype.itemsize
            region = Block(self.file, path, block.start + first * dtype.itemsize, nbytes, nbytes)
            return LazyTensor(shape, dtype, region)
        return lazy_view(block, dtype, shape, strides, first)
