"""Two files of the same weights are equal, whatever they are written as; and each change is found where it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import by_hand, hf, openclip
from safetensors.torch import save_file

import keymap

ROOT = Path(__file__).parents[2]
QKV = "visual.transformer.resblocks.1.attn.in_proj_weight"


def state(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def saved(tensors, path):
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def pair(tmp_path):
    """A transformers model on disk, and the same weights under OpenCLIP's names, converted by hand."""
    peer = hf.clip(seed=1)
    one = saved(hf.disk_keys(peer), tmp_path / "hf.safetensors")
    return one, by_hand.hf_clip(hf.disk_keys(peer)), tmp_path / "open_clip.pt"


def only(result):
    (difference,) = result.differences
    return difference


# --- the same weights ---


def test_transformers_and_openclip_with_the_same_weights_are_equal(pair):
    one, tensors, path = pair
    result = keymap.compare_checkpoints(one, saved(tensors, path))
    assert result.equal and result.differences == () and result.max_abs == 0.0
    assert (result.format_a, result.format_b, result.compared_as) == ("hf_clip", "open_clip", "open_clip")
    assert (result.a, result.b, result.tensors) == (str(one), str(path), len(tensors))


def test_a_file_and_a_model_with_the_same_weights_are_equal(pair):
    one, tensors, _ = pair
    model = openclip.clip(seed=2)
    assert not keymap.compare_checkpoints(one, model).equal
    model.load_state_dict(tensors, strict=True)
    result = keymap.compare_checkpoints(model, one)
    assert result.equal and result.tensors == len(tensors) and result.a == "the model"


SAME = {
    "CLIP and CustomTextCLIP": (openclip.clip, "open_clip_flat", "open_clip"),
    "transformers and OpenAI": (openclip.clip, "hf_clip", "openai"),
    "transformers and Flax": (openclip.clip, "hf_clip", "hf_flax_clip"),
    "transformers and big_vision": (openclip.siglip, "hf_siglip", "big_vision_siglip"),
    "big_vision and OpenCLIP": (openclip.siglip, "big_vision_siglip", "open_clip"),
}


@pytest.mark.parametrize("suffixes", [(".safetensors", ".pt"), (".npz", ".bin"), (".pt", ".npz")])
@pytest.mark.parametrize("name", SAME)
def test_one_model_in_two_formats_and_containers_is_equal(name, suffixes, tmp_path):
    build, one, other = SAME[name]
    model = build(seed=1)
    paths = [tmp_path / f"{form}{suffix}" for form, suffix in zip((one, other), suffixes, strict=True)]
    for path, form in zip(paths, (one, other), strict=True):
        keymap.save_checkpoint(model, path, form, dtype="float32")
    for a, b in (paths, paths[::-1]):
        result = keymap.compare_checkpoints(a, b)
        assert result.equal, str(result)
        assert result.tensors > 40


def test_openclips_own_vit_and_timms_meet_over_a_bridge():
    trunk = openclip.clip_trunk(seed=1)
    native = keymap.convert_state_dict(trunk.state_dict(), "hf_clip")
    model = openclip.custom(seed=2)
    model.load_state_dict(by_hand.hf_clip(native, text="text."), strict=True)
    result = keymap.compare_checkpoints(trunk, model)
    assert result.equal and result.tensors > 40, str(result)


def test_a_folder_of_shards_and_one_file_are_equal(tmp_path):
    model = openclip.clip(seed=1)
    (tmp_path / "set").mkdir()
    keymap.save_checkpoint(model, tmp_path / "set" / "model.safetensors", "hf_clip", max_shard_size=120_000)
    assert len(list((tmp_path / "set").iterdir())) > 2
    keymap.save_checkpoint(model, tmp_path / "x.pt", "hf_clip")
    assert keymap.compare_checkpoints(tmp_path / "set", tmp_path / "x.pt").equal


