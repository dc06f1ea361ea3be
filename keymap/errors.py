"""The errors that keymap raises: one base class, and one subclass for each kind of error.

An error leaves the model unchanged, because every check runs before the first byte of a weight is written. If something
fails after that (no memory, another process writes to the file), the message says that the model is "half loaded".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from unicodedata import category

LISTED = 24  # faults that a message lists
SHOWN = 8  # keys that a message lists


def some(keys: Iterable[str], count: int = SHOWN) -> str:
    """The first ``count`` keys and the number of the others, for a message."""
    listed = list(keys)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def count_of(number: int, noun: str) -> str:
    """A number and what is counted, for example ``1 key`` and ``2 keys``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys that have a reason each, by the reason."""
    found: dict[str, list[str]] = {}
    for key, why in reasons.items():
        found.setdefault(why, []).append(key)
    return found


def printable(text: str) -> str:
    """A line that every terminal prints: characters of control, and bytes of file names that are not UTF-8, as escapes.

    For example ``\\x1b`` and ``\\udcff``. So a file can neither move the cursor nor add a line to a message.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text)


class KeymapError(Exception):
    """Base class of keymap's errors.

    Attributes:
        summary: the first line of the message.
        faults: all faults, one text each. keymap collects every fault of a file or of a load before it raises.
    """

    def __init__(self, summary: str, faults: Iterable[str] = ()) -> None:
        self.summary = summary
        self.faults = tuple(faults)
        lines = [summary, *(f"  - {fault}" for fault in self.faults[:LISTED])]
        if len(self.faults) > LISTED:
            lines.append(f"  and {len(self.faults) - LISTED} more (in .faults)")
        super().__init__("\n".join(map(printable, lines)))


class ConfigurationWarning(UserWarning):
    """The weights fit, but the model's configuration differs from the source's, so the embeddings will differ."""


class CheckpointError(KeymapError):
    """The file is missing, truncated or corrupt, or keymap does not read files of this kind."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the file as it asks would run code. None of that code was run."""


class MappingError(KeymapError):
    """A mapping file is wrong; every fault starts with ``file:line:column``. Or a format has an unknown name."""


class DetectionError(KeymapError):
    """No registered format matches the file, or several do."""


class PlanError(KeymapError):
    """The file's keys, shapes or dtypes do not fit the model, or an argument is wrong."""


class VerifyError(KeymapError):
    """A tensor that the plan drops does not hold the values that make dropping it safe."""


class WriteError(KeymapError):
    """A file cannot be written: no folder, no permission, a full disk, a dtype that the container lacks."""


class LoadError(KeymapError):
    """The operating system failed the load, for example out of memory. The message says what happened to the model."""
