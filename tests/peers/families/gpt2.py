"""transformers' GPT-2, and checkpoints of nanoGPT and Megatron-LM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from peers.common import randomised, tokens
from peers.language_models import hf

from . import Example

HEADS, WIDTH, VOCAB, LAYERS, CONTEXT = 3, 48, 99, 2, 16
SIZE = {
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "activation_function": "gelu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Block(nn.Module):
    """A block with nanoGPT's names."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, bias=bias) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.attn.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.mlp.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.attn.c_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """A model with the names, shapes and arithmetic of nanoGPT's, which is no package: the head is the embedding."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList(Block(bias) for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH, bias=bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x))


def gpt2(kind: str = "GPT2LMHeadModel", seed: int = 0, **options: Any) -> nn.Module:
    return hf(kind, seed, **{**SIZE, **options})


def maker(**options: Any) -> Callable[[], nn.Module]:
    return partial(gpt2, **options)


def nanogpt(bias: bool = True, mask: bool = False) -> Example:
    theirs, ids = randomised(GPT, bias, seed=1), tokens(vocab=VOCAB)
    file = dict(theirs.state_dict())
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for n in range(LAYERS)}
    zeros = {key: torch.zeros(value.shape) for key, value in GPT(True).state_dict().items() if key.endswith(".bias")}
    return Example(
        "nanogpt",
        {**file, **masks} if mask else file,
        maker(),
        "the names and the arithmetic of nanoGPT's model.py",
        outputs=lambda model: [(theirs(ids), model(ids).logits)],
        wrong={
            "more layers": maker(n_layer=3),
            "a longer context": maker(n_positions=20),
            "a smaller MLP": maker(n_inner=100),
            "GPT-J": partial(hf, "GPTJForCausalLM", **SIZE, rotary_dim=4),
        },
        not_written=tuple(masks),
        back=None if bias else {**zeros, **file},
        suffix=".pt",
    )


# --- Megatron-LM ---


def by_hand(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of Megatron-LM in the names of GPT-2, as convert_megatron_gpt2_checkpoint.py makes it.

    That converter was part of transformers up to 4; so this is by hand, and was compared with the one of 4.46.3.
    """
    names = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attention.query_key_value": "attn.c_attn",
        "self_attention.dense": "attn.c_proj",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    words = file["language_model.embedding.word_embeddings.weight"][:VOCAB]
    found = {
        "transformer.wte.weight": words,
        "lm_head.weight": words,
        "transformer.wpe.weight": file["language_model.embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": file["language_model.encoder.final_layernorm.weight"],
        "transformer.ln_f.bias": file["language_model.encoder.final_layernorm.bias"],
    }
    for key, value in file.items():
        if not key.startswith("language_model.encoder.layers."):
            continue
        number, module = key.removeprefix("language_model.encoder.layers.").split(".", 1)
        name, end = module.rsplit(".", 1)
        if name.endswith("query_key_value"):
            value = value.view(HEADS, 3, WIDTH // HEADS, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        found[f"transformer.h.{number}.{names[name]}.{end}"] = value.T if value.ndim == 2 else value
    return found


def megatron_file() -> dict[str, Tensor]:
    """The tensors of a file of Megatron-LM, whose word embeddings have rows of zeros up to 128."""
    generator = torch.Generator().manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    file = {
        "language_model.embedding.word_embeddings.weight": torch.cat([drawn(VOCAB, WIDTH), torch.zeros(29, WIDTH)]),
        "language_model.embedding.position_embeddings.weight": drawn(CONTEXT, WIDTH),
    }
    layers = {"self_attention.query_key_value": (3, 1), "self_attention.dense": (1, 1)}
    layers |= {"mlp.dense_h_to_4h": (4, 1), "mlp.dense_4h_to_h": (1, 4)}
    for at in (f"language_model.encoder.layers.{layer}." for layer in range(LAYERS)):
        for name, (out, into) in layers.items():
            file |= {f"{at}{name}.weight": drawn(out * WIDTH, into * WIDTH), f"{at}{name}.bias": drawn(out * WIDTH)}
        for name in ("input", "post_attention"):
            file |= {f"{at}{name}_layernorm.{end}": drawn(WIDTH) for end in ("weight", "bias")}
    return file | {f"language_model.encoder.final_layernorm.{end}": drawn(WIDTH) for end in ("weight", "bias")}


def megatron() -> Example:
    file = megatron_file()
    return Example(
        "megatron_gpt2",
        file,
        maker(),
        "convert_megatron_gpt2_checkpoint.py of transformers 4, by hand",
        expected=by_hand(file),
        wrong={
            "more layers": maker(n_layer=3),
            "a longer context": maker(n_positions=20),
            "a smaller MLP": maker(n_inner=100),
            "more words than rows": maker(vocab_size=130),
        },
        facts={"text.heads": HEADS, "text.vocab": VOCAB},
        suffix=".pt",
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "megatron_gpt2": megatron,
    "nanogpt": nanogpt,
    "nanogpt without biases": partial(nanogpt, bias=False),
    "nanogpt with a mask": partial(nanogpt, mask=True),
}
ROWS = r"""
megatron_gpt2: q, k and v of all heads, one after the other: differs
- view: (h three k) d -> d (three h k)
+ view: (three h k) d -> d (three h k)
megatron_gpt2: the order of version 1: differs
- view: (h three k) d -> d (three h k)
+ view: (h k three) d -> d (three h k)
megatron_gpt2: the bias as it is: differs
- view: (h three k) -> (three h k)
+ view: r -> r
megatron_gpt2: the square kernel as it is: differs
- (self_attention.dense|mlp.dense_h_to_4h|mlp.dense_4h_to_h).weight: {to: <1:layer>.weight, view: out in -> in out}
+ (mlp.dense_h_to_4h|mlp.dense_4h_to_h).weight: {to: <1:layer>.weight, view: out in -> in out}
+ self_attention.dense.weight: attn.c_proj.weight
megatron_gpt2: the norms swapped: differs
- norm: {input: ln_1, post_attention: ln_2}
+ norm: {input: ln_2, post_attention: ln_1}
megatron_gpt2: all rows of the padded words: refused
- lm_head.weight], take: [0, text.vocab], pad: 128}
+ lm_head.weight]}
nanogpt: the kernels as they are: refused
- (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: \1.weight
nanogpt: the square kernel as it is: differs
- (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ (attn.c_attn|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ attn.c_proj.weight: attn.c_proj.weight
nanogpt: q and k swapped: differs
- (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ (attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ attn.c_attn.weight: {to: attn.c_attn.weight, view: (d three) in -> in (three d), sizes: {three: 3}}
nanogpt: the norms swapped: differs
- (ln_1|ln_2).weight: \1.weight
+ ln_1.weight: ln_2.weight
+ ln_2.weight: ln_1.weight
nanogpt: two biases swapped: differs
- (ln_1|ln_2|attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).bias: \1.bias
+ (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).bias: \1.bias
+ ln_1.bias: ln_2.bias
+ ln_2.bias: ln_1.bias
nanogpt without biases: the square kernel as it is: differs
- (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ (attn.c_attn|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: out in -> in out}
+ attn.c_proj.weight: attn.c_proj.weight
nanogpt with a mask: the mask is taken for a bias: refused
- transformer.h.(\d+).attn.bias: the causal mask, which the model has for torch before 2.0
+ transformer.h.(\d+).attn.masked: the causal mask
"""
