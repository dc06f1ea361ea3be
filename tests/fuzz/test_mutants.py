"""The short run: some mutants of every kind, always the same. And the judge must report every planted fault."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from bounds import Peak, swell

import keymap
from fuzz import judge, workers
from fuzz.seeds import KINDS

COUNT = 120
PATIENT = "from fuzz import judge\njudge.SECONDS = 60"  # as on a machine that is busy


@pytest.mark.slow
def test_some_mutants_of_every_kind_load_right_or_are_refused() -> None:
    tallies = workers.fuzz(list(KINDS), COUNT, first_of_all=PATIENT)
    assert {kind: tally.failures for kind, tally in tallies.items() if tally.failures} == {}
    assert all(tally.mutants == COUNT and tally.refusals >= COUNT // 4 for tally in tallies.values())
    assert all(tallies[kind].loads >= 3 for kind in KINDS if kind not in ("npy", "index"))


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> judge.Kind:
    return judge.Kind("safetensors", tmp_path_factory.mktemp("mutants"))


def _raises(error: Exception, change: bool = False):
    def load(model, *arguments, **options):
        if change:
            with torch.no_grad():
                model.visual.proj.add_(1)
        raise error

    return load


def _burns(*arguments, **options):
    start = time.process_time()
    while time.process_time() < start + judge.SECONDS:
        pass
    raise keymap.CheckpointError("at last")


def _swells(*arguments, **options):
    with swell(2 * judge.MEMORY) as held:
        raise keymap.CheckpointError(f"after {len(held)}")


PLANTED = {
    "another exception": (_raises(ValueError("odd")), "ValueError: odd"),
    "an error that only the catch-all handler caught": (
        _raises(keymap.CheckpointError("a: cannot be read (KeyError: 3)")),
        "only the catch-all handler",
    ),
    "a changed model": (_raises(keymap.CheckpointError("no"), change=True), "['visual.proj'] changed"),
    "too slow": (_burns, "it took 0."),
    "too large": (_swells, "MB for a file of"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_judge_reports_a_planted_fault(name: str, kind: judge.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    load, words = PLANTED[name]
    if load is _swells:
        Peak.or_skip()
    before = {key: value.clone() for key, value in kind.seeds[0].model.state_dict().items()}
    monkeypatch.setattr(keymap, "load_checkpoint", load)
    monkeypatch.setattr(judge, "SECONDS", 0.2 if name == "too slow" else 60)
    outcome = kind._judge(0, kind.data[0], True, True)
    kind.seeds[0].model.load_state_dict(before)
    assert outcome.word == "FAILED" and words in outcome.text, outcome


def test_the_judge_reports_values_that_differ_from_the_file(kind: judge.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    real = keymap.load_checkpoint

    def load(model, *arguments, **options):
        result = real(model, *arguments, **options)
        with torch.no_grad():
            model.visual.proj[0, 0] += 1
        return result

    monkeypatch.setattr(keymap, "load_checkpoint", load)
    assert "visual.proj is not what" in kind._judge(0, kind.data[0], True, True).text


DYING = """
import os, signal
from fuzz import judge
real = judge.Kind.run
def run(self, number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGBUS)
    return real(self, number)
judge.Kind.run = run
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_the_next_continues_after_it(tmp_path: Path) -> None:
    tally = workers.fuzz(["npy"], 5, first_of_all=DYING)["npy"]
    assert tally.mutants == 5 and tally.refusals == 4
    assert tally.failures == [
        (2, f"the process was ended by signal {int(signal.SIGBUS)} (9 after 120 s without an answer)")
    ]
