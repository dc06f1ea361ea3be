"""The rooms of keymap/: imports point one way, functions are short, and no module knows CLIP's towers and layouts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keymap.source.registry import registry

PACKAGE = Path(__file__).parents[2] / "keymap"
FILES = sorted(PACKAGE.rglob("*.py"))
EACH = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])

# A room imports from itself and from the rooms of earlier lines. Rooms of one line do not know each other.
FLOORS = (
    ("errors", "paths"),
    ("advice",),
    ("language", "read"),
    ("source",),
    ("plan",),
    ("load",),
    ("write",),
    ("results", "picture"),
    ("api", "convert", "save", "compare", "names"),
    ("distributed",),
    ("__init__",),
    ("cli", "integrations"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LINES, BRANCHES = 60, 15  # of a function that gives no reason for more, as `# long: reason`
Function = ast.FunctionDef | ast.AsyncFunctionDef


def room_of(module: str) -> str:
    """The room of a module's name: `keymap.plan.model` is in `plan`, `keymap.api` is a room itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module of keymap, name) of every import; the name is empty where a module is imported whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "keymap")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keymap":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import", node.module or ""


def arrows(file: Path, text: str) -> list[str]:
    """Imports that point from a room to one that is not below it, and those of another room's private names."""
    here, faults = room_of(module_of(file)), []
    for module, name in imported(ast.parse(text)):
        whole = f"{module}.{name}" if module == "keymap" and name in FLOOR else module
        room = room_of(whole)
        if room == here:
            continue
        if FLOOR.get(room, len(FLOORS)) >= FLOOR[here]:
            faults.append(f"{here} imports {name or module} of {room}")
        if name.startswith("_") or any(part.startswith("_") for part in module.split(".")):
            faults.append(f"{here} imports {name or module}, which is private to {room}")
    return faults


@EACH
def test_imports_point_one_way(file):
    assert room_of(module_of(file)) in FLOOR, f"{file.name}: add its room to FLOORS"
    assert arrows(file, file.read_text(encoding="utf-8")) == []


def test_an_import_that_points_up_is_found():
    file = PACKAGE / "source" / "detect.py"
    assert arrows(file, "from keymap.language.view import View\nimport keymap.read\n") == []
    assert arrows(file, "from keymap.plan.model import view_model") == ["source imports view_model of plan"]
    assert arrows(file, "def f():\n    from keymap.read.zip_file import _open") == [
        "source imports _open, which is private to read"
    ]
    assert arrows(file, "from keymap import api") == ["source imports api of api"]


def branches(function: Function) -> int:
    """if, elif, for, while, except, case, and, or, a conditional expression, an if of a comprehension; not those of
    functions inside.
    """
    count, left = 0, list(ast.iter_child_nodes(function))
    while left:
        node = left.pop()
        if isinstance(node, Function):
            continue
        if isinstance(node, (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
        left += ast.iter_child_nodes(node)
    return count


def too_long(text: str) -> list[str]:
    """Functions of more lines or branches than the limits, without a comment `# long: reason` at or above the def."""
    lines, faults = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length, forks = (node.end_lineno or node.lineno) - node.lineno + 1, branches(node)
            header = lines[max(first - 2, 0) : node.body[0].lineno]
            if (length > LINES or forks > BRANCHES) and not any(re.search(r"# long: \w", line) for line in header):
                faults.append(f"{node.name}: {length} lines, {forks} branches")
    return faults


@EACH
def test_a_function_is_short_or_says_why_not(file):
    assert too_long(file.read_text(encoding="utf-8")) == []


def test_a_long_function_is_found():
    long, forked = "    x = 1\n" * LINES, "    if a and b:\n        x = [c for c in d if c]\n" * 6
    assert too_long(f"def f():\n{long}") == ["f: 61 lines, 0 branches"]
    assert too_long(f"def f():\n{forked}") == ["f: 13 lines, 18 branches"]
    for head in ("# long: one case a line\ndef f():\n", "def f():  # long: one case a line\n"):
        assert too_long(head + long) == []
    assert too_long(f"# long\ndef f():\n{long}") != []


def names_of_clip(text: str) -> list[str]:
    """Names of the hub's towers and layouts, and facts of its towers, as texts in code; docstrings may name them."""
    hub, tree = registry().hub, ast.parse(text)
    towers = {*hub.layouts, *(tower for mapping in registry().mappings.values() for tower in mapping.layouts)}
    layouts = {layout for entries in hub.layouts.values() for layout in entries}
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            word = node.value
            if word in towers | layouts or (word.partition(".")[0] in towers and re.fullmatch(r"\w+\.\w*", word)):
                found.append(f"line {node.lineno}: {word!r}")
    return found


@EACH
def test_no_module_names_a_tower_or_a_layout_of_clip(file):
    assert names_of_clip(file.read_text(encoding="utf-8")) == [], "these are facts of the hub: say them in its mapping"


def test_a_name_of_clip_in_code_is_found():
    code = (
        "'''The text tower.'''\nif tower == 'text' or fact == f'image.{name}' or layout == 'native_vit':\n    'a b'\n"
    )
    assert names_of_clip(code) == ["line 2: 'text'", "line 2: 'native_vit'", "line 2: 'image.'"]
