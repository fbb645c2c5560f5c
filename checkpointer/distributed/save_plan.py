"""One save by all ranks: what each of them writes is agreed on before anything is copied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from checkpointer.distributed.exchange import Ranks
from checkpointer.distributed.partition import (
    LocalTensor,
    Partition,
    RankTensors,
    assign_writes,
    partition_from_json,
    partition_to_json,
    rank_tensors_from_json,
    rank_tensors_to_json,
)
from checkpointer.errors import SaveError, UnsupportedStateError
from checkpointer.format import strict_json
from checkpointer.format.boxes import Box, whole
from checkpointer.format.index import Component, TensorSpec
from checkpointer.format.tensor_files import FileNaming
from checkpointer.staging.stager import hash_tensors
from checkpointer.state.dtensor import is_sharded, local_box, local_part
from checkpointer.state.protocol import Captured
from checkpointer.state.tensors import dtype_name, spec_of
from checkpointer.system import messages

OWN = "own/"
"""How a rank calls, to itself, what it has of a component otherwise than the coordinator."""

SAMPLE = 32
"""Elements of a tensor that are compared over the ranks."""

VALUES, MATRICES = 16, 64
"""Elements of a matrix whose values are compared, and of how many matrices: the message stays small."""

ROUNDING = 0.01
"""Norm of the difference, relative to the larger one, that replicas may get by rounding; other tensors: about 1.4."""

SAMPLE_DIGITS = 8
"""Of their hash: a chance in four billion to miss a tensor that differs."""

_DEVICES = "devices"
"""A member of an optimizer's meta: it names this rank's own device, which says nothing about the state."""


@dataclass(frozen=True)
class RankPlan:
    """What this rank writes of one save."""

    ranks: Ranks
    """For what the writer has to say to the others."""
    captured: Mapping[str, Captured]
    """This rank's parts of the components; and under names that begin with ``OWN`` what differs here."""
    components: Mapping[str, Component]
    """The components as the index describes them: with the coordinator's trees, and all tensors as a whole."""
    boxes: Mapping[tuple[str, str], Box]
    """What each tensor of ``captured`` is of the whole one, where it is a part."""

    @property
    def coordinator(self) -> bool:
        """Whether this rank commits."""
        return self.ranks.rank == 0


class _Offer(NamedTuple):
    """What a rank says before a save."""

    step: int
    names: list[str]
    digests: dict[str, str]
    """Of what a component holds beside the tensors that are shared out."""
    holding: Any
    """As JSON. ``None``: as at the last save."""
    samples: dict[str, str] = {}  # noqa: RUF012  a default of a named tuple, which nobody changes
    """With a holding: a hash of some elements of each plain tensor that should be equal on all ranks."""
    values: dict[str, list[float]] = {}  # noqa: RUF012  as above
    """With a holding: some elements of some matrices among the parameters, to tell drift from another tensor."""


class _Answer(NamedTuple):
    """What the coordinator makes of it."""

    partition: Any
    """As JSON. ``None``: as at the last save."""
    own: list[list[str]]
    """For each rank, the components that it has otherwise than the coordinator."""


