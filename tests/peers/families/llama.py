"""transformers' Llama and its siblings, and files of Meta, torchtune, torchtitan, InternLM2 and Phi-3."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from peers.common import randomised, tokens
from peers.language_models import bare, hf, written

from . import Example

HEADS, KV_HEADS, WIDTH, HIDDEN, VOCAB, LAYERS = 6, 2, 48, 140, 99, 3
FACTS = {"text.heads": HEADS, "text.kv_heads": KV_HEADS}
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_window": None,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 10}  # a head of another width than that of the model by the number of heads


def llama(kind: str = "LlamaForCausalLM", seed: int = 0, **options: Any) -> nn.Module:
    return hf(kind, seed, **{**SIZE, **options})


def maker(kind: str = "LlamaForCausalLM", **options: Any) -> Callable[[], nn.Module]:
    return partial(llama, kind, **options)


def others(**options: Any) -> dict[str, Callable[[], nn.Module]]:
    """Models that must refuse a file of `SIZE`."""
    return {
        "Phi-3": maker("Phi3ForCausalLM", **options),
        "more key heads": maker(num_key_value_heads=3, **options),
        "fewer layers": maker(num_hidden_layers=2, **options),
        "Qwen2": maker("Qwen2ForCausalLM", **options),
    }


# --- Meta ---


class Parallel(nn.Linear):
    """A layer of fairscale on one device; fairscale itself needs a build and a process group."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)


class Table(nn.Embedding):
    def __init__(self, rows: int, width: int, **_: Any) -> None:
        super().__init__(rows, width)


def meta(seed: int = 1, scaled: bool = False) -> nn.Module:
    """Meta's own model, with its complex rotary angles."""
    parallel = {
        "fairscale": ModuleType("fairscale"),
        "fairscale.nn": ModuleType("fairscale.nn"),
        "fairscale.nn.model_parallel": ModuleType("fairscale.nn.model_parallel"),
        "fairscale.nn.model_parallel.initialize": SimpleNamespace(get_model_parallel_world_size=lambda: 1),
        "fairscale.nn.model_parallel.layers": SimpleNamespace(
            ColumnParallelLinear=Parallel, RowParallelLinear=Parallel, VocabParallelEmbedding=Table
        ),
    }
    with patch.dict(sys.modules, parallel), bare("llama_models", "llama_models.llama3"):
        model = import_module("llama_models.llama3.model")
        size = model.ModelArgs(
            dim=WIDTH,
            n_layers=LAYERS,
            n_heads=HEADS,
            n_kv_heads=KV_HEADS,
            vocab_size=VOCAB,
            multiple_of=20,  # makes HIDDEN
            rope_theta=5000.0,
            use_scaled_rope=scaled,
            max_batch_size=3,
            max_seq_len=16,
        )
        return randomised(model.Transformer, size, seed=seed)


def meta_llama(tied: bool = False) -> Example:
    theirs, ids = meta(), tokens(vocab=VOCAB)
    file = dict(theirs.state_dict())
    if tied:  # as in Llama 3.2 1B and 3B
        theirs.output.weight = theirs.tok_embeddings.weight
        del file["output.weight"]
    else:
        file["rope.freqs"] = torch.rand(4)
    return Example(
        "meta_llama",
        file,
        maker(tie_word_embeddings=tied),
        "llama_models Transformer",
        outputs=lambda model: [(theirs(ids, 0).clone(), model(ids).logits)],
        wrong=others(tie_word_embeddings=tied) | ({"a head of its own": maker()} if tied else {}),
        facts=FACTS,
        not_written=("rope.freqs",),
        back={**file, "output.weight": file["tok_embeddings.weight"]} if tied else None,
        suffix=".pth",
    )


# --- Phi-3 ---


def phi3(kind: str = "Phi3ForCausalLM", base: bool = False, **options: Any) -> Example:
    theirs, ids = llama(kind, 1, **WIDE, **options), tokens(vocab=VOCAB)
    file = written(theirs)
    back = {f"model.{key}": value for key, value in file.items()} if base else None
    if options.get("tie_word_embeddings"):
        back = {**file, "lm_head.weight": file["model.embed_tokens.weight"]}

    def outputs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return [(theirs(ids)[0], model(ids)[0])]

    return Example(
        "phi3",
        file,
        maker("LlamaModel" if base else "LlamaForCausalLM", **WIDE, **options),
        f"transformers {kind}",
        outputs=outputs,
        wrong={name: make for name, make in others(**WIDE, **options).items() if name != "Phi-3"},
        facts=FACTS,
        back=back,
    )


