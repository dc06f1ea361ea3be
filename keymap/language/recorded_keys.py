"""The keys of the hub's models, recorded from real ones: they show which target of a rule is misspelt.

The record is a JSON file beside the hub's mapping. It is read when mappings are checked, and not when they are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from keymap.language.pattern import OPEN, Side

__all__ = ["RecordedKeys", "UnknownKey", "keys_of", "read_recorded_keys"]

_MAX_KEYS = 256  # of one target that are looked up
_NEAR_KEY, _NEAR_WORD = 0.7, 0.7  # the least likeness of a misspelt key, or of one word of it
_INDEX, _ANY = r"(\d+)", "*"


class UnknownKey(NamedTuple):
    """A key that the layouts of a rule do not have.

    Attributes:
        key: as a pattern.
        text: what is wrong.
        layouts: those of the tower that have it.
        certain: false for a key that a model of an open layout may have.
    """

    key: str
    text: str
    layouts: tuple[str, ...]
    certain: bool


class RecordedKeys:
    """Keys by tower and layout, with ``(\\d+)`` for each index.

    Layouts whose names come from other libraries are open: a new model may have keys that are not recorded.
    """

    def __init__(self, keys: Mapping[str, Mapping[str, Iterable[str]]], open_layouts: Mapping[str, Iterable[str]]):
        self._keys, self._open = keys, {tower: set(names) for tower, names in open_layouts.items()}
        self._chosen: dict[tuple[str, tuple[str, ...], bool], _Keys] = {}

    def unknown(self, side: Side, tower: str, layouts: tuple[str, ...], further: Iterable[str]) -> Iterator[UnknownKey]:
        """The keys of a side that the layouts do not have, each with the nearest key.

        Args:
            side: the target of a rule.
            tower, layouts: where its keys belong; all layouts of the tower, if none is named.
            further: keys that models lack and files have.
        """
        held = self._keys.get(tower, {})
        names = layouts if layouts and all(name in held for name in layouts) else tuple(held)
        if not held or any(slot.kind == "rest" for slot in side.slots):
            return
        known = self._of(tower, names, further)
        is_open = bool(self._open.get(tower, set()) & set(names))
        about = f"of the model's {tower} tower" + (f" ({', '.join(names)})" if layouts else "")
        for key, form in keys_of(side):
            if known.has(key, form):
                continue
            near = known.misspelt(key) if is_open else known.nearest(key)
            others = tuple(name for name in held if name not in names and self._of(tower, (name,)).has(key, form))
            if near or others or not is_open:
                text = _fault(_shown(key), about, others, near)
                yield UnknownKey(_shown(key), text, others, bool(near) or not is_open)

    def _of(self, tower: str, names: tuple[str, ...], further: Iterable[str] = ()) -> _Keys:
        """The keys of these layouts, and the further keys that are not keys of other layouts."""
        if (tower, names, bool(further)) not in self._chosen:
            keys = {key for name in names for key in self._keys[tower][name]}
            others = {key for name, held in self._keys[tower].items() if name not in names for key in held}
            self._chosen[tower, names, bool(further)] = _Keys([*sorted(keys), *(k for k in further if k not in others)])
        return self._chosen[tower, names, bool(further)]


def _fault(key: str, about: str, layouts: tuple[str, ...], near: str) -> str:
    """What is wrong with a key: the layouts that have it, and the nearest key."""
    other = f", but of layout {' and '.join(layouts)}" if layouts else ""
    return f"'{key}' is not a key {about}{other}" + (f"; did you mean '{near}'?" if near else "")


def read_recorded_keys(file: Path) -> RecordedKeys | None:
    """The record in a JSON file; None where there is no such file."""
    if not file.is_file():
        return None
    data = json.loads(file.read_text(encoding="utf-8"))
    return RecordedKeys(data["keys"], data["open"])


class _Keys:
    """The keys of some layouts, each with 0 for every index."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = dict.fromkeys(key.replace(_INDEX, "0") for key in keys)

    def has(self, key: str, form: str) -> bool:
        return key in self.keys or any(re.fullmatch(form, known) for known in self.keys)

    def nearest(self, key: str) -> str:
        near = get_close_matches(key, self.keys, 1, _NEAR_KEY)
        return _shown(near[0]) if near else ""

    @cached_property
    def words(self) -> set[str]:
        return {word for key in self.keys for word in key.split(".")}

    def misspelt(self, key: str) -> str:
        """The recorded key that differs in one word, where that word is in no recorded key and is like the other."""
        words = key.split(".")
        best, found = _NEAR_WORD, ""
        for known in self.keys:
            others = known.split(".")
            if len(others) != len(words):
                continue
            pairs = zip(words, others, strict=True)
            differing = [(one, other) for one, other in pairs if one != other and _ANY not in one]
            if len(differing) != 1 or differing[0][0] in self.words:
                continue
            one, other = differing[0]
            if re.sub(r"\d+", "", one) == re.sub(r"\d+", "", other):  # a further norm or layer, not a slip
                continue
            alike = SequenceMatcher(None, one, other).ratio()
            if alike > best:
                best, found = alike, ".".join(other if word == one else word for word in words)
        return _shown(found)


def keys_of(side: Side) -> Iterator[tuple[str, str]]:
    """Every key of a side, with 0 for an index and * for a name; and a regular expression of the keys it matches."""
    choices = [[text for _, text in slot.options] if slot.kind == "alts" else [""] for slot in side.slots]
    for number, chosen in enumerate(product(*choices)):
        if number == _MAX_KEYS:
            return
        key, form, texts = "", "", iter(chosen)
        for token in side.tokens:
            text = token if isinstance(token, str) else next(texts)
            if isinstance(token, str) or token.kind == "alts":
                key, form = key + text, form + re.escape(text)
            elif token.kind == "path":
                form += OPEN["path"][0]
            else:
                index = token.kind == "int"
                key, form = key + ("0" if index else _ANY), form + ("[0-9]+" if index else "[^.]+")
        indices = r"(?<![^.])[0-9]+(?![^.])"
        yield re.sub(indices, "0", key), re.sub(r"(?<![^.])[0-9]+(?![^\\])", "[0-9]+", form)


def _shown(key: str) -> str:
    """A key as a pattern."""
    return re.sub(r"(?<![^.])0(?![^.])", lambda _: _INDEX, key).replace(_ANY, r"(\w+)")
