"""Several hubs: which one a model, a file, a name or a mapping belongs to, and that each loads and is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import openclip
from peers.common import randomised
from torch import nn

import keymap
from keymap.language.compile import evidence_in
from keymap.language.header import read_header
from keymap.source import registry as registry_module
from keymap.source.registry import hubs

ROOT = Path(__file__).parents[2]
HUB = r"""format: nano
kind: hub
title: nanoGPT's GPT
detect: {all: [transformer.wte.weight, lm_head.weight, transformer.h.0.attn.c_attn.weight]}
towers:
  text:
    transformer.(.+): transformer.\1
    lm_head.weight: lm_head.weight
"""
GPT2 = r"""format: conv_gpt
hub: nano
title: GPT-2 with kernels of (in, out)
detect: {all: [h.0.attn.c_attn.weight, wte.weight]}
ignore:
  h.(\d+).attn.(bias|masked_bias): the causal mask
towers:
  text:
    wte.weight: {to: [transformer.wte.weight, lm_head.weight]}
    pos.weight: transformer.pos.weight
    h.(\d+).: {to: 'transformer.h.\1.', table: block}
    ln_f.(weight|bias): transformer.ln_f.\1
tables:
  block:
    ln_(1|2).(weight|bias): ln_\1.\2
    (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).weight: {to: \1.weight, view: in out -> out in}
    (attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj).bias: \1.bias
"""
WIDTH, LAYERS, WORDS, ROWS = 6, 2, 11, 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})


class Nano(nn.Module):
    """A model with nanoGPT's names."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(WORDS, WIDTH),
                "pos": nn.Embedding(ROWS, WIDTH),
                "h": nn.ModuleList(Block() for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


def gpt2_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same weights as GPT-2's Conv1D has them, by hand."""
    state = {key.removeprefix("transformer."): value for key, value in model.state_dict().items()}
    del state["lm_head.weight"]
    kernels = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {key: value.t().contiguous() if key.endswith(kernels) else value for key, value in state.items()}


@pytest.fixture
def fresh(monkeypatch):
    """Registered mappings are forgotten after the test."""
    monkeypatch.setattr(registry_module, "_registry", [hubs()])


@pytest.fixture
def nano(fresh, tmp_path):
    """A folder with a hub and a format of it, registered."""
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "nano.yaml").write_text(HUB, encoding="utf-8")
    (folder / "conv_gpt.yaml").write_text(GPT2, encoding="utf-8")
    assert keymap.register_mappings(folder) == ["conv_gpt", "nano"]
    return folder


def test_a_model_takes_the_hub_of_its_keys_and_the_file_is_converted_to_its_names(nano, tmp_path):
    theirs, mine = Nano(), Nano()
    torch.save(gpt2_of(theirs), tmp_path / "gpt2.pt")
    result = keymap.load_checkpoint(mine, tmp_path / "gpt2.pt")
    assert result.report.plan.format == "conv_gpt"
    for key, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key
    assert mine.lm_head.weight is mine.transformer["wte"].weight


def test_the_way_back_writes_the_other_format_bit_for_bit(nano, tmp_path):
    model = Nano()
    expected = gpt2_of(model)
    written = keymap.convert_state_dict(model.state_dict(), "conv_gpt")
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    keymap.save_checkpoint(model, tmp_path / "x.safetensors", "conv_gpt")
    assert keymap.compare_checkpoints(tmp_path / "x.safetensors", model).equal
    back = keymap.convert_state_dict(written, "nano")
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


