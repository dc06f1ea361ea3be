"""The documents are right: examples run as printed, lists are complete, generated pages are fresh, links work."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import keymap
from keymap.plan.plan import Plan
from keymap.results import Inspection, Report
from keymap.source import registry

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    file
    for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "formats")
    for file in folder.glob("*.md")
    if file.is_relative_to(ROOT)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(file: Path) -> list[tuple[str, str, int]]:
    """The fenced blocks: language, text, line."""
    text = file.read_text(encoding="utf-8")
    return [(m.group(1), m.group(2), text[: m.start()].count("\n") + 1) for m in FENCE.finditer(text)]


def without_times(text: str) -> str:
    return re.sub(r"\s+[\d.]+ ms", " _ ms", text).strip()


def perform(file: Path) -> None:
    """Run a document in the working folder, as a reader would.

    python runs, all blocks in one session; a text block is what the block before it prints; yaml is written to the
    file of its format; console lines that begin with $ run, and print the lines that follow.
    """
    session: dict[str, object] = {"__name__": "document"}
    printed = ""
    for language, text, line in blocks(file):
        where = f"{file.name}, line {line}"
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + text, str(file), "exec"), session)
            printed = out.getvalue()
        elif language == "text":
            assert without_times(printed) == without_times(text), where
        elif language == "yaml":
            name = re.search(r"^format: (\w+)$", text, re.MULTILINE)
            assert name is not None, where
            Path(f"{name.group(1)}.yaml").write_text(text, encoding="utf-8")
        elif language == "console":
            for run in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, wanted = run.partition("\n")
                words = shlex.split(command)
                assert words[0] == "python", where
                done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
                assert without_times(done.stdout) == without_times(wanted), where + done.stderr
        else:
            raise AssertionError(f"{where}: a block of {language or 'no language'} that nobody checks")


@pytest.fixture
def fresh_registry(monkeypatch):
    """What a document registers is forgotten after it."""
    monkeypatch.setattr(registry, "_known", [])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/rule-language.md"])
def test_examples_run_as_they_are_printed(name, tmp_path, monkeypatch, fresh_registry):
    for folder in ("tools", "tests", "mappings", "schemas", "keymap"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    assert [language for language, _, _ in blocks(ROOT / name)]
    perform(ROOT / name)


def test_examples_are_not_only_there_but_run(tmp_path):
    """A broken example fails: the test above can see."""
    (tmp_path / "broken.md").write_text("# A page\n\n```python\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        perform(tmp_path / "broken.md")
    assert sum(language == "python" for language, _, _ in blocks(ROOT / "docs" / "rule-language.md")) > 15
    assert sum(language == "python" for language, _, _ in blocks(ROOT / "README.md")) >= 5


def test_the_readme_lists_the_formats():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- formats:")[2].partition("<!-- end of formats -->")[0]
    rows = re.findall(r"^\| \[(\w+)\]\(docs/formats/(\w+)\.md\) \| (.+) \|$", table, re.MULTILINE)
    assert all(name == page for name, page, _ in rows)
    assert {name: title for name, _, title in rows} == keymap.list_formats()


def test_the_pages_of_the_formats_are_fresh():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCUMENTS, ids=[str(file.relative_to(ROOT)) for file in DOCUMENTS])
def test_relative_links_lead_somewhere(file):
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    for link in re.findall(r"\[[^\]]+\]\(([^)#]+)[^)]*\)", text):
        if "://" not in link:
            assert (file.parent / link).exists(), link


def test_the_api_page_names_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in keymap.__all__ if name != "__version__" and name not in text] == []


@pytest.mark.parametrize("kind", [Plan, Report, Inspection])
def test_the_api_page_names_every_field_of_a_result(kind, tmp_path):
    import torch
    from peers import openclip
    from safetensors.torch import save_file

    model = openclip.clip()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    with torch.no_grad():
        result = keymap.load_checkpoint(model, tmp_path / "clip.safetensors")
    objects = {
        Plan: result.report.plan,
        Report: result.report,
        Inspection: keymap.inspect_checkpoint(tmp_path / "clip.safetensors"),
    }
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in objects[kind].to_dict() if f"`{name}`" not in text] == []


def test_the_rule_language_page_names_every_field_of_a_mapping():
    import json

    schema = json.loads((ROOT / "schemas" / "mapping.schema.json").read_text(encoding="utf-8"))
    fields = [*schema["properties"], *schema["$defs"]["rule"]["anyOf"][1]["properties"]]
    text = (ROOT / "docs" / "rule-language.md").read_text(encoding="utf-8")
    assert [name for name in fields if not re.search(rf"\b{name}\b", text)] == []
