"""NaFlex models, small, of three owners: transformers' Siglip2Model, timm's NaFlexVit, big_vision's flax model.

Sizes are those of `common.Size`; `image_size` over `patch` is the grid of the position table. Images may have any grid:
`naflex_batch` packs images of several grids as big_vision and transformers do, with padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import transformers
from numpy.typing import NDArray
from timm.layers import LayerNorm
from torch import Tensor, nn

from . import big_vision, hf, openclip, timm_towers
from .common import Size, randomised

TOWERS = {"image": transformers.Siglip2VisionModel, "text": transformers.Siglip2TextModel}


# ------------------------------------------------------------------------------------------------------ inputs
def patches(images: Tensor, patch: int) -> Tensor:
    """(batch, 3, height, width) -> (batch, rows * columns, patch * patch * 3), each patch row by row, channels last."""
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # batch, channel, row, column, patch row, patch column
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2).contiguous()


def naflex_batch(images: Sequence[Tensor], patch: int) -> dict[str, Tensor]:
    """Images of several sizes, (3, height, width) each, as one padded batch: the dict that timm's NaFlexVit reads."""
    grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
    longest = max(h * w for h, w in grids)
    batch = {
        "patches": torch.full((len(images), longest, patch * patch * 3), 7.0),  # what padding holds must not matter
        "patch_coord": torch.zeros(len(images), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(images), longest, dtype=torch.bool),
    }
    for i, (image, (h, w)) in enumerate(zip(images, grids, strict=True)):
        batch["patches"][i, : h * w] = patches(image[None], patch)[0]
        batch["patch_coord"][i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][i, : h * w] = True
    return batch


