"""Time rules, metrics and signals on several ranks.

Their clocks differ, metrics are those of the coordinator, and a signal may come to one of them alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from checkpointer.distributed.exchange import Ranks

EVERY = 1.0
"""Seconds between two questions, about: a rule of minutes needs no better, and a fast loop pays next to nothing."""

MOST_CALLS = 1000
"""Calls between two questions at most: a loop may become slower."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on."""

    due: bool
    """Whether the coordinator's clock says that a save is due."""
    stop: bool
    """Whether a signal has come, to any rank."""


class _Answer(NamedTuple):
    """What the coordinator makes of a question."""

    due: bool
    stop: bool
    next: int
    """The call in which to ask again."""


class SharedClock:
    """Asks the coordinator in some of the calls of ``save``: the same calls on every rank, so that all save together.

    Where only rules of steps and epochs are configured nobody is asked: every rank comes to the same answer by itself.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._calls = 0
        self._next = 1
        self._asked = time.monotonic()
        self._asked_at = 0
        self._skip = 1
        """Calls from one question to the next; grows step by step, since a loop may begin with fast calls."""
        self._last: tuple[int, Verdict] | None = None
        self.stop = False
        """Whether all ranks know of a signal."""

    def forget(self) -> None:
        """Ask anew even if the step is the same: every rank is in another call of ``save``."""
        self._last = None

    def ask(self, step: int, *, signalled: bool, due: Callable[[], bool], always: bool = False) -> Verdict:
        """The verdict for a step; one for all the calls that ask for the same.

        ``signalled``: whether a signal has come to this rank; ``due`` is called on the coordinator. ``always``: ask in
        this call, however short ago the last question was: what it is about does not come again.
        """
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        self._calls += 1
        verdict = Verdict(due=False, stop=self.stop)
        if always or self._calls >= self._next:
            verdict = self._asked_all(signalled=signalled, due=due)
        self._last = (step, verdict)
        return verdict

    def _asked_all(self, *, signalled: bool, due: Callable[[], bool]) -> Verdict:
        with self._ranks.exchange("whether a save is due") as exchange:
            signals = exchange.gather(signalled, bool)
            answer = exchange.broadcast(None if signals is None else self._decide(any(signals), due), _Answer)
        self.stop, self._next = answer.stop, answer.next
        return Verdict(answer.due, answer.stop)

    def _decide(self, signalled: bool, due: Callable[[], bool]) -> _Answer:  # noqa: FBT001  any() of what ranks say
        stop = signalled or self.stop
        return _Answer(stop or due(), stop, self._calls + self._pause())

    def _pause(self) -> int:
        """After how many calls to ask again. On the coordinator."""
        now = time.monotonic()
        seconds = max(now - self._asked, 1e-6) / max(self._calls - self._asked_at, 1)
        self._asked, self._asked_at = now, self._calls
        self._skip = max(1, min(int(EVERY / seconds), 2 * self._skip, MOST_CALLS))
        return self._skip
