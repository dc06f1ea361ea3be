"""The files of a folder in a format's own layout: a configuration from shapes and settings, and nothing invented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isqrt, nextafter
from typing import Any

from keymap.errors import PlanError
from keymap.language.format import Computed, Format, Length, Repository, Scalar, Template, config_text
from keymap.plan.export import Export, Target
from keymap.source.detect import matching_keys
from keymap.source.settings import Unknown, in_hub_words

__all__ = ["repository_files", "repository_of"]

_ABSENT = object()  # no tensor shows it


def repository_of(planned: Export) -> Repository:
    """The layout of a folder of the target's format.

    Raises:
        PlanError: it has none, or none for the towers that are written.
    """
    repository = planned.target.repository
    if repository is None:
        raise PlanError(
            f"{planned.target.name} has no layout of a folder; pass a file, for example one that ends with .safetensors"
        )
    keys = {key: target.layout for key, target in planned.tensors.items()}
    if matching_keys(repository.when, keys) is None:
        raise PlanError(
            f"{planned.target.name} has no layout of a folder for these towers; pass a file, for example one that ends "
            f"with .safetensors"
        )
    return repository


def repository_files(planned: Export, hub: Format, given: Mapping[str, Scalar]) -> dict[str, str]:
    """The text of each JSON file of a folder.

    Args:
        planned: the conversion.
        hub: has the labels of settings.
        given: settings by the hub's names: those of the model, or of the caller. They come before the source's own.

    Raises:
        PlanError: as `repository_of`; a setting is not known, or the format's code does not allow its value.
    """
    repository = repository_of(planned)
    stated = planned.source.settings.facts
    source = {name: value for name, (value, _) in stated.items() if not isinstance(value, Unknown)}
    known = {name: in_hub_words(hub.facts[name], v) for name, v in {**source, **given}.items() if name in hub.facts}
    writer = _Writer(planned.tensors, hub, known)
    data = {name: writer.section(template) for name, template in repository.files.items()}
    faults = [*_forbidden(repository, hub, known), *writer.faults]
    if writer.unknown:
        names = "; ".join(f"{name}: {hub.facts[name].label or name}" for name in writer.unknown)
        wanted = ", ".join(f"{name!r}: ..." for name in writer.unknown)
        faults.append(
            f"neither shapes nor a configuration show {names}; pass facts={{{wanted}}}, or put the source's "
            f"configuration beside it"
        )
    if faults:
        files = " and ".join(repository.files)
        raise PlanError(f"{planned.source.file}: {files} of {planned.target.name} cannot be written", faults)
    return {name: json.dumps(value, indent=2) + "\n" for name, value in data.items()}


def _forbidden(repository: Repository, hub: Format, known: Mapping[str, Scalar]) -> list[str]:
    """Settings of the source that the format's code does not have."""
    faults = [
        f"{hub.facts[name].label or name}: {config_text(known[name])} in the source, and the format has only "
        f"{' or '.join(map(config_text, allowed))}"
        for name, allowed in repository.requires.items()
        if name in known and known[name] not in allowed
    ]
    values = dict.fromkeys(known[name] for name in repository.alike if name in known)
    if len(values) > 1:
        names, texts = " and ".join(repository.alike), ", ".join(map(config_text, values))
        faults.append(f"{names} differ ({texts}), and the format has one value")
    return faults


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
        unknown: the facts that are needed and not known.
        faults: what else is wrong.
    """

    tensors: Mapping[str, Target]
    hub: Format
    known: Mapping[str, Scalar]
    unknown: dict[str, None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def section(self, template: Mapping[str, Template]) -> dict[str, Any]:
        """A section with its values; inner sections of which no tensor is there are left out."""
        found: dict[str, Any] = {}
        for name, value in template.items():
            if isinstance(value, Computed):
                computed = self.value(value)
                if computed is not _ABSENT:
                    found[name] = computed
            elif not isinstance(value, dict):
                found[name] = value
            elif self.present(value):
                found[name] = self.section(value)
        return found

    def present(self, template: Mapping[str, Template]) -> bool:
        """Whether a tensor is there that a value of the section is read from; True if none is."""
        lengths = [v.length for v in template.values() if isinstance(v, Computed) and v.length is not None]
        return not lengths or any(self.matching(length) for length in lengths)

    def matching(self, length: Length) -> list[Target]:
        side = length.side
        return [target for key, target in self.tensors.items() if side is not None and side.match(key) is not None]

    def value(self, computed: Computed) -> Any:
        """A computed value; ``_ABSENT`` if no tensor shows it."""
        if computed.fact:
            return self.setting(computed)
        assert computed.length is not None, "it is computed from a fact or from a length"
        number = self.number(computed.length)
        if number is _ABSENT:
            return number if computed.absent is None else computed.absent
        if computed.length.exists:
            return computed.words.get(config_text(number), number)
        number -= computed.minus
        if computed.square:
            side = isqrt(number)
            if side * side != number:
                self.faults.append(f"{number} positions are no square, and the format has square images only")
            number = side
        if computed.times is not None:
            number *= self.number(computed.times)
        if computed.divide:
            by = self.known.get(computed.divide)
            if not isinstance(by, int):
                self.unknown[computed.divide] = None
                return None
            number //= by
        return number if computed.over is None else _fraction(number, self.number(computed.over))

    def setting(self, computed: Computed) -> Any:
        """A setting in the format's own word."""
        value = self.known.get(computed.fact)
        if value is None:
            if computed.others is not None and self.can(computed.others):
                return self.value(computed.others)
            if computed.optional:
                return _ABSENT
            self.unknown[computed.fact] = None
            return None
        if not computed.words or config_text(value) in computed.words:
            return computed.words.get(config_text(value), value)
        if computed.others is not None:
            return self.value(computed.others)
        self.faults.append(f"{computed.fact}: the format has no word for {config_text(value)!r}")
        return None

    def can(self, computed: Computed) -> bool:
        """Whether a value can be computed from what is known."""
        names = {computed.fact, computed.divide} - {""}
        return all(name in self.known for name in names)

    def number(self, length: Length) -> Any:
        """The length of an axis, the number of keys, or whether there is a key; ``_ABSENT`` if there is none."""
        found = self.matching(length)
        if length.exists:
            return bool(found)
        if not found:
            return _ABSENT
        return len(found) if length.axis is None else found[0].shape[length.axis]
