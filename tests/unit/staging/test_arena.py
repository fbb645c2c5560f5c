"""Memory for staged state: whole pages, reused, given back; a copy that ends leaves nobody copying."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.staging import arena
from checkpointer.staging.arena import LARGE, PIECE, Arena, Copy
from checkpointer.system import memory
from checkpointer.system.memory import PAGE, Region, page_aligned
from tests.support.compare import assert_identical

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own bookkeeping")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def filled() -> Iterator[Arena]:
    made = Arena()
    yield made
    made.free()


# ------------------------------------------------------------------------------------------------------------ regions


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, (2 << 20) + 1])
def test_a_region_is_whole_pages_at_a_page_border_and_writable(size):
    region = Region(size)
    assert region.size == max(page_aligned(size), PAGE)
    assert region.address % PAGE == 0
    region.view[-1] = 7
    assert ctypes.string_at(region.address + region.size - 1, 1) == b"\x07"


@linux
def test_a_region_is_marked_so_that_forked_children_do_not_see_it():
    region = Region(1 << 20)
    region.view[0] = 1
    assert "dc" in flags_of(region.address)


def flags_of(address: int) -> list[str]:
    """The flags of the mapping that holds ``address``: proc(5), smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


def test_hints_that_the_kernel_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(memory.mmap, "MADV_DONTFORK", 12345, raising=False)
    Region(PAGE).view[0] = 1


# ------------------------------------------------------------------------------------------------------------- arenas


def test_the_same_size_again_takes_the_same_memory(filled):
    filled.reserve(10_000)
    address, size = filled.address, filled.size
    for again in (10_000, 1, size):
        filled.reserve(again)
        assert (filled.address, filled.size) == (address, size)


def test_an_arena_grows_and_gives_what_it_had_back_first(filled, monkeypatch):
    filled.reserve(10_000)
    before = weakref.ref(filled._region)
    alive = []

    def region(size: int, **options: bool) -> Region:
        alive.append(before())
        return Region(size, **options)

    monkeypatch.setattr(arena, "Region", region)
    filled.reserve(1 << 20)
    assert filled.size == 1 << 20
    assert alive == [None]


def test_where_there_is_no_memory_to_grow_a_smaller_save_works_later(filled, monkeypatch):
    filled.reserve(10_000)

    def fail(size: int, **options: bool) -> Region:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(arena, "Region", fail)
        with pytest.raises(MemoryError):
            filled.reserve(1 << 40)
    filled.reserve(10_000)[0] = 1
    assert filled.size >= 10_000


def test_free_gives_memory_and_threads_back_and_the_arena_works_again():
    made = Arena()
    before = threading.active_count()
    made.reserve(3 * PIECE)
    region = weakref.ref(made._region)
    made.fill([Copy(torch.ones(3 * PIECE, dtype=torch.uint8), 0, 3 * PIECE)])
    made.free()
    assert region() is None
    assert made.size == 0
    assert threading.active_count() == before
    made.reserve(10)
    made.free()
    made.free()


@linux
def test_free_lowers_the_memory_of_the_process():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    made = Arena()
    made.reserve(64 << 20)[:] = bytes(64 << 20)
    before = resident()
    made.free()
    assert before - resident() > 60 << 20


SIZES = [0, 1, 63, 64, PAGE, LARGE - 1, LARGE, LARGE + 1, PIECE - 1, PIECE, PIECE + 1]


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.sampled_from(SIZES), max_size=5), threads=st.integers(1, 3), gap=st.sampled_from([0, 1, 64]))
def test_every_byte_is_copied_to_its_place_and_no_other_byte_changes(sizes, threads, gap):
    made = Arena(threads)
    view = made.reserve(sum(sizes) + gap * (len(sizes) + 1))
    view[:] = b"\xee" * len(view)
    expected = np.frombuffer(bytes(view), dtype=np.uint8).copy()
    copies = []
    offset = gap
    for size in sizes:
        tensor = torch.arange(size, dtype=torch.int64).mul_(31).to(torch.uint8)
        copies.append(Copy(tensor, offset, size))
        expected[offset : offset + size] = tensor.numpy()
        offset += size + gap
    made.fill(copies)
    assert bytes(view) == expected.tobytes()
    made.free()


