"""Host memory that staged state is copied into: page-aligned, reused by every save, filled at memory speed."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from operator import itemgetter
from typing import NamedTuple

import torch

from checkpointer.staging.gpu import Transfer, Transfers, copy_out, is_row_major, pin, unpin
from checkpointer.staging.prefault import Prefault
from checkpointer.system.memory import Region, copy_memory, page_aligned
from checkpointer.system.threads import Pool

LARGE = 256 << 10
"""Bytes. From here on it pays to share a copy with another thread."""

PIECE = 64 << 20
"""Bytes that one thread copies at a time, at most. C libraries write around the processor's cache where one copy is
large compared with it: that takes two thirds of the time."""

SMALLEST_PIECE = 4 << 20
"""Bytes of a piece, where all threads together have less to copy than a ``PIECE`` each."""


MOST_THREADS = 8
"""Memory is busy with fewer."""

SPARE = 64 << 20
"""Bytes that are mapped beyond half as much again as is known to be needed."""


class Copy(NamedTuple):
    """The row-major bytes of a tensor, and where in the arena they go."""

    tensor: torch.Tensor
    offset: int
    size: int


class Arena:
    """Memory that grows when it has to and shrinks never, until it is freed."""

    def __init__(self, threads: int | None = None) -> None:
        """``threads`` copy, as many as there are cores for if ``None``: training waits for them, and one is slow.

        None uses OpenMP, whose barriers wait for a thread that has lost its core.
        """
        self._threads = threads or copy_threads()
        self._region: Region | None = None
        self._pool: Pool | None = None
        self._pinned = False
        self._running: Transfers | None = None
        """What may still be written to, by a GPU."""
        self._prefault: Prefault | None = None
        self._stopped: list[Prefault] = []
        """Those whose thread may still be in its last piece."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return self._region.size if self._region is not None else 0

    @property
    def address(self) -> int:
        """Of the first byte."""
        assert self._region is not None
        return self._region.address

    def reserve(self, size: int, *, pinned: bool = False) -> memoryview:
        """At least ``size`` bytes; whatever was there before is overwritten from now on.

        ``pinned``: registered with CUDA, so that copies from the GPU run at the bus's speed.
        """
        self._wait()
        self._stop_touching()
        region = self._make(size, huge=pinned)
        if pinned and not self._pinned:
            self._pinned = pin(region)
        return region.view

    def touch(self, size: int, *, pinned: bool = False) -> None:
        """Have ``size`` bytes touched beside training, for the ``reserve`` to come; whatever was there before is lost.

        More are mapped, since what is known by now may not be all. They take memory only once they are used.
        """
        self._wait()
        self._stop_touching()
        self._prefault = Prefault(self._make(size + size // 2 + SPARE, huge=pinned), size)

    def _stop_touching(self) -> None:
        """Leave what is not touched yet to whoever fills it."""
        prefault, self._prefault = self._prefault, None
        if prefault is not None:
            prefault.stop()
            self._stopped.append(prefault)

    def fill(self, copies: Iterable[Copy]) -> None:
        """Carry out all ``copies``; when this returns the tensors may change."""
        spans = []
        others: list[Copy] = []
        for copy in copies:
            tensor, offset, size = copy
            if is_flat(tensor):
                spans.append((offset, tensor.data_ptr(), size))
            elif size:
                others.append(copy)
        self.fill_from_memory(spans)
        self._fill_from_elsewhere(others)

    def fill_from_memory(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Copy ``(offset in the arena, address, bytes)`` each."""
        assert self._region is not None
        address = self._region.address
        moves = [(address + offset, source, size) for offset, source, size in spans]
        small = [move for move in moves if move[2] < LARGE]
        pieces = _pieces([move for move in moves if move[2] >= LARGE], self._threads)
        helpers: list[Future[None]] = []
        try:
            if len(pieces) > 1:
                self._call_helpers(pieces, helpers)
            for target, source, size in small:
                copy_memory(target, source, size)
            _copy_pieces(pieces)
        finally:
            pieces.clear()  # where this thread was interrupted: nobody may go on, from memory that may be freed now
            wait(helpers)
        for helper in helpers:
            helper.result()

    def begin(self, beside: Iterable[Copy], at_once: Iterable[Copy]) -> Transfers:
        """Carry out ``at_once``, as far as the processor sees it; GPUs may copy while training goes on.

        Then they copy ``at_once`` before whatever the current stream is given from now on, ``beside`` when they can.
        """
        in_order: list[Copy] = []
        here: list[Copy] = []
        for copy in at_once:
            (in_order if copy.tensor.is_cuda else here).append(copy)
        self._running = Transfers(self._transfers(beside), self._transfers(in_order))
        self.fill(here)
        return self._running

    def free(self) -> None:
        """Give the memory and the threads back."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _fill_from_elsewhere(self, copies: Iterable[Copy]) -> None:
        """From other devices, and from memory that is not row-major."""
        copy_out(self._transfers(copies), pinned=self._pinned)

    def _transfers(self, copies: Iterable[Copy]) -> list[Transfer]:
        return [Transfer(tensor, self.address + offset) for tensor, offset, _ in copies]

    def _call_helpers(self, pieces: deque[tuple[int, int, int]], helpers: list[Future[None]]) -> None:
        """Let other threads take pieces too; each is added to ``helpers``."""
        if self._pool is None and self._threads > 1:
            self._pool = Pool(self._threads - 1, thread_name_prefix="checkpointer-copy")
        for _ in range(self._threads - 1):
            assert self._pool is not None
            try:
                helpers.append(self._pool.submit(_copy_pieces, pieces))
            except RuntimeError:  # no thread can be started, for example because the interpreter is about to exit
                return

    def _make(self, size: int, *, huge: bool) -> Region:
        """Plain pages are touched in a fifth of the time of huge ones on a machine that has run for a while, and are
        filled as fast from then on. A GPU's driver, which pins each page, works faster with few.
        """
        if self._region is None or self._region.size < size:
            self._drop()  # first: both at once may be more than the machine has
            self._region = Region(size, huge=huge)
        return self._region

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.wait()

    def _drop(self) -> None:
        self._wait()
        self._stop_touching()
        while self._stopped:
            self._stopped.pop().join()
        if self._pinned and self._region is not None:
            unpin(self._region)
        self._pinned = False
        self._region = None


def copy_threads() -> int:
    """How many threads copy while training waits: one for each core, shared with other ranks that torchrun started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(MOST_THREADS, max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1)))


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the row-major bytes of a tensor are what lies in host memory from ``data_ptr()`` on."""
    return tensor.is_cpu and is_row_major(tensor)


def _pieces(moves: Sequence[tuple[int, int, int]], threads: int) -> deque[tuple[int, int, int]]:
    """``(target, source, bytes)`` cut so that ``threads`` end at about the same time: the largest come first."""
    share = sum(size for _, _, size in moves) // (2 * threads)
    most = min(PIECE, max(SMALLEST_PIECE, page_aligned(share)))
    cut: list[tuple[int, int, int]] = []
    for target, source, size in moves:
        cut += ((target + at, source + at, min(most, size - at)) for at in range(0, size, most))
    return deque(sorted(cut, key=itemgetter(2), reverse=True))


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy until none is left; memmove releases the GIL."""
    while True:
        try:
            target, source, size = pieces.popleft()
        except IndexError:
            return
        ctypes.memmove(target, source, size)
