"""transformers' Gemma 2 and 3, and checkpoints of TensorRT-LLM, MaxText and Google's gemma_pytorch.

None of the three libraries is a package that runs here: TensorRT-LLM needs CUDA, the other two are not published as
packages. `Decoder` is the computation that their code describes, written anew; each library's class below says which
tensors it takes, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from peers.common import tokens
from peers.language_models import hf

from . import Example, State

HEADS, KV_HEADS, HEAD, WIDTH, HIDDEN, VOCAB, LAYERS, WINDOW, SCALE = 6, 2, 10, 48, 140, 99, 4, 5, 20
LOCAL = {2: (True, False, True, False), 3: (True, True, False, True)}  # whether a layer has a window
BASES = {2: (5000.0, 5000.0), 3: (300.0, 5000.0)}  # of the rotary angles of a layer with a window, and of one without
ATTENTION_CAP, FINAL_CAP = 4.0, 6.0  # of Gemma 2
FACTS = {"text.heads": HEADS, "text.kv_heads": KV_HEADS}
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 32,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": SCALE,
    "attn_implementation": "eager",  # the only one that caps the attention
    "pad_token_id": 0,
}
OF = {
    2: {
        "attn_logit_softcapping": ATTENTION_CAP,
        "final_logit_softcapping": FINAL_CAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": BASES[2][1]},
    },
    3: {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": BASES[3][0]},
            "full_attention": {"rope_type": "default", "rope_theta": BASES[3][1]},
        }
    },
}
NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def gemma(kind: str = "Gemma2ForCausalLM", seed: int = 0, **options: Any) -> nn.Module:
    release = 3 if "3" in kind else 2
    if "num_hidden_layers" not in options:
        types = ["sliding_attention" if local else "full_attention" for local in LOCAL[release]]
        options = {"layer_types": types, **options}
    return hf(kind, seed, **{**SIZE, **OF[release], **options})


def maker(kind: str = "Gemma2ForCausalLM", **options: Any) -> Callable[[], nn.Module]:
    return partial(gemma, kind, **options)


def others(release: int) -> dict[str, Callable[[], nn.Module]]:
    """Models that must refuse a file of Gemma 2 or of Gemma 3."""
    own = f"Gemma{release}ForCausalLM"
    plain = {name: value for name, value in SIZE.items() if name not in ("query_pre_attn_scalar", "sliding_window")}
    return {
        "the other Gemma": maker(f"Gemma{5 - release}ForCausalLM"),
        "Gemma 1": partial(hf, "GemmaForCausalLM", **plain),
        "Llama": partial(hf, "LlamaForCausalLM", **plain),
        "Qwen3": partial(hf, "Qwen3ForCausalLM", **plain),
        "more key heads": maker(own, num_key_value_heads=3),
        "wider heads": maker(own, head_dim=12),
        "fewer layers": maker(own, num_hidden_layers=2),
        "more layers": maker(own, num_hidden_layers=6),
    }


# --- the computation ---


def root_mean_square(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, base: float) -> Tensor:
    """x [batch, place, head, dim] turned by the angles of its place: dim n by the same angle as dim n + half."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half) / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


