"""Large files hold exactly what was given, whatever the file system answers; what fails ends, and says so."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer.storage import LocalStorage
from checkpointer.system import direct_io
from checkpointer.system.memory import PAGE, STEADY, Region

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL
SMALL = 2 * PAGE
"""A block in these tests: borders come often."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own calls")


def noise(size: int) -> bytes:
    """Bytes that differ from page to page and from byte to byte."""
    return b"".join(number.to_bytes(4, "little") for number in range(size // 4 + 1))[:size]


def cut(data: memoryview, lengths: list[int]) -> Iterator[memoryview]:
    start = 0
    for length in lengths:
        yield data[start : start + length]
        start += length


def spoiled_after(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """Pieces that are overwritten as soon as the next one is asked for: the rule for those that are not steady."""
    for piece in pieces:
        own = bytearray(piece)
        yield memoryview(own)
        own[:] = b"\xee" * len(own)


def write(path: Path, pieces: Any, size: int, *, steady: bool = False, buffered: bool = False) -> bytes:
    """What the file holds afterwards."""
    fd = os.open(path, FLAGS) if buffered else direct_io.open_direct(str(path), FLAGS)
    try:
        assert direct_io.write_blocks(fd, pieces, size, steady=steady) == size
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a disk, where tests run; ``tmp_path`` may be anything."""
    with tempfile.TemporaryDirectory(dir=".") as made:
        yield Path(made)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "BLOCK", SMALL)


near = st.sampled_from([0, PAGE, SMALL, 3 * PAGE, 2 * SMALL, 5 * SMALL]).flatmap(
    lambda border: st.integers(max(border - 2, 0), border + 2)
)
lengths = st.lists(near | st.integers(0, 3 * SMALL), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=lengths, steady=st.booleans(), shift=st.sampled_from([0, 0, 1, 64, PAGE - 1]), buffered=st.booleans())
def test_the_file_holds_the_pieces_whatever_their_sizes(blocks, folder, lengths, steady, shift, buffered):
    size = sum(lengths)
    memory = Region(size + shift)
    memory.view[shift : shift + size] = noise(size)
    data = memory.view[shift : shift + size]
    pieces = cut(data, lengths)
    path = folder / "file"
    path.unlink(missing_ok=True)
    found = (
        write(path, pieces if steady else spoiled_after(pieces), max(size, 1), steady=steady, buffered=buffered)
        if (size)
        else b""
    )
    assert found == bytes(data)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(near.filter(lambda size: size <= 2 * SMALL), min_size=1, max_size=20))
def test_a_steady_piece_is_done_with_when_as_many_as_agreed_were_asked_for_after_it(blocks, folder, lengths):
    ring = [Region(3 * SMALL) for _ in range(STEADY + 1)]
    data = noise(sum(lengths))

    def pieces() -> Iterator[memoryview]:
        start = 0
        for number, length in enumerate(lengths):
            view = ring[number % len(ring)].view[:length]
            view[:] = data[start : start + length]
            start += length
            yield view

    path = folder / "file"
    path.unlink(missing_ok=True)
    assert not data or write(path, pieces(), len(data), steady=True) == data


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("border", [PAGE, direct_io.BLOCK])
def test_a_file_may_end_before_at_and_behind_a_border(folder, border, extra):
    data = noise(border + extra)
    assert write(folder / "file", [data], len(data)) == data


def test_what_was_filled_up_to_a_page_is_cut_off_and_nothing_stays_reserved_behind(blocks, folder):
    write(folder / "file", [noise(SMALL + 5)], SMALL + 5)
    status = (folder / "file").stat()
    assert status.st_size == SMALL + 5
    assert status.st_blocks * 512 <= 4 * SMALL


@linux
def test_a_file_system_in_memory_is_written_too():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        data = noise(3 << 20)
        assert write(Path(made) / "file", [data], len(data)) == data


# ------------------------------------------------------------------------------------------ what the system may answer


class Writes:
    """``os.pwrite`` that answers as it is told to."""

    def __init__(self, answer: Callable[[int, memoryview, int], int | None]) -> None:
        self._answer = answer
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, fd: int, view: memoryview, offset: int) -> int:
        with self._lock:
            self.count += 1
            count = self.count
        allowed = self._answer(count, view, fd)
        return _pwrite(fd, view if allowed is None else view[:allowed], offset)


_pwrite = os.pwrite


def is_direct(fd: int) -> bool:
    return direct_io._is_direct(fd)


@pytest.mark.parametrize("allowed", [PAGE, PAGE + 1, 2 * PAGE - 1])
@pytest.mark.parametrize("buffered", [False, True])
def test_short_writes_are_continued(blocks, folder, allowed, buffered):
    def answer(count: int, view: memoryview, fd: int) -> int | None:
        return None if is_direct(fd) and allowed % PAGE else allowed

    data = noise(10 * SMALL + 17)
    with mock.patch("os.pwrite", Writes(answer)):
        assert write(folder / "file", [data], len(data), buffered=buffered) == data


def test_a_write_that_takes_nothing_is_an_error_and_no_endless_loop(blocks, folder):
    with mock.patch("os.pwrite", Writes(lambda count, view, fd: 0)), pytest.raises(OSError, match="none of 8192"):
        write(folder / "file", [noise(SMALL)], SMALL, buffered=True)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_a_file_system_that_refuses_a_direct_write_is_written_through_the_cache_from_there(blocks, folder, number):
    def answer(count: int, view: memoryview, fd: int) -> int | None:
        if count >= number and is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return None

    data = noise(10 * SMALL + 17)
    writes = Writes(answer)
    with mock.patch("os.pwrite", writes):
        assert write(folder / "file", [data], len(data)) == data
    assert writes.count >= 11


@linux
def test_a_file_system_without_direct_writes_is_written_through_the_cache_though_its_open_makes_the_file(folder):
    import fcntl

    open_file, control = os.open, fcntl.fcntl

    def open_without_direct(path: str, flags: int, *mode: int) -> int:
        fd = open_file(path, flags & ~os.O_DIRECT, *mode)
        if flags & os.O_DIRECT:  # Linux notices only now, and leaves the file
            os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return fd

    def control_without_direct(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(fd, command, flags)

    storage, data = LocalStorage(str(folder)), noise(4 << 20)
    with mock.patch("os.open", open_without_direct), mock.patch("fcntl.fcntl", control_without_direct):
        storage.write("file", [data], len(data))
    assert (folder / "file").read_bytes() == data


def test_two_direct_writes_that_are_refused_at_the_same_moment_are_both_repeated(blocks, folder):
    together = threading.Barrier(2)
    refused = []

    def answer(count: int, view: memoryview, fd: int) -> int | None:
        if count <= 2 and is_direct(fd):
            refused.append(count)
            together.wait(20)
            raise OSError(errno.EINVAL, "Invalid argument")
        return None

    data = noise(10 * SMALL + 17)
    fd = direct_io.open_direct(str(folder / "probe"), FLAGS)
    accepts = is_direct(fd)
    os.close(fd)
    if not accepts:
        pytest.skip("this file system takes no direct writes")
    with mock.patch("os.pwrite", Writes(answer)):
        assert write(folder / "file", [data], len(data)) == data
    assert sorted(refused) == [1, 2]


def test_an_invalid_argument_that_has_another_reason_is_an_error(blocks, folder):
    def answer(count: int, view: memoryview, fd: int) -> int | None:
        raise OSError(errno.EINVAL, "Invalid argument")

    with mock.patch("os.pwrite", Writes(answer)), pytest.raises(OSError, match="Invalid argument"):
        write(folder / "file", [noise(SMALL)], SMALL)


@pytest.mark.parametrize("number", [1, 2, 5, 11])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_is_the_error_of_the_file_and_leaves_no_thread(blocks, folder, number, code):
    def answer(count: int, view: memoryview, fd: int) -> int | None:
        if count == number:
            raise OSError(code, os.strerror(code))
        return None

    before = threading.active_count()
    data = noise(10 * SMALL + 17)
    with mock.patch("os.pwrite", Writes(answer)), pytest.raises(OSError, match=os.strerror(code)) as caught:
        write(folder / "file", [data], len(data))
    assert caught.value.errno == code
    assert threading.active_count() == before


@pytest.mark.parametrize("given", [0, 1, 9])
def test_pieces_that_end_in_an_error_leave_no_thread_and_no_hang(blocks, folder, given):
    def pieces() -> Iterator[bytes]:
        for _ in range(given):
            yield noise(SMALL)
        raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        write(folder / "file", pieces(), 20 * SMALL)
    assert threading.active_count() == before


def test_where_no_thread_can_be_started_each_block_is_written_once_and_right(blocks, folder):
    """The first thread starts, the second does not; the block that it was for must not be written later on, when its
    memory holds another.
    """
    real = threading.Thread.start
    started = []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("checkpointer-disk") and started:
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        real(thread)

    def slow(count: int, view: memoryview, fd: int) -> int | None:
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.005)
        return None

    data = noise(40 * SMALL + 17)
    with mock.patch.object(threading.Thread, "start", start), mock.patch("os.pwrite", Writes(slow)):
        assert write(folder / "file", spoiled_after(cut(memoryview(data), [SMALL] * 41)), len(data)) == data


@linux
def test_a_signal_during_the_reservation_of_space_is_no_error():
    """fallocate(2) is interrupted by signals, and Python repeats only its own calls."""
    ticks = []
    before = signal.signal(signal.SIGALRM, lambda *arguments: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
            data = memoryview(mmap.mmap(-1, 64 << 20))
            for number in range(3):
                fd = os.open(f"{made}/{number}", FLAGS)
                assert direct_io.write_blocks(fd, [data], len(data), steady=True) == len(data)
                os.close(fd)
                os.unlink(f"{made}/{number}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks


@pytest.mark.parametrize("code", [errno.EINTR, errno.EOPNOTSUPP, errno.ENOSYS])
def test_space_that_cannot_be_reserved_in_advance_is_found_while_writing(folder, monkeypatch, code):
    def system_call(name: str, *types: Any) -> Any:
        if name != "fallocate":
            return None

        def fail(*arguments: Any) -> int:
            import ctypes

            ctypes.set_errno(code)
            return -1

        return fail

    monkeypatch.setattr(direct_io, "_system_call", system_call)
    data = noise(3 << 20)
    assert write(folder / "file", [data], len(data)) == data
