"""SIGKILL of any rank at any event of a save leaves the checkpoint before; scripts/crash_ranks has more."""

from __future__ import annotations

import random

import pytest

from tests.campaign.distributed.campaign import Campaign, Crash, caught, every_event
from tests.campaign.distributed.crashing import SABOTAGES, Kill

SOME = (
    Crash(2, Kill(0, "before rename .checkpointer/tmp/ID"), 1),
    Crash(2, Kill(0, "before the answer: commit"), 3),
    Crash(3, Kill(2, "after the word: report"), 1),
    Crash(2, Kill(1, "half of write .checkpointer/tmp/ID/optimizer-rank-N.safetensors"), 1),
)

TELLING = {
    "report-early": Crash(2, Kill(1, "after the word: report"), 1),
    "commit-without-reports": Crash(2, Kill(1, "before the word: report"), 1),
    "leave-leftovers": Crash(2, Kill(0, "before rename .checkpointer/tmp/ID"), 1),
}
"""A kill that shows each sabotage."""


@pytest.mark.parametrize("crash", SOME, ids=str)
def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(crash):
    campaign = Campaign()
    campaign.crash(crash)
    assert campaign.kills == 1


@pytest.mark.thorough(lambda name: name != "report-early")
@pytest.mark.parametrize("name", SABOTAGES)
def test_the_campaign_notices_a_library_that_is_broken(name):
    with pytest.raises(AssertionError, match=r"DAMAGED|left over"):
        Campaign(name).crash(TELLING[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_each_event_of_a_save_leaves_the_checkpoint_before(request):
    if not request.config.getoption("--thorough"):
        pytest.skip("minutes: with --thorough, or scripts/crash_ranks")
    campaign = Campaign()
    for crash in every_event(random.Random(0)):
        campaign.crash(crash)
    assert {where for where, _ in campaign.events} == {True, False}
    assert campaign.kills == len(campaign.events) > 40
    assert caught("report-early", random.Random(0))