@dataclass(frozen=True)
class Decoder:
    """A Gemma that computes with the tensors of a file as they are.

    Attributes:
        file: the tensors.
        release: of Gemma, 2 or 3.
    """

    file: State
    release: int = 2

    def embedded(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        """A norm of a layer; without a layer the last one."""
        raise NotImplementedError

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of each head."""
        raise NotImplementedError

    def merged(self, layer: int, x: Tensor) -> Tensor:
        """What the attention returns, from [batch, place, head, dim]."""
        raise NotImplementedError

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """The scores of all words, before they are capped."""
        raise NotImplementedError

    def scaled(self, q: Tensor) -> Tensor:
        return q / SCALE**0.5

    def attention(self, layer: int, x: Tensor) -> Tensor:
        q, k, v = self.heads(layer, x)
        if self.release == 3:
            q, k = self.norm(layer, "q", q), self.norm(layer, "k", k)
        local = LOCAL[self.release][layer]
        base = BASES[self.release][0 if local else 1]
        q, k = self.scaled(turned(q, base)), turned(k, base)
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 2) for one in (k, v))
        found = torch.einsum("bqhd,bkhd->bhqk", q, k)
        if self.release == 2:
            found = ATTENTION_CAP * torch.tanh(found / ATTENTION_CAP)
        place = torch.arange(x.shape[1])
        back = place[:, None] - place
        seen = (back >= 0) & (back < (WINDOW if local else len(place)))
        weights = found.masked_fill(~seen, float("-inf")).softmax(-1)
        return self.merged(layer, torch.einsum("bhqk,bkhd->bqhd", weights, v))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in range(LAYERS):
            x = x + self.norm(layer, "post_attention", self.attention(layer, self.norm(layer, "input", x)))
            x = x + self.norm(layer, "post_feedforward", self.mlp(layer, self.norm(layer, "pre_feedforward", x)))
        return self.norm(None, "last", x)

    def __call__(self, ids: Tensor) -> Tensor:
        found = self.scores(self.hidden(ids))
        return FINAL_CAP * torch.tanh(found / FINAL_CAP) if self.release == 2 else found


def drawn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def cut(joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of q, k and v, one after the other, head by head."""
    parts = joined.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
    q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in parts)
    return q, k, v


def outputs(theirs: Decoder, base: bool = False) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    """The scores of the words, or with ``base`` the hidden states."""
    ids = tokens(vocab=VOCAB)
    return lambda model: [(theirs.hidden(ids) if base else theirs(ids), model(ids)[0])]


# --- TensorRT-LLM ---


class TensorRT(Decoder):
    """By tensorrt_llm/models/gemma/model.py, with the layers Attention and GatedMLP: fc is what is activated."""

    NAMES: Mapping[str, str] = {
        "q": "attention.q_layernorm",
        "k": "attention.k_layernorm",
        "post_attention": "post_layernorm",
    }

    def tensor(self, layer: int, name: str) -> Tensor:
        return self.file[f"transformer.layers.{layer}.{name}.weight"]

    def embedded(self, ids: Tensor) -> Tensor:
        return self.file["transformer.vocab_embedding.weight"][ids] * WIDTH**0.5

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        own = self.NAMES.get(name, f"{name}_layernorm")
        weight = self.file["transformer.ln_f.weight"] if layer is None else self.tensor(layer, own)
        return root_mean_square(x) * weight

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cut(x @ self.tensor(layer, "attention.qkv").T)

    def merged(self, layer: int, x: Tensor) -> Tensor:
        return x.flatten(2) @ self.tensor(layer, "attention.dense").T

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        active = gelu(x @ self.tensor(layer, "mlp.fc").T, approximate="tanh")
        return (active * (x @ self.tensor(layer, "mlp.gate").T)) @ self.tensor(layer, "mlp.proj").T

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.file["lm_head.weight"].T


def tensorrt_file(release: int) -> dict[str, Tensor]:
    """A file, whose norms are 1 more than what is drawn, as after TensorRT-LLM's converter."""
    draw = drawn(20 + release)
    words = 0.3 * draw(VOCAB, WIDTH)
    file = {"transformer.vocab_embedding.weight": words, "lm_head.weight": words.clone()}
    rows = (HEADS + 2 * KV_HEADS) * HEAD
    for at in (f"transformer.layers.{layer}." for layer in range(LAYERS)):
        file |= {
            f"{at}attention.qkv.weight": 0.15 * draw(rows, WIDTH),
            f"{at}attention.dense.weight": 0.15 * draw(WIDTH, HEADS * HEAD),
            f"{at}mlp.fc.weight": 0.15 * draw(HIDDEN, WIDTH),
            f"{at}mlp.gate.weight": 0.15 * draw(HIDDEN, WIDTH),
            f"{at}mlp.proj.weight": 0.1 * draw(WIDTH, HIDDEN),
        }
        for name in NORMS:
            file[f"{at}{TensorRT.NAMES.get(name, f'{name}_layernorm')}.weight"] = 1 + 0.3 * draw(WIDTH)
        for name in ("q", "k") if release == 3 else ():
            file[f"{at}attention.{name}_layernorm.weight"] = 1 + 0.3 * draw(HEAD)
    return {**file, "transformer.ln_f.weight": 1 + 0.3 * draw(WIDTH)}


