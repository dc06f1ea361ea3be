"""transformers' own conversions, said by keymap: for every model that transformers converts and that can be built tiny.

Each test builds one class of transformers with random weights and asks `tools/transformers_rules.py` for its mapping.
keymap writes the model by that mapping, and transformers' `from_pretrained` reads the file: every tensor must be the
model's, no key missing, unexpected or of another shape, and transformers must have used the very converters that the
mapping says. So the file is proved by transformers, and not by keymap's own reading. Then keymap loads the same file
into a model with other weights, and the result must equal `from_pretrained`'s, bit for bit. Last, transformers saves
what it loaded: that is the file again, apart from the models of `SAVED_OTHERWISE`.

All classes are run; none is left out of the default run.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from peers import transformers_tiny as models
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion

import keymap

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("transformers_rules")
    check_mappings = importlib.import_module("check_mappings")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Entries of transformers' table that no model can be built for.
NOT_BUILT = {
    "legacy": "renamings for all models, of names that transformers wrote before 5; not of a model",
    "MtpModel": "transformers builds it inside generation; it is no class that a user can import",
    "PPChart2TableModel": "transformers 5.23 has no class of this name",
    "xCLIPTextModel": "transformers 5.23 has no class of this name; XCLIPTextModel is not in the table",
    "xCLIPVisionModel": "transformers 5.23 has no class of this name; XCLIPVisionModel is not in the table",
}
# Converters of the table that no parameter of any model needs.
NOT_NEEDED = {
    "inkling2_text": "mlp.experts.w13_weight_scale: the scales of quantised experts",
}
# Models of which transformers saves another file than it has read.
SAVED_OTHERWISE = {
    "DeepseekV4ForCausalLM": "embed.weight comes back as model.embed_tokens.weight: its pattern is anchored",
    "Kimi_K25ForConditionalGeneration": "layers of the text model come back as blocks: the pattern is for the images",
    "Molmo2ForConditionalGeneration": "the two tables of the embedding come back as halves; they are of unequal length",
    "Molmo2TextModel": "as Molmo2ForConditionalGeneration",
    "PixioBackbone": "two norms change places: the prefix of the base model is added to one and taken from the other",
    "Qwen2VLModel": "model. is not put back before the text model",
    "Qwen2_5_VLModel": "as Qwen2VLModel",
    "Qwen3VLMoeForConditionalGeneration": "experts are not transposed back: the operation compares shapes",
    "Sam3TrackerModel": "tracker_model. is put before detector_model., too",
    "Sam3TrackerVideoModel": "as Sam3TrackerModel",
}
# Models with a load_state_dict of their own, which keymap refuses: the converted state dict is given to it.
OWN_LOADING = {"TimmWrapperForImageClassification"}


def classes() -> list[str]:
    """The classes of all families, and those with another configuration."""
    found = dict.fromkeys(tool.class_of(family) for family in tool.families() if family not in NOT_BUILT)
    return [*found, *(f"{name} {variant}" for name, more in models.VARIANTS.items() for variant in more)]


def made(case: str):
    name, _, variant = case.partition(" ")
    return models.tiny(name, variant)


_RULES: dict[str, tool.Rules] = {}


def rules(case: str, model=None) -> tool.Rules:
    """The rules for a class, made once."""
    if case not in _RULES:
        _RULES[case] = tool.rules_of(model or made(case))
    return _RULES[case]


def written(case: str, folder: Path, model=None) -> Path:
    path = folder / f"{rules(case, model).name}.yaml"
    path.write_text(rules(case).text, encoding="utf-8")
    return path


def identity(converter) -> tuple:
    operations = [(type(one).__name__, sorted(vars(one).items(), key=str)) for one in converter.operations]
    return tuple(converter._original_source_patterns), tuple(converter._original_target_patterns), str(operations)


def folder_of(model, tensors, folder: Path) -> Path:
    """A folder that from_pretrained reads."""
    folder.mkdir()
    values = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return folder


def from_pretrained(model, folder: Path):
    """The model that transformers reads, which must have used every key."""
    kind = type(model)
    if kind.__name__ == "JevForDecision":  # its from_pretrained cannot return the loading info
        return kind.from_pretrained(folder, config=model.config)
    theirs, info = kind.from_pretrained(folder, config=model.config, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    return theirs


def different(one, other) -> list[str]:
    """The keys that only one of them has, or that differ in a bit, in shape or in dtype."""
    lone = sorted(set(one) ^ set(other))
    both = (key for key in one if key in other)
    return lone + [key for key in both if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])]


def in_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@torch.no_grad()
@pytest.mark.parametrize("case", classes())
def test_a_mapping_says_what_transformers_does(case, tmp_path):
    model = made(case)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    mapping = written(case, tmp_path, model)
    file = keymap.convert_state_dict(wanted, to=str(mapping))
    folder = folder_of(model, file, tmp_path / "file")

    theirs = from_pretrained(model, folder)
    assert different(theirs.state_dict(), wanted) == []
    used = {identity(one) for one in theirs._weight_conversions if isinstance(one, WeightConverter)}
    assert used == {identity(one) for one in rules(case).said}
    assert rules(case).refused == () and rules(case).lost == ()

    models.randomised(model)
    assert different(model.state_dict(), wanted) != []
    if case in OWN_LOADING:
        with pytest.raises(keymap.PlanError, match="its own load_state_dict"):
            keymap.load_checkpoint(model, folder / "model.safetensors", mapping=str(mapping))
    else:
        keymap.load_checkpoint(model, folder / "model.safetensors", mapping=str(mapping))
        assert different(model.state_dict(), theirs.state_dict()) == []

    theirs.save_pretrained(tmp_path / "saved")
    assert (different(in_folder(tmp_path / "saved"), file) != []) == (case in SAVED_OTHERWISE)


# --- how much of the table that is ---


def said_by_family() -> tuple[int, list[tuple[str, tuple[str, ...]]]]:
    """How many converters of the table its own family's mappings say, and those that none says."""
    said: dict[str, set] = {}
    for case in classes():
        said.setdefault(case.partition(" ")[0], set()).update(identity(one) for one in rules(case).said)
    count, left = 0, []
    for family, conversions in tool.families().items():
        for one in (one for one in conversions if isinstance(one, WeightConverter)):
            if family not in NOT_BUILT and identity(one) in said[tool.class_of(family)]:
                count += 1
            else:
                left.append((family, tuple(one.source_patterns)))
    return count, left


