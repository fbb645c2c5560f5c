"""State goes back into the class that it came from; what another one would make of it is refused, or reported."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as schedulers
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.compare import compare
from checkpointer.errors import CheckpointerWarning, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Component
from checkpointer.state import RestoreOptions, SavedState, adapter_for
from checkpointer.state.classes import class_name
from checkpointer.state.optimizer.misfits import SLOTS
from tests.support.compare import assert_identical
from tests.support.memory_engine import carry, restore, save
from tests.unit.state.optimizer.test_optimizer import OPTIMIZERS, make, model, train

SYNC = {"write": {"mode": "sync", "durable": False}}


def trained(cls: Any, seed: int = 0, steps: int = 2, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model(seed)
    optimizer = cls(module.parameters(), **{"lr": 0.01, **options})
    train(module, optimizer, range(steps))
    return module, optimizer


def resume(source: Any, target: Any, **options: Any) -> Any:
    return carry(source[1], target[1], ({"model": source[0]}, {"model": target[0]}), **options)


def own(name: str, cls: type, **body: Any) -> Any:
    """A class of a user's script."""
    return type(name, (cls,), {"__module__": "__main__", **body})


# ------------------------------------------------------------------------------------------------------ optimizers


def test_an_optimizer_of_another_class_is_refused_by_name_and_nothing_changes(tmp_path):
    module, optimizer = trained(torch.optim.AdamW, lr=0.001)
    with CheckpointManager(tmp_path, config=SYNC, model=module, optimizer=optimizer) as manager:
        manager.save(1)
    fresh, sgd = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    before = sgd.state_dict()
    with CheckpointManager(tmp_path, config=SYNC, model=fresh, optimizer=sgd) as manager:
        with pytest.raises(IncompatibleStateError, match=r"optimizer: .*\n.*saved by AdamW, live is SGD: register the"):
            manager.restore_latest()
        assert_identical(sgd.state_dict(), before)
        restored = manager.restore_latest(strict=False)
        assert restored is not None
        report = restored.report.components["optimizer"]
    assert any("hyper-parameters not restored: saved by AdamW, live is SGD" in line for line in report.changed)
    assert "model.0.weight.exp_avg" in report.unexpected
    assert report.restored == []
    assert_identical(sgd.state_dict(), before)
    train(fresh, sgd, range(3))


@pytest.mark.parametrize("fresh", [True, False])
def test_another_class_with_the_same_state_gets_it_and_keeps_its_own_hyper_parameters(fresh):
    source = trained(torch.optim.Adam, lr=0.5)
    target = trained(torch.optim.AdamW, seed=1, steps=0 if fresh else 1, weight_decay=0.25)
    groups = target[1].state_dict()["param_groups"]
    with pytest.raises(IncompatibleStateError, match="saved by Adam, live is AdamW"):
        resume(source, target)
    report = resume(source, target, strict=False)
    assert_identical(target[1].state_dict()["state"], source[1].state_dict()["state"])
    assert_identical(target[1].state_dict()["param_groups"], groups)
    assert report.restored == ["model.0.weight", "model.2.weight"]


def test_a_tensor_learning_rate_of_another_class_is_not_written_to():
    lr = torch.tensor(0.25)
    source, target = trained(torch.optim.Adam, lr=torch.tensor(0.5)), trained(torch.optim.AdamW, lr=lr)
    resume(source, target, strict=False)
    assert lr == torch.tensor(0.25)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_each_class_of_torch_is_said_to_keep_is_what_it_keeps(name):
    if name == "LBFGS":
        assert name not in SLOTS
        return
    flags = {
        "Adam": {"amsgrad": True},
        "AdamW": {"amsgrad": True},
        "RMSprop": {"centered": True, "momentum": 0.9},
        "SGD": {"momentum": 0.9},
    }
    sparse = name == "SparseAdam"
    found = []
    for options in ({}, flags.get(name, {})):
        module = model(0, sparse)
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01, **options)
        train(module, optimizer, range(1))
        found += [set(slots) for slots in optimizer.state.values()]
    known = SLOTS[name]
    assert all(known.always <= slots <= known.always | known.sometimes for slots in found), found


