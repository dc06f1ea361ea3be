"""A source whose blocks lack what others have, or whose shapes contradict each other, is not converted."""

import json

import pytest
import torch
from peers import hf, openclip
from safetensors.torch import load_file, save_file

import keymap


def lacking(state, *words):
    return {key: value for key, value in state.items() if not any(word in key for word in words)}


@pytest.mark.parametrize("to", ["open_clip", "open_clip_flat"])
def test_a_missing_bias_is_refused_where_the_source_is_the_hub(to):
    state = lacking(openclip.clip().state_dict(), "transformer.resblocks.1.mlp.c_fc.bias")
    with pytest.raises(keymap.PlanError, match=r"resblocks.1.mlp.c_fc.bias"):
        keymap.convert_state_dict(state, to)


def test_blocks_of_a_model_that_no_hub_knows_may_differ(tmp_path):
    rules = "format: own\nhub: any\ntitle: t\ntowers:\n  model:\n    (.+): \\1\n"
    (tmp_path / "own.yaml").write_text(rules, encoding="utf-8")
    state = {f"layers.{n}.{name}.weight": torch.ones(2, 2) for n in range(4) for name in ("attn", "mlp")}
    del state["layers.2.mlp.weight"]
    assert keymap.convert_state_dict(state, to=tmp_path / "own.yaml").keys() == state.keys()


def test_a_missing_layer_is_refused():
    state = openclip.clip().state_dict()
    gap = {key: value for key, value in state.items() if not key.startswith("transformer.resblocks.1.")}
    with pytest.raises(keymap.PlanError, match=r"transformer\.resblocks\.1\.attn"):
        keymap.convert_state_dict(gap, "open_clip")


def test_a_bias_of_another_length_than_its_weight_is_refused():
    state = {**openclip.clip().state_dict(), "visual.ln_post.bias": torch.ones(47)}
    with pytest.raises(keymap.PlanError, match=r"visual\.ln_post\.bias has shape \[47\]"):
        keymap.convert_state_dict(state, "open_clip")


def test_fewer_layers_than_the_configuration_states_are_refused(tmp_path):
    hf.clip().save_pretrained(tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["text_config"]["num_hidden_layers"]
    state = lacking(load_file(tmp_path / "model.safetensors"), f"text_model.encoder.layers.{layers - 1}.")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(keymap.PlanError, match=rf"num_hidden_layers = {layers}, and the file has {layers - 1}"):
        keymap.convert_checkpoint(tmp_path, tmp_path / "out.pt", "open_clip")
