"""allow_missing and allow_unexpected forgive what they name and nothing else; refusals suggest them where they help."""

from __future__ import annotations

import re

import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file
from torch import nn

import keymap


def state(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def written(tensors, tmp_path, name="x.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name)
    return tmp_path / name


def refused(model, path, *words, **options):
    before = bits(model)
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert [word for word in words if word not in message] == [], message
    return message


def without(tensors, *patterns):
    return {key: value for key, value in tensors.items() if not any(re.search(pattern, key) for pattern in patterns)}


CASES = {  # what the file lacks, and what forgives it
    "a projection": (openclip.clip, ["^text_projection$"], ("text_projection",)),
    "both projections": (openclip.clip, ["^text_projection$", r"visual\.proj$"], ("*proj*",)),
    "the scale": (openclip.custom, ["^logit_scale$"], "logit_scale"),
    "an attention pool": (openclip.siglip, [r"attn_pool"], ("visual.trunk.attn_pool.*",)),
    "a head with bias": (openclip.siglip, [r"text_projection"], ["text.text_projection.*"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_allowed_to_be_missing_stays_and_is_listed(name, tmp_path):
    build, lacking, allowed = CASES[name]
    source, model = build(seed=1), build(seed=2)
    before = bits(model)
    path = written(without(state(source), *lacking), tmp_path)
    refused(model, path)
    result = keymap.load_checkpoint(model, path, allow_missing=allowed)
    gone = [key for key in state(source) if key not in without(state(source), *lacking)]
    assert sorted(result.missing_keys) == sorted(gone)
    for key, value in model.state_dict().items():
        assert same_bits(value, before[key] if key in gone else source.state_dict()[key]), key
    assert f"missing: {len(gone)} key" in str(result)


@pytest.mark.parametrize("allowed", [("text_projection",), ("visual.*",), "ln_final.*"])
def test_nothing_else_is_forgiven(allowed, tmp_path):
    lacking = without(state(openclip.clip(seed=1)), "^text_projection$", r"ln_1\.weight$")
    refused(openclip.clip(seed=2), written(lacking, tmp_path), "ln_1.weight", allow_missing=allowed)


def test_a_text_encoder_without_projection_loads_strictly_otherwise(tmp_path):
    peer = hf.disk_keys(hf.clip(seed=1, tower="text"))
    path = written(peer, tmp_path)
    model = openclip.clip(seed=2)
    message = refused(model, path, towers=("text",))
    assert "allow_missing=('text_projection',)" in message
    result = keymap.load_checkpoint(model, path, towers=("text",), allow_missing=("text_projection",))
    assert result.missing_keys == ["text_projection"]
    broken = without(peer, r"layers\.1\.mlp\.fc2\.bias")
    refused(model, written(broken, tmp_path), "fc2", towers=("text",), allow_missing=("text_projection",))


@pytest.mark.parametrize("name", ["classifier.*", "module.classifier.*", ("classifier.weight", "classifier.bias")])
def test_what_is_allowed_to_be_unexpected_is_left_out_and_listed(name, tmp_path):
    source, model = state(openclip.clip(seed=1)), openclip.clip(seed=2)
    head = {"classifier.weight": torch.randn(5, 24), "classifier.bias": torch.randn(5)}
    path = written({f"module.{key}": value for key, value in (source | head).items()}, tmp_path)
    message = refused(model, path, "classifier.weight")
    assert "allow_unexpected=('classifier.*',)" in message
    result = keymap.load_checkpoint(model, path, allow_unexpected=name)
    assert sorted(result.unexpected_keys) == ["classifier.bias", "classifier.weight"]
    assert all(same_bits(value, source[key]) for key, value in model.state_dict().items())


def test_the_suggested_arguments_work(tmp_path):
    """Every refusal that suggests allow_missing= or allow_unexpected= is right."""
    source = openclip.siglip(seed=1)
    for lacking, more in (([r"attn_pool"], {}), (["logit_scale"], {"probe.weight": torch.randn(3, 48)})):
        path = written(without(state(source), *lacking) | more, tmp_path)
        model = openclip.siglip(seed=2)
        message = refused(model, path)
        found = re.findall(r"(allow_\w+)=(\([^)]*\))", message)
        assert found, message
        keymap.load_checkpoint(model, path, **{name: eval(value) for name, value in found})


def test_a_pattern_that_matches_no_key_of_the_model_is_refused_with_near_names(tmp_path):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    message = refused(openclip.clip(seed=2), path, allow_missing=("text_projektion",))
    assert "did you mean text_projection" in message


@pytest.mark.parametrize("value", [3, [3], ("",), {"a": 1}])
@pytest.mark.parametrize("name", ["allow_missing", "allow_unexpected"])
def test_other_than_patterns_is_refused(name, value, tmp_path):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    refused(openclip.clip(seed=2), path, name, **{name: value})


def test_a_plan_takes_the_same_arguments(tmp_path):
    path = written(without(state(openclip.clip(seed=1)), "^text_projection$"), tmp_path)
    plan = keymap.plan_load(openclip.clip(seed=2), path, allow_missing="text_projection")
    assert plan.missing_keys == ("text_projection",)


# --- what strict=False is advised for ---


def test_strict_false_is_not_advised_where_the_body_of_a_tower_would_not_be_whole(tmp_path):
    lacking = without(state(openclip.clip(seed=1)), r"resblocks\.1\.")
    assert "strict=False" not in refused(openclip.clip(seed=2), written(lacking, tmp_path))


def test_keys_that_pair_by_shape_and_name_are_named_together(tmp_path):
    tensors = state(openclip.clip(seed=1))
    tensors["visual.ln_post.weigth"] = tensors.pop("visual.ln_post.weight")
    message = refused(openclip.clip(seed=2), written(tensors, tmp_path), "'visual.ln_post.weigth'", "rename it")
    assert "strict=False" not in message and "allow_" not in message


# --- own names ---


class Extended(nn.Module):
    """A model of a user: OpenCLIP's CLIP with a head and an adapter."""

    def __new__(cls, seed):
        model = openclip.clip(seed=seed)
        torch.manual_seed(seed)
        model.probe = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8))
        model.adapters = nn.ModuleDict({"audio": nn.Conv1d(3, 4, 5)})
        return model


def test_heads_and_new_towers_load_under_their_own_names(tmp_path):
    source, model = Extended(seed=1), Extended(seed=2)
    result = keymap.load_checkpoint(model, written(state(source), tmp_path))
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert "loaded under the model's own names: " in str(result)
    hidden = hf.disk_keys(hf.clip(seed=3)) | {
        k: v for k, v in state(source).items() if k.startswith(("probe", "adapters"))
    }
    keymap.load_checkpoint(model, written(hidden, tmp_path))
    assert same_bits(model.probe[0].weight, source.probe[0].weight)


def test_a_head_that_the_file_lacks_or_has_in_another_shape_is_refused(tmp_path):
    source = state(Extended(seed=1))
    refused(Extended(seed=2), written(without(source, r"probe\.0\.bias"), tmp_path), "probe.0.bias")
    source["probe.0.bias"] = torch.randn(9)
    refused(Extended(seed=2), written(source, tmp_path), "probe.0.bias")


LIES_BESIDE = {  # the prefixes of both towers, of the scale and of the heads; "" for keys as they are
    "the model below a prefix": (openclip.clip, "model.", "model.", "model.", ""),
    "transformers' names below two prefixes": (hf.clip, "model.clip.", "model.clip.", "model.clip.", "model."),
    "a prefix for each tower": (hf.clip, "image_encoder.", "text_encoder.", "", ""),
}


@pytest.mark.parametrize("name", LIES_BESIDE)
def test_heads_beside_the_prefixes_of_the_towers_load(name, tmp_path):
    build, image, text, scale, heads = LIES_BESIDE[name]
    towers = state(build(seed=1)) if build is openclip.clip else hf.disk_keys(hf.clip(seed=1))
    own = {key: value for key, value in state(Extended(seed=1)).items() if key.startswith(("probe", "adapters"))}
    prefixes = {"vis": image, "logit": scale}
    file = {next((p for s, p in prefixes.items() if key.startswith(s)), text) + key: v for key, v in towers.items()}
    model = Extended(seed=2)
    result = keymap.load_checkpoint(model, written(file | {heads + k: v for k, v in own.items()}, tmp_path))
    assert all(same_bits(model.state_dict()[key], value) for key, value in own.items())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    message = refused(Extended(seed=3), written(file, tmp_path), "probe.0.weight")
    keymap.load_checkpoint(model, written(file, tmp_path), **advised(message))


def advised(message):
    """The arguments that a refusal suggests."""
    return {name: eval(value) for name, value in re.findall(r"(allow_\w+)=(\([^()]*\))", message)}


@pytest.mark.parametrize("name", ["resnet18", "skresnet18", "regnety_002", "mixer_s32_224", "vit_tiny_patch16_224"])
def test_a_trunk_that_was_saved_alone_loads_by_its_names(name, tmp_path):
    timm = pytest.importorskip("timm")
    with_classifier = timm.create_model(name, num_classes=3)
    for parameter in with_classifier.parameters():
        nn.init.normal_(parameter)
    model = openclip.custom(seed=2)
    model.visual = nn.Module()
    model.visual.trunk = timm.create_model(name, num_classes=0)
    body = {key: with_classifier.state_dict()[key] for key in model.visual.trunk.state_dict()}
    path = written(state(with_classifier), tmp_path)
    refused(model, path, "load with towers=('image',)")
    try:
        keymap.load_checkpoint(model, path, towers=("image",))
    except keymap.PlanError as error:  # the classifier may be a projection
        keymap.load_checkpoint(model, path, towers=("image",), **advised(str(error)))
    assert all(same_bits(value, body[key]) for key, value in model.visual.trunk.state_dict().items())
    refused(model, written(without(body, r"\.weight$"), tmp_path), towers=("image",))


INSIDE = {  # weights of the body of a tower, which CLIP does not have
    "a block more": "visual.transformer.resblocks.2.ln_1.weight",
    "register tokens": "visual.register_tokens",
    "a layer scale": "visual.transformer.resblocks.0.ls_1.gamma",
    "a layer of another model": "transformer.resblocks.0.message_fc.weight",
}


@pytest.mark.parametrize("name", INSIDE)
def test_no_weight_of_a_tower_is_suggested_to_be_left_out(name, tmp_path):
    tensors = state(openclip.clip(seed=1)) | {INSIDE[name]: torch.ones(4), "classifier.weight": torch.ones(2, 2)}
    message = refused(openclip.clip(seed=2), written(tensors, tmp_path), INSIDE[name], "lie in a tower")
    assert "allow_unexpected" not in message and "strict=False" not in message


@pytest.mark.parametrize("key", ["heads[0].weight", "what?.weight", "a*b"])
def test_a_suggested_pattern_is_the_key_itself(key, tmp_path):
    tensors = state(openclip.clip(seed=1)) | {key: torch.ones(4)}
    path = written(tensors, tmp_path)
    result = keymap.load_checkpoint(openclip.clip(seed=2), path, **advised(refused(openclip.clip(seed=2), path)))
    assert result.unexpected_keys == [key]


def test_a_model_that_is_no_clip_lacks_no_key_for_its_name(tmp_path):
    """The hub says of `attn_mask` that CLIP computes it; another model may have learned it."""

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        model.register_buffer("attn_mask", torch.randn(3, 3))
        return model

    refused(build(2), written(without(state(build(1)), "attn_mask"), tmp_path), "attn_mask")
    message = refused(build(2), written(state(build(1)) | {"0.weight": torch.ones(7, 5)}, tmp_path), "[7, 5]", "[4, 5]")
    assert "missing" not in message and "unexpected" not in message


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_model_that_is_no_clip_loads_its_own_file(prefix, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(7, 5), nn.LSTM(5, 4), nn.BatchNorm1d(4))

    source, model = build(1), build(2)
    path = written({prefix + key: value for key, value in state(source).items()}, tmp_path)
    result = keymap.load_checkpoint(model, path)
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert result.report.plan.format == "own"
    refused(build(3), written(without(state(source), "bias_hh"), tmp_path), "1.bias_hh_l0")


# --- results ---


def test_a_result_unpacks_to_the_two_lists(tmp_path):
    tensors = without(state(openclip.clip(seed=1)), "logit_scale") | {"x.y": torch.ones(2)}
    result = keymap.load_checkpoint(openclip.clip(seed=2), written(tensors, tmp_path), strict=False)
    missing, unexpected = result
    assert (missing, unexpected) == (["logit_scale"], ["x.y"]) == (result.missing_keys, result.unexpected_keys)
    assert (result["missing_keys"], dict(result)["unexpected_keys"]) == (missing, unexpected)


def test_a_repr_fits_a_screen(tmp_path):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    plan = keymap.plan_load(openclip.clip(), path)
    for value in (plan, keymap.inspect_checkpoint(path), keymap.load_checkpoint(openclip.clip(), path).report):
        assert len(repr(value)) < 400 and "\n" not in repr(value)


def test_an_unknown_key_to_explain_is_an_error_with_near_names(tmp_path):
    plan = keymap.plan_load(openclip.clip(), written(state(openclip.clip(seed=1)), tmp_path))
    with pytest.raises(keymap.PlanError, match=r"did you mean .*visual\.ln_post\.weight"):
        plan.explain("visual.ln_post.weigth")


def test_a_model_of_transformers_as_the_target_is_named(tmp_path):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    refused(hf.clip(), path, "those of hf_clip", "convert_state_dict(state_dict, to='hf_clip')")


def test_a_state_dict_as_the_path_is_one_line():
    with pytest.raises(keymap.CheckpointError) as caught:
        keymap.load_checkpoint(openclip.clip(), openclip.clip().state_dict())
    assert len(str(caught.value)) < 200 and "a dict of" in str(caught.value)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_head_with_weight_normalisation_loads_beside_transformers_keys(norm, tmp_path):
    def build(seed):
        model = openclip.clip(seed=seed)
        torch.manual_seed(seed)
        model.last = norm(nn.Linear(24, 7))
        return model

    source, model = build(1), build(2)
    head = {key: value for key, value in state(source).items() if key.startswith("last.")}
    assert len(head) == 3
    result = keymap.load_checkpoint(model, written(hf.disk_keys(hf.clip(seed=3)) | head, tmp_path))
    assert all(same_bits(model.state_dict()[key], value) for key, value in head.items())
    assert (result.missing_keys, result.unexpected_keys) == ([], []) and "computed" not in str(result)
