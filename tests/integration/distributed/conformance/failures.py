"""One save after another, and those that fail."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import checkpointer.dcp
from checkpointer.dcp import SafetensorsReader, SafetensorsWriter
from checkpointer.repository.notes import Note
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.integration.distributed.conformance.calls import (
    TABLE,
    Case,
    Failing,
    FailingReader,
    fails,
    load,
    save,
    steps,
)
from tests.integration.distributed.conformance.sharding import SHARDINGS, holds, sharded


def a_checkpoint_is_replaced_at_once_and_only_by_a_whole_one(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"t": TABLE}, path)
    save({"t": TABLE + 1}, path)
    with fails("the disk is full", ranks=[1]):
        dcp.save({"t": TABLE + 2}, storage_writer=Failing("write_data", 1, path))
    state = {"t": torch.zeros(10, 20)}
    load(state, path)
    assert torch.equal(state["t"], TABLE + 1)
    save({"t": TABLE}, f"{root}/checkpoint-2")
    assert steps(root) == [1, 2]


def a_pinned_checkpoint_is_never_replaced(root: str) -> None:
    save({"t": TABLE}, f"{root}/checkpoint-1")
    repository = Repository(open_storage(root))
    if dist.get_rank() == 0:
        repository.note(repository.find(1), Note(pinned=True))
    dist.barrier()
    with fails("checkpoint-1 is pinned", ranks=[0]):
        save({"t": TABLE + 1}, f"{root}/checkpoint-1")
    state = {"t": torch.zeros(10, 20)}
    load(state, f"{root}/checkpoint-1")
    assert torch.equal(state["t"], TABLE)
    save({"t": TABLE}, f"{root}/checkpoint-2")
    assert steps(root) == [1, 2]


def one_writer_and_one_reader_serve_many_times(root: str) -> None:
    writer, reader = SafetensorsWriter(f"{root}/checkpoint-1"), SafetensorsReader(f"{root}/checkpoint-1")
    dcp.save({"t": TABLE}, storage_writer=writer)
    for step in (2, 3):
        dcp.save({"t": TABLE + step}, storage_writer=writer, checkpoint_id=f"{root}/checkpoint-{step}")
    state = {"t": torch.zeros(10, 20)}
    dcp.load(state, storage_reader=reader)
    assert torch.equal(state["t"], TABLE)
    for step in (3, 2):
        dcp.load(state, storage_reader=reader, checkpoint_id=f"{root}/checkpoint-{step}")
        assert torch.equal(state["t"], TABLE + step)
    assert steps(root) == [1, 2, 3]


def a_rank_alone_may_save_and_load(root: str) -> None:
    mine = f"{root}/{dist.get_rank()}/checkpoint-1"
    save({"t": TABLE + dist.get_rank()}, mine, no_dist=True)
    state = {"t": torch.zeros(10, 20)}
    load(state, mine, no_dist=True)
    assert torch.equal(state["t"], TABLE + dist.get_rank())


EVERY_RANK = ("set_up_storage_writer", "prepare_local_plan", "write_data")
COORDINATOR = ("prepare_global_plan", "finish")


def a_save_that_fails_anywhere_fails_on_all_ranks_and_commits_nothing(root: str) -> None:
    ranks = range(dist.get_world_size() if dist.is_initialized() else 1)
    stages = [(stage, rank) for stage in EVERY_RANK for rank in ranks] + [(stage, 0) for stage in COORDINATOR]
    kept = []  # a program may keep the writer, and so what it holds
    tensor = sharded(SHARDINGS["halves"], TABLE) if dist.is_initialized() else TABLE
    for stage, rank in stages:
        for late in (False, True) if stage != "finish" else (False,):
            kept.append(Failing(stage, rank, f"{root}/checkpoint-1", late=late))
            with fails("the disk is full", ranks=[rank]):
                dcp.save({"t": tensor, "n": 1}, storage_writer=kept[-1])
            assert not Repository(open_storage(root)).list_checkpoints().checkpoints
    save({"t": TABLE}, f"{root}/checkpoint-2")
    assert steps(root) == [2]


@pytest.mark.filterwarnings("ignore:.*deprecated")
def any_rank_may_coordinate(root: str) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save_state_dict

    state = {"t": sharded(SHARDINGS["halves"], TABLE)}
    for stage in COORDINATOR:
        with fails("the disk is full", ranks=[1]):
            save_state_dict(state, Failing(stage, 1, f"{root}/checkpoint-1"), coordinator_rank=1)
    save_state_dict(state, SafetensorsWriter(f"{root}/checkpoint-1"), coordinator_rank=1)
    found = {"t": sharded(SHARDINGS["columns"], torch.zeros(10, 20))}
    load_state_dict(found, SafetensorsReader(f"{root}/checkpoint-1"), coordinator_rank=1)
    assert holds(found["t"], TABLE)
    assert steps(root) == [1]


def a_load_that_fails_anywhere_fails_on_all_ranks(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"t": TABLE}, path)
    ranks = range(dist.get_world_size() if dist.is_initialized() else 1)
    stages = ("set_up_storage_reader", "prepare_local_plan", "read_data", "read_metadata")
    for stage, rank in [*((stage, rank) for stage in stages for rank in ranks), ("prepare_global_plan", 0)]:
        for late in (False, True):
            with fails("the disk is full", ranks=[rank]):
                dcp.load({"t": torch.zeros(10, 20)}, storage_reader=FailingReader(stage, rank, path, late=late))
    load({"t": torch.zeros(10, 20)}, path)


def a_place_without_a_checkpoint_is_an_error(root: str) -> None:
    with fails("there is no checkpoint in"):
        load({"t": torch.zeros(1)}, f"{root}/checkpoint-1")
    with pytest.raises(checkpointer.errors.CheckpointerError, match="there is no checkpoint in"):
        checkpointer.dcp.load({"t": torch.zeros(1)}, f"{root}/checkpoint-1")


def what_only_pickle_could_store_is_refused_by_name_on_all_ranks(root: str) -> None:
    for value in (object(), io.StringIO("x"), lambda: None):
        with fails("odd: cannot store a value of type"):
            save({"t": TABLE, "odd": value}, f"{root}/checkpoint-1")
    with fails("partial"):
        mesh = init_device_mesh("cpu", (2,))
        from torch.distributed.tensor import Partial

        save({"partial": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, f"{root}/checkpoint-1")
    assert steps(root) == []


def a_plan_that_repeats_an_earlier_one_is_refused(root: str) -> None:
    caching = {"planner": dcp.DefaultSavePlanner(enable_plan_caching=True)}
    try:
        save({"t": TABLE}, f"{root}/checkpoint-1", **caching)
        with fails("enable_plan_caching", ranks=[0]):
            save({"t": TABLE}, f"{root}/checkpoint-2", **caching)
    finally:
        for name in [name for name in vars(SavePlanner) if name.startswith("_cached")]:
            getattr(SavePlanner, name).clear()
    save({"t": TABLE}, f"{root}/checkpoint-3")
    assert steps(root) == [1, 3]


def what_would_leave_no_one_to_commit_is_refused(root: str) -> None:
    with pytest.raises(checkpointer.errors.ConfigError, match="use_collectives=False"):
        save({"t": TABLE}, f"{root}/checkpoint-1", use_collectives=False)
    assert steps(root) == []


CASES: Sequence[Case] = [
    a_checkpoint_is_replaced_at_once_and_only_by_a_whole_one,
    a_pinned_checkpoint_is_never_replaced,
    one_writer_and_one_reader_serve_many_times,
    a_rank_alone_may_save_and_load,
    a_save_that_fails_anywhere_fails_on_all_ranks_and_commits_nothing,
    any_rank_may_coordinate,
    a_load_that_fails_anywhere_fails_on_all_ranks,
    a_place_without_a_checkpoint_is_an_error,
    what_only_pickle_could_store_is_refused_by_name_on_all_ranks,
    a_plan_that_repeats_an_earlier_one_is_refused,
    what_would_leave_no_one_to_commit_is_refused,
]
