"""Compare conversions with `cp` of the same file, and loads of files that are not in the page cache with their read.

    python tools/bench_files.py             half an hour, 10 GB of free disk
    python tools/bench_files.py --write     the same, and docs/benchmarks-files.md; with --only a part of it
    python tools/bench_files.py --quick     a tiny model, to check that it runs

Each round has all cases, in another order. A line shows the median, the minimum and the maximum. A ratio is the
geometric mean of those of each round, with its standard error: storage is fast for a while and slow for a while, by a
factor of two, so a median jumps between the two. Before a cold load the file is read once, then its pages are dropped
with `posix_fadvise(DONTNEED)`; the storage of the machine may still cache them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import open_clip
import torch
from bench import SIZES, reads_of
from peers import hf, openclip
from safetensors.torch import load_file, save_file

import keymap

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks-files.md"
BLOCK = 1 << 23
Run = Callable[[], object]


def evict(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle(path: Path, read: Run) -> None:
    """Read a file that is not in the page cache, and drop it again."""
    evict(path)
    read()
    evict(path)


def write_once(source: Path, out: Path) -> None:
    """Copy a file and remove the copy: the next case writes a new file, after the same case as all others."""
    shutil.copyfile(source, out)
    os.sync()
    out.unlink()


def read_once(path: Path) -> None:
    """Read a file from its beginning to its end."""
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while file.readinto(block):
            pass


def by_hand(source: Path, destination: Path) -> None:
    """What a script does: load all tensors, convert the state dict, save it."""
    if source.suffix == ".npz":
        tensors = {key: torch.from_numpy(value) for key, value in np.load(source).items()}
    else:
        tensors = load_file(source) if source.suffix == ".safetensors" else torch.load(source, weights_only=True)
    converted = keymap.convert_state_dict(tensors, to="open_clip")
    save_file({key: value.contiguous() for key, value in converted.items()}, destination)


def compare(title: str, cases: Mapping[str, Run], base: str, rounds: int, before: Run = lambda: None) -> list[str]:
    """Time the cases; one line each, with its ratio to ``base``.

    The order is another one in each round: storage with a rate limit is slower after a case that read much at once.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in random.Random(number).sample(list(cases), len(cases)):
            before()
            os.sync()  # else the system writes the bytes of the case before during this one
            start = time.perf_counter()
            cases[name]()
            times[name].append(time.perf_counter() - start)
    lines = [title]
    for name, all_of in times.items():
        spread = f"({min(all_of):.2f} - {max(all_of):.2f})"
        own = f"  {name:<44} {statistics.median(all_of):6.2f} s  {spread:<16}"
        lines.append(f"{own} {ratio(all_of, times[base])} x {base}")
    print("\n".join(lines), flush=True)
    return lines


def ratio(times: Sequence[float], base: Sequence[float]) -> str:
    """The geometric mean of the ratios of the rounds, and its standard error."""
    logarithms = [math.log(own / other) for own, other in zip(times, base, strict=True)]
    error = statistics.stdev(logarithms) / math.sqrt(len(logarithms)) if len(logarithms) > 1 else 0.0
    middle = math.exp(statistics.mean(logarithms))
    return f"{middle:5.2f} ± {middle * error:.2f}"


