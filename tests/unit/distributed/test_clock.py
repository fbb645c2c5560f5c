"""When ranks ask each other for the time: in the same calls, so that all save together, and rarely, which is cheap.

The ranks are threads that share a real store; the clock of each is under the test's control.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.distributed import clock as clock_module
from checkpointer.distributed.clock import EVERY, MOST_CALLS, SharedClock, Verdict
from checkpointer.distributed.exchange import Alone
from checkpointer.distributed.session import Session
from checkpointer.distributed.store_ranks import StoreRanks

T = TypeVar("T")
NEITHER, DUE, STOP = Verdict(due=False, stop=False), Verdict(due=True, stop=False), Verdict(due=True, stop=True)


class Stopwatch:
    """In place of ``time``; every thread has its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def monotonic(self) -> float:
        return getattr(self._of_thread, "now", 0.0)

    def run_on(self, seconds: float) -> None:
        self._of_thread.now = self.monotonic() + seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    stopwatch = Stopwatch()
    monkeypatch.setattr(clock_module, "time", stopwatch)
    return stopwatch


def on_ranks(size: int, program: Callable[[SharedClock, int], T]) -> list[T]:
    """What each rank's program returns."""
    store = dist.HashStore()

    def rank_of(rank: int) -> T:
        keys = dist.PrefixStore("job", store)
        return program(SharedClock(StoreRanks(Session(keys, rank, size), timeout=20)), rank)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank_of, range(size)))


def calls_that_ask(clock: SharedClock, time: Stopwatch, seconds_a_call: Iterator[float]) -> list[int]:
    """The numbers of the calls in which the coordinator looked at its rules."""
    asked: list[int] = []
    for number, seconds in enumerate(seconds_a_call):
        time.run_on(seconds)
        clock.ask(number, signalled=False, due=lambda number=number: bool(asked.append(number)))  # type: ignore[misc]
    return asked


def test_the_first_call_asks_and_slow_calls_ask_every_time(time):
    assert calls_that_ask(SharedClock(Alone()), time, iter([2 * EVERY] * 20)) == list(range(20))


def test_fast_calls_ask_ever_more_rarely_but_at_least_twice_as_rarely_at_a_time_and_at_most_each_thousand(time):
    asked = calls_that_ask(SharedClock(Alone()), time, iter([1e-6] * 5000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert set(gaps[10:]) == {MOST_CALLS}


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 0.9), st.integers(1, 60))
def test_between_two_questions_lies_about_a_second(seconds, times):
    with pytest.MonkeyPatch.context() as patch:
        stopwatch = Stopwatch()
        patch.setattr(clock_module, "time", stopwatch)
        asked = calls_that_ask(SharedClock(Alone()), stopwatch, iter([seconds] * (times * MOST_CALLS // 30)))
    for earlier, later in itertools.pairwise(asked):
        assert (later - earlier) * seconds <= max(EVERY, seconds) * 1.001


def test_a_loop_that_becomes_slow_asks_at_every_call_again_once_it_has_asked(time):
    clock = SharedClock(Alone())
    calls_that_ask(clock, time, iter([1e-6] * 10))
    asked = calls_that_ask(clock, time, iter([10.0] * 40))
    assert asked[-10:] == list(range(30, 40))


def test_calls_for_the_same_step_get_one_verdict_and_count_as_one(time):
    clock, asked = SharedClock(Alone()), []

    def due() -> bool:
        asked.append(1)
        return True

    assert [clock.ask(7, signalled=False, due=due) for _ in range(3)] == [DUE] * 3
    assert len(asked) == 1
    time.run_on(10)
    assert clock.ask(8, signalled=False, due=lambda: False) == NEITHER


def test_a_signal_makes_the_save_due_without_a_look_at_the_rules_and_lasts(time):
    clock = SharedClock(Alone())
    assert clock.ask(1, signalled=True, due=lambda: pytest.fail("the rules do not matter any more")) == STOP
    assert clock.stop
    for step in range(2, 8):  # asked or not
        assert clock.ask(step, signalled=False, due=lambda: False).stop


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_whose_clocks_differ_ask_in_the_same_calls_and_all_hear_the_coordinator(time, size):
    def program(clock: SharedClock, rank: int) -> list[Verdict]:
        time.run_on(1000.0 * rank)
        verdicts = []
        for step in range(40):
            time.run_on(0.1 * (rank + 1))  # every clock runs at another pace
            verdicts.append(clock.ask(step, signalled=False, due=lambda: rank == 0))
        return verdicts

    first, *others = on_ranks(size, program)
    assert all(verdicts == first for verdicts in others)
    assert first[0] == DUE
    assert 4 <= first.count(DUE) < 20  # about once a second of the coordinator's, and no rank's but its


@pytest.mark.parametrize("signalled", [0, 1, 2])
def test_a_signal_to_one_rank_stops_all_in_the_same_call(time, signalled):
    def program(clock: SharedClock, rank: int) -> list[Verdict]:
        verdicts = []
        for step in range(30):
            time.run_on(0.1)
            verdicts.append(clock.ask(step, signalled=rank == signalled and step >= 5, due=lambda: False))
        return verdicts

    first, *others = on_ranks(3, program)
    assert all(verdicts == first for verdicts in others)
    heard = first.index(STOP)
    assert 5 <= heard <= 15
    assert all(verdict.stop for verdict in first[heard:])
    assert not any(verdict.stop for verdict in first[:heard])
