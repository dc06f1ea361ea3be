"""Strip wrapper dicts and key prefixes: find the state dict in a checkpoint.

The names come from a declared table (``mappings/containers.yaml``). keymap strips a prefix only if every key has it. A
state dict with several models, or with a model and other things, is split into its submodels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from keymap.errors import CheckpointError, some
from keymap.language.format import Containers
from keymap.read import LazyTensor
from keymap.read.lazy import MAX_KEY, brief

__all__ = ["Unwrapped", "submodels", "unwrap"]

_MAX_DEPTH = 4
_MAX_PREFIXES = 16  # nested wrapper classes
_Path = tuple[str, ...]


class Unwrapped(NamedTuple):
    """A flat state dict.

    Attributes:
        tensors: by key, without wrapper and prefixes.
        wrapper: dotted path of the wrapper, empty for none.
        others: paths of the other state dicts in the file; "" is the top level.
        prefixes: prefixes stripped from every key, outermost first.
        notes: what else was stripped or skipped: segments within keys, entries that are not tensors, other submodels.
    """

    tensors: Mapping[str, LazyTensor]
    wrapper: str
    others: tuple[str, ...]
    prefixes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def unwrap(tree: Mapping[str, Any], containers: Containers, file: str, wrapper: str | None = None) -> Unwrapped:
    """Find the state dict in the tree that a reader returned.

    Args:
        tree: nested dicts as in the file.
        containers: the declared table.
        file: for messages.
        wrapper: dotted path of the wanted state dict or submodel (``"state_dict.teacher"``, ``"teacher"``);
            None takes the first wrapper of the table.

    Raises:
        CheckpointError: there is no state dict, or none under ``wrapper``; a key is too long or not printable; or
            stripping gives two keys the same name.
    """
    paths = list(_state_dict_paths(tree, containers.wrappers))
    path, submodel = _choose(tree, paths, containers, file, wrapper)
    state = _at(tree, path)
    tensors = dict(_tensors(state))
    _check_keys(tensors, file)
    skipped = [_shown(key) for key, value in state.items() if not isinstance(value, LazyTensor)]
    notes = [f"skipped entries that are not tensors: {some(skipped)}"] if skipped else []
    for counter in [key for key in containers.counters if key in tensors and not tensors[key].shape]:
        del tensors[counter]
        notes.append(f"skipped {counter!r}: it is a counter, not a weight")
    others = tuple(".".join(other) for other in paths if other != path)
    stripped = _strip(Unwrapped(tensors, ".".join(path), others, (), tuple(notes)), containers, file)
    if not submodel:
        return stripped
    return _submodel(Unwrapped(tensors, stripped.wrapper, others, (), stripped.notes), submodel, containers, file)


def submodels(state_dict: Unwrapped, containers: Containers, file: str) -> list[Unwrapped]:
    """The submodels of a state dict whose names are in the table, each as a separate state dict."""
    first = {key.partition(".")[0] for key in state_dict.tensors if "." in key}
    names = [name for name in containers.parts if name in first]
    return [_submodel(state_dict, name, containers, file, tuple(names)) for name in names]


def _choose(
    tree: Mapping[str, Any], paths: list[_Path], containers: Containers, file: str, wrapper: str | None
) -> tuple[_Path, str]:
    """The path of the wanted state dict and the name of the wanted submodel in it, "" for none."""
    if wrapper is None:
        if not paths:
            raise CheckpointError(f"{file}: has no state dict", [_contents(tree, containers)])
        return paths[0], ""
    for path, submodel in [*_readings(wrapper), *((path, wrapper) for path in paths)]:
        state = _at(tree, path)
        tensors = dict(_tensors(state)) if isinstance(state, Mapping) else {}
        if any(key.startswith(f"{submodel}.") for key in tensors) if submodel else tensors:
            return path, submodel
    known = ", ".join(repr(".".join(path)) for path in paths) or "none"
    raise CheckpointError(f"{file}: there are no tensors under wrapper={wrapper!r}; its state dicts are: {known}")


def _readings(wrapper: str) -> Iterator[tuple[_Path, str]]:
    """Possible meanings of a dotted wrapper: a path of dicts, and the rest as a submodel within the keys."""
    names = wrapper.split(".") if wrapper else []
    yield (wrapper,), ""  # one name with dots in it
    for count in range(len(names), -1, -1):
        yield tuple(names[:count]), ".".join(names[count:])


def _state_dict_paths(
    tree: Any, wrappers: tuple[str, ...], path: _Path = (), seen: set[int] | None = None
) -> Iterator[_Path]:
    """Paths of dicts with tensors, along names of the table; a dict that has several paths is found once."""
    seen = set() if seen is None else seen
    if not isinstance(tree, Mapping) or len(path) > _MAX_DEPTH or id(tree) in seen:
        return
    seen.add(id(tree))
    inner = [
        p for name in wrappers if name in tree for p in _state_dict_paths(tree[name], wrappers, (*path, name), seen)
    ]
    outer = [path] if next(_tensors(tree), None) is not None else []
    most = max((len(dict(_tensors(_at(tree, p[len(path) :])))) for p in inner), default=0)
    # A state dict that contains a smaller one comes first. A wrapper with a stray tensor comes last.
    yield from [*inner, *outer] if most and len(dict(_tensors(tree))) < most else [*outer, *inner]


def _tensors(tree: Mapping[Any, Any]) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of a dict that have a string as their key."""
    return ((key, value) for key, value in tree.items() if isinstance(key, str) and isinstance(value, LazyTensor))


