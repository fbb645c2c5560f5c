"""A thread that cannot start is an error at once, and no wait without end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpointer.system.threads import Pool, room_for_a_thread

LIMITED = """
import resource, sys
from checkpointer.system.threads import Pool
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
warm = Pool(1)
warm.submit(int).result()
for spare in (1, 9, 40, 80, 100):
    resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20), resource.RLIM_INFINITY))
    with Pool(1) as pool:
        try:
            pool.submit(int)
        except RuntimeError:
            print("refused", end=" ")
    print(warm.submit(int).result(), end=" ")  # its thread is there already
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Pool(1) as pool:
    print(pool.submit(int).result())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits the address space so")
def test_where_the_address_space_is_nearly_used_up_a_new_thread_is_refused_and_an_old_one_works():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == [*["refused", "0"] * 5, "0"], done.stdout + done.stderr


ALONE = """
import resource, sys, threading
import torch
from checkpointer import CheckpointManager
from checkpointer.system.threads import room_for_a_thread
parts = [torch.nn.Linear(1024, 1024) for _ in range(3)]
parts[0].requires_grad_(False), parts[1].requires_grad_(False)
model = torch.nn.Sequential(*parts)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
assert not room_for_a_thread()
with CheckpointManager(sys.argv[1], model=model) as mgr:
    mgr.save(1).result()
    mgr.save(2).result()
    wanted = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        [parameter.zero_() for parameter in model.parameters()]
    assert mgr.restore_latest().step == 2
    assert all(map(torch.equal, wanted, model.parameters()))
    print(threading.active_count())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits the address space so")
def test_saves_and_restores_do_without_threads_that_cannot_be_started(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "run")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.split() == ["1"], done.stdout + done.stderr


def test_without_a_limit_there_is_room():
    assert room_for_a_thread()
    with Pool(2) as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
