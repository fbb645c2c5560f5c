"""Preemption with real signals: a flag, one durable save, and the deadline after which the process is killed."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.system.signals import SignalFlag
from checkpointer.testing import Fault, faulty
from tests.conftest import Root
from tests.support import gate
from tests.support.forge import Forgery
from tests.support.training import Training, assert_at, at, make

MODES = ("sync", "async", "lazy")
FORK = multiprocessing.get_context("fork")
SLOW = {"mode": "async", "stall_seconds": 5.0, "write_seconds": 35.0}
"""A save that takes 48 s with the margin."""


def send(number: int = signal.SIGUSR1) -> None:
    """A signal to this very process."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """The handlers of a program that has some already; what they got."""
    got: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in numbers}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def config(mode: str = "async", **save: Any) -> dict[str, Any]:
    return {"save": {"every_n_steps": 1000, "on_signal": ["SIGUSR1"], **save}, "write": {"mode": mode}}


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ---------------------------------------------------------------------------------------------------- the flag


def test_a_signal_sets_a_flag_and_nothing_is_written_until_save_is_called(tmp_path, handlers):
    with CheckpointManager(tmp_path, config=config(), **make().components) as mgr:
        assert mgr.save(1) is None
        before = listing(tmp_path)
        send()
        time.sleep(0.05)
        assert (mgr.stop_requested(), mgr.should_stop()) == (True, False)
        assert listing(tmp_path) == before
        assert handlers == [signal.SIGUSR1]  # the one that was there is called as well
        assert mgr.should_save(2)
        mgr.save(2)
        assert mgr.should_stop()


def test_signals_that_are_not_configured_are_left_alone(tmp_path, handlers):
    with CheckpointManager(tmp_path, config=config(), **make().components) as mgr:
        send(signal.SIGUSR2)
        assert not mgr.stop_requested()
        assert handlers == [signal.SIGUSR2]


def test_a_reader_handles_no_signals(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with CheckpointManager(tmp_path, config=config(), read_only=True):
        assert signal.getsignal(signal.SIGUSR1) is before


def test_managers_may_be_closed_in_any_order(tmp_path, handlers):
    before = signal.getsignal(signal.SIGUSR1)
    first = CheckpointManager(tmp_path / "a", config=config())
    second = CheckpointManager(tmp_path / "b", config=config())
    first.close()
    send()
    assert (first.stop_requested(), second.stop_requested()) == (False, True)
    second.close()
    send()
    assert handlers == [signal.SIGUSR1] * 2
    send()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert len(handlers) == 3


def test_a_manager_that_was_dropped_catches_no_signals(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    mgr = CheckpointManager(tmp_path, config=config())
    assert signal.getsignal(signal.SIGUSR1) is not before
    del mgr
    gc.collect()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_manager_that_was_closed_in_another_thread_lets_signals_through(tmp_path, handlers):
    mgr = CheckpointManager(tmp_path, config=config())
    thread = threading.Thread(target=mgr.close)
    thread.start()
    thread.join()
    send()
    assert handlers == [signal.SIGUSR1]
    assert not mgr.stop_requested()


def _wait_for_ever(ready: Connection) -> None:
    ready.send("ready")
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize("managers", [1, 2])
def test_sigterm_ends_forked_children_as_ever(tmp_path, managers):
    """Python terminates its daemonic children at exit, and then waits for them: for ever, if they caught it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.ExitStack() as stack:
        for number in range(managers):
            mgr = CheckpointManager(tmp_path / str(number), config=config(on_signal="SIGTERM"))
            stack.enter_context(mgr)
        child, status = _child()
        child.terminate()
        child.join(10)
        alive = child.is_alive()
        child.kill()
        assert not alive
        assert child.exitcode == -signal.SIGTERM
        send(signal.SIGTERM)
        assert mgr.stop_requested()
    status.close()


def test_other_signals_do_not_end_forked_children_that_load_data(tmp_path):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with CheckpointManager(tmp_path, config=config()):
        child, status = _child()
        os.kill(child.pid, signal.SIGUSR1)  # as Slurm does, to every process of a step
        child.join(0.2)
        assert child.is_alive()
        child.kill()
        child.join()
    status.close()


