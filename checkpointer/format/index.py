"""The index of a checkpoint: component trees, which files there are, and where every tensor's bytes lie.

It is two files: ``index.json`` holds the trees, ``index.safetensors`` the table of tensors in columns, which becomes
objects one by one, when somebody asks. Pure data: no I/O and no torch. :func:`parse_index` accepts bytes from anywhere,
hostile ones included, and returns an index whose every promise (shapes, ranges, coverage) has been checked against the
sizes of the files that it lists. See FORMAT.md, "The index".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format import paths, strict_json

if TYPE_CHECKING:  # NumPy takes longer to load than `checkpointer ls` takes in all
    from checkpointer.format.columns import Array
    from checkpointer.format.layouts import Layout
    from checkpointer.format.table import ChunkColumns, TensorColumns

FORMAT = "checkpointer-index"
TABLE_FORMAT = "checkpointer-table"
VERSION = 1
MAX_DIMENSIONS = 64
MAX_CUT_DIMENSIONS = 4
"""Dimensions along which one tensor may be cut into chunks: checking a chunk takes time and memory 2 ** dimensions."""

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"

#: Bytes of one element of each torch dtype, by the name that torch gives it after ``torch.``.
ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor is, without its bytes."""

    dtype: str
    """Name of the torch dtype without ``torch.``, for example ``"bfloat16"``."""
    shape: tuple[int, ...]
    """Global shape."""
    strides: tuple[int, ...] | None = None
    """Strides in elements where the tensor was dense but not row-major (``channels_last``); else ``None``."""
    device: str = "cpu"
    """Device that it was saved from, for example ``"cuda:0"``."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Component:
    """One component's state: a tree with references to tensors, and the tensors it refers to."""

    kind: str
    """Which adapter captured it: ``module``, ``optimizer``, ``stateful``, ``container``, ``generator``, ``rng``."""
    tree: Json
    """Encoded Python state (see FORMAT.md, "Trees")."""
    tensors: Mapping[str, TensorSpec]
    """Tensors by the key that the tree and the safetensors file use."""
    meta: Mapping[str, Json] = field(default_factory=dict)
    """What the adapter needs beside the tree (parameter names, frozen flags, …)."""


class Chunk(NamedTuple):
    """A box of a tensor and where its bytes (row-major) lie."""

    offsets: tuple[int, ...]
    """Where the box starts in each dimension of the global shape."""
    lengths: tuple[int, ...]
    """Its extent in each dimension."""
    file: str
    begin: int
    """Byte offset from the start of the file; ``end`` likewise."""
    end: int
    xxh3: str
    """xxh3-128 of the bytes, 32 hexadecimal digits."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3-128 (32 hexadecimal digits) of a whole file, and whose bytes it shares."""

    size: int
    xxh3: str
    origin: str | None = None
    """``id`` of the earlier checkpoint whose save wrote the bytes that this file shares; ``None``: its own did."""
    turn: int = 1
    """Which of the consecutive checkpoints that share these bytes this one is; the one that wrote them is the first."""
    header: tuple[int, str] | None = None
    """Of a tensor file: the length in bytes of its header, and the xxh3-128 of that; ``None`` for other files."""


@dataclass(frozen=True)
class Index:
    """What ``index.json`` and ``index.safetensors`` say."""

    components: Mapping[str, Component]
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]
    """Chunks of each tensor, by component and key."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Every file of the checkpoint but the manifest, the index, and what only a rank's own part knows of."""
    parts: Mapping[int, FileRecord] = field(default_factory=dict)
    """By rank: size and hash of the file (``paths.rank_index``) that describes what this rank has written, and
    holds what it has otherwise than rank 0."""
    placement: Placement | None = None
    """Which rank has written which box of each tensor; ``None``: ``chunks`` says where all of them lie. Else parts do,
    and ``chunks`` is empty until somebody reads them (``repository.contents``)."""

    @cached_property
    def headers(self) -> dict[str, tuple[int, str]]:
        """Length in bytes and xxh3-128 of the header of each tensor file."""
        return {path: record.header for path, record in self.files.items() if record.header is not None}


@dataclass(frozen=True)
class Placement:
    """Which rank has written which box of each tensor, as layouts: nobody lists boxes. See ``format/layouts``."""

    layouts: Sequence[Layout]
    layout: Array
    """int64: for each tensor of the table the number of its layout."""
    owner: Array
    """int64: which of the layout's replicas has written it."""


@dataclass(frozen=True)
class RankPart:
    """What one rank has written, as ``index-<rank>.safetensors`` says it."""

    components: Mapping[str, Component]
    """What it has otherwise than rank 0: they take the place of those of the same name, for this rank."""
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]
    """Where the tensors of these lie."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """The tensor files that it has written and that only this part lists."""
    written: Mapping[int, Chunk] = field(default_factory=dict)
    """Where the boxes lie that it has written of tensors of the index, by the tensor's number there."""


def check_version(name: object, version: object, expected: str, where: str) -> None:
    """Refuse a file of another kind (CorruptCheckpointError) or of a newer version (FormatVersionError)."""
    if name != expected:
        raise CorruptCheckpointError(f"not a {expected} (format {str(name)[:40]!r})")
    found = strict_json.integer(version, "version", low=1)
    if found != VERSION:
        raise FormatVersionError(f"{where} is written in format version {found}, this library reads {VERSION}")


def components_to_json(components: Mapping[str, Component]) -> list[Json]:
    """Components without their tensors, of which only the number is told: the table has them in this order."""
    return [_component_to_json(name, component) for name, component in components.items()]


