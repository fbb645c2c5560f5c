"""Storages that fail on command do so as they say; a manager on one raises a typed error, and goes on after it."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from checkpointer import CheckpointManager, PendingSave, testing
from checkpointer.errors import CheckpointerError, CheckpointerWarning, ConfigError, SaveError
from checkpointer.format import paths
from checkpointer.storage import Storage, open_storage
from checkpointer.testing import OPERATIONS, Fault, Kind, faulty, faulty_storage
from tests.campaign.crash.test_storage_faults import expected_files, files_of
from tests.conftest import Root

MODES = ("sync", "async", "lazy")
ERRORS = ("EIO", "ENOSPC", "EACCES", "EMFILE")
PATIENCE = 20
"""Seconds. Only a bug takes that long."""


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest) -> Root:
    made: Root = request.getfixturevalue(request.param)
    return made


def storage_of(place: Root) -> Storage:
    return open_storage(place.url, place.options, durable=False)


def under(place: Root, fault: Fault) -> Storage:
    return faulty_storage(storage_of(place), fault)


# --------------------------------------------------------------------------------------------- what each kind does


def test_the_operations_are_those_of_a_storage():
    asked = {name for name in vars(Storage) if callable(getattr(Storage, name)) and not name.startswith("_")}
    assert set(OPERATIONS) - {"read_into"} == asked - {"place", "redact", "obstacle"}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_operation_that_fails_has_done_nothing_and_the_next_one_works(place, kind):
    storage = under(place, Fault(kind, on=["put"], at=2))
    storage.put("a", b"1")
    with pytest.raises(OSError, match=f"injected fault: {kind}"):
        storage.put("b", b"2")
    assert not storage_of(place).exists("b")
    storage.put("b", b"2")
    assert storage_of(place).read("b", 10) == b"2"


def test_a_lost_answer_is_an_error_after_the_operation_was_carried_out(place):
    storage = under(place, Fault("EIO", on=["put"], after=True))
    with pytest.raises(OSError, match="injected fault"):
        storage.put("a", b"1")
    assert storage_of(place).read("a", 10) == b"1"


def test_what_fails_for_ever_fails_until_its_end(place):
    fault = Fault("EIO", on=["put"], at=2, forever=True)
    storage = under(place, fault)
    storage.put("a", b"1")
    for _ in range(3):
        with pytest.raises(OSError, match="injected fault"):
            storage.put("b", b"2")
    fault.end()
    storage.put("b", b"2")
    assert (fault.hits, len(fault.operations)) == (3, 5)


def test_only_matching_paths_count(place):
    fault = Fault("EIO", path="*.json")
    storage = under(place, fault)
    storage.put("a.txt", b"1")
    with pytest.raises(OSError, match="injected fault"):
        storage.put("a.json", b"1")


def test_operations_that_others_use_fail_too(local):
    fault = Fault("EIO", on=["write"])
    with pytest.raises(OSError, match="injected fault"):
        under(local, fault).put("a", b"1")  # which writes a file beside it first
    assert fault.operations[0].startswith("write(.a.")


def test_reading_from_an_open_file_fails_too(place):
    storage_of(place).put("a", b"123")
    file = under(place, Fault("EIO", on=["read_into"], at=2)).open("a")
    view = memoryview(bytearray(3))
    file.read_into(0, view)
    with pytest.raises(OSError, match="injected fault"):
        file.read_many(0, [view])
    file.read_many(0, [view])
    assert bytes(view) == b"123"


def test_a_short_write_leaves_half_a_file_where_files_are_written_in_place(local):
    with pytest.raises(OSError, match="ENOSPC"):
        under(local, Fault("short write")).write("a", [b"12", b"3456"], 6)
    assert storage_of(local).read("a", 10) == b"123"


def test_an_error_at_close_comes_after_all_bytes(local):
    with pytest.raises(OSError, match="EIO"):
        under(local, Fault("close")).write("a", [b"12", b"3456"], 6)
    assert storage_of(local).read("a", 10) == b"123456"


def test_after_a_failed_fsync_the_bytes_are_lost_and_the_next_one_says_that_all_is_well(place):
    storage = under(place, Fault("fsync", on=["write", "sync"]))
    with pytest.raises(OSError, match="EIO"):
        storage.write("a", [b"123"], 3)
    storage.sync("")
    assert storage_of(place).read("a", 10) == b"\0\0\0"


def test_a_vanished_file_is_back_the_next_time(place):
    real = storage_of(place)
    real.put("a", b"1")
    for ask in ("read", "open"):
        with pytest.raises(FileNotFoundError):
            getattr(under(place, Fault("vanished", on=[ask])), ask)(*("a", 10)[: 2 if ask == "read" else 1])
    storage = under(place, Fault("vanished", on=["exists", "age", "read_many"], at=1, forever=True))
    assert not storage.exists("a")
    assert storage.age("a") is None
    assert [type(item) for item in storage.read_many(["a"], 10)] == [FileNotFoundError]
    assert real.read("a", 10) == b"1"


def test_a_stale_listing_is_the_first_one(place):
    storage = under(place, Fault("stale listing", at=2))
    storage.put("d/a", b"1")
    assert [entry.name for entry in storage.list_directory("d")] == ["a"]
    storage.put("d/b", b"1")
    assert [entry.name for entry in storage.list_directory("d")] == ["a"]
    assert {entry.name for entry in storage.list_directory("d")} == {"a", "b"}


def test_a_slow_storage_takes_its_time(local):
    storage = under(local, Fault("slow", seconds=0.05))
    began = time.monotonic()
    storage.write("a", [bytes(140_000)], 140_000)
    assert time.monotonic() - began >= 0.15  # three blocks of 64 KiB


@pytest.mark.parametrize("wrong", [{"kind": "EXXX"}, {"on": ["writ"]}])
def test_a_fault_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"EXXX.*EIO|writ'.*write"):
        Fault(**wrong)


def test_only_managers_made_inside_are_concerned(local):
    fault = Fault("EIO", forever=True)
    with faulty(fault):
        pass
    with CheckpointManager(local.url, state={"a": 1}) as mgr:
        assert mgr.save(1).result().step == 1
    assert not fault.operations


def test_the_example_runs(tmp_path):
    text = testing.faults.__doc__
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"model": torch.nn.Linear(2, 2), "pytest": pytest, "SaveError": SaveError}
    exec(compile(code, "example", "exec"), names)
    names["test_a_full_disk_does_not_stop_training"](tmp_path)


# ------------------------------------------------------------------------------------------ what becomes of a manager


def training(place: Root, mode: str, **keep: Any) -> tuple[CheckpointManager, torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {"write": {"mode": mode, "durable": False}, "keep": keep}
    made = CheckpointManager(place.url, config=config, storage_options=place.options, model=model, optimizer=optimizer)
    return made, model, optimizer


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


def errors_of(mgr: CheckpointManager, step: int, train: Any) -> list[CheckpointerError]:
    """What this call of ``save`` raises, and what those after it raise."""
    found = []
    for number in (step, step + 1):
        train()
        try:
            mgr.save(number)
        except CheckpointerError as error:
            found.append(error)
    try:
        mgr.wait()
    except CheckpointerError as error:
        found.append(error)
    return found


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind not in ("slow", "hang", "vanished")][:-1])
@pytest.mark.parametrize("mode", MODES)
def test_each_error_reaches_the_loop_as_a_save_error_and_saving_goes_on_when_its_cause_is_gone(place, mode, kind):
    fault = Fault(kind, on=["write"], path="*.safetensors", forever=True)
    fault.end()
    with faulty(fault):
        mgr, model, optimizer = training(place, mode, last=2)
    train = lambda: learn(model, optimizer)
    with mgr:
        train()
        assert mgr.save(1).result().step == 1
        fault.restart()
        errors = errors_of(mgr, 2, train)
        assert errors
        assert {type(error) for error in errors} == {SaveError}
        assert "Earlier checkpoints are untouched" in str(errors[0])
        assert [info.step for info in mgr.checkpoints()] == [1]
        assert mgr.verify().ok
        fault.end()
        train()
        assert mgr.save(4).result().step == 4
        assert [info.step for info in mgr.checkpoints()] == [1, 4]
        assert mgr.verify().ok
    assert files_of(place) <= expected_files(place) | probes(place)


def probes(place: Root) -> set[str]:
    """What asks an object store for its abilities, and the run's history."""
    return {path for path in files_of(place) if "/tmp/probe-" in path or path.startswith(f"{paths.JOURNAL}/")}


