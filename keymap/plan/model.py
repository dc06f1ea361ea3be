"""What a model tells a plan: its keys, shapes and dtypes, and the few facts that no weight holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from keymap.errors import PlanError, some
from keymap.language.format import Fact, Format, Scalar
from keymap.language.layout import Layout, whole

__all__ = ["ModelView", "has_memory", "modules_of", "view_model"]


@dataclass(frozen=True)
class ModelView:
    """A model as a plan sees it.

    Attributes:
        model: itself.
        tensors: parameters and persistent buffers by key, in the model's own memory.
        facts: head counts and the like, and in words what else no weight tells.
        grids: (h, w) in patches, by the name of the fact that gives it.
    """

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Scalar]
    grids: Mapping[str, tuple[int, int]]

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Its modules by dotted path, each once."""
        return modules_of(self.model)

    def layouts(self) -> dict[str, Layout]:
        """The tensors by shape and dtype, as those of a file."""
        return {key: whole(key, tuple(value.shape), value.dtype) for key, value in self.tensors.items()}


_NOTHING = object()


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by dotted path, each once, as ``named_modules()`` tells them in a tenth of its time."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        start = f"{path}." if path else ""
        inner = [(start + name, child) for name, child in module._modules.items() if child is not None]
        waiting += reversed(inner)
    return found


def _follow(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or ``_NOTHING`` where there is none."""
    here: Any = model
    for name in path.split("."):
        inner = here._modules.get(name) if isinstance(here, nn.Module) else None
        here = getattr(here, name, _NOTHING) if inner is None else inner
        if here is _NOTHING or here is None:
            return here
    return here


def _told(fact: Fact, model: nn.Module) -> Any:
    """What a model says of a fact: a number, (h, w), a word, or whether it has something; None for nothing."""
    for path, divide in fact.paths:
        value = _follow(model, path)
        if value is _NOTHING:
            continue
        if fact.present:
            return value is not None
        if isinstance(value, nn.Module):  # a module is told by its class, torch's GELU also by its approximation
            approximate = getattr(value, "approximate", "none")
            value = type(value).__name__ + (f" {approximate}" if approximate != "none" else "")
        if isinstance(value, (str, bool, float)):
            return value
        if isinstance(value, int):
            return value // divide
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
            return (value[0] // divide, value[1] // divide)
    return None


def has_memory(tensor: torch.Tensor) -> bool:
    """True where a tensor's elements lie in memory of its own, which a class that dispatches for itself may lack."""
    kind = type(tensor)
    plain = kind is nn.Parameter or kind is torch.Tensor or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and not tensor.is_meta


def _odd(tensor: torch.Tensor) -> str:
    """Why a tensor is none that a load can fill; empty for one that is."""
    if is_lazy(tensor):
        return "has no shape yet: run the model once, or set its sizes"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"is {'quantized' if tensor.is_quantized else tensor.layout}: load before, or make it dense"
    return "is a view that negates or conjugates: clone it" if tensor.is_neg() or tensor.is_conj() else ""


def view_model(model: nn.Module, hub: Format) -> ModelView:
    """Read a model's keys and facts; nothing of it is changed.

    Raises:
        PlanError: tensors of it are no dense tensors with elements of their own.
    """
    tensors = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    odd = [f"{key} {what}" for key, value in tensors.items() if (what := _odd(value))]
    if odd:
        raise PlanError(f"tensors of the model cannot be loaded into: {some(odd)}")
    facts: dict[str, Scalar] = {}
    grids: dict[str, tuple[int, int]] = {}
    of_grids = {position.grid_fact for position in hub.positions.values()}
    for name, fact in hub.facts.items():
        value = _told(fact, model)
        if name in of_grids:
            if value is not None:
                grids[name] = (value, value) if isinstance(value, int) else value
        elif isinstance(value, (str, int, float)):
            facts[name] = value
    return ModelView(model, tensors, facts, grids)
