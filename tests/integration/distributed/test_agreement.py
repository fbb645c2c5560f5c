"""All ranks save, fail and stop together, and a rank that is gone is an error, not a wait without end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from checkpointer import CheckpointManager, dcp
from checkpointer.distributed import absence
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, open_storage
from tests.support.ranks import Outcome, launch, run

SHORT = {"write": {"rank_timeout": "4s"}}


def steps(root: Path) -> list[int]:
    return [info.step for info in Repository(open_storage(root)).list_checkpoints().checkpoints]


def nothing_left(root: Path) -> None:
    assert not list((root / ".checkpointer" / "tmp").iterdir())
    assert Repository(open_storage(root)).verify_all().ok


class Progress:
    """A position that every rank has of its own."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "history": torch.full((3,), float(self.seen))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["history"].tolist() == [float(state["seen"])] * 3
        self.seen = state["seen"]


def caught(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ------------------------------------------------------------------------------------ what each rank has of its own


def own_state(root: str, action: str) -> list[Any]:
    progress, model = Progress(), nn.BatchNorm1d(3)
    buffers = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    rank = dist.get_rank()
    with CheckpointManager(root, progress=progress, model=buffers, shared={"epoch": 0}) as mgr:
        if action == "save":
            progress.seen = 10 + rank
            model.running_mean.fill_(rank)
            mgr.save(0)
            return [torch.rand(2).tolist()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = mgr.restore_latest()
        said = [str(item.message) for item in caught]
        return [torch.rand(2).tolist(), progress.seen, model.running_mean.tolist(), restored.report.changed, said]


def seeded(root: str, action: str) -> list[Any]:
    torch.manual_seed(dist.get_rank() if action == "save" else 77)
    return own_state(root, action)


def test_random_numbers_positions_and_buffers_of_each_rank_come_back_to_it(tmp_path):
    drawn = run(2, seeded, str(tmp_path), "save")
    found = run(2, seeded, str(tmp_path), "restore")
    assert [row[0] for row in found] == [row[0] for row in drawn]
    assert drawn[0] != drawn[1]
    assert [row[1] for row in found] == [10, 11]
    assert [row[2] for row in found] == [[0.0] * 3, [1.0] * 3]
    nothing_left(tmp_path)


def test_more_ranks_than_before_take_rank_0s_position_and_never_the_same_random_numbers(tmp_path):
    drawn = run(2, seeded, str(tmp_path), "save")
    found = run(3, seeded, str(tmp_path), "restore")
    assert [row[0] for row in found[:2]] == [row[0] for row in drawn]
    assert [row[1] for row in found] == [10, 10, 10]
    assert len({tuple(row[0]) for row in found}) == 3
    assert all(any("saved by 2 ranks, restored by 3" in line for line in row[3]) for row in found)
    assert all(len(row[4]) == 1 and "another world size" in row[4][0] for row in found), found


# ------------------------------------------------------------------------------------ who writes what


def replicated(root: str) -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]))
    with CheckpointManager(root, model=model) as mgr:
        mgr.save(3)


def test_replicated_tensors_are_written_once_by_all_ranks_in_equal_parts_as_a_hugging_face_model(tmp_path):
    run(4, replicated, str(tmp_path))
    directory = tmp_path / "checkpoint-3"
    shards = sorted(directory.glob("model-0000?-of-00004.safetensors"))
    sizes = [file.stat().st_size for file in shards]
    assert len(shards) == 4
    assert max(sizes) - min(sizes) < 4096
    from safetensors.torch import load_file

    found = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    torch.manual_seed(0)
    expected = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    import json

    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    nothing_left(tmp_path)


def sparse_ranks(root: str) -> list[float]:
    """A tensor with fewer rows than ranks, and one on a part of the ranks alone."""
    mesh = init_device_mesh("cpu", (4,))
    rows = torch.arange(6.0).reshape(2, 3)
    part = rows[dist.get_rank() : dist.get_rank() + 1] if dist.get_rank() < 2 else rows[:0]
    few = DTensor.from_local(part.clone(), mesh, [Shard(0)], shape=rows.shape, stride=rows.stride())
    state = {"few": few, "empty": DTensor.from_local(torch.zeros(0, 5), mesh, [Shard(0)], shape=(0, 5), stride=(5, 1))}
    with CheckpointManager(root, state=state) as mgr:
        mgr.save(1)
        few.to_local().fill_(-1)
        mgr.restore(1)
    return few.full_tensor().tolist()


