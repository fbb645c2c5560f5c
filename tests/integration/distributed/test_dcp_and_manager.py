"""One format: DCP loads what a manager has saved, and the command reads what DCP has saved."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.fsdp import fully_shard

import checkpointer.dcp
from checkpointer import CheckpointManager
from checkpointer.cli.commands import cli
from checkpointer.dcp import SafetensorsReader
from checkpointer.dcp.contents import Contents
from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format.index import Component, Index, TensorSpec
from tests.support.command import runner
from tests.support.ranks import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP's own, in one process


class Tied(nn.Module):
    """Two names for one weight, a buffer, and state that is no tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.seen: dict[str, Any] = {"seed": seed, "scale": torch.tensor([float(seed)])}

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state


def training(seed: int, *, steps: int = 1) -> dict[str, Any]:
    model = Tied(seed)
    weights, others = [model.first.weight], [model.first.bias, *model.norm.parameters()]
    groups = [{"params": others, "lr": 0.1 * seed}, {"params": weights, "lr": 0.2 * seed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(steps):
        model(torch.arange(8.0).reshape(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def extra() -> dict[Any, Any]:
    return {"list": [torch.arange(3), {"x": 1}], 7: "seven", "pair": (1, 2.5), "ordered": OrderedDict(b=torch.ones(1))}


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint of a manager, and what it was made of."""
    parts = training(3)
    with CheckpointManager(tmp_path, **parts, extra=extra()) as mgr:
        mgr.save(5)
    return {**parts, "path": tmp_path / "checkpoint-5"}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_dcp_loads_every_state_dict_of_a_managers_checkpoint(saved):
    live = training(8)
    state = {name: part.state_dict() for name, part in live.items()}
    checkpointer.dcp.load(state, saved["path"])
    for name, part in live.items():
        part.load_state_dict(state[name])
        assert same(part.state_dict(), saved[name].state_dict()), name
    assert live["model"].seen["seed"] == 3


def test_dcp_loads_stateful_objects_from_a_managers_checkpoint(saved):
    live = training(8)
    checkpointer.dcp.load(dict(live), saved["path"])
    for name, part in live.items():
        assert same(part.state_dict(), saved[name].state_dict()), name


@pytest.mark.parametrize("flat", [False, True])
def test_dcp_loads_the_state_of_an_optimizer_by_the_names_of_its_parameters(saved, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    live = training(8)
    model, optimizer = live["model"], live["optimizer"]
    optimizer.param_groups.reverse()  # numbers would give the parameters each other's moments
    weights, moments = get_state_dict(model, optimizer, options=options)
    checkpointer.dcp.load({"model": weights, "optimizer": moments}, saved["path"])
    if flat:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
        expected = get_state_dict(saved["model"], saved["optimizer"], options=options)[1]
        assert moments.keys() == expected.keys()
        assert all(same(moments[name], expected[name]) for name in expected)
        return
    assert [group["params"] for group in moments["param_groups"]] == [
        ["first.bias", "norm.weight", "norm.bias"],
        ["first.weight"],
    ]
    optimizer.param_groups.reverse()
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert same(optimizer.state_dict(), saved["optimizer"].state_dict())


def test_other_components_are_loaded_as_the_state_that_they_were(saved):
    state = {
        "extra": {
            "list": [torch.zeros(3, dtype=torch.int64), {"x": 0}],
            "7": "",
            "pair": (),
            "ordered": {"b": torch.zeros(1)},
        }
    }
    checkpointer.dcp.load(state, saved["path"])
    expected = {("7" if key == 7 else key): value for key, value in extra().items()}
    assert same(state["extra"], expected)


def test_a_managers_checkpoint_is_listed_without_anything_twice(saved):
    found = _load_state_dict_from_keys(storage_reader=SafetensorsReader(saved["path"]))
    assert set(found) == {"model", "optimizer", "scheduler", "extra", "rng"}
    assert same(found["model"], {**saved["model"].state_dict()})
    moments = saved["optimizer"].state_dict()
    assert same(found["optimizer"]["state"], {str(number): entry for number, entry in moments["state"].items()})
    assert same(found["optimizer"]["param_groups"], moments["param_groups"])


def test_what_a_managers_checkpoint_lacks_is_named(saved):
    with pytest.raises(CheckpointerError, match=r"Missing key in checkpoint state_dict: optimizer.state.9.exp_avg"):
        checkpointer.dcp.load({"optimizer": {"state": {"9": {"exp_avg": torch.zeros(1)}}}}, saved["path"])


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def managed(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    model, optimizer = sharded()
    with CheckpointManager(root, model=model, optimizer=optimizer) as mgr:
        mgr.save(1)
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


def loaded(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    model, optimizer = sharded()
    for parameter in model.parameters():
        parameter.data.zero_()
    weights, moments = get_state_dict(model, optimizer)
    checkpointer.dcp.load({"model": weights, "optimizer": moments}, f"{root}/checkpoint-1")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


def test_what_four_ranks_of_a_manager_have_saved_dcp_loads_on_two(tmp_path):
    expected = run(4, managed, str(tmp_path))[0]
    for found in run(2, loaded, str(tmp_path)):
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])


def test_a_tree_that_is_not_well_formed_is_damage():
    spec = {"w": TensorSpec("float32", (1,))}
    for tree in ({"$odict": [["a"]]}, {"a": {"$tensor": "gone"}}, {"$dict": "x"}, {"$dict": [[{"$what": 1}, 2]]}):
        index = Index({"part": Component("stateful", tree, spec, {})}, {("part", "w"): ()}, {})
        with pytest.raises(CorruptCheckpointError):
            Contents.of(index)


def test_the_command_reads_what_dcp_has_saved(tmp_path):
    for step in (1, 2):
        checkpointer.dcp.save({**training(step), "n": [step]}, tmp_path / f"checkpoint-{step}")
    told = {}
    for command in ("ls", "show 2", "verify", "diff 1 2", f"consolidate 2 {tmp_path / 'out'}"):
        name, *arguments = command.split()
        result = runner().invoke(cli, [name, str(tmp_path), *arguments])
        assert result.exit_code == (1 if name == "diff" else 0), result.output  # they do differ
        told[name] = result.output
    assert "optimizer.state.0.exp_avg" in told["show"]
    assert "model.first.weight" in told["diff"]
    assert "model.first.weight" in load_file(tmp_path / "out" / "model.safetensors")
