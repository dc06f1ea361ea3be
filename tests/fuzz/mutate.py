"""Mutations: of bytes, whatever they mean, and of the structures that readers follow.

Every function takes the bytes of a good file and a random generator. A mutation that repairs checksums, so that damage
gets past them, says so: its mutants need not hold the original's values.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch

NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1]
NUMBERS += [-1, -2, 2**63, 2**64 - 1, 10**30]
VALUES: list[Any] = [
    *NUMBERS,
    None,
    True,
    False,
    0.5,
    1e400,
    "",
    "x",
    "F32",
    [],
    [1],
    {},
    {"a": 1},
    [[[]]],
    "\u0000",
    "\ud800",
]
VALUES += [
    "\u202e",
    "F64",
    "BOOL",
    "F8_E5M2",
    "U16",
    "I64",
    "a" * 5000,
    [0] * 70,
    [2**40, 0],
    [1] * 64,
    "../one",
    "one.safetensors",
]


# --- bytes ---


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to four bits, near the front, near the end or anywhere."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        near = rng.choice([len(changed), min(400, len(changed)), min(4000, len(changed))])
        at = rng.randrange(near)
        changed[rng.choice([at, len(changed) - 1 - at])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), len(data) - rng.randrange(1, min(64, len(data)))])]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A part of the file over, or into, another place; or a part left out, or twice."""
    size = rng.randrange(1, min(len(data), rng.choice([8, 64, 1024])) + 1)
    start, at = rng.randrange(len(data) - size + 1), rng.randrange(len(data))
    part = data[start : start + size]
    return rng.choice(
        [
            data[:at] + part + data[at + size :],
            data[:at] + part + data[at:],
            data[:start] + data[start + size :],
            data[:start] + part + data[start:],
            data + part,
            data[:start] + bytes(size) + data[start + size :],
        ]
    )


def length(data: bytes, rng: random.Random) -> bytes:
    """A number of one to eight bytes, anywhere, becomes another."""
    form = rng.choice("BHIQ")
    size = struct.calcsize(f"<{form}")
    near = rng.choice([len(data), 200, 3000])
    at = rng.randrange(max(1, min(near, len(data) - size)))
    at = rng.choice([at, max(0, len(data) - size - at)])
    here = int.from_bytes(data[at : at + size], "little")
    value = rng.choice(
        [here + 1, here - 1, here * 2, here // 2, rng.choice(NUMBERS), here + 2 ** rng.randrange(8 * size)]
    )
    return data[:at] + struct.pack(f"<{form}", value % 2 ** (8 * size)) + data[at + size :]


PLAIN = [flip, flip, truncate, splice, splice, length]


# --- JSON ---


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, ...]] = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        inner += _spots(item, (*path, key))
    return inner


def json_text(text: str, rng: random.Random) -> str:
    """One to three values, keys or entries changed."""
    tree = json.loads(text)
    for _ in range(rng.randrange(1, 4)):
        spots = _spots(tree)
        if not spots:
            break
        *path, last = rng.choice(spots)
        owner = tree
        for key in path:
            owner = owner[key]
        what = rng.randrange(6)
        if what == 0:
            del owner[last]
        elif what == 1 and isinstance(owner, dict):
            owner[rng.choice(["", "__metadata__", "a" * 3000, "\ud800", "\x1b[2J", *list(owner)[:3]])] = owner.pop(last)
        elif what == 2 and type(owner[last]) is int:
            owner[last] = rng.choice([owner[last] + 1, owner[last] - 1, -owner[last], owner[last] * 2, *NUMBERS])
        elif what == 3:
            *other, end = rng.choice(spots)
            there = tree
            try:
                for key in other:
                    there = there[key]
                owner[last] = there[end]
            except (KeyError, IndexError, TypeError):
                owner[last] = None
        elif what == 4 and isinstance(owner[last], list):
            owner[last] = owner[last] * rng.choice([2, 40]) or [1]
        else:
            owner[last] = rng.choice(VALUES)
        try:  # a value that was moved may hold itself
            text = json.dumps(tree)
        except (ValueError, RecursionError):
            return text
        tree = json.loads(text)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = rng.choice([text[:at] + "[" * 3000 + text[at:], text + text, text.replace("}", ',"a":1,"a":2}', 1)])
    return text


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """The header edited, with a length that fits it; sometimes values are left out or added."""
    size = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + size].decode(), data[8 + size :]
    raw = json_text(header, rng).encode("utf-8", "surrogatepass")
    values = rng.choice(
        [values, values, values, values[: rng.randrange(len(values))], values + bytes(rng.randrange(9))]
    )
    return struct.pack("<Q", len(raw)) + raw + values


