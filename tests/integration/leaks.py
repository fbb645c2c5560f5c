"""What a process holds on to after many saves, many managers, and a loop that is interrupted and run again.

``python -m tests.integration.leaks WHAT MODE COUNT ROOT`` does it in a process of its own, and prints what has grown.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.optim import optimizer as optim

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.repository.lock import WriterLock
from checkpointer.save import commit_callbacks
from checkpointer.staging import step_hook

M_ARENA_MAX = -8
"""Of mallopt(3)."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Balance:
    """What this process holds at the moment."""

    def __init__(self) -> None:
        for _ in range(3):  # a finalizer may free what another one then finds
            gc.collect()
        self.kinds = Counter(type(item).__qualname__ for item in gc.get_objects())
        self.blocks = sys.getallocatedblocks()
        self.allocated = _allocated()
        pages = [int(text) for text in Path("/proc/self/statm").read_text().split()[:2]]
        self.mapped, self.resident = (count * resource.getpagesize() for count in pages)
        self.held = {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "tasks": len(os.listdir("/proc/self/task")),
            "descriptors": sorted(_descriptors()),
            "locks": Path("/proc/locks").read_text().split().count(str(os.getpid())),
            "signal handlers": [str(signal.getsignal(number)) for number in SIGNALS],
            "hooks of steps": [len(optim._global_optimizer_pre_hooks), len(optim._global_optimizer_post_hooks)],
            "finalizers": len(weakref.finalize._registry),  # type: ignore[attr-defined]
            "calls at exit": atexit._ncallbacks(),
            "managers": [len(step_hook._watches), len(commit_callbacks._unfinished), self.kinds[WriterLock.__name__]],
            "temporary files": sorted(os.listdir(tempfile.gettempdir())),
        }

    def grown(self, before: Balance) -> dict[str, Any]:
        """What is there now and was not before."""
        kinds = dict((self.kinds - before.kinds).most_common(5))
        return {
            "held": {name: [before.held[name], now] for name, now in self.held.items() if now != before.held[name]},
            "objects": self.kinds.total() - before.kinds.total(),
            "kinds": kinds,
            "blocks": self.blocks - before.blocks,
            "allocated": self.allocated - before.allocated,
            "mapped": self.mapped - before.mapped,
            "resident": self.resident - before.resident,
        }


class _Allocator(ctypes.Structure):
    """The result of mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def _allocated() -> int:
    """Bytes that the C library has given out; 0 where it does not say."""
    function: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = _Allocator
    found = function()
    return int(found.uordblks + found.hblkhd)


def _descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing
            continue
    return found


class Training:
    """A model of a few bytes, of which half is frozen, so that files are shared."""

    def __init__(self, root: str, mode: str) -> None:
        self.root = root
        self.config = {
            "save": {"on_signal": ["SIGTERM", "SIGUSR1"], "deadline": "30s"},
            "keep": {"last": 2},
            "write": {"mode": mode, "durable": False},  # fsync holds nothing, and takes most of the time
        }
        self.announced = 0

    def manager(self) -> CheckpointManager:
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model[1].parameters())
        parts = {"model": self.model, "optimizer": self.optimizer}
        return CheckpointManager(self.root, config=self.config, on_commit=self.announce, **parts)

    def announce(self, info: CheckpointInfo) -> None:
        self.announced += 1

    def step(self) -> None:
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saves(self, mgr: CheckpointManager, count: int) -> None:
        """So many more saves, each beside a step."""
        latest = mgr.latest()
        first = latest.step + 1 if latest else 0
        for step in range(first, first + count):
            mgr.save(step, metrics={"loss": 1.0}, files={"note.txt": b"attached"})
            self.step()
        mgr.wait()


class Leaking(Training):
    """Keeps something of each kind for each save."""

    def __init__(self, root: str, mode: str) -> None:
        super().__init__(root, mode)
        self.kept: list[Any] = []

    def announce(self, info: CheckpointInfo) -> None:
        super().announce(info)
        self.kept += [info, os.open(info.path, os.O_RDONLY), bytes(1 << 16), mmap.mmap(-1, 2 << 20)]
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def saves(training: Training, count: int) -> tuple[Balance, Balance]:
    """``count`` saves of one manager."""
    with training.manager() as mgr:
        training.saves(mgr, 40)
        mgr._saver.wait()  # the pruning, too
        before = _settled()
        training.saves(mgr, count)
        mgr._saver.wait()
        return before, _settled()


def managers(training: Training, count: int, *, close: bool = True) -> tuple[Balance, Balance]:
    """``count`` managers one after the other; ``close``: else they are dropped."""

    def one() -> None:
        mgr = training.manager()
        mgr.restore_latest()
        training.saves(mgr, 2)
        if close:
            mgr.close()
        else:
            mgr._saver.wait()
            _until_announced()
            del mgr
            gc.collect()  # frees the lock

    for _ in range(5):
        one()
    before = _settled()
    for _ in range(count):
        one()
    return before, _settled()


def loops(training: Training, count: int) -> tuple[Balance, Balance]:
    """A cell of a notebook that is interrupted in the middle of a save, and run again; its traceback lives on."""
    last: BaseException | None = None

    def cell() -> None:
        with training.manager() as mgr:
            restored = mgr.restore_latest()
            first = restored.step + 1 if restored else 0
            for step in range(first, first + 5):
                training.step()
                mgr.save(step)
            raise KeyboardInterrupt

    def again(times: int) -> None:
        nonlocal last
        for _ in range(times):
            try:
                cell()
            except KeyboardInterrupt as error:
                last = error

    again(3)
    before = _settled()
    again(count)
    return before, _settled()


def _until_announced() -> None:
    while any(thread.name == "checkpointer-on-commit" for thread in threading.enumerate()):
        os.sched_yield()


def _settled() -> Balance:
    _until_announced()
    Balance()  # what looking for the first time leaves behind
    return Balance()


def main(what: str, mode: str, count: str, root: str) -> None:
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # else each new thread may reserve 64 MiB of addresses
    tempfile.tempdir = None  # the server that this process was forked from may have looked it up
    training = Leaking(root, mode) if what == "leaking" else Training(root, mode)
    if what in ("saves", "leaking"):
        before, after = saves(training, int(count))
    elif what == "loops":
        before, after = loops(training, int(count))
    else:
        before, after = managers(training, int(count), close=what == "managers")
    print(json.dumps({**after.grown(before), "announced": training.announced}))


if __name__ == "__main__":
    main(*sys.argv[1:])
