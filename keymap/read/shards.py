"""Read the shards of a JSON index (``*.index.json`` with a weight_map) as one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keymap.errors import CheckpointError, some
from keymap.read.lazy import Checkpoint, LazyTensor, SourceFile, brief
from keymap.read.safetensors_file import parse_json

MAX_INDEX = 1 << 21  # bytes; the parsed index takes up to twenty times as many
MAX_SHARDS = 1000
MAX_FAULTS = 20  # after this many, open no further shard
_SHARD = re.compile(r"((?:[^/]*/)?[^/]+?)[-_.](\d{1,5})-of-(\d{1,5})(\.\w+)")
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # its git hash or its sha256
AGAIN = "download the index and all shards again"


def read_index(file: SourceFile, open_shard: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """All shards that the index names as one checkpoint, or None if the JSON is not an index.

    Raises:
        CheckpointError: with all faults. A shard is missing, unreadable or not a plain file beside the index; or a key
            is in two shards, or in only one of index and shard.
    """
    if file.size > MAX_INDEX:
        fact = f"is a JSON file of {file.size} bytes; a shard index has at most {MAX_INDEX}"
        raise file.error(fact, "pass the file with the weights")
    weight_map = parse_json(file, file.data[: file.size], "the JSON").get("weight_map")
    if not isinstance(weight_map, dict):
        return None
    expected_keys = _keys_by_shard(file, weight_map)
    faults: list[str] = []
    tree: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    containers: set[str] = set()
    bytes_before = 0
    for name, expected in expected_keys.items():
        if len(faults) > MAX_FAULTS:
            faults.append("the remaining shards were not checked")
            break
        path = file.path.parent / name
        if leads_out(path, file.path.parent, file.path.resolve().parent):
            faults.append(f"shard {name!r} is a link that leaves the index's folder")
            continue
        try:
            shard = open_shard(path)
        except CheckpointError as error:
            faults.append(f"shard {name!r} ({len(expected)} keys): {error}")
            continue
        containers.add("torch" if shard.container == "torch_legacy" else shard.container)
        metadata.update(shard.metadata)
        tensors = {key: value for key, value in shard.tree.items() if isinstance(value, LazyTensor)}
        faults += _shard_faults(name, shard, tensors, expected, weight_map)
        tree |= {k: lazy._replace(bytes_before=bytes_before) for k, lazy in tensors.items() if k in expected}
        bytes_before += path.stat().st_size
    if not faults and not containers <= {"safetensors"} and not containers <= {"torch"}:
        faults.append(f"its shards are of several kinds: {sorted(containers)}")
    if faults:
        raise CheckpointError(f"{file.path}: the index and its shards do not agree; {AGAIN}", faults)
    return Checkpoint(file.path, containers.pop() if containers else "safetensors", tree, metadata)


def shards_of(names: Sequence[str], where: str) -> tuple[str, ...]:
    """A complete set of shards (``model-00001-of-00003.safetensors``) in order; empty if the files are no such set.

    Raises:
        CheckpointError: a shard is missing.
    """
    found = [_SHARD.fullmatch(name) for name in names]
    numbers = {int(shard[2]): shard for shard in found if shard is not None}
    kinds = {(shard[1], shard[3], shard[4]) for shard in found if shard is not None}
    if len(kinds) != 1 or len(numbers) != len(names):
        return ()
    (start, total, end) = kinds.pop()
    missing = [n for n in range(1, min(int(total), MAX_SHARDS) + 1) if n not in numbers]
    if missing:
        width = len(total)
        lacking = some(f"{start}-{n:0{width}}-of-{total}{end}" for n in missing)
        raise CheckpointError(f"{where}: {len(missing)} of {int(total)} shards are missing: {lacking}; download them")
    return tuple(numbers[n].group() for n in sorted(numbers))


def read_set(paths: Sequence[Path], open_shard: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Shards without an index as one checkpoint.

    Raises:
        CheckpointError: with all faults: a shard is unreadable or of another kind, or a key is in two shards.
    """
    tree: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    owners: dict[str, str] = {}
    containers: set[str] = set()
    faults: list[str] = []
    bytes_before = 0
    for path in paths:
        try:
            shard = open_shard(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        containers.add("torch" if shard.container == "torch_legacy" else shard.container)
        metadata.update(shard.metadata)
        for key, lazy in shard.tree.items():
            if key in owners:
                faults.append(f"{brief(key)} is in {owners[key]!r} and in {path.name!r}")
            elif isinstance(lazy, LazyTensor):
                owners[key] = path.name
                tree[key] = lazy._replace(bytes_before=bytes_before)
        bytes_before += path.stat().st_size
    if len(containers) > 1:
        faults.append(f"they are of several kinds: {sorted(containers)}")
    if faults:
        raise CheckpointError(f"{paths[0].parent}: the shards do not make one checkpoint", faults[:MAX_FAULTS])
    return Checkpoint(paths[0], containers.pop(), tree, metadata)


def _keys_by_shard(file: SourceFile, weight_map: Mapping[str, Any]) -> dict[str, set[str]]:
    """The keys that an index expects in each shard; raises CheckpointError for bad names and too many shards."""
    file.limit_tensors(len(weight_map))
    faults = [
        f"{brief(key)}: {brief(name)} is not a plain file name beside the index"
        for key, name in weight_map.items()
        if not isinstance(name, str) or not _plain(name)
    ]
    if faults:
        fact = "its weight_map names files outside its folder"
        raise CheckpointError(f"{file.path}: {fact}; {AGAIN}", faults[:MAX_FAULTS])
    keys: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        keys.setdefault(name, set()).add(key)
    if len(keys) > MAX_SHARDS:
        raise file.error(f"is an index of {len(keys)} shards; the limit is {MAX_SHARDS}", "join the shards")
    return keys


def _shard_faults(
    name: str, shard: Checkpoint, tensors: Mapping[str, LazyTensor], expected: set[str], weight_map: Mapping[str, str]
) -> list[str]:
    """Differences between the keys of a shard and those that the index expects in it."""
    faults = [f"{brief(key)} is not in its shard {name!r}" for key in sorted(expected - tensors.keys())]
    faults += [f"{brief(key)} of shard {name!r} is not a tensor" for key in shard.tree.keys() - tensors.keys()]
    for key in tensors:
        if key not in expected:
            index_says = (
                f"the index has it in {weight_map[key]!r}" if key in weight_map else "the index does not list it"
            )
            faults.append(f"{brief(key)} is in shard {name!r}, but {index_says}")
    return faults


def _plain(name: str) -> bool:
    """Whether a name is a printable file name without a folder, on every system."""
    short = len(name.encode("utf-8", "replace")) <= 255
    return short and name.isprintable() and not any(mark in name for mark in "/\\:") and name.strip(". ") != ""


def leads_out(path: Path, *allowed: Path) -> bool:
    """Whether a path is a link to a file outside these folders.

    Links of a Hugging Face download cache are allowed: ``snapshots/<revision>/`` links into ``blobs/``, and into
    another store if the file there has the name of a blob, which is a hash.
    """
    try:
        target, folders = path.resolve(), {folder.resolve() for folder in allowed}
        caches = {
            up.parent / "blobs" for folder in folders for up in (folder, *folder.parents) if up.name == "snapshots"
        }
        is_blob = bool(caches) and _BLOB.fullmatch(target.name) is not None
        inside = not folders.isdisjoint(target.parents) or target.parent in {cache.resolve() for cache in caches}
        return not (inside or is_blob)
    except (OSError, RuntimeError):  # for example a circle of links
        return True