def index_json(data: bytes, rng: random.Random) -> bytes:
    return json_text(data.decode(), rng).encode("utf-8", "surrogatepass")


# --- pickles ---

NAMES = [
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "bytearray"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "FloatStorage"),
    ("torch", "DoubleStorage"),
    ("torch", "BoolStorage"),
    ("torch", "ComplexFloatStorage"),
    ("torch", "UntypedStorage"),
    ("torch", "float8_e5m2"),
    ("torch", "Size"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("argparse", "Namespace"),
    ("_codecs", "encode"),
    ("__torch__.x", "M"),
]
SIMPLE = [
    bytes([code])
    for code in b"(.012NJKMGXCB]laetd}sub)RqhQ\x80\x85\x86\x87\x88\x89\x8a\x8f\x90\x91\x93\x94\x81\x92\x82\x97\x98iop"
]


def _number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _opcode(rng: random.Random) -> bytes:
    what = rng.randrange(5)
    if what == 0:
        module, name = rng.choice(NAMES)
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    if what == 1:
        return _number(rng.choice(NUMBERS))
    if what == 2:
        raw = rng.choice([b"", b"0", b"storage", b"cpu", b"visual.proj", b"x" * 300, b"\xed\xa0\x80"])
        return b"X" + struct.pack("<I", len(raw)) + raw
    if what == 3:
        return rng.choice([b"h", b"q"]) + bytes([rng.randrange(256)])
    return rng.choice(SIMPLE)


def pickle_opcodes(data: bytes, rng: random.Random) -> bytes:
    """Opcodes left out, twice, exchanged, or others in their place; the rest stays whole."""
    steps: list[int] = []
    try:
        for _, _, at in pickletools.genops(data):
            steps.append(at or 0)
    except Exception:  # a part of a pickle
        pass
    ends = [*steps[1:], len(data)]
    parts = [data[a:b] for a, b in zip(steps, ends, strict=True)]
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(parts))
        what = rng.randrange(6)
        if what == 0 and len(parts) > 1:
            del parts[at]
        elif what == 1:
            parts.insert(at, rng.choice(parts))
        elif what == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif what == 3:
            parts.insert(at, _opcode(rng))
        elif what == 4:
            same = [k for k, part in enumerate(parts) if part[:1] in b"KMJ\x8a"]
            parts[rng.choice(same or [at])] = _number(rng.choice(NUMBERS))
        else:
            parts[at] = _opcode(rng)
    return b"".join(parts)


def legacy_pickles(data: bytes, rng: random.Random) -> bytes:
    """One of the five pickles at the front changed."""
    at, ends = 0, [0]
    stream = io.BytesIO(data)
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    which = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
    at, end = ends[which], ends[which + 1]
    return data[:at] + pickle_opcodes(data[at:end], rng) + data[end:]


# --- zip archives ---


def _rewritten(data: bytes, change: Callable[[str, bytes], bytes], rng: random.Random) -> bytes:
    """The archive with a member changed and all checksums right; names may change too."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            target.writestr(
                zipfile.ZipInfo(info.filename), change(info.filename, source.read(info)), info.compress_type
            )
    return out.getvalue()


def archive_pickle(data: bytes, rng: random.Random) -> bytes:
    """The archive's pickle changed; the archive around it is whole."""
    return _rewritten(data, lambda n, raw: pickle_opcodes(raw, rng) if n.endswith("data.pkl") else raw, rng)


