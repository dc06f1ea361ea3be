"""Count bytes for the caller's ``progress=``."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Counter", "Progress"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Counter:
    """Counts the bytes that are done, and reports them.

    The caller's function is called in the thread that called keymap: first with (0, total), then with numbers that
    never decrease, last with (total, total).
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.done, self.total = 0, total
        self._progress = progress
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Count more bytes."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self.total)
