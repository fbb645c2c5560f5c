"""Tables that no writer makes: read with every promise kept, or refused with a typed error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format.columns import pack
from checkpointer.format.index import Chunk, Component, FileRecord, Index, RankPart, TensorSpec
from checkpointer.format.table import THIS_FILE, index_files, pack_part, parse_index, parse_part
from tests.support.forge import read_table

Change = Callable[[dict[str, Any], dict[str, str]], object]
EMPTY = TensorSpec("float32", (0, 3))
BYTES = TensorSpec("uint8", (4,))


def an_index(spec: TensorSpec) -> Index:
    """One tensor in one file."""
    chunk = Chunk((0,) * len(spec.shape), spec.shape, "m.safetensors", 72, 72 + spec.nbytes, "0" * 32)
    files = {"m.safetensors": FileRecord(72 + spec.nbytes, "0" * 32, header=(72, "0" * 32))}
    return Index({"m": Component("module", {}, {"a": spec})}, {("m", "a"): (chunk,)}, files)


def a_part(spec: TensorSpec) -> bytes:
    """The part of a rank with one tensor of its own, inside."""
    chunk = Chunk((0,) * len(spec.shape), spec.shape, "", 0, spec.nbytes, "0" * 32)
    part = RankPart({"m": Component("stateful", {}, {"a": spec})}, {("m", "a"): (chunk,)})
    return pack_part(part, b"x" * spec.nbytes)


def forged(data: bytes, change: Change) -> bytes:
    columns, texts = read_table(data)
    columns = {name: column.copy() for name, column in columns.items()}
    change(columns, texts)
    return pack(columns, texts)


def read(index: Index, change: Change) -> Index:
    files = index_files(index)
    return parse_index(files["index.json"], forged(files["index.safetensors"], change), "the index")


def setting(column: str, number: int) -> Change:
    return lambda columns, _: columns.update({column: np.full_like(columns[column], number)})


@pytest.mark.parametrize("file", [1, 2, THIS_FILE - 1, THIS_FILE])
@pytest.mark.parametrize("spec", [EMPTY, BYTES], ids=["no bytes", "bytes"])
def test_a_chunk_in_a_file_that_is_not_listed_is_refused_also_where_it_has_no_bytes(spec, file):
    def change(columns: dict[str, Any], texts: dict[str, str]) -> None:
        setting("chunk_file", file)(columns, texts)
        setting("chunk_begin", 0)(columns, texts)

    with pytest.raises(CorruptCheckpointError, match="does not list"):
        read(an_index(spec), change)


@pytest.mark.parametrize("file", [0, 1, THIS_FILE - 1])
@pytest.mark.parametrize("spec", [EMPTY, BYTES], ids=["no bytes", "bytes"])
def test_a_chunk_of_a_part_in_a_file_that_is_not_listed_is_refused(spec, file):
    data = forged(a_part(spec), setting("own_chunk_file", file))
    with pytest.raises(CorruptCheckpointError, match="does not list"):
        parse_part(data, 1, an_index(BYTES), "the part")


def test_a_part_whose_own_tensors_have_no_bytes_is_read():
    part = parse_part(a_part(EMPTY), 1, an_index(BYTES), "the part")
    (chunk,) = part.chunks["m", "a"]
    assert (chunk.lengths, chunk.begin, chunk.file) == ((0, 3), chunk.end, "index-00001.safetensors")


@pytest.mark.parametrize("begin", [-1, 2**62])
def test_a_chunk_without_bytes_lies_inside_its_part(begin):
    data = forged(a_part(EMPTY), setting("own_chunk_begin", begin))
    with pytest.raises(CorruptCheckpointError):
        parse_part(data, 1, an_index(BYTES), "the part")


@pytest.mark.parametrize("version", ["", "0", "-1", "1.0", "one", "\u0661", "[[1]]", "9" * 5000, "NaN", "\ud800"])
def test_a_version_that_is_no_number_is_damage(version):
    with pytest.raises(CorruptCheckpointError):
        read(an_index(BYTES), lambda _, texts: texts.update(version=version))


def test_a_table_of_a_newer_version_is_not_damaged():
    with pytest.raises(FormatVersionError, match="version 2"):
        read(an_index(BYTES), lambda _, texts: texts.update(version="2"))


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "index.safetensors", "index-00001.safetensors", "Index.json"])
def test_no_list_of_files_names_what_is_listed_elsewhere(name):
    """A removal would take it for data, which goes first; and which size and hash of it count would be open."""
    stored = an_index(BYTES)
    with pytest.raises(CorruptCheckpointError, match=name):
        read(stored, lambda _, texts: texts.update(files=texts["files"].replace("m.safetensors", name)))
    plain = replace(stored, files={**stored.files, name: FileRecord(1, "0" * 32)})
    with pytest.raises(CorruptCheckpointError, match=name):
        read(plain, lambda *_: None)
