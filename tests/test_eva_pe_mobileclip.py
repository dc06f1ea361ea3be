"""EVA-CLIP, Perception Encoder and MobileCLIP: their own files load into OpenCLIP's models, and compute the same.

EVA-CLIP and PE-Core are compared with forward passes written in plain torch from their own names, and bit for bit
with timm's converter and with conversions written by hand; MobileCLIP bit for bit with open_clip's converter, on the
full key lists of Apple's four models at their real shapes.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from open_clip.convert import convert_state_dict as open_clip_convert
from peers import eva_clip, mobileclip, openclip, perception
from peers.common import SQUARE, Size, assert_unchanged, bits, images, max_diff, same_bits, tokens
from safetensors.torch import save_file
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

import keymap
from keymap.language.layout import whole
from keymap.plan.to_hub import bring_to_layouts, to_hub
from keymap.source.detect import detect
from keymap.source.registry import registry

LIMIT = 2e-5
SIZES = {"distinct": {}, "square": SQUARE, "not a square image": {"image_size": (28, 42)}}
State = dict[str, Tensor]


@pytest.fixture(params=SIZES, ids=list(SIZES))
def sizes(request):
    return SIZES[request.param]


@pytest.fixture
def pt(tmp_path):
    """Save anything with torch; gives the path."""

    def save(content: object) -> Path:
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return save


def assert_holds(model: nn.Module, expected: State) -> None:
    """Every tensor of the model, bit for bit."""
    state = model.state_dict()
    assert set(state) == set(expected)
    assert [key for key, value in expected.items() if not same_bits(value.contiguous(), state[key])] == []


def refused(model: nn.Module, path: Path, error: type[keymap.KeymapError], *words: str, **options: object) -> None:
    before = bits(model)
    with pytest.raises(error) as caught:
        keymap.load_checkpoint(model, path, **options)
    assert_unchanged(model, before)
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert [word for word in words if word not in message] == [], message


def grid(sizes: dict[str, object]) -> tuple[int, int] | None:
    """A grid that is not square no file tells."""
    size = Size(**sizes)
    return None if isinstance(size.image_size, int) else tuple(side // size.patch for side in size.image_hw)


def complete(result: keymap.LoadResult, name: str) -> None:
    assert (result.report.plan.format, result.missing_keys, result.unexpected_keys) == (name, [], [])


# What a training script puts around a state dict
AROUND = {
    "nothing": lambda state: state,
    "state_dict, module.": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "weights": lambda state: {"weights": state},
    "module": lambda state: {"module": state},
}


# --- EVA-CLIP ---


def eva_by_hand(source: State, kind: str) -> State:
    """EVA-CLIP's names -> open_clip's, key by key."""
    words = {"inner_attn_ln": "norm", "ffn_ln": "norm", "w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
    found = {}
    for key, value in source.items():
        if ".rope." in key:
            continue
        parts = key.split(".")
        if parts[0] == "visual":
            parts = ["visual", "trunk", *(words.get(part, part) for part in parts[1:])]
            if kind == "EVA02" and parts[-1] in ("q_bias", "v_bias"):
                parts[-1:] = [f"{parts[-1][0]}_proj", "bias"]
        found[".".join(parts)] = value
    return found


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_computes_what_eva_clip_computes(kind, sizes, pt, proves):
    texts = openclip.custom(seed=3, **sizes)
    source = eva_clip.state_dict(kind, text_of=texts, **sizes)
    model = eva_clip.model(kind, seed=5, **sizes)
    result = keymap.load_checkpoint(model, pt(source), source_grid=grid(sizes))
    complete(result, "eva_clip")
    dropped = {key for key in source if ".rope." in key}
    assert set(result.report.plan.dropped) == dropped
    assert len(dropped) == (2 + 2 * Size(**sizes).image_depth if kind == "EVA02" else 0)
    side, ids = Size(**sizes).image_hw, tokens()
    expected = eva_clip.image_features(source, kind, images(side), **sizes)
    with torch.no_grad():
        assert max_diff(model.encode_image(images(side)), expected) <= LIMIT
        assert max_diff(model.encode_text(ids), texts.encode_text(ids)) <= LIMIT
    assert float(expected.abs().max()) > 0.1
    assert_holds(model, eva_by_hand(source, kind))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_equals_timms_own_conversion(kind, sizes, pt):
    source = eva_clip.state_dict(kind, **sizes)
    model = eva_clip.model(kind, seed=5, **sizes)
    keymap.load_checkpoint(model, pt(source), source_grid=grid(sizes))
    expected = checkpoint_filter_fn(dict(source), eva_clip.model(kind, seed=6, **sizes).visual.trunk)
    assert_holds(model.visual.trunk, expected)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_in_half_precision_and_in_wrappers_loads(kind, around, pt):
    source = {key: value.half() for key, value in eva_clip.state_dict(kind).items()}
    model = eva_clip.model(kind, seed=5)
    complete(keymap.load_checkpoint(model, pt(AROUND[around](source))), "eva_clip")
    assert_holds(model, {key: value.float() for key, value in eva_by_hand(source, kind).items()})


@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_goes_there_and_back(kind):
    source = eva_clip.state_dict(kind)
    held = keymap.convert_state_dict(source, to="open_clip")
    again = keymap.convert_state_dict(held, to="eva_clip")
    kept = {key: value for key, value in source.items() if ".rope." not in key}
    assert set(held) == set(eva_clip.model(kind).state_dict())
    assert set(again) == set(kept) and all(same_bits(again[key], kept[key]) for key in kept)


def test_a_logit_scale_of_the_text_tower_moves_and_a_second_one_must_be_equal(pt):
    source = eva_clip.state_dict("EVA02")
    moved = {"text.logit_scale" if key == "logit_scale" else key: value for key, value in source.items()}
    model = eva_clip.model("EVA02", seed=5)
    complete(keymap.load_checkpoint(model, pt(moved)), "eva_clip")
    assert_holds(model, eva_by_hand(source, "EVA02"))
    model = eva_clip.model("EVA02", seed=5)
    result = keymap.load_checkpoint(model, pt({**source, "text.logit_scale": source["logit_scale"].clone()}))
    assert "text.logit_scale" in result.report.plan.dropped
    assert_holds(model, eva_by_hand(source, "EVA02"))
    other = {**source, "text.logit_scale": source["logit_scale"] + 1}
    refused(eva_clip.model("EVA02", seed=5), pt(other), keymap.VerifyError, "text.logit_scale")


def test_an_eva_clip_file_with_a_flat_text_tower_loads(pt):
    """As its files were before CustomCLIP; eva_clip's own loader moves these keys too."""
    source = eva_clip.state_dict("EVA01")
    old = {key.removeprefix("text."): value for key, value in source.items()}
    model = eva_clip.model("EVA01", seed=5)
    complete(keymap.load_checkpoint(model, pt(old)), "eva_clip")
    assert_holds(model, eva_by_hand(source, "EVA01"))


