"""timm's VisionTransformer and its EVA of 2022, and transformers' ViT, DeiT and DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peers.common import images, randomised
from peers.language_models import written

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


def hf(kind: str, **options: Any) -> nn.Module:
    """A model of transformers, by the name of its class."""
    import transformers

    known = getattr(transformers, kind)
    return randomised(known, known.config_class(**{**SIZE, "num_labels": CLASSES, **options}), seed=1)


def logits(theirs: nn.Module) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    return lambda model: [(theirs(images()).logits, model(images()))]


def features(theirs: nn.Module) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    return lambda model: [(theirs(images()).last_hidden_state, model.forward_features(images()))]


PLAIN = {"ViT": timm_vit(), "another width": timm_vit(num_classes=0, embed_dim=36)}
DINO = {"DINOv2": timm_vit("vit_small_patch14_dinov2", num_classes=0)}


# --- transformers ---


def hf_vit(bias: bool = True) -> Example:
    theirs = hf("ViTForImageClassification", intermediate_size=120, layer_norm_eps=1e-6, qkv_bias=bias)
    return Example(
        "hf_vit",
        written(theirs),
        timm_vit(qkv_bias=bias),
        "transformers ViTForImageClassification",
        outputs=logits(theirs),
        wrong={**DINO, f"qkv_bias={not bias}": timm_vit(qkv_bias=not bias)},
        prefix="vit.",
    )


def hf_vit_alone() -> Example:
    theirs = hf("ViTModel", intermediate_size=120, layer_norm_eps=1e-6)
    file = written(theirs)
    pooler = tuple(key for key in file if key.startswith("pooler."))
    return Example(
        "hf_vit",
        file,
        timm_vit(num_classes=0),
        "transformers ViTModel",
        outputs=features(theirs),
        wrong=DINO | {"a classifier": timm_vit()},
        not_written=pooler,
    )


def hf_deit() -> Example:
    theirs = hf("DeiTForImageClassificationWithTeacher", intermediate_size=120, layer_norm_eps=1e-6)
    return Example(
        "hf_vit",
        written(theirs),
        timm_vit("deit_base_distilled_patch16_224"),
        "transformers DeiTForImageClassificationWithTeacher",
        outputs=logits(theirs),
        wrong=PLAIN,
        prefix="deit.",
    )


def hf_dinov2(registers: bool = False, swiglu: bool = False) -> Example:
    theirs = hf(
        "Dinov2WithRegistersModel" if registers else "Dinov2Model",
        use_swiglu_ffn=swiglu,
        layerscale_value=0.7,
        **({"num_register_tokens": 3} if registers else {}),
    )
    other = timm_vit("vit_small_patch14_dinov2", num_classes=0, mlp_ratio=4, **REGISTERS[not registers])
    name = "vit_giant_patch14_dinov2" if swiglu else "vit_small_patch14_dinov2"  # 256 of 48: rounded up to eights
    ours = timm_vit(name, num_classes=0, mlp_ratio=256 / 48 if swiglu else 4, **REGISTERS[registers])
    return Example(
        "hf_dinov2",
        written(theirs),
        ours,
        f"transformers {type(theirs).__name__}",
        outputs=features(theirs),
        wrong=PLAIN | {"other registers": other},
        not_written=("embeddings.mask_token",),
        oneway="cannot be written" if registers else "",
    )


def in_memory(make: Callable[[], Example], kind: str, **options: Any) -> Example:
    """The same, and the file is ``state_dict()``, whose names transformers 5 changes before it writes them."""
    made, theirs = make(), hf(kind, **options)
    saved = {k.removeprefix(made.prefix): v for k, v in written(theirs).items() if k not in made.not_written}
    outputs = logits(theirs) if made.prefix else features(theirs)
    return replace(made, file=dict(theirs.state_dict()), outputs=outputs, back=None if made.oneway else saved)


REGISTERS = {True: {"reg_tokens": 3, "no_embed_class": True}, False: {}}


# --- files that timm's own loaders read ---


def filtered(file: Mapping[str, Tensor], ours: Callable[[], nn.Module], **options: Any) -> dict[str, Tensor]:
    """What timm makes of a file."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    return checkpoint_filter_fn(dict(file), ours(), **options)


def dinov2(registers: bool = False, swiglu: bool = False) -> Example:
    example = hf_dinov2(registers, swiglu)
    random, file = randomised(example.model, seed=2).state_dict(), {}
    for key, value in random.items():
        file[key.replace("fc1", "w12").replace("fc2", "w3") if swiglu else key] = value
    file["mask_token"] = torch.rand(1, 48)
    if registers:
        file["register_tokens"] = file.pop("reg_token")
        file["pos_embed"] = torch.cat([torch.rand(1, 1, 48), file["pos_embed"]], 1)
    return Example(
        "dinov2",
        file,
        example.model,
        "checkpoint_filter_fn of timm",
        expected=filtered(file, example.model),
        wrong=example.wrong,
        not_written=("mask_token",),
        oneway=example.oneway,
    )


