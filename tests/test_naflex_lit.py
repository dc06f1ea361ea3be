"""NaFlex of three owners and LiT load, and compute what their owners' code computes; SigLIP and NaFlex into each other.

As in test_parity: real weights of a peer, all random, in the file that its owner writes; then forward passes at most
2e-5 apart, for sizes that all differ and for sizes where matrices are square; then every bit against a conversion
written by hand.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import big_vision, by_hand, hf, lit, naflex, openai, openclip, timm_towers
from peers.common import SQUARE, assert_unchanged, bits, images, max_diff, same_bits, tokens
from safetensors.torch import save_file
from timm.models.naflexvit import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

import keymap

LIMIT, CLEAR = 2e-5, 1e-3
EQUAL = {**SQUARE, "patch": 4, "image_size": 16}  # a patch has 4 * 4 * 3 = 48 values: the kernel is square, too
SIZES = {"distinct": {}, "square": EQUAL, "a table of 4x4": {"image_size": 56}}
DATA = Path(__file__).parent / "data" / "big_vision"
HEADS = {"image.heads": 3, "text.heads": 4}
State = dict[str, Tensor]


@pytest.fixture(params=SIZES, ids=list(SIZES))
def sizes(request):
    return SIZES[request.param]


@pytest.fixture
def file(tmp_path) -> Callable[..., Path]:
    def save(state: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
        save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def npz(tmp_path) -> Callable[..., Path]:
    def save(flat: big_vision.Flat, compressed: bool = False) -> Path:
        big_vision.save(flat, tmp_path / "model.npz", compressed)
        return tmp_path / "model.npz"

    return save


@torch.no_grad()
def assert_parity(model, image, want_image, ids=None, want_text=None, limit=LIMIT):
    got = [(model.encode_image(image), want_image)]
    got += [] if ids is None else [(model.encode_text(ids), want_text)]
    for ours, theirs in got:
        assert max_diff(ours, theirs) <= limit
        assert float(theirs.abs().max()) > 0.01


def assert_bits(model: nn.Module, expected: Mapping[str, Tensor], towers: tuple[str, ...] = ("",)) -> None:
    """Every tensor of the model (or of those whose keys begin so) holds these values."""
    state = {k: v for k, v in model.state_dict().items() if k.startswith(towers)}
    assert set(expected) == set(state)
    wrong = [k for k, v in expected.items() if not same_bits(v.detach().reshape(state[k].shape).contiguous(), state[k])]
    assert wrong == []


def refused(model, path, *words, error=keymap.PlanError, **options):
    before = bits(model)
    with pytest.raises(error) as caught:
        keymap.load_checkpoint(model, path, **options)
    told = str(caught.value)
    assert [word for word in words if word not in told] == [], told
    assert_unchanged(model, before)


def pictures(sizes) -> Tensor:
    return images(sizes.get("image_size", 28))


def cut(image: Tensor, sizes) -> dict[str, Tensor]:
    """Whole images as patches."""
    return naflex.naflex_batch(list(image), sizes.get("patch", 14))


def mixed(sizes) -> dict[str, Tensor]:
    """One padded batch of grids 2x2, 1x4, 3x2 and 4x4. (torch 2.14 resizes to a single column wrongly: none here.)"""
    patch, generator = sizes.get("patch", 14), torch.Generator().manual_seed(5)
    grids = [(2, 2), (1, 4), (3, 2), (4, 4)]
    return naflex.naflex_batch([torch.randn(3, h * patch, w * patch, generator=generator) for h, w in grids], patch)


# --- by hand ---


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


def lit_by_hand(flat: big_vision.Flat, zero_row: bool) -> State:
    """LiT -> timm's ViT with class token; zero_row: the model's positions have a row for the class token."""
    table = torch.from_numpy(flat["img/pos_embedding"])
    pool = big_vision.init()  # big_vision's own conversion wants a MAP head, a text head and a bias, whatever they hold
    rest = {k: v for k, v in pool.items() if k.startswith(("img/MAPHead_0/", "txt/head/")) or k == "b"}
    found = by_hand.big_vision(rest | flat)
    found = {k: v for k, v in found.items() if ".attn_pool." not in k and k != "logit_bias"}
    if "img/head/kernel" in flat:
        found["visual.trunk.head.weight"] = torch.from_numpy(flat["img/head/kernel"]).T
        found["visual.trunk.head.bias"] = torch.from_numpy(flat["img/head/bias"])
    rows = [torch.zeros_like(table[:, :1]), table] if zero_row else [table]
    return found | {
        "visual.trunk.cls_token": torch.from_numpy(flat["img/cls"]),
        "visual.trunk.pos_embed": torch.cat(rows, 1),
    }


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
    """Equal keys, equal shapes: nothing tells them apart, so one format owns both."""
    peer, model = naflex.siglip2(tower="text"), naflex.model(seed=5)
    result = keymap.load_checkpoint(model, file(naflex.siglip2_keys(peer, written_by)), towers=("text",))
    assert result.report.plan.format == "hf_siglip"
    ids = tokens(eos=None)
    with torch.no_grad():
        assert max_diff(model.encode_text(ids), hf.text_features(peer, ids)) <= LIMIT


def test_a_folder_of_siglip2_tells_an_activation_that_differs(tmp_path):
    peer = naflex.siglip2()
    peer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keymap.load_checkpoint(naflex.model(seed=5), tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        keymap.load_checkpoint(naflex.model(seed=5, act="gelu"), tmp_path)
    assert any("activation of the image tower" in str(warning.message) for warning in told)


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


# --- positions at another grid: resized last, in the model's spelling ---


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h, w, d) at another grid."""
    picture = table.permute(0, 3, 1, 2).contiguous()
    return interpolate(picture, size=grid, mode="bicubic", antialias=True, align_corners=False).permute(0, 2, 3, 1)


