"""Detect the format of a set of keys and the layout of a tower from evidence: names and numbers of dimensions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from keymap.advice import choices
from keymap.errors import DetectionError
from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Alias, Clue, Evidence, Format, Refusal, Scalar
from keymap.language.layout import Layout, Shaped
from keymap.language.pattern import Side
from keymap.language.rules import Check, Fault, RuleTable, Step
from keymap.language.shape_form import fitted

_MIN_OWNED = 0.05  # of a file's keys, that a format must know if the caller names it and its evidence is missing
_SAMPLED_KEYS = 1000  # of a file that no format matches, to find the nearest format

NAMED = ("named by the caller",)  # in place of the keys that match evidence

__all__ = [
    "NAMED",
    "Detection",
    "ambiguous",
    "apply_aliases",
    "check_refused",
    "claim",
    "claims",
    "detect",
    "file_rules",
    "fixed_by",
    "matching_keys",
    "tower_layout",
    "uses_aliases",
    "with_facts",
]


class Detection(NamedTuple):
    """The format of a file, and its tensors with the keys that the format's rules use.

    Attributes:
        mapping: the format.
        tensors: layouts by key, after the format's `aliases` and `steps`.
        evidence: the keys that match the format's evidence.
        faults, steps: of applying `aliases` and `steps`.
        checks, notes: of applying `steps`.
        stored: the layouts before that, if facts may change what is applied.
    """

    mapping: Format
    tensors: Mapping[str, Layout]
    evidence: tuple[str, ...]
    faults: tuple[Fault, ...]
    steps: tuple[Step, ...]
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    stored: Mapping[str, Layout] = {}


def _with_prefix(start: str, names: Sequence[str]) -> Iterator[str]:
    """The names that begin with a text; ``names`` are sorted, so a search finds the first one."""
    at = bisect_left(names, start)
    while at < len(names) and names[at].startswith(start):
        yield names[at]
        at += 1


def _candidates(side: Side, tensors: Mapping[str, Shaped], names: Sequence[str]) -> Iterator[str]:
    """The names that a side may match, judged by their beginning."""
    for start in side.starts:
        if side.literal:
            yield from (start,) * (start in tensors)
        else:
            yield from _with_prefix(start, names)


def _matching_key(
    clue: Clue, tensors: Mapping[str, Shaped], names: Sequence[str], lengths: dict[str, int] | None = None
) -> str | None:
    """The first key, in sorted order, that a clue matches.

    Args:
        clue: its form, if it has one, must have the lengths that are known.
        tensors: anything with a shape, by key.
        names: the keys in sorted order.
        lengths: by name, of forms; those of the clue are entered. None for none.
    """
    for key in _candidates(clue.side, tensors, names):
        fits = clue.ndim is None or len(tensors[key].shape) == clue.ndim
        if fits and key.endswith(clue.side.ends) and clue.side.match(key) is not None:
            if clue.form is None:
                return key
            found = fitted(clue.form, tensors[key].shape, lengths or {})
            if found is not None:
                if lengths is not None:
                    lengths.update(found)
                return key
    return None


def matching_keys(
    evidence: Evidence, tensors: Mapping[str, Shaped], names: Sequence[str] | None = None
) -> list[str] | None:
    """Keys that match the evidence, one for each clue of `all` and `any`; None if the evidence does not match.

    Args:
        evidence: clues; all of `all`, one of `any` and none of `none` must match. Lengths that shapes of `all` name
            are the same in all clues; each takes the first key that fits the clues before it.
        tensors: anything with a shape, by key.
        names: the keys in sorted order, if the caller has them.
    """
    names = sorted(tensors) if names is None else names
    found: list[str] = []
    lengths: dict[str, int] = {}
    for clue in evidence.all:
        key = _matching_key(clue, tensors, names, lengths)
        if key is None:
            return None
        found.append(key)
    optional = [k for clue in evidence.any if (k := _matching_key(clue, tensors, names, {**lengths})) is not None]
    if evidence.any and not optional:
        return None
    if any(_matching_key(clue, tensors, names, {**lengths}) is not None for clue in evidence.none):
        return None
    return [*found, *optional]


def _refused_keys(
    refusal: Refusal, tensors: Mapping[str, Shaped], names: Sequence[str], forms: bytes
) -> list[str] | None:
    """Keys that match a refusal; None if it does not apply. ``names`` are the sorted keys, ``forms`` see `_forms`."""
    if refusal.contains and not any(_form(fragment) in forms for fragment in refusal.contains):
        return None
    found = matching_keys(refusal.when, tensors, names)
    if found is None or not refusal.contains:
        return found
    containing = [key for key in tensors if any(fragment in key for fragment in refusal.contains)]
    return [*found, *containing] if containing else None


def _form(text: str) -> bytes:
    """A text without its digits."""
    return text.encode("utf-8", "surrogatepass").translate(None, b"0123456789")


def _forms(keys: Iterable[str]) -> bytes:
    """The keys' forms, each once: a small text to search, because keys of repeated blocks differ in their digits."""
    return b"\n".join(set(_form("\n".join(keys)).split(b"\n")))


