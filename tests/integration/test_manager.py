"""The rules of the manager: what a training loop may rely on."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import resource
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from checkpointer import CheckpointInfo, CheckpointManager, Config, PendingSave
from checkpointer.errors import (
    CheckpointerWarning,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    IncompatibleStateError,
    RunLockedError,
    RunNotEmptyError,
    SaveError,
    StepOrderError,
    UnsupportedStateError,
)
from checkpointer.storage import LocalStorage
from checkpointer.storage.local import LocalFile
from tests.support import processes
from tests.support.forge import flip

MakeManager = Callable[..., CheckpointManager]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[MakeManager]:
    """Makes managers of ``tmp_path/run`` and closes them; components default to one dict."""
    made: list[CheckpointManager] = []

    def make(config: Any = None, *, root: Any = tmp_path / "run", **keywords: Any) -> CheckpointManager:
        components = {"progress": {"seen": 0}}
        mgr = CheckpointManager(root, config=config, **{**components, **keywords})
        made.append(mgr)
        return mgr

    yield make
    for mgr in made:
        mgr.close()


def steps(mgr: CheckpointManager) -> list[int]:
    return [info.step for info in mgr.checkpoints()]


def saved(mgr: CheckpointManager, step: int, **keywords: Any) -> CheckpointInfo:
    handle = mgr.save(step, **keywords)
    assert handle is not None
    return handle.result(60)


def damage(info: CheckpointInfo, name: str = "index.json") -> None:
    path = Path(info.path) / name
    flip(path, path.stat().st_size // 2)


# ------------------------------------------------------------------------------------------------------ the basics


def test_an_empty_run_restores_nothing(manager: MakeManager) -> None:
    assert manager().restore_latest() is None


def test_without_rules_each_call_saves_and_everything_is_kept(manager: MakeManager) -> None:
    mgr = manager()
    for step in range(5):
        assert mgr.save(step) is not None
    mgr.wait()
    assert steps(mgr) == [0, 1, 2, 3, 4]


def test_save_returns_none_when_the_policy_says_that_nothing_is_due(manager: MakeManager) -> None:
    mgr = manager({"save": {"every_n_steps": 3}})
    handles = [mgr.save(step) for step in range(7)]
    assert [handle is not None for handle in handles] == [True, False, False, True, False, False, True]
    assert mgr.should_save(9)
    assert not mgr.should_save(10)
    mgr.wait()
    assert steps(mgr) == [0, 3, 6]


def test_every_n_epochs_saves_once_an_epoch_even_across_a_restart(manager: MakeManager) -> None:
    config = {"save": {"every_n_epochs": 2}}
    mgr = manager(config)
    taken = [step for step in range(12) if mgr.save(step, epoch=step // 3) is not None]
    assert taken == [0, 6]
    mgr.close()
    again = manager(config)
    assert again.restore_latest() is not None
    assert again.save(7, epoch=2) is None
    assert again.save(12, epoch=4) is not None


def test_the_time_rule_counts_from_the_newest_commit_on_disk(manager: MakeManager) -> None:
    config = {"save": {"every": "1h"}}
    mgr = manager(config)
    assert mgr.save(0) is not None
    assert mgr.save(1) is None
    mgr.close()
    again = manager(config)
    assert not again.should_save(2)
    again.restore_latest()
    assert again.save(2) is None


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_handle_is_done_at_the_durable_commit(manager: MakeManager, mode: str) -> None:
    mgr = manager({"write": {"mode": mode}})
    handle = mgr.save(3, epoch=1, metrics={"loss": np.float32(0.5), "n": torch.tensor(2)}, tags=["a", "a", "b"])
    assert isinstance(handle, PendingSave)
    assert handle.step == 3
    assert mode == "async" or handle.done()
    info = handle.result(60)
    assert handle.done()
    assert (info.step, info.epoch, info.metrics, info.tags) == (3, 1, {"loss": 0.5, "n": 2.0}, ("a", "b"))
    assert info.created.utcoffset() is not None
    assert info == mgr.latest()
    assert Path(info.path).is_dir()


def test_a_restore_brings_back_step_epoch_and_metrics(manager: MakeManager) -> None:
    progress: dict[str, Any] = {"seen": 7, "history": [1.5, float("nan")]}
    mgr = manager(progress=progress)
    saved(mgr, 4, epoch=2, metrics={"loss": 1.0})
    mgr.close()
    live: dict[str, Any] = {"seen": 0, "history": [], "surplus": 1}
    again = manager(progress=live)
    restored = again.restore_latest()
    assert restored is not None
    assert (restored.step, restored.epoch, restored.metrics, restored.skipped) == (4, 2, {"loss": 1.0}, ())
    assert live["seen"] == 7
    assert math.isnan(live["history"][1])
    assert "surplus" not in live
    assert "progress" in str(restored.report)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_is_written_is_the_state_at_the_save_call(manager: MakeManager, mode: str) -> None:
    weight = torch.zeros(300_000)
    mgr = manager({"write": {"mode": mode}}, weight=weight)
    for step in range(20):
        weight.fill_(step)
        mgr.save(step)
        weight.fill_(-1)
    mgr.wait()
    for step in range(20):
        mgr.restore(step)
        assert torch.equal(weight, torch.full_like(weight, step))


def test_random_generators_are_saved_without_being_asked_and_restored_last(manager: MakeManager) -> None:
    class Draws:
        """Loading it disturbs every generator, as building a module does."""

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            random.random()
            np.random.rand()
            torch.rand(3)

    mgr = manager(draws=Draws())
    saved(mgr, 0)
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())
    mgr.restore(0)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_attachments_are_stored_and_verified(manager: MakeManager, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("from a path")
    mgr = manager()
    info = saved(mgr, 0, files={"config.json": b"{}", "sub/notes.txt": tmp_path / "notes.txt"})
    assert (Path(info.path) / "files" / "config.json").read_bytes() == b"{}"
    assert (Path(info.path) / "files" / "sub" / "notes.txt").read_text() == "from a path"
    damage(info, "files/sub/notes.txt")
    assert not mgr.verify(0).ok
    with pytest.raises(CorruptCheckpointError, match=r"notes\.txt"):
        mgr.restore(0)


# ----------------------------------------------------------------------------------- lock, resume, order, branches


def test_a_second_manager_is_refused_by_name_and_may_read(manager: MakeManager) -> None:
    first, second = manager(), manager()
    saved(first, 0)
    with first:
        with pytest.raises(RunLockedError, match=r"by the manager made at \S+\.py:\d+, in this process, and its with"):
            second.restore_latest()
        with pytest.raises(RunLockedError):
            second.save(1)
        reader = manager(read_only=True)
        assert steps(reader) == [0]
        assert reader.restore_latest() is not None
    assert second.restore_latest() is not None


def test_the_constructor_takes_no_lock_and_writes_nothing(manager: MakeManager, tmp_path: Path) -> None:
    manager()
    manager()
    assert not (tmp_path / "run").exists()


def test_a_forgotten_resume_is_refused_and_can_be_allowed(manager: MakeManager) -> None:
    first = manager()
    saved(first, 5)
    first.close()
    second = manager()
    for step in (6, 7):  # a loop, or a notebook, that goes on after the error is refused again
        with pytest.raises(RunNotEmptyError, match=r"restore_latest\(\)"):
            second.save(step)
    assert steps(second) == [5]


def test_require_resume_false_starts_a_new_branch(manager: MakeManager) -> None:
    first = manager()
    saved(first, 5)
    first.close()
    second = manager({"require_resume": False})
    info = saved(second, 0)
    assert info.parent is None
    assert info.sequence == 2
    assert [item.step for item in second.checkpoints()] == [5, 0]


def test_a_run_that_holds_only_damaged_checkpoints_is_not_empty(manager: MakeManager) -> None:
    first = manager()
    damage(saved(first, 5), "manifest.json")
    first.close()
    with pytest.raises(RunNotEmptyError):
        manager().save(6)


def test_a_step_below_the_tip_is_an_error_even_when_nothing_is_due(manager: MakeManager) -> None:
    mgr = manager({"save": {"every_n_steps": 10}})
    mgr.save(20)
    with pytest.raises(StepOrderError, match="step 3 is below step 20"):
        mgr.save(3)
    mgr.wait()
    with pytest.raises(StepOrderError):
        mgr.save(10)
    assert steps(mgr) == [20]


def test_the_same_step_again_stands_is_returned_when_forced_or_replaced_when_asked(manager: MakeManager) -> None:
    progress = {"seen": 1}
    mgr = manager(progress=progress)
    first = mgr.save(4)
    assert first is not None
    assert mgr.save(4) is None
    again = mgr.save(4, force=True)
    assert again is not None
    assert again.result() == first.result()
    progress["seen"] = 2
    replaced = saved(mgr, 4, overwrite=True)
    assert replaced.sequence == 2
    assert steps(mgr) == [4]
    progress["seen"] = 3
    mgr.restore(4)
    assert progress["seen"] == 2


def test_force_saves_what_the_policy_would_not(manager: MakeManager) -> None:
    mgr = manager({"save": {"every_n_steps": 100}})
    assert mgr.save(7) is None
    assert saved(mgr, 7, force=True).step == 7


def test_after_a_rollback_saving_goes_on_and_the_abandoned_branch_is_replaced(manager: MakeManager) -> None:
    progress = {"branch": "a"}
    mgr = manager(progress=progress)
    ids = {step: saved(mgr, step).id for step in (100, 200, 300)}
    mgr.close()
    again = manager(progress=progress)
    again.restore(100)
    progress["branch"] = "b"
    info = saved(again, 200)
    assert info.parent == ids[100]
    assert info.sequence == 4
    again.wait()
    assert [(item.step, item.sequence) for item in again.checkpoints()] == [(100, 1), (300, 3), (200, 4)]
    latest = again.restore_latest()
    assert latest is not None
    assert latest.step == 200
    assert progress == {"branch": "b"}


def test_a_pinned_checkpoint_of_an_abandoned_branch_is_never_replaced(manager: MakeManager) -> None:
    progress = {"branch": "a"}
    mgr = manager(progress=progress)
    saved(mgr, 1)
    saved(mgr, 2)
    mgr.pin(2)
    mgr.restore(1)
    progress["branch"] = "b"
    info = saved(mgr, 2)
    assert [item.step for item in mgr.checkpoints()] == [1, 2, 2]
    assert info.path.endswith(f"checkpoint-2-{info.id[:8]}")
    mgr.restore(2)
    assert progress == {"branch": "b"}
    progress["branch"] = "c"
    mgr.restore_latest()
    assert progress == {"branch": "b"}


def test_the_first_save_is_refused_if_somebody_saved_since_the_restore(manager: MakeManager, tmp_path: Path) -> None:
    first = manager()
    saved(first, 1)
    first.close()
    second = manager()
    second.restore_latest()
    second._repository.lock.release()  # as on a file system whose locks do not work
    third = manager()
    third.restore_latest()
    saved(third, 2)
    third.close()
    for step in (2, 3):
        with pytest.raises(RunNotEmptyError, match="moved on"):
            second.save(step)
    assert steps(second) == [1, 2]


# ------------------------------------------------------------------------------------------------ errors that surface


def test_a_failed_background_save_is_raised_once_by_its_handle(manager: MakeManager, tmp_path: Path) -> None:
    mgr = manager()
    mgr.restore_latest()  # before it is there, or it would be told at once
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    handle = mgr.save(1)
    assert handle is not None
    with pytest.raises(SaveError, match=r"checkpoint-1 exists but is not a checkpoint"):
        handle.result()
    assert mgr.save(2) is not None
    mgr.close()
    assert steps(mgr) == [2]
    assert not list((tmp_path / "run" / ".checkpointer" / "tmp").iterdir())


def test_a_failed_background_save_that_nobody_asked_for_is_raised_by_the_next_save(
    manager: MakeManager, tmp_path: Path
) -> None:
    mgr = manager()
    mgr.restore_latest()  # before it is there, or it would be told at once
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    mgr.save(1)
    with pytest.raises(SaveError, match="checkpoint-1"):
        mgr.save(2)
    mgr.wait()
    assert steps(mgr) == [2]
    assert mgr.save(3) is not None


@pytest.mark.parametrize("call", ["wait", "close"])
def test_a_failed_background_save_is_raised_by(manager: MakeManager, tmp_path: Path, call: str) -> None:
    mgr = manager()
    mgr.restore_latest()  # before it is there, or it would be told at once
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    mgr.save(1)
    with pytest.raises(SaveError, match="checkpoint-1"):
        getattr(mgr, call)()
    getattr(mgr, call)()


def test_the_error_of_the_loop_is_not_masked_by_that_of_a_save(manager: MakeManager, tmp_path: Path) -> None:
    mgr = manager()
    mgr.restore_latest()  # before it is there, or it would be told at once
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    mgr.save(1)
    with pytest.raises(ZeroDivisionError) as caught, mgr:
        _ = 1 / 0
    assert isinstance(caught.value.__context__, SaveError)


def test_an_unsupported_value_is_named_and_nothing_is_written(manager: MakeManager, tmp_path: Path) -> None:
    progress: dict[str, Any] = {"seen": 1, "hooks": [print]}
    mgr = manager(progress=progress)
    with pytest.raises(UnsupportedStateError, match=r"hooks.*\[0\]"):
        mgr.save(0)
    assert steps(mgr) == []
    progress["hooks"] = []
    saved(mgr, 0)


def test_a_closed_manager_says_so_and_closing_twice_is_fine(manager: MakeManager) -> None:
    mgr = manager()
    mgr.close()
    mgr.close()
    for call in (lambda: mgr.save(0), mgr.restore_latest, mgr.wait, mgr.prune, mgr.__enter__):
        with pytest.raises(SaveError, match="closed"):
            call()


def test_a_read_only_manager_refuses_to_save(manager: MakeManager, tmp_path: Path) -> None:
    reader = manager(read_only=True)
    with pytest.raises(SaveError, match="read_only"):
        reader.save(0)
    with pytest.raises(SaveError, match="read_only"):
        reader.prune()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(manager: MakeManager, monkeypatch: Any) -> None:
    mgr = manager()
    saved(mgr, 0)
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 10)
    handle = mgr.save(1, force=True)
    assert handle is not None
    with pytest.raises(SaveError, match="10 bytes free"):
        handle.result()
    monkeypatch.undo()
    saved(mgr, 2)
    assert steps(mgr) == [0, 2]


@pytest.mark.parametrize(
    "keywords,message",
    [
        ({"step": -1}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": True}, "step"),
        ({"step": "1"}, "step"),
        ({"step": 1, "epoch": -1}, "epoch"),
        ({"step": 1, "metrics": {"loss": "low"}}, "metric 'loss'"),
        ({"step": 1, "metrics": {"loss": torch.zeros(2)}}, "metric 'loss'"),
        ({"step": 1, "metrics": [1]}, "metrics"),
        ({"step": 1, "tags": "final"}, "tags"),
        ({"step": 1, "files": {"../evil": b""}}, "evil"),
        ({"step": 1, "files": {"/abs": b""}}, "abs"),
        ({"step": 1, "files": {"a": 3}}, "bytes or a path"),
    ],
)
def test_nonsense_arguments_are_explained(manager: MakeManager, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manager().save(**keywords)


@pytest.mark.parametrize(
    "components,message",
    [({"rng": {}}, "rng"), ({"a b": {}}, "a b"), ({"Loader": {}, "loader": {}}, "case")],
)
def test_component_names_that_cannot_be_files_are_refused(
    tmp_path: Path, components: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointManager(tmp_path, **components)


@pytest.mark.parametrize("component", [None, 3, "text", (1, 2), frozenset()])
def test_components_that_cannot_be_restored_in_place_are_refused(tmp_path: Path, component: object) -> None:
    with pytest.raises(UnsupportedStateError, match="thing"):
        CheckpointManager(tmp_path, thing=component)


def test_a_config_may_be_a_path_a_mapping_or_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("save: {every_n_steps: 2}\n")
    for config in (
        tmp_path / "c.yaml",
        str(tmp_path / "c.yaml"),
        {"save": {"every_n_steps": 2}},
        Config.from_mapping({"save": {"every_n_steps": 2}}),
    ):
        mgr = CheckpointManager(tmp_path / "run", config=config)
        assert not mgr.should_save(1)
        assert mgr.should_save(2)
    with pytest.raises(ConfigError, match="int"):
        CheckpointManager(tmp_path / "run", config=3)  # type: ignore[arg-type]  # the point of the test


# ------------------------------------------------------------------------------------------------- restore and damage


def test_restore_latest_falls_back_past_damage_and_says_why(manager: MakeManager) -> None:
    progress = {"seen": 0}
    mgr = manager(progress=progress)
    infos = []
    for step in range(4):
        progress["seen"] = step
        infos.append(saved(mgr, step))
    damage(infos[3], "state.safetensors" if (Path(infos[3].path) / "state.safetensors").exists() else "index.json")
    damage(infos[2], "manifest.json")
    with pytest.warns(CheckpointerWarning, match="skipping a damaged checkpoint"):
        restored = mgr.restore_latest()
    assert restored is not None
    assert restored.step == 1
    assert progress["seen"] == 1
    assert sorted(item.step for item in restored.skipped) == [2, 3]
    assert all("damaged" in item.reason or "hash" in item.reason for item in restored.skipped)
    assert [info.damaged is not None for info in mgr.checkpoints()] == [False, False, True]


def test_a_run_with_nothing_but_damage_is_an_error_and_not_an_empty_run(manager: MakeManager) -> None:
    mgr = manager()
    for step in (500, 1000):
        damage(saved(mgr, step))
    with (
        pytest.warns(CheckpointerWarning, match="damaged"),
        pytest.raises(CorruptCheckpointError, match=r"no valid checkpoint in .* \(2 damaged: 1000, 500\).*verify"),
    ):
        mgr.restore_latest()


def test_damaged_checkpoints_never_push_out_good_ones(manager: MakeManager) -> None:
    config = {"keep": {"last": 2}}
    mgr = manager(config)
    infos = [saved(mgr, step) for step in (0, 1)]
    damage(infos[1])
    with pytest.warns(CheckpointerWarning, match="damaged"):
        mgr.restore_latest()
    saved(mgr, 2)
    mgr.wait()
    mgr._saver.wait()
    assert steps(mgr) == [0, 1, 2]


def test_restoring_an_unknown_step_names_those_there_are(manager: MakeManager) -> None:
    mgr = manager()
    saved(mgr, 5)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 6 .*there are 5"):
        mgr.restore(6)


def test_a_structural_mismatch_changes_no_live_object(manager: MakeManager) -> None:
    model = nn.Linear(4, 4)
    progress = {"seen": 1}
    mgr = manager(progress=progress, model=model)
    saved(mgr, 0)
    mgr.close()
    other = nn.Linear(4, 5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    live = {"seen": 9}
    rng = torch.get_rng_state()
    again = manager(progress=live, model=other)
    with pytest.raises(IncompatibleStateError, match="weight"):
        again.restore_latest()
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert live == {"seen": 9}
    assert torch.equal(rng, torch.get_rng_state())


def test_unregistered_components_are_an_error_for_a_trainer_and_fine_for_a_reader(
    manager: MakeManager, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    mgr = manager(model=model)
    saved(mgr, 0)
    mgr.close()
    expected = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    trainer = CheckpointManager(tmp_path / "run", model=model)
    with pytest.raises(IncompatibleStateError, match="progress"):
        trainer.restore_latest()
    trainer.close()
    assert not model.weight.any()
    rng = torch.get_rng_state()
    reader = CheckpointManager(tmp_path / "run", read_only=True, model=model)
    restored = reader.restore_latest()
    assert restored is not None
    assert restored.report.unexpected == ["progress", "rng"]
    assert torch.equal(model.weight, expected)
    assert torch.equal(rng, torch.get_rng_state())


def test_named_components_alone_are_restored(manager: MakeManager) -> None:
    model, progress = nn.Linear(2, 2), {"seen": 1}
    mgr = manager(model=model, progress=progress)
    saved(mgr, 0)
    expected = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    progress["seen"] = 5
    state = torch.get_rng_state()
    mgr.restore(0, components=["model"])
    assert torch.equal(model.weight, expected)
    assert progress == {"seen": 5}
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ConfigError, match="nothing"):
        mgr.restore(0, components=["nothing"])
    with pytest.raises(TypeError, match="'component'"):
        mgr.restore(0, component=["model"])  # type: ignore[call-arg]  # the point of the test


def test_verify_before_leaves_live_objects_alone_when_content_is_damaged(manager: MakeManager) -> None:
    model = nn.Linear(64, 64)
    mgr = manager({"restore": {"verify": "before"}}, model=model)
    damage(saved(mgr, 0), "model.safetensors")
    with torch.no_grad():
        model.weight.fill_(3)
    with pytest.raises(CorruptCheckpointError, match="model"):
        mgr.restore(0)
    assert bool((model.weight == 3).all())


def test_tensors_are_read_into_the_live_memory(manager: MakeManager) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    mgr = manager(model=model, optimizer=optimizer)
    saved(mgr, 0)
    tensors = [model.weight, optimizer.state[model.weight]["exp_avg"]]
    pointers = [tensor.data_ptr() for tensor in tensors]
    expected = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    mgr.restore(0)
    now = [model.weight, optimizer.state[model.weight]["exp_avg"]]
    assert [tensor.data_ptr() for tensor in now] == pointers
    assert all(torch.equal(a, b) for a, b in zip(now, expected, strict=True))


# --------------------------------------------------------------------------------------------- retention, pins, best


def test_nothing_is_deleted_before_the_own_commit_is_durable(manager: MakeManager, tmp_path: Path) -> None:
    mgr = manager()
    for step in range(3):
        saved(mgr, step)
    mgr.close()
    again = manager({"keep": {"last": 1}})
    again.restore(0)
    assert [info.step for info, _ in again.prune(dry_run=True).remove] == [1]
    assert steps(again) == [0, 1, 2]
    again.prune()
    assert steps(again) == [0, 2]
    saved(again, 3)
    again.close()
    assert steps(again) == [3]


def saved_and_pruned(mgr: CheckpointManager, step: int) -> None:
    saved(mgr, step)
    mgr._saver.wait()


def test_pins_and_annotations_come_from_any_process_and_retention_sees_them(manager: MakeManager) -> None:
    mgr = manager({"keep": {"last": 1, "best": {"k": 1, "monitor": "score", "mode": "max"}}})
    saved(mgr, 0)
    with pytest.warns(CheckpointerWarning, match="'score', which no checkpoint has reported"):
        saved_and_pruned(mgr, 1)
    reader = manager(read_only=True)
    reader.annotate(1, metrics={"score": 0.9}, tags=["good"], note="looks fine")
    saved(mgr, 2, metrics={"score": 0.1})
    saved(mgr, 3, metrics={"score": float("nan")})
    mgr._saver.wait()
    reader.pin(3)
    saved(mgr, 4)
    mgr._saver.wait()
    assert steps(mgr) == [1, 3, 4]
    best = mgr.best()
    assert best is not None
    assert (best.step, best.metrics, best.tags, best.note) == (1, {"score": 0.9}, ("good",), "looks fine")
    restored = mgr.restore_best()
    assert restored.step == 1
    with pytest.raises(CheckpointNotFoundError):
        reader.pin(77)


def test_unpin_takes_a_pin_back(manager: MakeManager) -> None:
    mgr = manager({"keep": {"last": 1}})
    first = saved(mgr, 0)
    mgr.pin(first)
    saved(mgr, 1)
    mgr._saver.wait()
    assert steps(mgr) == [0, 1]
    mgr.unpin(0)
    plan = mgr.prune()
    assert [info.step for info, _ in plan.remove] == [0]
    assert "last 1" in str(plan)
    assert steps(mgr) == [1]


def test_best_on_a_metric_that_was_never_reported_warns(manager: MakeManager) -> None:
    mgr = manager()
    saved(mgr, 0, metrics={"loss": 1.0})
    with pytest.warns(CheckpointerWarning, match=r"'acc'.*reported were loss"):
        assert mgr.best("acc") is None
    with pytest.raises(ConfigError, match="name a metric"):
        mgr.best()
    with pytest.warns(CheckpointerWarning), pytest.raises(CheckpointNotFoundError):
        mgr.restore_best("acc")


# ------------------------------------------------------------------------------------------ signals, forks, processes


def test_a_signal_forces_one_durable_save_and_then_asks_to_stop(manager: MakeManager) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    calls: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        mgr = manager({"save": {"every_n_steps": 1000, "on_signal": ["SIGUSR1"]}})
        assert mgr.save(1) is None
        assert not mgr.stop_requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert mgr.stop_requested()
        assert not mgr.should_stop()
        handle = mgr.save(2)
        assert handle is not None
        assert handle.done()
        assert mgr.should_stop()
        assert calls == [signal.SIGUSR1]
        mgr.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_on_signal_warns(tmp_path: Path) -> None:
    caught: list[Any] = []

    def make() -> None:
        with pytest.warns(CheckpointerWarning, match="main thread") as record:
            CheckpointManager(tmp_path, config={"save": {"on_signal": "SIGUSR1"}})
        caught.extend(record)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert caught


def test_a_forked_child_cannot_use_the_manager_of_its_parent(manager: MakeManager) -> None:
    mgr = manager()
    saved(mgr, 0)
    child = os.fork()
    if child == 0:  # pragma: no cover
        refused = 0
        for call in (lambda: mgr.save(1), mgr.prune, mgr.restore_latest, mgr.wait):
            try:
                call()
            except SaveError as error:
                refused += "forked child" in str(error)
        mgr.close()
        os._exit(0 if refused == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    saved(mgr, 1)
    assert steps(mgr) == [0, 1]


def test_a_script_that_ends_during_a_save_still_commits_it(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from checkpointer import CheckpointManager
        mgr = CheckpointManager(sys.argv[1], big=torch.ones(20_000_000))
        mgr.save(1)
    """
    processes.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True)
    reader = CheckpointManager(tmp_path, read_only=True)
    assert steps(reader) == [1]
    assert reader.verify().ok


