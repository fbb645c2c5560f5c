"""The hook before every optimizer step: copies what a lazy save has not written yet, and measures what saves cost."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim.optimizer import register_optimizer_step_pre_hook

from checkpointer.lazy import LiveState
from checkpointer.overlap import Choice, Overlap, StepClock

logger = logging.getLogger("checkpointer")


class WatchedSave(NamedTuple):
    """A save that training goes on beside."""

    choice: Choice
    live: LiveState | None
    """What has to be copied before a step; ``None`` where all was copied at once."""
    size: int
    """Bytes of its tensors."""
    done: Callable[[], bool]


class StepWatch:
    """Belongs to the training thread, as the steps do. One for each manager in ``lazy`` mode."""

    def __init__(self) -> None:
        self._clock = StepClock()
        self._overlap = Overlap()
        self._save: WatchedSave | None = None
        self._bytes_per_second: float | None = None
        """How fast live state is copied; measured where the hook had to."""
        self._optimizer: weakref.ref[Any] | None = None
        """Steps of one optimizer are timed: others may have another rhythm."""
        self._hook: Any = None

    def choose(self) -> Choice:
        """How the next save had better be written."""
        return self._overlap.choose()

    def save_begins(self) -> None:
        """``save`` was called. At the first call the hook is registered."""
        if self._hook is None:
            watch = weakref.ref(self)

            def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001  as torch calls it
                found = watch()
                if found is not None:
                    found.before_step(optimizer)

            self._hook = register_optimizer_step_pre_hook(before_step)
        self._clock.save_begins(time.perf_counter())

    def watch(self, save: WatchedSave) -> None:
        """The save is on its way."""
        self._save = save

    def before_step(self, optimizer: Any) -> None:
        """Called before each step of every optimizer there is."""
        if self._optimizer is None or self._optimizer() is None:
            self._optimizer = weakref.ref(optimizer)
        if self._optimizer() is optimizer:
            self._clock.tick(time.perf_counter())
            if self._save is not None and self._save.done():
                self._measure(self._save)
                self._save = None
        self.detach()

    def detach(self) -> None:
        """Copy what is not written yet: when this returns the live state may change."""
        if self._save is not None and self._save.live is not None and not self._save.done():
            self._save.live.detach()

    def close(self) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._save = None

    def _measure(self, save: WatchedSave) -> None:
        if save.live is not None and save.live.bytes_per_second is not None:
            self._bytes_per_second = save.live.bytes_per_second
        cost = self._clock.save_ended()
        if cost is None or self._bytes_per_second is None:
            return
        undecided = self._overlap.decided is None
        self._overlap.record(save.choice, cost, save.size / self._bytes_per_second)
        if undecided and self._overlap.decided == "async":
            logger.warning("%s: from now on state is copied when save is called", self._overlap)
