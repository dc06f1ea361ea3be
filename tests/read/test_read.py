"""Readers: right values without a copy, one CheckpointError for every bad file, no code of it run."""

from __future__ import annotations

import argparse
import collections
import io
import json
import mmap
import os
import pathlib
import pickle
import random
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import (
    call_pickle,
    entry,
    named,
    npy_bytes,
    number,
    numbers,
    safetensors_bytes,
    tensor_pickle,
    text,
    write_torch,
    write_zip,
)
from safetensors.torch import save_file

from keymap.errors import CheckpointError, UnsafeCheckpointError
from keymap.read import LazyTensor, Record, SourceFile, open_checkpoint
from keymap.read.globals_allowed import AllowedGlobals
from keymap.read.unpickle import BadPickleError, run_pickle

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EVERY_DTYPE = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int64).remainder(2 if dtype == torch.bool else 50)
    return raw.to(torch.uint8).view(dtype).reshape(shape) if shape else raw.to(torch.uint8).view(dtype)[0]


def state() -> dict[str, torch.Tensor]:
    """Distinct sizes, every dtype, a scalar, an empty tensor."""
    tensors = {f"t{index}": values((index + 1, 3), dtype) for index, dtype in enumerate(EVERY_DTYPE)}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "big": torch.randn(5, 11, 2)}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return raw(left) == raw(right)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leaves(tree: Any) -> list[LazyTensor]:
    if isinstance(tree, LazyTensor):
        return [tree]
    if isinstance(tree, Record):
        return leaves(tree.state)
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list | tuple) else []


def read_all(path: Path, **options: Any) -> None:
    """Open a file and read every tensor of it, which must be as stated."""
    for leaf in leaves(open_checkpoint(path, **options).tree):
        tensor = leaf.read()
        assert tuple(tensor.shape) == leaf.shape and tensor.dtype == leaf.dtype
        if tensor.numel() < 10_000:
            tensor.clone()


