"""Two files under the same names: a format's own where both have it, else the hub's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from keymap.advice import choices, renaming
from keymap.errors import DetectionError, PlanError, VerifyError, by_reason, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout
from keymap.language.rules import Check, Fault
from keymap.load.preflight import failed_checks
from keymap.plan.export import only_reading
from keymap.plan.planner import keep_towers
from keymap.plan.request import Request
from keymap.plan.rule_faults import with_lacking_facts_once
from keymap.plan.to_hub import Translated, bring_to_layouts, to_hub, tower_of
from keymap.source.detect import file_rules, tower_layout
from keymap.source.opened import Opened, Source, layouts_of

__all__ = ["Named", "of_side", "readings", "same_names"]


class Named(NamedTuple):
    """A file under the names of a comparison.

    Attributes:
        source: the reading of the file.
        tensors: layouts by name.
        towers: the tower of each name; "" for a name that no rule owns.
        notes: keys that are not compared, and why.
        converted: the names are the hub's, by the rules of the file's format.
    """

    source: Source
    tensors: Mapping[str, Layout]
    towers: Mapping[str, str]
    notes: tuple[str, ...] = ()
    converted: bool = False


def readings(a: Opened, b: Opened) -> tuple[Source, Source]:
    """The one reading of each file: in the same format if both have one, else each in its own.

    Files with the same names need no format: both sources are then without one.

    Raises:
        DetectionError: a file has no format, or several, and the names of the files differ.
    """
    both = [
        (one, other)
        for one in a.top
        for other in b.top
        if one.found is not None and other.found is not None and one.found.mapping.name == other.found.mapping.name
    ]
    if both:
        return _with_heads(a, b, *both[0])
    try:
        with of_side("a"):
            one_reading = only_reading(a, heads=False)
        with of_side("b"):
            return _with_heads(a, b, one_reading, only_reading(b, heads=False))
    except DetectionError:
        one, other = a.top[0], b.top[0]
        if not one.refused and not other.refused and _share_names(one, other):
            return one._replace(found=None), other._replace(found=None)
        raise


def _with_heads(a: Opened, b: Opened, one: Source, other: Source) -> tuple[Source, Source]:
    """Each reading with the heads that lie above it, where the other has one."""
    return (a.with_heads(one) if _has_head(other) else one, b.with_heads(other) if _has_head(one) else other)


def _has_head(source: Source) -> bool:
    assert source.found is not None, "only a reading with a format is compared under its names"
    keys = to_hub(source.found, source.settings.numbers).tensors
    return any(side.match(key) is not None for side in source.known.hub.heads for key in keys)


def of_side(side: str) -> AbstractContextManager[None]:
    """Errors about a file name the arguments of its side, ``a`` or ``b``."""
    return renaming({name: f"{name}_{side}" for name in ("mapping", "wrapper")})


def _share_names(a: Source, b: Source) -> bool:
    """Whether the smaller file has half of its keys in common with the other."""
    one, other = layouts_of(a.unwrapped.tensors, a.unwrapped.start), layouts_of(b.unwrapped.tensors, b.unwrapped.start)
    return 2 * len(one.keys() & other.keys()) >= min(len(one), len(other)) > 0


def same_names(a: Source, b: Source, request: Request, facts: Mapping[str, int]) -> tuple[Named, Named, str]:
    """Both files under the same names, and the name of the format that these names are of ("" for none).

    Args:
        a, b: as `readings` returns them.
        request: the towers to compare.
        facts: settings that shapes do not show.

    Raises:
        PlanError: a file cannot be brought to the names of the other.
        VerifyError: a tensor that is not compared does not hold what makes it unnecessary.
    """
    if a.found is None or b.found is None:
        if request.towers is not None:
            raise PlanError(
                f"{a.file} and {b.file}: no format matches both, so their towers are not known; leave towers= out"
            )
        return _own(a), _own(b), ""
    one, other = a.found.mapping, b.found.mapping
    known = a.known
    if one.name == other.name and (one.kind != "hub" or _same_layouts(known.hub, a.found.tensors, b.found.tensors)):
        return _as_written(a, request), _as_written(b, request), one.name
    both = [_to_hub(source, request, facts) for source in (a, b)]
    faults = _meet(known, both[0], both[1], facts)
    for side, translated in zip("ab", both, strict=True):
        fatal = [*translated.faults, *_collisions(translated)]
        faults += [f"{side}: {fault.text}" for fault in with_lacking_facts_once(fatal)]
    if faults:
        raise PlanError(f"{a.file} (format {one.name}) and {b.file} (format {other.name}) cannot be compared", faults)
    for source, translated in zip((a, b), both, strict=True):
        _verify(source, translated)
    return _in_hub(a, both[0]), _in_hub(b, both[1]), known.hub.name


def _same_layouts(hub: Format, one: Mapping[str, Layout], other: Mapping[str, Layout]) -> bool:
    """Whether each tower that both have is in the same layout of the hub."""
    pairs = [{tower_layout(hub, tower, tensors) for tensors in (one, other)} - {None} for tower in hub.layouts]
    return all(len(layouts) < 2 for layouts in pairs)


def _own(source: Source) -> Named:
    layouts = layouts_of(source.unwrapped.tensors, source.unwrapped.start)
    return Named(source, layouts, dict.fromkeys(layouts, ""))


# --- as they stand ---


def _as_written(source: Source, request: Request) -> Named:
    """A file with the keys that its format writes."""
    found = source.found
    assert found is not None, "the caller has looked"
    table = file_rules(found.mapping, found.tensors)
    towers: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for key, layout in found.tensors.items():
        ignored = found.mapping.ignored(key) if found.mapping.may_leave_out(key) else None
        rule = table.find(key)
        tower = rule[0].tower if rule is not None else _unsupported_tower(found.mapping, key)
        if ignored is not None:
            dropped.update(dict.fromkeys(layout.named(key), ignored[0]))
        elif request.includes(tower):
            towers[key] = tower
    fatal = [fault.text for fault in found.faults if fault.fatal]
    if fatal:
        raise PlanError(f"{source.file} (format {found.mapping.name}) cannot be compared", fatal)
    return Named(source, {key: found.tensors[key] for key in towers}, towers, _dropped(dropped))


def _unsupported_tower(mapping: Format, key: str) -> str:
    return next((entry.tower for entry in mapping.unsupported if entry.side.match(key) is not None), "")


def _dropped(keys: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on keys that hold no weights."""
    return tuple(f"not compared: {some(found, 2)}: {why}" for why, found in by_reason(keys).items())


