"""A loop that saves faster than its disk writes is told once what that costs it."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning
from checkpointer.save.waits import Waits
from checkpointer.storage import LocalStorage

TOO_FAST = r"^saves are due faster than they can be written: the last 3 have waited \d.* of the \d.* between them"


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file takes a while, and each wait counts, however little the run has lost."""
    write = LocalStorage.write

    def slowly(*arguments: Any, **keywords: Any) -> float:
        time.sleep(0.02)
        return write(*arguments, **keywords)

    monkeypatch.setattr(LocalStorage, "write", slowly)
    monkeypatch.setattr("checkpointer.policy.waiting._MUCH", 0.0)


def train(root: Path, steps: int = 8, mode: str = "async", *, force: bool = False, **save: Any) -> list[str]:
    config = {"save": save, "write": {"mode": mode, "durable": False}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CheckpointManager(root, config=config, state={"x": 1}) as mgr:
            for step in range(steps):
                mgr.save(step, force=force)
    texts = [str(item.message) for item in caught if issubclass(item.category, CheckpointerWarning)]
    return [text for text in texts if "in no checkpoint" not in text]  # a time rule leaves the end of the loop unsaved


@pytest.mark.usefixtures("slow_disk")
def test_saves_that_wait_again_and_again_are_said_once_with_the_cure(tmp_path: Path) -> None:
    (text,) = train(tmp_path)
    assert re.match(TOO_FAST, text)
    for cure in ("every_n_steps", "every: auto", "faster disk", "share"):
        assert cure in text


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("loop", [{"steps": 3}, {"mode": "sync"}, {"force": True}, {"every": "auto"}], ids=str)
def test_nothing_is_said_where_nobody_waits_again_and_again(tmp_path: Path, loop: dict[str, Any]) -> None:
    assert train(tmp_path, **loop) == []


@pytest.mark.filterwarnings("error")
def test_a_loop_that_only_tries_something_out_is_told_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, state={"x": 1}) as mgr:
        for step in range(8):
            mgr.save(step)


def test_only_waits_of_saves_that_came_by_themselves_count() -> None:
    waits = Waits()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(10):
            waits.begins(number * 60.0, number * 60.0 + 50, scheduled=number % 4 == 0, says=True)
    assert len(caught) == 0
    with pytest.warns(CheckpointerWarning, match="have waited 2.5min of the 5.5min between them"):
        waits.begins(600.0, 650.0, scheduled=True, says=True)


def test_one_rank_of_a_job_says_it() -> None:
    waits = Waits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(10):
            waits.begins(number * 60.0, number * 60.0 + 50, scheduled=True, says=False)
