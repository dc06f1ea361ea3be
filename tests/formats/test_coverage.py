"""Every configuration that OpenCLIP ships, from every format that there is for it, at full size.

The files are sparse: the names, shapes and dtypes that `peers.sources` takes from the formats' owners, and a hole for
the values. The models lie on the meta device. What these tests state, together with the proofs of parity of other
tests, is the page docs/coverage.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import full_size, hf, hf_text, layouts, lit, naflex, openai, openclip, relatives, sources
from peers.common import Size

import keymap
from keymap.plan.to_hub import tower_of
from keymap.source.registry import registry

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import make_coverage
import record_configurations

NAMES = full_size.names()
HUB = registry().hub
CELLS = [(name, form) for name in NAMES for form, answer in sources.of(name).items() if not isinstance(answer, str)]


def cell(name, form):
    """A cell as a parameter; slow, unless its configuration represents a layout or is the format's first."""
    first = next(configuration for configuration, other in CELLS if other == form)
    few = name in layouts.MODELS or name == first
    return pytest.param(name, form, marks=() if few else pytest.mark.slow)


def written(keys, folder):
    """The file, and the configuration beside it, where the owner writes one."""
    if hasattr(keys, "config"):
        (folder / "config.json").write_text(keys.config, encoding="utf-8")
    return full_size.sparse_file(folder / "model.safetensors", keys)


def assert_complete(plan, source, keys, model):
    """Every key of the file and every key of the model is accounted for, and nothing is changed on the way."""
    assert (plan.unexpected_keys, plan.mismatched, plan.resized) == ((), {}, {})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict(keep_vars=True).items()}
    towers = {key: tower_of(HUB, key) for key in shapes}
    asked = set(source.towers or towers.values())
    lacking = {key for key in shapes if source.lacks and key.startswith(source.lacks)}
    assert set(plan.missing_keys) == lacking and bool(lacking) == bool(source.lacks)
    assert {entry.key: entry.shape for entry in plan.entries} == {
        key: shape for key, shape in shapes.items() if towers[key] in asked and key not in lacking
    }
    used = {key for entry in plan.entries for key in entry.layout.sources}
    cut = "".join(plan.prefixes)
    left = {key.removeprefix(cut) for key in keys} - used - set(plan.dropped)
    assert [key for key in left if not key.removeprefix("params/").startswith(source.others or "?")] == []
    assert all(plan.dropped.values()) and all(plan.filled.values())


def assert_recorded(name, model):
    """mappings/open_clip_configurations.yaml says of this configuration what the tool would write."""
    prints, rows = record_configurations.measured(model)
    recorded = [entry for entry in registry().configurations if name in entry.names]
    assert [(tuple(entry.fingerprints.items()), list(entry.names[name])) for entry in recorded] == [(prints, rows)]
    assert record_configurations.named(name) == next(entry.facts.get(name, {}) for entry in recorded)
    keys: record_configurations.Keys = {}
    record_configurations.add_keys(model, keys)
    recorded = json.loads(record_configurations.KEYS.read_text(encoding="utf-8"))["keys"]
    assert [(t, n, set(k) - set(recorded[t][n])) for t, of in keys.items() for n, k in of.items()] == [
        (t, n, set()) for t, of in keys.items() for n in of
    ]


@pytest.mark.parametrize(("name", "form"), [cell(name, form) for name, form in CELLS])
def test_a_file_of_full_size_has_a_place_for_every_key(name, form, tmp_path, proves):
    source, model = sources.of(name)[form], full_size.model(name)
    keys = source.keys()
    path = written(keys, tmp_path)
    plan = keymap.plan_load(model, path, strict=not source.lacks, towers=source.towers)
    path.unlink()
    assert plan.format == form
    assert_complete(plan, source, keys, model)
    proves(
        "names and shapes",
        plan,
        configuration=name,
        whole=source.towers is None,
        classes=classes(model),
        warnings=list(plan.warnings),
        lacks=bool(source.lacks),
    )
    if form == HUB.name:
        assert_recorded(name, model)


