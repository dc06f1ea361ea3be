"""Out of wrappers and prefixes: the state dict that a checkpoint holds.

The names are a declared table (``mappings/containers.yaml``). A prefix is cut only where every key has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keymap.errors import CheckpointError
from keymap.read import LazyTensor

__all__ = ["Unwrapped", "unwrap"]

_MAX_DEPTH = 4


@dataclass(frozen=True)
class Unwrapped:
    """A flat state dict.

    Attributes:
        tensors: by key, without wrapper and prefixes.
        wrapper: dotted path of the wrapper, empty for none.
        others: paths of further state dicts in the file, which were not taken; empty text for the top level.
        prefixes: what was cut from every key, outermost first.
        skipped: entries of the chosen dict that are no tensors.
    """

    tensors: Mapping[str, LazyTensor]
    wrapper: str
    others: tuple[str, ...]
    prefixes: tuple[str, ...]
    skipped: tuple[str, ...]


def _flat(tree: Mapping[str, Any]) -> dict[str, LazyTensor]:
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, LazyTensor)}


def _found(tree: Any, wrappers: tuple[str, ...], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of dicts that hold tensors, along names of the table."""
    if not isinstance(tree, Mapping) or len(path) > _MAX_DEPTH:
        return
    inner = [p for name in wrappers if name in tree for p in _found(tree[name], wrappers, (*path, name))]
    here = [path] if _flat(tree) else []
    most = max((len(_flat(_at(tree, p[len(path) :]))) for p in inner), default=0)
    # A state dict with a further one in it is a state dict first; a wrapper with a stray tensor is a wrapper.
    yield from [*here, *inner] if len(_flat(tree)) >= most else [*inner, *here]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name] if isinstance(tree, Mapping) and name in tree else None
    return tree


def unwrap(
    tree: Mapping[str, Any], containers: Mapping[str, tuple[str, ...]], file: str, wrapper: str | None = None
) -> Unwrapped:
    """Find the state dict in what a reader returned.

    Args:
        tree: nested dicts as in the file.
        containers: the table: ``wrappers``, ``prefixes`` and ``training_state``.
        file: for messages.
        wrapper: dotted path to the wanted state dict; None takes the first of the table.

    Raises:
        CheckpointError: there is no state dict, none under ``wrapper``, or cutting a prefix makes two keys one.
    """
    paths = list(_found(tree, containers["wrappers"]))
    if wrapper is not None:
        chosen = tuple(wrapper.split(".")) if wrapper else ()
        direct = _at(tree, (wrapper,)) if isinstance(_at(tree, (wrapper,)), Mapping) else None
        chosen = (wrapper,) if direct is not None else chosen
        if not isinstance(_at(tree, chosen), Mapping) or not _flat(_at(tree, chosen)):
            known = ", ".join(repr(".".join(p)) for p in paths) or "none"
            raise CheckpointError(f"{file}: there are no tensors under {wrapper!r}; state dicts found: {known}")
    elif paths:
        chosen = paths[0]
    else:
        raise CheckpointError(f"{file}: it holds no state dict", [_what(tree, containers)])
    state = _at(tree, chosen)
    tensors = _flat(state)
    skipped = tuple(str(key) for key, value in state.items() if not isinstance(value, LazyTensor))
    prefixes: list[str] = []
    while True:
        prefix = next((p for p in containers["prefixes"] if all(k.startswith(p) and k != p for k in tensors)), None)
        if prefix is None:
            break
        prefixes.append(prefix)
        tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    others = tuple(".".join(path) for path in paths if path != chosen)
    return Unwrapped(tensors, ".".join(chosen), others, tuple(prefixes), skipped)


def _what(tree: Mapping[str, Any], containers: Mapping[str, tuple[str, ...]]) -> str:
    """In words, what a file without a state dict is."""
    if not tree:
        return "the dict is empty: save model.state_dict()"
    if list(tree) == [""]:
        return f"it holds a {type(tree['']).__name__}, not a dict of tensors: save model.state_dict()"
    names = ", ".join(repr(str(key)) for key in list(tree)[:8])
    training = [name for name in containers["training_state"] if name in tree]
    if training:
        return (
            f"its entries are {names}: this is training state ({', '.join(training)}) without weights; "
            f"save model.state_dict() beside it"
        )
    nested = [str(k) for k, v in tree.items() if isinstance(v, Mapping) and any(True for _ in _tensors_below(v))]
    if nested:
        return f"tensors lie under {', '.join(nested)}, which is no wrapper that is known: pass wrapper={nested[0]!r}"
    return f"its entries are {names}, and none of them is a tensor"


def _tensors_below(tree: Mapping[str, Any], depth: int = 0) -> Iterator[LazyTensor]:
    for value in tree.values():
        if isinstance(value, LazyTensor):
            yield value
        elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _tensors_below(value, depth + 1)