def test_ranks_that_hold_nothing_take_part(tmp_path):
    assert run(4, sparse_ranks, str(tmp_path)) == [[[0, 1, 2], [3, 4, 5]]] * 4
    nothing_left(tmp_path)


# ------------------------------------------------------------------------------------ failures


def dying(root: str, victim: int, moment: str) -> tuple[str, float]:
    config = {"write": {"rank_timeout": "3s" if moment == "stopped" else "10min"}}
    weights = nn.Linear(3, 3)
    with CheckpointManager(root, config=config, progress={"x": torch.ones(3)}, weights=weights) as mgr:
        mgr.save(1)
        mgr.wait()
        pids: list[Any] = [None, None]
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == victim:
            number = signal.SIGSTOP if moment == "stopped" else signal.SIGKILL
            if moment == "before":
                os.kill(os.getpid(), number)

            def die(*_: Any, **__: Any) -> float:
                os.kill(os.getpid(), number)
                time.sleep(1)  # the other threads of a process are stopped a moment later
                raise OSError("it was stopped, and goes on")

            LocalStorage.write = die
        began = time.monotonic()
        told = caught(lambda: mgr.save(2).result())
        seconds = time.monotonic() - began
        if moment == "stopped" and dist.get_rank() != victim:
            os.kill(pids[victim], signal.SIGCONT)
        return told, seconds


@pytest.mark.parametrize("victim,moment", [(1, "before"), (1, "writing"), (0, "before"), (0, "writing")])
@pytest.mark.skipif(sys.platform != "linux", reason="what the system tells of processes")
def test_a_dead_rank_of_the_same_host_is_an_error_at_once_that_names_it(tmp_path, victim, moment):
    outcomes: list[Outcome] = launch(2, dying, str(tmp_path), victim, moment, timeout=60)
    assert outcomes[victim].status == -signal.SIGKILL
    assert not outcomes[1 - victim].error
    told, seconds = outcomes[1 - victim].value
    assert told.startswith("SaveError")
    assert f"rank {victim} of 2 is dead: its process" in told
    assert ("Nothing was committed" in told) == (victim == 1)  # rank 0 might have committed before it died
    assert seconds < 5
    assert steps(tmp_path) == [1]
    assert Repository(open_storage(tmp_path)).verify_all().ok


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.thorough(lambda victim: victim == 0)
def test_a_rank_that_is_stuck_is_an_error_in_time_and_not_called_dead_for_certain(tmp_path, victim):
    outcomes: list[Outcome] = launch(2, dying, str(tmp_path), victim, "stopped", timeout=60)
    told, seconds = outcomes[1 - victim].value
    assert f"rank {victim} of 2 said nothing for 3 s (write: {{rank_timeout}}): it is dead or stuck" in told
    assert 3 <= seconds < 8
    assert steps(tmp_path) == [1]


def disagreeing(root: str) -> str:
    mgr = CheckpointManager(root, config=SHORT, progress={"x": 1})
    mgr.save(1)
    return caught(lambda: mgr.save(2 + dist.get_rank()))


def test_ranks_that_save_different_steps_are_told_so(tmp_path):
    for told in run(2, disagreeing, str(tmp_path)):
        assert "every rank has to make the same calls" in told
        assert "step 3" in told
    assert steps(tmp_path) == [1]


