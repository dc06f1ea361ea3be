"""Compare the time of loads with the floor: a read of the file's bytes from the page cache, on all threads.

    python tools/bench.py             all cases, some minutes
    python tools/bench.py --write     the same, and docs/benchmarks.md
    python tools/bench.py --quick     tiny models, to check that it runs

Ratios compare times of one run: rounds are interleaved, and files are in the page cache. Each line shows the median,
the minimum and the maximum. Memory is measured in a separate process.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import open_clip
import torch
from peers import big_vision, hf, openclip
from safetensors.torch import load_file, save_file
from torch import nn

import keymap
from keymap.read import LazyTensor, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
VIT = {"image_size": 224, "image_width": 768, "image_heads": 12, "image_depth": 12, "image_mlp": 4, "text_mlp": 4}
CLIP_TEXT = {"context_length": 77, "vocab": 49408, "text_width": 512, "text_heads": 8, "text_depth": 12}
SIGLIP_TEXT = {"context_length": 64, "vocab": 32000, "text_width": 768, "text_heads": 12, "text_depth": 12}
LARGE = {"image_size": 224, "image_width": 1024, "image_heads": 16, "image_depth": 24, "image_mlp": 4, "text_mlp": 4}
LARGE_TEXT = {"context_length": 77, "vocab": 49408, "text_width": 768, "text_heads": 12, "text_depth": 12}
STEP, MOST_BUFFERS = 1 << 24, 256  # bytes and buffers of a call
TINY = {"image_width": 2, "image_heads": 1, "image_depth": 8300, "image_mlp": 1.0, "text_depth": 1}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "clip": {**VIT, **CLIP_TEXT, "patch": 32, "embed_dim": 512},
    "large": {**LARGE, **LARGE_TEXT, "patch": 14, "embed_dim": 768},
    "tiny": TINY,
    "siglip": {**VIT, **SIGLIP_TEXT, "patch": 16, "embed_dim": 768},
}


Loader = Callable[[nn.Module, Path], object]  # loads a file into a model


@dataclass
class Case:
    """A file, the model that it is loaded into, the target, and other loaders to compare with."""

    name: str
    file: Path
    model: str
    target: float
    against: dict[str, Loader] = field(default_factory=dict)


def model_of(kind: str, quick: bool, seed: int = 3) -> nn.Module:
    """A ViT-B-32, a ViT-L-14, a ViT-B-16-SigLIP or a CLIP of 100,000 tiny tensors; small with ``quick``."""
    build = openclip.siglip if kind == "siglip" else openclip.clip
    made: nn.Module = build(seed=seed, **({} if quick else SIZES[kind]))
    return made


def with_open_clip(model: nn.Module, file: Path) -> object:
    return open_clip.load_checkpoint(model, str(file))


def with_safetensors(model: nn.Module, file: Path, assign: bool = False) -> object:
    return model.load_state_dict(load_file(str(file)), assign=assign)


def with_mapped_torch_load(model: nn.Module, file: Path, assign: bool = False) -> object:
    return model.load_state_dict(torch.load(file, mmap=True, weights_only=True), assign=assign)


def cases(folder: Path, quick: bool) -> list[Case]:
    """Write the files."""
    for kind in ("clip", "large", "tiny"):
        state = {key: value.contiguous() for key, value in model_of(kind, quick).state_dict().items()}
        save_file(state, folder / f"{kind}.safetensors")
        torch.save(state, folder / f"{kind}.pt")
        del state
    hf.clip(**({} if quick else SIZES["clip"])).save_pretrained(folder / "hf")
    np.savez(folder / "siglip.npz", **big_vision.init(**({} if quick else SIZES["siglip"])))
    own: dict[str, Loader] = {"open_clip": with_open_clip}
    mapped: dict[str, Loader] = {
        **own,
        "safetensors + load_state_dict": with_safetensors,
        "the same, assign=True": partial(with_safetensors, assign=True),
    }
    pickled: dict[str, Loader] = {
        **own,
        "torch.load(mmap=True)": with_mapped_torch_load,
        "the same, assign=True": partial(with_mapped_torch_load, assign=True),
    }
    return [
        Case("ViT-B-32 .safetensors", folder / "clip.safetensors", "clip", 1.10, mapped),
        Case("ViT-B-32 .pt", folder / "clip.pt", "clip", 1.10, pickled),
        Case("ViT-L-14 .safetensors", folder / "large.safetensors", "large", 1.10, mapped),
        Case("ViT-L-14 .pt", folder / "large.pt", "large", 1.10, pickled),
        Case("transformers CLIP -> ViT-B-32", folder / "hf" / "model.safetensors", "clip", 1.15),
        Case("SigLIP B/16 .npz", folder / "siglip.npz", "siglip", 2.0, own),
        Case("100,000 tiny tensors .safetensors", folder / "tiny.safetensors", "tiny", 0),  # others take minutes
    ]


printed: list[str] = []


def say(text: str) -> None:
    """Print a line, and keep it for the page."""
    print(text, flush=True)
    printed.append(text)


def machine() -> str:
    """The machine, in general words."""
    rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((row.partition(": ")[2] for row in rows if row.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({name}), {platform.system()}, Python {platform.python_version()}"


READING = """\
## How to read them

