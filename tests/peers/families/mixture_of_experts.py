"""transformers' models with a mixture of experts, and the files that it writes and reads for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peers.language_models import hf, written

from . import Example

HEADS, KV_HEADS, WIDTH, HIDDEN, VOCAB, LAYERS, EXPERTS = 6, 2, 48, 28, 99, 3, 5
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = {"num_local_experts": EXPERTS, "head_dim": 10}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 36}
LATENT = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "head_dim": 10,
}
DENSE_BELOW = {"mlp_only_layers": [0]}  # the first layer has no experts


def moe(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    return hf(kind, seed, **{**SIZE, **options})


def maker(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(moe, kind, **options)


def read_by_transformers(kind: str, file: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """What ``from_pretrained`` makes of a file."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(dict(file), Path(folder) / "model.safetensors", {"format": "pt"})
        model = getattr(transformers, kind).from_pretrained(folder)
    return {key: value.detach() for key, value in model.state_dict().items()}


def example(
    form: str, kind: str, wrong: Mapping[str, Callable[[], nn.Module]], base: str = "", **options: Any
) -> Example:
    """A file that transformers writes, and the model that it makes of it.

    Args:
        form: the format.
        kind: of the model.
        wrong: models that must refuse the file, with those of other sizes.
        base: the class without a head, if the file is one of it.
        options: of the model's configuration.
    """
    name = base or kind
    theirs = moe(name, 1, **options)
    file = written(theirs)
    back = {f"model.{key}": value for key, value in file.items()} if base else None
    if options.get("tie_word_embeddings"):
        back = {**file, "lm_head.weight": file["model.embed_tokens.weight"]}
    others = {
        "fewer layers": maker(name, **{**options, "num_hidden_layers": 2}),
        "more experts": maker(name, **{**options, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6}),
    }
    if "Deepseek" not in name:  # its keys and values are not of heads
        others["more key heads"] = maker(name, **{**options, "num_key_value_heads": 3})
    return Example(
        form,
        file,
        maker(name, **options),
        f"transformers {name}.from_pretrained",
        expected=read_by_transformers(name, file, theirs.config),
        wrong={**others, **wrong},
        back=back,
    )


def multi_token() -> Example:
    """A file of DeepSeek-V3 with one more layer, which predicts a further token; transformers does not load it."""
    made = example("qwen_moe", "DeepseekV3ForCausalLM", DENSE, **QWEN, **LATENT)
    last, at = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    more = {key.replace(last, at): value + 1 for key, value in made.file.items() if key.startswith(last)}
    for name in ("embed_tokens", "shared_head.head"):
        more[f"{at}{name}.weight"] = torch.rand(VOCAB, WIDTH)
    more |= {f"{at}{name}.weight": torch.rand(WIDTH) for name in ("enorm", "hnorm", "shared_head.norm")}
    more[f"{at}eh_proj.weight"] = torch.rand(WIDTH, 2 * WIDTH)
    file = {**made.file, **more}
    config = made.model().config
    expected = read_by_transformers("DeepseekV3ForCausalLM", file, config)
    return replace(made, file=file, expected=expected, not_written=tuple(more))


DENSE = {"a dense model": maker("LlamaForCausalLM")}
QWEN2, QWEN3 = ({name: maker(f"{name}MoeForCausalLM", **QWEN)} for name in ("Qwen2", "Qwen3"))
EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "mixtral": partial(example, "mixtral", "MixtralForCausalLM", {**DENSE, **QWEN3}, **MIXTRAL),
    "mixtral tied": partial(example, "mixtral", "MixtralForCausalLM", DENSE, tie_word_embeddings=True, **MIXTRAL),
    "mixtral base": partial(example, "mixtral", "MixtralForCausalLM", DENSE, "MixtralModel", **MIXTRAL),
    "qwen_moe Qwen2": partial(example, "qwen_moe", "Qwen2MoeForCausalLM", {**DENSE, **QWEN3}, **QWEN),
    "qwen_moe Qwen2, a layer without experts": partial(
        example, "qwen_moe", "Qwen2MoeForCausalLM", {**DENSE, **QWEN2}, **QWEN, **DENSE_BELOW
    ),
    "qwen_moe Qwen3": partial(example, "qwen_moe", "Qwen3MoeForCausalLM", {**DENSE, **QWEN2}, **QWEN, head_dim=10),
    **{
        f"qwen_moe {name}": partial(example, "qwen_moe", f"{name}ForCausalLM", DENSE, **QWEN, **LATENT)
        for name in ("Olmoe", "DeepseekV2", "DeepseekV3", "Glm4Moe", "Dots1")
    },
    "qwen_moe a layer for multi-token prediction": multi_token,
}
ROWS = r"""
mixtral: gate and up swapped: differs
- experts.(\d+).(w1|w3).weight
+ experts.(\d+).(w3|w1).weight
mixtral: gate and up mixed row by row: differs
- then: e two f d -> e (two f) d
+ then: e two f d -> e (f two) d
mixtral: up and down swapped: refused
- experts.(\d+).(w1|w3).weight
+ experts.(\d+).(w1|w2).weight
- experts.(\d+).w2.weight
+ experts.(\d+).w3.weight
mixtral: the norms swapped: differs
- (input|post_attention)_layernorm.weight: \1_layernorm.weight
+ input_layernorm.weight: post_attention_layernorm.weight
+ post_attention_layernorm.weight: input_layernorm.weight
mixtral tied: gate and up swapped: differs
- experts.(\d+).(w1|w3).weight
+ experts.(\d+).(w3|w1).weight
mixtral base: gate and up swapped: differs
- experts.(\d+).(w1|w3).weight
+ experts.(\d+).(w3|w1).weight
qwen_moe Qwen2: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe Qwen2: gate and up mixed row by row: differs
- then: e two f d -> e (two f) d
+ then: e two f d -> e (f two) d
qwen_moe Qwen2, a layer without experts: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe Qwen3: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe Olmoe: gate and up mixed row by row: differs
- then: e two f d -> e (two f) d
+ then: e two f d -> e (f two) d
qwen_moe DeepseekV2: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe DeepseekV3: the norms of the latents swapped: refused
- self_attn.(q|kv)_a_layernorm.weight: {to: self_attn.\1_a_layernorm.weight, optional: true}
+ self_attn.q_a_layernorm.weight: {to: self_attn.kv_a_layernorm.weight, optional: true}
+ self_attn.kv_a_layernorm.weight: {to: self_attn.q_a_layernorm.weight, optional: true}
qwen_moe a layer for multi-token prediction: not counted from the last layer: refused
- multi_token.<1-text.layers>.\2
+ multi_token.\1.\2
qwen_moe a layer for multi-token prediction: all layers are the model's: refused
- (\d+>=text.layers)
+ (\d+>=9)
qwen_moe a layer for multi-token prediction: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe Glm4Moe: gate and up swapped: differs
- (\d+).(gate|up)_proj.weight
+ (\d+).(up|gate)_proj.weight
qwen_moe Dots1: the norms of q and k swapped: differs
- self_attn.(q|k)_norm.weight: {to: self_attn.\1_norm.weight, optional: true}
+ self_attn.q_norm.weight: {to: self_attn.k_norm.weight, optional: true}
+ self_attn.k_norm.weight: {to: self_attn.q_norm.weight, optional: true}
"""