def test_a_file_of_one_hub_is_refused_by_a_model_of_another(nano, tmp_path):
    torch.save(gpt2_of(Nano()), tmp_path / "gpt2.pt")
    with pytest.raises(keymap.KeymapError, match="no known format has these keys") as caught:
        keymap.load_checkpoint(openclip.clip(), tmp_path / "gpt2.pt")
    assert caught.value.faults[0] == "they are those of format conv_gpt of hub nano"
    torch.save(openclip.clip().state_dict(), tmp_path / "clip.pt")
    model = Nano()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(keymap.KeymapError, match="no known format has these keys") as caught:
        keymap.load_checkpoint(model, tmp_path / "clip.pt")
    assert caught.value.faults[0] == "they are those of format open_clip of hub open_clip"
    assert "this call is about hub nano" in caught.value.faults[1]
    with pytest.raises(keymap.KeymapError, match="of format conv_gpt of hub nano"):
        keymap.convert_checkpoint(tmp_path / "gpt2.pt", tmp_path / "x.safetensors", "hf_clip")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_clip_loads_as_before(nano, tmp_path):
    theirs = openclip.clip()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    assert keymap.load_checkpoint(openclip.clip(), tmp_path / "clip.pt").report.plan.format == hubs().default


# --- rules that lead to a model's own names ---

MINE = r"""format: theirs_to_mine
hub: any
title: their names to mine
towers:
  model:
    encoder.layer_(\d+)/(w|b): blocks.\1.<2:end>
    head/w: {to: out.weight, view: in out -> out in}
    head/b: out.bias
lookups:
  end: {w: weight, b: bias}
"""


class Mine(nn.Module):
    """A model that no hub knows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.out = nn.Linear(4, 3)


def theirs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same weights under their names, by hand."""
    state = model.state_dict()
    found = {f"encoder.layer_{i}/{end[0]}": state[f"blocks.{i}.{end}"] for i in (0, 1) for end in ("weight", "bias")}
    return {**found, "head/w": state["out.weight"].t().contiguous(), "head/b": state["out.bias"]}


@pytest.fixture
def mine(tmp_path):
    """The path of a mapping to the model's own names."""
    file = tmp_path / "theirs_to_mine.yaml"
    file.write_text(MINE, encoding="utf-8")
    return file


def test_a_mapping_leads_to_the_names_of_any_model_and_back(mine, tmp_path):
    theirs, model = Mine(), Mine()
    torch.save(theirs_of(theirs), tmp_path / "theirs.pt")
    result = keymap.load_checkpoint(model, tmp_path / "theirs.pt", mapping=mine)
    assert result.report.plan.hub == "any" and not result.missing_keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in theirs.state_dict().items())
    back, expected = keymap.convert_state_dict(model.state_dict(), to=mine), theirs_of(model)
    assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)
    forth = keymap.convert_state_dict(expected, "any", mapping=mine)
    assert all(torch.equal(forth[key], value) for key, value in model.state_dict().items())
    keymap.save_checkpoint(model, tmp_path / "again.safetensors", mine)
    assert keymap.compare_checkpoints(tmp_path / "again.safetensors", tmp_path / "theirs.pt").equal
    assert keymap.compare_checkpoints(tmp_path / "theirs.pt", model, mapping_a=mine).equal
    assert keymap.map_key("out.bias", "any", mine) == "head/b"
    assert keymap.map_key("head/w", mine, "any") == "out.weight"


class Usual(nn.Module):
    """A model with a batch norm, a buffer that files lack, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("positions", torch.arange(5))


USUAL = r"""format: usual
hub: any
title: Flax's names
ignore: {positions: counted by the model}
towers:
  model:
    conv/kernel: {to: conv.weight, view: h w i o -> o i h w}
    conv/bias: conv.bias
    norm/(scale|bias|mean|var): norm.<1:norm>
    words: words.weight
lookups:
  norm: {scale: weight, bias: bias, mean: running_mean, var: running_var}