def check_refused(
    known: Catalogue, tensors: Mapping[str, Layout], wanted: str | None = None, file: str = "the state dict"
) -> None:
    """Check that no mapping refuses a file with these keys.

    Raises:
        DetectionError: a mapping refuses it; the message is the mapping's reason.
    """
    names, forms = sorted(tensors), _forms(tensors)
    for mapping in known.mappings.values():
        for refusal in mapping.refuse if wanted in (None, mapping.name) or mapping.kind == "containers" else ():
            found = _refused_keys(refusal, tensors, names, forms)
            if found is not None:
                raise DetectionError(f"{file}: {refusal.why}", [f"recognised by {', '.join(found[:3])}"])


def _may_match(block: Alias, names: Sequence[str]) -> bool:
    """False if the literal texts of a block's rules occur in none of the sorted keys."""
    for start, texts in block.table.literals:
        for key in _with_prefix(start, names):
            if all(text in key for text in texts):
                return True
    return False


def _applies(block: Alias, tensors: Mapping[str, Shaped], names: Sequence[str]) -> bool:
    return _may_match(block, names) and (block.when is None or matching_keys(block.when, tensors, names) is not None)


def uses_aliases(mapping: Format, tensors: Mapping[str, Shaped]) -> bool:
    """Whether `aliases` of the format would rename any of the keys."""
    names = sorted(tensors)
    return any(_applies(block, tensors, names) for block in mapping.aliases)


def apply_aliases(
    mapping: Format,
    tensors: Mapping[str, Layout],
    facts: Mapping[str, int],
    names: Sequence[str] | None = None,
) -> tuple[Mapping[str, Layout], tuple[Fault, ...], tuple[Step, ...]]:
    """The tensors with the keys that the format writes, and the faults and steps; ``names`` are the sorted keys."""
    faults: list[Fault] = []
    steps: list[Step] = []
    for block in mapping.aliases:
        names = sorted(tensors) if names is None else names
        if _applies(block, tensors, names):
            applied = apply_rules(block.table, tensors, facts, pass_others=True)
            faults += applied.faults
            steps += applied.steps
            tensors, names = applied.out, None
    return tensors, tuple(faults), tuple(steps)


def _prepared(mapping: Format, tensors: Mapping[str, Layout], facts: Mapping[str, int], found: Detection) -> Detection:
    """A detection after the format's `steps`.

    Args:
        mapping: the format.
        tensors: before `aliases`.
        facts: that rules may need.
        found: after `aliases`.
    """
    for table in mapping.steps:
        applied = apply_rules(table, found.tensors, facts, pass_others=True)
        found = found._replace(
            tensors=applied.out,
            faults=(*found.faults, *applied.faults),
            steps=(*found.steps, *applied.steps),
            checks=(*found.checks, *applied.checks),
            notes=(*found.notes, *applied.notes),
        )
    return found._replace(stored=tensors) if mapping.prepares_by_facts else found


def with_facts(found: Detection, facts: Mapping[str, int]) -> Detection:
    """A detection with `aliases` and `steps` applied by these facts, which are not known when a file is opened."""
    if not found.mapping.prepares_by_facts:
        return found
    renamed, faults, steps = apply_aliases(found.mapping, found.stored, facts)
    return _prepared(
        found.mapping, found.stored, facts, Detection(found.mapping, renamed, found.evidence, faults, steps)
    )


def tower_layout(hub: Format, tower: str, tensors: Mapping[str, Shaped]) -> str | None:
    """The layout of a tower with these keys; None if they have no keys of it."""
    names = sorted(tensors)
    for name, evidence in hub.layout_evidence.get(tower, {}).items():
        if matching_keys(evidence, tensors, names) is not None:
            return name
    return None


def file_rules(mapping: Format, tensors: Mapping[str, Layout]) -> RuleTable:
    """The rules that apply to these source keys: the mapping's own, and those of the variants that fit."""
    extra = [v.rules for v in mapping.variants if matching_keys(v.when, tensors) is not None]
    return RuleTable((*mapping.rules, *(rule for rules in extra for rule in rules))) if extra else mapping.table


def fixed_by(mapping: Format, tensors: Mapping[str, Shaped], of_hub: bool = False) -> Mapping[str, Scalar]:
    """The settings that a format fixes for files with these keys: its own, and those of the variants that fit.

    Args:
        mapping: the format.
        tensors: by the format's keys.
        of_hub: they are by the hub's keys.
    """
    fixing = ((variant, variant.when_hub if of_hub else variant.when) for variant in mapping.variants if variant.fixed)
    fits = [variant for variant, when in fixing if matching_keys(when, tensors) is not None]
    return {**mapping.fixed, **{name: value for variant in fits for name, value in variant.fixed.items()}}


