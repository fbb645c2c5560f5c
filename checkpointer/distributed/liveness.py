"""Which ranks of a job still run: known at once of those on this host, and never wrongly.

A rank is only called dead where this very process has seen it run, and the system says that it does so no more: its
number is free, or belongs to a process that began at another time. Whoever is stopped, stuck or on another host is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_SPACES = ("pid", "time")
"""Namespaces in which a number and a time of a process mean the same."""

_ENDED = ("Z", "X")
"""States of a process that only its parent still knows of."""


class Process(NamedTuple):
    """One process among all that ever ran on any host."""

    where: str
    """Kernel and namespaces: processes of others say nothing here."""
    pid: int
    began: int
    """In clock ticks since the system began."""

    @property
    def runs(self) -> bool:
        """Whether it is there, and has not ended."""
        found = _state(self.pid)
        return found is not None and found[0] not in _ENDED and found[1] == self.began


def this_process() -> Process | None:
    """What this process tells the others of itself; ``None`` where the system has no words for it."""
    where, found = _here(), _state(os.getpid())
    return None if where is None or found is None else Process(where, os.getpid(), found[1])


class Liveness:
    """The other ranks that this process can see."""

    def __init__(self, told: Mapping[int, Process | None]) -> None:
        """``told``: for each rank, what its ``this_process`` was."""
        here = _here()
        found = {rank: process for rank, process in told.items() if process and process.where == here}
        self._seen = {rank: process for rank, process in found.items() if process.runs}

    @property
    def ranks(self) -> frozenset[int]:
        """Those that it has seen run."""
        return frozenset(self._seen)

    def gone(self, ranks: Iterable[int]) -> dict[int, int]:
        """Those of ``ranks`` that run no more, and the process that each was."""
        seen = {rank: self._seen[rank] for rank in ranks if rank in self._seen}
        return {rank: process.pid for rank, process in seen.items() if not process.runs}


def _here() -> str | None:
    """This kernel, and this process's namespaces, as one word; ``None`` where ``/proc`` is not that of these."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in _SPACES if os.path.exists(f"/proc/self/ns/{name}")]
    except OSError:
        return None
    return " ".join([kernel, *spaces])


def _state(pid: int) -> tuple[str, int] | None:
    """One letter, and when it began; ``None`` where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # a name may hold spaces
        return fields[0].decode("ascii"), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
