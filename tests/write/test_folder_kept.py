"""What the source says of images and text is kept in a folder, and no folder is written that its owner cannot open."""

from __future__ import annotations

import json
import os

import open_clip
import pytest
import timm
import torch
import transformers
from peers import hf, naflex, openclip
from peers.common import images, max_diff, randomise, tokens
from timm.data import resolve_model_data_config

import keymap

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
NOT_KNOWN = "has no preprocess_cfg"


def opened(owner, folder):
    """The model that the owner's loader makes of a folder; no tensor is missing, too many or of another shape."""
    peer, info = owner.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return peer.eval()


def edited(path, change):
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def openclip_folder(tmp_path):
    """A folder of OpenCLIP whose configuration says how images and text are prepared."""
    keymap.save_checkpoint(openclip.clip(), tmp_path / "source", "open_clip")

    def change(data):
        data["preprocess_cfg"] = PREPROCESSING
        text = {"hf_tokenizer_name": "some/name", "tokenizer_kwargs": {"clean": "canonicalize"}}
        data["model_cfg"]["text_cfg"] |= text

    edited(tmp_path / "source" / "open_clip_config.json", change)
    return tmp_path / "source"


def transforms(folder):
    return str(open_clip.create_model_and_transforms(f"local-dir:{folder}")[2])


def test_an_openclip_folder_keeps_the_sources_preprocessing_and_tokenizer(openclip_folder, tmp_path):
    result = keymap.convert_checkpoint(openclip_folder, tmp_path / "out", "open_clip", dtype="float16")
    assert transforms(tmp_path / "out") == transforms(openclip_folder)
    text = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["hf_tokenizer_name"], text["tokenizer_kwargs"]) == ("some/name", {"clean": "canonicalize"})
    assert not any(NOT_KNOWN in note for note in result.notes)


def test_a_live_models_preprocessing_is_written_also_over_an_earlier_folder(openclip_folder, tmp_path):
    model = open_clip.create_model(f"local-dir:{openclip_folder}")
    for overwrite in (False, True):
        result = keymap.save_checkpoint(model, tmp_path / "out", "open_clip", overwrite=overwrite)
        assert transforms(tmp_path / "out") == transforms(openclip_folder)
        assert not any(NOT_KNOWN in note for note in result.notes)


def test_a_note_says_that_the_preprocessing_is_not_known(tmp_path):
    model = openclip.clip()
    result = keymap.save_checkpoint(model, tmp_path / "out", "open_clip")
    assert [note for note in result.notes if NOT_KNOWN in note]
    assert "preprocess_cfg" not in json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    hf.clip(eos=2).save_pretrained(tmp_path / "hf")
    assert any(
        NOT_KNOWN in note for note in keymap.convert_checkpoint(tmp_path / "hf", tmp_path / "b", "open_clip")[-1]
    )


@pytest.mark.parametrize("value", [{"mean": [float("nan")] * 3}, object(), {"std": torch.ones(3)}])
def test_what_json_cannot_hold_is_left_out(value, tmp_path):
    model = openclip.clip()
    model.visual.preprocess_cfg = value
    keymap.save_checkpoint(model, tmp_path / "out", "open_clip")
    written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert not written.get("preprocess_cfg")


def timm_tower():
    model = openclip.custom(seed=1)
    model.visual = torch.nn.Module()
    model.visual.trunk = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=0)).eval()
    return model


def prepared(folder):
    """How timm prepares images for the model of a folder."""
    return resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))


@pytest.mark.parametrize("older", [False, True], ids=["pretrained_cfg", "the older form without it"])
def test_timm_keeps_the_sources_preprocessing(older, tmp_path):
    model = timm_tower()
    keymap.save_checkpoint(model, tmp_path / "one", "timm", towers="image")
    expected = resolve_model_data_config(model.visual.trunk)
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in prepared(tmp_path / "one").items()} == expected
    stated = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "crop_pct": 0.8, "interpolation": "bilinear"}
    path = tmp_path / "one" / "config.json"
    if older:
        edited(path, lambda data: (data.pop("pretrained_cfg"), data.update(stated)))
    else:
        edited(path, lambda data: data["pretrained_cfg"].update(stated))
    keymap.convert_checkpoint(tmp_path / "one", tmp_path / "two", "timm", towers="image", dtype="float16")
    two = prepared(tmp_path / "two")
    assert {name: two[name] for name in stated} == stated


