"""Saves, managers and interrupted loops, thousands of them in one process, leave nothing behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")

ALLOCATED = 512 << 10
"""Bytes that the C library may have given out beyond those before. What it keeps for itself, which is what makes the
resident memory of the same 2,000 saves differ by megabytes from run to run, does not count. 3,000 saves need 10 KiB."""

BLOCKS = 1500
"""Small blocks of Python's own allocator, strings and numbers too: caches of up to 512 entries may not be full yet."""

ADDRESSES = 32 << 20
"""Bytes that may be mapped beyond those before: the C library keeps the stacks of a few threads. One ring of buffers,
which is what a manager maps, has 40 MiB."""

FEW = 20
"""Objects of Python that caches may have grown by. One for each of 30 managers, or of 100 saves, would be more."""


def grown(what: str, mode: str, count: int, tmp_path: Path) -> dict[str, Any]:
    """Do it ``count`` times, after some times that do not count; what the process holds more than before."""
    (tmp_path / "tmp").mkdir()
    program = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.integration.leaks",
        what,
        mode,
        str(count),
        str(tmp_path / "run"),
    ]
    done = processes.run(program, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    print(what, mode, count, done.stdout)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], tmp_path: Path) -> None:
    assert found["held"] == {}
    assert found["objects"] <= FEW, found["kinds"]
    assert found["allocated"] <= ALLOCATED
    assert found["blocks"] <= BLOCKS
    assert found["mapped"] <= ADDRESSES
    private = tmp_path / "run" / ".checkpointer"
    left = {name: os.listdir(private / name) for name in ("tmp", "trash", "quarantine") if (private / name).exists()}
    assert not any(left.values()), left
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--thorough"))


def test_what_is_left_behind_would_be_noticed(tmp_path: Path) -> None:
    found = grown("leaking", "async", 30, tmp_path)
    assert found["held"].keys() == {"descriptors", "threads", "tasks"}
    assert found["objects"] > FEW
    assert found["allocated"] > ALLOCATED
    assert found["mapped"] > ADDRESSES


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("mode", ["sync", "async", "lazy"])
def test_saves_leave_no_thread_descriptor_lock_file_or_memory_behind(mode: str, tmp_path: Path, thorough: bool) -> None:
    found = grown("saves", mode, 2000 if thorough else 100, tmp_path)
    check(found, tmp_path)
    assert found["announced"] > 100


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("what, mode", [("managers", "async"), ("managers", "lazy"), ("dropped", "lazy")])
def test_managers_that_are_closed_or_dropped_leave_nothing_behind(
    what: str, mode: str, tmp_path: Path, thorough: bool
) -> None:
    check(grown(what, mode, 150 if thorough else 30, tmp_path), tmp_path)


@pytest.mark.parametrize("mode", ["sync", "async", "lazy"])
@pytest.mark.thorough(lambda mode: mode == "sync")
def test_a_loop_that_is_interrupted_in_the_middle_of_a_save_and_run_again_leaves_nothing_behind(
    mode: str, tmp_path: Path, thorough: bool
) -> None:
    check(grown("loops", mode, 20 if thorough else 5, tmp_path), tmp_path)
