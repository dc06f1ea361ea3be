"""A compiled mapping file as frozen data: evidence, rules, and the fields of the hub and of containers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import eq
from typing import Any, NamedTuple
from zlib import crc32

from keymap.language.pattern import Side
from keymap.language.rules import Rule, RuleTable
from keymap.language.shape_form import Form, written_form

__all__ = [
    "Absence",
    "Absences",
    "Alias",
    "Attribute",
    "Clue",
    "Computed",
    "Config",
    "Configuration",
    "Containers",
    "Evidence",
    "Fact",
    "Format",
    "Ignored",
    "Kept",
    "Length",
    "Place",
    "Position",
    "Refusal",
    "Repository",
    "Scalar",
    "Template",
    "Unsupported",
    "Variant",
    "as_size",
    "as_word",
    "config_text",
    "ignored_in_model",
]

Scalar = str | int | float | bool | tuple[int, int]  # a pair is (height, width)
_MAX_LIST = 120  # characters of a list of words; of a longer one the rest is a digest


class Absence(NamedTuple):
    """The value that a key's absence means; with ``always`` it is filled even where a format has a place for it.

    With ``together``, a file of the hub may lack all keys that this side matches, and not some of them.
    """

    value: float | str
    always: bool = False
    together: Side | None = None


def config_text(value: object) -> str:
    """A value as a configuration file writes it."""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_word(value: Any) -> Any:
    """A list of words, such as the kind of each layer, as one word: what repeats, once; any other value as it is.

    Two lists of one length have the same word if they are equal.
    """
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
        return value
    period = next(n for n in range(1, len(value) + 1) if all(map(eq, value[n:], value)))
    runs = [(len(list(run)), word) for word, run in groupby(value[:period])]
    text = ", ".join(word if count == 1 else f"{count} {word}" for count, word in runs)
    return text if len(text) <= _MAX_LIST else f"{text[:_MAX_LIST]}... ({crc32(text.encode()):08x})"


def as_size(value: Any) -> Any:
    """Two whole numbers as (height, width), or as the side of a square; any other value as it is."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(side) is not int for side in value):
        return value
    return value[0] if value[0] == value[1] else (value[0], value[1])


class Clue(NamedTuple):
    """A pattern that some key matches; with ``ndim`` its tensor has that many axes, with ``form`` that shape."""

    side: Side
    ndim: int | None = None
    form: Form | None = None

    def __str__(self) -> str:
        if self.form is not None:
            return f"{self.side} of shape {written_form(self.form)}"
        return str(self.side) if self.ndim is None else f"{self.side} with {self.ndim} axes"


class Evidence(NamedTuple):
    all: tuple[Clue, ...] = ()
    any: tuple[Clue, ...] = ()
    none: tuple[Clue, ...] = ()


class Alias(NamedTuple):
    """Rules from other names of a format's keys to those that it writes, and the evidence under which they apply."""

    when: Evidence | None
    table: RuleTable


class Ignored(NamedTuple):
    """Keys without weights: the reason, and the key whose values they must repeat, if the mapping names one."""

    side: Side
    why: str
    same_as: Side | None = None


class Unsupported(NamedTuple):
    """Keys of a tower that no model of the hub has a place for, and why."""

    side: Side
    tower: str
    why: str


class Refusal(NamedTuple):
    """Evidence of a file that cannot be loaded, and what it is; ``contains`` are substrings of keys, one is enough.

    With ``elsewhere`` such a key counts in other parts of the file, too, if it names a weight that is loaded.
    """

    why: str
    when: Evidence
    contains: tuple[str, ...] = ()
    elsewhere: bool = False


class Variant(NamedTuple):
    """Rules, and settings that the format's code fixes, under a condition on the file's keys, or on the hub's."""

    when: Evidence
    when_hub: Evidence
    rules: tuple[Rule, ...]
    fixed: Mapping[str, Scalar] = {}


class Position(NamedTuple):
    """A position embedding: ``lead`` axes of length one, prefix rows, then a grid or a line, then the width.

    Attributes:
        key: the hub's.
        lead: how many axes of length one come first.
        grid: True for rows of an image grid, False for a line of text positions.
        prefix: how many rows come before the grid, or the keys whose tensors bring them.
        apart: the grid has two separate axes, ``1 h w d``, so its shape shows it.
        grid_fact: the fact that gives the model's grid (h, w).
        patch: the key of the hub's weight whose last two axes are the sides of a patch in pixels; "" for none.
        method: how it is resampled, by torch's name.
    """

    key: str
    lead: int
    grid: bool
    prefix: int | tuple[str, ...]
    apart: bool = False
    grid_fact: str = ""
    patch: str = ""
    method: str = "linear"


