"""transformers' text encoders load into OpenCLIP's Hugging Face text tower, as their owners save them.

The projection to the embedding is OpenCLIP's own; the tower's last hidden states are the peer's.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from broken import Case, rule_tests
from checks import SIZES, assert_parity
from peers import hf_text, openclip
from peers.common import SQUARE, assert_unchanged, bits, same_bits

import keymap

pytestmark = pytest.mark.formats("hf_bert", "hf_mt5", "hf_m2m100")

FORMATS = {
    "bert": "hf_bert",
    "roberta": "hf_bert",
    "xlm-roberta": "hf_bert",
    "mt5": "hf_mt5",
    "m2m_100": "hf_m2m100",
}

FORMS = {"model.safetensors": hf_text.disk_keys, "whole state dict of older versions": hf_text.old_keys}

PROJECTION = ["text.proj.0.weight", "text.proj.2.weight"]


def target(name, **arguments):
    return openclip.hf_text(family=hf_text.CLASSES[name], seed=5, **arguments)


@torch.no_grad()
def assert_text_parity(model, peer):
    ids = hf_text.ids(peer)
    assert_parity(model, ids=ids, peer_text=hf_text.features(peer, model.text, ids))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", hf_text.CLASSES)
def test_an_encoder_loads(name, form, sizes, file, proves):
    peer, model = hf_text.model(name, **sizes), target(name, **sizes)
    before = bits(model)
    keys = FORMS[form](peer)
    path = file(keys)
    with pytest.raises(keymap.PlanError, match=r"text.proj.0.weight"):
        keymap.load_checkpoint(model, path, towers=("text",))
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, towers=("text",), strict=False)
    assert result.report.plan.format == FORMATS[hf_text.CLASSES[name]]
    assert result.missing_keys == PROJECTION
    poolers = {key for key in keys if ".pooler." in f".{key}"}
    assert set(result.unexpected_keys) == poolers  # mean_pooler: the tower has none
    assert bool(poolers) == (name in hf_text.WITH_POOLER)
    assert_text_parity(model, peer)
    own = hf_text.encoder(peer).state_dict()  # what OpenCLIP's text tower keeps of the model
    expected = {f"text.transformer.{key}": value for key, value in own.items() if not key.startswith("pooler.")}
    state = model.state_dict()
    assert set(expected) == {key for key in state if key.startswith("text.transformer.")}
    assert [key for key, value in expected.items() if not same_bits(value, state[key])] == []
    assert [key for key in state if key not in expected and not same_bits(before[key], state[key])] == []
    used = {key for entry in result.report.plan.entries for key in entry.layout.sources}
    cut = "".join(result.report.plan.prefixes)
    assert used | set(result.report.plan.dropped) | poolers == {key.removeprefix(cut) for key in keys}
    proves("parity", result.report.plan)


@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["distinct", "square"])
@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "XLMRobertaForMaskedLM", "M2M100ForConditionalGeneration"])
def test_an_encoder_below_a_linear_projection_computes_the_same(name, sizes, file, proves):
    peer = hf_text.model(name, **sizes)
    model = openclip.hf_text(family=hf_text.CLASSES[name], proj="linear", seed=5, **sizes)
    result = keymap.load_checkpoint(model, file(hf_text.disk_keys(peer)), towers=("text",), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["text.proj.weight"], [])
    assert_text_parity(model, peer)
    proves("parity", result.report.plan)


@pytest.mark.parametrize("name", hf_text.WITH_POOLER)
def test_a_pooler_is_taken_where_the_tower_has_one(name, file):
    peer, model = hf_text.model(name), target(name, pooler="cls_pooler")
    result = keymap.load_checkpoint(model, file(hf_text.disk_keys(peer)), towers=("text",), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (PROJECTION, [])
    assert_text_parity(model, peer)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM"])
def test_a_pooler_that_the_file_lacks_is_reported(name, file):
    model = target(name, pooler="cls_pooler")
    path = file(hf_text.disk_keys(hf_text.model(name)))
    result = keymap.load_checkpoint(model, path, towers=("text",), strict=False)
    pooler = {"text.transformer.pooler.dense.weight", "text.transformer.pooler.dense.bias"}
    assert set(result.missing_keys) == {*PROJECTION, *pooler}


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MT5EncoderModel", "M2M100ForConditionalGeneration"])
def test_a_tower_without_projection_loads_strictly(name, file):
    size = {"embed_dim": 32, "text_width": 32}
    peer, model = hf_text.model(name, **size), target(name, proj=None, **size)
    result = keymap.load_checkpoint(model, file(hf_text.disk_keys(peer)), towers=("text",))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_text_parity(model, peer)


def test_the_first_berts_named_their_norms_otherwise(file):
    peer = hf_text.model("BertForPreTraining")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    keys = {}
    for key, value in hf_text.old_keys(peer).items():
        for new, old in names.items():
            key = key.replace(new, old)
        keys[key] = value
    assert sum(key.endswith((".gamma", ".beta")) for key in keys) == 2 * (1 + 3 * 2) + 2
    model = target("BertForPreTraining", pooler="cls_pooler")
    result = keymap.load_checkpoint(model, file(keys), towers=("text",), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (PROJECTION, [])
    assert_text_parity(model, peer)


@pytest.mark.parametrize("name", ["MT5ForConditionalGeneration", "M2M100ForConditionalGeneration"])
def test_a_file_may_hold_the_embedding_under_the_name_of_the_encoder_alone(name, file):
    peer, model = hf_text.model(name), target(name)
    keys = {k: v for k, v in hf_text.old_keys(peer).items() if not k.endswith("shared.weight")}
    result = keymap.load_checkpoint(model, file(keys), towers=("text",), strict=False)
    assert result.missing_keys == PROJECTION
    assert_text_parity(model, peer)


@pytest.mark.parametrize("name", ["MT5ForConditionalGeneration", "M2M100ForConditionalGeneration"])
def test_an_encoder_embedding_that_differs_from_the_shared_one_is_refused(name, file):
    model = target(name)
    keys = hf_text.old_keys(hf_text.model(name))
    key = next(k for k in keys if k.endswith("encoder.embed_tokens.weight"))
    keys[key] = keys[key] + 1
    before = bits(model)
    size = {"embed_dim": 32, "text_width": 32}
    with pytest.raises(keymap.VerifyError, match=r"encoder.embed_tokens.weight must hold the same values"):
        keymap.load_checkpoint(target(name, proj=None, **size), file(keys), towers=("text",))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["BertModel", "MT5EncoderModel", "M2M100Model"])
def test_a_tower_of_another_family_is_refused(name, file):
    for family in {"bert", "mt5", "m2m_100"} - {hf_text.CLASSES[name]}:
        model = openclip.hf_text(family=family, seed=5)
        before = bits(model)
        for strict in (True, False):
            with pytest.raises(keymap.PlanError):
                keymap.load_checkpoint(model, file(hf_text.disk_keys(hf_text.model(name))), strict=strict)
        assert_unchanged(model, before)


# --- OpenCLIP's own files, with what older versions of transformers stored in them ---


def old_buffers(model):
    """The buffers of the tower's embeddings as older versions stored them, by key."""
    found = {}
    if hasattr(model.text.transformer, "embeddings"):
        stem, count = "text.transformer.embeddings.", model.text.transformer.config.max_position_embeddings
        found |= {
            f"{stem}position_ids": torch.arange(count)[None],
            f"{stem}token_type_ids": torch.zeros(1, count).long(),
        }
    if hasattr(model.text.transformer, "embed_positions"):
        found["text.transformer.embed_positions.weights"] = model.text.transformer.embed_positions.weights.clone()
    return found


