"""The first save names what training changes and no component holds, and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as schedulers
from torch import nn

from checkpointer import CheckpointManager, Gradients, ModuleComponent
from checkpointer.errors import CheckpointerWarning
from checkpointer.state import Unregistered, adapter_for, modules_of
from tests.unit.state.test_classes import SYNC, Shown


def caught(train: Callable[[], object] = lambda: None, **components: Any) -> list[str]:
    """The warnings of two saves, with ``train`` called before each."""
    adapters = {name: adapter_for(name, part, modules_of(components)) for name, part in components.items()}
    unregistered = Unregistered(components)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            train()
            unregistered.warn({name: adapter.capture() for name, adapter in adapters.items()})
    assert all(issubclass(item.category, CheckpointerWarning) for item in found), [str(it.message) for it in found]
    return [str(item.message) for item in found]


def net() -> nn.Linear:
    return nn.Linear(3, 2)


def trainer(optimizer: Any, *parameters: torch.Tensor) -> Callable[[], None]:
    """One step in which every parameter has a gradient."""

    def train() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return train


# ------------------------------------------------------------------------------------------------------ parameters


def test_parameters_of_a_module_that_is_not_registered_are_named_once_by_optimizer_group_and_shape():
    maker, judge = net(), net()
    groups = [{"params": [judge.weight], "name": "judge"}, {"params": [judge.bias, maker.bias]}]
    judging = torch.optim.Adam(groups)
    (message,) = caught(maker=maker, making=torch.optim.Adam(maker.parameters()), judging=judging)
    assert message.startswith("optimizer 'judging' trains 2 parameters that no registered component holds")
    assert "fresh values: group 0 'judge' [2, 3], group 1 [2]. Register the module or the tensor by keyword" in message


def test_the_first_save_of_a_manager_warns_and_the_next_one_does_not(tmp_path):
    model, critic = net(), net()
    parts = {"model": model, "optimizer": torch.optim.SGD([*model.parameters(), *critic.parameters()])}
    with CheckpointManager(tmp_path, config=SYNC, **parts) as manager:
        with pytest.warns(CheckpointerWarning, match="'optimizer' trains 2 parameters that no registered component"):
            manager.save(1)
        manager.save(2)
    with CheckpointManager(tmp_path, config=SYNC, critic=critic, **parts) as manager:
        manager.restore_latest(strict=False)
        manager.save(3)


def test_a_tensor_that_is_no_component_is_named_until_it_is_one():
    model, log_alpha = net(), torch.zeros((), requires_grad=True)
    parts = {"model": model, "alpha": torch.optim.Adam([log_alpha])}
    (message,) = caught(**parts)
    assert "optimizer 'alpha' trains 1 parameter that" in message
    assert "group 0 []" in message
    assert caught(log_alpha=log_alpha, **parts) == []


def test_names_that_the_optimizer_knows_are_in_the_message_and_long_lists_are_cut():
    layers = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(13)])
    (message,) = caught(optimizer=torch.optim.SGD(layers.named_parameters()))
    assert "group 0 '0.weight' [1, 1], group 0 '1.weight' [1, 1]" in message
    assert "'9.weight' [1, 1] and 3 more. " in message


def test_a_parameter_that_was_replaced_after_the_optimizer_was_made_is_named():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight = nn.Parameter(torch.zeros(2, 3))
    (message,) = caught(model=model, optimizer=optimizer)
    assert "group 0 [2, 3]. " in message
    assert "where a parameter was replaced, make the optimizer after that" in message


def test_gradients_alone_do_not_hold_the_parameters():
    model = net()
    (message,) = caught(gradients=Gradients(model), optimizer=torch.optim.SGD(model.parameters()))
    assert "trains 2 parameters" in message


class Agent:
    """Holds a tensor, which ``state_dict()`` saves as it is, as a copy, or not at all."""

    def __init__(self, save: Callable[[torch.Tensor], dict[str, Any]]) -> None:
        self.inside = {"alpha": [torch.zeros(5, requires_grad=True)]}
        self.save = save

    @property
    def alpha(self) -> torch.Tensor:
        return self.inside["alpha"][0]

    def state_dict(self) -> dict[str, Any]:
        return self.save(self.alpha)

    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.parametrize(
    "save, held",
    [
        (lambda it: {"a": it}, True),
        (lambda it: {"a": 1, "b": it.detach().clone()}, True),
        (lambda it: {"a": it.tolist()}, False),
    ],
)
def test_an_object_that_saves_a_tensor_or_a_copy_holds_it(save, held):
    agent = Agent(save)
    messages = caught(agent=agent, optimizer=torch.optim.Adam([agent.alpha]))
    assert len(messages) == (not held)


class Masters(torch.optim.Optimizer):
    """Trains copies of the parameters in full precision, and saves them too, as mixed-precision wrappers do."""

    def __init__(self, parameters: Any, copied: bool) -> None:
        self.copied = copied
        super().__init__([nn.Parameter(parameter.detach().float()) for parameter in parameters], {"lr": 0.1})

    def state_dict(self) -> Any:
        masters = [master for group in self.param_groups for master in group["params"]]
        return {**super().state_dict(), "masters": [it.detach().clone() if self.copied else it for it in masters]}


def flat_buffer() -> dict[str, Any]:
    """Parameters that are views of the one tensor that is trained."""
    model = net()
    flat = nn.Parameter(torch.zeros(8))
    model.weight.data, model.bias.data = flat.data[:6].view(2, 3), flat.data[6:]
    return {"model": model, "optimizer": torch.optim.Adam([flat])}


def with_module(wrap: Callable[[nn.Module], object]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        model = net()
        return {"model": wrap(model), "optimizer": torch.optim.Adam(model.parameters())}

    return make


def with_tensor(wrap: Callable[[torch.Tensor], object]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        alpha = nn.Parameter(torch.zeros(3))
        return {"alpha": wrap(alpha), "optimizer": torch.optim.Adam([alpha])}

    return make


def frozen_stranger() -> dict[str, Any]:
    model, backbone = net(), net().requires_grad_(requires_grad=False)
    return {"model": model, "optimizer": torch.optim.Adam([*model.parameters(), *backbone.parameters()])}


def part_of_a_module() -> dict[str, Any]:
    model = nn.Sequential(net(), net())
    return {"model": model, "optimizer": torch.optim.Adam(model[1].parameters())}


def hooked() -> dict[str, Any]:
    """A state_dict of copies."""
    model = net()
    model._register_state_dict_hook(lambda _, state, *__: {key: value.clone() for key, value in state.items()})
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def masters(copied: bool) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        model = net().bfloat16()
        return {"model": model, "optimizer": Masters(model.parameters(), copied)}

    return make


@pytest.mark.parametrize(
    "make",
    [
        with_module(lambda it: it),
        with_module(ModuleComponent),
        with_module(nn.DataParallel),
        with_module(lambda it: nn.ModuleDict({"deep": nn.Sequential(it)})),
        with_tensor(lambda it: it),
        with_tensor(lambda it: {"alpha": it, "n": 3}),
        with_tensor(lambda it: [1, {"alpha": it}]),
        part_of_a_module,
        frozen_stranger,
        hooked,
        flat_buffer,
        masters(copied=False),
        masters(copied=True),
    ],
)
def test_parameters_that_are_saved_somewhere_or_never_change_are_not_named(make):
    assert caught(**make()) == []


# ------------------------------------------------------------------------------------------- optimizers inside


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization in the form that most people copy."""

    def __init__(self, params: Any, base: Any, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old_p"] = parameter.detach().clone()
        self.base_optimizer.step()


class Whole(Sam):
    """Its state has that of the optimizer inside, as it is or as copies."""

    def state_dict(self) -> Any:
        inside = self.base_optimizer.state_dict()
        slots = {i: {k: v * 1 for k, v in slots.items()} for i, slots in inside["state"].items()}
        return {"outer": super().state_dict(), "inside": {**inside, "state": slots}}


class Lookahead(torch.optim.Optimizer):
    """Steps every optimizer that it is made of."""

    def __init__(self, *inside: torch.optim.Optimizer) -> None:
        super().__init__([p for one in inside for group in one.param_groups for p in group["params"]], {})
        self.inside = list(inside)

    def step(self, closure: Any = None) -> None:
        for one in self.inside:
            one.step()


def test_an_optimizer_inside_an_optimizer_is_named_once_its_state_is_known_to_be_left_out():
    model = net()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert caught(model=model, optimizer=optimizer) == []  # no step, no state
    (message,) = caught(trainer(optimizer, *model.parameters()), model=model, optimizer=optimizer)
    assert message.startswith("component 'optimizer' holds another optimizer, base_optimizer (SGD), whose state (")
    assert "'momentum_buffer') its state_dict() leaves out" in message
    assert "inner=optimizer.base_optimizer" in message


def test_optimizers_in_a_list_and_below_others_are_found():
    model = net()
    sam = Sam([model.weight], torch.optim.Adam, lr=0.1)
    optimizer = Lookahead(torch.optim.RMSprop([model.bias]), sam)
    messages = caught(trainer(optimizer, *model.parameters()), model=model, optimizer=optimizer)
    found = sorted(message.partition("another optimizer, ")[2].partition(",")[0] for message in messages)
    assert found == ["inside[0] (RMSprop)", "inside[1] (Sam)", "inside[1].base_optimizer (Adam)"]


def sam_of(cls: type[Sam], *names: str, base: Any = torch.optim.Adam) -> dict[str, Any]:
    model = net()
    optimizer = cls(model.parameters(), base, lr=0.1)
    return {"model": model, "optimizer": optimizer, **dict.fromkeys(names, optimizer.base_optimizer)}


def shown() -> dict[str, Any]:
    model = net()
    return {"model": model, "optimizer": Shown(torch.optim.Adam(model.parameters()))}


class Trainer:
    """Everything in one object."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def step(self) -> None:
        self.optimizer.step()

    def state_dict(self) -> Any:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Any) -> None: ...


class Lossy(Trainer):
    def state_dict(self) -> Any:
        return {"model": self.model.state_dict()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: sam_of(Sam, "inner"),
        lambda: sam_of(Sam, base=torch.optim.SGD),  # without momentum it has no state
        lambda: sam_of(Whole),
        shown,
    ],
)
def test_optimizers_inside_whose_state_is_saved_are_not_named(make):
    parts = make()
    assert caught(trainer(parts["optimizer"], *parts["model"].parameters()), **parts) == []


@pytest.mark.parametrize("cls, count", [(Trainer, 0), (Lossy, 1)])
def test_an_object_with_an_optimizer_saves_its_state_or_is_named(cls, count):
    run = cls()
    messages = caught(trainer(run, *run.model.parameters()), trainer=run)
    assert ["'trainer' holds another optimizer, optimizer (Adam)" in message for message in messages] == [True] * count


# ------------------------------------------------------------------------------------------------------ schedulers


def stairs(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.StepLR(optimizer, 5)


def chain(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.ChainedScheduler([stairs(optimizer), schedulers.ConstantLR(optimizer)])


@pytest.mark.parametrize("make", [stairs, chain, schedulers.ReduceLROnPlateau])
def test_a_scheduler_whose_optimizer_is_not_registered_is_named(make):
    model = net()
    optimizer, other = torch.optim.SGD(model.parameters()), torch.optim.SGD([model.bias, *net().parameters()])
    (message,) = caught(model=model, scheduler=make(optimizer))
    assert "scheduler 'scheduler' sets the learning rate of an optimizer (SGD) that is not registered" in message
    assert caught(model=model, optimizer=optimizer, scheduler=make(optimizer)) == []
    assert len(caught(scheduler=make(other), model=net())) == 1


def test_a_scheduler_may_know_its_optimizer_under_another_wrapper():
    model = net()
    sam = Sam(model.parameters(), torch.optim.Adam, lr=0.1)
    assert caught(model=model, optimizer=sam, scheduler=stairs(sam.base_optimizer)) == []
    adam = torch.optim.Adam(model.parameters())
    assert caught(model=model, optimizer=Shown(adam), scheduler=stairs(adam)) == []
    run = Trainer()
    assert caught(trainer=run, scheduler=stairs(run.optimizer)) == []


# ------------------------------------------------------------------------------- what comes later, what hides inside


def test_a_group_that_is_added_after_the_first_save_is_looked_at_and_named_once():
    body, head = net(), net()
    optimizer = torch.optim.Adam(body.parameters())
    saves = iter(range(4))

    def train() -> None:
        if next(saves) == 1:
            optimizer.add_param_group({"params": head.parameters()})

    (message,) = caught(train, model=body, optimizer=optimizer)
    assert "trains 2 parameters that no registered component holds" in message
    assert "group 1 [2, 3], group 1 [2]" in message


class HidingTrainer:
    """Saves one of its two networks, and one of its two optimizers; as copies if asked."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], *, whole: bool = False) -> None:
        self.shown, self.hidden, self.whole = net(), net(), whole
        self.showing, self.hiding = make(self.shown.parameters()), make(self.hidden.parameters())

    def state_dict(self) -> dict[str, Any]:
        found = {"m": self.shown.state_dict(), "o": self.showing.state_dict()}
        if self.whole:
            found = copy.deepcopy({**found, "h": self.hidden.state_dict(), "ho": self.hiding.state_dict()})
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def train(self) -> None:
        for module, optimizer in ((self.shown, self.showing), (self.hidden, self.hiding)):
            trainer(optimizer, *module.parameters())()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_each_optimizer_inside_an_object_is_judged_by_itself_with_what_it_trains(make):
    part = HidingTrainer(make)
    found = caught(part.train, trainer=part)
    assert "hiding (" in found[0]
    assert "trains 2 parameters which neither its state_dict() nor another component saves: [2, 3], [2]" in found[0]
    assert len(found) == 1 + (make is torch.optim.Adam)
    assert all("holds another optimizer, hiding" in message for message in found[1:])


def test_an_object_that_saves_copies_of_all_it_trains_is_not_named():
    part = HidingTrainer(torch.optim.Adam, whole=True)
    assert caught(part.train, trainer=part) == []
