"""Print the conversions of the installed transformers as mappings of keymap.

    python tools/transformers_rules.py                      a line for each family: what can be said
    python tools/transformers_rules.py mixtral              the mapping of one family, or of one class of a model
    python tools/transformers_rules.py mixtral --config P   of the model with this config.json (or in this folder)
    python tools/transformers_rules.py --out FOLDER         a file for each family
    python tools/transformers_rules.py --json               the counts, as one JSON document

Of the converters of a family's model, `said` counts those that the mapping says in both directions, `refused` those
that it cannot say, `unused` those that no name of this model needs; `lost` counts names of the model that no name of a
file becomes. Some models cannot be built from their default configuration: pass --config.

A family is an entry of the tables in `transformers/conversion_mapping.py`: a `model_type`, or the class of a model. The
tool builds the family's model without memory for weights (on the meta device), finds the names of the file that
transformers turns into the model's names, and writes one rule for each. Every name that it writes has gone through
transformers' own code. Layers are groups, so the rules are right for any number of layers; numbers of heads are those
of the configuration. What cannot be said is a comment: `# cannot be said: CONVERTER: WHY`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers_forms import PART, Choice, Form, Index, forms, joined
from transformers_names import MEMBER, conversions
from transformers_operations import CannotSayError, lines

__all__ = ["Rules", "class_of", "families", "main", "model_of", "rules_of"]


class Rules(NamedTuple):
    """What can be said of one model.

    Attributes:
        name: of the format.
        text: the mapping file.
        said: the converters that it says in both directions.
        refused: those that it does not say, with the reason.
        unused: those that no name of this model needs.
        lost: names of the model that no name of a file becomes.
    """

    name: str
    text: str
    said: tuple[Any, ...]
    refused: tuple[tuple[Any, str], ...]
    unused: tuple[Any, ...]
    lost: tuple[str, ...]


# --- families and their models ---


# The class of a model that has the family in it, where the family is no class that can be built by itself.
_HOSTS = {
    "MaskFormerDetrDecoder": "MaskFormerForInstanceSegmentation",
    "UnlimitedOcrSamVisionEncoder": "UnlimitedOcrForConditionalGeneration",
    "UnlimitedOcrVisionEncoder": "UnlimitedOcrForConditionalGeneration",
    "dots3_note_audio_encoder": "Dots3NoteForConditionalGeneration",
    "dots3_note_vision_encoder": "Dots3NoteForConditionalGeneration",
    "step3p5_vision": "Step3p7ForConditionalGeneration",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "mlcd_vision": "MLCDVisionModel",
    "t5gemma2_encoder": "T5Gemma2ForConditionalGeneration",
}
_HEADS = ("ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "ForObjectDetection", "ForPreTraining", "For")


def families() -> dict[str, list[Any]]:
    """The entries of transformers' table, by name, with their renamings and converters."""
    table: dict[str, list[Any]] = _build_checkpoint_conversion_mapping()
    return table


@cache
def _exported() -> frozenset[str]:
    """The names of transformers; to ask for one with hasattr would import its module."""
    return frozenset(dir(transformers))


