"""Strip wrapper dicts and key prefixes: find the state dict in a checkpoint.

The names come from a declared table (``mappings/containers.yaml``). keymap strips a prefix only if every key has it,
and only if the keys are not known with it: those of a language model begin with ``model.``
`search` finds the towers of a state dict that holds more than one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from keymap.advice import choices
from keymap.errors import SHOWN, CheckpointError, some
from keymap.language.format import Containers
from keymap.read import LazyTensor
from keymap.read.lazy import MAX_KEY, brief
from keymap.source.flatten import flatten, resolve
from keymap.source.weight_norm import normalised

__all__ = ["Known", "Unwrapped", "part", "unwrap", "with_above", "with_nested"]

_MAX_DEPTH = 4
_MAX_COMPARED = 2000  # prefixes that a wrong wrapper is compared with
_MAX_PREFIXES = 16  # nested wrapper classes
_Path = tuple[str, ...]
Known = Callable[[Mapping[str, LazyTensor]], bool]  # whether these keys are a format's, or the model's, as they are


def _not_known(_tensors: Mapping[str, LazyTensor]) -> bool:
    return False


class Unwrapped(NamedTuple):
    """A flat state dict.

    Attributes:
        tensors: by key, without wrapper and prefixes.
        wrapper: dotted path of the wrapper, empty for none.
        others: paths of the other state dicts in the file; "" is the top level.
        prefixes: prefixes stripped from every key, outermost first.
        notes: what else was stripped or skipped: segments within keys, entries that are not tensors, other submodels.
        start: of a part of a state dict: what every key begins with, before the names that a format has.
        path: the dicts that lead to the state dict.
        stored: the tensors as the file stores them, if some of ``tensors`` are computed from them.
        computed: a note on those of ``tensors`` that are computed.
        outside: of a part of a state dict: a note on the tensors outside it.
    """

    tensors: Mapping[str, LazyTensor]
    wrapper: str
    others: tuple[str, ...]
    prefixes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    start: str = ""
    path: _Path = ()
    outside: tuple[str, ...] = ()
    stored: Mapping[str, LazyTensor] | None = None
    computed: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """All notes, for a report."""
        return (*self.notes, *self.computed, *self.outside)


def unwrap(
    tree: Mapping[str, Any],
    containers: Containers,
    file: str,
    wrapper: str | None = None,
    known: Known = _not_known,
) -> Unwrapped:
    """Find the state dict in the tree that a reader returned.

    Args:
        tree: nested dicts as in the file.
        containers: the declared table.
        file: for messages.
        wrapper: dotted path of the wanted state dict or submodel (``"state_dict.teacher"``, ``"teacher"``);
            None takes the first wrapper of the table.
        known: keys that it knows keep their prefixes.

    Raises:
        CheckpointError: there is no state dict, or none under ``wrapper``; a key is too long or not printable; or
            stripping gives two keys the same name.
    """
    paths = list(_state_dict_paths(tree, containers.wrappers))
    if wrapper is not None:
        path, submodel = _wanted(tree, paths, containers, file, wrapper)
    elif paths:
        path, submodel = paths[0], ""
    else:
        path, submodel = _nested_only(tree, containers, file), ""
    state = _at(tree, path)
    others = tuple(".".join(other) for other in paths if other != path)
    tensors = dict(_tensors(state))
    if not any(key.startswith(submodel) for key in tensors):
        tensors = flatten(state, containers)
    _check_keys(tensors, file)
    _refuse_empty(tree, tensors, containers, file)
    notes = _remove_others(state, tensors, containers)
    if not submodel:
        return _strip(Unwrapped(tensors, ".".join(path), others, (), tuple(notes), "", path), containers, file, known)
    whole = Unwrapped(tensors, ".".join(path), others, (), tuple(notes), "", path)
    return part(_strip(whole, containers, file, prefixes=()), submodel, containers, known=known)


def with_nested(
    tree: Mapping[str, Any],
    unwrapped: Unwrapped,
    containers: Containers,
    file: str,
    from_root: bool,
    known: Known = _not_known,
) -> Unwrapped:
    """A state dict with the tensors of the dicts within it, by their dotted names.

    Args:
        tree: nested dicts as in the file.
        unwrapped: the state dict.
        containers: the declared table.
        file: for messages.
        from_root: start at the top level of the file instead of at the state dict.
        known: as for `unwrap`.

    Raises:
        CheckpointError: a key is too long or not printable, or two tensors have the same dotted name.
    """
    path = () if from_root else unwrapped.path
    tensors = flatten(_at(tree, path), containers, file)
    if len(tensors) <= len(unwrapped.tensors if unwrapped.stored is None else unwrapped.stored):
        return unwrapped
    _check_keys(tensors, file)
    return _strip(Unwrapped(tensors, ".".join(path), (), (), (), "", path), containers, file, known)


def part(
    state_dict: Unwrapped,
    prefix: str,
    containers: Containers,
    inside: Sequence[str] | None = None,
    known: Known = _not_known,
) -> Unwrapped:
    """The tensors of a state dict under one prefix, by their keys in the state dict.

    Args:
        state_dict: with at least one key that begins with ``prefix``.
        prefix: with or without the ``.`` or ``/`` at its end.
        containers: the declared table; its prefixes are stripped after ``prefix``, too.
        inside: the keys that begin with ``prefix``, if the caller has them.
        known: as for `unwrap`.
    """
    if not prefix.endswith((".", "/")):
        prefix += "." if any(key.startswith(f"{prefix}.") for key in state_dict.tensors) else "/"
    if inside is None:
        inside = [key for key in state_dict.tensors if key.startswith(prefix)]
    start = prefix
    while more := next((p for p in containers.prefixes if all(k.startswith(start + p) for k in inside)), ""):
        if known({key[len(start) :]: state_dict.tensors[key] for key in inside}):
            break
        start += more
    name, tensors = prefix[:-1], {key: state_dict.tensors[key] for key in inside}
    return state_dict._replace(
        tensors=tensors,
        wrapper=f"{state_dict.wrapper}.{name}" if state_dict.wrapper else name,
        start=start,
        outside=_skipped(state_dict, tensors, name),
    )


def _skipped(state_dict: Unwrapped, tensors: Mapping[str, LazyTensor], name: str) -> tuple[str, ...]:
    """A note on the tensors of a state dict that are not among these; empty for none."""
    count = len(state_dict.tensors) - len(tensors)
    if not count:
        return ()
    outside = (key for key in state_dict.tensors if key not in tensors)
    shown = ", ".join(islice(outside, SHOWN)) + (f" and {count - SHOWN} more" if count > SHOWN else "")
    return (f"skipped {count} tensor{'' if count == 1 else 's'} outside {name!r}: {shown}",)


def with_above(inner: Unwrapped, state_dict: Unwrapped, keys: Sequence[str]) -> Unwrapped:
    """A part of a state dict with tensors that lie above it, and a note on them."""
    name = inner.wrapper[len(state_dict.wrapper) :].removeprefix(".")
    tensors = {**inner.tensors, **{key: state_dict.tensors[key] for key in keys}}
    notes = (*inner.notes, f"taken from above {name!r}: {some(keys)}")
    return inner._replace(tensors=tensors, notes=notes, outside=_skipped(state_dict, tensors, name))


def _refuse_empty(
    tree: Mapping[str, Any], tensors: Mapping[str, LazyTensor], containers: Containers, file: str
) -> None:
    """Refuse a state dict most of whose tensors have no elements, where an entry beside it says why."""
    for why in (why for mark, why in containers.empty_beside if mark in tree):
        empty = sum(0 in tensor.shape for tensor in tensors.values())
        if 2 * empty > len(tensors):
            raise CheckpointError(f"{file}: {empty} of its {len(tensors)} tensors have no elements: {why}")


def _wanted(
    tree: Mapping[str, Any], paths: list[_Path], containers: Containers, file: str, wrapper: str
) -> tuple[_Path, str]:
    """The path of the wanted state dict and the prefix of the wanted submodel in it, "" for none."""
    for path, submodel in [*_readings(wrapper), *((path, wrapper) for path in paths)]:
        state = _at(tree, path)
        tensors = dict(_tensors(state)) if isinstance(state, Mapping) else {}
        if not tensors and not submodel and isinstance(state, Mapping):
            tensors = flatten(state, containers)
        if any(key.startswith((f"{submodel}.", f"{submodel}/")) for key in tensors) if submodel else tensors:
            return path, submodel
    everything = flatten(tree, containers)
    found = resolve(wrapper, everything, containers)
    if len(found) == 1:
        return (), found[0]
    if found:
        several = f"wrapper={wrapper!r} names {len(found)} places of the file"
        raise CheckpointError(f"{file}: {several}; pass {choices('wrapper', found)}")
    names = [repr(".".join(path)) for path in paths if path]
    known = f"its state dicts are: {', '.join(names)}" if names else "the file has no wrapper"
    near = get_close_matches(wrapper[:MAX_KEY], _first_prefixes(everything), 3, 0.6)
    hint = f"; did you mean {choices('wrapper', near)}?" if near else ""
    raise CheckpointError(f"{file}: there are no tensors under wrapper={wrapper!r}; {known}{hint}")


def _first_prefixes(keys: Iterable[str]) -> list[str]:
    """The shortest prefixes of keys, for a message."""
    found: dict[str, None] = {}
    for key in keys:
        for end in [at for at, character in enumerate(key) if character in "./"][:_MAX_DEPTH]:
            found[key[:end]] = None
        if len(found) > _MAX_COMPARED:
            break
    return list(found)


def _nested_only(tree: Mapping[str, Any], containers: Containers, file: str) -> _Path:
    """The path of a dict that holds tensors in further dicts only.

    Raises:
        CheckpointError: the file holds no tensor that may be a weight.
    """
    for path in (*((name,) for name in containers.wrappers), ()):
        state = _at(tree, path)
        if isinstance(state, Mapping) and flatten(state, containers):
            return path
    raise CheckpointError(f"{file}: has no state dict", [_contents(tree, containers)])


def _remove_others(state: Mapping[str, Any], tensors: dict[str, LazyTensor], containers: Containers) -> list[str]:
    """Take counters out of the tensors of a state dict; returns notes on what is skipped."""
    skipped = [
        _shown(key)
        for key, value in state.items()
        if not isinstance(value, LazyTensor) and not (isinstance(value, Mapping) and not any(_tensors(state)))
    ]
    notes = [f"skipped entries that are not tensors: {some(skipped)}"] if skipped else []
    for counter in [key for key in containers.counters if key in tensors and not tensors[key].shape]:
        del tensors[counter]
        notes.append(f"skipped {counter!r}: it is a counter, not a weight")
    return notes


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
    return ((key, value) for key, value in tree.items() if type(value) is LazyTensor and type(key) is str)


def _at(tree: Any, path: _Path) -> Any:
    """The value at a path; None if there is none."""
    for name in path:
        tree = tree[name] if isinstance(tree, Mapping) and name in tree else None
    return tree


def _check_keys(tensors: Mapping[str, LazyTensor], file: str) -> None:
    """Raise CheckpointError for a key that is too long or not printable."""
    if "".join(tensors).isprintable() and max(map(len, tensors), default=0) <= MAX_KEY:
        return
    for key in tensors:
        if len(key) > MAX_KEY:
            raise CheckpointError(
                f"{file}: the key {brief(key)} has {len(key)} characters; the limit is {MAX_KEY}: rename the key"
            )
        if not key.isprintable():
            raise CheckpointError(f"{file}: the key {brief(key)} has unprintable characters; rename the key")


def _strip(
    found: Unwrapped,
    containers: Containers,
    file: str,
    known: Known = _not_known,
    prefixes: tuple[str, ...] | None = None,
) -> Unwrapped:
    """Strip the names of wrapper classes: prefixes that every key has, and segments anywhere in a key."""
    prefixes = containers.prefixes if prefixes is None else prefixes
    tensors, stripped, notes = dict(found.tensors), list(found.prefixes), list(found.notes)
    while True:
        prefix = next((p for p in prefixes if all(k.startswith(p) and k != p for k in tensors)), None)
        if prefix is not None and len(stripped) < _MAX_PREFIXES and not known(tensors):
            stripped.append(prefix)
            tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
            continue
        keys = "\n.".join(("", *tensors))
        segment = next((s for s in containers.segments if f".{s}" in keys), None)
        if segment is None:
            joined, computed = normalised(tensors, containers)
            found = found._replace(stored=tensors, computed=computed) if computed else found
            return found._replace(tensors=joined, prefixes=tuple(stripped), notes=tuple(notes))
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
        return f"its object is of type {type(tree['']).__name__}, not a dict of tensors: save model.state_dict()"
    names = ", ".join(repr(_shown(key)) for key in list(tree)[:8])
    training = [name for name in containers.training_state if name in tree]
    if training:
        return (
            f"its entries are {names}: this is training state ({', '.join(training)}) without weights; "
            f"save model.state_dict() too"
        )
    return f"its entries are {names}, and none of them is a tensor: save model.state_dict()"


def _shown(key: object) -> str:
    """A key of the file for a message."""
    return key if isinstance(key, str) and len(key) < 80 and key.isprintable() else brief(key)
