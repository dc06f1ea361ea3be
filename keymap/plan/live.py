"""A model in memory, read as a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from keymap.errors import PlanError
from keymap.language.catalogue import Catalogue
from keymap.language.format import Scalar
from keymap.plan.model import State, attribute, view_model
from keymap.plan.request import sizes_of
from keymap.plan.twins import lazy_state
from keymap.source.config import settings_in
from keymap.source.detect import NAMED, Detection
from keymap.source.hubs import Asked
from keymap.source.open import open_tree
from keymap.source.opened import Opened, Source
from keymap.source.search import owned_keys

__all__ = ["open_model", "plain_values"]

_NAME = "the model"


def open_model(model: nn.Module, known: Catalogue, state: State | None = None) -> tuple[Opened, Mapping[str, Scalar]]:
    """A model's state dict, and the facts that the model states, for example its head counts.

    Its names are the hub's. If they are not, they are taken for those of a format, as for a model of another library.

    Args:
        model: its tensors may be on any device; each is copied to the CPU when it is read.
        known: all mappings of its hub.
        state: `state_of` the model, if the caller has it.

    Raises:
        CheckpointError: it has no tensors.
    """
    facts = view_model(model, known.hub, state).facts
    state_dict = model.state_dict(keep_vars=True)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    lazy = lazy_state(tensors, lambda key, value: partial(_values, key, value))
    opened = open_tree(Asked(known, known.hub.name), lazy, None, sizes_of(facts))
    found = opened.top[0].found
    if found is None or found.evidence == NAMED:  # perhaps a model of another library, with the names of a format
        other = open_tree(Asked(known), lazy, None, sizes_of(facts))
        opened = other if found is None or _explains_more(other, found) else opened
    return replace(opened, file=_NAME, top=tuple(_named(source, model) for source in opened.top)), facts


def _explains_more(opened: Opened, found: Detection) -> bool:
    """Whether a format that the keys show names more of them than the hub does, whose evidence they lack."""
    owned = len(owned_keys(found.mapping, found.tensors))
    return any(
        one.found is not None and len(owned_keys(one.found.mapping, one.found.tensors)) > owned for one in opened.top
    )


def _named(source: Source, model: nn.Module) -> Source:
    """The source with the model's name, and the settings of the configuration that a model of its library holds."""
    config = source.found.mapping.config if source.found is not None else None
    held = attribute(model, config.model) if config is not None and config.model else None
    try:
        data = held if isinstance(held, dict) else held.to_dict()  # type: ignore[union-attr]
    except Exception:  # it has none, or one that keymap does not know
        return source._replace(file=_NAME)
    assert source.found is not None and config is not None, "only a format's configuration is looked for"
    found = source.found
    settings = settings_in(data, found.mapping, source.known.hub, f"{config.model} of the model", found.tensors)
    return source._replace(file=_NAME, settings=settings)


def _values(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise PlanError(f"{key} of the model is on the meta device and has no values: load the model first")
    return plain_values(tensor).to("cpu")


def plain_values(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its history, conjugated and negated where it says so."""
    return tensor.detach().resolve_conj().resolve_neg()
