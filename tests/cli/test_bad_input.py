"""Bad input, through the command and through the library: one cause a message, and what to do next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import openclip

import keymap
from keymap.cli import targets
from keymap.cli.advice import in_options
from keymap.cli.main import main

FILES = ("hf.safetensors", "own.safetensors", "siglip.safetensors", "big.pt", "text.txt", "notes/readme.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with checkpoints, and with files that are none."""
    folder = tmp_path_factory.mktemp("work")
    model = openclip.clip(seed=1)
    keymap.save_checkpoint(model, folder / "hf.safetensors", "hf_clip")
    keymap.save_checkpoint(model, folder / "own.safetensors", "open_clip")
    keymap.save_checkpoint(openclip.siglip(seed=1), folder / "siglip.safetensors", "hf_siglip")
    torch.save({**model.state_dict(), "logit_scale": torch.tensor(1e6)}, folder / "big.pt")
    (folder / "text.txt").write_text("hello")
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("x")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(targets, "named", lambda _name: openclip.clip(seed=3).to("meta"))
    before = {file: Path(file).read_bytes() for file in FILES}
    yield folder
    assert sorted(file for file in FILES if Path(file).read_bytes() != before[file]) == []
    assert sorted(os.listdir(folder)) == sorted({*(Path(file).parts[0] for file in FILES), "empty"})


