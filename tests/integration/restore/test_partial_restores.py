"""Partial and adapted restores, flags, and environments, from a training loop's point of view."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager, Gradients, ModuleComponent, Restored
from checkpointer.environment import environment
from checkpointer.errors import CheckpointerWarning, IncompatibleStateError
from checkpointer.restore import restorer as restoring_module
from tests.support.compare import assert_identical


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def conv(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * 4, 2))


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        module(torch.randn(3, 1, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def save(root: Path, **components: Any) -> None:
    with CheckpointManager(root, **components) as manager:
        manager.save(7)


def restore(root: Path, *, live: dict[str, Any], **options: Any) -> Restored:
    with CheckpointManager(root, **live) as manager:
        restored = manager.restore_latest(**options)
    assert restored is not None
    return restored


def saved_run(root: Path, channels: int = 8) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = conv(channels)
    optimizer = adam(model)
    train(model, optimizer)
    save(root, model=model, optimizer=optimizer)
    return model, optimizer


def first(key: str, saved: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Keep what fits: the first kernels, and the inputs that come from them."""
    return saved[tuple(slice(0, size) for size in target.shape)]


def state_of(*objects: Any) -> Any:
    return [dict(item.state_dict()) for item in objects]


# --------------------------------------------------------------------------------------------- partial and adapted


def test_six_of_eight_kernels_are_kept_in_the_model_and_in_its_optimizer(root):
    model, optimizer = saved_run(root)
    smaller = conv(6)
    other = adam(smaller)
    restored = restore(root, live={"model": smaller, "optimizer": other}, adapt=first)
    assert torch.equal(smaller[0].weight, model[0].weight[:6])
    assert torch.equal(smaller[1].running_var, model[1].running_var[:6])
    assert torch.equal(smaller[3].weight, model[3].weight[:, :24])
    moment = other.state[smaller[3].weight]["exp_avg"]
    assert torch.equal(moment, optimizer.state[model[3].weight]["exp_avg"][:, :24])
    assert moment.is_contiguous()
    assert moment.untyped_storage().nbytes() == moment.nbytes
    adapted = dict(restored.report.components["model"].adapted)
    assert adapted["0.weight"] == "float32 [8, 1, 3, 3] -> float32 [6, 1, 3, 3]"
    assert "model.0.weight" in dict(restored.report.components["optimizer"].adapted)
    train(smaller, other, 1)


def test_wrong_shapes_are_listed_for_all_components_and_change_nothing(root):
    saved_run(root)
    smaller = conv(6)
    other = adam(smaller)
    before = state_of(smaller)
    with pytest.raises(IncompatibleStateError) as caught:
        restore(root, live={"model": smaller, "optimizer": other})
    message = str(caught.value)
    for part in ("model: the checkpoint", "optimizer: the checkpoint", "[8, 1, 3, 3]", "'1.running_mean'", "[2, 24]"):
        assert part in message
    assert_identical(state_of(smaller), before)
    assert not other.state


def test_a_silent_cast_is_refused_and_a_wanted_one_is_reported(root):
    model, _ = saved_run(root)
    half = conv().bfloat16()
    with pytest.raises(IncompatibleStateError, match=r"'0\.weight': saved as float32, live is bfloat16"):
        restore(root, live={"model": half}, components=["model"])
    restored = restore(root, live={"model": half}, components=["model"], strict=False)
    assert ("0.weight", "float32 -> bfloat16") in restored.report.components["model"].cast
    assert torch.equal(half[0].weight, model[0].weight.bfloat16())


def test_training_goes_on_in_another_dtype_after_an_unstrict_restore(root):
    _, optimizer = saved_run(root)
    half = conv().bfloat16()
    restored_optimizer = adam(half)
    with pytest.raises(IncompatibleStateError, match="saved as float32, live is bfloat16"):
        restore(root, live={"model": half, "optimizer": restored_optimizer})
    assert not restored_optimizer.state
    restored = restore(root, live={"model": half, "optimizer": restored_optimizer}, strict=False)
    assert ("model.0.weight.exp_avg", "float32 -> bfloat16") in restored.report.components["optimizer"].cast
    before = optimizer.param_groups[0]["params"][0]
    assert_identical(optimizer.state[before]["exp_avg"].bfloat16(), restored_optimizer.state[half[0].weight]["exp_avg"])
    half(torch.randn(3, 1, 4, 4).bfloat16()).square().sum().backward()
    restored_optimizer.step()


