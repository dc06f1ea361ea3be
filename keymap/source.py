"""The first three steps, read → unwrap → detect, and the configuration file that may lie beside a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keymap.detect import Detection, detect
from keymap.errors import CheckpointError, MappingError
from keymap.pieces import Layout, whole
from keymap.read import LazyTensor, open_checkpoint
from keymap.registry import Registry, registry
from keymap.unwrap import Unwrapped, unwrap

__all__ = ["Opened", "PathLike", "config_of", "grid_of", "known_with", "layouts_of", "open_source"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Opened:
    """A checkpoint on its way to a plan."""

    known: Registry
    file: str
    container: str
    unwrapped: Unwrapped
    found: Detection


def known_with(mapping: PathLike | None) -> tuple[Registry, str | None]:
    """The registry, with a mapping file of the caller's if one is named, and the name to look for."""
    known = registry()
    if mapping is None:
        return known, None
    if not isinstance(mapping, (str, os.PathLike)):
        raise MappingError(f"mapping={mapping!r}: give the name of a format, or the path of a YAML file")
    name = os.fspath(mapping)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        if known.get(name).kind not in ("format", "hub"):
            formats = ", ".join(sorted(m.name for m in known.formats))
            raise MappingError(
                f"{name} is no format of a file (its kind is {known.get(name).kind}); formats: {formats}"
            )
        return known, name
    file = Path(name)
    own = next((m for m in known.mappings.values() if Path(m.file).resolve() == file.resolve()), None)
    if own is not None:
        return known, own.name
    if not file.is_file():
        raise MappingError(f"{name}: there is no such mapping file")
    extended = Registry(dict(known.mappings), dict(known.files))
    return extended, extended.add([file])[0].name


def layouts_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Layout]:
    return {key: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}


def open_source(path: PathLike, weights_only: bool, mapping: PathLike | None, wrapper: str | None) -> Opened:
    known, wanted = known_with(mapping)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise CheckpointError(f"the checkpoint is {path!r}: give the path of a file")
    if not isinstance(wrapper, (str, type(None))):
        raise CheckpointError(f"wrapper={wrapper!r}: give the dotted path of a state dict in the file")
    checkpoint = open_checkpoint(path, weights_only)
    file = str(checkpoint.path)
    unwrapped = unwrap(checkpoint.tree, known.containers, file, wrapper)
    found = detect(known, layouts_of(unwrapped.tensors), wanted, file=file)
    return Opened(known, file, checkpoint.container, unwrapped, found)


def config_of(file: str, found: Detection) -> dict[str, Any]:
    """What the format's configuration file beside a checkpoint tells of the image grid."""
    named = found.mapping.config
    path = Path(file).parent / named["file"] if named else None
    if path is None or not path.is_file() or path.stat().st_size > 1 << 20:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"config": f"{path.name} could not be read"}
    told: dict[str, Any] = {}
    for name in ("image_size", "patch_size"):
        value: Any = data
        for part in named[name].split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int) and value > 0:
            told[name] = (value, value)
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and v > 0 for v in value):
            told[name] = (value[0], value[1])
    return told


def grid_of(told: Mapping[str, Any]) -> tuple[int, int] | None:
    if "image_size" not in told or "patch_size" not in told:
        return None
    return told["image_size"][0] // told["patch_size"][0], told["image_size"][1] // told["patch_size"][1]
