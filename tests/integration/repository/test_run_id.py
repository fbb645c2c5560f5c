"""The id of the run, and the rules: every manifest of a run root says them, whoever has written it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.dcp import SafetensorsWriter
from checkpointer.format.manifest import Manifest
from checkpointer.migration import import_checkpoint
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.support.forge import forge_manifest

RULES = {"save": {"every_n_steps": 1}, "keep": {"last": 9, "best": {"monitor": "loss"}}}


def manager(root: Path) -> CheckpointManager:
    return CheckpointManager(root, config={**RULES, "write": {"mode": "sync", "durable": False}}, model=nn.Linear(2, 2))


def manifests(root: Path) -> dict[int, Manifest]:
    repository = Repository(open_storage(root))
    return {info.step: repository.manifest(info) for info in repository.list_checkpoints().checkpoints}


def test_whoever_writes_to_a_run_root_gives_it_the_id_of_the_run(tmp_path):
    root = tmp_path / "run"
    import_checkpoint({"model": nn.Linear(2, 2).state_dict()}, root, step=1)
    with manager(root) as first:
        first.restore_latest(components=["model"])
        first.save(2)
        first.save(3)
        first.save(3, overwrite=True)
    with manager(root) as branch:
        branch.restore(2)
        branch.save(3)
        branch.save(4)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": torch.zeros(3)}, storage_writer=SafetensorsWriter(str(root / "checkpoint-5")))
    import_checkpoint({"model": nn.Linear(2, 2).state_dict()}, root, step=6, append=True)
    with manager(tmp_path / "other") as other:
        other.save(1)

    found = manifests(root)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    (run,) = {manifest.run for manifest in found.values()}
    assert run is not None
    assert manifests(tmp_path / "other")[1].run not in (None, run)
    written = {"save": {"every_n_steps": 1}, "keep": {"last": 9, "best": [{"monitor": "loss", "k": 1, "mode": "min"}]}}
    assert {step: manifest.rules for step, manifest in found.items()} == {
        step: written if step in (2, 3, 4) else {} for step in found
    }


def test_the_newest_checkpoint_that_has_a_run_id_decides(tmp_path):
    with manager(tmp_path) as first:
        for step in (1, 2, 3):
            first.save(step)
    forge_manifest(tmp_path / "checkpoint-1", lambda fields: fields.update(run="1" * 32))
    forge_manifest(tmp_path / "checkpoint-2", lambda fields: fields.update(run="2" * 32))
    forge_manifest(tmp_path / "checkpoint-3", lambda fields: fields.pop("run") and None)
    with manager(tmp_path) as second:
        second.restore_latest()
        second.save(4)

    assert manifests(tmp_path)[4].run == "2" * 32


def test_no_second_id_is_given_while_the_checkpoint_that_has_the_first_cannot_be_read(tmp_path):
    root = tmp_path / "run"
    with manager(root) as first:
        first.save(1)
    run = manifests(root)[1].run
    (root / "checkpoint-1").rename(tmp_path / "elsewhere")
    (root / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    with CheckpointManager(root, config={"require_resume": False}, model=nn.Linear(2, 2)) as second:
        second.save(2)
        second.wait()
        assert manifests(root)[2].run is None
        (root / "checkpoint-1").unlink()
        (tmp_path / "elsewhere").rename(root / "checkpoint-1")
        second.save(3)

    assert manifests(root)[3].run == run


def test_the_id_of_the_run_is_read_once_for_as_long_as_the_lock_is_held(tmp_path, monkeypatch):
    read: list[str] = []
    look = Repository.manifest
    with manager(tmp_path) as first:
        first.save(1)
    with manager(tmp_path) as second:
        second.restore_latest()
        second.save(2)
        monkeypatch.setattr(Repository, "manifest", lambda self, info: read.append(info.path) or look(self, info))
        second.save(3)
        second.save(4)

    assert read == []
