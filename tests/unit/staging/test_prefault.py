"""Memory is touched ahead of its use: what is in it stays, and where there is too little of it none is taken."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointer.staging import prefault
from checkpointer.staging.arena import Arena
from checkpointer.staging.prefault import Prefault
from checkpointer.system import memory
from checkpointer.system.free_memory import free_memory
from checkpointer.system.memory import PAGE, Region

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own bookkeeping")
MIB = 1 << 20


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(prefault, "PAUSE", 0.0)


@pytest.fixture
def touched() -> Iterator[Arena]:
    made = Arena(1)
    yield made
    made.free()


def finished(made: Prefault) -> None:
    thread = made._thread
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()


def faults_of(fill: memoryview, value: int) -> int:
    """Page faults that writing one byte into each page takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for at in range(0, len(fill), PAGE):
        fill[at] = value
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@linux
def test_memory_that_was_touched_ahead_takes_no_page_faults_and_other_memory_does(quick):
    region = Region(32 * MIB, huge=False)
    made = Prefault(region, 16 * MIB)
    finished(made)
    assert made.position == 16 * MIB
    assert faults_of(region.view[: 16 * MIB], 1) < 100
    assert faults_of(region.view[16 * MIB :], 1) > 1000


@linux
def test_what_is_in_memory_that_is_touched_stays(quick):
    region = Region(4 * MIB, huge=False)
    region.view[: 2 * MIB] = b"\x5a" * (2 * MIB)
    finished(Prefault(region, 4 * MIB))
    assert bytes(region.view[: 2 * MIB]) == b"\x5a" * (2 * MIB)


def test_where_the_system_cannot_touch_memory_it_is_written_to(quick, monkeypatch):
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    region = Region(4 * MIB, huge=False)
    made = Prefault(region, 4 * MIB)
    finished(made)
    made.stop()
    assert made.position == 4 * MIB
    if sys.platform == "linux":
        assert faults_of(region.view, 1) < 100


def test_stopping_ends_the_thread_soon_though_much_is_left(monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    made = Prefault(Region(64 * MIB, huge=False), 64 * MIB)
    made.stop()
    made.join()
    assert made.position <= prefault.BURST


def test_an_owner_that_is_dropped_leaves_no_thread_behind(monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    made = Prefault(Region(64 * MIB, huge=False), 64 * MIB)
    thread = made._thread
    del made
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()


@linux
def test_a_first_touch_that_the_system_refuses_ends_quietly_and_says_so_in_the_log(quick, monkeypatch, caplog):
    def refuse(address: int, size: int, advice: int) -> int:
        memory.ctypes.set_errno(errno.ENOMEM)
        return -1

    region = Region(4 * MIB, huge=False)
    monkeypatch.setattr(memory, "_madvise", lambda: refuse)
    with caplog.at_level("INFO", "checkpointer"):
        made = Prefault(region, 4 * MIB)
        finished(made)
    assert made.position == 0
    assert "not prepared" in caplog.text


def test_where_little_memory_is_free_none_is_touched(quick, monkeypatch, caplog):
    monkeypatch.setattr(prefault, "free_memory", lambda: 4 * MIB + prefault.SPARED - 1)
    with caplog.at_level("INFO", "checkpointer"):
        made = Prefault(Region(4 * MIB, huge=False), 4 * MIB)
        finished(made)
    assert made.position == 0
    assert "not prepared" in caplog.text


@linux
def test_the_thread_has_the_lowest_priority_and_training_keeps_its_own(monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    made = Prefault(Region(4 * MIB, huge=False), 4 * MIB)
    thread = made._thread
    assert thread is not None
    while not made.position:
        time.sleep(0.001)
    assert thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    made.stop()
    made.join()


@linux
def test_a_child_that_is_forked_meanwhile_sees_none_of_it_and_touching_goes_on(quick, monkeypatch):
    region = Region(64 * MIB, huge=False)
    made = Prefault(region, 64 * MIB)
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    finished(made)
    assert made.position == 64 * MIB
    assert faults_of(region.view, 1) < 200


# ------------------------------------------------------------------------------------------------------------- arenas


@linux
def test_an_arena_that_was_touched_is_used_by_the_save_even_where_that_needs_a_little_more(quick, touched):
    touched.touch(16 * MIB)
    assert touched._prefault is not None
    finished(touched._prefault)
    address = touched.address
    view = touched.reserve(20 * MIB)
    assert touched.address == address
    assert faults_of(view[: 16 * MIB], 1) < 100


def test_free_ends_the_touching_thread(touched, monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    before = threading.active_count()
    touched.touch(16 * MIB)
    assert threading.active_count() == before + 1
    touched.free()
    assert threading.active_count() == before
    assert touched.size == 0


# -------------------------------------------------------------------------------------------------------- free memory


def system(folder: Path, groups: str, **files: str) -> tuple[Path, Path]:
    """Something like /proc and /sys/fs/cgroup; file names with __ for /."""
    proc, mounted = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = mounted / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, mounted


def test_free_memory_is_what_the_system_has_where_no_group_is_limited(tmp_path):
    assert free_memory(*system(tmp_path, "0::/\n", memory_DOT_max="max")) == 8000 << 10


def test_the_tightest_limit_of_all_groups_above_a_process_counts_and_its_page_cache_is_free(tmp_path):
    found = free_memory(
        *system(
            tmp_path,
            "0::/job/part\n",
            job__memory_DOT_max="1000000",
            job__memory_DOT_current="900000",
            job__memory_DOT_stat="anon 5\ninactive_file 100\nactive_file 20\n",
            job__part__memory_DOT_max="max",
            job__part__memory_DOT_current="800000",
        )
    )
    assert found == 100_120


def test_limits_of_the_first_kind_of_groups_count_too(tmp_path):
    found = free_memory(
        *system(
            tmp_path,
            "4:cpu,memory:/outside/of/the/container\n",
            memory__memory_DOT_limit_in_bytes="5000",
            memory__memory_DOT_usage_in_bytes="4000",
            memory__memory_DOT_stat="total_inactive_file 7\n",
        )
    )
    assert found == 1007


@linux
def test_this_system_says_how_much_memory_is_free():
    found = free_memory()
    assert found is not None
    assert found > MIB
