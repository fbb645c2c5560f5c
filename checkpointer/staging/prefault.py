"""The first touch of memory, beside training: what a later copy then takes no page faults for."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref

from checkpointer.system import messages
from checkpointer.system.free_memory import free_memory
from checkpointer.system.memory import Region, page_aligned
from checkpointer.system.threads import room_for_a_thread

PIECE = 256 << 10
"""Bytes touched at a time. Meanwhile training can map and unmap no memory, which is what large tensors are made of."""

BURST = 4 << 20
"""Bytes touched between two pauses: on a busy machine a thread that has slept waits long for its turn."""

PAUSE = 2.0
"""The thread rests this many times as long as each burst took a core: it competes for memory, if not for cores."""

LOOK = 64 << 20
"""Bytes after which it is asked again whether there is room for the rest."""

SPARED = 256 << 20
"""Bytes that are left to training: with less than that beside the rest, touching stops."""

_LOWEST_PRIORITY = 19

logger = logging.getLogger("checkpointer")


class Prefault:
    """One thread that touches the pages of a region, in order, until it is stopped or done."""

    def __init__(self, region: Region, size: int) -> None:
        """Begin with the first ``size`` bytes, which are nobody's yet: until ``stop`` they may be overwritten."""
        self._progress = _Progress(min(page_aligned(size), region.size))
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._progress.stop.set)
        if not room_for_a_thread():
            return
        thread = threading.Thread(
            target=_touch, args=(region, self._progress), name="checkpointer-prefault", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no thread can be started any more: the copy touches the memory, as it always can
            return
        self._thread = thread

    @property
    def position(self) -> int:
        """Everything before this byte is touched."""
        return self._progress.position

    def stop(self) -> None:
        """Touch no more from now on. What is in the memory afterwards stays."""
        self._progress.stop.set()
        if self._progress.clears:
            self.join()
        text = "%d of %d bytes for copies of the state were touched before they were needed"
        messages.log(logger.debug, text, self.position, self._progress.end)

    def join(self) -> None:
        """Wait for the thread, once stopped. The machine may let it run seldom."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _Progress:
    """What the thread shares with its owner, who may be dropped meanwhile."""

    def __init__(self, end: int) -> None:
        self.position = 0
        self.end = end
        self.clears = True
        """Whether memory may be overwritten, and has to be, for all that is known yet."""
        self.stop = threading.Event()


def _touch(region: Region, progress: _Progress) -> None:
    _step_back()
    try:
        while progress.position < progress.end and not progress.stop.is_set():
            if not _has_room(progress):
                return
            border = min(progress.end, progress.position + LOOK)
            while progress.position < border and not progress.stop.is_set():
                began = time.thread_time()
                if not _touch_burst(region, progress, min(border, progress.position + BURST)):
                    return
                progress.stop.wait(PAUSE * (time.thread_time() - began))
    except MemoryError as error:
        messages.log(logger.info, "the copy of the state is not prepared: %s", error)


def _has_room(progress: _Progress) -> bool:
    free, left = free_memory(), progress.end - progress.position
    if free is None or free >= left + SPARED:
        return True
    text = "%d bytes of memory are left: the copy of the state, which still needs %d, is not prepared"
    messages.log(logger.info, text, free, left)
    return False


def _touch_burst(region: Region, progress: _Progress, border: int) -> bool:
    """Touch what lies before ``border``; whether the system can do that."""
    while progress.position < border and not progress.stop.is_set():
        size = min(PIECE, border - progress.position)
        if region.populate(progress.position, size):
            progress.clears = False
        elif progress.clears:
            region.clear(progress.position, size)
        else:
            return False
        progress.position += size
    return True


def _step_back() -> None:
    """Let this thread, and no other, run only where training leaves a core idle, or nearly."""
    if sys.platform == "linux":  # elsewhere priorities belong to processes
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        except OSError as error:  # a sandbox forbids it: the pauses remain
            messages.log(logger.debug, "the priority of a thread stays as it is: %s", error)
