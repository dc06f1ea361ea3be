"""Keys that no rule owns and that the model has under the same name: heads that a user added, towers that are new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from keymap.errors import DetectionError, some
from keymap.language.catalogue import Catalogue
from keymap.language.format import Format
from keymap.language.layout import Layout, whole
from keymap.plan.model import ModelView
from keymap.plan.request import Request
from keymap.plan.to_hub import Translated, tower_of
from keymap.read import LazyTensor
from keymap.source.detect import Detection, check_refused, tower_layout
from keymap.source.opened import Source, layouts_of
from keymap.source.quantized import is_float8

__all__ = [
    "OWN",
    "is_foreign",
    "own_names",
    "own_reading",
    "own_reading_below",
    "own_reading_of",
    "take_own_names",
    "with_own_parts",
]

OWN = Format("own", "format", "the model's own keys", "")
_MIN_KEYS = 8  # of the smallest module that is recognised by its names


def is_foreign(hub: Format, model: ModelView) -> bool:
    """Whether a model has no tower in a layout that the hub knows."""
    return all(tower_layout(hub, tower, model.tensors) is None for tower in hub.layouts)


def own_reading(source: Source, model: ModelView, foreign: bool) -> Source | None:
    """A state dict that has every key of the model in the model's shape, read as the model's own; None for another.

    Args:
        source: any reading of the state dict, or one without a format.
        model: the model; it may be any module.
        foreign: the model has no tower that the hub knows; then half of its keys are enough.
    """
    layouts = _stored_layouts(source)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.tensors.items()}
    equal = sum(key in layouts and layouts[key].shape == wanted[key] for key in wanted)
    if not equal or 2 * equal < len(wanted) or (not foreign and (equal < len(wanted) or model.lazy)):
        return None
    if source.refused and not _is_all_of_the_models(layouts, model, source.known):
        return None
    return _read_as_own(source, layouts, ("every key of the model",))


def _is_all_of_the_models(layouts: Mapping[str, Layout], model: ModelView, known: Catalogue) -> bool:
    """Whether a file with names by which mappings refuse it is the model's own: no other key, no dtype to decode."""
    tensors = model.tensors
    try:
        check_refused(known, model.layouts())
    except DetectionError:
        pass  # the model itself has such names
    else:
        return False
    return all(
        key in tensors and (not is_float8(layout.dtype) or layout.dtype == tensors[key].dtype)
        for key, layout in layouts.items()
    )


def own_reading_below(source: Source, model: ModelView) -> Source | None:
    """A state dict with the names and shapes of one module of the model, such as a trunk that was saved alone.

    It has every key of the module, and those are at least half of its keys. None for another, and for one that has
    the names of two modules.
    """
    layouts = _stored_layouts(source)
    below: dict[str, list[str]] = {}
    sizes: Counter[str] = Counter()
    for key in model.tensors:
        for at in (at for at, character in enumerate(key) if character == "."):
            below.setdefault(key[at + 1 :], []).append(key[: at + 1])
            sizes[key[: at + 1]] += 1
    equal = Counter(
        prefix
        for key, layout in layouts.items()
        for prefix in below.get(key, ())
        if layout.shape == tuple(model.tensors[prefix + key].shape)
    )
    (prefix, count), *others = [*equal.most_common(2), ("", 0)][:2]
    if count < max(_MIN_KEYS, len(layouts) / 2, sizes[prefix]) or others[0][1] == count:
        return None
    renamed = {prefix + key: layout for key, layout in layouts.items()}
    return _read_as_own(source, renamed, (f"the keys of the model's {prefix[:-1]}",))._replace(alone=True)


def _stored_layouts(source: Source) -> dict[str, Layout]:
    """The tensors of a state dict as the file stores them, none computed."""
    unwrapped = source.unwrapped
    return layouts_of(unwrapped.tensors if unwrapped.stored is None else unwrapped.stored, unwrapped.start)


