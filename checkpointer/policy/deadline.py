"""Whether a save can be durable before the deadline that follows a signal. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from checkpointer.policy.cost import SaveCost
from checkpointer.policy.schedule import RECENT, median
from checkpointer.policy.values import format_duration, roughly

MARGIN = 1.2
"""A save counts as this many times its usual cost: storage is busiest when a whole cluster is told to save."""

OUTLIVED = 2
"""A process that lives for this many deadlines was not killed at the deadline, and will not be soon."""


@dataclass(frozen=True)
class Forecast:
    """Whether to begin a save, and why."""

    in_time: bool
    reason: str


def forecast(costs: Sequence[SaveCost], *, deadline: timedelta | None, elapsed: float) -> Forecast:
    """Whether a save that begins now is durable in time.

    ``costs`` are those of the newest commits, in commit order; ``elapsed`` is the time since the signal, in seconds.
    A save that nothing is known of is worth trying: it cannot harm those before it.
    """
    if deadline is None:
        return Forecast(in_time=True, reason="there is no deadline")
    if elapsed >= OUTLIVED * deadline.total_seconds():
        return Forecast(in_time=True, reason=f"the deadline of {format_duration(deadline)} is long past")
    known = [cost.to_durable for cost in costs if cost.to_durable is not None][-RECENT:]
    if not known:
        return Forecast(in_time=True, reason="no save has been measured yet")
    need = MARGIN * median(known)
    left = max(deadline.total_seconds() - elapsed, 0.0)
    reason = f"a save takes {roughly(need)}, and {roughly(left)} are left of the {format_duration(deadline)}"
    return Forecast(in_time=need <= left, reason=reason)


def time_left(deadline: timedelta | None, elapsed: float | None, otherwise: float) -> float:
    """Seconds until the deadline of a signal that came ``elapsed`` seconds ago; ``otherwise`` where none is coming.

    A process that was not killed at the deadline has all the time again.
    """
    if deadline is None or elapsed is None or elapsed >= OUTLIVED * deadline.total_seconds():
        return otherwise
    return max(deadline.total_seconds() - elapsed, 0.0)


__all__ = ["MARGIN", "OUTLIVED", "Forecast", "forecast", "time_left"]
