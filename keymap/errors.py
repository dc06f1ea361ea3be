"""The errors: one base class, one subclass for each kind of refusal.

A refusal leaves the model unchanged: it comes before any weight is written. The message of an error that comes later
(out of memory, a file that changes during the load) says "half loaded".
"""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 24  # faults that a message lists
SHOWN = 8  # keys that a message lists


def some(keys: Iterable[str], count: int = SHOWN) -> str:
    """The first few of many keys, for a message."""
    listed = list(keys)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


class KeymapError(Exception):
    """Base of every error that keymap raises.

    Attributes:
        summary: the first line of the message.
        faults: everything that is wrong, one text each. All faults of a file or of a load are collected before the
            error is raised; the message lists the first of them.
    """

    def __init__(self, summary: str, faults: Iterable[str] = ()) -> None:
        self.summary = summary
        self.faults = tuple(faults)
        lines = [summary, *(f"  - {fault}" for fault in self.faults[:_LISTED])]
        if len(self.faults) > _LISTED:
            lines.append(f"  and {len(self.faults) - _LISTED} more (in .faults)")
        super().__init__("\n".join(lines))


class ConfigurationWarning(UserWarning):
    """The weights fit, but the model's configuration differs from the source's, so its outputs will differ."""


class CheckpointError(KeymapError):
    """The file is missing, truncated or corrupt, or keymap does not read its container."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the file would run code that it names; no code was run."""


class MappingError(KeymapError):
    """A mapping file is wrong; every fault starts with ``file:line:column``. Or a format has an unknown name."""


class DetectionError(KeymapError):
    """No registered format claims the file, or more than one does."""


class PlanError(KeymapError):
    """The file's keys, shapes or dtypes do not fit the model, or an argument is wrong."""


class VerifyError(KeymapError):
    """A tensor that would be left out does not hold the values that this requires."""


class LoadError(KeymapError):
    """The operating system failed during the load, for example out of memory; the text says if the model is changed."""
