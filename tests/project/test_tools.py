"""The tools for maintainers work, on tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPINGS = ROOT / "mappings"


@pytest.fixture
def tool(monkeypatch):
    """Import a tool by name."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def test_check_mappings_passes_on_the_shipped_files(tool, capsys):
    assert tool("check_mappings").main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(MAPPINGS.rglob("*.yaml"))
    assert lines[-1] == f"{len(files)} of {len(files)} files are right, 0 faults"
    assert [line.split()[0] for line in lines[:-1]] == [file.stem for file in files]


# text to replace, its replacement, words of the message, and True where the message is at that line
BROKEN = {
    "unknown field": ("ignore:", "ignor:", "there is no field 'ignor' here; did you mean 'ignore'?", True),
    "unbalanced view": ("view: out in -> in out", "view: out in -> in", "the sides of view", True),
    "pattern": ("vision_model.: {", "vision_model.*.: {", "'.*' at character 13", True),
    "key twice": ("  scale:", "  text:", "key 'text' is given twice", True),
    "yaml": ("towers:", "towers: [", "the [ is not closed: add ]", True),
    "unknown layout": (
        "image: native_vit",
        "image: nativ_vit",
        "'nativ_vit' is not known; did you mean 'native_vit'?",
        True,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_mappings_fails_on_a_broken_file_with_its_place(name, tool, tmp_path, capsys):
    old, new, words, placed = BROKEN[name]
    text = (
        (MAPPINGS / "open_clip" / "hf_clip.yaml")
        .read_text(encoding="utf-8")
        .replace("format: hf_clip", "format: broken")
    )
    line = text.partition(old)[0].count("\n") + 1
    file = tmp_path / "broken.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert tool("check_mappings").main([str(file)]) == 1
    out = capsys.readouterr().out
    place = f"{file}:{line}:" if placed else f"{file}:"
    assert any(row.startswith(place) and words in row for row in out.splitlines()), out


def test_check_mappings_reports_the_faults_of_all_files(tool, tmp_path, capsys):
    text = (MAPPINGS / "open_clip" / "openai.yaml").read_text(encoding="utf-8")
    for name in ("one", "two"):
        broken = text.replace("format: openai", f"format: {name}").replace("layouts:", "speeks:")
        (tmp_path / f"{name}.yaml").write_text(broken, encoding="utf-8")
    assert tool("check_mappings").main([str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]) == 1
    out = capsys.readouterr().out
    assert "one.yaml:" in out
    assert "two.yaml:" in out


def test_check_mappings_refuses_a_name_that_is_taken(tool, tmp_path, capsys):
    (tmp_path / "openai.yaml").write_bytes((MAPPINGS / "open_clip" / "openai.yaml").read_bytes())
    assert tool("check_mappings").main([str(tmp_path / "openai.yaml")]) == 1
    assert "the name 'openai' is taken" in capsys.readouterr().out


def test_make_docs_writes_every_page_and_sees_a_stale_one(tool, tmp_path, capsys):
    make_docs = tool("make_docs")
    assert make_docs.main(["--folder", str(tmp_path)]) == 0
    names = {file.stem for file in tmp_path.rglob("*.md")}
    assert names == {"README", *(file.stem for file in MAPPINGS.rglob("*.yaml"))}
    assert make_docs.main(["--folder", str(tmp_path), "--check"]) == 0
    page = tmp_path / "openai.md"
    page.write_text(page.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    (tmp_path / "nobody.md").write_text("x", encoding="utf-8")
    (tmp_path / "timm.md").unlink()
    capsys.readouterr()
    assert make_docs.main(["--folder", str(tmp_path), "--check"]) == 1
    out = capsys.readouterr().out
    assert "openai.md is stale" in out
    assert "nobody.md belongs to no mapping" in out
    assert "timm.md is missing" in out


def test_a_generated_page_repeats_the_facts_of_its_mapping(tool):
    pages = tool("make_docs").pages()
    assert "do not include `img/embedding/kernel` with 2 axes or `img/cls`" in pages["big_vision_siglip.md"]
    assert 'facts={"image.heads": ..., "text.heads": ...}' in pages["big_vision_siglip.md"]
    assert "`self_attn.(q\\|k\\|v)_proj.(weight\\|bias)`" in pages["hf_clip.md"]
    assert "The bridge converts in both directions between `native` and `flat`." in pages["open_clip_flat.md"]


@pytest.mark.slow
def test_bench_runs_on_tiny_models():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("x floor", "assign=True", "open_clip", "us a key", "largest tensor"):
        assert word in done.stdout
    assert "could not be measured" not in done.stdout


@pytest.mark.slow
def test_bench_of_files_runs_on_a_tiny_model():
    command = [sys.executable, str(ROOT / "tools" / "bench_files.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("keymap.convert_checkpoint", "x cp", "one sequential read", "open_clip.load_checkpoint"):
        assert word in done.stdout


@pytest.mark.slow
def test_the_demo_runs_with_tiny_models(tool, capsys):
    demo = tool("demo")
    assert demo.main(["--tiny"]) == 0
    out = capsys.readouterr().out
    assert "7 loads and 2 refusals" in out
    assert out.count("the model is bit for bit what it was") == 2
    assert "ABOVE" not in out


@pytest.mark.slow
def test_demo_fails_where_a_difference_is_too_large(tool, monkeypatch, capsys):
    demo = tool("demo")
    monkeypatch.setattr(demo, "LIMIT", 1e-12)
    assert demo.main(["--tiny"]) == 1
    assert "FAILED: transformers CLIPModel" in capsys.readouterr().out


def test_demo_prints_without_rich(tool, monkeypatch, capsys):
    demo = tool("demo")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    book = demo.Book()
    assert book.console is None
    demo.recorded_big_vision(book)
    book.table()
    assert "big_vision npz, recorded" in capsys.readouterr().out
    assert not book.complaints
