"""A tree of dicts as one flat state dict: the names on the way to a tensor, joined by dots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from keymap.errors import CheckpointError
from keymap.language.format import Containers
from keymap.read import LazyTensor

__all__ = ["everything", "flatten", "resolve", "training"]

_MAX_DEPTH = 16


def flatten(tree: Any, containers: Containers, file: str = "the file") -> dict[str, LazyTensor]:
    """All tensors of a tree by their dotted names, without those of training states.

    A dict that has several paths is read once, at the first of them; so a tree with a circle ends, too.

    Args:
        tree: nested dicts; other values than dicts and tensors are left out.
        containers: the declared table; its ``training_state`` names the dicts to leave out, unless they hold a wrapper.
        file: for messages.

    Raises:
        CheckpointError: two tensors have the same dotted name.
    """
    found: dict[str, LazyTensor] = {}
    seen: set[int] = set()

    def walk(node: Any, start: str, depth: int) -> None:
        if not isinstance(node, Mapping) or id(node) in seen or depth > _MAX_DEPTH:
            return
        seen.add(id(node))
        for name, value in node.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, LazyTensor):
                if start + name in found:
                    raise CheckpointError(f"{file}: two tensors have the name {start + name!r}; rename one of them")
                found[start + name] = value
            elif not _is_training_state(name, value, containers):
                walk(value, f"{start}{name}.", depth + 1)

    walk(tree, "", 0)
    return found


def everything(tree: Any, containers: Containers) -> dict[str, Any]:
    """All values of a tree by their dotted names, tensors and others, the ``segments`` of the table left out."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    left = [("", tree, 0)]
    while left:
        start, node, depth = left.pop()
        if not isinstance(node, Mapping) or id(node) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(node))
        for name, value in node.items():
            key = f"{start}{name}"
            if isinstance(value, Mapping):
                left.append((f"{key}.", value, depth + 1))
            else:
                found[key] = value
    text = "\n".join(found)
    for segment in (segment for segment in containers.segments if segment in text):
        found = {key.replace(segment, ""): value for key, value in found.items()}
    return found


def _is_training_state(name: str, value: Any, containers: Containers) -> bool:
    """Whether a dict is the state of an optimizer or the like, and holds no model."""
    if name not in containers.training_state or not isinstance(value, Mapping):
        return False
    return not any(wrapper in value for wrapper in containers.wrappers)


def training(prefix: str, containers: Containers) -> bool:
    """Whether a prefix of keys leads into the state of an optimizer or the like, and not to a model beside it."""
    words = prefix.replace("/", ".").split(".")
    return any(
        word in containers.training_state and following not in containers.wrappers
        for word, following in zip(words, [*words[1:], ""], strict=True)
    )


def resolve(wrapper: str, keys: Iterable[str], containers: Containers) -> list[str]:
    """The prefixes of keys that a name may mean if names of wrappers are left out of it.

    Args:
        wrapper: as a message or an inspection prints it, for example ``"teacher"`` for ``state_dict.module.teacher``.
        keys: dotted names.
        containers: the declared table of wrappers and prefixes.

    Returns:
        The prefixes without their last dot; those with the fewest other words in them.
    """
    optional = {*containers.wrappers, *(p.rstrip(".") for p in (*containers.prefixes, *containers.segments))}
    wanted = wrapper.replace("/", ".").strip(".").split(".")
    checked: set[str] = set()
    found: dict[str, int] = {}
    for key in keys:
        end = max(key.rfind("."), key.rfind("/"))
        while end > 0 and key[:end] not in checked:
            prefix = key[:end]
            checked.add(prefix)
            left_out = _left_out(prefix.replace("/", ".").split("."), wanted, optional)
            if left_out is not None:
                found[prefix] = left_out
            end = max(prefix.rfind("."), prefix.rfind("/"))
    fewest = min(found.values(), default=0)
    return [prefix for prefix, left_out in found.items() if left_out == fewest]


def _left_out(words: list[str], wanted: list[str], optional: set[str]) -> int | None:
    """How many words of a prefix are not wanted and may be left out; None if the prefix is another one."""
    rest = list(wanted)
    count = 0
    for word in reversed(words):  # the last word is always wanted: a prefix ends where the state dict begins
        if rest and rest[-1] == word:
            rest.pop()
        elif word in optional and len(rest) < len(wanted):
            count += 1
        else:
            return None
    return None if rest else count
