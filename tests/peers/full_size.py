"""OpenCLIP's own configurations at full size, on the meta device: names and shapes, no memory.

Ten of them take their text tower's configuration from a hub. What those configurations say is written down here, as
far as it determines shapes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_NLLB = {"vocab_size": 256206, "d_model": 1024, "encoder_attention_heads": 16, "max_position_embeddings": 1024}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TEXT_CONFIGS = {
    "roberta-base": ("roberta", _ROBERTA),
    "xlm-roberta-base": ("xlm-roberta", {**_ROBERTA, "vocab_size": 250002}),
    "xlm-roberta-large": ("xlm-roberta", {**_ROBERTA, **_LARGE, "vocab_size": 250002}),
    "google/mt5-base": (
        "mt5",
        {"vocab_size": 250112, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    ),
    "google/mt5-xl": (
        "mt5",
        {"vocab_size": 250112, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    ),
    "facebook/nllb-200-distilled-600M": ("m2m_100", {**_NLLB, "encoder_layers": 12, "encoder_ffn_dim": 4096}),
    "facebook/nllb-200-distilled-1.3B": ("m2m_100", {**_NLLB, "encoder_layers": 24, "encoder_ffn_dim": 8192}),
}


def text_config(name: str) -> transformers.PretrainedConfig:
    """The configuration of a text tower that a hub has under this name."""
    kind, values = TEXT_CONFIGS[name]
    return transformers.CONFIG_MAPPING[kind](**values)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings that no weights are loaded."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


_FILLS = {
    *(getattr(nn.init, name) for name in ("constant_", "kaiming_uniform_", "normal_", "uniform_")),
    *(getattr(torch.Tensor, f"{name}_") for name in ("add", "clamp", "copy", "div", "erfinv", "fill", "mul", "sub")),
    *(getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "zero_")),
}


class _NoValues(TorchFunctionMode):
    """Filling tensors of the meta device has no effect, but takes most of the time: left out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _FILLS and (tensor := args[0] if args else given["tensor"]).is_meta:
            return tensor
        return func(*args, **given)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are built here have names and shapes and no memory."""
    with quiet(), torch.device("meta"), _NoValues():
        yield


@contextlib.contextmanager
def with_text_config(config: transformers.PretrainedConfig | None = None) -> Iterator[None]:
    """Text towers get this configuration, or the one of their name above, instead of a hub's."""

    def known(where: str, **_: object) -> transformers.PretrainedConfig:
        return config or text_config(where)

    with mock.patch("transformers.AutoConfig.from_pretrained", known):
        yield


def names() -> list[str]:
    """The configurations that the installed OpenCLIP ships."""
    return sorted(open_clip.list_models())


@lru_cache(maxsize=4)
def model(name: str) -> nn.Module:
    """The model of one configuration, on the meta device."""
    with on_meta(), with_text_config():
        return open_clip.create_model(name, device="meta", load_weights=False, pretrained=None, pretrained_text=False)


_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


def sparse_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A safetensors file of these names, shapes and dtypes that takes no disk: its values are a hole."""
    header, at = {}, 0
    for key, value in tensors.items():
        end = at + value.numel() * value.dtype.itemsize
        header[key] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path
