"""The benchmark measures what it says, and a contender that restores anything else has no timing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks import environment, goals, lazy_check, memory, pagecache, plot, report, scale
from benchmarks.buffers import Buffer, Reference
from benchmarks.ceilings import Ceilings
from benchmarks.contenders import (
    CONTENDERS,
    CheckpointerAsync,
    CheckpointerSync,
    DcpAsync,
    DcpAsyncCached,
    DcpAsyncStaging,
    DcpSave,
    Pending,
    Safetensors,
    TorchLoadMmap,
    TorchSave,
    TorchSaveFsync,
    Unavailable,
)
from benchmarks.measure import Outcome, Plan, Result, loader_workers, measure
from benchmarks.workloads import WORKLOADS, Training, Workload

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc"),
    pytest.mark.filterwarnings("ignore"),  # DCP warns that there is one process, forks warn of threads
]


def build(scale: float = 1.0) -> Training:
    """A frozen layer, a trained one, and running statistics."""
    frozen, trained = nn.Linear(64, round(64 * scale)), nn.Linear(round(64 * scale), 8)
    frozen.requires_grad_(requires_grad=False)
    model = nn.Sequential(frozen, nn.BatchNorm1d(round(64 * scale)), trained)
    inputs = torch.randn(4, 64)

    def backward(live: nn.Module) -> None:
        live(inputs).square().mean().backward()

    return Training(model, lambda live: torch.optim.AdamW([p for p in live.parameters() if p.requires_grad]), backward)


TINY = Workload("gpt", "tiny", build, successive=3)


class Waiting(Pending):
    """Done at the second look; writes when it is waited for."""

    def __init__(self, write):
        super().__init__()
        self._write, self._looks = write, 0

    def done(self):
        self._looks += 1
        return self._looks > 1

    def wait(self):
        self._write()


class Late(TorchSave):
    """Writes the state as it is when the save is waited for, not as it was at the call."""

    name, title = "late", "late"

    def _save(self, path):
        return Waiting(lambda: super(Late, self)._save(path))


class Forgetful(TorchSave):
    """Restores the model and not the optimizer: what a reader who trusts `state_dict()['state']` does."""

    name, title = "forgetful", "forgetful"

    def restorer(self, target):
        return lambda: target.model.load_state_dict(torch.load(self.newest)["model"])


class Absent(TorchSave):
    name, title, requires = "absent", "absent", "a_package_that_nobody_has"


class Broken(TorchSave):
    name, title = "broken", "broken"

    def _save(self, path):
        raise RuntimeError(f"cannot write {path}")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    kinds = (CheckpointerSync, CheckpointerAsync, TorchSaveFsync, TorchLoadMmap, Late, Forgetful, Absent, Broken)
    plan = Plan(tmp_path_factory.mktemp("bench"), rounds=2, contenders=kinds, steps=2, listen=0.01, tell=lambda _: None)
    found = measure(TINY, plan)
    assert not any(plan.folder.iterdir()), "checkpoints are left over"
    return found


def outcome_of(result, name):
    return next(outcome for outcome in result.outcomes if outcome.name == name)


@pytest.mark.parametrize("name", ["checkpointer-sync", "checkpointer-async", "torch.save+fsync"])
def test_who_restores_every_bit_has_every_figure_in_every_round(result, name):
    outcome = outcome_of(result, name)
    assert outcome.status == ""
    figures = {"blocked", "durable", "excess", "step", "warm", "warm_step", "cold", "cold_step", "written"}
    for figure in figures:
        assert len(outcome.samples[figure]) == 2, figure
    assert outcome.median("durable") >= outcome.median("blocked") > 0
    assert outcome.median("written") >= result.size


@pytest.mark.parametrize("name, leaf", [("late", "model.1.running_mean"), ("forgetful", "optimizer.state.0")])
def test_who_restores_another_bit_is_void_and_the_tensor_is_named(result, name, leaf):
    outcome = outcome_of(result, name)
    assert outcome.status.startswith("void: ")
    assert leaf.split(".")[0] in outcome.status
    assert outcome.median("warm") is None, "a void contender has no median"
    assert outcome.samples["warm"], "its samples are kept, for those who look"


def test_who_is_not_installed_or_fails_is_listed_as_such(result):
    assert outcome_of(result, "absent").status == "not installed"
    assert outcome_of(result, "broken").status.startswith("failed: RuntimeError: cannot write …")


def test_a_contender_that_only_restores_differently_has_no_figures_of_saves(result):
    outcome = outcome_of(result, "torch.load-mmap")
    assert outcome.median("blocked") is None
    assert outcome.median("warm_step") > 0


def test_successive_checkpoints_are_weighed_against_what_changed(result):
    found = outcome_of(result, "torch.save+fsync").successive
    frozen = 64 * 64 * 4 + 64 * 4
    assert found["base"] >= frozen
    assert found["changed"] == result.size - found["base"]
    assert found["later"] >= result.size, "it writes everything each time"


def test_each_ceiling_is_measured_in_each_round_and_the_best_way_counts(result):
    for name in ("memcpy", "write", "warm_read", "cold_read"):
        way, seconds = result.ceiling(name)
        assert 0 < seconds == min(float(np.median(samples)) for samples in result.ceilings[name].values())
        assert "thread" in way
        assert all(len(samples) % 2 == 0 for samples in result.ceilings[name].values())


def test_the_report_says_all_of_it_and_names_no_machine(result, tmp_path):
    about = {"environment": environment.describe(tmp_path), "run": {"scale": 1}}
    text = report.to_markdown({"gpt": result}, about)
    assert "| checkpointer, async |" in text
    assert "| absent | not installed |" in text
    assert "void: " in text
    assert "late †" in text, "it does not fsync"
    assert str(tmp_path) not in text
    assert Path("/proc/sys/kernel/hostname").read_text(encoding="utf-8").strip() not in text.split()
    verdicts = goals.judge({"gpt": result})
    back = json.loads(json.dumps(report.to_json({"gpt": result}, verdicts, about)))
    assert len(back["workloads"]["gpt"]["outcomes"]) == 8
    assert back["goals"][0]["goal"].startswith("`sync` is durable")


def test_the_plot_comes_out_as_svg_and_png(result, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot.draw(result, tmp_path / "gpt")
    assert [path.suffix for path in paths] == [".svg", ".png"]
    assert all(path.stat().st_size > 1000 for path in paths)


def synthetic(**figures: dict[str, float]) -> Result:
    """A result in which each contender has one sample of each figure."""
    outcomes = [
        Outcome(name.replace("_", "-"), name, samples={figure: [value] for figure, value in found.items()})
        for name, found in figures.items()
    ]
    ceilings = {name: {"1 thread": [1.0]} for name in ("memcpy", "write", "warm_read", "cold_read")}
    return Result("gpt", "synthetic", 1 << 30, 1000, 0, ceilings, outcomes, 0.0)


def verdict_of(result, words):
    return next(verdict for verdict in goals.judge({"gpt": result}) if words in verdict.goal)


@pytest.mark.parametrize("durable, holds", [(1.25, True), (1.26, False)])
def test_a_goal_holds_up_to_its_limit(durable, holds):
    assert verdict_of(synthetic(checkpointer_sync={"durable": durable}), "1.25 × raw write").holds is holds


def test_a_goal_that_names_every_peer_needs_the_best_of_them():
    ours = {"warm_step": 2.0}
    assert verdict_of(synthetic(checkpointer_async=ours, a={"warm_step": 3.0}), "warm restore and first").holds
    beaten = synthetic(checkpointer_async=ours, a={"warm_step": 3.0}, b={"warm_step": 1.9})
    assert verdict_of(beaten, "warm restore and first").holds is False
    assert verdict_of(synthetic(checkpointer_async=ours), "warm restore and first").holds is None


def test_restores_of_all_modes_count_together():
    found = synthetic(
        checkpointer_sync={"warm": 1.0}, checkpointer_async={"warm": 1.4}, checkpointer_lazy={"warm": 9.0}
    )
    assert verdict_of(found, "1.5 × raw warm read").measured == "1.40 ×"


def test_a_goal_counts_nothing_of_a_void_contender():
    found = synthetic(checkpointer_sync={"durable": 0.1})
    found.outcomes[0].status = "void: model.weight differs"
    assert verdict_of(found, "1.25 × raw write").holds is None
    assert verdict_of(found, "every mode restores").holds is None


@pytest.mark.parametrize(
    "kind", [TorchSave, TorchLoadMmap, Safetensors, DcpSave, DcpAsync, DcpAsyncCached, DcpAsyncStaging]
)
def test_a_peer_is_used_so_that_it_restores_every_bit(kind, tmp_path):
    training = build()
    training.step()
    contender = kind(tmp_path / kind.name, training)
    reference = Reference(training)
    pending = contender.save()
    with contender.guard():  # around the forward pass too: it changes the statistics of the batch normalization
        training.step()
    pending.wait()
    target = training.fresh()
    assert reference.difference(target) is not None, "nothing is restored yet"
    contender.restorer(target)()
    assert reference.difference(target) is None
    contender.close()


def test_each_workload_trains_and_its_fresh_run_differs_in_objects_and_values():
    for name in ("gpt", "large", "lora", "convnet"):  # "small" is "large" with more tensors
        training = WORKLOADS[name].build(0.001)
        training.step()
        reference = Reference(training)
        target = training.fresh()
        assert reference.difference(target), name
        assert not target.optimizer.state_dict()["state"]
        live = {tensor.data_ptr() for tensor in training.model.state_dict().values()}
        assert not live & {tensor.data_ptr() for tensor in target.model.state_dict().values()}
        training.update()
        assert reference.changed(training) > 0


def test_names_of_contenders_are_distinct():
    assert len({kind.name for kind in CONTENDERS}) == len({kind.title for kind in CONTENDERS}) == len(CONTENDERS)


def test_a_file_is_brought_into_the_page_cache_and_taken_out(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    pagecache.load([path])
    assert pagecache.resident([path]) == 1.0
    left = pagecache.evict([path])
    assert left == 0.0 or environment.describe(tmp_path)["file system"] == "tmpfs"
    pagecache.load([path])
    assert pagecache.resident([path]) == 1.0


def test_memory_that_comes_and_goes_is_seen():
    peak = memory.Peak()
    with peak.watch():
        Buffer(64 << 20)
    assert 60 << 20 < peak.extra < 90 << 20


def test_memory_of_children_is_counted():
    peak = memory.Peak()
    code = "kept = bytearray(64 << 20); input()"
    with peak.watch(), subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        child.communicate(b"\n")
    assert peak.extra > 60 << 20


def test_loader_workers_are_children_meanwhile_and_gone_after():
    before = set(memory.children())
    with loader_workers(2):
        assert len(set(memory.children()) - before) == 2
    assert set(memory.children()) <= before


def test_the_ceilings_move_the_bytes_they_claim(tmp_path):
    source, scratch = Buffer(3 << 20), Buffer(3 << 20)
    source.array[:] = np.arange(source.size, dtype=np.uint32).view(np.uint8)[: source.size]
    scratch.array.fill(0)
    ceilings = Ceilings(source, scratch, tmp_path)
    ceilings.measure()
    ceilings.close()
    assert np.array_equal(source.array, scratch.array)


def test_a_mode_that_does_not_exist_is_unavailable(tmp_path):
    class Future(CheckpointerSync):
        mode = "telepathic"

    with pytest.raises(Unavailable, match="not available in this version"):
        Future(tmp_path / "future", build())


def test_the_program_writes_its_report_and_strict_fails_where_a_goal_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(goals, "judge", lambda _: [goals.Verdict("the moon", holds=False, measured="cheese")])
    arguments = ["--workload", "large", "--scale", "0.001", "--rounds", "1", "--only", "checkpointer-sync"]
    arguments += ["--dir", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert program.main([*arguments, "--strict"]) == 1
    printed = capsys.readouterr().out
    assert "| the moon | **no** | cheese |" in printed
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") == printed[:-1]
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["run"]["rounds"] == 1


def test_a_name_that_does_not_exist_is_refused_with_those_that_do(capsys):
    assert program.main(["--only", "orbax"]) == 2
    assert "nothing is called orbax; there are checkpointer-sync" in capsys.readouterr().err


def test_the_check_of_lazy_mode_is_timed_with_and_without(tmp_path, capsys):
    lazy_check.main(["--scale", "0.0005", "--rounds", "2", "--dir", str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `save`")]
    assert [row.split("|")[1].strip() for row in rows] == ["`save`, with the sample", "`save`, without"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", scale.LAYOUTS)
def test_the_plans_of_many_ranks_are_counted_and_held_against_the_goals(layout, capsys):
    status = scale.main(["--ranks", "8,16", "--tensors", "40", "--layout", layout])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith(("| 8 ", "| 16 "))]
    assert [int(row[0]) for row in rows] == [8, 16]
    assert [int(row[1]) for row in rows] == [{"ddp": 1, "pipeline": 17}.get(layout, 2)] * 2
    assert status == int("- missed" in printed)
    assert printed.splitlines()[-1].endswith("of 5 goals are met with up to 16 ranks")


def test_a_goal_that_is_missed_is_named():
    fast = scale.Row(8, 1, 1e-3, 1e-3, 1e-3, 1e-3, 100.0, 50.0, 1e-3, 1.0)
    slow = fast._replace(ranks=10_000, coordinator=1.5, rank=1.0, bytes_a_rank=5000.0)
    assert all(met for _, met in scale.goals("fsdp", [fast, fast._replace(ranks=10_000)]))
    missed = [goal for goal, met in scale.goals("fsdp", [fast, slow]) if not met]
    assert missed == [
        "fsdp, 10000 ranks: coordinator within 1 s",
        "fsdp, 10000 ranks: coordinator within 100 µs a rank",
        "fsdp, 10000 ranks: at most 1 KiB a rank through the store",
        "fsdp: another rank takes no longer with 10000 ranks than with 8",
    ]
