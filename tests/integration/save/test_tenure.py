"""A second manager of the same run in one process: the cell of a notebook that runs again, and threads."""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from checkpointer import CheckpointManager, PendingSave
from checkpointer.errors import CheckpointerWarning, RunLockedError, SaveError, UnsupportedStateError
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, open_storage
from tests.support.ranks import run

TAKEN = (
    r"the manager made at \S+test_tenure\.py:\d+ has taken the run over from the manager made at \S+, which was idle"
)

CELL_1 = """
import torch
from checkpointer import CheckpointManager
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
mgr = CheckpointManager(root, config={"write": {"mode": mode}, "save": {"on_signal": ["SIGUSR1"]}}, model=model,
                        optimizer=optimizer)
mgr
"""

CELL_2 = """
restored = mgr.restore_latest()
start = restored.step + 1 if restored else 0
for step in range(start, 12):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    if step == fail_at:
        raise RuntimeError("the user's own")
    mgr.save(step, metrics={"loss": loss.item()})
mgr.wait()
"""


class Notebook:
    """Runs cells in one namespace, keeps what a cell shows, and the last traceback, as IPython does."""

    def __init__(self, **names: object) -> None:
        self.names: dict[str, Any] = dict(names)
        self.out: list[object] = []

    def run(self, cell: str) -> None:
        last = cell.strip().splitlines()[-1]
        try:
            exec(compile(cell, f"<cell {len(self.out)}>", "exec"), self.names)
        except RuntimeError as error:
            sys.last_value, sys.last_traceback = error, error.__traceback__
        self.names["_"] = self.names.get(last)
        self.out.append(self.names["_"])

    def weights(self) -> torch.Tensor:
        found: torch.Tensor = self.names["model"].weight.detach().clone()
        return found


@pytest.fixture(autouse=True)
def _no_last_traceback() -> Iterator[None]:
    yield
    for name in ("last_value", "last_traceback"):
        vars(sys).pop(name, None)


def manager(root: object, mode: str = "sync", **arguments: Any) -> CheckpointManager:
    config = {"write": {"mode": mode}, "require_resume": False, **arguments.pop("config", {})}
    return CheckpointManager(str(root), config=config, state={"tensor": torch.arange(4.0)}, **arguments)


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# --------------------------------------------------------------------------------------------------- notebook


@pytest.mark.parametrize("mode", ["sync", "async", "lazy"])
def test_cells_that_run_again_after_an_error_go_on_bit_for_bit(tmp_path, mode):
    whole = Notebook(root=str(tmp_path / "whole"), mode=mode, fail_at=None)
    whole.run(CELL_1)
    whole.run(CELL_2)
    book = Notebook(root=str(tmp_path / "run"), mode=mode, fail_at=5)
    book.run(CELL_1)
    book.run(CELL_2)
    assert isinstance(sys.last_value, RuntimeError)
    first = book.out[0]
    book.names["fail_at"] = None
    book.run(CELL_1)
    with pytest.warns(
        CheckpointerWarning, match=r"made at <cell 2>:7 has taken .* from the manager made at <cell 0>:7"
    ):
        book.run(CELL_2)
    assert book.names["start"] == 5
    assert torch.equal(book.weights(), whole.weights())
    assert isinstance(first, CheckpointManager)
    with pytest.raises(RunLockedError, match=r"the one made at <cell 2>:7 has taken over"):
        first.save(99)
    first.close()
    book.names["mgr"].save(12)
    book.names["mgr"].close()
    whole.names["mgr"].close()


