"""Relatives of CLIP load, and compute what their owners' code computes: Long-CLIP, TinyCLIP, Chinese-CLIP, AltCLIP.

As in test_parity: real weights of a peer, all random, in the file that its owner writes; then forward passes at most
2e-5 apart, for sizes that all differ and for sizes where matrices are square; then every bit against a conversion
written by hand.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peers import by_hand, hf, openai, openclip, relatives
from peers.common import SQUARE, Size, assert_unchanged, bits, images, max_diff, same_bits, tokens
from safetensors.torch import save_file

import keymap

LIMIT = 2e-5
SIZES = {"distinct": {}, "square": SQUARE}
OPENAI_SQUARE = {"embed_dim": 128, "text_width": 128}  # OpenAI's package fixes what else could be square
BERT = {"family": "bert", "pooler": "cls_last_hidden_state_pooler", "proj": "linear"}
TINY_VIT, TINY_RESNET = openai.VIT, relatives.TINY_RESNET


@pytest.fixture(params=SIZES, ids=list(SIZES))
def sizes(request):
    return SIZES[request.param]


@pytest.fixture
def file(tmp_path):
    def save(tensors, name="model.safetensors"):
        path = tmp_path / name
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
        return path

    return save


@torch.no_grad()
def assert_parity(model, image, ids, peer_image, peer_text):
    for got, want in ((model.encode_image(image), peer_image), (model.encode_text(ids), peer_text)):
        assert max_diff(got, want.detach()) <= LIMIT
        assert float(want.abs().max()) > 0.01


def assert_bits(model, expected):
    state = model.state_dict()
    assert set(expected) == set(state)
    assert [k for k, v in expected.items() if not same_bits(v.detach().contiguous(), state[k])] == []


def resnet_and_bert(**arguments):
    vision = {"layers": [1, 1, 2, 1], "width": 16, "patch_size": None, "image_size": 64, "head_width": 64}
    return openclip.hf_text(**BERT, vision=vision, **arguments)


# --- Long-CLIP ---


@pytest.mark.parametrize("shape", ["distinct", "square"])
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_longclip_loads(target, shape, file, proves):
    size = {**relatives.LONG, **(OPENAI_SQUARE if shape == "square" else {})}
    peer = relatives.longclip(**size)
    model = {"flat": openclip.clip, "custom": openclip.custom}[target](quick_gelu=True, seed=5, **size)
    result = keymap.load_checkpoint(model, file(peer.state_dict()))
    assert result.report.plan.format == "longclip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(), tokens(size["context_length"])
    assert_parity(model, image, ids, peer.encode_image(image), relatives.longclip_text(peer, ids))
    assert_bits(model, by_hand.longclip(peer.state_dict(), "text." if target == "custom" else ""))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_longclip_is_read_and_not_written():
    hub = keymap.convert_state_dict(relatives.longclip().state_dict(), to="open_clip")
    with pytest.raises(keymap.PlanError, match="positional_embedding"):
        keymap.convert_state_dict(hub, to="longclip")


# --- TinyCLIP ---


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "each tower wrapped"])
@pytest.mark.parametrize("tower", ["vit", "square vit", "resnet"])
def test_tinyclip_loads(tower, wrapped, file, proves):
    if tower == "resnet":
        peer = relatives.tinyclip(resnet=True, wrapped=wrapped)
        model = openclip.resnet(seed=5, layers=openai.RESNET_LAYERS, **TINY_RESNET)
    else:
        size = {**TINY_VIT, **(OPENAI_SQUARE if tower == "square vit" else {})}
        peer, model = relatives.tinyclip(wrapped=wrapped, **size), openclip.clip(seed=5, **size)
    result = keymap.load_checkpoint(model, file(peer.state_dict()))
    assert result.report.plan.format == "tinyclip"
    image, ids = images(64 if tower == "resnet" else 28), tokens()
    assert_parity(model, image, ids, *relatives.tinyclip_features(peer, image, ids))
    assert_bits(model, by_hand.tinyclip(peer.state_dict()))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_tinyclip_under_its_wrapper_and_with_the_names_of_older_code(tmp_path):
    state = relatives.tinyclip().state_dict()
    old = {
        k.replace("_image_encoder", "image_encoder_without_ddp").replace("_text_encoder", "text_encoder_without_ddp"): v
        for k, v in state.items()
    }
    for number, keys in enumerate((state, old)):
        torch.save({"epoch": 7, "state_dict": {f"module.{k}": v for k, v in keys.items()}}, tmp_path / f"{number}.pt")
        model = openclip.clip(seed=5, **TINY_VIT)
        keymap.load_checkpoint(model, tmp_path / f"{number}.pt")
        assert_bits(model, by_hand.tinyclip(state))


@pytest.mark.parametrize("channels", [128, 80])
def test_a_tinyclip_that_was_pruned_block_by_block_is_refused_with_its_shapes(channels, file):
    path = file(relatives.prune(relatives.tinyclip().state_dict(), channels))
    model = openclip.clip(seed=5, **TINY_VIT)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="format tinyclip") as caught:
        keymap.load_checkpoint(model, path)
    told = "\n".join(caught.value.faults)
    assert "blocks of different sizes, as in a pruned model" in told
    if channels == 128:
        assert "resblocks.0.attn.in_proj_weight: shape [192, 128] in the file, [384, 128] in the model" in told
    else:
        assert "visual.proj: shape [80, 24] in the file, [128, 24] in the model" in told
    assert_unchanged(model, before)
    if channels < 128:  # nothing of the tower fits, so it is refused in part, too
        with pytest.raises(keymap.PlanError, match="of the image tower in the file would load"):
            keymap.load_checkpoint(model, path, strict=False)
        assert_unchanged(model, before)


@pytest.mark.parametrize("module", ["", "module."])
def test_a_tinyclip_that_is_being_pruned_is_refused_in_words(module, file):
    state = {**relatives.tinyclip().state_dict(), f"_image_encoder.{module}l0_module.hidden_loga": torch.zeros(128)}
    model = openclip.clip(seed=5, **TINY_VIT)
    before = bits(model)
    with pytest.raises(keymap.DetectionError, match="with pruning masks"):
        keymap.load_checkpoint(model, file(state))
    assert_unchanged(model, before)


# --- Chinese-CLIP ---


def test_hf_chinese_clip_loads(sizes, file, proves):
    peer, model = relatives.hf_chinese_clip(**sizes), openclip.hf_text(**BERT, quick_gelu=True, seed=5, **sizes)
    keys = hf.disk_keys(peer)
    result = keymap.load_checkpoint(model, file(keys))
    assert result.report.plan.format == "hf_chinese_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(), tokens()
    with torch.no_grad():
        text = peer.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    assert_parity(model, image, ids, hf.image_features(peer, image), text)
    assert_bits(model, by_hand.hf_chinese_clip(keys))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_hf_chinese_clip_of_older_versions_has_buffers_and_a_pooler_that_are_left_out(file):
    keys = hf.disk_keys(relatives.hf_chinese_clip())
    more = {
        "text_model.embeddings.position_ids": torch.arange(18)[None],
        "text_model.embeddings.token_type_ids": torch.zeros(1, 18).long(),
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.pooler.dense.weight": torch.ones(32, 32),
        "text_model.pooler.dense.bias": torch.ones(32),
    }
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file({**keys, **more}))
    assert set(result.report.plan.dropped) == set(more)
    assert_bits(model, by_hand.hf_chinese_clip(keys))


@pytest.mark.parametrize("written_by", [4, 5])
def test_lone_towers_of_hf_chinese_clip_have_the_keys_of_clip_and_bert(written_by, file):
    image, text = (hf.disk_keys(relatives.hf_chinese_clip(tower=tower)) for tower in ("image", "text"))
    if written_by == 4:
        image = {f"vision_model.{k}": v for k, v in image.items()}
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file(image), towers=("image",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_clip", ["visual.proj"])
    result = keymap.load_checkpoint(model, file(text, "text.safetensors"), towers=("text",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_bert", ["text.proj.weight"])
    assert set(result.unexpected_keys) == {"pooler.dense.weight", "pooler.dense.bias"}
    peer = relatives.hf_chinese_clip()
    peer.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in image.items()})
    peer.text_model.load_state_dict({k: v for k, v in text.items() if not k.startswith("pooler")})
    with torch.no_grad():
        peer.visual_projection.weight.copy_(model.visual.proj.T)
        peer.text_projection.weight.copy_(model.text.proj.weight)
        pixels, ids = images(), tokens()
        mask = (ids != 0).long()
        out = peer.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert_parity(model, pixels, ids, hf.image_features(peer, pixels), out)


@pytest.mark.parametrize("names", ["as published", "of FlashAttention", "without prefix"])
@pytest.mark.parametrize("tower", ["vit", "square vit", "resnet"])
def test_cn_clip_loads(tower, names, tmp_path, proves):
    resnet = tower == "resnet"
    size = {} if resnet else {**(SQUARE if tower == "square vit" else {}), **relatives.CN_VIT}
    peer = relatives.cn_clip(resnet=resnet, **size)
    model = resnet_and_bert(seed=5) if resnet else openclip.hf_text(**BERT, quick_gelu=True, seed=5, **size)
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    keys = relatives.cn_clip_flash(state) if "Flash" in names else state
    assert any("Wqkv" in key for key in keys) == ("Flash" in names)
    prefix = "" if names == "without prefix" else "module."
    torch.save({"epoch": 3, "state_dict": {f"{prefix}{k}": v for k, v in keys.items()}}, tmp_path / "clip_cn.pt")
    result = keymap.load_checkpoint(model, tmp_path / "clip_cn.pt")
    assert result.report.plan.format == "chinese_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    image, ids = images(64 if resnet else 28), tokens()
    assert_parity(model, image, ids, peer.encode_image(image), peer.encode_text(ids))
    assert_bits(model, by_hand.chinese_clip(state))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_cn_clip_of_older_code_has_a_pooler_that_its_own_loader_leaves_out_too(file):
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    keys = {f"module.{k}": v for k, v in (relatives.cn_clip().state_dict() | more).items()}
    model = openclip.hf_text(**BERT, quick_gelu=True, seed=5, **relatives.CN_VIT)
    result = keymap.load_checkpoint(model, file(keys))
    assert set(result.report.plan.dropped) == set(more)


def test_cn_clip_and_transformers_hold_one_model(file):
    """The authors' file, written as transformers' and loaded as such, gives the same weights."""
    state = relatives.cn_clip().state_dict()
    hub = keymap.convert_state_dict(state, to="open_clip")
    other = keymap.convert_state_dict(hub, to="hf_chinese_clip")
    assert set(other) == set(hf.disk_keys(relatives.hf_chinese_clip()))
    one, two = (openclip.hf_text(**BERT, quick_gelu=True, seed=n, **relatives.CN_VIT) for n in (5, 6))
    keymap.load_checkpoint(one, file(state))
    keymap.load_checkpoint(two, file(other, "hf.safetensors"))
    assert_bits(one, two.state_dict())


def test_a_folder_of_hf_chinese_clip_tells_an_activation_that_differs(tmp_path):
    relatives.hf_chinese_clip().save_pretrained(tmp_path)
    with pytest.warns(keymap.ConfigurationWarning, match="quick_gelu"):
        keymap.load_checkpoint(openclip.hf_text(**BERT, seed=5), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        keymap.load_checkpoint(openclip.hf_text(**BERT, quick_gelu=True, seed=5), tmp_path)


# --- AltCLIP ---


@pytest.mark.parametrize("form", relatives.ALTCLIP_FORMS)
@pytest.mark.parametrize("target", ["flat", "custom"])
def test_the_image_half_of_altclip_loads_and_its_text_half_is_refused_in_words(target, form, sizes, file, proves):
    peer = relatives.hf_altclip(**sizes)
    keys = relatives.altclip_keys(peer, form)
    path = file(keys)
    model = {"flat": openclip.clip, "custom": openclip.custom}[target](quick_gelu=True, seed=5, **sizes)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"format hf_altclip(.|\n)*no OpenCLIP model has AltCLIP's text tower"):
        keymap.load_checkpoint(model, path)
    for request in ({"towers": ("text",)}, {"strict": False}):
        with pytest.raises(keymap.PlanError, match="AltCLIP's text tower"):
            keymap.load_checkpoint(model, path, **request)
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, towers=("image", "scale"))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), hf.image_features(peer, images())) <= LIMIT
    expected = by_hand.hf_altclip(keys)
    state = model.state_dict()
    assert [k for k, v in expected.items() if not same_bits(v.contiguous(), state[k])] == []
    assert [k for k in state if k not in expected and not same_bits(before[k], state[k])] == []
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


def test_lone_towers_of_altclip(file):
    peer = relatives.hf_altclip(tower="image")
    model = openclip.clip(quick_gelu=True, seed=5)
    result = keymap.load_checkpoint(model, file(hf.disk_keys(peer)), towers=("image",), strict=False)
    assert (result.report.plan.format, result.missing_keys) == ("hf_clip", ["visual.proj"])
    before = bits(model)
    path = file(hf.disk_keys(relatives.hf_altclip(tower="text")), "text.safetensors")
    for strict in (True, False):
        with pytest.raises(keymap.PlanError, match="AltCLIP's text tower"):
            keymap.load_checkpoint(model, path, strict=strict)
    assert_unchanged(model, before)


# --- there and back ---

ROUND = {
    "tinyclip": ("tinyclip", lambda: relatives.tinyclip().state_dict()),
    "tinyclip, square": ("tinyclip", lambda: relatives.tinyclip(**OPENAI_SQUARE).state_dict()),
    "tinyclip resnet": ("tinyclip", lambda: relatives.tinyclip(resnet=True).state_dict()),
    "cn_clip": ("chinese_clip", lambda: relatives.cn_clip().state_dict()),
    "cn_clip, square": ("chinese_clip", lambda: relatives.cn_clip(**{**SQUARE, **relatives.CN_VIT}).state_dict()),
    "cn_clip resnet": ("chinese_clip", lambda: relatives.cn_clip(resnet=True).state_dict()),
    "hf_chinese_clip": ("hf_chinese_clip", lambda: hf.disk_keys(relatives.hf_chinese_clip())),
    "hf_chinese_clip, square": ("hf_chinese_clip", lambda: hf.disk_keys(relatives.hf_chinese_clip(**SQUARE))),
    "image half of hf_altclip": (
        "hf_altclip",
        lambda: {k: v for k, v in relatives.hf_altclip().state_dict().items() if not k.startswith("text_")},
    ),
}


@pytest.mark.parametrize("name", ROUND)
def test_a_state_dict_goes_to_the_hub_and_back(name):
    form, make = ROUND[name]
    state = make()
    hub = keymap.convert_state_dict(state, to="open_clip", mapping=form)
    back = keymap.convert_state_dict(hub, to=form)
    assert set(back) == set(state)
    assert [k for k in state if not same_bits(back[k], state[k])] == []


def test_the_sizes_of_long_clip_need_both_tables():
    assert Size(**relatives.LONG).context_length > relatives.SPLIT
