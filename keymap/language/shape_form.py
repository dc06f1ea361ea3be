"""The form of a shape in evidence: ``[h * 2, d]``, where a letter is one length in all clues of the evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["AxisForm", "Form", "fitted", "parse_form", "written_form"]

_AXIS = re.compile(r"([A-Za-z_]\w*)(?: ?\* ?([1-9][0-9]{0,8}))?", re.ASCII)


class AxisForm(NamedTuple):
    """An axis whose length is a number (no name), or a multiple of a named length."""

    name: str
    times: int

    def __str__(self) -> str:
        return str(self.times) if not self.name else self.name if self.times == 1 else f"{self.name} * {self.times}"


Form = tuple[AxisForm, ...]


def parse_form(written: Sequence[int | str]) -> Form:
    """The form that a mapping file writes; the schema has checked it."""
    form = []
    for axis in written:
        found = _AXIS.fullmatch(str(axis))
        form.append(AxisForm(found[1], int(found[2] or 1)) if found is not None else AxisForm("", int(axis)))
    return tuple(form)


def written_form(form: Form) -> str:
    return f"[{', '.join(map(str, form))}]"


def fitted(form: Form, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int] | None:
    """The lengths of the names, those that are known among them; None if the shape does not have the form."""
    if len(form) != len(shape):
        return None
    lengths = dict(known)
    for axis, length in zip(form, shape, strict=True):
        if not axis.name:
            fits = length == axis.times
        else:
            fits = (
                length % axis.times == 0 and lengths.setdefault(axis.name, length // axis.times) * axis.times == length
            )
        if not fits:
            return None
    return lengths
