"""big_vision's two towers with a class token (LiT), small, in flax; and OpenCLIP's models that take them.

``old=True`` is the code before 2022, and vit_jax: positions are added after the class token, so it has one too.
Sizes are those of `common.Size`; both towers project to ``embed_dim`` unless there is no image head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from . import big_vision, openclip, timm_towers
from .common import Size


@functools.cache
def _flax() -> Any:
    fx = big_vision._flax()
    zeros = fx.nn.initializers.zeros

    class Positions(fx.nn.Module):
        @fx.nn.compact
        def __call__(self, x):
            return x + self.param("pos_embedding", zeros, (1, *x.shape[1:]))

    class OldEncoder(fx.nn.Module):
        depth: int
        heads: int
        hidden: int

        @fx.nn.compact
        def __call__(self, x):
            x = Positions(name="posembed_input")(x)
            for layer in range(self.depth):
                x = fx.Block(self.heads, self.hidden, name=f"encoderblock_{layer}")(x)
            return fx.nn.LayerNorm(name="encoder_norm")(x)

    class TokenImage(fx.nn.Module):
        width: int
        depth: int
        heads: int
        hidden: int
        patch: int
        out: int | None
        old: bool

        @fx.nn.compact
        def __call__(self, image):  # (batch, height, width, channel)
            patch = (self.patch, self.patch)
            x = fx.nn.Conv(self.width, patch, strides=patch, padding="VALID", name="embedding")(image)
            x = x.reshape(x.shape[0], -1, self.width)
            if not self.old:
                x = x + self.param("pos_embedding", zeros, (1, *x.shape[1:]))
            token = self.param("cls", zeros, (1, 1, self.width))
            x = fx.jnp.concatenate([fx.jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
            encoder = OldEncoder if self.old else fx.Encoder
            x = encoder(self.depth, self.heads, self.hidden, name="Transformer")(x)[:, 0]
            return fx.nn.Dense(self.out, name="head")(x) if self.out else x

    return TokenImage


def _width(size: Size, head: bool) -> int:
    """Of the embedding: without an image head it is that of the image tower."""
    return size.embed_dim if head else size.image_width


def init(*, seed: int = 0, head: bool = True, old: bool = False, text: str = "native", **sizes: Any) -> big_vision.Flat:
    """Randomised parameters as a flat dict of npz keys, without ``params/``; text "native", "bert" or "none".

    Text "bert" stands for flaxformer's BERT: the first names of its keys are known, the others are made up.
    """
    fx, size = big_vision._flax(), Size(**sizes)
    out = _width(size, head)
    image = (size.image_width, size.image_depth, size.image_heads, size.image_hidden, size.patch)
    towers = {"img": (_flax()(*image, out if head else None, old), fx.jnp.zeros((1, *size.image_hw, 3)))}
    if text == "native":
        module = fx.Text(size.vocab, size.text_width, size.text_depth, size.text_heads, size.text_hidden, out)
        towers["txt"] = (module, fx.jnp.zeros((1, size.context_length), int))
    shaped: dict[str, Any] = {}
    for prefix, (module, example) in towers.items():
        variables = fx.jax.eval_shape(module.init, fx.jax.random.PRNGKey(0), example)
        shaped |= big_vision._flatten(variables["params"], prefix)
    shapes = {k: v.shape for k, v in shaped.items()} | {"t": (1,)}
    if text == "bert":
        bert = "txt/BertEncoder_0/embedder/embedders_position_ids/embedding", "txt/BertEncoder_0/layer_0/kernel"
        shapes |= dict.fromkeys(bert, (7, size.text_width))
        shapes |= {"txt/head/kernel": (size.text_width, out), "txt/head/bias": (out,)}
    generator = torch.Generator().manual_seed(389 + seed)
    return {k: big_vision._random(k, shape, generator) for k, shape in shapes.items()}


@torch.no_grad()
def forward(flat: Mapping[str, NDArray[Any]], images: Tensor | None, tokens: Tensor | None) -> tuple[Any, Any]:
    """The embeddings (image, text) of a flat file, not normalised."""
    fx, flat, image = big_vision._flax(), big_vision.plain(flat), None
    if images is not None:
        patch, _, _, width = flat["img/embedding/kernel"].shape
        out = flat["img/head/bias"].shape[0] if "img/head/bias" in flat else None
        old = "img/pos_embedding" not in flat
        module = _flax()(width, *big_vision._encoder(flat, "img/Transformer"), patch, out, old)
        parameters = big_vision._nest({k.removeprefix("img/"): v for k, v in flat.items() if k.startswith("img/")})
        with fx.jax.default_matmul_precision("float32"):
            y = fx.run(module, parameters, fx.jnp.asarray(images.permute(0, 2, 3, 1).numpy()))
        image = torch.from_numpy(np.array(y))
    return image, None if tokens is None else big_vision.forward(flat, None, tokens)[1]


def model(*, head: bool = True, no_embed_class: bool = False, logit_bias: bool = False, **arguments: Any) -> nn.Module:
    """CustomTextCLIP with timm's plain ViT with class token (no norm before its blocks), text as big_vision's."""
    size = openclip._size(arguments)
    options = timm_towers.vit_sizes(size) | {"no_embed_class": no_embed_class, "act_layer": "gelu_tanh"}
    vision = {
        "timm_model_name": timm_towers.register("vit_base_patch16_224", **options),
        "timm_pool": "token",
        "timm_proj": None if head else "none",
        "image_size": size.image_size,
    }
    text = openclip.native_text(size) | {
        "no_causal_mask": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
        "proj_bias": True,
    }
    bias = {"init_logit_bias": -10} if logit_bias else {}
    return openclip._model(CustomTextCLIP, vision, text, arguments, embed_dim=_width(size, head), **bias)
