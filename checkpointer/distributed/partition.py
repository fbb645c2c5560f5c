"""Who writes what: the tensors of all ranks, divided so that every box is written once and the work is even. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from checkpointer.errors import UnsupportedStateError
from checkpointer.format import strict_json
from checkpointer.format.boxes import Box, whole
from checkpointer.format.index import ITEM_SIZES, Json, TensorSpec
from checkpointer.format.tensor_files import ComponentTensors, FileNaming, count_files


class LocalTensor(NamedTuple):
    """A tensor of which a rank holds all or a part."""

    spec: TensorSpec
    """Of the whole tensor."""
    box: Box | None
    """What the rank holds of it; ``None``: nothing."""
    replicated: bool
    """Whether equal boxes of different ranks hold equal values, so that any of them may write. Else the lowest does:
    buffers, for one, are those of rank 0 after each forward pass of DistributedDataParallel."""
    frozen: bool = False
    sharded: bool = False
    """Whether it is a DTensor."""


@dataclass(frozen=True)
class RankTensors:
    """What one rank holds, by component and key."""

    components: Mapping[str, Mapping[str, LocalTensor]]
    kinds: Mapping[str, str]
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of each optimizer: what its parameters are called, in order, and their shapes. Its state has numbers alone."""


class Numbers(NamedTuple):
    """Of one rank's files of one component, where they are shards: see ``FileNaming`` in ``format/tensor_files``."""

    first: int
    total: int


@dataclass(frozen=True)
class Partition:
    """What every rank writes."""

    writes: Sequence[Mapping[str, Sequence[str]]]
    """For each rank, the keys of each component."""
    cut: frozenset[str]
    """Components with a tensor that is in more than one piece."""
    numbers: Sequence[Mapping[str, Numbers]]
    """For each rank, those of each component that is not cut."""
    specs: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    """All tensors of each component. Known to the coordinator alone."""

    def naming(self, component: str, rank: int) -> FileNaming:
        """How the files of one rank are called."""
        numbers = self.numbers[rank].get(component)
        if component in self.cut or numbers is None:
            return FileNaming(rank, cut=component in self.cut)
        return FileNaming(rank, first=numbers.first, total=numbers.total)


def assign_writes(holdings: Sequence[RankTensors]) -> Partition:
    """Let each box be written by the rank with the least to write of those that hold it; the largest first.

    What is frozen is divided by itself: most saves share it with an earlier checkpoint, and write the rest alone.

    Raises:
        UnsupportedStateError: a component, or a tensor, is not the same on all ranks.
    """
    check_alike(holdings)
    writes: list[dict[str, list[str]]] = [{} for _ in holdings]
    load = {frozen: [0] * len(holdings) for frozen in (False, True)}
    claims = sorted(_claims(holdings), key=lambda claim: (-claim.size, claim.component, claim.key, claim.box))
    for claim in claims:
        candidates = claim.ranks if claim.replicated else claim.ranks[:1]
        rank = min(candidates, key=_by_load(load[claim.frozen], load[not claim.frozen]))
        load[claim.frozen][rank] += claim.size
        writes[rank].setdefault(claim.component, []).append(claim.key)
    ordered = [_in_order(holding, keys) for holding, keys in zip(holdings, writes, strict=True)]
    specs = _specs(holdings)
    cut = frozenset(claim.component for claim in claims if claim.box.lengths != specs[claim.component][claim.key].shape)
    return Partition(ordered, cut, _numbered(holdings, ordered, cut), specs)


def check_alike(holdings: Sequence[RankTensors]) -> None:
    """Refuse ranks that hold different modules or optimizers. What each rank has of its own may differ.

    Raises:
        UnsupportedStateError: a component has parameters, or state of an optimizer, that not all ranks have.
    """
    for name, kind in holdings[0].kinds.items():
        others = {rank: holding.kinds[name] for rank, holding in enumerate(holdings) if holding.kinds[name] != kind}
        if others:
            rank, other = next(iter(others.items()))
            raise UnsupportedStateError(
                f"component {name!r} is not the same on all ranks: a {kind} on rank 0, a {other} on rank {rank}. "
                "Register the same components on every rank"
            )
        for keys_of in (_parameters_of, _keys_that_all_hold):
            found = [keys_of(holding, name) for holding in holdings]
            if any(keys != found[0] for keys in found):
                raise UnsupportedStateError(_unlike(name, found))


def _parameters_of(holding: RankTensors, name: str) -> dict[str, None]:
    return dict.fromkeys(holding.parameters.get(name, ()))


def _keys_that_all_hold(holding: RankTensors, name: str) -> dict[str, None]:
    """Those of parameters and moments; a rank outside the mesh of a DTensor has no moments of it."""
    moments = holding.kinds[name] == "optimizer"
    tensors = holding.components[name].items()
    return dict.fromkeys(key for key, held in tensors if held.replicated and not (moments and held.sharded))


def _unlike(name: str, found: Sequence[Mapping[str, None]]) -> str:
    """What to say of ranks that hold the keys in ``found``."""
    groups: dict[frozenset[str], list[int]] = {}
    for rank, keys in enumerate(found):
        groups.setdefault(frozenset(keys), []).append(rank)
    common = frozenset.intersection(*groups)
    told = [
        f"{_ranks(ranks)} alone: {_some([key for key in found[ranks[0]] if key not in common])}"
        for keys, ranks in list(groups.items())[:4]
        if keys - common
    ]
    return (
        f"component {name!r} is not the same on all ranks ({'; '.join(told)}). A manager saves modules and optimizers "
        "that every rank holds: replicated, or as DTensors. Ranks that hold different ones, as stages of a pipeline, "
        "save them with checkpointer.dcp.save, which joins the keys of all ranks "
        "(torch.distributed.checkpoint.state_dict.get_state_dict names them). Nothing was written"
    )


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(map(repr, keys[:4])) + more