def pending(root: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    half = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    mgr = CheckpointManager(root, state={"w": half})
    return caught(lambda: mgr.save(1))


def test_a_tensor_that_waits_for_a_reduction_is_refused_by_name(tmp_path):
    for told in run(2, pending, str(tmp_path)):
        assert told.startswith("UnsupportedStateError")
        assert "state.w" in told
        assert "redistribute" in told


def corrupt(root: str) -> list[Any]:
    mgr = CheckpointManager(root, weights=nn.Linear(3, 3))
    restored = mgr.restore_latest()
    return [restored.step, [item.step for item in restored.skipped]]


def written_twice(root: str) -> None:
    with CheckpointManager(root, weights=nn.parallel.DistributedDataParallel(nn.Linear(3, 3))) as mgr:
        mgr.save(1)
        mgr.save(2)


@pytest.mark.filterwarnings("ignore:skipping a damaged")
def test_a_checkpoint_that_is_damaged_for_one_rank_is_passed_over_by_all(tmp_path):
    run(2, written_twice, str(tmp_path))
    own = tmp_path / "checkpoint-2" / "index-00001.safetensors"
    own.write_bytes(own.read_bytes().replace(b"rng", b"rnh", 1))
    assert run(2, corrupt, str(tmp_path)) == [[1, [2]], [1, [2]]]


def misfit(root: str) -> list[Any]:
    """Rank 1 has built another model."""
    model = nn.Linear(3, 3 + dist.get_rank(), bias=False)
    before = model.weight.detach().clone()
    with CheckpointManager(root, weights=model) as mgr:
        told = caught(mgr.restore_latest)
    return [told, torch.equal(model.weight, before)]


def test_a_checkpoint_that_does_not_fit_one_rank_changes_no_rank(tmp_path):
    with CheckpointManager(tmp_path, weights=nn.Linear(3, 3, bias=False)) as mgr:
        mgr.save(1)
    for told, untouched in run(2, misfit, str(tmp_path)):
        assert told.startswith("IncompatibleStateError")
        assert "live has [4, 3]" in told
        assert untouched


# ------------------------------------------------------------------------------------ locks, roots


def second_job(root: str) -> str:
    return caught(lambda: CheckpointManager(root, progress={"x": 1}).restore_latest())


def test_a_second_job_is_refused_on_all_ranks(tmp_path):
    with CheckpointManager(tmp_path, progress={"x": 1}) as mgr:
        mgr.save(1)
        for told in run(2, second_job, str(tmp_path)):
            assert told.startswith("RunLockedError")


def apart(root: str) -> str:
    mine = os.path.join(root, str(dist.get_rank()))
    return caught(lambda: CheckpointManager(mine, progress={"x": 1}).save(1))


def test_ranks_that_do_not_share_a_directory_find_out_at_the_first_save(tmp_path):
    for told in run(2, apart, str(tmp_path)):
        assert told.startswith("ConfigError")
        assert "rank 1 of 2" in told or "this rank" in told
        assert f"on {socket.gethostname()}" in told
        assert "shared file system" in told
    assert steps(tmp_path / "0") == []
    assert not list(tmp_path.rglob("probe-*"))


def pruned(root: str) -> list[Any]:
    removed: list[str] = []
    remove = Repository.remove
    Repository.remove = lambda self, info: removed.append(info.path) or remove(self, info)
    with CheckpointManager(root, config={"keep": {"last": 1}}, progress={"x": 1}) as mgr:
        mgr.restore_latest()
        plan = mgr.prune()
    return [[info.step for info, _ in plan.remove], len(removed)]


def test_one_rank_prunes_and_all_know_the_plan(tmp_path):
    with CheckpointManager(tmp_path, progress={"x": 1}) as mgr:
        for step in range(4):
            mgr.save(step)
    assert run(2, pruned, str(tmp_path)) == [[[0, 1, 2], 3], [[0, 1, 2], 0]]
    assert steps(tmp_path) == [3]


# ------------------------------------------------------------------------------------ time rules, signals


def timed(root: str) -> list[int]:
    """Only the coordinator's clock counts: that of the other rank is off by a day."""
    from datetime import datetime, timedelta, timezone

    from checkpointer import manager

    if dist.get_rank() == 1:

        class Wrong(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz or timezone.utc) + timedelta(days=1)

        manager.datetime = Wrong
    saved = []
    with CheckpointManager(root, config={"save": {"every": "1s", "every_n_steps": 7}}, progress={"x": 1}) as mgr:
        for step in range(1, 25):
            if mgr.should_save(step):
                saved.append(step)
            assert (mgr.save(step) is not None) == (step in saved)
            time.sleep(0.1)
    return saved


def test_the_coordinators_clock_decides_for_all_ranks(tmp_path):
    first, second = run(2, timed, str(tmp_path))
    assert first == second == steps(tmp_path)
    assert {1, 7, 14, 21} <= set(first)
    assert len(first) < 12


def measured(root: str, rules: dict[str, Any]) -> list[tuple[int, bool]]:
    """The coordinator alone evaluates, and hands in its metric at times that no other rank knows."""
    saved = []
    keep = {"last": 100, "best": {"monitor": "val_loss"}}
    with CheckpointManager(root, config={"save": {"on_metric": True, **rules}, "keep": keep}, progress={"x": 1}) as mgr:
        for step in range(1, 30):
            mgr.should_save(step)
            first = mgr.save(step)
            evaluated = {"val_loss": 1 / step} if step in (3, 4, 17) and dist.get_rank() == 0 else None
            second = mgr.save(step, metrics=evaluated)
            saved += [(step, second is not None)] if first or second else []
        best = mgr.best()
        assert best is not None
        assert best.step == 17
    return saved


@pytest.mark.parametrize("rules", [{}, {"every_n_steps": 10, "every": "1h", "on_signal": "SIGUSR1"}])
def test_a_metric_that_the_coordinator_alone_is_given_makes_the_call_due_on_all_ranks(tmp_path, rules):
    first, second = run(2, measured, str(tmp_path), rules)
    by_metric = [(3, True), (4, True), (17, True)]
    assert first == second
    assert [item for item in first if item[1]] == by_metric
    assert [step for step, _ in first] == (sorted({1, 10, 20, 3, 4, 17}) if rules else [3, 4, 17])


def signalled(root: str) -> list[Any]:
    saved = []
    config = {"save": {"every_n_steps": 1000, "on_signal": "SIGUSR1"}}
    with CheckpointManager(root, config=config, progress={"x": 1}) as mgr:
        for step in range(1, 400):
            if step == 20 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if mgr.save(step) is not None:
                saved.append(step)
            if mgr.should_stop():
                return [saved, step, mgr.stop_requested()]
            time.sleep(0.01)
    return [saved, None, None]


def test_a_signal_to_one_rank_makes_all_save_at_one_step_and_stop(tmp_path):
    first, second = run(2, signalled, str(tmp_path))
    assert first == second
    assert first[0] == [first[1]] == steps(tmp_path)
    assert 20 <= first[1] < 300
    assert first[2] is True


def user_group(root: str) -> list[Any]:
    """Collectives of the training thread, while a save is being written: no group of the user's is touched."""
    mesh = init_device_mesh("cpu", (2,))
    big = DTensor.from_local(torch.full((2**20,), float(dist.get_rank())), mesh, [Shard(0)])
    sums = []
    with CheckpointManager(root, state={"w": big}) as mgr:
        for step in range(3):
            mgr.save(step)
            for _ in range(50):
                value = torch.ones(1)
                dist.all_reduce(value)
                sums.append(float(value))
    return [set(sums), len(dist.distributed_c10d._world.pg_map)]


def test_training_talks_on_its_groups_while_a_save_is_written_and_no_group_is_made(tmp_path):
    groups = len(dist.distributed_c10d._world.pg_map)
    assert groups == 0
    for sums, count in run(2, user_group, str(tmp_path)):
        assert sums == {2.0}
        assert count <= 2  # the default one, and the mesh's
    assert steps(tmp_path) == [0, 1, 2]


# ------------------------------------------------------------------------------- ranks that hold different things


class Stage(nn.Module):
    """Layers of a pipeline, called as the whole model calls them."""

    def __init__(self, first: int, count: int, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(width, 3) for number in range(first, first + count)})


