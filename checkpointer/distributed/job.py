"""What a manager knows of the job that it is part of: one process, or the ranks of the default process group."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from checkpointer.distributed.clock import SharedClock
from checkpointer.distributed.exchange import Alone, Ranks
from checkpointer.distributed.save_plan import SavePlanner
from checkpointer.errors import ConfigError
from checkpointer.format import paths
from checkpointer.storage import Storage
from checkpointer.system.host import host_name

T = TypeVar("T")


class _Finds(NamedTuple):
    """After a signal: what a rank finds, or what all of them do."""

    allowed: bool
    """Whether there is time for a save."""
    counts: bool
    """Whether one has been made since the signal."""


class _Probe(NamedTuple):
    """A file that the coordinator has written, for the others to see."""

    path: str
    host: str


class Job:
    """Looks for the process group when it is first asked: a manager may be made before that."""

    def __init__(self, storage: Storage, timeout: timedelta, purpose: str) -> None:
        """``purpose``: what ranks that belong together agree on from the beginning."""
        self._storage = storage
        self._timeout = timeout
        self._purpose = purpose
        self._opened = False

    @cached_property
    def ranks(self) -> Ranks:
        """All ranks, for what the training thread says."""
        return ranks_of_job(self._purpose, self._timeout)

    @cached_property
    def save_planner(self) -> SavePlanner:
        """How they save together."""
        return SavePlanner(self.ranks)

    @cached_property
    def clock(self) -> SharedClock:
        """How they agree on time and signals."""
        return SharedClock(self.ranks)

    @property
    def stop(self) -> bool:
        """Whether all ranks have agreed that a signal has come."""
        return "clock" in self.__dict__ and self.clock.stop

    def agreed(self, allowed: bool, counts: bool) -> tuple[bool, bool]:  # noqa: FBT001  two answers to two questions
        """Whether all ranks find that there is time for a save, and any that one has been made since the signal."""
        with self.ranks.exchange("a save after a signal") as exchange:
            found = exchange.gather(_Finds(allowed, counts), _Finds)
            agreed = None
            if found is not None:
                agreed = _Finds(all(one.allowed for one in found), any(one.counts for one in found))
            return exchange.broadcast(agreed, _Finds)

    def once(self, what: str, *, act: Callable[[], T], look: Callable[[], T]) -> T:
        """``act`` on the coordinator, once all other ranks have done ``look``; each gets what its own call returned."""
        with self.ranks.exchange(what) as exchange:
            if self.ranks.rank:
                found = look()
                exchange.barrier()
                return found
            exchange.arrive()
            found = act()
            exchange.release()
            return found

    def open(self, take: Callable[[], None]) -> None:
        """Call ``take``, which makes this job the run's only writer, on the coordinator, at the first call."""
        if self.ranks.size == 1:
            take()
        elif not self._opened:
            _open_run(self.ranks, self._storage, take)
            self._opened = True


def _open_run(ranks: Ranks, storage: Storage, take: Callable[[], None]) -> None:
    """Call ``take`` on the coordinator, and let every rank look for a file that it has written.

    Found out now, and not by a restore that finds a part of the checkpoints only.

    Raises:
        RunLockedError: on all ranks, if another job writes to the run.
        ConfigError: on all ranks, if one does not see the coordinator's files.
    """
    where = f"opening {storage.url}"
    with ranks.exchange(where) as exchange:
        exchange.arrive()
        probe = exchange.broadcast(_begin_run(storage, take) if ranks.rank == 0 else None, _Probe)
    try:
        with ranks.exchange(where) as exchange:
            _look_for(probe, storage)
            exchange.arrive()
            if ranks.rank == 0:
                storage.remove(probe.path)
            exchange.release()
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                storage.remove(probe.path)
        raise


def _begin_run(storage: Storage, take: Callable[[], None]) -> _Probe:
    """On the coordinator."""
    take()
    probe = _Probe(f"{paths.TMP}/probe-{secrets.token_hex(8)}", host_name())
    storage.put(probe.path, storage.url.encode("utf-8", "backslashreplace"))
    return probe


def _look_for(probe: _Probe, storage: Storage) -> None:
    if not storage.exists(probe.path):
        raise ConfigError(
            f"this rank, on {host_name()}, does not see what rank 0, on {probe.host}, has written to "
            f"{storage.url}: the run root has to be one directory for all ranks. Choose a path on a shared file "
            "system (NFS, Lustre, …), the same on every host, or the URL of an object store"
        )


def ranks_of_job(purpose: str, timeout: timedelta) -> Ranks:
    """All ranks of the default process group; this process alone where there is none.

    ``purpose`` is the same on all ranks: managers that are made for different purposes do not disturb each other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Alone()
    # Only here: one process does without msgspec.
    from checkpointer.distributed.mismatch import Board, Purpose
    from checkpointer.distributed.session import Session
    from checkpointer.distributed.store_ranks import StoreRanks

    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    key = hashlib.sha256(purpose.encode()).hexdigest()[:16]
    count = _made[key] = _made.get(key, 0) + 1
    keys, rank = PrefixStore(f"checkpointer/{key}/{count}", store), dist.get_rank()
    board = Board(store, rank, Purpose(purpose, count))
    return StoreRanks(Session(keys, rank, dist.get_world_size(), board), timeout=timeout.total_seconds())


_made: dict[str, int] = {}
"""How many times ranks have met for each purpose: every time has keys of its own."""
