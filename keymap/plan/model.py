"""What a plan needs of a model: its keys, shapes and dtypes, and the settings that weights do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from keymap.errors import PlanError, some
from keymap.language.format import Fact, Format, Scalar, as_size, as_word, config_text
from keymap.language.layout import Layout, whole

__all__ = [
    "ABSENT",
    "ModelView",
    "State",
    "attribute",
    "grids_of",
    "has_memory",
    "modules_of",
    "state_of",
    "view_model",
]


@dataclass(frozen=True, eq=False, repr=False)
class ModelView:
    """A model as a plan sees it.

    Attributes:
        model: the module.
        tensors: parameters and persistent buffers by key, in the model's own memory.
        facts: settings that weights do not show, for example head counts, by the hub's names.
        fact_paths: the attribute that each fact was read from.
        grids: (h, w) in patches, by the name of the fact that gives it.
        lazy: keys of parameters and buffers that have no shape yet.
        modules: its modules by dotted path, each once.
    """

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Scalar]
    grids: Mapping[str, tuple[int, int]]
    fact_paths: Mapping[str, str]
    lazy: tuple[str, ...]
    modules: Mapping[str, nn.Module]

    @cached_property
    def own(self) -> Mapping[int, torch.Tensor]:
        """The parameters and buffers of its modules, each once, by their id."""
        return {
            id(tensor): tensor
            for module in self.modules.values()
            for held in (module._parameters, module._buffers)
            for tensor in held.values()
            if tensor is not None
        }

    @cached_property
    def unsaved_meta_buffers(self) -> Mapping[str, torch.Tensor]:
        """Buffers on the meta device that no state dict holds, by dotted path."""
        saved = set(map(id, self.tensors.values()))
        return {
            f"{path}.{name}".removeprefix("."): buffer
            for path, module in self.modules.items()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and id(buffer) not in saved
        }

    def layouts(self) -> dict[str, Layout]:
        """The tensors by shape and dtype, like those of a file."""
        return {key: whole(key, tuple(value.shape), value.dtype) for key, value in self.tensors.items()}


ABSENT = object()


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by dotted path, each once: as ``named_modules()`` gives them, in a fraction of its time."""
    found: dict[str, nn.Module] = {"": model}
    seen = {id(model)}
    outer = [("", iter(model._modules.items()))] if not isinstance(model, ScriptModule) else []
    while outer:
        start, children = outer[-1]
        for name, child in children:
            if child is None or id(child) in seen:
                continue
            seen.add(id(child))
            found[start + name] = child
            if child._modules and not isinstance(child, ScriptModule):  # what is in that is compiled, too
                outer.append((f"{start}{name}.", iter(child._modules.items())))
                break
        else:
            outer.pop()
    return found