def tensorrt(release: int = 2, base: bool = False, head: bool = True) -> Example:
    file = tensorrt_file(release)
    theirs = TensorRT(file, release)
    kind = {2: "Gemma2Model", 3: "Gemma3TextModel"}[release] if base else f"Gemma{release}ForCausalLM"
    return Example(
        "tensorrt_gemma",
        {key: value for key, value in file.items() if head or key != "lm_head.weight"},
        maker(kind),
        "the computation of TensorRT-LLM's gemma/model.py, written anew",
        outputs=outputs(theirs, base),
        wrong=others(release),
        facts=FACTS,
        back=file,
    )


# --- gemma_pytorch ---


class Google(Decoder):
    """By gemma/model.py of gemma_pytorch, whose norms add 1."""

    NAMES: Mapping[str, str] = {"q": "self_attn.query_norm", "k": "self_attn.key_norm"}

    def tensor(self, layer: int, name: str) -> Tensor:
        return self.file[f"model.layers.{layer}.{name}.weight"]

    def embedded(self, ids: Tensor) -> Tensor:
        return self.file["embedder.weight"][ids] * WIDTH**0.5

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        own = self.NAMES.get(name, f"{name}_layernorm")
        weight = self.file["model.norm.weight"] if layer is None else self.tensor(layer, own)
        return root_mean_square(x) * (1 + weight)

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cut(x @ self.tensor(layer, "self_attn.qkv_proj").T)

    def merged(self, layer: int, x: Tensor) -> Tensor:
        return x.flatten(2) @ self.tensor(layer, "self_attn.o_proj").T

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        active = gelu(x @ self.tensor(layer, "mlp.gate_proj").T, approximate="tanh")
        return (active * (x @ self.tensor(layer, "mlp.up_proj").T)) @ self.tensor(layer, "mlp.down_proj").T

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.file["embedder.weight"].T


def google_file(release: int) -> dict[str, Tensor]:
    draw = drawn(30 + release)
    file = {"embedder.weight": 0.3 * draw(VOCAB, WIDTH), "model.norm.weight": 0.3 * draw(WIDTH)}
    rows = (HEADS + 2 * KV_HEADS) * HEAD
    for at in (f"model.layers.{layer}." for layer in range(LAYERS)):
        file |= {
            f"{at}self_attn.qkv_proj.weight": 0.15 * draw(rows, WIDTH),
            f"{at}self_attn.o_proj.weight": 0.15 * draw(WIDTH, HEADS * HEAD),
            f"{at}mlp.gate_proj.weight": 0.15 * draw(HIDDEN, WIDTH),
            f"{at}mlp.up_proj.weight": 0.15 * draw(HIDDEN, WIDTH),
            f"{at}mlp.down_proj.weight": 0.1 * draw(WIDTH, HIDDEN),
            **{f"{at}{name}_layernorm.weight": 0.3 * draw(WIDTH) for name in NORMS},
        }
        if release == 3:
            file |= {f"{at}self_attn.{name}_norm.weight": 0.3 * draw(HEAD) for name in ("query", "key")}
    return file


