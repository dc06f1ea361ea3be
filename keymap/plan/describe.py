"""What a set of the hub's keys is: towers, widths, layers; and which recorded model configurations fit it.

A *fingerprint* of a tower is a digest of its keys and shapes, without position embeddings (they are resized), scalars,
derived buffers and keys whose absence means a value. Equal fingerprints load into each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from keymap.errors import some
from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Configuration, Format, Scalar
from keymap.language.layout import Layout
from keymap.plan.to_hub import to_hub, tower_of
from keymap.source.detect import tower_layout
from keymap.source.opened import Opened, Source
from keymap.source.search import owned_keys
from keymap.source.settings import measured_size

__all__ = [
    "Described",
    "FoundTower",
    "Tower",
    "by_likeness",
    "configurations_for",
    "describe",
    "difference",
    "found_towers",
    "in_words",
    "recorded_facts",
    "text_of",
]


class Tower(NamedTuple):
    """One tower of a file or of a model.

    Attributes:
        layout: how its keys are named; ``canonical`` is the first of the hub's layouts that bridges lead to
            and back from.
        sizes: lengths that its shapes show, by the hub's names for them.
        fingerprint: of its canonical keys and shapes.
        uneven: True where its blocks differ in their shapes.
    """

    layout: str
    canonical: str
    sizes: Mapping[str, int]
    fingerprint: str
    uneven: bool

    def __str__(self) -> str:
        facts = [f"{name} {size}" for name, size in self.sizes.items()]
        facts += ["blocks of different sizes, as in a pruned model"] if self.uneven else []
        return f"{self.layout} ({', '.join(facts)})" if facts else self.layout

    def same_sizes(self, other: Tower) -> bool:
        """True where the sizes that both show are equal, apart from the number of positions."""
        sizes, others = ({k: v for k, v in t.sizes.items() if k != "positions"} for t in (self, other))
        shared = sizes.keys() & others.keys()
        return self.canonical == other.canonical and all(sizes[k] == others[k] for k in shared) and not self.uneven


Described = Mapping[str, Tower]  # by the tower's name


class FoundTower(NamedTuple):
    """A tower somewhere in a file.

    Attributes:
        prefix: what its keys in the file begin with, before the names that the format has; ``wrapper=`` takes it.
        format: of its state dict.
        tower: for example ``image``.
        layout: how its keys are named.
        sizes: lengths that its shapes show, by the hub's names for them.
        configurations: names of model configurations whose tower it fits.
        hub: the hub that the format belongs to.
    """

    prefix: str
    format: str
    tower: str
    layout: str
    sizes: Mapping[str, int]
    configurations: tuple[str, ...]
    hub: str = ""


def in_words(towers: Described) -> str:
    """One phrase for all towers."""
    return "; ".join(f"{name} tower {tower}" for name, tower in towers.items()) or "no known tower"


def describe(known: Catalogue, layouts: Mapping[str, Layout]) -> Described:
    """The towers that these keys of the hub make up."""
    hub = known.hub
    towers = {}
    for name in hub.layouts:
        layout = tower_layout(hub, name, layouts)
        if layout is None:
            continue
        keys = {key: tensor for key, tensor in layouts.items() if tower_of(hub, key) == name}
        measured = {size: measured_size(ways, keys) for size, ways in hub.measures.get(name, {}).items()}
        sizes = {size: length for size, length in measured.items() if length}
        canonical, bridged = _canonical(known, name, layout, keys)
        towers[name] = Tower(layout, canonical, sizes, _fingerprint(hub, bridged), _uneven(hub, name, keys))
    return towers


def found_towers(opened: Opened) -> tuple[FoundTower, ...]:
    """Every tower of a file: those of the state dict itself, and those of the state dicts within it."""
    top = [source for source in opened.top if source.found is not None]
    inside = [group[0] for group in opened.inner if not top or not group[0].alone or group[0].unwrapped.outside]
    found = []
    hub = opened.known.hub.name
    for source in (*top, *inside):
        assert source.found is not None, "sources without a format are left out"
        for name, tower in describe(opened.known, to_hub(source.found, source.settings.numbers).tensors).items():
            names = tuple(configurations_for(opened.known, {name: tower}))
            prefix = source.unwrapped.wrapper
            found.append(FoundTower(prefix, source.found.mapping.name, name, tower.layout, tower.sizes, names, hub))
    return tuple(found)


def by_likeness(opened: Sequence[Opened]) -> list[Opened]:
    """Of a file opened under each of several hubs those that find something in it, the likeliest first.

    A hub whose format is that of the file goes before one that only finds state dicts within it, and one whose format
    names more of the keys before another. If none finds anything, the first.
    """
    found = [one for one in opened if any(source.found is not None for source in one.top)]
    if len(found) > 1:
        found.sort(key=lambda one: -max(_explained(source) for source in one.top))
    whole = set(map(id, found))
    found += [one for one in opened if id(one) not in whole and one.inner]
    return found or list(opened[:1])


def _explained(source: Source) -> int:
    """How many keys the rules of the format name."""
    return len(owned_keys(source.found.mapping, source.found.tensors)) if source.found is not None else 0


def text_of(opened: Opened) -> str:
    """The format of a file under another hub, for a note."""
    hub = opened.known.hub.name
    sources = [source.found for source in opened.top] if opened.top[0].found is not None else []
    sources = sources or [group[0].found for group in opened.inner]
    names = ", ".join(dict.fromkeys(found.mapping.name for found in sources if found is not None))
    return f"{names} of hub {hub} (choose with hub={hub!r})"


def difference(known: Catalogue, title: str, file: Described, model: Described) -> str:
    """One sentence where the file's architecture or sizes differ from the model's; empty where they seem equal."""
    fits = configurations_for(known, file)
    alike = all(tower.same_sizes(model[name]) for name, tower in file.items() if name in model)
    if alike and (not fits or fits == configurations_for(known, model)):
        return ""
    names = some(fits, 6) or "none of the known ones"
    return (
        f"the file holds {title}, {in_words(file)}; the model has {in_words(model)}; model configurations that fit the "
        f"file: {names}"
    )


def _canonical(
    known: Catalogue, tower: str, layout: str, keys: Mapping[str, Layout]
) -> tuple[str, Mapping[str, Layout]]:
    """The first of the hub's layouts that a tower can be brought to and back from, and its keys in that layout."""
    for canonical in known.hub.layouts[tower]:
        bridges = known.path(tower, layout, canonical)
        if bridges is None or known.path(tower, canonical, layout) is None:
            continue
        for bridge in bridges:
            keys = apply_rules(bridge.table, keys, {}, pass_others=True).out
        return canonical, keys
    return layout, keys


