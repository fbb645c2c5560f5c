"""Ranks that find each other: in a store that was used before, one that is silent, and one whose ranks die."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.distributed import session
from checkpointer.distributed.liveness import Liveness, Process, this_process
from checkpointer.distributed.rank_report import RankReport
from checkpointer.distributed.session import Session
from checkpointer.distributed.store import in_time
from checkpointer.distributed.store_ranks import StoreExchange, StoreRanks
from checkpointer.errors import SaveError
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, open_storage
from tests.support.ranks import CONTEXT, launch, run, store

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="what the system tells of processes")


# ------------------------------------------------------------------------------------ a job that is started again


def saving(root: str, victim: int) -> list[Any]:
    """Restore, and save three times; the rank ``victim`` dies once it has written its part of the second."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 64))
    with CheckpointManager(root, config={"write": {"rank_timeout": "20s"}}, model=model) as mgr:
        restored = mgr.restore_latest()
        begin = restored.step + 1 if restored else 1
        for step in range(begin, begin + 3):
            if dist.get_rank() == victim and step == begin + 1:
                dies_after_its_files()
            elif victim < 0 and dist.get_rank() == 1:
                time.sleep(0.3)  # what it said in its last life would be taken for this life's
            mgr.save(step).result()
    return [restored.step if restored else None, step]


def dies_after_its_files() -> None:
    name = "exists" if dist.get_rank() else "rename"

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if name == "rename":
        LocalStorage.rename = die  # type: ignore[method-assign,assignment]
        return
    gather, say = StoreExchange.gather, StoreExchange._say
    reports: list[StoreExchange] = []

    def gathering(self: StoreExchange, value: Any, kind: type[Any]) -> Any:
        reports.extend([self] if kind is RankReport else [])
        return gather(self, value, kind)

    def last_words(self: StoreExchange) -> Any:
        client = say(self)
        if self in reports:
            die()
        return client

    StoreExchange.gather, StoreExchange._say = gathering, last_words  # type: ignore[method-assign]


def started_again(server: Any) -> Any:
    """The store as torchrun keeps it; gloo itself would try to reach those that have died."""
    for key in server.list_keys():
        if "checkpointer" not in key:
            server.delete_key(key)
    return server


@pytest.mark.skipif(not hasattr(dist.TCPStore, "list_keys"), reason="this torch's store does not tell its keys")
def test_a_job_that_is_started_again_with_the_same_store_hears_nothing_of_what_was_said_before(tmp_path):
    server = store()
    for victim in (1, 0):
        outcomes = launch(2, saving, str(tmp_path), victim, server=started_again(server))
        assert outcomes[victim].status == -signal.SIGKILL
    found = run(2, saving, str(tmp_path), -1, server=started_again(server))
    assert found[0] == found[1]
    repository = Repository(open_storage(tmp_path))
    assert repository.verify_all().ok
    assert [info.step for info in repository.list_checkpoints().checkpoints][-3:] == [
        found[0][1] - 2,
        found[0][1] - 1,
        found[0][1],
    ]
    assert not list((tmp_path / ".checkpointer" / "tmp").iterdir())


def words_of_all(ranks: StoreRanks, word: float) -> list[float]:
    """One exchange, in which each rank says something."""
    with ranks.exchange("a word") as exchange:
        return exchange.broadcast(exchange.gather(word, float), list[float])


def met(server: Any, rank: int, size: int, delay: float) -> list[Any]:
    """One rank's life, in a thread: what it hears in two exchanges."""
    time.sleep(delay)
    keys = dist.TCPStore("127.0.0.1", server.port, None, is_master=False)
    ranks = StoreRanks(Session(dist.PrefixStore("job", keys), rank, size), timeout=10)
    word = random.Random().random()
    heard = [words_of_all(ranks, word) for _ in range(2)]
    assert all(words[rank] == word for words in heard)
    return heard


def test_ranks_find_those_who_live_now_in_whatever_order_they_come():
    server, dice = store(), random.Random(1)
    for size in (2, 4, 3, 2, 4):
        delays = [dice.choice([0, 0.05, 0.2]) for _ in range(size)]
        with ThreadPoolExecutor(size) as pool:
            lives = [pool.submit(met, server, rank, size, delay) for rank, delay in enumerate(delays)]
        assert len({str(life.result()) for life in lives}) == 1


def talking(server: Any, rank: int, times: int) -> None:
    keys = dist.TCPStore("127.0.0.1", server.port, None, is_master=False)
    ranks = StoreRanks(Session(dist.PrefixStore("job", keys), rank, 2), timeout=10)
    for _ in range(times):
        words_of_all(ranks, 1)
    words_of_all(ranks.beside("writer"), 1)


@pytest.mark.parametrize("times", [60, 110])
def test_what_all_have_heard_does_not_stay_in_the_store(monkeypatch, times):
    monkeypatch.setattr(session, "MOST_HEARD", 100)
    server = store()
    with ThreadPoolExecutor(2) as pool:
        for life in [pool.submit(talking, server, rank, times) for rank in range(2)]:
            life.result()
    ended(lambda: server.num_keys() < 10)


# ------------------------------------------------------------------------------------ who still runs


def told_of(pid: int) -> Process:
    """What a process would say of itself."""
    own = this_process()
    assert own is not None
    began = int(Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[19])
    return Process(own.where, pid, began)


@on_linux
def test_a_process_is_gone_once_it_has_ended_and_not_while_it_is_stopped():
    child = CONTEXT.Process(target=time.sleep, args=(60,))
    child.start()
    try:
        neighbours = Liveness({0: this_process(), 1: told_of(child.pid)})
        assert neighbours.gone([0, 1]) == {}
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.05)
        assert neighbours.gone([0, 1]) == {}
    finally:
        child.kill()
    child.join()
    assert neighbours.gone([0, 1]) == {1: child.pid}
    assert neighbours.gone([0]) == {}


@on_linux
@pytest.mark.parametrize("change", ["another host", "its number was given again", "never seen", "nothing told"])
def test_nothing_is_said_of_a_process_that_was_not_seen_to_run(change):
    child = CONTEXT.Process(target=time.sleep, args=(60,))
    child.start()
    told: Process | None = told_of(child.pid)
    if change == "another host":
        told = told._replace(where="another kernel pid:[1] time:[1]")
    elif change == "its number was given again":
        told = told._replace(began=told.began - 1)
    elif change == "never seen":
        child.kill()
        child.join()
    else:
        told = None
    neighbours = Liveness({1: told})
    child.kill()
    child.join()
    assert neighbours.gone([1]) == {}


# ------------------------------------------------------------------------------------ a store that is silent


def serve(end: Connection) -> None:
    server = store()
    end.send(server.port)
    time.sleep(60)


def test_a_store_that_answers_nobody_any_more_is_an_error_in_time():
    ours, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    keys = dist.TCPStore("127.0.0.1", ours.recv(), None, is_master=False, timeout=dt.timedelta(seconds=60))
    ranks = StoreRanks(Session(keys, 1, 2), timeout=1)
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(SaveError, match="does not answer"):
            words_of_all(ranks, 1)
        assert time.monotonic() - began < 5
    finally:
        server.kill()
        server.join()
        ended(lambda: not any(thread.name == "checkpointer-store" for thread in threading.enumerate()))


def ended(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_what_takes_too_long_is_left_behind_and_what_fails_fails_as_itself():
    release = threading.Event()
    with pytest.raises(SaveError, match="does not answer"):
        in_time(time.monotonic(), release.wait)
    release.set()

    def fail() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        in_time(time.monotonic() + 1, fail)
    assert in_time(time.monotonic() + 1, max, 1, 2) == 2