def stepped(model: nn.Module, parameters: Any = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters or model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def stages(rank: int) -> dict[str, Any]:
    model = Stage(2 * rank, 2)
    return {"model": model, "optimizer": stepped(model)}


def shapes(rank: int) -> dict[str, Any]:
    return {"model": Stage(0, 1, width=3 + rank)}


def dtypes(rank: int) -> dict[str, Any]:
    return {"model": Stage(0, 1).to(torch.float64 if rank else torch.float32)}


def divided_optimizer(rank: int) -> dict[str, Any]:
    """As ZeRO divides it by hand: the same number of parameters of the same shapes, and not the same ones."""
    model = Stage(0, 2)
    return {"model": model, "optimizer": stepped(model, list(model.layers[str(rank)].parameters()))}


def other_groups(rank: int) -> dict[str, Any]:
    model = Stage(0, 1)
    weight, bias = model.layers["0"].parameters()
    return {"model": model, "optimizer": stepped(model, [weight, bias] if rank else [bias, weight])}


def one_has_stepped(rank: int) -> dict[str, Any]:
    model = Stage(0, 1)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()) if rank else stepped(model)}


def kinds(rank: int) -> dict[str, Any]:
    return {"part": {"x": 1} if rank else nn.Linear(1, 1)}


UNLIKE = {
    stages: "component 'model' is not the same on all ranks (rank 0 alone: 'layers.0.weight', 'layers.0.bias', "
    "'layers.1.weight', 'layers.1.bias'; rank 1 alone: 'layers.2.weight'",
    shapes: "model.layers.0.weight is float32 [3, 3] on rank 0 and float32 [3, 4] on rank 1",
    dtypes: "model.layers.0.weight is float32 [3, 3] on rank 0 and float64 [3, 3] on rank 1",
    divided_optimizer: "rank 1 alone: 'model.layers.1.weight [3, 3], parameter 0 of group 0'",
    other_groups: "rank 0 alone: 'model.layers.0.bias [3], parameter 0 of group 0'",
    one_has_stepped: "component 'optimizer' is not the same on all ranks (rank 0 alone: 'state.0.step'",
    kinds: "component 'part' is not the same on all ranks: a module on rank 0, a container on rank 1",
}