def classes(model):
    """What the towers of a model are, by their classes."""
    image, text = model.visual, getattr(model, "text", None)
    trunk = getattr(image, "trunk", None)
    image_class = f"timm {type(trunk).__name__}" if trunk is not None else type(image).__name__
    encoder = getattr(text, "transformer", None)
    hf_tower = type(encoder).__name__ if type(text).__name__ == "HFTextEncoder" else ""
    return [type(model).__name__, image_class, hf_tower or "TextTransformer"]


# --- the models of these files are not among the configurations ---


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.formats(r.form)) for name, r in sources.RELATIVES.items()]
)
def test_a_relative_of_full_size_has_a_place_for_every_key(name, tmp_path, proves):
    relative = sources.RELATIVES[name]
    model, keys = relative.model(), relative.source.keys()
    path = written(keys, tmp_path)
    plan = keymap.plan_load(model, path, towers=relative.source.towers)
    path.unlink()
    assert plan.format == relative.form
    assert_complete(plan, relative.source, keys, model)
    proves("names and shapes", plan, relative=name, whole=relative.source.towers is None, warnings=list(plan.warnings))


# --- what the lists rest on ---


def test_every_format_has_an_answer_for_every_configuration():
    formats = {mapping.name for mapping in registry().formats}
    assert len(NAMES) == 144
    assert {name: set(sources.of(name)) ^ formats for name in NAMES if set(sources.of(name)) != formats} == {}
    assert {form for _, form in CELLS} | {relative.form for relative in sources.RELATIVES.values()} == formats


def test_openais_own_files_are_the_nine_that_the_package_names():
    import clip

    whole = {name for name, form in CELLS if form == "openai" and sources.of(name)[form].towers is None}
    named = {name.replace("/", "-").replace("@336px", "-336") + "-quickgelu" for name in clip.available_models()}
    assert whole == named and len(named) == 9


def test_the_record_of_configurations_is_what_the_tool_writes():
    assert record_configurations.FILE.read_text(encoding="utf-8") == record_configurations.text(
        [
            (tuple(entry.fingerprints.items()), {name: list(rows) for name, rows in entry.names.items()})
            for entry in registry().configurations
        ],
        {name: facts for entry in registry().configurations for name, facts in entry.facts.items()},
    )
    assert sorted(name for entry in registry().configurations for name in entry.names) == NAMES