CONVERSIONS = {  # words after `convert`, the same as arguments, the refusal
    "an unknown format": (
        ["hf.safetensors", "y.pt", "--to", "hf_clop"],
        {},
        "there is no format 'hf_clop' to convert to; did you mean 'hf_clip'?",
    ),
    "a format of another hub": (
        ["hf.safetensors", "y.pt", "--to", "meta_lama"],
        {},
        "there is no format 'meta_lama' to convert to; did you mean 'meta_llama'?",
    ),
    "a missing folder": (
        ["hf.safetensors", "no/y.pt", "--to", "open_clip"],
        {},
        "no/y.pt: the folder no does not exist; create it first",
    ),
    "a missing folder of a folder": (
        ["hf.safetensors", "no/y", "--to", "open_clip"],
        {},
        "no/y: the folder no does not exist; create it first",
    ),
    "a file for a folder": (
        ["hf.safetensors", "text.txt/y.pt", "--to", "open_clip"],
        {},
        "text.txt/y.pt: text.txt is a file, not a folder; choose another destination",
    ),
    "a folder that is not empty": (
        ["hf.safetensors", "notes", "--to", "hf_clip"],
        {},
        "notes: is not empty; choose another folder, or pass overwrite=True to write into it",
    ),
    "a format without folders": (
        ["hf.safetensors", "notes", "--to", "openai"],
        {},
        "openai has no layout of a folder; pass a file, for example one that ends with .safetensors",
    ),
    "the same file": (
        ["hf.safetensors", "./hf.safetensors", "--to", "open_clip"],
        {},
        "hf.safetensors: is a file that is read; choose another destination",
    ),
    "another suffix": (
        ["hf.safetensors", "y.gguf", "--to", "open_clip"],
        {},
        "y.gguf: its suffix shows no container that keymap writes; use one of .safetensors, .pt, .pth, .bin, .npz, or "
        "a name without a suffix for a folder",
    ),
    "a dtype that loses range": (
        ["big.pt", "y.pt", "--to", "hf_clip", "--dtype", "float16"],
        {"dtype": "float16"},
        "logit_scale: its largest value 1e+06 does not fit float16; pass dtype='float32'",
    ),
    "a dtype of integers": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--dtype", "int8"],
        {"dtype": "int8"},
        "dtype='int8': expected the name of a floating dtype, one of float64, float32, float16, bfloat16, "
        "float8_e4m3fn, float8_e5m2",
    ),
    "a shard smaller than a tensor": (
        ["hf.safetensors", "y.safetensors", "--to", "open_clip", "--max-shard-size", "1KB"],
        {"max_shard_size": "1KB"},
        "max_shard_size=1000: visual.conv1.weight has 112896 bytes; pass max_shard_size=112896 or more",
    ),
    "a shard size that is no size": (
        ["hf.safetensors", "y.safetensors", "--to", "open_clip", "--max-shard-size", "huge"],
        {"max_shard_size": "huge"},
        "max_shard_size='huge': expected a number of bytes, or a text such as '5GB'",
    ),
    "shards of another container": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--max-shard-size", "150KB"],
        {"max_shard_size": "150KB"},
        "y.pt: only .safetensors is written in shards; write that, or leave max_shard_size= out",
    ),
    "no checkpoint": (
        ["nothing.pt", "y.pt", "--to", "open_clip"],
        {},
        "nothing.pt: does not exist; check the path",
    ),
    "a folder without a checkpoint": (
        ["notes", "y.pt", "--to", "open_clip"],
        {},
        "notes: is a folder without a weight file, only readme.md; pass a checkpoint",
    ),
    "a text file": (
        ["text.txt", "y.pt", "--to", "open_clip"],
        {},
        "text.txt: is a text file that begins with 'hello'; pass the file with the weights",
    ),
    "an unknown tower": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--tower", "vision"],
        {"towers": ("vision",)},
        "towers=('vision',): unknown: 'vision'; the towers are image, text, decoder, scale",
    ),
    "no mapping file": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--mapping", "nothing.yaml"],
        {"mapping": "nothing.yaml"},
        "nothing.yaml: the mapping file does not exist; check the path",
    ),
    "a wrapper that is not there": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--wrapper", "text_modle"],
        {"wrapper": "text_modle"},
        "hf.safetensors: there are no tensors under wrapper='text_modle'; the file has no wrapper; did you mean "
        "wrapper='text_model' or wrapper='text_model.encoder'?",
    ),
    "a fact of zero": (
        ["hf.safetensors", "y.pt", "--to", "open_clip", "--fact", "image.heads=0"],
        {"facts": {"image.heads": 0}},
        "facts={'image.heads': 0}: expected names and positive integers, for example facts={'image.heads': 12}",
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_of_bad_input_names_one_cause(name, here, capsys):
    words, arguments, wanted = CONVERSIONS[name]
    source, destination, _, to = words[:4]
    with pytest.raises(keymap.KeymapError) as refused:
        keymap.convert_checkpoint(source, destination, to, **arguments)
    assert (refused.value.summary, refused.value.faults) == (wanted, ())
    assert main(["convert", *words]) == 1
    assert capsys.readouterr() == ("", f"keymap: {in_options(wanted)}\n")


def test_a_format_that_is_only_read_is_one_fault(here, capsys):
    assert main(["convert", "hf.safetensors", "y.pt", "--to", "longclip"]) == 1
    first, *faults = capsys.readouterr().err.splitlines()
    assert first == "keymap: hf.safetensors (format hf_clip) cannot be written as longclip"
    assert len(faults) == 1 and "longclip is read and not written: its rule for positional_embedding" in faults[0]


def test_a_tower_of_another_architecture_is_one_fault(here, capsys):
    assert main(["convert", "siglip.safetensors", "y.pt", "--to", "hf_clip"]) == 1
    faults = capsys.readouterr().err.splitlines()[1:]
    assert len(faults) == 1 and "image tower has layout map_trunk, the target needs native_vit" in faults[0]


OTHERS = {
    "a folder to look into": (
        ["inspect", "empty"],
        "empty: is a folder without a weight file; pass a checkpoint",
    ),
    "a name of the hub": (
        ["inspect", "openai/clip-vit-base-patch32"],
        "openai/clip-vit-base-patch32: there is no such file; if it is a repository of the Hugging Face hub, download "
        "it first with `hf download openai/clip-vit-base-patch32`, in Python "
        "huggingface_hub.snapshot_download('openai/clip-vit-base-patch32'), and pass the folder",
    ),
    "nothing to be like": (
        ["plan", "hf.safetensors", "--like", "missing.safetensors"],
        "missing.safetensors: does not exist; check the path",
    ),
    "a text to be like": (
        ["plan", "hf.safetensors", "--like", "text.txt"],
        "text.txt: is a text file that begins with 'hello'; pass the file with the weights",
    ),
    "a grid of no patches": (
        ["plan", "hf.safetensors", "--model", "x", "--source-grid", "0x0"],
        "--source-grid 0x0: expected the rows and columns of patches, for example --source-grid 14x14",
    ),
    "a wrapper for an unknown tower": (
        ["plan", "hf.safetensors", "--model", "x", "--wrapper", "sound=a"],
        "--wrapper sound=a: expected a path in the file, or one for each tower; the towers are image, text, decoder, "
        "scale",
    ),
    "a page in place of a checkpoint": (
        ["plan", "own.safetensors", "--model", "x", "--html", "own.safetensors"],
        "--html own.safetensors: pass a name that ends with .html, for example plan.html",
    ),
    "a page in a missing folder": (
        ["explain", "hf_clip", "--html", "no/x.html"],
        "no/x.html: the folder no does not exist; create it first",
    ),
    "no second file": (
        ["diff", "hf.safetensors", "missing.pt"],
        "missing.pt: does not exist; check the path",
    ),
    "a tolerance below zero": (
        ["diff", "hf.safetensors", "own.safetensors", "--tolerance=-1"],
        "--tolerance -1.0: expected a number that is zero or more, for example 1e-5",
    ),
    "no mapping to explain": (
        ["explain", "nothing.yaml"],
        "nothing.yaml: the mapping file does not exist; check the path",
    ),
    "no mapping to check": (
        ["check", "empty"],
        "empty: the folder has no .yaml file; pass a mapping file, or a folder of them",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_input_of_another_command_names_one_cause(name, here, capsys):
    words, wanted = OTHERS[name]
    assert main(words) == 1
    assert capsys.readouterr() == ("", f"keymap: {wanted}\n")


def test_architectures_that_differ_are_compared_in_what_is_left(here, capsys):
    assert main(["diff", "hf.safetensors", "siglip.safetensors"]) == 1
    faults = capsys.readouterr().err.splitlines()[1:]
    assert "layout native_vit in a and map_trunk in b" in faults[0]
    assert faults[1:] == ["  - compare what is left with --tower text"]
    assert main(["diff", "hf.safetensors", "siglip.safetensors", "--tower", "text"]) == 1
    assert capsys.readouterr().out.startswith("--- hf.safetensors")


@pytest.mark.parametrize(("name", "hint"), [("ViT-B-33", "did you mean ViT-B-32"), ("", "keymap inspect FILE")])
def test_an_unknown_model_has_near_names_or_a_next_step(name, hint, folder, capsys):
    assert main(["plan", str(folder / "hf.safetensors"), "--model", name]) == 1
    printed = capsys.readouterr().err
    assert (
        printed.startswith(f"keymap: --model {name or repr('')}: OpenCLIP has no such configuration")
        and hint in printed
    )


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("colour", [True, False])
def test_a_real_terminal_of_any_width_loses_no_text(columns, colour, folder):
    """A terminal of the system, so that what decides on colours and on the width is the command's own."""
    import pty

    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(columns),
        "TERM": "xterm",
        "PYTHONPATH": str(Path(keymap.__file__).parents[1]),
    }
    environment |= {} if colour else {"NO_COLOR": "1"}
    words = [sys.executable, "-m", "keymap", "inspect", "hf.safetensors"]
    running = subprocess.Popen(words, stdout=slave, stderr=slave, stdin=subprocess.DEVNULL, env=environment, cwd=folder)
    os.close(slave)
    printed = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(master)
    assert running.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode())
    assert max(map(len, text.splitlines())) <= columns
    piped = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=folder).stdout
    assert sorted(re.sub(r"[\s:]", "", text)) == sorted(re.sub(r"[\s:]", "", piped))
    assert colour or not re.search(rb"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])m", printed)
    assert "\x1b" not in piped
