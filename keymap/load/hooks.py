"""Modules whose loading is more than a copy: tried before the load, and refused where keymap's copy would differ.

`torch.nn.Module.load_state_dict` lets a module change what it loads: by hooks before and after, by an overridden
``_load_from_state_dict``, by ``set_extra_state``. keymap writes the tensors itself. So every such module is called
once with tensors that have no values, under the model's own names. A module that only renames old names finds nothing
to do, and keymap's copy is right. Any other module is refused by its path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from keymap.errors import LoadError, PlanError
from keymap.plan.model import ModelView
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
        plain = id(kind._load_from_state_dict) in _PLAIN
        if plain and not module._load_state_dict_pre_hooks:
            continue
        prefix = f"{path}." if path else ""
        values = {
            entry.key: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for entry in plan.entries
            if entry.key.startswith(prefix)
        }
        change = _change_by_hooks(module, prefix, values) if values else ""
        if values and not change and not plain:
            change = _change_by_loading(module, prefix, values)
        if change:
            yield f"{_named(path, module)} {change}"


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _metadata(module: nn.Module) -> dict[str, Any]:
    """What torch passes to a module for a state dict that its present version wrote."""
    return {"version": module._version}


# --- hooks before a load ---


def _change_by_hooks(module: nn.Module, prefix: str, values: Values) -> str:
    """What the hooks before a load change of a state dict with the model's own names; empty for nothing."""
    state, before = dict(values), {key: value._version for key, value in values.items()}
    kept = {name: dict(held) if isinstance(held, dict) else held for name, held in module.__dict__.items()}
    advice = f"; remove the hook, or {_CONVERT}"
    try:
        for hook in list(module._load_state_dict_pre_hooks.values()):
            hook(state, prefix, _metadata(module), True, [], [], [])
    except Exception as error:  # of code that keymap does not know, run without values
        return f"has a hook before loading that needs values ({type(error).__name__}: {error}){advice}"
    finally:
        touched = _restore(module, kept)
    changed = [key for key in {**values, **state} if state.get(key) is not values.get(key)]
    changed += [key for key, value in values.items() if value._version != before[key]]
    if changed or touched:
        return f"has a hook before loading that changes {', '.join((changed or touched)[:_SHOWN])}{advice}"
    return ""


def _restore(module: nn.Module, kept: Mapping[str, Any]) -> list[str]:
    """Put a module's attributes back; the names of those that had changed."""
    touched: list[str] = []
    for name in [*module.__dict__]:
        if name not in kept:
            del module.__dict__[name]
            touched.append(name)
    for name, value in kept.items():
        held = module.__dict__.get(name)
        if isinstance(value, dict) and isinstance(held, dict):
            if {k: id(v) for k, v in held.items()} != {k: id(v) for k, v in value.items()}:
                held.clear()
                held.update(value)
                touched.append(name)
        elif held is not value:
            module.__dict__[name] = value
            touched.append(name)
    return touched


# --- an overridden _load_from_state_dict ---


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func.overloadpacket), args))
        return func(*args, **(kwargs or {}))


def _change_by_loading(module: nn.Module, prefix: str, values: Values) -> str:
    """What an overridden ``_load_from_state_dict`` does beside copies of each tensor to its own name.

    It runs on a copy of the module whose tensors have no values.
    """
    twin, own = _twin(module, prefix)
    errors: list[str] = []
    recorder = _Recorder()
    try:
        with recorder:
            twin._load_from_state_dict(dict(values), prefix, _metadata(module), True, [], [], errors)
    except Exception as error:  # of code that keymap does not know, run without values
        return f"has its own _load_from_state_dict, which needs values ({type(error).__name__}: {error}); {_CONVERT}"
    copied: dict[str, int] = {}
    for name, args in recorder.calls:
        if name in ("aten.detach", "aten.alias"):
            continue
        key = _copied_key(name, args, own, values)
        if not key:
            return f"has its own _load_from_state_dict, which computes ({name}); {_CONVERT}"
        copied[key] = copied.get(key, 0) + 1
    lost = [key for key in own if key in values and copied.get(key) != 1]
    if lost or errors:
        what = ", ".join(lost[:_SHOWN]) or errors[0]
        return f"has its own _load_from_state_dict, which does not copy {what}; {_CONVERT}"
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
    """Call what modules registered for after a load, innermost first, as torch does; hooks may edit the two lists.

    Raises:
        LoadError: a hook fails; the tensors are loaded then.
    """
    keys = nn.modules.module._IncompatibleKeys(missing, unexpected)
    for path, module in reversed(list(view.modules.items())):
        for hook in list(module._load_state_dict_post_hooks.values()):
            try:
                hook(module, keys)
            except Exception as error:
                raise LoadError(
                    f"{file}: the tensors are loaded, but a hook of {path or 'the model'} that runs after loading "
                    f"failed ({type(error).__name__}: {error})"
                ) from error
