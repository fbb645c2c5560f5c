"""The suite can fail: a checkpoint that lacks any one piece of what training has changed is found out, by name."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from checkpointer import CheckpointManager
from checkpointer.state import Adapter, Captured, RestoreOptions, RestorePlan, RngState, SavedState, adapter_for
from tests.campaign.exact_resume.engine import CONFIG, OTHER_SEED, SEED, Task, build, check, resume, uninterrupted
from tests.campaign.exact_resume.runs import Run, quiet

CUT, STEPS = 3, 5
DONE = "tasks.pt"
CASES = ("bfloat16 autocast with a GradScaler", "AveragedModel (EMA)", "OneCycleLR", "generators of one's own")
"""Between them: moments, steps, running statistics, scale, averages, a schedule, all generators."""
Piece = tuple[str, str, tuple[Any, ...]]
"""Component, ``tensor`` or ``value``, and where it lies."""

NAMED = {
    "a moment of the optimizer": (CASES[0], ("optimizer", "tensor", ("state.0.exp_avg",)), "exp_avg"),
    "another moment": (CASES[0], ("optimizer", "tensor", ("state.0.exp_avg_sq",)), "exp_avg_sq"),
    "the optimizer's step": (CASES[0], ("optimizer", "tensor", ("state.0.step",)), "step"),
    "running statistics": (CASES[0], ("model", "tensor", ("1.running_mean",)), "running_mean"),
    "the number of batches": (CASES[0], ("model", "tensor", ("1.num_batches_tracked",)), "num_batches_tracked"),
    "a weight": (CASES[0], ("model", "tensor", ("0.weight",)), "0.weight"),
    "the scale": (CASES[0], ("scaler", "value", ("scale",)), "scale"),
    "the scaler's count": (CASES[0], ("scaler", "value", ("_growth_tracker",)), "_growth_tracker"),
    "an average": (CASES[1], ("averaged", "tensor", ("module.0.weight",)), "averaged"),
    "the number of averages": (CASES[1], ("averaged", "tensor", ("n_averaged",)), "averaged"),
    "a field of the scheduler": (CASES[2], ("scheduler", "value", ("last_epoch",)), "last_epoch"),
    "the learning rate": (CASES[2], ("optimizer", "value", ("param_groups", 0, "lr")), "lr"),
    "torch's generator": (CASES[0], ("rng", "tensor", ("torch",)), "['rng']['torch']"),
    "NumPy's generator": (CASES[0], ("rng", "tensor", ("numpy.state.key",)), "['rng']['numpy']"),
    "Python's generator": (CASES[0], ("rng", "value", ("python", "$tuple", 1, "$tuple")), "['rng']['python']"),
}


class Forgetful:
    """An adapter whose capture holds, in the place of one piece, what a run that was not trained has there."""

    def __init__(self, adapter: Adapter, piece: Piece, untrained: Captured) -> None:
        self._adapter, self._piece, self._untrained = adapter, piece, untrained
        self.kind = adapter.kind

    def capture(self) -> Captured:
        captured = self._adapter.capture()
        _, kind, path = self._piece
        if kind == "tensor":
            (key,) = path
            captured.tensors = {
                **captured.tensors,
                key: _reset(captured.tensors[key], self._untrained.tensors.get(key)),
            }
        else:
            captured.tree = copy.deepcopy(captured.tree)
            holder = _at(captured.tree, path[:-1])
            holder[path[-1]] = _at(self._untrained.tree, path)
        return captured

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        return self._adapter.prepare(saved, options)


def _reset(trained: torch.Tensor, untrained: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(trained) if untrained is None else untrained.clone()


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _captured(run: Run) -> dict[str, Captured]:
    modules = {name: part for name, part in run.components.items() if isinstance(part, torch.nn.Module)}
    adapters = {name: adapter_for(name, part, modules) for name, part in run.components.items()}
    return {name: adapter.capture() for name, adapter in {**adapters, "rng": RngState()}.items()}


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of plain values; a long list (the words of a random generator) is one."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(tree, list) and len(tree) < 100:
        for index, item in enumerate(tree):
            yield from _leaves(item, (*path, index))
    elif path and path[-1] != "$tensor":
        yield path


def pieces_of(name: str) -> list[Piece]:
    """Every kind of state that training has changed, once for each component: no resume without it can be exact."""
    untrained = _captured(build(name, OTHER_SEED))
    run = build(name, SEED)
    for number in range(CUT + 1):
        run.step(number)
    found: list[Piece] = []
    for component, captured in _captured(run).items():
        before = untrained[component]
        for key, tensor in captured.tensors.items():
            if not torch.equal(tensor, _reset(tensor, before.tensors.get(key))):
                found.append((component, "tensor", (key,)))
        for path in _leaves(captured.tree):
            try:
                changed = _at(before.tree, path) != _at(captured.tree, path)
            except (KeyError, IndexError):
                continue  # names of state that only a trained optimizer has: the tensors above
            if changed:
                found.append((component, "value", path))
    first: dict[tuple[str, str, str], Piece] = {}
    for component, kind, path in found:
        first.setdefault((component, kind, str(path[-1]).rpartition(".")[2]), (component, kind, path))
    return list(first.values())


def _tasks_without(name: str, folder: Path) -> dict[Piece, Task]:
    """A saved run without each of its pieces, ready to be resumed."""
    pieces = pieces_of(name)
    untrained = _captured(build(name, OTHER_SEED))
    run = build(name, SEED)
    for number in range(CUT + 1):
        run.step(number)
    tasks = {}
    for index, piece in enumerate(pieces):
        tasks[piece] = Task(name, str(folder / str(index)), CUT, STEPS, str(folder / f"{index}.pt"))
        with CheckpointManager(tasks[piece].root, config=CONFIG, **run.components) as manager:
            adapters = manager._adapters
            adapters[piece[0]] = Forgetful(adapters[piece[0]], piece, untrained[piece[0]])
            manager.save(CUT)
    return tasks


@pytest.fixture(scope="session")
def without(tmp_path_factory):
    """The resumed runs of each case, each without one of its pieces, by piece; made once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    shared = shared / "exact-resume-without"
    with FileLock(f"{shared}.lock"):
        if not (shared / DONE).exists():
            with quiet():
                tasks = {name: _tasks_without(name, shared / str(index)) for index, name in enumerate(CASES)}
            resume([task for pieces in tasks.values() for task in pieces.values()], shared)
            torch.save(tasks, shared / DONE)
    tasks = torch.load(shared / DONE, weights_only=False)
    return {
        name: {piece: torch.load(task.out, weights_only=False) for piece, task in pieces.items()}
        for name, pieces in tasks.items()
    }


@functools.cache
def _expected(name: str) -> Any:
    return uninterrupted(name, STEPS)


def _difference(name: str, found: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        check(_expected(name), found)
    return str(caught.value)


@pytest.mark.parametrize("title", NAMED)
def test_a_resume_without_it_differs_by_name(title, without):
    name, piece, expected = NAMED[title]
    found = without[name][piece]
    difference = _difference(name, found)
    assert expected in difference
    assert piece[0] in difference
    later = {moment: state for moment, state in found.items() if moment.startswith("step")}
    assert _difference(name, later).startswith(f"step {CUT + 1}")  # training itself goes another way


@pytest.mark.parametrize("name", CASES)
def test_no_kind_of_state_can_be_left_out_unnoticed(name, without):
    assert len(without[name]) > 10
    unnoticed = []
    for piece, found in without[name].items():
        if piece[0] not in _difference(name, found):
            unnoticed.append(piece)
    assert not unnoticed
