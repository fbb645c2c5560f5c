"""Every optimizer and scheduler of torch goes on bit for bit after a restore into fresh objects."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as schedulers
from torch import nn
from torch.optim.swa_utils import SWALR

from checkpointer.errors import CheckpointerError, IncompatibleStateError
from checkpointer.format.index import Component
from checkpointer.state import RestoreOptions, SavedState, adapter_for
from tests.support.compare import assert_identical
from tests.support.memory_engine import carry, restore, save

OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)


def model(seed: int, sparse: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    if sparse:
        return nn.Sequential(nn.Embedding(6, 4, sparse=True))
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))


def make(name: str, module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": 0.01, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {}), **options}
    return getattr(torch.optim, name)(module.parameters(), **options)  # type: ignore[no-any-return]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> None:
    sparse = isinstance(module[0], nn.Embedding)  # type: ignore[index]
    dtype = next(module.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        data = torch.randint(6, (5,), generator=generator) if sparse else torch.randn(8, 4, generator=generator)

        def closure(data=data):
            optimizer.zero_grad()
            loss = module(data if sparse else data.to(dtype)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduler is not None:
            arguments = (1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()
            scheduler.step(*arguments)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return dict(module.state_dict()), optimizer.state_dict()


def resume(source, target, **options):
    (module, optimizer), (other, restored) = source, target
    carry(module, other)
    return carry(optimizer, restored, ({"model": module}, {"model": other}), **options)


def check(name: str, **options: Any) -> None:
    sparse = name == "SparseAdam"
    source, target = model(0, sparse), model(1, sparse)
    optimizer, restored = make(name, source, **options), make(name, target, **options)
    train(source, optimizer, range(3))
    resume((source, optimizer), (target, restored))
    assert_identical(state_of(source, optimizer), state_of(target, restored))
    train(source, optimizer, range(3, 6))
    train(target, restored, range(3, 6))
    assert_identical(state_of(source, optimizer), state_of(target, restored))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name):
    check(name)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_foreach_and_fused_go_on_bit_for_bit(name, implementation):
    check(name, **{implementation: True})


def test_lbfgs_with_a_line_search_goes_on_bit_for_bit():
    check("LBFGS", line_search_fn="strong_wolfe", history_size=3, max_iter=5)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_tensor_learning_rate_is_filled_in_place(name):
    source, target = model(0), model(1)
    optimizer = make(name, source, lr=torch.tensor(0.03))
    live = torch.tensor(0.5)
    restored = make(name, target, lr=live)
    train(source, optimizer, range(2))
    resume((source, optimizer), (target, restored))
    assert restored.param_groups[0]["lr"] is live
    assert live == torch.tensor(0.03)
    check(name, lr=torch.tensor(0.03))


def test_existing_state_is_read_in_place_and_surplus_state_is_removed():
    source, target = model(0), model(1)
    optimizer, restored = make("AdamW", source), make("AdamW", target, amsgrad=True)
    train(source, optimizer, range(3))
    train(target, restored, range(5))
    parameter = target[0].weight  # type: ignore[index]
    slots = restored.state[parameter]
    before = {key: (value, value.data_ptr()) for key, value in slots.items()}
    resume((source, optimizer), (target, restored))
    assert restored.state[parameter] is slots
    assert list(slots) == ["step", "exp_avg", "exp_avg_sq"]
    assert all((slots[key], slots[key].data_ptr()) == before[key] for key in ("exp_avg", "exp_avg_sq"))
    assert restored.param_groups[0]["amsgrad"] is False
    fresh = make("AdamW", source)
    resume((source, fresh), (target, restored))
    assert not restored.state


def test_a_failed_prepare_changes_nothing():
    source, target = model(0), nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 4, bias=False))
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(2))
    train(target, restored, range(2))
    before = save(adapter_for("o", restored, {}))
    saved = save(adapter_for("o", optimizer, {"model": source}))
    with pytest.raises(IncompatibleStateError) as caught:
        adapter_for("o", restored, {"model": target}).prepare(saved[0], RestoreOptions())
    assert "'model.0.weight': saved with shape [4, 4], live has [3, 4]" in str(caught.value)
    assert "model.2.weight" in str(caught.value)
    assert save(adapter_for("o", restored, {}))[1] == before[1]


def groups(module: nn.Module, order: list[int], lrs: list[float]) -> list[dict[str, Any]]:
    return [{"params": [module[i].weight], "lr": lr, "name": f"g{i}"} for i, lr in zip(order, lrs, strict=True)]  # type: ignore[index]


def test_reordered_parameters_and_groups_are_matched_by_name():
    source, target = model(0), model(1)
    optimizer = torch.optim.Adam(groups(source, [0, 2], [0.1, 0.2]))
    restored = torch.optim.Adam(groups(target, [2, 0], [0.5, 0.5]))
    train(source, optimizer, range(3))
    report = resume((source, optimizer), (target, restored))
    assert [group["lr"] for group in restored.param_groups] == [0.2, 0.1]
    assert [group["name"] for group in restored.param_groups] == ["g2", "g0"]
    for index in (0, 2):
        assert_identical(optimizer.state[source[index].weight], restored.state[target[index].weight])  # type: ignore[index]
    assert any("group 0 was group 1" in line for line in report.changed)
    train(source, optimizer, range(3, 6))
    train(target, restored, range(3, 6))
    assert_identical(dict(source.state_dict()), dict(target.state_dict()))


def test_without_a_registered_module_position_decides_and_is_reported():
    source, target = model(0), model(1)
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(2))
    report = carry(optimizer, restored)
    assert_identical(optimizer.state_dict(), restored.state_dict())
    (line,) = (line for line in report.changed if "by position" in line)
    shapes = [[*item.shape] for item in optimizer.param_groups[0]["params"]]
    assert line.startswith(f"{len(shapes)} of the parameters were matched by position")
    assert line.endswith(", ".join(f"group 0 position {number} {shape}" for number, shape in enumerate(shapes)))


def test_parameters_without_a_name_are_named_where_the_others_have_one():
    source, target = model(0), model(1)
    extra = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([*m.parameters(), p]) for m, p in zip((source, target), extra, strict=True)]
    report = carry(optimizers[0], optimizers[1], ({"model": source}, {"model": target}))
    count = len(list(target.parameters()))
    (line,) = (line for line in report.changed if "by position" in line)
    assert line.startswith("1 of the parameters were matched by position")
    assert line.endswith(f"where they were saved: group 0 position {count} [3]")


def test_param_names_of_torch_serve_where_no_module_is_registered():
    source, target = model(0), model(1)
    optimizer = torch.optim.Adam(source.named_parameters())
    restored = torch.optim.Adam(reversed(list(target.named_parameters())))
    train(source, optimizer, range(2))
    carry(optimizer, restored)
    assert torch.equal(optimizer.state[source[0].weight]["exp_avg"], restored.state[target[0].weight]["exp_avg"])  # type: ignore[index]
    assert restored.param_groups[0]["param_names"] == ["2.weight", "0.weight"]


def test_another_component_name_or_one_module_more_does_not_matter():
    source, target = model(0), model(1)
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(2))
    carry(optimizer, restored, ({"model": source}, {"ema": model(2), "net": target}))
    assert_identical(optimizer.state_dict(), restored.state_dict())


def test_added_and_removed_parameters_are_listed_or_reported():
    source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    optimizer, restored = make("Adam", source), make("Adam", target)
    sum(layer(torch.ones(2)).sum() for layer in source.values()).backward()
    sum(layer(torch.ones(2)).sum() * 3 for layer in target.values()).backward()
    optimizer.step()
    restored.step()
    modules = ({"model": source}, {"model": target})
    with pytest.raises(IncompatibleStateError) as caught:
        carry(optimizer, restored, modules)
    assert "'model.c.weight'" in str(caught.value)
    assert "'model.b.weight'" in str(caught.value)
    kept = restored.state[target["c"].weight]["exp_avg"].clone()
    report = carry(optimizer, restored, modules, strict=False)
    assert report.missing == ["model.c.weight", "model.c.bias"]
    assert report.unexpected == ["model.b.weight", "model.b.bias"]
    assert torch.equal(restored.state[target["c"].weight]["exp_avg"], kept)
    assert torch.equal(restored.state[target["a"].weight]["exp_avg"], optimizer.state[source["a"].weight]["exp_avg"])
    rename = lambda key: key.replace("b.", "c.")
    report = carry(optimizer, restored, modules, rename=rename)
    assert ("model.b.weight", "model.c.weight") in report.renamed
    assert torch.equal(restored.state[target["c"].weight]["exp_avg"], optimizer.state[source["b"].weight]["exp_avg"])


def test_state_of_reshaped_parameters_is_adapted():
    source, target = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizer, restored = make("Adam", source), make("Adam", target)
    source(torch.ones(2)).sum().backward()
    optimizer.step()

    def adapt(key, saved, live):
        live = live.clone()
        live[:2] = saved
        return live

    carry(optimizer, restored, ({"m": source}, {"m": target}), adapt=adapt)
    assert torch.equal(restored.state[target.weight]["exp_avg"][:2], optimizer.state[source.weight]["exp_avg"])
    assert restored.state[target.weight]["exp_avg"].shape == (3, 2)


class Fp32State(torch.optim.Optimizer):
    """Keeps fp32 moments of bf16 parameters, a note, and state that belongs to no parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "initial_lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.state["global"]["count"] = self.state["global"].get("count", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                slots = self.state[parameter]
                moment = slots.setdefault("m", torch.zeros_like(parameter, dtype=torch.float32))
                moment.mul_(0.9).add_(parameter.grad.float())
                slots["history"] = [*slots.get("history", []), (moment.sum(), None)][-2:]
                parameter.sub_((moment * group["lr"]).to(parameter.dtype))


