"""A module that changes what it loads is refused by name; one that only renames old keys loads as always.

`torch.nn.Module.load_state_dict` calls hooks, an overridden ``_load_from_state_dict`` and ``set_extra_state``. keymap
copies tensors itself, so it has to see when a module would do more.
"""

from __future__ import annotations

import pytest
import torch
from peers import openclip
from peers.common import assert_unchanged, bits
from safetensors.torch import save_file
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

import keymap


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in openclip.clip(seed=1).state_dict().items()}, file)
    return file


def doubles(module, state, prefix, *_):
    state[prefix + "weight"] = state[prefix + "weight"] * 2


def doubles_in_place(module, state, prefix, *_):
    state[prefix + "weight"].mul_(2)


def looks_at_values(module, state, prefix, *_):
    if float(state[prefix + "weight"].sum()) > 1e9:
        raise AssertionError


def adds_a_key(module, state, prefix, *_):
    state[prefix + "extra"] = state[prefix + "weight"]


def replaces_a_parameter(module, state, prefix, *_):
    module.weight = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("hook", [doubles, doubles_in_place, looks_at_values, adds_a_key, replaces_a_parameter])
@pytest.mark.parametrize("assign", [False, True])
def test_a_hook_that_changes_the_state_dict_is_refused_by_the_name_of_its_module(path, hook, assign):
    model = openclip.clip(seed=2)
    model.transformer.resblocks[1].ln_2.register_load_state_dict_pre_hook(hook)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"transformer\.resblocks\.1\.ln_2 \(LayerNorm\)"):
        keymap.load_checkpoint(model, path, assign=assign)
    assert_unchanged(model, before)


def test_a_hook_that_only_renames_old_keys_loads(path):
    def renames(module, state, prefix, *_):
        for key in [key for key in state if key.startswith(prefix) and key.endswith("gamma")]:
            state[key.removesuffix("gamma") + "weight"] = state.pop(key)

    model = openclip.clip(seed=2)
    for module in model.modules():
        module.register_load_state_dict_pre_hook(renames)
    keymap.load_checkpoint(model, path)
    assert_unchanged(model, bits(openclip.clip(seed=1)))


class Transposing(nn.LayerNorm):
    def _load_from_state_dict(self, state, prefix, *rest):
        state[prefix + "weight"] = state[prefix + "weight"].flip(0)
        super()._load_from_state_dict(state, prefix, *rest)


class Scaling(nn.LayerNorm):
    def _load_from_state_dict(self, state, prefix, *rest):
        with torch.no_grad():
            self.weight.copy_(state[prefix + "weight"] * 2)
            self.bias.copy_(state[prefix + "bias"])


class Skipping(nn.LayerNorm):
    def _load_from_state_dict(self, state, prefix, *rest):
        pass


class Swapping(nn.LayerNorm):
    def _load_from_state_dict(self, state, prefix, *rest):
        with torch.no_grad():
            self.weight.copy_(state[prefix + "bias"])
            self.bias.copy_(state[prefix + "weight"])


@pytest.mark.parametrize("kind", [Transposing, Scaling, Skipping, Swapping])
def test_a_module_with_its_own_way_of_loading_is_refused_by_name(path, kind):
    model = openclip.clip(seed=2)
    model.visual.ln_post.__class__ = kind
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=rf"visual\.ln_post \({kind.__name__}\)"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)


class Forgiving(nn.LayerNorm):
    """As frozen batch norms do: a key of old files is left out."""

    def _load_from_state_dict(self, state, prefix, *rest):
        state.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_module_that_only_leaves_old_keys_out_loads(path):
    model = openclip.clip(seed=2)
    model.visual.ln_post.__class__ = Forgiving
    keymap.load_checkpoint(model, path)
    assert_unchanged(model, bits(openclip.clip(seed=1)))


class Counting(nn.LayerNorm):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        raise AssertionError


