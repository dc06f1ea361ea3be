"""YAML with its line marks: plain data, and where each key and item of it stands in the file.

Aliases, merge keys, tags and repeated keys are refused: a mapping says each thing once, and a short file cannot
grow when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from keymap.errors import MappingError

__all__ = ["Marked", "Path", "parse_yaml", "read_yaml"]

Path = tuple[str | int, ...]

_MAX_BYTES = 1 << 17  # characters; the longest mapping that keymap brings has a tenth of it
_MAX_TEXT = 1 << 12  # characters of one key or value
_MAX_NUMBER = 1 << 53
_MAX_DEPTH = 12
_TEXT = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Marked:
    """Data of a YAML file, and for the path of each key or item its ``(line, column)``, both from 1."""

    file: str
    data: Any
    marks: dict[Path, tuple[int, int]]

    def at(self, path: Path) -> str:
        """``file:line:column`` of the path, or of the nearest enclosing one."""
        while path not in self.marks:
            path = path[:-1]
        line, column = self.marks[path]
        return f"{self.file}:{line}:{column}"


def read_yaml(path: FilePath, file: str) -> Marked:
    """Read a file that holds one YAML document.

    Raises:
        MappingError: it cannot be read, is no regular file, or as `parse_yaml`.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise MappingError(f"{file} cannot be read: there is no such file")
        with path.open(encoding="utf-8") as source:
            text = source.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MappingError(f"{file} cannot be read: {error}") from None
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> Marked:
    """Read one YAML document.

    Raises:
        MappingError: not YAML, too large, too deep, a number out of range, or it uses an alias, a tag or a key twice.
    """

    import yaml  # which takes a third of the time that importing keymap would take

    def refuse(mark: Any, what: str) -> MappingError:
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else f"{file}:1:1"
        return MappingError(f"{file} is not a mapping that keymap can read", [f"{place}: {what}"])

    if len(text) > _MAX_BYTES:
        raise refuse(None, f"the file has {len(text)} characters or more; a mapping has at most {_MAX_BYTES}")
    marks: dict[Path, tuple[int, int]] = {(): (1, 1)}
    resolver: Any = yaml.resolver.Resolver()
    scalars = yaml.constructor.SafeConstructor()
    events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def bare(event: Any) -> None:
        """Refuse what a key, a value or a list may not carry."""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            what = "anchors and aliases (& and *) are not used: share rules with `tables`"
            raise refuse(event.start_mark, what)
        if event.tag is not None:
            what = f"tag {event.tag!r} is not used in a mapping: leave it out, and quote what is a text"
            raise refuse(event.start_mark, what)

    def text_of(event: Any) -> str:
        if len(event.value) > _MAX_TEXT:
            raise refuse(event.start_mark, f"a text of {len(event.value)} characters; the limit is {_MAX_TEXT}")
        text: str = event.value
        return text

    def scalar(event: Any) -> Any:
        """A value: what is not quoted may be a number, a truth value or nothing, as YAML 1.1 spells them."""
        text, (plain, _) = text_of(event), event.implicit
        tag = resolver.resolve(yaml.ScalarNode, text, event.implicit) if plain else _TEXT
        if tag == _TEXT:
            return text
        kind = tag.rpartition(":")[2]
        if kind not in ("int", "float", "bool", "null"):
            raise refuse(event.start_mark, f"a {kind} is not used in a mapping: quote the text")
        if kind in ("int", "float") and len(text) > 32:  # 1:1:1:... is a number too, and takes its time
            raise refuse(event.start_mark, f"a number of {len(text)} characters: quote it if it is a text")
        try:
            value = scalars.construct_object(yaml.ScalarNode(tag, text, event.start_mark))
        except (yaml.YAMLError, ValueError) as error:
            raise refuse(event.start_mark, f"{text!r}: {error}") from None
        if isinstance(value, (int, float)) and not -_MAX_NUMBER < value < _MAX_NUMBER:
            raise refuse(event.start_mark, f"{text} is too large, or no number")
        return value

    def build(event: Any, path: Path) -> Any:
        bare(event)
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event)
        if len(path) >= _MAX_DEPTH:
            raise refuse(event.start_mark, f"nested deeper than {_MAX_DEPTH} levels")
        return mapping(path) if isinstance(event, yaml.MappingStartEvent) else sequence(path)

    def sequence(path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            mark = event.start_mark
            marks[here] = (mark.line + 1, mark.column + 1)
            items.append(build(event, here))
        return items

    def mapping(path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            mark = event.start_mark
            bare(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise refuse(mark, "a key must be plain text")
            key = text_of(event)
            if key == "<<" and event.implicit[0]:
                raise refuse(mark, "merge keys (<<) are not used: share rules with `tables`")
            here = (*path, key)
            if key in data:
                raise refuse(mark, f"key {key!r} is given twice (first in line {marks[here][0]})")
            marks[here] = (mark.line + 1, mark.column + 1)
            data[key] = build(next(events), here)
        return data

    try:
        start = (yaml.StreamStartEvent, yaml.DocumentStartEvent)
        begun = next(event for event in events if not isinstance(event, start))
        if isinstance(begun, yaml.StreamEndEvent):
            raise refuse(None, "the file is empty")
        data = build(begun, ())
        more = next(event for event in events if not isinstance(event, yaml.DocumentEndEvent))
        if not isinstance(more, yaml.StreamEndEvent):
            raise refuse(more.start_mark, "not YAML: but found another document; a file holds one mapping")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise refuse(mark, f"not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, UnicodeError) as error:
        raise refuse(None, f"not YAML: {error}") from None
    return Marked(file, data, marks)
