"""What no weight tells: read from the source's configuration and from the model, and compared.

Activations, head counts, the eps of norms, masks and pooling belong to a model's configuration. A file loads without
a word where they differ, and the embeddings are wrong; so a difference is told, and what nothing tells is listed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from keymap.language.format import Config, Fact, Format, Place, Scalar
from keymap.read.shards import leads_out

__all__ = ["Settings", "differences", "read_config", "unverified"]

_MAX_BYTES = 1 << 20
_MAX_WORD = 200
_MAX_NUMBER = 1 << 53
_Size = tuple[int, int]


class Settings(NamedTuple):
    """What a source tells of itself beside its weights.

    Attributes:
        image_size, patch_size: (h, w) in pixels, where they are told.
        facts: by the hub's names, each with where it was read.
        notes: what could not be read.
    """

    image_size: _Size | None = None
    patch_size: _Size | None = None
    facts: Mapping[str, tuple[Scalar, str]] = {}
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> _Size | None:
        """(h, w) in patches."""
        if self.image_size is None or self.patch_size is None:
            return None
        height, width = (size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        return (height, width) if height and width else None

    def to_dict(self) -> dict[str, Any]:
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        told = {name: size for name, size in sizes.items() if size is not None}
        return {**told, **{name: value for name, (value, _) in self.facts.items()}}


def read_config(file: Path, metadata: Mapping[str, str], mapping: Format, hub: Format) -> Settings:
    """What the format states, and what a configuration says: in the file's metadata, or beside the file.

    Args:
        file: the checkpoint; its configuration has the name that the format gives, or the checkpoint's own with .json.
        metadata: texts that the container holds beside tensors.
        mapping: the checkpoint's format.
        hub: whose own form of a configuration is read where the format has none, or none is there.
    """
    stated: dict[str, tuple[Scalar, str]] = {name: (v, f"format {mapping.name}") for name, v in mapping.fixed.items()}
    notes: list[str] = []
    for config in (mapping.config, hub.config if mapping is not hub else None):
        if config is None:
            continue
        for where, text in _texts(file, metadata, config.file):
            try:
                data = json.loads(text)
            except (ValueError, RecursionError):
                notes.append(f"{where} could not be read: it is no JSON, or too long")
                continue
            told = _read(data, config, where)
            if told is not None:
                return told._replace(facts={**stated, **told.facts}, notes=tuple(notes))
    return Settings(facts=stated, notes=tuple(dict.fromkeys(notes)))


def _read(data: Any, config: Config, where: str) -> Settings | None:
    """What a configuration says; None where it is some other JSON: it tells nothing, and has none of the sections."""
    found = {name: _first(data, places) for name, places in config.facts.items()}
    sizes = _size(data, config.image_size), _size(data, config.patch_size)
    paths = [place.path for places in config.facts.values() for place in places]
    sections = {path.partition(".")[0] for path in paths if "." in path}
    if not isinstance(data, dict) or not (any((*found.values(), *sizes)) or sections & data.keys()):
        return None
    facts: dict[str, tuple[Scalar, str]] = {}
    for name, places in config.facts.items():
        value = found[name]
        means_other = any(place.unless and _at(data, place.unless) is not None for place in places)
        if value is not None:
            facts[name] = (value[0], f"{where}: {value[1]}")
        elif name in config.defaults and not means_other:
            facts[name] = (config.defaults[name], f"{where}, which leaves it to the default")
    return Settings(*sizes, facts)


def _texts(file: Path, metadata: Mapping[str, str], name: str) -> Iterator[tuple[str, str]]:
    """Configurations that go with a checkpoint, each with where it lies."""
    for key in (name, Path(name).stem):
        if len(metadata.get(key, "")) > _MAX_BYTES:
            yield f"metadata {key}", ""
        elif key in metadata:
            yield f"metadata {key}", metadata[key]
    for path in (file.parent / name, file.with_suffix(".json")):
        try:
            if path == file or not path.is_file():
                continue
            if not path.stat().st_size:  # a file of /proc says so too, and may have no end
                yield path.name, ""
                continue
            if leads_out(path, file.parent, Path(os.path.realpath(file)).parent):
                yield f"{path.name}, a link that leaves the folder,", ""
                continue
            with path.open(encoding="utf-8") as source:
                text = source.read(_MAX_BYTES + 1)
            yield path.name, text if len(text) <= _MAX_BYTES else ""
        except (OSError, ValueError):
            yield path.name, ""


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _first(data: Any, places: Iterable[Place]) -> tuple[Scalar, str] | None:
    for place in places:
        value = _at(data, place.path)
        if place.unless and _at(data, place.unless) is not None:
            continue
        if any(_at(data, section) is not None for section in place.outside):
            continue
        if _told(value):
            word = place.words.get(_text(value)) if place.words else value
            if word is not None:
                return word, f"{place.path} = {_text(value)}"
    return None


def _told(value: Any) -> bool:
    """Whether a value of a configuration is one that can be compared and shown."""
    if isinstance(value, str):
        return len(value) <= _MAX_WORD and value.isprintable()
    return isinstance(value, (int, float)) and -_MAX_NUMBER < value < _MAX_NUMBER


def _size(data: Any, places: Iterable[Place]) -> _Size | None:
    for place in places:
        value = _at(data, place.path)
        sides = [value, value] if isinstance(value, int) else value
        if isinstance(sides, list) and len(sides) == 2 and all(type(n) is int and 0 < n < _MAX_NUMBER for n in sides):
            return sides[0], sides[1]
    return None


def _text(value: object) -> str:
    """A value as a configuration spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _compared(hub: Format, towers: Iterable[str], model: Mapping[str, Scalar]) -> Iterator[tuple[str, Fact]]:
    """The facts that matter for a model's towers, and that the model tells."""
    chosen = set(towers)
    for name, fact in hub.facts.items():
        matters = all(model.get(other) == value for other, value in fact.only.items())
        if fact.label and name.partition(".")[0] in chosen and name in model and matters:
            yield name, fact


def _word(fact: Fact, value: Scalar) -> Scalar:
    return fact.words.get(_text(value), value)


def _same(one: Scalar, other: Scalar) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return isclose(one, other, rel_tol=1e-6)
    return one == other


def differences(hub: Format, towers: Iterable[str], settings: Settings, model: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Where the source and the model say different things of what no weight tells, and what to change."""
    found: dict[str, str] = {}
    for name, fact in _compared(hub, towers, model):
        if name not in settings.facts:
            continue
        value, where = settings.facts[name]
        there, here = _word(fact, value), _word(fact, model[name])
        if not _same(there, here):
            found.setdefault(
                fact.label,
                f"{fact.label}: {_text(there)} in the source ({where}), {_text(here)} in the model, so embeddings will "
                f"differ; change {fact.change}",
            )
    return tuple(found.values())


def unverified(hub: Format, towers: Iterable[str], settings: Settings, model: Mapping[str, Scalar]) -> tuple[str, ...]:
    """What no weight tells and the source does not say either."""
    labels = {fact.label: False for _, fact in _compared(hub, towers, model)}
    for name, fact in _compared(hub, towers, model):
        labels[fact.label] |= name in settings.facts
    return tuple(label for label, known in labels.items() if not known)
