"""Every format outside CLIP: a load equals the peer's, the way back is the file, and the wrong model refuses it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import edited, parsed, text_of, use
from checks import CLEAR, LIMIT, assert_bits, assert_same
from peers.common import assert_unchanged, bits, max_diff
from peers.families import Example, example, families
from safetensors.torch import load_file, save_file

import keymap
from keymap.source.registry import hubs

ROOT = Path(__file__).parents[2]
ROUNDED = 2**-22  # the largest relative difference of float32 that was multiplied by a number and divided by it
FAMILIES = families()


def cases():
    """(hub, name) of every example, as parameters of a test about its format."""
    for hub, module in FAMILIES.items():
        for name in module.EXAMPLES:
            marks = pytest.mark.formats(name.partition(" ")[0], hub)
            yield pytest.param(hub, name, marks=marks, id=f"{hub}: {name}")


def rows():
    for hub, module in FAMILIES.items():
        for row in parsed(module.ROWS):
            name, follows, edits = row.values
            marks = pytest.mark.formats(name.partition(" ")[0], hub)
            yield pytest.param(hub, name, follows, edits, marks=marks, id=f"{hub}: {row.id}")


def saved(made: Example, folder: Path) -> Path:
    path = folder / f"theirs{made.suffix}"
    tensors = {key: value.detach().contiguous().clone() for key, value in made.file.items()}
    if made.suffix == ".safetensors":
        save_file(tensors, path)
    elif made.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    else:
        torch.save(tensors, path)
    return path


@torch.no_grad()
def distance(made: Example, model: torch.nn.Module) -> float:
    """The largest difference from what the peer computes, or holds."""
    if made.outputs is not None:
        return max(max_diff(theirs, ours) for theirs, ours in made.outputs(model))
    state = model.state_dict()
    assert set(made.expected) == set(state)
    return max(max_diff(value, state[key]) for key, value in made.expected.items())


# --- the load ---


@pytest.mark.parametrize(("hub", "name"), cases())
def test_a_load_gives_what_the_peer_computes_or_loads(hub, name, tmp_path, proves_format):
    made, path = example(hub, name), saved(example(hub, name), tmp_path)
    model = made.model()
    assert distance(made, model) > CLEAR  # before the load
    result = keymap.load_checkpoint(model, path)
    assert (result.report.plan.format, result.missing_keys, result.unexpected_keys) == (made.form, [], [])
    if made.expected is not None:
        assert_bits(model, made.expected)
    assert distance(made, model) <= LIMIT
    proves_format("parity" if made.outputs is not None else "bit-equal", hub, made, name)


@pytest.mark.parametrize(("hub", "name"), cases())
def test_inspect_names_the_format_and_its_hub(hub, name, tmp_path):
    found = keymap.inspect_checkpoint(saved(example(hub, name), tmp_path), hub=hub)
    assert (found.format, found.hub) == (example(hub, name).form, hub)
    assert any(part.format == example(hub, name).form and part.hub == hub for part in found.parts)
    everywhere = str(keymap.inspect_checkpoint(saved(example(hub, name), tmp_path)))
    assert example(hub, name).form in everywhere and hub in everywhere


@pytest.mark.parametrize(("hub", "name"), cases())
def test_a_model_of_another_kind_refuses_the_file_and_keeps_its_values(hub, name, tmp_path):
    made, path = example(hub, name), saved(example(hub, name), tmp_path)
    assert made.wrong
    for model in (make() for make in made.wrong.values()):
        before = bits(model)
        with pytest.raises((keymap.PlanError, keymap.DetectionError)):
            keymap.load_checkpoint(model, path)
        assert_unchanged(model, before)


# --- the way back ---


def assert_written(got, want, made: Example):
    """The same keys and bits; apart from values that are computed, which are rounded."""
    computed = {key: value for key, value in got.items() if key in made.rounded}
    assert_same({**got, **{key: want[key] for key in computed}}, want)
    assert set(computed) == set(made.rounded)
    for key, value in computed.items():
        torch.testing.assert_close(value, want[key], rtol=ROUNDED, atol=0)


@pytest.mark.parametrize(("hub", "name"), cases())
def test_the_way_back_writes_the_file_bit_for_bit(hub, name, tmp_path):
    made, path = example(hub, name), saved(example(hub, name), tmp_path)
    model = made.model()
    keymap.load_checkpoint(model, path)
    if made.oneway:
        with pytest.raises(keymap.PlanError, match=made.oneway):
            keymap.save_checkpoint(model, tmp_path / "back.safetensors", made.form, hub=hub)
        return
    want = made.back or {k.removeprefix(made.prefix): v for k, v in made.file.items() if k not in made.not_written}
    keymap.save_checkpoint(model, tmp_path / "back.safetensors", made.form, hub=hub)
    assert_written(load_file(tmp_path / "back.safetensors"), want, made)
    assert_written(keymap.convert_state_dict(model.state_dict(), made.form, hub=hub, facts=made.facts), want, made)


# --- broken rules ---


@pytest.mark.parametrize(("hub", "name", "follows", "edits"), rows())
def test_a_broken_rule_is_refused_or_changes_the_result(hub, name, follows, edits, tmp_path, monkeypatch):
    made, path = example(hub, name), saved(example(hub, name), tmp_path)
    text = edited(made.form, text_of(made.form), edits)
    model, mapping = made.model(), use(made.form, text, tmp_path, monkeypatch)
    if follows == "refused":
        with pytest.raises((keymap.PlanError, keymap.DetectionError)):
            keymap.load_checkpoint(model, path, mapping=mapping)
    else:
        keymap.load_checkpoint(model, path, mapping=mapping)
        assert distance(made, model) > CLEAR


# --- all of them together ---


def test_every_hub_outside_clip_has_its_examples_and_every_format_a_broken_rule():
    known = hubs()
    others = [hub for hub in known.hubs if hub != known.default and not known.catalogue(hub).hub.by_name]
    assert set(FAMILIES) == set(others)
    for hub, module in FAMILIES.items():
        formats = {mapping.name for mapping in known.catalogue(hub).formats}
        assert {name.partition(" ")[0] for name in module.EXAMPLES} == formats - {hub}
        assert {row.values[0] for row in parsed(module.ROWS)} == set(module.EXAMPLES)
        bridges = {mapping.name for mapping in known.catalogue(hub).mappings.values() if mapping.kind == "bridge"}
        assert set(keymap.list_formats(hub=hub)) == formats | bridges


@pytest.mark.parametrize("hub", FAMILIES)
def test_a_model_has_the_names_of_one_hub_and_loads_its_own_state_dict(hub, tmp_path):
    for name in FAMILIES[hub].EXAMPLES:
        made = example(hub, name)
        theirs, mine = made.model(), made.model()
        assert hubs().claiming(theirs.state_dict()) == (hub,)
        torch.nn.init.ones_(next(iter(mine.parameters())))
        torch.save(theirs.state_dict(), tmp_path / "own.pt")
        assert keymap.load_checkpoint(mine, tmp_path / "own.pt").report.plan.format == hub
        assert_bits(mine, theirs.state_dict())


@pytest.mark.parametrize(
    "file", [f for hub in FAMILIES for f in (ROOT / "mappings" / hub).glob("*.yaml")], ids=lambda f: f.stem
)
def test_a_mapping_outside_clip_has_at_most_sixty_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


# --- models that no hub knows ---


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (
            torch.nn.DataParallel,
            "the model is wrapped, and its keys begin with 'module.': pass the inner model (model.module)",
        ),
        (
            torch.nn.Sequential,
            "are those of no hub: pass the model that the format is for, or write a mapping with `hub: any`",
        ),
    ],
)
def test_a_file_of_a_family_into_a_wrapped_or_unknown_model_is_refused_for_the_model(wrap, words, tmp_path):
    made = example("gpt2", "nanogpt")
    with pytest.raises(keymap.DetectionError, match=re.escape(words)):
        keymap.load_checkpoint(wrap(made.model()), saved(made, tmp_path))


def test_what_the_refusal_of_a_head_advises_works(tmp_path):
    made = example("vision_transformer", "hf_vit")
    from peers.families.vision_transformer import timm_vit

    model, path = timm_vit(num_classes=0)(), saved(made, tmp_path)
    with pytest.raises(keymap.PlanError, match=r"pass allow_unexpected=\('classifier\.\*',\)"):
        keymap.load_checkpoint(model, path)
    keymap.load_checkpoint(model, path, allow_unexpected=("classifier.*",))
