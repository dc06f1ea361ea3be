"""Untrusted files, mappings, folders and models; too little memory; interrupts.

Each is refused within bounds on memory and steps, with a message of its own, and the model is unchanged.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import Peak, bounded, ends
from fuzz.seeds import TINY
from hostile_files import entry, named, npy_bytes, safetensors_bytes, text, write_torch, write_zip
from peers import openclip
from peers.common import assert_unchanged, bits, same_bits
from safetensors.torch import save_file
from test_changing_files import (
    KINDS,
    State,
    after,
    interruptible,  # noqa: F401
    model_for,
    moves,
    state,
)
from test_hostile_mappings import checkpoint, lines, own
from test_mapping_errors import faults_of
from test_read import put, refused
from test_refusals import refuses
from torch import Tensor, nn

import keymap
from keymap.language.compile import compile_mapping
from keymap.source.registry import registry

MB = 1 << 20
START = b"\x80\x02"
HF_FACTS = {"image.heads": 2, "text.heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _known() -> None:
    """Read the shipped mappings once; that does not count as a step of any test."""
    registry()


def model(**sizes: Any) -> nn.Module:
    return openclip.clip(seed=5, **{**TINY, **sizes})


def good(folder: Path) -> Path:
    return KINDS["safetensors"](folder)


def refused_cheaply(
    path: Path,
    *words: str,
    error: type[keymap.KeymapError] = keymap.CheckpointError,
    into: nn.Module | None = None,
    **options: Any,
) -> str:
    """The message of a refusal that takes few steps and little memory, has its own words, and changes nothing."""
    with bounded(path.stat().st_size):
        message = refuses(model() if into is None else into, path, error, *words, **options)
    assert "cannot be read (" not in message
    return message


def empty(*shape: int) -> dict[str, Any]:
    return entry("F32", shape, 0, 0)


# --- keys and headers ---


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_unknown_keys_without_elements_are_unexpected_keys_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    more = {"bogus": torch.empty(shape), "visual.nonsense.weight": torch.empty(shape)}
    save_file({**state(), **more}, tmp_path / "a.safetensors")
    refused_cheaply(tmp_path / "a.safetensors", *more, error=keymap.PlanError)
    result = keymap.load_checkpoint(model(), tmp_path / "a.safetensors", strict=False)
    assert sorted(result.unexpected_keys) == sorted(more) and result.missing_keys == []


@pytest.mark.slow
@pytest.mark.parametrize("build", [openclip.clip, openclip.siglip], ids=["clip", "siglip"])
def test_thousands_of_blocks_without_elements_in_one_small_header(build: Callable[..., nn.Module], tmp_path: Path):
    header = {"params/img/embedding/kernel": empty(0, 0, 3, 0), "params/img/embedding/bias": empty(0)}
    for name in ("LayerNorm_0/scale", "LayerNorm_0/bias", "MlpBlock_0/Dense_0/kernel", "MlpBlock_0/Dense_0/bias"):
        axes = 2 if "kernel" in name else 1
        header[f"params/img/Transformer/encoderblock/{name}"] = empty(10_000, *[0] * axes)
    path = put(tmp_path / "a.safetensors", safetensors_bytes(header, b""))
    refused_cheaply(path, error=keymap.KeymapError, into=build(seed=5, **TINY))


FOREIGN = {
    "image": "visual.trunk.blocks.#.norm1.weight",
    "text": "text.transformer.encoder.layer.#.output.LayerNorm.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("tower", FOREIGN)
def test_tens_of_thousands_of_keys_of_a_tower_in_another_layout(tower: str, tmp_path: Path) -> None:
    header = {FOREIGN[tower].replace("#", str(number)): empty(0) for number in range(30_000)}
    path = put(tmp_path / "a.safetensors", safetensors_bytes(header, b""))
    refused_cheaply(path, "no bridge", error=keymap.PlanError)


def test_a_shape_in_hexadecimal_without_end(tmp_path: Path) -> None:
    path = put(tmp_path / "a.npy", npy_bytes("'<f4'", f"(0x{'f' * 4000},)", bytes(12)))
    assert "ValueError" not in refused_cheaply(path, "a.npy")


def test_metadata_of_forty_megabytes_with_one_wide_character(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"a":"' + "😀".encode() + b"a" * (40 * MB) + b'"}}'
    refused_cheaply(put(tmp_path / "a.safetensors", struct.pack("<Q", len(header)) + header), "a.safetensors")


# --- pickles ---


def pushed(raw: bytes, code: bytes = b"X") -> bytes:
    """The opcode that pushes a long text, or with B bytes."""
    return code + struct.pack("<I", len(raw)) + raw


def called(module: str, name: str, argument: bytes) -> bytes:
    return START + b"}" + text("w") + named(module, name) + argument + b"\x85Rs."


def view_at(offset: bytes) -> bytes:
    """A pickle of {"w": tensor} whose view begins at what these opcodes push."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"
    view = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + b"K\x06\x85K\x01\x85\x89NtR"
    return START + b"}" + text("w") + view + b"s."


