"""Which format a set of keys is, which layout a tower has: evidence, read from names and ranks alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from keymap.errors import DetectionError
from keymap.language.apply import apply_rules
from keymap.language.catalogue import Catalogue
from keymap.language.format import Alias, Clue, Evidence, Format, Refusal
from keymap.language.layout import Layout, Shaped
from keymap.language.pattern import Side
from keymap.language.rules import Fault, RuleTable, Step

_LEAST_OWNED = 0.05  # of a file's keys, that a format which is named without evidence must know
_LOOKED_AT = 1000  # keys of a file that nobody claims, to tell the nearest format

__all__ = ["Detection", "apply_aliases", "detect", "holds", "refuse_in_words", "tower_layout", "uses_aliases"]


class Detection(NamedTuple):
    """The format of a file, and its tensors under the format's preferred keys.

    Attributes:
        mapping: the format.
        tensors: layouts by key, after the format's `aliases`.
        evidence: what told the format, in words.
        faults, steps: of `aliases`.
    """

    mapping: Format
    tensors: Mapping[str, Layout]
    evidence: tuple[str, ...]
    faults: tuple[Fault, ...]
    steps: tuple[Step, ...]


def _beginning(start: str, names: Sequence[str]) -> Iterator[str]:
    """The names that begin with a text; ``names`` are in order, so others are not looked at."""
    at = bisect_left(names, start)
    while at < len(names) and names[at].startswith(start):
        yield names[at]
        at += 1


def _candidates(side: Side, tensors: Mapping[str, Shaped], names: Sequence[str]) -> Iterator[str]:
    """The names that a side may match, told by how they begin."""
    for start in side.starts:
        if side.literal:
            yield from (start,) * (start in tensors)
        else:
            yield from _beginning(start, names)


def _witness(clue: Clue, tensors: Mapping[str, Shaped], names: Sequence[str]) -> str | None:
    """The first key, in order, that a clue matches."""
    for key in _candidates(clue.side, tensors, names):
        fits = clue.ndim is None or len(tensors[key].shape) == clue.ndim
        if fits and key.endswith(clue.side.ends) and clue.side.match(key) is not None:
            return key
    return None


def holds(evidence: Evidence, tensors: Mapping[str, Shaped], names: Sequence[str] | None = None) -> list[str] | None:
    """The keys that bear the evidence out, or None where it does not hold; ``names`` are the keys in order."""
    names = sorted(tensors) if names is None else names
    found: list[str] = []
    for clue in evidence.all:
        witness = _witness(clue, tensors, names)
        if witness is None:
            return None
        found.append(witness)
    some = [witness for clue in evidence.any if (witness := _witness(clue, tensors, names)) is not None]
    if evidence.any and not some:
        return None
    if any(_witness(clue, tensors, names) is not None for clue in evidence.none):
        return None
    return [*found, *some]


def _refused(refusal: Refusal, tensors: Mapping[str, Shaped], names: Sequence[str], keys: str) -> list[str] | None:
    """The keys that show a file to be of a kind that is refused; None for another file.

    ``names`` are the keys in order, ``keys`` all of them in one text.
    """
    if refusal.contains and not any(part in keys for part in refusal.contains):
        return None
    seen = holds(refusal.when, tensors, names)
    if seen is None or not refusal.contains:
        return seen
    parts = [key for key in tensors if any(part in key for part in refusal.contains)]
    return [*seen, *parts] if parts else None


def refuse_in_words(
    known: Catalogue, tensors: Mapping[str, Layout], wanted: str | None = None, file: str = "the state dict"
) -> None:
    """Refuse a file of a kind that a mapping says cannot be loaded.

    Raises:
        DetectionError: in the mapping's words.
    """
    names, keys = sorted(tensors), "\n".join(tensors)
    for mapping in known.mappings.values():
        for refusal in mapping.refuse if wanted in (None, mapping.name) or mapping.kind == "containers" else ():
            seen = _refused(refusal, tensors, names, keys)
            if seen is not None:
                raise DetectionError(f"{file}: {refusal.why}", [f"told by {', '.join(seen[:3])}"])


def _may_own(block: Alias, names: Sequence[str]) -> bool:
    """False where the texts of a block's rules show that it owns none of the keys, which are in order."""
    for rule in block.table.rules:
        words = [token for token in rule.source.tokens if isinstance(token, str)]
        for start in rule.source.starts:
            if any(all(word in key for word in words) for key in _beginning(start, names)):
                return True
    return False


def _applies(block: Alias, tensors: Mapping[str, Shaped], names: Sequence[str]) -> bool:
    return _may_own(block, names) and (block.when is None or holds(block.when, tensors, names) is not None)