class Overriding(Fp32State):
    def load_state_dict(self, state_dict):
        self.loaded = True
        super().load_state_dict(state_dict)


def hooked(params):
    optimizer = Fp32State(params)
    optimizer.register_load_state_dict_post_hook(lambda it: setattr(it, "loaded", True))
    return optimizer


@pytest.mark.parametrize("cls", [Fp32State, Overriding, hooked])
@pytest.mark.parametrize("fresh", [True, False])
def test_fp32_state_of_bf16_parameters_stays_fp32(cls, fresh):
    source, target = model(0).bfloat16(), model(1).bfloat16()
    optimizer, restored = cls(source.parameters()), cls(target.parameters())
    train(source, optimizer, range(3))
    if not fresh:
        train(target, restored, range(2))
    resume((source, optimizer), (target, restored))
    assert_identical(state_of(source, optimizer), state_of(target, restored))
    assert restored.state[target[0].weight]["m"].dtype == torch.float32
    assert type(restored.param_groups[0]["betas"]) is tuple
    assert restored.state["global"] == {"count": 3}
    assert getattr(restored, "loaded", cls is Fp32State)
    train(source, optimizer, range(3, 5))
    train(target, restored, range(3, 5))
    assert_identical(state_of(source, optimizer), state_of(target, restored))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_state_follows_its_parameters_to_another_dtype_and_training_goes_on(name, dtypes, fresh):
    sparse = name == "SparseAdam"
    source, target = model(0, sparse).to(dtypes[0]), model(1, sparse).to(dtypes[1])
    optimizer, restored = make(name, source), make(name, target)
    train(source, optimizer, range(3))
    if not fresh:
        train(target, restored, range(1))
    modules = ({"model": source}, {"model": target})
    with pytest.raises(IncompatibleStateError, match=r"'model.0.weight': saved as (float32|bfloat16), live is"):
        carry(optimizer, restored, modules)
    report = carry(optimizer, restored, modules, strict=False)
    followed = 0
    for before, after in zip(source.parameters(), target.parameters(), strict=True):
        saved, found = optimizer.state.get(before, {}), restored.state.get(after, {})
        assert saved.keys() == found.keys()
        for slot, value in saved.items():
            if isinstance(value, list):  # of LBFGS
                continue
            follows = isinstance(value, torch.Tensor) and value.ndim > 0 and value.dtype == dtypes[0]
            assert_identical(value.to(dtypes[1]) if follows else value, found[slot])
            followed += follows and isinstance(value, torch.Tensor)
    casts = [change for _, change in report.cast]
    assert len(casts) >= followed
    assert set(casts) <= {f"{str(dtypes[0])[6:]} -> {str(dtypes[1])[6:]}"}
    train(target, restored, range(3, 5))  # raises where dtypes differ


