"""What every reader gives back, and the one mapped file that all of them read from."""

from __future__ import annotations

import mmap
import os
import reprlib
import stat
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:  # the same checksum at four times the speed, where it is installed
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

from keymap.errors import CheckpointError, UnsafeCheckpointError

MAX_DIMS = 64
MAX_INT64 = 2**63 - 1
MAX_KEY = 2048  # characters; a real key has less than 200
FEW = 120_000  # tensors that a file of any size may hold, and one more for each PER_TENSOR bytes
PER_TENSOR = 1 << 12
SMALL = 1 << 24  # bytes that a tensor or member may have beside four times its file: deflated, or repeating
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for ever
CHECK_STEP = 1 << 19  # bytes that are read to make their checksum
INFLATE_STEP = 1 << 14  # deflated bytes handed to zlib at a time; it makes up to 1032 of each


class LazyTensor(NamedTuple):
    """A tensor of a file, known by shape and dtype; its values are read only when asked for.

    Attributes:
        shape: sizes, outermost first; () for a scalar.
        dtype: as the file states it (numpy's two-byte void is bfloat16).
        values: the raw bytes, or a function that gives the tensor.
        strides: in elements of the bytes; row-major where None.
        offset: first element.
        shift: bytes of the files that are read before this one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Block | Callable[[], torch.Tensor]
    strides: tuple[int, ...] | None = None
    offset: int = 0
    shift: int = 0

    def read(self) -> torch.Tensor:
        """A CPU tensor of that shape and dtype, with any strides.

        Where the container permits, its memory is the file's own, mapped privately: writing to it is allowed, never
        reaches the file, and is seen by a later ``read`` from the same Checkpoint. Raises CheckpointError where the
        values have to be inflated and cannot be, or the file was written to.
        """
        block, shape, dtype = self.values, self.shape, self.dtype
        if not isinstance(block, Block):
            return block()
        block.file.unchanged()
        block.file.handed = True
        whole = block.nbytes - block.nbytes % dtype.itemsize
        if whole == 0 or 0 in shape:
            if block.crc is not None:
                block.load()
            return torch.empty(shape, dtype=dtype)
        if block.crc is None:
            flat = block.mapped(dtype, whole // dtype.itemsize)
        else:
            flat = block.load()[:whole].view(dtype)
        if self.strides is None and self.offset == 0 and prod(shape) == len(flat):
            return flat.view(shape)
        return flat.as_strided(shape, self.strides or contiguous_strides(shape), self.offset)

    @property
    def position(self) -> int:
        """Byte position of the values, for reading in file order."""
        block = self.values
        if not isinstance(block, Block):
            return self.shift
        return self.shift + block.start + (self.offset * self.dtype.itemsize if block.crc is None else 0)

    @property
    def region(self) -> tuple[SourceFile, int, int] | None:
        """The file, and from which byte to which its mapping holds the values; None where they are not mapped."""
        block = self.values
        if not isinstance(block, Block) or block.crc is not None:
            return None
        return block.file, block.start, block.start + block.nbytes

    @property
    def values_alone(self) -> Block | None:
        """The bytes, where they are the values as they stand, row-major, and nothing besides."""
        block = self.values
        if not isinstance(block, Block) or self.strides is not None or self.offset or block.crc is not None:
            return None
        return block if block.nbytes == prod(self.shape) * self.dtype.itemsize else None

    @property
    def check(self) -> Callable[[], None] | None:
        """Raises CheckpointError where the values are not those that were written.

        None where the container has no checksum of its own (safetensors), or none that its writers must set (torch).
        """
        block = self.values
        return block.check if isinstance(block, Block) and (block.crc is not None or block.seal) else None


@dataclass(frozen=True)
class Checkpoint:
    """A lazy view of one checkpoint file, or of the shards that one index names.

    Attributes:
        path: the file that was opened.
        container: "safetensors", "torch", "torch_legacy", "torchscript", "npz" or "npy".
        tree: as the file nests it; leaves are LazyTensor, Record or plain Python values. A file that
            holds one value that is not a dict has it under the key "".
        metadata: the ``__metadata__`` of safetensors, else empty.
    """

    path: Path
    container: str
    tree: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """An object of the file whose class was not imported: the class's name, and its attributes."""

    name: str
    state: Mapping[str, Any]


