"""Which tensor goes into which safetensors file, and where in it. Pure: sizes in, headers and offsets out.

The files are stock safetensors: 8 bytes header length, a JSON header, the tensors' bytes without gaps.
See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths, strict_json
from checkpointer.format.index import ITEM_SIZES, Chunk, Index, TensorSpec

SHARD_LIMIT = 50 * 10**9
"""Bytes of tensors in one file at most (a larger tensor gets a file of its own); the limit of the Hugging Face hub."""

SMALL_COMPONENT = 1 << 20
"""Bytes. Smaller components other than modules and optimizers share ``state.safetensors``."""

PAGE = 4096
"""Bytes. Headers are padded with spaces up to a multiple of it, so that a whole file can be written past the page cache
from page-aligned memory, whatever its header says."""

_ALWAYS_OWN_FILE = frozenset({"module", "optimizer"})

_DTYPES: Mapping[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16", "bfloat16": "BF16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True)
class FileNaming:
    """How the files of one rank of several are called."""

    rank: int
    own: bool = False
    """Whether this is what the rank has otherwise than the coordinator: all of that is one file."""
    cut: bool = False
    """Whether tensors of the component are cut, so that its files are no shards in the sense of Hugging Face."""
    first: int = 1
    """The number of this rank's first shard, where they are."""
    total: int | None = None
    """Shards of all ranks together; ``None``: those of this rank are all."""

    def path(self, component: str, number: int, count: int) -> str:
        """The file of the ``number``-th of this rank's ``count`` shards of a component."""
        if self.cut:
            return paths.rank_file(component, self.rank, number, count)
        return paths.tensor_file(component, self.first + number - 1, count if self.total is None else self.total)

    @property
    def shared_path(self) -> str:
        """The file that small components share."""
        return paths.shared_tensors(self.rank, own=self.own)


@dataclass(frozen=True)
class ComponentTensors:
    """The tensors of one component, as far as the layout of files depends on them."""

    kind: str
    specs: Mapping[str, TensorSpec]
    frozen: frozenset[str] = frozenset()
    """Keys whose bytes are expected never to change: they get shards of their own, which later saves can share."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of stored keys (tied weights); written to the file's metadata as safetensors does."""
    naming: FileNaming | None = None
    """``None``: one process writes all."""


class Slot(NamedTuple):
    """One tensor's place: ``begin`` to ``end`` are byte offsets from the start of the data, behind the header."""

    component: str
    key: str
    begin: int
    end: int

    @property
    def name(self) -> str:
        """For errors."""
        return f"{self.component}.{self.key}"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file before its tensors' bytes are known."""

    path: str
    slots: tuple[Slot, ...]
    names: tuple[str, ...]
    """The name of each slot's tensor in the file."""
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    frozen: bool
    """Whether nothing in it is expected ever to change, so that it is worth comparing with an earlier checkpoint's."""

    @cached_property
    def header(self) -> bytes:
        """The header's bytes. Made when asked for: with 10,000 tensors it takes longer than a ``save`` call may."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)}
        for slot, name, spec in zip(self.slots, self.names, self.specs, strict=True):
            entries[_free_name(name, entries)] = _entry(spec, slot.begin)
        return _pad(strict_json.dumps(entries).encode("ascii"))

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return self.slots[-1].end if self.slots else 0

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_size


def plan_files(components: Mapping[str, ComponentTensors], shard_limit: int | None = None) -> list[TensorFile]:
    """Distribute all tensors over files of at most ``shard_limit`` (default ``SHARD_LIMIT``) bytes of tensors.

    The result depends on nothing but its arguments.
    """
    limit = SHARD_LIMIT if shard_limit is None else shard_limit
    files: list[TensorFile] = []
    small: dict[str, list[tuple[str, str]]] = {}
    for name, component in components.items():
        if not component.specs:
            continue
        if _shares_file(component):
            path = paths.SHARED_TENSORS if component.naming is None else component.naming.shared_path
            small.setdefault(path, []).extend((name, key) for key in component.specs)
            continue
        shards = _shards(component, limit)
        for number, keys in enumerate(shards, start=1):
            path = (component.naming or _ONE_PROCESS).path(name, number, len(shards))
            files.append(_build(path, [(name, key, key) for key in keys], components))
    for path, tensors in small.items():
        files.append(_build(path, [(name, key, f"{name}/{key}") for name, key in tensors], components))
    return files


def count_files(component: ComponentTensors, shard_limit: int | None = None) -> int:
    """How many files of its own a component gets."""
    limit = SHARD_LIMIT if shard_limit is None else shard_limit
    return 0 if _shares_file(component) else len(_shards(component, limit))


def shard_indexes(files: Iterable[TensorFile], components: Mapping[str, ComponentTensors]) -> dict[str, bytes]:
    """The Hugging Face index file (path to content) of each component that is stored in several shards."""
    maps: dict[str, dict[str, str]] = {}
    for file in files:
        for slot in file.slots:
            if file.path not in (paths.tensor_file(slot.component), paths.SHARED_TENSORS):
                maps.setdefault(slot.component, {})[slot.key] = file.path
    return {
        paths.shard_index(name): _shard_index(components[name].specs, weight_map) for name, weight_map in maps.items()
    }


def _shard_index(specs: Mapping[str, TensorSpec], weight_map: Mapping[str, str]) -> bytes:
    total = sum(spec.nbytes for spec in specs.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    return strict_json.dumps(content, indent=2).encode("ascii")


def joined_shard_indexes(index: Index) -> dict[str, bytes]:
    """As :func:`shard_indexes`, for files of several ranks. None for a component of which a tensor is cut."""
    maps: dict[str, dict[str, str]] = {}
    for name, component in index.components.items():
        files = {key: [chunk.file for chunk in index.chunks[name, key]] for key in component.tensors}
        different = {file for places in files.values() for file in places}
        if len(different) > 1 and {paths.tensor_file(name, 1, len(different))} <= different:
            maps[name] = {key: places[0] for key, places in files.items()}
    return {
        paths.shard_index(name): _shard_index(index.components[name].tensors, weight_map)
        for name, weight_map in maps.items()
    }


def check_header(header: bytes, chunks: Iterable[tuple[str, Chunk]], what: str) -> None:
    """Compare the header of a safetensors file with what the index says of it: stock tools believe the header.

    ``chunks`` are the dtype and the chunk of every tensor that the index places in the file.

    Raises:
        CorruptCheckpointError: they tell different stories.
    """
    raw = strict_json.mapping(strict_json.loads(header[8:], what), what)
    found = Counter(_signature(entry, what) for name, entry in raw.items() if name != "__metadata__")
    expected = Counter(
        _signature(_entry(TensorSpec(dtype, chunk.lengths), chunk.begin - len(header)), what) for dtype, chunk in chunks
    )
    if found != expected:
        raise CorruptCheckpointError(f"{what} describes other tensors than the index does")


def _signature(entry: object, what: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    fields = strict_json.mapping(entry, what)
    dtype = strict_json.string(fields.get("dtype"), what)
    return (
        dtype,
        strict_json.integers(fields.get("shape"), what),
        strict_json.integers(fields.get("data_offsets"), what),
    )


_ONE_PROCESS = FileNaming(0)


def _shares_file(component: ComponentTensors) -> bool:
    if component.naming is not None and component.naming.own:
        return True
    if component.kind in _ALWAYS_OWN_FILE:
        return False
    return sum(spec.nbytes for spec in component.specs.values()) < SMALL_COMPONENT


def _shards(component: ComponentTensors, limit: int) -> list[list[str]]:
    """Keys of each shard: what trains first, what is frozen after, neither above ``limit`` bytes."""
    trained = [key for key in component.specs if key not in component.frozen]
    frozen = [key for key in component.specs if key in component.frozen]
    return [
        [group[number] for number in shard]
        for group in (trained, frozen)
        for shard in cut([component.specs[key].nbytes for key in group], limit)
    ]


def cut(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Which tensors go into one file, in their order: numbers into ``sizes`` for each file of ``limit`` bytes."""
    shards: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(number)
        room -= size
    return shards


