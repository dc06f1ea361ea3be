"""The directory of a zip archive, checked against the archive: each member as a block of the file."""

from __future__ import annotations

import io
import struct
import zipfile

from keymap.read.lazy import MAX_KEY, Block, SourceFile, brief
from keymap.read.page_cache import scattered

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
MIN_DIRECTORY = 1 << 22  # the directory of any archive may have this many bytes; in memory it takes ten times as many
MAX_RATIO = 1040  # deflate never compresses better, so a larger declared size is false
AGAIN = "download or save the file again"
ZIP_ERRORS = (  # what zipfile raises for damaged archives
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OSError,
    ValueError,
    IndexError,
    OverflowError,
    RuntimeError,
    struct.error,
)


class _LimitedReader(io.RawIOBase):
    """The file for zipfile, which may read at most the size of a sensible directory at once."""

    def __init__(self, file: SourceFile) -> None:
        self.data, self.limit = file.data, MIN_DIRECTORY + file.size // 5

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            self.data.seek((0, self.data.tell(), len(self.data))[whence] + offset)
        except ValueError as error:
            raise OSError(str(error)) from None  # zipfile expects an OSError
        return self.data.tell()

    def tell(self) -> int:
        return self.data.tell()

    def read(self, count: int = -1) -> bytes:
        if count > self.limit:
            raise ValueError(f"a directory of {count} bytes, the limit is {self.limit}")
        return self.data.read(count)


def looks_like_zip(file: SourceFile) -> bool:
    """Whether the file begins with a member's header, or is an archive without members."""
    return file.data[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def read_directory(file: SourceFile) -> dict[str, Block]:
    """The block of every member by name, in the order of the directory.

    Raises:
        CheckpointError: the directory is truncated or corrupt, a name occurs twice, or a member is encrypted,
            overlaps another, lies outside the file, or uses another compression than deflate.
    """
    try:
        with zipfile.ZipFile(_LimitedReader(file)) as archive:
            entries = archive.infolist()
            stop = archive.start_dir
    except ZIP_ERRORS as error:
        raise file.error(f"is a truncated or corrupt zip archive ({error})", AGAIN) from error
    file.limit_tensors(len(entries))
    members: dict[str, Block] = {}
    headers = ((e.header_offset, e.header_offset + LOCAL_HEADER.size + len(e.orig_filename)) for e in entries)
    with scattered(file, headers):
        for entry in entries:
            if entry.orig_filename in members:
                raise file.error(f"has the member {brief(entry.orig_filename)} twice", AGAIN)
            if not entry.orig_filename.endswith("/"):
                members[entry.orig_filename] = _member(file, entry, stop)
    end, previous = 0, ""
    for name, block in sorted(members.items(), key=lambda item: (item[1].start, item[1].stored)):
        if block.start < end:
            raise file.error(f"members {previous!r} and {name!r} overlap", AGAIN)
        end, previous = block.start + block.stored, name
    return members


def _member(file: SourceFile, entry: zipfile.ZipInfo, stop: int) -> Block:
    """The block of one entry, after checking that its local header agrees with the directory."""
    name, at = entry.orig_filename, entry.header_offset
    if len(name) > MAX_KEY:
        raise file.error(f"member {brief(name)} has a name of {len(name)} characters", AGAIN)
    if not 0 <= at <= min(stop, file.size) - LOCAL_HEADER.size:
        raise file.error(f"member {name!r} lies outside the file (at byte {at} of {file.size})", AGAIN)
    fields = LOCAL_HEADER.unpack(file.data[at : at + LOCAL_HEADER.size])
    signature, flags, method, name_size, extra_size = fields[0], fields[2], fields[3], fields[9], fields[10]
    raw = file.data[at + LOCAL_HEADER.size : at + LOCAL_HEADER.size + name_size]
    local_name = raw.decode("utf-8" if entry.flag_bits & 0x800 or raw.isascii() else "cp437", "replace")
    if signature != b"PK\x03\x04" or method != entry.compress_type or local_name != name:
        raise file.error(f"member {name!r}: its local header disagrees with the directory", AGAIN)
    if (flags | entry.flag_bits) & 0x1:
        raise file.error(f"member {name!r} is encrypted", "save the file without a password")
    start = at + LOCAL_HEADER.size + name_size + extra_size
    if start + entry.compress_size > stop:
        fact = f"member {name!r} is truncated: {entry.compress_size} bytes from byte {start}, "
        raise file.error(fact + f"the archive's members end at byte {stop}", AGAIN)
    if method == zipfile.ZIP_STORED:
        if entry.file_size != entry.compress_size:
            sizes = f"{entry.compress_size} and {entry.file_size}"
            raise file.error(f"member {name!r} is uncompressed, but its two sizes differ: {sizes}", AGAIN)
        stored_crc = (start, entry.compress_size, entry.CRC)
        return Block(file, name, start, entry.compress_size, entry.file_size, stored_crc=stored_crc)
    if method != zipfile.ZIP_DEFLATED:
        raise file.error(f"member {name!r} uses zip compression method {method}", "save it uncompressed or deflated")
    if entry.file_size > entry.compress_size * MAX_RATIO:
        fact = f"member {name!r} claims {entry.file_size} bytes in {entry.compress_size} deflated bytes"
        raise file.error(f"{fact}, more than deflate can compress", AGAIN)
    return Block(file, name, start, entry.compress_size, entry.file_size, crc=entry.CRC)


def whole_member(block: Block, limit: int) -> bytes:
    """All bytes of a small member.

    Raises:
        CheckpointError: the member is larger than ``limit`` or corrupt, or its checksum differs.
    """
    file = block.file
    file.limit_memory(block.name, block.nbytes)
    if block.nbytes > limit:
        raise file.error(f"member {block.name!r} has {block.nbytes} bytes, the limit is {limit}", AGAIN)
    return block.load().numpy().tobytes() if block.crc is not None else block.head(block.nbytes)
