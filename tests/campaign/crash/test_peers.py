"""The campaign against peers tells a good one from a bad one, and what is bad about it."""

from __future__ import annotations

import re
import sys

import pytest

from tests.campaign.crash import program

PEERS = ("torch.save", "torch.save+rename", "forgetful", "hasty")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="it forks processes that have imported torch"),
    pytest.mark.timeout(600),  # on a machine that has much else to do
]


def _tables() -> dict[str, dict[str, dict[str, int]]]:
    """The counts of a short campaign: of each peer, of what was done to it, by what came of it."""
    short = ["--minutes", "0.3", "--kills", "8", "--flips", "1"]
    done = program.run("tests.campaign.crash.peers", *short, *(f"--peer={name}" for name in PEERS))
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in PEERS}
    for name, done_to_it, counts in re.findall(r"^(\S+): ([\w ]+): (.*)$", done.stdout, re.MULTILINE):
        found[name][done_to_it] = {what: int(count) for what, count in re.findall(r"(\w[\w -]*?) (\d+)", counts)}
    return found


def test_the_campaign_tells_a_good_peer_from_bad_ones_and_what_is_bad_about_each():
    tables = _tables()  # once for all of it
    overwrites, renames, forgets, hastens = (tables[name]["killed"] for name in PEERS)
    assert renames["restored"] == renames["kills"] >= 5, tables
    assert overwrites["lost"] > 0, tables
    assert forgets["wrong"] == forgets["kills"] > 0, tables
    assert hastens["rolled-back"] > 0, tables
    assert tables["torch.save+rename"]["one bit changed"]["unnoticed"] == 1, tables