def archive_member(data: bytes, rng: random.Random) -> bytes:
    """Any member changed, with a right checksum: a storage too short, code that is other code."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        chosen = rng.choice(source.namelist())
    change = rng.choice(PLAIN)
    return _rewritten(data, lambda n, raw: change(raw, rng) if n == chosen and len(raw) > 1 else raw, rng)


def array_header(data: bytes, rng: random.Random) -> bytes:
    """The header of an array, as text."""
    end = 10 + int.from_bytes(data[8:10], "little")
    text = data[10:end].decode("latin-1")
    old = rng.choice(
        ["<f4", "<i2", "False", "True", "(", ")", ",", "'descr'", "'shape'", "fortran_order", "1", "4", "8", " "]
    )
    new = rng.choice(
        ["<f8", "|O", ">f4", "<U9", "|V2", "True", "1", "((", "-1", str(2**62), "[('a', '<f4')]", "''", "{}", "-" * 99]
    )
    text = text.replace(old, new, 1) if rng.random() < 0.8 else text[: rng.randrange(len(text))]
    raw = text.encode("latin-1")
    return data[:8] + struct.pack("<H", len(raw)) + raw + data[end:]


def archive_array(data: bytes, rng: random.Random) -> bytes:
    """The header of one array of an archive, with a right checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        chosen = rng.choice(source.namelist())
    return _rewritten(data, lambda n, raw: array_header(raw, rng) if n == chosen else raw, rng)


FIELDS = {b"PK\x03\x04": (4, 6, 8, 14, 18, 22, 26, 28), b"PK\x01\x02": (8, 10, 16, 20, 24, 28, 30, 32, 42)}
FIELDS |= {b"PK\x05\x06": (4, 6, 8, 10, 12, 16, 20), b"PK\x06\x06": (4, 24, 32, 40, 48), b"PK\x06\x07": (4, 8, 16)}


def zip_field(data: bytes, rng: random.Random) -> bytes:
    """One to three fields of headers and directory become another number, or that of another entry."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        mark = rng.choice([mark for mark in FIELDS if mark in changed])
        places = []
        at = changed.find(mark)
        while at >= 0:
            places.append(at)
            at = changed.find(mark, at + 4)
        field, size = rng.choice(FIELDS[mark]), rng.choice([2, 4])
        at = rng.choice(places) + field
        other = rng.choice(places) + field
        value = bytes(changed[other : other + size])
        if other == at or rng.random() < 0.6:
            here = int.from_bytes(value, "little")
            value = (rng.choice([here + 1, here - 1, here ^ 1, *NUMBERS]) % 2 ** (8 * size)).to_bytes(size, "little")
        changed[at : at + size] = value
    return bytes(changed)


# --- state dicts: whole files that say something else ---

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
]
DTYPES += [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
PARTS = [
    "module.",
    "model.",
    "visual.",
    "text.",
    "trunk.",
    "student.",
    "_orig_mod.",
    "_orig_mod.",
    "params/",
    "x.",
    ".",
    "0.",
]


def state_dict(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Keys renamed, exchanged, left out, added; tensors of another dtype, shape, size or rank."""
    state = dict(tensors)
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(state))
        value, what = state[key], rng.randrange(12)
        if what == 0:
            state = {rng.choice(PARTS) + key: value for key, value in state.items()}
        elif what == 1:
            del state[key]
        elif what == 2:
            state[rng.choice(PARTS) + key] = state.pop(key)
        elif what == 3:
            state[
                rng.choice([*PARTS, "logit_bias", "visual.proj_bias", "\x1b[31m", "x" * 5000]) + rng.choice(["", key])
            ] = value
        elif what == 4:
            other = rng.choice(list(state))
            state[key], state[other] = state[other], value
        elif what == 5:
            state[key] = value.to(rng.choice(DTYPES))
        elif what == 6:
            state[key] = value.t() if value.ndim == 2 else value.reshape(-1)
        elif what == 7:
            state[key] = value.reshape(rng.choice([(1, *value.shape), (*value.shape, 1), (1, value.numel())]))
        elif what == 8:
            state[key] = torch.cat([value, value]) if value.ndim else value.reshape(1)
        elif what == 9:
            state[key] = value[: rng.randrange(len(value))] if value.ndim and len(value) else torch.empty(0)
        elif what == 10:
            state[key] = torch.empty(rng.choice([(2**40, 0), (0,), (0, 7), (1, 0, 3), ()]), dtype=value.dtype)
        else:
            state = {k: v.to(rng.choice(DTYPES[:3])) if v.is_floating_point() else v for k, v in state.items()}
        if not state:
            state = {key: value}
    return state


def safetensors_state(data: bytes, rng: random.Random) -> bytes:
    state = state_dict(dict(sorted(safetensors.torch.load(data).items())), rng)  # its order is not always the same
    return safetensors.torch.save({key: value.contiguous().clone() for key, value in state.items()})


