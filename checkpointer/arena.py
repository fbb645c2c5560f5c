"""Host memory that staged state is copied into: page-aligned, reused by every save, filled at memory speed."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from checkpointer.memory import Region, copy_memory
from checkpointer.state.tensors import raw

LARGE = 256 << 10
"""Bytes. From here on it pays to share a copy with another thread."""

PIECE = 4 << 20
"""Bytes of a large copy that one thread takes at a time."""


class Copy(NamedTuple):
    """The row-major bytes of a tensor, and where in the arena they go."""

    tensor: torch.Tensor
    offset: int
    size: int


class Arena:
    """Memory that grows when it has to and shrinks never, until it is freed."""

    def __init__(self, threads: int = 2) -> None:
        """``threads`` copy: one alone may not reach the memory's speed.

        None uses OpenMP, whose barriers wait for a thread that has lost its core.
        """
        self._threads = threads
        self._region: Region | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pinned = False

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
        if self._region is None or self._region.size < size:
            self._drop()  # first: both at once may be more than the machine has
            self._region = Region(size)
        if pinned and not self._pinned:
            self._pinned = _register(self._region)
        return self._region.view

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
        small: list[tuple[int, int, int]] = []
        pieces: deque[tuple[int, int, int]] = deque()
        for offset, source, size in spans:
            target = self._region.address + offset
            if size < LARGE:
                small.append((target, source, size))
            else:
                pieces += ((target + at, source + at, min(PIECE, size - at)) for at in range(0, size, PIECE))
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

    def free(self) -> None:
        """Give the memory and the threads back."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _fill_from_elsewhere(self, copies: Iterable[Copy]) -> None:
        """From other devices, and from memory that is not row-major."""
        assert self._region is not None
        devices = set()
        for tensor, offset, size in copies:
            bits = raw(tensor)
            target = torch.frombuffer(self._region.view, dtype=torch.uint8, count=size, offset=offset)
            target.view(bits.dtype).view(bits.shape).copy_(bits, non_blocking=self._pinned)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def _call_helpers(self, pieces: deque[tuple[int, int, int]], helpers: list[Future[None]]) -> None:
        """Let other threads take pieces too; each is added to ``helpers``."""
        if self._pool is None and self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="checkpointer-copy")
        for _ in range(self._threads - 1):
            assert self._pool is not None
            try:
                helpers.append(self._pool.submit(_copy_pieces, pieces))
            except RuntimeError:  # no thread can be started, for example because the interpreter is about to exit
                return

    def _drop(self) -> None:
        if self._pinned and self._region is not None:
            _unregister(self._region)
        self._pinned = False
        self._region = None


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the row-major bytes of a tensor are what lies in host memory from ``data_ptr()`` on."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy until none is left; memmove releases the GIL."""
    while True:
        try:
            target, source, size = pieces.popleft()
        except IndexError:
            return
        ctypes.memmove(target, source, size)


def _register(region: Region) -> bool:
    """Pin the region for CUDA; where the driver refuses, copies are only slower."""
    return int(torch.cuda.cudart().cudaHostRegister(region.address, region.size, 0)) == 0


def _unregister(region: Region) -> None:
    torch.cuda.cudart().cudaHostUnregister(region.address)
