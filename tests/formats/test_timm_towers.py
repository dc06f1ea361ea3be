"""timm's other towers load into OpenCLIP's, from timm's own files and from old ones with buffers that timm derives now.

The architectures are those of OpenCLIP's configurations (Swin, ViT with relative positions, ViT pooled by average,
ViTamin, MobileCLIP-B's hybrid, a ViT without a norm before its blocks), built small by timm itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from peers import openclip, timm_towers
from peers.common import Size, assert_unchanged, bits, images, max_diff, randomise, same_bits
from safetensors.torch import save_file
from timm.models.swin_transformer import checkpoint_filter_fn as timm_reads_swin

import keymap

LIMIT = 2e-5
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 48}


@dataclass(frozen=True)
class Tower:
    """timm's name and arguments; whether OpenCLIP puts the projection outside the trunk; the image's size."""

    base: str
    arguments: dict[str, Any]
    outside: bool = True
    size: int = 48
    pool: str = ""

    def peer(self, embed_dim: int = 24, bias: bool = False, seed: int = 0):
        """timm's model with the projection as its classifier."""
        model = randomise(timm.create_model(self.base, num_classes=embed_dim, **self.arguments), seed)
        head = getattr(model.head, "fc", model.head)
        return model if bias or not self.outside else timm_towers.zero(head.bias, model)

    def target(self, embed_dim: int = 24, seed: int = 5):
        """OpenCLIP's model around the same tower."""
        vision = {
            "timm_model_name": timm_towers.register(self.base, **self.arguments),
            "timm_pool": self.pool,
            "timm_proj": "linear" if self.outside else None,
            "image_size": self.size,
        }
        text = openclip._native_text(Size())
        return openclip._model(openclip.CustomTextCLIP, vision, text, {"seed": seed, "embed_dim": embed_dim})


SWIN = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "img_size": 112}
TOWERS = {
    "swin": Tower("swin_base_patch4_window7_224", SWIN, size=112),
    "relative positions": Tower("vit_relpos_medium_patch16_cls_224", VIT),
    "relative positions, no class token": Tower("vit_relpos_base_patch16_224", VIT),
    "pooled by average": Tower("vit_medium_patch16_gap_256", VIT),
    "vitamin": Tower("vitamin_small_224", {"depth": 2, "img_size": 64}, size=64),
    "vitamin without positions": Tower("vitamin_xlarge_256", {"depth": 1, "img_size": 64}, size=64),
    "hybrid": Tower("vit_base_mci_224", {"depth": 2, "img_size": 64}, outside=False, size=64, pool="token"),
    "no norm before the blocks": Tower("vit_base_patch16_224", VIT, outside=False, pool="token"),
}


@pytest.fixture
def file(tmp_path):
    def save(tensors, name="model.safetensors"):
        path = tmp_path / name
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
        return path

    return save


def buffers(model):
    """What timm derives, and stored up to 0.9.5: the buffers that no state dict holds now."""
    stored = model.state_dict()
    return {name: tensor for name, tensor in model.named_buffers() if name not in stored}


def old_swin(state):
    """Swin as timm before 0.9 had it: downsampling at the end of a stage, a plain classifier."""
    found = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "layers" and words[2] == "downsample":
            words[1] = str(int(words[1]) - 1)
        found[".".join(words).replace("head.fc.", "head.")] = value
    return found


@torch.no_grad()
def assert_parity(model, peer, size):
    got, want = model.encode_image(images(size)), peer(images(size))
    assert max_diff(got, want) <= LIMIT
    assert float(want.abs().max()) > 0.01


def assert_bits(model, peer, outside):
    """Every tensor of the image tower is timm's of the same name, but for a head outside the trunk."""
    state = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    expected = {f"visual.trunk.{k}": v for k, v in peer.state_dict().items()}
    if outside:
        expected = {k: v for k, v in expected.items() if not k.startswith("visual.trunk.head.")}
        expected["visual.head.proj.weight"] = getattr(peer.head, "fc", peer.head).weight
    assert set(expected) == set(state)
    assert [k for k, v in expected.items() if not same_bits(v, state[k])] == []