@cache
def _auto() -> tuple[Mapping[str, str | tuple[str, ...]], ...]:
    """transformers' tables from a model_type to classes, one for each task."""
    names = (name for name in dir(modeling_auto) if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES"))
    return tuple(getattr(modeling_auto, name) for name in names)


def _listed(names: str | tuple[str, ...]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def class_of(family: str) -> str:
    """The class of the model that shows a family's names; the family itself where it is a class."""
    if family in _HOSTS:
        return _HOSTS[family]
    if family in _exported():
        return family
    known = [name for table in _auto() for name in _listed(table.get(family, ()))]
    if not known:
        raise LookupError(f"{family} is neither a class nor a model_type that transformers can build")
    return min(known, key=lambda name: next((n for n, head in enumerate(_HEADS) if head in name), len(_HEADS)))


def model_of(name: str, config: Any = None) -> Any:
    """A model of this class without memory for its weights; ``config`` instead of the class's own default."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(config if config is not None else kind.config_class())


# --- the mapping of one model ---


def rules_of(model: Any, name: str = "") -> Rules:
    """The mapping from the names of a file to the names of this model.

    Args:
        model: a model of transformers; its weights are not read.
        name: of the format; the class of the model if left out.
    """
    name = name or type(model).__name__.lower()
    ties = _ties(model)
    found = conversions(model, frozenset(tied for names in ties.values() for tied in names))
    said, refused = [], {}
    for use in found.uses:
        try:
            said += lines(use, model)
        except CannotSayError as error:
            refused[id(use.converter)] = (use.converter, str(error))
    made = joined(forms(said, ties))
    converters = {id(line.converter): line.converter for line in said if line.converter is not None}
    used = {id(use.converter) for use in found.uses}
    unused = tuple(one for one in found.converters if id(one) not in used)
    text = "".join(f"{line}\n" for line in _written(name, type(model).__name__, made, refused.values(), found.lost))
    return Rules(name, text, tuple(converters.values()), tuple(refused.values()), unused, tuple(found.lost))


def _ties(model: Any) -> dict[str, tuple[str, ...]]:
    """By the name that a file holds, the names of the same tensor that it does not hold."""
    found: dict[str, tuple[str, ...]] = {}
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        found[source] = (*found.get(source, ()), tied)
    return found


def _written(name: str, title: str, made: Sequence[Form], refused: Any, lost: Mapping[str, str]) -> Iterator[str]:
    """The lines of a mapping file."""
    yield f"# written by tools/transformers_rules.py of transformers {transformers.__version__}"
    yield f"format: {name}"
    yield "hub: any"
    yield f"title: files of transformers' {title}"
    yield f"reference: transformers {transformers.__version__}, conversion_mapping.py"
    for converter, why in refused:
        sides = [", ".join(side) for side in (converter.source_patterns, converter.target_patterns)]
        yield f"# cannot be said: {' -> '.join(sides)}: {why}"
    for key in lost:
        yield f"# cannot be said: {key}: {lost[key]}"
    steps = [_rule(form) for form in made if form.step]
    if steps:
        yield "steps:"
        yield from (f"{'  - ' if not n else '    '}{rule}" for n, rule in enumerate(steps))
    yield "towers:"
    yield "  model:"
    yield from (f"    {_rule(form)}" for form in made if not form.step)
    yield "    (.+): {to: \\1, rest: true}"


def _rule(form: Form) -> str:
    """One rule as a line of YAML."""
    numbers: dict[Any, int] = {}
    file = ".".join(_file(segment, form, numbers) for segment in form.file)
    model = ".".join(_model(segment, form, numbers) for segment in form.model)
    options = dict(form.options) | ({"optional": "true"} if form.optional and not form.step else {})
    if not options and not form.also:
        return f"{file}: {_quoted(model)}"
    to = _quoted(model) if not form.also else f"[{', '.join(_quoted(one) for one in (model, *form.also))}]"
    written = [f"to: {to}", *(f"{key}: {_value(value)}" for key, value in options.items())]
    return f"{file}: {{{', '.join(written)}}}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return "{" + ", ".join(f"{key}: {one}" for key, one in value) + "}"
        return "[" + ", ".join("'*'" if one == "*" else str(one) for one in value) + "]"
    return str(value)


def _quoted(text: str) -> str:
    return f"'{text}'" if set(text) & set("[]{},#") else text


def _file(segment: Any, form: Form, numbers: dict[Any, int]) -> str:
    """A segment of the file's side; ``numbers`` learns which group it is."""
    if isinstance(segment, str):
        for char in segment:
            if char in (PART, MEMBER):
                numbers[char] = len(numbers) + 1
        return segment.replace(PART, f"({'|'.join(form.parts[0])})").replace(MEMBER, _range(form.members or (0, None)))
    numbers[segment] = len(numbers) + 1
    if isinstance(segment, Index):
        limits = dict(form.limits).get(segment.number, ())
        return _limited(limits) if limits else r"(\d+)"
    return f"({'|'.join(segment.words)})" if isinstance(segment, Choice) else "(.+)"


def _range(members: tuple[int, int | None]) -> str:
    first, last = members
    low, high = f">={first}" if first else "", f"<{last}" if last is not None else ""
    return rf"(\d+{low}{high})"


def _limited(limits: Sequence[int]) -> str:
    """A group for these numbers: a range, or all of them."""
    if list(limits) == list(range(limits[0], limits[-1] + 1)) and len(limits) > 1:
        return _range((limits[0], limits[-1] + 1))
    return f"({'|'.join(map(str, limits))})"


def _model(segment: Any, form: Form, numbers: Mapping[Any, int]) -> str:
    """A segment of the model's side."""
    if isinstance(segment, str):
        return segment.replace(PART, f"({'|'.join(form.parts[1])})")
    if isinstance(segment, Index) and segment.shift:
        return f"<{numbers[Index(segment.number)]}{segment.shift:+d}>"
    return f"\\{numbers[segment]}"


# --- the command ---


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print transformers' conversions as mappings of keymap.")
    parser.add_argument("family", nargs="?", help="a model_type or a class; all of them if left out")
    parser.add_argument("--config", help="a config.json, or its folder")
    parser.add_argument("--out", help="write a file for each family into this folder")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    asked = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(asked.config) if asked.config else None
    if asked.family is not None and not asked.out and not asked.json:
        try:
            print(rules_of(model_of(class_of(asked.family), config)).text, end="")
        except Exception as error:
            print(f"{asked.family} cannot be built: {_short(error)}", file=sys.stderr)
            return 1
        return 0
    return _all([asked.family] if asked.family is not None else list(families()), config, asked.out, asked.json)


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _all(names: Sequence[str], config: Any, out: str | None, as_json: bool) -> int:
    """Count what is said of families, and write their mappings where that is asked for."""
    counts: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            model = model_of(class_of(name), config)
        except Exception as error:
            counts[name] = {"not built": _short(error)}
            continue
        made = rules_of(model)
        counts[name] = {"class": type(model).__name__} | {
            word: len(getattr(made, word)) for word in ("said", "refused", "unused", "lost")
        }
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / f"{made.name}.yaml").write_text(made.text, encoding="utf-8")
    if as_json:
        print(json.dumps(counts, indent=2))
        return 0
    for name, row in counts.items():
        print(f"{name}: {', '.join(f'{word} {value}' for word, value in row.items())}")
    built = [row for row in counts.values() if "class" in row]
    sums = ", ".join(f"{word} {sum(row[word] for row in built)}" for word in ("said", "refused", "unused", "lost"))
    print(f"{len(built)} of {len(counts)} families built: {sums}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