def test_wrappers_and_prefixes_make_no_difference(pair, tmp_path):
    one, tensors, path = pair
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}, path)
    assert keymap.compare_checkpoints(one, path).equal
    torch.save({"ema": tensors, "state_dict": {key: value + 1 for key, value in tensors.items()}}, path)
    assert not keymap.compare_checkpoints(one, path).equal
    assert keymap.compare_checkpoints(one, path, wrapper_b="ema").equal


def test_keys_that_hold_no_weights_are_no_difference_and_are_named(pair, tmp_path):
    one, tensors, path = pair
    old = hf.disk_keys(hf.clip(seed=1)) | {"vision_model.embeddings.position_ids": torch.arange(5)}
    saved(old, tmp_path / "old.safetensors")
    for other in (one, saved(tensors, path)):
        result = keymap.compare_checkpoints(tmp_path / "old.safetensors", other)
        assert result.equal
        assert any("vision_model.embeddings.position_ids: index buffer" in note for note in result.notes)


def test_a_key_that_holds_what_its_absence_means_is_no_difference(tmp_path):
    model = openclip.clip(seed=1)
    keymap.save_checkpoint(model, tmp_path / "a.pt", "hf_clip")
    for bias, equal in ((0.0, True), (-10.0, False)):
        saved(state(model) | {"logit_bias": torch.tensor(bias)}, tmp_path / "b.pt")
        result = keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
        assert result.equal is equal
        assert equal is any("holds what its absence means: logit_bias" in note for note in result.notes)


# --- what differs ---


def test_two_values_are_printed_with_the_digits_that_show_their_difference(tmp_path):
    for name, last in (("a", 2**53), ("b", 2**53 - 1)):
        save_file({"x": torch.tensor([1, last])}, tmp_path / f"{name}.safetensors")
    result = keymap.compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", hub="any")
    assert "(9007199254740992.0 -> 9007199254740991.0)" in str(result)


def test_one_tensor_that_is_changed_by_one_ulp(pair):
    one, tensors, path = pair
    changed = tensors["visual.conv1.weight"].clone()
    changed[3, 1, 2, 5] = torch.nextafter(changed[3, 1, 2, 5], torch.tensor(9.0))
    result = keymap.compare_checkpoints(one, saved(tensors | {"visual.conv1.weight": changed}, path))
    found = only(result)
    assert (found.tower, found.key, found.kind) == ("image", "visual.conv1.weight", "value")
    assert (found.where, found.differing) == ((3, 1, 2, 5), 1)
    assert found.max_abs == float(changed[3, 1, 2, 5].double() - tensors["visual.conv1.weight"][3, 1, 2, 5].double())
    assert found.value_b == float(changed[3, 1, 2, 5])
    assert found.keys_a == ("vision_model.embeddings.patch_embedding.weight",)
    assert keymap.compare_checkpoints(one, path, tolerance=found.max_abs).equal
    assert not keymap.compare_checkpoints(one, path, tolerance=found.max_abs * 0.99).equal


def test_query_and_key_swapped(pair):
    one, tensors, path = pair
    q, k, v = tensors[QKV].chunk(3)
    found = only(keymap.compare_checkpoints(one, saved(tensors | {QKV: torch.cat([k, q, v])}, path)))
    assert (found.key, found.kind, found.differing) == (QKV, "value", 2 * q.numel())
    assert found.max_abs == float((q.double() - k.double()).abs().max())
    assert len(found.keys_a) == 3 and found.keys_b == (QKV,)


def test_a_layer_that_is_missing(pair):
    one, tensors, path = pair
    lost = [key for key in tensors if ".resblocks.1." in key and key.startswith("visual")]
    rest = {key: value for key, value in tensors.items() if key not in lost}
    result = keymap.compare_checkpoints(one, saved(rest, path))
    assert {(each.key, each.kind, each.tower) for each in result.differences} == {
        (key, "missing_in_b", "image") for key in lost
    }
    back = keymap.compare_checkpoints(path, one)
    assert {(each.key, each.kind) for each in back.differences} == {(key, "missing_in_a") for key in lost}
    assert "- visual.transformer.resblocks.1.ln_1.weight [48] float32" in str(result)
    assert "+ visual.transformer.resblocks.1.ln_1.weight [48] float32" in str(back)


