"""Files of every format at full size: names, shapes and dtypes that the owner's own code gives, and no memory.

``of(configuration)`` says for each format what a file of it holds for that configuration of OpenCLIP, or why there is
no such file. The names are never OpenCLIP's converted back: they are those of transformers, timm, OpenAI's and
Chinese-CLIP's packages on the meta device, of flax modules that are traced, and of the key lists of Apple's,
EVA-CLIP's and Perception Encoder's code. Sizes come from OpenCLIP's JSON, or from the owner's own tables below.

A file exists if the format's code can express the tower, released or not: people train their own. Where only one
tower fits, the file counts for that tower.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from . import big_vision, eva_clip, full_size, lit, mobileclip, naflex, openai, other_names, perception, timm_towers
from .common import Size

Keys = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A file of one format for one configuration.

    Attributes:
        peer: whose code gives the names.
        keys: makes the tensors, on the meta device.
        towers: what is asked for; None for the whole file.
        others: how keys of the file begin that belong to towers not asked for.
        lacks: how keys of the model begin for which no such file has a tensor; such a file is loaded with strict=False.
    """

    peer: str
    keys: Callable[[], Keys]
    towers: tuple[str, ...] | None = None
    others: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------- configurations
_VITS = {  # timm's words for the sizes of SigLIP's and CLIP's towers: width, blocks, heads, hidden units
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_VIT_NAME = re.compile(r"vit_(\w+?)_patch(\d+)_(clip|siglip)_(\d+)")


@dataclass(frozen=True)
class Configuration:
    """One of OpenCLIP's configurations, as its JSON has it."""

    name: str

    @cached_property
    def raw(self) -> dict[str, Any]:
        return open_clip.get_model_config(self.name)

    @cached_property
    def vision(self) -> CLIPVisionCfg:
        return CLIPVisionCfg(**self.raw["vision_cfg"])

    @cached_property
    def text(self) -> CLIPTextCfg:
        return CLIPTextCfg(**self.raw["text_cfg"])

    @property
    def quick_gelu(self) -> bool:
        return self.raw.get("quick_gelu", False)

    @property
    def timm(self) -> str:
        return self.vision.timm_model_name or ""

    @property
    def act(self) -> str:
        """The activation of OpenCLIP's own towers, in transformers' word."""
        return "quick_gelu" if self.quick_gelu else "gelu"

    @property
    def image(self) -> str:
        """The kind of the image tower: vit, resnet, clip or siglip of timm, timm."""
        if not self.timm:
            return "resnet" if isinstance(self.vision.layers, (tuple, list)) else "vit"
        found = _VIT_NAME.fullmatch(self.timm)
        return found.group(3) if found else "timm"

    @cached_property
    def size(self) -> Size:
        """Both towers' sizes. Without those of a Hugging Face text tower."""
        v, t = self.vision, self.text
        if found := _VIT_NAME.fullmatch(self.timm):
            width, depth, heads, hidden = _VITS[found.group(1)]
            image = {"patch": int(found.group(2)), "image_mlp": hidden / width}
        elif self.image == "vit":
            width, depth, heads = v.width, v.layers, v.width // v.head_width
            image = {"patch": v.patch_size, "image_mlp": v.mlp_ratio}
        else:
            width, depth, heads, image = v.width, 0, v.width * 32 // v.head_width, {}
        return Size(
            embed_dim=self.raw["embed_dim"],
            image_size=v.image_size,
            image_width=width,
            image_heads=heads,
            image_depth=depth,
            context_length=t.context_length,
            vocab=t.vocab_size,
            text_width=t.width,
            text_heads=t.heads,
            text_depth=t.layers,
            text_mlp=t.mlp_ratio,
            **image,
        )

    # Why a tower is not what most formats mean by one; empty where it is.

    @property
    def no_clip_image(self) -> str:
        """No ViT as transformers' CLIP has it: class token, a norm before the blocks, a projection."""
        v = self.vision
        if self.image == "clip":
            return ""
        if self.image != "vit":
            return "the image tower is not a ViT with class token like CLIP's"
        if v.no_ln_pre:
            return "the image tower has no norm before its blocks"
        if v.ls_init_value is not None:
            return "the image tower has layer scales"
        if v.attentional_pool:
            return "the image tower has an attention pool"
        assert v.pool_type == "tok" and not v.final_ln_after_pool, self.name
        return ""

    @property
    def no_clip_text(self) -> str:
        """No text tower as transformers' CLIP has it: causal, one token pooled, a projection without bias."""
        t = self.text
        if t.hf_model_name:
            return "the text tower is the encoder of a language model"
        if t.embed_cls:
            return "the text tower has a class token"
        if t.no_causal_mask:
            return "the text tower has no causal mask"
        assert t.pool_type in ("argmax", "eos") and not t.proj_bias and t.proj_type == "linear", self.name
        return ""

    @property
    def siglip_text(self) -> bool:
        t = self.text
        return (
            not t.hf_model_name
            and t.no_causal_mask
            and t.pool_type == "last"
            and (t.proj_bias or t.proj_type == "none")
        )


def _meta(make: Callable[[], nn.Module]) -> nn.Module:
    with full_size.on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# ----------------------------------------------------------------------------------------------- transformers
class Saved(dict[str, Tensor]):
    """What transformers saves: tensors, and the text of config.json."""

    config: str


def saved(model: nn.Module) -> Saved:
    """The keys that transformers writes for a model, without writing: ties once, names of the original format."""
    from transformers.core_model_loading import revert_weight_conversion

    copies = model.all_tied_weights_keys
    found = Saved(revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in copies}))
    found.config = model.config.to_json_string()
    return found


