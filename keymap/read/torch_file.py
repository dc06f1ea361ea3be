"""torch.save's two containers: a zip of a pickle and its storages, and the older run of pickles."""

from __future__ import annotations

import pickletools
from typing import Any

from keymap.errors import CheckpointError
from keymap.read.globals_allowed import AllowedGlobals, Storage
from keymap.read.lazy import Block, Checkpoint, SourceFile, brief
from keymap.read.torchscript import module_tensors
from keymap.read.tree import TreeBuilder
from keymap.read.unpickle import BadPickleError, ForbiddenGlobalError, UnreadTensorError, run_pickle
from keymap.read.zip_file import whole_member

MAX_PICKLE = 1 << 28
MAX_SCAN = 1 << 19
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
AGAIN = "download or save the file again"
TRUST = "save its state_dict() alone, or pass weights_only=False if you trust the file's author"


def archive_prefix(members: dict[str, Block]) -> str | None:
    """The folder, with its slash, of an archive that torch wrote; None for any other zip."""
    found = [name for name in members if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    return found[0].removesuffix("data.pkl") if len(found) == 1 else None


def is_scripted(members: dict[str, Block]) -> bool:
    """Whether torch.jit.save wrote the archive, or torch.load would think so."""
    marks = ("/constants.pkl", "/code/")  # in any folder: torch.load takes that of the first member for the archive's
    return any(mark in f"/{name}" for name in members for mark in marks)


def read_archive(file: SourceFile, members: dict[str, Block], prefix: str) -> Checkpoint:
    """A zip that torch.save or torch.jit.save wrote.

    Raises:
        UnsafeCheckpointError: the pickle names what is not allowed; nothing of it was run.
        CheckpointError: a malformed pickle, a missing or short storage, a view outside its storage,
            values written by a big-endian machine.
    """
    order = members.get(prefix + "byteorder")
    if order is not None and whole_member(order, 64).strip() != b"little":
        raise file.bad("was written on a big-endian machine", "save it again on a little-endian one")
    scripted = is_scripted(members)
    raw = whole_member(members[prefix + "data.pkl"], MAX_PICKLE)
    allowed = AllowedGlobals(scripted)
    value, _ = _run(file, raw, 0, allowed)

    def locate(storage: Storage) -> Block:
        block = members.get(f"{prefix}data/{storage.key}")
        if block is None:
            fact = f"storage {storage.key!r} has no member {prefix}data/{storage.key}"
            raise file.bad(fact, AGAIN)
        return block

    builder = TreeBuilder(file, locate)
    if scripted:
        views = module_tensors(file, members, prefix, value)
        return Checkpoint(file.path, "torchscript", {k: builder.lazy(view, k) for k, view in views.items()})
    return Checkpoint(file.path, "torch", builder.tree(value))


def looks_like_pickle(file: SourceFile) -> bool:
    """Whether the file begins with a binary pickle."""
    return file.data[:1] == b"\x80" and file.data[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")


def read_legacy(file: SourceFile) -> Checkpoint:
    """What torch.save wrote before version 1.6, and still writes on request.

    Five pickles (a magic number, a protocol, facts about the machine, the object, the storages' keys),
    then for each key its number of elements in eight bytes and the values. Raises as ``read_archive``,
    and in words for a pickle that torch did not write.
    """
    try:
        magic, at = run_pickle(file.data, 0, AllowedGlobals())
    except BadPickleError as error:
        what = f"it names {error}" if isinstance(error, ForbiddenGlobalError) else str(error)
        fact = f"is a plain or damaged pickle, not one of torch.save: {what}"
        raise file.bad(fact, "save it with torch.save or safetensors") from None
    if type(magic) is not int or magic != MAGIC:
        kind = type(magic).__name__
        keys = f" with the keys {brief(list(magic))}" if isinstance(magic, dict) else ""
        fact = f"is a plain pickle of a {kind}{keys}, not one of torch.save"
        raise file.bad(fact, "save it with torch.save or safetensors")
    protocol, at = _run(file, file.data, at, AllowedGlobals())
    if type(protocol) is not int or protocol != PROTOCOL:
        raise file.bad("has an unknown protocol of torch.save", "save it with a newer torch")
    facts, at = _run(file, file.data, at, AllowedGlobals())
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise file.bad("was not written on a little-endian machine", "save it again on one")
    allowed = AllowedGlobals()
    value, at = _run(file, file.data, at, allowed)
    keys, at = _run(file, file.data, at, AllowedGlobals())
    blocks = _legacy_blocks(file, at, keys, allowed.storages)

    def locate(storage: Storage) -> Block:
        block = blocks.get(storage.key)
        if block is None:
            raise file.bad(f"storage {storage.key!r} is not in the file's list of storages", AGAIN)
        return block

    return Checkpoint(file.path, "torch_legacy", TreeBuilder(file, locate).tree(value))


def _legacy_blocks(file: SourceFile, at: int, keys: Any, storages: list[Storage]) -> dict[str, Block]:
    """Where each listed storage lies, from the position after the pickles on."""
    known: dict[str, Storage] = {}
    for storage in storages:
        first = known.setdefault(storage.key, storage)
        if (first.numel, first.dtype) != (storage.numel, storage.dtype):
            raise file.bad(f"storage {storage.key!r} is stated in two ways", AGAIN)
    blocks: dict[str, Block] = {}
    if not isinstance(keys, list):
        raise file.bad("its list of storages is no list", AGAIN)
    for key in keys:
        if type(key) is not str or key not in known or key in blocks:
            raise file.bad(f"its list of storages has the entry {brief(key)}, unknown or there twice", AGAIN)
        numel, size = known[key].numel, known[key].numel * known[key].dtype.itemsize
        written = int.from_bytes(file.data[at : at + 8], "little", signed=True)
        if at + 8 + size > file.size:
            fact = f"is truncated: storage {key!r} needs {size} bytes from byte {at + 8}, "
            raise file.bad(fact + f"the file ends at {file.size}", AGAIN)
        if written != numel:
            raise file.bad(f"storage {key!r} has {written} elements, the pickle says {numel}", AGAIN)
        blocks[key] = Block(file, key, at + 8, size, size)
        at += 8 + size
    return blocks


def _run(file: SourceFile, data: Any, start: int, allowed: AllowedGlobals) -> tuple[Any, int]:
    """The value of a pickle and the position after it; raises CheckpointError as the modules' readers say."""
    try:
        return run_pickle(data, start, allowed, file.size)
    except ForbiddenGlobalError as error:
        raise _refusal(file, data[start : start + MAX_SCAN], allowed, str(error)) from None
    except UnreadTensorError as error:
        advice = "save it as a plain dense tensor (dequantize, to_dense, resolve_conj)"
        raise file.bad(f"its tensors cannot all be read: {error}", advice) from None
    except BadPickleError as error:
        raise file.bad(f"its pickle cannot be read: {error}", AGAIN) from None


def _refusal(file: SourceFile, raw: bytes, allowed: AllowedGlobals, name: str) -> CheckpointError:
    """Names the global that was met, the others that a scan finds, and a pickled module for what it is."""
    others: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "GLOBAL" and isinstance(argument, str):
                module, _, attribute = argument.partition(" ")
                try:
                    allowed.find(module, attribute)
                except ForbiddenGlobalError as error:
                    if str(error) not in [name, *others] and len(others) < 20:
                        others.append(str(error))
                except BadPickleError:
                    pass
    except (ValueError, IndexError, OverflowError, UnicodeError):
        pass  # a scan of a damaged pickle ends where the damage is
    whole = name.startswith("torch.nn.") or (b"_parameters" in raw and b"_modules" in raw)
    what = "is a pickled nn.Module: " if whole else ""
    fact = f"{what}its pickle names {name}, which reading would import and may run; nothing of it was run"
    return file.unsafe(fact, TRUST, [f"also names {other}" for other in others])
