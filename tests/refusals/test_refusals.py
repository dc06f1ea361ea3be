"""A refused load leaves the model unchanged: bad input raises one KeymapError, and no bit of the model differs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import call_pickle, safetensors_bytes, write_torch
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import assert_unchanged, bits, images, same_bits
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap

State = dict[str, Tensor]
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])


def state_of(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def save(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refuses(
    model: nn.Module, path: Path, error: type[keymap.KeymapError], *words: str, strict: bool = True, **options: Any
) -> str:
    """The message, after class and words were found right and the model unchanged, buffers and flags too."""
    before = bits(model)
    flags = {k: (p.requires_grad, p.data_ptr()) for k, p in model.named_parameters()}
    training = {k: m.training for k, m in model.named_modules()}
    with pytest.raises(keymap.KeymapError) as caught:
        keymap.load_checkpoint(model, path, strict, **options)
    assert_unchanged(model, before)
    assert {k: (p.requires_grad, p.data_ptr()) for k, p in model.named_parameters()} == flags
    assert {k: m.training for k, m in model.named_modules()} == training
    message = "\n".join([str(caught.value), *caught.value.faults])
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {message}"
    assert [word for word in words if word not in message] == [], message
    return message


# --- files that cannot be read ---


def _state() -> State:
    return state_of(openclip.clip(seed=1))


def _archive(folder: Path) -> Path:
    openai.save_archive(openai.vit(), folder / "model.pt")
    return folder / "model.pt"


def _npz(folder: Path, compressed: bool) -> Path:
    big_vision.save(big_vision.init(), folder / "siglip.npz", compressed)
    return folder / "siglip.npz"


def _npy(folder: Path) -> Path:
    np.save(folder / "array.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    return folder / "array.npy"


def _safetensors(folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    state = _state() if state is None else state
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


KINDS: dict[str, Callable[[Path], Path]] = {
    "safetensors": _safetensors,
    "zip pt": lambda folder: save(folder / "model.pt", _state()),
    "legacy pt": lambda folder: save(folder / "model.pt", _state(), _use_new_zipfile_serialization=False),
    "TorchScript": _archive,
    "npz stored": lambda folder: _npz(folder, False),
    "npz deflated": lambda folder: _npz(folder, True),
    "npy": _npy,
}


def model_for(kind: str) -> nn.Module:
    if "npz" in kind:
        return openclip.siglip(seed=5)
    if kind == "TorchScript":
        return openclip.clip(quick_gelu=True, seed=5, **openai.VIT)
    return openclip.clip(seed=5)


@STRICT
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999], ids=lambda share: f"{share:.1%} left")
@pytest.mark.parametrize("kind", KINDS)
def test_truncated(kind, share, strict, tmp_path):
    path = KINDS[kind](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refuses(model_for(kind), path, keymap.CheckpointError, path.name, strict=strict)


@STRICT
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_beginning(kind, strict, tmp_path):
    path = KINDS[kind](tmp_path)
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 256 + content[256:])
    refuses(model_for(kind), path, keymap.KeymapError, path.name, strict=strict)


@STRICT
def test_a_deflated_member_whose_payload_alone_is_damaged(strict, tmp_path):
    """All names, shapes and dtypes are right; the damage shows only when the last weights are read."""
    path = _npz(tmp_path, True)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.header_offset)
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    packed = zlib.decompressobj(-15).decompress(bytes(content[start : start + member.compress_size]))
    assert len(packed) == member.file_size
    content[start + member.compress_size // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    words = [path.name, member.filename.removesuffix(".npy")]
    refuses(model_for("npz deflated"), path, keymap.CheckpointError, *words, strict=strict)


@STRICT
@pytest.mark.parametrize("name", ["img/embedding/kernel", "txt/Encoder_0/encoder_norm/bias", "t"])
def test_a_deflated_member_with_a_wrong_checksum(name, strict, tmp_path):
    """The bytes decompress, into other values than were saved."""
    path = _npz(tmp_path, True)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        wrong = struct.pack("<I", info.CRC ^ 1)
    content[info.header_offset + 14 : info.header_offset + 18] = wrong
    directory = content.rfind(f"{name}.npy".encode())
    assert content[directory - 46 : directory - 42] == b"PK\x01\x02"
    content[directory - 30 : directory - 26] = wrong
    path.write_bytes(bytes(content))
    refuses(model_for("npz deflated"), path, keymap.CheckpointError, path.name, name, strict=strict)


@STRICT
def test_missing_file(strict, tmp_path):
    path = tmp_path / "missing.pt"
    refuses(openclip.clip(), path, keymap.CheckpointError, str(path), "does not exist", strict=strict)


@STRICT
@pytest.mark.parametrize("held", [[], ["one.pt", "two.safetensors"]], ids=["empty", "two that nothing ranks"])
def test_a_folder_without_a_clear_checkpoint_is_refused(held, strict, tmp_path):
    for name in held:
        (tmp_path / name).write_bytes(b"x")
    refuses(openclip.clip(), tmp_path, keymap.CheckpointError, str(tmp_path), "is a folder with", *held, strict=strict)


OTHER_FILES = {
    "empty file": (b"", []),
    "HTML page": (b"<!doctype html><html><body>Not found</body></html>", ["HTML"]),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["git lfs pull"]),
    "JSON": (b'{"model_type": "clip"}', ["JSON"]),
    "text": (b"these are not weights", ["text"]),
    "gzip": (b"\x1f\x8b" + bytes(100), ["gzip"]),
    "a safetensors header that promises more": (
        safetensors_bytes({"logit_scale": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(4)),
        [],
    ),
}


@STRICT
@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_refused(name, strict, tmp_path):
    content, words = OTHER_FILES[name]
    path = put(tmp_path / "model.safetensors", content)
    refuses(openclip.clip(), path, keymap.CheckpointError, path.name, *words, strict=strict)


# --- containers that hold no weights, or more than weights ---


@STRICT
@pytest.mark.parametrize("content", [{}, [], None, 3, "weights", {"a": {"b": 1}}, [torch.ones(2)]], ids=repr)
def test_a_file_without_a_state_dict_is_refused(content, strict, tmp_path):
    path = save(tmp_path / "model.pt", content)
    refuses(openclip.clip(), path, keymap.CheckpointError, path.name, strict=strict)


@STRICT
@pytest.mark.parametrize("wrapped", [True, False])
def test_optimizer_only(wrapped, strict, tmp_path):
    model = openclip.clip(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    content = {"epoch": 3, "optimizer": optimizer.state_dict()} if wrapped else optimizer.state_dict()
    path = save(tmp_path / "optimizer.pt", content)
    words = [path.name, "training state", "state_dict()"]
    refuses(openclip.clip(), path, keymap.CheckpointError, *words, strict=strict)


class _Runs:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.canary)!r}, 'w').write('ran')",))


@STRICT
@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
@pytest.mark.parametrize("container", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code(container, beside, strict, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    content = {"state_dict": _state(), "hook": _Runs(canary)} if beside else _Runs(canary)
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(_Runs(canary)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    refuses(openclip.clip(), path, keymap.CheckpointError, path.name, strict=strict)
    assert not canary.exists()


@STRICT
def test_a_pickle_that_names_a_function(strict, tmp_path):
    path = write_torch(tmp_path / "model.pt", call_pickle("os", "system", "true"), {})
    words = [path.name, "system"]
    refuses(openclip.clip(), path, keymap.UnsafeCheckpointError, *words, strict=strict)


@STRICT
@pytest.mark.parametrize("compressed", [True, False])
def test_npz_with_object_arrays(compressed, strict, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "siglip.npz"
    flat = {**big_vision.init(), "txt/head/bias": np.array([_Runs(canary)], dtype=object)}
    big_vision.save(flat, path, compressed)
    refuses(openclip.siglip(), path, keymap.CheckpointError, path.name, "txt/head/bias", strict=strict)
    assert not canary.exists()


# --- keys, shapes and dtypes ---


def test_wrong_shapes_are_all_named(tmp_path):
    state = {**_state(), "visual.proj": torch.randn(48, 25), "ln_final.weight": torch.randn(31)}
    path = _safetensors(tmp_path, state)
    words = [path.name, "visual.proj", "[48, 25]", "[48, 24]", "ln_final.weight", "[31]", "[32]"]
    refuses(openclip.clip(), path, keymap.PlanError, *words)


def test_wrong_dtype_class(tmp_path):
    state, model = {**_state(), "visual.proj": torch.ones(48, 24, dtype=torch.int8)}, openclip.clip(seed=5)
    path, before = _safetensors(tmp_path, state), state_of(model)
    refuses(model, path, keymap.PlanError, path.name, "visual.proj", "int8", "float32")
    result = keymap.load_checkpoint(model, path, strict=False)
    assert result.missing_keys == ["visual.proj"] and result.unexpected_keys == ["visual.proj"]
    assert same_bits(model.visual.proj, before["visual.proj"])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool], ids=str)
def test_other_dtype_classes(dtype, tmp_path):
    path = save(tmp_path / "model.pt", {**_state(), "visual.proj": torch.ones(48, 24, dtype=dtype)})
    refuses(openclip.clip(), path, keymap.PlanError, "visual.proj", str(dtype).removeprefix("torch."), "float32")


def test_a_counter_that_is_a_float(tmp_path):
    state = state_of(openclip.resnet(seed=1))
    state["visual.bn1.num_batches_tracked"] = torch.tensor(3.0)
    path = _safetensors(tmp_path, state)
    words = ["visual.bn1.num_batches_tracked", "float32", "int64"]
    refuses(openclip.resnet(), path, keymap.PlanError, *words)


COLLIDING: dict[str, tuple[Callable[[], State], Callable[..., nn.Module]]] = {
    "a tower with and without vision_model.": (
        lambda: {
            **(s := hf.disk_keys(hf.clip(tower="image_proj"))),
            **{k.removeprefix("vision_model."): v + 1 for k, v in s.items() if k != "visual_projection.weight"},
        },
        openclip.clip,
    ),
    "one key of a whole model with and without vision_model.": (
        lambda: {
            **(s := hf.disk_keys(hf.clip())),
            "embeddings.class_embedding": s["vision_model.embeddings.class_embedding"] + 1,
        },
        openclip.clip,
    ),
    "text with and without text.": (
        lambda: {**(s := _state()), **{f"text.{k}": v + 1 for k, v in s.items() if not k.startswith("visual.")}},
        openclip.custom,
    ),
}


@pytest.mark.parametrize("order", ["renamed key last", "renamed key first"])
@STRICT
@pytest.mark.parametrize("name", COLLIDING)
def test_keys_that_collide_after_renaming(name, strict, order, tmp_path):
    """Either may be right; the order in the file must not decide."""
    build, target = COLLIDING[name]
    state = build()
    renamed = [k for k in state if k.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))]
    if name.startswith("text"):
        renamed = [k for k in state if not k.startswith(("visual.", "text.", "logit_"))]
    others = [k for k in state if k not in renamed]
    keys = [*others, *renamed] if order.endswith("last") else [*renamed, *others]
    path = save(tmp_path / "model.pt", {k: state[k] for k in keys})
    words = [path.name, "both", "become", renamed[0]]
    refuses(target(seed=5), path, keymap.PlanError, *words, strict=strict)


def test_both_layouts_of_a_text_tower_load_into_a_flat_model(tmp_path):
    """Here nothing has to be renamed: the flat keys are the model's, the others are left over."""
    state, model = _state(), openclip.clip(seed=5)
    more = {f"text.{k}": v + 1 for k, v in state.items() if not k.startswith(("visual.", "logit_"))}
    path = save(tmp_path / "model.pt", {**more, **state})
    refuses(model, path, keymap.PlanError, "41 of the file's keys", "text.positional_embedding")
    result = keymap.load_checkpoint(model, path, strict=False)
    assert sorted(result.unexpected_keys) == sorted(more)
    assert all(same_bits(v, model.state_dict()[k]) for k, v in state.items())