def test_a_layer_that_the_converted_file_lacks(pair):
    one, tensors, path = pair
    held = hf.disk_keys(hf.clip(seed=1))
    saved({key: value for key, value in held.items() if "vision_model.encoder.layers.1." not in key}, one)
    result = keymap.compare_checkpoints(one, saved(tensors, path))
    assert {each.kind for each in result.differences} == {"missing_in_a"}
    assert {each.key for each in result.differences} == {
        k for k in tensors if k.startswith("visual.transformer.resblocks.1.")
    }


def test_another_width(tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "a.pt", "hf_clip")
    keymap.save_checkpoint(openclip.clip(seed=1, image_width=72, image_heads=3), tmp_path / "b.pt", "open_clip")
    result = keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", towers="image")
    assert {each.kind for each in result.differences} == {"shape"}
    found = {each.key: (each.shape_a, each.shape_b) for each in result.differences}
    assert found["visual.class_embedding"] == ((48,), (72,))
    assert "~ visual.class_embedding: shape [48] -> [72]" in str(result)


def test_float16_and_float32_differ_by_the_rounding(pair, tmp_path):
    one, tensors, path = pair
    keymap.convert_checkpoint(one, tmp_path / "half.safetensors", "hf_clip", dtype="float16")
    result = keymap.compare_checkpoints(tmp_path / "half.safetensors", saved(tensors, path))
    assert not result.equal
    largest = max(float((value.double() - value.half().double()).abs().max()) for value in tensors.values())
    assert result.max_abs == max(each.max_abs for each in result.differences) == largest
    assert {(each.dtype_a, each.dtype_b) for each in result.differences} == {("float16", "float32")}
    assert result.dtypes == {"float16, float32": len(tensors)}
    assert keymap.compare_checkpoints(tmp_path / "half.safetensors", path, tolerance=largest).equal


def test_dtypes_of_equal_values_differ_only_if_asked(tmp_path):
    tensors = {key: value.half() for key, value in state(openclip.clip(seed=1)).items()}
    one = saved(tensors, tmp_path / "a.pt")
    other = saved({key: value.float() for key, value in tensors.items()}, tmp_path / "b.pt")
    result = keymap.compare_checkpoints(one, other)
    assert result.equal and result.dtypes == {"float16, float32": len(tensors)}
    strict = keymap.compare_checkpoints(one, other, check_dtype=True)
    assert {each.kind for each in strict.differences} == {"dtype"} and len(strict.differences) == len(tensors)


def test_a_key_that_no_rule_owns_is_compared_under_its_own_name(pair):
    one, tensors, path = pair
    result = keymap.compare_checkpoints(one, saved(tensors | {"classifier.weight": torch.ones(3)}, path))
    found = only(result)
    assert (found.tower, found.key, found.kind) == ("", "classifier.weight", "missing_in_a")
    saved(hf.disk_keys(hf.clip(seed=1)) | {"classifier.weight": torch.zeros(3)}, one)
    assert only(keymap.compare_checkpoints(one, path)).kind == "value"


# --- values ---

VALUES = {  # a, b, how many elements differ, the largest difference
    "NaN in the same place": ([math.nan, 1.0], [math.nan, 1.0], 0, 0.0),
    "NaN on one side": ([math.nan, 1.0], [2.0, 1.0], 1, math.inf),
    "infinite in the same place": ([math.inf, -math.inf], [math.inf, -math.inf], 0, 0.0),
    "infinite with another sign": ([math.inf, 1.0], [-math.inf, 1.0], 1, math.inf),
    "zeros of both signs": ([0.0, -0.0], [-0.0, 0.0], 0, 0.0),
}


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float64")])
@pytest.mark.parametrize("name", VALUES)
def test_special_values(name, dtypes, tmp_path):
    a, b, differing, largest = VALUES[name]
    one, other = (
        torch.tensor(values, dtype=getattr(torch, dtype)) for values, dtype in zip((a, b), dtypes, strict=True)
    )
    saved({"w": one, "x": torch.ones(2)}, tmp_path / "a.pt")
    saved({"w": other, "x": torch.ones(2)}, tmp_path / "b.pt")
    result = keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (sum(each.differing for each in result.differences), result.max_abs) == (differing, largest)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "bool", "uint8", "float64"])
