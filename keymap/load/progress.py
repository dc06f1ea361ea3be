"""Count bytes for the caller's ``progress=``."""

from __future__ import annotations

from collections.abc import Callable

from keymap.errors import PlanError

__all__ = ["Counter", "Progress", "ProgressError"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class ProgressError(Exception):
    """The caller's function raised an exception, which is the cause of this one."""


class Counter:
    """Counts the bytes that are done, and reports them.

    The caller's function is called in the thread that called keymap: first with (0, total), then with numbers that
    never decrease, last with (total, total).

    Raises:
        PlanError: it is no function.
        ProgressError: it raised an exception.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        if progress is not None and not callable(progress):
            raise PlanError(
                f"progress={progress!r}: pass a function of two numbers, the bytes done and the bytes in all"
            )
        self.done, self.total = 0, total
        self._progress = progress
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Count more bytes."""
        self.done += nbytes
        if self._progress is not None:
            try:
                self._progress(self.done, self.total)
            except Exception as error:
                raise ProgressError(f"progress= raised {type(error).__name__}: {error}") from error
