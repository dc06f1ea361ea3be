"""OpenCLIP's own files load bit for bit: every layout of its configurations, small.

`peers.layouts` has one model for each set of keys that the 144 configurations have; `test_coverage` carries what is
proved here over to full size.
"""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from checks import complete
from peers import layouts, openclip
from peers.common import same_bits, tensors
from safetensors.torch import save_file

import keymap

pytestmark = pytest.mark.formats("open_clip")

OWN = {  # beside the layouts of the next test
    "clip": openclip.clip,
    "custom": openclip.custom,
    "timm trunk, no class position": lambda **k: openclip.clip_trunk(no_embed_class=True, **k),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("container", ["safetensors", "pt", "legacy pt", "wrapped pt"])
def test_open_clip_loads_its_own_files_bit_for_bit(name, container, tmp_path):
    source, model = OWN[name](seed=1), OWN[name](seed=2)
    path = tmp_path / "file"
    if container == "safetensors":
        save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    elif container == "wrapped pt":
        prefixed = {f"module.{k}": v for k, v in source.state_dict().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": prefixed}, path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=container == "pt")
    result = keymap.load_checkpoint(model, path)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    wrong = [k for k, v in source.state_dict().items() if not same_bits(v, model.state_dict()[k])]
    assert not wrong
    assert result.report.plan.format == "open_clip"


ZEROS = {"visual.trunk.head.bias", "visual.trunk.head.fc.bias"}  # of the small models, as their files have none


@pytest.mark.parametrize("container", ["safetensors", "pt"])
@pytest.mark.parametrize("name", layouts.MODELS)
def test_its_own_file_loads_as_open_clip_loads_it_bit_for_bit(name, container, file, tmp_path, proves):
    source, ours = layouts.MODELS[name](seed=1), layouts.MODELS[name](seed=2)
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    path = tmp_path / "model.pt"
    if container == "safetensors":
        path = file(source.state_dict())
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    open_clip.load_checkpoint(theirs, str(path))
    plan = complete(keymap.load_checkpoint(ours, path), "open_clip")
    wanted, state = tensors(theirs), tensors(ours)
    assert [key for key, value in wanted.items() if not same_bits(value, state[key])] == []
    assert [key for key, value in source.state_dict().items() if not same_bits(value, state[key])] == []
    random = {key for key, value in before.state_dict().items() if value.ndim and value.is_floating_point()}
    assert [key for key in random if same_bits(tensors(before)[key], state[key]) and key not in ZEROS] == []
    proves("bit-equal", plan)
