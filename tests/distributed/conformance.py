"""What PyTorch puts its own storage for DCP through, as cases for :class:`SafetensorsWriter` and its reader.

Each case is a function of a folder of its own, called on every rank of a job; its name is a sentence. Jobs are started
once for all their cases. Learned from PyTorch's ``test/distributed/checkpoint``: its cases of planners, and of formats
that are not ours, are not here.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor, zeros
from torch.distributed._shard.sharding_spec import (
    ChunkShardingSpec,
    EnumerableShardingSpec,
    ShardingSpec,
    ShardMetadata,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import checkpointer.dcp
from checkpointer import tensorfile
from checkpointer.dcp import SafetensorsReader, SafetensorsWriter
from checkpointer.notes import Note
from checkpointer.repository import Repository
from checkpointer.state.tensors import DTYPES, STORABLE
from checkpointer.storage import open_storage

Case = Callable[[str], None]


def run_cases(cases: Sequence[Case], root: str) -> dict[str, str]:
    """Call each case on this rank; the traceback of each that failed, by name."""
    failed = {}
    for case in cases:
        try:
            case(f"{root}/{case.__name__}")
        except BaseException:  # DCP's own error is no Exception
            failed[case.__name__] = traceback.format_exc()
        meet()
    return failed


# ------------------------------------------------------------------------------------ as users call it


def save(state: dict[str, Any], path: str, **options: Any) -> None:
    dcp.save(state, storage_writer=SafetensorsWriter(path), **options)


def load(state: dict[str, Any], path: str, **options: Any) -> None:
    dcp.load(state, storage_reader=SafetensorsReader(path), **options)


def steps(root: str) -> list[int]:
    """What is committed, once all ranks are here; every byte of it is checked."""
    meet()
    repository = Repository(open_storage(root))
    assert not [entry.name for entry in repository.storage.list_directory(".checkpointer/tmp")]
    report = repository.verify_all()
    assert report.ok, report
    meet()
    return [info.step for info in repository.list_checkpoints().checkpoints]


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def fails(text: str, *, ranks: Sequence[int] | None = None) -> Iterator[None]:
    """DCP's own error, on every rank, for failures of just these ranks; all of them if ``None``."""
    with pytest.raises(CheckpointException) as caught:
        yield
    told = {rank: f"{type(wrapped[0]).__name__}: {wrapped[0]}" for rank, wrapped in caught.value.failures.items()}
    assert sorted(told) == (sorted(told) if ranks is None else list(ranks)), told
    assert all(text in message for message in told.values()), told


# ------------------------------------------------------------------------------------ sharded tensors


def by_chunks(dimension: int, *ranks: int) -> ShardingSpec:
    return ChunkShardingSpec(dim=dimension, placements=[f"rank:{rank}/cpu" for rank in ranks])


def by_rows(*shards: tuple[int, int], columns: int = 20) -> ShardingSpec:
    """Each shard: its rows, and the rank that holds them."""
    found, start = [], 0
    for rows, rank in shards:
        found.append(ShardMetadata(shard_offsets=[start, 0], shard_sizes=[rows, columns], placement=f"rank:{rank}/cpu"))
        start += rows
    return EnumerableShardingSpec(found)


TABLE = torch.arange(200.0).reshape(10, 20)

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


# ------------------------------------------------------------------------------------ values


def values_that_are_no_tensors_replace_those_in_the_state(root: str) -> None:
    saved = {"list": [1], "text": "string", "nested": {"none": None, "pair": (1, [2.5])}, "bytes": b"\0\xff"}
    save(saved, f"{root}/checkpoint-1")
    inner: dict[str, Any] = {"none": 0, "pair": ()}
    state = {"list": [2, 3], "text": "other", "nested": inner, "bytes": b""}
    load(state, f"{root}/checkpoint-1")
    assert state == saved
    assert state["nested"] is inner


