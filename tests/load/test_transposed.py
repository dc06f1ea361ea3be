"""Large pieces whose axes change places are read by rows, for all sizes of rows, strips and memory."""

from __future__ import annotations

import os
import random
from itertools import permutations

import pytest
import torch
from peers.common import same_bits
from safetensors.torch import save_file

import keymap
from keymap.language.layout import Piece, cut, permute, place, whole
from keymap.load import transposed as strips
from keymap.load.copying import copy_pieces
from keymap.load.transposed import Scratch, copy_strip, strip_batches, strips_of
from keymap.read import open_checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64, torch.complex64, torch.bool]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (
        torch.randn(shape).to(dtype)
        if dtype.is_floating_point or dtype.is_complex
        else torch.randint(0, 2, shape).to(dtype)
    )


def lazy_of(tensor: torch.Tensor, folder):
    save_file({"x": tensor}, folder / "a.safetensors")
    return open_checkpoint(folder / "a.safetensors").tree["x"]


def carried(pieces: tuple[Piece, ...], lazy, target: torch.Tensor) -> int:
    """How many strips fill the target; every piece must be one that strips can copy."""
    found = [strip for piece in pieces for strip in strips_of(piece, lazy, target)]
    assert {id(strip.piece) for strip in found} == {id(piece) for piece in pieces}
    scratch = Scratch()
    with torch.no_grad():
        for batch in strip_batches(found):
            for strip in batch:
                copy_strip(strip, scratch)
    return len(found)


@pytest.fixture
def small(monkeypatch):
    """Limits that tiny tensors reach."""
    monkeypatch.setattr(strips, "_MIN_ELEMENTS", 0)
    return monkeypatch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("most", "room", "rows", "wide"), [(64, 240, 1, 1), (100, 500, 3, 64), (1 << 24, 1 << 20, 256, 1 << 10)]
)
@pytest.mark.parametrize("order", [o for o in permutations(range(3)) if o[-1] != 2], ids=str)
def test_axes_in_any_order_arrive_as_torch_would_put_them(order, most, room, rows, wide, dtype, small, tmp_path):
    for name, value in {"_MAX_STRIP": most, "_buffer_size": lambda: room, "_MAX_ROWS": rows, "_WIDE_ROW": wide}.items():
        small.setattr(strips, name, value)
    shape = (5, 4, 7)
    source = values(shape, dtype)
    result = tuple(shape[axis] for axis in order)
    pieces = permute(whole("x", shape, dtype), shape, order, result).pieces
    target = torch.zeros(result, dtype=dtype)
    count = carried(pieces, lazy_of(source, tmp_path), target)
    assert same_bits(target, source.permute(order).contiguous())
    assert (count > 1) == (most < 1000)


@pytest.mark.parametrize("seed", range(150))
def test_a_part_of_a_tensor_becomes_a_part_of_another(seed, small, tmp_path):
    """Against the plain copy from memory: parts of rows, parts of columns, any sizes, conversions too."""
    rng = random.Random(seed)
    first, second = rng.choice(
        [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.int64, torch.int16)]
    )
    shape, axis = (rng.randint(2, 40), rng.randint(2, 40)), rng.randint(0, 1)
    begin = rng.randint(0, shape[axis] - 2)
    end = rng.randint(begin + 2, shape[axis])
    source = values(shape, torch.float32, seed).mul(9).to(first)
    part = cut(whole("x", shape, first), axis, begin, end)
    turned = permute(part, part.shape, (1, 0), part.shape[::-1])
    larger = (turned.shape[0] + 3, turned.shape[1])
    pieces = place(turned, larger, 0, 2)
    wanted, target = torch.zeros(larger, dtype=second), torch.zeros(larger, dtype=second)
    copy_pieces(pieces, source, wanted)
    small.setattr(strips, "_MAX_STRIP", rng.choice([40, 300, 1 << 20]))
    room = rng.choice([330, 700, 1 << 20])
    small.setattr(strips, "_buffer_size", lambda: room)
    small.setattr(strips, "_WIDE_ROW", rng.choice([1, 60, 1 << 20]))
    small.setattr(strips, "_MAX_ROWS", 7)
    assert all(piece.source_strides[-1] != 1 for piece in pieces)
    carried(pieces, lazy_of(source, tmp_path), target)
    assert same_bits(target, wanted)


def test_rows_as_wide_as_real_ones_and_more_of_them_than_are_read_at_once(tmp_path):
    source = torch.randn(700, 3072)
    target = torch.zeros(3072, 700)
    pieces = permute(whole("x", (700, 3072), torch.float32), (700, 3072), (1, 0), (3072, 700)).pieces
    carried(pieces, lazy_of(source, tmp_path), target)
    assert same_bits(target, source.t().contiguous())


def test_a_system_without_the_call_reads_from_the_mapping(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    test_rows_as_wide_as_real_ones_and_more_of_them_than_are_read_at_once(tmp_path)


def test_a_target_may_be_a_part_of_a_larger_tensor(tmp_path):
    source, memory = torch.randn(300, 200), torch.zeros(100 + 300 * 200 + 7)
    pieces = permute(whole("x", (300, 200), torch.float32), (300, 200), (1, 0), (200, 300)).pieces
    target = memory[100:-7].view(200, 300)
    carried(pieces, lazy_of(source, tmp_path), target)
    assert same_bits(target, source.t().contiguous())
    assert not memory[:100].any() and not memory[-7:].any()


OTHERS = {
    "small": lambda: (Piece("x", (10, 10), 0, (1, 10), 0, (10, 1)), torch.empty(10, 10)),
    "axes in their order": lambda: (Piece("x", (200, 200), 0, (300, 1), 0, (200, 1)), torch.empty(200, 200)),
    "huge rows": lambda: (Piece("x", (30_000, 3), 0, (1, 30_000), 0, (3, 1)), torch.empty(30_000, 3)),
    "rows that overlap": lambda: (Piece("x", (200, 200), 0, (1, 2), 0, (200, 1)), torch.empty(200, 200)),
    "a meta target": lambda: (
        Piece("x", (200, 200), 0, (1, 200), 0, (200, 1)),
        torch.empty(200, 200, device="meta"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_these_pieces_are_left_to_torch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(strips, "_buffer_size", lambda: 100_000)
    piece, target = OTHERS[name]()
    assert strips_of(piece, lazy_of(torch.randn(300, 300), tmp_path), target) == []


def test_a_file_that_shrinks_raises_an_error_and_does_not_kill_the_process(tmp_path):
    lazy = lazy_of(torch.randn(300, 300), tmp_path)
    (strip,) = strips_of(Piece("x", (300, 300), 0, (1, 300), 0, (300, 1)), lazy, torch.empty(300, 300))
    os.truncate(strip.file.path, strip.start + 5000)
    with pytest.raises(keymap.CheckpointError, match="was written to while it was read"):
        copy_strip(strip, Scratch())