class Place(NamedTuple):
    """Where a configuration holds a value.

    Attributes:
        path: keys with dots between them.
        words: the hub's words for its values; None for a value that says nothing, after which no place is read.
        unless: a path that the file must not have, or whose value must be false, null or empty.
        only_if: a path that the file must have, with another value than false, null or empty.
        outside: sections that the file must not have if this place is read.
        others: with ``words``, what a value without a word means: "unknown" differs from every value of a model,
            "ignore" says nothing.
        other_word: the word for every value without one, instead of ``others``.
        minus: a path whose number is subtracted, and the number that is used if the file has none; "" for no path.
    """

    path: str
    words: Mapping[str, Scalar | None] = {}
    unless: str = ""
    outside: tuple[str, ...] = ()
    others: str = "unknown"
    other_word: Scalar | None = None
    minus: tuple[str, int] = ("", 0)
    only_if: str = ""


class Config(NamedTuple):
    """A format's configuration: where it holds the image grid, and settings that weights do not show.

    ``file`` is the name of a file, ``inside`` that of a dict in the checkpoint; one of them may be empty. ``defaults``
    are what the format's code takes where a configuration leaves a fact out; ``model_types`` the values of
    ``model_type``, in the file or in a section, that belong to the format; ``distinguishes`` the formats with the same
    keys that ``model_type`` tells apart; ``model`` the attribute of a model in memory that holds the same.
    """

    file: str
    image_size: tuple[Place, ...] = ()
    patch_size: tuple[Place, ...] = ()
    facts: Mapping[str, tuple[Place, ...]] = {}
    defaults: Mapping[str, Scalar] = {}
    model_types: tuple[str, ...] = ()
    distinguishes: tuple[str, ...] = ()
    inside: str = ""
    model: str = ""


class Length(NamedTuple):
    """A number that the tensors of a format show.

    Attributes:
        side: the key, or a pattern; None if it is wrong.
        axis: the axis whose length it is; None for the number of keys that match.
        exists: whether there is such a key, instead of a number.
        pick: of several keys "shortest", the smallest length, or "longest", the indices of those with the largest; ""
            for the first key.
    """

    side: Side | None
    axis: int | None
    exists: bool = False
    pick: str = ""

    def __str__(self) -> str:
        return f"{self.side}" if self.axis is None else f"{self.side}[{self.axis}]"


class Computed(NamedTuple):
    """A value in a file of a folder, which keymap computes when it writes the folder.

    Attributes:
        fact: the hub's name of a setting; "" for a value that tensors show.
        side: "height" or "width" of a setting that may have both; "" for the setting.
        length: what tensors show; None without a fact for a fixed ``value``.
        value: one that is written as it is.
        words: the file's values by the hub's words.
        others: what is taken if the fact is not known, or has no word.
        minus, per: subtracted; a whole number to divide by.
        square: whether to take the side of a square with so many elements.
        grid: "square" or "any" for a number of positions: take the side of their grid, or (h, w) of one that is not
            square. With "square" the format has no other images.
        times: multiplied by.
        divide: a fact to divide by, or a length.
        over: what the number is divided by, as a fraction.
        absent: the value if there is no such key; None leaves it out.
        optional: left out if the fact is not known or has no word.
        divides: a length that the value must divide.
        agrees: another computed value, which must be the same.
    """

    fact: str
    length: Length | None
    value: Scalar | None = None
    words: Mapping[str, Scalar | None] = {}
    others: Computed | None = None
    minus: int = 0
    per: int = 1
    square: bool = False
    grid: str = ""
    times: Length | int = 1
    divide: str | Length = ""
    over: Length | None = None
    absent: Scalar | None = None
    optional: bool = False
    divides: Length | None = None
    agrees: Computed | None = None
    side: str = ""


class Cases(NamedTuple):
    """A value or a section that depends on which keys are written, or on a setting.

    Attributes:
        cases: by key, that of the first that is there; of a setting by its value, "null" where it is not known.
        fact: the hub's name of the setting; "" for keys.
    """

    cases: tuple[tuple[Side | None, Template], ...]
    fact: str = ""


class Kept(NamedTuple):
    """A value that no weight shows, as the source has it.

    Attributes:
        paths: in the source's own file of the same name, if it is of the same format; the first that it has counts.
        shared: the hub's other formats have it there, too.
        others: what is taken where it is not known.
        attributes: of a model in memory; the first that it has counts.
        label: what it is, for a note where it is not known; "" for no note.
        only: a fact without which the value does not matter; "" for none.
        none_is_null: None of a model is a value.
    """

    paths: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    label: str = ""
    only: str = ""
    none_is_null: bool = False
    shared: bool = False
    others: Computed | None = None


Template = Any  # a dict or a list of templates, a Computed, Cases, Kept, or a value that is written as it is