"""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_counters_tied_weights_and_named_buffers_of_a_model_need_no_key_in_the_file(suffix, tmp_path):
    """Both ways: what a load leaves as it is, a conversion leaves out, from memory and from a file of the model."""
    (tmp_path / "usual.yaml").write_text(USUAL, encoding="utf-8")
    theirs, model = randomised(Usual, seed=1), randomised(Usual, seed=2)
    written = keymap.convert_state_dict(theirs.state_dict(), to=tmp_path / "usual.yaml")
    assert sorted(written) == [
        "conv/bias",
        "conv/kernel",
        *(f"norm/{n}" for n in ("bias", "mean", "scale", "var")),
        "words",
    ]
    result = keymap.save_checkpoint(theirs, tmp_path / f"flax{suffix}", tmp_path / "usual.yaml")
    assert result.dropped["head.weight"] == "one tensor with words.weight"
    assert {"positions", "norm.num_batches_tracked", "head.weight"} == result.dropped.keys()
    torch.save(theirs.state_dict(), tmp_path / "own.pt")
    keymap.convert_checkpoint(tmp_path / "own.pt", tmp_path / f"again{suffix}", tmp_path / "usual.yaml")
    assert keymap.compare_checkpoints(tmp_path / f"again{suffix}", tmp_path / f"flax{suffix}").equal
    assert not keymap.load_checkpoint(model, tmp_path / f"flax{suffix}", mapping=tmp_path / "usual.yaml").missing_keys
    for key, value in theirs.state_dict().items():
        same = torch.equal(model.state_dict()[key], value)
        assert same or key in ("norm.num_batches_tracked", "positions"), key


def test_a_file_that_holds_tied_weights_twice_or_has_the_format_already_is_refused_with_what_to_do(tmp_path):
    to, theirs = tmp_path / "usual.yaml", randomised(Usual, seed=1)
    to.write_text(USUAL, encoding="utf-8")
    torch.save({key: value.clone() for key, value in theirs.state_dict().items()}, tmp_path / "own.pt")
    with pytest.raises(keymap.PlanError, match=r"head.weight has the values of words.weight: .*same_as: words.weight"):
        keymap.convert_checkpoint(tmp_path / "own.pt", tmp_path / "flax.pt", to)
    tied = "ignore: {head.weight: {why: the words, same_as: words.weight}, "
    to.write_text(USUAL.replace("ignore: {", tied), encoding="utf-8")
    keymap.convert_checkpoint(tmp_path / "own.pt", tmp_path / "flax.pt", to)
    with pytest.raises(keymap.PlanError, match=r"names of usual, so the file has this format already: .* mapping="):
        keymap.convert_checkpoint(tmp_path / "flax.pt", tmp_path / "again.pt", to)


def test_tied_weights_on_the_meta_device_are_filled_together(tmp_path):
    (tmp_path / "usual.yaml").write_text(USUAL, encoding="utf-8")
    theirs = randomised(Usual, seed=1)
    keymap.save_checkpoint(theirs, tmp_path / "flax.pt", tmp_path / "usual.yaml")
    with torch.device("meta"):
        model = Usual()
    model.positions, model.norm.num_batches_tracked = torch.arange(5), torch.tensor(0)
    keymap.load_checkpoint(model, tmp_path / "flax.pt", mapping=tmp_path / "usual.yaml", assign=True)
    assert model.head.weight is model.words.weight and torch.equal(model.head.weight, theirs.head.weight)


def test_a_state_dict_below_a_name_is_pointed_to_for_any_model(mine, tmp_path):
    state = theirs_of(Mine())
    torch.save({"left": state, "right": theirs_of(Mine())}, tmp_path / "two.pt")
    words = r"match none of its keys[^§]*pass wrapper='left' or wrapper='right'"
    with pytest.raises(keymap.PlanError, match=words):
        keymap.load_checkpoint(Mine(), tmp_path / "two.pt", mapping=mine)
    keymap.load_checkpoint(Mine(), tmp_path / "two.pt", mapping=mine, wrapper="right")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(keymap.PlanError, match=r"match none of its keys\n  - its keys are other$"):
        keymap.load_checkpoint(Mine(), tmp_path / "other.pt", mapping=mine)


def test_a_second_tensor_that_only_holds_the_same_values_is_not_left_out(tmp_path):
    (tmp_path / "usual.yaml").write_text(USUAL, encoding="utf-8")
    state = {key: value.clone() for key, value in randomised(Usual, seed=1).state_dict().items()}
    with pytest.raises(keymap.PlanError, match=r"no place in usual: head.weight; .* under `ignore` of the mapping"):
        keymap.convert_state_dict(state, to=tmp_path / "usual.yaml")


def test_ignore_excuses_no_key_of_the_model_that_a_rule_makes(tmp_path):
    (tmp_path / "usual.yaml").write_text(USUAL.replace("positions:", "conv.bias:"), encoding="utf-8")
    model = Usual()
    torch.save({"words": torch.zeros(7, 4)}, tmp_path / "part.pt")
    with pytest.raises(keymap.PlanError, match=r"conv.bias.*; keys that files lack belong under `ignore`"):
        keymap.load_checkpoint(model, tmp_path / "part.pt", mapping=tmp_path / "usual.yaml")


def test_what_does_not_fit_the_model_is_refused_and_the_model_stays_as_it_was(mine, tmp_path):
    state = theirs_of(Mine())
    del state["head/b"]
    state["more"] = torch.zeros(2)
    torch.save(state, tmp_path / "theirs.pt")
    model = Mine()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, tmp_path / "theirs.pt", mapping=mine)
    assert "out.bias" in str(caught.value) and "more" in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    allowed = {"allow_missing": "out.bias", "allow_unexpected": "more"}
    assert keymap.load_checkpoint(model, tmp_path / "theirs.pt", mapping=mine, **allowed).missing_keys == ["out.bias"]


def test_a_mapping_to_own_names_serves_a_model_that_a_hub_knows(mine, nano, tmp_path):
    file = tmp_path / "to_nano.yaml"
    rule = "towers:\n  model:\n    x.(.+): transformer.\\1\n    y: lm_head.weight\n"
    file.write_text(f"format: to_nano\nhub: any\ntitle: t\n{rule}", encoding="utf-8")
    theirs, model = Nano(), Nano()
    state = {f"x.{k.removeprefix('transformer.')}": v for k, v in theirs.state_dict().items() if k[0] == "t"}
    torch.save({**state, "y": theirs.lm_head.weight.detach()}, tmp_path / "x.pt")
    keymap.load_checkpoint(model, tmp_path / "x.pt", mapping=file)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_a_registered_mapping_to_own_names_is_used_by_its_name_alone(fresh, mine, tmp_path):
    assert keymap.register_mappings(mine) == ["theirs_to_mine"]
    model = Mine()
    written = keymap.convert_state_dict(model.state_dict(), "theirs_to_mine")
    assert written.keys() == theirs_of(model).keys()
    torch.save(written, tmp_path / "theirs.pt")
    assert keymap.inspect_checkpoint(tmp_path / "theirs.pt").format is None
    keymap.load_checkpoint(Mine(), tmp_path / "theirs.pt", mapping="theirs_to_mine")


def test_a_model_that_no_hub_knows_loads_a_file_with_its_own_names(tmp_path):
    theirs, model = Mine(), Mine()
    torch.save(theirs.state_dict(), tmp_path / "mine.pt")
    keymap.load_checkpoint(model, tmp_path / "mine.pt")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in theirs.state_dict().items())


# --- which hub ---

TWIN = HUB.replace("format: nano", "format: twin").replace("nanoGPT's GPT", "a second hub with the same names")


@pytest.fixture
def twin(nano, tmp_path):
    """A second hub with nano's names and a format of the same name."""
    folder = tmp_path / "twin"
    folder.mkdir()
    (folder / "twin.yaml").write_text(TWIN, encoding="utf-8")
    (folder / "conv_gpt.yaml").write_text(GPT2.replace("hub: nano", "hub: twin"), encoding="utf-8")
    assert keymap.register_mappings(folder) == ["conv_gpt", "twin"]