def _child() -> tuple[Any, Connection]:
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=_wait_for_ever, args=(theirs,), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking a process with threads
        child.start()
    assert ours.poll(20)
    return child, ours


def test_an_interrupt_from_the_keyboard_asks_to_stop_and_ends_nothing(tmp_path):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with CheckpointManager(tmp_path, config=config(on_signal="SIGINT"), **make().components) as mgr:
        send(signal.SIGINT)
        mgr.save(1)
        assert mgr.should_stop()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


# --------------------------------------------------------------------------------------------- the forced save


@pytest.mark.parametrize("mode", MODES)
def test_the_save_after_a_signal_is_durable_before_save_returns(tmp_path, mode):
    """The process is killed by SIGKILL in the very next statement."""

    def train() -> None:
        run = make()
        mgr = CheckpointManager(tmp_path, config=config(mode), **run.components)
        for step in range(1000):
            run.step()
            if step == 6:
                send()
            mgr.save(step)
            if mgr.should_stop():
                os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=train)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    live = at(2, seed=5)
    with CheckpointManager(tmp_path, read_only=True, **live.components) as reader:
        assert reader.restore_latest().step == 6
        assert reader.verify().ok
    assert_at(live, 7)


@pytest.mark.parametrize("mode", MODES)
def test_the_save_after_a_signal_waits_for_no_copy(tmp_path, mode):
    with CheckpointManager(tmp_path, config=config(mode), **make().components) as mgr:
        send()
        info = mgr.save(1).result()
    assert info.statistics["mode"] == "sync"


@pytest.mark.parametrize("mode", MODES)
def test_more_signals_do_not_disturb_the_save(tmp_path, mode, handlers):
    run = make()
    with CheckpointManager(tmp_path, config=config(mode), big=torch.arange(1 << 20), **run.components) as mgr:
        ended = threading.Event()

        def storm() -> None:
            while not ended.is_set():
                send()
                time.sleep(0.0005)

        sender = threading.Thread(target=storm)
        sender.start()
        try:
            for step in range(5):
                run.step()
                mgr.save(step).result()
                assert mgr.should_stop() or step == 0
        finally:
            ended.set()
            sender.join()
        assert mgr.verify().ok
    assert len(handlers) > 5


