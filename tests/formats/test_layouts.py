"""Every layout of OpenCLIP's configurations, small: its own files against its own loader, and timm's towers in it.

`peers.layouts` has one model for each set of keys that the 144 configurations have; `test_coverage` lifts what is
proved here to full size.
"""

from __future__ import annotations

import copy

import open_clip
import pytest
import timm
import torch
from peers import by_hand, hf, hf_text, layouts, naflex, openclip, relatives, timm_towers
from peers.common import SQUARE, Size, images, max_diff, randomise, same_bits, tensors, tokens
from safetensors.torch import save_file

import keymap

LIMIT = 2e-5
SIZES = pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["distinct", "square"])


@pytest.fixture
def file(tmp_path):
    def save(state, name="model.safetensors"):
        save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, tmp_path / name)
        return tmp_path / name

    return save


def complete(result, form):
    assert (result.report.plan.format, result.missing_keys, result.unexpected_keys) == (form, [], [])
    return result.report.plan


@pytest.mark.parametrize("container", ["safetensors", "pt"])
@pytest.mark.parametrize("name", layouts.MODELS)
def test_its_own_file_loads_as_open_clip_loads_it_bit_for_bit(name, container, file, tmp_path, proves):
    source, ours = layouts.MODELS[name](seed=1), layouts.MODELS[name](seed=2)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    path = tmp_path / "model.pt"
    if container == "safetensors":
        path = file(source.state_dict())
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    open_clip.load_checkpoint(theirs, str(path))
    plan = complete(keymap.load_checkpoint(ours, path), "open_clip")
    wanted, state = tensors(theirs), tensors(ours)
    assert [key for key, value in wanted.items() if not same_bits(value, state[key])] == []
    assert [key for key, value in source.state_dict().items() if not same_bits(value, state[key])] == []
    random = {key for key, value in before.state_dict().items() if value.ndim and value.is_floating_point()}
    assert [key for key in random if same_bits(tensors(before)[key], state[key]) and key not in ZEROS] == []
    proves("bit-equal", plan)


ZEROS = {"visual.trunk.head.bias", "visual.trunk.head.fc.bias"}  # of the small models, as their files have none


# --- timm's files ---


def inside(name: str) -> bool:
    """Whether the tower is timm's, with CLIP's projection in it."""
    model = layouts.MODELS[name](seed=1)
    return hasattr(model.visual, "trunk") and not len(list(model.visual.head.parameters()))


@pytest.mark.parametrize("name", [name for name in layouts.MODELS if inside(name)])
def test_a_tower_of_timm_computes_the_same(name, file, proves):
    """Of towers whose projection stands in the trunk; `test_timm_towers` has the others."""
    peer, model = layouts.MODELS[name](seed=1).visual.trunk, layouts.MODELS[name](seed=2)
    plan = complete(keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",)), "timm")
    size = model.visual.image_size
    pixels = images(size if isinstance(size, int) else tuple(size))
    with torch.no_grad():
        got, want = model.encode_image(pixels), peer(pixels)
    assert max_diff(got, want) <= LIMIT and float(want.abs().max()) > 0.01
    assert [k for k, v in peer.state_dict().items() if not same_bits(v, model.visual.trunk.state_dict()[k])] == []
    proves("parity", plan)


@SIZES
def test_a_clip_vit_of_timm_with_layer_scales_computes_the_same(sizes, file, proves):
    size = Size(**sizes)
    arguments = {**timm_towers._vit(size), "init_values": 1e-4, "num_classes": size.embed_dim}
    peer = randomise(timm.create_model("vit_base_patch16_clip_224", **arguments))
    timm_towers.zero(peer.head.bias, peer)
    model = openclip.clip(seed=5, vision={"ls_init_value": 1e-4}, **sizes)
    plan = complete(keymap.load_checkpoint(model, file(peer.state_dict()), towers=("image",)), "timm")
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), peer(images())) <= LIMIT
    gamma = model.visual.transformer.resblocks[1].ls_2.gamma
    assert same_bits(gamma.detach(), peer.blocks[1].ls2.gamma.detach()) and gamma.abs().max().item() > 0.1
    proves("parity", plan)


# --- transformers' files, into towers that the tests of their formats do not have ---


@SIZES
@pytest.mark.parametrize("kind", ["hf_altclip", "hf_chinese_clip"])
def test_the_image_half_of_a_relative_computes_the_same_in_timms_vit(kind, sizes, file, proves):
    peer = getattr(relatives, kind)(**sizes)
    model = openclip.clip_trunk(quick_gelu=True, seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)), towers=("image", "scale"))
    plan = complete(result, kind)
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), hf.image_features(peer, images())) <= LIMIT
    assert same_bits(model.logit_scale.detach(), peer.logit_scale.detach())
    proves("parity", plan)
    proves("bit-equal", plan, ("scale",))


@SIZES
@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "XLMRobertaForMaskedLM", "M2M100ForConditionalGeneration"])
def test_an_encoder_below_a_linear_projection_computes_the_same(name, sizes, file, proves):
    peer = hf_text.model(name, **sizes)
    model = openclip.hf_text(family=hf_text.CLASSES[name], proj="linear", seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf_text.disk_keys(peer)), towers=("text",), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["text.proj.weight"], [])
    ids = hf_text.ids(peer)
    with torch.no_grad():
        expected = hf_text.features(peer, model.text, ids)
        assert max_diff(model.encode_text(ids), expected) <= LIMIT
    assert float(expected.abs().max()) > 0.01
    proves("parity", result.report.plan)


@SIZES
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
