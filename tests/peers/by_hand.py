"""The conversions to open_clip, written out by hand: an oracle that shares nothing with keymap.

Each takes a source state dict (or flat npz) and returns the target's whole state dict. Outputs cannot show
all (softmax ignores a key bias), so compare values with these as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
Source = Mapping[str, Tensor]

# joined q/k/v, output, first norm, second norm, first and second layer of the MLP
NATIVE = ("attn.in_proj_", "attn.out_proj.", "ln_1.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.")
TIMM = ("attn.qkv.", "attn.proj.", "norm1.", "norm2.", "mlp.fc1.", "mlp.fc2.")
HF = ("self_attn.{}_proj.", "self_attn.out_proj.", "layer_norm1.", "layer_norm2.", "mlp.fc1.", "mlp.fc2.")
PARTS = ("weight", "bias")
QKV = {"q": "query", "k": "key", "v": "value"}


def _depth(source: Mapping[str, Any], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in source if k.startswith(prefix))


def _pairs(source: Source, names: Mapping[str, str]) -> State:
    return {new + part: source[old + part] for old, new in names.items() for part in PARTS}


def _hf_blocks(source: Source, old: str, new: str, names: tuple[str, ...]) -> State:
    found: State = {}
    for i in range(_depth(source, old)):
        for part in PARTS:
            joined = [source[f"{old}{i}.{HF[0].format(x)}{part}"] for x in "qkv"]
            found[f"{new}{i}.{names[0]}{part}"] = torch.cat(joined)
            for theirs, ours in zip(HF[1:], names[1:], strict=True):
                found[f"{new}{i}.{ours}{part}"] = source[f"{old}{i}.{theirs}{part}"]
    return found


def _hf_text(source: Source, text: str) -> State:
    return (
        {
            f"{text}token_embedding.weight": source["text_model.embeddings.token_embedding.weight"],
            f"{text}positional_embedding": source["text_model.embeddings.position_embedding.weight"],
        }
        | _pairs(source, {"text_model.final_layer_norm.": f"{text}ln_final."})
        | _hf_blocks(source, "text_model.encoder.layers.", f"{text}transformer.resblocks.", NATIVE)
    )


def _hf_vision(source: Source) -> State:
    return (
        {
            "visual.proj": source["visual_projection.weight"].T,
            "visual.class_embedding": source["vision_model.embeddings.class_embedding"],
            "visual.conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
            "visual.positional_embedding": source["vision_model.embeddings.position_embedding.weight"],
        }
        | _pairs(source, {"vision_model.pre_layrnorm.": "visual.ln_pre."})
        | _pairs(source, {"vision_model.post_layernorm.": "visual.ln_post."})
        | _hf_blocks(source, "vision_model.encoder.layers.", "visual.transformer.resblocks.", NATIVE)
    )


def hf_clip(source: Source, text: str = "") -> State:
    """CLIPModel, MetaClip2Model -> native ViT and text; text="text." for CustomTextCLIP."""
    return (
        {
            "logit_scale": source["logit_scale"],
            f"{text}text_projection": source["text_projection.weight"].T,
        }
        | _hf_vision(source)
        | _hf_text(source, text)
    )


def hf_siglip(source: Source, head: bool = True) -> State:
    """SiglipModel -> timm trunk with MAP pool and text; head=False for a target without text projection."""
    trunk, pool = "visual.trunk.", "visual.trunk.attn_pool."
    found = _hf_text(source, "text.") | {
        "logit_scale": source["logit_scale"].reshape(()),
        "logit_bias": source["logit_bias"].reshape(()),
        f"{trunk}pos_embed": source["vision_model.embeddings.position_embedding.weight"][None],
        f"{pool}latent": source["vision_model.head.probe"],
    }
    for part in PARTS:
        joined = source[f"vision_model.head.attention.in_proj_{part}"]
        width = joined.shape[0] // 3
        found |= {f"{pool}q.{part}": joined[:width], f"{pool}kv.{part}": joined[width:]}
    names = {
        "vision_model.embeddings.patch_embedding.": f"{trunk}patch_embed.proj.",
        "vision_model.post_layernorm.": f"{trunk}norm.",
        "vision_model.head.attention.out_proj.": f"{pool}proj.",
        "vision_model.head.layernorm.": f"{pool}norm.",
        "vision_model.head.mlp.fc1.": f"{pool}mlp.fc1.",
        "vision_model.head.mlp.fc2.": f"{pool}mlp.fc2.",
    }
    if head:
        names["text_model.head."] = "text.text_projection."
    return found | _pairs(source, names) | _hf_blocks(source, "vision_model.encoder.layers.", f"{trunk}blocks.", TIMM)


def timm_clip(source: Source) -> State:
    """timm's CLIP ViT -> native visual; its head.bias has no place and must be zero."""
    assert not source["head.bias"].any()
    found = {
        "visual.class_embedding": source["cls_token"].reshape(-1),
        "visual.positional_embedding": source["pos_embed"][0],
        "visual.conv1.weight": source["patch_embed.proj.weight"],
        "visual.proj": source["head.weight"].T,
    } | _pairs(source, {"norm_pre.": "visual.ln_pre.", "norm.": "visual.ln_post."})
    for i in range(_depth(source, "blocks.")):
        for theirs, ours in zip(TIMM, NATIVE, strict=True):
            found |= _pairs(source, {f"blocks.{i}.{theirs}": f"visual.transformer.resblocks.{i}.{ours}"})
    return found