def _halves(size: Size, act: str, eps: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the configurations of transformers' image and text towers have in common."""
    both = {"hidden_act": act, "layer_norm_eps": eps, "projection_dim": size.embed_dim}
    vision = {
        "hidden_size": size.image_width,
        "intermediate_size": size.image_hidden,
        "num_hidden_layers": size.image_depth,
        "num_attention_heads": size.image_heads,
        "image_size": size.image_size,
        "patch_size": size.patch,
    }
    text = {
        "vocab_size": size.vocab,
        "hidden_size": size.text_width,
        "intermediate_size": size.text_hidden,
        "num_hidden_layers": size.text_depth,
        "num_attention_heads": size.text_heads,
        "max_position_embeddings": size.context_length,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return vision | both, text | both


_TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@lru_cache(maxsize=64)
def hf_clip(size: Size, kind: str, act: str, eos: int) -> Keys:
    """Of CLIPModel, MetaClip2Model, or a lone tower with its projection."""
    vision, text = _halves(size, act, 1e-5)
    text["eos_token_id"] = eos
    if kind == "MetaClip2Model":
        config = transformers.MetaClip2Config(vision_config=vision, text_config=text, projection_dim=size.embed_dim)
    else:
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=size.embed_dim)
    part = config.vision_config if "Vision" in kind else config.text_config if "Text" in kind else config
    return saved(_meta(lambda: getattr(transformers, kind)(part)))


@lru_cache(maxsize=64)
def hf_siglip(size: Size, kind: str) -> Keys:
    """Of SiglipModel, Siglip2Model, or a lone image tower."""
    vision, text = _halves(size, "gelu_pytorch_tanh", 1e-6)
    text["projection_size"] = size.embed_dim
    if "Siglip2" in kind:
        vision["num_patches"] = (vision.pop("image_size") // size.patch) ** 2
    config = (transformers.Siglip2Config if "Siglip2" in kind else transformers.SiglipConfig)(
        vision_config=vision, text_config=text
    )
    return saved(_meta(lambda: getattr(transformers, kind)(config.vision_config if "Vision" in kind else config)))


@lru_cache(maxsize=64)
def hf_altclip(size: Size, act: str) -> Keys:
    vision, _ = _halves(size, act, 1e-5)
    config = transformers.AltCLIPConfig(vision_config=vision, text_config=_TINY_TEXT, projection_dim=size.embed_dim)
    return saved(_meta(lambda: transformers.AltCLIPModel(config)))


@lru_cache(maxsize=64)
def hf_chinese_clip(size: Size, act: str, text: tuple[tuple[str, int], ...] = tuple(_TINY_TEXT.items())) -> Keys:
    vision, _ = _halves(size, act, 1e-5)
    config = transformers.ChineseCLIPConfig(vision_config=vision, text_config=dict(text), projection_dim=size.embed_dim)
    return saved(_meta(lambda: transformers.ChineseCLIPModel(config)))


def hf_dual_encoder(size: Size, act: str) -> Keys:
    vision, _ = _halves(size, act, 1e-5)
    bert = transformers.BertConfig(**dict(_TINY_TEXT))
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**vision), bert, projection_dim=size.embed_dim
    )
    return saved(_meta(lambda: transformers.VisionTextDualEncoderModel(config)))


LANGUAGE_MODELS = {  # as their owners publish them
    "roberta": ("hf_bert", "RobertaForMaskedLM"),
    "xlm-roberta": ("hf_bert", "XLMRobertaForMaskedLM"),
    "mt5": ("hf_mt5", "MT5ForConditionalGeneration"),
    "m2m_100": ("hf_m2m100", "M2M100ForConditionalGeneration"),
}


@lru_cache(maxsize=8)
def language_model(name: str) -> Keys:
    kind, _ = full_size.TEXT_CONFIGS[name]
    return saved(_meta(lambda: getattr(transformers, LANGUAGE_MODELS[kind][1])(full_size.text_config(name))))