def _by_load(alike: Sequence[int], others: Sequence[int]) -> Callable[[int], tuple[int, int, int]]:
    """The order of ranks by bytes to write of the same sort, then of the other sort, then by number."""
    return lambda rank: (alike[rank], others[rank], rank)


class _Claim(NamedTuple):
    component: str
    key: str
    box: Box
    size: int
    replicated: bool
    frozen: bool
    ranks: tuple[int, ...]
    """Who holds it."""


def _claims(holdings: Sequence[RankTensors]) -> Iterator[_Claim]:
    """Every different box of every tensor."""
    holders: dict[tuple[str, str, Box], list[int]] = {}
    for rank, holding in enumerate(holdings):
        for name, tensors in holding.components.items():
            for key, held in tensors.items():
                if held.box is not None:
                    holders.setdefault((name, key, held.box), []).append(rank)
    for (name, key, box), ranks in holders.items():
        held = holdings[ranks[0]].components[name][key]
        size = box.numel * ITEM_SIZES[held.spec.dtype]
        yield _Claim(name, key, box, size, held.replicated, held.frozen, tuple(ranks))


def _specs(holdings: Sequence[RankTensors]) -> dict[str, dict[str, TensorSpec]]:
    found: dict[str, dict[str, TensorSpec]] = {}
    for rank, holding in enumerate(holdings):
        for name, tensors in holding.components.items():
            known = found.setdefault(name, {})
            for key, held in tensors.items():
                spec = known.setdefault(key, held.spec)
                if (spec.dtype, spec.shape) != (held.spec.dtype, held.spec.shape):
                    first = next(rank for rank, other in enumerate(holdings) if key in other.components[name])
                    raise UnsupportedStateError(
                        f"{name}.{key} is {spec.dtype} {list(spec.shape)} on rank {first} and {held.spec.dtype} "
                        f"{list(held.spec.shape)} on rank {rank}: only a DTensor may be in parts. Nothing was written"
                    )
    return found


def _in_order(holding: RankTensors, writes: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The keys in the order of the component, in which they are written."""
    chosen = {name: set(keys) for name, keys in writes.items()}
    return {
        name: [key for key in tensors if key in chosen[name]]
        for name, tensors in holding.components.items()
        if name in chosen
    }


def _numbered(
    holdings: Sequence[RankTensors], writes: Sequence[Mapping[str, Sequence[str]]], cut: frozenset[str]
) -> list[dict[str, Numbers]]:
    counts: dict[str, list[int]] = {}
    for rank, (holding, chosen) in enumerate(zip(holdings, writes, strict=True)):
        for name, keys in chosen.items():
            if name not in cut:
                tensors = holding.components[name]
                frozen = frozenset(key for key in keys if tensors[key].frozen)
                part = ComponentTensors(holding.kinds[name], {key: tensors[key].spec for key in keys}, frozen)
                counts.setdefault(name, [0] * len(holdings))[rank] = count_files(part)
    return [
        {name: Numbers(1 + sum(of_ranks[:rank]), sum(of_ranks)) for name, of_ranks in counts.items() if of_ranks[rank]}
        for rank in range(len(holdings))
    ]


# ------------------------------------------------------------------------------------ as JSON


def rank_tensors_to_json(holding: RankTensors) -> Json:
    """For the coordinator."""
    return {
        name: {
            "kind": holding.kinds[name],
            "tensors": {key: _held_to_json(held) for key, held in tensors.items()},
            "parameters": list(holding.parameters.get(name, ())),
        }
        for name, tensors in holding.components.items()
    }


def _held_to_json(held: LocalTensor) -> Json:
    spec = held.spec
    strides: Json = None if spec.strides is None else list(spec.strides)
    box: Json = None if held.box is None else [list(held.box.offsets), list(held.box.lengths)]
    if held.box == whole(spec.shape):
        box = True
    return [spec.dtype, list(spec.shape), strides, spec.device, box, held.replicated, held.frozen, held.sharded]


def rank_tensors_from_json(raw: Json) -> RankTensors:
    """The inverse of :func:`rank_tensors_to_json`."""
    found: dict[str, dict[str, LocalTensor]] = {}
    kinds: dict[str, str] = {}
    parameters: dict[str, list[str]] = {}
    for name, part in strict_json.mapping(raw, "holding").items():
        kinds[name] = part["kind"]
        if part["parameters"]:
            parameters[name] = part["parameters"]
        found[name] = {key: _held_from_json(value) for key, value in part["tensors"].items()}
    return RankTensors(found, kinds, parameters)


def _held_from_json(raw: Any) -> LocalTensor:
    dtype, shape, strides, device, box, *flags = raw
    spec = TensorSpec(dtype, tuple(shape), None if strides is None else tuple(strides), device)
    if box is True:
        return LocalTensor(spec, whole(spec.shape), *flags)
    return LocalTensor(spec, None if box is None else Box(tuple(box[0]), tuple(box[1])), *flags)


def partition_to_json(partition: Partition) -> Json:
    """For the other ranks."""
    return {
        "writes": [{name: list(keys) for name, keys in part.items()} for part in partition.writes],
        "cut": list[Json](sorted(partition.cut)),
        "numbers": [{name: list(numbers) for name, numbers in part.items()} for part in partition.numbers],
    }


def partition_from_json(raw: Json) -> Partition:
    """The inverse of :func:`partition_to_json`, without the specs."""
    parts = strict_json.mapping(raw, "division")
    numbers = [{name: Numbers(*pair) for name, pair in part.items()} for part in parts["numbers"]]
    return Partition(parts["writes"], frozenset(parts["cut"]), numbers)
