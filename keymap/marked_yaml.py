"""YAML with its line marks: plain data, and where each key and item of it stands in the file.

Aliases, merge keys, tags and repeated keys are refused: a mapping says each thing once, and a short file cannot
grow when it is read.
"""

from __future__ import annotations

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

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def refuse(mark: Any, what: str) -> MappingError:
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else f"{file}:1:1"
        return MappingError(f"{file} is not a mapping that keymap can read", [f"{place}: {what}"])

    if len(text) > _MAX_BYTES:
        raise refuse(None, f"the file has {len(text)} characters or more; a mapping has at most {_MAX_BYTES}")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise refuse(event.start_mark, "anchors and aliases (& and *) are not used: share rules with `tables`")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise refuse(event.start_mark, f"nested deeper than {_MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        root = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise refuse(mark, f"not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, UnicodeError) as error:
        raise refuse(None, f"not YAML: {error}") from None
    if root is None:
        raise refuse(None, "the file is empty")
    marks: dict[Path, tuple[int, int]] = {(): (1, 1)}
    scalars = yaml.constructor.SafeConstructor()

    def measured(node: yaml.Node) -> None:
        if len(node.value) > _MAX_TEXT:
            raise refuse(node.start_mark, f"a text of {len(node.value)} characters; the limit is {_MAX_TEXT}")

    def build(node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            data: dict[str, Any] = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise refuse(key_node.start_mark, "a key must be plain text")
                key = key_node.value
                measured(key_node)
                if key_node.tag.endswith(":merge"):
                    raise refuse(key_node.start_mark, "merge keys (<<) are not used: share rules with `tables`")
                if key in data:
                    first = marks[(*path, key)][0]
                    raise refuse(key_node.start_mark, f"key {key!r} is given twice (first in line {first})")
                marks[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                data[key] = build(value_node, (*path, key))
            return data
        if isinstance(node, yaml.SequenceNode):
            items = []
            for number, item in enumerate(node.value):
                marks[(*path, number)] = (item.start_mark.line + 1, item.start_mark.column + 1)
                items.append(build(item, (*path, number)))
            return items
        kind = node.tag.rpartition(":")[2]
        if kind not in ("str", "int", "float", "bool", "null"):
            raise refuse(node.start_mark, f"tag {node.tag!r} is not used in a mapping: quote the text")
        measured(node)
        if kind in ("int", "float") and len(node.value) > 32:  # 1:1:1:... is a number too, and takes its time
            raise refuse(node.start_mark, f"a number of {len(node.value)} characters: quote it if it is a text")
        try:
            value = scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise refuse(node.start_mark, f"{node.value!r}: {error}") from None
        if isinstance(value, (int, float)) and not -_MAX_NUMBER < value < _MAX_NUMBER:
            raise refuse(node.start_mark, f"{node.value} is too large, or no number")
        return value

    return Marked(file, build(root, ()), marks)
