"""The types that every reader returns, and the memory-mapped file that they read from."""

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

try:  # if installed: the same checksum, four times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

from keymap.errors import CheckpointError, UnsafeCheckpointError

MAX_DIMS = 64
MAX_INT64 = 2**63 - 1
MAX_KEY = 2048  # characters; real keys have fewer than 200
FEW = 120_000  # a file of any size may hold this many tensors, and one more for each PER_TENSOR bytes
PER_TENSOR = 1 << 12
SMALL = 1 << 24  # a deflated or repeating tensor may need this many bytes, and four times the size of its file
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would block for ever
CHECK_STEP = 1 << 19  # bytes to read at a time for a checksum
INFLATE_STEP = 1 << 14  # deflated bytes to pass to zlib at a time; one byte inflates to 1032 at most


class LazyTensor(NamedTuple):
    """The shape and dtype of a tensor in a file; ``read`` reads its values.

    Attributes:
        shape: sizes, outermost first; () for a scalar.
        dtype: as the file states it (numpy's two-byte void is bfloat16).
        values: the raw bytes, or a function that returns the tensor.
        strides: in elements; None for row-major.
        offset: index of the first element within ``values``.
        bytes_before: total size of the shards that come before this tensor's file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Block | Callable[[], torch.Tensor]
    strides: tuple[int, ...] | None = None
    offset: int = 0
    bytes_before: int = 0

    def read(self) -> torch.Tensor:
        """Return a CPU tensor of this shape and dtype, with any strides.

        If the container permits, the tensor's memory is a private mapping of the file. You may write to it: the file
        does not change, and a later ``read`` from the same Checkpoint sees the new values.

        Raises:
            CheckpointError: the values do not inflate, or the file was written to after it was opened.
        """
        block, shape, dtype = self.values, self.shape, self.dtype
        if not isinstance(block, Block):
            return block()
        block.file.check_unchanged()
        whole = block.nbytes - block.nbytes % dtype.itemsize  # bytes of complete elements
        if whole == 0 or 0 in shape:
            if block.crc is not None:
                block.load()
            return torch.empty(shape, dtype=dtype, device="cpu")
        if block.crc is None:
            flat = block.mapped(dtype, whole // dtype.itemsize)
        else:
            flat = block.load()[:whole].view(dtype)
        if self.strides is None and self.offset == 0 and prod(shape) == len(flat):
            return flat.view(shape)
        return flat.as_strided(shape, self.strides or contiguous_strides(shape), self.offset)

    @property
    def position(self) -> int:
        """Byte position of the values, for reading tensors in file order."""
        block = self.values
        if not isinstance(block, Block):
            return self.bytes_before
        return self.bytes_before + block.start + (self.offset * self.dtype.itemsize if block.crc is None else 0)

    @property
    def region(self) -> tuple[SourceFile, int, int] | None:
        """The file, and the first and last byte (exclusive) of the mapped values; None if they are not mapped."""
        block = self.values
        if not isinstance(block, Block) or block.crc is not None:
            return None
        return block.file, block.start, block.start + block.nbytes

    @property
    def contiguous_block(self) -> Block | None:
        """The block, if it is stored uncompressed and holds exactly this tensor's values in row-major order."""
        block = self.values
        if not isinstance(block, Block) or self.strides is not None or self.offset or block.crc is not None:
            return None
        return block if block.nbytes == prod(self.shape) * self.dtype.itemsize else None

    @property
    def check(self) -> Callable[[], None] | None:
        """A function that raises CheckpointError if the checksum of the values is wrong.

        None if the container has no checksum (safetensors), or none that its writers must set (torch).
        """
        block = self.values
        return block.check if isinstance(block, Block) and (block.crc is not None or block.stored_crc) else None


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """One checkpoint file, or all shards of one index, opened without reading values.

    Attributes:
        path: the file that was opened.
        container: "safetensors", "torch", "torch_legacy", "torchscript", "npz", "npy" or "msgpack".
        tree: nested as in the file; leaves are LazyTensor, Record or plain Python values. If the file
            holds one value that is not a dict, its key is "".
        metadata: the ``__metadata__`` of safetensors, else empty.
        notes: what was skipped, for the report.
    """

    path: Path
    container: str
    tree: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """An object whose class keymap did not import: the name of the class, and the attributes."""

    name: str
    state: Mapping[str, Any]


