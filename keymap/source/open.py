"""Open a checkpoint: choose its file, read it, unwrap its state dict and detect its format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from keymap.errors import CheckpointError, DetectionError, MappingError
from keymap.language.layout import Layout, whole
from keymap.read import LazyTensor, open_checkpoint
from keymap.source.config import read_config
from keymap.source.detect import Detection, check_refused, detect
from keymap.source.folder import choose_file
from keymap.source.registry import Catalogue, path_text, registry
from keymap.source.settings import Settings
from keymap.source.unwrap import Unwrapped, submodels, unwrap

__all__ = ["PathLike", "Source", "catalogue_with", "layouts_of", "open_sources"]

PathLike = str | os.PathLike[str]


class Source(NamedTuple):
    """One state dict of a checkpoint.

    Attributes:
        known: all known mappings.
        file, container: the file that was read, and its kind.
        unwrapped: its tensors.
        found: its format; None if no format matches, and ``refusal`` says why.
        settings: the settings that its configuration states.
        notes: which file of a folder was chosen, and why.
    """

    known: Catalogue
    file: str
    container: str
    unwrapped: Unwrapped
    found: Detection | None
    refusal: DetectionError | None
    settings: Settings
    notes: tuple[str, ...] = ()


def catalogue_with(mapping: PathLike | None) -> tuple[Catalogue, str | None]:
    """All known mappings and the name of the wanted one, for the argument ``mapping`` of the public functions.

    Args:
        mapping: name of a format, path of a mapping file to add, or None to detect the format.

    Raises:
        MappingError: there is no such format or file, or the file is wrong.
    """
    known = registry()
    if mapping is None:
        return known, None
    name = path_text(mapping, MappingError, "pass the name of a format or the path of a YAML file as mapping=")
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        kind = known.get(name).kind
        if kind not in ("format", "hub"):
            formats = ", ".join(sorted(m.name for m in known.formats))
            raise MappingError(
                f"mapping={name!r}: no file has this format, because its kind is {kind}; pass one of: {formats}"
            )
        return known, name
    file = Path(name)
    if not os.path.isfile(file):
        raise MappingError(f"mapping={name!r}: the mapping file does not exist; check the path")
    extended = Catalogue(dict(known.mappings), dict(known.files), dict(known.places))
    return extended, extended.add([file])[0].name


def layouts_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Layout]:
    """The layout of each tensor: its own elements in their order."""
    return {key: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}


def open_sources(
    path: PathLike, weights_only: bool, mapping: PathLike | None, wrapper: str | None
) -> tuple[Source, ...]:
    """Open the state dicts of a checkpoint that may fit a model.

    Usually this is one. There are several if no format matches the state dict, but formats match submodels of it (for
    example a teacher and a student). If no format matches anything, the result is one Source without a format.

    Args:
        path: a checkpoint file, an index of shards, or a folder.
        weights_only: see `open_checkpoint`.
        mapping: see `catalogue_with`.
        wrapper: dotted path of the wanted state dict in the file, or None.

    Raises:
        CheckpointError: the file cannot be read, or has no state dict.
    """
    known, wanted = catalogue_with(mapping)
    text = path_text(path, CheckpointError, "pass the path of a checkpoint file or of a folder")
    if not isinstance(wrapper, (str, type(None))):
        raise CheckpointError(f"wrapper={wrapper!r}: pass the dotted path of a state dict in the file")
    file_path, notes = Path(text), tuple[str, ...]()
    if os.path.isdir(file_path):  # without permission this is False, not an error
        file_path, note = choose_file(file_path, known.containers)
        notes = (note,)
    checkpoint = open_checkpoint(file_path, weights_only)
    file = str(checkpoint.path)

    def source_of(unwrapped: Unwrapped) -> Source:
        layouts = layouts_of(unwrapped.tensors)
        try:
            check_refused(known, layouts, wanted, file)
            found = detect(known, layouts, wanted, file=file)
        except DetectionError as error:
            return Source(known, file, checkpoint.container, unwrapped, None, error, Settings(), notes)
        settings = read_config(checkpoint.path, checkpoint.metadata, found.mapping, known.hub)
        return Source(known, file, checkpoint.container, unwrapped, found, None, settings, notes)

    whole_file = source_of(unwrap(checkpoint.tree, known.containers, file, wrapper))
    if whole_file.found is not None:
        return (whole_file,)
    inner = [source_of(submodel) for submodel in submodels(whole_file.unwrapped, known.containers, file)]
    return tuple(source for source in inner if source.found is not None) or (whole_file,)
