"""The handle of a save: what ``save`` returns."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime
from typing import NoReturn

from checkpointer.errors import UnsupportedStateError
from checkpointer.format.info import CheckpointInfo


class PendingSave:
    """A save that has begun: done at the durable commit."""

    __module__ = "checkpointer"

    def __init__(self, step: int, epoch: int | None, created: datetime, future: Future[CheckpointInfo]) -> None:
        self.step = step
        """The step that is being saved."""
        self.epoch = epoch
        self.created = created
        """When the state was captured (aware, UTC)."""
        self._future = future
        self.reported = False
        """Whether its error has been raised."""
        self.left_out = False
        """Whether it was given up for want of space, as configured: an error to those alone who ask for it."""

    def done(self) -> bool:
        """Whether it has been committed durably, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Wait for the commit, at most ``timeout`` seconds.

        Raises:
            SaveError: (or a more precise CheckpointerError) the save failed; it is not raised again elsewhere.
            TimeoutError: it is still being written.
        """
        error = self.error(timeout)
        if error is not None:
            self.reported = True
            raise error
        return self._future.result()

    @property
    def failed(self) -> bool:
        """Whether it has ended without a commit."""
        return self.done() and self.error() is not None

    def error(self, timeout: float | None = None) -> BaseException | None:
        """Wait like ``result``, and return the error instead of raising it."""
        try:
            return self._future.exception(timeout)
        except FutureTimeoutError:  # before Python 3.11 not the builtin one
            raise TimeoutError(f"the save of step {self.step} is still being written after {timeout} s") from None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedStateError(
            "a PendingSave cannot be copied or pickled, for a thread of this process completes it: "
            "pass handle.result(), the CheckpointInfo, or the step"
        )

    def __repr__(self) -> str:
        state = "writing" if not self.done() else "failed" if self.failed else "committed"
        return f"<PendingSave step={self.step} {state}>"


def finished(info: CheckpointInfo) -> PendingSave:
    """The handle of a checkpoint that was committed before."""
    future: Future[CheckpointInfo] = Future()
    future.set_result(info)
    return PendingSave(info.step, info.epoch, info.created, future)
