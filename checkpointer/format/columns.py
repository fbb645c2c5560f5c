"""A table in columns, as a stock safetensors file: one-dimensional arrays under fixed names, and a few texts.

Any language reads it with a length, a JSON header and the bytes behind. Here it becomes NumPy arrays, without an object
for each row. Pure: bytes in, arrays out, and back. Reading trusts nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import strict_json

Array: TypeAlias = npt.NDArray[Any]

_NAMES: Mapping[str, str] = {"|u1": "U8", "<u2": "U16", "<u4": "U32", "<i8": "I64"}
_DTYPES: Mapping[str, str] = {name: dtype for dtype, name in _NAMES.items()}

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of safetensors itself."""


class Form(NamedTuple):
    """What a column has to be."""

    dtype: str
    """As safetensors calls it: ``U8``, ``U16``, ``U32`` or ``I64``."""
    width: int = 1
    """Numbers a row: a column of width 16 is an array of shape [rows, 16]."""


def pack(columns: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The file's content. Columns of wide numbers come first, so that each is aligned."""
    header, arrays = _header(columns, metadata)
    return b"".join([header, *(array.tobytes() for array in arrays.values())])


def place_of(column: str, columns: Mapping[str, Array], metadata: Mapping[str, str]) -> int:
    """Where the bytes of ``column`` begin in the file that :func:`pack` makes."""
    header, arrays = _header(columns, metadata)
    names = list(arrays)
    return len(header) + sum(arrays[name].nbytes for name in names[: names.index(column)])


def _header(columns: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Array]]:
    little = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in columns.items()}
    arrays = {name: little[name] for name in sorted(little, key=lambda name: -little[name].itemsize)}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": _NAMES[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
        begin += array.nbytes
    text = strict_json.dumps(entries).encode("ascii")
    length = len(text) + -len(text) % 8
    return struct.pack("<Q", length) + text.ljust(length, b" "), arrays


def unpack(data: bytes, forms: Mapping[str, Form], where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Columns by name, and the texts. Names that ``forms`` lacks are left out; one that the file lacks is empty.

    The arrays are views of ``data``: nothing is copied, whatever the header claims.

    Raises:
        CorruptCheckpointError: no such file, or a column of another form.
    """
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else HEADER_LIMIT + 1
    if length > min(HEADER_LIMIT, len(data) - 8):
        raise CorruptCheckpointError(f"{where} is no table: {len(data)} bytes, and no header of {length} in them")
    header = strict_json.mapping(strict_json.loads(data[8 : 8 + length], where), where)
    texts = strict_json.mapping(header.pop("__metadata__", {}), f"{where}: __metadata__")
    metadata = {name: strict_json.string(text, f"{where}: {name}") for name, text in texts.items()}
    columns: dict[str, Array] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        what = f"{where}: column {name[:100]!r}"
        found = _entry(entry, len(data) - 8 - length, what)
        spans.append(found.span)
        if name in forms:
            columns[name] = _column(data, 8 + length, found, forms[name], what)
    _check_cover(sorted(spans), len(data) - 8 - length, where)
    for name, form in forms.items():
        columns.setdefault(name, _shaped(np.empty(0, _DTYPES[form.dtype]), form))
    return columns, metadata


class _Entry(NamedTuple):
    """What a header says of a column."""

    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]
    """Bytes from the end of the header."""


def _entry(entry: object, room: int, what: str) -> _Entry:
    fields = strict_json.mapping(entry, what)
    dtype = strict_json.string(fields.get("dtype"), what)
    shape = strict_json.integers(fields.get("shape"), what)
    span = strict_json.integers(fields.get("data_offsets"), what)
    if len(span) != 2 or not span[0] <= span[1] <= room or len(shape) > 2:
        raise CorruptCheckpointError(f"{what} has no bytes in this file, or more than two dimensions")
    return _Entry(dtype, shape, (span[0], span[1]))


def _column(data: bytes, start: int, entry: _Entry, form: Form, what: str) -> Array:
    dtype, shape, (begin, end) = entry
    width = (form.width,) if form.width > 1 else ()
    if dtype != form.dtype or shape[1:] != width or len(shape) != 1 + len(width):
        raise CorruptCheckpointError(
            f"{what} is {dtype} of shape {list(shape)}, not {form.dtype} in rows of {form.width}"
        )
    count = prod(shape)
    if count * np.dtype(_DTYPES[dtype]).itemsize != end - begin:
        raise CorruptCheckpointError(f"{what} has {end - begin} bytes for shape {list(shape)}")
    array = np.frombuffer(data, _DTYPES[dtype], count, start + begin) if count else np.empty(0, _DTYPES[dtype])
    return _shaped(array, form)


def _shaped(array: Array, form: Form) -> Array:
    return array.reshape(-1, form.width) if form.width > 1 else array


def _check_cover(spans: list[tuple[int, int]], size: int, where: str) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise CorruptCheckpointError(f"{where}: byte {min(begin, position)} belongs to no column, or to two")
        position = end
    if position != size:
        raise CorruptCheckpointError(f"{where}: {size - position} bytes belong to no column")