def refused(path: Path, *words: str, **options: Any) -> CheckpointError:
    """The refusal, after every word was found in it; the catch-all handler must not be what caught it."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path, **options)
    message = str(caught.value)
    assert path.name in message
    assert "cannot be read (" not in message
    assert [word for word in words if word not in message] == [], message
    return caught.value


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def npz_state() -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        f"params/{code}": np.arange(index * 6).reshape(index, 2, 3).astype(code)
        for index, code in enumerate("?bBhHiIlLefdFD", start=1)
    }
    return {**arrays, "fortran": np.asfortranarray(np.random.rand(3, 5, 7)), "scalar": np.array(4, np.int32)}


def save(kind: str, path: Path) -> dict[str, torch.Tensor]:
    """Write one good file of each container, and give its tensors by key."""
    if kind == "npz" or kind == "npz_deflated":
        arrays = npz_state()
        (np.savez if kind == "npz" else np.savez_compressed)(path.open("wb"), **arrays)  # type: ignore[arg-type]
        return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    if kind == "npy":
        array = np.random.rand(5, 3).astype(np.float32)
        np.save(path.open("wb"), array)
        return {"": torch.from_numpy(array)}
    tensors = state()
    if kind == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    elif kind == "torchscript":
        tensors = scripted(path)
    elif kind == "torch_deflated":
        plain = path.with_suffix(".plain")
        torch.save(tensors, plain)
        with zipfile.ZipFile(plain) as source:
            write_zip(path, [(name, source.read(name)) for name in source.namelist()], zipfile.ZIP_DEFLATED)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
    return tensors


CONTAINERS = [
    "safetensors",
    "torch",
    "torch_deflated",
    "torch_legacy",
    "torchscript",
    "npz",
    "npz_deflated",
    "npy",
]


# ---------------------------------------------------------------- right values


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".npz", ""])
def test_every_container_gives_its_tensors_whatever_the_file_is_called(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    tensors = save(kind, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == kind.removesuffix("_deflated")
    assert checkpoint.path == path
    assert set(checkpoint.tree) == set(tensors)
    for key, tensor in tensors.items():
        leaf = checkpoint.tree[key]
        assert (leaf.shape, leaf.dtype) == (tuple(tensor.shape), tensor.dtype), key
        assert (leaf.region is None) == kind.endswith("_deflated"), key
        assert same(leaf.read(), tensor), key


def test_safetensors_metadata_and_file_order(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"a": "b"},
        "late": entry("F32", [3], 4, 16),
        "early": entry("U8", [4], 0, 4),
        "empty": entry("F32", [0, 5], 16, 16),
    }
    path = put(tmp_path / "a", safetensors_bytes(header, bytes(range(16))))
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tree) == ["early", "late", "empty"]
    assert checkpoint.metadata == {"a": "b"}
    assert checkpoint.tree["early"].position < checkpoint.tree["late"].position


def test_unaligned_values_are_mapped_and_right(tmp_path: Path) -> None:
    header = {"odd": entry("U8", [1], 0, 1), "wide": entry("F64", [3, 2], 1, 49)}
    wanted = torch.arange(6, dtype=torch.float64).view(3, 2)
    header_text = json.dumps(header)
    header_text += " " * (-len(header_text) % 8)
    path = put(tmp_path / "a", safetensors_bytes(header_text, b"\1" + raw(wanted)))
    found = open_checkpoint(path).tree["wide"].read()
    assert found.data_ptr() % 8 == 1
    assert torch.equal(found, wanted)
    assert torch.equal(found.t().contiguous() + 1, wanted.t() + 1)
    assert torch.equal(found @ wanted.t(), wanted @ wanted.t())


def test_two_byte_void_is_bfloat16(tmp_path: Path) -> None:
    wanted = torch.randn(3, 5).bfloat16()
    np.savez(tmp_path / "a.npz", w=wanted.view(torch.int16).numpy().view("V2"))
    found = open_checkpoint(tmp_path / "a.npz").tree["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.read(), wanted)


def test_views_of_one_storage_share_it_and_keep_their_strides(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    views = {
        "base": base,
        "t": base.t(),
        "part": base[1:3, ::2],
        "wide": base[0].expand(3, 6),
        "row": base[2],
    }
    for new in (True, False):
        torch.save(views, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        tree = open_checkpoint(tmp_path / "a.pt").tree
        for key, view in views.items():
            assert torch.equal(tree[key].read(), view), key
            assert tree[key].shape == tuple(view.shape)
        assert tree["t"].read().stride() == base.t().stride()
        tree["base"].read()[0, 1] = 5
        assert tree["t"].read()[1, 0] == 5


def test_plain_values_of_a_pickle_arrive_inert(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = 1  # type: ignore[attr-defined]
    values_in = {
        "epoch": 3,
        "nested": [{"w": torch.ones(3)}, (1, "x", None, True, 2.5, b"raw")],
        "parameter": parameter,
        "args": argparse.Namespace(lr=0.5, name="x"),
        "space": types.SimpleNamespace(b=2),
        "path": pathlib.PurePosixPath("/a/b"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "texts": np.array(["a"]),
        "scalar": np.float64(1.5),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "set": {1, 2},
        "frozen": frozenset(["a"]),
        "complex": 1j,
        "bytes": bytearray(b"ab"),
        "slice": slice(1, 2),
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(int, {1: 2}),
        "module": torch.nn.Linear(2, 3).state_dict(),
        "unsigned": torch.arange(3).to(torch.uint16),
        "storage": torch.arange(3.0).untyped_storage(),
    }
    for new, protocol in ((True, 2), (False, 2), (True, 4), (True, 5)):
        path = tmp_path / f"a{protocol}{new}.pt"
        kept = {key: v for key, v in values_in.items() if new or key not in ("unsigned", "storage")}
        torch.save(kept, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        tree = open_checkpoint(path).tree
        assert set(tree) == set(kept)
        assert tree["nested"][1] == (1, "x", None, True, 2.5, b"raw")
        assert torch.equal(tree["nested"][0]["w"].read(), torch.ones(3))
        assert torch.equal(tree["parameter"].read(), torch.ones(2))
        assert tree["args"] == Record("argparse.Namespace", {"lr": 0.5, "name": "x"})
        assert tree["space"] == Record("types.SimpleNamespace", {"b": 2})
        assert tree["path"] == "/a/b"
        assert torch.equal(tree["array"].read(), torch.arange(6, dtype=torch.int16).view(2, 3))
        assert "texts" in tree["texts"]
        assert tree["scalar"] == 1.5
        assert tree["size"] == (2, 3)
        assert tree["device"] == "cpu"
        assert tree["dtype"] is torch.float16
        assert tree["set"] == {1, 2} and tree["frozen"] == frozenset(["a"])
        assert tree["complex"] == 1j and tree["bytes"] == b"ab" and tree["slice"] == slice(1, 2, None)
        assert tree["counts"] == {"a": 2, "b": 1} and tree["default"] == {1: 2}
        assert tree["module"]["weight"].shape == (3, 2)
        if new:
            assert tree["unsigned"].read().tolist() == [0, 1, 2]
            assert tree["storage"].shape == (12,)


def test_a_lone_tensor_or_list_has_the_empty_key(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pt")
    torch.save([torch.ones(2)], tmp_path / "b.pt")
    assert open_checkpoint(tmp_path / "a.pt").tree[""].shape == (3,)
    assert open_checkpoint(tmp_path / "b.pt").tree[""][0].shape == (2,)


# ---------------------------------------------------------------- TorchScript


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("lost", torch.arange(5), persistent=False)
        self.register_buffer("kept", torch.arange(7.0))
        self.nothing = None
        self.factor = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) * self.factor
        return y


class Archive(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
        self.narrow = torch.nn.Parameter(torch.randn(3, 5).half().t())
        self.register_buffer("input_resolution", torch.tensor(224))
        self.plain = torch.ones(4)
        self.listed = [torch.zeros(2)]
        self.tied = self.blocks[0].linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) @ torch.ones(2, 3) + self.plain.sum() + self.listed[0].sum()
        return x


def scripted(path: Path, trace: bool = False) -> dict[str, torch.Tensor]:
    model = Archive().eval()
    jit: Any = torch.jit  # untyped
    module = jit.trace(model, torch.randn(1, 3)) if trace else jit.script(model)
    module.save(str(path))
    result: dict[str, torch.Tensor] = dict(jit.load(str(path)).state_dict())
    return result


@pytest.mark.parametrize("trace", [False, True])
def test_torchscript_keys_and_values_are_those_of_jit_load(trace: bool, tmp_path: Path) -> None:
    wanted = scripted(tmp_path / "a.pt", trace)
    tree = open_checkpoint(tmp_path / "a.pt").tree
    assert {"blocks.0.lost", "input_resolution", "visual.1.num_batches_tracked", "narrow"} <= set(tree)
    assert set(tree) == set(wanted)
    assert all(same(tree[key].read(), tensor.detach()) for key, tensor in wanted.items())
    assert tree["input_resolution"].shape == () and tree["input_resolution"].dtype == torch.int64


def test_torchscript_never_runs_code_even_when_trusted(tmp_path: Path) -> None:
    wanted = scripted(tmp_path / "a.pt")
    assert set(open_checkpoint(tmp_path / "a.pt", weights_only=False).tree) == set(wanted)
    canary = tmp_path / "canary"
    members = [("a/data.pkl", call_pickle("os", "mkdir", str(canary))), ("a/constants.pkl", b"\x80\x02).")]
    path = write_zip(tmp_path / "b.pt", members)
    refused(path, "os.mkdir", weights_only=False)
    assert not canary.exists()


def test_a_frozen_torchscript_archive_is_refused_in_words(tmp_path: Path) -> None:
    module = torch.jit.freeze(torch.jit.script(torch.nn.Linear(3, 2).eval()))
    module.save(str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", "TorchScript", "without named tensors", "freeze")


def test_torchscript_modules_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    loop = b"\x80\x02" + named("__torch__", "M") + b")\x81q\x00}" + text("m") + b"h\x00sb."
    path = write_zip(tmp_path / "a.pt", [("a/data.pkl", loop), ("a/constants.pkl", b"\x80\x02).")])
    refused(path, "endless or too many modules")


# ---------------------------------------------------------------- lazy, mapped, private


def mappings(path: Path) -> list[tuple[int, int, int]]:
    """(start, end, resident KiB) of every mapping of a file."""
    found: list[tuple[int, int, int]] = []
    ours = False  # other tests may have mapped files whose names are not UTF-8
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            ours = rest.endswith(str(path))
            if ours:
                start, _, end = first.partition("-")
                found.append((int(start, 16), int(end, 16), 0))
        elif ours and first == "Rss:":
            found[-1] = (*found[-1][:2], int(rest.split()[0]))
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch_legacy", "npz", "npy"])
def test_opening_reads_no_values_and_reading_copies_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "big"
    tensor = torch.zeros(4096, 4096)
    if kind == "safetensors":
        save_file({"w": tensor}, path)
    elif kind == "npz":
        np.savez(path.open("wb"), w=tensor.numpy())
    elif kind == "npy":
        np.save(path.open("wb"), tensor.numpy())
    else:
        torch.save({"w": tensor}, path, _use_new_zipfile_serialization=kind == "torch")
    leaf = leaves(open_checkpoint(path).tree)[0]
    found = leaf.read()
    [(start, end, resident)] = mappings(path)
    assert start <= found.data_ptr() < found.data_ptr() + found.nbytes <= end
    assert found.data_ptr() - start == leaf.position
    assert resident < 4096  # KiB, of 65536


@pytest.mark.parametrize("kind", CONTAINERS)
def test_writing_into_a_tensor_never_reaches_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(kind, path)
    before = path.read_bytes()
    for leaf in leaves(open_checkpoint(path).tree):
        leaf.read().zero_()
    assert path.read_bytes() == before


def test_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    tensors = save("safetensors", tmp_path / "a")
    found = {key: leaf.read() for key, leaf in open_checkpoint(tmp_path / "a").tree.items()}
    (tmp_path / "a").unlink()
    assert all(same(found[key], tensor) for key, tensor in tensors.items())


# ---------------------------------------------------------------- files that are no checkpoint

GZIP = b"\x1f\x8b\x08" + bytes(20)
NO_CHECKPOINT: dict[str, tuple[bytes | str, list[str]]] = {
    "empty": (b"", ["is empty"]),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["git-lfs pointer", "lfs pull"]),
    "html": ("\n<!DOCTYPE html><html></html>", ["HTML page"]),
    "json": ('{"a": 1}', ["JSON file", "weight_map"]),
    "broken_json": ('{"a": 1', ["not valid JSON"]),
    "doubled_json": ('{"a": 1, "a": 2}', ["'a' twice"]),
    "text": ("hello there", ["text file", "hello"]),
    "gzip": (GZIP, ["gzip", "decompress"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), ["HDF5", "Keras"]),
    "gguf": (b"GGUF" + bytes(9), ["GGUF"]),
    "tar": (b"pickle" + bytes(251) + b"ustar\0" + bytes(300), ["tar archive"]),
    "noise": (b"\xfe\xca\x01\x02\x03\x04\x05", ["none of safetensors"]),
    "pickle": (pickle.dumps({"w": [1]}, 2), ["plain pickle", "dict", "'w'"]),
    "pickle_code": (pickle.dumps({"w": os.getcwd}, 2), ["plain pickle", "dict", "'w'"]),
    "pickle_cut": (pickle.dumps({"w": [1]}, 2)[:-4], ["plain or damaged pickle", "truncated"]),
}


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_a_file_of_another_kind_is_named_in_the_error(name: str, tmp_path: Path) -> None:
    content, words = NO_CHECKPOINT[name]
    refused(put(tmp_path / "weights.pt", content), *words)


def test_paths_that_cannot_be_opened_are_refused_in_words(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt", "does not exist")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused(tmp_path, "is a directory", "no weight file")
    put(tmp_path / "model.safetensors", b"x")
    refused(tmp_path, "is a directory", "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused_in_words(tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", b"x")
    path.chmod(0)
    refused(path, "permission denied")


# ---------------------------------------------------------------- safetensors

F = entry("F32", [2], 0, 8)
BAD_SAFETENSORS: dict[str, tuple[bytes, list[str]]] = {
    "length_only": (b"\x02\0\0\0", ["header is damaged"]),
    "huge_header": (safetensors_bytes({"w": F}, bytes(8), 2**40), ["1099511627776", "limit"]),
    "cut_header": (safetensors_bytes({"w": F}, b"", 500), ["truncated", "claims 500"]),
    "cut_values": (safetensors_bytes({"w": F}, bytes(7)), ["'w'", "truncated", "end at byte 8"]),
    "no_json": (safetensors_bytes("{nonsense", bytes(8)), ["not valid JSON"]),
    "no_utf8": (struct.pack("<Q", 3) + b"{\xff}", ["not valid JSON"]),
    "deep": (safetensors_bytes('{"a":' * 100_000, b""), ["not valid JSON"]),
    "doubled": (safetensors_bytes(f'{{"w":{json.dumps(F)},"w":{json.dumps(F)}}}', bytes(8)), ["'w' twice"]),
    "hole": (safetensors_bytes({"w": entry("U8", [2], 3, 5)}, bytes(5)), ["'w'", "gap of 3 bytes after the header"]),
    "overlap": (
        safetensors_bytes({"a": F, "b": entry("F32", [2], 4, 12)}, bytes(12)),
        ["'b'", "overlap of 4 bytes with 'a'"],
    ),
    "left_over": (safetensors_bytes({"w": F}, bytes(11)), ["3 bytes after the last tensor"]),
    "dtype": (safetensors_bytes({"w": entry("F6_E2M3", [2], 0, 8)}, bytes(8)), ["'w'", "unknown dtype"]),
    "dtype_list": (safetensors_bytes({"w": {**F, "dtype": []}}, bytes(8)), ["unknown dtype"]),
    "size": (safetensors_bytes({"w": entry("F32", [3], 0, 8)}, bytes(8)), ["needs 12 bytes", "give 8"]),
    "negative": (safetensors_bytes({"w": entry("F32", [-2], 0, 8)}, bytes(8)), ["impossible shape"]),
    "overflow": (safetensors_bytes({"w": entry("F32", [2**40] * 3, 0, 8)}, bytes(8)), ["impossible shape"]),
    "overflow_0": (safetensors_bytes({"w": entry("F32", [2**62, 4, 0], 0, 0)}, b""), ["impossible shape"]),
    "truth": (safetensors_bytes({"w": entry("F32", [True, 2], 0, 8)}, bytes(8)), ["impossible shape"]),
    "fraction": (safetensors_bytes({"w": entry("F32", [2], 0, 8.0)}, bytes(8)), ["not two integers"]),
    "backwards": (safetensors_bytes({"w": entry("F32", [2], 8, 0)}, bytes(8)), ["backwards"]),
    "below_zero": (safetensors_bytes({"w": entry("F32", [2], -8, 0)}, bytes(8)), ["backwards"]),
    "no_fields": (safetensors_bytes({"w": {"dtype": "F32"}}, bytes(8)), ["needs dtype, shape"]),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}, "w": F}, bytes(8)), ["__metadata__"]),
    "dims": (safetensors_bytes({"w": entry("U8", [1] * 65, 0, 1)}, bytes(1)), ["impossible shape"]),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_a_bad_safetensors_header_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    content, words = BAD_SAFETENSORS[name]
    refused(put(tmp_path / "w.safetensors", content), *words)


def test_all_faults_of_a_header_are_reported_at_once(tmp_path: Path) -> None:
    header = {"a": entry("X", [2], 0, 8), "b": entry("F32", [3], 0, 8)}
    error = refused(put(tmp_path / "w", safetensors_bytes(header, bytes(8))), "'a'", "'b'")
    assert len(error.faults) == 2


# ---------------------------------------------------------------- torch: no code is run


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


CODE = {
    "os": lambda c: call_pickle("os", "mkdir", c),
    "eval": lambda c: call_pickle("builtins", "eval", f"__import__('os').mkdir({c!r})"),
    "python2": lambda c: call_pickle("__builtin__", "exec", f"__import__('os').mkdir({c!r})"),
    "nested_load": lambda c: call_pickle("torch.storage", "_load_from_bytes", c),
    "dotted": lambda c: call_pickle("collections", "OrderedDict.__init__.__globals__", c),
    "stack_global": lambda c: b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + text(c) + b"\x85R.",
    "new_object": lambda c: b"\x80\x02" + named("pathlib", "PosixPath.mkdir") + text(c) + b"\x85\x81.",
    "script_class": lambda c: b"\x80\x02" + named("__torch__.os", "mkdir") + text(c) + b"\x85R.",
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_names_code_is_refused_and_not_run(name: str, legacy: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    program = CODE[name](str(canary))
    if legacy:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path = put(tmp_path / "a.pt", b"".join(head) + program)
    else:
        path = write_torch(tmp_path / "a.pt", program, {})
    error = refused(path, "names", "nothing of it was run", "weights_only=False")
    assert isinstance(error, UnsafeCheckpointError)
    assert not canary.exists()


def test_an_object_whose_pickling_runs_code_touches_no_canary(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(2), "x": Evil(canary)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "posix.mkdir", "nothing of it was run")
    assert not canary.exists()
    open_checkpoint(tmp_path / "a.pt", weights_only=False)  # the canary is alive: trust does run it
    assert canary.exists()


def test_a_pickled_module_is_named_in_the_error_and_read_with_weights_only_false(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    torch.save({"model": module, "epoch": 7}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "pickled nn.Module", "Sequential", "state_dict()", "also names torch.nn.modules")
    tree = open_checkpoint(tmp_path / "a.pt", weights_only=False).tree
    assert tree["epoch"] == 7
    assert torch.equal(tree["model"]["0.weight"].read(), module.state_dict()["0.weight"])


def test_trust_does_not_help_a_file_that_is_broken(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "absent" / "canary"), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "weights_only=False raises FileNotFoundError", weights_only=False)
    refused(write_torch(tmp_path / "b.pt", b"\x80\x02.", {}), "more or fewer values than one", weights_only=False)


# ---------------------------------------------------------------- torch: malformed and malicious pickles

SIX = struct.pack("<6f", *range(6))
SHARED = b"\x80\x02]q\x00" + b"".join(b"0]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b"."
TUPLES = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
ENCODE = named("_codecs", "encode") + b"q\x00" + text("x" * 5000) + text("latin1") + b"\x86q\x01"
BAD_PICKLES: dict[str, tuple[bytes, list[str]]] = {
    "past_end": (tensor_pickle([2, 3], [3, 1], 1), ["'w'", "runs past storage '0' of 6", "reaches 6"]),
    "strides": (tensor_pickle([2, 3], [4, 1]), ["runs past", "reaches 6"]),
    "negative_stride": (tensor_pickle([2], [-1], 3), ["impossible"]),
    "negative_size": (tensor_pickle([-2], [1]), ["impossible"]),
    "negative_offset": (tensor_pickle([2], [1], -1), ["impossible"]),
    "overflow": (tensor_pickle([2**33, 2**33], [0, 0]), ["impossible"]),
    "overflow_stride": (tensor_pickle([2], [2**70]), ["impossible"]),
    "overflow_offset": (tensor_pickle([2], [1], 2**100), ["runs past"]),
    "rank": (tensor_pickle([2, 3], [1]), ["impossible"]),
    "numel": (tensor_pickle([2, 3], [3, 1], 0, 7), ["storage '0' of 7", "needs 28 bytes", "holds 24"]),
    "negative_numel": (tensor_pickle([2], [1], 0, -6), ["no size"]),
    "no_storage": (tensor_pickle([2], [1], key="../../etc"), ["storage '../../etc' has no member"]),
    "no_type": (
        tensor_pickle([2], [1], kind="UntypedStorage").replace(b"UntypedStorage", b"Size"),
        ["known type"],
    ),
    "tuple_size": (
        tensor_pickle([2], [1]).replace(numbers([2]), b"(" + TUPLES + b"t", 1),
        ["impossible"],
    ),
    "truncated": (tensor_pickle([2], [1])[:-1], ["truncated"]),
    "empty": (b"", ["truncated"]),
    "long_text": (b"\x80\x02X\xff\xff\xff\xff.", ["truncated"]),
    "long_bytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", ["truncated"]),
    "long_integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", ["integer of 2147483647 bytes"]),
    "memo_jump": (b"\x80\x02}r\xff\xff\xff\xff.", ["stores value 4294967295 after only 0 others"]),
    "no_memo": (b"\x80\x02h\x07.", ["never stored"]),
    "no_mark": (b"\x80\x02t.", ["mark"]),
    "underflow": (b"\x80\x02R.", ["empty stack"]),
    "two_values": (b"\x80\x02NN.", ["more or fewer values than one"]),
    "instance": (b"\x80\x02(ios\nmkdir\n.", ["opcode b'i'"]),
    "extension": (b"\x80\x02\x82\x01.", ["opcode b'\\x82'"]),
    "protocol": (b"\x80\x09N.", ["protocol 9"]),
    "unhashable": (b"\x80\x02}]Ns.", ["key of type list"]),
    "slow_key": (b"\x80\x02}" + TUPLES + b"Ns.", ["key of type tuple"]),
    "too_many_values": (SHARED, ["more than 2000000 values"]),
    "self": (b"\x80\x02]q\x00h\x00a.", ["contains itself"]),
    "deep": (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", ["nests deeper"]),
    "grows": (b"\x80\x02]" + ENCODE + b"00" + b"h\x00h\x01Ra" * 11_000 + b".", ["far more memory than its size"]),
    "bytearray": (
        b"\x80\x02" + named("builtins", "bytearray") + number(2**40) + b"\x85R.",
        ["does not take"],
    ),
    "call_value": (b"\x80\x02N)R.", ["calls a NoneType"]),
    "call_named": (b"\x80\x02" + named("builtins", "int") + b")R.", ["may name but not call"]),
    "state_of_name": (b"\x80\x02" + named("torch", "Size") + b"}b.", ["sets the state of a Global"]),
    "items_of_name": (b"\x80\x02" + named("torch", "Size") + b"NNs.", ["fills a dict"]),
    "arguments": (b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b")R.", ["does not take"]),
    "storage_int": (b"\x80\x02K\x01Q.", ["not a storage"]),
    "keys": (b"\x80\x02}K\x01Ns.", ["a key that is not a string"]),
    "text": (b"\x80\x02X\x01\0\0\0\xff.", ["not UTF-8"]),
    "sparse": (b"\x80\x02" + named("torch._utils", "_rebuild_sparse_tensor") + b".", ["sparse", "to_dense"]),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_bad_pickle_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    program, words = BAD_PICKLES[name]
    refused(write_torch(tmp_path / "w.pt", program, {"0": SIX}), *words)


def test_the_pickle_that_the_bad_ones_were_made_from_is_good(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_torch(tmp_path / "w.pt", tensor_pickle([3, 2], [1, 3]), {"0": SIX}, method)
        assert open_checkpoint(path).tree["w"].read().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_big_endian_archive_is_refused_in_words(tmp_path: Path) -> None:
    members = [("a/data.pkl", tensor_pickle([6], [1])), ("a/byteorder", b"big"), ("a/data/0", SIX)]
    refused(write_zip(tmp_path / "w.pt", members), "big-endian")


def legacy(keys: list[str], storage: bytes, facts: dict[str, Any] | None = None) -> bytes:
    stated = [0x1950A86A20F9469CFC6C, 1001, facts or {"little_endian": True}]
    return b"".join(pickle.dumps(value, 2) for value in stated) + (
        tensor_pickle([6], [1]) + pickle.dumps(keys, 2) + storage
    )


COUNT = struct.pack("<q", 6)
BAD_LEGACY = {
    "protocol": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2), ["unknown protocol"]),
    "endian": (legacy(["0"], COUNT + SIX, {"little_endian": False}), ["little-endian"]),
    "unlisted": (legacy([], COUNT + SIX), ["storage '0' is not in"]),
    "twice": (legacy(["0", "0"], COUNT + SIX), ["repeated"]),
    "unknown": (legacy(["1"], COUNT + SIX), ["'1', which is unknown"]),
    "count": (legacy(["0"], struct.pack("<q", 7) + SIX), ["has 7 elements, but the pickle says 6"]),
    "truncated": (legacy(["0"], COUNT + SIX[:-1]), ["truncated", "needs 24 bytes"]),
    "magic": (pickle.dumps(0x1950A86A20F9469CFC6D, 2), ["plain pickle of type int"]),
}


@pytest.mark.parametrize("name", BAD_LEGACY)
def test_a_bad_legacy_file_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    content, words = BAD_LEGACY[name]
    refused(put(tmp_path / "w.pt", content), *words)


# ---------------------------------------------------------------- zip and numpy

TWO = struct.pack("<2f", 1, 2)
GOOD = npy_bytes("'<f4'", "(2,)", TWO)
BAD_NPY: dict[str, tuple[bytes, list[str]]] = {
    "objects": (npy_bytes("'|O'", "(2,)", TWO), ["Python objects", "pickle", "nothing of it was run"]),
    "texts": (npy_bytes("'<U3'", "(2,)", TWO), ["holds texts"]),
    "byte_strings": (npy_bytes("'|S4'", "(2,)", TWO), ["byte strings"]),
    "dates": (npy_bytes("'<M8[s]'", "(1,)", TWO), ["dtype '<M8[s]'"]),
    "structured": (npy_bytes("[('a', '<f4')]", "(2,)", TWO), ["structured"]),
    "big_endian": (npy_bytes("'>f4'", "(2,)", TWO), ["big-endian"]),
    "long_double": (npy_bytes("'<f16'", "(2,)", TWO), ["torch does not have"]),
    "void": (npy_bytes("'|V3'", "(2,)", TWO), ["torch does not have"]),
    "size": (npy_bytes("'<f4'", "(3,)", TWO), ["needs 12 bytes", "holds 8"]),
    "size_overflow": (npy_bytes("'<f4'", f"({2**62}, {2**62})", TWO), ["impossible shape"]),
    "negative": (npy_bytes("'<f4'", "(-2,)", TWO), ["impossible shape"]),
    "no_tuple": (npy_bytes("'<f4'", "2", TWO), ["impossible shape"]),
    "order": (npy_bytes("'<f4'", "(2,)", TWO, "1"), ["order 1"]),
    "code": (npy_bytes("__import__('os')", "(2,)", TWO), ["header that is not descr"]),
    "deep": (npy_bytes("(" * 3000, "(2,)", TWO), ["header that is not descr"]),
    "version": (npy_bytes("'<f4'", "(2,)", TWO, version=9), ["unknown header version 9"]),
    "long_header": (npy_bytes("'" + "x" * 5000 + "'", "(2,)", TWO), ["the limit is 4096"]),
    "cut_header": (GOOD[:30], ["truncated inside its header"]),
    "cut_values": (GOOD[:-1], ["needs 8 bytes", "holds 7"]),
    "left_over": (GOOD + b"x", ["needs 8 bytes", "holds 9"]),
}


@pytest.mark.parametrize("name", BAD_NPY)
@pytest.mark.parametrize("container", ["npy", "npz", "npz_deflated"])
def test_a_bad_array_is_refused_for_its_reason(name: str, container: str, tmp_path: Path) -> None:
    content, words = BAD_NPY[name]
    if container == "npy":
        refused(put(tmp_path / "w.npy", content), *words)
    else:
        method = zipfile.ZIP_STORED if container == "npz" else zipfile.ZIP_DEFLATED
        members = [("good.npy", GOOD), ("bad.npy", content)]
        refused(write_zip(tmp_path / "w.npz", members, method), "'bad.npy'", *words)


def patched(content: bytes, old: bytes, new: bytes, last: bool = False) -> bytes:
    """The file with the first, or last, occurrence changed, which must be there."""
    at = content.rfind(old) if last else content.find(old)
    assert at >= 0 and len(old) == len(new)
    return content[:at] + new + content[at + len(old) :]


def directory_field(content: bytes, offset: int, form: str, value: int) -> bytes:
    """The file with one field of the directory's last entry overwritten."""
    at = content.rfind(b"PK\x01\x02") + offset
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


