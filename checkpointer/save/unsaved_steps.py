"""The steps at the end of a loop that no save was due for: lost with the process, unless somebody is told in time."""

from __future__ import annotations

import logging

from checkpointer.save.handle import PendingSave
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")


class UnsavedSteps:
    """What ``save`` was called for since it last saved, because no rule fired. Without rules that is nothing."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._last: int | None = None
        self._saved: PendingSave | None = None
        """The save before, or the checkpoint that was restored."""

    def __bool__(self) -> bool:
        return self._last is not None

    def not_due(self, step: int, saved: PendingSave | None) -> None:
        """Nothing is saved at ``step``; ``saved`` is the save in flight, else the tip."""
        self._first = step if self._first is None else self._first
        self._last, self._saved = step, saved

    def none(self) -> None:
        """What there is to save is saved, or being saved."""
        self._first = self._last = self._saved = None

    def say(self, url: str) -> None:
        """Warn of them, once all that was begun has ended.

        Where warnings are errors it is logged: a run that has come to its end has not failed.
        """
        with messages.kept(lambda error: messages.log(logger.warning, "%s", error)):
            messages.warn(f"{self._what(url)}. mgr.save({self._last}, force=True) after the loop saves its end")

    def _what(self, url: str) -> str:
        last, saved = self._last or 0, self._saved
        if saved is None:
            return f"{_steps(self._first or 0, last)} in no checkpoint of {url}: no save was due"
        if saved.failed:
            why = f"the save of step {saved.step} has failed, and none was due after it"
            return f"step {last} is in no checkpoint of {url}: {why}"
        return f"{_steps(saved.step + 1, last)} in no checkpoint of {url}: no save was due after step {saved.step}"


def _steps(first: int, last: int) -> str:
    return f"step {last} is" if first >= last else f"{last - first + 1} steps ({first} to {last}) are"
