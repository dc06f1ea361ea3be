"""Towers: picked out of a full checkpoint, or saved alone; each loads into the right tower and no other.

`transformer.resblocks.*` and `positional_embedding` are keys of both towers, so every row also runs with towers of
equal widths, depths and positions, where shapes cannot show that an image tower was loaded as a text tower.
"""

from __future__ import annotations

import pytest
import torch
from peers import openclip
from peers.common import SQUARE, assert_unchanged, bits, same_bits
from safetensors.torch import save_file

import keymap

ALIKE = {**SQUARE, "image_depth": 3, "text_depth": 3, "context_length": 5, "text_heads": 3}
KINDS = {
    "CLIP": openclip.clip,
    "CustomTextCLIP": openclip.custom,
    "SigLIP": openclip.siglip,
    "SigLIP without text projection": lambda **k: openclip.siglip(projection=False, **k),
    "timm CLIP ViT": openclip.clip_trunk,
    "ResNet": lambda **k: openclip.resnet(**{n: v for n, v in k.items() if n.startswith(("text", "seed", "embed"))}),
    "ConvNeXt": lambda **k: openclip.convnext(
        **{n: v for n, v in k.items() if n.startswith(("text", "seed", "embed"))}
    ),
    "ConvNeXt, mlp head": lambda **k: openclip.convnext(
        head="mlp", **{n: v for n, v in k.items() if n.startswith(("text", "seed", "embed"))}
    ),
    "CoCa": openclip.coca,
    "CoCa without attention pool": lambda **k: openclip.coca(attn_pool=False, **k),
    "roberta": lambda **k: openclip.hf_text(family="roberta", **k),
    "bert": lambda **k: openclip.hf_text(family="bert", pooler="cls_last_hidden_state_pooler", proj="linear", **k),
}
SIZES = {"sizes that differ": {}, "towers alike": ALIKE}
PREFIX = {"image": ("visual.",), "text": ("text.", "transformer.", "token_embedding.", "ln_final.")}
TEXT_ALONE = ("positional_embedding", "text_projection", "cls_emb")


def of(key):
    """The tower of a model's key."""
    if key.startswith("visual."):
        return "image"
    return "text" if key.startswith(PREFIX["text"]) or key.split(".")[0] in TEXT_ALONE else "other"


def saved(tensors, folder, name="x.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def text_tower(model):
    """The text tower as a state dict of its own."""
    if hasattr(model, "text"):
        return model.text.state_dict()
    return {key: value for key, value in model.state_dict().items() if of(key) == "text"}


def assert_only(model, before, source, tower):
    """Every tensor of the tower is the source's, every other one is what it was."""
    for key, value in model.state_dict().items():
        wanted = source.state_dict()[key] if of(key) == tower else before[key]
        assert same_bits(value, wanted), key


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_is_picked_out_of_a_full_checkpoint(kind, tower, strict, sizes, tmp_path):
    make = KINDS[kind]
    source, model = make(seed=1, **SIZES[sizes]), make(seed=2, **SIZES[sizes])
    before = bits(model)
    result = keymap.load_checkpoint(model, saved(source.state_dict(), tmp_path), strict, towers=(tower,))
    assert_only(model, before, source, tower)
    assert set(result.report.plan.loaded) == {tower}
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_saved_alone_goes_to_the_tower_that_it_is(kind, tower, sizes, tmp_path):
    make = KINDS[kind]
    source, model = make(seed=1, **SIZES[sizes]), make(seed=2, **SIZES[sizes])
    before = bits(model)
    alone = source.visual.state_dict() if tower == "image" else text_tower(source)
    path = saved(alone, tmp_path)
    with pytest.raises(keymap.PlanError, match=f"load with towers=\\('{tower}',\\)"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)
    other = "text" if tower == "image" else "image"
    with pytest.raises(keymap.PlanError, match="has no tensors of the requested towers"):
        keymap.load_checkpoint(model, path, towers=(other,))
    with pytest.raises(keymap.PlanError, match="has no tensors of the requested towers"):
        keymap.load_checkpoint(model, path, strict=False, towers=(other,))
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, towers=(tower,))
    assert_only(model, before, source, tower)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    again = make(seed=2, **SIZES[sizes])
    loose = keymap.load_checkpoint(again, path, strict=False)
    assert_only(again, before, source, tower)
    assert loose.unexpected_keys == []
    assert sorted(loose.missing_keys) == sorted(
        key for key in model.state_dict() if of(key) != tower and key not in loose.report.plan.filled
    )


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_lone_tower_behind_a_prefix(prefix, tmp_path):
    source, model = openclip.clip(seed=1, **ALIKE), openclip.clip(seed=2, **ALIKE)
    before = bits(model)
    path = saved({prefix + key: value for key, value in source.visual.state_dict().items()}, tmp_path)
    keymap.load_checkpoint(model, path, towers=("image",))
    assert_only(model, before, source, "image")


