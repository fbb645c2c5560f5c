"""What ``state_dict()`` leaves out is named once; non-persistent buffers come back where they are asked for."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from checkpointer import ModuleComponent
from checkpointer.errors import CheckpointerWarning, ConfigError, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Component
from checkpointer.state import RestoreOptions, SavedState, adapter_for, modules_of
from tests.support.memory_engine import carry, restore, save


class Rope(nn.Module):
    """A parameter, a non-persistent buffer, and a plain tensor."""

    def __init__(self, fill: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), fill))
        self.register_buffer("inv_freq", torch.full((3,), fill), persistent=False)
        self.cache = torch.full((2,), fill)


def caught(module: object) -> list[str]:
    """The warnings of two captures."""
    adapter = adapter_for("model", module, {})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        adapter.capture()
        adapter.capture()
    assert all(issubclass(item.category, CheckpointerWarning) for item in found)
    return [str(item.message) for item in found]


def test_plain_tensors_and_non_persistent_buffers_are_named_once():
    (message,) = caught(nn.ModuleDict({"encoder": Rope()}))
    assert "component 'model'" in message
    assert "do not follow .to() either: encoder.cache (" in message
    assert "non-persistent buffers: encoder.inv_freq (" in message
    assert "weight" not in message


def test_tensors_in_containers_are_named_and_long_lists_are_cut():
    module = nn.Linear(1, 1)
    module.memory = [torch.ones(1) for _ in range(13)]
    module.table = {"a": torch.ones(1), 2: "no tensor"}
    (message,) = caught(module)
    assert "memory[0], memory[1]" in message
    assert "memory[10]" not in message
    assert "and 4 more" in message


def lstm_after_a_step():
    module = nn.LSTM(2, 2)
    module(torch.ones(1, 1, 2))
    return module


def normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = weight_norm(nn.Linear(2, 2))
    with torch.no_grad():
        module(torch.ones(2))
    return module


def pruned():
    module = nn.Linear(2, 2)
    prune.random_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module(torch.ones(2))
    return module


def view_of_a_parameter():
    module = nn.Linear(2, 2)
    module.row = module.weight.detach()[0]
    return module


def result_of_a_forward_pass():
    module = nn.Linear(2, 2)
    module.last = module(torch.ones(2))
    return module


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = torch.ones(2)

    def get_extra_state(self):
        return {"held": self.held}


@pytest.mark.parametrize(
    "make",
    [
        lstm_after_a_step,
        normed,
        pruned,
        view_of_a_parameter,
        result_of_a_forward_pass,
        Extra,
        lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
        lambda: nn.TransformerEncoderLayer(4, 2),
        lambda: nn.BatchNorm2d(3),
    ],
)
def test_tensors_that_are_saved_or_made_anew_are_not_named(make):
    assert caught(make()) == []


@pytest.mark.parametrize("silence", [["cache", "inv_freq"], ["*"], ("c*", "inv_*")])
def test_names_and_globs_silence_the_warning(silence):
    assert caught(ModuleComponent(Rope(), silence=silence)) == []


def test_silence_of_one_name_leaves_the_other():
    (message,) = caught(ModuleComponent(Rope(), silence=["cache"]))
    assert "cache" not in message
    assert "inv_freq" in message


def test_non_persistent_buffers_come_back_in_place_where_they_are_asked_for():
    source, target = Rope(1.0), Rope(2.0)
    pointer = target.inv_freq.data_ptr()
    options = {"include_non_persistent": True, "silence": ["cache"]}
    report = carry(ModuleComponent(source, **options), ModuleComponent(target, **options))
    assert torch.equal(target.inv_freq, source.inv_freq)
    assert target.inv_freq.data_ptr() == pointer
    assert report.restored == ["weight", "inv_freq"]
    assert list(target.state_dict()) == ["weight"]


class Hooked(Rope):
    """Loading goes through ``load_state_dict``, which knows nothing of the buffer."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        assert "inv_freq" not in state_dict
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def test_non_persistent_buffers_come_back_beside_an_overridden_load_state_dict():
    source, target = Hooked(1.0), Hooked(2.0)
    options = {"include_non_persistent": True, "silence": ["cache"]}
    carry(ModuleComponent(source, **options), ModuleComponent(target, **options))
    assert torch.equal(target.inv_freq, source.inv_freq)
    assert torch.equal(target.weight, source.weight)


class Aliased(nn.Module):
    """Non-persistent buffers: a sparse one, one that is a parameter's memory, and none."""

    def __init__(self, fill: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), fill))
        self.register_buffer("view", self.weight.detach(), persistent=False)
        self.register_buffer("sparse", (torch.eye(2) * fill).to_sparse(), persistent=False)
        self.register_buffer("nothing", None, persistent=False)


def test_sparse_and_shared_non_persistent_buffers_come_back():
    source, target = Aliased(1.0), Aliased(2.0)
    carry(*(ModuleComponent(module, include_non_persistent=True) for module in (source, target)))
    assert torch.equal(target.sparse.to_dense(), torch.eye(2))
    assert target.view.data_ptr() == target.weight.data_ptr()
    assert torch.equal(target.view, torch.ones(2))


