"""The files of a folder in a format's own layout: a configuration from shapes and settings, and nothing invented."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, isqrt, nextafter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from keymap.errors import PlanError
from keymap.language.format import Cases, Computed, Format, Kept, Length, Repository, Scalar, Template, config_text
from keymap.language.layout import Layout
from keymap.language.pattern import Side
from keymap.plan.describe import describe, recorded_facts
from keymap.plan.export import Export, Target
from keymap.plan.model import ABSENT, attribute
from keymap.plan.to_hub import tower_of
from keymap.source.config import own_file, value_at
from keymap.source.detect import matching_keys
from keymap.source.settings import Unknown, in_hub_words

__all__ = ["FolderTexts", "repository_files", "repository_of"]

_KINDS = {
    "count": "whole number from 1 on",
    "index": "whole number from 0 on",
    "positive": "positive number",
    "flag": "true or false",
    "word": "word",
}
_ABSENT = object()  # no tensor shows it


class FolderTexts(NamedTuple):
    """What lies beside the weights of a folder.

    Attributes:
        texts: of the JSON files, by name.
        notes: which values are those of recorded configurations.
    """

    texts: Mapping[str, str]
    notes: tuple[str, ...]


def repository_of(planned: Export) -> Repository:
    """The layout of a folder of the target's format.

    Raises:
        PlanError: it has none, or none for the towers that are written.
    """
    repository = planned.target.repository
    if repository is None or repository.none:
        why = f": {repository.none}" if repository is not None else ""
        raise PlanError(
            f"{planned.target.name} has no layout of a folder{why}; pass a file, for example one that ends with "
            f".safetensors"
        )
    keys = {key: target.layout for key, target in planned.tensors.items()}
    if matching_keys(repository.when, keys) is None:
        raise PlanError(
            f"{planned.target.name} has no layout of a folder for these towers; pass a file, for example one that ends "
            f"with .safetensors"
        )
    for refusal in repository.refuse:
        if matching_keys(refusal.when, keys) is not None:
            raise PlanError(f"a folder of {planned.target.name} cannot be written: {refusal.why}")
    return repository


def repository_files(planned: Export, given: Mapping[str, Scalar], model: nn.Module | None = None) -> FolderTexts:
    """The JSON files of a folder.

    Args:
        planned: the conversion.
        given: settings by the hub's names: those of the model, or of the caller. They come before the source's own, and
            names of recorded configurations of exactly these sizes come last.
        model: the model that is written, for values that no weight shows; None for a file.

    Raises:
        PlanError: as `repository_of`; a setting is not known, or the format's code does not allow its value.
    """
    repository, hub = repository_of(planned), planned.source.known.hub
    keys = {key: target.layout for key, target in planned.tensors.items()}
    stated = planned.source.settings.facts
    source = {name: value for name, (value, _) in stated.items() if not isinstance(value, Unknown)}
    recorded = recorded_facts(planned.source.known, describe(planned.source.known, planned.hub))
    facts = {**hub.fixed, **{name: value for name, (value, _) in recorded.items()}, **source, **given}
    known = {name: in_hub_words(hub.facts[name], value) for name, value in facts.items() if name in hub.facts}
    writer = _Writer(planned.tensors, hub, known, model)
    data = {}
    for name, template in repository.files.items():
        writer.begin(name, _own_file(planned, name) if model is None else _Own())
        data[name] = _alone(repository, writer.section(template))
    faults = _faults(planned, repository, keys, writer)
    if faults:
        files = " and ".join(repository.files)
        raise PlanError(f"{planned.source.file}: {files} of {planned.target.name} cannot be written", faults)
    taken = [name for name in recorded if name in writer.used and name not in {**source, **given}]
    notes = tuple(
        f"{name} = {config_text(recorded[name][0])}, as in the configuration of these sizes: {recorded[name][1]}"
        for name in taken
    )
    notes = (*notes, *writer.losses())
    return FolderTexts({name: json.dumps(value, indent=2) + "\n" for name, value in data.items()}, notes)


def _alone(repository: Repository, data: dict[str, Any]) -> dict[str, Any]:
    """A file; the inside of its one section where the format's owner writes a tower's section as a file of its own."""
    (section, *others) = [name for name in repository.alone if name in data] or [""]
    inside: dict[str, Any] = data[section] if section and not others else data
    return inside


class _Own(NamedTuple):
    """The source's own file of a name.

    Attributes:
        data: what it holds; None where there is none.
        same: the source has the format that is written, so all values mean the same.
    """

    data: Any = None
    same: bool = False


def _own_file(planned: Export, name: str) -> _Own:
    """The source's own file of this name, where it is the configuration of the format that is written or of another."""
    source = planned.source
    if source.found is None:
        return _Own()
    mapping = source.found.mapping
    configs = [one.config for one in (mapping, source.known.hub) if one.config is not None]
    same = mapping.name == planned.target.name
    if not same and all(config.file != name for config in configs):
        return _Own()
    return _Own(own_file(Path(source.file), source.metadata, name), same)


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
    if kind in ("word", "flag"):
        return type(value) is (str if kind == "word" else bool)
    if kind == "positive":
        return type(value) in (int, float) and 0 < float(value) < inf
    return type(value) is int and value >= (kind == "count")