def assert_resized(result, model, key, want):
    assert set(result.report.plan.resized) == {key}
    assert max_diff(model.state_dict()[key], want) <= 1e-5
    assert max_diff(want, torch.zeros_like(want)) > 0.1


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


def test_grids_that_are_not_square_do_not_go_between_the_two_spellings(file, npz):
    refused(openclip.siglip(seed=5, image_size=(28, 70)), npz(naflex.init(image_size=(28, 70))), "h is 2, declared 5")
    rows = openclip.siglip(seed=1, image_size=(28, 70)).state_dict()
    refused(naflex.model(seed=5, image_size=(28, 70)), file(rows), "visual.trunk.pos_embed", "length of axis h, w")


def test_a_source_grid_that_is_not_the_tables_own_is_refused(npz):
    path, model = npz(naflex.init(image_size=56)), naflex.model(seed=5)
    refused(model, path, "source_grid 2x8 does not match the file, whose grid is 4x4", source_grid=(2, 8))
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

SPELLED = {"hf_clip": ("native_vit",), "timm": ("clip_trunk", "native_vit"), "open_clip": ("native_vit",)}


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


@pytest.mark.parametrize("kind", SPELLED)
def test_a_clip_file_computes_the_same_in_a_naflexvit_with_class_token(kind, sizes, file, proves):
    state, whole, native, features = clip_file(kind, sizes)
    model = naflex.token_model(seed=5, **sizes)
    towers = None if whole else ("image",)
    result = keymap.load_checkpoint(model, file(state), towers=towers)
    assert result.report.plan.format == kind
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert result.report.plan.layouts["image"] == (*SPELLED[kind], "naflex_token")
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


def test_what_differs_from_clip_is_the_eps_of_the_norms_and_not_the_positions(tmp_path):
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


def tensors(flat: big_vision.Flat) -> State:
    return {k: torch.from_numpy(v) for k, v in flat.items()}


