"""Small models and checkpoints for the examples of docs/recipes.md, with the architectures of the large ones.

Their values are random. They are built by the libraries that own them, as the tests build theirs (`tests/peers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TIMM = {"small_clip_vit": "vit_base_patch16_clip_quickgelu_224", "small_siglip_vit": "vit_base_patch16_siglip_224"}


def configurations() -> dict[str, dict[str, Any]]:
    """OpenCLIP's configurations of the small models: one of CLIP's kind and one of SigLIP's."""
    from peers.common import Size
    from peers.openclip import native_text

    size = Size()
    image, text = {"image_size": size.image_size}, native_text(size)
    native = {
        "layers": size.image_depth,
        "width": size.image_width,
        "head_width": size.image_width // size.image_heads,
        "mlp_ratio": size.image_mlp,
        "patch_size": size.patch,
    }
    trunk = {"timm_model_name": "small_siglip_vit", "timm_pool": "map", "timm_proj": "none"}
    siglip_text = {
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    return {
        "small-clip": {
            "embed_dim": size.embed_dim,
            "quick_gelu": True,
            "vision_cfg": image | native,
            "text_cfg": text,
        },
        "small-siglip": {
            "embed_dim": size.image_width,
            "custom_text": True,
            "init_logit_bias": -10,
            "vision_cfg": image | trunk,
            "text_cfg": text | siglip_text,
        },
    }


@contextlib.contextmanager
def known_to_libraries() -> Iterator[None]:
    """OpenCLIP and timm create the small models by their names."""
    import timm
    from open_clip import factory
    from peers.common import Size
    from peers.timm_towers import vit_sizes
    from timm.models import is_model, register_model

    sizes = vit_sizes(Size())
    for name, base in TIMM.items():
        if not is_model(name):
            others = {"act_layer": "gelu_tanh"} if "siglip" in name else {}

            def build(pretrained: bool = False, base: str = base, others: Any = others, **given: Any) -> Any:
                given = {k: v for k, v in given.items() if not k.startswith(("pretrained_cfg", "cache_dir"))}
                return timm.create_model(base, pretrained=False, **{**sizes, **others, **given})

            build.__name__ = name
            register_model(build)
    factory._MODEL_CONFIGS.update(configurations())
    try:
        yield
    finally:
        for name in configurations():
            factory._MODEL_CONFIGS.pop(name, None)


# --- checkpoints ---------------------------------------------------------------------------------------------


def my_clip(folder: Path) -> None:
    """A folder of CLIPModel.save_pretrained."""
    from peers import hf

    model = hf.clip(seed=1, quick_gelu=True)
    model.config.text_config.eos_token_id = 2  # pools at the highest id, as OpenAI's models in transformers
    model.save_pretrained(folder)


def my_siglip(folder: Path) -> None:
    """A folder of SiglipModel.save_pretrained."""
    from peers import hf

    hf.siglip(seed=2).save_pretrained(folder)


def siglip_npz(file: Path) -> None:
    """A file of big_vision."""
    from peers import big_vision

    big_vision.save(big_vision.init(seed=3), file)


def fine_tune(file: Path) -> None:
    """What OpenCLIP's training writes."""
    import torch
    from peers import openclip
    from peers.common import Size

    model = openclip.clip(seed=4, quick_gelu=True, **dataclasses.asdict(Size()))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "small-clip", "state_dict": state, "optimizer": {"state": {}}}, file)


def timm_tower(file: Path) -> None:
    """The weights of a timm ViT of CLIP's kind, with a head as projection."""
    from peers import timm_towers
    from safetensors.torch import save_file

    save_file(timm_towers.clip_vit(seed=5, quick_gelu=True).state_dict(), file)


FILES: dict[str, Callable[[Path], None]] = {
    "my-clip": my_clip,
    "my-siglip": my_siglip,
    "siglip.npz": siglip_npz,
    "fine-tune.pt": fine_tune,
    "timm-tower.safetensors": timm_tower,
}
