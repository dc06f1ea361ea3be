"""Cut a state dict into shards, named and indexed as transformers does (``model-00001-of-00002.safetensors``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from keymap.errors import WriteError
from keymap.write.tensors import Item

__all__ = ["index_text", "shards_of"]


def shards_of(path: Path, items: Mapping[str, Item], limit: int | None) -> dict[Path, list[str]]:
    """The keys of each file; one file if they fit it.

    Args:
        path: the destination.
        items: what is written.
        limit: bytes of tensors in one file; None for no limit.

    Raises:
        WriteError: a tensor is larger than the limit, or the container has no shards.
    """
    if limit is None or sum(item.nbytes for item in items.values()) <= limit:
        return {path: list(items)}
    if path.suffix != ".safetensors":
        raise WriteError(f"{path}: only .safetensors is written in shards; write that, or leave max_shard_size= out")
    largest = max(items, key=lambda key: items[key].nbytes)
    if items[largest].nbytes > limit:
        size = items[largest].nbytes
        raise WriteError(f"max_shard_size={limit}: {largest} has {size} bytes; pass max_shard_size={size} or more")
    groups: list[list[str]] = [[]]
    size = 0
    for key, item in items.items():
        if size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += item.nbytes
    count = len(groups)
    return {
        path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}"): keys
        for number, keys in enumerate(groups, 1)
    }


def index_text(parts: Mapping[Path, list[str]], items: Mapping[str, Item]) -> str:
    """The index of the shards."""
    total = sum(item.nbytes for item in items.values())
    places = {key: path.name for path, keys in parts.items() for key in keys}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
