"""Settings that are not stored in the weights: compare those of the source with those of the model.

Activations, head counts, the eps of norms, masks and pooling are part of a model's configuration. If they differ, a
file loads without an error and the embeddings are wrong. keymap warns of each difference, and lists the settings that
it cannot compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from typing import Any, NamedTuple

from keymap.language.format import Fact, Format, Scalar, config_text
from keymap.language.layout import Shaped
from keymap.language.pattern import Side
from keymap.source.detect import fixed_by

__all__ = [
    "Compared",
    "Count",
    "Settings",
    "Size",
    "Unknown",
    "compared",
    "config_text",
    "differences",
    "in_hub_words",
    "measured_size",
    "unlike_target",
    "unverified",
]

Size = tuple[int, int]


class Unknown(str):
    """A value of a configuration that the mapping has no word for. It differs from every value of a model."""


class Count(NamedTuple):
    """A number of keys that a configuration states, for example of layers.

    Attributes:
        side: the keys that count.
        number: that the configuration states.
        origin: where.
    """

    side: Side
    number: int
    origin: str


class Settings(NamedTuple):
    """The settings that a source states beside its weights.

    Attributes:
        image_size, patch_size: (h, w) in pixels; None if unknown.
        facts: value and origin of each setting, by the hub's name for it.
        notes: configurations that could not be read.
        counts: the numbers of keys that it states.
    """

    image_size: Size | None = None
    patch_size: Size | None = None
    facts: Mapping[str, tuple[Scalar, str]] = {}
    notes: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()

    def grid(self, patch: Size | None = None) -> Size | None:
        """(h, w) in patches; None if unknown.

        Args:
            patch: (h, w) of a patch in pixels, if the weights show it.
        """
        patch = patch or self.patch_size
        if self.image_size is None or patch is None:
            return None
        height, width = (size // side for size, side in zip(self.image_size, patch, strict=True))
        return (height, width) if height and width else None

    @property
    def numbers(self) -> dict[str, int]:
        """The facts that are positive numbers: rules cut and join tensors by them."""
        return {name: value for name, (value, _) in self.facts.items() if type(value) is int and value > 0}

    def to_dict(self) -> dict[str, Any]:
        """The known sizes and facts by name, without their origin."""
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        known_sizes = {name: size for name, size in sizes.items() if size is not None}
        return {**known_sizes, **{name: value for name, (value, _) in self.facts.items()}}


class Compared(NamedTuple):
    """A setting of both sides, in keymap's words.

    Attributes:
        name: the hub's, for example of a number of heads.
        label: in words.
        source, origin: of the source, and where it states it; None and empty if it does not.
        model: of the model.
        equal: None if the source does not state the setting.
    """

    name: str
    label: str
    source: Scalar | None
    origin: str
    model: Scalar
    equal: bool | None


def compared(
    hub: Format, towers: Iterable[str], settings: Settings, model: Mapping[str, Scalar]
) -> tuple[Compared, ...]:
    """Every setting that matters for these towers and that the model has, beside the source's.

    What the hub fixes for its models, if they do not hold it themselves, is compared where the source states it.
    """
    fixed = {name: value for name, value in hub.fixed.items() if name in settings.facts}
    return _rows(hub, towers, settings, {**fixed, **model})


def _rows(hub: Format, towers: Iterable[str], settings: Settings, model: Mapping[str, Scalar]) -> tuple[Compared, ...]:
    rows = []
    for name, fact in _comparable(hub, towers, model):
        value, origin = settings.facts.get(name, (None, ""))
        theirs, ours = None if value is None else in_hub_words(fact, value), in_hub_words(fact, model[name])
        rows.append(Compared(name, fact.label, theirs, origin, ours, None if theirs is None else _equal(theirs, ours)))
    return tuple(rows)


def differences(hub: Format, rows: Iterable[Compared]) -> tuple[str, ...]:
    """One text for each setting that differs between source and model; it says what to change."""
    found: dict[str, str] = {}
    for row in rows:
        if row.source is not None and not row.equal:
            theirs = f"{_source_text(row)} in the source ({row.origin})"
            ours = f"{config_text(row.model)} in the model"
            change = hub.facts[row.name].change
            found.setdefault(row.label, f"{row.label}: {theirs}, {ours}, so embeddings will differ; change {change}")
    return tuple(found.values())


def unlike_target(
    hub: Format, target: Format, stated: Mapping[str, tuple[Scalar, str]], written: Mapping[str, Shaped]
) -> tuple[str, ...]:
    """One text for each setting of a source that differs from what a format's code fixes for such files.

    What the hub fixes for all its models counts, too, unless the format's configuration can say it.

    Args:
        hub: of both.
        target: the format that is written.
        stated: value and origin of each setting of the source.
        written: tensors by the hub's keys.
    """
    stated = {**dict(_of_widths(hub, stated, written)), **stated}
    if target is hub:  # its configuration says what its models hold
        fixed = {name: value for name, value in hub.fixed.items() if not hub.facts[name].paths}
    else:
        says = target.config.facts if target.config is not None else {}
        own = fixed_by(target, written, of_hub=True)
        fixed = {**{name: value for name, value in hub.fixed.items() if name not in says}, **own}
    towers = {name.partition(".")[0] for name in fixed}
    facts = {name: entry for name, entry in stated.items() if name in fixed}
    rows = _rows(hub, towers, Settings(facts=facts), fixed)
    return tuple(
        f"{'width of the ' if hub.facts[row.name].width_per else ''}{row.label}: {_source_text(row)} in the source "
        f"({row.origin}), and {target.name} means "
        f"{config_text(row.model)}: what reads the file computes something else"
        for row in rows
        if row.source is not None and not row.equal
    )


def _of_widths(
    hub: Format, stated: Mapping[str, tuple[Scalar, str]], written: Mapping[str, Shaped]
) -> Iterator[tuple[str, tuple[Scalar, str]]]:
    """Facts that are a tower's width divided by a setting that a source states."""
    for name, fact in hub.facts.items():
        number, origin = stated.get(fact.width_per, (0, ""))
        if type(number) is int and number > 0:
            width = measured_size(hub.measures.get(name.partition(".")[0], {}).get("width", ()), written)
            if width and width % number == 0:
                yield name, (width // number, f"{origin}; the width is {width}")


def measured_size(ways: Iterable[tuple[Side, int | None]], keys: Mapping[str, Shaped]) -> int:
    """A size of a tower by the ways to measure it: the length of an axis, or how many keys match; 0 without any."""
    for side, axis in ways:
        found = [tensor for key, tensor in keys.items() if side.match(key) is not None]
        if found and axis is None:
            return len(found)
        if found and axis is not None and axis < len(found[0].shape):
            return found[0].shape[axis]
    return 0


def unverified(rows: Iterable[Compared]) -> tuple[str, ...]:
    """Labels of the settings that the source does not state."""
    stated: dict[str, bool] = {}
    for row in rows:
        stated[row.label] = stated.get(row.label, False) or row.source is not None
    return tuple(label for label, known in stated.items() if not known)


def _source_text(row: Compared) -> str:
    """A value of the source for a warning: ``unknown activation 'foo'`` where the mapping has no word for it."""
    if isinstance(row.source, Unknown):
        return f"unknown {row.label.partition(' of ')[0]} {str(row.source)!r}"
    return config_text(row.source)


def _comparable(hub: Format, towers: Iterable[str], model: Mapping[str, Scalar]) -> Iterator[tuple[str, Fact]]:
    """The facts that matter for these towers and that the model has."""
    chosen = set(towers)
    for name, fact in hub.facts.items():
        matters = all(model.get(other) == value for other, value in fact.only.items())
        if fact.label and name.partition(".")[0] in chosen and name in model and matters:
            yield name, fact


def in_hub_words(fact: Fact, value: Scalar) -> Scalar:
    """The value, or the fact's own word for it."""
    return value if isinstance(value, Unknown) else fact.words.get(config_text(value), value)


def _equal(one: Scalar, other: Scalar) -> bool:
    if isinstance(one, Unknown):
        return False
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return isclose(one, other, rel_tol=1e-6)
    return one == other
