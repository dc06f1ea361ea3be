"""What the absence of a key means: by key, and by a pattern; only where the format has no place for the key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keymap
from keymap.source import registry as registry_module
from keymap.source.registry import hubs

HUB = r"""format: plain
kind: hub
title: layers with biases
detect: {all: [layers.0.weight, layers.0.bias]}
absent_means:
  layers.(\d+).bias: 0
  scale: 1
towers:
  net:
    layers.(\d+).(weight|bias): layers.\1.\2
    scale: scale
"""
OTHER = r"""format: without
hub: plain
title: layers, with biases or without
detect: {all: [w0]}
towers:
  net:
    w(\d+): layers.\1.weight
variants:
  - when: {all: [b0]}
    when_hub: {all: [layers.9.weight]}
    towers:
      net:
        b(\d+): layers.\1.bias
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        self.scale = nn.Parameter(torch.tensor(2.0))


@pytest.fixture
def model(monkeypatch, tmp_path):
    monkeypatch.setattr(registry_module, "_registry", [hubs()])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "plain.yaml").write_text(HUB, encoding="utf-8")
    (tmp_path / "plain" / "without.yaml").write_text(OTHER, encoding="utf-8")
    keymap.register_mappings(tmp_path / "plain")
    return Model()


def saved(tmp_path, *names):
    shapes = {"w0": (2, 3), "w1": (1, 2), "b0": (2,), "b1": (1,)}
    torch.save({name: torch.rand(shapes[name]) for name in names}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_keys_of_a_pattern_are_filled_and_reported(model, tmp_path):
    plan = keymap.load_checkpoint(model, saved(tmp_path, "w0", "w1")).report.plan
    assert [model.layers[n].bias.abs().max().item() for n in (0, 1)] == [0, 0] and model.scale.item() == 1
    filled = {entry.key: entry.filled for entry in plan.entries if entry.filled}
    assert filled["layers.1.bias"] == "with 0, because format without has no such key"
    assert set(filled) == {"layers.0.bias", "layers.1.bias", "scale"}


def test_a_key_that_a_variant_of_the_format_has_is_missing_and_not_filled(model, tmp_path):
    before = model.layers[1].bias.clone()
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, saved(tmp_path, "w0", "w1", "b0"))
    assert "missing from the file: layers.1.bias" in str(caught.value)
    assert torch.equal(model.layers[1].bias, before)


def test_a_format_without_a_place_for_it_is_written_only_if_it_has_the_value(model, tmp_path):
    with pytest.raises(keymap.KeymapError, match=r"layers\.0\.bias"):
        keymap.convert_state_dict(model.state_dict(), "without")
    keymap.load_checkpoint(model, saved(tmp_path, "w0", "w1"))
    assert set(keymap.convert_state_dict(model.state_dict(), "without")) == {"w0", "w1"}


@pytest.mark.parametrize(
    ("words", "lacking", "loads"),
    [
        ("{value: 0, together: true}", ["layers.0.bias", "layers.1.bias"], True),
        ("{value: 0, together: true}", ["layers.1.bias"], False),
        ("0", ["layers.0.bias", "layers.1.bias"], False),
    ],
)
def test_a_file_of_the_hub_may_lack_all_keys_of_a_pattern_where_it_says_so(
    words, lacking, loads, monkeypatch, tmp_path
):
    monkeypatch.setattr(registry_module, "_registry", [hubs()])
    (tmp_path / "plain.yaml").write_text(
        HUB.replace("bias: 0", f"bias: {words}").replace(", layers.0.bias]", "]"), encoding="utf-8"
    )
    keymap.register_mappings(tmp_path / "plain.yaml")
    source, model = Model(), Model()
    torch.save({k: v for k, v in source.state_dict().items() if k not in lacking}, tmp_path / "x.pt")
    if loads:
        keymap.load_checkpoint(model, tmp_path / "x.pt")
        assert model.layers[0].bias.abs().max() == model.layers[1].bias.abs().max() == 0
        assert torch.equal(model.layers[1].weight, source.layers[1].weight)
    else:
        with pytest.raises(keymap.PlanError, match=r"layers\.1\.bias"):
            keymap.load_checkpoint(model, tmp_path / "x.pt")