def test_the_families_that_no_model_can_be_built_for_are_known():
    def built(family: str) -> bool:
        try:
            return bool(tool.class_of(family))
        except LookupError:
            return False

    assert {family for family in tool.families() if not built(family)} == set(NOT_BUILT)
    assert (len(tool.families()), len(NOT_BUILT)) == (251, 5)


def test_all_converters_but_one_are_said_in_both_directions():
    count, left = said_by_family()
    assert count == 170
    assert left == [("inkling2_text", (r"mlp\.experts\.w13_weight_scale",))]
    assert [family for family, _ in left] == list(NOT_NEEDED)


def test_the_page_has_these_figures():
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert f"{len(classes())} models" in text
    assert "170 of 171 converters" in text
    assert f"{len(SAVED_OTHERWISE)} of them" in text
    assert f"{len(tool.families()) - len(NOT_BUILT)} of {len(tool.families())} families" in text


# --- issues of transformers that the mappings do not have ---


def test_issue_43355_a_name_with_two_groups_goes_both_ways(tmp_path):
    """transformers fills one group of a name; the second stays in the key as backslash 2."""
    renaming = WeightRenaming(r"h\.(\d+)\.(fc1|fc2)\.", r"layers.\1.mlp.\2.")
    assert renaming.rename_source_key("h.3.fc1.weight")[0] == r"layers.3.mlp.\2.weight"
    text = "format: two\nhub: any\ntitle: two groups\ntowers:\n  model:\n"
    path = tmp_path / "two.yaml"
    path.write_text(text + r"    h.(\d+).(fc1|fc2).weight: layers.\1.mlp.\2.weight", encoding="utf-8")
    model = {"layers.0.mlp.fc1.weight": torch.rand(2, 3), "layers.0.mlp.fc2.weight": torch.rand(3, 2)}
    assert list(keymap.convert_state_dict(model, to=str(path))) == ["h.0.fc1.weight", "h.0.fc2.weight"]


def test_issue_46265_the_name_of_a_scale_is_not_the_name_of_a_weight(tmp_path):
    """Fixed in transformers: the rule of gate_up_proj once matched gate_up_proj_scale_inv."""
    model = made("MixtralForCausalLM").state_dict()
    scale = "model.layers.0.mlp.experts.gate_up_proj_scale_inv"
    file = keymap.convert_state_dict(model | {scale: torch.rand(2)}, to=str(written("MixtralForCausalLM", tmp_path)))
    assert scale in file
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in file


