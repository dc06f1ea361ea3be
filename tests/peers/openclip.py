"""open_clip's own models, small, built from configuration dicts: the targets of a load.

Every function takes the sizes of `common.Size` by name, `seed`, `precision` (open_clip's words), `vision=`
and `text=` for further fields of the two configurations, and whatever the class takes (`quick_gelu`,
`init_logit_bias`, `nonscalar_logit_scale`). Embeddings: ``encode_image`` and ``encode_text``, CoCa's with
``normalize=False``.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.factory import _set_model_device_and_precision
from open_clip.model import CLIP, CustomTextCLIP, get_cast_dtype
from torch import nn

from . import timm_towers
from .common import Size, randomised

Config = Mapping[str, Any]


def _native_vision(size: Size) -> dict[str, Any]:
    return {
        "layers": size.image_depth,
        "width": size.image_width,
        "head_width": size.image_width // size.image_heads,
        "mlp_ratio": size.image_mlp,
        "patch_size": size.patch,
        "image_size": size.image_size,
    }


def native_text(size: Size) -> dict[str, Any]:
    """OpenCLIP's configuration of a text tower of these sizes."""
    return {
        "context_length": size.context_length,
        "vocab_size": size.vocab,
        "width": size.text_width,
        "heads": size.text_heads,
        "layers": size.text_depth,
        "mlp_ratio": size.text_mlp,
    }


def _model(
    kind: type[nn.Module],
    vision: Config,
    text: Config,
    arguments: Mapping[str, Any],
    *,
    embed_dim: int | None = None,
    **fixed: Any,
) -> nn.Module:
    """A randomised model of this class; what `arguments` holds beside the sizes overrides or goes through."""
    rest = fixed | {k: v for k, v in arguments.items() if k not in Size.__dataclass_fields__}
    seed, precision = rest.pop("seed", 0), rest.pop("precision", "fp32")
    model = randomised(
        kind,
        seed=seed,
        embed_dim=embed_dim or _size(arguments).embed_dim,
        vision_cfg={**vision, **rest.pop("vision", {})},
        text_cfg={**text, **rest.pop("text", {})},
        cast_dtype=get_cast_dtype(precision),
        **rest,
    )
    _set_model_device_and_precision(model, torch.device("cpu"), precision, "timm_model_name" in vision)
    return model


def _size(arguments: Mapping[str, Any]) -> Size:
    return Size(**{k: v for k, v in arguments.items() if k in Size.__dataclass_fields__})


def clip(*, kind: type[nn.Module] = CLIP, **arguments: Any) -> nn.Module:
    """CLIP with the native ViT, text keys at the top level (flat)."""
    size = _size(arguments)
    return _model(kind, _native_vision(size), native_text(size), arguments)


def custom(**arguments: Any) -> nn.Module:
    """The same as `clip` with the text keys under ``text.`` (CustomTextCLIP)."""
    return clip(kind=CustomTextCLIP, **arguments)


def resnet(
    *,
    image_size: int = 64,
    image_width: int = 16,
    layers: tuple[int, ...] = (1, 1, 2, 1),
    kind: type[nn.Module] = CLIP,
    **arguments: Any,
) -> nn.Module:
    """Flat CLIP with the modified ResNet; `image_size` is a multiple of 32."""
    vision = {"layers": list(layers), "width": image_width, "image_size": image_size, "patch_size": None}
    return _model(kind, vision, native_text(_size(arguments)), arguments)


def convnext(
    *, head: str = "linear", image_size: int = 64, kind: type[nn.Module] = CLIP, **arguments: Any
) -> nn.Module:
    """Flat CLIP with timm's ConvNeXt and open_clip's own head: "linear" (``head.proj``) or "mlp"."""
    name = timm_towers.convnext_name()
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": head, "image_size": image_size}
    return _model(kind, vision, native_text(_size(arguments)), arguments)


def clip_trunk(*, no_embed_class: bool = False, head_bias: bool = False, **arguments: Any) -> nn.Module:
    """CustomTextCLIP with timm's CLIP ViT (class token, pre-norm, projection as the trunk's own head).

    head.bias is zero unless head_bias=True: only then does the native ViT have the same function.
    """
    size, quick_gelu = _size(arguments), arguments.get("quick_gelu", False)
    name = timm_towers.clip_vit_name(quick_gelu=quick_gelu, no_embed_class=no_embed_class, **vars(size))
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": size.image_size}
    model = _model(CustomTextCLIP, vision, native_text(size), arguments)
    return model if head_bias else timm_towers.zero(model.visual.trunk.head.bias, model)