def test_a_cast_of_state_is_named_in_the_report():
    source, target = model(0), model(1).bfloat16()
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(1))
    report = carry(optimizer, restored, ({"model": source}, {"model": target}), strict=False)
    assert ("model.0.weight.exp_avg", "float32 -> bfloat16") in report.cast
    assert not [key for key, _ in report.cast if key.endswith(".step")]
    assert restored.state[target[0].weight]["step"].dtype == torch.float32


def test_adapted_state_takes_the_dtype_of_its_parameter_too():
    source, target = nn.Linear(2, 2), nn.Linear(2, 3).bfloat16()
    optimizer, restored = make("Adam", source), make("Adam", target)
    source(torch.ones(2)).sum().backward()
    optimizer.step()

    def adapt(key, saved, live):
        return torch.cat([saved, torch.zeros(1, *saved.shape[1:])])

    report = carry(optimizer, restored, ({"m": source}, {"m": target}), adapt=adapt)
    assert ("m.weight.exp_avg", "float32 -> bfloat16") in report.cast
    assert restored.state[target.weight]["exp_avg"].dtype == torch.bfloat16
    target(torch.ones(2, dtype=torch.bfloat16)).sum().backward()
    restored.step()


@pytest.mark.parametrize("cls", [Fp32State, Overriding, hooked])
def test_fp32_state_stays_fp32_whatever_becomes_of_its_bf16_parameters(cls):
    source, target = model(0).bfloat16(), model(1).double()
    optimizer, restored = cls(source.parameters()), cls(target.parameters())
    train(source, optimizer, range(2))
    report = carry(optimizer, restored, ({"model": source}, {"model": target}), strict=False)
    assert_identical(optimizer.state[source[0].weight]["m"], restored.state[target[0].weight]["m"])
    assert not report.cast


