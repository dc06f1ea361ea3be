"""What users of CLIP checkpoints run into: each test is one problem, as its user meets it, and what keymap does.

That a refused load leaves the model unchanged is proved in `test_refusals`; that a load makes no second copy of the
weights, in `test_memory`.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from peers import big_vision, hf, openai, openclip
from peers.common import SQUARE, assert_unchanged, bits, images, max_diff, same_bits, tokens
from safetensors.torch import load_file, save_file

import keymap

LIMIT = 2e-5


def contiguous(model):
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def holds(model, wanted):
    return all(same_bits(value, wanted[key]) for key, value in model.state_dict().items())


def computes_the_same(model, peer):
    image, text = images(), tokens()
    with torch.no_grad():
        differences = [
            max_diff(model.encode_image(image), hf.image_features(peer, image)),
            max_diff(model.encode_text(text), hf.text_features(peer, text)),
        ]
    return max(differences) <= LIMIT


def test_a_fine_tune_goes_from_transformers_to_open_clip_and_back(tmp_path):
    peer = hf.clip(seed=1)
    peer.save_pretrained(tmp_path / "theirs")
    found = keymap.inspect_checkpoint(tmp_path / "theirs")
    assert found.format == "hf_clip" and "hf_clip" in str(found)
    model = openclip.clip(seed=2)
    assert keymap.load_checkpoint(model, tmp_path / "theirs").report.plan.format == "hf_clip"
    assert computes_the_same(model, peer)
    with torch.no_grad():
        for parameter in model.parameters():  # the fine-tune
            parameter.add_(0.01 * torch.randn_like(parameter))
    (tmp_path / "ours").mkdir()
    save_file(keymap.convert_state_dict(model.state_dict(), "hf_clip"), tmp_path / "ours" / "model.safetensors")
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    back = type(peer).from_pretrained(tmp_path / "ours").eval()
    assert computes_the_same(model, back)


def test_quick_gelu_against_gelu_gives_a_warning_for_a_file(tmp_path):
    hf.clip(quick_gelu=True).save_pretrained(tmp_path)
    with pytest.warns(keymap.ConfigurationWarning, match=r"quick_gelu in the source .* gelu in the model"):
        keymap.load_checkpoint(openclip.clip(), tmp_path)


def test_weights_are_read_out_of_a_training_checkpoint(tmp_path):
    source = openclip.clip(seed=1)
    optimizer = torch.optim.AdamW(source.parameters())
    run = {"state_dict": source.state_dict(), "optimizer": optimizer.state_dict(), "loss": np.float64(0.25)}
    torch.save(
        {**run, "args": argparse.Namespace(lr=1e-3), "rng": np.random.RandomState(0).get_state()}, tmp_path / "run.pt"
    )
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "run.pt", weights_only=True)
    model = openclip.clip(seed=2)
    keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert holds(model, source.state_dict())


def test_an_openai_archive_is_read_without_running_its_code(tmp_path):
    peer = openai.vit()
    openai.save_archive(peer, tmp_path / "ViT.pt")
    model = openclip.clip(quick_gelu=True, **openai.VIT)
    result = keymap.load_checkpoint(model, tmp_path / "ViT.pt", weights_only=True)
    assert result.report.plan.container == "torchscript"
    with torch.no_grad():
        assert max_diff(model.encode_image(images()), openai.image_features(peer, images())) <= LIMIT


WRAPPED = {
    "model_state_dict": lambda s: {"model_state_dict": s},
    "model, module.": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "ema, module._orig_mod.": lambda s: {"ema": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "_orig_mod.module.": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "teacher. beside a loss": lambda s: {
        "state_dict": {f"teacher.{k}": v for k, v in s.items()} | {"w": torch.ones(1)}
    },
    "clip_model.": lambda s: {"state_dict": {f"clip_model.{k}": v for k, v in s.items()}},
    "model.clip_model. beside a head": lambda s: (
        {f"model.clip_model.{k}": v for k, v in s.items()} | {"model.quality.weight": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_prefixes_are_stripped_in_any_order(name, tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    torch.save(WRAPPED[name](source.state_dict()), tmp_path / "x.pt")
    keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert holds(model, source.state_dict())


def test_keys_without_the_prefix_are_never_cut(tmp_path):
    keys = list(openclip.clip().state_dict())
    state = {f"module.{k}" if k == keys[0] else k: v for k, v in openclip.clip(seed=1).state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    model = openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=f"module.{keys[0]}"):
        keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert_unchanged(model, before)


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("tower", [None, "image", "text_proj"])
def test_files_of_transformers_4_and_5_load(written_by, tower, tmp_path):
    peer = hf.clip(tower=tower, seed=1)
    save_file(hf.disk_keys(peer, written_by, position_ids=written_by == 4), tmp_path / "x.safetensors")
    towers = {None: None, "image": ("image",), "text_proj": ("text",)}[tower]
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict=tower != "image", towers=towers)
    assert result.missing_keys == (["visual.proj"] if tower == "image" else [])
    assert result.unexpected_keys == []
    assert any("position_ids" in key for key in result.report.plan.dropped) == (written_by == 4)


@pytest.mark.parametrize("kind", [openclip.clip, openclip.clip_trunk, openclip.siglip])
def test_a_fine_tune_at_another_image_size_is_resized_and_reloaded(kind, tmp_path):
    source, model, again = kind(seed=1), kind(seed=2, image_size=56), kind(seed=3, image_size=56)
    save_file(contiguous(source), tmp_path / "small.safetensors")
    assert keymap.load_checkpoint(model, tmp_path / "small.safetensors").report.plan.resized
    save_file(contiguous(model), tmp_path / "large.safetensors")
    assert not keymap.load_checkpoint(again, tmp_path / "large.safetensors").report.plan.resized
    assert holds(again, model.state_dict())


def test_a_grid_that_is_not_square_is_asked_for_and_another_text_width_is_refused(tmp_path):
    save_file(contiguous(openclip.clip(seed=1, image_size=(28, 56))), tmp_path / "wide.safetensors")
    model = openclip.clip(seed=2, image_size=56)
    with pytest.raises(keymap.PlanError, match=r"pass source_grid=\(h, w\)"):
        keymap.load_checkpoint(model, tmp_path / "wide.safetensors")
    result = keymap.load_checkpoint(model, tmp_path / "wide.safetensors", source_grid=(2, 4))
    assert result.report.plan.resized["visual.positional_embedding"] == "2x4 to 4x4, bicubic"
    with pytest.raises(keymap.PlanError, match=r"text tower (native|flat)"):
        keymap.load_checkpoint(openclip.clip(text_width=64), tmp_path / "wide.safetensors", source_grid=(2, 4))


def test_a_logit_bias_is_filled_and_reported_or_refused(tmp_path):
    state = contiguous(openclip.siglip(seed=1))
    save_file({k: v for k, v in state.items() if k != "logit_bias"}, tmp_path / "without.safetensors")
    save_file(state, tmp_path / "with.safetensors")
    model = openclip.siglip(seed=2)
    filled = keymap.load_checkpoint(model, tmp_path / "without.safetensors").report.plan.filled
    assert filled == {"logit_bias": "with 0, because the file has no such key"} and float(model.logit_bias) == 0
    with pytest.raises(keymap.VerifyError, match="the model has no logit_bias"):
        keymap.load_checkpoint(openclip.siglip(seed=2, logit_bias=False), tmp_path / "with.safetensors")


def test_one_tower_loads_and_converts_alone(tmp_path):
    peer, model = hf.clip(tower="image_proj", seed=1), openclip.clip(seed=2)
    save_file(hf.disk_keys(peer), tmp_path / "vision.safetensors")
    before = contiguous(model)
    result = keymap.load_checkpoint(model, tmp_path / "vision.safetensors", towers=("image",))
    assert set(result.report.plan.loaded) == {"image"} and result.missing_keys == []
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items() if "visual" not in key)
    image = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    out = keymap.convert_state_dict(image, "hf_clip")
    assert sorted(out) == sorted(hf.disk_keys(peer))
    assert all(same_bits(value.contiguous(), hf.disk_keys(peer)[key]) for key, value in out.items())


def test_a_file_for_another_architecture_is_refused_in_one_sentence(tmp_path):
    save_file(contiguous(openclip.siglip()), tmp_path / "siglip.safetensors")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "siglip.safetensors")
    sentence = caught.value.faults[0]
    assert "the file holds" in sentence and "map_trunk (width 48" in sentence
    assert "the model has image tower native_vit" in sentence and "configuration" in sentence
    assert len(str(caught.value).splitlines()) < 15


@pytest.mark.parametrize("kind", ["other names", "other sizes"])
def test_not_strict_refuses_a_load_of_nothing(kind, tmp_path):
    state = contiguous(openclip.clip(seed=1, image_width=96, image_heads=6, text_width=64))
    if kind == "other names":
        state = {k.replace("resblocks", "blocks").replace("visual.", "vision."): v for k, v in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    model = openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict=False)
    assert "tower" in str(caught.value) or "known formats" in str(caught.value)
    assert_unchanged(model, before)


def test_raw_weights_or_ema_can_be_chosen_and_the_choice_is_reported(tmp_path):
    raw, ema = openclip.clip(seed=1), openclip.clip(seed=2)
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "run.pt")
    model = openclip.clip(seed=3)
    result = keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert holds(model, raw.state_dict())
    assert "wrapper: state_dict" in str(result) and "'state_dict_ema' (choose with wrapper=)" in str(result)
    keymap.load_checkpoint(model, tmp_path / "run.pt", wrapper="state_dict_ema")
    assert holds(model, ema.state_dict())


def test_a_square_projection_is_transposed_by_its_format(tmp_path):
    peer, model = hf.clip(seed=1, **SQUARE), openclip.clip(seed=2, **SQUARE)
    save_file(hf.disk_keys(peer), tmp_path / "hf.safetensors")
    keymap.load_checkpoint(model, tmp_path / "hf.safetensors")
    assert computes_the_same(model, peer)
    assert same_bits(model.visual.proj.detach(), peer.visual_projection.weight.detach().T.contiguous())
    save_file(contiguous(model), tmp_path / "own.safetensors")
    other = openclip.clip(seed=3, **SQUARE)
    keymap.load_checkpoint(other, tmp_path / "own.safetensors")
    assert holds(other, model.state_dict())


def test_inspect_lists_the_configurations_that_fit(tmp_path):
    from peers import full_size

    path = full_size.sparse_file(tmp_path / "x.safetensors", full_size.model("ViT-B-16-plus-240").state_dict())
    assert keymap.inspect_checkpoint(path).configurations == ["ViT-B-16-plus-240", "ViT-B-16-plus (positions resized)"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_of_half_precision_are_resized_in_float32(dtype, tmp_path):
    state = {key: value.to(dtype) for key, value in contiguous(openclip.clip(seed=1)).items()}
    save_file(state, tmp_path / "half.safetensors")
    save_file({key: value.float() for key, value in state.items()}, tmp_path / "full.safetensors")
    model, reference = openclip.clip(seed=2, image_size=56), openclip.clip(seed=3, image_size=56)
    keymap.load_checkpoint(model, tmp_path / "half.safetensors")
    keymap.load_checkpoint(reference, tmp_path / "full.safetensors")
    assert holds(model, reference.state_dict())


def test_bfloat16_in_npz_is_read_although_numpy_reads_void(tmp_path):
    flat = big_vision.init()
    big_vision.save(big_vision.to_bfloat16_void(flat), tmp_path / "siglip.npz")
    with np.load(tmp_path / "siglip.npz") as archive:
        assert archive["img/pos_embedding"].dtype.kind == "V"
    model = openclip.siglip(seed=2)
    keymap.load_checkpoint(model, tmp_path / "siglip.npz")
    wanted = torch.from_numpy(flat["img/pos_embedding"]).bfloat16().float()
    assert same_bits(model.visual.trunk.pos_embed.detach(), wanted)


def test_both_position_tables_of_long_clip_are_used(tmp_path):
    state = contiguous(openclip.clip(seed=1, context_length=40))
    old, new = torch.randn(40, 32), torch.randn(40, 32)
    save_file({**state, "positional_embedding": old, "positional_embedding_res": new}, tmp_path / "long.safetensors")
    model = openclip.clip(seed=2, context_length=40)
    assert keymap.load_checkpoint(model, tmp_path / "long.safetensors").report.plan.format == "longclip"
    assert same_bits(model.positional_embedding.detach(), torch.cat([old[:20], new[20:]]))


def test_settings_that_weights_do_not_show_are_compared_or_listed(tmp_path):
    peer = hf.clip()
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 6
    config["text_config"]["layer_norm_eps"] = 1e-3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(keymap.ConfigurationWarning) as caught:
        keymap.load_checkpoint(openclip.clip(text={"pool_type": "last"}), tmp_path)
    messages = " ".join(str(warning.message) for warning in caught)
    assert all(
        word in messages for word in ("attention heads of the image tower: 6", "eps of the text", "pooling of the text")
    )
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "elsewhere.safetensors")
    (tmp_path / "config.json").unlink()
    result = keymap.load_checkpoint(openclip.clip(), tmp_path / "elsewhere.safetensors")
    assert "not verified (settings that the weights do not show): attention heads of the image tower" in str(result)
