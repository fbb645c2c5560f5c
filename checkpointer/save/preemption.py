"""After a signal: which save can still be made durable, and whether the loop may stop."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence

from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.cost import SaveCost
from checkpointer.policy.deadline import Forecast, forecast, time_left
from checkpointer.policy.schedule import SavePolicy
from checkpointer.repository.journal import Journal
from checkpointer.system import messages
from checkpointer.system.signals import SignalFlag

logger = logging.getLogger("checkpointer")


class Preemption:
    """The signals of ``on_signal``, and what has been saved since the first one."""

    def __init__(self, policy: SavePolicy) -> None:
        self._policy = policy
        self._flag = SignalFlag()
        self._said: str | None = None
        self._recorded = False
        self.saved = False
        """Whether a save that counts is durable."""

    def install(self) -> None:
        """Handle the signals from now on."""
        self._flag.install(self._policy.on_signal)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        self._flag.restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._flag.requested

    def record(self, journal: Journal, step: int | None = None) -> None:
        """Note, once, in the run's history that a signal has come; ``step`` is that of the call that noticed it."""
        if self._recorded:
            return
        self._recorded = True
        number = self._flag.number
        which = "a signal came to another rank" if number is None else f"{signal.Signals(number).name} came"
        journal.add("signal", step=step, reason=which)

    def allows(self, recent: Sequence[CheckpointInfo]) -> bool:
        """Whether a save that begins now would be durable in time, as far as the costs of ``recent`` tell."""
        return self._forecast(recent).in_time

    def counts(self, committed: float | None) -> bool:
        """Whether a save that was committed at ``committed`` (``time.monotonic()``) was so after the signal."""
        return committed is not None and self._flag.since is not None and committed >= self._flag.since

    def says_why(self, recent: Sequence[CheckpointInfo], instead: CheckpointInfo | None, *, counts: bool) -> None:
        """Say, once, that no new save is begun, and what remains."""
        reason = self._forecast(recent).reason
        if self._said is not None:
            return
        self._said = reason
        kept = f"{instead.path} remains" if instead else "there is no checkpoint"
        if counts:
            text = "no save is begun after the signal: %s. %s, which was being written when it came"
            messages.log(logger.info, text, reason, kept)
            return
        messages.warn(
            f"no save is begun after the signal, for it would not be durable before the deadline: {reason}. {kept}. "
            "A longer grace period and save: {deadline: …}, or more frequent saves, would lose less",
        )

    def time_left(self, otherwise: float) -> float:
        """Seconds until the deadline that follows the signal; ``otherwise`` where there was none, or has none."""
        since = self._flag.since
        return time_left(self._policy.deadline, None if since is None else time.monotonic() - since, otherwise)

    def _forecast(self, recent: Sequence[CheckpointInfo]) -> Forecast:
        since = self._flag.since
        return forecast(
            [SaveCost.from_statistics(info.statistics) for info in recent],
            deadline=self._policy.deadline,
            elapsed=0.0 if since is None else time.monotonic() - since,
        )
