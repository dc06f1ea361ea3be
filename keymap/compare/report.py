"""What a comparison found, and how it is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod
from typing import Any

from keymap.errors import count_of, printable

__all__ = ["Comparison", "Difference"]

_SHOWN = 40  # lines of one tower
_FOLDED = 2  # like lines from which on they are one
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])|(?<=_)\d+(?=/)")  # of a layer
_ONLY = {"missing_in_b": "-", "missing_in_a": "+"}


@dataclass(frozen=True)
class Difference:
    """One tensor that differs.

    Attributes:
        tower: of the tensor; "" for a key that no rule owns.
        key: its name, in the names that the comparison uses.
        kind: ``missing_in_a``, ``missing_in_b``, ``shape``, ``value``, or, only if asked for, ``dtype``.
        shape_a, shape_b, dtype_a, dtype_b: of the two tensors; None where it is missing.
        keys_a, keys_b: the keys of the two files that the tensor is made of.
        max_abs: the largest |a - b|; infinite where one of the two is NaN or infinite. None without values.
        where: the position of that element.
        value_a, value_b: the two values there.
        differing: how many elements differ by more than the tolerance.
    """

    tower: str
    key: str
    kind: str
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    keys_a: tuple[str, ...] = ()
    keys_b: tuple[str, ...] = ()
    max_abs: float | None = None
    where: tuple[int, ...] | None = None
    value_a: float | complex | None = None
    value_b: float | complex | None = None
    differing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: numbers that JSON does not have are texts, for example ``"inf"``."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return _line(self, self.key, (self,))


@dataclass(frozen=True)
class Comparison:
    """What `compare_checkpoints` found.

    Attributes:
        a, b: the files.
        format_a, format_b: their formats; "" for none.
        compared_as: the format whose names the keys have; "" for the files' own names.
        tensors: how many were compared.
        differences: in the order of a's keys, then those that only b has.
        dtypes: pairs of unlike dtypes, for example ``"float32, float16"``, and how many tensors have them.
        tolerance: as it was passed.
        max_abs: the largest |a - b| of all values, also of those within the tolerance.
        notes: which files were chosen, and what was not compared.
    """

    a: str
    b: str
    format_a: str
    format_b: str
    compared_as: str
    tensors: int
    differences: tuple[Difference, ...]
    dtypes: Mapping[str, int]
    tolerance: float = 0.0
    max_abs: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """True if there is no difference."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "format_a": self.format_a,
            "format_b": self.format_b,
            "compared_as": self.compared_as,
            "equal": self.equal,
            "tensors": self.tensors,
            "differences": [one.to_dict() for one in self.differences],
            "dtypes": dict(self.dtypes),
            "tolerance": self.tolerance,
            "max_abs": _plain(self.max_abs),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"--- {_titled(self.a, self.format_a)}", f"+++ {_titled(self.b, self.format_b)}"]
        if not self.equal:
            names = f"the names of {self.compared_as}" if self.compared_as else "the files' own names"
            lines.append(f"@@ {names} @@")
        for tower in dict.fromkeys(one.tower for one in self.differences):
            lines.append(f"{tower} tower:" if tower else "no tower:")
            found = list(_lines([one for one in self.differences if one.tower == tower]))
            lines += [f"  {line}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  ... and {len(found) - _SHOWN} more lines (all are in .differences)")
        lines.append(self._summary())
        lines += [f"dtypes differ: {count_of(count, 'tensor')} {pair} (a, b)" for pair, count in self.dtypes.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(_one_line(line) for line in lines)

    def _summary(self) -> str:
        within = f" within {self.tolerance:g}" if self.tolerance else ""
        if self.equal:
            apart = f"; the largest difference is {self.max_abs:.3g}" if self.max_abs else ""
            return f"equal{within}: {count_of(self.tensors, 'tensor')} compared{apart}"
        words = {
            "value": "with other values",
            "shape": "of another shape",
            "dtype": "of another dtype",
            "missing_in_b": "only in a",
            "missing_in_a": "only in b",
        }
        counts = {kind: sum(one.kind == kind for one in self.differences) for kind in words}
        parts = [f"{counts[kind]} {text}" for kind, text in words.items() if counts[kind]]
        return f"different{within}: {', '.join(parts)}; {count_of(self.tensors, 'tensor')} compared"


def _titled(file: str, form: str) -> str:
    return f"{file} (format {form})" if form else f"{file} (no known format)"


def _one_line(text: str) -> str:
    """A text that prints as one line: control characters as escapes."""
    return printable("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, complex) or (isinstance(value, float) and not isfinite(value)):
        return str(value)
    return value


# --- lines ---


def _lines(differences: Sequence[Difference]) -> Iterator[str]:
    """A line for each difference; like ones of many layers are one line."""
    groups: dict[object, list[Difference]] = {}
    for one in differences:
        like = (one.kind, _NUMBER.sub("*", one.key), one.shape_a, one.shape_b, one.dtype_a, one.dtype_b)
        groups.setdefault(like, []).append(one)
    for group in groups.values():
        if len(group) < _FOLDED:
            yield from map(str, group)
        else:
            yield _line(_worst(group), _folded([one.key for one in group]), group)


def _worst(group: Sequence[Difference]) -> Difference:
    return max(group, key=lambda one: one.max_abs or 0.0)


def _folded(keys: Sequence[str]) -> str:
    """One name for keys that differ in their numbers: the range of each number that varies."""
    numbers = [tuple(map(int, _NUMBER.findall(key))) for key in keys]
    columns = iter([sorted(set(column)) for column in zip(*numbers, strict=True)])

    def written(found: re.Match[str]) -> str:
        values = next(columns)
        if len(values) == 1:
            return found.group()
        whole = values == list(range(values[0], values[-1] + 1))
        return "{" + (f"{values[0]}..{values[-1]}" if whole else ",".join(map(str, values))) + "}"

    return _NUMBER.sub(written, keys[0])


def _line(one: Difference, name: str, group: Sequence[Difference]) -> str:
    """One difference, or several like ones, of which ``one`` is the largest."""
    many = f" ({len(group)} tensors)" if len(group) > 1 else ""
    if one.kind in _ONLY:
        shape, dtype = (one.shape_a, one.dtype_a) if one.kind == "missing_in_b" else (one.shape_b, one.dtype_b)
        return f"{_ONLY[one.kind]} {name} {list(shape or ())} {dtype}{many}"
    if one.kind == "shape":
        return f"~ {name}: shape {list(one.shape_a or ())} -> {list(one.shape_b or ())}{many}"
    if one.kind == "dtype":
        return f"~ {name}: dtype {one.dtype_a} -> {one.dtype_b}{many}"
    count, total = sum(each.differing for each in group), prod(one.shape_a or ()) * len(group)
    unlike = f" ({one.dtype_a} -> {one.dtype_b})" if one.dtype_a != one.dtype_b else ""
    at = f" of {one.key}" if many else ""
    place = f" at {list(one.where)}" if one.where else ""
    some = f"all {total:,}" if count == total > 1 else f"{count:,} of {total:,}"
    gap = f"{one.max_abs:.3g}{place}{at} ({_numbers(one.value_a, one.value_b)})"
    return f"~ {name} {list(one.shape_a or ())}{many}{unlike}: {some} values differ, at most by {gap}"


def _numbers(a: float | complex | None, b: float | complex | None) -> str:
    """Two values, with the digits that show their difference."""
    short = [f"{value:.9g}" if isinstance(value, (float, int)) else str(value) for value in (a, b)]
    return " -> ".join(short if short[0] != short[1] else [str(a), str(b)])
