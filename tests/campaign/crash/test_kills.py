"""The campaign of random kills, in short: it passes, and it would notice."""

from __future__ import annotations

import re
import sys

import pytest

from tests.campaign.crash import program
from tests.campaign.crash.sabotage import SABOTAGES

COARSE = ("delete-before-commit", "forget-random-numbers", "leave-leftovers")
"""The sabotages that are tried without ``--thorough``: each takes seconds."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks processes that have imported torch")


@pytest.fixture(scope="module")
def sabotages(request: pytest.FixtureRequest) -> list[str]:
    return list(SABOTAGES if request.config.getoption("--thorough") else COARSE)


@pytest.fixture(scope="module")
def campaign(sabotages: list[str]) -> str:
    """What a short campaign prints, and then one against each way to break the library."""
    broken = (f"--sabotage={name}" for name in sabotages)
    done = program.run("tests.campaign.crash.kills", "--minutes", "0.15", "--jobs", "2", *broken)
    return f"{done.stdout}{done.stderr}\nexit status {done.returncode}"


@pytest.mark.timeout(600)  # with --thorough
def test_whenever_training_is_killed_the_newest_checkpoint_is_whole_and_resumes_exactly(campaign):
    counts = {line.split()[0]: int(line.split()[-1]) for line in campaign.splitlines() if re.match(r"\w+ +\d", line)}
    assert "each left the newest checkpoint known to be durable, or a newer one" in campaign, campaign
    assert counts["all"] >= 5, campaign  # dozens, on a machine that has nothing else to do
    assert campaign.endswith("exit status 0"), campaign


@pytest.mark.timeout(600)
def test_a_campaign_of_kills_notices_a_library_that_is_broken(campaign, sabotages):
    assert re.findall(r"^(\S+): caught after \d+ kills: Plan", campaign, re.MULTILINE) == sabotages, campaign