ROUND = {
    "transformers": ("hf_siglip2_naflex", lambda **s: naflex.siglip2_keys(naflex.siglip2(**s))),
    "transformers, image": (
        "hf_siglip2_naflex",
        lambda **s: naflex.siglip2_keys(naflex.siglip2(tower="image", **s), 4),
    ),
    "big_vision": ("big_vision_naflex", lambda **s: tensors(naflex.init(**s))),
    "LiT": ("big_vision_lit", lambda **s: tensors(lit.init(**s))),
    "LiT without head": ("big_vision_lit", lambda **s: tensors(lit.init(head=False, **s))),
    "timm": ("timm", lambda **s: naflex.map_vit(**s).state_dict()),
    "timm, class token": ("timm", lambda **s: naflex.token_vit(**s).state_dict()),
}


def assert_same(got, want):
    assert set(got) == set(want)
    assert [k for k in want if not same_bits(got[k].contiguous(), want[k].contiguous())] == []


@pytest.mark.parametrize("name", ROUND)
def test_a_state_dict_goes_to_the_hub_and_back(name, sizes):
    form, make = ROUND[name]
    state = make(**sizes)
    hub = keymap.convert_state_dict(state, to="open_clip", mapping=form)
    assert_same(keymap.convert_state_dict(hub, to=form, mapping="open_clip", facts=HEADS), state)


@pytest.mark.parametrize("way", [("hf_siglip2_naflex", "hf_siglip"), ("big_vision_naflex", "big_vision_siglip")])
def test_naflex_and_siglip_files_become_each_other_and_come_home(way, sizes):
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


# --- LiT ---


@pytest.mark.parametrize("no_embed_class", [False, True], ids=["a row for the class", "none"])
@pytest.mark.parametrize("head", [True, False], ids=["img/head", "no head"])
@pytest.mark.parametrize("form", FORMS)
def test_lit_loads_with_big_visions_own_text_tower(form, head, no_embed_class, sizes, npz, proves):
    flat = FORMS[form](lit.init(head=head, **sizes))
    model = lit.model(head=head, no_embed_class=no_embed_class, seed=5, **sizes)
    result = keymap.load_checkpoint(model, npz(flat, compressed=head))
    assert result == {} and result.missing_keys == []
    assert result.report.plan.format == "big_vision_lit"
    image, ids = pictures(sizes), tokens(eos=None)
    want = lit.forward(flat, image, ids)
    assert_parity(model, image, want[0], ids, want[1])
    assert_bits(model, lit_by_hand(big_vision.plain(flat), zero_row=not no_embed_class))
    if not no_embed_class:
        assert not model.visual.trunk.pos_embed[0, 0].any()
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("form", ["plain", "params/", "scanned"])
@pytest.mark.parametrize("head", [True, False])
def test_lit_of_the_older_code_has_a_position_for_its_class_token(head, form, sizes, npz):
    flat = FORMS[form](lit.init(head=head, old=True, **sizes))
    model = lit.model(head=head, seed=5, **sizes)
    keymap.load_checkpoint(model, npz(flat))
    image, ids = pictures(sizes), tokens(eos=None)
    want = lit.forward(flat, image, ids)
    assert_parity(model, image, want[0], ids, want[1])
    assert model.visual.trunk.pos_embed[0, 0].any()
    refused(lit.model(head=head, no_embed_class=True, **sizes), npz(flat), "1 rows before its grid", "the model has 0")


def test_lit_of_the_code_between_keeps_positions_in_the_encoder(npz):
    flat = lit.init()
    flat["img/Transformer/pos_embedding"] = flat.pop("img/pos_embedding")
    model = lit.model(seed=5)
    keymap.load_checkpoint(model, npz(flat))
    flat["img/pos_embedding"] = flat.pop("img/Transformer/pos_embedding")
    assert_bits(model, lit_by_hand(flat, zero_row=True))


