"""OpenCLIP loads every file through keymap, from `install` to `uninstall`.

>>> import keymap.integrations.open_clip
>>> keymap.integrations.open_clip.install()
>>> keymap.integrations.open_clip.uninstall()

What changes: ``load_checkpoint``, and of ``create_model`` and the functions that call it the files of ``pretrained``,
``pretrained_image_path``, ``pretrained_text_path``, ``local-dir:`` and ``hf-hub:``. A file may then have any format
that keymap knows; one that does not fit raises a `KeymapError`.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

from keymap.api import load_checkpoint
from keymap.errors import PlanError, some

__all__ = ["install", "installed", "uninstall"]

_HUB = "open_clip"  # that of the models
_TOWER_PATH = re.compile(r"pretrained_(\w+)_path")
_lock = threading.RLock()
_log = logging.getLogger(__name__)


class _Patch(NamedTuple):
    """One name of a module that was replaced."""

    module: Any
    name: str
    original: Any
    ours: Any


class _State:
    """What is installed now.

    Attributes:
        patches: the names that are replaced; empty if nothing is installed.
        wanted: `install` was called.
        blocks: how many ``with installed()`` run.
    """

    def __init__(self) -> None:
        self.patches: list[_Patch] = []
        self.wanted = False
        self.blocks = 0


_state = _State()
_call = threading.local()  # .paths: of the tower files of the calls of create_model that run in this thread


def install() -> None:
    """Let OpenCLIP load files through keymap. A second call does nothing.

    Names that other code took before (``from open_clip import load_checkpoint``) stay OpenCLIP's own.

    Raises:
        ModuleNotFoundError: OpenCLIP is not installed.
    """
    with _lock:
        _state.wanted = True
        try:
            _update()
        except ModuleNotFoundError:
            _state.wanted = False
            raise


def uninstall() -> None:
    """Put OpenCLIP's own functions back. Without `install` it does nothing.

    In a block of `installed` they come back at the end of the block. A name that other code replaced in the meantime
    stays as that code left it.
    """
    with _lock:
        _state.wanted = False
        _update()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a block, in all threads; blocks may be nested."""
    with _lock:
        _state.blocks += 1
        try:
            _update()
        except ModuleNotFoundError:
            _state.blocks -= 1
            raise
    try:
        yield
    finally:
        with _lock:
            _state.blocks -= 1
            _update()


def _update() -> None:
    """Bring OpenCLIP's modules to what is wanted."""
    wanted = _state.wanted or _state.blocks > 0
    if wanted and not _state.patches:
        package, factory = import_module("open_clip"), import_module("open_clip.factory")
        ours = {
            "load_checkpoint": _checkpoint_loader(factory.load_checkpoint),
            "load_state_dict": _state_dict_loader(factory.load_state_dict),
            "create_model": _creator(factory.create_model),
        }
        for module in (factory, package):
            for name, function in ours.items():
                if getattr(module, name, None) is getattr(function, "__wrapped__", None):
                    _state.patches.append(_Patch(module, name, getattr(module, name), function))
        for patch in _state.patches:
            setattr(patch.module, patch.name, patch.ours)
    elif not wanted:
        while _state.patches:
            patch = _state.patches.pop()
            if getattr(patch.module, patch.name, None) is patch.ours:
                setattr(patch.module, patch.name, patch.original)


def _checkpoint_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load(
        model: Any, checkpoint_path: Any, strict: bool = True, weights_only: bool = True, device: Any = "cpu"
    ) -> Any:
        return load_checkpoint(model, checkpoint_path, strict, weights_only, device, hub=_HUB)

    return load


def _state_dict_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load(checkpoint_path: Any, *arguments: Any, **options: Any) -> Any:
        if checkpoint_path in getattr(_call, "paths", ()):
            return {}  # of a tower, which is loaded when the model is whole
        return original(checkpoint_path, *arguments, **options)

    return load


def _creator(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def create(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        paths = {
            found[1]: given[name]
            for name in given
            if (found := _TOWER_PATH.fullmatch(name)) is not None and given[name] and os.path.isfile(given[name])
        }
        if paths and given.get("jit"):
            raise PlanError("the file of a tower cannot be loaded with jit=True: pass jit=False, then script the model")
        before = getattr(_call, "paths", ())
        _call.paths = (*before, *paths.values())
        try:
            model = original(*arguments, **options)
        finally:
            _call.paths = before
        for tower, path in paths.items():
            _load_tower(model, tower, path, bool(given.get("weights_only", True)))
        return model

    return create


def _load_tower(model: Any, tower: str, path: Any, weights_only: bool) -> None:
    """Load one tower, as OpenCLIP does: what fits; what does not is logged."""
    result = load_checkpoint(model, path, strict=False, weights_only=weights_only, towers=(tower,), hub=_HUB)
    lacking = (*result.missing_keys, *result.report.plan.mismatched)
    _log.info("%s", result)
    if lacking:
        _log.warning("%s: the %s tower keeps its own values in %s", path, tower, some(lacking))
