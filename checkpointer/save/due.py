"""When to save: by rules, clocks, metrics and signals, with one answer for all ranks."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timezone

from checkpointer.distributed.clock import Verdict
from checkpointer.distributed.job import Job
from checkpointer.policy.schedule import SavePolicy, due
from checkpointer.save.handle import PendingSave
from checkpointer.save.pacing import Pace
from checkpointer.save.preemption import Preemption
from checkpointer.save.tip import Tip
from checkpointer.system import messages


class DueSaves:
    """Whether a save is due, and whether it is time to stop. ``last`` is the save in flight, else the tip."""

    def __init__(
        self, policy: SavePolicy, monitors: Collection[str], tip: Tip, job: Job, preemption: Preemption
    ) -> None:
        """``monitors``: the metrics that ``best`` rules go by."""
        self._policy = policy
        self._without_clock = policy.without_clock()
        self._tip = tip
        self._job = job
        self._preemption = preemption
        self._pace = Pace(policy)
        self._monitors = tuple(dict.fromkeys(monitors))
        self._given: tuple[int, str | None] = (-1, None)
        """The step of the call in progress, and the first of ``monitors`` that it was given."""
        self._again = False
        """Whether the call before was given the same."""
        self._said_lost = False
        self._unrecorded: tuple[int, str] | None = None
        """The last call since the last save that was given one of ``monitors``, and saved nothing."""

    def call(self, step: int, metrics: Collection[str] = ()) -> None:
        """A call begins, in which this is decided; ``metrics`` are the names of those that ``save`` was given."""
        before = self._given
        metric = next((name for name in self._monitors if name in metrics), None)
        self._given, self._again = (step, metric), before == (step, metric)
        if self._policy.on_metric and self._job.ranks.size > 1:
            self._job.clock.forget()  # another call at the same step may have been given less

    def say_what_is_lost(self, step: int, last: PendingSave | None) -> None:
        """Warn, once, that a monitored metric was given for a step that is saved already, without it.

        Where nothing is due, that is remembered until the next save: most loops give their metrics at every call.
        """
        _, metric = self._given
        if metric is None:
            return
        if last is None or last.step != step:
            self._unrecorded = (step, metric)
        elif not (self._again or (last.done() and not last.failed and metric in last.result().metrics)):
            cure = f"mgr.annotate({step}, metrics=...) adds it to that checkpoint"
            self._say_lost(metric, f"at step {step}, which is saved already", cure)

    def begun(self, step: int) -> None:
        """A save of ``step`` has begun. Warn, once, if calls before it were given a monitored metric, and this was not:
        then the metric comes at other steps than those that are saved.
        """
        lost, self._unrecorded = self._unrecorded, None
        if lost is not None and self._given[1] is None:
            where = f"at step {lost[0]}, which was none to save at, and not at step {step}, which is saved"
            self._say_lost(lost[1], where, "save: {on_metric: true} makes such calls due")

    def _say_lost(self, metric: str, where: str, cure: str) -> None:
        """What is given on other ranks than the coordinator is never recorded."""
        if self._said_lost or self._job.ranks.rank != 0:
            return
        self._said_lost = True
        messages.warn(
            f"save() was given {metric!r} {where}: the value is recorded nowhere, and keep: best, which goes by it, "
            f"does not see it. {cure}. This is said once",
        )

    def is_due(self, step: int, epoch: int | None, last: PendingSave | None) -> bool:
        """Whether this step is one to save at."""
        if self.stop_agreed(step, epoch, last):
            alone = self._job.ranks.size == 1  # else all have to come to one answer
            return not alone or self._preemption.allows(self._tip.recent) or _in_flight(last)
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
        """What all ranks agree on where clocks, signals and metrics matter, which the coordinator alone is given."""
        policy = self._policy
        if policy.every is None and not policy.on_signal and not policy.on_metric:
            return Verdict(due=False, stop=False)
        asked = policy.every is not None or policy.on_metric
        return self._job.clock.ask(
            step,
            signalled=self._preemption.requested,
            due=lambda: asked and self._rules_fire(policy, step, epoch, last),
            always=policy.on_metric,
        )

    def _rules_fire(self, policy: SavePolicy, step: int, epoch: int | None, last: PendingSave | None) -> bool:
        writing = _in_flight(last)
        last_created = interval = None
        if self._policy.every is not None:
            last_created = last.created if last and writing else self._tip.newest_created
            interval = self._pace.interval(self._tip.recent)
        reasons = due(
            policy,
            step=step,
            epoch=epoch,
            last_epoch=last.epoch if last else None,
            last_created=last_created,
            now=datetime.now(timezone.utc),
            interval=interval,
            writing=writing,
            metric=self._given[1],
        )
        return bool(reasons)


def _in_flight(last: PendingSave | None) -> bool:
    return last is not None and not last.done()
