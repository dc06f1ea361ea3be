"""Relatives of CLIP under other names: each loads with the weights that it holds, goes back, and computes the same."""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import partial

import pytest
import timm
import torch
import transformers
from broken import Case, rule_tests
from checks import assert_parity
from flax import serialization
from peers import full_size, hf, openai, openclip, other_names, timm_towers
from peers.common import Size, images, randomise, same_bits, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import keymap

pytestmark = pytest.mark.formats(
    "slip", "meru", "wan_clip", "hf_flax_clip", "hf_vision_text_dual_encoder", "hf_clip", "hf_siglip"
)


def trunk_with_projection(seed, **arguments):
    """CLIP with a ViT of timm without a norm before its blocks, and a linear projection."""
    size = Size()
    name = timm_towers.register("vit_base_patch16_224", **timm_towers.vit_sizes(size))
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": "linear", "image_size": size.image_size}
    text = openclip.native_text(size)
    return openclip._model(openclip.CLIP, vision, text, {"seed": seed, **arguments})


def xlm(seed):
    return openclip.hf_text(family="xlm-roberta", pooler="mean_pooler", proj="mlp", seed=seed)


NAMES = {
    "slip": (trunk_with_projection, other_names.slip),
    "meru": (trunk_with_projection, other_names.meru),
    "wan_clip": (xlm, other_names.wan),
}


def written(tensors, tmp_path, name="x.safetensors"):
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, tmp_path / name)
    return tmp_path / name


def holds(model, source):
    wanted = source.state_dict()
    return [key for key, value in model.state_dict().items() if not same_bits(value, wanted[key])] == []


@pytest.mark.parametrize("form", NAMES)
def test_every_tensor_is_the_one_that_the_names_say(form, tmp_path, proves):
    build, names = NAMES[form]
    source, model = build(1), build(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)  # the activation is not the owner's
        result = keymap.load_checkpoint(model, written(names(source.state_dict()), tmp_path))
    assert holds(model, source)
    assert result.report.plan.format == form
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("form", NAMES)
def test_a_model_goes_back_to_the_names(form):
    build, names = NAMES[form]
    state = build(1).state_dict()
    back, wanted = keymap.convert_state_dict(state, form), names(state)
    assert back.keys() == wanted.keys()
    assert all(same_bits(back[key], value.contiguous()) for key, value in wanted.items())


class Slip(nn.Module):
    """SLIP's forward pass: timm's ViT times a matrix; OpenAI's text tower, from OpenAI's package."""

    def __init__(self, seed):
        super().__init__()
        size = Size(**openai.VIT)
        self.text = openai.vit(seed=seed).float()
        self.visual = randomise(
            timm.create_model("vit_base_patch16_224", **timm_towers.vit_sizes(Size()), num_classes=0), seed
        )
        self.image_projection = nn.Parameter(torch.randn(Size().image_width, size.embed_dim) / 7)

    def state(self):
        found = {key: v for key, v in self.text.state_dict().items() if not key.startswith("visual.")}
        found |= {f"visual.{key}": value for key, value in self.visual.state_dict().items()}
        return found | {"image_projection": self.image_projection.detach()}


