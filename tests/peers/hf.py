"""transformers' two-tower models and single towers, small, and the keys that its versions write to disk.

Functions take the sizes of `common.Size` by name. Activation and eps agree with `peers.openclip` under the
same options: CLIP and MetaClip 2 with `quick_gelu`, SigLIP with `act`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from .common import Size, randomise

transformers.utils.logging.disable_progress_bar()

# "_proj": with the projection
CLIP_TOWERS = {
    "image": transformers.CLIPVisionModel,
    "image_proj": transformers.CLIPVisionModelWithProjection,
    "text": transformers.CLIPTextModel,
    "text_proj": transformers.CLIPTextModelWithProjection,
}
SIGLIP_TOWERS = {"image": transformers.SiglipVisionModel, "text": transformers.SiglipTextModel}


def _configs(size: Size, act: str, eps: float) -> tuple[dict[str, Any], dict[str, Any]]:
    height, width = size.image_hw
    if height != width:
        raise ValueError("transformers' CLIP and SigLIP towers are square")
    vision = {
        "hidden_size": size.image_width,
        "intermediate_size": size.image_hidden,
        "num_hidden_layers": size.image_depth,
        "num_attention_heads": size.image_heads,
        "image_size": height,
        "patch_size": size.patch,
        "projection_dim": size.embed_dim,
    }
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.text_width,
        "intermediate_size": size.text_hidden,
        "num_hidden_layers": size.text_depth,
        "num_attention_heads": size.text_heads,
        "max_position_embeddings": size.context_length,
        "projection_dim": size.embed_dim,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    shared = {"hidden_act": act, "layer_norm_eps": eps}
    return vision | shared, text | shared


def _build(
    both: type[nn.Module], towers: dict[str, type[nn.Module]], tower: str | None, config: Any, seed: int
) -> nn.Module:
    if tower is None:
        return randomise(both(config), seed)
    part = config.vision_config if tower.startswith("image") else config.text_config
    return randomise(towers[tower](part), seed)


def clip(
    *, tower: str | None = None, seed: int = 0, quick_gelu: bool = False, eos: int | None = None, **sizes: Any
) -> nn.Module:
    """CLIPModel, or one tower of it: "image", "image_proj", "text", "text_proj".

    Text is pooled at the first `eos`, the last id of the vocabulary unless given; 2 means the highest id.
    """
    size = Size(**sizes)
    vision, text = _configs(size, "quick_gelu" if quick_gelu else "gelu", 1e-5)
    text["eos_token_id"] = size.vocab - 1 if eos is None else eos
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=size.embed_dim)
    return _build(transformers.CLIPModel, CLIP_TOWERS, tower, config, seed)


def metaclip2(*, seed: int = 0, quick_gelu: bool = False, **sizes: Any) -> nn.Module:
    """MetaClip2Model: CLIP's keys; text pooled at the first id 2 (open_clip: pool_type "eos", eos_id 2)."""
    size = Size(**sizes)
    vision, text = _configs(size, "quick_gelu" if quick_gelu else "gelu", 1e-5)
    text["eos_token_id"] = 2
    config = transformers.MetaClip2Config(vision_config=vision, text_config=text, projection_dim=size.embed_dim)
    return randomise(transformers.MetaClip2Model(config), seed)


def siglip(
    *, tower: str | None = None, seed: int = 0, act: str = "gelu_tanh", eye_head: bool = False, **sizes: Any
) -> nn.Module:
    """SiglipModel, or one tower of it: "image", "text"; as wide, embedding included, as `openclip.siglip`.

    eye_head=True: the text head is the identity, as in the i18n releases (then the text tower is widened).
    """
    size = Size(**sizes)
    size = dataclasses.replace(size, embed_dim=size.image_width)
    if eye_head:
        size = dataclasses.replace(size, text_width=size.image_width)
    vision, text = _configs(size, "gelu_pytorch_tanh" if act == "gelu_tanh" else "gelu", 1e-6)
    text |= {"projection_size": size.embed_dim, "eos_token_id": 2}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    model = _build(transformers.SiglipModel, SIGLIP_TOWERS, tower, config, seed)
    if eye_head and tower != "image":
        head = (model if tower else model.text_model).head
        with torch.no_grad():
            head.weight.copy_(torch.eye(size.embed_dim))
            head.bias.zero_()
    return model


@torch.no_grad()
def image_features(model: nn.Module, images: Tensor, projection: Tensor | None = None) -> Tensor:
    """The peer's own embedding, not normalised; give a bare CLIP tower a `projection` (width, embed_dim)."""
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=images).pooler_output
    else:
        out = model(pixel_values=images)
        out = out.image_embeds if "image_embeds" in out else out.pooler_output
    return out if projection is None else out @ projection


@torch.no_grad()
def text_features(model: nn.Module, tokens: Tensor, projection: Tensor | None = None) -> Tensor:
    """The peer's own embedding, not normalised; give a bare CLIP tower a `projection` (width, embed_dim)."""
    if hasattr(model, "get_text_features"):
        out = model.get_text_features(input_ids=tokens).pooler_output
    else:
        out = model(input_ids=tokens)
        out = out.text_embeds if "text_embeds" in out else out.pooler_output
    return out if projection is None else out @ projection


def disk_keys(model: nn.Module, written_by: int = 5, position_ids: bool = False) -> dict[str, Tensor]:
    """The state dict as transformers 4 or 5 writes it to model.safetensors, in the file's order.

    5 writes a lone tower without its prefix; 4 with ``vision_model.`` or ``text_model.``, and before 4.31
    also the int64 position_ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = {k: v.clone() for k, v in load_file(Path(folder) / "model.safetensors").items()}
    if written_by == 5:
        assert not position_ids, "transformers 5 writes no position_ids"
        return found
    prefix = {"image": "vision_model.", "text": "text_model."}
    for towers in (CLIP_TOWERS, SIGLIP_TOWERS):
        for tower in prefix:
            if type(model) is towers[tower]:
                found = {prefix[tower] + k: v for k, v in found.items()}
    if position_ids:
        for key in [k for k in found if k.endswith("embeddings.position_embedding.weight")]:
            ids = torch.arange(found[key].shape[0])[None]
            found[key.replace("position_embedding.weight", "position_ids")] = ids
    return found