@pytest.mark.timeout(600)  # with --thorough
@pytest.mark.parametrize("mode", MODES)
def test_what_a_failed_save_could_not_remove_goes_before_the_next_save_of_the_same_process(place, stride, mode):
    for at in itertools.count(1, stride):
        fault = Fault("EIO", at=at, forever=True)
        fault.end()
        with silenced(), faulty(fault):
            mgr, model, optimizer = training(place, mode, last=1)
            with mgr:
                restored = mgr.restore_latest()
                step = restored.step if restored else 0
                save_and_wait(mgr, step + 1)
                fault.restart()
                with contextlib.suppress(CheckpointerError):
                    save_and_wait(mgr, step + 2)
                fault.end()
                for later in (step + 3, step + 4):
                    learn(model, optimizer)
                    save_and_wait(mgr, later)
        left = files_of(place) - expected_files(place) - probes(place)
        assert not left, f"at {at}: {fault.operations}"
        if not fault.hits:
            return


def save_and_wait(mgr: CheckpointManager, step: int) -> None:
    """Also until it is pruned."""
    handle = mgr.save(step)
    handle.result()
    mgr._saver.wait()


@pytest.mark.parametrize("mode", ["async", "lazy"])
def test_a_hanging_storage_does_not_hold_training_and_its_save_is_committed_once_it_goes_on(place, mode):
    fault = Fault("hang", on=["write"], path="*.safetensors")
    with faulty(fault):
        mgr, model, optimizer = training(place, mode)
    with mgr:
        handle = mgr.save(1)
        assert fault.hanging(PATIENCE)
        for _ in range(3):
            learn(model, optimizer)
        with pytest.raises(TimeoutError, match="is still being written"):
            handle.result(timeout=0.01)
        assert not handle.done()
        fault.release()
        assert handle.result(PATIENCE).step == 1
        assert mgr.verify().ok


def test_a_save_that_follows_one_that_hangs_waits_for_it(local):
    fault = Fault("hang", on=["write"], path="*.safetensors")
    with faulty(fault):
        mgr, model, optimizer = training(local, "async")
    with mgr:
        mgr.save(1)
        assert fault.hanging(PATIENCE)
        learn(model, optimizer)
        threading.Timer(0.1, fault.release).start()
        second: PendingSave = mgr.save(2)
        assert second.result(PATIENCE).step == 2
        assert [info.step for info in mgr.checkpoints()] == [1, 2]
