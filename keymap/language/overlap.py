"""Decides whether two patterns share a key, for all keys and not for samples: no two rules may own one key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from keymap.language.pattern import OPEN, Effort, Side, Slot

__all__ = ["alike", "overlap"]

_digit = OPEN["int"][1]
_Class = str | Callable[[str], bool]  # one character, or a predicate
_Automaton = tuple[list[list[tuple[_Class, int]]], list[list[int]], int]
_SAMPLES = "1a_-/.:#"


class _States(NamedTuple):
    """The states of an automaton: their character edges and their empty edges."""

    edges: list[list[tuple[_Class, int]]]
    empty: list[list[int]]

    def new(self) -> int:
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1


def _between(states: _States, at: int, least: int, below: int) -> int:
    """The numbers from ``least`` on that are less than ``below``, without leading zeros."""
    done = states.new()
    for length in range(len(str(least)), len(str(below - 1)) + 1):
        first = str(max(least, 10 ** (length - 1) if length > 1 else 0))
        last = str(min(below - 1, 10**length - 1))
        level = {(True, True): at}  # by whether the digits so far are those of the first and of the last number
        for digit_of_first, digit_of_last in zip(map(int, first), map(int, last), strict=True):
            following: dict[tuple[bool, bool], int] = {}
            for (at_first, at_last), here in level.items():
                for digit in range(digit_of_first if at_first else 0, (digit_of_last if at_last else 9) + 1):
                    key = (at_first and digit == digit_of_first, at_last and digit == digit_of_last)
                    if key not in following:
                        following[key] = states.new()
                    states.edges[here].append((str(digit), following[key]))
            level = following
        for end in level.values():
            states.empty[end].append(done)
    return done


def _texts(slot: Slot) -> tuple[int, int | None]:
    """The range of the numbers that a slot writes; where facts decide it, all that they may be."""
    low, high = (bound if isinstance(bound, int) else None for bound in (slot.low, slot.high))
    if slot.by_fact:  # any number may be subtracted
        low, high = 0, None
    base = slot.base or 1
    return max(0, (low or 0) * base + slot.shift), None if high is None else high * base + slot.shift


def _path(states: _States, at: int) -> int:
    """Any number of segments, each with its dot."""
    inner, after = states.new(), states.new()
    states.edges[at] += [(OPEN["path"][1], inner), (".", after)]
    states.edges[inner] += [(OPEN["path"][1], inner), (".", after)]
    states.empty[at].append(after)
    return after


@lru_cache(maxsize=4096)
def _automaton(side: Side) -> _Automaton:
    """States with character edges and empty edges; the last number is the accepting state."""
    edges: list[list[tuple[_Class, int]]] = [[]]
    empty: list[list[int]] = [[]]

    state = _States(edges, empty).new

    def chain(at: int, text: str) -> int:
        for char in text:
            after = state()
            edges[at].append((char, after))
            at = after
        return at

    def number(at: int, least: int) -> int:
        """The numbers from ``least`` on, without leading zeros."""
        done, longer = state(), state()
        empty[longer].append(done)
        edges[longer].append((_digit, longer))
        to_come = [longer]  # by the least number of digits that follow
        for _ in str(least):
            edges[state()].append((_digit, to_come[-1]))
            to_come.append(len(edges) - 1)
        for left, digit in zip(range(len(str(least)) - 1, -1, -1), str(least), strict=True):
            for other in "0123456789":
                if other != digit and (other != "0" or left < len(str(least)) - 1):
                    edges[at].append((other, to_come[left + (other < digit)]))
            at = chain(at, digit)
        empty[at].append(longer if least else done)
        return done

    at = 0
    for token in side.tokens:
        if isinstance(token, str):
            at = chain(at, token)
        elif token.kind == "alts":
            ends = [chain(at, text) for _, text in token.options]
            join = state()
            for end in ends:
                empty[end].append(join)
            at = join
        elif token.kind == "int":
            least, below = _texts(token)
            end = least + 1 if below is None else max(below, least + 1)
            at = number(at, least) if below is None else _between(_States(edges, empty), at, least, end)
        elif token.kind == "path":
            at = _path(_States(edges, empty), at)
        else:
            after = state()
            inside = OPEN[token.kind][1]
            edges[at].append((inside, after))
            edges[after].append((inside, after))
            at = after
    return edges, empty, at


def _common(a: _Class, b: _Class) -> str | None:
    if isinstance(a, str):
        return a if (a == b if isinstance(b, str) else b(a)) else None
    if isinstance(b, str):
        return b if a(b) else None
    return next((c for c in _SAMPLES if a(c) and b(c)), None)


def _same_ends(a: Side, b: Side) -> bool:
    """False where the texts at the beginning, or those at the end, of two sides already differ."""
    starts = any(x.startswith(b.starts) for x in a.starts) or any(y.startswith(a.starts) for y in b.starts)
    return starts and (any(x.endswith(b.ends) for x in a.ends) or any(y.endswith(a.ends) for y in b.ends))


def _diverge(a: Side, b: Side) -> bool:
    """True where two sides that begin alike, with the same texts and indices, go on with different texts."""
    for one, other in zip(a.tokens, b.tokens, strict=False):
        if isinstance(one, str) and isinstance(other, str):
            if one != other:
                return not (one.startswith(other) or other.startswith(one))
        elif isinstance(one, str) or isinstance(other, str) or one.kind != "int" or other.kind != "int":
            return False
        elif _apart(one, other) or _apart(other, one):
            return True
    return False


def _apart(one: Slot, other: Slot) -> bool:
    """True where the range of one index ends before that of the other begins, whatever the facts are."""
    if one.by_fact or other.by_fact or one.base or other.base or one.high is None:
        return False
    if isinstance(one.high, int) and isinstance(other.low, int):
        return one.high + one.shift <= other.low + other.shift
    return one.high == other.low and one.shift <= other.shift


def alike(sides: Sequence[Side], seen: int = 0) -> Iterator[tuple[int, int]]:
    """The pairs of sides, by number, that may match keys of one beginning; no other pair shares a key.

    Pairs within the first ``seen`` sides are left out. A pair comes several times where alternatives begin alike.
    """
    begun: list[tuple[str, int]] = []  # each begins the next, and the current text
    fresh: list[tuple[str, int]] = []  # those of them that have not been seen
    for start, number in sorted((start, number) for number, side in enumerate(sides) for start in side.starts):
        for stack in (begun, fresh):
            while stack and not start.startswith(stack[-1][0]):
                stack.pop()
        for _, other in fresh if number < seen else begun:
            if other != number:
                yield min(number, other), max(number, other)
        begun.append((start, number))
        if number >= seen:
            fresh.append((start, number))


def overlap(a: Side, b: Side, effort: Effort | None = None) -> str | None:
    """A key that both sides match, or None where they share none; PatternError where ``effort`` is not enough."""
    effort = effort or Effort()
    effort.spend(1 + len(a.starts) * len(b.starts) // 8 + len(a.ends) * len(b.ends) // 8)
    if not _same_ends(a, b) or _diverge(a, b):
        return None
    edges_a, empty_a, end_a = _automaton(a)
    edges_b, empty_b, end_b = _automaton(b)
    queue: list[tuple[int, int, str]] = [(0, 0, "")]
    seen = {(0, 0)}
    while queue:
        i, j, text = queue.pop()
        effort.spend(2 + len(edges_a[i]) * len(edges_b[j]) // 2)
        if i == end_a and j == end_b and a.match(text) is not None and b.match(text) is not None:
            return text
        steps = [(n, j, text) for n in empty_a[i]] + [(i, n, text) for n in empty_b[j]]
        for class_a, n in edges_a[i]:
            for class_b, m in edges_b[j]:
                char = _common(class_a, class_b)
                if char is not None:
                    steps.append((n, m, text + char))
        for step in steps:
            if step[:2] not in seen:
                seen.add(step[:2])
                queue.append(step)
    return None
