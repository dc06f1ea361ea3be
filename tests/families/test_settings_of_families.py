"""Settings that weights do not show: a sibling with the same names and shapes gives a warning, an equal model none."""

from __future__ import annotations

import warnings

import pytest
import torch

import keymap

WORDS = {"vocab_size": 99, "num_hidden_layers": 2}
CAUSAL = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
BERT = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "max_position_embeddings": 20}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
VIT = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def causal(name, **more):
    import transformers

    config = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    return getattr(transformers, f"{name}ForCausalLM")(
        config(**WORDS, **{**CAUSAL, "tie_word_embeddings": True, **more})
    )


def phi3(part=1.0):
    return causal("Phi3", pad_token_id=0, partial_rotary_factor=part, rope_parameters=dict(DEFAULT))


def half_turned():
    return phi3(0.5)


def llama3(**scaling):
    angles = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return causal("Llama", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **angles, **scaling})


def glm(part):
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
    return causal("Glm4Moe", **experts, rope_parameters={**DEFAULT, "partial_rotary_factor": part})


def gemma3(local=1e4, whole=1e6, **scaling):
    angles = {
        name: {"rope_type": "default", "rope_theta": base}
        for name, base in (("sliding_attention", local), ("full_attention", whole))
    }
    angles["full_attention"] |= scaling
    return causal("Gemma3", rope_parameters=angles)


def yarn(**more):
    angles = {"factor": 2.0, "original_max_position_embeddings": 8, **more}
    return causal("Llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **angles})


def local_gemma3(**scaling):
    whole = {"rope_type": "default", "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4, **scaling}
    return causal("Gemma3", rope_parameters={"sliding_attention": local, "full_attention": whole})


def qwen2(first):
    return causal("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=first)


MIXED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}


def bert(name, **more):
    import transformers

    sizes = {**BERT, "type_vocab_size": 2, **more}
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**WORDS, **sizes))


def vit(**more):
    import transformers

    sizes = {**VIT, "num_labels": 5, "layer_norm_eps": 1e-6, **more}
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2, **sizes))


def timm_vit(**more):
    import timm

    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 28, "patch_size": 14, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", **{**sizes, **more})


