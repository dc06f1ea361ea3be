"""What the weights do not show and a folder's owner needs is asked for, for every format that writes a folder."""

from __future__ import annotations

import json

import open_clip
import pytest
from open_clip.hf_model import MeanPooler
from peers import full_size, naflex, openclip

import keymap
from keymap.plan.export import export, only_reading, target_format
from keymap.plan.repository import repository_files
from keymap.plan.request import request_for_towers
from keymap.source.hubs import ask
from keymap.source.open import open_source
from keymap.source.registry import registry

BARE = {  # the format of the folder: a model, and every setting of it that a file without a configuration leaves open
    "hf_clip": (
        openclip.clip,
        "image.heads image.activation image.eps image.pool text.heads text.activation text.eps text.pool text.causal",
    ),
    "hf_siglip": (
        openclip.siglip,
        "image.heads image.pool_heads image.activation image.eps text.heads text.activation text.eps text.pool "
        "text.causal",
    ),
    "hf_siglip2_naflex": (
        naflex.model,
        "image.heads image.pool_heads image.activation image.eps text.heads text.activation text.eps text.pool "
        "text.causal",
    ),
    "hf_chinese_clip": (
        lambda: openclip.hf_text(family="bert", pooler="cls_last_hidden_state_pooler", proj="linear"),
        "image.heads image.activation image.eps image.pool text.hf_heads text.hf_activation text.hf_eps text.hf_pool "
        "text.hf_causal text.hf_family text.pad",
    ),
    "hf_vision_text_dual_encoder": (
        lambda: openclip.hf_text(family="bert", pooler="cls_pooler", proj="linear"),
        "image.heads image.activation image.eps image.pool text.hf_heads text.hf_activation text.hf_eps text.hf_pool "
        "text.hf_causal text.hf_family text.pad",
    ),
    "hf_bert": (
        lambda: openclip.hf_text(family="bert", proj=None, text_width=24),
        "text.hf_heads text.hf_activation text.hf_eps text.hf_causal text.hf_family text.pad",
    ),
    "hf_mt5": (
        lambda: openclip.hf_text(family="mt5", proj=None, text_width=24),
        "text.hf_activation text.hf_eps text.hf_distance text.pad",
    ),
    "timm": (openclip.siglip, "image.architecture image.pool image.size"),
    "open_clip": (
        openclip.clip,
        "image.head_width image.activation image.eps image.pool image.ln_after_pool text.heads text.activation "
        "text.eps text.pool text.eos text.causal",
    ),
}
TOWERS = {"hf_bert": "text", "hf_mt5": "text", "timm": "image"}


def asked(error):
    """The names of the settings that an error asks for."""
    named = error.faults[-1].removeprefix("neither shapes nor a configuration show ")
    return {part.partition(":")[0] for part in named.split("; ")[:-1]}


@pytest.mark.parametrize("form", BARE)
def test_what_neither_the_weights_nor_the_format_show_is_asked_for(form, tmp_path):
    build, names = BARE[form]
    model, towers = build(), TOWERS.get(form)
    keymap.save_checkpoint(model, tmp_path / "bare.safetensors", "open_clip")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "out", form, towers=towers)
    assert asked(caught.value) == set(names.split())
    assert not (tmp_path / "out").exists()


def test_every_format_with_a_folder_is_asked():
    folders = {mapping.name for mapping in registry().formats if mapping.repository and not mapping.repository.none}
    assert folders == BARE.keys()


@pytest.mark.parametrize(("form", "pool"), [("hf_clip", "eos"), ("open_clip", "eos")])
def test_the_end_token_is_asked_for_where_the_text_is_pooled_at_it(form, pool, tmp_path):
    keymap.save_checkpoint(openclip.clip(), tmp_path / "bare.safetensors", "open_clip")
    facts = {"image.pool": "tok", "text.pool": pool, "text.causal": True, "image.heads": 3, "text.heads": 4}
    facts |= {
        f"{tower}.{name}": v for tower in ("image", "text") for name, v in {"activation": "gelu", "eps": 1e-5}.items()
    }
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "out", form, facts=facts)
    assert asked(caught.value) == {"text.eos"}


def test_a_tower_that_is_not_written_is_not_asked_about(tmp_path):
    model = openclip.clip(text={"no_causal_mask": True, "pool_type": "last"})
    keymap.save_checkpoint(model, tmp_path / "out", "hf_clip", towers=("image",))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 3


