"""A newcomer's first ten minutes with the built wheel: install, inspect, plan with a picture, convert, compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from peers import hf, openclip
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The command of a fresh environment with the wheel; what the wheel depends on comes from this environment."""
    place = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "env", with_pip=False)
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        place / "env" / "bin" / "python",
        "install",
        "--quiet",
        "--no-deps",
    ]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    own = sysconfig.get_paths()["purelib"]
    links = site / "dependencies"
    links.mkdir()
    for path in Path(own).iterdir():
        if "keymap" not in path.name.lower() and path.suffix != ".pth":
            (links / path.name).symlink_to(path)
    (site / "dependencies.pth").write_text(f"{links}\n")
    return place / "env" / "bin"


def run(command, *arguments, folder, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_first_ten_minutes(installed, tmp_path):
    keymap = installed / "keymap"
    hf.clip(seed=1).save_pretrained(tmp_path / "theirs")
    torch.save(openclip.clip(seed=2).state_dict(), tmp_path / "mine.pt")
    where = run(installed / "python", "-c", "import keymap; print(keymap.__file__)", folder=tmp_path)
    assert where.startswith(str(installed.parent))
    assert "hf_clip" in run(keymap, "formats", folder=tmp_path)
    assert "format hf_clip" in run(keymap, "inspect", "theirs", folder=tmp_path)
    plan = ("plan", "theirs", "--like", "mine.pt", "--html", "plan.html")
    assert "loaded: " in run(keymap, *plan, folder=tmp_path)
    assert (tmp_path / "plan.html").read_text().startswith("<!DOCTYPE html>")
    run(keymap, "convert", "theirs", "ours.safetensors", "--to", "open_clip", folder=tmp_path)
    assert "visual.conv1.weight" in load_file(tmp_path / "ours.safetensors")
    assert "equal: " in run(keymap, "diff", "theirs", "ours.safetensors", folder=tmp_path)
    different = json.loads(run(keymap, "diff", "theirs", "mine.pt", "--json", folder=tmp_path, code=1))
    assert different["result"]["equal"] is False
    refused = json.loads(run(keymap, "convert", "theirs", "x.pt", "--to", "hf_clp", "--json", folder=tmp_path, code=1))
    assert "did you mean 'hf_clip'" in refused["error"]["message"]
    explained = run(
        installed / "python", "-m", "keymap", "explain", "hf_clip", "--html", "hf_clip.html", folder=tmp_path
    )
    assert explained and (tmp_path / "hf_clip.html").exists()
