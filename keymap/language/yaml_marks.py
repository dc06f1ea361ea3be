"""Reads a YAML file as plain data, and keeps the line and column of every key and list item.

Anchors, aliases, merge keys, tags and repeated keys are refused: a mapping says each thing once, and a short file
cannot grow while it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from keymap.errors import MappingError

__all__ = ["Marked", "Path", "parse_yaml", "read_text", "read_yaml"]

Path = tuple[str | int, ...]

_MAX_BYTES = 1 << 17  # characters; the longest mapping that keymap ships has a tenth of it
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

    def without(self, paths: Collection[Path]) -> Marked:
        """A copy that lacks these keys and items; the others keep their marks."""
        marks: dict[Path, tuple[int, int]] = {(): self.marks[()]}

        def kept(value: Any, old: Path, new: Path) -> Any:
            if old in self.marks:
                marks[new] = self.marks[old]
            if isinstance(value, dict):
                pairs = [(key, item) for key, item in value.items() if (*old, key) not in paths]
                return {key: kept(item, (*old, key), (*new, key)) for key, item in pairs}
            if isinstance(value, list):
                items = [(i, item) for i, item in enumerate(value) if (*old, i) not in paths]
                return [kept(item, (*old, i), (*new, number)) for number, (i, item) in enumerate(items)]
            return value

        return Marked(self.file, kept(self.data, (), ()), marks)


def read_yaml(path: FilePath, file: str) -> Marked:
    """Read a file that holds one YAML document.

    Raises:
        MappingError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, file), file)


def read_text(path: FilePath, file: str) -> str:
    """The text of a file, no more of it than `parse_yaml` reads.

    Raises:
        MappingError: it cannot be read, or is not a regular file.
    """
    try:
        if path.is_dir():
            raise MappingError(f"{file} cannot be read: it is a folder; name a .yaml file in it")
        if not path.is_file():  # opening a pipe would wait for ever
            raise MappingError(f"{file} cannot be read: there is no such file")
        with path.open(encoding="utf-8") as source:
            return source.read(_MAX_BYTES + 1)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(errors="replace")
        place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        what = f"{file}:{place}: this character is not UTF-8: save the file as UTF-8"
        raise MappingError(f"{file} cannot be read", [what]) from None
    except (OSError, ValueError) as error:
        raise MappingError(f"{file} cannot be read: {error}") from None


def parse_yaml(text: str, file: str) -> Marked:
    """Read one YAML document.

    Raises:
        MappingError: not YAML, too large, too deep, a number out of range, or it uses an alias, a tag or a key twice.
    """
    import yaml  # importing it takes a third of the time that importing keymap takes

    if len(text) > _MAX_BYTES:
        raise _refusal(file, None, f"the file has {len(text)} characters or more; the limit is {_MAX_BYTES}")
    reader = _Reader(yaml, text, file)
    try:
        return Marked(file, reader.document(), reader.marks)
    except yaml.YAMLError as error:
        from keymap.language.yaml_words import in_words

        line, column, what = in_words(error, text)
        raise _refusal(file, (line, column), what) from None
    except (ValueError, UnicodeError) as error:
        raise _refusal(file, None, f"not YAML: {error}") from None


def _refusal(file: str, place: tuple[int, int] | None, what: str) -> MappingError:
    line, column = place or (1, 1)
    return MappingError(f"{file} is not a mapping that keymap can read", [f"{file}:{line}:{column}: {what}"])


