"""Folders of formats outside CLIP: their owners open them, and what no weight shows is asked for by its name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial

import pytest
import timm
import torch
import transformers
from checks import CLEAR, LIMIT
from peers.common import images, max_diff, tokens
from peers.families import bert, example, gemma, gpt2, llama, mixture_of_experts, sam, t5, whisper
from peers.families import vision_transformer as vit
from test_families import saved
from timm.models.vision_transformer import ResPostBlock

import keymap
from keymap.source.registry import hubs

IDS = tokens(vocab=99)
ASKED = re.compile(r"'(\w+\.\w+)': \.\.\.")


def opened(kind, folder, **options):
    """The model that the owner's loader makes of a folder; no tensor is too many or of another shape."""
    if kind == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    known = getattr(transformers, kind)
    model, info = known.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    assert not any(value for name, value in info.items() if name != "missing_keys"), info
    return model.eval()


@torch.no_grad()
def output(model):
    """What a model computes of the inputs of this module."""
    config = getattr(model, "config", None)  # timm's models have none
    if config is None or config.model_type in ("vit", "deit", "dinov2"):
        found = model.forward_features(images()) if getattr(model, "num_classes", 1) == 0 else model(images())
        return found if isinstance(found, torch.Tensor) else getattr(found, "logits", found[0])
    if config.model_type == "whisper":
        return model(whisper.MEL, decoder_input_ids=whisper.IDS)[0]
    if config.model_type == "sam":
        return model(images(sam.SIDE, batch=1), input_boxes=sam.BOXES[None]).pred_masks / 100
    if config.model_type in ("t5", "mt5", "umt5"):
        decoder = {"decoder_input_ids": t5.SAY} if hasattr(model, "decoder") else {}
        return model(input_ids=t5.ASK, **decoder)[0]
    choices = type(model).__name__.endswith("MultipleChoice")
    return model(IDS[None] if choices else IDS)[0]


# --- files of other formats ---


@dataclass(frozen=True)
class File:
    """A file of a format, by the name of its example, that becomes a folder.

    Attributes:
        hub, name: of the example.
        to: the format of the folder.
        kind: the class that opens it.
        facts: what the file and what lies beside it do not show: keymap asks for these, and for nothing else.
        beside: JSON files beside it.
        within: settings in the checkpoint, beside the state dict, and the name of the state dict.
        options: for the loader.
        missing: the class makes tensors of its own.
    """

    hub: str
    name: str
    to: str
    kind: str
    facts: dict = field(default_factory=dict)
    beside: dict = field(default_factory=dict)
    within: tuple = ()
    options: dict = field(default_factory=dict)
    missing: bool = False


