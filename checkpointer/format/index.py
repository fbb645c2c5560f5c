"""The index of a checkpoint: component trees, and where every tensor's bytes lie.

Pure data: no I/O and no torch. :func:`parse_index` accepts bytes from anywhere, hostile ones included, and
returns an index whose every promise (shapes, ranges, coverage) has been checked against the file sizes
that the manifest gives. See FORMAT.md, "index.json".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple, TypeAlias

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format import paths, strict_json
from checkpointer.system.gc import collector_paused

FORMAT = "checkpointer-index"
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
class Index:
    """What ``index.json`` says."""

    components: Mapping[str, Component]
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]
    """Chunks of each tensor, by component and key."""
    headers: Mapping[str, tuple[int, str]]
    """Length in bytes and xxh3-128 of the header of each safetensors file."""

    def to_bytes(self) -> bytes:
        """The file's content."""
        with collector_paused():
            components = {name: self._component_to_json(name, part) for name, part in self.components.items()}
            headers = {path: [length, xxh3] for path, (length, xxh3) in self.headers.items()}
            fields = {"format": FORMAT, "version": VERSION, "files": headers, "components": components}
            return strict_json.dumps(fields).encode("ascii")

    def _component_to_json(self, name: str, component: Component) -> dict[str, object]:
        tensors = {key: _tensor_to_json(spec, self.chunks[name, key]) for key, spec in component.tensors.items()}
        return {"kind": component.kind, "meta": dict(component.meta), "tree": component.tree, "tensors": tensors}


def parse_index(data: bytes, sizes: Mapping[str, int], where: str) -> Index:
    """Read an index and check it against ``sizes``, the bytes of every file that the manifest lists.

    After it returns, every chunk lies inside its file and its tensor, no two overlap, together they cover every
    tensor and every safetensors file exactly, and every shape and dtype accounts for its bytes. So the memory that a
    restore allocates is bounded by the size of the files, whatever the index claims.

    Raises:
        CorruptCheckpointError: anything else.
        FormatVersionError: an index of a newer version.
    """
    if len(data) > paths.INDEX_LIMIT:
        raise CorruptCheckpointError(f"{where} is larger than {paths.INDEX_LIMIT} bytes")
    with collector_paused():
        return _parse(strict_json.mapping(strict_json.loads(data, where), where), sizes, where)


def _parse(raw: Mapping[str, object], sizes: Mapping[str, int], where: str) -> Index:
    try:
        _check_version(raw, where)
        headers = {path: _parse_header(path, value, sizes) for path, value in _object(raw, "files").items()}
        components: dict[str, Component] = {}
        chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        for name, value in _object(raw, "components").items():
            components[name] = _parse_component(name, strict_json.mapping(value, name), headers, chunks)
        _check_coverage(chunks.values(), headers, sizes)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from error
    return Index(components, chunks, headers)


def _check_version(raw: Mapping[str, object], where: str) -> None:
    if raw.get("format") != FORMAT:
        raise CorruptCheckpointError(f"not a checkpointer index (format {str(raw.get('format'))[:40]!r})")
    version = strict_json.integer(raw.get("version"), "version", low=1)
    if version != VERSION:
        raise FormatVersionError(f"{where} is written in format version {version}, this library reads {VERSION}")


def _object(raw: Mapping[str, object], name: str) -> dict[str, Any]:
    return strict_json.mapping(raw.get(name), name)


def _parse_header(path: str, value: object, sizes: Mapping[str, int]) -> tuple[int, str]:
    what = f"header of {path[:100]!r}"
    items = strict_json.array(value, what)
    if path not in sizes or len(items) != 2:
        raise CorruptCheckpointError(f"{what}: not a file of the checkpoint, or not [length, xxh3]")
    length = strict_json.integer(items[0], what, low=8, high=sizes[path])
    return length, strict_json.digest(items[1], what)