def a_module_with_extra_state_comes_back(root: str) -> None:
    mesh = init_device_mesh("cpu", (2,))

    class WithExtra(nn.Module):
        def __init__(self, factor: int) -> None:
            super().__init__()
            self.cut = nn.Parameter(distribute_tensor(torch.arange(4.0) * factor, mesh, [Shard(0)]))
            self.whole = nn.Parameter(distribute_tensor(torch.arange(4.0, 8.0) * factor, mesh, [Replicate()]))
            self.extra = {"number": factor, "tensor": torch.tensor([float(factor)])}

        def get_extra_state(self) -> dict[str, Any]:
            return self.extra

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.extra = state

    save({"m": WithExtra(1)}, f"{root}/checkpoint-1")
    found = WithExtra(10)
    load({"m": found}, f"{root}/checkpoint-1")
    assert found.extra == {"number": 1, "tensor": torch.tensor([1.0])}
    assert torch.equal(found.cut.full_tensor(), torch.arange(4.0))
    assert torch.equal(found.whole.to_local(), torch.arange(4.0, 8.0))


class Counter:
    """Stateful; loading it is a collective call."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.history = torch.arange(count)
        self.loaded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seen = torch.tensor([state["count"]])
        dist.all_reduce(seen)
        assert seen.item() == state["count"] * dist.get_world_size()
        self.count, self.history = state["count"], state["history"]
        self.loaded += 1


def stateful_objects_load_themselves_in_one_order_on_all_ranks(root: str) -> None:
    def state(count: int) -> dict[str, Any]:
        names = ["a", "b"] if dist.get_rank() == 0 else ["b", "a"]
        return {name: Counter(count + (name == "b")) for name in names}

    save(state(3), f"{root}/checkpoint-1")
    found = state(3)
    kept = dict(found)
    for counter in found.values():
        counter.history.zero_()
    load(found, f"{root}/checkpoint-1")
    assert found == kept
    assert {name: (counter.count, counter.history.tolist(), counter.loaded) for name, counter in found.items()} == {
        "a": (3, [0, 1, 2], 1),
        "b": (4, [0, 1, 2, 3], 1),
    }


def each_rank_may_hold_what_no_other_does(root: str) -> None:
    rank, path = dist.get_rank(), f"{root}/checkpoint-1"
    save({f"layer{rank}": {"weight": torch.full((3,), rank), "note": f"of {rank}"}}, path)
    state = {f"layer{number}": {"weight": torch.zeros(3, dtype=torch.int64), "note": ""} for number in (0, 1)}
    load(state, path)
    assert [part["weight"].tolist() for part in state.values()] == [[0, 0, 0], [1, 1, 1]]
    assert [part["note"] for part in state.values()] == ["of 0", "of 1"]


def tensors_of_every_form_come_back(root: str) -> None:
    base = torch.arange(48.0).reshape(4, 12)
    forms = {
        "scalar": torch.tensor(1.5),
        "nothing": torch.zeros(0),
        "no rows": torch.zeros(0, 3),
        "no columns": torch.zeros(3, 0),
        "transposed": base.t(),
        "every other": base[:, ::2],
        "view": base[1:3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base + 1),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "many dimensions": torch.arange(64).reshape([2] * 6),
    }
    mesh = init_device_mesh("cpu", (2,))
    cut = {name: distribute_tensor(torch.ones(size), mesh, [Shard(0)]) for name, size in (("one", 1), ("none", 0))}
    path = f"{root}/checkpoint-1"
    save({"forms": forms, "cut": cut}, path)
    state = {
        "forms": {name: torch.zeros_like(tensor) for name, tensor in forms.items() if name != "expanded"},
        "cut": {name: torch.zeros_like(tensor) for name, tensor in cut.items()},
    }
    state["forms"]["expanded"] = torch.zeros(2, 3).t()
    load(state, path)
    for name, tensor in state["forms"].items():
        assert torch.equal(tensor, forms[name]), name
    assert state["cut"]["one"].full_tensor().tolist() == [1]
    assert state["cut"]["none"].full_tensor().tolist() == []
    assert steps(root) == [1]


def every_dtype_comes_back_bit_for_bit(root: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    raw = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    whole = {name: (raw % 2 if dtype is torch.bool else raw).view(dtype) for name, dtype in planned().items()}
    mine = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    save(
        {name: DTensor.from_local(tensor[mine], mesh, [Shard(0)]) for name, tensor in whole.items()},
        f"{root}/checkpoint-1",
    )
    state = {name: torch.zeros_like(raw).view(tensor.dtype) for name, tensor in whole.items()}
    load(state, f"{root}/checkpoint-1")
    for name, tensor in whole.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert len(state) > 20


def planned() -> dict[str, torch.dtype]:
    """The dtypes that DCP's own planner knows the size of."""
    return {
        name: dtype
        for name, dtype in DTYPES.items()
        if dtype in STORABLE and not re.search(r"bits|int[1-7]$|float4", name)
    }


