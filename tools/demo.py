"""The main job, as a story: real models of every peer library, saved as their owners save them, loaded.

Each chapter builds a peer at full size with every parameter drawn at random, saves it, loads the file into
another OpenCLIP model with `keymap.load_checkpoint`, and compares the embeddings of both. A last chapter shows
two refusals. The exit status is 1 if a difference is above 2e-5 or a refusal does not come.

    python tools/demo.py          full size: some minutes, about 6 GB of memory
    python tools/demo.py --tiny   the same story with tiny models
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the peers are those of the tests

import numpy as np
import open_clip
import timm
import torch
import transformers
from open_clip.model import resize_pos_embed
from peers import big_vision, hf, openai, openclip, timm_towers
from peers.common import Size, assert_unchanged, bits, images, max_diff, randomise, tokens
from torch import Tensor, nn

import keymap

LIMIT = 2e-5

# ViT-B-32 and ViT-B-16-SigLIP, in the words of tests/peers
TOWERS = {"image_size": 224, "image_width": 768, "image_heads": 12, "image_depth": 12, "image_mlp": 4, "text_mlp": 4}
CLIP_TEXT = {"context_length": 77, "vocab": 49408, "text_width": 512, "text_heads": 8, "text_depth": 12}
SIGLIP_TEXT = {"context_length": 64, "vocab": 32000, "text_width": 768, "text_heads": 12, "text_depth": 12}
CLIP = {**TOWERS, **CLIP_TEXT, "patch": 32, "embed_dim": 512}
SIGLIP = {**TOWERS, **SIGLIP_TEXT, "patch": 16, "embed_dim": 768}


@dataclass(frozen=True)
class Scale:
    """The sizes of the story: full, as the published models, or tiny, for a test."""

    tiny: bool = False

    @property
    def clip(self) -> dict[str, Any]:
        return dict(openai.VIT) if self.tiny else dict(CLIP)

    @property
    def siglip(self) -> dict[str, Any]:
        return {} if self.tiny else dict(SIGLIP)

    @property
    def larger(self) -> int:
        """Another image size for the CLIP model."""
        return 42 if self.tiny else 288

    def target(self, name: str, image_size: int | None = None, seed: int = 5, tanh: bool = False) -> nn.Module:
        """The OpenCLIP model of that name, every parameter random (or a tiny one of the same build)."""
        if not self.tiny:
            model: nn.Module = open_clip.create_model(name, force_image_size=image_size)
            for module in model.modules():
                if tanh and isinstance(module, nn.GELU):
                    module.approximate = "tanh"
        elif "SigLIP" in name:
            model = openclip.siglip(act="gelu_tanh" if tanh else "gelu", **self.siglip)
        else:
            sizes = {**self.clip, **({"image_size": image_size} if image_size else {})}
            model = openclip.clip(quick_gelu="quickgelu" in name, **sizes)
        done: nn.Module = randomise(model, seed)
        return done


@dataclass
class Chapter:
    """What one load gave."""

    title: str
    target: str
    result: keymap.LoadResult
    before: dict[str, float]
    differences: dict[str, float]

    @property
    def good(self) -> bool:
        return all(value <= LIMIT for value in self.differences.values())


@dataclass
class Book:
    """Prints each load, with rich where it is installed, and keeps all of them."""

    chapters: list[Chapter] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    console: Any = None

    def __post_init__(self) -> None:
        try:
            from rich.console import Console
        except ImportError:
            return
        plain = Console()
        self.console = plain if plain.is_terminal else Console(width=130)

    def heading(self, text: str) -> None:
        if self.console is not None:
            self.console.rule(text, align="left")
        else:
            print(f"\n--- {text}")

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text)

    def keep(self, chapter: Chapter) -> None:
        self.chapters.append(chapter)
        self.say(str(chapter.result))
        for tower, value in chapter.differences.items():
            verdict = "" if value <= LIMIT else f"  ABOVE {LIMIT:g}"
            was = f" (before the load: {chapter.before[tower]:.3g})" if tower in chapter.before else ""
            self.say(f"  greatest difference of {tower}: {value:.2e}{was}{verdict}")
        if not chapter.good:
            self.complaints.append(f"{chapter.title}: {chapter.differences}")

    def table(self) -> None:
        """One table of all loads."""
        head = ["file", "model", "format", "tensors", "changes", "s", "image", "text"]
        rows = []
        for chapter in self.chapters:
            report = chapter.result.to_dict()
            found = [chapter.differences.get(f"encode_{tower}") for tower in ("image", "text")]
            changes = {name: len(report[name]) for name in ("resized", "filled", "dropped")}
            changes["cast"] = sum(report["cast"].values())
            rows.append(
                [chapter.title, chapter.target, report["format"], str(sum(report["loaded"].values()))]
                + [", ".join(f"{number} {name}" for name, number in changes.items() if number) or "-"]
                + [f"{report['seconds']:.2f}"]
                + ["-" if value is None else f"{value:.1e}" for value in found]
            )
        if self.console is not None:
            from rich.table import Table

            table = Table(title="greatest differences of encode_image and encode_text against the peer's own")
            for name in head:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*row)
            self.console.print(table)
            return
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@torch.no_grad()
def differences(model: nn.Module, own: dict[str, Tensor], image: Tensor, text: Tensor) -> dict[str, float]:
    """How far the model's embeddings (not normalised) are from the peer's own."""
    encode: dict[str, Callable[[], Tensor]] = {
        "encode_image": lambda: model.encode_image(image),  # type: ignore[operator]
        "encode_text": lambda: model.encode_text(text),  # type: ignore[operator]
    }
    return {name: max_diff(encode[name](), value) for name, value in own.items()}


def load(
    book: Book,
    title: str,
    target: str,
    model: nn.Module,
    file: Path,
    own: dict[str, Tensor],
    inputs: tuple[Tensor, Tensor],
    **options: Any,
) -> None:
    """One chapter: the embeddings before, the load, the embeddings after."""
    before = differences(model, own, *inputs)
    result = keymap.load_checkpoint(model, file, **options)
    book.keep(Chapter(title, target, result, before, differences(model, own, *inputs)))


def inputs_for(sizes: dict[str, Any], full: bool = False) -> tuple[Tensor, Tensor]:
    """Random images and token ids; ``full`` rows have no end token, as SigLIP pools the last position."""
    size = Size(**sizes)
    side = size.image_hw
    return images(side), tokens(size.context_length, size.vocab, eos=None if full else -1)


# --- the chapters -------------------------------------------------------------------------------------------


def transformers_clip(book: Book, scale: Scale, folder: Path) -> Path:
    """CLIPModel.save_pretrained writes names, q/k/v and projections of its own."""
    book.heading("transformers CLIPModel.save_pretrained -> ViT-B-32-quickgelu")
    peer = hf.clip(quick_gelu=True, **scale.clip)
    peer.save_pretrained(folder / "clip")
    image, text = inputs_for(scale.clip)
    own = {"encode_image": hf.image_features(peer, image), "encode_text": hf.text_features(peer, text)}
    del peer
    file = folder / "clip" / "model.safetensors"
    model = scale.target("ViT-B-32-quickgelu")
    load(book, "transformers CLIPModel", "ViT-B-32-quickgelu", model, file, own, (image, text))
    return file


def another_size(book: Book, scale: Scale, file: Path) -> None:
    """The same file into a model for larger images; the reference is OpenCLIP's own resize."""
    book.heading(f"the same file -> ViT-B-32-quickgelu for images of {scale.larger} pixels")
    smaller = scale.target("ViT-B-32-quickgelu")
    keymap.load_checkpoint(smaller, file)
    state = dict(smaller.state_dict())
    model = scale.target("ViT-B-32-quickgelu", scale.larger)
    resize_pos_embed(state, model)
    model.load_state_dict(state)
    del state, smaller
    image, text = inputs_for({**scale.clip, "image_size": scale.larger})
    with torch.no_grad():
        own = {"encode_image": model.encode_image(image), "encode_text": model.encode_text(text)}  # type: ignore[operator]
    position = model.visual.positional_embedding.detach().clone()  # type: ignore[union-attr, operator]
    randomise(model, 6)
    load(book, "the same, resized", f"ViT-B-32-quickgelu, {scale.larger}", model, file, own, (image, text))
    apart = max_diff(model.visual.positional_embedding, position)  # type: ignore[union-attr]
    book.chapters[-1].differences["positional embedding"] = apart
    book.say(f"  greatest difference of the resized positional embedding from OpenCLIP's own: {apart:.2e}")
    if apart > LIMIT:
        book.complaints.append(f"the resized positional embedding is {apart:.2e} away from OpenCLIP's own")


