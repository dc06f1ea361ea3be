"""What the tests of every format share: sizes, comparisons, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import hf, openclip
from peers.common import SQUARE, Size, assert_unchanged, bits, images, max_diff, same_bits
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

import keymap
from keymap.language.layout import whole
from keymap.plan.to_hub import bring_to_layouts, to_hub
from keymap.source.detect import detect
from keymap.source.registry import registry

LIMIT, CLEAR = 2e-5, 1e-3  # the largest difference of equal outputs; the smallest of outputs that differ
SIZES: dict[str, dict[str, Any]] = {"distinct": {}, "square": SQUARE}
EQUAL = {**SQUARE, "patch": 4, "image_size": 16}  # a patch has 4 * 4 * 3 = 48 values: its kernel is square, too
HEADS = {"image.heads": 3, "text.heads": 4}  # of the peers, where a format needs them to write a file
State = dict[str, Tensor]

# What training scripts wrap around a state dict
AROUND: dict[str, Callable[[State], Any]] = {
    "nothing": lambda state: state,
    "state_dict, module.": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "weights": lambda state: {"weights": state},
    "module": lambda state: {"module": state},
}


def sizes_of(table: Mapping[str, Any]) -> Any:
    """A fixture that runs each of its tests once for every entry of the table; assign it to ``sizes``."""

    def sizes(request: pytest.FixtureRequest) -> Any:
        return request.param

    return pytest.fixture(params=list(table.values()), ids=list(table))(sizes)


# --- comparisons ---


@torch.no_grad()
def assert_parity(
    model: nn.Module,
    image: Any = None,
    peer_image: Tensor | None = None,
    ids: Tensor | None = None,
    peer_text: Tensor | None = None,
) -> None:
    """The model's embeddings, not normalised, are those of the peer."""
    for encode, given, peer in ((model.encode_image, image, peer_image), (model.encode_text, ids, peer_text)):
        if peer is not None:
            assert max_diff(encode(given), peer) <= LIMIT
            assert float(peer.abs().max()) > 0.01


def assert_bits(model: nn.Module, expected: Mapping[str, Tensor], towers: tuple[str, ...] = ("",)) -> None:
    """Every tensor of the model, or of the towers whose keys begin so, has these bits."""
    state = {key: value for key, value in model.state_dict().items() if key.startswith(towers)}
    assert set(expected) == set(state)
    found = {key: value.detach().reshape(state[key].shape).contiguous() for key, value in expected.items()}
    assert [key for key, value in found.items() if not same_bits(value, state[key])] == []


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Two state dicts have the same keys and the same bits."""
    assert set(got) == set(want)
    assert [key for key in want if not same_bits(got[key].contiguous(), want[key].contiguous())] == []


def complete(result: keymap.LoadResult, form: str) -> Any:
    """The plan of a load of this format that used every key of the file and filled every key of the model."""
    assert (result.report.plan.format, result.missing_keys, result.unexpected_keys) == (form, [], [])
    return result.report.plan


def refused(
    model: nn.Module, path: Path, *words: str, error: type[keymap.KeymapError] = keymap.PlanError, **options: Any
) -> None:
    """The load is refused with an error that has all these words, and the model is unchanged."""
    before = bits(model)
    with pytest.raises(error) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert [word for word in words if word not in message] == [], message


# --- conversions ---


def assert_equals_a_conversion_by_hand(
    model: nn.Module,
    path: Path,
    keys: State,
    convert: Callable[[State], State],
    towers: tuple[str, ...] | None = None,
) -> Any:
    """A load gives the bits of a conversion in plain torch, key by key; returns the plan."""
    plan = keymap.load_checkpoint(model, path, towers=towers).report.plan
    state = model.state_dict()
    expected = {k: v for k, v in convert(keys).items() if k in state}
    assert len(expected) > 20
    assert set(expected) == {entry.key for entry in plan.entries if not entry.filled}
    wrong = [k for k, v in expected.items() if not same_bits(v.reshape(state[k].shape).contiguous(), state[k])]
    assert not wrong
    return plan


def assert_goes_to_the_hub_and_back(form: str, state: State) -> None:
    """A state dict of this format, converted to OpenCLIP's names and back, has the same keys and bits."""
    hub = keymap.convert_state_dict(state, to="open_clip", mapping=form)
    assert_same(keymap.convert_state_dict(hub, to=form, mapping="open_clip", facts=HEADS), state)


