"""Which files of a new checkpoint may share the bytes of the one before, and the reason where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.format.index import Chunk, FileRecord, TensorSpec
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.tensor_files import ComponentTensors, TensorFile, plan_files
from checkpointer.policy.reuse import ReuseSource, candidate

SPEC = TensorSpec("float32", (4,))
(FILE,) = plan_files({"model": ComponentTensors("module", {"a": SPEC, "b": SPEC}, frozenset({"a", "b"}))})
INFO = CheckpointInfo(step=7, id="a" * 32, sequence=3)


def header_of(file: TensorFile) -> tuple[int, str]:
    return len(file.header), xxhash.xxh3_128_hexdigest(file.header)


def source(file: TensorFile = FILE, *, origin=None, turn=1, info=INFO, **changes) -> ReuseSource:
    start = len(file.header)
    chunks = {
        (slot.component, slot.key): (
            Chunk((0,), (4,), file.path, start + slot.begin, start + slot.end, f"{number:032x}"),
        )
        for number, slot in enumerate(file.slots)
    }
    made = ReuseSource(
        info=info,
        data=None,
        files={file.path: FileRecord(file.size, "f" * 32, origin, turn, header_of(file))},
        chunks=chunks,
    )
    return replace(made, **changes)


HASHES = tuple(f"{number:032x}" for number in range(2))


def test_a_frozen_file_with_the_same_tensors_is_a_candidate():
    found = candidate(FILE, source(), 8)
    assert found.record == FileRecord(FILE.size, "f" * 32, origin="a" * 32, turn=2, header=header_of(FILE))
    assert found.hashes == HASHES
    assert found.reason == "the same as in checkpoint-7 (sequence 3)"


def test_a_candidate_is_shared_only_if_every_hash_is_the_same():
    found = candidate(FILE, source(), 8)
    assert found.confirmed(HASHES) == found
    changed = found.confirmed((HASHES[0], "9" * 32))
    assert (changed.record, changed.reason) == (None, "1 of 2 tensors have changed")
    assert found.confirmed(HASHES[::-1]).record is None


def test_sharing_goes_on_from_the_checkpoint_that_wrote_the_bytes():
    found = candidate(FILE, source(origin="b" * 32, turn=4), 8)
    assert found.record == FileRecord(FILE.size, "f" * 32, origin="b" * 32, turn=5, header=header_of(FILE))


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_one_copy_serves_at_most_so_many_checkpoints_in_a_row(limit):
    turns = [1]
    origin = None
    while (record := candidate(FILE, source(origin=origin, turn=turns[-1]), limit).record) is not None:
        origin = record.origin
        turns.append(record.turn)
    assert turns == list(range(1, limit + 1))
    assert f"{limit} checkpoints in a row" in candidate(FILE, source(turn=limit), limit).reason


@pytest.mark.parametrize(
    "reason, file, earlier, limit",
    [
        ("switched off", FILE, source(), False),
        ("tensors that are trained", replace(FILE, frozen=False), source(), 8),
        ("no checkpoint before it", FILE, None, 8),
        ("is damaged: hash differs", FILE, source(info=replace(INFO, damaged="hash differs")), 8),
        ("no such file", replace(FILE, path="model-00002-of-00003.safetensors"), source(), 8),
        ("no such file", FILE, source(files={}), 8),
        ("other tensors", replace(FILE, names=("a", "c")), source(), 8),
        ("other tensors", replace(FILE, metadata={"format": "tf"}), source(), 8),
        ("other tensors", FILE, source(files={FILE.path: FileRecord(FILE.size + 1, "f" * 32)}), 8),
        ("other tensors", FILE, source(chunks={}), 8),
        ("other tensors", FILE, source(files={FILE.path: FileRecord(FILE.size, "f" * 32, header=(8, "0" * 32))}), 8),
    ],
)
def test_what_cannot_be_shared_is_written_and_the_reason_is_told(reason, file, earlier, limit):
    found = candidate(file, earlier, limit)
    assert found.record is None
    assert reason in found.reason
    assert found.confirmed(HASHES) == found


def test_a_tensor_that_several_processes_wrote_in_parts_is_not_compared():
    parts = source().chunks["model", "a"] * 2
    assert candidate(FILE, source(chunks={**source().chunks, ("model", "a"): parts}), 8).record is None


@given(st.lists(st.sampled_from(["0" * 32, "1" * 32]), min_size=2, max_size=2), st.integers(1, 9), st.integers(1, 9))
def test_shared_means_equal_hashes_and_a_turn_within_the_limit(hashes, turn, limit):
    found = candidate(FILE, source(turn=turn, origin="b" * 32 if turn > 1 else None), limit).confirmed(hashes)
    assert (found.record is not None) == (tuple(hashes) == HASHES and turn < limit)
    assert found.record is None or found.record.turn <= limit
