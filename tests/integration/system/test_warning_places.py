"""A warning names the line of the user's program that led to it, whatever lies between."""

from __future__ import annotations

import ast
import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import checkpointer
from checkpointer import CheckpointManager
from checkpointer.data import ResumableLoader
from checkpointer.errors import CheckpointerWarning

PACKAGE = Path(checkpointer.__file__).parent


class Numbers(IterableDataset[int]):
    """Cannot be placed: what was seen is drawn again."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


def manager(root: Path, **more: Any) -> CheckpointManager:
    return CheckpointManager(root, **{"model": torch.nn.Linear(2, 2), **more})


def a_first_save(root: Path) -> None:
    with manager(root / "checkpoint-5", config={"require_resume": False}) as mgr:
        mgr.save(0)  # this line


def a_save_that_is_not_told_the_epoch(root: Path) -> None:
    with manager(root, config={"save": {"every_n_epochs": 1}}) as mgr:
        mgr.save(1, force=True)  # this line


def a_save_of_unsaved_tensors(root: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    with manager(root, model=model) as mgr:
        mgr.save(0)  # this line


def a_save_inside_a_context_manager_of_the_users(root: Path) -> None:
    @contextlib.contextmanager
    def saved_in_the_end(mgr: CheckpointManager) -> Iterator[None]:
        yield
        mgr.save(0)  # this line

    with manager(root / "checkpoint-5") as mgr, saved_in_the_end(mgr):
        pass


def a_restore_past_damage(root: Path) -> None:
    with manager(root) as mgr:
        mgr.save(0)
        mgr.save(1)
    file = next((root / "checkpoint-1").glob("model*.safetensors"))
    file.chmod(0o600)
    file.write_bytes(b"")
    with manager(root) as mgr:
        mgr.restore_latest()  # this line


def a_close_after_steps_that_nothing_saves(root: Path) -> None:
    mgr = manager(root, config={"save": {"every_n_steps": 2}})
    for step in range(4):
        mgr.save(step)
    mgr.close()  # this line


def the_end_of_a_block(root: Path) -> None:
    with manager(root, config={"save": {"every_n_steps": 2}}) as mgr:  # this line
        for step in range(4):
            mgr.save(step)


def a_manager_made_in_a_thread(root: Path) -> None:
    def make() -> None:
        config = {"save": {"on_signal": ["SIGUSR1"]}}
        CheckpointManager(root, config=config, model=torch.nn.Linear(2, 2)).close()  # this line

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()


def an_epoch_that_is_taken_up_again(_: Path) -> None:
    loader = ResumableLoader(DataLoader(Numbers(), batch_size=2))
    next(iter(loader))
    again = ResumableLoader(DataLoader(Numbers(), batch_size=2))
    again.load_state_dict(loader.state_dict())
    next(iter(again))  # this line


@pytest.mark.parametrize(
    "run",
    [
        a_first_save,
        a_save_that_is_not_told_the_epoch,
        a_save_of_unsaved_tensors,
        a_save_inside_a_context_manager_of_the_users,
        a_restore_past_damage,
        a_close_after_steps_that_nothing_saves,
        the_end_of_a_block,
        a_manager_made_in_a_thread,
        an_epoch_that_is_taken_up_again,
    ],
)
def test_a_warning_names_the_line_of_the_users_call(tmp_path: Path, run: Callable[[Path], None]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(tmp_path)
    ours = [warning for warning in told if issubclass(warning.category, CheckpointerWarning)]
    lines = Path(__file__).read_text("utf-8").splitlines()
    assert ours
    assert {(item.filename, lines[item.lineno - 1].rpartition("  # ")[2]) for item in ours} == {(__file__, "this line")}


def test_what_the_writers_thread_says_names_a_line_of_the_package(tmp_path: Path) -> None:
    """Nobody of the user's has called it, and a line of ``threading`` would mean nothing."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, torch.nan)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with manager(tmp_path, model=model) as mgr:
            mgr.save(0)
    (warning,) = (item for item in told if "holds NaN" in str(item.message))
    assert Path(warning.filename).is_relative_to(PACKAGE)


def test_only_one_function_issues_warnings() -> None:
    """A number of frames, counted by hand, is wrong on the next path that leads there."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warnings.warn_explicit")
    ]
    assert [place.partition(":")[0] for place in found] == ["system/messages.py"]