def test_a_plain_component_says_that_saved_buffers_are_not_restored():
    saved = save(adapter_for("m", ModuleComponent(Rope(1.0), include_non_persistent=True, silence=["*"]), {}))
    target = Rope(2.0)
    report = restore(adapter_for("m", target, {}), saved)
    assert torch.equal(target.inv_freq, torch.full((3,), 2.0))
    assert any("non-persistent" in line for line in report.changed)


def test_buffers_that_were_not_saved_are_missing_unless_ignored():
    saved = save(adapter_for("m", ModuleComponent(Rope(1.0), silence=["*"]), {}))
    adapter = adapter_for("m", ModuleComponent(Rope(2.0), include_non_persistent=True), {})
    with pytest.raises(IncompatibleStateError, match="missing from the checkpoint: 'inv_freq'"):
        adapter.prepare(saved[0], RestoreOptions())
    assert restore(adapter, saved, ignore_keys=["inv_freq"]).restored == ["weight"]
    assert restore(adapter, saved, strict=False).missing == ["inv_freq"]


def test_a_buffer_of_another_shape_is_refused():
    saved = save(adapter_for("m", ModuleComponent(Rope(1.0), include_non_persistent=True, silence=["*"]), {}))
    target = Rope(2.0)
    target.inv_freq = torch.ones(4)
    with pytest.raises(IncompatibleStateError, match="inv_freq"):
        adapter_for("m", ModuleComponent(target, include_non_persistent=True), {}).prepare(saved[0], RestoreOptions())


@pytest.mark.parametrize("nodes", [[], {"inv_freq": {"$tensor": "nowhere"}}, {"inv_freq": {"$tensor": 1}}])
def test_damaged_entries_are_typed_errors(nodes):
    state, _ = save(adapter_for("m", ModuleComponent(Rope(1.0), include_non_persistent=True, silence=["*"]), {}))
    part = state.component
    forged = Component(part.kind, part.tree, part.tensors, {**part.meta, "non_persistent": nodes})
    adapter = adapter_for("m", ModuleComponent(Rope(2.0), include_non_persistent=True), {})
    with pytest.raises(CorruptCheckpointError):
        adapter.prepare(SavedState("m", forged), RestoreOptions())


def test_a_wrapped_component_still_names_the_parameters_of_optimizers():
    module = nn.Linear(1, 1)
    assert modules_of({"net": ModuleComponent(module), "other": {}}) == {"net": module}


def test_nonsense_arguments_are_explained():
    with pytest.raises(ConfigError, match="got dict"):
        ModuleComponent({})
    with pytest.raises(ConfigError, match="silence is a list"):
        ModuleComponent(nn.Linear(1, 1), silence="cache")


class Metric(nn.Module):
    """Keeps states as torchmetrics does: plain attributes, of which ``state_dict()`` has copies where they persist."""

    def __init__(self, *, persistent: bool):
        super().__init__()
        self._defaults = {"tp": torch.zeros(1), "seen": []}
        self._persistent = dict.fromkeys(self._defaults, persistent)
        self.tp, self.seen = torch.ones(1), [torch.ones(2)]
        self._computed, self._forward_cache = torch.ones(1), torch.ones(1)
        self._cache = {"tp": torch.ones(1)}

    def persistent(self, mode: bool = False) -> None:
        self._persistent = dict.fromkeys(self._persistent, mode)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        kept = [name for name, persists in self._persistent.items() if persists]
        state.update({kwargs.get("prefix", "") + name: copy.deepcopy(getattr(self, name)) for name in kept})
        return state


def test_states_of_metrics_that_persist_are_saved_and_those_that_do_not_are_named_with_the_way_to():
    assert caught(nn.ModuleDict({"acc": Metric(persistent=True), "l": nn.Linear(1, 1)})) == []
    metric = Metric(persistent=False)
    (message,) = caught(nn.ModuleDict({"acc": metric}))
    assert "states of metrics: acc.tp, acc.seen[0] (metric.persistent(True)" in message
    assert "register_buffer" not in message
    metric.persistent(True)
    assert caught(nn.ModuleDict({"acc": metric})) == []


class Override(nn.Module):
    """Saves plain attributes in a form, and under names, of its own."""

    def __init__(self, form):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.queue, self.table, self.lost = torch.arange(3.0), {"a": torch.arange(5.0)}, torch.zeros(2)
        self.form = form

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        state[kwargs.get("prefix", "") + "memory"] = self.form(self)
        return state


@pytest.mark.parametrize(
    "form",
    [
        lambda module: {"queue": module.queue, "table": list(module.table.values())},
        lambda module: (module.queue.clone(), {"table": [{"a": module.table["a"].clone()}]}),
    ],
    ids=["the same memory", "copies"],
)
def test_what_an_override_saves_in_any_form_is_not_named_and_what_only_looks_like_a_parameter_is(form):
    (message,) = caught(nn.ModuleDict({"m": Override(form)}))
    assert "attributes, which do not follow .to() either: m.lost (" in message
