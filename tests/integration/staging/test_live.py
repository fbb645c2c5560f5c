"""Lazy mode: whatever optimizers, modules and users do after ``save``, what is written is the state at the call."""

from __future__ import annotations

import copy
import errno
import gc
import multiprocessing
import os
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.policy.lazy_or_async import LazyOrAsync
from checkpointer.staging.arena import Arena
from checkpointer.storage import LocalStorage
from checkpointer.system import memory
from tests.support import gate
from tests.support.compare import assert_identical


def manager(root: Path, mode: str = "lazy", **components: Any) -> CheckpointManager:
    return CheckpointManager(root, config={"write": {"mode": mode, "durable": False}}, **components)


def snapshot(components: dict[str, Any]) -> Any:
    """A copy of the state of each component."""
    return copy.deepcopy(
        {
            name: dict(part.state_dict()) if isinstance(part, nn.Module) else part.state_dict()
            for name, part in components.items()
        }
    )


def live_tensors(mgr: CheckpointManager) -> set[str]:
    """What the save in flight reads from live memory."""
    watched = mgr._saver._steps._save
    if watched is None or watched.live is None:
        return set()
    return {f"{live.slot.component}.{live.slot.key}" for live in watched.live._tensors}


@dataclass
class Case:
    """Some training: components, and a step of it."""

    components: dict[str, Any]
    step: Callable[[], object]
    """Gradients, and whatever changes the state between two saves."""
    live: set[str] = field(default_factory=set)
    """Some that have to be read from live memory."""
    copied: set[str] = field(default_factory=set)
    """Some that must not be."""


def linear(seed: int = 0, size: int = 300) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(size, size)


def step_of(
    model: nn.Module, *optimizers: torch.optim.Optimizer, inputs: torch.Tensor | None = None
) -> Callable[[], None]:
    given = torch.randn(4, 300) if inputs is None else inputs

    def step() -> None:
        model.zero_grad()
        out = model(given)
        out.float().square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def adam() -> Case:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Case(
        {"model": model, "optimizer": optimizer},
        step_of(model, optimizer),
        live={"model.weight", "optimizer.state.0.exp_avg", "optimizer.state.1.step"},
    )


def two_models() -> Case:
    models = {"first": linear(0), "second": linear(1)}
    optimizers: dict[str, Any] = {
        "sgd": torch.optim.SGD(models["first"].parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(models["second"].parameters(), lr=0.1),
    }

    def step() -> None:
        step_of(models["first"], optimizers["sgd"])()
        step_of(models["second"], optimizers["adam"])()

    live = {"first.weight", "second.weight", "sgd.state.0.momentum_buffer", "adam.state.0.exp_avg"}
    return Case({**models, **optimizers}, step, live=live)


def lbfgs() -> Case:
    model = linear(size=40)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=3)
    inputs = torch.randn(4, 40)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    return Case({"model": model, "optimizer": optimizer}, lambda: optimizer.step(closure), live={"model.weight"})


def accumulation() -> Case:
    """Several backward passes before the step; the save falls between them."""
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs = torch.randn(4, 300)

    def step() -> None:
        for _ in range(3):
            model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Case({"model": model, "optimizer": optimizer}, step, live={"model.weight"})


class Scaled:
    """A gradient scaler whose steps are skipped, and an average that moves all the same."""

    def __init__(self) -> None:
        self.model = linear()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
        self.ema = AveragedModel(self.model)
        self.calls = 0

    def step(self) -> None:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(2, 300)).sum()
        self.scaler.scale(loss).backward()
        if self.calls % 2 == 0:
            self.model.weight.grad[0, 0] = torch.inf
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.model)
        self.ema.module.weight.data.mul_(1.5)


def scaler() -> Case:
    run = Scaled()
    components = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler, "ema": run.ema}
    return Case(components, run.step, live={"model.weight"}, copied={"ema.module.weight", "ema.weight"})


