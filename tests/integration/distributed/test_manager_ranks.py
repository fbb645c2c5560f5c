"""The manager on several ranks: the same two calls, on every rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpointer import CheckpointManager
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.support.ranks import run

STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return found


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Net()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        for part in (model.first, model.last):
            fully_shard(part)
        fully_shard(model)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "parts"))
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step on data of this rank's own random numbers, of three generators."""
    x = torch.randn(4, 5) + random.random() + np.random.rand()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def seed_all(base: int) -> None:
    torch.manual_seed(base + rank())
    random.seed(base + rank())
    np.random.seed(base + rank())


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state in values, and what this rank alone has."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    state = {f"model.{name}": full(value) for name, value in inner.state_dict().items()}
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    for parameter, slots in optimizer.state.items():
        state |= {f"{names[id(parameter)]}.{slot}": full(value) for slot, value in slots.items()}
    state["random"] = torch.tensor([random.random(), np.random.rand(), torch.rand(())])
    return {name: value.numpy().tobytes() for name, value in state.items()}


def full(value: torch.Tensor) -> torch.Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().clone()


def train(root: str, kind: str, until: int, config: dict[str, Any] | None = None) -> list[Any]:
    """Restore, train up to and with step ``until``, save each step."""
    model, optimizer = build(kind, seed=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with CheckpointManager(root, config=config, model=model, optimizer=optimizer, scheduler=scheduler) as mgr:
        restored = mgr.restore_latest()
        if restored is None:
            seed_all(100)
        losses = []
        for step in range(restored.step + 1 if restored else 0, until + 1):
            losses.append(train_step(model, optimizer))
            scheduler.step()
            mgr.save(step)
    return [losses, fingerprint(model, optimizer)]


def infos(root: Path) -> list[Any]:
    return list(Repository(open_storage(root)).list_checkpoints().checkpoints)


def verified(root: Path) -> None:
    report = Repository(open_storage(root)).verify_all()
    assert report.ok, str(report)
    assert all(not item.extra for item in report.checkpoints)
    assert not list((root / ".checkpointer" / "tmp").iterdir())


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_training_goes_on_bit_for_bit_on_every_rank(tmp_path, kind):
    world = 4 if kind == "hsdp" else 2
    straight = run(world, train, str(tmp_path / "straight"), kind, STEPS)
    run(world, train, str(tmp_path / "broken"), kind, 3)
    resumed = run(world, train, str(tmp_path / "broken"), kind, STEPS)
    for (losses, state), (late, found) in zip(straight, resumed, strict=True):
        assert losses[4:] == late
        assert state == found
    verified(tmp_path / "broken")
    assert [info.step for info in infos(tmp_path / "broken")] == list(range(STEPS + 1))


def leftovers(root: str) -> list[Any]:
    """What each rank has of its own is a name, and a tensor without elements; its random numbers are those of all."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    state = {"of": rank(), "samples": torch.empty(0, 3)}
    with CheckpointManager(root, state=state) as mgr:
        mgr.save(0)
        state.clear()
        mgr.restore(0)
    return [state["of"], state["samples"].shape]


def test_what_a_rank_has_of_its_own_may_be_a_tensor_without_elements(tmp_path):
    assert run(2, leftovers, str(tmp_path)) == [[0, (0, 3)], [1, (0, 3)]]
    verified(tmp_path)


# ------------------------------------------------------------------------------------ restoring at any layout


class Wide(nn.Module):
    """Sizes that no number of ranks divides evenly, and a layer with fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.head = nn.Linear(6, 1)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.down(torch.relu(self.up(x))))
        return found


def arranged(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(seed)
    model = Wide()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "tp":
        mesh = init_device_mesh("cpu", (world,))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif layout == "2d":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "fsdp":
        fully_shard(model.up)
        fully_shard(model)
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "parts"))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Values and moments that any layout computes alike: each element by itself."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    optimizer.zero_grad()
    model.scale.fill_(2.5)


def values_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    found = fingerprint(model, optimizer)
    del found["random"]
    return found


def save_as(root: str, layout: str, mode: str) -> dict[str, bytes]:
    model, optimizer = arranged(layout, seed=0)
    config = {"write": {"mode": mode}}
    with CheckpointManager(root, config=config, model=model, optimizer=optimizer, note={"n": 7}) as mgr:
        mgr.save(0)
        moved(model, optimizer)
        mgr.save(1, metrics={"loss": 0.5}, files={"config.json": b"{}"})
        found = values_of(model, optimizer)
        moved(model, optimizer)  # while it is being written
    return found


def restore_as(root: str, layout: str, warm: bool = False, verify: str = "stream") -> list[Any]:
    model, optimizer = arranged(layout, seed=9)
    if warm:
        moved(model, optimizer)
    note = {"n": 0}
    with CheckpointManager(root, read_only=True, model=model, optimizer=optimizer, note=note) as mgr:
        restored = mgr.restore_latest(verify=verify)
    assert restored.step == 1
    assert note == {"n": 7}
    return [values_of(model, optimizer), restored.report.changed]


@pytest.mark.parametrize(
    "saved,world,mode",
    [("fsdp", 4, "async"), ("2d", 4, "lazy"), ("tp", 2, "sync"), ("plain", 2, "async"), ("fsdp", 2, "lazy")],
)
def test_what_one_layout_saves_every_other_restores(tmp_path, saved, world, mode):
    expected = run(world, save_as, str(tmp_path), saved, mode)[0]
    verified(tmp_path)
    assert infos(tmp_path)[-1].metrics == {"loss": 0.5}
    for layout, size in (("fsdp", 4), ("2d", 4), ("tp", 2), ("plain", 1)):
        arguments = (str(tmp_path), layout, layout == "tp")
        for found, changed in run(size, restore_as, *arguments) if size > 1 else [restore_as(*arguments)]:
            assert found == expected, (layout, size)
            assert any(f"saved by {world} ranks, restored by {size}" in line for line in changed) == (world != size)


def test_one_process_saves_and_ranks_restore_before_anything_is_checked(tmp_path):
    expected = save_as(str(tmp_path), "plain", "sync")
    for found, _ in run(2, restore_as, str(tmp_path), "fsdp", False, "before"):
        assert found == expected