def _read_as_own(source: Source, layouts: Mapping[str, Layout], evidence: tuple[str, ...]) -> Source:
    unwrapped = source.unwrapped
    if unwrapped.stored is not None:
        unwrapped = unwrapped._replace(tensors=unwrapped.stored, stored=None, computed=())
    return source._replace(unwrapped=unwrapped, found=Detection(OWN, layouts, evidence, (), ()), refused=False)


def own_reading_of(source: Source, tensors: Mapping[str, LazyTensor], names: Iterable[str]) -> Source:
    """Tensors of the file as those of the model's keys.

    Args:
        source: any reading of the file.
        tensors: by their keys in the file.
        names: the key of the model for each of them, in the same order.
    """
    layouts = {name: whole(key, t.shape, t.dtype) for name, (key, t) in zip(names, tensors.items(), strict=True)}
    unwrapped = source.unwrapped._replace(tensors=tensors, stored=None, computed=(), notes=(), outside=())
    return _read_as_own(source._replace(unwrapped=unwrapped), layouts, tuple(tensors))


def with_own_parts(source: Source, model: ModelView) -> Source:
    """A reading in which weights that are computed from two tensors are these tensors, where the model has them.

    A head with weight normalisation has its length and its direction in the model, too.
    """
    unwrapped, found = source.unwrapped, source.found
    if unwrapped.stored is None or found is None:
        return source
    start = unwrapped.start
    parts = {
        k: t for k, t in unwrapped.stored.items() if k not in unwrapped.tensors and k[len(start) :] in model.tensors
    }
    if not parts:
        return source
    made = {
        key.removesuffix(end) + weight
        for length, direction, weight in source.known.containers.weight_norms
        for end in (length, direction)
        for key in parts
        if key.endswith(end)
    } - unwrapped.stored.keys()
    tensors = {key: tensor for key, tensor in unwrapped.tensors.items() if key not in made} | parts
    layouts = {k: lay for k, lay in found.tensors.items() if not made.intersection(lay.sources)}
    layouts |= layouts_of(parts, start)
    computed = unwrapped.computed if tensors.keys() - unwrapped.stored.keys() else ()
    unwrapped = unwrapped._replace(tensors=tensors, computed=computed)
    return source._replace(unwrapped=unwrapped, found=found._replace(tensors=layouts))


def own_names(found: Detection, model: ModelView) -> Translated:
    """A state dict under the model's own names: the tensors that the model has, and the keys that it lacks."""
    kept = {key: layout for key, layout in found.tensors.items() if key in model.tensors}
    others = {key: layout for key, layout in found.tensors.items() if key not in model.tensors}
    renamed = {source: key for key, layout in others.items() for source in layout.named(key)}
    return Translated(kept, list(renamed), renamed, source_keys=found.tensors, unbridged=kept)


def take_own_names(translated: Translated, model: ModelView, request: Request, hub: Format) -> tuple[str, ...]:
    """Give keys without a rule to the model's keys of the same name; returns a note on them for the report.

    A key of the hub is taken in the model's shape only: its tensor would be resized otherwise, and no rule says that
    it may be. Another one in a wrong shape is taken, too: that is what the refusal then says.

    Args:
        translated: changed in place.
        model: the model.
        request: a tower that is not asked for gets nothing.
        hub: the hub, which knows the towers.
    """
    taken: dict[str, Layout] = {}
    left: list[str] = []
    for source in translated.unowned:
        key = translated.renamed.get(source)  # a key that has a rule, and no place, has none
        layout = translated.source_keys.get(key) if key is not None else None
        target = model.tensors.get(key) if key is not None else None
        if key is None or layout is None or target is None or key in translated.tensors:
            left.append(source)
            continue
        tower = tower_of(hub, key)
        if request.includes(tower) and (not tower or layout.shape == tuple(target.shape)):
            taken[key] = layout
        else:
            left.append(source)
    if not taken:
        return ()
    translated.unowned = left
    translated.tensors = {**translated.tensors, **taken}
    return (f"loaded under the model's own names: {some(taken)}",)
