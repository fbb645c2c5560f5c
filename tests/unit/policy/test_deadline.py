"""What can be finished after a signal is decided by what saves have cost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from checkpointer.policy.cost import SaveCost
from checkpointer.policy.deadline import MARGIN, OUTLIVED, forecast

DEADLINE = timedelta(seconds=30)


def cost(seconds, mode="sync"):
    return SaveCost(mode=mode, stall=seconds, write=seconds)


def test_without_a_deadline_every_save_is_in_time():
    assert forecast([cost(1e6)], deadline=None, elapsed=1e6).in_time


@pytest.mark.parametrize("elapsed, in_time", [(0, True), (5.9, True), (6.1, False), (29, False), (31, False)])
def test_a_save_is_in_time_while_the_time_left_is_more_than_it_takes(elapsed, in_time):
    assert forecast([cost(24 / MARGIN)], deadline=DEADLINE, elapsed=elapsed).in_time is in_time


def test_what_is_left_is_said():
    found = forecast([cost(20)], deadline=DEADLINE, elapsed=10)
    assert found.reason == "a save takes 24s, and 20s are left of the 30s"
    late = forecast([cost(20)], deadline=DEADLINE, elapsed=40)
    assert late.reason == "a save takes 24s, and 0ms are left of the 30s"


def test_one_save_that_took_long_does_not_decide():
    assert forecast([cost(500), cost(1), cost(1)], deadline=DEADLINE, elapsed=0).in_time


def test_only_the_newest_saves_decide():
    assert not forecast([cost(1)] * 10 + [cost(50)] * 5, deadline=DEADLINE, elapsed=0).in_time


def test_the_copy_of_a_save_in_the_background_counts_too():
    assert not forecast([cost(15, "async")], deadline=DEADLINE, elapsed=0).in_time


@pytest.mark.parametrize("costs", [[], [SaveCost()], [SaveCost(mode="async", stall=1.0)]])
def test_a_save_that_nothing_is_known_of_is_tried(costs):
    assert forecast(costs, deadline=DEADLINE, elapsed=29).in_time


def test_a_process_that_outlives_the_deadline_saves_after_all():
    assert not forecast([cost(100)], deadline=DEADLINE, elapsed=OUTLIVED * 30 - 1).in_time
    assert forecast([cost(100)], deadline=DEADLINE, elapsed=OUTLIVED * 30).in_time