def copies_of_one_tensor_are_written_once_by_the_lowest_rank_if_that_is_asked_for(root: str) -> None:
    state = {f"t{number}": torch.full((100,), number) for number in range(6)}
    save(state, f"{root}/checkpoint-1")
    save(state, f"{root}/checkpoint-2", planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    assert steps(root) == [1, 2]
    listed = [open_storage(root).list_directory(f"checkpoint-{step}") for step in (1, 2)]
    assert [sum(entry.name.endswith(".safetensors") for entry in entries) for entries in listed] == [2, 1]
    found = {name: torch.zeros(100, dtype=torch.int64) for name in state}
    load(found, f"{root}/checkpoint-2")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def a_state_without_anything_in_it_is_a_checkpoint_too(root: str) -> None:
    save({}, f"{root}/checkpoint-1")
    save({"inner": {}}, f"{root}/checkpoint-2")
    load({}, f"{root}/checkpoint-1")
    load({"inner": {}}, f"{root}/checkpoint-2")
    assert steps(root) == [1, 2]


def more_than_one_file_may_hold_is_written_to_several(root: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = {f"t{number}": torch.full((100,), float(number)) for number in range(7)}
    cut = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorfile, "SHARD_LIMIT", 900)
        save(whole, f"{root}/checkpoint-1")
        save(cut, f"{root}/checkpoint-2")
    assert steps(root) == [1, 2]
    names = [sorted(entry.name for entry in open_storage(root).list_directory(f"checkpoint-{step}")) for step in (1, 2)]
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    ranks = [f"model-rank-{rank:05d}-{number:05d}-of-00002.safetensors" for rank in (0, 1) for number in (1, 2)]
    assert names == [
        ["index.json", "manifest.json", *shards, "model.safetensors.index.json"],
        ["index.json", "manifest.json", *ranks],
    ]
    for step in (1, 2):
        state = {name: torch.zeros(100) for name in whole}
        load(state, f"{root}/checkpoint-{step}")
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


# ------------------------------------------------------------------------------------ what is loaded


def a_part_of_the_keys_is_loaded_and_missing_ones_are_named(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"model": nn.Linear(2, 2), "step": 5}, path)
    state: dict[str, Any] = {"model": {"weight": torch.zeros(2, 2)}}
    load(state, path)
    assert state["model"]["weight"].any()
    more: dict[str, Any] = {"model": {"weight": torch.zeros(2, 2), "extra": torch.ones(2)}, "epoch": 1}
    load(more, path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(more["model"]["weight"], state["model"]["weight"])
    assert more["model"]["extra"].tolist() == [1, 1]
    for missing in ({"model": more["model"]}, {"epoch": 1}):
        with fails(f"Missing key in checkpoint state_dict: {'epoch' if 'epoch' in missing else 'model.extra'}"):
            load(missing, path)


def a_tensor_of_another_shape_or_kind_is_refused(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"w": torch.zeros(2, 2), "n": 1}, path)
    with fails("Size mismatch"):
        load({"w": torch.zeros(2, 3)}, path)
    with fails("expected BytesStorageMetadata"):
        load({"w": 3}, path)


