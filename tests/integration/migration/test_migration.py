"""Hand-made checkpoint files become checkpoints, and checkpoints become files that torch and safetensors read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.cli.commands import cli
from checkpointer.errors import (
    CheckpointerWarning,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    IncompatibleStateError,
    RunLockedError,
    RunNotEmptyError,
    UnsupportedStateError,
)
from checkpointer.migration import export_checkpoint, import_checkpoint, plan_import
from tests.campaign.exact_resume.cases import CASES
from tests.campaign.exact_resume.engine import build
from tests.integration.cli.test_cli import document, error_of, invoke
from tests.support import training
from tests.support.compare import assert_identical
from tests.support.forge import flip

OPTIMIZERS = [name for name, case in CASES.items() if case.group == "optimizers" and not case.long]
NO_RNG = "holds no state of the random generators"


def loaded_by_hand(state: dict[str, Any], frozen: bool = False) -> training.Training:
    """A fresh run that the original way of loading has filled."""
    fresh = training.make(9, frozen=frozen)
    fresh.model.load_state_dict(state["model"])
    fresh.optimizer.load_state_dict(state["optimizer"])
    fresh.scheduler.load_state_dict(state["scheduler"])
    return fresh


def restored(root: Any, *, frozen: bool = False, **options: Any) -> training.Training:
    """A fresh run that the manager has restored."""
    fresh = training.make(9, frozen=frozen)
    parts = {name: fresh.components[name] for name in ("model", "optimizer", "scheduler")}
    with CheckpointManager(root, **parts) as manager, pytest.warns(CheckpointerWarning, match=NO_RNG):
        found = manager.restore_latest(**options)
    assert found is not None
    assert found.report.missing == ["rng"]
    return fresh


def states(steps: int = 3, *, frozen: bool = False) -> dict[str, Any]:
    run = training.at(steps, frozen=frozen)
    return {name: run.components[name].state_dict() for name in ("model", "optimizer", "scheduler")}


def assert_same_run(a: training.Training, b: training.Training) -> None:
    left, right = a.snapshot(), b.snapshot()
    for name in ("model", "optimizer", "scheduler", "frozen"):
        assert_identical(left[name], right[name], name)


# ---------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize(
    "keys",
    [
        ("model", "optimizer", "scheduler"),
        ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict"),
        ("state_dict", "optim", "lr_scheduler"),
        ("net", "optimizer", "lr_scheduler_state_dict"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_an_import_restores_to_the_bits_that_load_state_dict_gives(tmp_path, keys, zipped):
    state = states()
    file = {key: state[name] for key, name in zip(keys, state, strict=True)} | {"epoch": 3, "global_step": 70}
    torch.save(file, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)

    info = import_checkpoint(tmp_path / "a.pt", tmp_path / "run").checkpoint

    assert (info.step, info.epoch) == (70, 3)
    run, other = restored(tmp_path / "run"), loaded_by_hand(state)
    assert_same_run(run, other)
    torch.manual_seed(1)
    run.advance(3)
    torch.manual_seed(1)
    assert_same_run(run, other.advance(3))


def test_an_import_leaves_the_flags_of_the_live_module_alone(tmp_path):
    state = states(frozen=True)
    import_checkpoint(state, tmp_path, step=1)

    run = restored(tmp_path, frozen=True)
    run.model.eval()
    assert_same_run(run, loaded_by_hand(state, frozen=True))


def test_an_imported_run_goes_on_and_restores_completely_after_its_next_save(tmp_path):
    import_checkpoint(states(), tmp_path, step=7)
    run = training.make(9)
    parts = {name: run.components[name] for name in ("model", "optimizer", "scheduler")}
    with CheckpointManager(tmp_path, **parts) as manager:
        with pytest.warns(CheckpointerWarning, match=NO_RNG):
            manager.restore_latest()
        run.advance(1)
        manager.save(8)
    with CheckpointManager(tmp_path, **parts) as manager:
        again = manager.restore_latest()
    assert again is not None
    assert (again.step, again.report.missing) == (8, [])


def _grouped(run):
    return torch.optim.AdamW([{"params": [parameter]} for parameter in run.model.parameters()])


def _fewer(run):
    return torch.optim.AdamW([*run.model.parameters()][:-1])


def _backwards(run):
    return torch.optim.AdamW([*run.model.parameters()][::-1])


def _other_class(run):
    return torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (_grouped, "1 parameter groups were saved, live are"),
        (_fewer, "group 0: . parameters were saved, live are"),
        (_backwards, r"group 0, position 0: 'exp_avg' was saved with shape \[.*\], the live parameter has"),
        (_other_class, "group 0 was saved without 'momentum'.*was it another class of optimizer"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_an_optimizer_that_an_import_does_not_fit_is_refused_before_anything_changes(tmp_path, make, complaint, strict):
    import_checkpoint(states(), tmp_path, step=1)
    run = training.make(9)
    optimizer = make(run)
    before = run.snapshot()
    manager = CheckpointManager(tmp_path, model=run.model, optimizer=optimizer, scheduler=run.scheduler)
    with manager, pytest.raises(IncompatibleStateError, match=f"(?s)^optimizer: .*{complaint}"):
        manager.restore_latest(strict=strict)
    assert_identical(run.snapshot(), before)
    assert not optimizer.state


def test_an_optimizer_that_loads_in_its_own_way_judges_an_import_itself(tmp_path):
    class Lenient(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            self.loaded = state_dict

    import_checkpoint({"optimizer": states()["optimizer"]}, tmp_path, step=1)
    optimizer = Lenient([torch.ones(2)])
    with CheckpointManager(tmp_path, optimizer=optimizer) as manager, pytest.warns(CheckpointerWarning, match=NO_RNG):
        manager.restore_latest()
    assert len(optimizer.loaded["param_groups"]) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_imported_file_of_every_optimizer_fits_one_of_its_class(name, tmp_path):
    run, fresh = build(name, 1), build(name, 2)
    for number in range(2):
        run.step(number)
    state = {part: run.components[part].state_dict() for part in ("model", "optimizer")}
    import_checkpoint(state, tmp_path, step=1)
    parts = {part: fresh.components[part] for part in state}
    with CheckpointManager(tmp_path, **parts) as manager, pytest.warns(CheckpointerWarning, match=NO_RNG):
        manager.restore_latest()
    assert_identical(fresh.components["optimizer"].state_dict(), state["optimizer"])


def test_an_imported_file_of_an_old_torch_lacks_settings_that_have_defaults_now(tmp_path):
    state = states()
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params", "initial_lr")
    groups = [{key: group[key] for key in known} for group in state["optimizer"]["param_groups"]]
    import_checkpoint({**state, "optimizer": {**state["optimizer"], "param_groups": groups}}, tmp_path, step=1)
    restored(tmp_path).advance(1)


def test_a_prefix_that_every_key_has_is_removed_and_said(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = OrderedDict((f"module._orig_mod.{key}", value) for key, value in model.state_dict().items())
    partly = {"module.a": torch.ones(2), "n_averaged": torch.tensor(3)}

    plan = import_checkpoint({"model": wrapped, "ema": partly}, tmp_path, step=1).plan

    assert list(plan.parts["model"].value) == list(model.state_dict())
    assert plan.parts["model"].stripped == "module._orig_mod."
    assert list(plan.parts["ema"].value) == ["module.a", "n_averaged"]


def test_versions_of_a_wrapped_model_are_those_of_the_model_itself(tmp_path):
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    import_checkpoint(model.state_dict(), tmp_path, step=1)

    meta = document("show", tmp_path)["components"]["model"]["meta"]
    assert meta["versions"] == {"1": 2}


def test_a_bare_state_dict_is_the_model_and_a_bare_optimizer_state_the_optimizer():
    state = states()
    assert list(plan_import(state["model"]).parts) == ["model"]
    assert list(plan_import(state["optimizer"]).parts) == ["optimizer"]


def test_a_lightning_file_is_taken_apart(tmp_path):
    state = states()
    file = {
        "epoch": 2,
        "global_step": 40,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state["model"],
        "optimizer_states": [state["optimizer"], state["optimizer"]],
        "lr_schedulers": [state["scheduler"]],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(file, tmp_path / "a.ckpt")

    plan = import_checkpoint(tmp_path / "a.ckpt", tmp_path / "run", map={"optimizer_1": None}).plan

    assert {name: part.kind for name, part in plan.parts.items()} == {
        "model": "module",
        "optimizer": "optimizer",
        "scheduler": "stateful",
    }
    assert (plan.step, plan.epoch, plan.left_out) == (40, 2, {"optimizer_1": "as asked"})
    assert_same_run(restored(tmp_path / "run"), loaded_by_hand(state))
    kept = json.loads((tmp_path / "run" / "checkpoint-40" / "files" / "imported.json").read_text())
    assert kept["callbacks"] == {"ModelCheckpoint": {"best_model_score": 0.5}}
    assert kept["hyper_parameters"] == {"lr": 0.1}


def test_tied_weights_stay_tied_and_plain_values_are_no_components(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    args = argparse.Namespace(lr=0.1, betas=(0.9, 0.95))
    torch.save({"net": model.state_dict(), "args": args, "best_acc1": torch.tensor([0.5])}, tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "run", step=0)

    fresh = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    fresh["head"].weight = fresh["embed"].weight
    with CheckpointManager(tmp_path / "run", read_only=True, model=fresh) as manager:
        assert manager.restore_latest() is not None
    assert torch.equal(fresh["embed"].weight, model["embed"].weight)
    assert fresh["head"].weight is fresh["embed"].weight
    assert document("show", tmp_path / "run")["components"]["model"]["size"] == 5 * 4 * 4  # once
    kept = json.loads((tmp_path / "run" / "checkpoint-0" / "files" / "imported.json").read_text())
    assert kept == {"args": {"lr": 0.1, "betas": {"$tuple": [0.9, 0.95]}}, "best_acc1": 0.5}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    target = tmp_path / "ran"
    torch.save({"model": {}, "x": Payload(str(target))}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)

    with pytest.raises(UnsupportedStateError, match=r"weights_only=False.*import_checkpoint\(state, root"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "run", step=1)
    assert not target.exists()
    assert not (tmp_path / "run").exists()


def test_a_mapping_with_whole_objects_is_asked_for_their_state(tmp_path):
    run = training.at(3)
    import_checkpoint(
        {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler.state_dict()}, tmp_path, step=3
    )

    assert_same_run(restored(tmp_path), loaded_by_hand(states()))


@pytest.mark.parametrize("content", [b"", b"hello world", pickle.dumps({"a": 1}), b"PK\x03\x04 broken"])
def test_what_is_no_file_of_torch_save_is_a_typed_error(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises((CorruptCheckpointError, UnsupportedStateError, ConfigError)):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "run", step=1)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        import_checkpoint(tmp_path / "none.pt", tmp_path / "run", step=1)


def test_a_step_that_nobody_gives_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--step"):
        import_checkpoint(states(), tmp_path / "run")


@pytest.mark.parametrize(
    "state, naming, complaint",
    [
        ({"model": {"a": torch.ones(2)}, "net": {"a": torch.ones(2)}}, None, "both be component 'model'"),
        ({"epoch": 1, "arch": "x"}, None, "nothing in it looks like"),
        ({"model": {"a": torch.ones(2)}}, {"modle": "x"}, "did you mean model"),
        ({"model": {"a": torch.ones(2)}, "x": {"b": torch.ones(2)}}, {"x": "rng"}, "is taken"),
        ({"step": 1, "global_step": 2, "model": {"a": torch.ones(2)}}, None, "two different values for the step"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(state, naming, complaint):
    with pytest.raises(ConfigError, match=complaint):
        plan_import(state, naming)


def test_keys_are_renamed_by_a_mapping_or_a_function_and_kinds_can_be_given():
    state = {"g": {"w": torch.ones(2)}, "sampler": {"index": 3}, "lr": {"last_epoch": 1}, "it": 5}
    by_mapping = plan_import(state, {"g": "generator", "sampler": "loader", "lr": "scheduler", "it": "step"})
    names = {"g": "generator", "sampler": "loader", "lr": "scheduler", "it": "step"}
    by_function = plan_import(state, lambda key: names[key], {"generator": "stateful"})

    assert {name: part.kind for name, part in by_mapping.parts.items()} == {
        "generator": "module",
        "loader": "stateful",
        "scheduler": "stateful",
    }
    assert by_mapping.step == by_function.step == 5
    assert by_function.parts["generator"].kind == "stateful"


def test_a_run_that_holds_checkpoints_is_not_added_to_unless_asked_and_none_is_replaced(tmp_path):
    import_checkpoint(states(), tmp_path, step=5)
    with pytest.raises(RunNotEmptyError, match="--append"):
        import_checkpoint(states(), tmp_path, step=6)
    with pytest.raises(RunNotEmptyError, match="does not replace"):
        import_checkpoint(states(), tmp_path, step=5, append=True)
    assert import_checkpoint(states(), tmp_path, step=3, append=True).checkpoint.sequence == 2


def test_an_import_is_refused_while_a_job_writes(tmp_path):
    run = training.at(1)
    with CheckpointManager(tmp_path, model=run.model) as manager:
        manager.save(1).result()
        with pytest.raises(RunLockedError):
            import_checkpoint(states(), tmp_path, step=9, append=True)
    import_checkpoint(states(), tmp_path, step=9, append=True)


def test_a_checkpoint_without_other_components_is_still_refused(tmp_path):
    import_checkpoint({"model": states()["model"]}, tmp_path, step=1)
    run = training.make(9)
    manager = CheckpointManager(tmp_path, model=run.model, optimizer=run.optimizer)
    with manager, pytest.raises(IncompatibleStateError, match="lacks the registered components optimizer"):
        manager.restore_latest()


def test_the_command_says_what_becomes_of_everything(tmp_path):
    state = states()
    wrapped = {f"module.{key}": value for key, value in state["model"].items()}
    torch.save(
        {"model": wrapped, "opt": state["optimizer"], "arch": "x", "rng_state": torch.get_rng_state()},
        tmp_path / "a.pt",
    )
    arguments = ["import", tmp_path / "a.pt", tmp_path / "run", "--step", 4, "--epoch", 2, "--metric", "loss=0.5"]

    dry = invoke(*arguments, "--dry-run")
    assert not (tmp_path / "run").exists()
    wet = invoke(*arguments)

    assert (dry.exit_code, wet.exit_code, wet.stderr) == (0, 0, "")
    assert dry.stdout.splitlines()[:-1] == wet.stdout.splitlines()[:-1]
    assert wet.stdout.splitlines() == [
        "step 4, epoch 2",
        "  component model  (module) from model, 'module.' removed from every key",
        "  component optimizer  (optimizer) from opt",
        "  kept in files/imported.json: arch",
        "  left out: rng_state (states of random generators: which ones is not known)",
        f"imported {tmp_path / 'run' / 'checkpoint-4'}",
    ]
    (row,) = document("ls", tmp_path / "run")["checkpoints"]
    assert (row["step"], row["epoch"], row["metrics"]) == (4, 2, {"loss": 0.5})
    assert invoke("verify", tmp_path / "run").exit_code == 0


def test_the_command_has_the_usual_exit_codes(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "x": Payload(str(tmp_path / "ran"))}, tmp_path / "a.pt")
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "b.pt")
    codes = {
        ("none.pt",): 3,
        ("a.pt",): 1,
        ("b.pt", "--map", "x"): 2,
        ("b.pt", "--kind", "model=thing"): 2,
        ("b.pt",): 0,
        ("b.pt", "--append"): 1,
    }
    for (name, *rest), code in codes.items():
        result = invoke("import", tmp_path / name, tmp_path / "run", "--step", 1, *rest)
        assert result.exit_code == code, (name, rest, result.stderr)
        if code:
            error_of(result)


def test_an_import_as_json_has_the_documented_fields(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "arch": "x"}, tmp_path / "a.pt")
    found = document("import", tmp_path / "a.pt", tmp_path / "run", "--step", 1, "--map", "arch=")

    fields = {"root", "dry_run", "path", "step", "epoch", "components", "values", "left_out"}
    assert set(found) == fields
    assert found["components"] == {"model": {"source": "model", "kind": "module", "stripped": ""}}
    assert found["left_out"] == {"arch": "as asked"}


# ---------------------------------------------------------------------------------------------------------- export


@pytest.fixture
def saved(tmp_path):
    """A run root with one checkpoint, and the run that was saved."""
    run = training.at(3, frozen=True)
    with CheckpointManager(tmp_path / "run", **run.components) as manager:
        manager.save(3, epoch=1)
    return tmp_path / "run", run


def test_everything_is_exported_as_torch_save_would_have_written_it(saved, tmp_path):
    root, run = saved
    done = export_checkpoint(root, 3, tmp_path / "all.pt")

    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert (done.components, done.left_out, done.safe) == (
        ("model", "optimizer", "scheduler", "progress"),
        ("rng",),
        True,
    )
    assert (found.pop("step"), found.pop("epoch")) == (3, 1)
    expected = run.snapshot()
    for name in ("optimizer", "scheduler", "progress"):
        assert_identical(found[name], expected[name], name)
    assert set(found["model"]) == set(expected["model"])
    for key, tensor in expected["model"].items():
        assert_identical(found["model"][key], tensor, key)
    assert found["model"]._metadata["1"] == {"version": 2}


def test_what_was_exported_imports_to_the_same_run(saved, tmp_path):
    root, run = saved
    export_checkpoint(root, 3, tmp_path / "all.pth")
    plan = import_checkpoint(tmp_path / "all.pth", tmp_path / "other").plan

    assert (plan.step, plan.epoch, list(plan.values)) == (3, 1, ["progress"])
    found = restored(tmp_path / "other", frozen=True)
    assert_same_run(found, run)


def test_one_component_is_exported_alone(saved, tmp_path):
    root, run = saved
    export_checkpoint(root, 3, tmp_path / "o.pt", component="optimizer")
    assert_identical(torch.load(tmp_path / "o.pt", weights_only=True), run.snapshot()["optimizer"])

    done = export_checkpoint(root, 3, tmp_path / "rng.pt", component="rng")
    assert not done.safe
    assert torch.equal(torch.load(tmp_path / "rng.pt", weights_only=False)["torch"], torch.get_rng_state())


def test_safetensors_holds_the_names_of_the_state_dict(saved, tmp_path):
    root, run = saved
    export_checkpoint(root, 3, tmp_path / "m.safetensors")

    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert_identical(dict(sorted(found.items())), dict(sorted(run.snapshot()["model"].items())))
    plan = import_checkpoint(tmp_path / "m.safetensors", tmp_path / "other", step=0).plan
    assert plan.parts["model"].source == "the whole file"


def test_tied_weights_are_exported_once_and_load_again(tmp_path):
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model, fresh = tied(), tied()
    with CheckpointManager(tmp_path / "run", model=model) as manager:
        manager.save(1)
    export_checkpoint(tmp_path / "run", 1, tmp_path / "m.safetensors")
    export_checkpoint(tmp_path / "run", 1, tmp_path / "m.pt", component="model")

    assert len(safetensors.torch.load_file(tmp_path / "m.safetensors")) == 1
    safetensors.torch.load_model(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh["head"].weight, model["head"].weight)
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    assert set(import_checkpoint(tmp_path / "m.safetensors", tmp_path / "b", step=1).plan.parts["model"].value) == set(
        found
    )


def test_a_file_that_exists_is_replaced_only_by_force_and_no_half_file_is_left(saved, tmp_path):
    root, _ = saved
    (tmp_path / "m.pt").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        export_checkpoint(root, 3, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_text() == "mine"
    export_checkpoint(root, 3, tmp_path / "m.pt", overwrite=True)
    assert torch.load(tmp_path / "m.pt", weights_only=True)["step"] == 3

    with pytest.raises(UnsupportedStateError, match=r"export it to a \.pt file"):
        export_checkpoint(root, 3, tmp_path / "o.safetensors", component="optimizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "run"]


def test_a_damaged_checkpoint_is_not_exported(saved, tmp_path):
    root, _ = saved
    flip(root / "checkpoint-3" / "optimizer.safetensors")
    with pytest.raises(CorruptCheckpointError):
        export_checkpoint(root, 3, tmp_path / "all.pt")
    assert not (tmp_path / "all.pt").exists()
    result = invoke("export", root, 3, tmp_path / "all.pt")
    assert result.exit_code == 1
    error_of(result)


def test_the_export_command_has_the_usual_exit_codes_and_json(saved, tmp_path):
    root, _ = saved
    found = document("export", root, 3, tmp_path / "m.safetensors")
    assert set(found) == {"root", "step", "path", "components", "left_out", "size", "weights_only"}
    assert found["components"] == ["model"]
    codes = {
        (3, "m.safetensors"): 2,
        (3, "m.txt"): 2,
        (3, "no/m.pt"): 2,
        (3, "x.pt", "--component", "modle"): 2,
        (4, "x.pt"): 3,
        (3, "m.safetensors", "--force"): 0,
    }
    for (step, name, *rest), code in codes.items():
        result = invoke("export", root, step, tmp_path / name, *rest)
        assert result.exit_code == code, (step, name, result.stderr)


def test_importing_and_exporting_work_on_storage_without_rename(memory, tmp_path):
    torch.save(states(), tmp_path / "a.pt")
    assert invoke("import", tmp_path / "a.pt", memory.url, "--step", 2).exit_code == 0
    assert invoke("export", memory.url, 2, tmp_path / "b.pt").exit_code == 0
    assert_identical(torch.load(tmp_path / "b.pt")["scheduler"], torch.load(tmp_path / "a.pt")["scheduler"])


def test_each_command_is_listed_in_the_help():
    assert {"import", "export", "diff"} <= set(cli.commands)
