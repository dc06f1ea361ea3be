"""Read a source's settings from its configuration: a file beside the checkpoint, or its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from keymap.language.format import Computed, Config, Format, Place, Scalar, Template, as_size, as_word
from keymap.language.layout import Shaped
from keymap.read.shards import leads_out
from keymap.source.detect import fixed_by
from keymap.source.settings import Count, Settings, Size, Unknown, config_text

__all__ = ["is_model_type", "model_type", "own_file", "read_config", "settings_in", "value_at"]

_MAX_BYTES = 1 << 20
_MAX_WORD = 200
_MAX_NUMBER = 1 << 53
_SHOWN = 40  # characters of a value that is too long for a message
_PLAIN = (str, int, float, bool, type(None))  # what a configuration within a checkpoint may hold
_ABSENT = object()
_IGNORED = object()


def read_config(
    file: Path,
    metadata: Mapping[str, str],
    mapping: Format,
    hub: Format,
    tree: Mapping[str, Any] | None = None,
    keys: Mapping[str, Shaped] | None = None,
) -> Settings:
    """The settings that the format fixes, and those of a configuration in the checkpoint or beside it.

    Args:
        file: the checkpoint. Its configuration has the name that the format gives, or the checkpoint's name with .json.
        metadata: strings that the container holds beside tensors.
        mapping: the checkpoint's format.
        tree: what the checkpoint holds, in which a format's configuration may be a dict.
        hub: its form of a configuration is read if the format has none, or none is found.
        keys: of the state dict, by which variants of the format fix settings.
    """
    own = fixed_by(mapping, keys or {}) if mapping.kind != "hub" else {}  # a hub's are its models'
    fixed: dict[str, tuple[Scalar, str]] = {name: (v, f"format {mapping.name}") for name, v in own.items()}
    notes: list[str] = []
    for config in (mapping.config, hub.config if mapping is not hub else None):
        if config is None:
            continue
        for origin, data, fault in _configurations(file, metadata, config, tree or {}):
            if fault:
                notes.append(f"{origin} could not be read: {fault}")
                continue
            settings = _parse(data, config, origin)
            if settings is not None:
                facts = {**fixed, **_of_their_kinds(settings.facts, hub)}
                counts = tuple(_counts(data, mapping, config, origin))
                return settings._replace(facts=facts, notes=tuple(notes), counts=counts)
    return Settings(facts=fixed, notes=tuple(dict.fromkeys(notes)))


def settings_in(data: Any, mapping: Format, hub: Format, origin: str, keys: Mapping[str, Shaped]) -> Settings:
    """The settings that the format fixes, and those of a configuration in memory.

    Args:
        data: what a file of the format's configuration would hold.
        mapping: the format.
        hub: of the format.
        origin: where the data is, for messages.
        keys: of the state dict.
    """
    own = fixed_by(mapping, keys)
    fixed: dict[str, tuple[Scalar, str]] = {name: (v, f"format {mapping.name}") for name, v in own.items()}
    settings = _parse(data, mapping.config, origin) if mapping.config is not None else None
    if settings is None:
        return Settings(facts=fixed)
    return settings._replace(facts={**fixed, **_of_their_kinds(settings.facts, hub)})


def _of_their_kinds(facts: Mapping[str, tuple[Scalar, str]], hub: Format) -> dict[str, tuple[Scalar, str]]:
    """Settings of a configuration; only a size can be two numbers."""
    sizes = {name for name, fact in hub.facts.items() if fact.kind == "size"}
    pairs = {name: entry for name, entry in facts.items() if isinstance(entry[0], tuple)}
    read = {n: (as_size(v) if n in sizes else Unknown(config_text(v)), origin) for n, (v, origin) in pairs.items()}
    return {**facts, **read}


def own_file(file: Path, metadata: Mapping[str, str], name: str) -> Any:
    """What a JSON file beside a checkpoint, or in its metadata, holds; None where there is none that can be read."""
    texts = _config_texts(file, metadata, name)
    return next((data for _, data, fault in _parsed(texts) if not fault and isinstance(data, dict)), None)


def value_at(data: Any, path: str, absent: Any = None) -> Any:
    """The value at a dotted path; ``absent`` if there is none."""
    value = _at(data, path)
    return absent if value is _ABSENT else value


def _parse(data: Any, config: Config, origin: str) -> Settings | None:
    """The settings of a configuration; None for other JSON, which has none of the values and none of the sections."""
    whole = data
    data = _own_sections(data, config)
    found = {name: _first(data, places) for name, places in config.facts.items()}
    sizes = _size(data, config.image_size), _size(data, config.patch_size)
    paths = [place.path for places in config.facts.values() for place in places]
    sections = {path.partition(".")[0] for path in paths if "." in path}
    if not isinstance(data, dict) or not (any((*found.values(), *sizes)) or sections & data.keys()):
        return None
    facts: dict[str, tuple[Scalar, str]] = {}
    for name, places in config.facts.items():
        value = found[name]
        if data is not whole and not any(place.path.partition(".")[0] in data for place in places):
            continue  # the section of its tower is another model's, or there is none
        if value is not None:
            facts[name] = (value[0], f"{origin}: {value[1]}")
        elif name in config.defaults and _leaves_out(data, places):
            facts[name] = (config.defaults[name], f"default, not set in {origin}")
    return Settings(*sizes, facts)


def _counts(data: Any, mapping: Format, config: Config, origin: str) -> Iterator[Count]:
    """The numbers of keys that a format's own configuration states: those that keymap counts where it writes one."""
    if mapping.repository is None or config is not mapping.config or _own_sections(data, config) is not data:
        return
    for path, computed in _computed(mapping.repository.files.get(config.file, {})):
        length, number = computed.length, _at(data, path)
        counts = length is not None and length.axis is None and not length.exists
        plain = computed._replace(length=None, absent=None) == Computed("", None)
        if counts and plain and length is not None and length.side is not None and type(number) is int:
            yield Count(length.side, number, f"{origin}: {path}")


