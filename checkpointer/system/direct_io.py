"""Writing large files at the speed of the disk: past the page cache where the file system allows it.

Bytes are gathered in a small ring of aligned blocks, and a few threads write them; where the caller's memory is aligned
and stays as it is, it is written from there.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from checkpointer.system.memory import PAGE, STEADY, Region, page_aligned
from checkpointer.system.threads import Pool

BLOCK = 8 << 20
"""Bytes of one write."""

STEADY_BLOCK = 256 << 10
"""Bytes, where the pieces are steady: then only headers, and the odd bytes at the end, have to be gathered."""

IN_FLIGHT = STEADY - 1
"""Blocks that are being written or wait for it. With the one being filled: the extra memory of a save."""

O_DIRECT: int = getattr(os, "O_DIRECT", 0)

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2)


def open_direct(path: str, flags: int) -> int:
    """Open for writing past the page cache; through it where the file system refuses.

    Linux makes the file before it refuses to open it so, and with O_EXCL there is no second try: so it is asked once
    the file is open.
    """
    fd = os.open(path, flags, 0o666)
    if O_DIRECT:
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | O_DIRECT)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(fd)
                raise
    return fd


def write_blocks(
    fd: int, pieces: Iterable[bytes | bytearray | memoryview], size: int, *, steady: bool, threads: int = 2
) -> int:
    """Write ``pieces``, ``size`` bytes in all, to an empty file; returns how many bytes there were.

    Each piece is done with when the next one is asked for, unless ``steady``: then it stays as it is while the
    ``STEADY`` after it are asked for, and what lies in page-aligned memory is written from where it is. ``threads``
    writes are under way at a time.
    """
    _preallocate(fd, size)
    with Pool(threads, thread_name_prefix="checkpointer-disk") as pool:
        written = _Blocks(fd, pool, size, steady=steady).write(pieces)
    os.ftruncate(fd, written)  # the last block was filled up
    return written


class _Blocks:
    """One file on its way to the disk."""

    def __init__(self, fd: int, pool: Pool, size: int, *, steady: bool) -> None:
        self._fd = fd
        self._pool = pool
        self._block = min(STEADY_BLOCK if steady else BLOCK, page_aligned(size))
        ring = np.frombuffer(Region(self._block * (IN_FLIGHT + 1)).view, dtype=np.uint8)
        self._free = [ring[start : start + self._block] for start in range(0, len(ring), self._block)]
        self._flight: deque[tuple[Future[None], np.ndarray[Any, Any] | None, int]] = deque()
        self._piece = 0
        """Number of the piece in hand."""
        self._steady = steady
        self._offset = 0
        """Where the block that is being filled goes."""
        self._filled = 0

    def write(self, pieces: Iterable[bytes | bytearray | memoryview]) -> int:
        steady = self._steady
        current: np.ndarray[Any, Any] | None = None
        for self._piece, piece in enumerate(pieces):
            rest = np.frombuffer(piece, dtype=np.uint8)
            if steady and not self._filled and len(rest) >= PAGE and _address(rest) % PAGE == 0:
                whole = len(rest) - len(rest) % PAGE
                self._submit(rest[:whole], None)
                rest = rest[whole:]
            while len(rest):
                if current is None:
                    current = self._next_block()
                count = min(len(rest), self._block - self._filled)
                np.copyto(current[self._filled : self._filled + count], rest[:count])  # without the GIL
                self._filled += count
                rest = rest[count:]
                if self._filled == self._block or (steady and not len(rest) and self._filled % PAGE == 0):
                    self._submit(current[: self._filled], current)
                    current, self._filled = None, 0
            while self._flight and self._flight[0][2] <= self._piece - STEADY:
                self._land()  # the memory of that piece may be used again when the next one is asked for
        end = self._offset + self._filled
        if current is not None:
            padded = page_aligned(self._filled)
            current[self._filled : padded] = 0
            self._submit(current[:padded], current)
        while self._flight:
            self._land()
        return end

    def _next_block(self) -> np.ndarray[Any, Any]:
        while not self._free:
            self._land()
        return self._free.pop()

    def _submit(self, block: np.ndarray[Any, Any], owner: np.ndarray[Any, Any] | None) -> None:
        if len(self._flight) == IN_FLIGHT:
            self._land()
        self._flight.append((self._begin(block.data), owner, self._piece))
        self._offset += len(block)

    def _begin(self, view: memoryview) -> Future[None]:
        block: Future[None] = Future()
        try:
            self._pool.submit(_write_block, block, self._fd, view, self._offset)
        except RuntimeError:  # no thread can be started, for example because the interpreter is about to exit
            if block.cancel():  # else one that runs already has found it in the queue
                block = Future()
                _write_block(block, self._fd, view, self._offset)
        return block

    def _land(self) -> None:
        """Wait for the oldest block; what went wrong with it ends the file."""
        future, owner, _ = self._flight.popleft()
        future.result()
        if owner is not None:
            self._free.append(owner)


def _write_block(block: Future[None], fd: int, view: memoryview, offset: int) -> None:
    """Carry ``block`` out, unless somebody else has by now."""
    if not block.set_running_or_notify_cancel():
        return
    try:
        _write_at(fd, view, offset)
    except BaseException as error:  # noqa: BLE001  handed to whoever waits
        block.set_exception(error)
    else:
        block.set_result(None)


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    position = 0
    while position < len(view):
        direct = _is_direct(fd)  # now: another thread may stop it while this one writes
        try:
            count = os.pwrite(fd, view[position:], offset + position)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            _stop_direct(fd)
            continue
        end = position + count
        if direct and end < len(view):
            end -= end % PAGE  # a short write: the rest has to be aligned again
        if end > position:
            position = end
        elif direct:
            _stop_direct(fd)
        else:
            raise OSError(errno.EIO, f"none of {len(view) - position} bytes were taken")
    if not _is_direct(fd):
        _start_write_back(fd, offset, len(view))


def _is_direct(fd: int) -> bool:
    import fcntl

    return bool(O_DIRECT and fcntl.fcntl(fd, fcntl.F_GETFL) & O_DIRECT)


def _stop_direct(fd: int) -> None:
    """Go on through the page cache."""
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)


def _preallocate(fd: int, size: int) -> None:
    """Reserve the blocks of the whole file: a full disk is noticed at once, and the file lies in few extents.

    Where that cannot be, or a signal comes in between, they are found while writing.
    """
    call = _system_call("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call is None or call(fd, 0, 0, page_aligned(size)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (*_UNSUPPORTED, errno.EINTR):
        raise OSError(code, os.strerror(code))


def _start_write_back(fd: int, offset: int, size: int) -> None:
    """Let the kernel begin to write what it holds, so that the fsync at the end finds little left. Only a hint."""
    call = _system_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call is not None:
        call(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _system_call(name: str, *types: Any) -> Callable[..., int] | None:
    """A function of Linux's C library; ``None`` elsewhere. Without posix_fallocate: that one writes zeros instead."""
    if sys.platform != "linux":
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = types
    found: Callable[..., int] | None = function
    return found


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])