def _component_to_json(name: str, component: Component) -> Json:
    meta = dict(component.meta)
    entry: dict[str, Json] = {"name": name, "kind": component.kind, "meta": meta, "tree": component.tree}
    entry["tensors"] = len(component.tensors)
    if has_parameters(component):
        entry["parameters"] = [len(group) for group in meta["params"]]  # type: ignore[union-attr,arg-type]  # lists of lists
        for member in PARAMETER_MEMBERS:
            del meta[member]
    return entry


PARAMETER_MEMBERS = ("params", "shapes", "devices", "dtypes")
"""Members of an optimizer's meta that hold, for each group, a list with an entry for each parameter. They lie in the
table, in columns of the same form as those of tensors; a parameter without a name has an empty one."""


def has_parameters(component: Component) -> bool:
    """Whether the table of tensors has columns of the parameters of this component too."""
    return component.kind == "optimizer" and all(member in component.meta for member in PARAMETER_MEMBERS)


def file_to_json(path: str, record: FileRecord) -> Json:
    """One entry of ``files``."""
    entry: dict[str, Json] = {"path": path, "size": record.size, "xxh3": record.xxh3}
    if record.header is not None:
        entry["header"] = list(record.header)
    if record.origin is not None:
        entry["shared"] = [record.origin, record.turn]
    return entry


def parse_files(raw: object, what: str) -> dict[str, FileRecord]:
    """The inverse of :func:`file_to_json` for a list of them.

    Raises:
        CorruptCheckpointError: not such a list; a path that leaves the checkpoint, or stands twice.
    """
    found: dict[str, FileRecord] = {}
    for item in strict_json.array(raw, what):
        entry = strict_json.mapping(item, what)
        path = paths.check_relative(entry.get("path"))
        if path in found:
            raise CorruptCheckpointError(f"{what} lists {path[:100]!r} twice")
        found[path] = _parse_file(path, entry)
    return found


def _parse_file(path: str, entry: Mapping[str, object]) -> FileRecord:
    size = strict_json.integer(entry.get("size"), f"size of {path!r}")
    xxh3 = strict_json.digest(entry.get("xxh3"), path)
    header: tuple[int, str] | None = None
    if "header" in entry:
        pair = strict_json.array(entry["header"], f"header of {path!r}")
        if len(pair) != 2:
            raise CorruptCheckpointError(f"header of {path!r} must be [length, xxh3]")
        header = (
            strict_json.integer(pair[0], f"header of {path!r}", low=8, high=size),
            strict_json.digest(pair[1], path),
        )
    if "shared" not in entry:
        return FileRecord(size, xxh3, header=header)
    shared = strict_json.array(entry["shared"], f"shared file {path!r}")
    if len(shared) != 2 or not paths.is_id(shared[0]):
        raise CorruptCheckpointError(f"shared file {path!r} must be [id, turn]")
    turn = strict_json.integer(shared[1], f"turn of {path!r}", low=2, high=2**31)
    return FileRecord(size, xxh3, str(shared[0]), turn, header)


class Tensors(Mapping[str, TensorSpec]):
    """The tensors of one component: some rows of a table, each an object only when it is asked for."""

    def __init__(self, columns: TensorColumns, first: int, count: int) -> None:
        """Raises CorruptCheckpointError where a key stands twice."""
        self.columns, self.first, self.count = columns, first, count
        self._numbers = {key: number for number, key in enumerate(columns.keys[first : first + count], start=first)}
        if len(self._numbers) != count:
            raise CorruptCheckpointError("a component names a tensor twice")

    def __getitem__(self, key: str) -> TensorSpec:
        return self.columns.spec(self._numbers[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return self.count

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def number(self, key: str) -> int:
        """The row of ``key`` in the table."""
        return self._numbers[key]


class Rows(Mapping[int, Chunk]):
    """The chunks of a part, by the number of their tensor, each an object only when it is asked for."""

    def __init__(self, tensors: TensorColumns, columns: ChunkColumns, files: Sequence[str], this_file: str) -> None:
        self._tensors, self.columns, self._files, self._this_file = tensors, columns, files, this_file

    def __getitem__(self, number: int) -> Chunk:
        return self.columns.chunk(self._rows[number], self._tensors.spec(number).shape, self._files, self._this_file)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {number: row for row, number in enumerate(self.columns.tensor.tolist())}


class Chunks(Mapping[tuple[str, str], "tuple[Chunk, ...]"]):
    """The chunks of all tensors of a table, each an object only when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensors], columns: ChunkColumns, files: Sequence[str], this_file: str
    ) -> None:
        self._tensors, self.columns, self.file_names, self.this_file = tensors, columns, files, this_file

    def __getitem__(self, place: tuple[str, str]) -> tuple[Chunk, ...]:
        component, key = place
        tensors = self._tensors[component]
        number = tensors.number(key)
        first, last = self.starts[number], self.starts[number + 1]
        shape = tensors.columns.spec(number).shape
        return tuple([self.columns.chunk(row, shape, self.file_names, self.this_file) for row in range(first, last)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((component, key) for component, tensors in self._tensors.items() for key in tensors)

    def __len__(self) -> int:
        return sum(map(len, self._tensors.values()))

    def files_of(self, component: str) -> set[str]:
        """The files that a component's tensors lie in."""
        tensors = self._tensors[component]
        first, last = self.starts[tensors.first], self.starts[tensors.first + tensors.count]
        return {self.file_names[number] for number in set(self.columns.file[first:last].tolist())}

    @cached_property
    def starts(self) -> list[int]:
        """For each tensor its first chunk, and one more: chunks lie in the order of tensors."""
        count = sum(map(len, self._tensors.values()))
        return self.columns.starts(count)


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether ``strides`` visit each of ``prod(shape)`` consecutive elements exactly once, in some order of dims."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
