"""Jobs of several ranks: real processes, gloo, and a store that outlives each of them, as torchrun's does.

The processes are forked from a server that has imported torch, so that a job of four costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "pytest", "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.default_planner", "checkpointer.manager", "checkpointer.dcp",
    "torch._dynamo",  # the first DTensor imports it, which takes seconds
])  # fmt: skip


class Outcome(NamedTuple):
    """How one rank ended."""

    value: Any = None
    error: str = ""
    """Traceback."""
    status: int = 0
    """Exit status; negative: the signal that killed it."""


def store() -> Any:
    """A new store for a job."""
    return dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


def launch(
    world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120, server: Any = None
) -> list[Outcome]:
    """Call ``work(*arguments)`` on every rank of a job of ``world`` ranks; wait for all of them.

    ``server``: the store of a job that is started again, as torchrun does: with all that was said before.
    """
    server = server or store()
    processes, ends = [], []
    for rank in range(world):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_child, args=(rank, world, server.port, theirs, work, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        # All of them before any is joined: a rank that has much to tell waits until somebody reads it, and the others
        # wait for that rank.
        told = [_told(process, end, timeout) for process, end in zip(processes, ends, strict=True)]
        return [_ended(process, found) for process, found in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120, server: Any = None) -> list[Any]:
    """As :func:`launch`, for work that succeeds: what it returned, by rank."""
    outcomes = launch(world, work, *arguments, timeout=timeout, server=server)
    errors = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome.error or outcome.status]
    assert not errors, "\n".join(f"{text}\n{outcomes[int(text.split()[1][:-1])].error}" for text in errors)
    return [outcome.value for outcome in outcomes]


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in one process without a process group: this one."""
    assert not dist.is_initialized()
    return work(*arguments)


def _told(process: Any, end: Connection, timeout: float) -> Outcome:
    found = Outcome()
    if end.poll(timeout):
        with contextlib.suppress(EOFError):
            found = pickle.loads(end.recv_bytes())  # tensors by value: the rank that sent them is gone
    else:
        found = Outcome(error=f"still running after {timeout} s")
        process.kill()
    return found


def _ended(process: Any, found: Outcome) -> Outcome:
    process.join()
    return found._replace(status=process.exitcode or 0)


def _child(
    rank: int, world: int, port: int, end: Connection, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    # As torchrun has it, for programs that call init_process_group themselves.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        if not getattr(work, "makes_its_group", False):
            client = dist.TCPStore("127.0.0.1", port, None, is_master=False)
            limit = dt.timedelta(seconds=60)
            dist.init_process_group("gloo", store=client, rank=rank, world_size=world, timeout=limit)
        end.send_bytes(pickle.dumps(Outcome(work(*arguments))))
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # another rank may be dead, as planned
                dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        end.send_bytes(pickle.dumps(Outcome(error=traceback.format_exc())))
    finally:
        end.close()
