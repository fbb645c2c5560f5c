"""Manifest and index from anywhere: a value or a typed error, no bit unnoticed, no memory out of proportion.

Random changes to both are tried by ``tests/campaign/fuzz``, whole checkpoints by ``tests/integration/hostile``.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import strict_json
from checkpointer.format.index import Chunk, Component, FileRecord, Index, TensorSpec
from checkpointer.format.manifest import parse_manifest
from checkpointer.format.table import index_files, parse_index
from tests.support.forge import seal_text

MANIFEST = (Path(__file__).parents[2] / "data/format-v1/local/checkpoint-2/manifest.json").read_bytes()


def test_every_bit_of_a_manifest_matters():
    parse_manifest(MANIFEST, "whole")
    for position in range(len(MANIFEST)):
        for bit in range(8):
            changed = bytearray(MANIFEST)
            changed[position] ^= 1 << bit
            with pytest.raises(CorruptCheckpointError):
                parse_manifest(bytes(changed), "changed")


@given(st.integers(0, len(MANIFEST) - 1), st.integers(1, 255))
def test_a_byte_of_a_manifest_that_becomes_another_is_noticed(position: int, change: int) -> None:
    data = bytearray(MANIFEST)
    data[position] ^= change
    with pytest.raises(CorruptCheckpointError):
        parse_manifest(bytes(data), "manifest")


@pytest.mark.parametrize(
    "head",
    [
        "",
        "{",
        "[",
        "[1",
        '"text"',
        "null",
        "{" + '"a": {' * 50_000,
        '{"a": ' + "[" * 50_000,
        '{"a": 1, "a": 2',
        '{"a": NaN',
        '{"a": Infinity',
        '{"a": 1e999',
        '{"a": ' + "9" * 10_000,
        '{"a": "\\ud800"',
        b'{"a": "\xff"',
        b"\xef\xbb\xbf{",
        '{"checksum": "0"',
    ],
    ids=lambda head: repr(head[:14]),
)
def test_a_sealed_file_with_any_content_is_read_or_refused_with_a_typed_error(head):
    data = seal_text(head)
    for parse in (parse_manifest, strict_json.unseal):
        with contextlib.suppress(CorruptCheckpointError):
            parse(data, "the file")
    with pytest.raises(CorruptCheckpointError):
        parse_manifest(data, "the file")


@pytest.mark.parametrize("dimensions", [3, 5, 8, 20])
def test_checking_how_a_tensor_is_cut_takes_memory_in_proportion_to_the_index(dimensions):
    count = 4000
    primes = [7, 5, 3, 11, 13, 2, 9]
    chunks = tuple(
        Chunk(
            (number, *(number % primes[d % 7] for d in range(dimensions - 1))),
            (1,) * dimensions,
            "m.safetensors",
            72 + number,
            73 + number,
            "0" * 32,
        )
        for number in range(count)
    )
    spec = TensorSpec("uint8", (count, *[14] * (dimensions - 1)))
    files = {"m.safetensors": FileRecord(72 + count, "0" * 32, header=(72, "0" * 32))}
    index = Index({"m": Component("module", {}, {"a": spec})}, {("m", "a"): chunks}, files)
    written = index_files(index)
    size = sum(map(len, written.values()))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            parse_index(written["index.json"], written["index.safetensors"], "the index")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * size
