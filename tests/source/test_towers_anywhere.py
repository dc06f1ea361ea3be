"""Towers below any prefix of a file: found by the formats' evidence, chosen by what fits, reported; never guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers import big_vision, hf, openclip, timm_towers
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap
from keymap.source.hubs import ask
from keymap.source.open import open_source
from keymap.source.registry import registry
from keymap.source.search import prefixes_to_try

OTHER = {"unet.down.0.weight": torch.randn(8, 3, 3, 3), "language_model.layers.0.q_proj.weight": torch.randn(16, 16)}


def state(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def alone(model, prefix):
    return {key[len(prefix) :]: value for key, value in state(model).items() if key.startswith(prefix)}


def text_of(model):
    return {key: value for key, value in state(model).items() if not key.startswith(("visual.", "logit_"))}


def written(tensors, tmp_path, name="x.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name)
    return tmp_path / name


def assert_tower(model, source, before, start="visual."):
    """Every tensor of the tower is the source's; every other one is as before."""
    for key, value in model.state_dict().items():
        wanted = source.state_dict()[key] if key.startswith(start) else before[key]
        assert same_bits(value, wanted), key


PREFIXES = ["encoder.", "model.vision_tower.", "a.b.c.d.e.", "model.model.visual_encoder.clip.", "0."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["open_clip", "hf_clip", "timm", "lone", "openclip's visual"])
def test_an_image_tower_in_a_larger_model_is_found(form, prefix, tmp_path):
    build = openclip.clip_trunk if form == "timm" else openclip.clip
    source, model = build(seed=1), build(seed=2)
    before = bits(model)
    if form in ("hf_clip", "lone"):
        peer = hf.disk_keys(hf.clip(seed=3, tower="image_proj"))
        tensors = {k.removeprefix("vision_model.") if form == "lone" else k: v for k, v in peer.items()}
        if form == "lone":  # without its projection, as a language model keeps it
            tensors.pop("visual_projection.weight")
        written(peer, tmp_path, "peer.safetensors")
        source = openclip.clip(seed=2)
        keymap.load_checkpoint(source, tmp_path / "peer.safetensors", towers=("image",))
        if form == "lone":
            source.visual.proj.data = model.visual.proj.data.clone()
    elif form == "timm":
        tensors = alone(source, "visual.trunk.")
    elif form == "lone":
        tensors = {}
    else:
        tensors = (
            alone(source, "visual.") if form == "openclip's visual" else under("visual.", alone(source, "visual."))
        )
    path = written(under(prefix, tensors) | OTHER, tmp_path)
    options = {"allow_missing": ("visual.proj",)} if form == "lone" else {}
    result = keymap.load_checkpoint(model, path, towers=("image",), **options)
    assert_tower(model, source, before)
    part = result.report.plan.parts[0]
    assert (part.towers, part.prefix.startswith(prefix)) == (("image",), True)
    assert result.unexpected_keys == []
    assert "unet.down.0.weight" in str(result)


