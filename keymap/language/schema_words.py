"""Errors of the JSON schema in plain words: what is wrong with a field, and what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from keymap.language.yaml_marks import Marked, Path

__all__ = ["OLD_KINDS", "SchemaFault", "as_yaml", "did_you_mean", "in_words"]

_MAX_NAMES = 100  # unknown fields of one place that are listed
_MAX_SHOWN = 60  # characters of a value in a message
_MAX_ABOUT = 120  # characters of a description in a message

OLD_KINDS = {"respelling": "bridge"}
_OLD_FIELDS = {  # each with what it is called today
    "groups": "towers",
    "accepts": "aliases",
    "drop": "ignore",
    "speaks": "layouts",
    "spellings": "layouts",
    "states": "fixed",
    "nowhere": "unsupported",
}
_OTHER_WORDS = {  # names that other libraries use for a field
    "transpose": "view: out in -> in out",
    "permute": "view: a b c -> c a b",
    "reshape": "view: a b -> (a b)",
    "rearrange": "view: a b -> (a b)",
    "cat": "concat: 0",
    "chunk": "split: [1, 1]",
    "slice": "take: [0, 10]",
    "target": "to: the target key",
    "rename": "to: the target key",
    "mul": "times: 2.0",
    "reason": "why: the reason",
    "because": "why: the reason",
    "required": "optional: true for a key that may be absent",
    "dtype": "dtypes: {pattern: float16} at the top level",
    "not": "none: [pattern]",
    "and": "all: [pattern]",
    "or": "any: [pattern]",
    "rules": "towers: {image: {source key: target key}}",
    "mapping": "towers: {image: {source key: target key}}",
    "name": "format: the name of the file without .yaml",
    "description": "title: one line that says which files these are",
    "source": "reference: where the names were read",
    "include": "uses: [file without .yaml]",
    "imports": "uses: [file without .yaml]",
}
_NO_WORDS = {  # operations that no rule has, and what to do
    "weight_norm": "keymap computes such weights when it reads a file: list the ends of the keys under `weight_norms:` "
    "of a file of kind: containers, and write the rule for the weight",
    **dict.fromkeys(
        ("dequantize", "dequantise", "quantization", "scales"),
        "quantised weights are not computed: leave it out, and convert the original checkpoint",
    ),
    **dict.fromkeys(
        ("tensor_parallel", "ranks", "shard"),
        "a rule reads whole tensors: leave it out, and join the parts of a tensor-parallel checkpoint first",
    ),
    **dict.fromkeys(
        ("divide", "mul_by", "matmul", "clamp", "exp", "log", "mean"),
        "the only arithmetic is times, plus and add: leave it out",
    ),
}
_NO_SPACE = r"([^\s:]+):(\S.*)"  # a name and a value, without a space after the colon
_OTHER_VALUES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_NAME_FORM = "small letters, digits and _, and a letter first"
_VIEW_FORM = "the axes before and after ->"
_AMOUNT_FORM = "a number, a fact such as text.heads or text.heads * 2, or '*'"
_FORMS = {  # what a text of a field with a pattern holds
    "format": _NAME_FORM,
    "uses": _NAME_FORM,
    "unstack": _NAME_FORM,
    "view": _VIEW_FORM,
    "then": _VIEW_FORM,
    "each": _VIEW_FORM,
    "take": "a number, a fact such as text.vocab, or null",
    "parts": _AMOUNT_FORM,
    "split": _AMOUNT_FORM,
    "times": "a number, sqrt and the number of an axis or a fact, or 1/sqrt",
    "file": "a file name without a folder",
}
_KINDS = {  # a Python type of YAML data -> the schema's name of it
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_WORDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "array": "a list",
    "object": "fields",
}


class SchemaFault(NamedTuple):
    """One fault of a file against the schema.

    Attributes:
        path: of the field to leave out; empty for the whole file.
        text: the message with its place.
        of_name: the name is wrong, so that other faults below the path follow from it.
    """

    path: Path
    text: str
    of_name: bool = False


def as_yaml(value: Any) -> str:
    """A value as it would be written in a mapping file, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(k)}: {as_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, str):
        plain = value and not re.search(r"^[\s\[\]{}*&!|>'\"%@`,?#-]|[\[\]{},]|: | #|\s$|:$|^(true|false|null)$", value)
        return value if plain else "'" + value.replace("'", "''") + "'"
    return json.dumps(value)


