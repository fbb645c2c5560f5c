"""The tensor table of a checkpoint in columns: what its tensors are, and where their bytes lie. See FORMAT.md.

Pure. Everything that can be checked is checked with array operations, in time and memory that grow with the bytes of
the table alone; a tensor becomes an object only where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths, strict_json
from checkpointer.format.columns import Array, Form, pack, place_of, unpack
from checkpointer.format.index import (
    FORMAT,
    ITEM_SIZES,
    MAX_CUT_DIMENSIONS,
    MAX_DIMENSIONS,
    PARAMETER_MEMBERS,
    TABLE_FORMAT,
    VERSION,
    Chunk,
    Chunks,
    Component,
    FileRecord,
    Index,
    Json,
    Placement,
    RankPart,
    Rows,
    Tensors,
    TensorSpec,
    check_version,
    components_to_json,
    file_to_json,
    has_parameters,
    parse_files,
)
from checkpointer.format.layouts import BoxColumns, Layout, check_columns, parse_layout, written_by
from checkpointer.format.layouts import TensorColumns as PlacedTensors
from checkpointer.system.gc import collector_paused

TENSOR_FORMS: Mapping[str, Form] = {
    "key_lengths": Form("U32"),
    "keys": Form("U8"),
    "dtype": Form("U8"),
    "ndim": Form("U8"),
    "shape": Form("I64"),
    "device": Form("U16"),
    "strided": Form("U32"),
    "strides": Form("I64"),
}
CHUNK_FORMS: Mapping[str, Form] = {
    "chunk_tensor": Form("U32"),
    "chunk_file": Form("U32"),
    "chunk_begin": Form("I64"),
    "chunk_hash": Form("U8", 16),
    "boxed": Form("U32"),
    "box_offsets": Form("I64"),
    "box_lengths": Form("I64"),
}

THIS_FILE = 2**32 - 1
"""The ``chunk_file`` of chunks whose bytes lie in the table's own file, in its column ``data``."""

_FAR = 2.0**63 * (1 - 1e-9)
"""What int64 can count, less what float64 may lose on the way."""