class Alike(NamedTuple):
    """Facts that must be equal.

    Attributes:
        facts: by the hub's names.
        when: evidence on the keys that are written; without it they may differ.
    """

    facts: tuple[str, ...]
    when: Evidence = Evidence()


class Repository(NamedTuple):
    """A folder in a format's own layout.

    Attributes:
        weights: the name of the file with the weights.
        files: JSON files by name.
        requires: the values that settings must have, by the hub's names: the format's code allows no others.
        when: evidence on the keys that are written; without it there is no folder.
        alike: groups of facts that must be equal, because the files have one value for them.
        refuse: evidence on the keys that are written of what no class of the format opens, and what to do.
        instead: of a required setting, other settings and their values; with one of them it need not be known.
        one_file: the weights are one file; what reads the folder knows no shards.
        alone: sections of the files; a file in which one of them is there alone holds what is in that section.
        none: why there is no such folder; "" where there is one.
    """

    weights: str
    files: Mapping[str, Template]
    requires: Mapping[str, tuple[Scalar, ...]] = {}
    when: Evidence = Evidence()
    alike: tuple[Alike, ...] = ()
    refuse: tuple[Refusal, ...] = ()
    one_file: bool = False
    instead: Mapping[str, Mapping[str, Scalar]] = {}
    alone: tuple[str, ...] = ()
    none: str = ""


class Attribute(NamedTuple):
    """Where a model holds a setting.

    Attributes:
        path: dotted.
        divide: a number, or the path of a number, to divide by.
        word: the setting where the attribute holds anything, instead of its value; None for its value.
    """

    path: str
    divide: int | str = 1
    word: Scalar | None = None


class Fact(NamedTuple):
    """A setting that weights do not show, and where a model holds it.

    Attributes:
        paths: of attributes; the first that the model has is taken.
        label: in words; facts without one are not compared. Facts with one label say the same in other units.
        change: the setting of the hub's configuration that determines it.
        words: from the values to keymap's words; a module is named by its class.
        present: the fact is whether the attribute holds anything.
        only: facts of the model under which this one matters.
        formerly: the name that the fact had before.
        width_per: the fact is the width of its tower divided by this one; "" for none.
        kind: what its value is: a count from 1 on, an index from 0 on, a size (a count, or height and width), a
            positive number, a flag or a word; "" for any.
    """

    paths: tuple[Attribute, ...]
    label: str = ""
    change: str = ""
    words: Mapping[str, Scalar] = {}
    present: bool = False
    only: Mapping[str, Scalar] = {}
    formerly: str = ""
    kind: str = ""
    width_per: str = ""


class Configuration(NamedTuple):
    """Configurations of the hub's models that share all shapes but those of positions.

    Attributes:
        fingerprints: of each tower, see `describe`.
        names: the configurations, each with the number of positions of its towers, in the order of the fingerprints.
        facts: by the configuration's name, the names that it gives its towers: facts that no weight shows.
    """

    fingerprints: Mapping[str, str]
    names: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Mapping[str, Scalar]] = {}