def conversions(folder: Path, model: torch.nn.Module, rounds: int) -> list[str]:
    """transformers' layout to OpenCLIP's, from a folder and from a .pt file, and a folder of transformers."""
    source, pt, out = folder / "hf" / "model.safetensors", folder / "hf.pt", folder / "out.safetensors"
    keymap.save_checkpoint(model, folder / "hf", "hf_clip")
    torch.save(load_file(source), pt)

    def through_transformers() -> None:
        from transformers import CLIPModel

        CLIPModel.from_pretrained(folder / "hf").save_pretrained(folder / "hf2")

    cases: dict[str, Run] = {
        "cp": lambda: subprocess.run(["cp", source, out], check=True),
        "keymap.convert_checkpoint": lambda: keymap.convert_checkpoint(source, out, "open_clip"),
        "load, convert and save by hand": lambda: by_hand(source, out),
        "transformers: from_pretrained, save_pretrained": through_transformers,
    }
    title = f"convert .safetensors of {source.stat().st_size / 1e6:.0f} MB"
    lines = compare(title, cases, "cp", rounds, partial(write_once, source, out))
    shutil.rmtree(folder / "hf2")
    npz = folder / "hf.npz"
    keymap.convert_checkpoint(source, npz, "hf_clip")
    for other in (pt, npz):
        cases = {
            "cp": partial(subprocess.run, ["cp", other, out], check=True),
            "keymap.convert_checkpoint": partial(keymap.convert_checkpoint, other, out, "open_clip"),
            "load, convert and save by hand": partial(by_hand, other, out),
        }
        title = f"convert {other.suffix} of {other.stat().st_size / 1e6:.0f} MB to .safetensors"
        lines += compare(title, cases, "cp", rounds, partial(write_once, other, out))
        other.unlink()
    out.unlink()
    return lines


def cold_loads(folder: Path, model: torch.nn.Module, rounds: int) -> list[str]:
    """OpenCLIP's own layout into a model that is there, the file dropped from the page cache before each case.

    Before that the file is read once: the time of a cold read depends on the state in which the case before it left the
    memory and the storage, by a factor of up to two.
    """
    lines: list[str] = []
    for suffix in (".safetensors", ".pt"):
        path = folder / f"own{suffix}"
        keymap.save_checkpoint(model, path, "open_clip_flat")
        read_fast = reads_of(path)
        cases: dict[str, Run] = {
            "fastest parallel read": read_fast,
            "one sequential read": partial(read_once, path),
            "keymap.load_checkpoint": partial(keymap.load_checkpoint, model, path),
            "open_clip.load_checkpoint": partial(open_clip.load_checkpoint, model, str(path)),
        }
        title = f"load {suffix} of {path.stat().st_size / 1e6:.0f} MB, not in the page cache"
        lines += compare(title, cases, "fastest parallel read", rounds, partial(settle, path, read_fast))
        path.unlink()
    return lines


PARTS: dict[str, tuple[Callable[[Path, torch.nn.Module, int], list[str]], int]] = {
    "Conversions": (conversions, 15),  # with so many rounds
    "Cold loads": (cold_loads, 40),
}


def write(measured: Mapping[str, list[str]]) -> None:
    """Write the measured parts of the page; the others stay."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in text.split("\n## ")[1:]}
    day = f"ViT-L-14, measured {time.strftime('%Y-%m-%d')} on {os.cpu_count()} cores."
    for name, lines in measured.items():
        sections[name] = "\n".join([day, "", "```text", *lines, "```"])
    head = (
        "<!-- Written by tools/bench_files.py --write. -->\n# Conversions and cold loads\n\n"
        "Each line shows the median, the minimum and the maximum of rounds with all cases in a new order. A ratio is\n"
        "the geometric mean of those of each round, with its standard error. Files are written without fsync.\n"
        "Before a cold load the file is read and dropped from the page cache.\n"
    )
    PAGE.write_text(head + "".join(f"\n## {name}\n\n{sections[name]}\n" for name in PARTS if name in sections), "utf-8")


def main() -> int:
    """Run the cases; with --write also write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-files.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--only", choices=PARTS, help="one part of the page; the other stays")
    parser.add_argument("--folder", type=Path, help="where files are written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.clip()  # imports transformers before the first round
    model = openclip.clip(seed=1) if options.quick else openclip.clip(seed=1, quick_gelu=True, **SIZES["large"])
    measured = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in [options.only] if options.only else PARTS:
            measure, rounds = PARTS[part]
            measured[part] = measure(Path(name), model, 1 if options.quick else rounds)
    if options.write:
        write(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
