"""Tiny models of transformers with random weights, for every class whose files transformers converts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

# What makes a model small, by the name of the setting. All numbers differ where a swap of two could hide.
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 56,
    "ffn_dim": 56,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "max_position_embeddings": 64,
    "depth": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "pad_token_id": 0,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "ffn_hidden_size": 56,
    "expert_ffn_hidden_size": 20,
    "hidden_dim": 32,
    "text_hidden_size": 32,
    "out_hidden_size": 32,
    "projection_hidden_dim": 40,
    "downsample_hidden_size": 16,
    "o_lora_rank": 12,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 56,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "num_filters": 4,
    "num_quantizers": 3,
    "codebook_size": 16,
    "base_channels": 32,
}

_STAGES = ["stage2", "stage3", "stage4"]
_RT_DETR: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44,
    "backbone_config": {
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 2, 1, 1],
        "out_features": _STAGES,
    },
}
_HGNET: dict[str, Any] = _RT_DETR | {
    "backbone_config": {
        "stem_channels": [3, 4, 6],
        "stage_in_channels": [6, 8, 10, 12],
        "stage_mid_channels": [4, 4, 5, 5],
        "stage_out_channels": [8, 10, 12, 14],
        "hidden_sizes": [8, 10, 12, 14],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 1, 1, 1],
        "out_features": _STAGES,
    },
}
_SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4]}
_SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
_SAM3 = {"vision_config": {"fpn_hidden_size": 32}}
_DPT = {"neck_hidden_sizes": [8, 10, 12, 14], "fusion_hidden_size": 16}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_HUNYUAN = {"head_dim": 8}
_OMNI = {"shared_expert_intermediate_size": 28}
_DOTS3 = {
    "layer_types": ["full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
}
_DOTS3_VISION = {**_SPARSE, "adapter_in_dim": 32, "adapter_out_dim": 32}
_DOTS3_AUDIO = {"adapter_input_size": 32, "adapter_out_dim": 32}
_DETR = {"backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}}
_DETR_MASKS = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1] * 4,
        "out_indices": [1, 2, 3, 4],
    },
    "d_model": 64,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
}
_SEGMENTER = {
    "upsample_out_channels": [8, 10],
    "upsample_kernel_sizes": [4, 4],
    "conv_out_channels": [6, 5],
    "conv_kernel_sizes": [1, 1],
}
_SAPIENS = {"head_config": _SEGMENTER}
_SPEECH = {"encoder_config": {"num_layers": 2, "hidden_dim": 32, "num_heads": 4}}
_VIBE = {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 4, "hidden_size": 8}
_VIBE = {"acoustic_tokenizer_encoder_config": _VIBE, "semantic_tokenizer_encoder_config": _VIBE}
_QWEN2_VL = {"vision_config": {"embed_dim": 32, "hidden_size": 32, "num_heads": 4, "depth": 2}}
_EMU3 = {
    "vocabulary_map": {"<image>": 3},
    "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32, "attn_resolutions": [0]},
}
_INKLING: dict[str, Any] = {"vision_config": {"patch_size": 4, "num_hidden_layers": 2}}
_GLM5 = {"num_key_value_heads": 4, **_SPARSE}

# What single classes need besides: arguments of their configuration.
MORE: dict[str, dict[str, Any]] = {
    "BeamForCausalLM": _SPARSE,
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "ColQwen2ForRetrieval": {"vlm_config": _QWEN2_VL},
    "ConditionalDetrForSegmentation": _DETR_MASKS,
    "ConditionalDetrModel": _DETR,
    "DeformableDetrForObjectDetection": _DETR,
    "DetrForSegmentation": _DETR_MASKS,
    "DetrModel": _DETR,
    "DFineForObjectDetection": _HGNET,
    "DINOv3ConvNextBackbone": {"hidden_sizes": [8, 12], "depths": [1, 2]},
    "DeepseekOcr2ForConditionalGeneration": {"text_config": _SPARSE},
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_routed_experts": 6},
    "Dots3NoteForConditionalGeneration": {
        "text_config": _DOTS3,
        "vision_config": _DOTS3_VISION,
        "audio_config": _DOTS3_AUDIO,
    },
    "Dots3NoteModel": {"text_config": _DOTS3, "vision_config": _DOTS3_VISION, "audio_config": _DOTS3_AUDIO},
    "Dots3NoteTextModel": _DOTS3,
    "Emu3ForConditionalGeneration": _EMU3,
    "Emu3Model": _EMU3,
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "EsmForMaskedLM": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Glm5NextForConditionalGeneration": {"text_config": _GLM5},
    "Glm5NextTextModel": _GLM5,
    "FlintForCausalLM": {"mlp_only_layers": [0]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 99},
    "GradiumPhononTTSForConditionalGeneration": {"num_key_value_heads": 4, "flow_head_config": {"condition_dim": 32}},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "GraniteSpeechForConditionalGeneration": _SPEECH,
    "GraniteSpeechModel": _SPEECH,
    "GraniteSpeechPlusForConditionalGeneration": _SPEECH,
    "GraniteSpeechPlusModel": _SPEECH,
    "HunYuanMoEV1ForCausalLM": _HUNYUAN,
    "HunYuanVLForConditionalGeneration": {"text_config": _HUNYUAN},
    "Kimi_K25ForConditionalGeneration": {"text_config": {"first_k_dense_replace": 1}},
    "Inkling2ForCausalLM": {"num_hidden_layers": 3},
    "InklingForConditionalGeneration": _INKLING,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"zero_expert_num": 3},
    "MaskFormerForInstanceSegmentation": {
        "backbone_config": {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [2, 2, 4, 4]}
    },
    "MimiDecoderModel": {"upsample_groups": 32},
    "MimiModel": {"upsample_groups": 32},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [0, 1], "text_hidden_size": 32}},
    "NemotronH_Omni_Reasoning_V3": {
        "vision_config": {"video_temporal_patch_size": 2},
        "projector_hidden_size": 40,
    },
    "Nemotron3_5TranscribeForConditionalGeneration": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {
                "head_config": {"audio_hidden_size": 32},
                "audio_config": {"num_key_value_heads": 4},
            },
        },
        "word_timestamp_config": {"blank_token_id": 98, "num_key_value_heads": 4},
    },
    "PPDocLayoutV2ForObjectDetection": _HGNET,
    "PPDocLayoutV3ForObjectDetection": _HGNET,
    "PPDocLayoutV4ForObjectDetection": _HGNET,
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2VLModel": _QWEN2_VL,
    "Qwen3OmniMoeForConditionalGeneration": {
        "talker_config": {"text_config": _OMNI, "spatial_merge_size": 2},
        "code2wav_config": {"decoder_dim": 64},
    },
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
    "Sapiens2ForImageMatting": _SAPIENS,
    "Sapiens2ForNormalEstimation": _SAPIENS,
    "Sapiens2ForPointmapEstimation": _SAPIENS,
    "Sapiens2ForPoseEstimation": _SAPIENS,
    "Sapiens2ForSemanticSegmentation": _SAPIENS,
    "Step3p7ForConditionalGeneration": {"text_config": _SPARSE},
    "Sam3TrackerModel": _SAM3,
    "Sam3TrackerVideoModel": _SAM3,
    "SegformerForSemanticSegmentation": _SEGFORMER,
    "SegformerModel": _SEGFORMER,
    "SwinBackbone": _SWIN,
    "SwinForImageClassification": _SWIN,
    "TimmWrapperForImageClassification": {"architecture": "test_resnet"},
    "Tipsv2DptForDepthEstimation": _DPT,
    "Tipsv2DptForNormalEstimation": _DPT,
    "Tipsv2DptForSemanticSegmentation": _DPT,
    "VibeVoiceAsrForConditionalGeneration": _VIBE,
    "VibeVoiceAsrModel": _VIBE,
}

# Other configurations of a class: a name, and what differs.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "Dinov2Backbone": {"swiglu": {"use_swiglu_ffn": True}},
    "Dinov2Model": {"swiglu": {"use_swiglu_ffn": True}},
    "Dinov2WithRegistersBackbone": {"swiglu": {"use_swiglu_ffn": True}},
    "Dinov2WithRegistersModel": {"swiglu": {"use_swiglu_ffn": True}},
    "InklingForConditionalGeneration": {
        "dense": {**_INKLING, "text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    },
    "Qwen4ExpForCausalLM": {
        "ngram": {
            "ple_layer_ids": [1],
            "eos_token_id": 2,
            "ngram_vocab_size_base": 40,
            "split_ngram_parts": 4,
            "heads_per_ngram": 2,
        },
    },
    "Tipsv2VisionBackbone": {"swiglu": {"use_swiglu_ffn": True}},
    "Tipsv2VisionModel": {"swiglu": {"use_swiglu_ffn": True}},
}

MOST = 12_000_000  # elements of a tiny model


def config_of(kind: Any, variant: str = "") -> Any:
    """A small configuration of a model's class."""
    more = VARIANTS[kind.__name__][variant] if variant else MORE.get(kind.__name__, {})
    return small(kind.config_class, more)


