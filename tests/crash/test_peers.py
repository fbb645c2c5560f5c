"""The campaign against peers tells a good one from a bad one, and what is bad about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = ("torch.save", "torch.save+rename", "forgetful", "hasty")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks processes that have imported torch")


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, dict[str, int]]]:
    """The counts of a short campaign: of each peer, of what was done to it, by what came of it."""
    program = [sys.executable, "-m", "tests.crash.peers", "--minutes", "0.3", "--kills", "8", "--flips", "1"]
    done = subprocess.run(
        [*program, *(f"--peer={name}" for name in PEERS)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in PEERS}
    for name, done_to_it, counts in re.findall(r"^(\S+): ([\w ]+): (.*)$", done.stdout, re.MULTILINE):
        found[name][done_to_it] = {what: int(count) for what, count in re.findall(r"(\w[\w -]*?) (\d+)", counts)}
    return found


def test_a_peer_that_renames_survives_every_kill(tables):
    counts = tables["torch.save+rename"]["killed"]
    assert counts["kills"] >= 5
    assert counts["restored"] == counts["kills"]


def test_a_peer_that_writes_over_its_only_checkpoint_loses_runs(tables):
    assert tables["torch.save"]["killed"]["lost"] > 0


def test_a_restore_that_forgets_random_numbers_is_found_wrong_at_once(tables):
    counts = tables["forgetful"]["killed"]
    assert counts["wrong"] == counts["kills"] > 0


def test_a_save_that_is_called_done_too_early_is_seen_to_roll_back(tables):
    assert tables["hasty"]["killed"]["rolled-back"] > 0


def test_a_changed_bit_in_a_file_without_hashes_is_restored_unnoticed(tables):
    assert tables["torch.save+rename"]["one bit changed"]["unnoticed"] > 0
