"""A name goes where the tensor of that name goes; a module where its parameters go."""

from __future__ import annotations

import pytest
from peers import hf, openclip

import keymap


def names(found):
    return (found,) if isinstance(found, str) else found


MODELS = {
    "hf_clip": openclip.clip,
    "openai": openclip.clip,
    "open_clip": openclip.clip,
    "open_clip_flat": openclip.custom,
    "hf_flax_clip": openclip.clip,
    "hf_siglip": openclip.siglip,
    "big_vision_siglip": openclip.siglip,
}


@pytest.mark.parametrize("form", MODELS)
def test_the_names_are_those_of_a_conversion(form):
    """Both ways: every key of the converted state dict, and no other."""
    model = MODELS[form](seed=1)
    state = model.state_dict()
    facts = {}
    if form == "big_vision_siglip":
        facts["image.heads"] = model.visual.trunk.blocks[0].attn.num_heads
        facts["text.heads"] = model.text.transformer.resblocks[0].attn.num_heads
    converted = keymap.convert_state_dict(state, form, facts=facts)
    there = [name for key in state for name in names(keymap.map_key(key, "open_clip", form))]
    constants = {"input_resolution", "context_length", "vocab_size"}
    assert set(there) == converted.keys() - constants
    if form.startswith("open_clip"):
        return
    back = {name for key in converted for name in names(keymap.map_key(key, form, "open_clip"))}
    assert back == keymap.convert_state_dict(state, "open_clip").keys()


CASES = [
    ("visual.transformer.resblocks.3.mlp.c_fc", "openai", "hf_clip", "vision_model.encoder.layers.3.mlp.fc1"),
    ("transformer.resblocks.3.attn.out_proj", "openai", "hf_clip", "text_model.encoder.layers.3.self_attn.out_proj"),
    ("transformer.resblocks.3", "open_clip", "hf_clip", "text_model.encoder.layers.3"),
    ("visual.transformer.resblocks.11", "openai", "hf_clip", "vision_model.encoder.layers.11"),
    ("visual.transformer.resblocks.3.attn", "openai", "hf_clip", "vision_model.encoder.layers.3.self_attn"),
    ("visual.transformer.resblocks", "openai", "hf_clip", "vision_model.encoder.layers"),
    ("visual.conv1", "openai", "hf_clip", "vision_model.embeddings.patch_embedding"),
    ("token_embedding", "openai", "hf_clip", "text_model.embeddings.token_embedding"),
    ("visual.proj", "openai", "hf_clip", "visual_projection.weight"),
    ("logit_scale", "openai", "hf_clip", "logit_scale"),
    ("transformer.resblocks.3.mlp.c_fc", "openai", "open_clip", "text.transformer.resblocks.3.mlp.c_fc"),
    ("transformer.resblocks.3.mlp.c_fc", "open_clip", "hf_clip", "text_model.encoder.layers.3.mlp.fc1"),
    ("text.transformer.resblocks.3.mlp.c_fc", "open_clip", "hf_clip", "text_model.encoder.layers.3.mlp.fc1"),
    ("text.transformer.resblocks.3.mlp.c_fc", "open_clip", "open_clip_flat", "transformer.resblocks.3.mlp.c_fc"),
    ("visual.trunk.blocks.3.attn.proj", "open_clip", "hf_clip", "vision_model.encoder.layers.3.self_attn.out_proj"),
    ("visual.trunk.blocks.3", "open_clip", "timm", "blocks.3"),
    ("blocks.3", "timm", "hf_clip", "vision_model.encoder.layers.3"),
    ("vision_model.encoder.layers.3", "hf_clip", "timm", "blocks.3"),
    ("img/Transformer/encoderblock_3", "big_vision_siglip", "hf_siglip", "vision_model.encoder.layers.3"),
    ("vision_model.encoder.layers.3", "hf_siglip", "big_vision_siglip", "img/Transformer/encoderblock_3"),
    ("visual.layer1.0.conv1", "openai", "open_clip", "visual.layer1.0.conv1"),
]


@pytest.mark.parametrize(("name", "source", "to", "wanted"), CASES)
def test_names_of_modules(name, source, to, wanted):
    assert keymap.map_key(name, source, to) == wanted


def test_every_module_that_has_parameters_is_one_in_the_other_library():
    """transformers' own modules: a linear layer, a norm, an embedding has the name that its weight shows."""
    there = dict(hf.clip(seed=1).named_modules())
    for name, module in openclip.clip(seed=1).named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own not in (["weight", "bias"], ["weight"]) or not name:
            continue
        found = keymap.map_key(name, "open_clip", "hf_clip")
        assert isinstance(found, str) and found in there, name
        assert [key for key, _ in there[found].named_parameters(recurse=False)] == own


def test_a_name_that_is_cut_into_several_gives_them_in_order():
    block, layer = "visual.transformer.resblocks.3.attn.in_proj_", "vision_model.encoder.layers.3.self_attn."
    for part in ("weight", "bias"):
        wanted = tuple(f"{layer}{x}_proj.{part}" for x in "qkv")
        assert keymap.map_key(f"{block}{part}", "openai", "hf_clip") == wanted
        assert {keymap.map_key(name, "hf_clip", "openai") for name in wanted} == {f"{block}{part}"}