@pytest.mark.parametrize("form", ["open_clip", "timm"])
def test_shards_that_the_owner_does_not_read_are_refused(form, tmp_path):
    model, towers = timm_tower(), "image" if form == "timm" else None
    model = model if towers else openclip.clip()
    with pytest.raises(keymap.PlanError, match="knows no shards; leave out max_shard_size="):
        keymap.save_checkpoint(model, tmp_path / "out", form, towers=towers, max_shard_size="150KB")
    assert os.listdir(tmp_path) == []
    keymap.save_checkpoint(model, tmp_path / "out", form, towers=towers, max_shard_size="5GB")


# --- what the owner's class has ---


def test_a_scale_with_an_axis_is_written_as_the_owner_has_it(tmp_path):
    model = openclip.clip(nonscalar_logit_scale=True, seed=1)
    keymap.save_checkpoint(model, tmp_path / "out", "hf_clip")
    assert opened(transformers.CLIPModel, tmp_path / "out").logit_scale == model.logit_scale
    keymap.save_checkpoint(model, tmp_path / "out.pt", "openai")
    assert torch.load(tmp_path / "out.pt")["logit_scale"].shape == ()


def without_text_projection():
    return openclip.clip(text={"proj_type": "none"}, text_width=24)


def without_image_projection():
    model = openclip.clip(image_width=24, image_heads=3)
    model.visual.proj = None
    return model


UNOPENED = {  # the format, the model, the towers, and what the message says
    "no projection of the text": ("hf_clip", without_text_projection, None, "a projection of the text, and the model"),
    "no projection of the image": ("hf_clip", without_image_projection, None, "a projection of the image, and"),
    "the scale alone": ("hf_clip", openclip.clip, ("scale",), "a scale without a tower; write a file"),
    "the scales of SigLIP": ("hf_siglip", openclip.siglip, ("scale",), "a scale without a tower; write a file"),
    "the scales of SigLIP 2": ("hf_siglip2_naflex", naflex.model, ("scale",), "a scale without a tower"),
    "no scale": ("hf_clip", openclip.clip, ("image", "text"), "has a scale; write it, too"),
    "no scale of SigLIP": ("hf_siglip", openclip.siglip, ("image", "text"), "has a scale; write it, too"),
}


@pytest.mark.parametrize("name", UNOPENED)
def test_a_folder_that_no_class_opens_is_refused(name, tmp_path):
    form, build, towers, why = UNOPENED[name]
    with pytest.raises(keymap.PlanError, match=why):
        keymap.save_checkpoint(build(), tmp_path / "out", form, towers=towers)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_towers_of_a_model_without_a_projection_are_written_apart(tower, tmp_path):
    model = without_text_projection().eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_clip", towers=tower)
    if tower == "image":
        peer = opened(transformers.CLIPVisionModelWithProjection, tmp_path / "out")
        assert max_diff(peer(pixel_values=images()).image_embeds, model.encode_image(images())) < 1e-5
    else:
        peer = opened(transformers.CLIPTextModel, tmp_path / "out")
        assert max_diff(peer(input_ids=tokens()).pooler_output, model.encode_text(tokens())) < 1e-5


def test_a_model_that_ends_at_the_last_id_needs_no_pooling(tmp_path):
    source = hf.clip(seed=1).eval()
    assert source.config.text_config.eos_token_id == source.config.text_config.vocab_size - 1
    source.save_pretrained(tmp_path / "one")
    keymap.convert_checkpoint(tmp_path / "one", tmp_path / "two", "hf_clip")
    peer = opened(transformers.CLIPModel, tmp_path / "two")
    assert peer.config.text_config.eos_token_id == source.config.text_config.eos_token_id
    ids = tokens(eos=source.config.text_config.eos_token_id)
    assert torch.equal(hf.text_features(peer, ids), hf.text_features(source, ids))