@pytest.mark.parametrize("alone", [False, True], ids=["whole model", "text tower alone"])
@pytest.mark.parametrize("family", list(FORMATS))
def test_old_files_of_open_clip_with_derived_buffers_load_bit_for_bit(family, alone, file):
    source, model = (openclip.hf_text(family=family, seed=seed) for seed in (1, 2))
    more = old_buffers(source)
    assert bool(more) == (family != "mt5")
    keys = {**source.state_dict(), **more}
    if alone:
        keys = {k.removeprefix("text."): v for k, v in keys.items() if k.startswith("text.")}
    result = keymap.load_checkpoint(model, file(keys), towers=("text",) if alone else None)
    assert result.report.plan.format == "open_clip"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert set(result.report.plan.dropped) == {k.removeprefix("text.") if alone else k for k in more}
    state, want = model.state_dict(), source.state_dict()
    assert [k for k in want if (k.startswith("text.") or not alone) and not same_bits(want[k], state[k])] == []
    ids = hf_text.tokens(pad=source.text.config.pad_token_id)
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids), source.encode_text(ids))


# --- there and back ---


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "XLMRobertaModel", "MT5EncoderModel"])
def test_a_bare_encoder_goes_to_the_hub_and_back(name):
    state = hf_text.disk_keys(hf_text.model(name))
    form = FORMATS[hf_text.CLASSES[name]]
    hub = keymap.convert_state_dict(state, to="open_clip")
    back = keymap.convert_state_dict(hub, to=form)
    assert set(back) == set(state)
    assert [k for k in state if not same_bits(back[k], state[k])] == []


