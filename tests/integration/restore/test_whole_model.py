"""Whole models: weights as ever; the architecture is run only where it is asked for and trusted."""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager, ModuleComponent, WholeModel, load_whole_model
from checkpointer.errors import (
    CheckpointerWarning,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    IncompatibleStateError,
    UnsupportedStateError,
)
from checkpointer.state import Captured, adapter_for
from tests.integration.restore.whole_cases import Hooked, Net
from tests.support import processes
from tests.support.compare import assert_identical
from tests.support.forge import flip
from tests.support.memory_engine import carry, restore, save

TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def whole(module: nn.Module, *arguments: Any) -> WholeModel:
    return WholeModel(module, *arguments, silence=["*"])


def saved(root: Path, module: nn.Module, *arguments: Any) -> str:
    with CheckpointManager(root, model=whole(module, *arguments)) as manager:
        manager.save(3).result(60)  # type: ignore[union-attr]
    return str(root)


def trained() -> Net:
    module = Net(4)
    module(TOKENS).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.25)
    return module.eval()


def forge(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Let the component write a pickle that makes a directory when it is loaded."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    buffer = io.BytesIO()
    torch.save(Attack(), buffer)
    monkeypatch.setattr("checkpointer.state.module.whole._pickle", lambda root: buffer.getvalue())


def test_a_pickled_model_comes_back_whole(tmp_path):
    module = trained()
    loaded = load_whole_model(saved(tmp_path / "run", module), trust_pickle=True)
    assert_identical(dict(loaded.state_dict()), dict(module.state_dict()))
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.scale, module.scale)
    assert torch.equal(loaded.cache, module.cache)
    assert loaded.history == [1, 2]
    assert not loaded.training
    assert not loaded.norm.bias.requires_grad
    assert torch.equal(loaded(TOKENS), module(TOKENS))


def test_a_fresh_process_loads_a_model_that_it_has_not_built(tmp_path):
    module = trained()
    root = saved(tmp_path / "run", module)
    code = (
        "import sys, torch, checkpointer\n"
        f"model = checkpointer.load_whole_model({root!r}, 3, trust_pickle=True)\n"
        f"torch.save(model(torch.tensor({TOKENS.tolist()})).detach(), {str(tmp_path / 'out.pt')!r})\n"
        "print(type(model).__name__)"
    )
    done = processes.run([sys.executable, "-c", code], check=True)
    assert done.stdout == "Net\n"
    assert torch.equal(torch.load(tmp_path / "out.pt"), module(TOKENS))


def test_weights_are_stored_once_and_the_program_without_them():
    module = nn.Linear(400, 400)
    captured = adapter_for("model", whole(module), {}).capture()
    program = captured.tensors[captured.meta["program"]["tensor"]]
    assert program.numel() < 20_000
    assert captured.tensors["weight"].data_ptr() == module.weight.data_ptr()


@pytest.mark.slow
def test_an_exported_model_needs_no_class_and_computes_the_same(tmp_path):
    class Local(Net):
        """Cannot be pickled: no other process could import it."""

    module = Local(4)
    module(TOKENS)
    module.eval()
    rng = torch.get_rng_state()
    root = saved(tmp_path / "run", module, (TOKENS,))
    assert torch.equal(rng, torch.get_rng_state())
    loaded = load_whole_model(root, trust_pickle=True)
    assert torch.equal(loaded(TOKENS), module(TOKENS))
    adapter = adapter_for("model", whole(module, (TOKENS,)), {})
    with torch.no_grad():
        module.embed.weight.mul_(2)
    saved_again = save(adapter, "model")
    with torch.no_grad():
        module.norm.weight.mul_(3)
    assert saved_again[0].component.meta["program"]["format"] == "torch.export"
    restore(adapter, saved_again)
    assert torch.equal(module.norm.weight, torch.ones(4))


