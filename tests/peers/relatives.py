"""Relatives of CLIP, small: Long-CLIP, TinyCLIP, Chinese-CLIP (two owners), AltCLIP.

Chinese-CLIP is the cn_clip package and transformers' model; AltCLIP is transformers'. Long-CLIP and TinyCLIP are no
packages: they are put together here from the modules of OpenAI's package, under their own names and with their own
forward pass. Sizes are those of `common.Size`; each function says what its peer fixes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import hf, openai
from .common import Size, randomise

LONG = {**openai.VIT, "context_length": 27}  # Long-CLIP has 248; more than its 20 first rows are needed
TINY_RESNET = openai.RESNET
CN_VIT = {"image_mlp": 4.0}
CN_RESNET = {"image_size": 64, "image_width": 16}
SPLIT = 20  # rows of the first table that Long-CLIP uses


# ------------------------------------------------------------------------------------------------ Long-CLIP
def longclip(*, seed: int = 0, **sizes: Any) -> nn.Module:
    """OpenAI's ViT and text tower with a second table of text positions; sizes as ``**LONG``."""
    model = openai.vit(seed=seed, **{**LONG, **sizes}).float()
    table = torch.randn(model.positional_embedding.shape, generator=torch.Generator().manual_seed(seed + 77))
    model.positional_embedding_res = nn.Parameter(0.5 * table)
    return model


@torch.no_grad()
def longclip_text(model: nn.Module, ids: Tensor) -> Tensor:
    """One mask for each table, as Long-CLIP does it."""
    first = (torch.arange(model.positional_embedding.shape[0]) < SPLIT).float()[:, None]
    x = model.token_embedding(ids)
    x = x + model.positional_embedding * first + model.positional_embedding_res * (1 - first)
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection


# ------------------------------------------------------------------------------------------------- TinyCLIP
class _Tower(nn.Module):
    """A module that holds others."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def tinyclip(*, seed: int = 0, resnet: bool = False, wrapped: bool = False, **sizes: Any) -> nn.Module:
    """Three towers in one module; wrapped=True: each was trained in a wrapper of its own.

    Sizes as ``**openai.VIT`` or ``**openai.RESNET``; GELU in both towers.
    """
    whole = (openai.resnet if resnet else openai.vit)(seed=seed, **sizes).float()
    for module in whole.modules():
        if hasattr(module, "gelu"):
            module.gelu = nn.GELU()
    names = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    towers = {
        "_image_encoder": _Tower(visual=whole.visual),
        "_text_encoder": _Tower(**{name: getattr(whole, name) for name in names}),
        "_logit_scale": _Tower(logit_scale=whole.logit_scale),
    }
    model = _Tower(**{k: _Tower(module=v) if wrapped else v for k, v in towers.items()})
    object.__setattr__(model, "whole", whole)  # the same parameters; no part of the module
    return model.eval()


@torch.no_grad()
def tinyclip_features(model: nn.Module, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return model.whole.encode_image(images), model.whole.encode_text(ids)


_CHANNELS = {  # the axis of a tensor of the image tower that counts the channels of the tower
    "class_embedding": 0,
    "positional_embedding": 1,
    "conv1.weight": 0,
    "proj": 0,
    "in_proj_weight": 1,
    "c_fc.weight": 1,
    "out_proj.weight": 0,
    "out_proj.bias": 0,
    "c_proj.weight": 0,
    "c_proj.bias": 0,
}


def prune(state: dict[str, Tensor], channels: int, head_width: int = 64) -> dict[str, Tensor]:
    """What automatic weight inheritance leaves of the image tower.

    That is the first `channels` of the tower, one head and 96 units in its first block, two and 64 in the others.
    """
    found = {}
    for key, value in state.items():
        if "_image_encoder" not in key:
            found[key] = value
            continue
        first = ".resblocks.0." in key
        inner, units = (head_width, 96) if first else (2 * head_width, 64)
        if ".attn.in_proj_" in key:
            value = torch.cat([part[:inner] for part in value.chunk(3)])
        elif key.endswith("attn.out_proj.weight"):
            value = value[:, :inner]
        elif ".mlp.c_fc." in key:
            value = value[:units]
        elif key.endswith("mlp.c_proj.weight"):
            value = value[:, :units]
        axis = next((n for name, n in _CHANNELS.items() if key.endswith(f".{name}")), None)
        axis = 0 if ".ln_" in key else axis
        found[key] = value if axis is None else value.narrow(axis, 0, channels)
    return found


# --------------------------------------------------------------------------------------------- Chinese-CLIP
def cn_clip(*, seed: int = 0, resnet: bool = False, layers: tuple[int, ...] = (1, 1, 2, 1), **sizes: Any) -> nn.Module:
    """The cn_clip package's own model; sizes as ``**CN_VIT`` or ``**CN_RESNET``."""
    from cn_clip.clip.model import CLIP

    size = Size(**{**(CN_RESNET if resnet else CN_VIT), **sizes})
    model = CLIP(
        embed_dim=size.embed_dim,
        image_resolution=size.image_hw[0],
        vision_layers=layers if resnet else size.image_depth,
        vision_width=size.image_width,
        vision_patch_size=size.patch,
        vision_head_width=64 if resnet else size.image_width // size.image_heads,
        vocab_size=size.vocab,
        text_attention_probs_dropout_prob=0.1,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=0.1,
        text_hidden_size=size.text_width,
        text_initializer_range=0.02,
        text_intermediate_size=size.text_hidden,
        text_max_position_embeddings=size.context_length + 2,
        text_num_attention_heads=size.text_heads,
        text_num_hidden_layers=size.text_depth,
        text_type_vocab_size=2,
    )
    return randomise(model, seed)


