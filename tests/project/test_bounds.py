"""The bounds of tests/bounds.py fail where they have to: too many steps, too much memory, no end."""

from __future__ import annotations

import re
import signal
import sys

import pytest
from bounds import MEMORY, Peak, Steps, bounded, ends, swell


def forever():
    while True:
        pass


def backtrack():
    re.fullmatch("(a|aa)+b", "a" * 200)  # goes back over its text again and again


@pytest.mark.parametrize("work", [forever, backtrack])
def test_work_without_end_is_ended(work):
    with pytest.raises(pytest.fail.Exception, match="does not end"), ends(limit=0.2):
        work()
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_steps_are_calls_and_the_same_each_time():
    made = []
    for _ in range(2):
        with Steps() as taken:
            for number in range(1000):
                abs(number)
        made.append(taken.made)
    assert made[0] == made[1] and 1000 <= made[0] < 1010
    assert sys.getprofile() is None


def calls():
    for number in range(1000):
        abs(number)


def test_too_many_steps_fail():
    with pytest.raises(AssertionError, match="calls"), bounded(0, steps=500):
        calls()
    with bounded(1000):
        calls()


def test_too_much_memory_fails():
    Peak.or_skip()
    with pytest.raises(AssertionError, match="MB for 1000 bytes"), bounded(1000):
        swell(2 * MEMORY)
