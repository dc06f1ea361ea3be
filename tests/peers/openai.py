"""OpenAI's own CLIP (the openai-clip package), small, stored as published: fp16 but for norms and embeddings.

The package fixes 64-wide image heads and 4-fold MLPs: give ``**VIT`` or ``**RESNET`` to `peers.openclip` as
well, with ``quick_gelu=True``. It is imported at the first call.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import Size, randomise

_MLP = {"image_mlp": 4.0, "text_mlp": 4.0}
VIT: dict[str, Any] = {"image_width": 128, "image_heads": 2, **_MLP}  # openclip.clip(**VIT, quick_gelu=True)
RESNET: dict[str, Any] = {
    "image_size": 64,
    "image_width": 16,
    **_MLP,
}  # openclip.resnet(**RESNET, quick_gelu=True)
RESNET_LAYERS = (1, 1, 2, 1)


def _build(size: Size, layers: int | tuple[int, ...], seed: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package imports pkg_resources
        from clip.model import CLIP, convert_weights

    model = CLIP(
        embed_dim=size.embed_dim,
        image_resolution=size.image_hw[0],
        vision_layers=layers,
        vision_width=size.image_width,
        vision_patch_size=size.patch,
        context_length=size.context_length,
        vocab_size=size.vocab,
        transformer_width=size.text_width,
        transformer_heads=size.text_heads,
        transformer_layers=size.text_depth,
    )
    convert_weights(randomise(model, seed))
    return model


def vit(*, seed: int = 0, **sizes: Any) -> nn.Module:
    """CLIP with a ViT."""
    size = Size(**{**VIT, **sizes})
    return _build(size, size.image_depth, seed)


def resnet(*, seed: int = 0, layers: tuple[int, ...] = RESNET_LAYERS, **sizes: Any) -> nn.Module:
    """CLIP with the modified ResNet."""
    return _build(Size(**{**RESNET, **sizes}), layers, seed)


@torch.no_grad()
def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """The embedding of the stored fp16 values, computed in fp32."""
    return copy.deepcopy(model).float().encode_image(images)


@torch.no_grad()
def text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """The embedding of the stored fp16 values, computed in fp32."""
    return copy.deepcopy(model).float().encode_text(tokens)


EXTRAS = ("input_resolution", "context_length", "vocab_size")  # 0-dim int64 beside the weights


def _with_extras(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    values = (model.visual.input_resolution, model.context_length, model.vocab_size)
    for name, value in zip(EXTRAS, values, strict=True):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    return model


def state_dict(model: nn.Module, extras: bool = True) -> dict[str, Tensor]:
    """The keys and dtypes of OpenAI's files; extras=False without the three numbers."""
    return {k: v.detach().clone() for k, v in (_with_extras(model) if extras else model).state_dict().items()}


def save_state_dict(model: nn.Module, path: str | Path, extras: bool = True) -> None:
    """A plain torch file."""
    torch.save(state_dict(model, extras), path)


def save_archive(model: nn.Module, path: str | Path) -> None:
    """A TorchScript archive, as OpenAI publishes."""
    size = model.visual.input_resolution
    tokens = torch.randint(0, model.vocab_size, (2, model.context_length))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        archive = torch.jit.trace(_with_extras(model), (torch.randn(2, 3, size, size), tokens), check_trace=False)
        torch.jit.save(archive, str(path))