@pytest.mark.parametrize("part", ["freqs_cos", "freqs_sin"])
def test_a_rotary_table_that_is_no_copy_is_not_dropped(part, pt):
    source = eva_clip.state_dict("EVA02")
    source[f"visual.blocks.1.attn.rope.{part}"][3, 2] += 1e-3
    key = f"visual.blocks.1.attn.rope.{part}"
    refused(eva_clip.model("EVA02", seed=5), pt(source), keymap.VerifyError, key, f"a copy of visual.rope.{part}")


@pytest.mark.parametrize(("side", "trained"), [(14, 16), (16, 16), (24, 16), (2, 5)])
def test_timm_computes_the_rotary_tables_that_eva_clip_stores(side, trained, monkeypatch):
    """What is dropped is what the model has: EVA02-B-16, -L-14, -L-14-336, and the small peers of this file."""
    monkeypatch.setattr(eva_clip, "TRAINED", trained)
    tables = eva_clip.rotary(Size(image_size=14 * side, patch=14, image_width=3 * 64, image_heads=3))
    made = RotaryEmbeddingCat(64, in_pixels=False, feat_shape=(side, side), ref_feat_shape=(trained, trained))
    sin, cos = made.get_embed().chunk(2, -1)
    assert max_diff(sin, tables["freqs_sin"]) <= 1e-5
    assert max_diff(cos, tables["freqs_cos"]) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", eva_clip.KINDS)
