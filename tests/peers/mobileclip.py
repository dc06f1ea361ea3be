"""Apple's MobileCLIP (v1): state dicts with the names of its files, and open_clip's models for them.

Apple's code is no package. ``data/mobileclip_shapes.json.gz`` holds every key and shape of its four models, read from
its own classes; open_clip's converter shows, tensor by tensor, what each becomes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import CustomTextCLIP
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from . import openclip, timm_towers

SHAPES: Mapping[str, Mapping[str, list[int]]] = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "data" / "mobileclip_shapes.json.gz").read_bytes())
)
MODELS = {  # Apple's name -> open_clip's configuration; S0's is that of its image tower alone
    "mobileclip_b": "MobileCLIP-B",
    "mobileclip_s1": "MobileCLIP-S1",
    "mobileclip_s2": "MobileCLIP-S2",
    "mobileclip_s0": "MobileCLIP2-S0",
}
LAYERS = {"mobileclip_s0": (1, 1, 2, 1), "mobileclip_s1": (1, 2, 3, 2), "mobileclip_s2": (2, 1, 3, 1)}
IMAGE = 64  # FastViT reduces by 32
_NATIVE = dict.fromkeys(["layers", "width", "head_width", "mlp_ratio", "patch_size"])


def published(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Every key of Apple's file at its real shape, random bits in float16; counters are int64."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (key, shape) in enumerate(SHAPES[name].items()):
        if key.endswith("num_batches_tracked"):
            found[key] = torch.tensor(1000 + number)
        else:
            found[key] = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.half)
    return found


@cache
def on_meta(name: str) -> nn.Module:
    """The model of this open_clip configuration, on the meta device."""
    config = open_clip.get_model_config(name)
    config.pop("custom_text", None)
    with torch.device("meta"):
        return CustomTextCLIP(**config)


@cache
def _sources(name: str) -> dict[str, str]:
    """open_clip's key -> Apple's, by open_clip's own converter."""
    marked = {k: torch.tensor(float(i)).expand(shape) for i, (k, shape) in enumerate(SHAPES[name].items())}
    converted = convert_state_dict(on_meta(MODELS[name]), marked)
    keys, filled = list(marked), ("visual.trunk.head.bias", "visual.trunk.head.fc.bias")
    return {ours: keys[int(value.flatten()[0])] for ours, value in converted.items() if ours not in filled}


def model(name: str, *, seed: int = 0, **sizes: object) -> nn.Module:
    """open_clip's small model of the same build; the bias of its head is zero, as Apple has none."""
    if name == "mobileclip_b":
        trunk, size, pool = _vit_name(), 32, "token"
    else:
        base = "fastvit_mci0" if name == "mobileclip_s0" else "fastvit_mci1"
        trunk, size, pool = timm_towers.register(base, layers=LAYERS[name], embed_dims=(8, 16, 32, 64)), IMAGE, "avg"
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": None, "image_size": size}
    text = {"no_causal_mask": name != "mobileclip_b"}
    made = openclip.custom(vision={**_NATIVE, **vision}, text=text, seed=seed, **sizes)
    head = made.visual.trunk.head
    return timm_towers.zero(getattr(head, "fc", head).bias, made)


def _vit_name() -> str:
    stem = partial(ConvStem, channels=(12, 12, 48), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0)
    return timm_towers.register(
        "vit_base_mci_224",
        img_size=32,
        embed_dim=48,
        depth=2,
        num_heads=3,
        embed_layer=partial(_embed, stem=stem),
    )


def _embed(*arguments: object, stem: object, **options: object) -> nn.Module:
    """A new stem for each model."""
    return HybridEmbed(stem(act_layer=nn.GELU), *arguments, proj=False, **options)


def small(name: str, *, seed: int = 1, **sizes: object) -> tuple[dict[str, Tensor], nn.Module]:
    """A small state dict with Apple's names, in the order of its file; and the open_clip model with the same values."""
    peer = model(name, seed=seed, **sizes)
    held = peer.state_dict()
    found = {}
    for ours, theirs in _sources(name).items():
        if ours in held:
            value, rank = held[ours], len(SHAPES[name][theirs])
            found[theirs] = (value.T if theirs.endswith(("head.proj", "classifier.proj")) else value).detach().clone()
            found[theirs] = found[theirs].reshape((1,) * (rank - value.ndim) + tuple(found[theirs].shape))
    if name == "mobileclip_s0":  # its text tower has no model here
        found |= {k: torch.randn([1] * len(s)) for k, s in SHAPES[name].items() if k.startswith("text_encoder.")}
    return {k: found[k] for k in SHAPES[name] if k in found}, peer