def uses_aliases(mapping: Format, tensors: Mapping[str, Shaped]) -> bool:
    """True where `accept` would give the keys other names."""
    names = sorted(tensors)
    return any(_applies(block, tensors, names) for block in mapping.aliases)


def apply_aliases(
    mapping: Format,
    tensors: Mapping[str, Layout],
    facts: Mapping[str, int],
    names: Sequence[str] | None = None,
) -> tuple[Mapping[str, Layout], tuple[Fault, ...], tuple[Step, ...]]:
    """The tensors under the keys that the format writes; ``names`` are their keys in order."""
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


def tower_layout(hub: Format, tower: str, tensors: Mapping[str, Shaped]) -> str | None:
    """The layout that the keys of a tower have; None where they hold nothing of it."""
    names = sorted(tensors)
    for name, evidence in hub.layout_evidence.get(tower, {}).items():
        if holds(evidence, tensors, names) is not None:
            return name
    return None


def detect(
    known: Catalogue,
    tensors: Mapping[str, Layout],
    wanted: str | None = None,
    facts: Mapping[str, int] | None = None,
    file: str = "the state dict",
) -> Detection:
    """The one format that claims the keys, or the one that the caller names.

    Raises:
        DetectionError: no format claims the file, or several do; or the one that is named knows none of its keys.
    """
    found: list[Detection] = []
    names = sorted(tensors)
    for mapping in [known.get(wanted)] if wanted is not None else known.formats:
        accepted, faults, steps = apply_aliases(mapping, tensors, facts or {}, names)
        evidence = holds(mapping.detect, accepted, names if accepted is tensors else None)
        if evidence is None and wanted is not None:
            _refuse_foreign(known, mapping, accepted, tensors, file)
        if evidence is not None or wanted is not None:
            said = tuple(evidence) if evidence is not None else ("named by the caller",)
            found.append(Detection(mapping, accepted, said, faults, steps))
    if len(found) == 1:
        return found[0]
    if found:
        raise DetectionError(
            f"{file}: {len(found)} formats claim its keys; name one with mapping=...",
            [f"{d.mapping.name} ({d.mapping.title}): by {', '.join(d.evidence[:3])}" for d in found],
        )
    raise DetectionError(f"{file}: no known format has these keys", _near(known, tensors))


def _refuse_foreign(
    known: Catalogue, mapping: Format, accepted: Mapping[str, Layout], tensors: Mapping[str, Layout], file: str
) -> None:
    """Refuse a file that a named format cannot be that of: its rules own none of the keys, or hardly any.

    Raises:
        DetectionError: with what the file holds and the nearest format.
    """
    rules = RuleTable((*mapping.rules, *(rule for variant in mapping.variants for rule in variant.rules)))
    sides = [*(entry.side for entry in mapping.ignore), *(entry.side for entry in mapping.unsupported)]
    owned = [key for key in accepted if rules.find(key) or any(side.match(key) is not None for side in sides)]
    if len(owned) < _LEAST_OWNED * len(accepted):
        count = f"only {len(owned)} of the {len(accepted)} keys" if owned else "none of the keys"
        text = f"{file}: {mapping.name} knows {count} of the file"
        raise DetectionError(text, _near(known, tensors))


def _near(known: Catalogue, tensors: Mapping[str, Layout]) -> list[str]:
    """What the keys look like, for a file that nobody claims."""
    keys = list(tensors)
    shown = ", ".join(f"{key!r} {list(tensors[key].shape)}" for key in keys[:5])
    lines = [f"it holds {len(keys)} tensor{'s' if len(keys) != 1 else ''}: {shown}{' ...' if len(keys) > 5 else ''}"]
    scores = []
    some = {key: tensors[key] for key in keys[:: len(keys) // _LOOKED_AT + 1]}  # all, where they are not too many
    for mapping in known.formats:
        table = RuleTable(tuple(rule for rule in mapping.rules if not rule.rest))
        accepted, _, _ = apply_aliases(mapping, some, {})
        claimed = holds(mapping.detect, accepted) is not None
        scores.append((claimed, sum(table.find(key) is not None for key in accepted), mapping.name))
    _, best, name = max(scores, default=(False, 0, ""))
    if best:
        looked = f"{len(some)} of the " if len(some) < len(keys) else ""
        lines.append(f"nearest is {name}, whose rules know {best} of {looked or 'the '}{len(keys)} keys")
    for prefix in known.containers.prefixes:
        without = [key for key in keys if not key.startswith(prefix)]
        if len(without) < len(keys) / 2:
            told = ", ".join(without[:5])
            lines.append(
                f"{len(keys) - len(without)} keys begin with {prefix!r}, which is cut only where all do: {told}"
            )
    lines.append(f"known formats: {', '.join(sorted(m.name for m in known.formats))}; a new one is a YAML file")
    return lines