# ------------------------------------------------------------------------------------------------------- timm
TIMM_CLIP = {  # timm's own names for towers of OpenCLIP's; the others are built from the sizes
    "ViT-B-16": "vit_base_patch16_clip_224",
    "ViT-B-16-quickgelu": "vit_base_patch16_clip_quickgelu_224",
    "ViT-B-16-plus-240": "vit_base_patch16_plus_clip_240",
    "ViT-B-32": "vit_base_patch32_clip_224",
    "ViT-B-32-256": "vit_base_patch32_clip_256",
    "ViT-B-32-quickgelu": "vit_base_patch32_clip_quickgelu_224",
    "ViT-H-14": "vit_huge_patch14_clip_224",
    "ViT-H-14-378": "vit_huge_patch14_clip_378",
    "ViT-H-14-378-quickgelu": "vit_huge_patch14_clip_quickgelu_378",
    "ViT-H-14-quickgelu": "vit_huge_patch14_clip_quickgelu_224",
    "ViT-H-14-worldwide": "vit_huge_patch14_clip_224",
    "ViT-H-14-worldwide-378": "vit_huge_patch14_clip_378",
    "ViT-L-14": "vit_large_patch14_clip_224",
    "ViT-L-14-336": "vit_large_patch14_clip_336",
    "ViT-L-14-336-quickgelu": "vit_large_patch14_clip_quickgelu_336",
    "ViT-L-14-quickgelu": "vit_large_patch14_clip_quickgelu_224",
    "ViT-M-16": "vit_medium_patch16_clip_224",
    "ViT-M-32": "vit_medium_patch32_clip_224",
    "ViT-bigG-14": "vit_gigantic_patch14_clip_224",
    "ViT-bigG-14-quickgelu": "vit_gigantic_patch14_clip_quickgelu_224",
    "ViT-bigG-14-worldwide-378": "vit_gigantic_patch14_clip_378",
    "ViT-g-14": "vit_giant_patch14_clip_224",
}
TIMM_TOKEN = {"eva_giant_patch14_224": "eva_giant_patch14_clip_224"}  # pooled by average; CLIP's is pooled by token
TIMM_RESNET = {
    name: f"{name.replace('RN', 'resnet')}_clip" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
}


def timm_keys(name: str, num_classes: int, **arguments: Any) -> Keys:
    return _meta(lambda: timm.create_model(name, num_classes=num_classes, **arguments)).state_dict()


def _timm_vit(c: Configuration) -> Keys:
    """timm's ViT of CLIP: by timm's name where it has one, else from the sizes."""
    if c.name in TIMM_CLIP:
        return timm_keys(TIMM_CLIP[c.name], c.size.embed_dim)
    base = "vit_base_patch16_clip_quickgelu_224" if c.quick_gelu else "vit_base_patch16_clip_224"
    return timm_keys(base, c.size.embed_dim, init_values=c.vision.ls_init_value, **timm_towers.vit_sizes(c.size))


def _timm_own(c: Configuration) -> Keys:
    """The timm model of a configuration, with CLIP's projection as its classifier."""
    proj, embed_dim, name = c.vision.timm_proj, c.size.embed_dim, TIMM_TOKEN.get(c.timm, c.timm)
    if proj == "none":
        return timm_keys(name, 0)
    return timm_keys(name, embed_dim, **({"head_hidden_size": 2 * embed_dim} if proj == "mlp" else {}))


