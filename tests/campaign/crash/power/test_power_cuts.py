"""Real power cuts, on real file systems in images: nothing that was promised is lost, and the model foresaw it all."""

from __future__ import annotations

import os
import sys

import pytest

from tests.campaign.crash.power.engine import Tally, look
from tests.campaign.crash.power.power_cuts import FILE_SYSTEMS, impossible_here, lacking, power_cuts, real_states
from tests.campaign.crash.power.scenarios import SCENARIOS, Run, Scenario, nothing, state

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder reads /proc"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that it calls"),
]


@pytest.fixture(autouse=True)
def _rig() -> None:
    """Where nothing is lacking for power cuts they have to be possible, in CI at least."""
    reason = impossible_here()
    if reason is not None and lacking() is None and os.environ.get("CI"):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
@pytest.mark.parametrize("name", ["save and prune", "overwrite"])
def test_a_real_power_cut_leaves_what_was_promised_and_what_the_model_foresees(kind, name, stride):
    tally = Tally()
    with power_cuts(SCENARIOS[name], kind, min(stride, 2) if name == "overwrite" else stride) as (run, disks):
        look(run, real_states(run, disks, tally=tally), tally=tally)
    assert not tally.failures, "\n".join(map(str, tally.failures))
    assert tally.moments >= 10
    assert tally.checked >= 5


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_real_power_cut_shows_that_nothing_was_fsynced(kind):
    def careless(run: Run) -> None:
        live = state(0)
        with run.manager(live, write={"mode": "sync", "durable": False}) as manager:
            run.save(manager, live, 1, 1)

    with power_cuts(Scenario(nothing, careless), kind) as (run, disks):
        (failure, *_) = look(run, real_states(run, disks)).failures
    assert "None was restored, not one of {1}" in failure.reason