@pytest.mark.parametrize("form", ["hf_clip", "hf_siglip"])
def test_an_image_tower_of_one_channel(form, tmp_path):
    source = hf.clip(eos=2) if form == "hf_clip" else hf.siglip()
    owner, config = type(source), source.config
    config.vision_config.num_channels = 1
    randomise(owner(config)).save_pretrained(tmp_path / "one")
    keymap.convert_checkpoint(tmp_path / "one", tmp_path / "two", form)
    assert opened(owner, tmp_path / "two").config.vision_config.num_channels == 1
    facts = {"image.architecture": "vit_base_patch16_siglip_224", "image.size": 28} if form == "hf_siglip" else None
    with pytest.raises(keymap.PlanError, match="three channels"):
        keymap.convert_checkpoint(tmp_path / "one", tmp_path / "three", "open_clip", facts=facts)


def test_a_timm_tower_of_one_channel(tmp_path):
    model = timm_tower()
    trunk = model.visual.trunk = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1)).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "timm", towers="image")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(peer(images(224)[:, :1]), trunk(images(224)[:, :1]))


@pytest.mark.parametrize("form", ["hf_clip", "open_clip"])
def test_a_live_model_of_transformers_states_its_settings(form, tmp_path):
    model = hf.clip(quick_gelu=True, seed=1).eval()
    keymap.save_checkpoint(model, tmp_path / "out", form)
    eos = model.config.text_config.eos_token_id
    if form == "hf_clip":
        peer = opened(transformers.CLIPModel, tmp_path / "out")
        image, text = hf.image_features(peer, images()), hf.text_features(peer, tokens(eos=eos))
    else:
        peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
        image, text = peer.encode_image(images()), peer.encode_text(tokens(eos=eos))
    assert max_diff(image, hf.image_features(model, images())) < 1e-5
    assert max_diff(text, hf.text_features(model, tokens(eos=eos))) < 1e-5


# --- settings of the caller, of a model and of a configuration are what the owner's code takes ---

BARE = {"image.pool": "tok", "text.pool": "argmax", "text.causal": True, "image.heads": 3, "text.heads": 4}
BARE |= {f"{tower}.{name}": v for tower in ("image", "text") for name, v in (("activation", "gelu"), ("eps", 1e-5))}
WRONG = {  # settings, and what the message says
    "a word for a number": ({"image.eps": "small"}, "image.eps: 'small' is no positive number"),
    "not a number": ({"text.eps": float("nan")}, "text.eps: 'nan' is no positive number"),
    "infinite": ({"text.eps": float("inf")}, "text.eps: 'inf' is no positive number"),
    "a number for a word": ({"image.activation": 3}, "image.activation: '3' is no word"),
    "a fraction of heads": ({"text.heads": 4.0}, "expected|text.heads: '4.0' is no whole number"),
    "heads that do not divide the width": ({"image.heads": 5}, "image.heads: 5 does not divide 48"),
    "heads of the text": ({"text.heads": 5}, "text.heads: 5 does not divide 32"),
    "heads of two widths": (
        {"image.head_width": 24},
        "image.heads: 3, but by the shapes and image.head_width = 24 it is",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_the_owner_cannot_take_is_refused_by_name(name, tmp_path):
    settings, message = WRONG[name]
    keymap.save_checkpoint(openclip.clip(), tmp_path / "bare.safetensors", "open_clip")
    with pytest.raises(keymap.PlanError, match=message):
        keymap.convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "out", "hf_clip", facts=BARE | settings)
    assert not (tmp_path / "out").exists()
    keymap.convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "out", "hf_clip", facts=BARE)
    opened(transformers.CLIPModel, tmp_path / "out")


@pytest.mark.parametrize("value", ["small", float("nan"), -1.0])
def test_a_setting_of_a_configuration_is_looked_at_too(value, tmp_path):
    hf.clip(eos=2).save_pretrained(tmp_path / "one")
    edited(tmp_path / "one" / "config.json", lambda data: data["text_config"].update(layer_norm_eps=value))
    with pytest.raises(keymap.PlanError, match="eps"):
        keymap.convert_checkpoint(tmp_path / "one", tmp_path / "out", "hf_clip")