def unheld() -> Case:
    """Half of the parameters belong to no optimizer, and are changed by hand."""
    model = nn.Sequential(linear(0), linear(1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)

    def step() -> None:
        with torch.no_grad():
            model[1].weight.mul_(1.5)
        model[1].bias.data.add_(1)
        step_of(model, optimizer)()

    return Case({"model": model, "optimizer": optimizer}, step, live={"model.0.weight"}, copied={"model.1.weight"})


def embedding_max_norm() -> Case:
    """Its forward pass changes the parameter; that pass comes before the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 300, max_norm=1.0), linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = step_of(model, optimizer, inputs=torch.arange(100))
    return Case({"model": model, "optimizer": optimizer}, step, live={"model.1.weight"}, copied={"model.0.weight"})


def bag_max_norm_tied() -> Case:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(100, 300, max_norm=1.0), nn.Linear(300, 100, bias=False)
    head.weight = bag.weight
    model = nn.Sequential(bag, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = step_of(model, optimizer, inputs=torch.arange(100).reshape(10, 10))
    return Case({"model": model, "optimizer": optimizer}, step, copied={"model.0.weight", "model.1.weight"})


def spectral_norm(norm: Callable[[nn.Module], nn.Module]) -> Case:
    model = nn.Sequential(norm(linear(0)), nn.BatchNorm1d(300), linear(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return Case({"model": model, "optimizer": optimizer}, step_of(model, optimizer), live={"model.2.weight"})


def sparse_gradients() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 300, sparse=True), linear())
    sparse = torch.optim.SparseAdam(model[0].parameters(), lr=0.1)
    dense = torch.optim.SGD(model[1].parameters(), lr=0.1)
    step = step_of(model, sparse, dense, inputs=torch.tensor([1, 2, 3]))
    live = {"model.0.weight", "sparse.state.0.exp_avg"}
    return Case({"model": model, "sparse": sparse, "dense": dense}, step, live=live)


def sparse_momentum() -> Case:
    torch.manual_seed(0)
    model = nn.Embedding(200, 300, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = step_of(model, optimizer, inputs=torch.tensor([1, 2, 3]))
    return Case({"model": model, "optimizer": optimizer}, step, live={"model.weight"})


def bfloat16() -> Case:
    model = linear().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = step_of(model, optimizer, inputs=torch.randn(4, 300).bfloat16())
    return Case({"model": model, "optimizer": optimizer}, step, live={"model.weight", "optimizer.state.0.exp_avg"})


def tied() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 300), nn.Linear(300, 100, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = step_of(model, optimizer, inputs=torch.arange(100))
    return Case({"model": model, "optimizer": optimizer}, step, live={"model.0.weight"})


class TransposedTie(nn.Module):
    """Two parameters on the same memory, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(300, 200))
        self.out = nn.Parameter(self.into.detach().t())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.into @ self.out


def transposed() -> Case:
    torch.manual_seed(0)
    model = TransposedTie()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    return Case({"model": model, "optimizer": optimizer}, step_of(model, optimizer), copied={"model.out"})


