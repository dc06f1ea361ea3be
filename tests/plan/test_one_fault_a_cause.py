"""A wrong rule is one fault of a refused load, however many layers and towers it is used for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap

MINE = r"""format: mine
title: my model
reference: my/code.py (my 1.0)
layouts: {image: native_vit, text: native}
detect: {all: [vis.conv1.weight]}
towers:
  image:
    vis.proj: {to: visual.proj, view: out in -> in out}
    vis.(class_embedding|positional_embedding|conv1.weight): visual.\1
    vis.ln_(pre|post).(weight|bias): visual.ln_\1.\2
    vis.transformer.resblocks.(\d+).: {to: visual.transformer.resblocks.\1., table: block}
  text:
    txt.text_projection: {to: text.text_projection, view: out in -> in out}
    txt.(token_embedding.weight|positional_embedding): text.\1
    txt.ln_final.(weight|bias): text.ln_final.\1
    txt.transformer.resblocks.(\d+).: {to: text.transformer.resblocks.\1., table: block}
  scale:
    logit_scale: logit_scale
tables:
  block:
    attn.(q|k|v).(weight|bias): {to: attn.in_proj_\2, concat: 0}
    mlp.c_fc.weight: {to: mlp.c_fc.weight, view: a b -> b a}
    mlp.c_fc.bias: mlp.c_fc.bias
    mlp.c_proj.(weight|bias): mlp.c_proj.\1
    attn.out_proj.(weight|bias): attn.out_proj.\1
    ln_(1|2).(weight|bias): ln_\1.\2
"""
JOIN, C_FC = "mine.yaml:21:5: ", "mine.yaml:22:5: "
TRANSPOSED = (".proj", "projection", ".c_fc.weight")
State = dict[str, Tensor]

flat_or_custom = pytest.mark.parametrize("make", [openclip.clip, openclip.custom], ids=["flat", "custom"])


def model_of(make: Callable[..., nn.Module]) -> nn.Module:
    return make(seed=1, image_depth=12, text_depth=12)


def state_of_mine() -> State:
    """The custom model's state dict as the library of `MINE` would save it."""
    state: State = {}
    for name, value in model_of(openclip.custom).state_dict().items():
        key = name.replace("visual.", "vis.", 1) if name.startswith("visual.") else name.replace("text.", "txt.", 1)
        if "in_proj_" in key:
            for part, member in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("in_proj_", f"{part}.")] = member.clone()
        else:
            state[key] = (value.t() if key.endswith(TRANSPOSED) else value).contiguous()
    return state


def faults_of(make: Callable[..., nn.Module], folder: Path, mapping: str, state: State) -> list[str]:
    """The faults of the load, without the sentence that compares the sizes and the advice."""
    save_file(state, folder / "a.safetensors")
    (folder / "mine.yaml").write_text(mapping, encoding="utf-8")
    model = model_of(make)
    before = bits(model)
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, folder / "a.safetensors", mapping=folder / "mine.yaml")
    assert_unchanged(model, before)
    left_out = ("the file holds", "to load the rest", "to load what fits")
    return [fault for fault in caught.value.faults if not fault.startswith(left_out)]


