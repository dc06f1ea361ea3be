"""NaFlex of three owners loads and computes the same; files of SigLIP and of NaFlex load into each other's models."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import Case, rule_tests
from checks import (
    CLEAR,
    EQUAL,
    HEADS,
    LIMIT,
    State,
    assert_bits,
    assert_goes_to_the_hub_and_back,
    assert_parity,
    assert_resized,
    assert_same,
    complete,
    pictures,
    refused,
    resized,
    sizes_of,
)
from peers import big_vision, by_hand, hf, naflex, openai, openclip, timm_towers
from peers.common import SQUARE, Size, images, max_diff, same_bits, tokens
from timm.models.naflexvit import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import normalize

import keymap

pytestmark = pytest.mark.formats(
    "hf_siglip2_naflex", "big_vision_naflex", "map_trunk_naflex", "native_vit_naflex_token"
)

sizes = sizes_of({"distinct": {}, "square": EQUAL, "a table of 4x4": {"image_size": 56}})

DATA = Path(__file__).parents[1] / "data" / "big_vision"


def cut(image: Tensor, sizes) -> dict[str, Tensor]:
    """Whole images as patches."""
    return naflex.naflex_batch(list(image), sizes.get("patch", 14))


def mixed(sizes) -> dict[str, Tensor]:
    """One padded batch of grids 2x2, 1x4, 3x2 and 4x4. (torch 2.14 resizes to a single column wrongly: none here.)"""
    patch, generator = sizes.get("patch", 14), torch.Generator().manual_seed(5)
    grids = [(2, 2), (1, 4), (3, 2), (4, 4)]
    return naflex.naflex_batch([torch.randn(3, h * patch, w * patch, generator=generator) for h, w in grids], patch)


# --- conversions by hand ---


def side(rows: int) -> int:
    assert math.isqrt(rows) ** 2 == rows
    return math.isqrt(rows)


def to_naflex(state: Mapping[str, Tensor], trunk: str = "visual.trunk.") -> State:
    """The keys of a timm SigLIP ViT -> those of a NaFlexVit."""
    found = {k: v for k, v in state.items() if not k.startswith((f"{trunk}patch_embed.", f"{trunk}pos_embed"))}
    kernel, table = state[f"{trunk}patch_embed.proj.weight"], state[f"{trunk}pos_embed"]
    grid = side(table.shape[1])
    return found | {
        f"{trunk}embeds.proj.weight": kernel.permute(0, 2, 3, 1).flatten(1),
        f"{trunk}embeds.proj.bias": state[f"{trunk}patch_embed.proj.bias"],
        f"{trunk}embeds.pos_embed": table.reshape(1, grid, grid, -1),
    }


def to_fixed(state: Mapping[str, Tensor]) -> State:
    """The keys of a NaFlexVit -> those of a timm SigLIP ViT."""
    trunk = "visual.trunk."
    found = {k: v for k, v in state.items() if not k.startswith(f"{trunk}embeds.")}
    kernel, table = state[f"{trunk}embeds.proj.weight"], state[f"{trunk}embeds.pos_embed"]
    patch = side(kernel.shape[1] // 3)
    return found | {
        f"{trunk}patch_embed.proj.weight": kernel.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2),
        f"{trunk}patch_embed.proj.bias": state[f"{trunk}embeds.proj.bias"],
        f"{trunk}pos_embed": table.flatten(1, 2),
    }


def siglip2_by_hand(source: Mapping[str, Tensor]) -> State:
    """Siglip2Model -> NaFlexVit: SigLIP's conversion, but for the embeddings, of which that one renames the kernel."""
    found = by_hand.hf_siglip(source)
    table = source["vision_model.embeddings.position_embedding.weight"]
    grid = side(table.shape[0])
    del found["visual.trunk.pos_embed"]
    for part in ("weight", "bias"):
        found[f"visual.trunk.embeds.proj.{part}"] = found.pop(f"visual.trunk.patch_embed.proj.{part}")
    return found | {"visual.trunk.embeds.pos_embed": table.reshape(1, grid, grid, -1)}


def big_vision_by_hand(flat: big_vision.Flat) -> State:
    """big_vision's NaFlex -> NaFlexVit: its fixed-grid conversion, with a kernel that is already a matrix."""
    kernel, table = flat["img/embedding/kernel"], flat["img/pos_embedding"]
    found = by_hand.big_vision({**flat, "img/embedding/kernel": kernel[None, None]})
    del found["visual.trunk.patch_embed.proj.weight"], found["visual.trunk.pos_embed"]
    return found | {
        "visual.trunk.embeds.proj.weight": torch.from_numpy(kernel).T,
        "visual.trunk.embeds.proj.bias": found.pop("visual.trunk.patch_embed.proj.bias"),
        "visual.trunk.embeds.pos_embed": torch.from_numpy(table)[None],
    }