class _Reader:
    """Builds plain data from the events of a YAML parser, and notes where each key and item begins."""

    def __init__(self, yaml: Any, text: str, file: str) -> None:
        self.yaml, self.file = yaml, file
        self.marks: dict[Path, tuple[int, int]] = {(): (1, 1)}
        self.resolver: Any = yaml.resolver.Resolver()
        self.scalars: Any = yaml.constructor.SafeConstructor()
        self.events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def refusal(self, event: Any, what: str) -> MappingError:
        mark = event.start_mark
        return _refusal(self.file, (mark.line + 1, mark.column + 1), what)

    def document(self) -> Any:
        """The data of the one document."""
        yaml = self.yaml
        start = (yaml.StreamStartEvent, yaml.DocumentStartEvent)
        first = next(event for event in self.events if not isinstance(event, start))
        if isinstance(first, yaml.StreamEndEvent):
            raise _refusal(self.file, None, "the file is empty")
        data = self.value(first, ())
        last = next(event for event in self.events if not isinstance(event, yaml.DocumentEndEvent))
        if not isinstance(last, yaml.StreamEndEvent):
            raise self.refusal(last, "a second document begins here: a file holds one mapping, remove the ---")
        return data

    def value(self, event: Any, path: Path) -> Any:
        """A scalar, a list or a dict."""
        self.refuse_extras(event)
        if isinstance(event, self.yaml.ScalarEvent):
            return self.scalar(event)
        if len(path) >= _MAX_DEPTH:
            raise self.refusal(event, f"nested deeper than {_MAX_DEPTH} levels")
        return self.fields(path) if isinstance(event, self.yaml.MappingStartEvent) else self.items(path)

    def items(self, path: Path) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), self.yaml.SequenceEndEvent):
            item = (*path, len(found))
            self.mark(event, item)
            found.append(self.value(event, item))
        return found

    def fields(self, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := next(self.events), self.yaml.MappingEndEvent):
            self.refuse_extras(event)
            if not isinstance(event, self.yaml.ScalarEvent):
                raise self.refusal(
                    event, "a key must be plain text: quote a key that begins with [ or {, or write an index as (\\d+)"
                )
            key = self.text(event)
            if key == "<<" and event.implicit[0]:
                raise self.refusal(event, "merge keys (<<) are not used: share rules with `tables`")
            field = (*path, key)
            if key in data:
                raise self.refusal(event, f"key {key!r} is given twice (first in line {self.marks[field][0]})")
            self.mark(event, field)
            data[key] = self.value(next(self.events), field)
        return data

    def mark(self, event: Any, path: Path) -> None:
        self.marks[path] = (event.start_mark.line + 1, event.start_mark.column + 1)

    def refuse_extras(self, event: Any) -> None:
        """Refuse anchors, aliases and tags."""
        if isinstance(event, self.yaml.AliasEvent) or event.anchor is not None:
            what = "anchors and aliases (& and *) are not used: quote the text, or share rules with `tables`"
            raise self.refusal(event, what)
        if event.tag is not None:
            raise self.refusal(event, f"tag {event.tag!r} is not used in a mapping: leave it out, or quote the text")

    def text(self, event: Any) -> str:
        if len(event.value) > _MAX_TEXT:
            raise self.refusal(event, f"a text of {len(event.value)} characters; the limit is {_MAX_TEXT}")
        value: str = event.value
        return value

    def scalar(self, event: Any) -> Any:
        """A value: unquoted it may be a number, true or false, or null, as in YAML 1.1."""
        text, (plain, _) = self.text(event), event.implicit
        tag = self.resolver.resolve(self.yaml.ScalarNode, text, event.implicit) if plain else _TEXT
        if tag == _TEXT:
            return text
        kind = tag.rpartition(":")[2]
        if kind not in ("int", "float", "bool", "null"):
            raise self.refusal(event, f"a {kind} is not used in a mapping: quote the text")
        if kind in ("int", "float") and len(text) > 32:  # 1:1:1:... is a number too, and slow to convert
            raise self.refusal(event, f"a number of {len(text)} characters: quote it if it is a text")
        try:
            value = self.scalars.construct_object(self.yaml.ScalarNode(tag, text, event.start_mark))
        except (self.yaml.YAMLError, ValueError) as error:
            raise self.refusal(event, f"{text!r}: {error}") from None
        if isinstance(value, (int, float)) and not -_MAX_NUMBER < value < _MAX_NUMBER:
            raise self.refusal(event, f"{text} is too large, or not a number")
        return value
