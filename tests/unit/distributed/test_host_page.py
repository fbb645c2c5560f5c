"""One rank of a host looks into the store for all; the others see on its page of memory when it is worth a look."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from checkpointer.distributed import session
from checkpointer.distributed.host_page import Address, HostPage, PageReader
from checkpointer.distributed.liveness import Process, this_process
from checkpointer.distributed.session import Session
from checkpointer.distributed.store import StoreClient
from checkpointer.distributed.store_ranks import TRAINING, StoreRanks
from tests.support.ranks import CONTEXT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are found in /proc")


def read_elsewhere(process: Process, address: Address, end: Any) -> None:
    reader = PageReader(process, address)
    end.send([reader.counted(TRAINING), reader.counted("writer")] if reader else None)


def test_another_process_reads_the_page_channel_by_channel():
    page = HostPage()
    page.count(TRAINING, 7 << 16)
    page.count("writer", 2**60)
    ours, theirs = CONTEXT.Pipe()
    other = CONTEXT.Process(target=read_elsewhere, args=(this_process(), page.address, theirs))
    other.start()
    assert ours.recv() == [7 << 16, 2**60]
    other.join()


@pytest.mark.parametrize("case", ["no process", "no page", "ended", "closed", "another file", "a pipe"])
def test_a_page_that_is_not_there_is_none(case):
    page, process = HostPage(), this_process()
    address: Address | None = page.address
    assert address is not None
    ends = os.pipe()
    if case == "no process":
        process = None
    elif case == "no page":
        address = None
    elif case == "ended":
        child = CONTEXT.Process(target=int)
        child.start()
        child.join()
        assert process is not None
        process = process._replace(pid=child.pid)
    elif case == "closed":
        page.close()
        page.count(TRAINING, 1)
    else:
        address = address._replace(fd=ends[0] if case == "a pipe" else 1)
    assert not PageReader(process, address)
    for end in ends:
        os.close(end)


def test_pages_and_readers_leave_no_descriptor_open():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        page = HostPage()
        assert PageReader(this_process(), page.address)
        page.close()
        HostPage()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


# ------------------------------------------------------------------------------------ waiting


class Looks:
    """Counts what each thread asks the store while it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        ask = StoreClient._asked

        def asking(client: StoreClient, function: Callable[..., Any], *arguments: Any) -> Any:
            name = threading.current_thread().name
            self.asked[name] += 1
            if function.__name__ == "check":
                self.keys[name] = max(self.keys[name], len(arguments[0]))
            return ask(client, function, *arguments)

        patch.setattr(StoreClient, "_asked", asking)


def late_answer(size: int, late: float, before: Callable[[int, Session], None] = lambda _rank, _session: None) -> float:
    """An exchange in which the last rank is late; returns how long after it the others were done."""
    store = dist.HashStore()
    arrived: list[float] = []
    done: list[float] = []

    def run(rank: int) -> None:
        threading.current_thread().name = f"rank {rank}"
        life = Session(dist.PrefixStore("job", store), rank, size)
        ranks = StoreRanks(life, timeout=30)
        with ranks.exchange("finding each other") as exchange:
            exchange.barrier()
        before(rank, life)
        if rank == size - 1:
            time.sleep(late)
            arrived.append(time.monotonic())
        with ranks.exchange("the save of step 5") as exchange:
            words = exchange.gather(rank, int)
            assert exchange.broadcast(words, list[int]) == list(range(size))
        done.append(time.monotonic())

    with ThreadPoolExecutor(size) as threads:
        list(threads.map(run, range(size)))
    return max(done) - arrived[0]


def test_while_a_host_waits_one_of_its_ranks_looks_into_the_store(monkeypatch):
    looks = Looks(monkeypatch)
    late_answer(6, 1.5, lambda _rank, _session: looks.asked.clear())
    others = [looks.asked[f"rank {rank}"] for rank in range(1, 5)]
    assert 10 < looks.asked["rank 0"] < 70
    assert max(others) < 12  # its own message and the answer, and a look now and then in case that one is stuck


def test_the_longer_a_wait_the_rarer_the_looks(monkeypatch):
    looks: list[float] = []
    clock = type("Clock", (), {"now": 0.0})

    def sleep(seconds: float) -> None:
        clock.now += seconds  # type: ignore[attr-defined]
        looks.append(clock.now)  # type: ignore[attr-defined]

    monkeypatch.setattr(session.time, "sleep", sleep)
    monkeypatch.setattr(session.time, "monotonic", lambda: clock.now)  # type: ignore[attr-defined]
    nap = session.Nap(lookers=1250)  # the hosts of 10,000 ranks
    while not looks or looks[-1] < 600:
        nap.sleep()
    assert sum(1 for look in looks if look < 0.1) > 10
    assert sum(1 for look in looks if 500 <= look < 510) * 1250 / 10 <= 1.3 * session.LOOKS
    assert all(later - earlier <= max(0.0002, earlier / 2) * 1.001 for earlier, later in itertools.pairwise(looks))


@pytest.mark.parametrize("trouble", ["does not count", "has closed its page"])
def test_ranks_hear_the_answer_though_the_one_that_looks_for_them_says_nothing(monkeypatch, trouble):
    def before(rank: int, life: Session) -> None:
        if rank == 0 and trouble == "does not count":
            monkeypatch.setattr(life, "answered", lambda *_: None)
        elif rank == 0:
            life._own_page.close()

    assert late_answer(3, 0.1, before) < 5


def test_a_look_asks_for_a_bounded_number_of_keys_and_all_are_waited_for(monkeypatch):
    monkeypatch.setattr(session, "BATCH", 4)
    looks = Looks(monkeypatch)
    late_answer(11, 0.2)
    assert looks.keys["rank 0"] == 4
