"""Words of settings and of folders, on a hub of their own: each with its effect, and without it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import keymap
from keymap.source import registry as registry_module
from keymap.source.registry import hubs

HUB = r"""format: press
kind: hub
title: two layers with heads
detect: {all: [first.weight, second.weight]}
absent_means:
  (first|second).bias: {value: 0, together: true}
facts:
  net.heads: {kind: count, model: [heads], label: heads, change: heads}
  net.act: {model: [act], label: activation, change: act}
  net.gated: {label: gate, change: the class}
  net.causal: {label: causal mask, change: the class}
config: {file: press.json, facts: {net.causal: causal}}
fixed: {net.causal: true}
towers:
  net:
    (first|second).(weight|bias): \1.\2
    extra.weight: extra.weight
"""
FORMAT = r"""format: pressed
hub: press
title: the same, in a folder
detect: {all: [a.weight, b.weight]}
towers:
  net:
    (a|b).(weight|bias): <1:layer>.\2
    c.weight: {to: extra.weight, optional: true}
lookups:
  layer: {a: first, b: second}
config: {file: settings.json, model: settings, facts: {net.act: act, net.gated: gated}}
repository:
  weights: pressed.safetensors
  one_file: true
  requires: {net.act: gelu}
  instead: {net.act: {net.gated: true}}
  refuse: [{when: {all: [c.weight]}, why: no class opens a third layer}]
  files:
    settings.json:
      heads: {fact: net.heads, divides: 'a.weight[0]'}
      author: {kept: about.author, model: [author], label: who made it}
"""
INSIDE = r"""format: boxed
hub: press
title: the same, with its settings in the checkpoint
detect: {all: [w1, w2]}
towers:
  net:
    w(1|2): <1:layer>.weight
lookups:
  layer: {1: first, 2: second}
config: {inside: args, facts: {net.heads: n_head}}
"""


class Press(nn.Module):
    """Names of the hub; every size differs."""

    def __init__(self, heads: object = 2, **more: object) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 5)
        self.heads = heads
        for name, value in more.items():
            setattr(self, name, value)


class Pressed(nn.Module):
    """A model of another library: names of the format."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)
        for name, value in more.items():
            setattr(self, name, value)


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """Registers the three files with some of their text replaced."""
    monkeypatch.setattr(registry_module, "_registry", [hubs()])

    def register(*changes: tuple[str, str]) -> None:
        for name, text in (("press", HUB), ("pressed", FORMAT), ("boxed", INSIDE)):
            for old, new in changes:
                text = text.replace(old, new)
            (tmp_path / "maps").mkdir(exist_ok=True)
            (tmp_path / "maps" / f"{name}.yaml").write_text(text, encoding="utf-8")
        keymap.register_mappings(tmp_path / "maps")

    return register


def boxed(model: nn.Module, **more: object) -> dict[str, object]:
    return {"model": {"w1": model.first.weight.data, "w2": model.second.weight.data}, **more}


@pytest.mark.parametrize(
    ("where", "file"), [("args", {"args": {"n_head": 4}}), (".", {"n_head": 4}), ("a.b", {"a": {"b": {"n_head": 4}}})]
)
def test_settings_inside_a_checkpoint_are_read_from_the_place_that_inside_names(where, file, registered, tmp_path):
    registered(("inside: args", f"inside: {where}"))
    torch.save(boxed(Press(), **file), tmp_path / "x.pt")
    (warning,) = keymap.plan_load(Press(2), tmp_path / "x.pt").warnings
    assert warning.startswith("heads: 4 in the source") and "n_head = 4), 2 in the model" in warning
    registered(("inside: args", "inside: elsewhere"))
    assert not keymap.plan_load(Press(2), tmp_path / "x.pt").warnings


def test_what_a_hub_fixes_is_compared_with_the_configuration_of_a_file(registered, tmp_path):
    registered()
    torch.save(Press().state_dict(), tmp_path / "x.pt")
    (tmp_path / "press.json").write_text('{"causal": false}')
    (warning,) = keymap.plan_load(Press(), tmp_path / "x.pt").warnings
    assert "causal mask: false in the source" in warning and "true in the model" in warning
    registered(("fixed: {net.causal: true}\n", ""))
    assert not keymap.plan_load(Press(), tmp_path / "x.pt").warnings


BY_KEYS = r"""variants:
  - when: {all: [w3]}
    when_hub: {all: [extra.weight]}
    fixed: {net.act: sine}
    towers: {net: {w3: extra.weight}}
  - when: {none: [w3]}
    when_hub: {none: [extra.weight]}
    fixed: {net.act: tanh}
    towers: {net: {w4: {to: extra.bias, optional: true}}}
config: {inside"""
EXTRA = ("    extra.weight: extra.weight", r"    extra.(weight|bias): extra.\1")