def _quantised() -> State:
    """Rows of int8 with a scale each, as common quantisers write them."""
    state: State = {}
    for key, value in _state().items():
        if value.ndim == 2 and key.endswith(".weight"):
            state[key] = (value * 10).to(torch.int8)
            state[f"{key}_scb"] = torch.ones(value.shape[0])
        else:
            state[key] = value
    return state


def _adapters() -> State:
    """A LoRA file: two factors for each layer, under a prefix of its own."""
    layer = "base_model.model.vision_model.encoder.layers.{}.self_attn.{}_proj.lora_{}.weight"
    shapes = {"A": (4, 48), "B": (48, 4)}
    return {layer.format(i, p, ab): torch.randn(shape) for i in range(2) for p in "qv" for ab, shape in shapes.items()}


def _merged_adapters() -> State:
    """open_clip's keys with LoRA factors beside whole weights."""
    more = {f"visual.transformer.resblocks.{i}.attn.out_proj.lora_A": torch.randn(4, 48) for i in range(2)}
    return {**_state(), **more}


OTHERS: dict[str, Callable[[], State]] = {
    "a language model": lambda: {
        "model.embed_tokens.weight": torch.randn(99, 32),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(32, 32),
        "lm_head.weight": torch.randn(99, 32),
    },
    "a diffusion unet": lambda: {
        "conv_in.weight": torch.randn(8, 4, 3, 3),
        "down_blocks.0.resnets.0.conv1.weight": torch.randn(8, 8, 3, 3),
    },
    "one tensor": lambda: {"weight": torch.randn(3, 4)},
}