def transformers_siglip(book: Book, scale: Scale, folder: Path) -> Path:
    """SiglipModel.save_pretrained; OpenCLIP's ViT-B-16-SigLIP uses the exact GELU, so the peer does too."""
    book.heading("transformers SiglipModel.save_pretrained -> ViT-B-16-SigLIP")
    peer = hf.siglip(act="gelu", **scale.siglip)
    peer.save_pretrained(folder / "siglip")
    image, text = inputs_for(scale.siglip, full=True)
    own = {"encode_image": hf.image_features(peer, image), "encode_text": hf.text_features(peer, text)}
    del peer
    file = folder / "siglip" / "model.safetensors"
    model = scale.target("ViT-B-16-SigLIP")
    load(book, "transformers SiglipModel", "ViT-B-16-SigLIP", model, file, own, (image, text))
    return file


def timm_vit(book: Book, scale: Scale, folder: Path) -> None:
    """A timm image tower; its head has a bias, which OpenCLIP's ViT has no place for: it must be zero."""
    book.heading("timm vit_base_patch32_clip_224, torch.save -> the image tower of ViT-B-32")
    if scale.tiny:
        peer = timm_towers.clip_vit(**scale.clip)
    else:
        peer = randomise(timm.create_model("vit_base_patch32_clip_224", num_classes=CLIP["embed_dim"]))
        timm_towers.zero(peer.head.bias, peer)
    torch.save(peer.state_dict(), folder / "timm.pth")
    image, text = inputs_for(scale.clip)
    with torch.no_grad():
        own = {"encode_image": peer(image)}
    del peer
    model = scale.target("ViT-B-32")
    options: dict[str, Any] = {"towers": ("image",)}
    load(book, "timm CLIP ViT", "ViT-B-32, image tower", model, folder / "timm.pth", own, (image, text), **options)
    (folder / "timm.pth").unlink()


