"""Find what belongs to weights and lies elsewhere in the file: scales of float8 weights, and adapters.

Without them the weights are other ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod

import torch

from keymap.errors import DetectionError
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout

__all__ = ["is_float8", "refuse_adapters", "refuse_scaled_float8"]

Shape = tuple[int, ...]

_OF_SCALES = getattr(torch, "float8_e8m0fnu", None)  # powers of two: no weight has this dtype
_FLOAT8 = {dtype for name, dtype in vars(torch).items() if name.startswith("float8_")} - {_OF_SCALES}
_WORD = re.compile(r"[^./_:-]+")
_FEWEST = 2  # elements of a weight that share one scale
_MOST_WORDS = 40  # of a key that is looked at


def is_float8(dtype: torch.dtype) -> bool:
    """Whether it is a float8 dtype that weights have."""
    return dtype in _FLOAT8


def refuse_scaled_float8(
    known: Catalogue, tensors: Mapping[str, Layout], outside: Mapping[str, Shape], file: str
) -> None:
    """Check that the file has no scales for the float8 weights of a state dict.

    A scale is known by its name, which contains that of the weight or of its module: ``<module>.weight_scale``,
    ``scales.<key>``, ``<module>.weight_quantizer._scale``. Keys that a format has rules for are none, and neither is
    the same weight of another state dict.

    Args:
        known: all mappings; `containers` has the names of marks, and those that a module has beside its weight.
        tensors: of the state dict.
        outside: the shapes of everything else in the file by dotted names; () for a number or a text.
        file: for the message.

    Raises:
        DetectionError: there is a scale or a mark; the message names it.
    """
    found = next(_evidence(known, tensors, outside), None)
    if found is not None:
        raise DetectionError(
            f"{file}: its float8 weights are quantized, with the factors of their rows beside them; pass the "
            f"original checkpoint, or multiply the weights by the factors and save them (scaled float8)",
            [f"recognised by {', '.join(found)}"],
        )


def refuse_adapters(
    tensors: Mapping[str, Layout], adapters: Mapping[str, str], every: Collection[str], file: str
) -> None:
    """Check that the file has no adapter for the weights of a state dict, in another dict or below another prefix.

    Args:
        tensors: of the state dict.
        adapters: keys elsewhere in the file by which a mapping refuses a state dict, and why.
        every: all keys of the file; an adapter beside a weight of another state dict belongs to that one.
        file: for the message.

    Raises:
        DetectionError: there is one; the message names it.
    """
    weights = [key for key, layout in tensors.items() if len(layout.shape) > 1]
    names, modules = {_plain(key): key for key in weights}, _modules(weights)
    for key, why in adapters.items():
        weight, rest = _named(key, names, modules)
        if weight and key.removesuffix(rest) + weight not in every:
            raise DetectionError(f"{file}: {why}", [f"recognised by {key}, for {weight}"])


def _modules(weights: Iterable[str]) -> dict[str, str]:
    """The weights by the names of their modules."""
    ends = (".weight", "/weight", "_weight")
    return {_plain(key[: -len("weight")]): key for key in weights if key.endswith(ends)}


def _evidence(
    known: Catalogue, tensors: Mapping[str, Layout], outside: Mapping[str, Shape]
) -> Iterator[tuple[str, ...]]:
    """Pairs of a float8 weight and its scale, and marks of the file."""
    marks = known.containers.float8_marks
    yield from ((key,) for key in (*tensors, *outside) if re.split("[./]", key)[-1] in marks)
    weights = {key: layout for key, layout in tensors.items() if is_float8(layout.dtype) and len(layout.shape) > 1}
    names = {_plain(key): key for key in weights}
    modules = _modules(weights)
    shapes = {key: layout.shape for key, layout in tensors.items()}
    for key, shape in ((k, s) for keys in (shapes, outside) for k, s in keys.items() if k not in weights):
        weight, rest = _named(key, names, modules)
        if not weight and weights and _is_general(known, key):
            yield next(iter(weights)), key
        if not weight or prod(shape) * _FEWEST > prod(shapes[weight]) or _is_beside(known, rest):
            continue
        twin = rest != key and rest in shapes  # of another state dict; there it is a weight only in the weight's shape
        if shapes[rest] != shape if twin else not any(_knows(mapping, rest) for mapping in known.formats):
            yield weight, key


def _is_beside(known: Catalogue, key: str) -> bool:
    """Whether a key ends as one that a module has beside its weight, such as ``bias``."""
    return key.endswith(known.containers.float8_beside)


def _is_general(known: Catalogue, key: str) -> bool:
    """Whether a name near the top of the file speaks of scales, and is not the key of a format."""
    words = re.split("[./]", key)
    spoken = any(text in word.lower() for word in words for text in known.containers.float8_words)
    return len(words) < 3 and spoken and not any(_knows(mapping, words[-1]) for mapping in known.formats)


def _knows(mapping: Format, key: str) -> bool:
    """Whether a format names a key, and not only what it begins with."""
    found = mapping.table.find(key)
    if found is not None and not found[0].rest and all(slot.kind != "rest" for slot in found[0].source.slots):
        return True
    exact = (entry.side for entry in mapping.ignore if all(slot.kind != "rest" for slot in entry.side.slots))
    return any(side.match(key) is not None for side in exact)


def _plain(name: str) -> str:
    """A name in lower case, with one separator between its words."""
    return ".".join(_WORD.findall(name.lower()))


def _named(key: str, names: Mapping[str, str], modules: Mapping[str, str]) -> tuple[str, str]:
    """The weight that a key names, itself or by its module, the longest name first, and the key from there on."""
    words = list(_WORD.finditer(key.lower()))[:_MOST_WORDS]
    texts = [word.group() for word in words]
    for count in range(len(words), 0, -1):
        for first in range(len(words) - count + 1):
            text = ".".join(texts[first : first + count])
            weight = names.get(text, modules.get(text)) if count > 1 or first == 0 else None
            if weight is not None:
                return weight, key[words[first].start() :]
    return "", key