@pytest.mark.parametrize(("extra", "act"), [(True, "sine"), (False, "tanh")])
def test_a_variant_fixes_settings_of_files_with_its_keys_both_ways(extra, act, registered, tmp_path):
    registered(("config: {inside", BY_KEYS), EXTRA)
    file, model = boxed(Press()), Press(act="gelu")
    if extra:
        file["model"]["w3"] = torch.rand(6, 7)
        model.extra = nn.Linear(7, 6, bias=False)
    torch.save(file, tmp_path / "x.pt")
    (warning,) = keymap.plan_load(model, tmp_path / "x.pt").warnings
    assert f"activation: {act} in the source (format boxed), gelu in the model" in warning
    for bias in (model.first.bias, model.second.bias):
        nn.init.zeros_(bias)
    notes = keymap.save_checkpoint(model, tmp_path / "y.safetensors", "boxed").notes
    assert any(f"gelu in the source (the model), and boxed means {act}" in note for note in notes)
    model.act = act
    assert not keymap.plan_load(model, tmp_path / "x.pt").warnings
    assert not keymap.save_checkpoint(model, tmp_path / "y.safetensors", "boxed").notes


def test_a_setting_that_a_variant_fixes_must_be_a_fact_of_the_hub(registered):
    with pytest.raises(keymap.MappingError, match=r"boxed\.yaml:\d+:\d+: .*net\.action"):
        registered(("config: {inside", BY_KEYS.replace("net.act: sine", "net.action: sine")), EXTRA)


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [("count", 0, 4), ("index", -1, 4), ("positive", -0.5, 0.5), ("flag", 4, True), ("word", True, "four")],
)
def test_a_folder_with_a_setting_of_another_kind_is_refused(kind, wrong, right, registered, tmp_path):
    more = (("kind: count", f"kind: {kind}"), (", divides: 'a.weight[0]'", ""))
    registered(*more)
    with pytest.raises(keymap.PlanError, match=r"net\.heads: .* is no "):
        keymap.save_checkpoint(Press(wrong, act="gelu"), tmp_path / "out", "pressed")
    assert not (tmp_path / "out").exists()
    keymap.save_checkpoint(Press(right, act="gelu"), tmp_path / "out", "pressed")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["heads"] == right
    registered(*more, (f"kind: {kind}, ", ""))
    keymap.save_checkpoint(Press(wrong, act="gelu"), tmp_path / "any", "pressed")


def test_a_number_that_does_not_divide_a_length_is_refused(registered, tmp_path):
    registered()
    with pytest.raises(keymap.PlanError, match=r"net.heads: 3 does not divide 8, the length of a.weight\[0\]"):
        keymap.save_checkpoint(Press(3, act="gelu"), tmp_path / "out", "pressed")
    registered(("kind: count, ", ""))
    with pytest.raises(keymap.PlanError, match=r"net.heads: 0 does not divide 8"):
        keymap.save_checkpoint(Press(0, act="gelu"), tmp_path / "out", "pressed")
    registered(("divides: 'a.weight[0]'", "divides: 'a.weight[1]'"))
    keymap.save_checkpoint(Press(3, act="gelu"), tmp_path / "out", "pressed")


def test_a_setting_that_another_one_shows_instead_is_not_asked_for(registered, tmp_path):
    registered()
    with pytest.raises(keymap.PlanError, match=r"activation \(the format has only gelu\); pass facts={'net.act'"):
        keymap.save_checkpoint(Press(), tmp_path / "out", "pressed")
    keymap.save_checkpoint(Press(), tmp_path / "out", "pressed", facts={"net.gated": True})
    with pytest.raises(keymap.PlanError, match=r"the format has only gelu"):
        keymap.save_checkpoint(Press(), tmp_path / "other", "pressed", facts={"net.gated": False})


def test_a_folder_that_no_class_opens_is_refused_and_a_file_is_written(registered, tmp_path):
    registered()
    model = Press(act="gelu")
    model.extra = nn.Linear(7, 6, bias=False)
    with pytest.raises(keymap.PlanError, match=r"a folder of pressed cannot be written: no class opens a third layer"):
        keymap.save_checkpoint(model, tmp_path / "out", "pressed")
    keymap.save_checkpoint(model, tmp_path / "x.safetensors", "pressed")
    keymap.save_checkpoint(Press(act="gelu"), tmp_path / "out", "pressed")


def test_a_folder_of_one_file_is_not_cut_into_shards(registered, tmp_path):
    registered()
    model = Press(act="gelu")
    with pytest.raises(keymap.PlanError, match=r"what reads a folder of pressed knows no shards"):
        keymap.save_checkpoint(model, tmp_path / "out", "pressed", max_shard_size=100)
    keymap.save_checkpoint(model, tmp_path / "out", "pressed", max_shard_size=10_000)
    registered(("  one_file: true\n", ""))
    result = keymap.save_checkpoint(model, tmp_path / "cut", "pressed", max_shard_size=200)
    assert sum(file.endswith(".safetensors") for file in result.files) > 1


