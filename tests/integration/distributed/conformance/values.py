"""What comes back of what was saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from checkpointer.format import tensor_files
from checkpointer.state.tensors import DTYPES, STORABLE
from checkpointer.storage import open_storage
from tests.integration.distributed.conformance.calls import Case, load, save, steps


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


def every_dtype_comes_back_bit_for_bit_and_in_other_cuts(root: str) -> None:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    raw = (torch.arange(1024) % 256).to(torch.uint8).reshape(16, 64)
    whole = {name: (raw % 2 if dtype is torch.bool else raw).view(dtype) for name, dtype in planned().items()}
    rows = {name: DTensor.from_local(tensor.chunk(2, 0)[rank], mesh, [Shard(0)]) for name, tensor in whole.items()}
    save(rows, f"{root}/checkpoint-1")
    state = {name: torch.zeros_like(raw).view(tensor.dtype) for name, tensor in whole.items()}
    load(state, f"{root}/checkpoint-1")
    columns = {
        name: DTensor.from_local(torch.zeros(16, 32, dtype=torch.uint8).view(tensor.dtype), mesh, [Shard(1)])
        for name, tensor in whole.items()
    }
    load(columns, f"{root}/checkpoint-1")
    for name, tensor in whole.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
        mine = tensor.view(torch.uint8).chunk(2, 1)[rank]
        assert torch.equal(columns[name].to_local().view(torch.uint8), mine), name
    assert len(state) > 20


def planned() -> dict[str, torch.dtype]:
    """The dtypes that DCP's own planner knows the size of."""
    return {
        name: dtype for name, dtype in DTYPES.items() if dtype in STORABLE and not re.search(r"bits|int[1-7]$", name)
    }


def copies_of_one_tensor_are_written_once_by_the_lowest_rank_if_that_is_asked_for(root: str) -> None:
    state = {f"t{number}": torch.full((100,), number) for number in range(6)}
    save(state, f"{root}/checkpoint-1")
    save(state, f"{root}/checkpoint-2", planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    assert steps(root) == [1, 2]
    listed = [open_storage(root).list_directory(f"checkpoint-{step}") for step in (1, 2)]
    kept = [[name for entry in entries if (name := entry.name).startswith("model")] for entries in listed]
    assert [sum(name.endswith(".safetensors") for name in names) for names in kept] == [2, 1]
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
        patch.setattr(tensor_files, "SHARD_LIMIT", 900)
        save(whole, f"{root}/checkpoint-1")
        save(cut, f"{root}/checkpoint-2")
    assert steps(root) == [1, 2]
    names = [sorted(entry.name for entry in open_storage(root).list_directory(f"checkpoint-{step}")) for step in (1, 2)]
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    ranks = [f"model-rank-{rank:05d}-{number:05d}-of-00002.safetensors" for rank in (0, 1) for number in (1, 2)]
    assert names == [
        ["index.json", "index.safetensors", "manifest.json", *shards, "model.safetensors.index.json"],
        ["index.json", "index.safetensors", "manifest.json", *ranks],
    ]
    for step in (1, 2):
        state = {name: torch.zeros(100) for name in whole}
        load(state, f"{root}/checkpoint-{step}")
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


CASES: Sequence[Case] = [
    values_that_are_no_tensors_replace_those_in_the_state,
    a_module_with_extra_state_comes_back,
    stateful_objects_load_themselves_in_one_order_on_all_ranks,
    each_rank_may_hold_what_no_other_does,
    tensors_of_every_form_come_back,
    every_dtype_comes_back_bit_for_bit_and_in_other_cuts,
    copies_of_one_tensor_are_written_once_by_the_lowest_rank_if_that_is_asked_for,
    a_state_without_anything_in_it_is_a_checkpoint_too,
    more_than_one_file_may_hold_is_written_to_several,
]
