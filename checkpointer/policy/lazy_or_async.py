"""Whether writing while training goes on costs less than copying first: measured, save by save. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

TRIALS = 3
"""Saves of each kind that are compared: one hiccup does not decide."""

QUIET_STEPS = 32
"""Steps without a save whose median is what a step takes."""

Choice = Literal["lazy", "async"]


@dataclass
class StepClock:
    """Times the optimizer steps, and says how much longer those took that had a save beside them. Seconds."""

    _last: float | None = None
    _began: float | None = None
    """Since when a save has been under way."""
    _quiet: deque[float] = field(default_factory=lambda: deque(maxlen=QUIET_STEPS))
    _busy: list[float] = field(default_factory=list)

    def tick(self, now: float) -> None:
        """A step is about to run."""
        if self._last is not None:
            (self._quiet if self._began is None else self._busy).append(now - self._last)
        self._last = now

    def save_begins(self, now: float) -> None:
        """``save`` was called."""
        self._began = now
        self._busy = []

    def save_ended(self) -> float | None:
        """What the save that ended before the last tick cost training; ``None`` where that cannot be known."""
        busy, self._busy, self._began = self._busy, [], None
        if not busy or not self._quiet:
            return None
        usual = median(self._quiet)
        return sum(duration - usual for duration in busy)


@dataclass
class LazyOrAsync:
    """Chooses between ``lazy`` and ``async`` by what both have cost in this run."""

    _costs: dict[Choice, list[float]] = field(default_factory=lambda: {"lazy": [], "async": []})
    decided: Choice | None = None

    def choose(self) -> Choice:
        """How the next save is written: ``lazy``, but for a few trials of ``async`` where ``lazy`` looks dear."""
        if self.decided is not None:
            return self.decided
        return "async" if len(self._costs["lazy"]) >= TRIALS else "lazy"

    def record(self, choice: Choice, cost: float, copying: float) -> None:
        """A save has cost ``cost`` seconds of training; copying all of its state takes about ``copying`` seconds."""
        if self.decided is not None:
            return
        self._costs[choice].append(cost)
        lazy, copied = self._costs["lazy"], self._costs["async"]
        if len(lazy) >= TRIALS and median(lazy) <= copying:
            self.decided = "lazy"  # no async save can cost less than its copy
        elif min(len(lazy), len(copied)) >= TRIALS:  # a save that was to be lazy may have copied
            self.decided = "lazy" if median(lazy) <= median(copied) else "async"

    def __str__(self) -> str:
        lazy, copied = (median(self._costs[choice]) for choice in ("lazy", "async"))
        return f"a save costs training {lazy:.3f} s in lazy mode and {copied:.3f} s in async mode"
