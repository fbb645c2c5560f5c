"""The manifest: what survives being written and read, and which checkpoints share a file."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import strict_json
from checkpointer.format.index import FileRecord
from checkpointer.format.manifest import Manifest, parse_manifest

A, B = "a" * 32, "b" * 32
PLAIN = Manifest(
    id=B,
    parent=A,
    sequence=2,
    step=20,
    epoch=None,
    created=datetime(2026, 3, 1, tzinfo=timezone.utc),
    files={"index.json": FileRecord(5, "0" * 32), "model.safetensors": FileRecord(100, "1" * 32)},
)
SHARED = replace(PLAIN, files={**PLAIN.files, "model.safetensors": FileRecord(100, "1" * 32, origin=A, turn=3)})


def fields_of(manifest):
    return strict_json.unseal(manifest.to_bytes(), "manifest")


records = st.builds(FileRecord, st.integers(0, 2**63 - 1), st.just("0" * 32)) | st.builds(
    FileRecord, st.integers(0, 2**63 - 1), st.just("0" * 32), st.just(A), st.integers(2, 2**31)
)


@given(st.dictionaries(st.sampled_from(["index.json", "a/b", "model-00001-of-00002.safetensors"]), records))
def test_whatever_files_are_shared_the_manifest_reads_back_as_it_was_written(files):
    manifest = replace(PLAIN, files=files)
    assert parse_manifest(manifest.to_bytes(), "manifest") == manifest


def test_a_checkpoint_that_shares_nothing_says_nothing_about_sharing():
    assert "shared" not in fields_of(PLAIN)
    assert fields_of(SHARED)["shared"] == {"model.safetensors": [A, 3]}
    assert fields_of(SHARED)["files"] == fields_of(PLAIN)["files"]


def test_a_file_that_is_shared_lies_on_the_copy_of_the_checkpoint_that_wrote_it():
    writer = replace(PLAIN, id=A)
    assert SHARED.copies == {f"{B}/index.json": 5, f"{A}/model.safetensors": 100}
    assert writer.copies == {f"{A}/index.json": 5, f"{A}/model.safetensors": 100}
    assert SHARED.info("").copies == SHARED.copies
    assert SHARED.info("").size == 105


def test_what_the_server_copied_takes_room_of_its_own():
    assert replace(SHARED, data=B).copies == {f"{B}/index.json": 5, f"{B}/model.safetensors": 100}


def created_as(text):
    fields = {**fields_of(PLAIN), "created": text}
    del fields["checksum"]
    return strict_json.seal(fields)


@pytest.mark.parametrize("written", ["03:05.500000+00:00", "03:05.5Z", "03:05.500000000Z", "03:05.50+00:00"])
def test_the_time_of_a_checkpoint_is_read_alike_on_every_python(written):
    """Before 3.11, ``fromisoformat`` knows neither ``Z`` nor any number of digits but three and six."""
    found = parse_manifest(created_as(f"2026-01-02T04:{written}"), "manifest")
    assert found.created == datetime(2026, 1, 2, 4, 3, 5, 500000, tzinfo=timezone.utc)


@pytest.mark.parametrize("written", ["2026-01-02T04:03:05", "20260102T040305Z", "2026-W01-5T04:03:05Z", "now"])
def test_a_time_in_another_form_is_damage_on_every_python(written):
    with pytest.raises(CorruptCheckpointError, match="is not a date and a time with an offset"):
        parse_manifest(created_as(written), "manifest")