@pytest.mark.parametrize("cls", [Fp32State, Overriding, hooked])
def test_state_that_a_live_optimizer_keeps_in_fp32_is_not_cast(cls):
    source, target = model(0), model(1).bfloat16()
    optimizer, restored = cls(source.parameters()), cls(target.parameters())
    train(source, optimizer, range(2))
    train(target, restored, range(1))
    report = carry(optimizer, restored, ({"model": source}, {"model": target}), strict=False)
    assert_identical(optimizer.state[source[0].weight]["m"], restored.state[target[0].weight]["m"])
    assert not [key for key, _ in report.cast if key.endswith(".m")]


def test_optimizers_saved_without_dtypes_are_restored_as_before():
    source, target = model(0), model(1).bfloat16()
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(1))
    saved, data = save(adapter_for("it", optimizer, {"model": source}))
    del saved.component.meta["dtypes"]
    report = restore(adapter_for("it", restored, {"model": target}), (saved, data))
    assert not report.cast
    assert_identical(optimizer.state[source[0].weight], restored.state[target[0].weight])


@pytest.mark.parametrize("cls", [torch.optim.Adam, Overriding])
def test_group_keys_that_only_the_live_optimizer_has_are_kept(cls):
    source, target = model(0), model(1)
    optimizer, restored = cls(source.parameters()), cls(target.parameters())
    restored.param_groups[0]["mine"] = 3
    optimizer.param_groups[0]["initial_lr"] = 0.7
    resume((source, optimizer), (target, restored))
    assert restored.param_groups[0]["mine"] == 3
    assert restored.param_groups[0]["initial_lr"] == 0.7


