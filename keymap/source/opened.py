"""A checkpoint, opened: its state dict in each reading, and on demand the state dicts within it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from keymap.errors import DetectionError, some
from keymap.language.format import Format
from keymap.language.layout import Layout, whole
from keymap.read import LazyTensor
from keymap.source.detect import Detection
from keymap.source.registry import Catalogue
from keymap.source.search import shared_starts
from keymap.source.settings import Settings
from keymap.source.unwrap import Unwrapped, with_above

__all__ = ["Found", "Opened", "Source", "layouts_of"]


class Source(NamedTuple):
    """One reading of one state dict of a checkpoint.

    Attributes:
        known: all known mappings.
        file, container: the file that was read, and its kind.
        unwrapped: its tensors.
        found: its format; None if no format matches, and ``refusal`` says why.
        settings: the settings that its configuration states.
        notes: which file of a folder was chosen, and why.
        refusal: why no format matches.
        refused: a mapping refuses the file by name.
        alone: it is a tower without the prefix that its format has.
        metadata: strings that the container holds beside the tensors.
    """

    known: Catalogue
    file: str
    container: str
    unwrapped: Unwrapped
    found: Detection | None
    settings: Settings
    notes: tuple[str, ...] = ()
    refusal: DetectionError | None = None
    refused: bool = False
    alone: bool = False
    metadata: Mapping[str, str] = {}


class Found(NamedTuple):
    """What a search found: the state dict that was searched, the readings of each within it, and what is refused."""

    searched: Unwrapped
    groups: tuple[tuple[Source, ...], ...]
    refused: Sequence[tuple[Source, DetectionError]] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Opened:
    """A checkpoint, read: its state dict, and on demand the state dicts within it.

    Attributes:
        known: all known mappings.
        file: the file that was read.
        top: the readings of the state dict, one for each format that matches it; or one Source without a format.
        chosen: the caller chose the state dict with ``wrapper=``.
        named: the caller chose the format with ``mapping=``.
    """

    known: Catalogue
    file: str
    top: tuple[Source, ...]
    chosen: bool
    named: bool
    _search: Callable[[], Found] = field(repr=False)
    _elsewhere: Callable[[], list[str]] = field(repr=False)

    @cached_property
    def elsewhere(self) -> Sequence[str]:
        """The dotted names of the tensors in the file that are not in the state dict."""
        return self._elsewhere()

    @cached_property
    def _found(self) -> Found:
        return self._search()

    @property
    def inner(self) -> tuple[tuple[Source, ...], ...]:
        """The state dicts within the state dict, each with its readings, the most likely one first.

        A tower that was saved without its prefix is among them: it is a reading of the state dict itself.
        """
        return self._found.groups

    @property
    def refused(self) -> Sequence[tuple[Source, DetectionError]]:
        """State dicts within it that a mapping refuses by name, read as if it did not."""
        return self._found.refused

    @property
    def searched(self) -> Mapping[str, LazyTensor]:
        """The tensors of the state dict that was searched."""
        return self._found.searched.tensors

    @property
    def found_inside(self) -> tuple[tuple[Source, ...], ...]:
        """`inner`, if the file was searched; a file that fits at the first attempt is not."""
        return self._found.groups if "_found" in self.__dict__ else ()

    def beside(self, towers: Collection[str], prefixes: Sequence[str]) -> Source | None:
        """The tensors of small towers, such as a scale, that lie beside state dicts or above them.

        Args:
            towers: names of the hub's towers.
            prefixes: of the state dicts; the longest prefix that all of them share is looked at first.
        """
        hub, base = self.known.hub, self.searched
        for start in shared_starts(prefixes):
            keys = [key for key in base if key.startswith(start) and _tower(hub, key[len(start) :]) in towers]
            if keys:
                tensors = {key: base[key] for key in keys}
                layouts = {key[len(start) :]: whole(key, t.shape, t.dtype) for key, t in tensors.items()}
                found = Detection(hub, layouts, tuple(keys), (), ())
                unwrapped = self._found.searched._replace(tensors=tensors, start=start, notes=())
                return self.top[0]._replace(unwrapped=unwrapped, found=found, settings=Settings(), refusal=None)
        return None

    def beside_own(self, wanted: Mapping[str, tuple[int, ...]], prefixes: Sequence[str]) -> Mapping[str, LazyTensor]:
        """Tensors of these names and shapes that lie beside state dicts or above them, by their keys in the file.

        Args:
            wanted: shapes by name; all of them must be there.
            prefixes: of the state dicts, as for `beside`.
        """
        base = self.searched
        for start in shared_starts(prefixes):
            found = {start + name: base[start + name] for name in wanted if start + name in base}
            if len(found) == len(wanted) and all(found[start + name].shape == wanted[name] for name in wanted):
                return found
        return {}

    def with_above(self, source: Source, wanted: Mapping[str, tuple[int, ...]]) -> Source | None:
        """A reading with tensors that lie above its state dict, as an output layer above a language model.

        Args:
            source: a reading of a state dict within the one that was searched.
            wanted: shapes by name. Those that it lacks, and that one place above it has, are taken.

        Returns:
            None if there is none of them.
        """
        found, base, start = source.found, self.searched, source.unwrapped.start
        if found is None:
            return None
        above = [place for place in shared_starts([start]) if place != start]
        places = {name: [at + name for at in above if at + name in base] for name in wanted.keys() - found.tensors}
        taken = {n: keys[0] for n, keys in places.items() if len(keys) == 1 and base[keys[0]].shape == wanted[n]}
        return self._joined(source, found, taken) if taken else None

    def with_heads(self, source: Source) -> Source:
        """The reading that the caller chose with ``wrapper=``, with heads of the hub that lie above it.

        A head that lies in several places, or does not take what the model computes, is left out with a note.
        """
        found, hub = source.found, self.known.hub
        start = source.unwrapped.start
        if not (self.chosen and start and hub.heads) or found is None or found.mapping is not hub:
            return source
        places = self._heads_above(start, found)
        widths = {layout.shape[-1] for layout in found.tensors.values() if len(layout.shape) == 1}
        fits = {n: keys[0] for n, keys in places.items() if len(keys) == 1 and _takes(self.searched[keys[0]], widths)}
        lost = [key for name, keys in places.items() if name not in fits for key in keys]
        joined = self._joined(source, found, fits) if fits else source
        if not lost:
            return joined
        note = f"left out: {some(lost)} above {source.unwrapped.wrapper!r}: not one place, or not of the model's width"
        return joined._replace(unwrapped=joined.unwrapped._replace(notes=(note, *joined.unwrapped.notes)))

    def _heads_above(self, start: str, found: Detection) -> dict[str, list[str]]:
        """The keys above a state dict of each head of the hub that it lacks, by the head's name."""
        places: dict[str, list[str]] = {}
        for place in shared_starts([start])[1:]:
            for key in (key for key in self.searched if key.startswith(place) and not key.startswith(start)):
                name = key[len(place) :]
                if name not in found.tensors and any(side.match(name) is not None for side in self.known.hub.heads):
                    places.setdefault(name, []).append(key)
        return places

    def _joined(self, source: Source, found: Detection, taken: Mapping[str, str]) -> Source:
        """A reading with more tensors, by their names and their keys in the state dict that was searched."""
        base = self.searched
        more = {name: whole(key, base[key].shape, base[key].dtype) for name, key in taken.items()}
        stored = {**found.stored, **more} if found.stored else found.stored
        unwrapped = with_above(source.unwrapped, self._found.searched, sorted(taken.values()))
        return source._replace(
            unwrapped=unwrapped, found=found._replace(tensors={**found.tensors, **more}, stored=stored)
        )


def _takes(head: LazyTensor, widths: Collection[int]) -> bool:
    """Whether a head takes vectors as long as some in the model; a bias takes any."""
    return len(head.shape) < 2 or head.shape[-1] in widths


def _tower(hub: Format, key: str) -> str:
    found = hub.table.find(key)
    return found[0].tower if found is not None else ""


def layouts_of(tensors: Mapping[str, LazyTensor], start: str = "") -> dict[str, Layout]:
    """The layout of each tensor, its own elements in their order, by its key without ``start``."""
    if not start:
        return {key: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}
    return {key[len(start) :]: whole(key, lazy.shape, lazy.dtype) for key, lazy in tensors.items()}