def token_by_hand(state: Mapping[str, Tensor]) -> State:
    """OpenCLIP's own ViT -> NaFlexVit with class token."""
    found = {k: v for k, v in state.items() if not k.startswith("visual.")}
    table = state["visual.positional_embedding"]
    grid = side(table.shape[0] - 1)
    found |= {
        "visual.trunk.embeds.cls_token": (state["visual.class_embedding"] + table[0])[None, None],
        "visual.trunk.embeds.pos_embed": table[1:].reshape(1, grid, grid, -1),
        "visual.trunk.embeds.proj.weight": state["visual.conv1.weight"].permute(0, 2, 3, 1).flatten(1),
        "visual.head.proj.weight": state["visual.proj"].T,
    }
    names = {"visual.ln_pre.": "visual.trunk.norm_pre.", "visual.ln_post.": "visual.trunk.norm."}
    blocks = "visual.transformer.resblocks."
    for i in {int(k.removeprefix(blocks).split(".")[0]) for k in state if k.startswith(blocks)}:
        names |= {
            f"{blocks}{i}.{old}": f"visual.trunk.blocks.{i}.{new}"
            for old, new in zip(by_hand.NATIVE, by_hand.TIMM, strict=True)
        }
    return found | {new + part: state[old + part] for old, new in names.items() for part in ("weight", "bias")}


# --- transformers' Siglip2Model ---


@pytest.mark.parametrize("written_by", [4, 5])
def test_siglip2_computes_the_same_in_a_naflexvit_for_images_of_every_grid(written_by, sizes, file, proves):
    peer = naflex.siglip2(**sizes)
    model = naflex.model(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(naflex.siglip2_keys(peer, written_by)))
    assert result.report.plan.format == "hf_siglip2_naflex"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert result.report.plan.layouts["image"] == ("naflex",)
    ids = tokens(eos=None)
    assert_parity(model, batch := mixed(sizes), naflex.image_features(peer, batch), ids, hf.text_features(peer, ids))
    image = pictures(sizes)  # whole images, which the model cuts into patches itself
    assert_parity(model, image, naflex.image_features(peer, cut(image, sizes)))
    assert_bits(model, siglip2_by_hand(naflex.siglip2_keys(peer)))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_siglip2_computes_the_same_in_a_siglip_vit_of_its_grid(sizes, file, proves):
    peer = naflex.siglip2(**sizes)
    model = openclip.siglip(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(naflex.siglip2_keys(peer)))
    assert result.report.plan.layouts["image"] == ("naflex", "map_trunk")
    image, ids = pictures(sizes), tokens(eos=None)
    want = naflex.image_features(peer, cut(image, sizes))
    assert_parity(model, image, want, ids, hf.text_features(peer, ids))
    assert_bits(model, to_fixed(siglip2_by_hand(naflex.siglip2_keys(peer))))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("target", [naflex.model, openclip.siglip], ids=["NaFlexVit", "fixed"])
@pytest.mark.parametrize("written_by", [4, 5])
def test_a_lone_image_tower_of_siglip2_loads(written_by, target, file):
    peer, model = naflex.siglip2(tower="image"), target(seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("visual.")}
    keys = naflex.siglip2_keys(peer, written_by)
    assert all(k.startswith("vision_model.") for k in keys) == (written_by == 4)
    result = keymap.load_checkpoint(model, file(keys), towers=("image",))
    assert (result.report.plan.format, set(result.report.plan.loaded)) == ("hf_siglip2_naflex", {"image"})
    assert_parity(model, images(), naflex.image_features(peer, cut(images(), {})))
    assert all(same_bits(v, model.state_dict()[k]) for k, v in before.items())
    refused(model, file(keys), "load with towers=('image',)")


@pytest.mark.parametrize("written_by", [4, 5])
def test_a_lone_text_tower_of_siglip2_is_read_as_siglips(written_by, file):
    """Equal keys and equal shapes, so one format owns both."""
    peer, model = naflex.siglip2(tower="text"), naflex.model(seed=5)
    result = keymap.load_checkpoint(model, file(naflex.siglip2_keys(peer, written_by)), towers=("text",))
    assert result.report.plan.format == "hf_siglip"
    ids = tokens(eos=None)
    with torch.no_grad():
        assert max_diff(model.encode_text(ids), hf.text_features(peer, ids)) <= LIMIT