class Ragged(NamedTuple):
    """Rows of different lengths, one behind the other."""

    values: Array
    """int64."""
    starts: Array
    """int64, one more than there are rows: where each begins in ``values``."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """From rows of Python numbers."""
        rows = list(rows)
        starts = np.fromiter(accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(starts[-1])), starts)

    @classmethod
    def counted(cls, values: Array, counts: Array, what: str) -> Ragged:
        """From the lengths of the rows, which have to add up."""
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        if starts[-1] != len(values):
            raise CorruptCheckpointError(
                f"{what}: rows of {int(starts[-1])} numbers in all, and {len(values)} are there"
            )
        return cls(values, starts)

    def row(self, row: int) -> tuple[int, ...]:
        """The numbers of one row."""
        return tuple(self.values[self.starts[row] : self.starts[row + 1]].tolist())

    @property
    def counts(self) -> Array:
        """The length of each row."""
        return np.diff(self.starts)

    def by_length(self, rows: Array | None = None) -> Iterator[tuple[int, Array, Array]]:
        """For each length that occurs (among ``rows``): that length, the rows that have it, their numbers."""
        counts = self.counts if rows is None else self.counts[rows]
        for length in np.flatnonzero(np.bincount(counts)).tolist():  # the first np.unique imports numpy.ma: 40 ms
            of_length = np.flatnonzero(counts == length) if rows is None else rows[counts == length]
            yield length, of_length, self.matrix(of_length, length)

    def matrix(self, rows: Array, length: int) -> Array:
        """``rows``, all of one length, as an array [rows, length]."""
        return self.values[self.starts[rows][:, None] + np.arange(length)]


@dataclass(frozen=True)
class TensorColumns:
    """What the tensors of one or more components are."""

    keys: tuple[str, ...]
    dtypes: tuple[str, ...]
    """The different dtypes; ``devices`` likewise."""
    devices: tuple[str, ...]
    dtype: Array
    """For each tensor a number into ``dtypes``."""
    shape: Ragged
    device: Array
    strided: Array
    """The tensors with strides of their own, ascending; ``strides`` has a row for each."""
    strides: Ragged

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, TensorSpec]]) -> TensorColumns:
        """From objects."""
        pairs = list(tensors)
        specs = [spec for _, spec in pairs]
        dtypes, dtype = _numbered([spec.dtype for spec in specs], np.uint8)
        devices, device = _numbered([spec.device for spec in specs], np.uint16)
        strided = [number for number, spec in enumerate(specs) if spec.strides is not None]
        return cls(
            tuple(key for key, _ in pairs),
            dtypes,
            devices,
            dtype,
            Ragged.of(spec.shape for spec in specs),
            device,
            np.array(strided, np.uint32),
            Ragged.of(specs[number].strides or () for number in strided),
        )

    def columns(self, prefix: str = "") -> dict[str, Array]:
        """As they lie in the file."""
        texts = [key.encode("utf-8", "surrogatepass") for key in self.keys]
        found: dict[str, Array] = {
            "key_lengths": np.fromiter(map(len, texts), np.uint32, len(texts)),
            "keys": np.frombuffer(b"".join(texts), np.uint8),
            "dtype": self.dtype,
            "ndim": self.shape.counts.astype(np.uint8),
            "shape": self.shape.values,
            "device": self.device,
        }
        if len(self.strided):
            found |= {"strided": self.strided, "strides": self.strides.values}
        return {prefix + name: array for name, array in found.items()}

    @classmethod
    def parse(
        cls, columns: Mapping[str, Array], dtypes: tuple[str, ...], devices: tuple[str, ...], prefix: str = ""
    ) -> TensorColumns:
        """Check everything but whether keys are unique, which only holds in a component.

        Raises:
            CorruptCheckpointError: these are not the columns of tensors that could be.
        """
        keys = _texts(columns[f"{prefix}key_lengths"], columns[f"{prefix}keys"], f"{prefix}keys")
        dtype, ndim, device = (columns[f"{prefix}{name}"] for name in ("dtype", "ndim", "device"))
        if not len(keys) == len(dtype) == len(ndim) == len(device):
            raise CorruptCheckpointError(
                f"{len(keys)} keys, {len(dtype)} dtypes, {len(ndim)} shapes, {len(device)} devices"
            )
        _below(dtype, len(dtypes), "dtype")
        _below(device, len(devices), "device")
        _below(ndim, MAX_DIMENSIONS + 1, "ndim")
        shape = Ragged.counted(columns[f"{prefix}shape"], ndim, f"{prefix}shape")
        strided = columns.get(f"{prefix}strided", np.empty(0, np.uint32))
        _below(strided, len(keys), "strided")
        if len(strided) > 1 and (np.diff(strided.astype(np.int64)) <= 0).any():
            raise CorruptCheckpointError("strided does not ascend")
        strides = Ragged.counted(
            columns.get(f"{prefix}strides", np.empty(0, np.int64)), ndim[strided.astype(np.int64)], f"{prefix}strides"
        )
        found = cls(keys, dtypes, devices, dtype, shape, device, strided, strides)
        found._check_shapes()
        found._check_strides()
        return found

    @cached_property
    def itemsize(self) -> Array:
        """Bytes of an element of each tensor."""
        return np.array([ITEM_SIZES[name] for name in self.dtypes] or [1], np.int64)[self.dtype.astype(np.int64)]

    @cached_property
    def numel(self) -> Array:
        """Elements of each tensor."""
        return products(self.shape)

    @cached_property
    def strided_row(self) -> Mapping[int, int]:
        """For each tensor with strides of its own, its row in ``strides``."""
        return {number: row for row, number in enumerate(self.strided.tolist())}

    def spec(self, number: int) -> TensorSpec:
        """One tensor, as an object."""
        return self._specs[number]

    @cached_property
    def _specs(self) -> list[TensorSpec]:
        """All tensors as objects, of which equal ones are one: a model has few different ones."""
        made: dict[tuple[int, int, tuple[int, ...], tuple[int, ...] | None], TensorSpec] = {}
        numbers, starts = self.shape.values.tolist(), self.shape.starts.tolist()
        found: list[TensorSpec] = []
        rows = zip(self.dtype.tolist(), self.device.tolist(), pairwise(starts), strict=True)
        for number, (dtype, device, (begin, end)) in enumerate(rows):
            row = self.strided_row.get(number)
            what = (dtype, device, tuple(numbers[begin:end]), None if row is None else self.strides.row(row))
            spec = made.get(what)
            if spec is None:
                spec = made[what] = TensorSpec(self.dtypes[dtype], what[2], what[3], self.devices[device])
            found.append(spec)
        return found

    def _check_shapes(self) -> None:
        if (self.shape.values < 0).any():
            raise CorruptCheckpointError("a shape has a negative size")
        for length, rows, sizes in self.shape.by_length():
            del length
            # Tensors without elements too: torch refuses what int64 cannot count. In float64, which cannot overflow.
            counted = np.prod(np.where(sizes == 0, 1, sizes).astype(np.float64), axis=1)
            counted *= np.where((sizes == 0).any(axis=1), 1, self.itemsize[rows])
            impossible = np.flatnonzero(counted >= _FAR)
            if len(impossible):
                number = int(rows[impossible[0]])
                raise CorruptCheckpointError(
                    f"{self.keys[number]!r} has impossible shape {list(self.shape.row(number))[:8]}"
                )

    def _check_strides(self) -> None:
        """Strides visit each element of a dense block exactly once, in some order of the dimensions."""
        if (self.strides.values < 0).any():
            raise CorruptCheckpointError("a tensor has a negative stride")
        tensors = self.strided.astype(np.int64)
        for length, rows, strides in self.strides.by_length():
            sizes = self.shape.matrix(tensors[rows], length)
            dense = are_dense(sizes, strides)
            if not dense.all():
                number = int(tensors[rows[np.flatnonzero(~dense)[0]]])
                raise CorruptCheckpointError(f"{self.keys[number]!r} has strides that leave gaps or overlap")


@dataclass(frozen=True)
class ChunkColumns:
    """Where the bytes of tensors lie."""

    tensor: Array
    """For each chunk the number of its tensor (int64), ascending."""
    file: Array
    """The number of its file (int64), or ``THIS_FILE``."""
    begin: Array
    """Where its bytes begin in that file (int64)."""
    end: Array
    hash: Array
    """uint8 [chunks, 16]: xxh3-128, big-endian."""
    boxed: Array
    """Chunks that are not their whole tensor (int64), ascending; ``offsets`` and ``lengths`` have a row for each."""
    offsets: Ragged
    lengths: Ragged

    @classmethod
    def of(
        cls, chunks: Iterable[tuple[int, Sequence[Chunk]]], tensors: TensorColumns, files: Mapping[str, int]
    ) -> ChunkColumns:
        """From objects: for each tensor its number and chunks. Not checked."""
        rows = [(number, chunk) for number, parts in chunks for chunk in parts]
        shapes = [tensors.shape.row(number) for number, _ in rows]
        boxed = [row for row, (_, chunk) in enumerate(rows) if chunk.lengths != shapes[row] or any(chunk.offsets)]
        hashes = bytes.fromhex("".join(chunk.xxh3 for _, chunk in rows))
        return cls(
            tensor=np.array([number for number, _ in rows], np.int64),
            file=np.array([files[chunk.file] for _, chunk in rows], np.int64),
            begin=np.array([chunk.begin for _, chunk in rows], np.int64),
            end=np.array([chunk.end for _, chunk in rows], np.int64),
            hash=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
            boxed=np.array(boxed, np.int64),
            offsets=Ragged.of(rows[row][1].offsets for row in boxed),
            lengths=Ragged.of(rows[row][1].lengths for row in boxed),
        )

    def columns(self) -> dict[str, Array]:
        """As they lie in the file."""
        found: dict[str, Array] = {
            "chunk_tensor": self.tensor.astype(np.uint32),
            "chunk_file": self.file.astype(np.uint32),
            "chunk_begin": self.begin,
            "chunk_hash": self.hash,
        }
        if len(self.boxed):
            found["boxed"] = self.boxed.astype(np.uint32)
            found["box_offsets"] = self.offsets.values
            found["box_lengths"] = self.lengths.values
        return found

    @classmethod
    def parse(cls, columns: Mapping[str, Array], tensors: TensorColumns) -> ChunkColumns:
        """Check that each chunk is a box of its tensor; not yet its file, nor whether all cover all.

        Raises:
            CorruptCheckpointError: they are not.
        """
        tensor, file = (columns[name].astype(np.int64) for name in ("chunk_tensor", "chunk_file"))
        begin, digest, boxed = columns["chunk_begin"], columns["chunk_hash"], columns["boxed"].astype(np.int64)
        if not len(tensor) == len(file) == len(begin) == len(digest):
            raise CorruptCheckpointError(
                f"{len(tensor)} chunks, {len(file)} files, {len(begin)} places, {len(digest)} hashes"
            )
        _below(tensor, len(tensors), "chunk_tensor")
        _below(boxed, len(tensor), "boxed")
        if (np.diff(tensor) < 0).any() or (np.diff(boxed) <= 0).any():
            raise CorruptCheckpointError("chunk_tensor or boxed does not ascend")
        counts = tensors.shape.counts[tensor[boxed]]
        offsets = Ragged.counted(columns["box_offsets"], counts, "box_offsets")
        lengths = Ragged.counted(columns["box_lengths"], counts, "box_lengths")
        sizes = _rows(tensors.shape, tensor[boxed])
        outside = (offsets.values < 0) | (lengths.values < 0) | (offsets.values > sizes)
        outside |= lengths.values > sizes - np.where(outside, 0, offsets.values)
        if outside.any():
            row = int(np.searchsorted(offsets.starts, np.flatnonzero(outside)[0], side="right")) - 1
            raise CorruptCheckpointError(f"{tensors.keys[tensor[boxed[row]]]!r} has a chunk outside its shape")
        elements = tensors.numel[tensor]
        elements[boxed] = products(lengths)
        size = elements * tensors.itemsize[tensor]
        if (begin < 0).any() or (begin > 2**63 - 1 - size).any():
            raise CorruptCheckpointError("a chunk lies beyond the end of every file")
        return cls(tensor, file, begin, begin + size, digest, boxed, offsets, lengths)

    def starts(self, tensors: int) -> list[int]:
        """For each of so many tensors its first chunk, and one more number: how many there are."""
        found: list[int] = np.searchsorted(self.tensor, np.arange(tensors + 1)).tolist()
        return found

    @cached_property
    def boxed_row(self) -> Mapping[int, int]:
        """For each chunk that is not its whole tensor, its row in ``offsets`` and ``lengths``."""
        return {chunk: row for row, chunk in enumerate(self.boxed.tolist())}

    def chunk(self, number: int, shape: tuple[int, ...], files: Sequence[str], this_file: str) -> Chunk:
        """One chunk, as an object."""
        row = self.boxed_row.get(number)
        offsets = (0,) * len(shape) if row is None else self.offsets.row(row)
        lengths = shape if row is None else self.lengths.row(row)
        file, begin, end, xxh3 = self._numbers[number]
        return Chunk(offsets, lengths, this_file if file == THIS_FILE else files[file], begin, end, xxh3)

    @cached_property
    def _numbers(self) -> list[tuple[int, int, int, str]]:
        """File, begin, end and hash of each chunk as Python has them: one by one, NumPy takes ten times as long."""
        digits = self.hash.tobytes().hex()
        hashes = [digits[at : at + 32] for at in range(0, len(digits), 32)]
        return list(zip(self.file.tolist(), self.begin.tolist(), self.end.tolist(), hashes, strict=True))

    def check_files(
        self, files: Sequence[FileRecord], paths: Sequence[str], data: tuple[int, int] | None = None
    ) -> None:
        """Header and chunks fill every tensor file, and chunks the column ``data``, without a gap and an overlap.

        ``data``: where that column begins and ends in the table's own file; ``None``: it has no such column.

        Raises:
            CorruptCheckpointError: a byte is claimed twice, or by nobody.
        """
        first_byte, end_byte = data or (0, 0)
        begins = np.array([file.header[0] if file.header else 0 for file in files] + [first_byte], np.int64)
        ends = np.array([file.size if file.header else 0 for file in files] + [end_byte], np.int64)
        inside = (self.file == THIS_FILE) & (data is not None)
        if ((self.file >= len(files)) & ~inside).any():  # one without bytes would pass what follows
            raise CorruptCheckpointError("a chunk lies in a file that the table does not list")
        place = np.where(inside, len(files), self.file)
        names = [*paths, "the table itself"]
        order = np.lexsort((self.end, self.begin, place))
        place, begin, end = place[order], self.begin[order], self.end[order]
        first = np.ones(len(place), bool)
        first[1:] = place[1:] != place[:-1]
        expected = np.empty_like(begin)
        expected[1:] = end[:-1]
        expected[first] = begins[place[first]]
        wrong = np.flatnonzero(begin != expected)
        if len(wrong):
            at = int(wrong[0])
            byte = min(int(begin[at]), int(expected[at]))
            raise CorruptCheckpointError(f"bytes {byte} of {names[place[at]]!r} are claimed twice or by nobody")
        last = np.ones(len(place), bool)
        last[:-1] = first[1:]
        reached = begins.copy()
        reached[place[last]] = end[last]
        short = np.flatnonzero(reached != ends)
        if len(short):
            at = int(short[0])
            raise CorruptCheckpointError(
                f"{names[at]!r} has {int(ends[at])} bytes, the index accounts for {int(reached[at])}"
            )

    def check_tiling(self, tensors: TensorColumns) -> None:
        """The chunks of each tensor cover it exactly once.

        A sum of boxes equals the whole box exactly if their corners, each counted with the sign (-1) ** (number of
        upper ends), add up to the corners of the whole box. That takes linear time, where comparing pairs takes
        quadratic.

        Raises:
            CorruptCheckpointError: they do not, or cut it along too many dimensions.
        """
        counts = np.bincount(self.tensor, minlength=len(tensors))
        many = counts != 1
        many[self.tensor[self.boxed]] = True
        if (counts[many] == 0).any():
            number = int(np.flatnonzero(counts == 0)[0])
            raise CorruptCheckpointError(f"the chunks of {tensors.keys[number]!r} do not cover it: there are none")
        tensor_of = np.flatnonzero(many)
        for length, numbers, sizes in tensors.shape.by_length(tensor_of):
            chunks = np.flatnonzero(np.isin(self.tensor, numbers))
            offsets, lengths = self._boxes(chunks, length, tensors)
            owner = np.searchsorted(numbers, self.tensor[chunks])
            wrong = _untiled(sizes, owner, offsets, lengths)
            if wrong is not None:
                number, reason = int(numbers[wrong[0]]), wrong[1]
                raise CorruptCheckpointError(
                    f"the chunks of {tensors.keys[number]!r} {reason} (shape {list(tensors.shape.row(number))})"
                )

    def _boxes(self, chunks: Array, length: int, tensors: TensorColumns) -> tuple[Array, Array]:
        """Offsets and lengths of ``chunks``, whose tensors all have ``length`` dimensions."""
        offsets = np.zeros((len(chunks), length), np.int64)
        lengths = tensors.shape.matrix(self.tensor[chunks], length)
        is_boxed = np.isin(chunks, self.boxed)
        row = np.searchsorted(self.boxed, chunks[is_boxed])
        offsets[is_boxed] = self.offsets.matrix(row, length)
        lengths[is_boxed] = self.lengths.matrix(row, length)
        return offsets, lengths


def _untiled(sizes: Array, owner: Array, offsets: Array, lengths: Array) -> tuple[int, str] | None:
    """The first tensor that its chunks do not cover exactly once, and how; ``None`` where there is none.

    ``sizes`` [tensors, dimensions]; for each chunk ``owner``, a row of it, ``offsets`` and ``lengths``.
    """
    cut = np.zeros(sizes.shape, bool)
    np.logical_or.at(cut, owner, lengths != sizes[owner])
    depth = cut.sum(axis=1)
    if len(depth) and depth.max() > MAX_CUT_DIMENSIONS:
        return int(depth.argmax()), f"cut it along {int(depth.max())} dimensions, at most {MAX_CUT_DIMENSIONS} may be"
    width = int(depth.max()) if len(depth) else 0
    # For each tensor the dimensions along which it is cut, those first; what is beyond its own number is masked.
    dimensions = np.argsort(~cut, axis=1, kind="stable")[:, :width]
    used = np.arange(width) < depth[:, None]
    whole = np.where(used, np.take_along_axis(sizes, dimensions, axis=1), 0)
    starts = np.where(used[owner], np.take_along_axis(offsets, dimensions[owner], axis=1), 0)
    spans = np.where(used[owner], np.take_along_axis(lengths, dimensions[owner], axis=1), 0)
    rows = [*_corners(owner, starts, spans, used[owner], 1)]
    rows += _corners(np.arange(len(sizes)), np.zeros_like(whole), whole, used, -1)
    points, signs = np.concatenate([point for point, _ in rows]), np.concatenate([sign for _, sign in rows])
    if not len(points):
        return None
    order = np.lexsort(points.T[::-1])
    points, signs = points[order], signs[order]
    starts_new = np.flatnonzero(np.r_[True, (points[1:] != points[:-1]).any(axis=1)])
    sums = np.add.reduceat(signs, starts_new)  # no row is empty: each begins where another point does
    wrong = np.flatnonzero(sums)
    return (int(points[starts_new[wrong[0]], 0]), "do not cover it exactly once") if len(wrong) else None


def _corners(owner: Array, starts: Array, spans: Array, used: Array, sign: int) -> Iterator[tuple[Array, Array]]:
    """Each corner of each box, as (owner, point), with its sign; a dimension that is not used has one end only."""
    width = starts.shape[1]
    for upper in range(1 << width):
        ends = np.array([upper >> d & 1 for d in range(width)], np.int64)
        there = ~((ends == 1) & ~used).any(axis=1)
        point = starts[there] + ends * spans[there]
        yield (
            np.column_stack([owner[there], point]),
            np.full(int(there.sum()), sign * (-1) ** int(ends.sum()), np.int64),
        )


def products(rows: Ragged) -> Array:
    """The product of each row (int64): of an empty one 1. The caller has bounded them."""
    found = np.ones(len(rows.starts) - 1, np.int64)
    for length, numbers, matrix in rows.by_length():
        if length:
            found[numbers] = np.prod(matrix, axis=1)
    return found


def are_dense(sizes: Array, strides: Array) -> Array:
    """For each row of two arrays [tensors, dimensions]: whether the strides visit consecutive elements, each once."""
    order = np.lexsort((sizes, strides), axis=1)
    sizes, strides = np.take_along_axis(sizes, order, axis=1), np.take_along_axis(strides, order, axis=1)
    expected = np.ones(len(sizes), np.int64)
    dense = np.ones(len(sizes), bool)
    for column in range(sizes.shape[1]):
        size, stride = sizes[:, column], strides[:, column]
        real = size != 1
        dense &= ~real | (stride == expected)
        expected = np.where(real & dense, expected * size, expected)
    return dense


def _rows(ragged: Ragged, rows: Array) -> Array:
    """The numbers of ``rows``, one row behind the other."""
    counts = ragged.counts[rows]
    begins = np.repeat(ragged.starts[rows] - np.r_[0, np.cumsum(counts)[:-1]] if len(rows) else counts, counts)
    return ragged.values[begins + np.arange(int(counts.sum()))]


def _texts(lengths: Array, blob: Array, what: str) -> tuple[str, ...]:
    """Texts that lie one behind the other."""
    starts = Ragged.counted(blob, lengths, what).starts.tolist()
    data = blob.tobytes()
    try:
        whole = data.decode("utf-8", "surrogatepass")
        if len(whole) == len(data):  # all of it ASCII: offsets of bytes are those of characters
            return tuple([whole[begin:end] for begin, end in pairwise(starts)])
        return tuple([data[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairwise(starts)])
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"{what} are not UTF-8: {error.reason}") from error


def _numbered(texts: Sequence[str], dtype: type[np.unsignedinteger]) -> tuple[tuple[str, ...], Array]:
    """The different texts, and for each its number among them."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(text, len(numbers)) for text in texts]
    return tuple(numbers), np.array(found, dtype)