def _parse_component(
    name: str,
    raw: Mapping[str, object],
    headers: Mapping[str, tuple[int, str]],
    chunks: dict[tuple[str, str], tuple[Chunk, ...]],
) -> Component:
    tensors: dict[str, TensorSpec] = {}
    for key, value in _object(raw, "tensors").items():
        what = f"tensor {name}.{key}"
        entry = strict_json.mapping(value, what)
        usual = _usual(entry, headers)
        if usual is not None:
            tensors[key], chunks[name, key] = usual
            continue
        spec = tensors[key] = _parse_spec(entry, what)
        parts = [_parse_chunk(part, spec, headers, what) for part in strict_json.array(entry.get("chunks"), what)]
        _check_tiling(spec, parts, what)
        chunks[name, key] = tuple(parts)
    kind = strict_json.string(raw.get("kind"), f"kind of {name}")
    if "tree" not in raw:
        raise CorruptCheckpointError(f"component {name!r} has no tree")
    tree: Json = raw["tree"]  # type: ignore[assignment]  # whatever a JSON parser returned
    return Component(kind=kind, tree=tree, tensors=tensors, meta=_object(raw, "meta"))


def _usual(
    entry: Mapping[str, Any], headers: Mapping[str, tuple[int, str]]
) -> tuple[TensorSpec, tuple[Chunk, ...]] | None:
    """Spec and chunk of a tensor as nearly all are: row-major, saved from the CPU, in one piece, with elements.

    Models have tens of thousands of them. ``None`` for every other, and for what is not well formed: then the long way
    says what is wrong.
    """
    chunks = entry["chunks"] if entry.keys() == _USUAL_ENTRY else None
    chunk = chunks[0] if type(chunks) is list and len(chunks) == 1 else None
    if type(chunk) is not dict or chunk.keys() != _USUAL_CHUNK or not _is_usual(entry, chunk, headers):
        return None
    shape = tuple(entry["shape"])
    begin, end = chunk["range"]
    return TensorSpec(entry["dtype"], shape), (
        Chunk(tuple(chunk["offsets"]), shape, chunk["file"], begin, end, chunk["xxh3"]),
    )


def _is_usual(entry: Mapping[str, Any], chunk: Mapping[str, Any], headers: Mapping[str, tuple[int, str]]) -> bool:
    dtype, file, xxh3 = entry["dtype"], chunk["file"], chunk["xxh3"]
    shape, span, offsets, lengths = entry["shape"], chunk["range"], chunk["offsets"], chunk["lengths"]
    if not (type(shape) is type(span) is type(offsets) is type(lengths) is list):
        return False
    if not (type(dtype) is type(file) is type(xxh3) is str):
        return False
    numbers = [*shape, *span, *offsets, *lengths]
    return (
        {int}.issuperset(map(type, numbers))
        and len(span) == 2
        and min(numbers) >= 0
        and max(numbers) < 2**63
        and shape == lengths
        and len(offsets) == len(shape) <= MAX_DIMENSIONS
        and not any(offsets)
        and dtype in ITEM_SIZES
        and 0 < span[1] - span[0] == prod(shape) * ITEM_SIZES[dtype]
        and file in headers
        and len(xxh3) == 32
        and not xxh3.strip("0123456789abcdef")
    )


_USUAL_ENTRY = {"dtype", "shape", "chunks"}
_USUAL_CHUNK = {"offsets", "lengths", "file", "range", "xxh3"}


def _parse_spec(entry: Mapping[str, object], what: str) -> TensorSpec:
    dtype = strict_json.string(entry.get("dtype"), f"dtype of {what}")
    if dtype not in ITEM_SIZES:
        raise CorruptCheckpointError(f"{what} has unknown dtype {dtype[:40]!r}")
    shape = strict_json.integers(entry.get("shape"), f"shape of {what}")
    strides = entry.get("strides")
    parsed = None if strides is None else strict_json.integers(strides, f"strides of {what}")
    if len(shape) > MAX_DIMENSIONS or (parsed is not None and len(parsed) != len(shape)):
        raise CorruptCheckpointError(f"{what} has {len(shape)} dimensions and strides {str(strides)[:100]}")
    spec = TensorSpec(dtype, shape, parsed, strict_json.string(entry.get("device", "cpu"), f"device of {what}"))
    if prod(size for size in shape if size) >= 2**63:  # zero-size tensors too: torch refuses what int64 cannot count
        raise CorruptCheckpointError(f"{what} has impossible shape {str(shape)[:100]}")
    if parsed is not None and not is_dense(shape, parsed):
        raise CorruptCheckpointError(f"{what} has strides {str(parsed)[:100]}, which leave gaps or overlap")
    return spec


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