def test_the_configuration_of_a_siglip2_folder_shows_an_activation_that_differs(tmp_path):
    peer = naflex.siglip2()
    peer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keymap.load_checkpoint(naflex.model(seed=5), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keymap.load_checkpoint(naflex.model(seed=5, act="gelu"), tmp_path)
    assert any("activation of the image tower" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["distinct", "square"])
def test_siglip2_with_an_identity_as_text_head_goes_into_a_model_without_text_projection(sizes, file, proves):
    """As SigLIP's release for many languages is; SigLIP 2 has the same text tower."""
    width = Size(**sizes).image_width
    peer = naflex.siglip2(**{**sizes, "text_width": width})
    head = peer.text_model.head
    with torch.no_grad():
        head.weight.copy_(torch.eye(width))
        head.bias.zero_()
    model = openclip.siglip(projection=False, seed=5, **sizes)
    keys = hf.disk_keys(peer)
    plan = complete(keymap.load_checkpoint(model, file(keys)), "hf_siglip2_naflex")
    assert {"text_model.head.weight", "text_model.head.bias"} <= set(plan.dropped)
    ids, pixels = tokens(eos=None), images()
    batch = naflex.naflex_batch(list(pixels), Size(**sizes).patch)
    with torch.no_grad():
        assert max_diff(model.encode_text(ids), hf.text_features(peer, ids)) <= LIMIT
        assert max_diff(model.encode_image(pixels), naflex.image_features(peer, batch)) <= LIMIT
    proves("parity", plan)
    expected = by_hand._hf_text(keys, "text.")
    state = {k: v for k, v in model.state_dict().items() if k.startswith("text.")}
    assert set(expected) == set(state) and all(same_bits(v.contiguous(), state[k]) for k, v in expected.items())
    proves("bit-equal", plan, ("text",))


# --- big_vision's NaFlex ---


FORMS = {
    "plain": lambda flat: flat,
    "params/": big_vision.with_prefix,
    "scanned": big_vision.scan,
    "scanned image tower, params/": lambda flat: big_vision.with_prefix(big_vision.scan(flat, ("img",))),
    "bfloat16 as void": big_vision.to_bfloat16_void,
    "scanned, params/, bfloat16": lambda f: big_vision.to_bfloat16_void(big_vision.with_prefix(big_vision.scan(f))),
}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_big_visions_naflex_loads(form, head, sizes, npz, proves):
    flat = FORMS[form](naflex.init(head=head, **sizes))
    model = naflex.model(projection=head, seed=5, **sizes)
    result = keymap.load_checkpoint(model, npz(flat, compressed=head))
    assert result == {} and result.missing_keys == []
    assert result.report.plan.format == "big_vision_naflex"
    image, ids = pictures(sizes), tokens(eos=None)
    want_image, want_text = naflex.forward(flat, image, ids)
    assert_parity(model, image, want_image, ids, want_text)
    expected = big_vision_by_hand(big_vision.plain(flat))
    assert_bits(model, expected)
    fixed = openclip.siglip(projection=head, seed=6, **sizes)
    other = keymap.load_checkpoint(fixed, npz(flat))
    assert_parity(fixed, image, want_image, ids, want_text)
    assert_bits(fixed, to_fixed(expected))
    for plan in (result.report.plan, other.report.plan):
        proves("parity", plan)
        proves("bit-equal", plan)


RECORDED = {"image_mlp": 2.0, "text_width": 48, "text_heads": 3, "text_depth": 2, "text_mlp": 2.0, "image_size": 56}


@pytest.mark.parametrize("target", [naflex.model, openclip.siglip], ids=["NaFlexVit", "fixed"])
def test_the_naflex_file_of_the_real_big_vision_model_gives_its_recorded_outputs(target):
    with np.load(DATA / "naflex_ref.npz") as reference:
        ref = {key: torch.from_numpy(reference[key]) for key in reference.files}
    model = target(seed=5, **RECORDED)
    keymap.load_checkpoint(model, DATA / "naflex.npz")
    batch = {
        "patches": ref["patches"],
        "patch_coord": torch.stack([ref["yabs"], ref["xabs"]], -1).long(),
        "patch_valid": torch.ones(ref["yabs"].shape, dtype=torch.bool),
    }
    if target is openclip.siglip:  # a whole image: the patches are in order, row by row
        assert batch["patch_coord"][0].tolist() == [[y, x] for y in range(4) for x in range(4)]
        batch = ref["patches"].reshape(2, 4, 4, 14, 14, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 56, 56)
    with torch.no_grad():
        assert max_diff(normalize(model.encode_image(batch), dim=-1), ref["zimg"]) <= LIMIT
        assert max_diff(normalize(model.encode_text(ref["txt"].long()), dim=-1), ref["ztxt"]) <= LIMIT


def test_the_flax_model_of_these_tests_gives_the_recorded_outputs_too():
    with np.load(DATA / "naflex.npz") as held, np.load(DATA / "naflex_ref.npz") as reference:
        flat, ref = dict(held), {key: torch.from_numpy(reference[key]) for key in reference.files}
    image = ref["patches"].reshape(2, 4, 4, 14, 14, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 56, 56)
    got_image, got_text = naflex.forward(flat, image, ref["txt"])
    assert max_diff(normalize(got_image, dim=-1), ref["zimg"]) <= LIMIT
    assert max_diff(normalize(got_text, dim=-1), ref["ztxt"]) <= LIMIT


# --- SigLIP and NaFlex into each other ---


def test_siglip_files_of_three_owners_load_into_a_naflexvit(sizes, file, npz, proves):
    image, ids = pictures(sizes), tokens(eos=None)
    peer, model = hf.siglip(**sizes), naflex.model(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)))
    assert result.report.plan.layouts["image"] == ("map_trunk", "naflex")
    assert_parity(model, image, hf.image_features(peer, image), ids, hf.text_features(peer, ids))
    assert_bits(model, to_naflex(by_hand.hf_siglip(hf.disk_keys(peer))))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)

    flat = big_vision.init(**sizes)
    result = keymap.load_checkpoint(model, npz(flat))
    want_image, want_text = big_vision.forward(flat, image, ids)
    assert_parity(model, image, want_image, ids, want_text)
    assert_bits(model, to_naflex(by_hand.big_vision(flat)))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)

    tower = timm_towers.siglip_vit(**sizes)
    keymap.load_checkpoint(model, file(tower.state_dict()), towers=("image",))
    assert_parity(model, image, tower(image).detach())


