"""The JSON schema of mapping files, as an editor uses it: by itself, for every kind of file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import keymap
from keymap.language.schema import HubNames, names_of_hub, schema_faults
from keymap.language.yaml_marks import parse_yaml

SCHEMA = json.loads(keymap.schema_path().read_text(encoding="utf-8"))
ROOT = Draft202012Validator(SCHEMA)
FILES = sorted((keymap.schema_path().parents[1] / "mappings").rglob("*.yaml"))
BRANCHES = SCHEMA["$defs"]["kinds"]["$defs"]
FIELDS = SCHEMA["$defs"]["fields"]["$defs"]
KINDS = sorted(BRANCHES)


def data(name: str) -> dict[str, Any]:
    """A shipped mapping, as plain YAML."""
    found = next(file for file in FILES if file.stem == name)
    loaded: dict[str, Any] = yaml.safe_load(found.read_text(encoding="utf-8"))
    return loaded


def of_kind(kind: str) -> dict[str, Any]:
    """A shipped mapping of this kind."""
    loaded = (data(file.stem) for file in FILES)
    return next(mapping for mapping in loaded if mapping.get("kind", "format") == kind)


def with_examples(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of the schema that has examples."""
    if isinstance(schema, dict):
        if isinstance(schema.get("examples"), list):
            yield path, schema
        for name, part in schema.items():
            if name != "examples":
                yield from with_examples(part, f"{path}/{name}")
    elif isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from with_examples(part, f"{path}/{number}")


PARTS = dict(with_examples(SCHEMA))


def test_the_schema_is_a_schema_with_a_stable_name() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == "urn:keymap:schema:mapping:1"


def test_the_schema_allows_the_names_of_any_hub_and_a_check_those_of_the_files_own() -> None:
    text = yaml.safe_dump({**data("hf_siglip"), "layouts": {"sound": "wide"}})
    assert ROOT.is_valid(yaml.safe_load(text))
    faults = schema_faults(parse_yaml(text, "f.yaml"), HubNames(("image", "text"), (("image", ("native",)),)))
    assert "there is no field 'sound' here" in faults[0].text
    hub = parse_yaml(yaml.safe_dump(data("open_clip"), sort_keys=False), "open_clip.yaml")
    assert names_of_hub(hub).towers == tuple(data("open_clip")["towers"])
    assert dict(names_of_hub(hub).layouts)["text"] == tuple(data("open_clip")["layouts"]["text"])


@pytest.mark.parametrize("path", PARTS)
def test_an_example_follows_its_own_schema(path: str) -> None:
    part = PARTS[path]
    assert part["examples"]
    for example in part["examples"]:
        errors = list(Draft202012Validator({"$defs": SCHEMA["$defs"], **part}).iter_errors(example))
        assert errors == []


def test_every_field_of_a_kind_has_a_description_and_every_required_field_an_example() -> None:
    resolved = {name: SCHEMA["$defs"][field["$ref"].split("/")[-1]] if "$ref" in field else field
                for name, field in FIELDS.items()}  # fmt: skip
    assert [name for name, field in resolved.items() if not field.get("description")] == []
    needed = {name for branch in BRANCHES.values() for name in branch["required"]} - {"kind"}
    assert [name for name in needed if not resolved[name].get("examples")] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_mapping_follows_the_whole_schema(file: Any) -> None:
    assert list(ROOT.iter_errors(data(file.stem))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_no_file_of_this_kind_has_is_refused(kind: str) -> None:
    mapping = of_kind(kind)
    assert ROOT.is_valid(mapping)
    assert not ROOT.is_valid({**mapping, "feild": 1})
    foreign = {name for branch in KINDS for name in BRANCHES[branch]["properties"]}
    for name in foreign - set(BRANCHES[kind]["properties"]):
        owner = next(branch for branch in KINDS if name in BRANCHES[branch]["properties"])
        assert not ROOT.is_valid({**mapping, name: of_kind(owner).get(name, {})}), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_lacks_a_required_field_is_refused(kind: str) -> None:
    mapping = of_kind(kind)
    for name in BRANCHES[kind]["required"]:
        if name != "kind":
            assert not ROOT.is_valid({key: value for key, value in mapping.items() if key != name}), name


def test_an_unknown_kind_is_refused() -> None:
    assert not ROOT.is_valid({**data("hf_clip"), "kind": "formt"})