VIT = {"image.heads": vit.HEADS}
META = {
    "n_heads": llama.HEADS,
    "n_kv_heads": llama.KV_HEADS,
    "norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "use_scaled_rope": False,
}
TITAN = {"text.heads": llama.HEADS, "text.kv_heads": llama.KV_HEADS, "text.eps": 1e-5, "text.rope_base": 5000.0}
TITAN |= {"text.activation": "silu", "text.rope_type": "default"}
GPT = {"n_layer": gpt2.LAYERS, "n_head": gpt2.HEADS, "bias": True, "dropout": 0.0}
BERT = {"text.heads": 3, "text.activation": "gelu"}
EAGER = {"attn_implementation": "eager"}
GEMMA = {"text.heads": gemma.HEADS, "text.kv_heads": gemma.KV_HEADS, "text.eps": 1e-6, "text.query_scale": gemma.SCALE}
GEMMA |= {"text.window": gemma.WINDOW, "text.rope_base": 5000.0, "text.rope_type": "default"}
CAPS = {"text.attention_cap": gemma.ATTENTION_CAP, "text.final_cap": gemma.FINAL_CAP}
GEMMA3 = {
    "text.local_rope_base": 300.0,
    "text.window_pattern": 3,
    "text.attention_cap": "none",
    "text.final_cap": "none",
}
DEIT = {"image.architecture": "deit3_small_patch16_224", "image.no_embed_class": True, "image.pool": "token"}
FILES = {
    "augreg to timm": File(
        "vision_transformer",
        "augreg",
        "vision_transformer",
        "timm",
        {"image.heads": vit.HEADS, "image.architecture": "vit_base_patch16_224"},
    ),
    "DeiT III to timm": File(
        "vision_transformer",
        "timm_vit_old",
        "vision_transformer",
        "timm",
        {**VIT, **DEIT, "image.activation": "gelu", "image.eps": 1e-6},
    ),
    "DINOv2 to timm": File(
        "vision_transformer",
        "dinov2",
        "vision_transformer",
        "timm",
        {**VIT, "image.architecture": "vit_base_patch14_dinov2"},
    ),
    "DINOv2 with registers to timm": File(
        "vision_transformer",
        "dinov2 registers",
        "vision_transformer",
        "timm",
        {**VIT, "image.architecture": "vit_base_patch14_reg4_dinov2"},
    ),
    "DINOv2 to transformers": File("vision_transformer", "dinov2", "hf_dinov2", "Dinov2Model", VIT),
    "DINOv2 with SwiGLU to transformers": File("vision_transformer", "dinov2 SwiGLU", "hf_dinov2", "Dinov2Model", VIT),
    "augreg to transformers": File("vision_transformer", "augreg", "hf_vit", "ViTForImageClassification", VIT),
    "Meta's Llama": File(
        "llama",
        "meta_llama",
        "llama",
        "LlamaForCausalLM",
        beside={"params.json": META},
    ),
    "Meta's Llama without params.json": File(
        "llama",
        "meta_llama tied",
        "llama",
        "LlamaForCausalLM",
        {name: value for name, value in TITAN.items() if name != "text.activation"},
    ),
    "torchtitan's Qwen3": File("llama", "torchtitan_llama Qwen3", "llama", "Qwen3ForCausalLM", TITAN),
    "nanoGPT": File("gpt2", "nanogpt", "gpt2", "GPT2LMHeadModel", within=("model", {"model_args": GPT})),
    "nanoGPT without biases": File(
        "gpt2", "nanogpt without biases", "gpt2", "GPT2LMHeadModel", {"text.heads": gpt2.HEADS}, missing=True
    ),
    "Megatron's GPT-2": File(
        "gpt2",
        "megatron_gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        {"text.heads": 3, "text.vocab": 99, "text.eps": 1e-5, "text.activation": "gelu"},
    ),
    "BERT with gamma and beta": File("bert", "bert_gamma_beta", "bert", "BertForPreTraining", BERT),
    "BERT of TensorFlow": File(
        "bert",
        "bert_tensorflow",
        "bert",
        "BertForPreTraining",
        beside={"bert_config.json": {"num_attention_heads": 3, "hidden_act": "gelu"}},
    ),
    "Whisper": File(
        "whisper",
        "openai_whisper",
        "whisper",
        "WhisperForConditionalGeneration",
        {"text.eos": 2, "text.start": 3},  # as many words as no Whisper has
        within=("model_state_dict", {"dims": {"n_audio_head": 3, "n_text_head": 2, "n_vocab": whisper.WORDS}}),
    ),
    "T5X's v1.0": File(
        "t5", "t5x v1.0", "t5", "T5ForConditionalGeneration", {"text.mlp": "relu", "text.distance": t5.DISTANCE}
    ),
    "T5X's v1.1": File(
        "t5", "t5x", "t5", "T5ForConditionalGeneration", {"text.mlp": "gated-gelu", "text.distance": t5.DISTANCE}
    ),
    "Phi-3 from Meta's": File("llama", "meta_llama", "phi3", "Phi3ForCausalLM", beside={"params.json": META}),
    "Segment Anything": File("sam", "segment_anything", "sam", "SamModel", {"mask.heads": 2}),
    "Google's Gemma 2": File("gemma", "gemma_pytorch", "gemma", "Gemma2ForCausalLM", {**GEMMA, **CAPS}, options=EAGER),
    "Google's Gemma 3": File(
        "gemma", "gemma_pytorch Gemma 3", "gemma", "Gemma3ForCausalLM", {**GEMMA, **GEMMA3}, options=EAGER
    ),
}


