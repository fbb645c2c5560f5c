"""Memory for staged state with processes and managers: invisible to children, given back, and saves that find none."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError
from checkpointer.staging import arena
from checkpointer.system.memory import Region
from tests.support import gate, processes
from tests.support.compare import assert_identical

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own bookkeeping")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def read(address: int) -> None:
    """Without the traceback of a crash that is expected."""
    faulthandler.disable()
    ctypes.string_at(address, 1)


@forks
@linux
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_that_reads_a_region_is_killed_and_the_parent_keeps_it():
    region = Region(1 << 20)
    region.view[0] = 1
    child = multiprocessing.get_context("fork").Process(target=read, args=(region.address,))
    child.start()
    child.join(60)
    assert child.exitcode == -11
    assert region.view[0] == 1


# -------------------------------------------------------------------------------------------------- with a manager


def make(size: int) -> dict[str, Any]:
    return {"state": {"tensor": torch.arange(size, dtype=torch.float32)}}


def test_saves_of_the_same_state_use_the_same_memory_and_close_gives_it_back(tmp_path, monkeypatch):
    regions: list[weakref.ref[Region]] = []

    class Watched(Region):
        def __init__(self, size: int, **options: bool) -> None:
            super().__init__(size, **options)
            regions.append(weakref.ref(self))

    monkeypatch.setattr(arena, "Region", Watched)
    mgr = CheckpointManager(tmp_path, **make(1 << 20))
    for step in range(4):
        mgr.save(step).result()
    (region,) = regions
    assert region() is not None
    mgr.close()
    assert region() is None


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_a_save_that_finds_no_memory_is_a_typed_error_and_the_next_one_works(tmp_path, monkeypatch, error):
    def fail(size: int, **options: bool) -> Region:
        raise error

    with CheckpointManager(tmp_path, **make(1 << 20)) as mgr:
        with monkeypatch.context() as patch:
            patch.setattr(arena, "Region", fail)
            with pytest.raises(CheckpointerError, match="memory"):
                mgr.save(1)
        assert mgr.save(2).result().step == 2


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle_of_a_save_changes_nothing(tmp_path):
    components = make(1 << 20)
    expected = components["state"]["tensor"].clone()
    with CheckpointManager(tmp_path, **components) as mgr, gate.closed() as held:
        handle = mgr.save(1)
        held.reached()
        child = multiprocessing.get_context("fork").Process(target=components["state"]["tensor"].zero_)
        child.start()
        components["state"]["tensor"].zero_()
        held.open()
        handle.result()
        child.join(60)
        assert child.exitcode == 0
        mgr.restore(1)
    assert_identical(components["state"]["tensor"], expected)


EXIT = """
import sys, time, torch
from checkpointer import CheckpointManager
from checkpointer.storage import LocalStorage

real = LocalStorage.write
def slow(storage, path, pieces, size, **keywords):
    def held():
        for piece in pieces:
            time.sleep(0.05)
            yield piece
    return real(storage, path, held(), size, **keywords)
LocalStorage.write = slow

torch.manual_seed(0)
model = torch.nn.Linear(1000, 1000)
parts = {"model": model}
if sys.argv[2] == "lazy":
    parts["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
mgr = CheckpointManager(sys.argv[1], config={"write": {"mode": sys.argv[2]}}, **parts)
mgr.save(1)
if sys.argv[3] == "error":
    raise ZeroDivisionError
"""


@pytest.mark.parametrize("mode, how", [("async", "end"), ("lazy", "error")])
def test_a_script_that_ends_in_the_middle_of_a_save_commits_it(tmp_path, mode, how):
    command = [sys.executable, "-c", EXIT, str(tmp_path), mode, how]
    done = processes.run(command)
    assert done.returncode == (1 if how == "error" else 0), done.stderr
    torch.manual_seed(0)
    expected = torch.nn.Linear(1000, 1000)
    model = torch.nn.Linear(1000, 1000)
    with CheckpointManager(tmp_path, read_only=True, model=model) as mgr:
        assert mgr.verify().ok
        mgr.restore(1, components=["model"])
    assert_identical(dict(model.state_dict()), dict(expected.state_dict()))


AT_EXIT = """
import atexit, sys, torch
from checkpointer import CheckpointManager

mgr = CheckpointManager(sys.argv[1], config={"write": {"mode": sys.argv[2]}}, state={"tensor": torch.ones(1 << 20)})

def last():
    for step in range(2):
        print(mgr.save(step).result().step)
    mgr.close()

atexit.register(last)
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_saves_from_an_exit_handler_are_committed_though_no_thread_can_be_started(tmp_path, mode):
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path), mode]
    done = processes.run(command, check=True)
    assert done.stdout.split() == ["0", "1"], done.stderr


def test_where_the_writer_cannot_be_started_the_save_is_written_once_before_save_returns(tmp_path, monkeypatch):
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with CheckpointManager(tmp_path, **make(1 << 20)) as mgr:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            handle = mgr.save(1)
            assert handle.done()
        mgr.save(2).result()
        mgr.wait()
        assert [info.step for info in mgr.checkpoints()] == [1, 2]
        assert mgr.verify().ok