def test_issue_46650_a_state_dict_that_has_the_names_of_the_file_stays_as_it_is(tmp_path):
    """transformers puts encoder. before names that have it already."""
    model = made("NomicBertModel")
    mapping = str(written("NomicBertModel", tmp_path))
    file = keymap.convert_state_dict(model.state_dict(), to=mapping)
    assert "encoder.layers.0.attn.Wqkv.weight" in file
    theirs = revert_weight_conversion(model, dict(file))
    assert "encoder.encoder.layers.0.attn.Wqkv.weight" in theirs
    assert different(keymap.convert_state_dict(file, to=mapping), file) == []


# --- the check can fail ---

WRONG = {  # a class, text of its mapping, and what is written instead
    "gate and up exchanged": ("MixtralForCausalLM", "w(1|3).weight", "w(3|1).weight"),
    "another axis": ("MixtralForCausalLM", "concat: 0", "concat: 1"),
    "no transpose": ("Qwen3VLMoeForConditionalGeneration", "view: a b c -> a c b", "view: a b c -> a b c"),
    "no interleave": ("InklingForConditionalGeneration", "a (n two) c -> a (two n) c", "a (n two) c -> a (n two) c"),
    "no rope": ("Kimi_K25ForConditionalGeneration", "(h k two) b -> (h two k) b", "(h k two) b -> (h k two) b"),
    "other heads": ("Kimi_K25ForConditionalGeneration", "sizes: {h: 4, two: 2}", "sizes: {h: 2, two: 2}"),
    "another name": ("ViTModel", "attention.attention.query.", "attention.attention.other."),
    "text and vision experts exchanged": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "mlp.(text|vision)_moe.gate.moe_statics",
        "mlp.(vision|text)_moe.gate.moe_statics",
    ),
    "experts shared otherwise": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        r"(\d+>=6).down_proj.weight",
        r"(\d+>=7).down_proj.weight",
    ),
    "another order of the layers": (
        "Inkling2ForCausalLM",
        r"attn_queries.(\d+): model.layers.<1+1>.",
        r"attn_queries.(\d+): model.layers.<1+2>.",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_seen(name, tmp_path):
    case, right, wrong = WRONG[name]
    model = made(case)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    mapping = written(case, tmp_path)
    file = keymap.convert_state_dict(wanted, to=str(mapping))
    save_file({key: value.contiguous().clone() for key, value in file.items()}, tmp_path / "file.safetensors")
    assert right in rules(case).text
    mapping.write_text(rules(case).text.replace(right, wrong), encoding="utf-8")
    models.randomised(model)
    try:
        keymap.load_checkpoint(model, tmp_path / "file.safetensors", mapping=str(mapping))
    except keymap.KeymapError:
        return
    assert different(model.state_dict(), wanted) != []


# --- the command ---


def test_the_command_prints_a_mapping(capsys):
    assert tool.main(["mixtral"]) == 0
    text = capsys.readouterr().out
    assert "format: mixtralforcausallm" in text
    assert "block_sparse_moe.experts.(\\d+).w(1|3).weight" in text


def test_the_command_takes_a_configuration(tmp_path, capsys):
    model = made("Kimi_K25ForConditionalGeneration")
    model.config.save_pretrained(tmp_path)
    assert tool.main(["kimi_k25", "--config", str(tmp_path)]) == 0
    assert "sizes: {h: 4, two: 2}" in capsys.readouterr().out


def test_the_command_counts_and_writes_files(tmp_path, capsys):
    assert tool.main(["mixtral", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["mixtral"] == {
        "class": "MixtralForCausalLM",
        "said": 2,
        "refused": 0,
        "unused": 0,
        "lost": 0,
    }
    assert check_mappings.main([str(tmp_path / "mixtralforcausallm.yaml")]) == 0


def test_the_command_says_what_it_cannot_build(capsys):
    assert tool.main(["xCLIPTextModel"]) == 1
    assert "xCLIPTextModel is neither a class nor a model_type" in capsys.readouterr().err


def test_what_cannot_be_said_is_a_comment():
    class Unknown:
        reverse_op = None

    model = made("MixtralForCausalLM")
    use = tool.conversions(model).uses
    converter = next(one.converter for one in use if one.converter is not None)
    converter.operations = [Unknown()]
    with pytest.raises(tool.CannotSayError, match="keymap has no rule for Unknown"):
        tool.lines(next(one for one in use if one.converter is converter), model)