def test_a_siglip_model_of_open_clip_and_its_naflex_twin_load_each_others_files(sizes, file):
    fixed, flexible = openclip.siglip(seed=1, **sizes), naflex.model(seed=2, **sizes)
    state = copy.deepcopy(fixed.state_dict())
    keymap.load_checkpoint(flexible, file(state))
    assert_bits(flexible, to_naflex(state))
    image, ids = pictures(sizes), tokens(eos=None)
    with torch.no_grad():
        assert_parity(flexible, image, fixed.encode_image(image), ids, fixed.encode_text(ids))
    other = openclip.siglip(seed=3, **sizes)
    keymap.load_checkpoint(other, file(flexible.state_dict()))
    assert_bits(other, state)


@pytest.mark.parametrize("sizes", [{}, EQUAL], ids=["distinct", "square"])
def test_a_timm_tower_equals_timms_own_conversion_to_naflexvit(sizes, file):
    source = timm_towers.siglip_vit(**sizes).state_dict()
    model = naflex.model(seed=5, **sizes)
    keymap.load_checkpoint(model, file(source), towers=("image",))
    theirs = checkpoint_filter_fn({k: v.clone() for k, v in source.items()}, model.visual.trunk)
    assert_bits(model, {f"visual.trunk.{k}": v for k, v in theirs.items()}, ("visual.",))


def test_timms_own_naflexvit_loads_into_both(sizes, file, proves):
    tower = naflex.map_vit(**sizes)
    for target in (naflex.model, openclip.siglip):
        model = target(seed=5, **sizes)
        result = keymap.load_checkpoint(model, file(tower.state_dict()), towers=("image",))
        assert result.report.plan.format == "timm"
        assert_parity(model, pictures(sizes), tower(pictures(sizes)).detach())
        proves("parity", result.report.plan)


# --- positions at another grid: resized last, in the model's layout ---


GRIDS = [(2, 2), (3, 3), (2, 5), (4, 2), (6, 7)]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_naflex_table_is_resized_to_the_grid_of_a_siglip_vit(grid, file):
    peer = naflex.siglip2(image_size=56)
    model = openclip.siglip(seed=5, image_size=(grid[0] * 14, grid[1] * 14))
    result = keymap.load_checkpoint(model, file(naflex.siglip2_keys(peer)))
    table = peer.vision_model.embeddings.position_embedding.weight.detach().reshape(1, 4, 4, -1)
    assert_resized(result, model, "visual.trunk.pos_embed", resized(table, grid).flatten(1, 2))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_positions_of_a_siglip_file_are_resized_to_the_table_of_a_naflexvit(grid, file):
    peer = hf.siglip(image_size=56)
    model = naflex.model(seed=5, image_size=(grid[0] * 14, grid[1] * 14))
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)))
    table = peer.vision_model.embeddings.position_embedding.weight.detach().reshape(1, 4, 4, -1)
    assert_resized(result, model, "visual.trunk.embeds.pos_embed", resized(table, grid))


def test_a_naflex_table_that_is_not_square_loads_into_its_like_and_is_resized_for_others(npz):
    flat = naflex.init(image_size=(28, 70))
    model = naflex.model(seed=5, image_size=(28, 70))
    assert keymap.load_checkpoint(model, npz(flat)).report.plan.resized == {}
    assert_bits(model, big_vision_by_hand(flat))
    other = naflex.model(seed=5, image_size=(42, 28))
    result = keymap.load_checkpoint(other, npz(flat))
    table = torch.from_numpy(flat["img/pos_embedding"])[None]
    assert_resized(result, other, "visual.trunk.embeds.pos_embed", resized(table, (3, 2)))