@STRICT
@pytest.mark.parametrize("name", OTHERS)
def test_another_architectures_file(name, strict, tmp_path):
    path = _safetensors(tmp_path, OTHERS[name]())
    words = [path.name, "known formats", next(iter(sorted(OTHERS[name]())))[:8]]
    refuses(openclip.clip(), path, keymap.DetectionError, *words, strict=strict)


@STRICT
@pytest.mark.parametrize("mapping", [None, "hf_clip"])
@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_one_tensor_without_a_key_is_refused_with_what_to_save(kind, mapping, strict, tmp_path):
    path = _npy(tmp_path) if kind == "npy" else save(tmp_path / "proj.pt", torch.ones(3, 4))
    words = ["one tensor without a key, [3, 4]", "save a dict of tensors"]
    refuses(openclip.clip(), path, keymap.DetectionError, *words, strict=strict, mapping=mapping)


@STRICT
def test_a_language_model_that_could_be_a_text_tower_of_another_model(strict, tmp_path):
    state = {
        "embeddings.word_embeddings.weight": torch.randn(99, 32),
        "encoder.layer.0.attention.self.query.weight": torch.randn(32, 32),
    }
    words = ["the file's text tower has layout hf, the target needs flat", "different architectures"]
    refuses(openclip.clip(), _safetensors(tmp_path, state), keymap.PlanError, *words, strict=strict)


