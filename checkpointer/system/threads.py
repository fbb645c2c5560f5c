"""Threads that help with copying, hashing and writing, and that nobody waits for in vain."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_STACK = 8 << 20
"""Bytes of a thread's stack, where none were asked for."""

_HEAP = 136 << 20
"""Bytes of address space that the C library takes for a new thread's heap, and what Python needs to begin."""

_RESERVED = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)


class Pool(ThreadPoolExecutor):
    """Threads; ``submit`` raises RuntimeError where one more is needed and cannot be started.

    A thread that finds no memory for its first object ends before it has said that it runs, and CPython waits for that
    word without end. So where the address space is limited, it is asked first whether there is enough of it.
    """

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """As its parent's; on RuntimeError the task may have got into the queue all the same."""
        if len(self._threads) < self._max_workers and not room_for_a_thread():
            raise RuntimeError("can't start new thread: the address space is limited, and nearly used up")
        return super().submit(fn, *args, **kwargs)


def room_for_a_thread() -> bool:
    """Whether the limit on the address space of this process, if there is one, leaves enough for another thread."""
    if sys.platform != "linux":
        return True
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return True
    try:
        mmap.mmap(-1, (threading.stack_size() or _STACK) + _HEAP, flags=_RESERVED, prot=0).close()
    except OSError:
        return False
    return True