def did_you_mean(name: str, known: Iterable[str], what: str = "known", most: int = 24) -> str:
    """``; did you mean 'x'?``, or the list of known names where none is near."""
    names = list(known)
    near = get_close_matches(name[:80], names, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"; {what}: {listed}" if listed else ""


def in_words(
    marked: Marked, error: Any, root: Mapping[str, Any], outer: Mapping[str, Any] | None = None
) -> Iterator[SchemaFault]:
    """The faults behind one error of jsonschema.

    Args:
        marked: the file, for the places.
        error: a ``jsonschema.ValidationError``.
        root: the whole schema, to resolve references in.
        outer: the schema of which the error's is one form, for examples.
    """
    path = tuple(error.absolute_path)
    if error.validator in ("anyOf", "oneOf"):
        yield from _of_branches(marked, error, root, outer)
    elif error.validator == "additionalProperties" and isinstance(error.instance, dict):
        yield from _unknown_fields(marked, error, root)
    elif "propertyNames" in error.absolute_schema_path:
        name = (*path, error.instance)
        yield SchemaFault(name, f"{marked.at(name)}: {_wrong_name(error, path)}", of_name=True)
    elif error.instance is None and path and re.fullmatch(_NO_SPACE, str(path[-1])):
        yield SchemaFault(path, f"{marked.at(path[:-1])}: {_no_space(marked.data, path[:-1])}")
    else:
        schema = {**(outer or {}), **_resolved(error.schema, root)}
        text = _missing(error, root) if error.validator == "required" else _wrong_value(error, path, schema, root)
        if text:
            yield SchemaFault(path, f"{marked.at(path)}: {text}")


# --- fields ---


def _unknown_fields(marked: Marked, error: Any, root: Mapping[str, Any]) -> Iterator[SchemaFault]:
    path = tuple(error.absolute_path)
    known = error.schema.get("properties", {})
    names = (name for name in error.instance if name not in known)
    for name in islice(names, _MAX_NAMES):
        at = (*path, name)
        text = _unknown_field(name, list(known), path, root)
        if "->" in name and error.instance[name] is None:  # view: a, b -> b a
            text = "a comma ends a value within { }: write the axes of a view with spaces, for example out in -> in out"
        yield SchemaFault(at, f"{marked.at(at)}: {text}", of_name=True)


def _unknown_field(name: str, known: list[str], path: Path, root: Mapping[str, Any]) -> str:
    today = _OLD_FIELDS.get(name, "")
    if re.fullmatch(_NO_SPACE, name) and name.partition(":")[0] in known:
        return _with_colon(name)
    if name in _towers(root) and "between" in known:
        today = f"between: {{{name}: [...]}}"
    if today and today.partition(":")[0] in known:
        return f"{name!r} is now called {today!r}"
    shown = name[:80]
    if name in _NO_WORDS and "to" in known:
        return f"there is no field {shown!r} here: {_NO_WORDS[name]}"
    elsewhere = "" if path else _belongs_elsewhere(name, known, root)
    if elsewhere:
        return elsewhere
    if name in _OTHER_WORDS and _OTHER_WORDS[name].partition(":")[0] in [*known, "dtypes"]:
        return f"there is no field {shown!r} here; write `{_OTHER_WORDS[name]}`"
    near = get_close_matches(name[:40], known, 1)
    if near:
        return f"there is no field {shown!r} here; did you mean {near[0]!r}?"
    return f"there is no field {shown!r} here; known: {', '.join(known)}"


def _belongs_elsewhere(name: str, known: list[str], root: Mapping[str, Any]) -> str:
    """A field of another place, at the top level of a file; empty for a name that is no field."""
    kinds = [kind for kind, branch in root["$defs"]["kinds"]["$defs"].items() if name in branch["properties"]]
    if name in _towers(root) and "towers" in known:
        return f"{name!r} is a tower: write it under `towers:`, indented by two spaces"
    if name in root["$defs"]["config"]["properties"] and "config" in known:
        return f"{name!r} belongs under `config:` in this kind of file" + (
            f" (at the top level it belongs to kind: {' or '.join(kinds)})" if kinds else ""
        )
    if kinds:
        return f"{name!r} belongs to kind: {' or '.join(kinds)}; remove it, or say `kind: {kinds[0]}`"
    if name in _rule_fields(root):
        return f"{name!r} belongs to a rule: write source key: {{to: target key, {name}: ...}} under `towers:`"
    return ""


def _towers(root: Mapping[str, Any]) -> Sequence[str]:
    """The towers of the file's hub; none if the hub is not known."""
    towers: Sequence[str] = root["$defs"]["tower"].get("enum", ())
    return towers


def _rule_fields(root: Mapping[str, Any]) -> Iterable[str]:
    fields: Iterable[str] = root["$defs"]["rule"]["anyOf"][1]["properties"]
    return fields


def _missing(error: Any, root: Mapping[str, Any]) -> str:
    """Of a required field; empty where it is there under its old name, which is a fault already."""
    name = next((name for name in error.validator_value if f"'{name}'" in error.message), "")
    towers = _towers(root)
    if any(_OLD_FIELDS.get(key) == name or (name == "between" and key in towers) for key in error.instance):
        return ""
    if any(_OTHER_WORDS.get(key, "").startswith(f"{name}:") for key in error.instance):
        return ""  # it is there under another library's name, which is a fault already
    if any(str(key).startswith(f"{name}:") for key in error.instance):
        return ""  # it is there without a space after its colon, which is a fault already
    near = get_close_matches(name, [key for key in error.instance if isinstance(key, str)], 1, 0.75)
    if near and near[0] not in error.schema.get("properties", {}):
        return ""  # it is there and misspelt, which is a fault already
    schema = _resolved(error.schema.get("properties", {}).get(name, {}), root)
    examples = schema.get("examples", ())
    line = f"`{name}: {as_yaml(examples[0])}`" if examples else f"`{name}: ...`"
    return f"{name} is missing: add it, for example {line}{_about(schema)}"


def _wrong_name(error: Any, path: Path) -> str:
    """Of a key that is not allowed as a name."""
    name, field = error.instance, _field(path)
    if error.validator == "enum" and field in ("towers", "unsupported") and re.search(r"[.(]", str(name)):
        return f"{field}: write {str(name)[:80]} under a tower, for example `{error.validator_value[0]}:`"
    if error.validator == "enum":
        what = "tower" if field in ("towers", "unsupported", "sections") else f"name in {field}"
        return f"{str(name)[:80]!r} is not a {what}{did_you_mean(str(name), error.validator_value, 'write one of')}"
    if error.validator == "maxLength":
        return f"a pattern of {len(name)} characters; the limit is {error.validator_value}"
    if error.validator == "minLength":
        return "an empty key: write the pattern of a source key"
    return f"{str(name)[:80]!r} cannot be a name in {field}: write letters, digits and _, and a letter first"


def _no_space(data: Any, path: Path) -> str:
    """Of fields in { } of which some have no space after the colon."""
    for step in path:
        data = data[step]
    pairs = [re.fullmatch(_NO_SPACE, key) if value is None else None for key, value in data.items()]
    shown = ", ".join(f"{pair[1]}: {pair[2]}" for pair in pairs if pair)
    return f"{_field(path)}: write a space after the colon: {{{_cut(shown)}}}"


def _with_colon(text: str) -> str:
    """What to write for a name and a value that no colon and space separate."""
    found = re.fullmatch(_NO_SPACE, text)
    if found is not None:
        return f"write a space after the colon: `{found[1]}: {_cut(found[2])}`"
    found = re.fullmatch(r"([^\s:]+)(?:\s*(?:->|=>|=)\s*|\s+)(\S+)", text)
    return f"write `{found[1]}: {_cut(found[2])}`" if found is not None else "write `name: value`"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + " ..."


# --- values ---


def _wrong_value(error: Any, path: Path, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Of a value of the wrong type, size or form."""
    value, limit = error.instance, error.validator_value
    name, shown = _field(path), _shown(error.instance)
    if error.validator == "type":
        return _wrong_type(error, name, schema, root)
    if error.validator == "enum":
        choices = [as_yaml(choice) for choice in limit]
        if str(value) in _OTHER_VALUES and _OTHER_VALUES[str(value)] in choices:
            return f"{name}: {shown} is not known; did you mean {_OTHER_VALUES[str(value)]!r}?"
        return f"{name}: {shown} is not known{did_you_mean(str(value), choices, 'write one of')}"
    if error.validator == "const":
        return f"{name}: {shown} is not allowed; write {as_yaml(limit)}{_about(schema)}"
    if error.validator in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        side = "less than the least" if "inimum" in error.validator else "more than the largest"
        return f"{name}: {shown} is {side} value, {limit}{_about(schema)}"
    if error.validator in ("minItems", "minLength", "minProperties"):
        return _too_short(error, name, schema, root)
    if error.validator in ("maxItems", "maxProperties"):
        return f"{name}: {_entries(len(value))}, the limit is {limit}{_example(schema)}"
    if error.validator == "maxLength":
        return f"{name}: a text of {len(value)} characters; the limit is {limit}"
    if error.validator == "pattern":
        form = _FORMS.get(name, "")
        return f"{name}: {shown} has the wrong form; write {form or 'another value'}{_example(schema)}{_about(schema)}"
    return f"{name}: {error.message[:200]}{_about(schema)}"


def _too_short(error: Any, name: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Of a list, text or set of fields with too few entries."""
    value, limit = error.instance, error.validator_value
    if not value:
        return f"{name} is empty; write {_wanted(schema, None, root)}{_about(schema)}"
    if len(value) == 1 and isinstance(value, list) and isinstance(next(iter(schema.get("examples", ())), 0), str):
        return f"{name}: a list of one entry; write {as_yaml(value[0])} without [ ]"
    return f"{name}: {_entries(len(value))}, at least {limit} are needed; write {_wanted(schema, None, root)}"


def _wrong_type(error: Any, name: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Of a value of the wrong type."""
    value = error.instance
    if isinstance(value, str) and schema.get("type") == "object" and re.search(r"\s|:\S", value):
        return f"{name}: {_shown(value)} has no colon followed by a space: {_with_colon(value)}"
    if isinstance(value, str) and schema.get("type") == "array" and re.match(r"-\S", value):
        return f"{name}: {_shown(value)} is a string; write a space after the - of an item"
    return f"{name}: {_is(value)}; write {_wanted(schema, value, root)}{_about(schema)}"


def _of_branches(
    marked: Marked, error: Any, root: Mapping[str, Any], outer: Mapping[str, Any] | None
) -> Iterator[SchemaFault]:
    """Of a value that may take several forms: what is wrong with the form that its type fits."""
    path, branches = tuple(error.absolute_path), error.validator_value
    if all(set(branch) == {"required"} for branch in branches):
        fields = [branch["required"][0] for branch in branches]
        yield SchemaFault(path, f"{marked.at(path)}: write at least one of {', '.join(fields)}")
        return
    schema = {**(outer or {}), **_resolved(error.schema, root)}
    fitting = [i for i, branch in enumerate(branches) if _kind(error.instance) in _kinds(branch, root)]
    within = {i: [e for e in error.context if e.relative_schema_path[0] == i] for i in fitting}
    at_value = {i for i in fitting if all(_of_one_value(e, error) for e in within[i]) and within[i]}
    if within and not (at_value and len(branches) > 1 and set(fitting) <= at_value):
        deepest = max(
            fitting, key=lambda i: (max((len(e.absolute_path) for e in within[i]), default=0), -len(within[i]))
        )
        for inner in within[deepest]:
            same = inner.absolute_path == error.absolute_path
            yield from in_words(marked, inner, root, {"examples": schema.get("examples", ())} if same else None)
        return
    choices = [as_yaml(example) for example in schema.get("examples", ())[:2]]
    choices[:1] = [f"for example {choice}" for choice in choices[:1]]
    if isinstance(error.instance, list) and any("to" in branch.get("properties", {}) for branch in branches):
        choices = [f"{{to: {as_yaml(error.instance)}}} for several targets of one key"]
    choices = choices or [_wanted(_resolved(branch, root), error.instance, root) for branch in branches]
    text = f"{_field(path)}: {_is(error.instance)}; write {' or '.join(dict.fromkeys(choices))}{_about(schema)}"
    yield SchemaFault(path, f"{marked.at(path)}: {text}")


def _of_one_value(inner: Any, outer: Any) -> bool:
    """True for an error that names the one value which a form allows."""
    return bool(inner.validator == "const" and inner.absolute_path == outer.absolute_path)


def _resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with its references followed; keywords beside a reference come first."""
    found: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        schema = waiting.pop(0)
        if not isinstance(schema, Mapping):
            continue
        found = {**schema, **found}
        if "$ref" in schema:
            target: Any = root
            for step in schema["$ref"].removeprefix("#/").split("/"):
                target = target[step]
            waiting.append(target)
        waiting += [one for one in schema.get("allOf", ()) if "if" not in one]
    return found


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "string")


def _kinds(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows."""
    found = _resolved(schema, root)
    if "anyOf" in found:
        return set().union(*(_kinds(branch, root) for branch in found["anyOf"]))
    if "enum" in found or "const" in found:
        return {_kind(value) for value in found.get("enum", [found.get("const")])}
    listed = found.get("type", list(_WORDS))
    kinds = {listed} if isinstance(listed, str) else set(listed)
    return kinds | ({"integer"} if "number" in kinds else set())


def _wanted(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any]) -> str:
    """What to write for a schema: the value itself as a list, an example, or the words for its types."""
    listed = schema.get("type", "")
    kinds = [listed] if isinstance(listed, str) else list(listed)
    mended = _mended(schema, kinds, value, root) if value is not None else ""
    if mended:
        return mended
    if "anyOf" in schema and not schema.get("examples"):
        return " or ".join(dict.fromkeys(_wanted(_resolved(b, root), value, root) for b in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(as_yaml(choice) for choice in schema.get("enum", [schema.get("const")]))
    words = " or ".join(_WORDS.get(kind, kind) for kind in kinds if kind) or "another value"
    return words + (_example(schema, set(kinds)) if kinds != ["boolean"] else "")


def _mended(schema: Mapping[str, Any], kinds: list[str], value: Any, root: Mapping[str, Any]) -> str:
    """The value in the form that the schema asks for: in a list, or in quotes; empty where neither helps."""
    if kinds == ["array"] and schema.get("minItems", 0) < 2 and _kind(value) in _kinds(schema.get("items", {}), root):
        return f"[{as_yaml(value)}]" if len(str(value)) < _MAX_SHOWN else "a list, in [ ]"
    if kinds == ["string"] and _kind(value) in ("integer", "number", "boolean"):
        quoted = f"text, in quotes: '{as_yaml(value)}'"
        return f"{quoted}, or for example {as_yaml(schema['examples'][0])}" if schema.get("examples") else quoted
    return ""


def _example(schema: Mapping[str, Any], kinds: Iterable[str] = ()) -> str:
    """The first example, of one of these types if any is."""
    examples = schema.get("examples", ())
    fitting = [example for example in examples if _kind(example) in kinds] or examples
    return f", for example {as_yaml(fitting[0])}" if fitting else ""


def _about(schema: Mapping[str, Any]) -> str:
    """The first sentence of a schema's description, in brackets."""
    sentence = re.split(r"(?<=[^.]\.) ", schema.get("description", ""))[0]
    if len(sentence) > _MAX_ABOUT:
        sentence = re.split(r"[;:] ", sentence)[0]
    sentence = sentence.rstrip(".;:")
    return f" ({sentence[:1].lower() + sentence[1:]})" if sentence else ""


def _field(path: Path) -> str:
    """The name of the field that a path leads to; of a list's item that of the list."""
    name = next((step for step in reversed(path) if isinstance(step, str)), "the file")
    return _cut(name)


def _shown(value: Any) -> str:
    return _cut(repr(value) if isinstance(value, str) else as_yaml(value))


def _is(value: Any) -> str:
    """What a value is: ``7 is a number``."""
    if value is None:
        return "the value is missing (null)"
    words = {"object": "a set of fields", "integer": "a number"}
    kind = _kind(value)
    if kind == "boolean":
        return f"{_shown(value)} is not allowed"
    return f"{_shown(value)} is {words.get(kind, _WORDS[kind])}"


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"
