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

from tests.campaign.crash import program
from tests.integration.distributed.hosts import AHEAD, CASES

PROGRAM = "unshare --mount --net python -m tests.integration.distributed.hosts FOLDER"

ISOLATED = (["unshare", "--mount", "--net"], ["unshare", "--user", "--map-root-user", "--mount", "--net"])
"""Where networks are made that nobody else sees: as root, and as a user whom the kernel lets."""

NEEDED = (
    "ip link add name end0 type veth peer name end1 && "
    "unshare --net --uts --mount --pid --time --monotonic=1 --fork --mount-proc mount -t tmpfs none /mnt"
)

SECONDS = 2.0
"""``rank_timeout`` of the job."""

Ranks = list[dict[str, Any]]
"""What each of them says of a case."""

Outcomes = dict[str, Ranks]


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


def outcomes(ranks: int) -> Outcomes:
    """What every rank of one job says of each case."""
    within, reason = isolation()
    if not within:
        pytest.skip(f"no namespaces to make hosts of ({reason}). As root, outside a container: {PROGRAM}")
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        done = program.run("tests.integration.distributed.hosts", folder, f"--ranks={ranks}", within=within)
        assert done.returncode == 0, done.stdout + done.stderr
        return {line["case"]: line["ranks"] for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.thorough(lambda ranks: ranks > 1)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_over_two_hosts_saves_and_restores_and_names_the_host_where_something_is_wrong(ranks):
    """One test, since one job goes through all cases."""
    found = outcomes(ranks)
    assert list(found) == list(CASES)
    for case, said in found.items():
        assert len(said) == 2 * ranks, f"{case}: a rank hangs, or has died: {found}"
        assert {rank["host"] for rank in said} == {"host-0", "host-1"}
    a_normal_run_is_restored_though_the_clocks_began_at_other_times(found["run"])
    the_lock_of_a_job_that_was_killed_on_the_other_host_is_free(found["stale owner"])
    a_job_that_writes_on_the_other_host_is_named_on_every_rank(found["living owner"])
    hosts_that_do_not_share_the_root_are_told_which_and_what_to_do(found["private root"], committed=[])
    hosts_that_do_not_share_the_root_are_told_which_and_what_to_do(found["private copy"], committed=[1])
    a_link_that_goes_down_in_the_middle_of_a_save_is_an_error_in_time_on_both_hosts(found["link down"])


def a_normal_run_is_restored_though_the_clocks_began_at_other_times(ranks: Ranks) -> None:
    for rank in ranks:
        assert (rank["step"], rank["same"], rank["committed"]) == (2, True, [1, 2])
    clocks = [rank["monotonic"] for rank in ranks]
    assert max(clocks) - min(clocks) == pytest.approx(AHEAD, abs=60)


def the_lock_of_a_job_that_was_killed_on_the_other_host_is_free(ranks: Ranks) -> None:
    for rank in ranks:
        assert (rank["owner"], rank["told"], rank["committed"]) == ("host-1", "no error", [1])


def a_job_that_writes_on_the_other_host_is_named_on_every_rank(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["told"].startswith("RunLockedError")
        assert "on host host-1 (user " in rank["told"]
        assert rank["committed"] == []


def hosts_that_do_not_share_the_root_are_told_which_and_what_to_do(ranks: Ranks, *, committed: list[int]) -> None:
    for rank in ranks:
        assert rank["told"].startswith("ConfigError")
        assert "on host-1, does not see what rank 0, on host-0, has written to /mnt/" in rank["told"]
        assert "Choose a path on a shared file system (NFS, Lustre, …), the same on every host" in rank["told"]
        assert rank["committed"] == committed
        assert rank["left"] == []
        assert rank["seconds"] < SECONDS


def a_link_that_goes_down_in_the_middle_of_a_save_is_an_error_in_time_on_both_hosts(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["told"].startswith("SaveError")
        assert SECONDS <= rank["seconds"] < 3 * SECONDS + 4
        assert rank["committed"] == [1]
        if rank["host"] == "host-0":
            assert f"said nothing for {SECONDS:g} s (write: {{rank_timeout}}): it is dead or stuck" in rank["told"]
            assert "Nothing was committed" in rank["told"]
        else:
            assert "this host is cut off" in rank["told"]
