"""Files that were made to do harm: no code of them runs, and their cost is bounded by their size.

`test_read` has one file for each kind of damage, and fuzz/ mutants of real files.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import bounded
from fuzz.seeds import TINY
from hostile_files import (
    call_pickle,
    entry,
    named,
    npy_bytes,
    number,
    safetensors_bytes,
    tensor_pickle,
    text,
    write_torch,
    write_zip,
)
from peers import openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file
from test_read import put, read_all, refused

import keymap
from keymap.errors import CheckpointError, UnsafeCheckpointError
from keymap.read import lazy, open_checkpoint
from keymap.read.globals_allowed import _CALLS, DTYPES, NAMES_ONLY, STORAGE_DTYPES, UNREAD, AllowedGlobals
from keymap.read.unpickle import BadPickleError, run_pickle

MB = 1 << 20
START = b"\x80\x02"


def model() -> torch.nn.Module:
    return openclip.clip(seed=5, **TINY)


def state() -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in openclip.clip(seed=1, **TINY).state_dict().items()}


def refuses(path: Path, *words: str, **options: Any) -> None:
    """A load is refused in these words, cheaply, and the model stays what it was."""
    target = model()
    before = bits(target)
    size = path.stat().st_size if path.is_file() else 0
    with pytest.raises(keymap.KeymapError) as caught, bounded(size):
        keymap.load_checkpoint(target, path, **options)
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert [word for word in words if word not in message] == [], message[:2000]
    assert len(str(caught.value)) < 20_000
    assert "cannot be read (" not in message
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    assert_unchanged(target, before)


# --- nothing runs: names ---

GADGETS = [
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "builtins.getattr",
    "builtins.setattr",
    "builtins.open",
    "builtins.map",
    "builtins.type",
    "builtins.super",
    "builtins.globals",
    "builtins.breakpoint",
    "builtins.print",
    "builtins.input",
    "builtins.memoryview",
    "os.system",
    "os.popen",
    "os.execv",
    "os.remove",
    "os.putenv",
    "posix.system",
    "nt.system",
    "posixpath.join",
    "subprocess.Popen",
    "subprocess.check_output",
    "pty.spawn",
    "commands.getoutput",
    "shutil.rmtree",
    "socket.create_connection",
    "sys.exit",
    "sys.setrecursionlimit",
    "sys.modules",
    "importlib.import_module",
    "importlib.reload",
    "imp.load_source",
    "runpy.run_path",
    "pkgutil.resolve_name",
    "pydoc.locate",
    "pydoc.pipepager",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.itemgetter",
    "functools.partial",
    "functools.reduce",
    "itertools.starmap",
    "pickle.loads",
    "_pickle.loads",
    "pickle.Unpickler",
    "copyreg._reconstructor",
    "copyreg.add_extension",
    "copy_reg._reconstructor",
    "marshal.loads",
    "types.FunctionType",
    "types.CodeType",
    "types.ModuleType",
    "code.interact",
    "bdb.Bdb",
    "pdb.run",
    "cProfile.run",
    "profile.run",
    "timeit.timeit",
    "trace.Trace",
    "doctest.debug_script",
    "idlelib.run.main",
    "lib2to3.pgen2.pgen.ParserGenerator",
    "ctypes.CDLL",
    "ctypes.string_at",
    "webbrowser.open",
    "asyncio.run",
    "multiprocessing.Process",
    "threading.Thread",
    "signal.raise_signal",
    "atexit.register",
    "gc.get_objects",
    "codecs.decode",
    "_codecs.decode",
    "zipimport.zipimporter",
    "logging.config.dictConfig",
    "urllib.request.urlopen",
    "ssl.get_server_certificate",
    "pathlib.Path.write_text",
    "pathlib.PosixPath.unlink",
    "tempfile.mktemp",
    "sqlite3.connect",
    "xml.sax.parse",
    "yaml.unsafe_load",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "torch.storage._load_from_bytes",
    "torch.utils.collect_env.run",
    "torch.utils.bottleneck.__main__.run_cprofile",
    "torch.utils._config_module.load_config",
    "torch.package.PackageImporter",
    "torch._inductor.codecache.compile_file",
    "torch.ops.load_library",
    "torch.classes.load_library",
    "torch.fx._symbolic_trace.wrap",
    "torch.nn.Module",
    "torch.nn.Linear",
    "torch.nn.modules.linear.Linear",
    "torch.distributed.rpc.rpc_sync",
    "torch.serialization.load",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._dynamo.guards.check",
    "torch._tensor._rebuild_from_type",
    "torch.utils.cpp_extension.load",
    "torch.testing._internal.common_utils.TestCase",
    "torch.FloatTensor",
    "torch.Storage",
    "torch.typename",
    "torch.from_file",
    "torch.frombuffer",
    "torch.empty",
    "torch.set_printoptions",
    "numpy.load",
    "numpy.fromfile",
    "numpy.memmap",
    "numpy.frompyfunc",
    "numpy.vectorize",
    "numpy.testing._private.utils.runstring",
    "numpy.f2py.compile",
    "numpy.core.multiarray.fromfile",
    "numpy.ctypeslib.load_library",
    "numpy.random._pickle.__randomstate_ctor",
    "collections.namedtuple",
    "collections.OrderedDict.fromkeys",
    "collections.OrderedDict.__class__",
    "collections.OrderedDict.update",
    "collections.__builtins__",
    "torch._utils.torch.load",
    "torch.Size.__class__",
    "argparse.Namespace.__init__.__globals__",
    "argparse.FileType",
    "builtins.dict.update",
    "builtins.object.__reduce_ex__",
    "builtins.str.join",
    "builtins.list.append",
]


@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL"])
def test_no_name_that_can_run_code_is_allowed(how: str) -> None:
    for full in GADGETS:
        parts = full.split(".")
        for cut in range(1, len(parts)):  # the dots may be in the module or in the name
            module, name = ".".join(parts[:cut]), ".".join(parts[cut:])
            pushed = named(module, name) if how == "GLOBAL" else text(module) + text(name) + b"\x93"
            with pytest.raises(BadPickleError):
                run_pickle(b"\x80\x04" + pushed + text("x") + b"\x85R.", 0, AllowedGlobals())


WATCHED = (
    "import",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "pickle.",
    "marshal.",
    "ctypes.",
    "socket.",
    "shutil.",
    "code.",
)
_events: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and event.startswith(WATCHED):
        _events.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_hook)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail where the interpreter reports an import, an execution, a process, an unpickled class."""
    global _events
    _events = []
    try:
        yield
    finally:
        seen, _events = _events, None
    assert seen == []