def big_vision_npz(book: Book, scale: Scale, folder: Path) -> None:
    """flax writes linear layers transposed and heads apart; JAX's GELU is the tanh form, so the model's is too."""
    book.heading("big_vision SigLIP B/16, np.savez -> ViT-B-16-SigLIP")
    flat = big_vision.init(**scale.siglip)
    np.savez(folder / "siglip.npz", **flat)
    image, text = inputs_for(scale.siglip, full=True)
    outputs = big_vision.forward(flat, image, text)
    del flat
    own = dict(zip(("encode_image", "encode_text"), outputs, strict=True))
    model = scale.target("ViT-B-16-SigLIP", tanh=True)
    load(book, "big_vision npz", "ViT-B-16-SigLIP, tanh", model, folder / "siglip.npz", own, (image, text))
    (folder / "siglip.npz").unlink()


def recorded_big_vision(book: Book) -> None:
    """A small file that big_vision itself wrote, with the embeddings that it computed."""
    book.heading("the recorded file of the real big_vision -> a SigLIP model of its sizes")
    with np.load(big_vision.DATA / "siglip_ref.npz") as reference:
        ref = {key: torch.from_numpy(reference[key]) for key in reference.files}
    sizes = {"embed_dim": 48, "image_mlp": 2.0, "text_width": 48, "text_heads": 3, "text_depth": 2, "text_mlp": 2.0}
    model = openclip.siglip(seed=5, **sizes)
    result = keymap.load_checkpoint(model, big_vision.DATA / "siglip.npz")
    image, text = ref["img"].permute(0, 3, 1, 2), ref["txt"].long()
    with torch.no_grad():  # big_vision recorded normalised embeddings
        found = {
            "encode_image": max_diff(model.encode_image(image, normalize=True), ref["zimg"]),
            "encode_text": max_diff(model.encode_text(text, normalize=True), ref["ztxt"]),
        }
    book.keep(Chapter("big_vision npz, recorded", "SigLIP, small", result, {}, found))


