"""Fold equal layers: keys that differ in one index, and whose tensors are treated alike, become one row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

__all__ = ["Layers", "Node", "Row", "fold", "ranges"]

# An index is a whole segment of a key (`.3.`), or ends one (`_3/`) whose module has several tensors: two norms with a
# number each are not layers. Nine digits are enough for layers.
_INDEX = re.compile(r"(?:^|(?<=[./]))(?:0|[1-9][0-9]{0,8})(?=[./]|$)|(?<=_)(?:0|[1-9][0-9]{0,8})(?=/)")
_MAX_INDICES = 6  # of one key
_FEW = 3  # tensors of a module whose name ends with an index


class Row(NamedTuple):
    """One key of every layer.

    Attributes:
        suffix: what follows the index.
        leaves: the numbers of the keys, in the order of the layers.
    """

    suffix: str
    leaves: tuple[int, ...]


class Layers(NamedTuple):
    """Equal layers.

    Attributes:
        prefix: what precedes the index.
        indices: of the layers, ascending.
        rows: the keys of each layer.
    """

    prefix: str
    indices: tuple[int, ...]
    rows: tuple[Row, ...]


Node = int | Layers  # the number of a key, or layers


def ranges(indices: Sequence[int]) -> str:
    """Ascending numbers in few words: ``0-3, 5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def fold(keys: Sequence[str], kinds: Sequence[int]) -> tuple[Node, ...]:
    """Keys as single ones and as equal layers, in the order of their first keys.

    Args:
        keys: each once.
        kinds: a number for each key; keys with one number are treated alike.
    """
    found = [list(islice(_INDEX.finditer(key), _MAX_INDICES)) for key in keys]
    nodes = _fold(keys, kinds, [[match.span() for match in matches] for matches in found], range(len(keys)), 0)
    return tuple(node for _, node in sorted(nodes, key=lambda placed: placed[0]))


def _fold(
    keys: Sequence[str],
    kinds: Sequence[int],
    spans: Sequence[Sequence[tuple[int, int]]],
    members: Sequence[int],
    depth: int,
) -> list[tuple[int, Node]]:
    """Fold the members at the index number ``depth`` of their keys; layers that differ are folded at the next one.

    Returns:
        Nodes, each with the number of its first key.
    """
    nodes: list[tuple[int, Node]] = []
    layers: dict[str, dict[int, dict[str, int]]] = {}  # by prefix and index: the keys by suffix
    for leaf in members:
        if depth >= len(spans[leaf]):
            nodes.append((leaf, leaf))
            continue
        (start, stop), key = spans[leaf][depth], keys[leaf]
        layers.setdefault(key[:start], {}).setdefault(int(key[start:stop]), {})[key[stop:]] = leaf
    for prefix, by_index in layers.items():
        alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for index, leaves in by_index.items():
            structure = tuple(sorted((suffix, kinds[leaf]) for suffix, leaf in leaves.items()))
            alike.setdefault(structure, []).append(index)
        for indices in alike.values():
            few = prefix.endswith("_") and len(by_index[indices[0]]) < _FEW
            if len(indices) == 1 or few:
                same = [leaf for index in indices for leaf in by_index[index].values()]
                nodes += _fold(keys, kinds, spans, same, depth + 1)
                continue
            indices.sort()
            rows = tuple(
                Row(suffix, tuple(by_index[index][suffix] for index in indices)) for suffix in by_index[indices[0]]
            )
            nodes.append((min(leaf for row in rows for leaf in row.leaves), Layers(prefix, tuple(indices), rows)))
    return nodes
