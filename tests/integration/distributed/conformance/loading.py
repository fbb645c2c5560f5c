"""What is loaded of a checkpoint, and by whose planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpointer.dcp import SafetensorsReader
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.integration.distributed.conformance.calls import TABLE, Case, fails, load, save
from tests.integration.distributed.conformance.sharding import SHARDINGS, sharded


def a_part_of_the_keys_is_loaded_and_missing_ones_are_named(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"model": nn.Linear(2, 2), "step": 5}, path)
    state: dict[str, Any] = {"model": {"weight": torch.zeros(2, 2)}}
    load(state, path)
    assert state["model"]["weight"].any()
    more: dict[str, Any] = {"model": {"weight": torch.zeros(2, 2), "extra": torch.ones(2)}, "epoch": 1}
    load(more, path, planner=DefaultLoadPlanner(allow_partial_load=True))
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


class CopyingPlanner(DefaultLoadPlanner):
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


class PicklingLoadPlanner(DefaultLoadPlanner):
    """Has a way of its own with values that are no tensors."""

    def load_bytes(self, read_item, value):
        self.state_dict[read_item.dest_index.fqn] = ("seen", torch.load(value, weights_only=False))


def planners_may_leave_the_state_nested_and_read_values_themselves(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"a.b": torch.ones(2), "n": [1]}, path, planner=DefaultSavePlanner(flatten_state_dict=False))
    state = {"a.b": torch.zeros(2), "n": []}
    as_it_is = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    load(state, path, planner=DefaultLoadPlanner(**as_it_is))
    assert (state["a.b"].tolist(), state["n"]) == ([1, 1], [1])
    load(state, path, planner=PicklingLoadPlanner(**as_it_is))
    assert state["n"] == ("seen", [1])


class DoublingPlanner(DefaultSavePlanner):
    """Saves doubled values."""

    def transform_object(self, write_item, value):
        found = super().transform_object(write_item, value)
        return found * 2 if isinstance(found, torch.Tensor) else found


def what_a_planner_makes_of_a_tensor_is_written(root: str) -> None:
    path = f"{root}/checkpoint-1"
    save({"t": sharded(SHARDINGS["halves"], TABLE), "n": 1}, path, planner=DoublingPlanner())
    state = {"t": torch.zeros(10, 20), "n": 0}
    load(state, path)
    assert torch.equal(state["t"], TABLE * 2)
    assert state["n"] == 1


class CastingPlanner(DefaultSavePlanner):
    """Gives other tensors than its plan has announced."""

    def transform_object(self, write_item, value):
        found = super().transform_object(write_item, value)
        return found.to(torch.int32) if isinstance(found, torch.Tensor) else found


def a_planner_that_gives_other_tensors_than_it_announces_is_refused(root: str) -> None:
    with fails("announces torch.float32 [5, 20] in its plan, and gives torch.int32 [5, 20]"):
        save({"t": sharded(SHARDINGS["halves"], TABLE)}, f"{root}/checkpoint-1", planner=CastingPlanner())


CASES: Sequence[Case] = [
    a_part_of_the_keys_is_loaded_and_missing_ones_are_named,
    a_tensor_of_another_shape_or_kind_is_refused,
    keys_are_loaded_without_a_state_to_load_into,
    metadata_describe_the_state,
    a_planner_may_hand_out_memory_of_its_own,
    planners_may_leave_the_state_nested_and_read_values_themselves,
    what_a_planner_makes_of_a_tensor_is_written,
    a_planner_that_gives_other_tensors_than_it_announces_is_refused,
]