@pytest.mark.parametrize("target", [openclip.clip, openclip.custom])
def test_a_lone_text_tower_loads_into_both_layouts(target, tmp_path):
    source, model = openclip.custom(seed=1), target(seed=2)
    keymap.load_checkpoint(model, saved(source.text.state_dict(), tmp_path), towers=("text",))
    wanted = {key.removeprefix("text."): value for key, value in source.state_dict().items() if of(key) == "text"}
    got = {key.removeprefix("text."): value for key, value in model.state_dict().items() if of(key) == "text"}
    assert all(same_bits(got[key], value) for key, value in wanted.items())


def test_two_towers_one_after_the_other_are_the_whole_model(tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    for tower, state in (("image", source.visual.state_dict()), ("text", text_tower(source))):
        keymap.load_checkpoint(model, saved(state, tmp_path, f"{tower}.safetensors"), towers=(tower,))
    keymap.load_checkpoint(model, saved(source.state_dict(), tmp_path), towers=("scale",))
    assert all(same_bits(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_strict_holds_within_the_chosen_tower(tmp_path):
    state = dict(openclip.clip(seed=1).state_dict())
    del state["visual.proj"], state["text_projection"]
    state["visual.extra"] = torch.zeros(2)
    path, model = saved(state, tmp_path), openclip.clip(seed=2)
    before = bits(model)
    with pytest.raises(keymap.PlanError) as caught:
        keymap.load_checkpoint(model, path, towers=("image",))
    message = str(caught.value)
    assert "visual.proj" in message and "visual.extra" in message and "text_projection" not in message
    assert_unchanged(model, before)
    result = keymap.load_checkpoint(model, path, strict=False, towers=("image",))
    assert (result.missing_keys, result.unexpected_keys) == (["visual.proj"], ["visual.extra"])


IMAGE_KEYS = ["class_embedding", "ln_pre.weight", "ln_post.bias"]


@pytest.mark.parametrize("mapping", [None, "open_clip"])
@pytest.mark.parametrize("kept", IMAGE_KEYS)
def test_an_image_tower_without_its_stem_is_still_an_image_tower(kept, mapping, tmp_path):
    """A frozen part is not always saved; one key that only image towers have identifies the rest."""
    source = openclip.custom(seed=5, **ALIKE).visual.state_dict()
    part = {k: v.contiguous() for k, v in source.items() if "." not in k or k.startswith("transformer.") or k == kept}
    part = {k: v for k, v in part.items() if k == kept or k not in ("class_embedding", "proj")}
    save_file(part, tmp_path / "x.safetensors")
    model = openclip.clip(**ALIKE)
    before = bits(model)
    result = keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict=False, mapping=mapping)
    assert set(result.report.plan.loaded) == {"image"}
    after = bits(model)
    assert all(same_bits(after[key], before[key]) for key in before if not key.startswith("visual."))
    assert all(same_bits(model.state_dict()[f"visual.{key}"], value) for key, value in part.items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_tower_in_the_place_of_the_model_is_refused(tower, strict, tmp_path):
    """`model.visual` has keys of a text tower without prefix; a text tower would fit into its blocks."""
    saved = getattr(openclip.custom(seed=5, **ALIKE), tower).state_dict()
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "x.safetensors")
    model = openclip.clip(**ALIKE).visual
    before = bits(model)
    if tower == "visual":  # the model's own file
        keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict)
        assert all(same_bits(value, saved[key]) for key, value in model.state_dict().items())
        return
    with pytest.raises(keymap.PlanError, match=r"one tower alone .*pass the whole model"):
        keymap.load_checkpoint(model, tmp_path / "x.safetensors", strict)
    assert_unchanged(model, before)