def test_lit_may_have_a_bias_and_a_model_that_has_one_gets_zero_where_the_file_has_none(npz):
    model = lit.model(seed=5, logit_bias=True)
    result = keymap.load_checkpoint(model, npz(lit.init()))
    assert "logit_bias" in result.report.plan.filled and model.logit_bias.item() == 0
    keymap.load_checkpoint(model, npz(lit.init() | {"b": np.array([-7.5], np.float32)}))
    assert model.logit_bias.item() == -7.5


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_lit_with_bert_says_so_and_its_image_tower_loads(prefix, npz):
    flat = lit.init(text="bert")
    path = npz(big_vision.with_prefix(flat, prefix))
    model = lit.model(seed=5)
    refused(model, path, "txt/BertEncoder_0/", "BERT", "load with towers=('image',)")
    refused(model, path, "BERT", towers=("text",))
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("visual.")}
    result = keymap.load_checkpoint(model, path, towers=("image",))
    assert set(result.report.plan.loaded) == {"image"}
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])
    assert all(same_bits(v, model.state_dict()[k]) for k, v in before.items())


def test_lit_with_a_text_tower_of_unknown_names_is_refused_with_these_names_and_its_image_tower_loads(npz):
    flat = lit.init(text="none") | {"txt/Stranger_0/kernel": np.ones((3, 5), np.float32)}
    model = lit.model(seed=5)
    refused(model, npz(flat), "txt/Stranger_0/kernel")
    keymap.load_checkpoint(model, npz(flat), towers=("image",))
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])


def test_the_image_half_of_lit_alone_loads(npz):
    flat = lit.init(text="none")
    model = lit.model(seed=5)
    keymap.load_checkpoint(model, npz(flat), towers=("image",))
    assert_parity(model, images(), lit.forward(flat, images(), None)[0])
    refused(model, npz(flat), "the file has no text tower: load with towers=('image',)")


def test_lit_is_refused_where_head_or_architecture_differ(npz):
    refused(lit.model(head=True, image_width=48, embed_dim=48), npz(lit.init(head=False)), "visual.trunk.head.weight")
    refused(lit.model(head=False), npz(lit.init(head=True, embed_dim=48)), "img/head/kernel")
    for target in (openclip.clip, openclip.clip_trunk):
        refused(target(seed=5), npz(lit.init()), "img/embedding/bias", towers=("image",))
    refused(openclip.siglip(seed=5), npz(lit.init()), "clip_trunk", towers=("image",))


def test_lit_positions_are_resized_and_the_row_for_the_class_token_stays(npz):
    for old in (False, True):
        flat = lit.init(image_size=56, old=old)
        model = lit.model(seed=5, image_size=42)
        result = keymap.load_checkpoint(model, npz(flat))
        table = torch.from_numpy(flat["img/Transformer/posembed_input/pos_embedding" if old else "img/pos_embedding"])
        first = table[:, :1] if old else torch.zeros(1, 1, table.shape[2])
        grid = resized(table[:, -16:].reshape(1, 4, 4, -1), (3, 3)).flatten(1, 2)
        assert_resized(result, model, "visual.trunk.pos_embed", torch.cat([first, grid], 1))


# --- CLIPPO ---


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_clippo_is_refused_in_words(prefix, strict, npz):
    """One ViT with MAP pool and head for images and for text that is drawn as an image; no txt/ at all."""
    tower = {k: v for k, v in big_vision.init().items() if k.startswith("img/") or k == "t"}
    head = {"img/head/kernel": np.ones((48, 24), np.float32), "img/head/bias": np.ones(24, np.float32)}
    path = npz(big_vision.with_prefix({**tower, **head}, prefix))
    refused(openclip.siglip(seed=5), path, "CLIPPO", "one tower", error=keymap.DetectionError, strict=strict)
    refused(openclip.siglip(seed=5), path, "CLIPPO", error=keymap.DetectionError, towers=("image",))
    keymap.load_checkpoint(openclip.siglip(seed=5), npz(tower), towers=("image",))  # the image half of SigLIP is none
