"""timm's image towers, small; and names for them, so that open_clip can build the same ones.

``clip_vit(...)`` and the like return a randomised model, whose embedding is ``model(images)``.
``clip_vit_name(...)`` and the like register the architecture and return the name for ``timm_model_name``.
"""

from __future__ import annotations

import zlib

import timm
import torch
from timm.models import is_model, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

from .common import Size, randomised

CONVNEXT_IMAGE = 64  # ConvNeXt and ResNet reduce by 32: a 2 x 2 map
_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 40)}


def register(base: str, **arguments: object) -> str:
    """Register timm's `base` with these arguments as its defaults; equal arguments give one name."""
    name = f"keymap_{base}_{zlib.crc32(repr(sorted(arguments.items())).encode()):08x}"
    if not is_model(name):

        def build(pretrained: bool = False, **overrides: object) -> nn.Module:
            overrides = {k: v for k, v in overrides.items() if not k.startswith(("pretrained_cfg", "cache_dir"))}
            model = timm.create_model(base, pretrained=False, **{**arguments, **overrides})
            model.pretrained_cfg = model.default_cfg = {
                **model.pretrained_cfg,
                "architecture": name,
            }  # as timm names it
            return model

        build.__name__ = name
        register_model(build)
    return name


def vit_sizes(size: Size) -> dict[str, object]:
    """timm's arguments of a ViT of these sizes."""
    return {
        "img_size": size.image_hw,
        "patch_size": size.patch,
        "embed_dim": size.image_width,
        "depth": size.image_depth,
        "num_heads": size.image_heads,
        "mlp_ratio": size.image_mlp,
    }


def _clip_vit(size: Size, quick_gelu: bool, no_embed_class: bool) -> tuple[str, dict[str, object]]:
    base = "vit_base_patch16_clip_quickgelu_224" if quick_gelu else "vit_base_patch16_clip_224"
    return base, vit_sizes(size) | {"no_embed_class": no_embed_class}


def clip_vit_name(*, quick_gelu: bool = False, no_embed_class: bool = False, **sizes: object) -> str:
    base, arguments = _clip_vit(Size(**sizes), quick_gelu, no_embed_class)
    return register(base, **arguments)


def clip_vit(
    *,
    seed: int = 0,
    quick_gelu: bool = False,
    head_bias: bool = False,
    no_embed_class: bool = False,
    **sizes: object,
) -> nn.Module:
    """ViT with class token, pre-norm, a head as projection; head.bias is zero, as CLIP's are, or random."""
    base, arguments = _clip_vit(size := Size(**sizes), quick_gelu, no_embed_class)
    model = randomised(timm.create_model, base, num_classes=size.embed_dim, **arguments, seed=seed)
    return model if head_bias else zero(model.head.bias, model)


def siglip_vit_name(*, act: str = "gelu_tanh", **sizes: object) -> str:
    return register("vit_base_patch16_siglip_224", act_layer=act, **vit_sizes(Size(**sizes)))


def siglip_vit(*, seed: int = 0, act: str = "gelu_tanh", **sizes: object) -> nn.Module:
    """ViT without class token, pooled by a learned query (MAP); the width is the embedding."""
    arguments = vit_sizes(Size(**sizes)) | {"act_layer": act, "num_classes": 0}
    return randomised(timm.create_model, "vit_base_patch16_siglip_224", **arguments, seed=seed)


def convnext_name() -> str:
    return register("convnext_tiny", **_CONVNEXT)


def convnext(*, seed: int = 0, mlp_head: bool = False, head_bias: bool = False, **sizes: object) -> nn.Module:
    """ConvNeXt with ``head.fc``, or with ``head.pre_logits.fc`` before it; head.fc.bias is zero or random."""
    embed_dim = Size(**sizes).embed_dim
    hidden = {"head_hidden_size": 2 * embed_dim} if mlp_head else {}
    model = randomised(timm.create_model, "convnext_tiny", num_classes=embed_dim, **_CONVNEXT, **hidden, seed=seed)
    return model if head_bias else zero(model.head.fc.bias, model)


def resnet_clip(
    *,
    seed: int = 0,
    image_size: int = 64,
    image_width: int = 16,
    layers: tuple[int, ...] = (1, 1, 2, 1),
    **sizes: object,
) -> nn.Module:
    """CLIP's modified ResNet with timm's names (``resnet50_clip``): three-layer stem, attention pool."""
    size = Size(**sizes)
    blocks = tuple(
        ByoBlockCfg(type="bottle", d=depth, c=image_width * 4 * 2**stage, s=1 if stage == 0 else 2, br=0.25)
        for stage, depth in enumerate(layers)
    )
    config = ByoModelCfg(
        blocks=blocks,
        stem_chs=(image_width // 2, image_width // 2, image_width),
        stem_type="",
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    return randomised(ByobNet, config, num_classes=size.embed_dim, img_size=image_size, seed=seed)


def zero(tensor: torch.Tensor, model: nn.Module) -> nn.Module:
    with torch.no_grad():
        tensor.zero_()
    return model