def test_values_of_every_kind_of_dtype(dtype, tmp_path):
    value = torch.tensor([0.0, 1.0, 1.0]).to(getattr(torch, dtype))
    other = torch.tensor([0.0, 1.0, 0.0]).to(getattr(torch, dtype))
    one = saved({"w": value}, tmp_path / "a.pt")
    assert keymap.compare_checkpoints(one, one).equal
    found = only(keymap.compare_checkpoints(one, saved({"w": other}, tmp_path / "b.pt")))
    assert (found.where, found.max_abs, found.differing) == ((2,), 1.0, 1)


COMPLEX = {  # a, b, how many elements differ, the largest difference
    "NaN in the same part": ([complex(math.nan, 1), 1j], [complex(math.nan, 1), 1j], 0, 0.0),
    "NaN in the same part, beside another value": ([complex(math.nan, 1), 1j], [complex(math.nan, 2), 1j], 1, math.inf),
    "NaN in the other part": ([complex(math.nan, 1), 1j], [complex(1, math.nan), 1j], 1, math.inf),
    "zeros of both signs": ([complex(0.0, -0.0), 1j], [complex(-0.0, 0.0), 1j], 0, 0.0),
}


@pytest.mark.parametrize("dtypes", [("complex64", "complex64"), ("complex64", "complex128")])
@pytest.mark.parametrize("name", COMPLEX)
def test_special_values_of_complex_tensors(name, dtypes, tmp_path):
    a, b, differing, largest = COMPLEX[name]
    for file, values, dtype in zip("ab", (a, b), dtypes, strict=True):
        saved({"w": torch.tensor(values, dtype=getattr(torch, dtype))}, tmp_path / f"{file}.pt")
    result = keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (sum(each.differing for each in result.differences), result.max_abs) == (differing, largest)
    json.dumps(result.to_dict(), allow_nan=False)


