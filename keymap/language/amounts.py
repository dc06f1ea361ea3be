"""Numbers in a rule that a model or a file decides: ``text.heads``, ``text.kv_heads * 3``.

A rule is compiled before any model is known. A `ByFact` stands for the number until the rule is applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["Amount", "ByFact", "LackingFactError", "amount_in", "check_known", "facts_of", "parse_amount"]

_BY_FACT = re.compile(r"([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+)(?: ?\* ?([1-9][0-9]{0,8}))?", re.ASCII)


class LackingFactError(ValueError):
    """A rule needs a fact that neither the model, nor the file, nor the caller gives; the message asks for it."""


class ByFact(NamedTuple):
    """A fact, times a number."""

    fact: str
    times: int = 1

    def __str__(self) -> str:
        return self.fact if self.times == 1 else f"{self.fact} * {self.times}"


Amount = int | ByFact


def parse_amount(written: int | str) -> Amount:
    """An amount as a mapping file writes it.

    Raises:
        ValueError: it is neither a number nor a fact.
    """
    if isinstance(written, int):
        return written
    found = _BY_FACT.fullmatch(written)
    if found is None:
        raise ValueError(f"{written!r}: write a number, a fact such as text.heads, or a fact times a number")
    return ByFact(found[1], int(found[2] or 1))


def facts_of(amounts: Iterable[Amount | None]) -> tuple[str, ...]:
    """The facts that amounts name, each once."""
    return tuple(dict.fromkeys(one.fact for one in amounts if isinstance(one, ByFact)))


def check_known(amounts: Iterable[Amount | None], facts: Mapping[str, int]) -> None:
    """Refuse amounts by facts that are not known.

    Raises:
        LackingFactError: with all of them.
    """
    lacking = [one for one in amounts if isinstance(one, ByFact) and one.fact not in facts]
    if lacking:
        lengths = " and ".join(dict.fromkeys(map(str, lacking)))
        is_or_are = f"length {lengths} is" if len(set(lacking)) == 1 else f"lengths {lengths} are"
        given = ", ".join(f"{fact!r}: ..." for fact in facts_of(lacking))
        raise LackingFactError(f"the {is_or_are} not known: pass facts={{{given}}}")


def amount_in(amount: Amount, facts: Mapping[str, int]) -> int:
    """The number, which is at least 1 where a fact decides it.

    Raises:
        LackingFactError: the fact is not known.
        ValueError: the fact is not a positive number.
    """
    if isinstance(amount, int):
        return amount
    check_known([amount], facts)
    value = facts[amount.fact]
    if value < 1:
        raise ValueError(f"the length {amount} is not positive: {amount.fact} is {value}")
    return value * amount.times
