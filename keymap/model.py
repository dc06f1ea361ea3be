"""What a model tells a plan: its keys, shapes and dtypes, and the few facts that no weight holds."""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keymap.mapping import Mapping
from keymap.pieces import Layout, whole

__all__ = ["ModelView", "view_model"]


@dataclass(frozen=True)
class ModelView:
    """A model as a plan sees it.

    Attributes:
        tensors: parameters and persistent buffers by key, in the model's own memory.
        layouts: the same by shape and dtype, for evidence.
        facts: head counts and the like.
        grid: (h, w) of the image tower's patches, where the model tells it.
    """

    tensors: MappingType[str, torch.Tensor]
    layouts: MappingType[str, Layout]
    facts: MappingType[str, int]
    grid: tuple[int, int] | None


def _follow(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    here: Any = model
    for name in path.split("."):
        if isinstance(here, nn.Module) and name in dict(here.named_children()):
            here = here.get_submodule(name)
        else:
            here = getattr(here, name, None)
        if here is None:
            return None
    return here


def _number(value: Any, divide: int) -> int | tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value // divide
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return (value[0] // divide, value[1] // divide)
    return None


def view_model(model: nn.Module, hub: Mapping) -> ModelView:
    """Read a model's keys and facts; nothing of it is changed."""
    tensors = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    facts: dict[str, int] = {}
    grid: tuple[int, int] | None = None
    for fact, paths in hub.facts.items():
        told = (_number(_follow(model, path), divide) for path, divide in paths)
        value = next((v for v in told if v is not None), None)
        if fact == "image.grid":
            grid = (value, value) if isinstance(value, int) else value
        elif isinstance(value, int):
            facts[fact] = value
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    return ModelView(tensors, layouts, facts, grid)