def source_of(row, folder):
    """The file of a row, with the settings that lie beside it or within it."""
    folder.mkdir()
    path = saved(example(row.hub, row.name), folder)
    for name, settings in row.beside.items():
        (folder / name).write_text(json.dumps(settings))
    if row.within:
        inner, settings = row.within
        path = folder / "ckpt.pt"
        torch.save({inner: dict(example(row.hub, row.name).file), **settings}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_owner_opens_the_folder_of_a_file_after_what_is_asked_for_is_answered(name, tmp_path):
    row = FILES[name]
    source, answered = source_of(row, tmp_path / "theirs"), {}
    for _ in range(3):  # what the rules need is asked for before what the configuration needs
        try:
            keymap.convert_checkpoint(source, tmp_path / "out", row.to, hub=row.hub, facts=answered)
            break
        except keymap.PlanError as error:
            answered |= {asked: row.facts[asked] for asked in ASKED.findall(str(error))}
    assert answered == row.facts
    made, model = example(row.hub, row.name), opened(row.kind, tmp_path / "out", **row.options)
    with torch.no_grad():
        if made.outputs is not None:
            pairs = [(theirs, ours) for theirs, ours in made.outputs(model)]
        elif row.kind == "timm" or set(made.expected) == set(model.state_dict()):
            pairs = [(value, model.state_dict()[key]) for key, value in made.expected.items()]
        else:
            theirs = made.model().eval()
            theirs.load_state_dict(made.expected)
            pairs = [(output(theirs), output(model))]
    assert max(max_diff(*pair) for pair in pairs) < LIMIT


@torch.no_grad()
def test_metas_scaled_angles_are_those_of_its_code_but_for_the_factor(tmp_path):
    theirs = llama.meta(scaled=True)
    torch.save(theirs.state_dict(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps({**META, "use_scaled_rope": True}))
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "consolidated.00.pth", tmp_path / "out", "llama")
    assert ASKED.findall(str(caught.value)) == ["text.rope_factor"]
    for factor, same in ((8, True), (32, False)):
        out = tmp_path / str(factor)
        keymap.convert_checkpoint(tmp_path / "consolidated.00.pth", out, "llama", facts={"text.rope_factor": factor})
        assert (max_diff(theirs(IDS, 0), output(opened("LlamaForCausalLM", out))) < LIMIT) == same


# --- models in memory, at settings that no class has by itself ---


def causal(kind="LlamaForCausalLM", **options):
    return partial(llama.llama, kind, 1, **{**llama.WIDE, **options})


def scaled(**angles):
    return causal(rope_parameters={"rope_theta": 700.0, **angles}, max_position_embeddings=10)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0}