def test_keys_that_are_tuples_of_tuples_are_refused_before_they_are_hashed(tmp_path: Path) -> None:
    """Three levels of sixteen: a tuple whose hash is made of 4096 others, ten thousand times."""
    levels = b"(" + b"K\x01" * 16 + b"tq\x010" + b"(" + b"h\x01" * 16 + b"tq\x020" + b"(" + b"h\x02" * 16 + b"tq\x030"
    pickle = START + b"}" + levels + b"(" + b"h\x03N" * 10_000 + b"u."
    refused_cheaply(write_torch(tmp_path / "a.pt", pickle, {}))


def test_a_message_never_prints_a_huge_object(tmp_path: Path) -> None:
    """Lists of lists, four times each, in an attribute of an object that replaces an offset: 4**16 numbers."""
    levels = [b"(" + (b"h" + bytes([31 + n])) * 4 + b"lq" + bytes([32 + n]) for n in range(1, 16)]
    laughs = b"((" + b"K\x01" * 4 + b"lq\x20" + b"".join(levels) + b"1"
    offset = laughs + named("argparse", "Namespace") + b")\x81}" + text("a") + b"h" + bytes([47]) + b"sb"
    path = write_torch(tmp_path / "a.pt", view_at(offset), {"0": bytes(24)})
    assert len(refused_cheaply(path, "'w'")) < 2000


def test_a_message_shows_no_more_than_the_beginning_of_many_bytes(tmp_path: Path) -> None:
    pickle = view_at(pushed(bytes(15_000_000), b"B"))
    path = write_torch(tmp_path / "a.pt", pickle, {"0": bytes(24)}, zipfile.ZIP_DEFLATED)
    assert len(refused_cheaply(path, "'w'")) < 2000