def openai_archive(book: Book, scale: Scale, folder: Path) -> None:
    """OpenAI publishes TorchScript archives in half precision; keymap reads them as data and runs nothing."""
    book.heading("OpenAI CLIP ViT-B/32, TorchScript archive -> ViT-B-32-quickgelu")
    peer = openai.vit(**scale.clip)
    openai.save_archive(peer, folder / "ViT-B-32.pt")
    image, text = inputs_for(scale.clip)
    own = {"encode_image": openai.image_features(peer, image), "encode_text": openai.text_features(peer, text)}
    del peer
    model = scale.target("ViT-B-32-quickgelu")
    load(book, "OpenAI archive", "ViT-B-32-quickgelu", model, folder / "ViT-B-32.pt", own, (image, text))
    (folder / "ViT-B-32.pt").unlink()


def refusals(book: Book, scale: Scale, folder: Path, siglip: Path) -> None:
    """What does not fit is refused before a byte is written, in words that say what to do."""
    model = scale.target("ViT-B-32-quickgelu")
    before = bits(model)
    hf.clip(tower="image_proj", quick_gelu=True, **scale.clip).save_pretrained(folder / "tower")
    tower = folder / "tower" / "model.safetensors"
    for title, file in (("a lone image tower, under strict", tower), ("a file of another architecture", siglip)):
        book.heading(f"refused: {title}")
        try:
            keymap.load_checkpoint(model, file)
        except keymap.KeymapError as error:
            book.say(f"{type(error).__name__}: {error.summary}")
            for fault in error.faults[:6]:
                book.say(f"  - {fault}")
            if len(error.faults) > 6:
                book.say(f"  ... and {len(error.faults) - 6} more lines")
            assert_unchanged(model, before)
            book.say("  the model is bit for bit what it was")
        else:
            book.complaints.append(f"{title} was not refused")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' talk: no pretrained weights, deprecations of the TorchScript exporter."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    root.setLevel(level)


def run(tiny: bool = False) -> Book:
    """Load every file, compare, and print."""
    scale, book, start = Scale(tiny), Book(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="keymap-demo-") as name, quiet():
        folder = Path(name)
        clip = transformers_clip(book, scale, folder)
        another_size(book, scale, clip)
        clip.unlink()
        siglip = transformers_siglip(book, scale, folder)
        timm_vit(book, scale, folder)
        big_vision_npz(book, scale, folder)
        recorded_big_vision(book)
        openai_archive(book, scale, folder)
        refusals(book, scale, folder, siglip)
    book.heading("all loads")
    book.table()
    book.say(f"{len(book.chapters)} loads and 2 refusals in {time.perf_counter() - start:.0f} s; limit {LIMIT:g}")
    return book


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Load real checkpoints of every peer, and compare embeddings.")
    parser.add_argument("--tiny", action="store_true", help="tiny models instead of full size")
    book = run(parser.parse_args(arguments).tiny)
    for complaint in book.complaints:
        book.say(f"FAILED: {complaint}")
    return 1 if book.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
