"""The save schedule: whether a save is due, and why. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from checkpointer.units import FieldError, count, did_you_mean, duration, format_duration, optional, shown

# The system never delivers the first two; for the rest a Python handler that returns lets the fault happen again.
_UNCATCHABLE = frozenset({"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"})


@dataclass(frozen=True, init=False)
class SavePolicy:
    """When a save is due: as soon as any rule fires. No rule: at every call. ``on_signal`` is not a rule.

    Arguments may be written as in YAML (``every="30min"``, ``on_signal="SIGTERM"``); the fields hold the parsed
    values. Wrong values, zero included, raise :class:`ConfigError`.
    """

    every_n_steps: int | None
    """Due at steps divisible by N."""
    every_n_epochs: int | None
    """Due once in each epoch that is divisible by N, at its first call."""
    every: timedelta | None
    """Due this long after the newest commit was created, so that the clock survives restarts."""
    on_signal: tuple[str, ...]
    """Names of the signals that request a save and a stop, such as ``"SIGTERM"``."""

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        every: timedelta | str | None = None,
        on_signal: str | Sequence[str] | None = None,
    ) -> None:
        values = {
            "every_n_steps": optional(count, "every_n_steps", every_n_steps),
            "every_n_epochs": optional(count, "every_n_epochs", every_n_epochs),
            "every": optional(duration, "every", every),
            "on_signal": _signal_names(on_signal),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


def due(
    policy: SavePolicy,
    *,
    step: int,
    epoch: int | None,
    last_epoch: int | None,
    last_created: datetime | None,
    now: datetime,
) -> tuple[str, ...]:
    """Why a save is due at ``step``; empty where none is.

    ``last_epoch`` and ``last_created`` (aware) are those of the newest commit, ``None`` where there is none;
    ``now`` is the current time (aware).
    """
    if policy.every_n_steps is None and policy.every_n_epochs is None and policy.every is None:
        return ("every call",)
    fired = (
        _by_step(policy.every_n_steps, step),
        _by_epoch(policy.every_n_epochs, epoch, last_epoch),
        _by_time(policy.every, last_created, now),
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


__all__ = ["SavePolicy", "due"]