HOOK = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True}
SHIFTED = {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "n_inner": 100}
DISTILLED = "deit_base_distilled_patch16_224"
EXPERTS = {**mixture_of_experts.MIXTRAL, "rms_norm_eps": 1e-3, "hidden_act": "gelu", "num_experts_per_tok": 3}
BUSY = {"hidden_act": "relu", "layer_norm_eps": 1e-3}
MODELS = {
    "timm, pooled by the mean": (
        vit.timm_vit(act_layer="gelu_tanh", global_pool="avg", init_values=0.5, qk_norm=True),
        "vision_transformer",
        "timm",
    ),
    "timm, DeiT": (vit.timm_vit(DISTILLED), "vision_transformer", "timm"),
    "timm, DeiT III": (vit.timm_vit("deit3_small_patch16_224", qkv_bias=False), "vision_transformer", "timm"),
    "timm, SigLIP": (
        vit.timm_vit("vit_base_patch16_siglip_224", num_classes=5),
        "vision_transformer",
        "timm",
    ),
    "timm, CLIP": (vit.timm_vit("vit_base_patch16_clip_quickgelu_224"), "vision_transformer", "timm"),
    "ViT": (vit.timm_vit(act_layer="quick_gelu", qkv_bias=False), "hf_vit", "ViTForImageClassification"),
    "ViT of transformers": (
        lambda: vit.hf("ViTForImageClassification", intermediate_size=120, hidden_act="relu"),
        "hf_vit",
        "ViTForImageClassification",
    ),
    "ViT without a classifier": (vit.timm_vit(num_classes=0), "hf_vit", "ViTModel"),
    "DeiT": (vit.timm_vit(DISTILLED), "hf_vit", "DeiTForImageClassificationWithTeacher"),
    "DINOv2": (
        vit.timm_vit("vit_small_patch14_dinov2", num_classes=0, mlp_ratio=3, act_layer="gelu_tanh"),
        "hf_dinov2",
        "Dinov2Model",
    ),
    "Llama": (causal(), "llama", "LlamaForCausalLM"),
    "Llama with biases": (causal(**HOOK), "llama", "LlamaForCausalLM"),
    "Llama's linear angles": (scaled(rope_type="linear", factor=3.0), "llama", "LlamaForCausalLM"),
    "Llama's dynamic angles": (scaled(rope_type="dynamic", factor=3.0), "llama", "LlamaForCausalLM"),
    "Llama 3's angles": (scaled(**LLAMA3, original_max_position_embeddings=6), "llama", "LlamaForCausalLM"),
    "Mistral": (causal("MistralForCausalLM", sliding_window=4), "llama", "MistralForCausalLM"),
    "Ministral": (causal("MinistralForCausalLM", sliding_window=4), "llama", "MistralForCausalLM"),
    "Mistral without a window": (causal("MistralForCausalLM"), "llama", "LlamaForCausalLM"),
    "Qwen2": (causal("Qwen2ForCausalLM"), "llama", "Qwen2ForCausalLM"),
    "Qwen3": (causal("Qwen3ForCausalLM"), "llama", "Qwen3ForCausalLM"),
    "GPT-2": (partial(gpt2.gpt2, **SHIFTED, scale_attn_by_inverse_layer_idx=True), "gpt2", "GPT2LMHeadModel"),
    "GPT-2 with another activation": (partial(gpt2.gpt2, activation_function="quick_gelu"), "gpt2", "GPT2LMHeadModel"),
    "GPT-2 without a scale": (partial(gpt2.gpt2, scale_attn_weights=False), "gpt2", "GPT2LMHeadModel"),
    "BERT": (bert.hf(**BUSY), "bert", "BertForPreTraining"),
    "a decoder": (
        bert.hf("BertLMHeadModel", **BUSY, is_decoder=True, add_cross_attention=True),
        "bert",
        "BertLMHeadModel",
    ),
    "BertModel": (bert.hf("BertModel", **BUSY), "bert", "BertModel"),
    "sentences": (bert.hf("BertForSequenceClassification", **BUSY), "bert", "BertForSequenceClassification"),
    "words of a sentence": (bert.hf("BertForTokenClassification", **BUSY), "bert", "BertForTokenClassification"),
    "next sentences": (bert.hf("BertForNextSentencePrediction"), "bert", "BertForNextSentencePrediction"),
    "choices": (bert.hf("BertForMultipleChoice", num_labels=2), "bert", "BertForMultipleChoice"),
    "masked words": (bert.hf("BertForMaskedLM"), "bert", "BertForMaskedLM"),
    "Whisper": (
        whisper.hf(activation_function="relu", scale_embedding=True, decoder_ffn_dim=50, encoder_ffn_dim=70),
        "whisper",
        "WhisperForConditionalGeneration",
    ),
    "Whisper without a head": (whisper.hf("WhisperModel", activation_function="relu"), "whisper", "WhisperModel"),
    "T5's encoder": (t5.hf("T5EncoderModel", feed_forward_proj="gated-silu"), "t5", "T5EncoderModel"),
    "umT5": (t5.hf("UMT5ForConditionalGeneration", gated=False), "t5", "UMT5ForConditionalGeneration"),
    "T5": (t5.hf(gated=False, layer_norm_epsilon=1e-3), "t5", "T5ForConditionalGeneration"),
    "T5 v1.1": (t5.hf(feed_forward_proj="gated-silu"), "t5", "T5ForConditionalGeneration"),
    "mT5": (t5.hf("MT5ForConditionalGeneration"), "t5", "MT5ForConditionalGeneration"),
    "Phi-3": (causal(hidden_act="relu"), "phi3", "Phi3ForCausalLM"),
    "Mixtral": (
        mixture_of_experts.maker("MixtralForCausalLM", **EXPERTS),
        "mixtral",
        "MixtralForCausalLM",
    ),
    "SAM": (sam.hf(layer_norm_eps=1e-3, hidden_act="relu"), "sam", "SamModel"),
    "SAM without a window": (sam.hf(global_attn_indexes=[]), "sam", "SamModel"),
    "SAM with a wide window": (sam.hf(window_size=11), "sam", "SamModel"),
    "Gemma 2": (gemma.maker(rms_norm_eps=1e-3, hidden_activation="gelu"), "gemma", "Gemma2ForCausalLM"),
    "Gemma 3": (gemma.maker("Gemma3ForCausalLM"), "gemma", "Gemma3ForCausalLM"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_owner_opens_the_folder_of_a_model(name, tmp_path):
    make, to, kind = MODELS[name]
    model = make().eval()
    result = keymap.save_checkpoint(model, tmp_path / "out", to)
    assert not result.notes
    options = EAGER if kind.startswith("Gemma") else {}
    assert max_diff(output(opened(kind, tmp_path / "out", **options)), output(model)) < LIMIT
    if to in hubs().hubs:  # the folder is a source like any other
        again = keymap.convert_checkpoint(tmp_path / "out", tmp_path / "again", to)
        assert [note for note in again.notes if "chose model.safetensors" not in note] == []
        config, other = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("out", "again"))
        assert config == other


def test_a_setting_that_a_class_takes_by_itself_would_be_seen(tmp_path):
    for name in ("Llama with biases", "GPT-2", "BERT", "Whisper", "T5"):
        make, to, kind = MODELS[name]
        model, out = make().eval(), tmp_path / name
        keymap.save_checkpoint(model, out, to)
        config = json.loads((out / "config.json").read_text())
        for setting in ("hidden_act", "activation_function", "layer_norm_epsilon"):
            config.pop(setting, None)
        (out / "config.json").write_text(json.dumps(config))
        assert max_diff(output(opened(kind, out)), output(model)) > CLEAR


IDS_OF_TOKENS = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 3}


