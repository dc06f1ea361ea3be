"""A load makes no temporary copies: it copies between views of the file and views of the model."""

from __future__ import annotations

import pytest
import torch
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import same_bits
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import keymap
from keymap.language.apply import apply_rules
from keymap.language.layout import Layout, whole
from keymap.language.rules import Join, Rule, RuleTable
from keymap.load import execute as load
from keymap.load.copying import copy_pieces

VIEWS = {"as_strided", "detach", "view", "alias", "unsqueeze", "slice", "select", "_unsafe_view", "t", "permute"}
VIEWS |= {"lift_fresh"}  # of an array that numpy made
WRITES = {"copy_", "fill_"}


class Operations(TorchDispatchMode):
    """Every operation that torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of_the_load(model, path, monkeypatch, **options) -> list[str]:
    """What torch runs while pieces are carried out, on all threads.

    ``read`` stands for each piece that the system reads into the model, ``strips`` for each that it reads by rows,
    which tiny models' are too small for by themselves. A `copy_` that converts dtype is one pass, too.
    """
    seen: list[str] = []
    monkeypatch.setattr("keymap.load.transposed._MIN_ELEMENTS", 0)

    def counted(name, function):
        def called(*arguments):
            found = function(*arguments)
            seen.extend([name] if found else [])
            return found

        return called

    def watched(function, without):
        def called(*arguments):
            with Operations() as mode:  # which watches one thread
                function(*arguments)
            seen.extend(name for name in mode.names if name not in without)

        return called

    monkeypatch.setattr("keymap.api.load_plan", watched(load.load_plan, ()))
    monkeypatch.setattr(
        "keymap.load.execute.copy_strip", watched(load.copy_strip, ("copy_",))
    )  # which its strips stand for
    monkeypatch.setattr("keymap.load.execute.byte_range", counted("read", load.byte_range))
    monkeypatch.setattr("keymap.load.execute.strips_of", counted("strips", load.strips_of))
    keymap.load_checkpoint(model, path, **options)
    return seen


def saved(tensors, path):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


CASES = {
    "same layout": lambda p: (saved(openclip.clip(seed=1).state_dict(), p), openclip.clip(seed=2), {}),
    "concat: transformers CLIP": lambda p: (saved(hf.disk_keys(hf.clip()), p), openclip.clip(), {}),
    "split: transformers SigLIP": lambda p: (saved(hf.disk_keys(hf.siglip()), p), openclip.siglip(), {}),
    "bridge: CLIP into a timm trunk": lambda p: (saved(hf.disk_keys(hf.clip()), p), openclip.clip_trunk(), {}),
    "views: timm into the native tower": lambda p: (
        saved(timm_towers.clip_vit().state_dict(), p),
        openclip.clip(),
        {"towers": "image"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_load_from_safetensors_runs_only_views_and_copies(name, tmp_path, monkeypatch):
    path, model, options = CASES[name](tmp_path / "model.safetensors")
    seen = operations_of_the_load(model, path, monkeypatch, **options)
    assert set(seen) <= VIEWS | WRITES | {"read", "strips"}
    pieces = keymap.plan_load(model, path, **options).pieces
    moved = seen.count("read") + seen.count("strips") + seen.count("copy_")
    assert moved == sum(piece.source is not None for piece in pieces)
    if name != "views: timm into the native tower":
        assert seen.count("read") > moved / 2


@pytest.mark.parametrize("scanned", [False, True])
def test_a_load_from_npz_transposes_and_unstacks_without_temporaries(scanned, tmp_path, monkeypatch):
    flat = big_vision.init()
    big_vision.save(big_vision.scan(flat) if scanned else flat, tmp_path / "model.npz")
    seen = operations_of_the_load(openclip.siglip(), tmp_path / "model.npz", monkeypatch)
    assert set(seen) <= VIEWS | WRITES | {"read", "strips"} and "strips" in seen


def test_a_dtype_conversion_is_part_of_the_copy(tmp_path, monkeypatch):
    openai.save_state_dict(openai.vit(), tmp_path / "clip.pt")
    model = openclip.clip(quick_gelu=True, **openai.VIT)
    seen = operations_of_the_load(model, tmp_path / "clip.pt", monkeypatch)
    assert set(seen) <= VIEWS | WRITES | {"read"} and "copy_" in seen


def test_only_a_resized_tensor_takes_a_temporary(tmp_path, monkeypatch):
    path = saved(openclip.clip(seed=1).state_dict(), tmp_path / "model.safetensors")
    seen = operations_of_the_load(openclip.clip(image_size=56), path, monkeypatch)
    assert seen.count("_upsample_bicubic2d_aa") == 1
    assert seen.count("empty") + seen.count("cat") <= 4


def joined(kind: str, members: dict[str, torch.Tensor], **options) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The layout that one join makes of members named x0, x1, ..."""
    from keymap.language.pattern_syntax import parse_source, parse_target

    source = parse_source("(x0|x1|x2)")
    part = Join(kind, options.pop("axis", 0), ("1",), ("x0", "x1", "x2"), **options)
    rule = Rule("test", "test", "", source, (parse_target([("out", 0)], source),), join=part)
    layouts = {key: whole(key, tuple(t.shape), t.dtype) for key, t in members.items()}
    return apply_rules(RuleTable((rule,)), layouts, {}).out["out"], members


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stack_makes_no_temporary(axis):
    layout, members = joined("stack", {f"x{i}": torch.randn(5, 7) for i in range(3)}, axis=axis)
    assert_only_views(layout, members, torch.stack(list(members.values()), dim=axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_concat_makes_no_temporary(axis):
    layout, members = joined("concat", {f"x{i}": torch.randn(5, 7) for i in range(3)}, axis=axis)
    assert_only_views(layout, members, torch.cat(list(members.values()), dim=axis))


def test_rows_make_no_temporary():
    members = {f"x{i}": torch.randn(11, 7) for i in range(3)}
    layout, members = joined("rows", members, ranges=((0, 2), (2, 7), (7, None)))
    expected = torch.cat([members["x0"][:2], members["x1"][2:7], members["x2"][7:]])
    assert_only_views(layout, members, expected)


def assert_only_views(layout: Layout, members: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    result = torch.full(layout.shape, float("nan"))
    with Operations() as mode:
        for piece in layout.pieces:
            copy_pieces([piece], members[piece.source], result)
    assert set(mode.names) <= VIEWS | WRITES
    assert same_bits(result, expected)


def test_a_plan_is_made_before_any_weight_is_read(tmp_path, monkeypatch):
    """The plan of a file whose weights are a hole in the disk: names, shapes and dtypes are enough."""
    import json
    import struct

    keys = hf.disk_keys(hf.clip())
    header, at = {}, 0
    for key, value in keys.items():
        size = value.numel() * value.element_size()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + at)
    model = openclip.clip()
    with Operations() as mode:
        plan = keymap.plan_load(model, path)
    assert len(plan.entries) == len(model.state_dict())
    assert set(mode.names) <= VIEWS
