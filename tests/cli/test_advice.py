"""What a refusal of the command advises: options of that command, which work when they are pasted."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from peers import hf, openclip, timm_towers
from safetensors.torch import save_file

import keymap
from keymap.advice import Argument, Other, advised, choices
from keymap.cli import commands, targets
from keymap.cli.advice import OPTIONS, in_options
from keymap.cli.main import main
from keymap.paths import data_folder

PACKAGE = Path(keymap.__file__).parent

# --- messages are read and written again ---

SPELLINGS = {
    "pass allow_missing=('text_projection',); the": "pass --allow-missing text_projection; the",
    "allow_unexpected=('a.*', 'b[*]c')": "--allow-unexpected 'a.*' --allow-unexpected 'b[*]c'",
    "choose one with wrapper='' or wrapper='a b'": "choose one with --wrapper '' or --wrapper 'a b'",
    "wrapper={'image': 'x', 'text': 'y'}: expected": "--wrapper image=x --wrapper text=y: expected",
    "load with towers=('image',)": "load with --tower image",
    "towers=('image', 'scale').": "--tower image --tower scale.",
    "pass facts={'image.heads': ..., 'text.heads': 12} (": "pass --fact image.heads=VALUE --fact text.heads=12 (",
    "facts={'image.size': (28, 56)}: no": "--fact image.size=28x56: no",
    "pass source_grid=(h, w), one of 2x3": "pass --source-grid HxW, one of 2x3",
    "source_grid=(2, 3): does not": "--source-grid 2x3: does not",
    "pass strict=False": "pass --no-strict",
    "or pass weights_only=False if": "or pass --unsafe-pickle if",
    "pass overwrite=True to": "pass --overwrite to",
    "pass dtype='float32'": "pass --dtype float32",
    "or pass dtype=": "or pass --dtype",
    "more than max_shard_size=100; choose": "more than --max-shard-size 100; choose",
    "tolerance=-1e-05: expected": "--tolerance -1e-05: expected",
    "check_dtype=True": "--check-dtype",
    "mapping='hf_clip' or mapping='my file.yaml'": "--mapping hf_clip or --mapping 'my file.yaml'",
    "mapping_a='x' mapping_b=": "--mapping-a x --mapping-b",
    "wrapper_a='x' or wrapper_b='y'": "--wrapper-a x or --wrapper-b y",
    "like_wrapper='x' like_mapping='y'": "--like-wrapper x --like-mapping y",
    "to='open_clip'": "--to open_clip",
    "hub='open_clip'": "--hub open_clip",
    "towers=(,) wrapper=((( a==b, x.towers=('a',)": "--tower '(,)' --wrapper((( a==b, x.towers=('a',)",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_an_argument_is_written_as_its_option(text):
    assert in_options(text) == SPELLINGS[text]


def test_every_option_has_a_spelling_that_is_tested():
    assert {argument.name for text in SPELLINGS for argument in advised(text)} == set(OPTIONS)


def test_a_message_is_read_again():
    assert advised("a=1 x=(h, w) y= z") == [Argument("a", (1,)), Argument("x", (Other("(h, w)"),)), Argument("y", ())]
    names = ["a'b", 'c"d', "e\\f", "", "g=h wrapper='i'", "(", "\u00fc"]
    assert [argument.values for argument in advised(choices("wrapper", names))] == [(name,) for name in names]


@pytest.mark.parametrize(
    "key", ["$(touch stolen)", "'; touch stolen; '", '"`touch stolen`', "a'$(touch stolen)b", "-x"]
)
def test_what_is_pasted_runs_nothing_whatever_a_key_is(key, tmp_path):
    advice = in_options(choices("wrapper", [key]) + f" and allow_missing={(key, key)!r}")
    words = shlex.split(advice)
    assert words == ["--wrapper", key, "and", "--allow-missing", key, "--allow-missing", key]
    done = subprocess.run(["sh", "-c", f"echo {advice}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert key in done.stdout and list(tmp_path.iterdir()) == []


# --- every argument has an option ---

WITHOUT = {  # arguments that no command takes, and why no message about them is seen there
    "allow_pickle": "of numpy, when a file is written",
    "assign": "the model of the command is made for the load",
    "device": "the same",
    "jit": "of OpenCLIP's own function",
    "name": "of map_key, which is no command",
    "progress": "the command shows its own",
    "source": "the same",
}
COMMANDS = {
    "inspect": (keymap.inspect_checkpoint, {"path"}),
    "plan": (keymap.plan_load, {"model", "checkpoint_path"}),
    "load": (keymap.load_checkpoint, {"model", "checkpoint_path", "assign", "device", "progress"}),
    "convert": (keymap.convert_checkpoint, {"source", "destination", "progress"}),
    "diff": (keymap.compare_checkpoints, {"a", "b"}),
}
PUBLIC = {name for function, _ in COMMANDS.values() for name in inspect.signature(function).parameters}


def texts(source):
    """The texts of a module, without docstrings; of a formatted text a 0 for each value."""
    tree = ast.parse(source)
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
            yield "".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "choices":
            yield f"{ast.literal_eval(node.args[0])}="


def _lines(file):
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def advice_of_the_library():
    """Every argument that a message of the library names, and the file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if "cli" not in file.parts:
            for text in texts(file.read_text(encoding="utf-8")):
                yield from ((argument.name, file.name) for argument in advised(text))
    for file in data_folder("mappings").glob("*.yaml"):
        yield from ((a.name, file.name) for line in _lines(file) for a in advised(line))


