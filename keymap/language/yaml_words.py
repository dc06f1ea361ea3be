"""What is wrong with a text that is not YAML, in words that say what to write instead.

libyaml says where it gave up and what it expected there. This module looks at the line and names the usual mistake.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["in_words"]

_START = {  # characters that cannot begin a value or a key without quotes
    "@": "quote a text that begins with @",
    "`": "quote a text that begins with a backtick",
    "%": "quote a text that begins with %",
    "\t": "a tab cannot indent: use two spaces for each level",
}
_CLOSES = {"[": "]", "{": "}"}
_COLON = re.compile(r":(\s|$)")


def in_words(error: Any, text: str) -> tuple[int, int, str]:
    """Line, column and explanation of an error of a YAML parser.

    Args:
        error: a ``yaml.YAMLError``.
        text: what was parsed.
    """
    problem = str(getattr(error, "problem", None) or error).partition("\n")[0]
    mark: Any = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML does not allow
        at = getattr(error, "position", None)
        before = text[:at] if isinstance(at, int) else ""
        return before.count("\n") + 1, len(before) - before.rfind("\n"), f"not YAML: remove this character ({problem})"
    begun: Any = getattr(error, "context_mark", None) or mark
    context = str(getattr(error, "context", None) or "")
    lines = text.split("\n")
    if "tab character" in problem or re.match(r" *\t", _line(lines, mark.line)):
        return mark.line + 1, 1, _START["\t"]
    if "flow" in context and mark.line != begun.line:  # report an open bracket where it opens
        bracket = lines[begun.line][begun.column]
        what = f"the {bracket} is not closed: add {_CLOSES.get(bracket, 'its end')}"
        return begun.line + 1, begun.column + 1, what
    if "mapping values are not allowed" in problem:
        return _second_colon(lines, mark.line, mark.column)
    if "scanning" in context and "escape" not in problem and "plain scalar" not in context:
        mark = begun
    what = _mistake(problem, context, _line(lines, mark.line), mark.column)
    what = what.replace("LINE", str(mark.line + 1))
    return mark.line + 1, mark.column + 1, what or f"not YAML: {problem}"


def _line(lines: list[str], number: int) -> str:
    """A line by its number from 0; empty where there is none."""
    return lines[number] if 0 <= number < len(lines) else ""


# long: one case for each problem that libyaml reports
def _mistake(problem: str, context: str, line: str, column: int) -> str:
    """The usual mistake behind a problem in this line; empty where none is known."""
    char = line[column : column + 1]
    if "expected ':'" in problem:
        return f"line LINE has no colon followed by a space: {_colon_hint(line)}"
    if "scanning an alias" in context or "scanning an anchor" in context:
        return f"quote the {char}: a text that begins with {char} needs quotes, for example '{_word(line, column)}'"
    if "cannot start any token" in problem:
        return _START.get(char, f"quote a text that begins with {char!r}")
    if "end of stream" in problem and "quoted" in context:
        return f"the quote {char} is not closed: add {char} at the end of the text"
    if "unknown escape" in problem:
        return "a backslash in double quotes is an escape: use single quotes, for example 'blocks.(\\d+).weight'"
    if "block sequence entries" in problem:
        return "a list with - begins on a line of its own; or write it as [a, b]"
    if "expected '-'" in problem:
        return "this line is within a list: begin it with -, or indent it like the name of the list"
    if "document start" in problem:
        return "nothing may follow the line ...: remove it"
    if "comment or line break" in problem:
        return f"quote a text that begins with {char}"
    if "tag" in problem or "tag" in context:
        return "quote a text that begins with !"
    if "mapping keys are not allowed" in problem:
        return "quote a text that begins with ?"
    if "node content" in problem:
        return f"a value is missing before the {char}: write it, or quote the text"
    if "expected key" in problem:
        return _no_key(line, column)
    if "expected ','" in problem:
        return _in_brackets(line, column)
    return ""


def _second_colon(lines: list[str], number: int, column: int) -> tuple[int, int, str]:
    """Behind "mapping values are not allowed": the line without a colon, often an earlier one, and what to write."""
    line = lines[number]
    joined = re.match(r"\s*([^\s:{]+)\s*\{[^:]*:\s", line)
    if joined is not None and joined.end() <= column:
        at, name = len(line) - len(line.lstrip()), joined.group(1)
        return number + 1, at + 1, f"line {number + 1} has no colon before the {{: write `{name}: {{`"
    earlier = number - 1
    while earlier >= 0 and not lines[earlier].split("#")[0].strip():
        earlier -= 1
    before = _line(lines, earlier)
    if _COLON.search(line[:column]) or before.lstrip().startswith("- ") or not before:
        return number + 1, column + 1, "a value that holds ': ' needs quotes: write name: 'text: more text'"
    if not _COLON.search(before):
        at = len(before) - len(before.lstrip())
        return earlier + 1, at + 1, f"line {earlier + 1} has no colon followed by a space: {_colon_hint(before)}"
    what = "this line is indented further than the one before, which has a value already: remove the indentation"
    return number + 1, column + 1, what


def _colon_hint(line: str) -> str:
    """What to write in a line without a colon that a space or the end of the line follows."""
    if re.match(r"\s*[^\s:]+:\S", line):
        return "write a space after the colon"
    return "write `name: value`" if len(line.split()) > 1 else f"write `{line.strip()}:`"


def _no_key(line: str, column: int) -> str:
    """Behind "did not find expected key"."""
    start = line[:column].rstrip()
    char = line[column : column + 1]
    if not start:
        return "the indentation fits no line before: lines of one level begin in the same column"
    if char in ("]", "}"):
        return f"this {char} closes nothing: remove it, or quote the text"
    if start.lstrip()[:1] in ("{", "[") or re.search(r"[:-]\s+[\[{][^\[{]*[\]}]$", start):
        return "quote a text that begins with { or [, or write an index as (\\d+)"
    return "text follows the closing quote: quote the whole text"


def _in_brackets(line: str, column: int) -> str:
    """Behind "did not find expected ',' or '}'"."""
    char = line[column : column + 1]
    start = line[:column].rstrip()
    if char == ":":
        return "a second colon within { }: write a comma between two entries, or quote a value that holds ': '"
    if char in ("]", "}"):
        return f"this {char} closes another bracket than the one that is open: close that one first"
    if "to:" in start.rpartition(",")[2]:
        return "quote a text with { } or [ ]; a target names a group of the source: write \\1 for the first"
    if start.endswith(("}", "]")) or char in ("{", "["):
        return "quote a text with { } or [ ], or write an index as (\\d+), or a comma between two entries"
    return "write a comma between two entries, or quote the text"


def _word(line: str, column: int) -> str:
    """The unquoted text that begins in this column."""
    found = re.match(r"[^\s,\]}]+", line[column:])
    return found.group().rstrip(":") if found is not None else "*"