def timm_trunk(source: Source) -> State:
    """Any timm tower -> the trunk of the same architecture."""
    return {f"visual.trunk.{k}": v for k, v in source.items()}


def timm_convnext(source: Source) -> State:
    """timm's ConvNeXt -> trunk and open_clip's own head, whose last layer has no bias."""
    assert not source["head.fc.bias"].any()
    head = {"head.fc.weight": "visual.head.proj.weight"}
    if "head.pre_logits.fc.weight" in source:
        head = {f"head.pre_logits.fc.{part}": f"visual.head.mlp.fc1.{part}" for part in PARTS}
        head["head.fc.weight"] = "visual.head.mlp.fc2.weight"
    return {head.get(k, f"visual.trunk.{k}"): v for k, v in source.items() if k != "head.fc.bias"}


def timm_resnet(source: Source) -> State:
    """timm's resnet*_clip -> modified ResNet."""
    numbers = {"conv1_1x1": 1, "conv2_kxk": 2, "conv3_1x1": 3}
    heads = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "c_proj"}

    def name(key: str) -> str:
        match key.split("."):
            case ["stem", conv, kind, leaf]:
                return f"{kind}{conv[-1]}.{leaf}"
            case ["stages", stage, layer, "shortcut", "conv", kind, leaf]:
                return f"layer{int(stage) + 1}.{layer}.downsample.{0 if kind == 'conv' else 1}.{leaf}"
            case ["stages", stage, layer, conv, kind, leaf]:
                return f"layer{int(stage) + 1}.{layer}.{kind}{numbers[conv]}.{leaf}"
            case ["head", "pos_embed"]:
                return "attnpool.positional_embedding"
            case ["head", part, leaf]:
                return f"attnpool.{heads[part]}.{leaf}"
        raise KeyError(key)

    return {f"visual.{name(k)}": v for k, v in source.items()}