def test_every_argument_that_a_message_names_has_an_option():
    found = dict(advice_of_the_library())
    assert {"towers", "allow_missing", "wrapper", "overwrite", "mapping"} <= found.keys()
    assert {name: file for name, file in found.items() if name not in OPTIONS.keys() | WITHOUT.keys()} == {}
    assert WITHOUT.keys() - found.keys() == set()


def test_no_message_names_an_argument_in_another_spelling():
    words = [name for name in PUBLIC if "_" in name and name != "checkpoint_path"]
    spelled = re.compile(rf"(?<![\w`.\"'{{])({'|'.join(words)})\b(?!=)")
    for file in sorted(PACKAGE.rglob("*.py")):
        if "cli" not in file.parts:
            found = [text for text in texts(file.read_text(encoding="utf-8")) if " " in text and spelled.search(text)]
            assert found == [], file


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_an_option_for_every_argument_of_its_function(name):
    function, others = COMMANDS[name]
    options = {option for parameter in commands.cli.commands[name].params for option in parameter.opts}
    arguments = inspect.signature(function).parameters.keys() - others
    assert [argument for argument in sorted(arguments) if OPTIONS[argument][0] not in options] == []


def test_every_option_of_the_table_is_one_of_a_command():
    there = {
        opt for command in commands.cli.commands.values() for parameter in command.params for opt in parameter.opts
    }
    assert {option for option, _ in OPTIONS.values()} - there == set()


# --- the advice is followed ---


def state(model):
    return {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def saved(tensors, file="x.safetensors"):
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)
    return file


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


def two(folder):
    saved(under("student.", state(openclip.clip(seed=1))) | under("teacher.", state(openclip.clip(seed=2))))
    return "x.safetensors"


def lacks_projection():
    return ["plan", saved(without(state(openclip.clip(seed=1)), "text_projection")), "--model", "x"]


def has_a_classifier():
    extra = {"classifier.weight": torch.ones(3, 4), "classifier.bias": torch.ones(3)}
    return ["plan", saved(state(openclip.clip(seed=1)) | extra), "--model", "x"]


def image_alone():
    return ["load", saved(hf.disk_keys(hf.clip(seed=1, tower="image_proj"))), "--model", "x"]


def two_models():
    return ["plan", two("."), "--model", "x"]


def two_models_to_convert():
    return ["convert", two("."), "y.safetensors", "--to", "hf_clip"]


def two_models_on_one_side():
    keymap.save_checkpoint(openclip.clip(seed=2), "b.safetensors", "hf_clip")
    return ["diff", two("."), "b.safetensors"]


def two_models_on_the_other():
    keymap.save_checkpoint(openclip.clip(seed=2), "b.safetensors", "hf_clip")
    return ["diff", "b.safetensors", two(".")]


def two_models_to_be_like():
    return ["plan", saved(state(openclip.clip(seed=1)), "b.safetensors"), "--like", two(".")]


def heads_are_not_shown():
    return ["convert", saved(state(openclip.siglip(seed=1))), "y.npz", "--to", "big_vision_siglip"]


