"""What a folder's file says by a setting, by lengths of several tensors, and what a variant fixes."""

from __future__ import annotations

import json

import pytest
import torch

import keymap
from keymap.source import registry as registry_module
from keymap.source.registry import hubs

HUB = r"""
format: waves
kind: hub
title: layers, some with a window
detect: {all: [layers.0.w, out.w]}
towers:
  net:
    layers.(\d+).(w|near|gate): layers.\1.\2
    out.(w|b): out.\1
fixed: {net.turns: 1}
facts:
  net.act: {kind: word, model: [act], words: {null: none}, label: activation, change: act}
  net.turns: {kind: count}
repository:
  weights: model.safetensors
  requires: {net.turns: 1}
  files:
    config.json:
      act: {fact: net.act, cases: {none: null, (relu|gelu): {fact: net.act}, 'leaky_(\d+)': {cases: {out.w: leaky}}}}
      shift: {fact: net.turns, cases: {null: 7, (.+): {fact: net.turns}}}
      window: {from: 'shortest layers.(\d+).near[0]'}
      whole: {from: 'longest layers.(\d+).near[0]'}
      ids: {kept: ids, model: [ids], none_is_null: true}
      more: {kept: more, model: [more]}
"""
FORMAT = r"""
format: old_waves
hub: waves
title: the same under other names
detect: {all: [l0, o]}
towers:
  net:
    l(\d+): layers.\1.w
    n(\d+): {to: layers.\1.near, optional: true}
    o: out.w
variants:
  - when: {all: [gate]}
    when_hub: {all: [layers.0.gate]}
    towers: {net: {gate: layers.0.gate}}
    fixed: {net.act: gelu}
  - when: {none: [gate]}
    when_hub: {none: [layers.0.gate]}
    towers: {net: {bias: {to: out.b, optional: true}}}
    fixed: {net.act: relu}
"""
FILE = {"l0": 1, "l1": 1, "l2": 1, "l3": 1, "n0": 5, "n1": 9, "n2": 5, "n3": 9, "o": 2}


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A file of the format; what is registered is forgotten after the test."""
    monkeypatch.setattr(registry_module, "_registry", [hubs()])
    (tmp_path / "waves").mkdir()
    for name, text in (("waves", HUB), ("old_waves", FORMAT)):
        (tmp_path / "waves" / f"{name}.yaml").write_text(text, encoding="utf-8")
    keymap.register_mappings(tmp_path / "waves")
    torch.save({key: torch.rand(length) for key, length in FILE.items()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


class Waves(torch.nn.Module):
    ids = more = None

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for number, layer in enumerate(self.layers):
            layer.w, layer.near = (torch.nn.Parameter(torch.rand(n)) for n in (1, 3 + number))
        self.out = torch.nn.Module()
        self.out.w = torch.nn.Parameter(torch.rand(2))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_variant_fixes_a_setting_and_lengths_are_picked(source, tmp_path):
    keymap.convert_checkpoint(source, tmp_path / "out", "waves")
    assert config(tmp_path / "out") == {"act": "relu", "shift": 1, "window": 5, "whole": [1, 3]}


@pytest.mark.parametrize(("act", "written"), [(None, None), ("gelu", "gelu"), ("leaky_2", "leaky")])
def test_a_case_is_chosen_by_the_models_setting_and_none_can_be_a_value(act, written, source, tmp_path):
    keymap.save_checkpoint(Waves(act), tmp_path / "out", "waves")
    wanted = {"act": written, "shift": 1, "window": 3, "whole": [1], "ids": None}
    assert config(tmp_path / "out") == wanted


def test_a_setting_without_a_case_is_refused_or_asked_for(source, tmp_path):
    with pytest.raises(keymap.PlanError, match=r"activation: tanh in the source, and the format has only none or"):
        keymap.save_checkpoint(Waves("tanh"), tmp_path / "out", "waves")
    model = Waves("gelu")
    torch.save(model.state_dict(), tmp_path / "own.pt")
    with pytest.raises(keymap.PlanError, match=r"net\.act: activation \(the format has only none or \(relu\|gelu\) or"):
        keymap.convert_checkpoint(tmp_path / "own.pt", tmp_path / "out", "waves")
    with pytest.raises(keymap.PlanError, match=r"net\.turns: 2 in the source, and the format has only 1"):
        keymap.save_checkpoint(model, tmp_path / "out", "waves", facts={"net.turns": 2})
