"""Ranks that have the same tensors find each other by digests, and keys of several classes are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from checkpointer.distributed.classes import (
    ClassSummary,
    ComponentSummary,
    Seat,
    SectionReport,
    form_classes,
    join,
    name_digest,
    named,
    summarize,
    told_clashes,
    told_differences,
    told_ranks,
)
from checkpointer.distributed.description import Entry, Section, Sort
from checkpointer.errors import UnsupportedStateError

A, B, C = (bytes([number]) * 16 for number in (200, 100, 150))


def plain(digest: bytes) -> SectionReport:
    return SectionReport(digest)


def meshed(digest: bytes, group: int, cell: int, cells: int = 2) -> SectionReport:
    return SectionReport(digest, cells, group, cell)


def test_ranks_that_say_the_same_are_one_class():
    found = form_classes([[plain(A)]] * 3)
    assert [one.ranks.tolist() for one in found.classes] == [[[0, 1, 2]]]
    assert found.seats == [[Seat(0, 1, 3, 0, rank)] for rank in range(3)]
    assert [seat.describer for (seat,) in found.seats] == [True, False, False]


def test_stages_of_a_pipeline_are_a_class_each():
    found = form_classes([[plain(A)], [plain(B)], [plain(B)], [plain(A)]])
    assert [one.ranks.tolist() for one in found.classes] == [[[0, 3]], [[1, 2]]]
    assert found.seats[2] == [Seat(1, 1, 2, 0, 1)]


def test_sections_of_the_same_ranks_are_of_one_class_whatever_the_component():
    found = form_classes([[plain(A), plain(B)], [plain(B), plain(A)]])
    assert [sorted(one.digests) for one in found.classes] == [sorted([A, B])]
    assert found.seats[0] == [Seat(0, 1, 2, 0, 0)] * 2


def test_a_component_that_some_ranks_have_alone_is_a_class_of_theirs():
    found = form_classes([[plain(A)], [plain(A), plain(B)]])
    assert [one.ranks.tolist() for one in found.classes] == [[[0, 1]], [[1]]]


def test_meshes_of_one_form_with_the_same_tensors_are_replicas_and_come_by_their_lowest_ranks():
    reports = [[meshed(A, 9, 0)], [meshed(A, 5, 1)], [meshed(A, 5, 0)], [meshed(A, 9, 1)]]
    found = form_classes(reports)
    assert [one.ranks.tolist() for one in found.classes] == [[[0, 3], [2, 1]]]
    assert found.seats == [[Seat(0, 2, 2, 0, 0)], [Seat(0, 2, 2, 1, 1)], [Seat(0, 2, 2, 1, 0)], [Seat(0, 2, 2, 0, 1)]]


def test_a_rank_outside_a_mesh_is_in_the_class_of_what_is_plain_alone():
    found = form_classes([[plain(A), meshed(B, 1, 0)], [plain(A), meshed(B, 1, 1)], [plain(A)]])
    assert [(one.ranks.tolist(), one.meshed) for one in found.classes] == [([[0, 1, 2]], False), ([[0, 1]], True)]


@pytest.mark.parametrize(
    "reports,doubted",
    [
        ([[meshed(A, 1, 0)], [meshed(B, 1, 1)]], [0, 1]),
        ([[meshed(A, 1, 0, 3)], [meshed(A, 1, 1, 3)], [meshed(B, 1, 2, 3)]], [0, 2]),
        ([[meshed(A, 1, 0)], [meshed(A, 1, 1)], [meshed(A, 2, 0)], [meshed(B, 2, 1)]], [2, 3]),
        ([[meshed(A, 1, 0), meshed(C, 1, 0)], [meshed(C, 1, 1)]], [0, 1]),
    ],
)
def test_ranks_of_one_mesh_that_say_different_things_of_it_are_asked(reports, doubted):
    found = form_classes(reports)
    assert not found.classes
    assert doubted in found.doubts


def test_two_ranks_at_one_cell_are_in_doubt():
    assert form_classes([[meshed(A, 1, 0)], [meshed(A, 1, 0)]]).doubts


def test_some_doubts_are_enough_where_every_rank_says_something_else():
    reports = [[meshed(rank.to_bytes(16, "big"), rank // 2, rank % 2)] for rank in range(200)]
    assert len(form_classes(reports).doubts) == 4


def test_ten_thousand_ranks_are_put_together_without_looking_at_pairs():
    """Twice the ranks take about twice the calls, counted by the length of what is made."""
    reports = [[plain(A), meshed(B, rank // 8, rank % 8, 8)] for rank in range(10_000)]
    found = form_classes(reports)
    assert [one.ranks.shape for one in found.classes] == [(1, 10_000), (1250, 8)]
    assert found.seats[9_999] == [Seat(0, 1, 10_000, 0, 9_999), Seat(1, 1250, 8, 1249, 7)]


# ------------------------------------------------------------------------------------ keys of several classes


def entry(name: str, shape: tuple[int, ...] = (2,), *, declared: bool = False) -> Entry:
    return Entry(name, name, "float32", shape, declared=declared)


def summary(
    tensors: Mapping[str, Sequence[Entry]], sort: Sort = "plain", kind: str = "module", *, cut: bool = False
) -> ClassSummary:
    parts = {name: ComponentSummary(kind, cut, len(entries)) for name, entries in tensors.items()}
    return summarize(((name, sort, one) for name, entries in tensors.items() for one in entries), parts)


def beginning(component: str, name: str) -> int:
    return int.from_bytes(name_digest(component, name)[:8], "little")


def test_keys_that_differ_over_the_classes_are_all_saved():
    verdict = join([summary({"model": [entry("a")]}), summary({"model": [entry("b")], "other": [entry("a")]})])
    assert not verdict.clashes
    assert not verdict.elsewhere


def test_a_key_of_two_classes_is_refused_with_the_ranks_and_the_key():
    summaries = [summary({"model": [entry("a"), entry("b")]}), summary({"model": [entry("b"), entry("c")]})]
    verdict = join(summaries)
    assert verdict.clashes == {beginning("model", "b"): [0, 1]}
    classes = form_classes([[plain(A)], [plain(B)], [plain(B)]]).classes
    sections = [[Section("model", "module", "plain", tuple(map(entry, names)))] for names in ("ab", "bc")]
    answers = {number: named(verdict.clashes, own) for number, own in enumerate(sections)}
    told = told_clashes(verdict.clashes, classes, answers)
    assert told is not None
    assert "1 on rank 0 and ranks 1 to 2, for example 'model.b'" in told
    assert "replicated=" in told
    assert told_clashes(verdict.clashes, classes, {**answers, 1: {beginning("model", "b"): ["model.other"]}}) is None


def test_a_declared_key_is_written_by_the_first_class_alone():
    tied = [entry("embed", declared=True)]
    verdict = join([summary({"model": [entry("a")]}), summary({"model": tied}), summary({"model": tied})])
    assert not verdict.clashes
    assert verdict.elsewhere == {2: {name_digest("model", "embed")}}


@pytest.mark.parametrize("other", [entry("embed"), entry("embed", (3,), declared=True)])
def test_a_key_has_to_be_declared_on_both_sides_and_to_be_the_same_tensor(other):
    verdict = join([summary({"model": [entry("embed", declared=True)]}), summary({"model": [other]})])
    assert verdict.clashes == {beginning("model", "embed"): [0, 1]}


def test_what_each_rank_may_have_otherwise_is_written_by_the_first_class_that_has_it():
    parts = [summary({"rng": [entry("cpu", (size,))]}, "own", "rng") for size in (3, 4, 5)]
    verdict = join(parts)
    assert not verdict.clashes
    assert verdict.elsewhere == {1: {name_digest("rng", "cpu")}, 2: {name_digest("rng", "cpu")}}


def test_a_parameter_here_and_a_buffer_there_is_refused():
    assert join([summary({"model": [entry("a")]}), summary({"model": [entry("a")]}, "own")]).clashes


def test_files_are_numbered_over_the_ranks_where_one_class_has_all_of_a_component_in_whole_tensors():
    whole, nothing = summary({"model": [entry("a")], "other": [entry("b")]}), summary({"model": []})
    assert join([whole, nothing]).by_rank == frozenset()
    assert join([whole, summary({"model": [entry("c")]})]).by_rank == {"model"}
    assert join([summary({"model": [entry("a")]}, cut=True)]).by_rank == {"model"}


def test_a_component_of_two_kinds_is_refused():
    with pytest.raises(UnsupportedStateError, match="'model' is not the same on all ranks: a module on some"):
        join([summary({"model": []}), summary({"model": []}, kind="stateful")])


def test_differences_within_a_mesh_are_told_by_name():
    def section(*entries: Entry) -> list[Section]:
        return [Section("model", "module", "mesh", entries, (), (2,), 1, 0)]

    told = told_differences([0, 3], [section(entry("a"), entry("b")), section(entry("a", (3,)), entry("b"))])
    assert "rank 0: model.a float32 [2]; rank 3: model.a float32 [3]" in told
    assert "model.b" not in told


@pytest.mark.parametrize(
    "ranks,told",
    [
        ([3], "rank 3"),
        ([1, 0], "ranks 0 to 1"),
        ([0, 2], "ranks 0, 2"),
        ([*range(5), 7], "ranks 0 to 4, 7"),
        (range(0, 20, 2), "ranks 0, 2, 4, 6 and 6 more"),
    ],
)
def test_ranks_are_told_in_spans(ranks, told):
    assert told_ranks(ranks) == told
