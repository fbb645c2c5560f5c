"""What a manager knows of the job that it is part of: one process, or the ranks of the default process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

from checkpointer.distributed.clock import SharedClock
from checkpointer.distributed.exchange import AS_JSON, Meeting, Ranks, ranks_of_job
from checkpointer.distributed.opening import open_run
from checkpointer.distributed.save_plan import Cooperation
from checkpointer.format.index import Json
from checkpointer.storage import Storage

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
    def cooperation(self) -> Cooperation:
        """How they save together."""
        return Cooperation(self.ranks)

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
            open_run(self.ranks, self._storage, take)
            self._opened = True
