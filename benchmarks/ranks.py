"""Several ranks against ``dcp.save``, ``dcp.async_save`` and ``dcp.load``: ``python -m benchmarks.ranks --ranks 4``.

FSDP2 on the CPU with gloo, all contenders in one run, by turns. A stall is the time that ``save`` holds training on the
slowest rank; durable is until every byte and the commit are fsynced, by all ranks (DCP fsyncs its files, too). Prints
Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from checkpointer import CheckpointManager
from checkpointer.dcp import SafetensorsWriter

MIB = 1 << 20


class Layers(nn.Module):
    """``count`` matrices of ``rows`` x ``columns``."""

    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(rows, columns)) for _ in range(count)])


def build(count: int, rows: int, columns: int, *, dimension: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model with AdamW, whose moments are there."""
    torch.manual_seed(0)
    model = Layers(count, rows, columns)
    fully_shard(model, shard_placement_fn=lambda _: Shard(dimension))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def slowest(seconds: float) -> float:
    """Of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seconds)
    return float(max(found))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


class Managers:
    """This library, one manager for each mode, kept over the rounds as a training loop keeps it."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.managers = {
            mode: CheckpointManager(
                folder / mode, config={"write": {"mode": mode}, "keep": {"last": 1}}, model=model, optimizer=optimizer
            )
            for mode in ("sync", "async", "lazy")
        }

    def save(self, mode: str, step: int) -> tuple[float, float]:
        manager = self.managers[mode]
        stall, handle = timed(lambda: manager.save(step))
        began = time.perf_counter()
        handle.result()
        durable = stall + time.perf_counter() - began
        manager.wait()
        return stall, durable


def peers(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, name: str, step: int
) -> tuple[float, float]:
    """DCP, as its tutorials use it, with its own files or with ours."""
    path = folder / name / f"checkpoint-{step}"

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    if name == "dcp.async_save":
        stall, pending = timed(lambda: dcp_async_save(state(), checkpoint_id=path))
        began = time.perf_counter()
        pending.result()
        return stall, stall + time.perf_counter() - began
    writer = SafetensorsWriter(path) if name == "dcp.save, our writer" else None
    where: dict[str, Any] = {"storage_writer": writer} if writer else {"checkpoint_id": path}
    stall, _ = timed(lambda: dcp_save(state(), **where))
    return stall, stall


def saves(folder: Path, shape: Sequence[int], rounds: int) -> list[tuple[str, float, float]]:
    model, optimizer = build(*shape)
    ours = Managers(folder, model, optimizer)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for step in range(1, rounds + 2):  # the first is a warm-up
        for name in ("dcp.save", "dcp.save, our writer", "dcp.async_save"):
            seconds.setdefault(name, []).append(peers(folder, model, optimizer, name, step))
            dist.barrier()
            if dist.get_rank() == 0 and step <= rounds:
                shutil.rmtree(folder / name / f"checkpoint-{step}")
        for mode in ours.managers:
            seconds.setdefault(f"checkpointer, {mode}", []).append(ours.save(mode, step))
    for manager in ours.managers.values():
        manager.close()
    return [
        (
            name,
            slowest(statistics.median(stall for stall, _ in rows[1:])),
            slowest(statistics.median(durable for _, durable in rows[1:])),
        )
        for name, rows in seconds.items()
    ]


def restores(folder: Path, shape: Sequence[int], rounds: int, dimension: int) -> list[tuple[str, float, float]]:
    """Of what ``saves`` has left, at this number of ranks and with shards along ``dimension``."""
    model, optimizer = build(*shape, dimension=dimension)
    step = rounds + 1
    found = []
    with CheckpointManager(folder / "sync", read_only=True, model=model, optimizer=optimizer) as manager:
        ours = [timed(lambda: manager.restore(step))[0] for _ in range(rounds + 1)]

    def load() -> None:
        weights, moments = get_state_dict(model, optimizer)
        dcp_load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp.save" / f"checkpoint-{step}")

    theirs = [timed(load)[0] for _ in range(rounds + 1)]
    for name, rows in (("dcp.load, nothing checked", theirs), ("checkpointer, every hash checked", ours)):
        value = slowest(statistics.median(rows[1:]))
        found.append((name, value, value))
    return found


def planning(folder: Path, tensors: int) -> list[tuple[str, float, float]]:
    """A save of many small tensors: what agreeing on it costs, the first time and after."""
    model, optimizer = build(tensors, 4, 8)
    with CheckpointManager(folder / "plan", config={"keep": {"last": 1}}, model=model, optimizer=optimizer) as manager:
        stalls = []
        for step in range(1, 4):
            stall, handle = timed(partial(manager.save, step))
            handle.result()
            manager.wait()
            stalls.append(stall)
    theirs = [peers(folder, model, optimizer, "dcp.async_save", step)[0] for step in (901, 902)]
    return [
        ("checkpointer, async, the first save", slowest(stalls[0]), slowest(stalls[0])),
        ("checkpointer, async, later saves", slowest(stalls[-1]), slowest(stalls[-1])),
        ("dcp.async_save", slowest(theirs[-1]), slowest(theirs[-1])),
    ]


def work(rank: int, world: int, port: int, end: Any, task: tuple[Callable[..., Any], Sequence[Any]]) -> None:
    call, arguments = task
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=world)
    rows = call(*arguments)
    if rank == 0:
        end.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, call: Callable[..., Any], *arguments: Any) -> list[tuple[str, float, float]]:
    """What rank 0 returns."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=work, args=(rank, world, server.port, theirs, (call, arguments)))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    theirs.close()
    found: list[tuple[str, float, float]] = ours.recv()
    for process in ranks:
        process.join()
    return found


def show(title: str, rows: Sequence[tuple[str, float, float]], *, durable: bool) -> None:
    print(f"\n### {title}\n")
    print("| | stall, s | durable, s |\n| --- | ---: | ---: |" if durable else "| | s |\n| --- | ---: |")
    for name, stall, end in rows:
        print(f"| {name} | {stall:.3f} |" + (f" {end:.3f} |" if durable else ""))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mib", type=int, default=512, help="MiB of state, of all ranks together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensors", type=int, default=10_000, help="of the planning test, moments included")
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary directory")
    options = parser.parse_args()
    count = 24
    rows = options.mib * MIB // (3 * 4 * count * 1024)
    shape = (count, rows, 1024)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        about = f"{options.ranks} ranks, {options.mib} MiB of parameters and moments, median of {options.rounds}"
        show(f"Saving: {about}", run(options.ranks, saves, folder, shape, options.rounds), durable=True)
        half = max(options.ranks // 2, 1)
        for world, dimension, what in (
            (options.ranks, 0, "the same layout"),
            (half, 0, f"{half} ranks"),
            (options.ranks, 1, "shards along the other dimension"),
        ):
            show(f"Restoring: {what}", run(world, restores, folder, shape, options.rounds, dimension), durable=False)
        title = f"The stall of {options.tensors} small tensors"
        show(title, run(options.ranks, planning, folder, options.tensors // 3), durable=False)


if __name__ == "__main__":
    main()
