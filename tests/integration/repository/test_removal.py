"""What removing a checkpoint takes with it, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning
from tests.conftest import Root

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}


def state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((3,), float(value))}


def manager(root: Root, live: dict[str, Any], **config: Any) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=live)


def test_pruning_a_copy_from_an_object_store_frees_its_space(memory, tmp_path):
    live = state(1)
    with manager(memory, live) as mgr:
        mgr.save(1)
    source = mgr._repository.storage
    for path in source.fs.find(source._path):
        copy = tmp_path / "run" / path.removeprefix(source._path).lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.fs.cat_file(path))
    with manager(Root("local", str(tmp_path / "run")), live, keep={"last": 1}) as mgr:
        assert mgr.restore_latest() is not None
        mgr.save(2)
    assert [info.step for info in mgr.checkpoints()] == [2]
    assert not (tmp_path / "run" / "checkpoint-1").exists()
    assert not (tmp_path / "run" / ".checkpointer" / "quarantine").exists()


def test_a_checkpoint_that_was_unpinned_goes_by_retention_and_not_by_recovery(local):
    with manager(local, state(1)) as mgr:
        mgr.save(1)
        mgr.save(2)
        mgr.wait()
        mgr.pin(2)
        mgr.restore(1)
        mgr.save(2)
        mgr.wait()
        pinned = next(info for info in mgr.checkpoints() if info.pinned)
        mgr.unpin(pinned)
    with manager(local, state(1)) as mgr:
        mgr.restore_latest()
        assert [info.step for info in mgr.checkpoints()] == [1, 2, 2]
    with manager(local, state(1), keep={"last": 1}) as mgr:
        mgr.restore_latest()
        mgr.save(3)
    assert [info.step for info in mgr.checkpoints()] == [3]


def test_a_crash_in_the_middle_of_a_replacement_costs_no_foreign_file(local, monkeypatch):
    """The process dies right after the old manifest is unlinked: what is left must not look like our own leftovers."""
    from checkpointer.storage import LocalStorage

    with manager(local, state(1)) as mgr:
        mgr.save(1)
    foreign = Path(local.url) / "checkpoint-1" / "mine.txt"
    foreign.write_text("precious")
    mgr = manager(local, state(2))
    mgr.restore_latest()
    remove = LocalStorage.remove

    def die_after_the_manifest(self: LocalStorage, path: str) -> None:
        remove(self, path)
        if path.endswith("manifest.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "remove", die_after_the_manifest)
    with pytest.raises(KeyboardInterrupt), pytest.warns(CheckpointerWarning, match="quarantine"):
        mgr.save(1, overwrite=True)
    monkeypatch.undo()
    mgr.close()
    with manager(local, state(0)) as after:
        assert after.restore_latest() is not None
    assert [path.read_text() for path in Path(local.url).rglob("mine.txt")] == ["precious"]
