"""timm's VisionTransformer, and transformers' ViT, DeiT and DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peers.common import images, randomised
from torch import Tensor, nn

from . import Example

HEADS, CLASSES = 3, 5
SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 28, "patch_size": 14}


def timm_vit(name: str = "vit_base_patch16_224", **options: Any) -> Callable[[], nn.Module]:
    """Makes one of timm's models at the sizes of this module."""

    def made() -> nn.Module:
        import timm

        size = {"embed_dim": 48, "depth": 2, "num_heads": HEADS, "img_size": 28, "patch_size": 14}
        return randomised(timm.create_model, name, **{**size, "mlp_ratio": 2.5, "num_classes": CLASSES, **options})

    return made


def written(model: nn.Module) -> dict[str, Tensor]:
    """The file that ``save_pretrained`` of transformers writes."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def hf(kind: str, **options: Any) -> nn.Module:
    """A model of transformers, by the name of its class."""
    import transformers

    known = getattr(transformers, kind)
    return randomised(known, known.config_class(**{**SIZE, "num_labels": CLASSES, **options}), seed=1)


def logits(theirs: nn.Module) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    return lambda model: [(theirs(images()).logits, model(images()))]


def hf_vit() -> Example:
    theirs = hf("ViTForImageClassification", intermediate_size=120, layer_norm_eps=1e-6)
    return Example(
        "hf_vit",
        written(theirs),
        timm_vit(),
        "transformers ViTForImageClassification",
        outputs=logits(theirs),
        wrong={"DINOv2": timm_vit("vit_small_patch14_dinov2")},
        prefix="vit.",
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {"hf_vit": hf_vit}
ROWS = r"""
hf_vit: q and k swapped: differs
- attention.attention.(query|key|value)
+ attention.attention.(key|query|value)
"""