def small(kind: Any, more: dict[str, Any]) -> Any:
    """A small configuration; the configurations within it are small, too."""
    plain = dict(more)
    try:
        default = kind()
    except ValueError:
        default = kind(**{name: value for name, value in plain.items() if not isinstance(value, dict)})
    settings: dict[str, Any] = {}
    for name, value in SMALL.items():
        own = not isinstance(getattr(kind, name, None), property) and name not in getattr(kind, "attribute_map", {})
        if own and isinstance(_setting(default, name), int):
            settings[name] = value
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig) and "model_type" not in plain.get(name, {}):
            settings[name] = small(type(inner), plain.pop(name, {}))
    return kind(**(settings | plain))


def _setting(config: Any, name: str) -> Any:
    """A setting; None where it differs from layer to layer, or does not exist."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def tiny(name: str, variant: str = "") -> Any:
    """A small model with random weights. It computes nothing: buffers that no file holds have no values."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(config_of(kind, variant))
    size = sum(value.numel() for value in model.state_dict().values())
    assert size < MOST, f"{name} has {size:,} elements"
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return randomised(model.eval())


@torch.no_grad()
def randomised(model: Any) -> Any:
    seen = set()
    for value in model.state_dict().values():
        if value.data_ptr() in seen and value.numel():
            continue
        seen.add(value.data_ptr())
        if value.is_floating_point():
            value.normal_()
        elif value.dtype != torch.bool:
            value.random_(0, 50)
    return model
