"""The hook before every optimizer step: copies what a lazy save has not written yet, and measures what saves cost."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from checkpointer.policy.lazy_or_async import Choice, LazyOrAsync, StepClock
from checkpointer.staging.live import LiveState
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

_watches: weakref.WeakSet[StepWatch] = weakref.WeakSet()

_registered: list[tuple[weakref.ref[StepWatch], list[RemovableHandle]]] = []
"""The hooks that are registered, and whose they are."""


class WatchedSave(NamedTuple):
    """A save that training goes on beside."""

    choice: Choice
    live: LiveState | None
    """What has to be copied before a step; ``None`` where all was copied at once."""
    size: int
    """Bytes of its tensors."""
    done: Callable[[], bool]


class StepWatch:
    """Belongs to the training thread, as the steps do. One for each manager."""

    def __init__(self) -> None:
        self._stepped: Callable[[Any], None] | None = None
        self._clock = StepClock()
        self._overlap = LazyOrAsync()
        self._save: WatchedSave | None = None
        self._bytes_per_second: float | None = None
        """How fast live state is copied; measured where the hook had to."""
        self._optimizer: weakref.ref[Any] | None = None
        """Steps of one optimizer are timed: others may have another rhythm."""
        self._stepping: weakref.ref[Any] | None = None
        """The optimizer whose step is running."""
        self._hooks: list[RemovableHandle] = []
        self._changed_by_hand: str | None = None
        """The tensor that somebody changed where only a step may."""
        self._said_so = False

    def begin(self, stepped: Callable[[Any], None] | None = None) -> None:
        """Register the hooks, which close takes away. They know this object only as long as somebody else does.

        Where it is forgotten without close, the next one takes them away: removing them whenever the garbage collector
        runs would disturb a step that walks through all hooks at that moment. ``stepped`` is called after each step of
        every optimizer there is, with that optimizer; it never raises.
        """
        self._stepped = stepped
        watch = weakref.ref(self)
        _remove_hooks_of_the_forgotten()
        _watches.add(self)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001  as torch calls it
            found = watch()
            if found is not None:
                found.before_step(optimizer)

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001  as torch calls it
            found = watch()
            if found is not None:
                found.after_step(optimizer)

        # A compiled step is not to trace them; torch.compiler.disable would import the compiler right now.
        before, after = _disable_dynamo(before_step), _disable_dynamo(after_step)
        self._hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        _registered.append((watch, self._hooks))

    def choose(self) -> Choice:
        """How the next save had better be written. In the middle of a step no hook comes before the next change."""
        return "async" if self._in_step or self._changed_by_hand is not None else self._overlap.choose()

    def save_begins(self) -> None:
        """``save`` was called, and none is under way."""
        self._collect()
        self._clock.save_begins(time.perf_counter())
        if self._changed_by_hand is not None and not self._said_so:
            self._said_so = True
            messages.warn(
                f"{self._changed_by_hand} was changed after a save in lazy mode, and not by Optimizer.step, so that "
                "save failed. From now on state is copied when save is called, as with write: {mode: async}. To stay "
                "in lazy mode, call mgr.staged() before such changes",
            )

    def watch(self, save: WatchedSave) -> None:
        """The save is on its way."""
        self._save = save

    def before_step(self, optimizer: Any) -> None:
        """Called before each step of every optimizer there is."""
        if not self._in_step:
            self._stepping = weakref.ref(optimizer)
        if self._optimizer is None or self._optimizer() is None:
            self._optimizer = weakref.ref(optimizer)
        if self._optimizer() is optimizer:
            self._clock.tick(time.perf_counter())
            self._collect()
        self.detach()

    def after_step(self, optimizer: Any) -> None:
        """Called after each step that did not fail."""
        if self._stepping is not None and self._stepping() is optimizer:
            self._stepping = None
        if self._stepped is not None:
            self._stepped(optimizer)

    def detach(self) -> None:
        """Copy what is not written yet: when this returns the live state may change."""
        if self._save is not None and self._save.live is not None and not self._save.done():
            self._save.live.detach()

    def forget(self) -> None:
        """Leave a save in flight to somebody else."""
        self._save = None

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        _registered[:] = [(watch, hooks) for watch, hooks in _registered if hooks is not self._hooks]
        self._hooks = []
        self._save = None

    @property
    def _in_step(self) -> bool:
        """Whether a step is running. One that failed counts until that optimizer's next: copying is never wrong."""
        return self._stepping is not None and self._stepping() is not None

    def _collect(self) -> None:
        """Measure a save that has ended."""
        if self._save is not None and self._save.done():
            if self._save.live is not None and self._save.live.torn is not None:
                self._changed_by_hand = self._save.live.torn
            self._measure(self._save)
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
            messages.log(logger.warning, "%s: from now on state is copied when save is called", self._overlap)


def _remove_hooks_of_the_forgotten() -> None:
    """Of managers that were dropped without close, as by a cell of a notebook that runs again."""
    for watch, hooks in _registered.copy():
        if watch() is None:
            for hook in hooks:
                hook.remove()
            _registered.remove((watch, hooks))


def _forget_saves() -> None:
    """In a forked child, which has neither the writer nor the memory that live state is copied to."""
    for watch in _watches:
        watch.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_saves)
