"""Apple's MobileCLIP files load into OpenCLIP's models, bit for bit as open_clip's converter converts them.

Small models, and the full key lists of Apple's four models at their real shapes.
"""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from broken import Case, rule_tests
from checks import assert_bits, assert_open_clips_and_timms_files_keep_their_formats, complete, refused
from open_clip.convert import convert_state_dict as open_clip_convert
from peers import mobileclip, openclip
from peers.common import SQUARE, images, same_bits, tokens
from torch import Tensor

import keymap
from keymap.source.registry import registry

pytestmark = pytest.mark.formats("mobileclip_b", "mobileclip_s", "mobileclip_s0", "mobileclip_text")

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
    """Silence the warnings: Apple's and timm's MobileCLIP-B differ in settings, and small models have fewer heads."""
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
    assert_bits(model, other.state_dict())
    assert_bits(model, peer.state_dict())
    with torch.no_grad():
        assert torch.equal(model.encode_image(mobile_images(name)), other.encode_image(mobile_images(name)))
        assert torch.equal(model.encode_text(tokens()), other.encode_text(tokens()))
    proves("bit-equal", result.report.plan)


def test_mobileclip_s0_loads_its_image_tower_and_says_why_not_its_text_tower(pt, proves):
    name = "mobileclip_s0"
    source, peer = mobileclip.small(name)
    path = pt(source)
    words = ("text_encoder.", "no OpenCLIP model has", "RepMixer", "towers=('image',)")
    refused(mobileclip.model(name, seed=5), path, *words)
    refused(mobileclip.model(name, seed=5), path, *words, towers=("text",))
    refused(mobileclip.model(name, seed=5), path, *words, strict=False)
    refused(mobileclip.model(name, seed=5), path, *words, towers=("text",), strict=False)
    for towers in (("image",), ("image", "scale")):
        model = mobileclip.model(name, seed=5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        result = keymap.load_checkpoint(model, path, towers=towers)
        complete(result, name)
        text = {key: value for key, value in before.items() if key.startswith("text.")}
        image = {key: value for key, value in peer.state_dict().items() if key.startswith("visual.")}
        scale = (peer.state_dict() if "scale" in towers else before)["logit_scale"]
        assert_bits(model, text | image | {"logit_scale": scale})
        proves("bit-equal", result.report.plan)
    with pytest.raises(keymap.PlanError, match=r"cannot be written as open_clip"):
        keymap.convert_state_dict(source, to="open_clip")


@pytest.mark.parametrize("prefix", ["text_encoder.", "", "teacher."])
@pytest.mark.parametrize("name", WHOLE)
def test_a_text_tower_alone_loads_whether_it_is_causal_or_not(name, prefix, pt, quiet, proves):
    """S1 and B differ in `causal` alone, which such a file does not say: no warning, no choice."""
    source, peer = mobileclip.small(name)
    text = {key: value for key, value in source.items() if key.startswith("text_encoder.")}
    model = mobileclip.model(name, seed=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = pt({prefix + key.removeprefix("text_encoder."): value for key, value in text.items()})
    result = keymap.load_checkpoint(model, path, towers=("text",))
    assert result.report.plan.format == "mobileclip_text"
    assert not any("causal" in warning for warning in result.report.plan.warnings)
    wanted = {key: value for key, value in peer.state_dict().items() if key.startswith("text.")}
    assert_bits(model, before | wanted)
    proves("bit-equal", result.report.plan)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["reparam_conv", "lkb_reparam"])
@pytest.mark.parametrize("name", ["mobileclip_s0", "mobileclip_s1"])
def test_a_reparameterised_mobileclip_is_refused_in_words(name, part, strict, pt):
    source, _ = mobileclip.small(name)
    fused = {key.partition(".rbr_")[0] + f".{part}.weight" if ".rbr_" in key else key: v for key, v in source.items()}
    path = pt(fused)
    words = ("reparameterised for inference", "pass the file as Apple released it", part)
    refused(mobileclip.model(name, seed=5), path, *words, error=keymap.DetectionError, strict=strict)


def test_a_reparameterised_model_of_open_clip_loads_its_own_file(pt):
    """Only Apple's files are refused: OpenCLIP's own load into a model that is fused alike."""
    from timm.utils import reparameterize_model

    source, model = (
        reparameterize_model(mobileclip.model("mobileclip_s1", seed=seed).eval(), inplace=True) for seed in (1, 5)
    )
    assert any("reparam_conv" in key for key in source.state_dict())
    complete(keymap.load_checkpoint(model, pt(source.state_dict())), "open_clip")
    assert_bits(model, source.state_dict())


def test_the_differences_of_apples_and_timms_mobileclip_b_give_a_warning(pt):
    source, _ = mobileclip.small("mobileclip_b")
    with pytest.warns(keymap.ConfigurationWarning, match=r"eps of the image tower's norms: 1e-05 in the source"):
        keymap.load_checkpoint(mobileclip.model("mobileclip_b", seed=5), pt(source))
    notes = " ".join(registry().get("mobileclip_b").notes)
    assert "has padding 1" in notes and "eps 1e-5" in notes and "0.04 on a scale of 3.2" in notes


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", mobileclip.MODELS)
def test_a_mobileclip_file_is_refused_by_a_native_clip(name, strict, pt):
    path = pt(mobileclip.small(name)[0])
    refused(openclip.clip(seed=5), path, "trunk", "native_vit", strict=strict, towers=("image",))


@pytest.mark.parametrize("name", mobileclip.MODELS)
def test_open_clips_and_timms_own_files_of_these_models_keep_their_formats(name, file):
    assert_open_clips_and_timms_files_keep_their_formats(partial(mobileclip.model, name), file)


# --- broken rules ---


def square(name: str) -> Case:
    state, peer = mobileclip.small(name, **SQUARE)
    image, ids = mobile_images(name), tokens()
    with torch.no_grad():
        outputs = [peer.encode_image(image), peer.encode_text(ids), peer.logit_scale]
    return Case(FORMATS[name], state, mobileclip.model(name, seed=5, **SQUARE), outputs, image, ids)


ROWS = r"""
mobileclip_b: the projection not transposed: differs
- visual.trunk.head.weight, view: in out -> out in}
+ visual.trunk.head.weight}
mobileclip_b: the norms of the stem exchanged: differs
- patch_emb.(0|1).block.norm.: {to: visual.trunk.patch_embed.backbone.\1.bn.,
+ patch_emb.(0|1).block.norm.: {to: visual.trunk.patch_embed.backbone.<1:stem>.bn.,
mobileclip_b: the two norms of a block exchanged: differs
- pre_norm_mha.0.(weight|bias): norm1.\1
+ pre_norm_mha.0.(weight|bias): norm2.\1
- pre_norm_ffn.0.(weight|bias): norm2.\1
+ pre_norm_ffn.0.(weight|bias): norm1.\1
mobileclip_b: the output of attention transposed: differs
- pre_norm_mha.1.out_proj.(weight|bias): attn.proj.\1
+ pre_norm_mha.1.out_proj.weight: {to: attn.proj.weight, view: a b -> b a}
+ pre_norm_mha.1.out_proj.bias: attn.proj.bias
mobileclip_b: the two norms of a text block exchanged: differs
- pre_norm_mha.0.(weight|bias): ln_1.\1
+ pre_norm_mha.0.(weight|bias): ln_2.\1
- pre_norm_ffn.0.(weight|bias): ln_2.\1
+ pre_norm_ffn.0.(weight|bias): ln_1.\1
mobileclip_b: the layers of the text MLP swapped: differs
- pre_norm_ffn.1.(weight|bias): mlp.c_fc.\1
+ pre_norm_ffn.4.(weight|bias): mlp.c_fc.\1
- pre_norm_ffn.4.(weight|bias): mlp.c_proj.\1
+ pre_norm_ffn.1.(weight|bias): mlp.c_proj.\1
mobileclip_b: the text projection transposed: differs
- projection_layer: text_projection
+ projection_layer: {to: text_projection, view: a b -> b a}
mobileclip_b: the third layer of the text MLP taken for the second: refused
- pre_norm_ffn.4.(weight|bias): mlp.c_proj.\1
+ pre_norm_ffn.3.(weight|bias): mlp.c_proj.\1
mobileclip_b: positions with the axis that Apple's have: refused
- {to: visual.trunk.pos_embed, view: 1 1 n d -> 1 n d}
+ visual.trunk.pos_embed
mobileclip_s1: a stage and the next exchanged: refused
- network.2.(\d+).: {to: stages.1.
+ network.2.(\d+).: {to: stages.2.
- network.4.(\d+).: {to: stages.2.
+ network.4.(\d+).: {to: stages.1.
mobileclip_s1: what makes the map smaller after the stage, not before: refused
- network.1.: {to: stages.1.downsample.,
+ network.1.: {to: stages.0.downsample.,
mobileclip_s1: the scales of an attention block exchanged: differs
- layer_scale_(1|2): layer_scale_\1.gamma
+ layer_scale_(1|2): layer_scale_<1:other>.gamma
mobileclip_s1: the scales of a block and of its mixer exchanged: differs
- (|token_mixer.)layer_scale: \1layer_scale.gamma
+ layer_scale: token_mixer.layer_scale.gamma
+ token_mixer.layer_scale: layer_scale.gamma
mobileclip_s1: mean and variance swapped: differs
- (weight|bias|running_mean|running_var|num_batches_tracked): \1
+ (weight|bias|running_mean|running_var|num_batches_tracked): <1:stats>
mobileclip_s1: the large convolution taken for the small: refused
- proj.0.lkb_origin.: {to: proj.0.large_conv.,
+ proj.0.lkb_origin.: {to: proj.0.small_conv.,
- proj.0.small_conv.: {to: proj.0.small_conv.,
+ proj.0.small_conv.: {to: proj.0.large_conv.,
mobileclip_s1: the side branches forgotten: refused
- rbr_skip.: {to: identity.,
+ nothing.: {to: identity.,
mobileclip_s1: the output of attention transposed: differs
- token_mixer.proj.(weight|bias): token_mixer.proj.\1
+ token_mixer.proj.weight: {to: token_mixer.proj.weight, view: a b -> b a}
+ token_mixer.proj.bias: token_mixer.proj.bias
mobileclip_s1: squeeze and expand exchanged: refused
- conv_exp.se.reduce.(weight|bias): final_conv.se.fc1.\1
- conv_exp.se.expand.(weight|bias): final_conv.se.fc2.\1
+ conv_exp.se.reduce.(weight|bias): final_conv.se.fc2.\1
+ conv_exp.se.expand.(weight|bias): final_conv.se.fc1.\1
"""

LOOKUPS = (  # that the rows use
    "  other: {1: 2, 2: 1}\n  stem: {0: 1, 1: 0}\n"
    "  stats: {weight: weight, bias: bias, running_mean: running_var, running_var: running_mean, "
    "num_batches_tracked: num_batches_tracked}\n"
)
CASES = {name: partial(square, name) for name in ("mobileclip_b", "mobileclip_s1")}

test_the_unbroken_rules_pass, test_a_broken_rule_is_seen = rule_tests(ROWS, CASES, LOOKUPS)
