"""What differs between two checkpoints: environment, settings, tensors.

Trees are compared as the index describes them, without torch. Tensors whose chunks have the same hashes are equal and
never read; the rest is read in blocks from both sides at once, each checked against its hash, so that memory stays the
same whatever the size. Only the arithmetic on differing blocks needs torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import ITEM_SIZES, Chunk, Component, Json, TensorSpec
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.tree_text import Node, describe_component
from checkpointer.repository.checkpoint_reader import CheckpointReader
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage

if TYPE_CHECKING:
    import torch

UNCOMPARED_META = frozenset({"inner", "shapes", "devices", "dtypes", "class", "defaults"})
"""Of a component's meta: what follows from its tensors, from its class, or from the machine."""


class Change(NamedTuple):
    """One value that is not the same; ``None`` where a side lacks it. Values are written as Python writes them."""

    path: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class TensorChange:
    """A tensor of one dtype and shape with other bytes."""

    key: str
    """Component and key: ``model.0.weight``."""
    spec: TensorSpec
    elements: int
    """How many elements differ in their bits."""
    largest: float | None
    """The largest absolute difference, in float64, of elements that are numbers on both sides; infinity where one
    is infinite. ``None`` where there is no such pair, or the dtype is not one of numbers."""
    became_nan: int = 0
    """Elements that are NaN in the second and not in the first."""
    was_nan: int = 0
    """Elements that are NaN in the first and not in the second."""


@dataclass(frozen=True)
class Comparison:
    """Everything in which checkpoint ``b`` is not as ``a``."""

    a: CheckpointInfo
    b: CheckpointInfo
    environment: tuple[Change, ...]
    """What they were written with. No part of the state: checkpoints that differ in nothing else are equal."""
    settings: tuple[Change, ...]
    """Values that are no tensors; tensors of another dtype or shape; keys that only one side has."""
    tensors: tuple[TensorChange, ...]
    """Largest difference first."""
    equal_tensors: int
    """How many tensors are the same, bit for bit."""

    @property
    def equal(self) -> bool:
        """Whether both hold the same state, bit for bit."""
        return not self.settings and not self.tensors


def compare(
    root: str | os.PathLike[str], a: int, b: int, *, storage_options: Mapping[str, object] | None = None
) -> Comparison:
    """Compare the checkpoints of the steps ``a`` and ``b`` of one run.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: one is damaged.
    """
    return compare_steps(Repository(open_storage(root, storage_options)), a, b)


def compare_steps(repository: Repository, a: int, b: int) -> Comparison:
    """As :func:`compare`, for an open run."""
    first, second = repository.find(a), repository.find(b)
    with repository.open(first) as left, repository.open(second) as right:
        environment = tuple(_environment(left.manifest.environment, right.manifest.environment))
        pairs = _common_tensors(left, right)
        settings = tuple(_settings(left, right))
        changed = [(key, spec) for key, spec in pairs if not _same_hashes(left, right, key)]
        tensors = [_compare_tensor(left, right, key, spec) for key, spec in changed]
    tensors.sort(key=_severity, reverse=True)
    return Comparison(first, second, environment, settings, tuple(tensors), len(pairs) - len(changed))


# ------------------------------------------------------------------------------------------------------ settings