def unlike(root: str) -> list[Any]:
    """Each case in a run root of its own; then what all ranks hold alike, in the same manager."""
    told = []
    for case in UNLIKE:
        place = f"{root}/{case.__name__}"
        with CheckpointManager(place, config=SHORT, **case(dist.get_rank())) as mgr:
            told.append([caught(lambda mgr=mgr: mgr.save(1)) for _ in range(2)] + [mgr.checkpoints()])
    return told


def test_ranks_that_hold_different_modules_or_optimizers_are_refused_in_the_first_save(tmp_path):
    for of_rank in run(2, unlike, str(tmp_path)):
        for (first, again, committed), expected in zip(of_rank, UNLIKE.values(), strict=True):
            assert first.startswith("UnsupportedStateError")
            assert expected in first
            assert again == first
            assert committed == []


def same_keys(root: str, alike: bool) -> list[str]:
    """Blocks of a pipeline that each rank numbers from 0: the same keys and shapes, and other values."""
    torch.manual_seed(0 if alike else dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with CheckpointManager(root, model=model, optimizer=stepped(model)) as mgr:
            for step in (1, 2):
                mgr.save(step)
    return [str(warning.message) for warning in said]


def test_ranks_that_hold_other_values_under_the_same_keys_are_warned_of_once(tmp_path):
    first, second = run(2, same_keys, str(tmp_path / "unlike"), False)
    assert len(first) == 1
    assert "2 of 16 parameters and moments are not equal on ranks 0 and 1, for example 'model.0.weight'" in first[0]
    assert second == []
    assert run(2, same_keys, str(tmp_path / "alike"), True) == [[], []]


def wide(root: str, apart: float) -> list[str]:
    """The same keys and shapes, and values that are ``apart``, relative to those of rank 0."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.mul_(1 + apart * dist.get_rank() * torch.randn(8, 8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with CheckpointManager(root, config=SHORT, model=model) as mgr:
            return [caught(lambda: mgr.save(1)), *(str(warning.message) for warning in said)]


def test_other_tensors_under_the_same_keys_are_refused_and_drift_by_rounding_is_a_warning(tmp_path):
    for (refused,) in run(2, wide, str(tmp_path / "other"), 1.0):
        assert refused.startswith("UnsupportedStateError")
        assert "ranks 0 and 1 hold different tensors under the same keys: 1 of 1" in refused
        assert "'model.weight'" in refused
    first, second = run(2, wide, str(tmp_path / "drift"), 1e-4)
    assert "not equal on ranks 0 and 1" in first[1]
    assert not any("UnsupportedStateError" in line for line in (first[0] or "", second[0] or ""))


def stages_with_dcp(root: str) -> list[bool]:
    """What the error advises."""
    same = []
    rank = dist.get_rank()
    torch.manual_seed(rank)
    parts = stages(rank)
    model, optim = get_state_dict(parts["model"], parts["optimizer"])
    dcp.save({"model": model, "optim": optim}, f"{root}/checkpoint-1")
    torch.manual_seed(10 + rank)
    again = stages(rank)
    model, optim = get_state_dict(again["model"], again["optimizer"])
    dcp.load({"model": model, "optim": optim}, f"{root}/checkpoint-1")
    set_state_dict(again["model"], again["optimizer"], model_state_dict=model, optim_state_dict=optim)
    for old, new in zip(parts["model"].parameters(), again["model"].parameters(), strict=True):
        same.append(torch.equal(old, new))
        saved, found = parts["optimizer"].state[old], again["optimizer"].state[new]
        same += [torch.equal(saved[slot], found[slot]) for slot in saved]
    return same


def test_what_the_refusal_of_pipeline_stages_advises_brings_each_stage_back(tmp_path):
    assert run(2, stages_with_dcp, str(tmp_path)) == [[True] * 16] * 2


# ---------------------------------------------------------------------------------- ranks that do not make the call


class Lines(logging.Handler):
    """Keeps what is logged, and marks that something was."""

    def __init__(self, mark: Path) -> None:
        super().__init__(logging.WARNING)
        self.mark = mark
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        self.mark.touch()


def late_call(root: str, late: int) -> list[str]:
    """Rank ``late`` makes each call once another has said that it waits for it."""
    absence.FIRST_REMINDER = 0.1
    rank, said = dist.get_rank(), []
    mgr = CheckpointManager(f"{root}/run", model=nn.Linear(2, 2))
    for step in (1, 2):
        lines = Lines(Path(root, f"said-{step}"))
        logging.getLogger("checkpointer").addHandler(lines)
        while rank == late and not lines.mark.exists():
            time.sleep(0.01)
        mgr.save(step)
        mgr.wait()
        logging.getLogger("checkpointer").removeHandler(lines)
        said += lines.said[:1]
    mgr.close()
    return said


@pytest.mark.parametrize("late", [0, 1])
def test_the_log_says_which_ranks_have_not_called_save_while_the_others_wait(tmp_path, late):
    """At the first save, where the ranks find each other, and at a later one, where they know their hosts."""
    first, second = run(2, late_call, str(tmp_path), late)[1 - late]
    waiter = 1 - late
    assert f"rank {waiter} has waited" in first
    assert f"for rank {late} of 2" in first
    assert "the save of step 2" in second
    assert f"for rank {late} of 2 (on {socket.gethostname()}), which has not come to this call" in second
    assert "Every rank has to call save" in second
    assert steps(tmp_path / "run") == [1, 2]


def test_reminders_come_after_a_minute_and_then_less_and_less_often(monkeypatch, caplog):
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(absence, "time", clock)
    waiting = absence.Absence("the save of step 5", 0, 4, 1800, training=True)
    minutes = []
    for minute in range(60):
        clock.now = 1000.0 + 60 * minute
        with caplog.at_level(logging.WARNING, "checkpointer"):
            waiting.remind([1, 3], {1: "a", 3: "b"})
        minutes += [minute] * len(caplog.records)
        caplog.clear()
    assert minutes == [1, 3, 9, 27]


def test_who_only_waits_for_slow_writers_is_not_told_to_call_save(caplog):
    writing = absence.Absence("the save of step 5", 0, 4, 1800, training=False)
    with caplog.at_level(logging.INFO, "checkpointer"):
        writing._next = 0
        writing.remind([1, 3], {1: "a", 3: "b"})
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "for rank 1, 3 of 4 (on a, b) to write its part" in record.getMessage()


def one_component_more(root: str) -> tuple[str, str, float]:
    """Rank 1 registers one component more, and so makes another manager."""
    rank = dist.get_rank()
    mgr = CheckpointManager(root, model=nn.Linear(2, 2), **({"more": {"x": 1}} if rank == 1 else {}))
    began = time.monotonic()
    return caught(lambda: mgr.save(1)), caught(lambda: mgr.save(1)), time.monotonic() - began


def another_manager_first(root: str) -> tuple[str, str, float]:
    """Rank 1 has two managers of the same components, and uses the second one alone."""
    managers = [CheckpointManager(root, config={"require_resume": False}, model=nn.Linear(2, 2)) for _ in range(2)]
    began = time.monotonic()
    if dist.get_rank() == 1:
        assert managers[0]._job.ranks.size == 3
    mgr = managers[dist.get_rank() == 1]
    return caught(lambda: mgr.save(1)), caught(lambda: mgr.save(1)), time.monotonic() - began


@pytest.mark.parametrize(
    "work, expected",
    [
        (one_component_more, "register the same components, in the same order, on every rank"),
        (another_manager_first, "make the same managers, and call them, in the same order on every rank"),
    ],
)
def test_ranks_that_wait_for_different_managers_are_told_so_at_once(tmp_path, work, expected):
    """They never meet: without more, each waits for the others for half an hour."""
    for first, again, seconds in run(3, work, str(tmp_path), timeout=60):
        assert first.startswith("ConfigError")
        assert expected in first
        assert "rank 1" in first
        assert again.startswith("ConfigError")
        assert seconds < 30
    assert steps(tmp_path) == []
