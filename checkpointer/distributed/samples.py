"""Samples of what replicas should hold with one value: equal descriptions do not prove equal values.

Each rank hashes some elements of some tensors, the same ones on all ranks of a class, other ones at each save. Only
where the hashes differ are some of these ranks asked for details, from which the coordinator tells drift by rounding
from another model (docs/decisions/024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from checkpointer.distributed.classes import ADVICE, Seat
from checkpointer.distributed.ownership import ClassPlan, PlannedTensor
from checkpointer.staging.sample import scrambled
from checkpointer.staging.stager import hash_tensors
from checkpointer.state.dtensor import local_part
from checkpointer.state.protocol import Captured

TENSORS = 128
"""Of each form of a class, at every save but the first after a change, which looks at all of them."""

ELEMENTS = 32
"""Of each tensor, side by side."""

VALUES, MATRICES = 16, 64
"""Elements of a matrix whose values are compared, and of how many matrices: the message stays small."""

ROUNDING = 0.01
"""Norm of the difference, relative to the larger one, that replicas may get by rounding; other tensors: about 1.4."""

MOST_PAIRS = 4
"""Of ranks that are asked for details: one is enough to say what is wrong."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Sample(NamedTuple):
    """What a rank says of the tensors of one form in one class."""

    number: int
    """Of the class."""
    form: int
    shard: int
    digest: bytes
    """8 bytes. Equal on all ranks with the same numbers before."""


class Detail(NamedTuple):
    """One tensor that was looked at, in detail."""

    digest: bytes
    values: tuple[float, ...] = ()
    """Elements from all over it, if it is a matrix of a module. Moments may be noise, and biases next to nothing."""


class Finding(NamedTuple):
    """What two ranks have that should be equal, and is not."""

    message: str
    apart: bool
    """Whether no rounding explains it: then one of two models would be lost."""


def samples(
    captured: Mapping[str, Captured], plans: Sequence[tuple[Seat, ClassPlan]], step: int, *, everything: bool
) -> list[Sample]:
    """Of what this rank has in its classes, where another rank should have the same."""
    found = []
    for seat, plan in plans:
        for form, numbers in _chosen(plan, step, everything=everything):
            pieces = [_piece(tensor, step) for _, tensor in _tensors(captured, plan, numbers)]
            shard = plan.forms[form].place(seat.group, seat.cell).shard
            found.append(Sample(seat.number, form, shard, _digest(pieces)))
    return found


def ranks_to_ask(told: Sequence[Sequence[Sample]]) -> list[tuple[int, int]]:
    """Pairs of ranks that differ where they should not. ``told``: what each rank says."""
    first: dict[tuple[int, int, int], tuple[int, bytes]] = {}
    pairs: dict[tuple[int, int], None] = {}
    for rank, found in enumerate(told):
        for sample in found:
            lowest, digest = first.setdefault(sample[:3], (rank, sample.digest))
            if digest != sample.digest and len(pairs) < MOST_PAIRS:
                pairs[lowest, rank] = None
    return list(pairs)


def details(
    captured: Mapping[str, Captured], plans: Sequence[tuple[Seat, ClassPlan]], step: int, *, everything: bool
) -> dict[str, Detail]:
    """Of each tensor that :func:`samples` looks at, by name."""
    found: dict[str, Detail] = {}
    matrices = 0
    for _, plan in plans:
        for _, numbers in _chosen(plan, step, everything=everything):
            for planned, tensor in _tensors(captured, plan, numbers):
                module = plan.kinds[planned.component] == "module"
                values = _values(tensor) if module and matrices < MATRICES else ()
                matrices += bool(values)
                name = f"{planned.component}.{planned.entry.name}"
                found[name] = Detail(_digest([_piece(tensor, step)]), values)
    return found


