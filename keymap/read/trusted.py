"""weights_only=False: what torch.load gives, as a tree. It runs the file's code; the caller asked for it."""

from __future__ import annotations

from typing import Any

import torch

from keymap.read.lazy import Checkpoint, LazyTensor, Record, SourceFile

MAX_DEPTH = 100


def read_trusted(file: SourceFile, container: str) -> Checkpoint:
    """The file through torch.load; modules become their state dicts.

    Raises CheckpointError for whatever torch.load raises, and for values that nest without end.
    """
    try:
        mapped = True if container == "torch" else None
        value = torch.load(file.path, map_location="cpu", weights_only=False, mmap=mapped)
    except Exception as error:
        fact = f"torch.load with weights_only=False raises {type(error).__name__}: {error}"
        raise file.bad(fact, "install what the file names, or save its state_dict() alone") from error
    result = _convert(file, value, "", 0)
    return Checkpoint(file.path, container, result if isinstance(result, dict) else {"": result})


def _convert(file: SourceFile, value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        fact = f"it nests deeper than {MAX_DEPTH} levels, at {path[:80]!r}"
        raise file.bad(fact, "save its state_dict() alone")
    if isinstance(value, torch.nn.Module):
        value = dict(value.state_dict())
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        return _lazy(value.detach()) if plain else Record("torch.Tensor", {"layout": str(value.layout)})
    if isinstance(value, dict):
        items = value.items()
        return {key: _convert(file, item, f"{path}.{key}", depth + 1) for key, item in items}
    if isinstance(value, list | tuple):
        parts = [_convert(file, item, f"{path}.{index}", depth + 1) for index, item in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype):
        return value
    kind = type(value)
    return Record(f"{kind.__module__}.{kind.__qualname__}", {})


def _lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
