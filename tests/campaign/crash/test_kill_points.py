"""A process killed at any event on the file system leaves a whole newest checkpoint, and no rubbish for ever."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.crash.scenarios import SCENARIOS
from tests.support import processes


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: a killed process leaves the same there, and fsync takes no time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the program reads /proc")
@pytest.mark.parametrize("exchange", ["exchange", "no-exchange"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_event_leaves_the_old_newest_checkpoint_or_the_new_one(folder, stride, scenario, exchange):
    replaces = scenario in ("overwriting save", "save over an abandoned branch")
    if exchange == "no-exchange" and not replaces and stride > 1:
        pytest.skip("nothing is exchanged here: only with --thorough")
    step = 1 if stride == 1 else 2 * stride - replaces
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.campaign.crash.kill_points",
        scenario,
        str(folder),
        "1",
        str(step),
    ]
    done = processes.run([*command, *(["no-exchange"] if exchange == "no-exchange" else [])], timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    word, count = done.stdout.split()
    assert word == "ok"
    assert int(count) * step >= (150 if replaces else 20)
