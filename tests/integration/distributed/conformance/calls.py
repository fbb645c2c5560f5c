"""What PyTorch puts its own storage for DCP through, as cases for :class:`SafetensorsWriter` and its reader.

Each case is a function of a folder of its own, called on every rank of a job; its name is a sentence. Jobs are started
once for all their cases. Learned from PyTorch's ``test/distributed/checkpoint``: its cases of planners, and of formats
that are not ours, are not here. This module has what they share.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from checkpointer.dcp import SafetensorsReader, SafetensorsWriter
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage

Case = Callable[[str], None]


def run_cases(cases: Sequence[Case], root: str) -> dict[str, str]:
    """Call each case on this rank; the traceback of each that failed, by name."""
    failed = {}
    for case in cases:
        try:
            case(f"{root}/{case.__name__}")
        except BaseException:  # DCP's own error is no Exception
            failed[case.__name__] = traceback.format_exc()
        meet()
    return failed


TABLE = torch.arange(200.0).reshape(10, 20)


def save(state: dict[str, Any], path: str, **options: Any) -> None:
    dcp.save(state, storage_writer=SafetensorsWriter(path), **options)


def load(state: dict[str, Any], path: str, **options: Any) -> None:
    dcp.load(state, storage_reader=SafetensorsReader(path), **options)


def steps(root: str) -> list[int]:
    """What is committed, once all ranks are here; every byte of it is checked."""
    meet()
    repository = Repository(open_storage(root))
    assert not [entry.name for entry in repository.storage.list_directory(".checkpointer/tmp")]
    report = repository.verify_all()
    assert report.ok, report
    meet()
    return [info.step for info in repository.list_checkpoints().checkpoints]


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def fails(text: str, *, ranks: Sequence[int] | None = None) -> Iterator[None]:
    """DCP's own error, on every rank, for failures of just these ranks; all of them if ``None``."""
    with pytest.raises(CheckpointException) as caught:
        yield
    told = {rank: f"{type(wrapped[0]).__name__}: {wrapped[0]}" for rank, wrapped in caught.value.failures.items()}
    assert ranks is None or sorted(told) == list(ranks), told
    assert all(text in message for message in told.values()), told


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of it, on every rank, under DCP's names."""
    everything = StateDictOptions(full_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=everything)
    return {"model": weights, "optimizer": moments}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Failing(SafetensorsWriter):
    """Fails in one of its methods on one rank, before or after it has done its work."""

    def __init__(self, stage: str, rank: int, path: str, *, late: bool = False) -> None:
        super().__init__(path)
        if this_rank() == rank:
            setattr(self, stage, failing(getattr(self, stage), late=late))


class FailingReader(SafetensorsReader):
    """As :class:`Failing`."""

    def __init__(self, stage: str, rank: int, path: str, *, late: bool = False) -> None:
        super().__init__(path)
        if this_rank() == rank:
            setattr(self, stage, failing(getattr(self, stage), late=late))


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def failing(method: Callable[..., Any], *, late: bool) -> Callable[..., Any]:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        if late:
            method(*arguments, **keywords)
        raise OSError(28, "the disk is full")

    return fail
