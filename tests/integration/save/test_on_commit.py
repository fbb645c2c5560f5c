"""``on_commit`` runs on a thread of its own: it delays no save, fails none, and what it was called for stays."""

from __future__ import annotations

import contextvars
import gc
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointerWarning, RunLockedError, SaveError
from checkpointer.policy.deadline import OUTLIVED, time_left
from checkpointer.repository.repository import Repository
from checkpointer.save import commit_callbacks
from checkpointer.save.commit_callbacks import BEHIND
from checkpointer.storage import open_storage
from tests.support.ranks import run

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


def save_all(mgr: CheckpointManager, numbers: Iterable[int], *, close: bool = True) -> None:
    for step in numbers:
        saved(mgr, step)
        mgr.wait()
    if close:
        mgr.close()


def steps(mgr: CheckpointManager) -> list[int]:
    return [info.step for info in mgr.checkpoints()]


def until_idle(mgr: CheckpointManager | None = None) -> None:
    """Wait until every call has returned, those after commits of ``mgr`` that have not begun yet, too."""
    if mgr is not None:
        mgr._saver.wait()
    until = time.monotonic() + LONG
    while callback_threads():
        assert time.monotonic() < until
        time.sleep(0.002)


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
        until_idle()
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


class OutageError(Exception):
    """As a tracker's client raises it."""

    def __repr__(self) -> str:
        raise RuntimeError("an exception that cannot even be shown")


