"""A save tells of what a resume would lose though components are all registered: a loader's position, gradients."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import checkpointer
from checkpointer import CheckpointManager
from checkpointer.data import ResumableLoader
from checkpointer.errors import CheckpointerWarning
from checkpointer.state import pending

CONFIG = {"write": {"mode": "sync", "durable": False}}
LOADER, GRADIENTS = "in the middle of an epoch, and no component", "fell between backward"


class Run:
    """A model in training, and what saves have said."""

    def __init__(self, root: Path, *, gradients: bool = False, **components: Any) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        parts = {"model": self.model, "optimizer": self.optimizer, **components}
        if gradients:
            parts["gradients"] = checkpointer.Gradients(self.model)
        self.mgr = CheckpointManager(root, config=CONFIG, **parts)
        self.saved = 0

    def backward(self) -> None:
        self.model(torch.ones(2)).sum().backward()

    def step(self) -> None:
        self.optimizer.step()

    def save(self) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", CheckpointerWarning)
            self.mgr.save(self.saved)
        self.saved += 1
        return [str(warning.message) for warning in told]


def loader() -> ResumableLoader[Any]:
    return ResumableLoader(DataLoader([*range(8)], 2))


# ------------------------------------------------------------------------------------------------------------ loaders


def test_a_loader_that_is_iterated_and_no_component_is_named_once(tmp_path: Path) -> None:
    run, forgotten = Run(tmp_path), loader()
    told = [run.save() for _ in forgotten]
    assert [len(texts) for texts in told] == [1, 0, 0, 0]
    assert LOADER in told[0][0]


class Inside:
    """Saves a loader as part of its own state."""

    def __init__(self, inner: ResumableLoader[Any]) -> None:
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])


@pytest.mark.parametrize("wrap", [lambda it: it, Inside])
def test_a_loader_that_is_a_component_or_part_of_one_is_not_named(tmp_path: Path, wrap: Any) -> None:
    batches = loader()
    run = Run(tmp_path, loader=wrap(batches))
    assert [run.save() for _ in batches] == [[], [], [], []]


def test_a_loader_of_another_manager_and_one_that_has_ended_are_not_named(tmp_path: Path) -> None:
    batches, evaluation = loader(), loader()
    other = Run(tmp_path / "other", loader=batches)
    run = Run(tmp_path / "run")
    for _ in batches:
        list(evaluation)
        assert run.save() == []
    assert other.save() == []


# ---------------------------------------------------------------------------------------------------------- gradients


def test_a_save_in_the_middle_of_accumulation_is_told_at_the_next_save_once(tmp_path: Path) -> None:
    run, told = Run(tmp_path), []
    for _ in range(4):
        run.backward()
        told.append(run.save())
        run.backward()
        run.step()
        run.optimizer.zero_grad()
    assert [len(texts) for texts in told] == [0, 0, 1, 0], "the first save begins to look"
    assert GRADIENTS in told[2][0]
    assert "optimizer 'optimizer'" in told[2][0]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zeroed", ["before backward", "after the step", "after the save"])
def test_a_save_after_the_step_is_not_told(tmp_path: Path, zeroed: str, set_to_none: bool) -> None:
    run = Run(tmp_path)
    for _ in range(5):
        if zeroed == "before backward":
            run.optimizer.zero_grad(set_to_none=set_to_none)
        run.backward()
        run.step()
        if zeroed == "after the step":
            run.optimizer.zero_grad(set_to_none=set_to_none)
        assert run.save() == []
        if zeroed == "after the save":
            run.optimizer.zero_grad(set_to_none=set_to_none)


def test_gradients_that_another_loss_leaves_behind_are_not_told(tmp_path: Path) -> None:
    """As in the discriminator of a GAN, after the generator's turn: dropped unused."""
    run = Run(tmp_path)
    for _ in range(5):
        run.optimizer.zero_grad()
        run.backward()
        run.step()
        run.optimizer.zero_grad()
        run.backward()
        assert run.save() == []


def test_a_step_that_a_scaler_skips_is_not_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number in range(5):
        run.optimizer.zero_grad()
        run.backward()
        if number != 2:
            run.step()
        assert run.save() == []


def test_where_gradients_are_saved_nothing_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, gradients=True)
    for _ in range(4):
        run.backward()
        assert run.save() == []
        run.step()
        run.optimizer.zero_grad()


def test_the_hooks_of_managers_that_are_gone_go_with_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path / "first")
    run.save()
    optimizer = run.optimizer
    run.mgr.close()
    del run
    gc.collect()
    second = Run(tmp_path / "second")
    second.save()
    assert second.optimizer._optimizer_step_pre_hooks
    assert all(watch() is not None for watch, _ in pending._hooks)
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_with_a_hook_can_be_copied(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save()
    assert copy.deepcopy(run.optimizer).state_dict() == run.optimizer.state_dict()