def claims(
    known: Catalogue,
    tensors: Mapping[str, Layout],
    wanted: str | None = None,
    facts: Mapping[str, int] | None = None,
    file: str = "the state dict",
) -> list[Detection]:
    """The formats whose evidence the keys match; or the one that the caller wants, whatever its evidence says.

    Raises:
        DetectionError: no format matches; or the named format has hardly any of the keys.
    """
    found: list[Detection] = []
    names = sorted(tensors)
    for mapping in [known.get(wanted)] if wanted is not None else known.detectable:
        detection = claim(mapping, tensors, facts or {}, names)
        if detection is None and wanted is not None:
            renamed, faults, steps = apply_aliases(mapping, tensors, facts or {}, names)
            detection = Detection(mapping, renamed, NAMED, faults, steps)
            detection = _prepared(mapping, tensors, facts or {}, detection)
            _refuse_foreign(known, mapping, detection.tensors, tensors, file)
        if detection is not None:
            found.append(detection)
    if found:
        return found
    raise DetectionError(f"{file}: no known format has these keys", _hints(known, tensors))


def claim(
    mapping: Format,
    tensors: Mapping[str, Layout],
    facts: Mapping[str, int],
    names: Sequence[str] | None = None,
) -> Detection | None:
    """What one format reads in the keys; None if its evidence does not match. ``names`` are the sorted keys."""
    renamed, faults, steps = apply_aliases(mapping, tensors, facts, names)
    keys = matching_keys(mapping.detect, renamed, names if renamed is tensors else None)
    if keys is None:
        return None
    return _prepared(mapping, tensors, facts, Detection(mapping, renamed, tuple(keys), faults, steps))


def ambiguous(found: Sequence[Detection], file: str) -> DetectionError:
    """The error for keys that several formats match."""
    return DetectionError(
        f"{file}: {len(found)} formats match its keys; choose one with "
        f"{choices('mapping', [d.mapping.name for d in found])}",
        [f"{d.mapping.name} ({d.mapping.title}): by {', '.join(d.evidence[:3])}" for d in found],
    )


def detect(
    known: Catalogue,
    tensors: Mapping[str, Layout],
    wanted: str | None = None,
    facts: Mapping[str, int] | None = None,
    file: str = "the state dict",
) -> Detection:
    """The one format of the keys, or the one that the caller wants.

    Raises:
        DetectionError: no format matches, or several do; or the named format has none of the keys.
    """
    found = claims(known, tensors, wanted, facts, file)
    if len(found) > 1:
        raise ambiguous(found, file)
    return found[0]


def _refuse_foreign(
    known: Catalogue, mapping: Format, renamed: Mapping[str, Layout], tensors: Mapping[str, Layout], file: str
) -> None:
    """Refuse a file of which the rules of a named format own no key, or hardly any.

    Raises:
        DetectionError: with what the file holds and the nearest format.
    """
    rules = RuleTable((*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)))
    sides = [*(entry.side for entry in mapping.ignore), *(entry.side for entry in mapping.unsupported)]
    owned = [key for key in renamed if rules.find(key) or any(side.match(key) is not None for side in sides)]
    if len(owned) < _MIN_OWNED * len(renamed):
        count = f"only {len(owned)} of the {len(renamed)} keys" if owned else "none of the keys"
        text = f"{file}: {mapping.name} knows {count} of the file"
        raise DetectionError(text, _hints(known, tensors))


def _hints(known: Catalogue, tensors: Mapping[str, Layout]) -> list[str]:
    """Hints for a file that no format matches: its keys, the nearest format, a prefix, all formats."""
    keys = list(tensors)
    if keys == [""]:
        held = f"it has one tensor without a key, {list(tensors[''].shape)}"
        return [f"{held}: save a dict of tensors, as torch.save(model.state_dict(), ...) or numpy.savez do"]
    shown = ", ".join(f"{key!r} {list(tensors[key].shape)}" for key in keys[:5])
    hints = [f"it has {len(keys)} tensor{'s' if len(keys) != 1 else ''}: {shown}{' ...' if len(keys) > 5 else ''}"]
    scores = []
    sample = {key: tensors[key] for key in keys[:: len(keys) // _SAMPLED_KEYS + 1]}  # all keys of a normal file
    for mapping in known.formats:
        table = RuleTable(tuple(rule for rule in mapping.rules if not rule.rest))
        renamed, _, _ = apply_aliases(mapping, sample, {})
        claimed = matching_keys(mapping.detect, renamed) is not None
        scores.append((claimed, sum(table.find(key) is not None for key in renamed), mapping.name))
    _, best, name = max(scores, default=(False, 0, ""))
    if best:
        of_keys = (
            f"{len(sample)} sampled of its {len(keys)} keys" if len(sample) < len(keys) else f"its {len(keys)} keys"
        )
        hints.append(f"the nearest format is {name}: its rules match {best} of {of_keys}")
    formats = ", ".join(sorted(m.name for m in known.formats))
    hints.append(f"known formats: {formats}; to add one, write a YAML mapping (docs/rule-language.md)")
    return hints
