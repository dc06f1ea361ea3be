"""A pickle machine of its own: it follows a pickle's opcodes and imports and calls nothing.

A pickle is a program. Python's own machine imports what the program names and calls it. This one hands
every name to ``allowed`` and every call to a short table there (see globals_allowed.py), so a name that is
not in the table ends the reading before anything happened. What a program can cost is bounded by the size of
its file: every opcode and every call spends from a budget of memory, and each takes a time that its own bytes
pay for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from keymap.read.lazy import FEW

MAX_INTEGER = 64  # bytes; a random generator's state needs 17
MAX_NAME = 1024  # characters of a module and a name in it
MAX_PARTS = 16  # of a tuple that is a key, with those of tuples in it: hashing shared, nested tuples takes for ever
PER_TUPLE = 200  # bytes of the budget that a tuple takes as a key
MAX_NUMBERED = 1 << 15  # keys of a dict that has others than texts: these can be made to collide, texts cannot
MAX_HASH = 1 << 60  # above, integers share their hashes
SLACK = 3 << 24  # bytes of memory that a pickle may take beside twice its file
PER_STORAGE = 2500  # more, for each storage that it names, of those that such a file can hold
TENSOR = 128  # bytes of a file that the smallest tensor takes with its name
AT_ONCE = 1 << 16  # bytes that steps spend before they are counted
GROWS = "it grows far beyond its own size when it is run"
WIDE = 4  # bytes that each byte of a text takes, more, where one of its characters is no ASCII
MEMO_GAP = 1024  # how far ahead of those in use the number of a stored value may be


class BadPickleError(Exception):
    """The pickle is malformed or asks for what no checkpoint needs. The text is one short fact."""


class ForbiddenGlobalError(BadPickleError):
    """The pickle names something that is not allowed; nothing was imported. The text is module.name."""


class UnreadTensorError(BadPickleError):
    """The pickle holds a kind of tensor that keymap does not read. The text is one short fact."""


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name. On the machine's stack it is only this text."""

    name: str


class Allowed(Protocol):
    """What a pickle may name, call and refer to."""

    def find(self, module: str, name: str) -> Global:
        """The name, if it is allowed; raises ForbiddenGlobalError."""

    def call(self, name: str, arguments: tuple[Any, ...], spend: Callable[[int], None]) -> Any:
        """The value of a call; raises BadPickleError. ``spend`` counts the bytes or items it makes."""

    def build(self, target: Any, state: Any) -> None:
        """Give ``target`` its state; raises BadPickleError."""

    def persistent(self, reference: Any) -> Any:
        """What the reference stands for: a storage; raises BadPickleError."""


def run_pickle(data: Any, start: int, allowed: Allowed, size: int = 0) -> tuple[Any, int]:
    """The value of the pickle at ``start`` and the position after it.

    Args:
        data: bytes or a mapping.
        start: first byte.
        allowed: what the pickle may name.
        size: bytes of the file that the pickle lies in, where that is not ``data``.

    Raises:
        ForbiddenGlobalError: it names something that is not allowed.
        BadPickleError: it is truncated, malformed, or uses an opcode that torch.save never writes.
    """
    machine = _Machine(data, start, allowed, size or len(data))
    return machine.run(), machine.at


def check_keys(keys: Iterable[Any], held: Collection[Any] = ()) -> int:
    """How many of the keys are tuples.

    Raises:
        BadPickleError: the keys, and those that are held already, cannot be hashed in little time.
    """
    count, tuples = len(held), 0
    for key in keys:
        count += 1
        if type(key) is not str:
            tuples += isinstance(key, tuple)
            _check_key(key, MAX_PARTS)
            if count > MAX_NUMBERED:
                raise BadPickleError(f"a dict or set has more than {MAX_NUMBERED} keys, and not all are texts")
    return tuples


def _check_key(key: Any, room: int) -> int:
    """The room that is left for parts of tuples."""
    if isinstance(key, tuple) and len(key) <= room:
        room -= len(key)
        for part in key:
            room = _check_key(part, room)
    elif type(key) is int and not -MAX_HASH < key < MAX_HASH:
        raise BadPickleError("a dict or set has an integer of more than 60 bits as a key")
    elif key is not None and type(key) not in (str, bytes, int, float, bool, Global):
        raise BadPickleError(f"a dict or set has a key of type {type(key).__name__}, or one of too many parts")
    return room


