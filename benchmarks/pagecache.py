"""What of a file lies in memory: put there, taken away, and looked up."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

BLOCK = 8 << 20


def files_under(folder: Path) -> list[Path]:
    """Every plain file in a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


def resident(files: Iterable[Path]) -> float:
    """Share of the files' pages that lie in the page cache."""
    pages = cached = 0
    for path in files:
        here, there = _resident_pages(path)
        cached, pages = cached + here, pages + there
    return cached / max(1, pages)


def _resident_pages(path: Path) -> tuple[int, int]:
    """Cached pages, pages. Maps the file without touching it: mincore(2) answers for the page cache."""
    size = path.stat().st_size
    if not size:
        return 0, 0
    with path.open("rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address in {None, ctypes.c_void_p(-1).value}:
        raise OSError(ctypes.get_errno(), f"mmap of {path}")
    try:
        flags = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        if _libc.mincore(address, size, flags.ctypes.data):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        _libc.munmap(address, size)
    return int((flags & 1).sum()), len(flags)


def evict(files: Iterable[Path]) -> float:
    """Take files out of the page cache; returns the share that stayed (a tmpfs keeps everything)."""
    files = list(files)
    for path in files:
        sync(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(files)
    if left > 0:
        with (
            contextlib.suppress(OSError),
            open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as switch,
        ):  # root only
            switch.write("1")
        left = resident(files)
    return left


def load(files: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    block = memoryview(bytearray(BLOCK))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def sync(path: Path) -> None:
    """Fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Fsync of everything in a folder, of the folder itself, and of its parent's entry for it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)
    sync(folder.parent)