def compare(ranks: tuple[int, int], first: Mapping[str, Detail], second: Mapping[str, Detail]) -> Finding | None:
    """What to say of two ranks that :func:`ranks_to_ask` names; ``None``: nothing that they both looked at differs."""
    common = [name for name in first if name in second]
    unequal = [name for name in common if first[name].digest != second[name].digest]
    if not unequal:
        return None
    pairs = {name: (first[name].values, second[name].values) for name in common if first[name].values}
    apart = [name for name, (a, b) in pairs.items() if len(a) == len(b) and _distance(a, b) > ROUNDING]
    if 2 * len(apart) > len(pairs):
        return Finding(
            f"ranks {ranks[0]} and {ranks[1]} hold different tensors under the same keys: {len(apart)} of "
            f"{len(pairs)} matrices that were compared differ by more than rounding, for example {apart[0]!r}. "
            f"{ADVICE}; replicas that should be equal begin from one seed, or under DistributedDataParallel",
            apart=True,
        )
    return Finding(
        f"{len(unequal)} of {len(common)} parameters and moments are not equal on ranks {ranks[0]} and {ranks[1]}, for "
        f"example {unequal[0]!r}: a manager takes them for equal, as DistributedDataParallel keeps them, and writes "
        "those of either rank",
        apart=False,
    )


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    larger = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / larger if larger else 0.0


# ------------------------------------------------------------------------------------ which, and where in them


def _chosen(plan: ClassPlan, step: int, *, everything: bool) -> Iterator[tuple[int, list[int]]]:
    """For each form of which the class has several replicas: numbers of tensors, the same on all its ranks."""
    shared = np.array([tensor.sort != "own" for tensor in plan.tensors], bool)
    for number, form in enumerate(plan.forms):
        if plan.seats == form.shards:
            continue
        found = np.flatnonzero(shared & (plan.table.layout == number))
        if len(found) > TENSORS and not everything:
            first = scrambled(step) % len(found)
            found = np.sort(found[(first + np.arange(TENSORS) * len(found) // TENSORS) % len(found)])
        if len(found):
            yield number, found.tolist()


def _tensors(
    captured: Mapping[str, Captured], plan: ClassPlan, numbers: Sequence[int]
) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    for number in numbers:
        planned = plan.tensors[number]
        yield planned, local_part(captured[planned.component].tensors[planned.entry.key])


def _piece(tensor: torch.Tensor, step: int) -> torch.Tensor:
    """A few elements in a row, other ones at each step, as bytes on the tensor's device."""
    count = tensor.numel()
    first = scrambled(step) % max(count - ELEMENTS + 1, 1)
    length = min(count, ELEMENTS)
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        part = tensor.as_strided((length,), (1,), tensor.storage_offset() + first)
    else:
        where = torch.arange(first, first + length, device=tensor.device)
        part = tensor[torch.unravel_index(where, tensor.shape)].resolve_conj().resolve_neg()
    return part.reshape(-1).view(torch.uint8)


def _digest(pieces: Sequence[torch.Tensor]) -> bytes:
    """Of all pieces in their order, device by device: a device is waited for once."""
    devices: dict[torch.device, list[torch.Tensor]] = {}
    for piece in pieces:
        devices.setdefault(piece.device, []).append(piece)
    hashes = hash_tensors([torch.cat(found) for found in devices.values()])
    return xxhash.xxh3_64_digest("".join(hashes).encode("ascii"))


def _values(tensor: torch.Tensor) -> tuple[float, ...]:
    """A few elements of a matrix; those of low precision and all else have none."""
    if tensor.ndim < 2 or tensor.numel() < VALUES or tensor.dtype not in FLOATS:
        return ()
    flat = torch.arange(VALUES, device=tensor.device) * (tensor.numel() // VALUES)
    picked = tensor[torch.unravel_index(flat, tensor.shape)].double().nan_to_num(0.0, 0.0, 0.0)
    return tuple(float(f"{value:.6g}") for value in picked.tolist())
