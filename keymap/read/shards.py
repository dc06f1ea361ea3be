"""A JSON index of shards (``*.index.json`` with a weight_map), read as one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keymap.errors import CheckpointError
from keymap.read.lazy import Checkpoint, LazyTensor, SourceFile, brief
from keymap.read.safetensors_file import parse_json

MAX_INDEX = 1 << 21  # bytes; read, they take up to twenty times as much
MAX_SHARDS = 1000
MAX_FAULTS = 20  # after which no further shard is opened
AGAIN = "download the index and all shards again"


def read_index(file: SourceFile, open_one: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """All shards that the index names, or None for JSON that is no index.

    Raises CheckpointError, with every fault: a shard that is missing, unreadable or not a plain file
    beside the index; a key that two places give or only one of index and shard knows.
    """
    if file.size > MAX_INDEX:
        raise file.bad(
            f"is a text of {file.size} bytes; an index of shards has at most {MAX_INDEX}", "give the weights"
        )
    index = parse_json(file, file.data[: file.size], "the JSON")
    places = index.get("weight_map")
    if not isinstance(places, dict):
        return None
    file.refuse_many(len(places))
    faults = [
        f"{brief(key)}: {brief(name)} is not a plain file name beside the index"
        for key, name in places.items()
        if not isinstance(name, str) or not _plain(name)
    ]
    if faults:
        raise CheckpointError(f"{file.path}: its weight_map leads elsewhere; {AGAIN}", faults[:MAX_FAULTS])
    shards: dict[str, set[str]] = {}
    for key, name in places.items():
        shards.setdefault(name, set()).add(key)
    if len(shards) > MAX_SHARDS:
        raise file.bad(f"is an index of {len(shards)} shards, the limit is {MAX_SHARDS}", "join them")
    tree: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    containers: set[str] = set()
    base = 0
    for name, expected in shards.items():
        if len(faults) > MAX_FAULTS:
            faults.append("the other shards were not looked at")
            break
        path = file.path.parent / name
        if leads_out(path, file.path.parent, file.path.resolve().parent):
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
        faults += [f"{brief(key)} is not in its shard {name!r}" for key in sorted(expected - leaves.keys())]
        faults += [f"{brief(key)} of shard {name!r} is no tensor" for key in shard.tree.keys() - leaves.keys()]
        for key, value in leaves.items():
            if key not in expected:
                stated = f"in {places[key]!r}" if key in places else "unsupported"
                faults.append(f"{brief(key)} is in shard {name!r}; the index has it {stated}")
            else:
                tree[key] = value._replace(shift=base)
        base += path.stat().st_size
    if not faults and not containers <= {"safetensors"} and not containers <= {"torch"}:
        faults.append(f"its shards are of several kinds: {sorted(containers)}")
    if faults:
        raise CheckpointError(f"{file.path}: the index and its shards do not agree; {AGAIN}", faults)
    return Checkpoint(file.path, containers.pop() if containers else "safetensors", tree, metadata)


def _plain(name: str) -> bool:
    """Whether a name stays in its folder on every system, and can be shown."""
    short = len(name.encode("utf-8", "replace")) <= 255
    return short and name.isprintable() and not any(mark in name for mark in "/\\:") and name.strip(". ") != ""


def leads_out(path: Path, *homes: Path) -> bool:
    """Whether a path leads, by a link, out of these folders.

    A download cache is no way out: what lies in its ``snapshots/<revision>/`` are links into its ``blobs/``.
    """
    try:
        place, inside = path.resolve(), {home.resolve() for home in homes}
        caches = {up.parent / "blobs" for home in inside for up in (home, *home.parents) if up.name == "snapshots"}
        return inside.isdisjoint(place.parents) and place.parent not in {cache.resolve() for cache in caches}
    except (OSError, RuntimeError):  # links that lead to each other
        return True