def test_channels_last_state_keeps_its_strides_in_a_fresh_optimizer():
    def make_conv():
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    source, target = make_conv(), make_conv()
    optimizer, restored = make("Adam", source), make("Adam", target)
    source(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    carry(optimizer, restored, ({"m": source}, {"m": target}))
    assert_identical(optimizer.state_dict(), restored.state_dict())


def test_damaged_optimizer_entries_are_typed_errors():
    source = model(0)
    optimizer = make("Adam", source)
    train(source, optimizer, range(1))
    good = save(adapter_for("o", optimizer, {"m": source}))[0].component
    tree: Any = good.tree
    for damaged, meta in [
        ([], good.meta),
        ({"state": [], "param_groups": []}, good.meta),
        ({**tree, "param_groups": [3]}, good.meta),
        ({**tree, "param_groups": [{"params": ["x", 1]}]}, good.meta),
        ({**tree, "param_groups": []}, good.meta),
        (tree, {**good.meta, "shapes": [[[4, 4]]]}),
        (tree, {**good.meta, "devices": [["toaster", "cpu"]]}),
        (tree, {**good.meta, "dtypes": [["toaster", "float32"]]}),
        (tree, {**good.meta, "dtypes": [["float32"]]}),
        (tree, {**good.meta, "dtypes": [[3, []]]}),
        (tree, {**good.meta, "dtypes": 3}),
        (tree, {**good.meta, "params": 3}),
        (tree, {**good.meta, "params": [[3, 4]]}),
    ]:
        saved = SavedState("o", Component("optimizer", damaged, good.tensors, meta))
        with pytest.raises(CheckpointerError):
            adapter_for("o", optimizer, {"m": source}).prepare(saved, RestoreOptions())


class Ramp:
    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return 1 / (1 + step + self.calls)


def chain(optimizer):
    return schedulers.ChainedScheduler([schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)])


def sequence(optimizer):
    warm, main = schedulers.LinearLR(optimizer, total_iters=2), schedulers.CosineAnnealingLR(optimizer, 10)
    return schedulers.SequentialLR(optimizer, [warm, main], milestones=[2])


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR with an object": lambda o: schedulers.LambdaLR(o, Ramp()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2, 2, 4]),
    "ConstantLR": schedulers.ConstantLR,
    "LinearLR": schedulers.LinearLR,
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": sequence,
    "PolynomialLR": schedulers.PolynomialLR,
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "CyclicLR exp_range": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "CyclicLR with a function": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 0.5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.05, 3),
}


def test_no_scheduler_of_torch_is_forgotten():
    names = {
        name
        for name, cls in vars(schedulers).items()
        if inspect.isclass(cls) and issubclass(cls, schedulers.LRScheduler)
    }
    assert names - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_goes_on_bit_for_bit(name):
    source, target = model(0), model(1)
    optimizer, restored = make("SGD", source), make("SGD", target)
    scheduler, again = SCHEDULERS[name](optimizer), SCHEDULERS[name](restored)
    train(source, optimizer, range(3), scheduler)
    resume((source, optimizer), (target, restored))
    carry(scheduler, again)
    train(source, optimizer, range(3, 8), scheduler)
    train(target, restored, range(3, 8), again)
    assert_identical(state_of(source, optimizer), state_of(target, restored))
    assert_identical(scheduler.state_dict(), again.state_dict())