# ----------------------------------------------------------------------------------- OpenAI and its relatives
def openai_model(size: Size, layers: int | tuple[int, ...]) -> nn.Module:
    """OpenAI's own class on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package imports pkg_resources
        from clip.model import CLIP
    return _meta(
        lambda: CLIP(
            embed_dim=size.embed_dim,
            image_resolution=size.image_size,
            vision_layers=layers,
            vision_width=size.image_width,
            vision_patch_size=size.patch,
            context_length=size.context_length,
            vocab_size=size.vocab,
            transformer_width=size.text_width,
            transformer_heads=size.text_heads,
            transformer_layers=size.text_depth,
        )
    )


@lru_cache(maxsize=16)
def openai_clip(size: Size, layers: int | tuple[int, ...]) -> Keys:
    """As OpenAI publishes: float16 where its own function puts it, and three numbers."""
    from clip.model import convert_weights

    model = openai_model(size, layers)
    convert_weights(model)
    return {**model.state_dict(), **{name: torch.empty((), dtype=torch.int64) for name in openai.EXTRAS}}


def cn_clip(size: Size, layers: int | tuple[int, ...], **text: Any) -> Keys:
    """Chinese-CLIP's own class on the meta device, in the wrapper's names that its files have."""
    from cn_clip.clip.model import CLIP

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64} | text
    sizes = {"vocab_size": 21128, "max_position_embeddings": 512, "type_vocab_size": 2} | sizes
    model = _meta(
        lambda: CLIP(
            embed_dim=size.embed_dim,
            image_resolution=size.image_size,
            vision_layers=layers,
            vision_width=size.image_width,
            vision_patch_size=size.patch,
            vision_head_width=64 if isinstance(layers, tuple) else size.image_width // size.image_heads,
            text_attention_probs_dropout_prob=0.1,
            text_hidden_act="gelu",
            text_hidden_dropout_prob=0.1,
            text_initializer_range=0.02,
            vocab_size=sizes.pop("vocab_size"),
            **{f"text_{name}": value for name, value in sizes.items()},
        )
    )
    return {f"module.{key}": value for key, value in model.state_dict().items()}


def longclip(size: Size, layers: int) -> Keys:
    """OpenAI's names and a second table of text positions, as Long-CLIP's code has it."""
    found = openai_model(size, layers).state_dict()
    return {**found, "positional_embedding_res": torch.empty_like(found["positional_embedding"])}


def tinyclip(size: Size, layers: int | tuple[int, ...]) -> Keys:
    """OpenAI's names below the three wrappers that TinyCLIP's code puts around its towers."""
    towers = {"visual.": "_image_encoder.module.", "logit_scale": "_logit_scale.module."}
    return {
        next((new for old, new in towers.items() if key.startswith(old)), "_text_encoder.module.") + key: value
        for key, value in openai_model(size, layers).state_dict().items()
    }


# ------------------------------------------------------------------------------------------------- big_vision
_BLOCK = re.compile(r"/encoderblock_0/")


def _traced(module: Any, example: Any, prefix: str, depth: int) -> Keys:
    """Names and shapes that flax gives, of one block; and the same for the others."""
    fx = big_vision._flax()
    variables = fx.jax.eval_shape(module.init, fx.jax.random.PRNGKey(0), example)
    found = {}
    for key, value in big_vision._flatten(variables["params"], prefix).items():
        for i in range(depth if _BLOCK.search(key) else 1):
            found[_BLOCK.sub(f"/encoderblock_{i}/", key)] = torch.empty(value.shape, device="meta")
    return found


@lru_cache(maxsize=32)
def _flax_text(size: Size, out: int | None) -> Keys:
    fx = big_vision._flax()
    module = fx.Text(size.vocab, size.text_width, 1, size.text_heads, size.text_hidden, out)
    return _traced(module, fx.jnp.zeros((1, size.context_length), int), "txt", size.text_depth)


@lru_cache(maxsize=32)
def _flax_image(size: Size, kind: str) -> Keys:
    """The image half of big_vision_siglip, big_vision_naflex or big_vision_lit."""
    fx = big_vision._flax()
    sizes = (size.image_width, 1, size.image_heads, size.image_hidden)
    grid = (size.image_hw[0] // size.patch, size.image_hw[1] // size.patch)
    pixels = fx.jax.ShapeDtypeStruct((1, *size.image_hw, 3), fx.jnp.float32)
    if kind == "big_vision_naflex":
        pixels = fx.jax.ShapeDtypeStruct((1, grid[0] * grid[1], size.patch**2 * 3), fx.jnp.float32)
        module = naflex._flax()(*sizes, grid)
    elif kind == "big_vision_lit":
        module = lit._flax()(*sizes, size.patch, None, False)
    else:
        module = fx.Image(*sizes, size.patch)
    return _traced(module, pixels, "img", size.image_depth)


def flax_two_towers(size: Size, kind: str, head: bool = True) -> Keys:
    """A file of big_vision: both towers, t and b; without b where the model is LiT."""
    scalars = ("t",) if kind == "big_vision_lit" else ("t", "b")
    found = {**_flax_image(size, kind), **_flax_text(size, size.embed_dim if head else None)}
    return {f"params/{k}": v for k, v in found.items()} | {f"params/{k}": torch.empty(1) for k in scalars}


# ------------------------------------------------------------------ EVA-CLIP, Perception Encoder and MobileCLIP
def _image(size: int, patch: int, width: int, depth: int, heads: int, hidden: int) -> dict[str, Any]:
    names = ("image_size", "patch", "image_width", "image_depth", "image_heads", "image_mlp")
    return dict(zip(names, (size, patch, width, depth, heads, hidden / width), strict=True))


def _text(embed_dim: int, width: int, heads: int, depth: int, context: int = 77) -> dict[str, Any]:
    names = ("embed_dim", "text_width", "text_heads", "text_depth", "context_length")
    return {**dict(zip(names, (embed_dim, width, heads, depth, context), strict=True)), "vocab": 49408, "text_mlp": 4.0}


EVA = {  # eva_clip's model_configs
    "EVA01-g-14": ("EVA01", _image(224, 14, 1408, 40, 16, 6144), _text(1024, 768, 12, 12)),
    "EVA01-g-14-plus": ("EVA01", _image(224, 14, 1408, 40, 16, 6144), _text(1024, 1024, 16, 24)),
    "EVA02-B-16": ("EVA02", _image(224, 16, 768, 12, 12, 2048), _text(512, 512, 8, 12)),
    "EVA02-L-14": ("EVA02", _image(224, 14, 1024, 24, 16, 2730), _text(768, 768, 12, 12)),
    "EVA02-L-14-336": ("EVA02", _image(336, 14, 1024, 24, 16, 2730), _text(768, 768, 12, 12)),
    "EVA02-E-14": ("EVA02-E", _image(224, 14, 1792, 64, 16, 15360), _text(1024, 1024, 16, 24)),
    "EVA02-E-14-plus": ("EVA02-E", _image(224, 14, 1792, 64, 16, 15360), _text(1024, 1280, 20, 32)),
}
PE = {  # perception_models' core/vision_encoder/config.py; G has no class token
    "PE-Core-T-16-384": (True, _image(384, 16, 192, 12, 3, 768), _text(512, 512, 8, 12, 32)),
    "PE-Core-S-16-384": (True, _image(384, 16, 384, 12, 6, 1536), _text(512, 512, 8, 12, 32)),
    "PE-Core-B-16": (True, _image(224, 16, 768, 12, 12, 3072), _text(1024, 1024, 16, 24, 32)),
    "PE-Core-L-14-336": (True, _image(336, 14, 1024, 24, 16, 4096), _text(1024, 1024, 16, 24, 32)),
    "PE-Core-bigG-14-448": (False, _image(448, 14, 1536, 50, 16, 8960), _text(1280, 1280, 20, 24, 72)),
}
MOBILE = {  # the format and Apple's name of the file; S0's text tower has no place
    "MobileCLIP-B": ("mobileclip_b", "mobileclip_b"),
    "MobileCLIP2-B": ("mobileclip_b", "mobileclip_b"),
    "MobileCLIP-S1": ("mobileclip_s", "mobileclip_s1"),
    "MobileCLIP-S2": ("mobileclip_s", "mobileclip_s2"),
    "MobileCLIP2-S2": ("mobileclip_s", "mobileclip_s2"),
    "MobileCLIP2-S0": ("mobileclip_s0", "mobileclip_s0"),
}


def _clip_text(size: Size, prefix: str) -> SimpleNamespace:
    """The text half of OpenAI's own class, as a model that the key lists of others end with."""
    tiny = replace(size, image_size=32, patch=32, image_width=64, image_depth=1)
    held = openai_model(tiny, 1).state_dict()
    found = {k if k == "logit_scale" else prefix + k: v for k, v in held.items() if not k.startswith("visual.")}
    return SimpleNamespace(state_dict=lambda: found)


