"""What the schema says of a mapping file: every fault in the schema's words, at the line it is about."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

from keymap.language.yaml_marks import Marked
from keymap.paths import schema_path

__all__ = ["known_right", "schema_faults"]

_MAX_FAULTS = 100  # that are looked for
_OLD_KINDS = {"respelling": "bridge"}
_OLD_FIELDS = {  # each with what it is called today
    "groups": "towers",
    "accepts": "aliases",
    "drop": "ignore",
    "speaks": "layouts",
    "spellings": "layouts",
    "states": "fixed",
    "nowhere": "unsupported",
    "image": "between: {image: [...]}",
    "text": "between: {text: [...]}",
}
_right: WeakValueDictionary[int, Marked] = WeakValueDictionary()


@lru_cache(maxsize=8)
def _validator(kind: str) -> Any:
    """The validator of a kind of mapping; of the whole schema, for a kind that there is not."""
    from jsonschema import Draft202012Validator

    schema = json.loads(schema_path().read_text(encoding="utf-8"))
    if kind in schema["$defs"]["kinds"]:
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/kinds/{kind}", "$defs": schema["$defs"]}
    return Draft202012Validator(schema)


def known_right(marked: Marked) -> None:
    """Take it from the caller that a file follows the schema."""
    _right[id(marked)] = marked


def schema_faults(marked: Marked) -> list[str]:
    """What is wrong with a file, in the order of its lines; a file that is right is not looked at again."""
    if _right.get(id(marked)) is marked:
        return []
    if not isinstance(marked.data, dict):
        return [f"{marked.file}:1:1: it holds no fields, as format: and groups:"]
    kind = marked.data.get("kind", "format")
    faults = []
    if kind in _OLD_KINDS:
        faults.append(f"{marked.at(('kind',))}: kind {kind!r} is now called {_OLD_KINDS[kind]!r}")
        kind = _OLD_KINDS[kind]
    errors = list(islice(_validator(kind if isinstance(kind, str) else "").iter_errors(marked.data), _MAX_FAULTS))
    errors.sort(key=lambda error: list(map(str, error.absolute_path)))
    faults += [fault for error in errors for fault in _told(marked, error)]
    if not faults:
        known_right(marked)
    return faults


def _lower(text: str) -> str:
    """A description within a sentence."""
    return (text[:1].lower() + text[1:]).rstrip(".")


def _told(marked: Marked, error: Any) -> list[str]:
    """The schema's words, at the line they are about, with the names that were probably meant."""
    from difflib import get_close_matches

    where = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        out = []
        for key in islice((key for key in error.instance if key not in known), _MAX_FAULTS):
            today = _OLD_FIELDS.get(key, "")
            if today.partition(":")[0] in known:
                out.append(f"{marked.at((*where, key))}: {key!r} is now called {today!r}")
                continue
            near = get_close_matches(key[:40], known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            out.append(f"{marked.at((*where, key))}: there is no field {key[:80]!r} here{hint}")
        return out
    if error.validator == "required":
        lacking = next((name for name in error.validator_value if f"'{name}'" in error.message), "")
        if any(_OLD_FIELDS[key].partition(":")[0] == lacking for key in error.instance if key in _OLD_FIELDS):
            return []  # it is there under its old name, which is a fault of its own
    if error.validator in ("anyOf", "oneOf") and error.context:
        branch = [e for e in error.context if e.validator not in ("type", "const")]
        if branch:
            best = max(branch, key=lambda e: len(e.absolute_path))
            return _told(marked, best)
        choices = [_lower(said) for e in error.context if (said := e.schema.get("description"))]
        about = _lower(error.schema.get("description", ""))
        told = f"{json.dumps(error.instance)[:80]} does not stand here{f' ({about})' if about else ''}"
        return [f"{marked.at(where)}: {told}{'; write ' if choices else ''}{' or '.join(choices)}"]
    if error.validator == "oneOf" and not error.context:
        fields = [name for branch in error.validator_value for name in branch.get("required", ())]
        return [f"{marked.at(where)}: give only one of {', '.join(fields)}"]
    if error.validator == "not":
        return [f"{marked.at(where)}: a field of the hub stands in a file that is not the hub"]
    if error.validator in ("maxItems", "maxProperties"):
        return [f"{marked.at(where)}: {len(error.instance)} entries stand here; the limit is {error.validator_value}"]
    said = error.message if len(error.message) < 200 else error.message[:200] + " ..."
    hint = error.schema.get("description", "") if isinstance(error.schema, dict) else ""
    return [f"{marked.at(where)}: {said}{' (' + hint + ')' if hint else ''}"]
