"""``on_commit`` runs on a thread of its own: it delays no save, fails none, and its checkpoint stays until it returns."""

from __future__ import annotations

import contextvars
import gc
import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointInfo, CheckpointManager, commit_callbacks
from checkpointer.commit_callbacks import BEHIND
from checkpointer.deadline import OUTLIVED
from checkpointer.errors import CheckpointerWarning, RunLockedError, SaveError

LONG = 60
"""Seconds. Nothing takes that long unless it hangs."""

MODES = ("sync", "async", "lazy")


class Gate:
    """A callback that waits until it is let go on; ``seen`` are the steps that it was called for."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.opened = threading.Event()
        self._began: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __call__(self, info: CheckpointInfo) -> None:
        self.seen.append(info.step)
        self._began.put(info.step)
        assert self.opened.wait(LONG)

    def began(self) -> int:
        """Wait for a call; its step."""
        return self._began.get(timeout=LONG)

    def open(self) -> None:
        self.opened.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """``close`` waits for a moment, not for a minute."""
    monkeypatch.setattr("checkpointer.manager.PATIENCE", 0.05)


def make(root: Path, on_commit: Callable[[CheckpointInfo], object], mode: str = "async", **config: Any) -> Any:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"write": {"mode": mode}, **config}
    return CheckpointManager(root / "run", config=settings, on_commit=on_commit, model=model, optimizer=optimizer)


def saved(mgr: CheckpointManager, step: int) -> CheckpointInfo:
    handle = mgr.save(step)
    assert handle is not None
    return handle.result(LONG)


def steps(mgr: CheckpointManager) -> list[int]:
    return [info.step for info in mgr.checkpoints()]


def callback_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "checkpointer-on-commit"]


# ---------------------------------------------------------------------------------------------------- the thread


@pytest.mark.parametrize("mode", MODES)
def test_it_is_called_for_each_commit_in_order_on_one_thread_of_its_own(tmp_path: Path, mode: str) -> None:
    seen: list[tuple[int, bool]] = []
    threads: set[str] = set()

    def tell(info: CheckpointInfo) -> None:
        seen.append((info.step, (Path(info.path) / "manifest.json").exists()))
        threads.add(threading.current_thread().name)

    with make(tmp_path, tell, mode) as mgr:
        for step in range(6):
            mgr.save(step)
    assert seen == [(step, True) for step in range(6)]
    assert threads == {"checkpointer-on-commit"}


@pytest.mark.parametrize("mode", MODES)
def test_while_it_hangs_saves_are_committed_and_pruned_wait_returns_and_no_two_calls_overlap(
    tmp_path: Path, gate: Gate, mode: str
) -> None:
    mgr = make(tmp_path, gate, mode, keep={"last": 1})
    saved(mgr, 0)
    assert gate.began() == 0
    for step in (1, 2):
        saved(mgr, step)
    mgr.wait()
    assert gate.seen == [0]
    assert steps(mgr)[-1] == 2
    gate.open()
    mgr.close()
    assert gate.seen == [0, 1, 2]


def test_the_thread_begins_with_the_first_commit_and_ends_when_there_is_nothing_to_call_for(tmp_path: Path) -> None:
    with make(tmp_path, lambda info: None) as mgr:
        assert not callback_threads()
        saved(mgr, 0)
        until = time.monotonic() + LONG
        while callback_threads():
            assert time.monotonic() < until
            time.sleep(0.005)
        saved(mgr, 1)
    assert not callback_threads()


def test_it_runs_in_the_context_of_the_save_call(tmp_path: Path) -> None:
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    seen: list[str] = []
    with make(tmp_path, lambda info: seen.append(span.get())) as mgr:
        span.set("epoch 1")
        mgr.save(0)
        span.set("epoch 2")
        mgr.save(1)
    assert seen == ["epoch 1", "epoch 2"]


def test_a_save_that_failed_and_one_that_was_left_out_are_not_announced(tmp_path: Path) -> None:
    seen: list[int] = []
    mgr = make(tmp_path, lambda info: seen.append(info.step))
    saved(mgr, 0)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    (tmp_path / "run" / "checkpoint-1" / "mine.txt").write_text("in the way")
    handle = mgr.save(1)
    with pytest.raises(SaveError):
        handle.result(LONG)
    mgr.close()
    assert seen == [0]


# -------------------------------------------------------------------------------------------------------- errors


class Outage(Exception):
    """As a tracker's client raises it."""

    def __repr__(self) -> str:
        raise RuntimeError("an exception that cannot even be shown")


@pytest.mark.parametrize("error", [KeyError("webhook"), SystemExit(3), KeyboardInterrupt(), Outage()], ids=type)
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_it_is_logged_with_a_warning_and_raised_nowhere(
    tmp_path: Path, mode: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(info: CheckpointInfo) -> None:
        raise error

    with pytest.warns(CheckpointerWarning, match=r"on_commit \(.*fail\) failed for .*checkpoint-") as caught:
        mgr = make(tmp_path, fail, mode)
        for step in range(3):
            saved(mgr, step)
        mgr.wait()
        mgr.close()
    assert len(caught) == 3
    assert steps(mgr) == [0, 1, 2]
    records = [record for record in caplog.records if "on_commit" in record.message]
    assert [record.exc_info is not None and record.exc_info[1] is error for record in records] == [True] * 3


def test_where_warnings_are_errors_the_training_thread_raises_it_once_and_no_save_is_lost(tmp_path: Path) -> None:
    failed = threading.Event()

    def fail(info: CheckpointInfo) -> None:
        failed.set()
        raise KeyError("webhook")

    mgr = make(tmp_path, fail, keep={"last": 2})
    saved(mgr, 0)
    assert failed.wait(LONG)
    raised = 0
    for step in range(1, 6):
        try:
            mgr.save(step)
        except CheckpointerWarning as warning:
            assert "webhook" in str(warning)  # noqa: PT017  which calls raise depends on the threads
            raised += 1
        mgr.wait() if raised else None
    with pytest.raises(CheckpointerWarning, match="webhook"):
        while True:  # each is raised once; the last by close at the latest
            mgr.close() if raised == 5 else mgr.wait()
            raised += 1
            mgr.close()
    assert steps(mgr) == [4, 5]
    mgr.close()