def test_extra_state_is_missing_under_strict_and_left_alone_otherwise(path):
    model = openclip.clip(seed=2)
    model.visual.ln_post.__class__ = Counting
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"visual\.ln_post \(Counting\) takes extra state"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)
    keymap.load_checkpoint(model, path, strict=False)
    assert_unchanged(model, bits(openclip.clip(seed=1)))


def test_hooks_after_loading_run_as_in_torch(path):
    seen = []
    model = openclip.clip(seed=2)
    model.visual.register_load_state_dict_post_hook(lambda module, keys: seen.append(type(module).__name__))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append((len(keys.missing_keys), "root")))
    keymap.load_checkpoint(model, path)
    assert seen == ["VisionTransformer", (0, "root")]

    def fails(module, keys):
        raise ValueError("too late")

    model.visual.register_load_state_dict_post_hook(fails)
    with pytest.raises(keymap.LoadError, match=r"visual.*after loading.*too late"):
        keymap.load_checkpoint(model, path)


def test_timms_frozen_batch_norms_load(tmp_path):
    """Their ``_load_from_state_dict`` leaves ``num_batches_tracked`` out, which is no change of what a file holds."""
    source, model = openclip.resnet(seed=1), openclip.resnet(seed=2)
    freeze_batch_norm_2d(source.visual)
    freeze_batch_norm_2d(model.visual)
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "frozen.safetensors")
    keymap.load_checkpoint(model, tmp_path / "frozen.safetensors")
    assert_unchanged(model, bits(source))


def test_a_hook_after_loading_may_edit_the_missing_keys(path):
    model = openclip.clip(seed=2)
    model.head = nn.Linear(3, 3)
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.remove("head.bias"))
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result.missing_keys == result["missing_keys"] == ["head.weight"]


@pytest.mark.parametrize("kind", ["class", "instance"])
def test_a_model_with_its_own_load_state_dict_is_refused_by_name(path, kind):
    model = openclip.clip(seed=2)

    def doubled(self, state, *rest, **options):
        return nn.Module.load_state_dict(self, {key: value * 2 for key, value in state.items()}, *rest, **options)

    if kind == "class":
        model.__class__ = type("Doubling", (type(model),), {"load_state_dict": doubled})
    else:
        model.load_state_dict = doubled.__get__(model)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="has its own load_state_dict"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)


# --- a trial of a hook leaves the model as it was ---


def writes_to_a_child(module, *_):
    with torch.no_grad():
        module.get_parameter("visual.proj").mul_(2)


def writes_and_hides_it(module, *_):
    try:
        module.get_parameter("ln_final.bias").data.zero_()
    except Exception:
        return


def swaps_a_child(module, *_):
    module.visual.ln_post.weight = nn.Parameter(torch.zeros_like(module.visual.ln_post.weight))


def swaps_the_data_of_a_child(module, *_):
    module.visual.ln_post.weight.data = torch.zeros(48, device="cpu")


def freezes_a_child(module, *_):
    module.token_embedding.weight.requires_grad_(False)


@pytest.mark.parametrize(
    "hook", [writes_to_a_child, writes_and_hides_it, swaps_a_child, swaps_the_data_of_a_child, freezes_a_child]
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_hook_that_changes_modules_within_is_refused_and_changes_nothing(path, hook, assign):
    model = openclip.clip(seed=2)
    model.register_load_state_dict_pre_hook(hook)
    before, parameters = bits(model), list(map(id, model.parameters()))
    with pytest.raises(keymap.PlanError, match=r"the model \(CLIP\) has a hook before loading"):
        keymap.load_checkpoint(model, path, assign=assign)
    assert_unchanged(model, before)
    assert list(map(id, model.parameters())) == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


class Clearing(nn.Sequential):
    def _load_from_state_dict(self, *arguments):
        self[0].weight.data.zero_()
        super()._load_from_state_dict(*arguments)


class Remembering(nn.LayerNorm):
    def _load_from_state_dict(self, *arguments):
        self.loaded = True
        super()._load_from_state_dict(*arguments)


def test_a_way_of_loading_that_writes_to_modules_within_changes_nothing(tmp_path):
    source, model = openclip.clip(seed=1), openclip.clip(seed=2)
    source.head, model.head = Clearing(nn.Linear(3, 3)), Clearing(nn.Linear(3, 3))
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, file)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"head \(Clearing\) has its own _load_from_state_dict, which writes"):
        keymap.load_checkpoint(model, file)
    assert_unchanged(model, before)


