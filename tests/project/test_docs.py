"""The documents agree with the code: examples print what is shown, tables and figures match, links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keymap
from keymap.paths import data_folder
from keymap.plan.plan import Plan
from keymap.results import Inspection, Report
from keymap.source.registry import hubs

sys.path.insert(0, str(next(up for up in Path(__file__).resolve().parents if (up / "Makefile").is_file()) / "tools"))

import run_docs

ROOT = run_docs.ROOT
DOCUMENTS = sorted(file for folder in (".", "docs", "docs/formats") for file in (ROOT / folder).glob("*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def perform(document: str, folder: Path) -> run_docs.Outcome:
    with run_docs.working_folder(folder):
        return run_docs.perform(document, "document", folder)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Where the files that examples load are made, once."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("name", run_docs.EXAMPLES)
def test_examples_run_and_print_what_the_document_shows(name, tmp_path, store):
    text = read(name)
    run_docs.prepare(text, store, tmp_path)
    outcome = perform(text, tmp_path)
    assert outcome.faults == []
    for block, printed in outcome.shown:
        shown, now = run_docs.without_times(block.text), run_docs.without_times(printed)
        assert shown == now, f"{name}, line {block.line}; `python tools/run_docs.py --write` updates it"


def test_every_document_with_examples_is_run():
    with_examples = {
        file.relative_to(ROOT).as_posix()
        for file in DOCUMENTS
        if any(block.language in ("python", "console") for block in run_docs.blocks(file.read_text(encoding="utf-8")))
    }
    assert with_examples == set(run_docs.EXAMPLES)


BROKEN = {
    "an example that raises": ("```python\n1 / 0\n```\n", ZeroDivisionError),
    "other output than shown": ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "1"),
    "output that is not shown": ("```python\nprint(1)\n```\n", "no text block shows it"),
    "a block that nothing checks": ("```bash\nls\n```\n", "a block of bash that nothing checks"),
    "a part of a mapping that no file has": ("```yaml\n    a.(x|y): b\n```\n", "no file of mappings/ has"),
    "a command that fails": ("```console\n$ python -c 'raise SystemExit(3)'\n```\n", "exit status 3"),
    "a command that does not": ("```console\n$ keymap --version  # exit 1\n```\n", "exit status 0"),
    "another program": ("```console\n$ ls\n```\n", "only python and keymap run here"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_example_is_found(name, tmp_path):
    document, wanted = BROKEN[name]
    if isinstance(wanted, type):
        with pytest.raises(wanted):
            perform(document, tmp_path)
        return
    outcome = perform(document, tmp_path)
    differ = [printed for block, printed in outcome.shown if block.text != printed]
    assert wanted in "".join([*outcome.faults, *differ])


WRITTEN = {  # what a document shows, and what it shows after a run that prints "1.5 s" and "2"
    "other output": ("0.2 s\n3", "0.2 s\n2"),
    "another time alone": ("0.2 s\n2", "0.2 s\n2"),
    "nothing yet": ("", "1.5 s\n2"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_write_puts_the_printed_output_into_the_document(name, tmp_path):
    page = "```python\nprint('1.5 s')\nprint(2)\n```\n\n```text\n{}\n```\n\nMore.\n"
    before, after = WRITTEN[name]
    document = page.format(before)
    assert run_docs.rewritten(document, perform(document, tmp_path)) == page.format(after)


# --- README --------------------------------------------------------------------------------------------------


def test_the_readme_lists_the_formats():
    table = read("README.md").partition("<!-- formats:")[2].partition("<!-- end of formats -->")[0]
    pattern = r"^\| \[(\w+)\]\(docs/formats/(?:(\w+)/)?(\w+)\.md\) \| (\w+) \| (.+) \|$"
    rows = re.findall(pattern, table, re.MULTILINE)
    assert all(name == page for name, _, page, _, _ in rows)
    assert all(folder in ("", hub) for _, folder, _, hub, _ in rows)
    for hub in hubs().hubs:
        assert {name: title for name, _, _, of, title in rows if of == hub} == keymap.list_formats(hub), hub


def test_the_readme_names_the_files_of_every_format():
    table = read("README.md").partition("## Which files")[2].partition("\n## ")[0]
    bridges = set(
        re.findall(r"`(\w+)`", read("README.md").partition("<!-- end of formats -->")[2].partition("are bridges")[0])
    )
    assert (
        set(re.findall(r"\[(\w+)\]\(docs/formats/\1\.md\)", table)) == set(keymap.list_formats("open_clip")) - bridges
    )


def test_the_readme_quotes_the_figures_of_the_benchmarks():
    """Rounded times: keymap and OpenCLIP's loader from .safetensors and .pt, keymap from a transformers file."""
    page = read("docs/benchmarks.md")

    def figure(case: str, row: str) -> str:
        block = page.partition(f"\n{case}, ")[2].partition("\n  floor")[2]
        return str(round(float(re.search(rf"^  {row} +([\d.]+) ms", block, re.MULTILINE).group(1))))

    cases = ("ViT-B-32 .safetensors", "ViT-B-32 .pt")
    measured = [figure(case, row) for row in ("keymap", "open_clip") for case in cases]
    measured.append(figure("transformers CLIP -> ViT-B-32", "keymap"))
    assert re.findall(r"\b(\d+)\s+ms", read("README.md").partition("## Speed")[2].partition("\n## ")[0]) == measured


