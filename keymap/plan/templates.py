"""Fills the templates of a folder's files: values from shapes, from settings, and from the source's own file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, isqrt, nextafter, prod
from typing import Any, NamedTuple

from torch import nn

from keymap.language.format import Cases, Computed, Format, Kept, Length, Scalar, Template, as_size, config_text
from keymap.language.pattern import Side
from keymap.plan.export import Target
from keymap.plan.model import ABSENT, attribute
from keymap.source.config import value_at

__all__ = ["Own", "Writer"]

_KINDS = {
    "count": "whole number from 1 on",
    "index": "whole number from 0 on",
    "size": "whole number from 1 on, and no pair of them",
    "positive": "positive number",
    "flag": "true or false",
    "word": "word",
}
_ABSENT = object()  # no tensor shows it


class Own(NamedTuple):
    """The source's own file of a name.

    Attributes:
        data: what it holds; None where there is none.
        same: the source has the format that is written, so all values mean the same.
    """

    data: Any = None
    same: bool = False


def _plain(value: Any) -> Any:
    """A value as JSON has it; ``_ABSENT`` for anything else."""
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _ABSENT if _ABSENT in items else items
    if isinstance(value, Mapping):
        pairs = {name: _plain(inner) for name, inner in value.items() if isinstance(name, str)}
        return {name: inner for name, inner in pairs.items() if inner is not _ABSENT}
    if isinstance(value, float) and not isfinite(value):
        return _ABSENT
    return value if value is None or isinstance(value, (str, bool, int, float)) else _ABSENT


def _is_of_kind(kind: str, value: Scalar) -> bool:
    """Whether the value of a fact is of its kind, see `Fact`."""
    if kind == "size" and isinstance(value, tuple):
        return len(value) == 2 and all(_is_of_kind("count", side) for side in value)
    if kind in ("word", "flag"):
        return type(value) is (str if kind == "word" else bool)
    if kind == "positive":
        return isinstance(value, (int, float)) and type(value) is not bool and 0 < float(value) < inf
    return type(value) is int and value >= (kind != "index")


def _grid(size: Scalar, patch: int) -> tuple[int, int]:
    """(h, w) in patches of an image of a size in pixels; zeros for what is no size."""
    if not _is_of_kind("size", size):
        return 0, 0
    height, width = size if isinstance(size, tuple) else (int(size), int(size))
    return height // patch, width // patch


def _fraction(number: int, by: int) -> float:
    """A fraction of which the whole part of its product with ``by`` is ``number`` again."""
    fraction = number / by
    return fraction if int(by * fraction) == number else nextafter(fraction, inf)


@dataclass
class Writer:
    """Fills templates.

    Attributes:
        tensors: that are written.
        hub: its facts.
        known: settings by the hub's names.
        used: the facts that were looked up.
        unknown: the facts that are needed and not known, with the values that have a case.
        faults: what else is wrong.
        grids: (h, w) of the image positions that the source states.
        size: (h, w) of an image in pixels by the source's configuration.
        model: that is written; None for a file.
        file: that is filled.
        own: the source's own file of that name.
        lost: values that are not known: their paths, by the file and what they are.
    """

    tensors: Mapping[str, Target]
    hub: Format
    known: Mapping[str, Scalar]
    grids: Collection[tuple[int, int]] = ()
    size: tuple[int, int] | None = None
    model: nn.Module | None = None
    file: str = ""
    own: Own = field(default_factory=Own)
    lost: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def begin(self, file: str, own: Own) -> None:
        """Begin with a file, of which the source has its own."""
        self.file, self.own = file, own

    def kept(self, kept: Kept) -> Any:
        """A value as the source has it; ``_ABSENT`` if it has none. A note says where it is not known."""
        own = self.own.data if self.own.same or kept.shared else None
        found = (value_at(own, path, _ABSENT) for path in kept.paths)
        if self.model is not None:
            found = (attribute(self.model, path) for path in kept.attributes)
        missing = (ABSENT, _ABSENT) if self.model is None or kept.none_is_null else (ABSENT, _ABSENT, None)
        value = _plain(next((one for one in found if not any(one is absent for absent in missing)), _ABSENT))
        if value is _ABSENT and kept.others is not None:
            return self.value(kept.others)
        known = value is not _ABSENT or own is not None
        if not known and kept.label and (not kept.only or kept.only in self.known):
            self.lost.setdefault((self.file, kept.label), []).append(kept.paths[0])
        return value

    def losses(self) -> Iterator[str]:
        """Notes on values that are not known."""
        own = "the source's configuration" if self.model is None else "the model"
        for (file, label), paths in self.lost.items():
            them, its = ("it", "its default") if len(paths) == 1 else ("them", "its defaults")
            yield (
                f"{file} has no {' and no '.join(paths)} ({label}): neither the weights nor {own} show {them}, and "
                f"what reads the folder takes {its}"
            )

    def section(self, template: Mapping[str, Template]) -> dict[str, Any]:
        """A section with its values; inner sections of which no tensor is there are left out."""
        found = {name: self.filled(value) for name, value in template.items()}
        return {name: value for name, value in found.items() if value is not _ABSENT}

    def filled(self, template: Template) -> Any:
        """A value; ``_ABSENT`` for one that no tensor shows, and for a section or a list of which nothing is there."""
        if isinstance(template, Computed):
            return self.value(template)
        if isinstance(template, Kept):
            return self.kept(template)
        if isinstance(template, Cases):
            found = self.case(template)
            return self.section(found) if isinstance(found, dict) else self.filled(found)
        if isinstance(template, list):
            items = [self.filled(item) for item in template]
            return _ABSENT if _ABSENT in items else items
        if not isinstance(template, dict):
            return template
        section = self.section(template) if self.present(template) else {}
        return section if section or not template else _ABSENT

    def case(self, template: Cases) -> Template:
        """The template of the first key that is written, or of a setting's value."""
        if not template.fact:
            return next((inner for side, inner in template.cases if self.matching(side)), _ABSENT)
        value = self.known.get(template.fact)
        self.used.add(template.fact)
        sides = ((side, inner) for side, inner in template.cases if side is not None)
        found = next((inner for side, inner in sides if side.match(config_text(value)) is not None), _ABSENT)
        shown = tuple(text for text in (str(side) for side, _ in template.cases) if text != config_text(None))
        if found is _ABSENT and value is None:
            self.unknown[template.fact] = shown
        elif found is _ABSENT:
            label = self.hub.facts[template.fact].label or template.fact
            allowed = f"only {' or '.join(shown)}" if shown else "none"
            self.faults.append(f"{label}: {config_text(value)} in the source, and the format has {allowed}")
        return found

    def present(self, template: Mapping[str, Template]) -> bool:
        """Whether a tensor is there that a value of the section is read from; True if none is."""
        lengths = [v.length for v in template.values() if isinstance(v, Computed) and v.length is not None]
        return not lengths or any(self.matching(length.side) for length in lengths)

    def matching(self, side: Side | None) -> list[Target]:
        return [target for key, target in self.tensors.items() if side is not None and side.match(key) is not None]

    def value(self, computed: Computed) -> Any:
        """A computed value; ``_ABSENT`` if no tensor shows it."""
        if computed.fact:
            return self.setting(computed)
        if computed.length is None:
            return computed.value
        number = self.number(computed.length)
        if number is _ABSENT:
            return number if computed.absent is None else computed.absent
        if computed.length.pick == "longest":
            return number
        if computed.words or computed.length.exists:
            return computed.words.get(config_text(number), number)
        number = (number - computed.minus) // computed.per
        if computed.grid:
            return self.image(computed, number)
        number = isqrt(number) if computed.square else number
        number *= computed.times if isinstance(computed.times, int) else self.number(computed.times)
        if computed.divide:
            by = self.divisor(computed.divide)
            if by is None:
                return None
            number //= by
        if computed.agrees is not None and self.can(computed.agrees):
            self.agree(computed, number)
        return number if computed.over is None else _fraction(number, self.number(computed.over))

    def image(self, computed: Computed, number: int) -> Any:
        """The side of an image of so many positions in pixels, or [height, width]; a fault where there is none.

        A size that is stated counts if it gives as many positions: it may have pixels beyond the last whole patch.
        """
        patch = computed.times if isinstance(computed.times, int) else self.number(computed.times)
        stated = {name: self.known[name] for name in self.size_facts() if name in self.known}
        sizes = [*stated.values(), *((as_size(self.size),) if self.size is not None else ())]
        fitting = [size for size in sizes if prod(_grid(size, patch)) == number]
        side = isqrt(number)
        grids = [*self.grids, *(_grid(size, patch) for size in fitting), (side, side)]
        grid = next((grid for grid in grids if prod(grid) == number), None)
        unlike = {name: size for name, size in stated.items() if size not in fitting}
        fault = self.wrong_grid(computed, f"{number} positions of {patch} pixels", grid, unlike)
        if fault or grid is None:
            self.faults.append(fault)
            return None
        made = grid[0] * patch if grid[0] == grid[1] else (grid[0] * patch, grid[1] * patch)
        exact = (size for size in fitting if _grid(size, patch) == grid)
        return next((size for size in exact if computed.grid == "any" or type(size) is int), made)

    def wrong_grid(
        self, computed: Computed, positions: str, grid: tuple[int, int] | None, unlike: Mapping[str, Scalar]
    ) -> str:
        """What is wrong with the grid of an image; empty for nothing.

        Args:
            computed: the value.
            positions: how many there are, in words.
            grid: None if it is not known.
            unlike: sizes that are stated and that do not fit. Of a square image the weights show the size.
        """
        if self.patches_differ(computed.times):
            return "the patches are not square, and those of the format are"
        if unlike and (grid is None or any(isinstance(size, tuple) for size in unlike.values())):
            texts = " and ".join(f"{name} is {config_text(size)}" for name, size in unlike.items())
            return f"{texts}, but the weights have {positions}; state (height, width) that fit"
        if grid is None and computed.grid == "any":
            wanted = next(
                (f"; pass facts={{{name!r}: ...}}, height and width in pixels" for name in self.size_facts()), ""
            )
            return f"{positions} are no square, and neither the model nor a configuration shows their grid{wanted}"
        if grid is None:
            return f"{positions} are no square, and the format has square images only"
        if grid[0] != grid[1] and computed.grid == "square":
            return f"the grid of positions is {grid[0]} by {grid[1]}, and the format has square images only"
        return ""

    def size_facts(self) -> list[str]:
        """The settings that are sizes of images."""
        return [name for name, fact in self.hub.facts.items() if fact.kind == "size"]

    def patches_differ(self, side: Length | int) -> bool:
        """Whether the axis of a length and the one after it are the sides of patches that are not square."""
        if isinstance(side, int) or side.axis is None:
            return False
        return any(len(set(target.shape[side.axis : side.axis + 2])) > 1 for target in self.matching(side.side))

    def agree(self, computed: Computed, number: int) -> None:
        """Look whether another computed value is the same; if not, a fault says so."""
        other = computed.agrees
        assert other is not None, "one that agrees"
        shown = self.value(other)
        if shown in (_ABSENT, number):
            return
        both = f"{number} by {self.origin(computed)}, and {shown} by {self.origin(other)}"
        facts = [one.divide for one in (computed, other) if isinstance(one.divide, str) and one.divide]
        heads = len(facts) == 2
        fault = f"{facts[0]} and {facts[1]} do not agree: heads of" if heads else "the format has one number, and it is"
        self.faults.append(f"{fault} {both}")

    def origin(self, computed: Computed) -> str:
        """What a computed value was made from, for a message."""
        divide, origin = computed.divide, str(computed.length or computed.fact or "the mapping")
        if not divide:
            return origin
        return f"{origin} and {divide}" + (f" = {self.known.get(divide)}" if isinstance(divide, str) else "")

    def divisor(self, divide: str | Length) -> int | None:
        """A number to divide by; None for a fact that is not known."""
        by = self.known.get(divide) if isinstance(divide, str) else self.number(divide)
        if type(by) is int and by > 0:
            return by
        assert isinstance(divide, str), "a section without the key is left out"
        if divide not in self.known:
            self.unknown.setdefault(divide, ())
        elif (text := f"{divide}: {config_text(by)!r} is no {_KINDS['count']}") not in self.faults:
            self.faults.append(text)
        return None

    def without_word(self, computed: Computed, value: Scalar) -> bool:
        return bool(computed.words) and config_text(value) not in computed.words

    def lacks(self, name: str) -> bool:
        """Whether a setting is not known that matters, or may matter."""
        matters = all(self.known.get(other, value) == value for other, value in self.hub.facts[name].only.items())
        return matters and name not in self.known

    def fits(self, computed: Computed, value: Scalar) -> bool:
        """Whether a setting is of its kind, and agrees with the shapes; if not, a fault says so."""
        kind = self.hub.facts[computed.fact].kind
        if kind and not _is_of_kind(kind, value):
            fault = f"{config_text(value)!r} is no {_KINDS[kind]}"
        else:
            fault = self.unlike_shapes(computed, value)
        text = f"{computed.fact}: {fault}"
        if fault and text not in self.faults:
            self.faults.append(text)
        return not fault

    def unlike_shapes(self, computed: Computed, value: Scalar) -> str:
        """What the shapes say against a setting; empty for nothing."""
        length: Any = self.number(computed.divides) if computed.divides is not None else _ABSENT
        if type(value) is int and length is not _ABSENT and (value < 1 or length % value):
            return f"{value} does not divide {length}, the length of {computed.divides}"
        other = computed.others
        if (
            other is None
            or not isinstance(other.divide, str)
            or not _is_of_kind("count", self.known.get(other.divide, 0))
        ):
            return ""
        shown = self.value(other)
        by = f"{other.divide} = {self.known[other.divide]}"
        return "" if shown in (_ABSENT, value) else f"{value}, but by the shapes and {by} it is {shown}"

    def setting(self, computed: Computed) -> Any:
        """A setting in the format's own word."""
        value = self.known.get(computed.fact)
        self.used.add(computed.fact)
        if value is None:
            if computed.others is not None and self.can(computed.others):
                return self.value(computed.others)
            if computed.optional or not self.lacks(computed.fact):
                return _ABSENT
            self.unknown.setdefault(computed.fact, ())
            return None
        if not self.fits(computed, value):
            return None
        if not self.without_word(computed, value):
            written = computed.words.get(config_text(value), value)
            return written[computed.side == "width"] if computed.side and isinstance(written, tuple) else written
        if computed.others is not None or computed.optional:
            return self.value(computed.others) if computed.others is not None else _ABSENT
        self.faults.append(f"{computed.fact}: the format has no word for {config_text(value)!r}")
        return None

    def can(self, computed: Computed) -> bool:
        """Whether a value can be computed from what is known."""
        names = {name for name in (computed.fact, computed.divide) if isinstance(name, str) and name}
        return all(name in self.known for name in names) or (computed.others is not None and self.can(computed.others))

    def number(self, length: Length) -> Any:
        """The length of an axis, the number of keys, or whether there is a key; ``_ABSENT`` without key or axis."""
        found = self.matching(length.side)
        if length.exists:
            return bool(found)
        if not found:
            return _ABSENT
        axis = length.axis
        if axis is None:
            return len(found)
        lengths = [target.shape[axis] for target in found if axis < len(target.shape)]
        if not lengths:
            return _ABSENT
        if length.pick == "longest":
            return self.indices_of(length, max(lengths))
        return min(lengths) if length.pick else lengths[0]

    def indices_of(self, length: Length, wanted: int) -> list[int]:
        """The first groups of the keys with a length, in order."""
        side, axis = length.side, length.axis
        assert side is not None and axis is not None, "a length of an axis"
        matches = ((side.match(key), target.shape) for key, target in self.tensors.items())
        return sorted(int(next(iter(m.values()))) for m, shape in matches if m and shape[axis:][:1] == (wanted,))
