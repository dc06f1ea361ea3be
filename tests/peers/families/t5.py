"""T5X's T5, and T5, mT5 and umT5 of transformers.

T5X is on no registry. `logits_of` computes what t5x/examples/t5/network.py and scalable_t5/network.py describe, from a
checkpoint's arrays by their names, written here anew: relative positions as biases, norms without a mean, no scale of
the attention, GELU with tanh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from peers.common import randomised

from . import Example

WIDTH, HEADS, HEAD, INNER, WORDS, BUCKETS, DISTANCE = 24, 3, 5, 40, 31, 8, 20
LAYERS = {"encoder": 3, "decoder": 2}
ASK = torch.randint(1, WORDS, (2, 26), generator=torch.Generator().manual_seed(3))
SAY = torch.randint(1, WORDS, (2, 25), generator=torch.Generator().manual_seed(4))
Tree = dict[str, Tensor]


def hf(kind: str = "T5ForConditionalGeneration", gated: bool = True, **options: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers, by the name of its class; a gated one has a matrix of its own for the logits."""

    def made() -> nn.Module:
        import transformers

        config = {
            "vocab_size": WORDS, "d_model": WIDTH, "d_kv": HEAD, "d_ff": INNER, "num_heads": HEADS,
            "num_layers": LAYERS["encoder"], "num_decoder_layers": LAYERS["decoder"],
            "relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": DISTANCE,
            "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": not gated,
            "decoder_start_token_id": 0,
        }  # fmt: skip
        known = getattr(transformers, kind)
        model = known(known.config_class(**{**config, **options}))
        if gated and hasattr(model, "lm_head"):
            model.lm_head.weight = nn.Parameter(torch.empty(WORDS, WIDTH))
            model.config.tie_word_embeddings = False  # umT5 of transformers 5 scales the states otherwise
        return randomised(lambda: model)

    return made


# --- a checkpoint, and what T5X computes of it ---


def tree(gated: bool, scanned: bool, seed: int = 5) -> Tree:
    """Random arrays of a checkpoint. Scanned layers lie along axis 1, and each has its relative positions."""
    generator, found = torch.Generator().manual_seed(seed), {}

    def draw(name: str, *shape: int, mean: float = 0.0, scale: float | None = None) -> None:
        by = scale if scale is not None else 0.8 * math.prod(shape[:-1]) ** -0.5
        found[name] = mean + by * torch.randn(*shape, generator=generator)

    draw("token_embedder/embedding", WORDS, WIDTH, scale=1.0)
    for stack, count in LAYERS.items():
        attentions = ("attention",) if stack == "encoder" else ("self_attention", "encoder_decoder_attention")
        norms = ("attention", "mlp") if stack == "encoder" else ("self_attention", "cross_attention", "mlp")
        draw(f"{stack}/{stack}_norm/scale", WIDTH, mean=1.0, scale=0.3)
        if not scanned:
            draw(f"{stack}/relpos_bias/rel_embedding", HEADS, BUCKETS, scale=0.5)
        for layer in range(count):
            at = f"{stack}/layers_{layer}"
            if scanned:
                draw(f"{at}/relpos_bias/rel_embedding", HEADS, BUCKETS, scale=0.5)
            for name in norms:
                draw(f"{at}/pre_{name}_layer_norm/scale", WIDTH, mean=1.0, scale=0.3)
            for name in attentions:
                for part in ("query", "key", "value"):
                    draw(f"{at}/{name}/{part}/kernel", WIDTH, HEADS * HEAD)
                draw(f"{at}/{name}/out/kernel", HEADS * HEAD, WIDTH)
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                draw(f"{at}/mlp/{part}/kernel", WIDTH, INNER)
            draw(f"{at}/mlp/wo/kernel", INNER, WIDTH)
    if gated:
        draw("decoder/logits_dense/kernel", WIDTH, WORDS)
    return found


def stacked(arrays: Tree, inner: str | None = None) -> Tree:
    """The arrays as a scan over the layers holds them: along axis 1, heads and their widths as axes of their own."""
    found = {key: value for key, value in arrays.items() if "/layers_" not in key}
    for stack, count in LAYERS.items():
        start = f"{stack}/layers_0/"
        for key in (key for key in arrays if key.startswith(start)):
            parts = [arrays[key.replace("layers_0", f"layers_{layer}")] for layer in range(count)]
            if key.endswith(("query/kernel", "key/kernel", "value/kernel")):
                parts = [part.unflatten(1, (HEADS, HEAD)) for part in parts]
            elif key.endswith("out/kernel"):
                parts = [part.unflatten(0, (HEADS, HEAD)) for part in parts]
            found[f"{stack}/{inner or stack}/{key.removeprefix(start)}"] = torch.stack(parts, 1)
    return found