def dtypes() -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.t(),
        lambda base: base[:, ::2],
        lambda base: base[:1].expand(5, 6),
        lambda base: base[2, 3],
        lambda base: base[:, 0],
        lambda base: base[:0],
        lambda base: base.conj() if base.is_complex() else base,
        lambda base: torch._neg_view(base) if base.dtype == torch.float32 else base,
    ],
    ids=["transposed", "gaps", "expanded", "scalar", "column", "empty", "conjugate", "negative"],
)
def test_what_is_not_row_major_is_copied_in_row_major_order(filled, dtype, view):
    bits = torch.arange(4 * 30, dtype=torch.int64).mul_(7)
    base = (bits[:30] % 2 == 0 if dtype == torch.bool else bits[:30].float().to(dtype)).reshape(5, 6)
    tensor = view(base)
    size = tensor.numel() * tensor.element_size()
    memory = filled.reserve(size + 64)
    filled.fill([Copy(tensor, 64, size)])
    found = torch.frombuffer(memory, dtype=torch.uint8)[64 : 64 + size].clone()
    plain = tensor.resolve_conj().resolve_neg()
    expected = torch.tensor([list(bytes_of(item)) for item in flat_elements(plain)], dtype=torch.uint8).reshape(-1)
    assert_identical(found, expected)


def flat_elements(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Each element by itself, in row-major order."""
    return [tensor[tuple(index)] for index in np.ndindex(*tensor.shape)]


def bytes_of(element: torch.Tensor) -> bytes:
    return ctypes.string_at(element.data_ptr(), element.element_size())


def test_a_copy_that_is_interrupted_leaves_nobody_copying(filled, monkeypatch):
    """Ctrl-C in the training thread: afterwards the tensors may be freed, and the arena filled anew."""
    source = torch.ones(20 * PIECE // 4)
    filled.reserve(20 * PIECE)
    copying: list[str] = []
    real = ctypes.memmove
    main = threading.current_thread()
    begun = threading.Event()

    def memmove(target: int, origin: int, size: int) -> None:
        if threading.current_thread() is main:
            assert begun.wait(20)
            raise KeyboardInterrupt
        copying.append("begins")
        begun.set()
        threading.Event().wait(0.05)
        real(target, origin, size)
        copying.append("ends")

    for module in (arena, memory):
        monkeypatch.setattr(module, "ctypes", Replaced(module.ctypes, memmove), raising=False)
    with pytest.raises(KeyboardInterrupt):
        filled.fill([Copy(source, 0, 20 * PIECE)])
    assert copying.count("begins") == copying.count("ends") == 1
    at_return = list(copying)
    threading.Event().wait(0.2)
    assert copying == at_return


class Replaced:
    """``ctypes`` with another memmove."""

    def __init__(self, real: Any, memmove: Callable[..., Any]) -> None:
        self._real = real
        self.memmove = memmove

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_where_no_thread_can_be_started_the_caller_copies_alone(filled, monkeypatch):
    """And what was meant for the thread is not copied later on, when the tensors may be gone."""
    source = torch.arange(3 * PIECE, dtype=torch.int32).to(torch.uint8)
    view = filled.reserve(3 * PIECE)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        filled.fill([Copy(source, 0, 3 * PIECE)])
    assert bytes(view[: 3 * PIECE]) == source.numpy().tobytes()
    other = torch.zeros(3 * PIECE, dtype=torch.uint8)
    filled.fill([Copy(other, 0, 3 * PIECE)])
    assert bytes(view[: 3 * PIECE]) == bytes(3 * PIECE)
