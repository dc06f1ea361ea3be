"""Each row of the README's table "My file is ..." on such a file: the call as printed loads what the file holds."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peers import big_vision, hf, openclip, timm_towers
from peers.common import Size, randomise, same_bits
from safetensors.torch import save_file
from torch import nn

import keymap

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TABLE = README.partition("## My file is ...")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| (.+?) \| `(keymap\.load_checkpoint\(.+\))` \|$", TABLE, re.MULTILINE))
UNET = {"unet.down.0.conv.weight": torch.ones(4, 3, 3, 3), "vae.decoder.norm.weight": torch.ones(4)}


def state(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def part(model, prefix):
    return {key[len(prefix) :]: value for key, value in state(model).items() if key.startswith(prefix)}


def text_of(model):
    return {key: value for key, value in state(model).items() if not key.startswith(("visual.", "logit_"))}


def saved(tensors, folder, name="x.safetensors"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name)
    return folder / name


def loaded(build, tensors, folder, **options):
    """A model with the weights of a bare file, loaded as the other tests prove."""
    folder = folder / "bare"
    model = build(seed=9)
    keymap.load_checkpoint(model, saved(tensors, folder), **options)
    return model


def same(model, wanted, start=("",), but=()):
    pairs = [(key, value) for key, value in model.state_dict().items() if key.startswith(start) and key not in but]
    assert pairs
    assert [key for key, value in pairs if not same_bits(value, wanted.state_dict()[key])] == []


# --- each builds the file and the model, and returns the path, the model and a check ---


def stable_diffusion(folder):
    text = hf.disk_keys(hf.clip(seed=1, tower="text"), 4)
    wanted = loaded(openclip.clip, text, folder, towers="text", allow_missing="text_projection")
    path = saved(UNET | under("cond_stage_model.transformer.", text), folder)
    model = openclip.clip(seed=2)
    return path, model, lambda: same(model, wanted, ("transformer.", "token_embedding", "ln_final", "positional"))


def sdxl(folder):
    small, big = hf.disk_keys(hf.clip(seed=1, tower="text"), 4), openclip.clip(seed=3, text_width=64)
    tensors = under("conditioner.embedders.0.transformer.", small) | under(
        "conditioner.embedders.1.model.", text_of(big)
    )
    model = openclip.clip(seed=2, text_width=64)
    return saved(UNET | tensors, folder), model, lambda: same(model, big, ("transformer.", "text_projection"))


def llava(folder):
    image = hf.disk_keys(hf.clip(seed=1, tower="image"), 4)
    wanted = loaded(openclip.clip, image, folder, towers="image", allow_missing="visual.proj")
    model = openclip.clip(seed=2)
    tensors = under("model.vision_tower.vision_tower.", image) | {"model.embed_tokens.weight": torch.ones(5, 4)}
    return saved(tensors, folder), model, lambda: same(model, wanted, ("visual.",), ("visual.proj",))


def headless(seed):
    vision, _ = hf._configs(Size(), "gelu_pytorch_tanh", 1e-6)
    config = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
    peer = randomise(transformers.SiglipVisionModel(config), seed)
    return {f"vision_tower.vision_model.{key.removeprefix('vision_model.')}": v for key, v in state(peer).items()}


def gap(seed):
    size = Size()
    name = timm_towers.register("vit_base_patch16_siglip_gap_224", **timm_towers.vit_sizes(size), act_layer="gelu_tanh")
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "none", "image_size": size.image_size}
    return openclip._model(
        openclip.CustomTextCLIP, vision, openclip.native_text(size), {"seed": seed}, embed_dim=size.image_width
    )


def without_head(folder, build):
    tensors, model = headless(1), build(seed=2)
    before = model.visual.trunk.norm.weight.clone()

    def check():
        norm = model.visual.trunk.norm.weight
        assert same_bits(norm.detach(), tensors["vision_tower.vision_model.post_layernorm.weight"])
        assert not same_bits(norm, before)

    return saved(tensors | UNET, folder), model, check


def coop(folder):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    text = {key: value for key, value in text_of(donor).items() if key != "token_embedding.weight"}
    tensors = under("image_encoder.", part(donor, "visual.")) | under("text_encoder.", text)
    tensors |= {"logit_scale": state(donor)["logit_scale"], "prompt_learner.ctx": torch.ones(4, 32)}
    return saved(tensors, folder), model, lambda: same(model, donor, but=("token_embedding.weight",))


def two_places(folder):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tensors = under("image_encoder.", part(donor, "visual.")) | under("text_encoder.", text_of(donor))
    tensors |= under("old_image_encoder.", part(openclip.clip(seed=3), "visual."))
    return saved(tensors | {"logit_scale": state(donor)["logit_scale"]}, folder), model, lambda: same(model, donor)


def distillation(folder):
    teacher, model = openclip.clip(seed=1), openclip.clip(seed=2)
    path = saved(under("student.", state(openclip.clip(seed=3))) | under("teacher.", state(teacher)), folder)
    return path, model, lambda: same(model, teacher)


def classifier(folder, has_one):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    donor.classifier = nn.Linear(24, 3)
    if has_one:
        model.classifier = nn.Linear(24, 3)
    return saved(state(donor), folder), model, lambda: same(model, donor)


def one_tower(folder):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    return saved(part(donor, "visual."), folder), model, lambda: same(model, donor, ("visual.",))


def owl(folder):
    vision, text = hf._configs(Size(), "gelu", 1e-5)
    config = transformers.OwlViTConfig(vision_config=vision, text_config=text, projection_dim=Size().embed_dim)
    peer = randomise(transformers.OwlViTForObjectDetection(config), 1)
    clip = {key.replace("pre_layernorm", "pre_layrnorm"): v for key, v in state(peer.owlvit).items()}
    wanted, model = loaded(openclip.clip, clip, folder), openclip.clip(seed=2)
    return saved(state(peer), folder), model, lambda: same(model, wanted)


def weight_norm(folder):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tensors = {}
    for key, value in state(donor).items():
        if key.endswith("c_fc.weight"):
            tensors[key.removesuffix("weight") + "weight_g"] = value.norm(dim=1, keepdim=True)
            tensors[key.removesuffix("weight") + "weight_v"] = 3 * value
        elif key.endswith("c_proj.weight"):
            tensors[key.removesuffix("weight") + "r"] = value.norm(dim=1)
            tensors[key.removesuffix("weight") + "theta"] = value / 2
        else:
            tensors[key] = value

    def check():
        for key, value in model.state_dict().items():
            assert torch.allclose(value, donor.state_dict()[key], atol=1e-6), key

    return saved(tensors, folder), model, check


def comfy(folder):
    text = hf.disk_keys(hf.clip(seed=1, tower="text_proj"), 4)
    wanted, model = loaded(openclip.clip, text, folder, towers="text"), openclip.clip(seed=2)
    text["text_projection"] = text.pop("text_projection.weight").T
    return saved(text, folder), model, lambda: same(model, wanted, ("transformer.", "text_projection"))


def script(folder):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    torch.jit.script(donor).save(str(folder / "x.pt"))
    return folder / "x.pt", model, lambda: same(model, donor)


def trainer(folder):
    for step in (90, 1000, 500):
        last = hf.clip(seed=step)
        last.save_pretrained(folder / f"checkpoint-{step}")
        torch.save({"state": {}}, folder / f"checkpoint-{step}" / "optimizer.pt")
    wanted, model = loaded(openclip.clip, hf.disk_keys(hf.clip(seed=1000)), folder.parent), openclip.clip(seed=2)
    return folder, model, lambda: same(model, wanted)


def hub_cache(folder):
    cache = folder / "models--owner--name"
    hf.clip(seed=1).save_pretrained(cache / "snapshots" / "abc123")
    hf.clip(seed=3).save_pretrained(cache / "snapshots" / "old")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    wanted, model = loaded(openclip.clip, hf.disk_keys(hf.clip(seed=1)), folder), openclip.clip(seed=2)
    return cache, model, lambda: same(model, wanted)


def shards(folder):
    tensors = hf.disk_keys(hf.clip(seed=1))
    keys = list(tensors)
    for number in range(3):
        saved(
            {key: tensors[key] for key in keys[number::3]},
            folder / "run",
            f"model-0000{number + 1}-of-00003.safetensors",
        )
    wanted, model = loaded(openclip.clip, tensors, folder), openclip.clip(seed=2)
    return folder / "run", model, lambda: same(model, wanted)


def big_vision_run(folder):
    flat = big_vision.init(seed=1)
    big_vision.save(flat, folder / "bare.npz")
    wanted, model = openclip.siglip(seed=9), openclip.siglip(seed=2)
    keymap.load_checkpoint(wanted, folder / "bare.npz")
    moments = {f"opt/0/mu/{key}": np.zeros_like(value) for key, value in flat.items()}
    np.savez(folder / "x.npz", **big_vision.with_prefix(flat), **moments, **{"chrono/step": np.array(3)})
    return folder / "x.npz", model, lambda: same(model, wanted)


BUILDERS = {
    "Stable Diffusion 1.x": stable_diffusion,
    "SDXL": sdxl,
    "LLaVA": llava,
    "PaliGemma": lambda folder: without_head(folder, gap),
    "SigLIP without its head": lambda folder: without_head(folder, openclip.siglip),
    "CoOp": coop,
    "two towers whose places": two_places,
    "a distillation": distillation,
    "a fine-tune with a classifier that my model lacks": lambda folder: classifier(folder, False),
    "a fine-tune with a classifier that my model has": lambda folder: classifier(folder, True),
    "one tower": one_tower,
    "OWL-ViT": owl,
    "a fine-tune with `weight_g`": weight_norm,
    "ComfyUI": comfy,
    "TorchScript": script,
    "the output folder": trainer,
    "`~/.cache": hub_cache,
    "shards": shards,
    "big_vision": big_vision_run,
}


def test_every_row_has_its_file():
    assert len(ROWS) == TABLE.count("keymap.load_checkpoint(")
    assert [row for row in ROWS if sum(row.startswith(start) for start in BUILDERS) != 1] == []


@pytest.mark.parametrize("start", BUILDERS)
def test_the_call_of_a_row_loads_such_a_file(start, tmp_path):
    row = next(row for row in ROWS if row.startswith(start))
    path, model, check = BUILDERS[start](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)
        eval(ROWS[row], {"keymap": keymap, "model": model, "path": path})
    check()
