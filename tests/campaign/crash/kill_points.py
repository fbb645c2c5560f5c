"""Kills processes at every event on the file system, and says what the next process finds.

A program: ``python -m tests.campaign.crash.kill_points SCENARIO FOLDER FIRST STRIDE [no-exchange]``. It imports torch
once, and forks: a child that is killed with SIGKILL at its n-th event, then one that checks. Prints ``ok COUNT`` at the
end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from checkpointer import CheckpointManager
from checkpointer.format import paths
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage
from checkpointer.storage import local as local_storage
from tests.campaign.crash.scenarios import SCENARIOS, check_newest, maker, two

EVENTS = frozenset({
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.scandir", "os.truncate", "os.symlink",
    "os.chmod", "kill_points.write", "kill_points.fsync", "kill_points.rename",
})  # fmt: skip


class Killer:
    """Kills this process at its ``number``-th event below ``root``. Audit hooks stay: only for children."""

    def __init__(self, root: str, number: int) -> None:
        self._root = root
        self._number = number
        self._count = 0
        self._guard = threading.Lock()

    def install(self) -> None:
        """Listen to Python's own events, and announce those that it has none for."""
        write, fsync, flagged = os.write, os.fsync, local_storage._flagged_rename

        def torn_write(fd: int, data: Any) -> int:
            place = os.readlink(f"/proc/self/fd/{fd}")
            if not place.startswith(self._root):
                return write(fd, data)
            sys.audit("kill_points.write", place)
            half = write(fd, memoryview(data)[: len(data) // 2])
            sys.audit("kill_points.write", place)
            return half + write(fd, memoryview(data)[half:])

        def announced_fsync(fd: int) -> None:
            sys.audit("kill_points.fsync", os.readlink(f"/proc/self/fd/{fd}"))
            fsync(fd)

        def announced_rename(old: str, new: str, linux: int, macos: int) -> bool:
            sys.audit("kill_points.rename", new)
            done = flagged(old, new, linux, macos)
            sys.audit("kill_points.rename", new)
            return done

        setattr(os, "write", torn_write)  # noqa: B010 - a type checker knows better what os.write is
        setattr(os, "fsync", announced_fsync)  # noqa: B010
        setattr(local_storage, "_flagged_rename", announced_rename)  # noqa: B010
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not self._concerns_root(event, arguments):
            return
        with self._guard:
            self._count += 1
            if self._count == self._number:
                os.kill(os.getpid(), signal.SIGKILL)

    def _concerns_root(self, event: str, arguments: tuple[Any, ...]) -> bool:
        place = arguments[0] if arguments else None
        if isinstance(place, int) and not isinstance(place, bool):
            return event == "os.scandir"
        if not isinstance(place, (str, bytes)):
            return False
        text = os.fsdecode(place)
        return not os.path.isabs(text) or text.startswith(self._root)


def without_exchange() -> None:
    """As on a system whose C library has no renameat2."""
    setattr(local_storage, "_special_rename", lambda: None)  # noqa: B010 - see above


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked child that does ``work``; negative: the signal that killed it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(root: str, allowed: Collection[int | None], what: str) -> None:
    """The newest checkpoint is a whole old or new one, a new writer saves, and no leftover stays."""
    if os.path.exists(root):
        report = CheckpointManager(root, read_only=True).verify()
        assert not [extra for checkpoint in report.checkpoints for extra in checkpoint.extra], f"{what}\n{report}"
    left = check_newest(maker(root), allowed, what)
    storage = LocalStorage(root)
    history = Repository(storage).journal.read()
    assert history.damaged == 0, what
    assert [event.id for event in history.events if event.kind == "commit"][-1] == left[-1].id, what
    for folder in (paths.TMP, paths.TRASH, paths.QUARANTINE):
        assert storage.list_directory(folder) == [], (what, storage.list_directory(folder))
    names = {os.path.basename(info.path) for info in left}
    assert {entry.name for entry in storage.list_directory("")} == {*names, paths.PRIVATE}, what
    assert {entry.name for entry in storage.list_directory(paths.NOTES)} <= {info.id for info in left}, what


def run(scenario: str, folder: str, first: int, stride: int) -> int:
    """Kill at the events ``first``, ``first + stride``, … until one is never reached; returns how many there were."""
    prepare, act, allowed = SCENARIOS[scenario]
    base, root = os.path.join(folder, "base"), os.path.join(folder, "run")
    assert in_child(lambda: prepare(maker(base))) == 0
    number, tried = first, 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        if os.path.exists(base):
            shutil.copytree(base, root)

        def work(number: int = number) -> None:
            Killer(root, number).install()
            act(maker(root))

        status = in_child(work)
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"event {number}: the scenario itself failed with {status}")
        what = f"killed at event {number}"
        if in_child(lambda what=what: check(root, allowed, what)) != 0:  # type: ignore[misc]
            raise SystemExit(f"event {number} of {scenario}: what it left in {root} is not as it should be")
        if status == 0:
            return tried
        tried += 1
        number += stride


def main() -> None:
    scenario, folder, first, stride, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm = os.path.join(folder, "warm")
    two(maker(warm))  # whatever is imported late is imported now, once
    check(warm, {2}, "not killed")
    if rest:
        without_exchange()
    print("ok", run(scenario, folder, int(first), int(stride)))


if __name__ == "__main__":
    main()
