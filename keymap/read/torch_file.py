"""Read torch.save's two containers: a zip archive of a pickle and its storages, and the older sequence of pickles."""

from __future__ import annotations

import pickletools
from typing import Any

from keymap.errors import CheckpointError
from keymap.read.globals_allowed import AllowedGlobals, Storage
from keymap.read.lazy import Block, Checkpoint, SourceFile, brief
from keymap.read.page_cache import scattered
from keymap.read.torchscript import module_tensors
from keymap.read.tree import TreeBuilder
from keymap.read.unpickle import BadPickleError, ForbiddenGlobalError, UnreadTensorError, run_pickle
from keymap.read.zip_file import whole_member

MAX_PICKLE = 1 << 28
MAX_SCAN = 1 << 19
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
AGAIN = "download or save the file again"
TRUST = "save only its state_dict(), or pass weights_only=False if you trust the file's author"


def archive_prefix(members: dict[str, Block]) -> str | None:
    """The folder of an archive that torch wrote, with its slash; None for any other zip archive."""
    found = [name for name in members if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    return found[0].removesuffix("data.pkl") if len(found) == 1 else None


def is_scripted(members: dict[str, Block]) -> bool:
    """Whether torch.jit.save wrote the archive, or torch.load would treat it so."""
    marks = ("/constants.pkl", "/code/")  # in any folder, because torch.load uses the folder of the first member
    return any(mark in f"/{name}" for name in members for mark in marks)


def read_archive(file: SourceFile, members: dict[str, Block], prefix: str) -> Checkpoint:
    """Read a zip archive of torch.save or torch.jit.save.

    Raises:
        UnsafeCheckpointError: the pickle names something that is not allowed. None of it was run.
        CheckpointError: a malformed pickle, a missing or short storage, a view outside its storage, or
            values from a big-endian machine.
    """
    order = members.get(prefix + "byteorder")
    if order is not None and whole_member(order, 64).strip() != b"little":
        raise file.error("was written on a big-endian machine", "save it again on a little-endian one")
    scripted = is_scripted(members)
    raw = whole_member(members[prefix + "data.pkl"], MAX_PICKLE)
    allowed = AllowedGlobals(scripted)
    value, _ = _run(file, raw, 0, allowed)

    def locate(storage: Storage) -> Block:
        block = members.get(f"{prefix}data/{storage.key}")
        if block is None:
            fact = f"storage {storage.key!r} has no member {prefix}data/{storage.key}"
            raise file.error(fact, AGAIN)
        return block

    builder = TreeBuilder(file, locate)
    if scripted:
        views = module_tensors(file, members, prefix, value)
        return Checkpoint(file.path, "torchscript", {k: builder.lazy(view, k) for k, view in views.items()})
    return Checkpoint(file.path, "torch", builder.tree(value), {}, allowed.notes)


def looks_like_pickle(file: SourceFile) -> bool:
    """Whether the file begins like a binary pickle."""
    return file.data[:1] == b"\x80" and file.data[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")


def read_legacy(file: SourceFile) -> Checkpoint:
    """Read what torch.save wrote before version 1.6, and still writes on request.

    Five pickles (a magic number, a protocol, facts about the machine, the object, the keys of the storages),
    then for each key the number of elements in eight bytes, and the values.

    Raises:
        UnsafeCheckpointError, CheckpointError: as for `read_archive`; also if torch.save did not write the pickle.
    """
    try:
        magic, at = run_pickle(file.data, 0, AllowedGlobals())
    except BadPickleError as error:
        reason = f"it names {error}" if isinstance(error, ForbiddenGlobalError) else str(error)
        fact = f"is a plain or damaged pickle that torch.save did not write: {reason}"
        raise file.error(fact, "save it with torch.save or safetensors") from None
    if type(magic) is not int or magic != MAGIC:
        kind = type(magic).__name__
        keys = f" with the keys {brief(list(magic))}" if isinstance(magic, dict) else ""
        fact = f"is a plain pickle of type {kind}{keys}; torch.save did not write it"
        raise file.error(fact, "save it with torch.save or safetensors")
    protocol, at = _run(file, file.data, at, AllowedGlobals())
    if type(protocol) is not int or protocol != PROTOCOL:
        raise file.error("has an unknown protocol of torch.save", "save it with a newer torch")
    machine, at = _run(file, file.data, at, AllowedGlobals())
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise file.error("was not written on a little-endian machine", "save it again on a little-endian one")
    allowed = AllowedGlobals()
    value, at = _run(file, file.data, at, allowed)
    keys, at = _run(file, file.data, at, AllowedGlobals())
    blocks = _legacy_blocks(file, at, keys, allowed.storages)

    def locate(storage: Storage) -> Block:
        block = blocks.get(storage.key)
        if block is None:
            raise file.error(f"storage {storage.key!r} is not in the file's list of storages", AGAIN)
        return block

    return Checkpoint(file.path, "torch_legacy", TreeBuilder(file, locate).tree(value), {}, allowed.notes)


def _legacy_blocks(file: SourceFile, at: int, keys: Any, storages: list[Storage]) -> dict[str, Block]:
    """The block of each listed storage; the first one starts at byte ``at``, after the pickles."""
    known: dict[str, Storage] = {}
    for storage in storages:
        first = known.setdefault(storage.key, storage)
        if (first.numel, first.dtype) != (storage.numel, storage.dtype):
            raise file.error(f"storage {storage.key!r} has two different sizes or dtypes", AGAIN)
    blocks: dict[str, Block] = {}
    if not isinstance(keys, list):
        raise file.error("its list of storages is not a list", AGAIN)
    for key in keys:
        if type(key) is not str or key not in known or key in blocks:
            raise file.error(f"its list of storages has the entry {brief(key)}, which is unknown or repeated", AGAIN)
        size = known[key].numel * known[key].dtype.itemsize
        if at + 8 + size > file.size:
            fact = f"is truncated: storage {key!r} needs {size} bytes from byte {at + 8}"
            raise file.error(f"{fact}, but the file ends at {file.size}", AGAIN)
        blocks[key] = Block(file, key, at + 8, size, size)
        at += 8 + size
    with scattered(file, ((block.start - 8, block.start) for block in blocks.values())):
        for key, block in blocks.items():
            written = int.from_bytes(file.data[block.start - 8 : block.start], "little", signed=True)
            if written != known[key].numel:
                fact = f"storage {key!r} has {written} elements, but the pickle says {known[key].numel}"
                raise file.error(fact, AGAIN)
    return blocks


def _run(file: SourceFile, data: Any, start: int, allowed: AllowedGlobals) -> tuple[Any, int]:
    """The value of a pickle and the position after it; raises CheckpointError if the pickle is bad or unsafe."""
    try:
        return run_pickle(data, start, allowed, file.size)
    except ForbiddenGlobalError as error:
        raise _unsafe_pickle(file, data[start : start + MAX_SCAN], allowed, str(error)) from None
    except UnreadTensorError as error:
        advice = "save it as a plain dense tensor (dequantize, to_dense, resolve_conj, resolve_neg)"
        raise file.error(f"has a tensor that keymap cannot read: {error}", advice) from None
    except BadPickleError as error:
        raise file.error(f"its pickle cannot be read: {error}", AGAIN) from None


def _unsafe_pickle(file: SourceFile, raw: bytes, allowed: AllowedGlobals, name: str) -> CheckpointError:
    """The error for a forbidden name; it also lists the other forbidden names and recognises a pickled module."""
    others: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "GLOBAL" and isinstance(argument, str):
                module, _, attribute = argument.partition(" ")
                full = f"{module}.{attribute}"
                if not allowed.may_name(module, attribute) and full not in [name, *others] and len(others) < 20:
                    others.append(full)
    except (ValueError, IndexError, OverflowError, UnicodeError):
        pass  # the scan stops at the damage
    is_module = name.startswith("torch.nn.") or (b"_parameters" in raw and b"_modules" in raw)
    kind = "is a pickled nn.Module: " if is_module else ""
    fact = f"{kind}its pickle names {name}, which reading would import and may run; nothing of it was run"
    return file.unsafe_error(fact, TRUST, [f"also names {other}" for other in others])