def test_an_eva_clip_file_is_refused_by_a_model_of_another_architecture(kind, strict, pt):
    source = eva_clip.state_dict(kind)
    path = pt(source)
    refused(openclip.clip(seed=5), path, keymap.PlanError, "trunk", "native_vit", strict=strict, towers=("image",))
    if strict:  # a block of another build has other keys
        other = "EVA01" if kind == "EVA02" else "EVA02"
        refused(eva_clip.model(other, seed=5), path, keymap.PlanError, "visual.trunk.blocks.0.attn", strict=strict)
        refused(perception.model(seed=5), path, keymap.PlanError, "visual.trunk.norm_pre.weight", strict=strict)


# --- Perception Encoder ---


def perception_by_hand(source: State) -> State:
    """PE-Core's names -> open_clip's, key by key."""
    trunk, words = "visual.trunk.", {"c_fc": "fc1", "c_proj": "fc2", "in_proj_": "qkv.", "out_proj": "proj"}
    found = {}
    for key, value in source.items():
        if not key.startswith("visual."):
            found[key if key == "logit_scale" else f"text.{key}"] = value
            continue
        name = key.removeprefix("visual.")
        if name == "class_embedding":
            found[f"{trunk}cls_token"] = value.reshape(1, 1, -1)
        elif name == "positional_embedding":
            found[f"{trunk}pos_embed"] = value[None]
        elif name == "proj":
            found[f"{trunk}head.weight"], found[f"{trunk}head.bias"] = value.T, torch.zeros(value.shape[1])
        elif name.startswith("attn_pool.attn.in_proj_"):
            part, width = name.rpartition("_")[2], value.shape[0] // 3
            found[f"{trunk}attn_pool.q.{part}"], found[f"{trunk}attn_pool.kv.{part}"] = value[:width], value[width:]
        else:
            name = name.replace("attn_pool.attn.", "attn_pool.").replace("attn_pool.layernorm", "attn_pool.norm")
            name = name.replace("probe", "latent").replace("conv1", "patch_embed.proj").replace("ln_pre", "norm_pre")
            name = name.replace("transformer.resblocks", "blocks").replace("ln_post", "norm").replace("ln_", "norm")
            for theirs, ours in words.items():
                name = name.replace(theirs, ours)
            found[trunk + name] = value
    return found


CLASS = pytest.mark.parametrize("class_token", [True, False], ids=["class token", "none, as G"])


@CLASS
def test_a_pe_core_file_computes_what_perception_models_computes(class_token, sizes, pt, proves):
    texts = openclip.clip(seed=3, **sizes)
    source = perception.state_dict(class_token=class_token, text_of=texts, **sizes)
    model = perception.model(class_token=class_token, seed=5, **sizes)
    with torch.no_grad():
        model.visual.trunk.head.bias.fill_(7)
    result = keymap.load_checkpoint(model, pt(source), source_grid=grid(sizes))
    complete(result, "pe_core")
    assert list(result.report.plan.filled) == ["visual.trunk.head.bias"]
    side, ids = Size(**sizes).image_hw, tokens()
    expected = perception.image_features(source, images(side), **sizes)
    with torch.no_grad():
        assert max_diff(model.encode_image(images(side)), expected) <= LIMIT
        assert max_diff(model.encode_text(ids), texts.encode_text(ids)) <= LIMIT
    assert float(expected.abs().max()) > 0.1
    assert_holds(model, perception_by_hand(source))
    proves("parity", result.report.plan)
    proves("bit-equal", result.report.plan)


@CLASS
def test_a_pe_core_file_equals_timms_own_conversion(class_token, sizes, pt):
    source = perception.state_dict(class_token=class_token, **sizes)
    model = perception.model(class_token=class_token, seed=5, **sizes)
    keymap.load_checkpoint(model, pt(source), source_grid=grid(sizes))
    assert_holds(model.visual.trunk, checkpoint_filter_fn(dict(source), model.visual.trunk))


@pytest.mark.parametrize("around", AROUND)
def test_a_pe_core_file_in_wrappers_loads(around, pt):
    source = perception.state_dict()
    model = perception.model(seed=5)
    complete(keymap.load_checkpoint(model, pt(AROUND[around](source))), "pe_core")
    assert_holds(model, perception_by_hand(source))