@STRICT
def test_an_adapter(strict, tmp_path):
    path = _safetensors(tmp_path, _adapters())
    refuses(openclip.clip(), path, keymap.DetectionError, path.name, "LoRA adapter", "merge", strict=strict)


def test_a_quantised_file(tmp_path):
    path = _safetensors(tmp_path, _quantised())
    words = ["int8 in the file, float32 in the model", "token_embedding.weight_scb"]
    refuses(openclip.clip(), path, keymap.PlanError, *words)


def test_lora_factors_beside_whole_weights(tmp_path):
    path = _safetensors(tmp_path, _merged_adapters())
    for strict in (True, False):  # without its factors the model would not be the one that was trained
        refuses(openclip.clip(), path, keymap.DetectionError, "lora_A", "merge", strict=strict)


ARCHITECTURES: dict[str, tuple[Callable[[], State], Callable[[], nn.Module], tuple[str, ...]]] = {
    "SigLIP file into CLIP": (
        lambda: state_of(openclip.siglip()),
        openclip.clip,
        ("map_trunk", "native_vit", "image"),
    ),
    "CLIP file into SigLIP": (
        lambda: state_of(openclip.custom()),
        openclip.siglip,
        ("native_vit", "map_trunk", "image"),
    ),
    "ResNet file into ViT": (
        lambda: state_of(openclip.resnet()),
        openclip.clip,
        ("native_resnet", "native_vit", "image"),
    ),
    "HF SigLIP file into CLIP": (
        lambda: hf.disk_keys(hf.siglip()),
        openclip.clip,
        ("hf_siglip", "map_trunk", "native_vit"),
    ),
    "timm ConvNeXt file into CLIP": (
        lambda: state_of(timm_towers.convnext()),
        openclip.clip,
        ("trunk", "native_vit"),
    ),
}


