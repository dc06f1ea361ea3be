"""BERT beyond the examples: transformers' files into its other classes, its own load of old files, tied weights."""

from __future__ import annotations

import json

import pytest
import torch
from checks import assert_bits, assert_same, refused
from peers.families import bert
from peers.families.vision_transformer import written
from safetensors.torch import save_file

import keymap

pytestmark = pytest.mark.formats("bert", "bert_gamma_beta", "bert_tensorflow", "bert_prefix", "hf_bert")

BODY = "BertModel"


def file_of(model, folder, **more):
    path = folder / "model.safetensors"
    save_file({**written(model), **more}, path)
    return path


def body(model):
    """The tensors of BertModel, without its prefix."""
    state = model.state_dict()
    if any(key.startswith("bert.") for key in state):
        state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    return state


@pytest.mark.parametrize("source", [BODY, "BertForPreTraining", "BertForSequenceClassification"])
@pytest.mark.parametrize("target", [BODY, "BertForPreTraining", "BertForSequenceClassification"])
def test_the_body_of_every_class_loads_into_every_other(source, target, tmp_path):
    theirs, model = bert.hf(source)(), bert.hf(target, num_labels=2)()
    torch.nn.init.ones_(next(iter(model.parameters())))
    prefix = "" if source == BODY else "bert."
    path = file_of(theirs, tmp_path, **{f"{prefix}embeddings.position_ids": torch.arange(17)[None]})
    plan = keymap.load_checkpoint(model, path, towers=("text",)).report.plan
    assert (plan.format, plan.hub) == ("bert", "bert")
    assert f"{prefix}embeddings.position_ids" in plan.dropped
    assert_same(body(model), body(theirs))


@pytest.mark.parametrize(("source", "target"), [("BertForPreTraining", BODY), ("BertForMaskedLM", BODY)])
def test_a_head_without_a_place_is_refused_and_the_message_says_what_to_pass(source, target, tmp_path):
    path, model = file_of(bert.hf(source)(), tmp_path), bert.hf(target)()
    refused(model, path, "allow_unexpected=('cls.*',)")
    keymap.load_checkpoint(model, path, allow_unexpected="cls.*", allow_missing="pooler.*")


def test_an_old_file_loads_as_transformers_loads_it(tmp_path):
    import transformers

    peer, model = bert.old("BertForPreTraining"), bert.hf()()
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "model_type": "bert"}))
    keymap.load_checkpoint(model, tmp_path)
    loaded = transformers.BertForPreTraining.from_pretrained(tmp_path)
    assert_bits(model, loaded.state_dict())


def test_what_is_written_is_what_the_old_library_loads(tmp_path):
    peer, model = bert.old("BertForPreTraining"), bert.hf()()
    written_back = keymap.convert_state_dict(written(model), "bert_gamma_beta")
    assert set(peer.state_dict()) - set(written_back) == {"cls.predictions.decoder.weight"}  # one tensor with the words
    peer.load_state_dict(written_back, strict=False)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in bert.pretraining(peer)(model))


def test_an_output_matrix_of_its_own_gets_the_word_embeddings_that_the_variables_have_once(tmp_path):
    made = bert.tensorflow()
    torch.save(dict(made.file), tmp_path / "x.pt")
    model = bert.hf(tie_word_embeddings=False)()
    plan = keymap.load_checkpoint(model, tmp_path / "x.pt").report.plan
    assert not plan.missing_keys
    assert any("a copy of bert.embeddings.word_embeddings.weight" in note for note in plan.notes)
    assert torch.equal(model.cls.predictions.decoder.weight, made.file["bert/embeddings/word_embeddings"])
    assert torch.equal(model.cls.predictions.decoder.bias, made.file["cls/predictions/output_bias"])


def test_an_output_matrix_that_is_not_the_word_embeddings_cannot_be_written_as_variables():
    state = bert.hf(tie_word_embeddings=False)().state_dict()
    with pytest.raises(keymap.VerifyError, match=r"left out as a copy of bert.embeddings.word_embeddings.weight"):
        keymap.convert_state_dict(state, "bert_tensorflow")


def test_inspect_tells_both_readings_of_a_bert(tmp_path):
    theirs = bert.hf(BODY)()
    path = file_of(theirs, tmp_path)
    found = keymap.inspect_checkpoint(path)
    assert (found.format, found.hub) == ("hf_bert", "open_clip")
    assert any("bert of hub bert (choose with hub='bert')" in note for note in found.notes)
    assert keymap.inspect_checkpoint(path, hub="bert").format == "bert"


def test_an_old_body_that_was_saved_alone_loads(tmp_path):
    peer, model = bert.old(BODY), bert.hf(BODY)()
    torch.save(peer.state_dict(), tmp_path / "x.pt")
    assert "embeddings.LayerNorm.gamma" in peer.state_dict()
    assert keymap.load_checkpoint(model, tmp_path / "x.pt").report.plan.format == "bert_gamma_beta"
    with torch.no_grad():
        ours = model(bert.IDS, token_type_ids=bert.TYPES).last_hidden_state
        assert torch.allclose(bert.hidden(peer)[0], ours, atol=2e-5)