def test_one_component_is_restored_and_the_others_stay(root):
    model, _ = saved_run(root)
    target = conv()
    optimizer = adam(target)
    train(target, optimizer, 1)
    before, rng = optimizer.state_dict()["state"][0]["exp_avg"].clone(), torch.get_rng_state()
    restored = restore(root, live={"model": target, "optimizer": optimizer}, components=["model"])
    assert_identical(state_of(target), state_of(model))
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(restored.report.components) == ["model"]
    assert restored.report.unexpected == ["optimizer", "rng"]


def test_a_rule_of_renaming_reaches_the_slots_of_the_optimizer(root):
    model, optimizer = saved_run(root)
    target = nn.ModuleDict({"net": conv()})
    other = adam(target)
    restored = restore(root, live={"model": target, "optimizer": other}, rename=lambda key: f"net.{key}")
    assert_identical(state_of(target["net"]), state_of(model))
    assert torch.equal(other.state[target["net"][0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert ("0.weight", "net.0.weight") in restored.report.components["model"].renamed
    assert ("model.0.weight", "model.net.0.weight") in restored.report.components["optimizer"].renamed


@pytest.mark.parametrize("globs", [["3.*"], ["model.3.*", "optimizer.model.3.*"]])
def test_a_new_head_is_left_alone_by_ignore_keys(root, globs):
    model, optimizer = saved_run(root)
    target = conv()
    target[3] = nn.Linear(32, 5)
    other = adam(target)
    head = target[3].weight.detach().clone()
    restore(root, live={"model": target, "optimizer": other}, ignore_keys=globs)
    assert torch.equal(target[3].weight, head)
    assert target[3].weight not in other.state
    assert torch.equal(other.state[target[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    train(target, other, 1)


def test_reordered_parameters_get_their_own_moments(root):
    model, optimizer = saved_run(root)
    target = conv()
    other = torch.optim.Adam(list(target.parameters())[::-1])
    restore(root, live={"model": target, "optimizer": other})
    train(model, optimizer, 2)
    train(target, other, 2)
    assert_identical(state_of(target), state_of(model))


def test_added_removed_and_reshaped_parameters_are_listed_and_left_out_when_not_strict(root):
    model, optimizer = saved_run(root)
    target = nn.Sequential(*list(conv())[:3], nn.Linear(32, 5), nn.Linear(5, 2))
    other = torch.optim.Adam([p for name, p in target.named_parameters() if name != "1.bias"])
    with pytest.raises(IncompatibleStateError) as caught:
        restore(root, live={"model": target, "optimizer": other})
    for part in ("no state saved for parameter 'model.4.weight'", "'model.1.bias' is not optimized here", "[5, 32]"):
        assert part in str(caught.value)
    restored = restore(root, live={"model": target, "optimizer": other}, strict=False)
    report = restored.report.components["optimizer"]
    assert report.missing == ["model.4.weight", "model.4.bias"]
    assert report.unexpected == ["model.1.bias"]
    assert any("'model.3.weight'" in line for line in report.changed)
    assert torch.equal(other.state[target[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert target[3].weight not in other.state


def test_the_report_prints_as_a_table(root):
    saved_run(root)
    target = conv()
    target[3] = nn.Linear(32, 5)
    text = str(restore(root, live={"model": target, "extra": {}}, strict=False).report)
    assert "model: 7 restored" in text
    assert "changed    '3.weight' not restored" in text
    assert "missing      extra" in text


# ---------------------------------------------------------------------------------------------------- frozen state


def frozen_run(root: Path) -> nn.Sequential:
    model = conv()
    model[0].requires_grad_(False)
    model[1].eval()
    save(root, model=model)
    return model


def test_a_full_restore_freezes_and_unfreezes_as_saved_and_reports_it(root):
    frozen_run(root)
    target = conv()
    target[3].requires_grad_(False)
    restored = restore(root, live={"model": target})
    assert [p.requires_grad for p in target.parameters()] == [False, False, True, True, True, True]
    assert [part.training for part in target] == [True, False, True, True]
    changed = restored.report.components["model"].changed
    assert "requires_grad of '0.weight': True -> False" in changed
    assert "requires_grad of '3.weight': False -> True" in changed
    assert "training flag of '1': True -> False" in changed


@pytest.mark.parametrize("options", [{"components": ["model"]}, {"strict": False}])
def test_a_partial_restore_leaves_the_flags_and_reports_the_difference(root, options):
    frozen_run(root)
    target = conv()
    restored = restore(root, live={"model": target}, **options)
    assert all(parameter.requires_grad for parameter in target.parameters())
    assert all(part.training for part in target)
    changed = restored.report.components["model"].changed
    assert "requires_grad of '0.weight' is True and was False: left as it is" in changed


# ------------------------------------------------------------------------------------- module options and gradients


def test_accumulation_and_hidden_buffers_are_resumed(root):
    def build() -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model = conv()
        model.register_buffer("ema", torch.zeros(()), persistent=False)
        parts = {"model": ModuleComponent(model, include_non_persistent=True), "optimizer": adam(model)}
        return model, {**parts, "gradients": Gradients(model)}

    model, parts = build()
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    model.ema.fill_(3)
    save(root, **parts)
    target, live = build()
    restored = restore(root, live=live)
    assert float(target.ema) == 3
    assert_identical([p.grad for p in target.parameters()], [p.grad for p in model.parameters()])
    for module, components in ((model, parts), (target, live)):
        components["optimizer"].step()
        assert components["optimizer"].state[module[0].weight]["step"] == 1
    assert_identical(state_of(target, live["optimizer"]), state_of(model, parts["optimizer"]))
    assert restored.report.components["gradients"].restored == [name for name, _ in model.named_parameters()]


def test_the_first_save_names_what_it_leaves_out_and_the_second_is_silent(root):
    model = conv()
    model.cache = torch.ones(1)
    with CheckpointManager(root, model=model) as manager:
        with pytest.warns(CheckpointerWarning, match="'model' holds tensors that state_dict.. leaves out.*cache"):
            manager.save(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager.save(2)


# ---------------------------------------------------------------------------------------------------- environments


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(restoring_module, "environment", lambda: {**environment(), **changes})


def test_another_torch_warns_once_and_is_reported(root, monkeypatch):
    saved_run(root)
    elsewhere(monkeypatch, torch="1.0", num_threads=99)
    target = conv()
    with pytest.warns(CheckpointerWarning, match=r"bit for bit.*another version of torch.*running with 1\.0") as found:
        restored = restore(root, live={"model": target, "optimizer": adam(target)})
    assert len(found) == 1
    assert any("CPU threads" in line for line in restored.report.changed)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"world_size": 4}, "another world size: saved with 1, running with 4"),
        ({"devices": ["H100"]}, "other devices: saved with .*, running with H100"),
        ({"devices": ["H100"], "cudnn_benchmark": True}, "cudnn.benchmark is on"),
    ],
)
def test_what_makes_exactness_impossible_here_is_named_by_a_warning(root, monkeypatch, changes, complaint):
    model, optimizer = saved_run(root)
    elsewhere(monkeypatch, **changes)
    with pytest.warns(CheckpointerWarning, match=f"bit for bit.*{complaint}"):
        restore(root, live={"model": model, "optimizer": optimizer})


@pytest.mark.parametrize("options", [{"components": ["model"]}, {"strict": False}])
def test_a_partial_restore_reports_another_torch_without_a_warning(root, monkeypatch, options):
    saved_run(root)
    elsewhere(monkeypatch, torch="1.0")
    restored = restore(root, live={"model": conv()}, **options)
    assert any("another version of torch" in line for line in restored.report.changed)


def test_harmless_differences_are_only_reported(root, monkeypatch):
    model, optimizer = saved_run(root)
    elsewhere(monkeypatch, host="elsewhere", argv=["other.py"])
    restored = restore(root, live={"model": model, "optimizer": optimizer})
    assert len(restored.report.changed) == 2