def _below(numbers: Array, limit: int, what: str) -> None:
    if len(numbers) and int(numbers.max()) >= limit:
        raise CorruptCheckpointError(f"{what} {int(numbers.max())} is out of range: there are {limit}")


def parse_texts(metadata: Mapping[str, str], name: str, what: str) -> tuple[str, ...]:
    """A list of different texts that the metadata of a table holds as JSON; empty where it is absent."""
    raw = strict_json.array(strict_json.loads(metadata.get(name, "[]").encode("utf-8", "replace"), what), what)
    texts = tuple(strict_json.string(text, what) for text in raw)
    if len(set(texts)) != len(texts):
        raise CorruptCheckpointError(f"{what} holds a text twice")
    return texts


# ------------------------------------------------------------------------------------ the two kinds of tables


_COMMON_FORMS: Mapping[str, Form] = {
    **TENSOR_FORMS,
    **{f"param_{name}": TENSOR_FORMS[name] for name in ("key_lengths", "keys", "dtype", "ndim", "shape", "device")},
    **CHUNK_FORMS,
}
INDEX_FORMS: Mapping[str, Form] = {
    **_COMMON_FORMS,
    "layout": Form("U16"),
    "owner": Form("U32"),
    "layout_ranks": Form("U32"),
    "part": Form("U32"),
    "part_size": Form("I64"),
    "part_hash": Form("U8", 16),
}
PART_FORMS: Mapping[str, Form] = {
    **{name: CHUNK_FORMS[name] for name in ("chunk_tensor", "chunk_file", "chunk_begin", "chunk_hash")},
    **{f"own_{name}": form for name, form in _COMMON_FORMS.items()},
    "data": Form("U8"),
}


