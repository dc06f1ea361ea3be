"""The proof of correctness: after a load, the model computes what the peer computes.

Each row builds a real peer with every parameter randomised, saves it as its owner saves it, loads the file and
compares forward passes (at most 2e-5 apart), for sizes that all differ and for sizes where every matrix is
square, so that a missing transpose shows only in values.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import big_vision, by_hand, hf, openai, openclip, timm_towers
from peers.common import SQUARE, Size, images, max_diff, same_bits, tokens
from safetensors.torch import save_file

import keymap

LIMIT = 2e-5
SIZES = {"distinct": {}, "square": SQUARE}


@pytest.fixture(params=SIZES, ids=list(SIZES))
def sizes(request):
    return SIZES[request.param]


@pytest.fixture
def file(tmp_path):
    """Save tensors as safetensors; gives the path."""

    def save(tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
        path = tmp_path / name
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        return path

    return save


@torch.no_grad()
def encode(model, image=None, text=None):
    """The target's own embeddings, not normalised."""
    return (
        None if image is None else model.encode_image(image),
        None if text is None else model.encode_text(text),
    )


def assert_parity(model, peer_image, peer_text, image, text):
    got_image, got_text = encode(model, image, text)
    if peer_image is not None:
        assert max_diff(got_image, peer_image) <= LIMIT
        assert float(peer_image.abs().max()) > 0.01
    if peer_text is not None:
        assert max_diff(got_text, peer_text) <= LIMIT


# --- transformers CLIP ---

TARGETS = {"flat": openclip.clip, "custom": openclip.custom, "timm trunk": openclip.clip_trunk}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("kind", ["clip", "clip written by 4 with position_ids", "metaclip2"])
def test_hf_clip_loads_into_every_spelling(target, quick_gelu, kind, sizes, file, proves):
    peer = (hf.metaclip2 if kind == "metaclip2" else hf.clip)(quick_gelu=quick_gelu, **sizes)
    keys = hf.disk_keys(peer, 4, position_ids=True) if "position_ids" in kind else hf.disk_keys(peer)
    text_cfg = {"pool_type": "eos", "eos_id": 2} if kind == "metaclip2" else {}
    model = TARGETS[target](quick_gelu=quick_gelu, seed=5, text=text_cfg, **sizes)
    result = keymap.load_checkpoint(model, file(keys))
    assert result.report.plan.format == "hf_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image = images()
    text = tokens(eos=2) if kind == "metaclip2" else tokens()
    assert_parity(model, hf.image_features(peer, image), hf.text_features(peer, text), image, text)
    assert ("visual.trunk.head.bias" in result.report.plan.filled) == (target == "timm trunk")
    proves("parity", result.report.plan)


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("tower", ["image", "image_proj", "text", "text_proj"])
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_hf_clip_single_towers_load_into_their_tower_only(tower, written_by, target, sizes, file, proves):
    peer = hf.clip(tower=tower, **sizes)
    model = TARGETS[target](seed=5, **sizes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = file(hf.disk_keys(peer, written_by))
    name = tower.removesuffix("_proj")
    if tower.endswith("_proj"):
        result = keymap.load_checkpoint(model, path, towers=(name,))
    else:  # the file has no projection: strict refuses, and says so
        with pytest.raises(keymap.PlanError, match="proj"):
            keymap.load_checkpoint(model, path, towers=(name,))
        result = keymap.load_checkpoint(model, path, strict=False)
        assert any("proj" in key for key in result.missing_keys)
    image, text = images(), tokens()
    if name == "image":
        projection = None if tower.endswith("_proj") else model.visual.proj
        assert_parity(model, hf.image_features(peer, image, projection), None, image, None)
    else:
        own = model.text_projection if target == "flat" else model.text.text_projection
        projection = None if tower.endswith("_proj") else own
        assert_parity(model, None, hf.text_features(peer, text, projection), None, text)
    visual = [k for k in before if k.startswith("visual.")]
    others = [k for k in before if (k in visual) != (name == "image")]
    assert all(same_bits(before[k], model.state_dict()[k]) for k in others)
    proves("parity", result.report.plan)


# --- transformers SigLIP ---


@pytest.mark.parametrize("written_by", [4, 5])
def test_hf_siglip_loads(written_by, sizes, file, proves):
    peer = hf.siglip(**sizes)
    model = openclip.siglip(seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer, written_by)))
    assert result.report.plan.format == "hf_siglip"
    image, text = images(), tokens(eos=None)
    assert_parity(model, hf.image_features(peer, image), hf.text_features(peer, text), image, text)
    assert model.logit_scale.shape == () == model.logit_bias.shape
    assert float(model.logit_bias) == float(peer.logit_bias)
    proves("parity", result.report.plan)