def test_a_model_of_two_hubs_is_refused_and_hub_chooses(twin, tmp_path):
    theirs, model = Nano(), Nano()
    torch.save(gpt2_of(theirs), tmp_path / "x.pt")
    with pytest.raises(keymap.PlanError, match=r"are those of 2 hubs; choose one with hub='nano' or hub='twin'"):
        keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert keymap.load_checkpoint(model, tmp_path / "x.pt", hub="twin").report.plan.hub == "twin"
    assert keymap.plan_load(model, tmp_path / "x.pt", hub="nano").hub == "nano"


def test_a_name_that_two_hubs_have_is_refused_and_hub_chooses(twin):
    state = Nano().state_dict()
    with pytest.raises(keymap.MappingError, match=r"to='conv_gpt': several hubs .* hub='nano' or hub='twin'"):
        keymap.convert_state_dict(state, "conv_gpt")
    written = keymap.convert_state_dict(state, "conv_gpt", hub="twin")
    assert keymap.convert_state_dict(written, "nano", mapping="conv_gpt").keys() == state.keys()  # the hub of `to`
    with pytest.raises(keymap.MappingError, match=r"source='conv_gpt': several hubs"):
        keymap.map_key("wte.weight", "conv_gpt", "conv_gpt")
    assert keymap.map_key("pos.weight", "conv_gpt", "nano") == "transformer.pos.weight"


