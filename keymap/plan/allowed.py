"""Keys that the caller allows to be missing or unexpected under strict, by patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from keymap.errors import PlanError
from keymap.plan.model import ModelView

__all__ = ["allowed", "check_missing_patterns", "checked_patterns", "keys_are", "patterns_for", "suggestion"]

_SPECIAL = re.compile(r"[*?[]")  # characters with a meaning in a pattern
_MAX_NAME = 200  # characters of a pattern that are compared with the model's keys


def checked_patterns(name: str, value: Sequence[str] | str) -> tuple[str, ...]:
    """The patterns of an argument; one string is one pattern.

    Raises:
        PlanError: they are not strings.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list, set, frozenset)) or not all(isinstance(p, str) and p for p in patterns):
        raise PlanError(f"{name}={value!r}: expected keys or patterns of keys, for example {name}=('extra.*',)")
    return tuple(patterns)


def allowed(patterns: Iterable[str], *names: str) -> bool:
    """Whether a pattern matches a key, under any of its names."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def check_missing_patterns(patterns: Sequence[str], model: ModelView) -> None:
    """Check that every pattern of ``allow_missing`` matches a key of the model.

    Raises:
        PlanError: one matches none; the message names near keys.
    """
    keys = [*model.tensors, *model.lazy]
    faults = []
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            near = get_close_matches(pattern[:_MAX_NAME], keys, 3, 0.6)
            faults.append(f"{pattern!r} matches none" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if faults:
        raise PlanError("allow_missing=: each pattern must match a key of the model", faults)


def suggestion(
    missing: Sequence[str], of_model: Iterable[str], unexpected: Sequence[str] = (), of_file: Iterable[str] = ()
) -> list[str]:
    """A line that names the arguments which allow keys to be missing or unexpected; none for no keys.

    Args:
        missing, of_model: keys that are missing, and all keys of the model.
        unexpected, of_file: keys that are unexpected, and all keys of the file.
    """
    arguments = []
    if missing:
        arguments.append(f"allow_missing={patterns_for(missing, of_model)!r}")
    if unexpected:
        arguments.append(f"allow_unexpected={patterns_for(unexpected, of_file)!r}")
    keep = "the model keeps its own values for the missing keys" if missing else "the file's keys are left out"
    return [f"to load the rest, pass {' and '.join(arguments)}; {keep}"] if arguments else []


def keys_are(keys: Sequence[str], side: str) -> str:
    """The start of a sentence about some of the keys of the file or of the model."""
    return f"{len(keys)} of the {side}'s keys {'is' if len(keys) == 1 else 'are'}"


def patterns_for(keys: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Few patterns that match these keys and none of the others: whole modules as ``name.*``, the rest one by one.

    Args:
        keys: the keys to match.
        every: all keys of that side.
    """
    wanted, others = set(keys), [key for key in every if key not in set(keys)]
    found: list[str] = []
    while wanted:
        key = next(key for key in keys if key in wanted)
        chosen, matched = _SPECIAL.sub(r"[\g<0>]", key), {key}
        for end in (at for at, character in enumerate(key) if character == "."):
            start = key[: end + 1]
            below = {other for other in wanted if other.startswith(start)}
            if len(below) > 1 and not any(other.startswith(start) for other in others):
                chosen, matched = _SPECIAL.sub(r"[\g<0>]", start) + "*", below
                break
        found.append(chosen)
        wanted -= matched
    return tuple(found)
