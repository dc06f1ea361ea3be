"""A JSON index of shards (``*.index.json`` with a weight_map), read as one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from keymap.errors import CheckpointError
from keymap.read.lazy import Checkpoint, LazyTensor, SourceFile
from keymap.read.safetensors_file import parse_json

MAX_INDEX = 100_000_000
AGAIN = "download the index and all shards again"


def read_index(file: SourceFile, open_one: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """All shards that the index names, or None for JSON that is no index.

    Raises CheckpointError, with every fault: a shard that is missing, unreadable or not a plain file
    beside the index; a key that two places give or only one of index and shard knows.
    """
    if file.size > MAX_INDEX:
        return None
    index = parse_json(file, file.data[: file.size], "the JSON")
    places = index.get("weight_map")
    if not isinstance(places, dict):
        return None
    faults = [
        f"{key!r}: {name!r} is not a plain file name beside the index"
        for key, name in places.items()
        if not isinstance(name, str) or not _plain(name)
    ]
    if faults:
        raise CheckpointError(f"{file.path}: its weight_map leads elsewhere; {AGAIN}", faults[:20])
    allowed = {file.path.parent.resolve(), file.path.resolve().parent}
    tree: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    containers: set[str] = set()
    base = 0
    for name in dict.fromkeys(places.values()):
        expected = {key for key, place in places.items() if place == name}
        path = file.path.parent / name
        if path.resolve().parent not in allowed:
            faults.append(f"shard {name!r} is a link that leaves the index's folder")
            continue
        try:
            shard = open_one(path)
        except CheckpointError as error:
            faults.append(f"shard {name!r} ({len(expected)} keys): {error}")
            continue
        containers.add("torch" if shard.container == "torch_legacy" else shard.container)
        metadata.update(shard.metadata)
        leaves = {key: value for key, value in shard.tree.items() if isinstance(value, LazyTensor)}
        faults += [f"{key!r} is not in its shard {name!r}" for key in sorted(expected - leaves.keys())]
        faults += [f"{key!r} of shard {name!r} is no tensor" for key in shard.tree.keys() - leaves.keys()]
        for key, value in leaves.items():
            if key not in expected:
                stated = f"in {places[key]!r}" if key in places else "nowhere"
                faults.append(f"{key!r} is in shard {name!r}; the index has it {stated}")
            else:
                tree[key] = replace(value, position=base + value.position)
        base += path.stat().st_size
    if not faults and not containers <= {"safetensors"} and not containers <= {"torch"}:
        faults.append(f"its shards are of several kinds: {sorted(containers)}")
    if faults:
        raise CheckpointError(f"{file.path}: the index and its shards do not agree; {AGAIN}", faults)
    return Checkpoint(file.path, containers.pop() if containers else "safetensors", tree, metadata)


def _plain(name: str) -> bool:
    """Whether a name stays in its folder on every system."""
    return name == os.path.basename(name) and not any(mark in name for mark in "/\\:\0") and name.strip(". ") != ""
