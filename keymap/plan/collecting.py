"""Python's cyclic garbage collection, while thousands of objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_gc"]


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable cyclic garbage collection while the block runs.

    A plan is thousands of small objects, and none of them is garbage. To visit every object of a process that has
    imported torch takes longer than the load of a model.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