def _fingerprint(hub: Format, keys: Mapping[str, Layout]) -> str:
    left_out = {*hub.positions, *hub.scalars}
    lines = sorted(
        f"{key} {list(layout.shape)}"
        for key, layout in keys.items()
        if key not in left_out and hub.absent_means.get(key) is None and hub.ignored(key) is None
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def _uneven(hub: Format, tower: str, keys: Mapping[str, Layout]) -> bool:
    """True where the blocks that a measure counts differ in the lengths of their vectors.

    Tables of relative positions may differ: those of blocks that attend within windows are shorter.
    """
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    counted = [side.prefix for ways in hub.measures.get(tower, {}).values() for side, axis in ways if axis is None]
    for prefix in counted:
        for key, layout in keys.items():
            if len(layout.shape) == 1 and key.startswith(prefix):
                shapes.setdefault((prefix, key[len(prefix) :].partition(".")[2]), set()).add(layout.shape)
    return any(len(found) > 1 for found in shapes.values())


def configurations_for(known: Catalogue, towers: Described) -> list[str]:
    """Names of the recorded configurations that all of these towers fit, those with equal positions first."""
    found = [(resized, name) for _, name, resized in _fitting(known, towers)]
    return [f"{name} (positions resized)" if resized else name for resized, name in sorted(found)]


def _fitting(known: Catalogue, towers: Described) -> Iterator[tuple[Configuration, str, bool]]:
    """The recorded configurations that all of these towers fit, and whether their numbers of positions differ."""
    for entry in known.configurations:
        fits = all(entry.fingerprints.get(name) == tower.fingerprint for name, tower in towers.items())
        for configuration, rows in entry.names.items() if fits and towers else ():
            positions = dict(zip(entry.fingerprints, rows, strict=True))
            resized = any(tower.sizes.get("positions", 0) != positions[name] for name, tower in towers.items())
            yield entry, configuration, resized


def recorded_facts(known: Catalogue, towers: Described) -> dict[str, tuple[Scalar, str]]:
    """Facts that no weight shows and on which all recorded configurations of exactly these sizes agree.

    Returns:
        By the hub's name the value, and the names of the configurations.
    """
    same = [(entry.facts.get(name, {}), name) for entry, name, resized in _fitting(known, towers) if not resized]
    names = some([name for _, name in same])
    first = same[0][0] if same else {}
    return {fact: (value, names) for fact, value in first.items() if all(facts.get(fact) == value for facts, _ in same)}