def test_a_name_is_resolved_by_the_hub_of_the_model(nano, fresh, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    text = HUB.replace("format: nano", "format: other").replace("transformer.", "decoder.")
    (other / "other.yaml").write_text(text, encoding="utf-8")
    (other / "conv_gpt.yaml").write_text(
        GPT2.replace("hub: nano", "hub: other").replace("transformer.", "decoder."), encoding="utf-8"
    )
    keymap.register_mappings(other)
    theirs = Nano()
    torch.save(gpt2_of(theirs), tmp_path / "x.pt")
    assert keymap.load_checkpoint(Nano(), tmp_path / "x.pt", mapping="conv_gpt").report.plan.hub == "nano"
    found = keymap.inspect_checkpoint(tmp_path / "x.pt")
    assert (found.format, found.hub) == ("conv_gpt", "nano")
    assert any("conv_gpt of hub other (choose with hub='other')" in note for note in found.notes)
    assert keymap.inspect_checkpoint(tmp_path / "x.pt", hub="other").hub == "other"


@pytest.mark.parametrize("hub", ["nanno", 3, "", ["nano"]])
def test_an_unknown_hub_is_refused_by_every_function(hub, nano, tmp_path):
    torch.save(Nano().state_dict(), tmp_path / "x.pt")
    calls = (
        lambda: keymap.load_checkpoint(Nano(), tmp_path / "x.pt", hub=hub),
        lambda: keymap.plan_load(Nano(), tmp_path / "x.pt", hub=hub),
        lambda: keymap.inspect_checkpoint(tmp_path / "x.pt", hub=hub),
        lambda: keymap.convert_state_dict(Nano().state_dict(), "conv_gpt", hub=hub),
        lambda: keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "conv_gpt", hub=hub),
        lambda: keymap.save_checkpoint(Nano(), tmp_path / "y.pt", "conv_gpt", hub=hub),
        lambda: keymap.compare_checkpoints(tmp_path / "x.pt", tmp_path / "x.pt", hub=hub),
        lambda: keymap.map_key("wte.weight", "conv_gpt", "nano", hub=hub),
        lambda: keymap.list_formats(hub),
    )
    for call in calls:
        with pytest.raises(keymap.MappingError, match=r"hub=.*(did you mean 'nano'|open_clip)"):
            call()


