"""The first save in async mode: its memory is touched beside training; one that comes sooner is a copy as well."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
from checkpointer.save import first_saves, saver
from checkpointer.staging import arena, prefault
from checkpointer.system.memory import PAGE, Region
from tests.support.compare import assert_identical

linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's own bookkeeping")
MIB = 1 << 20
SELDOM = {"save": {"every_n_steps": 1000}, "write": {"mode": "async"}}


@pytest.fixture(autouse=True)
def small_states_count(monkeypatch) -> None:
    monkeypatch.setattr(first_saves, "WORTH", MIB)
    monkeypatch.setattr(arena, "SPARE", MIB)
    monkeypatch.setattr(prefault, "PAUSE", 0.0)


@pytest.fixture
def regions(monkeypatch) -> list[weakref.ref[Region]]:
    """The memory that arenas have taken."""
    found: list[weakref.ref[Region]] = []

    def region(size: int, **options: bool) -> Region:
        made = Region(size, **options)
        found.append(weakref.ref(made))
        return made

    monkeypatch.setattr(arena, "Region", region)
    return found


class Run:
    """A model of 8 MiB and its optimizer, which make 24 MiB of state."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, width: int = 2 << 20) -> None:
        torch.manual_seed(0)
        self.model = nn.ParameterDict({"weight": nn.Parameter(torch.randn(width))})
        self.optimizer = kind(self.model.parameters(), lr=0.1)  # type: ignore[call-arg]

    def manager(self, root: Path, config: Any = None, **options: Any) -> CheckpointManager:
        return CheckpointManager(root, config=config, model=self.model, optimizer=self.optimizer, **options)

    def step(self) -> None:
        weight = self.model["weight"]
        weight.grad = torch.ones_like(weight)
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        moments = {key: value for state in self.optimizer.state.values() for key, value in state.items()}
        return {name: value.detach().clone() for name, value in {**moments, "weight": self.model["weight"]}.items()}

    @property
    def pages(self) -> int:
        return sum(tensor.nbytes for tensor in self.state().values()) // PAGE


def touching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpointer-prefault"]


def until_touched() -> None:
    """Wait for the end of what has begun."""
    found = touching()
    for thread in found:
        thread.join(60)
        assert not thread.is_alive()


