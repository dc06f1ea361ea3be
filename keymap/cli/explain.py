"""A format as `keymap explain` describes it."""

from __future__ import annotations

from typing import Any

from keymap.cli.advice import in_options
from keymap.cli.screen import Screen
from keymap.language.format import Evidence, Format
from keymap.language.rules import Rule

__all__ = ["described", "show_format"]


def described(mapping: Format) -> dict[str, Any]:
    """Plain data about a format."""
    config = mapping.config
    return {
        "name": mapping.name,
        "kind": mapping.kind,
        "title": mapping.title,
        "file": mapping.file,
        "reference": mapping.reference,
        "notes": list(mapping.notes),
        "towers": _towers(mapping),
        "detect": {name: list(map(str, getattr(mapping.detect, name))) for name in Evidence._fields},
        "rules": [_rule(rule) for rule in mapping.rules],
        "variants": [[_rule(rule) for rule in variant.rules] for variant in mapping.variants],
        "ignored": {str(entry.side): entry.why for entry in mapping.ignore},
        "unsupported": {str(entry.side): entry.why for entry in mapping.unsupported},
        "configuration_file": (config.file or config.inside) if config is not None else None,
        "settings": sorted({*config.facts, *config.defaults}) if config is not None else [],
        "fixed": dict(mapping.fixed),
        "fixed_by_variants": [dict(variant.fixed) for variant in mapping.variants],
    }


def _towers(mapping: Format) -> dict[str, list[str]]:
    """The layouts of each tower; of a bridge those that it joins."""
    if mapping.kind == "bridge":
        return {mapping.tower: list(mapping.between)}
    return {tower: list(layouts) for tower, layouts in mapping.layouts.items()}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "tower": rule.tower,
        "key": str(rule.source),
        "targets": list(map(str, rule.targets)),
        "rule": rule.text,
        "place": rule.place,
    }


def show_format(screen: Screen, found: dict[str, Any]) -> None:
    """Print it."""
    screen.line(f"{found['name']}: {found['title']}")
    rows = [("kind", found["kind"]), ("file", found["file"]), ("names from", found["reference"])]
    rows += [(f"{tower} tower", " or ".join(layouts)) for tower, layouts in found["towers"].items()]
    words = {"all": "all of", "any": "any of", "none": "none of"}
    rows += [("detected by", f"{words[name]} {', '.join(clues)}") for name, clues in found["detect"].items() if clues]
    rows += [("ignored", f"{key}: {why}") for key, why in found["ignored"].items()]
    rows += [("unsupported", f"{key}: {why}") for key, why in found["unsupported"].items()]
    rows.append(("settings from", found["configuration_file"] or ""))
    rows.append(("settings", ", ".join(found["settings"])))
    rows += [("fixed", f"{name} = {value}") for name, value in found["fixed"].items()]
    for number, fixed in enumerate(found["fixed_by_variants"], 1):
        rows += [(f"fixed by variant {number}", f"{name} = {value}") for name, value in fixed.items()]
    rows += [("note", note) for note in found["notes"]]
    screen.pairs((label, in_options(str(value))) for label, value in rows if value)
    for number, rules in enumerate([found["rules"], *found["variants"]]):
        if rules:
            screen.title("rules" if number == 0 else f"rules of variant {number}")
            lines = [(rule["tower"], rule["key"], ", ".join(rule["targets"])) for rule in rules]
            screen.table(("tower", "key", "becomes"), lines)