def _computed(template: Template, path: str = "") -> Iterator[tuple[str, Computed]]:
    """The computed values of a file, by their dotted path."""
    for name, value in template.items() if isinstance(template, Mapping) else ():
        if isinstance(value, Computed):
            yield f"{path}{name}", value
        else:
            yield from _computed(value, f"{path}{name}.")


def _own_sections(data: Any, config: Config) -> Any:
    """The data; of another model's configuration only the sections that may be the format's."""
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not config.model_types or not isinstance(kind, str) or is_model_type(kind, config):
        return data
    paths = (place.path for places in config.facts.values() for place in places if "." in place.path)
    names = {path.partition(".")[0] for path in paths}
    return {name: data[name] for name in names & data.keys() if isinstance(data[name], dict)}


def is_model_type(kind: str, config: Config) -> bool:
    """Whether a ``model_type`` is one of the format's names or patterns."""
    return any(fnmatchcase(kind, pattern) for pattern in config.model_types)


def model_type(file: Path, metadata: Mapping[str, str], config: Config) -> str:
    """The ``model_type`` of the configuration of a checkpoint, "" for none."""
    for _, data, _ in _configurations(file, metadata, config, {}):
        if isinstance(data, dict) and isinstance(data.get("model_type"), str):
            return str(data["model_type"])
    return ""


def _leaves_out(data: Any, places: Iterable[Place]) -> bool:
    """Whether a file leaves a fact to the default of the format's code."""
    if any(place.unless and _holds(data, place.unless) for place in places):
        return False
    return all(place.others == "ignore" or _at(data, place.path) is _ABSENT for place in _applicable(data, places))


def _configurations(
    file: Path, metadata: Mapping[str, str], config: Config, tree: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """The possible configurations of a checkpoint: origin, values, and the fault of one that cannot be read."""
    top = config.inside == "."
    within = dict(tree) if top else _at(tree, config.inside) if config.inside else _ABSENT
    if isinstance(within, dict):
        plain = {key: value for key, value in within.items() if isinstance(key, str) and type(value) in _PLAIN}
        yield file.name if top else f"{config.inside} in {file.name}", plain, ""
    yield from _parsed(_config_texts(file, metadata, config.file)) if config.file else ()


def _parsed(texts: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, Any, str]]:
    """The values of texts, each with its origin, and the fault of one that cannot be read."""
    for origin, text, fault in texts:
        data = None
        if not fault:
            try:
                data = json.loads(text)
            except (ValueError, RecursionError):
                fault = "it is not valid JSON"
        yield origin, data, fault