@flat_or_custom
def test_the_mapping_is_right_as_it_stands(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    save_file(state_of_mine(), tmp_path / "a.safetensors")
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    keymap.load_checkpoint(model_of(make), tmp_path / "a.safetensors", mapping=tmp_path / "mine.yaml")


@flat_or_custom
@pytest.mark.parametrize(
    ("right", "wrong", "place", "words"),
    [
        pytest.param(
            "{to: mlp.c_fc.weight, view: a b -> b a}",
            "mlp.c_fc.weight",
            C_FC,
            ("resblocks.0.mlp.c_fc.weight has shape [", "add view: a b -> b a to rule", "(and 23 more keys of this"),
            id="view missing in a table",
        ),
        pytest.param(
            "{to: visual.proj, view: out in -> in out}",
            "visual.proj",
            "mine.yaml:8:5: ",
            ("visual.proj has shape [24, 48] in the file and [48, 24] in the model", "add view: a b -> b a to rule"),
            id="view missing in the image tower",
        ),
        pytest.param(
            "{to: text.text_projection, view: out in -> in out}",
            "text.text_projection",
            "mine.yaml:13:5: ",
            ("text_projection has shape [24, 32] in the file and [32, 24] in the model", "add view: a b -> b a to"),
            id="view missing in the text tower",
        ),
        pytest.param(
            "{to: text.text_projection, view: out in -> in out}",
            "{to: text.text_projection, view: a b c -> c b a}",
            "mine.yaml:13:5: ",
            ("needs 3 axes, the tensor is [24, 32]",),
            id="view of a wrong rank",
        ),
        pytest.param(
            "{to: mlp.c_fc.weight, view: a b -> b a}",
            "{to: mlp.c_fc.weight, view: a (k b) -> (k a) b, sizes: {k: 2}}",
            C_FC,
            ("resblocks.0.mlp.c_fc.weight has shape [", "write view: a b -> b a in rule", "(and 23 more keys of this"),
            id="another view",
        ),
        pytest.param(
            r"{to: attn.in_proj_\2, concat: 0}",
            r"{to: attn.in_proj_\2, concat: 1}",
            JOIN,
            (
                "axis 1 does not exist in [",
                "(and 11 more of this rule)",
                "; the same in the ",
                "; also ",
                "attn.in_proj_weight: shape [",
                "(and 23 more keys of this rule)",
            ),
            id="joined along a wrong axis",
        ),
    ],
)
def test_a_wrong_rule_is_one_fault(
    make: Callable[..., nn.Module], right: str, wrong: str, place: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    assert MINE.count(right) == 1
    (fault,) = faults_of(make, tmp_path, MINE.replace(right, wrong), state_of_mine())
    assert place in fault
    assert [word for word in words if word not in fault] == []


@flat_or_custom
def test_a_superfluous_view_is_one_fault_that_says_to_remove_it(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = {k: v.t().contiguous() if k.endswith(".c_fc.weight") else v for k, v in state_of_mine().items()}
    (fault,) = faults_of(make, tmp_path, MINE, state)
    assert C_FC in fault
    assert "remove the view from rule 'mlp.c_fc.weight: {to: mlp.c_fc.weight, view: a b -> b a}'" in fault
    assert "(and 23 more keys of this rule)" in fault


@flat_or_custom
def test_members_that_every_layer_lacks_are_one_fault(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = {k: v for k, v in state_of_mine().items() if not k.endswith("attn.k.bias")}
    (fault,) = faults_of(make, tmp_path, MINE, state)
    assert JOIN in fault
    assert "the join lacks 1 of 3 members" in fault
    assert "missing: " in fault
    assert "; the same in the " in fault


@flat_or_custom
def test_keys_that_no_fault_explains_are_missing(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    gone = ("vis.transformer.resblocks.3.attn.k.bias", "vis.transformer.resblocks.5.ln_1.bias")
    members = tuple(f"vis.transformer.resblocks.7.attn.{part}.bias" for part in "qkv")  # the join does not apply
    state = {k: v for k, v in state_of_mine().items() if k not in (*gone, *members)}
    join, tower, missing = faults_of(make, tmp_path, MINE, state)
    assert f"missing: {gone[0]}" in join
    assert tower.startswith("mine: the image tower is incomplete; missing keys: ")
    assert gone[0] not in tower
    assert [key for key in (gone[1], *members) if key not in tower] == []
    assert missing.startswith("2 of the model's keys are missing from the file: ")
    assert "resblocks.5.ln_1.bias" in missing
    assert "resblocks.7.attn.in_proj_bias" in missing


@flat_or_custom
def test_tensors_of_another_size_are_one_fault_a_rule(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    state = state_of_mine()
    for key, value in state.items():
        if key.startswith("txt.") and key.endswith(".ln_1.weight"):
            state[key] = torch.ones(value.shape[0] + 1)
    (fault,) = faults_of(make, tmp_path, MINE, state)
    assert "mine.yaml:26:5: " in fault
    assert "resblocks.0.ln_1.weight: shape [33] in the file, [32] in the model" in fault
    assert fault.endswith("(and 11 more keys of this rule)")


def test_layers_of_the_hubs_own_format_are_one_fault(tmp_path: Path) -> None:
    model, other = openclip.clip(seed=1, text_depth=12), openclip.clip(seed=2, text_depth=12)
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("c_fc.bias"):
            state[key] = torch.ones(value.shape[0] + 1)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(other, tmp_path / "a.safetensors")
    text, image = sorted(fault for fault in caught.value.faults if "c_fc.bias" in fault)
    assert text.startswith("transformer.resblocks.0.mlp.c_fc.bias: shape [113] in the file, [112] in the model")
    assert text.endswith("(and 11 more keys like it)")
    assert image.endswith("(and 1 more key like it)")


def test_an_option_of_a_rule_is_shown_as_yaml(tmp_path: Path) -> None:
    optional = MINE.replace("view: a b -> b a}", "view: a b -> b a, optional: true}")
    save_file(state_of_mine(), tmp_path / "a.safetensors")
    (tmp_path / "mine.yaml").write_text(optional, encoding="utf-8")
    plan = keymap.plan_load(model_of(openclip.clip), tmp_path / "a.safetensors", mapping=tmp_path / "mine.yaml")
    assert "optional: true}" in plan.explain("visual.transformer.resblocks.0.mlp.c_fc.weight")


def test_a_format_to_convert_to_that_does_not_exist() -> None:
    state = {"logit_scale": torch.ones(())}
    with pytest.raises(keymap.MappingError, match="did you mean 'open_clip_flat'"):
        keymap.convert_state_dict(state, to="open_clip_flt")
    with pytest.raises(keymap.MappingError, match=r"known: big_vision_lit.* open_clip_flat"):
        keymap.convert_state_dict(state, to="nope")


def test_one_key_without_a_place_is_counted_as_one() -> None:
    state = {**openclip.clip(seed=1).state_dict(), "extra.foo": torch.ones(2)}
    with pytest.raises(keymap.PlanError, match=r"1 key has no place in openai: extra\.foo"):
        keymap.convert_state_dict(state, to="openai")