def index_files(index: Index) -> dict[str, bytes]:
    """The two files that say what an index does, by path."""
    with collector_paused():
        plain = [file_to_json(path, record) for path, record in index.files.items() if record.header is None]
        components = components_to_json(index.components)
        fields = {"format": FORMAT, "version": VERSION, "components": components, "files": plain}
        return {paths.INDEX: strict_json.dumps(fields).encode("ascii"), paths.TABLE: pack_index(index)}


def parse_index(text: bytes, table: bytes, where: str) -> Index:
    """Read ``index.json`` (``text``) and ``index.safetensors`` (``table``), trusting neither.

    After it returns, every chunk lies inside its file and its tensor, no two overlap, together they cover every
    tensor and every tensor file exactly, and every shape and dtype accounts for its bytes. So the memory that a restore
    allocates is bounded by the size of the files, whatever the index claims. That the files have these sizes is checked
    by whoever opens them.

    Raises:
        CorruptCheckpointError: anything else.
        FormatVersionError: an index of a newer version.
    """
    for data in (text, table):
        if len(data) > paths.INDEX_LIMIT:
            raise CorruptCheckpointError(f"{where} is larger than {paths.INDEX_LIMIT} bytes")
    with collector_paused():
        raw = strict_json.mapping(strict_json.loads(text, where), where)
        try:
            check_version(raw.get("format"), raw.get("version"), FORMAT, where)
            files = parse_files(raw.get("files"), "files")
            if any(record.header is not None for record in files.values()):
                raise CorruptCheckpointError("a file with a header of tensors stands among those without")
            return parse_table(table, strict_json.array(raw.get("components"), "components"), files, where)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{where}: {error}") from error


