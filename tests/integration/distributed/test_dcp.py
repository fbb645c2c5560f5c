"""The DCP plug-ins, with DCP's own functions: on several ranks over gloo, and in one process."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import checkpointer.dcp
from checkpointer import CheckpointManager
from checkpointer.dcp import SafetensorsReader, SafetensorsWriter
from checkpointer.errors import ConfigError, CorruptCheckpointError, SaveError
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.support.forge import flip
from tests.support.ranks import launch, run

SHAPES = {"square": (16, 16), "uneven": (7, 5), "cube": (4, 6, 8), "short": (2, 9), "long": (33,), "scalar": ()}
PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def laid_out(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The tensors as DTensors over all ranks, or as they are where their dimensions do not suffice."""
    if layout == "plain":
        return tensors
    if layout == "mesh":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
        return {
            name: distribute_tensor(tensor, mesh, [Shard(0), Shard(1)]) if tensor.ndim >= 2 else tensor
            for name, tensor in tensors.items()
        }
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    needed = {"rows": 1, "columns": 2, "replicated": 0}[layout]
    return {
        name: distribute_tensor(tensor, mesh, PLACEMENTS[layout]) if tensor.ndim >= needed else tensor
        for name, tensor in tensors.items()
    }


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(path: str, layout: str) -> None:
    dcp.save(laid_out(values(), layout), storage_writer=SafetensorsWriter(path))


def load(path: str, layout: str) -> None:
    state = laid_out({name: torch.full_like(tensor, -1) for name, tensor in values().items()}, layout)
    dcp.load(state, storage_reader=SafetensorsReader(path))
    for name, tensor in values().items():
        assert torch.equal(full(state[name]), tensor), name


def listed(root: Path) -> list[int]:
    return [info.step for info in Repository(open_storage(root)).list_checkpoints().checkpoints]


def verified(root: Path) -> None:
    report = Repository(open_storage(root)).verify_all()
    assert report.ok, str(report)
    assert report.checkpoints
    assert all(not item.extra for item in report.checkpoints)


@pytest.mark.parametrize("saved", ["rows", "columns", "replicated", "plain", "mesh"])
def test_what_four_ranks_save_two_ranks_and_one_process_load_in_every_layout(tmp_path, saved):
    path = str(tmp_path / "checkpoint-3")
    run(4, save, path, saved)
    verified(tmp_path)
    assert not list((tmp_path / ".checkpointer" / "tmp").iterdir())
    for layout in ("rows", "columns"):
        run(2, load, path, layout)
    with pytest.warns(UserWarning, match="disabled"):
        load(path, "plain")


def test_what_one_process_saves_four_ranks_load(tmp_path):
    path = str(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match="disabled"):
        save(path, "plain")
    run(4, load, path, "columns")
    run(4, load, path, "mesh")