UNLIKE = {  # the format, and a model with one setting that the format's code has another value for
    "positions that count from the padding id": (
        "hf_chinese_clip",
        lambda: openclip.hf_text(family="roberta", pooler="cls_last_hidden_state_pooler", proj="linear"),
        "text.hf_family",
    ),
    "another pooling of the text": (
        "hf_vision_text_dual_encoder",
        lambda: with_mean_pooler(openclip.hf_text(family="bert", pooler="cls_pooler", proj="linear")),
        "pooling of the text tower: mean_pooler",
    ),
    "heads of the pooling": (
        "hf_siglip",
        lambda: with_pool_heads(openclip.siglip()),
        "image.heads and image.pool_heads",
    ),
    "average pooling": (
        "hf_clip",
        lambda: openclip.clip(vision={"pool_type": "avg"}),
        "pooling of the image tower: avg",
    ),
}


def with_mean_pooler(model):
    model.text.pooler = MeanPooler()
    return model


def with_pool_heads(model):
    model.visual.trunk.attn_pool.num_heads = 4
    return model


@pytest.mark.parametrize("name", UNLIKE)
def test_a_setting_that_the_owners_code_lacks_is_refused(name, tmp_path):
    form, build, message = UNLIKE[name]
    with pytest.raises(keymap.PlanError, match=message):
        keymap.save_checkpoint(build(), tmp_path / "out", form)


@pytest.mark.parametrize(
    ("form", "build", "tower", "why"),
    [
        (
            "hf_m2m100",
            lambda: openclip.hf_text(family="m2m_100", proj=None, text_width=24),
            "text",
            "without its decoder",
        ),
        ("hf_altclip", openclip.clip, "image", "AltCLIP's text tower"),
        ("openai", openclip.clip, "image", "has no layout of a folder; pass a file"),
    ],
)
def test_a_format_without_a_folder_says_why(form, build, tower, why, tmp_path):
    with pytest.raises(keymap.PlanError, match=why):
        keymap.save_checkpoint(build(), tmp_path / "out", form, towers=(tower,))
    assert not (tmp_path / "out").exists()


# --- the names of towers ---


def folder_of(name, tmp_path, given):
    """The configuration that keymap would write for a full-size file of one of OpenCLIP's configurations."""
    path = full_size.sparse_file(tmp_path / "x.safetensors", full_size.model(name).state_dict())
    opened = open_source(path, True, ask(), None)
    known = opened.known
    planned = export(only_reading(opened), target_format(known, "open_clip"), request_for_towers(None, known.hub), {})
    texts, notes = repository_files(planned, given)
    return json.loads(texts["open_clip_config.json"])["model_cfg"], notes


def test_a_file_that_fits_one_recorded_configuration_has_its_names(tmp_path):
    text = {
        "text.activation": "gelu_tanh",
        "text.eps": 1e-6,
        "text.heads": 12,
        "text.pool": "last",
        "text.causal": False,
    }
    written, notes = folder_of("ViT-B-16-SigLIP-384", tmp_path, {"image.pool": "map", **text})
    shipped = open_clip.get_model_config("ViT-B-16-SigLIP-384")
    for name in ("timm_model_name", "timm_pool", "timm_proj", "image_size"):
        assert written["vision_cfg"][name] == shipped["vision_cfg"][name]
    assert written["text_cfg"]["hf_tokenizer_name"] == shipped["text_cfg"]["hf_tokenizer_name"]
    assert written["embed_dim"] == shipped["embed_dim"]
    assert notes[0].startswith(
        "image.architecture = vit_base_patch16_siglip_384, as in the configuration of these sizes: ViT-B"
    )


def test_a_file_that_fits_no_recorded_configuration_is_asked_for_names(tmp_path):
    keymap.save_checkpoint(openclip.siglip(), tmp_path / "bare.safetensors", "open_clip")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "out", "open_clip")
    assert {"image.architecture", "image.size"} < asked(caught.value)
    keymap.save_checkpoint(openclip.hf_text(family="bert"), tmp_path / "hf.safetensors", "open_clip")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_checkpoint(tmp_path / "hf.safetensors", tmp_path / "out", "open_clip")
    assert {"text.hf_name", "text.hf_pool"} < asked(caught.value)