def pack_index(index: Index) -> bytes:
    """The content of ``index.safetensors``."""
    tensors = TensorColumns.of(chain.from_iterable(part.tensors.items() for part in index.components.values()))
    parameters = TensorColumns.of(chain.from_iterable(map(parameters_of, index.components.values())))
    stored = {path: record for path, record in index.files.items() if record.header is not None}
    columns = {**tensors.columns(), **_part_columns(index.parts), **parameters.columns("param_")}
    if index.placement is not None:
        columns |= _placement_columns(index.placement)
        layouts = [{**layout.form.to_json(), "ranks": layout.ranks.size} for layout in index.placement.layouts]
        return pack(columns, _metadata(tensors, parameters, stored, layouts=strict_json.dumps(layouts)))
    places = ((name, key) for name, part in index.components.items() for key in part.tensors)
    numbers = {path: number for number, path in enumerate(stored)}
    chunks = ChunkColumns.of(enumerate(index.chunks[place] for place in places), tensors, numbers)
    return pack({**columns, **chunks.columns()}, _metadata(tensors, parameters, stored))


def _placement_columns(placement: Placement) -> dict[str, Array]:
    ranks = [layout.ranks.ravel() for layout in placement.layouts]
    return {
        "layout": placement.layout.astype(np.uint16),
        "owner": placement.owner.astype(np.uint32),
        "layout_ranks": np.concatenate(ranks).astype(np.uint32) if ranks else np.empty(0, np.uint32),
    }


