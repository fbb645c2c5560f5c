"""What a save has cost, by its manifest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.policy.cost import SaveCost

STATISTICS = {
    "mode": "async",
    "wait_seconds": 0.5,
    "stall_seconds": 0.25,
    "write_seconds": 3,
    "fsync_seconds": 1.5,
    "bytes_written": 1000,
    "bytes_shared": 500,
}


def test_every_statistic_is_read():
    cost = SaveCost.from_statistics(STATISTICS)
    assert cost == SaveCost(mode="async", wait=0.5, stall=0.25, write=3.0, fsync=1.5, written=1000, shared=500)
    assert cost.to_training == 0.75
    assert cost.to_durable == 3.25


def test_the_statistics_of_earlier_versions_are_read():
    cost = SaveCost.from_statistics({"wait_seconds": 0.0, "staging_seconds": 0.2, "write_seconds": 1.0})
    assert (cost.stall, cost.to_training, cost.to_durable, cost.written) == (0.2, 0.2, 1.2, None)


def test_where_there_are_no_statistics_nothing_is_known():
    assert SaveCost.from_statistics({}) == SaveCost()
    assert SaveCost().to_training is SaveCost().to_durable is None


@pytest.mark.parametrize("value", [None, True, "1", -1, -0.5, math.nan, math.inf, 10**400, 1e300, [], {}])
@pytest.mark.parametrize("name", ["stall_seconds", "write_seconds"])
def test_seconds_that_make_no_sense_are_unknown(name, value):
    cost = SaveCost.from_statistics({**STATISTICS, name: value})
    assert (cost.stall is None) is (name == "stall_seconds")
    assert cost.to_durable is None


json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3)


@given(st.dictionaries(st.sampled_from([*STATISTICS, "staging_seconds"]), json))
def test_whatever_the_statistics_hold_what_is_read_is_finite(statistics):
    cost = SaveCost.from_statistics(statistics)
    numbers = (cost.wait, cost.stall, cost.write, cost.fsync, cost.to_training, cost.to_durable, cost.written)
    assert all(
        number is None or (number >= 0 and math.isfinite(number)) for number in numbers if number != cost.written
    )