# --- torchtune and torchtitan: their own converters from transformers ---


def converted(form: str, kind: str, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], peer: str) -> Example:
    """A file that the other library's converter makes of a model of transformers."""
    theirs = llama(kind, 1, **WIDE)
    state = {key: value.detach() for key, value in theirs.state_dict().items()}
    wrong = others(**WIDE)
    if kind == "Qwen2ForCausalLM":
        wrong["Llama"] = wrong.pop("Qwen2")  # the same sizes
        wrong["Llama"] = maker(**WIDE)
    return Example(form, convert(dict(state)), maker(kind, **WIDE), peer, expected=state, wrong=wrong, facts=FACTS)


def torchtune(kind: str = "LlamaForCausalLM") -> Example:
    with bare("torchtune", "torchtune.models", "torchtune.models.qwen2"):
        if kind == "Qwen2ForCausalLM":
            convert = import_module("torchtune.models.qwen2._convert_weights").qwen2_hf_to_tune
        else:
            convert = import_module("torchtune.models.convert_weights").hf_to_tune
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": WIDTH, "head_dim": WIDE["head_dim"]}
    return converted("torchtune_llama", kind, partial(convert, **sizes), f"torchtune {convert.__name__}")


def torchtitan(kind: str = "LlamaForCausalLM") -> Example:
    """By torchtitan's adapter alone: its models need kernels and a process group, its adapters read a configuration."""
    family, name = ("qwen3", "Qwen3") if kind == "Qwen3ForCausalLM" else ("llama3", "Llama3")
    packages = (
        "torchtitan",
        "torchtitan.models",
        "torchtitan.models.common",
        f"torchtitan.models.{family}",
        "torchtitan.protocols",
        "torchtitan.tools",
    )
    rope = SimpleNamespace(ComplexRoPE=SimpleNamespace(Config=object), CosSinRoPE=SimpleNamespace(Config=object))
    absent = {
        "torchtitan.models.common.rope": rope,
        "torchtitan.models.utils": MagicMock(),
        "torchtitan.protocols.model": MagicMock(),
        "torchtitan.tools.logging": MagicMock(),
        f"torchtitan.models.{family}.model": MagicMock(),
    }
    with bare(*packages), patch.dict(sys.modules, absent):
        base = import_module("torchtitan.protocols.state_dict_adapter").StateDictAdapter
        absent["torchtitan.models.utils"].MoEStateDictAdapter = base
        adapter = getattr(import_module(f"torchtitan.models.{family}.state_dict_adapter"), f"{name}StateDictAdapter")
    attention = SimpleNamespace(n_heads=HEADS, n_kv_heads=KV_HEADS, rope=None, **WIDE)
    layers = [SimpleNamespace(attention=attention, moe=None)]
    config = SimpleNamespace(dim=WIDTH, enable_weight_tying=False, layers=layers)
    return converted("torchtitan_llama", kind, adapter(config, None).from_hf, f"torchtitan {name}StateDictAdapter")


# --- InternLM2 ---


