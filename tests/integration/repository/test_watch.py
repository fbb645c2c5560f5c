"""Following a run: each checkpoint once, in order, whatever the trainer prunes meanwhile, and until told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, ConfigError, SaveError
from checkpointer.repository.notes import Note
from checkpointer.repository.repository import Repository
from checkpointer.repository.watch import WHOLE_LOOK_EVERY
from checkpointer.storage import LocalStorage, open_storage
from tests.conftest import Root
from tests.support import processes
from tests.support.processes import Process

REPOSITORY = Path(__file__).resolve().parents[3]
SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
POLL = 0.01


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)  # stores without a lock say so
        yield


def trainer(root: Root, **config: Any) -> CheckpointManager:
    return CheckpointManager(
        root.url, storage_options=root.options, config={**SYNC, **config}, state={"t": torch.ones(3)}
    )


def repository_of(root: Root) -> Repository:
    """What another process would do to the run, with no manager between."""
    return Repository(open_storage(root.url, root.options))


def evaluator(root: Root) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, read_only=True, state={"t": torch.zeros(3)})


def steps(watched: Iterator[CheckpointInfo]) -> list[int]:
    return [info.step for info in watched]


# ---------------------------------------------------------------------------------------------- what it yields


def test_those_that_are_there_come_first_then_the_new_ones_each_once(root: Root) -> None:
    with trainer(root) as mgr:
        for step in (1, 2):
            mgr.save(step)
        watched = evaluator(root).watch(poll=POLL, timeout=60)
        seen = [next(watched).step, next(watched).step]
        mgr.save(3)
        mgr.save(4)
        seen += [next(watched).step, next(watched).step]
    assert seen == [1, 2, 3, 4]


def test_since_leaves_out_what_was_committed_before(root: Root) -> None:
    reader = evaluator(root)
    with trainer(root) as mgr:
        for step in (1, 2, 3):
            mgr.save(step)
    everything = reader.checkpoints()
    assert steps(reader.watch(since=everything[0], timeout=0)) == [2, 3]
    assert steps(reader.watch(since=reader.latest(), timeout=0)) == []
    assert steps(reader.watch(timeout=0)) == [1, 2, 3]


def test_a_run_that_has_not_begun_can_be_watched(root: Root) -> None:
    watched = evaluator(root).watch(poll=POLL, timeout=60)
    thread = threading.Timer(0.2, lambda: trainer(root).save(5))
    thread.start()
    assert next(watched).step == 5
    thread.join()


def test_a_checkpoint_that_was_replaced_under_its_name_is_a_new_one(root: Root) -> None:
    with trainer(root) as mgr:
        mgr.save(1)
        watched = evaluator(root).watch(poll=POLL, timeout=60)
        first = next(watched)
        mgr.save(1, overwrite=True)
        second = next(watched)
    assert (first.step, second.step) == (1, 1)
    assert first.id != second.id


def test_what_was_pruned_before_its_turn_is_passed_over(root: Root) -> None:
    with trainer(root) as mgr:
        for step in (1, 2, 3):
            mgr.save(step)
        watched = evaluator(root).watch(poll=POLL, timeout=0)
        assert next(watched).step == 1
        for info in mgr.checkpoints()[:2]:
            repository_of(root).remove(info)
        assert steps(watched) == [3]


def test_what_vanishes_in_the_hands_of_the_consumer_is_not_found_and_the_watch_goes_on(root: Root) -> None:
    reader = evaluator(root)
    with trainer(root) as mgr:
        mgr.save(1)
        mgr.save(2)
        watched = reader.watch(poll=POLL, timeout=0)
        info = next(watched)
        repository_of(root).remove(info)
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 1"):
            reader.restore(info.step)
        assert steps(watched) == [2]


def test_what_is_known_to_be_damaged_is_passed_over(root: Root) -> None:
    with trainer(root) as mgr:
        mgr.save(1)
        mgr.save(2)
        repository_of(root).note(mgr.checkpoints()[0], Note(damaged="a flipped bit"))
    assert steps(evaluator(root).watch(timeout=0)) == [2]


def test_one_that_is_back_because_it_was_pinned_is_not_yielded_again(local: Root) -> None:
    with trainer(local) as mgr:
        mgr.save(1)
        mgr.save(2)
        watched = evaluator(local).watch(poll=POLL, timeout=0.3)
        assert [next(watched).step, next(watched).step] == [1, 2]
        os.rename(Path(local.url, "checkpoint-1"), Path(local.url, "gone"))
        mgr.save(3)
        assert next(watched).step == 3
        os.rename(Path(local.url, "gone"), Path(local.url, "checkpoint-1"))
        assert steps(watched) == []


# -------------------------------------------------------------------------------------------------- what it costs


def test_a_look_that_finds_nothing_new_is_one_listing_and_reads_no_checkpoint(local: Root) -> None:
    with trainer(local) as mgr:
        for step in range(5):
            mgr.save(step)
    os.mkdir(Path(local.url, "checkpoint-99"))  # what is being uploaded to an object store looks like this
    operations: list[tuple[str, Any]] = []
    stop = threading.Event()

    def recorded(name: str) -> Any:
        real = getattr(LocalStorage, name)

        def operation(self: LocalStorage, *arguments: Any) -> Any:
            operations.append((name, arguments[0]))
            return real(self, *arguments)

        return mock.patch.object(LocalStorage, name, operation)

    reader = evaluator(local)
    watched = reader.watch(poll=POLL, stop=stop.is_set)
    for _ in range(5):
        next(watched)
    listed = LocalStorage.list_directory

    def counting(self: LocalStorage, path: str) -> Any:
        if operations.count(("list_directory", "")) == WHOLE_LOOK_EVERY - 3:
            stop.set()
        operations.append(("list_directory", path))
        return listed(self, path)

    with mock.patch.object(LocalStorage, "list_directory", counting), recorded("read"), recorded("read_many"):
        assert steps(watched) == []
    assert set(map(str, operations)) == {
        "('list_directory', '')",
        "('read_many', ['checkpoint-99/manifest.json'])",
        "('read', 'checkpoint-99/manifest.json')",
    }


def test_a_look_that_fails_is_tried_again_and_said_once(local: Root, caplog: pytest.LogCaptureFixture) -> None:
    with trainer(local) as mgr:
        mgr.save(1)
        watched = evaluator(local).watch(poll=POLL, timeout=60)
        assert next(watched).step == 1
        mgr.save(2)
        listed = LocalStorage.list_directory
        failures = iter([OSError(5, "the network is gone")] * 3)

        def failing(self: LocalStorage, path: str) -> Any:
            error = next(failures, None)
            if error is not None:
                raise error
            return listed(self, path)

        with mock.patch.object(LocalStorage, "list_directory", failing):
            assert next(watched).step == 2
    assert caplog.text.count("the network is gone") == 1


def test_a_first_look_that_fails_is_an_error(local: Root) -> None:
    gone = mock.patch.object(LocalStorage, "list_directory", side_effect=OSError(5, "the network is gone"))
    with gone, pytest.raises(OSError, match="the network is gone"):
        next(evaluator(local).watch(poll=POLL))


# ------------------------------------------------------------------------------------------------- how it ends


def ends(watched: Iterator[CheckpointInfo]) -> threading.Thread:
    """A thread that follows to the end."""
    thread = threading.Thread(target=lambda: list(watched), daemon=True)
    thread.start()
    return thread


def test_it_ends_when_another_thread_says_so(local: Root) -> None:
    stop = threading.Event()
    thread = ends(evaluator(local).watch(poll=3600, stop=stop.is_set))
    time.sleep(0.3)
    assert thread.is_alive()
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_it_ends_when_its_manager_is_closed(local: Root) -> None:
    reader = evaluator(local)
    thread = ends(reader.watch(poll=3600))
    time.sleep(0.3)
    assert thread.is_alive()
    reader.close()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(SaveError, match="closed"):
        reader.watch()


def test_it_ends_by_a_signal_whose_handler_sets_an_event(local: Root) -> None:
    stop = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda *_: stop.set())
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        assert steps(evaluator(local).watch(poll=3600, stop=stop.is_set)) == []
    finally:
        signal.signal(signal.SIGUSR2, before)
        timer.join()


def test_it_ends_when_nothing_new_has_come_for_the_timeout(local: Root) -> None:
    began = time.monotonic()
    assert steps(evaluator(local).watch(poll=3600, timeout=0.3)) == []
    assert time.monotonic() - began >= 0.3


def test_what_is_committed_while_it_waits_for_the_last_time_is_not_missed(local: Root) -> None:
    timer = threading.Timer(0.2, lambda: trainer(local).save(1))
    timer.start()
    assert steps(evaluator(local).watch(poll=3600, timeout=2)) == [1]
    timer.join()


@pytest.mark.parametrize("keywords", [{"poll": 0}, {"poll": "10s"}, {"poll": True}, {"timeout": -1}])
def test_nonsense_is_refused_at_the_call(local: Root, keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be a number of seconds"):
        evaluator(local).watch(**keywords)


# --------------------------------------------------------------------------------------------- real processes

EVALUATOR = """
import json, sys, torch
from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointNotFoundError
sys.path.insert(0, ".")
from tests.support import training
live = training.make(seed=5)
found = {"once": [], "exact": 0, "gone": 0}
with CheckpointManager(sys.argv[1], read_only=True, **live.components) as mgr:
    print("ready", flush=True)
    for info in mgr.watch(poll=0.01, timeout=60):
        found["once"].append(info.id)
        try:
            restored = mgr.restore(info.step, components=[*live.components, "rng"])
        except CheckpointNotFoundError:
            found["gone"] += 1
        else:
            training.assert_at(live, restored.step)
            found["exact"] += 1
        if info.step == 60:
            break