- **floor** reads the bytes of the file's tensors from the page cache, each into a tensor of its own, on all threads,
  and does nothing else. It depends on where the tensors begin: the system copies 4 KB pages about half as fast again
  where file and memory are aligned, as those of `.pt` files are.
- **plan only** is `plan_load`. It costs about 20 to 30 microseconds for each tensor, whatever the size of the tensor:
  keymap reads the names, detects the format, and matches and checks every tensor in Python.
- **`.pt`** files take a longer plan, because keymap follows their pickle opcode by opcode, without importing
  anything.
- **`.npz`** files take longer for two reasons. A stored member is read twice: its checksum must be right before
  anything is written. And nearly every kernel is transposed. keymap reads a few rows at a time into memory that fits
  the cache, numpy writes them as columns, and threads share the matrices.
- **`assign=True`** copies nothing if the file has the model's own layout. What remains is the plan, and the time that
  torch takes to make each parameter. safetensors or torch with `load_state_dict` take as long and check less. In
  another layout, tensors that must be joined, split or transposed are made in new memory.
- **100,000 tiny tensors** show the cost of names, shapes and pieces, which the plan and its report keep in memory.
  The rows below show what the names and tensors take without keymap.
- **The last line** shows how evenly Python ran. On a shared machine, compare times only within a block; compare with
  the targets of 10 and 50 ms only if the last line is even.
""".splitlines()


def write_page() -> None:
    lines = [
        "<!-- Written by tools/bench.py --write. -->",
        "# Benchmarks",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} on {machine()}, open_clip {open_clip.__version__}.",
        "Each line shows the median, then the minimum and maximum. All lines of a block are from one run, with",
        "interleaved rounds. Files are in the page cache.",
        "",
        "```text",
        *printed,
        "```",
        "",
        *READING,
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def reads_of(file: Path) -> Callable[[], None]:
    """Read the bytes of a file's tensors, each into a tensor of its own, on all threads: the system's time alone.

    Tensors begin at any byte of a file, but at a multiple of 64 in memory; the system copies between such places more
    slowly than between two pages. Neighbours share a call.
    """
    found = {lazy.region[1:] for lazy in tensors_in(open_checkpoint(file).tree) if lazy.region is not None}
    calls: list[tuple[int, list[memoryview]]] = []
    end = room = -1
    for start, stop in sorted(found):
        memory = torch.zeros(stop - start, dtype=torch.uint8).numpy().data
        for at in range(0, len(memory), STEP):
            part = memory[at : at + STEP]
            if start + at != end or len(part) > room or len(calls[-1][1]) == MOST_BUFFERS:
                calls.append((start + at, []))
                room = STEP
            calls[-1][1].append(part)
            end, room = start + at + len(part), room - len(part)

    def read() -> None:
        handle = os.open(file, os.O_RDONLY)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda call: os.preadv(handle, call[1], call[0]), calls))
        os.close(handle)

    return read


def tensors_in(tree: object) -> list[LazyTensor]:
    """All tensors of a file's tree."""
    if isinstance(tree, LazyTensor):
        return [tree]
    return [lazy for inner in tree.values() for lazy in tensors_in(inner)] if isinstance(tree, Mapping) else []


