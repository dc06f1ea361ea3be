"""A plan as a picture: keys on two sides by tower, equal layers folded, and a ribbon for each source of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch

from keymap.errors import count_of
from keymap.language.layout import Piece
from keymap.picture.fold import Layers, Node, fold, ranges
from keymap.plan.plan import Entry, Plan, dtype_name, makers_of, steps_to
from keymap.plan.to_hub import tower_of
from keymap.source.registry import registry

__all__ = ["KINDS", "Leaf", "Link", "Listing", "Picture", "Section", "picture_of", "plain"]

KINDS = {  # the kinds of a ribbon; of several kinds the first one here is the ribbon's colour
    "resize": "resampled to another number of positions",
    "compute": "multiplied, shifted or added to another tensor",
    "concat": "joined with other tensors",
    "split": "a part of a tensor of the file",
    "transpose": "axes or elements in another order",
    "reshape": "the same elements in another shape",
    "rename": "another name",
    "copy": "the same name",
    "fill": "a constant, because the file lacks the key",
    "drop": "holds no weights that the model needs",
    "mismatch": "the tensor does not fit",
    "missing": "no key of the file fills it",
    "unexpected": "no key of the model takes it",
    "unused": "not part of this load",
}
_NOWHERE = "not loaded"  # the section of the file's keys that fill nothing
_NO_TOWER = "other"

Shape = tuple[int, ...]
Stored = tuple[Shape, torch.dtype]


class Leaf(NamedTuple):
    """One key of the file or of the model; without a shape where none is known."""

    key: str
    shape: Shape | None
    dtype: str


class Link(NamedTuple):
    """One ribbon.

    Attributes:
        source, target: numbers of the section's keys; -1 for none.
        kinds: keys of `KINDS`, the first one gives the colour.
        rules: the text and the place ``file:line:column`` of each rule that was applied.
        elements: how many elements it shows.
        note: further words: how a tensor is resized, filled or cast, or why it is dropped.
    """

    source: int
    target: int
    kinds: tuple[str, ...]
    rules: tuple[tuple[str, str], ...] = ()
    elements: int = 1
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One tower: its keys in the file and in the model, the ribbons between them, and both sides folded."""

    title: str
    sources: tuple[Leaf, ...]
    targets: tuple[Leaf, ...]
    links: tuple[Link, ...]
    left: tuple[Node, ...]
    right: tuple[Node, ...]


class Listing(NamedTuple):
    """A list below the picture: keys (or an empty text) with what is to be said of each."""

    name: str
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """What a page shows.

    Attributes:
        title, about: of the page.
        sample: the shapes are made up from the rules of a format; there may be any number of layers.
        sections: one for each tower.
        lists: resized, filled, cast, dropped, missing keys and so on; empty ones are left out.
    """

    title: str
    about: str
    sample: bool
    sections: tuple[Section, ...]
    lists: tuple[Listing, ...]


def picture_of(plan: Plan) -> Picture:
    """The picture of a plan."""
    about = f"{plan.file}: format {plan.format} ({plan.container}), {plan.title}"
    return Picture(f"{plan.format} into the model", about, False, sections_of(plan), tuple(_lists(plan)))


# --- sections ------------------------------------------------------------------------------------------------


def sections_of(plan: Plan) -> tuple[Section, ...]:
    """One section for each tower, in the order of the plan, and one for the file's keys that fill nothing."""
    drafts: dict[str, _Draft] = {}
    makers = makers_of(plan.steps)
    for entry in plan.entries:
        draft = drafts.setdefault(entry.tower or _NO_TOWER, _Draft(plan.sources))
        rules = tuple(dict.fromkeys((rule.text, rule.place) for rule, _, _ in steps_to(entry.key, makers)))
        draft.enter(entry, rules[::-1])
    hub = registry(plan.hub).hub
    for key, why in {**dict.fromkeys(plan.missing_keys, ""), **plan.mismatched}.items():
        draft = drafts.setdefault(tower_of(hub, key) or _NO_TOWER, _Draft(plan.sources))
        kind = "mismatch" if key in plan.mismatched else "missing"
        draft.links.append(Link(-1, draft.target(Leaf(key, None, "")), (kind,), note=why))
    used = {source for entry in plan.entries for source in entry.layout.sources}
    unexpected = set(plan.unexpected_keys)
    rest = _Draft(plan.sources)
    for key in dict.fromkeys((*plan.sources, *plan.dropped, *plan.unexpected_keys)):
        if key in used:
            continue
        kind = "drop" if key in plan.dropped else "unexpected" if key in unexpected else "unused"
        elements = prod(plan.sources[key][0]) if key in plan.sources else 1
        rest.links.append(Link(rest.source(key), -1, (kind,), elements=elements, note=plan.dropped.get(key, "")))
    if rest.links:
        drafts[_NOWHERE] = rest
    return tuple(draft.section(title) for title, draft in drafts.items())


