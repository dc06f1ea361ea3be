"""read: a lazy view of a checkpoint file: names, shapes and dtypes now, values only when asked for.

A file is recognised by what it holds, not by what it is called. Everything is checked from headers before
a tensor exists; whatever is wrong is one CheckpointError that names the file, the member or key, the
sizes, and what to do next.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from keymap.errors import CheckpointError, UnsafeCheckpointError
from keymap.read.lazy import Checkpoint, LazyTensor, Record, SourceFile
from keymap.read.numpy_file import is_npz, looks_like_npy, read_npy, read_npz
from keymap.read.safetensors_file import looks_like_safetensors, read_safetensors
from keymap.read.shards import read_index
from keymap.read.torch_file import archive_prefix, is_scripted, looks_like_pickle, read_archive, read_legacy
from keymap.read.trusted import read_trusted
from keymap.read.zip_file import looks_like_zip, read_directory

__all__ = ["Checkpoint", "LazyTensor", "Record", "SourceFile", "open_checkpoint"]

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".index.json")
OTHERS = {
    b"\x1f\x8b": "a gzip-compressed file; decompress it first",
    b"BZh": "a bzip2-compressed file; decompress it first",
    b"\xfd7zXZ": "an xz-compressed file; decompress it first",
    b"\x28\xb5\x2f\xfd": "a zstd-compressed file; decompress it first",
    b"\x89HDF": "an HDF5 file (Keras); convert it to safetensors",
    b"GGUF": "a GGUF file; give the safetensors it was made from",
}


def open_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Checkpoint:
    """A lazy view of one file, or of the shards that an index names.

    Args:
        path: .safetensors, .pt in either container of torch.save, a TorchScript archive, .npz, .npy, or a
            JSON index of shards; recognised by content.
        weights_only: True runs nothing of the file and refuses what would have to run. False hands only
            a file that is refused for that reason to torch.load, which runs it.

    Raises:
        UnsafeCheckpointError: under weights_only=True, the file names code, and nothing of it was run.
        CheckpointError: the file is missing, unreadable, truncated, corrupt, hostile or of another kind.
    """
    place = Path(path)
    try:
        return _open(place, weights_only, index=True)
    except CheckpointError:
        raise
    except Exception as error:  # the last net: no file may bring any other error to the caller
        text = f"{path}: cannot be read ({type(error).__name__}: {error}); download or save the file again"
        raise CheckpointError(text) from error


def _open(path: Path, weights_only: bool, index: bool) -> Checkpoint:
    if os.path.isdir(path):  # which is False, not an error, for what may not be looked at
        held = sorted(item.name for item in path.iterdir() if item.name.endswith(WEIGHTS))
        advice = f"name one of its weight files: {held[:10]}" if held else "it holds no weight file"
        raise CheckpointError(f"{path}: is a directory; {advice}")
    file = SourceFile(path)
    if looks_like_zip(file):
        members = read_directory(file)
        prefix = archive_prefix(members)
        if prefix is not None:
            safe = weights_only or is_scripted(members)  # torch.load would run an archive's code
            return _or_trusted(file, safe, "torch", lambda: read_archive(file, members, prefix))
        if is_npz(members):
            return read_npz(file, members)
        fact = f"is a zip archive of {len(members)} members that torch and numpy do not write"
        raise file.bad(f"{fact}: {list(members)[:5]}", "give a .pt, .npz or .safetensors file")
    if looks_like_npy(file):
        return read_npy(file)
    if looks_like_safetensors(file):
        return read_safetensors(file)
    if looks_like_pickle(file):
        return _or_trusted(file, weights_only, "torch_legacy", lambda: read_legacy(file))
    if index and file.data[:64].lstrip()[:1] == b"{":
        found = read_index(file, lambda shard: _open(shard, weights_only, index=False))
        if found is not None:
            return found
    raise file.bad(*_describe(file))


def _or_trusted(file: SourceFile, weights_only: bool, container: str, read: Callable[[], Checkpoint]) -> Checkpoint:
    """The restricted reading; torch.load's only where that refuses to run code and the caller allows it."""
    try:
        return read()
    except UnsafeCheckpointError:
        if weights_only:
            raise
        return read_trusted(file, container)


def _describe(file: SourceFile) -> tuple[str, str]:
    """What a file of another kind seems to be, and what to do."""
    head = file.data[:1024]
    for magic, text in OTHERS.items():
        if head.startswith(magic):
            what, _, advice = text.partition("; ")
            return f"is {what}", advice
    if head[257:262] == b"ustar":
        return "is a tar archive (torch before 0.1.10 saved such)", "load it with an old torch and save again"
    text = head.decode("utf-8", "replace").strip()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the weights themselves", "run `git lfs pull`"
    if text[:200].lower().startswith(("<!doctype html", "<html")):
        return "is an HTML page, not weights", "download the file itself, not the page about it"
    if text.startswith(("{", "[")):
        return "is a JSON file, without the weight_map of an index of shards", "give the weights"
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"is a text file that begins with {text[:40]!r}", "give a file of weights"
    if file.path.name.endswith(".safetensors"):
        return "is no safetensors file: its header is damaged or the file truncated", "download it again"
    kinds = "safetensors, torch, TorchScript, npz or npy"
    return f"is none of {kinds} (begins with {head[:8]!r})", "give one of these, or download it again"
