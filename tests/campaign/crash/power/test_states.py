"""In every state that a power cut may leave, a run is restored, verified, continued and pruned: the short form."""

from __future__ import annotations

import random
import sys

import pytest

from tests.campaign.crash.power.campaign import KILLED, QUICK, after
from tests.campaign.crash.power.engine import crashed_again, look, record_scenario, states, taken_over
from tests.campaign.crash.power.record import Record
from tests.campaign.crash.power.scenarios import SCENARIOS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder reads /proc"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that it calls"),
]


@pytest.fixture
def most(request: pytest.FixtureRequest) -> int:
    """States of a record that are checked."""
    return 100_000 if request.config.getoption("--thorough") else 25


def assert_nothing_is_lost(run: Record, most: int, *, damaged: bool = False, first: int = 0) -> None:
    found = list(states(run, QUICK, damaged=damaged, first=first))
    assert len(found) >= 20
    chosen = random.Random(0).sample(found, min(most, len(found)))
    failures = look(run, chosen).failures
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_at_any_moment_leaves_what_was_promised(name, most):
    assert_nothing_is_lost(record_scenario(SCENARIOS[name]), most, damaged=SCENARIOS[name].damaged)


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("name,killed", [(name, where) for name, places in KILLED.items() for where in places])
def test_a_job_that_takes_over_from_a_killed_one_builds_on_nothing_that_a_power_cut_can_take_away(name, killed, most):
    before = record_scenario(SCENARIOS[name])
    end = after(before, killed)
    assert_nothing_is_lost(taken_over(SCENARIOS[name], before, end), most, first=end + 1)


@pytest.mark.timeout(1200)  # with --thorough
def test_a_second_power_cut_while_the_next_job_recovers_loses_nothing_either(most):
    found = list(states(record_scenario(SCENARIOS["overwrite"]), QUICK))
    for _, tree, _ in random.Random(0).sample(found, 2):
        assert_nothing_is_lost(crashed_again(tree), most)
