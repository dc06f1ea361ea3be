"""transformers' text encoders, small: bare, and as the language models that their owners publish.

Sizes and families are those of `peers.openclip.hf_text`, whose text tower computes ``features`` once it holds the
encoder's weights.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import hf, openclip
from .common import Size, randomise, tokens

CLASSES = {
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "RobertaModel": "roberta",
    "RobertaForMaskedLM": "roberta",
    "XLMRobertaModel": "xlm-roberta",
    "XLMRobertaForMaskedLM": "xlm-roberta",
    "MT5EncoderModel": "mt5",
    "MT5Model": "mt5",
    "MT5ForConditionalGeneration": "mt5",
    "M2M100Model": "m2m_100",
    "M2M100ForConditionalGeneration": "m2m_100",
}
WITH_POOLER = ("BertModel", "BertForPreTraining", "RobertaModel", "XLMRobertaModel")


def model(name: str, *, seed: int = 0, **sizes: Any) -> nn.Module:
    """A randomised model of that class."""
    return randomise(getattr(transformers, name)(openclip.hf_config(CLASSES[name], Size(**sizes))), seed)


def encoder(peer: nn.Module) -> nn.Module:
    """The part of a model that a text tower keeps."""
    base = getattr(peer, peer.base_model_prefix, peer)
    if type(peer).__name__.startswith("MT5"):
        return peer.encoder
    return base.encoder if peer.config.is_encoder_decoder else base


def ids(peer: nn.Module, vocab: int = 99) -> Tensor:
    """Token ids that fit the model's padding id."""
    return tokens(vocab=vocab, pad=peer.config.pad_token_id)


@torch.no_grad()
def features(peer: nn.Module, text: nn.Module, ids: Tensor) -> Tensor:
    """The peer's last hidden states, pooled and projected by the modules of OpenCLIP's text tower `text`."""
    mask = (ids != peer.config.pad_token_id).long()
    return text.proj(text.pooler(encoder(peer)(input_ids=ids, attention_mask=mask), mask))


def old_keys(peer: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, with the tied copies and the buffers that older versions of transformers wrote."""
    found = {key: value.clone() for key, value in peer.state_dict().items()}
    positions = [k for k in found if k.endswith("embeddings.position_embeddings.weight")]
    for key in positions:
        stem, count = key.removesuffix("position_embeddings.weight"), found[key].shape[0]
        found |= {
            f"{stem}position_ids": torch.arange(count)[None],
            f"{stem}token_type_ids": torch.zeros(1, count).long(),
        }
    for name, module in peer.named_modules():
        if name.endswith("embed_positions"):
            found[f"{name}.weights"] = module.weights.clone()
    return found


def disk_keys(peer: nn.Module) -> dict[str, Tensor]:
    """The state dict as transformers 5 writes it to model.safetensors."""
    return hf.disk_keys(peer)