def _part_columns(parts: Mapping[int, FileRecord]) -> dict[str, Array]:
    if not parts:
        return {}
    ranks = sorted(parts)
    hashes = bytes.fromhex("".join(parts[rank].xxh3 for rank in ranks))
    return {
        "part": np.array(ranks, np.uint32),
        "part_size": np.array([parts[rank].size for rank in ranks], np.int64),
        "part_hash": np.frombuffer(hashes, np.uint8).reshape(-1, 16),
    }


def _metadata(
    tensors: TensorColumns, parameters: TensorColumns, files: Mapping[str, FileRecord], **texts: str
) -> dict[str, str]:
    of_parameters = {
        "param_dtypes": strict_json.dumps(list(parameters.dtypes)),
        "param_devices": strict_json.dumps(list(parameters.devices)),
    }
    return {
        "format": TABLE_FORMAT,
        "version": str(VERSION),
        "dtypes": strict_json.dumps(list(tensors.dtypes)),
        "devices": strict_json.dumps(list(tensors.devices)),
        **(of_parameters if len(parameters) else {}),
        "files": strict_json.dumps([file_to_json(path, record) for path, record in files.items()]),
        **texts,
    }


def parse_table(data: bytes, components: Sequence[object], plain: Mapping[str, FileRecord], where: str) -> Index:
    """``index.safetensors``, with what ``index.json`` says of components and of files that hold no tensors.

    Raises:
        CorruptCheckpointError: a promise of :func:`checkpointer.format.index.parse_index` does not hold.
        FormatVersionError: a table of a newer version.
    """
    columns, metadata = unpack(data, INDEX_FORMS, paths.TABLE)
    files = _checked_metadata(metadata, where)
    tensors = TensorColumns.parse(columns, *_names_of(metadata))
    found = _components(components, tensors, TensorColumns.parse(columns, *_names_of(metadata, "param_"), "param_"))
    chunks = ChunkColumns.parse(columns, tensors)
    if not files.keys().isdisjoint(plain):
        raise CorruptCheckpointError("a file is listed with tensors, and without")
    if any(record.header is None for record in files.values()):
        raise CorruptCheckpointError("a tensor file has no header")
    chunks.check_files(list(files.values()), list(files))
    all_files, parts = {**plain, **files}, _parse_parts(columns)
    if "layouts" in metadata:
        if len(chunks.tensor):
            raise CorruptCheckpointError("there are chunks beside the layouts that say where all of them lie")
        return Index(found, {}, all_files, parts, _parse_placement(columns, metadata["layouts"], tensors, parts))
    chunks.check_tiling(tensors)
    return Index(found, Chunks(_views(found), chunks, list(files), paths.TABLE), all_files, parts)


def _views(components: Mapping[str, Component]) -> dict[str, Tensors]:
    return {name: part.tensors for name, part in components.items() if isinstance(part.tensors, Tensors)}


def _parse_placement(
    columns: Mapping[str, Array], text: str, tensors: TensorColumns, parts: Mapping[int, FileRecord]
) -> Placement:
    """Every tensor has a layout, whose ranks all have a part. So their boxes cover it exactly once, by arithmetic."""
    if list(parts) != list(range(len(parts))):
        raise CorruptCheckpointError("not every rank has a part")
    raw = strict_json.array(strict_json.loads(text.encode("utf-8", "replace"), "layouts"), "layouts")
    found: list[Layout] = []
    begin, ranks = 0, columns["layout_ranks"].astype(np.int64)
    for number, item in enumerate(raw):
        what = f"layout {number}"
        count = strict_json.mapping(item, what).get("ranks")
        end = begin + strict_json.integer(count, f"ranks of {what}", low=1, high=len(ranks) - begin)
        found.append(parse_layout(item, ranks[begin:end], len(parts), what))
        begin = end
    if begin != len(ranks):
        raise CorruptCheckpointError("there are ranks that belong to no layout")
    placement = Placement(found, columns["layout"].astype(np.int64), columns["owner"].astype(np.int64))
    check_columns(placed(placement, tensors), found, "the table")
    return placement