# --- settings of a file's own configuration ---


def phi3(**options):
    return causal("Phi3ForCausalLM", sliding_window=4, **options)()


OWN = {  # the model whose folder is converted, the format, and the class
    "Phi-3 to Llama": (phi3, "llama", "MistralForCausalLM", {}),
    "Llama 3 to Llama": (
        scaled(**LLAMA3, original_max_position_embeddings=6),
        "llama",
        "LlamaForCausalLM",
        {},
    ),
    "a Qwen2 that does not use its window": (
        causal("Qwen2ForCausalLM", use_sliding_window=False, sliding_window=4),
        "llama",
        "Qwen2ForCausalLM",
        {},
    ),
    "T5 v1.1, which transformers 5 saves as tied": (
        t5.hf(gated=False, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "t5",
        "T5ForConditionalGeneration",
        {},
    ),
    "ViT to timm": (
        lambda: vit.hf("ViTForImageClassification", intermediate_size=120, layer_norm_eps=1e-6, hidden_act="relu"),
        "vision_transformer",
        "timm",
        {"image.architecture": "vit_base_patch16_224"},
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_the_settings_of_a_folder_are_those_of_its_own_configuration(name, tmp_path):
    make, to, kind, facts = OWN[name]
    model = make().eval()
    model.save_pretrained(tmp_path / "theirs")
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "out", to, facts=facts)
    assert max_diff(output(opened(kind, tmp_path / "out")), output(model)) < LIMIT


# --- what a class cannot hold ---

LAYERS = ["full_attention", "sliding_attention", "full_attention"]
LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
}
REFUSED = {  # a model, the format, and what the error says
    "a window of some layers": (
        causal("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "llama",
        "sliding window: 4 in the source, and the format has none",
    ),
    "YaRN": (scaled(rope_type="yarn", factor=4.0), "llama", "yarn in the source, and the format has only default or"),
    "Gemma 1": (causal("GemmaForCausalLM"), "llama", "kind of model: gemma in the source"),
    "RoBERTa": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(vocab_size=99, **bert.SIZE)),
        "bert",
        "kind of model: roberta in the source, and the format has only bert",
    ),
    "a ViT that is pooled by the mean": (
        vit.timm_vit(global_pool="avg", fc_norm=False),
        "hf_vit",
        "pooling: avg in the source, and the format has only token",
    ),
    "an eps that timm has no word for": (
        vit.timm_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3)),
        "vision_transformer",
        "image.eps: the format has no word for '0.001'",
    ),
    "norms after the blocks": (
        vit.timm_vit(block_fn=ResPostBlock, init_values=0.5),
        "vision_transformer",
        "class of the blocks: ResPostBlock in the source, and the format has only Block",
    ),
    "norms after the blocks, in another library": (
        vit.timm_vit(block_fn=ResPostBlock, init_values=None),
        "hf_vit",
        "class of the blocks: ResPostBlock",
    ),
    "an eps before which a norm stands": (
        vit.timm_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3), pre_norm=True),
        "vision_transformer",
        "image.eps: the format has no word for '0.001'",
    ),
    "an eps that is not CLIP's": (
        vit.timm_vit("vit_base_patch16_clip_quickgelu_224", norm_layer=partial(torch.nn.LayerNorm, eps=1e-3)),
        "vision_transformer",
        "image.eps: the format has no word for '0.001'",
    ),
    "projections without biases": (vit.timm_vit(proj_bias=False), "vision_transformer", "no biases of their proj"),
    "norms within the attention": (vit.timm_vit(scale_attn_norm=True), "vision_transformer", "norms within"),
    "norms within the MLP": (vit.timm_vit(scale_mlp_norm=True), "vision_transformer", "norms within"),
    "a norm of the patches": (vit.timm_vit(embed_norm_layer=torch.nn.LayerNorm), "vision_transformer", "norms within"),
    "norms without biases": (vit.timm_vit(norm_layer=timm.layers.RmsNorm), "vision_transformer", "norms have no bias"),
    "no positions": (vit.timm_vit(pos_embed="none"), "vision_transformer", "no position embedding"),
    "a gate": (vit.timm_vit(mlp_layer=timm.layers.SwiGLUPacked), "vision_transformer", "MLP has a gate"),
    "an MLP that no whole ratio gives": (
        vit.timm_vit("vit_small_patch14_dinov2", num_classes=0),
        "hf_dinov2",
        "whole ratios of the MLP only",
    ),
    "Whisper's encoder alone": (whisper.hf("WhisperForAudioClassification"), "whisper", "no layout of a folder"),
    "umT5": (t5.hf("UMT5ForConditionalGeneration"), "t5", "text.tied: false in the source"),
    "a window of some of Ministral's layers": (
        causal("MinistralForCausalLM", sliding_window=4, layer_types=LAYERS),
        "llama",
        "sliding window: full_attention, sliding_attention in the source",
    ),
    "scaled local angles": (
        gemma.maker("Gemma3ForCausalLM", rope_parameters=LOCAL),
        "gemma",
        "scaling of the local rotary angles: linear in the source, and the format has only default",
    ),
    "EmbeddingGemma": (
        gemma.maker("Gemma3ForCausalLM", use_bidirectional_attention=True),
        "gemma",
        "attention in both directions: true in the source, and the format has only false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_owners_class_does_not_have_is_refused(name, tmp_path):
    make, to, words = REFUSED[name]
    with pytest.raises(keymap.PlanError, match=re.escape(words)):
        keymap.save_checkpoint(make(), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_mistral_that_names_no_window_has_that_of_its_class(tmp_path):
    causal("MistralForCausalLM", sliding_window=4)().save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config.pop("sliding_window")
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "out", "llama")
    for folder in ("theirs", "out"):
        assert opened("MistralForCausalLM", tmp_path / folder).config.sliding_window == 4096


FOREIGN = {  # files of another format of the hub, whose config.json names the ids of tokens
    "Phi-3": (causal("Phi3ForCausalLM", **IDS_OF_TOKENS), "llama"),
    "Mixtral": (mixture_of_experts.maker("MixtralForCausalLM", **EXPERTS, **IDS_OF_TOKENS), "mixtral"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("beside", [True, False])
def test_ids_of_tokens_are_those_of_the_sources_configuration(name, beside, tmp_path):
    make, to = FOREIGN[name]
    model, theirs = make(), tmp_path / "theirs"
    theirs.mkdir()
    torch.save(model.state_dict(), theirs / "pytorch_model.bin")
    model.config.save_pretrained(theirs)
    settings = {}
    if not beside:
        (theirs / "config.json").unlink()
        settings = {"text.heads": llama.HEADS, "text.kv_heads": llama.KV_HEADS, "text.kind": to, "text.eps": 1e-5}
        settings |= {"text.activation": "silu", "text.rope_type": "default", "text.rope_base": 5000.0}
        settings |= {"text.active_experts": 2} if to == "mixtral" else {}
    result = keymap.convert_checkpoint(theirs / "pytorch_model.bin", tmp_path / "out", to, facts=settings)
    config, notes = json.loads((tmp_path / "out/config.json").read_text()), "".join(result.notes)
    assert {key: config.get(key) for key in IDS_OF_TOKENS} == (
        IDS_OF_TOKENS if beside else dict.fromkeys(IDS_OF_TOKENS)
    )
    assert all((f"no {key}" in notes) == (not beside) for key in IDS_OF_TOKENS)


def test_settings_that_do_not_agree_with_the_shapes_or_with_each_other(tmp_path):
    causal()().save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    wrong = {
        "text.heads and text.kv_heads do not agree": {"num_attention_heads": config["num_attention_heads"] * 2},
        "text.heads: '0' is no whole number from 1 on": {"num_attention_heads": 0},
        "text.eps: '1e-5' is no positive number": {"rms_norm_eps": "1e-5"},
        "text.window: 'none' is no whole number from 1 on": {"sliding_window": "none", "model_type": "mistral"},
    }
    for words, settings in wrong.items():
        (tmp_path / "theirs/config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(keymap.PlanError, match=re.escape(words)):
            keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "out", "llama")


def test_a_value_that_keymap_has_no_word_for_is_named(tmp_path):
    gpt2.gpt2(activation_function="laplace").save_pretrained(tmp_path / "theirs")
    with pytest.raises(keymap.PlanError, match=r"no word for that of the source \(config.json: .* = laplace\)"):
        keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "out", "gpt2")


@pytest.mark.parametrize(("kind", "to"), [("ViTForImageClassification", "hf_vit"), ("Dinov2Model", "hf_dinov2")])
def test_facts_that_a_vision_model_of_transformers_contradicts(kind, to, tmp_path):
    with pytest.raises(keymap.PlanError, match=r"the source has \w+ \(config of the model: hidden_act"):
        keymap.save_checkpoint(vit.hf(kind), tmp_path / "out", to, facts={"image.activation": "relu"})


def test_a_model_is_told_of_no_configuration_beside_it(tmp_path):
    model = vit.timm_vit()()
    del model.pretrained_cfg, model.default_cfg
    with pytest.raises(keymap.PlanError, match=r"nor the model show image.architecture; pass facts=\{[^}]*\}$"):
        keymap.save_checkpoint(model, tmp_path / "out", "vision_transformer")


def test_a_half_turned_phi3_is_no_llama(tmp_path):
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    causal("Phi3ForCausalLM", rope_parameters=half, head_dim=8)().save_pretrained(tmp_path / "theirs")
    with pytest.raises(keymap.PlanError, match=r"part of a head: 0\.5 in the source, and the format has only 1\.0"):
        keymap.convert_checkpoint(tmp_path / "theirs", tmp_path / "out", "llama")


# --- all of them ---


def test_every_folder_outside_clip_is_opened_here():
    known = hubs()
    others = [known.catalogue(hub) for hub in known.hubs if hub != known.default]
    mappings = [one for catalogue in others for one in (*catalogue.formats, catalogue.hub)]
    have = {one.name for one in mappings if one.repository and not one.repository.none}
    assert have == {to for _, to, _ in MODELS.values()}
    assert have - {row.to for row in FILES.values()} == {"mixtral"}  # whose other formats are those of its own library
