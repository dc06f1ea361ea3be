"""Every key list belongs to exactly one format; and no module of keymap/ names a format.

``data/key_lists.json.gz`` holds the key lists of real models (transformers, timm, big_vision, Apple's MobileCLIP,
OpenCLIP's 28 layouts and its Hugging Face text towers) with ``{i}`` for an index and the number of axes where it
is known. Here every ``{i}`` becomes 0 and 1, which is enough for evidence.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

import keymap
from keymap.errors import DetectionError
from keymap.language.compile import compile_mapping
from keymap.language.layout import whole
from keymap.source.detect import apply_aliases, claims, detect, matching_keys
from keymap.source.registry import Catalogue, registry
from keymap.source.samples import check_evidence, evidence_faults, samples

ROOT = Path(__file__).parents[2]
KNOWN = registry()
LISTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "key_lists.json.gz").read_bytes()))

# The format of every list; None where no format has these keys: then detection refuses.
# Every list whose name begins with open_clip is the hub's.
OWNERS = {
    "hf_CLIPModel": "hf_clip",
    "hf_CLIPVisionModel": "hf_clip",  # without prefix, as transformers 5 writes it; the next too
    "hf_CLIPTextModel": "hf_clip",
    "hf_CLIPVisionModelWithProjection": "hf_clip",
    "hf_CLIPTextModelWithProjection": "hf_clip",
    "hf_MetaClip2Model": "hf_clip",
    "hf_AltCLIPModel": "hf_altclip",
    "hf_ChineseCLIPModel": "hf_chinese_clip",
    "hf_SiglipModel": "hf_siglip",
    "hf_SiglipVisionModel": "hf_siglip",
    "hf_SiglipTextModel": "hf_siglip",
    "hf_Siglip2Model": "hf_siglip2_naflex",  # hf_siglip's keys, another rank of one kernel
    "timm_vit_base_patch32_clip_224": "timm",
    "timm_vit_base_patch16_siglip_224": "timm",
    "timm_eva02_base_patch16_clip_224": "timm",
    "timm_eva_giant_patch14_clip_224": "timm",
    "timm_vit_pe_core_base_patch16_224": "timm",
    "timm_convnext_base": "timm",
    "timm_convnext_large_mlp": "timm",
    "timm_fastvit_mci1": "timm",
    "timm_vit_base_mci_224": "timm",
    "timm_naflexvit_base_patch16_siglip": "timm",
    "timm_vitamin_small_224": "timm",
    "timm_resnet50_clip": "timm_resnet",
    "big_vision_siglip": "big_vision_siglip",
    "big_vision_siglip_scan": "big_vision_siglip",
    "big_vision_naflex": "big_vision_naflex",  # big_vision_siglip's keys, another rank of one kernel
    "big_vision_lit_tok": "big_vision_lit",
    "apple_mobileclip_s0": "mobileclip_s0",
    "apple_mobileclip_s1": "mobileclip_s",
    "apple_mobileclip_s2": "mobileclip_s",
    "apple_mobileclip_b": "mobileclip_b",
}


def prefixed(name, prefix):
    return {prefix + key: rank for key, rank in LISTS[name].items()}


def flat(*extra):
    return {**LISTS["open_clip clip-flat/native-vit"], **dict.fromkeys(extra, 0)}


def eva(name):
    """EVA-CLIP's own names: the image tower without `trunk`, and other words in its blocks."""
    words = {
        "visual.trunk.": "visual.",
        "attn.q_proj.bias": "attn.q_bias",
        "attn.v_proj.bias": "attn.v_bias",
        "attn.norm.": "attn.inner_attn_ln.",
        "mlp.norm.": "mlp.ffn_ln.",
        "mlp.fc1_g.": "mlp.w1.",
        "mlp.fc1_x.": "mlp.w2.",
    }
    found = {}
    for key, rank in LISTS[name].items():
        for ours, theirs in words.items():
            key = key.replace(ours, theirs)
        found[key.replace("mlp.fc2.", "mlp.w3.") if "split" in name else key] = rank
    return {**found, "visual.rope.freqs_cos": 2} if "split" in name else found


def under(name, prefix, new=""):
    """The keys of a list below a prefix, under another one."""
    return {new + key.removeprefix(prefix): rank for key, rank in LISTS[name].items() if key.startswith(prefix)}