def test_slip_computes_what_its_own_forward_pass_does(tmp_path, proves):
    peer = Slip(seed=3)
    model = trunk_with_projection(5, text={"mlp_ratio": 4.0}, quick_gelu=True)
    path = written({f"module.{key}": value for key, value in peer.state().items()}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        result = keymap.load_checkpoint(model, path)
    image, ids = images(), tokens()
    with torch.no_grad():
        wanted = peer.visual(image) @ peer.image_projection
        assert_parity(model, image, wanted, ids, openai.text_features(peer.text, ids))
    proves("parity", result.report.plan)


def test_merus_hyperbolic_numbers_have_no_place(tmp_path):
    source = trunk_with_projection(1)
    tensors = other_names.meru(source.state_dict()) | {"curv": torch.tensor(0.1), "visual_alpha": torch.tensor(0.2)}
    path, model = written(tensors, tmp_path), trunk_with_projection(2)
    with pytest.raises(keymap.PlanError, match="hyperbolic"):
        keymap.load_checkpoint(model, path)
    keymap.load_checkpoint(model, path, towers=("image", "text"))
    assert same_bits(model.visual.trunk.cls_token, source.visual.trunk.cls_token)


@pytest.mark.parametrize("container", ["safetensors", "msgpack", "msgpack in chunks"])
def test_a_flax_clip_computes_what_transformers_does(container, tmp_path, monkeypatch, proves):
    peer = hf.clip(seed=1, quick_gelu=True)
    tensors = other_names.flax(hf.disk_keys(peer))
    path = tmp_path / "flax_model.msgpack"
    if container == "safetensors":
        path = written(tensors, tmp_path)
    else:
        if "chunks" in container:
            monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 700)
        tree = {}
        for key, value in tensors.items():
            *names, last = key.split(".")
            node = tree
            for name in names:
                node = node.setdefault(name, {})
            node[last] = value.detach().numpy().copy()
        path.write_bytes(serialization.to_bytes(tree))
    model = openclip.clip(seed=2, quick_gelu=True)
    result = keymap.load_checkpoint(model, path)
    image, ids = images(), tokens()
    with torch.no_grad():
        assert_parity(model, image, hf.image_features(peer, image), ids, hf.text_features(peer, ids))
    proves("parity", result.report.plan)
    back = keymap.convert_state_dict(model.state_dict(), "hf_flax_clip")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key].reshape(value.shape), value) for key, value in tensors.items())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_lone_flax_tower(tower, tmp_path):
    """With its prefix, as transformers 4 wrote it, and without, below another one."""
    peer = hf.clip(seed=1)
    start = {"image": "vision_model.", "text": "text_model."}[tower]
    tensors = {k: v for k, v in other_names.flax(hf.disk_keys(peer)).items() if k.startswith(start)}
    allow = {"image": "visual.proj", "text": "text_projection"}[tower]
    models = []
    for prefix in (start, "", "encoder."):
        named = {prefix + key.removeprefix(start): value for key, value in tensors.items()}
        models.append(openclip.clip(seed=2))
        keymap.load_checkpoint(models[-1], written(named, tmp_path), towers=(tower,), allow_missing=allow)
    assert holds(models[1], models[0]) and holds(models[2], models[0])
    assert not holds(models[0], openclip.clip(seed=2))


# --- the word of config.json ---


