"""Saved by 1, 2, 4 or 8 ranks in any layout, restored by 1, 2, 4 or 8 in any other: the same bits.

Of the model's tensors some have fewer rows than there are ranks, and one has fewer elements, so that ranks hold nothing
of them. A job of eight takes its time on few cores: one of them saves and restores all that it is asked to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.distributed.test_manager_ranks import restore_as, save_as, verified
from tests.support.ranks import alone, run

LAYOUTS = {1: ["plain"], 2: ["fsdp", "tp", "plain"], 4: ["hsdp", "2d", "fsdp", "tp"], 8: ["2d", "hsdp", "fsdp"]}
"""The ways to lay a model out over so many ranks. One of tensor parallelism over eight has too few columns."""


class Save(NamedTuple):
    """To save in a root of its own."""

    root: str
    layout: str
    mode: str = "async"


class Restore(NamedTuple):
    """To restore what another job has saved."""

    root: str
    layout: str
    verify: str = "stream"


def worker(folder: str, tasks: list[Save | Restore]) -> list[Any]:
    """Do all that one job is asked to: the state at each save and after each restore."""
    return [
        save_as(f"{folder}/{task.root}", task.layout, task.mode)
        if isinstance(task, Save)
        else restore_as(f"{folder}/{task.root}", task.layout, verify=task.verify)[0]
        for task in tasks
    ]


def job(world: int, folder: Path, *tasks: Save | Restore) -> dict[str, Any]:
    """Carry out ``tasks`` with so many ranks, which all have to come to the same: the state of each root."""
    arguments = (str(folder), list(tasks))
    ranks = run(world, worker, *arguments) if world > 1 else [alone(worker, *arguments)]
    assert all(rank == ranks[0] for rank in ranks)
    return {task.root: state for task, state in zip(tasks, ranks[0], strict=True)}


def test_eight_ranks_restore_what_fewer_have_saved_and_fewer_what_eight_have(tmp_path):
    saved = job(1, tmp_path, Save("one", "plain", "sync"))
    saved |= job(2, tmp_path, Save("two", "tp"))
    saved |= job(4, tmp_path, Save("four", "hsdp", "lazy"))
    found = job(
        8,
        tmp_path,
        Save("eight-2d", "2d"),
        Save("eight-hsdp", "hsdp", "lazy"),
        Restore("one", "fsdp"),
        Restore("two", "2d", "before"),
        Restore("four", "fsdp"),
    )
    eight = {root: found.pop(root) for root in ("eight-2d", "eight-hsdp")}
    assert found == saved
    for world, layouts in ((1, ("plain", "plain")), (2, ("tp", "fsdp")), (4, ("fsdp", "2d"))):
        back = [Restore(root, layout) for root, layout in zip(eight, layouts, strict=True)]
        assert job(world, tmp_path, *back) == eight
    for root in tmp_path.iterdir():
        verified(root)


@pytest.mark.thorough(lambda world: world > 0)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_number_of_ranks_restores_every_layout_of_every_other(tmp_path, world):
    roots = {f"{world}-{layout}": layout for layout in LAYOUTS[world]}
    saved = job(world, tmp_path, *[Save(root, layout) for root, layout in roots.items()])
    for other, layouts in LAYOUTS.items():
        for layout in layouts:
            assert job(other, tmp_path, *[Restore(root, layout) for root in roots]) == saved, (other, layout)
