"""Real ranks plan by themselves: together they write everything once, with the values that torch gathers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from checkpointer.distributed.classes import SectionReport, form_classes
from checkpointer.distributed.description import Describer
from checkpointer.distributed.ownership import assign_owners
from checkpointer.state.adapters import adapter_for, capture_all, modules_of
from checkpointer.state.dtensor import local_part
from tests.integration.distributed.conformance import meshes
from tests.support.ranks import run

Written = list[tuple[str, str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def written_by_this_rank(components: dict[str, Any]) -> Written:
    """Component, name, offsets, lengths and values, from what the ranks tell each other of their sections alone."""
    modules = modules_of(components)
    captured = capture_all({name: adapter_for(name, part, modules) for name, part in components.items()})
    sections = Describer().describe(captured).sections
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, [SectionReport.of(section) for section in sections])
    classes = form_classes(reports)
    assert not classes.doubts
    seats = classes.seats[dist.get_rank()]
    found: Written = []
    for number in sorted({seat.number for seat in seats}):
        mine = [(section, seat) for section, seat in zip(sections, seats, strict=True) if seat.number == number]
        plan = assign_owners([section for section, _ in mine], mine[0][1])
        boxes = plan.written_at(mine[0][1].group, mine[0][1].cell)
        for row, tensor_number in enumerate(boxes.tensors.tolist()):
            component, _, entry, _ = plan.tensors[tensor_number]
            span = slice(int(boxes.starts[row]), int(boxes.starts[row + 1]))
            offsets, lengths = (tuple(column[span].tolist()) for column in (boxes.offsets, boxes.lengths))
            part = local_part(captured[component].tensors[entry.key])
            found.append((component, entry.name, offsets, lengths, part.clone()))
    return found


def everything(components: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """The whole tensors, as torch gathers them."""
    modules = modules_of(components)
    captured = capture_all({name: adapter_for(name, part, modules) for name, part in components.items()})
    names = {
        (section.component, entry.key): entry.name
        for section in Describer().describe(captured).sections
        for entry in section.entries
    }
    return {
        (name, names[name, key]): tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, part in captured.items()
        for key, tensor in part.tensors.items()
    }


def planned(layout: str) -> tuple[Written, dict[tuple[str, str], torch.Tensor]]:
    if layout == "every placement":
        line, table = meshes.init_device_mesh("cpu", (4,)), meshes.init_device_mesh("cpu", (2, 2))
        components: dict[str, Any] = {"state": meshes.layouts(line, table, meshes.SQUARE)}
    else:
        model, optimizer = meshes.trained(getattr(meshes, layout), 1)
        components = {"model": model, "optimizer": optimizer}
    return written_by_this_rank(components), everything(components)


@pytest.mark.parametrize("layout", ["every placement", *(layout.__name__ for layout in meshes.LAYOUTS)])
def test_ranks_that_plan_by_themselves_write_every_element_once(layout):
    outcomes = run(4, planned, layout)
    expected = outcomes[0][1]
    joined = {place: torch.full_like(tensor, 99) for place, tensor in expected.items()}
    count = {place: torch.zeros(tensor.shape, dtype=torch.int) for place, tensor in expected.items()}
    for written, _ in outcomes:
        for component, name, offsets, lengths, values in written:
            place = tuple(slice(begin, begin + length) for begin, length in zip(offsets, lengths, strict=True))
            joined[component, name][place] = values
            count[component, name][place] += 1
    assert all((times == 1).all() for times in count.values())
    assert all(torch.equal(joined[place], tensor) for place, tensor in expected.items())