def torch_state(data: bytes, rng: random.Random) -> bytes:
    tree = torch.load(io.BytesIO(data), weights_only=False)  # our own file
    inner = tree.get("state_dict", tree)
    changed = state_dict(dict(inner.items()), rng)
    if rng.random() < 0.2:
        key = rng.choice(list(changed))
        changed[key] = (
            changed[key].reshape(-1)[:1].expand(rng.choice([3, 2**20, 2**40])) if changed[key].numel() else changed[key]
        )
    if inner is not tree or rng.random() < 0.3:
        name = rng.choice(["state_dict", "ema", "model", "net", "other"])
        changed = {**({} if inner is tree else tree), name: changed}  # type: ignore[assignment]
    out = io.BytesIO()
    torch.save(changed, out, _use_new_zipfile_serialization=data[:2] == b"PK")
    return out.getvalue()


def npz_state(data: bytes, rng: random.Random) -> bytes:
    with np.load(io.BytesIO(data)) as arrays:
        state = state_dict({key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}, rng)
    plain = {
        key: value.float() if value.dtype in DTYPES[-2:] or value.dtype == DTYPES[1] else value
        for key, value in state.items()
    }
    out = io.BytesIO()
    np.savez(out, **{key: value.numpy() for key, value in plain.items()})
    return out.getvalue()


# --- YAML ---

TOKENS = [
    "(.+)", r"(\d+)", r"(\w+)", "([^.]+)", "(a|b)", "(|x)", r"\1", r"\2", "<1+1>", "<1*6+2>", "<1:x>", "<layer>",
    "a b -> b a",
    "(a b) -> a b", "-> ", "concat: 0", "stack: 0", "rows: [[0, 1], [1, null]]", "split: [1, 1]", "unstack: layer",
    "add: x",
    "times: sqrt 1", "plus: .inf", "times: .nan", "oneway: true", "optional: true", "rest: true",
    "table: hf_to_native", "order: [a, 0]",
    "parts: ['*', 1]", "sizes: {h: image.heads}", "sizes: {a: b, b: a}", "{}", "[]", "null", "1", "-1",
    "99999999999999999999", "0x7f",
    "1:1:1", "2024-01-01", "!!python/name:os.system", "&a", "*a", "<<: {a: b}", "? ", "---", "\t", "\u202e", "\x00",
    "'", '"', "kind: hub",
    "kind: bridge", "take: [0, 1]", "then: a -> a", "view: a b -> (a b)", "ignore:", "unsupported:", "refuse:", "any:",
    "none:",
]  # fmt: skip


def yaml_text(data: bytes, rng: random.Random) -> bytes:
    """Lines left out, twice or moved; words changed for words of the language."""
    lines = data.decode().split("\n")
    for _ in range(rng.randrange(1, 4)):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        words = lines[at].split(" ")
        what = rng.randrange(6)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(other, lines[at])
        elif what == 2:
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            lines[at] = " ".join(words)
        elif what == 3:
            words.insert(rng.randrange(len(words) + 1), rng.choice(TOKENS))
            lines[at] = " ".join(words)
        elif what == 4:
            words[rng.randrange(len(words))] = rng.choice(lines[other].split(" "))
            lines[at] = " ".join(words)
        else:
            lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
        lines = lines or [""]
    return "\n".join(lines).encode()


Mutation = Callable[[bytes, random.Random], bytes]
STRUCTURED: dict[str, list[Mutation]] = {
    "safetensors": [safetensors_header, safetensors_header, safetensors_state],
    "zip-pt": [archive_pickle, archive_pickle, archive_member, zip_field, torch_state],
    "legacy-pt": [legacy_pickles, legacy_pickles, torch_state],
    "torchscript": [archive_pickle, archive_pickle, archive_member, zip_field],
    "npz": [archive_array, archive_member, zip_field, npz_state],
    "npy": [array_header],
    "index": [index_json],
    "yaml": [yaml_text],
}
REPAIRS = (archive_pickle, archive_member, archive_array, npz_state)  # checksums, so values may be others


def mutant(kind: str, data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A mutant, and whether a container's checksums still stand for the original's values."""
    structured = rng.random() < 0.6
    change = rng.choice(STRUCTURED[kind] if structured else PLAIN)
    try:
        changed = change(data, rng)
    except (zipfile.BadZipFile, UnicodeError, struct.error):
        changed, change = flip(data, rng), flip
    if rng.random() < 0.1 and changed:
        changed = rng.choice(PLAIN)(changed, rng) if len(changed) > 1 else changed
    return changed, change not in REPAIRS