class Moments(torch.optim.Optimizer):
    """Keeps one moment under a name of its own."""

    slot = "m"

    def __init__(self, params: Any, lr: float = 0.1, **others: Any) -> None:
        super().__init__(params, {"lr": lr, **others})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault(self.slot, torch.zeros_like(parameter))
                parameter.sub_(moment.lerp_(parameter.grad, 0.1), alpha=group["lr"])
                self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1


def test_a_class_that_moved_to_another_module_is_the_same():
    source = trained(Moments)
    target = trained(own("Moments", Moments), seed=1, lr=0.5)
    resume(source, target)
    assert_identical(source[1].state_dict(), target[1].state_dict())


@pytest.mark.parametrize("fresh", [True, False])
def test_a_class_with_a_new_name_is_refused_until_rename_says_so(fresh):
    source = trained(Moments)
    target = trained(own("Better", Moments), seed=1, steps=0 if fresh else 1, lr=0.5)
    with pytest.raises(IncompatibleStateError, match=r"rename=\{'Moments': 'Better'\}"):
        resume(source, target)
    assert target[1].param_groups[0]["lr"] == 0.5
    mapping = {"Moments": "Better"}
    report = resume(source, target, rename=mapping if fresh else lambda key: mapping.get(key, key))
    assert_identical(source[1].state_dict(), target[1].state_dict())
    assert report.changed[:-1] == ["lr: 0.01 (live 0.5)"]


def test_a_class_of_torch_is_no_new_name_of_another():
    source, target = trained(torch.optim.AdamW), trained(torch.optim.SGD, seed=1)
    with pytest.raises(IncompatibleStateError) as caught:
        resume(source, target, rename={"AdamW": "SGD"})
    assert "saved by AdamW, live is SGD: register the class that was saved; strict=False" in str(caught.value)
    stairs, cosine = schedulers.StepLR(sgd(), 2), schedulers.CosineAnnealingLR(sgd(), 7)
    with pytest.raises(IncompatibleStateError, match="saved by StepLR, live is CosineAnnealingLR"):
        carry(stairs, cosine, rename={"StepLR": "CosineAnnealingLR"})


@pytest.mark.parametrize("fresh", [True, False])
def test_a_new_name_does_not_make_other_settings_fit(fresh):
    source = trained(torch.optim.AdamW)
    target = trained(own("Better", Moments), seed=1, steps=0 if fresh else 1, rho=0.5)
    with pytest.raises(IncompatibleStateError, match="group 0 was saved without 'rho'"):
        resume(source, target, rename={"AdamW": "Better"})


@pytest.mark.parametrize("fresh", [True, False])
def test_of_a_class_nobody_knows_state_is_restored_where_live_state_has_its_form(fresh):
    source = trained(Moments)
    target = trained(own("Better", Moments), seed=1, steps=0 if fresh else 1, lr=0.5)
    resume(source, target, strict=False)
    moments = [target[1].state[parameter].get("m") for parameter in target[0].parameters()]
    saved = [source[1].state[parameter]["m"] for parameter in source[0].parameters()]
    assert_identical(moments, [None, None] if fresh else saved)
    assert target[1].state["all"].get("steps") == (None if fresh else 2)
    assert target[1].param_groups[0]["lr"] == 0.5