def assert_every_key_has_its_place(held: Mapping[str, Tensor], source: State, filled: set[str]) -> None:
    """From names and shapes alone: the keys of a published model become those of OpenCLIP's model.

    Args:
        held: the state dict of OpenCLIP's model, on the meta device.
        source: that of the published file.
        filled: keys of the model for which the file has none.
    """
    known = registry()
    found = detect(known, {key: whole(key, tuple(v.shape), v.dtype) for key, v in source.items()})
    now = to_hub(found, {})
    bring_to_layouts(known, now, {"text": ["native"]}, {})
    assert not now.faults and not now.unowned
    shapes = {key: layout.shape for key, layout in now.tensors.items()}
    assert shapes == {key: tuple(value.shape) for key, value in held.items() if key not in filled}
    assert sum(len(layout.sources) for layout in now.tensors.values()) >= len(source)


def assert_open_clips_and_timms_files_keep_their_formats(make: Callable[..., nn.Module], file: Callable[..., Path]):
    """A model's own file is read as open_clip, its trunk's as timm, and each loads bit for bit."""
    source, model = make(seed=1), make(seed=5)
    complete(keymap.load_checkpoint(model, file(source.state_dict(), "own.safetensors")), "open_clip")
    assert_bits(model, source.state_dict())
    model = make(seed=5)
    trunk = source.visual.trunk.state_dict()
    path = file(trunk, "timm.safetensors")
    if "head.fc.weight" in trunk:
        assert keymap.inspect_checkpoint(path).format == "timm"
    complete(keymap.load_checkpoint(model, path, towers=("image",)), "timm")
    assert_bits(model.visual.trunk, trunk)


def normalised(model: nn.Module, image: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's embeddings of images and text, of length 1."""
    with torch.no_grad():
        return normalize(model.encode_image(image), dim=-1), normalize(model.encode_text(ids), dim=-1)


# --- images and their grids ---


def pictures(sizes: Mapping[str, Any]) -> Tensor:
    """Random images for a model of these sizes."""
    return images(sizes.get("image_size", 28))


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, d) at another grid, as open_clip resizes positions."""
    picture = table.permute(0, 3, 1, 2).contiguous()
    return interpolate(picture, size=grid, mode="bicubic", antialias=True, align_corners=False).permute(0, 2, 3, 1)


def assert_resized(result: keymap.LoadResult, model: nn.Module, key: str, want: Tensor) -> None:
    """The load resized this key alone, and the model holds these values."""
    assert set(result.report.plan.resized) == {key}
    assert max_diff(model.state_dict()[key], want) <= 1e-5
    assert max_diff(want, torch.zeros_like(want)) > 0.1


def grid_of(sizes: Mapping[str, Any]) -> tuple[int, int] | None:
    """The grid of positions where it is not square, which no file records; None elsewhere."""
    size = Size(**sizes)
    return None if isinstance(size.image_size, int) else tuple(side // size.patch for side in size.image_hw)


def image_tower_in_timms_vit(peer: nn.Module, form: str, sizes: Mapping[str, Any], file: Callable[..., Path]) -> Any:
    """The image tower of this peer of transformers computes the same in OpenCLIP's model of timm's ViT; the plan."""
    model = openclip.clip_trunk(quick_gelu=True, seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)), towers=("image", "scale"))
    assert_parity(model, images(), hf.image_features(peer, images()))
    assert same_bits(model.logit_scale.detach(), peer.logit_scale.detach())
    return complete(result, form)
