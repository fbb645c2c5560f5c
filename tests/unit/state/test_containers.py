"""Plain containers, arrays and tensors are restored in place, recursively; generators go on where they were."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.utils.data import DataLoader

from checkpointer import CheckpointManager, ModuleComponent
from checkpointer.errors import CheckpointerError, IncompatibleStateError, UnsupportedStateError
from checkpointer.format.index import Component
from checkpointer.state import Adapter, RestoreOptions, RngState, SavedState, Stateful, adapter_for
from tests.support.compare import assert_identical
from tests.support.memory_engine import carry, restore, save
from tests.unit.state.tree.test_codec import values


def test_nested_live_containers_and_tensors_keep_their_identity():
    def make(x):
        return {
            "a": [x, {"t": torch.full((2,), float(x)), "n": np.full(3, x), "s": {x}}],
            "d": deque([x], 3),
            "dd": defaultdict(list, {x: [x]}),
            "o": OrderedDict([("z", x), ("y", x)]),
            "tuple": (x, [x]),
        }

    source, target = make(1), make(2)
    target["extra"] = 5
    inner, tensor, array = target["a"][1], target["a"][1]["t"], target["a"][1]["n"]
    kept = [target["a"], inner, inner["s"], target["d"], target["dd"], target["o"], target["tuple"][1]]
    pointers = [tensor.data_ptr(), array.__array_interface__["data"]]
    report = carry(source, target)
    assert_identical(source, target)
    now = [target["a"], target["a"][1], target["a"][1]["s"], target["d"], target["dd"], target["o"], target["tuple"][1]]
    assert all(a is b for a, b in zip(kept, now, strict=True))
    assert target["a"][1]["t"] is tensor
    assert target["a"][1]["n"] is array
    assert pointers == [tensor.data_ptr(), array.__array_interface__["data"]]
    assert report.changed == ["'extra' removed: it was not saved"]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(values, values)
def test_whatever_was_saved_replaces_whatever_is_there(saved, live):
    source, target = {"x": saved}, {"x": live}
    carry(source, target)
    assert_identical(source, target)


def test_one_live_object_in_two_places_never_takes_two_saved_values():
    shared, tensor = [0], torch.zeros(2)
    target = {"a": shared, "b": shared, "t": tensor, "u": tensor}
    source = {"a": [1], "b": [2], "t": torch.ones(2), "u": torch.full((2,), 2.0)}
    carry(source, target)
    assert_identical(source, target)
    assert target["a"] is shared


def test_a_saved_tie_is_a_tie_again():
    tensor = torch.ones(3)
    target = {"a": torch.zeros(3), "b": torch.zeros(3)}
    carry({"a": tensor, "b": tensor}, target)
    assert target["a"] is target["b"]


@pytest.mark.parametrize(
    "source, target",
    [
        ([1, [2]], [5, 6, 7]),
        ({1, 2}, {3}),
        (deque([1, 2], 4), deque(maxlen=4)),
        (bytearray(b"abc"), bytearray(b"x" * 9000)),
        (bytearray(b"x" * 9000), bytearray()),
        (Counter("aab"), Counter("z")),
        (defaultdict(int, {"a": 1}), defaultdict(list)),
        (np.arange(6).reshape(2, 3), np.zeros((2, 3), int)),
        (np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((2, 3))),
        (np.array(["ab", "c"]), np.array(["xx", "yy"])),
        (np.arange(4.0), np.zeros(8)[::2]),
        (np.array(["2020-01-01", "2021-01-01"], "M8[s]"), np.zeros(4, "M8[s]")[::2]),
        (torch.arange(3), torch.zeros(3, dtype=torch.int64)),
        (torch.randn(2, 3), torch.zeros(3, 2).t()),
        (nn.Parameter(torch.randn(2)), nn.Parameter(torch.zeros(2))),
        (torch.randn(2, requires_grad=True), torch.zeros(2, requires_grad=True)),
        (torch.eye(3).to_sparse(), (torch.eye(3) * 2).to_sparse()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_container_is_restored_in_place(source, target):
    fortran = isinstance(source, np.ndarray) and not source.flags.c_contiguous
    carry(source, target)
    if isinstance(source, torch.Tensor):
        assert torch.equal(source.to_dense(), target.to_dense())
    elif fortran or (isinstance(source, np.ndarray) and source.dtype.kind == "U"):
        assert (source == target).all()
    else:
        assert_identical(source, target)


@pytest.mark.parametrize(
    "source, target",
    [
        ([1], {}),
        ({}, OrderedDict()),
        (deque(maxlen=3), deque(maxlen=4)),
        (np.zeros(3), np.zeros(4)),
        (np.zeros(3), np.zeros(3, "f4")),
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3), torch.zeros(3).double()),
        (torch.zeros(3), np.zeros(3)),
        (np.zeros(3), torch.zeros(3)),
        (torch.eye(2).to_sparse(), torch.eye(2)),
        (torch.eye(2), torch.eye(2).to_sparse()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_root_that_cannot_hold_the_saved_value_is_refused(source, target):
    before = save(adapter_for("it", target, {}))
    with pytest.raises(IncompatibleStateError):
        carry(source, target)
    assert save(adapter_for("it", target, {})) == before


def test_prepare_alone_changes_nothing():
    target = {"a": [1, {"t": torch.zeros(2)}], "b": {3}}
    before = save(adapter_for("it", target, {}))
    saved = save(adapter_for("it", {"a": [2, {"t": torch.ones(2)}]}, {}))
    adapter_for("it", target, {}).prepare(saved[0], RestoreOptions())
    assert save(adapter_for("it", target, {})) == before


def test_a_tensor_component_keeps_or_restores_requires_grad():
    source, target = torch.ones(2, requires_grad=True), torch.zeros(2)
    report = carry(source, target, partial=True)
    assert not target.requires_grad
    assert "left as it is" in report.changed[0]
    carry(source, target)
    assert target.requires_grad
    assert target.is_leaf


def test_live_tensors_inside_an_autograd_graph_are_replaced_not_written():
    weight = torch.ones(2, requires_grad=True)
    target = {"x": weight * 2}
    carry({"x": torch.zeros(2)}, target)
    assert torch.equal(target["x"], torch.zeros(2))
    loss = target["x"].sum() + weight.sum()
    loss.backward()


@pytest.mark.parametrize(
    "obj, hint",
    [
        (None, "leave the component out"),
        (3, "put it into a dict"),
        (True, "put it into a dict"),
        ((1, 2), "put it into a dict"),
        ("x", "put it into a dict"),
        (b"x", "put it into a dict"),
        (frozenset(), "put it into a dict"),
        (DataLoader([1, 2, 3]), "ResumableLoader"),
        (object(), "no state_dict"),
        (nn.Linear, "give an instance"),
        (type("D", (dict,), {})(), "exact containers"),
        (random.random, "no state_dict"),
        (np.zeros(2, "i4,f4"), "store its fields"),
        (np.array([object()]), r"\.tolist\(\)"),
        (np.ma.zeros(2), "getmaskarray"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:9],
)
def test_what_cannot_be_a_component_is_refused_with_a_hint(obj, hint):
    with pytest.raises(UnsupportedStateError, match=hint) as caught:
        adapter_for("thing", obj, {})
    assert "'thing'" in str(caught.value)


def net() -> nn.Module:
    return nn.Linear(1, 1)


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam(net().parameters())


class Pair(NamedTuple):
    gen: Any
    disc: Any


@pytest.mark.parametrize(
    "obj, place, kind, cure",
    [
        ([adam(), adam()], "parts[0]", "Adam", 'root, **{f"parts_{i}": part for i, part in enumerate(parts)})'),
        ((adam(),), "parts[0]", "Adam", "enumerate(parts)"),
        (Pair(adam(), adam()), "parts[0]", "Adam", "enumerate(parts)"),
        ({"gen": adam(), "disc": adam()}, "parts['gen']", "Adam", "root, gen=…, disc=… (that is, **parts))"),
        ({"gen": adam(), "epoch": 1}, "parts['gen']", "Adam", "root, gen=…)"),
        ({1: adam()}, "parts[1]", "Adam", 'root, **{f"parts_{key}": part for key, part in parts.items()})'),
        ({"class": adam()}, "parts['class']", "Adam", "parts.items()"),
        ({"a": {"b": [1, adam()]}}, "parts['a']['b'][1]", "Adam", "root, parts_0=…, parts_1=…)"),
        (deque([net()]), "parts[0]", "Linear", "nn.ModuleList or nn.ModuleDict"),
        (nn.ModuleDict({"x": net()})._modules, "parts['x']", "Linear", "x=…"),
        ({"x": net()}.values(), "parts[0]", "Linear", "enumerate(parts)"),
        ([torch.optim.lr_scheduler.StepLR(adam(), 1)], "parts[0]", "StepLR", "enumerate(parts)"),
        ([torch.amp.GradScaler("cpu")], "parts[0]", "GradScaler", "enumerate(parts)"),
        ([torch.Generator()], "parts[0]", "Generator", "enumerate(parts)"),
        ([np.random.default_rng()], "parts[0]", "Generator", "enumerate(parts)"),
        ([DataLoader([1, 2])], "parts[0]", "DataLoader", "enumerate(parts)"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_collections_of_components_get_a_keyword_for_each_when_the_manager_is_made(tmp_path, obj, place, kind, cure):
    with pytest.raises(UnsupportedStateError) as caught:
        CheckpointManager(tmp_path / "run", parts=obj)
    message = str(caught.value)
    assert message.startswith(f"component 'parts': {place} has state of its own ({kind})")
    assert cure in message
    assert "register_codec" not in message
    assert not (tmp_path / "run").exists()


def test_lists_of_modules_that_are_modules_and_lists_of_values_are_components(tmp_path):
    parts = {"a": nn.ModuleList([net()]), "b": nn.ModuleDict({"x": net()}), "c": nn.ParameterList([torch.ones(1)])}
    CheckpointManager(tmp_path, **parts, d=[torch.ones(1), {"x": np.ones(1)}], e=list(range(100_000))).close()


def without_init(base: type) -> Any:
    return type("Mine", (base,), {"__init__": lambda self: None})()


def with_child() -> nn.Module:
    return nn.Sequential(net(), nn.Sequential(without_init(nn.Module)))


@pytest.mark.parametrize(
    "make, path, call",
    [
        (lambda: without_init(torch.optim.Optimizer), "thing", "super().__init__(params, defaults)"),
        (lambda: without_init(torch.optim.SGD), "thing", "super().__init__(params, defaults)"),
        (lambda: without_init(nn.Module), "thing", "super().__init__()"),
        (with_child, "thing.1.0", "super().__init__()"),
        (lambda: ModuleComponent(with_child()), "thing.1.0", "super().__init__()"),
        (lambda: without_init(torch.optim.lr_scheduler.LRScheduler), "thing", "super().__init__(optimizer)"),
        (lambda: without_init(torch.optim.lr_scheduler.ReduceLROnPlateau), "thing", "super().__init__(optimizer)"),
    ],
    ids=["Optimizer", "SGD", "Module", "child", "ModuleComponent", "LRScheduler", "ReduceLROnPlateau"],
)
def test_what_was_not_initialized_is_named_when_the_manager_is_made(tmp_path, make, path, call):
    with pytest.raises(UnsupportedStateError) as caught:
        CheckpointManager(tmp_path / "run", thing=make())
    assert str(caught.value).startswith(f"component '{path}': Mine has no ")
    assert f"Mine.__init__ does not call {call}" in str(caught.value)


def test_an_optimizer_that_shows_another_need_not_be_initialized():
    class Shows(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

    assert adapter_for("optimizer", Shows(adam()), {}).kind == "optimizer"


def test_a_restore_in_place_fills_the_file_behind_a_memory_map(tmp_path):
    mapped = np.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    with pytest.raises(UnsupportedStateError, match=r"np\.asarray\(x\).*fills the mapped file"):
        adapter_for("thing", mapped, {})
    carry(np.array([1, 2, 3], "f4"), np.asarray(mapped))
    mapped.flush()
    assert np.fromfile(tmp_path / "x", "f4").tolist() == [1, 2, 3]


class Counting:
    def __init__(self):
        self.n: Any = 0

    def state_dict(self):
        return {"n": self.n, "t": torch.full((2,), float(self.n))}

    def load_state_dict(self, state):
        if state["n"] == 13:
            raise ValueError("unlucky")
        self.n = state["n"]
        self.t = state["t"]


def test_a_stateful_object_gets_a_fresh_state():
    source, target = Counting(), Counting()
    source.n = 5
    assert isinstance(source, Stateful)
    report = carry(source, target)
    assert target.n == 5
    assert torch.equal(target.t, torch.full((2,), 5.0))
    assert report.restored == ["n", "t"]
    source.n = 13
    with pytest.raises(IncompatibleStateError, match="unlucky"):
        carry(source, target)


def test_every_adapter_fits_the_protocol():
    module = nn.Linear(1, 1)
    things = [module, torch.optim.SGD(module.parameters()), Counting(), {}, torch.Generator(), RngState()]
    assert [adapter_for("x", thing, {}).kind for thing in things] == [
        "module", "optimizer", "stateful", "container", "generator", "rng",
    ]  # fmt: skip
    assert all(isinstance(adapter_for("x", thing, {}), Adapter) for thing in things)


GENERATORS: dict[str, Any] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "pcg": np.random.default_rng,
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "sfc": lambda seed: np.random.Generator(np.random.SFC64(seed)),
    "mt": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "dxsm": lambda seed: np.random.Generator(np.random.PCG64DXSM(seed)),
    "bits": np.random.PCG64,
    "legacy": np.random.RandomState,
    "python": random.Random,
}


def draw(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.randn(5, generator=generator).tolist()
    if isinstance(generator, np.random.BitGenerator):
        return generator.random_raw(5).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(5)]
    return generator.standard_normal(5).tolist()


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_generators_go_on_where_they_were(name):
    source, target = GENERATORS[name](1), GENERATORS[name](2)
    draw(source)
    saved = save(adapter_for("g", source, {}))
    expected = draw(source)
    restore(adapter_for("g", target, {}), saved)
    assert draw(target) == expected


def test_the_state_of_another_kind_of_generator_is_refused():
    for a, make in GENERATORS.items():
        saved = save(adapter_for("g", make(1), {}))
        for b in set(GENERATORS) - {a, "bits"}:
            if (a, b) == ("bits", "pcg"):
                continue
            with pytest.raises(IncompatibleStateError):
                adapter_for("g", GENERATORS[b](1), {}).prepare(saved[0], RestoreOptions())
    with pytest.raises(UnsupportedStateError):
        adapter_for("g", random.SystemRandom(), {}).capture()


def all_draws() -> Any:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def test_the_global_generators_go_on_where_they_were():
    random.gauss(0, 1), np.random.randn()
    saved = save(RngState())
    expected = all_draws()
    all_draws()
    report = restore(RngState(), saved)
    assert all_draws() == expected
    assert report.restored == ["python", "numpy", "torch"]


def test_generators_of_other_devices_are_reported_and_not_fatal():
    saved, data = save(RngState())
    tree: Any = saved.component.tree
    tree["devices"] = {"cuda": [tree["torch"]] * 3, "toaster": []}
    assert "generators were saved" in str(restore(RngState(), (saved, data)))


def test_a_damaged_rng_state_is_refused_and_changes_nothing():
    saved, _ = save(RngState())
    good: Any = saved.component.tree
    before = random.getstate()
    for key, value in [
        ("python", 3),
        ("numpy", None),
        ("torch", [1]),
        ("devices", {"cuda": 3}),
        ("x", 1),
        ("python", {"$tuple": []}),
    ]:
        damaged = SavedState("rng", Component("rng", {**good, key: value}, saved.component.tensors, {}))
        with pytest.raises(CheckpointerError):
            RngState().prepare(damaged, RestoreOptions())
    numpy_state = {**good["numpy"], "state": {**good["numpy"]["state"], "pos": 10**6}}
    damaged = SavedState("rng", Component("rng", {**good, "numpy": numpy_state}, saved.component.tensors, {}))
    with pytest.raises(CheckpointerError):
        RngState().prepare(damaged, RestoreOptions())
    assert random.getstate() == before


def test_a_state_that_a_generator_refuses_changes_no_other():
    saved, data = save(RngState())
    before = all_draws()
    restore(RngState(), (saved, data))
    state = random.getstate()
    with pytest.raises(CheckpointerError):
        restore(RngState(), (saved, {key: b"\xff" * len(value) for key, value in data.items()}))
    assert random.getstate() == state
    assert all_draws() == before


def test_live_tensors_that_overlap_are_not_filled_in_place():
    base = torch.zeros(6)
    target = {"a": base[0:4], "b": base[2:6], "c": torch.zeros(1).expand(4)}
    source = {"a": torch.full((4,), 1.0), "b": torch.full((4,), 2.0), "c": torch.arange(4.0)}
    carry(source, target)
    assert_identical(source, target)


def test_a_grown_and_a_shrunk_container_keep_their_order():
    target = {"z": 1, "a": [1, 2, 3], "m": {3: 1}}
    source = {"a": [1], "z": {"y": 1, "x": 2}, "m": {5: 1, 3: 2, "new": torch.ones(2)}}
    inner = target["m"]
    carry(source, target)
    assert_identical(source, target)
    assert target["m"] is inner


def test_a_partially_shared_array_and_tensor_stay_one_memory():
    array = np.arange(4.0)
    source = {"n": array, "t": torch.from_numpy(array)}
    target: dict[str, Any] = {"n": np.zeros(4), "t": torch.zeros(4)}
    carry(source, target)
    assert_identical(source, target)
    target["n"][0] = 9
    assert target["t"][0] == 9


def test_ignore_keys_reach_into_plain_containers_which_keep_what_is_named():
    def make(n: int) -> dict[str, Any]:
        inner = {"a": n, "tensor": torch.full((2,), float(n)), "array": np.full(2, n), "bytes": bytearray([n])}
        return {"n": n, "lr": n, "inner": inner, "rows": [n, {"b": n, "c": n}], "set": {n}}

    saved, live = make(1), {**make(2), "mine": 2, "other": 2}
    kept = {key: live["inner"][key] for key in ("tensor", "array", "bytes")} | {"set": live["set"]}
    globs = ["it.lr", "inner.tensor", "*.array", "inner.bytes", "rows.1.b", "set", "mine", "elsewhere.n"]
    report = carry(saved, live, ignore_keys=globs)
    assert_identical(
        live,
        {
            "n": 1,
            "lr": 2,
            "inner": {**make(2)["inner"], "a": 1},
            "rows": [1, {"b": 2, "c": 1}],
            "set": {2},
            "mine": 2,
        },
    )
    assert all(live["inner"].get(key, live["set"]) is value for key, value in kept.items())
    assert (report.restored, report.changed) == (["n", "inner", "rows"], ["'other' removed: it was not saved"])


@pytest.mark.parametrize("make", [OrderedDict, Counter, lambda items: defaultdict(int, items)])
def test_ignore_keys_reach_into_every_kind_of_dict(make):
    live = make({"a": 2, "b": 2})
    carry(make({"a": 1, "b": 1}), live, ignore_keys=["b"])
    assert_identical(live, make({"a": 1, "b": 2}))


def test_what_ignore_keys_names_and_only_the_checkpoint_has_is_left_out():
    live: dict[str, int] = {}
    carry({"a": 1, "b": 1}, live, ignore_keys=["b"])
    assert live == {"a": 1}
