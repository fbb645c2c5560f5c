"""Resume is exact for everything that torch has: each class once. ``scripts/exact_resume`` is the long form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.campaign.exact_resume import layers, optimizers, schedulers
from tests.campaign.exact_resume.cases import CASES, SHORT
from tests.campaign.exact_resume.engine import check, resume, save, task_for, uninterrupted

CUT, STEPS = 3, 7
DONE = f"resumed-{CUT}.pt"


@pytest.fixture(scope="session")
def resumed(tmp_path_factory):
    """The moments of each case, resumed. One new process resumes them all: importing torch takes longer than that."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers, of which the first does the work
    shared = shared / "exact-resume"
    with FileLock(f"{shared}.lock"):
        if not (shared / DONE).exists():
            _resume_all(shared)
    return {name: torch.load(shared / str(number) / DONE, weights_only=False) for number, name in enumerate(SHORT)}


def _resume_all(folder: Path) -> None:
    tasks = [task_for(name, folder / str(number), CUT, STEPS) for number, name in enumerate(SHORT)]
    ready = []
    for task in tasks:
        try:
            save(task.case, Path(task.root), [CUT])
            ready.append(task)
        except Exception as error:
            Path(task.out).parent.mkdir(parents=True, exist_ok=True)
            torch.save(f"{type(error).__name__} before or in the save: {error}", task.out)
    resume(ready, folder)
    (folder / DONE).touch()


@pytest.mark.parametrize("name", SHORT)
def test_a_resumed_run_goes_on_bit_for_bit(name, resumed):
    check(uninterrupted(name, STEPS), resumed[name])


def test_every_optimizer_of_torch_has_a_case():
    assert optimizers.classes().keys() - optimizers.EXCLUDED_CLASSES.keys() <= CASES.keys()


def test_every_scheduler_of_torch_has_a_recipe():
    missing = schedulers.classes() - schedulers.EXCLUDED.keys() - schedulers.RECIPES.keys()
    assert not missing, f"add a recipe, or a reason for leaving them out: {missing}"


def test_every_layer_with_state_or_random_numbers_has_a_case():
    assert layers.classes().keys() - layers.EXCLUDED.keys() <= CASES.keys()


def test_every_parametrization_of_torch_has_a_case():
    assert {f"parametrizations.{name}" for name in layers.parametrization_names()} <= CASES.keys()