def test_grids_that_are_not_square_do_not_convert_between_the_two_layouts(file, npz):
    refused(openclip.siglip(seed=5, image_size=(28, 70)), npz(naflex.init(image_size=(28, 70))), "h is 2, declared 5")
    rows = openclip.siglip(seed=1, image_size=(28, 70)).state_dict()
    refused(
        naflex.model(seed=5, image_size=(28, 70)), file(rows), "visual.trunk.pos_embed", "cannot infer axes h and w"
    )


def test_a_source_grid_that_is_not_the_tables_own_is_refused(npz):
    path, model = npz(naflex.init(image_size=56)), naflex.model(seed=5)
    refused(model, path, "source_grid=(2, 8): does not match the file, whose grid is 4x4", source_grid=(2, 8))
    keymap.load_checkpoint(model, path, source_grid=(4, 4))


# --- what does not fit is refused ---


@pytest.mark.parametrize("target", [naflex.model, openclip.siglip], ids=["NaFlexVit", "fixed"])
def test_a_patch_of_another_size_is_refused(target, file):
    path = file(naflex.siglip2_keys(naflex.siglip2(image_size=32, patch=16)))
    words = {naflex.model: ("[48, 768]", "[48, 588]"), openclip.siglip: ("[48, 3, 16, 16]", "[48, 3, 14, 14]")}[target]
    refused(target(seed=5), path, *words)
    result = keymap.load_checkpoint(model := target(seed=5), path, strict=False)
    assert [key.rsplit(".", 2)[1:] for key in result.report.plan.mismatched] == [["proj", "weight"]]
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("target", [openclip.clip, openclip.custom, openclip.clip_trunk, naflex.token_model])
def test_a_naflex_file_is_refused_by_towers_of_another_architecture(target, strict, file, npz):
    for path in (file(naflex.siglip2_keys(naflex.siglip2())), npz(naflex.init())):
        refused(target(seed=5), path, "image tower", strict=strict, towers=("image",))


def test_a_lost_tensor_is_named(file):
    keys = naflex.siglip2_keys(naflex.siglip2())
    lost = ("vision_model.head.attention.in_proj_bias", "vision_model.encoder.layers.1.self_attn.k_proj.bias")
    for key in lost:
        del keys[key]
    refused(naflex.model(seed=5), file(keys), *lost)


# --- OpenCLIP's ViT into a NaFlexVit with class token ---


LAYOUTS = {"hf_clip": ("native_vit",), "timm": ("clip_trunk", "native_vit"), "open_clip": ("native_vit",)}


def clip_file(kind, sizes):
    """(state dict, whether it has a text tower, the native state dict by hand, (image) -> features)."""
    if kind == "hf_clip":
        peer = hf.clip(**sizes)
        keys = hf.disk_keys(peer)
        return keys, True, by_hand.hf_clip(keys, "text."), lambda x: hf.image_features(peer, x)
    if kind == "timm":
        peer = timm_towers.clip_vit(**sizes)
        return peer.state_dict(), False, by_hand.timm_clip(peer.state_dict()), lambda x: peer(x).detach()
    peer = openclip.custom(seed=1, **sizes)
    return peer.state_dict(), True, peer.state_dict(), lambda x: peer.encode_image(x).detach()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_clip_file_computes_the_same_in_a_naflexvit_with_class_token(kind, sizes, file, proves):
    state, whole, native, features = clip_file(kind, sizes)
    model = naflex.token_model(seed=5, **sizes)
    towers = None if whole else ("image",)
    result = keymap.load_checkpoint(model, file(state), towers=towers)
    assert result.report.plan.format == kind
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert result.report.plan.layouts["image"] == (*LAYOUTS[kind], "naflex_token")
    image = pictures(sizes)
    assert_parity(model, image, features(image))
    assert_bits(model, token_by_hand(native), ("",) if whole else ("visual.",))
    if kind != "open_clip":
        proves("parity", result.report.plan, ("image",))
        proves("bit-equal", result.report.plan)


def test_openais_file_computes_the_same_in_a_naflexvit_with_class_token(tmp_path, proves):
    peer = openai.vit()
    openai.save_archive(peer, tmp_path / "ViT.pt")
    model = naflex.token_model(quick_gelu=True, seed=5, **openai.VIT)
    result = keymap.load_checkpoint(model, tmp_path / "ViT.pt")
    assert result.report.plan.layouts["image"] == ("native_vit", "naflex_token")
    image, ids = images(openai.VIT.get("image_size", 28)), tokens()
    assert_parity(model, image, openai.image_features(peer, image), ids, openai.text_features(peer, ids))
    proves("parity", result.report.plan)


