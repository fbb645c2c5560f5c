"""What is written is the state at the ``save`` call, however fast training goes on; and this test can fail."""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
from checkpointer.staging.live import LiveState, LiveTensor
from checkpointer.staging.stager import Stager
from checkpointer.staging.step_hook import StepWatch
from tests.support import gate
from tests.support.compare import assert_identical

WIDTH = 384


class Run:
    """A model of a few MiB, and everything that training changes beside it."""

    def __init__(self, *, fused: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1, fused=fused, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 7)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.progress: dict[str, Any] = {"steps": 0, "seen": torch.zeros(1 << 16), "array": np.zeros(100), "log": []}
        self.inputs = torch.randn(8, WIDTH)

    @property
    def components(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "inputs"}

    def prepare(self) -> None:
        """Gradients of another size each time."""
        (self.model(self.inputs).square().sum() * random.uniform(0.5, 2)).backward()

    def change_everything(self, *, by_hand: bool) -> None:
        """As fast as it can."""
        if by_hand:
            for parameter in self.model.parameters():
                parameter.data.neg_()
        self.progress["seen"].add_(1)
        self.progress["array"] += 1
        self.progress["steps"] += 1
        self.progress["log"].append(random.random())
        np.random.random(3)
        with torch.no_grad():
            self.model(self.inputs)  # the statistics of BatchNorm
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        torch.rand(3)

    def snapshot(self) -> Any:
        state = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": dict(self.ema.state_dict()),
            "progress": self.progress,
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)),
        }
        return copy.deepcopy(state)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return 1000 if request.config.getoption("--thorough") else 15


@contextlib.contextmanager
def manager(root: Path, mode: str, run: Run) -> Iterator[CheckpointManager]:
    config = {"write": {"mode": mode, "durable": False}, "keep": {"last": 2}}
    with CheckpointManager(root, config=config, **run.components) as made:
        yield made


def restored(root: Path, step: int, *, fused: bool) -> Any:
    """What is in the checkpoint, by way of objects that know nothing else. Leaves the random generators alone."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    run = Run(fused=fused, seed=1)
    with CheckpointManager(root, read_only=True, **run.components) as reader:
        reader.restore(step)
    found = run.snapshot()
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode, fused", [("sync", False), ("async", True), ("lazy", False), ("lazy", True)])
def test_what_is_restored_is_the_state_at_the_save_call_however_fast_training_goes_on(tmp_path, rounds, mode, fused):
    run = Run(fused=fused)
    pauses = random.Random(0)
    with manager(tmp_path, mode, run) as mgr:
        for step in range(rounds):
            run.prepare()
            expected = run.snapshot()
            handle = mgr.save(step)
            if step % 2:
                time.sleep(pauses.uniform(0, 0.01))  # so that the step meets the writer anywhere
            run.change_everything(by_hand=mode != "lazy")
            handle.result()
            assert_identical(restored(tmp_path, step, fused=fused), expected, f"step {step}")
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())  # NaN hides every change


def save_and_change(root: Path, run: Run, mode: str, *, pieces: int, file: str) -> Any:
    """The state at the save call, of which ``pieces`` pieces of ``file`` were taken when all of it changed."""
    with manager(root, mode, run) as mgr, gate.closed(pieces=pieces, file=file) as held:
        run.prepare()
        run.optimizer.step()
        run.prepare()
        expected = run.snapshot()
        handle = mgr.save(1)
        held.reached()
        run.change_everything(by_hand=mode == "async")
        held.open()
        handle.result()
    return expected


PLACES = [(1, "model"), (2, "model"), (1, "optimizer"), (3, "optimizer"), (9, "optimizer"), (1, "ema"), (1, "state")]


@pytest.mark.parametrize("mode, fused", [("async", True), ("lazy", False), ("lazy", True)])
@pytest.mark.parametrize("pieces, file", PLACES)
def test_a_step_may_fall_between_any_two_blocks(tmp_path, pieces, file, mode, fused):
    expected = save_and_change(tmp_path, Run(fused=fused), mode, pieces=pieces, file=file)
    assert_identical(restored(tmp_path, 1, fused=fused), expected)


# ------------------------------------------------------------------------ the tests above can fail: each part is needed


def torn(root: Path, mode: str, *, fused: bool) -> str:
    """How it was noticed that the checkpoint is not the state at the call; empty if it was not."""
    try:
        expected = save_and_change(root, Run(fused=fused), mode, pieces=1, file="model")
    except SaveError as error:
        return str(error)
    try:
        assert_identical(restored(root, 1, fused=fused), expected)
    except AssertionError:
        return "other bits"
    return ""


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["before_step", "detach"])
def test_without_the_hook_the_step_fails_the_save_where_a_version_tells(tmp_path, monkeypatch, method, fused):
    monkeypatch.setattr(StepWatch, method, lambda *arguments: None)
    assert "was changed while it was being written" in torn(tmp_path, "lazy", fused=fused)


@pytest.mark.parametrize("method", ["before_step", "detach"])
def test_without_the_hook_the_step_tears_the_state_where_no_version_tells(tmp_path, monkeypatch, method):
    monkeypatch.setattr(StepWatch, method, lambda *arguments: None)
    monkeypatch.setattr(LiveTensor, "torn", False)
    monkeypatch.setattr(LiveState, "check", lambda *arguments: None)
    assert torn(tmp_path, "lazy", fused=False) == "other bits"


def test_without_the_hook_a_step_that_no_version_tells_fails_the_save_by_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(StepWatch, "detach", lambda *arguments: None)
    monkeypatch.setattr(LiveTensor, "torn", False)
    assert "was changed while it was being written" in torn(tmp_path, "lazy", fused=True)


def test_without_the_copy_of_async_mode_a_step_tears_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(Stager, "copies", Stager.live)
    assert torn(tmp_path, "async", fused=False) == "other bits"


def test_without_the_hook_a_race_that_is_left_to_luck_is_lost_at_least_once(tmp_path, monkeypatch, rounds):
    monkeypatch.setattr(StepWatch, "detach", lambda *arguments: None)
    run = Run(fused=True)
    lost = 0
    with manager(tmp_path, "lazy", run) as mgr:
        for step in range(rounds):
            run.prepare()
            expected = run.snapshot()
            handle = mgr.save(step)
            run.change_everything(by_hand=False)
            try:
                handle.result()
                assert_identical(restored(tmp_path, step, fused=True), expected)
            except (SaveError, AssertionError):
                lost += 1
                break
    assert lost