# --- the other documents -------------------------------------------------------------------------------------


def test_the_pages_of_the_formats_are_fresh():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmarks_page_explains_its_figures_in_the_words_of_the_tool():
    import bench

    assert read("docs/benchmarks.md").endswith("\n".join(bench.READING) + "\n")


@pytest.mark.parametrize("file", DOCUMENTS, ids=[str(file.relative_to(ROOT)) for file in DOCUMENTS])
def test_relative_links_lead_somewhere(file):
    text = run_docs.FENCE.sub("", file.read_text(encoding="utf-8"))
    for link, part in re.findall(r"\[[^\]]+\]\(([^)#]*)(#[^)]*)?\)", text):
        if "://" in link:
            continue
        target = file.parent / link if link else file
        assert target.exists(), link
        if part:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert part[1:] in anchors, link + part


@pytest.mark.parametrize("file", DOCUMENTS, ids=[str(file.relative_to(ROOT)) for file in DOCUMENTS])
def test_paths_of_the_repository_that_a_document_names_exist(file):
    text = file.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:keymap|mappings|schemas|tools|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_index_lists_every_document():
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", read("docs/README.md")))
    there = {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert there <= linked
    assert "formats/README.md" in linked


def test_the_drawing_names_every_room():
    drawing = next(block for block in run_docs.blocks(read("docs/how-it-works.md")) if block.language == "mermaid")
    rooms = {folder.name for folder in (ROOT / "keymap").iterdir() if (folder / "__init__.py").is_file()}
    assert {name for name in rooms if not re.search(rf"\b{name}\b", drawing.text)} == set()


def test_the_api_page_names_every_public_name():
    text = read("docs/api.md")
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
    text = read("docs/api.md")
    assert [name for name in objects[kind].to_dict() if f"`{name}`" not in text] == []


def test_the_rule_language_page_names_every_field_of_a_mapping():
    schema = json.loads((data_folder("schemas") / "mapping.schema.json").read_text(encoding="utf-8"))
    kinds = schema["$defs"]["kinds"]["$defs"].values()
    fields = {name for kind in kinds for name in kind["properties"]}
    fields |= set(schema["$defs"]["rule"]["anyOf"][1]["properties"]) | set(schema["$defs"]["config"]["properties"])
    text = read("docs/rule-language.md")
    assert [name for name in sorted(fields) if not re.search(rf"\b{name}\b", text)] == []
