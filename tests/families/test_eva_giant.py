"""EVA-g without a bias of the keys, in a VisionTransformer with one bias for q, k and v; its siblings are not taken."""

from __future__ import annotations

import pytest
import timm
import torch
from peers.families import example

import keymap
from keymap.language.layout import whole
from keymap.source.detect import claim
from keymap.source.registry import hubs

pytestmark = pytest.mark.formats("vision_transformer", "timm_eva_giant")


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "eva02_base_patch16_clip_224",
        "eva02_enormous_patch14_clip_224",
        "beit_base_patch16_224",
    ],
)
def test_a_sibling_of_eva_g_that_computes_something_else_is_not_of_its_format(name):
    with torch.device("meta"):
        state = timm.create_model(name, depth=1).state_dict()
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in state.items()}
    known = hubs().catalogue("vision_transformer")
    assert claim(known.get("timm_eva_giant"), layouts, {}) is None


def test_a_model_whose_keys_have_a_bias_cannot_be_written(tmp_path):
    made = example("vision_transformer", "timm_eva_giant")
    with pytest.raises(keymap.VerifyError, match="must hold 0 everywhere"):
        keymap.save_checkpoint(made.model(), tmp_path / "x.safetensors", made.form, hub="vision_transformer")
