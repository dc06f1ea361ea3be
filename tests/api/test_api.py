"""The public functions: what they return, which objects they leave unchanged, and their messages."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import SQUARE, assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hf_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in hf.disk_keys(hf.clip()).items()}, path)
    return path


# --- results ---


def test_the_result_is_a_dict_with_the_two_lists_and_a_report(hf_file):
    result = keymap.load_checkpoint(openclip.clip(), str(hf_file))
    assert result == {"missing_keys": [], "unexpected_keys": []}
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    data = json.loads(json.dumps(result.to_dict()))
    assert data["format"] == "hf_clip"
    assert data["loaded"] == {"text": 41, "scale": 1, "image": 32}
    assert data["layouts"]["text"] == ["native", "flat"]
    assert "hf_clip" in str(result) and "74 tensors" in str(result)


def test_for_npz_the_result_equals_an_empty_dict_and_the_attributes_answer(tmp_path):
    big_vision.save(big_vision.init(), tmp_path / "model.npz")
    result = keymap.load_checkpoint(openclip.siglip(), tmp_path / "model.npz")
    assert result == {}
    assert result.missing_keys == [] and result.unexpected_keys == []


def test_a_plan_lists_pieces_and_explains_a_key(hf_file):
    model = openclip.clip()
    before = bits(model)
    plan = keymap.plan_load(model, hf_file)
    assert_unchanged(model, before)
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    pieces = [piece for piece in plan.pieces if piece.target == key]
    assert [piece.source.split(".")[-2] for piece in pieces] == ["q_proj", "k_proj", "v_proj"]
    assert [piece.target_offset for piece in pieces] == [0, 48 * 48, 2 * 48 * 48]
    explained = plan.explain(key)
    assert "self_attn.(q|k|v)_proj" in explained and "hf_blocks.yaml:" in explained
    assert key in plan.explain()
    with pytest.raises(keymap.PlanError, match="does not fill 'nonsense'"):
        plan.explain("nonsense")


def test_every_element_of_the_model_is_covered_exactly_once(hf_file):
    model = openclip.clip_trunk()
    plan = keymap.plan_load(model, hf_file)
    for entry in plan.entries:
        count = torch.zeros(entry.layout.shape).reshape(-1)
        for piece in entry.layout.pieces:
            count.as_strided(piece.shape, piece.target_strides, piece.target_offset).add_(1)
        assert bool((count == 1).all()), entry.key


# --- inspection ---


def test_inspect_reports_format_wrapper_prefixes_and_tensors(tmp_path):
    state = {f"module.{k}": v for k, v in hf.disk_keys(hf.clip()).items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "run.pt")
    found = keymap.inspect_checkpoint(tmp_path / "run.pt")
    assert (found.format, found.container, found.wrapper, found.prefixes) == ("hf_clip", "torch", "model", ("module.",))
    assert found.layouts == {"image": "native_vit", "text": "native"}
    assert found.tensors["visual_projection.weight"] == ((24, 48), torch.float32)
    assert found.dtypes == {"float32": len(state)}
    assert json.loads(json.dumps(found.to_dict()))["tensors"]["logit_scale"] == {"shape": [], "dtype": "float32"}
    assert "hf_clip" in str(found)


def test_inspect_summarises_an_unknown_file(tmp_path):
    save_file({"some.key": torch.zeros(3, 5)}, tmp_path / "x.safetensors")
    found = keymap.inspect_checkpoint(tmp_path / "x.safetensors")
    assert found.format is None
    assert "'some.key' [3, 5]" in " ".join(found.evidence)


def test_inspect_reads_the_configuration_beside_the_file(hf_file):
    (hf_file.parent / "config.json").write_text('{"vision_config": {"image_size": 28, "patch_size": 14}}')
    hints = keymap.inspect_checkpoint(hf_file).config_hints
    assert {name: hints[name] for name in ("image_size", "patch_size")} == {
        "image_size": (28, 28),
        "patch_size": (14, 14),
    }
    assert hints["text.causal"] is True and hints["image.activation"] == "quick_gelu"


# --- choosing ---


def test_a_wrapper_is_chosen_and_the_others_are_reported(tmp_path):
    raw, ema = openclip.clip(seed=1), openclip.clip(seed=2)
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "run.pt")
    model = openclip.clip(seed=3)
    result = keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert result.report.plan.wrapper == "state_dict"
    assert result.report.plan.other_wrappers == ("state_dict_ema",)
    assert same_bits(model.visual.proj, raw.visual.proj)
    keymap.load_checkpoint(model, tmp_path / "run.pt", wrapper="state_dict_ema")
    assert same_bits(model.visual.proj, ema.visual.proj)


@pytest.mark.parametrize("nested", [("state_dict",), ("model",), ("model", "state_dict"), ("ema", "module")])
@pytest.mark.parametrize("prefixes", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
def test_wrappers_and_prefixes_in_any_nesting(nested, prefixes, tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    tree = {prefixes + k: v for k, v in source.state_dict().items()}
    for name in reversed(nested):
        tree = {"epoch": 3, name: tree}
    torch.save(tree, tmp_path / "run.pt")
    keymap.load_checkpoint(model, tmp_path / "run.pt")
    assert all(same_bits(v, model.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_is_picked_out_of_a_full_checkpoint(tower, hf_file):
    model = openclip.clip(seed=9)
    before = bits(model)
    result = keymap.load_checkpoint(model, hf_file, towers=(tower,))
    changed = {k for k, v in bits(model).items() if not same_bits(v, before[k])}
    visual = {k for k in model.state_dict() if k.startswith("visual.")}
    text = set(model.state_dict()) - visual - {"logit_scale"}
    assert changed == (visual if tower == "image" else text)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


BARE = {
    "vit": (openclip.clip, "visual", "image"),
    "resnet": (openclip.resnet, "visual", "image"),
    "timm trunk": (openclip.siglip, "visual", "image"),
    "convnext": (openclip.convnext, "visual", "image"),
    "text": (openclip.custom, "text", "text"),
}


@pytest.mark.parametrize("name", BARE)
def test_a_tower_saved_alone_goes_to_the_tower_that_it_is(name, tmp_path):
    """Also where image and text tower are equally wide, and share names."""
    build, attribute, tower = BARE[name]
    sizes = {"text_width": 48, "text_mlp": 2.5, "text_heads": 3} if name in ("vit", "text") else {}
    source, model = build(seed=1, **sizes), build(seed=2, **sizes)
    torch.save(getattr(source, attribute).state_dict(), tmp_path / "tower.pt")
    result = keymap.load_checkpoint(model, tmp_path / "tower.pt", strict=False)
    assert set(result.report.plan.loaded) == {tower}
    loaded, wanted = getattr(model, attribute).state_dict(), getattr(source, attribute).state_dict()
    assert all(same_bits(v, loaded[k]) for k, v in wanted.items())


# --- assign ---


def test_assign_makes_a_meta_model_usable(hf_file):
    meta, model = openclip.clip().to("meta"), openclip.clip(seed=9)
    result = keymap.load_checkpoint(meta, hf_file, assign=True)
    keymap.load_checkpoint(model, hf_file)
    assert all(same_bits(v, meta.state_dict()[k]) for k, v in model.state_dict().items())
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in result.report.materialised
    assert "visual.conv1.weight" not in result.report.materialised


def test_an_assigned_tensor_can_be_trained_without_touching_the_file(tmp_path):
    path = tmp_path / "own.safetensors"
    save_file(openclip.clip(seed=1).state_dict(), path)
    before = path.read_bytes()
    model = openclip.clip(seed=2)
    result = keymap.load_checkpoint(model, path, assign=True)
    assert result.report.materialised == ()
    assert isinstance(model.visual.proj, torch.nn.Parameter) and model.visual.proj.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before


def test_tensors_go_to_another_memory_one_at_a_time(tmp_path, monkeypatch):
    """As to an accelerator: none is first made on the host, and the model holds what came there."""
    path, moved = tmp_path / "own.safetensors", []
    save_file(openclip.clip(seed=1).state_dict(), path)

    def onto(device, value):
        moved.append(value.clone())
        return moved[-1]

    monkeypatch.setattr("keymap.load.assign._to_device", onto)
    model = openclip.clip().to("meta")
    result = keymap.load_checkpoint(model, path, assign=True)
    assert result.report.materialised == ()  # the assigned tensors are views of the file
    there = {clone.data_ptr() for clone in moved}
    assert {value.data_ptr() for value in model.state_dict().values()} == there
    wanted = openclip.clip(seed=1).state_dict()
    assert all(same_bits(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_left_as_it_was(on, hf_file):
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        keymap.load_checkpoint(openclip.clip(), hf_file)
        with pytest.raises(keymap.KeymapError):
            keymap.load_checkpoint(openclip.clip(), "missing.pt")
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()


def test_a_warning_points_at_the_line_that_loads(hf_file):
    """Not at a line of keymap, which nobody can change."""
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}
    (hf_file.parent / "config.json").write_text(json.dumps(config))
    with pytest.warns(keymap.ConfigurationWarning) as caught:
        keymap.load_checkpoint(openclip.clip(quick_gelu=True), hf_file)
    assert {warning.filename for warning in caught} == {__file__}


# --- conversion in memory ---


def test_convert_changes_nothing_of_the_callers_dict():
    state = hf.disk_keys(hf.clip())
    copied = copy.deepcopy(state)
    converted = keymap.convert_state_dict(state, "open_clip_flat")
    assert list(state) == list(copied) and all(same_bits(state[k], copied[k]) for k in copied)
    assert set(converted) == set(openclip.clip().state_dict())


def test_convert_from_one_format_to_another_through_the_hub():
    state = timm_towers.clip_vit().state_dict()
    there = keymap.convert_state_dict(state, "hf_clip")
    assert "vision_model.embeddings.class_embedding" in there
    back = keymap.convert_state_dict(there, "timm")
    assert not bool(state["head.bias"].any())  # CLIP has no place for it, and timm's head has it again
    assert set(back) == set(state) and all(same_bits(state[k], back[k]) for k in state)


def test_convert_to_openai_gives_the_dtypes_of_openais_files():
    state = openai.state_dict(openai.vit(), extras=False)
    wide = {k: v.float() for k, v in state.items()}
    written = keymap.convert_state_dict(wide, "openai")
    assert {k: v.dtype for k, v in written.items()} == {k: v.dtype for k, v in state.items()}
    assert all(same_bits(v, written[k]) for k, v in state.items())


def test_convert_names_the_fact_that_it_needs():
    with pytest.raises(keymap.PlanError, match=r"pass facts={'image.heads': ..., 'text.heads': ...}"):
        keymap.convert_state_dict(openclip.siglip().state_dict(), "big_vision_siglip")


def test_convert_finds_a_lost_tensor_without_a_model():
    state = hf.disk_keys(hf.clip())
    del state["text_model.encoder.layers.1.layer_norm2.bias"]
    with pytest.raises(keymap.PlanError, match=r"missing keys: text_model.encoder.layers.1.layer_norm2.bias"):
        keymap.convert_state_dict(state, "open_clip")


def test_convert_refuses_tensors_that_the_target_format_has_no_key_for():
    with pytest.raises(keymap.PlanError, match="image tower has layout native_vit, the target needs map_trunk"):
        keymap.convert_state_dict(openclip.clip().state_dict(), "hf_siglip")


# --- mappings of others ---

MINE = """\
format: mine
title: a format of my own
reference: my own code
layouts: {image: native_vit, text: native}
detect: {all: [mine-image-class_embedding]}
towers:
  image:
    mine-image-(.+): visual.\\1
  text:
    mine-text-(.+): text.\\1
  scale:
    mine-logit_scale: logit_scale
