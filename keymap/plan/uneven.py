"""Keys that some blocks of a file lack and the others have, found by the names alone.

Rules say little of a format whose keys are open, or optional because models differ. A file shows by itself what its
blocks have in common: a layer without a weight that all other layers have, or a missing layer, is no model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from keymap.errors import some
from keymap.language.rules import Fault, RuleTable
from keymap.source.settings import Count

__all__ = ["other_counts", "uneven"]

_INDEX = re.compile(r"(?<=[./_])\d+(?=[./])")
_WORD = re.compile(r"[^./]+")
_LISTED, _MAX = 6, 1000  # keys that a message lists; keys and blocks that are looked for

Blocks = dict[int, set[str]]


def uneven(
    name: str, table: RuleTable, keys: Mapping[str, tuple[int, ...]], towers: Collection[str], optional: Collection[str]
) -> list[Fault]:
    """Faults of the towers whose blocks differ, with the keys that are missing.

    A missing key is one that

    - one block lacks, or up to a quarter of them, and all others have, while the block has nothing in its place, as a
      dense layer among layers with experts has. The first and the last layer may lack a whole module, such as a norm
      or a downsampling;
    - belongs to a module of which the block has the rest, as a bias belongs to its weight;
    - would be in a block whose index is left out, where all blocks are alike.

    Args:
        name: of the format.
        table: its rules; keys that none of them owns do not count.
        keys: of the file, with their shapes.
        towers: that are converted.
        optional: last words of keys that are never missing.
    """
    by_tower: dict[str, dict[str, tuple[int, ...]]] = {}
    stacked = set()  # prefixes of members that make one tensor, such as experts
    for key, shape in keys.items():
        found = table.find(key)
        if found is not None and found[0].tower in towers and key.rpartition(".")[2] not in optional:
            by_tower.setdefault(found[0].tower, {})[key] = shape
            if found[0].join is not None and found[0].join.kind == "stack":
                stacked |= {key[: match.start()] for match in _INDEX.finditer(key)}
    faults = []
    for tower, shapes in by_tower.items():
        blocks: dict[str, Blocks] = {}
        for key in shapes:
            for match in _INDEX.finditer(key):
                start, rest = key[: match.start()], key[match.end() :]
                blocks.setdefault(start, {}).setdefault(int(match[0]), set()).add(rest)
        blocks = {start: members for start, members in blocks.items() if _are_blocks(members)}
        nested = {_INDEX.sub("#", start) for start in blocks}
        lacking = (
            key for start, members in blocks.items() for key in _lacking(start, members, nested, start in stacked)
        )
        missing = [*islice(dict.fromkeys(lacking), _MAX)]
        faults += [Fault(f"{name}: {text}", tower=tower) for text in _contradictions(shapes)]
        if missing:
            text = f"{name}: blocks of the {tower} tower differ; missing keys: {some(dict.fromkeys(missing), _LISTED)}"
            faults.append(Fault(text, tower=tower))
    return faults


def other_counts(keys: Collection[str], counts: Collection[Count]) -> Iterator[tuple[bool, str]]:
    """The numbers of blocks in which the file and its configuration differ: whether the file has fewer, and a text."""
    for count in counts:
        held = sum(count.side.match(key) is not None for key in keys)
        if held and held != count.number:
            yield held < count.number, f"{count.origin} = {count.number}, and the file has {held}"


def _are_blocks(blocks: Blocks) -> bool:
    """Whether indices count blocks, which have modules, and not the parts of one thing."""
    return len({_child(rest) for rests in blocks.values() for rest in rests if len(_WORD.findall(rest)) > 1}) > 1


# blocks within blocks are compared among themselves: there may be more or fewer, and with other modules
def _lacking(start: str, blocks: Blocks, nested: Collection[str], stacked: bool) -> Iterator[str]:
    """The missing keys of the blocks under one prefix; ``nested`` are the prefixes of all blocks, with # as index."""
    if not 2 <= len(blocks) <= _MAX:
        return
    have: dict[str, int] = {}
    for rests in blocks.values():
        for rest in rests:
            if not any(_INDEX.sub("#", f"{start}0{rest[: m.start()]}") in nested for m in _INDEX.finditer(rest)):
                have[rest] = have.get(rest, 0) + 1
    ends = (min(blocks), max(blocks))
    outermost = _INDEX.search(start) is None and any(len(_WORD.findall(rest)) > 2 for rest in have)
    special = ends if outermost else () if stacked else None
    common = [rest for rest, count in have.items() if len(blocks) / 2 <= count < len(blocks)]
    for rest in common:
        without = [number for number, rests in blocks.items() if rest not in rests]
        if not all(_is_missing(rest, blocks, number, without, special) for number in without):
            continue
        yield from (f"{start}{number}{rest}" for number in without)
    if outermost and all(count == len(blocks) for count in have.values()) and len(have) > 1:
        gap = set(range(ends[0], min(ends[1], ends[0] + _MAX))) - set(blocks)
        yield from (f"{start}{number}{rest}" for number in sorted(gap) for rest in sorted(have))


def _is_missing(
    rest: str, blocks: Blocks, number: int, without: Collection[int], special: Collection[int] | None
) -> bool:
    """Whether a block lacks a key that it should have."""
    own = blocks[number]
    module = re.split(r"[^./]+$", rest)[0]
    others = set().union(*(rests for n, rests in blocks.items() if rest in rests))
    more = {_child(other) for other in own if other not in others}
    if _child(rest) in more or any(child not in {_child(other) for other in others} for child in more):
        return False  # it has something else in its place
    if len(module) > 1 and any(other.startswith(module) for other in own):
        return True
    if special is None or len(without) > max(1, len(blocks) // 4):
        return False
    return number not in special or _child(rest) in {_child(other) for other in own}


def _child(rest: str) -> str:
    """The first word after an index."""
    found = _WORD.search(rest)
    return found[0] if found is not None else ""


def _contradictions(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Biases of another length than their weights have."""
    found = []
    for key, shape in shapes.items():
        weight = shapes.get(f"{key[:-4]}weight") if key.endswith("bias") else None
        if weight and len(shape) == 1 and shape[0] not in weight:
            found.append(f"{key} has shape {list(shape)}, and {key[:-4]}weight has {list(weight)}")
    return found[:_LISTED]