BERT = under("hf_ChineseCLIPModel", "text_model.")
MT5 = "open_clip mt5-base-ViT-B-32"
NLLB = "open_clip nllb-clip-base"


def with_shared(name, prefix=""):
    """An encoder as transformers saves it: its embedding is `shared`; and a key of the decoder."""
    keys = under(name, "text.transformer.", f"{prefix}encoder.")
    keys[f"{prefix}shared.weight"] = keys.pop(f"{prefix}encoder.embed_tokens.weight")
    return {**keys, f"{prefix}decoder.layers.{{i}}.fc1.weight": 2, "lm_head.weight": 2}


def tinyclip(name, module=""):
    towers = {"visual.": f"_image_encoder.{module}", "logit_scale": f"_logit_scale.{module}"}
    return {
        next((new for old, new in towers.items() if key.startswith(old)), f"_text_encoder.{module}") + key: rank
        for key, rank in LISTS[name].items()
    }


def chinese_clip(image):
    """OFA-Sys's own file with the image tower of this list."""
    return {
        **under(image, "visual.", "visual."),
        **{f"bert.{key}": rank for key, rank in BERT.items()},
        "text_projection": 2,
        "logit_scale": 0,
    }


TIMM_VIT = {"visual.cls_token": 3, "visual.patch_embed.proj.weight": 4, "visual.blocks.{i}.attn.qkv.weight": 2}
TIMM_VIT |= {"visual.blocks.{i}.norm1.weight": 1, "visual.pos_embed": 3}

