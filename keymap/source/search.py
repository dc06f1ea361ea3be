"""Find the state dicts within a larger one: the prefixes below which the evidence of a format is found.

A file may hold more than the model that is wanted: a text encoder within a diffusion model, an image tower within a
language model, a student and a teacher. One pass over all keys finds the prefixes that are worth a look; the evidence
of the formats decides.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product

from keymap.language.catalogue import Catalogue
from keymap.language.format import Clue, Format
from keymap.language.layout import Layout
from keymap.language.pattern import Side
from keymap.source.detect import file_rules

__all__ = [
    "REFUSED",
    "Reading",
    "below",
    "explains_little",
    "is_tower",
    "owned_keys",
    "prefixes_to_try",
    "shared_starts",
    "tower_prefixes",
]

_SEPARATOR = re.compile("[./]")
_MAX_OTHER_RULES = 3  # of a tower, for keys without its prefix, such as a projection
_MIN_KEYS = 8  # of the smallest tower
_SAMPLE = 24  # keys that tell whether a format explains most of a state dict
_MAX_BEGINNINGS = 32  # of one clue, that its alternatives give

REFUSED = ("", "")  # in place of a reading: a mapping may refuse what is there
Reading = tuple[str, str]  # the name of a format, and the prefix to put before the keys: "" or that of a tower


def tower_prefixes(mapping: Format) -> tuple[str, ...]:
    """What nearly all keys of a tower begin with, as ``visual.``, ``img/`` or ``image_encoder.model.``.

    A tower that is saved alone may lack it.
    """
    if mapping.kind == "hub":  # its aliases read towers without their prefix
        return ()
    found: dict[str, None] = {}
    for tower in mapping.layouts:
        rules = [rule.source.starts for rule in mapping.rules if rule.tower == tower]
        shared = Counter(prefix for starts in rules for prefix in shared_starts(starts) if prefix)
        most = max(shared.values(), default=0)
        if len(rules) - most <= _MAX_OTHER_RULES < most:
            found |= {prefix: None for prefix, count in shared.items() if count == most}
    return tuple(found)


def prefixes_to_try(known: Catalogue, keys: Iterable[str], wanted: str | None) -> dict[str, set[Reading]]:
    """The prefixes of keys below which some clue of a format's evidence begins, and the readings to try there.

    One pass: linear in the number of keys and of the names in them.

    Args:
        known: all mappings.
        keys: of the state dict; names are separated by ``.`` or ``/``.
        wanted: the name of the only format to look for; None for all.
    """
    beginnings: dict[str, list[tuple[str, bool, Reading]]] = {}
    for mapping in known.formats:
        if wanted in (None, mapping.name):
            for start, literal, reading in _beginnings(mapping):
                beginnings.setdefault(_SEPARATOR.split(start)[0], []).append((start, literal, reading))
    for mapping in known.mappings.values():
        for clue in (clue for refusal in mapping.refuse for clue in refusal.when.all):
            for start, literal in _texts(clue.side):
                beginnings.setdefault(_SEPARATOR.split(start)[0], []).append((start, literal, REFUSED))
    found: dict[str, set[Reading]] = {}
    explained: set[str] = set()  # a place and the name there, of which every beginning was found
    for key in keys:
        at = 0
        for name in _SEPARATOR.split(key):
            if name in beginnings and (place := key[: at + len(name)]) not in explained:
                rest = key[at:]
                hits = [
                    reading
                    for text, literal, reading in beginnings[name]
                    if (rest == text if literal else rest.startswith(text))
                ]
                if hits:
                    found.setdefault(key[:at], set()).update(hits)
                if len(hits) == len(beginnings[name]):
                    explained.add(place)
            at += len(name) + 1
    return found


def _beginnings(mapping: Format) -> Iterator[tuple[str, bool, Reading]]:
    """The texts that clues of a format begin with, whether they are whole keys, and the reading that they stand for."""
    clues: list[Clue] = [*mapping.detect.all, *mapping.detect.any]
    for block in mapping.aliases:
        clues += (*block.when.all, *block.when.any) if block.when is not None else ()
    sides = [clue.side for clue in clues]
    sides += [rule.source for block in mapping.aliases if block.when is None for rule in block.table.rules]
    roots = ("", *tower_prefixes(mapping))
    for side in sides:
        for start, literal in _texts(side):
            for root in roots:
                if start.startswith(root) and len(start) > len(root):
                    yield start[len(root) :], literal, (mapping.name, root)


def _texts(side: Side) -> Iterator[tuple[str, bool]]:
    """The literal beginnings of a side, its alternatives written out; with True for a whole key."""
    parts: list[list[str]] = []
    for token in side.tokens:
        if isinstance(token, str):
            parts.append([token])
        elif token.kind == "alts":
            parts.append([text for _, text in token.options])
        else:
            break
    whole = len(parts) == len(side.tokens)
    for texts in islice(product(*parts), _MAX_BEGINNINGS):
        yield "".join(texts), whole


def below(prefix: str, keys: Sequence[str]) -> Sequence[str]:
    """The keys that begin with a prefix; ``keys`` are sorted."""
    start = bisect_left(keys, prefix)
    return keys[start : bisect_left(keys, prefix + "\U0010ffff", start)]


def shared_starts(prefixes: Sequence[str]) -> list[str]:
    """What all prefixes begin with, up to a separator: the longest first, "" last."""
    shortest = min(prefixes, key=len)
    ends = [0, *(found.end() for found in _SEPARATOR.finditer(shortest))]
    return [shortest[:end] for end in reversed(ends) if all(prefix.startswith(shortest[:end]) for prefix in prefixes)]


def owned_keys(mapping: Format, tensors: Mapping[str, Layout]) -> set[str]:
    """The source keys that the rules of a format name, those that take any rest of a key left out.

    Args:
        mapping: the format.
        tensors: layouts by the format's own keys.
    """
    sides = [*(entry.side for entry in mapping.ignore), *(entry.side for entry in mapping.unsupported)]
    rules, owned = file_rules(mapping, tensors), set[str]()
    for key, layout in tensors.items():
        found = rules.find(key)
        if (found is not None and not found[0].rest) or any(side.match(key) is not None for side in sides):
            owned.update(layout.named(key))
    return owned


def explains_little(mapping: Format, tensors: Mapping[str, Layout]) -> bool:
    """Whether a format has rules for less than half of these keys; of many keys a sample is looked at."""
    sample = list(tensors)[:: max(1, len(tensors) // _SAMPLE)]
    return 2 * sum(mapping.table.find(key) is not None for key in sample) < len(sample)


def is_tower(mapping: Format, tensors: Mapping[str, Layout]) -> bool:
    """Whether a format has rules for enough of these keys: one key may have its evidence's name by chance."""
    owned = (key for key in tensors if mapping.table.find(key) is not None)
    return len(list(islice(owned, _MIN_KEYS))) == _MIN_KEYS
