"""How many bytes the ranks of many hosts put into their store, and get from it, when they find each other and agree."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from checkpointer.distributed import session, store_ranks
from checkpointer.distributed.clock import SharedClock
from checkpointer.distributed.exchange import Ranks
from checkpointer.distributed.liveness import Process
from checkpointer.distributed.store import StoreClient
from checkpointer.restore.restorer import _agreed, _Seen
from tests.support.rank_threads import on_ranks

PER_HOST = 8
WHERE = "3f1c8a52-0f5e-4a57-9b1e-2f6f0a3f4d{:02d} pid:[4026531836] time:[4026531834]"


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes by rank; ranks are on hosts of eight."""
    size: Counter[str] = Counter()
    ask = StoreClient._asked

    def asking(client: StoreClient, function: Callable[..., Any], *arguments: Any) -> Any:
        answer = ask(client, function, *arguments)
        if function.__name__ == "set":
            size[threading.current_thread().name] += len(arguments[0]) + len(arguments[1])
        elif function.__name__ in ("get", "multi_get"):
            size[threading.current_thread().name] += sum(map(len, [answer] if isinstance(answer, bytes) else answer))
        return answer

    def process() -> Process:
        rank = int(threading.current_thread().name.split()[1])
        return Process(WHERE.format(rank // PER_HOST), 1000 + rank, 123456789)

    monkeypatch.setattr(StoreClient, "_asked", asking)
    monkeypatch.setattr(session, "this_process", process)
    # In the rank's own thread, which is known by its name.
    monkeypatch.setattr(store_ranks, "in_time", lambda _, talk, *arguments, **options: talk(*arguments, **options))
    return size


@pytest.mark.parametrize("size", [16, 64])
def test_a_ranks_bytes_do_not_grow_with_the_number_of_ranks(traffic, size):
    barrier = threading.Barrier(size)

    def program(ranks: Ranks) -> list[int]:
        name, found = f"rank {ranks.rank}", []
        with ranks.exchange("finding each other") as exchange:
            exchange.barrier()
        found.append(traffic[name])
        SharedClock(ranks).ask(1, signalled=False, due=lambda: False)
        found.append(traffic[name])
        with ranks.exchange("looking for a checkpoint") as exchange:
            _agreed(exchange, _Seen([f"{number:032x}" for number in range(800)], empty=False))
        found.append(traffic[name])
        barrier.wait()
        return found

    coordinator, *others = on_ranks(size, program)
    for found, clock, candidates in others:
        assert found < 1024
        assert clock - found < 64
        assert candidates - clock < 64
    assert coordinator[2] < 300 * size + 1024 * size / PER_HOST
