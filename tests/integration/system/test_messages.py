"""What is said in the middle of a save fails no save: not where warnings are errors, nor where a log handler raises."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.save import saver
from checkpointer.system.threads import Pool
from tests.conftest import Root

# pytest makes warnings errors, as python -W error does.

LONG = 60
"""Seconds. Nothing takes that long unless it hangs."""

MODES = ("sync", "async", "lazy")


class Run:
    """A model in training."""

    def __init__(self, root: Any, mode: str = "async", **config: Any) -> None:
        self.model = torch.nn.Linear(64, 64)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        parts = {"model": self.model, "optimizer": self.optimizer}
        self.mgr = CheckpointManager(root, config={"write": {"mode": mode}, **config}, **parts)

    def step(self) -> None:
        self.model(torch.ones(64)).sum().backward()
        self.optimizer.step()

    @property
    def steps(self) -> list[int]:
        return [info.step for info in self.mgr.checkpoints()]

    def saves_and_waits(self, step: int) -> None:
        """One of the two calls raises a warning of this save: which one depends on how fast the writer was."""
        self.mgr.save(step)
        self.settle()
        self.mgr.wait()

    def settle(self) -> None:
        """Wait for the save and what follows it, and raise nothing."""
        self.mgr._saver.wait()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_diverges_where_warnings_are_errors_is_pruned_and_the_next_call_raises_it(
    tmp_path: Path, mode: str
) -> None:
    run = Run(tmp_path, mode, keep={"last": 1})
    for step in range(3):
        run.mgr.save(step)
    run.settle()
    with torch.no_grad():
        run.model.weight.fill_(math.nan)
    with pytest.raises(CheckpointerWarning, match="holds NaN or infinities"):
        run.saves_and_waits(3)
    run.settle()
    assert run.steps == [2, 3]
    run.mgr.save(4)
    run.mgr.close()
    assert run.steps == [2, 4]


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_checkpoint_that_is_in_the_way_is_moved_and_the_save_performed_before_the_warning_is_raised(
    tmp_path: Path, mode: str
) -> None:
    run = Run(tmp_path, mode)
    run.mgr.save(0)
    run.settle()
    damaged = tmp_path / "checkpoint-1"
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(CheckpointerWarning, match=r"moved .*checkpoint-1"):
        run.saves_and_waits(1)
    run.settle()
    assert run.steps == [0, 1]
    assert run.mgr.verify().ok
    run.mgr.close()


def test_a_first_save_that_warns_is_performed_before_the_warnings_are_raised(tmp_path: Path) -> None:
    run = Run(tmp_path, save={"every_n_epochs": 1, "every_n_steps": 1})
    run.model.forgotten = torch.ones(3)
    with pytest.raises(CheckpointerWarning, match="every_n_epochs has no effect"):
        run.mgr.save(0)
    run.mgr.close()
    assert run.steps == [0]


def test_where_a_root_has_no_lock_the_first_save_is_performed_before_that_is_raised(s3: Root) -> None:
    mgr = CheckpointManager(s3.url, storage_options=s3.options, state={"a": 1})
    with pytest.raises(CheckpointerWarning, match="make sure that no other host does"):
        mgr.save(0)
    mgr.close()
    assert [info.step for info in mgr.checkpoints()] == [0]


def test_without_filters_a_warning_comes_at_once_and_nothing_is_raised(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with torch.no_grad():
        run.model.weight.fill_(math.inf)
    with pytest.warns(CheckpointerWarning, match="holds NaN") as caught:
        run.saves_and_waits(0)
    assert len(caught) == 1
    run.mgr.close()


# ------------------------------------------------------------------------------------------------- handlers that raise


class Outage(logging.Handler):
    """Sends each record to a log server that is down."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ConnectionError("the log server is down")


@pytest.fixture
def outage() -> Iterator[None]:
    logger, handler = logging.getLogger("checkpointer"), Outage(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("mode", MODES)
def test_a_log_handler_that_raises_fails_no_save_and_is_shown(
    tmp_path: Path, mode: str, outage: None, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, mode, keep={"last": 1})
    for step in range(3):
        run.step()
        handle = run.mgr.save(step)
        assert handle is not None
        assert handle.result(10).step == step
    run.mgr.close()
    assert run.steps == [2]
    assert "the log server is down" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:on_commit:checkpointer.errors.CheckpointerWarning")
def test_a_log_handler_that_raises_does_not_end_the_calls_of_on_commit(tmp_path: Path, outage: None) -> None:
    seen: list[int] = []

    def fail(info: CheckpointInfo) -> None:
        seen.append(info.step)
        raise KeyError("webhook")

    with CheckpointManager(tmp_path, on_commit=fail, state={"a": 1}) as mgr:
        for step in range(3):
            mgr.save(step)
    assert seen == [0, 1, 2]


# ------------------------------------------------------------------------------------------- Ctrl-C inside of save


@pytest.mark.parametrize("mode", ["async", "lazy"])
def test_ctrl_c_before_the_writer_has_begun_leaves_no_save_that_everybody_waits_for(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path, mode)
    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.mgr.save(0)
    run.step()
    with pytest.raises(SaveError, match="the save of step 0 did not begin"):
        run.mgr.save(1)
    run.mgr.close()
    assert run.steps == [1]


@pytest.mark.parametrize("mode", ["async", "lazy"])
def test_ctrl_c_once_the_writer_has_begun_keeps_the_state_of_the_call(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = threading.Event()
    write, submit = saver.write_checkpoint, Pool.submit

    def late(*arguments: Any) -> Any:
        assert stepped.wait(LONG)
        return write(*arguments)

    def interrupted(pool: Pool, *arguments: Any) -> None:
        submit(pool, *arguments)
        raise KeyboardInterrupt

    run = Run(tmp_path, mode)
    run.step()
    expected = run.model.weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_checkpoint", late)
        patch.setattr(Pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.mgr.save(0)
        run.step()
        stepped.set()
        run.mgr.wait()
    assert not torch.equal(run.model.weight, expected)
    run.mgr.restore(0)
    assert torch.equal(run.model.weight, expected)
    run.mgr.close()
