"""Sentences of README.md and docs/api.md that no other test proves; docs/promises.md names the test of each."""

from __future__ import annotations

import ast
import datetime
import enum
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip.factory
import pytest
import torch
from hostile_files import call_pickle, write_torch
from peers import hf, openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap
from keymap.read.globals_allowed import UNREAD
from keymap.read.lazy import Block, LazyTensor, SourceFile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hf_file(tmp_path):
    save_file(hf.disk_keys(hf.clip(seed=1)), tmp_path / "hf.safetensors")
    return tmp_path / "hf.safetensors"


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_an_inspection_and_a_plan_read_no_weights(kind, monkeypatch, tmp_path):
    path, state = tmp_path / "x", openclip.clip(seed=1).state_dict()
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    read = []

    def no_read(*_):
        read.append(0)
        raise MemoryError

    for place, name in ((LazyTensor, "read"), (SourceFile, "read_into"), (Block, "mapped")):
        monkeypatch.setattr(place, name, no_read)
    assert keymap.inspect_checkpoint(path).format == "open_clip"
    assert keymap.plan_load(openclip.clip(), path).missing_keys == ()
    assert read == []
    with pytest.raises(keymap.LoadError):  # a load does read them
        keymap.load_checkpoint(openclip.clip(), path)
    assert read != []


def test_convert_copies_what_it_changes_and_nothing_else():
    state = openclip.clip(seed=1).state_dict()
    held = {value.data_ptr(): key for key, value in state.items()}
    converted = keymap.convert_state_dict(state, "hf_clip")
    renamed = [key for key, value in converted.items() if value.data_ptr() in held]
    assert "vision_model.embeddings.patch_embedding.weight" in renamed
    others = {key: value for key, value in converted.items() if key not in renamed}
    assert "visual_projection.weight" in others
    ends = [(value.data_ptr(), value.data_ptr() + value.nbytes) for value in state.values()]
    for key, value in others.items():
        assert value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes, key
        assert not any(start <= value.data_ptr() < end for start, end in ends), key


def test_the_first_five_arguments_are_those_of_open_clips_loader():
    ours, theirs = (
        [(p.name, p.default) for p in itertools.islice(inspect.signature(function).parameters.values(), 5)]
        for function in (keymap.load_checkpoint, open_clip.factory.load_checkpoint)
    )
    assert ours == theirs


def test_every_error_is_a_keymap_error():
    errors = [getattr(keymap, name) for name in keymap.__all__ if name.endswith("Error")]
    assert len(errors) == 9
    assert all(issubclass(error, keymap.KeymapError) for error in errors)


def test_the_faults_of_a_file_are_all_reported_at_once(tmp_path):
    state = openclip.clip(seed=1).state_dict()
    lost = [key for key in state if key.endswith("mlp.c_fc.bias")]
    bogus = {f"visual.bogus_{i}": torch.ones(2) for i in range(30)}
    shapes = {"visual.proj": torch.ones(3, 5)}
    found = {key: value for key, value in state.items() if key not in lost} | bogus | shapes
    save_file(found, tmp_path / "x.safetensors")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "x.safetensors")
    error = caught.value
    assert str(error).splitlines()[:2] == [error.summary, f"  - {error.faults[0]}"]
    faults = "\n".join(error.faults)
    assert f"{len(lost)} of the model's keys are missing from the file: {lost[0]}" in faults
    assert "30 of the file's keys are unexpected, with no place in the model: visual.bogus_0" in faults
    assert "visual.proj: shape [3, 5] in the file, [48, 24] in the model" in faults


def test_a_file_that_two_formats_match_is_refused(tmp_path):
    both = {**hf.disk_keys(hf.clip(seed=1)), **openclip.clip(seed=1).state_dict()}
    save_file({key: value.contiguous() for key, value in both.items()}, tmp_path / "x.safetensors")
    with pytest.raises(keymap.DetectionError, match="2 formats match its keys") as caught:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "x.safetensors")
    assert [fault.partition(" ")[0] for fault in caught.value.faults] == ["hf_clip", "open_clip"]


