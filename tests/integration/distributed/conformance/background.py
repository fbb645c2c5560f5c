"""Asynchronous saves, in a thread and in a process."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpointer.dcp import SafetensorsWriter
from tests.integration.distributed.conformance.calls import TABLE, Case, fails, load, save, steps


def uploaded(begun: Any) -> Future[Any]:
    """What is done when all is committed."""
    pending: Future[Any] = getattr(begun, "upload_completion", begun)
    return pending


def an_asynchronous_save_holds_the_state_of_its_call(root: str) -> None:
    in_a_thread = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )
    mesh = init_device_mesh("cpu", (2,))
    for step, options in enumerate(({}, {"async_stager": DefaultStager(in_a_thread)}), start=1):
        state = {"t": distribute_tensor(TABLE, mesh, [Shard(0)]), "plain": TABLE.clone(), "n": [1]}
        begun: Any = dcp.async_save(state, storage_writer=SafetensorsWriter(f"{root}/checkpoint-{step}"), **options)
        getattr(begun, "staging_completion", begun).result()
        state["plain"].zero_()
        state["t"].to_local().zero_()
        uploaded(begun).result()
        found = {"t": torch.zeros(10, 20), "plain": torch.zeros(10, 20), "n": []}
        load(found, f"{root}/checkpoint-{step}")
        assert torch.equal(found["t"], TABLE)
        assert torch.equal(found["plain"], TABLE)
        assert found["n"] == [1]
    assert steps(root) == [1, 2]


def a_save_in_the_background_goes_on_beside_another_one(root: str) -> None:
    let_it = threading.Event()

    class Slow(SafetensorsWriter):
        def write_data(self, plan, planner):
            assert let_it.wait(30)
            return super().write_data(plan, planner)

    mine = f"{root}/{dist.get_rank()}"
    begun = dcp.async_save({"t": TABLE}, storage_writer=Slow(f"{mine}/slow/checkpoint-1"), no_dist=True)
    save({"t": TABLE}, f"{mine}/fast/checkpoint-1", no_dist=True)
    with fails("is being written by"):
        save({"t": TABLE}, f"{mine}/slow/checkpoint-2", no_dist=True)
    let_it.set()
    uploaded(begun).result()
    assert [steps(f"{mine}/{which}") for which in ("slow", "fast")] == [[1], [1]]


class Unlucky(SafetensorsWriter):
    """Fails after it has written; it can be sent to another process."""

    def write_data(self, plan, planner):
        super().write_data(plan, planner)
        raise OSError(28, "the disk is full")


def a_process_of_its_own_saves_and_goes_on_after_a_failure(root: str) -> None:
    alone = dist.new_group([0])
    if dist.get_rank():
        return
    multiprocessing.process.current_process()._config["daemon"] = False  # which may have no processes of its own
    apart = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS, "process_group": alone}
    state = {"plain": TABLE, "n": [1]}
    failed = uploaded(dcp.async_save(state, storage_writer=Unlucky(f"{root}/checkpoint-1"), **apart)).exception()
    assert "the disk is full" in str(failed)
    uploaded(dcp.async_save(state, storage_writer=SafetensorsWriter(f"{root}/checkpoint-2"), **apart)).result()
    found = {"plain": torch.zeros(10, 20), "n": []}
    load(found, f"{root}/checkpoint-2", no_dist=True)
    assert torch.equal(found["plain"], TABLE)
    assert found["n"] == [1]


CASES: Sequence[Case] = [
    an_asynchronous_save_holds_the_state_of_its_call,
    a_save_in_the_background_goes_on_beside_another_one,
    a_process_of_its_own_saves_and_goes_on_after_a_failure,
]