def eva_keys(name: str) -> Keys:
    kind, image, text = EVA[name]
    with full_size.on_meta():
        return eva_clip.state_dict(kind, text_of=_clip_text(Size(**text), "text."), **image, **text)


def perception_keys(name: str) -> Keys:
    class_token, image, text = PE[name]
    with full_size.on_meta():
        return perception.state_dict(
            class_token=class_token,
            text_of=_clip_text(Size(**text), ""),
            pool_hidden=4 * image["image_width"],
            **image,
            **text,
        )


def mobileclip_keys(name: str) -> Keys:
    return {
        key: torch.empty(shape, device="meta", dtype=torch.int64 if key.endswith("num_batches_tracked") else None)
        for key, shape in mobileclip.SHAPES[name].items()
    }


def mobileclip_text_keys(name: str) -> Keys:
    return {key: value for key, value in mobileclip_keys(name).items() if key.startswith("text_encoder.")}


# -------------------------------------------------------------------------------- which files there are, and why
Answer = Source | str
_FLAT_TEXT = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")


def _hf_clip(c: Configuration) -> Answer:
    image, text = c.no_clip_image, c.no_clip_text
    if image and text:
        return f"{image}, and {text}"
    kind = "MetaClip2Model" if c.text.pool_type == "eos" else "CLIPModel"
    if image:
        kind = "CLIPTextModelWithProjection"
    elif text:
        kind = "CLIPVisionModelWithProjection"
    towers = ("text",) if image else ("image",) if text else None
    eos = (c.text.eos_id if c.text.pool_type == "eos" else None) or 2  # with 2, CLIPModel pools at the highest id
    return Source(f"transformers {kind}", partial(hf_clip, c.size, kind, c.act, eos), towers)


def _hf_flax(c: Configuration) -> Answer:
    answer = _hf_clip(c)
    if isinstance(answer, str):
        return answer
    if "MetaClip2" in answer.peer:
        return "transformers has no Flax model of MetaClip 2"
    keys = answer.keys

    def named() -> Keys:
        found = keys()
        prefix = {("text",): "text_model.", ("image",): "vision_model."}.get(answer.towers or (), "")
        whole = {k if k.startswith(("text_", "vi", "logit")) else prefix + k: v for k, v in found.items()}
        return other_names.flax(whole)

    return replace(
        answer, peer=f"the names of transformers Flax{answer.peer.removeprefix('transformers ')}", keys=named
    )


def _wan(c: Configuration) -> Answer:
    if c.name != "xlm-roberta-large-ViT-H-14":
        return "Wan's CLIP is made of xlm-roberta-large-ViT-H-14"
    return Source("the names of Wan's code", lambda: other_names.wan(_state_of(c.name)))


def _state_of(name: str) -> Keys:
    """The state dict of a configuration, on the meta device."""
    return dict(full_size.model(name).state_dict())


def _hf_siglip(c: Configuration, naflex: bool) -> Answer:
    if c.image != "siglip":
        return "the towers are not SigLIP's"
    stem = "Siglip2" if naflex else "Siglip"
    kind, towers = (f"{stem}Model", None) if c.siglip_text else (f"{stem}VisionModel", ("image",))
    return Source(f"transformers {kind}", partial(hf_siglip, c.size, kind), towers)


def _big_vision(c: Configuration, kind: str) -> Answer:
    if c.image != "siglip":
        return "the towers are not SigLIP's"
    peer = "big_vision's modules in flax"
    if c.siglip_text:
        return Source(peer, partial(flax_two_towers, c.size, kind, c.text.proj_type != "none"))
    texts = {"vocab": 32000, "context_length": 64, "text_width": 768, "text_heads": 12, "text_depth": 12}
    whole = replace(c.size, text_mlp=4.0, **texts)
    return Source(peer, partial(flax_two_towers, whole, kind), ("image", "scale"), ("txt/",))


def _openai(c: Configuration) -> Answer:
    if c.image not in ("vit", "resnet"):
        return "OpenAI's code builds only its own ViT and ResNet"
    if c.image == "vit" and c.no_clip_image:
        return c.no_clip_image
    if not c.quick_gelu:
        return "all of OpenAI's models use QuickGELU; this configuration does not"
    if c.image == "vit" and (c.vision.head_width, c.vision.mlp_ratio) != (64, 4.0):
        return "OpenAI's code fixes a head width of 64 and an MLP ratio of 4"
    layers = tuple(c.vision.layers) if c.image == "resnet" else c.size.image_depth
    size, towers, others = c.size, None, ()
    if c.no_clip_text or c.text.pool_type != "argmax":  # another text tower: the image tower of the file alone
        texts = {"vocab": 49408, "context_length": 77, "text_width": 512, "text_heads": 8, "text_depth": 12}
        size, towers, others = replace(size, text_mlp=4.0, **texts), ("image", "scale"), _FLAT_TEXT
    return Source("OpenAI's clip package", partial(openai_clip, size, layers), towers, others)


