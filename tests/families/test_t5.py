"""T5 beyond the examples: prefixes of T5X, names of scalable_t5, transformers' own files, tied embeddings."""

from __future__ import annotations

import pytest
import torch
from checks import assert_bits, assert_same, refused
from peers.common import max_diff
from peers.families import t5
from peers.families.vision_transformer import written
from safetensors.torch import save_file

import keymap

pytestmark = pytest.mark.formats("t5", "t5x", "t5x_scanned", "hf_mt5")

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def loaded(path, gated=True, **options):
    model = t5.hf(gated=gated)()
    return model, keymap.load_checkpoint(model, path, **options).report.plan


def assert_computes(model, arrays):
    with torch.no_grad():
        assert max(max_diff(*pair) for pair in t5.logits(arrays)(model)) <= 2e-5


# --- files of T5X ---


PREFIXES = {
    "flat": lambda arrays: arrays,
    "flat, with the state of the optimizer": lambda arrays: {
        **{f"target/{key}": value for key, value in arrays.items()},
        **{f"state/param_states/{key}/v": torch.zeros(1) for key in arrays},
        "state/step": torch.tensor(7),
    },
    "flat, of the first releases": lambda arrays: {
        **{f"optimizer/target/{key}": value for key, value in arrays.items()},
        "optimizer/state/step": torch.tensor(7),
    },
}  # fmt: skip


@pytest.mark.parametrize("container", PREFIXES)
def test_every_prefix_of_t5x_loads(container, tmp_path):
    arrays = t5.tree(True, scanned=False)
    torch.save(PREFIXES[container](arrays), tmp_path / "x.pt")
    model, plan = loaded(tmp_path / "x.pt")
    assert (plan.format, plan.missing_keys, plan.unexpected_keys) == ("t5x", (), ())
    assert_computes(model, arrays)


def test_the_names_of_scalable_t5_load_and_are_written_as_those_of_umt5(tmp_path):
    arrays = t5.tree(True, scanned=True)
    file = {key.replace("relpos_bias", "relative_posemb"): value for key, value in t5.stacked(arrays, "layers").items()}
    assert "encoder/layers/relative_posemb/rel_embedding" in file
    torch.save(file, tmp_path / "x.pt")
    model = t5.hf("UMT5ForConditionalGeneration")()
    assert keymap.load_checkpoint(model, tmp_path / "x.pt").report.plan.format == "t5x_scanned"
    assert_computes(model, arrays)
    assert_same(keymap.convert_state_dict(model.state_dict(), "t5x_scanned", facts={"text.heads": t5.HEADS}),
                t5.stacked(arrays))  # fmt: skip


def test_the_number_of_heads_is_asked_for_where_no_model_shows_it():
    state = t5.hf("UMT5ForConditionalGeneration")().state_dict()
    with pytest.raises(keymap.PlanError, match=r"text\.heads"):
        keymap.convert_state_dict(state, "t5x_scanned")


# --- one tensor under several names ---


def test_v1_1_into_a_model_with_one_matrix_for_words_and_logits_is_refused(tmp_path):
    import transformers

    arrays = t5.tree(True, scanned=False)
    torch.save(arrays, tmp_path / "x.pt")
    config = t5.hf()().config
    config.tie_word_embeddings = True  # as transformers sets it for every T5
    model = transformers.T5ForConditionalGeneration(config)
    assert model.lm_head.weight is model.shared.weight
    refused(model, tmp_path / "x.pt", "lm_head.weight", "are one tensor of the model", error=keymap.VerifyError)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # as the notes of the format say
    keymap.load_checkpoint(model.eval(), tmp_path / "x.pt")
    assert_computes(model, arrays)


def test_v1_0_gives_the_embeddings_to_a_matrix_of_its_own_and_is_written_without_it(tmp_path):
    arrays = t5.tree(False, scanned=False)
    torch.save(arrays, tmp_path / "x.pt")
    model, _ = loaded(tmp_path / "x.pt", gated=False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert torch.equal(model.lm_head.weight, arrays["token_embedder/embedding"])
    assert_same(keymap.convert_state_dict(model.state_dict(), "t5x"), arrays)
    torch.nn.init.ones_(model.lm_head.weight)
    with pytest.raises(keymap.VerifyError, match=r"left out as a copy of shared.weight"):
        keymap.convert_state_dict(model.state_dict(), "t5x")


# --- transformers' own files ---


def disk(model):
    """Today's file: the embeddings once."""
    state = written(model)
    assert not set(COPIES) & set(state)
    return state


FILES = {
    "today's": disk,
    "with every copy and a table that is not used": lambda model: {
        **{key: value.clone() for key, value in model.state_dict().items()}, UNUSED: torch.zeros(t5.BUCKETS, t5.HEADS),
    },
    "with the encoder's name of the embeddings": lambda model: {
        COPIES[0] if key == "shared.weight" else key: value for key, value in disk(model).items()
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "MT5ForConditionalGeneration"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("form", FILES)
def test_files_of_transformers_load(form, gated, kind, tmp_path):
    theirs, model = t5.hf(kind, gated)(), t5.hf(kind, gated)()
    torch.nn.init.ones_(model.shared.weight)
    save_file(FILES[form](theirs), tmp_path / "model.safetensors")
    plan = keymap.load_checkpoint(model, tmp_path / "model.safetensors").report.plan
    assert (plan.format, plan.hub, plan.unexpected_keys) == ("t5", "t5", ())
    assert_bits(model, theirs.state_dict())


def test_the_encoder_of_a_whole_file_loads_alone(tmp_path):
    theirs, model = t5.hf()(), t5.hf("T5EncoderModel")()
    save_file(written(theirs), tmp_path / "model.safetensors")
    refused(model, tmp_path / "model.safetensors")
    keymap.load_checkpoint(model, tmp_path / "model.safetensors", towers=("text",))
    state = theirs.state_dict()
    assert_bits(model, {key: state[key] for key in model.state_dict()})


def test_inspect_tells_both_readings_of_mt5(tmp_path):
    save_file(written(t5.hf("MT5ForConditionalGeneration")()), tmp_path / "model.safetensors")
    found = keymap.inspect_checkpoint(tmp_path / "model.safetensors")
    assert (found.format, found.hub) == ("hf_mt5", "open_clip")
    assert any("t5 of hub t5 (choose with hub='t5')" in note for note in found.notes)