class SourceFile:
    """A regular file mapped privately: readable, writable in memory, never changed on disk.

    Attributes:
        path: where it lies.
        size: bytes.
        data: the mapping; slices of it are copies, tensors from ``Block.load`` are not.
        status: of the file when it was opened.
        handed: whether values were read from it.
        inflated: the deflated member that was read last, by its first byte: several tensors may lie in one.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path``; raise CheckpointError where it is no readable, regular, non-empty file."""
        self.path = path
        self.handed = False
        self.inflated: tuple[int, torch.Tensor] | None = None
        try:
            handle = os.open(path, _READ)
            try:
                self.status = os.fstat(handle)
                if not stat.S_ISREG(self.status.st_mode):
                    raise self.bad("is not a regular file", "give the path of a checkpoint file")
                if self.status.st_size == 0:
                    raise self.bad("is empty (0 bytes)", "download or save it again")
                self.data = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)  # which keeps a descriptor of its own
                self.size = len(self.data)
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise self.bad("does not exist", "check the path") from None
        except PermissionError:
            raise self.bad("may not be read (permission denied)", "change its permissions") from None
        except (OSError, ValueError) as error:
            raise self.bad(f"cannot be opened: {error}", "check the path") from error

    def unchanged(self) -> None:
        """Raise CheckpointError where the file was written to since it was opened.

        A file that was removed or replaced is not: the mapping keeps what was opened.
        """
        size = self.data.size()
        if size >= self.size:  # beyond the end of a file that shrank there is no memory, and a read ends the process
            try:
                now = os.stat(self.path)
            except OSError:
                return
            if not self._is(now) or now.st_mtime_ns == self.status.st_mtime_ns:
                return
        fact = f"was written to while it was read (it had {self.size} bytes, now {size})"
        half = ": a model that was being filled from it is half loaded" if self.handed else ""
        raise self.bad(fact, f"wait until it is whole and load again{half}")

    @cached_property
    def handle(self) -> int | None:
        """A descriptor of the file, open as long as this object lives.

        None where the system has no call to read by it, where there is no descriptor left (of many shards each needs
        one), and where another file lies at the path now: the mapping holds what was opened.
        """
        if not hasattr(os, "preadv"):
            return None
        try:
            handle = os.open(self.path, _READ)
        except OSError:
            return None
        if self._is(os.fstat(handle)):
            weakref.finalize(self, os.close, handle)
            return handle
        os.close(handle)
        return None

    def _is(self, other: os.stat_result) -> bool:
        """Whether a status is of this file, not of another one that took its place."""
        return (other.st_dev, other.st_ino) == (self.status.st_dev, self.status.st_ino)

    def fill(self, places: Sequence[memoryview], start: int) -> None:
        """Read the bytes from ``start`` on into one place after the other, 1024 at most.

        The system copies them, where it can (see ``handle``). Nothing is mapped then, so that no page is faulted in and
        given back again, and a file that shrinks meanwhile gives an error where a mapping would end the process.

        Raises CheckpointError where the file ends before the places are full.
        """
        stop = start + sum(map(len, places))
        while start < stop:
            count = self._read(places, start)
            start += count
            if start == stop:
                return
            if count == 0:
                self.unchanged()
                half = "the model is half loaded" if self.handed else "wait until it is whole and load again"
                raise self.bad(f"ends at byte {start} while it is read", half)
            full = 0
            while count >= len(places[full]):
                count -= len(places[full])
                full += 1
            places = [places[full][count:], *places[full + 1 :]]

    def _read(self, places: Sequence[memoryview], start: int) -> int:
        """Read once, and tell how many bytes it were."""
        if self.handle is not None:
            return os.preadv(self.handle, places, start)
        self.unchanged()
        with memoryview(self.data) as view:
            part = view[start : start + len(places[0])]
            places[0][: len(part)] = part
            return len(part)

    def refuse_many(self, count: int) -> None:
        """Raise CheckpointError for more tensors, or entries, than a checkpoint of this size holds."""
        most = FEW + self.size // PER_TENSOR
        if count > most:
            raise self.bad(f"holds {count} or more tensors; the limit for its size is {most}", "save fewer, or stacked")

    def refuse_large(self, name: str, nbytes: int) -> None:
        """Raise CheckpointError for a tensor, or member, that would take far more memory than the file has."""
        most = 4 * self.size + SMALL
        if nbytes > most:
            fact = f"{brief(name)} would take {nbytes} bytes of memory, far more than the file has ({self.size})"
            raise self.bad(fact, "save it as it is, not as a view that repeats elements or as a bomb of zeros")

    def give_back(self, start: int, stop: int) -> None:
        """Give the memory of the whole pages within ``start`` to ``stop`` back; they are mapped anew when read again.

        Only for pages that nobody has written to. Nothing happens where the system has no such call.
        """
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and last > first:
            self.data.madvise(mmap.MADV_DONTNEED, first, last - first)

    def bad(self, fact: str, advice: str) -> CheckpointError:
        """A refusal that names the file, the fact and what to do next."""
        return CheckpointError(f"{self.path}: {fact}; {advice}")

    def unsafe(self, fact: str, advice: str, faults: Sequence[str] = ()) -> UnsafeCheckpointError:
        """A refusal of something that would run code."""
        return UnsafeCheckpointError(f"{self.path}: {fact}; {advice}", faults)