def test_every_result_prints_a_summary_and_gives_plain_data(hf_file):
    result = keymap.load_checkpoint(openclip.clip(), hf_file)
    for found in (result, result.report, result.report.plan, keymap.inspect_checkpoint(hf_file)):
        assert 1 < len(str(found).splitlines()) < 30
        assert json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize(("blocks", "loads"), [(10, True), (60, False)])
def test_not_strict_refuses_where_less_than_a_tenth_would_load(blocks, loads, tmp_path):
    """A whole image tower, and beside it blocks that the model has not: few, or ten times the tower."""
    tower = openclip.clip(seed=1).visual.state_dict()
    block = {key.partition(".0.")[2]: value for key, value in tower.items() if "resblocks.0." in key}
    state = {f"visual.{key}": value for key, value in tower.items()}
    for i in range(50, 50 + blocks):
        state |= {f"visual.transformer.resblocks.{i}.{key}": value.clone() for key, value in block.items()}
    assert (len(tower) > 0.1 * len(state)) == loads
    save_file(state, tmp_path / "x.safetensors")
    model = openclip.clip(seed=2)
    before = bits(model)
    if loads:
        keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict=False)
        assert torch.equal(model.visual.proj, tower["proj"])
        return
    with pytest.raises(keymap.PlanError):
        keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict=False)
    assert_unchanged(model, before)


class Colour(enum.Enum):
    RED = 1


class Own:
    pass


@pytest.mark.parametrize("value", [datetime.datetime(2020, 1, 2), Colour.RED, Own()], ids=lambda v: type(v).__name__)
def test_a_pickle_with_objects_of_other_classes_is_refused(value, tmp_path):
    torch.save({"state_dict": openclip.clip(seed=1).state_dict(), "more": value}, tmp_path / "x.pt")
    model = openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.UnsafeCheckpointError):
        keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert_unchanged(model, before)
    keymap.load_checkpoint(model, tmp_path / "x.pt", weights_only=False)


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_a_pickle_that_names_a_tensor_of_another_kind_is_refused(name, tmp_path):
    path = write_torch(tmp_path / "x.pt", call_pickle(*name.rsplit(".", 1), "x"), {})
    with pytest.raises(keymap.CheckpointError, match=r"x\.pt"):
        keymap.inspect_checkpoint(path)


def test_a_load_opens_the_file_its_shards_and_its_configuration(tmp_path):
    state = openclip.clip(seed=1).state_dict()
    for part in (0, 1):
        save_file({key: state[key] for key in list(state)[part::2]}, tmp_path / f"model-{part}.safetensors")
    index = {"weight_map": {key: f"model-{i % 2}.safetensors" for i, key in enumerate(state)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "open_clip_config.json").write_text("{}")
    for other in ("other.safetensors", "other.json", "model-2.safetensors", "tokenizer.json", "run.py"):
        (tmp_path / other).write_text("{}")
    code = (
        "import sys, os, torch; sys.path.insert(0, sys.argv[2]); import keymap; from peers import openclip\n"
        "model, opened, files = openclip.clip(seed=2), set(), set(os.listdir(sys.argv[1]))\n"
        "def hook(event, args):\n"
        "    if event == 'open': opened.add(os.path.basename(str(args[0])))\n"
        "sys.addaudithook(hook)\n"
        "keymap.load_checkpoint(model, sys.argv[1] + '/model.safetensors.index.json')\n"
        "print(*sorted(opened & files))"
    )
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, env=place)
    named = ["model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json", "open_clip_config.json"]
    assert done.stdout.split() == named, done.stderr


def test_convert_to_open_clip_gives_the_keys_of_its_two_classes():
    custom, flat = openclip.custom(seed=1).state_dict(), openclip.clip(seed=1).state_dict()
    for state in (custom, flat):
        assert set(keymap.convert_state_dict(state, "open_clip")) == set(custom)
        assert set(keymap.convert_state_dict(state, "open_clip_flat")) == set(flat)


MAPPING = """\
format: mine
title: names of my own
reference: my own code
layouts: {image: native_vit, text: native}
detect: {all: [mine.image.class_embedding]}
towers:
  image:
    mine.image.(.+): visual.\\1
  text:
    mine.text.(.+): text.\\1
  scale:
    mine.logit_scale: logit_scale
"""


