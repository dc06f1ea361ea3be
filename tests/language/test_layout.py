"""Layouts and views against torch: random chains of moves, each element in its place, each written once."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from math import prod

import pytest
import torch

from keymap.language.layout import Layout, cut, join_runs, permute, place, row_major, whole
from keymap.language.view import ViewError, parse_view
from keymap.load.copying import copy_pieces, materialise


def source(shape, dtype=torch.float32):
    """A layout of one source, and the tensor that it describes: every element another number."""
    return whole("x", shape, dtype), {"x": torch.arange(prod(shape), dtype=dtype).reshape(shape)}


def assert_is(layout, tensors, want):
    assert layout.shape == tuple(want.shape)
    hits = torch.zeros(max(1, want.numel()), dtype=torch.int64)
    for piece in layout.pieces:
        hits.as_strided(piece.shape, piece.target_strides, piece.target_offset).add_(1)
        last = piece.source_offset + sum((n - 1) * s for n, s in zip(piece.shape, piece.source_strides, strict=True))
        assert 0 <= last < tensors[piece.source].numel()
    assert bool((hits[: want.numel()] == 1).all())
    assert torch.equal(materialise(layout, tensors.__getitem__), want)


# --- single moves ---


def test_whole_and_constant():
    layout, tensors = source((2, 3, 5))
    assert len(layout.pieces) == 1 and layout.copied_whole and layout.sources == ("x",)
    assert_is(layout, tensors, tensors["x"])
    constant = whole(None, (2, 3), torch.float32, 1.5)
    assert torch.equal(materialise(constant, {}.__getitem__), torch.full((2, 3), 1.5))
    assert not constant.copied_whole and constant.sources == () and constant.pieces[0].computed


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors(shape):
    layout, tensors = source(shape)
    assert torch.equal(materialise(layout, tensors.__getitem__), tensors["x"])
    assert len(layout.pieces) == (0 if 0 in shape else 1)


def test_row_major():
    assert row_major((2, 3, 5)) == (15, 5, 1) == torch.empty(2, 3, 5).stride()
    assert row_major(()) == ()


def test_a_convolution_as_a_linear_patch_is_one_piece():
    layout, tensors = source((7, 3, 5, 5))
    view = parse_view("o c p q -> o (p q c)")
    patches = view.apply(layout, {})
    assert len(patches.pieces) == 1
    assert_is(patches, tensors, tensors["x"].permute(0, 2, 3, 1).reshape(7, -1))
    back = view.inverse().apply(patches, {"c": 3, "p": "q"})
    assert back.copied_whole
    assert_is(back, tensors, tensors["x"])


def test_reshape_moves_nothing():
    layout, _ = source((6, 4))
    assert permute(layout, (2, 3, 4), (0, 1, 2), (2, 12)).pieces == layout.pieces


def test_join_runs_joins_contiguous_pieces_only():
    layout, tensors = source((6, 4))
    thirds = [cut(layout, 0, start, start + 2) for start in (0, 2, 4)]
    placed = [piece for i, part in enumerate(thirds) for piece in place(part, (6, 4), 0, 2 * i)]
    assert len(placed) == 3
    joined = Layout((6, 4), torch.float32, join_runs(reversed(placed)))
    assert len(joined.pieces) == 1
    assert_is(joined, tensors, tensors["x"])
    turned = [piece for i, part in enumerate(reversed(thirds)) for piece in place(part, (6, 4), 0, 2 * i)]
    turned = Layout((6, 4), torch.float32, join_runs(turned))
    assert len(turned.pieces) == 3
    assert_is(turned, tensors, torch.cat(tensors["x"].split(2)[::-1]))


def test_pieces_go_straight_into_a_parameter_with_a_cast():
    layout, tensors = source((4, 6), torch.float64)
    moved = parse_view("a (b c) -> c b a").apply(layout, {"b": 2})
    for given in (tensors["x"], tensors["x"].t().contiguous().t()):  # also where the file's tensor has odd strides
        out = torch.full((3, 2, 4), -1.0)
        copy_pieces(moved.pieces, given, out)
        assert torch.equal(out, tensors["x"].reshape(4, 2, 3).permute(2, 1, 0).float())


def test_sums_are_computed_in_float32():
    halves = {"x": torch.full((4,), 2048.0).half(), "y": torch.ones(4).half(), "z": torch.ones(4).half()}

    total = whole("x", (4,), torch.float16)
    for key in ("y", "z"):
        total = total._replace(pieces=(*total.pieces, whole(key, (4,), torch.float16).pieces[0]._replace(add=True)))
    assert float(materialise(total, halves.__getitem__)[0]) == 2050.0  # in float16 2048 + 1 + 1 is 2048


# --- random chains ---


def factors(rng, number):
    """A random way to write a number as a product."""
    found = []
    while number > 1:
        factor = rng.choice([d for d in range(2, number + 1) if number % d == 0])
        found.append(factor)
        number //= factor
    if rng.random() < 0.2:
        found.insert(rng.randint(0, len(found)), 1)
    return found


def grouped(rng, lengths):
    """Neighbouring lengths multiplied together at random."""
    shape, i = [], 0
    while i < len(lengths):
        step = rng.choice([1, 1, 2, 3])
        shape.append(prod(lengths[i : i + step]))
        i += step
    return tuple(shape)


def regroup(rng, layout, tensor):
    fine = [length for n in tensor.shape for length in factors(rng, n)]
    order = list(range(len(fine)))
    rng.shuffle(order)
    result = grouped(rng, [fine[i] for i in order])
    return permute(layout, fine, order, result), tensor.reshape(fine).permute(order).reshape(result)


def cut_one(rng, layout, tensor):
    wide = [d for d, n in enumerate(tensor.shape) if n > 1]
    if not wide:
        return layout, tensor
    axis = rng.choice(wide)
    start = rng.randrange(tensor.shape[axis])
    stop = rng.randint(start + 1, tensor.shape[axis])
    return cut(layout, axis, start, stop), tensor.narrow(axis, start, stop - start)


def place_beside(rng, layout, tensor):
    """Joined with itself cut out of, or with zeros: a concat."""
    if not tensor.ndim:
        return layout, tensor
    axis = rng.randrange(tensor.ndim)
    parts = [(layout, tensor)]
    other, values = (cut_one(rng, layout, tensor)) if rng.random() < 0.5 else (None, None)
    if other is None or any(
        a != b for d, (a, b) in enumerate(zip(values.shape, tensor.shape, strict=True)) if d != axis
    ):
        shape = tuple(2 if d == axis else n for d, n in enumerate(tensor.shape))
        other, values = whole(None, shape, layout.dtype), torch.zeros(shape)
    parts.insert(rng.randint(0, 1), (other, values))
    want = torch.cat([v for _, v in parts], axis)
    pieces, start = [], 0
    for part, part_values in parts:
        pieces += place(part, tuple(want.shape), axis, start)
        start += part_values.shape[axis]
    return Layout(tuple(want.shape), layout.dtype, tuple(pieces)), want


SHAPES = [(2, 3, 5), (4, 6), (12,), (3, 3, 3), (2, 2, 2, 2), (6, 1, 4), (8, 9), (5, 7, 2)]


@pytest.mark.parametrize("seed", range(150))
def test_a_random_chain_of_moves_equals_torch(seed):
    rng = random.Random(seed)
    layout, tensors = source(rng.choice(SHAPES))
    want = tensors["x"]
    for _ in range(rng.randint(1, 6)):
        move = rng.choice([regroup, regroup, cut_one, place_beside])
        layout, want = move(rng, layout, want)
        if want.numel() > 2000:
            break
        hits = [p for p in layout.pieces if p.source is not None]
        assert torch.equal(materialise(layout, tensors.__getitem__), want), move.__name__
    assert_is(Layout(layout.shape, layout.dtype, tuple(hits)), tensors, want) if len(hits) == len(
        layout.pieces
    ) else None
    joined = Layout(layout.shape, layout.dtype, join_runs(layout.pieces))
    assert torch.equal(materialise(joined, tensors.__getitem__), want)
    assert len(joined.pieces) <= len(layout.pieces)


@pytest.mark.parametrize("seed", range(100))
def test_pieces_never_overlap_and_leave_no_hole(seed):
    rng = random.Random(1000 + seed)
    layout, tensors = source(rng.choice(SHAPES))
    want = tensors["x"]
    for _ in range(rng.randint(2, 5)):
        layout, want = rng.choice([regroup, cut_one])(rng, layout, want)
    assert_is(layout, tensors, want)


@pytest.mark.parametrize("seed", range(60))
def test_all_parts_of_a_cut_put_together_are_the_whole(seed):
    rng = random.Random(2000 + seed)
    layout, given = source(rng.choice(SHAPES))
    layout, tensors = regroup(rng, layout, given["x"])
    shape = tuple(tensors.shape)
    axis = rng.randrange(len(shape))
    bounds = sorted({0, shape[axis], *(rng.randint(0, shape[axis]) for _ in range(3))})
    pieces = []
    for start, stop in pairwise(bounds):
        pieces += place(cut(layout, axis, start, stop), shape, axis, start)
    assert_is(Layout(shape, layout.dtype, tuple(pieces)), given, tensors)


# --- views ---


def random_view(rng):
    names = [chr(ord("a") + i) for i in range(rng.randint(1, 5))]
    sizes = {name: rng.choice([1, 2, 3, 4]) for name in names}

    def side():
        order = names[:]
        rng.shuffle(order)
        groups, i = [], 0
        while i < len(order):
            step = rng.choice([1, 1, 2])
            groups.append(order[i : i + step])
            i += step
        if rng.random() < 0.3:
            groups.insert(rng.randint(0, len(groups)), [])
        return groups

    def text(groups):
        return " ".join("1" if not g else g[0] if len(g) == 1 else "(" + " ".join(g) + ")" for g in groups)

    left, right = side(), side()
    return f"{text(left)} -> {text(right)}", left, right, sizes


@pytest.mark.parametrize("seed", range(150))
def test_a_view_equals_torch_and_its_inverse_undoes_it(seed):
    text, left, right, sizes = random_view(random.Random(3000 + seed))
    view = parse_view(text)
    assert str(view) == text
    shape = tuple(prod(sizes[n] for n in group) for group in left)
    layout, tensors = source(shape)
    before = [n for group in left for n in group]
    after = [n for group in right for n in group]
    want = tensors["x"].reshape([sizes[n] for n in before] or [1])
    want = want.permute([before.index(n) for n in after]).reshape([prod(sizes[n] for n in g) for g in right])
    there = view.apply(layout, sizes)
    assert_is(there, tensors, want)
    back = view.inverse().apply(there, sizes)
    assert back.shape == shape
    assert len(back.pieces) == 1 and back.copied_whole


BINDINGS = [  # (view, shape, sizes, axis lengths)
    ("d h k -> (h k) d", (5, 2, 3), {}, {"d": 5, "h": 2, "k": 3}),
    ("(h k) d -> d h k", (6, 5), {"h": 2}, {"d": 5, "h": 2, "k": 3}),
    ("(h k) d -> d h k", (6, 5), {"h": 2, "k": 3}, {"d": 5, "h": 2, "k": 3}),
    ("o (c p q) -> o c p q", (7, 27), {"c": 3, "p": "q"}, {"o": 7, "c": 3, "p": 3, "q": 3}),
    ("o (c p q) -> o c p q", (7, 27), {"c": 3, "q": "p"}, {"o": 7, "c": 3, "p": 3, "q": 3}),
    ("(a b) a2 -> a2 a b", (6, 2), {"a": "a2"}, {"a": 2, "b": 3, "a2": 2}),
    ("1 n d -> n d", (1, 4, 3), {}, {"n": 4, "d": 3}),
    ("a b -> (a b)", (0, 3), {}, {"a": 0, "b": 3}),
]


@pytest.mark.parametrize(("text", "shape", "sizes", "bound"), BINDINGS, ids=str)
def test_lengths_of_axes_are_inferred_from(text, shape, sizes, bound):
    assert parse_view(text).bind(shape, sizes) == bound


UNBOUND = [
    ("(h k) d -> d h k", (6, 5), {}, "cannot infer axes h and k"),
    ("(h k) d -> d h k", (6, 5), {"h": None}, "cannot infer axes h and k"),
    ("(h k) d -> d h k", (6, 5), {"h": "image.heads"}, "pass facts={'image.heads': ...}"),
    ("(h k) d -> d h k", (6, 5), {"h": 4}, "an axis of length 6 cannot be (h k) with h=4"),
    ("(h k) d -> d h k", (6, 5), {"h": 2, "k": 2}, "an axis of length 6 cannot be (h k) with h=2, k=2"),
    ("1 n -> n", (2, 3), {}, "an axis of length 2 cannot be () with 1"),
    ("a b -> b a", (2, 3, 4), {}, "needs 2 axes, the tensor is [2, 3, 4]"),
    ("a b -> b a", (2, 3), {"a": 3}, "a is 2, declared 3"),
    ("a b -> b a", (2, 3), {"a": "b"}, "a is 2, declared 3"),
    ("o (p q) -> o p q", (7, 8), {"p": "q"}, "cannot infer axes p and q"),
]


@pytest.mark.parametrize(("text", "shape", "sizes", "words"), UNBOUND, ids=str)
def test_an_axis_whose_length_cannot_be_inferred_is_an_error(text, shape, sizes, words):
    with pytest.raises(ViewError) as caught:
        parse_view(text).bind(shape, sizes)
    assert words in str(caught.value)


def test_no_axis_length_is_guessed_from_a_square():
    """Of every view with two unknown axes in one group, none binds without a given length."""
    for one, two in combinations("abc", 2):
        view = parse_view(f"({one} {two}) z -> z {one} {two}")
        with pytest.raises(ViewError, match="cannot infer"):
            view.bind((9, 9), {})


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((700, 601), (1, 0)),
        ((3, 701, 211), (0, 2, 1)),
        ((64, 5, 1201), (2, 1, 0)),
        ((2, 2, 257, 401), (3, 2, 0, 1)),
        ((400_003, 1), (1, 0)),
        ((2, 300_007), (1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_tensors_whose_axes_change_places_are_copied_strip_by_strip(shape, order, dtype):
    source = torch.randn(shape)
    result = tuple(shape[axis] for axis in order)
    layout = permute(whole("x", shape, torch.float32), shape, order, result)
    target = torch.zeros(result, dtype=dtype)
    copy_pieces(layout.pieces, source, target.view(-1))
    assert torch.equal(target, source.permute(order).to(dtype))
    assert torch.equal(materialise(layout, lambda _: source, dtype), target)