def _timm(c: Configuration) -> Answer:
    if c.image == "resnet":
        return "for CLIP's ResNets in timm see timm_resnet"
    if c.image != "vit":
        return Source(f"timm {TIMM_TOKEN.get(c.timm, c.timm)}", partial(_timm_own, c), ("image",))
    if c.vision.no_ln_pre:
        return "timm's ViT without a norm before its blocks has a bias in its patch embedding; this tower has neither"
    if c.vision.attentional_pool:
        return "timm has no such attention pool"
    return Source(f"timm {TIMM_CLIP.get(c.name, 'VisionTransformer')}", partial(_timm_vit, c), ("image",))


def _timm_resnet(c: Configuration) -> Answer:
    if c.image != "resnet":
        return "the image tower is not a ResNet"
    name = TIMM_RESNET[c.name.removesuffix("-quickgelu")]
    return Source(f"timm {name}", partial(timm_keys, name, c.size.embed_dim), ("image",))


def _image_half(c: Configuration, peer: str, build: Callable[[Size, str], Keys]) -> Answer:
    """A model whose text tower no configuration has: its image tower and its scale."""
    text = ("text_model.", "text_projection.")
    return c.no_clip_image or Source(peer, partial(build, c.size, c.act), ("image", "scale"), text)


def _chinese_clip(c: Configuration) -> Answer:
    if c.image not in ("vit", "resnet"):
        return "Chinese-CLIP's code builds only OpenAI's ViT and ResNet"
    if c.image == "vit" and c.no_clip_image:
        return c.no_clip_image
    if not c.quick_gelu:
        return "Chinese-CLIP's image towers use QuickGELU; this configuration does not"
    if c.image == "vit" and c.vision.mlp_ratio != 4:
        return "Chinese-CLIP's code fixes an MLP ratio of 4"
    layers = tuple(c.vision.layers) if c.image == "resnet" else c.size.image_depth
    keys, text = partial(cn_clip, c.size, layers), ("bert.", "text_projection")
    return Source("the cn_clip package", keys, ("image", "scale"), text)


def _language(c: Configuration, form: str) -> Answer:
    if not c.text.hf_model_name:
        return "the text tower is not the encoder of a language model"
    kind = full_size.TEXT_CONFIGS[c.text.hf_model_name][0]
    owner, peer = LANGUAGE_MODELS[kind]
    if owner != form:
        return f"the text tower is that of another language model ({owner})"
    keys = partial(language_model, c.text.hf_model_name)
    return Source(f"transformers {peer}", keys, ("text",), lacks=("text.proj.",))


def _eva(c: Configuration) -> Answer:
    if c.name not in EVA:
        return "the image tower is not EVA's"
    return Source("EVA-CLIP's key list", partial(eva_keys, c.name))


def _pe(c: Configuration) -> Answer:
    if c.name not in PE:
        return "the image tower is not Perception Encoder's"
    return Source("PE-Core's key list", partial(perception_keys, c.name))


def _mobileclip(c: Configuration, form: str) -> Answer:
    owner, file = MOBILE.get(c.name, ("", ""))
    if form == "mobileclip_text" and owner in ("mobileclip_b", "mobileclip_s"):
        return Source(f"Apple's key list of {file}, text alone", partial(mobileclip_text_keys, file), ("text",))
    if form == "mobileclip_text":
        return "the text tower is not MobileCLIP's" if owner != "mobileclip_s0" else "no model has S0's text tower"
    if owner == form:
        half = form == "mobileclip_s0"
        towers, others = (("image", "scale"), ("text_encoder.",)) if half else (None, ())
        return Source(f"Apple's key list of {file}", partial(mobileclip_keys, file), towers, others)
    if c.name.startswith("MobileCLIP2") and not owner:
        return "Apple publishes this model with OpenCLIP's own names; MobileCLIP v1 has no such towers"
    if owner:
        return f"Apple's file for these towers is {owner}"
    return "the towers are not MobileCLIP's"


def _hub(c: Configuration) -> Answer:
    return Source("OpenCLIP", lambda: full_size.model(c.name).state_dict())