# Lists that differ from a recorded one in a way that is known: (owner, keys)
DERIVED = {
    "CLIPVisionModel, written by transformers 4": ("hf_clip", prefixed("hf_CLIPVisionModel", "vision_model.")),
    "CLIPTextModel, written by transformers 4": ("hf_clip", prefixed("hf_CLIPTextModel", "text_model.")),
    "SiglipVisionModel, written by transformers 4": ("hf_siglip", prefixed("hf_SiglipVisionModel", "vision_model.")),
    "SiglipTextModel, written by transformers 4": ("hf_siglip", prefixed("hf_SiglipTextModel", "text_model.")),
    "big_vision without params/": (
        "big_vision_siglip",
        {key.removeprefix("params/"): rank for key, rank in LISTS["big_vision_siglip"].items()},
    ),
    "Siglip2VisionModel": ("hf_siglip2_naflex", under("hf_Siglip2Model", "vision_model.")),
    "Siglip2VisionModel, written by transformers 4": (
        "hf_siglip2_naflex",
        under("hf_Siglip2Model", "vision_model.", "vision_model."),
    ),
    "Siglip2TextModel": ("hf_siglip", under("hf_Siglip2Model", "text_model.")),
    "Siglip2TextModel, written by transformers 4": (
        "hf_siglip",
        under("hf_Siglip2Model", "text_model.", "text_model."),
    ),
    "big_vision NaFlex without params/": ("big_vision_naflex", under("big_vision_naflex", "params/")),
    "the text tower of NaFlex alone": ("big_vision_siglip", under("big_vision_naflex", "params/txt/", "txt/")),
    "LiT without params/": ("big_vision_lit", under("big_vision_lit_tok", "params/")),
    "LiT with BERT": (
        "big_vision_lit",
        {**under("big_vision_lit_tok", "params/img/", "img/"), "txt/BertEncoder_0/embedder/word/embedding": 2, "t": 1},
    ),
    "LiT of vit_jax": (
        "big_vision_lit",
        {
            key.replace("img/pos_embedding", "img/Transformer/posembed_input/pos_embedding"): rank
            for key, rank in under("big_vision_lit_tok", "params/").items()
        },
    ),
    "the text tower of LiT alone": ("big_vision_siglip", under("big_vision_lit_tok", "params/txt/", "txt/")),
    "timm's NaFlexVit with class token": (
        "timm",
        {**LISTS["timm_naflexvit_base_patch16_siglip"], "embeds.cls_token": 3, "norm_pre.weight": 1, "head.weight": 2},
    ),
    "OpenCLIP with a NaFlexVit": (
        "open_clip",
        {f"visual.trunk.{key}": rank for key, rank in LISTS["timm_naflexvit_base_patch16_siglip"].items()},
    ),
    "Long-CLIP": ("longclip", {**flat(), "positional_embedding_res": 2}),
    "TinyCLIP": ("tinyclip", tinyclip("open_clip clip-flat/native-vit")),
    "TinyCLIP, each tower wrapped": ("tinyclip", tinyclip("open_clip clip-flat/native-vit", "module.")),
    "TinyCLIP with a ResNet": ("tinyclip", tinyclip("open_clip clip-flat/native-resnet")),
    "Chinese-CLIP": ("chinese_clip", chinese_clip("open_clip clip-flat/native-vit")),
    "Chinese-CLIP with a ResNet": ("chinese_clip", chinese_clip("open_clip clip-flat/native-resnet")),
    "AltCLIPModel, written by transformers 5": (
        "hf_altclip",
        {key.replace(".layers.", ".layer."): rank for key, rank in LISTS["hf_AltCLIPModel"].items()},
    ),
    "AltCLIPTextModel": ("hf_altclip", under("hf_AltCLIPModel", "text_model.")),
    "ChineseCLIPVisionModel": ("hf_clip", under("hf_ChineseCLIPModel", "vision_model.")),
    "ChineseCLIPTextModel, BertModel, RobertaModel": ("hf_bert", {**BERT, "pooler.dense.weight": 2}),
    "BertForMaskedLM": ("hf_bert", {**{f"bert.{k}": n for k, n in BERT.items()}, "cls.predictions.bias": 1}),
    "RobertaForMaskedLM": ("hf_bert", {**{f"roberta.{k}": n for k, n in BERT.items()}, "lm_head.bias": 1}),
    "MT5ForConditionalGeneration": ("hf_mt5", with_shared(MT5)),
    "M2M100Model": ("hf_m2m100", with_shared(NLLB)),
    "M2M100ForConditionalGeneration": ("hf_m2m100", with_shared(NLLB, "model.")),
    "a BERT tower of OpenCLIP, saved alone": ("open_clip", {f"transformer.{k}": n for k, n in BERT.items()}),
    "OpenAI": ("openai", flat("input_resolution", "context_length", "vocab_size")),
    "OpenAI without its three numbers is OpenCLIP's CLIP": ("open_clip", flat()),
    "Perception Encoder": ("pe_core", flat("visual.attn_pool.probe")),
    "EVA-CLIP, EVA02 B and L": ("eva_clip", eva("open_clip custom/timm-eva02(split qkv,swiglu)/text-native")),
    "EVA-CLIP, EVA01 and EVA02 E": (
        "eva_clip",
        eva("open_clip custom/timm-eva01/E(fused qkv,q_bias,v_bias)/text-native"),
    ),
    "SLIP": ("slip", {**TIMM_VIT, **flat(), "image_projection": 2}),
    "MERU's baseline": (
        "meru",
        {**TIMM_VIT, "textual.posit_embed": 2, "textual.token_embed.weight": 2, "visual_proj.weight": 2},
    ),
    "Wan's CLIP": ("wan_clip", {"visual.cls_embedding": 3, "visual.head": 2, "textual.type_embedding.weight": 2}),
    "FlaxCLIPModel": (
        "hf_flax_clip",
        {"vision_model.pre_layrnorm.scale": 1, "text_model.final_layer_norm.scale": 1, "logit_scale": 1},
    ),
    "SiglipVisionModel without head": (
        "hf_siglip",
        {k: n for k, n in prefixed("hf_SiglipVisionModel", "vision_model.").items() if ".head." not in k},
    ),
    "MobileCLIP-B's text tower alone": (
        "mobileclip_text",
        {key: rank for key, rank in LISTS["apple_mobileclip_b"].items() if key.startswith("text_encoder.")},
    ),
    "MobileCLIP-S0's image tower alone": (
        "mobileclip_s",  # without the text tower it is no other file than S1's and S2's
        {key: rank for key, rank in LISTS["apple_mobileclip_s0"].items() if key.startswith("image_encoder.")},
    ),
}
ROWS = {
    **{name: ("open_clip" if name.startswith("open_clip") else OWNERS[name], keys) for name, keys in LISTS.items()},
    **DERIVED,
}


