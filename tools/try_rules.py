"""Try rules of a mapping on tensors, without a file and without a model.

    from tools.try_rules import backward, forward

    forward("a.(w|b): c.\\\\1", {"a.w": torch.zeros(2)})        # {"c.w": ...}
    backward("a.(w|b): c.\\\\1", {"c.w": torch.zeros(2)})       # {"a.w": ...}

docs/rule-language.md uses it for its examples.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from keymap.errors import PlanError
from keymap.language.apply import apply_rules
from keymap.language.compile import compile_mapping
from keymap.language.format import Format
from keymap.language.layout import whole
from keymap.language.rules import RuleTable
from keymap.load.copying import materialise
from keymap.source.detect import apply_aliases

HEAD = """
format: example
title: an example
reference: example 1.0
layouts: {image: native_vit}
detect: {any: [x]}
towers:
  image:
"""


def mapping(rules: str, more: str = "") -> Format:
    """A mapping of these rules, for the image tower; ``more`` are further fields of the file.

    Raises:
        MappingError: the mapping is wrong.
    """
    lines = "".join(f"    {line}\n" for line in rules.strip().splitlines())
    return compile_mapping(HEAD + lines + more, "example.yaml")


def _apply(table: RuleTable, tensors: Mapping[str, Tensor], facts: Mapping[str, int] | None) -> dict[str, Tensor]:
    layouts = {key: whole(key, tuple(value.shape), value.dtype) for key, value in tensors.items()}
    done = apply_rules(table, layouts, facts or {})
    faults = [fault.text for fault in done.faults]
    if done.left:
        faults.append(f"no rule matches {', '.join(done.left)}")
    if faults:
        raise PlanError("the rules do not fit the tensors", faults)
    return {key: materialise(layout, tensors.__getitem__) for key, layout in done.out.items()}


def forward(
    rules: str, tensors: Mapping[str, Tensor], more: str = "", facts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Apply the rules to tensors of the file.

    Raises:
        MappingError: the mapping is wrong.
        PlanError: a tensor does not fit a rule, or no rule matches its key.
    """
    return _apply(RuleTable(mapping(rules, more).rules), tensors, facts)


def backward(
    rules: str, tensors: Mapping[str, Tensor], more: str = "", facts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Apply the derived inverse of the rules to tensors of the model; errors are those of `forward`."""
    return _apply(RuleTable(mapping(rules, more).rules).inverse(), tensors, facts)


def renamed(rules: str, keys: list[str], more: str) -> list[str]:
    """The keys of a file after the mapping's aliases."""
    import torch

    layouts = {key: whole(key, (2,), torch.float32) for key in keys}
    return list(apply_aliases(mapping(rules, more), layouts, {})[0])


def stepped(rules: str, tensors: Mapping[str, Tensor], more: str) -> dict[str, Tensor]:
    """Apply the steps of a mapping, then its rules, to tensors of the file."""
    example = mapping(rules, more)
    for step in example.steps:
        tensors = _apply(step, tensors, None)
    return _apply(example.table, tensors, None)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """True where both hold equal tensors under the same keys, in the same order."""
    return list(one) == list(other) and all(one[key].equal(other[key]) for key in one)
