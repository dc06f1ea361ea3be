"""The names that a pickle may call with weights_only=True, and what keymap makes of each.

No name does here what it does in Python. For example, torch._utils._rebuild_tensor_v2 makes a TensorView, which is a
reference to a storage and some numbers, and argparse.Namespace makes a Record. A call of any other name is refused. A
name that is not called is only a text: nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from keymap.errors import some
from keymap.read.lazy import MAX_DIMS, Record, brief
from keymap.read.numpy_file import NOT_NUMBERS, torch_dtype
from keymap.read.unpickle import BadPickleError, ForbiddenGlobalError, Global, UnreadTensorError, check_keys

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (
        *STORAGE_DTYPES.values(),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex32,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),  # from torch 2.7 on
    )
}
NAMES_ONLY = frozenset(
    ["torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"]
    + [f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "tuple", "bytes", "object")]
)
SIZES: dict[Any, int] = {str: 1, bytes: 1, bytearray: 1, list: 100, dict: 100, tuple: 100, set: 100, frozenset: 100}
UNREAD = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
}


@dataclass(eq=False, repr=False, slots=True)
class Storage:
    """A storage that tensors of the pickle use; ``torch_file`` finds its bytes later."""

    key: str
    dtype: torch.dtype
    numel: int
    first: int = 0  # first element, if this is a view of a storage, as in older files


@dataclass(eq=False, repr=False, slots=True)
class TensorView:
    """A tensor as the pickle states it, not checked yet."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False, repr=False, slots=True)
class NumpyType:
    """A numpy dtype by its type string."""

    descr: str


@dataclass(eq=False, repr=False, slots=True)
class NumpyArray:
    """A numpy array with its values, which the pickle itself holds."""

    descr: str = ""
    shape: tuple[int, ...] = ()
    fortran: bool = False
    raw: bytes = b""


@dataclass(eq=False, repr=False, slots=True)
class Instance:
    """An object of a class that keymap did not import."""

    name: str
    state: Any = None


def _current_name(module: str, name: str) -> str:
    """A name as the current versions of Python, torch and numpy have it."""
    module = {"__builtin__": "builtins", "torch.storage": "torch"}.get(module, module)
    module = module.replace("numpy.core.", "numpy._core.").replace("pathlib._local", "pathlib")
    full = f"{module}.{name}"
    return {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}.get(full, full)


