"""Making a plan, in steps: translate, choose towers, bring to the model's layouts, match, judge.

Everything is decided from names, shapes and dtypes; all faults are collected before anything is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from keymap.errors import DetectionError, PlanError
from keymap.language.format import Format
from keymap.plan.matching import Sides, match
from keymap.plan.model import ModelView
from keymap.plan.own_names import OWN, is_foreign, own_names, take_own_names
from keymap.plan.plan import Part, Plan
from keymap.plan.refusals import judge, refuse_empty, refuse_other_model
from keymap.plan.request import Request, hub_towers, other_lengths, refuse_contradictions, sizes_of
from keymap.plan.to_hub import Translated, bring_to_layouts, to_hub, tower_of, towers_of_unowned
from keymap.source.detect import Detection, tower_layout
from keymap.source.opened import Source
from keymap.source.settings import compared, differences, unverified

__all__ = ["keep_towers", "make_plan"]


def make_plan(source: Source, model: ModelView, request: Request) -> Plan:
    """Plan the load of a checkpoint into a model.

    Raises:
        DetectionError: no format claims the checkpoint.
        PlanError: with every fault of the load: keys, shapes, dtypes, a tower that would stay empty.
    """
    known, found, unwrapped = source.known, source.found, source.unwrapped
    if found is None:
        raise source.refusal or DetectionError(f"{request.file}: no known format has these keys")
    own = found.mapping is OWN
    if not own:
        refuse_other_model(known, model, request.file)
    refuse_contradictions(request, model, source.settings)
    request = request._replace(stripped="".join(unwrapped.prefixes))
    translated, file_counts, tower_notes = _translate(source, found, model, request)
    hub_applies = not own or not is_foreign(known.hub, model)
    sides = Sides(known, found.mapping, translated, unwrapped.tensors, source.settings, model, request, hub_applies)
    matches = judge(sides, match(sides), file_counts, unwrapped.remarks)
    towers = dict.fromkeys(entry.tower for entry in matches.entries if not entry.filled)
    settings = compared(known.hub, towers, source.settings, model.facts)
    return Plan(
        file=request.file,
        container=source.container,
        format=found.mapping.name,
        title=found.mapping.title,
        evidence=found.evidence,
        wrapper=unwrapped.wrapper,
        other_wrappers=unwrapped.others,
        prefixes=unwrapped.prefixes,
        layouts={tower: tuple(chain) for tower, chain in translated.layouts.items()},
        entries=matches.entries,
        checks=(*translated.checks, *matches.checks),
        dropped=matches.dropped,
        missing_keys=matches.missing,
        unexpected_keys=matches.unexpected,
        mismatched=matches.mismatched,
        notes=(
            *source.notes,
            *source.settings.notes,
            *tower_notes,
            *translated.notes,
            *unwrapped.remarks,
            *matches.notes,
        ),
        warnings=differences(known.hub, settings),
        unverified=unverified(settings),
        steps=tuple(translated.steps),
        settings=settings,
        parts=(Part(tuple(towers), found.mapping.name, unwrapped.start),),
        sources={key: (lazy.shape, lazy.dtype) for key, lazy in unwrapped.tensors.items()},
        hub=known.hub.name,
    )


def _translate(
    source: Source, found: Detection, model: ModelView, request: Request
) -> tuple[Translated, Counter[str], tuple[str, ...]]:
    """The file's tensors under the model's names, how many it has of each tower, and notes for the report."""
    hub = source.known.hub
    if found.mapping is OWN:
        translated = own_names(found, model)
        notes = keep_towers(translated, request, hub)
        return translated, _counts(translated, hub), notes
    facts = source.settings.numbers | sizes_of(model.facts) | dict(request.facts)
    translated = to_hub(found, facts)
    _refuse_other_lengths(source, found, translated, model, request)
    notes = keep_towers(translated, request, hub)
    refuse_empty(translated, request, found.mapping.name, hub_towers(hub))
    counts = _counts(translated, hub)
    _bring_to_model(source, translated, model, facts)
    return translated, counts, (*notes, *take_own_names(translated, model, request, hub))


def _refuse_other_lengths(
    source: Source, found: Detection, translated: Translated, model: ModelView, request: Request
) -> None:
    """Refuse a file that is read in one way by numbers of the model, and in another by those of its configuration.

    Such numbers are head counts where the rows of each head change places: all shapes can agree, and the values not. A
    configuration that the shapes contradict is a matter for a warning.

    Raises:
        PlanError: with one fault for each number.
    """
    differing = other_lengths(translated.rules, request, model, source.settings)
    if not differing:
        return
    other = to_hub(found, sizes_of(model.facts) | source.settings.numbers)
    if len(other.faults) <= len(translated.faults) and other.tensors != translated.tensors:
        text = "by the numbers of its configuration the file is read in another way than by those of the model"
        raise PlanError(f"{request.file}: {text}; load into a model with the numbers of the file", differing.values())


def keep_towers(translated: Translated, request: Request, hub: Format) -> tuple[str, ...]:
    """Take what was not asked for out of ``translated``; returns a note for the report where there was any."""
    if request.elsewhere:
        translated.unowned = [key for key in translated.unowned if not key.startswith(request.elsewhere)]
    if request.towers is None:
        return ()

    before = len(translated.tensors) + len(translated.unowned)
    kept = {key: lay for key, lay in translated.tensors.items() if request.includes(tower_of(hub, key))}
    translated.tensors = translated.unbridged = kept
    translated.faults = [
        fault for fault in translated.faults if fault.fatal or request.includes(fault.tower) or not fault.tower
    ]
    translated.unowned = [
        key
        for key, tower in towers_of_unowned(translated, hub).items()
        if (request.includes(tower) if tower else not request.within_towers)
    ]
    others = before - len(kept) - len(translated.unowned)
    if not others or not request.within_towers:
        return ()
    one = others == 1
    return (f"{others} tensor{'' if one else 's'} outside the requested towers {'is' if one else 'are'} not loaded",)


def _bring_to_model(source: Source, translated: Translated, model: ModelView, facts: Mapping[str, int]) -> None:
    """Bring the towers whose keys differ from the model's to the model's layouts."""
    hub = source.known.hub
    differing = {tower_of(hub, key) for key in translated.tensors if key not in model.tensors}
    layouts = {tower: tower_layout(hub, tower, model.tensors) for tower in differing}
    wanted = {tower: [name] for tower, name in layouts.items() if name is not None}
    bring_to_layouts(source.known, translated, wanted, facts)


def _counts(translated: Translated, hub: Format) -> Counter[str]:
    """How many tensors the file has of each tower, those under unknown names and of other architectures included."""
    counts = Counter([tower_of(hub, key) for key in translated.tensors])
    counts.update(towers_of_unowned(translated, hub).values())
    counts.update(fault.tower for fault in translated.faults for _ in fault.sources if fault.foreign)
    return counts
