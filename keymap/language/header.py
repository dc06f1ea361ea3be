"""The head of a mapping file: what the registry needs to know of it before it is parsed and compiled.

Fields at the top level begin a line, so a search of the text finds them. A file that writes them in another way is
parsed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from keymap.errors import MappingError
from keymap.language.yaml_marks import parse_yaml, read_text

__all__ = ["Header", "read_header"]

_FIELDS = ("format", "kind", "hub", "default")
_VALUE = re.compile(r"[ \t]+([\"']?)([A-Za-z0-9_]+)\1[ \t]*(?:#.*)?$", re.MULTILINE)
_ALL = re.compile(r"\ball:(?: \[([^\]{}]*)\]|[ \t]*\n((?:[ \t]+- .*\n?)+))")
_PLAIN = re.compile(r"([A-Za-z0-9_./]*)(?:\(([A-Za-z0-9_./|]*)\)([A-Za-z0-9_./]*))?")  # at most one choice of texts
_COMMENT = re.compile(r"(?:^|[ \t])#.*", re.MULTILINE)
_DETECT = re.compile(r"^detect:.*\n?(?:(?:[ \t#].*)?\n)*(?:[ \t#].*)?", re.MULTILINE)


class Header(NamedTuple):
    """A file, and what its top level says.

    Attributes:
        path: of the file.
        name, kind: of the mapping; without a ``kind`` it is a format.
        hub: the hub that it names; "" for none.
        default: (hub) files that name no hub belong to it.
        detect: (hub) the text of its evidence.
        needs: (hub) where its evidence matches, one key of each of these tuples is there; a part of what it asks for.
        line: where it names its hub.
    """

    path: Path
    name: str
    kind: str
    hub: str
    default: bool
    detect: str
    needs: tuple[tuple[str, ...], ...] = ()
    line: int = 1


def read_header(path: Path, shown: str) -> Header:
    """The head of a file.

    Args:
        path: the file.
        shown: its name in messages.

    Raises:
        MappingError: it cannot be read.
    """
    text = read_text(path, shown)
    found: dict[str, Any] = {field: value for field in _FIELDS if (value := _value_of(field, text))}
    if "format" not in found:
        found = _parsed(text, shown)
    kind = str(found.get("kind", "format"))
    detect = _DETECT.search(text) if kind == "hub" else None
    at = f"\n{text}".find("\nhub:")
    return Header(
        path,
        str(found.get("format", "")),
        kind,
        str(found.get("hub", "")),
        str(found.get("default", "")).lower() == "true",
        detect[0] if detect is not None else "",
        _needs(detect[0]) if detect is not None else (),
        text.count("\n", 0, max(at, 0)) + 1,
    )


def _value_of(field: str, text: str) -> str:
    """The value of a field at the top level, where it is a plain word; "" for none."""
    at = 0 if text.startswith(f"{field}:") else text.find(f"\n{field}:") + 1
    found = _VALUE.match(text, at + len(field) + 1) if at or text.startswith(f"{field}:") else None
    return found[2] if found is not None else ""


def _needs(detect: str) -> tuple[tuple[str, ...], ...]:
    """The plain keys that stand under ``all``, each with its alternatives."""
    found = _ALL.search(_COMMENT.sub("", detect))
    if found is None:
        return ()
    items = found[1].split(",") if found[1] is not None else [line.strip()[2:] for line in found[2].splitlines()]
    plain = [_PLAIN.fullmatch(item.strip(" \t'\"")) for item in items]
    return tuple(
        tuple(f"{one[1]}{choice}{one[3] or ''}" for choice in (one[2] or "").split("|"))
        for one in plain
        if one and one[0]
    )


def _parsed(text: str, shown: str) -> dict[str, Any]:
    """The fields of a file that writes its name in another way; empty for one that is not a mapping."""
    try:
        data = parse_yaml(text, shown).data
    except MappingError:  # it is reported when it is compiled
        return {}
    return data if isinstance(data, dict) else {}
