"""Random architectures, out to every format that can hold them and back into a new model: no bit differs.

CI runs a few examples of a fixed seed. ``KEYMAP_EXAMPLES=500 python -m pytest tests/property`` runs more, at random.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import openclip
from peers.common import same_bits, tensors
from safetensors.torch import save_file
from torch import nn

import keymap

EXAMPLES = int(os.environ.get("KEYMAP_EXAMPLES", "8"))


class Family(NamedTuple):
    """A kind of model: how it is built, and the formats that hold all of it."""

    build: Callable[..., nn.Module]
    formats: tuple[str, ...]


FAMILIES = {
    "CLIP": Family(openclip.clip, ("open_clip", "open_clip_flat", "hf_clip", "openai")),
    "CustomTextCLIP": Family(openclip.custom, ("open_clip", "open_clip_flat", "hf_clip", "openai")),
    "timm's CLIP ViT": Family(openclip.clip_trunk, ("open_clip", "open_clip_flat", "hf_clip", "openai")),
    "SigLIP": Family(openclip.siglip, ("open_clip", "open_clip_flat", "hf_siglip", "big_vision_siglip")),
    "ResNet": Family(openclip.resnet, ("open_clip", "open_clip_flat", "openai")),
    "ConvNeXt": Family(openclip.convnext, ("open_clip", "open_clip_flat")),
    "CoCa": Family(openclip.coca, ("open_clip",)),
    "RoBERTa text": Family(openclip.hf_text, ("open_clip",)),
}
SAME_KEYS = ("open_clip_flat", "openai")  # without what OpenAI's archives hold beside them, their keys are OpenCLIP's
CASES = [(family, form) for family, kind in FAMILIES.items() for form in kind.formats]


@st.composite
def architectures(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Sizes of a small model of a family; axes are often of equal length, where no shape shows a mistake."""
    heads, text_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    step = st.sampled_from([4, 8, 12, 16])
    sizes: dict[str, Any] = {
        "image_width": heads * draw(step),
        "image_heads": heads,
        "image_depth": draw(st.integers(1, 12)),
        "text_width": text_heads * draw(step),
        "text_heads": text_heads,
        "text_depth": draw(st.integers(1, 12)),
        "patch": draw(st.sampled_from([4, 7, 14])),
        "vocab": draw(st.integers(20, 120)),
        "context_length": draw(st.integers(3, 20)),
        "embed_dim": draw(st.sampled_from([8, 16, 24, 40])),
    }
    sizes["image_size"] = sizes["patch"] * draw(st.integers(1, 4))
    if family in ("ResNet", "ConvNeXt"):
        for name in ("image_width", "image_heads", "image_depth", "patch", "image_size"):
            del sizes[name]
    if family == "ResNet":
        sizes |= {"image_width": 2 * draw(st.sampled_from([4, 8])), "layers": draw(st.tuples(*[st.integers(1, 3)] * 4))}
    if family == "CoCa":
        sizes["image_width"] = 4 * draw(st.sampled_from([4, 8, 12]))
        sizes["image_heads"] = 4
    return sizes


def write(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, path)


def heads(sizes: dict[str, Any]) -> dict[str, int]:
    return {f"{tower}.heads": sizes[f"{tower}_heads"] for tower in ("image", "text") if f"{tower}_heads" in sizes}


@pytest.mark.parametrize(("family", "form"), CASES, ids=[f"{family} by {form}" for family, form in CASES])
def test_a_random_model_comes_back_bit_for_bit(
    family: str, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = FAMILIES[family]

    @settings(
        max_examples=EXAMPLES,
        derandomize="KEYMAP_EXAMPLES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(sizes=architectures(family), suffix=st.sampled_from([".safetensors", ".pt", ".npz"]), assign=st.booleans())
    def there_and_back(sizes: dict[str, Any], suffix: str, assign: bool) -> None:
        model, other = kind.build(seed=1, **sizes), kind.build(seed=2, **sizes)
        if form == "openai":  # whose towers are float16
            with torch.no_grad():
                for value in model.parameters():
                    value.copy_(value.half())
        state = keymap.convert_state_dict(model.state_dict(), to=form, facts=heads(sizes))
        path = tmp_path_factory.mktemp("model") / f"model{suffix}"
        write(state, path)
        result = keymap.load_checkpoint(other, path, assign=assign)
        assert result.report.plan.format == ("open_clip" if form in SAME_KEYS else form)
        wanted, found = tensors(model), tensors(other)
        assert list(found) == list(wanted)
        differing = [key for key, value in wanted.items() if not same_bits(found[key].reshape(value.shape), value)]
        assert not differing, (family, form, sizes, suffix, assign, differing[:4])

    there_and_back()
