"""The save schedule: whether a save is due, and why. Pure."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

from checkpointer.policy.cost import SaveCost
from checkpointer.policy.values import (
    FieldError,
    boolean,
    count,
    did_you_mean,
    duration,
    format_duration,
    format_fraction,
    fraction,
    optional,
    roughly,
    shown,
)

Every: TypeAlias = timedelta | Literal["auto"]

RECENT = 5
"""Saves whose cost decides: their median is blind to a first one that had its memory to allocate, and to one hiccup."""

_MAX_OVERHEAD = 0.01
_MTBF = timedelta(hours=12)
_NEVER = timedelta(days=36_500)

# The system never delivers the first two; for the rest a Python handler that returns lets the fault happen again.
_UNCATCHABLE = frozenset({"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"})


@dataclass(frozen=True, init=False)
class SavePolicy:
    """When a save is due: as soon as any rule fires. No rule: at every call. ``on_signal`` is not a rule.

    Arguments may be written as in YAML (``every="30min"``, ``on_signal="SIGTERM"``); the fields hold the parsed
    values. Wrong values, zero included, raise :class:`ConfigError`.
    """

    __module__ = "checkpointer"

    every_n_steps: int | None
    """Due at steps divisible by N."""
    every_n_epochs: int | None
    """Due once in each epoch that is divisible by N, at its first call."""
    every: Every | None
    """Due this long after the newest commit was created, so that the clock survives restarts. ``"auto"``: as long as
    :func:`choose_interval` says."""
    max_overhead: float | None
    """With ``every="auto"``: the part of the time that saves may take from training at most; 0.01 unless given."""
    mtbf: timedelta | None
    """With ``every="auto"``: the mean time between failures of the job; 12 h unless given."""
    on_signal: tuple[str, ...]
    """Names of the signals that request a save and a stop, such as ``"SIGTERM"``."""
    deadline: timedelta | None
    """How long after the first of these signals the process is killed; ``None``: long enough for any save."""
    on_metric: bool
    """Due where the call is given a metric that a ``best`` rule monitors."""

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        every: timedelta | str | None = None,
        max_overhead: float | str | None = None,
        mtbf: timedelta | str | None = None,
        on_signal: str | Sequence[str] | None = None,
        deadline: timedelta | str | None = None,
        on_metric: bool = False,
    ) -> None:
        values = {
            "every_n_steps": optional(count, "every_n_steps", every_n_steps),
            "every_n_epochs": optional(count, "every_n_epochs", every_n_epochs),
            "every": optional(_every, "every", every),
            "max_overhead": optional(fraction, "max_overhead", max_overhead),
            "mtbf": optional(duration, "mtbf", mtbf),
            "on_signal": _signal_names(on_signal),
            "deadline": optional(duration, "deadline", deadline),
            "on_metric": boolean("on_metric", on_metric),
        }
        for name, default in (("max_overhead", _MAX_OVERHEAD), ("mtbf", _MTBF)):
            if values["every"] == "auto":
                values[name] = values[name] or default
            elif values[name] is not None:
                raise FieldError((name,), "has a meaning only for an interval that is measured: add every: auto")
        if values["deadline"] and not values["on_signal"]:
            raise FieldError(("deadline",), "counts from a signal: add on_signal: [SIGTERM]")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def has_rules(self) -> bool:
        """True if any rule is set; else every call is due."""
        return bool(self.every_n_steps or self.every_n_epochs or self.every or self.on_metric)

    def without_clock(self) -> SavePolicy | None:
        """The rules that need no clock and no metric, so that all ranks come to one answer; ``None`` where there are
        others alone.
        """
        if self.has_rules and self.every_n_steps is None and self.every_n_epochs is None:
            return None
        return SavePolicy(every_n_steps=self.every_n_steps, every_n_epochs=self.every_n_epochs)


@dataclass(frozen=True)
class Interval:
    """How long ``every: auto`` waits between two saves, and why."""

    every: timedelta
    reason: str


def choose_interval(costs: Sequence[SaveCost], *, max_overhead: float, mtbf: timedelta) -> Interval | None:
    """The interval that loses the least time to saves and to failures together; ``None`` while no cost is known.

    ``costs`` are those of the newest commits, in commit order. Young's and Daly's first-order optimum for a save that
    costs C seconds of training is sqrt(2 C MTBF). The interval is never shorter than C / ``max_overhead``, and never
    shorter than the time until a save is durable: the next one would only wait for it.
    """
    recent = [cost for cost in costs if cost.to_training is not None][-RECENT:]
    if not recent:
        return None
    cost = median([cost.to_training or 0.0 for cost in recent])
    durable = median([cost.to_durable or 0.0 for cost in recent])
    candidates = (
        (math.sqrt(2 * cost * mtbf.total_seconds()), f"best for a failure every {format_duration(mtbf)}"),
        (cost / max_overhead, f"so that they take no more than {format_fraction(max_overhead)} of the time"),
        (durable, f"the {roughly(durable)} until they are durable"),
    )
    seconds, why = max(candidates, key=lambda candidate: candidate[0])
    every = timedelta(microseconds=math.ceil(seconds * 1e6)) if seconds < _NEVER.total_seconds() else _NEVER
    return Interval(every, f"every {roughly(seconds)}: saves hold training for {roughly(cost)}; {why}")


def median(values: Sequence[float]) -> float:
    """The middle one; of two in the middle the upper one."""
    return sorted(values)[len(values) // 2]


def due(
    policy: SavePolicy,
    *,
    step: int,
    epoch: int | None,
    last_epoch: int | None,
    last_created: datetime | None,
    now: datetime,
    interval: Interval | None = None,
    writing: bool = False,
    metric: str | None = None,
) -> tuple[str, ...]:
    """Why a save is due at ``step``; empty where none is.

    ``last_epoch`` and ``last_created`` (aware) are those of the newest commit, ``None`` where there is none;
    ``now`` is the current time (aware). For ``every: auto``: ``interval`` is what :func:`choose_interval` says, and
    ``writing`` whether a save is still being written. For ``on_metric``: ``metric`` is the monitored metric that the
    call was given.
    """
    if not policy.has_rules:
        return ("every call",)
    fired = (
        _by_step(policy.every_n_steps, step),
        _by_epoch(policy.every_n_epochs, epoch, last_epoch),
        _by_cost(interval, last_created, now, writing=writing)
        if policy.every == "auto"
        else _by_time(policy.every, last_created, now),
        f"on_metric: {metric} was given" if policy.on_metric and metric is not None else None,
    )
    return tuple(reason for reason in fired if reason is not None)


def _by_step(n: int | None, step: int) -> str | None:
    return f"step divisible by {n}" if n is not None and step % n == 0 else None


def _by_epoch(n: int | None, epoch: int | None, last_epoch: int | None) -> str | None:
    if n is None or epoch is None or epoch % n != 0 or epoch == last_epoch:
        return None
    return f"epoch {epoch} divisible by {n}"


def _by_time(every: timedelta | None, last_created: datetime | None, now: datetime) -> str | None:
    if every is None:
        return None
    if last_created is None:
        return f"every {format_duration(every)}: no commit yet"
    # A newest commit from the future means that the clock was set back. Waiting for the clock to catch up could
    # mean no save for days, so a large jump makes a save due, and that save's date then sets things right.
    if last_created - now >= every:
        return f"every {format_duration(every)}: the newest commit lies in the future, the clock was set back"
    return f"every {format_duration(every)}" if now - last_created >= every else None


def _by_cost(interval: Interval | None, last_created: datetime | None, now: datetime, *, writing: bool) -> str | None:
    if writing:  # one that is not durable yet has no cost yet, and the next would wait for it
        return None
    if interval is None:
        return "every auto: no save has been measured yet"
    return f"auto: {interval.reason}" if _by_time(interval.every, last_created, now) else None


def _every(key: str, value: object) -> Every:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.strip().isalpha():
        hint = did_you_mean(value.strip().lower(), ("auto",))
        raise FieldError(
            (key,), f"must be auto, or a positive number and a unit such as 30min, got {shown(value)}{hint}"
        )
    return duration(key, value)


def _signal_names(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (_signal_name(("on_signal",), value),)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        names = [_signal_name(("on_signal", index), item) for index, item in enumerate(value)]
        return tuple(dict.fromkeys(names))
    raise FieldError(("on_signal",), f"must be a list of signal names such as [SIGTERM], got {shown(value)}")


def _signal_name(key: tuple[str | int, ...], value: object) -> str:
    known = [member.name for member in signal.Signals]
    if not isinstance(value, str):
        raise FieldError(key, f"must be the name of a signal such as SIGTERM, got {shown(value)}")
    if value not in known:
        hint = did_you_mean(value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}", known)
        raise FieldError(key, f"this system has no signal {shown(value)}{hint}")
    if value in _UNCATCHABLE:
        raise FieldError(key, f"{value} cannot be handled by a program; use SIGTERM, SIGINT, SIGUSR1 or SIGUSR2")
    return value


__all__ = ["RECENT", "Interval", "SavePolicy", "choose_interval", "due", "median"]
