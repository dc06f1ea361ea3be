"""A rule without its `view`, and a format that knows none of the keys: the refusal says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peers import openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file

import keymap
from keymap.plan.missing_view import missing_view

MINE = r"""format: mine
title: my model
reference: my/code.py (my 1.0)
uses: [native_blocks]
layouts: {image: native_vit, text: flat}
detect: {all: [m.visual.conv1.weight]}
towers:
  image:
    m.visual.proj: visual.proj
    m.visual.(class_embedding|positional_embedding): visual.\1
    m.visual.conv1.weight: visual.conv1.weight
    m.visual.ln_(pre|post).(weight|bias): visual.ln_\1.\2
    m.visual.transformer.resblocks.(\d+).: {to: visual.transformer.resblocks.\1., table: block}
  text:
    m.(token_embedding.weight|positional_embedding|text_projection): \1
    m.transformer.resblocks.(\d+).mlp.c_fc.weight: transformer.resblocks.\1.mlp.c_fc.weight
    m.transformer.resblocks.(\d+).: {to: transformer.resblocks.\1., table: rest_of_block}
    m.ln_final.(weight|bias): ln_final.\1
  scale:
    m.logit_scale: logit_scale
tables:
  rest_of_block:
    ln_(1|2).(weight|bias): ln_\1.\2
    attn.in_proj_(weight|bias): attn.in_proj_\1
    attn.out_proj.(weight|bias): attn.out_proj.\1
    mlp.c_fc.bias: mlp.c_fc.bias
    mlp.c_proj.(weight|bias): mlp.c_proj.\1
"""


@pytest.mark.parametrize(
    ("source", "target", "view"),
    [
        ((2, 3), (3, 2), "a b -> b a"),
        ((3, 5, 7, 2), (2, 7, 3, 5), "a b c d -> d c a b"),
        ((16, 16, 3, 48), (48, 3, 16, 16), "a b c d -> d c a b"),
        ((2, 3), (2, 3), ""),
        ((2, 3), (6,), ""),
        ((2, 3), (3, 4), ""),
        ((), (), ""),
    ],
)
def test_the_view_that_a_shape_lacks(source: tuple[int, ...], target: tuple[int, ...], view: str) -> None:
    assert missing_view(source, target) == view


def test_a_rule_without_its_view_is_named_once_with_the_view_to_add(tmp_path: Path) -> None:
    model = openclip.clip(seed=1)
    transposed = ("visual.proj", ".mlp.c_fc.weight")
    state = {
        f"m.{key}": (value.t() if key.endswith(transposed) and not key.startswith("visual.tr") else value).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    before = bits(model)
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, tmp_path / "a.safetensors", mapping=tmp_path / "mine.yaml")
    shapes = [fault for fault in caught.value.faults if "has shape" in fault]
    assert len(shapes) == 2
    projection, mlp = sorted(shapes, key=lambda fault: "mlp" in fault)
    assert "mine.yaml:9:5: visual.proj has shape" in projection
    assert "add view: a b -> b a to rule 'm.visual.proj: visual.proj'" in projection
    assert "mine.yaml:16:5: transformer.resblocks.0.mlp.c_fc.weight has shape" in mlp
    assert "(and 2 more keys of this rule)" in mlp
    assert_unchanged(model, before)
    fixed = MINE.replace("m.visual.proj: visual.proj", "m.visual.proj: {to: visual.proj, view: a b -> b a}")
    fixed = fixed.replace(
        ": transformer.resblocks.\\1.mlp.c_fc.weight",
        ": {to: 'transformer.resblocks.\\1.mlp.c_fc.weight', view: a b -> b a}",
    )
    (tmp_path / "mine.yaml").write_text(fixed, encoding="utf-8")
    keymap.load_checkpoint(model, tmp_path / "a.safetensors", mapping=tmp_path / "mine.yaml")
    assert_unchanged(model, before)  # the file holds the model's own values


@pytest.mark.parametrize("name", ["hf_clip", "openai", "open_clip"])
def test_a_named_format_that_knows_none_of_the_keys_says_so(name: str, tmp_path: Path) -> None:
    save_file({"embedding/kernel": torch.zeros(2), "c.d": torch.zeros(3)}, tmp_path / "a.safetensors")
    model = openclip.clip(seed=1)
    with pytest.raises(keymap.DetectionError) as caught:
        keymap.load_checkpoint(model, tmp_path / "a.safetensors", mapping=name)
    assert f"{name} knows none of the keys of the file" in str(caught.value)
    assert "it has 2 tensors: " in str(caught.value)


def test_the_nearest_format_is_named_for_a_file_of_another_one(tmp_path: Path) -> None:
    model = openclip.clip(seed=1)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(keymap.DetectionError, match="hf_clip knows only 1 of the 74 keys of the file") as caught:
        keymap.plan_load(model, tmp_path / "a.safetensors", mapping="hf_clip")
    assert "the nearest format is open_clip" in str(caught.value)
