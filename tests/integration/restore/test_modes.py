"""Calls inside modes of torch: inference mode, no_grad, default devices and dtypes, autocast, fake tensors."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import checkpointer
from checkpointer import CheckpointManager, Gradients, WholeModel, dcp, load_whole_model
from checkpointer.data import ResumableLoader, seeded
from checkpointer.errors import IncompatibleStateError, UnsupportedStateError
from tests.support.compare import assert_identical


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Intercepting(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def joined(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "inference, no_grad": lambda: joined(torch.inference_mode(), torch.no_grad()),
    "default device": lambda: default_device("meta"),
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch": Watching,
    "function": Intercepting,
}


class Averaged:
    """A component that makes new tensors, in the modes that it is called in."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [parameter.detach().clone() for parameter in model.parameters()]

    def update(self, model: nn.Module) -> None:
        for value, parameter in zip(self.values, model.parameters(), strict=True):
            value.lerp_(parameter.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"values": [value.clone() for value in self.values]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = [value.clone() for value in state["values"]]


class Run:
    """A run with a component of every kind."""

    def __init__(self, seed: int, *, meta: bool = False) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        with torch.device("meta") if meta else contextlib.nullcontext():
            self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.model.register_buffer("strided", torch.rand(3, 4).t())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.averaged = Averaged(self.model) if not meta else Averaged(nn.Linear(1, 1))
        self.tensors: dict[str, Any] = {
            "ema": torch.zeros(3),
            "sparse": torch.eye(3).to_sparse(),
            "many": [torch.zeros(2, 2)],
            "leaf": torch.zeros(2, requires_grad=True),
        }
        self.array = np.zeros(4)
        self.generator = torch.Generator().manual_seed(seed)
        self.loader = ResumableLoader(DataLoader(seeded(torch.arange(40.0)), batch_size=2, shuffle=True))  # type: ignore[arg-type]
        self.gradients = Gradients(self.model)
        self.batches: Any = None

    @property
    def components(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "batches"}

    def step(self) -> None:
        if self.batches is None:
            self.batches = iter(self.loader)
        x = torch.randn(4, 3) + next(self.batches).sum()
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.averaged.update(self.model)
        with torch.no_grad():
            for tensor in (self.tensors["ema"], self.tensors["many"][0], self.tensors["leaf"]):
                tensor.add_(torch.randn(tensor.shape, generator=self.generator) + float(np.random.rand()))
        self.array += np.random.rand(4)

    def advance(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged.values,
            "tensors": self.tensors,
            "array": self.array,
            "generators": [self.generator.get_state(), torch.get_rng_state()],
            "gradients": [parameter.grad for parameter in self.model.parameters()],
            "flags": [parameter.requires_grad for parameter in self.model.parameters()],
        }


def expected(steps: int) -> Any:
    return Run(0).advance(steps).state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of five steps, saved after three."""
    root = tmp_path_factory.mktemp("run")
    run = Run(0).advance(3)
    with CheckpointManager(root, **run.components) as mgr:
        mgr.save(3)
    return root


MOST = ("inference", "device")
"""Modes in which more is tried: those that decide what a new tensor is."""


@pytest.mark.parametrize("live, mode", [*product(("fresh", "trained"), MODES), *product(["meta"], MOST)])
def test_a_run_that_is_restored_inside_a_mode_trains_on_bit_for_bit(saved, live, mode):
    """Into state that is new, state that is there, and parameters that have no memory yet."""
    run = Run(1, meta=live == "meta")
    if live == "trained":
        run.advance(2)
        run.batches = None
    with MODES[mode](), CheckpointManager(saved, read_only=True, **run.components) as mgr:
        grad = torch.is_grad_enabled()
        restored = mgr.restore_latest()
        assert torch.is_grad_enabled() is grad
    assert restored is not None
    assert restored.skipped == ()
    assert_identical(run.advance(2).state(), expected(5))


@pytest.mark.parametrize("write, mode", [*product(["async"], MODES), *product(("sync", "lazy"), MOST)])
def test_what_is_saved_inside_a_mode_is_the_state_bit_for_bit(tmp_path, write, mode):
    run = Run(0).advance(3)
    with CheckpointManager(tmp_path, config={"write": {"mode": write}}, **run.components) as mgr:
        with MODES[mode]():
            mgr.save(3)
        run.advance(1)
        with MODES[mode]():
            mgr.save(4)
        run.advance(1)
    assert_identical(run.state(), expected(5))
    for step in (3, 4):
        again = Run(1)
        with CheckpointManager(tmp_path, read_only=True, **again.components) as mgr:
            mgr.restore(step)
        assert_identical(again.advance(5 - step).state(), expected(5))


@pytest.mark.parametrize("mode", MOST)
def test_a_loader_that_is_made_and_begun_inside_a_mode_goes_on_outside(tmp_path, mode):
    """With another default device, torch's own iterator does not begin; so only what is made there is tried."""
    begin = MODES[mode] if mode == "inference" else contextlib.nullcontext

    def made() -> ResumableLoader[Any]:
        torch.manual_seed(0)
        dataset = [torch.tensor(float(number), device="cpu") for number in range(12)]
        return ResumableLoader(DataLoader(seeded(dataset), batch_size=2, sampler=list(range(12))))  # type: ignore[arg-type]

    whole = [batch.tolist() for batch in made()]
    with MODES[mode]():
        loader = made()
    with begin():
        batches = iter(loader)
        begun = [next(batches).tolist(), next(batches).tolist()]
    with CheckpointManager(tmp_path, loader=loader) as mgr:
        mgr.save(2)
    with MODES[mode]():
        again = made()
        with CheckpointManager(tmp_path, read_only=True, loader=again) as mgr:
            mgr.restore_latest()
    with begin():
        batches = iter(again)
    assert begun + [batch.tolist() for batch in batches] == whole
    again.set_epoch(1)
    assert [batch.tolist() for batch in again] == whole


@pytest.mark.parametrize("mode", MOST)
def test_dcp_loads_inside_a_mode_what_it_saved_inside_one(tmp_path, mode):
    def state(value: float) -> dict[str, Any]:
        tensors = {name: torch.full((2, 3), value, dtype=dtype) for name, dtype in dtypes.items()}
        return {**tensors, "value": {"many": (torch.full((2,), value),)}}

    dtypes = {"same": torch.float32, "cast": torch.float32}
    saved = state(1.0)
    with MODES[mode]():
        dcp.save(saved, tmp_path / "checkpoint-1")
    dtypes["cast"] = torch.float64
    live = state(0.0)
    with MODES[mode]():
        dcp.load(live, tmp_path / "checkpoint-1")
    assert_identical(live, {**state(1.0), "cast": saved["cast"].double()})
    assert not live["value"]["many"][0].is_inference()


@pytest.mark.parametrize("mode", MOST)
def test_a_whole_model_that_is_loaded_inside_a_mode_can_be_trained(tmp_path, mode):
    model = nn.Linear(3, 2)
    with CheckpointManager(tmp_path, model=WholeModel(model)) as mgr, MODES[mode]():
        mgr.save(1)
    with MODES[mode]():
        again = load_whole_model(tmp_path, trust_pickle=True)
    assert_identical(again.state_dict(), model.state_dict())
    again(torch.ones(1, 3)).sum().backward()
    torch.optim.AdamW(again.parameters()).step()


# ------------------------------------------------------------------------- tensors that are inference tensors


def evaluated(value: float) -> dict[str, Any]:
    """Components that were made in inference mode."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model.register_buffer("turned", torch.zeros(4, 3).t())
        for tensor in model.state_dict().values():
            tensor.fill_(value)
        averages = {"one": torch.full((2,), value), "turned": torch.full((3, 2), value).t()}
        return {"model": model, "averages": averages, "tensor": torch.full((2, 3), value)}


def frozen(components: dict[str, Any]) -> dict[str, Any]:
    with torch.inference_mode():
        components["model"].requires_grad_(False)
    return components


@pytest.mark.parametrize("mode", ["outside", "inside"])
def test_inference_tensors_are_saved_and_filled_in_place_and_stay_what_they_are(tmp_path, mode):
    inside = torch.inference_mode if mode == "inside" else contextlib.nullcontext
    with inside(), CheckpointManager(tmp_path, **frozen(evaluated(2.0))) as mgr:
        mgr.save(1)
    live = evaluated(1.0)
    before = [*live["model"].state_dict().values(), *live["averages"].values(), live["tensor"]]
    with inside(), CheckpointManager(tmp_path, **live) as mgr:
        mgr.restore_latest()
    after = [*live["model"].state_dict().values(), *live["averages"].values(), live["tensor"]]
    for old, new in zip(before, after, strict=True):
        assert new.data_ptr() == old.data_ptr()
        assert new.is_inference()
        assert (new == 2).all()
    assert not any(parameter.requires_grad for parameter in live["model"].parameters())


def test_optimizer_state_of_inference_tensors_is_exchanged_for_state_that_a_step_can_change(tmp_path):
    """Such state is what restoring inside inference mode used to leave."""
    run = Run(0).advance(3)
    with CheckpointManager(tmp_path, **run.components) as mgr:
        mgr.save(3)
    again = Run(1).advance(1)
    again.batches = None
    with torch.inference_mode():
        for slots in again.optimizer.state.values():
            slots.update({name: value.clone() for name, value in slots.items()})
    with CheckpointManager(tmp_path, read_only=True, **again.components) as mgr:
        mgr.restore_latest()
    assert_identical(again.advance(2).state(), expected(5))


# ---------------------------------------------------------------------------------- modes without real tensors


def transformed(call: Callable[[], Any], kind: str) -> None:
    """``call`` inside a transform of torch.func."""

    def inner(x: torch.Tensor) -> torch.Tensor:
        call()
        return x.sum()

    if kind == "vmap":
        torch.func.vmap(inner)(torch.zeros(2, 3))
    else:
        torch.func.grad(inner)(torch.zeros(3))


def traced(call: Callable[[], Any], kind: str) -> None:
    """``call`` inside a mode in which tensors have no memory, or are recorded."""
    if kind == "FakeTensorMode":
        with FakeTensorMode(allow_non_fake_inputs=True):
            call()
    elif kind == "ProxyTorchDispatchMode":
        make_fx(lambda x: (call(), x + 1)[1])(torch.zeros(2))
    else:
        transformed(call, kind)


@pytest.mark.parametrize("kind", ["FakeTensorMode", "ProxyTorchDispatchMode", "vmap", "grad"])
def test_where_tensors_are_not_real_save_and_restore_are_refused_and_change_nothing(tmp_path, kind):
    run = Run(0).advance(3)
    with CheckpointManager(tmp_path, **run.components) as mgr:
        mgr.save(3)
        mgr.wait()
        run.advance(1)
        before = copy.deepcopy(run.state())
        named = kind if "Mode" in kind else "a transform of torch.func"
        with pytest.raises(UnsupportedStateError, match=f"nothing can be saved inside {named}.*Save before it begins"):
            traced(lambda: mgr.save(4), kind)
        with pytest.raises(IncompatibleStateError, match=f"cannot be restored inside {named}.*Nothing was changed"):
            traced(mgr.restore_latest, kind)
        assert_identical(run.state(), before)
        mgr.save(4)
    again = Run(1)
    with CheckpointManager(tmp_path, read_only=True, **again.components) as mgr:
        restored = mgr.restore_latest()
    assert restored is not None
    assert restored.step == 4
    assert_identical(again.advance(1).state(), expected(5))


def test_dcp_writes_nothing_and_loads_nothing_where_tensors_are_not_real(tmp_path):
    live = {"value": torch.ones(3)}
    dcp.save(live, tmp_path / "checkpoint-1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(UnsupportedStateError, match="nothing can be saved inside FakeTensorMode"):
            dcp.save(live, tmp_path / "checkpoint-2")
        with pytest.raises(IncompatibleStateError, match="checkpoint-1 cannot be restored inside FakeTensorMode"):
            dcp.load(live, tmp_path / "checkpoint-1")
    assert_identical(live, {"value": torch.ones(3)})
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_fake_tensor_among_the_components_is_refused_by_name(tmp_path):
    with FakeTensorMode():
        model = nn.Linear(2, 2)
    with CheckpointManager(tmp_path, model=model) as mgr, pytest.raises(UnsupportedStateError, match="weight"):
        mgr.save(1)


FACTORIES = {"arange", "empty", "empty_strided", "eye", "full", "ones", "scalar_tensor", "tensor", "zeros"} | {
    "as_tensor", "rand", "randint", "randn", "randperm", "sparse_compressed_tensor", "sparse_coo_tensor",
}  # fmt: skip
"""Functions of torch that put a tensor where the mode around them says, unless they are told."""


def test_whatever_the_package_makes_it_says_on_which_device():
    """A factory that is told no device makes meta tensors inside ``torch.device("meta")``."""
    package = Path(checkpointer.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                assert "device" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
