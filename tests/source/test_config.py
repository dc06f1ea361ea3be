"""Settings that weights do not show are compared between source and model; a difference is a warning that names it.

The weights fit in every row here; only the functions differ.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from peers import big_vision, hf, hf_text, openai, openclip
from peers.common import SQUARE, images, max_diff, same_bits, tokens
from safetensors.torch import save_file

import keymap
from keymap.source.config import read_config
from keymap.source.registry import registry

LABELS = {
    "attention heads of the image tower",
    "attention heads of the text tower",
    "activation of the image tower",
    "activation of the text tower",
    "eps of the image tower's norms",
    "eps of the text tower's norms",
    "causal mask of the text tower",
    "pooling of the image tower",
    "pooling of the text tower",
}


def load(model, path, **options):
    """The result, and the texts of the warnings, which are the plan's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = keymap.load_checkpoint(model, path, **options)
    messages = [str(w.message) for w in caught if issubclass(w.category, keymap.ConfigurationWarning)]
    assert [text.split(": ", 1)[1] for text in messages] == list(result.report.plan.warnings)
    assert all(text.startswith(f"{result.report.plan.file}: ") for text in messages)
    assert all(f"warning: {text}" in str(result) for text in result.report.plan.warnings)
    return result, messages


def saved(peer, folder):
    peer.save_pretrained(folder)
    return folder / "model.safetensors"


# --- transformers' config.json ---