class SWALROfOldTorch(SWALR):
    """As torch 2.6 has it: the state holds the function, and nothing says its name."""

    def __init__(self, optimizer, anneal_strategy):
        super().__init__(optimizer, 0.05, 3, anneal_strategy)
        vars(self).pop("_anneal_strategy", None)

    state_dict = schedulers.LRScheduler.state_dict
    load_state_dict = schedulers.LRScheduler.load_state_dict


SWALROfOldTorch.__name__ = "SWALR"


def of_old_torch(optimizer, strategy, nested):
    if not nested:
        return SWALROfOldTorch(optimizer, strategy)
    warm = schedulers.LinearLR(optimizer, total_iters=2)
    return schedulers.SequentialLR(optimizer, [warm, SWALROfOldTorch(optimizer, strategy)], milestones=[2])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("strategy, other", [("cos", "linear"), ("linear", "cos")])
def test_the_annealing_function_that_old_torch_has_in_its_state_is_restored_by_name(strategy, other, nested):
    source, target = model(0), model(1)
    optimizer, restored = make("SGD", source), make("SGD", target)
    scheduler, again = of_old_torch(optimizer, strategy, nested), of_old_torch(restored, other, nested)
    train(source, optimizer, range(3), scheduler)
    resume((source, optimizer), (target, restored))
    carry(scheduler, again)
    train(source, optimizer, range(3, 8), scheduler)
    train(target, restored, range(3, 8), again)
    assert_identical(state_of(source, optimizer), state_of(target, restored))
    assert scheduler.get_last_lr() == again.get_last_lr()


@pytest.mark.parametrize("saved_by, restored_by", [("old", "new"), ("new", "old")])
def test_either_torch_restores_the_annealing_that_the_other_has_saved(saved_by, restored_by):
    make_one = {"old": SWALROfOldTorch, "new": lambda o, s: SWALR(o, 0.05, 3, s)}
    saved = make_one[saved_by](make("SGD", model(0)), "linear")
    live = make_one[restored_by](make("SGD", model(0)), "cos")
    carry(saved, live)
    assert live.anneal_func is SWALR._linear_anneal


def test_an_annealing_function_of_your_own_is_refused_by_its_name():
    scheduler = SWALROfOldTorch(make("SGD", model(0)), "cos")
    scheduler.anneal_func = lambda t: t * t
    with pytest.raises(CheckpointerError, match="anneal_func"):
        save(adapter_for("scheduler", scheduler, {}))


def test_a_gradient_scaler_comes_back():
    source, target = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    source.scale(torch.ones(1))
    carry(source, target)
    assert_identical(source.state_dict(), target.state_dict())


def test_parameters_keep_their_memory_while_state_is_restored():
    source, target = model(0), model(1)
    optimizer, restored = make("Adam", source), make("Adam", target)
    train(source, optimizer, range(1))
    before = [p.data_ptr() for p in target.parameters()]
    restore(adapter_for("o", restored, {"m": target}), save(adapter_for("o", optimizer, {"m": source})))
    assert [p.data_ptr() for p in target.parameters()] == before


@pytest.mark.parametrize("plain", [True, False])
def test_a_number_is_filled_into_the_live_tensor_of_a_hyper_parameter_and_reported(plain):
    def make_one(lr: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = model(1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
        if not plain:
            optimizer.register_load_state_dict_pre_hook(lambda *_: None)
        return module, optimizer

    live = torch.tensor(0.5)
    target = make_one(live)
    report = resume(make_one(0.03), target)
    assert target[1].param_groups[0]["lr"] is live
    assert live == torch.tensor(0.03)
    if plain:
        assert "group 0: 'lr' was saved as a number and is filled into the live tensor" in report.changed
        report = resume(make_one(torch.tensor(0.03)), make_one(0.5))
        assert "group 0: 'lr' was saved as a tensor, and the number becomes one" in report.changed