def keys_are_loaded_without_a_state_to_load_into(root: str) -> None:
    path = f"{root}/checkpoint-1"
    saved = {"model": {"w": TABLE}, "optim": {"state": {"w": {"avg": TABLE + 1}}, "groups": [{"lr": 0.5}]}}
    save(saved, path)
    found = _load_state_dict_from_keys("optim.state", storage_reader=SafetensorsReader(path))
    assert list(found) == ["optim"]
    assert list(found["optim"]) == ["state"]
    assert torch.equal(found["optim"]["state"]["w"]["avg"], TABLE + 1)
    everything = _load_state_dict_from_keys(storage_reader=SafetensorsReader(path))
    assert torch.equal(everything["model"]["w"], TABLE)
    assert everything["optim"]["groups"] == [{"lr": 0.5}]


def metadata_describe_the_state(root: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    path = f"{root}/checkpoint-1"
    state = {
        "cut": distribute_tensor(TABLE, mesh, [Shard(0)]),
        "inner": {"plain": torch.ones(3, dtype=torch.int32)},
        "n": [1, 2],
    }
    save(state, path)
    with SafetensorsReader(path) as reader:
        found = reader.read_metadata()
    assert set(found.state_dict_metadata) == {"cut", "inner.plain", "n"}
    assert isinstance(found.state_dict_metadata["n"], dcp.BytesStorageMetadata)
    cut = found.state_dict_metadata["cut"]
    assert (cut.size, cut.properties.dtype) == (torch.Size([10, 20]), torch.float32)
    assert sorted((tuple(part.offsets), tuple(part.sizes)) for part in cut.chunks) == [
        ((0, 0), (5, 20)),
        ((5, 0), (5, 20)),
    ]
    assert found.planner_data == {"cut": ("cut",), "inner.plain": ("inner", "plain"), "n": ("n",)}
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == path
    manifest = Repository(open_storage(root)).list_checkpoints().checkpoints[0]
    assert found.storage_meta.save_id == manifest.id


class CopyingPlanner(dcp.DefaultLoadPlanner):
    """Hands out memory of its own, and copies it where it belongs once it has been filled."""

    def resolve_tensor(self, read_item):
        self.asked = getattr(self, "asked", 0) + 1
        return torch.full_like(super().resolve_tensor(read_item), -1)

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor)


def a_planner_may_hand_out_memory_of_its_own(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"t": sharded(SHARDINGS["five uneven"], TABLE)}, path)
    for dtype in (torch.float32, torch.float64):
        state, planner = {"t": torch.zeros(10, 20, dtype=dtype)}, CopyingPlanner()
        load(state, path, planner=planner)
        assert torch.equal(state["t"], TABLE.to(dtype))
        assert planner.asked == 5


class PicklingLoadPlanner(dcp.DefaultLoadPlanner):
    """Has a way of its own with values that are no tensors."""

    def load_bytes(self, read_item, value):
        self.state_dict[read_item.dest_index.fqn] = ("seen", torch.load(value, weights_only=False))


def planners_may_leave_the_state_nested_and_read_values_themselves(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"a.b": torch.ones(2), "n": [1]}, path, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    state = {"a.b": torch.zeros(2), "n": []}
    as_it_is = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    load(state, path, planner=dcp.DefaultLoadPlanner(**as_it_is))
    assert (state["a.b"].tolist(), state["n"]) == ([1, 1], [1])
    load(state, path, planner=PicklingLoadPlanner(**as_it_is))
    assert state["n"] == ("seen", [1])


class RenamingPlanner(dcp.DefaultSavePlanner):
    """Saves doubled values."""

    def transform_object(self, write_item, object):
        found = super().transform_object(write_item, object)
        return found * 2 if isinstance(found, torch.Tensor) else found


