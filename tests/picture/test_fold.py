"""Equal layers become one row; layers that differ in anything do not."""

from __future__ import annotations

import pytest

from keymap.picture.fold import Layers, Row, fold, ranges


def names(keys, kinds=None):
    """What keys fold to: single keys, and layers as ``prefix[range](count)``."""
    nodes = fold(keys, kinds or [0] * len(keys))
    return [
        f"{node.prefix}[{ranges(node.indices)}]({len(node.indices)})" if isinstance(node, Layers) else keys[node]
        for node in nodes
    ]


def blocks(prefix, count, suffixes=("weight", "bias")):
    return [f"{prefix}{n}.{suffix}" for n in range(count) for suffix in suffixes]


@pytest.mark.parametrize(("indices", "words"), [([0, 1, 2], "0-2"), ([0, 1, 4], "0-1, 4"), ([7], "7"), ([], "")])
def test_ranges_are_short(indices, words):
    assert ranges(indices) == words


def test_equal_layers_become_one_row_at_the_place_of_the_first():
    keys = ["conv1.weight", *blocks("resblocks.", 12), "proj"]
    assert names(keys) == ["conv1.weight", "resblocks.[0-11](12)", "proj"]


def test_the_rows_of_layers_hold_the_keys_of_every_layer_in_order():
    keys = ["b.10.w", "b.9.w", "b.9.v", "b.10.v"]
    assert fold(keys, [0, 0, 1, 1]) == (Layers("b.", (9, 10), (Row(".w", (1, 0)), Row(".v", (2, 3)))),)


def test_a_layer_that_is_treated_otherwise_stays_by_itself():
    keys = blocks("b.", 4)
    assert names(keys, [0, 1, 0, 1, 0, 2, 0, 1]) == ["b.[0-1, 3](3)", "b.2.weight", "b.2.bias"]


def test_a_layer_with_another_key_stays_by_itself():
    assert names([*blocks("b.", 3), "b.2.extra"]) == ["b.[0-1](2)", "b.2.weight", "b.2.bias", "b.2.extra"]


def test_stages_that_differ_fold_at_their_blocks():
    keys = [*blocks("stages.0.blocks.", 2), *blocks("stages.1.blocks.", 3)]
    assert names(keys) == ["stages.0.blocks.[0-1](2)", "stages.1.blocks.[0-2](3)"]


def test_names_of_flax_fold_but_two_norms_are_no_layers():
    keys = [f"encoderblock_{n}/LayerNorm_{i}/{x}" for n in range(2) for i in range(2) for x in ("scale", "bias")]
    assert names(keys) == ["encoderblock_[0-1](2)"]
    assert names(keys[:4]) == keys[:4]
    assert names(["ln_1.weight", "ln_2.weight", "fc1.weight", "fc2.weight"]) != ["ln_[1-2](2)", "fc[1-2](2)"]


@pytest.mark.parametrize("key", ["1." * 20_000, "9" * 20_000, "b." + "9" * 5000 + ".w", "b.01.w", "", "."])
def test_odd_names_do_not_fail(key):
    assert names([key, "b.1.w"]) == [key, "b.1.w"]
