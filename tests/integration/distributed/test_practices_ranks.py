"""What training loops on several ranks do besides stepping: scale gradients, skip steps, keep parameters offloaded."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from checkpointer import CheckpointManager
from tests.support.ranks import run

STEPS = 7
SKIPPED = 3
"""The step whose gradients overflow on one rank: the scaler skips it and halves its scale."""

CUT = 3
"""The last step before the job ends and another goes on: the scaler has just backed off, and counts from zero."""


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.Linear(7, 1))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        # Pinning needs an accelerator; without it the offload is the same on the processor.
        policy = CPUOffloadPolicy(pin_memory=False) if kind == "offload" else OffloadPolicy()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in [*model.children(), model]:
            fully_shard(part, mesh=mesh, offload_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(root: str, kind: str, until: int, mode: str) -> list[Any]:
    """Restore, train through step ``until``, save each step; of each the scaler's state, and a digest of all others."""
    model, optimizer = build(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    rank = dist.get_rank()
    seen = []
    config = {"write": {"mode": mode}, "keep": {"last": 2}}
    with CheckpointManager(root, config=config, model=model, optimizer=optimizer, scaler=scaler) as mgr:
        restored = mgr.restore_latest()
        if restored is None:
            torch.manual_seed(50 + rank)
        for step in range(restored.step + 1 if restored else 1, until + 1):
            loss = model(torch.randn(4, 5)).square().mean()
            overflow = float("inf") if step == SKIPPED and rank == 1 else 1.0
            scaler.scale(loss * overflow).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            mgr.save(step)
            seen.append([step, scaler.state_dict(), digest(model, optimizer)])
    return seen


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of parameters and moments; a collective call."""
    seen = hashlib.sha256()
    slots = [value for state in optimizer.state.values() for value in state.values()]
    for value in [*model.state_dict().values(), *slots]:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        seen.update(whole.detach().contiguous().numpy())
    return seen.hexdigest()


def cut_and_whole(root: str, kind: str, mode: str) -> list[Any]:
    """A run without a break, and one whose every object is built anew after ``CUT``."""
    whole = train(f"{root}/whole", kind, STEPS, mode)
    train(f"{root}/cut", kind, CUT, mode)
    return [whole, train(f"{root}/cut", kind, STEPS, mode)]


@pytest.mark.parametrize("kind,mode", [("ddp", "lazy"), ("fsdp", "lazy"), ("offload", "async")])
def test_a_gradient_scaler_and_a_step_that_it_skips_are_resumed_bit_for_bit_on_every_rank(tmp_path, kind, mode):
    found = run(2, cut_and_whole, str(tmp_path), kind, mode)
    for whole, late in found:
        assert whole[CUT:] == late
        scales = [state["scale"] for _, state, _ in whole]
        assert scales[SKIPPED - 1] == scales[SKIPPED - 2] / 2
        assert whole[SKIPPED - 1][2] == whole[SKIPPED - 2][2]  # nothing else has changed
        assert len({digest for _, _, digest in whole}) == STEPS - 1
    assert [row[2] for row in found[0][0]] == [row[2] for row in found[1][0]]
