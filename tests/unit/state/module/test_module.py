"""Modules: in place where it is safe, through ``load_state_dict`` where it is not, nothing changed on failure."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError, UnsupportedStateError
from checkpointer.format.index import Component, TensorSpec
from checkpointer.state import RestoreOptions, SavedState, adapter_for
from tests.support.compare import assert_identical
from tests.support.memory_engine import carry, restore, save, snapshot


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def scramble(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(torch.randint(0, 9, tensor.shape))
    return module


def pointers(module: nn.Module) -> dict[str, int]:
    return {key: value.data_ptr() for key, value in module.state_dict(keep_vars=True).items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert_identical(dict(a.state_dict()), dict(b.state_dict()))


def test_parameters_and_buffers_are_read_in_place():
    source, target = scramble(net()), net()
    before, objects = pointers(target), dict(target.named_parameters())
    report = carry(source, target)
    assert_same(source, target)
    assert pointers(target) == before
    assert all(parameter is objects[name] for name, parameter in target.named_parameters())
    assert report.restored == list(source.state_dict())
    assert not report.changed


def test_the_engine_is_given_live_memory_and_nothing_else():
    source, target = net(), net()
    saved = save(adapter_for("m", source, {}))
    plan = adapter_for("m", target, {}).prepare(saved[0], RestoreOptions())
    assert {key: value.data_ptr() for key, value in plan.reads.items()} == pointers(target)


def test_all_mismatches_are_listed_at_once_and_nothing_is_changed():
    source = nn.ModuleDict({"encoder": nn.Linear(2, 3), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    target = nn.ModuleDict({"encoder": nn.Linear(2, 5), "heads": nn.Linear(3, 2), "norm": nn.LayerNorm(3).double()})
    before = snapshot(target)
    saved = save(adapter_for("m", source, {}))
    with pytest.raises(IncompatibleStateError) as caught:
        adapter_for("m", target, {}).prepare(saved[0], RestoreOptions())
    message = str(caught.value)
    for part in (
        "'heads.weight' (nearest: 'head.weight')",
        "'head.bias'",
        "[3, 2]",
        "[5, 2]",
        "saved as float32",
        "rename=",
    ):
        assert part in message
    assert_identical(dict(before), dict(target.state_dict()))


def test_not_strict_restores_what_fits_and_reports_the_rest():
    source = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2), "c": nn.Linear(2, 2)})
    target = nn.ModuleDict({"a": nn.Linear(2, 3).double(), "b": nn.Linear(4, 2), "d": nn.Linear(1, 1)})
    before = snapshot(target)
    report = carry(source, target, strict=False)
    assert torch.equal(target["a"].weight, source["a"].weight.double())
    assert torch.equal(target["b"].weight, before["b.weight"])
    assert torch.equal(target["b"].bias, source["b"].bias)
    assert report.missing == ["d.weight", "d.bias"]
    assert report.unexpected == ["c.weight", "c.bias"]
    assert report.cast == [("a.weight", "float32 -> float64"), ("a.bias", "float32 -> float64")]
    assert "b.weight" not in report.restored
    assert "missing" in str(report)
    assert "float32 -> float64" in str(report)


@pytest.mark.parametrize("rename", [{"0.weight": "a.weight", "0.bias": "a.bias"}, lambda key: key.replace("0.", "a.")])
def test_keys_are_renamed(rename):
    source, target = nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"a": nn.Linear(2, 2)})
    report = carry(source, target, rename=rename)
    assert torch.equal(source[0].weight, target["a"].weight)
    assert report.renamed == [("0.weight", "a.weight"), ("0.bias", "a.bias")]


@pytest.mark.parametrize("glob", ["0.*", "it.0.*"])
def test_ignored_keys_stay_as_they_are(glob):
    source, target = net(), net()
    before = snapshot(target)
    carry(source, target, ignore_keys=[glob])
    assert torch.equal(target[0].weight, before["0.weight"])
    assert torch.equal(target[2].weight, source[2].weight)


def test_adapt_is_called_where_shapes_or_dtypes_differ():
    source, target = nn.Linear(2, 3), nn.Linear(2, 5)
    calls = []

    def adapt(key, saved, live):
        calls.append(key)
        made = torch.zeros_like(live)
        made[:3] = saved
        return made

    pointer = target.weight.data_ptr()
    report = carry(source, target, adapt=adapt)
    assert calls == ["weight", "bias"]
    assert torch.equal(target.weight[:3], source.weight)
    assert target.weight.data_ptr() == pointer
    assert [key for key, _ in report.adapted] == calls
    with pytest.raises(IncompatibleStateError, match="adapt"):
        carry(source, target, adapt=lambda key, saved, live: saved)


def test_frozen_and_eval_flags_come_back_with_a_full_strict_restore():
    source = net().eval()
    source[0].train()
    source[0].weight.requires_grad_(False)
    target = net()
    target[2].weight.requires_grad_(False)
    report = carry(source, target)
    assert [p.requires_grad for p in target.parameters()] == [p.requires_grad for p in source.parameters()]
    assert [m.training for m in target.modules()] == [m.training for m in source.modules()]
    assert any("requires_grad of '0.weight'" in line for line in report.changed)
    assert save(adapter_for("m", source, {}))[0].component.meta["frozen"] == ["0.weight"]


@pytest.mark.parametrize("options", [{"partial": True}, {"strict": False}])
def test_flags_stay_and_are_reported_otherwise(options):
    source, target = net().eval(), net()
    source[0].weight.requires_grad_(False)
    report = carry(source, target, **options)
    assert target.training
    assert target[0].weight.requires_grad
    assert any("left as it is" in line and "0.weight" in line for line in report.changed)
    assert any("left as it is" in line and "training" in line for line in report.changed)


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.emb.weight


def test_tied_weights_are_stored_once_and_come_back_tied():
    source, target = scramble(Tied()), Tied()
    captured = adapter_for("m", source, {}).capture()
    assert list(captured.tensors) == ["emb.weight"]
    assert captured.aliases == {"head.weight": "emb.weight"}
    report = carry(source, target)
    assert target.head.weight is target.emb.weight
    assert_same(source, target)
    assert report.restored == ["emb.weight", "head.weight"]


def test_tied_weights_fill_both_of_an_untied_module_and_are_reported():
    source, target = scramble(Tied()), Tied(tie=False)
    report = carry(source, target)
    assert_same(source, target)
    assert target.head.weight is not target.emb.weight
    assert any("head.weight" in line for line in report.changed)


def test_untied_weights_are_refused_by_a_tied_module():
    with pytest.raises(IncompatibleStateError, match="one tensor here"):
        carry(Tied(tie=False), Tied())


def test_tied_parameters_on_the_meta_device_get_memory_once():
    source = scramble(Tied())
    with torch.device("meta"):
        target = Tied()
    carry(source, target)
    assert target.head.weight is target.emb.weight
    assert_same(source, target)


def test_a_module_on_the_meta_device_is_materialized_and_keeps_its_parameters():
    source = scramble(net())
    with torch.device("meta"):
        target = net()
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    target[0].weight.requires_grad_(False)
    carry(source, target)
    assert_same(source, target)
    assert [p.requires_grad for p in target.parameters()] == [p.requires_grad for p in source.parameters()]
    target(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(source[2].bias, target[2].bias)


@pytest.mark.filterwarnings("ignore:component 'it' holds tensors that state_dict")
def test_channels_last_gapped_zero_size_and_scalar_parameters_are_read_in_place():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.gapped = nn.Parameter(torch.randn(6, 4)[::2, ::2])
            self.none = nn.Parameter(torch.empty(0, 3))
            self.scalar = nn.Parameter(torch.randn(()))
            self.register_buffer("expanded", torch.ones(1).expand(3))
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("gone", torch.tensor(3), persistent=False)

    source, target = Odd(), Odd()
    before = pointers(target)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(3)
    carry(source, target)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
    del before["expanded"]
    assert before.items() <= pointers(target).items()
    assert target.conv.weight.is_contiguous(memory_format=torch.channels_last)


class Extra(nn.Linear):
    def __init__(self, state=None):
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state_of_any_kind_comes_back():
    for state in ({"a": (1, torch.ones(2))}, torch.arange(3), None, {"x": float("nan")}):
        source, target = nn.Sequential(Extra(state)), nn.Sequential(Extra({"other": 1}))
        carry(source, target)
        assert_identical(state, target[0].state)
        assert_identical(source[0].weight, target[0].weight)


class Cloning(nn.Linear):
    """A state-dict hook that hands out copies: writing into them never reaches the parameter."""

    def __init__(self):
        super().__init__(2, 2)
        self._register_state_dict_hook(self.clone_all)

    @staticmethod
    def clone_all(module, state, prefix, metadata):
        for key in list(state):
            state[key] = state[key].clone()


def override(name):
    def method(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return getattr(nn.Linear, name)(self, *args, **kwargs)

    return type("Overriding", (nn.Linear,), {name: method})(2, 2)


@pytest.mark.parametrize("method", ["load_state_dict", "_load_from_state_dict", "state_dict", "_save_to_state_dict"])
def test_overrides_take_part(method):
    source, target = override(method), override(method)
    before = target.weight.data_ptr()
    report = carry(source, target)
    assert torch.equal(source.weight, target.weight)
    assert target.weight.data_ptr() == before
    assert target.calls
    assert report.restored == ["weight", "bias"]


def test_hooks_take_part():
    source, target = Cloning(), Cloning()
    carry(source, target)
    assert torch.equal(source.weight, target.weight)
    seen = []
    target.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.append(sorted(state)))
    carry(source, target)
    assert seen == [["bias", "weight"]]
    carry(source, target, ignore_keys=["bias"])
    carry(source, target, strict=False, rename={"bias": "other"})


def test_a_refusing_load_state_dict_is_a_typed_error():
    source, target = override("load_state_dict"), override("load_state_dict")
    target.register_load_state_dict_pre_hook(lambda *rest: 1 / 0)
    with pytest.raises(IncompatibleStateError, match="refused"):
        carry(source, target)


def test_parametrized_and_normalized_modules_come_back():
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ):
        source, target = wrap(nn.Linear(3, 3)), wrap(nn.Linear(3, 3))
        carry(source, target)
        assert_same(source, target)
        source.eval(), target.eval()
        assert torch.equal(source.weight, target.weight)


def test_wrapper_prefixes_are_cut_by_type(tmp_path):
    inner = net()
    plain = save(adapter_for("m", inner, {}))
    compiled = torch.compile(inner, backend="eager")
    nested = copy.deepcopy(inner)
    nested[0] = torch.compile(nested[0], backend="eager")
    parallel = nn.DataParallel(inner)
    for wrapped in (compiled, nested, parallel, torch.compile(parallel, backend="eager")):
        saved = save(adapter_for("m", wrapped, {}))
        assert list(saved[0].component.tensors) == list(plain[0].component.tensors)
        target = scramble(net())
        restore(adapter_for("m", target, {}), saved)
        assert_same(inner, target)
        scramble(wrapped)
        restore(adapter_for("m", wrapped, {}), plain if wrapped is not nested else saved)
        saved = save(adapter_for("m", wrapped, {}))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(net())
        saved = save(adapter_for("m", ddp, {}))
        assert list(saved[0].component.tensors) == list(plain[0].component.tensors)
        target = nn.parallel.DistributedDataParallel(torch.compile(net(), backend="eager"))
        restore(adapter_for("m", target, {}), saved)
        assert_identical(list(ddp.state_dict().values()), list(target.state_dict().values()))
    finally:
        torch.distributed.destroy_process_group()


def test_the_prefix_of_an_averaged_model_is_its_own():
    source, target = AveragedModel(scramble(net())), AveragedModel(net())
    saved = save(adapter_for("m", source, {}))
    assert "module.0.weight" in saved[0].component.tensors
    assert "n_averaged" in saved[0].component.tensors
    restore(adapter_for("m", target, {}), saved)
    assert_same(source, target)


def test_sparse_buffers_and_names_that_safetensors_reserves_come_back():
    def make(value):
        module = nn.Linear(1, 1)
        module.register_buffer("adjacency", (torch.eye(3) * value).to_sparse())
        module.register_buffer("adjacency_values", torch.ones(1))
        module.register_buffer("__metadata__", torch.full((1,), value))
        return module

    source, target = make(2.0), make(3.0)
    carry(source, target)
    assert_same(source, target)


def test_old_module_versions_go_through_load_state_dict():
    source, target = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert save(adapter_for("m", source, {}))[0].component.meta["versions"] == {"": 2}
    source._version = 3
    seen = []
    target.register_load_state_dict_pre_hook(lambda m, s, p, metadata, *rest: seen.append(metadata))
    carry(source, target)
    assert seen[0]["version"] == 3


def test_another_kind_of_component_and_damaged_entries_are_refused():
    saved, _ = save(adapter_for("m", net(), {}))
    good = saved.component
    with pytest.raises(IncompatibleStateError, match="saved as"):
        adapter_for("m", torch.optim.SGD(net().parameters()), {}).prepare(saved, RestoreOptions())
    for tree, meta in [
        ([], good.meta),
        ({"0.weight": {"$tensor": "nope"}}, good.meta),
        ({"x": {"$evil": 1}}, good.meta),
        (good.tree, {"frozen": 3}),
        (good.tree, {"versions": [1]}),
    ]:
        damaged = SavedState("m", Component("module", tree, good.tensors, meta))
        with pytest.raises((CorruptCheckpointError, IncompatibleStateError)):
            adapter_for("m", net(), {}).prepare(damaged, RestoreOptions())
    forged = SavedState("m", Component("module", {}, {"weight": TensorSpec("float32", (2, 2), (9, 9))}, {}))
    with pytest.raises((CorruptCheckpointError, IncompatibleStateError)):
        adapter_for("m", override("state_dict"), {}).prepare(forged, RestoreOptions(strict=False))


def test_a_lazy_module_is_refused_before_its_first_forward_pass():
    with pytest.raises(UnsupportedStateError, match="forward pass"):
        adapter_for("m", nn.LazyLinear(3), {}).capture()


def test_a_large_module_is_captured_without_copies():
    module = nn.Sequential(OrderedDict((f"l{i}", nn.Linear(2, 2)) for i in range(100)))
    captured = adapter_for("m", module, {}).capture()
    assert {k: v.data_ptr() for k, v in captured.tensors.items()} == pointers(module)
    assert captured.tree == {}
