"""Modules whose loading is more than a copy: tried before the load, and refused where keymap's copy would differ.

`torch.nn.Module.load_state_dict` lets a module change what it loads: by hooks before and after, by an overridden
``_load_from_state_dict``, by ``set_extra_state``. keymap writes the tensors itself. So every such module is called
with tensors that have no values, under the model's own names. A module that only renames old names finds nothing to
do, and keymap's copy is right. Any other module is refused by its path. A trial leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from keymap.errors import LoadError, PlanError
from keymap.plan.model import ModelView, has_memory, modules_of
from keymap.plan.plan import Plan

__all__ = ["call_post_hooks", "refuse_hooks"]

_PLAIN = {id(base._load_from_state_dict) for base in (nn.Module, _NormBase, _InstanceNorm)}  # these only copy
_CONVERT = "load with model.load_state_dict(keymap.convert_state_dict(...))"
_SHOWN = 3  # names that a fault lists

Values = Mapping[str, torch.Tensor]


def refuse_hooks(view: ModelView, plan: Plan, strict: bool) -> None:
    """Refuse a model in which a module does more on loading than copy tensors.

    Raises:
        PlanError: a hook or an overridden ``_load_from_state_dict`` changes names, shapes or values, or needs values
            to decide; or, under ``strict``, a module takes extra state, which no format has.
    """
    faults = list(_faults(view, plan, strict))
    if faults:
        raise PlanError(f"{plan.file}: modules of the model do more on loading than copy tensors", faults)


def _faults(view: ModelView, plan: Plan, strict: bool) -> Iterator[str]:
    for path, module in view.modules.items():
        kind = type(module)
        if strict and kind.set_extra_state is not nn.Module.set_extra_state:
            extra = "takes extra state, which the file does not hold; strict=False leaves it unchanged"
            yield f"{_named(path, module)} {extra}"
        if not path and (kind.load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in vars(module)):
            yield f"{_named(path, module)} has its own load_state_dict, which keymap does not call; {_CONVERT}"
        if "_load_from_state_dict" in vars(module):  # a trial would run it on the module itself
            yield f"{_named(path, module)} has its own _load_from_state_dict in this instance; {_CONVERT}"
            continue
        plain = id(kind._load_from_state_dict) in _PLAIN
        if plain and not module._load_state_dict_pre_hooks:
            continue
        prefix = f"{path}." if path else ""
        values = {
            entry.key: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for entry in plan.entries
            if entry.key.startswith(prefix)
        }
        change = _change(module, prefix, values, plain) if values else ""
        if change:
            yield f"{_named(path, module)} {change}"


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _change(module: nn.Module, prefix: str, values: Values, plain: bool) -> str:
    """What a module changes of a state dict with the model's own names; empty for nothing.

    A file that torch wrote has the version of each module beside the tensors; of any other file torch does not know
    the version. A module may convert old versions, so both are tried.
    """
    for metadata in ({"version": module._version}, dict[str, Any]()):
        change = _change_by_hooks(module, prefix, values, metadata) if module._load_state_dict_pre_hooks else ""
        if not change and not plain:
            change = _change_by_loading(module, prefix, values, metadata)
        if change:
            return change if metadata else f"{change}; torch does this if the file does not name the module's version"
    return ""


# --- a trial leaves the model as it was ---


class _WriteError(RuntimeError):
    """An operation of a trial that would write to a tensor of the model."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation on tensors, and refuses those that write to tensors with values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.writes: list[str] = []  # a hook may catch the exception

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
            for tensor in target if isinstance(target, (list, tuple)) else (target,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    self.writes.append(name)
                    raise _WriteError(name)
        self.calls.append((name, args))
        return func(*args, **(kwargs or {}))


class _Kept(NamedTuple):
    """What a module had before a trial: its attributes, and of each of its tensors the values and the flag."""

    module: nn.Module
    attributes: Mapping[str, Any]
    tensors: tuple[tuple[torch.Tensor, torch.Tensor, bool], ...]


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[list[str]]:
    """Put a module, and those in it, back as they were; the list then holds the names of what had changed."""
    touched: list[str] = []
    kept = {path: _kept(inner) for path, inner in modules_of(module).items()}
    try:
        yield touched
    finally:
        for path, one in kept.items():
            touched += [f"{path}.{name}".removeprefix(".") for name in _restore(one)]


def _kept(module: nn.Module) -> _Kept:
    attributes = {name: dict(held) if isinstance(held, dict) else held for name, held in module.__dict__.items()}
    values: list[tuple[torch.Tensor, torch.Tensor, bool]] = []
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not is_lazy(tensor) and has_memory(tensor):
            values.append((tensor, tensor.detach(), tensor.requires_grad))
    return _Kept(module, attributes, tuple(values))


def _restore(kept: _Kept) -> list[str]:
    """Put a module's attributes and tensors back; the names of those that had changed."""
    held_now, touched = kept.module.__dict__, list[str]()
    for name in [*held_now]:
        if name not in kept.attributes:
            del held_now[name]
            touched.append(name)
    for name, value in kept.attributes.items():
        held = held_now.get(name)
        if isinstance(value, dict) and isinstance(held, dict):
            if {k: id(v) for k, v in held.items()} != {k: id(v) for k, v in value.items()}:
                held.clear()
                held.update(value)
                touched.append(name)
        elif held is not value:
            held_now[name] = value
            touched.append(name)
    for tensor, value, needs_grad in kept.tensors:
        if tensor.data_ptr() != value.data_ptr() or tensor.shape != value.shape or tensor.stride() != value.stride():
            tensor.data = value
            touched.append("data")
        if tensor.requires_grad != needs_grad:
            tensor.requires_grad_(needs_grad)
            touched.append("requires_grad")
    return touched


# --- hooks before a load ---


def _change_by_hooks(module: nn.Module, prefix: str, values: Values, metadata: Mapping[str, Any]) -> str:
    """What the hooks before a load change of a state dict with the model's own names; empty for nothing."""
    state, before = dict(values), {key: value._version for key, value in values.items()}
    advice = f"; remove the hook, or {_CONVERT}"
    recorder = _Recorder()
    failed: Exception | None = None
    with _unchanged(module) as touched:
        try:
            with recorder:
                for hook in list(module._load_state_dict_pre_hooks.values()):
                    hook(state, prefix, dict(metadata), True, [], [], [])
        except Exception as error:  # of code that keymap does not know, run without values
            failed = error
    if recorder.writes:
        return f"has a hook before loading that writes to the model by {recorder.writes[0]}{advice}"
    if failed is not None:
        return f"has a hook before loading that needs values ({type(failed).__name__}: {failed}){advice}"
    changed = [key for key in {**values, **state} if state.get(key) is not values.get(key)]
    changed += [key for key, value in values.items() if value._version != before[key]]
    if changed or touched:
        return f"has a hook before loading that changes {', '.join((changed or touched)[:_SHOWN])}{advice}"
    return ""


# --- an overridden _load_from_state_dict ---


def _change_by_loading(module: nn.Module, prefix: str, values: Values, metadata: Mapping[str, Any]) -> str:
    """What an overridden ``_load_from_state_dict`` does beside copies of each tensor to its own name.

    It runs on a copy of the module whose tensors have no values.
    """
    twin, own = _twin(module, prefix)
    errors: list[str] = []
    recorder = _Recorder()
    start = "has its own _load_from_state_dict, which"
    failed: Exception | None = None
    with _unchanged(module) as touched, _unchanged(twin) as of_twin:
        try:
            with recorder:
                twin._load_from_state_dict(dict(values), prefix, dict(metadata), True, [], [], errors)
        except Exception as error:  # of code that keymap does not know, run without values
            failed = error
    if recorder.writes:
        return f"{start} writes to the model by {recorder.writes[0]}; {_CONVERT}"
    if failed is not None:
        return f"{start} needs values ({type(failed).__name__}: {failed}); {_CONVERT}"
    copied: dict[str, int] = {}
    for name, args in recorder.calls:
        if name in ("aten.detach", "aten.alias"):
            continue
        key = _copied_key(name, args, own, values)
        if not key:
            return f"{start} computes ({name}); {_CONVERT}"
        copied[key] = copied.get(key, 0) + 1
    if touched or of_twin:
        return f"{start} changes {', '.join((of_twin or touched)[:_SHOWN])}; {_CONVERT}"
    lost = [key for key in own if key in values and copied.get(key) != 1]
    if lost or errors:
        what = ", ".join(lost[:_SHOWN]) or errors[0]
        return f"{start} does not copy {what}; {_CONVERT}"
    return ""


def _twin(module: nn.Module, prefix: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of a module, without hooks, whose tensors have no values; and these tensors by key."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    own: dict[str, torch.Tensor] = {}
    for field in ("_parameters", "_buffers"):
        held: dict[str, torch.Tensor | None] = {}
        for name, tensor in getattr(module, field).items():
            held[name] = None
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                held[name] = nn.Parameter(empty, requires_grad=False) if field == "_parameters" else empty
                own[prefix + name] = held[name]  # type: ignore[assignment]
        twin.__dict__[field] = held
    twin.__dict__["_load_state_dict_pre_hooks"] = type(module._load_state_dict_pre_hooks)()
    return twin, own


def _copied_key(name: str, args: tuple[Any, ...], own: Values, values: Values) -> str:
    """The key whose value an operation copies to the tensor of that key; empty for any other operation."""
    if name != "aten.copy_" or len(args) < 2:
        return ""
    return next((key for key, tensor in own.items() if args[0] is tensor and args[1] is values.get(key)), "")


# --- hooks after a load ---


def call_post_hooks(view: ModelView, missing: list[str], unexpected: list[str], file: str) -> None:
    """Call what modules registered for after a load, in torch's order; hooks may edit the two lists.

    Raises:
        LoadError: a hook fails; the tensors are loaded then.
    """
    if not any(module._load_state_dict_post_hooks for module in view.modules.values()):
        return
    keys = nn.modules.module._IncompatibleKeys(missing, unexpected)
    for path, module in _in_order_of_loading(view.model):
        for hook in list(module._load_state_dict_post_hooks.values()):
            try:
                hook(module, keys)
            except Exception as error:
                raise LoadError(
                    f"{file}: the tensors are loaded, but a hook of {path or 'the model'} that runs after loading "
                    f"failed ({type(error).__name__}: {error})"
                ) from error


def _in_order_of_loading(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module after those in it; one with several names comes again under each of them, as in torch."""
    for name, child in module._modules.items():
        if child is not None:
            yield from _in_order_of_loading(child, f"{path}.{name}".removeprefix("."))
    yield path, module
