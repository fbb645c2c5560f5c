"""A job of torchrun over two hosts: network namespaces, each with a name, mounts, processes and a clock of its own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest

from tests.crash import program
from tests.distributed.hosts import AHEAD, CASES

PROGRAM = "unshare --mount --net python -m tests.distributed.hosts FOLDER"

ISOLATED = (["unshare", "--mount", "--net"], ["unshare", "--user", "--map-root-user", "--mount", "--net"])
"""Where networks are made that nobody else sees: as root, and as a user whom the kernel lets."""

NEEDED = (
    "ip link add name end0 type veth peer name end1 && "
    "unshare --net --uts --mount --pid --time --monotonic=1 --fork --mount-proc mount -t tmpfs none /mnt"
)

SECONDS = 2.0
"""``rank_timeout`` of the job."""

Outcomes = dict[str, list[dict[str, Any]]]


@functools.cache
def isolation() -> tuple[Sequence[str], str]:
    """What lets a program make hosts of its own; or nothing, and why."""
    said = "only Linux has namespaces" if sys.platform != "linux" else ""
    for command in () if said else ISOLATED:
        try:
            done = subprocess.run([*command, "sh", "-c", NEEDED], capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            return (), f"{error}"
        if done.returncode == 0:
            return command, ""
        said = done.stderr.strip()
    return (), said


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """What every rank of one job says of each case; with ``--thorough``, of two ranks on each host."""
    within, reason = isolation()
    if not within:
        pytest.skip(f"no namespaces to make hosts of ({reason}). As root, outside a container: {PROGRAM}")
    ranks = 2 if request.config.getoption("--thorough") else 1
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        done = program.run("tests.distributed.hosts", folder, f"--ranks={ranks}", within=within)
        assert done.returncode == 0, done.stdout + done.stderr
        found = {line["case"]: line["ranks"] for line in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(CASES)
    assert all(len(said) == 2 * ranks for said in found.values()), f"a rank hangs, or has died: {found}"
    assert all({rank["host"] for rank in said} == {"host-0", "host-1"} for said in found.values())
    return found


def test_a_job_over_two_hosts_saves_and_restores_though_their_clocks_began_at_other_times(outcomes):
    for rank in outcomes["run"]:
        assert (rank["step"], rank["same"], rank["committed"]) == (2, True, [1, 2])
    clocks = [rank["monotonic"] for rank in outcomes["run"]]
    assert max(clocks) - min(clocks) == pytest.approx(AHEAD, abs=60)


def test_the_lock_of_a_job_that_was_killed_on_the_other_host_is_free(outcomes):
    for rank in outcomes["stale owner"]:
        assert (rank["owner"], rank["told"], rank["committed"]) == ("host-1", "no error", [1])


def test_a_job_that_writes_on_the_other_host_is_named_on_every_rank(outcomes):
    for rank in outcomes["living owner"]:
        assert rank["told"].startswith("RunLockedError")
        assert "on host host-1 (user " in rank["told"]
        assert rank["committed"] == []


@pytest.mark.parametrize("case,committed", [("private root", []), ("private copy", [1])])
def test_hosts_that_do_not_share_the_root_are_told_which_and_what_to_do_and_nothing_is_left(outcomes, case, committed):
    for rank in outcomes[case]:
        assert rank["told"].startswith("ConfigError")
        assert "on host-1, does not see what rank 0, on host-0, has written to /mnt/" in rank["told"]
        assert "Choose a path on a shared file system (NFS, Lustre, …), the same on every host" in rank["told"]
        assert rank["committed"] == committed
        assert rank["left"] == []
        assert rank["seconds"] < SECONDS


def test_a_link_that_goes_down_in_the_middle_of_a_save_is_an_error_in_time_on_both_hosts(outcomes):
    for rank in outcomes["link down"]:
        assert rank["told"].startswith("SaveError")
        assert SECONDS <= rank["seconds"] < 3 * SECONDS + 4
        assert rank["committed"] == [1]
        if rank["host"] == "host-0":
            assert f"said nothing for {SECONDS:g} s (write: {{rank_timeout}}): it is dead or stuck" in rank["told"]
            assert "Nothing was committed" in rank["told"]
        else:
            assert "this host is cut off" in rank["told"]