class Odd(collections.OrderedDict):  # type: ignore[type-arg]
    def __reduce_ex__(self, protocol: Any) -> Any:
        return os.system, ("true",)


class Stated:
    def __setstate__(self, stated: Any) -> None:
        raise AssertionError("run")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


class Reduced:
    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> Any:
        return self.reduction


class Slotted:
    __slots__ = ("a",)


def _slotted() -> Slotted:
    made = Slotted()
    made.a = 1
    return made


CARRIERS: dict[str, Callable[[], Any]] = {
    "a call": lambda: Reduced(os.system, ("true",)),
    "a call in a dict's key": lambda: {Reduced(os.system, ("true",)): 1},
    "a state": lambda: Reduced(Stated, (), {"a": 1}),
    "a state of slots": lambda: _slotted(),
    "list items": lambda: Reduced(collections.UserList, (), None, iter([1])),
    "dict items": lambda: Reduced(Stated, (), None, None, iter([("a", 1)])),
    "a state setter": lambda: Reduced(Stated, (), {"a": 1}, None, None, os.system),
    "a subclass of a dict": lambda: Odd(a=1),
    "a file type": lambda: argparse.FileType("w"),
    "an exception": lambda: ValueError("x"),
    "a class": lambda: pickle.PicklingError,
    "an object array": lambda: np.array([Reduced(os.system, ("true",))], dtype=object),
    "an object scalar": lambda: Reduced(np._core.multiarray.scalar, (np.dtype("O"), pickle.dumps(1))),
    "a partial": lambda: __import__("functools").partial(os.system, "true"),
}
NAMED_ONLY = ("a class", "an object scalar")  # they call nothing, so they are skipped


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", CARRIERS)
def test_no_way_of_pickling_runs_anything(name: str, protocol: int, tmp_path: Path) -> None:
    """The interpreter itself reports imports and executions; there is none, in either container."""
    open_checkpoint(write_torch(tmp_path / "warm.pt", tensor_pickle([2, 3], [3, 1]), {"0": bytes(24)}))
    for new in (True, False):
        path = tmp_path / f"{new}.pt"
        torch.save(
            {"w": torch.ones(2), "x": CARRIERS[name]()},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=new,
        )
        if name in NAMED_ONLY:
            with nothing_runs():
                read_all(path)
            continue
        with nothing_runs(), pytest.raises(CheckpointError) as caught:
            read_all(path)
        assert "cannot be read (" not in str(caught.value)


@pytest.mark.parametrize(
    "code", ["\x82\x01", "\x83\x01\x00", "\x84\x01\x00\x00\x00", "(ios\nsystem\n", "(o", "Pabc\n", "\x97", "\x98"]
)
def test_opcodes_that_reach_out_are_unknown(code: str) -> None:
    """The extension registry, instances by name, outside references as text, and buffers out of band."""
    with pytest.raises(BadPickleError, match=r"torch\.save never writes opcode"):
        run_pickle(b"\x80\x05" + code.encode("latin-1") + b".", 0, AllowedGlobals())


