"""Where the disk is full, or will be soon: ``write: {on_full}``, and a warning before it comes to that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeAlias

from checkpointer.config.settings import Config
from checkpointer.errors import SaveError
from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.prune import Pruner
from checkpointer.repository.repository import Repository
from checkpointer.save.snapshot import Snapshot, bytes_to_write
from checkpointer.save.writer import is_full
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

Unreturned: TypeAlias = "Callable[[], Collection[str]]"

TIGHT, RECOVERED = 2, 3
"""Checkpoints that still fit: below the first it is tight, from the second on it has recovered."""


class Space:
    """What is decided about space, save after save. The writer and the training thread take turns in using it."""

    def __init__(self, repository: Repository, config: Config) -> None:
        self._repository = repository
        self._keep = config.keep
        self.pruner = Pruner(repository, config.keep)
        self._on_full = config.write.on_full
        self._wanted: int | None = None
        """Bytes that the last save would have needed, if it was left out for want of them."""
        self._episode = False
        """Whether saves are being left out, and that has been said."""
        self._tight = False

    def still_full(self) -> bool:
        """Whether the last save was left out, and the space that it needed is still not there."""
        if self._wanted is None:
            return False
        free = self._free()
        return free is not None and free < self._wanted

    def admits(self, snapshot: Snapshot, settle: Callable[[], bool]) -> bool:
        """Whether ``snapshot`` may be written; ``False`` where it has no room, and is left out as configured.

        ``settle`` waits for what may be freeing space at this moment, and says whether there was something.
        """
        if self._on_full != "skip" or self._free() is None:
            return True
        needed = bytes_to_write(self._repository, snapshot)
        try:
            try:
                self._repository.check_space(snapshot.step, needed)
            except SaveError:
                if not settle():
                    raise
                self._repository.check_space(snapshot.step, needed)
        except SaveError as error:
            self.leaves_out(snapshot.step, error)
            self._wanted = needed
            return False
        return True

    def leaves_out(self, step: int, error: BaseException) -> bool:
        """Whether a save that ended with ``error`` is simply left out; says so, once until one succeeds again."""
        if self._on_full != "skip" or not is_full(error):
            return False
        if self._episode:
            messages.log(logger.info, "step %d was not saved either: %s", step, error)
            return True
        self._episode = True
        messages.warn(
            f"step {step} was not saved, and training goes on (write: {{on_full: skip}}): {error}. The saves that "
            "follow are left out without a further warning until there is room",
        )
        return True

    def make_room(self, protect: Collection[str], unreturned: Unreturned = frozenset) -> bool:
        """Remove what retention lets go at this moment, if so configured; whether that was anything."""
        if self._on_full != "prune":
            return False
        return self.prune(protect, unreturned)

    def committed(self, info: CheckpointInfo) -> None:
        """A save is durable, and retention has been applied: warn where fewer than two more such saves have room."""
        self._wanted, self._episode = None, False
        written = info.statistics.get("bytes_written")
        size = written if isinstance(written, int) else info.size
        free = self._free()
        if free is None or (self._tight and free < RECOVERED * size):
            return
        self._tight = free < TIGHT * size
        if self._tight:
            messages.warn(
                f"{self._repository.url} has {free} bytes free, and saving step {info.step} took {size}: there is no "
                "room for two more. Free some space, or keep fewer checkpoints (keep: in the configuration)",
            )

    def prune(self, protect: Collection[str] = (), unreturned: Unreturned = frozenset) -> bool:
        """Apply retention; whether anything was removed. What goes wrong is a warning: saving goes on."""
        if not (self._keep.has_rules or self._keep.max_size):
            return False  # everything is kept: there is nothing to list for
        try:
            return bool(self.pruner.prune(protect=protect, unreturned=unreturned).remove)
        except Exception as error:  # noqa: BLE001  what is saved is durable: training must go on
            reason = self._repository.storage.redact(f"{type(error).__name__}: {error}")
            messages.warn(
                f"could not prune {self._repository.url}: {reason}. Old checkpoints take space until it works again",
            )
            return False

    def _free(self) -> int | None:
        """Bytes; ``None`` where they cannot be known. A write that fails says more than a question that does."""
        try:
            return self._repository.storage.free_bytes()
        except OSError:
            return None