FORMATS: dict[str, Callable[[Configuration], Answer]] = {
    "open_clip": _hub,
    "hf_clip": _hf_clip,
    "hf_siglip": partial(_hf_siglip, naflex=False),
    "hf_siglip2_naflex": partial(_hf_siglip, naflex=True),
    "timm": _timm,
    "timm_resnet": _timm_resnet,
    "openai": _openai,
    "big_vision_siglip": partial(_big_vision, kind="big_vision_siglip"),
    "big_vision_naflex": partial(_big_vision, kind="big_vision_naflex"),
    "eva_clip": _eva,
    "pe_core": _pe,
    "mobileclip_b": partial(_mobileclip, form="mobileclip_b"),
    "mobileclip_s": partial(_mobileclip, form="mobileclip_s"),
    "mobileclip_s0": partial(_mobileclip, form="mobileclip_s0"),
    "mobileclip_text": partial(_mobileclip, form="mobileclip_text"),
    "hf_bert": partial(_language, form="hf_bert"),
    "hf_mt5": partial(_language, form="hf_mt5"),
    "hf_m2m100": partial(_language, form="hf_m2m100"),
    "hf_altclip": partial(_image_half, peer="transformers AltCLIPModel", build=hf_altclip),
    "hf_chinese_clip": partial(_image_half, peer="transformers ChineseCLIPModel", build=hf_chinese_clip),
    "chinese_clip": _chinese_clip,
    "hf_flax_clip": _hf_flax,
    "hf_vision_text_dual_encoder": partial(
        _image_half, peer="transformers VisionTextDualEncoderModel", build=hf_dual_encoder
    ),
    "wan_clip": _wan,
    "slip": lambda _: "no configuration has SLIP's ViT of timm with a linear projection",
    "meru": lambda _: "no configuration has MERU's ViT of timm with a linear projection",
    "longclip": lambda _: "no configuration has Long-CLIP's 248 text positions",
    "tinyclip": lambda _: "no configuration has TinyCLIP's sizes",
    "big_vision_lit": lambda _: "no configuration has big_vision's ViT with class token",
}


@lru_cache(maxsize=256)
def of(name: str) -> dict[str, Answer]:
    """For each format the file that there is for this configuration, or why there is none."""
    found = Configuration(name)
    return {form: answer(found) for form, answer in FORMATS.items()}


# ------------------------------------------------------------------- files whose models are no configuration's own
@dataclass(frozen=True)
class Relative:
    """A file whose model OpenCLIP can build, but ships no configuration for.

    Attributes:
        form: the file's format.
        target: the model in words.
        source: the file.
        model: builds the target on the meta device.
    """

    form: str
    target: str
    source: Source
    model: Callable[[], nn.Module]


def _changed(name: str, *, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None) -> nn.Module:
    """A shipped configuration with other fields, on the meta device."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"].update(vision or {})
    config["text_cfg"].update(text or {})
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    return _meta(lambda: kind(**config))


def _long(name: str) -> Relative:
    size = replace(Configuration(f"{name}-quickgelu").size, context_length=248)
    source = Source("OpenAI's package, and a second table", partial(longclip, size, size.image_depth))
    target = f"{name}-quickgelu with context_length 248"
    return Relative("longclip", target, source, partial(_changed, f"{name}-quickgelu", text={"context_length": 248}))


def _tiny(width: int, layers: int, text_width: int, text_layers: int) -> Relative:
    """TinyCLIP-ViT-*-16-Text-*: patches of 16, an embedding of 512, heads 64 wide."""
    size = Size(
        embed_dim=512,
        image_size=224,
        patch=16,
        image_width=width,
        image_depth=layers,
        image_mlp=4.0,
        context_length=77,
        vocab=49408,
        text_width=text_width,
        text_heads=text_width // 64,
        text_depth=text_layers,
        text_mlp=4.0,
    )
    vision = {"width": width, "layers": layers}
    text = {"width": text_width, "heads": text_width // 64, "layers": text_layers}
    target = f"ViT-B-16 with width {width} and {layers} layers, text width {text_width} and {text_layers} layers"
    source = Source("OpenAI's package below TinyCLIP's wrappers", partial(tinyclip, size, layers))
    return Relative("tinyclip", target, source, partial(_changed, "ViT-B-16", vision=vision, text=text))


def _chinese(image: str, text: str, form: str) -> Relative:
    """A model of Chinese-CLIP, by the configurations of its package."""
    import json
    from importlib.resources import files

    folder = files("cn_clip").joinpath("clip/model_configs")
    v, t = (json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8")) for name in (image, text))
    name = f"{image}-quickgelu"
    size = replace(Configuration(name).size, embed_dim=v["embed_dim"])
    assert (v["vision_width"], v["image_resolution"]) == (size.image_width, size.image_size)
    sizes = {
        key: t[f"text_{key}"]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    } | {"vocab_size": t["vocab_size"]}
    layers = size.image_depth if size.image_depth else tuple(json.loads(v["vision_layers"]))
    if form == "chinese_clip":
        source = Source("the cn_clip package", partial(cn_clip, size, layers, **sizes))
    else:
        source = Source(
            "transformers ChineseCLIPModel", partial(hf_chinese_clip, size, "quick_gelu", tuple(sizes.items()))
        )

    def build() -> nn.Module:
        config = open_clip.get_model_config(name)
        config["text_cfg"] = {
            "hf_model_name": "bert",
            "hf_model_pretrained": False,
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
        }
        with full_size.with_text_config(transformers.BertConfig(**sizes)):
            return _meta(lambda: open_clip.CustomTextCLIP(**config))

    return Relative(form, f"{name} with {text} as its text tower", source, build)


def _timm_relative(form: str, names: Callable[[Mapping[str, Any]], Keys]) -> Relative:
    """timm's ViT-B/16 with a linear projection, and OpenAI's text tower."""
    config = open_clip.get_model_config("ViT-B-16")
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}

    def build() -> nn.Module:
        return _meta(lambda: open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"]))

    source = Source("the names of the owner's code", lambda: names(build().state_dict()))
    return Relative(form, "ViT-B-16 with timm's vit_base_patch16_224, timm_pool token, timm_proj linear", source, build)


def _dual() -> Relative:
    """CLIP's ViT-B/16 and BERT, as VisionTextDualEncoderModel joins them."""
    size = Configuration("ViT-B-16").size

    def build() -> nn.Module:
        config = open_clip.get_model_config("ViT-B-16")
        config["text_cfg"] = {
            "hf_model_name": "bert",
            "hf_model_pretrained": False,
            "hf_pooler_type": "cls_pooler",
            "hf_proj_type": "linear",
        }
        with full_size.with_text_config(transformers.BertConfig(**dict(_TINY_TEXT))):
            return _meta(lambda: open_clip.CustomTextCLIP(**config))

    source = Source("transformers VisionTextDualEncoderModel", partial(hf_dual_encoder, size, "gelu"))
    return Relative("hf_vision_text_dual_encoder", "ViT-B-16 with a BERT, hf_pooler_type cls_pooler", source, build)