VALUES = [
    b"N", b"\x88", b"]", b"}", b")", number(0), number(-1), number(2**40), b"G" + struct.pack(">d", float("nan")),
    text(""), text("f4"), text("x" * 300), b"C\x04abcd", b"(" + number(2**62) * 3 + b"t", b"]" + text("ab") + b"a",
    named("torch", "Size"), named("torch", "FloatStorage"), named("torch._utils", "_rebuild_tensor_v2"),
    named("numpy", "dtype") + text("O8") + b"\x85R", named("numpy", "dtype") + text("f4") + b"\x85R",
    named("argparse", "Namespace") + b")R", tensor_pickle([6], [1])[3:-2].partition(b"w")[2],
    b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + number(6) + b"tQ",
]  # fmt: skip


def test_allowed_names_called_with_anything_give_a_value_or_a_fault() -> None:
    """Every name that may be called, with every one and two arguments and some of more; then given any state."""
    rng, ends = random.Random("keymap arguments"), collections.Counter[str]()
    for full in [*_CALLS, *NAMES_ONLY, *DTYPES, *(f"torch.{name}" for name in STORAGE_DTYPES), *UNREAD]:
        module, _, name = full.rpartition(".")
        several = [(value,) for value in VALUES] + [(a, b) for a in VALUES for b in VALUES]
        several += [tuple(rng.choices(VALUES, k=rng.randrange(3, 9))) for _ in range(150)]
        for arguments in [(), *several]:
            call = named(module, name) + b"(" + b"".join(arguments) + b"t" + rng.choice([b"R", b"\x81", b"}\x92"])
            state = rng.choice(
                [b"", b"", rng.choice(VALUES) + b"b", rng.choice(VALUES) + rng.choice(VALUES) + b"\x86b"]
            )
            try:
                run_pickle(START + call + state + b".", 0, AllowedGlobals(scripted=rng.random() < 0.5))
                ends["value"] += 1
            except BadPickleError:
                ends["fault"] += 1
    assert ends["value"] > 1000 and ends["fault"] > 1000, ends


