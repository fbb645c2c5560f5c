"""Memory that bytes wait in: page-aligned, as writing past the page cache wants it, and cheap to touch at first."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

PAGE = 4096
"""Bytes. The alignment of memory, file offsets and lengths that every device takes."""


HUGE = 2 << 20
"""Bytes of a huge page."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name."""

_WRITABLE = 0x200  # PyBUF_WRITE
_view_of: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_of.restype = ctypes.py_object


STEADY = 4
"""How many pieces a storage may hold on to while it asks for the next one: see ``Storage.write``."""


BLOCK = 8 << 20
"""Bytes of a block in a ring. With smaller ones a writer would spend its time waiting for the GIL, which it needs
between any two operations; the hook of ``lazy`` mode waits for the copying of one such block at most."""

SMALL_COPY = 64 << 10
"""Bytes."""


class Region:
    """``size`` bytes (rounded up to pages) of private memory, which forked children do not see.

    A child that shared these pages (each DataLoader worker is one) would turn the next copy into page faults, and
    open(2) forbids direct I/O on private memory that is shared with a child.
    """

    def __init__(self, size: int, *, huge: bool = True) -> None:
        """``huge``: ask for huge pages. Where many are free the first touch takes a third of the time; where the kernel
        has to make them, by moving other pages, it takes several times as long as with plain ones.
        """
        length = max(page_aligned(size), PAGE)
        if hasattr(mmap, "MAP_PRIVATE"):
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(-1, length)
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE") if huge else ("MADV_DONTFORK",):
            _advise(self._map, advice)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.view)

    def populate(self, start: int, size: int) -> bool:
        """Give the pages of ``size`` bytes from ``start`` on, a multiple of ``PAGE``, their memory; keep what is there.

        Returns ``False`` where this system cannot do that. Runs without the GIL.

        Raises:
            MemoryError: there is no more memory.
        """
        call = _madvise()
        if call is None:
            return False
        while call(self.address + start, size, _POPULATE_WRITE):
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # Linux before 5.14
                return False
            if code not in (errno.EINTR, errno.EAGAIN):
                raise MemoryError(f"no memory for {size} bytes: {os.strerror(code)}")
        return True

    def clear(self, start: int, size: int) -> None:
        """Set ``size`` bytes from ``start`` on to zero. Runs without the GIL."""
        ctypes.memset(self.address + start, 0, size)


class MemoryPart(NamedTuple):
    """Bytes that are wanted in memory of ours."""

    size: int
    copy: Callable[[int, int, int], object]
    """``(target, start, count)``: copies ``count`` bytes, from byte ``start`` on, to the address ``target``."""


def part_of_memory(address: int, size: int) -> MemoryPart:
    """The bytes that lie at ``address``."""
    return MemoryPart(size, lambda target, start, count: copy_memory(target, address + start, count))


class Ring:
    """A few blocks that are filled again and again: what ``Storage.write`` calls steady."""

    def __init__(self) -> None:
        self.region = Region((STEADY + 1) * BLOCK)

    def gather(self, parts: Iterable[MemoryPart]) -> Iterator[memoryview]:
        """All bytes of ``parts``, in order, in whole blocks but for the last."""
        region = self.region
        start = filled = 0
        for size, copy in parts:
            done = 0
            while done < size:
                count = min(size - done, BLOCK - filled)
                copy(region.address + start + filled, done, count)
                done += count
                filled += count
                if filled == BLOCK:
                    yield region.view[start : start + BLOCK]
                    start, filled = (start + BLOCK) % region.size, 0
        if filled:
            yield region.view[start : start + filled]


def copy_memory(target: int, source: int, size: int) -> None:
    """Copy ``size`` bytes from one address to another; large copies without the GIL.

    Small ones keep it: giving it away costs more than they do, and a busy thread takes milliseconds to return it.
    """
    (ctypes.memmove if size >= SMALL_COPY else _copy_with_gil)(target, source, size)


def _without_releasing() -> Callable[[int, int, int], object]:
    """Memmove as a function that keeps the GIL, where the system's C library can be called by itself."""
    if os.name != "posix":
        return ctypes.memmove
    function = ctypes.PyDLL(None).memmove
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function


_copy_with_gil = _without_releasing()


def page_aligned(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return size + -size % PAGE


def cache_aligned(size: int) -> int:
    """``size`` rounded up to whole cache lines, which suits every dtype."""
    return size + -size % 64


def view_of(address: int, size: int) -> memoryview:
    """Writable unsigned bytes at ``address``. The caller keeps that memory alive."""
    if not size:
        return memoryview(bytearray())
    view: memoryview = _view_of(address, size, _WRITABLE)
    return view


def expect_use(spans: Iterable[tuple[int, int]]) -> None:
    """A hint that memory not touched yet, ``(first address, address behind it)`` each, will be filled: huge pages.

    The first touch then takes a third of the time. Spans that share a page or adjoin count as one; small ones are left.
    """
    call = _madvise()
    if call is None:
        return
    begin = end = 0
    for first, last in (*sorted(spans), (1 << 62, 1 << 62)):
        start = first - first % PAGE
        if start > end:
            if end - begin >= HUGE:
                call(begin, end - begin, mmap.MADV_HUGEPAGE)  # fails where the kernel was built without it
            begin = start
        end = max(end, page_aligned(last))


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(2) of Linux; ``None`` elsewhere."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function: Any = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = function
    return found


def _advise(region: mmap.mmap, advice: str) -> None:
    """Give the kernel a hint that it may not know: then the region works, only slower."""
    value = getattr(mmap, advice, None)
    if value is None:
        return
    try:
        region.madvise(value)
    except OSError:  # a kernel that was built without it
        return
