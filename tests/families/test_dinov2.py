"""DINOv2 as its training saves it, in chunks of blocks; and files and models of which one alone has registers."""

from __future__ import annotations

import re

import pytest
import torch
from checks import assert_bits, refused
from peers.families import example
from peers.families.vision_transformer import REGISTERS, timm_vit

import keymap

DEPTH = 4
make = timm_vit("vit_small_patch14_dinov2", num_classes=0, mlp_ratio=4, depth=DEPTH)


def state(seed):
    """Random values of every parameter, as DINOv2 names them."""
    generator = torch.Generator().manual_seed(seed)
    random = {key: torch.rand(value.shape, generator=generator) for key, value in make().state_dict().items()}
    return {**random, "mask_token": torch.rand(1, 48)}


def chunked(file, size):
    """The same keys with blocks in chunks of this size; the number of a block counts through all chunks."""
    return {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // size}.{m[1]}", k): v for k, v in file.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("around", ["", "teacher.backbone."])
def test_blocks_in_chunks_are_read_as_blocks(size, around, tmp_path):
    file, model = state(seed=1), make()
    torch.save({around + key: value for key, value in chunked(file, size).items()}, tmp_path / "x.pth")
    assert keymap.load_checkpoint(model, tmp_path / "x.pth").report.plan.format == "dinov2"
    assert_bits(model, {key: value for key, value in file.items() if key != "mask_token"})
    assert keymap.inspect_checkpoint(tmp_path / "x.pth").format == "dinov2"


def test_more_chunks_than_are_known_are_refused_in_words(tmp_path):
    file = chunked(state(seed=1), 1)
    more = {key.replace("blocks.3.", "blocks.4."): value for key, value in file.items()}
    torch.save(more, tmp_path / "x.pth")
    refused(make(), tmp_path / "x.pth", "more than 4 chunks", "rename", error=keymap.DetectionError)


@pytest.mark.parametrize("form", ["hf_dinov2", "dinov2"])
@pytest.mark.parametrize("options", [{}, {"source_grid": (4, 4)}, {"allow_missing": "reg_token"}])
def test_registers_that_the_file_lacks_are_named_and_no_grid_is_advised(form, options, tmp_path):
    made = example("vision_transformer", form)
    torch.save(dict(made.file), tmp_path / "x.pth")
    model = timm_vit("vit_small_patch14_dinov2", num_classes=0, mlp_ratio=4, **REGISTERS[True])()
    words = "pos_embed: the model has reg_token, which the file lacks: load into a model with the tokens of the file"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, tmp_path / "x.pth", **options)
    assert words in str(caught.value) and "cannot infer" not in str(caught.value)
    assert_bits(model, before)


def test_registers_that_the_model_lacks_are_named(tmp_path):
    source = timm_vit("vit_small_patch14_dinov2", num_classes=0, mlp_ratio=4, depth=DEPTH, **REGISTERS[True])()
    torch.save(source.state_dict(), tmp_path / "x.pth")
    refused(make(), tmp_path / "x.pth", "the file has reg_token, which the model lacks")
