"""A value of a configuration that is there is never read as the default: it has a word, or it is unknown."""

from __future__ import annotations

import json
import warnings

import pytest
import transformers
from open_clip.model import CustomTextCLIP
from peers import hf, hf_text, openclip, timm_towers
from peers.common import Size, images, max_diff
from safetensors.torch import save_file
from transformers.activations import ACT2CLS

import keymap
from keymap.language.compile import compile_mapping
from keymap.source.config import read_config
from keymap.source.registry import registry


def load(model, folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = keymap.load_checkpoint(model, folder, **options)
    return result, [str(w.message) for w in caught if issubclass(w.category, keymap.ConfigurationWarning)]


def labels(texts):
    return {text.split(": ")[1] for text in texts}


def saved(peer, folder, **sections):
    """The peer's file, and its configuration with these fields of sections changed."""
    peer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for section, fields in sections.items():
        config[section] = {**config.get(section, {}), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SAME = {  # names of transformers for one function, and OpenCLIP's models of that function
    "gelu": {"gelu", "gelu_python"},
    "gelu_tanh": {"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"},
}
WEIGHTED = {"prelu", "xielu"}  # activations with weights of their own


@pytest.mark.parametrize("name", sorted(ACT2CLS.keys() - WEIGHTED))
@pytest.mark.parametrize("ours", SAME)
def test_every_activation_of_transformers(name, ours, tmp_path):
    """A warning comes exactly where the embeddings differ: known names map, all others are not the default."""
    peer = hf.siglip(act=ours)
    config = type(peer.config).from_dict(peer.config.to_dict())
    config.vision_config.hidden_act = name
    theirs = transformers.SiglipModel(config).eval()
    theirs.load_state_dict(peer.state_dict())
    theirs.save_pretrained(tmp_path)
    model = openclip.siglip(act=ours, seed=4)
    _, texts = load(model, tmp_path)
    far = max_diff(model.encode_image(images()), hf.image_features(theirs, images())) > 1e-5
    far |= name == "gelu_10"  # differs from gelu above 10 only
    assert far == (name not in SAME[ours])
    assert labels(texts) == ({"activation of the image tower"} if far else set())


@pytest.mark.parametrize(
    "value", ["snake", "QuickGELU", "", None, 3, 0.5, True, ["gelu"], {"name": "gelu"}, "x" * 999, "a\nb"]
)
@pytest.mark.parametrize("kind", [openclip.clip, openclip.clip_trunk])
def test_an_unknown_activation_is_not_the_default(value, kind, tmp_path):
    saved(hf.clip(quick_gelu=True, eos=2), tmp_path, vision_config={"hidden_act": value})
    result, texts = load(kind(quick_gelu=True, seed=4), tmp_path)
    found = [text for text in texts if "activation of the image tower" in text]
    assert len(found) == 1 and "unknown activation " in found[0] and "quick_gelu in the model" in found[0]
    assert "default" not in found[0] and "\n" not in found[0] and len(found[0]) < 600
    assert "activation of the image tower" not in result.report.plan.unverified


def test_the_text_of_an_unknown_value(tmp_path):
    saved(hf.clip(eos=2), tmp_path, text_config={"hidden_act": "snake"})
    _, texts = load(openclip.clip(), tmp_path)
    assert (
        texts[0]
        .partition(": ")[2]
        .startswith(
            "activation of the text tower: unknown activation 'snake' in the source "
            "(config.json: text_config.hidden_act = snake), gelu in the model, so embeddings will differ; change quick"
        )
    )


@pytest.mark.parametrize("value", ["12", None, [3], "three"])
def test_a_head_count_that_is_not_a_number_is_not_the_default(value, tmp_path):
    saved(hf.clip(eos=2), tmp_path, vision_config={"num_attention_heads": value})
    _, texts = load(openclip.clip(), tmp_path)
    assert labels(texts) == {"attention heads of the image tower"}


@pytest.mark.parametrize(("name", "warns"), [("gelu_python", False), ("gelu_new", True), ("mish", True), (None, True)])
def test_the_activation_of_a_hf_text_tower(name, warns, tmp_path):
    peer = hf_text.model("XLMRobertaModel")
    peer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": name}))
    _, texts = load(openclip.hf_text(family="xlm-roberta"), tmp_path, towers=("text",), strict=False)
    assert labels(texts) == ({"activation of the text tower"} if warns else set())


@pytest.mark.parametrize(("theirs", "warns"), [("gelu_python", False), ("silu", True), ("snake", True)])
def test_a_right_model_gives_no_false_alarm(theirs, warns, tmp_path):
    saved(hf.clip(eos=2), tmp_path, text_config={"hidden_act": theirs})
    assert bool(load(openclip.custom(), tmp_path)[1]) == warns


# --- the YAML language ---

MAPPING = """format: example
title: an example
reference: none
layouts: {image: native_vit}
detect: {any: [w]}
towers: {image: {w: visual.w}}
config:
  file: x.json
  sections: {image: [new, old, ""]}
  facts:
    image.pool: PLACE
  defaults: {image.pool: the default}
"""


def read(place, data, tmp_path):
    """The value of the fact, in an example of a mapping and of its configuration."""
    (tmp_path / "x.json").write_text(json.dumps(data))
    mapping = compile_mapping(MAPPING.replace("PLACE", place), "example.yaml")
    found = read_config(tmp_path / "w.safetensors", {}, mapping, registry().hub).facts.get("image.pool")
    return found and found[0]


FILTER = "[{path: kind, words: {a: one}, others: ignore}, {path: pool, words: {p: two}}]"
LAST = "{path: id, minus: {path: count, default: 10}, words: {-1: null, -2: last but one}, others: {word: another}}"
PLACES = [  # a place, a configuration, and the value
    (FILTER, {"kind": "a", "pool": "p"}, "one"),
    (FILTER, {"kind": "b", "pool": "p"}, "two"),
    (FILTER, {"kind": "b", "pool": "q"}, "q"),  # unknown
    (FILTER, {"pool": None}, "null"),  # unknown
    (FILTER, {"kind": "b", "new": {}}, "the default"),
    ("[{path: pool, words: {p: null}}, {path: kind}]", {"pool": "p", "kind": "a"}, None),
    (LAST, {"id": 4, "count": 5}, None),
    (LAST, {"id": 3, "count": 5}, "last but one"),
    (LAST, {"id": 8}, "last but one"),
    (LAST, {"id": 3}, "another"),
    (LAST, {"id": [3]}, "[3]"),
    ("pool", {"new": {"pool": 1}, "old": {"pool": 2}}, 1),
    ("pool", {"old": {"pool": 2}, "pool": 3}, 2),
    ("pool", {"new": None, "old": {"pool": 2}}, 2),
    ("pool", {"new": {"x": 1}, "old": {"pool": 2}}, "the default"),
    ("{path: pool, unless: kind}", {"kind": False, "pool": 1}, 1),
    ("{path: pool, unless: kind}", {"kind": "a", "pool": 1}, None),
    ("{path: pool, only_if: kind}", {"kind": "a", "pool": 1}, 1),
    ("{path: pool, only_if: kind}", {"kind": "", "pool": 1, "new": {}}, "the default"),
]


@pytest.mark.parametrize(("place", "data", "value"), PLACES)
def test_how_a_place_is_read(place, data, value, tmp_path):
    assert read(place, data, tmp_path) == value


@pytest.mark.parametrize(
    "place",
    [
        "{path: kind, others: ignore}",
        "{path: kind, words: {a: b}, others: skip}",
        "{path: kind, words: {a: b}, others: {word: null}}",
        "{path: id, minus: {path: count, default: 1}}",
        "{path: id, minus: count, words: {a: b}}",
    ],
)
def test_a_wrong_place_is_refused(place, tmp_path):
    with pytest.raises(keymap.MappingError, match=r"example.yaml:11:"):
        read(place, {}, tmp_path)


# --- sections that override ---


@pytest.mark.parametrize("section", ["vision", "text"])
def test_the_old_sections_of_transformers_override(section, tmp_path):
    """CLIPConfig reads text_config_dict and vision_config_dict, and their defaults, over the other sections."""
    peer = hf.clip(eos=2)
    save_file(hf.disk_keys(peer), tmp_path / "model.safetensors")
    config = peer.config.to_dict()
    config[f"{section}_config_dict"] = {**config[f"{section}_config"], "hidden_act": "quick_gelu"}
    read_back = transformers.CLIPConfig.from_dict(json.loads(json.dumps(config)))
    assert getattr(read_back, f"{section}_config").hidden_act == "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = {"vision": "image", "text": "text"}[section]
    assert labels(load(openclip.clip(), tmp_path)[1]) == {f"activation of the {tower} tower"}
    del config[f"{section}_config_dict"]["layer_norm_eps"], config[f"{section}_config_dict"]["hidden_act"]
    config[f"{section}_config"] |= {"layer_norm_eps": 0.1}
    read_back = transformers.CLIPConfig.from_dict(json.loads(json.dumps(config)))
    assert getattr(read_back, f"{section}_config").layer_norm_eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, texts = load(openclip.clip(), tmp_path)
    assert labels(texts) == {f"activation of the {tower} tower"}  # the default, QuickGELU
    config[f"{section}_config_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert labels(load(openclip.clip(), tmp_path)[1]) == {f"eps of the {tower} tower's norms"}


VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3}


def timm_model_beside_its_configuration(folder, base, pool, size, **options):
    """A model, with its file and its configuration in a folder."""
    name = timm_towers.register(base, **options)
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    text = openclip.native_text(Size())
    model = CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    configuration = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(configuration))
    return model


@pytest.mark.parametrize("pool", ["", None])
@pytest.mark.parametrize("theirs", ["token", "avg"])
def test_a_pooling_that_is_left_to_timms_model_is_not_taken_as_an_average(pool, theirs, tmp_path):
    base = "vit_relpos_medium_patch16_cls_224"
    model = timm_model_beside_its_configuration(tmp_path, base, pool, 28, global_pool=theirs, **VIT)
    plan = keymap.plan_load(model, tmp_path)
    assert plan.warnings == () and "pooling of the image tower" in plan.unverified


POOLED = {  # timm's classes, by where they keep their pooling
    "ResNet": ("resnet10t", 64, {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}),
    "StarNet": ("starnet_s050", 64, {}),
    "Hiera": ("hiera_tiny_224", 64, {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "ConvNeXt": ("convnext_atto", 64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("name", POOLED)
def test_the_pooling_of_every_kind_of_timm_model_is_compared(name, tmp_path):
    base, size, options = POOLED[name]
    (tmp_path / "other").mkdir()
    other = timm_model_beside_its_configuration(tmp_path / "other", base, "max", size, **options)
    model = timm_model_beside_its_configuration(tmp_path, base, "avg", size, **options)
    assert keymap.plan_load(model, tmp_path).warnings == keymap.plan_load(other, tmp_path / "other").warnings == ()
    (warning,) = keymap.plan_load(other, tmp_path).warnings
    assert "pooling of the image tower: avg in the source" in warning and "max in the model" in warning