def wide_first(specs: Sequence[TensorSpec]) -> list[int]:
    """The order of tensors in a file, as numbers into ``specs``: so each one lies aligned."""
    return sorted(range(len(specs)), key=lambda number: -ITEM_SIZES[specs[number].dtype])


def lay_out(
    path: str, tensors: Sequence[tuple[str, str, str]], specs: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> TensorFile:
    """A file of ``(component, key, name in the file)``, one behind the other; nothing in it counts as frozen."""
    ends = accumulate((spec.nbytes for spec in specs), initial=0)
    slots = tuple(Slot(item[0], item[1], *span) for item, span in zip(tensors, pairwise(ends), strict=True))
    return TensorFile(path, slots, tuple(name for _, _, name in tensors), tuple(specs), metadata, frozen=False)


def _build(
    path: str, tensors: Sequence[tuple[str, str, str]], components: Mapping[str, ComponentTensors]
) -> TensorFile:
    given = [components[component].specs[key] for component, key, _ in tensors]
    order = wide_first(given)
    ordered = [tensors[number] for number in order]
    file = lay_out(path, ordered, [given[number] for number in order], _metadata(ordered, components))
    return replace(file, frozen=all(key in components[component].frozen for component, key, _ in ordered))


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """``name``, or the next free variant of it (``__metadata__`` is the header's own)."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}#{number}", number + 1
    return candidate


def _entry(spec: TensorSpec, offset: int) -> dict[str, object]:
    named = _DTYPES.get(spec.dtype)
    return {
        "dtype": named or "U8",
        "shape": list(spec.shape) if named else [spec.nbytes],
        "data_offsets": [offset, offset + spec.nbytes],
    }


def _metadata(tensors: Sequence[tuple[str, str, str]], components: Mapping[str, ComponentTensors]) -> dict[str, str]:
    stored = {(component, key): name for component, key, name in tensors}
    metadata = {"format": "pt"}
    for component in dict.fromkeys(component for component, _, _ in tensors):
        for alias, key in components[component].aliases.items():
            if (component, key) in stored:
                metadata.setdefault(alias, stored[component, key])  # "format" is taken
    return metadata


def _pad(header: bytes) -> bytes:
    length = len(header) + -(8 + len(header)) % PAGE
    return struct.pack("<Q", length) + header.ljust(length, b" ")