def test_a_module_that_is_a_part_of_another_gives_its_parameters():
    found = keymap.map_key("vision_model.encoder.layers.3.self_attn.q_proj", "hf_clip", "openai")
    block = "visual.transformer.resblocks.3.attn.in_proj_"
    assert set(found) == {f"{block}weight", f"{block}bias"}


@pytest.mark.parametrize(
    ("name", "source", "to"),
    [
        ("input_resolution", "openai", "hf_clip"),
        ("vision_model.embeddings.position_ids", "hf_clip", "openai"),
        ("attn_mask", "open_clip", "hf_clip"),
        ("logit_bias", "hf_siglip", "openai"),
    ],
)
def test_a_name_without_a_place_gives_none(name, source, to):
    assert keymap.map_key(name, source, to) == ()


@pytest.mark.parametrize("source", ["openai", "open_clip"])
def test_a_misspelt_name_is_refused_with_near_ones(source):
    name = "visual.transformer.resblocks.3.atn.out_proj"
    with pytest.raises(keymap.PlanError, match=r"visual\.transformer\.resblocks\.0\.attn\.out_proj"):
        keymap.map_key(name, source, "hf_clip")


def test_a_whole_tower_that_is_no_module_is_refused_in_words():
    with pytest.raises(keymap.PlanError, match=r"is not one module in hf_clip: its keys become .*visual_projection"):
        keymap.map_key("visual", "openai", "hf_clip")


def test_unknown_formats_are_refused_with_near_ones():
    with pytest.raises(keymap.MappingError, match="hf_clip"):
        keymap.map_key("logit_scale", "hf_klip", "openai")
    with pytest.raises(keymap.MappingError, match="hf_clip"):
        keymap.map_key("logit_scale", "openai", "hf_clpi")
    with pytest.raises(keymap.MappingError, match="bridge"):
        keymap.map_key("logit_scale", "open_clip_flat", "openai")


@pytest.mark.parametrize(
    "arguments",
    [
        (3, "openai", "hf_clip"),
        ("", "openai", "hf_clip"),
        ("x" * 9999, "openai", "hf_clip"),
        ("x", None, "hf_clip"),
        ("x", 3, "hf_clip"),
        ("x", "openai", None),
        ("a\0b", "openai", "hf_clip"),
    ],
)
def test_arguments_that_are_no_names_are_refused(arguments):
    with pytest.raises(keymap.KeymapError):
        keymap.map_key(*arguments)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("vit.encoder.layer.3.attention.attention.query.weight", "blocks.3.attn.qkv.weight"),
        ("deit.encoder.layer.3.attention", "blocks.3.attn"),
        ("vit.layers.3.attention.q_proj.bias", "blocks.3.attn.qkv.bias"),
        ("vit.layers.3.attention.q_proj", "blocks.3.attn.qkv"),
        ("layers.3.mlp.fc1", "blocks.3.mlp.fc1"),
        ("layers.3.layernorm_before", "blocks.3.norm1"),
    ],
)
def test_names_that_a_format_reads_by_its_aliases_are_mapped(name, there):
    assert keymap.map_key(name, "hf_vit", "vision_transformer") == there


@pytest.mark.parametrize(
    ("name", "source", "to", "there"),
    [
        ("layers.3.self_attn.o_proj.weight", "phi3", "internlm2", "model.layers.3.attention.wo.weight"),
        ("layers.3.mlp.down_proj", "phi3", "llama", "model.layers.3.mlp.down_proj"),
        ("tok_embeddings.weight", "internlm2", "phi3", "model.embed_tokens.weight"),
    ],
)
def test_names_that_a_format_reads_by_the_aliases_of_some_files_are_mapped(name, source, to, there):
    assert keymap.map_key(name, source, to) == there


def test_a_name_that_aliases_of_some_files_read_in_two_ways_is_refused(tmp_path):
    rules = "towers:\n  model:\n    a.(.+): x.\\1\n    b.(.+): y.\\1\n"
    aliases = "aliases:\n  - when: {all: [m]}\n    w: a.w\n  - when: {all: [n]}\n    w: b.w\n"
    file = tmp_path / "two.yaml"
    file.write_text(f"format: two\nhub: any\ntitle: t\n{aliases}{rules}", encoding="utf-8")
    with pytest.raises(keymap.PlanError, match=r"only a file shows what 'w' of two is: x\.w or y\.w"):
        keymap.map_key("w", file, "any")
    assert keymap.map_key("b.w", file, "any") == "y.w"


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
@pytest.mark.parametrize(("source", "to"), [("gpt2", "nanogpt"), ("nanogpt", "gpt2")])
def test_the_names_of_tied_weights_are_those_of_one_tensor(name, source, to):
    assert set(keymap.map_key(name, source, to)) == {"lm_head.weight", "transformer.wte.weight"}
