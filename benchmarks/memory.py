"""How much memory something takes while it runs: of this process, of its children, and what they share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.0005
"""Seconds between two looks."""


@dataclass(frozen=True)
class Usage:
    """Bytes. Mapped files are left out: the system takes their pages back when it wants."""

    private: int
    """Anonymous memory of this process and its children."""
    shared: int
    """Shared memory, counted in the process that maps most of it."""

    @property
    def total(self) -> int:
        """Both."""
        return self.private + self.shared


def usage() -> Usage:
    """As it is now."""
    found = [_of_process(pid) for pid in (os.getpid(), *children())]
    return Usage(sum(private for private, _ in found), max(shared for _, shared in found))


def children() -> list[int]:
    """Processes that this one has started, and theirs."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    for pid in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())
    return found


def _of_process(pid: int) -> tuple[int, int]:
    try:
        fields = _status(pid)
    except OSError:  # it has ended
        return 0, 0
    return fields.get("RssAnon", 0), fields.get("RssShmem", 0)


def _status(pid: int) -> dict[str, int]:
    """What /proc says in kB, in bytes."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        lines = [line.split() for line in file]
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


class Peak:
    """The most that was used, beyond what was used when this was made."""

    def __init__(self) -> None:
        collect()
        self._before = usage()
        self.extra = 0
        """Bytes."""

    def look(self) -> None:
        """Compare with what was the most so far."""
        self.extra = max(self.extra, usage().total - self._before.total)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Look all the time, from a thread; nothing should be timed meanwhile.

        The kernel's own high-water mark catches what comes and goes between two looks, in this process.
        """
        collect()
        stop = threading.Event()
        start, before = usage(), _status(os.getpid())
        marked = _reset_high_water_mark()

        def run() -> None:
            while not stop.wait(INTERVAL):
                self.look()

        thread = threading.Thread(target=run, name="memory")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.look()
            after = _status(os.getpid())
            if marked and after["RssFile"] <= before["RssFile"]:  # else the mark counts pages of mapped files too
                self.extra = max(self.extra, after["VmHWM"] - before["VmRSS"] + start.total - self._before.total)


def collect() -> None:
    """Free what nobody uses, and give it back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