def _config_texts(file: Path, metadata: Mapping[str, str], name: str) -> Iterator[tuple[str, str, str]]:
    """The possible configurations of a checkpoint: origin, text, and the fault of one that cannot be read."""
    too_long = f"it is longer than {_MAX_BYTES >> 20} MB"
    for key in (name, Path(name).stem):
        if key in metadata:
            yield f"metadata {key}", metadata[key], too_long if len(metadata[key]) > _MAX_BYTES else ""
    for path in (file.parent / name, file.with_suffix(".json")):
        try:
            if path == file:
                continue
            if not path.is_file():
                if os.path.lexists(path):
                    yield path.name, "", "it is a link to nothing" if path.is_symlink() else "it is not a regular file"
                continue
            if not path.stat().st_size:  # files of /proc also report size 0, and may never end
                yield path.name, "", "it is empty"
                continue
            if leads_out(path, file.parent, Path(os.path.realpath(file)).parent):
                yield path.name, "", "it is a link that leaves the folder"
                continue
            with path.open(encoding="utf-8") as source:
                text = source.read(_MAX_BYTES + 1)
            yield path.name, text, too_long if len(text) > _MAX_BYTES else ""
        except OSError as error:
            yield path.name, "", error.strerror or type(error).__name__
        except ValueError:
            yield path.name, "", "it is not UTF-8 text"


def _at(data: Any, path: str) -> Any:
    """The value at a dotted path; ``_ABSENT`` if there is none."""
    for name in path.split("."):
        data = data.get(name, _ABSENT) if isinstance(data, dict) else _ABSENT
    return data


def _holds(data: Any, path: str) -> bool:
    """Whether the value at a dotted path exists and is not false, null or empty."""
    value = _at(data, path)
    return value is not _ABSENT and bool(value)


def _first(data: Any, places: Iterable[Place]) -> tuple[Scalar, str] | None:
    """The value at the first place that applies, and a text that shows where it is."""
    for place in _applicable(data, places):
        value = _at(data, place.path)
        if value is not _ABSENT:
            word = _word(data, place, value)
            if word is not _IGNORED:
                return None if word is None else (word, f"{place.path} = {_shown(value)}")
    return None


def _applicable(data: Any, places: Iterable[Place]) -> Iterator[Place]:
    """The places that count for this file."""
    for place in places:
        if (place.unless and _holds(data, place.unless)) or (place.only_if and not _holds(data, place.only_if)):
            continue
        if all(_at(data, path) in (_ABSENT, None) for path in place.outside):
            yield place


def _word(data: Any, place: Place, value: Any) -> Any:
    """The hub's word for a value: `Unknown` if there is none, None if the value says nothing.

    ``_IGNORED`` if the next place counts.
    """
    value = value if place.words else as_word(value)
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
        value = value[0], value[1]
    known: Scalar | None = value if _is_comparable(value) else None
    if place.minus[0] and type(value) is int:
        subtracted = _at(data, place.minus[0])
        known = value - (subtracted if type(subtracted) is int else place.minus[1])
    if place.words:
        text = config_text(value if known is None else known)
        if text in place.words:
            return place.words[text]
        if place.others == "ignore":
            return _IGNORED
        known = place.other_word if known is not None else None
    return Unknown(_shown(value)) if known is None else known


def _shown(value: Any) -> str:
    """A value of a configuration for messages: one short line."""
    text = config_text(value)
    return text if len(text) <= _MAX_WORD and text.isprintable() else f"{text[:_SHOWN]!r}..."


def _is_comparable(value: Any) -> bool:
    """Whether a value is a short printable string, a number of moderate size, or two of them."""
    if isinstance(value, tuple):
        return all(map(_is_comparable, value))
    if isinstance(value, str):
        return len(value) <= _MAX_WORD and value.isprintable()
    return isinstance(value, (int, float)) and -_MAX_NUMBER < value < _MAX_NUMBER


def _size(data: Any, places: Iterable[Place]) -> Size | None:
    """(h, w) from the first place that has a number or a list of two."""
    for place in _applicable(data, places):
        value = _at(data, place.path)
        sides = [value, value] if isinstance(value, int) else value
        if isinstance(sides, list) and len(sides) == 2 and all(type(n) is int and 0 < n < _MAX_NUMBER for n in sides):
            return sides[0], sides[1]
    return None