def test_layer_scales_of_a_pe_core_file_are_loaded_where_the_model_has_them_and_told_elsewhere(pt):
    source = perception.state_dict()
    scales = {f"visual.transformer.resblocks.{i}.ls_{n}.gamma": torch.randn(48) for i in (0, 1) for n in (1, 2)}
    held = keymap.convert_state_dict({**source, **scales}, to="open_clip")
    assert torch.equal(held["visual.trunk.blocks.1.gamma_2"], scales["visual.transformer.resblocks.1.ls_2.gamma"])
    refused(perception.model(seed=5), pt({**source, **scales}), keymap.PlanError, "ls_1.gamma", "no place")


@CLASS
def test_a_pe_core_file_goes_there_and_back(class_token):
    source = perception.state_dict(class_token=class_token)
    model = perception.model(class_token=class_token, seed=5)
    held = keymap.convert_state_dict(source, to="open_clip")
    assert set(held) == set(model.state_dict()) - {"visual.trunk.head.bias"}
    again = keymap.convert_state_dict({**held, "visual.trunk.head.bias": torch.zeros(24)}, to="pe_core")
    assert set(again) == set(source) and all(same_bits(again[key], source[key]) for key in source)
    with pytest.raises(keymap.VerifyError, match=r"visual.trunk.head.bias must hold 0"):
        keymap.convert_state_dict({**held, "visual.trunk.head.bias": torch.ones(24)}, to="pe_core")


@pytest.mark.parametrize("strict", [True, False])
def test_a_pe_core_file_is_refused_by_a_native_clip(strict, pt):
    """Its image tower has the names of OpenCLIP's own ViT, and rotary positions beside them."""
    path = pt(perception.state_dict())
    refused(openclip.clip(seed=5), path, keymap.PlanError, "trunk", "native_vit", strict=strict, towers=("image",))


# --- the published sizes ---

