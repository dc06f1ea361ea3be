"""Small real files of every kind, each with the model that it loads into."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import openai, openclip
from safetensors.torch import save_file
from torch import Tensor, nn

import keymap

TINY: dict[str, Any] = {
    "image_width": 8,
    "image_heads": 2,
    "image_depth": 1,
    "text_width": 4,
    "text_heads": 2,
    "text_depth": 1,
    "vocab": 11,
    "context_length": 5,
    "embed_dim": 6,
}
MAPPINGS = Path(__file__).parents[2] / "mappings"


@dataclass(frozen=True)
class Seed:
    """A good load.

    Attributes:
        path: the file that is mutated.
        name: what a mutant of it must be called.
        model: what it loads into.
        options: further arguments of the load; a function of the mutant's path.
        checkpoint: the file that is loaded, where the mutant is another (a mapping).
        exact: the container has checksums, so a load that succeeds gives the original's values.
        beside: files that must lie beside the mutant.
    """

    path: Path
    model: nn.Module
    name: str = "weights"
    options: Callable[[Path], dict[str, Any]] = lambda path: {}
    checkpoint: Path | None = None
    exact: bool = False
    beside: tuple[Path, ...] = field(default=())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}


def _clip() -> tuple[nn.Module, dict[str, Tensor]]:
    return openclip.clip(seed=9, **TINY), _state(openclip.clip(seed=1, **TINY))


def _siglip() -> tuple[nn.Module, dict[str, np.ndarray[Any, Any]]]:
    facts = {"image.heads": TINY["image_heads"], "text.heads": TINY["text_heads"]}
    flat = keymap.convert_state_dict(openclip.siglip(seed=1, **TINY).state_dict(), "big_vision_siglip", facts=facts)
    return openclip.siglip(seed=9, **TINY), {key: value.numpy() for key, value in flat.items()}


def safetensors(folder: Path) -> list[Seed]:
    model, state = _clip()
    save_file(state, folder / "native", {"format": "pt", "note": "a text"})
    facts = {"image.heads": TINY["image_heads"], "text.heads": TINY["text_heads"]}
    save_file(keymap.convert_state_dict(state, "hf_clip", facts=facts), folder / "hf")
    return [Seed(folder / "native", model), Seed(folder / "hf", model)]


def _run(state: dict[str, Tensor]) -> dict[str, Any]:
    """What training code saves."""
    shared = {**state, "visual.proj": state["visual.proj"].t().contiguous().t()}
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": shared,
        "scaler": {"scale": 2.5, "growth": [1, 2, (3, None, True)]},
    }


def zip_pt(folder: Path) -> list[Seed]:
    model, state = _clip()
    torch.save(state, folder / "plain")
    torch.save(_run(state), folder / "run", pickle_protocol=4)
    with (
        zipfile.ZipFile(folder / "plain") as source,
        zipfile.ZipFile(folder / "small", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in source.namelist():
            out.writestr(zipfile.ZipInfo(name), source.read(name), zipfile.ZIP_DEFLATED)
    return [Seed(folder / name, model) for name in ("plain", "run", "small")]


def legacy_pt(folder: Path) -> list[Seed]:
    model, state = _clip()
    torch.save(state, folder / "plain", _use_new_zipfile_serialization=False)
    torch.save(_run(state), folder / "run", _use_new_zipfile_serialization=False)
    return [Seed(folder / "plain", model), Seed(folder / "run", model)]


def torchscript(folder: Path) -> list[Seed]:
    sizes = {**TINY, "image_width": 64, "image_heads": 1, "image_mlp": 4.0, "text_mlp": 4.0}
    openai.save_archive(openai.vit(seed=1, **sizes), folder / "archive")
    return [Seed(folder / "archive", openclip.clip(seed=9, quick_gelu=True, **sizes))]


def npz(folder: Path) -> list[Seed]:
    model, flat = _siglip()
    np.savez(folder / "stored.npz", **flat)
    np.savez_compressed(folder / "deflated.npz", **flat)
    return [Seed(folder / f"{name}.npz", model, exact=True) for name in ("stored", "deflated")]


def npy(folder: Path) -> list[Seed]:
    model, flat = _siglip()
    np.save(folder / "kernel.npy", flat["img/embedding/kernel"])
    np.save(folder / "fortran.npy", np.asfortranarray(np.arange(20, dtype=np.int16).reshape(4, 5)))
    return [Seed(folder / f"{name}.npy", model) for name in ("kernel", "fortran")]


def index(folder: Path) -> list[Seed]:
    model, state = _clip()
    keys = list(state)
    halves = {"one": keys[:20], "two": keys[20:]}
    for name, half in halves.items():
        save_file({key: state[key] for key in half}, folder / f"{name}.safetensors")
        torch.save({key: state[key] for key in half}, folder / f"{name}.bin")
    seeds = []
    for suffix in ("safetensors", "bin"):
        places = {key: f"{name}.{suffix}" for name, half in halves.items() for key in half}
        path = folder / f"model.{suffix}.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 99}, "weight_map": places}, indent=1))
        seeds.append(Seed(path, model, path.name, beside=tuple(folder / f"{name}.{suffix}" for name in halves)))
    return seeds


def yaml(folder: Path) -> list[Seed]:
    sources = {"hf_clip": safetensors(folder)[1], "openai": torchscript(folder)[0], "big_vision_siglip": npz(folder)[0]}
    seeds = []
    for path in sorted(MAPPINGS.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "\ndetect:" not in text or "kind:" in text:
            continue
        (folder / path.name).write_text(text.replace(f"format: {path.stem}\n", "format: fuzzed\n"), encoding="utf-8")
        source = sources.get(path.stem, sources["hf_clip"])
        named = {"name": "fuzzed.yaml", "options": lambda mutant: {"mapping": mutant}}
        weight = 6 if path.stem in sources else 1
        seeds += [Seed(folder / path.name, source.model, checkpoint=source.path, **named)] * weight  # type: ignore[arg-type]
    return seeds


KINDS: dict[str, Callable[[Path], list[Seed]]] = {
    "safetensors": safetensors,
    "zip-pt": zip_pt,
    "legacy-pt": legacy_pt,
    "torchscript": torchscript,
    "npz": npz,
    "npy": npy,
    "index": index,
    "yaml": yaml,
}