STORAGE = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + number(6)
REFERENCES = {
    "within itself": b"(" + text("storage") + STORAGE + b"tQ" + text("0") + text("cpu") + number(6) + b"tQ",
    "as its own key": b"("
    + text("storage")
    + named("torch", "FloatStorage")
    + STORAGE
    + b"tQ"
    + text("cpu")
    + number(6)
    + b"tQ",
    "of a view past its end": STORAGE + b"(" + text("v") + number(5) + number(2) + b"ttQ",
    "of a view below zero": STORAGE + b"(" + text("v") + number(-5) + number(2) + b"ttQ",
    "of a view in a view": STORAGE + b"(" + text("v") + b"(tK\x00ttQ",
    "to a module": b"(" + text("module") + named("torch", "Size") + text("f.py") + text("source") + b"tQ",
    "without end": STORAGE.replace(number(6), number(2**500)) + b"tQ",
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_hostile_storage_reference_is_refused(name: str, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.pt", START + b"}" + text("w") + REFERENCES[name] + b"s.", {"0": bytes(24)})
    refused(path)


def test_torchscript_hidden_in_another_folder_is_not_handed_to_torch(tmp_path: Path) -> None:
    """torch.load takes the folder of the first member for the archive's; it would run what lies there."""
    canary = tmp_path / "canary"
    members = [("b/constants.pkl", b"\x80\x02)."), ("a/data.pkl", call_pickle("os", "mkdir", str(canary)))]
    path = write_zip(tmp_path / "a.pt", members)
    with pytest.raises(UnsafeCheckpointError, match=r"os\.mkdir"):
        open_checkpoint(path, weights_only=False)
    assert not canary.exists()


def test_weights_only_false_matters_only_for_refused_files(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pt")
    with nothing_runs():
        open_checkpoint(tmp_path / "a.pt", weights_only=False)


# --- pickles that grow, or that take for ever ---

COPIES = b"]\x94(" + b"".join(number(n) for n in range(4000)) + b"e"
SHARED = b"".join(b"(h%ch%cl\x94" % (i, i) for i in range(1, 40))
GROWING = {
    "lists": START + b"N" + b"]" * (2 * MB) + b".",
    "dicts": START + b"N" + b"}" * (2 * MB) + b".",
    "sets": b"\x80\x04N" + b"\x8f" * (2 * MB) + b".",
    "frozen sets": b"\x80\x04N" + b"(\x91" * MB + b".",
    "marks": START + b"N" + b"(" * MB + b".",
    "tuples": START + b"N" + b"\x85" * (2 * MB) + b".",
    "pairs in a list": START + b"}" + text("a") + b"(" + b"N\x85" * MB + b"ls.",
    "integers": START + b"N" + b"M\xff\x7f" * MB + b".",
    "short texts": b"\x80\x04N" + b"\x8c\x02ab" * MB + b".",
    "stored values": b"\x80\x04N" + b"\x94" * (2 * MB) + b".",
    "copies of a set": START + COPIES + named("builtins", "set") + b"\x94" + b"h\x01h\x00\x85R" * 20_000 + b".",
    "copies of a dict": START
    + b"}\x94("
    + b"".join(number(n) + b"N" for n in range(4000))
    + b"u"
    + named("collections", "OrderedDict")
    + b"\x94"
    + b"h\x01h\x00\x85R" * 20_000
    + b".",
    "the text of a deeply shared tuple": START + b"]\x940" + b"h\x00\x94" + SHARED
    + named("torch.serialization", "_get_layout") + b"h\x27\x85R.",
    "a view of many axes, often": START + COPIES + named("torch._tensor",
        "_rebuild_from_type_v2") + b"\x94" + b"h\x01h\x00\x85R" * 10 + b".",
    "values stored far apart": START + b"N" + b"".join(b"r" + struct.pack("<I", (n << 20) % 2**32) for n in range(1,
        4000)) + b".",
    "keys of one hash": START + b"}(" + b"".join(number(n * (2**61 - 1)) + b"N" for n in range(1, 40_000)) + b"u.",
    "keys that probe each other": START + b"}(" + b"".join(number(n << 40) + b"N" for n in range(60_000)) + b"u.",
    "tuples as keys": START + b"}(" + b"".join(number(n) + b"\x85N" for n in range(60_000)) + b"u.",
    "a set of one hash": b"\x80\x04\x8f(" + b"".join(number(n * (2**61 - 1)) for n in range(1, 40_000)) + b"\x90.",
    "a name of a megabyte": b"\x80\x04" + text("x" * MB) + text("y") + b"\x93.",
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_a_pickle_costs_no_more_than_its_size_allows(name: str, tmp_path: Path) -> None:
    path = write_torch(tmp_path / "a.pt", GROWING[name], {})
    with bounded(path.stat().st_size):
        refused(path)


def test_a_long_name_above_many_values_costs_nothing(tmp_path: Path) -> None:
    """Messages name the path to a value; it is not built for each value."""
    inner = b"(" + b"]" * 50_000 + b"l"
    path = write_torch(tmp_path / "a.pt", START + b"}" + text("x" * MB) + inner + b"s.", {})
    with bounded(path.stat().st_size):
        open_checkpoint(path)
    refuses(path, "none of them is a tensor")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_hundred_thousand_tiny_tensors_are_read(ending: str, tmp_path: Path) -> None:
    many = {f"visual.transformer.resblocks.{n}.attn.k.weight": torch.ones(2) for n in range(100_000)}
    path = tmp_path / f"a.{ending}"
    if ending == "npz":
        np.savez(path, **{key: value.numpy() for key, value in many.items()})
    else:
        save_file(many, path)
    assert len(open_checkpoint(path).tree) == len(many)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller limit on tensors, so that a file beyond it takes no time to make."""
    monkeypatch.setattr(lazy, "FEW", 20_000)


@pytest.mark.usefixtures("few")
def test_twenty_thousand_tensors_of_one_element_are_read_and_more_refused(tmp_path: Path) -> None:
    torch.save({f"layer.{n}.w": torch.ones(1) for n in range(12_000)}, tmp_path / "a.pt")
    with bounded((tmp_path / "a.pt").stat().st_size):
        assert len(open_checkpoint(tmp_path / "a.pt").tree) == 12_000
    one = torch.ones(1)
    torch.save({f"{n}": one for n in range(25_000)}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "")
    torch.save({"a": torch.ones(1), "vocabulary": {f"token{n}": n for n in range(50_000)}}, tmp_path / "c.pt")
    assert len(open_checkpoint(tmp_path / "c.pt").tree["vocabulary"]) == 50_000


def test_a_view_that_repeats_its_elements_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({**state(), "positional_embedding": torch.ones(1).expand(2**40, 4)}, tmp_path / "a.pt")
    refuses(tmp_path / "a.pt", "'positional_embedding'", "17592186044416 bytes of memory")
    torch.save({**state(), "visual.ln_pre.weight": torch.ones(1).expand(8)}, tmp_path / "b.pt")
    keymap.load_checkpoint(model(), tmp_path / "b.pt")


# --- headers and counts ---

HEADERS: dict[str, tuple[bytes, list[str]]] = {
    "a header of three megabytes": (safetensors_bytes('{"a":[' + "[]," * MB + "[]]}", b""), ["header of",
        "bytes of memory"]),
    "lists in a header": (safetensors_bytes('{"a":[' + "[]," * (600_000) + "[]]}", b""), ["bytes of memory"]),
    "thirty thousand tensors": (
        safetensors_bytes({f"{n}": entry("F32", [0], 0, 0) for n in range(30_000)}, b""),
        ["30000 or more tensors", "limit"],
    ),
    "a key of a megabyte": (safetensors_bytes({"k" * MB: entry("F32", [0], 0, 0)}, b""), ["1048576 characters",
        "rename the key"]),
    "a wrong key of a megabyte": (safetensors_bytes({"k" * MB: 3}, b""), ["kkk...kkk", "needs dtype"]),
    "a key twice of a megabyte": (safetensors_bytes('{"' + "k" * MB + '":1,"' + "k" * MB + '":1}', b""), ["kkk...kkk",
        "twice"]),
    "a key that moves the cursor": (safetensors_bytes({"a\x1b[2Jb": entry("F32", [0], 0, 0)}, b""), ["unprintable",
        "\\x1b"]),
    "a key that runs backwards": (safetensors_bytes({"a\u202eb": entry("F32", [0], 0, 0)}, b""), ["unprintable",
        "\\u202e"]),
    "half a character": (safetensors_bytes('{"\\ud800":' + json.dumps(entry("F32", [0], 0, 0)) + "}", b""),
        ["unprintable"]),
    "a text of a megabyte for a dtype": (safetensors_bytes({"w": entry("F" * MB, [0], 0, 0)}, b""), ["unknown dtype"]),
    "a number of ten thousand digits": (safetensors_bytes('{"w":' + "9" * 10_000 + "}", b""), ["not valid JSON"]),
    "a shape of thousands": (safetensors_bytes({"w": entry("F32", [1] * 100_000, 0, 4)}, bytes(4)),
        ["impossible shape"]),
    "metadata that nests": (safetensors_bytes('{"__metadata__":' + '{"a":' * 50_000 + "}" * 50_001, b""),
        ["not valid JSON"]),
}  # fmt: skip


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(name: str, tmp_path: Path) -> None:
    content, words = HEADERS[name]
    refuses(put(tmp_path / "w.safetensors", content), *words)


def test_axes_of_a_tensor_without_elements_are_not_walked(tmp_path: Path) -> None:
    """2**40 rows of no element take no byte; no rule may make a key, or a number, of each."""
    flat = {"params/img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": entry("F32", [2**40, 0], 0, 0)}
    flat["params/img/embedding/kernel"] = entry("F32", [0, 2**40, 3, 4], 0, 0)
    refuses(put(tmp_path / "w.safetensors", safetensors_bytes(flat, b"")))
    whole = {
        **state(),
        "positional_embedding": torch.empty(2**40, 0),
        "visual.positional_embedding": torch.empty(0, 2**40),
    }
    save_file(whole, tmp_path / "b.safetensors")
    refuses(tmp_path / "b.safetensors", "positional_embedding")


# --- archives ---


def _zeros(count: int) -> bytes:
    return npy_bytes("'<f4'", f"({count},)", b"") + bytes(4 * count)


def _archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    return out.getvalue()


def _ends(content: bytes, **fields: int) -> bytes:
    """The archive with fields of its last record overwritten."""
    at = content.rfind(b"PK\x05\x06")
    offsets = {"count": (10, "<H"), "size": (12, "<I"), "start": (16, "<I"), "comment": (20, "<H")}
    changed = bytearray(content)
    for name, value in fields.items():
        offset, form = offsets[name]
        struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


TWO = _archive(("a.npy", _zeros(3)), ("b.npy", _zeros(5)), method=zipfile.ZIP_STORED)
ARCHIVES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "a bomb of zeros": (lambda: _archive(("w.npy", _zeros(30 * MB))), ["w.npy", "bytes of memory, far more"]),
    "a pickle of zeros": (
        lambda: _archive(("a/data.pkl", START + b"N" * (100 * MB) + b".")),
        ["data.pkl", "bytes of memory, far more"],
    ),
    "a pickle that grows when it is run": (
        lambda: _archive(("a/data.pkl", START + b"]" * (15 * MB) + b".")),
        ["far more memory than its size"],
    ),
    "code of zeros": (
        lambda: _archive(
            ("a/data.pkl", START + named("__torch__.m", "M") + b")\x81}" + text("w") + b"Nsb."),
            ("a/code/__torch__/m.py", b" " * (100 * MB)),
        ),
        ["m.py", "bytes of memory, far more"],
    ),
    "twenty-five thousand members": (
        lambda: _archive(*((f"{n}.npy", b"") for n in range(25_000)), method=zipfile.ZIP_STORED),
        ["25000 or more tensors"],
    ),
    "a directory of gigabytes": (lambda: _ends(TWO, size=2**31), ["corrupt zip"]),
    "a directory before the file": (lambda: _ends(TWO, start=2**31), ["outside the file"]),
    "a comment that is not there": (lambda: _ends(TWO, comment=2**15), ["no known format"]),
    "a record of zip64 that lies": (
        lambda: _ends(TWO, count=0xFFFF, size=0xFFFFFFFF, start=0xFFFFFFFF),
        ["corrupt zip"],
    ),
    "a member without a name": (lambda: TWO.replace(b"b.npy", b"\0.npy"), []),
    "a name of thousands": (lambda: _archive(("n" * 5000 + ".npy", _zeros(1))), ["name of 5004 characters"]),
    "a name that leads out": (
        lambda: _archive(("a/data.pkl", tensor_pickle([6], [1], key="../../../etc/passwd")), ("../../etc/x", b"x")),
        ["has no member a/data/../../../etc/passwd"],
    ),
    "a name that moves the cursor": (lambda: _archive(("\x1b[2J.npy", _zeros(1))), ["unprintable"]),
    "a name of another case": (lambda: _archive(("A/DATA.PKL", b"")), ["torch and numpy do not write"]),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_zip_archive_is_refused(name: str, tmp_path: Path) -> None:
    make, words = ARCHIVES[name]
    refuses(put(tmp_path / "w.npz", make()), *words)


def test_a_zip64_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive, archive.open("w.npy", "w", force_zip64=True) as member:
        member.write(_zeros(3))
    assert open_checkpoint(tmp_path / "w.npz").tree["w"].read().tolist() == [0, 0, 0]


def _scripted(attributes: bytes) -> bytes:
    made = named("__torch__", "M") + b")\x81}(" + attributes + b"ub"
    return START + made + b"."


def test_torchscript_modules_that_share_submodules_thirty_levels_deep_are_refused(tmp_path: Path) -> None:
    """Thirty levels of two names for one module: a thousand million paths."""
    program = named("__torch__", "M") + b")\x81\x94"
    for level in range(30):
        program += (
            b"0" + named("__torch__", "M") + b")\x81\x94}(" + b"".join(text(n) + b"h%c" % level for n in "ab") + b"ub"
        )
    members = [("a/data.pkl", b"\x80\x04" + program + b"."), ("a/constants.pkl", b"\x80\x02).")]
    path = write_zip(tmp_path / "a.pt", members)
    refuses(path, "endless or too many modules")


@pytest.mark.parametrize("name", ["n" * 5000, 7])
def test_torchscript_attributes_with_bad_names_are_refused(name: Any, tmp_path: Path) -> None:
    pushed = text(name) if isinstance(name, str) else number(name)
    members = [("a/data.pkl", _scripted(pushed + b"N")), ("a/constants.pkl", b"\x80\x02).")]
    refuses(write_zip(tmp_path / "a.pt", members), "has an attribute")


# --- wrappers around a state dict ---


def _nested(levels: int) -> dict[str, Any]:
    names = ["state_dict", "model_state_dict", "model", "module", "weights", "params", "net", "network", "ema"]
    tree: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(levels):
        tree = dict.fromkeys(names, tree)
    return tree


TREES: dict[str, Callable[[], Any]] = {
    "wrappers that share one dict": lambda: _nested(4),
    "foreign names that share one dict": lambda: {
        "a": {key: {"b": {"c": {"d": torch.ones(1)}}} for key in map(str, range(900))}
    },
    "a prefix three hundred times": lambda: {"module." * 290 + key: value for key, value in list(state().items())[:8]},
    "a segment two hundred times": lambda: {"_orig_mod." * 180 + key: value for key, value in state().items()},
    "segments in turn": lambda: {
        "_orig_mod._fsdp_wrapped_module." * 60 + key: value for key, value in list(state().items())[:9]
    },
    "a key of a megabyte in a wrapper": lambda: {"state_dict": {**state(), "k" * MB: torch.ones(1)}},
    "a wrapper's name of a megabyte": lambda: {"k" * MB: state()},
    "names that are no text": lambda: {"state_dict": {(1, 2): 3, None: 4, 5: torch.ones(1)}},
    "an entry of a megabyte": lambda: {"k" * MB: 1, "b\x1b[2J": 2},
    "parts within parts": lambda: {"model." + "student." * 100 + "x": torch.ones(1), "teacher.y": torch.ones(1)},
}


@pytest.mark.parametrize("name", TREES)
def test_hostile_wrappers_and_prefixes_load_or_are_refused_within_bounds(name: str, tmp_path: Path) -> None:
    torch.save(TREES[name](), tmp_path / "a.pt")
    if "segment" in name and "turn" not in name:
        keymap.load_checkpoint(model(), tmp_path / "a.pt")
    else:
        refuses(tmp_path / "a.pt")


# --- folders, links and shards ---


def _cache(folder: Path, index: bool, linked: bool = True) -> Path:
    """What a hub's client leaves on disk: links in snapshots/ to files in blobs/."""
    snapshot, blobs = folder / "models--a--b" / "snapshots" / "0123abc", folder / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    weights, keys = state(), list(state())
    parts = {"model.safetensors": keys}
    if index:
        parts = {"model-00001-of-00002.safetensors": keys[:20], "model-00002-of-00002.safetensors": keys[20:]}
        places = {key: name for name, part in parts.items() for key in part}
        text_of_index = json.dumps({"weight_map": places})
        (blobs / "index").write_text(text_of_index)
        if linked:
            (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index")
        else:
            (snapshot / "model.safetensors.index.json").write_text(text_of_index)
    for number_, (name, part) in enumerate(parts.items()):
        save_file({key: weights[key].contiguous() for key in part}, blobs / f"{number_:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{number_:064x}")
    return snapshot


@pytest.mark.parametrize(("index", "linked"), [(False, True), (True, True), (True, False)])
def test_the_links_of_a_download_cache_work(index: bool, linked: bool, tmp_path: Path) -> None:
    snapshot = _cache(tmp_path, index, linked)
    result = keymap.load_checkpoint(model(), snapshot)
    assert result.missing_keys == []
    file = snapshot / ("model.safetensors.index.json" if index else "model.safetensors")
    assert keymap.load_checkpoint(model(), file).missing_keys == []


def test_a_link_out_of_a_folder_is_not_followed_and_is_reported(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in state().items()}, tmp_path / "other.safetensors")
    for name in ("run", "run/checkpoints", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "other.safetensors")
    refuses(tmp_path / "run", "model.safetensors is a link that leaves the folder", str(tmp_path / "other.safetensors"))
    keymap.load_checkpoint(model(), tmp_path / "run" / "model.safetensors")  # named by the caller, it is read
    (tmp_path / "run" / "model.safetensors").unlink()
    torch.save(state(), tmp_path / "elsewhere" / "epoch_3.pt")
    (tmp_path / "run" / "checkpoints").rmdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    refuses(tmp_path / "run", "checkpoints/epoch_3.pt is a link that leaves the folder")
    (tmp_path / "run" / "checkpoints").unlink()
    torch.save(state(), tmp_path / "run" / "a.pt")
    (tmp_path / "run" / "last.ckpt").symlink_to("a.pt")  # a link within the folder
    assert keymap.load_checkpoint(model(), tmp_path / "run").missing_keys == []


def test_a_folder_of_pipes_devices_and_broken_links_is_without_a_weight_file(tmp_path: Path) -> None:
    """A pipe, a folder, a link to itself, one to nothing, one to a device: none of them is a weight file."""
    tmp_path = tmp_path / "run"  # the folder above it is this test's, too
    tmp_path.mkdir()
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").mkdir()
    (tmp_path / "last.ckpt").symlink_to("last.ckpt")
    (tmp_path / "epoch_1.pt").symlink_to("nothing")
    (tmp_path / "epoch_2.pt").symlink_to("/dev/zero")
    (tmp_path / "checkpoints").symlink_to("..")
    (tmp_path / "b\x1b[2J.pt").write_bytes(b"x")
    (tmp_path / "config.json").symlink_to("/dev/zero")
    refuses(tmp_path, "without a weight file")
    os.mkfifo(tmp_path / "config.fifo")
    torch.save(state(), tmp_path / "a.pt")
    os.mkfifo(tmp_path / "a.json")
    assert keymap.load_checkpoint(model(), tmp_path).missing_keys == []


def test_a_folder_of_more_than_ten_thousand_entries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for n in range(10_001):
        (tmp_path / "checkpoints" / f"{n}").touch()
    refuses(tmp_path, "has more than 10000 entries")


@pytest.mark.parametrize("way", ["pipe", "device", "socket"])
def test_a_path_that_is_not_a_file_is_refused(way: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    if way == "pipe":
        os.mkfifo(path)
    elif way == "device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(tmp_path)
            made.bind("a.pt")
    refuses(path, "a.pt")


NAMES = ["a\nb", "a\x1b[2J", "\u202ea", "\ud800", "n" * 300, "a\0b", "\u00e4" * 200, "~/x/y", "file:///x", "a|b/c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_with_an_odd_name(name: str, tmp_path: Path) -> None:
    raw = json.dumps({"weight_map": {"w": name}}).encode()
    refuses(put(tmp_path / "i.index.json", raw), "not a plain file name")


INDEXES: dict[str, tuple[Callable[[], str], list[str]]] = {
    "a shard for each key": (
        lambda: json.dumps({"weight_map": {f"k{n}": f"s{n}.safetensors" for n in range(15_000)}}),
        ["15000 shards; the limit is 1000"],
    ),
    "shards that are not there": (
        lambda: json.dumps({"weight_map": {f"k{n}": f"s{n}.safetensors" for n in range(900)}}),
        ["does not exist", "were not checked"],
    ),
    "too many keys": (
        lambda: json.dumps({"weight_map": {f"k{n}": "s.safetensors" for n in range(30_000)}}),
        ["30000 or more tensors"],
    ),
    "two megabytes": (lambda: '{"weight_map": {"a": "' + "x" * (3 * MB) + '"}}', ["a shard index has at most"]),
    "nested": (lambda: '{"weight_map": ' + "[" * 100_000, ["not valid JSON"]),
    "the index itself": (lambda: '{"weight_map": {"a": "i.index.json"}}', ["JSON file"]),
    "a list": (lambda: '{"weight_map": ["a"]}', ["JSON file"]),
    "a key of a megabyte": (lambda: json.dumps({"weight_map": {"k" * MB: "one.safetensors"}}), ["does not exist"]),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", INDEXES)
def test_a_hostile_index_is_refused(name: str, tmp_path: Path) -> None:
    make, words = INDEXES[name]
    refuses(put(tmp_path / "i.index.json", make()), *words)


# --- configurations ---

ODD: list[Any] = [
    None, True, [], {}, [[]], [1, 2, 3], "", "x" * 5000, "\ud800", "\x1b[2J", 0, -1, 2**62, 10**4000, 0.5, -0.0,
    float("inf"),
    float("nan"), [0, 0], [10**400, 3], ["a", "b"], {"a": {"b": 1}}, "quick_gelu", 5, 14,
]  # fmt: skip


def _everywhere(value: Any, depth: int = 3) -> dict[str, Any]:
    """A configuration that holds the value at every place that a format reads, and at those above."""
    parts = ["vision_config", "text_config", "vision_cfg", "text_cfg", "model_cfg", "projection_dim"]
    leaves = [
        "image_size",
        "patch_size",
        "hidden_act",
        "num_attention_heads",
        "layer_norm_eps",
        "model_type",
        "heads",
        "eos_token_id",
    ]
    leaves += ["quick_gelu", "head_width", "pool_type", "context_length", "no_causal_mask", "act_kwargs", "norm_kwargs"]
    tree: dict[str, Any] = dict.fromkeys(leaves, value)
    for part in parts if depth else ():
        tree[part] = (
            _everywhere(value, depth - 1) if part.startswith(("vision", "text", "model")) and depth > 1 else value
        )
    return tree


@pytest.mark.parametrize("format_", ["open_clip", "hf_clip"])
def test_a_configuration_that_holds_anything_anywhere(format_: str, tmp_path: Path) -> None:
    facts = {"image.heads": 2, "text.heads": 2}
    weights = keymap.convert_state_dict(state(), format_, facts=facts) if format_ != "open_clip" else state()
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    config = tmp_path / ("config.json" if format_ == "hf_clip" else "open_clip_config.json")
    for value in ODD:
        text_of = (
            json.dumps(_everywhere(value)) if value != 10**4000 else json.dumps(_everywhere(7)).replace("7", "9" * 4000)
        )
        config.write_bytes(text_of.encode("utf-8", "surrogatepass"))
        target = model()
        with bounded(len(text_of)):
            try:
                result = keymap.load_checkpoint(target, tmp_path / "model.safetensors")
            except keymap.KeymapError:
                continue
        assert len(str(result)) < 20_000 and str(result).replace("\n", "").isprintable()


CONFIGS = {
    "deep": "[" * 100_000,
    "long": " " * (2 * MB),
    "a list": "[1]",
    "a number of many digits": '{"image_size": ' + "9" * 5000 + "}",
    "not text": "\udcff\udcfe",
    "empty": "",
    "lists": "[" + "[]," * 300_000 + "[]]",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_malformed_configuration_costs_little(name: str, inside: bool, tmp_path: Path) -> None:
    text_of = CONFIGS[name]
    weights = {key: value.contiguous() for key, value in state().items()}
    if inside and name != "not text":
        save_file(weights, tmp_path / "model.safetensors", {"open_clip_config.json": text_of, "config": text_of})
    else:
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "open_clip_config.json").write_bytes(text_of.encode("utf-8", "surrogateescape"))
    message = "its header"  # of the file, where it is written into it and too long
    with bounded(len(text_of)):
        try:
            keymap.load_checkpoint(model(), tmp_path / "model.safetensors")
        except keymap.CheckpointError as error:
            message = str(error)
    assert "its header" in message


def test_a_configuration_whose_image_is_smaller_than_its_patch(tmp_path: Path) -> None:
    """Its grid would be 0 x 0, which one row of positions fits; a resize of nothing would fail in the copying."""
    weights = {**state(), "visual.positional_embedding": torch.randn(1, 8)}
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"vision_cfg": {"image_size": 5, "patch_size": 14}}}'
    )
    refuses(tmp_path / "model.safetensors", "visual.positional_embedding")
