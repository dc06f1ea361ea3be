"""A restricted pickle interpreter: it follows the opcodes of a pickle, and imports and calls nothing from the file.

A pickle is a program. Python's interpreter imports what the program names, and calls it. This one passes every name and
every call to ``allowed``, which has a short table (see globals_allowed.py). A name that is not in the table stops the
reading before anything happens. The size of the file limits memory and time: every opcode and every call spends from a
memory budget, and its time is proportional to its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from keymap.read.lazy import FEW

MAX_INTEGER = 64  # bytes; a random generator's state needs 17
MAX_NAME = 1024  # characters of a module and a name in it
MAX_PARTS = 16  # items of a tuple that is a key, with those of nested tuples: hashing shared tuples could take for ever
PER_TUPLE = 200  # bytes of the budget for each tuple that is a key
MAX_NUMBERED = 1 << 15  # keys of a dict with keys that are not strings: an attacker can make them collide
MAX_HASH = 1 << 60  # larger integers share their hashes
SLACK = 3 << 24  # bytes of memory that a pickle may take in addition to twice the size of its file
PER_STORAGE = 2500  # and for each storage that it names, as many as the file can hold
TENSOR = 128  # bytes of the file for the smallest tensor with its name
AT_ONCE = 1 << 16  # count the spent bytes when they exceed this
GROWS = "it takes far more memory than its size allows"
WIDE = 4  # extra bytes of memory for each byte of a string with a non-ASCII character
MEMO_GAP = 1024  # a new memo number may exceed the count of stored values by this


class BadPickleError(Exception):
    """The pickle is malformed, or does what no checkpoint needs. The text is one short fact."""


class ForbiddenGlobalError(BadPickleError):
    """The pickle calls something that is not allowed. Nothing was imported. The text is module.name."""


class UnreadTensorError(BadPickleError):
    """The pickle holds a kind of tensor that keymap does not read. The text is one short fact."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name; on the stack it is nothing more than this text, and nothing is imported."""

    name: str


class Allowed(Protocol):
    """What a pickle may name, call and refer to."""

    def find(self, module: str, name: str) -> Global:
        """The name under its current name; raises UnreadTensorError."""

    def call(self, name: str, arguments: tuple[Any, ...], spend: Callable[[int], None]) -> Any:
        """The value of a call; raises ForbiddenGlobalError or BadPickleError.

        It calls ``spend`` with the bytes that it allocates.
        """

    def build(self, target: Any, state: Any) -> None:
        """Set the state of ``target``; raises BadPickleError."""

    def persistent(self, reference: Any) -> Any:
        """The storage of a reference; raises BadPickleError."""


def run_pickle(data: Any, start: int, allowed: Allowed, size: int = 0) -> tuple[Any, int]:
    """The value of the pickle at ``start`` and the position after it.

    Args:
        data: bytes or a memory mapping.
        start: first byte.
        allowed: what the pickle may name.
        size: bytes of the whole file; 0 if ``data`` is the whole file.

    Raises:
        ForbiddenGlobalError: the pickle calls something that is not allowed.
        BadPickleError: the pickle is truncated, malformed, or uses an opcode that torch.save never writes.
    """
    machine = _Machine(data, start, allowed, size or len(data))
    return machine.run(), machine.at


def check_keys(keys: Iterable[Any], existing: Collection[Any] = ()) -> int:
    """The number of tuples among the keys.

    Raises:
        BadPickleError: hashing the new and the existing keys could take too long.
    """
    count, tuples = len(existing), 0
    for key in keys:
        count += 1
        if type(key) is not str:
            tuples += isinstance(key, tuple)
            _check_key(key, MAX_PARTS)
            if count > MAX_NUMBERED:
                raise BadPickleError(f"a dict or set has more than {MAX_NUMBERED} keys, and not all are strings")
    return tuples


def _check_key(key: Any, limit: int) -> int:
    """Check one key; return how many more items of tuples it may have."""
    if isinstance(key, tuple) and len(key) <= limit:
        limit -= len(key)
        for item in key:
            limit = _check_key(item, limit)
    elif type(key) is int and not -MAX_HASH < key < MAX_HASH:
        raise BadPickleError("a dict or set has an integer of more than 60 bits as a key")
    elif key is not None and type(key) not in (str, bytes, int, float, bool, Global):
        raise BadPickleError(f"a dict or set has a key of type {type(key).__name__}, or a tuple with too many items")
    return limit


