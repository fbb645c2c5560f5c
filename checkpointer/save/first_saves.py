"""The first save in ``async`` mode, whose memory nobody has touched yet: a copy into it takes many times as long.

As soon as it is known how large the state is, its memory is touched beside training. A save that comes sooner touches
what is left itself, while training waits.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterable

import torch

from checkpointer.staging.stager import NOTHING, Stager
from checkpointer.staging.step_hook import StepWatch
from checkpointer.state.state_size import holds_gpu_tensors, state_size
from checkpointer.system import messages

WORTH = 128 << 20
"""Bytes of state from which on its memory is touched ahead of a save. Less takes some hundredths of a second."""

logger = logging.getLogger("checkpointer")


class FirstSaves:
    """Belongs to one manager, until its first copy. Its hooks know it only as long as somebody else does."""

    def __init__(self, stager: Stager, watch: StepWatch, components: Iterable[object]) -> None:
        """``stager`` has the memory; ``watch`` tells of the steps that make state."""
        self._stager = stager
        self._watch = watch
        self._components = tuple(components)
        found = [part for part in self._components if isinstance(part, torch.optim.Optimizer)]
        self._without_step = weakref.WeakSet(found)
        self.reusable = NOTHING
        """What the first save need not copy."""
        self._turn = threading.Lock()
        """Optimizers of other threads may step while a save begins."""
        self._pid = os.getpid()
        """A forked child has none of the memory, and saves nothing."""
        self._known = False
        self._closed = False
        itself = weakref.ref(self)

        def stepped(optimizer: object) -> None:
            first = itself()
            if first is not None:
                first.stepped(optimizer)

        watch.begin(stepped)

    def stepped(self, optimizer: object) -> None:
        """An optimizer, registered or not, has made a step: now it has state. Never raises."""
        if not self._known and optimizer in self._without_step:
            self._without_step.discard(optimizer)  # type: ignore[arg-type]  # it is one of them
            self.foresee()

    def foresee(self) -> None:
        """Have the memory of later saves touched, once it is known how much that is. Never raises."""
        if self._known or os.getpid() != self._pid or _is_one_of_many():
            return
        with self._turn:
            if self._known or self._closed:
                return
            try:
                self._known = all(optimizer.state for optimizer in self._without_step)
                if self._known:
                    self._expect()
            except Exception as error:  # noqa: BLE001  no reason for ending a run: the save will say it, if it matters
                self._known = True
                messages.log(logger.info, "the memory for copies of the state is not prepared", error=error)

    def _expect(self) -> None:
        shares = self.reusable.source is not None and self.reusable.limit is not False
        size = state_size(self._components, frozen=not shares)
        if size >= WORTH:
            self._stager.expect(size, on_gpu=holds_gpu_tensors(self._components))

    def close(self) -> None:
        """Take the hooks away. The memory belongs to the stager."""
        with self._turn:
            self._closed = True
        self._watch.close()


def _is_one_of_many() -> bool:
    """Whether other ranks write a part of the state, which is known only once they have agreed."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
