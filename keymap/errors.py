"""What keymap refuses, and why: one base class, one subclass for each kind of refusal.

A refusal leaves the model as it was: it comes before the first byte of a weight is written. What can fail after that
(no memory, a file that is written to meanwhile) is told with the words "half loaded".
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
    """Base of every refusal.

    Attributes:
        summary: the first line of the message.
        faults: everything that was found wrong, one text each; all faults of a file or of a load are
            collected before the error is raised.
    """

    def __init__(self, summary: str, faults: Iterable[str] = ()) -> None:
        self.summary = summary
        self.faults = tuple(faults)
        lines = [summary, *(f"  - {fault}" for fault in self.faults[:_LISTED])]
        if len(self.faults) > _LISTED:
            lines.append(f"  and {len(self.faults) - _LISTED} more (in .faults)")
        super().__init__("\n".join(lines))


class ConfigurationWarning(UserWarning):
    """The weights fit, and the model computes something else with them: its configuration differs from the source's."""


class CheckpointError(KeymapError):
    """The file is missing, truncated, corrupt, or not a container of tensors that keymap reads."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the file as it asks would run code; nothing of it was run."""


class MappingError(KeymapError):
    """A mapping file is wrong. Every fault starts with ``file:line:column``."""


class DetectionError(KeymapError):
    """No registered format claims the file, or more than one does."""


class PlanError(KeymapError):
    """The file's tensors do not fit the model: keys, shapes or dtypes."""


class VerifyError(KeymapError):
    """A tensor does not hold the values that dropping it requires."""


class LoadError(KeymapError):
    """The system failed the load, as with memory that was not to be had; the text says what became of the model."""