def google(release: int = 2) -> Example:
    file = google_file(release)
    names = ("freqs_cis",) if release == 2 else ("local_freqs_cis", "global_freqs_cis")
    angles = {name: torch.polar(torch.ones(64, HEAD // 2), torch.rand(64, HEAD // 2)) for name in names}
    return Example(
        "gemma_pytorch",
        file | angles,
        maker(f"Gemma{release}ForCausalLM"),
        "the computation of gemma_pytorch's model.py, written anew",
        outputs=outputs(Google(file, release)),
        wrong=others(release),
        facts=FACTS,
        not_written=names,
        suffix=".ckpt",
    )


# --- MaxText ---


class MaxText(Decoder):
    """By src/MaxText/layers/gemma2.py: no factor of the queries, and scores over the root of the width."""

    NAMES: Mapping[str, str] = {
        "input": "pre_self_attention_norm",
        "post_attention": "post_self_attention_norm",
        "pre_feedforward": "pre_ffw_norm",
        "post_feedforward": "post_ffw_norm",
    }

    def tensor(self, layer: int, name: str, *rest: str) -> Tensor:
        """A slice of the layers, which lie on axis 1: of each pair the first one has a window."""
        half = ("local", "global")[layer % 2]
        return self.file["/".join(["decoder/layers", f"{name}_{half}", *rest])].select(1, layer // 2)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.file["token_embedder/embedding"][ids]

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        last = self.file["decoder/decoder_norm/scale"]
        return root_mean_square(x) * (last if layer is None else self.tensor(layer, self.NAMES[name], "scale"))

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        names = ("query", "key", "value")
        kernels = (self.tensor(layer, "self_attention", name, "kernel") for name in names)
        q, k, v = (torch.einsum("bld,dhk->blhk", x, kernel) for kernel in kernels)
        return q, k, v

    def scaled(self, q: Tensor) -> Tensor:
        return q

    def merged(self, layer: int, x: Tensor) -> Tensor:
        return torch.einsum("blhk,hkd->bld", x, self.tensor(layer, "self_attention", "out", "kernel"))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        one, two, out = (self.tensor(layer, "mlp", name, "kernel") for name in ("wi_0", "wi_1", "wo"))
        return (gelu(x @ one, approximate="tanh") * (x @ two)) @ out

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.file["token_embedder/embedding"][:VOCAB].T / WIDTH**0.5


def maxtext_file() -> dict[str, Tensor]:
    """Arrays of a scanned model, whose embeddings have rows of zeros at their end."""
    draw, pairs = drawn(40), LAYERS // 2
    words = torch.cat([2 * draw(VOCAB, WIDTH), torch.zeros(384 - VOCAB, WIDTH)])
    file = {"token_embedder/embedding": words, "decoder/decoder_norm/scale": 1 + 0.3 * draw(WIDTH)}
    for half in ("local", "global"):
        at = f"decoder/layers/self_attention_{half}/"
        file |= {
            f"{at}query/kernel": 0.04 * draw(WIDTH, pairs, HEADS, HEAD),
            f"{at}key/kernel": 0.15 * draw(WIDTH, pairs, KV_HEADS, HEAD),
            f"{at}value/kernel": 0.15 * draw(WIDTH, pairs, KV_HEADS, HEAD),
            f"{at}out/kernel": 0.15 * draw(HEADS, pairs, HEAD, WIDTH),
            f"decoder/layers/mlp_{half}/wi_0/kernel": 0.15 * draw(WIDTH, pairs, HIDDEN),
            f"decoder/layers/mlp_{half}/wi_1/kernel": 0.15 * draw(WIDTH, pairs, HIDDEN),
            f"decoder/layers/mlp_{half}/wo/kernel": 0.1 * draw(HIDDEN, pairs, WIDTH),
        }
        for name in MaxText.NAMES.values():
            file[f"decoder/layers/{name}_{half}/scale"] = 1 + 0.3 * draw(WIDTH, pairs)
    return file


def unscanned(file: State) -> dict[str, Tensor]:
    """The same arrays layer by layer, under the names that MaxText's converters print."""
    found = {}
    for key, value in file.items():
        name = f"params-{key.replace('/', '-')}"
        if "-layers-" not in name:
            found[name] = value
            continue
        for pair in range(LAYERS // 2):
            found[name.replace("-layers-", f"-layers_{pair}-")] = value.select(1, pair)
    return found


def maxtext(scanned: bool = True, prefix: str = "") -> Example:
    file = maxtext_file()
    keys = (
        "token_embedder/embedding",
        *(f"decoder/layers/self_attention_{h}/query/kernel" for h in ("local", "global")),
    )
    return Example(
        "maxtext_gemma2",
        {prefix + key: value for key, value in file.items()} if scanned else unscanned(file),
        maker(),
        "the computation of MaxText's gemma2.py, written anew",
        outputs=outputs(MaxText(file)),
        wrong={**others(2), "more words than rows": maker(vocab_size=400)},
        facts={**FACTS, "text.vocab": VOCAB, "text.query_scale": SCALE},
        back=file,
        rounded=keys,
        suffix=".npz",
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "gemma_pytorch": google,
    "gemma_pytorch Gemma 3": partial(google, 3),
    "maxtext_gemma2": maxtext,
    "maxtext_gemma2 with params": partial(maxtext, prefix="params/"),
    "maxtext_gemma2 unscanned": partial(maxtext, scanned=False),
    "tensorrt_gemma": tensorrt,
    "tensorrt_gemma Gemma 3": partial(tensorrt, 3),
    "tensorrt_gemma without a head": partial(tensorrt, head=False),
    "tensorrt_gemma base": partial(tensorrt, 3, base=True),
}
ROWS = r"""
gemma_pytorch: q and k swapped: refused
- self_attn.(q|k|v)_proj.weight, split: [text.heads, text.kv_heads, text.kv_heads]
+ self_attn.(k|q|v)_proj.weight, split: [text.heads, text.kv_heads, text.kv_heads]
gemma_pytorch: k and v swapped: differs
- self_attn.(q|k|v)_proj.weight
+ self_attn.(q|v|k)_proj.weight
gemma_pytorch: three equal parts: refused
- split: [text.heads, text.kv_heads, text.kv_heads]
+ split: [1, 1, 1]
gemma_pytorch: gate and up swapped: differs
- mlp.(gate|up|down)_proj.weight: mlp.\1_proj.weight
+ mlp.gate_proj.weight: mlp.up_proj.weight
+ mlp.up_proj.weight: mlp.gate_proj.weight
+ mlp.down_proj.weight: mlp.down_proj.weight
gemma_pytorch: the norms are taken for 1 + weight: differs
- \1_layernorm.weight
+ {to: \1_layernorm.weight, plus: -1}
gemma_pytorch: the norms of the MLP swapped: differs
- (input|post_attention|pre_feedforward|post_feedforward)_layernorm.weight: \1_layernorm.weight
+ (input|post_attention)_layernorm.weight: \1_layernorm.weight
+ pre_feedforward_layernorm.weight: post_feedforward_layernorm.weight
+ post_feedforward_layernorm.weight: pre_feedforward_layernorm.weight
gemma_pytorch Gemma 3: the norms of q and k swapped: differs
- norm: {query: q, key: k}
+ norm: {query: k, key: q}
gemma_pytorch Gemma 3: the angles are no buffers: refused
- (local_|global_|)freqs_cis: rotary angles
+ freqs_cis: rotary angles
maxtext_gemma2: the norms of a layer without plus: differs
- view: d l -> l d, plus: -1, unstack: layer}
+ view: d l -> l d, unstack: layer}
maxtext_gemma2: the sign of plus: differs
- view: d l -> l d, plus: -1, unstack: layer}
+ view: d l -> l d, plus: 1, unstack: layer}
maxtext_gemma2: the last norm without plus: differs
- {to: model.norm.weight, plus: -1}
+ model.norm.weight
maxtext_gemma2: the embeddings without times: differs
- take: [0, text.vocab], times: 1/sqrt 1, pad: 384}
+ take: [0, text.vocab], pad: 384}
maxtext_gemma2: the embeddings times the root: differs
- times: 1/sqrt 1
+ times: sqrt 1
maxtext_gemma2: the queries without times: differs
- view: d l h k -> l (h k) d, times: sqrt text.query_scale, unstack: layer,
+ view: d l h k -> l (h k) d, unstack: layer,
maxtext_gemma2: the queries times the root of the width of a head: differs
- times: sqrt text.query_scale
+ times: sqrt text.head_dim
maxtext_gemma2: the queries divided by the root: differs
- times: sqrt text.query_scale
+ times: 1/sqrt text.query_scale
maxtext_gemma2: layers with and without a window crossed: differs
- half: {local: 0, global: 1}
+ half: {local: 1, global: 0}
maxtext_gemma2: gate and up swapped: differs
- wi_0: gate, wi_1: up
+ wi_0: up, wi_1: gate
maxtext_gemma2: k and v swapped: differs
- {key: k, value: v,
+ {key: v, value: k,
maxtext_gemma2: the rows of a head mixed: differs
- view: d l h k -> l (h k) d, times
+ view: d l h k -> l (k h) d, times
maxtext_gemma2: the columns of a head mixed: differs
- view: h l k d -> l d (h k)
+ view: h l k d -> l d (k h)
maxtext_gemma2: the norms before swapped: differs
- norm: {pre_self_attention: input, post_self_attention: post_attention, pre_ffw: pre_feedforward,
+ norm: {pre_self_attention: pre_feedforward, post_self_attention: post_attention, pre_ffw: input,
maxtext_gemma2: all rows of the padded words: refused
- take: [0, text.vocab], times: 1/sqrt 1, pad: 384}
+ times: 1/sqrt 1}
maxtext_gemma2 with params: the sign of plus: differs
- {to: model.norm.weight, plus: -1}
+ {to: model.norm.weight, plus: 1}
maxtext_gemma2 unscanned: the layers on another axis: refused
- decoder/layers/\2/\3/kernel, stack: 1}
+ decoder/layers/\2/\3/kernel, stack: 0}
tensorrt_gemma: the norms of a layer without plus: differs
- {to: <1:norm>_layernorm.weight, plus: -1}
+ <1:norm>_layernorm.weight
tensorrt_gemma: the sign of plus: differs
- {to: <1:norm>_layernorm.weight, plus: -1}
+ {to: <1:norm>_layernorm.weight, plus: 1}
tensorrt_gemma: the last norm without plus: differs
- {to: model.norm.weight, plus: -1}
+ model.norm.weight
tensorrt_gemma: gate and up swapped, as the names suggest: differs
- mlp: {fc: gate, gate: up, proj: down}
+ mlp: {fc: up, gate: gate, proj: down}
tensorrt_gemma: the norms after the attention and before the MLP swapped: differs
- post: post_attention, pre_feedforward: pre_feedforward
+ post: pre_feedforward, pre_feedforward: post_attention
tensorrt_gemma: k and v swapped: differs
- self_attn.(q|k|v)_proj.weight
+ self_attn.(q|v|k)_proj.weight
tensorrt_gemma: q and k swapped: refused
- self_attn.(q|k|v)_proj.weight
+ self_attn.(k|q|v)_proj.weight
tensorrt_gemma: the columns of a head mixed: differs
- view: d (h k) -> d (h k)
+ view: d (h k) -> d (k h)
tensorrt_gemma: the embeddings times the root of their width: differs
- {to: model.embed_tokens.weight, tied: lm_head.weight}
+ {to: model.embed_tokens.weight, tied: lm_head.weight, times: sqrt 1}
tensorrt_gemma Gemma 3: the norms of q and k without plus: differs
- {to: model.layers.\1.self_attn.\2_norm.weight, plus: -1}
+ model.layers.\1.self_attn.\2_norm.weight
tensorrt_gemma Gemma 3: the norms of q and k swapped: differs
- {to: model.layers.\1.self_attn.\2_norm.weight, plus: -1}
+ {to: model.layers.\1.self_attn.<2:norm>_norm.weight, plus: -1}
- norm: {input: input,
+ norm: {q: k, k: q, input: input,
tensorrt_gemma without a head: the sign of plus: differs
- {to: model.norm.weight, plus: -1}
+ {to: model.norm.weight, plus: 1}
tensorrt_gemma base: the last norm without plus: differs
- {to: model.norm.weight, plus: -1}
+ model.norm.weight
"""
