"""Following a run from outside: each new checkpoint once, while a trainer saves and prunes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from checkpointer.errors import CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError
from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.repository import Repository, name_of

logger = logging.getLogger("checkpointer")

NAP = 0.1
"""Seconds after which a wait looks whether it is to end. It sleeps in between, and holds no lock: so a signal handler
may do what ends it, which would hang where the handler and the wait share one."""

WHOLE_LOOK_EVERY = 10
"""Looks. The others read nothing where no name is new; this one finds what was replaced under its own name."""


def watch(
    repository: Repository,
    *,
    since: CheckpointInfo | None,
    poll: float,
    timeout: float | None,
    stopped: Callable[[], object],
) -> Iterator[CheckpointInfo]:
    """Yield each checkpoint once, in commit order, until ``stopped`` or for ``timeout`` seconds there is no new one."""
    news = _News(repository, since)
    deadline = _after(timeout)
    while not stopped():
        for info in news.look():
            if stopped():
                return
            if news.is_there(info):
                yield info
                deadline = _after(timeout)
        now = time.monotonic()
        if now >= deadline:
            return
        _sleep(min(poll, deadline - now), stopped)


def _after(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _sleep(seconds: float, stopped: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, NAP))


class _News:
    """What has been seen of a run, and how to see more for little: mostly by the names in its root, one request."""

    def __init__(self, repository: Repository, since: CheckpointInfo | None) -> None:
        self._repository = repository
        self._since = since
        self._seen: set[str] = set()
        """Ids. They are kept for ever: one that was on its way out may come back, if it was pinned just then."""
        self._names: set[str] = set()
        """Of everything that has a manifest."""
        self._looks = 0
        self._failing = False

    def look(self) -> Iterator[CheckpointInfo]:
        """Those that are new, in commit order."""
        first = self._looks == 0
        try:
            found = self._found()
        except OSError as error:
            if first:
                raise
            if not self._failing:  # the network comes back; an evaluator that waits for a week should not end for it
                reason = self._repository.storage.redact(str(error))
                logger.warning(
                    "cannot look for new checkpoints in %s, and go on trying: %s", self._repository.url, reason
                )
            self._failing = True
            return
        self._failing = False
        for info in found:
            self._seen.add(info.id)
            yield info

    def is_there(self, info: CheckpointInfo) -> bool:
        """Whether it still is: while the consumer was busy, retention may have removed it."""
        try:
            self._repository.manifest(info)
        except (CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError):
            return False
        except OSError:  # who restores it will find out
            return True
        return True

    def _found(self) -> list[CheckpointInfo]:
        if self._looks % WHOLE_LOOK_EVERY and not self._repository.committed_beside(self._names):
            self._looks += 1
            return []
        try:
            listing = self._repository.list_checkpoints()
        except CheckpointNotFoundError:  # the run root is not there yet; this was no look at it
            return []
        self._looks += 1
        self._names = {*map(name_of, listing.checkpoints), *(item.name for item in listing.unreadable)}
        if self._since is not None:
            since, self._since = self._since, None
            self._seen |= {info.id for info in listing.checkpoints if _order(info) <= _order(since)}
        return [info for info in listing.checkpoints if info.id not in self._seen and info.damaged is None]


def _order(info: CheckpointInfo) -> tuple[int, float]:
    return (info.sequence, info.created.timestamp())


__all__ = ["watch"]