def test_hf_siglip_i18n_loads_into_a_model_without_text_projection(sizes, file, proves):
    peer = hf.siglip(eye_head=True, **sizes)
    model = openclip.siglip(projection=False, seed=5, **sizes)
    keys = hf.disk_keys(peer)
    result = keymap.load_checkpoint(model, file(keys))
    assert {"text_model.head.weight", "text_model.head.bias"} <= set(result.report.plan.dropped)
    image, text = images(), tokens(eos=None)
    assert_parity(model, hf.image_features(peer, image), hf.text_features(peer, text), image, text)
    proves("parity", result.report.plan)
    expected, state = by_hand.hf_siglip(keys, head=False), model.state_dict()
    assert set(expected) == set(state) and all(same_bits(v.contiguous(), state[k]) for k, v in expected.items())
    proves("bit-equal", result.report.plan)


def test_hf_siglip_head_that_is_no_identity_is_refused_where_the_model_has_none(file):
    keys = hf.disk_keys(hf.siglip(eye_head=True))
    keys["text_model.head.weight"][1, 0] = 1e-3
    model = openclip.siglip(projection=False, seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(keymap.VerifyError, match=r"text_model.head.weight must hold the identity"):
        keymap.load_checkpoint(model, file(keys))
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_hf_siglip_single_towers_load(tower, written_by, file, proves):
    peer = hf.siglip(tower=tower)
    model = openclip.siglip(seed=5)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer, written_by)), towers=(tower,))
    assert set(result.report.plan.loaded) == {tower}
    image, text = images(), tokens(eos=None)
    if tower == "image":
        assert_parity(model, hf.image_features(peer, image), None, image, None)
    else:
        assert_parity(model, None, hf.text_features(peer, text), None, text)
    proves("parity", result.report.plan)


# --- timm ---


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("target", ["flat", "custom", "timm trunk"])
def test_timm_clip_vit_loads_into_native_and_timm_towers(target, quick_gelu, sizes, file, proves):
    peer = timm_towers.clip_vit(quick_gelu=quick_gelu, **sizes)
    model = TARGETS[target](quick_gelu=quick_gelu, seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers="image")
    assert result.report.plan.format == "timm"
    assert_parity(model, peer(images()).detach(), None, images(), None)
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
    assert_parity(model, peer(images()).detach(), None, images(), None)
    proves("parity", result.report.plan)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_timm_convnext_loads_with_its_head(head, file, proves):
    peer = timm_towers.convnext(mlp_head=head == "mlp")
    model = openclip.convnext(head=head, seed=5)
    result = keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",))
    assert "head.fc.bias" in result.report.plan.dropped
    assert_parity(model, peer(images(64)).detach(), None, images(64), None)
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
    assert_parity(model, peer(images(64)).detach(), None, images(64), None)
    proves("parity", result.report.plan)


# --- OpenAI ---


