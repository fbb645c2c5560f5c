"""The user's ``on_commit``: called on a thread of its own, for one checkpoint after the other, in commit order.

It cannot delay or fail a save: an exception in it is logged, with a warning. Whoever prunes asks which checkpoints it
has not returned for, and lets them stay.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import NamedTuple

from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.values import roughly
from checkpointer.repository.repository import Repository
from checkpointer.system import messages
from checkpointer.system.threads import room_for_a_thread

logger = logging.getLogger("checkpointer")

PATIENCE = 60.0
"""Seconds that ``close``, or the end of a program without it, waits for calls."""

BEHIND = 5
"""So many checkpoints that it has not returned for are worth a warning: they stay on disk until it has."""

LATE = 10.0
"""Seconds since the oldest of them was committed. Saves that are milliseconds apart get ahead of any thread."""


class _Call(NamedTuple):
    info: CheckpointInfo
    context: Context
    since: float
    """When it was committed, by ``time.monotonic()``."""


class CommitCallbacks:
    """Calls the function once for each commit. The thread is there only while there is something to call it for."""

    def __init__(
        self, function: Callable[[CheckpointInfo], object], repository: Repository, keep: messages.Keep
    ) -> None:
        """``keep`` takes warnings that are errors: the training thread raises them."""
        self._function = function
        self._name = getattr(function, "__qualname__", None) or type(function).__name__
        # The run's lock lives as long as the repository: a manager that is dropped while a call runs keeps it.
        self.repository = repository
        self._keep = keep
        self.pid = os.getpid()
        self._guard = threading.Lock()
        self._calls: deque[_Call] = deque()
        """The first is running, if any is; the others wait."""
        self._thread: threading.Thread | None = None
        """The last that was started."""
        self._works = False
        """Whether it looks for something to call for; else it has ended, or is about to."""
        self._running_in: int | None = None
        """The identifier of the thread that a call runs in."""
        self._said_behind = False
        self._closed = False

    @property
    def called_here(self) -> bool:
        """Whether the calling thread is inside a call of the function."""
        return self._running_in == threading.get_ident()

    def unreturned(self) -> frozenset[str]:
        """The ids of the checkpoints that the function has not returned for, or not been called for yet."""
        with self._guard:
            return frozenset(call.info.id for call in self._calls)

    def add(self, info: CheckpointInfo, context: Context) -> None:
        """The function is to be called for ``info``, in ``context``; from now on its checkpoint has to stay."""
        with self._guard:
            if not self._closed:
                self._calls.append(_Call(info, context, time.monotonic()))
                _unfinished.add(self)

    def begin(self) -> None:
        """Let the thread call the function for what was added. It may take a moment to start: call this in another."""
        with self._guard:
            if self._closed or not self._calls:
                return
            self._ensure_thread()
            oldest, count = self._calls[0], len(self._calls)
            lag = time.monotonic() - oldest.since
            behind = count >= BEHIND and lag >= LATE and not self._said_behind
            self._said_behind = self._said_behind or behind
        if behind:
            self._say(
                f"on_commit ({self._name}) has not returned for the last {count} checkpoints, of which "
                f"{oldest.info.path} was committed {roughly(lag)} ago. They stay on disk until it has, whatever "
                "retention says. If it hangs, give it a time limit; if it is slow, save less often"
            )

    def close(self, seconds: float) -> str | None:
        """Wait, at most so long, until all calls have returned; else say what is left, and begin no further call."""
        with self._guard:
            self._closed = True
            if self._calls:
                self._ensure_thread()
            alone = bool(self._calls) and not self._works
        try:
            if alone:
                self._work()  # no thread can be started any more
            elif self._thread is not None:
                self._thread.join(seconds)
        finally:  # Ctrl-C, too
            running, waiting = self._give_up()
        if not running and not waiting:
            return None
        parts = [f"it is still running for {path}, which nothing waits for any more" for path in running]
        parts += [f"it is not called any more for {', '.join(waiting)}"] if waiting else []
        return f"on_commit ({self._name}) has not returned within {roughly(seconds)}: {'; '.join(parts)}"

    def _give_up(self) -> tuple[list[str], list[str]]:
        """Begin no further call; the paths of the checkpoints whose call is running, and whose is not made any more."""
        with self._guard:
            _unfinished.discard(self)
            paths = [call.info.path for call in self._calls]
            begun = 0 if self._running_in is None else 1
            while len(self._calls) > begun:
                self._calls.pop()
        return paths[:begun], paths[begun:]

    def at_exit(self, seconds: float) -> None:
        """As ``close``, for a program that has not called it; not in a forked child, which has no such thread."""
        if os.getpid() == self.pid:
            left = self.close(seconds)
            if left is not None:
                messages.log(logger.error, "%s", left)

    def _ensure_thread(self) -> None:
        """Start it, unless it runs; where none can be started, the next commit, or ``close``, tries again."""
        if self._works or not room_for_a_thread():
            return
        # A daemon: the interpreter waits for other threads without end, and this one may never return.
        thread = threading.Thread(target=self._work, name="checkpointer-on-commit", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, or there are too many
            return
        self._thread, self._works = thread, True

    def _work(self) -> None:
        """Call until there is nothing left to call for."""
        while True:
            with self._guard:
                if not self._calls:
                    self._works = self._said_behind = False
                    return
                call = self._calls[0]
                self._running_in = threading.get_ident()
            try:
                self._call(call)
            finally:
                ours = os.getpid() == self.pid
                if ours:
                    with self._guard:
                        self._running_in = None
                        self._calls.popleft()
            if not ours:  # a child that was forked inside the call, and came back from it
                return

    def _call(self, call: _Call) -> None:
        try:
            call.context.run(self._as_users_code, call.info)
        except BaseException as error:  # SystemExit, too: it would only end this thread
            if os.getpid() != self.pid:
                raise
            self._report(call.info.path, error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the user's Ctrl-C, where no thread could be started

    def _as_users_code(self, info: CheckpointInfo) -> None:
        with messages.kept(None):  # the context is that of a save
            self._function(info)

    def _report(self, path: str, error: BaseException) -> None:
        messages.log(logger.error, "on_commit (%s) failed for %s", self._name, path, error=error)
        self._say(
            f"on_commit ({self._name}) failed for {path}: {_shown(error)}. The checkpoint is committed, and training "
            "goes on; it is not called again for this one"
        )

    def _say(self, message: str) -> None:
        with messages.kept(self._keep):
            messages.warn(message)


_unfinished: weakref.WeakSet[CommitCallbacks] = weakref.WeakSet()
"""Those that have been given something to call for, and have not been closed."""


def unfinished() -> list[CommitCallbacks]:
    """Of all managers of this process that were not closed, those that have not returned for a checkpoint."""
    ours = [callbacks for callbacks in list(_unfinished) if callbacks.pid == os.getpid()]  # a fork copies them
    return [callbacks for callbacks in ours if callbacks.unreturned()]


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # noqa: BLE001  the user's class
        return type(error).__name__


@atexit.register
def _wait_at_exit() -> None:
    """Give the calls of managers that were not closed the time that ``close`` would have given them."""
    until = time.monotonic() + PATIENCE
    for callbacks in list(_unfinished):
        callbacks.at_exit(max(until - time.monotonic(), 0.0))