def test_nan_of_other_bits_is_the_same(tmp_path):
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32)
    saved({"w": bits[:1].view(torch.float32)}, tmp_path / "a.pt")
    saved({"w": bits[1:].view(torch.float32)}, tmp_path / "b.pt")
    assert keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt").equal


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([2**53, 5]), torch.tensor([2**53 + 1, 5])),
        (torch.tensor([1, 5], dtype=torch.int32), torch.tensor([2, 5])),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor([2**53 + 1, 5]), torch.tensor([2.0**53, 5], dtype=torch.float64)),
    ],
)
def test_integers_are_exact_whatever_the_tolerance(a, b, tmp_path):
    saved({"w": a}, tmp_path / "a.pt")
    saved({"w": b}, tmp_path / "b.pt")
    tolerance = 0.0 if b.is_floating_point() else 7.0
    found = only(keymap.compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", tolerance=tolerance))
    assert (found.kind, found.differing, found.max_abs) == ("value", 1, 1.0)


@pytest.mark.parametrize("shape", [(300, 1000), (3, 100_000), (1, 300_000), (300_001,), (0, 4), ()])
def test_a_difference_is_found_wherever_it_is(shape, tmp_path):
    """Also in the last of many blocks."""
    value = torch.randn(shape)
    saved({"w": value}, tmp_path / "a.safetensors")
    for place in {0, value.numel() // 2, value.numel() - 1} if value.numel() else ():
        changed = value.clone()
        changed.view(-1)[place] += 2.0
        found = only(
            keymap.compare_checkpoints(tmp_path / "a.safetensors", saved({"w": changed}, tmp_path / "b.safetensors"))
        )
        assert found.where == tuple(int(n) for n in (np.unravel_index(place, shape) if shape else ()))
        assert found.differing == 1
    assert keymap.compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "a.safetensors").equal


# --- files without a format ---


def test_files_that_no_format_knows_are_compared_under_their_own_names(tmp_path):
    one = saved({"a.w": torch.ones(3), "b.w": torch.ones(2)}, tmp_path / "a.pt")
    other = saved({"a.w": torch.ones(3), "c.w": torch.ones(2)}, tmp_path / "b.safetensors")
    result = keymap.compare_checkpoints(one, other)
    assert (result.compared_as, result.format_a, result.format_b) == ("", "", "")
    assert [(each.key, each.kind) for each in result.differences] == [("b.w", "missing_in_b"), ("c.w", "missing_in_a")]
    assert "the files' own names" in str(result)
    with pytest.raises(keymap.PlanError, match="leave towers= out"):
        keymap.compare_checkpoints(one, other, towers="image")


def test_files_without_a_format_and_with_other_names_are_refused(tmp_path, pair):
    one = saved({"a.w": torch.ones(3)}, tmp_path / "a.pt")
    other = saved({"c.w": torch.ones(2)}, tmp_path / "b.pt")
    for a, b in ((one, other), (one, pair[0]), (pair[0], one)):
        with pytest.raises(keymap.DetectionError, match=r"a\.pt: no known format has these keys"):
            keymap.compare_checkpoints(a, b)


# --- refusals ---


def test_two_architectures_are_refused_and_their_text_towers_are_compared(tmp_path):
    keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "vit.pt", "hf_clip")
    saved(state(openclip.resnet(seed=1)), tmp_path / "resnet.pt")
    with pytest.raises(keymap.PlanError, match="the image tower has layout native_vit in a and native_resnet in b"):
        keymap.compare_checkpoints(tmp_path / "vit.pt", tmp_path / "resnet.pt")
    text = keymap.compare_checkpoints(tmp_path / "vit.pt", tmp_path / "resnet.pt", towers="text")
    assert {each.tower for each in text.differences} == {"text"} and text.tensors > 20


def test_a_part_that_is_missing_from_a_fused_tensor_is_refused_in_words(pair):
    one, tensors, path = pair
    held = hf.disk_keys(hf.clip(seed=1))
    del held["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(keymap.PlanError, match=r"a: .*missing: vision_model.encoder.layers.1.self_attn.k_proj.weight"):
        keymap.compare_checkpoints(saved(held, one), saved(tensors, path))
    whole = saved(hf.disk_keys(hf.clip(seed=1)), path.with_name("whole.safetensors"))
    assert only(keymap.compare_checkpoints(one, whole)).kind == "missing_in_a"  # as they stand, it is a key


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan, math.inf, True, "1e-3", None, 10**400])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance, pair):
    with pytest.raises(keymap.PlanError, match="tolerance="):
        keymap.compare_checkpoints(pair[0], pair[0], tolerance=tolerance)


@pytest.mark.parametrize(
    "arguments",
    [
        {"a": 3},
        {"b": None},
        {"a": {"w": torch.ones(1)}},
        {"b": ""},
        {"towers": "imag"},
        {"wrapper_a": 3},
        {"wrapper_b": "ema"},
        {"mapping_a": "nothing"},
        {"facts": {"image.head": 3}},
        {"towers": "decoder"},
    ],
)
def test_an_argument_that_is_wrong_is_refused(arguments, pair):
    with pytest.raises(keymap.KeymapError):
        keymap.compare_checkpoints(**({"a": pair[0], "b": pair[0]} | arguments))


def test_a_model_on_the_meta_device_is_refused(pair):
    with pytest.raises(keymap.PlanError, match="meta device"):
        keymap.compare_checkpoints(pair[0], openclip.clip(seed=1).to("meta"))