"""


def state_of_mine(model):
    names = {"visual.": "mine-image-", "text.": "mine-text-", "logit_scale": "mine-logit_scale"}
    return {
        new + key.removeprefix(old): value
        for key, value in model.state_dict().items()
        for old, new in names.items()
        if key.startswith(old)
    }


def test_a_mapping_file_is_used_by_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    source, model = openclip.custom(seed=1), openclip.clip(seed=2)
    save_file(state_of_mine(source), tmp_path / "x.safetensors")
    with pytest.raises(keymap.DetectionError):
        keymap.load_checkpoint(model, tmp_path / "x.safetensors")
    keymap.load_checkpoint(model, tmp_path / "x.safetensors", mapping=tmp_path / "mine.yaml")
    assert same_bits(model.visual.proj, source.visual.proj)
    assert "mine" not in keymap.list_formats()


def test_a_registered_mapping_is_detected(tmp_path):
    """In a process of its own: registering is for good."""
    (tmp_path / "mine.yaml").write_text(MINE)
    save_file(state_of_mine(openclip.custom(seed=1)), tmp_path / "x.safetensors")
    code = (
        "import keymap, sys; folder = sys.argv[1]\n"
        "assert keymap.register_mappings(folder + '/mine.yaml') == ['mine']\n"
        "print(keymap.inspect_checkpoint(folder + '/x.safetensors').format, 'mine' in keymap.list_formats())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["mine", "True"], done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place, ROOT],
        check=True,
        capture_output=True,
    )
    (made,) = place.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_mappings_and_schema(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    folder = ROOT / "mappings"
    shipped = {f"keymap/mappings/{path.relative_to(folder)}" for path in folder.rglob("*.yaml")}
    assert shipped | {"keymap/schemas/mapping.schema.json", "keymap/py.typed"} <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)
    code = "import keymap; print(keymap.__file__, len(keymap.list_formats()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "site", check=True
    )
    place, count = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path) and int(count) == len(keymap.list_formats())


def _written_to(name, text):
    def change(place):
        (file,) = place.glob(name)
        file.write_text(f"{file.read_text()}{text}")

    return change


RELEASES = {  # what happened to the installation, and what listing its formats prints
    "as installed": (lambda place: None, "True False"),
    "one more comment": (_written_to("keymap/mappings/open_clip/hf_clip.yaml", "# a comment\n"), "True True"),
    "a field": (
        _written_to("keymap/mappings/open_clip/hf_clip.yaml", "optinal: true\n"),
        "no field 'optinal' here",
    ),
    "a file more": (
        lambda place: (place / "keymap/mappings/a.yaml").write_text("format: a\n"),
        "1:1: title is missing",
    ),
    "no hub": (lambda place: (place / "keymap/mappings/open_clip/open_clip.yaml").unlink(), "there must be one hub"),
    "a damaged record": (_written_to("*.dist-info/RECORD", "\na,b,c,d\n"), "True True"),
    "another record": (
        _written_to("*.dist-info/RECORD", "keymap/mappings/open_clip/hf_clip.yaml,md5=a,1\n"),
        "True True",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_mappings_of_a_release_are_checked_where_they_are_not_as_installed(wheel, tmp_path, name):
    change, printed = RELEASES[name]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    change(tmp_path)
    code = (
        "import sys, keymap\n"
        "try: print(keymap.__file__, len(keymap.list_formats()) > 9, end=' ')\n"
        "except keymap.MappingError as error: print(keymap.__file__, error, *error.faults, end=' ')\n"
        "print('jsonschema' in sys.modules)"
    )
    place = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=place)
    assert done.stdout.startswith(str(tmp_path)) and printed in done.stdout, done.stdout + done.stderr


# --- facts from the caller ---


def test_a_fact_that_is_none_is_refused_as_such(hf_file):
    with pytest.raises(keymap.PlanError, match=r"'image.heads' is None; leave out what is not known"):
        keymap.plan_load(openclip.clip(), hf_file, facts={"image.heads": None})


@pytest.mark.parametrize("facts", ["x", {"image.heads": "3"}, {"image.heads": -3}, {"image.heads": 0}, {3: 3}])
def test_malformed_facts_are_refused_by_every_function(facts, hf_file):
    state = openclip.siglip().state_dict()
    with pytest.raises(keymap.PlanError, match="expected names and positive integers"):
        keymap.convert_state_dict(state, "big_vision_siglip", facts=facts)
    with pytest.raises(keymap.PlanError, match="expected names and positive integers"):
        keymap.load_checkpoint(openclip.clip(), hf_file, facts=facts)


@pytest.mark.parametrize("call", [keymap.inspect_checkpoint, keymap.register_mappings])
@pytest.mark.parametrize("path", [None, 5, b"x"])
def test_a_path_without_a_file_is_refused(call, path):
    with pytest.raises(keymap.KeymapError, match="pass the path"):
        call(path)


def test_a_tensor_without_values_cannot_be_converted():
    state = openclip.clip().state_dict()
    for hollow in (torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta")):
        with pytest.raises(keymap.PlanError, match=r"visual\.proj is (sparse|on the meta device)"):
            keymap.convert_state_dict({**state, "visual.proj": hollow}, "hf_clip")


EDITED = r"""format: edited
title: CLIP under other names
reference: this test
layouts: {image: native_vit, text: flat}
detect: {all: [my.visual.proj]}
towers:
  image:
    my.visual.proj: {to: visual.proj, view: a b -> b a}
    my.visual.(class_embedding|positional_embedding): visual.\1
    my.visual.(conv1|ln_pre|ln_post|transformer).(.+): visual.\1.\2
  text:
    my.(transformer|token_embedding|ln_final).(.+): \1.\2
    my.(positional_embedding|text_projection): \1
  scale:
    my.logit_scale: logit_scale
