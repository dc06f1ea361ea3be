"""weights_only=False: read a file with torch.load, which runs the file's code. The caller asked for it."""

from __future__ import annotations

from typing import Any

import torch

from keymap.read.lazy import Checkpoint, LazyTensor, Record, SourceFile

MAX_DEPTH = 100


def read_trusted(file: SourceFile, container: str) -> Checkpoint:
    """Read the file with torch.load; modules become their state dicts.

    Raises:
        CheckpointError: torch.load raises any error, or the values nest too deep.
    """
    try:
        mapped = True if container == "torch" else None
        value = torch.load(file.path, map_location="cpu", weights_only=False, mmap=mapped)
    except Exception as error:
        fact = f"torch.load with weights_only=False raises {type(error).__name__}: {error}"
        raise file.error(fact, "install the packages that the file needs, or save only its state_dict()") from error
    result = _convert(file, value, "", 0)
    return Checkpoint(file.path, container, result if isinstance(result, dict) else {"": result})


def _convert(file: SourceFile, value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        fact = f"it nests deeper than {MAX_DEPTH} levels, at {path[:80]!r}"
        raise file.error(fact, "save only its state_dict()")
    if isinstance(value, torch.nn.Module):
        value = dict(value.state_dict())
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        return _lazy(value.detach()) if plain else Record("torch.Tensor", {"layout": str(value.layout)})
    if isinstance(value, dict):
        items = value.items()
        return {key: _convert(file, item, f"{path}.{key}", depth + 1) for key, item in items}
    if isinstance(value, list | tuple):
        converted = [_convert(file, item, f"{path}.{index}", depth + 1) for index, item in enumerate(value)]
        return converted if isinstance(value, list) else tuple(converted)
    if value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype):
        return value
    kind = type(value)
    return Record(f"{kind.__module__}.{kind.__qualname__}", {})


def _lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