def channels_last() -> Case:
    torch.manual_seed(0)
    model = nn.Conv2d(30, 30, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step = step_of(model, optimizer, inputs=torch.randn(2, 30, 8, 8))
    copied = {"model.weight", "optimizer.state.0.exp_avg"}
    return Case({"model": model, "optimizer": optimizer}, step, live={"model.bias"}, copied=copied)


def tensor_rate() -> Case:
    """The learning rate is a tensor that the schedule fills in place."""
    model = linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step() -> None:
        scheduler.step()
        step_of(model, optimizer)()

    components = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return Case(components, step, live={"model.weight"}, copied={"optimizer.param_groups.0.lr"})


def momentum_encoder() -> Case:
    """A second encoder that the optimizer holds too, and whose parameters the forward pass replaces, as in MoCo."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(0, 1000), linear(1, 1000).requires_grad_(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(4, 1000)

    def step() -> None:
        for query, key in zip(model[0].parameters(), model[1].parameters(), strict=True):
            key.data = key.data * 0.5 + query.data * 0.5
        reused = [torch.full((1000, 1000), 7.0) for _ in range(8)]  # what takes the place of memory that was freed
        del reused
        step_of(model, optimizer, inputs=inputs)()

    return Case({"model": model, "optimizer": optimizer}, step, live={"model.0.weight"})


class Unhooked(torch.optim.SGD):
    """Its steps call no hook: the class was changed after torch had looked at it."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad, alpha=0.1)


def unhooked() -> Case:
    model = linear()
    optimizer = Unhooked(model.parameters(), lr=0.1)
    Unhooked.step = Unhooked.step.__wrapped__
    return Case({"model": model, "optimizer": optimizer}, step_of(model, optimizer), copied={"model.weight"})


def of_group(name: str) -> Case:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    optimizer.param_groups[0][name] = True
    if name == "differentiable":  # as torch itself would step
        optimizer.param_groups[0][name] = False
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], name: True})
    return Case({"model": model, "optimizer": optimizer}, step_of(model, optimizer), copied={"model.weight"})


def compiled() -> Case:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(4, 300)
    step = torch.compile(optimizer.step, backend="eager")

    def train() -> None:
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        step()

    return Case({"model": model, "optimizer": optimizer}, train, live={"model.weight"})


CASES: dict[str, Callable[[], Case]] = {
    "one optimizer": adam,
    "two models with an optimizer each": two_models,
    "a closure": lbfgs,
    "gradient accumulation": accumulation,
    "a scaler that skips steps": scaler,
    "parameters that no optimizer holds": unheld,
    "an embedding with max_norm": embedding_max_norm,
    "a bag with max_norm, tied": bag_max_norm_tied,
    "spectral_norm": lambda: spectral_norm(nn.utils.spectral_norm),
    "spectral_norm by parametrization": lambda: spectral_norm(nn.utils.parametrizations.spectral_norm),
    "sparse gradients": sparse_gradients,
    "sparse momentum": sparse_momentum,
    "bfloat16": bfloat16,
    "tied weights": tied,
    "weights tied to their transpose": transposed,
    "channels last": channels_last,
    "a learning rate that is a tensor": tensor_rate,
    "parameters whose memory is replaced": momentum_encoder,
    "an optimizer without hooks": unhooked,
    "a capturable optimizer": lambda: of_group("capturable"),
    "a differentiable optimizer": lambda: of_group("differentiable"),
}