@pytest.mark.parametrize("sizes", [{}, EQUAL], ids=["distinct", "square"])
def test_a_timm_clip_tower_equals_timms_own_conversion_to_naflexvit(sizes, file):
    """timm adds the position to the caller's own token, so it gets a copy."""
    source = timm_towers.clip_vit(**sizes).state_dict()
    model = naflex.token_model(seed=5, **sizes)
    keymap.load_checkpoint(model, file(source), towers=("image",))
    theirs = checkpoint_filter_fn({k: v.clone() for k, v in source.items()}, model.visual.trunk)
    head = {"visual.head.proj.weight": theirs.pop("head.weight")}
    assert not theirs.pop("head.bias").any()
    assert_bits(model, {f"visual.trunk.{k}": v for k, v in theirs.items()} | head, ("visual.",))


def test_the_difference_from_clip_is_the_eps_of_the_norms(tmp_path):
    """timm's NaFlexVit has eps 1e-6, CLIP 1e-5. Small variances show it: here the last norm sees little."""
    peer = hf.clip()
    with torch.no_grad():  # outputs of the last block that vary little, so that eps counts
        for name, parameter in peer.vision_model.named_parameters():
            if "encoder.layers.1." in name or "layers.0.mlp" in name or "pre_layrnorm" in name:
                parameter.mul_(0.03)
    peer.save_pretrained(tmp_path)
    image = images()
    want = hf.image_features(peer, image)
    same, other = naflex.token_model(seed=5, eps=1e-5), naflex.token_model(seed=5, eps=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keymap.load_checkpoint(same, tmp_path)
    with pytest.warns(keymap.ConfigurationWarning, match="eps of the image tower's norms"):
        keymap.load_checkpoint(other, tmp_path)
    assert_parity(same, image, want)
    with torch.no_grad():
        assert max_diff(other.encode_image(image), want) > CLEAR
    for module in other.visual.modules():  # the same weights with CLIP's eps: no difference is left
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    assert_parity(other, image, want)


def test_the_way_to_a_class_token_leads_one_way(file):
    with pytest.raises(keymap.PlanError, match="naflex_token"):
        keymap.convert_state_dict(naflex.token_model().state_dict(), to="hf_clip")
    refused(openclip.clip(seed=5), file(naflex.token_model().state_dict()), "naflex_token")
    own = naflex.token_model(seed=1).state_dict()
    model = naflex.token_model(seed=2)
    keymap.load_checkpoint(model, file(own))
    assert_bits(model, own)


def test_timms_own_naflexvit_with_class_token_loads(sizes, file, proves):
    tower, model = naflex.token_vit(**sizes), naflex.token_model(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(tower.state_dict()), towers=("image",))
    assert result.report.plan.layouts["image"] == ("naflex_token",)
    assert "head.bias" in result.report.plan.dropped
    assert_parity(model, pictures(sizes), tower(pictures(sizes)).detach())
    proves("parity", result.report.plan)


def test_positions_without_a_row_for_the_class_token_are_refused(file):
    """Their first row is a patch's: adding it to the token would be silent, and wrong."""
    state = timm_towers.clip_vit(no_embed_class=True).state_dict()
    refused(naflex.token_model(seed=5), file(state), "visual.positional_embedding", towers=("image",))


def test_a_clip_file_of_another_grid_is_resized_for_a_naflexvit(file):
    peer = hf.clip(image_size=56)
    model = naflex.token_model(seed=5, image_size=42)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)))
    table = peer.vision_model.embeddings.position_embedding.weight.detach()[1:].reshape(1, 4, 4, -1)
    assert_resized(result, model, "visual.trunk.embeds.pos_embed", resized(table, (3, 3)))


# --- there and back ---


ROUND = {
    "transformers": ("hf_siglip2_naflex", lambda **s: naflex.siglip2_keys(naflex.siglip2(**s))),
    "transformers, image": (
        "hf_siglip2_naflex",
        lambda **s: naflex.siglip2_keys(naflex.siglip2(tower="image", **s), 4),
    ),
    "big_vision": ("big_vision_naflex", lambda **s: {k: torch.from_numpy(v) for k, v in naflex.init(**s).items()}),
    "timm": ("timm", lambda **s: naflex.map_vit(**s).state_dict()),
    "timm, class token": ("timm", lambda **s: naflex.token_vit(**s).state_dict()),
}


@pytest.mark.parametrize("name", ROUND)
def test_a_state_dict_goes_to_the_hub_and_back(name, sizes):
    form, make = ROUND[name]
    assert_goes_to_the_hub_and_back(form, make(**sizes))


