"""What tests prove, as records that outlive the run: the coverage page is made of them.

A test states what it proved after its assertions (fixture ``proves``); a run with ``--proofs FILE`` writes what the
tests that passed have stated. A record names the format, and of each tower that was loaded the *layout*: a digest of
the model's keys of that tower, indices left out. So a small model represents every configuration of its layout.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from keymap.plan.plan import Plan
from keymap.plan.to_hub import tower_of
from keymap.source.registry import registry

WORDS = ("names and shapes", "bit-equal", "parity")  # the weakest first
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_NAME = "proof"


def layouts(keys: Iterable[str]) -> dict[str, str]:
    """A digest for each tower of these keys of the hub. The layout of the text tower makes no difference."""
    hub, found = registry().hub, {}
    for key in keys:
        found.setdefault(tower_of(hub, key), set()).add(_INDEX.sub("{i}", key).removeprefix("text."))
    return {tower: hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:12] for tower, keys in found.items()}


def record(word: str, plan: Plan, towers: Iterable[str] | None = None, **more: Any) -> dict[str, Any]:
    """What a test proved of the towers that the plan loads.

    Args:
        word: one of ``WORDS``.
        plan: of the load.
        towers: those that were compared, where others were loaded too.
        more: further plain data.
    """
    assert word in WORDS, word
    compared = ("image", "text") if word == "parity" else tuple(plan.loaded)  # of embeddings, or of all tensors
    loaded = set(plan.loaded) & set(compared) if towers is None else set(towers)
    assert loaded and loaded <= set(plan.loaded), f"the plan loads {set(plan.loaded)}, not {loaded}"
    found = layouts([*(entry.key for entry in plan.entries), *plan.missing_keys])
    return {"word": word, "format": plan.format, "towers": {tower: found[tower] for tower in sorted(loaded)}, **more}


class Book:
    """Collects the records of tests that passed, and writes them at the end. With pytest-xdist, on the controller."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, str] = {}  # a record as JSON -> the first test that stated it
        self.bad: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.bad.append(report.nodeid)
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == _NAME:
                text = json.dumps(value, sort_keys=True)
                self.tests[text] = min(report.nodeid, self.tests.get(text, report.nodeid))

    def pytest_sessionfinish(self) -> None:
        found = [{**json.loads(text), "test": test} for text, test in sorted(self.tests.items())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"failed": sorted(set(self.bad)), "proofs": found}, indent=1) + "\n", "utf-8")


def state(node: pytest.Item, proof: dict[str, Any]) -> None:
    """Put a record on a test."""
    node.user_properties.append((_NAME, proof))
