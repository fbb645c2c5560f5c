"""Who writes what: every element of every tensor once, by a rank that has it, evenly, and the same on all ranks.

Ranks are simulated: what each would describe, classes of them, and the plan that each makes by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.distributed.classes import Classes, Seat, SectionReport, Verdict, form_classes, join
from checkpointer.distributed.description import Entry, Section
from checkpointer.distributed.ownership import ClassPlan, assign_owners
from checkpointer.format import tensor_files
from checkpointer.format.boxes import Box
from checkpointer.format.layouts import Cut
from checkpointer.format.tensor_files import ComponentTensors
from tests.support.boxes import slices

ANY = settings(max_examples=100, deadline=None)

KINDS = {"model": "module", "optimizer": "optimizer", "loader": "stateful"}


@dataclass
class Job:
    """What each rank describes, and what it holds of each tensor."""

    sections: list[list[Section]]
    shapes: dict[tuple[str, str], tuple[int, ...]]

    @cached_property
    def classes(self) -> Classes:
        return form_classes([[SectionReport.of(section) for section in own] for own in self.sections])

    def plan(self, rank: int, number: int) -> tuple[Seat, ClassPlan]:
        """Of one class, as one rank makes it."""
        pairs = list(zip(self.sections[rank], self.classes.seats[rank], strict=True))
        mine = [section for section, seat in pairs if seat.number == number]
        seat = next(seat for _, seat in pairs if seat.number == number)
        return seat, assign_owners(mine, seat)

    @cached_property
    def plans(self) -> list[list[tuple[Seat, ClassPlan]]]:
        """Of each rank, those of its classes."""
        return [
            [self.plan(rank, number) for number in sorted({seat.number for seat in seats})]
            for rank, seats in enumerate(self.classes.seats)
        ]

    def writes(self, rank: int) -> Iterator[tuple[str, str, Box]]:
        for seat, plan in self.plans[rank]:
            yield from boxes(plan, seat)


def boxes(plan: ClassPlan, seat: Seat) -> Iterator[tuple[str, str, Box]]:
    found = plan.written_at(seat.group, seat.cell)
    spans = itertools.pairwise(found.starts.tolist())
    for number, (begin, end) in zip(found.tensors.tolist(), spans, strict=True):
        component, _, entry = plan.tensors[number]
        yield component, entry.name, Box(tuple(found.offsets[begin:end]), tuple(found.lengths[begin:end]))


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "int64", "uint8"])


@st.composite
def entries(draw: st.DrawFn, mesh: tuple[int, ...]) -> list[Entry]:
    found = []
    for name in draw(st.sets(st.sampled_from("abcdefg"))):
        shape = draw(shapes)
        order = draw(st.permutations(range(len(mesh))))[: draw(st.integers(0, len(mesh)))] if shape else []
        cuts = tuple(Cut(dimension, draw(st.integers(0, len(shape) - 1))) for dimension in order)
        found.append(Entry(name, name, draw(dtypes), shape, cuts, draw(st.booleans())))
    return found


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Ranks that all hold some components, of which a part is over meshes of some of them."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    groups, outside = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    size = groups * prod(mesh) + outside
    sections: list[list[Section]] = [[] for _ in range(size)]
    seats = draw(st.permutations(range(size)))
    known = {}
    for name in draw(st.sets(st.sampled_from(list(KINDS)), min_size=1)):
        alone = tuple(entry._replace(name=f"plain.{entry.name}") for entry in draw(entries(())))
        own = tuple(entry._replace(name=f"own.{entry.name}") for entry in draw(entries(())))
        meshed = tuple(draw(entries(mesh)))
        known |= {(name, entry.name): entry.shape for entry in (*alone, *own, *meshed)}
        for rank in range(size):
            sections[rank].append(Section(name, KINDS[name], "plain", tuple(sorted(alone)), ("a parameter",)))
            sections[rank].append(Section(name, KINDS[name], "own", tuple(sorted(own))))
        for place, rank in enumerate(seats[: groups * prod(mesh)]):
            group, cell = divmod(place, prod(mesh))
            sections[rank].append(Section(name, KINDS[name], "mesh", tuple(sorted(meshed)), (), mesh, group + 7, cell))
    for number, own_sections in enumerate(sections):
        own_sections[:] = own_sections[number % 3 :] + own_sections[: number % 3]
    return Job(sections, known)


@ANY
@given(jobs())
def test_every_element_is_written_exactly_once(job):
    counts = {place: np.zeros(shape, int) for place, shape in job.shapes.items()}
    times = dict.fromkeys(job.shapes, 0)
    for rank in range(len(job.sections)):
        for component, name, box in job.writes(rank):
            counts[component, name][slices(box)] += 1
            times[component, name] += 1
    assert all((count == 1).all() for count in counts.values())
    assert all(times.values()), "a tensor without elements is written, too"


@ANY
@given(jobs())
def test_all_ranks_of_a_class_come_to_the_same_plan(job):
    for number, one in enumerate(job.classes.classes):
        plans = [job.plan(rank, number)[1] for rank in one.ranks.ravel().tolist()]
        named = [[(tensor.component, tensor.entry.name) for tensor in plan.tensors] for plan in plans]
        for plan, names in zip(plans, named, strict=True):
            assert names == named[0]
            assert (plan.forms, plan.files) == (plans[0].forms, plans[0].files)
            assert all(np.array_equal(a, b) for a, b in zip(plan.table, plans[0].table, strict=True))


@ANY
@given(jobs())
def test_what_ranks_may_have_otherwise_is_written_by_the_lowest(job):
    for rank in range(1, len(job.sections)):
        assert not [name for _, name, _ in job.writes(rank) if name.startswith("own.")]


@ANY
@given(jobs())
def test_a_component_counts_as_cut_just_where_a_tensor_is_in_parts(job):
    in_parts = {
        component
        for rank in range(len(job.sections))
        for component, name, box in job.writes(rank)
        if box.lengths != job.shapes[component, name] and 0 not in job.shapes[component, name]
    }
    assert {name for plans in job.plans for _, plan in plans for name in plan.cut} == in_parts


@ANY
@given(job=jobs(), limit=st.integers(1, 200))
def test_the_files_of_all_ranks_are_numbered_without_gap_and_named_once(job, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD_LIMIT", limit)
        summaries = [job.plan(one.describer, number)[1].summary() for number, one in enumerate(job.classes.classes)]
        verdict = join(summaries)
        assert not verdict.clashes
        names = [file.path for rank in range(len(job.sections)) for file in files_of(job, rank, verdict)]
    assert len(set(names)) == len(names), "two files have one name"
    for name in KINDS:
        if name not in verdict.by_rank:
            own = sorted(path for path in names if path.startswith(f"{name}-0") or path == f"{name}.safetensors")
            assert own in ([tensor_files.paths.tensor_file(name, n + 1, len(own)) for n in range(len(own))], [])


def files_of(job: Job, rank: int, verdict: Verdict) -> list[tensor_files.TensorFile]:
    parts: dict[str, ComponentTensors] = {}
    for seat, plan in job.plans[rank]:
        known = {(tensor.component, tensor.entry.name): tensor.entry for tensor in plan.tensors}
        for component, name, box in boxes(plan, seat):
            naming = plan.naming(component, rank, seat, verdict.by_rank)
            part = parts.setdefault(component, ComponentTensors(KINDS[component], {}, naming=naming))
            entry = known[component, name]
            specs = {**part.specs, name: tensor_files.TensorSpec(entry.dtype, box.lengths)}
            frozen = part.frozen | {name} if entry.frozen else part.frozen
            parts[component] = ComponentTensors(part.kind, specs, frozen, naming=naming)
    return tensor_files.plan_files(parts)


# ------------------------------------------------------------------------------------ evenness


def replicated(sizes: Mapping[str, int], frozen: frozenset[str] = frozenset()) -> list[Section]:
    found = [Entry(key, key, "uint8", (size,), (), key in frozen) for key, size in sizes.items()]
    return [Section("model", "module", "plain", tuple(sorted(found)))]


def loads(plan: ClassPlan, ranks: int, *, frozen: bool) -> list[int]:
    found = [0] * ranks
    for tensor, owner in zip(plan.tensors, plan.table.owner.tolist(), strict=True):
        if tensor.entry.frozen is frozen:
            found[owner] += tensor.entry.shape[0]
    return found


PAGES = st.integers(1, 100).map(lambda pages: pages * tensor_files.PAGE)


@ANY
@given(
    st.dictionaries(st.integers(0, 99).map(str), PAGES, min_size=1, max_size=40),
    st.sets(st.integers(0, 99).map(str)),
    st.integers(1, 8),
)
def test_ranks_that_all_hold_everything_differ_by_the_smallest_of_their_tensors_at_most(sizes, frozen, ranks):
    """So far apart at most, for each sort: the last tensor of the fullest rank went to the emptiest one."""
    plan = assign_owners(replicated(sizes, frozenset(frozen)), Seat(0, 1, ranks, 0, 0))
    for sort in (False, True):
        bytes_of = loads(plan, ranks, frozen=sort)
        fullest = bytes_of.index(max(bytes_of))
        owned = zip(plan.tensors, plan.table.owner.tolist(), strict=True)
        of_fullest = [t.entry.shape[0] for t, owner in owned if owner == fullest and t.entry.frozen is sort]
        assert max(bytes_of) - min(bytes_of) <= min(of_fullest, default=0)


MB = 1 << 20


def test_what_is_frozen_is_even_by_itself_and_so_is_what_is_not():
    plan = assign_owners(replicated(dict.fromkeys("abcd", MB), frozenset("ab")), Seat(0, 1, 2, 0, 0))
    assert loads(plan, 2, frozen=True) == [MB, MB]
    assert loads(plan, 2, frozen=False) == [MB, MB]


def test_of_ranks_with_equally_much_of_one_sort_the_one_with_less_of_the_other_writes():
    plan = assign_owners(replicated({"frozen": 2 * MB, "trained": MB}, frozenset(["frozen"])), Seat(0, 1, 2, 0, 0))
    assert sorted(plan.table.owner.tolist()) == [0, 1]


def test_thousands_of_step_counts_are_not_spread_over_thousands_of_ranks():
    steps = {f"state.{number}.step": 4 for number in range(3000)}
    plan = assign_owners(replicated(steps), Seat(0, 1, 10_000, 0, 0))
    assert len(set(plan.table.owner.tolist())) == 2


def test_many_ranks_that_hold_one_large_model_write_files_worth_reading():
    layers = {f"layer.{number}": 16 * MB for number in range(300)}
    plan = assign_owners(replicated(layers), Seat(0, 1, 4096, 0, 0))
    assert len(set(plan.table.owner.tolist())) == 300 * 16 // 64


def test_the_plan_of_ten_thousand_ranks_takes_no_longer_than_that_of_eight():
    """In steps, not seconds: no list in a plan is longer than the tensors."""
    plan = assign_owners(replicated({f"layer.{n}": MB for n in range(100)}), Seat(0, 1, 10_000, 0, 0))
    assert len(plan.table.owner) == 100
    assert sum(len(of_ranks) for of_ranks in plan.files.values()) <= 100