PUBLISHED = [
    *("EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "EVA01-g-14", "EVA01-g-14-plus", "EVA02-E-14", "EVA02-E-14-plus"),
    *("PE-Core-T-16-384", "PE-Core-S-16-384", "PE-Core-B-16", "PE-Core-L-14-336", "PE-Core-bigG-14-448"),
]


def eva_names(held: State) -> State:
    """The state dict of EVA-CLIP that becomes this one of open_clip."""
    words = {"fc1_g": "w1", "fc1_x": "w2"}
    split, found = "visual.trunk.blocks.0.attn.q_proj.weight" in held, {}
    for key, value in held.items():
        name = key.replace("visual.trunk.", "visual.")
        if split and key.startswith("visual."):
            name = name.replace("attn.norm.", "attn.inner_attn_ln.").replace("mlp.norm.", "mlp.ffn_ln.")
            name = name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias").replace("mlp.fc2.", "mlp.w3.")
        for ours, theirs in words.items():
            name = name.replace(f"mlp.{ours}.", f"mlp.{theirs}.")
        found[name] = value
    return found


def perception_names(held: State) -> State:
    """The state dict of PE-Core that becomes this one of open_clip."""
    words = {
        "visual.trunk.": "visual.",
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "attn_pool.norm": "attn_pool.layernorm",
        "attn_pool.latent": "attn_pool.probe",
        "attn_pool.proj.": "attn_pool.attn.out_proj.",
        "blocks": "transformer.resblocks",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj.": "attn.out_proj.",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "visual.norm": "visual.ln_post",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {}
    for key, value in held.items():
        name = key.removeprefix("text.")
        for ours, theirs in words.items():
            name = name.replace(ours, theirs) if key.startswith("visual.") else name
        if ".attn_pool.q." in key:
            both = held[key.replace(".q.", ".kv.")]
            found[name.replace("attn_pool.q.", "attn_pool.attn.in_proj_")] = torch.cat([value, both])
        elif key == "visual.trunk.head.weight":
            found["visual.proj"] = value.T
        elif key == "visual.trunk.cls_token":
            found["visual.class_embedding"] = value[0, 0]
        elif key == "visual.trunk.pos_embed":
            found["visual.positional_embedding"] = value[0]
        elif ".attn_pool.kv." not in key and key != "visual.trunk.head.bias":
            found[name] = value
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_size_has_its_place_and_shape(name):
    """From names and shapes alone: the models of open_clip on the meta device, up to 5 billion weights."""
    model = mobileclip.on_meta(name)
    held = dict(model.state_dict())
    source = eva_names(held) if name.startswith("EVA") else perception_names(held)
    known = registry()
    found = detect(known, {key: whole(key, tuple(v.shape), v.dtype) for key, v in source.items()})
    now = to_hub(found, {})
    bring_to_layouts(known, now, {"text": ["native"]})
    assert not now.faults and not now.unowned
    shapes = {key: layout.shape for key, layout in now.tensors.items()}
    filled = {"visual.trunk.head.bias"} if name.startswith("PE") else set()
    assert shapes == {key: tuple(value.shape) for key, value in held.items() if key not in filled}
    assert sum(len(lay.sources) for lay in now.tensors.values()) >= len(source)


# --- MobileCLIP ---

FORMATS = dict.fromkeys(mobileclip.MODELS, "mobileclip_s") | {
    "mobileclip_b": "mobileclip_b",
    "mobileclip_s0": "mobileclip_s0",
}
WHOLE = [name for name in mobileclip.MODELS if name != "mobileclip_s0"]
FILLED = {name: f"visual.trunk.head{'' if name == 'mobileclip_b' else '.fc'}.bias" for name in mobileclip.MODELS}


def mobile_images(name: str) -> Tensor:
    return images(32 if name == "mobileclip_b" else mobileclip.IMAGE)


@pytest.fixture
def quiet():
    """Apple's and timm's MobileCLIP-B differ in what no weight holds, and small models have fewer heads: told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keymap.ConfigurationWarning)
        yield


@pytest.mark.parametrize("name", mobileclip.MODELS)
def test_every_key_of_a_published_mobileclip_equals_open_clips_conversion(name):
    """The full key list at the real shapes, random bits, against open_clip's converter and its model's own keys."""
    source = mobileclip.published(name)
    if name == "mobileclip_s0":  # its text tower has no place
        source = {key: value for key, value in source.items() if not key.startswith("text_encoder.")}
    model = mobileclip.on_meta(mobileclip.MODELS[name])
    held = keymap.convert_state_dict(source, to="open_clip")
    expected = open_clip_convert(model, source)
    assert set(held) == set(expected) - {FILLED[name]}
    assert [key for key in held if not same_bits(held[key], expected[key].contiguous())] == []
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    if name == "mobileclip_s0":
        wanted = {key: shape for key, shape in wanted.items() if not key.startswith("text.")}
    assert {key: value.shape for key, value in held.items()} | {FILLED[name]: wanted[FILLED[name]]} == wanted


@pytest.mark.parametrize("name", WHOLE)
def test_a_mobileclip_file_goes_there_and_back(name):
    source = mobileclip.published(name)
    held = keymap.convert_state_dict(source, to="open_clip")
    again = keymap.convert_state_dict({**held, FILLED[name]: torch.zeros(512)}, to=FORMATS[name])
    assert set(again) == set(source) and all(same_bits(again[key], source[key]) for key in source)
    with pytest.raises(keymap.VerifyError, match=rf"{FILLED[name]} must hold 0"):
        keymap.convert_state_dict({**held, FILLED[name]: torch.ones(512)}, to=FORMATS[name])


@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["distinct", "square"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_mobileclip_file_loads_as_open_clip_loads_it(name, sizes, pt, quiet, proves):
    source, peer = mobileclip.small(name, **sizes)
    model, other = mobileclip.model(name, seed=5, **sizes), mobileclip.model(name, seed=6, **sizes)
    with torch.no_grad():
        head = model.visual.trunk.head
        getattr(head, "fc", head).bias.fill_(7)
    result = keymap.load_checkpoint(model, pt(source))
    complete(result, FORMATS[name])
    assert list(result.report.plan.filled) == [FILLED[name]]
    other.load_state_dict(open_clip_convert(other, source))
    assert_holds(model, other.state_dict())
    assert_holds(model, peer.state_dict())
    with torch.no_grad():
        assert torch.equal(model.encode_image(mobile_images(name)), other.encode_image(mobile_images(name)))
        assert torch.equal(model.encode_text(tokens()), other.encode_text(tokens()))
    proves("bit-equal", result.report.plan)


def test_mobileclip_s0_loads_its_image_tower_and_says_why_not_its_text_tower(pt, proves):
    name = "mobileclip_s0"
    source, peer = mobileclip.small(name)
    path = pt(source)
    words = ("text_encoder.", "no OpenCLIP model has", "RepMixer", "towers=('image',)")
    refused(mobileclip.model(name, seed=5), path, keymap.PlanError, *words)
    refused(mobileclip.model(name, seed=5), path, keymap.PlanError, *words, towers=("text",))
    refused(mobileclip.model(name, seed=5), path, keymap.PlanError, *words, strict=False)
    refused(mobileclip.model(name, seed=5), path, keymap.PlanError, *words, towers=("text",), strict=False)
    for towers in (("image",), ("image", "scale")):
        model = mobileclip.model(name, seed=5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        result = keymap.load_checkpoint(model, path, towers=towers)
        complete(result, name)
        text = {key: value for key, value in before.items() if key.startswith("text.")}
        image = {key: value for key, value in peer.state_dict().items() if key.startswith("visual.")}
        scale = (peer.state_dict() if "scale" in towers else before)["logit_scale"]
        assert_holds(model, text | image | {"logit_scale": scale})
        proves("bit-equal", result.report.plan)
    with pytest.raises(keymap.PlanError, match=r"cannot be written as open_clip"):
        keymap.convert_state_dict(source, to="open_clip")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["reparam_conv", "lkb_reparam"])
@pytest.mark.parametrize("name", ["mobileclip_s0", "mobileclip_s1"])
def test_a_reparameterised_mobileclip_is_refused_in_words(name, part, strict, pt):
    source, _ = mobileclip.small(name)
    fused = {key.partition(".rbr_")[0] + f".{part}.weight" if ".rbr_" in key else key: v for key, v in source.items()}
    path = pt(fused)
    words = ("reparameterised for inference", "pass the file as Apple released it", part)
    refused(mobileclip.model(name, seed=5), path, keymap.DetectionError, *words, strict=strict)


def test_a_reparameterised_model_of_open_clip_loads_its_own_file(pt):
    """Only Apple's files are meant: OpenCLIP's own names load into a model that is fused alike."""
    from timm.utils import reparameterize_model

    source, model = (
        reparameterize_model(mobileclip.model("mobileclip_s1", seed=seed).eval(), inplace=True) for seed in (1, 5)
    )
    assert any("reparam_conv" in key for key in source.state_dict())
    complete(keymap.load_checkpoint(model, pt(source.state_dict())), "open_clip")
    assert_holds(model, source.state_dict())


def test_what_differs_between_apples_and_timms_mobileclip_b_is_told(pt):
    source, _ = mobileclip.small("mobileclip_b")
    with pytest.warns(keymap.ConfigurationWarning, match=r"eps of the image tower's norms: 1e-05 in the source"):
        keymap.load_checkpoint(mobileclip.model("mobileclip_b", seed=5), pt(source))
    notes = " ".join(registry().get("mobileclip_b").notes)
    assert "has padding 1" in notes and "eps 1e-5" in notes and "0.04 on a scale of 3.2" in notes


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", mobileclip.MODELS)
def test_a_mobileclip_file_is_refused_by_a_native_clip(name, strict, pt):
    path = pt(mobileclip.small(name)[0])
    refused(openclip.clip(seed=5), path, keymap.PlanError, "trunk", "native_vit", strict=strict, towers=("image",))


# --- nobody else's files ---

OWN = {
    **{f"EVA-CLIP {kind}": (lambda kind=kind, **k: eva_clip.model(kind, **k)) for kind in eva_clip.KINDS},
    "PE-Core": perception.model,
    "PE-Core G": lambda **k: perception.model(class_token=False, **k),
    **{name: (lambda name=name, **k: mobileclip.model(name, **k)) for name in mobileclip.MODELS},
}


@pytest.mark.parametrize("name", OWN)
def test_open_clips_and_timms_own_files_of_these_models_keep_their_formats(name, tmp_path):
    source, model = OWN[name](seed=1), OWN[name](seed=5)
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "own.safetensors")
    complete(keymap.load_checkpoint(model, tmp_path / "own.safetensors"), "open_clip")
    assert_holds(model, source.state_dict())
    model = OWN[name](seed=5)
    trunk = {key: value.contiguous() for key, value in source.visual.trunk.state_dict().items()}
    save_file(trunk, tmp_path / "timm.safetensors")
    if "head.fc.weight" in trunk:
        assert keymap.inspect_checkpoint(tmp_path / "timm.safetensors").format == "timm"
    complete(keymap.load_checkpoint(model, tmp_path / "timm.safetensors", towers=("image",)), "timm")
    assert_holds(model.visual.trunk, source.visual.trunk.state_dict())
