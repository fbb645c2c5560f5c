"""Frozen tensors on several ranks: each rank shares the files that it has written itself, hash for hash."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.format.manifest import Manifest
from checkpointer.policy.retention import physical_size
from checkpointer.repository.repository import Repository
from checkpointer.state.dtensor import local_part
from checkpointer.storage import open_storage
from tests.support.ranks import alone, run
from tests.support.successor import files_in

WIDTH = 256
"""Of the frozen layers: 256 KiB each, beside which adapters are small."""


class Lora(nn.Module):
    """A frozen layer, and a small product of two that is trained beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(x) + self.up(self.down(x))
        return found


def build(layout: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(Lora(WIDTH), nn.Tanh(), Lora(WIDTH))
    optimized = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif layout == "fsdp":
        for layer in model:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        fully_shard(model)
        optimized = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(optimized, lr=0.01)


def adapt(
    root: str,
    layout: str,
    steps: list[int],
    write: dict[str, Any] | None = None,
    *,
    verify: str = "stream",
    thaw: int | None = None,
) -> list[dict[str, str]]:
    """Restore, train the adapters through ``steps``, save each; what the model was then.

    ``thaw``: before this step rank 1 changes an element of its part of what is frozen.
    """
    model, optimizer = build(layout)
    seen = []
    with CheckpointManager(root, config={"write": write or {}}, model=model, optimizer=optimizer) as mgr:
        mgr.restore_latest(verify=verify)
        for step in steps:
            if step == thaw and dist.get_rank() == 1:
                local_part(next(model.parameters())).view(-1)[0] += 1
            model(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            mgr.save(step)
            seen.append(values(model))
    return seen


def values(model: nn.Module) -> dict[str, str]:
    """A digest of every bit of each tensor."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {name: hashlib.sha256(whole(value).numpy()).hexdigest() for name, value in inner.state_dict().items()}


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def restored(root: str, layout: str, step: int) -> dict[str, str]:
    model, optimizer = build(layout, seed=5)
    with CheckpointManager(root, read_only=True, model=model, optimizer=optimizer) as mgr:
        mgr.restore(step)
    return values(model)


def repository(root: Path) -> Repository:
    return Repository(open_storage(root))


def infos(root: Path) -> list[CheckpointInfo]:
    return list(repository(root).list_checkpoints().checkpoints)


def manifests(root: Path) -> list[Manifest]:
    return [repository(root).manifest(info) for info in infos(root)]


def turns(root: Path) -> list[dict[str, int]]:
    """Of each checkpoint, the turn of each file that others' saves have written."""
    found = [files_in(repository(root), info) for info in infos(root)]
    return [{path: record.turn for path, record in files.items() if record.origin} for files in found]


def written(root: Path) -> list[int]:
    return [int(str(manifest.statistics["bytes_written"])) for manifest in manifests(root)]


@pytest.mark.parametrize("layout,mode", [("ddp", "async"), ("fsdp", "lazy"), ("fsdp", "sync")])
@pytest.mark.thorough(lambda layout, mode: mode == "sync")
def test_each_rank_shares_what_is_frozen_and_writes_what_has_changed(tmp_path, layout, mode):
    seen = run(2, adapt, str(tmp_path), layout, [1, 2, 3], {"mode": mode})[0]
    first, second, third = turns(tmp_path)
    assert not first
    assert len(second) == 2  # a file of each rank
    assert second.keys() == third.keys()
    assert (set(second.values()), set(third.values())) == ({2}, {3})
    base = 2 * (WIDTH * WIDTH + WIDTH) * 4
    changed = 3 * 2 * 2 * 2 * WIDTH * 4  # down and up of two layers, with two moments each
    assert written(tmp_path)[0] > base
    for bytes_written, manifest in zip(written(tmp_path)[1:], manifests(tmp_path)[1:], strict=True):
        assert bytes_written < changed + 80_000  # headers of 4096 bytes, the state of the generators, the index
        assert base < manifest.statistics["bytes_shared"] < base + 10_000
    assert physical_size(infos(tmp_path)) < base + 3 * (changed + 80_000)
    names = sorted(second)
    inodes = [{(Path(info.path) / name).stat().st_ino for name in names} for info in infos(tmp_path)]
    assert inodes[0] == inodes[1] == inodes[2]
    assert repository(tmp_path).verify_all().ok
    for step, expected in enumerate(seen, start=1):
        assert restored_alone(tmp_path, step) == expected


def restored_alone(root: Path, step: int) -> dict[str, str]:
    found: dict[str, str] = alone(restored, str(root), "plain", step)
    return found


def several(root: str, layout: str) -> None:
    """Runs of one job, each of its own root."""
    adapt(f"{root}/twice", layout, [1, 2, 3, 4, 5], {"share": 2})
    adapt(f"{root}/never", layout, [1, 2], {"share": False})
    adapt(f"{root}/thawed", layout, [1, 2, 3], thaw=2)
    adapt(f"{root}/resumed", layout, [1, 2])
    adapt(f"{root}/resumed", layout, [3])
    adapt(f"{root}/resumed", layout, [4], verify="before")
    adapt(f"{root}/resumed", layout, [5], verify="off")


def files_of_each_turn(root: Path) -> list[list[int]]:
    return [sorted(found.values()) for found in turns(root)]


def test_sharing_is_bounded_decided_by_hash_and_goes_on_after_a_resume_that_has_verified_as_in_one_process(tmp_path):
    run(2, several, str(tmp_path), "fsdp")
    assert files_of_each_turn(tmp_path / "twice") == [[], [2, 2], [], [2, 2], []]
    assert files_of_each_turn(tmp_path / "never") == [[], []]
    assert files_of_each_turn(tmp_path / "thawed") == [[], [2], [2, 3]]  # the file of rank 1 alone is written anew
    assert files_of_each_turn(tmp_path / "resumed") == [[], [2, 2], [3, 3], [4, 4], []]
    for root in tmp_path.iterdir():
        assert repository(root).verify_all().ok
    for gone in (1, 2, 3, 4, 5):
        copy = shutil.copytree(tmp_path / "resumed", tmp_path / f"without-{gone}", symlinks=True)
        left = repository(copy)
        left.lock.acquire()
        assert left.remove(left.find(gone))
        left.lock.release()
        assert [report.ok for report in left.verify_all().checkpoints] == [True] * 4


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.thorough(lambda layout: layout == "fsdp")
@pytest.mark.filterwarnings("ignore:training cannot be relied on to go on bit for bit")
def test_another_number_of_ranks_shares_nothing_at_first_and_all_is_right(tmp_path, layout):
    run(2, adapt, str(tmp_path), layout, [1, 2])
    run(4, adapt, str(tmp_path), layout, [3, 4])
    (expected,) = alone(adapt, str(tmp_path), "plain", [5])
    assert [len(found) for found in turns(tmp_path)] == [0, 2, 0, 4, 0]
    assert repository(tmp_path).verify_all().ok
    assert restored_alone(tmp_path, 5) == expected