def by_groups(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of InternLM2 in the names of Llama, by hand.

    InternLM2's code is no package. Its modeling_internlm2.py views what wqkv computes as [group, 2 + g, head]: first
    the g heads of q, then one of k and one of v. All other layers are Llama's, the rotary angles too.
    """
    other = {
        "model.tok_embeddings": "model.embed_tokens",
        "model.norm": "model.norm",
        "output": "lm_head",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    found = {}
    for key, value in state.items():
        module, end = key.rsplit(".", 1)
        at = ".".join(module.split(".")[:3]) + "." if module.startswith("model.layers.") else ""
        if module.endswith("wqkv"):
            groups = value.view(KV_HEADS, 2 + HEADS // KV_HEADS, -1, *value.shape[1:])
            for name, part in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
                found[f"{at}self_attn.{name}_proj.{end}"] = part.reshape(-1, *value.shape[1:])
        else:
            found[f"{at}{other[module.removeprefix(at)]}.{end}"] = value
    return found


def internlm2(bias: bool = False, base: bool = False) -> Example:
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (HEADS + 2 * KV_HEADS) * WIDTH // HEADS
    file = {"model.tok_embeddings.weight": drawn(VOCAB, WIDTH), "model.norm.weight": drawn(WIDTH)}
    for at in (f"model.layers.{layer}." for layer in range(LAYERS)):
        file |= {
            f"{at}attention.wqkv.weight": drawn(rows, WIDTH),
            f"{at}attention.wo.weight": drawn(WIDTH, WIDTH),
            f"{at}feed_forward.w1.weight": drawn(HIDDEN, WIDTH),
            f"{at}feed_forward.w2.weight": drawn(WIDTH, HIDDEN),
            f"{at}feed_forward.w3.weight": drawn(HIDDEN, WIDTH),
            f"{at}attention_norm.weight": drawn(WIDTH),
            f"{at}ffn_norm.weight": drawn(WIDTH),
        }
        if bias:
            file |= {f"{at}attention.wqkv.bias": drawn(rows), f"{at}attention.wo.bias": drawn(WIDTH)}
    expected = by_groups(file)
    if base:
        expected = {key.removeprefix("model."): value for key, value in expected.items()}
    else:
        file["output.weight"] = drawn(VOCAB, WIDTH)
        expected["lm_head.weight"] = file["output.weight"]
    return Example(
        "internlm2",
        {key.removeprefix("model."): value for key, value in file.items()} if base else file,
        maker("LlamaModel" if base else "LlamaForCausalLM", attention_bias=bias),
        "the formula of modeling_internlm2.py, by hand",
        expected=expected,
        wrong=others(attention_bias=bias),
        facts=FACTS,
        back=file if base else None,
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "meta_llama": meta_llama,
    "meta_llama tied": partial(meta_llama, tied=True),
    "internlm2": internlm2,
    "internlm2 biases": partial(internlm2, bias=True),
    "internlm2 base": partial(internlm2, base=True),
    "phi3": phi3,
    "phi3 tied": partial(phi3, tie_word_embeddings=True),
    "phi3 base": partial(phi3, "Phi3Model", base=True),
    "torchtune_llama": torchtune,
    "torchtune_llama Mistral": partial(torchtune, "MistralForCausalLM"),
    "torchtune_llama Qwen2": partial(torchtune, "Qwen2ForCausalLM"),
    "torchtitan_llama": torchtitan,
    "torchtitan_llama Qwen3": partial(torchtitan, "Qwen3ForCausalLM"),
}
ROWS = r"""
meta_llama: the rows of q are not permuted: differs
- attention.wq.weight: {to: self_attn.q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ attention.wq.weight: self_attn.q_proj.weight
meta_llama: the rows of k are not permuted: differs
- view: (h p two) d -> (h two p) d, sizes: {h: text.kv_heads, two: 2}
+ view: r d -> r d
meta_llama: k is permuted by the heads of q: refused
- sizes: {h: text.kv_heads, two: 2}
+ sizes: {h: text.heads, two: 2}
meta_llama: the permutation is that of the way back: differs
- self_attn.q_proj.weight, view: (h p two) d -> (h two p) d
+ self_attn.q_proj.weight, view: (h two p) d -> (h p two) d
meta_llama: gate and up swapped: differs
- mlp: {1: gate, 2: down, 3: up}
+ mlp: {1: up, 2: down, 3: gate}
meta_llama: the norms swapped: differs
- norm: {attention: input, ffn: post_attention}
+ norm: {attention: post_attention, ffn: input}
meta_llama: embedding and head swapped: differs
- tok_embeddings.weight: model.embed_tokens.weight
+ tok_embeddings.weight: lm_head.weight
- output.weight: {to: lm_head.weight, optional: true}
+ output.weight: model.embed_tokens.weight
meta_llama: k and v swapped: differs
- attention.wk.weight: {to: self_attn.k_proj.weight
+ attention.wk.weight: {to: self_attn.v_proj.weight
- attention.w(v|o).weight: self_attn.\1_proj.weight
+ attention.wv.weight: self_attn.k_proj.weight
+ attention.wo.weight: self_attn.o_proj.weight
meta_llama tied: the rows of q are not permuted: differs
- attention.wq.weight: {to: self_attn.q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ attention.wq.weight: self_attn.q_proj.weight
internlm2: k and v swapped: differs
- self_attn.(q|k|v)_proj.weight
+ self_attn.(q|v|k)_proj.weight
internlm2: all heads of q first, as in Phi-3: differs
- view: (n x) d -> n x d
+ view: (n x) d -> (n x) d
- axis: x
+ axis: 0
- each: n x d -> (n x) d
+ each: r d -> r d
internlm2: q and k have each other's heads: refused
- [text.heads, text.kv_heads, text.kv_heads]
+ [text.kv_heads, text.heads, text.kv_heads]
internlm2: as many groups as heads of q: refused
- sizes: {n: text.kv_heads}
+ sizes: {n: text.heads}
internlm2: gate and up swapped: differs
- mlp: {1: gate, 2: down, 3: up}
+ mlp: {1: up, 2: down, 3: gate}
internlm2: the norms swapped: differs
- norm: {attention: input, ffn: post_attention}
+ norm: {attention: post_attention, ffn: input}
internlm2 biases: the biases of k and v swapped: differs
- self_attn.(q|k|v)_proj.bias
+ self_attn.(q|v|k)_proj.bias
internlm2 base: the rows of a head mixed: differs
- each: n x d -> (n x) d
+ each: n x d -> (x n) d
phi3: k and v swapped: differs
- self_attn.(q|k|v)_proj.weight
+ self_attn.(q|v|k)_proj.weight
phi3: cut without facts: refused
- split: [text.heads, text.kv_heads, text.kv_heads]
+ split: [1, 1, 1]
phi3: q and k have each other's heads: refused
- split: [text.heads, text.kv_heads, text.kv_heads]
+ split: [text.kv_heads, text.heads, text.kv_heads]
phi3: gate and up swapped: differs
- mlp.(gate|up)_proj.weight, split
+ mlp.(up|gate)_proj.weight, split
phi3: the norms swapped: differs
- (input|post_attention)_layernorm.weight: \1_layernorm.weight
+ input_layernorm.weight: post_attention_layernorm.weight
+ post_attention_layernorm.weight: input_layernorm.weight
phi3 tied: gate and up swapped: differs
- mlp.(gate|up)_proj.weight, split
+ mlp.(up|gate)_proj.weight, split
phi3 base: k and v swapped: differs
- self_attn.(q|k|v)_proj.weight
+ self_attn.(q|v|k)_proj.weight
torchtune_llama: the rows of q are not permuted: differs
- {to: q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ q_proj.weight
torchtune_llama: the rows of k are not permuted: differs
- {to: k_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.kv_heads, two: 2}}
+ k_proj.weight
torchtune_llama: the permutation is that of the way back: differs
- {to: k_proj.weight, view: (h p two) d -> (h two p) d
+ {to: k_proj.weight, view: (h two p) d -> (h p two) d
torchtune_llama: gate and up swapped: differs
- mlp: {1: gate, 2: down, 3: up}
+ mlp: {1: up, 2: down, 3: gate}
torchtune_llama Mistral: the norms swapped: differs
- norm: {sa: input, mlp: post_attention}
+ norm: {sa: post_attention, mlp: input}
torchtune_llama Qwen2: the rows of q permuted as in Llama: differs
- (q|k)_proj.weight: \1_proj.weight
+ q_proj.weight: {to: q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ k_proj.weight: k_proj.weight
torchtune_llama Qwen2: the biases of k and v swapped: differs
- (q|k|v)_proj.bias: \1_proj.bias
+ q_proj.bias: q_proj.bias
+ k_proj.bias: v_proj.bias
+ v_proj.bias: k_proj.bias
torchtitan_llama: the rows of q are not permuted: differs
- {to: q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ q_proj.weight
torchtitan_llama: the rows of k are not permuted: differs
- {to: k_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.kv_heads, two: 2}}
+ k_proj.weight
torchtitan_llama: the norms swapped: differs
- norm: {attention: input, ffn: post_attention}
+ norm: {attention: post_attention, ffn: input}
torchtitan_llama Qwen3: the norms of q and k swapped: differs
- (q|k)_norm.weight: \1_norm.weight
+ q_norm.weight: k_norm.weight
+ k_norm.weight: q_norm.weight
torchtitan_llama Qwen3: the rows of q permuted as in Llama: differs
- qkv_linear.w(q|k).weight: \1_proj.weight
+ qkv_linear.wq.weight: {to: q_proj.weight, view: (h p two) d -> (h two p) d, sizes: {h: text.heads, two: 2}}
+ qkv_linear.wk.weight: k_proj.weight
"""
