"""timm's image towers load into OpenCLIP's, from timm's own files and from old ones, and compute the same.

The architectures are those of OpenCLIP's configurations: ViT of CLIP and of SigLIP, ConvNeXt, CLIP's ResNet, Swin, ViT
with relative positions, ViT pooled by average, ViTamin, MobileCLIP-B's hybrid, a ViT without a norm before its blocks.
timm itself builds them, small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from broken import Case, rule_tests
from checks import LIMIT, SIZES, assert_equals_a_conversion_by_hand, assert_parity, complete, sizes_of
from peers import by_hand, layouts, openclip, timm_towers
from peers.common import SQUARE, Size, assert_unchanged, bits, images, max_diff, randomised, same_bits
from timm.models.swin_transformer import checkpoint_filter_fn as timm_reads_swin

import keymap

pytestmark = pytest.mark.formats("timm", "timm_resnet", "native_vit_clip_trunk")

sizes = sizes_of(SIZES)

TARGETS = {"flat": openclip.clip, "custom": openclip.custom, "timm trunk": openclip.clip_trunk}


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("target", ["flat", "custom", "timm trunk"])
def test_timm_clip_vit_loads_into_native_and_timm_towers(target, quick_gelu, sizes, file, proves):
    peer = timm_towers.clip_vit(quick_gelu=quick_gelu, **sizes)
    model = TARGETS[target](quick_gelu=quick_gelu, seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers="image")
    assert result.report.plan.format == "timm"
    assert_parity(model, images(), peer(images()).detach())
    proves("parity", result.report.plan)


def test_timm_clip_vit_with_a_head_bias_loads_where_there_is_a_place_and_is_refused_elsewhere(file):
    path = file(timm_towers.clip_vit(head_bias=True).state_dict())
    keymap.load_checkpoint(openclip.clip_trunk(), path, towers=("image",))
    with pytest.raises(keymap.VerifyError, match=r"head.bias must hold 0"):
        keymap.load_checkpoint(openclip.clip(), path, towers=("image",))


def test_timm_siglip_vit_loads(sizes, file, proves):
    peer = timm_towers.siglip_vit(**sizes)
    model = openclip.siglip(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",))
    assert_parity(model, images(), peer(images()).detach())
    proves("parity", result.report.plan)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_timm_convnext_loads_with_its_head(head, file, proves):
    peer = timm_towers.convnext(mlp_head=head == "mlp")
    model = openclip.convnext(head=head, seed=5)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",))
    assert "head.fc.bias" in result.report.plan.dropped
    assert_parity(model, images(64), peer(images(64)).detach())
    proves("parity", result.report.plan)


def test_timm_convnext_with_a_head_bias_is_refused(file):
    path = file(timm_towers.convnext(head_bias=True).state_dict())
    with pytest.raises(keymap.VerifyError, match=r"head.fc.bias must hold 0"):
        keymap.load_checkpoint(openclip.convnext(), path, towers=("image",))


def test_timm_resnet_clip_loads_into_the_modified_resnet(file, proves):
    peer = timm_towers.resnet_clip()
    model = openclip.resnet(seed=5)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",))
    assert result.report.plan.format == "timm_resnet"
    assert_parity(model, images(64), peer(images(64)).detach())
    proves("parity", result.report.plan)


PAIRS = {
    "clip vit": (timm_towers.clip_vit, openclip.clip, by_hand.timm_clip),
    "siglip vit": (timm_towers.siglip_vit, openclip.siglip, by_hand.timm_trunk),
    "convnext": (timm_towers.convnext, openclip.convnext, by_hand.timm_convnext),
    "resnet": (timm_towers.resnet_clip, openclip.resnet, by_hand.timm_resnet),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_tensor_equals_a_conversion_written_by_hand(name, file, proves):
    peer, target, convert = PAIRS[name]
    keys = peer().state_dict()
    proves("bit-equal", assert_equals_a_conversion_by_hand(target(seed=5), file(keys), keys, convert, ("image",)))


# --- towers of OpenCLIP's layouts that keep timm's names ---


def inside(name: str) -> bool:
    """Whether the tower is timm's, with CLIP's projection in it."""
    model = layouts.MODELS[name](seed=1)
    return hasattr(model.visual, "trunk") and not len(list(model.visual.head.parameters()))


@pytest.mark.parametrize("name", [name for name in layouts.MODELS if inside(name)])
def test_a_tower_of_timm_computes_the_same(name, file, proves):
    """Towers whose projection is in the trunk; `test_a_tower_of_timm_loads` has the others."""
    peer, model = layouts.MODELS[name](seed=1).visual.trunk, layouts.MODELS[name](seed=2)
    plan = complete(keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",)), "timm")
    size = model.visual.image_size
    pixels = images(size if isinstance(size, int) else tuple(size))
    with torch.no_grad():
        got, want = model.encode_image(pixels), peer(pixels)
    assert max_diff(got, want) <= LIMIT and float(want.abs().max()) > 0.01
    assert [k for k, v in peer.state_dict().items() if not same_bits(v, model.visual.trunk.state_dict()[k])] == []
    proves("parity", plan)


def test_a_clip_vit_of_timm_with_layer_scales_computes_the_same(sizes, file, proves):
    size = Size(**sizes)
    arguments = {**timm_towers.vit_sizes(size), "init_values": 1e-4, "num_classes": size.embed_dim}
    peer = randomised(timm.create_model, "vit_base_patch16_clip_224", **arguments)
    timm_towers.zero(peer.head.bias, peer)
    model = openclip.clip(seed=5, vision={"ls_init_value": 1e-4}, **sizes)
    plan = complete(keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",)), "timm")
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), peer(images())) <= LIMIT
    gamma = model.visual.transformer.resblocks[1].ls_2.gamma
    assert same_bits(gamma.detach(), peer.blocks[1].ls2.gamma.detach()) and gamma.abs().max().item() > 0.1
    proves("parity", plan)


# --- timm's other architectures ---


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
        model = randomised(timm.create_model, self.base, num_classes=embed_dim, **self.arguments, seed=seed)
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
        text = openclip.native_text(Size())
        return openclip._model(openclip.CustomTextCLIP, vision, text, {"seed": seed, "embed_dim": embed_dim})


SWIN = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "img_size": 112}

TOWERS = {
    "swin": Tower("swin_base_patch4_window7_224", SWIN, size=112),
    "relative positions": Tower("vit_relpos_medium_patch16_cls_224", VIT),
    "relative positions, no class token": Tower("vit_relpos_base_patch16_224", VIT),
    "pooled by average": Tower("vit_medium_patch16_gap_256", VIT),
    "vitamin": Tower("vitamin_small_224", layouts.VITAMIN, size=64),
    "vitamin without positions": Tower("vitamin_xlarge_256", layouts.VITAMIN, size=64),
    "hybrid": Tower("vit_base_mci_224", {"depth": 2, "img_size": 64}, outside=False, size=64, pool="token"),
    "no norm before the blocks": Tower("vit_base_patch16_224", VIT, outside=False, pool="token"),
}


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


def assert_holds(model, peer, outside):
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
    assert_parity(model, images(tower.size), peer(images(tower.size)))
    assert_holds(model, peer, tower.outside)
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
    assert_parity(model, images(tower.size), peer(images(tower.size)))
    assert_holds(model, peer, tower.outside)


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
    assert_parity(model, images(tower.size), peer(images(tower.size)))
    assert_holds(model, peer, tower.outside)


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_goes_to_the_hub_and_back(name):
    state = TOWERS[name].peer(bias=True).state_dict()
    hub = keymap.convert_state_dict(state, to="open_clip", mapping="timm")
    assert any(key.startswith("visual.head.proj") for key in hub) == TOWERS[name].outside
    back = keymap.convert_state_dict(hub, to="timm")
    assert set(back) == set(state)
    assert [k for k in state if not same_bits(back[k], state[k])] == []


# --- broken rules ---


def tower(form: str, make, target, side: int, **sizes) -> Case:
    peer, image = make(**sizes), images(side)
    outputs = [peer(image).detach()]
    return Case(form, peer.state_dict(), target(seed=5, **sizes), outputs, image, towers=("image",))


def other(name: str) -> Case:
    kind = TOWERS[name]
    width = kind.peer().num_features
    peer, image = kind.peer(embed_dim=width), images(kind.size)
    state = old_swin(peer.state_dict()) if name == "swin" else peer.state_dict()
    return Case("timm", state, kind.target(embed_dim=width), [peer(image).detach()], image, towers=("image",))


CASES = {
    "timm": lambda: tower("timm", timm_towers.convnext, openclip.convnext, 64),
    "timm_resnet": lambda: tower("timm_resnet", timm_towers.resnet_clip, openclip.resnet, 64),
    "native_vit_clip_trunk": lambda: tower("native_vit_clip_trunk", timm_towers.clip_vit, openclip.clip, 28, **SQUARE),
    **{f"timm {name}": partial(other, name) for name in ("swin", "pooled by average", "relative positions")},
}

ROWS = r"""
timm_resnet: the norms of a block shifted: differs
- conv(1_1x1|2_kxk|3_1x1).bn.: {to: visual.layer<1+1>.\2.bn<3:conv>.,
+ conv(1_1x1|2_kxk|3_1x1).bn.: {to: visual.layer<1+1>.\2.bn<3:turned>.,
timm_resnet: the convolutions of a block shifted: refused
- \2.conv<3:conv>.weight
+ \2.conv<3:turned>.weight
timm_resnet: the stages shifted: refused
- visual.layer<1+1>.\2.conv
+ visual.layer<1+2>.\2.conv
timm_resnet: q and k swapped: differs
- visual.attnpool.\1_proj.\2
+ visual.attnpool.<1:pool>_proj.\2
timm_resnet: mean and variance swapped: differs
- (weight|bias|running_mean|running_var|num_batches_tracked): \1
+ (weight|bias|running_mean|running_var|num_batches_tracked): <1:stats>
timm_resnet: the norms of the stem shifted: differs
- {to: visual.bn\1.,
+ {to: visual.bn<1:stem>.,
timm: the head transposed: refused
- head.fc.weight: visual.head.proj.weight
+ head.fc.weight: {to: visual.head.proj.weight, view: a b -> b a}
timm: the head left in the trunk: refused
- head.fc.weight: visual.head.proj.weight
+ head.fc.weight: visual.trunk.head.fc.weight
native_vit_clip_trunk: norm1 and norm2 swapped: differs
- ln_(1|2).(weight|bias): norm\1.\2
+ ln_(1|2).(weight|bias): norm<1:turned>.\2
native_vit_clip_trunk: the projection not transposed: differs
- visual.trunk.head.weight, view: in out -> out in,
+ visual.trunk.head.weight,
native_vit_clip_trunk: the norms before and after exchanged: differs
- visual.trunk.norm_pre.\1
+ visual.trunk.norm.\1
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.norm_pre.\1
native_vit_clip_trunk: fc1 and fc2 swapped: differs
- mlp.c_fc.(weight|bias): mlp.fc1.\1
- mlp.c_proj.(weight|bias): mlp.fc2.\1
+ mlp.c_fc.(weight|bias): mlp.fc2.\1
+ mlp.c_proj.(weight|bias): mlp.fc1.\1
native_vit_clip_trunk: qkv transposed: refused
- attn.in_proj_(weight|bias): attn.qkv.\1
+ attn.in_proj_weight: {to: attn.qkv.weight, view: a b -> b a}
+ attn.in_proj_bias: attn.qkv.bias
timm swin: an old file's downsampling left where it was: refused
- layers.<1+1>.downsample.\2.\3
+ layers.<1+0>.downsample.\2.\3
timm swin: an old file's classifier left as it was: refused
- head.(weight|bias): head.fc.\1
+ header.(weight|bias): head.fc.\1
timm pooled by average: the head transposed: differs
- head.weight: visual.head.proj.weight
+ head.weight: {to: visual.head.proj.weight, view: a b -> b a}
timm relative positions: the head left in the trunk: refused
- blocks.0.attn.rel_pos.mlp.fc1.weight]} # a ViT
+ blocks.0.attn.rel_position.mlp.fc1.weight]} # a ViT
"""

LOOKUPS = {  # that the rows use
    "timm_resnet": (
        "  turned: {1_1x1: 2, 2_kxk: 1, 3_1x1: 3}\n  pool: {q: k, k: q, v: v}\n  stem: {1: 2, 2: 1, 3: 3}\n"
        "  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean, "
        "num_batches_tracked: num_batches_tracked}\n"
    ),
    "native_vit_clip_trunk": "  turned: {1: 2, 2: 1}\n",
}


REFUSALS = (keymap.DetectionError, keymap.PlanError, keymap.VerifyError)

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS, REFUSALS)
