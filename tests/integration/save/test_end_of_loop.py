"""Whoever ends a loop without saving its end is told which steps are in no checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError, StepOrderError
from tests.support.gate import closed

RARELY = {"save": {"every_n_steps": 5}}


def make(root: Path, config: Any = RARELY, **options: Any) -> CheckpointManager:
    return CheckpointManager(root, config={"write": {"durable": False}, **config}, state={"x": 1}, **options)


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """What was warned of since this was last asked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def take() -> list[str]:
            texts = [str(item.message) for item in caught if issubclass(item.category, CheckpointerWarning)]
            caught.clear()
            return texts

        yield take


def test_the_end_of_a_loop_that_is_in_no_checkpoint_is_said_with_its_cure(tmp_path: Path, said: Any) -> None:
    with make(tmp_path) as mgr:
        for step in range(8):
            mgr.save(step)
        assert said() == []
    (text,) = said()
    assert text == (
        f"2 steps (6 to 7) are in no checkpoint of {tmp_path}: no save was due after step 5. "
        "mgr.save(7, force=True) after the loop saves its end"
    )
    mgr.close()
    assert said() == []


def test_plain_close_says_it_too_and_after_a_resume_it_counts_from_there(tmp_path: Path, said: Any) -> None:
    with make(tmp_path) as mgr:
        mgr.save(5)
    mgr = make(tmp_path)
    mgr.restore_latest()
    mgr.save(6)
    mgr.close()
    assert [text.partition(":")[0] for text in said()] == [f"step 6 is in no checkpoint of {tmp_path}"]


def test_a_run_without_any_checkpoint_is_said_to_have_none(tmp_path: Path, said: Any) -> None:
    with make(tmp_path) as mgr:
        for step in (1, 2, 3):
            mgr.save(step)
    (text,) = said()
    assert text.startswith(f"3 steps (1 to 3) are in no checkpoint of {tmp_path}: no save was due. mgr.save(3, ")


def test_going_back_at_the_end_hides_nothing(tmp_path: Path, said: Any) -> None:
    with make(tmp_path) as mgr:
        for step in range(8):
            mgr.save(step)
        mgr.restore(0)
    assert "2 steps (6 to 7) are in no checkpoint" in said()[0]


def nothing_called(mgr: CheckpointManager) -> None:
    assert not mgr.should_save(3)


def forced_at_the_end(mgr: CheckpointManager) -> None:
    for step in range(4):
        mgr.save(step)
    mgr.save(3, force=True)


def due_at_the_end(mgr: CheckpointManager) -> None:
    for step in range(6):
        mgr.save(step)


def called_again_at_the_step_that_was_saved(mgr: CheckpointManager) -> None:
    for step in (4, 5, 5):
        mgr.save(step)


@pytest.mark.parametrize(
    "loop", [nothing_called, forced_at_the_end, due_at_the_end, called_again_at_the_step_that_was_saved]
)
def test_where_the_end_is_saved_nothing_is_said(tmp_path: Path, said: Any, loop: Any) -> None:
    with make(tmp_path) as mgr:
        loop(mgr)
    assert said() == []


def test_without_rules_nothing_is_ever_said(tmp_path: Path, said: Any) -> None:
    with make(tmp_path, {}) as mgr:
        for step in range(3):
            mgr.save(step, metrics={"loss": 1.0})
    assert said() == []


def test_a_save_that_is_still_being_written_at_the_end_counts(tmp_path: Path, said: Any) -> None:
    with closed() as gate:
        mgr = make(tmp_path)
        mgr.save(5)
        gate.reached()
        mgr.save(6)
        gate.open()
        mgr.close()
    assert "step 6 is in no checkpoint" in said()[0]


def test_after_an_error_the_error_is_what_is_said(tmp_path: Path, said: Any) -> None:
    def fail() -> None:
        with make(tmp_path / "a") as mgr:
            mgr.save(1)
            raise ZeroDivisionError

    def fail_and_close() -> None:
        mgr = make(tmp_path / "b")
        try:
            mgr.save(1)
            raise ZeroDivisionError
        finally:
            mgr.close()

    def leave() -> None:
        with make(tmp_path / "c") as mgr:
            mgr.save(1)
            sys.exit(3)

    for loop in (fail, fail_and_close, leave):
        with pytest.raises((ZeroDivisionError, SystemExit)):
            loop()
    assert said() == []


def test_after_a_signal_nothing_is_said(tmp_path: Path, said: Any) -> None:
    with make(tmp_path, {"save": {"every_n_steps": 5, "on_signal": "SIGUSR1"}}) as mgr:
        mgr.save(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        mgr.save(2)
        assert mgr.should_stop()
    assert said() == []


def test_a_save_that_failed_is_named_and_its_error_raised(
    tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mgr = make(tmp_path)
    with closed() as gate:
        mgr.save(5)
        gate.reached()
        monkeypatch.setattr("checkpointer.repository.commit.by_rename.RenameCommit.commit", _fail)
        mgr.save(6)
        gate.open()
        with pytest.raises(SaveError, match="step 5"):
            mgr.close()
    (text,) = said()
    assert text.startswith("step 6 is in no checkpoint")
    assert "the save of step 5 has failed, and none was due after it" in text


def _fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_a_refused_call_is_no_step(tmp_path: Path, said: Any) -> None:
    with make(tmp_path) as mgr:
        mgr.save(5)
        with pytest.raises(StepOrderError):
            mgr.save(3)
    assert said() == []


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_it_is_logged_and_the_run_has_not_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(tmp_path) as mgr:
        mgr.save(6)
    assert [record.levelno for record in caplog.records if "no checkpoint" in record.message] == [logging.WARNING]