def placed(placement: Placement, tensors: TensorColumns) -> PlacedTensors:
    """A placement with the shapes of its tensors, as ``format/layouts`` takes it."""
    return PlacedTensors(tensors.shape.values, tensors.shape.starts, placement.layout, placement.owner)


def _parse_parts(columns: Mapping[str, Array]) -> dict[int, FileRecord]:
    ranks, sizes, hashes = columns["part"].astype(np.int64), columns["part_size"], columns["part_hash"]
    if not len(ranks) == len(sizes) == len(hashes) or (np.diff(ranks) <= 0).any() or (sizes < 0).any():
        raise CorruptCheckpointError("the list of parts is not well formed")
    rows = zip(ranks.tolist(), sizes.tolist(), hashes, strict=True)
    return {rank: FileRecord(size, digest.tobytes().hex()) for rank, size, digest in rows}


def _checked_metadata(metadata: Mapping[str, str], where: str) -> dict[str, FileRecord]:
    """The tensor files, once format and version are known."""
    text = metadata.get("version", "")
    version = strict_json.loads(text.encode("ascii", "replace"), "version") if text else None
    check_version(metadata.get("format"), version, TABLE_FORMAT, where)
    return parse_files(strict_json.loads(metadata.get("files", "[]").encode("utf-8", "replace"), "files"), "files")