class _Machine:
    def __init__(self, data: Any, start: int, allowed: Allowed, size: int) -> None:
        self.data, self.at, self.stop, self.allowed = data, start, len(data), allowed
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.budget = 2 * size + SLACK
        self.storages, self.most = set[str](), min(size // TENSOR, FEW)

    def run(self) -> Any:
        data, steps = self.data, _STEPS
        spent, step = 0, _mark
        try:
            while step is not _stop:
                at = self.at
                self.at = at + 1
                step, cost = steps[data[at]]
                spent += cost
                if spent > AT_ONCE:
                    self.spend(spent)
                    spent = 0
                step(self)
        except (IndexError, struct.error):
            if self.at <= self.stop:  # it is not the data that ended
                raise
            raise BadPickleError(f"it is truncated at byte {self.stop} (an opcode or a number expected)") from None
        if self.below or len(self.stack) != 1:
            raise BadPickleError("it stops with more or less than one value")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        at = self.at
        end = at + count
        if end > self.stop:
            raise BadPickleError(f"it is truncated at byte {at} ({count} more bytes expected)")
        self.at = end
        self.budget -= count
        raw: bytes = self.data[at:end]
        return raw

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.stop, self.at + 1024))
        if end < 0:
            raise BadPickleError(f"a name at byte {self.at} does not end")
        return self.text(self.take(end + 1 - self.at)[:-1])

    def text(self, raw: bytes) -> str:
        if not raw.isascii():
            self.spend(WIDE * len(raw))
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise BadPickleError(f"a text before byte {self.at} is not UTF-8") from None

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise BadPickleError(GROWS)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise BadPickleError(f"it takes a value that is not there, before byte {self.at}")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise BadPickleError(f"it fills a {kind.__name__} that is not there, before byte {self.at}")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        if not self.below:
            raise BadPickleError(f"it goes back to a mark that is not there, before byte {self.at}")
        items, self.stack = self.stack, self.below.pop()
        return items

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise BadPickleError("a dict has a key without a value")
        self.spend(PER_TUPLE * check_keys(items[::2], target))
        target.update(zip(items[::2], items[1::2], strict=True))

    def store(self, index: int) -> None:
        if not self.stack:
            raise BadPickleError("it stores a value that is not there")
        if index > len(self.memo) + MEMO_GAP:
            raise BadPickleError(f"it stores value {index} after only {len(self.memo)} others")
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise BadPickleError("it names a global by something that is no text")
        if len(module) + len(name) > MAX_NAME:
            raise BadPickleError(f"it names a global of {len(module) + len(name)} characters")
        self.push(self.allowed.find(module, name))

    def call(self, target: Any, arguments: Any) -> None:
        if type(target) is not Global or type(arguments) is not tuple:
            raise BadPickleError(f"it calls a {type(target).__name__}, before byte {self.at}")
        self.push(self.allowed.call(target.name, arguments, self.spend))


def _unknown(m: _Machine) -> None:
    code, at = bytes([m.data[m.at - 1]]), m.at - 1
    raise BadPickleError(f"opcode {code!r} at byte {at} is none that torch.save writes")


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _stop(m: _Machine) -> None:
    """The end of the program, for `run`."""


