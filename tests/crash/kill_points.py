"""Kills processes at every event on the file system, and says what the next process finds.

A program: ``python -m tests.crash.kill_points SCENARIO FOLDER FIRST STRIDE [no-exchange]``. It imports torch once, and
forks: a child that is killed with SIGKILL at its n-th event, then one that checks. Prints ``ok COUNT`` at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from checkpointer import CheckpointManager, layout
from checkpointer.storage import LocalStorage
from checkpointer.storage import local as local_storage
from tests.successor import succeed

EVENTS = frozenset({
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.scandir", "os.truncate", "os.symlink",
    "os.chmod", "kill_points.write", "kill_points.fsync", "kill_points.rename",
})  # fmt: skip

SYNC = {"write": {"mode": "sync"}, "require_resume": False}


def state(value: int) -> dict[str, Any]:
    """What is saved: a number, and a tensor full of it."""
    return {"value": value, "tensor": torch.full((3,), float(value))}


def manager(root: str, live: dict[str, Any], **config: Any) -> CheckpointManager:
    return CheckpointManager(root, config={**SYNC, **config}, state=live)


# ---------------------------------------------------------------------------------------------- scenarios


def empty(root: str) -> None:
    """No checkpoint at all; the directory above the root exists."""


def two(root: str) -> None:
    """Steps 1 and 2, with the values 1 and 2."""
    live = state(0)
    with manager(root, live) as first:
        for step in (1, 2):
            live.update(state(step))
            first.save(step, files={"notes/a.txt": b"attached"})


def two_and_pinned(root: str) -> None:
    two(root)
    with manager(root, state(0)) as first:
        first.pin(2)


def first_save(root: str, live: dict[str, Any]) -> None:
    with manager(root, live) as first:
        live.update(state(1))
        first.save(1, files={"notes/a.txt": b"attached"})


def save_and_prune(root: str, live: dict[str, Any]) -> None:
    with manager(root, live, keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        live.update(state(3))
        second.save(3)


def overwrite(root: str, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.restore_latest(components=["state"])
        live.update(state(22))
        second.save(2, overwrite=True)


def branch(root: str, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.restore(1, components=["state"])
        live.update(state(22))
        second.save(2)


def remove(root: str, live: dict[str, Any]) -> None:
    with manager(root, live, keep={"last": 1}) as second:
        second.prune()


def share(root: str, live: dict[str, Any]) -> None:
    """Step 3 is step 2 again, on the same bytes; then 2 goes."""
    with manager(root, live, keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        succeed(second._repository, second._repository.find(2), 3)
        second.prune()


def pin(root: str, live: dict[str, Any]) -> None:
    with CheckpointManager(root, read_only=True) as evaluator:
        evaluator.pin(1)
        evaluator.annotate(2, metrics={"score": 1.0}, note="good")
        evaluator.unpin(1)


Scenario = tuple[Callable[[str], None], Callable[[str, dict[str, Any]], None], set[int | None]]

SCENARIOS: dict[str, Scenario] = {
    "first_save": (empty, first_save, {None, 1}),
    "save_and_prune": (two, save_and_prune, {2, 3}),
    "overwrite": (two, overwrite, {2, 22}),
    "branch": (two, branch, {2, 22}),
    "branch_beside_pinned": (two_and_pinned, branch, {2, 22}),
    "remove": (two, remove, {2}),
    "share": (two, share, {2}),
    "pin": (two, pin, {2}),
}


# ------------------------------------------------------------------------------------------------- killing


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


def check(root: str, allowed: set[int | None]) -> None:
    """The newest checkpoint is a whole old or new one, a new writer saves, and no leftover stays."""
    live = state(0)
    with CheckpointManager(root, read_only=True, state=live) as reader:
        restored = reader.restore_latest(components=["state"])
        assert (None if restored is None else live["value"]) in allowed, (restored, live)
        if restored is not None:
            assert restored.skipped == ()
            assert torch.equal(live["tensor"], torch.full((3,), float(live["value"]))), live
        report = reader.verify()
        assert report.ok, str(report)
        assert not [extra for checkpoint in report.checkpoints for extra in checkpoint.extra], str(report)
    with manager(root, live) as writer:
        writer.restore_latest(components=["state"])
        live.update(state(9))
        writer.save(9)
        assert writer.verify().ok
        assert writer.checkpoints()[-1].step == 9
        ids = {info.id for info in writer.checkpoints()}
        names = {os.path.basename(info.path) for info in writer.checkpoints()}
    storage = LocalStorage(root)
    for folder in (layout.TMP, layout.TRASH, layout.QUARANTINE):
        assert storage.list_directory(folder) == [], (folder, storage.list_directory(folder))
    assert {entry.name for entry in storage.list_directory("")} == {*names, layout.PRIVATE}
    assert {entry.name for entry in storage.list_directory(layout.NOTES)} <= ids


def run(scenario: str, folder: str, first: int, stride: int) -> int:
    """Kill at the events ``first``, ``first + stride``, … until one is never reached; returns how many there were."""
    prepare, act, allowed = SCENARIOS[scenario]
    base, root = os.path.join(folder, "base"), os.path.join(folder, "run")
    assert in_child(lambda: prepare(base)) == 0
    number, tried = first, 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        if os.path.exists(base):
            shutil.copytree(base, root)

        def work(number: int = number) -> None:
            live = state(0)
            Killer(root, number).install()
            act(root, live)

        status = in_child(work)
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"event {number}: the scenario itself failed with {status}")
        if in_child(lambda: check(root, allowed)) != 0:
            raise SystemExit(f"event {number} of {scenario}: what it left in {root} is not as it should be")
        if status == 0:
            return tried
        tried += 1
        number += stride


def main() -> None:
    scenario, folder, first, stride, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    two(os.path.join(folder, "warm"))  # whatever is imported late is imported now, once
    check(os.path.join(folder, "warm"), {2})
    if rest:
        without_exchange()
    print("ok", run(scenario, folder, int(first), int(stride)))


if __name__ == "__main__":
    main()