def _parse_chunk(value: object, spec: TensorSpec, headers: Mapping[str, tuple[int, str]], what: str) -> Chunk:
    raw = strict_json.mapping(value, f"chunk of {what}")
    file = strict_json.string(raw.get("file"), f"file of {what}")
    span = strict_json.integers(raw.get("range"), f"range of {what}")
    offsets = strict_json.integers(raw.get("offsets"), f"offsets of {what}")
    lengths = strict_json.integers(raw.get("lengths"), f"lengths of {what}")
    if file not in headers or len(span) != 2 or not len(offsets) == len(lengths) == len(spec.shape):
        raise CorruptCheckpointError(f"{what} has a chunk that does not fit its shape, or lies in no tensor file")
    if any(start + length > size for start, length, size in zip(offsets, lengths, spec.shape, strict=True)):
        raise CorruptCheckpointError(f"{what} has a chunk outside its shape {list(spec.shape)}")
    if span[1] - span[0] != prod(lengths) * ITEM_SIZES[spec.dtype]:
        raise CorruptCheckpointError(f"{what} has a chunk of {span[1] - span[0]} bytes for lengths {list(lengths)}")
    return Chunk(offsets, lengths, file, span[0], span[1], strict_json.digest(raw.get("xxh3"), what))


def _check_tiling(spec: TensorSpec, chunks: list[Chunk], what: str) -> None:
    """Chunks cover the tensor exactly once.

    A sum of boxes equals the whole box exactly if their corners, each counted with the sign (-1) ** (number of upper
    ends), add up to the corners of the whole box. That takes linear time, where comparing pairs takes quadratic.
    """
    if len(chunks) == 1 and chunks[0].lengths == spec.shape:
        return
    whole = Chunk((0,) * len(spec.shape), spec.shape, "", 0, 0, "")
    cut = [d for d in range(len(spec.shape)) if any(chunk.lengths[d] != spec.shape[d] for chunk in chunks)]
    if len(cut) > MAX_CUT_DIMENSIONS:
        raise CorruptCheckpointError(f"{what} is cut along {len(cut)} dimensions, at most {MAX_CUT_DIMENSIONS} may be")
    corners: Counter[tuple[int, ...]] = Counter()
    for chunk in chunks:
        _add_corners(corners, chunk, cut, 1)
    _add_corners(corners, whole, cut, -1)
    if any(corners.values()) or not chunks:
        raise CorruptCheckpointError(f"the chunks of {what} do not cover its shape {list(spec.shape)} exactly once")


def _add_corners(corners: Counter[tuple[int, ...]], chunk: Chunk, dimensions: list[int], sign: int) -> None:
    for ends in product((0, 1), repeat=len(dimensions)):
        point = tuple([chunk.offsets[d] + end * chunk.lengths[d] for d, end in zip(dimensions, ends, strict=True)])
        corners[point] += sign * (-1) ** sum(ends)


def _check_coverage(
    chunks: Iterable[tuple[Chunk, ...]], headers: Mapping[str, tuple[int, str]], sizes: Mapping[str, int]
) -> None:
    """Header and chunks fill every safetensors file without a gap and without an overlap."""
    spans: dict[str, list[tuple[int, int]]] = {path: [] for path in headers}
    for parts in chunks:
        for chunk in parts:
            spans[chunk.file].append((chunk.begin, chunk.end))
    for path, ranges in spans.items():
        position = headers[path][0]
        for begin, end in sorted(ranges):
            if begin != position:
                raise CorruptCheckpointError(f"bytes {min(begin, position)} of {path!r} are claimed twice or by nobody")
            position = end
        if position != sizes[path]:
            raise CorruptCheckpointError(f"{path!r} has {sizes[path]} bytes, the index accounts for {position}")


def _tensor_to_json(spec: TensorSpec, chunks: Iterable[Chunk]) -> dict[str, object]:
    result: dict[str, object] = {"dtype": spec.dtype, "shape": list(spec.shape)}
    if spec.strides is not None:
        result["strides"] = list(spec.strides)
    if spec.device != "cpu":
        result["device"] = spec.device
    result["chunks"] = [
        {
            "offsets": list(chunk.offsets),
            "lengths": list(chunk.lengths),
            "file": chunk.file,
            "range": [chunk.begin, chunk.end],
            "xxh3": chunk.xxh3,
        }
        for chunk in chunks
    ]
    return result
