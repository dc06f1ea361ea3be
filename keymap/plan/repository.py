"""The files of a folder in a format's own layout: a configuration from shapes and settings, and nothing invented."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from keymap.errors import PlanError
from keymap.language.format import Format, Repository, Scalar, config_text
from keymap.language.layout import Layout
from keymap.plan.describe import describe, recorded_facts
from keymap.plan.export import Export
from keymap.plan.model import grids_of
from keymap.plan.resize import patch_of, prefixes_of
from keymap.plan.templates import Own, Writer
from keymap.plan.to_hub import tower_of
from keymap.source.config import own_file
from keymap.source.detect import matching_keys
from keymap.source.settings import Unknown, in_hub_words

__all__ = ["FolderTexts", "repository_files", "repository_of"]


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
    configured = (planned.source.settings.grid(patch_of(one, planned.hub)) for one in hub.positions.values())
    grids = [*(grids_of(model, hub).values() if model is not None else ()), *filter(None, configured)]
    writer = Writer(planned.tensors, hub, known, grids, planned.source.settings.image_size, model)
    data = {}
    for name, template in repository.files.items():
        writer.begin(name, _own_file(planned, name) if model is None else Own())
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


def _own_file(planned: Export, name: str) -> Own:
    """The source's own file of this name, where it is the configuration of the format that is written or of another."""
    source = planned.source
    if source.found is None:
        return Own()
    mapping = source.found.mapping
    configs = [one.config for one in (mapping, source.known.hub) if one.config is not None]
    same = mapping.name == planned.target.name
    if not same and all(config.file != name for config in configs):
        return Own()
    return Own(own_file(Path(source.file), source.metadata, name), same)


def _faults(planned: Export, repository: Repository, keys: Mapping[str, Layout], writer: Writer) -> list[str]:
    """What the files cannot say, and a question for what is not known."""
    hub, known = writer.hub, writer.known
    written = {tower_of(hub, key) for key in planned.hub}
    needed = {name: allowed for name, allowed in repository.requires.items() if name.partition(".")[0] in written}
    required = {name: None for name in needed if writer.lacks(name) and not _instead(repository, name, known)}
    groups = [group.facts for group in repository.alike if matching_keys(group.when, keys) is not None]
    alike = {name: None for group in groups for name in group if writer.lacks(name)}
    faults = [
        *_forbidden(needed, hub, known),
        *_unlike(groups, known),
        *_unlike_positions(planned, writer),
        *writer.faults,
    ]
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


def _unlike_positions(planned: Export, writer: Writer) -> Iterator[str]:
    """Sizes of images that are written as they are stated, and that the position embedding does not fit."""
    for position in writer.hub.positions.values():
        tensor, patch = planned.hub.get(position.key), patch_of(position, planned.hub)
        if tensor is None or patch is None or len(tensor.shape) <= position.lead:
            continue
        rows = tensor.shape[position.lead]
        for name in writer.size_facts():
            value = writer.known.get(name) if name in writer.used else None
            height, width = value if isinstance(value, tuple) else (value, value)
            if type(height) is not int or type(width) is not int:
                continue  # a fault of its own
            if rows - height // patch[0] * (width // patch[1]) not in prefixes_of(position, planned.hub):
                yield (
                    f"{name} is {config_text(height if height == width else (height, width))}, but the weights have "
                    f"{rows} positions, with the tokens, of {patch[0]} by {patch[1]} pixels"
                )


def _question(repository: Repository, hub: Format, name: str, cases: tuple[str, ...]) -> str:
    """What a fact is, and which values the format's code allows."""
    allowed = " or ".join(map(config_text, repository.requires.get(name, cases)))
    label = hub.facts[name].label
    only = f"the format has only {allowed}" if allowed else ""
    text = f"{label} ({only})" if label and only else label or only
    return f"{name}: {text}" if text else name