def _environment(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[Change]:
    for name in {**a, **b}:
        before, after = (repr(side[name]) if name in side else None for side in (a, b))
        if before != after:
            yield Change(name, before, after)


def _settings(left: CheckpointReader, right: CheckpointReader) -> Iterator[Change]:
    ours, others = left.index.components, right.index.components
    for name in {**ours, **others}:
        if name not in ours or name not in others:
            sides = [_summary(side[name]) if name in side else None for side in (ours, others)]
            yield Change(name, *sides)
        else:
            yield from _component(name, ours[name], others[name])


def _summary(component: Component) -> str:
    return f"a {component.kind} component of {len(component.tensors)} tensors"


def _component(name: str, a: Component, b: Component) -> Iterator[Change]:
    if a.kind != b.kind:
        yield Change(f"{name} (kind)", a.kind, b.kind)
    classes = a.meta.get("class"), b.meta.get("class")
    if None not in classes and classes[0] != classes[1]:  # one that is not known is no other one
        yield Change(f"{name} (class)", str(classes[0]), str(classes[1]))
    for key in {**a.tensors, **b.tensors}:
        sides = [_describe(side.tensors[key]) if key in side.tensors else None for side in (a, b)]
        if sides[0] != sides[1]:
            yield Change(f"{name}.{key}", *sides)
    yield from _values(name, _flat(describe_component(a)), _flat(describe_component(b)))
    yield from _values(f"{name} (meta)", _meta(a), _meta(b))


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _values(name: str, a: Mapping[str, Node], b: Mapping[str, Node]) -> Iterator[Change]:
    for path in {**a, **b}:
        sides = [_text(side.get(path)) for side in (a, b)]
        alone = None in sides and any(node is not None and node.children for node in (a.get(path), b.get(path)))
        if sides[0] != sides[1] and not alone:  # a container that one side lacks: its content says so
            yield Change(_joined(name, path), *sides)


def _text(node: Node | None) -> str | None:
    """The value; tensors and arrays, which are compared elsewhere, only by what kind of thing they are."""
    if node is None:
        return None
    return node.text if node.spec is None else node.text or "tensor"


def _flat(nodes: Sequence[Node]) -> dict[str, Node]:
    """Every value by its path: ``param_groups[0].lr``. Tensors are left out unless they are more than that."""
    found: dict[str, Node] = {}
    stack = [("", node) for node in reversed(nodes)]
    while stack:
        above, node = stack.pop()
        path = _joined(above, node.label)
        if node.spec is None or node.text:
            found[path] = node
        stack += [(path, child) for child in reversed(node.children)]
    return found


def _meta(component: Component) -> dict[str, Node]:
    kept = {key: value for key, value in component.meta.items() if key not in UNCOMPARED_META}
    return _flat(describe_component(Component("meta", kept, {})))


def _joined(above: str, label: str) -> str:
    return f"{above}{'.' if above and not label.startswith('[') else ''}{label}"


# ------------------------------------------------------------------------------------------------------- tensors


class _Key(NamedTuple):
    component: str
    key: str

    def __str__(self) -> str:
        return f"{self.component}.{self.key}"


def _common_tensors(left: CheckpointReader, right: CheckpointReader) -> list[tuple[_Key, TensorSpec]]:
    """Tensors that both sides have with one dtype and shape."""
    found: list[tuple[_Key, TensorSpec]] = []
    for name, component in left.index.components.items():
        other = right.index.components.get(name)
        for key, spec in component.tensors.items() if other else ():
            same = other.tensors.get(key) if other else None
            if same is not None and _describe(same) == _describe(spec):
                found.append((_Key(name, key), spec))
    return found


def _same_hashes(left: CheckpointReader, right: CheckpointReader, key: _Key) -> bool:
    a, b = ({(c.offsets, c.lengths, c.xxh3) for c in side.index.chunks[key]} for side in (left, right))
    return a == b


@dataclass
class _Tally:
    """What is known about one tensor's difference so far."""

    elements: int = 0
    largest: float | None = None
    became_nan: int = 0
    was_nan: int = 0


def _compare_tensor(left: CheckpointReader, right: CheckpointReader, key: _Key, spec: TensorSpec) -> TensorChange:
    tally = _Tally()
    ours, others = left.index.chunks[key], right.index.chunks[key]
    if [chunk[:2] for chunk in ours] != [chunk[:2] for chunk in others]:  # cut in another way: parts have no hash
        left.check_chunks([(str(key), chunk) for chunk in ours])
        right.check_chunks([(str(key), chunk) for chunk in others])
    for a in ours:
        for b in others:
            if a[:2] == b[:2]:
                if a.xxh3 != b.xxh3:
                    _compare_whole(left, right, (a, b), spec.dtype, tally)
            else:
                _compare_overlap(left, right, (a, b), spec.dtype, tally)
    return TensorChange(str(key), spec, tally.elements, tally.largest, tally.became_nan, tally.was_nan)


def _compare_whole(
    left: CheckpointReader, right: CheckpointReader, pair: tuple[Chunk, Chunk], dtype: str, tally: _Tally
) -> None:
    """Two chunks of the same box, which are read to their ends and so checked on the way."""
    a, b = pair
    hashers = xxhash.xxh3_128(), xxhash.xxh3_128()
    for ours, others in _blocks(left, right, pair, (0, 0), a.end - a.begin):
        hashers[0].update(ours)
        hashers[1].update(others)
        _count(ours, others, dtype, tally)
    for reader, chunk, hasher in ((left, a, hashers[0]), (right, b, hashers[1])):
        if hasher.hexdigest() != chunk.xxh3:
            raise CorruptCheckpointError(
                f"{chunk.file} of the checkpoint of step {reader.manifest.step} is damaged: bytes {chunk.begin} to "
                f"{chunk.end} do not match their hash"
            )


def _compare_overlap(
    left: CheckpointReader, right: CheckpointReader, pair: tuple[Chunk, Chunk], dtype: str, tally: _Tally
) -> None:
    """What two chunks of different boxes have in common, run by run of elements that lie together on both sides."""
    for starts, size in _runs(*pair, ITEM_SIZES[dtype]):
        for ours, others in _blocks(left, right, pair, starts, size):
            _count(ours, others, dtype, tally)


def _blocks(
    left: CheckpointReader, right: CheckpointReader, pair: tuple[Chunk, Chunk], starts: tuple[int, int], size: int
) -> Iterator[tuple[memoryview, memoryview]]:
    begins = [chunk.begin + start for chunk, start in zip(pair, starts, strict=True)]
    sides = [
        reader.blocks(chunk.file, begin, begin + size)
        for reader, chunk, begin in zip((left, right), pair, begins, strict=True)
    ]
    return zip(*sides, strict=True)


def _runs(a: Chunk, b: Chunk, item: int) -> Iterator[tuple[tuple[int, int], int]]:
    """``((byte in a, byte in b), bytes)`` of each contiguous run of what the boxes have in common."""
    dimensions = range(len(a.lengths))
    begins = [max(a.offsets[d], b.offsets[d]) for d in dimensions]
    ends = [min(a.offsets[d] + a.lengths[d], b.offsets[d] + b.lengths[d]) for d in dimensions]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    if min(lengths, default=1) <= 0:
        return
    whole = len(lengths)  # dimensions from here on lie together on both sides
    while whole > 0 and all(chunk.lengths[whole - 1] == lengths[whole - 1] for chunk in (a, b)):
        whole -= 1
    outer = max(whole - 1, 0)
    size = math.prod(lengths[outer:]) * item
    for point in product(*[range(length) for length in lengths[:outer]]):
        place = [begin + step for begin, step in zip(begins, [*point, *[0] * len(lengths)], strict=False)]
        yield (_byte(a, place) * item, _byte(b, place) * item), size


def _byte(chunk: Chunk, place: Sequence[int]) -> int:
    """Which element of a row-major chunk lies at ``place`` of the whole tensor."""
    number = 0
    for offset, length, at in zip(chunk.offsets, chunk.lengths, place, strict=True):
        number = number * length + at - offset
    return number


# ---------------------------------------------------------------------------------------------------- arithmetic


def _count(ours: memoryview, others: memoryview, dtype: str, tally: _Tally) -> None:
    """Add the differences between two blocks of the same elements."""
    if ours == others:
        return
    import torch  # only here: most of a comparison needs none of it

    item = ITEM_SIZES[dtype]
    a, b = (torch.frombuffer(block, dtype=torch.uint8).view(-1, item) for block in (ours, others))
    differing = (a != b).any(1)
    tally.elements += int(differing.sum())
    numbers = [_numbers(side[differing], dtype) for side in (a, b)]
    if numbers[0] is not None and numbers[1] is not None:
        _measure(numbers[0], numbers[1], tally)


def _numbers(raw: torch.Tensor, dtype: str) -> torch.Tensor | None:
    """Elements (uint8, [elements, bytes of one]) as float64 or complex128; ``None`` for dtypes of bare bits."""
    import torch

    try:
        values = raw.reshape(-1).view(getattr(torch, dtype))
        return values.to(torch.complex128 if values.is_complex() else torch.float64)
    except (RuntimeError, AttributeError):  # another version of torch may lack the dtype
        return None


def _measure(a: torch.Tensor, b: torch.Tensor, tally: _Tally) -> None:
    import torch

    nan_a, nan_b = torch.isnan(a), torch.isnan(b)
    tally.became_nan += int((nan_b & ~nan_a).sum())
    tally.was_nan += int((nan_a & ~nan_b).sum())
    distance = torch.where(a == b, 0.0, (a - b).abs())[~(nan_a | nan_b)]
    if distance.numel():
        found = torch.nan_to_num(distance, nan=math.inf, posinf=math.inf).max().item()  # inf - inf of complex parts
        tally.largest = found if tally.largest is None else max(tally.largest, found)


def _severity(change: TensorChange) -> tuple[bool, float, int]:
    largest = -1.0 if change.largest is None else change.largest
    return bool(change.became_nan or change.was_nan), largest, change.elements
