"""What thousands of ranks cost a save: ``python -m benchmarks.scale --ranks 8,64,512,4096,10000 --layout fsdp``.

The real code plans for ranks that are simulated: their state has its real form and no memory, and their messages are
encoded as they are on the wire. Seconds are of one processor, on the coordinator and on another rank; bytes are all
that pass through the job's store. Goals are those of the design. Prints Markdown; the last line sums it up, and the
status is 0 where all goals are met.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpointer.distributed.classes import Classes, ClassSummary, Seat, SectionReport, form_classes, join
from checkpointer.distributed.description import Describer, Description
from checkpointer.distributed.ownership import ClassPlan, assign_owners
from checkpointer.distributed.samples import Sample, ranks_to_ask
from checkpointer.format.layouts import Layout, written_by
from checkpointer.state.protocol import Captured
from checkpointer.system.gc import collector_paused

LAYOUTS = ("fsdp", "hsdp", "ddp", "pipeline")
SHARDS = 8
"""Ranks of one replica, with hsdp; stages, with pipeline."""

WIDTH = 4096

COORDINATOR_SECONDS, COORDINATOR_SECONDS_A_RANK = 1.0, 100e-6
BYTES_A_RANK = 1024
GROWTH = 1.5
"""How much more another rank may take with the most ranks than with the fewest: the noise of a busy machine."""

SLACK = 2e-3
"""Seconds that are nothing."""


class Shape(NamedTuple):
    """How the ranks of a job are arranged."""

    ranks: int
    layout: str

    @property
    def mesh(self) -> tuple[int, ...]:
        """The mesh that a rank's tensors are on."""
        if self.layout == "hsdp":
            return self.ranks // SHARDS, SHARDS
        return (self.ranks // SHARDS if self.layout == "pipeline" else self.ranks,)

    def stage(self, rank: int) -> int:
        return rank // self.mesh[0] if self.layout == "pipeline" else 0

    def ranks_of_mesh(self, rank: int) -> torch.Tensor:
        first = self.stage(rank) * self.mesh[0]
        return torch.arange(first, first + int(np.prod(self.mesh))).reshape(self.mesh)


@contextmanager
def job(rank: int, ranks: int) -> Iterator[None]:
    """A process group in which this process is one of many, and nothing is sent."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def state_of(shape: Shape, rank: int, tensors: int) -> dict[str, Captured]:
    """A model with AdamW, as one rank holds it: three tensors and a step count for each parameter."""
    count = tensors // 4
    mesh = None
    if shape.layout != "ddp":
        mesh = DeviceMesh("cpu", shape.ranks_of_mesh(rank), _init_backend=False)
    model = {f"layers.{shape.stage(rank)}.{n}.weight": _tensor(n, mesh) for n in range(count)}
    slots = {f"state.{n}.{slot}": _tensor(n, mesh) for n in range(count) for slot in ("exp_avg", "exp_avg_sq")}
    moments = {**slots, **{f"state.{n}.step": torch.zeros(()) for n in range(count)}}
    meta: dict[str, Any] = {"params": [[f"model.{key}" for key in model]], "shapes": [[[WIDTH, WIDTH]] * count]}
    return {
        "model": Captured("module", None, model, trainable=frozenset(model)),
        "optimizer": Captured("optimizer", None, moments, meta, trainable=frozenset(moments)),
        "rng": Captured("rng", None, {"cpu": torch.zeros(5056, dtype=torch.uint8)}),
    }


def _tensor(number: int, mesh: DeviceMesh | None) -> torch.Tensor:
    """Every fourth is a vector, as biases and norms are."""
    shape = (WIDTH,) if number % 4 == 0 else (WIDTH, WIDTH)
    if mesh is None:
        return torch.empty(shape, device="meta")
    places: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    where, pieces = mesh.get_coordinate(), mesh.size(mesh.ndim - 1)
    assert where is not None
    step = -(-WIDTH // pieces)
    rows = max(min(step, WIDTH - step * where[-1]), 0)
    held = torch.empty((rows, *shape[1:]), device="meta")
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


class Seconds(NamedTuple):
    """What one thing takes, and what came of it."""

    seconds: float
    value: Any


def timed(work: Callable[[], Any], times: int = 3) -> Seconds:
    """The median of some runs, of this process's processor time."""
    found = []
    value = None
    with collector_paused():
        for _ in range(times):
            began = time.process_time()
            value = work()
            found.append(time.process_time() - began)
    return Seconds(statistics.median(found), value)


class Row(NamedTuple):
    """What was measured of one number of ranks. Seconds are of the save after a change, or of one after nothing."""

    ranks: int
    classes: int
    coordinator: float
    """What the coordinator does for all ranks."""
    rank: float
    """What each rank does."""
    coordinator_again: float
    rank_again: float
    bytes_a_rank: float
    bytes_again: float
    opening: float
    """Seconds in which a reader finds out which boxes one rank wrote."""
    memory: float
    """MiB that the coordinator takes meanwhile."""


def reports_of(shape: Shape, described: Sequence[Description]) -> list[list[SectionReport]]:
    """Of all ranks, from what one rank of each stage describes."""
    cells = int(np.prod(shape.mesh))
    found = []
    for rank in range(shape.ranks):
        first = described[shape.stage(rank)]
        own = [SectionReport.of(section) for section in first.sections]
        found.append([report._replace(cell=rank % cells) if report.cells else report for report in own])
    return found


def coordinator(messages: Sequence[bytes]) -> tuple[Classes, list[bytes]]:
    """Read what all ranks tell, and answer each."""
    decoder = msgspec.msgpack.Decoder(list[SectionReport])
    encoder = msgspec.msgpack.Encoder()
    classes = form_classes([decoder.decode(message) for message in messages])
    return classes, [encoder.encode(seats) for seats in classes.seats]


def plans_of(description: Description, seats: Sequence[Seat]) -> list[tuple[Seat, ClassPlan]]:
    """What a rank makes of its answer."""
    found = []
    for number in sorted({seat.number for seat in seats}):
        pairs = [pair for pair in zip(description.sections, seats, strict=True) if pair[1].number == number]
        plan = assign_owners([section for section, _ in pairs], pairs[0][1])
        found.append((pairs[0][1], plan))
    return found


def written(plans: Sequence[tuple[Seat, ClassPlan]]) -> int:
    """How many boxes a rank writes; the names of its files are found as well."""
    return sum(len(plan.written_at(seat.group, seat.cell).tensors) + len(plan.files) for seat, plan in plans)


def again(messages: Sequence[bytes]) -> list[tuple[int, int]]:
    """What the coordinator does in a save in which nothing has changed."""
    decoder = msgspec.msgpack.Decoder(tuple[int, bytes, list[Sample]])
    told = [decoder.decode(message) for message in messages]
    assert all(digest for _, digest, _ in told)
    return ranks_to_ask([samples for _, _, samples in told])


class Described(NamedTuple):
    """What the first rank of a stage tells, and how long that takes it."""

    description: Description
    seconds: float
    seconds_again: float


def describe(shape: Shape, stage: int, tensors: int) -> Described:
    rank = stage * int(np.prod(shape.mesh))
    with job(rank, shape.ranks):
        captured = state_of(shape, rank, tensors)
        first = timed(lambda: Describer().describe(captured))
        describer = Describer()
        describer.describe(captured)
        return Described(first.value, first.seconds, timed(lambda: describer.describe(captured)).seconds)


def summaries(shape: Shape, described: Sequence[Description], classes: Classes) -> list[ClassSummary]:
    """What the describer of each class tells."""
    found = []
    for number, one in enumerate(classes.classes):
        plans = plans_of(described[shape.stage(one.describer)], classes.seats[one.describer])
        found += [plan.summary() for seat, plan in plans if seat.number == number]
    return found


def measure(shape: Shape, tensors: int) -> Row:
    """Simulate one save after a change, and one after nothing."""
    stages = [describe(shape, stage, tensors) for stage in range(SHARDS if shape.layout == "pipeline" else 1)]
    described = [stage.description for stage in stages]
    encode = msgspec.msgpack.encode
    sent = [encode(reports) for reports in reports_of(shape, described)]
    formed = timed(lambda: coordinator(sent))
    classes, answers = formed.value
    last = shape.ranks - 1
    planned = timed(lambda: plans_of(described[-1], classes.seats[last]))
    chosen = timed(lambda: written(planned.value))
    told = summaries(shape, described, classes)
    names = sum(summary.nbytes + 64 * len(summary.components) for summary in told)
    small = [encode((1, b"d" * 16, [Sample(number, 0, 0, b"s" * 8) for number in range(2)])) for _ in sent]
    return Row(
        ranks=shape.ranks,
        classes=len(classes.classes),
        coordinator=formed.seconds + timed(lambda: join(told)).seconds,
        rank=stages[-1].seconds + planned.seconds + chosen.seconds,
        coordinator_again=timed(lambda: again(small)).seconds,
        rank_again=stages[-1].seconds_again + chosen.seconds,
        bytes_a_rank=(sum(map(len, sent)) + sum(map(len, answers)) + names) / shape.ranks,
        bytes_again=sum(map(len, small)) / shape.ranks,
        opening=opening(classes, planned.value, last),
        memory=peak(lambda: coordinator(sent)),
    )


def peak(work: Callable[[], Any]) -> float:
    """MiB that some work takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def opening(classes: Classes, plans: Sequence[tuple[Seat, ClassPlan]], rank: int) -> float:
    """Seconds to find what a rank wrote, for a reader that knows the ranks of each layout."""
    seconds = 0.0
    for seat, plan in plans:
        layouts = [Layout(form, classes.classes[seat.number].ranks) for form in plan.forms]
        found = timed(partial(written_by, rank, plan.table, layouts))
        assert len(found.value.tensors) == len(plan.written_at(seat.group, seat.cell).tensors)
        seconds += found.seconds
    return seconds


# ------------------------------------------------------------------------------------ goals, and what is printed


def goals(layout: str, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each goal of the design that can be told from these figures, and whether it is met."""
    most, fewest = rows[-1], rows[0]
    limit = max(COORDINATOR_SECONDS_A_RANK * most.ranks, SLACK)
    names = f"{layout}, {most.ranks} ranks"
    growing = f"{layout}: another rank takes no longer with {most.ranks} ranks than with {fewest.ranks}"
    return [
        (f"{names}: coordinator within 1 s", most.coordinator <= COORDINATOR_SECONDS),
        (f"{names}: coordinator within 100 µs a rank", most.coordinator <= limit),
        (f"{names}: at most 1 KiB a rank through the store", most.bytes_a_rank <= BYTES_A_RANK),
        (growing, most.rank <= GROWTH * fewest.rank + SLACK),
        (f"{growing} (nothing changed)", most.rank_again <= GROWTH * fewest.rank_again + SLACK),
    ]


HEADINGS = (
    "ranks", "classes", "coordinator, ms", "rank, ms", "coordinator again, ms", "rank again, ms", "bytes a rank",
    "bytes again", "opening, ms", "memory, MiB",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    milliseconds = {place for place, heading in enumerate(HEADINGS) if heading.endswith("ms")}
    lines = ["| " + " | ".join(HEADINGS) + " |", "| " + " | ".join("---:" for _ in HEADINGS) + " |"]
    for row in rows:
        cells = [value * 1e3 if place in milliseconds else value for place, value in enumerate(row)]
        told = [str(cell) if isinstance(cell, int) else f"{cell:.1f}" for cell in cells]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", default="8,64,512,4096,10000", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--tensors", type=int, default=3000, help="of each rank (default: %(default)s)")
    parser.add_argument("--layout", choices=[*LAYOUTS, "all"], default="all")
    given = parser.parse_args(argv)
    given.ranks = sorted(int(number) // SHARDS * SHARDS for number in given.ranks.split(","))
    if given.ranks[0] < SHARDS or given.tensors < 4:
        parser.error(f"at least {SHARDS} ranks, and 4 tensors")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and tell by the status whether all goals are met."""
    given = arguments(argv)
    told: list[tuple[str, bool]] = []
    for layout in LAYOUTS if given.layout == "all" else (given.layout,):
        rows = [measure(Shape(ranks, layout), given.tensors) for ranks in given.ranks]
        print(f"\n## {layout}, {given.tensors} tensors\n\n{table(rows)}\n", flush=True)
        told += goals(layout, rows)
    missed = [goal for goal, met in told if not met]
    print("".join(f"- missed: {goal}\n" for goal in missed))
    print(f"{len(told) - len(missed)} of {len(told)} goals are met with up to {given.ranks[-1]} ranks")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