def test_what_is_taken_over_loses_its_hooks_signal_handlers_memory_and_lock(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    signals = {"save": {"on_signal": ["SIGUSR1"]}}
    old = manager(tmp_path, "lazy", config=signals)
    old.save(0)
    old.wait()
    new = manager(tmp_path, "sync", config=signals)
    freed: list[object] = []
    free = old._saver._stager.close
    monkeypatch.setattr(old._saver._stager, "close", lambda: freed.append(free()))
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        new.restore_latest()
    assert len(freed) == 1
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks
    os.kill(os.getpid(), signal.SIGUSR1)
    assert new.stop_requested()
    assert not old.stop_requested()
    new.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    old.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_handlers_of_many_managers_that_were_taken_over_do_not_pile_up(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        for step in range(20):
            kept.append(manager(tmp_path, config={"save": {"on_signal": ["SIGUSR1"]}}))
            kept[-1].restore_latest()
            kept[-1].save(step, force=True)
    depth, handler = 0, signal.getsignal(signal.SIGUSR1)
    while handler != before:
        depth, handler = depth + 1, handler.__self__._earlier[signal.SIGUSR1]  # type: ignore[union-attr]
    assert depth <= 3
    kept[-1].close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_is_taken_over_never_takes_the_lock_back(tmp_path):
    old = manager(tmp_path)
    old.save(1)
    new = manager(tmp_path)
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        new.restore_latest()
    new.save(2)
    new.close()
    for call in (old.restore_latest, lambda: old.restore(1), lambda: old.save(3), old.prune):
        with pytest.raises(RunLockedError, match=r"made at \S+test_tenure\.py:\d+, writes no more: the one made at"):
            call()
    assert [info.step for info in old.checkpoints()] == [1, 2]
    old.pin(1)
    old.close()
    with manager(tmp_path) as third:
        third.restore_latest()


def test_the_save_in_flight_is_awaited_and_the_new_manager_finds_it(tmp_path):
    slow = threading.Event()
    old = manager(tmp_path, "async", on_commit=lambda _: slow.wait(20))
    handle = old.save(1)
    assert handle is not None
    new = manager(tmp_path, "async")
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        restored = new.restore_latest()
    assert handle.done()
    assert restored is not None
    assert restored.step == 1
    slow.set()
    new.close()
    old.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_what_on_commit_has_not_returned_for_stays_under_the_new_manager_too(tmp_path, dropped):
    release, called = threading.Event(), threading.Event()

    def upload(_: object) -> None:
        called.set()
        release.wait(20)

    old: CheckpointManager | None = manager(tmp_path, on_commit=upload)
    assert old is not None
    old.save(1)
    assert called.wait(20)
    new = manager(tmp_path, config={"keep": {"last": 1}})
    if dropped:
        old = None
        gc.collect()
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        assert new.restore_latest() is not None
    for step in (2, 3, 4):
        new.save(step)
    new.wait()
    new.prune()
    assert [info.step for info in new.checkpoints()] == [1, 4]
    release.set()
    if old is not None:
        old.close()
    for thread in threading.enumerate():
        if thread.name == "checkpointer-on-commit":
            thread.join(20)
    new.prune()
    assert [info.step for info in new.checkpoints()] == [4]
    new.close()


def test_an_error_of_the_old_managers_background_save_is_said_by_the_take_over(tmp_path, caplog, monkeypatch):
    old = manager(tmp_path, "async")
    old.save(1)
    old.wait()

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", fail)
        old.save(2)
        old._saver.settle()
    new = manager(tmp_path, "async")
    with (
        caplog.at_level(logging.ERROR, "checkpointer"),
        pytest.warns(CheckpointerWarning, match=r"had not reported yet: the save of step 2 .*the disk is gone"),
    ):
        restored = new.restore_latest()
    assert "the disk is gone" in caplog.text
    assert restored is not None
    assert restored.step == 1
    new.close()
    old.close()  # has nothing more to say


def test_a_take_over_under_warnings_that_are_errors_is_complete_and_said_by_the_next_call(tmp_path):
    old, new = manager(tmp_path), manager(tmp_path)
    old.save(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new.restore_latest() is not None
        with pytest.raises(CheckpointerWarning, match=TAKEN):
            new.save(2)
    assert [info.step for info in new.checkpoints()] == [1, 2]
    new.close()
    old.close()


@pytest.mark.parametrize("spelling", ["link", "relative", "file://", "dots"])
def test_the_same_root_by_another_spelling_is_taken_over_as_well(tmp_path, monkeypatch, spelling):
    root = tmp_path / "run"
    old = manager(root)
    old.save(1)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    other = {"link": "link", "relative": "run", "file://": f"file://{root}", "dots": f"{root}/../run"}[spelling]
    new = manager(other)
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        assert new.restore_latest() is not None
    new.close()
    old.close()


def test_a_root_in_memory_is_taken_over_by_each_of_its_spellings(tmp_path):
    name = f"{tmp_path.name}-{os.getpid()}"
    old = manager(f"memory://{name}")
    old.save(1)
    new = manager(f"memory:///{name}/")
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        assert new.restore_latest() is not None
    with pytest.raises(RunLockedError, match="writes no more"):
        old.save(2)
    new.close()
    old.close()


def test_other_roots_and_read_only_managers_are_never_involved(tmp_path):
    old = manager(tmp_path / "run")
    old.save(1)
    with manager(tmp_path / "other") as other, manager(tmp_path / "run", read_only=True) as reader:
        other.save(1)
        assert reader.restore_latest() is not None
        old.save(2)
    old.close()


# ------------------------------------------------------------------------------------------------- not idle


def test_a_manager_inside_its_with_block_is_not_taken_over_and_named(tmp_path):
    with manager(tmp_path) as outer:
        outer.save(1)
        with pytest.raises(RunLockedError, match=r"test_tenure\.py:\d+, in this process, and its with block has not"):
            manager(tmp_path).restore_latest()
        outer.save(2)


def test_a_manager_in_the_middle_of_a_call_is_not_taken_over(tmp_path):
    class Nested:
        def state_dict(self) -> dict[str, Any]:
            with pytest.raises(RunLockedError, match="one of its calls is running"):
                manager(tmp_path).save(7)
            return {"value": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        mgr = CheckpointManager(tmp_path, config={"write": {"mode": "sync"}}, nested=Nested())
        mgr.save(1)
        mgr.close()


def test_an_idle_manager_of_another_thread_is_not_taken_over_and_the_thread_is_named(tmp_path):
    mgr = manager(tmp_path)
    mgr.save(1)
    with pytest.raises(RunLockedError, match=r"belongs to another thread, 'MainThread': close it first .*, there"):
        in_a_thread(lambda: manager(tmp_path).save(2))
    mgr.save(2)
    mgr.close()


def test_a_thread_that_only_waits_for_a_manager_does_not_make_it_its_own(tmp_path):
    old = manager(tmp_path)
    old.save(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(old.wait).result()
        new = manager(tmp_path)
        with pytest.warns(CheckpointerWarning, match=TAKEN):
            assert new.restore_latest() is not None
    new.close()
    old.close()


def test_the_manager_of_a_thread_that_has_ended_is_taken_over(tmp_path):
    kept = []

    def work() -> None:
        kept.append(manager(tmp_path))
        kept[0].save(1)

    in_a_thread(work)
    new = manager(tmp_path)
    with pytest.warns(CheckpointerWarning, match=TAKEN):
        assert new.restore_latest() is not None
    new.close()


def test_what_holds_the_lock_without_a_manager_is_named_and_not_taken_over(tmp_path):
    repository = Repository(open_storage(tmp_path))
    repository.lock.acquire("an import")
    with pytest.raises(RunLockedError, match=r"That is this process: an import\. Close it, or let it end, first"):
        manager(tmp_path).restore_latest()
    repository.lock.release()
    mgr = manager(tmp_path)
    mgr.restore_latest()
    with pytest.raises(
        RunLockedError, match=r"That is this process: the manager made at \S+test_tenure\.py:\d+\. Close"
    ):
        repository.lock.acquire("an import")
    mgr.close()


def test_a_manager_whose_close_failed_is_in_nobodys_way(tmp_path, monkeypatch):
    old = manager(tmp_path, "async")
    old.save(1)
    old.wait()

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", fail)
        old.save(2)
        with pytest.raises(SaveError, match="the disk is gone"):
            old.close()
    with manager(tmp_path) as new:
        assert new.restore_latest() is not None


def test_a_forked_child_takes_nothing_over(tmp_path):
    mgr = manager(tmp_path)
    mgr.save(1)

    def child() -> None:
        try:
            manager(tmp_path).restore_latest()
        except RunLockedError:
            os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    mgr.save(2)
    mgr.close()


# ---------------------------------------------------------------------------------------------------- threads


def test_two_threads_that_make_the_first_save_of_one_manager_take_turns(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        for attempt in range(50):
            mgr, barrier = manager(tmp_path / str(attempt)), threading.Barrier(2)

            def save(mgr: CheckpointManager = mgr, barrier: threading.Barrier = barrier) -> PendingSave | None:
                barrier.wait()
                return mgr.save(1)

            handles = [future.result() for future in [pool.submit(save), pool.submit(save)]]
            assert sorted(handle is None for handle in handles) == [False, True]
            mgr.close()
            with manager(tmp_path / str(attempt), read_only=True) as reader:
                assert [info.step for info in reader.checkpoints()] == [1]
                assert reader.verify().ok


def test_a_thread_that_waits_does_not_keep_another_from_saving(tmp_path):
    mgr = manager(tmp_path, "async")
    with ThreadPoolExecutor(1) as pool:
        for step in range(1, 20):
            mgr.save(step)
            pool.submit(mgr.wait)
    mgr.close()
    with manager(tmp_path, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == list(range(1, 20))


def test_on_commit_that_calls_save_is_told_so_while_close_waits_for_it(tmp_path):
    closing, told = threading.Event(), []

    def callback(_: object) -> None:
        closing.wait(20)
        try:
            mgr.save(2)
        except SaveError as error:
            told.append(str(error))

    mgr = manager(tmp_path, on_commit=callback)
    mgr.save(1)
    threading.Timer(0.2, closing.set).start()
    mgr.close()
    assert len(told) == 1


# ----------------------------------------------------------------------------------------------------- copies


def test_two_ranks_that_make_a_new_manager_take_over_together(tmp_path):
    run(2, _two_ranks, str(tmp_path))


def _two_ranks(tmp_path: str) -> None:
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    old = manager(tmp_path, "lazy")
    old.save(1)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks + 1
    new = manager(tmp_path, "sync")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointerWarning)
        restored = new.restore_latest()
    assert restored is not None
    assert restored.step == 1
    assert any("has taken the run over" in str(warning.message) for warning in caught)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks
    new.save(2)
    for call in (old.restore_latest, lambda: old.save(3)):
        with pytest.raises(RunLockedError, match="writes no more"):
            call()
    new.save(3)
    new.close()
    old.close()
    assert [info.step for info in new.checkpoints()] == [1, 2, 3]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps, lambda mgr: pickle.dumps(mgr, protocol=0)])
def test_a_manager_and_a_handle_are_neither_copied_nor_pickled_and_say_what_to_do(tmp_path, make):
    with manager(tmp_path) as mgr:
        handle = mgr.save(1)
        with pytest.raises(UnsupportedStateError, match=r"cannot be copied or pickled.* make one of .*read_only=True"):
            make(mgr)
        with pytest.raises(UnsupportedStateError, match=r"cannot be copied or pickled.*pass handle\.result\(\)"):
            make(handle)


def test_a_manager_in_what_is_sent_to_a_spawned_process_says_what_to_do(tmp_path):
    with manager(tmp_path) as mgr:
        process = multiprocessing.get_context("spawn").Process(target=print, args=({"manager": mgr},))
        with pytest.raises(TypeError, match="in a process of multiprocessing, too"):
            process.start()
