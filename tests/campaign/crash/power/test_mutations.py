"""The campaign fails where it should: without an fsync, or with steps in another order."""

from __future__ import annotations

import sys

import pytest

from tests.campaign.crash.power.campaign import KILLED, QUICK, after
from tests.campaign.crash.power.engine import look, record_scenario, states, taken_over
from tests.campaign.crash.power.mutations import ORDERS, Verdicts, in_another_order, judge
from tests.campaign.crash.power.scenarios import SCENARIOS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder reads /proc"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that it calls"),
]

ENOUGH: dict[str, tuple[str, ...] | None] = {
    "first save": None,
    "overwrite": ("repository.commit.by_rename._replace",),
    "prune": ("repository.contents.remove_listed",),
    "pin and annotate": ("storage.local.create",),
    "share with a copy": ("storage.local.link",),
}
"""Scenarios that together go through every function that asks for an fsync, and which of those; ``None``: all."""
SETTLING = ("storage.local._settle", "repository.commit.by_rename._settle")
"""Functions that matter where somebody was killed."""


def test_no_function_can_leave_out_its_fsyncs():
    verdicts = Verdicts()
    for name, only in ENOUGH.items():
        run = record_scenario(SCENARIOS[name])
        verdicts.add(judge(run, damaged=SCENARIOS[name].damaged, singles=False, only=only))
    for name, places in KILLED.items():
        before = record_scenario(SCENARIOS[name])
        for where in places:
            run = taken_over(SCENARIOS[name], before, after(before, where))
            verdicts.add(judge(run, damaged=False, singles=False, only=SETTLING))
    assert verdicts.sites.keys() == {
        "storage.local.write", "storage.local.link", "storage.local.make_directory", "storage.local.create",
        "storage.local._settle", "repository.commit.by_rename.commit", "repository.commit.by_rename._move",
        "repository.commit.by_rename._replace", "repository.commit.by_rename._settle",
        "repository.contents.remove_listed",
    }  # fmt: skip
    assert [site for site, failure in verdicts.sites.items() if failure is None] == []


def test_no_single_fsync_of_a_first_save_can_be_left_out_unless_another_one_does_the_same():
    verdicts = judge(record_scenario(SCENARIOS["first save"]), damaged=False)
    assert verdicts.odd == []
    assert verdicts.noticed["storage.local.write"] == 5  # tensors, attachment, the two files of the index, manifest
    assert verdicts.noticed["repository.commit.by_rename._move"] == 2  # the new name's directory, and the old one's
    assert verdicts.noticed["storage.local.make_directory"] >= 2  # the run root, and the directory above it


@pytest.mark.parametrize("name", ORDERS)
def test_steps_in_another_order_lose_something(name):
    with in_another_order(name) as scenario:
        run = record_scenario(SCENARIOS[scenario])
        assert look(run, states(run, QUICK, latest_first=True), most_failures=1).failures