def test_towers_from_two_prefixes_and_the_scale_above_them(tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tensors = under("net.img.", alone(source, "visual.")) | under("net.txt.enc.", text_of(source))
    path = written(tensors | {"net.logit_scale": state(source)["logit_scale"]} | OTHER, tmp_path)
    result = keymap.load_checkpoint(model, path)
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert {part.prefix: part.towers for part in result.report.plan.parts} == {
        "net.img.": ("image",),
        "net.txt.enc.": ("text",),
        "net.": ("scale",),
    }
    assert "image: open_clip, under 'net.img.'" in str(result)


def test_towers_from_two_dicts_of_a_file_with_equal_keys(tmp_path):
    """Both state dicts have `positional_embedding` and `transformer.*`."""
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tree = {
        "img": alone(source, "visual."),
        "txt": text_of(source),
        "logit_scale": state(source)["logit_scale"],
        "step": 3,
    }
    torch.save(tree, tmp_path / "x.pt")
    for wrapper, assign in ((None, False), ({"image": "img", "text": "txt"}, False), (None, True)):
        model = openclip.clip(seed=2)
        keymap.load_checkpoint(model, tmp_path / "x.pt", wrapper=wrapper, assign=assign, allow_missing="logit_scale")
        wanted = source.state_dict()
        assert all(same_bits(v, wanted[k]) for k, v in model.state_dict().items() if k != "logit_scale"), wrapper


def test_half_of_one_model_and_half_of_another_are_not_joined(tmp_path):
    """Of the student only the image tower fits, of the teacher only the text tower."""
    student, teacher = openclip.clip(seed=1, text_width=64), openclip.clip(seed=2, image_width=96, image_heads=6)
    path = written(under("student.", state(student)) | under("teacher.", state(teacher)), tmp_path)
    model = openclip.clip(seed=3)
    before = bits(model)
    with pytest.raises(keymap.PlanError):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)
    keymap.load_checkpoint(model, path, wrapper={"image": "student", "text": "teacher"}, allow_missing="logit_scale")
    assert_tower(model, student, before | text_of(teacher) | {"logit_scale": student.state_dict()["logit_scale"]})


