"""Settings of the script that a checkpoint replaces are told, with what keeps them; progress is no setting."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from checkpointer import CheckpointManager
from checkpointer.errors import CorruptCheckpointError
from checkpointer.state.optimizer.given import saved_given
from tests.support.memory_engine import carry


def run(
    kind: str = "none", *, lr: Any = 1e-3, total: int = 100, decay: float = 0.1, growth: int = 10
) -> dict[str, Any]:
    """The components of a script, with the settings that a user may have changed."""
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    groups = [{"params": [module.weight]}, {"params": [module.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=decay)
    made = {
        "none": lambda: None,
        "one": lambda: lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total),
        "step": lambda: lr_scheduler.StepLR(optimizer, total),
        "cosine": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, total),
        "cyclic": lambda: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=total),
        "chain": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, total)],
            milestones=[2],
        ),
    }[kind]()
    scheduler = {} if made is None else {"scheduler": made}
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth)
    return {"model": module, "optimizer": optimizer, **scheduler, "scaler": scaler}


def trained(kind: str, **settings: Any) -> dict[str, Any]:
    parts = run(kind, **settings)
    for _ in range(5):
        parts["scaler"].scale(parts["model"](torch.ones(2)).sum()).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
        if "scheduler" in parts:
            parts["scheduler"].step()
    return parts


def resumed(root: Any, saved: dict[str, Any], live: dict[str, Any], **options: Any) -> Any:
    with CheckpointManager(root, **saved) as mgr:
        mgr.save(0, force=True)
    with CheckpointManager(root, **live) as mgr:
        restored = mgr.restore_latest(**options)
        assert restored is not None
        return restored.report


def changed(report: Any) -> dict[str, list[str]]:
    return {name: part.changed for name, part in report.components.items() if part.changed}


@pytest.mark.parametrize("kind", ["none", "one", "step", "cosine", "cyclic", "chain"])
def test_progress_is_no_setting(tmp_path, caplog, kind):
    assert changed(resumed(tmp_path, trained(kind), run(kind))) == {}
    assert caplog.records == []


def test_what_the_checkpoint_replaces_is_in_the_report_and_in_one_log_line(tmp_path, caplog):
    live = run("one", lr=5e-4, total=200, decay=0.2, growth=20)
    report = resumed(tmp_path, trained("one"), live)
    found = changed(report)
    assert found["optimizer"][:4] == [
        "lr: 4e-05 (live 2e-05) in groups 0, 1",
        "max_lr: 0.001 (live 0.0005) in groups 0, 1",
        "min_lr: 4e-09 (live 2e-09) in groups 0, 1",
        "weight_decay: 0.1 (live 0.2) in groups 0, 1",
    ]
    assert found["scheduler"][0] == "total_steps: 100 (live 200)"
    assert found["scaler"][0] == "growth_interval: 10 (live 20)"
    assert "  changed    total_steps: 100 (live 200)" in str(report)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "weight_decay: 0.1 (live 0.2)" in record.message
    assert "scaler: growth_interval: 10 (live 20)" in record.message
    assert live["optimizer"].param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("kind", ["none", "one", "step", "chain"])
def test_the_globs_of_the_report_keep_the_live_settings_and_nothing_else(tmp_path, caplog, kind):
    new = {"lr": 5e-4, "total": 200, "decay": 0.2, "growth": 20}
    found = changed(resumed(tmp_path, saved := trained(kind), run(kind, **new)))
    globs = [glob for part in found.values() for glob in re.findall(r"'([^']+)'", part[-1])]
    caplog.clear()
    live, fresh = run(kind, **new), run(kind, **new)
    report = resumed(tmp_path / "again", saved, live, ignore_keys=globs)
    assert caplog.records == []
    assert all(" kept (saved " in text for part in changed(report).values() for text in part)
    assert "weight_decay: 0.2 kept (saved 0.1) in groups 0, 1" in report.components["optimizer"].changed
    for group, other in zip(live["optimizer"].param_groups, fresh["optimizer"].param_groups, strict=True):
        progress = {"params": None, "betas": None}  # OneCycleLR drives the momentum
        assert {**group, **progress} == {**other, **progress}
    assert live["scaler"].get_growth_interval() == 20
    assert live["scaler"].get_scale() == saved["scaler"].get_scale()
    states = (saved["optimizer"].state[saved["model"].weight], live["optimizer"].state[live["model"].weight])
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    if kind != "none":
        assert live["scheduler"].base_lrs == fresh["scheduler"].base_lrs if kind != "chain" else True
        assert live["scheduler"].last_epoch == saved["scheduler"].last_epoch


def test_tensor_learning_rates_are_compared_by_value_and_kept_in_their_memory(tmp_path):
    saved, live = run(lr=torch.tensor(1e-3)), run(lr=torch.tensor(5e-4))
    tensor = live["optimizer"].param_groups[0]["lr"]
    (first, advice) = carry(saved["optimizer"], live["optimizer"]).changed[-2:]
    assert re.fullmatch(r"lr: 0\.00100\d* \(live 0\.0005\d*\) in groups 0, 1|lr: 0\.001.*", first)
    assert "it.param_groups.*.lr" in advice
    live = run(lr=torch.tensor(5e-4))
    tensor = live["optimizer"].param_groups[0]["lr"]
    carry(saved["optimizer"], live["optimizer"], ignore_keys=["it.param_groups.*.lr"])
    assert live["optimizer"].param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(5e-4)


class Script:
    """A script that is started again and again, with a schedule of its own."""

    def __init__(self, root: Any, *, ignore_keys: Any = (), **settings: Any) -> None:
        self.parts = run(**settings)
        self.mgr = CheckpointManager(root, **self.parts)
        self.restored = self.mgr.restore_latest(ignore_keys=ignore_keys)

    def train(self, step: int, *lrs: float) -> list[str]:
        """Save once at each learning rate; what the restore has told of the optimizer."""
        for number, lr in enumerate(lrs):
            for group in self.parts["optimizer"].param_groups:
                group["lr"] = lr
            self.mgr.save(step + number, force=True)
        self.mgr.close()
        return self.restored.report.components["optimizer"].changed if self.restored else []


def test_a_learning_rate_that_the_loop_sets_is_progress_and_a_new_argument_is_told(tmp_path):
    Script(tmp_path).train(0, 5e-4, 4e-4)
    assert Script(tmp_path).train(10, 3e-4) == []
    told = Script(tmp_path, lr=2e-3).train(20)
    assert told == [
        "lr: 0.0003 (live 0.002) in groups 0, 1",
        "the live settings stay with ignore_keys=['optimizer.param_groups.*.lr']",
    ]
    assert Script(tmp_path).train(30) == []


def test_a_changed_argument_is_told_as_long_as_the_checkpoints_one_is_in_force(tmp_path):
    Script(tmp_path).train(0, 5e-4)
    for step in (10, 20):
        (told, _) = Script(tmp_path, lr=2e-3).train(step, 4e-4)
        assert told.endswith("(live 0.002) in groups 0, 1")


def test_an_argument_that_was_kept_is_the_one_that_later_runs_are_compared_with(tmp_path):
    Script(tmp_path).train(0, 5e-4)
    kept = Script(tmp_path, lr=2e-3, ignore_keys=["optimizer.param_groups.*.lr"])
    assert kept.train(10, 1e-3)[0] == "lr: 0.002 kept (saved 0.0005) in groups 0, 1"
    assert Script(tmp_path, lr=2e-3).train(20) == []


def test_going_back_within_a_run_tells_nothing(tmp_path):
    script = Script(tmp_path)
    script.train(0, 5e-4, 4e-4)
    with CheckpointManager(tmp_path, **script.parts) as mgr:
        mgr.restore_latest()
        mgr.save(7, force=True)
        for group in script.parts["optimizer"].param_groups:
            group["lr"] = 1e-6
        assert mgr.restore(0).report.components["optimizer"].changed == []


def test_a_rate_that_reduce_on_plateau_has_lowered_is_progress(tmp_path):
    def started() -> tuple[CheckpointManager, Any]:
        parts = run()
        plateau = lr_scheduler.ReduceLROnPlateau(parts["optimizer"], patience=0)
        return CheckpointManager(tmp_path, **parts, plateau=plateau), plateau

    mgr, plateau = started()
    with mgr:
        for loss in (1.0, 2.0, 3.0):
            plateau.step(loss)
        mgr.save(0)
    mgr, plateau = started()
    with mgr:
        assert changed(mgr.restore_latest().report) == {}
        assert plateau.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize("forged", [[], [{}], "x", [1, 2], {"$tensor": "state.0.step"}])
def test_forged_settings_that_were_given_are_damage(forged):
    optimizer = run()["optimizer"]
    with pytest.raises(CorruptCheckpointError, match="given"):
        saved_given("optimizer", {"given": forged}, len(optimizer.param_groups))


def test_a_setting_of_one_group_is_kept_by_its_number(tmp_path):
    live = run(decay=0.2)
    report = carry(run()["optimizer"], live["optimizer"], ignore_keys=["param_groups.1.weight_decay"])
    assert [group["weight_decay"] for group in live["optimizer"].param_groups] == [0.1, 0.2]
    assert "weight_decay: 0.1 (live 0.2)" in report.changed
    assert "weight_decay: 0.2 kept (saved 0.1) in groups 1" in report.changed


def test_of_schedulers_of_ones_own_the_arguments_are_settings():
    class Warmup(lr_scheduler.LRScheduler):
        def __init__(self, optimizer, steps):
            self.steps, self.calls = steps, 0
            super().__init__(optimizer)

        def get_lr(self):
            self.calls += 1
            return self.base_lrs

    saved, live = Warmup(run()["optimizer"], 5), Warmup(run()["optimizer"], 7)
    saved.calls = 99
    report = carry(saved, live)
    assert report.changed == ["steps: 5 (live 7)", "the live settings stay with ignore_keys=['it.steps']"]
    assert (live.steps, live.calls) == (5, 99)


class Counter:
    def __init__(self, n: int):
        self.state = {"n": n, "inner": {"a": n, "list": [n, {"b": n}]}, "gone": n}
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_ignore_keys_reach_into_the_state_of_any_object_and_ask_it_only_where_they_do():
    live = Counter(2)
    carry(Counter(1), live, ignore_keys=["other.*", "*.weight"])
    assert (live.asked, live.state["n"]) == (0, 1)
    live = Counter(2)
    del live.state["gone"]
    carry(Counter(1), live, ignore_keys=["it.n", "inner.list.1.b", "gone"])
    assert live.state == {"n": 2, "inner": {"a": 1, "list": [1, {"b": 2}]}}