# ------------------------------------------------------------------------------------------------ transformers
def siglip2(*, tower: str | None = None, seed: int = 0, act: str = "gelu_tanh", **sizes: Any) -> nn.Module:
    """Siglip2Model, or "image" or "text" of it; as wide, embedding included, as `openclip.siglip`."""
    size = Size(**sizes)
    size = dataclasses.replace(size, embed_dim=size.image_width)
    vision, text = hf._configs(size, "gelu_pytorch_tanh" if act == "gelu_tanh" else "gelu", 1e-6)
    text |= {"projection_size": size.embed_dim, "eos_token_id": 2}
    vision |= {"num_patches": (vision.pop("image_size") // size.patch) ** 2}
    config = transformers.Siglip2Config(vision_config=vision, text_config=text)
    return hf._build(transformers.Siglip2Model, TOWERS, tower, config, seed)


def siglip2_keys(model: nn.Module, written_by: int = 5) -> dict[str, Tensor]:
    """As transformers 4 or 5 writes it: 5 leaves the prefix of a lone tower out."""
    found = hf.disk_keys(model)
    prefix = {TOWERS["image"]: "vision_model.", TOWERS["text"]: "text_model."}.get(type(model), "")
    return found if written_by == 5 else {prefix + key: value for key, value in found.items()}


@torch.no_grad()
def image_features(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The peer's own embedding of a `naflex_batch`, not normalised."""
    both = zip(batch["patch_coord"], batch["patch_valid"], strict=True)
    shapes = torch.stack([coord[valid].amax(0) + 1 for coord, valid in both])
    run = model.get_image_features if hasattr(model, "get_image_features") else model
    return run(
        pixel_values=batch["patches"], pixel_attention_mask=batch["patch_valid"].long(), spatial_shapes=shapes
    ).pooler_output


# -------------------------------------------------------------------------------------------- timm and OpenCLIP
def _map_vit(size: Size, act: str) -> dict[str, Any]:
    height, width = size.image_hw
    return {
        "patch_size": size.patch,
        "embed_dim": size.image_width,
        "depth": size.image_depth,
        "num_heads": size.image_heads,
        "mlp_ratio": size.image_mlp,
        "pos_embed_grid_size": (height // size.patch, width // size.patch),
        "act_layer": act,
    }


def map_vit(*, seed: int = 0, act: str = "gelu_tanh", **sizes: Any) -> nn.Module:
    """NaFlexVit with MAP pool, whose width is the embedding; positions are resized as SigLIP 2 does, bilinear."""
    arguments = _map_vit(Size(**sizes), act) | {"num_classes": 0}
    return randomised(timm.create_model, "naflexvit_base_patch16_siglip", **arguments, seed=seed)


def _token_vit(size: Size, act: str, eps: float) -> dict[str, Any]:
    return _map_vit(size, act) | {
        "class_token": True,
        "global_pool": "token",
        "pre_norm": True,
        "fc_norm": False,
        "norm_layer": partial(LayerNorm, eps=eps),
    }


def token_vit(*, seed: int = 0, act: str = "gelu", eps: float = 1e-5, **sizes: Any) -> nn.Module:
    """NaFlexVit with class token and norm_pre; its head is the projection, without bias (zeros)."""
    size = Size(**sizes)
    arguments = _token_vit(size, act, eps) | {"num_classes": size.embed_dim}
    model = randomised(timm.create_model, "naflexvit_base_patch16_siglip", **arguments, seed=seed)
    return timm_towers.zero(model.head.bias, model)


def model(*, act: str = "gelu_tanh", **arguments: Any) -> nn.Module:
    """CustomTextCLIP with a NaFlexVit with MAP pool; the text tower is that of `openclip.siglip`."""
    name = timm_towers.register("naflexvit_base_patch16_siglip", **_map_vit(openclip._size(arguments), act))
    return openclip.siglip(act=act, vision={"timm_model_name": name}, **arguments)


def token_model(*, eps: float = 1e-5, quick_gelu: bool = False, **arguments: Any) -> nn.Module:
    """CustomTextCLIP with a NaFlexVit with class token; the projection is OpenCLIP's own head."""
    options = _token_vit(openclip._size(arguments), "quick_gelu" if quick_gelu else "gelu", eps)
    name = timm_towers.register("naflexvit_base_patch16_siglip", **options)
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": "linear"}
    return openclip.custom(quick_gelu=quick_gelu, vision=vision, **arguments)


# --------------------------------------------------------------------------------------------------- big_vision
@functools.cache
def _flax() -> Any:
    fx = big_vision._flax()

    class NaFlexImage(fx.nn.Module):
        """For images whose grid is that of the table of positions."""

        width: int
        depth: int
        heads: int
        hidden: int
        grid: tuple[int, int]

        @fx.nn.compact
        def __call__(self, x):  # (batch, patch, patch row * patch column * channel)
            x = fx.nn.Dense(self.width, name="embedding")(x)
            table = self.param("pos_embedding", fx.nn.initializers.zeros, (*self.grid, self.width))
            x = x + table.reshape(1, -1, self.width)
            x = fx.Encoder(self.depth, self.heads, self.hidden, name="Transformer")(x)
            return fx.MAPHead(self.heads, self.hidden, name="MAPHead_0")(x)

    return NaFlexImage


def init(*, seed: int = 0, head: bool = True, **sizes: Any) -> big_vision.Flat:
    """Randomised parameters as a flat dict of npz keys, without ``params/``; text as `big_vision.init`."""
    fx, size = big_vision._flax(), Size(**sizes)
    grid = (size.image_hw[0] // size.patch, size.image_hw[1] // size.patch)
    image = _flax()(size.image_width, size.image_depth, size.image_heads, size.image_hidden, grid)
    example = fx.jnp.zeros((1, grid[0] * grid[1], size.patch**2 * 3))
    variables = fx.jax.eval_shape(image.init, fx.jax.random.PRNGKey(0), example)
    shapes = big_vision._flatten(variables["params"], "img")
    generator = torch.Generator().manual_seed(613 + seed)
    others = big_vision.init(seed=seed, head=head, **sizes)
    return {key: big_vision._random(key, value.shape, generator) for key, value in shapes.items()} | {
        key: value for key, value in others.items() if not key.startswith("img/")
    }


@torch.no_grad()
def forward(flat: Mapping[str, NDArray[Any]], images: Tensor | None, tokens: Tensor | None) -> tuple[Any, Any]:
    """The embeddings (image, text) of a flat NaFlex file, not normalised; images at its own grid."""
    fx, flat, image = big_vision._flax(), big_vision.plain(flat), None
    if images is not None:
        *grid, width = flat["img/pos_embedding"].shape
        side = round((flat["img/embedding/kernel"].shape[0] / 3) ** 0.5)
        module = _flax()(width, *big_vision._encoder(flat, "img/Transformer"), tuple(grid))
        parameters = big_vision._nest({k.removeprefix("img/"): v for k, v in flat.items() if k.startswith("img/")})
        with fx.jax.default_matmul_precision("float32"):
            y = fx.run(module, parameters, fx.jnp.asarray(patches(images, side).numpy()))
        image = torch.from_numpy(np.array(y))
    return image, big_vision.forward(flat, None, tokens)[1]
