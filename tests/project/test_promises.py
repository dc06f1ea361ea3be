"""Each sentence of README.md, docs/safety.md and docs/api.md that promises has a test beside it in docs/promises.md."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/safety.md", "docs/api.md")
TABLE = "docs/promises.md"
PROMISING = "What keymap guarantees"  # every sentence of this section counts as a promise
WORD = re.compile(
    r"\b(never|always|every|everything|each|no|no code|nothing|only|refuses?|refused|unchanged|bit for bit|exact"
    r"|exactly|at most|bounded|before|cannot|keeps|without a copy|does not|raises|warns|an error|whenever|guess|must"
    r"|half loaded)\b",
    re.IGNORECASE,
)
NOT_TEXT = re.compile(r"^```.*?^```$|^ {4}\S.*?$|<!--.*?-->", re.MULTILINE | re.DOTALL)
BLOCKS = re.compile(r"\n\s*\n|\n(?=- |\||#)")
ENDS = re.compile(r"(?<=[.!?])(?:\*\*)?\s+(?=[A-Z`\[*]|keymap(?:'s)?\s)|(?<=[.!?]\*\*)\s+")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def plain(text: str) -> str:
    """A text without markup and line breaks; of a link its words."""
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("*", "").replace("`", "").split())


def sentences(page: str) -> list[tuple[str, str]]:
    """The sentences of a page, those of its lists and the cells of its tables, each with the title above it."""
    found, title = [], ""
    for block in BLOCKS.split(NOT_TEXT.sub("\n\n", page)):
        if block.startswith("#"):
            title = block.lstrip("# ")
            continue
        cells = block.strip().strip("|").split("|") if block.startswith("|") else [re.sub(r"^- ", "", block)]
        found += [(title, plain(text)) for cell in cells for text in ENDS.split(cell.strip()) if plain(text)]
    return found


@cache
def rows() -> list[tuple[str, str, list[str]]]:
    """The promises of the table: sentence, page, tests."""
    found = []
    for line in read(TABLE).partition("## Sentences that promise nothing")[0].splitlines():
        if line.startswith("| ") and "tests/" in line:
            promise, page, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append((plain(promise), plain(page), re.findall(r"`([^`]+)`", tests)))
    return found


def narration() -> list[str]:
    part = read(TABLE).partition("## Sentences that promise nothing")[2]
    return [plain(line[2:]) for line in part.splitlines() if line.startswith("- ")]


def forgotten(page: str, known: set[str]) -> list[str]:
    """Sentences that promise, by their place or by a word, and that neither list has."""
    found = sentences(page)
    return [text for title, text in found if text not in known and (title == PROMISING or WORD.search(text))]


def missing_test(test: str) -> bool:
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file():
        return True
    tree = ast.parse(read(file))
    return not (name.startswith("test_") and any(isinstance(n, ast.FunctionDef) and n.name == name for n in tree.body))


def test_each_promise_stands_in_its_page() -> None:
    assert rows() != [] and {page for _, page, _ in rows()} == set(PAGES)
    texts = {page: {text for _, text in sentences(read(page))} for page in PAGES}
    assert [row[:2] for row in rows() if row[0] not in texts[row[1]]] == []


def test_each_promise_names_tests_that_exist() -> None:
    assert [promise for promise, _, tests in rows() if not tests] == []
    assert {test for _, _, tests in rows() for test in tests if missing_test(test)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_no_promise_of_a_page_is_forgotten(page: str) -> None:
    known = {promise for promise, where, _ in rows() if where == page} | set(narration())
    assert forgotten(read(page), known) == []


def test_both_lists_are_fresh() -> None:
    """No sentence on both, none twice, and none without need."""
    promises = [(promise, page) for promise, page, _ in rows()]
    assert len(set(promises)) == len(promises)
    assert len(set(narration())) == len(narration())
    assert {promise for promise, _ in promises} & set(narration()) == set()
    needed = {text for page in PAGES for text in forgotten(read(page), set())}
    assert [text for text in narration() if text not in needed] == []


def test_a_forgotten_promise_is_found() -> None:
    lists = "- `keymap` refuses it\n\n| a | at most 3 |"
    page = f"# T\n\nIt loads. It [never](x.md) **writes**\none. Why?\n\n{lists}\n\n## {PROMISING}\n\nFew. `a` b\n"
    assert forgotten(page, {"Few."}) == ["It never writes one.", "keymap refuses it", "at most 3", "a b"]


@pytest.mark.parametrize("test", ["tests/project/test_nothing.py::test_a", "tests/project/test_promises.py::test_a"])
def test_a_test_that_does_not_exist_is_found(test: str) -> None:
    assert missing_test(test)
    assert missing_test("tests/project/test_promises.py::plain")
    assert not missing_test("tests/project/test_promises.py::test_a_test_that_does_not_exist_is_found")