def test_mappings_of_two_hubs_do_not_meet(nano, mine, tmp_path):
    state = Nano().state_dict()
    with pytest.raises(keymap.MappingError, match=r"mapping 'hf_clip' belongs to hub open_clip, to 'conv_gpt' to hub"):
        keymap.convert_state_dict(state, "conv_gpt", mapping="hf_clip")
    with pytest.raises(keymap.MappingError, match=r"hub='nano': to 'hf_clip' belongs to hub open_clip"):
        keymap.convert_state_dict(state, "hf_clip", hub="nano")
    torch.save(gpt2_of(Nano()), tmp_path / "x.pt")
    with pytest.raises(
        keymap.MappingError,
        match=r"belongs to hub open_clip, but the model's keys .* of hub nano; pass mapping= as one of conv_gpt, nano",
    ):
        keymap.load_checkpoint(Nano(), tmp_path / "x.pt", mapping="hf_clip")
    with pytest.raises(
        keymap.MappingError, match=r"pass to= as one of conv_gpt, nano \(nano has the model's own names\)"
    ):
        keymap.save_checkpoint(Nano(), tmp_path / "y.pt", "hf_clip")
    keymap.save_checkpoint(Nano(), tmp_path / "y.pt", "nano")
    text = MINE.replace("hub: any\n", "reference: r\nlayouts: {image: native_vit}\ndetect: {any: [head/b]}\n")
    mine.write_text(text.replace("model:", "image:").replace(": blocks", ": visual").replace(": out", ": visual.out")
                    .replace("to: out", "to: visual.out"), encoding="utf-8")  # fmt: skip
    with pytest.raises(keymap.MappingError, match=r"write `hub: nano` into the file, or `hub: any`"):
        keymap.load_checkpoint(Nano(), tmp_path / "x.pt", mapping=mine)


def test_the_formats_of_each_hub_are_listed(nano):
    assert set(keymap.list_formats("nano")) == {"nano", "conv_gpt"}
    assert {"nano", "conv_gpt", "hf_clip", "any"} <= set(keymap.list_formats())
    assert "nano" not in keymap.list_formats("open_clip")


# --- files ---

