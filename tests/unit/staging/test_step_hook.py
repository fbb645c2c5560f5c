"""Whether to overlap is decided by what was measured, and a bad measurement decides nothing."""

from __future__ import annotations

import functools
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.policy.lazy_or_async import QUIET_STEPS, TRIALS, LazyOrAsync, StepClock
from checkpointer.staging import step_hook
from checkpointer.staging.arena import Arena
from checkpointer.staging.gpu import Transfers
from checkpointer.staging.live import LiveOnGpu, LiveState
from checkpointer.staging.sample import Sample
from checkpointer.staging.step_hook import StepWatch, WatchedSave

seconds = st.floats(0, 1e6)


# ------------------------------------------------------------------------------------------------------ the clock


def clock_after(quiet: int, *, each: float = 1.0) -> tuple[StepClock, float]:
    """A clock that has seen ``quiet`` steps of equal length, and the time."""
    clock = StepClock()
    now = 100.0
    clock.tick(now)
    for _ in range(quiet):
        now += each
        clock.tick(now)
    return clock, now


def test_a_save_costs_what_the_steps_beside_it_took_longer():
    clock, now = clock_after(3)
    clock.save_begins(now + 0.5)
    clock.tick(now + 1.25)
    clock.tick(now + 2.75)
    assert clock.save_ended() == pytest.approx(0.25 + 0.5)


def test_without_a_quiet_step_the_cost_is_unknown():
    clock = StepClock()
    clock.tick(0.0)
    clock.save_begins(0.5)
    clock.tick(1.0)
    assert clock.save_ended() is None


def test_without_a_step_beside_the_save_the_cost_is_unknown():
    clock, now = clock_after(3)
    clock.save_begins(now)
    assert clock.save_ended() is None


def test_a_save_before_the_first_step_has_no_cost():
    clock = StepClock()
    clock.save_begins(0.0)
    clock.tick(1.0)
    assert clock.save_ended() is None


def test_steps_beside_a_save_do_not_count_as_quiet():
    clock, now = clock_after(3)
    for _ in range(20):
        clock.save_begins(now)
        now += 100
        clock.tick(now)
        assert clock.save_ended() == pytest.approx(99)


def test_one_slow_quiet_step_does_not_move_what_is_usual():
    clock, now = clock_after(QUIET_STEPS)
    clock.tick(now + 1000)  # an evaluation
    clock.save_begins(now + 1000)
    clock.tick(now + 1001.5)
    assert clock.save_ended() == pytest.approx(0.5)


def test_what_is_usual_follows_the_newest_steps():
    clock, now = clock_after(QUIET_STEPS)
    for _ in range(QUIET_STEPS):
        now += 5
        clock.tick(now)
    clock.save_begins(now)
    clock.tick(now + 6)
    assert clock.save_ended() == pytest.approx(1)


def test_a_save_that_ended_has_no_cost_twice():
    clock, now = clock_after(3)
    clock.save_begins(now)
    clock.tick(now + 2)
    assert clock.save_ended() is not None
    assert clock.save_ended() is None


@given(st.lists(st.tuples(st.sampled_from(["tick", "begin", "end"]), seconds), max_size=50))
def test_whatever_happens_a_cost_is_finite_or_unknown(events):
    clock = StepClock()
    now = 0.0
    for kind, wait in events:
        now += wait
        if kind == "tick":
            clock.tick(now)
        elif kind == "begin":
            clock.save_begins(now)
        else:
            cost = clock.save_ended()
            assert cost is None or math.isfinite(cost)


# ------------------------------------------------------------------------------------------------------ the choice


def follow(overlap: LazyOrAsync, costs: dict[str, float], copying: float, saves: int) -> list[str]:
    """What is chosen for ``saves`` saves that cost what ``costs`` says."""
    chosen: list[str] = []
    for _ in range(saves):
        choice = overlap.choose()
        chosen.append(choice)
        overlap.record(choice, costs[choice], copying)
    return chosen


def test_cheap_overlapping_stays_without_ever_trying_a_copy():
    overlap = LazyOrAsync()
    assert follow(overlap, {"lazy": 0.5}, copying=1.0, saves=10) == ["lazy"] * 10
    assert overlap.decided == "lazy"


def test_overlapping_that_is_measured_to_be_dearer_gives_way_to_copying():
    overlap = LazyOrAsync()
    chosen = follow(overlap, {"lazy": 3.0, "async": 2.0}, copying=1.0, saves=10)
    assert chosen == ["lazy"] * TRIALS + ["async"] * (10 - TRIALS)
    assert overlap.decided == "async"


def test_overlapping_that_looks_dear_stays_where_copying_is_dearer():
    overlap = LazyOrAsync()
    chosen = follow(overlap, {"lazy": 3.0, "async": 4.0}, copying=1.0, saves=10)
    assert chosen == ["lazy"] * TRIALS + ["async"] * TRIALS + ["lazy"] * (10 - 2 * TRIALS)
    assert overlap.decided == "lazy"


def test_one_hiccup_decides_nothing():
    overlap = LazyOrAsync()
    overlap.record("lazy", 1000.0, 1.0)
    follow(overlap, {"lazy": 0.5}, copying=1.0, saves=TRIALS - 1)
    assert overlap.decided == "lazy"


