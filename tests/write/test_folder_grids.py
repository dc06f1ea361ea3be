"""Folders of models whose images are not square: the configuration has height and width, or the folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from peers import openclip
from peers.common import images, max_diff, randomise

import keymap

SIZES = pytest.mark.parametrize("size", [(28, 56), (14, 56)], ids=["8 positions", "4 positions, as of 28 by 28"])
BUILDS = {"native": openclip.clip, "siglip": openclip.siglip, "clip_trunk": openclip.clip_trunk}
BARE = {  # settings of a native CLIP that its weights do not show
    "image.heads": 3,
    "image.activation": "gelu",
    "image.eps": 1e-5,
    "image.pool": "tok",
    "image.ln_after_pool": False,
    "text.heads": 2,
    "text.activation": "gelu",
    "text.eps": 1e-5,
    "text.pool": "argmax",
    "text.causal": True,
    "text.eos": 0,
}


def written(folder: Path, *path: str):
    (file,) = folder.glob("*config.json")
    value = json.loads(file.read_text())
    for name in path:
        value = value[name]
    return value


@SIZES
@pytest.mark.parametrize("name", BUILDS)
def test_openclip_opens_the_folder_and_the_folder_made_of_it(name, size, tmp_path):
    model = BUILDS[name](seed=1, image_size=size).eval()
    keymap.save_checkpoint(model, tmp_path / "one", "open_clip")
    keymap.convert_checkpoint(tmp_path / "one", tmp_path / "two", "open_clip")
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert written(folder, "model_cfg", "vision_cfg", "image_size") == list(size)
        peer = open_clip.create_model(f"local-dir:{folder}").eval()
        with torch.no_grad():
            assert torch.equal(peer.encode_image(images(size)), model.encode_image(images(size)))


@pytest.mark.parametrize("size", [(32, 64), (16, 64)])
def test_timm_opens_the_folder_of_a_trunk(size, tmp_path):
    model = openclip.custom(seed=1)
    model.visual = torch.nn.Module()
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size)
    model.visual.trunk = randomise(trunk).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "timm", towers="image")
    assert written(tmp_path / "out", "pretrained_cfg", "input_size") == [3, *size]
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(peer(images(size)), trunk(images(size)))


@SIZES
@pytest.mark.parametrize(("to", "name"), [("hf_clip", "native"), ("hf_siglip", "siglip")])
def test_a_format_of_square_images_refuses_a_model_and_its_folder(to, name, size, tmp_path):
    model = BUILDS[name](seed=1, image_size=size)
    keymap.save_checkpoint(model, tmp_path / "own", "open_clip")
    fault = f"the grid of positions is {size[0] // 14} by {size[1] // 14}, and the format has square images only"
    with pytest.raises(keymap.PlanError, match="cannot be written") as caught:
        keymap.save_checkpoint(model, tmp_path / "out", to)
    assert caught.value.faults == (fault,)
    if name == "native":  # of a trunk's configuration the patch size is not known
        with pytest.raises(keymap.PlanError, match="cannot be written") as caught:
            keymap.convert_checkpoint(tmp_path / "own", tmp_path / "out", to)
        assert caught.value.faults == (fault,)
    assert not (tmp_path / "out").exists()


def vit(size=(32, 128)):
    torch.manual_seed(1)
    return randomise(timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, num_classes=5)).eval()


@pytest.mark.parametrize("size", [(32, 128), (16, 64)], ids=["16 positions, as of a square", "4 positions"])
def test_a_vit_of_timm_and_of_transformers_have_each_others_folders(size, tmp_path):
    model = vit(size)
    keymap.save_checkpoint(model, tmp_path / "timm", "vision_transformer")
    keymap.convert_checkpoint(tmp_path / "timm", tmp_path / "hf", "hf_vit")
    facts = {"image.architecture": "vit_tiny_patch16_224"}
    keymap.convert_checkpoint(tmp_path / "hf", tmp_path / "back", "vision_transformer", facts=facts)
    live = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    keymap.save_checkpoint(live, tmp_path / "of the live one", "vision_transformer", facts=facts)
    assert written(tmp_path / "hf", "image_size") == list(size)
    with torch.no_grad():
        expected = model(images(size))
        assert max_diff(live(images(size)).logits, expected) < 1e-5
        for name in ("timm", "back", "of the live one"):
            assert written(tmp_path / name, "model_args", "img_size") == list(size)
            peer = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
            assert torch.equal(peer(images(size)), expected)


def test_dinov2_of_transformers_opens_its_folder(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=[28, 112], patch_size=14
    )
    model = randomise(transformers.Dinov2Model(config)).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_dinov2")
    assert written(tmp_path / "out", "image_size") == [28, 112]
    peer = transformers.Dinov2Model.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(peer(images((28, 112)))[0], model(images((28, 112)))[0])


def test_the_grid_of_a_folder_of_timm_is_known_when_it_is_loaded(tmp_path):
    keymap.save_checkpoint(vit((32, 128)), tmp_path / "wide", "vision_transformer")
    plan = keymap.plan_load(vit((64, 64)), tmp_path / "wide")
    (resized,) = [entry.resize for entry in plan.entries if entry.resize is not None]
    assert resized.source_size == (2, 8) and not resized.assumed


@SIZES
def test_a_file_alone_is_written_with_the_size_that_the_caller_states(size, tmp_path):
    model = openclip.clip(seed=1, image_size=size).eval()
    keymap.save_checkpoint(model, tmp_path / "x.safetensors", "open_clip")
    facts = {**BARE, "image.size": size}
    keymap.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", "open_clip", facts=facts)
    assert written(tmp_path / "out", "model_cfg", "vision_cfg", "image_size") == list(size)
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        assert torch.equal(peer.encode_image(images(size)), model.encode_image(images(size)))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (None, "8 positions are no square, and neither the model nor a configuration shows their grid; pass "),
        ((28, 84), "image.size: [28, 84], but the weights have 8 positions of 14 pixels"),
        ((0, 3), "image.size: [0, 3], but the weights have 8 positions of 14 pixels"),
        ("28x56", "image.size: 28x56, but the weights have 8 positions of 14 pixels"),
        ((28, 56, 3), "facts={'image.size': (28, 56, 3)}: expected names and positive integers"),
        ([28, True], "facts={'image.size': [28, True]}: expected names and positive integers"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(given, fault, tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1, image_size=(28, 56)), tmp_path / "x.safetensors", "open_clip")
    facts = {**BARE, "image.size": given} if given else BARE
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", "open_clip", facts=facts)
    assert fault in str(caught.value) and not (tmp_path / "out").exists()


def test_the_weights_show_the_size_of_square_images_whatever_a_model_says(tmp_path):
    model = openclip.clip(seed=1, image_size=28)
    model.visual.positional_embedding = torch.nn.Parameter(torch.randn(17, model.visual.positional_embedding.shape[1]))
    keymap.save_checkpoint(model, tmp_path / "out", "open_clip")
    assert written(tmp_path / "out", "model_cfg", "vision_cfg", "image_size") == 56


def test_an_index_can_be_zero(tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "x.safetensors", "open_clip")
    keymap.convert_checkpoint(
        tmp_path / "x.safetensors", tmp_path / "out", "open_clip", facts={**BARE, "text.pool": "eos"}
    )
    assert written(tmp_path / "out", "model_cfg", "text_cfg", "eos_id") == 0
    facts = {**BARE, "text.eos": -1, "image.heads": 0}
    with pytest.raises(keymap.PlanError, match=r"facts=\{'image.heads': 0, 'text.eos': -1\}: expected names and"):
        keymap.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", "open_clip", facts=facts)