def attribute(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or ``ABSENT``."""
    value: Any = model
    for name in path.split("."):
        inner = value._modules.get(name) if isinstance(value, nn.Module) else None
        try:
            if inner is not None:
                value = inner
            else:
                value = value.get(name, ABSENT) if isinstance(value, dict) else getattr(value, name, ABSENT)
        except Exception:  # of a property that keymap does not know
            return ABSENT
        if value is ABSENT or value is None:
            return value
    return value


def _held(model: nn.Module, path: str, word: Scalar | None) -> Any:
    """What an attribute holds, or the word for one that holds anything.

    A list of words is one word, and a module its class; torch's GELU also names its approximation.
    """
    value = attribute(model, path)
    if word is not None and value is not None and value is not ABSENT:
        return word
    if isinstance(value, nn.Module):
        approximate = getattr(value, "approximate", "none")
        return type(value).__name__ + (f" {approximate}" if approximate != "none" else "")
    return as_word(value)


def _fact_value(fact: Fact, model: nn.Module) -> tuple[Any, str]:
    """A fact as the model has it, and where: a number, (h, w), a word, or whether an attribute holds anything."""
    for path, divide, word in fact.paths:
        value = _held(model, path, word)
        if value is ABSENT:
            continue
        if value is None and config_text(None) in fact.words:
            return fact.words[config_text(None)], path
        if fact.present:
            return value is not None, path
        if isinstance(value, (str, bool, float)):
            return value, path
        by = attribute(model, divide) if isinstance(divide, str) else divide
        if not isinstance(by, int) or by < 1:
            continue
        if isinstance(value, int):
            return value // by, path
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
            return (value[0] // by, value[1] // by), path
    return None, ""


def has_memory(tensor: torch.Tensor) -> bool:
    """True where a tensor's elements lie in memory of its own; a subclass with its own dispatch may have none."""
    kind = type(tensor)
    plain = kind is nn.Parameter or kind is torch.Tensor or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and not tensor.is_meta


def _why_unloadable(tensor: torch.Tensor) -> str:
    """Why a load cannot fill a tensor; empty where it can."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else tensor.layout
        return f"is {kind}: load before you convert it, or make it dense"
    return "is a view that negates or conjugates: clone it" if tensor.is_neg() or tensor.is_conj() else ""


class State(NamedTuple):
    """A model's state dict: its tensors, and the keys of parameters and buffers that have no shape yet; its modules."""

    tensors: Mapping[str, torch.Tensor]
    lazy: tuple[str, ...]
    modules: Mapping[str, nn.Module]


def state_of(model: nn.Module) -> State:
    """The parameters and persistent buffers of a model, in its own memory.

    Raises:
        PlanError: a tensor of the model is sparse, quantized, or a view that negates or conjugates; or the model has
            ScriptModules, or a ``state_dict()`` that fails.
    """
    state = _state_dict(model)
    modules = modules_of(model)  # now, because a hook of the state dict can replace modules
    scripted = [path or "the model" for path, module in modules.items() if isinstance(module, ScriptModule)]
    if scripted:
        raise PlanError(
            f"the model holds compiled TorchScript ({some(scripted)}): load into the model before torch.jit.script or "
            f"torch.jit.trace, for example with create_model(..., jit=False)"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    lazy = tuple(key for key, value in state.items() if is_lazy(value))
    for key in lazy:
        tensors.pop(key, None)
    unloadable = [f"{key} {why}" for key, value in tensors.items() if (why := _why_unloadable(value))]
    if unloadable:
        raise PlanError(f"tensors of the model cannot be loaded into: {some(unloadable)}")
    return State(tensors, lazy, modules)


def view_model(model: nn.Module, hub: Format, state: State | None = None) -> ModelView:
    """Read a model's keys and facts; the model is not changed.

    Args:
        model: the module.
        hub: the hub of its keys, which says where a model has facts.
        state: `state_of` the model, if the caller has it.

    Raises:
        PlanError: as `state_of`.
    """
    state = state_of(model) if state is None else state
    facts: dict[str, Scalar] = {}
    paths: dict[str, str] = {}
    grid_facts = _grid_facts(hub)
    for name, fact in hub.facts.items():
        if name in grid_facts:
            continue
        value, path = _fact_value(fact, model)
        value = as_size(value)
        if isinstance(value, (str, int, float)) or (isinstance(value, tuple) and fact.kind == "size"):
            facts[name], paths[name] = value, path
    return ModelView(model, state.tensors, facts, grids_of(model, hub), paths, state.lazy, state.modules)


def _grid_facts(hub: Format) -> set[str]:
    """The facts that are a model's grids."""
    return {position.grid_fact for position in hub.positions.values()} & hub.facts.keys()


def grids_of(model: nn.Module, hub: Format) -> dict[str, tuple[int, int]]:
    """(h, w) in patches of a model's image positions, by the hub's names of them."""
    grids = {}
    for name in _grid_facts(hub):
        value, _ = _fact_value(hub.facts[name], model)
        sides = (value, value) if type(value) is int else value
        if isinstance(sides, tuple) and min(sides) > 0:  # anything else is not a grid
            grids[name] = sides
    return grids


def _state_dict(model: nn.Module) -> Mapping[str, Any]:
    """The model's own parameters and persistent buffers by key.

    Raises:
        PlanError: ``model.state_dict()`` fails.
    """
    try:
        state = model.state_dict(keep_vars=True)
    except TypeError:  # a state_dict of the user that does not take this argument
        return {
            f"{path}.{name}".removeprefix("."): tensor
            for path, module in model.named_modules(remove_duplicate=False)
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name not in module._non_persistent_buffers_set
        }
    except Exception as error:  # of code that keymap does not know
        raise PlanError(f"model.state_dict() failed with {type(error).__name__}: {error}; repair it first") from error
    if not isinstance(state, Mapping):
        raise PlanError(f"model.state_dict() returned a {type(state).__name__}, not a dict of tensors; repair it first")
    return {key: value for key, value in state.items() if isinstance(key, str)}
