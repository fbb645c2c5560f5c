"""FSDP2 on GPUs with parameters and moments kept in host memory: exact, and restored into the pinned memory itself."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from checkpointer import CheckpointManager
from checkpointer.state.dtensor import local_part
from tests.support.ranks import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS, CUT = 6, 3


def train(root: str, until: int, mode: str) -> list[Any]:
    """Restore, train, save each step: of each a digest of this rank's part, at last where that lies."""
    torch.manual_seed(0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.2), nn.Linear(128, 3)).to(device)
    for part in (*model, model):
        fully_shard(part, offload_policy=CPUOffloadPolicy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[Any] = []
    config = {"write": {"mode": mode}, "keep": {"last": 2}}
    with CheckpointManager(root, config=config, model=model, optimizer=optimizer) as mgr:
        restored = mgr.restore_latest()
        if restored is None:
            torch.manual_seed(7 + dist.get_rank())
        for step in range(restored.step + 1 if restored else 1, until + 1):
            model(torch.randn(8, 64, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            mgr.save(step)
            seen.append([step, digest(model, optimizer)])
    parts = [local_part(parameter) for parameter in model.parameters()]
    return [seen, {(part.device.type, part.is_pinned()) for part in parts if part.numel()}]


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    slots = [value for state in optimizer.state.values() for value in state.values()]
    for value in [*model.state_dict().values(), *slots]:
        found.update(local_part(value).contiguous().numpy())
    return found.hexdigest()


def cut_and_whole(root: str, mode: str) -> list[Any]:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    whole = train(f"{root}/whole", STEPS, mode)
    train(f"{root}/cut", CUT, mode)
    return [whole, train(f"{root}/cut", STEPS, mode)]


cut_and_whole.makes_its_group = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("mode", ["sync", "async", "lazy"])
def test_parameters_that_are_offloaded_are_resumed_bit_for_bit_and_stay_in_pinned_host_memory(tmp_path, world, mode):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    for (whole, places), (late, after) in run(world, cut_and_whole, str(tmp_path), mode):
        assert whole[CUT:] == late
        assert places == after == {("cpu", True)}
