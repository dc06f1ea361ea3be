"""Open a checkpoint file lazily: read names, shapes and dtypes at once, and values only on request.

keymap recognises a file by its content, not by its name. It checks the headers before it makes a tensor. A fault is one
CheckpointError that names the file, the member or key and the sizes, and says what to do next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from keymap.errors import CheckpointError, UnsafeCheckpointError
from keymap.read.lazy import Checkpoint, LazyTensor, Record, SourceFile
from keymap.read.msgpack_file import looks_like_msgpack, read_msgpack
from keymap.read.numpy_file import is_npz, looks_like_npy, read_npy, read_npz
from keymap.read.safetensors_file import looks_like_safetensors, read_safetensors
from keymap.read.shards import read_index, read_set
from keymap.read.torch_file import archive_prefix, is_scripted, looks_like_pickle, read_archive, read_legacy
from keymap.read.trusted import read_trusted
from keymap.read.zip_file import looks_like_zip, read_directory

__all__ = ["Checkpoint", "LazyTensor", "Record", "SourceFile", "open_checkpoint"]

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".index.json", ".msgpack")
OTHER_FORMATS = {  # first bytes of files that keymap does not read: what they are, and what to do
    b"\x1f\x8b": "a gzip-compressed file; decompress it first",
    b"BZh": "a bzip2-compressed file; decompress it first",
    b"\xfd7zXZ": "an xz-compressed file; decompress it first",
    b"\x28\xb5\x2f\xfd": "a zstd-compressed file; decompress it first",
    b"\x89HDF": "an HDF5 file (Keras); convert it to safetensors",
    b"PAR1": "a parquet file; convert it to safetensors",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"GGUF": "a GGUF file; pass the safetensors file that it was made from",
}


_FROM_TENSORFLOW = "load the model in TensorFlow and save its weights as safetensors or .npz"
_BY_SUFFIX = {  # formats that their first bytes do not show
    ".onnx": ("is an ONNX model, a graph with its weights", "pass the checkpoint that it was exported from"),
    ".tflite": ("is a TensorFlow Lite model", "pass the checkpoint that it was converted from"),
    ".pb": ("is a TensorFlow graph", _FROM_TENSORFLOW),
    ".index": ("is the index of a TensorFlow checkpoint", _FROM_TENSORFLOW),
    ".data-00000-of-00001": ("is a part of a TensorFlow checkpoint", _FROM_TENSORFLOW),
    ".h5": ("is a Keras file", "convert it to safetensors"),
    ".engine": ("is a TensorRT engine", "pass the checkpoint that it was built from"),
    ".mlmodel": ("is a Core ML model", "pass the checkpoint that it was converted from"),
}


def open_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Checkpoint:
    """Open one file, or all shards of an index, without reading values.

    Args:
        path: .safetensors, .pt in either container of torch.save, a TorchScript archive, .npz, .npy, or a
            JSON index of shards; recognised by content.
        weights_only: True runs no code of the file and refuses a file that needs it. False passes such a file
            to torch.load, which runs its code; all other files are read in the same way as with True.

    Raises:
        UnsafeCheckpointError: with weights_only=True, the file names code. None of it was run.
        CheckpointError: the file is missing, unreadable, truncated, corrupt, hostile or of another kind.
    """
    try:
        return _open(Path(path), weights_only, allow_index=True)
    except CheckpointError:
        raise
    except Exception as error:  # the last resort: no file may raise any other error
        text = f"{path}: cannot be read ({type(error).__name__}: {error}); download or save the file again"
        raise CheckpointError(text) from error


def _open(path: Path, weights_only: bool, allow_index: bool) -> Checkpoint:
    if os.path.isdir(path):  # without permission this is False, not an error
        weight_files = sorted(item.name for item in path.iterdir() if item.name.endswith(WEIGHTS))
        advice = f"pass one of its weight files: {weight_files[:10]}" if weight_files else "it has no weight file"
        raise CheckpointError(f"{path}: is a directory; {advice}")
    file = SourceFile(path)
    if looks_like_zip(file):
        members = read_directory(file)
        prefix = archive_prefix(members)
        if prefix is not None:
            safe = weights_only or is_scripted(members)  # torch.load would run the code of a TorchScript archive
            return _safely_or_trusted(file, safe, "torch", lambda: read_archive(file, members, prefix))
        if is_npz(members):
            return read_npz(file, members)
        fact = f"is a zip archive of {len(members)} members that torch and numpy do not write"
        raise file.error(f"{fact}: {list(members)[:5]}", "pass a .pt, .npz or .safetensors file")
    if looks_like_npy(file):
        return read_npy(file)
    if looks_like_safetensors(file):
        return read_safetensors(file)
    if looks_like_msgpack(file):
        return read_msgpack(file)
    if looks_like_pickle(file):
        return _safely_or_trusted(file, weights_only, "torch_legacy", lambda: read_legacy(file))
    if allow_index and file.data[:64].lstrip()[:1] == b"{":
        sharded = read_index(file, lambda shard: _open(shard, weights_only, allow_index=False))
        if sharded is not None:
            return sharded
    raise file.error(*_describe(file))


def open_shards(paths: Sequence[Path], weights_only: bool = True) -> Checkpoint:
    """Open shards without an index as one checkpoint, without reading values.

    Raises:
        CheckpointError: as `open_checkpoint`; also if a key is in two shards.
    """
    return read_set(paths, lambda shard: open_checkpoint(shard, weights_only))


def _safely_or_trusted(
    file: SourceFile, weights_only: bool, container: str, read: Callable[[], Checkpoint]
) -> Checkpoint:
    """Call ``read``; if it refuses to run code and the caller trusts the file, use torch.load instead."""
    try:
        return read()
    except UnsafeCheckpointError:
        if weights_only:
            raise
        return read_trusted(file, container)


def _describe(file: SourceFile) -> tuple[str, str]:
    """For a file that keymap does not read: what it seems to be, and what to do."""
    head = file.data[:1024]
    for magic, text in OTHER_FORMATS.items():
        if head.startswith(magic):
            kind, _, advice = text.partition("; ")
            return f"is {kind}", advice
    if head[257:262] == b"ustar":
        return (
            "is a tar archive",
            "unpack it and pass the checkpoint in it; if torch before 0.1.10 wrote it, save it again with an old torch",
        )
    suffix = file.path.suffix.lower()
    if head[4:8] == b"TFL3" or suffix in _BY_SUFFIX:
        return _BY_SUFFIX.get(suffix, _BY_SUFFIX[".tflite"])
    text = head.decode("utf-8", "replace").strip()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the weights themselves", "run `git lfs pull`"
    if text[:200].lower().startswith(("<!doctype html", "<html")):
        return "is an HTML page, not weights", "download the file itself, not the page about it"
    if text.startswith(("{", "[")):
        return "is a JSON file without the weight_map of a shard index", "pass the file with the weights"
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"is a text file that begins with {text[:40]!r}", "pass the file with the weights"
    if file.path.name.endswith(".safetensors"):
        return "is not a safetensors file: its header is damaged or the file is truncated", "download it again"
    kinds = "safetensors, torch, TorchScript, npz or npy"
    return f"is none of {kinds} (begins with {head[:8]!r})", "pass one of these, or download the file again"
