"""`make check-format NAME=...` selects the tests of one format: for every format, those that prove it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import selection

from keymap.source.registry import registry

ROOT = Path(__file__).parents[2]
FORMATS = sorted(mapping.name for mapping in registry().formats)
COLLECT = """
import json, sys
import pytest
import selection

class Collector:
    def pytest_collection_modifyitems(self, items):
        tests = [
            {"test": item.nodeid, "formats": sorted(selection.formats_of(item)),
             "proves": "proves" in item.fixturenames, "slow": item.get_closest_marker("slow") is not None}
            for item in items
        ]
        with open(sys.argv[1], "w") as file:
            json.dump(tests, file)

sys.exit(pytest.main(["--collect-only", "-qq", "tests/formats"], plugins=[Collector()]))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Every test of tests/formats, as a fresh process collects it."""
    file = tmp_path_factory.mktemp("collected") / "tests.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", COLLECT, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.mark.slow
def test_each_format_selects_what_proves_it(collected):
    """Outputs or bits against a peer, broken rules, a key list that it owns, a round trip, and a file of full size."""
    for form in FORMATS:
        chosen = [test for test in collected if form in test["formats"] and not test["slow"]]
        rooms = Counter(test["test"].partition("::")[0].rpartition("/")[2] for test in chosen)
        assert {"test_ownership.py", "test_round_trip.py", "test_coverage.py"} <= set(rooms), form
        own = [test for test in chosen if "test_coverage.py" not in test["test"]]
        assert any(test["proves"] for test in own), f"{form}: no test proves parity or equal bits"
        broken = any("test_a_broken_rule" in test["test"] for test in own)
        assert broken or form in ("open_clip", "mobileclip_s0", "mobileclip_text"), f"{form}: no test breaks its rules"


@pytest.mark.slow
def test_a_bridge_selects_what_proves_it_and_no_format_selects_everything(collected):
    for mapping in registry().mappings.values():
        if mapping.kind == "bridge":
            assert any(mapping.name in test["formats"] for test in collected), mapping.name
    for form in FORMATS:
        assert sum(form in test["formats"] and not test["slow"] for test in collected) < len(collected) / 4


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_named(name):
    selection.refuse_unknown(name)


NOT_FORMATS = {  # the name, and a pattern of the message
    "hf_clp": r"no format 'hf_clp'; did you mean hf_clip\b.*\?$",
    "HF_CLIP": r"no format 'HF_CLIP'; did you mean hf_clip\b.*\?$",
    "unknown": r"no format 'unknown'; formats: any, .*, wan_clip",
    "hf_blocks": r"hf_blocks is a file of tables: check a format that uses it: .*\bhf_clip\b",
    "containers": r"containers is not a format \(its kind is containers\); formats: any, .*, wan_clip",
    "open_clip_configurations": r"open_clip_configurations is not a format \(its kind is configurations\); formats: ",
}


@pytest.mark.parametrize("name", NOT_FORMATS)
def test_an_unknown_format_is_refused_with_near_names_or_the_formats(name):
    with pytest.raises(pytest.UsageError, match=NOT_FORMATS[name]):
        selection.refuse_unknown(name)


def test_a_format_without_any_test_is_refused_with_the_file_to_add():
    with pytest.raises(pytest.UsageError, match=r"no test is about hf_clip: add tests/formats/test_hf_clip.py"):
        selection.select([], "hf_clip")
