"""A job of two ranks that fails in every stage of a save, on one rank or the other, and then saves again."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from checkpointer import CheckpointManager
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from checkpointer.testing import Fault, faulty

MODES = ("sync", "async", "lazy")
LARGE = 4 << 20
"""Numbers of a state for which there is no memory."""


class Stage(NamedTuple):
    """Where a save fails, and how."""

    name: str
    cause: str
    """Of the error that every rank raises."""
    kind: str = "SaveError"
    fault: Callable[[int], Fault] | None = None
    """Of the storage of the given rank; else it is the state that cannot be saved."""
    ranks: tuple[int, ...] = (0, 1)
    """Those that do anything in this stage."""
    modes: tuple[str, ...] = MODES


def disk(kind: Any, operation: str, path: str) -> Callable[[int], Fault]:
    return lambda rank: Fault(kind, on=[operation], path=path.format(rank=rank), forever=True)


STAGES = (
    Stage("arguments", "metric 'loss'", "ConfigError"),
    Stage("capture", "odd", "UnsupportedStateError"),
    Stage("copy", "no memory for a copy", modes=("async", "lazy")),
    Stage("write", "No space left|ENOSPC", fault=disk("ENOSPC", "write", "*model*.safetensors")),
    Stage("fsync", "EIO", fault=disk("fsync", "write", "*optimizer*.safetensors")),
    Stage("report", "EIO", fault=disk("EIO", "write", "*/index-0000{rank}.safetensors"), ranks=(1,)),
    Stage("begin", "EIO", fault=disk("EIO", "make_directory", ".checkpointer/tmp/*"), ranks=(0,)),
    Stage("index", "ENOSPC", fault=disk("short write", "write", "*/index.json"), ranks=(0,)),
    Stage("manifest", "EIO", fault=disk("EIO", "write", "*/manifest.json"), ranks=(0,)),
    Stage("directories", "EIO", fault=disk("fsync", "sync", "*"), ranks=(0,)),
    Stage("commit", "EACCES", fault=disk("EACCES", "rename", ".checkpointer/tmp/*"), ranks=(0,)),
)

PRUNE = Stage("prune", "could not prune", fault=disk("EIO", "rename", "checkpoint-*"), ranks=(0,))
"""What is committed stays: a warning, on the rank that prunes."""

CASES = [(stage, rank, mode) for stage in STAGES for rank in stage.ranks for mode in stage.modes]


class Unsupported:
    """No component may hold it."""


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """For nothing large."""
    import resource

    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def caught(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__!r}"
    return "no error"


def fail(root: Path, stage: Stage, mode: str, *, victim: bool) -> dict[str, Any]:
    """Save step 1, then step 2 with a failure on one rank, then step 3."""
    rank = dist.get_rank()
    fault = stage.fault(rank) if stage.fault else Fault()
    fault.end()
    progress: dict[str, Any] = {"seen": rank, "x": torch.full((3,), float(rank))}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = {"write": {"mode": mode}, "keep": {"last": 1}}
    with faulty(fault):
        mgr = CheckpointManager(root, config=config, progress=progress, model=model, optimizer=optimizer)
    with mgr, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step(model, optimizer)
        mgr.save(1).result()
        mgr.wait()
        if stage.name == "copy":
            progress["x"] = torch.ones(LARGE) * rank
        told = caught(lambda: broken(mgr, stage, fault, progress) if victim else mgr.save(2).result())
        if victim and stage is PRUNE:
            wait_for(lambda: bool(warned))
        dist.barrier()
        between = committed(root)
        dist.barrier()
        fault.end()
        progress.pop("odd", None)
        progress["x"] = torch.full((3,), float(rank))
        step(model, optimizer)
        mgr.save(3).result()
    dist.barrier()
    return {
        "told": told,
        "between": between,
        "after": committed(root),
        "warned": [str(item.message) for item in warned],
    }


def wait_for(condition: Callable[[], bool]) -> None:
    """Pruning is over some time after the save."""
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()


def broken(mgr: CheckpointManager, stage: Stage, fault: Fault, progress: dict[str, Any]) -> None:
    """The save that fails here."""
    if stage.fault:
        fault.restart()
        mgr.save(2).result()
    elif stage.name == "arguments":
        mgr.save(2, metrics={"loss": "low"}).result()
    elif stage.name == "capture":
        progress["odd"] = Unsupported()
        mgr.save(2).result()
    else:
        with no_memory():
            mgr.save(2).result()


def committed(root: Path) -> list[int]:
    return [info.step for info in Repository(open_storage(root)).list_checkpoints().checkpoints]


def all_stages(folder: str, cases: Iterable[tuple[str, int, str]]) -> dict[str, dict[str, Any]]:
    """Some cases, in one job."""
    known = {stage.name: stage for stage in (*STAGES, PRUNE)}
    return {
        f"{name}-{victim}-{mode}": fail(
            Path(folder, f"{name}-{victim}-{mode}"), known[name], mode, victim=dist.get_rank() == victim
        )
        for name, victim, mode in cases
    }
