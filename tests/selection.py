"""`pytest --format=NAME`: the tests that are about one format.

A test is about the formats of its marker, ``@pytest.mark.formats("hf_clip", ...)``, on the test, on its module
(``pytestmark``) or on one of its parameters; and about those whose name is a parameter of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import pytest

from keymap.source.registry import hubs, registry


def formats_of(item: pytest.Item) -> set[str]:
    """The names of the formats, and of the bridges, that a collected test is about."""
    found = {name for marker in item.iter_markers("formats") for name in marker.args}
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec is not None else ():
        if isinstance(value, (str, Path)):
            found.add(value.stem if isinstance(value, Path) else value)
    return found & {header.name for header in hubs().files.values()}


def refuse_unknown(name: str) -> None:
    """Raise a usage error if no format has this name. It gives near names, or the formats to check instead."""
    headers = hubs().files.values()
    selectable = sorted({header.name for header in headers if header.kind in ("hub", "format", "bridge")})
    if name in selectable:
        return
    kind = next((header.kind for header in headers if header.name == name), None)
    if kind == "tables":
        known = registry()
        users = [m.name for m in known.mappings.values() if name in known.files[m.name].data.get("uses", ())]
        raise pytest.UsageError(f"{name} is a file of tables: check a format that uses it: {', '.join(users)}")
    if kind is not None:
        raise pytest.UsageError(f"{name} is not a format (its kind is {kind}); formats: {', '.join(selectable)}")
    near = difflib.get_close_matches(name.lower(), selectable, n=3, cutoff=0.6)
    advice = f"did you mean {' or '.join(near)}?" if near else f"formats: {', '.join(selectable)}"
    raise pytest.UsageError(f"there is no format {name!r}; {advice}")


def select(items: Iterable[pytest.Item], name: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests about this format, and the others. If no test is about it, the usage error says what to add."""
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (chosen if name in formats_of(item) else others).append(item)
    if not chosen:
        raise pytest.UsageError(
            f"no test is about {name}: add tests/formats/test_{name}.py with pytestmark = pytest.mark.formats({name!r})"
        )
    return chosen, others