def cn_clip_flash(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of FlashAttention's modules, by the package's own converter (which changes what it is given)."""
    from cn_clip.clip.model import convert_state_dict

    return convert_state_dict(dict(state))


def hf_chinese_clip(*, tower: str | None = None, seed: int = 0, **sizes: Any) -> nn.Module:
    """ChineseCLIPModel, or "image" or "text" of it, alone."""
    size = Size(**sizes)
    vision, text = _configs(size)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=size.embed_dim)
    if tower == "image":
        return randomise(transformers.ChineseCLIPVisionModel(config.vision_config), seed)
    if tower == "text":
        return randomise(transformers.ChineseCLIPTextModel(config.text_config), seed)
    return randomise(transformers.ChineseCLIPModel(config), seed)


def _configs(size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    vision, _ = hf._configs(size, "quick_gelu", 1e-5)
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.text_width,
        "num_hidden_layers": size.text_depth,
        "num_attention_heads": size.text_heads,
        "intermediate_size": size.text_hidden,
        "max_position_embeddings": size.context_length + 2,
        "type_vocab_size": 2,
    }
    return vision, text


# -------------------------------------------------------------------------------------------------- AltCLIP
def hf_altclip(*, tower: str | None = None, seed: int = 0, **sizes: Any) -> nn.Module:
    """AltCLIPModel, or "image" or "text" of it, alone."""
    size = Size(**sizes)
    vision, text = _configs(size)
    text["project_dim"] = size.text_width + 4
    config = transformers.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=size.embed_dim)
    if tower == "image":
        return randomise(transformers.AltCLIPVisionModel(config.vision_config), seed)
    if tower == "text":
        return randomise(transformers.AltCLIPTextModel(config.text_config), seed)
    return randomise(transformers.AltCLIPModel(config), seed)


ALTCLIP_FORMS = ("written by 5", "written by 4", "in memory")


def altclip_keys(model: nn.Module, form: str) -> dict[str, Tensor]:
    """AltCLIPModel's state dict in one of its forms: they say layer or layers, each tower for itself."""
    if form == "written by 5":
        return hf.disk_keys(model)
    found = {key: value.clone() for key, value in model.state_dict().items()}
    if form == "in memory":
        return found
    ids = torch.arange(found["vision_model.embeddings.position_embedding.weight"].shape[0])[None]
    named = {k.replace("roberta.encoder.layers.", "roberta.encoder.layer."): v for k, v in found.items()}
    return {**named, "vision_model.embeddings.position_ids": ids}
