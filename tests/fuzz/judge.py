"""The outcome of one mutant: a right load, a refusal, or a failure with its reason."""

from __future__ import annotations

import io
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from bounds import MEMORY, Peak
from torch import Tensor

import keymap
from fuzz.mutate import mutant
from fuzz.seeds import KINDS, Seed
from keymap.load.copying import materialise
from keymap.source.hubs import ask
from keymap.source.open import open_source

SECONDS = 2.0  # of processor time: what a mutant may take on a machine that does nothing else


def _alike(one: Tensor, other: Tensor) -> bool:
    """The same values; which of its many bit patterns a NaN has depends on how a cast is vectorised."""
    if one.numel() != other.numel() or one.dtype != other.dtype:
        return False
    other = other.reshape(one.shape)  # a scalar may be () or (1,)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Outcome:
    """Of one mutant.

    Attributes:
        word: ``load``, the refusal's class, or ``FAILED``.
        text: the failure in words, or the refusal's first line.
    """

    word: str
    text: str
    seconds: float
    grown: int


@dataclass
class Kind:
    """Mutants of one kind of file, made and judged one after the other in a folder."""

    name: str
    folder: Path
    seed: int = 0
    seeds: list[Seed] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seeds = KINDS[self.name](self.folder)
        self.data = [seed.path.read_bytes() for seed in self.seeds]
        self.before = {id(seed.model): self._copy(seed) for seed in self.seeds}
        self.expected: dict[int, dict[str, bytes]] = {}
        self.originals: list[dict[str, Tensor]] = []
        self.peak = Peak()
        for number, seed in enumerate(self.seeds):  # also warms every cache
            self.originals.append(self._by_peer(self.data[number]))
            outcome = self._judge(number, self.data[number], True, True)
            wanted = "load" if self.name not in ("npy", "yaml") else outcome.word
            assert outcome.word == wanted, f"the seed {seed.path.name} does not load: {outcome.text}"

    @staticmethod
    def _copy(seed: Seed) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in seed.model.state_dict().items()}

    def make(self, number: int) -> tuple[int, bytes, bool, bool]:
        """Which seed, the mutant, whether values must be the original's, and ``strict``."""
        rng = Random(f"{self.seed} {self.name} {number}")
        which = rng.randrange(len(self.seeds))
        data, intact = mutant(self.name, self.data[which], rng)
        return which, data, intact, rng.random() < 0.75

    def run(self, number: int) -> Outcome:
        return self._judge(*self.make(number))

    def _judge(self, which: int, data: bytes, intact: bool, strict: bool) -> Outcome:
        seed = self.seeds[which]
        path = self.folder / "mutant" / seed.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        for other in seed.beside:
            if not (path.parent / other.name).exists():
                (path.parent / other.name).write_bytes(other.read_bytes())
        file, options = seed.checkpoint or path, seed.options(path)
        self.peak.start()
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = keymap.load_checkpoint(seed.model, file, strict, **options)
            word, text = "load", ""
        except keymap.KeymapError as error:
            word, text = type(error).__name__, str(error).split("\n")[0]
        except Exception as error:
            word, text = "FAILED", f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        grown = self.peak.grown()
        if word == "load":
            fault = self._wrong(which, result, file, options, data, intact, strict)
        elif "cannot be read (" in text:
            fault = f"only the catch-all handler caught it: {text}"
        else:
            fault = self._changed(seed)
        size = max(len(data), file.stat().st_size)
        if word == "FAILED":
            fault = text
        elif seconds > SECONDS:
            fault = f"it took {seconds:.1f} s"
        elif grown > 4 * size + MEMORY:
            fault = f"it took {grown >> 20} MB for a file of {size} bytes"
        if word == "load":
            with torch.no_grad():
                for key, value in seed.model.state_dict().items():
                    value.copy_(self.before[id(seed.model)][key])
        return Outcome("FAILED", fault, seconds, grown) if fault else Outcome(word, text, seconds, grown)

    def _changed(self, seed: Seed) -> str:
        before = self.before[id(seed.model)]
        now = seed.model.state_dict()
        changed = [key for key in before if not torch.equal(now[key], before[key])]
        return f"refused, and yet {changed[:3]} changed" if changed else ""

    def _wrong(
        self, which: int, result: Any, file: Path, options: dict[str, Any], data: bytes, intact: bool, strict: bool
    ) -> str:
        """What is not right with a load; empty for a right one."""
        seed, plan = self.seeds[which], result.report.plan
        now = {key: _bytes(value) for key, value in seed.model.state_dict().items()}
        if strict and (result.missing_keys or result.unexpected_keys or plan.mismatched):
            return f"strict, and yet {result.missing_keys[:3]} are missing, {result.unexpected_keys[:3]} left over"
        if seed.exact and intact:
            wanted = self.expected.setdefault(which, now)
            chosen = now if strict else {entry.key for entry in plan.entries}
            if any(now[key] != wanted[key] for key in chosen):
                return "the values are not the original's, and no checksum showed it"
        written = {entry.key for entry in plan.entries}
        kept = {key for note in plan.notes for key in [note.partition(":")[0]] if key in now}
        before = self.before[id(seed.model)]
        for key in now.keys() - written - kept:
            if now[key] != _bytes(before[key]):
                return f"{key} changed, and the report does not say so"
        sources = open_source(file, True, ask(mapping=options.get("mapping")), None).top
        tensors = {key: lazy for one in sources for key, lazy in one.unwrapped.tensors.items()}
        for entry in plan.entries:
            if entry.resize is None:
                value = materialise(entry.layout, lambda key: tensors[key].read(), entry.dtype)
                if _bytes(value) != now[entry.key]:
                    return f"{entry.key} is not what the report says"
        read, wanted = self._by_peer(data), self.originals[which]
        for entry in plan.entries:
            whole = entry.layout.copied_whole and entry.layout.sources == (entry.key,) and entry.resize is None
            if not whole or entry.key not in read:
                continue
            mine = seed.model.state_dict()[entry.key]
            theirs = read[entry.key].to(entry.dtype)  # torch gives what lies in memory for some deflated members
            if not _alike(mine, theirs) and not _alike(mine, wanted[entry.key]):
                return f"{entry.key} is not what the format's own reader gives, nor what was saved"
        return ""

    def _by_peer(self, data: bytes) -> dict[str, Tensor]:
        """The tensors as the format's own reader gives them, where it reads the file."""
        try:
            if self.name == "safetensors":
                return safetensors.torch.load(data)
            if self.name in ("zip-pt", "legacy-pt"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = torch.load(io.BytesIO(data), weights_only=True)
                return {key: value for key, value in found.items() if isinstance(value, Tensor)}
        except Exception:  # it refuses other things
            pass
        return {}
