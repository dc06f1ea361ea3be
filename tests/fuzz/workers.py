"""Many mutants in a process of its own, which may die or hang: both are seen, and the next one goes on behind them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HANG = 120.0  # seconds of the clock without a mutant done; judge.SECONDS of processor time is what a mutant may take
SPACE = 3 << 30  # bytes of address space beside what the process starts with


@dataclass
class Tally:
    """Counts of one kind, and every failure as (number of the mutant, text)."""

    words: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    @property
    def mutants(self) -> int:
        return sum(self.words.values())

    @property
    def loads(self) -> int:
        return self.words["load"]

    @property
    def refusals(self) -> int:
        return self.mutants - self.loads - self.words["FAILED"]


def work(kinds: Sequence[str], seed: int, first: int, stop: int, folder: Path) -> None:
    """The worker's side: one line of JSON a mutant."""
    import torch

    torch.set_num_threads(1)
    from fuzz.judge import Kind

    prepared = [Kind(name, folder / name, seed) for name in kinds]
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        space = pages * resource.getpagesize() + SPACE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    for kind in prepared:
        for number in range(first, stop):
            print(json.dumps(["start", kind.name, number]), flush=True)
            outcome = kind.run(number)
            print(json.dumps([outcome.word, outcome.text, outcome.seconds, outcome.grown]), flush=True)
        first = 0


def fuzz(
    kinds: Sequence[str],
    count: int,
    seed: int = 0,
    on_failure: Callable[[str, int, str], None] = lambda kind, number, text: None,
    first_of_all: str = "",
) -> dict[str, Tally]:
    """Judge ``count`` mutants of each kind; ``on_failure`` is called with every failure at once.

    ``first_of_all`` is code that the worker runs before it begins: the tests of this module let it fail.
    """
    tallies = {kind: Tally() for kind in kinds}
    left, first = list(kinds), 0
    with tempfile.TemporaryDirectory() as folder:
        while left:
            left, first = _until_death(left, count, seed, first, Path(folder), tallies, on_failure, first_of_all)
    return tallies


def _until_death(
    kinds: list[str],
    count: int,
    seed: int,
    first: int,
    folder: Path,
    tallies: dict[str, Tally],
    on_failure: Callable[[str, int, str], None],
    first_of_all: str,
) -> tuple[list[str], int]:
    """Run one worker; what is left to do when it has ended, as (kinds, first number of the first of them)."""
    tests = Path(__file__).parents[1]
    arguments = [",".join(kinds), str(seed), str(first), str(count), str(folder)]
    code = (
        f"import sys\nsys.path[:0] = sys.argv[1:3]\n{first_of_all}\nfrom fuzz.workers import main\nmain(sys.argv[3:])"
    )
    command = [sys.executable, "-c", code, str(tests), str(tests.parent), *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        kind, number, under_way = _listen(worker, kinds[0], first, tallies, on_failure)
        errors.seek(0)
        if worker.returncode == 0:
            return [], 0
        if worker.returncode > 0 or not under_way:  # an error of this program, not of what it tests
            raise RuntimeError(f"the worker ended with {worker.returncode} at {kind} {number}: {errors.read()[-3000:]}")
    text = f"the process was ended by signal {-worker.returncode} (9 after {HANG:.0f} s without an answer)"
    tallies[kind].words["FAILED"] += 1
    tallies[kind].failures.append((number, text))
    on_failure(kind, number, text)
    return (kinds[kinds.index(kind) :], number + 1) if number + 1 < count else (kinds[kinds.index(kind) + 1 :], 0)


def _listen(
    worker: subprocess.Popen[str],
    kind: str,
    first: int,
    tallies: dict[str, Tally],
    on_failure: Callable[[str, int, str], None],
) -> tuple[str, int, bool]:
    """Hear a worker to its end: (kind, number) of its last mutant, and whether that was still under way."""
    assert worker.stdout is not None
    seen, over = [time.monotonic() + 120], threading.Event()  # the start takes its time

    def watch() -> None:
        while not over.wait(0.5):
            if time.monotonic() > seen[0] + HANG:
                worker.kill()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    number, under_way = first - 1, False
    for line in worker.stdout:
        seen[0] = time.monotonic()
        if not line.startswith("["):
            continue
        word, *rest = json.loads(line)
        if word == "start":
            kind, number, under_way = rest[0], rest[1], True
            continue
        under_way = False
        tally = tallies[kind]
        tally.words[word] += 1
        tally.slowest, tally.largest = max(tally.slowest, rest[1]), max(tally.largest, rest[2])
        if word == "FAILED":
            tally.failures.append((number, rest[0]))
            on_failure(kind, number, rest[0])
    worker.wait()
    over.set()
    watching.join()
    return kind, number, under_way


def main(arguments: Sequence[str]) -> None:
    kinds, seed, first, stop, folder = arguments
    work(kinds.split(","), int(seed), int(first), int(stop), Path(folder))