def test_a_damaged_npz_is_refused(tmp_path):
    path = saved({"w": torch.ones(100), "x": torch.ones(3)}, tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[content.index(b"\0\0\x80\x3f" * 8) + 2] ^= 1
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(keymap.CheckpointError, match="corrupt"):
        keymap.compare_checkpoints(path, tmp_path / "b.npz")


# --- what is printed ---


def test_equal_lines_of_many_layers_are_one_line(tmp_path):
    one, other = openclip.clip(seed=1, image_depth=6), openclip.clip(seed=1, image_depth=6)
    with torch.no_grad():
        for layer in (0, 1, 2, 3):
            other.visual.transformer.resblocks[layer].ln_1.weight[7] += layer + 1
    text = str(keymap.compare_checkpoints(one, other))
    (line,) = [line for line in text.splitlines() if "ln_1" in line]
    assert line.startswith(
        "  ~ visual.transformer.resblocks.{0..3}.ln_1.weight [48] (4 tensors): 4 of 192 values differ"
    )
    assert "at [7] of visual.transformer.resblocks.3.ln_1.weight" in line


def test_a_difference_prints_as_people_read_it(tmp_path):
    one = saved({"a.w": torch.ones(3), "b.w": torch.ones(2), "c.w": torch.ones(4)}, tmp_path / "a.pt")
    other = saved({"a.w": torch.tensor([1.0, 1.5, 1.0]), "c.w": torch.ones(2, 2)}, tmp_path / "b.pt")
    assert str(keymap.compare_checkpoints(one, other)).splitlines() == [
        f"--- {one} (no known format)",
        f"+++ {other} (no known format)",
        "@@ the files' own names @@",
        "no tower:",
        "  ~ a.w [3]: 1 of 3 values differ, at most by 0.5 at [1] (1 -> 1.5)",
        "  - b.w [2] float32",
        "  ~ c.w: shape [4] -> [2, 2]",
        "different: 1 with other values, 1 of another shape, 1 only in a; 2 tensors compared",
    ]


def test_a_long_list_is_cut_and_counted_and_the_result_holds_all(tmp_path):
    one = saved(
        {f"w{letter}{number}x": torch.ones(1) for letter in "abcdefgh" for number in range(10)}, tmp_path / "a.pt"
    )
    other = saved({"wa0x": torch.ones(1)} | {"y": torch.ones(1)}, tmp_path / "b.pt")
    result = keymap.compare_checkpoints(one, other)
    assert len(result.differences) == 80
    assert "... and 40 more lines" in str(result) and len(str(result).splitlines()) < 50


def test_control_characters_of_a_path_are_escaped(tmp_path):
    one = saved({"w": torch.ones(1)}, tmp_path / "a\x1b[31m\nb.pt")
    lines = str(keymap.compare_checkpoints(one, one)).splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_the_result_is_plain_data(pair):
    one, tensors, path = pair
    saved({key: value for key, value in tensors.items() if key != "visual.proj"}, path)
    plain = json.loads(json.dumps(keymap.compare_checkpoints(one, path).to_dict()))
    assert plain["equal"] is False and plain["tensors"] == len(tensors) - 1
    assert plain["differences"][0]["key"] == "visual.proj" and plain["differences"][0]["shape_b"] is None


# --- memory ---

MEASURED = """
import sys, torch, keymap
from pathlib import Path

def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

keymap.compare_checkpoints(sys.argv[3], sys.argv[4])  # what is needed once
before = field("VmRSS")
result = keymap.compare_checkpoints(sys.argv[1], sys.argv[2])
print(len(result.differences), (field("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_the_memory_is_that_of_two_tensors(suffix, tmp_path):
    """Ten tensors of 16 MB on either side: 320 MB are compared in less than 64 MB."""
    tensors = {f"w{number}": torch.full((1 << 12, 1 << 10), float(number)) for number in range(10)}
    one = saved(tensors, tmp_path / "a.safetensors")
    tensors["w7"][77, 5] = 3.0
    other = saved(tensors, tmp_path / f"b{suffix}")
    small = (
        saved({"w": torch.ones(3)}, tmp_path / "small.safetensors"),
        saved({"w": torch.ones(3)}, tmp_path / f"s{suffix}"),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, (one, other, *small))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    differing, megabytes = map(int, done.stdout.split())
    assert differing == 1 and megabytes < 2 * 16 + 32