records = st.tuples(st.sampled_from(["lazy", "async"]), st.floats(-1e3, 1e6), seconds)


@given(st.lists(records, max_size=30))
def test_whatever_was_recorded_a_copy_is_decided_on_only_by_enough_trials_of_both(costs):
    """Saves that were to be lazy may have copied (no optimizer that allows it): then async costs come uncalled for."""
    overlap = LazyOrAsync()
    seen: dict[str, list[float]] = {"lazy": [], "async": []}
    for choice, cost, copying in costs:
        before = overlap.decided
        overlap.record(choice, cost, copying)
        if before is None:
            seen[choice].append(cost)
        else:
            assert overlap.decided == before
        assert overlap.choose() in {"lazy", "async"}
        if overlap.decided == "async":
            assert len(seen["lazy"]) >= TRIALS
            assert len(seen["async"]) >= TRIALS
        if overlap.decided == "lazy":
            assert len(seen["lazy"]) >= TRIALS


@given(st.lists(records, max_size=30))
def test_a_decision_comes_as_soon_as_both_were_tried_enough(costs):
    overlap = LazyOrAsync()
    seen = {"lazy": 0, "async": 0}
    for choice, cost, copying in costs:
        overlap.record(choice, cost, copying)
        seen[choice] += 1
    assert overlap.decided is not None or min(seen.values()) < TRIALS


# -------------------------------------------------------------------------------------------- both, under the hook


class Time:
    """In place of the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Loop:
    """Training steps of one second, some of them beside a save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = Time()
        monkeypatch.setattr(step_hook, "time", self.time)
        self.watch = StepWatch()
        self.optimizer = Optimizer()

    def steps(self, count: int, each: float = 1.0) -> None:
        for _ in range(count):
            self.time.now += each
            self.watch.before_step(self.optimizer)
            self.watch.after_step(self.optimizer)

    def save(self, cost: dict[str, float], speed: float | None = 1000.0) -> str:
        """One save, beside which two steps run; what was chosen for it."""
        self.watch.save_begins()
        choice = self.watch.choose()
        live = None
        if choice == "lazy":
            live = LiveState(Arena(), [], LiveOnGpu([], Transfers([])), Sample([]))
            live.bytes_per_second = speed
        done = [False]
        self.watch.watch(WatchedSave(choice, live, 1000, lambda: done[0]))
        done[0] = True
        self.steps(1, 1.0 + cost[choice])
        return choice


class Optimizer:
    """Anything that a weak reference can hold."""


@pytest.fixture
def loop(monkeypatch):
    made = Loop(monkeypatch)
    yield made
    made.watch.close()


def test_the_fallback_to_copying_is_said_once(loop, caplog):
    with caplog.at_level(logging.WARNING, logger="checkpointer"):
        loop.steps(4)
        chosen = []
        for _ in range(12):
            chosen.append(loop.save({"lazy": 5.0, "async": 2.0}))
            loop.steps(4)
    assert chosen == ["lazy"] * TRIALS + ["async"] * (12 - TRIALS)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "5.000 s in lazy mode and 2.000 s in async mode" in message


def test_nothing_is_said_where_overlapping_stays(loop, caplog):
    loop.steps(4)
    for _ in range(12):
        assert loop.save({"lazy": 0.1}) == "lazy"
        loop.steps(4)
    assert not caplog.records


def test_as_long_as_the_speed_of_memory_is_unknown_nothing_is_decided(loop):
    loop.steps(4)
    for _ in range(12):
        assert loop.save({"lazy": 50.0}, speed=None) == "lazy"
        loop.steps(4)


def test_saves_at_every_step_decide_nothing(loop):
    """No step is without a save, so nobody knows what a step takes."""
    for _ in range(12):
        assert loop.save({"lazy": 50.0}) == "lazy"


def test_the_steps_of_another_optimizer_are_not_timed(loop):
    other = Optimizer()
    loop.steps(4)
    for _ in range(12):
        assert loop.save({"lazy": 0.0}) == "lazy"
        for _ in range(100):
            loop.watch.before_step(other)
            loop.watch.after_step(other)
        loop.steps(4)
    assert loop.watch.choose() == "lazy"


def test_when_the_timed_optimizer_is_gone_another_is_timed(loop):
    loop.steps(4)
    loop.optimizer = Optimizer()
    loop.steps(4)
    assert [loop.save({"lazy": 5.0, "async": 2.0}) for _ in range(2 * TRIALS)][-1] == "async"


def test_a_save_that_had_ended_when_the_next_one_began_was_measured_too(loop):
    """Where each save takes until the next one, no step finds an ended one, and the cost would never be known."""
    loop.steps(4)
    chosen = []
    for _ in range(12):
        loop.watch.save_begins()
        choice = loop.watch.choose()
        chosen.append(choice)
        live = LiveState(Arena(), [], LiveOnGpu([], Transfers([])), Sample([])) if choice == "lazy" else None
        done = [False]
        if live is not None:
            live.bytes_per_second = 1000.0
            live.detach = lambda: None  # type: ignore[method-assign]
        loop.watch.watch(WatchedSave(choice, live, 1000, functools.partial(done.__getitem__, 0)))
        loop.steps(3, 1.0 + (5.0 if choice == "lazy" else 2.0))
        done[0] = True
    assert chosen[-1] == "async"