# --- under the hub's names ---


def _to_hub(source: Source, request: Request, facts: Mapping[str, int]) -> Translated:
    found, hub = source.found, source.known.hub
    assert found is not None, "the caller has looked"
    translated = to_hub(found, source.settings.numbers | dict(facts))
    keep_towers(translated, request, hub)
    for key in [key for key in translated.tensors if hub.ignored(key) is not None]:
        ignored = hub.ignored(key)
        translated.dropped[key] = ignored[0] if ignored is not None else ""
    translated.tensors = {key: value for key, value in translated.tensors.items() if key not in translated.dropped}
    return translated


def _meet(known: Catalogue, one: Translated, other: Translated, facts: Mapping[str, int]) -> list[str]:
    """Bring each tower of both to one layout; returns the towers for which there is none."""
    faults: list[str] = []
    alike: list[str] = []
    for tower, names in known.hub.layouts.items():
        layouts = [tower_layout(known.hub, tower, side.tensors) for side in (one, other)]
        if None in layouts:
            continue
        if layouts[0] == layouts[1]:
            alike.append(tower)
            continue
        wanted: Sequence[str | None] = (known.hub.written_as.get(tower), *reversed(layouts), *names)
        target = next((name for name in wanted if name and all(_leads(known, tower, at, name) for at in layouts)), None)
        if target is None:
            faults.append(
                f"the {tower} tower has layout {layouts[0]} in a and {layouts[1]} in b, and no bridge joins them: "
                f"these are different architectures"
            )
            continue
        alike.append(tower)
        for side in (one, other):
            bring_to_layouts(known, side, {tower: [target]}, facts)
    return [*faults, f"compare what is left with {choices('towers', [tuple(alike)])}"] if faults and alike else faults


def _leads(known: Catalogue, tower: str, layout: str | None, target: str) -> bool:
    return layout == target or (layout is not None and known.path(tower, layout, target) is not None)


def _collisions(translated: Translated) -> list[Fault]:
    """Keys without a rule whose own name is a key of the hub that another key has become."""
    names = [translated.renamed.get(key, key) for key in translated.unowned]
    taken = [name for name in names if name in translated.tensors]
    return [Fault(f"keys without a rule have names that others get: {some(taken)}")] if taken else []


def _in_hub(source: Source, translated: Translated) -> Named:
    """The tensors under the hub's names; those without a rule keep their own."""
    tensors = dict(translated.tensors)
    own: list[str] = []
    for key in translated.unowned:
        name = translated.renamed.get(key, key)
        if name in translated.source_keys:
            tensors[name] = translated.source_keys[name]
            own.append(name)
    hub = source.known.hub
    notes = list(_dropped(translated.dropped))
    if own:
        notes.append(f"without a rule, compared under their own names: {some(own)}")
    return Named(
        source, tensors, {key: "" if key in own else tower_of(hub, key) for key in tensors}, tuple(notes), True
    )


def _verify(source: Source, translated: Translated) -> None:
    """Check what the values of tensors must be that have no name of their own in the hub.

    Raises:
        VerifyError: with every one that is wrong.
    """
    failed = failed_of(source, translated.checks)
    if failed:
        raise VerifyError(f"{source.file} cannot be compared under other names", failed)


def failed_of(source: Source, checks: Sequence[Check]) -> list[str]:
    """The checks of a file's values that fail, in words."""
    tensors = source.unwrapped.tensors
    return [text for _, text in failed_checks(checks, lambda key: tensors[key].read().to("cpu"))]