@pytest.mark.parametrize("way", [("hf_siglip2_naflex", "hf_siglip"), ("big_vision_naflex", "big_vision_siglip")])
def test_naflex_and_siglip_files_convert_into_each_other_and_back(way, sizes):
    flexible, fixed = way
    state = naflex.siglip2_keys(naflex.siglip2(**sizes))
    for there in way:
        home = keymap.convert_state_dict(state, to=there, facts=HEADS)
        back = keymap.convert_state_dict(home, to="hf_siglip2_naflex", mapping=there)
        assert_same(back, state)
    state = hf.disk_keys(hf.siglip(**sizes))
    assert_same(
        keymap.convert_state_dict(keymap.convert_state_dict(state, to=flexible, facts=HEADS), to="hf_siglip"), state
    )
    written = keymap.convert_state_dict(state, to=fixed, facts=HEADS)
    assert (fixed == "hf_siglip") == (set(written) == set(state))


# --- broken rules ---


def big_vision_naflex() -> Case:
    image, ids = images(16), tokens(eos=None)
    flat = naflex.init(**EQUAL)
    state = {key: torch.from_numpy(value) for key, value in flat.items()}
    outputs = [*naflex.forward(flat, image, ids), state["t"], state["b"]]
    return Case("big_vision_naflex", state, naflex.model(seed=5, **EQUAL), outputs, image, ids)


def class_token() -> Case:
    peer, image, ids = hf.clip(**EQUAL), images(16), tokens()
    outputs = [hf.image_features(peer, image), hf.text_features(peer, ids), peer.logit_scale]
    return Case("native_vit_naflex_token", hf.disk_keys(peer), naflex.token_model(seed=5, **EQUAL), outputs, image, ids)


def siglip(form: str, target, flexible: bool) -> Case:
    """A file of SigLIP, or of SigLIP 2 NaFlex where ``flexible``, for this model."""
    image, ids = images(16), tokens(eos=None)
    peer = (naflex.siglip2 if flexible else hf.siglip)(**EQUAL)
    state = naflex.siglip2_keys(peer) if flexible else hf.disk_keys(peer)
    pixels = naflex.naflex_batch(list(image), 4) if flexible else image
    features = (naflex if flexible else hf).image_features(peer, pixels)
    outputs = [features, hf.text_features(peer, ids), peer.logit_scale, peer.logit_bias]
    return Case(form, state, target(seed=5, **EQUAL), outputs, image, ids)


CASES = {
    "hf_siglip2_naflex": lambda: siglip("hf_siglip2_naflex", naflex.model, flexible=True),
    "big_vision_naflex": big_vision_naflex,
    "map_trunk_naflex": lambda: siglip("map_trunk_naflex", naflex.model, flexible=False),
    "map_trunk_naflex, the other way": lambda: siglip("map_trunk_naflex", openclip.siglip, flexible=True),
    "native_vit_naflex_token": class_token,
}

