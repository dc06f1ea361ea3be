"""Out of wrappers and prefixes: the state dict that a checkpoint holds.

The names are a declared table (``mappings/containers.yaml``). A prefix is cut only where every key has it; a state
dict that holds several models, or a model beside other things, is taken apart into its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from keymap.errors import CheckpointError, some
from keymap.language.format import Containers
from keymap.read import LazyTensor
from keymap.read.lazy import MAX_KEY, brief

__all__ = ["Unwrapped", "parts_of", "unwrap"]

_MAX_DEPTH = 4
_MAX_PREFIXES = 16  # wrapper classes around one another


class Unwrapped(NamedTuple):
    """A flat state dict.

    Attributes:
        tensors: by key, without wrapper and prefixes.
        wrapper: dotted path of the wrapper, empty for none.
        others: paths of further state dicts in the file, which were not taken; empty text for the top level.
        prefixes: what was cut from every key, outermost first.
        notes: what else was cut or left: names within keys, entries that are no tensors, keys of other parts.
    """

    tensors: Mapping[str, LazyTensor]
    wrapper: str
    others: tuple[str, ...]
    prefixes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _held(tree: Mapping[Any, Any]) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of a dict that lie under a text."""
    return ((key, value) for key, value in tree.items() if isinstance(key, str) and isinstance(value, LazyTensor))


def _flat(tree: Mapping[Any, Any]) -> dict[str, LazyTensor]:
    return dict(_held(tree))


def _found(
    tree: Any, wrappers: tuple[str, ...], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, ...]]:
    """Paths of dicts that hold tensors, along names of the table; of a dict that stands at several, the first."""
    seen = set() if seen is None else seen
    if not isinstance(tree, Mapping) or len(path) > _MAX_DEPTH or id(tree) in seen:
        return
    seen.add(id(tree))
    inner = [p for name in wrappers if name in tree for p in _found(tree[name], wrappers, (*path, name), seen)]
    here = [path] if next(_held(tree), None) is not None else []
    most = max((len(_flat(_at(tree, p[len(path) :]))) for p in inner), default=0)
    # A state dict with a further one in it is a state dict first; a wrapper with a stray tensor is a wrapper.
    yield from [*inner, *here] if most and len(_flat(tree)) < most else [*here, *inner]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name] if isinstance(tree, Mapping) and name in tree else None
    return tree


