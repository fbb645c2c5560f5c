"""Which checkpoints all ranks may restore: those that all see, in the coordinator's order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.distributed.exchange import Ranks
from checkpointer.restore.restorer import _agreed, _Seen
from tests.support.rank_threads import on_ranks


def agreed_on(*seen: _Seen) -> list[_Seen]:
    def program(ranks: Ranks) -> _Seen:
        with ranks.exchange("looking for a checkpoint") as exchange:
            return _agreed(exchange, seen[ranks.rank])

    return on_ranks(len(seen), program)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seen", [_Seen(["b", "a"], empty=False), _Seen([], empty=True), _Seen([], empty=False)])
def test_what_all_see_alike_is_what_they_restore_from(size, seen):
    assert agreed_on(*[seen] * size) == [seen] * size


def test_a_rank_that_sees_nothing_yet_and_a_coordinator_that_sees_nothing():
    some, none = _Seen(["b", "a"], empty=False), _Seen([], empty=True)
    assert agreed_on(some, none) == [some] * 2
    assert agreed_on(none, some) == [none] * 2


LISTS = st.lists(st.sampled_from("abcde"), unique=True).map(lambda ids: _Seen(ids, empty=False))


@settings(max_examples=30, deadline=None)
@given(st.lists(LISTS, min_size=2, max_size=3))
def test_where_ranks_see_different_ones_all_take_those_that_all_see_in_the_coordinators_order(seen):
    common = [id for id in seen[0].ids if all(id in one.ids for one in seen)]
    assert agreed_on(*seen) == [_Seen(common, empty=False)] * len(seen)
