"""What the ranks of one host tell each other without the store: a page of memory that one writes and the others read.

On each host the lowest rank looks into the store for the coordinator's answers, and counts them here. The page only
says when it is worth a look: the answer itself is in the store, and whoever sees no page looks there more often.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
import zlib
from typing import NamedTuple

from checkpointer.distributed.liveness import Process

_PAGE, _NUMBER = 4096, 8
"""Bytes of a page, and of one number on it."""


class Address(NamedTuple):
    """Where the others find a page."""

    name: str
    fd: int
    """Of the process that writes it."""


class HostPage:
    """The page that this process writes. It goes with this object, or with the process."""

    def __init__(self) -> None:
        self.address: Address | None = None
        self._fd: int | None = None
        if not hasattr(os, "memfd_create"):
            return
        name = f"checkpointer-{secrets.token_hex(8)}"
        with contextlib.suppress(
            OSError
        ):  # no descriptor left, or forbidden: the others look into the store themselves
            fd = os.memfd_create(name)
            self._closing = weakref.finalize(self, os.close, fd)
            os.write(fd, bytes(_PAGE))  # all of it: later writes need no more memory, and do not fail
            self.address, self._fd = Address(name, fd), fd

    def count(self, channel: str, number: int) -> None:
        """Say that the answer of this number is there."""
        if self._fd is not None:
            os.pwrite(self._fd, number.to_bytes(_NUMBER, "little"), _place(channel))

    def close(self) -> None:
        """Nobody reads it."""
        if self._fd is not None:
            self._fd = None
            self._closing()


class PageReader:
    """The page of another process of this host."""

    def __init__(self, process: Process | None, address: Address | None) -> None:
        self._fd = _opened(process, address)
        if self._fd is not None:
            weakref.finalize(self, os.close, self._fd)

    def __bool__(self) -> bool:
        return self._fd is not None

    def counted(self, channel: str) -> int:
        """The number of the newest answer that is there; 0 where none has been."""
        assert self._fd is not None
        return int.from_bytes(os.pread(self._fd, _NUMBER, _place(channel)), "little")


def _opened(process: Process | None, address: Address | None) -> int | None:
    """A descriptor of the page; ``None`` where the system does not let us have it."""
    if process is None or address is None:
        return None
    with contextlib.suppress(OSError):  # its process has ended, or the system keeps its descriptors from us
        fd = os.open(f"/proc/{process.pid}/fd/{address.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{address.name} "):
            return fd
        os.close(fd)  # the number was given to another file since
    return None


def _place(channel: str) -> int:
    return zlib.crc32(channel.encode()) % (_PAGE // _NUMBER) * _NUMBER