def test_a_way_of_loading_that_sets_attributes_is_refused(path):
    model = openclip.clip(seed=2)
    model.ln_final.__class__ = Remembering
    with pytest.raises(keymap.PlanError, match=r"ln_final \(Remembering\).* changes loaded"):
        keymap.load_checkpoint(model, path)
    assert "loaded" not in vars(model.ln_final)


def test_a_way_of_loading_of_one_instance_is_refused(path):
    model = openclip.clip(seed=2)
    norm = model.transformer.resblocks[1].ln_1

    def doubled(state, prefix, *arguments):
        nn.LayerNorm._load_from_state_dict(norm, {k: v * 2 for k, v in state.items()}, prefix, *arguments)

    norm._load_from_state_dict = doubled
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"transformer\.resblocks\.1\.ln_1 \(LayerNorm\).* in this instance"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)


class Versioned(nn.LayerNorm):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *arguments):
        if metadata.get("version", 1) < 2:  # as torch's own modules do
            state[prefix + "weight"] = state[prefix + "weight"] + 1
        super()._load_from_state_dict(state, prefix, metadata, *arguments)


def converts_old_versions(module, state, prefix, metadata, *_):
    if metadata.get("version") is None:
        state[prefix + "bias"] = -state[prefix + "bias"]


@pytest.mark.parametrize("kind", ["method", "hook"])
def test_a_module_that_converts_files_without_a_version_is_refused(path, kind):
    model = openclip.clip(seed=2)
    if kind == "method":
        model.visual.ln_pre.__class__ = Versioned
    else:
        model.visual.ln_pre.register_load_state_dict_pre_hook(converts_old_versions)
    with pytest.raises(keymap.PlanError, match=r"visual\.ln_pre .*does not name the module's version"):
        keymap.load_checkpoint(model, path)


def test_hooks_after_loading_run_in_the_order_of_torch(path):
    order = {}
    for way in ("keymap", "torch"):
        model, order[way] = openclip.clip(seed=2), []
        model.again = model.visual.ln_pre  # one module under two names
        for name in ("visual.ln_pre", "visual.ln_post", "visual", "transformer.resblocks.0", "ln_final", ""):
            module = model.get_submodule(name)
            module.register_load_state_dict_post_hook(lambda _, keys, name=name, way=way: order[way].append(name))
        if way == "keymap":
            keymap.load_checkpoint(model, path, allow_missing=("again.*",))
        else:
            model.load_state_dict(openclip.clip(seed=1).state_dict(), strict=False)
    assert order["keymap"] == order["torch"] and order["torch"].count("visual.ln_pre") == 2


def test_a_model_too_deep_for_its_own_state_dict_is_an_error_of_keymap(path):
    model = inner = nn.Module()
    for _ in range(3000):
        inner.add_module("a", nn.Module())
        inner = inner.a
    inner.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(keymap.PlanError, match=r"state_dict\(\) failed with RecursionError"):
        keymap.load_checkpoint(model, path)


@pytest.mark.parametrize("assign", [False, True])
def test_modules_that_a_hook_of_the_state_dict_replaces_are_not_written_to(path, assign):
    """The load goes to those that the state dict is of."""
    model = openclip.clip(seed=2)
    before = model.ln_final

    def replaces(module, *_):
        if module.ln_final is before:
            module.ln_final = nn.LayerNorm(before.normalized_shape)

    model.register_state_dict_pre_hook(replaces)
    keymap.load_checkpoint(model, path, assign=assign)
    assert_unchanged(model, bits(openclip.clip(seed=1)))