def test_a_second_save_waits_for_the_first_and_says_so(manager: MakeManager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="checkpointer")
    mgr = manager(big=torch.ones(30_000_000))
    first, second = mgr.save(1), mgr.save(2)
    assert first is not None
    assert first.done()
    assert second is not None
    second.result(60)
    assert "waiting for the save of step 1" in caplog.text


def test_save_is_cheap_when_nothing_is_due(manager: MakeManager) -> None:
    mgr = manager({"save": {"every_n_steps": 10**6}})
    mgr.save(1)
    opened: list[str] = []
    active = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if active and event == "open" else None)
    began = time.perf_counter()
    for step in range(2, 2002):
        assert mgr.save(step) is None
    active = False
    assert opened == []
    assert time.perf_counter() - began < 5


# --------------------------------------------------------------------------------- found by trying to break things


def test_components_named_like_files_of_the_format_do_not_collide(manager: MakeManager) -> None:
    big = {name: torch.full((300_000,), float(number)) for number, name in enumerate(("state", "state_", "index"))}
    expected = {name: tensor.clone() for name, tensor in big.items()}
    mgr = manager(manifest={"x": torch.ones(3)}, **big)
    info = saved(mgr, 0)
    assert (Path(info.path) / "component-state.safetensors").exists()
    for tensor in big.values():
        tensor.zero_()
    mgr.restore(0)
    assert all(torch.equal(big[name], expected[name]) for name in big)


