"""big_vision's two-tower SigLIP in flax.linen, small, and the flat npz files it writes.

The modules and their names follow the key layout of the published files, so flax itself produces the keys.
The file in ``tests/data/big_vision`` was written by the real big_vision; ``forward`` is proved on it. The
first call imports flax (a second or two), and each new architecture is compiled once (about a second).
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .common import Size, _draw

Flat = dict[str, NDArray[Any]]
DATA = Path(__file__).parents[1] / "data" / "big_vision"


@functools.cache
def _flax() -> types.SimpleNamespace:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class MlpBlock(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, x):
            hidden = nn.gelu(nn.Dense(self.hidden)(x), approximate=True)
            return nn.Dense(x.shape[-1])(hidden)

    class Encoder1DBlock(nn.Module):
        heads: int
        hidden: int

        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
            return x + MlpBlock(self.hidden)(nn.LayerNorm()(x))

    class Encoder(nn.Module):
        depth: int
        heads: int
        hidden: int

        @nn.compact
        def __call__(self, x):
            for layer in range(self.depth):
                x = Encoder1DBlock(self.heads, self.hidden, name=f"encoderblock_{layer}")(x)
            return nn.LayerNorm(name="encoder_norm")(x)

    class MAPHead(nn.Module):
        heads: int
        hidden: int

        @nn.compact
        def __call__(self, x):
            probe = self.param("probe", nn.initializers.zeros, (1, 1, x.shape[-1]))
            x = nn.MultiHeadDotProductAttention(self.heads)(jnp.tile(probe, (x.shape[0], 1, 1)), x)
            return (x + MlpBlock(self.hidden)(nn.LayerNorm()(x)))[:, 0]

    class Image(nn.Module):
        width: int
        depth: int
        heads: int
        hidden: int
        patch: int

        @nn.compact
        def __call__(self, image):  # (batch, height, width, channel)
            patch = (self.patch, self.patch)
            x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="embedding")(image)
            x = x.reshape(x.shape[0], -1, self.width)
            x = x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))
            x = Encoder(self.depth, self.heads, self.hidden, name="Transformer")(x)
            return MAPHead(self.heads, self.hidden, name="MAPHead_0")(x)

    class Text(nn.Module):
        vocab: int
        width: int
        depth: int
        heads: int
        hidden: int
        out: int | None

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(self.vocab, self.width, name="Embed_0")(tokens)
            x = x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))
            x = Encoder(self.depth, self.heads, self.hidden, name="Encoder_0")(x)[:, -1]
            return nn.Dense(self.out, name="head")(x) if self.out else x

    def apply(module, parameters, x):
        return module.apply({"params": parameters}, x)

    run = jax.jit(apply, static_argnums=0)  # compiled once for each architecture and batch
    parts = {"nn": nn, "Block": Encoder1DBlock, "Encoder": Encoder, "MAPHead": MAPHead}  # for models of other files
    return types.SimpleNamespace(Image=Image, Text=Text, jax=jax, jnp=jnp, run=run, **parts)


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flatten(value, f"{prefix}/{key}") if isinstance(value, Mapping) else {f"{prefix}/{key}": value}
    return found


def init(*, seed: int = 0, head: bool = True, **sizes: Any) -> Flat:
    """Randomised parameters as a flat dict of npz keys, without ``params/``; sizes as everywhere.

    The shapes come from flax. head=False leaves ``txt/head`` out and makes the text tower as wide as the
    image tower.
    """
    fx, size = _flax(), Size(**sizes)
    text_width = size.text_width if head else size.image_width
    text_hidden = int(text_width * size.text_mlp)
    image = fx.Image(size.image_width, size.image_depth, size.image_heads, size.image_hidden, size.patch)
    out = size.image_width if head else None
    text = fx.Text(size.vocab, text_width, size.text_depth, size.text_heads, text_hidden, out)
    shaped: dict[str, Any] = {}
    for prefix, module, example in (
        ("img", image, fx.jnp.zeros((1, *size.image_hw, 3))),
        ("txt", text, fx.jnp.zeros((1, size.context_length), int)),
    ):
        variables = fx.jax.eval_shape(module.init, fx.jax.random.PRNGKey(0), example)
        shaped |= _flatten(variables["params"], prefix)
    shapes = {k: v.shape for k, v in shaped.items()} | {"t": (1,), "b": (1,)}
    generator = torch.Generator().manual_seed(977 + seed)
    return {k: _random(k, shape, generator) for k, shape in shapes.items()}


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> NDArray[Any]:
    last = key.rsplit("/", 1)[-1]
    like = torch.empty(shape)
    if last in ("t", "b"):
        return _draw({"t": "logit_scale", "b": "logit_bias"}[last], like, generator).numpy()
    if last == "kernel":
        outputs = {"query": 2, "key": 2, "value": 2}.get(key.split("/")[-2], 1)  # (in, heads, head width)
        fan_in = like.numel() / np.prod(shape[-outputs:])
        return (torch.randn(shape, generator=generator) * fan_in**-0.5).numpy()
    if last in ("scale", "bias"):
        return ((last == "scale") + 0.3 * torch.randn(shape, generator=generator)).numpy()
    return (0.5 * torch.randn(shape, generator=generator)).numpy()


@torch.no_grad()
def forward(
    flat: Mapping[str, NDArray[Any]], images: Tensor | None = None, tokens: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The embeddings (image, text) of any file that `init` and the functions below give, not normalised.

    Images are (batch, channel, height, width), as for every other peer. All sizes are read from the shapes.
    """
    fx, flat, found = _flax(), plain(flat), []
    if images is not None:
        patch, _, _, width = flat["img/embedding/kernel"].shape
        depth, heads, hidden = _encoder(flat, "img/Transformer")
        found.append((fx.Image(width, depth, heads, hidden, patch), "img/", images.permute(0, 2, 3, 1)))
    if tokens is not None:
        vocab, width = flat["txt/Embed_0/embedding"].shape
        out = flat["txt/head/bias"].shape[0] if "txt/head/bias" in flat else None
        found.append((fx.Text(vocab, width, *_encoder(flat, "txt/Encoder_0"), out), "txt/", tokens.int()))
    outputs: dict[str, Tensor] = {}
    for module, prefix, x in found:
        parameters = _nest({k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)})
        with fx.jax.default_matmul_precision("float32"):
            y = fx.run(module, parameters, fx.jnp.asarray(x.numpy()))
        outputs[prefix] = torch.from_numpy(np.array(y))
    return outputs.get("img/"), outputs.get("txt/")