MODELS = {
    "the same": ({}, []),
    "QuickGELU": ({"quick_gelu": True}, ["activation of the image tower", "activation of the text tower"]),
    "other heads": (
        {"image_heads": 6, "text_heads": 2},
        ["attention heads of the image tower", "attention heads of the text tower"],
    ),
    "other eps": ({"vision": {"norm_kwargs": {"eps": 1e-4}}}, ["eps of the image tower's norms"]),
    "no causal mask": ({"text": {"no_causal_mask": True}}, ["causal mask of the text tower"]),
    "other pooling": ({"text": {"pool_type": "last"}}, ["pooling of the text tower"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [openclip.clip, openclip.custom, openclip.clip_trunk])
def test_a_hf_clip_file_beside_its_configuration(name, kind, tmp_path):
    arguments, expected = MODELS[name]
    if kind is openclip.clip_trunk and "vision" in arguments:
        pytest.skip("timm's tower takes its eps from the timm model")
    peer = hf.clip(eos=2)  # the highest id is the end, as in OpenAI's files
    model = kind(seed=5, **arguments)
    result, messages = load(model, saved(peer, tmp_path))
    eps = ["eps of the image tower's norms"] if kind is openclip.clip_trunk else []  # timm's is 1e-6 or 1e-5
    assert {text.split(": ")[1] for text in messages} - set(eps) == set(expected)
    differs = max_diff(model.encode_image(images()).detach(), hf.image_features(peer, images())) > 1e-3
    differs |= max_diff(model.encode_text(tokens()).detach(), hf.text_features(peer, tokens())) > 1e-3
    assert differs == bool(set(expected) - {"eps of the image tower's norms"})  # what is warned of is what differs
    assert result.report.plan.unverified == ()


def test_a_warning_names_both_values_their_place_and_the_setting(tmp_path):
    _, messages = load(openclip.clip(quick_gelu=True), saved(hf.clip(), tmp_path))
    assert (
        "activation of the image tower: gelu in the source (config.json: vision_config.hidden_act = gelu)"
        in messages[0]
    )
    assert "quick_gelu in the model" in messages[0]
    assert "change quick_gelu (create_model's force_quick_gelu)" in messages[0]


def test_metaclip2_pools_its_end_token(tmp_path):
    path = saved(hf.metaclip2(), tmp_path)
    assert load(openclip.clip(text={"pool_type": "eos", "eos_id": 2}), path)[1] == []
    _, messages = load(openclip.clip(), path)
    assert len(messages) == 1 and "pooling of the text tower: eos in the source" in messages[0]
    _, messages = load(openclip.clip(text={"pool_type": "eos", "eos_id": 7}), path)
    assert len(messages) == 1 and "end token of the text tower: 2 in the source" in messages[0]


def test_a_lone_tower_compares_its_own_facts_only(tmp_path):
    path = saved(hf.clip(tower="image_proj"), tmp_path)
    result, messages = load(openclip.clip(quick_gelu=True), path, towers=("image",))
    assert [text.split(": ")[1] for text in messages] == ["activation of the image tower"]
    assert result.report.plan.unverified == ()


def test_hf_siglip_leaves_its_defaults_out_of_the_configuration(tmp_path):
    path = saved(hf.siglip(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert load(openclip.siglip(), path)[1] == []
    _, messages = load(openclip.siglip(act="gelu"), path)
    assert {text.split(": ")[1] for text in messages} == {
        "activation of the image tower",
        "activation of the text tower",
    }
    for tower in ("vision_config", "text_config"):
        del config[tower]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, messages = load(openclip.siglip(act="gelu"), path)
    assert "gelu_tanh in the source (default, not set in config.json)" in messages[0]


# --- what a format's own code fixes ---


def test_an_openai_archive_counts_as_quick_gelu(tmp_path):
    openai.save_archive(openai.vit(), tmp_path / "ViT.pt")
    result, messages = load(openclip.clip(quick_gelu=True, **openai.VIT), tmp_path / "ViT.pt")
    assert messages == []  # heads of 64, as OpenAI's are
    _, messages = load(openclip.clip(**openai.VIT), tmp_path / "ViT.pt")
    assert "activation of the image tower: quick_gelu in the source (format openai), gelu in the model" in messages[0]
    assert "eps of the image tower's norms" in result.report.plan.unverified


def test_a_big_vision_file_counts_as_tanh_gelu(tmp_path):
    big_vision.save(big_vision.init(), tmp_path / "siglip.npz")
    assert load(openclip.siglip(), tmp_path / "siglip.npz")[1] == []
    _, messages = load(openclip.siglip(act="gelu"), tmp_path / "siglip.npz")
    assert {text.split(": ")[1] for text in messages} == {
        "activation of the image tower",
        "activation of the text tower",
    }


# --- OpenCLIP's own configuration ---


def test_the_configuration_of_an_open_clip_folder(tmp_path):
    source = openclip.clip(quick_gelu=True, seed=1)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    model_cfg = {
        "quick_gelu": True,
        "vision_cfg": {"width": 48, "head_width": 16, "layers": 2, "patch_size": 14, "image_size": 28},
        "text_cfg": {"width": 32, "heads": 4, "layers": 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    result, messages = load(openclip.clip(quick_gelu=True, seed=2), tmp_path)
    assert messages == []
    assert result.report.plan.unverified == ()
    _, messages = load(openclip.clip(seed=2, text={"no_causal_mask": True}), tmp_path)
    assert {text.split(": ")[1] for text in messages} == {
        "activation of the image tower",
        "activation of the text tower",
        "causal mask of the text tower",
    }


def test_a_timm_tower_has_its_activation_from_timm(tmp_path):
    source = openclip.siglip(seed=1)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    text = {"heads": 4, "no_causal_mask": True, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}}
    text["norm_kwargs"] = {"eps": 1e-6}
    model_cfg = {"vision_cfg": {"timm_model_name": "x", "timm_pool": "map", "image_size": 28}, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    result, messages = load(openclip.siglip(seed=2), tmp_path)
    assert messages == []
    assert {"activation of the image tower", "attention heads of the image tower"} <= set(result.report.plan.unverified)


def own_folder(folder, source, vision=None, text=None, **model_cfg):
    """A checkpoint as OpenCLIP's models are published, with what its configuration says of the towers."""
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, folder / "open_clip_model.safetensors")
    vision = {"width": 48, "head_width": 16, "layers": 2, "patch_size": 14, "image_size": 28} | (vision or {})
    text = {"width": 32, "heads": 4, "layers": 3} | (text or {})
    config = {"model_cfg": {"vision_cfg": vision, "text_cfg": text, **model_cfg}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


AVERAGE = {"pool_type": "avg", "final_ln_after_pool": True}
TANH = {"act_kwargs": {"approximate": "tanh"}}
EPS = {"norm_kwargs": {"eps": 1e-2}}
OWN = {  # what the source's towers are, what the model's are, and which warnings come
    "pooling": (AVERAGE, {}, {"pooling of the image tower"}),
    "the same pooling": (AVERAGE, AVERAGE, set()),
    "the last norm": (AVERAGE, {"pool_type": "avg"}, {"place of the image tower's last norm"}),
    "tanh GELU": (TANH, {}, {"activation of the image tower"}),
    "the same tanh GELU": (TANH, TANH, set()),
    "eps left to the default": ({}, EPS, {"eps of the image tower's norms"}),
}


@pytest.mark.parametrize("name", OWN)
def test_the_image_tower_of_an_open_clip_folder(name, tmp_path):
    """A warning comes exactly where the embeddings differ."""
    theirs, ours, expected = OWN[name]
    source, model = openclip.clip(seed=1, vision=theirs), openclip.clip(seed=2, vision=ours)
    result, messages = load(model, own_folder(tmp_path, source, theirs))
    assert {text.split(": ")[1] for text in messages} == expected
    assert result.report.plan.unverified == ()
    far = max_diff(model.encode_image(images()).detach(), source.encode_image(images()).detach()) > 1e-5
    assert far == bool(expected)


def test_the_pooling_heads_of_coca_are_compared(tmp_path):
    source, model = openclip.coca(), openclip.coca(seed=3, vision={"attn_pooler_heads": 8})
    _, messages = load(model, own_folder(tmp_path, source, {"attentional_pool": True, "attn_pooler_heads": 4}))
    assert "heads of the image tower's attentional pooling: 4 in the source" in "\n".join(messages)


@pytest.mark.parametrize("theirs", ["mean_pooler", "cls_last_hidden_state_pooler"])
def test_the_pooling_of_a_hf_text_tower_is_compared(theirs, tmp_path):
    source = openclip.hf_text(family="xlm-roberta", pooler=theirs)
    model = openclip.hf_text(family="xlm-roberta", pooler="mean_pooler", seed=3)
    _, messages = load(model, own_folder(tmp_path, source, text={"hf_model_name": "x", "hf_pooler_type": theirs}))
    assert ("pooling of the text tower" in "\n".join(messages)) == (theirs != "mean_pooler")


def test_a_hf_text_tower_is_compared_with_its_own_configuration(tmp_path):
    peer = hf_text.model("XLMRobertaModel")
    peer.save_pretrained(tmp_path)
    options = {"towers": ("text",), "strict": False}
    _, messages = load(openclip.hf_text(family="xlm-roberta", seed=3), tmp_path, **options)
    assert messages == []
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_attention_heads": 2, "hidden_act": "relu", "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, messages = load(openclip.hf_text(family="xlm-roberta", seed=3), tmp_path, **options)
    about = {text.split(": ")[1] for text in messages}
    assert about == {
        "attention heads of the text tower",
        "activation of the text tower",
        "eps of the text tower's norms",
    }


OF_OTHERS = [
    '{"model": "ViT-B-32", "lr": 0.001}',
    "{}",
    '{"architecture": "vit_base_patch16_224", "num_classes": 0}',
    "[]",
]


@pytest.mark.parametrize("text", OF_OTHERS)
def test_a_json_of_another_model_is_ignored(text, tmp_path):
    """The config.json of a training run is not CLIP's; what it lacks has no default."""
    saved(hf.clip(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    result, messages = load(openclip.clip(), tmp_path / "model.safetensors")
    assert messages == []
    assert "activation of the image tower" in result.report.plan.unverified


def test_a_json_of_another_model_hides_no_open_clip_config(tmp_path):
    own_folder(tmp_path, openclip.clip(quick_gelu=True), quick_gelu=True)
    save_file(hf.disk_keys(hf.clip()), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text(OF_OTHERS[0])
    _, messages = load(openclip.clip(), tmp_path)
    assert "quick_gelu in the source (open_clip_config.json" in messages[0]


def test_a_metaclip2_text_tower_alone_pools_its_end_token(tmp_path):
    saved(hf.clip(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "metaclip_2_text_model"}))
    _, messages = load(openclip.clip(), tmp_path)
    assert any("pooling of the text tower: eos in the source" in text for text in messages)


def test_the_same_end_token_on_both_sides_gives_no_warning(tmp_path):
    model = openclip.clip(text={"pool_type": "eos", "eos_id": 50})
    _, messages = load(model, saved(hf.clip(eos=50), tmp_path))
    assert messages == []
    other = openclip.clip(text={"pool_type": "eos", "eos_id": 49})
    _, messages = load(other, tmp_path)
    assert [text.split(": ")[1] for text in messages] == ["end token of the text tower"]


# --- settings without a warning ---


def test_without_a_configuration_everything_is_listed_as_not_verifiable(tmp_path):
    save_file({k: v.contiguous() for k, v in openclip.clip().state_dict().items()}, tmp_path / "x.safetensors")
    result, messages = load(openclip.clip(quick_gelu=True), tmp_path / "x.safetensors")
    assert messages == []
    assert set(result.report.plan.unverified) == LABELS
    assert "not verified (settings that the weights do not show): attention heads of the image tower; " in str(result)


# --- where a configuration may be ---


def test_a_configuration_in_the_metadata_of_safetensors_is_read(tmp_path):
    peer = hf.clip()
    save_file(hf.disk_keys(peer), tmp_path / "x.safetensors", {"config": peer.config.to_json_string(use_diff=False)})
    _, messages = load(openclip.clip(quick_gelu=True), tmp_path / "x.safetensors")
    assert "(metadata config: vision_config.hidden_act = gelu)" in messages[0]


def test_a_json_with_the_name_of_the_checkpoint_is_read(tmp_path):
    peer = hf.clip()
    save_file(hf.disk_keys(peer), tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(peer.config.to_json_string(use_diff=False))
    _, messages = load(openclip.clip(quick_gelu=True), tmp_path / "mine.safetensors")
    assert "(mine.json: vision_config.hidden_act = gelu)" in messages[0]
    (tmp_path / "mine.json").write_text('{"note": "no configuration"}')
    result, messages = load(openclip.clip(quick_gelu=True), tmp_path / "mine.safetensors")
    assert messages == [] and "activation of the image tower" in result.report.plan.unverified


def test_a_json_with_the_name_of_an_npz_is_read(tmp_path):
    """big_vision has none of its own; one in OpenCLIP's form, with the file's name, is read."""
    big_vision.save(big_vision.init(), tmp_path / "siglip.npz")
    vision = {"timm_model_name": "x", "timm_pool": "map", "image_size": 28, "patch_size": 14}
    model_cfg = {"vision_cfg": vision, "text_cfg": {"heads": 8, "no_causal_mask": True, "pool_type": "last"}}
    (tmp_path / "siglip.json").write_text(json.dumps({"model_cfg": model_cfg}))
    result, messages = load(openclip.siglip(), tmp_path / "siglip.npz")
    assert any("attention heads of the text tower: 8 in the source (siglip.json" in text for text in messages)
    hints = keymap.inspect_checkpoint(tmp_path / "siglip.npz").config_hints
    assert hints["image_size"] == (28, 28) and hints["text.heads"] == 8
    assert hints["image.eps"] == 1e-6  # big_vision's code fixes it
    assert result.report.plan.unverified == (
        "attention heads of the image tower",
        "heads of the image tower's attentional pooling",
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10_000, "null", "[1]", '{"vision_config": 3}', '{"vision_config": []}']
)
def test_an_unreadable_configuration_gives_a_warning_and_the_load_goes_on(text, tmp_path):
    save_file(hf.disk_keys(hf.clip(seed=1)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    model, other = openclip.clip(), openclip.clip(seed=3)
    result, _ = load(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    keymap.load_checkpoint(other, tmp_path / "model.safetensors")
    assert all(same_bits(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    broken = text in ("", "{", "[" * 10_000)
    assert any("config.json could not be read" in note for note in result.report.plan.notes) == broken


def test_a_huge_configuration_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "x": "' + "y" * (1 << 20) + '"}')
    found = read_config(tmp_path / "model.safetensors", {}, registry().get("hf_clip"), registry().hub)
    assert set(found.facts) == {"text.causal", "image.pool"}


# --- two differences that open_clip's own loader does not report ---


def test_a_quick_gelu_checkpoint_gives_a_warning_where_the_folder_has_a_configuration(tmp_path):
    peer = hf.clip(quick_gelu=True, **SQUARE)
    model = openclip.clip(**SQUARE)
    _, messages = load(model, saved(peer, tmp_path))
    assert any("quick_gelu in the source" in text for text in messages)
    assert max_diff(model.encode_image(images()).detach(), hf.image_features(peer, images())) > 1e-3


def test_a_checkpoint_of_3_heads_in_a_model_of_6_heads_gives_a_warning(tmp_path):
    peer, model = hf.clip(), openclip.clip(vision={"head_width": 8})
    _, messages = load(model, saved(peer, tmp_path))
    assert messages[0].split(": ", 1)[1].startswith("attention heads of the image tower: 3 in the source")
    assert "6 in the model" in messages[0]


def test_plan_load_reports_the_same_warnings(tmp_path):
    plan = keymap.plan_load(openclip.clip(quick_gelu=True), saved(hf.clip(eos=2), tmp_path))
    assert len(plan.warnings) == 2
    assert plan.to_dict()["warnings"] == list(plan.warnings)
    assert np.shape(plan.to_dict()["unverified"]) == (0,)
    assert torch.is_grad_enabled()


def _folder_in_its_place(path):
    path.mkdir()


def _link_to_nothing(path):
    path.symlink_to("nowhere")


def _no_json(path):
    path.write_text("{")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (_folder_in_its_place, "it is not a regular file"),
        (_link_to_nothing, "it is a link to nothing"),
        (_no_json, "it is not valid JSON"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_where_its_settings_are_missed(make, fault, tmp_path):
    save_file(hf.disk_keys(hf.clip(seed=1)), tmp_path / "model.safetensors")
    make(tmp_path / "config.json")
    result, _ = load(openclip.clip(), tmp_path / "model.safetensors")
    assert f"config.json could not be read: {fault}" in result.report.plan.notes
    with pytest.raises(
        keymap.PlanError,
        match=rf"pass facts=\{{.*\}}, or mend the configuration \(config.json could not be read: {fault}\)",
    ):
        keymap.convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", "open_clip")