def what_a_planner_makes_of_a_tensor_is_written(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"t": sharded(SHARDINGS["halves"], TABLE), "n": 1}, path, planner=RenamingPlanner())
    state = {"t": torch.zeros(10, 20), "n": 0}
    load(state, path)
    assert torch.equal(state["t"], TABLE * 2)
    assert state["n"] == 1


class CastingPlanner(dcp.DefaultSavePlanner):
    """Gives other tensors than its plan has announced."""

    def transform_object(self, write_item, object):
        found = super().transform_object(write_item, object)
        return found.to(torch.int32) if isinstance(found, torch.Tensor) else found


def a_planner_that_gives_other_tensors_than_it_announces_is_refused(root: str) -> None:
    with fails("announces torch.float32 [5, 20] in its plan, and gives torch.int32 [5, 20]"):
        save({"t": sharded(SHARDINGS["halves"], TABLE)}, f"{root}/checkpoint-1", planner=CastingPlanner())


# ------------------------------------------------------------------------------------ one after the other


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


# ------------------------------------------------------------------------------------ failures


class Failing(SafetensorsWriter):
    """Fails in one of its methods on one rank, before or after it has done its work."""

    def __init__(self, stage: str, rank: int, path: str, *, late: bool = False) -> None:
        super().__init__(path)
        if this_rank() == rank:
            setattr(self, stage, failing(getattr(self, stage), late=late))


class FailingReader(SafetensorsReader):
    """As :class:`Failing`."""

    def __init__(self, stage: str, rank: int, path: str, *, late: bool = False) -> None:
        super().__init__(path)
        if this_rank() == rank:
            setattr(self, stage, failing(getattr(self, stage), late=late))


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def failing(method: Callable[..., Any], *, late: bool) -> Callable[..., Any]:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        if late:
            method(*arguments, **keywords)
        raise OSError(28, "the disk is full")

    return fail


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
        with fails("odd"):
            save({"t": TABLE, "odd": value}, f"{root}/checkpoint-1")
    with fails("partial"):
        mesh = init_device_mesh("cpu", (2,))
        from torch.distributed.tensor import Partial

        save({"partial": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, f"{root}/checkpoint-1")
    assert steps(root) == []


def what_would_leave_no_one_to_commit_is_refused(root: str) -> None:
    with pytest.raises(checkpointer.errors.ConfigError, match="use_collectives=False"):
        save({"t": TABLE}, f"{root}/checkpoint-1", use_collectives=False)
    assert steps(root) == []


# ------------------------------------------------------------------------------------ asynchronous


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


# ------------------------------------------------------------------------------------ four ranks: meshes and groups

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
    save({name: tensor for name, tensor in expected.items()}, f"{root}/checkpoint-1")
    for name, tensor in expected.items():
        state = {saved: torch.zeros_like(tensor) for saved in expected}
        load(state, f"{root}/checkpoint-1")
        for saved, found in state.items():
            assert torch.equal(found.to_local(), tensor.to_local()), (saved, name)
    assert steps(root) == [1]


def linear_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 15), nn.ReLU(), nn.Linear(15, 3))


def over_one_dimension() -> nn.Module:
    return fully_shard(linear_layers(), mesh=init_device_mesh("cpu", (4,)))


