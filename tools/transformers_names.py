"""The names of a checkpoint that transformers' conversions read, for every name of a model.

transformers renames the keys of a file by regular expressions, one after the other. This module goes the opposite way:
for a name of the model it finds a name that those expressions turn into it. It never trusts an inverted expression:
transformers' own code must turn what was found into the name of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, islice
from typing import Any, NamedTuple

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    GroupWeightRename,
    Inkling2IndexOffsetWeightRename,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    rename_source_key,
)

__all__ = ["MEMBER", "Conversion", "Use", "conversions"]

MEMBER = "\x02"  # stands for the number of an expert, or of another member of a list, in a name
_VALUE = "\\1"  # what the group of a source pattern holds, in a target
_TRIED = 50  # names that are compared
_NUMBER = "987654321"  # in its place where transformers' code reads the name


# Names of files that transformers' unanchored patterns would also change: by the class of a model, the renaming that is
# for other names, and how the names of the model begin that files have as they are.
KEPT: dict[str, tuple[tuple[str, str], ...]] = {
    "Kimi_K25ForConditionalGeneration": (("blocks", "model.language_model."),),
    "Sam3TrackerModel": (("tracker_model.(.+)", "vision_encoder."),),
    "Sam3TrackerVideoModel": (("tracker_model.(.+)", "vision_encoder."),),
}


class Use(NamedTuple):
    """One use of a converter, or of no converter, in one model.

    Attributes:
        files: the names in the file, one for each source pattern of the converter; one without a converter.
        models: the names in the model, in the order of the converter's target patterns.
        converter: None where the key is only renamed.
    """

    files: tuple[str, ...]
    models: tuple[str, ...]
    converter: Any = None


class Conversion(NamedTuple):
    """All that transformers does when it reads a file for one model.

    Attributes:
        uses: the names of the file and of the model.
        lost: names of the model that no name of a file becomes, and why.
        converters: all converters of the model, also those that none of its names needs.
        moved: how many names gain or lose the prefix of the base model.
        renamings: how many were undone.
    """

    uses: tuple[Use, ...]
    lost: Mapping[str, str]
    converters: tuple[Any, ...]
    moved: int = 0
    renamings: int = 0

    @property
    def unique(self) -> bool:
        """Whether no name of a file is used twice."""
        names = [name for use in self.uses for name in use.files]
        return len(set(names)) == len(names)


@cache
def _parts(pattern: str) -> tuple[tuple[str, str], ...]:
    """The parts of a regular expression that have a width; text that follows text is one part."""
    return tuple(
        part
        for kind, group in groupby(_pieces(pattern), key=lambda part: part[0])
        for part in ([(kind, "".join(text for _, text in group))] if kind == "text" else group)
    )


def _pieces(pattern: str) -> Iterator[tuple[str, str]]:
    """The parts of a regular expression: ``text``, ``group`` with what it matches, or ``drop`` what has no width."""
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "(":
            depth, end = 0, at
            while True:
                step = pattern[end]
                depth += (step == "(") - (step == ")")
                if not depth:
                    break
                end += 2 if step == "\\" else 1
            body = pattern[at + 1 : end]
            if body.startswith("?:"):
                yield from _pieces(body[2:])
            elif not body.startswith("?"):
                yield "group", body
            at = end + 1
        elif char == "\\":
            yield "text", pattern[at + 1]
            at += 2
        else:
            if char not in "^$":
                yield "text", char
            at += 1


def _text(pattern: str, captured: str, member: str) -> str:
    """The shortest text that a source pattern matches, with the value of its group; ``*`` stands for a member."""
    parts = (captured if kind == "group" else text for kind, text in _parts(pattern))
    return "".join(parts).replace("*", member)


def _group(pattern: str) -> str:
    """What the group of a source pattern matches; empty without a group."""
    body = next((text for kind, text in _parts(pattern) if kind == "group"), "")
    return body.replace("^", "")


@cache
def _wanted(source: str, target: str) -> re.Pattern[str]:
    """Finds the places where a renaming may have put its target."""
    value = f"(?P<value>{_group(source)})" if _group(source) else ""
    return re.compile(f"(?=(?P<all>{value.join(re.escape(part) for part in target.split(_VALUE))}))")


def _starts(transform: Any, name: str) -> Iterator[str]:
    """The beginnings of a name that a transform of a part of the model leaves as they are."""
    if transform.scope_prefix is None:
        yield ""
        return
    scope = f"{transform.scope_prefix}." if transform.scope_prefix else ""
    base = f"{transform.base_model_prefix}." if transform.base_model_prefix else ""
    yield from (start for start in dict.fromkeys((base + scope, scope)) if name.startswith(start))


def _renamed(renaming: Any, name: str) -> str:
    if isinstance(renaming, GroupWeightRename):
        renaming._active = True
    new: str = renaming.rename_source_key(name)[0]
    return new


def _pairs(renaming: Any) -> list[tuple[str, str]]:
    if isinstance(renaming, GroupWeightRename):
        return list(zip(renaming.source_patterns, renaming.target_patterns, strict=True))
    return [(source, renaming.target_patterns[0]) for source in renaming.source_patterns]


def _before(renaming: Any, name: str) -> Iterator[str]:
    """Other names that one renaming turns into this name."""
    shift = renaming.offset if isinstance(renaming, Inkling2IndexOffsetWeightRename) else 0
    for start in _starts(renaming, name):
        rest = name[len(start) :]
        for source, target in _pairs(renaming):
            for match in _wanted(source, target).finditer(rest):
                value = match.groupdict().get("value") or ""
                value = str(int(value) - shift) if shift and value else value
                old = rest[: match.start()] + _text(source, value, _NUMBER) + rest[match.start() + len(match["all"]) :]
                if old != rest and _renamed(renaming, start + old) == name:
                    yield start + old


def _originals(renamings: Sequence[Any], name: str) -> Iterator[tuple[str, int]]:
    """Names that all renamings together turn into this one, with the number of renamings that change them.

    The name that most of them changed comes first: it is the oldest one.
    """
    if not renamings:
        yield name, 0
        return
    *earlier, last = renamings
    for old in _before(last, name):
        for original, count in _originals(earlier, old):
            yield original, count + 1
    if _renamed(last, name) == name:
        yield from _originals(earlier, name)


class _Reader:
    """transformers' reading of one model's files.

    Attributes:
        moved: files have, or lack, the prefix of the base model where the model does not.
    """

    def __init__(self, model: Any, moved: bool = False) -> None:
        self.moved, self.shifted, self.undone = moved, 0, 0
        self.state: Mapping[str, Any] = model.state_dict()
        self.base: str = model.base_model_prefix
        self.within = hasattr(model, self.base)  # the base model is a part of the model
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self.renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self.patterns = " ".join(_text(source, "", "") for one in self.renamings for source in one.source_patterns)
        self.kept = next((kept for kind, kept in KEPT.items() if kind == type(model).__name__), ())
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def reads(self, name: str) -> tuple[str, str | None]:
        """The name of the model that a name of a file becomes, and the converter's pattern."""
        for renaming in self.renamings:
            if isinstance(renaming, GroupWeightRename):
                renaming._active = True
        name = name.replace(MEMBER, _NUMBER)
        new, pattern = rename_source_key(name, self.renamings, self.converters, self.base, self.state)
        if new not in self.state and name in self.state:
            return name, None
        return new, pattern

    def original(self, name: str, becomes: str, pattern: str | None) -> tuple[str, int] | None:
        """The oldest name that becomes this one, and the number of renamings; None if there is none.

        The number is -1 for a name that transformers reads only because no renaming leads to the model.
        """
        undone = [one for one in self.renamings if not self.keeps(one, name)]
        found = []
        for old, count in islice(_originals(undone, name), _TRIED):
            old = old.replace(_NUMBER, MEMBER)
            if self.reads(old) == (becomes, pattern):
                found.append((self.repeats(old), -count, old.count("."), old))
                if len(found) == 1 and self.repeats(old) <= self.repeats(becomes):
                    break
        if not found and pattern is None and self.reads(becomes) == (becomes, None):
            return becomes, -1  # the renamings would change it, so transformers leaves it as it is
        return (min(found)[3], -min(found)[1]) if found else None

    def repeats(self, name: str) -> bool:
        """Whether a name begins with one segment twice; names of files do only where a pattern does."""
        for one in (name, name.removeprefix(f"{self.base}.")):
            first, second = (*one.split("."), "")[:2]
            if first == second and f"{first}.{first}" not in self.patterns:
                return True
        return False

    def keeps(self, renaming: Any, name: str) -> bool:
        """Whether files have this name as it is after a renaming, which is for other names."""
        return any(name.startswith(start) and renaming.source_patterns[0] == source for source, start in self.kept)

    def bases(self, name: str) -> Iterator[str]:
        """The name as it may be before transformers adds or removes the prefix of the base model."""
        names = [name]
        if self.base and not self.within:
            names.append(f"{self.base}.{name}")
        elif self.base and name.startswith(f"{self.base}."):
            names.append(name.removeprefix(f"{self.base}."))
        yield from reversed(names) if self.moved else names
        if self.within:
            yield f"{self.base}.{name}"

    def renaming(self, name: str) -> Use | None:
        """The use without a converter that makes a name of the model."""
        best = self.oldest(name, name, None)
        return Use((best,), (name,)) if best is not None else None

    def oldest(self, name: str, becomes: str, pattern: str | None) -> str | None:
        """A name that a renaming changes; without one a name that none changes, None if there is none."""
        best: tuple[str, int] | None = None
        for base in self.bases(name):
            right = pattern is None or apply_converters(base, self.converters)[1] == pattern
            found = self.original(base, becomes, pattern) if right else None
            if found is not None and found[1] > 0 and (best is None or best[1] < 0 or not self.odd(base, name)):
                self.shifted += base != name
                self.undone += found[1]
                return found[0]
            if found is not None and (best is None or base == name):
                best = found
        return best[0] if best is not None else None

    def odd(self, base: str, name: str) -> bool:
        """Whether a prefix is added that the model has already: for a name that transformers takes for another one."""
        return self.within and base == f"{self.base}.{name}"

    def converting(self, name: str) -> Use | None:
        """The use of a converter that makes a name of the model; of several, of the one with the longest pattern."""
        around = (one for converter in self.converters for one in _around(converter, name))
        for converter, _, sources, targets in sorted(around, key=lambda one: -one[1]):
            if all(target in self.state for target in targets):
                use = self.converted(converter, sources, targets)
                if use is not None:
                    return use
        return None

    def converted(self, converter: Any, sources: Sequence[str], targets: Sequence[str]) -> Use | None:
        files = []
        for source, pattern in zip(sources, converter.source_patterns, strict=True):
            best = self.oldest(source, targets[0], pattern)
            if best is None:
                return None
            files.append(best)
        return Use(tuple(files), tuple(targets), converter)


