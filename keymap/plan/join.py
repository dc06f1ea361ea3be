"""Join the plans for towers that come from several state dicts of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from keymap.errors import PlanError, some
from keymap.language.format import Format
from keymap.language.layout import Layout, renamed
from keymap.plan.allowed import allowed, keys_are, suggestion
from keymap.plan.model import ModelView
from keymap.plan.plan import Plan
from keymap.plan.request import Request
from keymap.plan.to_hub import tower_of
from keymap.read import LazyTensor
from keymap.source.opened import Source

__all__ = ["Chosen", "Fit", "join"]

T = TypeVar("T")
Fit = tuple[Plan, Source]


class Chosen(NamedTuple):
    """A plan, and the tensors of the file that its pieces name."""

    plan: Plan
    tensors: Mapping[str, LazyTensor]


def join(hub: Format, parts: Sequence[Fit], model: ModelView, request: Request, others: Iterable[str]) -> Chosen:
    """One plan from a plan for each of some towers.

    Args:
        hub: the hub.
        parts: plans that fill different tensors of the model, and where their tensors come from.
        model: the model.
        request: what the caller asked for.
        others: paths of state dicts that are not loaded.

    Raises:
        PlanError: the request is strict, and the model has keys that none of the plans fills.
    """
    if len({source.unwrapped.path for _, source in parts}) > 1:
        parts = [_with_path(plan, source) for plan, source in parts]
    plans = [plan for plan, _ in parts]
    tensors = {key: lazy for _, source in parts for key, lazy in source.unwrapped.tensors.items()}
    planned = {entry.tower for plan in plans for entry in plan.entries}
    planned |= {tower_of(hub, key) for plan in plans for key in plan.missing_keys}
    towers = {key: tower_of(hub, key) for key in (*model.tensors, *model.lazy)}
    lacking = tuple(key for key, tower in towers.items() if tower not in planned and request.includes(tower))
    refused = [key for key in lacking if not allowed(request.allow_missing, key)]
    if refused and request.strict:
        raise PlanError(
            f"{request.file} does not fit the model; nothing was changed",
            [
                f"{keys_are(refused, 'model')} missing from the file: {some(refused)}",
                *suggestion(refused, towers),
            ],
        )
    first, outside = plans[0], {note for _, source in parts for note in source.unwrapped.outside}
    joined = replace(
        first,
        format=" + ".join(_each(plan.format for plan in plans)),
        title="; ".join(_each(plan.title for plan in plans)),
        evidence=tuple(_each(key for plan in plans for key in plan.evidence)),
        wrapper="",
        other_wrappers=tuple(_each((*first.other_wrappers, *others))),
        layouts={tower: chain for plan in plans for tower, chain in plan.layouts.items()},
        entries=tuple(entry for plan in plans for entry in plan.entries),
        checks=tuple(check for plan in plans for check in plan.checks),
        dropped={key: why for plan in plans for key, why in plan.dropped.items()},
        missing_keys=(*(key for plan in plans for key in plan.missing_keys), *lacking),
        unexpected_keys=tuple(_each(key for plan in plans for key in plan.unexpected_keys)),
        mismatched={key: why for plan in plans for key, why in plan.mismatched.items()},
        notes=tuple(_each(note for plan in plans for note in plan.notes if note not in outside)),
        warnings=tuple(_each(text for plan in plans for text in plan.warnings)),
        unverified=tuple(_each(text for plan in plans for text in plan.unverified)),
        steps=tuple(_each(step for plan in plans for step in plan.steps)),
        parts=tuple(part for plan in plans for part in plan.parts),
        settings=tuple(_each(row for plan in plans for row in plan.settings)),
        sources={key: tensor for plan in plans for key, tensor in plan.sources.items()},
    )
    return Chosen(joined, tensors)


def _each(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def _with_path(plan: Plan, source: Source) -> Fit:
    """The plan and its source with the whole path in the file as the name of each tensor."""
    start = "".join(f"{name}." for name in source.unwrapped.path)
    done: dict[int, Layout] = {}

    def named(layout: Layout) -> Layout:
        if id(layout) not in done:
            done[id(layout)] = renamed(layout, {key: start + key for key in layout.sources})
        return done[id(layout)]

    tensors = {start + key: lazy for key, lazy in source.unwrapped.tensors.items()}
    renamed_plan = replace(
        plan,
        entries=tuple(entry._replace(layout=named(entry.layout)) for entry in plan.entries),
        checks=tuple(
            check._replace(
                layout=named(check.layout), value=named(check.value) if isinstance(check.value, Layout) else check.value
            )
            for check in plan.checks
        ),
        dropped={start + key: why for key, why in plan.dropped.items()},
        unexpected_keys=tuple(start + key for key in plan.unexpected_keys),
        sources={start + key: tensor for key, tensor in plan.sources.items()},
    )
    return renamed_plan, source._replace(unwrapped=source.unwrapped._replace(tensors=tensors))
