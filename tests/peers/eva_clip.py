"""EVA-CLIP's own models, small: state dicts with the names of its .pt files, and its forward pass in plain torch.

Three builds: "EVA02" (B and L: q, k and v apart, norms inside attention and MLP, a gated MLP, rotary positions),
"EVA01" (g: joint qkv, GELU) and "EVA02-E" (as EVA01, norms after each branch). The text tower is OpenCLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, silu

from . import openclip, timm_towers
from .common import Size

State = Mapping[str, Tensor]
KINDS = ("EVA02", "EVA01", "EVA02-E")
TRAINED = 5  # the side of the grid that rotary positions were made for; 2 x 2 patches are spread over it
EPS = 1e-6
_BASE = {"EVA02": "eva02_base_patch16_clip_224", "EVA01": "eva_giant_patch14_clip_224"}
_BASE["EVA02-E"] = "eva02_enormous_patch14_clip_224"
_NATIVE = dict.fromkeys(["layers", "width", "head_width", "mlp_ratio", "patch_size"])


def model(kind: str, *, seed: int = 0, **sizes: object) -> nn.Module:
    """The open_clip model that such a file loads into."""
    size = Size(**sizes)
    arguments = timm_towers.vit_sizes(size)
    if kind == "EVA02":
        arguments["ref_feat_shape"] = (TRAINED, TRAINED)
    vision = {
        "timm_model_name": timm_towers.register(_BASE[kind], **arguments),
        "timm_pool": "token",
        "timm_proj": None,
        "image_size": size.image_size,
    }
    return openclip.custom(vision={**_NATIVE, **vision}, seed=seed, **sizes)


def rotary(size: Size) -> dict[str, Tensor]:
    """The cosines and sines that eva_clip keeps as buffers, (patches, width of a head)."""
    height, width = (side // size.patch for side in size.image_hw)
    half = size.image_width // size.image_heads // 2
    bands = 10000.0 ** (-torch.arange(0, half, 2)[: half // 2].float() / half)

    def angles(side: int) -> Tensor:
        places = torch.arange(side) / side * TRAINED
        return torch.einsum("i,f->if", places, bands).repeat_interleave(2, -1)

    rows = angles(height)[:, None].expand(height, width, half)
    columns = angles(width)[None].expand(height, width, half)
    whole = torch.cat([rows, columns], -1).reshape(height * width, 2 * half)
    return {"freqs_cos": whole.cos(), "freqs_sin": whole.sin()}


def state_dict(kind: str, *, seed: int = 0, text_of: nn.Module | None = None, **sizes: object) -> dict[str, Tensor]:
    """A random state dict with eva_clip's names; the text tower and the scale are those of `text_of`."""
    size = Size(**sizes)
    width, hidden = size.image_width, size.image_hidden
    generator = torch.Generator().manual_seed(seed + 77)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x * (x.numel() / shape[0]) ** -0.5 if len(shape) in (2, 4) else 0.4 * x

    def norm(name: str, length: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(length), f"{name}.bias": draw(length)}

    def layer(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    patches = (size.image_hw[0] // size.patch) * (size.image_hw[1] // size.patch)
    image = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, patches + 1, width),
        "patch_embed.proj.weight": draw(width, 3, size.patch, size.patch),
        "patch_embed.proj.bias": draw(width),
    }
    tables = rotary(size) if kind == "EVA02" else {}
    image |= {f"rope.{key}": value for key, value in tables.items()}
    for i in range(size.image_depth):
        block = norm("norm1", width) | {"attn.q_bias": draw(width), "attn.v_bias": draw(width)}
        if kind == "EVA02":
            block |= {f"attn.{x}_proj.weight": draw(width, width) for x in "qkv"}
            block |= norm("attn.inner_attn_ln", width)
            block |= {f"attn.rope.{key}": value.clone() for key, value in tables.items()}
        else:
            block |= {"attn.qkv.weight": draw(3 * width, width)}
        block |= layer("attn.proj", width, width) | norm("norm2", width)
        if kind == "EVA02":
            block |= layer("mlp.w1", hidden, width) | layer("mlp.w2", hidden, width)
            block |= norm("mlp.ffn_ln", hidden) | layer("mlp.w3", width, hidden)
        else:
            block |= layer("mlp.fc1", hidden, width) | layer("mlp.fc2", width, hidden)
        image |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    image |= norm("norm", width) | layer("head", size.embed_dim, width)
    other = (text_of or openclip.custom(seed=seed, **sizes)).state_dict()
    rest = {k: v.clone() for k, v in other.items() if not k.startswith("visual.")}
    return {f"visual.{key}": value for key, value in image.items()} | rest


@torch.no_grad()
def image_features(state: State, kind: str, images: Tensor, **sizes: object) -> Tensor:
    """The image embedding, as eva_clip computes it from its own names."""
    size = Size(**sizes)
    heads, batch = size.image_heads, len(images)

    def get(name: str) -> Tensor:
        return state[f"visual.{name}"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), EPS)

    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def turned(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turn = torch.stack([-odd, even], -1).flatten(-2)
        return x * get("rope.freqs_cos") + turn * get("rope.freqs_sin")

    def attention(name: str, x: Tensor) -> Tensor:
        q_bias, v_bias = get(f"{name}.q_bias"), get(f"{name}.v_bias")
        if kind == "EVA02":
            weights = [get(f"{name}.{part}_proj.weight") for part in "qkv"]
        else:
            weights = list(get(f"{name}.qkv.weight").chunk(3))
        biases = (q_bias, torch.zeros_like(q_bias), v_bias)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        if kind == "EVA02":  # the class token keeps its place
            q, k = (torch.cat([part[:, :, :1], turned(part[:, :, 1:])], 2) for part in (q, k))
        mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        return layer(f"{name}.proj", norm(f"{name}.inner_attn_ln", mixed) if kind == "EVA02" else mixed)

    def mlp(name: str, x: Tensor) -> Tensor:
        if kind != "EVA02":
            return layer(f"{name}.fc2", gelu(layer(f"{name}.fc1", x)))
        gated = silu(layer(f"{name}.w1", x)) * layer(f"{name}.w2", x)
        return layer(f"{name}.w3", norm(f"{name}.ffn_ln", gated))

    kernel = get("patch_embed.proj.weight")
    x = nn.functional.conv2d(images, kernel, get("patch_embed.proj.bias"), stride=kernel.shape[-1])
    x = torch.cat([get("cls_token").expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1) + get("pos_embed")
    for i in range(size.image_depth):
        block = f"blocks.{i}"
        if kind == "EVA02-E":
            x = x + norm(f"{block}.norm1", attention(f"{block}.attn", x))
            x = x + norm(f"{block}.norm2", mlp(f"{block}.mlp", x))
        else:
            x = x + attention(f"{block}.attn", norm(f"{block}.norm1", x))
            x = x + mlp(f"{block}.mlp", norm(f"{block}.norm2", x))
    return layer("head", norm("norm", x)[:, 0])