def _encoder(flat: Mapping[str, NDArray[Any]], prefix: str) -> tuple[int, int, int]:
    block = f"{prefix}/encoderblock_0"
    depth = len({k.split("/")[2] for k in flat if k.startswith(f"{prefix}/encoderblock_")})
    heads = flat[f"{block}/MultiHeadDotProductAttention_0/query/bias"].shape[0]
    return depth, heads, flat[f"{block}/MlpBlock_0/Dense_0/bias"].shape[0]


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), path, tree)[last] = value
    return tree


# --------------------------------------------------------------------------------- other keys for the same file
def with_prefix(flat: Mapping[str, NDArray[Any]], prefix: str = "params/") -> Flat:
    """SigLIP 2's releases have ``params/``, SigLIP 1's have none."""
    return {prefix + k: v for k, v in flat.items()}


def scan(flat: Mapping[str, NDArray[Any]], towers: tuple[str, ...] = ("img", "txt")) -> Flat:
    """Stack the blocks of these towers on a leading axis: ``encoderblock/`` for ``encoderblock_<i>/``."""
    stacks: dict[str, list[NDArray[Any]]] = {}
    for key, value in flat.items():
        name = key
        if key.removeprefix("params/").split("/")[0] in towers:
            name = re.sub(r"/encoderblock_\d+/", "/encoderblock/", key)
        stacks.setdefault(name, []).append(value)  # flax writes the blocks in order
    return {k: np.stack(v) if "/encoderblock/" in k else v[0] for k, v in stacks.items()}


def to_bfloat16_void(flat: Mapping[str, NDArray[Any]]) -> Flat:
    """Every array rounded to bfloat16 and typed |V2, which is how numpy stores and loads bfloat16."""
    import ml_dtypes

    return {k: v.astype(ml_dtypes.bfloat16).view("V2") for k, v in flat.items()}


def plain(flat: Mapping[str, NDArray[Any]]) -> Flat:
    """Undo the layouts: no prefix, one key a block, float32."""
    found: Flat = {}
    for key, value in flat.items():
        if value.dtype == np.dtype("V2"):
            value = (np.ascontiguousarray(value).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        key = key.removeprefix("params/")
        if "/encoderblock/" in key:
            found |= {key.replace("/encoderblock/", f"/encoderblock_{i}/"): layer for i, layer in enumerate(value)}
        else:
            found[key] = value
    return found


def save(flat: Mapping[str, NDArray[Any]], path: str | Path, compressed: bool = False) -> None:
    """An npz file; big_vision's own are not compressed."""
    (np.savez_compressed if compressed else np.savez)(path, **flat)
