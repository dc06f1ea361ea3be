"""`compare_checkpoints`: two files of any formats, tensor by tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, prod

import numpy as np
from torch import nn

from keymap.compare.names import Named, failed_of, of_side, readings, same_names
from keymap.compare.report import Comparison, Difference
from keymap.compare.values import Gap, Values, compare_values
from keymap.errors import PlanError, some
from keymap.language.format import Scalar
from keymap.language.rules import Check
from keymap.plan.export import not_read
from keymap.plan.live import open_model
from keymap.plan.model import state_of
from keymap.plan.plan import dtype_name
from keymap.plan.request import checked_facts, checked_flag, checked_wrapper, request_for_towers, sizes_of
from keymap.read.lazy import brief
from keymap.source.detect import NAMED
from keymap.source.hubs import Asked, PathLike, ask_each, ask_for_two
from keymap.source.open import open_in_each, open_source, open_under_one_hub
from keymap.source.opened import Opened

__all__ = ["compare_checkpoints"]

_Opened = tuple[Opened, Mapping[str, Scalar]]  # with the facts that a model states


# long: signature and docstring; the body is the steps in order
def compare_checkpoints(
    a: PathLike | nn.Module,
    b: PathLike | nn.Module,
    *,
    tolerance: float = 0.0,
    weights_only: bool = True,
    towers: Sequence[str] | str | None = None,
    wrapper_a: str | None = None,
    wrapper_b: str | None = None,
    mapping_a: PathLike | None = None,
    mapping_b: PathLike | None = None,
    facts: Mapping[str, int] | None = None,
    check_dtype: bool = False,
    hub: str | None = None,
) -> Comparison:
    """Compare the weights of two checkpoints, whatever their formats, containers and dtypes are.

    Files of one format are compared key by key. Files of two formats are compared under the names of their hub, which
    both are converted to while they are read. Files that no format matches are compared under their own names, if
    they share them. Keys that hold no weights (index buffers, masks) are not compared, and the result says so.

    Values of unlike dtypes are compared after an exact conversion to float64: a float16 copy of a float32 file differs
    by its rounding. NaN equals NaN in the same place, whatever its bits, and 0.0 equals -0.0.

    Args:
        a, b: as ``checkpoint_path`` of `load_checkpoint`; or a model whose keys a hub knows.
        tolerance: the largest |a - b| of a single element that is no difference. Integers and booleans must be the
            same.
        weights_only: as in `load_checkpoint`.
        towers: compare only these, for example ``("image",)``.
        wrapper_a, wrapper_b: which state dict of the file.
        mapping_a, mapping_b: the format of the file, or the path of a YAML file; None detects it.
        facts: settings that shapes do not show, where a conversion needs them, as in `convert_state_dict`.
        check_dtype: an unlike dtype is a difference.
        hub: the name of the hub under whose names files of two formats are compared; None takes the first that has
            formats for both files.

    Returns:
        The differences. The memory that is needed is that of the two largest tensors and some megabytes.

    Raises:
        KeymapError: a file cannot be read, its format is unknown or cannot be brought to the other's, or an argument
            is wrong.
    """
    limit = _checked_tolerance(tolerance)
    safe, strict_dtype = checked_flag("weights_only", weights_only), checked_flag("check_dtype", check_dtype)
    _refuse_options_of_models({"a": (a, mapping_a, wrapper_a), "b": (b, mapping_b, wrapper_b)})
    model = next((side for side in (a, b) if isinstance(side, nn.Module)), None)
    state = state_of(model).tensors if model is not None else None
    asked_a, asked_b = ask_for_two(hub, mapping_a, mapping_b, state)
    one, own_a = _open("a", a, safe, asked_a, wrapper_a)
    other, own_b = _open("b", b, safe, asked_b, wrapper_b)
    if hub is None and mapping_a is None and mapping_b is None:
        sides = (a, wrapper_a), (b, wrapper_b)
        if model is None:
            one, other = _under_one_hub(one, other, sides, safe)
        else:
            (one, own_a), (other, own_b) = _with_a_model((one, own_a), (other, own_b), sides, safe)
    asked = request_for_towers(towers, one.known.hub)
    source_a, source_b = readings(one, other)
    both = same_names(source_a, source_b, asked, sizes_of({**own_a, **own_b}) | dict(checked_facts(facts, one.known)))
    if not both[0].tensors and not both[1].tensors:
        raise PlanError(f"{source_a.file} and {source_b.file} have no tensors of towers={towers!r}")
    found = _compare(*both, limit, strict_dtype)
    for name, side in (("a", one), ("b", other)):
        unread = [note.replace("wrapper=", f"wrapper_{name}=") for note in not_read(side, "compared")]
        found = replace(found, notes=(*found.notes, *(f"{name}: {note}" for note in unread)))
    return found


def _checked_tolerance(tolerance: object) -> float:
    number = tolerance if isinstance(tolerance, (int, float, np.floating)) and not isinstance(tolerance, bool) else -1
    try:
        value = float(number)
    except OverflowError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise PlanError(f"tolerance={brief(tolerance)}: expected a number that is zero or more, for example 1e-5")
    return value


def _refuse_options_of_models(sides: Mapping[str, tuple[object, object, object]]) -> None:
    for name, (side, mapping, wrapper) in sides.items():
        if isinstance(side, nn.Module) and (mapping is not None or wrapper is not None):
            raise PlanError(f"{name} is a model: leave mapping_{name}= and wrapper_{name}= out")


def _open(name: str, where: object, weights_only: bool, asked: Asked, wrapper: object) -> _Opened:
    """A file or a model, opened, and the facts that a model states."""
    if isinstance(where, nn.Module):
        return open_model(where, asked.known)
    if not isinstance(where, (str, os.PathLike)):
        raise PlanError(f"{name}={brief(where)}: pass the path of a checkpoint, or a model")
    with of_side(name):
        return open_source(where, weights_only, asked, checked_wrapper(wrapper)), {}


def _under_one_hub(
    one: Opened, other: Opened, files: Sequence[tuple[PathLike | nn.Module, str | None]], weights_only: bool
) -> tuple[Opened, Opened]:
    """The two files as they were opened, or under another hub, where that has formats for both."""
    if one.top[0].found is not None and other.top[0].found is not None:
        return one, other
    paths = [(path, wrapper) for path, wrapper in files if not isinstance(path, nn.Module)]
    again = open_under_one_hub(paths, weights_only)
    return (again[0], again[1]) if again is not None else (one, other)


def _with_a_model(
    one: _Opened, other: _Opened, sides: Sequence[tuple[PathLike | nn.Module, str | None]], weights_only: bool
) -> tuple[_Opened, _Opened]:
    """A model and a file as they were opened, or under the first hub of which both have a format."""
    files = [side for side in sides if not isinstance(side[0], nn.Module)]
    if len(files) != 1 or (one[0].top[0].found is not None and other[0].top[0].found is not None):
        return one, other
    path, wrapper = files[0]
    assert not isinstance(path, nn.Module), "it is the file"
    for opened in open_in_each(path, weights_only, ask_each(), wrapper):
        if opened.top[0].found is None:
            continue
        again = [
            open_model(side, opened.known) if isinstance(side, nn.Module) else (opened, dict[str, Scalar]())
            for side, _ in sides
        ]
        found = [side.top[0].found for side, _ in again]
        if all(reading is not None and reading.evidence != NAMED for reading in found):
            return again[0], again[1]
    return one, other


def _compare(a: Named, b: Named, compared_as: str, tolerance: float, check_dtype: bool) -> Comparison:
    notes = [f"{name}: {note}" for name, side in (("a", a), ("b", b)) for note in (*side.source.notes, *side.notes)]
    found: list[Difference] = []
    meant: dict[str, list[str]] = {}  # what only one file has, and why that is no difference
    values = Values(a.source.unwrapped.tensors), Values(b.source.unwrapped.tensors)
    dtypes: Counter[str] = Counter()
    largest = 0.0
    for key in dict.fromkeys((*a.tensors, *b.tensors)):
        if key not in a.tensors or key not in b.tensors:
            name, side = ("a", a) if key in a.tensors else ("b", b)
            meaning = _meaning(side, key)
            if meaning:
                meant.setdefault(f"only in {name}, {meaning}", []).append(key)
            else:
                found.append(_difference(a, b, key, "missing_in_b" if name == "a" else "missing_in_a"))
            continue
        one, other = a.tensors[key], b.tensors[key]
        if one.shape != other.shape and not (a.converted and prod(one.shape) == prod(other.shape) == 1):
            found.append(_difference(a, b, key, "shape"))
            continue
        gap = compare_values((values[0], one), (values[1], other), tolerance)
        largest = max(largest, gap.largest)
        unlike = one.dtype != other.dtype
        dtypes.update([f"{dtype_name(one.dtype)}, {dtype_name(other.dtype)}"] * unlike)
        if gap.differing:
            found.append(_difference(a, b, key, "value", gap))
        elif check_dtype and unlike:
            found.append(_difference(a, b, key, "dtype"))
    notes += [f"{text}: {some(keys)}" for text, keys in meant.items()]
    computed = [one.key for one in found if one.kind == "value" and _computes(a, b, one.key)]
    if computed:
        notes.append(f"values that the conversion computes may differ by rounding: {some(computed)}")
    return Comparison(
        a.source.file,
        b.source.file,
        _form(a),
        _form(b),
        compared_as,
        len(a.tensors.keys() & b.tensors.keys()),
        tuple(found),
        dict(dtypes),
        tolerance,
        largest,
        tuple(notes),
    )


def _form(side: Named) -> str:
    return side.source.found.mapping.name if side.source.found is not None else ""


def _meaning(side: Named, key: str) -> str:
    """Why a key that one file lacks is no difference; "" where it is one."""
    hub = side.source.known.hub
    if not side.converted:
        return ""
    if key.rpartition(".")[2] in hub.optional_buffers:
        return "a counter that a file may lack"
    meaning = hub.absent_means.get(key)
    if meaning is None or failed_of(side.source, [Check(key, side.tensors[key], meaning.value, "")]):
        return ""
    return "and it holds what its absence means"


def _difference(a: Named, b: Named, key: str, kind: str, gap: Gap | None = None) -> Difference:
    one, other = a.tensors.get(key), b.tensors.get(key)
    towers = a.towers if one is not None else b.towers
    plain = Difference(
        towers[key],
        key,
        kind,
        one.shape if one is not None else None,
        other.shape if other is not None else None,
        dtype_name(one.dtype) if one is not None else None,
        dtype_name(other.dtype) if other is not None else None,
        one.named(key) if one is not None else (),
        other.named(key) if other is not None else (),
    )
    if gap is None or one is None:
        return plain
    where = tuple(int(index) for index in np.unravel_index(gap.at, one.shape)) if one.shape else ()
    return replace(plain, max_abs=gap.largest, where=where, value_a=gap.a, value_b=gap.b, differing=gap.differing)


def _computes(a: Named, b: Named, key: str) -> bool:
    return any(piece.computed for side in (a, b) for piece in side.tensors[key].pieces)
