"""Print for people: tables of rich on a terminal, plain lines in a pipe; and the bar of a long step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from keymap.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.table import Table

    from keymap.load.progress import Progress

__all__ = ["Bar", "Screen", "progress_bar"]

_PATIENCE = 1.0  # seconds before a bar appears
_LABEL = 24  # columns that a label may have


class Screen:
    """Standard output.

    On a terminal long texts wrap within its width, and headers and labels are bold; ``NO_COLOR`` and ``TERM=dumb``
    are obeyed. Elsewhere every row is one line, nothing is cut, and there are no escape sequences. Characters of
    control are printed as escapes on both.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        if console is None and sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)

    def line(self, text: str = "") -> None:
        """One line; on a terminal it wraps."""
        if self._console is None:
            print(printable(text))
            return
        from rich.text import Text

        self._console.print(Text(printable(text), overflow="fold"))

    def title(self, text: str) -> None:
        """A line above a part of the output, after an empty line."""
        self.line()
        if self._console is None:
            print(printable(text))
            return
        from rich.text import Text

        self._console.print(Text(printable(text), style="bold", overflow="fold"))

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Labels and texts, one pair a row."""
        if self._console is None:
            for label, text in rows:
                print(f"  {printable(label)}: {printable(text)}" if label else f"  {printable(text)}")
            return
        from rich.table import Table

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", overflow="fold", max_width=_LABEL)
        grid.add_column(overflow="fold")
        self._fill(grid, rows)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Rows under headers."""
        if self._console is None:
            lines = [[printable(cell) for cell in row] for row in (headers, *rows)]
            widths = [max(len(row[column]) for row in lines) for column in range(len(headers))]
            for row in lines:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in headers:
            table.add_column(header, overflow="fold")
        self._fill(table, rows)

    def _fill(self, table: Table, rows: Iterable[Sequence[str]]) -> None:
        from rich.text import Text

        assert self._console is not None, "only a terminal gets a table of rich"
        for row in rows:
            table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
        self._console.print(table)


class Bar:
    """Bytes done and bytes in all; it appears when the step has taken a second."""

    def __init__(self, label: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._console, self._clock = label, console, clock
        self._start = clock()
        self._bar: RichProgress | None = None

    def update(self, done: int, total: int) -> None:
        """The ``progress=`` of a load, of a conversion and of a save."""
        if self._bar is None and self._clock() - self._start >= _PATIENCE:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(self._label, total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress_bar(label: str) -> Iterator[Progress | None]:
    """A bar on standard error; None if standard output or standard error is no terminal."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console

    bar = Bar(label, Console(stderr=True))
    try:
        yield bar.update
    finally:
        bar.stop()