def replicated_over_the_first() -> nn.Module:
    """HSDP."""
    return fully_shard(linear_layers(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def with_tensor_parallelism() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(linear_layers(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def without_any() -> nn.Module:
    return linear_layers()


LAYOUTS = (over_one_dimension, replicated_over_the_first, with_tensor_parallelism, without_any)


def trained(build: Callable[[], nn.Module], *, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * steps)
    for _ in range(steps):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of it, on every rank, under DCP's names."""
    everything = StateDictOptions(full_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=everything)
    return {"model": weights, "optimizer": moments}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def model_and_optimizer_are_loaded_in_every_other_parallelism(root: str) -> None:
    for step, saved in enumerate(LAYOUTS, start=1):
        path = f"{root}/checkpoint-{step}"
        model, optimizer = trained(saved, steps=2)
        weights, moments = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": moments}, path)
        expected = gathered(model, optimizer)
        for other in LAYOUTS:
            fresh, its_optimizer = trained(other, steps=1)
            weights, moments = get_state_dict(fresh, its_optimizer)
            load({"model": weights, "optimizer": moments}, path)
            set_state_dict(fresh, its_optimizer, model_state_dict=weights, optim_state_dict=moments)
            assert equal(gathered(fresh, its_optimizer), expected), (saved.__name__, other.__name__)
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


ONE_PROCESS: Sequence[Case] = [
    values_that_are_no_tensors_replace_those_in_the_state,
    a_state_without_anything_in_it_is_a_checkpoint_too,
    a_part_of_the_keys_is_loaded_and_missing_ones_are_named,
    a_tensor_of_another_shape_or_kind_is_refused,
    keys_are_loaded_without_a_state_to_load_into,
    one_writer_and_one_reader_serve_many_times,
    a_save_that_fails_anywhere_fails_on_all_ranks_and_commits_nothing,
    a_load_that_fails_anywhere_fails_on_all_ranks,
    a_place_without_a_checkpoint_is_an_error,
]
"""Without a process group."""

TWO_RANKS: Sequence[Case] = [
    a_sharded_tensor_is_loaded_in_every_other_sharding,
    a_sharded_tensor_is_loaded_as_a_plain_one_and_the_other_way_round,
    the_state_of_an_optimizer_is_loaded_sharded_though_it_was_saved_whole,
    values_that_are_no_tensors_replace_those_in_the_state,
    a_module_with_extra_state_comes_back,
    stateful_objects_load_themselves_in_one_order_on_all_ranks,
    each_rank_may_hold_what_no_other_does,
    tensors_of_every_form_come_back,
    every_dtype_comes_back_bit_for_bit,
    copies_of_one_tensor_are_written_once_by_the_lowest_rank_if_that_is_asked_for,
    a_state_without_anything_in_it_is_a_checkpoint_too,
    more_than_one_file_may_hold_is_written_to_several,
    a_part_of_the_keys_is_loaded_and_missing_ones_are_named,
    a_tensor_of_another_shape_or_kind_is_refused,
    keys_are_loaded_without_a_state_to_load_into,
    metadata_describe_the_state,
    a_planner_may_hand_out_memory_of_its_own,
    planners_may_leave_the_state_nested_and_read_values_themselves,
    what_a_planner_makes_of_a_tensor_is_written,
    a_planner_that_gives_other_tensors_than_it_announces_is_refused,
    a_checkpoint_is_replaced_at_once_and_only_by_a_whole_one,
    a_pinned_checkpoint_is_never_replaced,
    one_writer_and_one_reader_serve_many_times,
    a_rank_alone_may_save_and_load,
    a_save_that_fails_anywhere_fails_on_all_ranks_and_commits_nothing,
    any_rank_may_coordinate,
    a_load_that_fails_anywhere_fails_on_all_ranks,
    a_place_without_a_checkpoint_is_an_error,
    what_only_pickle_could_store_is_refused_by_name_on_all_ranks,
    what_would_leave_no_one_to_commit_is_refused,
    an_asynchronous_save_holds_the_state_of_its_call,
    a_process_of_its_own_saves_and_goes_on_after_a_failure,
]

FOUR_RANKS: Sequence[Case] = [
    a_dtensor_is_loaded_in_every_other_placement_and_mesh,
    model_and_optimizer_are_loaded_in_every_other_parallelism,
    groups_of_ranks_save_and_load_beside_each_other,
    ranks_outside_the_mesh_of_a_tensor_hold_nothing_of_it,
]
