"""Breaking one rule of a shipped mapping at a time: rows of text, and what becomes of them.

A row names the mapping, what is wrong and what follows (``differs`` or ``refused``); then what is taken out (``-``) and
what is put there instead (``+``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import keymap
from keymap.source.registry import Catalogue

MAPPINGS = Path(__file__).parents[1] / "mappings"
LIMIT, CLEAR = 2e-5, 1e-3  # what the intact copy may differ from its peer; what a broken one must differ, at least
Edits = list[tuple[str, str]]


def parsed(rows: str) -> Iterator[Any]:
    """(name, what follows, edits) of each row, as parameters of a test."""
    for row in re.split(r"\n(?![-+])", rows.strip()):
        head, _, body = row.partition("\n")
        name, what, follows = head.split(": ")
        edits = []
        for old, new in re.findall(r"((?:^- .*\n)+)((?:^\+.*(?:\n|$))+)", body, re.MULTILINE):
            edits.append(tuple("\n    ".join(line[2:] for line in part.splitlines()) for part in (old, new)))
        yield pytest.param(name, follows, edits, id=f"{name}: {what}")


def names(rows: str) -> list[str]:
    """The names in rows, each once."""
    return sorted({row.values[0] for row in parsed(rows)})


def text_of(form: str, lookups: str = "") -> str:
    """A mapping with the tables and lookups that it uses written into it, so that they can be broken too.

    ``lookups`` are further lines of that section, which rows use.
    """
    text = (MAPPINGS / f"{form}.yaml").read_text(encoding="utf-8")
    uses = re.search(r"^uses: \[([\w, ]+)\]\n", text, re.MULTILINE)
    sections = [("lookups", lookups)] if lookups else []
    if uses is not None:
        text = text.replace(uses[0], "")
        for other in uses[1].split(", "):
            used = (MAPPINGS / f"{other}.yaml").read_text(encoding="utf-8")
            sections += re.findall(r"^(tables|lookups|configs):\n((?:  .*\n)+)", used, re.MULTILINE)
    for section, body in sections:
        if f"\n{section}:\n" not in text:
            text += f"{section}:\n"
        text = text.replace(f"\n{section}:\n", f"\n{section}:\n{body}", 1)
    return text


def edited(form: str, text: str, edits: Edits) -> str:
    """The text with these edits; a row whose edit is no longer in the file fails."""
    for old, new in edits:
        assert old in text, f"{form}.yaml no longer says {old!r}: adapt this row"
        text = text.replace(old, new, 1)
    return text


def use(form: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Make keymap use this text for a mapping; the path to give as ``mapping=``, None for a respelling."""
    if "kind: bridge" not in text:
        (folder / "broken.yaml").write_text(text.replace(f"format: {form}\n", "format: broken\n"), encoding="utf-8")
        return folder / "broken.yaml"
    for file in MAPPINGS.glob("*.yaml"):
        (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / f"{form}.yaml").write_text(text, encoding="utf-8")
    known = Catalogue()
    known.add(sorted(folder.glob("*.yaml")))
    monkeypatch.setattr("keymap.source.registry._known", [known])
    return None


def assert_seen(
    follows: str,
    distance: Callable[[], float],
    refusals: tuple[type[keymap.KeymapError], ...] = (keymap.PlanError, keymap.DetectionError),
) -> None:
    """The break is seen: the load is refused, or the outputs are clearly another's.

    Not by a MappingError: the broken file is a good mapping of something else.
    """
    if follows == "refused":
        with pytest.raises(refusals):
            distance()
    else:
        assert distance() > CLEAR
