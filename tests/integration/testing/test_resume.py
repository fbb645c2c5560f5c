"""``assert_resume_exact`` passes on runs that resume exactly, and says of the others what is wrong with them."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from checkpointer.data import ResumableLoader
from checkpointer.errors import ConfigError
from checkpointer.testing import assert_resume_exact
from checkpointer.testing.resume.check import compare_runs
from checkpointer.testing.resume.runs import Experiment, Record, Segment, do
from tests.support import processes
from tests.unit.state.test_unregistered import Sam

STEPS, CUT = 6, 2
Made = tuple[dict[str, Any], Any]


class Data:
    """Batches in a shuffled order, and the position in it."""

    def __init__(self) -> None:
        self.rows, self.position = torch.randn(40, 3, generator=torch.Generator().manual_seed(5)), 0

    def next(self) -> torch.Tensor:
        self.position += 4
        return self.rows[self.position - 4 : self.position]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Forgetful(Data):
    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any, Data]:
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), Data()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor, factor: float = 1.0) -> float:
    optimizer.zero_grad()
    loss: torch.Tensor = model(batch).square().mean() * factor
    loss.backward()
    optimizer.step()
    return loss.item()


def good() -> Made:
    model, optimizer, scheduler, data = parts()

    def step(number: int) -> float:
        loss = learn(model, optimizer, data.next() + random.random())
        scheduler.step()
        return loss

    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}, step


def good_loader() -> Made:
    """A shuffled DataLoader, taken up in the middle of its second epoch; its iterator is made by the first step."""
    model, optimizer, _, data = parts()
    loader = ResumableLoader(DataLoader(TensorDataset(data.rows), batch_size=16, shuffle=True))

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from (batch for (batch,) in loader)

    batches = endless()
    return {"model": model, "optimizer": optimizer, "loader": loader}, lambda _: learn(model, optimizer, next(batches))


class Trainer:
    """A run as an object, with a count and a log that do not matter."""

    def __init__(self) -> None:
        self.model, self.optimizer, self.scheduler, self.data = parts()
        self.average = copy.deepcopy(self.model)
        self.started, self.log = time.time(), []

    def step(self, number: int) -> torch.Tensor:
        loss = learn(self.model, self.optimizer, self.data.next())
        self.scheduler.step()
        self.log.append(loss)
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.data.lerp_(fast.detach(), 0.1)
        return torch.tensor(loss)


def good_object() -> Made:
    run = Trainer()
    names = ("model", "optimizer", "scheduler", "data", "average")
    return {name: getattr(run, name) for name in names}, run.step


def average_not_registered() -> Made:
    components, step = good_object()
    del components["average"]
    return components, step


def average_in_a_closure() -> Made:
    model, optimizer, scheduler, data = parts()
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step(number: int) -> float:
        loss = learn(model, optimizer, data.next())
        for name, parameter in model.named_parameters():
            averages[name].lerp_(parameter.detach(), 0.1)
        return loss

    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}, step


def position_forgotten() -> Made:
    components, step = good()
    del components["data"]
    return components, step


def position_not_loaded() -> Made:
    model, optimizer, _, _ = parts()
    data = Forgetful()
    return {"model": model, "optimizer": optimizer, "data": data}, lambda _: learn(model, optimizer, data.next())


def drawn_in_a_constructor() -> Made:
    model, optimizer, _, data = parts()
    made: list[Any] = []

    class Augmentation:
        def __init__(self) -> None:
            self.offset = torch.rand(()).item()

    def step(number: int) -> float:
        if not made:
            made.append(Augmentation())  # after the restore, as the iterator of a DataLoader
        return learn(model, optimizer, data.next())

    return {"model": model, "optimizer": optimizer, "data": data}, step


def iterator_of_a_loader() -> Made:
    """A DataLoader that is not shuffled: the right batches, yet its iterator has drawn a number."""
    model, optimizer, _, _ = parts()
    loader = DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4)
    batches: list[Any] = []

    def step(number: int) -> float:
        if not batches:
            batches.extend(batch for (batch,) in loader)
        return learn(model, optimizer, batches[number % 2])

    return {"model": model, "optimizer": optimizer}, step


def by_the_clock() -> Made:
    model, optimizer, _, data = parts()
    return {"model": model, "optimizer": optimizer, "data": data}, lambda _: learn(
        model, optimizer, data.next(), factor=1 + time.perf_counter_ns() % 1000
    )


def not_seeded() -> Made:
    model, optimizer, _, data = parts()
    random.seed()
    return {"model": model, "optimizer": optimizer, "data": data}, lambda _: learn(
        model, optimizer, data.next() + random.random()
    )


def scheduler_not_registered() -> Made:
    components, step = good()
    del components["scheduler"]
    return components, step


def optimizer_inside_forgotten() -> Made:
    """Its moments are in no state_dict; everything else is."""
    model, _, _, data = parts()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "data": data}, lambda _: learn(model, optimizer, data.next())


def temperature_forgotten() -> Made:
    model, optimizer, _, data = parts()
    log_alpha = torch.zeros((), requires_grad=True)
    tuning = torch.optim.Adam([log_alpha], lr=0.1)

    def step(number: int) -> float:
        log_alpha.grad = log_alpha.detach() - 1
        tuning.step()
        return learn(model, optimizer, data.next(), factor=log_alpha.exp().item())

    return {"model": model, "optimizer": optimizer, "tuning": tuning, "data": data}, step


class Restless(nn.Module):
    """Calls its dropouts in an order that depends on a count which is nobody's state."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Dropout(0.1), nn.Dropout(0.5), nn.Linear(3, 1)
        self._calls = 0

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        first, second = (self.one, self.other) if self._calls % 4 else (self.other, self.one)
        output: torch.Tensor = self.last(first(data) + 2 * second(data).detach())
        return output


