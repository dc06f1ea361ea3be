"""What is wrong in every layer is one fault of the rule, with a count."""

from __future__ import annotations

import torch
from test_mapping_errors import rules

from keymap.language.apply import apply_rules
from keymap.language.compile import compile_mapping
from keymap.language.layout import whole


def test_a_member_that_every_layer_lacks_is_one_fault_that_names_all_sources() -> None:
    mapping = compile_mapping(rules(r"l.(\d+).(q|k).w: {to: a.\1.w, concat: 0}"), "f.yaml")
    keys = [f"l.{i}.q.w" for i in range(12)]
    found = apply_rules(mapping.table, {key: whole(key, (2, 3), torch.float32) for key in keys}, {})
    (fault,) = found.faults
    assert fault.text.startswith("f.yaml:8:5: rule ") and "missing: l.0.k.w" in fault.text
    assert fault.text.endswith("(and 11 more of this rule)")
    assert fault.sources == tuple(keys)
    assert found.out == {}
