"""Every tower of every format, saved without the prefix that its format gives it.

A tower that was taken out of its model has no ``visual.`` or ``txt/`` before its keys. Each is tried at the full size
of the first model that has it; the files are sparse, the models lie on the meta device.
"""

from __future__ import annotations

import tempfile
from functools import cache, lru_cache, partial
from pathlib import Path

import pytest
from peers import full_size, sources
from test_coverage import written

import keymap
from keymap.source.registry import registry
from keymap.source.search import tower_prefixes

pytestmark = pytest.mark.slow

NO_TOWER = {  # these prefixes are those of a module within the tower, which has further keys beside it
    ("hf_bert", "encoder."): "the embeddings lie beside the encoder",
    ("hf_bert", "encoder.layer."): "the same",
    **{
        (form, start): "the embeddings lie beside the blocks"
        for form in ("openai", "slip", "pe_core")
        for start in ("transformer.", "transformer.resblocks.")
    },
    ("hf_mt5", "encoder."): "the embedding is tied, and in the file under another name",
    ("hf_m2m100", "encoder."): "the same",
}


@cache
def files(form):
    """The files of a format, each with how its model is made."""
    named = [(sources.of(name)[form], partial(full_size.model, name)) for name in full_size.names()]
    beside = [(one.source, one.model) for one in sources.RELATIVES.values() if one.form == form]
    return [(source, build) for source, build in named if not isinstance(source, str)] + beside


@lru_cache(maxsize=32)  # the tests of one format follow each other
def planned(form, number):
    """The file of this number, its model, and the plan of the load."""
    source, build = files(form)[number]
    keys, model = source.keys(), build()
    with tempfile.TemporaryDirectory() as folder:
        path = written(keys, Path(folder))
        return keys, model, keymap.plan_load(model, path, towers=source.towers, strict=False, mapping=form)


PREFIXES = [
    pytest.param(mapping.name, start, marks=pytest.mark.formats(mapping.name))
    for mapping in registry().formats
    for start in tower_prefixes(mapping)
    if (mapping.name, start) not in NO_TOWER
]


def of_the_file(plan, start=""):
    """The keys of the file that each of the model's keys is made of, without what the whole file's keys begin with."""
    cut = "".join(plan.prefixes)
    return {
        entry.key: tuple(start + source.removeprefix(cut).removeprefix("params/") for source in entry.layout.sources)
        for entry in plan.entries
        if entry.layout.sources
    }


@pytest.mark.parametrize(("form", "start"), PREFIXES)
def test_a_tower_without_its_prefix_is_planned_as_within_its_file(form, start, tmp_path):
    for number in range(len(files(form))):
        keys, model, whole = planned(form, number)
        wanted = {
            key: made
            for key, made in of_the_file(whole).items()
            if all(name.startswith(start) for name in made) and not start.startswith(tuple(whole.prefixes) or "?")
        }
        if wanted:
            break
    else:
        pytest.fail("no file has this tower")
    towers = tuple({entry.tower for entry in whole.entries if entry.key in wanted})
    bare = {key.removeprefix("".join(whole.prefixes)).removeprefix("params/"): value for key, value in keys.items()}
    lone = {key[len(start) :]: value for key, value in bare.items() if key.startswith(start)}
    plan = keymap.plan_load(model, written(lone, tmp_path), towers=towers, strict=False)
    assert plan.unexpected_keys == ()
    assert of_the_file(plan, start + "".join(plan.prefixes)) == wanted
    beside = {entry.key for entry in whole.entries if entry.tower in towers} - set(wanted)
    assert set(plan.missing_keys) <= set(whole.missing_keys) | beside
