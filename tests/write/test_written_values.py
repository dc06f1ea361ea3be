"""What is written: values that fit their dtype, tied weights, the towers that are asked for, and what else is said."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from peers import hf, openai, openclip
from peers.common import same_bits
from safetensors.torch import load_file, save_file

import keymap
from keymap.write import tensors


@pytest.fixture
def state():
    return {key: value.detach().clone() for key, value in openclip.clip(seed=1).state_dict().items()}


def with_value(state, value, dtype=torch.float32):
    """The state dict with one value of the first convolution changed."""
    changed = state["visual.conv1.weight"].to(dtype)
    changed[0, 0, 0, 0] = value
    return {**state, "visual.conv1.weight": changed}


TOO_LARGE = [  # a value, its dtype, and a dtype that does not hold it
    (1e300, torch.float64, "float32"),
    (1e300, torch.float64, "bfloat16"),
    (1e300, torch.float64, "float16"),
    (1e30, torch.float32, "float16"),
    (65520.0, torch.float32, "float16"),
    (3.4e38, torch.float32, "bfloat16"),
    (1000.0, torch.float32, "float8_e4m3fn"),
    (float("inf"), torch.float32, "float8_e4m3fn"),
    (1e6, torch.float32, "float8_e5m2"),
]


@pytest.mark.parametrize(("value", "dtype", "target"), TOO_LARGE)
def test_a_value_that_does_not_fit_the_dtype_is_refused(value, dtype, target, state, tmp_path):
    torch.save(with_value(state, value, dtype), tmp_path / "x.pt")
    with pytest.raises(keymap.VerifyError, match=rf"its largest value .* does not fit {target}; pass dtype='float"):
        keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "hf_clip", dtype=target)
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize("value", [65519.0, -65519.0, float("inf"), float("-inf"), float("nan")])
def test_a_value_that_rounds_to_the_largest_one_and_one_that_is_infinite_already_are_written(value, state, tmp_path):
    torch.save(with_value(state, value), tmp_path / "x.pt")
    keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "open_clip", dtype="float16")
    held = torch.load(tmp_path / "y.pt")
    key = next(key for key in held if key.endswith("conv1.weight"))
    wanted = torch.tensor(value).half()
    assert torch.equal(held[key][0, 0, 0, 0].view(torch.int16), wanted.view(torch.int16)) or value != value


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (1e300, torch.float64)])
def test_a_format_that_fixes_half_precision_refuses_what_does_not_fit(value, dtype, state, tmp_path):
    changed = with_value(state, value, dtype)
    torch.save(changed, tmp_path / "x.pt")
    with pytest.raises(keymap.VerifyError, match="does not fit float16"):
        keymap.convert_state_dict(changed, "openai")
    with pytest.raises(keymap.VerifyError, match="does not fit float16"):
        keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "openai")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("value", "dtype", "into"),
    [
        (1e30, torch.float32, torch.float16),
        (1e300, torch.float64, torch.float32),
        (3.4e38, torch.float32, torch.bfloat16),
    ],
)
def test_a_load_into_a_narrower_model_refuses_what_would_become_infinite(
    value, dtype, into, strict, assign, state, tmp_path
):
    torch.save(with_value(state, value, dtype), tmp_path / "x.pt")
    model = openclip.clip(seed=2).to(into)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(keymap.VerifyError, match=r"visual\.conv1\.weight: its largest value .* does not fit"):
        keymap.load_checkpoint(model, tmp_path / "x.pt", strict=strict, assign=assign)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.save(with_value(state, float("inf"), dtype), tmp_path / "x.pt")  # infinite in the file: it stays so
    keymap.load_checkpoint(model, tmp_path / "x.pt", strict=strict, assign=assign)


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "float8_e4m3fnuz", "float4_e2m1fn_x2", "int8", "nothing", 5])
def test_a_dtype_that_loses_signs_or_is_none_is_refused(dtype, tmp_path):
    with pytest.raises(keymap.PlanError, match=r"dtype=.*one of float64, float32, float16, bfloat16"):
        keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "y.pt", "hf_clip", dtype=dtype)


@pytest.mark.parametrize("to", ["open_clip", "open_clip_flat", "hf_clip", "openai"])
@pytest.mark.parametrize("source", ["file", "model"])
def test_tied_weights_stay_tied(to, source, state, tmp_path):
    if source == "file":
        state["visual.ln_post.weight"] = state["visual.ln_pre.weight"]
        torch.save(state, tmp_path / "x.pt")
        keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", to)
    else:
        model = openclip.clip(seed=1)
        model.visual.ln_post = model.visual.ln_pre
        keymap.save_checkpoint(model, tmp_path / "y.pt", to)
    held = torch.load(tmp_path / "y.pt")
    pre, post = (next(v for k, v in held.items() if k.endswith(names)) for names in (PRE, POST))
    assert pre.data_ptr() == post.data_ptr()
    others = [value.untyped_storage().data_ptr() for value in held.values()]
    assert len(others) - len(set(others)) == (2 if source == "model" else 1)


PRE, POST = ("ln_pre.weight", "pre_layrnorm.weight"), ("ln_post.weight", "post_layernorm.weight")


def test_weights_that_are_only_equal_are_not_tied(state, tmp_path):
    state["visual.ln_post.weight"] = state["visual.ln_pre.weight"].clone()
    torch.save(state, tmp_path / "x.pt")
    keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "hf_clip")
    held = torch.load(tmp_path / "y.pt")
    pre, post = (next(v for k, v in held.items() if k.endswith(names)) for names in (PRE, POST))
    assert pre.data_ptr() != post.data_ptr()


@pytest.mark.parametrize("towers", ["text", ("text", "scale")])
def test_towers_that_the_source_lacks_are_no_empty_file(towers, state, tmp_path):
    image = {key: value for key, value in state.items() if key.startswith("visual.")}
    torch.save(image, tmp_path / "x.pt")
    words = r"has no tensors of towers=.*it has 'image'"
    with pytest.raises(keymap.PlanError, match=words):
        keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "open_clip", towers=towers)
    with pytest.raises(keymap.PlanError, match=words):
        keymap.convert_state_dict(image, "open_clip", towers=towers)
    with pytest.raises(keymap.PlanError, match="has no tensors of towers="):
        keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "y.pt", "hf_clip", towers="decoder")
    assert not (tmp_path / "y.pt").exists()


def test_what_else_the_file_holds_is_in_the_notes(state, tmp_path):
    average = {key: value.clone() for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average, "classifier.weight": torch.ones(3)}, tmp_path / "x.pt")
    torch.save({"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "plain.pt")
    result = keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "hf_clip")
    note = next(note for note in result.notes if "elsewhere in the file" in note)
    assert f"not converted: {len(state) + 1} tensors" in note and "wrapper='state_dict_ema'" in note
    assert note in str(result) and result.to_dict()["notes"] == list(result.notes)
    assert keymap.convert_checkpoint(tmp_path / "plain.pt", tmp_path / "y.pt", "hf_clip").notes == ()
    found = keymap.compare_checkpoints(tmp_path / "x.pt", tmp_path / "plain.pt")
    assert found.equal
    assert any("a: not compared" in note and "wrapper_a='state_dict_ema'" in note for note in found.notes)


def test_facts_that_contradict_the_model_or_the_configuration_are_refused(tmp_path):
    model = openclip.siglip(seed=1)
    heads = model.visual.trunk.blocks[0].attn.num_heads
    assert heads == 3
    with pytest.raises(keymap.PlanError, match=r"facts=\{'image.heads': 2\}: the source has 3 \(the model\)"):
        keymap.save_checkpoint(model, tmp_path / "x.npz", "big_vision_siglip", facts={"image.heads": 2})
    hf.siglip(seed=1).save_pretrained(tmp_path / "peer")
    with pytest.raises(keymap.PlanError, match=r"facts=\{'text.heads': 2\}: the source has .*config.json"):
        keymap.convert_checkpoint(tmp_path / "peer", tmp_path / "x.npz", "big_vision_siglip", facts={"text.heads": 2})
    assert not (tmp_path / "x.npz").exists()
    keymap.convert_checkpoint(tmp_path / "peer", tmp_path / "x.npz", "big_vision_siglip")  # its configuration has them
    assert keymap.compare_checkpoints(tmp_path / "peer", tmp_path / "x.npz").equal


@pytest.mark.parametrize("value", ["x", True, 2.0, 0, -1])
def test_a_head_count_that_is_no_number_is_refused_even_if_unused(value, tmp_path):
    with pytest.raises(keymap.PlanError, match="expected names and positive integers"):
        keymap.save_checkpoint(openclip.clip(seed=1), tmp_path / "x.pt", "hf_clip", facts={"image.heads": value})


# --- progress ---


def late(done, _total):
    if done:
        raise OSError(28, "the caller's own disk")


def early(_done, _total):
    raise StopIteration


@pytest.mark.parametrize(("progress", "words"), [(late, "raised OSError"), (early, "raised StopIteration")])
def test_an_exception_of_progress_is_named_as_such_and_nothing_is_written(progress, words, tmp_path):
    model = openclip.clip(seed=1)
    with pytest.raises(keymap.WriteError, match=rf"progress= {words}.*nothing was written") as caught:
        keymap.save_checkpoint(model, tmp_path / "x.pt", "hf_clip", progress=progress)
    assert isinstance(caught.value.__cause__, (OSError, StopIteration))
    assert list(tmp_path.iterdir()) == []
    keymap.save_checkpoint(model, tmp_path / "x.pt", "hf_clip")
    for assign in (True, False):
        with pytest.raises(keymap.LoadError, match=f"progress= {words}"):
            keymap.load_checkpoint(openclip.clip(seed=2), tmp_path / "x.pt", assign=assign, progress=progress)


@pytest.mark.parametrize("progress", [5, "x"])
def test_progress_that_is_no_function_is_refused(progress, tmp_path):
    model = openclip.clip(seed=1)
    with pytest.raises(keymap.PlanError, match=r"progress=.*pass a function"):
        keymap.save_checkpoint(model, tmp_path / "x.pt", "hf_clip", progress=progress)
    keymap.save_checkpoint(model, tmp_path / "x.pt", "hf_clip")
    for assign in (True, False):
        with pytest.raises(keymap.PlanError, match=r"progress=.*pass a function"):
            keymap.load_checkpoint(model, tmp_path / "x.pt", assign=assign, progress=progress)


def test_a_model_of_another_library_is_written_from_its_own_names(tmp_path):
    theirs, heads = hf.clip(), {"image.heads": 3, "text.heads": 4}
    keymap.save_checkpoint(theirs, tmp_path / "x.safetensors", "open_clip", facts=heads)
    ours = openclip.custom()
    keymap.load_checkpoint(ours, tmp_path / "x.safetensors")
    assert keymap.compare_checkpoints(theirs, ours).equal
    with torch.no_grad():
        ours.visual.proj[1, 2] += 1
    (one,) = keymap.compare_checkpoints(theirs, ours).differences
    assert one.kind == "value" and one.differing == 1


# --- what the reader of a format fixes ---


@pytest.mark.parametrize("source", ["a folder", "a live model of transformers", "a live model of OpenCLIP"])
def test_heads_that_openais_code_would_cut_otherwise_are_noted(source, tmp_path):
    """OpenAI's code takes a head for each 64 of the width, in both towers; the source has others."""
    if source == "a live model of OpenCLIP":
        model = openclip.clip(seed=1)  # heads of 24 and 8
        result = keymap.save_checkpoint(model, tmp_path / "x.pt", "openai", dtype="float32")
    else:
        model = hf.clip(seed=1)
        model.save_pretrained(tmp_path / "own")
        options = {"to": "openai", "dtype": "float32"}
        result = (
            keymap.convert_checkpoint(tmp_path / "own", tmp_path / "x.pt", **options)
            if source == "a folder"
            else keymap.save_checkpoint(model, tmp_path / "x.pt", **options)
        )
    notes = [note for note in result.notes if "attention heads" in note]
    assert [note.partition(":")[0] for note in notes] == [
        "width of the attention heads of the image tower",
        "width of the attention heads of the text tower",
    ]
    assert all("openai means 64: what reads the file computes something else" in note for note in notes)


