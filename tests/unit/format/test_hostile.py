"""Manifest and index from anywhere: a value or a typed error, no bit unnoticed, no memory out of proportion.

Random changes to both are tried by ``tests/campaign/fuzz``, whole checkpoints by ``tests/integration/hostile``.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import strict_json
from checkpointer.format.index import parse_index
from checkpointer.format.manifest import parse_manifest
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
    chunks = [
        {
            "offsets": [number, *(number % primes[d % 7] for d in range(dimensions - 1))],
            "lengths": [1] * dimensions,
            "file": "m.safetensors",
            "range": [72 + number, 73 + number],
            "xxh3": "0" * 32,
        }
        for number in range(count)
    ]
    shape = [count, *[14] * (dimensions - 1)]
    tensor = {"dtype": "uint8", "shape": shape, "chunks": chunks}
    component = {"kind": "module", "tree": {}, "meta": {}, "tensors": {"a": tensor}}
    index = {
        "format": "checkpointer-index",
        "version": 1,
        "files": {"m.safetensors": [72, "0" * 32]},
        "components": {"m": component},
    }
    data = json.dumps(index).encode()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            parse_index(data, {"m.safetensors": 72 + count}, "index.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * len(data)