print(json.dumps(found))
"""


def test_two_evaluators_beside_a_trainer_that_prunes_see_each_checkpoint_once_and_bit_exact(tmp_path: Path) -> None:
    from tests.support import training

    command = [sys.executable, "-W", "ignore", "-c", EVALUATOR, str(tmp_path / "run")]
    evaluators = [Process(command) for _ in range(2)]
    try:
        for process in evaluators:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        live = training.make()
        config = {"keep": {"last": 2}, "write": {"durable": False}}
        with CheckpointManager(tmp_path / "run", config=config, **live.components) as mgr:
            for step in range(1, 61):
                live.step()
                mgr.save(step)
        for process in evaluators:
            found = json.loads(process.communicate(timeout=120)[0])
            assert process.returncode == 0
            assert len(set(found["once"])) == len(found["once"]) == found["exact"] + found["gone"]
            assert found["exact"] >= 1  # the last one stays, whatever was pruned
    finally:
        for process in evaluators:
            process.kill()
            process.wait()


PRUNE = [sys.executable, "-m", "checkpointer", "prune"]


def test_a_prune_from_the_command_line_during_a_save_is_refused_by_name_and_harms_nothing(tmp_path: Path) -> None:
    policy = tmp_path / "keep.yaml"
    policy.write_text("keep:\n  last: 1\n")
    with CheckpointManager(tmp_path / "run", state=torch.ones(4_000_000)) as mgr:
        for step in range(3):
            handle = mgr.save(step)
        command = [*PRUNE, str(tmp_path / "run"), "--config", str(policy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert done.returncode == 1
        assert f"pid {os.getpid()}" in done.stderr
        assert "'checkpointer prune --dry-run' needs no lock" in done.stderr
        assert handle is not None
        handle.result(60)
        assert [info.step for info in mgr.checkpoints()] == [0, 1, 2]
        assert mgr.verify().ok
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, [info.step for info in mgr.checkpoints()]) == (0, [2])


ENDINGS = """
import gc, os, sys, warnings, torch
from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
mode, root = sys.argv[1:3]
state = torch.ones(8_000_000)
mgr = CheckpointManager(root, config={"write": {"mode": mode}}, state=state)
mgr.restore_latest()
"""


def run_to_the_end(program: str, mode: str, root: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which ends by itself: a deadlock would be a timeout."""
    code = ENDINGS + textwrap.dedent(program)
    command = [sys.executable, "-c", code, mode, str(root)]
    return processes.run(command)


