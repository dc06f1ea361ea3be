"""Files of language models as they lie on disk: folders, old buffers, files without a head; models that refuse."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
import transformers
from checks import assert_bits, refused
from peers.common import randomised
from peers.families import example, gemma, gpt2, llama, mixture_of_experts
from peers.language_models import written
from safetensors.torch import load_file, save_file

import keymap
from keymap.source.registry import hubs

PARAMS = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 5000.0}


def saved(state, path):
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, path)
    return path


@pytest.fixture
def meta(tmp_path):
    """A folder as Meta publishes it."""
    folder = tmp_path / "Llama"
    folder.mkdir()
    torch.save(dict(example("llama", "meta_llama").file), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS), encoding="utf-8")
    return folder


# --- which hub a model has ---

MODELS = {
    "LlamaForCausalLM": (llama.llama, ("llama",)),
    "LlamaModel": (llama.llama, ("llama",)),
    "MistralForCausalLM": (llama.llama, ("llama",)),
    "Qwen2ForCausalLM": (llama.llama, ("llama",)),
    "Qwen3ForCausalLM": (llama.llama, ("llama",)),
    "GemmaForCausalLM": (llama.llama, ("llama",)),
    "Gemma2ForCausalLM": (gemma.gemma, ("gemma",)),
    "Gemma2Model": (gemma.gemma, ("gemma",)),
    "Gemma3ForCausalLM": (gemma.gemma, ("gemma",)),
    "Gemma3TextModel": (gemma.gemma, ("gemma",)),
    "VaultGemmaForCausalLM": (llama.llama, ()),  # it has no norms after a part of a layer
    "Phi3ForCausalLM": (llama.llama, ()),
    "GPT2LMHeadModel": (gpt2.gpt2, ("gpt2",)),
    "GPT2Model": (gpt2.gpt2, ("gpt2",)),
    "MixtralModel": (mixture_of_experts.moe, ("mixture_of_experts",)),
    "GptOssForCausalLM": (mixture_of_experts.moe, ()),  # its experts have biases, and gate and up in turn
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_language_model_has_one_hub_or_none(kind):
    make, claiming = MODELS[kind]
    assert hubs().claiming(make(kind).state_dict()) == claiming


# --- with a head and without ---

BASES = {
    "llama": (llama.llama, "LlamaForCausalLM", "LlamaModel", "model."),
    "gpt2": (gpt2.gpt2, "GPT2LMHeadModel", "GPT2Model", "transformer."),
    "gemma": (gemma.gemma, "Gemma3ForCausalLM", "Gemma3TextModel", "model."),
    "mixture_of_experts": (mixture_of_experts.moe, "MixtralForCausalLM", "MixtralModel", "model."),
}


@pytest.mark.parametrize("hub", BASES)
def test_a_file_without_a_head_loads_into_a_model_with_a_tied_head_and_back(hub, tmp_path):
    make, whole, base, prefix = BASES[hub]
    source, model = make(base, seed=1), make(whole, tie_word_embeddings=True)
    keymap.load_checkpoint(model, saved(written(source), tmp_path / "base.safetensors"))
    own = {prefix + key: value for key, value in source.state_dict().items()}
    embedding = next(value for key, value in own.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
    assert_bits(model, {**own, "lm_head.weight": embedding})
    again = make(base, seed=2)
    keymap.load_checkpoint(again, saved(written(model), tmp_path / "whole.safetensors"))
    assert_bits(again, source.state_dict())


@pytest.mark.parametrize("hub", [hub for hub in BASES if hub != "gemma"])  # in its hub the head is the embeddings
def test_a_model_with_a_head_of_its_own_refuses_a_file_without_one(hub, tmp_path):
    make, whole, base, _ = BASES[hub]
    path = saved(written(make(base, seed=1)), tmp_path / "base.safetensors")
    refused(make(whole, tie_word_embeddings=False), path, "lm_head.weight")
    path = saved(make(whole, seed=1, tie_word_embeddings=False).state_dict(), tmp_path / "whole.safetensors")
    refused(make(base), path, "lm_head.weight")


# --- old files ---


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_an_old_file_of_gpt2_has_masks_and_no_head(prefix, tmp_path):
    source, model = gpt2.gpt2(seed=1), gpt2.gpt2()
    file = {key.replace("transformer.", prefix): value for key, value in source.state_dict().items()}
    del file["lm_head.weight"]
    for layer in range(gpt2.LAYERS):
        file[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        file[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    result = keymap.load_checkpoint(model, saved(file, tmp_path / "pytorch_model.safetensors"))
    assert (result.report.plan.format, len(result.report.plan.dropped)) == ("gpt2", 2 * gpt2.LAYERS)
    assert_bits(model, source.state_dict())


@pytest.mark.parametrize("form", ["llama", "phi3", "mixtral"])
def test_an_old_file_has_rotary_frequencies(form, tmp_path):
    if form == "llama":
        source, make = llama.llama(seed=1), llama.maker()
        file, expected = dict(source.state_dict()), source.state_dict()
    else:
        made = example("llama" if form == "phi3" else "mixture_of_experts", form)
        file, make = dict(made.file), made.model
        plain = make()
        keymap.load_checkpoint(plain, saved(file, tmp_path / "plain.safetensors"))
        expected = plain.state_dict()
    file |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(3)}
    model = make()
    result = keymap.load_checkpoint(model, saved(file, tmp_path / "old.safetensors"))
    assert (result.report.plan.format, len(result.report.plan.dropped)) == (form, 3)
    assert_bits(model, expected)


# --- Meta's folder ---


def test_a_folder_of_meta_states_its_heads(meta, tmp_path):
    result = keymap.load_checkpoint(llama.llama(), meta)
    assert result.report.plan.unverified == () and result.report.plan.warnings == ()
    keymap.convert_checkpoint(meta, tmp_path / "back.safetensors", to="llama")  # without a model, and without facts=
    again, model = llama.llama(seed=3), llama.llama()
    keymap.load_checkpoint(again, tmp_path / "back.safetensors")
    keymap.load_checkpoint(model, meta)
    assert_bits(again, model.state_dict())


def test_a_model_of_other_heads_and_equal_shapes_refuses_the_folder(meta):
    model = llama.llama(num_attention_heads=12, num_key_value_heads=4)
    refused(model, meta, "text.heads: 6 in the source (params.json: n_heads = 6), 12 in the model", "text.kv_heads: 2")


@pytest.mark.parametrize(
    ("stated", "label"),
    [
        ({"use_scaled_rope": True}, "scaling of the rotary angles: llama3 in the source"),
        ({"rope_theta": 500000.0}, "base of the rotary angles: 500000.0 in the source"),
        ({"norm_eps": 1e-6}, "eps of the norms: 1e-06 in the source"),
    ],
)
def test_a_setting_of_metas_folder_that_differs_is_warned_of(stated, label, meta):
    (meta / "params.json").write_text(json.dumps({**PARAMS, **stated}), encoding="utf-8")
    with pytest.warns(keymap.ConfigurationWarning, match=label):
        keymap.load_checkpoint(llama.llama(), meta)


def test_a_conversion_without_a_model_asks_for_the_heads(tmp_path):
    state = dict(example("llama", "meta_llama").file)
    with pytest.raises(keymap.PlanError, match=r"text\.heads"):
        keymap.convert_state_dict(state, "llama", mapping="meta_llama")
    assert len(keymap.convert_state_dict(state, "llama", mapping="meta_llama", facts=llama.FACTS)) == 30


@pytest.mark.parametrize("key", ["layers.0.attention.wq.bias", "layers.0.attention.q_norm.weight"])
def test_a_qwen_under_metas_names_is_refused(key, tmp_path):
    file = {**example("llama", "meta_llama").file, key: torch.zeros(48)}
    refused(llama.llama(), saved(file, tmp_path / "qwen.safetensors"), "ExecuTorch", error=keymap.DetectionError)


@pytest.mark.parametrize("kind", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_qwen_cannot_be_written_under_metas_names(kind):
    with pytest.raises(keymap.PlanError, match="no place in meta_llama"):
        keymap.convert_state_dict(llama.llama(kind).state_dict(), "meta_llama", facts=llama.FACTS)


# --- nanoGPT ---


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_as_its_training_script_saves_it(prefix, tmp_path):
    made, model = example("gpt2", "nanogpt without biases"), gpt2.gpt2()
    state = {prefix + key: value for key, value in made.file.items()}
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 16, "bias": False, "vocab_size": 99}
    torch.save({"model": state, "optimizer": {}, "model_args": sizes, "iter_num": 5}, tmp_path / "ckpt.pt")
    result = keymap.load_checkpoint(model, tmp_path / "ckpt.pt")
    assert result.report.plan.format == "nanogpt"
    assert sum("has no such key" in entry.filled for entry in result.report.plan.entries) == 13
    assert max(value.abs().max() for key, value in model.state_dict().items() if key.endswith(".bias")) == 0


def test_one_missing_bias_is_not_filled(tmp_path):
    file = dict(example("gpt2", "nanogpt").file)
    del file["transformer.h.1.mlp.c_fc.bias"]
    refused(gpt2.gpt2(), saved(file, tmp_path / "x.safetensors"), "transformer.h.1.mlp.c_fc.bias")


def test_the_activation_is_compared(tmp_path):
    path = saved(example("gpt2", "nanogpt").file, tmp_path / "x.safetensors")
    with pytest.warns(keymap.ConfigurationWarning, match="activation: gelu in the source"):
        keymap.load_checkpoint(gpt2.gpt2(activation_function="gelu_new"), path)


def test_a_head_of_its_own_cannot_be_written_as_nanogpt():
    with pytest.raises(keymap.KeymapError, match=r"lm_head\.weight"):
        keymap.convert_state_dict(gpt2.gpt2(tie_word_embeddings=False).state_dict(), "nanogpt")


# --- mixtures of experts ---


def test_a_sharded_file_of_experts_and_a_state_dict_of_the_memory(tmp_path):
    source, model = mixture_of_experts.moe("MixtralForCausalLM", 1), mixture_of_experts.moe("MixtralForCausalLM")
    source.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 2
    result = keymap.load_checkpoint(model, tmp_path / "hub")
    assert (result.report.plan.format, result.report.plan.warnings, result.report.plan.unverified) == (
        "mixtral",
        (),
        (),
    )
    assert_bits(model, source.state_dict())
    model = mixture_of_experts.moe("MixtralForCausalLM", 2)
    torch.save(source.state_dict(), tmp_path / "memory.pt")
    assert keymap.load_checkpoint(model, tmp_path / "memory.pt").report.plan.format == "mixture_of_experts"
    assert_bits(model, source.state_dict())


def test_a_missing_expert_is_named(tmp_path):
    file = dict(example("mixture_of_experts", "mixtral").file)
    del file["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    words = ("missing", "model.layers.1.block_sparse_moe.experts.2.w3.weight")
    refused(example("mixture_of_experts", "mixtral").model(), saved(file, tmp_path / "x.safetensors"), *words)


# --- Megatron-LM's file ---


def test_a_file_of_megatron_has_nested_dicts_and_a_training_state_beside_them(tmp_path):
    made, model = example("gpt2", "megatron_gpt2"), gpt2.gpt2()
    words, places = (f"language_model.embedding.{name}_embeddings.weight" for name in ("word", "position"))
    layers = {key.removeprefix("language_model.encoder."): value for key, value in made.file.items()}
    del layers[words], layers[places]
    embedding = {"word_embeddings": {"weight": made.file[words]}, "position_embeddings": {"weight": made.file[places]}}
    tree = {
        "args": argparse.Namespace(num_layers=2),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {"language_model": {"embedding": embedding, "encoder": layers}},
        "optimizer": {"state": {0: {"exp_avg": torch.rand(3)}}},
    }
    torch.save(tree, tmp_path / "model_optim_rng.pt")
    plan = keymap.load_checkpoint(model, tmp_path / "model_optim_rng.pt").report.plan
    assert_bits(model, made.expected)
    assert any("rows 99 to 127 are padding and left out" in note for note in plan.notes)
    refused(gpt2.gpt2(vocab_size=130), tmp_path / "model_optim_rng.pt", "wte.weight")


def test_an_old_file_of_megatron_is_refused_as_its_order_of_rows_is_not_known(tmp_path):
    made, model = example("gpt2", "megatron_gpt2"), gpt2.gpt2()
    old = {"encoder.layers": "transformer.layers", "self_attention": "attention", "encoder.final": "transformer.final"}
    file = dict(made.file)
    for new, name in old.items():
        file = {key.replace(new, name): value for key, value in file.items()}
    refused(
        model,
        saved(file, tmp_path / "old.safetensors"),
        "the order of its rows of q, k and v has changed",
        error=keymap.DetectionError,
    )


# --- the layer for multi-token prediction ---


def test_the_report_names_the_layer_for_multi_token_prediction_that_it_left_out(tmp_path):
    made = example("mixture_of_experts", "qwen_moe a layer for multi-token prediction")
    plan = keymap.load_checkpoint(made.model(), saved(made.file, tmp_path / "model.safetensors")).report.plan
    assert set(plan.dropped) == set(made.not_written)
    assert set(plan.dropped.values()) == {"the layer for multi-token prediction, which transformers leaves out"}


def test_without_a_model_the_number_of_layers_is_asked_for_or_read_from_the_configuration(tmp_path):
    made = example("mixture_of_experts", "qwen_moe a layer for multi-token prediction")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_state_dict(made.file, "mixture_of_experts")
    assert "pass facts={'text.layers': ...}" in "\n".join(caught.value.faults)
    assert set(keymap.convert_state_dict(made.file, "mixture_of_experts", facts={"text.layers": 3})) == set(
        made.expected
    )
    path = saved(made.file, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "num_hidden_layers": 3}))
    keymap.convert_checkpoint(path, tmp_path / "out.safetensors", to="mixture_of_experts")
    keymap.load_checkpoint(again := made.model(), tmp_path / "out.safetensors")
    assert_bits(again, made.expected)


@pytest.mark.parametrize(("version", "warned"), [(0, True), (1.0, True), (2, False), (3, False), (3.0, False)])
def test_the_order_of_an_old_version_of_megatron_is_warned_of(version, warned, tmp_path):
    made = example("gpt2", "megatron_gpt2")
    torch.save({"model": dict(made.file), "checkpoint_version": version, "iteration": 1}, tmp_path / "x.pt")
    plan = keymap.plan_load(gpt2.gpt2(), tmp_path / "x.pt")
    assert [f"checkpoint_version = {version}" in text for text in plan.warnings] == [True] * warned
    assert "order of the rows of q and k and v" not in plan.unverified
    facts = {"text.heads": gpt2.HEADS, "text.vocab": gpt2.VOCAB}
    written = keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.safetensors", "gpt2", facts=facts)
    assert any("checkpoint_version" in note for note in written.notes) == warned


def test_more_rows_than_padding_explains_are_refused(tmp_path):
    made, key = example("gpt2", "megatron_gpt2"), "language_model.embedding.word_embeddings.weight"
    for rows in (130, 64 * 128 + 128):
        file = {**made.file, key: torch.rand(rows, gpt2.WIDTH)}
        refused(gpt2.gpt2(), saved(file, tmp_path / f"{rows}.safetensors"), "are no padding")


@pytest.mark.parametrize(
    "name", ["transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.bias", "transformer.h.0.ln_1.bias"]
)
def test_a_nanogpt_that_lacks_one_bias_is_refused(name, tmp_path):
    file = {key: value for key, value in example("gpt2", "nanogpt").file.items() if key != name}
    refused(gpt2.gpt2(), saved(file, tmp_path / "x.safetensors"), f"missing keys: {name}")


@pytest.mark.parametrize("name", ["nanogpt", "nanogpt without biases", "megatron_gpt2"])
def test_files_with_a_head_load_into_a_model_without_one(name, tmp_path):
    made, model, whole = example("gpt2", name), gpt2.gpt2("GPT2Model", seed=5), gpt2.gpt2(seed=6)
    file = saved(made.file, tmp_path / "x.safetensors")
    keymap.load_checkpoint(whole, file)
    keymap.load_checkpoint(model, file)
    theirs = {key.removeprefix("transformer."): value for key, value in whole.state_dict().items()}
    assert_bits(model, {key: value for key, value in theirs.items() if key != "lm_head.weight"})


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
def test_a_gpt2_without_any_bias_is_read_again_and_one_that_lacks_some_is_refused(kind, tmp_path):
    made, model, want = example("gpt2", "nanogpt without biases"), gpt2.gpt2(kind, seed=5), gpt2.gpt2(kind, seed=6)
    file = saved(made.file, tmp_path / "nano.safetensors")
    keymap.convert_checkpoint(file, tmp_path / "hub.safetensors", "gpt2")
    keymap.load_checkpoint(want, file)
    hub = load_file(tmp_path / "hub.safetensors")
    file = saved({key: value for key, value in hub.items() if key != "lm_head.weight"}, tmp_path / "base.safetensors")
    keymap.load_checkpoint(model, file)
    assert_bits(model, dict(want.state_dict()))
    back = keymap.convert_state_dict(hub, "nanogpt")
    assert back.keys() == made.file.keys()
    for name in ("transformer.h.1.ln_2.bias", "transformer.ln_f.bias"):
        state = load_file(file) | {name: torch.zeros(gpt2.WIDTH)}
        refused(gpt2.gpt2(kind), saved(state, tmp_path / "some.safetensors"), "missing from the file")
    state = {key: value for key, value in gpt2.gpt2().state_dict().items() if key != name and key != "lm_head.weight"}
    refused(
        gpt2.gpt2(kind), saved(state, tmp_path / "one.safetensors"), "1 of the model's keys is missing", "ln_f.bias"
    )


# --- a model with the names of a format ---


@pytest.mark.parametrize("given", [{}, {"hub": "llama"}, {"mapping": "llama"}])
def test_a_file_of_llama_is_not_loaded_into_phi3_and_the_advice_leads_there(given, tmp_path):
    """The file converted as the message says is what transformers' own fused weights are, value by value."""
    source, model = llama.llama(seed=1, **llama.WIDE), llama.llama("Phi3ForCausalLM", **llama.WIDE)
    source.save_pretrained(tmp_path / "theirs")
    words = ("format llama", "those of format phi3", "convert the file first", "with to='phi3'")
    refused(model, tmp_path / "theirs", *words, **given)
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "fused.safetensors", to="phi3")
    assert keymap.load_checkpoint(model, tmp_path / "fused.safetensors").missing_keys == []
    state = source.state_dict()
    for layer in range(llama.LAYERS):
        name = f"model.layers.{layer}"
        parts = [state[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(model.state_dict()[f"{name}.self_attn.qkv_proj.weight"], torch.cat(parts))
        parts = [state[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(model.state_dict()[f"{name}.mlp.gate_up_proj.weight"], torch.cat(parts))


def test_a_file_of_phi3_that_lacks_a_key_is_not_called_another_format(tmp_path):
    file = dict(llama.llama("Phi3ForCausalLM", seed=1).state_dict())
    del file["model.layers.1.self_attn.qkv_proj.weight"]
    path = saved(file, tmp_path / "x.safetensors")
    refused(llama.llama("Phi3ForCausalLM"), path, "missing from the file: model.layers.1.self_attn.qkv_proj.weight")


@pytest.mark.parametrize("kind", ["Phi3ForCausalLM", "Phi3Model"])
@pytest.mark.parametrize("to", ["llama", "phi3", "meta_llama", "internlm2", "torchtune_llama", "torchtitan_llama"])
def test_a_live_phi3_is_written_as_its_own_file_is_converted(kind, to, tmp_path):
    model = llama.llama(kind, seed=1)
    model.save_pretrained(tmp_path / "own")
    live = keymap.save_checkpoint(model, tmp_path / "live.safetensors", to=to)
    file = keymap.convert_checkpoint(tmp_path / "own", tmp_path / "file.safetensors", to=to)
    assert live.source_format == file.source_format == "phi3"
    one, other = load_file(tmp_path / "live.safetensors"), load_file(tmp_path / "file.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for sides in ((model, tmp_path / "own"), (tmp_path / "own", model)):
        assert keymap.compare_checkpoints(*sides).equal


@pytest.mark.parametrize("to", ["llama", "meta_llama"])
def test_a_live_phi3_is_compared_with_a_file_of_another_format_under_the_hub_of_both(to, tmp_path):
    model = llama.llama("Phi3ForCausalLM", seed=1)
    keymap.save_checkpoint(model, tmp_path / "x.safetensors", to=to)
    for sides in ((model, tmp_path / "x.safetensors"), (tmp_path / "x.safetensors", model)):
        found = keymap.compare_checkpoints(*sides)
        assert found.equal and {found.format_a, found.format_b} == {"phi3", to}
    with torch.no_grad():
        model.model.layers[1].self_attn.qkv_proj.weight[3, 5] += 1
    found = keymap.compare_checkpoints(model, tmp_path / "x.safetensors")
    assert [one.key for one in found.differences] == ["model.layers.1.self_attn.q_proj.weight"]


def test_a_live_phi3_that_turns_a_part_of_each_head_is_noted_where_it_is_written_as_a_llama(tmp_path):
    turned = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
    for options, noted in (({}, 0), (turned, 1)):
        model = llama.llama("Phi3ForCausalLM", seed=1, **options)
        result = keymap.save_checkpoint(model, tmp_path / "x.safetensors", to="llama")
        assert sum("rotated part of a head: 0.5 in the source" in note for note in result.notes) == noted


# --- within a model of images and text ---


def llava(**options):
    """A tiny LLaVA of transformers around the Llama of these tests."""
    vision = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    text = {**llama.SIZE, "model_type": "llama", **options}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return randomised(lambda: transformers.LlavaForConditionalGeneration(config), seed=1)


@pytest.mark.parametrize("above", ["", "model.", "state_dict"])
def test_the_head_above_a_language_model_is_taken_with_it_and_reported(above, tmp_path):
    state, model = llava().state_dict(), llama.llama()
    file = {key.removeprefix(above) if above == "model." else key: value for key, value in state.items()}
    torch.save({above: file} if above == "state_dict" else file, tmp_path / "llava.pt")
    result = keymap.load_checkpoint(model, tmp_path / "llava.pt")
    own = {key.replace("language_model.", ""): v for key, v in state.items() if "language_model." in key}
    assert_bits(model, {**own, "lm_head.weight": state["lm_head.weight"]})
    assert any("taken from above" in note and "lm_head.weight" in note for note in result.report.plan.notes)
    base = llama.llama("LlamaModel")
    assert not any(
        "taken from above" in n for n in keymap.load_checkpoint(base, tmp_path / "llava.pt").report.plan.notes
    )


def test_the_head_above_a_part_that_the_caller_chose_is_taken_by_load_convert_and_compare(tmp_path):
    state, model, part = llava().state_dict(), llama.llama(seed=2), "model.language_model"
    own = {key.replace("language_model.", ""): v for key, v in state.items() if "language_model." in key}
    own["lm_head.weight"] = state["lm_head.weight"]
    torch.save(dict(state), tmp_path / "llava.pt")
    for options in ({}, {"strict": False}):
        keymap.load_checkpoint(model, tmp_path / "llava.pt", wrapper=part, **options)
        assert_bits(model, own)
    assert keymap.convert_state_dict(state, "llama", wrapper=part).keys() == own.keys()
    result = keymap.convert_checkpoint(tmp_path / "llava.pt", tmp_path / "llama.pt", "llama", wrapper=part)
    assert any("taken from above" in note and "lm_head.weight" in note for note in result.notes)
    assert keymap.compare_checkpoints(tmp_path / "llava.pt", tmp_path / "llama.pt", wrapper_a=part).equal
    base = llama.llama("LlamaModel")  # it has no head, and none is missed
    keymap.load_checkpoint(base, tmp_path / "llava.pt", wrapper=part)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    assert keymap.compare_checkpoints(tmp_path / "llava.pt", tmp_path / "base.pt", wrapper_a=part).equal
    wrong = {**state, "lm_head.weight": state["lm_head.weight"][:, :5].contiguous()}
    two = {**state, "model.lm_head.weight": state["lm_head.weight"]}
    for file in (wrong, two):
        torch.save(file, tmp_path / "llava.pt")
        notes = keymap.convert_checkpoint(tmp_path / "llava.pt", tmp_path / "llama.pt", "llama", wrapper=part).notes
        assert notes[0].startswith("left out: ") and "lm_head.weight above 'model.language_model'" in notes[0]


def test_the_settings_of_a_language_model_within_a_larger_model_are_read(tmp_path):
    source = llava(rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    source.save_pretrained(tmp_path / "llava")
    words = ("eps of the norms: 0.01", "base of the rotary angles: 777.0")
    warnings = keymap.load_checkpoint(llama.llama(), tmp_path / "llava").report.plan.warnings
    assert len(warnings) == 2 and all(any(word in warning for warning in warnings) for word in words)
    keymap.convert_checkpoint(tmp_path / "llava", tmp_path / "llama", "llama", wrapper="language_model")
    config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    assert (config["rms_norm_eps"], config["rope_theta"], config["model_type"]) == (1e-2, 777.0, "llama")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(again.lm_head.weight, source.lm_head.weight)
    hints = keymap.inspect_checkpoint(tmp_path / "llava", hub="open_clip").config_hints
    assert "image.heads" in hints and not any(name.startswith("text.") for name in hints)


def test_a_head_of_another_shape_or_in_two_places_is_not_taken_and_the_advice_loads_the_rest(tmp_path):
    state = dict(llava().state_dict())
    other = {**state, "lm_head.weight": state["lm_head.weight"][:40]}
    two = {**state, "model.lm_head.weight": state["lm_head.weight"]}
    for file in (other, two):
        path, model = tmp_path / "llava.pt", llama.llama(seed=2)
        torch.save(file, path)
        before = model.lm_head.weight.clone()
        refused(model, path, "lm_head.weight", "allow_missing=('lm_head.weight',)")
        words = ("wrapper='model.language_model' would leave out lm_head.weight",)
        refused(model, path, *words, allow_missing="lm_head.weight")
        keymap.load_checkpoint(model, path, wrapper="model.language_model", allow_missing="lm_head.weight")
        assert torch.equal(model.lm_head.weight, before)
        assert torch.equal(model.model.norm.weight, state["model.language_model.norm.weight"])
