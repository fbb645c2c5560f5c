"""A disk that is full for any rank: all try again together once something was removed, or all fail with one error."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage, wrapping
from checkpointer.testing import Fault, faulty
from tests.integration.save.test_space import SmallDisk
from tests.support.ranks import run

SIZE = 400_000
"""Bytes of the state, half of them on each of two ranks."""


def steps(root: Path) -> list[int]:
    return [info.step for info in Repository(open_storage(root)).list_checkpoints().checkpoints]


def nothing_left(root: Path) -> None:
    assert os.listdir(root / ".checkpointer" / "tmp") == []
    assert Repository(open_storage(root)).verify_all().ok


def halves(value: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = torch.full((SIZE // 4 // dist.get_world_size(),), value)
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


def four_checkpoints(root: str) -> None:
    with CheckpointManager(root, state={"w": halves(0.0)}) as mgr:
        for step in range(4):
            mgr.save(step)


def saved_on_a_full_disk(root: str, config: dict[str, Any], fault: dict[str, Any]) -> list[Any]:
    """After four saves, step 4 where ``fault`` happens on one rank, then step 5: what is told of either."""
    four_checkpoints(root)
    failing = fault.pop("rank")
    happens = Fault("ENOSPC", **fault)
    state = {"w": halves(0.0)}
    with faulty(happens):
        mgr = CheckpointManager(root, config=config, state=state)
    happens.end()
    mgr.restore_latest()
    happens.restart()
    if dist.get_rank() != failing:
        happens.end()
    told = [_saved(mgr, 4, state["w"])]
    dist.barrier()
    happens.end()
    told.append(_saved(mgr, 5, state["w"]))
    mgr.close()
    return [*told, happens.hits]


def _saved(mgr: CheckpointManager, step: int, tensor: DTensor) -> Any:
    tensor.to_local().fill_(step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what goes wrong here
            handle = mgr.save(step)
        if handle is None:
            return "left out"
        handle.result(60)
    except SaveError as error:
        return [type(error).__name__, error.errno, str(error)]
    finally:
        tensor.to_local().fill_(-1)
    return None


DATA = {"on": ["write"], "path": "*.safetensors"}
PRUNE = {"write": {"on_full": "prune"}, "keep": {"last": 2}}


@pytest.mark.parametrize(
    "mode,fault",
    [
        ("sync", {"rank": 1, **DATA}),
        ("async", {"rank": 0, "on": ["write"], "path": "*/index.json"}),  # once every rank has written
        ("async", {"rank": 0, **DATA}),
        ("async", {"rank": 1, **DATA}),
    ],
    ids=["rank 1", "the index", "rank 0 in the background", "rank 1 in the background"],
)
@pytest.mark.thorough(lambda mode, fault: mode == "async" and fault["path"] == "*.safetensors")
def test_where_a_rank_has_no_room_retention_is_applied_and_all_ranks_write_again(tmp_path, mode, fault):
    config = {**PRUNE, "write": {"on_full": "prune", "mode": mode}}
    for rank, (fourth, fifth, hits) in enumerate(run(2, saved_on_a_full_disk, str(tmp_path), config, dict(fault))):
        assert fourth is None
        assert fifth is None
        assert hits == (rank == fault["rank"])
    assert steps(tmp_path) == [4, 5]
    nothing_left(tmp_path)
    state = {"w": torch.zeros(SIZE // 4)}
    with CheckpointManager(tmp_path, read_only=True, state=state) as mgr:
        mgr.restore(4)
    assert set(state["w"].tolist()) == {4.0}


@pytest.mark.parametrize("keep", [{"last": 4}, {}])
def test_where_nothing_may_be_removed_all_fail_with_one_error_that_names_the_rank_and_says_what_to_do(tmp_path, keep):
    config = {"write": {"on_full": "prune"}, "keep": keep}
    told = run(2, saved_on_a_full_disk, str(tmp_path), config, {"rank": 1, "forever": True, **DATA})
    (kind, number, text), _, hits = told[1]
    assert told[0][0] == [kind, number, text]
    assert (kind, number) == ("SaveError", errno.ENOSPC)
    assert "there is no room for it: rank 1 of 2: OSError: [Errno 28]" in text
    assert "keep fewer checkpoints" in text
    assert hits == 1  # nothing was freed, so nothing is tried again
    assert [row[1] for row in told] == [None, None]
    assert steps(tmp_path) == ([1, 2, 3, 5] if keep else [0, 1, 2, 3, 5])
    nothing_left(tmp_path)


def test_it_is_tried_again_once_and_a_disk_that_stays_full_fails_all_ranks(tmp_path):
    told = run(2, saved_on_a_full_disk, str(tmp_path), PRUNE, {"rank": 0, "forever": True, **DATA})
    assert told[0][0] == told[1][0]
    assert "rank 0 of 2: OSError: [Errno 28]" in told[1][0][2]
    assert told[0][2] == 2
    assert [row[1] for row in told] == [None, None]
    assert steps(tmp_path) == [3, 5]  # what retention let go is gone, and the newest is not
    nothing_left(tmp_path)


def test_a_save_that_is_left_out_on_one_rank_is_left_out_on_all(tmp_path):
    config = {"write": {"on_full": "skip", "mode": "sync"}}
    told = run(2, saved_on_a_full_disk, str(tmp_path), config, {"rank": 1, **DATA})
    assert [row[:2] for row in told] == [["left out", None]] * 2
    assert steps(tmp_path) == [0, 1, 2, 3, 5]
    nothing_left(tmp_path)


def lazily(root: str) -> list[Any]:
    """Save from live memory where the disk of rank 1 is full and something may be removed, and save again.

    What is told of either save, and the steps that there are after the first.
    """
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)))
    optimizer = torch.optim.AdamW(model.parameters())
    full = Fault("ENOSPC", on=["write"], path="*.safetensors")
    full.end()
    with faulty(full):
        mgr = CheckpointManager(root, config={"write": {"mode": "lazy"}}, model=model, optimizer=optimizer)
    for step in range(3):
        mgr.save(step).result()
        model(torch.ones(2, 40)).sum().backward()
        optimizer.step()
    mgr.close()
    config = {"write": {"mode": "lazy", "on_full": "prune"}, "keep": {"last": 1}}
    with faulty(full):
        mgr = CheckpointManager(root, config=config, model=model, optimizer=optimizer)
    mgr.restore_latest()
    if dist.get_rank() == 1:
        full.restart()
    told: list[Any] = []
    for step in (3, 4):
        try:
            mgr.save(step).result()
            told.append("")
        except SaveError as error:
            told.append(str(error))
        told.append(steps(Path(root)))
    mgr.close()
    return told


def test_what_was_written_from_live_memory_is_not_written_again_but_fails_on_all_ranks(tmp_path):
    first, second = run(2, lazily, str(tmp_path))
    assert first[0] == second[0]
    assert "there is no room for it: rank 1 of 2" in first[0]
    assert first[1] == second[1] == [2]  # room is made all the same, for the next one
    assert first[2] == second[2] == ""
    assert steps(tmp_path) == [4]
    nothing_left(tmp_path)


def announced(root: str) -> list[Any]:
    """Save where the disk says beforehand that it has no room, and retention would let two checkpoints go."""
    four_checkpoints(root)
    disk = SmallDisk(Path(root))
    state = {"w": halves(0.0)}
    with wrapping(lambda _: disk):
        mgr = CheckpointManager(root, config=PRUNE, state=state)
    mgr.restore_latest()
    disk.capacity = 0
    disk.capacity = 1000 - disk.left
    found = _saved(mgr, 4, state["w"])
    mgr.close()
    return [found]


def test_where_the_disk_says_beforehand_that_it_is_full_room_is_made_before_anything_is_written(tmp_path):
    assert run(2, announced, str(tmp_path)) == [[None]] * 2
    assert steps(tmp_path) == [3, 4]
    nothing_left(tmp_path)