def test_the_encoder_of_a_translation_model_comes_back_without_its_decoder():
    state = hf_text.disk_keys(hf_text.model("M2M100Model"))
    back = keymap.convert_state_dict(keymap.convert_state_dict(state, to="open_clip"), to="hf_m2m100")
    kept = {k: v for k, v in state.items() if not k.startswith("decoder.")}
    assert set(back) == set(kept)
    assert [k for k in kept if not same_bits(back[k], kept[k])] == []


# --- broken rules ---


WHOLE = {  # models whose files hold more than the encoder
    "hf_bert": "RobertaForMaskedLM",
    "hf_mt5": "MT5ForConditionalGeneration",
    "hf_m2m100": "M2M100ForConditionalGeneration",
}


@torch.no_grad()
def square(form: str) -> Case:
    name = WHOLE[form]
    peer, model = hf_text.model(name, **SQUARE), target(name, proj=None, **SQUARE)
    ids = hf_text.ids(peer)
    outputs = [None, hf_text.features(peer, model.text, ids)]
    return Case(form, hf_text.old_keys(peer), model, outputs, ids=ids, towers=("text",))


CASES = {form: partial(square, form) for form in WHOLE}

ROWS = r"""
hf_bert: the dense layers of a block exchanged: differs
- attention.output.(dense|LayerNorm).(weight|bias): attention.output.\1.\2
+ attention.output.LayerNorm.(weight|bias): attention.output.LayerNorm.\1
+ attention.output.dense.(weight|bias): intermediate.dense.\1
- intermediate.dense.(weight|bias): intermediate.dense.\1
+ intermediate.dense.(weight|bias): attention.output.dense.\1
hf_bert: query and key swapped: differs
- attention.self.(query|key|value).(weight|bias): attention.self.\1.\2
+ attention.self.(query|key|value).(weight|bias): attention.self.<1:qkv>.\2
hf_bert: words and positions exchanged: refused
- (word_embeddings|position_embeddings|token_type_embeddings).weight: \1.weight
+ (word_embeddings|position_embeddings|token_type_embeddings).weight: <1:embedding>.weight
hf_mt5: q and k swapped: differs
- text.transformer.block.\1.layer.0.SelfAttention.\2.weight
+ text.transformer.block.\1.layer.0.SelfAttention.<2:qkv>.weight
hf_mt5: the norms of a block exchanged: differs
- text.transformer.block.\1.layer.\2.layer_norm.weight
+ text.transformer.block.\1.layer.<2:turned>.layer_norm.weight
hf_mt5: the gate and what it gates exchanged: differs
- text.transformer.block.\1.layer.1.DenseReluDense.\2.weight
+ text.transformer.block.\1.layer.1.DenseReluDense.<2:gate>.weight
hf_mt5: the encoder's copy of the embedding compared with the last norm: refused
- same_as: shared.weight
+ same_as: encoder.final_layer_norm.weight
hf_m2m100: the norms of a layer exchanged: differs
- text.transformer.layers.\1.\2_layer_norm.\3
+ text.transformer.layers.\1.<2:norm>_layer_norm.\3
hf_m2m100: q and k swapped: differs
- text.transformer.layers.\1.self_attn.\2_proj.\3
+ text.transformer.layers.\1.self_attn.<2:qkv>_proj.\3
hf_m2m100: fc1 and fc2 swapped: differs
- text.transformer.layers.\1.fc\2.\3
+ text.transformer.layers.\1.fc<2:turned>.\3
hf_m2m100: the table of positions not left out: refused
- (encoder|decoder).embed_positions.weights: sin
+ (encoder|decoder).embed_position.weights: sin
"""

EMBEDDINGS = """\
  embedding:
    word_embeddings: position_embeddings
    position_embeddings: word_embeddings
    token_type_embeddings: token_type_embeddings
"""
LOOKUPS = {  # that the rows use
    "hf_bert": "  qkv: {query: key, key: query, value: value}\n" + EMBEDDINGS,
    "hf_mt5": "  turned: {0: 1, 1: 0}\n  qkv: {q: k, k: q, v: v, o: o}\n  gate: {wi_0: wi_1, wi_1: wi_0, wo: wo}\n",
    "hf_m2m100": (
        "  turned: {1: 2, 2: 1}\n  qkv: {q: k, k: q, v: v, out: out}\n  norm: {self_attn: final, final: self_attn}\n"
    ),
}


REFUSALS = (keymap.DetectionError, keymap.PlanError, keymap.VerifyError)

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS, REFUSALS)
