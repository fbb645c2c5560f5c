"""Saves that wait for the one before again and again: said once, with what it costs and the cure."""

from __future__ import annotations

from collections import deque

from checkpointer.policy.waiting import IN_A_ROW, Wait, too_often
from checkpointer.system import messages


class Waits:
    """What the saves of one manager have waited. Times are those of ``time.perf_counter()``."""

    def __init__(self) -> None:
        self._before: float | None = None
        self._recent: deque[Wait] = deque(maxlen=IN_A_ROW)
        self._lost = 0.0
        self._said = False

    def begins(self, called: float, settled: float, *, scheduled: bool, says: bool) -> None:
        """A save was called, and the one before is written now. Warns, once, where that happens too often.

        ``scheduled``: it came by itself, and in the background. One that is forced, or follows a signal, waits because
        its user wants it now. ``says``: this rank is the one that warns.
        """
        before, self._before = self._before, called
        if before is None or not scheduled:
            return
        waited = settled - called
        self._recent.append(Wait(waited, settled - before))
        self._lost += waited
        cost = too_often(tuple(self._recent), self._lost)
        if cost is None or self._said:
            return
        self._said = True
        if not says:
            return
        messages.warn(
            f"saves are due faster than they can be written: {cost} for the one before. Save less often "
            "(save: {every_n_steps: N}, or {every: auto}, which never waits), to a faster disk, or fewer bytes "
            "(write: {share: 8} writes frozen parameters once for 8 saves). This is said once",
        )
