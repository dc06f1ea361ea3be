"""transformers' conversion operations as operations of keymap's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from transformers_names import Use

__all__ = ["CannotSayError", "Line", "lines"]

_AXES = "abcdefgh"


class CannotSayError(ValueError):
    """A converter that the rule language cannot say; the text says why."""


@dataclass(frozen=True)
class Line:
    """One rule, for the names of one layer.

    Attributes:
        files, models: the names that it joins or cuts; one of the two has a single name, or both.
        options: the operations, as in a mapping file.
        step: it belongs to `steps`: both sides are names of the file.
        members: the first member, and the one after the last; None where all members belong to the rule.
        count: how many members there are.
        converter: the converter that it says.
    """

    files: tuple[str, ...]
    models: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    step: bool = False
    members: tuple[int, int | None] | None = None
    count: int = 0
    converter: Any = None


def lines(use: Use, model: Any) -> list[Line]:
    """The rules that say one use of a converter.

    Raises:
        CannotSayError: the language has no operation for it.
    """
    if use.converter is None:
        return [Line(use.files, use.models)]
    kinds = [type(one).__name__ for one in use.converter.operations]
    say = _SAY.get(tuple(kinds))
    if say is None:
        raise CannotSayError(f"keymap has no rule for {' and '.join(kinds)}")
    return say(use, model)


def _shape(model: Any, name: str) -> tuple[int, ...]:
    return tuple(model.state_dict()[name].shape)


def _line(use: Use, options: Mapping[str, Any], **more: Any) -> Line:
    return Line(more.pop("files", use.files), more.pop("models", use.models), options, converter=use.converter, **more)


def _swapped(axes: int, first: int, second: int) -> str:
    """The view that transposes two of so many axes."""
    names = list(_AXES[:axes])
    there = " ".join(names)
    names[first], names[second] = names[second], names[first]
    return f"{there} -> {' '.join(names)}"


def _regrouped(axes: int, axis: int, before: str, after: str) -> str:
    """The view that regroups one of so many axes."""
    names = list(_AXES[:axes])
    sides = (" ".join([*names[:axis], group, *names[axis + 1 :]]) for group in (before, after))
    return " -> ".join(sides)


def _concat(use: Use, model: Any) -> list[Line]:
    (operation,) = use.converter.operations
    if operation.num_shards_attribute is not None:
        return [_shards(use, model, operation)]
    options: dict[str, Any] = {"concat": operation.dim}
    parts = next((p for (name, end), p in PARTS.items() if use.models[0].endswith(end) and _has(model, name)), None)
    if parts is not None:
        config = model.config.get_text_config()
        options["parts"] = [getattr(config, one) if one != "*" else one for one in parts]
    return [_line(use, options)]


# Lengths of parts that no shape shows: a class, the end of a name, and attributes of its configuration.
PARTS = {("Molmo2TextModel", "embed_tokens.weight"): ("*", "additional_vocab_size")}


def _has(model: Any, name: str) -> bool:
    return any(type(one).__name__ == name for one in model.modules())


def _shards(use: Use, model: Any, operation: Any) -> Line:
    """Equal parts that a number counts: stacked, then merged with the axis that they lie along."""
    count, whole = (
        getattr(model.config.get_text_config(), operation.num_shards_attribute),
        _shape(model, use.models[0]),
    )
    if operation.dim or whole[0] % count:
        raise CannotSayError(f"{whole[0]} rows are cut into {count} parts that are not equal")
    view = "n a b -> (n a) b" if len(whole) == 2 else "n a -> (n a)"
    return _line(use, {"stack": 0, "then": view, "sizes": {"n": count}})


def _stack(use: Use, model: Any) -> list[Line]:
    axis = use.converter.operations[0].dim
    return [_line(use, {"stack": axis}, count=_shape(model, use.models[0])[axis])]


def _stack_concat(use: Use, model: Any) -> list[Line]:
    merge, concat = use.converter.operations
    if merge.dim or not concat.dim:
        raise CannotSayError(f"members are stacked on axis {merge.dim} and joined on axis {concat.dim}")
    return [_line(use, {"concat": concat.dim - 1}, count=_shape(model, use.models[0])[0])]


def _chunk(use: Use, model: Any) -> list[Line]:
    (operation,) = use.converter.operations
    return [_line(use, _cut([1] * len(use.models), operation.dim))]


def _cut(parts: Sequence[int], axis: int) -> dict[str, Any]:
    return {"split": list(parts), **({"axis": axis} if axis else {})}


def _split(use: Use, model: Any) -> list[Line]:
    (operation,) = use.converter.operations
    lengths = [_shape(model, name)[operation.dim] for name in use.models]
    return [_line(use, _cut([n // gcd(*lengths) for n in lengths], operation.dim))]


def _transpose(use: Use, model: Any) -> list[Line]:
    (operation,) = use.converter.operations
    axes = len(_shape(model, use.models[0]))
    return [_line(use, {"view": _swapped(axes, operation.dim0, operation.dim1)})]


def _interleave(use: Use, model: Any) -> list[Line]:
    operation, *cut = use.converter.operations
    pairs, halves = ("(two n)", "(n two)") if operation.inverse else ("(n two)", "(two n)")
    view = _regrouped(len(_shape(model, use.models[0])), operation.dim, pairs, halves)
    options: dict[str, Any] = {"view": view, "sizes": {"two": 2}}
    return [_line(use, options | (_cut([1] * len(use.models), cut[0].dim) if cut else {}))]


def _rope(operation: Any, model: Any, axes: int) -> dict[str, Any]:
    """The rows of each head, from pairs to halves."""
    config = model.config
    if operation.subconfig_key is not None:
        config = getattr(config, operation.subconfig_key, config)
    heads = getattr(config, "num_attention_heads", 1)
    there, back = ("(h two k)", "(h k two)") if operation.inverse else ("(h k two)", "(h two k)")
    return {"view": _regrouped(axes, 0, there, back), "sizes": {"h": heads, "two": 2}}


def _permute(use: Use, model: Any) -> list[Line]:
    (operation,) = use.converter.operations
    if operation.permute_layer_names is not None:
        raise CannotSayError("it permutes a part of its tensors")
    return [_line(use, _rope(operation, model, len(_shape(model, use.models[0]))))]


def _chunk_permute(use: Use, model: Any) -> list[Line]:
    """A step cuts the tensor, then each part has a rule of its own, because some parts are not permuted."""
    chunk, permute = use.converter.operations
    labels = _labels(use.models)
    parts = tuple(f"{use.files[0]}.{label}" for label in labels)
    said = [_line(use, _cut([1] * len(parts), chunk.dim), models=parts, step=True)]
    for part, name, target in zip(parts, use.models, use.converter.target_patterns, strict=True):
        moves = permute.permute_layer_names is None or any(one in target for one in permute.permute_layer_names)
        options = _rope(permute, model, len(_shape(model, name))) if moves else {}
        said.append(_line(use, options, files=(part,), models=(name,)))
    return said


def _labels(names: Sequence[str]) -> list[str]:
    """The segment in which names differ."""
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    differ = [column for column in columns if len(set(column)) > 1]
    if len(differ) != 1:
        raise CannotSayError(f"{', '.join(names)} differ in more than one part of the name")
    return list(differ[0])


def _ernie(use: Use, model: Any) -> list[Line]:
    """Each target takes an equal share of the members."""
    (operation,) = use.converter.operations
    if operation.stack_dim or operation.concat_dim != 1:
        raise CannotSayError("members are stacked on another axis than 0")
    lengths = [_shape(model, name)[0] for name in use.models]
    said, first = [], 0
    for number, (name, length) in enumerate(zip(use.models, lengths, strict=True)):
        last = first + length if number + 1 < len(lengths) else None
        options = {"concat": 0} if len(use.files) > 1 else {"stack": 0}
        said.append(_line(use, options, models=(name,), members=(first, last)))
        first += length
    return said


_SAY = {
    ("Concatenate",): _concat,
    ("MergeModulelist",): _stack,
    ("MergeModulelist", "Concatenate"): _stack_concat,
    ("Chunk",): _chunk,
    ("Split",): _split,
    ("Transpose",): _transpose,
    ("Interleave",): _interleave,
    ("Interleave", "Chunk"): _interleave,
    ("PermuteForRope",): _permute,
    ("Chunk", "PermuteForRope"): _chunk_permute,
    ("ErnieFuseAndSplitTextVisionExperts",): _ernie,
}
