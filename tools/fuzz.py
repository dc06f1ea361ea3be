"""Load many mutants of real checkpoint files. Each must load the right values, or be refused and change nothing.

    python tools/fuzz.py --mutants 10000                      every kind of file
    python tools/fuzz.py --kind npz --kind yaml --seed 3      some kinds, other mutants
    python tools/fuzz.py --kind npz --only 4711 --keep mutant  make one mutant again, and keep its file

tests/fuzz/judge.py defines a failure: another exception, more than 2 s, more memory than four times the file plus
64 MB, a refusal that changed the model, values that the report does not explain, or a process that dies. The exit
status is 1 if a mutant fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def one(kind: str, seed: int, number: int, folder: Path) -> bool:
    """Judge one mutant in this process and keep it; True if it did not fail."""
    judge = import_module("fuzz.judge")
    made = judge.Kind(kind, folder / kind, seed)
    which, data, intact, strict = made.make(number)
    outcome = made.run(number)
    name = made.seeds[which].path.name
    print(f"{kind} {number}: {outcome.word} {outcome.text}\n  {outcome.seconds:.3f} s, {outcome.grown >> 10} KB more")
    print(
        f"  a mutant of {name}, {len(data)} bytes, strict={strict}, checksums {'as written' if intact else 'repaired'}"
    )
    print(f"  the file is {folder / kind / 'mutant'}")
    return bool(outcome.word != "FAILED")


def main() -> int:
    kinds = import_module("fuzz.seeds").KINDS
    workers = import_module("fuzz.workers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000, help="of each kind")
    parser.add_argument("--kind", action="append", choices=list(kinds), help="only these; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="only this mutant, with one --kind")
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="where --only writes the mutant")
    given = parser.parse_args()
    chosen = given.kind or list(kinds)
    if given.only is not None:
        return 0 if one(chosen[0], given.seed, given.only, given.keep) else 1
    failed = 0
    columns = ["mutants", "loads", "refusals", "failures", "slowest", "most MB"]
    print(f"{'kind':<12} {' '.join(f'{name:>8}' for name in columns)} {'s':>6}")
    for kind in chosen:
        start = time.monotonic()
        tally = workers.fuzz(
            [kind], given.mutants, given.seed, lambda k, n, text: print(f"  {k} {n}: {text}", flush=True)
        )[kind]
        failed += len(tally.failures)
        print(
            f"{kind:<12} {tally.mutants:>8} {tally.loads:>8} {tally.refusals:>8} {len(tally.failures):>8} "
            f"{tally.slowest:>7.2f}s {tally.largest / 2**20:>8.1f} {time.monotonic() - start:>6.0f}",
            flush=True,
        )
        print("  " + ", ".join(f"{word} {count}" for word, count in tally.words.most_common()), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
