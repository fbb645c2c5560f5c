"""What a read costs beyond the bytes: how often files are asked, and how much memory bytes wait in."""

from __future__ import annotations

import os
import secrets
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from benchmarks.pagecache import evict, resident
from checkpointer import CheckpointManager
from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import Chunk
from checkpointer.repository import checkpoint_reader
from checkpointer.staging.gpu import BOUNCE_SIZE
from checkpointer.staging.read_targets import TensorTarget
from checkpointer.state.tensors import host_bytes
from checkpointer.storage.local import LocalFile
from checkpointer.system.memory import PAGE, expect_use, view_of
from tests.support.forge import flip

MIB = 1 << 20


def saved(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with CheckpointManager(folder, config={"write": {"mode": "sync"}}, state=state) as mgr:
        mgr.save(1).result()


def restored(folder: Path, live: dict[str, torch.Tensor], **options: Any) -> None:
    with CheckpointManager(folder, read_only=True, state=live) as mgr:
        assert mgr.restore_latest(**options) is not None


def damage(folder: Path, needle: bytes) -> None:
    """Flip a bit where a tensor file holds ``needle``."""
    (path,) = [path for path in folder.rglob("*.safetensors") if needle in path.read_bytes()]
    flip(path, path.read_bytes().find(needle))


def whole(tensor: torch.Tensor) -> Chunk:
    return Chunk((0,) * tensor.ndim, tuple(tensor.shape), "file", 0, tensor.nbytes, "0" * 32)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, buffers) of each request for the bytes of tensors."""
    found: list[tuple[int, int]] = []
    one, many = LocalFile.read_into, LocalFile.read_many

    def read_into(self: LocalFile, offset: int, view: memoryview) -> None:
        found.append((offset, 1))
        one(self, offset, view)

    def read_many(self: LocalFile, offset: int, views: list[memoryview]) -> None:
        found.append((offset, len(views)))
        many(self, offset, views)

    monkeypatch.setattr(LocalFile, "read_into", read_into)
    monkeypatch.setattr(LocalFile, "read_many", read_many)
    return found


def test_small_tensors_that_lie_next_to_each_other_are_read_by_few_requests(
    tmp_path: Path, requests: list[tuple[int, int]]
) -> None:
    state = {f"{number}": torch.full((3,), number) for number in range(1000)}
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    saved(tmp_path, state)
    requests.clear()
    restored(tmp_path, live)
    assert sum(buffers for _, buffers in requests) > 1000
    assert len(requests) < 30
    assert all(torch.equal(live[key], state[key]) for key in state)


def test_damage_of_one_small_tensor_among_many_is_found_and_named(tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((3,), 1000 + number) for number in range(300)}
    saved(tmp_path, state)
    damage(tmp_path, bytes(host_bytes(state["t123"])))
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with (
        CheckpointManager(tmp_path, read_only=True, state=live) as mgr,
        pytest.raises(CorruptCheckpointError, match=r"hold state\.t123, do not match"),
    ):
        mgr.restore(1)


@pytest.mark.parametrize("options", [{}, {"verify": "before"}, {"verify": "off"}])
def test_a_tensor_that_several_threads_share_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, str]) -> None:
    size = checkpoint_reader.LARGE + 3 * checkpoint_reader.SPAN + 12345
    state = {"large": torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, np.uint8))}
    saved(tmp_path, state)
    live = {"large": torch.zeros(size, dtype=torch.uint8)}
    restored(tmp_path, live, **options)
    assert torch.equal(live["large"], state["large"])


@pytest.mark.parametrize("place", [0, checkpoint_reader.SPAN + 7, checkpoint_reader.LARGE + 100])
def test_damage_anywhere_in_a_tensor_that_several_threads_share_is_found(tmp_path: Path, place: int) -> None:
    tensor = torch.zeros(checkpoint_reader.LARGE + 5000, dtype=torch.uint8)
    needle = secrets.token_bytes(16)
    tensor[place : place + 16] = torch.frombuffer(bytearray(needle), dtype=torch.uint8)
    saved(tmp_path, {"large": tensor})
    damage(tmp_path, needle)
    with (
        CheckpointManager(tmp_path, read_only=True, state={"large": torch.zeros_like(tensor)}) as mgr,
        pytest.raises(CorruptCheckpointError, match=r"hold state\.large, do not match"),
    ):
        mgr.restore(1)


def test_verify_off_reads_what_is_damaged(tmp_path: Path) -> None:
    state = {"a": torch.arange(100)}
    saved(tmp_path, state)
    damage(tmp_path, bytes(host_bytes(state["a"])))
    live = {"a": torch.zeros(100, dtype=torch.int64)}
    restored(tmp_path, live, verify="off")
    assert (live["a"] != state["a"]).sum() == 1


def test_verify_before_finds_damage_before_anything_live_has_changed(tmp_path: Path) -> None:
    state = {f"{number}": torch.full((100,), number + 1) for number in range(20)}
    saved(tmp_path, state)
    damage(tmp_path, bytes(host_bytes(state["19"])))
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with CheckpointManager(tmp_path, read_only=True, state=live) as mgr, pytest.raises(CorruptCheckpointError):
        mgr.restore(1, verify="before")
    assert not any(tensor.any() for tensor in live.values())


@pytest.mark.parametrize("order", [range(8), reversed(range(8)), [3, 1, 0, 7, 2, 6, 5, 4]])
def test_the_hash_of_blocks_that_come_out_of_order_is_that_of_the_whole(order: Iterator[int]) -> None:
    data = os.urandom(8 * 1000)
    hashed = checkpoint_reader._Hash()
    done = [hashed.add(number * 1000, memoryview(data)[number * 1000 :][:1000]) for number in order]
    assert done.count(8000) == 1
    assert hashed.hexdigest() == xxhash.xxh3_128_hexdigest(data)


def test_no_thread_reads_on_after_a_restore_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{number}": torch.zeros(200_000) for number in range(60)}
    saved(tmp_path, state)
    begun: list[int] = []

    def fail(self: LocalFile, offset: int, view: memoryview) -> None:
        begun.append(offset)
        raise OSError(5, "a bad sector") if offset > MIB else OSError(28, "out of luck")

    with CheckpointManager(tmp_path, read_only=True, state=state) as mgr:
        monkeypatch.setattr(checkpoint_reader.CheckpointReader, "check_metadata", lambda self: monkeypatch.setattr(
            LocalFile, "read_into", fail))  # fmt: skip
        with pytest.raises((CorruptCheckpointError, OSError)):
            mgr.restore(1)
    assert len(begun) <= checkpoint_reader.READ_THREADS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpointer-read")]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.zeros(3, 1, 2 * BOUNCE_SIZE // 8 + 5, dtype=torch.float64).expand(3, 1, -1)[:, :, ::2],
        torch.zeros(4000, 4001, dtype=torch.int16).t(),
        torch.zeros(5, 6, dtype=torch.complex128).t(),
        torch.zeros(7, dtype=torch.bfloat16)[::3],
        torch.zeros(0, 3).t(),
    ],
    ids=lambda tensor: str(list(tensor.shape)),
)
def test_a_tensor_that_is_not_row_major_is_filled_by_small_blocks_in_row_major_order(tensor: torch.Tensor) -> None:
    target = TensorTarget(tensor, whole(tensor))
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 64, tensor.nbytes, np.uint8))
    start = 0
    for block in target.blocks():
        assert len(block) <= BOUNCE_SIZE
        torch.frombuffer(block, dtype=torch.uint8).copy_(data[start : start + len(block)]) if len(block) else None
        start += len(block)
    assert start == tensor.nbytes
    assert bytes(host_bytes(tensor)) == bytes(data.numpy())


def test_what_waits_on_its_way_to_memory_that_is_not_row_major_is_bounded(tmp_path: Path) -> None:
    state = {f"{number}": torch.full((3000, 3000), number + 1.0) for number in range(4)}
    saved(tmp_path, state)
    live = {key: torch.zeros(3000, 3000).t() for key in state}
    sizes: list[int] = []
    empty = torch.empty

    def watched(shape: Any, **options: Any) -> torch.Tensor:
        made = empty(shape, **options)
        sizes.append(made.nbytes)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", watched)
        restored(tmp_path, live)
    assert 0 < max(sizes) <= BOUNCE_SIZE
    assert checkpoint_reader.READ_THREADS * BOUNCE_SIZE <= 64 * MIB
    assert all(torch.equal(live[key], state[key]) for key in state)


def test_a_restore_into_live_memory_allocates_next_to_nothing(tmp_path: Path) -> None:
    state = {f"{number}": torch.rand(4 * MIB) for number in range(4)}
    saved(tmp_path, state)
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with CheckpointManager(tmp_path, read_only=True, state=live) as mgr:
        tracemalloc.start()
        try:
            mgr.restore(1)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 8 * MIB


def test_the_system_reads_ahead_all_that_it_is_asked_for_and_not_just_its_usual_readahead(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(40 << 20))
    if evict([path]) > 0:
        pytest.skip("this file system keeps everything in memory")
    fd = os.open(path, os.O_RDONLY)
    file = LocalFile(fd, 40 << 20, str(path))
    try:
        file.prefetch(1 << 20, 35 << 20)
        ends = time.monotonic() + 30
        while resident([path]) < 35 / 40 and time.monotonic() < ends:
            time.sleep(0.01)
        assert 35 / 40 <= resident([path]) < 38 / 40
    finally:
        file.close()


def test_a_view_of_memory_writes_to_it() -> None:
    tensor = torch.zeros(10, dtype=torch.uint8)
    view_of(tensor.data_ptr() + 3, 4)[:] = b"abcd"
    assert bytes(tensor.numpy()) == b"\0\0\0abcd\0\0\0"
    assert len(view_of(0, 0)) == 0


def test_memory_that_is_announced_keeps_what_it_holds() -> None:
    tensors = [torch.full((size,), 7, dtype=torch.uint8) for size in (1, PAGE, 3 * MIB, 5 * MIB + 1)]
    expect_use([(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors])
    expect_use([])
    assert all(bool((tensor == 7).all()) for tensor in tensors)