@STRICT
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_clip_architectures_file(name, strict, tmp_path):
    build, target, words = ARCHITECTURES[name]
    path = _safetensors(tmp_path, build())
    refuses(target(), path, keymap.PlanError, path.name, "different architectures", *words, strict=strict)


# --- arguments ---


@STRICT
def test_unknown_mapping_name(strict, tmp_path):
    path = _safetensors(tmp_path)
    words = ["open_klip", "open_clip", "hf_clip"]
    refuses(openclip.clip(), path, keymap.MappingError, *words, strict=strict, mapping="open_klip")


@STRICT
@pytest.mark.parametrize("name", ["no/such.yaml", "containers", "hf_blocks", "open_clip_flat"])
def test_a_mapping_argument_that_names_no_format_is_refused(name, strict, tmp_path):
    refuses(openclip.clip(), _safetensors(tmp_path), keymap.MappingError, name, strict=strict, mapping=name)


@STRICT
@pytest.mark.parametrize("towers", [("audio",), "audio", ("image", "audio"), ()], ids=repr)
def test_unknown_towers(towers, strict, tmp_path):
    words = ["towers=", "image", "text"]
    refuses(openclip.clip(), _safetensors(tmp_path), keymap.PlanError, *words, strict=strict, towers=towers)


@STRICT
@pytest.mark.parametrize("wrapper", ["ema", "state_dict.ema", "epoch", "."])
def test_wrapper_that_is_not_there(wrapper, strict, tmp_path):
    path = save(tmp_path / "model.pt", {"epoch": 1, "state_dict": _state()})
    words = [path.name, repr(wrapper), "'state_dict'"]
    refuses(openclip.clip(), path, keymap.CheckpointError, *words, strict=strict, wrapper=wrapper)


@STRICT
def test_bad_source_grid(strict, tmp_path):
    path = _safetensors(tmp_path)
    words = ["source_grid=(2, 2, 2)", "expected the rows and columns"]
    refuses(openclip.clip(), path, keymap.PlanError, *words, strict=strict, source_grid=(2, 2, 2))


@STRICT
def test_model_on_the_meta_device_without_assign(strict, tmp_path):
    model, path = openclip.clip().to("meta"), _safetensors(tmp_path)
    words = [path.name, "meta device", "assign=True", "to_empty"]
    refuses(model, path, keymap.PlanError, *words, strict=strict)
    keymap.load_checkpoint(model, path, strict, assign=True)
    assert all(same_bits(v, model.state_dict()[k]) for k, v in _state().items())


