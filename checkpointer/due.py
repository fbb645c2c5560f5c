"""When to save: by rules, clocks and signals, with one answer for all ranks."""

from __future__ import annotations

from datetime import datetime, timezone

from checkpointer.distributed.clock import Verdict
from checkpointer.distributed.job import Job
from checkpointer.pacing import Pace
from checkpointer.position import Position
from checkpointer.preemption import Preemption
from checkpointer.saving import PendingSave
from checkpointer.schedule import SavePolicy, due


class DueSaves:
    """Whether a save is due, and whether it is time to stop. ``last`` is the save in flight, else the tip."""

    def __init__(self, policy: SavePolicy, position: Position, job: Job, preemption: Preemption) -> None:
        self._policy = policy
        self._without_clock = policy.without_clock()
        self._position = position
        self._job = job
        self._preemption = preemption
        self._pace = Pace(policy)

    def is_due(self, step: int, epoch: int | None, last: PendingSave | None) -> bool:
        """Whether this step is one to save at."""
        if self.stop_agreed(step, epoch, last):
            alone = self._job.ranks.size == 1  # else all have to come to one answer
            return not alone or self._preemption.allows(self._position.recent) or _in_flight(last)
        if self._job.ranks.size == 1:
            return self._rules_fire(self._policy, step, epoch, last)
        if self._without_clock is not None and self._rules_fire(self._without_clock, step, epoch, last):
            return True
        return self._ask(step, epoch, last).due

    def stop_agreed(self, step: int, epoch: int | None, last: PendingSave | None) -> bool:
        """Whether a signal has come; with several ranks: and all of them know."""
        if self._job.ranks.size == 1:
            return self._preemption.requested
        return self._ask(step, epoch, last).stop

    def _ask(self, step: int, epoch: int | None, last: PendingSave | None) -> Verdict:
        """What all ranks agree on where clocks and signals matter."""
        policy = self._policy
        if policy.every is None and not policy.on_signal:
            return Verdict(due=False, stop=False)
        return self._job.clock.ask(
            step,
            signalled=self._preemption.requested,
            due=lambda: policy.every is not None and self._rules_fire(policy, step, epoch, last),
        )

    def _rules_fire(self, policy: SavePolicy, step: int, epoch: int | None, last: PendingSave | None) -> bool:
        writing = _in_flight(last)
        last_created = interval = None
        if self._policy.every is not None:
            last_created = last.created if last and writing else self._position.newest_created
            interval = self._pace.interval(self._position.recent)
        reasons = due(
            policy,
            step=step,
            epoch=epoch,
            last_epoch=last.epoch if last else None,
            last_created=last_created,
            now=datetime.now(timezone.utc),
            interval=interval,
            writing=writing,
        )
        return bool(reasons)


def _in_flight(last: PendingSave | None) -> bool:
    return last is not None and not last.done()
