"""Faults of rules, and what follows from them: one cause is reported once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from keymap.language.rules import Fault, Rule, RuleTable
from keymap.plan.to_hub import Translated

__all__ = ["RuleFaults", "with_lacking_facts_once"]

_PASS_FACTS = re.compile(r"pass facts=\{([^}]*)\}")
_VARYING = re.compile(r"\[[^\]]*\]|[0-9]+")  # shapes and numbers


def with_lacking_facts_once(faults: Sequence[Fault]) -> list[Fault]:
    """The faults; those of rules that lack a fact of the caller are one, which names every such fact."""
    lacking: dict[str, None] = {}
    others: list[Fault] = []
    sources: list[str] = []
    first: Fault | None = None
    for fault in faults:
        found = _PASS_FACTS.search(fault.text)
        if found is None:
            others.append(fault)
            continue
        first = first or fault
        sources += fault.sources
        lacking.update(dict.fromkeys(found[1].split(", ")))
    if first is None:
        return others
    place = first.text.partition(": rule ")[0]
    text = (
        f"the shapes do not show everything: pass facts={{{', '.join(lacking)}}} ({len(faults) - len(others)} keys or "
        f"rules need it, the first at {place})"
    )
    return [first._replace(text=text, sources=tuple(sources)), *others]


class RuleFaults:
    """The faults of the rules of a file's format.

    Attributes:
        places: where these rules are.
    """

    def __init__(self, translated: Translated, faults: Sequence[Fault]) -> None:
        self._faults = faults
        self._rules: dict[int, Rule] = {}  # of each fault by its number
        self._failed: dict[Rule, list[dict[str, str]]] = {}  # the captures of the keys that a rule fails for
        self._values: dict[tuple[Rule, tuple[str, ...]], set[tuple[str, ...]]] = {}
        if any(fault.sources for fault in faults):
            self._find(translated)
        self.places = {rule.place for rule in self._failed}

    def _find(self, translated: Translated) -> None:
        table = RuleTable(translated.rules)
        keys = {source: key for key, layout in translated.source_keys.items() for source in layout.named(key)}
        for number, fault in enumerate(self._faults):
            for source in fault.sources:
                found = table.find(keys.get(source, source))
                if fault.tower and found is not None and fault.text.startswith(f"{found[0].place}: "):
                    self._rules[number] = found[0]
                    self._failed.setdefault(found[0], []).append(found[1])

    def explain(self, key: str) -> bool:
        """True for a key of the hub that a rule with a fault would make."""
        for rule, failed in self._failed.items():
            for side in rule.targets:
                values = side.match(key)
                if values is None:
                    continue
                names = tuple(name for name in side.variables if name in failed[0])  # without those that a cut adds
                if (rule, names) not in self._values:
                    self._values[rule, names] = {tuple(captures[name] for name in names) for captures in failed}
                if tuple(values[name] for name in names) in self._values[rule, names]:
                    return True
        return False

    def absent_members(self) -> Iterator[str]:
        """Source keys that a join with a fault lacks: the other members of one whose member is in the file."""
        for rule, failed in self._failed.items():
            members = rule.join.members if rule.join is not None else ()
            for captures in failed if members else ():
                for member in members:
                    if member is not None and rule.join is not None:
                        yield rule.source.write({**captures, rule.join.variables[-1]: member})

    def merged(self, following: Mapping[str, str]) -> list[Fault]:
        """All faults; those of one rule that have one reason are one, as of a table that two towers use.

        Args:
            following: for the place of a rule, what else follows from its fault.
        """
        merged: dict[tuple[str | int, str], Fault] = {}
        for number, fault in enumerate(self._faults):
            rule = self._rules.get(number)
            if rule is None:
                merged[number, ""] = fault
                continue
            start = f"{rule.place}: rule {rule.text}: "
            alike = rule.place, _VARYING.sub("#", fault.text.removeprefix(start).partition(" (from ")[0])
            first = merged.setdefault(alike, fault)
            if first is not fault:
                same = f"; the same in the {fault.tower} tower"
                text = first.text.removesuffix(same) + same
                sources, fatal = (*first.sources, *fault.sources), first.fatal or fault.fatal
                merged[alike] = first._replace(text=text, sources=sources, fatal=fatal)
        left: dict[str | int, str] = dict(following.items())
        return with_lacking_facts_once(
            [
                fault._replace(text=f"{fault.text}; also {left.pop(place)}") if place in left else fault
                for (place, _), fault in merged.items()
            ]
        )
