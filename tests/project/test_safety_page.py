"""The names and limits in docs/safety.md are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from keymap.language import apply, compile_rules, pattern, pattern_syntax, view, yaml_marks
from keymap.load import execute
from keymap.paths import data_folder
from keymap.read import lazy, numpy_file, safetensors_file, shards, torchscript, tree, unpickle, zip_file
from keymap.read.globals_allowed import _CALLS, DTYPES, NAMES_ONLY, STORAGE_DTYPES, UNREAD
from keymap.source import config, folder, unwrap

PAGE = (Path(__file__).parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Names that a pickle may use")[2].partition("## Limits")[0]
LIMITS = PAGE.partition("## Limits")[2].partition("## How")[0]


def test_the_page_lists_exactly_the_names_that_a_pickle_may_use() -> None:
    named = set(re.findall(r"`([\w.]+\.[\w.]+)`", SECTION))
    allowed = {*_CALLS, *NAMES_ONLY, *DTYPES, *(f"torch.{name}" for name in STORAGE_DTYPES), *UNREAD}
    modules = {"numpy.core", "torch.storage"}  # older names of modules
    assert named - modules == allowed


def row(of: str) -> list[int]:
    line = next(line for line in LIMITS.splitlines() if line.startswith(f"| {of} |"))
    return [int(number) for number in re.findall(r"\d+", line.strip("|").split("|")[1])]


def test_the_page_states_the_limits_of_the_code() -> None:
    assert row("tensors, archive members, keys of an index") == [lazy.FEW, lazy.PER_TENSOR]
    assert row("one tensor, or one inflated member") == [lazy.SMALL >> 20]
    assert row("a key of a state dict") == [lazy.MAX_KEY]
    assert row("dimensions of a tensor") == [lazy.MAX_DIMS]
    header = [safetensors_file.MAX_HEADER // 10**6, safetensors_file.PARSED >> 20]
    assert row("the header of a safetensors file") == header
    assert row("the directory of an archive") == [zip_file.MIN_DIRECTORY >> 20]
    assert row("the header of an array") == [numpy_file.MAX_HEADER]
    assert row("memory of a pickle") == [unpickle.SLACK >> 20, unpickle.PER_STORAGE, lazy.FEW, unpickle.TENSOR]
    nesting = [tree.MAX_DEPTH, tree.MAX_NODES, unwrap._MAX_DEPTH, unwrap._MAX_PREFIXES]
    assert row("nesting") == nesting
    assert row("dicts with keys that are not strings") == [unpickle.MAX_NUMBERED, unpickle.MAX_PARTS]
    assert row("the code of a TorchScript archive") == [torchscript.MAX_CODE >> 20, torchscript.MAX_CLASSES]
    assert row("an index of shards") == [shards.MAX_INDEX >> 20, shards.MAX_SHARDS]
    assert row("a folder") == [folder._MAX_ENTRIES]
    assert row("a configuration file") == [config._MAX_BYTES >> 20]
    effort = pattern.Effort()
    mapping = [yaml_marks._MAX_BYTES, yaml_marks._MAX_DEPTH, yaml_marks._MAX_TEXT, compile_rules._MAX_RULES]
    schema = json.loads((data_folder("schemas") / "mapping.schema.json").read_text(encoding="utf-8"))
    fields = schema["$defs"]["fields"]["$defs"]
    mapping += [effort.keys, effort.opened, fields["aliases"]["maxItems"]]
    assert row("a mapping") == mapping
    assert row("what rules produce") == [
        apply._MAX_SLICES,
        apply._MAX_SLICES_OF_EACH,
        apply._ELEMENTS_OF_SLICE,
        apply._MAX_LACKING,
        apply._MAX_MADE_UP,
    ]
    assert row("a pattern") == [pattern_syntax._MAX_TEXT, pattern_syntax._MAX_READINGS]
    assert row("a view") == [view._MAX_AXES]
    assert f"Up to {execute._MADE_FIRST >> 20} MB of resized and computed tensors are made" in PAGE