class AllowedGlobals:
    """The table of allowed names, and the storages that a pickle refers to.

    Attributes:
        scripted: whether classes of a TorchScript archive (``__torch__.``) are allowed.
        storages: all storages that the pickle refers to, in order.
        unknown: names that the pickle names and does not call.
        object_arrays: how many numpy arrays of Python objects it holds.
    """

    def __init__(self, scripted: bool = False) -> None:
        self.scripted = scripted
        self.storages: list[Storage] = []
        self.unknown: dict[str, None] = {}
        self.object_arrays = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was skipped."""
        notes = [f"names that keymap did not import: {some(self.unknown)}"] if self.unknown else []
        if self.object_arrays:
            many = f"{self.object_arrays} numpy arrays" if self.object_arrays > 1 else "a numpy array"
            notes.append(f"skipped {many} of Python objects")
        return tuple(notes)

    def find(self, module: str, name: str) -> Global:
        """The name ``module.name`` under its current name; raises UnreadTensorError for tensors that are not read."""
        full = _current_name(module, name)
        if full in UNREAD:
            raise UnreadTensorError(UNREAD[full])
        if not self._is_known(full):
            self.unknown[full if full.isprintable() else brief(full)] = None
        return Global(full)

    def may_name(self, module: str, name: str) -> bool:
        """Whether a name is one that checkpoints need."""
        return self._is_known(_current_name(module, name))

    def _is_known(self, full: str) -> bool:
        known = full in _CALLS or full in NAMES_ONLY or full in DTYPES or full in UNREAD
        storage = full.startswith("torch.") and full.removeprefix("torch.") in STORAGE_DTYPES
        return known or storage or (self.scripted and full.split(".")[0] == "__torch__")

    def call(self, name: str, arguments: tuple[Any, ...], spend: Callable[[int], None]) -> Any:
        """The value of a call, which runs no code of the file.

        Raises:
            ForbiddenGlobalError: the name may not be called.
            BadPickleError: the arguments are unknown.
        """
        function = _CALLS.get(name)
        if function is None:
            if not self._is_known(name):
                raise ForbiddenGlobalError(name)
            if name.startswith("__torch__."):
                return Instance(name)
            raise BadPickleError(f"it calls {name}, which a pickle may name but not call")
        nbytes = 0
        for value in arguments:
            kind = type(value)
            if kind in SIZES:
                nbytes += len(value) * SIZES[kind]
        spend(nbytes)
        try:
            return function(*arguments)
        except (TypeError, ValueError, OverflowError, LookupError, AttributeError):
            raise BadPickleError(f"it calls {name} with arguments that it does not take") from None

    def build(self, target: Any, state: Any) -> None:
        """Set the state of an Instance, a numpy array or a numpy dtype; raises BadPickleError for others."""
        if type(target) is Instance and target.state is None:
            target.state = state
        elif type(target) is NumpyType and type(state) is tuple and state[1:2] in (("<",), (">",), ("|",), ("=",)):
            target.descr = state[1] + target.descr.lstrip("<>|=")
        elif type(target) is NumpyArray and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, raw = state
            if type(dtype) is not NumpyType or type(shape) is not tuple or type(fortran) is not bool:
                raise BadPickleError("a numpy array has a state that numpy does not write")
            if type(raw) is list:  # of Python objects; keymap skips the array
                raw, dtype = b"", NumpyType("O")
                self.object_arrays += 1
            if not isinstance(raw, bytes):
                raise BadPickleError("a numpy array has a state that numpy does not write")
            target.descr, target.shape, target.fortran, target.raw = dtype.descr, shape, fortran, raw
        else:
            raise BadPickleError(f"it sets the state of a {type(target).__name__}")

    # long: 17 branches, one check for each field of the reference
    def persistent(self, reference: Any) -> Storage:
        """The storage of a tensor; raises BadPickleError for any other reference."""
        if type(reference) is not tuple or len(reference) < 5 or reference[0] != "storage":
            if type(reference) is tuple and reference[:1] == ("module",):
                raise ForbiddenGlobalError("torch.nn.Module (with its source code)")
            raise BadPickleError("it refers to an external object that is not a storage")
        kind, key, numel = reference[1], reference[2], reference[4]
        dtype = STORAGE_DTYPES.get(kind.name.removeprefix("torch.")) if type(kind) is Global else None
        if dtype is None or type(key) is not str or type(numel) is not int or numel < 0:
            raise BadPickleError("a storage has no known type, no key or no size")
        storage = Storage(key, dtype, numel)
        view = reference[5] if len(reference) > 5 else None
        if view is not None:
            if type(view) is not tuple or len(view) != 3 or any(type(n) is not int or n < 0 for n in view[1:]):
                raise BadPickleError("a view of a storage has no offset or size")
            if view[1] + view[2] > numel:
                raise BadPickleError(f"a view of storage {key!r} runs past its {numel} elements")
            storage.first = view[1]
        self.storages.append(storage)
        return storage


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView:
    if type(storage) is not Storage:
        raise TypeError
    return TensorView(storage, storage.dtype, offset, _sizes(shape), _sizes(strides))


def _tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any = None,
    hooks: Any = None,
    flags: Any = None,
) -> TensorView:
    if flags:
        raise UnreadTensorError("a lazily conjugated or negated tensor")
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> TensorView:
    view = _tensor_v2(storage, offset, shape, strides, grad, hooks, flags)
    return TensorView(view.storage, DTYPES[dtype.name], offset, view.shape, view.strides)


def _tensor_of_type(function: Any, kind: Any, arguments: Any, state: Any) -> TensorView:
    if function.name not in _TENSORS or kind.name not in NAMES_ONLY or type(arguments) is not tuple:
        raise TypeError
    return _parameter(_TENSORS[function.name](*arguments))


def _parameter(tensor: Any, *_: Any) -> TensorView:
    if type(tensor) is not TensorView:
        raise TypeError
    return tensor


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > MAX_DIMS:
        raise TypeError
    return tuple(value)


def _plain_dict(items: Any = ()) -> dict[Any, Any]:
    if items == ():
        return {}
    if type(items) not in (dict, list, tuple):
        raise TypeError  # a string would split into its characters
    pairs = list(items.items()) if type(items) is dict else list(items)
    check_keys(key for key, _ in pairs)
    return dict(pairs)


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    if factory is not None and type(factory) is not Global:
        raise TypeError
    return _plain_dict(items)


def _members(items: Any = ()) -> list[Any]:
    if type(items) not in (list, tuple, set):
        raise TypeError
    check_keys(items)
    return list(items)


def _bytearray(*arguments: Any) -> bytearray:
    if not arguments:
        return bytearray()
    if len(arguments) == 2:
        return bytearray(_encode(*arguments))
    if type(arguments[0]) not in (bytes, bytearray):
        raise TypeError  # a number n would allocate n bytes
    return bytearray(arguments[0])


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise TypeError
    return text.encode(encoding)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError  # str() of nested shared values could take for ever
    return value


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    if type(real) not in (float, int) or type(imaginary) not in (float, int):
        raise TypeError
    return complex(real, imaginary)


def _path(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        raise TypeError
    joined = "/".join(parts) or "."
    return joined[1:] if joined.startswith("//") else joined


def _numpy_type(descr: Any, *_: Any) -> NumpyType:
    if type(descr) is not str or len(descr) > 16:
        raise TypeError
    return NumpyType(descr)


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    if type(dtype) is not NumpyType:
        raise TypeError
    kind = dtype.descr.lstrip("<>|=")[:1]
    if kind in NOT_NUMBERS:  # a text, a date or an object, of which keymap needs nothing
        return Instance(f"a numpy scalar: {NOT_NUMBERS[kind]}")
    if type(raw) is not bytes or isinstance(torch_dtype(dtype.descr), str):
        raise TypeError
    if dtype.descr.lstrip("<>|=") == "V2":
        raise TypeError
    return numpy.frombuffer(raw, numpy.dtype(dtype.descr), 1)[0].item()


def _numpy_array(*_: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    if type(raw) not in (bytes, bytearray) or type(dtype) is not NumpyType:
        raise TypeError
    return NumpyArray(dtype.descr, _sizes(shape), order == "F", bytes(raw))


def _script_list(items: Any) -> Any:
    if type(items) is not list:
        raise TypeError
    return items


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch.Size": lambda sizes=(): _sizes(sizes),
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if type(part) in (str, int)),
    "torch.serialization._get_layout": _text,
    "torch.jit._pickle.build_tensorlist": _script_list,
    "torch.jit._pickle.build_intlist": _script_list,
    "torch.jit._pickle.build_doublelist": _script_list,
    "torch.jit._pickle.build_boollist": _script_list,
    "torch.jit._pickle.restore_type_tag": lambda value, tag: value,
    "collections.OrderedDict": _plain_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _plain_dict,
    "argparse.Namespace": lambda: Instance("argparse.Namespace"),
    "types.SimpleNamespace": lambda: Instance("types.SimpleNamespace"),
    "pathlib.Path": _path,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PureWindowsPath": _path,
    "builtins.set": lambda items=(): set(_members(items)),
    "builtins.frozenset": lambda items=(): frozenset(_members(items)),
    "builtins.complex": _complex,
    "builtins.bytearray": _bytearray,
    "builtins.slice": lambda *ends: slice(*(end if type(end) is int else None for end in ends)),
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy._core.numeric._frombuffer": _numpy_from_buffer,
}


def record_of(instance: Instance, convert: Callable[[Any], Any]) -> Record:
    """The Record of an Instance with converted attributes; a state that is not a dict is the attribute "state"."""
    if instance.state is None:
        return Record(instance.name, {})
    converted = convert(instance.state)
    return Record(instance.name, converted if isinstance(converted, dict) else {"state": converted})