def openai(source: Source, text: str = "") -> State:
    """OpenAI's archive -> native; its three numbers are dropped."""
    kept = {k: v for k, v in source.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    return {k if k.startswith("visual.") or k == "logit_scale" else text + k: v for k, v in kept.items()}


def big_vision(source: Mapping[str, np.ndarray[Any, Any]]) -> State:
    """A plain flat npz (float32, one key a block, no ``params/``) -> timm trunk with MAP pool and text."""
    s = {k: torch.from_numpy(np.asarray(v)) for k, v in source.items()}

    def attention(prefix: str, parts: str) -> State:
        names = [f"{prefix}/{QKV[part]}" for part in parts]
        return {
            "weight": torch.cat([s[f"{n}/kernel"].flatten(1).T for n in names]),
            "bias": torch.cat([s[f"{n}/bias"].reshape(-1) for n in names]),
        }

    def dense(prefix: str) -> State:
        return {"weight": s[f"{prefix}/kernel"].flatten(0, -2).T, "bias": s[f"{prefix}/bias"]}

    def norm(prefix: str) -> State:
        return {"weight": s[f"{prefix}/scale"], "bias": s[f"{prefix}/bias"]}

    found: State = {
        "logit_scale": s["t"].reshape(()),
        "logit_bias": s["b"].reshape(()),
        "visual.trunk.pos_embed": s["img/pos_embedding"],
        "visual.trunk.patch_embed.proj.weight": s["img/embedding/kernel"].permute(3, 2, 0, 1),
        "visual.trunk.patch_embed.proj.bias": s["img/embedding/bias"],
        "visual.trunk.attn_pool.latent": s["img/MAPHead_0/probe"],
        "text.positional_embedding": s["txt/pos_embedding"][0],
        "text.token_embedding.weight": s["txt/Embed_0/embedding"],
    }

    def put(prefix: str, pair: State) -> None:
        found.update({prefix + part: pair[part] for part in PARTS})

    def block(old: str, new: str, names: tuple[str, ...]) -> None:
        attn = f"{old}/MultiHeadDotProductAttention_0"
        put(new + names[0], attention(attn, "qkv"))
        put(new + names[1], dense(f"{attn}/out"))
        for number in (0, 1):
            put(new + names[2 + number], norm(f"{old}/LayerNorm_{number}"))
            put(new + names[4 + number], dense(f"{old}/MlpBlock_0/Dense_{number}"))

    for old, new, final, names in (
        ("img/Transformer", "visual.trunk.blocks.", "visual.trunk.norm.", TIMM),
        ("txt/Encoder_0", "text.transformer.resblocks.", "text.ln_final.", NATIVE),
    ):
        put(final, norm(f"{old}/encoder_norm"))
        for i in range(len({k.split("/")[2] for k in s if k.startswith(f"{old}/encoderblock_")})):
            block(f"{old}/encoderblock_{i}", f"{new}{i}.", names)
    pool, head = "visual.trunk.attn_pool.", "img/MAPHead_0"
    put(f"{pool}q.", attention(f"{head}/MultiHeadDotProductAttention_0", "q"))
    put(f"{pool}kv.", attention(f"{head}/MultiHeadDotProductAttention_0", "kv"))
    put(f"{pool}proj.", dense(f"{head}/MultiHeadDotProductAttention_0/out"))
    put(f"{pool}norm.", norm(f"{head}/LayerNorm_0"))
    for number in (0, 1):
        put(f"{pool}mlp.fc{number + 1}.", dense(f"{head}/MlpBlock_0/Dense_{number}"))
    if "txt/head/kernel" in s:
        put("text.text_projection.", dense("txt/head"))
    return found


def longclip(source: Source, text: str = "") -> State:
    """Long-CLIP -> native: 20 rows of one table of positions, the others of the second."""
    found = {k: v for k, v in source.items() if k != "positional_embedding_res"}
    found["positional_embedding"] = torch.cat(
        [source["positional_embedding"][:20], source["positional_embedding_res"][20:]]
    )
    return {k if k.startswith("visual.") or k == "logit_scale" else text + k: v for k, v in found.items()}


def tinyclip(source: Source) -> State:
    """TinyCLIP -> native: the names of its towers are cut, and those of their wrappers."""
    found = {}
    for key, value in source.items():
        _, name = key.split(".", 1)
        found[name.removeprefix("module.")] = value
    return found


def chinese_clip(source: Source) -> State:
    """cn_clip -> native image tower and BERT."""
    found = {k: v for k, v in source.items() if k.startswith("visual.") or k == "logit_scale"}
    found |= {f"text.transformer.{k.removeprefix('bert.')}": v for k, v in source.items() if k.startswith("bert.")}
    return found | {"text.proj.weight": source["text_projection"].T}


def hf_chinese_clip(source: Source) -> State:
    """ChineseCLIPModel -> native ViT and BERT."""
    tower = {k.removeprefix("text_model."): v for k, v in source.items() if k.startswith("text_model.")}
    return (
        {"logit_scale": source["logit_scale"], "text.proj.weight": source["text_projection.weight"]}
        | {f"text.transformer.{k}": v for k, v in tower.items()}
        | _hf_vision(source)
    )


def hf_altclip(source: Source) -> State:
    """AltCLIPModel -> native ViT; its text tower has no place."""
    named = {
        k.replace("encoder.layer.", "encoder.layers.") if k.startswith("vision_model.") else k: v
        for k, v in source.items()
    }
    return {"logit_scale": source["logit_scale"]} | _hf_vision(named)
