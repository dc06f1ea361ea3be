"""Bounds on what a load may cost: memory, and steps. No clock: a busy machine changes neither.

A step is a call of a function, of Python or of C, as `sys.setprofile` reports them. What has no end, and what takes
its time inside one call of C, ends after a minute of processor time, for what takes less than two seconds.
"""

from __future__ import annotations

import mmap
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

MEMORY = 64 << 20  # bytes beside four times the file
STEPS = 8_000_000  # calls that a file of a few megabytes may take
MINUTE = 60.0  # of processor time


def swell(size: int) -> mmap.mmap:
    """New memory, every page of it written to. The system maps it, so the process's own free memory does not serve."""
    held = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        held[start] = 1
    return held


class Peak:
    """The most memory that this process had at a time, since `start`."""

    def __init__(self) -> None:
        try:
            self.reset: Any = open("/proc/self/clear_refs", "w")  # noqa: SIM115
            self.status: Any = open("/proc/self/status")  # noqa: SIM115
            self.start()
        except OSError:
            self.reset = None
        self.start()

    def _now(self, name: str) -> int:
        self.status.seek(0)
        return next(int(line.split()[1]) << 10 for line in self.status if line.startswith(name))

    def start(self) -> None:
        if self.reset is None:  # only the peak of the process's whole life is known: growth below it is not seen
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            return
        self.reset.write("5")
        self.reset.flush()
        self.before = self._now("VmRSS")

    def grown(self) -> int:
        if self.reset is None:
            return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - self.before
        return self._now("VmHWM") - self.before

    @classmethod
    def or_skip(cls) -> Peak:
        """A peak that sees all growth; a test that needs one is skipped on a system that has none."""
        peak = cls()
        if peak.reset is None:
            pytest.skip("the system does not show the peak memory of a part of a process's life")
        return peak


class Steps:
    """The calls that this thread has made inside ``with``: ``made``."""

    def __init__(self) -> None:
        self.made = 0

    def __enter__(self) -> Steps:
        def count(frame: Any, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                self.made += 1

        self.before = sys.getprofile()
        sys.setprofile(count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)


@contextmanager
def ends(limit: float = MINUTE) -> Iterator[None]:
    """Fail, and end what is inside, after ``limit`` seconds of processor time, or ten times that of the clock."""

    def end(*_: object) -> None:
        pytest.fail(f"it does not end: it took more than {limit} s")

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, limit), signal.SIGALRM: (signal.ITIMER_REAL, 10 * limit)}
    handlers = {number: signal.signal(number, end) for number in clocks}
    try:
        for clock, seconds in clocks.values():
            signal.setitimer(clock, seconds)
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def bounded(size: int, steps: int = STEPS) -> Iterator[None]:
    """Fail where what is inside takes more steps, more memory than a file of this size may, or has no end."""
    peak = Peak()
    with ends(), Steps() as taken:
        yield
    grown = peak.grown()
    assert taken.made < steps, f"it took {taken.made:,} calls"
    assert grown < 4 * size + MEMORY, f"it took {grown >> 20} MB for {size} bytes"
