"""The log of a disk is read as the kernel writes it, and what is replayed is what a disk may hold."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.campaign.crash.power.log_writes import DISCARD, FLUSH, FUA, MAGIC, MARK, losses, parse, replay

SECTOR = 512


def entry(flags: int, sector: int = 0, data: bytes = b"", mark: bytes = b"", discarded: int = 0) -> bytes:
    sectors = discarded or len(data) // SECTOR
    return (struct.pack("<QQQQ", sector, sectors, flags, len(mark)) + mark).ljust(SECTOR, b"\0") + data


def made(path: Path, *entries: bytes) -> Path:
    path.write_bytes(struct.pack("<QQQI", MAGIC, 1, len(entries), SECTOR).ljust(SECTOR, b"\0") + b"".join(entries))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two writes over one another, a flush, a mark, a write that is sure, another, and a discard."""
    return made(
        tmp_path / "log",
        entry(0, 0, b"a" * 4 * SECTOR),
        entry(0, 1, b"b" * SECTOR),
        entry(FLUSH),
        entry(MARK, mark=b"17"),
        entry(FUA, 2, b"c" * SECTOR),
        entry(0, 3, b"d" * SECTOR),
        entry(DISCARD, 0, discarded=1),
    )


def test_a_log_replayed_to_its_end_gives_what_was_written_last(log, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * SECTOR))
    writes = parse(log)
    replay(log, writes, image)
    assert image.read_bytes() == bytes(SECTOR) + b"b" * SECTOR + b"c" * SECTOR + b"d" * SECTOR
    assert [write.mark for write in writes if write.flags & MARK] == ["17"]


def test_a_disk_loses_nothing_before_a_flush_and_no_write_that_is_sure_at_once(log):
    writes = parse(log)
    found = [losses(writes, random.Random(seed), 0) for seed in range(20)]
    states = [state for each in found for state in each]
    assert {sure for end, sure, _ in states if end >= 3} == {3}
    assert all(writes[4] in since for end, _, since in states if end >= 5)
    lost = [tuple(since) for end, _, since in states if end == len(writes)]
    assert len(set(lost)) == 4  # each of the last two writes is lost, or not


def test_another_file_is_no_log(tmp_path):
    (tmp_path / "other").write_bytes(bytes(SECTOR))
    with pytest.raises(ValueError, match=r"other is no log of dm-log-writes"):
        parse(tmp_path / "other")
