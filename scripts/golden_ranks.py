"""The golden checkpoint that two ranks have written with FSDP2: what ``make_golden.py`` saves, and what is expected.

``tests/integration/format/test_golden_ranks.py`` restores it into one process and into two ranks, and compares
the outcome with ``expected.json``, which holds the plain hexadecimal bits of whole tensors.
"""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import random
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from scripts import make_golden as golden

FOLDER = golden.FOLDER / "ranks"
WORLD = 2
SAVED = 3
"""The step. The one before it is saved too, for files to share with, and is removed."""


class Net(nn.Module):
    """Rows that two ranks cannot share evenly, a single row, a frozen layer, and buffers that each rank has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 1)

    def fill(self) -> None:
        """Values that need no generator, so that every machine has the same."""
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_((torch.arange(parameter.numel()) / 16 - number).reshape(parameter.shape))


def components(*, sharded: bool) -> dict[str, Any]:
    """What is saved: live objects of this process, or of this rank."""
    net = Net()
    net.fill()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in (net.first, net.frozen):
            fully_shard(layer)
        fully_shard(net)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "progress": {}}


def train(live: dict[str, Any], rank: int) -> None:
    """A step of which every element depends on itself alone, and what each rank has of its own."""
    for parameter in live["optimizer"].param_groups[0]["params"]:
        parameter.grad = parameter.detach() * 0.5 + 1
    live["optimizer"].step()
    live["optimizer"].zero_grad()
    live["scheduler"].step()
    live["model"].norm.running_mean += 1 + rank
    seen = live["progress"].get("seen", 0) + 10 + rank
    live["progress"].update(seen=seen, history=torch.full((3,), float(seen)))


def seed(rank: int) -> None:
    """Other numbers for each rank."""
    torch.manual_seed(3 + rank)
    random.seed(3 + rank)
    np.random.seed(3 + rank)  # noqa: NPY002


def describe(live: dict[str, Any]) -> dict[str, Any]:
    """The state of this rank in whole tensors, and what its generators draw next; a collective call."""
    net: Net = live["model"]
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    found = {
        "model": [golden.describe(_whole(dict(net.state_dict()))), flags],
        "optimizer": golden.describe(_whole(live["optimizer"].state_dict())),
        "scheduler": golden.describe(live["scheduler"].state_dict()),
        "progress": golden.describe(live["progress"]),
        "rng": golden.describe_draws(),
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def _whole(value: Any) -> Any:
    """``value`` with whole tensors in the place of those of which each rank holds a part."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def make(folder: pathlib.Path) -> None:
    """Write the checkpoint and ``expected.json`` into ``folder``."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        ranks = [context.Process(target=_save, args=(rank, place)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank has failed, so there is no golden checkpoint of several")
        name = f"checkpoint-{SAVED}"
        shutil.copytree(pathlib.Path(place, "run", name), folder / name)
        told = [json.loads(pathlib.Path(place, f"{rank}.json").read_text("ascii")) for rank in range(WORLD)]
    expected = {"checkpoint": told[0]["checkpoint"], "ranks": [part["state"] for part in told]}
    text = json.dumps(expected, ensure_ascii=True, separators=(",", ":")).replace(',"', ',\n"')
    (folder / "expected.json").write_text(text + "\n", encoding="ascii")


def _save(rank: int, place: str) -> None:
    """One rank of the job."""
    from checkpointer import CheckpointManager

    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=WORLD)
    live = components(sharded=True)
    with golden.fixed_surroundings(), CheckpointManager(pathlib.Path(place, "run"), **live) as manager:
        for step in (SAVED - 1, SAVED):
            train(live, rank)
            seed(rank)
            handle = manager.save(step, epoch=1, metrics={"loss": 0.5}, files={"config.json": b'{"hidden": 5}\n'})
            assert handle is not None
            info = handle.result()
        told = {"checkpoint": golden.describe_info(info), "state": describe(live)}
    pathlib.Path(place, f"{rank}.json").write_text(json.dumps(told), encoding="ascii")
    dist.destroy_process_group()
