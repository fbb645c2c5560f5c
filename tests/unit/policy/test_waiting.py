"""When it is said that saves come faster than they can be written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.policy.waiting import IN_A_ROW, Wait, too_often

OFTEN = [Wait(20.0, 30.0)] * IN_A_ROW


def test_the_reason_says_what_the_last_saves_have_waited_of_which_time():
    assert too_often(OFTEN, 60.0) == "the last 3 have waited 60s of the 90s between them"
    assert too_often([Wait(0.0, 1.0), *OFTEN], 60.0) == too_often(OFTEN, 60.0)


@pytest.mark.parametrize(
    "waits, lost",
    [
        (OFTEN[1:], 600.0),
        ([*OFTEN[1:], Wait(0.0, 30.0)], 600.0),
        ([Wait(0.0, 30.0), *OFTEN[1:]], 600.0),
        ([Wait(1.0, 30.0)] * IN_A_ROW, 600.0),
        (OFTEN, 10.0),
        ([Wait(0.0, 0.0)] * IN_A_ROW, 600.0),
    ],
    ids=["too few", "not the last", "not the first", "a small part", "nothing anybody misses", "no time at all"],
)
def test_a_wait_now_and_then_or_a_small_one_is_none(waits: list[Wait], lost: float) -> None:
    assert too_often(waits, lost) is None


@given(st.lists(st.floats(0, 1e6), max_size=6), st.floats(0, 1e9))
def test_saves_that_wait_for_nothing_are_never_too_often(between: list[float], lost: float) -> None:
    assert too_often([Wait(0.0, seconds) for seconds in between], lost) is None
