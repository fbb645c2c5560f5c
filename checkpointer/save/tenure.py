"""One manager's time as the writer of a run: whose turn it is, and how a new manager takes over from an idle one.

A cell of a notebook that runs again makes a second manager, while ``Out[n]`` or the last traceback keeps the first one
alive, and with it the writer's lock. What the first one has begun is finished, then the second one gets its place.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from itertools import count
from pathlib import Path
from types import TracebackType

from checkpointer.errors import RunLockedError
from checkpointer.repository.lock import one_spelling
from checkpointer.repository.repository import Repository
from checkpointer.save.commit_callbacks import CommitCallbacks, unfinished
from checkpointer.save.preemption import Preemption
from checkpointer.save.saver import Saver
from checkpointer.storage import Storage
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

Identity = str | tuple[int, int]

_numbers = count()


class Tenure:
    """Belongs to one writable manager. As a context manager: one call of it, of one thread at a time.

    Threads that call at the same time take turns, so that the second finds what the first has left: the lock, the tip.
    """

    def __init__(self, repository: Repository, saver: Saver, preemption: Preemption) -> None:
        # It is found by the repository, and must not keep it, and its lock, alive: nor may what it refers to.
        self._repository = weakref.ref(repository)
        self._saver = weakref.ref(saver)
        self._preemption = preemption
        self.number = next(_numbers)
        self.made_at = _place_of_the_caller()
        """File and line where the manager was made."""
        self.identity: Identity | None = None
        self._turn = threading.RLock()
        self._calls = 0
        self.thread = threading.get_ident()
        """That of its last save or restore."""
        self.blocks = 0
        """How many ``with`` blocks of the manager are open."""
        self._taken_by: Tenure | None = None
        self._news: list[str] = []
        """What is to be said of the managers that this one took over from."""

    def __enter__(self) -> None:
        self._turn.acquire()
        self._calls += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._calls -= 1
        self._turn.release()

    def check(self) -> None:
        """Raise RunLockedError, for ever, once another manager has taken over."""
        if self._taken_by is not None:
            raise RunLockedError(
                f"this manager, made at {self.made_at}, writes no more: the one made at {self._taken_by.made_at} has "
                "taken over its run. Use that one, or make a new one"
            )

    def take_lock(self) -> None:
        """Get the writer's lock: from an idle manager of this thread that holds it, else from the system.

        Raises:
            RunLockedError: another job holds it, or a manager of this process that is not idle.
        """
        repository = self._own_repository()
        for other, tenure in self._others(repository):
            if other.lock.held:
                tenure.refuse_unless_idle(self, repository.url)
                tenure.retire(self)
                other.journal.flush()
                if other.lock.in_place():
                    repository.lock.adopt(other.lock, self._holder)
                    return
                other.lock.release()  # its file was removed, or is another job's by now
        repository.lock.acquire(self._holder)

    def opened(self) -> None:
        """The lock is held, by this rank or the coordinator: say what was taken over, and protect what was handed out.

        On the ranks that hold no lock, the managers that the coordinator has taken over from end here.
        """
        self.thread = threading.get_ident()
        if self.identity is not None:
            return
        threading.current_thread()  # threads that Python has not started are known from now on
        repository = self._own_repository()
        for _, tenure in [] if repository.lock.held else self._others(repository):
            if tenure.number < self.number and tenure.thread == threading.get_ident():
                tenure.retire(self)
        self.identity = _identity(repository.storage)
        _tenures[repository] = self
        saver = self._saver()
        assert saver is not None
        saver.also_unreturned(_callbacks_of(self.identity))
        while self._news:
            messages.warn(self._news.pop(0))

    def close(self) -> None:
        """The manager is closed: nobody takes over from it."""
        self.identity = None
        repository = self._repository()
        if repository is not None:
            _tenures.pop(repository, None)

    @property
    def _holder(self) -> str:
        return f"the manager made at {self.made_at}"

    def _own_repository(self) -> Repository:
        repository = self._repository()
        assert repository is not None, "its manager, which is being called, holds it"
        return repository

    def _others(self, repository: Repository) -> list[tuple[Repository, Tenure]]:
        """The other managers of this process that have been opened, and are not closed, on the same run root."""
        identity = _identity(repository.storage)
        found = [(other, tenure) for other, tenure in list(_tenures.items()) if tenure is not self]
        return [(other, tenure) for other, tenure in found if tenure.identity == identity]

    def refuse_unless_idle(self, new: Tenure, url: str) -> None:
        said = f"{url} is being written by {self._holder}, in this process"
        close = "close it first (mgr.close(), or use it as a context manager)"
        if self.number > new.number:
            raise RunLockedError(
                f"{said}, which is newer than this one, made at {new.made_at}: use that one, or {close}"
            )
        thread = _running_thread(self.thread)
        if self.thread != threading.get_ident() and thread is not None:
            raise RunLockedError(
                f"{said}, which belongs to another thread, {thread.name!r}: {close}, there. "
                "An idle manager is taken over by its own thread alone"
            )
        if self.blocks:
            raise RunLockedError(
                f"{said}, and its with block has not been left: use that one, or leave the block first"
            )
        if self._calls:
            raise RunLockedError(f"{said}, and one of its calls is running: use that one, or let the call end first")

    def retire(self, new: Tenure) -> None:
        """End for ``new``'s sake: finish what has been begun, give back memory, hooks and signal handlers."""
        saver = self._saver()
        errors = [] if saver is None else saver.retire()
        self._preemption.restore()
        self._taken_by = new
        self.close()
        for error in errors:
            messages.log(
                logger.error, "%s, which is taken over, had not reported: %s", self._holder, error, error=error
            )
        failed = "".join(f". It had not reported yet: {error}" for error in errors)
        new._news.append(
            f"{new._holder} has taken the run over from {self._holder}, which was idle and writes no more{failed}. "
            "To say so yourself, close the old one first (mgr.close(), or use it as a context manager)"
        )


_tenures: weakref.WeakKeyDictionary[Repository, Tenure] = weakref.WeakKeyDictionary()
"""Managers that write, on the coordinator with the lock. A repository outlives its manager while a thread uses it."""


def _identity(storage: Storage) -> Identity:
    """Equal for one run root, however it is spelled."""
    lock = storage.lock_path
    if lock is None:
        return one_spelling(storage.url)
    root = Path(lock).parents[1]
    try:
        status = os.stat(root)
    except OSError:  # it is not there yet
        return os.path.realpath(root)
    return status.st_dev, status.st_ino


def _callbacks_of(identity: Identity) -> list[CommitCallbacks]:
    """Calls of ``on_commit`` that are left from earlier managers of this process: their checkpoints have to stay."""
    return [callbacks for callbacks in unfinished() if _identity(callbacks.repository.storage) == identity]


def _running_thread(number: int) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.ident == number), None)


def _place_of_the_caller() -> str:
    """File and line of the innermost frame that does not belong to this package."""
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "checkpointer":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "a place unknown"
