"""Read the state dict of a TorchScript archive without running any of its code.

In the archive's ``code/``, each class lists its parameters in one line and its buffers in another. keymap reads these
two lines as text and ignores the rest of the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from keymap.read.globals_allowed import Instance, TensorView
from keymap.read.lazy import MAX_KEY, Block, SourceFile, brief
from keymap.read.zip_file import whole_member

MAX_CODE = 1 << 22  # bytes of one source file; those of real models have a tenth
MAX_CLASSES = 10_000
MAX_VALUES = 1_000_000  # attributes of all modules, counted each time that a module is visited
MAX_DEPTH = 100
CLASS = re.compile(r"^class (\w+)(?:\((\w*)\))?:", re.MULTILINE)
LISTED = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
NAME = re.compile(r'"([^"]*)"')


class ScriptClass(NamedTuple):
    """What the code says about one class.

    Attributes:
        is_module: whether it is a module.
        tensors: names of its parameters and buffers; None if the code does not list them.
    """

    is_module: bool
    tensors: frozenset[str] | None


class _Code:
    """The classes of ``code/``, read on first use."""

    def __init__(self, members: dict[str, Block], prefix: str) -> None:
        self.members, self.prefix = members, prefix
        self.files: dict[str, dict[str, ScriptClass]] = {}

    def script_class(self, name: str) -> ScriptClass:
        """The class of a qualified name; if the code lacks it, a module without a list of tensors."""
        module, _, short = name.rpartition(".")
        path = f"{self.prefix}code/{module.replace('.', '/')}.py"
        if path not in self.files:
            block = self.members.get(path)
            text = whole_member(block, MAX_CODE).decode("utf-8", "replace") if block else ""
            if block and text.count("class ") > MAX_CLASSES:
                raise block.file.error(f"member {path!r} has more than {MAX_CLASSES} classes", "save its state_dict()")
            self.files[path] = dict(_classes(text))
        return self.files[path].get(short, ScriptClass(True, None))


def _classes(text: str) -> list[tuple[str, ScriptClass]]:
    """Name and class of every class statement in a source file."""
    statements = list(CLASS.finditer(text))
    ends = [match.start() for match in statements[1:]] + [len(text)] if statements else []
    classes = []
    for match, end in zip(statements, ends, strict=True):
        listed = LISTED.findall(text, match.end(), end)
        names = frozenset(match[1] for _, names in listed for match in NAME.finditer(names))
        complete = any(kind == "buffers" for kind, _ in listed)
        classes.append((match[1], ScriptClass(match[2] == "Module", names if complete else None)))
    return classes


def module_tensors(file: SourceFile, members: dict[str, Block], prefix: str, root: Any) -> dict[str, TensorView]:
    """State-dict keys and tensor views of a scripted or traced module, in the order of its attributes.

    Non-persistent buffers are included, because TorchScript does not record persistence. Tensors that are
    plain attributes are not included.

    Raises:
        CheckpointError: the root is not a module, a module contains itself, there are too many modules, or the
            archive has no named tensor (a frozen archive keeps its weights as constants of the graph).
    """
    advice = "export the module again, without torch.jit.freeze"
    if type(root) is not Instance or not root.name.startswith("__torch__."):
        raise file.error("is a TorchScript archive without a module in data.pkl", advice)
    code = _Code(members, prefix)
    result: dict[str, TensorView] = {}
    pending: list[tuple[str, Instance, int]] = [("", root, 0)]
    visited = 0
    while pending:
        path, module, depth = pending.pop()
        state = module.state if isinstance(module.state, dict) else {}
        visited += 1 + len(state)
        if depth > MAX_DEPTH or visited > MAX_VALUES or len(path) > MAX_KEY:
            raise file.error(f"is a TorchScript archive with endless or too many modules, at {path[:80]!r}", advice)
        file.limit_tensors(len(result))
        children: list[tuple[str, Instance, int]] = []
        for name, value in _attributes(file, path, state, code.script_class(module.name), advice):
            if isinstance(value, TensorView):
                result[f"{path}{name}"] = value
            else:
                children.append((f"{path}{name}.", value, depth + 1))
        pending.extend(reversed(children))
    if not result:
        raise file.error("is a TorchScript archive without named tensors", advice)
    return result


def _attributes(
    file: SourceFile, path: str, state: dict[Any, Any], script: ScriptClass, advice: str
) -> Iterator[tuple[str, TensorView | Instance]]:
    """The parameters, buffers and submodules of one module."""
    for name, value in state.items() if script.is_module else ():
        if type(name) is not str or len(name) > MAX_KEY:
            raise file.error(f"is a TorchScript archive whose {path[:80]!r} has an attribute {brief(name)}", advice)
        is_tensor = type(value) is TensorView and (script.tensors is None or name in script.tensors)
        if is_tensor or (type(value) is Instance and value.name.startswith("__torch__.")):
            yield name, value