@dataclass(frozen=True)
class Containers:
    """What training code puts around a state dict.

    Attributes:
        wrappers: names that hold a state dict, the preferred first.
        prefixes: of wrapper classes and names of models, cut from keys where every key has them.
        segments: names that a wrapper class puts into the middle of keys; cut everywhere.
        counters: numbers that a training class keeps beside a model.
        training_state: names that show a training state without weights.
        files: in a folder, the names of checkpoints, the preferred first, each with what it is.
        float8_beside, float8_marks: last words of keys beside a weight that are no scales, and names of marks.
        float8_words: texts in names near the top of a file that speak of scales for float8 weights.
        empty_beside: entries beside a state dict that has no values, and what to do.
        weight_norms: ends of the keys (length, direction, weight) of weights that are stored as length and direction.
        training_files: names of files in a folder that hold no weights.
        folders: names of files that show a folder which cannot be read, with what to do.
    """

    wrappers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    training_state: tuple[str, ...] = ()
    files: tuple[tuple[Side, str], ...] = ()
    folders: tuple[tuple[Side, str], ...] = ()
    weight_norms: tuple[tuple[str, str, str], ...] = ()
    training_files: tuple[Side, ...] = ()
    empty_beside: tuple[tuple[str, str], ...] = ()
    float8_beside: tuple[str, ...] = ()
    float8_marks: tuple[str, ...] = ()
    float8_words: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Absences:
    """What absent keys of a hub mean: by key, and by patterns."""

    keys: Mapping[str, Absence] = field(default_factory=dict)
    patterns: tuple[tuple[Side, Absence], ...] = ()

    def get(self, key: str) -> Absence | None:
        """What it means that a key is absent; None if that has no meaning."""
        found = self.keys.get(key)
        if found is None and self.patterns:
            return next((value for side, value in self.patterns if side.match(key) is not None), None)
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Format:
    """One mapping file, compiled. Fields are as in the schema.

    Attributes:
        hub: the hub that the file names; "" if it names none.
        by_name: it has no evidence: only a caller who names it, or its hub, gets it.
        steps: rules that are applied before those of the towers, in order, and inverted after them.
        rules: those of all towers.
        layouts: of each tower, the layouts that the rules lead to; of the hub, all that it knows.
        layout_evidence: (hub) the evidence of each layout of a tower.
        heads: (hub) keys that a tower can lack and still be whole.
        classifiers: (hub) keys that a file can have beside a tower, and without which the tower is the same.
        fills: keys of the hub that the format's loader needs, each with another key and the axis that has its length.
        make_repository: compiles `repository`, which only the writing of a folder needs.
        tower, between: (bridge) the tower, and the two layouts that the rules join.
    """

    name: str
    kind: str
    title: str
    file: str
    hub: str = ""
    by_name: bool = False
    reference: str = ""
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    detect: Evidence = field(default_factory=Evidence)
    ignore: tuple[Ignored, ...] = ()
    unsupported: tuple[Unsupported, ...] = ()
    refuse: tuple[Refusal, ...] = ()
    aliases: tuple[Alias, ...] = ()
    steps: tuple[RuleTable, ...] = ()
    rules: tuple[Rule, ...] = ()
    variants: tuple[Variant, ...] = ()
    dtypes: tuple[tuple[Side, str], ...] = ()
    shapes: tuple[tuple[Side, tuple[int, ...]], ...] = ()
    config: Config | None = None
    fixed: Mapping[str, Scalar] = field(default_factory=dict)
    fills: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    make_repository: Callable[[], Repository | None] = lambda: None
    tower: str = ""
    between: tuple[str, ...] = ()
    layout_evidence: Mapping[str, Mapping[str, Evidence]] = field(default_factory=dict)
    written_as: Mapping[str, str] = field(default_factory=dict)
    scalars: frozenset[str] = frozenset()
    heads: tuple[Side, ...] = ()
    classifiers: tuple[Side, ...] = ()
    optional_buffers: frozenset[str] = frozenset()
    absent_means: Absences = field(default_factory=Absences)
    file_only: frozenset[str] = frozenset()
    positions: Mapping[str, Position] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    causal_masks: frozenset[str] = frozenset()
    measures: Mapping[str, Mapping[str, tuple[tuple[Side, int | None], ...]]] = field(default_factory=dict)
    configurations: tuple[Configuration, ...] = ()
    containers: Containers = field(default_factory=Containers)

    @cached_property
    def repository(self) -> Repository | None:
        """The folder in the format's own layout; None if keymap writes none."""
        return self.make_repository()

    @cached_property
    def table(self) -> RuleTable:
        """The rules, those of variants left out."""
        return RuleTable(self.rules)

    @cached_property
    def back(self) -> RuleTable:
        """The way back of ``table``."""
        return self.table.inverse()

    @cached_property
    def prepares_by_facts(self) -> bool:
        """Whether aliases or steps need facts."""
        tables = (*(block.table for block in self.aliases), *self.steps)
        return any(rule.facts for table in tables for rule in table.rules)

    @cached_property
    def _left_out(self) -> re.Pattern[str] | None:
        """Matches what any pattern of `ignore` or `unsupported` matches, so most keys cost one match."""
        sides = [*(entry.side for entry in self.ignore), *(entry.side for entry in self.unsupported)]
        return re.compile("|".join(f"(?:{side.regex})" for side in sides), re.DOTALL) if sides else None

    @cached_property
    def may_leave_out(self) -> Callable[[str], object]:
        """Of a key, whether `ignore` or `unsupported` has a pattern for it, as a true or false value."""
        return self._left_out.fullmatch if self._left_out is not None else lambda key: False

    def ignored(self, key: str) -> tuple[str, str] | None:
        """Why a key has no weights, and the key that it must repeat (empty for none); None for other keys."""
        for entry in self.ignore:
            values = entry.side.match(key)
            if values is not None:
                return entry.why, entry.same_as.write(values) if entry.same_as is not None else ""
        return None


def ignored_in_model(hub: Format, mapping: Format, key: str) -> tuple[str, str] | None:
    """Why a key of a model holds no weights, and the key that it must repeat; None for other keys.

    A hub for any model knows no names, so there ``ignore`` of the format names keys of the model, too, if no rule does.
    """
    found = hub.ignored(key)
    if found is not None or not hub.by_name or mapping.kind != "format":
        return found
    return mapping.ignored(key) if mapping.back.find(key) is None else None
