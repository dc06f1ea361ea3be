"""Perception Encoder, PE-Core, small: state dicts with the names of its .pt files, and its forward pass in plain torch.

The text tower is CLIP's, without a prefix. ``class_token=False`` is the build of G.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from . import openclip, timm_towers
from .common import Size

State = Mapping[str, Tensor]
EPS = 1e-5
POOL_HEADS = 8
_NATIVE = dict.fromkeys(["layers", "width", "head_width", "mlp_ratio", "patch_size"])


def model(*, class_token: bool = True, seed: int = 0, **sizes: object) -> nn.Module:
    """The open_clip model that such a file loads into; the bias of its head is zero, as the files have none."""
    size = Size(**sizes)
    grid = tuple(side // size.patch for side in size.image_hw)
    base = "vit_pe_core_tiny_patch16_384" if class_token else "vit_pe_core_gigantic_patch14_448"
    name = timm_towers.register(
        base,
        img_size=size.image_hw,
        patch_size=size.patch,
        embed_dim=size.image_width,
        depth=size.image_depth,
        num_heads=size.image_heads,
        mlp_ratio=size.image_mlp,
        ref_feat_shape=grid,
        attn_pool_mlp_ratio=size.image_mlp,
    )
    vision = {"timm_model_name": name, "timm_pool": "map", "timm_proj": None, "image_size": size.image_size}
    made = openclip.custom(vision={**_NATIVE, **vision}, seed=seed, **sizes)
    return timm_towers.zero(made.visual.trunk.head.bias, made)


def state_dict(
    *,
    class_token: bool = True,
    seed: int = 0,
    text_of: nn.Module | None = None,
    pool_hidden: int | None = None,
    **sizes: object,
) -> dict[str, Tensor]:
    """A random state dict with the names of PE-Core; the text tower and the scale are those of `text_of`, a CLIP.

    pool_hidden: units of the pool's MLP, as many as a block's unless given (the releases have four times the width).
    """
    size = Size(**sizes)
    width, hidden = size.image_width, size.image_hidden
    generator = torch.Generator().manual_seed(seed + 99)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x * (x.numel() / shape[0]) ** -0.5 if len(shape) == 4 or (len(shape) == 2 and shape[0] > 9) else 0.4 * x

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    def layer(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    def joined(name: str) -> dict[str, Tensor]:
        return {f"{name}.in_proj_weight": draw(3 * width, width), f"{name}.in_proj_bias": draw(3 * width)} | layer(
            f"{name}.out_proj", width, width
        )

    def mlp(name: str, units: int = hidden) -> dict[str, Tensor]:
        return layer(f"{name}.c_fc", units, width) | layer(f"{name}.c_proj", width, units)

    rows = (size.image_hw[0] // size.patch) * (size.image_hw[1] // size.patch) + class_token
    image = {"class_embedding": draw(width)} if class_token else {}
    image |= {"positional_embedding": draw(rows, width), "proj": draw(width, size.embed_dim)}
    image |= {"conv1.weight": draw(width, 3, size.patch, size.patch)} | norm("ln_pre")
    for i in range(size.image_depth):
        block = joined("attn") | norm("ln_1") | mlp("mlp") | norm("ln_2")
        image |= {f"transformer.resblocks.{i}.{key}": value for key, value in block.items()}
    image |= norm("ln_post") | {"attn_pool.probe": draw(1, 1, width)} | joined("attn_pool.attn")
    image |= norm("attn_pool.layernorm") | mlp("attn_pool.mlp", pool_hidden or hidden)
    other = (text_of or openclip.clip(seed=seed, **sizes)).state_dict()
    rest = {k: v.clone() for k, v in other.items() if not k.startswith("visual.")}
    return {f"visual.{key}": value for key, value in image.items()} | rest


@torch.no_grad()
def image_features(state: State, images: Tensor, **sizes: object) -> Tensor:
    """The image embedding, as perception_models computes it from its own names."""
    size = Size(**sizes)
    height, width = (side // size.patch for side in size.image_hw)
    offset = 1 if "visual.class_embedding" in state else 0  # places are counted from 1 beside a class token

    def get(name: str) -> Tensor:
        return state[f"visual.{name}"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), EPS)

    def mlp(name: str, x: Tensor) -> Tensor:
        hidden = gelu(linear(x, get(f"{name}.c_fc.weight"), get(f"{name}.c_fc.bias")))
        return linear(hidden, get(f"{name}.c_proj.weight"), get(f"{name}.c_proj.bias"))

    quarter = size.image_width // size.image_heads // 4
    bands = 10000.0 ** (-torch.arange(quarter).float() / quarter)
    across = (torch.arange(width) + offset)[None, :, None] * bands
    down = (torch.arange(height) + offset)[:, None, None] * bands
    angles = torch.cat([across.expand(height, width, -1), down.expand(height, width, -1)], -1)
    angles = angles.reshape(height * width, -1).repeat_interleave(2, -1)
    angles = torch.cat([torch.zeros(offset, angles.shape[1]), angles])  # the class token is at 0

    def turned(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * angles.cos() + torch.stack([-odd, even], -1).flatten(-2) * angles.sin()

    def attention(name: str, query: Tensor, other: Tensor, heads: int, rotate: bool) -> Tensor:
        parts = zip((query, other, other), get(f"{name}.in_proj_weight").chunk(3), strict=True)
        biases = get(f"{name}.in_proj_bias").chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for (x, weight), bias in zip(parts, biases, strict=True)
        )
        if rotate:
            q, k = turned(q), turned(k)
        mixed = ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return linear(mixed, get(f"{name}.out_proj.weight"), get(f"{name}.out_proj.bias"))

    x = nn.functional.conv2d(images, get("conv1.weight"), stride=size.patch).flatten(2).transpose(1, 2)
    if offset:
        x = torch.cat([get("class_embedding").expand(len(x), 1, -1), x], 1)
    x = norm("ln_pre", x + get("positional_embedding"))
    for i in range(size.image_depth):
        block = f"transformer.resblocks.{i}"
        inside = norm(f"{block}.ln_1", x)
        x = x + attention(f"{block}.attn", inside, inside, size.image_heads, True)
        x = x + mlp(f"{block}.mlp", norm(f"{block}.ln_2", x))
    x = norm("ln_post", x)
    probe = get("attn_pool.probe").expand(len(x), -1, -1)
    pooled = attention("attn_pool.attn", probe, x, POOL_HEADS, False)
    pooled = pooled + mlp("attn_pool.mlp", norm("attn_pool.layernorm", pooled))
    return pooled[:, 0] @ get("proj")
