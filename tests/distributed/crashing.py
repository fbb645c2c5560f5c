"""A job of several ranks, one of which is killed at a given operation on the disk; and what has to be true after."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from checkpointer import CheckpointManager
from checkpointer.repository import Repository
from checkpointer.storage import LocalStorage, open_storage
from tests.ranks import launch, run

OPERATIONS = ("write", "sync", "rename", "exchange", "make_directory", "put", "remove", "remove_directory", "link")
CONFIG: dict[str, Any] = {"keep": {"last": 2}}
IMPATIENT: dict[str, Any] = {**CONFIG, "write": {"rank_timeout": "5s"}}
"""Those that survive wait for the dead so long."""
STEPS = 4


def state(*, sharded: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The layer in the middle is frozen, so that its files are shared by hard link from the second save on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3))
    if sharded:
        fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    optimizer.step()


def values(model: nn.Module) -> list[float]:
    return [float(value) for tensor in model.state_dict().values() for value in tensor.full_tensor().flatten()]


def arm(after: int) -> None:
    """Kill this process in the middle of its ``after``-th operation on the disk from now: before it, or half-way."""
    count = 0

    def deadly(name: str) -> Any:
        real = getattr(LocalStorage, name)

        def call(self: LocalStorage, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == after:
                if name == "write" and after % 2:
                    Path(self.place(arguments[0])).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *arguments, **options)

        return call

    for name in OPERATIONS:
        setattr(LocalStorage, name, deadly(name))


def job(root: str, victim: int, after: int) -> None:
    """Save steps; the rank ``victim`` dies at its ``after``-th operation once the first is durable."""
    model, optimizer = state()
    with CheckpointManager(root, config=CONFIG, model=model, optimizer=optimizer) as mgr:
        stepped(model, optimizer)
        mgr.save(1)
    with CheckpointManager(root, config=IMPATIENT, model=model, optimizer=optimizer) as mgr:
        mgr.restore_latest()
        if dist.get_rank() == victim:
            arm(after)
        for step in range(2, STEPS + 1):
            stepped(model, optimizer)
            mgr.save(step).result()


def resume(root: str) -> list[Any]:
    """What is restored, and that saving goes on."""
    model, optimizer = state()
    with CheckpointManager(root, config=CONFIG, model=model, optimizer=optimizer) as mgr:
        restored = mgr.restore_latest()
        found = values(model)
        mgr.save(100).result()
    return [restored.step, found, [item.step for item in restored.skipped]]


def expected() -> dict[int, list[float]]:
    """The model after each step, as one process computes it."""
    model, optimizer = state(sharded=False)
    found = {}
    for step in range(1, STEPS + 1):
        stepped(model, optimizer)
        found[step] = [float(value) for tensor in model.state_dict().values() for value in tensor.flatten()]
    return found


def check_one(root: Path, world: int, victim: int, after: int) -> str:
    """One crash, and one job after it; says how far it came."""
    outcomes = launch(world, job, str(root), victim, after, timeout=60)
    died = outcomes[victim].status == -signal.SIGKILL
    repository = Repository(open_storage(root))
    report = repository.verify_all()
    assert report.ok, str(report)
    committed = [info.step for info in repository.list_checkpoints().checkpoints]
    assert committed, "the checkpoint before is gone"
    assert died or committed[-1] == STEPS
    rows = run(world, resume, str(root))
    for step, found, skipped in rows:
        assert step == committed[-1]
        assert skipped == []
        assert torch.allclose(torch.tensor(found), torch.tensor(expected()[step]))
    assert not list((root / ".checkpointer" / "tmp").iterdir())
    assert repository.verify_all().ok
    return f"killed after {committed[-1]}" if died else "not killed"
