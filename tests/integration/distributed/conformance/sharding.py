"""ShardedTensors, as FSDP1 and hand-made shardings hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor, zeros
from torch.distributed._shard.sharding_spec import (
    ChunkShardingSpec,
    EnumerableShardingSpec,
    ShardingSpec,
    ShardMetadata,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from checkpointer.dcp import SafetensorsReader
from tests.integration.distributed.conformance.calls import TABLE, Case, equal, gathered, load, save, steps


def by_chunks(dimension: int, *ranks: int) -> ShardingSpec:
    return ChunkShardingSpec(dim=dimension, placements=[f"rank:{rank}/cpu" for rank in ranks])


def by_rows(*shards: tuple[int, int], columns: int = 20) -> ShardingSpec:
    """Each shard: its rows, and the rank that holds them."""
    found, start = [], 0
    for rows, rank in shards:
        found.append(ShardMetadata(shard_offsets=[start, 0], shard_sizes=[rows, columns], placement=f"rank:{rank}/cpu"))
        start += rows
    return EnumerableShardingSpec(found)


SHARDINGS = {
    "halves": by_chunks(0, 0, 1),
    "two each": by_chunks(0, 0, 1, 1, 0),
    "five uneven": by_rows((2, 0), (1, 1), (3, 0), (3, 1), (1, 0)),
    "most on one": by_rows((8, 1), (2, 0)),
    "all on one": by_rows((10, 1)),
    "columns": by_chunks(1, 0, 1),
}


def sharded(spec: ShardingSpec, whole: torch.Tensor) -> ShardedTensor:
    made = zeros(spec, *whole.shape, dtype=whole.dtype)
    for shard in made.local_shards():
        shard.tensor.copy_(part(whole, shard.metadata))
    return made


def part(whole: torch.Tensor, shard: ShardMetadata) -> torch.Tensor:
    places = zip(shard.shard_offsets, shard.shard_sizes, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in places)]


def holds(found: ShardedTensor, whole: torch.Tensor) -> bool:
    return all(torch.equal(shard.tensor, part(whole, shard.metadata)) for shard in found.local_shards())


def a_sharded_tensor_is_loaded_in_every_other_sharding(root: str) -> None:
    for number, spec in enumerate(SHARDINGS.values(), start=1):
        save({"t": sharded(spec, TABLE)}, f"{root}/checkpoint-{number}")
    for number, saved in enumerate(SHARDINGS, start=1):
        for name, spec in SHARDINGS.items():
            found = sharded(spec, torch.zeros_like(TABLE))
            load({"t": found}, f"{root}/checkpoint-{number}")
            assert holds(found, TABLE), (saved, name)
    assert steps(root) == [1, 2, 3, 4, 5, 6]


def a_sharded_tensor_is_loaded_as_a_plain_one_and_the_other_way_round(root: str) -> None:
    for number, spec in enumerate(SHARDINGS.values(), start=1):
        path = f"{root}/checkpoint-{number}"
        save({"sharded": sharded(spec, TABLE), "plain": TABLE + 1}, path)
        state = {"sharded": torch.zeros(10, 20), "plain": sharded(spec, torch.zeros(10, 20))}
        load(state, path)
        assert torch.equal(state["sharded"], TABLE)
        assert holds(state["plain"], TABLE + 1)


def the_state_of_an_optimizer_is_loaded_sharded_though_it_was_saved_whole(root: str) -> None:
    from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict

    moments = {"w": {"exp_avg": TABLE, "step": torch.tensor(3.0)}}
    path = f"{root}/checkpoint-1"
    save({"model": {"w": TABLE}, "optim": {"state": moments, "param_groups": [{"lr": 0.5, "params": ["w"]}]}}, path)
    found = load_sharded_optimizer_state_dict({"w": TABLE}, "optim", SafetensorsReader(path))["optim"]
    assert holds(found["state"]["w"]["exp_avg"], TABLE)
    assert found["state"]["w"]["step"] == 3
    assert found["param_groups"] == [{"lr": 0.5, "params": ["w"]}]


def what_fsdp1_holds_comes_back(root: str) -> None:
    def built(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        model = FullyShardedDataParallel(layers, device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * seed)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = built(1)
    weights, moments = get_state_dict(model, optimizer)
    assert isinstance(weights["0.weight"], ShardedTensor)
    save({"model": weights, "optimizer": moments}, f"{root}/checkpoint-1")
    fresh, its_optimizer = built(2)
    weights, moments = get_state_dict(fresh, its_optimizer)
    load({"model": weights, "optimizer": moments}, f"{root}/checkpoint-1")
    set_state_dict(fresh, its_optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert equal(gathered(fresh, its_optimizer), gathered(model, optimizer))


CASES: Sequence[Case] = [
    a_sharded_tensor_is_loaded_in_every_other_sharding,
    a_sharded_tensor_is_loaded_as_a_plain_one_and_the_other_way_round,
    the_state_of_an_optimizer_is_loaded_sharded_though_it_was_saved_whole,
    what_fsdp1_holds_comes_back,
]
