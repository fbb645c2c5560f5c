"""The run's history: what happened to it, written by whoever holds the writer's lock, for humans alone.

No decision reads it, and nothing is lost with it. So nothing waits for it, either: no fsync, and no error of it fails
anything. Files are ``.checkpointer/journal/<number>-<random>.jsonl``, each of one writer, and grow by sealed lines;
where no file can grow, a few events at a time replace the file by a longer one, when it is time to tidy up anyway.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from checkpointer.errors import CheckpointerError, CorruptCheckpointError, FormatVersionError
from checkpointer.format import paths
from checkpointer.format.event import Event, Head, event_line, parse_line
from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.lock import WriterLock
from checkpointer.storage import Storage, is_refusal, refusals_typed
from checkpointer.system import messages
from checkpointer.system.host import host_name

logger = logging.getLogger("checkpointer")

FILE_LIMIT = 16 * 1024
"""Bytes of one file; then its writer begins another. In a bucket so much is sent again for each few events."""

FILES = 256
"""So many are kept, the newest: 4 MiB at most."""

UNWRITTEN = 1000
"""Events that wait until they can be written; then the oldest of them are forgotten."""

_NAME = re.compile(r"([0-9]{8})-[0-9a-f]{16}\.jsonl")
_LAST = 99_999_999
_GAP = b"\n"
"""Before what is tried again: a part of the first try may be in the file."""


@dataclass(frozen=True)
class History:
    """What can be read of a journal."""

    events: tuple[Event, ...] = ()
    """In the order in which they were written."""
    damaged: int = 0
    """Records, or whole files, that cannot be read. A last line that was not written to its end counts as none."""


class Journal:
    """Of one run root. Writes only while this process holds the writer's lock; any thread may call it."""

    def __init__(self, storage: Storage, lock: WriterLock) -> None:
        self._storage = storage
        self._lock = lock
        self._unwritten: deque[bytes] = deque(maxlen=UNWRITTEN)
        """Lines, the oldest first."""
        self._writing = threading.Lock()
        """Not held while an event is only added: the training thread must not wait for a bucket. It guards the rest."""
        self._batch: list[bytes] = []
        """Lines that are being written, or could not be; they come before the others."""
        self._path = ""
        """The file that is being written; empty until there is one."""
        self._written = b""
        """What was written to it."""
        self._branch: str | None = None
        self._said = False

    def add(
        self,
        kind: str,
        info: CheckpointInfo | None = None,
        *,
        step: int | None = None,
        reason: str | None = None,
        statistics: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Note an event, of checkpoint ``info`` if it happened to one. Never raises, and never waits for a server.

        Where this process does not hold the lock it does nothing: then it is a reader, or another rank.
        """
        if not self._lock.held:
            return
        event = Event(
            kind=kind,
            time=datetime.now(timezone.utc),
            step=step if info is None else info.step,
            id=info.id if info else None,
            reason=None if reason is None else self._storage.redact(reason),
            metrics=info.metrics if info and kind == "commit" else {},
            statistics=statistics or {},
            details=details or {},
        )
        self._unwritten.append(event_line(event))
        if self._storage.can_append:
            self.flush()

    def restored(self, info: CheckpointInfo, newest: CheckpointInfo | None) -> None:
        """Note a restore; where ``newest``, the newest of the run, is another, the next commit begins a branch."""
        self.add("restore", info)
        self.begins_branch(f"goes on from {info}", None if newest and newest.id == info.id else newest)

    def begins_branch(self, how: str, newest: CheckpointInfo | None) -> None:
        """The next commit leaves ``newest`` behind; ``None``: it does not."""
        self._branch = None
        if newest is not None:
            known = ", which is damaged" if newest.damaged is not None else ""
            self._branch = f"{how}; the newest was {newest}{known}"

    def committed(self, info: CheckpointInfo) -> None:
        """Note a commit, and the branch that begins with it."""
        branch, self._branch = self._branch, None
        if branch is not None:
            self.add("branch", info, reason=branch)
        details = {"sequence": info.sequence, "parent": info.parent, "size": info.size, "finite": info.finite}
        if info.epoch is not None:
            details["epoch"] = info.epoch
        self.add("commit", info, statistics=info.statistics, details=details)

    def flush(self) -> None:
        """Write what is not written yet. Never raises: what fails is tried again with the next event."""
        if not self._lock.held:
            return
        with self._writing:
            try:
                while self._batch or self._unwritten:
                    self._write_some()
            except (OSError, CheckpointerError) as error:
                self._say(error)
            else:
                self._said = False

    def read(self) -> History:
        """What happened, as far as it can be read. Needs no lock.

        Raises:
            UnreadableCheckpointError: the system does not let this user list it.
        """
        with refusals_typed(self._storage, paths.JOURNAL):
            files = self._files()[-FILES:]
        events: list[Event] = []
        damaged = 0
        for path, data in zip(files, self._storage.read_many(files, FILE_LIMIT), strict=True):
            if isinstance(data, FileNotFoundError):
                continue  # its place was needed meanwhile
            if isinstance(data, CorruptCheckpointError) or (isinstance(data, Exception) and is_refusal(data)):
                damaged += 1
            elif isinstance(data, Exception):
                raise data
            else:
                found = list(_parsed(data, path))
                events += [event for event in found if event is not None]
                damaged += found.count(None)
        return History(tuple(events), damaged)

    def _files(self) -> list[str]:
        """The files of all writers, the oldest first."""
        names = (entry.name for entry in self._storage.list_directory(paths.JOURNAL) if entry.is_file)
        return [f"{paths.JOURNAL}/{name}" for name in sorted(names) if _NAME.fullmatch(name)]

    def _write_some(self) -> None:
        """Write as many lines as the file has room for; where that is none, the next call begins another."""
        if not self._path:
            self._begin_file()
        room = FILE_LIMIT - len(_GAP) - len(self._written) - sum(map(len, self._batch))
        while self._unwritten and len(self._unwritten[0]) <= room:
            self._batch.append(self._unwritten.popleft())
            room -= len(self._batch[-1])
        if not self._batch:
            self._path = ""
            return
        new = b"".join(self._batch)
        try:
            if self._storage.can_append:
                self._storage.append(self._path, new)
            else:
                self._storage.put(self._path, self._written + new)
        except BaseException:
            if self._batch[0] != _GAP:
                self._batch.insert(0, _GAP)
            raise
        self._written += new
        self._batch.clear()

    def _begin_file(self) -> None:
        """Choose the next file, and make room for it: what cannot be removed keeps others from being written."""
        files = self._files()
        for path in files[: max(len(files) - FILES + 1, 0)]:
            self._storage.remove(path)
        number = 1 + max((int(path.rpartition("/")[2][:8]) for path in files), default=0)
        self._path = f"{paths.JOURNAL}/{min(number, _LAST):08d}-{secrets.token_hex(8)}.jsonl"
        self._written = b""
        self._batch.insert(0, Head(host_name(), os.getpid()).to_line())

    def _say(self, error: Exception) -> None:
        """Once: it fails nothing."""
        if self._said:
            return
        self._said = True
        reason = self._storage.redact(str(error))
        text = "the history of %s misses events, since %s cannot be written: %s. Saves and restores go on"
        messages.log(logger.warning, text, self._storage.url, self._storage.place(paths.JOURNAL), reason)


def _parsed(data: bytes, path: str) -> Iterator[Event | None]:
    """The events of one file; ``None`` for each line that is none, or for all of a file of another version."""
    lines = data.split(b"\n")
    lines.pop()  # nothing; or what a writer that died, or is at work, has not written to its end
    head = Head()
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            found = parse_line(line, f"line {number + 1} of {path}", head)
        except CorruptCheckpointError:
            yield None
        except FormatVersionError:
            yield None
            return
        else:
            if isinstance(found, Head):
                head = found
            else:
                yield found