def _at(tree: Any, path: _Path) -> Any:
    """The value at a path; None if there is none."""
    for name in path:
        tree = tree[name] if isinstance(tree, Mapping) and name in tree else None
    return tree


def _check_keys(tensors: Mapping[str, LazyTensor], file: str) -> None:
    """Raise CheckpointError for a key that is too long or not printable."""
    for key in tensors:
        if len(key) > MAX_KEY:
            raise CheckpointError(
                f"{file}: the key {brief(key)} has {len(key)} characters; the limit is {MAX_KEY}: rename the key"
            )
        if not key.isprintable():
            raise CheckpointError(f"{file}: the key {brief(key)} has unprintable characters; rename the key")


def _submodel(
    state_dict: Unwrapped, name: str, containers: Containers, file: str, names: tuple[str, ...] = ()
) -> Unwrapped:
    """The tensors under one name, without that name and without prefixes; ``names`` are all submodels."""
    inside = {k[len(name) + 1 :]: tensor for k, tensor in state_dict.tensors.items() if k.startswith(f"{name}.")}
    outside = [key for key in state_dict.tensors if not key.startswith(f"{name}.")]

    def path(submodel: str) -> str:
        return f"{state_dict.wrapper}.{submodel}" if state_dict.wrapper else submodel

    others = (*state_dict.others, *(path(other) for other in names if other != name))
    notes = state_dict.notes
    if outside:
        notes = (*notes, f"skipped {len(outside)} tensors outside submodel {name!r}: {some(outside)}")
    return _strip(Unwrapped(inside, path(name), others, state_dict.prefixes, notes), containers, file)


def _strip(found: Unwrapped, containers: Containers, file: str) -> Unwrapped:
    """Strip the names of wrapper classes: prefixes that every key has, and segments anywhere in a key."""
    tensors, prefixes, notes = dict(found.tensors), list(found.prefixes), list(found.notes)
    known = (*containers.prefixes, *(f"{name}." for name in containers.parts))
    while True:
        prefix = next((p for p in known if all(k.startswith(p) and k != p for k in tensors)), None)
        if prefix is not None and len(prefixes) < _MAX_PREFIXES:
            prefixes.append(prefix)
            tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
            continue
        keys = "\n.".join(("", *tensors))
        segment = next((s for s in containers.segments if f".{s}" in keys), None)
        if segment is None:
            return Unwrapped(tensors, found.wrapper, found.others, tuple(prefixes), tuple(notes))
        old_keys: dict[str, str] = {}
        for key in tensors:
            name = _without(key, segment)
            if name in old_keys:
                text = f"{file}: stripping {segment!r} gives two keys the same name"
                raise CheckpointError(text, [f"{old_keys[name]!r} and {key!r} become {name!r}: remove one of them"])
            old_keys[name] = key
        changed = sum(name != key for name, key in old_keys.items())
        notes.append(f"stripped {segment!r} from {changed} keys")
        tensors = {name: tensors[key] for name, key in old_keys.items()}


def _without(key: str, segment: str) -> str:
    return f".{key}".replace(f".{segment}", ".")[1:]


def _contents(tree: Mapping[str, Any], containers: Containers) -> str:
    """What a file without a state dict has instead, and what to do."""
    if not tree:
        return "the dict is empty: save model.state_dict()"
    if list(tree) == [""]:
        return f"it has a {type(tree['']).__name__} instead of a dict of tensors: save model.state_dict()"
    names = ", ".join(repr(_shown(key)) for key in list(tree)[:8])
    training = [name for name in containers.training_state if name in tree]
    if training:
        return (
            f"its entries are {names}: this is training state ({', '.join(training)}) without weights; "
            f"save model.state_dict() too"
        )
    nested = [".".join(map(_shown, path)) for path in _paths_of_tensors(tree, (), set())]
    if nested:
        return f"it has tensors under {some(nested)}, which is not a known wrapper: pass wrapper={nested[0]!r}"
    return f"its entries are {names}, and none of them is a tensor: save model.state_dict()"


def _shown(key: object) -> str:
    """A key of the file for a message."""
    return key if isinstance(key, str) and len(key) < 80 and key.isprintable() else brief(key)


def _paths_of_tensors(tree: Mapping[str, Any], path: _Path, seen: set[int]) -> Iterator[_Path]:
    """Paths of dicts with tensors, whatever their names; a dict that has several paths is found once."""
    if path and next(_tensors(tree), None) is not None:
        yield path
    for name, value in tree.items():
        if isinstance(value, Mapping) and isinstance(name, str) and len(path) < _MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            yield from _paths_of_tensors(value, (*path, name), seen)