@STRICT
@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 4), nn.Identity, lambda: nn.Bilinear(3, 4, 5)])
def test_a_model_that_is_not_an_open_clip_model(build, strict, tmp_path):
    path = _safetensors(tmp_path)
    refuses(build(), path, keymap.PlanError, path.name, strict=strict)


# --- the floor of strict=False ---


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_of_another_width_is_refused_by_name(tower, tmp_path):
    width = {"image_width": 96} if tower == "image" else {"text_width": 64}
    path = _safetensors(tmp_path, state_of(openclip.clip(seed=1, **width)))
    words = [path.name, f"the {tower} tower", "not even in part", "nothing was changed"]
    message = refuses(openclip.clip(seed=5), path, keymap.PlanError, *words, strict=False)
    assert f"of the {'text' if tower == 'image' else 'image'} tower" not in message


def test_an_image_tower_of_another_width_in_another_format(tmp_path):
    path = _safetensors(tmp_path, hf.disk_keys(hf.clip(image_width=96)))
    words = [path.name, "hf_clip", "the image tower", "not even in part"]
    refuses(openclip.clip(seed=5), path, keymap.PlanError, *words, strict=False)


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip"])
def test_a_file_with_half_of_the_layers_loads_and_reports(kind, tmp_path):
    small = {"image_depth": 2, "text_depth": 2}
    large = {"image_depth": 4, "text_depth": 4}
    source = state_of(openclip.clip(seed=1, **small)) if kind == "open_clip" else hf.disk_keys(hf.clip(**small))
    path, model = _safetensors(tmp_path, source), openclip.clip(seed=5, **large)
    before = state_of(model)
    refuses(model, path, keymap.PlanError, "48 of the model's keys", "resblocks.2")
    result = keymap.load_checkpoint(model, path, strict=False)
    upper = [k for k in before if ".resblocks.2." in k or ".resblocks.3." in k]
    upper += [k for k in before if k.startswith(("transformer.resblocks.2.", "transformer.resblocks.3."))]
    assert sorted(result.missing_keys) == sorted(set(upper)) and result.unexpected_keys == []
    reference = openclip.clip(seed=6, **small)
    keymap.load_checkpoint(reference, path)
    for key, value in model.state_dict().items():
        wanted = before[key] if key in upper else reference.state_dict()[key]
        assert same_bits(value, wanted), key
    assert "missing: 48 keys, left unchanged" in str(result)


def test_a_file_with_more_layers_than_the_model_loads_in_part_and_reports(tmp_path):
    path = _safetensors(tmp_path, state_of(openclip.clip(seed=1, image_depth=4)))
    model = openclip.clip(seed=5)
    refuses(model, path, keymap.PlanError, "24 of the file's keys", "visual.transformer.resblocks.2")
    result = keymap.load_checkpoint(model, path, strict=False)
    assert len(result.unexpected_keys) == 24 and result.missing_keys == []


# --- a dry run refuses as the load does ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_load_says_the_same(name, tmp_path):
    build, target, _ = ARCHITECTURES[name]
    path, model = _safetensors(tmp_path, build()), target()
    before = bits(model)
    with pytest.raises(keymap.PlanError) as planned:
        keymap.plan_load(model, path)
    assert_unchanged(model, before)
    assert "\n".join([str(planned.value), *planned.value.faults]) == refuses(model, path, keymap.PlanError)


def test_an_index_that_names_a_shard_that_is_damaged(tmp_path):
    state = _state()
    buffer = io.BytesIO()
    torch.save(dict(list(state.items())[:5]), buffer)
    put(tmp_path / "a.bin", buffer.getvalue()[:-40])
    save(tmp_path / "b.bin", dict(list(state.items())[5:]))
    places = {k: "a.bin" if i < 5 else "b.bin" for i, k in enumerate(state)}
    path = put(tmp_path / "model.bin.index.json", json.dumps({"weight_map": places}).encode())
    refuses(openclip.clip(), path, keymap.CheckpointError, path.name, "a.bin")