def faults(function: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def restored(root: Path, step: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, torch.Tensor]:
    run = Run(kind)
    with run.manager(root, read_only=True) as mgr:
        assert mgr.verify().ok
        mgr.restore(step)
    return run.state()


# ------------------------------------------------------------------------------------------------- touched beside it


@linux
def test_the_first_save_finds_its_memory_touched_after_a_step(tmp_path):
    run = Run()
    with run.manager(tmp_path, SELDOM) as mgr:
        run.step()
        until_touched()
        expected = run.state()
        assert faults(lambda: mgr.save(1, force=True)) < run.pages // 4
        run.step()
        mgr.wait()
    assert_identical(restored(tmp_path, 1), expected)


@linux
def test_without_that_the_first_save_takes_a_page_fault_for_each_page(tmp_path, monkeypatch):
    monkeypatch.setattr(first_saves, "WORTH", 1 << 40)
    run = Run()
    with run.manager(tmp_path, SELDOM) as mgr:
        run.step()
        assert not touching()
        assert faults(lambda: mgr.save(1, force=True)) > run.pages // 2


@pytest.mark.parametrize("call", ["save", "should_save"])
def test_a_call_that_is_not_due_begins_it_where_no_optimizer_makes_state(tmp_path, regions, call):
    state = {"tensor": torch.ones(MIB)}
    with CheckpointManager(tmp_path, config=SELDOM, state=state) as mgr:
        assert not regions
        getattr(mgr, call)(1)
        until_touched()
        (region,) = regions
        mgr.save(2, force=True)
        assert [region] == regions, "the save takes the memory that was touched"


def test_nothing_is_touched_before_every_optimizer_has_its_state(tmp_path, regions):
    run, other = Run(), Run()
    mgr = CheckpointManager(
        tmp_path, config=SELDOM, a=run.model, b=run.optimizer, c=other.model, d=other.optimizer, state={}
    )
    with mgr:
        assert not mgr.should_save(1)
        run.step()
        assert not mgr.should_save(2)
        Run().step()
        assert not regions
        other.step()
        assert len(regions) == 1
        mgr.save(3, force=True)


def test_an_optimizer_that_keeps_no_state_is_ready_after_its_first_step(tmp_path, regions):
    run = Run(torch.optim.SGD)
    with run.manager(tmp_path, SELDOM) as mgr:
        mgr.should_save(1)
        assert not regions
        run.step()
        assert len(regions) == 1
        mgr.save(2, force=True)


def test_a_restored_optimizer_is_ready_at_once(tmp_path, regions):
    run = Run()
    with run.manager(tmp_path, {"write": {"mode": "sync"}}) as mgr:
        run.step()
        mgr.save(1)
    again = Run()
    with again.manager(tmp_path, SELDOM) as mgr:
        mgr.restore_latest()
        assert not regions
        mgr.should_save(2)
        assert len(regions) == 1
        mgr.save(2, force=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_step_in_a_forked_child_has_no_memory_touched(tmp_path, regions):
    run = Run()
    with run.manager(tmp_path, SELDOM):
        child = os.fork()
        if not child:
            run.step()
            os._exit(len(regions))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.step()
        assert len(regions) == 1


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_other_modes_have_no_memory_touched(tmp_path, regions, mode):
    run = Run()
    with run.manager(tmp_path, {**SELDOM, "write": {"mode": mode}}) as mgr:
        run.step()
        mgr.should_save(1)
        mgr.save(1)
        assert not regions
        assert not touching()
        mgr.save(2, force=True)


def test_a_reader_has_no_memory_touched(tmp_path, regions):
    run = Run()
    with run.manager(tmp_path, {"write": {"mode": "sync"}}) as mgr:
        run.step()
        mgr.save(1)
    with run.manager(tmp_path, SELDOM, read_only=True) as mgr:
        run.step()
        assert not regions


def test_close_in_the_middle_ends_the_thread_and_gives_the_memory_back(tmp_path, regions, monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    run = Run()
    mgr = run.manager(tmp_path, SELDOM)
    run.step()
    (region,) = regions
    assert touching()
    mgr.close()
    assert not touching()
    assert region() is None
    run.step()
    assert len(regions) == 1


def test_a_manager_that_is_dropped_in_the_middle_leaves_nothing(tmp_path, regions, monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    run = Run()
    mgr = run.manager(tmp_path, SELDOM)
    run.step()
    del mgr
    gc.collect()
    until_touched()
    gc.collect()
    assert regions[0]() is None


def test_no_memory_for_it_is_said_in_the_log_and_the_save_tries_itself(tmp_path, monkeypatch, caplog):
    def fail(size: int, **options: bool) -> Region:
        raise MemoryError("none left")

    run = Run()
    with run.manager(tmp_path, SELDOM) as mgr:
        with monkeypatch.context() as patch, caplog.at_level("INFO", "checkpointer"):
            patch.setattr(arena, "Region", fail)
            run.step()
            assert "none left" in caplog.text
            with pytest.raises(SaveError, match="mode: sync"):
                mgr.save(1, force=True)
        expected = run.state()
        mgr.save(2, force=True).result()
    assert_identical(restored(tmp_path, 2), expected)


def test_state_that_has_grown_since_is_saved_in_larger_memory(tmp_path, regions):
    state = {"tensor": torch.ones(MIB)}
    with CheckpointManager(tmp_path, config=SELDOM, state=state) as mgr:
        mgr.should_save(1)
        state["tensor"] = torch.full((4 * MIB,), 2.0)
        mgr.save(2, force=True).result()
        assert len(regions) == 2
        assert regions[0]() is None
        state["tensor"].zero_()
        mgr.restore(2)
    assert_identical(state["tensor"], torch.full((4 * MIB,), 2.0))


# ---------------------------------------------------------------------------------------- a save that comes before that


@pytest.fixture
def never_touched(monkeypatch) -> None:
    """Memory that is being touched, and never is."""
    monkeypatch.setattr(prefault, "free_memory", lambda: 0)


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """The writer begins no file before this is set."""
    opened = threading.Event()
    real = saver.write_checkpoint

    def write(*arguments: Any) -> Any:
        assert opened.wait(60)
        return real(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", write)
    yield opened
    opened.set()


@pytest.mark.parametrize("saves", [1, 4])
def test_what_is_changed_by_hand_right_after_an_early_save_does_not_reach_it(tmp_path, never_touched, held, saves):
    """Only ``lazy`` mode asks for ``mgr.staged()``: ``async`` mode has copied the state when ``save`` returns."""
    run = Run()
    run.step()
    expected = []
    with run.manager(tmp_path) as mgr:
        for step in range(saves):
            held.clear()
            expected.append(run.state())
            handle = mgr.save(step)
            for tensor in (run.model["weight"], *run.optimizer.state[run.model["weight"]].values()):
                tensor.data.fill_(step)
            held.set()
            handle.result()
    for step, state in enumerate(expected):
        assert_identical(restored(tmp_path, step), state)


def test_a_save_in_the_middle_of_touching_holds_the_state_of_its_call_in_that_memory(tmp_path, regions, monkeypatch):
    monkeypatch.setattr(prefault, "PAUSE", 1e6)
    run = Run()
    with run.manager(tmp_path) as mgr:
        run.step()
        assert touching()
        expected = run.state()
        mgr.save(1)
        run.step()
        mgr.wait()
        until_touched()  # at once: it has been stopped
        assert len(regions) == 1, "one copy of the state at most"
    assert_identical(restored(tmp_path, 1), expected)


def test_after_the_first_save_no_hook_is_left(tmp_path):
    hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    before = [len(some) for some in hooks]
    run = Run()
    with run.manager(tmp_path) as mgr:
        run.step()
        assert [len(some) for some in hooks] != before
        mgr.save(1)
        assert [len(some) for some in hooks] == before


def test_a_save_inside_a_step_holds_the_state_before_it(tmp_path, never_touched):
    run = Run()
    run.step()
    expected: list[dict[str, torch.Tensor]] = []
    with run.manager(tmp_path) as mgr:

        def save(*_: object) -> None:
            expected.append(run.state())
            mgr.save(1)

        hook = run.optimizer.register_step_pre_hook(save)
        run.step()
        hook.remove()
        mgr.wait()
    assert_identical(restored(tmp_path, 1), expected[0])


@linux
def test_an_early_save_and_later_copies_take_the_state_once(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    run = Run(width=16 << 20)  # 192 MiB of state
    run.step()
    size = run.pages * PAGE
    gc.collect()
    before = resident()
    peak = 0
    with run.manager(tmp_path) as mgr:
        for step in range(4):
            run.step()
            mgr.save(step)
            peak = max(peak, resident())
            mgr.wait()
            peak = max(peak, resident())
    assert size // 2 < peak - before < size + (64 << 20)
