"""What a manager knows of the job that it is part of: one process, or the ranks of the default process group."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

from checkpointer.distributed.clock import SharedClock
from checkpointer.distributed.exchange import AS_JSON, Meeting, Ranks, ranks_of_job
from checkpointer.distributed.save_plan import SavePlanner
from checkpointer.errors import ConfigError
from checkpointer.format import paths
from checkpointer.format.index import Json
from checkpointer.storage import Storage
from checkpointer.system.host import host_name

T = TypeVar("T")


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

        def decide(answers: Sequence[Json]) -> Json:
            pairs = [answer for answer in answers if isinstance(answer, list)]
            return [all(pair[0] for pair in pairs), any(pair[1] for pair in pairs)]

        found = self.ranks.meet(Meeting("a save after a signal", AS_JSON, AS_JSON), lambda: [allowed, counts], decide)
        assert isinstance(found, list)
        return bool(found[0]), bool(found[1])

    def once(self, what: str, *, act: Callable[[], T], look: Callable[[], T]) -> T:
        """``act`` on the coordinator, once all other ranks have done ``look``; each gets what its own call returned."""
        found: list[T] = []

        def contribute() -> Json:
            if self.ranks.rank:
                found.append(look())
            return None

        def decide(_: Sequence[Json]) -> Json:
            found.append(act())
            return None

        self.ranks.meet(Meeting(what, AS_JSON, AS_JSON), contribute, decide)
        return found[0]

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
    probe = f"{paths.TMP}/probe-{secrets.token_hex(8)}"

    def begin(roots: Sequence[Json]) -> Json:
        take()
        storage.put(probe, str(roots[0]).encode())
        return [probe, host_name()]

    def look() -> Json:
        if not storage.exists(path):
            raise ConfigError(
                f"this rank, on {host_name()}, does not see what rank 0, on {host}, has written to "
                f"{storage.url}: the run root has to be one directory for all ranks. Choose a path on a shared file "
                "system (NFS, Lustre, …), the same on every host, or the URL of an object store"
            )
        return None

    def end(seen: Sequence[Json]) -> Json:
        del seen
        storage.remove(probe)
        return None

    where = f"opening {storage.url}"
    told = ranks.meet(Meeting(where, AS_JSON, AS_JSON), lambda: storage.url, begin)
    assert isinstance(told, list)
    path, host = map(str, told)
    try:
        ranks.meet(Meeting(where, AS_JSON, AS_JSON), look, end)
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                storage.remove(probe)
        raise