class _Machine:
    def __init__(self, data: Any, start: int, allowed: Allowed, size: int) -> None:
        self.data, self.at, self.stop, self.allowed = data, start, len(data), allowed
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.budget = 2 * size + SLACK
        self.storages, self.max_storages = set[str](), min(size // TENSOR, FEW)

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
            if self.at <= self.stop:  # another error, not the end of the data
                raise
            raise BadPickleError(f"it is truncated at byte {self.stop} (an opcode or a number expected)") from None
        if self.below or len(self.stack) != 1:
            raise BadPickleError("it ends with more or fewer values than one")
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
            raise BadPickleError(f"a string before byte {self.at} is not UTF-8") from None

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise BadPickleError(GROWS)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise BadPickleError(f"it takes a value from an empty stack, before byte {self.at}")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise BadPickleError(f"it fills a {kind.__name__}, but none is on the stack, before byte {self.at}")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        if not self.below:
            raise BadPickleError(f"it goes back to a mark that it never set, before byte {self.at}")
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
            raise BadPickleError("it stores a value, but the stack is empty")
        if index > len(self.memo) + MEMO_GAP:
            raise BadPickleError(f"it stores value {index} after only {len(self.memo)} others")
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise BadPickleError("it names a global, but the name is not a string")
        if len(module) + len(name) > MAX_NAME:
            raise BadPickleError(f"it names a global of {len(module) + len(name)} characters")
        self.push(self.allowed.find(module, name))

    def call(self, target: Any, arguments: Any) -> None:
        if type(target) is not Global or type(arguments) is not tuple:
            raise BadPickleError(f"it calls a {type(target).__name__}, before byte {self.at}")
        self.push(self.allowed.call(target.name, arguments, self.spend))


def _unknown(m: _Machine) -> None:
    code, at = bytes([m.data[m.at - 1]]), m.at - 1
    raise BadPickleError(f"torch.save never writes opcode {code!r}, at byte {at}")


def _mark(m: _Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def _stop(m: _Machine) -> None:
    """The end of the program; `run` stops."""


def _protocol(m: _Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise BadPickleError(f"it has protocol {version}; the newest is 5")


def _frame(m: _Machine) -> None:
    m.take(8)  # only a reader of streams needs the length of a frame


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


def _unpacked(count: int, signed: bool = False) -> Callable[[Any, int], tuple[int]]:
    """A function that reads an integer of ``count`` bytes as a 1-tuple; raises struct.error at the end of the data."""
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
    def step(m: _Machine) -> None:  # Python 2 wrote strings and bytes in the same way
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
            raise BadPickleError(f"it takes {count} values, but the stack has {len(stack)}, before byte {m.at}")
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
    keywords, arguments, target = m.pop(), m.pop(), m.pop()
    if keywords != {}:
        raise BadPickleError("it makes an object with keyword arguments")
    m.call(target, arguments)


def _build(m: _Machine) -> None:
    state = m.pop()
    if not m.stack:
        raise BadPickleError("it sets the state of a value, but the stack is empty")
    target = m.stack[-1]
    if type(target) is dict:
        return  # ignore the attributes of an OrderedDict, such as a state dict's _metadata
    m.allowed.build(target, state)


def _persistent(m: _Machine) -> None:
    reference = m.pop()
    m.push(m.allowed.persistent(reference))
    key, storages = reference[2], m.storages
    if key not in storages and len(storages) < m.max_storages:
        storages.add(key)
        m.budget += PER_STORAGE


def _pop_mark(m: _Machine) -> None:
    m.marked()


def _pop(m: _Machine) -> None:
    if m.stack or not m.below:
        m.pop()
    else:
        m.marked()


_OPCODES: dict[int, Callable[[_Machine], None]] = {
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
    ord("\x81"): _reduce,  # for this interpreter, a new object is the same as a call
    ord("\x92"): _new_object_ex,
    ord("b"): _build,
    ord("Q"): _persistent,
}

# The most bytes of memory that an opcode takes, with its value in the tree made from it; 40 for all others.
_COSTS = {ord(code): 70 for code in "(UTX\x8c\x8dCB\x8e\x96"} | {ord(code): 110 for code in "]}t\x85\x86\x87ldqr\x94"}
_COSTS |= {ord(code): 250 for code in "R\x81\x92Q\x8f\x91"} | {ord(code): 16 for code in "N)\x88\x89hj20.eaus\x90b"}
_STEPS = [(_OPCODES.get(code, _unknown), _COSTS.get(code, 40)) for code in range(256)]