def a_folder_needs_a_setting():
    return ["convert", saved(state(openclip.clip(seed=1))), "y", "--to", "open_clip"]


def a_folder_of_images_that_are_not_square():
    file = saved(openclip.clip(seed=1, image_size=(28, 56)).state_dict())
    return ["convert", file, "out", "--to", "open_clip", *shlex.split(FOLDER)]


def shards_are_there():
    words = ["convert", saved(state(openclip.clip(seed=1))), "y.safetensors", "--to", "hf_clip", "--max-shard-size"]
    assert main([*words, "150000"]) == 0
    return [*words, "150000"]


def too_wide_for_numpy():
    tensors = {key: value.to(torch.bfloat16) for key, value in state(openclip.clip(seed=1)).items()}
    return ["convert", saved(tensors), "y.npz", "--to", "open_clip"]


def a_class_that_runs_code():
    torch.save({"state_dict": state(openclip.clip(seed=1)), "args": Fraction(1, 2)}, "x.pt")
    return ["plan", "x.pt", "--model", "x"]


def other_shapes():
    tensors = state(openclip.clip(seed=1))
    tensors["text_projection"] = torch.ones(7, 9)
    return ["plan", saved(tensors), "--model", "x"]


def a_grid_that_is_not_shown():
    tensors = state(timm_towers.clip_vit(image_size=(28, 42), seed=1))
    return ["plan", saved(tensors), "--model", "x", "--tower", "image"]


FOLLOWED = {  # the file and the command; options that the refusal must offer; the code with the first of them
    "a key is missing": (lacks_projection, ["--allow-missing text_projection"], 0),
    "keys are unexpected": (has_a_classifier, ["--allow-unexpected 'classifier.*'"], 0),
    "a tower is absent": (image_alone, ["--tower image"], 0),
    "two models": (two_models, ["--wrapper student", "--wrapper teacher"], 0),
    "two models to convert": (two_models_to_convert, ["--wrapper student", "--wrapper teacher"], 0),
    "two models in a": (two_models_on_one_side, ["--wrapper-a student", "--wrapper-a teacher"], 1),
    "two models in b": (two_models_on_the_other, ["--wrapper-b teacher", "--wrapper-b student"], 0),
    "two models to be like": (two_models_to_be_like, ["--like-wrapper student", "--like-wrapper teacher"], 0),
    "heads": (heads_are_not_shown, ["--fact image.heads=VALUE", "--fact text.heads=VALUE"], 0),
    "a folder": (a_folder_needs_a_setting, ["--fact image.activation=VALUE", "--fact text.eps=VALUE"], 0),
    "a size": (a_folder_of_images_that_are_not_square, ["--fact image.size=VALUE"], 0),
    "shards": (shards_are_there, ["--overwrite"], 0),
    "numpy": (too_wide_for_numpy, ["--dtype float32"], 0),
    "code": (a_class_that_runs_code, ["--unsafe-pickle"], 0),
    "another shape": (other_shapes, ["--no-strict"], 0),
    "a grid": (a_grid_that_is_not_shown, ["--source-grid HxW"], 0),
}
FOLDER = """--fact image.activation=gelu --fact image.head_width=16 --fact image.pool=tok --fact image.eps=1e-5
--fact text.heads=2 --fact text.pool=argmax --fact text.causal=true --fact text.eps=1e-5 --fact text.activation=gelu"""
OPEN = {
    "--fact image.activation=VALUE": FOLDER,
    "--fact image.size=VALUE": "--fact image.size=28x56",
    "--fact image.heads=VALUE": "--fact image.heads=3 --fact text.heads=2",
    "--source-grid HxW": "--source-grid 2x3",
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_advice_of_a_refusal_works(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "named", lambda _name: openclip.clip(seed=3).to("meta"))
    make, offered, code = FOLLOWED[name]
    words = make()
    capsys.readouterr()
    assert main(words) == 1
    refusal = capsys.readouterr().err
    assert [option for option in offered if option not in refusal] == [], refusal
    assert [argument for argument in advised(refusal) if argument.name in PUBLIC] == [], refusal
    status = main([*words, *shlex.split(OPEN.get(offered[0], offered[0]))])
    assert status == code, capsys.readouterr().err
