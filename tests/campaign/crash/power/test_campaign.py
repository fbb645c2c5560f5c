"""The long form says by its exit status whether anything was lost."""

from __future__ import annotations

import sys

import pytest

from tests.campaign.crash.power.campaign import main
from tests.campaign.crash.power.mutations import in_another_order

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder reads /proc"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that it calls"),
]


def test_it_ends_with_status_0_and_numbers_where_nothing_is_lost(capsys):
    assert main(["pin and annotate", "--only", "states", "--jobs", "1"]) == 0
    (states,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("states ")]
    _, records, operations, moments, enumerated, checked, lost = states
    assert (records, lost) == ("1", "0")
    assert int(operations) >= 20
    assert int(enumerated) >= max(int(moments), int(checked)) > 20


def test_it_ends_with_status_1_and_the_moment_where_something_is_lost(capsys):
    with in_another_order("remove in place") as scenario:
        assert main([scenario, "--only", "states", "--jobs", "1"]) == 1
    assert "power cut after operation" in capsys.readouterr().out


def test_a_scenario_that_there_is_not_is_no_success():
    assert main(["no such scenario", "--jobs", "1"]) == 1
