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
    index={"index.json": FileRecord(5, "0" * 32), "index.safetensors": FileRecord(7, "1" * 32)},
    files=4,
    size=112,
)
SHARED = replace(PLAIN, shared={A: 100})


def fields_of(manifest):
    return strict_json.unseal(manifest.to_bytes(), "manifest")


ids = st.integers(1, 2**128 - 1).map("{:032x}".format)


@given(
    shared=st.dictionaries(ids.filter(lambda id: id != B), st.integers(0, 2**40), max_size=20),
    more=st.integers(0, 2**50),
    run=st.none() | ids,
    replaces=st.none() | ids,
    slimmed=st.lists(st.text("abc", min_size=1), max_size=3).map(tuple),
    foreign=st.integers(0, 9),
)
def test_every_member_reads_back_as_it_was_written(shared, more, run, replaces, slimmed, foreign):
    rules = {"keep": {"last": 3}} if foreign else {}
    size = 12 + sum(shared.values()) + more
    members = {"shared": shared, "size": size, "run": run, "replaces": replaces, "slimmed": slimmed, "rules": rules}
    manifest = replace(PLAIN, **members, foreign=foreign)
    assert parse_manifest(manifest.to_bytes(), "manifest") == manifest


def test_a_checkpoint_that_shares_nothing_says_nothing_about_sharing():
    assert not {"shared", "foreign", "run", "rules", "replaces", "slimmed"} & fields_of(PLAIN).keys()
    assert fields_of(SHARED)["shared"] == {A: 100}


def test_bytes_that_are_shared_are_those_of_the_checkpoint_that_wrote_them():
    assert SHARED.copies == {B: 12, A: 100}
    assert PLAIN.copies == {B: 112}
    assert SHARED.info("").copies == SHARED.copies
    assert SHARED.info("").size == 112


def test_what_the_server_copied_takes_room_of_its_own():
    assert replace(SHARED, data=B).copies == {B: 112}


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