turns: list[float] = []


def turn() -> None:
    """Measure the current speed of Python, which can change during a run on a shared machine."""
    start = time.perf_counter()
    for _ in range(1_000_000):
        pass
    turns.append(time.perf_counter() - start)


def timed(rounds: int, work: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """The seconds of each, in interleaved rounds, after one warm-up round."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        turn()
        for name, act in work.items():
            start = time.perf_counter()
            act()
            if number:
                spent[name].append(time.perf_counter() - start)
    return spent


def line(name: str, seconds: Sequence[float], floor: float, note: str = "") -> str:
    middle, least, greatest = statistics.median(seconds), min(seconds), max(seconds)
    return (
        f"  {name:32} {middle * 1e3:9.1f} ms  ({least * 1e3:.1f} - {greatest * 1e3:.1f})"
        f"  {middle / floor:7.2f} x floor  {note}".rstrip()
    )


def run_case(case: Case, rounds: int, quick: bool) -> dict[str, float]:
    """One file: the floor, keymap, and other loaders. Returns medians in seconds."""
    model, other = model_of(case.model, quick), model_of(case.model, quick, seed=4)
    work: dict[str, Callable[[], object]] = {
        "floor": reads_of(case.file),
        "keymap": lambda: keymap.load_checkpoint(model, case.file),
        "keymap, plan only": lambda: keymap.plan_load(model, case.file),
        "keymap, assign=True": lambda: keymap.load_checkpoint(other, case.file, assign=True),
    }
    if case.model == "clip":
        work["keymap, export to transformers"] = lambda: keymap.convert_state_dict(model.state_dict(), "hf_clip")
    ours = {name: "keymap, assign=True" if "assign=True" in name else "keymap" for name in case.against}
    for name, act in case.against.items():
        into = other if "assign=True" in name else model
        work[name] = lambda act=act, into=into: act(into, case.file)  # type: ignore[misc]
    spent = timed(rounds, work)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    say(f"{case.name}, {size / 1e6:.0f} MB into {len(model.state_dict())} tensors")
    for name, times in spent.items():
        note = f"(target {case.target:g})" if name == "keymap" and case.target else ""
        if name in case.against:
            note = f"{medians[name] / medians[ours[name]]:.1f} x {ours[name]}"
        if name == "keymap, assign=True":
            goal = "  (target 0.1)" if case.target == 1.1 else ""  # in the model's own layout
            note = f"{medians[name] / medians['keymap']:.2f} x keymap{goal}"
        say(line(name, times, medians["floor"], note))
    return medians


# --- plans ---------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """A model of many tiny tensors: it has OpenCLIP's names and no modules."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, **options: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.tensors


def many(count: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An image tower as transformers writes it (16 keys a block), about ``count`` keys, and OpenCLIP's keys of it."""
    w = 2
    file = {
        "vision_model.embeddings.class_embedding": torch.zeros(w),
        "vision_model.embeddings.patch_embedding.weight": torch.zeros(w, 3, 1, 1),
        "vision_model.embeddings.position_embedding.weight": torch.zeros(2, w),
    }
    hub = {
        "visual.class_embedding": torch.zeros(w),
        "visual.conv1.weight": torch.zeros(w, 3, 1, 1),
        "visual.positional_embedding": torch.zeros(2, w),
    }
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for part in ("weight", "bias"):
            file[f"vision_model.{theirs}.{part}"] = torch.zeros(w)
            hub[f"visual.{ours}.{part}"] = torch.zeros(w)
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for number in range((count - len(file)) // 16):
        old, new = f"vision_model.encoder.layers.{number}.", f"visual.transformer.resblocks.{number}."
        for part in ("weight", "bias"):
            wide = (w, w) if part == "weight" else (w,)
            for letter in "qkv":
                file[f"{old}self_attn.{letter}_proj.{part}"] = torch.zeros(wide)
            hub[f"{new}attn.in_proj_{part}"] = torch.zeros(3 * w, *wide[1:])
            for theirs, ours in names.items():
                shape = (w,) if "norm" in theirs else wide
                file[f"{old}{theirs}.{part}"] = torch.zeros(shape)
                hub[f"{new}{ours}.{part}"] = torch.zeros(shape)
    return file, hub


def plans(model: nn.Module, file: Path, count: int) -> None:
    for _ in range(count):
        keymap.plan_load(model, file)


def run_plans(folder: Path, rounds: int, counts: Sequence[int]) -> None:
    """The time of a plan by the number of keys, the smallest first; small ones in series, to have a time to measure."""
    spent: dict[int, list[float]] = {}
    for count in counts:
        tensors, hub = many(count)
        keys, model, file = len(tensors), Many(hub), folder / f"many{count}.safetensors"
        save_file(tensors, file)
        series = max(1, 8000 // keys)
        times = timed(rounds, {"plans": partial(plans, model, file, series)})["plans"]
        spent[keys] = [seconds / series for seconds in times]
    say("plan_load of a transformers CLIP image tower by number of keys, including reading the header")
    first = 0.0
    for keys, times in spent.items():
        each = statistics.median(times) / keys
        first = first or each
        goal = "  (target 6 ms)" if keys < 1000 else ""
        say(
            f"  {keys:7} keys {statistics.median(times) * 1e3:9.1f} ms  ({min(times) * 1e3:.1f} - "
            f"{max(times) * 1e3:.1f})  {each * 1e6:6.1f} us a key  {each / first:.2f} x the first row's{goal}"
        )


# --- memory --------------------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """Bytes of anonymous and of mapped memory of this process; 0 if the system does not report them."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    sizes = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in text.splitlines()[1:]}
    return sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"]


LOADERS: dict[str, Loader] = {
    "keymap": keymap.load_checkpoint,
    "safetensors.load_file only": lambda _, file: load_file(str(file)),
    "the model's state_dict() only": lambda model, _: model.state_dict(),
}


def memory_of(kind: str, file: Path, quick: bool, loader: str) -> None:
    """In a separate process: load while a thread watches; print the memory that the load took beyond the model."""
    model = model_of(kind, quick)
    keymap.list_formats()  # reads the mappings, once in a process
    small = openclip.clip()
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in small.state_dict().items()}, Path(folder) / "small.safetensors")
        keymap.load_checkpoint(small, Path(folder) / "small.safetensors")
    done = threading.Event()
    before = memory()
    seen = [before]

    def watch() -> None:
        while not done.is_set():
            seen.append(memory())
            done.wait(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = LOADERS[loader](model, file)
    seen.append(memory())
    done.set()
    watcher.join()
    largest = max(value.numel() * value.element_size() for value in model.state_dict().values())
    del result
    extra = [(max(column) - start) / 1e6 for column, start in zip(zip(*seen, strict=True), before, strict=True)]
    print(f"{extra[0]:.1f} {extra[1]:.1f} {largest / 1e6:.1f}")


def run_memory(case: Case, quick: bool, loader: str = "keymap") -> None:
    command = [sys.executable, __file__, "--memory-of", case.model, "--file", str(case.file), "--by", loader]
    found = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=False)
    if found.returncode:
        say(f"  {case.name:32} could not be measured: {found.stderr.strip().splitlines()[-1:]}")
        return
    extra, mapped, largest = (float(word) for word in found.stdout.split()[-3:])
    target = f" (largest tensor {largest:.1f} MB, target {largest + 32:.0f} MB)" if loader == "keymap" else ""
    name = case.name if loader == "keymap" else f"  {loader}"
    say(f"  {name:34} {extra:8.1f} MB anonymous{target}, {mapped:.0f} MB mapped")


# --- once in a process ---------------------------------------------------------------------------------------

ONCE = """
import time, torch
start = time.perf_counter()
import keymap
keymap.load_checkpoint  # the public names are imported on first use
imported = time.perf_counter()
keymap.list_formats(hub="open_clip")  # reads what a load into a CLIP reads
print(imported - start, time.perf_counter() - imported)
"""


def run_once(rounds: int, warm: int) -> None:
    """The cost that each process has once: the import beyond torch, and reading the mappings at the first call.

    Args:
        rounds: how many processes of each kind are timed.
        warm: how many run before them.
    """
    spent: dict[str, list[list[float]]] = {"an installed release": [], "a checkout": []}
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        site = str(Path(folder) / "site")  # not the working folder of the processes, which Python searches first
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, str(ROOT)]
        subprocess.run([sys.executable, *install], check=True, env=compiled)
        for _ in range(rounds + warm):
            for kind, place in zip(spent, (site, ROOT), strict=True):
                here = {**compiled, "PYTHONPATH": str(place)}
                command = [sys.executable, "-c", ONCE]
                found = subprocess.run(command, capture_output=True, text=True, check=True, env=here, cwd=folder)
                spent[kind].append([float(word) * 1e3 for word in found.stdout.split()])
    say("once in a process")
    targets = ("  (target 50 ms)", "")
    names = ("import keymap, beyond torch", "reading the mappings, at first use")
    for kind, rows in spent.items():
        for name, times, target in zip(names, zip(*rows[warm:], strict=True), targets, strict=True):
            label = f"{name}, {kind}"
            say(f"  {label:58} {statistics.median(times):7.1f} ms  ({min(times):.1f} - {max(times):.1f}){target}")


# --- all -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time keymap's loads against a plain copy of the same bytes.")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed (9)")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md too")
    parser.add_argument("--only", default="", help="only cases whose name contains this, without plans and memory")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (as torch chooses)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--by", default="keymap", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.memory_of:
        memory_of(asked.memory_of, asked.file, asked.quick, asked.by)
        return 0
    rounds = 1 if asked.quick else asked.rounds
    checksums = "isal" if find_spec("isal") else "zlib"
    threads = f"{torch.get_num_threads()} threads"
    say(f"{rounds} rounds, torch {torch.__version__} with {threads}, checksums by {checksums}")
    with tempfile.TemporaryDirectory(prefix="keymap-bench-") as name:
        folder = Path(name)
        if not asked.only:  # first, while the process holds no more than that of a user
            run_plans(folder, min(rounds, 5), (40, 400) if asked.quick else (400, 10_000, 100_000))
        some = [case for case in cases(folder, asked.quick) if asked.only in case.name]
        for case in some:
            run_case(case, 1 if case.model == "tiny" else rounds, asked.quick)
        if asked.only:
            return 0
        run_once(min(rounds, 5), 0 if asked.quick else 1)
        say("peak memory of a load, beyond the model")
        for case in [case for case in some if case.model == "tiny"] if asked.quick else some:
            for loader in LOADERS if case.model == "tiny" and not asked.quick else ("keymap",):
                run_memory(case, asked.quick, loader)
    middle, least, greatest = (how(turns) * 1e3 for how in (statistics.median, min, max))
    say(
        f"one million iterations of an empty Python loop, over the run: {middle:.0f} ms  ({least:.0f} - {greatest:.0f})"
    )
    if asked.write:
        write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