def test_the_state_of_a_composer_run_is_found(tmp_path):
    donor, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tree = {"model": under("clip.", state(donor)), "optimizers": {"AdamW": {"state": {"x": torch.ones(3)}}}}
    torch.save({"state": tree, "rng": [{"torch": torch.ones(4)}]}, tmp_path / "ep1.pt")
    keymap.load_checkpoint(model, tmp_path / "ep1.pt")
    assert all(same_bits(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("width", [32, 64])
def test_sizes_decide_between_two_towers(width, tmp_path):
    small, big = openclip.clip(seed=1), openclip.clip(seed=2, text_width=64)
    path = written(under("first.", text_of(small)) | under("second.model.", text_of(big)) | OTHER, tmp_path)
    model = openclip.clip(seed=3, text_width=width)
    before = bits(model)
    result = keymap.load_checkpoint(model, path, towers="text")
    chosen = small if width == 32 else big
    for key, value in model.state_dict().items():
        other = key.startswith(("visual.", "logit_"))
        assert same_bits(value, before[key] if other else chosen.state_dict()[key]), key
    assert result.report.plan.wrapper == ("first" if width == 32 else "second.model")
    assert ("second.model" if width == 32 else "first") in result.report.plan.other_wrappers


@pytest.mark.parametrize("names", [("online", "target_net"), ("a", "b.c"), ("module.x", "module.y")])
def test_two_towers_that_fit_are_refused_with_the_wrapper_of_each(names, tmp_path):
    first, second = openclip.clip(seed=1), openclip.clip(seed=2)
    path = written(under(f"{names[0]}.", state(first)) | under(f"{names[1]}.", state(second)), tmp_path)
    model = openclip.clip(seed=3)
    before = bits(model)
    for towers in (None, ("image",)):
        with pytest.raises(keymap.PlanError, match="choose one with wrapper=") as caught:
            keymap.load_checkpoint(model, path, towers=towers)
        printed = str(caught.value).partition("choose one with wrapper=")[2].replace("'", "").split(" or wrapper=")
        assert len(printed) == 2
    assert_unchanged(model, before)
    for wrapper, source in zip(printed, (first, second), strict=True):
        keymap.load_checkpoint(model, path, wrapper=wrapper)
        assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["student", "module.student", "state_dict.student", "state_dict.module.student"])
def test_a_name_in_any_form_that_is_printed_is_a_wrapper(wrapper, tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    keys = under("module.student.", state(source)) | under("module.teacher.", state(openclip.clip(seed=3)))
    torch.save({"state_dict": keys, "epoch": 3}, tmp_path / "x.pt")
    keymap.load_checkpoint(model, tmp_path / "x.pt", wrapper=wrapper)
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_model_beside_its_copy_is_not_taken_for_the_copy(tmp_path):
    """Both the top level and the copy fit; neither is guessed, and each can be chosen."""
    first, copy = openclip.clip(seed=1), openclip.clip(seed=2)
    path = written(state(first) | under("ema_copy.", state(copy)), tmp_path)
    model = openclip.clip(seed=3)
    with pytest.raises(keymap.PlanError, match="wrapper='' or wrapper='ema_copy'"):
        keymap.load_checkpoint(model, path)
    for wrapper, source in {"": first, "ema_copy": copy}.items():
        keymap.load_checkpoint(model, path, wrapper=wrapper)
        assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_classifier_beside_a_whole_model_is_unexpected_under_strict(tmp_path):
    """The search takes towers out of larger models; it does not hide what a whole model has too many of."""
    for source, build in (
        (state(openclip.clip(seed=1)), openclip.clip),
        (state(openclip.siglip(seed=1)), openclip.siglip),
    ):
        path = written(source | {"classifier.weight": torch.randn(5, 24)}, tmp_path)
        model = build(seed=2)
        before = bits(model)
        with pytest.raises(keymap.PlanError, match=r"classifier\.weight"):
            keymap.load_checkpoint(model, path)
        assert_unchanged(model, before)
        keymap.load_checkpoint(model, path, towers=("image",))  # strict within the tower


def test_no_tower_is_taken_from_the_state_of_an_optimizer(tmp_path):
    flat = big_vision.init(seed=1)
    moments = {f"opt/0/mu/{key}": np.asarray(value) + 1 for key, value in flat.items()}
    np.savez(tmp_path / "x.npz", **moments)
    model = openclip.siglip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.KeymapError):
        keymap.load_checkpoint(model, tmp_path / "x.npz")
    assert_unchanged(model, before)
    np.savez(tmp_path / "y.npz", **moments, **{f"params/{key}": value for key, value in flat.items()})
    keymap.load_checkpoint(model, tmp_path / "y.npz")
    plain = openclip.siglip(seed=3)
    big_vision.save(flat, tmp_path / "z.npz")
    keymap.load_checkpoint(plain, tmp_path / "z.npz")
    assert all(same_bits(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


def test_an_inspection_lists_every_tower_with_its_prefix(tmp_path):
    image, text = hf.disk_keys(hf.clip(seed=1, tower="image")), text_of(openclip.clip(seed=2, text_width=64))
    trunk = {key: value.detach() for key, value in timm_towers.siglip_vit(seed=3).state_dict().items()}
    tensors = under("cond.", text) | under("tower.vision_model.", image) | under("backbone.body.", trunk) | OTHER
    found = keymap.inspect_checkpoint(written(tensors, tmp_path))
    parts = {part.prefix: (part.format, part.tower) for part in found.parts if part.hub == "open_clip"}
    assert parts == {
        "cond": ("open_clip", "text"),
        "tower": ("hf_clip", "image"),
        "backbone.body": ("timm", "image"),
    }
    others = {(part.hub, part.prefix): part.format for part in found.parts if part.hub != "open_clip"}
    assert others == {("vision_transformer", "backbone.body"): "vision_transformer"}  # a timm model, too
    assert next(part.sizes["width"] for part in found.parts if part.prefix == "cond") == 64
    assert all(f"under {prefix!r}" in str(found) for prefix in parts if prefix != found.wrapper)
    assert found.to_dict()["parts"][0]["prefix"] in parts


def test_a_conversion_takes_a_wrapper_and_towers():
    source = openclip.clip(seed=1)
    tensors = under("deep.inside.", state(source)) | OTHER
    with pytest.raises(keymap.DetectionError, match=r"pass wrapper='deep\.inside'"):
        keymap.convert_state_dict(tensors, "hf_clip")
    whole = keymap.convert_state_dict(tensors, "hf_clip", wrapper="deep.inside")
    wanted = keymap.convert_state_dict(state(source), "hf_clip")
    assert whole.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in whole.items())
    image = keymap.convert_state_dict(tensors, "hf_clip", wrapper="deep.inside", towers=("image",))
    assert image.keys() == {key for key in wanted if key.startswith(("vision_model.", "visual_projection."))}


@pytest.mark.parametrize("wrapper", [{"picture": "a"}, {}, {"image": 3}, 7])
def test_a_wrong_wrapper_is_refused(wrapper, tmp_path):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    with pytest.raises(keymap.CheckpointError, match="wrapper="):
        keymap.load_checkpoint(openclip.clip(), path, wrapper=wrapper)


def test_the_search_is_linear_in_the_number_of_keys():
    """Counted in comparisons that Python makes, not in seconds: ten times the subtrees, ten times the steps."""
    known = registry()

    def steps(subtrees):
        keys = [f"m.{i}.part.blocks.{j}.attn.qkv.weight" for i in range(subtrees) for j in range(20)]
        import sys

        count = 0

        def tick(frame, event, arg):
            nonlocal count
            count += 1

        sys.setprofile(tick)
        try:
            prefixes_to_try(known, keys, None)
        finally:
            sys.setprofile(None)
        return count

    few, many = steps(20), steps(200)
    assert many < 12 * few


def test_a_load_that_fits_at_once_searches_nothing(tmp_path, monkeypatch):
    path = written(state(openclip.clip(seed=1)), tmp_path)
    opened = open_source(path, True, ask(), None)
    monkeypatch.setattr("keymap.source.open.prefixes_to_try", lambda *_: pytest.fail("it was searched"))
    assert opened.top[0].found is not None
    keymap.load_checkpoint(openclip.clip(), path)


def test_a_wrong_wrapper_is_refused_with_near_names(tmp_path):
    path = written(under("net.teacher.", state(openclip.clip(seed=1))) | OTHER, tmp_path)
    with pytest.raises(keymap.CheckpointError, match=r"did you mean wrapper='net\.teacher'"):
        keymap.load_checkpoint(openclip.clip(), path, wrapper="net.techer")


def test_that_a_file_has_no_such_tower_is_said_only_where_none_has(tmp_path):
    tensors = under("a.", text_of(openclip.clip(seed=1))) | under("b.", text_of(openclip.clip(seed=2, text_width=64)))
    with pytest.raises(keymap.PlanError, match="no state dict in the file has the image tower"):
        keymap.load_checkpoint(openclip.clip(), written(tensors | OTHER, tmp_path), towers=("image",))
    tensors |= under("c.", alone(openclip.clip(seed=3, image_width=96, image_heads=6), "visual."))
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(openclip.clip(), written(tensors | OTHER, tmp_path), towers=("image",))
    assert "no state dict in the file has" not in str(caught.value)


def test_facts_that_are_missing_are_one_fault():
    with pytest.raises(keymap.PlanError) as caught:
        keymap.convert_state_dict(openclip.siglip(seed=1).state_dict(), "big_vision_siglip")
    (fault,) = caught.value.faults
    assert "pass facts={'image.heads': ..., 'text.heads': ...}" in fault


REFUSED = {  # what a mapping refuses by name, in the image tower of a file
    "an adapter": "{}.self_attn.q_proj.lora_A.weight",
    "a scale": "{}.self_attn.q_proj.weight_scale",
    "bitsandbytes": "{}.mlp.fc1.weight.absmax",
}


@pytest.mark.parametrize("prefix", ["", "model.", "a.b."])
@pytest.mark.parametrize("name", REFUSED)
def test_a_part_of_a_file_that_is_refused_by_name_does_not_load_in_part(name, prefix, tmp_path):
    tensors = under(prefix, hf.disk_keys(hf.clip(seed=1)))
    tensors[prefix + REFUSED[name].format("vision_model.encoder.layers.0")] = torch.ones(2, 2)
    model = openclip.clip(seed=2)
    before = bits(model)
    for strict in (True, False):
        with pytest.raises(keymap.DetectionError, match=r"merge|quantized"):
            keymap.load_checkpoint(model, written(tensors | OTHER, tmp_path), strict=strict)
    assert_unchanged(model, before)


TRIFLES = {  # why the tuned tower does not fit as it is
    "a key more": {"visual.transformer.resblocks.0.VPT": torch.ones(3, 48)},
    "an adapter": {"visual.transformer.resblocks.0.mlp.c_fc.lora_A.weight": torch.ones(4, 48)},
    "a head": {"visual.head.weight": torch.ones(3, 24)},
    "no projection": {"visual.proj": None},
}


@pytest.mark.parametrize("where", ["student.", "student.clip.", "image_encoder."])
@pytest.mark.parametrize("name", TRIFLES)
def test_a_teacher_is_not_taken_because_the_student_does_not_fit(name, where, tmp_path):
    student = {key: value for key, value in (state(openclip.clip(seed=1)) | TRIFLES[name]).items() if value is not None}
    if where == "image_encoder.":
        student = {key: value for key, value in student.items() if key.startswith("visual.")}
    path = written(under(where, student) | under("teacher.", state(openclip.clip(seed=3))), tmp_path)
    for options in ({}, {"towers": ("image",)}, {"strict": False}):
        model = openclip.clip(seed=2)
        before = bits(model)
        with pytest.raises(keymap.KeymapError, match=r"choose one with wrapper=|adapter|unexpected"):
            keymap.load_checkpoint(model, path, **options)
        assert_unchanged(model, before)
    keymap.load_checkpoint(model, path, wrapper="teacher")
    assert same_bits(model.visual.conv1.weight, openclip.clip(seed=3).visual.conv1.weight)


@pytest.mark.parametrize("wrapper", ["student", {"image": "student", "text": "teacher"}])
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_that_the_caller_names_is_not_left_for_another(wrapper, nested, tmp_path):
    student = state(openclip.clip(seed=1)) | {"visual.transformer.resblocks.0.VPT": torch.ones(3, 48)}
    both = {"student": student, "teacher": state(openclip.clip(seed=3))}
    torch.save(
        {"model": both} if nested else {f"{n}.{k}": v for n, d in both.items() for k, v in d.items()}, tmp_path / "x.pt"
    )
    model = openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="VPT"):
        keymap.load_checkpoint(model, tmp_path / "x.pt", wrapper=wrapper)
    assert_unchanged(model, before)


def test_a_tuned_tower_beside_the_frozen_model_is_asked_for(tmp_path):
    tuned, frozen = state(openclip.clip(seed=1)), state(openclip.clip(seed=3))
    visual = {key: value for key, value in tuned.items() if key.startswith("visual.")}
    path, model = written(visual | under("clip_model.", frozen), tmp_path), openclip.clip(seed=2)
    with pytest.raises(keymap.PlanError, match="wrapper='clip_model' or wrapper=''"):
        keymap.load_checkpoint(model, path)
    keymap.load_checkpoint(model, path, wrapper={"image": "", "text": "clip_model"})
    assert same_bits(model.visual.conv1.weight, tuned["visual.conv1.weight"])
    assert same_bits(model.text_projection, frozen["text_projection"])


def test_a_teacher_is_not_taken_with_a_head_that_lies_beside_both(tmp_path):
    prompts = {f"{tower}transformer.resblocks.0.VPT": torch.ones(3, 8) for tower in ("visual.", "")}
    both = under("student.", state(openclip.clip(seed=1)) | prompts) | under("teacher.", state(openclip.clip(seed=3)))
    model = openclip.clip(seed=2)
    model.probe = torch.nn.Linear(24, 3)
    head = {f"probe.{key}": value for key, value in model.probe.state_dict().items()}
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"choose one with wrapper='teacher' or wrapper='student'"):
        keymap.load_checkpoint(model, written(both | head, tmp_path))
    assert_unchanged(model, before)