def wide(path: str, action: str) -> list[int]:
    """A tensor of 24 MiB, whose columns lie far apart."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(6 * 2**20, dtype=torch.float32).reshape(64, -1)
    placement = [Shard(0)] if action == "save" else [Shard(1)]
    state = {"w": distribute_tensor(whole if action == "save" else torch.zeros_like(whole), mesh, placement)}
    if action == "save":
        dcp.save(state, storage_writer=SafetensorsWriter(path))
    else:
        dcp.load(state, storage_reader=SafetensorsReader(path))
        assert torch.equal(state["w"].full_tensor(), whole)
    return list(state["w"].to_local().shape)


def test_columns_are_read_out_of_large_chunks_of_rows(tmp_path):
    run(2, wide, str(tmp_path / "checkpoint-1"), "save")
    run(4, wide, str(tmp_path / "checkpoint-1"), "load")


def test_whole_tensors_in_several_files_are_a_hugging_face_model(tmp_path):
    path = tmp_path / "checkpoint-3"
    run(2, save, str(path), "plain")
    assert sorted(item.name for item in path.iterdir()) == [
        "index.json",
        "index.safetensors",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    found = {
        **load_file(path / "model-00001-of-00002.safetensors"),
        **load_file(path / "model-00002-of-00002.safetensors"),
    }
    assert all(torch.equal(found[name], tensor) for name, tensor in values().items())


def test_slices_never_look_like_whole_tensors_to_other_tools(tmp_path):
    run(2, save, str(tmp_path / "checkpoint-3"), "rows")
    names = {item.name for item in (tmp_path / "checkpoint-3").iterdir()}
    files = {"model-rank-00000.safetensors", "model-rank-00001.safetensors"}
    assert names == {"index.json", "index.safetensors", "manifest.json", *files}


# ------------------------------------------------------------------------------------ nested state and other values


def training_state() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def nested() -> dict[str, object]:
    model, optimizer = training_state()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 12,
        "text": "naïve",
        "odd": {"tuple": (1, 2.5, None), "nan": float("nan"), "bytes": b"\0\1", "pair": (torch.arange(3), "x")},
        "$dollar": 1.5,
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or repr(a) == repr(b) == "nan")


def emptied(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else None


def round_trip(path: str) -> None:
    checkpointer.dcp.save(nested(), path)
    target = emptied(nested())
    checkpointer.dcp.load(target, path)
    assert same(target, nested()), target


def test_nested_state_with_values_of_all_kinds_comes_back_as_it_was(tmp_path):
    round_trip(str(tmp_path / "checkpoint-1"))
    verified(tmp_path)


def test_nested_state_comes_back_on_two_ranks(tmp_path):
    run(2, round_trip, str(tmp_path / "checkpoint-1"))
    verified(tmp_path)


def test_no_file_of_a_checkpoint_holds_a_pickle(tmp_path):
    checkpointer.dcp.save(nested(), tmp_path / "checkpoint-1")
    for file in (tmp_path / "checkpoint-1").iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert b"PK\x03\x04" not in file.read_bytes()
        assert b"\x80\x02}" not in file.read_bytes()


def test_a_value_that_only_pickle_could_store_is_refused_by_name(tmp_path):
    with pytest.raises(checkpointer.errors.UnsupportedStateError, match=r"odd.*cannot store"):
        checkpointer.dcp.save({"a": torch.ones(2), "odd": object()}, tmp_path / "checkpoint-1")
    assert listed(tmp_path) == []
    assert not list((tmp_path / ".checkpointer" / "tmp").iterdir())


def test_only_what_is_asked_for_is_loaded(tmp_path):
    checkpointer.dcp.save(nested(), tmp_path / "checkpoint-1")
    weight = {"model": {"0.weight": torch.zeros(10, 6)}}
    checkpointer.dcp.load(weight, tmp_path / "checkpoint-1")
    assert torch.equal(weight["model"]["0.weight"], nested()["model"]["0.weight"])
    more = {"model": {"0.weight": torch.zeros(10, 6), "new": torch.zeros(2)}}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    checkpointer.dcp.load(more, tmp_path / "checkpoint-1", planner=planner)
    assert torch.equal(more["model"]["0.weight"], nested()["model"]["0.weight"])
    with pytest.raises(checkpointer.errors.CheckpointerError, match="Missing key"):
        checkpointer.dcp.load(more, tmp_path / "checkpoint-1")


def test_a_manager_restores_a_model_that_dcp_has_saved(tmp_path):
    model, _ = training_state()
    checkpointer.dcp.save(model.state_dict(), tmp_path / "checkpoint-7")
    fresh = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3, bias=False))
    with CheckpointManager(tmp_path, read_only=True, model=fresh) as mgr:
        assert mgr.restore_latest().step == 7
    assert same(fresh.state_dict(), model.state_dict())


def test_another_dtype_is_cast_as_dcp_does(tmp_path):
    checkpointer.dcp.save({"w": torch.arange(6.0)}, tmp_path / "checkpoint-1")
    state = {"w": torch.zeros(6, dtype=torch.bfloat16)}
    checkpointer.dcp.load(state, tmp_path / "checkpoint-1")
    assert torch.equal(state["w"], torch.arange(6.0).bfloat16())


# ------------------------------------------------------------------------------------ fsdp, async


def sharded_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def fsdp(path: str, action: str) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = sharded_model(seed=1 if action == "load" else 0)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    if action == "save":
        checkpointer.dcp.save(state, path)
    elif action == "async":
        pending = checkpointer.dcp.async_save(state, path)
        for parameter in model.parameters():
            parameter.data.fill_(7)
        pending.result()
    else:
        checkpointer.dcp.load(state, path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("action", ["save", "async"])
def test_fsdp2_is_saved_by_four_ranks_and_loaded_by_two(tmp_path, action):
    path = str(tmp_path / "checkpoint-9")
    expected = run(4, fsdp, path, "save")[0]
    if action == "async":
        path = str(tmp_path / "checkpoint-10")
        run(4, fsdp, path, "async")
    verified(tmp_path)
    for found in run(2, fsdp, path, "load"):
        assert same(found, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP's own, from its thread
def test_an_asynchronous_save_in_one_process_holds_the_state_of_its_call(tmp_path):
    weight = torch.ones(1000)
    pending = checkpointer.dcp.async_save({"w": weight}, tmp_path / "checkpoint-1")
    weight.zero_()
    pending.result()
    checkpointer.dcp.load({"w": weight}, tmp_path / "checkpoint-1")
    assert weight.sum() == 1000


# ------------------------------------------------------------------------------------ failures


def failing(path: str) -> str:
    class Broken(SafetensorsWriter):
        def write_data(self, plan, planner):
            result = super().write_data(plan, planner)
            if dist.get_rank() == 1:
                raise OSError(5, "the disk of this rank is broken")
            return result

    try:
        checkpointer.dcp.save(laid_out(values(), "rows"), Broken(path))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_failure_of_one_rank_is_an_ordinary_error_on_all_that_names_it(tmp_path):
    save_error, other = run(2, failing, str(tmp_path / "checkpoint-2"))
    assert save_error.startswith("SaveError")
    assert "rank 1: OSError: [Errno 5] the disk of this rank is broken" in save_error
    assert other == save_error
    assert listed(tmp_path) == []
    assert not list((tmp_path / ".checkpointer" / "tmp").iterdir())
    run(2, save, str(tmp_path / "checkpoint-2"), "rows")  # and the lock is free
    assert listed(tmp_path) == [2]


def test_a_killed_rank_leaves_the_earlier_checkpoint_and_nothing_of_the_new_one(tmp_path):
    run(2, save, str(tmp_path / "checkpoint-1"), "rows")
    outcomes = launch(2, functools.partial(dying, str(tmp_path / "checkpoint-2")))
    assert outcomes[1].status == -9
    assert listed(tmp_path) == [1]
    run(2, save, str(tmp_path / "checkpoint-3"), "rows")
    assert listed(tmp_path) == [1, 3]
    assert not list((tmp_path / ".checkpointer" / "tmp").iterdir())
    verified(tmp_path)


def dying(path: str) -> None:
    import os
    import signal

    class Dying(SafetensorsWriter):
        def write_data(self, plan, planner):
            result = super().write_data(plan, planner)
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    checkpointer.dcp.save(laid_out(values(), "rows"), Dying(path))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_flipped_bit_is_found_however_the_chunk_is_read(tmp_path, layout):
    path = tmp_path / "checkpoint-3"
    run(2, save, str(path), "rows")
    file = path / "model-rank-00001.safetensors"
    flip(file, -300)
    for message in run(4, corrupt, str(path), layout):
        assert message.startswith("CorruptCheckpointError")
        assert "do not match their hash" in message


def corrupt(path: str, layout: str) -> str:
    try:
        checkpointer.dcp.load(laid_out(values(), layout), path)
    except CorruptCheckpointError as error:
        return f"CorruptCheckpointError: {error}"
    return "no error"


def test_a_run_that_a_manager_writes_to_is_refused(tmp_path):
    with CheckpointManager(tmp_path, state={"x": 1}) as mgr:
        mgr.save(1)
        with pytest.raises(checkpointer.errors.RunLockedError):
            checkpointer.dcp.save({"w": torch.ones(2)}, tmp_path / "checkpoint-2")
        mgr.save(3)
    checkpointer.dcp.save({"w": torch.ones(2)}, tmp_path / "checkpoint-4")
    assert listed(tmp_path) == [1, 3, 4]


def test_a_directory_of_another_name_is_refused_with_the_form_it_must_have(tmp_path):
    with pytest.raises(ConfigError, match="<run root>/checkpoint-<step>"):
        SafetensorsWriter(tmp_path / "step_5")
    assert not SafetensorsWriter.validate_checkpoint_id(tmp_path)
    assert SafetensorsWriter.validate_checkpoint_id(tmp_path / "checkpoint-5")


def test_plan_caching_is_refused_before_anything_is_written(tmp_path):
    planner = functools.partial(dcp.DefaultSavePlanner, enable_plan_caching=True)
    try:
        checkpointer.dcp.save({"w": torch.ones(2)}, tmp_path / "checkpoint-1", planner=planner())
        with pytest.raises((ConfigError, SaveError), match="enable_plan_caching"):
            checkpointer.dcp.save({"w": torch.ones(2)}, tmp_path / "checkpoint-2", planner=planner())
    finally:
        for name in [name for name in vars(dcp.planner.SavePlanner) if name.startswith("_cached")]:
            getattr(dcp.planner.SavePlanner, name).clear()
    assert listed(tmp_path) == [1]


def test_the_checkpoint_id_of_the_call_names_the_directory(tmp_path):
    writer = SafetensorsWriter()
    for step in (1, 2):
        with pytest.warns(UserWarning, match="disabled"):
            dcp.save(
                {"w": torch.full((3,), step)}, checkpoint_id=tmp_path / f"checkpoint-{step}", storage_writer=writer
            )
    state = {"w": torch.zeros(3, dtype=torch.int64)}
    with pytest.warns(UserWarning, match="disabled"):
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint-2", storage_reader=SafetensorsReader())
    assert state["w"].tolist() == [2, 2, 2]
    assert listed(tmp_path) == [1, 2]


def test_an_object_store_works_the_same(tmp_path):
    checkpointer.dcp.save(nested(), "memory://dcp-run/checkpoint-1")
    target = emptied(nested())
    checkpointer.dcp.load(target, "memory://dcp-run/checkpoint-1")
    assert same(target, nested())