def dual_encoder(folder, pooler, family="bert"):
    size = Size()
    vision, _ = hf._configs(size, "quick_gelu", 1e-5)
    text = openclip.hf_config(family, size)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**vision), text, projection_dim=size.embed_dim
    )
    peer = randomise(transformers.VisionTextDualEncoderModel(config), 3)
    peer.save_pretrained(folder)
    model = openclip.hf_text(family=family, pooler=pooler, proj="linear", seed=4, quick_gelu=True)
    return peer, model


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_dual_encoder_with_its_pooler_computes_what_transformers_does(family, tmp_path, proves):
    peer, model = dual_encoder(tmp_path, "cls_pooler", family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        result = keymap.load_checkpoint(model, tmp_path)
    assert result.report.plan.format == "hf_vision_text_dual_encoder"
    image, ids = images(), tokens().clamp(3)
    with torch.no_grad():
        wanted = peer.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
        wanted = wanted if torch.is_tensor(wanted) else wanted.pooler_output
        seen = peer.get_image_features(pixel_values=image)
        seen = seen if torch.is_tensor(seen) else seen.pooler_output
        assert_parity(model, image, seen, ids, wanted)
    proves("parity", result.report.plan)


def test_a_dual_encoder_below_a_prefix_is_warned_of(tmp_path):
    """Without its configuration it has the keys of ChineseCLIPModel, which has no use for the pooler."""
    peer, model = dual_encoder(tmp_path, "cls_last_hidden_state_pooler")
    tensors = {f"clip.{key}": value.contiguous() for key, value in peer.state_dict().items()}
    (tmp_path / "config.json").unlink()
    path = written({**tensors, "classifier.weight": torch.ones(2, 2)}, tmp_path)
    with pytest.warns(keymap.ConfigurationWarning, match="keys are those of hf_chinese_clip and of"):
        keymap.load_checkpoint(model, path)


@pytest.mark.parametrize("pooler", ["cls_last_hidden_state_pooler", "mean_pooler", "max_pooler"])
@pytest.mark.parametrize("configuration", [True, False])
def test_a_dual_encoder_without_its_pooler_is_refused_or_warned_of(pooler, configuration, tmp_path):
    _, model = dual_encoder(tmp_path, pooler)
    if not configuration:
        (tmp_path / "config.json").unlink()
    if configuration:
        with pytest.raises(keymap.PlanError, match="pooler") as caught:
            keymap.load_checkpoint(model, tmp_path)
        assert "allow_unexpected" not in str(caught.value)  # the embeddings would be wrong
    else:
        with pytest.warns(keymap.ConfigurationWarning, match="fits the model"):
            keymap.load_checkpoint(model, tmp_path)


def test_the_settings_of_another_model_are_not_those_of_a_tower_in_it(tmp_path):
    """A language model's file with an image tower: its own head count and activation say nothing of the tower."""
    peer = hf.disk_keys(hf.clip(seed=1, tower="image", quick_gelu=True))
    tensors = {f"model.vision_tower.{key}": value for key, value in peer.items()}
    path = written(tensors | {"model.embed_tokens.weight": torch.randn(9, 4)}, tmp_path, "model.safetensors")
    outer = {"model_type": "llava_llama", "num_attention_heads": 40, "hidden_act": "silu", "layer_norm_eps": 0.1}
    for section in ({}, {"vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 3}}):
        (tmp_path / "config.json").write_text(json.dumps(outer | section))
        model = openclip.clip(seed=2, quick_gelu=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", keymap.ConfigurationWarning)
            result = keymap.load_checkpoint(model, path, towers=("image",), allow_missing="visual.proj")
        unknown = "attention heads of the image tower" in str(result.report.plan.unverified)
        assert unknown == (not section)
    (tmp_path / "config.json").write_text(
        json.dumps(outer | {"vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 6}})
    )
    with pytest.warns(keymap.ConfigurationWarning, match="attention heads"):
        keymap.load_checkpoint(openclip.clip(quick_gelu=True), path, towers=("image",), allow_missing="visual.proj")


# --- towers by their body ---


def headless(seed):
    size = Size()
    vision, _ = hf._configs(size, "gelu_pytorch_tanh", 1e-6)
    config = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
    return randomise(transformers.SiglipVisionModel(config), seed)


def gap_trunk(seed):
    size = Size()
    name = timm_towers.register("vit_base_patch16_siglip_gap_224", **timm_towers.vit_sizes(size), act_layer="gelu_tanh")
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "none", "image_size": size.image_size}
    text = openclip.native_text(size)
    return openclip._model(openclip.CustomTextCLIP, vision, text, {"seed": seed}, embed_dim=size.image_width)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_model."])
def test_siglip_without_its_head_loads_and_goes_back(prefix, tmp_path):
    peer = headless(1)
    body = {key.removeprefix("vision_model."): value for key, value in peer.state_dict().items()}
    path = written({prefix + key: value for key, value in body.items()}, tmp_path)
    model = gap_trunk(2)
    keymap.load_checkpoint(model, path, towers=("image",))
    image = images()
    with torch.no_grad():
        wanted = peer(image).last_hidden_state
        assert (model.visual.trunk.forward_features(image) - wanted).abs().max() < 1e-5
    back = keymap.convert_state_dict(
        {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}, "hf_siglip"
    )
    assert {key.removeprefix("vision_model."): tuple(value.shape) for key, value in back.items()} == {
        key: tuple(value.shape) for key, value in body.items() if "position_ids" not in key
    }
    assert all(torch.equal(value, body[key.removeprefix("vision_model.")]) for key, value in back.items())


@pytest.mark.parametrize("kind", ["OwlViT", "Owlv2"])
def test_owl_vit_is_a_clip_with_another_name_for_one_norm(kind, tmp_path, proves):
    size = Size()
    vision, text = hf._configs(size, "quick_gelu", 1e-5)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, projection_dim=size.embed_dim
    )
    peer = randomise(getattr(transformers, f"{kind}ForObjectDetection")(config), 1)
    peer.save_pretrained(tmp_path)
    model = openclip.clip(seed=2, quick_gelu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)
        keymap.load_checkpoint(model, tmp_path)
    inner = getattr(peer, kind.lower())
    image, ids = images(), tokens()
    with torch.no_grad():
        assert_parity(model, image, hf.image_features(inner, image), ids, hf.text_features(inner, ids))


def test_the_text_encoder_that_comfyui_saves(tmp_path):
    """HF's names, and the projection as it is multiplied."""
    peer = hf.disk_keys(hf.clip(seed=1, tower="text_proj"))
    reference, model = openclip.clip(seed=2), openclip.clip(seed=2)
    keymap.load_checkpoint(reference, written(peer, tmp_path), towers=("text",))
    raw = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in peer.items() if "text_projection" not in k}
    raw["text_projection"] = peer["text_projection.weight"].T
    keymap.load_checkpoint(model, written(raw, tmp_path), towers=("text",))
    assert holds(model, reference)


# --- each rule of the new formats, broken ---

ROWS = r"""
slip: the projection not turned: refused
- image_projection: {to: visual.head.proj.weight, view: in out -> out in}
+ image_projection: {to: visual.head.proj.weight}
slip: the norms of a block exchanged: differs
- blocks.(\d+).norm(1|2).(weight|bias): blocks.\1.norm\2.\3
+ blocks.(\d+).norm(1|2).(weight|bias): blocks.\1.norm<2:other>.\3
meru: the text projection not turned: refused
- textual_proj.weight: {to: text_projection, view: out in -> in out}
+ textual_proj.weight: {to: text_projection}
wan_clip: q and k exchanged: differs
- attn.(q|k|v).(weight|bias): attention.self.<1:qkv>.\2
+ attn.(q|k|v).(weight|bias): attention.self.<1:kqv>.\2
hf_flax_clip: a kernel not turned: refused
- mlp.fc(1|2).kernel: {to: mlp.<1:fc>.weight, view: i o -> o i}
+ mlp.fc(1|2).kernel: {to: mlp.<1:fc>.weight}
hf_flax_clip: the kernel read as width, height: differs
- view: h w i o -> o i h w
+ view: w h i o -> o i h w
hf_vision_text_dual_encoder: the query taken for the key: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.(query|key|value).(weight|bias): attention.self.<1:turned>.\2
"""
LOOKUPS = (
    "  other: {1: 2, 2: 1}\n  kqv: {q: key, k: query, v: value}\n  turned: {query: key, key: query, value: value}\n"
)


def case_of(form):
    build, names = NAMES[form]
    source = build(1)
    image, ids = images(), tokens()
    with torch.no_grad():
        outputs = (source.encode_image(image), source.encode_text(ids), source.logit_scale, None)
    return Case(form, names(source.state_dict()), build(2), outputs, image, ids)


def flax_case():
    peer = hf.clip(seed=1, quick_gelu=True)
    image, ids = images(), tokens()
    with torch.no_grad():
        outputs = (hf.image_features(peer, image), hf.text_features(peer, ids), None, None)
    model = openclip.clip(seed=2, quick_gelu=True)
    return Case("hf_flax_clip", other_names.flax(hf.disk_keys(peer)), model, outputs, image, ids)


def dual_case():
    with tempfile.TemporaryDirectory() as folder:
        peer, model = dual_encoder(folder, "cls_pooler")
        state = load_file(f"{folder}/model.safetensors")
    image, ids = images(), tokens().clamp(3)
    with torch.no_grad():
        text = peer.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
        text = text if torch.is_tensor(text) else text.pooler_output
        seen = peer.get_image_features(pixel_values=image)
        seen = seen if torch.is_tensor(seen) else seen.pooler_output
    return Case("hf_vision_text_dual_encoder", state, model, (seen, text, None, None), image, ids)


CASES = {form: partial(case_of, form) for form in NAMES}
CASES |= {"hf_flax_clip": flax_case, "hf_vision_text_dual_encoder": dual_case}

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)


FOREIGN = ["Blip", "XCLIP", "GroupViT", "Clap", "Flava", "Align", "Aimv2"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_family_whose_image_tower_is_another_is_never_loaded_as_clips(kind, strict, tmp_path):
    config = getattr(transformers, f"{kind}Config")()
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    for section in ("vision_config", "text_config", "audio_config", "image_config"):
        part = getattr(config, section, None)
        for name, value in small.items():
            if part is not None and hasattr(part, name) and kind not in ("Align", "Clap"):
                setattr(part, name, value)
    with torch.device("meta"):
        peer = getattr(transformers, f"{kind}Model")(config)
    path = full_size.sparse_file(tmp_path / "x.safetensors", dict(peer.state_dict()))
    model = openclip.clip(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(keymap.KeymapError):
        keymap.load_checkpoint(model, path, strict, towers=("image",))
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
