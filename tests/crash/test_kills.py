"""The campaign of random kills, in short: it passes, and it would notice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.sabotage import SABOTAGES

REPOSITORY = Path(__file__).parents[2]

COARSE = ("delete-before-commit", "acknowledge-early", "forget-random-numbers", "leave-leftovers")
"""The sabotages that are tried without ``--thorough``: each takes seconds."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks processes that have imported torch")


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tests.crash.kills", "--jobs", "2", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_whenever_training_is_killed_the_newest_checkpoint_is_whole_and_resumes_exactly():
    done = campaign("--minutes", "0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {line.split()[0]: int(line.split()[-1]) for line in done.stdout.splitlines() if re.match(r"\w+ +\d", line)}
    assert counts["all"] >= 20, done.stdout
    assert counts["writing"] >= 1, done.stdout
    assert "or a newer one" in done.stdout


def test_a_campaign_of_kills_notices_a_library_that_is_broken(stride):
    names = SABOTAGES if stride == 1 else COARSE
    done = campaign("--minutes", "1", *(f"--sabotage={name}" for name in names))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\S+): caught after \d+ kills: Plan", done.stdout, re.MULTILINE) == list(names), done.stdout
