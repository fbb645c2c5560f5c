"""Replicas that differ are found by small hashes, and told apart from another model by details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from checkpointer.distributed.classes import Seat, SectionReport, form_classes
from checkpointer.distributed.description import Describer, Entry, Section
from checkpointer.distributed.ownership import ClassPlan, assign_owners
from checkpointer.distributed.samples import TENSORS, Finding, compare, details, ranks_to_ask, samples
from checkpointer.format.layouts import Cut
from checkpointer.state.protocol import Captured

Rank = tuple[dict[str, Captured], list[tuple[Seat, ClassPlan]]]


def ranks_with(models: Sequence[Mapping[str, torch.Tensor]], kind: str = "module") -> list[Rank]:
    """Ranks that hold plain tensors under the same keys."""
    captured = [{"model": Captured(kind, None, dict(model), trainable=frozenset(model))} for model in models]
    sections = [Describer().describe(part).sections for part in captured]
    seats = form_classes([[SectionReport.of(section) for section in own] for own in sections]).seats
    return [
        (part, [(own[0], assign_owners(told, own[0]))])
        for part, told, own in zip(captured, sections, seats, strict=True)
    ]


def random(seed: int, count: int = 4) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"w{number}": torch.randn(8, 50, generator=made) for number in range(count)}


def asked(ranks: Sequence[Rank], step: int = 1, *, everything: bool = True) -> list[tuple[int, int]]:
    return ranks_to_ask([samples(*rank, step, everything=everything) for rank in ranks])


def found(ranks: Sequence[Rank]) -> Finding | None:
    first, second = asked(ranks)[0]
    return compare((first, second), *(details(*ranks[rank], 1, everything=True) for rank in (first, second)))


def test_equal_replicas_are_not_asked():
    assert asked(ranks_with([random(0), random(0), random(0)])) == []


def test_a_replica_that_differs_is_asked_together_with_the_lowest():
    assert asked(ranks_with([random(0), random(0), random(1), random(2)])) == [(0, 2), (0, 3)]


def test_a_few_pairs_are_enough_however_many_differ():
    assert len(asked(ranks_with([random(seed) for seed in range(20)]))) == 4


def test_another_model_under_the_same_keys_is_told_from_rounding():
    model = random(0)
    rounded = {key: tensor * (1 + 1e-6) for key, tensor in model.items()}
    other, drifted = found(ranks_with([model, random(1)])), found(ranks_with([model, rounded]))
    assert other is not None
    assert drifted is not None
    assert (other.apart, drifted.apart) == (True, False)
    assert "4 of 4 matrices that were compared differ by more than rounding, for example 'model.w0'" in other.message
    assert "4 of 4 parameters and moments are not equal on ranks 0 and 1" in drifted.message


def test_other_moments_alone_are_no_other_model():
    finding = found(ranks_with([random(0), random(1)], kind="optimizer"))
    assert finding is not None
    assert not finding.apart


def test_one_matrix_of_many_that_differs_is_no_other_model():
    finding = found(ranks_with([random(0), {**random(0), "w1": random(1)["w1"]}]))
    assert finding is not None
    assert not finding.apart
    assert "1 of 4 parameters" in finding.message


def test_what_is_not_looked_at_at_one_save_is_looked_at_at_another():
    model, other = random(0, 1000), random(0, 1000)
    other["w500"] = torch.zeros(8, 50)
    ranks = ranks_with([model, other])
    assert asked(ranks)
    noticed = [bool(asked(ranks, step, everything=False)) for step in range(100)]
    assert any(noticed)
    assert not all(noticed)


def test_a_save_looks_at_so_many_tensors_at_most():
    captured, plans = ranks_with([random(0, 1000), random(0, 1000)])[0]
    assert len(details(captured, plans, 7, everything=False)) == TENSORS


def test_a_process_with_no_replica_looks_at_nothing():
    assert samples(*ranks_with([random(0)])[0], 1, everything=True) == []


def test_replicas_of_one_shard_are_compared_and_different_shards_are_not():
    """HSDP: a mesh of two by two, of which the second dimension cuts."""
    ranks: list[Rank] = []
    for cell, rows in enumerate([0.0, 1.0, 0.0, 1.0]):
        tensor = torch.full((2, 3), rows)
        section = Section(
            "model", "module", "mesh", (Entry("w", "w", "float32", (4, 3), (Cut(1, 0),)),), (), (2, 2), 1, cell
        )
        seat = Seat(0, 1, 4, 0, cell)
        ranks.append(({"model": Captured("module", None, {"w": tensor})}, [(seat, assign_owners([section], seat))]))
    assert asked(ranks) == []
    ranks[3][0]["model"].tensors["w"][:] = 2
    assert asked(ranks) == [(1, 3)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.ones(3, dtype=torch.bool),
        torch.randn(4, 4, dtype=torch.complex64).conj(),
        torch.tensor(1 + 2j).conj(),
        torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        torch.randn(40, 7).T,
        torch.randn(3, 64).to(torch.float8_e4m3fn),
        torch.zeros(9, dtype=torch.uint16),
    ],
)
def test_tensors_of_any_dtype_and_strides_are_looked_at_by_value(tensor):
    same = {"w": tensor.clone() if tensor.is_conj() else tensor.contiguous().clone()}
    assert asked(ranks_with([{"w": tensor}, same])) == []
