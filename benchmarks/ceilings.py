"""What the machine can do with as many bytes as the state has: copy, write durably, read."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.buffers import PAGE, Buffer
from benchmarks.pagecache import evict, load

MIB = 1 << 20
TITLES = {
    "memcpy": "copy into touched memory",
    "write": "write durably (O_DIRECT, preallocated, fdatasync)",
    "warm_read": "read from the page cache into touched memory",
    "cold_read": "read from the disk into touched memory",
}


class Ceilings:
    """Each way of doing it is tried in every round; what counts is the way with the best median."""

    def __init__(self, source: Buffer, scratch: Buffer, folder: Path, device: torch.device | None = None) -> None:
        """``device``: where the state lives, if it is a GPU."""
        self._device = device if device is not None and device.type == "cuda" else None
        self._source, self._scratch = source, scratch
        self._path = folder / "ceiling"
        self._pools = {threads: ThreadPoolExecutor(threads) for threads in (1, 2)}
        self._direct = _takes_direct(folder)
        self.left_cached = 0.0
        """The largest share of the file that could not be taken out of the page cache before a cold read."""

    def measure(self) -> dict[str, dict[str, list[float]]]:
        """Seconds, by ceiling and by the way that it was done."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in TITLES}
        if self._device is None:
            self._add_copies(found["memcpy"])
        else:
            self._add_copies_from(self._device, found["memcpy"])
        for threads in self._pools:
            for block in (8 * MIB, 16 * MIB):
                self._add_write(found["write"], threads, block)
        self._add_reads(found)
        self._path.unlink()
        return found

    def close(self) -> None:
        """Free the threads."""
        for pool in self._pools.values():
            pool.shutdown()

    def _add(
        self, samples: dict[str, list[float]], threads: int, block: int, how: str, work: Callable[[int, int], object]
    ) -> None:
        began = time.perf_counter()
        self._in_blocks(threads, block, work)
        _note(samples, threads, min(block, self._source.size), how, began)

    def _in_blocks(self, threads: int, block: int, work: Callable[[int, int], object]) -> None:
        """Call ``work(begin, end)`` for each block; every thread has a contiguous range of its own."""
        size = self._source.size
        share = max(PAGE, -(-size // threads // PAGE) * PAGE)

        def run(first: int) -> None:
            last = min(first + share, size)
            for begin in range(first, last, block):
                work(begin, min(begin + block, last))

        for done in [self._pools[threads].submit(run, first) for first in range(0, size, share)]:
            done.result()

    def _copy_block(self, begin: int, end: int) -> None:
        np.copyto(self._scratch.array[begin:end], self._source.array[begin:end])

    def _add_copies(self, samples: dict[str, list[float]]) -> None:
        for threads in self._pools:
            for block in (2 * MIB, self._source.size):
                for _ in range(2):
                    self._add(samples, threads, block, "", self._copy_block)
        self._check_copy()

    def _add_copies_from(self, device: torch.device, samples: dict[str, list[float]]) -> None:
        """Into pinned memory."""
        source = torch.empty(self._source.size, dtype=torch.uint8, device=device).random_()
        target = torch.empty(self._source.size, dtype=torch.uint8, pin_memory=True)
        for _ in range(3):
            finish_device_work()
            began = time.perf_counter()
            target.copy_(source)
            samples.setdefault("GPU to pinned memory", []).append(time.perf_counter() - began)

    def _check_copy(self) -> None:
        """After the copies the scratch memory holds the state: checked, so that no ceiling counts what was not done."""
        if not np.array_equal(self._scratch.array[:: 1 << 16], self._source.array[:: 1 << 16]):
            raise AssertionError("the copy is not a copy")

    def _add_write(self, samples: dict[str, list[float]], threads: int, block: int) -> None:
        self._path.unlink(missing_ok=True)
        os.sync()  # the file system's own work for the file before
        began = time.perf_counter()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | self._direct, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, self._source.size)
            self._in_blocks(threads, block, partial(self._write_block, descriptor))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        _note(samples, threads, block, "" if self._direct else " buffered", began)

    def _write_block(self, descriptor: int, begin: int, end: int) -> None:
        while begin < end:
            begin += os.pwrite(descriptor, self._source.memory[begin:end], begin)

    def _read_block(self, descriptor: int, begin: int, end: int) -> None:
        while begin < end:
            begin += os.preadv(descriptor, [self._scratch.memory[begin:end]], begin)

    def _add_reads(self, found: dict[str, dict[str, list[float]]]) -> None:
        ways = [("buffered", 0, 2 * MIB), ("O_DIRECT", self._direct, 8 * MIB)][: 2 if self._direct else 1]
        for how, flag, block in ways:
            self.left_cached = max(self.left_cached, evict([self._path]))
            self._read(found["cold_read"], f" {how}", flag, block)
        load([self._path])
        for block in (MIB // 2, 2 * MIB):
            self._read(found["warm_read"], "", 0, block)

    def _read(self, samples: dict[str, list[float]], how: str, flag: int, block: int) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | flag)
        try:
            self._add(samples, 2, block, how, partial(self._read_block, descriptor))
        finally:
            os.close(descriptor)


def finish_device_work() -> None:
    """Until GPUs have done what they were given: they are not part of what the clock shows otherwise."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _note(samples: dict[str, list[float]], threads: int, block: int, how: str, began: float) -> None:
    size = f"{block // MIB} MiB" if block >= MIB else f"{block // 1024} KiB"
    way = f"{threads} thread{'s' * (threads > 1)}, {size}{how}"
    samples.setdefault(way, []).append(time.perf_counter() - began)


def _takes_direct(folder: Path) -> int:
    """``O_DIRECT`` where the file system takes it, else 0."""
    flag = getattr(os, "O_DIRECT", 0)
    path = folder / "probe"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag)
        try:
            os.write(descriptor, mmap.mmap(-1, PAGE))
        finally:
            os.close(descriptor)
    except OSError:
        return 0
    finally:
        path.unlink(missing_ok=True)
    return flag