def _bucket(distance: int, both: bool) -> int:
    """The bucket of a key that lies so many places after the query."""
    count, start, far = BUCKETS, 0, max(0, -distance)
    if both:
        count, far = BUCKETS // 2, abs(distance)
        start = count if distance > 0 else 0
    exact = count // 2
    if far >= exact:
        far = min(count - 1, exact + int(math.log(far / exact) / math.log(DISTANCE / exact) * (count - exact)))
    return start + far


def _biases(table: Tensor, length: int, both: bool) -> Tensor:
    """(heads, queries, keys)."""
    places = [[_bucket(key - query, both) for key in range(length)] for query in range(length)]
    return table[:, torch.tensor(places)]


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * scale


def _attend(arrays: Tree, at: str, x: Tensor, to: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    q, k, v = (
        (states @ arrays[f"{at}/{name}/kernel"]).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        for name, states in (("query", x), ("key", to), ("value", to))
    )
    weights = q @ k.transpose(-1, -2)
    if bias is not None:
        weights = weights + bias
    if causal:
        weights = weights.masked_fill(torch.ones(weights.shape[-2:]).triu(1).bool(), -math.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2) @ arrays[f"{at}/out/kernel"]


def _mlp(arrays: Tree, at: str, x: Tensor) -> Tensor:
    if f"{at}/wi/kernel" in arrays:
        inner = relu(x @ arrays[f"{at}/wi/kernel"])
    else:
        inner = gelu(x @ arrays[f"{at}/wi_0/kernel"], approximate="tanh") * (x @ arrays[f"{at}/wi_1/kernel"])
    return inner @ arrays[f"{at}/wo/kernel"]


def _layers(arrays: Tree, stack: str, length: int) -> Iterator[tuple[str, Tensor]]:
    """Of each layer the beginning of its names, and its biases."""
    for layer in range(LAYERS[stack]):
        at = f"{stack}/layers_{layer}"
        shared = arrays.get(f"{stack}/relpos_bias/rel_embedding")
        table = arrays[f"{at}/relpos_bias/rel_embedding"] if shared is None else shared
        yield at, _biases(table, length, stack == "encoder")


def states_of(arrays: Tree) -> Tensor:
    """What the encoder makes of `ASK`."""
    x = arrays["token_embedder/embedding"][ASK]
    for at, bias in _layers(arrays, "encoder", ASK.shape[1]):
        y = _norm(x, arrays[f"{at}/pre_attention_layer_norm/scale"])
        x = x + _attend(arrays, f"{at}/attention", y, y, bias)
        x = x + _mlp(arrays, f"{at}/mlp", _norm(x, arrays[f"{at}/pre_mlp_layer_norm/scale"]))
    return _norm(x, arrays["encoder/encoder_norm/scale"])


def logits_of(arrays: Tree) -> Tensor:
    """The logits for `SAY` after `ASK`."""
    states, x = states_of(arrays), arrays["token_embedder/embedding"][SAY]
    for at, bias in _layers(arrays, "decoder", SAY.shape[1]):
        y = _norm(x, arrays[f"{at}/pre_self_attention_layer_norm/scale"])
        x = x + _attend(arrays, f"{at}/self_attention", y, y, bias, causal=True)
        y = _norm(x, arrays[f"{at}/pre_cross_attention_layer_norm/scale"])
        x = x + _attend(arrays, f"{at}/encoder_decoder_attention", y, states, None)
        x = x + _mlp(arrays, f"{at}/mlp", _norm(x, arrays[f"{at}/pre_mlp_layer_norm/scale"]))
    x = _norm(x, arrays["decoder/decoder_norm/scale"])
    if "decoder/logits_dense/kernel" in arrays:
        return x @ arrays["decoder/logits_dense/kernel"]
    return x @ arrays["token_embedder/embedding"].T * WIDTH**-0.5


def logits(arrays: Tree) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    """The logits, and the states of the encoder, brought to sizes near 1."""
    wanted = logits_of(arrays), states_of(arrays)

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        ours = model(input_ids=ASK, decoder_input_ids=SAY)
        found = ours.logits, ours.encoder_last_hidden_state
        return [(a / a.abs().max(), b / a.abs().max()) for a, b in zip(wanted, found, strict=True)]

    return pairs


PEER = "the computation of T5X's network.py, written anew"


def v1(gated: bool) -> Example:
    arrays = tree(gated, scanned=False)
    return Example(
        "t5x",
        {f"target/{key}": value for key, value in arrays.items()},
        hf(gated=gated),
        PEER,
        outputs=logits(arrays),
        wrong={
            "the other version": hf(gated=not gated),
            "a layer more": hf(gated=gated, num_layers=4),
            "more buckets": hf(gated=gated, relative_attention_num_buckets=10),
        },
        prefix="target/",
        suffix=".npz",
    )


def encoder() -> Example:
    arrays = {key: value for key, value in tree(True, scanned=False).items() if not key.startswith("decoder/")}
    return Example(
        "t5x",
        arrays,
        hf("T5EncoderModel"),
        PEER,
        outputs=lambda model: [(states_of(arrays), model(ASK).last_hidden_state)],
        wrong={"a layer more": hf("T5EncoderModel", num_layers=4)},
    )


def scanned() -> Example:
    arrays = tree(True, scanned=True)
    return Example(
        "t5x_scanned",
        {f"target/{key}": value for key, value in stacked(arrays).items()},
        hf("UMT5ForConditionalGeneration"),
        PEER,
        outputs=logits(arrays),
        wrong={
            "T5 with one table of positions": hf(),
            "a layer more": hf("UMT5ForConditionalGeneration", num_layers=4),
        },
        facts={"text.heads": HEADS},
        prefix="target/",
        suffix=".npz",
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "t5x": lambda: v1(gated=True),
    "t5x v1.0": lambda: v1(gated=False),
    "t5x encoder": encoder,
    "t5x_scanned": scanned,
}
ROWS = r"""
t5x: query and value swapped: differs
- name: {query: q, key: k, value: v, out: o}
+ name: {query: v, key: k, value: q, out: o}
t5x: the gate and what it gates swapped: differs
- DenseReluDense.wi_\2.weight, view: in out -> out in}
+ DenseReluDense.wi_<2:place>.weight, view: in out -> out in}
- place: {attention: 0, mlp: 1}
+ place: {attention: 0, mlp: 1, 0: 1, 1: 0}
t5x: the attentions of the decoder crossed: differs
- kind: {self_attention: 0.SelfAttention, encoder_decoder_attention: 1.EncDecAttention}
+ kind: {self_attention: 1.EncDecAttention, encoder_decoder_attention: 0.SelfAttention}
t5x: the logits without a transpose: refused
- decoder/logits_dense/kernel: {to: lm_head.weight, view: in out -> out in}
+ decoder/logits_dense/kernel: lm_head.weight
t5x v1.0: the norms of the decoder crossed: differs
- decoder: {self_attention: 0, cross_attention: 1, mlp: 2}
+ decoder: {self_attention: 1, cross_attention: 0, mlp: 2}
t5x v1.0: the table of positions without a transpose: refused
- {to: decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight, view: heads buckets -> buckets heads}
+ {to: decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight}
t5x encoder: the norms of the encoder crossed: differs
- place: {attention: 0, mlp: 1}
+ place: {attention: 1, mlp: 0}
t5x_scanned: heads and their widths crossed: differs
- {to: encoder.block.<layer>.layer.0.SelfAttention.<1:name>.weight, view: d l h k -> l (h k) d, unstack: layer}
+ {to: encoder.block.<layer>.layer.0.SelfAttention.<1:name>.weight, view: d l h k -> l (k h) d, unstack: layer}
t5x_scanned: heads and their widths crossed in the output: differs
- {to: decoder.block.<layer>.layer.<1:kind>.o.weight, view: h l k d -> l d (h k), unstack: layer}
+ {to: decoder.block.<layer>.layer.<1:kind>.o.weight, view: h l k d -> l d (k h), unstack: layer}
t5x_scanned: axis 0 taken for the layers: refused
- {to: decoder.block.<layer>.layer.2.DenseReluDense.\1.weight, view: in l out -> l out in, unstack: layer}
+ {to: decoder.block.<layer>.layer.2.DenseReluDense.\1.weight, view: l in out -> l out in, unstack: layer}
"""
