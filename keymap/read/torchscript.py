"""The state dict of a TorchScript archive, without running any of its code.

The archive's ``code/`` says which attributes of a class are parameters and buffers, one line each. Those
two lines are read as text; the rest of the code is not looked at.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from keymap.read.globals_allowed import Instance, TensorView
from keymap.read.lazy import MAX_KEY, Block, SourceFile, brief
from keymap.read.zip_file import whole_member

MAX_CODE = 1 << 22  # bytes of one source text; those of real models have a tenth
MAX_CLASSES = 10_000
MAX_VALUES = 1_000_000  # attributes of all modules, as often as they are reached
MAX_DEPTH = 100
CLASS = re.compile(r"^class (\w+)(?:\((\w*)\))?:", re.MULTILINE)
LISTED = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
NAME = re.compile(r'"([^"]*)"')


class ScriptClass(NamedTuple):
    """What the code says of one class: whether it is a module, and its tensors; None where it lists none."""

    module: bool
    tensors: frozenset[str] | None


class _Sources:
    """The classes of ``code/``, read when first asked for."""

    def __init__(self, members: dict[str, Block], prefix: str) -> None:
        self.members, self.prefix = members, prefix
        self.files: dict[str, dict[str, ScriptClass]] = {}

    def of(self, name: str) -> ScriptClass:
        """The class of a qualified name; where the code lacks it, a module all of whose tensors count."""
        module, _, short = name.rpartition(".")
        path = f"{self.prefix}code/{module.replace('.', '/')}.py"
        if path not in self.files:
            block = self.members.get(path)
            text = whole_member(block, MAX_CODE).decode("utf-8", "replace") if block else ""
            if block and text.count("class ") > MAX_CLASSES:
                raise block.file.bad(f"member {path!r} has more than {MAX_CLASSES} classes", "save its state_dict()")
            self.files[path] = dict(_classes(text))
        return self.files[path].get(short, ScriptClass(True, None))


def _classes(text: str) -> list[tuple[str, ScriptClass]]:
    """Name and class of every class statement in a source text."""
    found = list(CLASS.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)] if found else []
    classes = []
    for match, end in zip(found, ends, strict=True):
        listed = LISTED.findall(text, match.end(), end)
        names = frozenset(match[1] for _, names in listed for match in NAME.finditer(names))
        complete = any(kind == "buffers" for kind, _ in listed)
        classes.append((match[1], ScriptClass(match[2] == "Module", names if complete else None)))
    return classes


def module_tensors(file: SourceFile, members: dict[str, Block], prefix: str, root: Any) -> dict[str, TensorView]:
    """State-dict keys and views of a scripted or traced module, in the order of its attributes.

    Non-persistent buffers are among them: TorchScript keeps no record of persistence. Tensors that are
    plain attributes are not.

    Raises CheckpointError where the root is no module, modules hold themselves or are too many, or the
    archive has no named tensor (a frozen one keeps its weights as constants of the graph).
    """
    again = "export the module again, without torch.jit.freeze"
    if type(root) is not Instance or not root.name.startswith("__torch__."):
        raise file.bad("is a TorchScript archive whose data.pkl holds no module", again)
    sources = _Sources(members, prefix)
    result: dict[str, TensorView] = {}
    waiting: list[tuple[str, Instance, int]] = [("", root, 0)]
    visits = 0
    while waiting:
        path, module, depth = waiting.pop()
        state = module.state if isinstance(module.state, dict) else {}
        visits += 1 + len(state)
        if depth > MAX_DEPTH or visits > MAX_VALUES or len(path) > MAX_KEY:
            raise file.bad(f"is a TorchScript archive whose modules do not end, at {path[:80]!r}", again)
        file.refuse_many(len(result))
        script = sources.of(module.name)
        inner: list[tuple[str, Instance, int]] = []
        for name, value in state.items() if script.module else ():
            if type(name) is not str or len(name) > MAX_KEY:
                raise file.bad(f"is a TorchScript archive whose {path[:80]!r} has an attribute {brief(name)}", again)
            if type(value) is TensorView and (script.tensors is None or name in script.tensors):
                result[f"{path}{name}"] = value
            elif type(value) is Instance and value.name.startswith("__torch__."):
                inner.append((f"{path}{name}.", value, depth + 1))
        waiting.extend(reversed(inner))
    if not result:
        raise file.bad("is a TorchScript archive without named tensors", again)
    return result
