"""The page is one ASCII file that names nothing outside itself, whatever the names in a checkpoint."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from plans import HOSTILE, clip_plan, hostile_plan

import keymap
from keymap.paths import data_folder
from keymap.picture import format_page, plan_page

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return plan_page(clip_plan(tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize("kind", ["plan", "format"])
def test_the_page_is_self_contained(kind, page):
    text = page if kind == "plan" else format_page("hf_clip")
    assert text.isascii() and text.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in text and "{{" not in DATA.sub("", text)
    markup = DATA.sub("", text).replace("http://www.w3.org/2000/svg", "")  # the name of SVG, not an address
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=|\bhref=|@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(", markup)


def test_hostile_names_stay_data(tmp_path):
    page = plan_page(hostile_plan(tmp_path))
    (data,) = DATA.findall(page)
    assert not re.search(r"[<>&]", data) and page.count("<script") == 2 and page.count("</script>") == 2
    keys = {leaf[0] for section in json.loads(data)["sections"] for leaf in section["sources"]}
    assert {HOSTILE, "<!--<script>", "a&lt;b", "{{data}}"} <= keys


def test_a_hostile_title_is_escaped(tmp_path):
    file = tmp_path / "odd.yaml"
    text = (data_folder("mappings") / "open_clip" / "hf_bert.yaml").read_text(encoding="utf-8")
    title = re.search(r"^title: .*$", text, re.MULTILINE).group()
    file.write_text(text.replace("format: hf_bert", "format: odd").replace(title, 'title: "</title><b>\u00e9"'))
    page = format_page(file)
    assert "<b>" not in page and page.isascii()


def test_a_mapping_file_is_drawn_by_its_path(tmp_path):
    file = shutil.copy(data_folder("mappings") / "open_clip" / "hf_bert.yaml", tmp_path / "own.yaml")
    text = file.read_text(encoding="utf-8").replace("format: hf_bert", "format: own")
    file.write_text(text, encoding="utf-8")
    assert "<title>own - keymap</title>" in format_page(file) and "<title>own" in format_page(str(file))


def test_wrong_arguments_are_refused():
    with pytest.raises(keymap.PlanError, match="expected a plan, as plan_load"):
        plan_page("model.safetensors")
    with pytest.raises(keymap.MappingError, match="there is no format 'hf_clp'; did you mean hf_clip"):
        format_page("hf_clp")
    with pytest.raises(keymap.MappingError, match="pass the name of a format or the path"):
        format_page(3)


def test_the_same_plan_gives_the_same_page(tmp_path):
    plan = clip_plan(tmp_path)
    assert plan_page(plan) == plan_page(plan)