def layouts(keys):
    found = {}
    for key, rank in keys.items():
        parts = key.split("{i}")
        for numbers in product("01", repeat=len(parts) - 1):
            name = "".join(text + number for text, number in zip(parts, (*numbers, ""), strict=True))
            found[name] = whole(name, (2,) * (2 if rank is None else rank), torch.float32)
    return found


@pytest.mark.parametrize("name", [pytest.param(row, marks=pytest.mark.formats(ROWS[row][0])) for row in ROWS])
def test_a_key_list_has_its_one_owner(name):
    owner, keys = ROWS[name]
    tensors = layouts({key.removeprefix("params/"): rank for key, rank in keys.items()})  # the prefix is stripped first
    claiming = [m.name for m in KNOWN.formats if matching_keys(m.detect, apply_aliases(m, tensors, {})[0]) is not None]
    assert claiming == ([] if owner is None else [owner])
    if owner is None:
        with pytest.raises(DetectionError, match="no known format has these keys"):
            detect(KNOWN, tensors)
    else:
        assert detect(KNOWN, tensors).mapping.name == owner


def test_the_table_of_owners_lists_what_is_recorded_and_every_format():
    assert set(OWNERS) == {name for name in LISTS if not name.startswith("open_clip")}
    with_config = {"hf_vision_text_dual_encoder"}  # config.json tells it from hf_chinese_clip
    assert {m.name for m in KNOWN.formats} - with_config == {owner for owner, _ in ROWS.values()} - {None}


def test_no_format_claims_the_sample_of_another():
    """What a schema cannot check; for a file that is registered later, registering checks it."""
    assert list(evidence_faults(KNOWN)) == []


@pytest.mark.parametrize("name", [m.name for m in KNOWN.formats])
def test_a_format_claims_its_own_samples(name):
    mapping = KNOWN.get(name)
    made = list(samples(mapping, KNOWN))
    assert len(made) >= 1 + len(mapping.variants)
    for sample in made:
        tensors = {key: whole(key, shape, torch.float32) for key, shape in sample.shapes.items()}
        found = [found.mapping.name for found in claims(KNOWN, tensors)]
        distinguished = mapping.config.distinguishes if mapping.config is not None else ()
        assert [other for other in found if other not in distinguished] == [name]


# --- evidence that is too wide or too narrow is refused when a file is registered ---

GREEDY = """format: greedy
title: claims what is not its own
reference: example 1.0
layouts: {image: native_vit}
detect:
  any: [my.weight, CLUE]
towers:
  image:
    my.(weight|bias): visual.ln_pre.\\1
"""


def registered(folder, text, name):
    """The shipped files and one more, in a registry of its own."""
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    known = Catalogue(dict(KNOWN.mappings), dict(KNOWN.files))
    return known.add([file], check=check_evidence)


@pytest.mark.parametrize(
    ("clue", "owner"),
    [
        ("vision_model.embeddings.class_embedding", "hf_clip"),
        ("text_model.final_layer_norm.weight", "hf_clip"),  # its text tower alone
        ("vision_model.head.probe", "hf_siglip"),
        ("txt/Embed_0/embedding", "big_vision_siglip"),
        ("stem.conv1.conv.weight", "timm_resnet"),
        ("embeds.proj.weight", "timm"),
        ("visual.trunk.(.+)", "open_clip"),
        ("vocab_size", "openai"),
    ],
)
def test_a_file_that_claims_the_files_of_another_is_not_registered(clue, owner, tmp_path):
    with pytest.raises(keymap.MappingError) as caught:
        registered(tmp_path, GREEDY.replace("CLUE", clue), "greedy")
    fault = next(f for f in caught.value.faults if f"keys of {owner}" in f)
    assert KNOWN.get(owner).file in fault and "greedy.yaml" in fault
    assert "greedy by " in fault and f"{owner} by " in fault


def test_a_copy_of_a_format_under_another_name_is_not_registered_but_used_by_its_path(tmp_path):
    text = (ROOT / "mappings" / "open_clip" / "hf_clip.yaml").read_text(encoding="utf-8")
    with pytest.raises(keymap.MappingError, match=r"hf_clip.yaml.*copy.yaml|copy.yaml.*hf_clip.yaml"):
        registered(tmp_path, text.replace("format: hf_clip", "format: copy"), "copy")
    tensors = {"logit_scale": torch.ones(())}
    assert keymap.convert_state_dict(tensors, to="open_clip", mapping=tmp_path / "copy.yaml") == tensors


