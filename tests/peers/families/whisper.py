"""OpenAI's Whisper, and Whisper of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peers.common import randomised
from peers.stubs import stand_ins

from . import Example

MELS, WIDTH, WORDS, FRAMES, PLACES = 10, 24, 41, 12, 9
MEL = torch.randn(2, MELS, 2 * FRAMES, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(4, WORDS, (2, 7), generator=torch.Generator().manual_seed(4))


@cache
def theirs() -> ModuleType:
    """The module with the model; what the package imports for tokens and for times of words is not needed here."""
    with stand_ins("tiktoken", "numba", "more_itertools"):
        import whisper.model
    return whisper.model


def dims() -> Any:
    return theirs().ModelDimensions(
        n_mels=MELS, n_audio_ctx=FRAMES, n_audio_state=WIDTH, n_audio_head=3, n_audio_layer=3,
        n_vocab=WORDS, n_text_ctx=PLACES, n_text_state=WIDTH, n_text_head=2, n_text_layer=2,
    )  # fmt: skip


def openai() -> nn.Module:
    return randomised(theirs().Whisper, dims(), seed=1)


def hf(kind: str = "WhisperForConditionalGeneration", **options: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers, by the name of its class."""

    def made() -> nn.Module:
        import transformers

        config = {
            "vocab_size": WORDS, "num_mel_bins": MELS, "d_model": WIDTH,
            "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 4 * WIDTH,
            "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 4 * WIDTH,
            "max_source_positions": FRAMES, "max_target_positions": PLACES,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
        }  # fmt: skip
        return randomised(getattr(transformers, kind), transformers.WhisperConfig(**{**config, **options}))

    return made


def openai_whisper() -> Example:
    peer = openai()

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        ours = model(MEL, decoder_input_ids=IDS)
        return [(peer(MEL, IDS), ours.logits), (peer.encoder(MEL), ours.encoder_last_hidden_state)]

    return Example(
        "openai_whisper",
        peer.state_dict(),
        hf(),
        "openai-whisper's Whisper",
        outputs=pairs,
        wrong={
            "a layer more": hf(encoder_layers=4),
            "fewer positions": hf(max_source_positions=FRAMES - 1),
            "another vocabulary": hf(vocab_size=WORDS + 1),
        },
    )


def openai_bare() -> Example:
    """The same file into a model without a prefix, whose states give the logits."""
    peer = openai()

    def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        states = model(MEL, decoder_input_ids=IDS).last_hidden_state
        return [(peer(MEL, IDS), states @ peer.decoder.token_embedding.weight.T)]

    return Example(
        "openai_whisper",
        peer.state_dict(),
        hf("WhisperModel"),
        "openai-whisper's Whisper",
        outputs=pairs,
        wrong={"a layer more": hf("WhisperModel", decoder_layers=3)},
    )


EXAMPLES: Mapping[str, Callable[[], Example]] = {
    "openai_whisper": openai_whisper,
    "openai_whisper WhisperModel": openai_bare,
}
ROWS = r"""
openai_whisper: query and value swapped: differs
- name: {query: q, value: v, out: out}
+ name: {query: v, value: q, out: out}
openai_whisper: the norms of a layer swapped: differs
- attn_ln.(weight|bias): self_attn_layer_norm.\1
+ attn_ln.(weight|bias): final_layer_norm.\1
- mlp_ln.(weight|bias): final_layer_norm.\1
+ mlp_ln.(weight|bias): self_attn_layer_norm.\1
openai_whisper: the decoder's own attention and that to the encoder swapped: differs
- decoder.blocks.(\d+).cross_attn.: {to: 'model.decoder.layers.\1.encoder_attn.', table: attention}
+ decoder.blocks.(\d+).cross_attn.: {to: 'model.decoder.layers.\1.self_attn.', table: attention}
- decoder.blocks.(\d+).: {to: 'model.decoder.layers.\1.', table: layer}
+ decoder.blocks.(\d+).attn.: {to: 'model.decoder.layers.\1.encoder_attn.', table: attention}
+ decoder.blocks.(\d+).attn_ln.(weight|bias): model.decoder.layers.\1.self_attn_layer_norm.\2
+ decoder.blocks.(\d+).mlp.(0|2).(weight|bias): model.decoder.layers.\1.fc<2:mlp>.\3
+ decoder.blocks.(\d+).mlp_ln.(weight|bias): model.decoder.layers.\1.final_layer_norm.\2
openai_whisper: positions and words crossed: refused
- decoder.token_embedding.weight: model.decoder.embed_tokens.weight
+ decoder.token_embedding.weight: model.decoder.embed_positions.weight
- decoder.positional_embedding: model.decoder.embed_positions.weight
+ decoder.positional_embedding: model.decoder.embed_tokens.weight
openai_whisper: the matrices of the mlp crossed: refused
- mlp: {0: 1, 2: 2}
+ mlp: {0: 2, 2: 1}
openai_whisper WhisperModel: query and value swapped: differs
- name: {query: q, value: v, out: out}
+ name: {query: v, value: q, out: out}
"""