PAIRS = {  # the model that saves, the model that loads, and what warns
    "Llama": (lambda: causal("Llama"), lambda: causal("Llama"), ""),
    "Mistral into Llama": (lambda: causal("Mistral", sliding_window=None), lambda: causal("Llama"), ""),
    "window of a Mistral": (
        lambda: causal("Mistral", sliding_window=8),
        lambda: causal("Mistral", sliding_window=16),
        "sliding window: 8 in the source",
    ),
    "half-turned Phi-3 into Llama": (
        half_turned,
        lambda: causal("Llama"),
        "rotated part of a head: 0.5",
    ),
    "Phi-3 into Llama": (phi3, lambda: causal("Llama", rms_norm_eps=1e-5), ""),
    "slow angles": (lambda: llama3(low_freq_factor=1.5), llama3, "scaling of the rotary angles: 1.5"),
    "fast angles": (lambda: llama3(high_freq_factor=5.0), llama3, "scaling of the rotary angles: 5"),
    "positions before the scaling": (
        lambda: llama3(original_max_position_embeddings=64),
        llama3,
        "scaling of the rotary angles: 64",
    ),
    "the same scaled angles": (llama3, llama3, ""),
    "half-turned GLM": (lambda: glm(0.5), lambda: glm(1.0), "rotated part of a head: 0.5"),
    "GLM": (lambda: glm(0.5), lambda: glm(0.5), ""),
    "Gemma into Llama": (lambda: causal("Gemma"), lambda: causal("Llama"), "kind of model: gemma"),
    "Llama into Gemma": (lambda: causal("Llama"), lambda: causal("Gemma"), "kind of model: llama"),
    "Granite into Llama": (lambda: causal("Granite"), lambda: causal("Llama"), "kind of model: granite"),
    "another activation": (lambda: causal("Llama", hidden_act="gelu"), lambda: causal("Llama"), "activation: gelu"),
    "Gemma 2": (lambda: causal("Gemma2"), lambda: causal("Gemma2"), ""),
    "Gemma 3": (lambda: gemma3(), lambda: gemma3(), ""),
    "scale of the queries": (
        lambda: causal("Gemma2", query_pre_attn_scalar=144),
        lambda: causal("Gemma2"),
        "scale of the queries: 144",
    ),
    "sliding window": (lambda: causal("Gemma2", sliding_window=9), lambda: causal("Gemma2"), "sliding window: 9"),
    "cap of the attention": (
        lambda: causal("Gemma2", attn_logit_softcapping=20.0),
        lambda: causal("Gemma2"),
        "cap of the attention: 20",
    ),
    "cap of the logits": (
        lambda: causal("Gemma2", final_logit_softcapping=20.0),
        lambda: causal("Gemma2"),
        "cap of the logits: 20",
    ),
    "activation of Gemma": (
        lambda: causal("Gemma2", hidden_activation="gelu"),
        lambda: causal("Gemma2"),
        "activation: gelu",
    ),
    "global angles": (lambda: gemma3(whole=5e5), lambda: gemma3(), "base of the rotary angles: 500000"),
    "scaled angles": (
        lambda: gemma3(rope_type="linear", factor=8.0),
        lambda: gemma3(),
        "scaling of the rotary angles: linear",
    ),
    "factor of the angles": (
        lambda: gemma3(rope_type="linear", factor=8.0),
        lambda: gemma3(rope_type="linear", factor=4.0),
        "factor of the rotary angles: 8",
    ),
    "EmbeddingGemma": (
        lambda: causal("Gemma3", use_bidirectional_attention=True),
        lambda: causal("Gemma3", use_bidirectional_attention=True),
        "",
    ),
    "EmbeddingGemma into Gemma 3": (
        lambda: causal("Gemma3", use_bidirectional_attention=True),
        lambda: causal("Gemma3"),
        "attention in both directions: true",
    ),
    "kinds of the layers": (
        lambda: causal("Gemma3", layer_types=MIXED["layer_types"]),
        lambda: causal("Gemma3"),
        "sliding window: full_attention, sliding_attention",
    ),
    "first layer with a window": (lambda: qwen2(1), lambda: qwen2(0), "sliding window: full_attention, sliding_"),
    "the same first layer with a window": (lambda: qwen2(1), lambda: qwen2(1), ""),
    "Ministral into Mistral": (
        lambda: causal("Ministral", **MIXED),
        lambda: causal("Mistral", sliding_window=4),
        "sliding window: full_attention, sliding_attention",
    ),
    "a window into Llama": (
        lambda: causal("Mistral", sliding_window=4),
        lambda: causal("Llama"),
        "sliding window: sliding_attention in the source (config.json: sliding_window = 4), full_attention",
    ),
    "YaRN": (lambda: yarn(beta_fast=16), lambda: yarn(beta_fast=16), ""),
    "first bound of YaRN": (yarn, lambda: yarn(beta_fast=16), "first bound of the scaled angles: 32"),
    "second bound of YaRN": (lambda: yarn(beta_slow=2), yarn, "second bound of the scaled angles: 2"),
    "factor of YaRN": (lambda: yarn(attention_factor=2.0), yarn, "factor of the attention: 2.0"),
    "local scaled angles": (
        lambda: local_gemma3(rope_type="linear", factor=3.0),
        local_gemma3,
        "scaling of the local rotary angles: linear",
    ),
    "factor of the local angles": (
        lambda: local_gemma3(rope_type="linear", factor=3.0),
        lambda: local_gemma3(rope_type="linear", factor=4.0),
        "factor of the local rotary angles: 3",
    ),
    "local angles": (lambda: gemma3(local=5e3), lambda: gemma3(), "base of the local rotary angles: 5000"),
    "BERT": (lambda: bert("Bert"), lambda: bert("Bert"), ""),
    "RoBERTa into BERT": (lambda: bert("Roberta"), lambda: bert("Bert"), "kind of model: roberta"),
    "a decoder into BERT": (lambda: bert("Bert", is_decoder=True), lambda: bert("Bert"), "causal mask: true"),
    "ViT": (vit, timm_vit, ""),
    "heads of a ViT": (vit, lambda: timm_vit(num_heads=8), "attention heads: 4"),
    "activation of a ViT": (lambda: vit(hidden_act="quick_gelu"), timm_vit, "activation: quick_gelu"),
    "pooling of a ViT": (vit, lambda: timm_vit(global_pool="avg", fc_norm=False), "pooling: token"),
    "eps of a ViT": (lambda: vit(layer_norm_eps=1e-3), timm_vit, "eps of the norms: 0.001"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_setting_that_differs_is_warned_of_and_an_equal_model_is_not(name, tmp_path):
    source, model, words = PAIRS[name]
    source().save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keymap.ConfigurationWarning)
        keymap.load_checkpoint(model(), tmp_path)
    found = [str(one.message) for one in caught if issubclass(one.category, keymap.ConfigurationWarning)]
    assert any(words in text for text in found) if words else found == []


CONVERSIONS = {  # what is converted, to which format, and what is noted
    "Llama to Meta's": (lambda: causal("Llama"), "meta_llama", ""),
    "Phi-3 to Llama": (phi3, "llama", ""),
    "half-turned Phi-3 to Llama": (half_turned, "llama", "rotated part of a head: 0.5 in the source"),
    "half-turned Phi-3 to Meta's": (half_turned, "meta_llama", "rotated part of a head: 0.5 in the source"),
    "half-turned Phi-3 to its own format": (half_turned, "phi3", ""),
    "half-turned Phi-3 to InternLM2": (half_turned, "internlm2", "rotated part of a head: 0.5 in the source"),
    "a window to InternLM2": (lambda: causal("Mistral", sliding_window=4), "internlm2", "sliding window: sliding_att"),
    "a window to Meta's": (lambda: causal("Mistral", sliding_window=4), "meta_llama", "sliding window: sliding_att"),
    "a window to torchtune's": (lambda: causal("Mistral", sliding_window=4), "torchtune_llama", "sliding window: sl"),
    "a window to Llama": (lambda: causal("Mistral", sliding_window=4), "llama", ""),
    "Mistral without a window to InternLM2": (lambda: causal("Mistral", sliding_window=None), "internlm2", ""),
    "Gemma to Phi-3": (lambda: causal("Gemma"), "phi3", "kind of model: gemma in the source"),
    "Granite to InternLM2": (lambda: causal("Granite"), "internlm2", "kind of model: granite in the source"),
    "Gemma to Meta's": (lambda: causal("Gemma"), "meta_llama", "kind of model: gemma in the source"),
    "Llama to torchtitan's": (lambda: causal("Llama"), "torchtitan_llama", ""),
    "Qwen3 to torchtitan's": (lambda: causal("Qwen3"), "torchtitan_llama", ""),
    "Gemma to torchtitan's": (lambda: causal("Gemma"), "torchtitan_llama", "kind of model: gemma in the source"),
    "Qwen2 to torchtune's": (lambda: causal("Qwen2"), "torchtune_llama", ""),
    "Gemma to torchtune's": (lambda: causal("Gemma"), "torchtune_llama", ""),  # it is torchtune's Gemma, too
    "RoBERTa to BERT's old names": (lambda: bert("Roberta"), "bert_gamma_beta", "kind of model: roberta in the source"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_notes_a_setting_that_its_target_fixes_otherwise(name, tmp_path):
    source, to, words = CONVERSIONS[name]
    model = source()
    model.save_pretrained(tmp_path / "theirs")
    hub = "bert" if to.startswith("bert") else "llama"
    results = [
        keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "x.safetensors", to, hub=hub),
        keymap.save_checkpoint(model, tmp_path / "y.safetensors", to),
    ]
    for result in results:
        found = [note for note in result.notes if "what reads the file computes something else" in note]
        assert any(words in note for note in found) if words else found == []


@pytest.mark.parametrize(
    ("source", "to", "model", "words"),
    [
        ("Llama", "torchtitan_llama", "Llama", ""),
        ("Llama", "torchtitan_llama", "Gemma", "kind of model: llama in the source (format torchtitan_llama)"),
        ("Qwen3", "torchtitan_llama", "Qwen3", ""),
        ("Qwen2", "torchtune_llama", "Qwen2", ""),
    ],
)
def test_a_file_whose_keys_show_the_kind_of_model_is_warned_of_in_another(source, to, model, words, tmp_path):
    keymap.save_checkpoint(causal(source), tmp_path / "x.safetensors", to)
    plan = keymap.plan_load(causal(model), tmp_path / "x.safetensors")
    assert any(words in text for text in plan.warnings) if words else plan.warnings == ()
    assert "kind of model" not in plan.unverified


def whisper_file(path, wrong):
    """A .pt file of OpenAI's Whisper, with the sizes under dims, and the model that it fits."""
    from peers.families import whisper

    sizes = {"n_audio_head": 3 + wrong, "n_text_head": 2, "n_mels": whisper.MELS}
    torch.save({"dims": sizes, "model_state_dict": whisper.openai().state_dict()}, path)
    return whisper.hf()()


def nanogpt_file(path, wrong):
    """A ckpt.pt of nanoGPT's train.py, with the sizes under model_args, and the model that it fits."""
    from peers.families import gpt2

    sizes = {"n_layer": gpt2.LAYERS, "n_head": gpt2.SIZE["n_head"] + wrong, "bias": True, "dropout": 0.0}
    torch.save({"model": gpt2.nanogpt().file, "model_args": sizes, "iter_num": 5, "config": {"n_head": 77}}, path)
    return gpt2.gpt2(activation_function="gelu", layer_norm_epsilon=1e-5)


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize(
    ("write", "where"), [(whisper_file, "dims in ckpt.pt: n_audio_head = 4"), (nanogpt_file, "model_args in ckpt.pt")]
)
def test_settings_within_a_checkpoint_are_compared(write, where, wrong, tmp_path):
    model = write(tmp_path / "ckpt.pt", wrong)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", keymap.ConfigurationWarning)
        keymap.load_checkpoint(model, tmp_path / "ckpt.pt")
    found = [str(one.message) for one in caught if issubclass(one.category, keymap.ConfigurationWarning)]
    assert (len(found) == 1 and where in found[0]) if wrong else found == [], found


@pytest.mark.parametrize("dims", [None, 3, [], {}, {"n_audio_head": [4]}, {"n_audio_head": torch.zeros(2)}, {7: 7}])
def test_odd_settings_within_a_checkpoint_say_nothing(dims, tmp_path):
    from peers.families import whisper

    torch.save({"dims": dims, "model_state_dict": whisper.openai().state_dict()}, tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", keymap.ConfigurationWarning)
        keymap.load_checkpoint(whisper.hf()(), tmp_path / "w.pt")
