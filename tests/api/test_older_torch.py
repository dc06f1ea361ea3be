"""The oldest torch that pyproject.toml allows is enough: names that it lacks are not needed, nor calls it refuses."""

from __future__ import annotations

import subprocess
import sys

from peers import hf
from safetensors.torch import save_file

# torch 2.4.1 has none of these names, and its increment_version takes one tensor, which was not made in inference mode
OLDER = """
import sys, torch
newer = {"float8_e8m0fnu": vars(torch).pop("float8_e8m0fnu", None)}
vars(torch.serialization).pop("skip_data", None)

real = torch.autograd.graph.increment_version

def increment_version(tensor):
    if not isinstance(tensor, torch.Tensor):
        raise RuntimeError("increment_version expect a Tensor as input")
    if tensor.is_inference():
        raise RuntimeError("Inference tensors do not track version counter.")
    real(tensor)

torch.autograd.graph.increment_version = increment_version
import keymap
from torch import nn

for name in keymap.__all__:
    getattr(keymap, name)
vars(torch).update({name: value for name, value in newer.items() if value})  # this torch itself needs it to write

source, folder, rules = sys.argv[1:]
for name in ("a.pt", "a.safetensors", "a.npz"):
    keymap.convert_checkpoint(source, f"{folder}/{name}", "open_clip")
    assert keymap.compare_checkpoints(source, f"{folder}/{name}").equal

keymap.inspect_checkpoint(source)
mapping = f"{folder}/mine.yaml"
open(mapping, "w").write(rules)
torch.save({"a": torch.ones(3, 3), "b": torch.zeros(3, 3)}, f"{folder}/ab.pt")
for inference in (False, True):
    with torch.inference_mode(inference):
        model = nn.Module()
        model.register_buffer("c", torch.full((6, 3), 5.0))
        before = None if inference else model.c._version
        keymap.load_checkpoint(model, f"{folder}/ab.pt", mapping=mapping)
        assert model.c.sum() == 9 and (inference or model.c._version > before)
print("right")
"""

RULES = """
format: mine
hub: any
title: two tensors that the model has as one
towers:
  model:
    (a|b): {to: c, concat: 0}
"""


def test_a_torch_without_newer_names_loads_and_writes(tmp_path):
    save_file(hf.disk_keys(hf.clip(seed=1)), tmp_path / "source.safetensors")
    command = [sys.executable, "-c", OLDER, str(tmp_path / "source.safetensors"), str(tmp_path), RULES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr
