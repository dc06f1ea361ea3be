"""Whisper beyond the examples: the container of its .pt files, transformers' other classes, the tied output."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checks import assert_bits, assert_same, refused
from peers.families import whisper
from peers.families.vision_transformer import written
from safetensors.torch import save_file

import keymap

pytestmark = pytest.mark.formats("whisper", "openai_whisper", "whisper_encoder", "whisper_decoder")


def pt_file(peer, path, dtype=torch.float32):
    state = {key: value.to(dtype) for key, value in peer.state_dict().items()}
    torch.save({"dims": dataclasses.asdict(whisper.dims()), "model_state_dict": state}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pt_file_of_whisper_loads_with_the_sizes_beside_it(dtype, tmp_path):
    peer, model = whisper.openai().to(dtype).float(), whisper.hf()()
    path = pt_file(peer, tmp_path / "tiny.pt", dtype)
    result = keymap.load_checkpoint(model, path)
    assert (result.report.plan.format, result.report.plan.wrapper) == ("openai_whisper", "model_state_dict")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        assert torch.allclose(peer(whisper.MEL, whisper.IDS), model(whisper.MEL, decoder_input_ids=whisper.IDS).logits,
                              atol=2e-5)  # fmt: skip


def test_what_is_written_is_what_whisper_loads(tmp_path):
    model, peer = whisper.hf()(), whisper.openai()
    state = keymap.convert_state_dict(model.state_dict(), "openai_whisper")
    path = tmp_path / "tiny.pt"
    torch.save({"dims": dataclasses.asdict(whisper.dims()), "model_state_dict": state}, path)
    checkpoint = torch.load(path, weights_only=True)
    loaded = whisper.theirs().Whisper(whisper.theirs().ModelDimensions(**checkpoint["dims"]))
    loaded.load_state_dict(checkpoint["model_state_dict"])
    keymap.load_checkpoint(model, pt_file(loaded, path))
    assert set(state) == set(peer.state_dict())
    assert_same(loaded.state_dict(), state)


@pytest.mark.parametrize("target", ["WhisperForConditionalGeneration", "WhisperModel"])
@pytest.mark.parametrize("source", ["WhisperForConditionalGeneration", "WhisperModel"])
def test_files_of_transformers_load_into_each_class(source, target, tmp_path):
    theirs, model = whisper.hf(source)(), whisper.hf(target)()
    save_file(written(theirs), tmp_path / "model.safetensors")
    plan = keymap.load_checkpoint(model, tmp_path / "model.safetensors").report.plan
    assert (plan.format, plan.hub) == ("whisper", "whisper")
    body = {key.removeprefix("model."): value for key, value in theirs.state_dict().items() if "proj_out" not in key}
    prefix = "model." if target == "WhisperForConditionalGeneration" else ""
    want = {prefix + key: value for key, value in body.items()}
    if prefix:
        want["proj_out.weight"] = body["decoder.embed_tokens.weight"]
    assert_bits(model, want)


def test_the_encoder_alone_loads_into_a_classifier(tmp_path):
    peer, model = whisper.openai(), whisper.hf("WhisperForAudioClassification")()
    path = pt_file(peer, tmp_path / "tiny.pt")
    refused(model, path, "unexpected")
    keymap.load_checkpoint(model, path, towers=("audio",))
    with torch.no_grad():
        ours = model.encoder(whisper.MEL).last_hidden_state
        assert torch.allclose(peer.encoder(whisper.MEL), ours, atol=2e-5)


def test_an_output_of_its_own_gets_the_embeddings_of_the_decoder(tmp_path):
    peer, model = whisper.openai(), whisper.hf(tie_word_embeddings=False)()
    keymap.load_checkpoint(model, pt_file(peer, tmp_path / "tiny.pt"))
    assert torch.equal(model.proj_out.weight, peer.decoder.token_embedding.weight)
    torch.nn.init.ones_(model.proj_out.weight)
    with pytest.raises(keymap.VerifyError, match=r"a copy of model.decoder.embed_tokens.weight"):
        keymap.convert_state_dict(model.state_dict(), "openai_whisper")