WRITTEN = {
    "CLIPModel": hf.clip,
    "CLIPVisionModelWithProjection": lambda: hf.clip(tower="image_proj"),
    "CLIPTextModelWithProjection": lambda: hf.clip(tower="text_proj"),
    "MetaClip2Model": hf.metaclip2,
    "SiglipModel": hf.siglip,
    "SiglipVisionModel": lambda: hf.siglip(tower="image"),
    "Siglip2Model": naflex.siglip2,
    "Siglip2VisionModel": lambda: naflex.siglip2(tower="image"),
    "AltCLIPModel": relatives.hf_altclip,
    "ChineseCLIPModel": relatives.hf_chinese_clip,
    **{name: (lambda name=name: hf_text.model(name)) for _, name in sources.LANGUAGE_MODELS.values()},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_names_without_writing_are_those_that_transformers_writes(name):
    model = WRITTEN[name]()
    assert type(model).__name__ == name
    written = hf.disk_keys(model)
    names = sources.saved(model)
    assert {key: value.shape for key, value in names.items()} == {key: value.shape for key, value in written.items()}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", ["big_vision_siglip", "big_vision_naflex", "big_vision_lit"])
def test_the_names_of_one_traced_block_repeated_are_those_of_the_whole_model(kind, head):
    size = Size()
    if kind == "big_vision_lit":
        whole = lit.init(head=False)
        assert head or "img/head/kernel" not in whole
        keys = sources.flax_two_towers(Size(embed_dim=size.image_width), kind)
    else:
        make = {"big_vision_siglip": sources.big_vision.init, "big_vision_naflex": naflex.init}[kind]
        whole = make(head=head)
        wide = {} if head else {"text_width": size.image_width}
        keys = sources.flax_two_towers(Size(embed_dim=size.image_width, **wide), kind, head)
    shapes = {key.removeprefix("params/"): tuple(value.shape) for key, value in keys.items()}
    assert shapes == {key: value.shape for key, value in whole.items()}


def test_openais_and_chinese_clips_lists_are_those_of_their_models():
    size = Size(**openai.VIT)
    meta = sources.openai_clip(size, size.image_depth)
    real = openai.state_dict(openai.vit())
    assert {k: (v.shape, v.dtype) for k, v in meta.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    size = Size(**openai.RESNET)
    meta = sources.openai_clip(size, openai.RESNET_LAYERS)
    real = openai.state_dict(openai.resnet())
    assert {k: (v.shape, v.dtype) for k, v in meta.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    own = {key.removeprefix("module.") for key in sources.cn_clip(Size(**relatives.CN_VIT), 2, num_hidden_layers=3)}
    assert own == set(relatives.cn_clip().state_dict())
    held = relatives.tinyclip(wrapped=True).state_dict()
    size = Size(**openai.VIT)
    assert {k: v.shape for k, v in sources.tinyclip(size, 2).items()} == {k: v.shape for k, v in held.items()}
    long = Size(**relatives.LONG)
    held = relatives.longclip().state_dict()
    assert {k: v.shape for k, v in sources.longclip(long, 2).items()} == {k: v.shape for k, v in held.items()}


def test_a_plan_that_is_not_complete_is_seen(tmp_path):
    """The assertions above fail where one key is lost, has another shape, or is one too many."""
    source, model = sources.of("ViT-S-32")["hf_clip"], full_size.model("ViT-S-32")
    keys = source.keys()
    lost = next(iter(keys))
    for change in (
        {key: value for key, value in keys.items() if key != lost},
        {**keys, lost: torch.empty(3, device="meta")},
        {**keys, "vision_model.extra.weight": torch.empty(3, device="meta")},
    ):
        path = full_size.sparse_file(tmp_path / "model.safetensors", change)
        with pytest.raises(keymap.PlanError):
            keymap.plan_load(model, path)
        plan = keymap.plan_load(model, path, strict=False)
        with pytest.raises(AssertionError):
            assert_complete(plan, source, change, model)


def test_a_small_model_and_its_full_size_have_the_same_layout_digest():
    import proofs

    small = proofs.layouts(openclip.clip().state_dict())
    assert small == proofs.layouts(full_size.model("ViT-H-14").state_dict())
    assert small["text"] == proofs.layouts(full_size.model("EVA02-B-16").state_dict())["text"]
    assert small["image"] != proofs.layouts(full_size.model("ViT-H-14-CLIPA").state_dict())["image"]


# --- the page ---


def record(word, form, towers, name="ViT-B-16", **more):
    full = {"configuration": name, "whole": True, "warnings": [], "lacks": False, "classes": ["CLIP", "ViT", "Text"]}
    return {
        "word": word,
        "format": form,
        "towers": towers,
        "test": "x",
        **(full if word == "names and shapes" else {}),
        **more,
    }


TOWERS = {"image": "a", "scale": "c", "text": "b"}
PLANNED = [record("names and shapes", "open_clip", TOWERS), record("names and shapes", "hf_clip", TOWERS)]
SCALE = record("bit-equal", "hf_clip", {"scale": "c"})
BOTH = record("parity", "hf_clip", {"image": "a", "text": "b"})
WARNED = [PLANNED[0], {**PLANNED[1], "warnings": ["activation of the image tower: x (format hf_clip), y, so no"]}]
WORDS_OF = {  # proofs -> the cell of ViT-B-16 and hf_clip
    "no proof": (PLANNED, "names and shapes"),
    "all towers": ([*PLANNED, SCALE, BOTH], "parity"),
    "no scale": ([*PLANNED, BOTH], "names and shapes"),
    "one tower": ([*PLANNED, SCALE, record("parity", "hf_clip", {"image": "a"})], "names and shapes"),
    "the weakest tower": (
        [*PLANNED, SCALE, record("parity", "hf_clip", {"image": "a"}), record("bit-equal", "hf_clip", {"text": "b"})],
        "bit-equal",
    ),
    "another layout": ([*PLANNED, SCALE, record("parity", "hf_clip", {"image": "z", "text": "b"})], "names and shapes"),
    "another format": ([*PLANNED, SCALE, record("parity", "openai", {"image": "a", "text": "b"})], "names and shapes"),
    "a load that warns": ([*WARNED, SCALE, BOTH], "names and shapes"),
    "a load that warns, of equal bits": ([*WARNED, BOTH, record("bit-equal", "hf_clip", TOWERS)], "bit-equal"),
    "one planned tower": (
        [PLANNED[0], {**PLANNED[1], "whole": False, "towers": {"image": "a"}}, BOTH],
        "parity (image)",
    ),
    "a full size that was not planned": ([PLANNED[0], SCALE, BOTH], "not proved"),
}


@pytest.mark.parametrize("name", WORDS_OF)
def test_a_cell_shows_the_weakest_proof_of_its_towers(name):
    proofs, word = WORDS_OF[name]
    assert make_coverage.read_cells(make_coverage.page(proofs))["ViT-B-16", "hf_clip"] == word


@pytest.fixture
def run(tmp_path, capsys):
    """Run the tool on proofs; gives the exit status and what it says."""
    page = tmp_path / "coverage.md"

    def made(proofs, *arguments, failed=()):
        file = tmp_path / "proofs.json"
        file.write_text(json.dumps({"failed": list(failed), "proofs": proofs}), encoding="utf-8")
        status = make_coverage.main(["--proofs", str(file), "--page", str(page), *arguments])
        return status, capsys.readouterr().out

    made.page = page
    return made


def test_the_page_is_written_and_a_stale_page_and_a_worse_cell_are_reported(run):
    good, less = [*PLANNED, SCALE, BOTH], [*PLANNED, SCALE]
    assert run(good, "--check")[0] == 1 and not run.page.exists()
    assert run(good)[0] == 0 and run(good, "--check") == (0, "coverage.md is fresh\n")
    status, printed = run(less, "--check")
    assert status == 1 and "worse: ViT-B-16, hf_clip: was parity, is names and shapes" in printed and "stale" in printed
    assert run(good, "--check")[0] == 0  # a check writes nothing
    assert "1 worse" in run(less)[1]
    status, printed = run(good, "--check")
    assert status == 1 and "worse" not in printed and "stale" in printed  # better, but not what the page says
    half = [PLANNED[0], {**PLANNED[1], "whole": False}, SCALE, BOTH]
    run(good)
    assert "worse: ViT-B-16, hf_clip: was parity, is parity (image, text)" in run(half, "--check")[1]
    assert "is not proved" in run([PLANNED[0]], "--check")[1]


def test_no_page_is_written_after_a_failed_or_missing_run(run, tmp_path, capsys):
    status, printed = run(PLANNED, failed=["tests/test_x.py::test_y"])
    assert status == 1 and "1 tests failed" in printed and "test_x.py" in printed and not run.page.exists()
    assert make_coverage.main(["--proofs", str(tmp_path / "none.json")]) == 1
    assert "make test" in capsys.readouterr().out


@pytest.mark.slow
def test_the_proofs_of_tests_that_passed_are_written_at_the_end_of_a_run(tmp_path):
    """By workers of pytest-xdist; equal statements once; nothing of a test that fails."""
    for name in ("conftest.py", "proofs.py"):
        (tmp_path / name).write_bytes((Path(__file__).parents[1] / name).read_bytes())
    (tmp_path / "test_it.py").write_text(
        "from types import SimpleNamespace as N\n"
        "import pytest\n"
        "E = [N(key='visual.blocks.3.w'), N(key='text.ln_final.weight'), N(key='logit_scale')]\n"
        "PLAN = N(format='f', entries=E, missing_keys=(), loaded={'image': 1, 'text': 1, 'scale': 1})\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_good(n, proves): proves('parity', PLAN); proves('bit-equal', PLAN, ('scale',))\n"
        "def test_bad(proves): proves('bit-equal', PLAN); assert False\n"
    )
    file = tmp_path / "made" / "proofs.json"
    command = [sys.executable, "-m", "pytest", "-n", "1", "--proofs", str(file), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout
    written = json.loads(file.read_text(encoding="utf-8"))
    found = {(proof["word"], *sorted(proof["towers"])) for proof in written["proofs"]}
    assert found == {("parity", "image", "text"), ("bit-equal", "scale")} and len(written["proofs"]) == 2
    assert all("test_good[1]" in proof["test"] for proof in written["proofs"])
    assert [name.rpartition("::")[2] for name in written["failed"]] == ["test_bad"]