def test_a_file_of_one_section_alone_holds_what_is_in_it(registered, tmp_path):
    sections = """  alone: [first, extra]
  files:
    settings.json:
      kind: both
      first: {width: {from: 'a.weight[0]'}}
      extra: {width: {from: 'c.weight[0]'}}
"""
    registered((FORMAT[FORMAT.index("  refuse: ") :], sections))
    model = Press(act="gelu")
    keymap.save_checkpoint(model, tmp_path / "one", "pressed")
    assert json.loads((tmp_path / "one" / "settings.json").read_text()) == {"width": 8}
    model.extra = nn.Linear(7, 6, bias=False)
    keymap.save_checkpoint(model, tmp_path / "two", "pressed")
    both = {"kind": "both", "first": {"width": 8}, "extra": {"width": 6}}
    assert json.loads((tmp_path / "two" / "settings.json").read_text()) == both


def test_a_kept_value_comes_from_the_sources_own_file_or_from_the_model(registered, tmp_path):
    registered()

    def author(folder):
        return json.loads((folder / "settings.json").read_text()).get("author")

    result = keymap.save_checkpoint(Press(act="gelu"), tmp_path / "none", "pressed")
    assert author(tmp_path / "none") is None and any("about.author (who made it)" in note for note in result.notes)
    keymap.save_checkpoint(Press(act="gelu", author="Ada"), tmp_path / "a", "pressed")
    assert author(tmp_path / "a") == "Ada"
    settings = {"heads": 2, "act": "gelu", "about": {"author": "Bea"}}
    (tmp_path / "a" / "settings.json").write_text(json.dumps(settings))
    keymap.convert_checkpoint(tmp_path / "a", tmp_path / "b", "pressed", facts={"net.heads": 2})
    assert author(tmp_path / "b") == "Bea"


def test_the_configuration_that_a_model_holds_is_read_where_model_names_it(registered, tmp_path):
    registered()
    model = Pressed(settings={"act": "gelu"})
    keymap.save_checkpoint(model, tmp_path / "out", "pressed", facts={"net.heads": 4})
    registered(("model: settings, ", ""))
    with pytest.raises(keymap.PlanError, match=r"pass facts={'net.act'"):
        keymap.save_checkpoint(model, tmp_path / "other", "pressed", facts={"net.heads": 4})


@pytest.mark.parametrize("lacking", [("first.bias", "second.bias"), ("second.bias",)])
def test_keys_that_are_absent_together_are_filled_together(lacking, registered, tmp_path):
    registered()
    source, model = Press(), Press()
    torch.save({k: v for k, v in source.state_dict().items() if k not in lacking}, tmp_path / "x.pt")
    if len(lacking) == 1:
        with pytest.raises(keymap.PlanError, match=r"second\.bias"):
            keymap.load_checkpoint(model, tmp_path / "x.pt")
        assert model.first.bias.abs().max() > 0
        return
    keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert model.first.bias.abs().max() == model.second.bias.abs().max() == 0
    registered(("{value: 0, together: true}", "0"))
    with pytest.raises(keymap.PlanError, match=r"first\.bias"):
        keymap.load_checkpoint(model, tmp_path / "x.pt")


AGREES = {  # a is 8 x 3 and b is 5 x 8; two heads
    "two lengths": ("from: 'a.weight[1]', agrees: {from: 'b.weight[1]'}", "one number, and it is 3 by a.*, and 8 by b"),
    "the other by a fact": (
        "from: 'a.weight[1]', agrees: {from: 'b.weight[1]', divide: net.heads}",
        r"it is 3 by a.weight\[1\], and 4 by b.weight\[1\] and net.heads = 2",
    ),
    "the first by a fact": (
        "from: 'a.weight[0]', divide: net.heads, agrees: {from: 'b.weight[1]'}",
        r"it is 4 by a.weight\[0\] and net.heads = 2, and 8 by",
    ),
    "by a length": (
        "from: 'a.weight[0]', divide: 'a.weight[1]', agrees: {from: 'b.weight[1]'}",
        "it is 2 by a.*, and 8",
    ),
    "the same": ("from: 'a.weight[0]', agrees: {from: 'b.weight[1]'}", ""),
    "of no tensor": ("from: 'a.weight[0]', agrees: {from: 'c.weight[1]'}", ""),
}


@pytest.mark.parametrize("name", AGREES)
def test_computed_values_of_a_folder_that_do_not_agree_are_refused(name, registered, tmp_path):
    value, wrong = AGREES[name]
    registered(("author: {kept", f"width: {{{value}}}\n      author: {{kept"))
    if not wrong:
        keymap.save_checkpoint(Press(act="gelu"), tmp_path / "out", "pressed")
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["width"] == 8
        return
    with pytest.raises(keymap.PlanError, match=wrong):
        keymap.save_checkpoint(Press(act="gelu"), tmp_path / "out", "pressed")
    assert not (tmp_path / "out").exists()