def _around(converter: Any, name: str) -> Iterator[tuple[Any, int, list[str], list[str]]]:
    """The converter, the length of its target that is in this name, and the names that it reads and writes."""
    for start in _starts(converter, name):
        rest = name[len(start) :]
        for target in converter.target_patterns:
            for match in re.finditer(re.escape(target) + (r"(?!\w)" if target[-1:].isalnum() else ""), rest):
                before, after = start + rest[: match.start()], rest[match.end() :]
                sources = [before + _text(one, "", _NUMBER) + after for one in converter.source_patterns]
                yield converter, len(target), sources, [before + one + after for one in converter.target_patterns]


def conversions(model: Any, skip: frozenset[str] = frozenset()) -> Conversion:
    """What transformers does when it reads a file for this model, which may be on the meta device.

    Args:
        model: a model of transformers.
        skip: names of the model that a file does not hold.
    """
    found = [_read(_Reader(model), skip)]
    if found[0].moved:
        found.append(_read(_Reader(model, moved=True), skip))
    return max(found, key=lambda one: (one.unique, one.renamings))


def _read(reader: _Reader, skip: frozenset[str]) -> Conversion:
    uses: list[Use] = []
    lost: dict[str, str] = {}
    done = set(skip)
    for name in reader.state:
        if name in done:
            continue
        use = reader.converting(name) or reader.renaming(name)
        if use is None:
            lost[name] = "no name of a file becomes it"
            continue
        done.update(use.models)
        uses.append(use)
    return Conversion(tuple(uses), lost, tuple(reader.converters), reader.shifted, reader.undone)