WRONG_FILES = {
    "a hub that does not exist": (
        GPT2.replace("hub: nano", "hub: nanno"),
        r"conv_gpt.yaml:2:1: there is no hub 'nanno'",
    ),
    "a format without evidence": (
        "\n".join(line for line in GPT2.splitlines() if not line.startswith("detect")) + "\n",
        r"conv_gpt.yaml:1:1: detect is missing",
    ),
    "a tower of another hub": (GPT2.replace("  text:", "  image:"), r"'image' is not a tower; write one of: text"),
    "a layout that the hub does not have": (
        GPT2.replace("towers:", "layouts: {text: native}\ntowers:"),
        "the hub has no text layout 'native'",
    ),
    "a key that the hub does not have": (GPT2.replace(": transformer.pos", ": pos"), "the hub has no such name"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_of_a_hub_is_refused_with_its_place(name, nano):
    text, words = WRONG_FILES[name]
    (nano / "conv_gpt.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(keymap.MappingError, match=words):
        keymap.register_mappings(nano / "conv_gpt.yaml")
    assert keymap.list_formats("nano")["conv_gpt"] == "GPT-2 with kernels of (in, out)"


def test_one_hub_alone_can_be_that_of_files_that_name_none(fresh, tmp_path):
    (tmp_path / "nano.yaml").write_text(HUB.replace("kind: hub\n", "kind: hub\ndefault: true\n"), encoding="utf-8")
    with pytest.raises(keymap.MappingError, match=r"there must be one hub .*open_clip.yaml, .*nano.yaml"):
        keymap.register_mappings(tmp_path)


def test_tables_that_name_no_hub_serve_every_hub(nano, tmp_path):
    tables = GPT2[GPT2.index("tables:") :]
    (tmp_path / "gpt_block.yaml").write_text(f"format: gpt_block\nkind: tables\ntitle: t\n{tables}", encoding="utf-8")
    keymap.register_mappings(tmp_path / "gpt_block.yaml")
    text = GPT2.replace(tables, "").replace("hub: nano\n", "hub: nano\nuses: [gpt_block]\n")
    (nano / "conv_gpt.yaml").write_text(text, encoding="utf-8")
    keymap.register_mappings(nano / "conv_gpt.yaml")
    model = Nano()
    assert keymap.convert_state_dict(model.state_dict(), "conv_gpt").keys() == gpt2_of(model).keys()


def test_a_load_compiles_no_file_of_another_hub(nano, tmp_path):
    """In a process of its own: what a CLIP needs of other hubs is their evidence."""
    code = (
        "import sys, torch, keymap\n"
        "from peers import openclip\n"
        "from keymap.source.registry import hubs\n"
        "hubs()\n"
        "model = openclip.clip()\n"
        "torch.save(model.state_dict(), sys.argv[1])\n"
        "keymap.load_checkpoint(model, sys.argv[1])\n"
        "print(*hubs()._compiled, len(hubs().hubs) > 1)\n"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(tmp_path / "clip.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.stdout.split() == ["open_clip", "True"], done.stderr


# --- what a hub decides ---

WITH_PREFIX = (
    "format: lm\nkind: hub\ntitle: t\ndetect: {all: [model.embed.weight]}\n"
    "towers:\n  text:\n    (model|head).(.+): \\1.\\2\n"
)
OTHER_LM = (
    "format: other_lm\nhub: lm\ntitle: t\ndetect: {all: [words]}\ntowers:\n  text:\n    words: model.embed.weight\n"
)


class Prefixed(nn.Module):
    """A model all of whose keys begin with ``model.``"""

    def __init__(self, words: int = 5) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(words, 3)})


@pytest.mark.parametrize("wrapped", ["", "module.", "net."])
def test_a_prefix_that_the_names_of_a_hub_have_is_not_stripped(wrapped, fresh, tmp_path):
    for name, text in (("lm", WITH_PREFIX), ("other_lm", OTHER_LM)):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    keymap.register_mappings(tmp_path)
    theirs, model = Prefixed(), Prefixed()
    torch.save({wrapped + key: value for key, value in theirs.state_dict().items()}, tmp_path / "x.pt")
    assert keymap.inspect_checkpoint(tmp_path / "x.pt").format == "lm"
    plan = keymap.load_checkpoint(model, tmp_path / "x.pt").report.plan
    assert (plan.format, plan.prefixes) == ("lm", (wrapped,) if wrapped else ())
    assert torch.equal(model.model["embed"].weight, theirs.model["embed"].weight)
    assert list(keymap.convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", "other_lm").files)


@pytest.mark.parametrize("wrapped", ["", "module.", "model."])
def test_a_prefix_that_the_model_has_is_not_stripped(wrapped, tmp_path):
    theirs, model = Prefixed(), Prefixed()
    torch.save({wrapped + key: value for key, value in theirs.state_dict().items()}, tmp_path / "x.pt")
    keymap.load_checkpoint(model, tmp_path / "x.pt")
    assert torch.equal(model.model["embed"].weight, theirs.model["embed"].weight)
    assert list(keymap.convert_state_dict(theirs.state_dict(), "any")) == ["model.embed.weight"]


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_the_hub_says_how_positions_are_resized(method, fresh, tmp_path):
    line = f"positions: {{model.embed.weight: {{axes: n d, method: {method}}}}}\n"
    (tmp_path / "lm.yaml").write_text(WITH_PREFIX + line, encoding="utf-8")
    keymap.register_mappings(tmp_path / "lm.yaml")
    theirs, model = Prefixed(4), Prefixed(6)
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    keymap.load_checkpoint(model, tmp_path / "x.pt")
    corners = {} if method == "nearest" else {"align_corners": False}
    rows = theirs.model["embed"].weight.detach().t().unsqueeze(0)
    wanted = nn.functional.interpolate(rows, size=6, mode=method, **corners).squeeze(0).t()
    assert torch.allclose(model.model["embed"].weight, wanted)


def test_a_method_that_does_not_suit_the_axes_is_refused(fresh, tmp_path):
    line = "positions: {model.embed.weight: {axes: n d, method: bicubic}}\n"
    (tmp_path / "lm.yaml").write_text(WITH_PREFIX + line, encoding="utf-8")
    with pytest.raises(keymap.MappingError, match=r"lm.yaml:8:45: a line is resized by linear or nearest"):
        keymap.register_mappings(tmp_path / "lm.yaml")


# --- files alone show their hub ---


def test_two_files_of_another_hub_are_compared_without_naming_it(nano, tmp_path):
    model = Nano()
    torch.save(gpt2_of(model), tmp_path / "theirs.pt")
    torch.save(model.state_dict(), tmp_path / "own.pt")
    found = keymap.compare_checkpoints(tmp_path / "theirs.pt", tmp_path / "own.pt")
    assert found.equal and found.format_a == "conv_gpt" and found.format_b == "nano"
    with torch.no_grad():
        model.transformer["pos"].weight[1, 2] += 1
    torch.save(gpt2_of(model), tmp_path / "theirs.pt")
    found = keymap.compare_checkpoints(tmp_path / "theirs.pt", tmp_path / "own.pt")
    (one,) = found.differences
    assert "pos" in one.key and round(one.max_abs, 4) == 1


def test_a_checkpoint_of_another_hub_stands_for_a_model_on_the_command_line(nano, tmp_path):
    from keymap.cli.targets import like

    torch.save(gpt2_of(Nano()), tmp_path / "theirs.pt")
    described = like(str(tmp_path / "theirs.pt"), None, None, None, True, None)
    assert set(described.state_dict()) == set(Nano().state_dict())


class Theirs(nn.Module):
    """A model of another library: its names are those of the format."""

    def __init__(self):
        super().__init__()
        self.tensors = {key: value.clone() for key, value in gpt2_of(Nano()).items()}

    def state_dict(self, *args, **options):
        return dict(self.tensors)


def test_a_model_with_the_names_of_a_format_gets_the_conversion_to_it_as_advice(nano, tmp_path):
    torch.save(Nano().state_dict(), tmp_path / "own.pt")
    with pytest.raises(keymap.DetectionError) as caught:
        keymap.load_checkpoint(Theirs(), tmp_path / "own.pt")
    assert "convert_state_dict(state_dict, to='conv_gpt')" in caught.value.faults[-1]


@pytest.mark.parametrize(
    ("detect", "needs"),
    [
        ("{all: [a.weight, b.0.bias], none: [c]}", (("a.weight",), ("b.0.bias",))),
        ("{any: [a, b], none: [c]}", ()),
        ("{all: [(m.|)a.w, 'b.(x|y)']}", (("m.a.w", "a.w"), ("b.x", "b.y"))),
        ("{all: ['b.(\\d+).w', {key: k, ndim: 2}, a]}", ()),  # the search stops at a brace: nothing is taken
        (
            "\n  all:\n    - a.w # why\n    - {key: k, ndim: 2}\n    - 'b.(\\d+)'\n    - c\n  none: [d]",
            (("a.w",), ("c",)),
        ),
        ("# all: [never.there]\n  all: [a]", (("a",),)),
        ("never", ()),
    ],
)
def test_the_head_of_a_hub_names_keys_without_which_its_evidence_cannot_match(detect, needs, tmp_path):
    file = tmp_path / "h.yaml"
    file.write_text(
        f"format: h\nkind: hub\ntitle: h\ndetect: {detect}\ntowers:\n  net:\n    (.+): \\1\n", encoding="utf-8"
    )
    header = read_header(file, "h.yaml")
    assert header.needs == needs
    found = evidence_in(header.detect)
    asked = [clue.side for clue in found[0].all] if found is not None else []
    for keys in needs:  # each is a part of what the evidence asks for
        assert any(all(side.match(key) is not None for key in keys) for side in asked)


def test_a_model_with_a_formats_names_is_written_as_that_format_even_if_some_are_the_hubs(nano, tmp_path):
    """Its keys are more than a twentieth the hub's here, which alone does not make it a model of the hub."""
    text = (nano / "nano.yaml").read_text().replace("  text:\n", "  text:\n    (pos|ln_f).(.+): \\1.\\2\n")
    (nano / "nano.yaml").write_text(text, encoding="utf-8")
    keymap.register_mappings(nano)
    model = Theirs()
    result = keymap.save_checkpoint(model, tmp_path / "x.safetensors", "nano")
    assert result.source_format == "conv_gpt"
    written = keymap.convert_state_dict(model.state_dict(), "nano")
    assert keymap.compare_checkpoints(tmp_path / "x.safetensors", _saved(written, tmp_path)).equal


def _saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"