class Shown(torch.optim.Optimizer):
    """A wrapper in the manner of accelerate's: everything is the inner optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inside = optimizer

    state = property(lambda self: self.inside.state)
    param_groups = property(lambda self: self.inside.param_groups)
    defaults = property(lambda self: self.inside.defaults)

    def state_dict(self) -> Any:
        return self.inside.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inside.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        self.inside.step(closure)


@pytest.mark.parametrize("wrap", [(Shown, lambda it: it), (lambda it: it, Shown), (Shown, lambda it: Shown(Shown(it)))])
def test_wrappers_that_show_another_optimizer_have_its_class(wrap):
    (module, optimizer), (fresh, again) = trained(torch.optim.AdamW), trained(torch.optim.AdamW, seed=1, steps=0)
    resume((module, wrap[0](optimizer)), (fresh, wrap[1](again)))
    assert_identical(optimizer.state_dict(), again.state_dict())
    sgd = trained(torch.optim.SGD)
    with pytest.raises(IncompatibleStateError, match="saved by AdamW, live is SGD"):
        resume((module, wrap[0](optimizer)), (sgd[0], wrap[1](sgd[1])))


def test_a_zero_redundancy_optimizer_has_the_class_of_the_one_inside():
    inside = trained(torch.optim.AdamW)[1]
    outer = type("ZeroRedundancyOptimizer", (torch.optim.Optimizer,), {"__module__": "torch.distributed.optim.zero"})
    zero = object.__new__(outer)
    zero.optim = inside
    assert class_name(zero) == "AdamW"


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_another_implementation_is_the_same_class(implementation):
    source = trained(torch.optim.AdamW)
    target = trained(torch.optim.AdamW, seed=1, **{implementation: True})
    assert resume(source, target).changed[:-1] == [f"{implementation}: None (live True)"]


def without(saved: Any, *members: str) -> Any:
    for member in members:
        del saved[0].component.meta[member]
    return saved


def test_a_checkpoint_that_does_not_say_the_class_is_restored_by_what_it_holds():
    module, optimizer = trained(torch.optim.AdamW)
    saved = without(save(adapter_for("it", optimizer, {"model": module}), "it"), "class", "defaults")
    fresh, again = trained(torch.optim.AdamW, seed=1, steps=0)
    restore(adapter_for("it", again, {"model": fresh}), saved)
    assert_identical(optimizer.state_dict(), again.state_dict())
    other, sgd = trained(torch.optim.SGD, lr=0.1)
    before = sgd.state_dict()
    adapter = adapter_for("it", sgd, {"model": other})
    with pytest.raises(IncompatibleStateError, match="another class than SGD: group 0 was saved without 'momentum'"):
        restore(adapter, saved)
    restore(adapter, saved, strict=False)
    assert_identical(sgd.state_dict(), before)


def test_hyper_parameters_that_a_class_gained_or_lost_are_refused_or_reported():
    source, target = trained(Moments), trained(Moments, seed=1, rho=0.5)
    for one, other, problem in [
        (source, target, "group 0 was saved without 'rho'"),
        (target, source, "group 0 was saved with 'rho', which the live class does not have"),
    ]:
        with pytest.raises(IncompatibleStateError, match=problem):
            resume(one, other)
        report = resume(one, other, strict=False)
        assert any(problem in line for line in report.changed)
        for parameter, live in zip(one[0].parameters(), other[0].parameters(), strict=True):
            assert_identical(dict(one[1].state[parameter]), dict(other[1].state[live]))


@pytest.mark.parametrize("gone", ["decoupled_weight_decay", "fused", "amsgrad"])
def test_hyper_parameters_that_other_versions_of_torch_have_do_not_matter(gone):
    module, optimizer = trained(torch.optim.AdamW)
    saved, data = save(adapter_for("it", optimizer, {"model": module}), "it")
    tree: Any = saved.component.tree
    tree["param_groups"][0]["of_tomorrow"] = 1.0
    del tree["param_groups"][0][gone]
    saved.component.meta["defaults"] = [*tree["param_groups"][0]]  # type: ignore[index]
    fresh, again = trained(torch.optim.AdamW, seed=1, steps=0)
    report = restore(adapter_for("it", again, {"model": fresh}), (saved, data))
    assert any("of_tomorrow" in line for line in report.changed)
    assert_identical(optimizer.state_dict()["state"], again.state_dict()["state"])
    assert again.param_groups[0][gone] == optimizer.param_groups[0][gone]
    train(fresh, again, range(1))


def test_keys_that_schedulers_and_users_add_to_groups_do_not_matter():
    source, target = trained(torch.optim.SGD), trained(torch.optim.SGD, seed=1)
    schedulers.OneCycleLR(source[1], 0.1, total_steps=9, cycle_momentum=False)
    source[1].param_groups[0]["mine"] = 3
    assert [text.partition(":")[0] for text in resume(source, target).changed[:-1]] == ["lr"]
    assert target[1].param_groups[0]["mine"] == 3


def test_looking_at_a_checkpoint_does_not_change_the_class():
    unhooked = own("Moments", Moments, step=Moments.step)
    source, target = trained(Moments), trained(unhooked, seed=1)
    unhooked.step = unhooked.step.__wrapped__
    before = unhooked.step
    resume(source, target)
    assert unhooked.step is before


def test_state_with_other_keys_of_a_class_of_the_same_name_is_refused():
    source, target = trained(Moments), trained(own("Moments", Moments, slot="exp_avg"), seed=1, lr=0.5)
    before = {slot: value.clone() for slot, value in target[1].state[next(target[0].parameters())].items()}
    with pytest.raises(IncompatibleStateError, match=r"'model.0.weight' is not Moments's: it has 'm', live state has"):
        resume(source, target)
    report = resume(source, target, strict=False)
    assert "model.0.weight.m" in report.unexpected
    assert_identical(dict(target[1].state[next(target[0].parameters())]), before)
    foreign = trained(own("AdamW", Moments))  # as those of other libraries
    with pytest.raises(IncompatibleStateError, match=r"'model.0.weight' is not AdamW's: it has 'm', and no 'exp_avg'"):
        resume(foreign, trained(torch.optim.AdamW, seed=1, steps=0))


@pytest.mark.parametrize("moments", [(0.0, 0.9), (0.9, 0.0), (0.9, 0.9)])
@pytest.mark.parametrize("steps", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_state_that_is_made_when_it_is_needed_may_be_missing_on_either_side(moments, steps):
    source = trained(torch.optim.SGD, steps=steps[0], momentum=moments[0])
    target = trained(torch.optim.SGD, seed=1, steps=steps[1], momentum=moments[1])
    resume(source, target)
    assert_identical(source[1].state_dict(), target[1].state_dict())


class OwnForm(Moments):
    def state_dict(self) -> Any:
        return {"inside": super().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["inside"])


def test_the_class_counts_for_optimizers_whose_state_has_a_form_of_its_own_too():
    source, target = trained(OwnForm), trained(own("Other", OwnForm), seed=1)
    before = target[1].state_dict()
    with pytest.raises(IncompatibleStateError, match="saved by OwnForm, live is Other"):
        resume(source, target)
    sgd = trained(torch.optim.SGD)
    for live in (target, sgd):
        report = resume(source, live, strict=False)
        assert report.restored == []
        assert any("not restored: saved by OwnForm, live is" in line for line in report.changed)
    assert_identical(target[1].state_dict(), before)
    resume(source, target, rename={"OwnForm": "Other"})
    assert_identical(source[1].state_dict(), target[1].state_dict())


# ------------------------------------------------------------------------------------------------------ schedulers


def sgd() -> torch.optim.Optimizer:
    return make("SGD", model(0))


def stepped(scheduler: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer itself makes no step
        for _ in range(3):
            scheduler.step(*((1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()))
    return scheduler


def chained(*parts: Any) -> Any:
    optimizer = sgd()
    made = [part(optimizer) for part in parts]
    return schedulers.SequentialLR(optimizer, made, milestones=list(range(2, len(made) + 1)))


PAIRS = [
    (
        lambda: schedulers.StepLR(sgd(), 2),
        lambda: schedulers.CosineAnnealingLR(sgd(), 7),
        "StepLR",
        "CosineAnnealingLR",
    ),
    (
        lambda: schedulers.LambdaLR(sgd(), lambda _: 0.5),
        lambda: schedulers.ReduceLROnPlateau(sgd()),
        "LambdaLR",
        "ReduceLR",
    ),
    (
        lambda: chained(schedulers.LinearLR, schedulers.ConstantLR),
        lambda: chained(schedulers.LinearLR, schedulers.PolynomialLR),
        r"SequentialLR\[LinearLR, ConstantLR\]",
        r"SequentialLR\[LinearLR, PolynomialLR\]",
    ),
]


@pytest.mark.parametrize("before, after, saved, live", PAIRS)
def test_a_scheduler_of_another_class_is_refused_or_left_as_it_is(before, after, saved, live):
    source, target = stepped(before()), stepped(after())
    state = {key: value for key, value in target.state_dict().items() if key != "_schedulers"}
    with pytest.raises(IncompatibleStateError, match=f"it: saved by {saved}, live is {live}"):
        carry(source, target)
    report = carry(source, target, strict=False)
    assert report.restored == []
    assert report.changed == [f"not restored: saved by {class_name(source)}, live is {class_name(target)}"]
    assert {key: value for key, value in target.state_dict().items() if key != "_schedulers"} == state


def test_a_scheduler_class_that_moved_or_got_a_new_name_is_the_same():
    source = stepped(schedulers.StepLR(sgd(), 2))
    moved = own("StepLR", schedulers.StepLR)(sgd(), 5)
    renamed = own("Stairs", schedulers.StepLR)(sgd(), 5)
    carry(source, moved)
    carry(source, renamed, rename={"StepLR": "Stairs"})
    assert (moved.step_size, renamed.step_size) == (2, 2)


def test_a_scheduler_inside_that_of_accelerate_counts():
    held = schedulers.StepLR(sgd(), 2)
    outer = type("AcceleratedScheduler", (), {"__module__": "accelerate.scheduler"})()
    outer.scheduler = held
    assert class_name(outer) == "StepLR"


class Position:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def test_any_other_object_of_another_class_takes_over_what_it_can_with_a_warning():
    other = own("Place", Position)(2)
    with pytest.warns(CheckpointerWarning, match="'it': saved by Position, live is Place, whose load_state_dict"):
        report = carry(Position(1), other)
    assert other.value == 1
    assert report.changed == ["saved by Position, live is Place"]
    other = own("Place", Position)(2)
    assert carry(Position(1), other, strict=False).changed == ["saved by Position, live is Place"]
    assert carry(Position(1), other, rename={"Position": "Place"}).changed == []


def test_a_class_that_is_no_name_is_damage():
    for live in (trained(torch.optim.SGD)[1], Position(1)):
        good = save(adapter_for("it", live, {}), "it")[0].component
        saved = SavedState("it", Component(good.kind, good.tree, good.tensors, {**good.meta, "class": ["SGD"]}))
        with pytest.raises(CorruptCheckpointError, match="it: the class of this component is not well formed"):
            adapter_for("it", live, {}).prepare(saved, RestoreOptions())


def test_two_checkpoints_differ_in_the_class_where_both_know_it(tmp_path):
    module = model(0)
    for step, cls in enumerate([torch.optim.Adam, torch.optim.AdamW]):
        optimizer = cls(module.parameters(), lr=0.01)
        config = {**SYNC, "require_resume": False}
        with CheckpointManager(tmp_path, config=config, model=module, optimizer=optimizer) as manager:
            manager.save(step)
    changes = {change.path: change[1:] for change in compare(tmp_path, 0, 1).settings}
    assert changes["optimizer (class)"] == ("Adam", "AdamW")
    assert not [path for path in changes if "(meta)" in path]
