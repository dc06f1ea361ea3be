"""When a match is refused, and what the error says. All faults of a load are collected before it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from keymap.advice import choices, conversion, lacked_by_files
from keymap.errors import SHOWN, PlanError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.pattern import Side
from keymap.language.rules import Fault, RuleTable
from keymap.plan.allowed import allowed, keys_are, suggestion
from keymap.plan.completeness import incomplete
from keymap.plan.describe import describe, difference
from keymap.plan.matching import Matches, Sides, key_before_bridges
from keymap.plan.missing_view import Mismatch, MismatchGroup, grouped
from keymap.plan.model import ModelView
from keymap.plan.own_names import is_foreign
from keymap.plan.request import Request, example_towers
from keymap.plan.rule_faults import RuleFaults
from keymap.plan.to_hub import Translated, tower_of, towers_of_unowned
from keymap.source.detect import claim, uses_aliases

__all__ = ["judge", "refuse_empty", "refuse_other_model"]

FLOOR = 0.1  # strict=False refuses when less than this share of a tower's tensors in the file would load
_MAX_PAIRED = 60  # keys of each side that are compared by their names
_NEAR_NAME = 0.75  # how alike they are at least, from 0 to 1
_SHOWN_BESIDE_CAUSE = 3  # keys that a message lists where it names the cause


def refuse_other_model(known: Catalogue, model: ModelView, file: str) -> None:
    """Refuse a model whose keys are not the hub's.

    Raises:
        PlanError: the model is another one, wrapped, or one tower alone.
    """
    hub = known.hub
    keys = some(model.tensors)
    if uses_aliases(hub, model.tensors):
        raise PlanError(
            f"{file}: the model is one tower alone ({keys}): pass the whole model; to load only one tower, add "
            f"{' or '.join(example_towers(hub))}"
        )
    if is_foreign(hub, model):
        title = hub.title.partition(" (")[0]
        other = next((m for m in known.formats if claim(m, model.layouts(), {}) is not None), None)
        if other is not None:
            raise PlanError(
                f"{file}: the model's keys ({keys}) are those of {other.name} ({other.title}), and keymap loads into "
                f"{title}; {conversion(other.name)}"
            )
        raise PlanError(
            f"{file}: the model's keys ({keys}) are not those of {title}; if the model is wrapped, pass the inner "
            f"model (model.module, model._orig_mod)"
        )


def refuse_empty(translated: Translated, request: Request, format_name: str, towers: Sequence[str]) -> None:
    """Refuse a file without any tensor of the requested towers.

    Raises:
        PlanError: with the faults of the rules.
    """
    if not translated.tensors and request.towers is None and not translated.faults:
        places = list(dict.fromkeys(_above_rules(translated)))[:SHOWN]
        hints = [f"a state dict with such keys lies below others: pass {choices('wrapper', places)}"] if places else []
        keys = f"its keys are {some(translated.source_keys)}"
        text = f"{request.file} (format {format_name}): the rules of the format match none of its keys"
        raise PlanError(text, [keys, *hints])
    if not translated.tensors:
        asked = [tower for tower in towers if request.includes(tower)]
        raise PlanError(
            f"{request.file} (format {format_name}) has no tensors of the requested towers",
            [
                f"requested: {', '.join(asked)}; the towers are {', '.join(towers)}",
                *(fault.text for fault in translated.faults),
            ],
        )


def _above_rules(translated: Translated) -> Iterator[str]:
    """What stands before names that the rules know, in keys that they do not know as a whole."""
    table = RuleTable(translated.rules)
    for key in translated.source_keys:
        segments = key.split(".")
        for count in range(1, len(segments)):
            if table.find(".".join(segments[count:])) is not None:
                yield ".".join(segments[:count])


def judge(sides: Sides, matches: Matches, file_counts: Mapping[str, int], notes: Sequence[str]) -> Matches:
    """Refuse what does not fit; a partial load (``strict=False``) gets its leftovers listed.

    Args:
        sides, matches: what was matched.
        file_counts: the number of the file's tensors in each tower.
        notes: what was skipped on the way to the state dict, which may explain a missing key.

    Returns:
        The matches; for a partial load with mismatched keys among the missing and unexpected ones.

    Raises:
        PlanError: with everything that is wrong.
    """
    faults = [fault for fault in sides.translated.faults if not _is_allowed(sides, fault)]
    of_rules = RuleFaults(sides.translated, faults)
    forgiven = _forgiven(sides, matches, [f for f in sides.translated.faults if _is_allowed(sides, f)])
    matches = matches._replace(
        missing=tuple(key for key in matches.missing if key not in forgiven),
        unexpected=tuple(key for key in matches.unexpected if key not in forgiven),
    )
    if matches.missing:
        keys = [*sides.translated.source_keys, *of_rules.absent_members()]  # those are in the rules' faults already
        partly = incomplete(sides.format, sides.translated.rules, keys, sides.hub.optional_buffers)
        faults += [fault for fault in partly if sides.request.includes(fault.tower)]
    name = f"{sides.request.file} (format {sides.format.name})"
    if sides.request.strict:
        lines = _strict_faults(sides, matches, faults, file_counts)
        if lines:
            raise PlanError(f"{name} does not fit the model; nothing was changed", [*lines, *notes])
        return _with_forgiven(matches, forgiven)
    faults = RuleFaults(sides.translated, faults).merged({})
    lines = [fault.text for fault in faults if fault.fatal]
    loaded = {entry.tower for entry in matches.entries}
    lines += [fault.text for fault in faults if fault.foreign and fault.tower in loaded]
    lines += _nearly_empty_towers(sides.hub, matches, file_counts) + _nearly_empty_file(sides.translated, matches)
    if lines:
        lines = list(dict.fromkeys([*lines, *_difference(sides), *(f.text for f in faults if not f.fatal)]))
        raise PlanError(f"{name} does not fit the model, not even in part; nothing was changed", lines)
    return _with_forgiven(_with_leftovers(sides.translated, matches, faults), forgiven)


# --- what the caller allows ---


def _file_names(sides: Sides, key: str) -> tuple[str, ...]:
    """The names of a key of the file: as it is called there, and without the prefixes that were stripped."""
    return (key, sides.request.stripped + key, sides.translated.renamed.get(key, key))


def _is_allowed(sides: Sides, fault: Fault) -> bool:
    """Whether a fault is only of keys without a place in the model, and the caller allows all of them."""
    patterns = sides.request.allow_unexpected
    return (
        fault.foreign
        and bool(fault.sources)
        and all(allowed(patterns, *_file_names(sides, key)) for key in fault.sources)
    )


def _forgiven(sides: Sides, matches: Matches, faults: Sequence[Fault]) -> dict[str, bool]:
    """The missing and unexpected keys that the caller allows; True for keys of the model."""
    request = sides.request
    found = {key: False for fault in faults for key in fault.sources}
    if request.allow_unexpected:
        keys = matches.unexpected
        found |= {key: False for key in keys if allowed(request.allow_unexpected, *_file_names(sides, key))}
    if request.allow_missing:
        found |= {key: True for key in matches.missing if allowed(request.allow_missing, key)}
    return found


def _with_forgiven(matches: Matches, forgiven: Mapping[str, bool]) -> Matches:
    return matches._replace(
        missing=(*matches.missing, *(key for key, of_model in forgiven.items() if of_model)),
        unexpected=(*matches.unexpected, *(key for key, of_model in forgiven.items() if not of_model)),
    )


# --- strict=True ---


def _strict_faults(
    sides: Sides, matches: Matches, faults: Sequence[Fault], file_counts: Mapping[str, int]
) -> list[str]:
    """Everything that is wrong, the cause first where it is another architecture, and what to do at the end."""
    if not (faults or matches.missing or matches.unexpected or matches.mismatched):
        return []
    cause = _difference(sides)
    shown = _SHOWN_BESIDE_CAUSE if cause or any(fault.foreign for fault in faults) else SHOWN
    of_rules = RuleFaults(sides.translated, faults)
    groups = _mismatch_groups(sides, matches, bool(cause))
    following = {group.place: group.text for group in groups if group.place in of_rules.places and not group.view}
    others = [group for group in groups if group.text not in following.values()]
    missing = [key for key in matches.missing if not of_rules.explain(key_before_bridges(sides, key))]
    lines = [*cause, *(fault.text for fault in of_rules.merged(following))]
    if missing:
        hint = lacked_by_files(sides.hub.by_name)
        lines.append(f"{keys_are(missing, 'model')} missing from the file: {some(missing, shown)}{hint}")
    if matches.unexpected:
        lines.append(
            f"{keys_are(matches.unexpected, 'file')} unexpected, with no place in the model: "
            f"{some(matches.unexpected, shown)}"
        )
    lines += _mismatch_faults(others, shown if cause else 4 * shown)
    return [*lines, *_advice(sides, matches, file_counts)]


def _mismatch_groups(sides: Sides, matches: Matches, other_model: bool) -> list[MismatchGroup]:
    """The keys of another shape or dtype, by the rule that makes them."""
    translated = sides.translated
    own_rules = {id(rule) for rule in translated.rules}
    makers = {key: (rule, sources) for rule, sources, key in translated.steps if id(rule) in own_rules}
    mismatches: list[Mismatch] = []
    unfit: set[str] = set()
    for key, why in matches.mismatched.items():
        own = key_before_bridges(sides, key)
        rule, sources = makers.get(own, (None, ()))
        layout = translated.tensors[key]
        renamed = translated.unbridged.get(own) is layout  # no bridge changes the tensor
        source = translated.source_keys[sources[0]].shape if len(sources) == 1 else None
        made, wanted = layout.shape if renamed else None, tuple(sides.targets[key].shape)
        mismatches.append(Mismatch(key, why, rule, source, made, wanted))
        unfit.add(own)
    fitting = {rule.place for key, (rule, _) in makers.items() if key not in unfit}
    return list(grouped(mismatches, fitting, other_model))


def _mismatch_faults(groups: Sequence[MismatchGroup], listed: int) -> list[str]:
    """Every rule whose view is wrong, then the first of the others."""
    others = [group for group in groups if not group.view]
    lines = [group.fault for group in (*(g for g in groups if g.view), *others[:listed])]
    hidden = sum(len(group.keys) for group in others[listed:])
    return [*lines, f"and {hidden} more key{'' if hidden == 1 else 's'} with another shape"] if hidden else lines


def _advice(sides: Sides, matches: Matches, file_counts: Mapping[str, int]) -> list[str]:
    """What to do: choose the towers that the file has, allow what is named, or load in part."""
    present = [tower for tower in sides.hub.layouts if tower in file_counts]
    absent = [tower for tower in sides.hub.layouts if tower not in file_counts]
    if matches.missing and present and absent and sides.request.towers is None:
        chosen = ", ".join(map(repr, present))
        return [f"the file has no {' or '.join(absent)} tower: load with towers=({chosen},)"]
    if any(fault.foreign for fault in sides.translated.faults):
        return []  # a part of another architecture is no answer
    pairs = _pairs(sides, matches)
    if pairs:
        return pairs
    lacking = (*matches.missing, *matches.mismatched)
    if not all(_is_head(sides.hub, key) for key in lacking):
        return []  # the body of a tower would not be whole
    if not matches.mismatched and not sides.translated.faults:
        return _allowing(sides, matches)
    return ["to load what fits and report the rest, pass strict=False"]


def _allowing(sides: Sides, matches: Matches) -> list[str]:
    """The arguments that allow the missing and unexpected keys, where these are heads or keys without a rule."""
    if _touches_a_tower(sides, matches.unexpected):
        return ["the unexpected keys lie in a tower, and the model lacks them: pass the model that has them"]
    return suggestion(matches.missing, sides.model.tensors, matches.unexpected, sides.file_tensors)


def _touches_a_tower(sides: Sides, keys: Sequence[str]) -> bool:
    """Whether one of the file's keys is a weight of a tower's body, or seems to be one."""
    translated, hub = sides.translated, sides.hub
    apparent = towers_of_unowned(translated, hub)
    names: dict[str, str] = {}
    for name, layout in translated.tensors.items():
        names.update(dict.fromkeys(layout.named(name), name))
    return any(
        (key in names or apparent.get(key) in hub.layouts)
        and not _is_classifier(hub, names.get(key) or translated.renamed.get(key, key))
        for key in keys
    )


def _is_classifier(hub: Format, key: str) -> bool:
    """Whether a key is that of a small tower, or of a classifier on a tower, without which the tower is the same."""
    return _is_beside_towers(hub, key, hub.classifiers)


def _is_head(hub: Format, key: str) -> bool:
    """Whether a tower without this key is whole; a key of no tower, or of a small one, is such a key, too."""
    return _is_beside_towers(hub, key, hub.heads)


def _is_beside_towers(hub: Format, key: str, sides: Sequence[Side]) -> bool:
    return tower_of(hub, key) not in hub.layouts or any(side.match(key) is not None for side in sides)


def _pairs(sides: Sides, matches: Matches) -> list[str]:
    """Keys that are missing and keys that are unexpected, where two have one shape and nearly one name."""
    found = []
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key in matches.unexpected[:_MAX_PAIRED]:
        if key in sides.file_tensors:
            by_shape.setdefault(sides.file_tensors[key].shape, []).append(key)
    for key in matches.missing[:_MAX_PAIRED]:
        shape = tuple(sides.targets[key].shape) if key in sides.targets else ()
        near = get_close_matches(key, by_shape.get(shape, ()), 1, _NEAR_NAME)
        if near:
            found.append(f"{near[0]!r} has the shape of {key!r}, which is missing: if they are the same, rename it")
    more = len(found) - _SHOWN_BESIDE_CAUSE
    return [*found[:_SHOWN_BESIDE_CAUSE], *([f"and {more} more keys that pair in this way"] if more > 0 else [])]


# --- strict=False ---


def _nearly_empty_towers(hub: Format, matches: Matches, file_counts: Mapping[str, int]) -> list[str]:
    """Towers of the file of which almost nothing would load."""
    loaded = Counter(entry.tower for entry in matches.entries if not entry.filled)
    why = some(f"{key}: {why}" for key, why in matches.mismatched.items()) or some(matches.unexpected)
    return [
        f"only {loaded[tower]} of the {count} tensors of the {tower} tower in the file would load: {why}"
        for tower, count in file_counts.items()
        if tower in hub.layouts and loaded[tower] < FLOOR * count
    ]


def _nearly_empty_file(translated: Translated, matches: Matches) -> list[str]:
    """The same for the file as a whole."""
    used = _used(matches)
    held = used.union(matches.unexpected)
    held.update(source for key, layout in translated.tensors.items() for source in layout.named(key))
    if matches.entries and len(used) >= FLOOR * len(held):
        return []
    return [f"only {len(used)} of the file's {len(held)} tensors would load"]


def _with_leftovers(translated: Translated, matches: Matches, faults: Sequence[Fault]) -> Matches:
    """The matches of a partial load: what does not fit is missing in the model, and unexpected in the file."""
    leftover = {source for fault in faults for source in fault.sources}
    for key in matches.mismatched:
        layout = translated.tensors.get(key)
        leftover.update(layout.named(key) if layout else ())
    unused = sorted(leftover.difference(_used(matches), matches.unexpected))
    return matches._replace(
        missing=(*matches.missing, *matches.mismatched),
        unexpected=(*matches.unexpected, *unused),
        notes=(*matches.notes, *(fault.text for fault in faults)),
    )


def _used(matches: Matches) -> set[str]:
    """The file's keys that fill tensors of the model."""
    return {source for entry in matches.entries for source in entry.layout.sources}


def _difference(sides: Sides) -> list[str]:
    """What the file is and what the model is, where their architectures or sizes differ."""
    file, model = (
        describe(sides.known, {k: lay for k, lay in keys.items() if sides.request.includes(tower_of(sides.hub, k))})
        for keys in (sides.translated.unbridged, sides.model.layouts())
    )
    text = difference(sides.known, sides.format.title, file, model)
    return [text] if text else []