def test_should_stop_waits_for_a_save_that_succeeds(tmp_path):
    root, fault = Root("local", str(tmp_path)), Fault(at=5, forever=True)
    fault.end()
    with faulty(fault), CheckpointManager(tmp_path, config=config(), **make().components) as mgr:
        assert mgr.save(1) is None  # it takes the lock
        send()
        fault.restart()
        with pytest.raises(SaveError, match="injected fault"):
            mgr.save(2)
        assert (mgr.stop_requested(), mgr.should_stop()) == (True, False)
        fault.end()
        mgr.save(3)
        assert mgr.should_stop()
    with CheckpointManager(root.url, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == [3]


def test_a_signal_while_a_save_is_in_flight_is_answered_by_a_new_one(tmp_path):
    run = make()
    with CheckpointManager(tmp_path, config=config(), **run.components) as mgr, gate.closed() as held:
        mgr.save(1, force=True)
        held.reached()
        run.step()
        send()
        threading.Timer(0.05, held.open).start()
        assert mgr.save(2).result().step == 2
        assert mgr.should_stop()
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == [1, 2]


def test_evaluation_and_warm_up_loops_can_ask_whether_to_stop(tmp_path):
    with CheckpointManager(tmp_path, config=config(), **make().components) as mgr:
        timer = threading.Timer(0.05, send)
        timer.start()
        while not mgr.stop_requested():
            time.sleep(0.001)
        assert not mgr.should_stop()


# ------------------------------------------------------------------------------------------------ the deadline


@contextlib.contextmanager
def resumed(root: Path, run: Training, **save: Any) -> Iterator[CheckpointManager]:
    """A manager that has restored a run whose saves took long."""
    with CheckpointManager(root, config=config("sync"), **run.components) as mgr:
        path = mgr.save(1000).result().path
    forgery = Forgery(path)
    forgery.manifest["statistics"].update(SLOW)
    forgery.write_manifest()
    with CheckpointManager(root, config=config(**save), **run.components) as mgr:
        mgr.restore_latest()
        yield mgr


def test_a_save_that_would_come_too_late_is_left_out_and_said_so_once(tmp_path):
    run = at(3)
    with resumed(tmp_path, run, deadline="30s") as mgr:
        before = listing(tmp_path)
        run.step()
        send()
        with pytest.warns(CheckpointerWarning, match=r"a save takes 48s, and 30s are left.*checkpoint-1000 remains"):
            assert mgr.save(1001) is None
        assert not mgr.should_save(1002)
        assert mgr.save(1002, force=True) is None  # training goes on, and is not told again
        assert (mgr.stop_requested(), mgr.should_stop()) == (True, False)
        assert listing(tmp_path) == before
    live = at(1, seed=9)
    with CheckpointManager(tmp_path, read_only=True, **live.components) as reader:
        assert reader.restore_latest().step == 1000
    assert_at(live, 3)


def test_a_save_that_is_in_time_is_made(tmp_path):
    with resumed(tmp_path, at(3), deadline="1min") as mgr:
        send()
        assert mgr.save(1001).result().step == 1001
        assert mgr.should_stop()


def test_without_a_deadline_the_cost_does_not_matter(tmp_path):
    with resumed(tmp_path, at(3)) as mgr:
        send()
        assert mgr.save(1001) is not None


def test_what_was_in_flight_counts_where_a_new_save_would_come_too_late(tmp_path):
    run = at(3)
    with resumed(tmp_path, run, deadline="30s") as mgr, gate.closed() as held:
        pending = mgr.save(1001, force=True)
        run.step()
        held.reached()
        send()
        threading.Timer(0.05, held.open).start()
        assert mgr.should_save(1002)
        handle = mgr.save(1002)
        assert (handle.step, handle.result()) == (1001, pending.result())
        assert mgr.should_stop()
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == [1000, 1001]


def test_what_was_committed_since_the_signal_counts_although_nobody_waited_for_it(tmp_path):
    with resumed(tmp_path, at(3), deadline="30s") as mgr, gate.closed() as held:
        pending = mgr.save(1001, force=True)
        held.reached()
        send()
        held.open()
        pending.result()
        assert mgr.save(1002).step == 1001
        assert mgr.should_stop()


def test_what_was_committed_before_the_signal_does_not_count(tmp_path):
    with resumed(tmp_path, at(3), deadline="30s") as mgr:
        mgr.save(1001, force=True).result()
        send()
        with pytest.warns(CheckpointerWarning, match="checkpoint-1001 remains"):
            assert mgr.save(1002) is None
        assert not mgr.should_stop()


def test_a_save_in_flight_that_fails_does_not_count_and_is_no_secret(tmp_path):
    reached, opened = threading.Event(), threading.Event()

    def fail_late() -> None:
        reached.set()
        assert opened.wait(gate.PATIENCE)
        raise OSError(errno.EIO, "injected fault")

    fault = Fault(on=["write"], instead=fail_late)
    fault.end()
    with faulty(fault), resumed(tmp_path, at(3), deadline="30s") as mgr:
        fault.restart()
        mgr.save(1001, force=True)
        assert reached.wait(gate.PATIENCE)
        send()
        threading.Timer(0.05, opened.set).start()
        with pytest.warns(CheckpointerWarning, match="1000 remains"), pytest.raises(SaveError, match="injected"):
            mgr.save(1002)
        assert not mgr.should_stop()
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert reader.verify().ok


def test_the_clock_starts_with_the_first_signal(tmp_path):
    flag = SignalFlag()
    flag.install(["SIGUSR1", "SIGUSR2"])
    send()
    first = flag.since
    time.sleep(0.01)
    send(signal.SIGUSR2)
    flag.restore()
    assert flag.since == first


def test_a_process_that_nobody_kills_saves_and_stops_after_all(tmp_path):
    with resumed(tmp_path, at(3), deadline="0.1s") as mgr:
        send()
        with pytest.warns(CheckpointerWarning, match="would not be durable"):
            assert mgr.save(1001) is None
        time.sleep(0.2)
        assert mgr.save(1002).result().step == 1002
        assert mgr.should_stop()
