"""A small model of every layout that OpenCLIP's configurations have: one of each set of keys, indices left out.

Each is a function of the seed. The widths of their towers are those of `common.Size` where the architecture allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from . import eva_clip, mobileclip, openclip, perception, timm_towers
from .common import Size

Build = Callable[..., nn.Module]
_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 48}
_SWIN = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "img_size": 112}
_CONV = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
VITAMIN = {
    "img_size": 64,
    "depth": 2,
    "embed_dim": 48,
    "num_heads": 3,
    "embed_cfg": VitCfg(embed_dim=(8, 16, 48), depths=(2, 2, 1), stem_width=8, conv_cfg=_CONV, head_type="1d"),
}
_CLIPA_TEXT = {"pool_type": "last", "no_causal_mask": True}


def _timm(
    base: str, size: int, kind: type[nn.Module], pool: str = "", proj: str | None = "linear", **options: Any
) -> Build:
    """timm's tower, its projection outside the trunk (linear) or in it (None), and OpenCLIP's text tower."""
    vision = {"timm_pool": pool, "timm_proj": proj, "image_size": size}

    def build(seed: int) -> nn.Module:
        named = {**vision, "timm_model_name": timm_towers.register(base, **options)}
        made = openclip._model(kind, named, openclip.native_text(Size()), {"seed": seed})
        head = getattr(getattr(made.visual.trunk, "head", None), "fc", None)
        return made if proj else timm_towers.zero(head.bias, made)

    return build


def _clipa(seed: int) -> nn.Module:
    vision = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    return openclip.clip(seed=seed, vision=vision, text=_CLIPA_TEXT)


def _siglip_hf_text(seed: int) -> nn.Module:
    """A SigLIP ViT and the encoder of a translation model."""
    size = Size()
    vision = dict.fromkeys(openclip._native_vision(size)) | {
        "timm_model_name": timm_towers.siglip_vit_name(act="gelu", **vars(size)),
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": size.image_size,
    }
    text = {"family": "m2m_100", "proj": "linear", "embed_dim": size.image_width}
    return openclip.hf_text(seed=seed, vision=vision, init_logit_bias=-10, **text)


def _coca_hf_text(seed: int) -> nn.Module:
    """CoCa without attention pool, its text tower a RoBERTa, whose tokens the decoder reads."""
    import tempfile

    size = Size()
    decoder = {k: v for k, v in openclip.native_text(size).items() if k != "mlp_ratio"} | {"layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        openclip.hf_config("roberta", size).save_pretrained(folder)
        text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear", "output_tokens": True}
        vision = openclip._native_vision(size) | {"output_tokens": True}
        return openclip._model(CoCa, vision, text, {"seed": seed}, embed_dim=size.text_width, multimodal_cfg=decoder)


MODELS: dict[str, Build] = {  # by a configuration of that layout
    "ViT-B-16": openclip.clip,
    "ViT-H-14-CLIPA": _clipa,
    "ViT-M-16-alt": lambda seed: openclip.clip(seed=seed, vision={"ls_init_value": 1e-4}),
    "ViT-B-16-SigLIP": openclip.siglip,
    "ViT-SO400M-16-SigLIP-i18n-256": lambda seed: openclip.siglip(seed=seed, projection=False),
    "RN50": openclip.resnet,
    "convnext_base": openclip.convnext,
    "convnext_large_d": lambda seed: openclip.convnext(seed=seed, head="mlp"),
    "swin_base_patch4_window7_224": _timm("swin_base_patch4_window7_224", 112, CLIP, **_SWIN),
    "vit_relpos_medium_patch16_cls_224": _timm("vit_relpos_medium_patch16_cls_224", 48, CLIP, **_VIT),
    "vit_medium_patch16_gap_256": _timm("vit_medium_patch16_gap_256", 48, CLIP, **_VIT),
    "ViTamin-S": _timm("vitamin_small_224", 64, CustomTextCLIP, **VITAMIN),
    "ViTamin-XL-256": _timm("vitamin_xlarge_256", 64, CustomTextCLIP, **VITAMIN),
    "EVA01-g-14": lambda seed: eva_clip.model("EVA01", seed=seed),
    "EVA02-E-14": lambda seed: eva_clip.model("EVA02-E", seed=seed),
    "EVA02-B-16": lambda seed: eva_clip.model("EVA02", seed=seed),
    "PE-Core-B-16": perception.model,
    "PE-Core-bigG-14-448": lambda seed: perception.model(seed=seed, class_token=False),
    "MobileCLIP-B": lambda seed: mobileclip.model("mobileclip_b", seed=seed),
    "MobileCLIP-S1": lambda seed: mobileclip.model("mobileclip_s1", seed=seed),
    "MobileCLIP2-S3": _timm(
        "fastvit_mci3", 64, CustomTextCLIP, "avg", None, layers=(1, 1, 1, 1, 1), embed_dims=(8, 16, 32, 64, 64)
    ),
    "MobileCLIP2-L-14": openclip.clip_trunk,
    "coca_ViT-B-32": openclip.coca,
    "coca_base": lambda seed: openclip.coca(seed=seed, attn_pool=False),
    "coca_roberta-ViT-B-32": _coca_hf_text,
    "roberta-ViT-B-32": openclip.hf_text,
    "mt5-base-ViT-B-32": lambda seed: openclip.hf_text(seed=seed, family="mt5"),
    "nllb-clip-base": lambda seed: openclip.hf_text(seed=seed, family="m2m_100", proj="linear"),
    "nllb-clip-base-siglip": _siglip_hf_text,
}