@pytest.mark.parametrize("save", ["archive", "state dict", "state dict without the constants"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("text", ["flat", "custom"])
def test_openai_loads(tower, save, text, tmp_path, proves):
    peer = openai.vit() if tower == "vit" else openai.resnet()
    path = tmp_path / "ViT.pt"
    if save == "archive":
        openai.save_archive(peer, path)
    else:
        openai.save_state_dict(peer, path, extras="without" not in save)
    size = {**(openai.VIT if tower == "vit" else openai.RESNET)}
    kind = {} if text == "flat" else {"kind": openclip.CustomTextCLIP}
    if tower == "vit":
        model = (openclip.clip if text == "flat" else openclip.custom)(quick_gelu=True, seed=5, **size)
    else:
        model = openclip.resnet(quick_gelu=True, seed=5, layers=openai.RESNET_LAYERS, **kind, **size)
    result = keymap.load_checkpoint(model, path)
    plan = result.report.plan
    assert plan.format == ("open_clip" if "without" in save else "openai")
    assert plan.container == ("torchscript" if save == "archive" else "torch")
    assert plan.cast["float16 to float32"] > 10
    if "without" not in save:
        assert set(plan.dropped) == set(openai.EXTRAS)
    side = Size(**size).image_size
    image, ids = images(side), tokens(Size(**size).context_length, Size(**size).vocab)
    assert_parity(model, openai.image_features(peer, image), openai.text_features(peer, ids), image, ids)
    if plan.format == "openai":
        proves("parity", plan)


# --- big_vision ---

FORMS = {
    "plain": lambda flat: flat,
    "params/": big_vision.with_prefix,
    "scanned": big_vision.scan,
    "scanned image tower": lambda flat: big_vision.scan(flat, ("img",)),
    "scanned text tower, params/": lambda flat: big_vision.with_prefix(big_vision.scan(flat, ("txt",))),
    "bfloat16 as void": big_vision.to_bfloat16_void,
    "scanned, params/, bfloat16": lambda f: big_vision.to_bfloat16_void(big_vision.with_prefix(big_vision.scan(f))),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", [True, False])
def test_big_vision_npz_loads(form, head, compressed, sizes, tmp_path, proves):
    flat = FORMS[form](big_vision.init(head=head, **sizes))
    path = tmp_path / "siglip.npz"
    big_vision.save(flat, path, compressed)
    model = openclip.siglip(projection=head, seed=5, **sizes)
    result = keymap.load_checkpoint(model, path)
    assert result == {}
    assert result.missing_keys == []
    assert result.report.plan.format == "big_vision_siglip"
    image, text = images(), tokens(eos=None)
    assert_parity(model, *big_vision.forward(flat, image, text), image, text)
    assert math.isclose(float(model.logit_scale), float(big_vision.plain(flat)["t"][0]), rel_tol=1e-6)
    assert math.isclose(float(model.logit_bias), float(big_vision.plain(flat)["b"][0]), rel_tol=1e-6)
    proves("parity", result.report.plan)


def test_the_file_of_the_real_big_vision_model_gives_its_recorded_outputs():
    folder = Path(__file__).parents[1] / "data" / "big_vision"
    with np.load(folder / "siglip_ref.npz") as reference:
        ref = {key: torch.from_numpy(reference[key]) for key in reference.files}
    size = {"embed_dim": 48, "image_mlp": 2.0, "text_width": 48, "text_heads": 3, "text_depth": 2, "text_mlp": 2.0}
    model = openclip.siglip(seed=5, **size)
    keymap.load_checkpoint(model, folder / "siglip.npz")
    image, text = encode(model, ref["img"].permute(0, 3, 1, 2), ref["txt"].long())
    assert max_diff(torch.nn.functional.normalize(image, dim=-1), ref["zimg"]) <= LIMIT
    assert max_diff(torch.nn.functional.normalize(text, dim=-1), ref["ztxt"]) <= LIMIT


def test_a_second_text_position_embedding_is_added(tmp_path):
    """big_vision itself sums the two tables of its oldest files."""
    flat = big_vision.init()
    old = dict(flat)
    old["txt/Encoder_0/pos_embedding"] = np.full_like(flat["txt/pos_embedding"], 0.25)
    big_vision.save(old, tmp_path / "old.npz")
    flat["txt/pos_embedding"] = flat["txt/pos_embedding"] + 0.25
    model = openclip.siglip(seed=5)
    result = keymap.load_checkpoint(model, tmp_path / "old.npz")
    assert "txt/Encoder_0/pos_embedding" in result.report.plan.dropped
    text = tokens(eos=None)
    assert_parity(model, None, big_vision.forward(flat, None, text)[1], None, text)


# --- OpenCLIP, and bits ---

OWN = {
    "clip": openclip.clip,
    "custom": openclip.custom,
    "siglip": openclip.siglip,
    "timm trunk": openclip.clip_trunk,
    "timm trunk, no class position": lambda **k: openclip.clip_trunk(no_embed_class=True, **k),
    "resnet": openclip.resnet,
    "convnext": openclip.convnext,
    "convnext, mlp head": lambda **k: openclip.convnext(head="mlp", **k),
    "coca": openclip.coca,
    "coca without attention pool": lambda **k: openclip.coca(attn_pool=False, **k),
    "hf text tower": openclip.hf_text,
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("container", ["safetensors", "pt", "legacy pt", "wrapped pt"])
def test_open_clip_loads_its_own_files_bit_for_bit(name, container, tmp_path):
    source, model = OWN[name](seed=1), OWN[name](seed=2)
    path = tmp_path / "file"
    if container == "safetensors":
        save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    elif container == "wrapped pt":
        prefixed = {f"module.{k}": v for k, v in source.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": prefixed}, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=container == "pt")
    result = keymap.load_checkpoint(model, path)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    wrong = [k for k, v in source.state_dict().items() if not same_bits(v, model.state_dict()[k])]
    assert not wrong
    assert result.report.plan.format == "open_clip"


PAIRS = {
    "hf_clip": lambda: (hf.disk_keys(hf.clip()), openclip.clip(seed=5), by_hand.hf_clip, None),
    "hf_clip, text.": lambda: (
        hf.disk_keys(hf.clip()),
        openclip.custom(seed=5),
        lambda s: by_hand.hf_clip(s, "text."),
        None,
    ),
    "hf_siglip": lambda: (hf.disk_keys(hf.siglip()), openclip.siglip(seed=5), by_hand.hf_siglip, None),
    "timm clip vit": lambda: (
        timm_towers.clip_vit().state_dict(),
        openclip.clip(seed=5),
        by_hand.timm_clip,
        ("image",),
    ),
    "timm siglip vit": lambda: (
        timm_towers.siglip_vit().state_dict(),
        openclip.siglip(seed=5),
        by_hand.timm_trunk,
        ("image",),
    ),
    "timm convnext": lambda: (
        timm_towers.convnext().state_dict(),
        openclip.convnext(seed=5),
        by_hand.timm_convnext,
        ("image",),
    ),
    "timm_resnet": lambda: (
        timm_towers.resnet_clip().state_dict(),
        openclip.resnet(seed=5),
        by_hand.timm_resnet,
        ("image",),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_tensor_equals_a_conversion_written_by_hand(name, file, proves):
    """A second opinion: plain torch code, key by key, without patterns or pieces."""
    keys, model, convert, towers = PAIRS[name]()
    plan = keymap.load_checkpoint(model, file(keys), towers=towers).report.plan
    state = model.state_dict()
    expected = {k: v for k, v in convert(keys).items() if k in state}
    assert len(expected) > 20
    assert set(expected) == {entry.key for entry in plan.entries if not entry.filled}
    wrong = [k for k, v in expected.items() if not same_bits(v.reshape(state[k].shape).contiguous(), state[k])]
    assert not wrong
    proves("bit-equal", plan)
