"""The interval of ``save: {every: auto}``: picked from what saves have cost in this run, and told to its user."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.cost import SaveCost
from checkpointer.policy.schedule import Interval, SavePolicy, choose_interval

MUCH = 1.5
"""A change of the interval by this factor, either way, is told."""

logger = logging.getLogger("checkpointer")


class Pace:
    """Remembers nothing but what it has said: the costs lie in the manifests, so they survive restarts."""

    def __init__(self, policy: SavePolicy) -> None:
        self._policy = policy
        self._known: Sequence[CheckpointInfo] = ()
        self._interval: Interval | None = None
        self._told: Interval | None = None

    def interval(self, recent: Sequence[CheckpointInfo]) -> Interval | None:
        """How long to wait after the last of ``recent``, the newest commits; ``None`` while no cost is known."""
        if self._policy.max_overhead is None or self._policy.mtbf is None:
            return None
        if recent is not self._known:  # it is asked at every step, and changes with every commit
            costs = [SaveCost.from_statistics(info.statistics) for info in recent]
            self._known = recent
            self._interval = choose_interval(costs, max_overhead=self._policy.max_overhead, mtbf=self._policy.mtbf)
            self._tell(self._interval)
        return self._interval

    def _tell(self, interval: Interval | None) -> None:
        if interval is not None and (self._told is None or _differ(self._told, interval)):
            self._told = interval
            logger.info("saving %s", interval.reason)


def _differ(a: Interval, b: Interval) -> bool:
    shorter, longer = sorted((a.every, b.every))
    return longer > MUCH * shorter
