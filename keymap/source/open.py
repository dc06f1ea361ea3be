"""Open a checkpoint: choose its file, read it, unwrap its state dict and detect its format."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from keymap.errors import CheckpointError, DetectionError
from keymap.language.layout import Layout
from keymap.read import Checkpoint, LazyTensor, open_checkpoint, open_shards
from keymap.source.config import is_model_type, model_type, read_config
from keymap.source.detect import Detection, check_refused, claim, claims
from keymap.source.flatten import everything, training
from keymap.source.folder import Choice, choose_file, refuse_hub_id, refuse_part
from keymap.source.hubs import Asked, PathLike, ask_each
from keymap.source.opened import Found, Opened, Source, layouts_of
from keymap.source.quantized import is_float8, refuse_adapters, refuse_scaled_float8
from keymap.source.registry import Catalogue, path_text
from keymap.source.search import (
    REFUSED,
    Reading,
    below,
    explains_little,
    is_tower,
    owned_keys,
    prefixes_to_try,
)
from keymap.source.settings import Settings
from keymap.source.unwrap import Unwrapped, part, unwrap, with_nested

__all__ = ["open_in_each", "open_source", "open_tree", "open_under_one_hub"]


def open_source(path: PathLike, weights_only: bool, asked: Asked, wrapper: str | None) -> Opened:
    """Open a checkpoint: choose its file, read it, unwrap its state dict and detect its format.

    Args:
        path: a checkpoint file, an index of shards, or a folder.
        weights_only: see `open_checkpoint`.
        asked: the mappings, and the name of the format if the caller gives it.
        wrapper: dotted path of the wanted state dict in the file, or None.

    Raises:
        CheckpointError: the file cannot be read, or has no state dict.
    """
    return open_in_each(path, weights_only, [asked], wrapper)[0]


def open_under_one_hub(paths: Sequence[tuple[PathLike, str | None]], weights_only: bool) -> list[Opened] | None:
    """Checkpoints of which the caller says nothing, opened under the first hub that has formats for all of them.

    Args:
        paths: each with the dotted path of the wanted state dict in it, or None.
        weights_only: see `open_checkpoint`.
    """
    asked = ask_each()
    each = zip(*(_opened_in_each(path, weights_only, asked, wrapper) for path, wrapper in paths), strict=True)
    return next((list(opened) for opened in each if all(one.top[0].found is not None for one in opened)), None)


def open_in_each(path: PathLike, weights_only: bool, asked: Sequence[Asked], wrapper: str | None) -> list[Opened]:
    """A checkpoint, opened under each of several hubs; it is read once. See `open_source`."""
    return list(_opened_in_each(path, weights_only, asked, wrapper))


def _opened_in_each(
    path: PathLike, weights_only: bool, asked: Sequence[Asked], wrapper: str | None
) -> Iterator[Opened]:
    """As `open_in_each`, each when it is asked for."""
    text = path_text(path, CheckpointError, "pass the path of a checkpoint file or of a folder")
    file_path = Path(text)
    checkpoints: dict[tuple[Path, ...], Checkpoint] = {}
    for one in asked:
        known = one.known
        refuse_hub_id(file_path, text, {name for entry in known.configurations for name in entry.names})
        choice = Choice((file_path,), ())
        if os.path.isdir(file_path):  # without permission this is False, not an error
            choice = choose_file(file_path, known.containers)
        else:
            refuse_part(file_path, known.containers)
        files = choice.files
        if files not in checkpoints:
            is_one = len(files) == 1
            checkpoints[files] = open_checkpoint(files[0], weights_only) if is_one else open_shards(files, weights_only)
        checkpoint = checkpoints[files]
        notes = (*choice.notes, *checkpoint.notes)
        yield _Reader(known, one.mapping, checkpoint, notes, own=one.own).opened(wrapper)


def open_tree(asked: Asked, tree: Mapping[str, Any], wrapper: str | None, facts: Mapping[str, int]) -> Opened:
    """A state dict in memory, unwrapped and detected as that of a file is.

    Args:
        asked: the mappings, and the name of its format if the caller gives it.
        tree: tensors by key.
        wrapper: dotted path of the wanted state dict, or None.
        facts: settings that aliases may need.

    Raises:
        CheckpointError: there is no state dict.
    """
    checkpoint = Checkpoint(Path("the state dict"), "", tree, {})
    return _Reader(asked.known, asked.mapping, checkpoint, (), facts, asked.own).opened(wrapper)


class _Read:
    """The readings that a search has made, by where in the state dict."""

    def __init__(self) -> None:
        self._owned: list[tuple[str, set[str]]] = []
        self._whole: set[tuple[str, str]] = set()
        self._alone: set[tuple[str, str]] = set()

    def add(self, prefix: str, readings: Iterable[Source], owners: Iterable[Source]) -> None:
        """Note the readings below a prefix, and the keys that the formats of ``owners`` name."""
        for source in readings:
            if source.found is not None:
                (self._alone if source.alone else self._whole).add((source.found.mapping.name, prefix))
        for source in owners:
            if source.found is not None:
                self._owned.append((prefix, owned_keys(source.found.mapping, source.found.tensors)))

    def explains(self, prefix: str, inside: Sequence[str]) -> bool:
        """Whether a reading above a prefix names more than half of the keys below it."""
        return any(
            2 * len(names.intersection(inside)) > len(inside)
            for outer, names in self._owned
            if prefix != outer and prefix.startswith(outer)
        )

    def others(self, prefix: str, to_try: Iterable[Reading]) -> set[Reading]:
        """Readings that are not made yet: a tower without its prefix is the one that a reading above has with it."""
        return {
            (name, root)
            for name, root in to_try
            if (name, prefix) not in self._alone
            and not (root and prefix.endswith(root) and (name, prefix.removesuffix(root)) in self._whole)
        }


@dataclass(frozen=True, eq=False, repr=False)
class _Reader:
    """Makes the sources of one checkpoint."""

    known: Catalogue
    wanted: str | None
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    facts: Mapping[str, int] = field(default_factory=dict)
    own: Collection[str] = ()
    refused: list[tuple[Source, DetectionError]] = field(default_factory=list)

    @property
    def file(self) -> str:
        return str(self.checkpoint.path)

    def opened(self, wrapper: str | None) -> Opened:
        unwrapped = unwrap(self.checkpoint.tree, self.known.containers, self.file, wrapper, self.is_known)
        top = self.readings(unwrapped)
        if len(top) == 1 and top[0].found is not None and explains_little(top[0].found.mapping, top[0].found.tensors):
            top = self.towers_alone(unwrapped, top[0].found) or top
        search = partial(self.inner, unwrapped, top, everywhere=wrapper is None)
        elsewhere = partial(self.elsewhere, unwrapped)
        return Opened(self.known, self.file, top, wrapper is not None, self.wanted is not None, search, elsewhere)

    def is_known(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether these keys, before a prefix is stripped, are the model's or those of a format."""
        if 2 * sum(key in tensors for key in self.own) > len(tensors):
            return True
        layouts = layouts_of(tensors)
        for mapping in [self.known.get(self.wanted)] if self.wanted is not None else self.known.detectable:
            fits = not explains_little(mapping, layouts) if mapping.by_name else claim(mapping, layouts, self.facts)
            if fits:
                return True
        return False

    def readings(self, unwrapped: Unwrapped) -> tuple[Source, ...]:
        """One Source for each format that matches a state dict; or one without a format."""
        layouts = layouts_of(unwrapped.tensors, unwrapped.start)
        refused = True
        try:
            self.check(unwrapped, layouts)
            refused = False
            found = claims(self.known, layouts, self.wanted, self.facts, self.file)
        except DetectionError as error:
            return (self.source(unwrapped, None)._replace(refusal=error, refused=refused),)
        return tuple(self.source(unwrapped, detection) for detection in self.by_configuration(found))

    def towers_alone(self, unwrapped: Unwrapped, found: Detection) -> tuple[Source, ...]:
        """The readings of a state dict as a tower without its prefix that explain more of it than a format does."""
        to_try = prefixes_to_try(self.known, sorted(unwrapped.tensors), self.wanted).get(unwrapped.start, set())
        layouts = layouts_of(unwrapped.tensors, unwrapped.start)
        alone = self.group_of(unwrapped, layouts, to_try, alone_only=True)
        explained = len(owned_keys(found.mapping, found.tensors))
        return tuple(s for s in alone if s.found and len(owned_keys(s.found.mapping, s.found.tensors)) > explained)

    @cached_property
    def leaves(self) -> Mapping[str, Any]:
        """All values of the file by dotted names."""
        return everything(self.checkpoint.tree, self.known.containers)

    def elsewhere(self, unwrapped: Unwrapped) -> list[str]:
        """The names of the tensors of the file that are not in a state dict; the state of an optimizer is none."""
        own = {id(tensor) for held in (unwrapped.tensors, unwrapped.stored or {}) for tensor in held.values()}
        containers = self.known.containers
        return [
            name
            for name, leaf in self.leaves.items()
            if isinstance(leaf, LazyTensor) and id(leaf) not in own and not training(name, containers)
        ]

    def is_whole(self, unwrapped: Unwrapped) -> bool:
        """Whether a state dict is all that the file holds."""
        held = unwrapped.tensors if unwrapped.stored is None else unwrapped.stored
        return not (unwrapped.path or unwrapped.start) and len(held) == len(self.checkpoint.tree)

    @cached_property
    def adapters(self) -> Mapping[str, str]:
        """The keys of the file by which a mapping refuses it even if they lie elsewhere, and why."""
        found: dict[str, str] = {}
        text = "\n".join(self.leaves)
        for mapping in self.known.mappings.values():
            for refusal in (refusal for refusal in mapping.refuse if refusal.elsewhere):
                for fragment in (fragment for fragment in refusal.contains if fragment in text):
                    found |= {key: refusal.why for key in self.leaves if fragment in key}
        return found

    def check(self, unwrapped: Unwrapped, layouts: Mapping[str, Layout]) -> None:
        """Raise DetectionError if a mapping refuses the state dict, or if its weights are quantized."""
        check_refused(self.known, layouts, self.wanted, self.file)
        if not self.is_whole(unwrapped) and self.adapters:
            refuse_adapters(layouts, self.adapters, self.leaves.keys(), self.file)
        if any(map(is_float8, {layout.dtype for layout in layouts.values()})):
            own = {id(tensor) for tensor in unwrapped.tensors.values()}
            outside = {key: getattr(leaf, "shape", ()) for key, leaf in self.leaves.items() if id(leaf) not in own}
            outside |= dict.fromkeys(self.checkpoint.metadata, ())
            refuse_scaled_float8(self.known, layouts, outside, self.file)

    def by_configuration(self, found: list[Detection]) -> list[Detection]:
        """Of several formats those that the configuration names, if it names any."""
        if len(found) < 2 or not self.checkpoint.container:
            return found
        configs = [(detection, detection.mapping.config) for detection in found]
        named = [
            detection
            for detection, config in configs
            if config is not None
            and is_model_type(model_type(self.checkpoint.path, self.checkpoint.metadata, config), config)
        ]
        return named or found

    def source(self, unwrapped: Unwrapped, found: Detection | None) -> Source:
        settings, checkpoint = Settings(), self.checkpoint
        if found is not None and checkpoint.container:
            path, metadata, tree = checkpoint.path, checkpoint.metadata, checkpoint.tree
            settings = read_config(path, metadata, found.mapping, self.known.hub, tree, found.tensors)
        return Source(
            self.known,
            self.file,
            checkpoint.container,
            unwrapped,
            found,
            settings,
            self.notes,
            metadata=checkpoint.metadata,
        )

    def inner(self, unwrapped: Unwrapped, top: tuple[Source, ...], everywhere: bool) -> Found:
        """See `Opened.inner`; with ``everywhere`` the rest of the file is searched if the state dict holds nothing."""
        containers = self.known.containers
        state_dict = with_nested(
            self.checkpoint.tree, unwrapped, containers, self.file, from_root=False, known=self.is_known
        )
        if unwrapped.start:  # a part of a state dict is searched alone: the caller chose it
            return self.search(unwrapped, top, tried=True)._replace(searched=state_dict)
        found = self.search(state_dict, top, tried=state_dict is unwrapped)
        if not found.groups and everywhere:
            everything = with_nested(
                self.checkpoint.tree, unwrapped, containers, self.file, from_root=True, known=self.is_known
            )
            if everything is not unwrapped:
                found = self.search(everything, (), tried=False)
        return found

    def search(self, state_dict: Unwrapped, top: tuple[Source, ...], tried: bool) -> Found:
        """The state dicts within one, outermost first; those that an outer one's format explains are left out.

        Args:
            state_dict: to be searched.
            top: its readings.
            tried: ``top`` are the readings of all its tensors, and not only of those outside nested dicts.
        """
        keys = sorted(state_dict.tensors)
        start, read = state_dict.start, _Read()
        read.add(start, top, top)
        groups: list[tuple[Source, ...]] = []
        to_try = prefixes_to_try(self.known, keys, self.wanted)
        for prefix in sorted(to_try, key=len):
            if not prefix.startswith(start) or training(prefix, self.known.containers):
                continue
            inside = below(prefix, keys)
            if read.explains(prefix, inside):
                continue
            at_top = prefix == start
            unwrapped = state_dict if at_top else part(state_dict, prefix, self.known.containers, inside, self.is_known)
            if unwrapped.start != prefix and not at_top:
                continue  # the longer prefix is in the table, too
            group = self.group(unwrapped, read.others(prefix, to_try[prefix]), alone_only=at_top and tried)
            if group:
                groups.append(group)
                read.add(prefix, group, group[:1])
        return Found(state_dict, tuple(groups), self.refused)

    def group(self, unwrapped: Unwrapped, to_try: set[Reading], alone_only: bool) -> tuple[Source, ...]:
        """The readings of a state dict: as whole models first, then as towers without their prefix."""
        layouts = layouts_of(unwrapped.tensors, unwrapped.start)
        readings = self.group_of(unwrapped, layouts, to_try, alone_only)
        try:
            self.check(unwrapped, layouts)
        except DetectionError as error:
            self.refused.append((readings[0] if readings else self.source(unwrapped, None), error))
            return ()
        return readings

    def group_of(
        self, unwrapped: Unwrapped, layouts: Mapping[str, Layout], to_try: set[Reading], alone_only: bool
    ) -> tuple[Source, ...]:
        """See `group`; whether a mapping refuses the state dict is not looked at."""
        found: dict[str, Source] = {}
        for name, root in sorted(to_try - {REFUSED}, key=lambda reading: reading[1]):
            if name in found or (alone_only and not root):
                continue
            renamed = {root + key: layout for key, layout in layouts.items()} if root else layouts
            detection = claim(self.known.get(name), renamed, self.facts)
            if detection is not None and is_tower(detection.mapping, detection.tensors):
                found[name] = self.source(unwrapped, detection)._replace(alone=bool(root))
        return tuple(found.values())