def dropouts_in_another_order() -> Made:
    torch.manual_seed(0)
    model = Restless()
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), Data()
    return {"model": model, "optimizer": optimizer, "data": data}, lambda _: learn(model, optimizer, data.next())


def broken() -> Made:
    model, optimizer, _, data = parts()

    def step(number: int) -> float:
        if number == 4:
            raise ZeroDivisionError("the fourth step is too much")
        return learn(model, optimizer, data.next())

    return {"model": model, "optimizer": optimizer, "data": data}, step


def dies() -> Made:
    import os

    os._exit(7)


def not_a_pair() -> Any:
    return parts()


class SameProcess(Experiment):
    """Does every part in this process: four processes that import torch take ten seconds."""

    def run(self, part: Segment) -> Record:
        return do(self.make_run, str(self.folder), part)


class Forked:
    """In the place of multiprocessing's new processes: forks of one that has only imported torch."""

    class Process:
        def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
            self._work = pickle.dumps((target, args))
            self.exitcode: int | None = None

        def start(self) -> None:
            code = "import pickle, sys; target, args = pickle.loads(bytes.fromhex(sys.argv[1])); target(*args)"
            self.exitcode = processes.run([sys.executable, "-c", code, self._work.hex()]).returncode

        def join(self) -> None:
            pass


@pytest.fixture
def forked(monkeypatch):
    """A new process each time costs seconds."""
    monkeypatch.setattr("checkpointer.testing.resume.runs.multiprocessing.get_context", lambda _: Forked)


def test_a_run_that_resumes_exactly_passes():
    """In processes that are new indeed."""
    assert_resume_exact("tests.integration.testing.test_resume:good_object", steps=STEPS, interrupt_at=1)


@pytest.mark.usefixtures("forked")
def test_a_run_that_resumes_exactly_passes_whatever_the_number_of_interruptions():
    assert_resume_exact("tests.integration.testing.test_resume:good_object", steps=STEPS, interrupt_at=[1, 3])


@pytest.mark.usefixtures("forked")
def test_a_defect_fails_with_its_cause():
    with pytest.raises(AssertionError, match=r"(?s)step 3, resumed after step 2.*unregistered state: 'average'"):
        assert_resume_exact(average_not_registered, steps=STEPS, interrupt_at=CUT)


@pytest.mark.parametrize("make_run", [good, good_object, good_loader])
@pytest.mark.parametrize("cuts", [(0,), (4,), (0, 1, 2, 3, 4)])
def test_a_run_that_resumes_exactly_shows_no_difference(make_run, cuts, tmp_path):
    assert not compare_runs(SameProcess(make_run, tmp_path, STEPS, cuts))


@pytest.mark.parametrize(
    "make_run, expected",
    [
        (average_not_registered, ["step 3", "average", "Sequential", "unregistered state"]),
        (average_in_a_closure, ["step 3", "averages", "unregistered state"]),
        (position_forgotten, ["step 3", "the loss", "data order", "'data' (Data, first position)", "ResumableLoader"]),
        (position_not_loaded, ["step 3", "'data'", "'position'", "does not come back"]),
        (drawn_in_a_constructor, ["step 3", "random numbers", "torch", "made[0].offset", "constructor"]),
        (iterator_of_a_loader, ["step 3", "random numbers", "torch", "iterator of a"]),
        (by_the_clock, ["step 0", "not deterministic", "the time"]),
        (not_seeded, ["not deterministic", "seed every generator", "'rng'", "python"]),
        (scheduler_not_registered, ["step 3", "'optimizer'", "lr", "unregistered state", "'scheduler'", "StepLR"]),
        (dropouts_in_another_order, ["step 3", "the loss", "another order", "'model.one'"]),
        (
            optimizer_inside_forgotten,
            [
                "step 3",
                "'model'",
                "unregistered state",
                "'optimizer.base_optimizer' (SGD, first state.",
                "momentum_buf",
            ],
        ),
        (temperature_forgotten, ["step 3", "unregistered state", "'log_alpha' (Tensor)"]),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:component 'optimizer' holds another", "ignore:optimizer 'tuning' trains 1 parameter"
)
def test_a_defect_is_found_by_name_with_its_cause(make_run, expected, tmp_path):
    problem = compare_runs(SameProcess(make_run, tmp_path, STEPS, (CUT,)))
    assert not [text for text in expected if text not in problem], problem


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "make_run, expected",
    [
        (broken, ["the uninterrupted run failed", "ZeroDivisionError: the fourth step", "in step"]),
        (dies, ["the uninterrupted run", "exit code 7"]),
        (not_a_pair, ["make_run must return (components, step)"]),
    ],
)
def test_a_failed_process_is_shown(make_run, expected):
    with pytest.raises(AssertionError) as caught:
        assert_resume_exact(make_run, steps=STEPS, interrupt_at=CUT)
    assert all(text in str(caught.value) for text in expected), str(caught.value)


@pytest.mark.parametrize("interrupt_at", [-1, 5, [], [3, 2], [2, 2]])
def test_an_interruption_outside_the_run_is_refused(interrupt_at):
    with pytest.raises(ConfigError, match="interrupt_at"):
        assert_resume_exact(good, steps=STEPS, interrupt_at=interrupt_at)


@pytest.mark.parametrize("make_run", [lambda: None, "tests.integration.testing.test_resume.good"])
def test_a_function_that_a_new_process_cannot_find_is_refused(make_run):
    with pytest.raises(ConfigError, match="make_run"):
        assert_resume_exact(make_run, steps=STEPS, interrupt_at=CUT)