"""


def test_an_edited_mapping_file_is_read_anew(tmp_path, monkeypatch):
    """The first version transposes the projection, wrongly; it is square, so only its values show that."""
    file, path = tmp_path / "edited.yaml", tmp_path / "edited.safetensors"
    source = openclip.clip(seed=1, **SQUARE).state_dict()
    save_file({f"my.{k}": v.contiguous() for k, v in source.items()}, path)
    model = openclip.clip(seed=2, **SQUARE)
    file.write_text(EDITED)
    monkeypatch.setattr(keymap.source.registry, "_registry", [])
    assert keymap.register_mappings(file) == ["edited"]
    keymap.load_checkpoint(model, path, mapping="edited")
    assert same_bits(model.visual.proj.detach(), source["visual.proj"].T.contiguous())
    file.write_text(EDITED.replace("{to: visual.proj, view: a b -> b a}", "visual.proj"))
    keymap.load_checkpoint(model, path, mapping=file)
    assert same_bits(model.visual.proj.detach(), source["visual.proj"])
    assert keymap.register_mappings(file) == ["edited"]
    keymap.load_checkpoint(model, path)
    assert same_bits(model.visual.proj.detach(), source["visual.proj"])
    other = tmp_path / "other" / "edited.yaml"
    other.parent.mkdir()
    other.write_text(EDITED)
    with pytest.raises(keymap.MappingError, match=r"edited.yaml:1:1: the name 'edited' is taken by"):
        keymap.register_mappings(other)


def test_a_dry_run_reads_pickles_with_weights_only_false(tmp_path):
    torch.save(openclip.clip(seed=1), tmp_path / "module.pt")
    with pytest.raises(keymap.UnsafeCheckpointError):
        keymap.plan_load(openclip.clip(), tmp_path / "module.pt")
    plan = keymap.plan_load(openclip.clip(), tmp_path / "module.pt", weights_only=False)
    assert plan.missing_keys == ()