class SavePlanner:
    """The saves of one manager. What has not changed since the last one is not said again."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._writers = ranks.beside("writer")
        self._holding: RankTensors | None = None
        self._holdings: list[RankTensors] = []
        """Of all ranks; known to the coordinator alone."""
        self._partition: Partition | None = None

    def plan(self, step: int, capture: Callable[[], Mapping[str, Captured]]) -> RankPlan:
        """Capture, and agree with the other ranks on who writes what.

        Raises:
            CheckpointerError: on all ranks, if one of them cannot take part.
        """
        if self._ranks.size == 1:
            return _everything(self._ranks, capture())
        with self._ranks.exchange(f"the save of step {step}") as exchange:
            captured = capture()
            holding = _holding_of(captured)
            offers = exchange.gather(self._offer(step, captured, holding), _Offer)
            answer = exchange.broadcast(None if offers is None else self._answer(offers), _Answer)
        self._holding = holding
        if answer.partition is not None and self._ranks.rank:  # the coordinator's has the specs, too
            self._partition = partition_from_json(answer.partition)
        assert self._partition is not None
        return self._part(captured, holding, self._partition, answer.own[self._ranks.rank])

    def _offer(self, step: int, captured: Mapping[str, Captured], holding: RankTensors) -> _Offer:
        digests = {name: _digest(part, holding.components[name]) for name, part in captured.items()}
        if holding == self._holding:
            return _Offer(step, list(captured), digests, None)
        samples, values = _samples(captured, holding), _values(captured, holding)
        return _Offer(step, list(captured), digests, rank_tensors_to_json(holding), samples, values)

    def _answer(self, offers: Sequence[_Offer]) -> _Answer:
        """On the coordinator."""
        first = offers[0]
        for rank, offer in enumerate(offers):
            if (offer.step, offer.names) != (first.step, first.names):
                raise SaveError(
                    f"rank {rank} saves step {offer.step} of {', '.join(offer.names)}, and rank 0 saves step "
                    f"{first.step} of {', '.join(first.names)}: every rank has to make the same calls, in one order"
                )
        known = self._holdings or [RankTensors({}, {}) for _ in offers]
        told = {rank: offer for rank, offer in enumerate(offers) if offer.holding is not None}
        self._holdings = [
            rank_tensors_from_json(told[rank].holding) if rank in told else last for rank, last in enumerate(known)
        ]
        if told:
            self._partition = assign_writes(self._holdings)
            _refuse_unrelated({rank: offer.values for rank, offer in told.items()})
            _warn_of_unequal({rank: offer.samples for rank, offer in told.items()})
        own = [[name for name in first.names if offer.digests[name] != first.digests[name]] for offer in offers]
        partition = partition_to_json(self._partition) if told and self._partition is not None else None
        return _Answer(partition, own)

    def _part(
        self, captured: Mapping[str, Captured], holding: RankTensors, partition: Partition, own: Iterable[str]
    ) -> RankPlan:
        rank = self._ranks.rank
        parts: dict[str, Captured] = {}
        boxes: dict[tuple[str, str], Box] = {}
        for name, part in captured.items():
            keys = partition.writes[rank].get(name, ())
            for key in keys:
                box = holding.components[name][key].box
                if box is not None:
                    boxes[name, key] = box
            parts[name] = _narrowed(part, keys, partition.naming(name, rank))
        for name in own:
            keys = [key for key, held in holding.components[name].items() if not held.replicated]
            parts[OWN + name] = _narrowed(captured[name], keys, FileNaming(rank, own=True))
        components = {}
        if rank == 0:
            specs = partition.specs
            components = {
                name: Component(part.kind, part.tree, specs.get(name, {}), part.meta) for name, part in captured.items()
            }
        return RankPlan(self._writers, parts, components, boxes)


def _everything(ranks: Ranks, captured: Mapping[str, Captured]) -> RankPlan:
    """The share of a process that is alone; a DTensor on a mesh of one is a whole tensor."""
    parts = {
        name: _narrowed(part, part.tensors, None) if any(map(is_sharded, part.tensors.values())) else part
        for name, part in captured.items()
    }
    return RankPlan(ranks, parts, {}, {})


def _narrowed(part: Captured, keys: Iterable[str], naming: FileNaming | None) -> Captured:
    """What is in this process of the tensors under ``keys``."""
    tensors = {key: local_part(part.tensors[key]) for key in keys}
    aliases = {alias: key for alias, key in part.aliases.items() if key in tensors}
    return replace(
        part,
        tensors=tensors,
        aliases=aliases,
        frozen=part.frozen & tensors.keys(),
        trainable=part.trainable & tensors.keys(),
        naming=naming,
    )


def _holding_of(captured: Mapping[str, Captured]) -> RankTensors:
    components = {
        name: {
            key: _held(f"{name}.{key}", tensor, replicated=key in part.trainable, frozen=key in part.frozen)
            for key, tensor in part.tensors.items()
        }
        for name, part in captured.items()
    }
    parameters = {name: found for name, part in captured.items() if (found := _parameters_of(part))}
    return RankTensors(components, {name: part.kind for name, part in captured.items()}, parameters)


def _parameters_of(part: Captured) -> list[str]:
    """What the parameters of an optimizer are called, group by group, and their shapes."""
    names, shapes = part.meta.get("params"), part.meta.get("shapes")
    if part.kind != "optimizer" or not isinstance(names, list) or not isinstance(shapes, list):
        return []
    found: list[str] = []
    for group, (of_group, their_shapes) in enumerate(zip(names, shapes, strict=True)):
        assert isinstance(of_group, list)
        assert isinstance(their_shapes, list)
        found += [
            f"{name or 'unnamed'} {shape}, parameter {number} of group {group}"
            for number, (name, shape) in enumerate(zip(of_group, their_shapes, strict=True))
        ]
    return found


def _held(name: str, tensor: torch.Tensor, *, replicated: bool, frozen: bool) -> LocalTensor:
    if not is_sharded(tensor):
        spec = spec_of(tensor)
        return LocalTensor(spec, whole(spec.shape), replicated, frozen)
    try:
        found = local_box(tensor)
    except UnsupportedStateError as error:
        raise UnsupportedStateError(f"{name}: {error}") from error
    spec = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape), device=str(tensor.device))
    return LocalTensor(spec, None if found is None else Box(*found), replicated=True, frozen=frozen, sharded=True)


def _samples(captured: Mapping[str, Captured], holding: RankTensors) -> dict[str, str]:
    """A hash of some elements of each plain parameter and moment."""
    keys = [
        (name, key)
        for name, tensors in holding.components.items()
        for key, held in tensors.items()
        if held.replicated and not held.sharded
    ]
    hashes = hash_tensors([_some_of(captured[name].tensors[key]) for name, key in keys])
    return {f"{name}.{key}": found[:SAMPLE_DIGITS] for (name, key), found in zip(keys, hashes, strict=True)}


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements of the row in the middle."""
    row = tensor
    while row.ndim > 1 and row.numel():
        row = row[len(row) // 2]
    return row[:SAMPLE] if row.ndim else row


def _values(captured: Mapping[str, Captured], holding: RankTensors) -> dict[str, list[float]]:
    """Elements from all over some matrices of modules. Moments may be noise, and biases next to nothing."""
    found = [
        (f"{name}.{key}", captured[name].tensors[key])
        for name, tensors in holding.components.items()
        for key, held in tensors.items()
        if captured[name].kind == "module" and held.replicated and not held.sharded
    ]
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found = [(key, item) for key, item in found if item.ndim > 1 and item.numel() >= VALUES and item.dtype in dtypes]
    return {key: _spread(tensor) for key, tensor in found[:: max(1, -(-len(found) // MATRICES))]}


def _spread(tensor: torch.Tensor) -> list[float]:
    flat = torch.arange(VALUES, device=tensor.device) * (tensor.numel() // VALUES)
    picked = tensor.detach()[torch.unravel_index(flat, tensor.shape)].double().nan_to_num(0.0, 0.0, 0.0)
    return [float(f"{value:.6g}") for value in picked.tolist()]


def _refuse_unrelated(values: Mapping[int, Mapping[str, Sequence[float]]]) -> None:
    """On the coordinator: most matrices differ by more than any rounding, so the ranks hold different models."""
    first, known = next(iter(values.items()))
    for rank, found in values.items():
        other = [key for key, ours in found.items() if key in known and _distance(ours, known[key]) > ROUNDING]
        if 2 * len(other) > len(found):
            raise UnsupportedStateError(
                f"ranks {first} and {rank} hold different tensors under the same keys: {len(other)} of {len(found)} "
                f"matrices that were compared differ by more than rounding, for example {other[0]!r}. A manager writes "
                "one model for all ranks, and would lose one of them. Stages of a pipeline, or replicas that train "
                "apart, save with checkpointer.dcp, under keys that differ over the ranks; replicas that should be "
                "equal begin from one seed, or under DistributedDataParallel"
            )


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    larger = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / larger if larger else 0.0


def _warn_of_unequal(samples: Mapping[int, Mapping[str, str]]) -> None:
    """On the coordinator: ranks may hold the same keys, and not the same tensors."""
    first, known = next(iter(samples.items()))
    for rank, found in samples.items():
        unequal = [key for key, sample in found.items() if known.get(key, sample) != sample]
        if unequal:
            messages.warn(
                f"{len(unequal)} of {len(found)} parameters and moments are not equal on ranks {first} and {rank}, for "
                f"example {unequal[0]!r}: a manager takes them for equal, as DistributedDataParallel keeps them, and "
                "writes those of either rank. Stages of a pipeline, or replicas that train apart, save with "
                "checkpointer.dcp, under keys that differ over the ranks",
            )
            return


def _digest(part: Captured, held: Mapping[str, LocalTensor]) -> str:
    """Equal on two ranks that have the same of a component, beside what is shared out."""
    meta = {name: value for name, value in part.meta.items() if name != _DEVICES}
    keys = [key for key, tensor in held.items() if not tensor.replicated]
    hashes = hash_tensors([part.tensors[key] for key in keys])
    told = strict_json.dumps([part.tree, meta, keys, hashes])
    return hashlib.sha256(told.encode("ascii")).hexdigest()
