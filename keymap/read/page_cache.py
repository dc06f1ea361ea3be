"""The system's page cache: pages of a mapped file, asked for and given back one by one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from keymap.read.lazy import SourceFile

__all__ = ["scattered"]

_SAMPLE = 16  # pages that show whether the cache has them all
_byte = [bytearray(1)]


@contextmanager
def scattered(file: SourceFile, parts: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Around reads of a few bytes each, all over a file that the system may not have in its cache.

    Pages that the cache lacks are asked for all at once, so that they are read in parallel. Afterwards they are given
    back: a page that is there alone divides the part around it, which the system then reads in small pieces. A load of
    a large file took a third longer. Where the system cannot do it, this does nothing.

    Args:
        file: nobody has written to its mapping, and no tensor views it.
        parts: the first byte of each read, and the one after its last; what lies outside the file is left out.
    """
    able = hasattr(mmap, "MADV_WILLNEED") and hasattr(os, "posix_fadvise")
    handle = file.open_again() if able else None  # closed at once: a model may have more shards than descriptors
    if handle is None:
        yield
        return
    try:
        ends = [end for start, stop in parts for end in (start, stop - 1)]  # a few bytes can lie in two pages
        pages = {end // mmap.PAGESIZE * mmap.PAGESIZE for end in ends if 0 <= end < file.size}
        cached = _cached(handle, sorted(pages))
        asked = [page for page, held in cached.items() if not held]
        with suppress(OSError):
            if asked:
                file.data.madvise(mmap.MADV_RANDOM)  # else a late page makes the system read megabytes around it
            for page in asked:
                file.data.madvise(mmap.MADV_WILLNEED, page, mmap.PAGESIZE)
        yield
        with suppress(OSError):
            if asked:
                file.data.madvise(mmap.MADV_NORMAL)
                file.data.madvise(mmap.MADV_DONTNEED)  # the cache keeps what a process has mapped
            for page in (page for page in asked if cached[page] is False):
                os.posix_fadvise(handle, page, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _cached(handle: int, pages: Sequence[int]) -> dict[int, bool | None]:
    """Whether the cache has each page, None where the system does not say; empty if it seems to have all of them."""
    with suppress(OSError):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # else looking for a page reads megabytes after it
    found = {page: _is_cached(handle, page) for page in pages[:: len(pages) // _SAMPLE + 1]}
    if all(found.values()):
        found = {}
    else:  # looking for a page asks for it, so each is looked for once
        found |= {page: _is_cached(handle, page) for page in pages if page not in found}
    return found


def _is_cached(handle: int, page: int) -> bool | None:
    """Whether the cache has a page; None where the system does not say."""
    try:
        os.preadv(handle, _byte, page, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # a file system, or a system, without this flag
        return None
    return True
