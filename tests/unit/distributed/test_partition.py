"""Who writes what: every element of every tensor once, by a rank that has it, evenly, and the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from checkpointer.errors import UnsupportedStateError
from checkpointer.format import tensor_files
from checkpointer.format.boxes import Box, whole
from checkpointer.format.index import ITEM_SIZES, TensorSpec
from checkpointer.format.tensor_files import ComponentTensors

ANY = settings(max_examples=100, deadline=None)
KINDS = {"model": "module", "optimizer": "optimizer", "loader": "stateful"}

Layout = str
"""``everywhere``: equal on all ranks; ``own``: on all, but not equal; ``rows``, ``columns``: cut; ``pairs``: cut into
half as many parts as there are ranks, each on two (HSDP)."""


def held_by(rank: int, size: int, spec: TensorSpec, layout: Layout, frozen: bool) -> LocalTensor:
    if layout in ("everywhere", "own"):
        return LocalTensor(spec, whole(spec.shape), layout == "everywhere", frozen)
    dimension = 1 if layout == "columns" else 0
    parts = max(size // 2, 1) if layout == "pairs" else size
    length = -(-spec.shape[dimension] // parts)  # as torch.chunk cuts: the last parts may be shorter, or empty
    begin = min(rank % parts * length, spec.shape[dimension])
    end = min(begin + length, spec.shape[dimension])
    if begin == end:
        return LocalTensor(spec, None, True, frozen, sharded=True)
    offsets, lengths = [0, 0], list(spec.shape)
    offsets[dimension], lengths[dimension] = begin, end - begin
    return LocalTensor(spec, Box(tuple(offsets), tuple(lengths)), True, frozen, sharded=True)


shapes = st.tuples(st.integers(1, 7), st.integers(1, 5))
specs = st.builds(TensorSpec, st.sampled_from(["float32", "bfloat16", "int64", "uint8"]), shapes)
layouts = st.sampled_from(["everywhere", "own", "rows", "columns", "pairs"])
described = st.dictionaries(
    st.sampled_from(list(KINDS)),
    st.dictionaries(st.sampled_from("abcdefg"), st.tuples(specs, layouts, st.booleans()), max_size=7),
)


@st.composite
def jobs(draw: st.DrawFn) -> list[RankTensors]:
    size = draw(st.integers(1, 6))
    components = draw(described)
    return [
        RankTensors(
            {
                name: {key: held_by(rank, size, *entry) for key, entry in entries.items()}
                for name, entries in components.items()
            },
            {name: KINDS[name] for name in components},
        )
        for rank in range(size)
    ]


def written(holdings: Sequence[RankTensors], division: Partition) -> dict[tuple[str, str], np.ndarray]:
    """How many times each element is written."""
    counts = {
        (name, key): np.zeros(held.spec.shape, int)
        for name, tensors in holdings[0].components.items()
        for key, held in tensors.items()
    }
    for holding, chosen in zip(holdings, division.writes, strict=True):
        for name, keys in chosen.items():
            for key in keys:
                box = holding.components[name][key].box
                assert box is not None, "a rank writes what it does not have"
                counts[name, key][tuple(slice(b, b + n) for b, n in zip(*box, strict=True))] += 1
    return counts


def loads(holdings: Sequence[RankTensors], division: Partition, *, frozen: bool) -> list[int]:
    """The bytes that each rank writes, of what is frozen or of the rest."""
    return [
        sum(
            held.box.numel * ITEM_SIZES[held.spec.dtype]
            for name, keys in chosen.items()
            for held in (holding.components[name][key] for key in keys)
            if held.frozen is frozen and held.box is not None
        )
        for holding, chosen in zip(holdings, division.writes, strict=True)
    ]


@ANY
@given(jobs())
def test_every_element_is_written_exactly_once_by_a_rank_that_has_it(holdings: list[RankTensors]) -> None:
    for place, counts in written(holdings, assign_writes(holdings)).items():
        assert (counts == 1).all(), place


@ANY
@given(jobs())
def test_what_may_differ_between_ranks_is_written_by_the_lowest(holdings: list[RankTensors]) -> None:
    for rank, chosen in enumerate(assign_writes(holdings).writes):
        for name, keys in chosen.items():
            assert all(holdings[rank].components[name][key].replicated or rank == 0 for key in keys)


@ANY
@given(jobs())
def test_keys_are_written_in_the_order_of_the_component(holdings: list[RankTensors]) -> None:
    for holding, chosen in zip(holdings, assign_writes(holdings).writes, strict=True):
        for name, keys in chosen.items():
            assert list(keys) == [key for key in holding.components[name] if key in keys]


@ANY
@given(jobs())
def test_all_ranks_come_to_the_same_division_also_of_what_went_over_the_wire(holdings: list[RankTensors]) -> None:
    division = assign_writes(holdings)
    sent = [rank_tensors_from_json(json.loads(json.dumps(rank_tensors_to_json(holding)))) for holding in holdings]
    assert [holding.components for holding in sent] == [holding.components for holding in holdings]
    assert assign_writes(sent) == division
    heard = partition_from_json(json.loads(json.dumps(partition_to_json(division))))
    assert (heard.writes, heard.cut, heard.numbers) == (division.writes, division.cut, division.numbers)
    assert heard.specs == {}
    assert all(
        heard.naming(name, rank) == division.naming(name, rank) for name in KINDS for rank in range(len(holdings))
    )


@ANY
@given(jobs())
def test_a_component_counts_as_cut_just_where_a_tensor_is_in_parts(holdings: list[RankTensors]) -> None:
    cut = {
        name
        for holding in holdings
        for name, tensors in holding.components.items()
        for held in tensors.values()
        if held.box is not None and held.box != whole(held.spec.shape)
    }
    assert assign_writes(holdings).cut == cut


def replicated(sizes: Mapping[str, int], ranks: int, frozen: frozenset[str] = frozenset()) -> list[RankTensors]:
    tensors = {
        key: LocalTensor(TensorSpec("uint8", (size,)), whole((size,)), replicated=True, frozen=key in frozen)
        for key, size in sizes.items()
    }
    return [RankTensors({"model": tensors}, {"model": "module"})] * ranks


@ANY
@given(
    st.dictionaries(st.integers(0, 99).map(str), st.integers(1, 1000), min_size=1, max_size=40),
    st.sets(st.integers(0, 99).map(str)),
    st.integers(1, 8),
)
def test_ranks_that_all_hold_everything_differ_by_the_smallest_of_their_tensors_at_most(sizes, frozen, ranks):
    """So far apart at most, for each sort: the last tensor of the fullest rank went to the emptiest one."""
    holdings = replicated(sizes, ranks, frozenset(frozen))
    division = assign_writes(holdings)
    for sort in (False, True):
        bytes_of = loads(holdings, division, frozen=sort)
        of_fullest = [
            sizes[key]
            for key in division.writes[bytes_of.index(max(bytes_of))].get("model", ())
            if (key in frozen) is sort
        ]
        assert max(bytes_of) - min(bytes_of) <= min(of_fullest, default=0)


def test_what_is_frozen_is_even_by_itself_and_so_is_what_is_not():
    holdings = replicated({"a": 100, "b": 100, "c": 100, "d": 100}, 2, frozenset("ab"))
    division = assign_writes(holdings)
    assert loads(holdings, division, frozen=True) == [100, 100]
    assert loads(holdings, division, frozen=False) == [100, 100]


def test_of_ranks_with_equally_much_of_one_sort_the_one_with_less_of_the_other_writes():
    holdings = replicated({"frozen": 100, "trained": 50}, 2, frozenset(["frozen"]))
    assert [dict(part) for part in assign_writes(holdings).writes] == [{"model": ["frozen"]}, {"model": ["trained"]}]


def test_a_tensor_without_elements_is_written_once_too():
    holdings = replicated({"empty": 0, "one": 1}, 3)
    assert sorted(key for part in assign_writes(holdings).writes for keys in part.values() for key in keys) == [
        "empty",
        "one",
    ]


@pytest.mark.parametrize("other", [TensorSpec("float32", (3, 2)), TensorSpec("float16", (2, 3))])
def test_a_plain_tensor_that_is_another_one_on_a_rank_is_refused_by_name(other: TensorSpec) -> None:
    holdings = [
        RankTensors({"model": {"weight": LocalTensor(spec, whole(spec.shape), replicated=True)}}, {"model": "module"})
        for spec in (TensorSpec("float32", (2, 3)), other)
    ]
    with pytest.raises(UnsupportedStateError, match=r"model\.weight is float32 \[2, 3\] on rank 0 and .* on rank 1"):
        assign_writes(holdings)


@ANY
@given(holdings=jobs(), limit=st.integers(1, 200))
def test_the_files_of_all_ranks_are_numbered_without_gap_and_named_once(
    holdings: list[RankTensors], limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD_LIMIT", limit)
        division = assign_writes(holdings)
        names: list[str] = []
        for rank, (holding, chosen) in enumerate(zip(holdings, division.writes, strict=True)):
            parts = {}
            for name, keys in chosen.items():
                tensors = holding.components[name]
                frozen = frozenset(key for key in keys if tensors[key].frozen)
                shapes = {key: tensors[key].spec for key in keys}
                parts[name] = ComponentTensors(KINDS[name], shapes, frozen, naming=division.naming(name, rank))
            names += [file.path for file in tensor_files.plan_files(parts)]
    assert len(set(names)) == len(names), "two ranks write one file"
    for name in KINDS:
        if name not in division.cut:
            own = sorted(path for path in names if path.startswith(f"{name}-") or path == f"{name}.safetensors")
            assert own in ([tensor_files.paths.tensor_file(name, n + 1, len(own)) for n in range(len(own))], [])
