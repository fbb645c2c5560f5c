"""Four ranks: meshes, parallelisms and groups."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from tests.integration.distributed.conformance.calls import (
    TABLE,
    Case,
    Failing,
    equal,
    fails,
    gathered,
    load,
    save,
    steps,
)

SQUARE = torch.arange(240.0).reshape(12, 20)


def layouts(line: DeviceMesh, table: DeviceMesh, whole: torch.Tensor) -> dict[str, DTensor]:
    """``whole`` over four ranks in every way that there is."""
    over_line = ([Replicate()], [Shard(0)], [Shard(1)])
    each = (Replicate(), Shard(0), Shard(1))
    found = {f"line {places}": distribute_tensor(whole, line, places) for places in over_line}
    for places in itertools.product(each, each):
        found[f"table {places}"] = distribute_tensor(whole, table, places)
    return {**found, "strided": strided(table, whole)}


def strided(mesh: DeviceMesh, whole: torch.Tensor) -> DTensor:
    """As FSDP2 over tensor parallelism makes it: cut by the second dimension of the mesh, and then by the first."""
    rows = distribute_tensor(whole, mesh, [Replicate(), Shard(0)]).to_local().chunk(2, 0)[mesh.get_coordinate()[0]]
    places = [_StridedShard(0, split_factor=2), Shard(0)]
    return DTensor.from_local(rows.contiguous(), mesh, places, shape=whole.shape, stride=whole.stride())


def a_dtensor_is_loaded_in_every_other_placement_and_mesh(root: str) -> None:
    meshes = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    expected = layouts(*meshes, SQUARE)
    save(dict(expected), f"{root}/checkpoint-1")
    for name, tensor in expected.items():
        state = {saved: torch.zeros_like(tensor) for saved in expected}
        load(state, f"{root}/checkpoint-1")
        for saved, found in state.items():
            assert torch.equal(found.to_local(), tensor.to_local()), (saved, name)
    assert steps(root) == [1]


def linear_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 15), nn.ReLU(), nn.Linear(15, 3))


def over_one_dimension() -> nn.Module:
    model = linear_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    return model


def replicated_over_the_first() -> nn.Module:
    """HSDP."""
    model = linear_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    return model


def with_tensor_parallelism() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(linear_layers(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def without_any() -> nn.Module:
    return linear_layers()


LAYOUTS = (over_one_dimension, replicated_over_the_first, with_tensor_parallelism, without_any)


def trained(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def model_and_optimizer_are_loaded_in_every_other_parallelism(root: str) -> None:
    made = [trained(layout, seed) for seed, layout in enumerate(LAYOUTS, start=1)]
    expected = copy.deepcopy([gathered(*pair) for pair in made])  # parts of it are live
    for step, pair in enumerate(made, start=1):
        weights, moments = get_state_dict(*pair)
        save({"model": weights, "optimizer": moments}, f"{root}/checkpoint-{step}")
    for step, value in enumerate(expected, start=1):
        for other, (model, optimizer) in zip(LAYOUTS, made, strict=True):
            weights, moments = get_state_dict(model, optimizer)
            load({"model": weights, "optimizer": moments}, f"{root}/checkpoint-{step}")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            assert equal(gathered(model, optimizer), value), (step, other.__name__)
    assert steps(root) == [1, 2, 3, 4]


def groups_of_ranks_save_and_load_beside_each_other(root: str) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number = dist.get_rank() // 2
    mesh = DeviceMesh.from_group(groups[number], "cpu")
    path = f"{root}/{number}/checkpoint-1"
    tensor = distribute_tensor(TABLE + number, mesh, [Shard(0)])
    save({"t": tensor, "of": number}, path, process_group=groups[number])
    state = {"t": torch.zeros_like(tensor), "of": None}
    load(state, path, process_group=groups[number])
    assert torch.equal(state["t"].to_local(), tensor.to_local())
    assert state["of"] == number
    with fails("the disk is full", ranks=[1]):
        failing = Failing("write_data", number * 2 + 1, f"{root}/{number}/checkpoint-2")
        dcp.save({"t": tensor}, storage_writer=failing, process_group=groups[number])
    dist.barrier()
    whole = torch.zeros(10, 20)
    load({"t": whole}, f"{root}/1/checkpoint-1")
    assert torch.equal(whole, TABLE + 1)


def ranks_outside_the_mesh_of_a_tensor_hold_nothing_of_it(root: str) -> None:
    mesh = DeviceMesh("cpu", [1, 2])
    state: dict[str, Any] = {"plain": torch.ones(2)}
    if dist.get_rank() in (1, 2):
        state["t"] = distribute_tensor(TABLE, mesh, [Shard(0)])
    save(state, f"{root}/checkpoint-1")
    found = {"t": torch.zeros(10, 20), "plain": torch.zeros(2)}
    load(found, f"{root}/checkpoint-1")
    assert torch.equal(found["t"], TABLE)


CASES: Sequence[Case] = [
    a_dtensor_is_loaded_in_every_other_placement_and_mesh,
    model_and_optimizer_are_loaded_in_every_other_parallelism,
    groups_of_ranks_save_and_load_beside_each_other,
    ranks_outside_the_mesh_of_a_tensor_hold_nothing_of_it,
]
