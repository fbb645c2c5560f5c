"""One exchange: what each rank gets, and how an error of one rank becomes that of all. Ranks are threads."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from checkpointer.distributed.exchange import Alone, Ranks
from checkpointer.errors import CheckpointerError, ConfigError, SaveError
from tests.support.rank_threads import on_ranks

WHAT = "the save of step 5"


class Word(NamedTuple):
    rank: int
    text: str = ""


# ------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_coordinator_hears_all_and_all_hear_the_coordinator(size):
    def program(ranks: Ranks) -> Any:
        with ranks.exchange(WHAT) as exchange:
            words = exchange.gather(Word(ranks.rank, "a"), Word)
            assert (words is None) == (ranks.rank > 0)
            total = exchange.broadcast(None if words is None else [word.rank for word in words], list[int])
            mine = exchange.scatter(None if words is None else [Word(10 * word.rank) for word in words], Word)
            exchange.barrier()
        return total, mine

    assert on_ranks(size, program) == [([*range(size)], Word(10 * rank)) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_and_rounds_are_kept_apart_and_nothing_that_was_heard_stays(size):
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)

    def program(ranks: Ranks) -> Any:
        found = []
        for number in range(20):
            with ranks.exchange(WHAT) as exchange:
                for round_ in range(number % 3 + 1):
                    words = exchange.gather(f"{number} {round_} {ranks.rank}", str)
                    found.append(exchange.broadcast(None if words is None else "; ".join(words), str))
        with ranks.beside("writer").exchange(WHAT) as exchange:
            exchange.barrier()
        return found

    first, *others = on_ranks(size, program, store=store)
    assert all(found == first for found in others)
    assert first[:2] == ["; ".join(f"{number} 0 {rank}" for rank in range(size)) for number in range(2)]
    assert store.num_keys() < 10 + size


def test_a_large_message_arrives_in_pieces(monkeypatch):
    from checkpointer.distributed import store

    monkeypatch.setattr(store, "PIECE", 100)
    text = "".join(map(str, range(10_000)))

    def program(ranks: Ranks) -> str:
        with ranks.exchange(WHAT) as exchange:
            words = exchange.gather(text, str)
            return exchange.broadcast(None if words is None else "".join(words), str)

    assert on_ranks(3, program) == [3 * text] * 3


def test_one_process_hears_the_very_objects_that_it_has_said_and_needs_no_msgspec():
    with Alone().exchange(WHAT) as exchange:
        word: Any = object()
        assert exchange.gather(word, object) == [word]
        assert exchange.broadcast(word, object) is word
        assert exchange.scatter([word], object) is word
    code = """
import sys, tempfile, torch
from checkpointer import CheckpointManager
with CheckpointManager(tempfile.mkdtemp(), model=torch.nn.Linear(2, 2)) as mgr:
    mgr.save(1).result()
    assert mgr.restore_latest().step == 1