def test_a_file_that_does_not_claim_its_own_keys_is_not_registered(tmp_path):
    text = GREEDY.replace(", CLUE", "").replace("towers:", "  none: [my.bias]\ntowers:", 1)
    with pytest.raises(keymap.MappingError, match=r"greedy.yaml:5:1: detect does not match the format's own keys"):
        registered(tmp_path, text, "greedy")


def test_narrow_evidence_is_registered(tmp_path):
    (added,) = registered(tmp_path, GREEDY.replace(", CLUE", ""), "greedy")
    assert added.name == "greedy"
    assert "greedy" not in keymap.list_formats()


# --- no module knows a format by name ---

# Parts of keys that are also words of the code, for what they mean in English or in torch.
ENGLISH = {
    "bias",
    "block",
    "blocks",
    "dense",
    "embedding",
    "embeddings",
    "head",
    "identity",
    "key",
    "layers",
    "model",
    "module",
    "out",
    "self",
    "shared",
    "stem",
    "text",
    "value",
    "weight",
}


@cache
def known_words():
    """Names of formats and parts of keys, from the mappings alone."""
    names = {m.name for m in KNOWN.formats} | {m.name for m in KNOWN.mappings.values() if m.kind == "bridge"}
    parts = {layout for entries in KNOWN.hub.layouts.values() for layout in entries if "_" in layout}
    for mapping in KNOWN.mappings.values():
        rules = [*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)]
        for rule in (*rules, *(rule for block in mapping.aliases for rule in block.table.rules)):
            for side in (rule.source, *rule.targets):
                texts = [t if isinstance(t, str) else " ".join(s for _, s in t.options) for t in side.tokens]
                parts |= {part for text in texts for part in re.split(r"[^A-Za-z0-9_]+", text)}
    return names, {part for part in parts if len(part) > 1 and not part.isdigit()} - ENGLISH


def words_of(code: str):
    """Words of names and strings of a module; docstrings and comments are not searched."""
    tree = ast.parse(code)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from ((line, word) for word in re.split(r"[^A-Za-z0-9_]+", node.value))
        elif isinstance(node, (ast.Name, ast.Attribute, ast.arg, ast.FunctionDef)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None) or node.arg
            yield line, name


@pytest.mark.parametrize("file", sorted((ROOT / "keymap").rglob("*.py")), ids=lambda file: file.name)
def test_no_module_knows_a_format_by_name(file):
    names, parts = known_words()
    library = {"open_clip"} if file.name in ("targets.py", "open_clip.py") else set()  # they call the package
    words = (names | parts) - library
    found = [(line, word) for line, word in words_of(file.read_text(encoding="utf-8")) if word in words]
    assert found == [], f"{file.name} knows {found}: that belongs into a mapping"


def test_the_search_for_names_can_fail():
    names, parts = known_words()
    assert {"hf_clip", "openai", "timm"} <= names
    assert {"resblocks", "encoderblock_", "vision_model", "in_proj_", "visual", "trunk", "attn_pool"} <= parts
    found = {word for _, word in words_of('"""timm"""\nif name == "hf_clip":  # openai\n    key = f"visual.{name}"\n')}
    assert {"hf_clip", "visual"} <= found and not {"timm", "openai"} & found


def test_a_mapping_compiles_without_the_others():
    """Files know each other by `uses` alone."""
    for mapping in KNOWN.mappings.values():
        marked = KNOWN.files[mapping.name]
        wanted = set(marked.data.get("uses", ()))
        text = KNOWN.places[mapping.name].read_text(encoding="utf-8")
        again = compile_mapping(
            text, mapping.file, lambda name, allowed=wanted: KNOWN.files[name] if name in allowed else None
        )
        assert [rule.text for rule in again.rules] == [rule.text for rule in mapping.rules]


@pytest.mark.parametrize("file", sorted((ROOT / "mappings").rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_mapping_is_short_and_names_its_schema(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    up = "../" * len(file.relative_to(ROOT).parents[1:])
    assert lines[0] == f"# yaml-language-server: $schema={up}schemas/mapping.schema.json"
