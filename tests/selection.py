"""`pytest --format=NAME`: the tests that are about one format.

A test is about the formats of its marker, ``@pytest.mark.formats("hf_clip", ...)``, on the test, on its module
(``pytestmark``) or on one of its parameters; and about those whose name is a parameter of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import pytest

from keymap.source.registry import registry


def formats_of(item: pytest.Item) -> set[str]:
    """The names of the formats, and of the bridges, that a collected test is about."""
    found = {name for marker in item.iter_markers("formats") for name in marker.args}
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec is not None else ():
        if isinstance(value, (str, Path)):
            found.add(value.stem if isinstance(value, Path) else value)
    return found & set(registry().mappings)


def refuse_unknown(name: str) -> None:
    """Raise a usage error, with near names, if no mapping has this name, or if it is a file of tables."""
    known = registry()
    selectable = sorted(m.name for m in known.mappings.values() if m.kind in ("hub", "format", "bridge"))
    if name in selectable:
        return
    if name in known.mappings and known.mappings[name].kind == "tables":
        users = [m.name for m in known.mappings.values() if name in known.files[m.name].data.get("uses", ())]
        raise pytest.UsageError(f"{name} is a file of tables: check a format that uses it: {', '.join(users)}")
    near = difflib.get_close_matches(name, selectable, n=3, cutoff=0.5) or selectable
    raise pytest.UsageError(f"there is no format {name!r}; known names like it: {', '.join(near)}")


def select(items: Iterable[pytest.Item], name: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests about this format, and the others. None at all is a usage error that says what to add."""
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (chosen if name in formats_of(item) else others).append(item)
    if not chosen:
        raise pytest.UsageError(
            f"no test is about {name}: add tests/formats/test_{name}.py with pytestmark = pytest.mark.formats({name!r})"
        )
    return chosen, others