def timm_vit_old() -> Example:
    ours = timm_vit("deit3_small_patch16_224")
    file = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in ours().state_dict().items()
    }
    file = {key: torch.rand(value.shape) for key, value in file.items()}
    expected = filtered(file, ours, adapt_layer_scale=True)
    return Example("timm_vit_old", file, ours, "checkpoint_filter_fn of timm", expected=expected, wrong=PLAIN)


def augreg() -> Example:
    import tempfile

    import numpy as np
    from timm.models.vision_transformer import _load_weights

    ours, width, kernel = timm_vit(), 48, "MultiHeadDotProductAttention_1"
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (14, 14, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 5, width),
        "head/kernel": (width, CLASSES),
        "head/bias": (CLASSES,),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
    }
    for number in range(2):
        block = f"Transformer/encoderblock_{number}"
        for name in ("query", "key", "value"):
            shapes[f"{block}/{kernel}/{name}/kernel"] = (width, HEADS, width // HEADS)
            shapes[f"{block}/{kernel}/{name}/bias"] = (HEADS, width // HEADS)
        shapes |= {
            f"{block}/{kernel}/out/kernel": (HEADS, width // HEADS, width),
            f"{block}/{kernel}/out/bias": (width,),
        }
        for name, sizes in (("Dense_0", (width, 120)), ("Dense_1", (120, width))):
            shapes |= {f"{block}/MlpBlock_3/{name}/kernel": sizes, f"{block}/MlpBlock_3/{name}/bias": sizes[1:]}
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{name}/scale": (width,), f"{block}/{name}/bias": (width,)}
    file, loaded = {key: torch.rand(shape) for key, shape in shapes.items()}, ours()
    with tempfile.NamedTemporaryFile(suffix=".npz") as path:
        np.savez(path, **{key: value.numpy() for key, value in file.items()})
        path.flush()
        _load_weights(loaded, path.name)
    return Example(
        "augreg",
        file,
        ours,
        "load_pretrained of timm",
        expected=loaded.state_dict(),
        wrong=DINO,
        facts={"image.heads": HEADS},
        suffix=".npz",
    )


def timm_eva_giant(pool: str = "avg") -> Example:
    theirs = timm_vit("eva_giant_patch14_224", global_pool=pool)()
    other = "token" if pool == "avg" else "avg"
    return Example(
        "timm_eva_giant",
        theirs.state_dict(),
        timm_vit(global_pool=pool),
        "timm Eva",
        outputs=lambda model: [(theirs(images()), model(images()))],
        wrong=DINO | {"another pooling": timm_vit(global_pool=other), "another MLP": timm_vit(mlp_ratio=3)},
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "hf_vit": hf_vit,
    "hf_vit without biases of q, k, v": partial(hf_vit, bias=False),
    "hf_vit alone": hf_vit_alone,
    "hf_vit DeiT": hf_deit,
    "hf_vit in memory": partial(
        in_memory, hf_vit, "ViTForImageClassification", intermediate_size=120, layer_norm_eps=1e-6
    ),
    "hf_dinov2 in memory": partial(in_memory, hf_dinov2, "Dinov2Model", layerscale_value=0.7),
    "hf_dinov2 SwiGLU in memory": partial(
        in_memory, partial(hf_dinov2, swiglu=True), "Dinov2Model", layerscale_value=0.7, use_swiglu_ffn=True
    ),
    "hf_dinov2": hf_dinov2,
    "hf_dinov2 SwiGLU": partial(hf_dinov2, swiglu=True),
    "hf_dinov2 registers": partial(hf_dinov2, registers=True),
    "dinov2": dinov2,
    "dinov2 SwiGLU": partial(dinov2, swiglu=True),
    "dinov2 registers": partial(dinov2, registers=True),
    "augreg": augreg,
    "timm_vit_old": timm_vit_old,
    "timm_eva_giant": timm_eva_giant,
    "timm_eva_giant token": partial(timm_eva_giant, pool="token"),
}
ROWS = r"""
hf_vit: q and k swapped: differs
- attention.attention.(query|key|value).weight: {to: attn.qkv.weight, concat: 0}
- attention.attention.(query|key|value).bias: {to: attn.qkv.bias, concat: 0, optional: true} # with qkv_bias
- attention.output.dense.(weight|bias): attn.proj.\1
- layernorm_(before|after)
+ attention.attention.(key|query|value).weight: {to: attn.qkv.weight, concat: 0}
+ attention.attention.(query|key|value).bias: {to: attn.qkv.bias, concat: 0, optional: true} # with qkv_bias
+ attention.output.dense.(weight|bias): attn.proj.\1
+ layernorm_(before|after)
hf_vit without biases of q, k, v: q and k swapped: differs
- attention.attention.(query|key|value).weight: {to: attn.qkv.weight, concat: 0}
- attention.attention.(query|key|value).bias: {to: attn.qkv.bias, concat: 0, optional: true} # with qkv_bias
- attention.output.dense.(weight|bias): attn.proj.\1
- layernorm_(before|after)
+ attention.attention.(key|query|value).weight: {to: attn.qkv.weight, concat: 0}
+ attention.attention.(query|key|value).bias: {to: attn.qkv.bias, concat: 0, optional: true} # with qkv_bias
+ attention.output.dense.(weight|bias): attn.proj.\1
+ layernorm_(before|after)
hf_vit: the norms swapped: differs
- {before: 1, after: 2}
+ {before: 2, after: 1}
hf_vit alone: the second part of the MLP has no place: refused
- output.dense.(weight|bias): mlp.fc2.\1
+ output.dense.(weight|bias): mlp.fc3.\1
hf_vit DeiT: the classifiers swapped: differs
- {cls: head, distillation: head_dist}
+ {cls: head_dist, distillation: head}
hf_vit in memory: q and k swapped: differs
- part: {q: query, k: key, v: value}
+ part: {q: key, k: query, v: value}
hf_dinov2 in memory: q and v swapped: differs
- part: {q: query, k: key, v: value}
+ part: {q: value, k: key, v: query}
hf_dinov2 SwiGLU in memory: the halves swapped: differs
- mlp.(gate|up)_proj.(weight|bias)
+ mlp.(up|gate)_proj.(weight|bias)
hf_dinov2: layer scales swapped: differs
- layer_scale(1|2).lambda1: ls\1.gamma
+ layer_scale1.lambda1: ls2.gamma
+ layer_scale2.lambda1: ls1.gamma
hf_dinov2 SwiGLU: the halves of the first layer have no place: refused
- {in: fc1, out: fc2}
+ {in: fc2, out: fc1}
hf_dinov2 registers: no position for the class token: differs
- {to: cls_token, add: 'rows[0]', oneway: true}
+ cls_token
hf_dinov2 registers: the last position for the class token: differs
- add: 'rows[0]'
+ add: 'rows[4]'
dinov2: the norms swapped: differs
- (norm1|norm2|attn.qkv|attn.proj).(weight|bias): blocks.\1.\2.\3
+ (attn.qkv|attn.proj).(weight|bias): blocks.\1.\2.\3
+ blocks.(\d+).norm1.(weight|bias): blocks.\1.norm2.\2
+ blocks.(\d+).norm2.(weight|bias): blocks.\1.norm1.\2
dinov2 SwiGLU: w12 and w3 swapped: refused
- {w12: fc1, w3: fc2}
+ {w12: fc2, w3: fc1}
dinov2 registers: the registers left out: refused
- register_tokens: reg_token
+ register: reg_token
augreg: a kernel without its transpose: refused
- embedding/kernel: {to: patch_embed.proj.weight, view: h w in out -> out in h w}
+ embedding/kernel: patch_embed.proj.weight
augreg: the axes of a patch swapped: differs
- view: h w in out -> out in h w
+ view: w h in out -> out in h w
augreg: heads last: differs
- view: d h k -> (h k) d, concat
+ view: d h k -> (k h) d, concat
augreg: the norms swapped: differs
- place: {0: 1, 2: 2}
+ place: {0: 2, 2: 1}
timm_vit_old: layer scales swapped: differs
- blocks.(\d+).gamma_(1|2): blocks.\1.ls\2.gamma
+ blocks.(\d+).gamma_1: blocks.\1.ls2.gamma
+ blocks.(\d+).gamma_2: blocks.\1.ls1.gamma
timm_eva_giant: the zeros are the bias of v: differs
- order: [q, 0, v]
+ order: [q, v, 0]
timm_eva_giant: no bias of the keys: refused
- concat: 0, order: [q, 0, v]
+ concat: 0
timm_eva_giant: q and v swapped: differs
- order: [q, 0, v]
+ order: [v, 0, q]
timm_eva_giant token: the norms swapped: differs
- blocks.(\d+).(norm1|norm2|attn.proj|mlp.fc1|mlp.fc2).(weight|bias): blocks.\1.\2.\3
+ blocks.(\d+).(attn.proj|mlp.fc1|mlp.fc2).(weight|bias): blocks.\1.\2.\3
+ blocks.(\d+).norm1.(weight|bias): blocks.\1.norm2.\2
+ blocks.(\d+).norm2.(weight|bias): blocks.\1.norm1.\2
"""