@pytest.mark.parametrize("error", [KeyError("webhook"), SystemExit(3), KeyboardInterrupt(), OutageError()], ids=type)
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_it_is_logged_with_a_warning_and_raised_nowhere(
    tmp_path: Path, mode: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(info: CheckpointInfo) -> None:
        raise error

    mgr = make(tmp_path, fail, mode)
    with pytest.warns(CheckpointerWarning, match=r"on_commit \(.*fail\) failed for .*checkpoint-") as caught:
        save_all(mgr, range(3))
    assert len(caught) == 3
    assert steps(mgr) == [0, 1, 2]
    records = [record for record in caplog.records if "on_commit" in record.message]
    assert [record.exc_info is not None and record.exc_info[1] is error for record in records] == [True] * 3


class FailsAt:
    """A callback that fails for one step, once it is told to go on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.go_on = threading.Event()

    def __call__(self, info: CheckpointInfo) -> None:
        if info.step == self.step:
            assert self.go_on.wait(LONG)
            raise KeyError("webhook")


def test_where_warnings_are_errors_the_next_save_raises_it_once_and_is_performed(tmp_path: Path) -> None:
    fails = FailsAt(0)
    mgr = make(tmp_path, fails)
    saved(mgr, 0)
    fails.go_on.set()
    until_idle(mgr)
    with pytest.raises(CheckpointerWarning, match=r"on_commit .*webhook"):
        mgr.save(1)
    mgr.wait()
    saved(mgr, 2)
    mgr.close()
    assert steps(mgr) == [0, 1, 2]


def test_where_warnings_are_errors_close_raises_it_when_all_is_done(tmp_path: Path) -> None:
    fails = FailsAt(3)
    mgr = make(tmp_path, fails, keep={"last": 1})
    for step in range(4):
        mgr.save(step)
    fails.go_on.set()
    with pytest.raises(CheckpointerWarning, match=r"on_commit .*webhook"):
        mgr.close()
    assert steps(mgr) == [3]
    with make(tmp_path, print) as again:  # the lock is free
        assert again.restore_latest().step == 3


def test_where_warnings_are_errors_the_error_of_the_loop_comes_first(tmp_path: Path) -> None:
    def loop() -> None:
        fails = FailsAt(0)
        with make(tmp_path, fails) as mgr:
            saved(mgr, 0)
            fails.go_on.set()
            raise ZeroDivisionError("the loop's own")

    with pytest.raises(ZeroDivisionError, match="the loop's own") as caught:
        loop()
    assert isinstance(caught.value.__context__, CheckpointerWarning)


# ----------------------------------------------------------------------------------------------------- several ranks


def on_a_rank(root: str) -> list[int]:
    seen: list[int] = []
    with CheckpointManager(root, on_commit=lambda info: seen.append(info.step), state={"a": 1}) as mgr:
        mgr.save(0)
        mgr.save(1)
    return seen


def test_of_several_ranks_only_the_first_calls_it(tmp_path: Path) -> None:
    assert run(2, on_a_rank, str(tmp_path / "run")) == [[0, 1], []]


# ----------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_stays_until_it_has_returned_for_it_and_the_plan_says_so(
    tmp_path: Path, gate: Gate, mode: str
) -> None:
    mgr = make(tmp_path, gate, mode, keep={"last": 1})
    for step in range(3):
        saved(mgr, step)
    gate.began()
    mgr.prune()
    assert steps(mgr) == [0, 1, 2]
    reasons = {info.step: why for info, why in mgr.prune(dry_run=True).keep}
    assert reasons[0] == reasons[1] == ("on_commit has not returned",)
    assert "on_commit has not returned" in reasons[2]
    gate.open()
    until_idle()
    assert "on_commit" not in str(mgr.prune(dry_run=True))
    mgr.prune()
    assert steps(mgr) == [2]
    mgr.close()


def test_close_prunes_what_only_a_late_return_had_kept(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate, keep={"last": 1})
    for step in range(3):
        saved(mgr, step)
    gate.began()
    threading.Timer(0.05, gate.open).start()
    mgr.close()
    assert steps(mgr) == [2]


def test_making_room_on_a_full_disk_removes_nothing_that_it_has_not_returned_for(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate, keep={"last": 1}, write={"mode": "sync", "on_full": "prune"})
    for step in range(3):
        saved(mgr, step)
    gate.began()
    mgr._saver.wait()  # the pruning after the save
    assert not mgr._saver._space.make_room((), mgr._saver.unreturned)
    assert steps(mgr) == [0, 1, 2]
    gate.open()
    until_idle()
    assert mgr._saver._space.make_room((), mgr._saver.unreturned)
    mgr.close()


def test_one_that_is_slower_than_saves_is_named_once_until_it_has_caught_up(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    mgr = make(tmp_path, gate)
    save_all(mgr, range(BEHIND), close=False)  # says nothing: it is not late yet
    gate.began()
    monkeypatch.setattr(commit_callbacks, "LATE", 0.0)
    with pytest.warns(CheckpointerWarning) as caught:
        save_all(mgr, range(BEHIND, 2 * BEHIND), close=False)
    (warning,) = caught
    assert "on_commit (Gate) has not returned for the last 6 checkpoints, of which" in str(warning.message)
    assert "checkpoint-0 was committed" in str(warning.message)
    gate.open()
    mgr.close()
    assert gate.seen == list(range(2 * BEHIND))


# ---------------------------------------------------------------------------------------------------------- close


def test_close_waits_for_it_and_wait_does_not(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate)
    saved(mgr, 0)
    saved(mgr, 1)
    mgr.wait()
    assert gate.began() == 0
    threading.Timer(0.05, gate.open).start()
    mgr.close()
    assert gate.seen == [0, 1]
    assert not callback_threads()


def test_close_gives_up_with_a_warning_that_names_what_is_left_and_begins_no_further_call(
    tmp_path: Path, gate: Gate, impatient: None
) -> None:
    mgr = make(tmp_path, gate)
    for step in range(3):
        saved(mgr, step)
    gate.began()
    with pytest.warns(CheckpointerWarning) as caught:
        mgr.close()
    (warning,) = caught
    assert "on_commit (Gate) has not returned within 50ms" in str(warning.message)
    assert f"still running for {tmp_path}/run/checkpoint-0" in str(warning.message)
    assert f"not called any more for {tmp_path}/run/checkpoint-1, {tmp_path}/run/checkpoint-2" in str(warning.message)
    with make(tmp_path, print) as again:  # the lock is free
        assert again.restore_latest().step == 2
    gate.open()
    until_idle()
    assert gate.seen == [0]


def test_after_a_signal_close_waits_for_what_is_left_of_the_deadline(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate, save={"on_signal": ["SIGUSR1"], "deadline": "1s"})
    saved(mgr, 0)
    gate.began()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert mgr.stop_requested()
    began = time.monotonic()
    with pytest.warns(CheckpointerWarning, match="on_commit .* has not returned within"):
        mgr.close()
    assert time.monotonic() - began < LONG / 2


@pytest.mark.parametrize(
    "deadline, elapsed, left", [(None, 5, 60), (30, None, 60), (30, 5, 25), (300, 5, 295), (30, 31, 0)]
)
def test_the_time_that_is_left(deadline: float | None, elapsed: float | None, left: float) -> None:
    limit = None if deadline is None else timedelta(seconds=deadline)
    assert time_left(limit, elapsed, 60) == left
    assert time_left(timedelta(seconds=30), OUTLIVED * 30, 60) == 60  # nobody has killed it


def test_ctrl_c_ends_the_wait_of_close(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate)
    saved(mgr, 0)
    gate.began()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        mgr.close()
    with make(tmp_path, print) as again:  # the lock is free
        assert again.restore_latest().step == 0


# -------------------------------------------------------------------------------------- calls back into the manager


def test_it_may_look_pin_annotate_verify_and_watch_even_while_close_waits(tmp_path: Path) -> None:
    done: list[int] = []
    closing = threading.Event()

    def act(info: CheckpointInfo) -> None:
        assert closing.wait(LONG)
        mgr.pin(info)
        mgr.annotate(info, metrics={"score": 1.5}, note="from on_commit")
        mgr.unpin(info.step)
        assert mgr.verify(info.step).ok
        assert mgr.latest() is not None
        assert mgr.best("score", mode="max").id == info.id
        assert info.id in [item.id for item in mgr.checkpoints()]
        assert list(mgr.prune(dry_run=True).keep)
        assert [item.step for item in mgr.watch(timeout=0)] == []  # close has been called
        assert not mgr.should_stop()
        done.append(info.step)

    mgr = make(tmp_path, act)
    saved(mgr, 0)
    threading.Timer(0.1, closing.set).start()
    mgr.close()
    assert done == [0]
    assert mgr.latest().note == "from on_commit"


REFUSED: dict[str, Callable[[CheckpointManager], object]] = {
    "save": lambda mgr: mgr.save(9),
    "should_save": lambda mgr: mgr.should_save(9),
    "restore": lambda mgr: mgr.restore(0),
    "restore_latest": lambda mgr: mgr.restore_latest(),
    "wait": lambda mgr: mgr.wait(),
    "staged": lambda mgr: mgr.staged(),
    "prune": lambda mgr: mgr.prune(),
    "close": lambda mgr: mgr.close(),
    "with": lambda mgr: mgr.__enter__(),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_belongs_to_the_training_thread_is_refused_there_and_nothing_hangs(tmp_path: Path, call: str) -> None:
    refusals: list[str] = []

    def act(info: CheckpointInfo) -> None:
        try:
            REFUSED[call](mgr)
        except SaveError as error:
            refusals.append(str(error))

    mgr = make(tmp_path, act)
    saved(mgr, 0)
    mgr.close()
    assert len(refusals) == 1
    assert "belongs to the training thread" in refusals[0]


# ------------------------------------------------------------------------- without close, and where threads are scarce


def script(tmp_path: Path, body: str, *, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program that has made ``mgr`` with ``on_commit=tell``; ``body`` begins with the body of ``tell``."""
    program = f"""
import os, sys, threading, time
import torch
from checkpointer import CheckpointManager
from checkpointer.save import commit_callbacks
{textwrap.dedent(body)}
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("mode", MODES)
def test_a_program_that_ends_without_close_has_called_it_for_all_its_saves(tmp_path: Path, mode: str) -> None:
    body = f"""
    def tell(info):
        time.sleep(0.05)
        torch.ones(1000).sum().item()
        print(info.step, flush=True)

    mgr = CheckpointManager(sys.argv[1], config={{"write": {{"mode": {mode!r}}}}}, on_commit=tell, state={{"a": 1}})
    for step in range(3):
        mgr.save(step)
    """
    done = script(tmp_path, body)
    assert done.stdout.split() == ["0", "1", "2"]
    assert not done.stderr


def test_one_that_never_returns_keeps_no_program_from_ending(tmp_path: Path) -> None:
    body = """
    def tell(info):
        print("called", flush=True)
        threading.Event().wait()

    commit_callbacks.PATIENCE = 0.1
    mgr = CheckpointManager(sys.argv[1], on_commit=tell, state={"a": 1})
    mgr.save(0).result()
    mgr.save(1).result()
    """
    done = script(tmp_path, body)
    assert done.stdout.split() == ["called"]
    assert "it is still running for" in done.stderr
    assert "it is not called any more for" in done.stderr


def test_a_program_that_has_closed_its_manager_does_not_wait_again_at_its_end(tmp_path: Path) -> None:
    body = """
    import checkpointer.manager

    def tell(info):
        threading.Event().wait()

    checkpointer.manager.PATIENCE = 0.1
    with CheckpointManager(sys.argv[1], on_commit=tell, state={"a": 1}) as mgr:
        mgr.save(0)
    """
    done = script(tmp_path, body)
    assert done.stderr.count("has not returned within 100ms") == 1


def test_a_child_that_was_forked_beside_it_or_inside_it_calls_nothing_and_ends_at_once(tmp_path: Path) -> None:
    body = """
    def tell(info):
        if os.fork():
            os.wait()
            print("parent", info.step, flush=True)

    mgr = CheckpointManager(sys.argv[1], on_commit=tell, state={"a": 1})
    mgr.save(0)
    mgr.save(1)
    mgr.close()

    hangs = threading.Event()
    other = CheckpointManager(sys.argv[1] + "-2", on_commit=lambda info: hangs.wait(), state={"a": 1})
    other.save(0).result()
    if not os.fork():
        sys.exit(7)  # with atexit
    print("child ended with", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    hangs.set()
    other.close()
    """
    done = script(tmp_path, body)
    assert done.stdout.splitlines() == ["parent 0", "parent 1", "child ended with 7"]


def test_a_manager_that_is_dropped_while_it_runs_keeps_its_lock_until_it_returns(tmp_path: Path, gate: Gate) -> None:
    mgr = make(tmp_path, gate)
    saved(mgr, 0)
    gate.began()
    gone = weakref.ref(mgr)
    del mgr
    gc.collect()
    assert gone() is None
    with pytest.raises(RunLockedError):
        Repository(open_storage(tmp_path / "run")).lock.acquire()
    gate.open()
    until_idle()
    gc.collect()
    with make(tmp_path, print) as second:
        assert second.restore_latest().step == 0


def test_a_manager_that_its_own_callback_knows_can_be_collected(tmp_path: Path) -> None:
    known: list[CheckpointManager] = []
    mgr = make(tmp_path, lambda info: [mgr.pin(info) for mgr in known])
    known.append(mgr)
    saved(mgr, 0)
    until_idle(mgr)
    gone = weakref.ref(mgr)
    known.clear()
    del mgr
    gc.collect()
    assert gone() is None


def test_where_no_thread_can_be_started_close_makes_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(commit_callbacks, "room_for_a_thread", lambda: False)
    mgr = make(tmp_path, lambda info: seen.append((info.step, threading.current_thread() is threading.main_thread())))
    saved(mgr, 0)
    saved(mgr, 1)
    mgr.wait()
    assert seen == []
    mgr.close()
    assert seen == [(0, True), (1, True)]


def test_in_sync_mode_a_pruning_that_lags_behind_removes_nothing_that_it_was_not_called_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_all, pruning = threading.Event(), threading.Event()
    lists = Repository.list_checkpoints
    found: list[tuple[int, bool]] = []

    def late(repository: Repository) -> Any:
        if threading.current_thread().name.startswith("checkpointer-writer"):
            pruning.set()
            assert saved_all.wait(LONG)
        return lists(repository)

    mgr = make(tmp_path, lambda info: found.append((info.step, Path(info.path).exists())), "sync", keep={"last": 1})
    monkeypatch.setattr(Repository, "list_checkpoints", late)
    mgr.save(0)
    assert pruning.wait(LONG)  # it knows by now what has to stay
    mgr.save(1)
    mgr.save(2)
    saved_all.set()
    mgr.close()
    assert found == [(0, True), (1, True), (2, True)]
    assert steps(mgr) == [2]