def _splits(tree: Any, wrapper: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Readings of a wrapper's name: a path of dicts that hold tensors, and what is left as a part of its keys."""
    words = wrapper.split(".") if wrapper else []
    yield (wrapper,), ""  # a name with dots in it
    for count in range(len(words), -1, -1):
        yield tuple(words[:count]), ".".join(words[count:])


def unwrap(tree: Mapping[str, Any], containers: Containers, file: str, wrapper: str | None = None) -> Unwrapped:
    """Find the state dict in what a reader returned.

    Args:
        tree: nested dicts as in the file.
        containers: the declared table.
        file: for messages.
        wrapper: dotted path to the wanted state dict, or to a part of one (``"state_dict.teacher"``, ``"teacher"``);
            None takes the first of the table.

    Raises:
        CheckpointError: there is no state dict, none under ``wrapper``, or cutting makes two keys one.
    """
    paths = list(_found(tree, containers.wrappers))
    part = ""
    if wrapper is not None:
        for chosen, part in [*_splits(tree, wrapper), *((path, wrapper) for path in paths)]:
            held = _flat(_at(tree, chosen)) if isinstance(_at(tree, chosen), Mapping) else {}
            if any(key.startswith(f"{part}.") for key in held) if part else held:
                break
        else:
            known = ", ".join(repr(".".join(p)) for p in paths) or "none"
            raise CheckpointError(f"{file}: there are no tensors under {wrapper!r}; state dicts found: {known}")
    elif paths:
        chosen = paths[0]
    else:
        raise CheckpointError(f"{file}: it holds no state dict", [_what(tree, containers)])
    state = _at(tree, chosen)
    tensors = _flat(state)
    odd = next((key for key in tensors if len(key) > MAX_KEY or not key.isprintable()), None)
    if odd is not None:
        what = f"{len(odd)} characters" if len(odd) > MAX_KEY else "characters that cannot be shown"
        raise CheckpointError(f"{file}: the key {brief(odd)} has {what}; no model has such a key, so rename it")
    skipped = [_shown(key) for key, value in state.items() if not isinstance(value, LazyTensor)]
    notes = [f"entries that are no tensors were skipped: {some(skipped)}"] if skipped else []
    for counter in [key for key in containers.counters if key in tensors and not tensors[key].shape]:
        del tensors[counter]
        notes.append(f"{counter!r} was left out: it counts, and is no weight")
    others = tuple(".".join(path) for path in paths if path != chosen)
    whole = _cut(Unwrapped(tensors, ".".join(chosen), others, (), tuple(notes)), containers, file)
    return _part(Unwrapped(tensors, whole.wrapper, others, (), whole.notes), part, containers, file) if part else whole


def parts_of(whole: Unwrapped, containers: Containers, file: str) -> list[Unwrapped]:
    """The models of the table that a state dict holds beside other things, each as a state dict of its own."""
    first = {key.partition(".")[0] for key in whole.tensors if "." in key}
    names = [name for name in containers.parts if name in first]
    return [_part(whole, name, containers, file, tuple(names)) for name in names]


def _part(whole: Unwrapped, name: str, containers: Containers, file: str, names: tuple[str, ...] = ()) -> Unwrapped:
    inside = {k[len(name) + 1 :]: tensor for k, tensor in whole.tensors.items() if k.startswith(f"{name}.")}
    outside = [key for key in whole.tensors if not key.startswith(f"{name}.")]

    def path(part: str) -> str:
        return f"{whole.wrapper}.{part}" if whole.wrapper else part

    others = (*whole.others, *(path(other) for other in names if other != name))
    notes = (*whole.notes, f"{len(outside)} tensors beside {name!r} were not taken: {some(outside)}") * bool(outside)
    part = Unwrapped(inside, path(name), others, whole.prefixes, notes or whole.notes)
    return _cut(part, containers, file)


def _cut(found: Unwrapped, containers: Containers, file: str) -> Unwrapped:
    """Without the names of wrapper classes: prefixes that every key has, and segments wherever they stand."""
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
        shorter: dict[str, str] = {}
        for key in tensors:
            name = _without(key, segment)
            if name in shorter:
                text = f"{file}: without the wrapper's {segment!r} two keys become one"
                raise CheckpointError(text, [f"{shorter[name]!r} and {key!r} become {name!r}; keep one in the file"])
            shorter[name] = key
        changed = sum(name != key for name, key in shorter.items())
        notes.append(f"{segment!r} was cut out of {changed} keys")
        tensors = {name: tensors[key] for name, key in shorter.items()}


def _without(key: str, segment: str) -> str:
    return f".{key}".replace(f".{segment}", ".")[1:]


def _what(tree: Mapping[str, Any], containers: Containers) -> str:
    """In words, what a file without a state dict is."""
    if not tree:
        return "the dict is empty: save model.state_dict()"
    if list(tree) == [""]:
        return f"it holds a {type(tree['']).__name__}, not a dict of tensors: save model.state_dict()"
    names = ", ".join(repr(_shown(key)) for key in list(tree)[:8])
    training = [name for name in containers.training_state if name in tree]
    if training:
        return (
            f"its entries are {names}: this is training state ({', '.join(training)}) without weights; "
            f"save model.state_dict() beside it"
        )
    nested = [".".join(map(_shown, path)) for path in _paths_of_tensors(tree, (), set())]
    if nested:
        return f"tensors lie under {some(nested)}, which is no wrapper that is known: pass wrapper={nested[0]!r}"
    return f"its entries are {names}, and none of them is a tensor"


def _shown(key: object) -> str:
    """A name of the file for a message."""
    return key if isinstance(key, str) and len(key) < 80 and key.isprintable() else brief(key)


def _paths_of_tensors(tree: Mapping[str, Any], path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, ...]]:
    """Paths of dicts that hold tensors, whatever their names; of a dict that stands at several, the first."""
    if path and _flat(tree):
        yield path
    for name, value in tree.items():
        if isinstance(value, Mapping) and isinstance(name, str) and len(path) < _MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            yield from _paths_of_tensors(value, (*path, name), seen)