def siglip(*, act: str = "gelu_tanh", projection: bool = True, logit_bias: bool = True, **arguments: Any) -> nn.Module:
    """CustomTextCLIP with timm's SigLIP ViT (MAP pool) and the native text tower, a Linear as its projection.

    `act` ("gelu_tanh" or "gelu") holds for both towers: transformers and big_vision use tanh. The embedding
    is as wide as the image tower; projection=False leaves the text projection out and makes the text tower as
    wide.
    """
    size = _size(arguments)
    if not projection:
        size = dataclasses.replace(size, text_width=size.image_width)
    vision = {
        "timm_model_name": timm_towers.siglip_vit_name(act=act, **vars(size)),
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": size.image_size,
    }
    text = native_text(size) | {
        "no_causal_mask": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"} if act == "gelu_tanh" else None,
        **({"proj_bias": True} if projection else {"proj_type": "none"}),
    }
    bias = {"init_logit_bias": -10} if logit_bias else {}
    return _model(CustomTextCLIP, vision, text, arguments, embed_dim=size.image_width, **bias)


def coca(*, attn_pool: bool = True, **arguments: Any) -> nn.Module:
    """CoCa; the embedding and the decoder are as wide as the text tower, and the text has a class token.

    Its attention pool has split q/k/v weights unless image_width equals text_width (then one fused weight).
    ``forward`` wants a text of context_length tokens; encode_image and encode_text are as everywhere.
    """
    size = _size(arguments)
    vision = _native_vision(size) | {"output_tokens": True}
    if attn_pool:
        vision |= {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 7}
    text = native_text(size) | {"embed_cls": True, "output_tokens": True}
    decoder = {k: v for k, v in native_text(size).items() if k != "mlp_ratio"} | {"layers": 2}
    return _model(CoCa, vision, text, arguments, embed_dim=size.text_width, multimodal_cfg=decoder)


def hf_config(family: str, size: Size) -> Any:
    """transformers' configuration of a text encoder: "bert", "roberta", "xlm-roberta", "mt5", "m2m_100"."""
    from transformers import CONFIG_MAPPING

    if family == "mt5":
        sizes = {
            "d_model": size.text_width,
            "d_kv": size.text_width // size.text_heads,
            "d_ff": size.text_hidden,
            "num_layers": size.text_depth,
            "num_decoder_layers": 2,
            "num_heads": size.text_heads,
        }
    elif family == "m2m_100":
        sizes = {"d_model": size.text_width, "max_position_embeddings": size.context_length + 2}
        for half, depth in (("encoder", size.text_depth), ("decoder", 2)):
            heads, hidden = size.text_heads, size.text_hidden
            sizes |= {f"{half}_layers": depth, f"{half}_attention_heads": heads, f"{half}_ffn_dim": hidden}
    else:
        sizes = {
            "hidden_size": size.text_width,
            "num_hidden_layers": size.text_depth,
            "num_attention_heads": size.text_heads,
            "intermediate_size": size.text_hidden,
            "max_position_embeddings": size.context_length + 2,  # roberta counts positions from pad_token_id + 1
            "type_vocab_size": 2,
        }
    return CONFIG_MAPPING[family](vocab_size=size.vocab, **sizes)


def hf_text(
    *, family: str = "roberta", pooler: str = "mean_pooler", proj: str | None = "mlp", **arguments: Any
) -> nn.Module:
    """CustomTextCLIP with the native ViT and a text tower of transformers, of a family of `hf_config`.

    Padding id: ``model.text.config.pad_token_id``. proj=None with text_width equal to embed_dim: no projection.
    """
    size = _size(arguments)
    with tempfile.TemporaryDirectory() as folder:
        hf_config(family, size).save_pretrained(folder)
        text = {
            "hf_model_name": folder,
            "hf_model_pretrained": False,
            "hf_pooler_type": pooler,
            "hf_proj_type": proj,
        }
        return _model(CustomTextCLIP, _native_vision(size), text, arguments)
