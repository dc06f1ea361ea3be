"""Segment Anything beyond the examples: files of parts, transformers' own files, relatives that are refused."""

from __future__ import annotations

import pytest
import torch
from checks import assert_bits, refused
from peers.families import sam
from peers.families.vision_transformer import written
from safetensors.torch import save_file

import keymap

pytestmark = pytest.mark.formats("sam", "segment_anything")


def saved(state, path):
    torch.save(dict(state), path)
    return path


def test_an_image_encoder_that_was_saved_alone_loads(tmp_path):
    peer, model = sam.meta().image_encoder, sam.hf("SamVisionModel")()
    path = saved(peer.state_dict(), tmp_path / "x.pt")
    assert keymap.inspect_checkpoint(path, hub="sam").format == "segment_anything"
    keymap.load_checkpoint(model, path)
    with torch.no_grad():
        pixels = sam.images(sam.SIDE)
        assert torch.allclose(peer(pixels), model(pixels).last_hidden_state, atol=2e-5)


def test_blocks_within_windows_do_not_make_it_a_pruned_model(tmp_path):
    found = keymap.inspect_checkpoint(saved(sam.meta().state_dict(), tmp_path / "x.pt"), hub="sam")
    assert "layers 3" in str(found) and "pruned" not in str(found)


def test_the_image_encoder_of_a_whole_file_loads_into_a_vision_model(tmp_path):
    peer, model = sam.meta(), sam.hf("SamVisionModel")()
    path = saved(peer.state_dict(), tmp_path / "x.pt")
    refused(model, path)
    keymap.load_checkpoint(model, path, towers=("image",))
    with torch.no_grad():
        pixels = sam.images(sam.SIDE)
        assert torch.allclose(peer.image_encoder(pixels), model(pixels).last_hidden_state, atol=2e-5)


def test_transformers_file_has_the_shared_encoding_once_and_loads(tmp_path):
    theirs, model = sam.hf()(), sam.hf()()
    torch.nn.init.ones_(model.shared_image_embedding.positional_embedding)
    torch.nn.init.ones_(model.prompt_encoder.shared_embedding.positional_embedding)
    state = written(theirs)
    assert "prompt_encoder.shared_embedding.positional_embedding" not in state
    save_file(state, tmp_path / "model.safetensors")
    keymap.load_checkpoint(model, tmp_path / "model.safetensors")
    shared = state["shared_image_embedding.positional_embedding"]
    assert_bits(model, {**state, "prompt_encoder.shared_embedding.positional_embedding": shared})


@torch.no_grad()
def test_what_is_written_is_what_segment_anything_loads():
    model, peer = sam.hf()(), sam.meta()
    shared = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    peer.load_state_dict(keymap.convert_state_dict(written(model), "segment_anything"), strict=True)
    assert all(torch.allclose(theirs, ours, atol=2e-5) for theirs, ours in sam.masks(peer)(model))


def test_a_second_head_for_masks_is_refused_and_the_message_says_of_which_model(tmp_path):
    state = {**sam.meta().state_dict(), "mask_decoder.hf_token.weight": torch.zeros(1, sam.OUT)}
    refused(sam.hf()(), saved(state, tmp_path / "x.pt"), "this is HQ-SAM")