# --- found by trying odd inputs ---


@pytest.mark.parametrize("first", ["params/ last", "params/ first"])
def test_an_npz_with_and_without_params_before_its_keys(first, tmp_path):
    flat, path = big_vision.init(), tmp_path / "siglip.npz"
    more, other = big_vision.with_prefix(flat), {k: v + 1 for k, v in flat.items()}
    big_vision.save({**other, **more} if first.endswith("last") else {**more, **other}, path)
    refuses(
        openclip.siglip(seed=5), path, keymap.PlanError, path.name, "choose one with wrapper='' or wrapper='params'"
    )


def _expanded() -> nn.Module:
    model = openclip.clip(seed=5)
    model.visual.proj.data = torch.randn(48, 1).expand(48, 24)
    return model


def _inference() -> nn.Module:
    with torch.inference_mode():
        return openclip.clip(seed=5)


@STRICT
@pytest.mark.parametrize("build", [_expanded, _inference], ids=["overlapping memory", "inference tensors"])
def test_a_model_whose_tensors_cannot_be_written(build, strict, tmp_path):
    model, path = build(), _safetensors(tmp_path)
    before = bits(model)
    with pytest.raises((keymap.KeymapError, RuntimeError)) as caught:
        keymap.load_checkpoint(model, path, strict)
    assert_unchanged(model, before)
    assert isinstance(caught.value, keymap.KeymapError)


def test_a_text_position_embedding_without_rows(tmp_path):
    model, path = (
        openclip.clip(seed=5),
        _safetensors(tmp_path, {**_state(), "positional_embedding": torch.randn(0, 32)}),
    )
    before = bits(model)
    with pytest.raises(keymap.PlanError, match="positional_embedding: the file's tensor has no rows"):
        keymap.load_checkpoint(model, path)
    assert_unchanged(model, before)


def test_a_format_named_wrongly_is_refused_with_the_nearest_one(tmp_path):
    words = ["hf_clip knows only 1 of the", "the nearest format is open_clip"]
    refuses(openclip.clip(), _safetensors(tmp_path), keymap.DetectionError, *words, strict=False, mapping="hf_clip")


def test_the_error_for_a_file_without_towers_does_not_suggest_towers(tmp_path):
    message = refuses(openclip.clip(), _safetensors(tmp_path), keymap.DetectionError, mapping="hf_clip")
    assert "towers=(,)" not in message


def test_the_nearest_format_is_not_offered_where_it_would_load_another_tower(tmp_path):
    """Blocks without a prefix are those of either tower."""
    blocks = {k.removeprefix("visual."): v for k, v in _state().items() if k.startswith("visual.transformer.")}
    message = refuses(openclip.clip(), _safetensors(tmp_path, blocks), keymap.DetectionError)
    assert "forces it" not in message


def test_towers_of_another_type(tmp_path):
    refuses(openclip.clip(), _safetensors(tmp_path), keymap.PlanError, "towers=3", towers=3)


def test_a_model_on_the_meta_device_computes_the_same_after_assign(tmp_path):
    path, reference, model = _safetensors(tmp_path), openclip.clip(seed=5), openclip.clip(seed=5).to("meta")
    keymap.load_checkpoint(reference, path)
    keymap.load_checkpoint(model, path, assign=True)
    ids = torch.randint(0, 99, (2, 16))
    with torch.no_grad():
        assert torch.allclose(model.encode_text(ids), reference.encode_text(ids), atol=2e-5)
        assert torch.allclose(model.encode_image(images()), reference.encode_image(images()), atol=2e-5)


def test_assigning_to_the_meta_device_is_refused(tmp_path):
    refuses(openclip.clip(seed=5), _safetensors(tmp_path), keymap.PlanError, "meta", device="meta", assign=True)


