"""The first three steps, read → unwrap → detect: a checkpoint on its way to a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from keymap.errors import CheckpointError, DetectionError, MappingError
from keymap.language.layout import Layout, whole
from keymap.read import LazyTensor, open_checkpoint
from keymap.source.config import Settings, read_config
from keymap.source.detect import Detection, detect, refuse_in_words
from keymap.source.folder import choose_file
from keymap.source.registry import Catalogue, registry
from keymap.source.unwrap import Unwrapped, parts_of, unwrap

__all__ = ["PathLike", "Source", "known_with", "layouts_of", "open_sources"]

PathLike = str | os.PathLike[str]


class Source(NamedTuple):
    """One state dict of a checkpoint.

    Attributes:
        known: the mappings it was looked up in.
        file, container: the file that was read.
        unwrapped: its tensors.
        found: its format; None where no format claims it, for the reasons in ``refusal``.
        settings: what its configuration says.
        notes: which file of a folder was taken, and why.
    """

    known: Catalogue
    file: str
    container: str
    unwrapped: Unwrapped
    found: Detection | None
    refusal: DetectionError | None
    settings: Settings
    notes: tuple[str, ...] = ()


def known_with(mapping: PathLike | None) -> tuple[Catalogue, str | None]:
    """The registry, with a mapping file of the caller's if one is named, and the name to look for."""
    known = registry()
    if mapping is None:
        return known, None
    if not isinstance(mapping, (str, os.PathLike)):
        raise MappingError(f"mapping={mapping!r}: give the name of a format, or the path of a YAML file")
    name = os.fspath(mapping)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        if known.get(name).kind not in ("format", "hub"):
            formats = ", ".join(sorted(m.name for m in known.formats))
            raise MappingError(
                f"{name} is no format of a file (its kind is {known.get(name).kind}); formats: {formats}"
            )
        return known, name
    file = Path(name)
    if not os.path.isfile(file):
        raise MappingError(f"{name}: there is no such mapping file")
    extended = Catalogue(dict(known.mappings), dict(known.files), dict(known.places))
    return extended, extended.add([file])[0].name


def layouts_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Layout]:
    return {key: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}


def open_sources(
    path: PathLike, weights_only: bool, mapping: PathLike | None, wrapper: str | None
) -> tuple[Source, ...]:
    """The state dicts of a checkpoint that may be meant.

    One, as a rule; several where no format claims the keys as they are, and formats claim parts of them (a teacher
    beside a student). A lone one may be of no known format.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    known, wanted = known_with(mapping)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise CheckpointError(f"the checkpoint is {path!r}: give the path of a file")
    if not isinstance(wrapper, (str, type(None))):
        raise CheckpointError(f"wrapper={wrapper!r}: give the dotted path of a state dict in the file")
    place, notes = Path(path), tuple[str, ...]()
    if os.path.isdir(place):  # which is False, not an error, for what may not be looked at
        place, why = choose_file(place, known.containers)
        notes = (why,)
    checkpoint = open_checkpoint(place, weights_only)
    file = str(checkpoint.path)

    def opened(unwrapped: Unwrapped) -> Source:
        layouts = layouts_of(unwrapped.tensors)
        try:
            refuse_in_words(known, layouts, wanted, file)
            found = detect(known, layouts, wanted, file=file)
        except DetectionError as error:
            return Source(known, file, checkpoint.container, unwrapped, None, error, Settings(), notes)
        settings = read_config(checkpoint.path, checkpoint.metadata, found.mapping, known.hub)
        return Source(known, file, checkpoint.container, unwrapped, found, None, settings, notes)

    first = opened(unwrap(checkpoint.tree, known.containers, file, wrapper))
    if first.found is not None:
        return (first,)
    parts = [opened(part) for part in parts_of(first.unwrapped, known.containers, file)]
    return tuple(part for part in parts if part.found is not None) or (first,)
