"""A thread that cannot start is an error at once, and no wait without end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpointer.threads import Pool, room_for_a_thread

LIMITED = """
import resource, sys
from checkpointer.threads import Pool
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
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == [*["refused", "0"] * 5, "0"], done.stdout + done.stderr


def test_without_a_limit_there_is_room():
    assert room_for_a_thread()
    with Pool(2) as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