def check(tmp_path: Path, make: Callable[[], Case], rounds: int = 2) -> None:
    """Save, train on while the writer is held, and compare what was saved with the state at the call."""
    case = make()
    case.step()
    with manager(tmp_path, **case.components) as mgr:
        for number in range(rounds):
            with gate.closed(pieces=1) as held:
                expected = snapshot(case.components)
                handle = mgr.save(number)
                held.reached()
                names = live_tensors(mgr)
                case.step()
                case.step()
                held.open()
                handle.result()
            assert case.live <= names
            assert not case.copied & names
            fresh = make()
            with CheckpointManager(tmp_path, read_only=True, **fresh.components) as reader:
                reader.restore(number)
            assert_identical(snapshot(fresh.components), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")
@pytest.mark.parametrize("name", list(CASES))
def test_training_on_does_not_change_what_is_saved_with(tmp_path, name):
    check(tmp_path, CASES[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("first", ["manager", "compile"])
def test_a_compiled_step_calls_the_hook_whichever_was_there_first_and_without_a_warning(tmp_path, first):
    torch._dynamo.reset()
    case = compiled()
    if first == "compile":
        case.step()
    with manager(tmp_path, **case.components) as mgr:
        case.step()
        for number in range(2):
            with gate.closed() as held:
                expected = snapshot(case.components)
                handle = mgr.save(number)
                held.reached()
                assert case.live <= live_tensors(mgr)
                case.step()
                held.open()
                handle.result()
            assert_identical(restored(tmp_path, number), expected)


# --------------------------------------------------------------------------------------------------- writes by hand


def restored(root: Path, step: int) -> Any:
    """What is in a checkpoint of ``adam()``, or of ``compiled()``."""
    fresh = adam()
    with CheckpointManager(root, read_only=True) as reader:
        saved = reader._repository.find(step)
    if b"exp_avg" not in (Path(saved.path) / "index.safetensors").read_bytes():
        fresh = compiled()
    with CheckpointManager(root, read_only=True, **fresh.components) as reader:
        reader.restore(step)
    return snapshot(fresh.components)


@pytest.fixture
def case() -> Case:
    """One optimizer that has stepped."""
    made = adam()
    made.step()
    return made


def assert_copies_from_now_on(root: Path, mgr: CheckpointManager, case: Case) -> None:
    """The next saves are right whatever is changed beside them, and there is one warning, at the line that saves."""
    with pytest.warns(  # noqa: PT031  two saves, of which the first warns
        CheckpointerWarning, match=r"was changed after a save in lazy mode.*copied when save"
    ) as caught:
        for step in (2, 3):
            case.step()
            with gate.closed() as held:
                expected = snapshot(case.components)
                handle = mgr.save(step)
                held.reached()
                assert live_tensors(mgr) == set()
                case.components["model"].weight.data.clamp_(-0.001 * step, 0.001)
                case.step()
                held.open()
                handle.result()
            assert_identical(restored(root, step), expected)
    assert [(Path(warning.filename).name, warning.category) for warning in caught] == [
        ("test_live.py", CheckpointerWarning)
    ]


def clip(model: nn.Module) -> None:
    """As the critic of a WGAN is clipped."""
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def through_numpy(model: nn.Module) -> None:
    model.weight.detach().numpy()[:] *= 2


def one_of_many(model: nn.Module) -> None:
    model.bias.data.mul_(2)


def replaced_value(model: nn.Module) -> None:
    model.weight.data.copy_(torch.full_like(model.weight, torch.nan))


def given_back(model: nn.Module) -> None:
    model.weight.untyped_storage().resize_(0)


@pytest.mark.parametrize("write", [clip, through_numpy, one_of_many, replaced_value])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_write_that_no_version_shows_fails_that_save_and_names_the_tensor_and_staged(tmp_path, write, pieces):
    torch.manual_seed(0)
    model = linear(size=2000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case = Case({"model": model, "optimizer": optimizer}, step_of(model, optimizer, inputs=torch.randn(4, 2000)))
    versions = [parameter._version for parameter in model.parameters()]
    with manager(tmp_path, **case.components) as mgr:
        with gate.closed(pieces=pieces) as held:
            handle = mgr.save(1)
            held.reached()
            write(model)
            held.open()
            with pytest.raises(SaveError, match=r"model\.(weight|bias) was changed .* mgr\.staged\(\) .*mode: async"):
                handle.result()
        assert [parameter._version for parameter in model.parameters()] == versions
        assert mgr.checkpoints() == []


def test_after_a_clipped_save_the_run_goes_on_with_copies_and_says_so_once(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr:
        with gate.closed() as held:
            handle = mgr.save(1)
            held.reached()
            clip(case.components["model"])
            case.step()
            held.open()
            with pytest.raises(SaveError, match="weight clipping"):
                handle.result()
        assert_copies_from_now_on(tmp_path, mgr, case)


def test_clipping_that_is_already_done_when_the_step_copies_fails_that_save(tmp_path, case):
    """What the hook copies is compared as well."""
    with manager(tmp_path, **case.components) as mgr, gate.closed(file="optimizer") as held:
        handle = mgr.save(1)
        held.reached()
        for state in case.components["optimizer"].state.values():
            state["exp_avg_sq"].numpy()[...] += 1
        mgr.staged()
        held.open()
        with pytest.raises(SaveError, match=r"optimizer\.state\.\d\.exp_avg_sq was changed"):
            handle.result()


def test_a_write_that_is_under_way_while_a_block_is_copied_is_noticed_though_the_block_is_right(tmp_path):
    """The bytes of the block are still those of the call: the write has not come to its lines when they are copied."""
    model = linear(size=2000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with manager(tmp_path, model=model, optimizer=optimizer) as mgr, gate.closed(pieces=2) as held:
        handle = mgr.save(1)
        held.reached()
        model.weight.data[:100].mul_(2)  # in the block that was copied a moment ago
        mgr.staged()
        held.open()
        with pytest.raises(SaveError, match=r"model\.weight was changed"):
            handle.result()


def test_memory_that_was_given_back_is_not_read(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        handle = mgr.save(1)
        held.reached()
        given_back(case.components["model"])
        mgr.staged()
        held.open()
        with pytest.raises(SaveError, match=r"model\.weight was changed"):
            handle.result()


def test_a_change_by_hand_is_an_error_of_that_save_and_of_no_other(tmp_path, case):
    mgr = manager(tmp_path, **case.components)
    weight = case.components["model"].weight
    with mgr:
        with gate.closed() as held:
            handle = mgr.save(1)
            held.reached()
            with torch.no_grad():
                weight.add_(1)
            case.step()
            held.open()
            with pytest.raises(SaveError, match=r"model\.weight was changed .* mgr\.staged\(\) .*mode: async"):
                handle.result()
        assert mgr.checkpoints() == []
        assert_copies_from_now_on(tmp_path, mgr, case)


def test_a_change_by_hand_in_the_middle_of_a_tensor_is_noticed_before_any_step(tmp_path):
    model = linear(size=2000)  # 16 MiB: the writer asks for it in several blocks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with manager(tmp_path, model=model, optimizer=optimizer) as mgr, gate.closed(pieces=2) as held:
        handle = mgr.save(1)
        held.reached()
        with torch.no_grad():
            model.weight.mul_(2)
        held.open()
        with pytest.raises(SaveError, match=r"model\.weight was changed"):
            handle.result()


def test_after_staged_parameters_may_be_changed_by_hand(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        expected = snapshot(case.components)
        handle = mgr.save(1)
        held.reached()
        mgr.staged()
        case.components["model"].weight.data.zero_()
        with torch.no_grad():
            case.components["model"].bias.add_(1)
        case.step()
        held.open()
        handle.result()
    assert_identical(restored(tmp_path, 1), expected)


@pytest.mark.parametrize("mode", ["sync", "async", "lazy"])
def test_staged_without_a_save_in_flight_does_nothing(tmp_path, case, mode):
    with manager(tmp_path, mode, **case.components) as mgr:
        mgr.staged()
        mgr.save(1)
        mgr.wait()
        mgr.staged()


# -------------------------------------------------------------------------------------------- writes of training itself


def averaged() -> Case:
    """Averaged weights that follow each step."""
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = AveragedModel(model)
    train = step_of(model, optimizer)

    def step() -> None:
        train()
        ema.update_parameters(model)

    live = {"model.weight", "optimizer.state.0.exp_avg"}
    return Case({"model": model, "optimizer": optimizer, "ema": ema}, step, live=live, copied={"ema.module.weight"})


def running_statistics() -> Case:
    """Buffers that each forward pass changes."""
    model = nn.Sequential(linear(0), nn.BatchNorm1d(300), linear(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Case(
        {"model": model, "optimizer": optimizer},
        step_of(model, optimizer),
        live={"model.0.weight", "optimizer.state.0.exp_avg"},
        copied={"model.1.running_mean"},
    )


BUSY: dict[str, Callable[[], Case]] = {
    "one optimizer": adam,
    "a closure": lbfgs,
    "gradient accumulation": accumulation,
    "a scaler that skips steps": scaler,
    "averaged weights": averaged,
    "running statistics": running_statistics,
}


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinities:checkpointer.errors.CheckpointerWarning")  # so many steps
@pytest.mark.parametrize("name", list(BUSY))
def test_no_step_backward_forward_or_average_fails_a_save_whenever_it_comes(tmp_path, monkeypatch, name):
    """Many tiny steps against a slow disk, from some moment in the middle of the files on."""
    monkeypatch.setattr(memory, "BLOCK", 8 << 10)  # many blocks of small tensors
    monkeypatch.setattr(LazyOrAsync, "choose", lambda _: "lazy")  # though it costs more here than copying
    dice = random.Random(name)
    case = BUSY[name]()
    case.step()
    steps = 0
    with gate.slow(seed=dice.randrange(1000)), manager(tmp_path, **case.components) as mgr:
        for number in range(6):
            expected = snapshot(case.components)
            handle = mgr.save(number)
            assert case.live <= live_tensors(mgr)
            threading.Event().wait(number * dice.uniform(0, 0.01))  # the first steps come at once
            while not handle.done():
                case.step()
                steps += 1
            handle.result()
            fresh = BUSY[name]()
            with CheckpointManager(tmp_path, read_only=True, **fresh.components) as reader:
                reader.restore(number)
            assert_identical(snapshot(fresh.components), expected)
    assert steps


# ----------------------------------------------------------------------------------------- saves from inside a step


def held_save(mgr: CheckpointManager, held: gate.Gate, state: dict[str, Any], case: Case) -> None:
    """Save once, and note the state at that moment."""
    if not state:
        state.update(snapshot(case.components))
        mgr.save(1)
        held.reached()


@pytest.mark.parametrize("when", ["own hook", "global hook before", "global hook after"])
def test_a_save_from_a_hook_before_the_step_is_not_torn_by_that_step(tmp_path, case, when):
    state: dict[str, Any] = {}
    gates: list[gate.Gate] = []

    def hook(*arguments: Any) -> None:
        held_save(mgrs[0], gates[0], state, case)

    mgrs: list[CheckpointManager] = []
    handles = []
    if when == "global hook before":
        handles.append(torch_optimizer.register_optimizer_step_pre_hook(hook))
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        mgrs.append(mgr)
        gates.append(held)
        if when == "own hook":
            handles.append(case.components["optimizer"].register_step_pre_hook(hook))
        elif when == "global hook after":
            handles.append(torch_optimizer.register_optimizer_step_pre_hook(hook))
        case.step()
        held.open()
        mgr.wait()
        for handle in handles:
            handle.remove()
    assert_identical(restored(tmp_path, 1), state)


def test_a_save_from_a_closure_is_not_torn_by_the_rest_of_the_step(tmp_path):
    case = lbfgs()
    case.step()
    state: dict[str, Any] = {}
    model, optimizer = case.components["model"], case.components["optimizer"]
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:

        def closure() -> Any:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 40)).square().sum()
            loss.backward()
            held_save(mgr, held, state, case)
            return loss

        optimizer.step(closure)
        held.open()
        mgr.wait()
    fresh = lbfgs()
    with CheckpointManager(tmp_path, read_only=True, **fresh.components) as reader:
        reader.restore(1)
    assert_identical(snapshot(fresh.components), state)


def test_after_a_step_that_failed_saves_are_still_whole_and_lazy_again_after_the_next(tmp_path, case):
    optimizer = case.components["optimizer"]

    def fail() -> Any:
        raise ValueError("no loss")

    with manager(tmp_path, **case.components) as mgr:
        with pytest.raises(ValueError, match="no loss"):
            optimizer.step(fail)
        for number, live in [(1, False), (2, True)]:
            with gate.closed() as held:
                expected = snapshot(case.components)
                handle = mgr.save(number)
                held.reached()
                assert bool(live_tensors(mgr)) is live
                case.step()
                held.open()
                handle.result()
            assert_identical(restored(tmp_path, number), expected)


# --------------------------------------------------------------------------------- what else may happen during a save


def test_a_step_in_another_thread_waits_for_the_copy_too(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        expected = snapshot(case.components)
        handle = mgr.save(1)
        held.reached()
        other = threading.Thread(target=case.step)
        other.start()
        other.join()
        held.open()
        handle.result()
    assert_identical(restored(tmp_path, 1), expected)


def test_restoring_during_a_save_waits_for_it(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr:
        mgr.save(1)
        mgr.wait()
        first = snapshot(case.components)
        case.step()
        second = snapshot(case.components)
        with gate.closed() as held:
            handle = mgr.save(2)
            held.reached()
            threading.Timer(0.05, held.open).start()
            mgr.restore(1)
            assert handle.done()
        assert_identical(snapshot(case.components), first)
    assert_identical(restored(tmp_path, 2), second)


def test_closing_during_a_save_commits_it(tmp_path, case):
    mgr = manager(tmp_path, **case.components)
    with gate.closed() as held:
        expected = snapshot(case.components)
        handle = mgr.save(1)
        held.reached()
        case.step()
        threading.Timer(0.05, held.open).start()
        mgr.close()
    assert handle.done()
    case.step()
    assert_identical(restored(tmp_path, 1), expected)


def test_an_error_of_the_loop_during_a_save_commits_it_and_goes_on(tmp_path, case):
    expected: Any = None

    def loop() -> None:
        nonlocal expected
        with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
            expected = snapshot(case.components)
            mgr.save(1)
            held.reached()
            case.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert_identical(restored(tmp_path, 1), expected)


def test_a_second_save_waits_for_the_first_and_both_are_whole(tmp_path, case):
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        expected = [snapshot(case.components)]
        first = mgr.save(1)
        held.reached()
        case.step()
        expected.append(snapshot(case.components))
        threading.Timer(0.05, held.open).start()
        mgr.save(2)
        assert first.done()
        case.step()
        mgr.wait()
    assert_identical([restored(tmp_path, 1), restored(tmp_path, 2)], expected)


def test_a_save_that_fails_while_live_releases_training_and_the_next_one_works(tmp_path, case, monkeypatch):
    real = LocalStorage.write
    held = gate.Gate()

    def failing(storage: Any, path: str, pieces: Any, size: int, **keywords: Any) -> float:
        if path.endswith("model.safetensors"):
            next(iter(pieces))
            held._hold()
            raise OSError(errno.EIO, "injected fault")
        return real(storage, path, pieces, size, **keywords)

    with manager(tmp_path, **case.components) as mgr:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "write", failing)
            handle = mgr.save(1)
            held.reached()
            held.open()
            with pytest.raises(SaveError, match="injected fault"):
                handle.result()
        case.step()
        expected = snapshot(case.components)
        handle = mgr.save(2)
        case.step()
        handle.result()
    assert_identical(restored(tmp_path, 2), expected)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_where_there_is_no_memory_for_the_copy_training_waits_for_the_writer(
    tmp_path, case, monkeypatch, caplog, error
):
    with manager(tmp_path, **case.components) as mgr, gate.closed() as held:
        expected = snapshot(case.components)
        handle = mgr.save(1)
        held.reached()
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "reserve", raising(error))
            other = threading.Thread(target=case.step)
            other.start()
            other.join(0.2)
            assert other.is_alive()
            held.open()
            other.join(gate.PATIENCE)
            assert not other.is_alive()
        handle.result()
    assert "training waits for the writer" in caplog.text
    assert_identical(restored(tmp_path, 1), expected)


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return function


def test_lazy_mode_holds_less_memory_than_async_mode_where_writing_is_faster_than_training(tmp_path, case):
    sizes = {}
    for mode in ("async", "lazy"):
        with manager(tmp_path / mode, mode, **case.components) as mgr:
            mgr.save(1)
            mgr.wait()
            case.step()
            stager = mgr._saver._stager
            sizes[mode] = stager._arena.size + stager._rest.size
    assert sizes["lazy"] < sizes["async"] / 10


def test_lazy_mode_never_holds_more_memory_than_async_mode(tmp_path, case):
    sizes = {}
    for mode in ("async", "lazy"):
        with manager(tmp_path / mode, mode, **case.components) as mgr, gate.closed() as held:
            mgr.save(1)
            held.reached()
            case.step()
            stager = mgr._saver._stager
            sizes[mode] = stager._arena.size + stager._rest.size
            held.open()
    assert sizes["lazy"] <= sizes["async"] + 8192


# ------------------------------------------------------------------------------------------------------------- hooks


def hooks() -> list[Any]:
    return [
        hook
        for table in (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
        for hook in table.values()
    ]


def test_the_hooks_are_registered_once_however_often_is_saved_and_gone_after_close(tmp_path, case):
    before = hooks()
    with manager(tmp_path, **case.components) as mgr:
        counts = set()
        for step in range(3):
            mgr.save(step)
            case.step()
            counts.add(len(hooks()) - len(before))
        assert counts == {2}
    assert hooks() == before


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_other_modes_register_no_hook(tmp_path, case, mode):
    before = hooks()
    with manager(tmp_path, mode, **case.components) as mgr:
        mgr.save(1)
        assert hooks() == before


def test_two_managers_have_hooks_of_their_own(tmp_path):
    cases = [adam(), adam()]
    for case in cases:
        case.step()
    with (
        manager(tmp_path / "0", **cases[0].components) as first,
        manager(tmp_path / "1", **cases[1].components) as second,
        gate.closed() as held,
    ):
        expected = snapshot(cases[0].components)
        handle = first.save(1)
        held.reached()
        second.save(1)
        second.close()
        cases[1].step()
        cases[0].step()
        held.open()
        handle.result()
    assert_identical(restored(tmp_path / "0", 1), expected)


def test_a_manager_that_was_dropped_during_a_save_commits_it_whole_and_its_hooks_do_no_harm(tmp_path, case):
    tables = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    before = [set(table) for table in tables]
    mgr = manager(tmp_path, **case.components)
    watch = weakref.ref(mgr._saver._steps)
    with gate.closed() as held:
        expected = snapshot(case.components)
        handle = mgr.save(1)
        held.reached()
        del mgr
        gc.collect()
        case.step()
        held.open()
        handle.result()
    assert_identical(restored(tmp_path, 1), expected)
    for _ in range(200):  # the writer's thread forgets the save a moment after it is done
        gc.collect()
        if watch() is None:
            break
        threading.Event().wait(0.01)
    assert watch() is None
    case.step()
    for table, known in zip(tables, before, strict=True):
        for key in set(table) - known:
            del table[key]


# -------------------------------------------------------------------------------------------------------------- fork


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return index


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_were_forked_before_and_during_a_save_do_not_change_it(tmp_path, case):
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork")
    before = iter(loader)
    next(before)
    with manager(tmp_path, **case.components) as mgr:
        for number in range(2):
            with gate.closed() as held:
                expected = snapshot(case.components)
                handle = mgr.save(number)
                held.reached()
                during = iter(loader)
                next(during)
                case.step()
                held.open()
                handle.result()
                del during
            assert_identical(restored(tmp_path, number), expected)
    del before


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_was_forked_during_a_save_may_train(tmp_path, case):
    """It has neither the writer nor the memory that the hook copies to."""
    torch.set_num_threads(1)
    with manager(tmp_path, **case.components) as mgr:
        with gate.closed() as held:
            mgr.save(1)
            held.reached()
            case.step()  # makes the hook reserve memory, which a child does not see
            held.open()
            mgr.wait()
        with gate.closed() as held:
            expected = snapshot(case.components)
            handle = mgr.save(2)
            held.reached()
            optimizer = case.components["optimizer"]
            child = multiprocessing.get_context("fork").Process(target=optimizer.step)
            child.start()
            child.join(gate.PATIENCE)
            assert child.exitcode == 0
            case.step()
            held.open()
            handle.result()
    assert_identical(restored(tmp_path, 2), expected)