def _names_of(metadata: Mapping[str, str], prefix: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    dtypes, devices = (parse_texts(metadata, prefix + name, prefix + name) for name in ("dtypes", "devices"))
    unknown = [name for name in dtypes if name not in ITEM_SIZES]
    if unknown:
        raise CorruptCheckpointError(f"unknown dtype {unknown[0][:40]!r}")
    return dtypes, devices


def _components(raw: Sequence[object], tensors: TensorColumns, parameters: TensorColumns) -> dict[str, Component]:
    found: dict[str, Component] = {}
    first = row = 0
    for item in raw:
        entry = strict_json.mapping(item, "component")
        name = strict_json.string(entry.get("name"), "name of a component")
        if name in found or "tree" not in entry:
            raise CorruptCheckpointError(f"component {name[:100]!r} stands twice, or has no tree")
        count = strict_json.integer(entry.get("tensors"), f"tensors of {name}", high=len(tensors) - first)
        tree: Json = entry["tree"]
        kind = strict_json.string(entry.get("kind"), f"kind of {name}")
        meta = strict_json.mapping(entry.get("meta"), f"meta of {name}")
        if "parameters" in entry:
            groups = strict_json.integers(entry["parameters"], f"parameters of {name}")
            meta = {**parameters_meta(groups, parameters, row), **meta}
            row += sum(groups)
        found[name] = Component(kind=kind, tree=tree, tensors=Tensors(tensors, first, count), meta=meta)
        first += count
    if first != len(tensors):
        raise CorruptCheckpointError(f"{len(tensors) - first} tensors belong to no component")
    if row != len(parameters):
        raise CorruptCheckpointError(f"{len(parameters) - row} parameters belong to no component")
    return found


# ------------------------------------------------------------------------------------ the parameters of an optimizer


def parameters_of(component: Component) -> list[tuple[str, TensorSpec]]:
    """The parameters of all groups of an optimizer, one behind the other; none of other components."""
    if not has_parameters(component):
        return []
    columns: list[Any] = [chain.from_iterable(component.meta[name]) for name in PARAMETER_MEMBERS]  # type: ignore[arg-type]
    return [
        (name or "", TensorSpec(dtype, tuple(shape), None, device))
        for name, shape, device, dtype in zip(*columns, strict=True)
    ]


def parameters_meta(groups: Sequence[int], parameters: TensorColumns, first: int) -> dict[str, Any]:
    """What :func:`parameters_of` has taken apart: the members of meta, for groups of so many parameters.

    Raises:
        CorruptCheckpointError: there are not so many parameters.
    """
    if sum(groups) > len(parameters) - first:
        raise CorruptCheckpointError(f"{sum(groups)} parameters are in groups, and {len(parameters) - first} are there")
    last = first + sum(groups)
    rows = zip(
        [name or None for name in parameters.keys[first:last]],
        [list(parameters.shape.row(number)) for number in range(first, last)],
        [parameters.devices[number] for number in parameters.device[first:last].tolist()],
        [parameters.dtypes[number] for number in parameters.dtype[first:last].tolist()],
        strict=True,
    )
    found: dict[str, Any] = {name: [] for name in PARAMETER_MEMBERS}
    for count in groups:
        of_group = list(islice(rows, count))
        for place, name in enumerate(PARAMETER_MEMBERS):
            found[name].append([row[place] for row in of_group])
    return found


def pack_part(part: RankPart, data: bytes = b"") -> bytes:
    """The content of ``index-<rank>.safetensors``.

    ``data``: bytes of tensors of its own that lie in this very file. Their chunks have ``""`` for a file, and count
    from the start of ``data``.
    """
    tensors = TensorColumns.of(chain.from_iterable(state.tensors.items() for state in part.components.values()))
    stored = {path: record for path, record in part.files.items() if record.header is not None}
    numbers = {"": THIS_FILE, **{path: number for number, path in enumerate(stored)}}
    places = ((name, key) for name, state in part.components.items() for key in state.tensors)
    chunks = ChunkColumns.of(enumerate(part.chunks[place] for place in places), tensors, numbers)
    parameters = TensorColumns.of(chain.from_iterable(map(parameters_of, part.components.values())))
    own = {**tensors.columns(), **chunks.columns(), **parameters.columns("param_")}
    columns = {"own_" + name: array for name, array in own.items()}
    columns |= _written_columns(part.written, numbers)
    columns["data"] = np.frombuffer(data, np.uint8)
    trees = strict_json.dumps(components_to_json(part.components))
    metadata = _metadata(tensors, parameters, stored, components=trees)
    shift = np.where(chunks.file == THIS_FILE, place_of("data", columns, metadata), 0)
    return pack({**columns, "own_chunk_begin": chunks.begin + shift}, metadata)


def _written_columns(written: Mapping[int, Chunk], files: Mapping[str, int]) -> dict[str, Array]:
    rows = sorted(written.items())
    hashes = bytes.fromhex("".join(chunk.xxh3 for _, chunk in rows))
    return {
        "chunk_tensor": np.array([number for number, _ in rows], np.uint32),
        "chunk_file": np.array([files[chunk.file] for _, chunk in rows], np.uint32),
        "chunk_begin": np.array([chunk.begin for _, chunk in rows], np.int64),
        "chunk_hash": np.frombuffer(hashes, np.uint8).reshape(-1, 16),
    }


def parse_part(data: bytes, rank: int, index: Index, where: str) -> RankPart:
    """Read ``index-<rank>.safetensors``, trusting nothing: it has to be what ``index`` says that this rank wrote.

    Raises:
        CorruptCheckpointError: a promise of :func:`checkpointer.format.index.parse_index` does not hold.
        FormatVersionError: a table of a newer version.
    """
    if len(data) > paths.INDEX_LIMIT:
        raise CorruptCheckpointError(f"{where} is larger than {paths.INDEX_LIMIT} bytes")
    with collector_paused():
        try:
            return _parse_part(data, rank, index, where)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{where}: {error}") from error


def _parse_part(data: bytes, rank: int, index: Index, where: str) -> RankPart:
    path = paths.rank_index(rank)
    columns, metadata = unpack(data, PART_FORMS, path)
    files = _checked_metadata(metadata, where)
    if any(record.header is None for record in files.values()) or not files.keys().isdisjoint(index.files):
        raise CorruptCheckpointError("a tensor file has no header, or the index lists it too")
    own = {name.removeprefix("own_"): array for name, array in columns.items() if name.startswith("own_")}
    tensors = TensorColumns.parse(own, *_names_of(metadata))
    text = metadata.get("components", "[]").encode("utf-8", "replace")
    parameters = TensorColumns.parse(own, *_names_of(metadata, "param_"), "param_")
    found = _components(strict_json.array(strict_json.loads(text, "components"), "components"), tensors, parameters)
    chunks = ChunkColumns.parse(own, tensors)
    chunks.check_tiling(tensors)
    shared = _columns_of_index(index)
    written = _written(columns, rank, index, shared)
    inside = _place_of_data(data, columns["data"], chunks)
    _joined(chunks, written).check_files(list(files.values()), list(files), inside)
    rows = Rows(shared, written, list(files), path)
    return RankPart(found, Chunks(_views(found), chunks, list(files), path), files, rows)


def _place_of_data(data: bytes, column: Array, chunks: ChunkColumns) -> tuple[int, int]:
    """Where in ``data`` its column ``data`` begins and ends; one without bytes is where all its chunks begin."""
    if len(column):
        begin = column.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
        return begin, begin + len(column)
    begins = chunks.begin[chunks.file == THIS_FILE]
    begin = min(int(begins.min()), len(data)) if len(begins) else 0
    return begin, begin


def _columns_of_index(index: Index) -> TensorColumns:
    for component in index.components.values():
        if isinstance(component.tensors, Tensors):
            return component.tensors.columns
    return TensorColumns.of(())


def _written(columns: Mapping[str, Array], rank: int, index: Index, tensors: TensorColumns) -> ChunkColumns:
    """What this rank has written of the tensors of the index: just the boxes that follow from the placement."""
    number, file = (columns[name].astype(np.int64) for name in ("chunk_tensor", "chunk_file"))
    begin, digest = columns["chunk_begin"], columns["chunk_hash"]
    if not len(number) == len(file) == len(begin) == len(digest):
        raise CorruptCheckpointError(
            f"{len(number)} chunks, {len(file)} files, {len(begin)} places, {len(digest)} hashes"
        )
    if index.placement is None:
        none = np.empty(0, np.int64)
        boxes = BoxColumns(none, none, none, np.zeros(1, np.int64))
    else:
        boxes = written_by(rank, placed(index.placement, tensors), index.placement.layouts)
    if not np.array_equal(number, boxes.tensors):
        raise CorruptCheckpointError(
            f"it has {len(number)} chunks, of other tensors than the {len(boxes.tensors)} of rank {rank}"
        )
    lengths = Ragged(boxes.lengths, boxes.starts)
    size = products(lengths) * tensors.itemsize[number] if len(number) else np.empty(0, np.int64)
    if (begin < 0).any() or (begin > 2**63 - 1 - size).any() or (file == THIS_FILE).any():
        raise CorruptCheckpointError("a chunk lies beyond the end of every file, or in no tensor file")
    boxed = np.arange(len(number))
    offsets = Ragged(boxes.offsets, boxes.starts)
    return ChunkColumns(number, file, begin, begin + size, digest, boxed, offsets, lengths)


def _joined(own: ChunkColumns, written: ChunkColumns) -> ChunkColumns:
    """Both, as far as files are concerned."""
    file, begin, end = (
        np.concatenate([getattr(own, name), getattr(written, name)]) for name in ("file", "begin", "end")
    )
    return replace(own, file=file, begin=begin, end=end)
