"""A disk that is full, and a file that may not grow: an error that says so, no hang, and no thread left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointer.storage import LocalStorage
from checkpointer.system import direct_io

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own calls")


def noise(size: int) -> bytes:
    """Bytes that differ from page to page and from byte to byte."""
    return b"".join(number.to_bytes(4, "little") for number in range(size // 4 + 1))[:size]


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a disk, where tests run; ``tmp_path`` may be anything."""
    with tempfile.TemporaryDirectory(dir=".") as made:
        yield Path(made)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this system lets nobody mount")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_is_an_error_that_says_so_and_ends_the_file(full_disk, monkeypatch, reserved):
    if not reserved:
        monkeypatch.setattr(direct_io, "_preallocate", lambda fd, size: None)
    before = threading.active_count()
    data = noise(6 << 20)
    with pytest.raises(OSError, match="No space left") as caught:
        LocalStorage(full_disk).write("file", [data], len(data))
    assert caught.value.errno == errno.ENOSPC
    assert threading.active_count() == before
    small = noise(2 << 20)
    (full_disk / "file").unlink()
    LocalStorage(full_disk).write("other", [small], len(small))
    assert (full_disk / "other").read_bytes() == small


LIMITED = """
import os, resource, sys, threading
from checkpointer.storage import LocalStorage
from checkpointer.system import direct_io
if sys.argv[2] == "no":
    direct_io._preallocate = lambda fd, size: None
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_001, 3_000_001))
try:
    LocalStorage(sys.argv[1]).write("file", [bytes(6 << 20)], 6 << 20)
except OSError as error:
    print(type(error).__name__, error.errno, threading.active_count())
"""


@linux
@pytest.mark.parametrize("reserved", ["yes", "no"])
def test_a_file_that_may_not_grow_that_far_is_an_error_and_no_hang(folder, reserved):
    command = [sys.executable, "-c", LIMITED, str(folder), reserved]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG), "1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