class Block(NamedTuple):
    """The raw bytes of one array or storage: a region of the file, as it is or deflated.

    Attributes:
        file: where the region lies.
        name: the member or key, for messages.
        start: first byte of the region.
        stored: bytes in the file.
        nbytes: bytes that ``load`` gives.
        skip: bytes before those that ``load`` leaves out (an array's header); only used when deflated.
        crc: the checksum of all inflated bytes, or None for a region stored as it is.
        seal: of a member stored as it is: its first byte, its length and its checksum.
    """

    file: SourceFile
    name: str
    start: int
    stored: int
    nbytes: int
    skip: int = 0
    crc: int | None = None
    seal: tuple[int, int, int] | None = None

    def check(self) -> None:
        """Raise CheckpointError where the bytes are not those that the checksum was made of; nothing is kept."""
        if self.crc is not None:
            total, crc = 0, 0
            for part in self._inflate(self.skip + self.nbytes):
                total, crc = total + len(part), crc32(part, crc)
            self._judge(total, crc, self.crc)
        elif self.seal is not None:
            first, length, wanted = self.seal
            crc, room = 0, memoryview(bytearray(min(CHECK_STEP, length)))
            for start in range(first, first + length, CHECK_STEP):
                place = room[: min(CHECK_STEP, first + length - start)]
                self.file.fill([place], start)
                crc = crc32(place, crc)
            self._judge(self.skip + self.nbytes, crc, wanted)

    def _judge(self, total: int, crc: int, wanted: int | None) -> None:
        declared = self.skip + self.nbytes
        if total != declared or crc != wanted:
            what = "its checksum differs" if total == declared else f"it does not inflate to {declared} bytes"
            raise self.file.bad(f"member {self.name!r} is corrupt: {what}", "download the file again")

    def head(self, count: int) -> bytes:
        """The first bytes, ``count`` of them or all; raises CheckpointError where they do not inflate."""
        if self.crc is None:
            return self.file.data[self.start : self.start + min(count, self.nbytes)]
        return b"".join(self._inflate(count))[:count]

    def mapped(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """So many elements, one at least, of a region stored as it is: the mapping's own memory, none of it read."""
        return torch.frombuffer(self.file.data, dtype=dtype, offset=self.start, count=count)

    def load(self) -> torch.Tensor:
        """A deflated region as a uint8 tensor of shape (nbytes,), in memory that all tensors in the region share.

        Raises CheckpointError where it is corrupt, or longer or shorter than declared.
        """
        if self.file.inflated is not None and self.file.inflated[0] == self.start:
            return self.file.inflated[1]
        self.file.inflated = None  # before the next one takes memory
        result = torch.empty(self.nbytes, dtype=torch.uint8)
        target = result.numpy().data
        total, crc = self.skip + self.nbytes, 0
        at = -self.skip
        for part in self._inflate(total):
            crc = crc32(part, crc)
            begin, end = at, at + len(part)
            at = end
            if end > self.nbytes:
                break
            if end > 0:
                target[max(begin, 0) : end] = part[max(-begin, 0) :]
        self._judge(self.skip + at, crc, self.crc)
        self.file.inflated = self.start, result
        return result

    def _inflate(self, limit: int) -> Iterator[bytes]:
        """Inflated parts, never more than ``limit`` + 1 bytes in all, whatever the region claims."""
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        made, stop = 0, self.start + self.stored
        room = memoryview(bytearray(min(INFLATE_STEP, self.stored)))
        for at in range(self.start, stop, INFLATE_STEP):
            deflated = room[: min(INFLATE_STEP, stop - at)]
            self.file.fill([deflated], at)
            try:
                part = machine.decompress(deflated, limit + 1 - made)
            except zlib.error as error:
                fact = f"member {self.name!r} does not decompress ({error})"
                raise self.file.bad(fact, "download the file again") from error
            made += len(part)
            yield part
            if made > limit or machine.eof:
                return


class _Brief(reprlib.Repr):
    """Python's own shortening, and of a value that it would first spell whole just the kind, or the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong = 2, 80, 40
        self.maxtuple = self.maxlist = 16

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 2000 else f"<an integer of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        if x is None or type(x) in (bool, float, complex):
            return repr(x)
        return repr(bytes(x[:40])) if type(x) in (bytes, bytearray) else f"<{type(x).__name__}>"


_brief = _Brief()


def brief(value: object) -> str:
    """A short text of any value of a hostile file: never long, never slow, however it nests."""
    return _brief.repr(value)


def element_count(shape: Sequence[object]) -> int | None:
    """The product of ``shape``, or None where it is no shape that a tensor can have."""
    count, extent = 1, 1
    if len(shape) > MAX_DIMS:
        return None
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_INT64:
            return None
        count *= size
        extent *= size or 1
        if extent > MAX_INT64:
            return None
    return count


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor of ``shape``."""
    strides, step = [0] * len(shape), 1
    for axis in range(len(shape) - 1, -1, -1):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def lazy_view(
    block: Block,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
) -> LazyTensor:
    """A tensor over ``block``; the caller has checked that the view lies inside it.

    Raises CheckpointError where it would take far more memory than the file has.

    Args:
        block: the raw bytes; those beyond a whole number of elements are left out.
        dtype: how they are read.
        shape: of the tensor.
        strides: in elements; row-major where None.
        offset: first element.
    """
    values = prod(shape) * dtype.itemsize
    block.file.refuse_large(block.name, values if block.crc is None else max(block.nbytes, values))
    return LazyTensor(shape, dtype, block, strides, offset)
