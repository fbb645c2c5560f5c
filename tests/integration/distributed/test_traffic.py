"""How often a rank asks the job's store: not at all where nothing is due, and as often whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from checkpointer import CheckpointManager
from checkpointer.distributed.store import StoreClient
from tests.support.ranks import run


class Counter:
    """Every question to the store; looks for the same are one, since they are repeated as long as a rank waits."""

    def __init__(self) -> None:
        self.keys = self.bytes = 0
        """That this rank has put into the store, and that it has put or got; but not how often it asked for a key."""
        asked: set[tuple[str, str, str]] = set()
        ask, make = StoreClient._asked, StoreClient.__init__

        def made(mail: StoreClient, store: Any, prefix: str) -> None:
            make(mail, store, prefix)
            mail.channel = prefix.rpartition("/")[2]  # type: ignore[attr-defined]

        def asking(mail: StoreClient, function: Callable[..., Any], *arguments: Any) -> Any:
            what = str(arguments[0])
            if function.__name__ == "check":  # of one exchange: all ranks, or those that are missing
                what = arguments[0][0].rpartition("/")[0]
            if function.__name__ != "delete_key":  # nobody waits for that
                asked.add((mail.channel, function.__name__, what))  # type: ignore[attr-defined]
            answer = ask(mail, function, *arguments)
            if function.__name__ == "set":
                self.keys += 1
                self.bytes += len(arguments[0]) + len(arguments[1])
            elif function.__name__ in ("get", "multi_get"):
                self.bytes += sum(map(len, [answer] if isinstance(answer, bytes) else answer))
            return answer

        StoreClient.__init__, StoreClient._asked = made, asking  # type: ignore[method-assign,assignment]
        self._asked = asked

    def since(self) -> dict[str, int]:
        """Questions by channel since this was last called."""
        found: dict[str, int] = {}
        for channel, *_ in self._asked:
            found[channel] = found.get(channel, 0) + 1
        self._asked.clear()
        return found

    def traffic(self) -> tuple[int, int]:
        """Keys and bytes since this was last called."""
        found = self.keys, self.bytes
        self.keys = self.bytes = 0
        return found


def saving(root: str) -> list[dict[str, int]]:
    """What is asked while nothing is due, in the first save, and in those that follow."""
    counter = Counter()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = []
    config = {"save": {"every_n_steps": 10, "every_n_epochs": 5}, "keep": {"last": 2}}
    with CheckpointManager(root, config=config, model=model, optimizer=optimizer) as mgr:
        for step in range(41):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            assert mgr.should_save(step, epoch=1) == (step % 10 == 0)
            saved = mgr.save(step, epoch=1)
            assert (saved is not None) == (step % 10 == 0)
            if saved is not None:
                saved.result()
            if step % 10 in (0, 9):
                found.append(counter.since())
    dist.barrier()
    return found


def test_a_rank_asks_nobody_while_nothing_is_due_and_as_often_whatever_the_number_of_ranks(tmp_path):
    for world in (2, 4):
        for times in run(world, saving, str(tmp_path / str(world))):
            first, *later = times[::2]
            assert times[1::2] == [{}] * 4  # no save was due
            assert (first["main"], first["writer"]) == (9, 6)  # opening the run is two exchanges, a save is one
            assert later == [{"main": 3, "writer": 6}] * 4


def traffic_of_saves(root: str, tensors: int) -> list[tuple[int, int]]:
    """Keys and bytes through the store, of this rank, in each of some saves."""
    counter = Counter()
    torch.manual_seed(0)
    model = nn.ParameterList([torch.ones(4) for _ in range(tensors)])
    found = []
    with CheckpointManager(root, config={"save": {"every": "1h"}}, model=model) as mgr:
        mgr.restore_latest()
        for step in range(4):
            mgr.save(step, force=True).result()
            found.append(counter.traffic())
    return found


def test_a_save_takes_three_keys_and_a_kibibyte_of_the_store_from_each_rank(tmp_path):
    """With what it reports of its own files, whatever the number of ranks; and one key more where time rules ask."""
    for world in (2, 4):
        coordinator, *others = run(world, traffic_of_saves, str(tmp_path / str(world)), 1)
        for saves in others:
            assert all(keys in (3, 4) and size < 1200 for keys, size in saves[1:]), saves
        assert all(size < 1200 * world for _, size in coordinator[1:]), coordinator
