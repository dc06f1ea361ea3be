"""Values that a join, a cast, tied weights or a hook could spoil silently."""

from __future__ import annotations

import copy

import pytest
import torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits, max_diff, same_bits
from safetensors.torch import save_file

import keymap


def saved(path, tensors):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    return path


Q, K = (f"vision_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qk")
JOINED = "visual.transformer.resblocks.0.attn.in_proj_weight"


@pytest.mark.parametrize("assign", [False, True])
def test_members_of_unlike_precision_join_without_loss(assign, tmp_path):
    state = hf.disk_keys(hf.clip())
    state[Q] = state[Q].half()
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, saved(tmp_path / "x.safetensors", state), assign=assign)
    assert same_bits(model.state_dict()[JOINED][48:96].contiguous(), state[K])
    assert same_bits(model.state_dict()[JOINED][:48].contiguous(), state[Q].float())
    assert result.report.plan.cast == {"float16 to float32": 1}
    assert keymap.convert_state_dict(state, "open_clip_flat")[JOINED].dtype == torch.float32


def test_an_integer_member_of_a_join_is_refused(tmp_path):
    state = hf.disk_keys(hf.clip())
    state[K] = state[K].long()
    model = openclip.clip(seed=5)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="members have unlike dtypes"):
        keymap.load_checkpoint(model, saved(tmp_path / "x.safetensors", state))
    assert_unchanged(model, before)


def test_a_name_that_no_model_has_is_not_written():
    state = openclip.clip_trunk(head_bias=True).state_dict()
    with pytest.raises(keymap.VerifyError, match=r"visual\.proj_bias"):
        keymap.convert_state_dict(state, "openai")


@pytest.mark.parametrize("key", ["visual.ln_post.weight", "transformer.resblocks.1.mlp.c_fc.bias"])
def test_an_incomplete_state_dict_does_not_convert(key):
    state = dict(openclip.clip().state_dict())
    del state[key]
    with pytest.raises(keymap.PlanError, match=key):
        keymap.convert_state_dict(state, "openai")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_get_equal_values_or_none(device, tmp_path):
    path = saved(tmp_path / "x.safetensors", openclip.clip(seed=1).state_dict())
    model = openclip.clip(seed=2).to(device)
    model.visual.ln_post.weight = model.visual.ln_pre.weight
    with pytest.raises(keymap.VerifyError, match=r"are one tensor of the model"):
        keymap.load_checkpoint(model, path, assign=device == "meta")


def test_a_model_whose_state_dict_is_a_copy_is_refused(tmp_path):
    path = saved(tmp_path / "x.safetensors", openclip.clip(seed=1).state_dict())
    model = openclip.clip(seed=2)
    model._register_state_dict_hook(lambda module, state, *rest: type(state)((k, v.clone()) for k, v in state.items()))
    with pytest.raises(keymap.PlanError, match="returns copies instead of the model's own tensors"):
        keymap.load_checkpoint(model, path)


def test_a_state_dict_with_another_one_in_it_is_a_state_dict_first(tmp_path):
    raw, ema = openclip.clip(seed=1), openclip.clip(seed=2)
    torch.save({**raw.state_dict(), "ema": ema.state_dict()}, tmp_path / "run.pt")
    model = openclip.clip(seed=3)
    result = keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert same_bits(model.visual.proj, raw.visual.proj)
    assert result.report.plan.other_wrappers == ("ema",)


