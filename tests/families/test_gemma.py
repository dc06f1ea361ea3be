"""Gemma: folders of transformers, TensorRT-LLM and Google, rounding, parts of several devices, and its relatives."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from checks import LIMIT, assert_bits, assert_same, refused
from peers.common import max_diff
from peers.families import example, gemma
from peers.language_models import hf, written
from safetensors.torch import save_file

import keymap

PLAIN = {name: value for name, value in gemma.SIZE.items() if name not in ("query_pre_attn_scalar", "sliding_window")}
PLAIN["tie_word_embeddings"] = True
TENSORRT = {
    "architecture": "Gemma2ForCausalLM",
    "num_attention_heads": gemma.HEADS,
    "num_key_value_heads": gemma.KV_HEADS,
    "head_size": gemma.HEAD,
    "norm_epsilon": 1e-6,
    "rotary_base": 5000.0,
    "query_pre_attn_scalar": gemma.SCALE,
    "attn_logit_softcapping": gemma.ATTENTION_CAP,
    "final_logit_softcapping": gemma.FINAL_CAP,
}


def saved(state, path):
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, path)
    return path


def tensorrt(folder, state=None, **config):
    """A folder of TensorRT-LLM."""
    saved(example("gemma", "tensorrt_gemma").file if state is None else state, folder / "rank0.safetensors")
    (folder / "config.json").write_text(json.dumps({**TENSORRT, **config}), encoding="utf-8")
    return folder


# --- files as they lie on disk ---


@pytest.mark.parametrize("kind", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_a_folder_of_transformers_loads_without_a_warning(kind, tmp_path):
    source, model = gemma.gemma(kind, seed=1), gemma.gemma(kind)
    source.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        assert keymap.load_checkpoint(model, tmp_path).report.plan.format == "gemma"
    assert_bits(model, source.state_dict())


OLD = {  # what configurations on the Hub say, as older releases wrote them
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh", "rope_theta": gemma.BASES[2][1]},
    "Gemma3ForCausalLM": {"rope_local_base_freq": gemma.BASES[3][0], "rope_theta": gemma.BASES[3][1]},
}


@pytest.mark.parametrize("kind", OLD)
def test_an_old_configuration_says_the_same(kind, tmp_path):
    source, model = gemma.gemma(kind, seed=1), gemma.gemma(kind)
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **OLD[kind]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        assert "angles" not in str(keymap.load_checkpoint(model, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, **OLD[kind], "rope_theta": 10.0}))
    with pytest.warns(keymap.ConfigurationWarning, match="base of the rotary angles: 10.0"):
        keymap.load_checkpoint(model, tmp_path)


def test_a_head_of_its_own_is_loaded(tmp_path):
    source, model = (gemma.gemma(seed=seed, tie_word_embeddings=False) for seed in (1, 2))
    assert max_diff(source.lm_head.weight, source.model.embed_tokens.weight) > 0.1
    keymap.load_checkpoint(model, saved(source.state_dict(), tmp_path / "own.safetensors"))
    assert_bits(model, source.state_dict())


def test_a_head_that_repeats_the_embeddings_is_left_out_or_copied(tmp_path):
    source, base, own = gemma.gemma(seed=1), gemma.gemma("Gemma2Model"), gemma.gemma(tie_word_embeddings=False)
    state = source.state_dict()
    assert "lm_head.weight" in state and "lm_head.weight" not in written(source)
    result = keymap.load_checkpoint(base, saved(state, tmp_path / "whole.safetensors"))
    assert list(result.report.plan.dropped) == ["lm_head.weight"]
    keymap.load_checkpoint(own, saved(written(source), tmp_path / "without.safetensors"))
    assert_bits(own, state)


@pytest.mark.parametrize("name", ["gemma_pytorch", "gemma_pytorch Gemma 3"])
def test_google_s_container_is_opened(name, tmp_path):
    made = example("gemma", name)
    torch.save({"model_state_dict": dict(made.file)}, tmp_path / "model.ckpt")
    model = made.model()
    result = keymap.load_checkpoint(model, tmp_path)
    assert result.report.plan.format == "gemma_pytorch" and not result.unexpected_keys
    assert max(max_diff(theirs, ours) for theirs, ours in made.outputs(model)) <= LIMIT


def test_a_folder_of_tensorrt_is_converted_by_its_configuration(tmp_path):
    made, model = example("gemma", "tensorrt_gemma"), gemma.gemma()
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        keymap.load_checkpoint(model, tensorrt(tmp_path / "theirs"))
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "x.safetensors", "gemma")
    again = gemma.gemma(seed=5)
    keymap.load_checkpoint(again, tmp_path / "x.safetensors")
    assert_bits(again, model.state_dict())
    back = keymap.convert_state_dict(again.state_dict(), "tensorrt_gemma", facts=gemma.FACTS)
    assert_same(back, made.file)
    with pytest.warns(keymap.ConfigurationWarning, match="cap of the logits: 30"):
        keymap.load_checkpoint(gemma.gemma(), tensorrt(tmp_path / "other", final_logit_softcapping=30.0))


# --- rounding ---


def test_norms_are_rounded_as_by_tensorrt_s_converter_and_its_files_come_back(tmp_path):
    """In bfloat16 1 + weight keeps few bits of a small weight; the converter adds in float32."""
    model = gemma.gemma(seed=3).bfloat16()
    written = keymap.convert_state_dict(model.state_dict(), "tensorrt_gemma", facts=gemma.FACTS)
    weight = model.model.layers[1].pre_feedforward_layernorm.weight
    theirs = (weight.detach().float() + 1).bfloat16()
    assert torch.equal(written["transformer.layers.1.pre_feedforward_layernorm.weight"], theirs)
    again = gemma.gemma(seed=4).bfloat16()
    keymap.load_checkpoint(again, saved(written, tmp_path / "rank0.safetensors"))
    assert_same(keymap.convert_state_dict(again.state_dict(), "tensorrt_gemma", facts=gemma.FACTS), written)
    assert max_diff(again.model.layers[1].pre_feedforward_layernorm.weight, weight) <= 2**-8 * 4


def test_a_file_of_maxtext_is_read_by_the_scale_of_the_queries_in_the_model(tmp_path):
    """Of Gemma 2 27B query_pre_attn_scalar is not head_dim."""
    made = example("gemma", "maxtext_gemma2")
    path = saved(made.file, tmp_path / "maxtext.safetensors")
    models = [gemma.gemma(query_pre_attn_scalar=scale) for scale in (gemma.SCALE, 4 * gemma.SCALE)]
    outputs = []
    for model in models:
        keymap.load_checkpoint(model, path)
        ((theirs, ours),) = made.outputs(model)
        outputs.append(max_diff(theirs, ours))
    assert max(outputs) <= LIMIT  # the rule makes up for the model's own factor
    one, two = (model.model.layers[0].self_attn.q_proj.weight for model in models)
    torch.testing.assert_close(2 * one, two)
    with pytest.raises(keymap.PlanError, match=r"pass facts=\{'text.query_scale': ..., 'text.vocab': ...\}"):
        keymap.convert_checkpoint(path, tmp_path / "x.safetensors", "gemma")


# --- what is refused ---


def cut_for_two_devices(state):
    """The part of the first of two devices."""
    found = {}
    for key, value in state.items():
        if key.endswith("qkv.weight"):
            value = torch.cat([part.chunk(2)[0] for part in value.split([60, 20, 20])])
        elif key.endswith(("mlp.fc.weight", "mlp.gate.weight", "embedding.weight", "lm_head.weight")):
            value = value[: len(value) // 2]
        elif key.endswith(("dense.weight", "proj.weight")):
            value = value.chunk(2, 1)[0]
        found[key] = value
    return found


def test_the_part_of_one_of_several_devices_is_refused(tmp_path):
    part = cut_for_two_devices(example("gemma", "tensorrt_gemma").file)
    folder = tensorrt(tmp_path / "first", part)
    refused(gemma.gemma(), folder / "rank0.safetensors", "transformer.layers.0.attention.dense.weight")
    with pytest.raises(keymap.PlanError, match="cannot be written as gemma") as caught:
        keymap.convert_checkpoint(folder / "rank0.safetensors", tmp_path / "x.safetensors", "gemma")
    assert any("dense.weight [48, 30]" in fault for fault in caught.value.faults)
    saved(part, folder / "rank1.safetensors")
    refused(gemma.gemma(), folder, "in the parts of several devices", error=keymap.CheckpointError)


@pytest.mark.parametrize(
    ("name", "key", "why"),
    [
        ("tensorrt_gemma", "transformer.layers.2.attention.dense.per_channel_scale", "TensorRT-LLM has quantized"),
        ("tensorrt_gemma", "transformer.layers.0.mlp.fc.weights_scaling_factor", "TensorRT-LLM has quantized"),
        ("tensorrt_gemma", "transformer.layers.0.attention.qkv.prequant_scaling_factor", "TensorRT-LLM has quantized"),
        ("tensorrt_gemma", "transformer.vocab_embedding.per_token_scale", "TensorRT-LLM has quantized"),
        ("gemma_pytorch", "model.layers.0.self_attn.qkv_proj.weight_scaler", "quantized, with separate scales"),
    ],
)
def test_quantized_weights_are_refused(name, key, why, tmp_path):
    torch.save(dict(example("gemma", name).file) | {key: torch.rand(4)}, tmp_path / "quantized.pt")
    refused(gemma.gemma(), tmp_path / "quantized.pt", why, error=keymap.DetectionError)


def test_a_scale_of_the_cache_is_no_weight(tmp_path):
    made = example("gemma", "tensorrt_gemma")
    key = "transformer.layers.0.attention.kv_cache_scaling_factor"
    model = made.model()
    result = keymap.load_checkpoint(model, saved({**made.file, key: torch.ones(1)}, tmp_path / "rank0.safetensors"))
    assert list(result.report.plan.dropped) == [key]
    assert max(max_diff(theirs, ours) for theirs, ours in made.outputs(model)) <= LIMIT


RELATIVES = {
    "Llama": lambda: hf("LlamaForCausalLM", 1, **PLAIN),
    "Qwen3": lambda: hf("Qwen3ForCausalLM", 1, **PLAIN),
    "Gemma 1": lambda: hf("GemmaForCausalLM", 1, **PLAIN),
    "Gemma 2": lambda: gemma.gemma(seed=1),
    "Gemma 3": lambda: gemma.gemma("Gemma3ForCausalLM", seed=1),
}


@pytest.mark.parametrize("model", RELATIVES)
@pytest.mark.parametrize("source", RELATIVES)
def test_only_llama_and_gemma_1_have_the_same_names(source, model, tmp_path):
    path = saved(written(RELATIVES[source]()), tmp_path / "theirs.safetensors")
    if source == model or {source, model} == {"Llama", "Gemma 1"}:  # without a configuration, which tells the kind
        keymap.load_checkpoint(RELATIVES[model](), path)
    else:
        refused(RELATIVES[model](), path, error=keymap.KeymapError)


def test_the_model_with_images_is_no_model_of_the_hub(tmp_path):
    file = dict(example("gemma", "gemma_pytorch Gemma 3").file)
    file["text_token_embedder.weight"] = file.pop("embedder.weight")
    torch.save({"model_state_dict": file}, tmp_path / "model.ckpt")
    refused(gemma.gemma("Gemma3ForCausalLM"), tmp_path / "model.ckpt", error=keymap.KeymapError)
