"""The entry point: exit codes, and what is printed when a command is refused, misused or interrupted."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

import click

from keymap.cli.advice import in_options
from keymap.cli.answer import REFUSED, USAGE, error_document
from keymap.cli.commands import cli
from keymap.errors import LISTED, KeymapError, printable

__all__ = ["main"]

_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
_STREAM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a stream that takes no more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after the name of the program; None takes those of the process.

    Returns:
        The exit code: 0 right, 1 refused or different, 2 wrong usage, 130 interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character gets its escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(words, as_json="--json" in words[: words.index("--") if "--" in words else None])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has enough; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except OSError as error:
        if error.errno not in _STREAM_ERRORS:
            raise
        return _unprintable(error)
    return code


def _unprintable(error: OSError) -> int:
    """The exit code where the answer cannot be printed, for example because the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"keymap: the answer cannot be printed: {error.strerror}", err=True)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return REFUSED


def _run(words: list[str], as_json: bool) -> int:
    """The exit code of a command; errors are printed."""
    command = next((word for word in words if word in cli.commands), "")
    try:
        return int(cli.main(words, prog_name="keymap", standalone_mode=False) or 0)
    except click.ClickException as error:
        if as_json:
            click.echo(error_document(command, "UsageError", error.format_message(), ()))
        else:
            error.show()
        return USAGE
    except KeymapError as error:
        if as_json:
            faults = map(in_options, error.faults)
            click.echo(error_document(command, type(error).__name__, in_options(error.summary), faults))
        else:
            _print_refusal(error)
        return REFUSED
    except (KeyboardInterrupt, click.Abort):
        if as_json:
            click.echo(error_document(command, "Interrupted", "interrupted", ()))
        else:
            click.echo("keymap: interrupted", err=True)
        return _INTERRUPTED


def _print_refusal(error: KeymapError) -> None:
    click.echo(f"keymap: {printable(in_options(error.summary))}", err=True)
    for fault in error.faults[:LISTED]:
        click.echo(f"  - {printable(in_options(fault))}", err=True)
    if len(error.faults) > LISTED:
        click.echo(f"  and {len(error.faults) - LISTED} more; --json lists all", err=True)