def test_strict_holds_within_the_towers_named(tmp_path):
    state = hf.disk_keys(hf.clip())
    del state["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    state["text_model.foreign"] = torch.ones(3)
    path = saved(tmp_path / "x.safetensors", state)
    model = openclip.clip(seed=5)
    keymap.load_checkpoint(model, path, towers=("image",))
    with pytest.raises(keymap.PlanError, match="foreign"):
        keymap.load_checkpoint(model, path, towers=("text",))
    state["vision_model.foreign"] = torch.ones(3)
    with pytest.raises(keymap.PlanError, match=r"vision_model\.foreign"):
        keymap.load_checkpoint(model, saved(tmp_path / "y.safetensors", state), towers=("image",))


def test_an_index_of_a_thousand_digits_is_no_index(tmp_path):
    state = {
        "stem.conv1.conv.weight": torch.ones(2),
        "stages.0.0.conv1_1x1.conv.weight": torch.ones(2),
        "stages." + "9" * 1000 + ".0.conv1_1x1.conv.weight": torch.ones(2),
    }
    path = saved(tmp_path / "x.safetensors", state)
    with pytest.raises(keymap.KeymapError):
        keymap.load_checkpoint(openclip.resnet(), path)
    keymap.inspect_checkpoint(path)


def test_a_meta_model_is_left_with_no_tensor_on_meta(tmp_path):
    state = dict(openclip.clip(seed=1).state_dict())
    del state["text_projection"]
    path = saved(tmp_path / "x.safetensors", state)
    with pytest.raises(keymap.PlanError, match="text_projection"):
        keymap.load_checkpoint(openclip.clip().to("meta"), path, strict=False, assign=True)


def test_an_assigned_model_computes_and_trains(tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2).to("meta")
    path = saved(tmp_path / "x.safetensors", source.state_dict())
    keymap.load_checkpoint(model, path, assign=True)
    image, text = torch.randn(2, 3, 28, 28), torch.randint(3, 98, (2, 16))
    with torch.no_grad():
        assert max_diff(model.encode_image(image), source.encode_image(image)) == 0
        assert max_diff(model.encode_text(text), source.encode_text(text)) == 0
    model.encode_image(image).sum().backward()
    assert model.visual.proj.grad is not None


ODD = {
    "no model": lambda path: keymap.load_checkpoint(None, path),
    "a state dict for a model": lambda path: keymap.load_checkpoint(openclip.clip().state_dict(), path),
    "no path": lambda path: keymap.load_checkpoint(openclip.clip(), None),
    "a number for a mapping": lambda path: keymap.load_checkpoint(openclip.clip(), path, mapping=3),
    "a number for a wrapper": lambda path: keymap.load_checkpoint(openclip.clip(), path, wrapper=5),
    "facts that are a list": lambda path: keymap.load_checkpoint(openclip.clip(), path, facts=[1]),
    "a fact that is text": lambda path: keymap.load_checkpoint(openclip.clip(), path, facts={"image.heads": "12"}),
    "nothing to convert": lambda path: keymap.convert_state_dict(None, "open_clip"),
    "no target format": lambda path: keymap.convert_state_dict({"a": torch.ones(1)}, None),
}


@pytest.mark.parametrize("name", ODD)
def test_an_argument_of_the_wrong_type_is_refused(name, tmp_path):
    path = saved(tmp_path / "x.safetensors", openclip.clip(seed=1).state_dict())
    with pytest.raises(keymap.KeymapError):
        ODD[name](path)


def test_a_load_may_be_repeated(tmp_path):
    path = saved(tmp_path / "x.safetensors", hf.disk_keys(hf.clip()))
    model = openclip.clip(seed=2)
    keymap.load_checkpoint(model, path)
    once = copy.deepcopy(model.state_dict())
    keymap.load_checkpoint(model, path)
    assert all(same_bits(v, model.state_dict()[k]) for k, v in once.items())


def test_a_text_tower_of_transformers_saved_alone_is_read(tmp_path):
    source, model = openclip.hf_text(seed=1), openclip.hf_text(seed=2)
    keymap.load_checkpoint(model, saved(tmp_path / "x.safetensors", source.text.state_dict()), towers="text")
    assert all(same_bits(v, model.text.state_dict()[k]) for k, v in source.text.state_dict().items())


def test_a_tie_that_the_file_breaks_keeps_the_first_and_is_reported_as_it_is(tmp_path):
    source = openclip.clip(seed=1).state_dict()
    torch.save(source, tmp_path / "clip.pt")
    model = openclip.clip(seed=2)
    model.visual.ln_pre.weight = model.visual.ln_post.weight
    with pytest.raises(keymap.VerifyError, match="are one tensor of the model"):
        keymap.load_checkpoint(model, tmp_path / "clip.pt")
    result = keymap.load_checkpoint(model, tmp_path / "clip.pt", strict=False)
    lost = [k for k in ("visual.ln_pre.weight", "visual.ln_post.weight") if k in result.unexpected_keys]
    assert len(lost) == 1
    held = ({"visual.ln_pre.weight", "visual.ln_post.weight"} - set(lost)).pop()
    assert same_bits(model.visual.ln_pre.weight.detach(), source[held])
    assert lost[0] not in [entry.key for entry in result.report.plan.entries]