def zipped(method: int = zipfile.ZIP_STORED, *, raw_member: bytes = GOOD) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.npy", GOOD)
        archive.writestr("b.npy", raw_member)
    return buffer.getvalue()


ZEROS = npy_bytes("'<f4'", "(2000,)", bytes(8000))
DEFLATED = zipped(zipfile.ZIP_DEFLATED, raw_member=ZEROS)
BAD_ZIPS: dict[str, tuple[bytes, list[str]]] = {
    "cut": (zipped()[:-30], ["truncated or corrupt zip"]),
    "no_directory": (zipped()[:60], ["truncated or corrupt zip"]),
    "renamed": (patched(zipped(), b"b.npy", b"c.npy", last=True), ["'c.npy'", "disagrees"]),
    "encrypted": (directory_field(zipped(), 8, "<H", 1), ["encrypted"]),
    "method": (directory_field(zipped(), 10, "<H", 12), ["disagrees"]),
    "bzip2": (zipped(zipfile.ZIP_BZIP2), ["compression method 12"]),
    "outside": (directory_field(zipped(), 42, "<I", 2**31), ["outside the file"]),
    "over_end": (directory_field(zipped(), 20, "<I", 9999), ["truncated", "9999 bytes"]),
    "sizes": (directory_field(zipped(), 24, "<I", 3), ["uncompressed, but its two sizes differ"]),
    "bomb": (directory_field(DEFLATED, 24, "<I", 2**31), ["claims 2147483648", "more than deflate"]),
    "longer": (directory_field(DEFLATED, 24, "<I", len(ZEROS) + 4), ["'b.npy'", "bytes"]),
    "checksum": (directory_field(DEFLATED, 16, "<I", 1), ["'b.npy'", "checksum differs"]),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_a_bad_zip_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    content, words = BAD_ZIPS[name]
    refused(put(tmp_path / "w.npz", content), *words)


def test_a_deflated_member_that_grows_past_its_size_is_stopped(tmp_path: Path) -> None:
    content = zipped(zipfile.ZIP_DEFLATED, raw_member=npy_bytes("'<f4'", "(1000,)", bytes(8000)))
    right = len(npy_bytes("'<f4'", "(1000,)", bytes(4000)))
    refused(put(tmp_path / "w.npz", directory_field(content, 24, "<I", right)), "'b.npy'", "does not inflate to")


def test_members_twice_or_foreign_are_refused(tmp_path: Path) -> None:
    refused(write_zip(tmp_path / "a.npz", [("w.npy", GOOD), ("w.npy", GOOD)]), "the member 'w.npy' twice")
    refused(write_zip(tmp_path / "b.npz", [("w.npy", GOOD), ("x.txt", b"x")]), "not arrays", "x.txt")
    refused(write_zip(tmp_path / "c.zip", [("readme", b"x")]), "torch and numpy do not write", "readme")
    refused(write_zip(tmp_path / "d.zip", []), "zip archive of 0 members")


# ---------------------------------------------------------------- shards


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors", {"format": "pt"})
    save_file({"c": torch.full((5,), 7.0)}, folder / "two.safetensors")
    places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    index = {"metadata": {"total_size": 40}, "weight_map": places}
    return put(folder / "model.safetensors.index.json", json.dumps(index)), index


def test_an_index_reads_as_one_checkpoint_in_file_order(tmp_path: Path) -> None:
    path, _ = sharded(tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == "safetensors" and set(checkpoint.tree) == {"a", "b", "c"}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.tree["c"].read().tolist() == [7.0] * 5
    positions = [leaf.position for leaf in checkpoint.tree.values()]
    assert positions == sorted(positions) and len(set(positions)) == 3


def test_an_index_of_torch_shards_and_a_linked_folder_read_alike(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    index = put(tmp_path / "i.index.json", json.dumps({"weight_map": {"a": "one.bin"}}))
    assert open_checkpoint(index).container == "torch"
    (tmp_path / "snapshot").mkdir()
    for name in ("one.bin", "i.index.json"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / name)
    assert set(open_checkpoint(tmp_path / "snapshot" / "i.index.json").tree) == {"a"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/x", "a/b", "a\\b", "", ".", "..", "c:x", 3, None, ["x"]])
def test_a_shard_name_that_leads_elsewhere_is_refused(name: Any, tmp_path: Path) -> None:
    index = put(tmp_path / "i.index.json", json.dumps({"weight_map": {"w": name}}))
    refused(index, "'w'", "not a plain file name")


def change(index: dict[str, Any], **places: str | None) -> str:
    merged = {**index["weight_map"], **places}
    return json.dumps({"weight_map": {key: place for key, place in merged.items() if place is not None}})


def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path: Path) -> None:
    path, index = sharded(tmp_path)
    put(path, change(index, d="absent.safetensors"))
    refused(path, "absent.safetensors", "does not exist")
    put(path, change(index, b=None))
    refused(path, "'b' is in shard 'one.safetensors'", "the index does not list it")
    put(path, change(index, d="two.safetensors"))
    refused(path, "'d' is not in its shard 'two.safetensors'")
    put(path, change(index, b="two.safetensors"))
    error = refused(path, "'b' is not in its shard", "the index has it in 'two.safetensors'")
    assert len(error.faults) == 2
    save_file({"c": torch.ones(5), "a": torch.ones(2)}, tmp_path / "two.safetensors")
    put(path, json.dumps(index))
    refused(path, "'a' is in shard 'two.safetensors'", "one.safetensors")
    torch.save({"c": torch.ones(5)}, tmp_path / "two.safetensors")
    refused(path, "several kinds")
    put(tmp_path / "two.safetensors", json.dumps(index))
    refused(path, "'two.safetensors' (1 keys)", "JSON file")
    put(path, '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    refused(path, "'a' twice")


def test_a_shard_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path, _ = sharded(tmp_path / "in")
    (tmp_path / "in" / "two.safetensors").rename(tmp_path / "two.safetensors")
    (tmp_path / "in" / "two.safetensors").symlink_to(tmp_path / "two.safetensors")
    refused(path, "'two.safetensors' is a link")


# ---------------------------------------------------------------- mutations


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four bit flips, near the front, the end or anywhere; or a cut, or a repeat."""
    changed = bytearray(content)
    choice = rng.random()
    if choice < 0.15:
        return content[: rng.randrange(len(content))]
    if choice < 0.25:
        at, size = rng.randrange(len(content)), rng.randrange(1, 40)
        return content[:at] + content[at : at + size] * 2 + content[at + size :]
    for _ in range(rng.randrange(1, 5)):
        where = rng.choice([rng.randrange(len(changed)), rng.randrange(min(400, len(changed)))])
        at = rng.choice([where, len(changed) - 1 - where])
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_mutated_files_read_right_or_raise_checkpoint_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save(kind, path)
    content, rng = path.read_bytes(), random.Random(f"keymap {kind}")
    refusals = []
    for _ in range(int(os.environ.get("KEYMAP_MUTATIONS", "300"))):
        put(path, mutated(content, rng))
        try:
            read_all(path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert [each for each in refusals if "cannot be read (" in each] == []


PIECES = [
    *(bytes([code]) for code in b"(.012NJKMGUTXCB]laetd}sub)RqhrjcQ\x80\x81\x85\x86\x87\x88\x89"),
    *(bytes([code]) for code in b"\x8a\x8f\x90\x91\x92\x93\x94"),
    *(text(word) for word in ("storage", "cpu", "0", "<", "f4", "latin1", "os", "system")),
    *(number(value) for value in (0, 1, 3, -1, 2**40)),
    *(b"h" + bytes([index]) for index in range(4)),
    *(b"q" + bytes([index]) for index in range(4)),
    *(
        named(*name.rsplit(".", 1))
        for name in (
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3",
            "torch._utils._rebuild_parameter",
            "torch._tensor._rebuild_from_type_v2",
            "torch.FloatStorage",
            "torch.Tensor",
            "torch.Size",
            "torch.device",
            "torch.float16",
            "collections.OrderedDict",
            "collections.defaultdict",
            "argparse.Namespace",
            "pathlib.PosixPath",
            "builtins.set",
            "builtins.bytearray",
            "builtins.complex",
            "builtins.slice",
            "builtins.int",
            "_codecs.encode",
            "numpy.dtype",
            "numpy.ndarray",
            "numpy._core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.numeric._frombuffer",
            "torch.jit._pickle.restore_type_tag",
        )
    ),
    named("torch", "Size") + b")R",
    named("numpy", "dtype") + text("f4") + b"\x85R",
    named("argparse", "Namespace") + b")\x81}b",
    tensor_pickle([2, 3], [3, 1])[2:-1],
]


def test_random_pickle_programs_end_in_a_value_or_a_pickle_fault() -> None:
    rng, ends = random.Random("keymap programs"), collections.Counter[str]()
    for _ in range(int(os.environ.get("KEYMAP_MUTATIONS", "300")) * 20):
        program = b"\x80\x02" + b"".join(rng.choices(PIECES, k=rng.randrange(2, 12))) + b"."
        try:
            run_pickle(program, 0, AllowedGlobals(scripted=True))
            ends["value"] += 1
        except BadPickleError:
            ends["fault"] += 1
    assert ends["value"] > 10 and ends["fault"] > 10, ends


@pytest.mark.parametrize("new", [True, False])
def test_the_error_for_a_pickled_module_names_it_in_either_container(new: bool, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    refused(tmp_path / "a.pt", "pickled nn.Module", "torch.nn.modules.linear.Linear")
    tree = open_checkpoint(tmp_path / "a.pt", weights_only=False).tree
    assert {key: leaf.shape for key, leaf in tree.items()} == {"weight": (2, 3), "bias": (2,)}


UNREAD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta device"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_tensor_that_is_not_plain_is_refused_in_words(name: str, tmp_path: Path) -> None:
    make, word = UNREAD[name]
    torch.save({"w": make()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", word, "plain dense tensor")


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.npy", GOOD)
    local = inner.getvalue()[: inner.getvalue().find(b"PK\x01\x02")]
    write_zip(tmp_path / "a.npz", [("a.npy", GOOD + local), ("b.npy", GOOD)])
    content = (tmp_path / "a.npz").read_bytes()
    put(tmp_path / "a.npz", directory_field(content, 42, "<I", content.find(local)))
    refused(tmp_path / "a.npz", "'a.npy' and 'b.npy' overlap")


def _cache(monkeypatch, held):
    """The system's page cache as a test wants it; returns the list of pages that are given back."""
    import keymap.read.page_cache as page_cache

    told = []

    def given_back(handle, start, size, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            told.append(start)

    monkeypatch.setattr(page_cache, "_is_cached", lambda handle, page: held)
    monkeypatch.setattr(page_cache.os, "posix_fadvise", given_back)
    return told


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on its page cache")
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_pages_of_headers_that_were_not_in_the_cache_are_given_back(tmp_path, monkeypatch, old):
    """Else each would divide the tensor around it, and a cold load would read in small pieces."""
    state = {f"w{n}": torch.full((5000,), float(n)) for n in range(5)}
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    told = _cache(monkeypatch, held=False)
    tree = open_checkpoint(path).tree
    blocks = [lazy.values for lazy in tree.values()]
    headers = {block.start // mmap.PAGESIZE * mmap.PAGESIZE for block in blocks}
    assert len(set(told)) == len(told), "no page twice"
    assert all({page, page - mmap.PAGESIZE} & set(told) for page in headers), "a header lies before its values"
    assert all(torch.equal(tree[key].read(), value) for key, value in state.items())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on its page cache")
@pytest.mark.parametrize("held", [True, None], ids=["cached", "the system does not say"])
def test_other_pages_stay_in_the_cache(tmp_path, monkeypatch, held):
    torch.save({f"w{n}": torch.ones(5000) for n in range(5)}, tmp_path / "a.pt")
    told = _cache(monkeypatch, held=held)
    open_checkpoint(tmp_path / "a.pt")
    assert told == []


def test_a_system_without_these_calls_reads_the_same(tmp_path, monkeypatch):
    import keymap.read.page_cache as page_cache

    torch.save({"w": torch.arange(5000.0)}, tmp_path / "a.pt")
    monkeypatch.delattr(page_cache.os, "posix_fadvise", raising=False)
    assert torch.equal(open_checkpoint(tmp_path / "a.pt").tree["w"].read(), torch.arange(5000.0))


def test_places_outside_the_file_are_no_error(tmp_path, monkeypatch):
    from keymap.read.page_cache import scattered

    torch.save({"w": torch.ones(3000)}, tmp_path / "a.pt")
    _cache(monkeypatch, held=False)
    file = SourceFile(tmp_path / "a.pt")
    with scattered(file, [(-1, 0), (0, 2), (file.size - 1, file.size + 9), (10 * file.size, 11 * file.size)]):
        assert file.data[:2] == b"PK"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on its page cache")
def test_a_header_that_lies_in_two_pages_gives_both_back(tmp_path, monkeypatch):
    from keymap.read.page_cache import scattered

    torch.save({"w": torch.ones(3 * mmap.PAGESIZE)}, tmp_path / "a.pt")
    told, page = _cache(monkeypatch, held=False), mmap.PAGESIZE
    with scattered(SourceFile(tmp_path / "a.pt"), [(page - 2, page + 30), (2 * page, 2 * page + 30)]):
        pass
    assert sorted(told) == [0, page, 2 * page]


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_an_opened_file_keeps_one_descriptor(tmp_path, old):
    """A checkpoint may have more shards than half of the descriptors that a process gets."""
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("the system does not list a process's descriptors")
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3000)}, path, _use_new_zipfile_serialization=not old)
    opened = open_checkpoint(path)
    links = [os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink() and os.path.lexists(fd)]
    assert links.count(str(path.resolve())) == 1
    del opened
