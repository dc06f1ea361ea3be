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
from timm.models._hub import save_for_hf

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


def dinov2(**more):
    return randomise(timm.create_model("vit_small_patch14_dinov2", depth=2, num_classes=0, **more)).eval()


def test_dinov2_of_transformers_has_a_square_grid_whatever_its_images_are(tmp_path):
    with pytest.raises(keymap.PlanError, match="the grid of positions is 2 by 8, and the format has square images"):
        keymap.save_checkpoint(dinov2(img_size=(28, 112)), tmp_path / "out", "hf_dinov2")
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=[28, 112], patch_size=14
    )
    peer = randomise(transformers.Dinov2Model(config)).eval()
    peer.save_pretrained(tmp_path / "own")
    facts = {"image.architecture": "vit_small_patch14_dinov2", "image.pool": "token"}
    keymap.convert_checkpoint(tmp_path / "own", tmp_path / "timm", "vision_transformer", facts=facts)
    assert written(tmp_path / "timm", "model_args", "img_size") == 56
    model = dinov2(img_size=56)
    plan = keymap.load_checkpoint(model, tmp_path / "own").report.plan
    assert [entry for entry in plan.entries if entry.resize is not None] == []
    with torch.no_grad():
        assert max_diff(model(images(56)), peer(images(56)).pooler_output) < 1e-4


def of_a_trunk(name):
    return lambda size, folder: keymap.save_checkpoint(BUILDS[name](seed=1, image_size=size), folder, "open_clip")


def of_timm_itself(size, folder):
    save_for_hf(vit(size), str(folder), model_args={"img_size": size, "depth": 2})


FOLDERS = {  # who writes a folder without the patch size, and the model of square images that it is loaded into
    "siglip": (of_a_trunk("siglip"), (14, 56), lambda: openclip.siglip(seed=2, image_size=28)),
    "clip_trunk": (of_a_trunk("clip_trunk"), (28, 56), lambda: openclip.clip_trunk(seed=2, image_size=56)),
    "native": (of_a_trunk("native"), (14, 56), lambda: openclip.clip(seed=2, image_size=28)),
    "timm": (of_timm_itself, (48, 80), lambda: vit((64, 64))),
    "keymap": (lambda size, folder: keymap.save_checkpoint(vit(size), folder, "vision_transformer"), (32, 128), vit),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_grid_of_a_folder_follows_from_its_size_and_the_patch_of_the_weights(name, tmp_path):
    write, size, build = FOLDERS[name]
    write(size, tmp_path / "wide")
    plan = keymap.plan_load(build(), tmp_path / "wide")
    resized = [entry.resize for entry in plan.entries if entry.resize is not None]
    patch = 14 if name in BUILDS else 16
    grid = (size[0] // patch, size[1] // patch)
    if name == "keymap":
        assert resized == []  # into the same grid
    else:
        assert [(one.source_size, one.assumed) for one in resized] == [(grid, False)]


@pytest.mark.parametrize("to", ["hf_vit", "vision_transformer"])
def test_patches_that_are_not_square_are_refused(to, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=(8, 16), depth=1)
    with pytest.raises(keymap.PlanError, match="patches are not square"):
        keymap.save_checkpoint(model, tmp_path / "out", to)


@pytest.mark.parametrize("to", ["open_clip", "hf_clip"])
def test_patches_of_a_clip_that_are_not_square_are_refused(to, tmp_path):
    model = openclip.clip(seed=1, vision={"patch_size": (14, 28), "image_size": 28})
    with pytest.raises(keymap.PlanError, match="patches are not square"):
        keymap.save_checkpoint(model, tmp_path / "out", to)


@pytest.mark.parametrize("size", [(30, 50), (40, 40)])
def test_pixels_beyond_the_last_whole_patch_belong_to_the_size(size, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=list(size)
    )
    model = randomise(transformers.ViTModel(config)).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "hf_vit")
    peer = transformers.ViTModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(peer(images(size))[0], model(images(size))[0])


def test_a_model_that_pads_its_images_opens_as_one(tmp_path):
    torch.manual_seed(1)
    pads = {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1, **pads).eval()
    keymap.save_checkpoint(model, tmp_path / "out", "vision_transformer")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(peer(images((30, 50))), model(images((30, 50))))


@pytest.mark.parametrize("size", [32, (32, 128), (999, 3), 10**30])
@pytest.mark.parametrize("to", ["vision_transformer", "hf_vit"])
def test_a_size_of_another_number_of_positions_is_refused(to, size, tmp_path):
    keymap.save_checkpoint(vit((32, 64)), tmp_path / "x.safetensors", "vision_transformer")
    facts = {
        "image.architecture": "vit_tiny_patch16_224",
        "image.heads": 3,
        "image.activation": "gelu",
        "image.pool": "token",
        "image.eps": 1e-6,
        "image.no_embed_class": False,
        "image.size": size,
    }
    with pytest.raises(keymap.PlanError, match=r"image.size is .+, but the weights have (8|9) positions"):
        keymap.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", to, facts=facts)


@pytest.mark.parametrize("value", [-28, [-28, -28], [28, 84], "224", [224], {"height": 1}, None])
def test_a_size_in_a_configuration_that_fits_no_weights_is_not_written(value, tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "own", "open_clip")
    file = tmp_path / "own" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = value
    file.write_text(json.dumps(config))
    if value == [28, 84]:
        with pytest.raises(keymap.PlanError, match=r"image.size is .28, 84., but the weights have 4 positions of 14"):
            keymap.convert_checkpoint(tmp_path / "own", tmp_path / "out", "open_clip")
    else:
        keymap.convert_checkpoint(tmp_path / "own", tmp_path / "out", "open_clip")
        assert written(tmp_path / "out", "model_cfg", "vision_cfg", "image_size") == 28


def test_two_numbers_are_a_size_only_where_a_size_is_expected(tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "own", "open_clip")
    file = tmp_path / "own" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["heads"] = [2, 2]
    file.write_text(json.dumps(config))
    with pytest.raises(keymap.PlanError, match=r"text.heads: keymap has no word for that of the source .+\[2, 2\]"):
        keymap.convert_checkpoint(tmp_path / "own", tmp_path / "out", "open_clip")


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
        (
            None,
            "8 positions of 14 pixels are no square, and neither the model nor a configuration shows their grid; pass ",
        ),
        ((28, 84), "image.size is [28, 84], but the weights have 8 positions of 14 pixels"),
        ((-28, -56), "image.size is [-28, -56], but the weights have 8 positions of 14 pixels"),
        ((0, 3), "image.size is [0, 3], but the weights have 8 positions of 14 pixels"),
        ("28x56", "facts={'image.size': '28x56'}: expected names and positive integers, for example "),
        (28.0, "for example facts={'image.size': (224, 448)}"),
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


def test_a_format_of_square_images_has_the_whole_patches_of_a_size(tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1, image_size=(30, 40)), tmp_path / "out", "hf_clip")
    assert written(tmp_path / "out", "vision_config", "image_size") == 28
