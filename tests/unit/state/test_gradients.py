"""Gradients come back by name and in place, so that accumulation can be cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from checkpointer import Gradients
from checkpointer.errors import ConfigError, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Component
from checkpointer.state import RestoreOptions, SavedState, adapter_for
from tests.support.compare import assert_identical
from tests.support.memory_engine import carry, restore, save


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "dense": nn.Linear(3, 2), "idle": nn.Linear(1, 1)})


def backward(module: Any) -> None:
    module["dense"](module["table"](torch.tensor([1, 1, 4]))).square().sum().backward()


def grads(module: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def test_dense_sparse_and_missing_gradients_come_back_into_a_fresh_module():
    source, target = net(), net()
    backward(source)
    report = carry(Gradients(source), Gradients(target))
    found, expected = grads(target), grads(source)
    assert found["idle.weight"] is None
    assert found["table.weight"].layout is torch.sparse_coo
    assert not found["table.weight"].is_coalesced()
    assert_identical(found, expected)
    assert sorted(report.restored) == sorted(expected)


def test_live_gradients_keep_their_memory_and_surplus_ones_become_none():
    source, target = net(), net()
    backward(source)
    backward(target)
    target["idle"](torch.ones(1)).sum().backward()
    before = target["dense"].weight.grad
    carry(Gradients(source), Gradients(target))
    assert target["dense"].weight.grad is before
    assert_identical(grads(target), grads(source))
    assert target["idle"].weight.grad is None


def test_the_engine_is_given_the_live_gradient():
    module = nn.Linear(2, 2)
    module(torch.ones(2)).sum().backward()
    plan = adapter_for("g", Gradients(module), {}).prepare(
        save(adapter_for("g", Gradients(module), {}))[0], RestoreOptions()
    )
    assert plan.reads["weight"].data_ptr() == module.weight.grad.data_ptr()


def test_accumulation_cut_in_the_middle_goes_on_bit_for_bit():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    batches = torch.randn(4, 5, 3)
    for batch in batches[:2]:
        source(batch).square().sum().backward()
    carry(source, target)
    carry(Gradients(source), Gradients(target))
    for module in (source, target):
        for batch in batches[2:]:
            module(batch).square().sum().backward()
    assert_identical(grads(source), grads(target))


def test_tied_parameters_have_one_gradient():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module[1].weight = module[0].weight
    assert list(adapter_for("g", Gradients(module), {}).capture().tree) == ["0.weight", "0.bias", "1.bias"]


def test_all_mismatches_are_listed_at_once():
    source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    target = nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(2, 2), "d": nn.Linear(2, 2).double()})
    sum(layer(torch.ones(2)).sum() for layer in source.values()).backward()
    saved = save(adapter_for("g", Gradients(source), {}))
    with pytest.raises(IncompatibleStateError) as caught:
        adapter_for("g", Gradients(target), {}).prepare(saved[0], RestoreOptions())
    for part in ("'c.weight' (nearest: 'b.weight')", "'b.bias'", "[2, 2]", "[3, 2]", "float32, live is float64"):
        assert part in str(caught.value)
    report = restore(adapter_for("g", Gradients(target), {}), saved, strict=False)
    assert report.missing == ["c.weight", "c.bias"]
    assert report.unexpected == ["b.weight", "b.bias"]
    assert ("d.weight", "float32 -> float64") in report.cast
    assert target["a"].weight.grad is None
    assert torch.equal(target["d"].weight.grad, source["d"].weight.grad.double())


def test_gradients_are_renamed_ignored_and_adapted():
    source, target = nn.ModuleDict({"a": nn.Linear(2, 4)}), nn.ModuleDict({"b": nn.Linear(2, 3)})
    source["a"](torch.ones(2)).sum().backward()
    target["b"](torch.ones(2)).sum().backward()
    kept = target["b"].bias.grad.clone().fill_(7)
    target["b"].bias.grad.fill_(7)
    report = carry(
        Gradients(source),
        Gradients(target),
        rename=lambda key: key.replace("a.", "b."),
        ignore_keys=["*.bias"],
        adapt=lambda key, saved, live: saved[: live.shape[0]],
    )
    assert report.renamed == [("a.weight", "b.weight")]
    assert report.adapted == [("b.weight", "[4, 2] -> [3, 2]")]
    assert torch.equal(target["b"].weight.grad, source["a"].weight.grad[:3])
    assert torch.equal(target["b"].bias.grad, kept)


@pytest.mark.parametrize("tree", [None, [], {"weight": 3}, {"weight": {"$tensor": "nowhere"}}, {"weight": [1]}])
def test_damaged_entries_are_typed_errors(tree):
    module = nn.Linear(2, 2, bias=False)
    state, _ = save(adapter_for("g", Gradients(module), {}))
    forged = Component(state.component.kind, tree, state.component.tensors, {})
    with pytest.raises(CorruptCheckpointError):
        adapter_for("g", Gradients(module), {}).prepare(SavedState("g", forged), RestoreOptions())


def test_only_modules_have_gradients():
    with pytest.raises(ConfigError, match="Module"):
        Gradients([nn.Parameter(torch.ones(1))])
