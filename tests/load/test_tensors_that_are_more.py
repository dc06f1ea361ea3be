"""Parameters that are more than memory of their own: shared storages, subclasses of tensors, DTensors."""

from __future__ import annotations

import pytest
import torch
from peers import openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_map

import keymap

FLAT, TRUNK = openclip.clip, openclip.siglip


def saved(folder, model, without=(), **others):
    state = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if key not in without} | others
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors", state


def shares(model, pairs):
    """Make parameters of the model over the storage of others: (module, name) pairs."""
    for (module, name), (owner, other) in pairs.items():
        tensor = model.get_submodule(owner).get_parameter(other)
        setattr(model.get_submodule(module), name, nn.Parameter(tensor.data))
    return model


PAIRS = {
    "norms of one tower": (FLAT, "transformer.resblocks.1.ln_1", "transformer.resblocks.2.ln_2", "weight"),
    "linear layers": (FLAT, "transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.mlp.c_fc", "weight"),
    "a trunk": (TRUNK, "visual.trunk.blocks.0.norm1", "visual.trunk.blocks.1.norm1", "bias"),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("held", ["both", "the first", "the second"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_parameters_over_one_storage_stay_tied(name, held, device, tmp_path):
    make, one, other, kind = PAIRS[name]
    source = make(seed=1)
    source.get_submodule(other).get_parameter(kind).data.copy_(source.get_submodule(one).get_parameter(kind).data)
    without = {"both": (), "the first": (f"{other}.{kind}",), "the second": (f"{one}.{kind}",)}[held]
    path, _ = saved(tmp_path, source, without)
    model = make(seed=2).to(device)
    shares(model, {(other, kind): (one, kind)})
    keymap.load_checkpoint(model, path, assign=True)
    assert_unchanged(model, bits(source))
    first, second = (model.get_submodule(path).get_parameter(kind) for path in (one, other))
    assert first is not second and first.data_ptr() == second.data_ptr()
    assert type(first) is type(second) is nn.Parameter and first.requires_grad and second.requires_grad


def test_a_buffer_that_no_state_dict_holds_follows_the_parameter_it_shares(tmp_path):
    source, model = FLAT(seed=1), FLAT(seed=2)
    path, _ = saved(tmp_path, source)
    model.visual.register_buffer("table", model.visual.proj.data, persistent=False)
    keymap.load_checkpoint(model, path, assign=True)
    assert model.visual.table.data_ptr() == model.visual.proj.data_ptr()
    assert same_bits(model.visual.table, source.visual.proj.data)


def in_part(model):
    flat = torch.randn(40)
    model.ln_final.weight = nn.Parameter(flat[:32])
    model.ln_final.bias = nn.Parameter(flat[8:])


def transposed(model):
    fc = model.transformer.resblocks[0].mlp
    fc.c_fc.weight = nn.Parameter(fc.c_proj.weight.data.T)


def of_a_frozen_buffer(model):
    flat = torch.randn(40)
    model.ln_final.weight = nn.Parameter(flat[:32])
    model.ln_final.register_buffer("rest", flat[16:], persistent=False)


@pytest.mark.parametrize("tie", [in_part, transposed, of_a_frozen_buffer])
def test_memory_that_is_shared_in_part_is_refused(tie, tmp_path):
    path, _ = saved(tmp_path, FLAT(seed=1))
    model = FLAT(seed=2)
    tie(model)
    before = bits(model)
    with pytest.raises(keymap.PlanError, match=r"share memory in part.* and "):
        keymap.load_checkpoint(model, path, assign=True)
    assert_unchanged(model, before)


def test_one_parameter_under_two_names_stays_one(tmp_path):
    source = FLAT(seed=1)
    source.ln_final.weight = source.ln_final.bias
    path, _ = saved(tmp_path, source)
    model = FLAT(seed=2)
    model.ln_final.weight = model.ln_final.bias
    keymap.load_checkpoint(model, path, assign=True)
    assert model.ln_final.weight is model.ln_final.bias
    assert_unchanged(model, bits(source))


class Logged(torch.Tensor):
    """A subclass without memory of its own way: plain memory, another class."""


class Wrapped(torch.Tensor):
    """A wrapper around a tensor, with its own dispatch; ``takes`` copies of plain tensors or not."""

    takes = True

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and not cls.takes and not isinstance(args[1], cls):
            raise NotImplementedError("takes no plain tensors")
        unwrap = lambda value: value.inner if isinstance(value, Wrapped) else value  # noqa: E731
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, out)


class Stubborn(Wrapped):
    takes = False


@pytest.mark.parametrize("kind", [Logged, Wrapped])
def test_subclasses_are_refused_where_they_would_be_replaced(kind, tmp_path):
    path, _ = saved(tmp_path, FLAT(seed=1))
    model = FLAT(seed=2)
    value = model.visual.proj.data
    value = value.as_subclass(Logged) if kind is Logged else kind(value)
    model.visual.proj = nn.Parameter(value)
    held = model.visual.ln_post.weight.clone()
    with pytest.raises(keymap.PlanError, match=rf"visual\.proj \({kind.__name__}\)"):
        keymap.load_checkpoint(model, path, assign=True)
    assert type(model.visual.proj) is kind and same_bits(model.visual.ln_post.weight, held)


@pytest.mark.parametrize("kind", [Logged, Wrapped])
def test_subclasses_that_take_copies_are_copied_into(kind, tmp_path):
    path, state = saved(tmp_path, FLAT(seed=1))
    model = FLAT(seed=2)
    value = model.visual.proj.data
    model.visual.proj = nn.Parameter(value.as_subclass(Logged) if kind is Logged else kind(value))
    keymap.load_checkpoint(model, path)
    assert type(model.visual.proj) is kind and same_bits(value, state["visual.proj"])


def test_a_subclass_that_takes_no_copy_is_refused_before_the_first_byte(tmp_path):
    path, _ = saved(tmp_path, FLAT(seed=1))
    model = FLAT(seed=2)
    model.visual.proj = nn.Parameter(Stubborn(model.visual.proj.data))
    held = {key: value.clone() for key, value in model.state_dict().items() if key != "visual.proj"}
    with pytest.raises(keymap.PlanError, match=r"visual\.proj \(Stubborn\).*takes no plain tensors"):
        keymap.load_checkpoint(model, path)
    assert all(same_bits(model.state_dict()[key], value) for key, value in held.items())


@pytest.fixture
def mesh():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of one process")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.resblocks:
        fully_shard(block, mesh=mesh)


def parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model.visual.transformer.resblocks[0].mlp.c_fc, mesh, ColwiseParallel())


def replicated(model, mesh):
    from torch.distributed.tensor import distribute_module

    distribute_module(model.ln_final, mesh)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("distribute", [shard, parallel, replicated])
def test_distributed_tensors_are_refused_before_the_first_byte(distribute, assign, mesh, tmp_path):
    path, _ = saved(tmp_path, FLAT(seed=1))
    model = FLAT(seed=2)
    distribute(model, mesh)
    held = dict(model.state_dict(keep_vars=True))
    values = {key: getattr(value, "_local_tensor", value).detach().clone() for key, value in held.items()}
    with pytest.raises(keymap.PlanError, match=r"are DTensors .*load before fully_shard.*set_model_state_dict"):
        keymap.load_checkpoint(model, path, assign=assign)
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is value for key, value in held.items())
    assert all(same_bits(getattr(after[key], "_local_tensor", after[key]).detach(), v) for key, v in values.items())