def with_entry_point(folder, value):
    """The environment of a process that has a package with this entry point, whose modules are in the folder."""
    info = folder / "mine_mappings-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-mappings\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[keymap.mappings]\nmine = {value}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


@pytest.mark.parametrize("value", ["mine_mappings:FOLDER", "mine_mappings:folder"])
def test_a_package_adds_mappings_by_an_entry_point(value, tmp_path):
    (tmp_path / "mine_mappings.py").write_text(
        "from pathlib import Path\nFOLDER = Path(__file__).parent / 'maps'\ndef folder(): return FOLDER\n"
    )
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine.yaml").write_text(MAPPING)
    own = "format: {name}\n{kind}\ntitle: a hub of my own\ndetect: {{all: [{key}.weight]}}\ntowers:\n  net:\n"
    hub = own.format(name="my_hub", kind="kind: hub", key="layer") + "    layer.weight: layer.weight\n"
    form = own.format(name="my_format", kind="hub: my_hub", key="l") + "    l.weight: layer.weight\n"
    (tmp_path / "maps" / "my_hub.yaml").write_text(hub)
    (tmp_path / "maps" / "my_format.yaml").write_text(form)
    place = with_entry_point(tmp_path, value)
    code = "import keymap; print(keymap.list_formats()['mine'], *keymap.list_formats('my_hub'), "
    code += "*keymap.convert_state_dict({'l.weight': __import__('torch').ones(1)}, 'my_hub'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=place)
    assert done.stdout.strip() == "names of my own my_format my_hub layer.weight", done.stderr
    (tmp_path / "next.yaml").write_text(form.replace("my_format", "next").replace("l.weight:", "k.weight:", 1))
    (tmp_path / "next.yaml").write_text((tmp_path / "next.yaml").read_text().replace("[l.", "[k."))
    command = [sys.executable, "-m", "keymap", "check", str(tmp_path / "next.yaml"), str(tmp_path / "maps")]
    done = subprocess.run(command, capture_output=True, text=True, env=place)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("mine_mappings", "<module> is not a path"),
        ("mine_mappings:number", "3 is not a path"),
        ("mine_mappings:nothing", "AttributeError"),
        ("lacking:folder", "ModuleNotFoundError"),
        ("mine_mappings:broken", "ZeroDivisionError"),
        ("mine_mappings:nowhere", "the file does not exist"),
    ],
)
def test_a_broken_entry_point_is_named_with_its_package(value, words, tmp_path):
    broken = "def broken(): 1 / 0\nnumber = 3\nnowhere = '/nowhere/at/all'\n"
    (tmp_path / "mine_mappings.py").write_text(broken)
    place = with_entry_point(tmp_path, value)
    code = "import keymap\ntry: keymap.list_formats()\nexcept keymap.MappingError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=place)
    assert f"the entry point mine = {value} of mine-mappings" in done.stdout and words in done.stdout, done.stderr


def test_a_mapping_is_checked_whenever_it_is_read(tmp_path):
    file, path = tmp_path / "mine.yaml", tmp_path / "x.safetensors"
    keys = {k.replace("visual.", "image.", 1): v for k, v in openclip.custom(seed=1).state_dict().items()}
    save_file({f"mine.{k}": v for k, v in keys.items()}, path)
    file.write_text(MAPPING)
    keymap.load_checkpoint(openclip.clip(), path, mapping=file)
    file.write_text(MAPPING.replace("mine.text.(.+): text", "mine.image.(.+): text"))
    with pytest.raises(keymap.MappingError, match=r"mine\.yaml:10:"):
        keymap.load_checkpoint(openclip.clip(), path, mapping=file)


def test_no_module_imports_open_clip():
    """The command line alone builds models of OpenCLIP, where it is installed; what it needs itself is in its room."""
    imported = set()
    for file in (ROOT / "keymap").rglob("*.py"):
        if file.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    own = imported - set(sys.stdlib_module_names)
    assert own <= {"keymap", "torch", "safetensors", "numpy", "yaml", "jsonschema", "isal", "msgpack"}