WIDE = "😀".encode() + b"a" * (40 * MB)
TEXTS: dict[str, Callable[[], tuple[bytes, int]]] = {
    "a key of forty megabytes": lambda: (START + b"}" + pushed(WIDE) + b"Ns.", zipfile.ZIP_STORED),
    "a key of fifteen, deflated": lambda: (START + b"}" + pushed(WIDE[:15_000_000]) + b"Ns.", zipfile.ZIP_DEFLATED),
    "a dict of forty megabytes": lambda: (called("collections", "OrderedDict", pushed(WIDE)), zipfile.ZIP_STORED),
    "a dict of fifteen, deflated": lambda: (
        called("collections", "OrderedDict", pushed(b"a" * 15_000_000)),
        zipfile.ZIP_DEFLATED,
    ),
    "a dict of nothing": lambda: (called("collections", "OrderedDict", text("")), zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_in_a_pickle_and_a_text_as_a_dict_are_refused(name: str, tmp_path: Path) -> None:
    """One wide character takes four bytes of memory for every other one of its text."""
    pickle, method = TEXTS[name]()
    path = write_torch(tmp_path / "a.pt", pickle, {}, method)
    refused_cheaply(path)
    refused(path)  # when it is opened, not for what it lacks


def test_a_million_classes_in_the_code_of_torchscript_are_refused_within_bounds(tmp_path: Path) -> None:
    pickle = START + named("__torch__", "M") + b")\x81}" + text("w") + b"Nsb."
    members = [("a/data.pkl", pickle), ("a/code/__torch__.py", b"class a:\n" * 1_800_000)]
    members.append(("a/constants.pkl", b"\x80\x02)."))
    refused_cheaply(write_zip(tmp_path / "a.pt", members, zipfile.ZIP_DEFLATED), "a.pt")


# --- deflated archives ---


def deflated(path: Path) -> Path:
    """The archive once more, its members compressed."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    return write_zip(path.with_suffix(".deflated"), members, zipfile.ZIP_DEFLATED)


class Inflated:
    """What zlib inflates, counted in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[int] = []
        self.real = zlib.decompressobj
        monkeypatch.setattr(zlib, "decompressobj", self.machine)

    def machine(self, *arguments: Any, **options: Any) -> Any:
        counter, real = self, self.real(*arguments, **options)

        class Machine:
            def decompress(self, *what: Any) -> bytes:
                made = real.decompress(*what)
                counter.parts.append(len(made))
                return made

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        return Machine()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("count", [1, 2], ids=["one storage", "two, in turn"])
def test_a_deflated_storage_that_hundreds_of_views_share_is_inflated_twice_at_most(
    count, assign, monkeypatch, tmp_path
):
    """Once for its checksum and once for the values, not once for each view."""
    sizes = {"image_depth": 12, "text_depth": 12, "vocab": 100_000}
    whole = openclip.clip(seed=1, **{**TINY, **sizes}).state_dict()
    flats = [torch.randn(sum(value.numel() for value in whole.values())) for _ in range(count)]
    at, views = 0, {}
    for number, (key, value) in enumerate(whole.items()):
        views[key] = flats[number % count][at : at + value.numel()].view(value.shape)
        at += value.numel()
    torch.save(views, tmp_path / "a.pt")
    path, target, inflated = deflated(tmp_path / "a.pt"), model(**sizes), Inflated(monkeypatch)
    result = keymap.load_checkpoint(target, path, assign=assign)
    assert result.missing_keys == [] and len(views) > 290
    assert [key for key, value in target.state_dict().items() if not same_bits(value, views[key])] == []
    size = sum(flat.nbytes for flat in flats)
    assert size <= sum(inflated.parts) <= 2.5 * size  # with the pickle


TRUNCATED = """
import os, sys
import keymap
from keymap.read import open_checkpoint

tensor = open_checkpoint(sys.argv[1]).tree["w"]
os.truncate(sys.argv[1], 1000)
try:
    tensor.check()
except keymap.CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_deflated_archive_that_shrank_is_refused_by_its_check_and_ends_no_process(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", w=np.random.rand(300_000).astype("f4"))
    command = [sys.executable, "-c", TRUNCATED, str(tmp_path / "a.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(keymap.__file__).parents[1], check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "a.npz" in done.stdout and "was written to" in done.stdout


@pytest.mark.slow
def test_the_pages_of_a_stored_npz_are_given_back_while_it_is_checked_and_loaded(tmp_path: Path) -> None:
    path, target = tmp_path / "a.npz", openclip.siglip(seed=5, **{**TINY, "text_width": 512, "vocab": 75_000})
    flat = keymap.convert_state_dict(target.state_dict(), "big_vision_siglip", facts=HF_FACTS)
    np.savez(path, **{key: value.numpy() for key, value in flat.items()})
    assert path.stat().st_size > 150_000_000
    peak = Peak.or_skip()
    del flat
    peak.start()
    keymap.load_checkpoint(target, path)
    assert peak.grown() < 64 * MB, f"it took {peak.grown() >> 20} MB"


# --- mappings ---

Shapes = Mapping[str, Sequence[int]]
ALTERNATIVES = "|".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
GROUPS = [chr(97 + number) + "x" * 300 for number in range(14)]
LOADS: dict[str, tuple[str, Shapes]] = {
    "slices of tensors without elements": (
        own("w: visual.w", r"'k(\d+).x': {to: 'visual.k\1.<l>', unstack: l}"),
        {"w": (1,), **{f"k{number}.x": (10_000, 0) for number in range(60)}},
    ),
    "large groups of which one key is there, far out": (
        own("w: visual.w", *[rf"'k(\d+).{name}.({ALTERNATIVES})': 'visual.k\1.{name[0]}.\2'" for name in GROUPS]),
        {"w": (1,), **{f"k999.{name}.a": (1,) for name in GROUPS}},
    ),
    "hundreds of rules and thousands of keys that none owns": (
        own("w: visual.w", *lines(r"'k(\w+).#': 'visual.#.\1'", 480)),
        {"w": (1,), **{f"k{'y' * (number % 200)}{number}.z": (1,) for number in range(20_000)}},
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_mapping_that_expands_a_small_file_is_refused_within_bounds(name: str, tmp_path: Path) -> None:
    rules, shapes = LOADS[name]
    mapping = put(tmp_path / "example.yaml", rules)
    refused_cheaply(checkpoint(tmp_path, shapes), error=keymap.KeymapError, mapping=mapping)


def with_aliases(count: int) -> str:
    blocks = "".join(rf"  - {{'k(\d+).{number}': 'k\1.{number + 1}'}}" + "\n" for number in range(count))
    return own("w: visual.w", more=f"aliases:\n{blocks}")


def test_a_mapping_has_thirty_two_blocks_of_aliases_at_most() -> None:
    compile_mapping(with_aliases(32), "f.yaml")
    for count in (33, 450):
        with ends():
            faults = faults_of(with_aliases(count))
        assert len(faults) == 1 and faults[0].startswith("f.yaml:9:1: "), faults


def test_a_range_that_runs_backwards_is_refused_with_its_place() -> None:
    for rows in ("[5, 2]", "[2, 2]"):
        faults = faults_of(own("w: visual.w", f"x: {{to: visual.y, take: {rows}, oneway: true}}"))
        assert len(faults) == 1 and faults[0].startswith("f.yaml:9:"), faults
    compile_mapping(own("w: visual.w", "x: {to: visual.y, take: [2, 5], oneway: true}"), "f.yaml")


OPEN_CLIP = r"""format: example
title: an example
reference: example 1.0
layouts: {image: native_vit, text: flat}
detect: {any: [w]}
ignore: {w: nothing}
towers:
  text:
    t.(transformer|token_embedding|ln_final).(.+): \1.\2
    t.(positional_embedding|text_projection): \1
  scale:
    t.logit_scale: logit_scale
  image:
    m.(.+): {to: visual.\1, oneway: true}
"""


def mapped(folder: Path, rule: str, extra: State, more: str = "", without: str = "") -> tuple[Path, Path]:
    """A file of the model's keys but one, and of others, and a mapping with one more rule for the image tower."""
    native = {key: value for key, value in state().items() if key != without}
    renamed = {"m." + key[7:] if key.startswith("visual.") else "t." + key: value for key, value in native.items()}
    save_file({**renamed, "w": torch.zeros(1), **extra}, folder / "a.safetensors")
    return folder / "a.safetensors", put(folder / "example.yaml", f"{OPEN_CLIP}    {rule}\n{more}")


def test_joins_of_joins_that_are_made_up_of_zeros_are_refused(tmp_path: Path) -> None:
    """Each makes 64 parts of two that are there, and the second of the first's: 1.6 GB of a file of 1.6 MB."""
    order = "concat: 0, order: [a, b" + ", 0" * 62 + "]"
    extra = {f"x{first}{second}": torch.zeros(100_000) for first in "ab" for second in "ab"}
    aliases = f"aliases:\n  - {{'x(a|b)(a|b)': {{to: 'y\\1', {order}}}}}\n"
    path, mapping = mapped(tmp_path, f"'y(a|b)': {{to: visual.proj_bias, {order}}}", extra, aliases)
    refused_cheaply(path, "zeros", error=keymap.KeymapError, mapping=mapping)


def test_a_join_that_is_made_up_of_zeros_in_part_still_loads(tmp_path: Path) -> None:
    """A projection without a bias between two that have one."""
    key = "visual.transformer.resblocks.0.attn.in_proj_bias"
    query, zeros, value = torch.randn(8), torch.zeros(8), torch.randn(8)
    rule = f"'p.(q|v)': {{to: {key}, concat: 0, order: [q, 0, v]}}"
    path, mapping = mapped(tmp_path, rule, {"p.q": query, "p.v": value}, without=key)
    target = model()
    keymap.load_checkpoint(target, path, mapping=mapping)
    assert same_bits(target.state_dict()[key], torch.cat([query, zeros, value]))


# --- folders ---


def repository(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(keymap.convert_state_dict(state(), "hf_clip", facts=HF_FACTS), folder / "model.safetensors")
    return folder


def configuration(heads: int) -> str:
    return json.dumps({"vision_config": {"num_attention_heads": heads}})


def warned_of(folder: Path) -> str:
    with ends():
        result = keymap.load_checkpoint(model(), folder)
    assert result.missing_keys == []
    return "\n".join(result.report.plan.warnings)


def test_a_configuration_is_read_where_it_lies_and_in_a_download_cache(tmp_path: Path) -> None:
    plain = repository(tmp_path / "plain")
    put(plain / "config.json", configuration(4711))
    assert "4711" in warned_of(plain)
    cached = repository(tmp_path / "models--a--b" / "snapshots" / "0123abc")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    put(tmp_path / "models--a--b" / "blobs" / "4567def", configuration(4712))
    (cached / "config.json").symlink_to("../../blobs/4567def")
    assert "4712" in warned_of(cached)


def test_a_configuration_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = repository(tmp_path / "run")
    put(tmp_path / "private.json", configuration(4711))
    for name in ("config.json", "model.json"):
        for target in (tmp_path / "private.json", Path("../private.json")):
            (folder / name).symlink_to(target)
            assert "4711" not in warned_of(folder)
            (folder / name).unlink()


@pytest.mark.parametrize("way", ["a pipe", "a link to a pipe", "a link to a device", "two megabytes", "a folder"])
def test_a_configuration_that_is_a_pipe_a_device_or_large_is_not_read(way: str, tmp_path: Path) -> None:
    folder = repository(tmp_path / "run")
    place = folder / "config.json"
    if way == "a pipe":
        os.mkfifo(place)
    elif way == "a link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        place.symlink_to(tmp_path / "pipe")
    elif way == "a link to a device":
        place.symlink_to("/dev/zero")
    elif way == "two megabytes":
        put(place, configuration(4711) + " " * (2 * MB))
    else:
        place.mkdir()
    assert "4711" not in warned_of(folder)


def test_shards_that_link_in_a_ring_are_refused_in_words(tmp_path: Path) -> None:
    for one, other in ("ab", "ba"):
        (tmp_path / f"{one}.safetensors").symlink_to(f"{other}.safetensors")
    path = put(tmp_path / "m.index.json", json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert "RuntimeError" not in refused_cheaply(path, "a.safetensors")


# --- models ---


def _copies(module: Any, found: dict[str, Tensor], prefix: str, local: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in found.items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_hook_that_returns_copies_is_refused_by_an_assigning_load_too(assign: bool, tmp_path: Path) -> None:
    target = model()
    before = {key: value.detach().clone() for key, value in target.named_parameters()}
    target._register_state_dict_hook(_copies)
    refused_cheaply(good(tmp_path), "hook", error=keymap.PlanError, into=target, assign=assign)
    assert [key for key, value in target.named_parameters() if not same_bits(value, before[key])] == []


ODD: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "sparse": lambda proj: nn.Parameter(proj.to_sparse()),
    "without a shape": lambda proj: nn.parameter.UninitializedParameter(),
    "a view that negates": lambda proj: nn.Parameter(torch._neg_view(proj)),
    "overlapping windows": lambda proj: nn.Parameter(torch.zeros(13).as_strided(proj.shape, (1, 1))),
}


@pytest.mark.parametrize("name", ODD)
def test_the_error_for_a_parameter_that_cannot_be_written_names_its_key(name: str, tmp_path: Path) -> None:
    target = model()
    odd = target.visual.proj = ODD[name](target.visual.proj.detach().clone())
    others = {key: value for key, value in target.named_parameters() if value is not odd}
    before = {key: value.detach().clone() for key, value in others.items()}
    held = odd.detach().to_dense().clone() if name != "without a shape" else None
    with ends(), pytest.raises(keymap.PlanError, match=r"visual\.proj\b"):
        keymap.load_checkpoint(target, good(tmp_path))
    assert target.visual.proj is odd and others.items() <= dict(target.named_parameters()).items()
    assert held is None or torch.equal(odd.detach().to_dense(), held)
    assert [key for key, value in others.items() if not same_bits(value, before[key])] == []


def test_the_error_for_a_lazy_layer_names_its_key(tmp_path: Path) -> None:
    target = model()
    before = bits(target)
    target.head = nn.LazyLinear(3)
    with pytest.raises(keymap.PlanError, match=r"head\.weight"):
        keymap.load_checkpoint(target, good(tmp_path))
    del target.head
    assert_unchanged(target, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_warning_that_is_made_an_error_comes_before_anything_is_written(assign: bool, tmp_path: Path) -> None:
    folder, target = repository(tmp_path / "run"), model()
    put(folder / "config.json", configuration(7))
    before, held = bits(target), dict(target.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(keymap.ConfigurationWarning, match="7 in the source"):
            keymap.load_checkpoint(target, folder, assign=assign)
    assert_unchanged(target, before)
    assert all(value is held[key] for key, value in target.named_parameters())


# --- no memory ---


def _no_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not enough memory: you tried to allocate 12 bytes")


@pytest.mark.parametrize("assign", [False, True])
def test_no_memory_for_a_resized_value_leaves_the_model_as_it_was(assign: bool, monkeypatch, tmp_path) -> None:
    """Both position embeddings have another size; what precedes them in the file is not yet written."""
    target = model(image_size=56, context_length=9)
    monkeypatch.setattr(torch.nn.functional, "interpolate", _no_memory)
    message = refused_cheaply(
        good(tmp_path), "not enough memory", "nothing was changed", error=keymap.LoadError, into=target, assign=assign
    )
    assert "half loaded" not in message
    monkeypatch.undo()
    assert keymap.load_checkpoint(target, tmp_path / "a.safetensors", assign=assign).missing_keys == []


@pytest.mark.parametrize("kind", ["safetensors", "zip pt", "npz", "npz deflated"])
def test_a_copy_that_fails_half_way_raises_an_error_that_says_the_model_is_half_loaded(
    kind: str, monkeypatch, tmp_path
) -> None:
    path, target = KINDS[kind](tmp_path), model_for(kind)
    with (
        after(monkeypatch, moves(kind), 3, _no_memory),
        pytest.raises(keymap.LoadError, match=r"half loaded") as caught,
    ):
        keymap.load_checkpoint(target, path)
    assert "not enough memory" in str(caught.value)
    assert keymap.load_checkpoint(target, path).missing_keys == []  # and loading again mends it


# --- an interrupt ---


class Interrupting(dict):  # type: ignore[type-arg]
    """A module's parameters: when so many have been replaced, in all such modules together, the user interrupts."""

    left = 0

    def __setitem__(self, name: str, value: Any) -> None:
        replaced = value is not self.get(name)
        super().__setitem__(name, value)
        if replaced and Interrupting.left > 0:
            Interrupting.left -= 1
            if Interrupting.left == 0:
                signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("count", [1, 2, 11, 30])
def test_an_interrupt_during_an_assigning_load_leaves_the_model_unchanged(count: int, tmp_path: Path) -> None:
    target, path = model(), good(tmp_path)
    for module in target.modules():
        vars(module)["_parameters"] = Interrupting(module._parameters)
    before, held = bits(target), dict(target.named_parameters())
    assert len(held) > 30
    Interrupting.left = count
    with pytest.raises(KeyboardInterrupt):
        keymap.load_checkpoint(target, path, assign=True)
    assert Interrupting.left == 0
    assert [key for key, value in target.named_parameters() if value is not held[key]] == []
    assert_unchanged(target, before)
    result = keymap.load_checkpoint(target, path, assign=True)
    assert result.missing_keys == [] and target.visual.proj is not held["visual.proj"]


def waits_for_a_result() -> bool:
    """Whether the main thread waits for the result of another."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code is not keymap.load.threads.Task.result.__code__:
        frame = frame.f_back
    return frame is not None


def test_no_thread_writes_after_several_interrupts(monkeypatch, tmp_path) -> None:
    """Three interrupts: while the first is handled, the next ones come."""
    path, target = good(tmp_path), model()
    begun, ended, caught, waits = list[int](), list[int](), list[int](), list[int]()
    at_work, over, sent = threading.Event(), threading.Event(), threading.Event()
    real, wait = keymap.load.execute.read_batch, keymap.load.threads.Tasks.stop

    def slowly(*arguments: Any) -> None:
        begun.append(1)
        at_work.set()
        try:
            sent.wait(60)
            real(*arguments)
        finally:
            ended.append(1)

    def interrupt(*_: object) -> None:
        caught.append(1)
        if not over.is_set():
            raise KeyboardInterrupt

    def impatient() -> None:
        at_work.wait(60)
        for number in range(3):  # one while the load waits for a result, then one each time it waits for its threads
            while not (len(waits) >= number if number else waits_for_a_result()) and not over.is_set():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        while len(caught) < 3 and not over.is_set():
            time.sleep(0.01)
        sent.set()

    def waiting(*arguments: Any) -> Any:
        waits.append(1)
        return wait(*arguments)

    monkeypatch.setattr(keymap.load.execute, "read_batch", slowly)
    monkeypatch.setattr(keymap.load.threads.Tasks, "stop", waiting)
    monkeypatch.setattr(keymap.load.direct, "_MAX_BUFFERS", 1)  # so that a small file, too, takes many calls
    handler, user = signal.signal(signal.SIGINT, interrupt), threading.Thread(target=impatient)
    user.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            keymap.load_checkpoint(target, path)
        over.set()
        under_way = len(begun) - len(ended)
    finally:
        over.set()
        user.join()
        signal.signal(signal.SIGINT, handler)
        while len(begun) > len(ended):
            time.sleep(0.01)
    assert under_way == 0
    assert 0 < len(begun) < 10  # the others were given up


def test_characters_of_control_in_a_message_are_escapes():
    """A name from a file neither moves the cursor nor adds a line to a message."""
    error = keymap.PlanError("a\x1b[31m\nb", ["c\rd", "e\u202ef\x9b\udcff", "é\u3000ok"])
    assert str(error).split("\n") == [r"a\x1b[31m\nb", r"  - c\rd", r"  - e\u202ef\x9b\udcff", "  - é\u3000ok"]
    assert error.summary == "a\x1b[31m\nb"