class SourceFile:
    """A regular file in a private memory mapping: writable in memory, never changed on disk.

    Attributes:
        path: the path of the file.
        size: bytes.
        data: the mapping. Slices of it are copies; tensors from ``Block.mapped`` share its memory.
        status: of the file when it was opened.
        inflated: first byte and content of the deflated member that was read last; several tensors may share one.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path``; raise CheckpointError if it is not a readable, regular, non-empty file."""
        self.path = path
        self.inflated: tuple[int, torch.Tensor] | None = None
        try:
            handle = os.open(path, _READ)
            try:
                self.status = os.fstat(handle)
                if not stat.S_ISREG(self.status.st_mode):
                    raise self.error("is not a regular file", "pass the path of a checkpoint file")
                if self.status.st_size == 0:
                    raise self.error("is empty (0 bytes)", "download or save it again")
                self.data = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)  # duplicates the descriptor
                self.size = len(self.data)
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise self.error("does not exist", "check the path") from None
        except PermissionError:
            raise self.error("is not readable (permission denied)", "change its permissions") from None
        except (OSError, ValueError) as error:
            raise self.error(f"cannot be opened: {error}", "check the path") from error

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written to after it was opened.

        Removing or replacing the file does no harm: the mapping keeps the old content.
        """
        size = self.data.size()
        if size >= self.size:  # in a file that shrank, a read beyond the new end would kill the process
            try:
                now = os.stat(self.path)
            except OSError:
                return
            if not self._is_same_file(now) or now.st_mtime_ns == self.status.st_mtime_ns:
                return
        fact = f"was written to while it was read (it had {self.size} bytes, now {size})"
        raise self.error(fact, "wait until the file is complete and read it again")

    @cached_property
    def handle(self) -> int | None:
        """A descriptor of the file, open as long as this object lives.

        None if the system has no ``preadv``, if the process has no free descriptor (each shard needs one), or if the
        path is now another file; then values are read from the mapping.
        """
        handle = self.open_again() if hasattr(os, "preadv") else None
        if handle is not None:
            weakref.finalize(self, os.close, handle)
        return handle

    def open_again(self) -> int | None:
        """A new descriptor, which the caller closes; None if there is none, or if the path is now another file."""
        try:
            handle = os.open(self.path, _READ)
        except OSError:
            return None
        if self._is_same_file(os.fstat(handle)):
            return handle
        os.close(handle)
        return None

    def _is_same_file(self, other: os.stat_result) -> bool:
        """Whether a status belongs to this file, not to another one that replaced it."""
        return (other.st_dev, other.st_ino) == (self.status.st_dev, self.status.st_ino)

    def read_into(self, buffers: Sequence[memoryview], start: int) -> None:
        """Fill the buffers, 1024 at most, one after the other with the bytes from ``start`` on.

        If possible, the system copies the bytes without the mapping (see ``handle``). That saves page faults, and if
        the file shrinks during the read, the read fails with an error; a read from the mapping would kill the process.

        Raises:
            CheckpointError: the file ends before the buffers are full.
        """
        stop = start + sum(map(len, buffers))
        while start < stop:
            count = self._read_once(buffers, start)
            start += count
            if start == stop:
                return
            if count == 0:
                self.check_unchanged()
                fact = f"ends at byte {start} while it is read"
                raise self.error(fact, "wait until it is complete and read it again")
            full = 0
            while count >= len(buffers[full]):
                count -= len(buffers[full])
                full += 1
            buffers = [buffers[full][count:], *buffers[full + 1 :]]

    def _read_once(self, buffers: Sequence[memoryview], start: int) -> int:
        """Read into the buffers with one system call; return the number of bytes."""
        if self.handle is not None:
            return os.preadv(self.handle, buffers, start)
        self.check_unchanged()
        with memoryview(self.data) as view:
            content = view[start : start + len(buffers[0])]
            buffers[0][: len(content)] = content
            return len(content)

    def limit_tensors(self, count: int) -> None:
        """Raise CheckpointError for more tensors, or entries, than a checkpoint of this size may hold."""
        limit = FEW + self.size // PER_TENSOR
        if count > limit:
            fact = f"holds {count} or more tensors; the limit for a file of {self.size} bytes is {limit}"
            raise self.error(fact, "save fewer tensors, for example stack them")

    def limit_memory(self, name: str, nbytes: int) -> None:
        """Raise CheckpointError for a tensor or member that needs far more memory than the size of the file."""
        limit = 4 * self.size + SMALL
        if nbytes > limit:
            fact = f"{brief(name)} needs {nbytes} bytes of memory, far more than the {self.size} bytes of the file"
            raise self.error(
                fact, "save the tensor itself, not a view that repeats elements or a highly compressed copy"
            )

    def release_pages(self, start: int, stop: int) -> None:
        """Free the memory of the complete pages between ``start`` and ``stop``; a later read maps them again.

        Call it only for pages that nobody has written to. It does nothing if the system cannot do it.
        """
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and last > first:
            self.data.madvise(mmap.MADV_DONTNEED, first, last - first)

    def error(self, fact: str, advice: str) -> CheckpointError:
        """An error that names the file, says what is wrong and what to do next."""
        return CheckpointError(f"{self.path}: {fact}; {advice}")

    def unsafe_error(self, fact: str, advice: str, faults: Sequence[str] = ()) -> UnsafeCheckpointError:
        """The same, for a file that would run code."""
        return UnsafeCheckpointError(f"{self.path}: {fact}; {advice}", faults)


class Block(NamedTuple):
    """The raw bytes of one array or storage: a region of the file, stored uncompressed or deflated.

    Attributes:
        file: the file.
        name: the member or key, for messages.
        start: first byte of the region.
        stored: bytes in the file.
        nbytes: bytes of the content, without those that are skipped.
        skip: bytes to skip at the start of the inflated content (an array's header); 0 if uncompressed.
        crc: the checksum of all inflated bytes; None if uncompressed.
        stored_crc: first byte, length and checksum of the whole member, if it is uncompressed and has a checksum.
    """

    file: SourceFile
    name: str
    start: int
    stored: int
    nbytes: int
    skip: int = 0
    crc: int | None = None
    stored_crc: tuple[int, int, int] | None = None

    def check(self) -> None:
        """Raise CheckpointError if the checksum of the bytes is wrong; keep none of them in memory."""
        if self.crc is not None:
            total, crc = 0, 0
            for chunk in self._inflate(self.skip + self.nbytes):
                total, crc = total + len(chunk), crc32(chunk, crc)
            self._compare(total, crc, self.crc)
        elif self.stored_crc is not None:
            first, length, expected = self.stored_crc
            crc, buffer = 0, memoryview(bytearray(min(CHECK_STEP, length)))
            for start in range(first, first + length, CHECK_STEP):
                stored = buffer[: min(CHECK_STEP, first + length - start)]
                self.file.read_into([stored], start)
                crc = crc32(stored, crc)
            self._compare(self.skip + self.nbytes, crc, expected)

    def _compare(self, total: int, crc: int, expected_crc: int | None) -> None:
        """Raise CheckpointError if the size or the checksum is not the declared one."""
        declared = self.skip + self.nbytes
        if total != declared or crc != expected_crc:
            reason = "its checksum differs" if total == declared else f"it does not inflate to {declared} bytes"
            raise self.file.error(f"member {self.name!r} is corrupt: {reason}", "download the file again")

    def head(self, count: int) -> bytes:
        """The first ``count`` bytes, or all if there are fewer; raises CheckpointError if they do not inflate."""
        if self.crc is None:
            return self.file.data[self.start : self.start + min(count, self.nbytes)]
        return b"".join(self._inflate(count))[:count]

    def mapped(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """The first ``count`` elements (at least 1) of an uncompressed region, as a view of the mapping."""
        return torch.frombuffer(self.file.data, dtype=dtype, offset=self.start, count=count)

    def load(self) -> torch.Tensor:
        """Inflate the region into a uint8 tensor of shape (nbytes,); all tensors in the region share its memory.

        Raises:
            CheckpointError: the region is corrupt, or longer or shorter than declared.
        """
        if self.file.inflated is not None and self.file.inflated[0] == self.start:
            return self.file.inflated[1]
        self.file.inflated = None  # free the last one before allocating the next
        result = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        target = result.numpy().data
        total, crc = self.skip + self.nbytes, 0
        at = -self.skip
        for chunk in self._inflate(total):
            crc = crc32(chunk, crc)
            begin, end = at, at + len(chunk)
            at = end
            if end > self.nbytes:
                break
            if end > 0:
                target[max(begin, 0) : end] = chunk[max(-begin, 0) :]
        self._compare(self.skip + at, crc, self.crc)
        self.file.inflated = self.start, result
        return result

    def _inflate(self, limit: int) -> Iterator[bytes]:
        """Inflated chunks, never more than ``limit`` + 1 bytes in all, whatever the region claims."""
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated, stop = 0, self.start + self.stored
        buffer = memoryview(bytearray(min(INFLATE_STEP, self.stored)))
        for at in range(self.start, stop, INFLATE_STEP):
            deflated = buffer[: min(INFLATE_STEP, stop - at)]
            self.file.read_into([deflated], at)
            try:
                chunk = decompressor.decompress(deflated, limit + 1 - inflated)
            except zlib.error as error:
                fact = f"member {self.name!r} does not decompress ({error})"
                raise self.file.error(fact, "download the file again") from error
            inflated += len(chunk)
            yield chunk
            if inflated > limit or decompressor.eof:
                return


class _Brief(reprlib.Repr):
    """Python's reprlib; values that it would first format completely are shown by their type or their beginning."""

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
    """A short text for any value of a hostile file. It is never long and never slow, however the value nests."""
    return _brief.repr(value)


def element_count(shape: Sequence[object]) -> int | None:
    """The number of elements, or None if no tensor can have this shape."""
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
    """The strides, in elements, of a row-major tensor of ``shape``."""
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

    Args:
        block: the raw bytes; an incomplete element at the end is ignored.
        dtype: of the tensor.
        shape: of the tensor.
        strides: in elements; None for row-major.
        offset: index of the first element.

    Raises:
        CheckpointError: the tensor needs far more memory than the size of the file.
    """
    values = prod(shape) * dtype.itemsize
    block.file.limit_memory(block.name, values if block.crc is None else max(block.nbytes, values))
    return LazyTensor(shape, dtype, block, strides, offset)