def test_a_model_that_does_not_export_is_pickled_with_a_warning(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("data-dependent control flow\nand more")

    monkeypatch.setattr(torch.export, "export", refuse)
    adapter = adapter_for("model", whole(Net(2), (TOKENS,)), {})
    with pytest.warns(CheckpointerWarning, match="'model' does not export.*data-dependent control flow$"):
        captured = adapter.capture()
    assert captured.meta["program"]["format"] == "torch.save"
    adapter.capture()


def test_a_model_that_can_neither_be_exported_nor_pickled_is_refused():
    module = nn.Linear(1, 1)
    module.hook = lambda: None
    with pytest.raises(UnsupportedStateError, match="neither as an exported program nor as a pickle"):
        adapter_for("model", whole(module), {}).capture()


def test_a_module_that_takes_part_in_loading_keeps_its_tensors_in_the_pickle(tmp_path):
    module = Hooked()
    loaded = load_whole_model(saved(tmp_path / "run", module), trust_pickle=True)
    assert torch.equal(loaded.weight, module.weight)
    assert loaded.loaded == 1


def test_without_trust_nothing_is_run_and_the_error_says_why(tmp_path, monkeypatch):
    forge(monkeypatch, tmp_path / "attacked")
    root = saved(tmp_path / "run", Net(2))
    for trust in ({}, {"trust_pickle": False}, {"trust_pickle": 1}):
        with pytest.raises(ConfigError, match=r"runs whatever code it holds.*trust_pickle=True"):
            load_whole_model(root, **trust)
    assert not (tmp_path / "attacked").exists()


def test_an_ordinary_restore_and_a_verification_run_nothing(tmp_path, monkeypatch):
    forge(monkeypatch, tmp_path / "attacked")
    module = Net(2)
    root = saved(tmp_path / "run", module)
    for component in (whole(Net(2)), Net(2)):
        with CheckpointManager(root, read_only=True, model=component) as manager:
            assert manager.restore_latest() is not None
            assert manager.verify().ok
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(IncompatibleStateError, match="NoneType, not a module"):
        load_whole_model(root, trust_pickle=True)
    assert (tmp_path / "attacked").exists()  # the pickle was a dangerous one


def test_a_damaged_program_is_found_before_it_is_run(tmp_path, monkeypatch):
    forge(monkeypatch, tmp_path / "attacked")
    root = saved(tmp_path / "run", Net(2))
    path = next(Path(root).glob("checkpoint-3/model-00001-*.safetensors"))
    flip(path, path.read_bytes().index(b"PK") + 60)
    with pytest.warns(CheckpointerWarning), pytest.raises(CorruptCheckpointError):
        load_whole_model(root, trust_pickle=True)
    assert not (tmp_path / "attacked").exists()


def test_a_plain_module_and_a_whole_one_restore_each_other():
    source, target = trained(), Net(4)
    carry(whole(source), target)
    assert_identical(dict(target.state_dict()), dict(source.state_dict()))
    other = Net(4)
    saved_plain = save(adapter_for("it", ModuleComponent(target, silence=["*"]), {}), "it")
    restore(adapter_for("it", whole(other), {}), saved_plain)
    assert_identical(dict(other.state_dict()), dict(source.state_dict()))


def test_ordinary_restore_reads_no_byte_of_the_program():
    captured: Captured = adapter_for("model", whole(Net(2)), {}).capture()
    state, data = save(adapter_for("model", whole(Net(2)), {}), "model")
    key = captured.meta["program"]["tensor"]
    del data[key]
    restore(adapter_for("model", whole(Net(2)), {}), (state, data))


def test_components_without_architecture_and_empty_runs_are_typed_errors(tmp_path):
    with CheckpointManager(tmp_path / "plain", model=nn.Linear(1, 1)) as manager:
        manager.save(0)
    with pytest.raises(IncompatibleStateError, match="saved without its architecture"):
        load_whole_model(tmp_path / "plain", trust_pickle=True)
    with pytest.raises(IncompatibleStateError, match="no component 'net'"):
        load_whole_model(tmp_path / "plain", component="net", trust_pickle=True)
    with pytest.raises(CheckpointNotFoundError):
        load_whole_model(tmp_path / "empty", trust_pickle=True)
    with pytest.raises(CheckpointNotFoundError):
        load_whole_model(tmp_path / "plain", 7, trust_pickle=True)


def test_a_class_that_is_gone_is_a_typed_error(tmp_path, monkeypatch):
    root = saved(tmp_path / "run", Net(2))
    monkeypatch.delattr("tests.integration.restore.whole_cases.Net")
    with pytest.raises(IncompatibleStateError, match=r"cannot be loaded here.*Net"):
        load_whole_model(root, trust_pickle=True)


def test_example_inputs_are_a_tuple():
    with pytest.raises(ConfigError, match="tuple of arguments, got Tensor"):
        WholeModel(nn.Linear(1, 1), torch.ones(1))


def test_the_pickle_is_a_stock_one():
    captured = adapter_for("model", whole(Net(2)), {}).capture()
    data = captured.tensors[captured.meta["program"]["tensor"]].numpy().tobytes()
    loaded = torch.load(io.BytesIO(data), weights_only=False)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data), weights_only=True)