print("msgspec" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


# ------------------------------------------------------------------------------------ errors


def failing(moment: str, rank: int, error: BaseException) -> Callable[[Ranks], Any]:
    """A program of two rounds in which one rank fails at a moment."""

    def program(ranks: Ranks) -> Any:
        def at(name: str) -> None:
            if (name, ranks.rank) == (moment, rank):
                raise error

        with ranks.exchange(WHAT) as exchange:
            at("before")
            words = exchange.gather(Word(ranks.rank), Word)
            at("decide")
            exchange.broadcast(None if words is None else len(words), int)
            at("between")
            exchange.barrier()
        return "done"

    return program


@pytest.mark.parametrize("where", ["before 0", "before 2", "decide 0", "between 0", "between 2"])
@pytest.mark.parametrize("error", [ConfigError("it"), SaveError("it"), ValueError("it"), KeyboardInterrupt("it")])
def test_an_error_of_one_rank_is_raised_by_all_and_names_it(where, error):
    moment, number = where.split()
    rank = int(number)
    found = on_ranks(3, failing(moment, rank, error))
    assert found[rank] is error
    kind = type(error) if isinstance(error, CheckpointerError) else SaveError
    told = "it" if isinstance(error, CheckpointerError) else f"{type(error).__name__}: it"
    for other in {0, 1, 2} - {rank}:
        assert type(found[other]) is kind
        assert str(found[other]) == f"{WHAT} failed: rank {rank} of 3: {told}"


def test_a_full_disk_of_one_rank_is_one_on_all():
    error = SaveError("no room")
    error.errno = errno.ENOSPC
    assert [found.errno for found in on_ranks(2, failing("before", 1, error))] == [errno.ENOSPC] * 2


def test_the_errors_of_several_ranks_are_one_that_names_them():
    def program(ranks: Ranks) -> Any:
        with ranks.exchange(WHAT) as exchange:
            if ranks.rank:
                raise ConfigError(f"that of {ranks.rank}")
            exchange.barrier()

    assert str(on_ranks(3, program)[0]) == f"{WHAT} failed: rank 1 of 3: that of 1; rank 2 of 3: that of 2"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_after_the_last_answer_an_error_is_that_of_its_rank_and_holds_up_nobody(rank):
    def program(ranks: Ranks) -> Any:
        with suppress(ValueError), ranks.exchange(WHAT) as exchange:
            exchange.barrier()
            if ranks.rank == rank:
                raise ValueError("its own")
        with ranks.exchange("the next") as exchange:
            words = exchange.gather(ranks.rank, int)
            return exchange.broadcast(words, list[int])

    began = time.monotonic()
    assert on_ranks(3, program) == [[0, 1, 2]] * 3
    assert time.monotonic() - began < 10  # of 20 that a rank is waited for


def test_after_a_failure_the_next_exchange_is_in_step():
    def program(ranks: Ranks) -> Any:
        for moment in ("before", "decide", "between"):
            with suppress(ConfigError):
                failing(moment, 0, ConfigError("it"))(ranks)
            with suppress(ConfigError):
                failing(moment, 1, ConfigError("it"))(ranks)
        return failing("", 0, ConfigError())(ranks)

    assert on_ranks(3, program) == ["done"] * 3


@pytest.mark.parametrize("sender", [0, 1])
def test_a_message_that_cannot_be_read_names_the_rank_that_has_said_it(sender):
    def program(ranks: Ranks) -> Any:
        kind: Any = Word if ranks.rank != sender else int
        with ranks.exchange(WHAT) as exchange:
            words = exchange.gather(7 if sender == ranks.rank == 1 else Word(ranks.rank), Word)
            exchange.broadcast(None if words is None else (7 if sender == 0 else words[0]), kind)

    found = on_ranks(2, program)
    told = f"{WHAT}: rank {sender} of 2 has said what this rank cannot read"
    assert isinstance(found[1 - sender], SaveError)
    assert told in str(found[1 - sender])
    if sender == 1:  # and it hears of it
        assert isinstance(found[1], SaveError)
        assert told in str(found[1])


def test_what_cannot_be_said_is_an_error_of_all():
    def program(ranks: Ranks) -> Any:
        with ranks.exchange(WHAT) as exchange:
            exchange.gather(object() if ranks.rank else 1, object)
            exchange.broadcast(1, int)

    coordinator, other = on_ranks(2, program)
    assert isinstance(other, TypeError)
    assert isinstance(coordinator, SaveError)
    assert "rank 1 of 2: TypeError" in str(coordinator)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come_is_an_error_in_time_that_names_it(missing):
    def program(ranks: Ranks) -> Any:
        with ranks.exchange("finding each other") as exchange:
            exchange.barrier()
        if ranks.rank == missing:
            return None
        with ranks.exchange(WHAT) as exchange:
            exchange.barrier()

    found = on_ranks(3, program, timeout=0.2)
    for rank in {0, 1, 2} - {missing}:
        assert isinstance(found[rank], SaveError)
        assert f"rank {missing} of 3 said nothing for 0.2 s" in str(found[rank])
    assert "Nothing was committed" in str(found[0]) if missing else "restore_latest will tell" in str(found[1])