@pytest.mark.parametrize("mode", ["async", "lazy"])
def test_a_fork_during_a_save_neither_hangs_the_child_nor_tears_the_save(tmp_path: Path, mode: str) -> None:
    done = run_to_the_end(
        """
        children = []
        for step in range(4):
            mgr.save(step)
            child = os.fork()
            if child == 0:
                try:
                    mgr.save(99)
                except SaveError as error:
                    refused = "forked child" in str(error)
                mgr.close()
                del mgr
                gc.collect()
                os._exit(0 if refused else 1)
            children.append(child)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        mgr.close()
        """,
        mode,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    reader = CheckpointManager(tmp_path, read_only=True)
    assert [info.step for info in reader.checkpoints()] == [0, 1, 2, 3]
    assert reader.verify().ok


@pytest.mark.parametrize("mode", ["async", "lazy"])
@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise ValueError('the loop')", "del mgr; gc.collect()"])
def test_however_a_script_ends_during_a_save_it_is_committed_and_the_lock_is_free(
    tmp_path: Path, mode: str, ending: str
) -> None:
    done = run_to_the_end(f"mgr.save(1)\n{ending}", mode, tmp_path)
    expected = 3 if "exit" in ending else 1 if "raise" in ending else 0
    assert done.returncode == expected, done.stderr
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == [1]
        assert reader.verify().ok
    with CheckpointManager(tmp_path, state=torch.zeros(8_000_000)) as mgr:
        assert mgr.restore_latest() is not None


@pytest.mark.parametrize("ending", ["", "del mgr; gc.collect()"])
def test_a_save_that_fails_after_nobody_waits_for_it_any_more_is_said_all_the_same(tmp_path: Path, ending: str) -> None:
    done = run_to_the_end(
        f"""
def fail(*_, **__):
    raise OSError(5, "the disk is broken")
mgr._repository.storage.write = fail
mgr.save(1)
{ending}
""",
        "async",
        tmp_path,
    )
    assert "the disk is broken" in done.stderr


def test_closing_twice_and_from_two_threads_ends_and_raises_a_failed_save_once(tmp_path: Path) -> None:
    mgr = CheckpointManager(tmp_path / "run", state=torch.ones(1000))
    mgr.restore_latest()
    errors: list[BaseException] = []

    def close() -> None:
        try:
            mgr.close()
        except SaveError as error:
            errors.append(error)

    with mock.patch.object(LocalStorage, "write", side_effect=OSError(5, "the disk is broken")):
        mgr.save(1)
        threads = [threading.Thread(target=close, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    mgr.close()
    assert len(errors) == 1