@pytest.mark.parametrize("square", [False, True], ids=["distinct", "square"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_of_timm_loads(name, square, file, proves):
    tower = TOWERS[name]
    width = TOWERS[name].peer().num_features
    size = {"embed_dim": width} if square else {}
    peer, model = tower.peer(**size), tower.target(**size)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",))
    assert result.report.plan.format == "timm"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_parity(model, peer, tower.size)
    assert_bits(model, peer, tower.outside)
    proves("parity", result.report.plan)


@pytest.mark.parametrize("name", [name for name in TOWERS if TOWERS[name].outside])
def test_a_bias_of_the_head_has_no_place_outside_the_trunk(name, file):
    tower = TOWERS[name]
    model = tower.target()
    before = bits(model)
    with pytest.raises(keymap.VerifyError, match=r"head\.(fc\.)?bias must hold 0"):
        keymap.load_checkpoint(model, file(tower.peer(bias=True).state_dict()), towers=("image",))
    assert_unchanged(model, before)


@pytest.mark.parametrize("whose", ["timm", "OpenCLIP", "OpenCLIP, image tower alone"])
def test_buffers_of_swin_that_older_versions_stored_are_left_out(whose, file):
    tower = TOWERS["swin"]
    peer, model = tower.peer(), tower.target()
    old = buffers(peer)
    assert {key.rsplit(".")[-1] for key in old} == {"relative_position_index", "attn_mask"}
    if whose == "timm":
        keys = {**peer.state_dict(), **old}
    else:
        source = tower.target(seed=1)
        keymap.load_checkpoint(source, file(peer.state_dict()), towers=("image",))
        keys = {**source.state_dict(), **{f"visual.trunk.{k}": v for k, v in old.items()}}
        if "alone" in whose:
            keys = {k.removeprefix("visual."): v for k, v in keys.items() if k.startswith("visual.")}
    result = keymap.load_checkpoint(model, file(keys, "old.safetensors"), towers=("image",))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    dropped = {k.removeprefix("visual.").removeprefix("trunk.") for k in result.report.plan.dropped}
    assert dropped - {"head.fc.bias"} == set(old)
    assert_parity(model, peer, tower.size)
    assert_bits(model, peer, tower.outside)


@pytest.mark.parametrize("whose", ["timm", "OpenCLIP"])
def test_swin_of_older_versions_counted_its_downsampling_otherwise(whose, file):
    tower = TOWERS["swin"]
    peer, model = tower.peer(), tower.target()
    state = peer.state_dict()
    old = old_swin(state) | old_swin(buffers(peer))
    read = timm_reads_swin(old, peer)  # timm's own opinion of what this file is
    assert set(read) == set(state) and all(same_bits(read[k], state[k]) for k in state)
    if whose == "OpenCLIP":
        trunk = {f"visual.trunk.{k}": v for k, v in old.items() if not k.startswith("head.")}
        old = {**model.state_dict(), **trunk, "visual.head.proj.weight": old["head.weight"]}
        del old["visual.trunk.layers.2.downsample.norm.weight"]
        del old["visual.trunk.layers.2.downsample.norm.bias"]
        del old["visual.trunk.layers.2.downsample.reduction.weight"]
    result = keymap.load_checkpoint(model, file(old), towers=("image",))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_parity(model, peer, tower.size)
    assert_bits(model, peer, tower.outside)


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_goes_to_the_hub_and_back(name):
    state = TOWERS[name].peer(bias=True).state_dict()
    hub = keymap.convert_state_dict(state, to="open_clip", mapping="timm")
    assert any(key.startswith("visual.head.proj") for key in hub) == TOWERS[name].outside
    back = keymap.convert_state_dict(hub, to="timm")
    assert set(back) == set(state)
    assert [k for k in state if not same_bits(back[k], state[k])] == []