# --- modules that keep their tensors in a second place ---


class Cached(nn.Linear):
    """Keeps its weight in a list, as torch's recurrent layers do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.flat = [self.weight]

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "weight" and "flat" in self.__dict__:
            self.flat[0] = value

    def forward(self, x):
        return nn.functional.linear(x, self.flat[0], self.bias)


class Locked(nn.Linear):
    def __setattr__(self, name, value):
        if name == "bias" and "locked" in self.__dict__:
            raise RuntimeError("no new bias")
        super().__setattr__(name, value)


def test_an_assigned_tensor_is_set_as_torch_sets_it(tmp_path):
    source, model = FLAT(seed=1), FLAT(seed=2)
    source.head, model.head = Cached(24, 5), Cached(24, 5)
    path, _ = saved(tmp_path, source)
    keymap.load_checkpoint(model, path, assign=True)
    x = torch.randn(2, 24)
    assert model.head.flat[0] is model.head.weight and torch.equal(model.head(x), source.head(x))


def test_a_module_that_takes_no_new_tensor_leaves_the_model_as_it_was(tmp_path):
    source, model = FLAT(seed=1), FLAT(seed=2)
    source.head, model.head = Locked(24, 5), Locked(24, 5)
    path, _ = saved(tmp_path, source)
    model.head.locked = True
    before, parameters = bits(model), list(map(id, model.parameters()))
    with pytest.raises(keymap.LoadError, match=r"no new bias.*nothing was changed"):
        keymap.load_checkpoint(model, path, assign=True)
    assert_unchanged(model, before)
    assert list(map(id, model.parameters())) == parameters
