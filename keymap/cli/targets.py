"""Models to plan for and to load into: a configuration of OpenCLIP, or the names and shapes of another checkpoint."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from keymap.advice import renaming
from keymap.errors import DetectionError, MappingError, PlanError, printable
from keymap.plan.export import only_reading
from keymap.plan.to_hub import to_hub
from keymap.source.hubs import ask, find_mapping
from keymap.source.open import open_source, open_under_one_hub

__all__ = ["like", "named"]

_SHOWN = 200  # characters of an error of OpenCLIP


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries print about a model that has no weights."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def named(name: str) -> nn.Module:
    """The model of an OpenCLIP configuration, on the meta device: names, shapes and settings, no memory.

    Raises:
        PlanError: OpenCLIP is not installed, has no such configuration, or cannot build it.
    """
    asked = f"--model {shlex.quote(name)}"
    with _quiet():
        try:
            import open_clip
        except ImportError as error:
            raise PlanError(
                f"{asked}: OpenCLIP cannot be imported ({error}); install it with: pip install open_clip_torch"
            ) from error
        known: list[str] = open_clip.list_models()
        if name not in known:
            near = get_close_matches(name[:_SHOWN], known, 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "`keymap inspect FILE` names those that fit a file"
            raise PlanError(f"{asked}: OpenCLIP has no such configuration; {hint}")
        try:
            with torch.device("meta"):
                model: nn.Module = open_clip.create_model(
                    name, device="meta", load_weights=False, pretrained=None, pretrained_text=False
                )
        except Exception as error:  # of code that keymap does not know, or of a download
            reason = printable(str(error))[:_SHOWN]
            raise PlanError(
                f"{asked}: OpenCLIP cannot build it: {type(error).__name__}: {reason}; a text tower of "
                f"transformers takes its configuration from the hub: download it first, or unset HF_HUB_OFFLINE"
            ) from error
    return model


class _Described(nn.Module):
    """A module that has a state dict and no settings."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._tensors)


def hub_of_any_model(mapping: str | None) -> str | None:
    """The hub of a mapping whose rules lead to a model's own names, whatever they are; None for another mapping."""
    try:
        hub = find_mapping(mapping)[0].hub if mapping is not None else None
    except MappingError:  # the plan says what is wrong, or asks for the hub
        return None
    return hub.name if hub is not None and hub.by_name else None


def like(
    path: str,
    wrapper: str | None,
    mapping: str | None,
    facts: Mapping[str, int] | None,
    weights_only: bool,
    hub: str | None,
) -> nn.Module:
    """A module with the names and shapes that a checkpoint has after a translation to its hub's names.

    Raises:
        KeymapError: the checkpoint is refused, or a tensor of it has no name in the hub.
    """
    with renaming({"wrapper": "like_wrapper", "mapping": "like_mapping"}):
        opened = open_under_one_hub([(path, wrapper)], weights_only) if hub is None and mapping is None else None
        one = opened[0] if opened else open_source(path, weights_only, ask(hub, mapping), wrapper)
        try:
            source = only_reading(one)
        except DetectionError as error:
            if one.top[0].refused or one.top[0].found is not None or hub is not None or mapping is not None:
                raise
            advice = "to take its names and shapes as they are, as for a model that no hub knows, pass hub='any'"
            raise DetectionError(error.summary, [*error.faults, advice]) from error
    assert source.found is not None, "a source without a format is refused before"
    translated = to_hub(source.found, facts or {})
    if translated.faults or translated.unowned:
        faults = [fault.text for fault in translated.faults]
        faults += [f"{key}: has no place in the names of hub {source.known.hub.name}" for key in translated.unowned]
        raise PlanError(f"--like {source.file}: does not describe a model", faults)
    return _Described(
        {
            key: torch.empty(layout.shape, dtype=layout.dtype, device="meta")
            for key, layout in translated.tensors.items()
        }
    )
