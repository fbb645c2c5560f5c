"""Which sequence the next commit gets: above that of every other checkpoint of the run, readable or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from checkpointer.repository.lock import WriterLock
from checkpointer.storage import Entry

if TYPE_CHECKING:
    from checkpointer.repository.repository import Listing

SEQUENCE_LEAP = 1_000_000
"""How far a commit leaps ahead of a checkpoint whose sequence is not known; no run has so many commits."""

MAX_SEQUENCE = 2**63 - 1

WHOLE_LOOK_EVERY = 10
"""Commits. The others read what has a new name in the run root; this one finds what somebody has changed in place."""


class Sequences:
    """What a writer remembers of sequences while it holds the lock: nobody else commits. Any doubt ends that."""

    def __init__(self, lock: WriterLock) -> None:
        self._lock = lock
        self._highest = 0
        self._overtaken: set[str] = set()
        """Names of checkpoints whose sequence is at most ``_highest``, whether they can be read now or not."""
        self._read: set[str] = set()
        """Of these the ones whose manifest this writer has read since it took the lock."""
        self._tenure: object | None = None
        self._looks = 0

    def unseen(self, entries: list[Entry]) -> list[Entry]:
        """What of the run root has to be read for the next sequence: ``entries`` itself, or what is new in them."""
        tenure = self._lock.tenure
        if tenure is None or tenure is not self._tenure or self._looks % WHOLE_LOOK_EVERY == 0:
            self._tenure, self._looks, self._read = tenure, 1, set()
            return entries
        self._looks += 1
        return [entry for entry in entries if entry.name not in self._read]

    def next(self, listing: Listing) -> int:
        """The next one. ``listing`` is of what ``unseen`` gave.

        How high that of an unreadable one is nobody knows, unless this process has read it before, or has leapt over
        it. If it were not overtaken, it would be the newest again once it can be read, and the work since then be lost.
        """
        highest = max(self._highest, *listing.checkpoints.sequences, 0)
        unknown = {item.name for item in listing.unreadable if item.may_return} - self._overtaken
        if unknown and highest < MAX_SEQUENCE - SEQUENCE_LEAP:
            highest += SEQUENCE_LEAP
        self._highest = highest
        self._read.update(listing.checkpoints.names)
        leapt_over = (item.name for item in listing.unreadable if item.may_return)
        self._overtaken = self._read.union(leapt_over)
        return highest + 1

    def committed(self, name: str, sequence: int) -> None:
        """This writer has committed ``name``, perhaps in the place of another one."""
        self._highest = max(self._highest, sequence)
        self._read.discard(name)

    def leaves(self, name: str) -> None:
        """This writer removes ``name``: what has that name later is another one."""
        self._read.discard(name)

    @contextlib.contextmanager
    def doubted_if_it_fails(self) -> Iterator[None]:
        """Inside, what this writer knows may become wrong: after an error it looks at everything again."""
        try:
            yield
        except BaseException:
            self._tenure = None
            raise
