"""Memory that bytes wait in: page-aligned, as writing past the page cache wants it, and cheap to touch at first."""

from __future__ import annotations

import ctypes
import mmap

PAGE = 4096
"""Bytes. The alignment of memory, file offsets and lengths that every device takes."""


class Region:
    """``size`` bytes (rounded up to pages) of private memory, which forked children do not see.

    A child that shared these pages (each DataLoader worker is one) would turn the next copy into page faults, and
    open(2) forbids direct I/O on private memory that is shared with a child.
    """

    def __init__(self, size: int) -> None:
        length = max(page_aligned(size), PAGE)
        if hasattr(mmap, "MAP_PRIVATE"):
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(-1, length)
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # huge pages: a third of the time for the first touch
            _advise(self._map, advice)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.view)


def page_aligned(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return size + -size % PAGE


def cache_aligned(size: int) -> int:
    """``size`` rounded up to whole cache lines, which suits every dtype."""
    return size + -size % 64


def _advise(region: mmap.mmap, advice: str) -> None:
    """Give the kernel a hint that it may not know: then the region works, only slower."""
    value = getattr(mmap, advice, None)
    if value is None:
        return
    try:
        region.madvise(value)
    except OSError:  # a kernel that was built without it
        return