def _lit(letter: str, width: int, heads: int) -> Relative:
    """LiT-L16S and LiT-L16Ti: a ViT-L/16 without head, and a text tower of big_vision's own."""
    size = Size(
        embed_dim=1024,
        image_size=224,
        patch=16,
        image_width=1024,
        image_heads=16,
        image_depth=24,
        image_mlp=4.0,
        context_length=16,
        vocab=16000,
        text_width=width,
        text_heads=heads,
        text_depth=12,
        text_mlp=4.0,
    )
    text = {
        "context_length": 16,
        "vocab_size": 16000,
        "width": width,
        "heads": heads,
        "layers": 12,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    vision = {
        "timm_model_name": timm_towers.register("vit_large_patch16_224", act_layer="gelu_tanh", no_embed_class=True),
        "timm_pool": "token",
        "timm_proj": "none",
        "image_size": 224,
    }
    source = Source("big_vision's modules in flax", partial(flax_two_towers, size, "big_vision_lit"))
    target = f"timm's vit_large_patch16_224 (no_embed_class) without head, text width {width}"

    def build() -> nn.Module:
        return _meta(lambda: open_clip.CustomTextCLIP(embed_dim=1024, vision_cfg=vision, text_cfg=text))

    return Relative("big_vision_lit", target, source, build)


def _naflex(kind: str, form: str) -> Relative:
    """SigLIP 2 NaFlex, whose table of positions has 16 x 16 rows, in a NaFlexVit."""
    name = {"base": "ViT-B-16-SigLIP2-256", "so400m": "ViT-SO400M-16-SigLIP2-256"}[kind]
    tower, c = f"naflexvit_{kind}_patch16_siglip", Configuration(name)
    answer = FORMATS[form](c)
    assert isinstance(answer, Source)
    if form == "timm":
        answer = Source(f"timm {tower}", partial(timm_keys, tower, 0), ("image",))
    return Relative(
        form, f"{name} with timm's {tower}", answer, partial(_changed, name, vision={"timm_model_name": tower})
    )


def _naflex_token(form: str) -> Relative:
    """CLIP's ViT-B/16 in a NaFlexVit with class token."""
    c = Configuration("ViT-B-16-quickgelu" if form == "openai" else "ViT-B-16")
    answer = FORMATS[form](c)
    assert isinstance(answer, Source)
    tower = timm_towers.register("naflexvit_base_patch16_siglip", **naflex._token_vit(c.size, c.act, 1e-5))
    vision = {**dict.fromkeys(c.raw["vision_cfg"]), "image_size": 224}
    vision |= {"timm_model_name": tower, "timm_pool": "token", "timm_proj": "linear"}
    target = f"{c.name} with timm's NaFlexVit with class token"
    return Relative(form, target, answer, partial(_changed, c.name, vision=vision))


RELATIVES = {
    "longclip-B": _long("ViT-B-16"),
    "longclip-L": _long("ViT-L-14"),
    "TinyCLIP-ViT-39M-16-Text-19M": _tiny(512, 12, 512, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _tiny(256, 10, 256, 3),
    **{
        f"Chinese-CLIP {image}{', transformers' if form.startswith('hf') else ''}": _chinese(image, text, form)
        for image, text in {
            "ViT-B-16": "RoBERTa-wwm-ext-base-chinese",
            "ViT-L-14": "RoBERTa-wwm-ext-base-chinese",
            "ViT-L-14-336": "RoBERTa-wwm-ext-base-chinese",
            "ViT-H-14": "RoBERTa-wwm-ext-large-chinese",
            "RN50": "RBT3-chinese",
        }.items()
        for form in ("chinese_clip", "hf_chinese_clip")
        if image != "RN50" or form == "chinese_clip"
    },
    "SLIP ViT-B/16": _timm_relative("slip", other_names.slip),
    "MERU's baseline, ViT-B/16": _timm_relative("meru", other_names.meru),
    "BERT beside ViT-B/16, transformers": _dual(),
    "LiT-L16S": _lit("S", 384, 6),
    "LiT-L16Ti": _lit("Ti", 192, 3),
    **{
        f"SigLIP 2 NaFlex {kind}, {form}": _naflex(kind, form)
        for kind in ("base", "so400m")
        for form in ("hf_siglip2_naflex", "big_vision_naflex", "timm", "hf_siglip", "big_vision_siglip")
    },
    **{f"CLIP ViT-B/16 in NaFlexVit, {form}": _naflex_token(form) for form in ("hf_clip", "openai", "timm")},
}
