"""The first saves in ``async`` mode, whose memory nobody has touched yet: a copy into it takes many times as long.

As soon as it is known how large the state is, its memory is touched beside training. A save that comes sooner is
written from live memory, where a hook before the optimizer's step guards that, and is a copy otherwise.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch

from checkpointer.staging.live import Stepped
from checkpointer.staging.stager import NOTHING, Staged, Stager
from checkpointer.staging.step_hook import StepWatch
from checkpointer.state.protocol import Captured
from checkpointer.state.state_size import holds_gpu_tensors, state_size
from checkpointer.system import messages

WORTH = 128 << 20
"""Bytes of state from which on its memory is touched ahead of a save. Less takes some hundredths of a second."""

MOST_EARLY = 3
"""Saves that are written from live memory at most, however little of the memory for copies has been touched."""

logger = logging.getLogger("checkpointer")


class FirstSaves:
    """Belongs to one manager, until its first copy. Its hooks know it only as long as somebody else does."""

    def __init__(
        self,
        stager: Stager,
        watch: StepWatch,
        components: Iterable[object],
        changes: Callable[[], Stepped],
    ) -> None:
        """``watch`` guards live memory; ``changes`` says what of it."""
        self._stager = stager
        self._watch = watch
        self._components = tuple(components)
        self._changes = changes
        found = [part for part in self._components if isinstance(part, torch.optim.Optimizer)]
        self._without_step = weakref.WeakSet(found)
        self.reusable = NOTHING
        """What the next save need not copy."""
        self._turn = threading.Lock()
        """Optimizers of other threads may step while a save begins."""
        self._pid = os.getpid()
        """A forked child has none of the memory, and saves nothing."""
        self._known = False
        self._early = 0
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

    def stage(self, captured: Mapping[str, Captured], seed: int) -> Staged | None:
        """Refer to live memory, where that blocks training for less than a copy; ``None`` where it does not."""
        with self._turn:
            self._known = True
        if self._early >= MOST_EARLY or not self._watch.guards() or _on_gpu(captured):
            return None
        if not self._stager.is_cold(captured, self.reusable, least=WORTH):
            return None
        changes = self._changes()
        if not changes:
            return None
        self._early += 1
        return self._stager.lazily(captured, changes, self.reusable, seed, instead_of_copies=True)

    def close(self) -> None:
        """Take the hooks away. The memory belongs to the stager."""
        with self._turn:
            self._closed = True
        self._watch.close()


def _is_one_of_many() -> bool:
    """Whether other ranks write a part of the state, which is known only once they have agreed."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _on_gpu(captured: Mapping[str, Captured]) -> bool:
    """There the copies' memory is registered first, which touches it."""
    return any(tensor.is_cuda for part in captured.values() for tensor in part.tensors.values())