def test_assigned_tensors_can_be_written(tmp_path):
    state = {**_state(), "visual.ln_pre.weight": torch.randn(1).expand(48)}
    model = openclip.clip(seed=5)
    keymap.load_checkpoint(model, save(tmp_path / "model.pt", state), assign=True)
    assert all(value.is_contiguous() for value in model.state_dict().values())


# --- what a second reading found ---


@STRICT
def test_a_stored_npz_with_one_changed_byte_is_refused_as_numpy_refuses_it(strict, tmp_path):
    path = tmp_path / "siglip.npz"
    big_vision.save(big_vision.init(), path, compressed=False)
    content = bytearray(path.read_bytes())
    at = content.index(b"NUMPY", content.index(b"img/embedding/kernel.npy")) + 200
    content[at] ^= 0x40
    path.write_bytes(bytes(content))
    with pytest.raises(Exception, match="CRC"):
        dict(np.load(path))
    refuses(openclip.siglip(), path, keymap.CheckpointError, "img/embedding/kernel.npy", "checksum", strict=strict)


def test_a_state_dict_under_unknown_names_is_found(tmp_path):
    for tree in ({"ema": {"shadow": _state()}}, {"a": {"b": _state()}, "c": 3}):
        torch.save(tree, tmp_path / "run.pt")
        model = openclip.clip(seed=5)
        result = keymap.load_checkpoint(model, tmp_path / "run.pt")
        assert all(same_bits(value, _state()[key]) for key, value in model.state_dict().items())
        keymap.load_checkpoint(openclip.clip(), tmp_path / "run.pt", wrapper=result.report.plan.wrapper)


def test_views_of_the_file_that_overlap_are_not_assigned_together(tmp_path):
    big = torch.randn(96)
    state = {**_state(), "visual.ln_post.weight": big[:48], "visual.ln_post.bias": big[24:72]}
    model = openclip.clip(seed=5)
    result = keymap.load_checkpoint(model, save(tmp_path / "clip.pt", state), assign=True)
    assert len({"visual.ln_post.weight", "visual.ln_post.bias"} & set(result.report.materialised)) == 1
    with torch.no_grad():
        model.visual.ln_post.weight.add_(1)
    assert same_bits(model.visual.ln_post.bias.detach(), big[24:72])


def test_a_model_whose_tensors_share_a_part_of_their_memory_is_refused(tmp_path):
    model, big = openclip.clip(seed=5), torch.randn(96)
    model.visual.ln_post.weight = nn.Parameter(big[:48])
    model.visual.ln_post.bias = nn.Parameter(big[24:72])
    words = ["share a part of their memory", "visual.ln_post.weight and visual.ln_post.bias"]
    refuses(model, _safetensors(tmp_path), keymap.PlanError, *words)


def test_a_tower_under_names_that_no_rule_owns_is_refused_even_in_part(tmp_path):
    """The file seems to hold a text tower, and nothing of it would load."""
    state = {k.replace("text_model.", "text_model.other."): v for k, v in hf.disk_keys(hf.clip()).items()}
    state["text_model.final_layer_norm.weight"] = torch.randn(32)
    path = _safetensors(tmp_path, {k: v for k, v in state.items() if k != "text_projection.weight"})
    refuses(openclip.clip(seed=5), path, keymap.PlanError, "tensors of the text tower", strict=False)


def test_a_scale_that_is_a_number_instead_of_a_tensor_is_reported(tmp_path):
    torch.save({**_state(), "logit_scale": 2.5}, tmp_path / "clip.pt")
    words = ["logit_scale", "skipped entries that are not tensors: logit_scale"]
    refuses(openclip.clip(), tmp_path / "clip.pt", keymap.PlanError, *words)


def test_a_tensor_without_elements_is_reported_as_empty(tmp_path):
    path = _safetensors(tmp_path, {**_state(), "visual.proj": torch.randn(0, 24)})
    refuses(openclip.clip(), path, keymap.PlanError, "visual.proj", "a tensor without elements")
