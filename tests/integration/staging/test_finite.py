"""A run that diverges is told, and its last good checkpoint stays."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointNotFoundError

MODES = ("sync", "async", "lazy")


class Run:
    """A small run whose parameters can be poisoned."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.mgr = CheckpointManager(root, config=config, model=self.model, optimizer=self.optimizer)
        self.step()

    def step(self, poison: float = 0.0) -> None:
        self.optimizer.zero_grad()
        (self.model(torch.randn(4, 3)).sum() + poison).backward()
        if poison:
            assert self.model.weight.grad is not None
            self.model.weight.grad.fill_(poison)
        self.optimizer.step()

    def save(self, step: int) -> CheckpointInfo:
        handle = self.mgr.save(step)
        assert handle is not None
        info = handle.result()
        self.mgr.wait()
        return info


@pytest.mark.parametrize("mode", MODES)
def test_a_save_records_whether_parameters_and_moments_are_finite(tmp_path: Path, mode: str) -> None:
    run = Run(tmp_path, write={"mode": mode})
    with warnings.catch_warnings(record=True) as caught, run.mgr:
        warnings.simplefilter("always")
        assert run.save(0).finite is True
        run.optimizer.state[run.model.weight]["exp_avg"][0, 0] = math.nan
        assert run.save(1).finite is False
    assert ["checkpoint-1 holds NaN or infinities" in str(item.message) for item in caught] == [True]
    assert [info.finite for info in CheckpointManager(tmp_path, read_only=True).checkpoints()] == [True, False]


def test_divergence_is_warned_of_once_until_it_has_passed(tmp_path: Path) -> None:
    run = Run(tmp_path, write={"mode": "sync"})
    weight = run.model.weight.detach()
    with warnings.catch_warnings(record=True) as caught, run.mgr:
        warnings.simplefilter("always")
        for step, value in enumerate([math.nan, math.inf, 1.0, math.nan]):
            weight[0, 0] = value
            run.save(step)
    assert [str(item.message).partition(" holds")[0][-1] for item in caught] == ["0", "3"]


def test_masks_of_infinities_in_buffers_and_schedulers_do_not_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -math.inf))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    extra = {"worst": torch.tensor(math.inf)}
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, extra=extra) as mgr:
        handle = mgr.save(0)
        assert handle is not None
        assert handle.result().finite is True


def test_without_parameters_nobody_has_looked(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, progress={"epoch": 1}) as mgr:
        handle = mgr.save(0)
        assert handle is not None
        assert handle.result().finite is None


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinities:checkpointer.errors.CheckpointerWarning")
def test_a_run_that_goes_on_saving_nan_still_has_its_last_good_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, keep={"last": 2}, write={"mode": "sync"})
    with run.mgr:
        for step in range(3):
            run.step()
            run.save(step)
        good = run.model.weight.detach().clone()
        for step in range(3, 40):
            run.step(poison=math.nan)
            assert run.save(step).finite is False
    again = Run(tmp_path)
    with again.mgr:
        assert [info.step for info in again.mgr.checkpoints() if info.finite] == [1, 2]
        restored = again.mgr.restore_latest(finite=True)
        assert restored is not None
        assert restored.step == 2
        assert torch.equal(again.model.weight, good)
        again.save(3)  # a new branch, in the place of the old one


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinities:checkpointer.errors.CheckpointerWarning")
def test_where_nothing_is_finite_the_request_for_it_says_so_and_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.mgr:
        run.step(poison=math.inf)
        run.save(0)
    again = Run(tmp_path)
    before = again.model.weight.detach().clone()
    with again.mgr:
        with pytest.raises(CheckpointNotFoundError, match=r"every checkpoint in .* holds NaN or infinities"):
            again.mgr.restore_latest(finite=True)
        assert torch.equal(again.model.weight, before)
        assert again.mgr.restore_latest() is not None


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinities:checkpointer.errors.CheckpointerWarning")
def test_frozen_files_of_a_checkpoint_with_nan_are_not_shared(tmp_path: Path) -> None:
    base, head = nn.Linear(300, 300), nn.Linear(300, 2)
    base.requires_grad_(False)
    model = nn.Sequential(base, head)
    with CheckpointManager(tmp_path, config={"write": {"mode": "sync"}}, model=model) as mgr:
        shared = []
        for step, value in enumerate([0.0, 0.0, math.nan, math.nan, 0.0]):
            with torch.no_grad():
                base.weight[0, 0] = value
            handle = mgr.save(step)
            assert handle is not None
            info = handle.result()
            shared.append((info.finite, bool(info.statistics["bytes_shared"])))
    assert shared == [(True, False), (True, True), (False, False), (False, False), (True, False)]