ROWS = r"""
hf_siglip2_naflex: the kernel transposed: differs
- vision_model.embeddings.patch_embedding.(weight|bias): visual.trunk.embeds.proj.\1
+ vision_model.embeddings.patch_embedding.weight: {to: visual.trunk.embeds.proj.weight, view: a b -> b a}
+ vision_model.embeddings.patch_embedding.bias: visual.trunk.embeds.proj.bias
hf_siglip2_naflex: the kernel read channels first: differs
- vision_model.embeddings.patch_embedding.(weight|bias): visual.trunk.embeds.proj.\1
+ vision_model.embeddings.patch_embedding.weight:
+   {to: visual.trunk.embeds.proj.weight, view: o (c p) -> o (p c), sizes: {c: 3}}
+ vision_model.embeddings.patch_embedding.bias: visual.trunk.embeds.proj.bias
hf_siglip2_naflex: rows and columns of the table exchanged: differs
- view: (h w) d -> 1 h w d
+ view: (h w) d -> 1 w h d
hf_siglip2_naflex: the table left flat: refused
- {to: visual.trunk.embeds.pos_embed, view: (h w) d -> 1 h w d, sizes: {h: w}}
+ visual.trunk.embeds.pos_embed
hf_siglip2_naflex: q taken from the end of the pool's projection: differs
- (q|kv).\1, split: [1, 2]}
+ (kv|q).\1, split: [2, 1]}
hf_siglip2_naflex: the layers of the pool's MLP swapped: differs
- layernorm.(weight|bias): norm.\1
- mlp.fc(1|2).(weight|bias): mlp.fc\1.\2
+ layernorm.(weight|bias): norm.\1
+ mlp.fc(1|2).(weight|bias): mlp.fc<1:other>.\2
hf_siglip2_naflex: the norms of the tower and of its pool exchanged: differs
- vision_model.post_layernorm.(weight|bias): visual.trunk.norm.\1
+ vision_model.head.layernorm.(weight|bias): visual.trunk.norm.\1
+ vision_model.post_layernorm.(weight|bias): visual.trunk.attn_pool.norm.\1
- attention.out_proj.(weight|bias): proj.\1
- layernorm.(weight|bias): norm.\1
+ attention.out_proj.(weight|bias): proj.\1
hf_siglip2_naflex: the output of the pool transposed: differs
- attention.out_proj.(weight|bias): proj.\1
+ attention.out_proj.weight: {to: proj.weight, view: a b -> b a}
+ attention.out_proj.bias: proj.bias
hf_siglip2_naflex: q and k swapped: differs
- self_attn.(q|k|v)_proj.(weight|bias): {to: attn.qkv.\2
+ self_attn.(k|q|v)_proj.(weight|bias): {to: attn.qkv.\2
hf_siglip2_naflex: the text head transposed: differs
- text_model.head.(weight|bias): text.text_projection.\1
+ text_model.head.weight: {to: text.text_projection.weight, view: a b -> b a}
+ text_model.head.bias: text.text_projection.bias
hf_siglip2_naflex: scale and bias exchanged: differs
- logit_(scale|bias): logit_\1
+ logit_(scale|bias): logit_<1:turned>
big_vision_naflex: the kernel not transposed: differs
- {to: visual.trunk.embeds.proj.weight, view: i o -> o i}
+ visual.trunk.embeds.proj.weight
big_vision_naflex: rows and columns of the table exchanged: differs
- view: h w d -> 1 h w d
+ view: h w d -> 1 w h d
big_vision_naflex: the table without its leading axis: refused
- {to: visual.trunk.embeds.pos_embed, view: h w d -> 1 h w d}
+ visual.trunk.embeds.pos_embed
big_vision_naflex: k and v of the MAP head swapped: differs
- (key|value)/kernel: {to: kv.weight
+ (value|key)/kernel: {to: kv.weight
big_vision_naflex: heads inside out: differs
- attn.qkv.weight, view: d h k -> (h k) d
+ attn.qkv.weight, view: d h k -> (k h) d
big_vision_naflex: t and b exchanged: differs
- t: logit_scale
- b: logit_bias
+ t: logit_bias
+ b: logit_scale
map_trunk_naflex: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
map_trunk_naflex: the kernel read as width, height: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (pw ph c)
map_trunk_naflex: rows and columns of the table exchanged: differs
- view: 1 (h w) d -> 1 h w d
+ view: 1 (w h) d -> 1 h w d
map_trunk_naflex: the wrong number of channels in the kernel: refused
- sizes: {c: 3, ph: pw}
+ sizes: {c: 4, ph: pw}
map_trunk_naflex, the other way: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
map_trunk_naflex, the other way: rows and columns of the table exchanged: differs
- view: 1 (h w) d -> 1 h w d
+ view: 1 (w h) d -> 1 h w d
map_trunk_naflex, the other way: no size that makes the patch square: refused
- sizes: {c: 3, ph: pw}
+ sizes: {c: 3}
native_vit_naflex_token: the position of the class token forgotten: differs
- {to: visual.trunk.embeds.cls_token, view: d -> 1 1 d, add: 'visual.positional_embedding[0]', oneway: true}
+ {to: visual.trunk.embeds.cls_token, view: d -> 1 1 d}
native_vit_naflex_token: the position of the first patch added: differs
- add: 'visual.positional_embedding[0]'
+ add: 'visual.positional_embedding[1]'
native_vit_naflex_token: the last position left out instead of the first: differs
- take: [1, null]
+ take: [0, 16]
native_vit_naflex_token: all positions taken: refused
- take: [1, null]
+ take: [0, null]
native_vit_naflex_token: rows and columns of the table exchanged: differs
- view: (h w) d -> 1 h w d
+ view: (w h) d -> 1 h w d
native_vit_naflex_token: the kernel in the order of the convolution: differs
- view: o c ph pw -> o (ph pw c)
+ view: o c ph pw -> o (c ph pw)
native_vit_naflex_token: the projection not transposed: differs
- visual.head.proj.weight, view: in out -> out in,
+ visual.head.proj.weight,
native_vit_naflex_token: the norms before and after exchanged: differs
- visual.ln_pre.(weight|bias): {to: visual.trunk.norm_pre.\1, optional: true}
+ visual.ln_pre.(weight|bias): {to: visual.trunk.norm.\1, optional: true}
- visual.ln_post.(weight|bias): visual.trunk.norm.\1
+ visual.ln_post.(weight|bias): visual.trunk.norm_pre.\1
native_vit_naflex_token: fc1 and fc2 swapped: differs
- mlp.c_fc.(weight|bias): mlp.fc1.\1
- mlp.c_proj.(weight|bias): mlp.fc2.\1
+ mlp.c_fc.(weight|bias): mlp.fc2.\1
+ mlp.c_proj.(weight|bias): mlp.fc1.\1
"""

LOOKUPS = "  other: {1: 2, 2: 1}\n  turned: {scale: bias, bias: scale}\n"  # that the rows use

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)
