"""What ``save`` is given is checked at each call, due or not, and costs a call that saves nothing no wait for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import ConfigError
from tests.unit.config.test_metrics import OnDevice


def make(root: Path, **save: Any) -> CheckpointManager:
    config = {"save": save, "keep": {"best": {"monitor": "loss"}}, "write": {"mode": "sync", "durable": False}}
    return CheckpointManager(root, config=config, state={"x": 1})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"metrics": {"loss": "low"}}, "metric 'loss' must be a number, got str"),
        ({"metrics": {"loss": torch.ones(2)}}, r"metric 'loss' must be a number, got Tensor of shape \(2,\)"),
        ({"metrics": {"loss": 10**400}}, "metric 'loss' is too large for a float"),
        ({"metrics": [0.5]}, "metrics must be a mapping"),
        ({"metrics": {1: 0.5}}, "the names of metrics must be strings, got 1"),
        ({"tags": "final"}, "tags must be a sequence of strings"),
        ({"tags": 3}, "tags must be a sequence of strings"),
        ({"files": {"../x": b""}}, "not a file name inside a checkpoint"),
        ({"files": {"x": 3}}, "must be bytes or a path, got int"),
    ],
)
def test_what_is_wrong_is_refused_where_nothing_is_due_and_the_run_goes_on(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with make(tmp_path, every_n_steps=10) as mgr:
        for step in (1, 10):
            with pytest.raises(ConfigError, match=message):
                mgr.save(step, **wrong)
        assert mgr.checkpoints() == []
        assert mgr.save(10) is not None


def test_a_call_that_saves_nothing_reads_no_value_and_one_that_saves_reads_each_once(tmp_path: Path) -> None:
    metrics = {name: torch.tensor(0.5, requires_grad=True).as_subclass(OnDevice) for name in ("loss", "acc")}
    OnDevice.reads = 0
    with make(tmp_path, every_n_steps=10) as mgr:
        for step in range(1, 10):
            mgr.save(step, metrics=metrics)
        assert OnDevice.reads == 0
        assert mgr.save(10, metrics=metrics) is not None
        assert OnDevice.reads == len(metrics)
        assert mgr.latest().metrics == {"loss": 0.5, "acc": 0.5}


def test_none_is_not_reported_in_save_and_annotate_and_makes_nothing_due(tmp_path: Path) -> None:
    with make(tmp_path, every_n_steps=10, on_metric=True) as mgr:
        assert mgr.save(1, metrics={"loss": None}) is None
        assert mgr.save(2, metrics={"loss": 0.5, "acc": None}).result().metrics == {"loss": 0.5}
        mgr.annotate(2, metrics={"acc": torch.tensor([0.75], requires_grad=True), "loss": None})
        assert mgr.latest().metrics == {"loss": 0.5, "acc": 0.75}
        for wrong in ("1", 10**400, torch.ones(2), 1j):
            with pytest.raises(ConfigError, match="metric 'acc'"):
                mgr.annotate(2, metrics={"acc": wrong})