def test_more_attachments_than_a_process_may_open_files_are_restored(manager: MakeManager) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    mgr = manager()
    saved(mgr, 0, files={f"{number}": b"x" for number in range(300)})
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        assert mgr.restore_latest() is not None
        assert mgr.verify().ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_manifest_that_would_be_too_large_is_refused_and_nothing_is_left(
    manager: MakeManager, tmp_path: Path
) -> None:
    mgr = manager()
    handle = mgr.save(0, tags=[f"{number}-{'x' * 100}" for number in range(900)])
    assert handle is not None
    with pytest.raises(SaveError, match="shorter metrics or tags"):
        handle.result()
    assert not list((tmp_path / "run" / ".checkpointer" / "tmp").iterdir())
    info = saved(mgr, 1, files={f"{number}-{'x' * 100}": b"" for number in range(900)})
    assert (Path(info.path) / "manifest.json").stat().st_size < 4096


def test_a_block_that_cannot_be_read_in_one_manifest_costs_one_checkpoint(
    manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    mgr = manager()
    for step in (0, 1):
        saved(mgr, step)
    read_into = LocalFile.read_into

    def fail(self: LocalFile, offset: int, view: memoryview) -> None:
        if "checkpoint-1/manifest" in self._place:
            raise OSError(errno.EIO, "Input/output error")
        read_into(self, offset, view)

    monkeypatch.setattr(LocalFile, "read_into", fail)
    with pytest.warns(CheckpointerWarning, match="cannot be read"):
        restored = mgr.restore_latest()
    assert restored is not None
    assert restored.step == 0


def test_a_file_system_that_rejects_its_options_does_not_leak_them(tmp_path: Path) -> None:
    import fsspec

    class Picky(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
        protocol = "picky"

        def __init__(self, token: str) -> None:
            raise ValueError(f"bad token {token}")

    fsspec.register_implementation("picky", Picky, clobber=True)
    with pytest.raises(ConfigError, match=r"bad token \*\*\*") as caught:
        CheckpointManager("picky://bucket/run", storage_options={"token": "sesame-open"})
    assert "sesame" not in str(caught.value)
    with pytest.raises(ConfigError, match="unexpected keyword"):
        CheckpointManager("picky://bucket/run", storage_options={"tokem": "sesame-open"})


def test_an_epoch_rule_without_epochs_is_pointed_out_once(manager: MakeManager) -> None:
    mgr = manager({"save": {"every_n_epochs": 1}})
    with pytest.warns(CheckpointerWarning, match=r"every_n_epochs.*epoch=") as caught:
        handles = [mgr.save(step) for step in range(3)]
    assert handles == [None, None, None]
    assert len(caught) == 1


def test_a_loader_that_does_not_fit_is_found_before_anything_is_changed(manager: MakeManager) -> None:
    from torch.utils.data import DataLoader

    from checkpointer.data import ResumableLoader

    model = nn.Linear(2, 2)
    mgr = manager(model=model, loader=ResumableLoader(DataLoader(range(8), batch_size=2)))
    saved(mgr, 0)
    mgr.close()
    other = nn.Linear(2, 2)
    before = other.weight.detach().clone()
    again = manager(model=other, loader=ResumableLoader(DataLoader(range(8), batch_size=4)))
    with pytest.raises(IncompatibleStateError, match="batch_size: saved 2, live 4"):
        again.restore_latest()
    assert torch.equal(other.weight, before)
