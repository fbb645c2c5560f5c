"""A sample of memory: a change of every byte is always noticed, and no change never is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.staging.gpu import note_on_device
from checkpointer.staging.sample import (
    FEWEST_LINES,
    LINE,
    LINES_PER_MIB,
    MOST_LINES,
    Items,
    Sample,
    Sampler,
    _wanted,
)
from checkpointer.state.tensors import STORABLE, host_bytes
from checkpointer.system.memory import view_of

dtypes = st.sampled_from(sorted(STORABLE, key=str))
shapes = st.lists(st.integers(0, 40), max_size=3)
seeds = st.integers(0, 1 << 62)


@dataclass
class Span:
    """What a sample needs to know of a tensor."""

    address: int
    size: int
    place: int


def layout_of(tensors: list[torch.Tensor]) -> list[Span]:
    """One behind the other."""
    places = np.cumsum([0, *(tensor.nbytes for tensor in tensors)])
    return [Span(t.data_ptr(), t.nbytes, int(place)) for t, place in zip(tensors, places, strict=False)]


def by_processor(tensors: list[torch.Tensor], seed: int) -> Sample:
    return Sample(Sampler().take(layout_of(tensors), seed))


def by_device(tensors: list[torch.Tensor], seed: int) -> Sample:
    """As a GPU does it, by the same operators; and as if its bytes had been copied to the host."""
    noted = list(note_on_device([(t, span.place) for t, span in zip(tensors, layout_of(tensors), strict=True)], seed))
    rows = [item.rows.numpy() for item in noted]
    return Sample([Items(n.tensors, n.places, r) for n, r in zip(noted, rows, strict=True)])


ways = pytest.mark.parametrize("way", [by_processor, by_device])
Way = Callable[[list[torch.Tensor], int], Sample]


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """Row-major ones of random bits (NaN and -0.0 too), anywhere in a storage; zero-size and 0-dim ones as well."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        dtype, shape = draw(dtypes), draw(shapes)
        count, gap = int(np.prod(shape)), draw(st.integers(0, 9))
        width = dtype.itemsize
        bits = torch.randint(0, 256, ((count + gap) * width,), dtype=torch.uint8, generator=generator)
        made.append(bits[gap * width :].view(dtype).view(shape) if count else bits[:0].view(dtype).view(shape))
    return made


def blocks(data: memoryview, draw: Any) -> list[tuple[int, memoryview]]:
    """Cut anywhere, as the writer's blocks cut tensors."""
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=6))})
    return [(begin, data[begin:end]) for begin, end in itertools.pairwise(cuts)]


@ways
@settings(deadline=None)
@given(data=st.data(), made=tensors(), seed=seeds)
def test_what_was_not_changed_is_never_reported(way: Way, data: Any, made: list[torch.Tensor], seed: int) -> None:
    sample = way(made, seed)
    written = memoryview(b"".join(bytes(host_bytes(tensor)) for tensor in made))
    assert {sample.differs_from(block, place) for place, block in blocks(written, data.draw)} <= {None}
    assert sample.differs_from_memory(0, len(written)) is None


@ways
@settings(deadline=None)
@given(data=st.data(), made=tensors(), seed=seeds)
def test_a_tensor_of_which_every_byte_changed_is_always_named(
    way: Way, data: Any, made: list[torch.Tensor], seed: int
) -> None:
    sample = way(made, seed)
    number = data.draw(st.integers(0, len(made) - 1))
    span = layout_of(made)[number]
    bits = np.frombuffer(view_of(span.address, span.size), dtype=np.uint8)
    bits ^= data.draw(st.integers(1, 255))
    written = memoryview(b"".join(bytes(host_bytes(tensor)) for tensor in made))
    found = {sample.differs_from(block, place) for place, block in blocks(written, data.draw)} - {None}
    assert found == ({number} if span.size else set())
    if way is by_processor:
        assert sample.differs_from_memory(0, len(written)) == (number if span.size else None)


@settings(deadline=None)
@given(size=st.integers(1, FEWEST_LINES * LINE), seed=seeds, data=st.data())
def test_one_changed_byte_of_a_small_tensor_is_always_noticed(size: int, seed: int, data: Any) -> None:
    tensor = torch.zeros(size, dtype=torch.uint8)
    sample = by_processor([tensor], seed)
    tensor[data.draw(st.integers(0, size - 1))] = 1
    assert sample.differs_from_memory(0, size) == 0
    assert sample.differs_from(host_bytes(tensor), 0) == 0


@ways
def test_a_line_that_stays_changed_is_found_by_one_of_many_saves(way: Way) -> None:
    tensor = torch.zeros(64 << 10, dtype=torch.uint8)
    changed = tensor.clone()
    changed[777:841] = 1
    found = sum(way([tensor], step).differs_from(host_bytes(changed), 0) is not None for step in range(0, 300_000, 100))
    assert found > 3000 * FEWEST_LINES * LINE / tensor.nbytes / 2


def test_a_sample_draws_nothing_from_random_generators_and_is_the_same_for_the_same_save() -> None:
    tensor = torch.arange(100_000)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]
    first, second = (Sampler().take(layout_of([tensor]), 7)[0] for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_equal(np.random.get_state(legacy=False)["state"], before[1])
    np.testing.assert_array_equal(first._places, second._places)


def test_tensors_of_other_sizes_are_looked_at_anew() -> None:
    sampler = Sampler()
    for sizes in ([3, 1000], [1000, 3], [5], [], [1000, 3]):
        made = [torch.zeros(size) for size in sizes]
        sample = Sample(sampler.take(layout_of(made), 0))
        for number, tensor in enumerate(made):
            tensor.add_(1)
            assert sample.differs_from_memory(0, 1 << 40) == number
            tensor.sub_(1)


def test_the_number_of_lines_grows_with_the_size_up_to_a_limit() -> None:
    gib = (1 << 30) // LINE
    assert _wanted(np.array([gib])).sum() == 1024 * LINES_PER_MIB
    assert MOST_LINES - 100 <= _wanted(np.full(100, gib)).sum() <= MOST_LINES
    assert (_wanted(np.array([1000 * gib, 0, 1])) >= FEWEST_LINES).all()