FACTS = {"text.eos": 98, "image.eps": 1e-5, "text.eps": 1e-5}


def test_the_heads_of_a_file_of_openai_follow_from_its_widths(tmp_path):
    openai.save_state_dict(openai.vit(text_width=128, text_heads=2), tmp_path / "clip.pt")
    keymap.convert_checkpoint(tmp_path / "clip.pt", tmp_path / "out", "hf_clip", mapping="openai", facts=FACTS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_attention_heads"] == config["text_config"]["num_attention_heads"] == 2


# --- memory: one tensor at a time ---


READ = {
    ".safetensors": load_file,
    ".pt": torch.load,
    ".npz": lambda path: {key: torch.from_numpy(value) for key, value in np.load(path).items()},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_no_tensor_is_held_while_the_next_is_made_and_a_cast_one_is_never_whole(suffix, dtype, tmp_path, monkeypatch):
    model = openclip.clip(seed=1)
    save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, tmp_path / "own.safetensors")
    expected = keymap.convert_state_dict(model.state_dict(), "hf_clip")
    made, real, raw = [], tensors._value_of, tensors.raw_bytes

    def watched(item, source):
        assert all(one() is None for one in made)
        value = real(item, source)
        made.append(weakref.ref(value))
        return value

    def small(block):
        assert block.numel() <= 100
        return raw(block)

    monkeypatch.setattr(tensors, "_value_of", watched)
    monkeypatch.setattr(tensors, "raw_bytes", small)
    monkeypatch.setattr(tensors, "_BLOCK", 100)
    keymap.convert_checkpoint(tmp_path / "own.safetensors", tmp_path / f"x{suffix}", "hf_clip", dtype=dtype)
    assert len(made) >= (2 if dtype is None else len(expected))
    found = READ[suffix](tmp_path / f"x{suffix}")
    for key, value in expected.items():
        wanted = value.to(torch.float16) if dtype else value
        assert same_bits(found[key], wanted), key