def _protocol(m: _Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise BadPickleError(f"it has protocol {version}; the newest is 5")


def _frame(m: _Machine) -> None:
    m.take(8)  # a frame's length helps only a reader of streams


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _unpacked(count: int, signed: bool = False) -> Callable[[Any, int], tuple[int]]:
    """Reads an integer of so many bytes, as a tuple of one; raises struct.error where the data end before it does."""
    return struct.Struct({1: "<B", 2: "<H", 4: "<i" if signed else "<I", 8: "<Q"}[count]).unpack_from


def _integer(count: int, signed: bool = False) -> Callable[[_Machine], None]:
    number = _unpacked(count, signed)

    def step(m: _Machine) -> None:
        at = m.at
        m.at = at + count
        m.stack += number(m.data, at)

    return step


def _store(count: int) -> Callable[[_Machine], None]:
    number = _unpacked(count)

    def step(m: _Machine) -> None:
        at = m.at
        m.at = at + count
        m.store(number(m.data, at)[0])

    return step


def _recall(count: int) -> Callable[[_Machine], None]:
    number = _unpacked(count)

    def step(m: _Machine) -> None:
        at = m.at
        m.at = at + count
        (index,) = number(m.data, at)
        if index not in m.memo:
            raise BadPickleError(f"it recalls value {index}, which it never stored")
        m.stack.append(m.memo[index])

    return step


def _long(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        size = m.number(count)
        if size > MAX_INTEGER:
            raise BadPickleError(f"it holds an integer of {size} bytes")
        m.push(m.number(size, signed=True))

    return step


def _string(count: int) -> Callable[[_Machine], None]:
    number = _unpacked(count)

    def step(m: _Machine) -> None:
        at = m.at
        m.at = at + count
        (size,) = number(m.data, at)
        m.stack.append(m.text(m.take(size)))

    return step


def _bytes(count: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(count)))


def _old_string(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:  # Python 2 wrote texts and bytes alike
        raw = m.take(m.number(count))
        m.spend(WIDE * len(raw) * (not raw.isascii()))
        try:
            m.push(raw.decode("utf-8"))
        except UnicodeDecodeError:
            m.push(raw)

    return step


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        stack = m.stack
        if len(stack) < count:
            raise BadPickleError(f"it takes {count} values where there are {len(stack)}, before byte {m.at}")
        stack[-count:] = [tuple(stack[-count:])]

    return step


def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


def _appends(m: _Machine) -> None:
    items = m.marked()
    m.top(list).extend(items)


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


def _dict(m: _Machine) -> None:
    items = m.marked()
    m.push({})
    m.set_items(items)


def _add_items(m: _Machine) -> None:
    items = m.marked()
    target = m.top(set)
    m.spend(PER_TUPLE * check_keys(items, target))
    target.update(items)


def _frozen_set(m: _Machine) -> None:
    items = m.marked()
    m.spend(PER_TUPLE * check_keys(items))
    m.push(frozenset(items))


def _float(m: _Machine) -> None:
    m.push(struct.unpack(">d", m.take(8))[0])


def _global(m: _Machine) -> None:
    module = m.line()
    m.find(module, m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.find(module, name)


def _reduce(m: _Machine) -> None:
    arguments, target = m.pop(), m.pop()
    m.call(target, arguments)


def _new_object_ex(m: _Machine) -> None:
    named, arguments, target = m.pop(), m.pop(), m.pop()
    if named != {}:
        raise BadPickleError("it makes an object with named arguments")
    m.call(target, arguments)


def _build(m: _Machine) -> None:
    state = m.pop()
    if not m.stack:
        raise BadPickleError("it gives state to a value that is not there")
    target = m.stack[-1]
    if type(target) is dict:
        return  # attributes of an OrderedDict, such as a state dict's _metadata
    m.allowed.build(target, state)


def _persistent(m: _Machine) -> None:
    reference = m.pop()
    m.push(m.allowed.persistent(reference))
    key, storages = reference[2], m.storages
    if key not in storages and len(storages) < m.most:
        storages.add(key)
        m.budget += PER_STORAGE


def _pop_mark(m: _Machine) -> None:
    m.marked()


def _pop(m: _Machine) -> None:
    if m.stack or not m.below:
        m.pop()
    else:
        m.marked()


_DOES: dict[int, Callable[[_Machine], None]] = {
    ord("\x80"): _protocol,
    ord("\x95"): _frame,
    ord("."): _stop,
    ord("("): _mark,
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("N"): _constant(None),
    ord("\x88"): _constant(True),
    ord("\x89"): _constant(False),
    ord("J"): _integer(4, signed=True),
    ord("K"): _integer(1),
    ord("M"): _integer(2),
    ord("\x8a"): _long(1),
    ord("\x8b"): _long(4),
    ord("G"): _float,
    ord("U"): _old_string(1),
    ord("T"): _old_string(4),
    ord("\x8c"): _string(1),
    ord("X"): _string(4),
    ord("\x8d"): _string(8),
    ord("C"): _bytes(1),
    ord("B"): _bytes(4),
    ord("\x8e"): _bytes(8),
    ord("\x96"): lambda m: m.push(bytearray(m.take(m.number(8)))),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.marked()),
    ord("a"): _append,
    ord("e"): _appends,
    ord(")"): _constant(()),
    ord("t"): lambda m: m.push(tuple(m.marked())),
    ord("\x85"): _tuple_of(1),
    ord("\x86"): _tuple_of(2),
    ord("\x87"): _tuple_of(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("\x8f"): lambda m: m.push(set()),
    ord("\x90"): _add_items,
    ord("\x91"): _frozen_set,
    ord("q"): _store(1),
    ord("r"): _store(4),
    ord("\x94"): lambda m: m.store(len(m.memo)),
    ord("h"): _recall(1),
    ord("j"): _recall(4),
    ord("2"): lambda m: m.push(m.stack[-1] if m.stack else m.pop()),
    ord("c"): _global,
    ord("\x93"): _stack_global,
    ord("R"): _reduce,
    ord("\x81"): _reduce,  # a new object and a call are the same to a table of names
    ord("\x92"): _new_object_ex,
    ord("b"): _build,
    ord("Q"): _persistent,
}

# Bytes of memory that a step takes, at most, and its value in the tree that is made of it; 40 for the others.
_COSTS = {ord(code): 70 for code in "(UTX\x8c\x8dCB\x8e\x96"} | {ord(code): 110 for code in "]}t\x85\x86\x87ldqr\x94"}
_COSTS |= {ord(code): 250 for code in "R\x81\x92Q\x8f\x91"} | {ord(code): 16 for code in "N)\x88\x89hj20.eaus\x90b"}
_STEPS = [(_DOES.get(code, _unknown), _COSTS.get(code, 40)) for code in range(256)]