def _faults(planned: Export, repository: Repository, keys: Mapping[str, Layout], writer: _Writer) -> list[str]:
    """What the files cannot say, and a question for what is not known."""
    hub, known = writer.hub, writer.known
    written = {tower_of(hub, key) for key in planned.hub}
    needed = {name: allowed for name, allowed in repository.requires.items() if name.partition(".")[0] in written}
    required = {name: None for name in needed if writer.lacks(name) and not _instead(repository, name, known)}
    groups = [group.facts for group in repository.alike if matching_keys(group.when, keys) is not None]
    alike = {name: None for group in groups for name in group if writer.lacks(name)}
    faults = [*_forbidden(needed, hub, known), *_unlike(groups, known), *writer.faults]
    unknown = {**writer.unknown, **{name: () for name in (*required, *alike) if name not in writer.unknown}}
    for name, (value, origin) in planned.source.settings.facts.items():
        if name in unknown and isinstance(value, Unknown) and value != config_text(None):
            faults.append(f"{name}: keymap has no word for that of the source ({origin}); pass facts={{{name!r}: ...}}")
            unknown.pop(name)
    if unknown:
        names = "; ".join(_question(repository, hub, name, cases) for name, cases in unknown.items())
        wanted = ", ".join(f"{name!r}: ..." for name in unknown)
        where, other = ("the model", "") if writer.model is not None else ("a configuration", _advice(planned))
        faults.append(f"neither shapes nor {where} show {names}; pass facts={{{wanted}}}{other}")
    return faults


def _advice(planned: Export) -> str:
    """What else shows settings that are not known."""
    unread = planned.source.settings.notes
    if unread:
        return f", or mend the configuration ({'; '.join(unread)})"
    return ", or put the source's configuration beside it"


def _instead(repository: Repository, name: str, known: Mapping[str, Scalar]) -> bool:
    """Whether other settings show what a required one does."""
    return any(known.get(other) == value for other, value in repository.instead.get(name, {}).items())


def _forbidden(needed: Mapping[str, tuple[Scalar, ...]], hub: Format, known: Mapping[str, Scalar]) -> list[str]:
    """Settings of the source that the format's code does not have."""
    return [
        f"{hub.facts[name].label or name}: {config_text(known[name])} in the source, and the format has only "
        f"{' or '.join(map(config_text, allowed))}"
        for name, allowed in needed.items()
        if name in known and known[name] not in allowed
    ]


def _unlike(groups: Iterable[tuple[str, ...]], known: Mapping[str, Scalar]) -> Iterator[str]:
    """Settings that differ, and for which the format has one value."""
    for names in groups:
        values = dict.fromkeys(known[name] for name in names if name in known)
        if len(values) > 1:
            texts = ", ".join(map(config_text, values))
            yield f"{' and '.join(names)} differ ({texts}), and the format has one value"


def _question(repository: Repository, hub: Format, name: str, cases: tuple[str, ...]) -> str:
    """What a fact is, and which values the format's code allows."""
    allowed = " or ".join(map(config_text, repository.requires.get(name, cases)))
    label = hub.facts[name].label
    only = f"the format has only {allowed}" if allowed else ""
    text = f"{label} ({only})" if label and only else label or only
    return f"{name}: {text}" if text else name


def _fraction(number: int, by: int) -> float:
    """A fraction of which the whole part of its product with ``by`` is ``number`` again."""
    fraction = number / by
    return fraction if int(by * fraction) == number else nextafter(fraction, inf)


@dataclass
class _Writer:
    """Fills templates.

    Attributes:
        tensors: that are written.
        hub: its facts.
        known: settings by the hub's names.
        used: the facts that were looked up.
        unknown: the facts that are needed and not known, with the values that have a case.
        faults: what else is wrong.
        model: that is written; None for a file.
        file: that is filled.
        own: the source's own file of that name.
        lost: values that are not known: their paths, by the file and what they are.
    """

    tensors: Mapping[str, Target]
    hub: Format
    known: Mapping[str, Scalar]
    model: nn.Module | None = None
    file: str = ""
    own: _Own = field(default_factory=_Own)
    lost: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def begin(self, file: str, own: _Own) -> None:
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
        if computed.square:
            side = isqrt(number)
            if side * side != number:
                self.faults.append(f"{number} positions are no square, and the format has square images only")
            number = side
        number *= computed.times if isinstance(computed.times, int) else self.number(computed.times)
        if computed.divide:
            by = self.divisor(computed.divide)
            if by is None:
                return None
            number //= by
        if computed.agrees is not None and self.can(computed.agrees):
            self.agree(computed, number)
        return number if computed.over is None else _fraction(number, self.number(computed.over))

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
            return computed.words.get(config_text(value), value)
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