class _Draft:
    """A section while it is made."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self.sources: dict[str, tuple[int, Leaf]] = {}
        self.targets: list[Leaf] = []
        self.links: list[Link] = []

    def source(self, key: str) -> int:
        """The number of a key of the file."""
        if key not in self.sources:
            found = self.stored.get(key)
            leaf = Leaf(key, found[0], dtype_name(found[1])) if found is not None else Leaf(key, None, "")
            self.sources[key] = (len(self.sources), leaf)
        return self.sources[key][0]

    def target(self, leaf: Leaf) -> int:
        self.targets.append(leaf)
        return len(self.targets) - 1

    def enter(self, entry: Entry, rules: tuple[tuple[str, str], ...]) -> None:
        """The ribbons of one tensor of the model."""
        number = self.target(Leaf(entry.key, entry.shape, dtype_name(entry.dtype)))
        if entry.filled or not entry.layout.sources:
            note = entry.filled or "a tensor without elements"
            self.links.append(Link(-1, number, ("fill",), rules, prod(entry.shape), note))
            return
        casts = [f"cast from {pair}" for pair in entry.casts]
        resized = [f"resized from {entry.resize}"] if entry.resize is not None else []
        pieces: dict[str, list[Piece]] = {}
        for piece in entry.layout.pieces:
            if piece.source is not None:
                pieces.setdefault(piece.source, []).append(piece)
        common = tuple(_kinds_of_all(entry))
        for source, own in pieces.items():
            kinds = (*common, *_kinds_of_one(entry, own, self.stored.get(source), "concat" in common))
            elements = sum(piece.numel for piece in own)
            name = "copy" if source == entry.key else "rename"
            note = "; ".join((*resized, *casts))
            self.links.append(Link(self.source(source), number, (*kinds, name), rules, elements, note))

    def section(self, title: str) -> Section:
        sources, targets, links = tuple(leaf for _, leaf in self.sources.values()), tuple(self.targets), self.links
        left, right = _alike(sources, targets, links)
        return Section(
            title,
            sources,
            targets,
            tuple(links),
            fold([leaf.key for leaf in sources], left),
            fold([leaf.key for leaf in targets], right),
        )


def _kinds_of_all(entry: Entry) -> Iterator[str]:
    """The kinds of operation that concern a tensor with all of its sources."""
    if entry.resize is not None:
        yield "resize"
    if any(piece.computed for piece in entry.layout.pieces if piece.source is not None):
        yield "compute"
    if len({piece.source for piece in entry.layout.pieces if not piece.add}) > 1:
        yield "concat"


def _kinds_of_one(entry: Entry, pieces: Sequence[Piece], stored: Stored | None, joined: bool) -> Iterator[str]:
    """The kinds of operation that one source of a tensor goes through.

    Args:
        entry: the tensor.
        pieces: those of the source.
        stored: the source's shape.
        joined: there are other sources.
    """
    part = stored is not None and sum(piece.numel for piece in pieces) < prod(stored[0])
    moved = _reordered(pieces)
    if part:
        yield "split"
    if moved:
        yield "transpose"
    if stored is not None and not (joined or part or moved) and stored[0] != entry.layout.shape:
        yield "reshape"


def _reordered(pieces: Sequence[Piece]) -> bool:
    """True where the elements come in another order than in the source."""
    end = -1
    for piece in sorted(pieces, key=lambda piece: piece.target_offset):
        if piece.source_offset < end or any(
            outer < inner for outer, inner in zip(piece.source_strides, piece.source_strides[1:], strict=False)
        ):
            return True
        end = piece.source_offset
    return False


def _alike(sources: Sequence[Leaf], targets: Sequence[Leaf], links: Iterable[Link]) -> tuple[list[int], list[int]]:
    """A number for each source and each target: equal for those of equal shapes, rules and operations."""
    left: list[list[object]] = [[leaf.shape, leaf.dtype] for leaf in sources]
    right: list[list[object]] = [[leaf.shape, leaf.dtype] for leaf in targets]
    for link in links:
        treated = link[2:]
        if link.source >= 0:
            other = targets[link.target].shape if link.target >= 0 else None
            left[link.source].append((*treated, other))
        if link.target >= 0:
            other = sources[link.source].shape if link.source >= 0 else None
            right[link.target].append((*treated, other))
    numbers: dict[tuple[object, ...], int] = {}
    return (
        [numbers.setdefault(tuple(one), len(numbers)) for one in left],
        [numbers.setdefault(tuple(one), len(numbers)) for one in right],
    )


# --- lists ---------------------------------------------------------------------------------------------------


def _lists(plan: Plan) -> Iterator[Listing]:
    counted = {pair: count_of(count, "tensor") for pair, count in plan.cast.items()}
    entries: Mapping[str, Mapping[str, str] | Sequence[str]] = {
        "warnings": plan.warnings,
        "resized": plan.resized,
        "filled": plan.filled,
        "cast": counted,
        "dropped": plan.dropped,
        "missing": dict.fromkeys(plan.missing_keys, ""),
        "unexpected": dict.fromkeys(plan.unexpected_keys, ""),
        "mismatched": plan.mismatched,
        "notes": plan.notes,
        "not verified": plan.unverified,
    }
    for name, found in entries.items():
        pairs = found.items() if isinstance(found, Mapping) else [("", text) for text in found]
        if pairs:
            yield Listing(name, tuple(pairs))


# --- plain data ----------------------------------------------------------------------------------------------


def plain(picture: Picture) -> dict[str, Any]:
    """The picture as JSON can hold it: names in which nothing is invisible, and rules and notes by number."""
    rules: dict[tuple[str, str], int] = {}
    chains: dict[tuple[int, ...], int] = {}
    notes: dict[str, int] = {"": 0}

    def link(one: Link) -> list[object]:
        chain = tuple(rules.setdefault(rule, len(rules)) for rule in one.rules)
        kinds = [list(KINDS).index(kind) for kind in one.kinds]
        note = notes.setdefault(one.note, len(notes))
        return [one.source, one.target, kinds, chains.setdefault(chain, len(chains)), one.elements, note]

    sections = [
        {
            "title": shown(section.title),
            "sources": [_leaf(leaf) for leaf in section.sources],
            "targets": [_leaf(leaf) for leaf in section.targets],
            "links": [link(one) for one in section.links],
            "left": [_node(node) for node in section.left],
            "right": [_node(node) for node in section.right],
        }
        for section in picture.sections
    ]
    return {
        "title": shown(picture.title),
        "about": shown(picture.about),
        "sample": picture.sample,
        "kinds": list(KINDS.items()),
        "sections": sections,
        "rules": [[shown(text), shown(place)] for text, place in rules],
        "chains": list(chains),
        "notes": [shown(note) for note in notes],
        "lists": [[name, [[shown(key), shown(text)] for key, text in entries]] for name, entries in picture.lists],
    }


def shown(text: str) -> str:
    """A text with every character that prints nothing, or that changes the order of others, as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _leaf(leaf: Leaf) -> list[object]:
    return [shown(leaf.key), list(leaf.shape) if leaf.shape is not None else None, leaf.dtype]


def _node(node: Node) -> int | dict[str, object]:
    if not isinstance(node, Layers):
        return node
    rows = [[shown(row.suffix), row.leaves] for row in node.rows]
    return {"prefix": shown(node.prefix), "range": ranges(node.indices), "count": len(node.indices), "rows": rows}


def without_shapes(section: Section) -> Section:
    """The section without the shapes of tensors that are only renamed, for shapes that are made up."""
    sources, targets = set[int](), set[int]()
    for link in section.links:
        if link.kinds[0] not in ("rename", "copy"):
            sources.add(link.source)
            targets.add(link.target)

    def cleared(leaves: Sequence[Leaf], kept: set[int]) -> tuple[Leaf, ...]:
        return tuple(Leaf(leaf.key, leaf.shape if n in kept else None, "") for n, leaf in enumerate(leaves))

    return replace(section, sources=cleared(section.sources, sources), targets=cleared(section.targets, targets))
